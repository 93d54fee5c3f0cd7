/* SPDX-License-Identifier: MIT */
#include "base/stats.h"

#define KL_VM_STAT(f, n, k) {n, KL_STAT_##k, offsetof(struct kl_vm_stats, f)},
const struct kl_stat_desc kl_vm_stat_descs[] = {
#include "base/stats.def"
};

#define KL_VCPU_STAT(f, n, k) {n, KL_STAT_##k, offsetof(struct kl_vcpu_stats, f)},
const struct kl_stat_desc kl_vcpu_stat_descs[] = {
#include "base/stats.def"
};

const unsigned kl_vm_nr_stats = KL_ARRAY_SIZE(kl_vm_stat_descs);
const unsigned kl_vcpu_nr_stats = KL_ARRAY_SIZE(kl_vcpu_stat_descs);
