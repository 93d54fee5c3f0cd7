/* SPDX-License-Identifier: MIT */
/*
 * Exhibits B18 and B19 of guest_memfd, and the edges of conversions, holes and closing against
 * faults and caches (F2-F6), forced one by one.
 */
#include "unit/gmem_env.h"

#include "mem/gpc.h"

/* A call on a thread of its own. */
struct call {
	struct gmem_fixture *g;
	enum { CONVERT, PUNCH, CLOSE, BIND, DESTROY, REFRESH } what;
	uint64_t page, n;
	bool private;
	struct kl_gmem *file;
	struct kl_gpc *gpc;
	int r;
	_Atomic bool done;
	pthread_t thread;
};

static void *call_thread(void *arg)
{
	struct call *c = arg;
	struct kl_vm *vm = &c->g->f.vm;

	switch (c->what) {
	case CONVERT:
		c->r = kl_set_private(vm, c->page, c->page + c->n, c->private);
		break;
	case PUNCH:
		c->r = kl_gmem_punch(c->file, c->page * PG, c->n * PG);
		break;
	case CLOSE:
		kl_gmem_close(c->file);
		c->r = 0;
		break;
	case BIND:
		c->r = set_gmem(vm, 1, 0x1000000, c->n * PG, c->g->f.ram, c->file, c->page * PG);
		break;
	case DESTROY:
		kl_vm_destroy(vm);
		c->r = 0;
		break;
	case REFRESH:
		c->r = kl_gpc_refresh(c->gpc, 8);
		break;
	}
	atomic_store(&c->done, true);
	return NULL;
}

static void start(struct call *c)
{
	c->r = 1;
	pthread_create(&c->thread, NULL, call_thread, c);
}

#define start_until(c, point)                                   \
	do {                                                    \
		kl_racepoint_arm(point, 1);                     \
		start(c);                                       \
		assert_true(kl_racepoint_wait(point, TIMEOUT)); \
	} while (0)

static void join(struct call *c)
{
	pthread_join(c->thread, NULL);
	assert_int_equal(c->r, 0);
}

static void start_parked_fault(struct faulter *t, pthread_t *thread)
{
	kl_racepoint_arm("fault-populated", 1);
	pthread_create(thread, NULL, fault_thread, t);
	assert_true(kl_racepoint_wait("fault-populated", TIMEOUT));
}

static void finish_parked_fault(pthread_t thread)
{
	kl_racepoint_release("fault-populated");
	pthread_join(thread, NULL);
}

/* ---- B18 ----------------------------------------------------------------------------------- */

/* B18, F4: a hole in a file that nothing is bound to, and in a part of one: begin and end agree. */
static void hole_in_unbound(void **state)
{
	struct gmem_fixture *g = *state;
	struct kl_gmem *unbound;

	assert_int_equal(new_file(&g->f.vm, 4 * PG, &unbound), 0);
	assert_int_equal(kl_gmem_punch(unbound, 0, 4 * PG), 0);
	assert_int_equal(kl_gmem_punch(g->file, NPAGES * PG, PG), 0);
	assert_int_equal(g->f.vm.mmu_invalidate_in_progress, 0);
	assert_int_equal(kl_self.brackets, 0);
	assert_int_equal(set_gmem(&g->f.vm, 1, 0x1000000, 4 * PG, g->f.ram, unbound, 0), 0);
	convert(g, 0x1000, 4, true);
	/* One look: nothing is in progress that it would have to wait for. */
	assert_int_equal(kl_mmu_fault(&g->f.vcpu, 0x1000000, KL_ACC_WRITE), KL_FAULT_MAPPED);
	assert_true(mapped(&g->f, 0x1000000, KL_ACC_WRITE));
	assert_int_equal(kl_mmu_fault(&g->f.vcpu, 0, KL_ACC_WRITE), KL_FAULT_MAPPED);
	assert_true(mapped(&g->f, 0, KL_ACC_WRITE));
	kl_gmem_close(unbound);
	assert_int_equal(g->f.vm.mmu_invalidate_in_progress, 0);
}

/* B18, F5: a conversion of frames that no slot has is one from begin to end. */
static void conversion_without_slot(void **state)
{
	struct gmem_fixture *g = *state;

	convert(g, 0x1000, 16, true);
	assert_int_equal(g->f.vm.mmu_invalidate_in_progress, 0);
	convert(g, 0x1000, 16, false);
	assert_int_equal(set(&g->f.vm, 1, 0, 0x1000000, PG, g->f.ram), 0);
	assert_int_equal(kl_mmu_fault(&g->f.vcpu, 0x1000000, KL_ACC_WRITE), KL_FAULT_MAPPED);
	assert_true(mapped(&g->f, 0x1000000, KL_ACC_WRITE));
}

/* B18, F4: which slots are bound to what is being punched does not change until it is over. */
static void bind_during_hole(void **state)
{
	struct gmem_fixture *g = *state;
	struct call punch = {.g = g, .what = PUNCH, .file = g->file, .page = NPAGES, .n = 2};
	struct call bind = {.g = g, .what = BIND, .file = g->file, .page = NPAGES, .n = 2};

	NEED_RACEPOINTS;
	convert(g, 0x1000, 2, true);
	start_until(&punch, "gmem-punch");
	start_until(&bind, "notifier-update-waits");
	assert_false(atomic_load(&bind.done));
	kl_racepoint_release("notifier-update-waits");
	kl_racepoint_release("gmem-punch");
	join(&punch);
	join(&bind);
	assert_int_equal(g->f.vm.mmu_invalidate_in_progress, 0);
	assert_int_equal(*page_at(g, 0x1000000, KL_ACC_WRITE), 0);
}

/* B18, F4: a slot is deleted, while a hole in its memory is being punched: it waits for the end. */
static void deletion_during_hole(void **state)
{
	struct gmem_fixture *g = *state;
	struct call punch = {.g = g, .what = PUNCH, .file = g->file, .n = NPAGES};
	struct slot_change c = {&g->f, 0, 0, -1};
	pthread_t deleter;

	NEED_RACEPOINTS;
	assert_int_equal(set_gmem(&g->f.vm, 1, 0x1000000, PG, g->f.ram, g->file, NPAGES * PG), 0);
	punch.page = NPAGES;
	start_until(&punch, "gmem-punched");
	assert_int_equal(g->f.vm.mmu_invalidate_in_progress, 1);
	kl_racepoint_arm("notifier-update-waits", 1);
	pthread_create(&deleter, NULL, change_slot_1, &c);
	assert_true(kl_racepoint_wait("notifier-update-waits", TIMEOUT));
	kl_racepoint_release("notifier-update-waits");
	kl_racepoint_release("gmem-punched");
	join(&punch);
	pthread_join(deleter, NULL);
	assert_int_equal(c.r, 0);
	assert_int_equal(g->f.vm.mmu_invalidate_in_progress, 0);
}

/* ---- B19 ----------------------------------------------------------------------------------- */

/* B19, F6: a VM dies while a hole is being punched through another VM's file of the same inode. */
static void death_during_hole(void **state)
{
	struct gmem_fixture *g = *state, *b;
	struct call punch = {.g = g, .what = PUNCH, .file = g->file, .n = NPAGES};
	struct call destroy = {.what = DESTROY};
	void *s;

	NEED_RACEPOINTS;
	assert_int_equal(gmem_setup(&s), 0);
	destroy.g = b = s;
	kl_gmem_close(b->file);
	assert_int_equal(set(&b->f.vm, 0, 0, 0, 0, NULL), 0);
	assert_int_equal(kl_gmem_link(g->file, &b->f.vm, &b->file), 0);
	assert_int_equal(set_gmem(&b->f.vm, 0, 0, NPAGES * PG, b->f.ram, b->file, 0), 0);
	convert(b, 0, NPAGES, true);
	page_at(b, PG, KL_ACC_WRITE);
	start_until(&punch, "gmem-punched");
	start_until(&destroy, "notifier-update-waits");
	assert_false(atomic_load(&destroy.done));
	kl_racepoint_release("notifier-update-waits");
	kl_racepoint_release("gmem-punched");
	join(&punch);
	join(&destroy);
	/* Its file is nobody's now, and can be closed. */
	kl_gmem_close(b->file);
	munmap(b->f.ram, NPAGES * PG);
	free(b);
	assert_int_equal(g->f.vm.mmu_invalidate_in_progress, 0);
	assert_non_null(page_at(g, PG, KL_ACC_WRITE));
}

/* B19, F6: a VM dies inside a bracket of its own thread over its private memory. */
static void death_inside_bracket(void **state)
{
	struct gmem_fixture *b;
	struct kl_notifier_range r;
	void *s;

	(void)state;
	assert_int_equal(gmem_setup(&s), 0);
	b = s;
	convert(b, 0, NPAGES, true);
	page_at(b, 0, KL_ACC_WRITE);
	r = range_of(private_page(b, 0), NPAGES * PG);
	assert_int_equal(kl_notifier_begin(&r), 0);
	assert_int_equal(b->f.vm.mmu_invalidate_in_progress, 1);
	kl_vm_destroy(&b->f.vm);
	kl_notifier_end(&r);
	kl_gmem_close(b->file);
	munmap(b->f.ram, NPAGES * PG);
	free(b);
}

/* B19, F2: the file is closed by one thread while another destroys the VM. */
static void death_during_close(void **state)
{
	struct gmem_fixture *b;
	struct call close_file = {.what = CLOSE}, destroy = {.what = DESTROY};
	void *s;

	(void)state;
	NEED_RACEPOINTS;
	assert_int_equal(gmem_setup(&s), 0);
	b = s;
	close_file.g = destroy.g = b;
	close_file.file = b->file;
	convert(b, 0, NPAGES, true);
	page_at(b, 0, KL_ACC_WRITE);
	start_until(&close_file, "gmem-closed");
	start_until(&destroy, "gmem-vm-gone");
	assert_non_null(b->f.vm.mmu); /* what the closing needs is still there */
	kl_racepoint_release("gmem-vm-gone");
	assert_false(atomic_load(&destroy.done));
	kl_racepoint_release("gmem-closed");
	join(&close_file);
	join(&destroy);
	munmap(b->f.ram, NPAGES * PG);
	free(b);
}

/* ---- conversions against faults ------------------------------------------------------------ */

/* F5: the fault has looked, and touched the shared page; then the frame becomes private. */
static void conversion_during_populate(void **state)
{
	struct gmem_fixture *g = *state;
	struct faulter t = {&g->f, PG, KL_ACC_WRITE, -1};
	pthread_t thread;

	NEED_RACEPOINTS;
	start_parked_fault(&t, &thread);
	convert(g, 1, 1, true);
	finish_parked_fault(thread);
	assert_false(mapped(&g->f, PG, KL_ACC_READ));
	assert_ptr_equal(page_at(g, PG, KL_ACC_READ), private_page(g, 1));
}

/* F5: the other way round. */
static void conversion_to_shared(void **state)
{
	struct gmem_fixture *g = *state;
	struct faulter t = {&g->f, PG, KL_ACC_READ, -1};
	pthread_t thread;

	NEED_RACEPOINTS;
	convert(g, 1, 1, true);
	start_parked_fault(&t, &thread);
	convert(g, 1, 1, false);
	finish_parked_fault(thread);
	assert_false(mapped(&g->f, PG, KL_ACC_READ));
	assert_ptr_equal(page_at(g, PG, KL_ACC_READ), g->f.ram + PG);
}

/* F5: inside a conversion, before and after the attribute changes, nothing of its frames is mapped.
 */
static void fault_during_conversion(void **state)
{
	static const char *const points[] = {"gfn-change-begun", "gfn-change-made"};
	struct gmem_fixture *g = *state;

	NEED_RACEPOINTS;
	for (unsigned i = 0; i < 2; i++) {
		struct call c = {.g = g, .what = CONVERT, .page = 1, .n = 2, .private = !i};

		page_at(g, PG, KL_ACC_WRITE);
		page_at(g, 4 * PG, KL_ACC_WRITE);
		start_until(&c, points[i]);
		assert_false(mapped(&g->f, PG, KL_ACC_READ));
		assert_int_equal(kl_mmu_fault(&g->f.vcpu, PG, KL_ACC_WRITE), KL_FAULT_MAPPED);
		assert_int_equal(kl_mmu_fault(&g->f.vcpu, 2 * PG, KL_ACC_READ), KL_FAULT_MAPPED);
		assert_false(mapped(&g->f, PG, KL_ACC_READ));
		assert_false(mapped(&g->f, 2 * PG, KL_ACC_READ));
		/* Its neighbours are not delayed. */
		assert_true(mapped(&g->f, 4 * PG, KL_ACC_WRITE));
		assert_int_equal(kl_mmu_fault(&g->f.vcpu, 5 * PG, KL_ACC_WRITE), KL_FAULT_MAPPED);
		assert_true(mapped(&g->f, 5 * PG, KL_ACC_WRITE));
		kl_racepoint_release(points[i]);
		join(&c);
		assert_ptr_equal(page_at(g, PG, KL_ACC_WRITE),
				 i ? g->f.ram + PG : private_page(g, 1));
	}
}

/* F5, N2: who is in the guest with the shared page has left it before it counts as private. */
static void conversion_waits_for_guest(void **state)
{
	struct gmem_fixture *g = *state;
	struct call c = {.g = g, .what = CONVERT, .page = 1, .n = 1, .private = true};
	struct kl_vcpu_core *v = &g->f.vcpu;
	bool writable, mmio;
	unsigned level;
	uint8_t *p;

	NEED_RACEPOINTS;
	page_at(g, PG, KL_ACC_WRITE);
	kl_vcpu_enter_guest(v);
	p = kl_mmu_lookup(v, PG, KL_ACC_WRITE, &writable, &mmio);
	assert_ptr_equal(p, g->f.ram + PG);
	start_until(&c, "vcpu-awaited");
	kl_racepoint_release("vcpu-awaited");
	assert_false(kl_attr_private(&g->f.vm.attrs, 1, &level));
	*p = 0x77;
	kl_vcpu_leave_guest(v);
	join(&c);
	assert_true(kl_attr_private(&g->f.vm.attrs, 1, &level));
	assert_int_equal(*page_at(g, PG, KL_ACC_READ), 0);
	assert_int_equal(g->f.ram[PG], 0x77);
}

/* F5: "no slot" is not remembered of a frame that has become private meanwhile. */
static void conversion_during_mmio(void **state)
{
	struct gmem_fixture *g = *state;
	struct faulter t = {&g->f, 0x1000000, KL_ACC_READ, -1};
	pthread_t thread;

	NEED_RACEPOINTS;
	kl_racepoint_arm("fault-mmio-tag", 1);
	pthread_create(&thread, NULL, fault_thread, &t);
	assert_true(kl_racepoint_wait("fault-mmio-tag", TIMEOUT));
	convert(g, 0x1000, 1, true);
	kl_racepoint_release("fault-mmio-tag");
	pthread_join(thread, NULL);
	assert_int_equal(t.r, KL_FAULT_MMIO);
	assert_false(mmio_cached(&g->f, 0x1000000));
	assert_int_equal(kl_mmu_fault(&g->f.vcpu, 0x1000000, KL_ACC_READ), -EFAULT);
}

/* M1, F5: one page of 2 MiB becomes private, when all of it has been found fit for one leaf. */
static void conversion_during_large_fault(void **state)
{
	struct gmem_fixture *g = *state;
	const uint64_t size = 2ull << 20;
	struct faulter t = {&g->f, 1ull << 30, KL_ACC_WRITE, -1};
	uint8_t *ram =
		mmap(NULL, 2 * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint8_t *at = (uint8_t *)(((uint64_t)ram + size - 1) & ~(size - 1));
	pthread_t thread;

	NEED_RACEPOINTS;
	memset(at, 1, size);
	assert_int_equal(set(&g->f.vm, 1, 0, 1ull << 30, size, at), 0);
	kl_racepoint_arm("fault-huge", 1);
	pthread_create(&thread, NULL, fault_thread, &t);
	assert_true(kl_racepoint_wait("fault-huge", TIMEOUT));
	convert(g, (1ull << 18) + 7, 1, true);
	kl_racepoint_release("fault-huge");
	pthread_join(thread, NULL);
	assert_null(page_at(g, (1ull << 30) + 7 * PG, KL_ACC_READ));
	assert_ptr_equal(page_at(g, 1ull << 30, KL_ACC_WRITE), at);
	assert_null(page_at(g, (1ull << 30) + 7 * PG, KL_ACC_READ));
	assert_int_equal(kl_stat_get(&g->f.vm.stats.pages_2m), 0);
	munmap(ram, 2 * size);
}

/* ---- holes and closing against faults ------------------------------------------------------- */

/* F3: the fault has touched the page; then the page goes. What is mapped later is the new one. */
static void hole_during_populate(void **state)
{
	struct gmem_fixture *g = *state;
	struct faulter t = {&g->f, PG, KL_ACC_WRITE, -1};
	pthread_t thread;

	NEED_RACEPOINTS;
	convert(g, 0, NPAGES, true);
	start_parked_fault(&t, &thread);
	assert_int_equal(kl_gmem_punch(g->file, 0, NPAGES * PG), 0);
	assert_int_equal(kl_gmem_allocated(g->file), 0);
	finish_parked_fault(thread);
	assert_false(mapped(&g->f, PG, KL_ACC_READ));
	/* Nobody reaches the block through what he had: there is none (G17). */
	assert_int_equal(kl_gmem_allocated(g->file), 0);
}

/* F3: from begin to end of a hole none of it is mapped; and then it is zero. */
static void fault_during_hole(void **state)
{
	static const char *const points[] = {"gmem-punch", "gmem-punched"};
	struct gmem_fixture *g = *state;

	NEED_RACEPOINTS;
	convert(g, 0, NPAGES, true);
	for (unsigned i = 0; i < 2; i++) {
		struct call c = {.g = g, .what = PUNCH, .file = g->file, .page = 1, .n = 1};

		*page_at(g, PG, KL_ACC_WRITE) = 0x55;
		start_until(&c, points[i]);
		assert_false(mapped(&g->f, PG, KL_ACC_READ));
		assert_int_equal(kl_mmu_fault(&g->f.vcpu, PG, KL_ACC_WRITE), KL_FAULT_MAPPED);
		assert_false(mapped(&g->f, PG, KL_ACC_READ));
		kl_racepoint_release(points[i]);
		join(&c);
		assert_int_equal(*page_at(g, PG, KL_ACC_READ), 0);
	}
}

/* F2: the fault has found the file open; it is closed, and the memory given back, before it
 * installs. */
static void close_during_populate(void **state)
{
	struct gmem_fixture *g = *state;
	struct faulter t = {&g->f, PG, KL_ACC_WRITE, -1};
	struct kl_gmem *file = g->file;
	pthread_t thread;

	NEED_RACEPOINTS;
	convert(g, 0, NPAGES, true);
	start_parked_fault(&t, &thread);
	g->file = NULL;
	kl_gmem_close(file);
	finish_parked_fault(thread);
	assert_false(mapped(&g->f, PG, KL_ACC_READ));
	assert_int_equal(kl_mmu_fault(&g->f.vcpu, PG, KL_ACC_READ), -EFAULT);
}

/*
 * F2: it is closed, and its slot deleted, before the fault touches: the addresses are still nobody
 * else's.
 */
static void close_before_touch(void **state)
{
	struct gmem_fixture *g = *state;
	struct faulter t = {&g->f, PG, KL_ACC_WRITE, -1};
	struct kl_gmem *file = g->file;
	uint8_t *at = private_page(g, 0);
	pthread_t thread;
	unsigned char v;

	NEED_RACEPOINTS;
	convert(g, 0, NPAGES, true);
	kl_racepoint_arm("fault-populate", 1);
	pthread_create(&thread, NULL, fault_thread, &t);
	assert_true(kl_racepoint_wait("fault-populate", TIMEOUT));
	g->file = NULL;
	kl_gmem_close(file);
	assert_int_equal(set(&g->f.vm, 0, 0, 0, 0, NULL), 0);
	assert_int_equal(mincore(at, PG, &v), 0); /* reserved */
	kl_racepoint_release("fault-populate");
	pthread_join(thread, NULL);
	assert_int_equal(t.r, -EFAULT);
	assert_int_equal(mincore(at, PG, &v), -1);
	assert_int_equal(errno, ENOMEM);
}

/* ---- caches -------------------------------------------------------------------------------- */

static struct kl_gpc *new_cache(struct gmem_fixture *g, uint64_t gpa)
{
	struct kl_gpc *c = aligned_alloc(64, (sizeof(*c) + 63) / 64 * 64);

	assert_int_equal(kl_gpc_init(c, &g->f.vm, 0, KL_GPC_USER), 0);
	assert_int_equal(kl_gpc_activate(c, gpa, 8), 0);
	return c;
}

static void free_cache(struct kl_gpc *c)
{
	kl_gpc_destroy(c);
	free(c);
}

static void *pointer_of(struct kl_gpc *c)
{
	void *p;

	assert_int_equal(kl_gpc_lock(c, 8, &p), 0);
	assert_true(kl_gpc_unlock(c, false));
	return p;
}

/*
 * F7: a refresh has looked up, and its address is not in the index yet: the conversion does not
 * find it. It has to look again.
 */
static void conversion_during_refresh(void **state)
{
	static const char *const points[] = {"gpc-looked-up", "gpc-indexed", "gpc-populate",
					     "gpc-populated"};
	struct gmem_fixture *g = *state;
	struct kl_gpc *c = new_cache(g, PG);

	NEED_RACEPOINTS;
	for (unsigned i = 0; i < 4; i++) {
		struct call refresh = {.g = g, .what = REFRESH, .gpc = c};
		struct kl_notifier_range r = range_of(g->f.ram + PG, PG);

		convert(g, 1, 1, true);
		convert(g, 1, 1, false); /* out of date */
		assert_false(kl_gpc_check(c, 8));
		if (i < 2) { /* ... and elsewhere in the index */
			convert(g, 1, 1, true);
			pointer_of(c);
			convert(g, 1, 1, false);
		} else {
			assert_int_equal(kl_notifier_begin(&r), 0);
			kl_notifier_end(&r);
		}
		start_until(&refresh, points[i]);
		convert(g, 1, 1, true);
		kl_racepoint_release(points[i]);
		join(&refresh);
		if (kl_gpc_check(c, 8))
			assert_ptr_equal(pointer_of(c), private_page(g, 1));
		assert_ptr_equal(pointer_of(c), private_page(g, 1));
		convert(g, 1, 1, false);
	}
	free_cache(c);
}

/* F7: inside a conversion nobody refreshes: he would find what is about to be wrong. */
static void refresh_during_conversion(void **state)
{
	struct gmem_fixture *g = *state;
	struct kl_gpc *c = new_cache(g, PG);
	struct call change = {.g = g, .what = CONVERT, .page = 1, .n = 1, .private = true};
	struct call refresh = {.g = g, .what = REFRESH, .gpc = c};

	NEED_RACEPOINTS;
	pointer_of(c);
	start_until(&change, "gfn-change-gpcs-done");
	assert_false(kl_gpc_check(c, 8));
	start_until(&refresh, "gpc-waits-for-slots");
	kl_racepoint_release("gpc-waits-for-slots");
	assert_false(kl_gpc_check(c, 8));
	kl_racepoint_release("gfn-change-gpcs-done");
	join(&change);
	join(&refresh);
	assert_ptr_equal(pointer_of(c), private_page(g, 1));
	free_cache(c);
}

/* F7, S8: a holder has the old page until he lets go, and the conversion waits for him. */
static void conversion_waits_for_holder(void **state)
{
	struct gmem_fixture *g = *state;
	struct kl_gpc *c = new_cache(g, PG);
	struct call change = {.g = g, .what = CONVERT, .page = 1, .n = 1, .private = true};
	unsigned level;
	void *p;

	NEED_RACEPOINTS;
	assert_int_equal(kl_gpc_lock(c, 8, &p), 0);
	start_until(&change, "gpc-slot-closed");
	kl_racepoint_release("gpc-slot-closed");
	assert_false(kl_attr_private(&g->f.vm.attrs, 1, &level));
	*(uint64_t *)p = 42;
	assert_true(kl_gpc_unlock(c, true));
	join(&change);
	assert_int_equal(*(uint64_t *)(void *)(g->f.ram + PG), 42);
	assert_int_equal(*(uint64_t *)pointer_of(c), 0);
	free_cache(c);
}

/* F2, F7: the file is closed under a refresh that has found it open. */
static void close_during_refresh(void **state)
{
	struct gmem_fixture *g = *state;
	struct kl_gpc *c;
	struct call refresh = {.g = g, .what = REFRESH};
	struct kl_gmem *file = g->file;

	NEED_RACEPOINTS;
	convert(g, 1, 1, true);
	refresh.gpc = c = aligned_alloc(64, (sizeof(*c) + 63) / 64 * 64);
	assert_int_equal(kl_gpc_init(c, &g->f.vm, 0, KL_GPC_USER), 0);
	assert_int_equal(kl_gpc_activate(c, PG, 8), 0);
	assert_int_equal(kl_gmem_punch(file, PG, PG), 0);
	start_until(&refresh, "gpc-populated");
	g->file = NULL;
	kl_gmem_close(file);
	kl_racepoint_release("gpc-populated");
	pthread_join(refresh.thread, NULL);
	assert_int_equal(refresh.r, -EFAULT);
	assert_false(kl_gpc_check(c, 8));
	free_cache(c);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, gmem_setup, gmem_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(hole_in_unbound),
		TEST(conversion_without_slot),
		TEST(bind_during_hole),
		TEST(deletion_during_hole),
		TEST(death_during_hole),
		cmocka_unit_test(death_inside_bracket),
		cmocka_unit_test(death_during_close),
		TEST(conversion_during_populate),
		TEST(conversion_to_shared),
		TEST(fault_during_conversion),
		TEST(conversion_waits_for_guest),
		TEST(conversion_during_mmio),
		TEST(conversion_during_large_fault),
		TEST(hole_during_populate),
		TEST(fault_during_hole),
		TEST(close_during_populate),
		TEST(close_before_touch),
		TEST(conversion_during_refresh),
		TEST(refresh_during_conversion),
		TEST(conversion_waits_for_holder),
		TEST(close_during_refresh),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
