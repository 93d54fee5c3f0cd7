/* SPDX-License-Identifier: MIT */
/* Stands in for the preload library: shows that it was loaded, and with which settings. */
#include <stdio.h>
#include <stdlib.h>

static void show(const char *name)
{
	const char *value = getenv(name);

	if (value)
		printf("%s=%s\n", name, value);
}

static void __attribute__((constructor)) loaded(void)
{
	printf("dummy preloaded\n");
	show("LD_PRELOAD");
	show("KVMLET_LOG");
	show("KVMLET_TRACE");
	show("KVMLET_STATS");
	show("KVMLET_HEATMAP");
	show("KVMLET_PARAMS");
	show("KVMLET_KEEP_SECCOMP");
	show("KVMLET_UFFD_EVENTS");
	show("KVMLET_ABI");
	fflush(stdout);
}
