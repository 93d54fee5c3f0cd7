/* SPDX-License-Identifier: MIT */
/* `kvmlet run`: set the environment up for the preload library, then become the program. */
#include "cli.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PRELOAD_NAME "libkvmlet-preload.so"

/* <root>/BINDIR/kvmlet: the library is <root>/LIBDIR/kvmlet/..., wherever root is now. */
static bool preload_relative(const char *dir, char *path, size_t size)
{
	size_t len = strlen(dir), tail = strlen(KVMLET_BINDIR);

	if (KVMLET_BINDIR[0] == '/' || KVMLET_LIBDIR[0] == '/')
		return false;
	if (len <= tail || strcmp(dir + len - tail, KVMLET_BINDIR) || dir[len - tail - 1] != '/')
		return false;
	return snprintf(path, size, "%.*s%s/kvmlet/" PRELOAD_NAME, (int)(len - tail), dir,
			KVMLET_LIBDIR) < (int)size;
}

int find_preload(char *path, size_t size, bool loud)
{
	const char *forced = getenv("KVMLET_PRELOAD_LIBRARY");
	char dir[PATH_MAX];
	ssize_t n;
	char *slash;

	if (forced && *forced) {
		if (forced[0] == '/' && !access(forced, R_OK) &&
		    snprintf(path, size, "%s", forced) < (int)size)
			return 0;
		if (loud)
			complain(
				"KVMLET_PRELOAD_LIBRARY is '%s', which is not the absolute path of "
				"a readable file",
				forced);
		return EXIT_CANNOT_RUN;
	}
	n = readlink("/proc/self/exe", dir, sizeof(dir) - 1);
	if (n > 0) {
		dir[n] = 0;
		slash = strrchr(dir, '/');
		if (slash)
			*slash = 0;
		/* The build tree. */
		if (snprintf(path, size, "%s/" PRELOAD_NAME, dir) < (int)size &&
		    !access(path, R_OK))
			return 0;
		if (preload_relative(dir, path, size) && !access(path, R_OK))
			return 0;
	}
	if (snprintf(path, size, "%s%s%s/kvmlet/" PRELOAD_NAME,
		     KVMLET_LIBDIR[0] == '/' ? "" : KVMLET_PREFIX,
		     KVMLET_LIBDIR[0] == '/' ? "" : "/", KVMLET_LIBDIR) < (int)size &&
	    !access(path, R_OK))
		return 0;
	if (loud)
		complain("cannot find " PRELOAD_NAME ", neither beside the kvmlet command nor at "
			 "%s; install kvmlet again, or build it with 'make'",
			 path);
	return EXIT_CANNOT_RUN;
}

/*
 * LD_PRELOAD: sanitizer runtimes first (they insist), then kvmlet, then what was there.
 */
static int set_preload(const char *lib, const struct program *prog, const struct program *libprog)
{
	const char *old = getenv("LD_PRELOAD");
	size_t size = strlen(lib) + (old ? strlen(old) : 0) + 2 * SANITIZERS_MAX * 66 + 3;
	char *value;
	int err;

	if (strpbrk(lib, ": \t\n")) {
		complain("the preload library's path '%s' contains a space or a colon, which "
			 "LD_PRELOAD cannot express; move kvmlet",
			 lib);
		return EXIT_CANNOT_RUN;
	}
	value = calloc(1, size);
	if (!value) {
		complain("out of memory");
		return EXIT_CANNOT_RUN;
	}
	for (unsigned i = 0; i < prog->nr_sanitizers; i++) {
		strcat(value, prog->sanitizers[i]);
		strcat(value, ":");
	}
	for (unsigned i = 0; i < libprog->nr_sanitizers; i++) {
		if (strstr(value, libprog->sanitizers[i]))
			continue;
		strcat(value, libprog->sanitizers[i]);
		strcat(value, ":");
	}
	strcat(value, lib);
	if (old && *old) {
		strcat(value, ":");
		strcat(value, old);
	}
	err = setenv("LD_PRELOAD", value, 1);
	free(value);
	if (err) {
		complain("cannot set LD_PRELOAD: %s", strerror(errno));
		return EXIT_CANNOT_RUN;
	}
	return 0;
}

/*
 * The program may change its directory or lose its rights before the library opens the
 * file: try now, and hand over an absolute path.
 */
static int set_file(const char *var, const char *option, const char *file)
{
	char path[PATH_MAX];
	int fd;

	fd = open(file, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOCTTY, 0666);
	if (fd < 0) {
		complain("%s: cannot write '%s': %s", option, file, strerror(errno));
		return EXIT_USAGE;
	}
	close(fd);
	if (!realpath(file, path)) {
		complain("%s: cannot resolve '%s': %s", option, file, strerror(errno));
		return EXIT_USAGE;
	}
	if (setenv(var, path, 1)) {
		complain("cannot set %s: %s", var, strerror(errno));
		return EXIT_CANNOT_RUN;
	}
	return 0;
}

/* Not later, in the middle of the program: is there such a userfaultfd? */
static int set_uffd_events(void)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP |
			    UFFD_FEATURE_EVENT_REMOVE,
	};
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);

	if (fd < 0 && errno == EINVAL)
		fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
	if (fd < 0 || ioctl(fd, UFFDIO_API, &api)) {
		complain("--uffd-events: this system gives no userfaultfd with events (%s); see "
			 "'kvmlet doctor'",
			 strerror(errno));
		return EXIT_CANNOT_RUN;
	}
	close(fd);
	return setenv("KVMLET_UFFD_EVENTS", "1", 1) ? EXIT_CANNOT_RUN : 0;
}

/* A parameter of KVM's modules, as modprobe takes it. */
static int set_param(const char *param)
{
	static const char name[] = "kvm.eager_page_split=";
	const char *value = param + sizeof(name) - 1;
	bool yes;

	if (strncmp(param, name, sizeof(name) - 1)) {
		complain("--param: only kvm.eager_page_split can be chosen, not '%s'", param);
		return EXIT_USAGE;
	}
	yes = !strcmp(value, "Y") || !strcmp(value, "y") || !strcmp(value, "1");
	if (!yes && strcmp(value, "N") && strcmp(value, "n") && strcmp(value, "0")) {
		complain("--param: kvm.eager_page_split is Y or N, not '%s'", value);
		return EXIT_USAGE;
	}
	return setenv("KVMLET_PARAMS", yes ? "kvm.eager_page_split=Y" : "kvm.eager_page_split=N", 1)
		       ? EXIT_CANNOT_RUN
		       : 0;
}

static int set_abi(const char *version)
{
	if (strcmp(version, "6.12") && strcmp(version, "6.18")) {
		complain("--abi is 6.12 or 6.18, not '%s'; see 'kvmlet help run'", version);
		return EXIT_USAGE;
	}
	return setenv("KVMLET_ABI", version, 1) ? EXIT_CANNOT_RUN : 0;
}

enum {
	OPT_LOG = 1,
	OPT_STATS,
	OPT_HEATMAP,
	OPT_PARAM,
	OPT_TRACE,
	OPT_KEEP_SECCOMP,
	OPT_UFFD_EVENTS,
	OPT_ABI
};

static const struct option options[] = {
	{"log", required_argument, NULL, OPT_LOG},
	{"stats", no_argument, NULL, OPT_STATS},
	{"heatmap", required_argument, NULL, OPT_HEATMAP},
	{"trace", required_argument, NULL, OPT_TRACE},
	{"keep-seccomp", no_argument, NULL, OPT_KEEP_SECCOMP},
	{"uffd-events", no_argument, NULL, OPT_UFFD_EVENTS},
	{"param", required_argument, NULL, OPT_PARAM},
	{"abi", required_argument, NULL, OPT_ABI},
	{"help", no_argument, NULL, 'h'},
	{0},
};

static int parse(int argc, char **argv)
{
	int c, err = 0;

	opterr = 0;
	while (!err && (c = getopt_long(argc, argv, "+:h", options, NULL)) != -1) {
		switch (c) {
		case OPT_LOG:
			err = set_file("KVMLET_LOG", "--log", optarg);
			break;
		case OPT_TRACE:
			err = set_file("KVMLET_TRACE", "--trace", optarg);
			break;
		case OPT_HEATMAP:
			err = set_file("KVMLET_HEATMAP", "--heatmap", optarg);
			break;
		case OPT_STATS:
			err = setenv("KVMLET_STATS", "1", 1) ? EXIT_CANNOT_RUN : 0;
			break;
		case OPT_KEEP_SECCOMP:
			err = setenv("KVMLET_KEEP_SECCOMP", "1", 1) ? EXIT_CANNOT_RUN : 0;
			break;
		case OPT_UFFD_EVENTS:
			err = set_uffd_events();
			break;
		case OPT_ABI:
			err = set_abi(optarg);
			break;
		case OPT_PARAM:
			err = set_param(optarg);
			break;
		case ':':
			complain("option '%s' needs %s; see 'kvmlet help run'", argv[optind - 1],
				 optopt == OPT_ABI     ? "a version"
				 : optopt == OPT_PARAM ? "a parameter"
						       : "a file name");
			return EXIT_USAGE;
		default:
			complain(
				"'%s' is not an option of 'kvmlet run'; see 'kvmlet help run'. The "
				"program's own options follow its name",
				argv[optind - 1]);
			return EXIT_USAGE;
		}
	}
	return err;
}

int cmd_run(int argc, char **argv)
{
	char path[PATH_MAX], lib[PATH_MAX];
	struct program prog, libprog;
	int err;

	err = parse(argc, argv);
	if (err)
		return err;
	if (optind >= argc) {
		complain("which program? usage: kvmlet run [OPTIONS] -- PROGRAM [ARGS]");
		return EXIT_USAGE;
	}
	err = find_preload(lib, sizeof(lib), true);
	if (!err)
		err = program_read(lib, &libprog);
	if (!err)
		err = program_check(argv[optind], path, sizeof(path), &prog);
	if (!err)
		err = set_preload(lib, &prog, &libprog);
	if (err)
		return err;
	if (prog.is_go)
		complain("warning: '%s' is a Go program; Go makes system calls without the C "
			 "library, so kvmlet sees only those of its C parts",
			 argv[optind]);

	execv(path, argv + optind);
	err = errno;
	complain("cannot execute '%s': %s", path, strerror(err));
	return err == ENOENT ? EXIT_NOT_FOUND : EXIT_CANNOT_RUN;
}
