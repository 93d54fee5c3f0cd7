/* SPDX-License-Identifier: MIT */
#include "uapi/heatmap.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>

#include "base/config.h"
#include "base/failpoint.h"
#include "base/log.h"
#include "host/sys.h"
#include "host/thread.h"
#include "host/timer.h"
#include "uapi/uapi.h"

#define PROGRESS_NS  10000000000ull
#define PATIENCE_MS  500 /* at the end, with a sample that is being taken */
#define SUMMARY_ROWS 40

static struct kl_mutex life = KL_MUTEX_INITIALIZER(HEATMAP);
static unsigned vms;             /* life */
static pthread_t helper;         /* life; valid while has_helper */
static bool has_helper;          /* life */
static _Atomic uint32_t stop;    /* futex of the helper */
static _Atomic bool finished;    /* the process ends: its last picture was drawn */
static _Atomic int file = -1;    /* the picture */
static char file_name[PATH_MAX]; /* life, until it is open */

/* ---- text -------------------------------------------------------------------------------- */

void kl_heatmap_flush(struct kl_heatmap_out *o)
{
	for (size_t at = 0; at < o->n;) {
		long r = kl_sys(SYS_write, o->fd, o->buf + at, o->n - at);

		if (r == -EINTR)
			continue;
		if (r <= 0)
			break;
		at += (size_t)r;
	}
	o->n = 0;
}

void kl_heatmap_put(struct kl_heatmap_out *o, const char *fmt, ...)
{
	va_list ap;
	int n;

	if (sizeof(o->buf) - o->n < 512)
		kl_heatmap_flush(o);
	va_start(ap, fmt);
	n = vsnprintf(o->buf + o->n, sizeof(o->buf) - o->n, fmt, ap);
	va_end(ap);
	if (n > 0)
		o->n = kl_min(o->n + (size_t)n, sizeof(o->buf) - 1);
}

struct kl_heatmap_text kl_heatmap_size(uint64_t pages)
{
	static const char *const units[] = {"KiB", "MiB", "GiB", "TiB", "PiB"};
	double size = (double)pages * (KL_PAGE_SIZE / 1024);
	struct kl_heatmap_text t;
	unsigned u = 0;

	for (; size >= 1024 && u + 1 < KL_ARRAY_SIZE(units); u++)
		size /= 1024;
	snprintf(t.s, sizeof(t.s), "%.*f %s", size < 10 && size != (int)size, size, units[u]);
	return t;
}

uint64_t kl_heatmap_rate(uint64_t n, uint64_t ns)
{
	return (uint64_t)((double)n * 1e9 / (double)kl_max(ns, KL_HEAT_TICK_NS));
}

struct kl_heatmap_text kl_heatmap_slot(const struct kl_heat_record *r)
{
	struct kl_heatmap_text t;

	if (r->as)
		snprintf(t.s, sizeof(t.s), "%u:%u", r->as, r->id);
	else
		snprintf(t.s, sizeof(t.s), "%u", r->id);
	return t;
}

static double seconds(uint64_t ns)
{
	return (double)ns / 1e9;
}

/* The most written first; so many rows that a terminal has room for. */
static void put_slots(struct kl_heatmap_out *o, const struct kl_heat *heat)
{
	const struct kl_heat_record *before = NULL;
	unsigned row = 0;

	kl_heatmap_put(o, "  %-3s %-6s %-33s %10s %10s %10s %10s\n", "VM", "slot", "guest memory",
		       "size", "written", "pages/s", "peak");
	for (; row < SUMMARY_ROWS; row++) {
		const struct kl_heat_record *next = NULL;

		/* Of those that come after the last one, the first: by pages, then as they came. */
		for (const struct kl_heat_record *r = heat->records; r; r = r->next) {
			bool later = !before || r->written < before->written;

			if (before && r->written == before->written)
				later = r->index > before->index;
			if (later && (!next || r->written > next->written))
				next = r;
		}
		if (!next)
			break;
		kl_heatmap_put(
			o, "  %-3llu %-6s %16llx-%-16llx %10s %10s %10llu %10llu\n",
			(unsigned long long)next->vm, kl_heatmap_slot(next).s,
			(unsigned long long)next->base_gfn << KL_PAGE_SHIFT,
			(unsigned long long)(next->base_gfn + next->npages) << KL_PAGE_SHIFT,
			kl_heatmap_size(next->npages).s, kl_heatmap_size(next->distinct).s,
			(unsigned long long)kl_heatmap_rate(
				next->written,
				(next->ended_ns ? next->ended_ns : heat->now_ns) - next->begun_ns),
			(unsigned long long)kl_heatmap_rate(next->peak, KL_HEAT_TICK_NS));
		before = next;
	}
	if (heat->nr_records > row)
		kl_heatmap_put(o, "  and %u slots of which less was written\n",
			       heat->nr_records - row);
	if (heat->unrecorded)
		kl_heatmap_put(o, "  and slots that were too many to tell apart: %llu pages\n",
			       (unsigned long long)heat->unrecorded);
}

static void put_summary(int fd, const struct kl_heat *heat)
{
	struct kl_heatmap_out o = {.fd = fd};

	kl_heatmap_put(
		&o,
		"kvmlet heatmap of %.1f s, %u VM%s, %u slot%s: %llu pages written, each at most "
		"once in 0.1 s\n",
		seconds(heat->now_ns), heat->nr_vms, heat->nr_vms == 1 ? "" : "s", heat->nr_records,
		heat->nr_records == 1 ? "" : "s", (unsigned long long)heat->written);
	put_slots(&o, heat);
	kl_heatmap_put(&o, "  picture: %s\n", file_name);
	kl_heatmap_flush(&o);
}

static void put_progress(const struct kl_heat *heat, uint64_t since_ns, uint64_t since_written)
{
	struct kl_heatmap_out o = {.fd = 2};
	uint64_t rate = kl_heatmap_rate(heat->written - since_written, heat->now_ns - since_ns);

	kl_heatmap_put(&o,
		       "kvmlet heatmap: %.0f s: %llu pages/s (%s/s) written, %llu pages so far\n",
		       seconds(heat->now_ns), (unsigned long long)rate, kl_heatmap_size(rate).s,
		       (unsigned long long)heat->written);
	kl_heatmap_flush(&o);
}

/* ---- the file ---------------------------------------------------------------------------- */

/* FILE, or FILE-PID: the pid goes before the suffix. */
static void name_with_pid(char *to, size_t size, const char *path)
{
	const char *dot = strrchr(path, '.'), *slash = strrchr(path, '/');
	size_t stem = dot && (!slash || dot > slash + 1) ? (size_t)(dot - path) : strlen(path);

	snprintf(to, size, "%.*s-%d%s", (int)stem, path, (int)kl_sys(SYS_getpid), path + stem);
}

/* It is empty, and from now on it is not. */
static bool claim(int fd)
{
	static const char first[] = "<svg xmlns=\"http://www.w3.org/2000/svg\"/>\n";
	struct stat st;
	bool ours;

	while (kl_sys(SYS_flock, fd, LOCK_EX) == -EINTR)
		;
	ours = !kl_sys(SYS_fstat, fd, &st) && !st.st_size &&
	       kl_sys(SYS_write, fd, first, sizeof(first) - 1) > 0;
	kl_sys(SYS_flock, fd, LOCK_UN);
	return ours;
}

static void open_file(void)
{
	const int flags = O_WRONLY | O_CREAT | O_CLOEXEC | O_NOCTTY;
	long fd = kl_sys(SYS_openat, AT_FDCWD, kl_config.heatmap_path, flags, 0666);

	snprintf(file_name, sizeof(file_name), "%s", kl_config.heatmap_path);
	if (fd >= 0 && !claim((int)fd)) {
		kl_sys(SYS_close, fd);
		name_with_pid(file_name, sizeof(file_name), kl_config.heatmap_path);
		fd = kl_sys(SYS_openat, AT_FDCWD, file_name, flags | O_TRUNC, 0666);
	}
	if (fd < 0) {
		kl_log(KL_LOG_WARN, "no heatmap: cannot write %s: %s", file_name,
		       strerror((int)-fd));
		return;
	}
	atomic_store(&file, kl_sys_dup((int)fd));
	kl_sys(SYS_close, fd);
}

/* In place: the program may have lost the right to make files. */
static void draw(const struct kl_heat *heat)
{
	struct kl_heatmap_out o = {.fd = atomic_load(&file)};
	long end;

	if (o.fd < 0)
		return;
	kl_sys(SYS_lseek, o.fd, 0, SEEK_SET);
	kl_heatmap_draw(&o, heat);
	kl_heatmap_flush(&o);
	end = kl_sys(SYS_lseek, o.fd, 0, SEEK_CUR);
	kl_sys(SYS_ftruncate, o.fd, end);
}

/* ---- the helper -------------------------------------------------------------------------- */

/* False: stop. */
static bool sleep_until(uint64_t deadline)
{
	struct timespec ts = {.tv_sec = (time_t)(deadline / 1000000000u),
			      .tv_nsec = (long)(deadline % 1000000000u)};

	while (!atomic_load(&stop) && kl_timer_now() < deadline)
		kl_futex_wait_until(&stop, 0, &ts);
	return !atomic_load(&stop);
}

static void *helper_main(void *arg)
{
	uint64_t next = kl_timer_now(), report = next + PROGRESS_NS, then_ns = 0, then_written = 0;

	(void)arg;
	kl_engine_enter();
	while (sleep_until(next += KL_HEAT_TICK_NS)) {
		const struct kl_heat *heat;

		kl_heat_sample();
		/* Late? What was missed stays missed. */
		next = kl_max(next, kl_timer_now() - KL_HEAT_TICK_NS);
		if (kl_timer_now() < report)
			continue;
		report += PROGRESS_NS;
		heat = kl_heat_read_lock(true);
		if (!atomic_load(&finished)) {
			put_progress(heat, then_ns, then_written);
			draw(heat);
		}
		then_ns = heat->now_ns;
		then_written = heat->written;
		kl_heat_read_unlock();
	}
	kl_engine_leave();
	return NULL;
}

static bool start_helper(void)
{
	int r;

	atomic_store(&stop, 0);
	r = kl_failpoint("heatmap-thread")
		    ? -EAGAIN
		    : kl_thread_create(&helper, "kvmlet-heat", helper_main, NULL);
	if (r)
		kl_log(KL_LOG_WARN, "no thread for the heatmap: it will have no times");
	return !r;
}

void kl_heatmap_add_vm(struct kl_vm *vm)
{
	if (KL_LIKELY(!kl_config.heatmap_path))
		return;
	kl_mutex_lock(&life);
	if (atomic_load(&file) < 0)
		open_file();
	kl_heat_add_vm(vm);
	if (!vms++)
		has_helper = start_helper();
	kl_mutex_unlock(&life);
}

void kl_heatmap_remove_vm(struct kl_vm *vm)
{
	if (!vm->heat)
		return;
	kl_heat_remove_vm(vm);
	kl_mutex_lock(&life);
	if (!--vms && has_helper) {
		atomic_store(&stop, 1);
		kl_futex_wake(&stop, 1);
		kl_rank_wait(KL_RANK_HEATMAP_WAIT);
		pthread_join(helper, NULL);
		has_helper = false;
	}
	kl_mutex_unlock(&life);
}

void kl_heatmap_after_fork(void)
{
	int fd = atomic_exchange(&file, -1);

	kl_mutex_init(&life, KL_RANK_HEATMAP);
	vms = 0;
	has_helper = false;
	atomic_store(&finished, false);
	if (fd >= 0)
		kl_sys_close(fd);
}

/* ---- the end ----------------------------------------------------------------------------- */

void kl_uapi_finish_heatmap(int fd)
{
	const struct timespec ms = {.tv_nsec = 1000000};
	const struct kl_heat *heat = NULL;

	if (atomic_load(&file) < 0)
		return;
	for (unsigned i = 0; i < PATIENCE_MS && !kl_heat_sample_last(); i++)
		kl_sys(SYS_nanosleep, &ms, NULL);
	for (unsigned i = 0; i < PATIENCE_MS && !heat; i++) {
		heat = kl_heat_read_lock(false);
		if (!heat)
			kl_sys(SYS_nanosleep, &ms, NULL);
	}
	if (!heat)
		return;
	atomic_store(&finished, true);
	draw(heat);
	put_summary(fd, heat);
	kl_heat_read_unlock();
}
