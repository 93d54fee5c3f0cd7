/* SPDX-License-Identifier: MIT */
/*
 * The reader-biased lock, PAIR(bias): two readers with a cell each, a refresh that changes what they
 * read, and a bracket (src/base/bias.h). Stores of readers are plain in the model:
 * each goes through a buffer of one, as on x86, unless it is an exchange.
 *
 * Switches: BUG_FENCE BUG_LOOK BUG_WAIT BUG_DRAINED
 *   BUG_FENCE    a reader's cell is visible only after it has looked whether the object is open
 *   BUG_LOOK     a reader does not look after it has published, but before
 *   BUG_WAIT     the closer does not wait
 *   BUG_DRAINED  a close of what is closed, and not drained, makes it drained
 */
bool cell[2];
bool open = true, drained = false;	/* with seq one word */
byte seq = 0;
byte data = 0;		/* changes only while closed and drained */
byte using = 0;		/* readers that are between enter and leave */

/* kl_bias_close(): what is not open keeps "drained". */
inline close(now)
{
	atomic {
#ifdef BUG_DRAINED
		drained = !open;
#else
		drained = (!open && drained);
#endif
		open = false;
		seq++;
		now = seq
	}
}

inline wait_for_readers()
{
#ifndef BUG_WAIT
	/* Cell by cell, as kl_bias_busy() looks. */
	!cell[0];
	!cell[1];
#endif
	skip
}

proctype reader(bit i)
{
	byte n = 0, seen;
	bool is_open;

	do
	:: n < 2 ->
		n++;
#if defined(BUG_FENCE)
		is_open = open;	/* the store waits in the buffer */
		cell[i] = true;
#elif defined(BUG_LOOK)
		is_open = open;
		if
		:: is_open -> cell[i] = true
		:: else
		fi;
#else
		cell[i] = true;
		is_open = open;
#endif
		if
		:: is_open ->
			using++;
			seen = data;
			assert(data == seen);
			using--
		:: else
		fi;
		cell[i] = false
	:: else -> break
	od
}

/* A refresh: close, wait, change, open. */
proctype changer()
{
	byte now, n = 0;

	do
	:: n < 2 ->
		n++;
		close(now);
		if
		:: drained
		:: !drained ->
			wait_for_readers();
			drained = true
		fi;
		now = seq;
		atomic { assert(using == 0); data++ };
		atomic {
			if
			:: seq == now -> open = true; drained = false
			:: else
			fi
		}
	:: else -> break
	od
}

/* A bracket: once it has waited, nobody reads that has not come by a later opening. */
proctype bracket()
{
	byte now;

	close(now);
	if
	:: drained
	:: !drained -> wait_for_readers()
	fi;
	assert(using == 0 || seq != now || open)
}

init {
	atomic {
		run reader(0);
		run reader(1);
		run changer();
		run bracket()
	}
}
