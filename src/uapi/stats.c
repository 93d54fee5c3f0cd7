/* SPDX-License-Identifier: MIT */
/*
 * Statistics: the files of KVM_GET_STATS_FD [api.rst 4.134] and the table of --stats. Both
 * read the same counters (base/stats.def); the table adds up all VMs of the process, those
 * that are gone included.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "host/guard.h"
#include "host/sys.h"
#include "mem/gpc.h"
#include "uapi/object.h"

#define MAX_STATS 64
_Static_assert(sizeof(struct kl_vm_stats) <= MAX_STATS * sizeof(kl_stat_t), "room for all");
_Static_assert(sizeof(struct kl_vcpu_stats) <= MAX_STATS * sizeof(kl_stat_t), "room for all");

struct stats_desc {
	struct kvm_stats_desc head;
	char name[KL_STATS_NAME_SIZE];
};
_Static_assert(sizeof(struct stats_desc) == sizeof(struct kvm_stats_desc) + KL_STATS_NAME_SIZE,
	       "ABI");

/* ---- the file ---------------------------------------------------------------------- */

/* Header, name, descriptors, data: laid out in this order without gaps. */
struct stats_file {
	struct kvm_stats_header head;
	char id[KL_STATS_NAME_SIZE];
	struct stats_desc desc[MAX_STATS];
};

static unsigned nr_stats(const struct kl_ustats *s)
{
	return s->vcpu ? kl_vcpu_nr_stats : kl_vm_nr_stats;
}

static size_t head_size(unsigned n)
{
	return offsetof(struct stats_file, desc) + n * sizeof(struct stats_desc);
}

static void build_head(const struct kl_ustats *s, struct stats_file *f)
{
	const struct kl_stat_desc *d = s->vcpu ? kl_vcpu_stat_descs : kl_vm_stat_descs;
	unsigned n = nr_stats(s);

	memset(f, 0, sizeof(*f));
	f->head.name_size = KL_STATS_NAME_SIZE;
	f->head.num_desc = n;
	f->head.id_offset = offsetof(struct stats_file, id);
	f->head.desc_offset = offsetof(struct stats_file, desc);
	f->head.data_offset = (uint32_t)head_size(n);
	if (s->vcpu)
		snprintf(f->id, sizeof(f->id), "kvm-%d/vcpu-%u", s->vm->obj.owner, s->vcpu->id);
	else
		snprintf(f->id, sizeof(f->id), "kvm-%d", s->vm->obj.owner);
	for (unsigned i = 0; i < n; i++) {
		f->desc[i].head.flags = KVM_STATS_UNIT_NONE | KVM_STATS_BASE_POW10 |
					(d[i].kind == KL_STAT_INSTANT ? KVM_STATS_TYPE_INSTANT
								      : KVM_STATS_TYPE_CUMULATIVE);
		f->desc[i].head.size = 1;
		f->desc[i].head.offset = d[i].offset;
		snprintf(f->desc[i].name, sizeof(f->desc[i].name), "%s", d[i].name);
	}
}

static void snapshot(const struct kl_ustats *s, uint64_t *data)
{
	const struct kl_stat_desc *d = s->vcpu ? kl_vcpu_stat_descs : kl_vm_stat_descs;
	const void *base =
		s->vcpu ? (void *)&s->vcpu->v->core.stats : (void *)&s->vm->kvm.mem.stats;

	if (!s->vcpu)
		kl_gpc_count_hits(&s->vm->kvm.mem);
	for (unsigned i = 0; i < nr_stats(s); i++)
		data[d[i].offset / sizeof(*data)] =
			kl_stat_get((const kl_stat_t *)((const char *)base + d[i].offset));
}

/* Of a piece [at, at + size) of the file, what the request [pos, pos + len) wants. */
static int copy_piece(char *to, size_t len, uint64_t pos, const void *piece, uint64_t at,
		      size_t size)
{
	uint64_t from = kl_max(pos, at), end = kl_min(pos + len, at + size);

	if (from >= end)
		return 0;
	return kl_copy_to_user(to + (from - pos), (const char *)piece + (from - at), end - from);
}

ssize_t kl_stats_read(struct kl_ustats *s, void *buf, size_t len, off_t *ppos)
{
	unsigned n = nr_stats(s);
	uint64_t pos = (uint64_t)*ppos, size = head_size(n) + n * sizeof(uint64_t);
	uint64_t data[MAX_STATS];

	if (pos >= size)
		return 0;
	len = kl_min(len, size - pos);
	if (pos < head_size(n)) {
		struct stats_file *f = malloc(sizeof(*f));
		int r = -ENOMEM;

		if (f) {
			build_head(s, f);
			r = copy_piece(buf, len, pos, f, 0, head_size(n));
		}
		free(f);
		if (r)
			return r;
	}
	snapshot(s, data);
	if (copy_piece(buf, len, pos, data, head_size(n), n * sizeof(uint64_t)))
		return -EFAULT;
	*ppos = (off_t)(pos + len);
	return (ssize_t)len;
}

int kl_stats_open(struct kl_uvm *vm, struct kl_uvcpu *vc, struct kl_object **new_obj)
{
	struct kl_ustats *s;
	char name[32];
	int fd;

	s = calloc(1, sizeof(*s));
	if (!s)
		return -ENOMEM;
	s->vm = vm;
	s->vcpu = vc;
	kl_mutex_init(&s->lock, KL_RANK_LEAF);
	if (vc)
		snprintf(name, sizeof(name), "kvm-vcpu-stats:%u", vc->id);
	else
		snprintf(name, sizeof(name), "kvm-vm-stats");
	fd = kl_object_open(&s->obj, KL_OBJ_STATS, name, 0, O_RDONLY | O_CLOEXEC);
	if (fd < 0) {
		kl_mutex_destroy(&s->lock);
		free(s);
		return fd;
	}
	kl_object_get(&vm->obj);
	kl_object_publish(&s->obj);
	*new_obj = &s->obj;
	return fd;
}

/* ---- --stats ----------------------------------------------------------------------- */

struct kl_uvm *kl_uvms;

/* What destroyed VMs have left behind. kl_objects_lock. */
static struct totals {
	uint64_t vm[MAX_STATS], vcpu[MAX_STATS];
	uint64_t by_reason[KL_NR_EXIT_REASONS];
	uint64_t run_ns;
} gone;
static _Atomic uint64_t nr_vms, nr_vcpus;
static bool forked;

static void add_up(uint64_t *to, const struct kl_stat_desc *d, unsigned n, const void *base,
		   bool dying)
{
	for (unsigned i = 0; i < n; i++) {
		/* A current value ends with its owner. */
		if (dying && d[i].kind == KL_STAT_INSTANT)
			continue;
		to[i] += kl_stat_get((const kl_stat_t *)((const char *)base + d[i].offset));
	}
}

static void add_vm(struct totals *t, struct kl_uvm *vm, bool dying)
{
	kl_gpc_count_hits(&vm->kvm.mem);
	add_up(t->vm, kl_vm_stat_descs, kl_vm_nr_stats, &vm->kvm.mem.stats, dying);
	/* A dying VM's list is nobody else's. A living one's may be held by a thread that is gone.
	 */
	if (!dying && !kl_mutex_trylock(&vm->kvm.lock))
		return;
	for (struct kl_uvcpu *vc = vm->vcpus; vc; vc = vc->next) {
		if (!vc->v)
			continue;
		add_up(t->vcpu, kl_vcpu_stat_descs, kl_vcpu_nr_stats, &vc->v->core.stats, dying);
		for (unsigned i = 0; i < KL_NR_EXIT_REASONS; i++)
			t->by_reason[i] += kl_stat_get(&vc->counts.by_reason[i]);
		t->run_ns += kl_stat_get(&vc->counts.run_ns);
	}
	if (!dying)
		kl_mutex_unlock(&vm->kvm.lock);
}

void kl_stats_retire(struct kl_uvm *vm)
{
	add_vm(&gone, vm, true);
}

void kl_stats_count_vm(void)
{
	atomic_fetch_add_explicit(&nr_vms, 1, memory_order_relaxed);
}

void kl_stats_count_vcpu(void)
{
	atomic_fetch_add_explicit(&nr_vcpus, 1, memory_order_relaxed);
}

void kl_stats_after_fork(void)
{
	kl_uvms = NULL;
	memset(&gone, 0, sizeof(gone));
	atomic_store(&nr_vms, 0);
	atomic_store(&nr_vcpus, 0);
	forked = true;
}

struct out {
	int fd;
	size_t n;
	char buf[8192];
};

/* @n: what snprintf() returned. */
static void advance(struct out *o, int n)
{
	if (n > 0)
		o->n = kl_min(o->n + (size_t)n, sizeof(o->buf) - 1);
}

static void put_row(struct out *o, const char *name, uint64_t value)
{
	advance(o, snprintf(o->buf + o->n, sizeof(o->buf) - o->n, "  %-28s %20llu\n", name,
			    (unsigned long long)value));
}

static void put_title(struct out *o, const char *title)
{
	advance(o, snprintf(o->buf + o->n, sizeof(o->buf) - o->n, "%s\n", title));
}

static uint64_t mips(const struct totals *t)
{
	for (unsigned i = 0; i < kl_vcpu_nr_stats; i++) {
		if (!strcmp(kl_vcpu_stat_descs[i].name, "instructions"))
			return t->run_ns ? t->vcpu[i] * 1000 / t->run_ns : 0;
	}
	return 0;
}

/*
 * At exit, perhaps out of the middle of anything: if some thread holds the lock for good,
 * what destroyed VMs left is printed without the living.
 */
void kl_uapi_print_stats(int fd)
{
	bool locked = kl_mutex_trylock(&kl_objects_lock);
	struct totals t = gone;
	struct out o = {.fd = fd};

	/* A child that only inherited /dev/kvm has nothing to tell. */
	if (forked && !atomic_load(&nr_vms)) {
		if (locked)
			kl_mutex_unlock(&kl_objects_lock);
		return;
	}
	for (struct kl_uvm *vm = locked ? kl_uvms : NULL; vm; vm = vm->next)
		add_vm(&t, vm, false);
	if (locked)
		kl_mutex_unlock(&kl_objects_lock);
	put_title(&o, "kvmlet statistics");
	put_row(&o, "VMs", atomic_load(&nr_vms));
	put_row(&o, "vCPUs", atomic_load(&nr_vcpus));
	put_row(&o, "MIPS", mips(&t));
	put_title(&o, "exits to the program");
	for (unsigned i = 0; i < KL_NR_EXIT_REASONS; i++) {
		char name[40];

		if (!t.by_reason[i])
			continue;
		snprintf(name, sizeof(name), "%s", kl_exit_name(i));
		put_row(&o, name, t.by_reason[i]);
	}
	put_title(&o, "VM counters");
	for (unsigned i = 0; i < kl_vm_nr_stats; i++)
		put_row(&o, kl_vm_stat_descs[i].name, t.vm[i]);
	put_title(&o, "vCPU counters");
	for (unsigned i = 0; i < kl_vcpu_nr_stats; i++)
		put_row(&o, kl_vcpu_stat_descs[i].name, t.vcpu[i]);
	kl_sys(SYS_write, o.fd, o.buf, o.n);
}
