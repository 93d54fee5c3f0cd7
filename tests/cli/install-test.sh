#!/bin/sh
# SPDX-License-Identifier: MIT
# An installed tree works where it is: DESTDIR, pkg-config, headers, libraries, command.
# usage: install-test.sh SOURCE_DIR BUILD_DIR PREFIX LIBDIR SPIN_VM
src=$1
build=$2
prefix=$3
libdir=$4
spin=$(realpath "$5")
cc=${CC:-cc}
. "$(dirname "$0")/tap.sh"
unset LD_PRELOAD KVMLET_PRELOAD_LIBRARY

dest=$tmp/dest
root=$dest$prefix
lib=$root/$libdir
export PKG_CONFIG_PATH="$lib/pkgconfig"

check "install" env DESTDIR="$dest" meson install -C "$build" --no-rebuild
for f in bin/kvmlet "$libdir/libkvmlet.so" "$libdir/libkvmlet.so.0" \
	"$libdir/kvmlet/libkvmlet-preload.so" include/kvmlet/kvmlet.h share/man/man1/kvmlet.1 \
	share/man/man3/libkvmlet.3; do
	check "$f" test -e "$root/$f"
done
expect "nothing else is installed than listed here" 0 '^0$' sh -c "cd '$root' && find . ! -type d |
	grep -Evc '^\./(bin/kvmlet|$libdir/(libkvmlet\.so[.0-9]*|kvmlet/libkvmlet-preload\.so|pkgconfig/kvmlet\.pc)|include/kvmlet/[a-z]+\.h|share/man/man[13]/(lib)?kvmlet[a-z_]*\.[13](\.gz)?)\$' || :"
expect "pkg-config knows the version" 0 '^[0-9]+\.[0-9]+\.[0-9]+$' pkg-config --modversion kvmlet

# Against the moved tree
pc="pkg-config --define-variable=prefix=$root"
# shellcheck disable=SC2046
check "a program builds with pkg-config" $cc -std=gnu17 -Wall -Wextra -Werror -o "$tmp/memslots" \
	"$src/examples/memslots.c" $($pc --cflags --libs kvmlet)
expect "and runs" 0 '^gpa 0x100000: memory$' env LD_LIBRARY_PATH="$lib" "$tmp/memslots"

# Each public header on its own, as C and as C++
for h in "$root"/include/kvmlet/*.h; do
	header=$(basename "$h")
	echo "#include <kvmlet/$header>" > "$tmp/h.c"
	check "<kvmlet/$header> stands alone" $cc -std=c99 -Wall -Wextra -Wpedantic -Werror \
		-I"$root/include" -fsyntax-only "$tmp/h.c"
	if command -v c++ >/dev/null; then
		check "<kvmlet/$header> in C++" c++ -Wall -Wextra -Werror -I"$root/include" -xc++ \
			-fsyntax-only "$tmp/h.c"
	fi
done

# Every function that a header declares is exported, and nothing that none declares
cat "$root"/include/kvmlet/*.h | grep -Eo '\bkvmlet_[a-z_]+\(' | tr -d '(' | sort -u > "$tmp/declared"
nm -D --defined-only "$lib/libkvmlet.so" | awk '$2 ~ /[TDBRVW]/ { print $3 }' | sed 's/@.*//' |
	grep -v '^KVMLET_' | sort -u > "$tmp/exported"
check "the headers declare functions" test -s "$tmp/declared"
check "exports are what the headers declare" diff "$tmp/declared" "$tmp/exported"

expect "the installed command finds its library" 0 "^ok +preload library +$lib/kvmlet/" \
	"$root/bin/kvmlet" doctor
mv "$dest" "$tmp/elsewhere"
expect "also after the tree has moved" 0 "^ok +preload library +$tmp/elsewhere" \
	"$tmp/elsewhere$prefix/bin/kvmlet" doctor
expect "and runs a KVM program" 3 '^ready$' "$tmp/elsewhere$prefix/bin/kvmlet" run -- "$spin" exit

done_testing
