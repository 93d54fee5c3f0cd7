/* SPDX-License-Identifier: MIT */
/*
 * A guest_memfd's descriptor: what each call answers, how it is passed on, and that it keeps its VM
 * (F1, F2, U4). On a real /dev/kvm that has them, beside.
 */
#include <linux/falloc.h>
#include <sys/epoll.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <setjmp.h>

#include "t.h"

#ifndef KVM_CREATE_GUEST_MEMFD
#define KVM_CREATE_GUEST_MEMFD _IOWR(KVMIO, 0xd4, struct create)
#endif
#define CAP_GUEST_MEMFD 234
#define KEEP            FALLOC_FL_KEEP_SIZE
#define PUNCH           (FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE)
#define SIZE            (8 * T_PAGE)

struct create {
	uint64_t size, flags, reserved[6];
};

static int vm, gmem;

static int create_flags(uint64_t size, uint64_t flags)
{
	struct create c = {.size = size, .flags = flags};

	return ioctl(vm, KVM_CREATE_GUEST_MEMFD, &c);
}

static int create(uint64_t size)
{
	return create_flags(size, 0);
}

static void io(void)
{
	struct iovec v = {.iov_len = 64};
	int file = memfd_create("x", 0), p[2];
	char b[64];
	off_t o = 0;

	v.iov_base = b;
	NEED(!ftruncate(file, T_PAGE) && !pipe(p));
	FAILS(read(gmem, b, 64), EINVAL);
	FAILS(read(gmem, (void *)8, 64), EINVAL);
	FAILS(write(gmem, b, 64), EINVAL);
	FAILS(readv(gmem, &v, 1), EINVAL);
	FAILS(writev(gmem, &v, 1), EINVAL);
	FAILS(pread(gmem, b, 64, 0), ESPIPE);
	FAILS(pwrite(gmem, b, 64, 0), ESPIPE);
	FAILS(preadv(gmem, &v, 1, 0), ESPIPE);
	FAILS(pwritev(gmem, &v, 1, 0), ESPIPE);
	FAILS(sendfile(file, gmem, NULL, 8), EINVAL);
	FAILS(sendfile(gmem, file, NULL, 8), EINVAL);
	FAILS(sendfile(file, gmem, &o, 8), ESPIPE);
	FAILS(copy_file_range(gmem, NULL, file, NULL, 8, 0), EXDEV);
	FAILS(copy_file_range(gmem, NULL, p[1], NULL, 8, 0), EINVAL);
	FAILS(splice(gmem, NULL, p[1], NULL, 8, 0), EINVAL);
	FAILS(lseek(gmem, 0, SEEK_SET), ESPIPE);
	FAILS(lseek(gmem, 0, SEEK_HOLE), ESPIPE);
	FAILS(lseek(gmem, 0, 99), EINVAL);
	FAILS(fsync(gmem), EINVAL);
	FAILS(ftruncate(gmem, SIZE), EINVAL);
	FAILS(ftruncate(gmem, 0), EINVAL);
	FAILS(ioctl(gmem, KVM_GET_API_VERSION, 0), ENOTTY);
	CHECK(mmap(NULL, T_PAGE, PROT_READ, MAP_SHARED, gmem, 0) == MAP_FAILED && errno == ENODEV);
	CHECK(mmap(NULL, T_PAGE, PROT_READ, MAP_PRIVATE, gmem, 0) == MAP_FAILED && errno == ENODEV);
	CHECK(mmap(NULL, SIZE, PROT_NONE, MAP_SHARED, gmem, 0) == MAP_FAILED && errno == ENODEV);
	FAILS(epoll_ctl(epoll_create1(0), EPOLL_CTL_ADD, gmem, &(struct epoll_event){0}), EPERM);
	close(file);
	close(p[0]);
	close(p[1]);
}

static void attributes(void)
{
	char path[32];
	struct stat st;

	CHECK(!fstat(gmem, &st) && st.st_size == SIZE && st.st_blksize == T_PAGE);
	CHECK(S_ISREG(st.st_mode) && (st.st_mode & 0777) == 0600 && st.st_blocks == 0);
	CHECK(fcntl(gmem, F_GETFD) == 0);
	CHECK((fcntl(gmem, F_GETFL) & O_ACCMODE) == O_RDWR);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", gmem);
	FAILS(open(path, O_RDWR), ENXIO);
}

static void holes(void)
{
	const off_t max = INT64_MAX & ~(off_t)(T_PAGE - 1);
	struct stat st;

	FAILS(fallocate(gmem, KEEP, -(off_t)T_PAGE, T_PAGE), EINVAL);
	FAILS(fallocate(gmem, KEEP, 0, 0), EINVAL);
	FAILS(fallocate(gmem, KEEP, 0, -1), EINVAL);
	FAILS(fallocate(gmem, 0, 0, T_PAGE), EOPNOTSUPP);
	FAILS(fallocate(gmem, 0, 1, T_PAGE), EOPNOTSUPP);
	FAILS(fallocate(gmem, FALLOC_FL_PUNCH_HOLE, 0, T_PAGE), EOPNOTSUPP);
	FAILS(fallocate(gmem, KEEP | FALLOC_FL_ZERO_RANGE, 0, T_PAGE), EOPNOTSUPP);
	FAILS(fallocate(gmem, FALLOC_FL_COLLAPSE_RANGE, 0, T_PAGE), EOPNOTSUPP);
	FAILS(fallocate(gmem, FALLOC_FL_INSERT_RANGE, 0, T_PAGE), EOPNOTSUPP);
	FAILS(fallocate(gmem, KEEP | 0x40000000, 0, T_PAGE), EOPNOTSUPP);
	FAILS(fallocate(gmem, KEEP, max, T_PAGE), EFBIG);
	FAILS(fallocate(gmem, PUNCH, max, T_PAGE), EFBIG);
	FAILS(fallocate(gmem, KEEP, 1, T_PAGE), EINVAL);
	FAILS(fallocate(gmem, KEEP, 0, T_PAGE - 1), EINVAL);
	FAILS(fallocate(gmem, PUNCH, T_PAGE - 1, T_PAGE), EINVAL);
	FAILS(fallocate(gmem, KEEP, SIZE, T_PAGE), EINVAL);
	FAILS(fallocate(gmem, KEEP, T_PAGE, SIZE), EINVAL);
	CHECK(!fallocate(gmem, KEEP, 0, SIZE));
	CHECK(!fallocate(gmem, KEEP, 0, SIZE));
	CHECK(!fallocate(gmem, PUNCH, T_PAGE, T_PAGE));
	CHECK(!fallocate(gmem, PUNCH, SIZE, T_PAGE));
	CHECK(!fallocate(gmem, PUNCH, 0, 100 * SIZE));
	CHECK(posix_fallocate(gmem, 0, T_PAGE) == ESPIPE);
	CHECK(!fstat(gmem, &st) && st.st_size == SIZE);
}

static int inherited(void)
{
	struct stat st;

	return fstat(gmem, &st) || st.st_size != SIZE;
}

static int send_and_receive(int fd)
{
	char control[CMSG_SPACE(sizeof(int))] = {0}, byte = 0;
	struct iovec v = {&byte, 1};
	struct msghdr m = {.msg_iov = &v,
			   .msg_iovlen = 1,
			   .msg_control = control,
			   .msg_controllen = sizeof(control)};
	struct cmsghdr *h = CMSG_FIRSTHDR(&m);
	int s[2];

	NEED(!socketpair(AF_UNIX, SOCK_DGRAM, 0, s));
	h->cmsg_level = SOL_SOCKET;
	h->cmsg_type = SCM_RIGHTS;
	h->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(h), &fd, sizeof(fd));
	NEED(sendmsg(s[0], &m, 0) == 1);
	close(fd); /* in the message it lives */
	NEED(recvmsg(s[1], &m, 0) == 1);
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), sizeof(fd));
	close(s[0]);
	close(s[1]);
	return fd;
}

static void passed_on(void)
{
	int copy = dup(gmem);

	NEED(copy >= 0);
	CHECK(!fallocate(copy, KEEP, 0, T_PAGE));
	copy = send_and_receive(copy);
	CHECK(!fallocate(copy, PUNCH, 0, T_PAGE));
	FAILS(read(copy, &copy, 1), EINVAL);
	close(copy);
	CHECK(t_child(inherited) == 0);
	CHECK(!fallocate(gmem, KEEP, 0, T_PAGE));
}

/* ---- Linux 6.18's flags ---- */

struct region2 {
	uint32_t slot, flags;
	uint64_t gpa, size, hva, offset;
	uint32_t fd, pad1;
	uint64_t pad2[14];
};
#define SET_USER_MEMORY_REGION2 _IOW(KVMIO, 0x49, struct region2)
#define MEM_GUEST_MEMFD         4

static sigjmp_buf trap;

static void on_bus(int sig)
{
	siglongjmp(trap, sig);
}

/* A guest whose data page is a file's, which the program has mapped: one memory for both. */
static void shared_with_guest(int kvm)
{
	struct vm v;
	struct region2 r = {
		.slot = 1, .flags = MEM_GUEST_MEMFD, .gpa = DATA, .size = T_PAGE, .offset = T_PAGE};
	uint8_t *p;
	int fd;

	(void)kvm;
	t_vm(&v, code_read, sizeof(code_read));
	close(vm);
	vm = v.vm;
	fd = create_flags(SIZE, 3);
	NEED(fd >= 0);
	p = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	NEED(p != MAP_FAILED);
	CHECK(t_slot(&v, 1, DATA, 0, NULL) == 0 || errno == EINVAL);
	r.hva = (uintptr_t)p + T_PAGE;
	r.fd = (uint32_t)fd;
	NEED(!ioctl(v.vm, SET_USER_MEMORY_REGION2, &r));
	FAILS(ioctl(v.vm, SET_USER_MEMORY_REGION2, &r), EINVAL);
	r.slot = 2;
	r.gpa = 2 * DATA;
	FAILS(ioctl(v.vm, SET_USER_MEMORY_REGION2, &r), EINVAL); /* is bound */
	for (int i = 1; i < 4; i++) {
		p[T_PAGE] = (uint8_t)i;
		NEED(!ioctl(v.vcpu, KVM_RUN, 0) && v.run->exit_reason == KVM_EXIT_IO);
		CHECK(*((uint8_t *)v.run + v.run->io.data_offset) == i);
	}
	CHECK(!fallocate(fd, PUNCH, 0, SIZE));
	NEED(!ioctl(v.vcpu, KVM_RUN, 0) && v.run->exit_reason == KVM_EXIT_IO);
	CHECK(*((uint8_t *)v.run + v.run->io.data_offset) == 0 && p[T_PAGE] == 0);
	munmap(p, SIZE);
	close(fd);
	/* A KVM that emulates real mode goes by the host address, where there is nothing either. */
	if (ioctl(v.vcpu, KVM_RUN, 0))
		CHECK(errno == EFAULT && v.run->exit_reason == 39);
	else
		CHECK(!t_preloaded() && v.run->exit_reason == KVM_EXIT_MMIO);
	t_free(&v);
}

static void newer(int kvm)
{
	uint8_t *p;
	int fd;

	if (ioctl(kvm, KVM_CHECK_EXTENSION, 244) != 3) {
		FAILS(create_flags(SIZE, 1), EINVAL);
		FAILS(create_flags(SIZE, 2), EINVAL);
		return;
	}
	CHECK(ioctl(vm, KVM_CHECK_EXTENSION, CAP_GUEST_MEMFD) == 1);
	FAILS(create_flags(SIZE, 4), EINVAL);
	fd = create_flags(SIZE, 3);
	NEED(fd >= 0);
	CHECK(mmap(NULL, SIZE, PROT_READ, MAP_PRIVATE, fd, 0) == MAP_FAILED && errno == EINVAL);
	CHECK(mmap(NULL, SIZE, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0) == MAP_FAILED &&
	      errno == EPERM);
	p = mmap(NULL, 2 * SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	NEED(p != MAP_FAILED);
	p[0] = p[T_PAGE] = 1;
	CHECK(!fallocate(fd, PUNCH, 0, T_PAGE));
	CHECK(p[0] == 0 && p[T_PAGE] == 1);
	FAILS(read(fd, p, 1), EINVAL);
	signal(SIGBUS, on_bus);
	if (!sigsetjmp(trap, 1)) {
		p[SIZE] = 1;
		CHECK(!"beyond the end");
	}
	munmap(p, 2 * SIZE);
	close(fd);
	/* It can be mapped, and is not shared. */
	fd = create_flags(SIZE, 1);
	NEED(fd >= 0);
	p = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	NEED(p != MAP_FAILED);
	if (!sigsetjmp(trap, 1)) {
		p[0] = 1;
		CHECK(!"not shared");
	}
	munmap(p, SIZE);
	close(fd);
	fd = create_flags(SIZE, 2);
	CHECK(fd >= 0 && mmap(NULL, SIZE, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED &&
	      errno == ENODEV);
	close(fd);
	shared_with_guest(kvm);
}

/* The VM's descriptor goes first. */
static void outlives_vm(void)
{
	int fd = create(SIZE);

	NEED(fd >= 0);
	close(vm);
	CHECK(!fallocate(fd, KEEP, 0, SIZE));
	CHECK(!fallocate(fd, PUNCH, 0, SIZE));
	close(gmem);
	CHECK(!close(fd));
	FAILS(fallocate(fd, KEEP, 0, SIZE), EBADF);
}

int main(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), before, fds[64];

	NEED(kvm >= 0);
	if (ioctl(kvm, KVM_CHECK_EXTENSION, CAP_GUEST_MEMFD) != 1) {
		fprintf(stderr, "no guest_memfd\n");
		return 77;
	}
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	NEED(vm >= 0);
	FAILS(create(0), EINVAL);
	FAILS(create(T_PAGE + 1), EINVAL);
	FAILS(create(1ull << 63), EINVAL);
	gmem = create(SIZE);
	NEED(gmem >= 0);
	io();
	attributes();
	holes();
	passed_on();
	/* None is left behind. */
	before = dup(0);
	for (unsigned i = 0; i < 64; i++)
		fds[i] = create(SIZE);
	for (unsigned i = 0; i < 64; i++)
		CHECK(fds[i] >= 0 && !close(fds[i]));
	close(before);
	CHECK(dup(0) == before);
	outlives_vm();
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	NEED(vm >= 0);
	newer(kvm);
	return t_done();
}
