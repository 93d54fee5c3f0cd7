# SPDX-License-Identifier: MIT
# A guest that is stopped, restored and migrated while it writes memory and checks it (run).
# QEMU's machine protocol goes over its standard input and output.
# shellcheck shell=bash
declare -A live_in live_out live_pid

# live_start NAME ARGUMENTS...: the array qemu with the kernel $kernel; its console goes to $log. QEMU reads
# the guest's TSC before the last pages go, and its clock after them: on a busy host the guest's watchdog
# sees that. On any KVM.
live_start()
{
	local name=$1 fifo
	shift
	fifo=$(mktemp -d) || return
	mkfifo "$fifo/in" "$fifo/out"
	setsid "${under[@]}" "${qemu[@]}" -accel "$accel" -qmp stdio \
		-chardev "file,id=console,path=$log,append=on" -serial chardev:console \
		-kernel "$cache/$kernel/vmlinuz" -initrd "$initrds/$kernel/initrd.gz" \
		-append 'console=ttyS0 panic=-1 tsc=nowatchdog kvmlet.job=churn' "$@" \
		< "$fifo/in" > "$fifo/out" 2>> "$log.qemu" &
	live_pid[$name]=$!
	exec {fd}> "$fifo/in"
	live_in[$name]=$fd
	exec {fd}< "$fifo/out"
	live_out[$name]=$fd
	rm -rf "$fifo"
	live_wait "$name" '"QMP"' && live_ask "$name" qmp_capabilities
}

# live_wait NAME PATTERN: the next line that it matches
live_wait()
{
	local line end=$((SECONDS + limit))
	while [ $SECONDS -lt $end ] && read -r -t "$limit" -u "${live_out[$1]}" line; do
		printf '%s\n' "$1 $line" >> "$log.qmp"
		[[ $line =~ $2 ]] && return
		[[ $line =~ '"error":' || $line =~ '"status": "failed"' ]] && break
	done
	why="$1: no $2: ${line:0:100}"
	return 1
}

# live_ask NAME COMMAND [ARGUMENTS]: and its answer
live_ask()
{
	printf '{"execute": "%s", "arguments": {%s}}\n' "$2" "${3:-}" >&"${live_in[$1]}"
	live_wait "$1" '"return":'
}

live_end()
{
	local name
	for name; do
		[ -n "${live_pid[$name]:-}" ] || continue
		live_ask "$name" quit
		wait "${live_pid[$name]}" || why="QEMU ended with $?"
		live_forget "$name"
	done
	[ -z "$why" ]
}

live_forget()
{
	local fd=${live_in[$1]}
	exec {fd}>&-
	fd=${live_out[$1]}
	exec {fd}<&-
	unset "live_pid[$1]" "live_in[$1]" "live_out[$1]"
}

# When something failed: nothing of ours stays behind
live_kill()
{
	local name
	for name in "${!live_pid[@]}"; do
		kill -KILL "${live_pid[$name]}" 2> /dev/null
		wait "${live_pid[$name]}" 2> /dev/null
		live_forget "$name"
	done
}

# The last pass that the guest has reported, or -1
live_pass()
{
	local n
	n=$(grep -a -o 'kvmlet-churn: pass [0-9]*' "$log" | tail -n 1)
	echo "${n:+${n##* }}" | sed 's/^$/-1/'
}

# live_until NAME PASS: the guest has reported it
live_until()
{
	timeout "$limit" tail -n +1 -f --pid "${live_pid[$1]}" "$log" 2> /dev/null |
		grep -a -q -m 1 "kvmlet-churn: pass $2 "
	[ "$(live_pass)" -ge "$2" ] || { why="$1: the guest does not come to pass $2"; return 1; }
}

live_right()
{
	local line
	line=$(complaint "$log" WRONG)
	[ -z "$line" ] || { why=$line; return 1; }
}

# live_events NAME: it tells how a migration goes
live_events()
{
	live_ask "$1" migrate-set-capabilities \
		'"capabilities": [{"capability": "events", "state": true}]'
}

# live_migrate FROM TO: as fast as it can, however much the guest writes
live_migrate()
{
	live_events "$1" &&
		live_ask "$1" migrate-set-parameters \
			'"downtime-limit": 20000, "max-bandwidth": 10000000000' &&
		live_ask "$1" migrate "\"uri\": \"$2\"" &&
		live_wait "$1" '"MIGRATION".*"completed"'
}

live_prepare()
{
	qemu_args "$machine" "$cpus"
	: > "$log"
	: > "$log.qmp"
	: > "$log.qemu"
	live_start a && live_until a 2
}

# Stopped, its state in a file, and continued by another QEMU
restore()
{
	local state=$logs/state n
	live_prepare && live_ask a stop && live_migrate a "exec:cat > $state" && live_end a || return
	n=$(live_pass)
	live_start b -incoming defer && live_events b &&
		live_ask b migrate-incoming "\"uri\": \"exec:cat $state\"" &&
		live_wait b '"MIGRATION".*"completed"' && live_ask b cont &&
		live_until b $((n + 3)) && live_end b || return
	rm -f "$state"
	live_right
}

# savevm; and back to it, twice, from a guest that runs
snapshot()
{
	local disk=$logs/snapshot.qcow2 n round
	qemu-img create -q -f qcow2 "$disk" 64M || { why='no image'; return 1; }
	memory=256
	qemu_args "$machine" "$cpus"
	memory=
	qemu+=(-drive "id=state,file=$disk,if=none")
	: > "$log"
	: > "$log.qmp"
	: > "$log.qemu"
	live_start a && live_until a 2 &&
		live_ask a human-monitor-command '"command-line": "savevm here"' || return
	n=$(live_pass)
	live_until a $((n + 4)) || return
	for round in 1 2; do
		echo "kvmlet: loadvm $round" >> "$log"
		live_ask a human-monitor-command '"command-line": "loadvm here"' || return
		# It counts again from where it was
		timeout "$limit" tail -n +1 -f --pid "${live_pid[a]}" "$log" |
			awk -v round="$round" -v n=$((n + 1)) '
				/kvmlet: loadvm/ { seen = $3 }
				/kvmlet-churn: pass/ && seen == round && $3 == n { exit }'
		live_until a $((n + 2)) || return
	done
	live_end a || return
	rm -f "$disk"
	live_right
}

# From one QEMU to the next over a socket
migrate()
{
	local round n from=a to=b socket=$logs/socket
	live_prepare || return
	for ((round = 1; round <= rounds; round++)); do
		rm -f "$socket"
		live_start $to -incoming "unix:$socket" && live_migrate $from "unix:$socket" &&
			live_wait $to '"RESUME"' && live_end $from || return
		n=$(live_pass)
		live_until $to $((n + 2)) && live_right || return
		text="$round rounds, $((n + 2)) passes"
		[ $from = a ] && from=b to=a || from=a to=b
	done
	rm -f "$socket"
	live_end $from
}

do_restore()
{
	restore && return
	live_kill
	return 1
}

do_snapshot()
{
	snapshot && return
	live_kill
	return 1
}

do_migrate()
{
	migrate && return
	live_kill
	return 1
}

# The same with a dirty ring for each vCPU in place of bitmaps
do_migrate-ring()
{
	local accel=$accel,dirty-ring-size=4096
	do_migrate && ! grep -a . "$log.qemu" | grep -v 'terminating on signal' && return
	why=${why:-$(head -n 1 "$log.qemu")}
	return 1
}
