# SPDX-License-Identifier: MIT
# Linux as a guest: Debian's kernels and its static busybox, fetched into a cache and not
# installed; an initramfs of them and of guest/; QEMU's arguments for each machine.
# shellcheck shell=bash
linux=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
top=$(cd "$linux/../.." && pwd)
cache=${KVMLET_CACHE:-$HOME/.cache/kvmlet}/linux
initrds=$cache # made from this tree

# What is booted: the packages that name the current kernels
kernels=(6.1 6.12 i386-pae i386)
declare -A package=([6.1]=linux-image-cloud-amd64 [6.12]=linux-image-6.12-cloud-amd64
	[i386-pae]=linux-image-686-pae [i386]=linux-image-686)

linux_die()
{
	echo "linux: $*" >&2
	exit 2
}

arch_of()
{
	case $1 in
	i386*) echo i386 ;;
	*) echo amd64 ;;
	esac
}

# apt_for ARCH COMMAND...: apt with lists of its own, so that the machine's architectures and
# packages stay what they are, and nobody need be root
apt_for()
{
	local arch=$1 dir=$cache/apt-$1 command=$2
	shift 2
	mkdir -p "$dir"/{lists/partial,cache/archives/partial}
	touch "$dir/status"
	"$command" -q -o APT::Architecture="$arch" -o APT::Architectures="$arch" \
		-o Dir::State::Lists="$dir/lists" -o Dir::Cache="$dir/cache" \
		-o Dir::State::Status="$dir/status" -o Acquire::Languages=none \
		-o Acquire::Retries=3 -o APT::Sandbox::User= "$@"
}

# unpack ARCH PACKAGE DIR: the package's files, from Debian's archive
unpack()
{
	local arch=$1 name=$2 dir=$3 debs=$cache/apt-$1/debs
	mkdir -p "$debs" "$dir" || return
	if ! apt_for "$arch" apt-cache show "$name" > /dev/null 2>&1; then
		apt_for "$arch" apt-get update > "$debs/update.log" 2>&1
		apt_for "$arch" apt-cache show "$name" > /dev/null 2>&1 || {
			echo "linux: apt knows no package $name:$arch; see $debs/update.log" >&2
			return 1
		}
	fi
	rm -f "$debs/$name"_*.deb
	(cd "$debs" && apt_for "$arch" apt-get download "$name") > "$debs/download.log" 2>&1 || {
		# The lists may be older than the archive
		apt_for "$arch" apt-get update > "$debs/update.log" 2>&1
		(cd "$debs" && apt_for "$arch" apt-get download "$name") > "$debs/download.log" 2>&1
	} || {
		echo "linux: apt cannot fetch $name:$arch; see $debs/download.log" >&2
		return 1
	}
	dpkg-deb -x "$debs/$name"_*.deb "$dir" && rm -f "$debs/$name"_*.deb
}

# The current package that a meta package stands for
stands_for()
{
	apt_for "$1" apt-cache depends --important "$2" 2> /dev/null |
		sed -n 's/^ *Depends: \(linux-image-[0-9][^ ]*\)$/\1/p' | head -n 1
}

# fetch_kernel NAME: $cache/NAME/{vmlinuz,version,lib/modules}, $cache/busybox-ARCH
fetch_kernel()
{
	local name=$1 arch dir=$cache/$1 real
	arch=$(arch_of "$name")
	mkdir -p "$cache" || return
	if [ ! -x "$cache/busybox-$arch" ]; then
		command -v apt-get > /dev/null || {
			echo "linux: no apt here: put a static busybox at $cache/busybox-$arch" >&2
			return 1
		}
		unpack "$arch" busybox-static "$cache/unpack-busybox-$arch" &&
			mv "$cache/unpack-busybox-$arch/bin/busybox" "$cache/busybox-$arch" || return
		rm -rf "$cache/unpack-busybox-$arch"
	fi
	[ -f "$dir/version" ] && return
	command -v apt-get > /dev/null || {
		echo "linux: no apt here: put a kernel at $dir/vmlinuz, its modules below" \
			"$dir/lib/modules, and its release into $dir/version" >&2
		return 1
	}
	[ -n "$(stands_for "$arch" "${package[$name]}")" ] ||
		apt_for "$arch" apt-get update > "$cache/update.log" 2>&1
	real=$(stands_for "$arch" "${package[$name]}")
	[ -n "$real" ] || {
		echo "linux: apt has no ${package[$name]}:$arch" >&2
		return 1
	}
	echo "Fetching $real"
	rm -rf "$dir"
	unpack "$arch" "$real" "$dir" || return
	mv "$dir"/boot/vmlinuz-* "$dir/vmlinuz" || return
	[ ! -d "$dir/usr/lib/modules" ] || mv "$dir/usr/lib/modules" "$dir/lib/"
	(cd "$dir/lib/modules" && echo *) > "$dir/version"
}

# Modules of a kernel that a guest may want, each behind those that it needs
modules_of()
{
	local version=$1 dir=$2
	[ -f "$dir/lib/modules/$version/modules.dep" ] ||
		"$cache/busybox-amd64" depmod -b "$dir" "$version" || return
	awk -F'[: ]+' '
		function base(path) { sub(/.*\//, "", path); sub(/\.ko.*/, "", path); gsub(/-/, "_", path); return path }
		function add(path,   i, n, need) {
			if (path in done || !(path in deps)) return
			done[path] = 1
			n = split(deps[path], need, " ")
			for (i = n; i > 0; i--) add(need[i])
			print path
		}
		{ path = $1; line = ""; for (i = 2; i <= NF; i++) line = line " " $i
		  deps[path] = line; at[base(path)] = path }
		END { n = split("crc32c_generic virtio_pci virtio_mmio virtio_blk virtio_console" \
				" virtio_balloon virtio_mem ata_piix ahci sd_mod ext4", want, " ")
		      for (i = 1; i <= n; i++) if (want[i] in at) add(at[want[i]]) }' \
		"$dir/lib/modules/$version/modules.dep"
}

# make_initrd NAME: $initrds/NAME/initrd.gz, of what guest/ has now
make_initrd()
{
	local name=$1 arch dir=$cache/$1 made=$initrds/$1/initrd version path root
	arch=$(arch_of "$name")
	version=$(cat "$dir/version")
	[ -f "$made.gz" ] &&
		[ -z "$(find "$linux/guest" "$linux/lib.sh" -newer "$made.gz")" ] && return
	mkdir -p "$initrds/$name" || return
	root=$(mktemp -d) || return
	mkdir -p "$root"/{bin,proc,sys,dev,tmp,mnt,modules}
	cp "$cache/busybox-$arch" "$root/bin/busybox"
	cp "$linux/guest/init" "$linux/guest/loads" "$root/"
	modules_of "$version" "$dir" > "$root/modules/list" || return
	while read -r path; do
		case $path in
		*.xz) xz -dc "$dir/lib/modules/$version/$path" ;;
		*) cat "$dir/lib/modules/$version/$path" ;;
		esac > "$root/modules/$(basename "${path%.xz}")" || return
		basename "${path%.xz}"
	done < "$root/modules/list" > "$root/modules/order"
	# Without a 32-bit C library there are no such programs
	if [ "$arch" = amd64 ]; then
		cc -std=gnu11 -O2 -static -pthread -o "$root/bin/stress" "$linux/guest/stress.c" || return
	fi
	chmod -R go+rX "$root"
	(cd "$root" && find . | "$cache/busybox-amd64" cpio -o -H newc 2> /dev/null | gzip -1) \
		> "$made.new" || return
	rm -rf "$root"
	mv "$made.new" "$made.gz"
}

# prepare NAME...: everything that boots these kernels
prepare()
{
	local name
	"$top/tools/install-deps" linux || return
	mkdir -p "$cache" || return
	exec 9> "$cache/lock"
	flock 9
	fetch_kernel 6.1 || return # its busybox makes the archives
	for name; do
		fetch_kernel "$name" && make_initrd "$name" || return
	done
	flock -u 9
	exec 9>&-
}

# A disk of 256 MiB of files, and their sums in $cache/files.md5
make_files()
{
	local dir n
	[ -f "$cache/files.md5" ] && return
	dir=$(mktemp -d) || return
	for n in 1 2 3 4 5 6 7 8; do
		head -c 32M /dev/urandom > "$dir/file$n" || return
	done
	rm -f "$cache/files.img"
	truncate -s 320M "$cache/files.img" &&
		PATH=$PATH:/sbin:/usr/sbin mke2fs -q -F -t ext4 -d "$dir" "$cache/files.img" || return
	(cd "$dir" && md5sum file*) > "$cache/files.new"
	rm -rf "$dir"
	mv "$cache/files.new" "$cache/files.md5"
}

# make_disk NAME WORDS: $cache/NAME/disk.img, which a BIOS boots with these kernel parameters
make_disk()
{
	local dir=$cache/$1 config
	config=$(mktemp) || return
	rm -f "$dir/disk.img"
	printf 'SERIAL 0\nDEFAULT linux\nLABEL linux\nKERNEL vmlinuz\nINITRD initrd.gz\nAPPEND %s\n' "$2" \
		> "$config"
	truncate -s 64M "$dir/disk.img" &&
		"$cache/busybox-amd64" mkdosfs "$dir/disk.img" > /dev/null &&
		MTOOLS_SKIP_CHECK=1 mcopy -i "$dir/disk.img" "$dir/vmlinuz" "$initrds/$1/initrd.gz" :: &&
		MTOOLS_SKIP_CHECK=1 mcopy -i "$dir/disk.img" "$config" ::syslinux.cfg &&
		syslinux --install "$dir/disk.img"
	local status=$?
	rm -f "$config"
	return $status
}

# qemu_args MACHINE CPUS: fills the array qemu
qemu_args()
{
	qemu=(qemu-system-x86_64 -machine "$1" -smp "$2" -m "${memory:-512}" -no-reboot
		-display none -nic none)
	case $1 in
	microvm*) qemu+=(-global virtio-mmio.force-legacy=false) ;;
	esac
}

# disk_args MACHINE FILE [OPTIONS]: adds a virtio disk to the array qemu
disk_args()
{
	local bus=pci
	[[ $1 == microvm* ]] && bus=device
	qemu+=(-drive "id=files,file=$2,format=raw,if=none${3:+,$3}" -device "virtio-blk-$bus,drive=files")
}

# What no guest's console may say, but for what Linux says of many an AMD: of its speculation, and, where it
# has no constant_tsc, of a second processor's TSC, without looking at it
complaints='BUG:|Oops|WARNING:|Call Trace|rcu.*(stall|self-detected)|soft lockup|hard LOCKUP|segfault|general protection|Kernel panic|unstable|I/O error|invalid opcode|hung_task|blocked for more than'
harmless='Speculative Return Stack Overflow: WARNING: See|TSC unstable due to TSCs unsynchronized'

# complaint LOG [MORE]: the first line with a complaint, or with what matches MORE
complaint()
{
	grep -a -v -E "$harmless" "$1" | grep -a -E -m 1 "${2:+$2|}$complaints" | tr -d '\r'
}
