/* SPDX-License-Identifier: MIT */
/*
 * Which file will run, and can the dynamic loader preload a library into it?
 *
 * The file is whatever the user names: nothing in it is trusted. It is read with pread, and
 * every offset and count in it is checked against what was read.
 */
#include "cli.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/xattr.h>
#include <unistd.h>

#define PHDRS_MAX     128
#define DYNS_MAX      4096
#define SCRIPT_LEVELS 5 /* the kernel's own limit */

static bool read_at(int fd, void *buf, size_t len, uint64_t off)
{
	return off <= INT64_MAX - len && pread(fd, buf, len, (off_t)off) == (ssize_t)len;
}

static const char *machine_name(unsigned machine)
{
	switch (machine) {
	case EM_386:
		return "32-bit x86";
	case EM_AARCH64:
		return "64-bit Arm";
	case EM_ARM:
		return "32-bit Arm";
	case EM_RISCV:
		return "RISC-V";
	case EM_PPC64:
		return "64-bit PowerPC";
	case EM_S390:
		return "IBM Z";
	default:
		return NULL;
	}
}

static bool is_sanitizer(const char *soname)
{
	static const char *const prefixes[] = {
		"libasan.so",       "libtsan.so",       "liblsan.so",        "libhwasan.so",
		"libclang_rt.asan", "libclang_rt.tsan", "libclang_rt.hwasan"};

	for (unsigned i = 0; i < sizeof(prefixes) / sizeof(prefixes[0]); i++)
		if (!strncmp(soname, prefixes[i], strlen(prefixes[i])))
			return !strpbrk(soname, ": \t\n");
	return false;
}

/* File offset of a virtual address. */
static bool addr_to_off(const Elf64_Phdr *ph, unsigned n, uint64_t addr, uint64_t *off)
{
	for (unsigned i = 0; i < n; i++) {
		if (ph[i].p_type != PT_LOAD || addr < ph[i].p_vaddr ||
		    addr - ph[i].p_vaddr >= ph[i].p_filesz)
			continue;
		*off = ph[i].p_offset + (addr - ph[i].p_vaddr);
		return true;
	}
	return false;
}

/* A string of the dynamic string table; names longer than @buf do not matter to us. */
static bool dyn_string(int fd, uint64_t strtab, uint64_t index, char *buf, size_t size)
{
	ssize_t n;

	if (index > UINT32_MAX || strtab > INT64_MAX - index)
		return false;
	n = pread(fd, buf, size, (off_t)(strtab + index));
	return n > 0 && memchr(buf, 0, (size_t)n);
}

/* DT_NEEDED and DT_SONAME. Returns whether the file is the dynamic loader itself. */
static bool read_dynamic(int fd, const Elf64_Phdr *ph, unsigned n, const Elf64_Phdr *dyn,
			 struct program *prog)
{
	uint64_t count = dyn->p_filesz / sizeof(Elf64_Dyn), addr, strtab = 0;
	bool loader = false;
	Elf64_Dyn *d;
	char name[64];

	if (count > DYNS_MAX)
		count = DYNS_MAX;
	d = calloc(count + 1, sizeof(*d)); /* the last entry is DT_NULL */
	if (!d || !read_at(fd, d, count * sizeof(*d), dyn->p_offset)) {
		free(d);
		return false;
	}
	for (uint64_t i = 0; d[i].d_tag != DT_NULL; i++) {
		if (d[i].d_tag != DT_STRTAB)
			continue;
		addr = d[i].d_un.d_ptr;
		if (!addr_to_off(ph, n, addr, &strtab))
			strtab = 0;
	}
	for (uint64_t i = 0; strtab && d[i].d_tag != DT_NULL; i++) {
		if (d[i].d_tag != DT_NEEDED && d[i].d_tag != DT_SONAME)
			continue;
		if (!dyn_string(fd, strtab, d[i].d_un.d_val, name, sizeof(name)))
			continue;
		if (d[i].d_tag == DT_SONAME)
			loader = !strncmp(name, "ld-linux", 8);
		else if (is_sanitizer(name) && prog->nr_sanitizers < SANITIZERS_MAX)
			strcpy(prog->sanitizers[prog->nr_sanitizers++], name);
	}
	free(d);
	return loader;
}

/* Go's toolchain marks its programs with a note of owner "Go". */
static bool has_go_note(int fd, const Elf64_Phdr *note)
{
	unsigned char buf[4096];
	size_t len = note->p_filesz < sizeof(buf) ? note->p_filesz : sizeof(buf), pos = 0;
	Elf64_Nhdr nh;

	if (!read_at(fd, buf, len, note->p_offset))
		return false;
	while (len - pos >= sizeof(nh)) {
		uint64_t step;

		memcpy(&nh, buf + pos, sizeof(nh));
		if (nh.n_namesz == 4 && len - pos >= sizeof(nh) + 4 &&
		    !memcmp(buf + pos + sizeof(nh), "Go\0", 4))
			return true;
		step = sizeof(nh) + ((nh.n_namesz + 3ull) & ~3ull) + ((nh.n_descsz + 3ull) & ~3ull);
		if (step > len - pos)
			return false;
		pos += step;
	}
	return false;
}

static int check_ident(const char *path, const Elf64_Ehdr *eh)
{
	const char *what;

	if (eh->e_ident[EI_DATA] == ELFDATA2LSB && eh->e_machine == EM_X86_64 &&
	    eh->e_ident[EI_CLASS] == ELFCLASS64)
		return 0;
	if (eh->e_ident[EI_DATA] == ELFDATA2LSB && eh->e_machine == EM_X86_64)
		what = "the x32 ABI";
	else
		what = eh->e_ident[EI_DATA] == ELFDATA2LSB ? machine_name(eh->e_machine) : NULL;
	if (what)
		complain("'%s' is a program for %s; kvmlet runs 64-bit x86 programs only. Use a "
			 "build of it for x86-64",
			 path, what);
	else
		complain("'%s' is a program for another architecture (ELF machine %u); kvmlet runs "
			 "64-bit x86 programs only. Use a build of it for x86-64",
			 path, eh->e_machine);
	return EXIT_CANNOT_RUN;
}

static int read_elf(const char *path, int fd, const Elf64_Ehdr *eh, struct program *prog)
{
	Elf64_Phdr ph[PHDRS_MAX];
	bool loader = false;
	int err;

	prog->is_elf = true;
	err = check_ident(path, eh);
	if (err)
		return err;
	if (eh->e_phentsize != sizeof(ph[0]) || !eh->e_phnum || eh->e_phnum > PHDRS_MAX ||
	    !read_at(fd, ph, eh->e_phnum * sizeof(ph[0]), eh->e_phoff)) {
		complain("'%s' is damaged: its ELF program headers cannot be read", path);
		return EXIT_CANNOT_RUN;
	}
	for (unsigned i = 0; i < eh->e_phnum; i++) {
		if (ph[i].p_type == PT_INTERP) {
			size_t len = ph[i].p_filesz;

			if (!len || len >= sizeof(prog->interp) ||
			    !read_at(fd, prog->interp, len, ph[i].p_offset)) {
				complain("'%s' is damaged: it names no usable program interpreter",
					 path);
				return EXIT_CANNOT_RUN;
			}
		} else if (ph[i].p_type == PT_DYNAMIC) {
			loader = read_dynamic(fd, ph, eh->e_phnum, &ph[i], prog);
		} else if (ph[i].p_type == PT_NOTE) {
			prog->is_go = prog->is_go || has_go_note(fd, &ph[i]);
		}
	}
	if (!prog->interp[0] && loader) /* ld.so PROGRAM: it preloads as usual */
		strcpy(prog->interp, "itself");
	return 0;
}

int program_read(const char *path, struct program *prog)
{
	Elf64_Ehdr eh;
	int fd, err = 0;

	memset(prog, 0, sizeof(*prog));
	fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
	if (fd < 0) {
		complain("cannot read '%s': %s; kvmlet must look at a program before it runs it",
			 path, strerror(errno));
		return EXIT_CANNOT_RUN;
	}
	if (read_at(fd, &eh, sizeof(eh), 0) && !memcmp(eh.e_ident, ELFMAG, SELFMAG))
		err = read_elf(path, fd, &eh, prog);
	close(fd);
	return err;
}

/* "#!interpreter arg": the interpreter, or "" if @path is no script. */
static void read_shebang(const char *path, char *interp, size_t size)
{
	char line[PATH_MAX + 1];
	ssize_t n = -1;
	char *p;
	int fd;

	*interp = 0;
	fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
	if (fd >= 0) {
		n = pread(fd, line, sizeof(line) - 1, 0);
		close(fd);
	}
	if (n < 3 || memcmp(line, "#!", 2))
		return;
	line[n] = 0;
	line[strcspn(line, "\n")] = 0;
	p = line + 2 + strspn(line + 2, " \t");
	p[strcspn(p, " \t\r")] = 0;
	snprintf(interp, size, "%s", p);
}

/*
 * Does running the file raise privileges? Then the loader ignores LD_PRELOAD. The same
 * conditions as the kernel's: an identity that changes, and nothing that suppresses it.
 */
static const char *privileged(const char *path, const struct stat *st)
{
	struct statvfs fs;
	char caps[64];

	if (prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1)
		return NULL;
	if (!statvfs(path, &fs) && (fs.f_flag & ST_NOSUID))
		return NULL;
	if ((st->st_mode & S_ISUID) && st->st_uid != getuid())
		return "setuid";
	if ((st->st_mode & S_ISGID) && (st->st_mode & S_IXGRP) && st->st_gid != getgid())
		return "setgid";
	if (getuid() && getxattr(path, "security.capability", caps, sizeof(caps)) > 0)
		return "given file capabilities";
	return NULL;
}

static int check_file(const char *path, const struct stat *st)
{
	const char *how;

	if (S_ISDIR(st->st_mode)) {
		complain("'%s' is a directory, not a program", path);
		return EXIT_CANNOT_RUN;
	}
	if (!S_ISREG(st->st_mode)) {
		complain("'%s' is not a regular file, so it cannot be executed", path);
		return EXIT_CANNOT_RUN;
	}
	if (access(path, X_OK)) {
		complain("'%s' is not executable: %s; if it is a program, 'chmod +x' makes it one",
			 path, strerror(errno));
		return EXIT_CANNOT_RUN;
	}
	how = privileged(path, st);
	if (how) {
		complain("'%s' is %s, and the dynamic loader preloads nothing into such programs. "
			 "kvmlet needs no privilege: run a plain copy of it (cp '%s' . && kvmlet "
			 "run "
			 "-- ./...), or run kvmlet as the user that the program would become",
			 path, how, path);
		return EXIT_CANNOT_RUN;
	}
	return 0;
}

static int check_elf(const char *path, const struct program *prog)
{
	const char *base = strrchr(prog->interp, '/');

	base = base ? base + 1 : prog->interp;
	if (!prog->interp[0]) {
		complain("'%s' is statically linked: no library can be preloaded into it. Link it "
			 "dynamically (without -static and -static-pie)",
			 path);
		return EXIT_CANNOT_RUN;
	}
	if (!strncmp(base, "ld-musl", 7)) {
		complain("'%s' is linked with musl libc; kvmlet's preload library needs glibc. Use "
			 "a glibc build of it",
			 path);
		return EXIT_CANNOT_RUN;
	}
	if (prog->interp[0] == '/' && access(prog->interp, X_OK)) {
		complain(
			"'%s' needs the dynamic loader '%s': %s; install the C library that it was "
			"built for",
			path, prog->interp, strerror(errno));
		return EXIT_CANNOT_RUN;
	}
	return 0;
}

static int check(const char *file, struct program *prog)
{
	char path[PATH_MAX], interp[PATH_MAX];
	struct stat st;
	int err;

	snprintf(path, sizeof(path), "%s", file);
	for (int level = 0; level < SCRIPT_LEVELS; level++) {
		if (stat(path, &st)) {
			complain("'%s' names the interpreter '%s': %s", file, path,
				 strerror(errno));
			return EXIT_CANNOT_RUN;
		}
		err = check_file(path, &st);
		if (!err)
			err = program_read(path, prog);
		if (err)
			return err;
		if (prog->is_elf)
			return check_elf(path, prog);
		read_shebang(path, interp, sizeof(interp));
		if (!*interp) {
			complain("'%s' is neither an ELF program nor a script that begins with "
				 "'#!'; "
				 "for a shell script say: kvmlet run -- sh %s",
				 path, path);
			return EXIT_CANNOT_RUN;
		}
		strcpy(path, interp);
	}
	complain("'%s' is a script whose interpreters are scripts without end", file);
	return EXIT_CANNOT_RUN;
}

/* As execvp: the first executable of PATH; one that is not executable is remembered. */
static int search(const char *name, char *path, size_t size)
{
	const char *dirs = getenv("PATH");
	char found[PATH_MAX] = "";
	struct stat st;

	if (!dirs)
		dirs = "/bin:/usr/bin";
	for (const char *p = dirs;; p++) {
		size_t len = strcspn(p, ":");
		int n = snprintf(path, size, "%.*s%s%s", (int)len, p, len ? "/" : "./", name);

		if (n > 0 && (size_t)n < size && !stat(path, &st) && S_ISREG(st.st_mode)) {
			if (!access(path, X_OK))
				return 0;
			if (!*found)
				strcpy(found, path);
		}
		p += len;
		if (!*p)
			break;
	}
	if (*found) {
		complain("'%s' is not executable; if it is a program, 'chmod +x' makes it one",
			 found);
		return EXIT_CANNOT_RUN;
	}
	complain("program '%s' not found in PATH%s", name,
		 stat(name, &st)
			 ? "; check the name, or give its path"
			 : ", but there is one in this directory: say './' before its name");
	return EXIT_NOT_FOUND;
}

int program_check(const char *name, char *path, size_t size, struct program *prog)
{
	struct stat st;
	int err;

	if (!*name) {
		complain("the program's name is empty");
		return EXIT_NOT_FOUND;
	}
	if (strlen(name) >= size) {
		complain("the program's name is too long");
		return EXIT_NOT_FOUND;
	}
	if (!strchr(name, '/')) {
		err = search(name, path, size);
		if (err)
			return err;
	} else {
		strcpy(path, name);
		if (stat(path, &st)) {
			err = errno;
			complain("program '%s' not found: %s; check the path", name, strerror(err));
			return err == ENOENT || err == ENOTDIR ? EXIT_NOT_FOUND : EXIT_CANNOT_RUN;
		}
	}
	return check(path, prog);
}
