/* SPDX-License-Identifier: MIT */
#include <dlfcn.h>
#include <errno.h>

#include "preload/real.h"

struct kl_real kl_real;

static long absent(void)
{
	errno = ENOSYS;
	return -1;
}

/*
 * Threads that meet here fill in the same values. Nothing below is wrapped but free(), which
 * is resolved first.
 */
void kl_real_resolve(void)
{
	int saved = errno;
	void *f;

#define X(ret, name, args)           \
	f = dlsym(RTLD_NEXT, #name); \
	if (!f)                      \
		f = (void *)absent;  \
	__atomic_store_n(&kl_real.name, (__typeof__(kl_real.name))f, __ATOMIC_RELAXED);
	KL_REALS(X)
#undef X
	errno = saved;
}
