/* SPDX-License-Identifier: MIT */
/*
 * The program's registrations with userfaultfd, against a shadow of one bit a page; and brackets
 * from userfaultfd events, for changes of memory that nobody announces (N1).
 */
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include <kvmlet/kvmlet.h>

#include "base/hidden_fd.h"
#include "host/uffd.h"
#include "mem/uffd_source.h"
#include "mmu_env.h"

/* ---- the registry -----------------------------------------------------------------------------
 */

#define SPAN 4096u

static bool shadow[SPAN];

static uint64_t page(unsigned i)
{
	return 0x10000000ul + i * PG;
}

static bool shadow_any(unsigned from, unsigned to)
{
	for (unsigned i = from; i < to; i++)
		if (shadow[i])
			return true;
	return false;
}

static unsigned rnd(unsigned *seed, unsigned n)
{
	*seed = *seed * 1103515245u + 12345u;
	return (*seed >> 16) % n;
}

/* M1: what is registered is reported; while the ranges fit, nothing else is. */
static void registry_exact(void **state)
{
	unsigned seed = 1;

	for (int step = 0; step < 20000; step++) {
		unsigned a = rnd(&seed, SPAN / 32) * 32, b = a + 1 + rnd(&seed, 64);

		if (b > SPAN)
			continue;
		switch (rnd(&seed, 3)) {
		case 0:
			kl_uffd_add(page(a), page(b));
			memset(shadow + a, 1, b - a);
			break;
		case 1:
			assert_int_equal(kl_uffd_remove(page(a), page(b)), shadow_any(a, b));
			memset(shadow + a, 0, b - a);
			break;
		default:
			assert_int_equal(kl_uffd_overlaps(page(a), page(b)), shadow_any(a, b));
			break;
		}
	}
	assert_true(kl_uffd_remove(page(0), page(SPAN)));
	assert_false(kl_uffd_any());
	memset(shadow, 0, sizeof(shadow));
}

/* M1: with more ranges than fit the answer errs, and only towards "registered". */
static void registry_full(void **state)
{
	for (unsigned i = 0; i < SPAN; i += 2)
		kl_uffd_add(page(i), page(i + 1));
	for (unsigned i = 0; i < SPAN; i += 2)
		assert_true(kl_uffd_overlaps(page(i), page(i) + 1));
	for (unsigned i = 0; i < SPAN; i += 4)
		kl_uffd_remove(page(i), page(i + 1));
	for (unsigned i = 2; i < SPAN; i += 4)
		assert_true(kl_uffd_overlaps(page(i), page(i + 1)));
	assert_true(kl_uffd_remove(0, ~0ul));
	assert_false(kl_uffd_any());
	/* Outwards when it comes, inwards when it goes. */
	kl_uffd_add(page(3) + 1, page(3) + 2);
	assert_true(kl_uffd_overlaps(page(3), page(3) + 1));
	assert_false(kl_uffd_remove(page(3) + 1, page(4)));
	assert_true(kl_uffd_remove(page(3), page(4)));
	assert_false(kl_uffd_overlaps(0, ~0ul));
}

static void gaps(void **state)
{
	uint64_t s = page(0), e = page(10);

	assert_true(kl_uffd_gap(&s, &e) && s == page(0) && e == page(10));
	kl_uffd_add(page(0), page(2));
	kl_uffd_add(page(4), page(6));
	assert_true(kl_uffd_gap(&s, &e) && s == page(2) && e == page(4));
	s = e, e = page(10);
	assert_true(kl_uffd_gap(&s, &e) && s == page(6) && e == page(10));
	s = e;
	assert_false(kl_uffd_gap(&s, &e));
	kl_uffd_remove(page(0), page(10));
}

static void *toggle(void *arg)
{
	for (int i = 0; i < 20000; i++) {
		kl_uffd_add(page(100), page(200));
		kl_uffd_remove(page(100), page(200));
	}
	*(_Atomic bool *)arg = true;
	return NULL;
}

/* M1: a range that stays is reported at every moment of changes beside it. */
static void registry_readers(void **state)
{
	_Atomic bool done = false;
	pthread_t t;

	kl_uffd_add(page(50), page(60));
	kl_uffd_add(page(300), page(310));
	pthread_create(&t, NULL, toggle, (void *)&done);
	while (!done) {
		assert_true(kl_uffd_overlaps(page(55), page(56)));
		assert_true(kl_uffd_overlaps(page(305), page(306)));
		assert_false(kl_uffd_overlaps(page(60), page(61)));
	}
	pthread_join(t, NULL);
	kl_uffd_remove(page(0), page(SPAN));
}

/* ---- the source ---------------------------------------------------------------------------------
 */

static int source_teardown(void **state)
{
	kvmlet_notifier_uffd_source(0);
	return teardown(state);
}

/* Some systems have no userfaultfd, or not for this user. */
#define NEED_SOURCE                                      \
	do {                                             \
		int r_ = kvmlet_notifier_uffd_source(1); \
		if (r_ == -EPERM || r_ == -ENOSYS)       \
			skip();                          \
		assert_int_equal(r_, 0);                 \
	} while (0)

static void use(struct fixture *f, uint64_t gpa)
{
	/* While an event is being handled, a fault maps nothing. */
	do
		assert_int_equal(kl_mmu_fault(&f->vcpu, gpa, KL_ACC_WRITE), KL_FAULT_MAPPED);
	while (!mapped(f, gpa, KL_ACC_WRITE));
}

/* The test's own time limit ends it. */
static void wait_unmapped(struct fixture *f, uint64_t gpa)
{
	while (mapped(f, gpa, KL_ACC_READ))
		sched_yield();
}

static long unmap_raw(void *p, size_t len)
{
	return kl_sys(SYS_munmap, p, len);
}

static void *map_raw(void *at, int flags, int fd)
{
	return (void *)kl_sys(SYS_mmap, at, PG, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0);
}

static int program_uffd(void)
{
	struct uffdio_api api = {.api = UFFD_API};
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);

	assert_true(fd >= 0);
	assert_int_equal(ioctl(fd, UFFDIO_API, &api), 0);
	return fd;
}

static int program_register(int fd, void *p, size_t len)
{
	struct uffdio_register r = {.range = {(uint64_t)p, len},
				    .mode = UFFDIO_REGISTER_MODE_MISSING};

	return ioctl(fd, UFFDIO_REGISTER, &r) ? -errno : 0;
}

/* N1: unmapped by nobody's leave; what is mapped in its place is watched again. */
static void event_unmap(void **state)
{
	struct fixture *f = *state;

	NEED_SOURCE;
	for (int i = 0; i < 3; i++) {
		use(f, PG);
		use(f, 2 * PG);
		map_raw(f->ram + PG, MAP_PRIVATE | MAP_ANONYMOUS, -1);
		wait_unmapped(f, PG);
		assert_true(mapped(f, 2 * PG, KL_ACC_READ));
	}
	use(f, PG);
	unmap_raw(f->ram + PG, PG);
	wait_unmapped(f, PG);
	assert_int_equal(kl_mmu_fault(&f->vcpu, PG, KL_ACC_READ), -EFAULT);
	map_raw(f->ram + PG, MAP_PRIVATE | MAP_ANONYMOUS, -1);
}

/* N1: a slot's memory is watched from before anybody can use it. */
static void watched_from_the_first(void **state)
{
	struct fixture *f = *state;
	uint8_t *p = mmap(NULL, PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct slot_change c = {.f = f, .gpa = 0x100000, .size = PG};
	uint8_t *ram = f->ram;
	pthread_t t;

	NEED_SOURCE;
	NEED_RACEPOINTS;
	f->ram = p; /* what change_slot_1() takes */
	kl_racepoint_arm("memslot-set", 1);
	assert_int_equal(pthread_create(&t, NULL, change_slot_1, &c), 0);
	assert_true(kl_racepoint_wait("memslot-set", TIMEOUT));
	f->ram = ram;
	use(f, 0x100000);
	unmap_raw(p, PG);
	for (unsigned i = 0; i < 20000 && mapped(f, 0x100000, KL_ACC_READ); i++)
		sched_yield();
	assert_false(mapped(f, 0x100000, KL_ACC_READ));
	kl_racepoint_release("memslot-set");
	pthread_join(t, NULL);
	assert_int_equal(c.r, 0);
}

/* N1: moved away; and over another page of the slot. */
static void event_remap(void **state)
{
	struct fixture *f = *state;
	uint8_t *away = mmap(NULL, PG, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int fd;

	NEED_SOURCE;
	use(f, 0);
	assert_int_equal(kl_sys(SYS_mremap, f->ram, PG, PG, MREMAP_MAYMOVE | MREMAP_FIXED, away),
			 (long)away);
	wait_unmapped(f, 0);
	use(f, 3 * PG);
	use(f, 4 * PG);
	kl_sys(SYS_mremap, f->ram + 3 * PG, PG, PG, MREMAP_MAYMOVE | MREMAP_FIXED, f->ram + 4 * PG);
	wait_unmapped(f, 3 * PG);
	wait_unmapped(f, 4 * PG);
	/* Where it went no slot is: somebody else may register it. */
	fd = program_uffd();
	while (program_register(fd, away, PG))
		sched_yield();
	close(fd);
	munmap(away, PG);
	map_raw(f->ram, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	map_raw(f->ram + 3 * PG, MAP_PRIVATE | MAP_ANONYMOUS, -1);
}

/* N1: discarded, anonymous memory and shared memory. */
static void event_remove(void **state)
{
	struct fixture *f = *state;
	int fd = memfd_create("x", 0);

	NEED_SOURCE;
	use(f, PG);
	kl_sys(SYS_madvise, f->ram + PG, PG, MADV_DONTNEED);
	wait_unmapped(f, PG);
	assert_int_equal(ftruncate(fd, PG), 0);
	map_raw(f->ram + 5 * PG, MAP_SHARED, fd);
	wait_unmapped(f, 5 * PG);
	/* It is watched once the slot is looked at again. */
	assert_int_equal(set(&f->vm, 1, 0, 0x100000, PG, f->ram + 5 * PG), 0);
	use(f, 0x100000);
	kl_sys(SYS_madvise, f->ram + 5 * PG, PG, MADV_REMOVE);
	wait_unmapped(f, 0x100000);
	close(fd);
}

/* N1, U5: fork() comes through; the child can have a source of its own. */
static void event_fork(void **state)
{
	struct fixture *f = *state;
	struct kl_vm *vm = calloc(1, sizeof(*vm));
	int st;
	pid_t pid;

	NEED_SOURCE;
	use(f, PG);
	/* ThreadSanitizer does not let the child start a thread. */
	if (KL_TSAN) {
		free(vm);
		skip();
	}
	pid = fork();
	if (!pid) {
		struct fixture c = {.ram = f->ram};

		kl_vms_after_fork();
		if (kl_vm_init(&c.vm) || kl_vcpu_core_add(&c.vm, &c.vcpu, 0) ||
		    set(&c.vm, 0, 0, 0, NPAGES * PG, c.ram) ||
		    kl_mmu_fault(&c.vcpu, PG, KL_ACC_WRITE) != KL_FAULT_MAPPED)
			_exit(1);
		unmap_raw(c.ram + PG, PG);
		wait_unmapped(&c, PG);
		_exit(0);
	}
	assert_int_equal(waitpid(pid, &st, 0), pid);
	assert_int_equal(st, 0);
	/* The parent's page is still there, and still watched. */
	use(f, PG);
	unmap_raw(f->ram + PG, PG);
	wait_unmapped(f, PG);
	free(vm);
}

/* N1: what the program registers itself is left to it; what no slot needs is let go. */
static void leaves_others_alone(void **state)
{
	struct fixture *f = *state;
	int fd;

	NEED_SOURCE;
	fd = program_uffd();
	assert_int_equal(program_register(fd, f->ram, PG), -EBUSY);
	kl_uffd_source_yield((uint64_t)f->ram, (uint64_t)f->ram + PG);
	assert_int_equal(program_register(fd, f->ram, PG), 0);
	kl_uffd_add((uint64_t)f->ram, (uint64_t)f->ram + PG);
	/* The rest of the slot is watched though it is not all ours. */
	kl_uffd_source_rewatch(0, ~0ul);
	use(f, PG);
	kl_sys(SYS_madvise, f->ram + PG, PG, MADV_DONTNEED);
	wait_unmapped(f, PG);
	/* A slot goes; another one lies over half of its memory. */
	assert_int_equal(set(&f->vm, 1, 0, 0x100000, 8 * PG, f->ram), 0);
	assert_int_equal(set(&f->vm, 0, 0, 0, 0, NULL), 0);
	assert_int_equal(program_register(fd, f->ram + 4 * PG, PG), -EBUSY);
	assert_int_equal(program_register(fd, f->ram + 8 * PG, PG), 0);
	/* The program's registration of the first page has survived all that. */
	assert_int_equal(program_register(program_uffd(), f->ram, PG), -EBUSY);
	assert_int_equal(set(&f->vm, 1, 0, 0, 0, NULL), 0);
	assert_int_equal(program_register(fd, f->ram + 4 * PG, PG), 0);
	kl_uffd_remove(0, ~0ul);
	close(fd);
}

static unsigned nr_hidden(void)
{
	unsigned n = 0;

	for (int fd = -1; (fd = kl_fd_next_hidden((unsigned)fd + 1)) >= 0;)
		n++;
	return n;
}

/* A VM's death, and the end of the source, leave nothing registered and nobody asleep. */
static void stops(void **state)
{
	unsigned hidden;
	struct fixture *f = *state;
	struct kl_vm *vm = calloc(1, sizeof(*vm));
	uint8_t *p = mmap(NULL, PG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kl_notifier_range r = range_of(f->ram, PG);
	int fd;

	NEED_SOURCE;
	/* Its descriptors go with it. */
	assert_int_equal(kvmlet_notifier_uffd_source(0), 0);
	hidden = nr_hidden();
	assert_int_equal(kvmlet_notifier_uffd_source(1), 0);
	assert_int_equal(nr_hidden(), hidden + 2);
	assert_int_equal(kvmlet_notifier_uffd_source(0), 0);
	assert_int_equal(nr_hidden(), hidden);
	assert_int_equal(kvmlet_notifier_uffd_source(1), 0);
	fd = program_uffd();
	assert_int_equal(kl_vm_init(vm), 0);
	assert_int_equal(set(vm, 0, 0, 0, PG, p), 0);
	assert_int_equal(program_register(fd, p, PG), -EBUSY);
	kl_vm_destroy(vm);
	assert_int_equal(program_register(fd, p, PG), 0);
	for (int i = 0; i < 20; i++) {
		assert_int_equal(kvmlet_notifier_uffd_source(0), 0);
		assert_int_equal(kvmlet_notifier_uffd_source(0), 0);
		unmap_raw(f->ram + PG, PG);
		map_raw(f->ram + PG, MAP_PRIVATE | MAP_ANONYMOUS, -1);
		assert_int_equal(kvmlet_notifier_uffd_source(1), 0);
		assert_int_equal(kvmlet_notifier_uffd_source(1), 0);
		use(f, PG);
		unmap_raw(f->ram + PG, PG);
		wait_unmapped(f, PG);
		map_raw(f->ram + PG, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	}
	assert_int_equal(kl_notifier_begin(&r), 0);
	assert_int_equal(kvmlet_notifier_uffd_source(1), -EDEADLK);
	kl_notifier_end(&r);
	close(fd);
	munmap(p, PG);
	free(vm);
}

/* N1, U4: in a program without standard input, too, the engine's descriptors are out of its way. */
static void without_standard_input(void **state)
{
	struct fixture *f = *state;
	int saved = fcntl(0, F_DUPFD_CLOEXEC, 3), mine;

	NEED_SOURCE;
	assert_int_equal(kvmlet_notifier_uffd_source(0), 0);
	close(0);
	assert_int_equal(kvmlet_notifier_uffd_source(1), 0);
	mine = open("/dev/null", O_RDONLY | O_CLOEXEC);
	assert_int_equal(mine, 0);
	use(f, PG);
	unmap_raw(f->ram + PG, PG);
	wait_unmapped(f, PG);
	map_raw(f->ram + PG, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	if (saved >= 0) {
		dup2(saved, 0);
		close(saved);
	}
}

/* No hole is left, where a thread that is just being made could get its memory. */
static void *replace_bracketed(void *arg)
{
	struct fixture *f = arg;
	struct kl_notifier_range r = range_of(f->ram + PG, PG);

	assert_int_equal(kl_notifier_begin(&r), 0);
	/* Sleeps until the helper has read the event. */
	map_raw(f->ram + PG, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	kl_notifier_end(&r);
	return NULL;
}

static void *delete_slot(void *arg)
{
	struct fixture *f = arg;

	assert_int_equal(set(&f->vm, 0, 0, 0, 0, NULL), 0);
	assert_int_equal(set(&f->vm, 0, 0, 0, NPAGES * PG, f->ram), 0);
	return NULL;
}

/* N1, S7: the helper never queues behind an update that waits for whom the helper must wake. */
static void no_deadlock_with_updates(void **state)
{
	struct fixture *f = *state;

	NEED_SOURCE;
	for (int i = 0; i < 300; i++) {
		pthread_t t[3];

		use(f, PG);
		pthread_create(&t[0], NULL, replace_bracketed, f);
		pthread_create(&t[1], NULL, delete_slot, f);
		map_raw(f->ram + 2 * PG, MAP_PRIVATE | MAP_ANONYMOUS, -1);
		pthread_create(&t[2], NULL, replace_bracketed, f);
		for (int j = 0; j < 3; j++)
			pthread_join(t[j], NULL);
		kl_uffd_source_rewatch(0, ~0ul);
	}
}

#define T(fn) cmocka_unit_test_setup_teardown(fn, setup, source_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(registry_exact),
		cmocka_unit_test(registry_full),
		cmocka_unit_test(gaps),
		cmocka_unit_test(registry_readers),
		T(event_unmap),
		T(event_remap),
		T(watched_from_the_first),
		T(event_remove),
		T(event_fork),
		T(leaves_others_alone),
		T(stops),
		T(without_standard_input),
		T(no_deadlock_with_updates),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
