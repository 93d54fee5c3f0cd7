/* SPDX-License-Identifier: MIT */
/*
 * B31: a fault looked a slot up, slept in populate, and installs its SPTE after the slot was
 * deleted or its memory unmapped (S4, M2, N2, N3; src/mmu/fault.c, src/mmu/invalidate.c).
 *
 * Memory has a version that changes whenever somebody may reuse it: an SPTE of another version is a
 * stray pointer. The vCPU itself (mode and requests) is not modelled: the zap stands for zap
 * and flush.
 *
 * Switches: BUG BUG_SEQ BUG_ORDER BUG_CHECK BUG_LATE
 *   BUG        no test of the generation under mmu_lock
 *   BUG_SEQ    end() does not raise the sequence
 *   BUG_ORDER  end() lowers in_progress before it raises the sequence; neither is under the lock
 *   BUG_CHECK  a fault tests the sequence before it tests in_progress
 *   BUG_LATE   a fault reads the sequence after it has populated
 */
#ifdef BUG
#define GEN_MOVED false
#else
#define GEN_MOVED (g % 2 == 1 || gen != g)
#endif

#define NO_SLOT 0
#define VALID   1
#define INVALID 2

byte gen = 0;
byte slot = VALID;
byte readers = 0;

bool write_locked = false;	/* mmu_lock */
byte read_locked = 0;

byte seq = 0;
byte in_progress = 0;
byte version = 1;
byte spte = 0;			/* version of the memory behind it; 0: none */

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

proctype vcpu()
{
	byte s, g, what, page;
	bool retry;
	byte tries = 0;

	do
	:: tries < 2 && spte == 0 ->
		tries++;
		retry = false;
		s = seq;
		readers++;
		g = gen;
		what = slot;
		readers--;
		if
		:: what == VALID ->
			/* racepoint("fault-populate") */
			page = version;
			/* racepoint("fault-populated") */
#ifdef BUG_LATE
			s = seq;
#endif
			read_lock();
#ifdef BUG_CHECK
			retry = retry || seq != s;
			retry = retry || in_progress > 0;
#else
			retry = retry || in_progress > 0;
			retry = retry || seq != s;
#endif
			retry = retry || GEN_MOVED;
			if
			:: !retry -> spte = page
			:: else
			fi;
			read_unlock()
		:: else
		fi
	:: else -> break
	od
}

inline publish(new)
{
	gen = gen + 1;
	slot = new;
	(readers == 0);
	gen = gen + 1
}

/* DELETE; when it returns, its caller may do with the memory what it likes. */
active proctype deleter()
{
	publish(INVALID);
	/* racepoint("memslot-invalid") */
	write_lock();
	spte = 0;
	write_unlock();
	publish(NO_SLOT);
	assert(spte == 0);
	version = version + 1
}

/* A bracket around an munmap and mmap of the same memory, while the slot may or may not be there. */
active proctype bracket()
{
	write_lock();
	in_progress++;
	spte = 0;
	write_unlock();
	assert(spte == 0);
	version = version + 1;
	assert(spte == 0);
#if defined(BUG_ORDER)
	in_progress--;
	seq++
#elif defined(BUG_SEQ)
	in_progress--
#else
	seq++;
	in_progress--
#endif
}

/* Nobody ever has a pointer to memory that is another's by now. */
active proctype monitor()
{
end:	do
	:: atomic { spte != 0 && spte != version -> assert(false) }
	od
}

init {
	atomic { run vcpu(); run vcpu() }
}
