# SPDX-License-Identifier: MIT
# examples/linux-vmm (run): its devices, memory that comes and goes, and migration to another process.
# shellcheck shell=bash

vmm_words='console=ttyS0 panic=-1 memhp_default_state=online_movable'

vmm_program()
{
	[ "$accel" = tcg ] && { why='needs a KVM'; return 1; }
	vmm=$(dirname "$kvmlet")/examples/linux-vmm
}

# Its disk and its console, while a balloon takes memory away
do_vmm()
{
	vmm_program || return
	make_files || { why='no disk image'; return 1; }
	timeout -k 5 "$limit" "${under[@]}" "$vmm" --cpus "$cpus" --balloon 64 --disk "$cache/files.img" \
		--initrd "$initrds/$kernel/initrd.gz" --append 'console=ttyS0 console=hvc0 panic=-1
			kvmlet.job=files kvmlet.job=loads:2' "$cache/$kernel/vmlinuz" \
		> "$log" 2>&1 < /dev/null || { why="linux-vmm failed or timeout"; return 1; }
	said "$log" "$cpus" && right_files && right_loads 2
}

# It boots, and no more
do_vmm-boot()
{
	vmm_program || return
	timeout -k 5 "$limit" "${under[@]}" "$vmm" --cpus "$cpus" --balloon 64 --hotplug 64 \
		--initrd "$initrds/$kernel/initrd.gz" --append "$vmm_words" "$cache/$kernel/vmlinuz" \
		> "$log" 2>&1 < /dev/null || { why="linux-vmm failed or timeout"; return 1; }
	said "$log" "$cpus"
}

# vmm_start NAME ARGUMENTS...: in the background; its console goes to $log. live.sh knows it then
vmm_start()
{
	local name=$1
	shift
	rm -f "$logs/control.$name"
	mkfifo "$logs/control.$name" || return
	: > "$log.$name"
	setsid "${under[@]}" "$vmm" --cpus "$cpus" --memory 320 --hotplug 32 \
		--control "$logs/control.$name" --initrd "$initrds/$kernel/initrd.gz" \
		--append "$vmm_words kvmlet.job=churn" "$@" "$cache/$kernel/vmlinuz" \
		< /dev/null >> "$log" 2> "$log.$name" &
	live_pid[$name]=$!
}

# vmm_wait NAME TEXT: it has said it
vmm_wait()
{
	timeout "$limit" tail -n +1 -f --pid "${live_pid[$1]}" "$log.$1" 2> /dev/null |
		grep -a -q -m 1 "linux-vmm: $2"
	grep -a -q "linux-vmm: $2" "$log.$1" && return
	why="$1: no \"$2\": $(tail -n 1 "$log.$1")"
	return 1
}

# vmm_ask NAME COMMAND TEXT: and what it says when that is done
vmm_ask()
{
	: > "$log.$1"
	echo "$2" > "$logs/control.$1"
	vmm_wait "$1" "$3"
}

vmm_kill()
{
	local name
	for name in "${!live_pid[@]}"; do
		kill -KILL "${live_pid[$name]}" 2> /dev/null
		wait "${live_pid[$name]}" 2> /dev/null
		unset "live_pid[$name]"
		rm -f "$logs/control.$name"
	done
}

# Memory is plugged, taken and given back while the guest writes all that it has
vmm_memory()
{
	local n
	vmm_start a && vmm_wait a '32 MiB are plugged' && live_until a 1 &&
		vmm_ask a 'balloon 48' 'the balloon has 48 MiB' &&
		vmm_ask a 'hotplug 0' '0 MiB are plugged' &&
		vmm_ask a 'balloon 0' 'the balloon has 0 MiB' &&
		vmm_ask a 'hotplug 16' '16 MiB are plugged' || return
	n=$(live_pass)
	live_until a $((n + 2)) && live_right
}

# From one process to the next, while it does
vmm_migrate()
{
	local round n from=a to=b socket=$logs/vmm-socket
	vmm_start a && live_until a 1 || return
	# To who does not want it: the guest goes on here
	vmm_start b --memory 256 --incoming "$socket" && vmm_wait b 'waiting' &&
		vmm_ask a "migrate $socket" 'the guest stays' || return
	wait "${live_pid[b]}" && { why='b took another machine'"'"'s guest'; return 1; }
	unset "live_pid[b]"
	live_until a $(($(live_pass) + 2)) || return
	for ((round = 1; round <= (rounds < 3 ? rounds : 3); round++)); do
		rm -f "$socket"
		vmm_start $to --incoming "$socket" && vmm_wait $to 'waiting' || return
		echo "migrate $socket" > "$logs/control.$from"
		vmm_wait $to 'the guest is here' || return
		wait "${live_pid[$from]}" || { why="$from ended with $?"; return 1; }
		unset "live_pid[$from]"
		n=$(live_pass)
		live_until $to $((n + 2)) && live_right || return
		text="$round rounds, $((n + 2)) passes"
		[ $from = a ] && from=b to=a || from=a to=b
	done
}

do_vmm-memory()
{
	vmm_program || return
	vmm_memory
	local status=$?
	vmm_kill
	return $status
}

do_vmm-migrate()
{
	vmm_program || return
	vmm_migrate
	local status=$?
	vmm_kill
	return $status
}
