/* SPDX-License-Identifier: MIT */
/* The kvmlet command: dispatch, help, version. */
#include "cli.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static const char help_main[] =
	"kvmlet: KVM in userspace, for programs on machines without /dev/kvm\n"
	"\n"
	"  kvmlet run [OPTIONS] -- PROGRAM [ARGS]   run a KVM program on kvmlet's /dev/kvm\n"
	"  kvmlet doctor                            what this machine offers\n"
	"  kvmlet help [run|doctor]                 more about a command\n"
	"  kvmlet --version\n";

static const char help_run[] =
	"usage: kvmlet run [OPTIONS] [--] PROGRAM [ARGS]\n"
	"\n"
	"Runs PROGRAM, unmodified, with kvmlet's /dev/kvm. A real /dev/kvm is never used, even\n"
	"where there is one. kvmlet replaces itself by PROGRAM: the exit status is PROGRAM's.\n"
	"\n"
	"  --stats          print a table at exit, on stderr: VMs, vCPUs, exits, faults,\n"
	"                   invalidations, instructions, MIPS\n"
	"  --heatmap FILE   draw FILE, an SVG: which guest memory is written how fast, over time;\n"
	"                   and print a summary at exit, on stderr\n"
	"  --log FILE       write warnings and errors to FILE instead of stderr\n"
	"  --trace FILE     write every ioctl, exit and memory event to FILE, one per line\n"
	"  --abi=6.18       also KVM interfaces that Linux 6.12 lacks (default: 6.12)\n"
	"  --param NAME=VALUE  a parameter of KVM's modules for PROGRAM and what it runs:\n"
	"                   kvm.eager_page_split=Y splits large pages when logging begins\n"
	"  --keep-seccomp   install the program's own seccomp filters (default: accept and\n"
	"                   leave out, because they lack system calls that kvmlet needs)\n"
	"  --uffd-events    learn of changes of guest memory that bypass the C library from\n"
	"                   userfaultfd events, too\n"
	"  --help           this text\n"
	"\n"
	"Exit status: PROGRAM's, or 2 for wrong usage, 126 if PROGRAM cannot be run on kvmlet,\n"
	"127 if it was not found.\n";

static const char help_doctor[] =
	"usage: kvmlet doctor\n"
	"\n"
	"Reports what this machine offers: /dev/kvm, userfaultfd, membarrier, memory limits,\n"
	"executable memory, CPU features. Exit status 1 if something that kvmlet cannot do\n"
	"without is missing.\n";

void complain(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	fputs("kvmlet: ", stderr);
	vfprintf(stderr, fmt, ap);
	fputc('\n', stderr);
	va_end(ap);
}

static int help(const char *topic)
{
	if (!topic)
		fputs(help_main, stdout);
	else if (!strcmp(topic, "run"))
		fputs(help_run, stdout);
	else if (!strcmp(topic, "doctor"))
		fputs(help_doctor, stdout);
	else {
		complain("no help on '%s'; there is 'kvmlet help run' and 'kvmlet help doctor'",
			 topic);
		return EXIT_USAGE;
	}
	return 0;
}

int main(int argc, char **argv)
{
	const char *cmd = argc > 1 ? argv[1] : "";

	if (!strcmp(cmd, "run")) {
		if (argc > 2 && (!strcmp(argv[2], "--help") || !strcmp(argv[2], "-h")))
			return help("run");
		return cmd_run(argc - 1, argv + 1);
	}
	if (!strcmp(cmd, "doctor")) {
		if (argc > 2 && (!strcmp(argv[2], "--help") || !strcmp(argv[2], "-h")))
			return help("doctor");
		return cmd_doctor(argc - 1, argv + 1);
	}
	if (!strcmp(cmd, "help") || !strcmp(cmd, "--help") || !strcmp(cmd, "-h"))
		return help(argc > 2 ? argv[2] : NULL);
	if (!strcmp(cmd, "--version") || !strcmp(cmd, "-V")) {
		puts("kvmlet " KVMLET_VERSION);
		return 0;
	}
	if (!*cmd)
		fputs(help_main, stderr);
	else
		complain("'%s' is not a command; see 'kvmlet --help'", cmd);
	return EXIT_USAGE;
}
