/* SPDX-License-Identifier: MIT */
/* The guest's TSC: scaling, offset, and what keeps the vCPUs of a VM in step. */
#include "x86/tsc.h"

#include <errno.h>

uint64_t kl_x86_tsc(struct kl_vcpu *v)
{
	return kl_tsc_scale(v, kl_host_tsc()) + v->tsc_offset;
}

uint64_t kl_tsc_to_host(const struct kl_vcpu *v, uint64_t guest)
{
	uint64_t host, now;
	bool past;

	if (v->tsc_ratio == KL_TSC_ONE)
		return guest - v->tsc_offset;
	host = kl_host_tsc();
	now = kl_tsc_scale(v, host) + v->tsc_offset;
	past = (int64_t)(guest - now) < 0;
	guest = past ? now - guest : guest - now;
	guest = (uint64_t)(((unsigned __int128)guest << KL_TSC_FRAC) / v->tsc_ratio);
	return past ? host - guest : host + guest;
}

static uint64_t max_khz(const struct kl_x86_vm *vm)
{
	uint64_t max = (uint64_t)((unsigned __int128)KL_TSC_MAX * vm->tsc_khz >> KL_TSC_FRAC);

	return kl_min(max, (uint64_t)KL_TSC_MAX_KHZ);
}

bool kl_tsc_khz_valid(const struct kl_x86_vm *vm, uint32_t khz)
{
	return khz < max_khz(vm);
}

int kl_tsc_set_khz(struct kl_vcpu *v, uint32_t khz)
{
	uint64_t host = v->kvm->tsc_khz, slack = host * KL_TSC_PPM / 1000000, ratio = KL_TSC_ONE;

	if (!kl_tsc_khz_valid(v->kvm, khz))
		return -EINVAL;
	if (!khz)
		khz = (uint32_t)host;
	if (khz < host - slack || khz > host + slack)
		ratio = (uint64_t)(((unsigned __int128)khz << KL_TSC_FRAC) / host);
	if (!ratio || ratio >= KL_TSC_MAX)
		return -EINVAL;
	v->tsc_khz = khz;
	v->tsc_ratio = ratio;
	return 0;
}

/* Context: tsc_lock. @matched: the offset is that of the vCPUs which are in sync. */
static void set_offset(struct kl_vcpu *v, uint64_t offset, uint64_t data, uint64_t host,
		       bool matched)
{
	struct kl_x86_vm *vm = v->kvm;

	vm->tsc_last_write = data;
	vm->tsc_last_host = host;
	vm->tsc_last_khz = v->tsc_khz;
	vm->tsc_last_offset = offset;
	v->tsc_offset = offset;
	if (!matched) {
		vm->tsc_offset = offset;
		vm->tsc_generation++;
		atomic_store(&vm->tsc_nr_matched, 0);
	} else if (v->tsc_generation != vm->tsc_generation) {
		atomic_fetch_add(&vm->tsc_nr_matched, 1);
	}
	v->tsc_generation = vm->tsc_generation;
}

bool kl_tsc_matched(const struct kl_x86_vm *vm)
{
	return atomic_load(&vm->tsc_nr_matched) + 1 == atomic_load(&vm->mem.nr_vcpus);
}

void kl_tsc_synchronize(struct kl_vcpu *v, const uint64_t *user_value)
{
	struct kl_x86_vm *vm = v->kvm;
	uint64_t host, offset, data = user_value ? *user_value : 0;
	bool sync = false;

	kl_mutex_lock(&vm->tsc_lock);
	host = kl_host_tsc();
	offset = data - kl_tsc_scale(v, host);
	if (!data) {
		sync = true;
	} else if (vm->tsc_user_set) {
		/* Within a second of what the other vCPUs would show: meant to be equal. */
		uint64_t expected = vm->tsc_last_write + kl_tsc_scale(v, host - vm->tsc_last_host);
		uint64_t second = (uint64_t)v->tsc_khz * 1000;

		sync = data < expected + second && data + second > expected;
	}
	if (user_value)
		vm->tsc_user_set = true;
	/* Nobody was seen before: the last rate is 0. */
	sync = sync && vm->tsc_last_khz == v->tsc_khz;
	set_offset(v, sync ? vm->tsc_offset : offset, data, host, sync);
	kl_mutex_unlock(&vm->tsc_lock);
}

void kl_tsc_set_offset(struct kl_vcpu *v, uint64_t offset)
{
	struct kl_x86_vm *vm = v->kvm;
	uint64_t host;
	bool matched;

	kl_mutex_lock(&vm->tsc_lock);
	host = kl_host_tsc();
	matched = vm->tsc_last_khz == v->tsc_khz && vm->tsc_last_offset == offset;
	vm->tsc_user_set = true;
	set_offset(v, offset, kl_tsc_scale(v, host) + offset, host, matched);
	kl_mutex_unlock(&vm->tsc_lock);
}

void kl_tsc_guest_write(struct kl_vcpu *v, uint64_t data)
{
	uint64_t delta = data - kl_x86_tsc(v);

	v->tsc_offset += delta;
	v->msr_tsc_adjust += delta;
}
