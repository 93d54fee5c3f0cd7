#!/bin/sh
# SPDX-License-Identifier: MIT
# Every statistic counts, and the table of --stats says what KVM_GET_STATS_FD says.
# usage: stats-test.sh KVMLET STATS_VM HELLO_VM STATS_DEF
kvmlet=$(realpath "$1")
vm=$(realpath "$2")
hello=$(realpath "$3")
def=$4
. "$(dirname "$0")/tap.sh"

"$kvmlet" run --stats -- "$vm" > "$tmp/fd" 2> "$tmp/table"
check "stats-vm ends well" test $? -eq 0
[ -s "$tmp/fd" ] || sed 's/^/# /' "$tmp/table"

# table SECTION NAME: its value
table()
{
	awk -v section="$1" -v name="$2" '/^[^ ]/ { in_it = index($0, section) == 1; next }
		in_it && $1 == name { print $2 }' "$tmp/table"
}

for kind in VM VCPU; do
	who=$(echo $kind | tr 'A-Z' 'a-z')
	section="$(echo $kind | sed 's/VCPU/vCPU/') counters"
	for name in $(sed -n "s/^KL_${kind}_STAT([a-z0-9_]*, *\"\([a-z0-9_]*\)\".*/\1/p" "$def"); do
		value=$(awk -v who=$who -v name="$name" '$1 == who && $2 == name { print $3 }' "$tmp/fd")
		if [ -z "$value" ]; then
			not_ok "$who $name" "KVM_GET_STATS_FD does not have it"
		elif [ "$value" -eq 0 ] && [ "${name#gpc_}" = "$name" ]; then
			# A plain program has no cache yet; tests/unit/test_gpc_api.c counts them.
			not_ok "$who $name" "is 0 although stats-vm drives it"
		elif [ "$value" != "$(table "$section" "$name")" ]; then
			not_ok "$who $name" "KVM_GET_STATS_FD: $value" \
				"--stats: $(table "$section" "$name")"
		else
			ok "$who $name"
		fi
	done
done
check "the file has what the table has" test "$(wc -l < "$tmp/fd")" -eq "$(grep -c '^KL_.*_STAT(' "$def")"

# Exact counts where the program determines them
value()
{
	awk -v name="$1" '$1 == "vcpu" && $2 == name { print $3 }' "$tmp/fd"
}
for pair in halt_exits:1 signal_exits:1 pf_guest:1 hypercalls:1 irq_injections:1 nmi_injections:1 \
	insn_emulation_fail:1 io_exits:4; do
	check "$pair" test "$(value "${pair%:*}")" -eq "${pair#*:}"
done
check "exits by reason: HLT" test "$(table 'exits to the program' HLT)" = 1
check "exits by reason: IO" test "$(table 'exits to the program' IO)" = 4
check "exits by reason: INTERNAL_ERROR" \
	test "$(table 'exits to the program' INTERNAL_ERROR)" = 1

# Two vCPUs, a VM that is there at exit
"$kvmlet" run --stats -- "$hello" > "$tmp/out" 2> "$tmp/table"
status=$?
check "hello-vmm under --stats" test $status -eq 0
[ $status -eq 0 ] || sed 's/^/# /' "$tmp/table"
check "VMs" test "$(table 'kvmlet statistics' VMs)" = 1
check "vCPUs" test "$(table 'kvmlet statistics' vCPUs)" = 2
mips=$(table 'kvmlet statistics' MIPS)
check "MIPS is a number above 0" test "${mips%%.*}" -gt 0
"$kvmlet" run -- "$hello" > "$tmp/out" 2> "$tmp/table"
check "no table without --stats" test ! -s "$tmp/table"

done_testing
