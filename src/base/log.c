/* SPDX-License-Identifier: MIT */
/*
 * One line, one write(2): lines of different threads never mix, and a line that was logged
 * before a crash is in the file. The descriptors are moved out of the program's way and are
 * close-on-exec; a program run by this one opens the files again, in append mode.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/config.h"
#include "base/hidden_fd.h"
#include "base/log.h"
#include "base/syscall.h"

#define HIGH_FD      1000
#define LINE_MAX_LEN 512

static int log_fd = 2;
static int trace_fd = -1;
static uint64_t trace_start_ns;
bool kl_trace_on;

static uint64_t clock_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

uint64_t kl_trace_ns(void)
{
	return clock_ns() - trace_start_ns;
}

static int open_append(const char *path)
{
	long fd =
		kl_sys(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
	long high;

	if (fd < 0)
		return (int)fd;
	high = kl_sys(SYS_fcntl, fd, F_DUPFD_CLOEXEC, HIGH_FD);
	if (high >= 0) {
		kl_sys(SYS_close, fd);
		fd = high;
	}
	kl_fd_hide((int)fd);
	return (int)fd;
}

void kl_log_init(void)
{
	int fd;

	trace_start_ns = clock_ns();
	if (kl_config.log_path) {
		fd = open_append(kl_config.log_path);
		if (fd >= 0)
			log_fd = fd;
		else
			kl_log(KL_LOG_ERR, "cannot open log file %s: %s", kl_config.log_path,
			       strerror(-fd));
	}
	if (kl_config.trace_path) {
		trace_fd = open_append(kl_config.trace_path);
		if (trace_fd < 0)
			kl_log(KL_LOG_ERR, "cannot open trace file %s: %s", kl_config.trace_path,
			       strerror(-trace_fd));
		kl_trace_on = trace_fd >= 0;
	}
}

static void emit(int fd, const char *prefix, const char *fmt, va_list ap)
{
	char line[LINE_MAX_LEN];
	int n, m;

	n = snprintf(line, sizeof(line), "%s", prefix);
	m = vsnprintf(line + n, sizeof(line) - (size_t)n - 1, fmt, ap);
	if (m > 0)
		n = kl_min(n + m, (int)sizeof(line) - 2);
	line[n++] = '\n';
	while (kl_sys(SYS_write, fd, line, n) == -EINTR)
		;
}

void kl_log(enum kl_log_level level, const char *fmt, ...)
{
	static const char *const names[] = {"error", "warning", "info", "debug"};
	char prefix[48];
	va_list ap;

	/* Without a log file only what the user must know goes to stderr. */
	if (level > KL_LOG_WARN && log_fd == 2)
		return;
	snprintf(prefix, sizeof(prefix), "kvmlet: %s: ", names[level]);
	va_start(ap, fmt);
	emit(log_fd, prefix, fmt, ap);
	va_end(ap);
}

void kl_trace_write(const char *fmt, ...)
{
	uint64_t ns = kl_trace_ns();
	char prefix[64];
	va_list ap;

	snprintf(prefix, sizeof(prefix), "%6llu.%09llu [%ld] ",
		 (unsigned long long)(ns / 1000000000u), (unsigned long long)(ns % 1000000000u),
		 kl_sys(SYS_gettid, 0));
	va_start(ap, fmt);
	emit(trace_fd, prefix, fmt, ap);
	va_end(ap);
}

void kl_assert_fail(const char *expr, const char *file, int line)
{
	kl_log(KL_LOG_ERR, "%s:%d: assertion failed: %s", file, line, expr);
	abort();
}
