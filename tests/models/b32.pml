/* SPDX-License-Identifier: MIT */
/*
 * B32, the half of slots: a bracket is filtered out as "touches nothing" while a slot is being
 * published over its range, and a fault maps the page that goes away (N4, S7). The handshake of
 * cells and announced updates in src/mem/notifier.c, PAIR(notifier-cells), with one slot, one page,
 * two threads with brackets over it, of which one nests, and faults.
 *
 * Condition variables are modelled with lost wake-ups: a waiter goes on only after a broadcast that
 * came after it gave the gate up. So a thread that nobody wakes is an invalid end state.
 *
 * Switches: BUG BUG_FENCE BUG_RESCAN BUG_NESTED BUG_WAKE
 *   BUG         a bracket that finds no slot leaves without having published its range (a peek)
 *   BUG_FENCE   a bracket reads "is an update announced?" before its cell is visible
 *   BUG_RESCAN  an update that has waited does not look at the cells again
 *   BUG_NESTED  a nested bracket queues behind the update that waits for the outer one
 *   BUG_WAKE    a bracket that ends wakes nobody
 */
bool cell[3];		/* 0: plain bracket; 1, 2: outer and inner one of the other thread */
byte nr_updates = 0;
bool gate = false;
byte broadcasts = 0;

#define NO_SLOT 0
#define VALID   1
#define INVALID 2
byte slot = NO_SLOT;	/* what the published set has over the page */
byte gen = 0;		/* counts sets; what "odd" adds is in b16.pml */
byte seq = 0;
byte in_progress = 0;
byte version = 1;
byte spte = 0;

#ifdef BUG_NESTED
#define MUST_QUEUE(nested) (true)
#else
#define MUST_QUEUE(nested) (!nested)
#endif

#define lock_gate()   atomic { !gate -> gate = true }
#define unlock_gate() gate = false
#define broadcast()   broadcasts = (broadcasts + 1) % 16

inline gate_wait(seen)
{
	atomic { seen = broadcasts; gate = false };
	atomic { broadcasts != seen && !gate -> gate = true }
}

/* What a bracket does between publishing its range and reading the slots. */
inline handshake(i, nested)
{
	if
	:: nr_updates > 0 ->
		lock_gate();
		if
		:: MUST_QUEUE(nested) ->
			do
			:: nr_updates > 0 ->
				cell[i] = false;
				broadcast();
				gate_wait(woken)
			:: else -> break
			od;
			cell[i] = true
		:: else
		fi;
		unlock_gate()
	:: else
	fi
}

inline bracket_begin(i, nested, touched)
{
#if defined(BUG)
	touched = (slot != NO_SLOT);
	if
	:: touched -> cell[i] = true; handshake(i, nested)
	:: else
	fi;
#elif defined(BUG_FENCE)
	if
	:: nr_updates > 0 ->
		cell[i] = true;
		handshake(i, nested)
	:: else -> cell[i] = true
	fi;
	touched = (slot != NO_SLOT);
#else
	cell[i] = true;
	handshake(i, nested);
	/* racepoint("notifier-begin-counted") */
	touched = (slot != NO_SLOT);
#endif
	if
	:: touched -> atomic { in_progress++; spte = 0 }
	:: else
	fi
}

inline bracket_end(i, touched)
{
	if
	:: touched -> atomic { seq++; assert(in_progress > 0); in_progress-- }
	:: else
	fi;
	cell[i] = false;
#ifndef BUG_WAKE
	if
	:: nr_updates > 0 ->
		lock_gate();
		broadcast();
		unlock_gate()
	:: else
	fi
#endif
}

/* The host call, with the promise of begin(): no pointer to the page before end(). */
inline host_call()
{
	atomic { assert(spte == 0); version++ };
	assert(spte == 0)
}

active proctype plain()
{
	bool touched;
	byte woken;

	bracket_begin(0, false, touched);
	host_call();
	bracket_end(0, touched)
}

active proctype nesting()
{
	bool outer, inner;
	byte woken;

	bracket_begin(1, false, outer);
	bracket_begin(2, true, inner);
	/* The set over the range cannot have changed since the outer one began. */
	assert(outer == inner);
	host_call();
	bracket_end(2, inner);
	bracket_end(1, outer)
}

#define in_flight (cell[0] || cell[1] || cell[2])

inline change(to)
{
	lock_gate();
	nr_updates++;
#ifdef BUG_RESCAN
	if
	:: in_flight -> gate_wait(woken)
	:: else
	fi;
#else
	do
	:: in_flight -> gate_wait(woken)
	:: else -> break
	od;
#endif
	/* The swap, still under the gate. */
	atomic { slot = to; gen++ };
	nr_updates--;
	broadcast();
	unlock_gate()
}

active proctype updater()
{
	byte woken;

	change(VALID);
	change(INVALID);
	spte = 0;
	change(NO_SLOT);
	change(VALID)
}

active proctype vcpu()
{
	byte s, g, page;
	bool there;
	byte tries = 0;

	do
	:: tries < 2 ->
		tries++;
		s = seq;
		atomic { g = gen; there = (slot == VALID) };
		if
		:: there ->
			page = version;
			atomic {
				if
				:: in_progress == 0 && seq == s && gen == g -> spte = page
				:: else
				fi
			}
		:: else
		fi
	:: else -> break
	od
}

active proctype monitor()
{
end:	do
	:: atomic { spte != 0 && spte != version -> assert(false) }
	od
}
