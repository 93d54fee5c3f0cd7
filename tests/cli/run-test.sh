#!/bin/sh
# SPDX-License-Identifier: MIT
# `kvmlet run` without an engine: options, environment, and every refusal with its reason.
# usage: run-test.sh KVMLET DUMMY_PRELOAD [CC]
kvmlet=$(realpath "$1")
dummy=$(realpath "$2")
cc=${3:-cc}
. "$(dirname "$0")/tap.sh"

export KVMLET_PRELOAD_LIBRARY="$dummy"
unset LD_PRELOAD KVMLET_LOG KVMLET_TRACE KVMLET_STATS KVMLET_HEATMAP KVMLET_PARAMS KVMLET_KEEP_SECCOMP KVMLET_UFFD_EVENTS
cd "$tmp" || exit 99

echo 'int main(int c, char **v) { return c > 1 ? v[1][0] - 48 : 0; }' > prog.c
$cc -o prog prog.c || exit 99
[ "$(id -u)" -eq 0 ] && as_user="setpriv --reuid 65534 --regid 65534 --clear-groups" || as_user=

# The command itself
expect "--version" 0 '^kvmlet [0-9]+\.[0-9]+\.[0-9]+$' "$kvmlet" --version
expect "--help" 0 'kvmlet run' "$kvmlet" --help
expect "help" 0 'kvmlet run' "$kvmlet" help
expect "help run" 0 '[-]-keep-seccomp' "$kvmlet" help run
expect "run --help" 0 '[-]-keep-seccomp' "$kvmlet" run --help
expect "help doctor" 0 'userfaultfd' "$kvmlet" help doctor
expect "help on an unknown topic" 2 "no help on 'x'" "$kvmlet" help x
expect "no command" 2 'kvmlet run' "$kvmlet"
expect "unknown command" 2 "'fly' is not a command" "$kvmlet" fly
expect "doctor takes no arguments" 2 "no arguments" "$kvmlet" doctor now

# Running
expect "program runs with the library" 0 '^dummy preloaded' "$kvmlet" run -- ./prog
expect "without --" 0 '^dummy preloaded' "$kvmlet" run ./prog
expect "exit status is the program's" 7 '^dummy preloaded' "$kvmlet" run -- ./prog 7
expect "arguments that look like options" 1 preloaded "$kvmlet" run -- sh -c 'exit 1' --stats
expect "PATH is searched" 0 '^dummy preloaded' env PATH="$tmp:$PATH" "$kvmlet" run prog
expect "an empty PATH element is the directory" 0 preloaded env PATH=":/bin:/usr/bin" \
	"$kvmlet" run prog
expect "--stats" 0 '^KVMLET_STATS=1$' "$kvmlet" run --stats -- ./prog
expect "--heatmap becomes absolute" 0 "^KVMLET_HEATMAP=$tmp/h.svg$" "$kvmlet" run --heatmap h.svg -- ./prog
expect "unwritable heatmap" 2 "cannot write '/nowhere/h.svg'" "$kvmlet" run --heatmap /nowhere/h.svg -- ./prog
expect "--param" 0 '^KVMLET_PARAMS=kvm.eager_page_split=Y$' "$kvmlet" run --param kvm.eager_page_split=1 -- ./prog
expect "--param that is none" 2 "only kvm.eager_page_split" "$kvmlet" run --param kvm.tdp_mmu=N -- ./prog
expect "--param of no such value" 2 "Y or N" "$kvmlet" run --param kvm.eager_page_split=2 -- ./prog
expect "--abi" 0 '^KVMLET_ABI=6.18$' "$kvmlet" run --abi=6.18 -- ./prog
expect "--abi of another kernel" 2 '6.12 or 6.18' "$kvmlet" run --abi=5.4 -- ./prog
expect "--keep-seccomp" 0 '^KVMLET_KEEP_SECCOMP=1$' "$kvmlet" run --keep-seccomp -- ./prog
if "$kvmlet" run --uffd-events -- true 2>/dev/null; then
	expect "--uffd-events" 0 '^KVMLET_UFFD_EVENTS=1$' "$kvmlet" run --uffd-events -- ./prog
else
	expect "--uffd-events where there are none" 126 'gives no userfaultfd' \
		"$kvmlet" run --uffd-events -- ./prog
fi
expect "--log becomes absolute" 0 "^KVMLET_LOG=$tmp/l.txt$" "$kvmlet" run --log l.txt -- ./prog
expect "--trace=FILE" 0 "^KVMLET_TRACE=$tmp/t.txt$" "$kvmlet" run --trace=t.txt -- ./prog
expect "the log exists" 0 '' test -f l.txt
expect "nothing is set that was not asked for" 1 '' \
	sh -c "'$kvmlet' run -- ./prog | grep -E 'KVMLET_(LOG|TRACE|STATS|HEATMAP|PARAMS|KEEP_SECCOMP|UFFD_EVENTS)='"
expect "the user's LD_PRELOAD stays, behind" 0 "^LD_PRELOAD=[^:]*dummy[^:]*:libdl.so.2$" \
	env ASAN_OPTIONS=verify_asan_link_order=0 LD_PRELOAD=libdl.so.2 "$kvmlet" run -- ./prog
sh -c 'echo $$; exec "$0" run -- sh -c "echo \$\$"' "$kvmlet" 2>&1 | grep -v = > pids
expect "no process stays behind: the program has kvmlet's pid" 0 '^1$' \
	sh -c 'grep -v dummy pids | sort -u | wc -l'

# Refusals
expect "unknown option" 2 "'--fast' is not an option" "$kvmlet" run --fast -- ./prog
expect "missing option argument" 2 "needs a file name" "$kvmlet" run --log
expect "no program" 2 "which program" "$kvmlet" run --stats --
expect "unwritable log" 2 "cannot write '/nowhere/log'" "$kvmlet" run --log /nowhere/log -- ./prog
expect "not found in PATH" 127 "not found in PATH" "$kvmlet" run -- no-such-program
expect "not found in PATH, but here" 127 "say './'" "$kvmlet" run -- prog.c
expect "not found as path" 127 "not found: No such file" "$kvmlet" run -- ./no-such-program
expect "below a file" 127 "not found: Not a directory" "$kvmlet" run -- ./prog.c/x
expect "empty name" 127 "name is empty" "$kvmlet" run -- ''
expect "not executable" 126 "not executable.*chmod" "$kvmlet" run -- ./prog.c
expect "a directory" 126 "is a directory" "$kvmlet" run -- /tmp
expect "a device" 126 "not a regular file" "$kvmlet" run -- /dev/null
mkdir early late
cp prog.c early/only && cp prog late/only
expect "a non-executable in PATH does not hide a later one" 0 preloaded \
	env PATH="$tmp/early:$tmp/late" "$kvmlet" run only
expect "only a non-executable in PATH" 126 "not executable" env PATH="$tmp/early" "$kvmlet" run only

if $cc -static -o static prog.c 2>/dev/null; then
	expect "static program" 126 "statically linked.*Link it dynamically" "$kvmlet" run ./static
else
	skip "static program" "no static libc"
fi
if $cc -static-pie -o static-pie prog.c 2>/dev/null; then
	expect "static-pie program" 126 "statically linked" "$kvmlet" run ./static-pie
else
	skip "static-pie program" "no static libc"
fi
expect "through the dynamic loader" 3 '^dummy preloaded' \
	"$kvmlet" run -- /lib64/ld-linux-x86-64.so.2 ./prog 3

# patch FILE OFFSET OCTAL...: bytes of an ELF header
patch()
{
	cp prog "$1"
	# shellcheck disable=SC2059
	printf "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none
}
patch arm64 18 '\267\000'
expect "64-bit Arm" 126 "for 64-bit Arm.*x86-64" "$kvmlet" run ./arm64
patch other 18 '\377\377'
expect "an unknown machine" 126 "ELF machine 65535" "$kvmlet" run ./other
patch i386 18 '\003\000'
printf '\001' | dd of=i386 bs=1 seek=4 conv=notrunc status=none
expect "32-bit x86" 126 "for 32-bit x86" "$kvmlet" run ./i386
patch x32 4 '\001'
expect "x32" 126 "for the x32 ABI" "$kvmlet" run ./x32
patch bigendian 5 '\002'
expect "big-endian" 126 "another architecture" "$kvmlet" run ./bigendian
patch phdrs 32 '\377\377\377\377\377\377\377\177'
expect "program headers beyond the file" 126 "damaged" "$kvmlet" run ./phdrs
patch phnum 56 '\377\377'
expect "too many program headers" 126 "damaged" "$kvmlet" run ./phnum
head -c 40 prog > short && chmod +x short
expect "cut off within the header" 126 "neither an ELF" "$kvmlet" run ./short
: > empty && chmod +x empty
expect "an empty file" 126 "neither an ELF" "$kvmlet" run ./empty
$cc -Wl,--dynamic-linker=/lib/no-such-loader.so.1 -o noloader prog.c
expect "a missing loader" 126 "needs the dynamic loader '/lib/no-such-loader" \
	"$kvmlet" run ./noloader
$cc -Wl,--dynamic-linker=/lib/ld-musl-x86_64.so.1 -o musl prog.c
expect "musl" 126 "linked with musl" "$kvmlet" run ./musl

printf '#!/bin/sh\nexit 5\n' > script && chmod +x script
expect "a script" 5 '^dummy preloaded' "$kvmlet" run ./script
printf '#! %s/script x\n' "$tmp" > script2 && chmod +x script2
expect "a script's script" 5 '^dummy preloaded' "$kvmlet" run ./script2
printf '#!/no/such/sh\n' > script3 && chmod +x script3
expect "a script with a missing interpreter" 126 "interpreter '/no/such/sh'" "$kvmlet" run ./script3
printf '#!%s/loop\n' "$tmp" > loop && chmod +x loop
expect "a script that is its own interpreter" 126 "without end" "$kvmlet" run ./loop
printf 'exit 0\n' > noshebang && chmod +x noshebang
expect "a script without #!" 126 "kvmlet run -- sh" "$kvmlet" run ./noshebang

if [ -n "$as_user" ] && command -v setpriv >/dev/null; then
	chmod 755 "$tmp"
	cp prog suid && chmod 4755 suid
	cp prog sgid && chmod 2755 sgid
	if $as_user test -x "$kvmlet" && $as_user test -r "$dummy"; then
		expect "setuid" 126 "is setuid.*plain copy" $as_user "$kvmlet" run ./suid
		expect "setgid" 126 "is setgid" $as_user "$kvmlet" run ./sgid
		expect "setuid, but privileges cannot be gained" 0 preloaded \
			$as_user --no-new-privs "$kvmlet" run ./suid
		chmod 0711 prog
		expect "unreadable" 126 "cannot read" $as_user "$kvmlet" run ./prog
		chmod 0755 prog
		if cp prog caps && setcap cap_net_raw+ep caps 2>/dev/null; then
			expect "file capabilities" 126 "file capabilities" \
				$as_user "$kvmlet" run ./caps
		else
			skip "file capabilities" "no setcap"
		fi
	else
		skip "privileged programs" "another user cannot reach $kvmlet"
	fi
	expect "setuid to oneself" 0 preloaded "$kvmlet" run ./suid
else
	skip "privileged programs" "needs root and setpriv"
fi

# Sanitizer runtimes come first
for san in address thread; do
	lib=lib$(echo $san | cut -c1)san.so
	if $cc -fsanitize=$san -o san-$san prog.c 2>/dev/null; then
		expect "$san sanitizer first" 0 "^LD_PRELOAD=$lib[.0-9]*:[^:]*dummy" \
			"$kvmlet" run ./san-$san
	else
		skip "$san sanitizer first" "no runtime"
	fi
done

# The library
expect "a missing library" 126 "KVMLET_PRELOAD_LIBRARY is '/no/lib.so'" \
	env KVMLET_PRELOAD_LIBRARY=/no/lib.so "$kvmlet" run ./prog
mkdir "a b" && cp "$dummy" "a b/lib.so"
expect "a library that LD_PRELOAD cannot name" 126 "space or a colon" \
	env KVMLET_PRELOAD_LIBRARY="$tmp/a b/lib.so" "$kvmlet" run ./prog
mkdir alone && cp "$kvmlet" alone/
expect "no library at all" 126 "cannot find libkvmlet-preload.so" \
	env -u KVMLET_PRELOAD_LIBRARY alone/kvmlet run ./prog
cp "$dummy" alone/libkvmlet-preload.so
expect "the library beside the command" 0 "LD_PRELOAD=$tmp/alone/lib" \
	env -u KVMLET_PRELOAD_LIBRARY alone/kvmlet run ./prog

expect "doctor names every check" 0 'userfaultfd' "$kvmlet" doctor
for item in '/dev/kvm' 'memfd_create' 'executable memory' membarrier RLIMIT_AS RLIMIT_MEMLOCK \
	overcommit max_map_count CPU; do
	expect "doctor: $item" 0 "^(ok|note) +$item " "$kvmlet" doctor
done

done_testing
