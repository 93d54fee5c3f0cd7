/* SPDX-License-Identifier: MIT */
/*
 * What the files of preload/ share.
 *
 * A process that never opens /dev/kvm goes through each wrapper with one test and a jump; no
 * handler is installed, no thread is started. kl_pl_opened() turns the rest on.
 */
#pragma once

#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

#include "base/compiler.h"
#include "base/config.h"
#include "base/log.h"
#include "host/guard.h"
#include "host/sys.h"
#include "host/thread.h"
#include "mem/notifier.h"
#include "preload/fdtable.h"
#include "preload/real.h"

/* ---- init.c: this process ------------------------------------------------------------ */

/* The process has, or has inherited, a /dev/kvm. */
extern _Atomic bool kl_pl_opened;
/* Constructor's work; idempotent. */
void kl_pl_init(void);
/* The first /dev/kvm of this process is about to be opened. */
void kl_pl_take_over(void);
/* In the child of fork(). */
void kl_pl_after_fork_child(void);
/* The same where no atfork handler ran: _Fork(), clone(), syscall(SYS_fork). */
void kl_pl_after_raw_fork(void);
/* Heatmap and statistics, if asked for; once. */
void kl_pl_exit_report(void);

/* The kernel's value as libc returns it. */
KL_INLINE long kl_ret(long r)
{
	if (KL_UNLIKELY(r < 0 && r >= -4095)) {
		errno = (int)-r;
		return -1;
	}
	return r;
}

/* ---- mask.c: what the thread's signal mask means to program and engine ---------------- */

/*
 * Entering the engine for work that touches the program's memory: SIGSEGV, SIGBUS and the
 * kick signal must reach this thread. entry.restore: signals to block again.
 */
struct kl_entry {
	uint64_t restore;
};

struct kl_pl_thread {
	bool mask_ok; /* the kernel's mask has none of the guard signals */
	bool adopted; /* the program's view of them is in @view */
	unsigned char nr_parked;
	uint64_t view;       /* guard signals that the program believes blocked */
	long masked_child;   /* the vfork() child that has set its own mask */
	siginfo_t parked[8]; /* signals that came inside the engine and could not be blocked */
};
extern KL_TLS struct kl_pl_thread kl_pl_self;

void kl_entry_slow(struct kl_entry *e);
void kl_exit_slow(const struct kl_entry *e);
/* In a handler: keep a signal until kl_parked_release(). */
void kl_park(const siginfo_t *info);
void kl_parked_release(void);

KL_INLINE void kl_pl_enter(struct kl_entry *e)
{
	e->restore = 0;
	kl_engine_enter();
	if (KL_UNLIKELY(!kl_pl_self.mask_ok))
		kl_entry_slow(e);
}

/* The program's handlers may run in here, and may not return. Clobbers errno. */
KL_INLINE void kl_pl_leave(const struct kl_entry *e)
{
	if (KL_UNLIKELY(e->restore))
		kl_exit_slow(e);
	kl_engine_leave();
	if (KL_UNLIKELY(kl_pl_self.nr_parked) && !kl_engine_active())
		kl_parked_release();
}

/* Around calls that hand the thread's mask to somebody else: new threads and programs. */
uint64_t kl_mask_expose(void);
void kl_mask_unexpose(uint64_t exposed);

/* ---- signals.c ------------------------------------------------------------------------ */

#define KL_SIGBIT(sig) (1ull << ((sig)-1))
/* SIGSEGV, SIGBUS, and the engine's kick. */
uint64_t kl_guard_signals(void);
/* Send @sig to this thread as it came. */
void kl_signal_requeue(int sig, siginfo_t *info);
/* In a handler, when kl_engine_active(): the signal comes when the engine has been left. */
void kl_signal_put_off(int sig, siginfo_t *info, void *uc);
void kl_signals_take_over(void);
void kl_signals_fork_lock(void);
void kl_signals_fork_unlock(bool child);
/* In a child that no atfork handler prepared: its other threads are gone. */
void kl_signals_after_raw_fork(void);
bool kl_signals_taken(void);
int kl_signals_action(int sig, const struct sigaction *act, struct sigaction *old);
/* rt_sigaction(2) and rt_sigprocmask(2): 0 or -errno. */
long kl_signals_raw_action(int sig, const void *act, void *old, size_t size);
long kl_mask_raw(int how, const void *set, void *old, size_t size);
/* cancel.c: libc's signal for pthread_cancel(). */
void kl_cancel_take_over(void);
/* Ignored signals stay ignored in the new program. */
void kl_signals_before_exec(void);
void kl_signals_exec_failed(void);

KL_INLINE uint64_t kl_sigset_get(const sigset_t *s)
{
	uint64_t m;

	__builtin_memcpy(&m, s, sizeof(m));
	return m;
}
KL_INLINE void kl_sigset_put(sigset_t *s, uint64_t m)
{
	__builtin_memcpy(s, &m, sizeof(m));
}

/* ---- bracket.c: notifiers around the program's own calls (N1, N2) ---------------------- */

enum kl_bracket_state {
	KL_BRACKET_NONE,
	KL_BRACKET_OPEN,
	KL_BRACKET_TWICE, /* one is over, and one comes after the call: it may sleep */
};

struct kl_bracket {
	struct kl_notifier_range r;
	enum kl_bracket_state state;
};

void kl_bracket_open(struct kl_bracket *b, uint64_t start, uint64_t len, enum kl_notifier_event ev,
		     const char *cause);
void kl_bracket_open_inside(struct kl_bracket *b, uint64_t start, uint64_t len,
			    enum kl_notifier_event ev, const char *cause);
void kl_bracket_close(struct kl_bracket *b);

/*
 * @b need not be initialised. Between begin and end: the call itself, made so that it cannot wait
 * for another thread of the program, touch the program's memory, or unwind.
 * Preserves errno from before end.
 */
KL_INLINE void kl_bracket_begin(struct kl_bracket *b, const void *p, uint64_t len,
				enum kl_notifier_event ev, const char *cause)
{
	b->state = KL_BRACKET_NONE;
	if (KL_UNLIKELY(kl_notifier_active()))
		kl_bracket_open(b, (uint64_t)(uintptr_t)p, len, ev, cause);
}
KL_INLINE void kl_bracket_end(struct kl_bracket *b)
{
	if (KL_UNLIKELY(b->state != KL_BRACKET_NONE))
		kl_bracket_close(b);
}
/* The change has happened already. */
KL_INLINE void kl_bracket_after(const void *p, uint64_t len, enum kl_notifier_event ev,
				const char *cause)
{
	struct kl_bracket b;

	kl_bracket_begin(&b, p, len, ev, cause);
	kl_bracket_end(&b);
}
/* The same for a call's second bracket, and those that follow. @inside: is one of them open? */
KL_INLINE void kl_bracket_begin_more(struct kl_bracket *b, bool inside, const void *p, uint64_t len,
				     enum kl_notifier_event ev, const char *cause)
{
	if (!inside) {
		kl_bracket_begin(b, p, len, ev, cause);
		return;
	}
	b->state = KL_BRACKET_NONE;
	kl_bracket_open_inside(b, (uint64_t)(uintptr_t)p, len, ev, cause);
}
/* Brackets of one call: if it may sleep for one of them, none stays open. */
void kl_bracket_join(struct kl_bracket *b, unsigned n);

/* The hull of this process's mappings of bytes [off, off+len) of a file; len 0: to the end. */
bool kl_maps_of_file(uint64_t ino, uint64_t off, uint64_t len, uint64_t *start, uint64_t *end);
/* Length of the System V segment that is attached at @addr. */
uint64_t kl_maps_segment(uint64_t addr);
/* Start of the anonymous memory that ends at @brk. */
uint64_t kl_maps_heap(uint64_t brk);

/* ---- files.c, uffd.c ------------------------------------------------------------------- */

/*
 * A call that truncates @path is about to be made, and may not be made inside a bracket: cut the
 * file now if some of it is mapped. @flags as for open(); the rest of them says what must hold.
 */
void kl_truncate_early(int dirfd, const char *path, int flags);

/* One of userfaultfd's ioctls that change mappings. */
bool kl_uffd_is_ioctl(unsigned cmd);
int kl_uffd_ioctl(int fd, unsigned cmd, unsigned long arg);

/* ---- path.c, sysfs.c ------------------------------------------------------------------- */

/* Longer paths are none of kvmlet's. Threads may have small stacks. */
#define KL_PATH_BUF 1024

enum kl_path_kind {
	KL_PATH_OTHER,
	KL_PATH_KVM,
	KL_PATH_IN_KVM, /* "/dev/kvm/": ENOTDIR */
	KL_PATH_SYSFS,
	KL_PATH_FD,
};

/*
 * What @path means. KL_PATH_SYSFS: *rest is the part after "/sys/module/". Costs a system
 * call at most for paths that are not kvmlet's.
 */
enum kl_path_kind kl_path_classify(int dirfd, const char *path, char *buf, size_t size,
				   const char **rest);
/* After the real open of a path that exists: is @fd the real /dev/kvm? */
bool kl_path_opened_real_kvm(int fd);
/* After the real open failed with ENOENT: does @path lead to /dev/kvm through symlinks? */
bool kl_path_dangles_to_kvm(int dirfd, const char *path);

/* A new descriptor with the parameter's text, or -errno. */
int kl_sysfs_open(const char *rest, int flags);
/* 0 and the mode, or -ENOENT. */
int kl_sysfs_mode(const char *rest, unsigned *mode);

/* ---- open.c: a new /dev/kvm descriptor, or -errno -------------------------------------- */
int kl_open_kvm(int flags);
int kl_pl_openat(int dirfd, const char *path, int flags, unsigned mode);

/* ---- scm.c: descriptors in messages ---------------------------------------------------- */
/* Objects that travel, or that somebody else holds, are looked at again. */
extern _Atomic bool kl_scm_any;
void kl_scm_reap(void);
void kl_scm_after_fork(void);

/* ---- heap.c, seccomp.c, proc.c --------------------------------------------------------- */
void kl_heap_init(void);
long kl_pl_brk(long to);
long kl_pl_seccomp(unsigned op, unsigned flags, unsigned long arg);
void kl_proc_init(void);
