/* SPDX-License-Identifier: MIT */
/* Descriptors: what each call answers, how long objects live, who inherits them (U4, U5). */
#include <dirent.h>
#include <poll.h>
#include <spawn.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "t.h"

enum kind { SYSTEM, VM, VCPU, STATS };

#define FAILS_K(call, err)                                    \
	do {                                                  \
		if (!FAILS(call, err))                        \
			fprintf(stderr, "  kind %d\n", kind); \
	} while (0)

/* read and write and their relatives. */
static void io(int fd, enum kind kind)
{
	int at = kind == VM || kind == VCPU ? ESPIPE : EINVAL, p[2], file;
	char b[64];
	struct iovec v = {b, sizeof(b)};
	off_t o = 0;

	NEED(!pipe(p));
	file = memfd_create("x", 0);
	NEED(!ftruncate(file, T_PAGE));
	if (kind == STATS) {
		CHECK(read(fd, b, 16) == 16 && pread(fd, b, 16, 0) == 16);
		CHECK(readv(fd, &v, 1) == 64 && preadv(fd, &v, 1, 0) == 64);
		CHECK(preadv2(fd, &v, 1, 0, 0) == 64 && pread(fd, b, 1, 1ll << 40) == 0);
		CHECK(syscall(SYS_pread64, fd, b, 16, 0) == 16);
		CHECK(read(fd, b, 0) == 0);
		FAILS_K(pread(fd, (void *)8, 16, 0), EFAULT);
		FAILS_K(readv(fd, (void *)8, 1), EFAULT);
		FAILS_K(readv(fd, &v, -1), EINVAL);
		FAILS_K(write(fd, b, 1), EBADF);
		FAILS_K(writev(fd, &v, 1), EBADF);
		FAILS_K(pwrite(fd, b, 1, 0), ESPIPE);
		FAILS_K(pwritev(fd, &v, 1, 0), ESPIPE);
		FAILS_K(pwritev2(fd, &v, 1, -1, 0), EBADF);
		FAILS_K(sendfile(fd, file, NULL, 8), EBADF);
		FAILS_K(fallocate(fd, 0, 0, T_PAGE), EBADF);
		CHECK(posix_fallocate(fd, 0, T_PAGE) == EBADF);
		o = lseek(fd, 0, SEEK_CUR);
		CHECK(lseek(fd, 0, SEEK_SET) == o && lseek(fd, 8, SEEK_END) == o);
	} else {
		FAILS_K(read(fd, b, 64), EINVAL);
		FAILS_K(read(fd, (void *)8, 64), EINVAL);
		FAILS_K(read(fd, b, 0), EINVAL);
		FAILS_K(write(fd, b, 64), EINVAL);
		FAILS_K(readv(fd, &v, 1), EINVAL);
		FAILS_K(writev(fd, &v, 1), EINVAL);
		FAILS_K(pread(fd, b, 64, 0), at);
		FAILS_K(pread64(fd, b, 64, 0), at);
		FAILS_K(pwrite(fd, b, 64, 0), at);
		FAILS_K(pwrite64(fd, b, 64, 0), at);
		FAILS_K(preadv(fd, &v, 1, 0), at);
		FAILS_K(pwritev(fd, &v, 1, 0), at);
		FAILS_K(preadv2(fd, &v, 1, -1, 0), EINVAL);
		FAILS_K(pwritev2(fd, &v, 1, -1, 0), EINVAL);
		FAILS_K(syscall(SYS_read, fd, b, 64), EINVAL);
		FAILS_K(syscall(SYS_write, fd, b, 64), EINVAL);
		FAILS_K(syscall(SYS_pread64, fd, b, 64, 0), at);
		FAILS_K(syscall(SYS_readv, fd, &v, 1), EINVAL);
		FAILS_K(sendfile(fd, file, NULL, 8), EINVAL);
		FAILS_K(sendfile(p[1], fd, &o, 8), at);
		FAILS_K(fallocate(fd, 0, 0, T_PAGE), ENODEV);
		CHECK(posix_fallocate(fd, 0, T_PAGE) == ENODEV);
		CHECK(lseek(fd, 0, SEEK_SET) == 0 && lseek(fd, 9, SEEK_END) == 0);
		CHECK(syscall(SYS_lseek, fd, 9, SEEK_CUR) == 0);
	}
	FAILS_K(lseek(fd, 0, 99), EINVAL);
	FAILS_K(pread(fd, b, 1, -1), EINVAL);
	FAILS_K(sendfile(p[1], fd, NULL, 8), EINVAL);
	FAILS_K(splice(fd, NULL, p[1], NULL, 8, 0), EINVAL);
	CHECK(write(p[1], "hi", 2) == 2);
	FAILS_K(splice(p[0], NULL, fd, NULL, 2, 0), kind == STATS ? EBADF : EINVAL);
	FAILS_K(copy_file_range(fd, NULL, file, NULL, 8, 0), EINVAL);
	FAILS_K(copy_file_range(file, NULL, fd, NULL, 8, 0), EINVAL);
	FAILS_K(tee(fd, p[1], 8, 0), EINVAL);
	FAILS_K(ftruncate(fd, 0), EINVAL);
	FAILS_K(ftruncate(fd, -1), EINVAL);
	FAILS_K(fsync(fd), EINVAL);
	FAILS_K(fdatasync(fd), EINVAL);
	close(p[0]);
	close(p[1]);
	close(file);
}

static void other_calls(int fd, enum kind kind)
{
	int ep = epoll_create1(0), one = 1;
	struct epoll_event ev = {.events = EPOLLIN};
	struct pollfd pf = {fd, POLLIN | POLLOUT | POLLPRI, 0};
	int bad = kind == SYSTEM || kind == VCPU ? EINVAL : ENOTTY;
	void *p;

	CHECK(poll(&pf, 1, 0) == 1 && pf.revents == (POLLIN | POLLOUT));
	FAILS_K(epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev), EPERM);
	CHECK(!ioctl(fd, FIONBIO, &one));
	CHECK(!ioctl(fd, FIOCLEX, 0) && fcntl(fd, F_GETFD) == FD_CLOEXEC);
	CHECK(!ioctl(fd, FIONCLEX, 0) && fcntl(fd, F_GETFD) == 0);
	FAILS_K(ioctl(fd, 0x5401, &one), bad); /* TCGETS */
	FAILS_K(ioctl(fd, 0xaeff, 0), bad);
	FAILS_K(ioctl(fd, 0, 0), bad);
	FAILS_K(ioctl(fd, ~0ul, 0), bad);
	FAILS_K(fcntl(fd, F_GET_SEALS), EINVAL);
	FAILS_K(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE), kind == STATS ? EPERM : EINVAL);
	CHECK(!isatty(fd));
	FAILS_K(recv(fd, &one, 1, 0), ENOTSOCK);
	p = mmap(NULL, T_PAGE, PROT_READ, MAP_SHARED, fd, 0);
	if (kind == VCPU) {
		CHECK(p != MAP_FAILED && !munmap(p, T_PAGE));
		FAILS_K(mmap(NULL, T_PAGE, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0), EPERM);
		p = mmap(NULL, T_PAGE, PROT_READ, MAP_PRIVATE, fd, 0);
		CHECK(p != MAP_FAILED && !munmap(p, T_PAGE));
	} else {
		CHECK(p == MAP_FAILED && errno == ENODEV);
		CHECK(mmap64(NULL, T_PAGE, PROT_READ, MAP_PRIVATE, fd, 0) == MAP_FAILED &&
		      errno == ENODEV);
	}
	close(ep);
}

static int api(int fd)
{
	return ioctl(fd, KVM_GET_API_VERSION, 0);
}

static void duplicates(void)
{
	int a = open("/dev/kvm", O_RDWR), b, c;

	b = dup(a);
	CHECK(b >= 0 && api(b) == 12);
	CHECK(!close(a) && api(b) == 12);
	FAILS(api(a), EBADF);
	CHECK(dup2(b, 200) == 200 && api(200) == 12);
	CHECK(dup2(b, b) == b && api(b) == 12);
	FAILS(dup2(b, -1), EBADF);
	FAILS(dup2(199, 200), EBADF);
	CHECK(api(200) == 12);
	CHECK(dup3(b, 201, O_CLOEXEC) == 201 && fcntl(201, F_GETFD) == FD_CLOEXEC &&
	      api(201) == 12);
	FAILS(dup3(b, b, 0), EINVAL);
	c = fcntl(b, F_DUPFD, 300);
	CHECK(c == 300 && api(c) == 12 && !fcntl(c, F_GETFD));
	c = fcntl64(b, F_DUPFD_CLOEXEC, 300);
	CHECK(c == 301 && api(c) == 12 && fcntl(c, F_GETFD) == FD_CLOEXEC);
	c = (int)syscall(SYS_dup, b);
	CHECK(c >= 0 && api(c) == 12 && !syscall(SYS_close, c));
	FAILS(api(c), EBADF);
	CHECK(syscall(SYS_dup2, b, 202) == 202 && api(202) == 12);
	CHECK(syscall(SYS_dup3, b, 203, 0) == 203 && api(203) == 12);
	CHECK(syscall(SYS_fcntl, b, F_DUPFD, 310) == 310 && api(310) == 12);
	/* Something else takes the number. */
	c = open("/dev/null", O_RDWR);
	CHECK(dup2(c, 200) == 200);
	FAILS(api(200), ENOTTY);
	CHECK(write(200, "x", 1) == 1);
	CHECK(dup2(b, c) == c && api(c) == 12);
	close(200);
	CHECK(!close_range(201, 203, 0));
	FAILS(api(201), EBADF);
	FAILS(api(203), EBADF);
	CHECK(api(300) == 12);
	CHECK(!close_range(300, 310, CLOSE_RANGE_CLOEXEC) && fcntl(300, F_GETFD) == FD_CLOEXEC &&
	      api(300) == 12);
	CHECK(!syscall(SYS_close_range, 300, 310, 0));
	FAILS(api(300), EBADF);
	FAILS(close_range(5, 4, 0), EINVAL);
	CHECK(!close(b) && !close(c));
	FAILS(close(b), EBADF);
	FAILS(close(-1), EBADF);
}

/* The VM lives for as long as anything refers to it. */
static void close_order(void)
{
	struct vm v;
	int st;

	T_VM(&v, code_out);
	st = ioctl(v.vm, KVM_GET_STATS_FD, 0);
	close(v.kvm);
	close(v.vm);
	FAILS(ioctl(v.vm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY), EBADF);
	CHECK(t_out(&v) == 0);
	if (st >= 0) {
		char b[24];

		close(v.vcpu);
		CHECK(pread(st, b, sizeof(b), 0) == sizeof(b));
		close(st);
	} else {
		close(v.vcpu);
	}
	/* The mapping outlives the descriptor. */
	CHECK(v.run->exit_reason == KVM_EXIT_IO);
	munmap(v.run, v.run_size);
	FAILS(t_run(&v), EBADF);
	munmap(v.code, T_PAGE);
}

static void wrong_kinds(void)
{
	struct vm v;
	int null = open("/dev/null", O_RDWR);

	T_VM(&v, code_out);
	FAILS(ioctl(v.kvm, KVM_RUN, 0), EINVAL);
	FAILS(ioctl(v.vm, KVM_RUN, 0), ENOTTY);
	FAILS(ioctl(v.vm, KVM_CREATE_VM, 0), ENOTTY);
	FAILS(ioctl(v.vcpu, KVM_CREATE_VCPU, 1), EINVAL);
	FAILS(ioctl(v.kvm, KVM_CREATE_VCPU, 1), EINVAL);
	FAILS(ioctl(v.vcpu, KVM_GET_API_VERSION, 0), EINVAL);
	FAILS(ioctl(null, KVM_RUN, 0), ENOTTY);
	FAILS(ioctl(-1, KVM_RUN, 0), EBADF);
	FAILS(ioctl(1 << 29, KVM_RUN, 0), EBADF);
	close(null);
	t_free(&v);
}

static int system_fd, vm_fd, vcpu_fd;

static int in_child(void)
{
	struct kvm_regs regs;
	int vm;

	t_failures = 0;
	CHECK(api(system_fd) == 12);
	vm = ioctl(system_fd, KVM_CREATE_VM, 0);
	CHECK(vm >= 0 && ioctl(vm, KVM_CREATE_VCPU, 0) >= 0);
	FAILS(ioctl(vm_fd, KVM_CREATE_VCPU, 1), EIO);
	FAILS(ioctl(vcpu_fd, KVM_RUN, 0), EIO);
	FAILS(ioctl(vcpu_fd, KVM_GET_REGS, &regs), EIO);
	CHECK(!close(vm_fd) && !close(vcpu_fd));
	return t_failures;
}

static int grandchild(void)
{
	return t_child(in_child);
}

static int raw_fork(void)
{
	long pid = syscall(SYS_fork);
	int st;

	if (!pid)
		_exit(in_child());
	if (waitpid((pid_t)pid, &st, 0) != pid)
		return 99;
	return WEXITSTATUS(st);
}

static int bare_fork(void)
{
	pid_t pid = _Fork();
	int st;

	if (!pid)
		_exit(in_child());
	if (waitpid(pid, &st, 0) != pid)
		return 99;
	return WEXITSTATUS(st);
}

static int clone_fn(void *arg)
{
	return in_child();
}

static int cloned(void)
{
	static char stack[1 << 16] __attribute__((aligned(16)));
	pid_t pid = clone(clone_fn, stack + sizeof(stack), SIGCHLD, NULL);
	int st;

	if (pid < 0 || waitpid(pid, &st, 0) != pid)
		return 99;
	return WEXITSTATUS(st);
}

static void forks(void)
{
	struct vm v;

	T_VM(&v, code_out);
	system_fd = v.kvm;
	vm_fd = v.vm;
	vcpu_fd = v.vcpu;
	CHECK(t_child(in_child) == 0);
	CHECK(t_child(grandchild) == 0);
	CHECK(raw_fork() == 0);
	CHECK(bare_fork() == 0);
	CHECK(cloned() == 0);
	/* The parent's are as they were. */
	CHECK(t_out(&v) == 0);
	t_free(&v);
}

static volatile int signals;

static void on_signal(int sig)
{
	signals++;
}

/* A new program starts with the mask that the child asked for. */
static int exit0(void)
{
	sigset_t set;

	sigprocmask(SIG_SETMASK, NULL, &set);
	return sigismember(&set, SIGSEGV) || sigismember(&set, SIGBUS) ||
	       sigismember(&set, SIGRTMAX - 1);
}

/* vfork: the child closes everything, as programs do before exec. */
static void vforks(const char *self)
{
	struct sigaction sa;
	sigset_t set, old;
	struct vm v;
	pid_t pid;
	int st;

	T_VM(&v, code_out);
	signal(SIGUSR1, on_signal);
	sigfillset(&set);
	pthread_sigmask(SIG_SETMASK, &set, &old);
	pid = vfork();
	if (!pid) {
		close(v.vcpu);
		close(v.vm);
		dup2(2, v.kvm);
		close_range(3, ~0u, 0);
		/* Resets what the parent keeps, as subprocess modules do. */
		signal(SIGUSR1, SIG_DFL);
		sigemptyset(&set);
		sigprocmask(SIG_SETMASK, &set, NULL);
		execl(self, self, "exit0", NULL);
		_exit(99);
	}
	CHECK(pid > 0 && waitpid(pid, &st, 0) == pid && st == 0);
	pthread_sigmask(SIG_SETMASK, &old, &set);
	CHECK(sigismember(&set, SIGSEGV) == 1 && sigismember(&set, SIGUSR2) == 1);
	CHECK(!sigaction(SIGUSR1, NULL, &sa) && sa.sa_handler == on_signal);
	raise(SIGUSR1);
	CHECK(signals == 1);
	CHECK(api(v.kvm) == 12);
	CHECK(t_out(&v) == 0);
	t_free(&v);
}

static int spawn(const char *self, char *const argv[])
{
	extern char **environ;
	pid_t pid;
	int st;

	if (posix_spawn(&pid, self, NULL, NULL, argv, environ) || waitpid(pid, &st, 0) != pid)
		return -1;
	return WEXITSTATUS(st);
}

static void execs(const char *self)
{
	char keep[16], gone[16];
	char *const argv[] = {(char *)self, "inherit", keep, gone, NULL};
	int a = open("/dev/kvm", O_RDWR), b = open("/dev/kvm", O_RDWR | O_CLOEXEC), st;
	pid_t pid;

	snprintf(keep, sizeof(keep), "%d", a);
	snprintf(gone, sizeof(gone), "%d", b);
	CHECK(spawn(self, argv) == 0);
	pid = fork();
	if (!pid) {
		execv(self, argv);
		_exit(99);
	}
	CHECK(waitpid(pid, &st, 0) == pid && st == 0);
	close(a);
	close(b);
}

/* After exec: the descriptor without close-on-exec is a /dev/kvm still. */
static int inherit(int keep, int gone)
{
	int vm;

	FAILS(api(gone), EBADF);
	CHECK(api(keep) == 12);
	vm = ioctl(keep, KVM_CREATE_VM, 0);
	CHECK(vm >= 0 && ioctl(vm, KVM_CREATE_VCPU, 0) >= 0);
	return t_failures;
}

static int send_fds(int s, const int *fds, int n)
{
	char c[CMSG_SPACE(4 * sizeof(int))] __attribute__((aligned(8))) = {0};
	struct iovec v = {"x", 1};
	struct msghdr m = {.msg_iov = &v,
			   .msg_iovlen = 1,
			   .msg_control = c,
			   .msg_controllen = CMSG_SPACE(n * sizeof(int))};
	struct cmsghdr *h = CMSG_FIRSTHDR(&m);

	h->cmsg_level = SOL_SOCKET;
	h->cmsg_type = SCM_RIGHTS;
	h->cmsg_len = CMSG_LEN(n * sizeof(int));
	memcpy(CMSG_DATA(h), fds, n * sizeof(int));
	return sendmsg(s, &m, 0) == 1 ? 0 : -1;
}

static int receive_fds(int s, int *fds, int n)
{
	char c[CMSG_SPACE(4 * sizeof(int))] __attribute__((aligned(8)));
	char b;
	struct iovec v = {&b, 1};
	struct msghdr m = {
		.msg_iov = &v, .msg_iovlen = 1, .msg_control = c, .msg_controllen = sizeof(c)};
	struct cmsghdr *h;

	if (recvmsg(s, &m, 0) != 1 || !(h = CMSG_FIRSTHDR(&m)))
		return -1;
	memcpy(fds, CMSG_DATA(h), n * sizeof(int));
	return 0;
}

static void messages(void)
{
	int s[2], out[3], in[3];
	struct vm v;

	T_VM(&v, code_out);
	NEED(!socketpair(AF_UNIX, SOCK_STREAM, 0, s));
	out[0] = v.kvm;
	out[1] = v.vm;
	out[2] = v.vcpu;
	CHECK(!send_fds(s[0], out, 3));
	/* In flight, nothing else refers to the VM. */
	close(v.kvm);
	close(v.vm);
	close(v.vcpu);
	CHECK(!receive_fds(s[1], in, 3));
	CHECK(api(in[0]) == 12);
	CHECK(ioctl(in[1], KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == 1);
	v.kvm = in[0];
	v.vm = in[1];
	v.vcpu = in[2];
	CHECK(t_out(&v) == 0);
	/* A message that nobody reads goes with its socket. */
	CHECK(!send_fds(s[0], in, 3));
	close(s[0]);
	close(s[1]);
	t_free(&v);
}

static void message_to_child(void)
{
	int s[2], fd = open("/dev/kvm", O_RDWR), st;
	pid_t pid;

	NEED(!socketpair(AF_UNIX, SOCK_DGRAM, 0, s));
	pid = fork();
	if (!pid) {
		int got;

		close(fd);
		_exit(receive_fds(s[1], &got, 1) || api(got) != 12);
	}
	CHECK(!send_fds(s[0], &fd, 1));
	close(fd);
	CHECK(waitpid(pid, &st, 0) == pid && st == 0);
	close(s[0]);
	close(s[1]);
}

/* A daemon's habit; descriptors that a library keeps open must not be hit by it. */
static int closes_everything(void)
{
	struct vm v;

	t_failures = 0;
	closefrom(3);
	T_VM(&v, code_out);
	CHECK(t_out(&v) == 0);
	CHECK(!close_range(3, ~0u, 0));
	FAILS(t_run(&v), EBADF);
	for (int fd = 3; fd < 2000; fd++)
		close(fd);
	T_VM(&v, code_out);
	CHECK(t_out(&v) == 0);
	return t_failures;
}

/* A shell's habit: descriptors put at numbers of its own choice. */
static int replaces_everything(void)
{
	int null = open("/dev/null", O_RDWR), fds[256], n = 0;
	struct dirent *e;
	struct vm v;
	DIR *d;

	t_failures = 0;
	T_VM(&v, code_out);
	d = opendir("/proc/self/fd");
	NEED(null >= 0 && d);
	while ((e = readdir(d)) && n < 256) {
		int fd = atoi(e->d_name);

		if (fd > 2 && fd != v.kvm && fd != v.vm && fd != v.vcpu && fd != null &&
		    fd != dirfd(d))
			fds[n++] = fd;
	}
	closedir(d);
	for (int i = 0; i < n; i++) {
		CHECK(dup2(null, fds[i]) == fds[i] || (t_preloaded() && errno == EBUSY));
		CHECK(dup3(null, fds[i], O_CLOEXEC) == fds[i] || (t_preloaded() && errno == EBUSY));
	}
	CHECK(t_out(&v) == 0);
	close(v.vcpu);
	t_vcpu(&v, 1);
	for (size_t i = 0; i < v.run_size; i += T_PAGE)
		((volatile uint8_t *)v.run)[i] = 0;
	CHECK(t_out(&v) == 0);
	return t_failures;
}

int main(int argc, char **argv)
{
	struct vm v;
	int st;

	if (argc > 1 && !strcmp(argv[1], "exit0"))
		return exit0();
	if (argc > 3 && !strcmp(argv[1], "inherit"))
		return inherit(atoi(argv[2]), atoi(argv[3]));
	T_VM(&v, code_out);
	st = ioctl(v.vm, KVM_GET_STATS_FD, 0);
	io(v.kvm, SYSTEM);
	io(v.vm, VM);
	io(v.vcpu, VCPU);
	other_calls(v.kvm, SYSTEM);
	other_calls(v.vm, VM);
	other_calls(v.vcpu, VCPU);
	if (CHECK(st >= 0)) {
		io(st, STATS);
		other_calls(st, STATS);
		close(st);
	}
	t_free(&v);
	duplicates();
	close_order();
	wrong_kinds();
	forks();
	vforks(argv[0]);
	execs(argv[0]);
	messages();
	message_to_child();
	CHECK(t_child(closes_everything) == 0);
	CHECK(t_child(replaces_everything) == 0);
	return t_done();
}
