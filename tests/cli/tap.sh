# SPDX-License-Identifier: MIT
# TAP for shell tests. The sourcing script ends with `done_testing`.
# shellcheck shell=sh
tap_n=0
tap_failed=0
tmp=$(mktemp -d "${TMPDIR:-/tmp}/kvmlet-test.XXXXXX") || exit 99
trap 'rm -rf "$tmp"' EXIT

ok()
{
	tap_n=$((tap_n + 1))
	echo "ok $tap_n - $1"
}

not_ok()
{
	tap_n=$((tap_n + 1))
	tap_failed=$((tap_failed + 1))
	echo "not ok $tap_n - $1"
	shift
	for line; do
		printf '%s\n' "$line" | sed 's/^/# /'
	done
}

skip()
{
	tap_n=$((tap_n + 1))
	echo "ok $tap_n - $1 # SKIP $2"
}

# check NAME COMMAND...: passes if the command succeeds
check()
{
	name=$1
	shift
	if out=$("$@" 2>&1); then
		ok "$name"
	else
		not_ok "$name" "status $?: $*" "$out"
	fi
}

# expect NAME STATUS PATTERN COMMAND...: exit status, and a grep -E pattern in the output
expect()
{
	name=$1 want=$2 pattern=$3
	shift 3
	out=$("$@" 2>&1 </dev/null)
	got=$?
	if [ "$got" -ne "$want" ]; then
		not_ok "$name" "status $got, not $want: $*" "$out"
	elif ! printf '%s\n' "$out" | grep -Eq -e "$pattern"; then
		not_ok "$name" "output lacks '$pattern': $*" "$out"
	else
		ok "$name"
	fi
}

done_testing()
{
	echo "1..$tap_n"
	[ "$tap_failed" -eq 0 ]
	exit
}
