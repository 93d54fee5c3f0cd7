#!/bin/sh
# SPDX-License-Identifier: MIT
# Programs with threads, signals and hot guest code run under gdb, and under Valgrind, which has nothing to
# say about them. Not a vCPU in the main thread there: now and then Valgrind cannot extend that one's
# stack when a signal comes.
# usage: tools-test.sh KVMLET STATS_VM HELLO_VMM
kvmlet=$(realpath "$1")
vm=$(realpath "$2")
hello=$(realpath "$3")
. "$(dirname "$0")/tap.sh"

if valgrind -q true >/dev/null 2>&1; then
	"$kvmlet" run -- valgrind -q --fair-sched=try "$hello" > "$tmp/out" 2> "$tmp/err"
	check "hello-vmm under Valgrind" test $? -eq 0
	check "it did what it does" grep -q 'unplugs under two running vCPUs: ok' "$tmp/out"
	check "Valgrind is quiet" test ! -s "$tmp/err"
	[ ! -s "$tmp/err" ] || sed 's/^/# /' "$tmp/err"
else
	skip "under Valgrind" "no valgrind that works here"
fi

if gdb -q -batch -ex run --args true 2>&1 | grep -q 'exited normally'; then
	expect "stats-vm under gdb" 0 'exited normally' "$kvmlet" run -- \
		gdb -q -batch -iex 'set debuginfod enabled off' \
		-ex 'handle SIGUSR1 SIG63 nostop noprint pass' -ex run --args "$vm"
else
	skip "under gdb" "no gdb that works here"
fi
done_testing
