#!/bin/sh
# SPDX-License-Identifier: MIT
# Every function that the headers declare is in the version map, is exported, and links; nothing
# else is. (That the headers stand alone, the installation test checks.)
# usage: api-symbols.sh HEADERS MAP LIBRARY CC...
set -eu
headers=$1 map=$2 lib=$3
shift 3
cc=$*
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

# Preprocessed, so that what a comment mentions is no declaration.
for h in "$headers"/kvmlet/*.h; do echo "#include <kvmlet/${h##*/}>"; done > "$dir/all.c"
$cc -E -I"$headers" "$dir/all.c" | grep -o '\bkvmlet_[a-z0-9_]*(' | tr -d '(' | sort -u > "$dir/declared"
sed -n '/global:/,/local:/p' "$map" | grep -o '\bkvmlet_[a-z0-9_]*' | sort -u > "$dir/mapped"
nm -D --defined-only "$lib" | awk '$2 ~ /[TWBDR]/ { sub(/@.*/, "", $3); print $3 }' | sort -u > "$dir/exported"

[ "$(wc -l < "$dir/declared")" -ge 10 ] || { echo "found hardly any declaration"; exit 1; }
bad=0
for what in mapped exported; do
	if ! diff -u "$dir/declared" "$dir/$what" > "$dir/diff"; then
		echo "declared in the headers (-) and $what (+) differ:"
		grep '^[-+]kvmlet' "$dir/diff"
		bad=1
	fi
done

{
	cat "$dir/all.c"
	echo 'typedef void (*fn)(void); fn all[] = {'
	sed 's/.*/(fn)&,/' "$dir/declared"
	echo '}; int main(void) { return !all[0]; }'
} > "$dir/use.c"
$cc -Wall -Wextra -Werror -std=c11 -I"$headers" -Wno-cast-function-type "$dir/use.c" "$lib" -o "$dir/use" || bad=1
exit $bad
