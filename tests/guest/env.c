/* SPDX-License-Identifier: MIT */
#include "env.h"
#include "base/config.h"
#include "x86/access.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "x86/debug.h"
#include "x86/control.h"
#include "x86/guest_cpuid.h"
#include "x86/paging.h"
#include "x86/insn.h"
#include "x86/block.h"
#include "x86/report.h"
#include "x86/xlate/xlate.h"

struct env env;

static bool ours(uint64_t lin)
{
	return lin - (uint64_t)env.data < ENV_ARENA || lin - (uint64_t)env.code < ENV_ARENA;
}

static uint8_t *host(uint64_t lin)
{
	return lin - (uint64_t)env.code < ENV_ARENA ? env.code_rw + (lin - (uint64_t)env.code)
						    : (uint8_t *)lin;
}

static struct kl_tlb_entry *fill(struct kl_vcpu *v, uint64_t lin)
{
	struct kl_tlb_entry *e = kl_tlb_entry(v, v->tlb_mode, lin);

	if (!ours(lin))
		kl_raise_pf(v, lin, 0);
	lin &= KL_PAGE_MASK;
	e->rtag = e->wtag = e->xtag = lin;
	if (kl_xlate_wanted() && lin - (uint64_t)env.code < ENV_ARENA)
		e->wtag = kl_tlb_none(kl_tlb_index(lin));
	e->page = host(lin);
	return e;
}

void kl_leave(struct kl_vcpu *v, enum kl_leave why)
{
	longjmp(v->jmp, (int)why);
}

void kl_raise(struct kl_vcpu *v, unsigned vector)
{
	env.vector = (int)vector;
	kl_leave(v, KL_LEAVE_EXCEPTION);
}

void kl_raise_error(struct kl_vcpu *v, unsigned vector, uint32_t error)
{
	kl_raise(v, vector);
}

void kl_raise_pf(struct kl_vcpu *v, uint64_t gva, uint32_t error)
{
	v->cr2 = gva;
	kl_raise(v, KL_EXC_PF);
}

void kl_raise_not_canonical(struct kl_vcpu *v, uint64_t lin)
{
	kl_raise(v, KL_EXC_GP);
}

bool kl_canonical(struct kl_vcpu *v, uint64_t lin)
{
	return (uint64_t)((int64_t)(lin << 16) >> 16) == lin;
}

void kl_emulation_failure(struct kl_vcpu *v)
{
	env.failed = true;
	kl_leave(v, KL_LEAVE_EXIT);
}

void kl_read_bytes(struct kl_vcpu *v, uint64_t lin, void *buf, unsigned len)
{
	fill(v, lin);
	fill(v, lin + len - 1);
	for (unsigned i = 0; i < len; i++)
		((uint8_t *)buf)[i] = *host(lin + i);
}

void kl_write_bytes(struct kl_vcpu *v, uint64_t lin, const void *buf, unsigned len)
{
	fill(v, lin);
	fill(v, lin + len - 1);
	for (unsigned i = 0; i < len; i++) {
		uint8_t *p = host(lin + i);

		*p = ((const uint8_t *)buf)[i];
		if (kl_xlate_wanted() && lin + i - (uint64_t)env.code < ENV_ARENA) {
			v->code_written = true;
			kl_code_new_epoch(v);
		}
		if ((uint8_t *)((uint64_t)p & KL_PAGE_MASK) == v->code_page)
			v->code_written = true;
	}
}

void kl_probe(struct kl_vcpu *v, uint64_t lin)
{
	fill(v, lin);
}

void kl_probe_store(struct kl_vcpu *v, uint64_t lin, unsigned len)
{
	fill(v, lin);
	fill(v, lin + len - 1);
}

uint64_t kl_read_slow(struct kl_vcpu *v, uint64_t lin, unsigned size)
{
	uint64_t x = 0;

	kl_read_bytes(v, lin, &x, size);
	return x;
}

void kl_write_slow(struct kl_vcpu *v, uint64_t lin, uint64_t val, unsigned size)
{
	kl_write_bytes(v, lin, &val, size);
}

void kl_rmw_restart(struct kl_vcpu *v)
{
	kl_leave(v, KL_LEAVE_RESTART);
}

void *kl_rmw_pointer(struct kl_vcpu *v, uint64_t lin, unsigned size)
{
	struct kl_tlb_entry *e = fill(v, lin);

	if ((lin & ~KL_PAGE_MASK) + size > KL_PAGE_SIZE)
		return NULL;
	return kl_tlb_host(e, lin);
}

bool kl_probe_writable(struct kl_vcpu *v, uint64_t lin, unsigned size)
{
	return kl_rmw_pointer(v, lin, size) != NULL;
}

/* A page is live as long as the code arena is written to by the guest through the slow path. */
static struct kl_code_page page = {.state = KL_CODE_LIVE};

struct kl_code_page *kl_code_find(struct kl_vcpu *v, kl_gfn_t gfn)
{
	return kl_xlate_wanted() ? &page : NULL;
}

/* Blocks compare each time here. */
void kl_code_answer(struct kl_vcpu *v)
{
	v->blocks->ask->until = 0;
	v->blocks->ask = NULL;
}

/* Nothing is tracked here. */
void kl_report_notes(struct kl_vcpu *v)
{
	abort();
}

const uint8_t *kl_fetch_slow(struct kl_vcpu *v, uint64_t lin)
{
	return kl_tlb_host(fill(v, lin), lin);
}

uint64_t kl_seg_linear_slow(struct kl_vcpu *v, unsigned s, uint64_t ea, unsigned size, bool write)
{
	return (uint32_t)(v->seg[s].base + ea);
}

enum kl_next kl_op_hlt(struct kl_vcpu *v, const struct kl_op *op)
{
	env.halted = true;
	return KL_STOP;
}

enum kl_next kl_op_ud(struct kl_vcpu *v, const struct kl_op *op)
{
	kl_raise(v, KL_EXC_UD);
}

/* There are no breakpoints. */
void kl_debug_fetch(struct kl_vcpu *v, uint64_t lin)
{
}

bool kl_debug_code_page(struct kl_vcpu *v, uint64_t lin)
{
	return false;
}

/* The other system instructions are not under test here. */
#define STUB(name)                                                                                 \
	__attribute__((weak)) enum kl_next kl_op_##name(struct kl_vcpu *v, const struct kl_op *op) \
	{                                                                                          \
		kl_emulation_failure(v);                                                           \
	}
#define kl_op_hlt other_hlt
#define kl_op_ud  other_ud
kl_op_fn other_hlt, other_ud;
KL_SYSTEM_OPS(STUB)

void env_init(void)
{
	struct kl_vcpu *v = aligned_alloc(64, (sizeof(*v) + 63) & ~63ul);
	int fd = memfd_create("insn-test", MFD_CLOEXEC);
	uint32_t mxcsr = 0x1f80;
	uint16_t fcw = 0x37f;

	memset(v, 0, sizeof(*v));
	env.v = v;
	if (fd < 0 || ftruncate(fd, ENV_ARENA))
		abort();
	env.data = mmap((void *)0x10000000, ENV_ARENA, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	env.code = mmap((void *)0x20000000, ENV_ARENA, PROT_READ | PROT_EXEC,
			MAP_SHARED | MAP_FIXED_NOREPLACE, fd, 0);
	env.code_rw = mmap(NULL, ENV_ARENA, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (env.data == MAP_FAILED || env.code == MAP_FAILED || env.code_rw == MAP_FAILED)
		abort();
	close(fd);
	for (unsigned m = 0; m < KL_NR_TLB_MODES; m++)
		for (unsigned i = 0; i < KL_TLB_SIZE; i++)
			v->tlb[m][i].rtag = v->tlb[m][i].wtag = v->tlb[m][i].xtag = kl_tlb_none(i);
	v->cr0 = KL_CR0_PE | KL_CR0_PG | KL_CR0_NE | KL_CR0_ET | KL_CR0_MP;
	v->cr4 = KL_CR4_PAE | KL_CR4_OSFXSR | KL_CR4_OSXMMEXCPT | KL_CR4_OSXSAVE;
	v->xcr0 = 7;
	v->efer = KL_EFER_LME | KL_EFER_LMA;
	v->long_mode = true;
	v->code_mode = KL_CODE64;
	v->tlb_now = v->tlb[v->tlb_mode];
	v->rflags = 2;
	memcpy(v->xsave, &fcw, 2);
	memcpy(v->xsave + 24, &mxcsr, 4);
	for (unsigned i = 0; i < 6; i++) {
		v->seg[i].limit = 0xffffffff;
		v->seg[i].db = 1;
		v->seg[i].present = 1;
		v->seg[i].s = 1;
		v->seg[i].type = i == KL_CS ? 11 : 3;
	}
	kl_config_init();
	if (kl_blocks_create(v))
		abort();
}

void env_run(bool step)
{
	struct kl_vcpu *v = env.v;

	env.vector = -1;
	env.failed = env.halted = false;
	v->exit_pending = false;
	if (_setjmp(v->jmp) == 0) {
		if (step)
			kl_interp_one(v);
		else
			kl_interp_run(v);
	}
	kl_interp_settle(v);
}

/* What xsave.c asks of the rest of src/x86. */
bool kl_xcr0_valid(struct kl_vcpu *v, uint64_t xcr0)
{
	return xcr0 & 1;
}

uint64_t kl_cr4_supported(void)
{
	return KL_CR4_OSXSAVE;
}

bool kl_guest_has(struct kl_vcpu *v, uint32_t fn, uint32_t index, unsigned reg, unsigned bit)
{
	return true;
}

void kl_x86_refresh_cpuid(struct kl_vcpu *v)
{
}
