/* SPDX-License-Identifier: MIT */
/*
 * Work for a guest's kernel, which checks what it gets. It runs on any Linux.
 *
 *   stress SECONDS   a process for each CPU forks, maps, protects, faults and sends, at random
 *   stress work N    one process does N such rounds, always the same
 *   stress churn     writes 96 MiB over and over, and checks what was written the time before:
 *                    for migration; never ends
 */
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul

static uint64_t seed;

static uint64_t rnd(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed;
}

static void check(int ok, const char *what)
{
	if (ok)
		return;
	printf("kvmlet-stress: WRONG: %s (errno %d)\n", what, errno);
	fflush(stdout);
	_exit(1);
}

static uint64_t pattern(uint64_t page, uint64_t word, uint64_t pass)
{
	return (page * 0x9e3779b97f4a7c15 + word) * 0xff51afd7ed558ccd + pass;
}

/* ---- faults ---- */

static sigjmp_buf on_fault;

static void faulted(int sig)
{
	siglongjmp(on_fault, sig);
}

/* Whether a store to @p faults. */
static int store_faults(volatile char *p)
{
	if (sigsetjmp(on_fault, 1))
		return 1;
	*p = *p;
	return 0;
}

static int load_faults(volatile char *p)
{
	if (sigsetjmp(on_fault, 1))
		return 1;
	(void)*p;
	return 0;
}

/* ---- rounds ---- */

static void protections(void)
{
	unsigned pages = 1 + rnd() % 64;
	char *m = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
		       0);

	check(m != MAP_FAILED, "mmap");
	memset(m, 0x5a, pages * PAGE);
	for (unsigned i = 0; i < 40; i++) {
		static const int prot[3] = {PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE};
		char *p = m + rnd() % pages * PAGE;
		unsigned which = rnd() % 3;

		check(!mprotect(p, PAGE, prot[which]), "mprotect");
		check(load_faults(p + rnd() % PAGE) == (which == 0), "a load and PROT_NONE");
		check(store_faults(p + rnd() % PAGE) == (which != 2), "a store and its protection");
		if (which == 2)
			check(*p == 0x5a, "what a page kept");
	}
	check(!munmap(m, pages * PAGE), "munmap");
	check(load_faults(m), "a load from what was unmapped");
}

/* Copies on write: parent and child see their own. */
static void copies(void)
{
	unsigned pages = 1 + rnd() % 128, pass = (unsigned)rnd();
	uint64_t *m = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			   -1, 0);
	int status;
	pid_t pid;

	check(m != MAP_FAILED, "mmap");
	for (unsigned p = 0; p < pages; p++)
		m[p * 512 + p] = pattern(p, 0, pass);
	pid = fork();
	check(pid >= 0, "fork");
	for (unsigned p = 0; p < pages; p++) {
		check(m[p * 512 + p] == pattern(p, 0, pass), "a page after fork");
		m[p * 512 + p] = pattern(p, (uint64_t)!pid + 1, pass);
	}
	for (unsigned p = 0; p < pages; p++)
		check(m[p * 512 + p] == pattern(p, (uint64_t)!pid + 1, pass),
		      "a page of one's own");
	if (!pid)
		_exit(pass & 63);
	check(waitpid(pid, &status, 0) == pid && status == (int)(pass & 63) << 8, "wait");
	munmap(m, pages * PAGE);
}

static void pipes(void)
{
	unsigned len = 1 + rnd() % 200000;
	uint64_t sum = 0, got = 0;
	uint8_t buf[5000];
	int fd[2], status;
	pid_t pid;
	ssize_t n;

	check(!pipe(fd), "pipe");
	pid = fork();
	check(pid >= 0, "fork");
	for (unsigned i = 0; i < len; i++)
		sum += (uint8_t)(i * 7 + len);
	if (!pid) {
		for (unsigned i = 0, k; i < len; i += k) {
			k = len - i < sizeof(buf) ? len - i : (unsigned)sizeof(buf);
			for (unsigned j = 0; j < k; j++)
				buf[j] = (uint8_t)((i + j) * 7 + len);
			for (unsigned done = 0; done < k; done += (unsigned)n) {
				n = write(fd[1], buf + done, k - done);
				check(n > 0, "write");
			}
		}
		_exit(0);
	}
	close(fd[1]);
	while ((n = read(fd[0], buf, sizeof(buf))) > 0)
		for (ssize_t i = 0; i < n; i++)
			got += buf[i];
	check(got == sum, "what came through a pipe");
	close(fd[0]);
	check(waitpid(pid, &status, 0) == pid && !status, "the writer of a pipe");
}

static void *adder(void *arg)
{
	uint64_t *shared = arg;

	for (unsigned i = 0; i < 5000; i++)
		__atomic_fetch_add(shared, 1, __ATOMIC_SEQ_CST);
	return NULL;
}

static void threads(void)
{
	uint64_t shared = 0;
	pthread_t t[4];

	for (unsigned i = 0; i < 4; i++)
		check(!pthread_create(&t[i], NULL, adder, &shared), "pthread_create");
	for (unsigned i = 0; i < 4; i++)
		pthread_join(t[i], NULL);
	check(shared == 20000, "what threads added");
}

/* A shared page goes from hand to hand. */
static void exchange(void)
{
	volatile uint64_t *m =
		mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int status;
	pid_t pid;

	check(m != MAP_FAILED, "mmap");
	pid = fork();
	check(pid >= 0, "fork");
	for (unsigned i = !pid; i < 40; i += 2) {
		while (m[0] != i)
			usleep(0);
		m[1 + i] = i * i;
		__atomic_store_n(&m[0], i + 1, __ATOMIC_RELEASE);
	}
	if (!pid)
		_exit(0);
	check(waitpid(pid, &status, 0) == pid && !status, "the partner");
	for (unsigned i = 0; i < 40; i++)
		check(m[1 + i] == i * i, "a shared page");
	munmap((void *)m, PAGE);
}

static void (*const rounds[])(void) = {protections, copies, pipes, threads, exchange};

static int work(unsigned n)
{
	seed = 0x123456789abcdef;
	while (n--)
		rounds[rnd() % 5]();
	printf("kvmlet-stress: right\n");
	return 0;
}

static int stress(unsigned seconds)
{
	unsigned cpus = (unsigned)sysconf(_SC_NPROCESSORS_ONLN), bad = 0;
	time_t end = time(NULL) + seconds;

	for (unsigned c = 0; c <= cpus; c++) {
		unsigned long n = 0;

		if (fork())
			continue;
		seed = 0x123456789abcdef + c * 0x1000003;
		for (; time(NULL) < end; n++)
			rounds[rnd() % 5]();
		printf("kvmlet-stress: process %u: %lu rounds\n", c, n);
		fflush(stdout);
		_exit(!n);
	}
	for (unsigned c = 0; c <= cpus; c++) {
		int status;

		bad += wait(&status) < 0 || status;
	}
	printf("kvmlet-stress: %s\n", bad ? "WRONG" : "right");
	return bad != 0;
}

static _Noreturn void churn(void)
{
	const unsigned pages = 96 << 20 >> 12;
	uint64_t *m = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			   -1, 0);

	check(m != MAP_FAILED, "mmap");
	for (uint64_t pass = 0;; pass++) {
		unsigned long wrong = 0;

		/* A word of each line, so that a page that is half old is seen. */
		for (unsigned p = 0; p < pages; p++) {
			for (unsigned w = 0; w < 512; w += 8) {
				uint64_t *word = &m[p * 512ul + w];

				wrong += pass && *word != pattern(p, w, pass - 1);
				*word = pattern(p, w, pass);
			}
		}
		printf("kvmlet-churn: pass %lu %s %lu\n", (unsigned long)pass,
		       wrong ? "WRONG" : "right", wrong);
		fflush(stdout);
	}
}

int main(int argc, char **argv)
{
	struct sigaction sa = {.sa_handler = faulted};

	sigaction(SIGSEGV, &sa, NULL);
	sigaction(SIGBUS, &sa, NULL);
	if (argc == 3 && !strcmp(argv[1], "work"))
		return work((unsigned)atoi(argv[2]));
	if (argc == 2 && !strcmp(argv[1], "churn"))
		churn();
	if (argc == 2 && atoi(argv[1]) > 0)
		return stress((unsigned)atoi(argv[1]));
	fprintf(stderr, "usage: stress SECONDS|work N|churn\n");
	return 2;
}
