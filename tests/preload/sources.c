/* SPDX-License-Identifier: MIT */
/*
 * Every call that changes memory opens a bracket where a slot lies (N1), counted by the VM's own
 * statistics; calls that change nothing open none. The program moves and replaces only memory that
 * it has mapped itself, so it runs under sanitizers.
 */
#include <linux/falloc.h>
#include <linux/openat2.h>
#include <linux/userfaultfd.h>
#include <malloc.h>
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include "t.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

static struct vm v;
static uint8_t *place; /* a page in the middle of reserved ones */

/* How many brackets touched the VM. 0 always on a KVM that does not say. */
static uint64_t brackets(void)
{
	static int fd = -1;
	struct kvm_stats_header h;
	uint64_t n = 0;

	if (fd < 0)
		fd = ioctl(v.vm, KVM_GET_STATS_FD, 0);
	if (fd < 0 || pread(fd, &h, sizeof(h), 0) != sizeof(h))
		return 0;
	for (unsigned i = 0; i < h.num_desc; i++) {
		struct kvm_stats_desc d;
		char name[64] = "";
		off_t at = h.desc_offset + (off_t)i * (off_t)(sizeof(d) + h.name_size);

		NEED(pread(fd, &d, sizeof(d), at) == sizeof(d));
		NEED(pread(fd, name, h.name_size < 63 ? h.name_size : 63, at + (off_t)sizeof(d)) >
		     0);
		if (!strcmp(name, "mmu_invalidations"))
			NEED(pread(fd, &n, sizeof(n), h.data_offset + d.offset) == sizeof(n));
	}
	return n;
}

#define TOUCHED(call)                                          \
	({                                                     \
		uint64_t before_ = brackets();                 \
		bool ok_ = CHECK(call);                        \
		CHECK(!t_preloaded() || brackets() > before_); \
		ok_;                                           \
	})
/* As often as that. */
#define TIMES(n, call)                                                \
	({                                                            \
		uint64_t before_ = brackets();                        \
		CHECK(call);                                          \
		CHECK(!t_preloaded() || brackets() == before_ + (n)); \
	})

static void use(void *p)
{
	t_slot(&v, SLOT_DATA, DATA, 0, NULL);
	NEED(!t_slot(&v, SLOT_DATA, DATA, T_PAGE, p));
}

static void *anon(void *at, size_t len, int flags)
{
	return mmap(at, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
}

static void fresh(void)
{
	NEED(anon(place, T_PAGE, MAP_FIXED) == place);
	place[0] = 1;
	use(place);
}

static void shared(int fd)
{
	NEED(mmap(place, T_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == place);
	use(place);
}

/* N1: unmapping and mapping. */
static void maps(void)
{
	void *p;

	fresh();
	TOUCHED(!munmap(place, T_PAGE));
	TOUCHED(anon(place, T_PAGE, 0) == place);
	TOUCHED(anon(place, T_PAGE, MAP_FIXED) == place);
	TOUCHED(anon(place, T_PAGE, MAP_FIXED | MAP_POPULATE) == place);
	TOUCHED(mmap64(place, T_PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
		place);
	TOUCHED(!syscall(SYS_munmap, place, T_PAGE));
	TOUCHED(anon(place, T_PAGE, MAP_FIXED_NOREPLACE) == place);
	TOUCHED(syscall(SYS_mmap, place, T_PAGE, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == (long)place);
	p = anon(NULL, 2 * T_PAGE, 0);
	TIMES(0, !munmap(p, T_PAGE));
	TIMES(0, !munmap((char *)p + T_PAGE, T_PAGE));
}

/* N1: moving, growing, shrinking; the target's bracket as well as the source's. */
static void remaps(void)
{
	uint8_t *q = anon(NULL, T_PAGE, 0);

	fresh();
	TIMES(1, mremap(place, T_PAGE, T_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, q) == q);
	TIMES(1, mremap(q, T_PAGE, T_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place) == place);
	TOUCHED(!munmap(place + T_PAGE, T_PAGE) && mremap(place, T_PAGE, 2 * T_PAGE, 0) == place);
	TOUCHED(mremap(place, 2 * T_PAGE, T_PAGE, 0) == place);
	q = place + 2 * T_PAGE;
	TOUCHED(mremap(place, T_PAGE, T_PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP | MREMAP_FIXED,
		       q) == q);
	TOUCHED(syscall(SYS_mremap, q, T_PAGE, T_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place) ==
		(long)place);
	/* A second mapping of shared pages lands on the slot. */
	q = mmap(NULL, T_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	TOUCHED(mremap(q, 0, T_PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place) == place);
	TIMES(0, mremap(q, T_PAGE, T_PAGE, 0) == q);
	munmap(q, T_PAGE);
	/* Old, and gone from newer kernels as anything but mmap() of the same. */
	q = place;
	TOUCHED(!remap_file_pages(q, T_PAGE, 0, 0, 0) || errno == EINVAL || errno == ENOSYS);
}

/* N1: advice. */
static void advice(void)
{
	static const int changes[] = {MADV_DONTNEED, MADV_FREE, MADV_PAGEOUT, MADV_COLLAPSE,
				      MADV_DONTNEED_LOCKED};
	static const int harmless[] = {MADV_NORMAL,   MADV_WILLNEED,   MADV_SEQUENTIAL,
				       MADV_DONTFORK, MADV_DOFORK,     MADV_HUGEPAGE,
				       MADV_COLD,     MADV_NOHUGEPAGE, MADV_POPULATE_WRITE};
	struct iovec iov[2] = {{anon(NULL, T_PAGE, 0), T_PAGE}, {place, T_PAGE}};
	int pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);

	fresh();
	/* Not every kernel knows all of them. */
	for (unsigned i = 0; i < sizeof(changes) / sizeof(*changes); i++)
		TOUCHED(!madvise(place, T_PAGE, changes[i]) || errno == EINVAL || errno == EAGAIN);
	for (unsigned i = 0; i < sizeof(harmless) / sizeof(*harmless); i++)
		TIMES(0, !madvise(place, T_PAGE, harmless[i]) || errno == EINVAL);
	TOUCHED(!syscall(SYS_madvise, place, T_PAGE, MADV_DONTNEED));
	TIMES(0, !posix_madvise(place, T_PAGE, POSIX_MADV_WILLNEED));
	TOUCHED(process_madvise(pidfd, iov, 2, MADV_PAGEOUT, 0) == 2 * T_PAGE || errno == EINVAL);
	TIMES(0, process_madvise(pidfd, iov, 1, MADV_PAGEOUT, 0) == T_PAGE || errno == EINVAL);
	munmap(iov[0].iov_base, T_PAGE);
	close(pidfd);
	NEED(mmap(place, T_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1,
		  0) == place);
	TOUCHED(!madvise(place, T_PAGE, MADV_REMOVE));
}

/* N1: protection. */
static void protections(void)
{
	fresh();
	TOUCHED(!mprotect(place, T_PAGE, PROT_READ));
	TOUCHED(!pkey_mprotect(place, T_PAGE, PROT_READ | PROT_WRITE, -1));
	TOUCHED(!syscall(SYS_mprotect, place, T_PAGE, PROT_NONE));
	TOUCHED(!syscall(SYS_pkey_mprotect, place, T_PAGE, PROT_READ | PROT_WRITE, -1));
}

/* N1: the backing file changes, by whatever descriptor or name. */
static void files(void)
{
	char path[] = "/tmp/kvm-sources-XXXXXX", by_fd[64];
	struct open_how how = {.flags = O_WRONLY | O_TRUNC};
	int fd = mkstemp(path), fd2;
	FILE *f;

	NEED(fd >= 0 && !ftruncate(fd, T_PAGE));
	shared(fd);
	fd2 = open(path, O_RDWR);
	TOUCHED(!ftruncate(fd2, 0));
	TIMES(0, !ftruncate(fd2, T_PAGE) || true);
	TOUCHED(!truncate(path, 100));
#define AGAIN NEED(!ftruncate(fd2, T_PAGE))
	AGAIN;
	TOUCHED(!fallocate(fd2, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, T_PAGE) ||
		errno == EOPNOTSUPP);
	TOUCHED(!fallocate(fd2, FALLOC_FL_ZERO_RANGE, 0, T_PAGE) || errno == EOPNOTSUPP);
	TOUCHED(!fallocate(fd2, FALLOC_FL_COLLAPSE_RANGE, 0, T_PAGE) || errno == EOPNOTSUPP ||
		errno == EINVAL);
	TOUCHED(!fallocate(fd2, FALLOC_FL_INSERT_RANGE, 0, T_PAGE) || errno == EOPNOTSUPP ||
		errno == EINVAL);
	TIMES(0, !fallocate(fd2, 0, 0, T_PAGE) || errno == EOPNOTSUPP);
	snprintf(by_fd, sizeof(by_fd), "/proc/self/fd/%d", fd2);
	close(fd);
	AGAIN;
	TOUCHED((fd = open(path, O_RDWR | O_TRUNC)) >= 0);
	close(fd);
	AGAIN;
	TOUCHED((fd = openat(AT_FDCWD, by_fd, O_RDONLY | O_TRUNC)) >= 0);
	close(fd);
	AGAIN;
	TOUCHED((fd = creat(path, 0600)) >= 0);
	close(fd);
	AGAIN;
	TOUCHED((fd = (int)syscall(SYS_open, path, O_WRONLY | O_TRUNC)) >= 0);
	close(fd);
	AGAIN;
	TOUCHED((fd = (int)syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof(how))) >= 0);
	close(fd);
	AGAIN;
	TOUCHED((f = fopen(path, "w")) != NULL);
	AGAIN;
	TOUCHED((f = freopen(path, "w+", f)) != NULL);
	fclose(f);
	AGAIN;
	TIMES(0, (fd = open(path, O_RDWR | O_APPEND)) >= 0);
	close(fd);
	FAILS(open(path, O_RDWR | O_TRUNC | O_CREAT | O_EXCL, 0600), EEXIST);
	CHECK(lseek(fd2, 0, SEEK_END) == T_PAGE);
	close(fd2);
	unlink(path);
	snprintf(path, sizeof(path), "/kvm-s-%d", getpid());
	fd = shm_open(path, O_RDWR | O_CREAT, 0600);
	if (CHECK(fd >= 0)) {
		NEED(!ftruncate(fd, T_PAGE));
		shared(fd);
		TOUCHED((fd2 = shm_open(path, O_RDWR | O_TRUNC, 0600)) >= 0);
		CHECK(lseek(fd, 0, SEEK_END) == 0);
		close(fd);
		close(fd2);
		shm_unlink(path);
	}
}

/* N1: segments, and the break. */
static void segments(void)
{
	int id = shmget(IPC_PRIVATE, T_PAGE, IPC_CREAT | 0600);
	uint8_t *p, *brk_page;

	fresh();
	if (CHECK(id >= 0)) {
		TOUCHED(shmat(id, place, SHM_REMAP) == place);
		TOUCHED(!shmdt(place));
		TOUCHED(shmat(id, place, 0) == place);
		TOUCHED(!syscall(SYS_shmdt, place));
		shmctl(id, IPC_RMID, NULL);
		fresh();
	}
	p = sbrk(0);
	if (t_sanitized() || sbrk(4 * T_PAGE) != p)
		return;
	brk_page = (uint8_t *)(((uintptr_t)p + T_PAGE - 1) & ~(uintptr_t)(T_PAGE - 1));
	use(brk_page);
	TOUCHED(sbrk(-4 * (intptr_t)T_PAGE) == p + 4 * T_PAGE);
	TOUCHED(!brk(p + 4 * T_PAGE));
	TOUCHED(syscall(SYS_brk, p) == (long)p);
	use(place);
}

/* N1: blocks that glibc's allocator maps and unmaps by calls of its own. */
static void heap(void)
{
	size_t big = 1 << 20;
	uint8_t *p, *q;

	mallopt(M_MMAP_THRESHOLD, 128 << 10);
	NEED(!posix_memalign((void **)&p, T_PAGE, big));
	use(p);
	TOUCHED((free(p), true));
	p = memalign(64 * T_PAGE, big);
	use(p);
	TOUCHED((q = realloc(p, 8 * big)) != NULL);
	use((uint8_t *)(((uintptr_t)q + T_PAGE) & ~(uintptr_t)(T_PAGE - 1)));
	TOUCHED((p = reallocarray(q, 16, big)) != NULL);
	use((uint8_t *)(((uintptr_t)p + T_PAGE) & ~(uintptr_t)(T_PAGE - 1)));
	TOUCHED((free(p), true));
	/* Inside the heap, freed, and given back later. */
	p = aligned_alloc(T_PAGE, 20 * T_PAGE);
	q = malloc(100);
	use(p);
	free(p);
	TOUCHED(malloc_trim(0) >= 0);
	free(q);
	use(place);
}

/* N1: userfaultfd. */
static void uffd(void)
{
	struct uffdio_register r = {.range = {(uintptr_t)place, T_PAGE},
				    .mode = UFFDIO_REGISTER_MODE_WP};
	struct uffdio_writeprotect wp = {.range = r.range};
	struct uffdio_api api = {.api = UFFD_API};
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
	struct uffdio_copy move = {.src = (uintptr_t)place, .len = T_PAGE};

	if (fd < 0)
		return;
	fresh();
	TIMES(0, !ioctl(fd, UFFDIO_API, &api));
	/* UFFDIO_MOVE, where the kernel has it; its structure is that of COPY. */
	TIMES(1, ioctl(fd, _IOWR(UFFDIO, 0x05, move), &move) == -1);
	TIMES(1, !ioctl(fd, UFFDIO_REGISTER, &r));
	TIMES(1, !ioctl(fd, UFFDIO_WRITEPROTECT, &wp));
	TIMES(1, !syscall(SYS_ioctl, fd, UFFDIO_UNREGISTER, &r.range));
	close(fd);
}

static int child(void)
{
	place[0] = 99;
	return t_run(&v) == -1 && errno == EIO ? 0 : 1;
}

/* N1, U5: copy-on-write is nobody's business; the child cannot use the VM. */
static void forks(void)
{
	fresh();
	place[0] = 42;
	t_rewind(&v);
	CHECK(t_out(&v) == 42);
	TIMES(0, t_child(child) == 0 || !t_preloaded());
	CHECK(t_out(&v) == 42);
	place[0] = 43;
	CHECK(t_out(&v) == 43);
}

int main(void)
{
	place = mmap(NULL, 16 * T_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	NEED(place != MAP_FAILED);
	place += 8 * T_PAGE;
	T_VM(&v, code_read);
	maps();
	remaps();
	advice();
	protections();
	files();
	segments();
	if (!t_sanitized())
		heap();
	uffd();
	forks();
	t_free(&v);
	return t_done();
}
