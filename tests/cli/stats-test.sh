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

# A program cannot have caches of the library (tests/unit/test_gpc_api.c counts those); a retry needs
# a race (tests/museum/test_gpc.c); what the guest tells for one use is gone afterwards; and there is
# no APIC here (tests/unit/test_uapi_eoi.c, test_uapi_vapic.c), nor a page that has to be waited for
# (tests/unit/test_uapi_async_pf.c).
undriven()
{
	case $1 in
	gpc_user_* | gpc_*_retries | gpc_once_invalidations | gpc_eoi_hits | gpc_vapic_* | gpc_async_pf_*) return 0 ;;
	gpc_steal_* | gpc_runstate_*) [ ! -e /proc/thread-self/schedstat ]; return ;;
	esac
	return 1
}

# names KIND: as stats.def has them; each kind of caches has four
names()
{
	sed -n "s/^KL_$1_STAT([a-z0-9_]*, *\"\([a-z0-9_]*\)\".*/\1/p" "$def"
	[ "$1" != VM ] || for cache in $(sed -n 's/^KL_GPC_STATS([A-Z_]*, *"\([a-z_]*\)".*/\1/p' "$def"); do
		for what in hits refreshes invalidations retries; do
			echo "gpc_${cache}_$what"
		done
	done
}

for kind in VM VCPU; do
	who=$(echo $kind | tr 'A-Z' 'a-z')
	section="$(echo $kind | sed 's/VCPU/vCPU/') counters"
	for name in $(names $kind); do
		value=$(awk -v who=$who -v name="$name" '$1 == who && $2 == name { print $3 }' "$tmp/fd")
		if [ -z "$value" ]; then
			not_ok "$who $name" "KVM_GET_STATS_FD does not have it"
		elif [ "$value" -eq 0 ] && ! undriven "$name"; then
			not_ok "$who $name" "is 0 although stats-vm drives it"
		elif [ "$value" != "$(table "$section" "$name")" ]; then
			not_ok "$who $name" "KVM_GET_STATS_FD: $value" \
				"--stats: $(table "$section" "$name")"
		else
			ok "$who $name"
		fi
	done
done
check "the file has what the table has" test "$(wc -l < "$tmp/fd")" -eq "$({ names VM; names VCPU; } | wc -l)"

# Exact counts where the program determines them
value()
{
	awk -v name="$1" '$1 == "vcpu" && $2 == name { print $3 }' "$tmp/fd"
}
for pair in halt_exits:1 signal_exits:1 pf_guest:1 hypercalls:1 irq_injections:1 nmi_injections:1 \
	insn_emulation_fail:1 io_exits:7; do
	check "$pair" test "$(value "${pair%:*}")" -eq "${pair#*:}"
done
check "exits by reason: HLT" test "$(table 'exits to the program' HLT)" = 1
check "exits by reason: IO" test "$(table 'exits to the program' IO)" = 7
check "exits by reason: INTERNAL_ERROR" \
	test "$(table 'exits to the program' INTERNAL_ERROR)" = 1

# Two vCPUs, a VM that is there at exit
begun=$(date +%s%N)
"$kvmlet" run --stats -- "$hello" > "$tmp/out" 2> "$tmp/table"
status=$?
us=$((($(date +%s%N) - begun) / 1000))
check "hello-vmm under --stats" test $status -eq 0
[ $status -eq 0 ] || sed 's/^/# /' "$tmp/table"
check "VMs" test "$(table 'kvmlet statistics' VMs)" = 1
check "vCPUs" test "$(table 'kvmlet statistics' vCPUs)" = 2
# They have not run for longer than twice that time, whoever else wants the processor
mips=$(table 'kvmlet statistics' MIPS)
check "MIPS are not fewer than there were" \
	test "$(table 'vCPU counters' instructions)" -lt $(((mips + 1) * us * 2))
check "instructions were counted" test "$(table 'vCPU counters' instructions)" -gt 0
"$kvmlet" run -- "$hello" > "$tmp/out" 2> "$tmp/table"
check "no table without --stats" test ! -s "$tmp/table"

done_testing
