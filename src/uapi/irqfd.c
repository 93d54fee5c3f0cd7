/* SPDX-License-Identifier: MIT */
/*
 * KVM_IRQFD: eventfds that raise interrupts, whoever signals them.
 *
 * Where the program itself writes to one, and the preload library sees it, the interrupt is there
 * when the write returns, as with KVM. For all others one helper thread per process waits,
 * edge-triggered: an eventfd that is signalled injects once more after the last signal, and what
 * it holds is taken. One that was readable when it was assigned injects, too, and keeps what it
 * holds, as with KVM.
 *
 * With a resamplefd the line stays high until the guest ends the interrupt; then it is lowered once
 * and every resamplefd of that GSI is signalled, so that devices which still want it raise it anew.
 *
 * Guarantees
 *   (a) When KVM_IRQFD's deassignment returns, no interrupt of that eventfd is on its way, and the
 *       signals that came before have raised it.
 *   (b) No signal is lost, and none of the time before the assignment either.
 *
 * Both come from the lock (IRQFD): events are fetched and injected with it held, by the helper, by
 * who has written, or by whoever deassigns, so that nobody has one in hand whose irqfd is going.
 * Resamplers are walked by the vCPU that ends an interrupt, in the routing's reader section: they
 * are unlinked, then waited for, then freed.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include "base/failpoint.h"
#include "base/log.h"
#include "base/racepoint.h"
#include "host/eventfd.h"
#include "host/guard.h"
#include "host/sys.h"
#include "uapi/object.h"
#include "x86/irq_routing.h"

#define BATCH 32
#define NO_FD (-1)

struct kl_irqfd {
	struct kl_irqfd *next; /* the VM's */
	struct kl_uvm *vm;
	uint64_t id; /* host/eventfd.h */
	int fd, resample_fd;
	uint32_t gsi;
	bool keep; /* readable when assigned: the first event takes nothing */
	struct kl_resampler *resampler;
	_Atomic(struct kl_irqfd *) next_resampled; /* of the same resampler */
};

/* All resampling irqfds of one GSI. */
struct kl_resampler {
	struct kl_irq_listener listener;
	struct kl_uvm *vm;
	_Atomic(struct kl_irqfd *) irqfds;
	struct kl_resampler *next; /* the VM's */
};

static struct kl_mutex lock = KL_MUTEX_INITIALIZER(IRQFD);
static unsigned nr_irqfds;
/* The helper; epoll_fd is NO_FD while there is none. */
static int epoll_fd = NO_FD, stop_fd = NO_FD;
static pthread_t helper;

_Atomic uint64_t kl_irqfd_hints[KL_IRQFD_HINTS / 64];

static void hint(int fd)
{
	if ((unsigned)fd < KL_IRQFD_HINTS)
		atomic_fetch_or_explicit(&kl_irqfd_hints[fd / 64], 1ull << (fd % 64),
					 memory_order_relaxed);
}

static void forget_hints(void)
{
	for (unsigned i = 0; i < KL_ARRAY_SIZE(kl_irqfd_hints); i++)
		atomic_store_explicit(&kl_irqfd_hints[i], 0, memory_order_relaxed);
}

/* ---- the helper -------------------------------------------------------------------- */

static void inject(const struct kl_irqfd *f)
{
	struct kl_x86_vm *kvm = &f->vm->kvm;

	if (f->resampler) {
		kl_irq_set(kvm, KL_IRQ_RESAMPLE, f->gsi, true, false);
		return;
	}
	kl_irq_set(kvm, KL_IRQ_USER, f->gsi, true, false);
	kl_irq_set(kvm, KL_IRQ_USER, f->gsi, false, false);
}

static void signalled(struct kl_irqfd *f)
{
	/* Taken first: a signal from now on is another event. */
	if (!f->keep)
		kl_eventfd_consume(f->fd);
	f->keep = false;
	inject(f);
}

/* Every irqfd that has been signalled by now. */
static void inject_signalled(void)
{
	struct epoll_event ev[BATCH];
	unsigned seen = 0;
	long n;

	kl_assert_held(&lock);
	/* Those that are signalled meanwhile queue up behind. */
	do {
		n = kl_sys(SYS_epoll_wait, epoll_fd, ev, BATCH, 0);
		for (long i = 0; i < n; i++)
			signalled(ev[i].data.ptr);
		seen += BATCH;
	} while (n == BATCH && seen < nr_irqfds);
}

void kl_irqfd_written(void)
{
	kl_mutex_lock(&lock);
	if (epoll_fd != NO_FD)
		inject_signalled();
	kl_mutex_unlock(&lock);
}

static void *helper_main(void *arg)
{
	struct pollfd p[] = {{.fd = (int)(uint32_t)(uintptr_t)arg, .events = POLLIN},
			     {.fd = (int)((uintptr_t)arg >> 32), .events = POLLIN}};

	kl_engine_enter();
	for (;;) {
		kl_sys(SYS_poll, p, 2, -1);
		if (p[1].revents)
			break;
		racepoint("irqfd-events");
		kl_mutex_lock(&lock);
		if (p[0].fd == epoll_fd)
			inject_signalled();
		kl_mutex_unlock(&lock);
	}
	kl_engine_leave();
	return NULL;
}

static int hidden(long fd)
{
	int high;

	if (fd < 0)
		return (int)fd;
	high = kl_sys_dup((int)fd);
	kl_sys(SYS_close, fd);
	return high;
}

static int start_helper(void)
{
	int epoll, stop, r;

	kl_assert_held(&lock);
	if (epoll_fd != NO_FD)
		return 0;
	/* KVM needs no helper: what this one lacks is memory, as far as programs know. */
	epoll = kl_failpoint("irqfd-epoll") ? -EMFILE
					    : hidden(kl_sys(SYS_epoll_create1, EPOLL_CLOEXEC));
	if (epoll < 0)
		return -ENOMEM;
	stop = kl_failpoint("irqfd-stop") ? -EMFILE : hidden(kl_sys(SYS_eventfd2, 0, EFD_CLOEXEC));
	if (stop < 0) {
		kl_sys_close(epoll);
		return -ENOMEM;
	}
	r = kl_failpoint("irqfd-thread")
		    ? -EAGAIN
		    : kl_thread_create(&helper, "kvmlet-irqfd", helper_main,
				       (void *)((uintptr_t)(unsigned)stop << 32 | (unsigned)epoll));
	if (r) {
		kl_sys_close(stop);
		kl_sys_close(epoll);
		return -ENOMEM;
	}
	epoll_fd = epoll;
	stop_fd = stop;
	return 0;
}

/* If there are no irqfds any more. Another helper may start at once. */
static void stop_helper_unlock(void)
{
	int epoll = epoll_fd, stop = stop_fd;
	pthread_t t = helper;

	kl_assert_held(&lock);
	if (epoll == NO_FD || nr_irqfds) {
		kl_mutex_unlock(&lock);
		return;
	}
	epoll_fd = stop_fd = NO_FD;
	forget_hints();
	kl_mutex_unlock(&lock);
	kl_eventfd_signal(stop);
	pthread_join(t, NULL);
	kl_sys_close(epoll);
	kl_sys_close(stop);
}

void kl_irqfd_after_fork(void)
{
	kl_mutex_init(&lock, KL_RANK_IRQFD);
	/* The parent's, and in use there. */
	if (epoll_fd != NO_FD) {
		kl_sys_close(epoll_fd);
		kl_sys_close(stop_fd);
	}
	epoll_fd = stop_fd = NO_FD;
	nr_irqfds = 0;
	forget_hints();
}

/* ---- resampling -------------------------------------------------------------------- */

static void resample(struct kl_irq_listener *l)
{
	struct kl_resampler *r = kl_container_of(l, struct kl_resampler, listener);
	struct kl_irqfd *f = atomic_load_explicit(&r->irqfds, memory_order_acquire);

	for (; f; f = atomic_load_explicit(&f->next_resampled, memory_order_acquire))
		kl_eventfd_signal(f->resample_fd);
}

/* Lowered once for all of them, and before any is told: one may raise it anew at once. */
static void acked(struct kl_irq_listener *l)
{
	struct kl_resampler *r = kl_container_of(l, struct kl_resampler, listener);

	kl_irq_set(&r->vm->kvm, KL_IRQ_RESAMPLE, l->gsi, false, false);
	resample(l);
}

static int join_resampler(struct kl_irqfd *f)
{
	struct kl_resampler *r = f->vm->resamplers;

	while (r && r->listener.gsi != f->gsi)
		r = r->next;
	if (!r) {
		r = kl_failpoint("irqfd-resampler") ? NULL : calloc(1, sizeof(*r));
		if (!r)
			return -ENOMEM;
		r->vm = f->vm;
		r->listener = (struct kl_irq_listener){
			.gsi = f->gsi, .acked = acked, .resample = resample};
		r->next = f->vm->resamplers;
		f->vm->resamplers = r;
		kl_irq_listener_add(&f->vm->kvm, &r->listener);
	}
	f->resampler = r;
	atomic_store_explicit(&f->next_resampled,
			      atomic_load_explicit(&r->irqfds, memory_order_relaxed),
			      memory_order_relaxed);
	atomic_store_explicit(&r->irqfds, f, memory_order_release);
	return 0;
}

static void leave_resampler(struct kl_irqfd *f)
{
	_Atomic(struct kl_irqfd *) *link = &f->resampler->irqfds;
	struct kl_resampler *r = f->resampler, **p = &f->vm->resamplers;

	while (atomic_load_explicit(link, memory_order_relaxed) != f)
		link = &atomic_load_explicit(link, memory_order_relaxed)->next_resampled;
	atomic_store_explicit(link, atomic_load_explicit(&f->next_resampled, memory_order_relaxed),
			      memory_order_release);
	if (atomic_load_explicit(&r->irqfds, memory_order_relaxed)) {
		kl_irq_listeners_synchronize(&f->vm->kvm);
		return;
	}
	while (*p != r)
		p = &(*p)->next;
	*p = r->next;
	kl_irq_listener_del(&f->vm->kvm, &r->listener);
	kl_irq_set(&f->vm->kvm, KL_IRQ_RESAMPLE, f->gsi, false, false);
	free(r);
}

/* ---- assignment -------------------------------------------------------------------- */

static void irqfd_free(struct kl_irqfd *f)
{
	if (f->fd != NO_FD)
		kl_sys_close(f->fd);
	if (f->resample_fd != NO_FD)
		kl_sys_close(f->resample_fd);
	free(f);
}

/* The engine's own descriptor for the program's eventfd. */
static int own_eventfd(int fd, int *own, uint64_t *id)
{
	int r = kl_sys_dup(fd);

	if (r < 0)
		return r;
	*own = r;
	return kl_eventfd_identify(r, id);
}

static int irqfd_alloc(struct kl_uvm *vm, const struct kvm_irqfd *a, struct kl_irqfd **out)
{
	struct kl_irqfd *f = kl_failpoint("irqfd-alloc") ? NULL : calloc(1, sizeof(*f));
	uint64_t id;
	int r;

	if (!f)
		return -ENOMEM;
	f->vm = vm;
	f->gsi = a->gsi;
	f->fd = f->resample_fd = NO_FD;
	r = own_eventfd((int)a->fd, &f->fd, &f->id);
	if (!r && (a->flags & KVM_IRQFD_FLAG_RESAMPLE))
		r = own_eventfd((int)a->resamplefd, &f->resample_fd, &id);
	if (r) {
		irqfd_free(f);
		return r;
	}
	*out = f;
	return 0;
}

static bool is_used(struct kl_uvm *vm, const struct kl_irqfd *f)
{
	for (struct kl_irqfd *o = vm->irqfds; o; o = o->next) {
		if (kl_eventfd_same(o->fd, o->id, f->fd, f->id))
			return true;
	}
	return false;
}

static int assign_locked(struct kl_irqfd *f)
{
	struct kl_uvm *vm = f->vm;
	struct epoll_event ev = {.events = EPOLLIN | EPOLLET, .data.ptr = f};
	int r;

	kl_assert_held(&lock);
	if (is_used(vm, f))
		return -EBUSY;
	r = start_helper();
	if (!r && f->resample_fd != NO_FD)
		r = join_resampler(f);
	if (r)
		return r;
	/* If it is signalled between the two, the event takes it. */
	f->keep = kl_eventfd_readable(f->fd);
	racepoint("irqfd-armed");
	r = kl_failpoint("irqfd-watch")
		    ? -ENOSPC
		    : (int)kl_sys(SYS_epoll_ctl, epoll_fd, EPOLL_CTL_ADD, f->fd, &ev);
	if (r) {
		if (f->resampler)
			leave_resampler(f);
		return -ENOMEM;
	}
	f->next = vm->irqfds;
	vm->irqfds = f;
	nr_irqfds++;
	return 0;
}

static int assign(struct kl_uvm *vm, const struct kvm_irqfd *a)
{
	bool pins = a->flags & KVM_IRQFD_FLAG_RESAMPLE;
	struct kl_irqfd *f;
	int r;

	if (pins ? !kl_irqchip_in_kernel(&vm->kvm) : !vm->kvm.irqchip)
		return -EINVAL;
	r = irqfd_alloc(vm, a, &f);
	if (r)
		return r;
	kl_mutex_lock(&lock);
	r = assign_locked(f);
	if (!r) {
		hint((int)a->fd);
		kl_mutex_unlock(&lock);
		return 0;
	}
	stop_helper_unlock();
	irqfd_free(f);
	return r;
}

static void remove_locked(struct kl_irqfd **p)
{
	struct kl_irqfd *f = *p;

	kl_assert_held(&lock);
	*p = f->next;
	kl_sys(SYS_epoll_ctl, epoll_fd, EPOLL_CTL_DEL, f->fd, NULL);
	nr_irqfds--;
	if (f->resampler)
		leave_resampler(f);
	irqfd_free(f);
}

/* Nothing to take off is no error. */
static int deassign(struct kl_uvm *vm, const struct kvm_irqfd *a)
{
	struct kl_irqfd **p;
	uint64_t id;
	int r = kl_eventfd_identify((int)a->fd, &id);

	if (r)
		return r;
	kl_mutex_lock(&lock);
	if (vm->irqfds)
		inject_signalled();
	for (p = &vm->irqfds; *p;) {
		struct kl_irqfd *f = *p;

		if (f->gsi == a->gsi && kl_eventfd_same(f->fd, f->id, (int)a->fd, id))
			remove_locked(p);
		else
			p = &f->next;
	}
	kl_mutex_unlock(&lock);
	return 0;
}

long kl_vm_irqfd(struct kl_uvm *vm, unsigned long arg)
{
	const uint32_t known = KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE;
	struct kvm_irqfd a;

	if (kl_copy_from_user(&a, (void *)arg, sizeof(a)))
		return -EFAULT;
	if (a.flags & ~known)
		return -EINVAL;
	return a.flags & KVM_IRQFD_FLAG_DEASSIGN ? deassign(vm, &a) : assign(vm, &a);
}

void kl_irqfd_release(struct kl_uvm *vm)
{
	kl_mutex_lock(&lock);
	while (vm->irqfds)
		remove_locked(&vm->irqfds);
	stop_helper_unlock();
}
