/* SPDX-License-Identifier: MIT */
/*
 * The kvmlet command. It sets up the environment and replaces itself by the program: no
 * process of kvmlet's stays behind. Not linked with the engine.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>

/* Exit statuses: 2 for wrong usage; the two others are the shell's. */
#define EXIT_USAGE      2
#define EXIT_CANNOT_RUN 126
#define EXIT_NOT_FOUND  127

#define SANITIZERS_MAX 4

/* What an ELF file says about how it wants to be started. */
struct program {
	char interp[256];                    /* PT_INTERP; "" if none */
	char sanitizers[SANITIZERS_MAX][64]; /* runtimes among DT_NEEDED, in order */
	unsigned nr_sanitizers;
	bool is_elf;
	bool is_go;
};

/*
 * Read the ELF headers of @path.
 * Returns: 0, or an exit status after printing why the file cannot be used.
 */
int program_read(const char *path, struct program *prog);

/*
 * Find @name as execvp would, check that it can run with a preloaded library, follow
 * scripts to their interpreter, and describe what will run.
 * @path: the file to execute.
 * Returns: 0, or an exit status after printing the cause and what to do.
 */
int program_check(const char *name, char *path, size_t size, struct program *prog);

/* The preload library's absolute path. Returns: 0 or an exit status, reported if @loud. */
int find_preload(char *path, size_t size, bool loud);

int cmd_run(int argc, char **argv);
int cmd_doctor(int argc, char **argv);

/* "kvmlet: ..." on stderr. */
void complain(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
