/* SPDX-License-Identifier: MIT */
/*
 * What the engine does where the kernel says no, is older, or hands out little; and what its signal
 * handlers leave to the program's. Each in a child, whose system calls a filter refuses.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#include "base/hidden_fd.h"
#include "base/racepoint.h"
#include "host/await.h"
#include "host/eventfd.h"
#include "host/guard.h"
#include "host/mapping.h"
#include "host/maps.h"
#include "host/sys.h"
#include "host/thread.h"
#include "host/uffd.h"

#define PG KL_PAGE_SIZE

/* In a child there is no cmocka: the number of the line that is wrong is the status. */
#define CHECK(x)                                                      \
	do {                                                          \
		if (!(x))                                             \
			return __LINE__ & 0x7f ? __LINE__ & 0x7f : 1; \
	} while (0)

static int status_of(int (*fn)(void))
{
	int status;
	pid_t pid = fork();

	if (!pid)
		_exit(fn());
	assert_true(pid > 0);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	return status;
}

static void in_child(int (*fn)(void))
{
	int status = status_of(fn);

	assert_true(WIFEXITED(status));
	assert_int_equal(WEXITSTATUS(status), 0);
}

/* From here on system call @nr fails with @err, if argument @arg (-1: whatever they are) is @value.
 */
static bool deny(long nr, int arg, uint32_t value, int err)
{
	const unsigned at = offsetof(struct seccomp_data, args) + 8 * (unsigned)kl_max(arg, 0);
	struct sock_filter f[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)nr, arg < 0 ? 3 : 0, 2),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, at),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 1, 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (uint32_t)err),
	};
	struct sock_fprog p = {KL_ARRAY_SIZE(f), f};

	return !prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) &&
	       !prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &p);
}

static int lowest_free(void)
{
	int fd = dup(0);

	close(fd);
	return fd;
}

static bool maps_show(const void *p)
{
	uint64_t addr = (uint64_t)(uintptr_t)p;
	struct kl_maps_entry e;
	struct kl_maps m;
	bool found = false;

	if (!kl_maps_open(&m))
		return false;
	while (kl_maps_next(&m, &e))
		found |= e.start <= addr && addr < e.end;
	kl_maps_close(&m);
	return found;
}

/* ---- descriptors and maps ---------------------------------------------------------- */

static int no_proc(void)
{
	struct kl_mapping m;
	uint64_t id = 7;
	int low = lowest_free(), e = eventfd(0, 0);

	CHECK(deny(SYS_openat, 2, O_RDONLY | O_CLOEXEC, EACCES));
	CHECK(!maps_show(&m));
	CHECK(!kl_host_mapping((uint64_t)(uintptr_t)&m, &m));
	/* It may be one; nobody can say which. */
	CHECK(!kl_eventfd_identify(e, &id) && !id);
	CHECK(kl_eventfd_identify(e + 1, &id) == -EBADF);
	CHECK(kl_eventfd_same(e, 0, e, 0));
	close(e);
	CHECK(lowest_free() == low);
	return 0;
}

static int no_high_descriptor(void)
{
	struct kl_mapping m;
	int low = lowest_free();

	CHECK(deny(SYS_fcntl, 1, F_DUPFD_CLOEXEC, EMFILE));
	/* One that is not kept, each time. */
	CHECK(maps_show(&m) && lowest_free() == low);
	CHECK(kl_host_mapping((uint64_t)(uintptr_t)&m, &m) && lowest_free() == low);
	CHECK(m.prot == (PROT_READ | PROT_WRITE));
	CHECK(kl_sys_dup(0) == -EMFILE);
	return 0;
}

static int unknown_file(void)
{
	struct kl_mapping m;
	int low = lowest_free();

	CHECK(deny(SYS_fstat, -1, 0, EACCES));
	CHECK(maps_show(&m) && lowest_free() == low);
	CHECK(kl_fd_next_hidden(0) < 0);
	return 0;
}

/* Few descriptors: engine's own lie among the program's, and are hidden all the same. */
static int few_descriptors(void)
{
	int fd, low = lowest_free();

	CHECK(!setrlimit(RLIMIT_NOFILE, &(struct rlimit){128, 128}));
	fd = kl_sys_dup(0);
	CHECK(fd == low && kl_fd_hidden(fd));
	kl_sys_close(fd);
	fd = kl_sys_memfd("few", PG, 0);
	CHECK(fd == low && kl_fd_hidden(fd));
	kl_sys_close(fd);
	CHECK(!kl_fd_hidden(fd) && lowest_free() == low);
	return 0;
}

static int no_memfd(void)
{
	int low = lowest_free();

	CHECK(deny(SYS_ftruncate, -1, 0, ENOSPC));
	CHECK(kl_sys_memfd("full", PG, 0) == -ENOSPC && lowest_free() == low);
	CHECK(deny(SYS_memfd_create, -1, 0, EMFILE));
	CHECK(kl_sys_memfd("none", PG, 0) == -EMFILE && lowest_free() == low);
	CHECK(deny(SYS_mmap, 1, 3 * PG, ENOMEM));
	CHECK(!kl_sys_map(3 * PG));
	return 0;
}

/* Before Linux 6.11 a mapping is looked up in the list of all. */
static int no_query(void)
{
	void *p = mmap(NULL, 3 * PG, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kl_mapping m = {0};

	CHECK(deny(SYS_ioctl, -1, 0, ENOTTY));
	CHECK(!mprotect((char *)p + PG, PG, PROT_READ | PROT_WRITE));
	for (int i = 0; i < 2; i++) { /* the second time nobody is asked */
		CHECK(kl_host_mapping((uint64_t)(uintptr_t)p + PG + 5, &m));
		CHECK(m.start == (uint64_t)(uintptr_t)p + PG && m.end == m.start + PG);
		CHECK(m.prot == (PROT_READ | PROT_WRITE) && m.page_size == PG);
	}
	munmap((char *)p + PG, PG);
	CHECK(!kl_host_mapping((uint64_t)(uintptr_t)p + PG, &m));
	CHECK(!kl_host_mapping(~0ull - PG, &m));
	return 0;
}

/* A forked child, whose memory is another, asks with a descriptor of its own. */
static int child_of_query(void)
{
	void *p = mmap(NULL, PG, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kl_mapping m;
	int status;
	pid_t pid;

	CHECK(kl_host_mapping((uint64_t)(uintptr_t)p, &m));
	pid = fork();
	if (!pid) {
		munmap(p, PG);
		_exit(kl_host_mapping((uint64_t)(uintptr_t)p, &m) &&
		      m.start <= (uint64_t)(uintptr_t)p);
	}
	CHECK(waitpid(pid, &status, 0) == pid && !status);
	CHECK(kl_host_mapping((uint64_t)(uintptr_t)p, &m));
	return 0;
}

/* U4, U5: the engine gets along without, or says that it cannot; nothing is left behind. */
static void kernel_refuses(void **state)
{
	(void)state;
	in_child(no_proc);
	in_child(no_high_descriptor);
	in_child(unknown_file);
	in_child(few_descriptors);
	in_child(no_memfd);
	in_child(no_query);
	in_child(child_of_query);
}

/* ---- eventfds ---------------------------------------------------------------------- */

static int old_kernel(void)
{
	int e = eventfd(3, 0), other = eventfd(0, 0), same = dup(e);
	uint64_t id, v;

	CHECK(deny(SYS_preadv2, -1, 0, EOPNOTSUPP));
	kl_eventfd_consume(e);
	CHECK(!kl_eventfd_readable(e));
	kl_eventfd_consume(e); /* does not wait for more */
	kl_eventfd_signal(e);
	CHECK(read(e, &v, sizeof(v)) == sizeof(v) && v == 1);
	CHECK(kl_eventfd_identify(0, &id) == -EINVAL || !id);
	/* Where there are no numbers. */
	CHECK(kl_eventfd_same(e, 0, same, 0) && !kl_eventfd_same(e, 0, other, 0));
	CHECK(kl_eventfd_same(e, 5, other, 5) && !kl_eventfd_same(e, 5, e, 6));
	CHECK(!kl_eventfd_same(e, 5, e, 0));
	return 0;
}

/* An eventfd is told from another on kernels that have no numbers for them, and never waited for.
 */
static void eventfds(void **state)
{
	int e = eventfd(0, 0);
	uint64_t v = ~1ull, id, id2;
	int other = eventfd(0, 0), p[2];

	(void)state;
	in_child(old_kernel);
	assert_int_equal(kl_eventfd_identify(e, &id), 0);
	assert_int_equal(kl_eventfd_identify(other, &id2), 0);
	assert_false(kl_eventfd_same(e, id, other, id2));
	assert_int_equal(pipe(p), 0);
	assert_int_equal(kl_eventfd_identify(p[0], &id), -EINVAL);
	/* Full: it stays so. */
	assert_int_equal(write(e, &v, sizeof(v)), sizeof(v));
	kl_eventfd_signal(e);
	assert_true(kl_eventfd_readable(e));
	/* Nobody reads any more: poll says that something happened, and nothing is readable. */
	close(p[1]);
	assert_false(kl_eventfd_readable(p[0]));
	close(p[0]);
	close(e);
	close(other);
}

/* ---- signals ----------------------------------------------------------------------- */

static volatile sig_atomic_t seen, seen_code;
static sigjmp_buf away;

static void plain_handler(int sig)
{
	seen = sig;
	siglongjmp(away, 1);
}

static void info_handler(int sig, siginfo_t *info, void *uc)
{
	(void)uc;
	seen = sig;
	seen_code = info->si_code;
	if (info->si_code > 0)
		siglongjmp(away, 1);
}

static int handlers_before(void)
{
	struct sigaction sa = {.sa_handler = plain_handler};
	volatile char *none = mmap(NULL, PG, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char c;

	sigaction(SIGSEGV, &sa, NULL);
	sa = (struct sigaction){.sa_sigaction = info_handler, .sa_flags = SA_SIGINFO};
	sigaction(SIGBUS, &sa, NULL);
	signal(KL_KICK_SIGNAL, SIG_IGN);
	CHECK(!kl_guard_init());
	/* Ours first. */
	CHECK(kl_copy_from_user(&c, (const void *)none, 1) == -EFAULT && !seen);
	if (!sigsetjmp(away, 1))
		CHECK(*none == 0 && false);
	CHECK(seen == SIGSEGV);
	/* Sent by somebody: no fault, and nobody's access. */
	raise(SIGBUS);
	CHECK(seen == SIGBUS && seen_code <= 0);
	/* The program's own use of the engine's signal, and one that looks like ours. */
	raise(KL_KICK_SIGNAL);
	sigqueue(getpid(), KL_KICK_SIGNAL, (union sigval){.sival_ptr = NULL});
	return 0;
}

static int dies_of_fault(void)
{
	volatile char *none = mmap(NULL, PG, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct rlimit no_core = {0, 0};

	setrlimit(RLIMIT_CORE, &no_core);
	sigaction(SIGSEGV, &(struct sigaction){.sa_handler = SIG_DFL}, NULL);
	if (kl_guard_init())
		return 1;
	return *none + 2;
}

static int dies_of_signal(void)
{
	struct rlimit no_core = {0, 0};

	setrlimit(RLIMIT_CORE, &no_core);
	sigaction(SIGBUS, &(struct sigaction){.sa_handler = SIG_DFL}, NULL);
	if (kl_guard_init())
		return 1;
	kill(getpid(), SIGBUS);
	return 2;
}

static int refuse_sigaction(int sig, const struct sigaction *sa, struct sigaction *old)
{
	(void)sa;
	(void)old;
	errno = EPERM;
	return sig == SIGBUS ? -1 : 0;
}

static int handler_refused(void)
{
	kl_sys_sigaction = refuse_sigaction;
	CHECK(kl_guard_init() == -EPERM);
	CHECK(kl_guard_init() == -EPERM);
	return 0;
}

static void forged(int sig, siginfo_t *info, void *uc)
{
	info->si_code = (int)seen_code;
	if (!kl_guard_signal(sig, info, uc))
		_exit(99);
}

/* A page that the host poisoned, as the kernel would say it. */
static int poisoned(void)
{
	struct sigaction sa = {.sa_sigaction = forged, .sa_flags = SA_SIGINFO | SA_NODEFER};
	int fd = memfd_create("short", 0);
	char c, *p = mmap(NULL, PG, PROT_READ, MAP_SHARED, fd, 0); /* no file there: SIGBUS */

	kl_guard_external_handlers();
	CHECK(!kl_guard_init());
	sigaction(SIGBUS, &sa, NULL);
	seen_code = BUS_MCEERR_AR;
	CHECK(kl_guard_copy(&c, p, 1) == -EHWPOISON);
	seen_code = BUS_MCEERR_AO;
	CHECK(kl_guard_copy(&c, p, 1) == -EHWPOISON);
	seen_code = BUS_ADRERR;
	CHECK(kl_guard_copy(&c, p, 1) == -EFAULT);
	CHECK(!kl_thread_poisoned(0)); /* nobody to tell */
	return 0;
}

/* U3: what is not the engine's goes to whoever was there before, with what that would do. */
static void other_handlers(void **state)
{
	int status;

	(void)state;
	in_child(handlers_before);
	status = status_of(dies_of_fault);
	assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
	status = status_of(dies_of_signal);
	assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
	in_child(handler_refused);
	in_child(poisoned);
}

/* ---- threads ----------------------------------------------------------------------- */

static void *nothing(void *arg)
{
	return arg;
}

static void came(struct kl_await *a)
{
	(void)a;
}

static int no_thread(void)
{
	struct kl_await a = {.done = came};
	pthread_t t;

	CHECK(deny(SYS_clone3, -1, 0, EAGAIN) && deny(SYS_clone, -1, 0, EAGAIN));
	CHECK(kl_thread_create(&t, "none", nothing, NULL) == -EAGAIN);
	kl_await_get();
	CHECK(kl_await_start(&a, kl_hva(&a), false) == -EAGAIN);
	kl_await_put();
	return 0;
}

static void defer(int sig, siginfo_t *info, void *uc)
{
	if (kl_engine_active())
		kl_thread_defer_signal(sig, info, uc);
	else
		seen++;
}

/* What was raised has come: ThreadSanitizer's runtime holds signals back until a call that it
 * knows. */
static bool has_come(int n)
{
	(void)sigaction(SIGUSR1, NULL, NULL);
	return seen == n;
}

/* The kernel's queue of signals is full. */
static int signal_not_queued(void)
{
	struct sigaction sa = {.sa_sigaction = defer, .sa_flags = SA_SIGINFO};

	CHECK(!sigaction(SIGUSR1, &sa, NULL));
	kl_engine_enter();
	raise(SIGUSR1);
	CHECK(!seen);
	kl_engine_leave();
	CHECK(has_come(1));
	CHECK(deny(SYS_rt_tgsigqueueinfo, -1, 0, EAGAIN));
	kl_engine_enter();
	raise(SIGUSR1);
	CHECK(has_come(1));
	kl_engine_leave();
	CHECK(has_come(2));
	return 0;
}

/* U3: what came while the thread was in the engine comes when it leaves, at least without siginfo.
 */
static void deferred_signal(void **state)
{
	(void)state;
	in_child(signal_not_queued);
}

/* A thread that cannot be had is an error, not a hang. */
static void thread_refused(void **state)
{
	(void)state;
	in_child(no_thread);
}

/* ---- userfaultfds ------------------------------------------------------------------ */

static void *add_range(void *arg)
{
	(void)arg;
	kl_uffd_add(64 * PG, 65 * PG);
	return NULL;
}

/*
 * N7: a fork() while another thread is changing the list. The child may not take what is torn for
 * memory that nobody has registered.
 */
static void fork_during_change(void **state)
{
	pthread_t t;
	int status;
	pid_t pid;

	(void)state;
	if (!kl_racepoints_enabled())
		skip();
	kl_uffd_add_features(UFFD_FEATURE_EVENT_FORK);
	kl_uffd_add(10 * PG, 11 * PG);
	kl_racepoint_arm("uffd-range", 1);
	assert_int_equal(pthread_create(&t, NULL, add_range, NULL), 0);
	assert_true(kl_racepoint_wait("uffd-range", 10000));
	pid = fork();
	if (!pid) {
		kl_uffd_after_fork();
		_exit(!kl_uffd_overlaps(10 * PG, 11 * PG) || !kl_uffd_overlaps(64 * PG, 65 * PG) ||
		      !kl_uffd_overlaps(1000 * PG, 1001 * PG));
	}
	kl_racepoint_release("uffd-range");
	pthread_join(t, NULL);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
	assert_true(kl_uffd_overlaps(64 * PG, 65 * PG));
	assert_false(kl_uffd_overlaps(1000 * PG, 1001 * PG));
	assert_true(kl_uffd_remove(0, ~0ull));
	assert_false(kl_uffd_any());
}

static void *add_another(void *arg)
{
	(void)arg;
	kl_uffd_add(70 * PG, 71 * PG);
	return NULL;
}

static void *look(void *arg)
{
	*(bool *)arg = kl_uffd_overlaps(64 * PG, 65 * PG);
	return NULL;
}

static void *find_gap(void *arg)
{
	uint64_t *gap = arg;

	gap[0] = 64 * PG;
	gap[1] = 66 * PG;
	kl_uffd_gap(&gap[0], &gap[1]);
	return NULL;
}

/* N7: who looks in the middle of a change sees what is there after it; two changes do not mix. */
static void looks_during_change(void **state)
{
	uint64_t gap[2] = {0};
	bool hit = false;
	pthread_t t[4];

	(void)state;
	if (!kl_racepoints_enabled())
		skip();
	kl_uffd_add(10 * PG, 11 * PG);
	kl_racepoint_arm("uffd-range", 1);
	assert_int_equal(pthread_create(&t[0], NULL, add_range, NULL), 0);
	assert_true(kl_racepoint_wait("uffd-range", 10000));
	kl_racepoint_arm("uffd-busy", 3);
	assert_int_equal(pthread_create(&t[1], NULL, add_another, NULL), 0);
	assert_int_equal(pthread_create(&t[2], NULL, look, &hit), 0);
	assert_int_equal(pthread_create(&t[3], NULL, find_gap, gap), 0);
	assert_true(kl_racepoint_wait_for("uffd-busy", 3, 10000));
	kl_racepoint_release("uffd-busy");
	kl_racepoint_release("uffd-range");
	for (unsigned i = 0; i < 4; i++)
		pthread_join(t[i], NULL);
	assert_true(hit);
	assert_true(gap[0] == 65 * PG && gap[1] == 66 * PG);
	assert_true(kl_uffd_overlaps(70 * PG, 71 * PG));
	assert_false(kl_uffd_overlaps(66 * PG, 70 * PG));
	assert_true(kl_uffd_remove(0, ~0ull));
}

/* N7: rounding at the ends of the address space, and nothing at all. */
static void odd_ranges(void **state)
{
	uint64_t s = 0, e = ~0ull;

	(void)state;
	kl_uffd_add(5 * PG, 5 * PG);
	assert_false(kl_uffd_any());
	kl_uffd_add(~0ull - PG, ~0ull);
	assert_true(kl_uffd_overlaps(~0ull - PG, ~0ull));
	kl_uffd_add(0, 1);
	assert_true(kl_uffd_overlaps(0, PG));
	assert_false(kl_uffd_overlaps(PG, 2 * PG));
	assert_true(kl_uffd_gap(&s, &e));
	assert_int_equal(s, PG);
	assert_false(kl_uffd_remove(~0ull - 1, ~0ull)); /* no whole page */
	assert_true(kl_uffd_remove(0, PG));
	assert_true(kl_uffd_remove(0, ~0ull));
	assert_false(kl_uffd_any());
}

/* N7: with more ranges than there is room for, those that lie closest become one. */
static void closest_become_one(void **state)
{
	uint64_t at[129];

	(void)state;
	for (unsigned i = 0; i < 128; i++) {
		at[i] = (i ? at[i - 1] : 0) + (i == 77 ? 2 : 10) * PG;
		kl_uffd_add(at[i], at[i] + PG);
	}
	assert_false(kl_uffd_overlaps(at[76] + PG, at[77]));
	at[128] = at[127] + 100 * PG;
	kl_uffd_add(at[128], at[128] + PG);
	for (unsigned i = 0; i < 129; i++)
		assert_true(kl_uffd_overlaps(at[i], at[i] + PG));
	assert_true(kl_uffd_overlaps(at[76] + PG, at[77])); /* the gap of one page */
	assert_false(kl_uffd_overlaps(at[75] + PG, at[76]));
	assert_false(kl_uffd_overlaps(at[77] + PG, at[78]));
	assert_true(kl_uffd_remove(0, ~0ull));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(kernel_refuses),     cmocka_unit_test(eventfds),
		cmocka_unit_test(other_handlers),     cmocka_unit_test(thread_refused),
		cmocka_unit_test(deferred_signal),    cmocka_unit_test(looks_during_change),
		cmocka_unit_test(odd_ranges),         cmocka_unit_test(closest_become_one),
		cmocka_unit_test(fork_during_change),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
