#!/bin/bash
# SPDX-License-Identifier: MIT
# An unmodified QEMU, where there is one, runs its firmware on kvmlet: timers and disks interrupt
# through PIC, IOAPIC and messages, the second CPU is started, and nothing is bootable in the end. And
# it patches a 32-bit guest that uses the task priority.
# usage: qemu-test.sh KVMLET
kvmlet=$(realpath "$1")
. "$(dirname "$0")/tap.sh"
firmware=/usr/share/seabios/bios-256k.bin

# boots NAME MACHINE-OPTIONS
boots()
{
	local line pid done=

	# The firmware's log is QEMU's standard output.
	exec 3< <(exec "$kvmlet" run -- qemu-system-x86_64 -accel kvm -machine "$2",smm=off \
		-cpu qemu64 -smp 2 -m 64 -nodefaults -display none -no-reboot -bios "$firmware" \
		-chardev stdio,id=log,signal=off -device isa-debugcon,iobase=0x402,chardev=log \
		-drive if=ide,media=cdrom 2>"$tmp/err" </dev/null)
	pid=$!
	: >"$tmp/log"
	while read -r line <&3; do
		printf '%s\n' "$line" >>"$tmp/log"
		case $line in
		"No bootable device."*)
			done=1
			kill "$pid"
			;;
		esac
	done
	exec 3<&-
	if [ -n "$done" ] && grep -q '^Found 2 cpu' "$tmp/log"; then
		ok "$1"
	else
		not_ok "$1" "$(tail -n 20 "$tmp/log")" "$(cat "$tmp/err")"
	fi
}

# patches NAME CPUS
patches()
{
	if ! cc -m32 -nostdlib -static -no-pie -Wl,--build-id=none,-Ttext=0x100000 \
		-o "$tmp/tpr" "$(dirname "$0")/tpr-guest.S" 2>"$tmp/err"; then
		skip "$1" "no compiler for 32-bit code"
		return
	fi
	# isa-debug-exit makes of 0 a 1
	"$kvmlet" run -- qemu-system-x86_64 -accel kvm -machine pc,smm=off -smp "$2" -m 64 -nodefaults \
		-display none -no-reboot -kernel "$tmp/tpr" -device isa-debug-exit,iobase=0xf4,iosize=1 \
		-chardev stdio,id=log,signal=off -device isa-debugcon,iobase=0xe9,chardev=log \
		>"$tmp/log" 2>"$tmp/err" </dev/null
	if [ $? -eq 1 ] && grep -a -q '^tpr: right' "$tmp/log"; then
		ok "$1"
	else
		not_ok "$1" "$(cat "$tmp/log")" "$(cat "$tmp/err")"
	fi
}

if ! command -v qemu-system-x86_64 >/dev/null || ! [ -r $firmware ]; then
	skip "QEMU runs its firmware" "no qemu-system-x86_64 with SeaBIOS"
else
	boots "QEMU runs its firmware" pc
	boots "QEMU runs its firmware with an IOAPIC of its own" pc,kernel-irqchip=split
	boots "QEMU runs its firmware on the newer chipset" q35
	patches "QEMU patches accesses to the task priority" 1
	patches "QEMU patches them with two CPUs" 2
fi
done_testing
