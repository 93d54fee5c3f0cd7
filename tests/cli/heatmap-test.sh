#!/bin/sh
# SPDX-License-Identifier: MIT
# `kvmlet run --heatmap`: the picture and the summary say what guests wrote, whether or not they log;
# the program's own logs stay as they are; several VMs, several processes.
# usage: heatmap-test.sh KVMLET HEAT_VM HELLO_VM
kvmlet=$(realpath "$1")
vm=$(realpath "$2")
hello=$(realpath "$3")
. "$(dirname "$0")/tap.sh"
cd "$tmp" || exit 99

# check_svg FILE: well-formed, and all that a reader needs is there
check_svg()
{
	if command -v xmllint >/dev/null; then
		check "$1 is XML" xmllint --noout "$1"
	else
		skip "$1 is XML" "no xmllint"
	fi
	for text in '<title>kvmlet heatmap' 'Dirty rate of guest memory: ' 'time since the first VM (s)' \
		'pages/s in a band' 'all slots' 'guest memory</text>'; do
		check "$1: $text" grep -qF "$text" "$1"
	done
	check "$1 ends" sh -c "tail -n 1 '$1' | grep -qx '</svg>'"
}

# row FILE VM SLOT: what was written of it, as the summary has it: KiB
row()
{
	awk -v vm="$2" -v slot="$3" '$1 == vm && $2 == slot && $7 == "KiB" { print $6 }' "$1"
}

# heat-vm writes 5 pages of slot 0 and 3 of slot 1 of its first VM, then some of two more VMs
for how in plain log manual rings; do
	"$kvmlet" run --heatmap $how.svg -- "$vm" $how > out 2> $how.txt
	check "$how: the program's own log is right" test $? -eq 0
	sed 's/^/# /' out
	check_svg $how.svg
	check "$how: 5 pages of slot 0" test "$(row $how.txt 0 0)" = 20
	check "$how: 3 pages of slot 1" test "$(row $how.txt 0 1)" = 12
	check "$how: a slot that nobody wrote" test "$(row $how.txt 0 2)" = 0
	check "$how: another VM" test "$(row $how.txt 1 0)" = 4
	check "$how: a VM that is there at exit" test "$(row $how.txt 2 0)" = 8
	check "$how: the picture is named" grep -q "picture: $tmp/$how.svg" $how.txt
	for slot in 'VM 0 slot 0' 'VM 0 slot 1' 'VM 0 slot 2' 'VM 1 slot 0' 'VM 2 slot 0'; do
		check "$how: $slot is drawn" grep -q ">$slot<" $how.svg
	done
	check "$how: colours" grep -q 'path d="M.*z" fill="#' $how.svg
	check "$how: where slot 1 is" grep -q '>0x40000000<' $how.svg
done

# Two processes: the first gets the file, the second one of its own
"$kvmlet" run --heatmap two.svg -- sh -c "'$vm' plain && '$vm' log" > out 2> two.txt
check "two processes" test $? -eq 0
check "two pictures" test "$(ls two.svg two-*.svg | wc -l)" -eq 2
for file in two.svg two-*.svg; do
	check_svg "$file"
	check "$file is named" grep -q "picture: $tmp/$file" two.txt
done

"$kvmlet" run --heatmap hello.svg --stats -- "$hello" > out 2> hello.txt
check "two vCPUs, with --stats" test $? -eq 0
check_svg hello.svg
check "statistics, too" grep -q '^kvmlet statistics' hello.txt
"$kvmlet" run -- "$hello" > out 2> none.txt
check "nothing without it" test ! -s none.txt
check "no VM, no summary" sh -c "'$kvmlet' run --heatmap true.svg -- true 2>&1 | grep -q . && exit 1; exit 0"

done_testing
