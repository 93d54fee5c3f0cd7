/* SPDX-License-Identifier: MIT */
/*
 * B1, B2, B3, B5, B6 and the half of caches of B32: refreshes of one cache, two brackets over its
 * page, a deactivation that is followed by another activation, and a reader (G5, G7, G8).
 * src/mem/gpc.c: attempt(), make_inactive(), kl_gpc_invalidate_begin() and _end(); the cells are
 * those of src/mem/notifier.c. The lock for readers is a count here; bias.pml has what is inside.
 *
 * Switches: BUG_B1 BUG_B2 BUG_SEQ BUG_ORDER BUG_B3 BUG_B5 BUG_B6 BUG_INDEX BUG_END BUG_WAIT
 *   BUG_B1     the cache is opened before its page has been found
 *   BUG_B2     a refresh does not look whether a bracket is in flight
 *   BUG_SEQ    it does not look whether the sequence has moved
 *   BUG_ORDER  it looks at the sequence first
 *   BUG_B3     refreshes are not serialised
 *   BUG_B5     deactivation is not serialised with them
 *   BUG_B6     an inactive cache can be refreshed
 *   BUG_INDEX  the page is found before the address is in the index (B32)
 *   BUG_END    a bracket's end does not look into the index (B32)
 *   BUG_WAIT   a bracket does not wait for the reader
 */
bool cell[2];		/* a bracket is in flight */
byte version = 1;	/* which page is behind the address now */
byte gone = 0;		/* the host call is over, what was there is gone */

bool live = true, indexed = false;
bool open = false;	/* this and seq are one word: changed together */
byte seq = 0;
byte ptr = 0;		/* the page that the cache points to */
byte published = 0;	/* readers' cells that name the cache */
bool reading = false;
bool mutex = false;

#define lock()   atomic { !mutex -> mutex = true }
#define unlock() mutex = false
#define close()  atomic { open = false; seq++ }

inline quiesce()
{
	close();
	published == 0
}

proctype bracket(bit i)
{
	bool found;

	cell[i] = true;
	found = indexed;
	if
	:: found ->
		close();
#ifndef BUG_WAIT
		published == 0
#endif
	:: else
	fi;
	/* The host call. begin() has promised that nobody uses the page. */
	atomic { assert(!reading || ptr != version); version++ };
#ifndef BUG_END
	found = indexed;
	if
	:: found -> close()
	:: else
	fi;
#endif
	cell[i] = false
}

#ifdef BUG_B3
#define refresh_lock()
#define refresh_unlock()
#else
#define refresh_lock() lock()
#define refresh_unlock() unlock()
#endif

#ifdef BUG_B6
#define may_refresh true
#else
#define may_refresh live
#endif

inline put_into_index()
{
	indexed = true
}

/* What follows "the page is found": @ok: the cache was opened. */
inline look_and_open()
{
#if defined(BUG_ORDER)
	if
	:: seq != s -> retry = true
	:: else
	fi;
	if
	:: retry || cell[0] || cell[1] -> retry = true
	:: else -> atomic { if :: !open -> open = true :: else fi }
	fi
#else
#ifndef BUG_B2
	if
	:: cell[0] || cell[1] -> retry = true
	:: else
	fi;
#endif
	if
	:: retry
	:: else ->
#ifdef BUG_SEQ
		atomic { if :: !open -> open = true :: else fi }
#else
		atomic {
			if
			:: seq == s && !open -> open = true
			:: else -> retry = true
			fi
		}
#endif
	fi
#endif
}

proctype refresher()
{
	byte s, page, tries = 0;
	bool retry;

	do
	:: tries < 2 ->
		tries++;
		retry = false;
		refresh_lock();
		if
		:: may_refresh && !open ->
			quiesce();
#ifndef BUG_INDEX
			put_into_index();
#endif
			s = seq;
#ifdef BUG_B1
			open = true;
#endif
			page = version;
#ifdef BUG_INDEX
			put_into_index();
			s = seq;
#endif
			/* What readers read changes only while nobody can read it. [B3] */
#ifndef BUG_B1
			atomic { assert(!open && !reading); ptr = page };
#else
			ptr = page;
#endif
			look_and_open()
		:: else
		fi;
		refresh_unlock();
		if
		:: retry -> !cell[0] && !cell[1]
		:: else
		fi
	:: else -> break
	od
}

active proctype deactivator()
{
#ifndef BUG_B5
	lock();
#endif
	live = false;
	quiesce();
	indexed = false;
#ifndef BUG_B5
	unlock();
#endif
	/* Inactive, and nobody but a later activation changes that. */
	assert(!open);
	lock();
	assert(!open);	/* B8 */
	live = true;
	unlock()
}

active proctype reader()
{
	byte n = 0;

	do
	:: n < 2 ->
		n++;
		published++;
		if
		:: atomic { open -> reading = true };
			assert(ptr == version);
			reading = false
		:: else
		fi;
		published--
	:: else -> break
	od
}

/* Valid => active => reachable (G5). A close clears `open` first, so these hold at any time. */
active proctype monitor()
{
end:	do
	:: atomic { open && !live && !mutex -> assert(false) }
	:: atomic { open && !indexed -> assert(false) }
	od
}

init {
	atomic {
		run bracket(0);
		run bracket(1);
		run refresher();
		run refresher()
	}
}
