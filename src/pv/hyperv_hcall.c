/* SPDX-License-Identifier: MIT */
/*
 * Hyper-V's hypercalls. The input value has the number of the call, how its arguments come (in
 * registers, "fast", or in memory) and how many repetitions there are; the result has a status.
 *
 * They run in the instruction, out of guest mode for what may sleep.
 */
#include <errno.h>
#include <sched.h>
#include <string.h>

#include "pv/pv.h"
#include "x86/access.h"
#include "x86/lapic.h"

enum code {
	FLUSH_SPACE = 0x0002,
	FLUSH_LIST = 0x0003,
	LONG_SPIN_WAIT = 0x0008,
	SEND_IPI = 0x000b,
	FLUSH_SPACE_EX = 0x0013,
	FLUSH_LIST_EX = 0x0014,
	SEND_IPI_EX = 0x0015,
	POST_MESSAGE = 0x005c,
	SIGNAL_EVENT = 0x005d,
	POST_DEBUG_DATA = 0x0069,
	RETRIEVE_DEBUG_DATA = 0x006a,
	RESET_DEBUG_SESSION = 0x006b,
	EXT_FIRST = 0x8001,
	EXT_LAST = 0x8041,
};

enum status {
	SUCCESS = 0,
	INVALID_CODE = 2,
	INVALID_INPUT = 3,
	INVALID_ALIGNMENT = 4,
	INVALID_PARAMETER = 5,
	ACCESS_DENIED = 6,
};

/* Not statuses: what else becomes of a call. */
enum { TO_PROGRAM = -1, AGAIN = -2, UNDEFINED = -3 };

#define FAST         (1ull << 16)
#define RESERVED     0xf000f000f8000000ull
#define FLUSH_ALL    1ull
#define SPARSE       0u /* formats of a set of processors */
#define EVERYBODY    1u
#define BANKS        (KL_MAX_VCPUS / 64) /* more have no processor */
#define MAX_VAR      64u
#define XMM_HALVES   12u  /* XMM0 to XMM5 */
#define XMM_OFFSET   160u /* in the XSAVE area */
#define MAX_ENTRIES  15u  /* of a list that KVM looks at; with more it flushes everything */
#define FIRST_VECTOR 0x10u
#define LAST_VECTOR  0xffu

struct call {
	struct kl_vcpu *v;
	uint64_t input, in, out;
	uint16_t code, var, reps, start;
	bool fast;
	uint64_t xmm[XMM_HALVES];
	/* What of the arguments was taken: halves of registers, or bytes. */
	unsigned halves;
	uint64_t bytes;
};

struct processors {
	bool all;
	uint64_t mask; /* which banks there are */
	uint64_t bank[BANKS];
};

static bool contains(const struct processors *p, uint32_t index)
{
	unsigned nr = index / 64, at;

	if (p->all)
		return true;
	if (nr >= BANKS || !(p->mask >> nr & 1))
		return false;
	at = (unsigned)__builtin_popcountll(p->mask & ((1ull << nr) - 1));
	return p->bank[at] >> index % 64 & 1;
}

/* SUCCESS, INVALID_INPUT or AGAIN. */
static int64_t read_memory(struct call *c, uint64_t gpa, void *buf, size_t len)
{
	int r = kl_pv_copy(c->v, gpa, buf, len, false);

	return !r ? SUCCESS : r == -EINTR ? AGAIN : INVALID_INPUT;
}

/* The head of the arguments in memory. */
static int64_t read_head(struct call *c, void *buf, size_t len)
{
	c->bytes = len;
	return read_memory(c, c->in, buf, len);
}

/* The next @n words, of which the first @want are wanted. */
static int64_t read_words(struct call *c, unsigned n, unsigned want, uint64_t *to)
{
	want = kl_min(n, want);
	if (!c->fast)
		return read_memory(c, c->in + c->bytes, to, want * sizeof(*to));
	if (n > XMM_HALVES - c->halves)
		return INVALID_INPUT;
	memcpy(to, &c->xmm[c->halves], want * sizeof(*to));
	return SUCCESS;
}

static struct kl_vcpu *vcpu_at(struct kl_x86_vm *vm, unsigned i)
{
	struct kl_vcpu_core *c = atomic_load(&vm->mem.vcpus[i]);

	return c ? kl_container_of(c, struct kl_vcpu, core) : NULL;
}

/* ---- TLB ----------------------------------------------------------------------------------- */

/* On return none of @p uses a translation that it had. */
static void flush(struct kl_vcpu *v, const struct processors *p)
{
	unsigned n = atomic_load(&v->kvm->mem.nr_vcpus);

	for (unsigned i = 0; i < n; i++) {
		struct kl_vcpu *other = vcpu_at(v->kvm, i);

		if (!other || other == v || !contains(p, kl_hv_vp_index(other)))
			continue;
		(void)kl_vcpus_flush(&v->kvm->mem, true); /* everybody's, ours too */
		return;
	}
	if (contains(p, kl_hv_vp_index(v)))
		kl_tlb_flush(v);
}

/* Arguments: address space, flags, processors. */
static int64_t read_flush(struct call *c, struct processors *p)
{
	uint64_t a[3] = {c->in, c->out, c->xmm[0]};
	int64_t r = c->fast ? SUCCESS : read_head(c, a, sizeof(a));

	if (r)
		return r;
	c->halves = 1;
	*p = (struct processors){.mask = 1, .bank = {a[2]}};
	/* Some guests say nobody and mean everybody. */
	p->all = (a[1] & FLUSH_ALL) || !a[2];
	return SUCCESS;
}

/* Address space, flags, format, banks. *@nobody: there is nothing to do. */
static int64_t read_flush_ex(struct call *c, struct processors *p, bool *nobody)
{
	uint64_t a[4] = {c->in, c->out, c->xmm[0], c->xmm[1]};
	int64_t r = c->fast ? SUCCESS : read_head(c, a, sizeof(a));

	if (r)
		return r;
	c->halves = 2;
	*p = (struct processors){.all = a[2] != SPARSE, .mask = a[3]};
	if (c->var != __builtin_popcountll(p->mask))
		return INVALID_INPUT;
	*nobody = !p->all && !c->var;
	if (!p->all && c->var)
		r = read_words(c, c->var, BANKS, p->bank);
	c->halves += c->var;
	c->bytes += c->var * sizeof(uint64_t);
	return r;
}

static int64_t flush_tlb(struct call *c)
{
	bool ex = c->code == FLUSH_SPACE_EX || c->code == FLUSH_LIST_EX, nobody = false;
	bool list = c->code == FLUSH_LIST || c->code == FLUSH_LIST_EX;
	uint64_t entry[MAX_ENTRIES];
	struct processors p = {0};
	int64_t r;

	if ((!ex && c->var) || (list ? !c->reps || c->start : c->reps || c->start))
		return INVALID_INPUT;
	r = ex ? read_flush_ex(c, &p, &nobody) : read_flush(c, &p);
	/* What is in the list does not matter: all goes. But it must be there. */
	if (!r && !nobody && list && c->reps <= MAX_ENTRIES)
		r = read_words(c, c->reps, c->reps, entry);
	if (r)
		return r;
	if (!nobody)
		flush(c->v, &p);
	return (int64_t)c->reps << 32;
}

/* ---- IPI ----------------------------------------------------------------------------------- */

static int64_t read_ipi(struct call *c, struct processors *p, uint32_t *vector)
{
	uint64_t a[2] = {c->in, c->out};
	int64_t r = c->fast ? SUCCESS : read_head(c, a, sizeof(a));

	if (!r && c->fast && a[0] >> 32)
		r = INVALID_INPUT;
	*vector = (uint32_t)a[0];
	*p = (struct processors){.mask = 1, .bank = {a[1]}};
	return r;
}

static int64_t read_ipi_ex(struct call *c, struct processors *p, uint32_t *vector, bool *nobody)
{
	uint64_t a[3] = {c->in, c->out, c->xmm[0]};
	int64_t r = c->fast ? SUCCESS : read_head(c, a, sizeof(a));

	if (r)
		return r;
	c->halves = 1;
	*vector = (uint32_t)a[0];
	*p = (struct processors){.all = a[1] == EVERYBODY, .mask = a[2]};
	if (c->var != __builtin_popcountll(p->mask))
		return INVALID_INPUT;
	*nobody = !p->all && !c->var;
	return p->all || !c->var ? SUCCESS : read_words(c, c->var, BANKS, p->bank);
}

static int64_t send_ipi(struct call *c)
{
	struct kl_x86_vm *vm = c->v->kvm;
	unsigned n = atomic_load(&vm->mem.nr_vcpus);
	struct processors p = {0};
	bool nobody = false;
	uint32_t vector = 0;
	int64_t r;

	if ((c->code == SEND_IPI && c->var) || c->reps || c->start || !c->v->apic)
		return INVALID_INPUT;
	r = c->code == SEND_IPI ? read_ipi(c, &p, &vector) : read_ipi_ex(c, &p, &vector, &nobody);
	if (r || nobody)
		return r;
	if (vector < FIRST_VECTOR || vector > LAST_VECTOR)
		return INVALID_INPUT;
	for (unsigned i = 0; i < n; i++) {
		struct kl_vcpu *v = vcpu_at(vm, i);

		if (v && contains(&p, kl_hv_vp_index(v)))
			kl_pv_inject_vector(v, (uint8_t)vector);
	}
	return SUCCESS;
}

/* ---- events -------------------------------------------------------------------------------- */

static int64_t signal_event(struct call *c)
{
	uint64_t id = c->in;

	if (c->reps || c->start || c->var)
		return INVALID_INPUT;
	if (!c->fast) {
		int64_t r = c->in & 7 ? INVALID_ALIGNMENT : read_memory(c, c->in, &id, sizeof(id));

		if (r)
			return r == AGAIN ? r : INVALID_ALIGNMENT;
	}
	/*
	 * Whom the engine does not know the program might, if it had been given a synthetic
	 * interrupt controller.
	 */
	if ((id & ~(uint64_t)KVM_HYPERV_CONN_ID_MASK) || !kl_hv_signal(c->v->kvm, (uint32_t)id))
		return INVALID_INPUT;
	return SUCCESS;
}

/* ---- all ----------------------------------------------------------------------------------- */

/* What the guest may call when it is held to its CPUID. */
static bool offered(const struct kl_hv_vcpu *hv, uint16_t code)
{
	switch (code) {
	case LONG_SPIN_WAIT:
		return hv->hints_ebx && hv->hints_ebx != UINT32_MAX;
	case POST_MESSAGE:
		return hv->features_ebx & KL_HV_MAY_POST_MESSAGES;
	case SIGNAL_EVENT:
		return hv->features_ebx & KL_HV_MAY_SIGNAL_EVENTS;
	case FLUSH_LIST_EX:
	case FLUSH_SPACE_EX:
		return (hv->hints_eax & KL_HV_EX_MASKS) && (hv->hints_eax & KL_HV_REMOTE_FLUSH);
	case FLUSH_LIST:
	case FLUSH_SPACE:
		return hv->hints_eax & KL_HV_REMOTE_FLUSH;
	case SEND_IPI_EX:
		return (hv->hints_eax & KL_HV_EX_MASKS) && (hv->hints_eax & KL_HV_CLUSTER_IPI);
	case SEND_IPI:
		return hv->hints_eax & KL_HV_CLUSTER_IPI;
	case EXT_FIRST ... EXT_LAST:
		return hv->features_ebx & KL_HV_MAY_CALL_EXTENDED;
	default:
		return true;
	}
}

static bool uses_xmm(uint16_t code)
{
	return code == FLUSH_LIST || code == FLUSH_LIST_EX || code == FLUSH_SPACE ||
	       code == FLUSH_SPACE_EX || code == SEND_IPI_EX;
}

static int64_t execute(struct call *c)
{
	const struct kl_hv_vcpu *hv = &c->v->pv->hv;

	if (hv->enforce && !offered(hv, c->code))
		return ACCESS_DENIED;
	if (c->input & RESERVED)
		return INVALID_INPUT;
	if (c->fast && uses_xmm(c->code)) {
		if (hv->enforce && !(hv->features_edx & KL_HV_XMM_INPUT))
			return UNDEFINED;
		memcpy(c->xmm, c->v->xsave + XMM_OFFSET, sizeof(c->xmm));
	}
	switch (c->code) {
	case LONG_SPIN_WAIT:
		if (c->reps || c->start || c->var)
			return INVALID_INPUT;
		sched_yield();
		return SUCCESS;
	case SIGNAL_EVENT:
		return signal_event(c);
	case POST_MESSAGE:
		return INVALID_INPUT; /* as without a synthetic interrupt controller */
	case FLUSH_SPACE:
	case FLUSH_SPACE_EX:
	case FLUSH_LIST:
	case FLUSH_LIST_EX:
		return flush_tlb(c);
	case SEND_IPI:
	case SEND_IPI_EX:
		return send_ipi(c);
	case POST_DEBUG_DATA:
	case RETRIEVE_DEBUG_DATA:
		return c->fast ? INVALID_PARAMETER : INVALID_CODE;
	case EXT_FIRST ... EXT_LAST:
		return c->fast ? INVALID_PARAMETER : TO_PROGRAM;
	default:
		return INVALID_CODE;
	}
}

static struct call read_registers(struct kl_vcpu *v)
{
	const uint64_t *r = v->gpr;
	struct call c = {.v = v};

	if (v->code_mode == KL_CODE64) {
		c.input = r[KL_RCX];
		c.in = r[KL_RDX];
		c.out = r[KL_R8];
	} else {
		c.input = r[KL_RDX] << 32 | (uint32_t)r[KL_RAX];
		c.in = r[KL_RBX] << 32 | (uint32_t)r[KL_RCX];
		c.out = r[KL_RDI] << 32 | (uint32_t)r[KL_RSI];
	}
	c.code = (uint16_t)c.input;
	c.fast = c.input & FAST;
	c.var = c.input >> 17 & 0x3ff;
	c.reps = c.input >> 32 & 0xfff;
	c.start = c.input >> 48 & 0xfff;
	return c;
}

void kl_pv_hv_result(struct kl_vcpu *v, uint64_t result)
{
	if (v->code_mode == KL_CODE64) {
		v->gpr[KL_RAX] = result;
	} else {
		v->gpr[KL_RDX] = result >> 32;
		v->gpr[KL_RAX] = (uint32_t)result;
	}
}

bool kl_pv_hv_hypercall(struct kl_vcpu *v)
{
	struct call c = read_registers(v);
	int64_t r;

	if (v->cpl || !(v->cr0 & KL_CR0_PE))
		kl_raise(v, KL_EXC_UD);
	kl_guest_pause(v);
	r = execute(&c);
	kl_guest_resume(v);
	switch (r) {
	case UNDEFINED:
		kl_raise(v, KL_EXC_UD);
	case AGAIN:
		kl_leave(v, KL_LEAVE_RESTART);
	case TO_PROGRAM:
		v->exit.reason = KVM_EXIT_HYPERV;
		v->exit.hyperv.input = c.input;
		v->exit.hyperv.params[0] = c.in;
		v->exit.hyperv.params[1] = c.out;
		return false;
	default:
		kl_pv_hv_result(v, (uint64_t)r);
		return true;
	}
}
