/* SPDX-License-Identifier: MIT */
/*
 * B16: a vCPU decides "no slot" on the old set of slots and caches that under a generation that is
 * still current after the change (S5, S6; src/mem/memslot.c, look_up() and install_mmio() in
 * src/mmu/fault.c).
 *
 * Switches: BUG BUG_LATE_TAG
 *   BUG           the generation is raised once, when the set is published
 *   BUG_LATE_TAG  the vCPU tags with the generation it finds when it caches, and does not compare
 */
byte gen = 0;		/* even: stable */
bool slot = false;	/* what the published set says about the gfn */
byte readers = 0;	/* open sections */
bool done = false;	/* the last update has returned */

bool cached[2];
byte tag[2];

/* Is a cached "no slot" believed, although the last update has returned and left a slot there? */
inline check(me)
{
	atomic {
		assert(!(cached[me] && tag[me] == gen && gen % 2 == 0 && slot && done))
	}
}

proctype vcpu(byte me)
{
	byte g;
	bool there;
	byte tries = 0;

	do
	:: tries < 3 ->
		tries++;
		/* Lookup: one reader section, generation first. */
		readers++;
		g = gen;
		there = slot;
		readers--;
		if
		:: !there && g % 2 == 0 ->
			/* Parked here: racepoint("fault-mmio-tag") */
#ifdef BUG_LATE_TAG
			atomic { cached[me] = true; tag[me] = gen }
#else
			atomic {
				if
				:: gen == g -> cached[me] = true; tag[me] = g
				:: else
				fi
			}
#endif
		:: else
		fi;
		check(me)
	:: else -> break
	od;
	(done);
	check(me)
}

/* Waits for the sections that are open now; later ones see the new set. */
inline synchronize()
{
	(readers == 0)
}

#ifdef BUG
inline publish(new)
{
	gen = gen + 2;
	slot = new;
	synchronize()
}
#else
inline publish(new)
{
	gen = gen + 1;
	slot = new;
	/* racepoint("memslots-published") */
	synchronize();
	gen = gen + 1
}
#endif

/* The last change makes a slot: every cached "no slot" is wrong from then on. */
active proctype updater()
{
	publish(true);
	publish(false);
	publish(true);
	done = true
}

init {
	atomic { run vcpu(0); run vcpu(1) }
}
