/* SPDX-License-Identifier: MIT */
/* The library's life in a process: loaded, taking over, forked, leaving. */
#include <pthread.h>

#include "host/uffd.h"
#include "mem/uffd_source.h"
#include "mmu/split.h"
#include "preload/preload.h"

_Atomic bool kl_pl_opened;

void kl_pl_init(void)
{
	static atomic_bool done;

	if (atomic_exchange(&done, true))
		return;
	kl_real_resolve();
	kl_heap_init();
	kl_config_init();
	kl_proc_init();
	atomic_store(&kl_uffd_source_wanted, kl_config.uffd_events);
	kl_eager_page_split = kl_config.eager_page_split;
}

static __attribute__((constructor)) void constructor(void)
{
	kl_pl_init();
}

void kl_pl_take_over(void)
{
	if (atomic_load_explicit(&kl_pl_opened, memory_order_acquire))
		return;
	kl_pl_init();
	kl_fd_after_fork();
	kl_signals_take_over();
	kl_cancel_take_over();
	atomic_store_explicit(&kl_pl_opened, true, memory_order_release);
}

static _Atomic bool reported;

void kl_pl_after_fork_child(void)
{
	kl_uffd_after_fork();
	if (!atomic_load_explicit(&kl_pl_opened, memory_order_relaxed))
		return;
	kl_uapi_after_fork();
	kl_fd_after_fork();
	kl_scm_after_fork();
	/* The child's figures are its own. */
	atomic_store(&reported, false);
}

void kl_pl_exit_report(void)
{
	struct kl_entry e;

	if ((!kl_config.stats && !kl_config.heatmap_path) ||
	    !atomic_load_explicit(&kl_pl_opened, memory_order_acquire) || kl_fd_shared_child() ||
	    atomic_exchange(&reported, true))
		return;
	kl_pl_enter(&e);
	/* First, while other threads do as ever. */
	if (kl_config.heatmap_path)
		kl_uapi_finish_heatmap(2);
	if (kl_config.stats)
		kl_uapi_print_stats(2);
	kl_pl_leave(&e);
}

static __attribute__((destructor)) void destructor(void)
{
	kl_pl_exit_report();
}
