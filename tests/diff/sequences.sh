# SPDX-License-Identifier: MIT
# shellcheck shell=bash
# Compare what a program that makes sequences of KVM calls prints under kvmlet with what it prints on
# /dev/kvm. Sourced by regions and calls, which set
#   program, kvmlet    what makes the sequences, and kvmlet
#   run_options        options of kvmlet run (an array)
#   max_calls          of a sequence
#   known              a file of differences that have an explanation: expressions for the reference's
#                      line and for kvmlet's, the reason, and "ends" if what follows in the sequence
#                      says nothing, or "hides" if that is so although the lines are the same;
#                      separated by tabs
#   tmp                a directory
# and may have a common_features() of their own.
#
# The program's options: --seed N --count N --features F --drop I,J... (calls left out print "-").

ref() { "$program" "$@"; }
our() { "$kvmlet" run "${run_options[@]}" -- "$program" "$@"; }

# differences REF OUR: the seed and the two lines of each that is not known; counts at the end.
# Once a call has answered differently, what follows in that sequence says nothing.
differences()
{
	paste "$1" "$2" | awk -F '\t' -v known="$known" '
		BEGIN {
			while ((getline line < known) > 0) {
				if (line ~ /^#/ || split(line, f, "\t") < 3) continue
				a[++k] = f[1]; b[k] = f[2]; ends[k] = f[4] == "ends"; hides[k] = f[4] == "hides"
			}
		}
		/^sequence / { split($1, f, " "); seed = f[2]; n++; over = 0 }
		/^-/ || over { next }
		$1 == $2 {
			for (i = 1; i <= k; i++)
				if (hides[i] && $1 ~ a[i]) { explained++; over = 1; next }
			next
		}
		{
			for (i = 1; i <= k; i++)
				if (!hides[i] && $1 ~ a[i] && $2 ~ b[i]) { explained++; over = ends[i]; next }
			over = 1
			differ++
			print seed "\n  reference: " $1 "\n  kvmlet:    " $2
		}
		END { print "# " n + 0 " sequences, " explained + 0 " explained differences, " \
			differ + 0 " unexplained" }'
}

# Whether sequence $1 without the calls $2 (I,J,...) still differs.
still()
{
	ref --seed "$1" --features "$features" --drop "$2" >"$tmp/a" &&
		our --seed "$1" --features "$features" --drop "$2" >"$tmp/b"
	! differences "$tmp/a" "$tmp/b" | grep -q ' 0 unexplained$'
}

reduce()
{
	local seed=$1 drop=$max_calls i
	still "$seed" "$drop" || { echo "# sequence $seed alone does not differ"; return; }
	for ((i = max_calls - 1; i >= 0; i--)); do
		if still "$seed" "$drop,$i"; then drop=$drop,$i; fi
	done
	still "$seed" "$drop"
	echo "# ${program##*/} --seed $seed --features $features --drop $drop"
	paste "$tmp/a" "$tmp/b" | awk -F '\t' '$1 == "-" { next } $1 == $2 { print "#   " $1 }
		$1 != $2 { print "# r " $1; print "# k " $2 }'
}

common_features()
{
	local a b
	a=$(ref --features) && b=$(our --features) && echo $((a & b))
}

usable() { [ -w /dev/kvm ] && ref --features >/dev/null 2>&1; }

live()
{
	local seed=${1:-1} count=${2:-1000} step=1000 first='' n explained=0 differ=0 end

	if ! usable; then
		echo "1..0 # SKIP no /dev/kvm to compare with"
		exit 77
	fi
	features=${3:-$(common_features)} || exit 99
	end=$((seed + count))
	for ((; seed < end; seed += step)); do
		n=$((end - seed < step ? end - seed : step))
		ref --seed "$seed" --count "$n" --features "$features" >"$tmp/ref" &
		our --seed "$seed" --count "$n" --features "$features" >"$tmp/our"
		local status=$?
		wait $! || { echo "Bail out! ${program##*/} on /dev/kvm failed"; exit 99; }
		differences "$tmp/ref" "$tmp/our" >"$tmp/diff"
		[ "$differ" -gt 20 ] || grep -v '^#' "$tmp/diff" | head -n 60
		if [ "$status" != 0 ]; then
			echo "# ${program##*/} under kvmlet ended with status $status near seed $seed"
			differ=$((differ + 1))
		fi
		[ -n "$first" ] || first=$(grep -m 1 '^[0-9]' "$tmp/diff")
		read -r _ _ _ n _ <<<"$(tail -n 1 "$tmp/diff")"
		explained=$((explained + n))
		n=$(grep -c '^[0-9]' "$tmp/diff")
		differ=$((differ + n))
	done
	[ -z "$first" ] || reduce "$first"
	echo "# $count sequences with features $features: $explained explained differences," \
		"$differ unexplained"
	[ "$differ" = 0 ]
}
