/* SPDX-License-Identifier: MIT */
/* A program that never opens /dev/kvm notices nothing. */
#include <dirent.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <setjmp.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "t.h"

/* As the kernel has it. */
struct kernel_action {
	void *handler;
	unsigned long flags;
	void *restorer;
	uint64_t mask;
};

static void count(int sig)
{
}

static void actions(void)
{
	struct sigaction sa = {.sa_handler = count, .sa_flags = SA_RESETHAND};
	struct kernel_action k;

	/* The first thing: what the process began with. */
	for (int sig = 1; sig <= 64; sig++) {
		memset(&k, 0, sizeof(k));
		if (syscall(SYS_rt_sigaction, sig, NULL, &k, 8) || sig == SIGPIPE)
			continue;
		CHECK(k.handler == (void *)SIG_DFL || k.handler == (void *)SIG_IGN);
	}
	sigfillset(&sa.sa_mask);
	CHECK(!sigaction(SIGUSR1, &sa, NULL));
	CHECK(!syscall(SYS_rt_sigaction, SIGUSR1, NULL, &k, 8));
	CHECK(k.handler == (void *)count && (k.flags & SA_RESETHAND) && !(k.flags & SA_SIGINFO) &&
	      (k.mask & 1ull << (SIGSEGV - 1)));
	CHECK(signal(SIGSEGV, count) == SIG_DFL);
	CHECK(!syscall(SYS_rt_sigaction, SIGSEGV, NULL, &k, 8) && k.handler == (void *)count);
	CHECK(signal(SIGSEGV, SIG_DFL) == count);
}

static void masks(void)
{
	sigset_t set;
	uint64_t kernel;

	sigfillset(&set);
	CHECK(!pthread_sigmask(SIG_SETMASK, &set, NULL));
	CHECK(!syscall(SYS_rt_sigprocmask, 0, NULL, &kernel, 8));
	CHECK((kernel & 1ull << (SIGSEGV - 1)) && (kernel & 1ull << (SIGBUS - 1)) &&
	      (kernel & 1ull << 63));
	sigemptyset(&set);
	CHECK(!sigprocmask(SIG_SETMASK, &set, NULL));
	CHECK(!syscall(SYS_rt_sigprocmask, 0, NULL, &kernel, 8) && kernel == 0);
}

static int count_entries(const char *dir)
{
	DIR *d = opendir(dir);
	int n = 0;

	if (!CHECK(d))
		return -1;
	while (readdir(d))
		n++;
	closedir(d);
	return n;
}

static void process(void)
{
	/* ".", "..", 0, 1, 2 and the directory itself at most; meson may leave a few open. */
	int fds = count_entries("/proc/self/fd"), again;

	CHECK(count_entries("/proc/self/task") == 3);
	free(malloc(1 << 20));
	CHECK(!close(open("/dev/null", O_RDWR)));
	again = count_entries("/proc/self/fd");
	CHECK(fds == again);
}

static void files(void)
{
	int p[2], fd = memfd_create("x", 0);
	struct iovec v;
	struct stat st;
	char b[8];

	NEED(!pipe(p));
	CHECK(syscall(SYS_write, p[1], "abc", 3) == 3 && syscall(SYS_read, p[0], b, 8) == 3 &&
	      !memcmp(b, "abc", 3));
	v = (struct iovec){"defg", 4};
	CHECK(writev(p[1], &v, 1) == 4 && read(p[0], b, 8) == 4);
	CHECK(!ftruncate(fd, 100) && pwrite(fd, "x", 1, 50) == 1 && pread(fd, b, 1, 50) == 1);
	CHECK(lseek(fd, 0, SEEK_END) == 100 && !fstat(fd, &st) && st.st_size == 100);
	CHECK(fcntl(fd, F_GET_SEALS) == F_SEAL_SEAL);
	CHECK(syscall(SYS_getpid) == getpid());
	errno = 0;
	CHECK(syscall(9999) == -1 && errno == ENOSYS);
	CHECK(syscall(-1) == -1 && errno == ENOSYS);
	FAILS(open("/nonexistent", O_RDONLY), ENOENT);
	FAILS(open((char *)8, O_RDONLY), EFAULT);
	FAILS(stat((char *)8, &st), EFAULT);
	FAILS(access((char *)16, F_OK), EFAULT);
	FAILS(openat(fd, "x", O_RDONLY), ENOTDIR);
	close(p[0]);
	close(p[1]);
	close(fd);
}

/* A filter that forbids getppid() is a filter. */
static int filtered(void)
{
	struct sock_filter f[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EXDEV),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog p = {4, f};

	t_failures = 0;
	CHECK(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	CHECK(!prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &p));
	FAILS(syscall(SYS_getppid), EXDEV);
	CHECK(prctl(PR_GET_SECCOMP) == SECCOMP_MODE_FILTER);
	return t_failures;
}

static jmp_buf env;

static void jump(int n)
{
	longjmp(env, n);
}

static void jumps(void)
{
	volatile int n = 0;
	int r = setjmp(env);

	if (r < 5) {
		n++;
		jump(r + 1);
	}
	CHECK(n == 5);
	if (!_setjmp(env))
		_longjmp(env, 1);
}

static int exits(void)
{
	exit(3);
}

int main(void)
{
	if (t_sanitized())
		return 77;
	actions();
	masks();
	process();
	files();
	jumps();
	CHECK(t_child(filtered) == 0);
	CHECK(t_child(exits) == 3);
	CHECK(vfork() || (_exit(0), 0));
	return t_done();
}
