/* SPDX-License-Identifier: MIT */
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "base/config.h"
#include "base/log.h"

struct kl_config kl_config;

static bool env_set(const char *name)
{
	const char *v = getenv(name);

	return v && *v && !(v[0] == '0' && !v[1]);
}

static bool env_is(const char *name, const char *value)
{
	const char *v = getenv(name);

	return v && !strcmp(v, value);
}

static const char *env_path(const char *name)
{
	const char *v = getenv(name);

	return v && *v ? v : NULL;
}

/* interp, translate, check; with :N or :N:KIB. */
static void vcpu(const char *how)
{
	size_t n = how ? strcspn(how, ":") : 0;
	char *end = NULL;

	kl_config.translate = true;
	kl_config.translate_after = UINT_MAX;
	if (!n)
		return;
	kl_config.check = n == 5 && !strncmp(how, "check", n);
	if (n == 6 && !strncmp(how, "interp", n))
		kl_config.translate = false;
	else if (!kl_config.check && (n != 9 || strncmp(how, "translate", n)))
		kl_log(KL_LOG_WARN, "KVMLET_VCPU=%s: neither interp, translate nor check", how);
	if (!how[n])
		return;
	kl_config.translate_after = (unsigned)strtoul(how + n + 1, &end, 10);
	if (*end == ':') {
		/* Of code not less than a part needs. */
		kl_config.block_part = (unsigned)strtoul(end + 1, NULL, 10) * (1024 / 8);
		kl_config.block_part = kl_max(kl_config.block_part & ~15u, 4096u);
		kl_config.code_part = 256 << 10;
	}
}

void kl_config_init(void)
{
	static bool done;

	if (done)
		return;
	done = true;
	kl_config.log_path = env_path("KVMLET_LOG");
	kl_config.trace_path = env_path("KVMLET_TRACE");
	kl_config.heatmap_path = env_path("KVMLET_HEATMAP");
	kl_config.stats = env_set("KVMLET_STATS");
	kl_config.keep_seccomp = env_set("KVMLET_KEEP_SECCOMP");
	kl_config.uffd_events = env_set("KVMLET_UFFD_EVENTS");
	kl_config.eager_page_split = env_is("KVMLET_PARAMS", "kvm.eager_page_split=Y");
	kl_config.abi_6_18 = env_is("KVMLET_ABI", "6.18");
	kl_log_init();
	vcpu(getenv("KVMLET_VCPU"));
}
