/* SPDX-License-Identifier: MIT */
/*
 * Gfn-to-pfn caches: a pointer to one small area of guest memory that is locked for a few
 * instructions at a time, as often as one likes.
 *
 *     struct kvmlet_gpc *gpc;
 *     void *p;
 *
 *     kvmlet_gpc_init(vm, 0, &gpc);
 *     kvmlet_gpc_activate(gpc, gpa, 8);
 *     ...
 *     if (!kvmlet_gpc_lock(gpc, 8, &p)) {
 *             atomic_store((_Atomic uint64_t *)p, value);
 *             kvmlet_gpc_unlock(gpc, 1);
 *     }
 *
 * A cache is for one area within one page. It is either at a guest-physical address, and follows
 * the memslots; or at a fixed host address, and ignores them. While it is valid, lock and unlock
 * cost a few nanoseconds, make no system call, and do not disturb one another. Notifier brackets
 * over the page (kvmlet/notifier.h) and changes of its slot (kvmlet/memslot.h) make it invalid, and
 * wait for those who hold it; the next lock looks the address up anew. Nothing keeps the page in
 * memory.
 *
 * The holder, between lock and unlock:
 *   - is brief, does not sleep, and takes no lock that is ever held around a notifier bracket or
 *     a slot change (allocators unmap memory: under `kvmlet run` that includes theirs);
 *   - does not change memory mappings;
 *   - may lock other caches while those are valid. What could have to wait for the holder is
 *     -EDEADLK: to refresh or activate any cache, to open a bracket, to change slots, and to access
 *     guest memory through kvmlet/vm.h. To have several caches there is kvmlet_gpc_lock_many;
 *   - unlocks on the same thread, and does not end its thread or leave by longjmp.
 * The pointer is good for @len bytes, may be read and written, and is void after unlock. Memory
 * that vanishes, or is protected against writing, without a bracket while it is held is the
 * holder's SIGSEGV or SIGBUS; when it had vanished before, lock finds out.
 *
 * Common to all calls
 *   - Any thread may make them at any time, except that a cache must not be used while or after it
 *     is destroyed. Not from a signal handler.
 *   - Signals are not held off: handlers run in the middle of a call, and it goes on afterwards;
 *     kvmlet/vm.h has what else there is to know about signals. -EINTR is for programs
 *     whose signals the library sees, which is under `kvmlet run`.
 *   - @len is in bytes, at least 1.
 *   - Those that may sleep are not called inside a window (-EDEADLK).
 *   - Who resolves page faults (userfaultfd) makes none of them on a cache whose page he is asked
 * for.
 *   - In a forked child, a cache of the parent is unusable: -EIO.
 */
#ifndef KVMLET_GPC_H
#define KVMLET_GPC_H

#include <stddef.h>
#include <sys/uio.h>

#include <kvmlet/types.h>

#ifdef __cplusplus
extern "C" {
#endif

struct kvmlet_vm;
struct kvmlet_gpc;

/** So many caches a thread may hold at a time. */
#define KVMLET_GPC_MAX_HELD 14u

/** No guest-physical address. */
#define KVMLET_INVALID_GPA (~(kl_gpa_t)0)

/**
 * Make an inactive cache. Its VM and address space never change.
 *
 * @param as   the address space: 0, or 1 for that of system management mode
 * @param gpc  out: the cache
 * Context: may sleep.
 * Returns: 0; -EINVAL no such address space; -ENOMEM; -EIO the VM is unusable.
 */
int kvmlet_gpc_init(struct kvmlet_vm *vm, unsigned as, struct kvmlet_gpc **gpc);

/**
 * End a cache, active or not. Nobody else uses or holds it; its VM still exists.
 * Context: may sleep; not by who holds a cache. NULL, and a cache of the parent of a forked child,
 * are ignored. So is, with a complaint on stderr, a call by who holds a cache or a window.
 */
void kvmlet_gpc_destroy(struct kvmlet_gpc *gpc);

/**
 * Put the cache at guest-physical address @gpa. If it is active there already, it stays as it is;
 * elsewhere, it moves, after its holders have unlocked.
 *
 * Tries to make the cache valid, so that kvmlet_gpc_trylock finds it so. That there is no memory at
 * @gpa, or none yet, is no error here: who uses the cache finds out. (Linux 6.12 refuses.)
 *
 * @param gpa  in bytes; @gpa and the @len bytes from there lie in one page
 * Context: may sleep; not inside a notifier bracket of the calling thread.
 * Returns: 0;
 *   -EINVAL   @len is 0, the area crosses a page, or @gpa is KVMLET_INVALID_GPA
 *   -EDEADLK  the calling thread holds a cache, a window or a notifier bracket
 *   -ENOMEM   too many pages have caches (32768 in a VM)
 *   -EIO      the VM is unusable: an internal error, or a parent's
 * After -EINVAL, -EDEADLK and -EIO the cache is as it was; after -ENOMEM it is inactive.
 */
int kvmlet_gpc_activate(struct kvmlet_gpc *gpc, kl_gpa_t gpa, size_t len);

/**
 * The same at a host address. Memslots do not matter to the cache then, and what is written through
 * it is in no dirty log.
 *
 * @param hva  one that a program can own: from 4096 on, in the lower half
 * Context: as kvmlet_gpc_activate.
 * Returns: as kvmlet_gpc_activate; -EINVAL also for another address.
 */
int kvmlet_gpc_activate_hva(struct kvmlet_gpc *gpc, kl_hva_t hva, size_t len);

/**
 * Make the cache inactive. Waits for its holders, and for a refresh of it that is under way. An
 * inactive one stays so.
 * Context: may sleep.
 * Returns: 0; -EDEADLK the calling thread holds a cache or a window; -EIO.
 */
int kvmlet_gpc_deactivate(struct kvmlet_gpc *gpc);

/**
 * Is the cache active and valid, and do @len bytes from its address on fit in the page? Another
 * thread may change that at any time, except if the calling thread holds the cache.
 * Context: any. Never waits.
 * Returns: 1 or 0.
 */
int kvmlet_gpc_check(const struct kvmlet_gpc *gpc, size_t len);

/**
 * Make an active cache valid, if it is not: look its address up and make the page present. Sleeps
 * while a bracket over the page or a change of the slots is in progress.
 * Context: may sleep, with userfaultfd as long as its handler pleases; not inside a notifier
 * bracket of the calling thread. Returns: 0; -EINVAL      the cache is inactive, or @len does not
 * fit in its page (nothing changed) -EFAULT      no slot, a read-only slot, no memory behind it, or
 * memory that is read-only -EHWPOISON   the host's memory is broken there -EDEADLK     the calling
 * thread holds a cache, a window or a notifier bracket -EINTR       a signal came while the page
 * was waited for; may be called again -ENOMEM      too many pages have caches -EIO         the VM
 * is unusable
 */
int kvmlet_gpc_refresh(struct kvmlet_gpc *gpc, size_t len);

/**
 * Lock the cache and get a pointer to its area, after refreshing it as often as necessary. Several
 * threads may hold one cache, and one thread several (but see above).
 *
 * @param p  out: the pointer
 * Context: as kvmlet_gpc_refresh. A valid cache is locked without sleeping.
 * Returns: as kvmlet_gpc_refresh, where -EDEADLK for who holds a cache means that this one is not
 * valid; -E2BIG the thread holds KVMLET_GPC_MAX_HELD; -ENOMEM also if the thread's first lock finds
 * no memory. After an error the cache is not held.
 */
int kvmlet_gpc_lock(struct kvmlet_gpc *gpc, size_t len, void **p);

/**
 * Lock the cache if it is valid. For who must not sleep and has another way.
 * Context: not inside a notifier bracket of the calling thread. Does not sleep, but for a page that
 * the host has swapped out.
 * Returns: 0; -EAGAIN it is not valid, or @len does not fit; -EDEADLK inside a bracket or a window;
 * -E2BIG, -ENOMEM, -EIO as kvmlet_gpc_lock.
 */
int kvmlet_gpc_trylock(struct kvmlet_gpc *gpc, size_t len, void **p);

/**
 * Let go of a cache that this thread holds; its pointer is void.
 *
 * @param written  not 0: the area was written since it was locked. The page is in the dirty log
 *                 of its slot when this returns.
 * Context: never sleeps.
 */
void kvmlet_gpc_unlock(struct kvmlet_gpc *gpc, int written);

/**
 * Lock several caches: all of them, or none. One that is not valid is refreshed while none of the
 * others is held.
 *
 * @param gpcs  the caches
 * @param lens  for each, how many bytes of it are needed
 * @param ptrs  out: for each, its pointer
 * @param n     how many, 1 to KVMLET_GPC_MAX_HELD
 * Context, Returns: as kvmlet_gpc_lock; -EINVAL also for another @n.
 */
int kvmlet_gpc_lock_many(struct kvmlet_gpc *const *gpcs, const size_t *lens, void **ptrs,
			 unsigned n);
/** Unlock all of them. Context: as kvmlet_gpc_unlock. */
void kvmlet_gpc_unlock_many(struct kvmlet_gpc *const *gpcs, unsigned n, int written);

/**
 * An area that may cross pages, in caches of which each has one page of it: activate as many of the
 * @n caches as it takes, in the order of their pieces, and deactivate the rest.
 *
 * @param gpcs  caches of one VM and address space
 * @param n     how many, 1 to KVMLET_GPC_MAX_HELD
 * @param gpa   of the area
 * @param len   of the area, in bytes
 * Context: as kvmlet_gpc_activate. One thread at a time for one area.
 * Returns: as kvmlet_gpc_activate; -EINVAL also if the area has more than @n pieces, or ends beyond
 * the last address. After -ENOMEM all of them are inactive.
 */
int kvmlet_gpc_activate_area(struct kvmlet_gpc *const *gpcs, unsigned n, kl_gpa_t gpa, size_t len);

/**
 * Lock an area, all its pieces or none, and get them in order.
 *
 * @param gpa, len  where the caller believes it to be
 * @param iov       out: the pieces, room for @n
 * @param pieces    out: how many there are; so many caches from the first on are held, until
 *                  kvmlet_gpc_unlock_many
 * Context, Returns: as kvmlet_gpc_lock_many; -ESTALE the caches are not active over just this area,
 * because somebody is moving it (none is held). @len may be less than at activation.
 */
int kvmlet_gpc_lock_area(struct kvmlet_gpc *const *gpcs, unsigned n, kl_gpa_t gpa, size_t len,
			 struct iovec *iov, unsigned *pieces);

#ifdef __cplusplus
}
#endif

#endif
