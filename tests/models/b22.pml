/* SPDX-License-Identifier: MIT */
/*
 * B22: a fault looks whether its gfn is tracked, then makes it writable, while somebody begins to
 * track it (T3, T4; src/mmu/fault.c, src/mmu/track.c, src/mem/vcpu_core.h).
 *
 * Two vCPUs store to one page as often as they like: through a TLB entry, unseen, or by the slow
 * path, which reports. Once the adder has returned, no store goes unseen.
 *
 * Switches: BUG BUG_FLUSH BUG_ORDER
 *   BUG        the count that the fault read before it had mmu_lock decides
 *   BUG_FLUSH  add does not flush
 *   BUG_ORDER  add protects what is mapped, and counts afterwards, in another hold of the lock
 */
#define NONE     0
#define WRITABLE 1
#define TRACKED  2		/* writable, by who reports it */

byte count = 0;			/* of the gfn */
byte spte = NONE;
bool added = false;		/* kl_track_add() has returned */

bool write_locked = false;	/* mmu_lock */
byte read_locked = 0;

bool in_guest[2];
bool flush[2];			/* KL_REQ_TLB_FLUSH */
bool tlb[2];			/* a write tag */

inline write_lock()
{
	atomic { !write_locked && read_locked == 0 -> write_locked = true }
}
inline write_unlock()
{
	write_locked = false
}
inline read_lock()
{
	atomic { !write_locked -> read_locked++ }
}
inline read_unlock()
{
	read_locked--
}

proctype vcpu(byte me)
{
	byte seen, n = 0;
	bool late;

	do
	:: n < 3 ->
		n++;
		in_guest[me] = true;
		if
		:: flush[me] -> flush[me] = false; tlb[me] = false
		:: else
		fi;
		if
		:: tlb[me] ->
			/* a store by the TLB: whoever has returned from add by now would miss it */
			late = added;
			assert(!late);
			in_guest[me] = false
		:: else ->
			seen = spte;
			if
			:: seen == WRITABLE -> tlb[me] = true; in_guest[me] = false
			:: seen == TRACKED -> in_guest[me] = false /* stored, and reported */
			:: else ->
				in_guest[me] = false;
				/* the fault: racepoint("fault-lookup") */
				seen = count;
				/* racepoint("fault-populated") */
				read_lock();
				if
#ifdef BUG
				:: seen > 0 -> spte = TRACKED
#else
				:: count > 0 -> spte = TRACKED
#endif
				:: else -> spte = WRITABLE
				fi;
				read_unlock()
			fi
		fi
	:: else -> break
	od
}

inline protect()
{
	if
	:: spte != NONE -> spte = TRACKED
	:: else
	fi;
#ifndef BUG_FLUSH
	flush[0] = true;
	flush[1] = true;
	(!(in_guest[0] && flush[0]));
	(!(in_guest[1] && flush[1]))
#endif
}

active proctype adder()
{
	write_lock();
#ifdef BUG_ORDER
	protect();
	write_unlock();
	write_lock();
	count++;
#else
	count++;
	protect();
#endif
	write_unlock();
	added = true
}

init {
	atomic { run vcpu(0); run vcpu(1) }
}
