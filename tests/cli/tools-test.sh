#!/bin/sh
# SPDX-License-Identifier: MIT
# A program with threads, signals and hot guest code runs under gdb and under Valgrind, which has nothing
# to say about it.
# usage: tools-test.sh KVMLET STATS_VM
kvmlet=$(realpath "$1")
vm=$(realpath "$2")
. "$(dirname "$0")/tap.sh"

if valgrind -q true >/dev/null 2>&1; then
	"$kvmlet" run -- valgrind -q --fair-sched=try "$vm" > "$tmp/out" 2> "$tmp/err"
	check "stats-vm under Valgrind" test $? -eq 0
	check "it did what it does" grep -q '^vcpu instructions [1-9]' "$tmp/out"
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
