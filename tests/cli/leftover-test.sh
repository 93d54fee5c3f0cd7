#!/bin/bash
# SPDX-License-Identifier: MIT
# However a program ends, nothing of it or of kvmlet's stays: no process, shared memory, file.
# usage: leftover-test.sh KVMLET SPIN_VM
kvmlet=$(realpath "$1")
spin=$(realpath "$2")
. "$(dirname "$0")/tap.sh"

# sid_of PID; field 6 of stat, behind the name in parentheses
sid_of()
{
	local stat
	read -r stat < "/proc/$1/stat" 2>/dev/null || return 1
	stat=${stat##*) }
	# shellcheck disable=SC2086
	set -- $stat
	echo "$4"
}

in_session()
{
	local p pid
	for p in /proc/[0-9]*; do
		pid=${p#/proc/}
		[ "$(sid_of "$pid" 2>/dev/null)" = "$1" ] && echo "$pid $(tr '\0' ' ' < "$p/cmdline")"
	done 2>/dev/null
}

listing()
{
	# Other tests and programs come and go there too: what counts in /tmp is our name, and theirs
	# begins with kvmlet-test (tests/preload/sources.c: kvm-s-)
	find /dev/shm /dev/mqueue -mindepth 1 ! -name 'kvm-s-*' 2>/dev/null
	find /tmp /var/tmp /run -maxdepth 1 -name '*kvmlet*' ! -name 'kvmlet-test*' 2>/dev/null
}

# What is there now and was not before
appeared()
{
	listing | sort > "$tmp/after"
	comm -13 "$tmp/before" "$tmp/after"
}

# end_by NAME MODE SIGNAL STATUS
end_by()
{
	local name=$1 mode=$2 signal=$3 want=$4 pid got="" left status i
	mkdir "$tmp/tmpdir" "$tmp/cwd"
	listing | sort > "$tmp/before"
	rm -f "$tmp/out" && mkfifo "$tmp/out"
	(
		cd "$tmp/cwd" || exit 99
		TMPDIR=$tmp/tmpdir XDG_RUNTIME_DIR=$tmp/tmpdir exec env --default-signal setsid "$kvmlet" run \
			--log "$tmp/log" -- "$spin" "$mode"
	) > "$tmp/out" 2> "$tmp/err" &
	pid=$!
	exec 3< "$tmp/out"
	read -r -t 60 got <&3
	[ -n "$signal" ] && kill -s "$signal" "$pid"
	for ((i = 0; i < 600; i++)); do # a minute to end
		case $(sed 's/.*) //' "/proc/$pid/stat" 2>/dev/null) in
		Z* | X* | '') break ;;
		esac
		sleep 0.1
	done
	[ $i -lt 600 ] || { kill -s KILL "$pid"; echo "# $name: does not end"; }
	wait "$pid" 2>/dev/null
	status=$?
	exec 3<&-
	left=$(in_session "$pid")
	if [ "$got" != ready ]; then
		not_ok "$name" "the program did not get ready: '$got'" "$(cat "$tmp/err" "$tmp/log")"
	elif [ "$status" -ne "$want" ]; then
		not_ok "$name" "status $status, not $want" "$(cat "$tmp/err" "$tmp/log")"
	elif [ -n "$left" ]; then
		not_ok "$name" "processes stayed: $left"
	elif find "$tmp/tmpdir" "$tmp/cwd" -mindepth 1 | grep -q .; then
		not_ok "$name" "files stayed: $(find "$tmp/tmpdir" "$tmp/cwd" -mindepth 1)"
	elif [ -n "$(appeared)" ]; then
		not_ok "$name" "files stayed: $(appeared)"
	else
		ok "$name"
	fi
	rm -rf "$tmp/tmpdir" "$tmp/cwd"
}

ulimit -c 0
# In sanitizer builds: the default actions of signals, as without
export ASAN_OPTIONS=handle_segv=0:handle_abort=0 TSAN_OPTIONS=handle_segv=0:handle_abort=0
end_by "returning from main" exit "" 3
end_by "_exit" _exit "" 3
end_by "abort" abort "" 134
end_by "a segmentation fault of its own" segv "" 139
end_by "SIGINT" spin INT 130
end_by "SIGTERM" spin TERM 143
end_by "SIGHUP" spin HUP 129
end_by "SIGKILL" spin KILL 137
end_by "SIGABRT from outside" spin ABRT 134
end_by "SIGKILL after the main thread ended" thread-exit KILL 137

done_testing
