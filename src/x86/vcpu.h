/* SPDX-License-Identifier: MIT */
/*
 * The x86 vCPU: its state, its TLB, how an instruction ends early, and the interface
 * between the parts of src/x86 and of uapi/ to it.
 *
 *   decode.c block.c interp.c ops_*.c thunk.c   instructions (insn.h)
 *   access.c paging.c                           guest memory: TLB, guest page walks, MMIO
 *   exception.c segment.c system.c msr.c cpuid.c  what the system sees
 *   run.c                                       KVM_RUN: events, requests, halt, exits
 *   state.c                                     get/set as KVM's ioctls want it
 *
 * Everything here belongs to the vCPU's own thread (uapi holds the vCPU's mutex), except
 * core.requests and core.mode.
 *
 * How an instruction ends early: any handler may call kl_raise*(), or touch guest memory
 * in a way that raises or exits; control then goes by longjmp to run.c. So a handler makes
 * every memory access that can fail before it changes a register, and owns no resource.
 */
#pragma once

#include <linux/kvm.h>
#include <setjmp.h>

#include "base/compiler.h"
#include "base/lock.h"
#include "host/access.h"
#include "host/guard.h"
#include "mem/vm.h"
#include "mmu/mmu.h"
#include "x86/tlb.h"

enum kl_gpr {
	KL_RAX,
	KL_RCX,
	KL_RDX,
	KL_RBX,
	KL_RSP,
	KL_RBP,
	KL_RSI,
	KL_RDI,
	KL_R8,
	KL_R9,
	KL_R10,
	KL_R11,
	KL_R12,
	KL_R13,
	KL_R14,
	KL_R15
};

/* Encoding order of segment registers. */
enum kl_seg { KL_ES, KL_CS, KL_SS, KL_DS, KL_FS, KL_GS, KL_LDTR, KL_TR, KL_NR_SEGS };

#define KL_CR0_PE (1u << 0)
#define KL_CR0_MP (1u << 1)
#define KL_CR0_EM (1u << 2)
#define KL_CR0_TS (1u << 3)
#define KL_CR0_ET (1u << 4)
#define KL_CR0_NE (1u << 5)
#define KL_CR0_WP (1u << 16)
#define KL_CR0_AM (1u << 18)
#define KL_CR0_NW (1u << 29)
#define KL_CR0_CD (1u << 30)
#define KL_CR0_PG (1u << 31)

#define KL_CR4_VME        (1u << 0)
#define KL_CR4_PVI        (1u << 1)
#define KL_CR4_TSD        (1u << 2)
#define KL_CR4_DE         (1u << 3)
#define KL_CR4_PSE        (1u << 4)
#define KL_CR4_PAE        (1u << 5)
#define KL_CR4_MCE        (1u << 6)
#define KL_CR4_PGE        (1u << 7)
#define KL_CR4_PCE        (1u << 8)
#define KL_CR4_OSFXSR     (1u << 9)
#define KL_CR4_OSXMMEXCPT (1u << 10)
#define KL_CR4_UMIP       (1u << 11)
#define KL_CR4_LA57       (1u << 12)
#define KL_CR4_FSGSBASE   (1u << 16)
#define KL_CR4_PCIDE      (1u << 17)
#define KL_CR4_OSXSAVE    (1u << 18)
#define KL_CR4_SMEP       (1u << 20)
#define KL_CR4_SMAP       (1u << 21)
#define KL_CR4_PKE        (1u << 22)

#define KL_EFER_SCE   (1u << 0)
#define KL_EFER_LME   (1u << 8)
#define KL_EFER_LMA   (1u << 10)
#define KL_EFER_NX    (1u << 11)
#define KL_EFER_SVME  (1u << 12)
#define KL_EFER_FFXSR (1u << 14)

#define KL_FL_CF     (1u << 0)
#define KL_FL_PF     (1u << 2)
#define KL_FL_AF     (1u << 4)
#define KL_FL_ZF     (1u << 6)
#define KL_FL_SF     (1u << 7)
#define KL_FL_TF     (1u << 8)
#define KL_FL_IF     (1u << 9)
#define KL_FL_DF     (1u << 10)
#define KL_FL_OF     (1u << 11)
#define KL_FL_IOPL   (3u << 12)
#define KL_FL_NT     (1u << 14)
#define KL_FL_RF     (1u << 16)
#define KL_FL_VM     (1u << 17)
#define KL_FL_AC     (1u << 18)
#define KL_FL_VIF    (1u << 19)
#define KL_FL_VIP    (1u << 20)
#define KL_FL_ID     (1u << 21)
#define KL_FL_STATUS (KL_FL_CF | KL_FL_PF | KL_FL_AF | KL_FL_ZF | KL_FL_SF | KL_FL_OF)

#define KL_EXC_DE 0
#define KL_EXC_DB 1
#define KL_EXC_BP 3
#define KL_EXC_OF 4
#define KL_EXC_BR 5
#define KL_EXC_UD 6
#define KL_EXC_NM 7
#define KL_EXC_DF 8
#define KL_EXC_TS 10
#define KL_EXC_NP 11
#define KL_EXC_SS 12
#define KL_EXC_GP 13
#define KL_EXC_PF 14
#define KL_EXC_MF 16
#define KL_EXC_AC 17
#define KL_EXC_MC 18
#define KL_EXC_XM 19

/* Execution mode of code: how bytes are decoded. Part of a block's key. */
enum kl_code_mode { KL_CODE16, KL_CODE32, KL_CODE64 };

#define KL_XSAVE_SIZE 4096

/* An exit to the program. What KVM_RUN's kvm_run says, before uapi/ encodes it. */
struct kl_exit {
	uint32_t reason; /* KVM_EXIT_* */
	union {
		struct { /* KVM_EXIT_IO; data in vcpu.pio_data */
			uint8_t in;
			uint8_t size;
			uint16_t port;
			uint32_t count;
		} io;
		struct { /* KVM_EXIT_MMIO; a read's answer is put into data by uapi */
			uint64_t gpa;
			uint8_t data[8];
			uint32_t len;
			uint8_t is_write;
		} mmio;
		struct { /* KVM_EXIT_X86_RDMSR/WRMSR; data and error are the program's answer */
			uint32_t index;
			uint32_t why; /* KVM_MSR_EXIT_REASON_* */
			uint64_t data;
			uint8_t error;
		} msr;
		struct { /* KVM_EXIT_INTERNAL_ERROR */
			uint32_t suberror;
			uint32_t ndata;
			uint64_t data[16];
			uint8_t insn_len; /* emulation failure: bytes, if known */
			uint8_t insn[15];
		} internal;
		struct {
			uint64_t hardware_entry_failure_reason;
			uint32_t cpu;
		} fail_entry;
		struct {
			uint64_t nr, args[6], ret;
			uint32_t longmode;
		} hypercall;
		struct { /* KVM_EXIT_XEN */
			uint32_t longmode, cpl;
			uint64_t input, result, params[6];
		} xen;
		struct { /* KVM_EXIT_HYPERV: a hypercall */
			uint64_t input, params[2], result;
		} hyperv;
		uint32_t system_event; /* KVM_EXIT_SYSTEM_EVENT: KVM_SYSTEM_EVENT_* */
		struct {
			uint32_t exception;
			uint64_t pc, dr6, dr7;
		} debug;
		uint8_t eoi_vector; /* KVM_EXIT_IOAPIC_EOI */
		struct {
			uint64_t rip;
			bool is_write;
		} tpr_access;
	};
};

/* What must be finished when KVM_RUN is called again, before anything else. */
enum kl_pending {
	KL_PENDING_NONE,
	KL_PENDING_PIO_IN,     /* simple IN: data to rAX, advance */
	KL_PENDING_PIO_OUT,    /* simple OUT: advance */
	KL_PENDING_PIO_STRING, /* INS: restart the instruction, which finds pio_data; OUTS */
	KL_PENDING_MMIO_READ,  /* restart the instruction, which finds the data in mmio[] */
	KL_PENDING_MMIO_WRITE, /* next fragment, or done */
	KL_PENDING_MSR,
	KL_PENDING_HYPERCALL,
	KL_PENDING_XEN,
	KL_PENDING_HYPERV,
};

/* MMIO of the instruction that is being executed: fragments of at most 8 bytes. */
#define KL_MAX_MMIO_FRAGMENTS 8
struct kl_mmio_fragment {
	uint64_t gpa;
	uint8_t len;
	bool is_write;
	bool done;
	uint8_t data[8];
};

struct kl_event_exception {
	bool pending;  /* raised, not yet being delivered */
	bool injected; /* delivery was begun or asked for by the program; must be redone */
	bool has_error;
	bool has_payload;
	uint8_t nr;
	uint32_t error;
	uint64_t payload;
};

/* The breakpoints in force, and what they have hit (debug.h). Bit n stands for DRn. */
struct kl_breakpoints {
	uint64_t addr[4];
	uint8_t len[4];
	uint8_t exec, write, access, io; /* armed, by kind; access: reads and writes */
	uint8_t hit;                     /* data and ports, by the instruction that runs */
	uint64_t hit_rip;                /* where */
	bool held;                       /* behind MOV SS: no instruction breakpoint now */
	uint32_t trap;                   /* DR6 bits of instructions that are done */
};

/* What a task switch has changed, until it is complete (task.h). */
struct kl_task_undo {
	bool valid;
	uint8_t cpl;
	uint64_t gpr[16], rip, rflags, cr3, pdptrs[4];
	struct kvm_segment seg[KL_NR_SEGS];
};

struct kl_msr_entry; /* msr.c */
struct kl_x86_vm;
struct kl_block_cache; /* block.c */
struct kl_block;
struct kl_op;
struct kl_lapic;
struct kl_apic_map;
struct kl_pic;
struct kl_ioapic;
struct kl_pit;
struct kl_irq_routing;

struct kl_vcpu {
	struct kl_vcpu_core core;
	struct kl_x86_vm *kvm;

	/* Integer state. */
	uint64_t gpr[16] KL_CACHELINE;
	/* Near to them, for translated code. */
	/* tlb[tlb_mode], or what has no tags (xlate/check.c) */
	struct kl_tlb_entry *tlb_now;
	/* xlate/xlate.h; and while translated 32-bit code runs: FS, GS have no limit */
	struct kl_xlate_jump *jumps, *jumps32;
	bool whole_fs, whole_gs;
	uint64_t insn_count;    /* guest instructions, published to core.stats at exits */
	uint64_t branch_target; /* of the translated instruction that runs */
	/* The page that the stack was last written to, as its TLB entry has it; limit 0: none, else
	 * the first offset at which 8 bytes do not end in it. For translated code. */
	uint64_t stack_tag, stack_limit;
	uint8_t *stack_page;
	bool lazy;       /* see block */
	bool mxcsr_lent; /* the host's MXCSR collects the guest's exception flags (fast_sse.c) */
	bool avx_lent;   /* the same, and kl_check_avx() has nothing against VEX */
	uint16_t flags_now;
	uint32_t host_mxcsr; /* what it was */
	uint64_t rip;        /* of the current instruction while a handler runs */
	uint64_t rflags;     /* bit 1 always set; all flags exact outside of blocks */
	struct kvm_segment seg[KL_NR_SEGS];
	uint64_t zero; /* what an address without base or index adds */
	/* The block that runs, or NULL. While lazy, rip is that of cur_op, and the status flags are
	 * flags_now, packed (ops.h): kl_interp_settle() puts both in place. */
	struct kl_block *block;
	uint8_t vector_operand[16] __attribute__((aligned(16))); /* one in memory, for a thunk */
	uint8_t cpl;
	uint8_t code_mode; /* enum kl_code_mode, from CS and EFER */
	uint8_t tlb_mode;  /* enum kl_tlb_mode, from CPL, CR4.SMAP, EFLAGS.AC */
	bool long_mode;    /* EFER.LMA && CS.L */

	/* How control leaves a handler early (run.c sets it). */
	jmp_buf jmp;
	bool in_run; /* jmp is valid */

	/* Memory. */
	struct kl_tlb_entry tlb[KL_NR_TLB_MODES][KL_TLB_SIZE] KL_CACHELINE;
	uint64_t tlb_gfn[KL_NR_TLB_MODES][KL_TLB_SIZE]; /* of the entry there */
	/* What was compared with memory in an earlier epoch is compared again (code.h). */
	uint64_t code_epoch;
	bool same_epoch; /* kl_interp_run() stopped by itself, and nothing has happened since */
	/* tlbs.gen[tlb_mode]: code that was fetched while it was the same is where it was. */
	uint64_t code_gen;
	struct kl_tlb_state tlbs; /* x86/tlb.h */
	/* Host pages of page tables that walks have read, by gfn; until a flush of stage 2. */
	struct kl_table_page {
		kl_gfn_t next_gfn; /* gfn + 1, or 0 */
		uint8_t *page;
	} table_page[KL_NR_TABLE_PAGES];
	/* The last page that was MMIO: its translation only; stage 2 is asked each time. */
	uint64_t mmio_tag; /* linear page | access mode, or KL_MMIO_NONE */
	uint64_t mmio_gpa;
	unsigned mmio_access; /* KL_ACC_* that the guest's tables allow */
	uint8_t *code_page;   /* host page that the current block lies in, or NULL */
	bool code_written;    /* a store hit code_page: leave the block after this instruction */
	/* Writes to tracked pages that are to be reported: each level of a page walk, or the parts
	 * of an operand (report.h). */
	struct kl_note {
		uint64_t gpa, val;
		uint8_t len;
		bool known; /* val is what was written; else it is still to be read */
	} note[5];
	unsigned nr_notes;

	/* System state. */
	uint64_t cr0, cr2, cr3, cr4, efer, xcr0;
	uint64_t cr8; /* without an APIC: kl_x86_get_cr8() */
	uint64_t dr[4], dr6, dr7;
	struct kvm_dtable gdt, idt;
	_Atomic uint64_t apic_base;
	struct kl_lapic *apic; /* in-engine local APIC, or NULL */
	uint64_t pdptrs[4];    /* PAE */
	bool pdptrs_valid;

	/* Vector and x87 state, in the standard (non-compacted) XSAVE layout. */
	uint8_t xsave[KL_XSAVE_SIZE] __attribute__((aligned(64)));

	/* MSRs with storage, by name (msr.c); the rest of them live where they act. */
	uint64_t msr_star, msr_lstar, msr_cstar, msr_fmask, msr_kernel_gs_base, msr_tsc_aux;
	uint64_t msr_sysenter_cs, msr_sysenter_esp, msr_sysenter_eip;
	uint64_t msr_pat, msr_misc_enable, msr_debugctl, msr_tsc_adjust;
	uint64_t msr_xss, msr_feature_control, msr_arch_capabilities;
	uint64_t msr_mtrr[32]; /* msr.c has the order */
	uint64_t msr_power_ctl, msr_hwcr, msr_ucode_rev, msr_de_cfg;
	uint64_t msr_platform_info, msr_misc_features;
	uint64_t msr_smi_count, msr_hsave_pa, msr_vm_cr, msr_virt_spec_ctrl;
	uint64_t mcg_cap, mcg_status, mcg_ctl, mcg_ext_ctl, mce_banks[32 * 4], mci_ctl2[32];
	uint64_t tsc_offset, tsc_ratio; /* tsc.h */
	uint32_t tsc_khz;
	uint64_t tsc_generation;

	/* CPUID as the program set it. */
	struct kvm_cpuid_entry2 *cpuid;
	unsigned nr_cpuid;
	unsigned maxphyaddr;
	uint64_t cr4_reserved, efer_allowed; /* derived from CPUID */
	uint64_t supported_xcr0;
	bool has_rdtscp, has_rdpid, has_invpcid, has_tsc_adjust, has_mwait;
	bool has_x2apic, has_tsc_deadline;
	bool intel_compatible; /* the vendor that the program chose: SYSENTER, far transfers */

	/* Events. */
	struct kl_event_exception exc;
	struct {
		bool injected, soft;
		uint8_t nr;
	} irq; /* KVM_INTERRUPT, or an injected one */
	struct {
		bool injected, masked;
		_Atomic uint32_t pending; /* KVM_NMI: any thread */
	} nmi;
	uint8_t int_shadow;        /* KVM_X86_SHADOW_INT_* */
	bool triple_fault_pending; /* asked for by the program */
	bool shutdown;             /* the guest could not handle a double fault */
	bool delivering;           /* in kl_x86_deliver() for a hardware event or exception: EXT */
	_Atomic uint32_t mp_state; /* KVM_MP_STATE_* */
	_Atomic bool unhalted;     /* kicked: the next HLT is over at once. Any thread */
	int ext_vector;            /* split irqchip: KVM_INTERRUPT's vector, or -1 */
	bool pv_eoi, pv_eoi_pending; /* PV EOI is on; the guest may end the interrupt (pv/eoi.c) */
	bool vapic,
		vapic_lent; /* there is a vapic page; the priority is what it says (pv/vapic.c) */
	/* Asynchronous page faults (pv/async_pf.c) are on; not for CPL 0. */
	bool pv_apf, pv_apf_user_only;
	bool shadowed;          /* the instruction that runs is in an interrupt shadow */
	uint32_t system_events; /* that the program is to be told: bit per KVM_SYSTEM_EVENT_* */
	int eoi_exit;           /* the program's I/O APIC is to be told of this vector; or -1 */
	bool tpr_reporting;     /* KVM_TPR_ACCESS_REPORTING */
	struct {
		bool due; /* the program is to be told of an access to TPR */
		bool is_write;
		uint64_t rip;
	} tpr_access;
	struct kvm_guest_debug debug; /* KVM_SET_GUEST_DEBUG; control 0: off */
	struct kl_breakpoints bp;
	struct kl_task_undo task_undo;

	/* Exit to the program and its completion. */
	struct kl_exit exit;
	bool exit_pending; /* this KVM_RUN is over: exit is filled */
	int exit_errno;    /* != 0: KVM_RUN fails with it (-EINTR, -EFAULT, ...) */
	enum kl_pending pending;
	uint64_t pending_rip;              /* linear address of the instruction that exited */
	uint8_t pending_len, pending_size; /* of the instruction; of the port access */
	bool pending_write;                /* KL_PENDING_MSR: WRMSR */
	uint8_t pio_page_[KL_PAGE_SIZE];   /* used until uapi points pio_data at the run area */
	uint8_t *pio_data;                 /* one page, shared with the program */
	unsigned pio_left, pio_pos;        /* INS: elements that came in and were not stored yet */
	uint64_t guard_addr; /* last vanished host page, and how often in a row (run.c) */
	uint64_t guard_insn;
	unsigned guard_repeat;
	struct kl_mmio_fragment mmio[KL_MAX_MMIO_FRAGMENTS];
	unsigned nr_mmio, cur_mmio; /* collected in this instruction; next to exit with */
	unsigned mmio_used;         /* fragments that this attempt of the instruction consumed */
	bool mmio_replay;           /* the instruction is being restarted with read data */
	uint64_t mmio_rip;          /* of the instruction */

	/* Settings from kvm_run, read by uapi at each KVM_RUN. */
	bool request_interrupt_window;
	bool immediate_exit;

	struct kl_pv_vcpu *pv; /* pv/pv.h */

	struct kl_check *check; /* a block is being compared (xlate/check.c) */

	/* Instructions. */
	struct kl_block_cache *blocks;
	const struct kl_op *cur_op; /* the one that runs, for bytes and length in errors */

	bool userspace_irqchip;            /* no KVM_CREATE_IRQCHIP */
	bool runnable_once;                /* run at least once: SET_CPUID rules */
	struct kl_space spaces[KL_SPACES]; /* untouched until CR3 is loaded */
};

/* Bits of kl_x86_vm.disabled_quirks (KVM_X86_QUIRK_*; Debian 12's header has not all). */
#define KL_QUIRK_LINT0_REENABLED      (1u << 0)
#define KL_QUIRK_LAPIC_MMIO_HOLE      (1u << 2)
#define KL_QUIRK_OUT_7E_INC_RIP       (1u << 3)
#define KL_QUIRK_MISC_ENABLE_NO_MWAIT (1u << 4)
#define KL_QUIRK_FIX_HYPERCALL_INSN   (1u << 5)
#define KL_QUIRK_MWAIT_NEVER_UD       (1u << 6)

/* x86 state of a VM. uapi embeds it. */
struct kl_x86_vm {
	struct kl_vm mem;     /* first */
	struct kl_mutex lock; /* rank VM */
	struct kl_pv_vm *pv;  /* pv/pv.h */
	struct kl_code *code; /* code.h */
	/* Xen HVM (pv/xen.h): the MSR of the hypercall page, 0 without Xen; whether hypercalls are
	 * Xen's; the vector of its interrupt, which comes as the PIC's do, or 0. */
	_Atomic uint32_t xen_msr;
	_Atomic bool xen_hypercalls;
	_Atomic uint8_t xen_vector;
	/* In-engine interrupt controllers (irqchip.h); set once, before the first vCPU. */
	_Atomic bool irqchip; /* local APICs: KVM_CREATE_IRQCHIP or KVM_CAP_SPLIT_IRQCHIP */
	struct kl_pic *pic;   /* these two: KVM_CREATE_IRQCHIP only */
	struct kl_ioapic *ioapic;
	_Atomic(struct kl_pit *) pit; /* KVM_CREATE_PIT2, at any time */
	struct kl_irq_routing *routing;
	uint32_t nr_program_pins;  /* split: pins of the program's IOAPIC */
	_Atomic uint64_t tss_addr; /* KVM_SET_TSS_ADDR: these are set by any thread at any time */
	uint64_t identity_map_addr;
	/* Local APICs: lapic_send.c. */
	struct kl_mutex apic_map_lock;          /* rank APIC_MAP: who makes the map */
	_Atomic(struct kl_apic_map *) apic_map; /* read under mem.srcu */
	_Atomic uint32_t apic_map_dirty;
	_Atomic uint32_t apics_in_nmi_mode; /* LINT0 is set to NMI */
	_Atomic bool x2apic_format;         /* KVM_CAP_X2APIC_API: these two */
	_Atomic bool x2apic_no_broadcast_quirk;
	uint64_t apic_bus_cycle_ns;
	uint32_t boot_cpu_id, max_vcpu_ids;
	_Atomic uint64_t disabled_quirks;
	_Atomic uint32_t hypercall_exit_enabled; /* KVM_CAP_EXIT_HYPERCALL: bit per hypercall */
	_Atomic uint32_t user_space_msr_mask;    /* KVM_CAP_X86_USER_SPACE_MSR */
	_Atomic bool exception_payload;          /* KVM_CAP_EXCEPTION_PAYLOAD */
	_Atomic bool triple_fault_event;         /* KVM_CAP_X86_TRIPLE_FAULT_EVENT */
	_Atomic bool exit_on_emulation_error;    /* KVM_CAP_EXIT_ON_EMULATION_FAILURE */
	_Atomic bool hide_platform_info;         /* KVM_CAP_MSR_PLATFORM_INFO with 0 */
	_Atomic uint64_t disabled_exits;         /* KVM_CAP_X86_DISABLE_EXITS */
	uint32_t tsc_khz;                        /* the host's */
	_Atomic uint32_t default_tsc_khz;        /* of vCPUs to come */
	struct kl_mutex tsc_lock;                /* rank LEAF; the rest of the block */
	uint64_t tsc_offset;                     /* of the vCPUs that are in sync */
	uint64_t tsc_last_write, tsc_last_host;  /* the last value that was set, when, by a */
	uint64_t tsc_last_offset;                /* vCPU of which rate */
	uint32_t tsc_last_khz;
	bool tsc_user_set;
	uint64_t tsc_generation;         /* of the offset that vCPUs have in common */
	_Atomic unsigned tsc_nr_matched; /* vCPUs that have it, but for the first */
	/* Immutable once set, replaced whole; read under mem.srcu. */
	_Atomic(struct kl_msr_filter *) msr_filter;
	/*
	 * In-engine devices: coalesced MMIO/PIO and ioeventfds. 0 if handled, else
	 * -EOPNOTSUPP. Called OUTSIDE guest mode, no lock held. Set by uapi; may be NULL.
	 */
	int (*io_write)(struct kl_x86_vm *vm, bool pio, uint64_t addr, unsigned len,
			const void *data);
};

KL_INLINE struct kl_x86_vm *kl_x86_vm_of(struct kl_vm *vm)
{
	return (struct kl_x86_vm *)vm;
}

/* ---- leaving an instruction ------------------------------------------------------ */

/*
 * What longjmp(v->jmp) brings to run.c. kl_self.guard points to the same jmp_buf, so these
 * must not collide with enum kl_guard_reason.
 */
enum kl_leave {
	KL_LEAVE_EXCEPTION = 16, /* v->exc is pending; rip is the faulting instruction */
	KL_LEAVE_EXIT,           /* v->exit or v->exit_errno is filled; rip not advanced */
	KL_LEAVE_RESTART,        /* nothing happened; poll requests and run the instruction again */
};

void kl_leave(struct kl_vcpu *v, enum kl_leave why) KL_NORETURN;
/* Raise a fault from a handler. #DB/#BP/#OF traps go through kl_x86_soft_int or trap. */
void kl_raise(struct kl_vcpu *v, unsigned vector) KL_NORETURN KL_COLD;
void kl_raise_error(struct kl_vcpu *v, unsigned vector, uint32_t error) KL_NORETURN KL_COLD;
/* #PF: cr2 is set when it is delivered (payload). */
void kl_raise_pf(struct kl_vcpu *v, uint64_t gva, uint32_t error) KL_NORETURN KL_COLD;
/* The same with what delivery will put into a register: #DB and DR6. */
void kl_raise_payload(struct kl_vcpu *v, unsigned vector, uint64_t payload) KL_NORETURN KL_COLD;
/* KVM_INTERNAL_ERROR_EMULATION with the current instruction's bytes, or #UD where KVM
 * injects one (user mode without exit_on_emulation_error). */
void kl_emulation_failure(struct kl_vcpu *v) KL_NORETURN KL_COLD;

/* ---- guest memory (access.c, paging.c) ------------------------------------------- */

/*
 * Linear-address access with the current mode's rights: fast path here, everything else
 * (TLB miss, page crossing, MMIO, faults) out of line. Sizes 1, 2, 4, 8. May leave.
 * A store is complete when it returns; a page-crossing store has checked both pages first.
 */
uint64_t kl_read_slow(struct kl_vcpu *v, uint64_t lin, unsigned size);
void kl_write_slow(struct kl_vcpu *v, uint64_t lin, uint64_t val, unsigned size);

/* Higher bits are mixed in, so that code and data a power of two apart do not fight. */
KL_INLINE unsigned kl_tlb_index(uint64_t lin)
{
	uint64_t page = lin >> KL_PAGE_SHIFT;

	return (page ^ page >> KL_TLB_BITS) & (KL_TLB_SIZE - 1);
}

/* No page's tag, in this entry. The first pages are those of the entries in their order. */
KL_INLINE uint64_t kl_tlb_none(unsigned index)
{
	return (uint64_t)(index ^ 1) << KL_PAGE_SHIFT;
}

/* The host address of @lin, whose entry it is. */
KL_INLINE void *kl_tlb_host(const struct kl_tlb_entry *e, uint64_t lin)
{
	return e->page + (lin & ~KL_PAGE_MASK);
}

KL_INLINE struct kl_tlb_entry *kl_tlb_entry(struct kl_vcpu *v, unsigned mode, uint64_t lin)
{
	return &v->tlb[mode][kl_tlb_index(lin)];
}

/* For data, of the current mode. */
KL_INLINE const struct kl_tlb_entry *kl_tlb_data(const struct kl_vcpu *v, uint64_t lin)
{
	return &v->tlb_now[kl_tlb_index(lin)];
}

KL_INLINE uint64_t kl_read(struct kl_vcpu *v, uint64_t lin, unsigned size)
{
	const struct kl_tlb_entry *e = kl_tlb_data(v, lin);

	if (KL_LIKELY(e->rtag == (lin & KL_PAGE_MASK) &&
		      (lin & ~KL_PAGE_MASK) + size <= KL_PAGE_SIZE))
		return kl_load(kl_tlb_host(e, lin), size);
	return kl_read_slow(v, lin, size);
}

KL_INLINE void kl_write(struct kl_vcpu *v, uint64_t lin, uint64_t val, unsigned size)
{
	const struct kl_tlb_entry *e = kl_tlb_data(v, lin);

	if (KL_LIKELY(e->wtag == (lin & KL_PAGE_MASK) &&
		      (lin & ~KL_PAGE_MASK) + size <= KL_PAGE_SIZE)) {
		uint8_t *p = kl_tlb_host(e, lin);

		kl_store(p, val, size);
		if (KL_UNLIKELY((uint8_t *)((uint64_t)p & KL_PAGE_MASK) == v->code_page))
			v->code_written = true;
		return;
	}
	kl_write_slow(v, lin, val, size);
}

/* core.pass begins anew: no block is to be taken for one that was looked at (xlate/xlate.h). */
void kl_xlate_wrapped(struct kl_vcpu *v) KL_COLD;

/*
 * Of what was derived from code: pointers from the TLB may be void; all that was compared with
 * memory is to be compared again (code.h).
 */
KL_INLINE void kl_code_void(struct kl_vcpu *v)
{
	_Static_assert(KL_NR_TLB_MODES == 4, "bits below the number");
	v->core.pass = ((v->core.pass | 3) + 1) | v->tlb_mode;
	if (KL_UNLIKELY(!(v->core.pass >> 2)))
		kl_xlate_wrapped(v);
	v->stack_limit = 0;
}

/* The access mode is another: nothing is void, but what holds is told from what held in others. */
KL_INLINE void kl_code_mode_changed(struct kl_vcpu *v)
{
	v->core.pass = (v->core.pass & ~3u) | v->tlb_mode;
	v->stack_limit = 0;
}

KL_INLINE void kl_code_unmapped(struct kl_vcpu *v)
{
	for (unsigned m = 0; m < KL_NR_TLB_MODES; m++)
		kl_tlb_new_gen(&v->tlbs, m);
	v->tlbs.code_serial++;
	v->code_gen = v->tlbs.gen[v->tlb_mode];
	kl_code_void(v);
}

KL_INLINE void kl_code_new_epoch(struct kl_vcpu *v)
{
	v->code_epoch++;
	kl_code_void(v);
}

/* Any length (vector operands, descriptors); same rules. */
void kl_read_bytes(struct kl_vcpu *v, uint64_t lin, void *buf, unsigned len);
void kl_write_bytes(struct kl_vcpu *v, uint64_t lin, const void *buf, unsigned len);

/* Supervisor access whatever CPL is (descriptor tables, TSS, IDT); same rules. */
void kl_read_system(struct kl_vcpu *v, uint64_t lin, void *buf, unsigned len);
void kl_write_system(struct kl_vcpu *v, uint64_t lin, const void *buf, unsigned len);

/*
 * Pointer for a locked read-modify-write: @size bytes at @lin, checked for writing, usable
 * until the handler returns. NULL if the access crosses a page or hits MMIO: the caller then
 * does it unlocked with kl_read/kl_write (MMIO), or kl_rmw_split() stops other vCPUs (page
 * crossing). The page has just been touched. The handler does write there, and makes no other
 * access after it.
 */
void *kl_rmw_pointer(struct kl_vcpu *v, uint64_t lin, unsigned size);
/* The same without a store: fault as one would. False: MMIO. */
bool kl_probe_writable(struct kl_vcpu *v, uint64_t lin, unsigned size);
/*
 * A locked operation that got no pointer finds memory now: a slot has appeared. What it may have
 * read from a device is not what the memory holds, and two halves are not one access: from the
 * start. kl_write_slow() sees to it for stores.
 */
void kl_rmw_restart(struct kl_vcpu *v) KL_NORETURN KL_COLD;

/* Host pointer of the code at @lin for fetching up to the page end; NULL: call the slow
 * path kl_fetch_slow(), which fills the TLB, raises #PF, or ends in an emulation failure. */
KL_INLINE const uint8_t *kl_fetch_pointer(struct kl_vcpu *v, uint64_t lin)
{
	struct kl_tlb_entry *e = kl_tlb_entry(v, v->tlb_mode, lin);

	return KL_LIKELY(e->xtag == (lin & KL_PAGE_MASK)) ? kl_tlb_host(e, lin) : NULL;
}
const uint8_t *kl_fetch_slow(struct kl_vcpu *v, uint64_t lin);

/* The guest page of what these returned. */
KL_INLINE kl_gfn_t kl_fetch_gfn(const struct kl_vcpu *v, uint64_t lin)
{
	return v->tlb_gfn[v->tlb_mode][kl_tlb_index(lin)];
}

/* Derived fields after CR0/CR4/EFER/CS/CPL/RFLAGS.AC changed: code_mode, tlb_mode... */
void kl_x86_update_mode(struct kl_vcpu *v);

/*
 * Segmentation: linear address of @ea in segment @s for an access of @size bytes; raises
 * #GP/#SS. In 64-bit mode only the FS/GS base is added and canonical form is checked by the
 * slow path of the access (a non-canonical address is never in the TLB). AMD's processors also
 * check what the base is added to.
 */
uint64_t kl_seg_linear_slow(struct kl_vcpu *v, unsigned s, uint64_t ea, unsigned size, bool write);

KL_INLINE uint64_t kl_seg_linear(struct kl_vcpu *v, unsigned s, uint64_t ea, unsigned size,
				 bool write)
{
	if (KL_LIKELY(v->long_mode)) {
		if (s < KL_FS)
			return ea;
		if (KL_LIKELY(!((ea + (1ull << 47)) >> 48))) /* canonical */
			return ea + v->seg[s].base;
	}
	return kl_seg_linear_slow(v, s, ea, size, write);
}

/* A part of an operand at @lin: linear addresses wrap where the code's do. */
KL_INLINE uint64_t kl_linear_add(struct kl_vcpu *v, uint64_t lin, unsigned n)
{
	return v->long_mode ? lin + n : (uint32_t)(lin + n);
}

/* Guest-physical access outside an instruction (ioctls, walks). Not IN_GUEST. 0 or -errno. */
int kl_x86_read_phys(struct kl_vcpu *v, uint64_t gpa, void *buf, unsigned len) KL_MUST_CHECK;

/*
 * KVM_PRE_FAULT_MEMORY (M8): map what a read fault at each page of [*@gpa, *@gpa + *@size)
 * would map; both move along with what is done.
 * Context: not IN_GUEST; may sleep. Returns: 0; -EINTR, a signal; -ENOENT, no slot; -EFAULT;
 * -EHWPOISON; -ENOMEM; -EIO.
 */
int kl_x86_pre_fault(struct kl_vcpu *v, uint64_t *gpa, uint64_t *size) KL_MUST_CHECK;

/* KVM_TRANSLATE: gva -> gpa for a supervisor read. 0, or -EFAULT if it would fault. */
int kl_x86_translate(struct kl_vcpu *v, uint64_t gva, uint64_t *gpa, bool *writable,
		     bool *usermode) KL_MUST_CHECK;

/* ---- instructions (interp.c) ------------------------------------------------------- */

int kl_blocks_create(struct kl_vcpu *v) KL_MUST_CHECK;
void kl_blocks_destroy(struct kl_vcpu *v);
/*
 * Run guest code. Context: IN_GUEST, v->jmp and kl_self.guard set. Returns when
 * core.requests is nonzero, v->exit_pending is set, an instruction asked for it
 * (kl_x86_end_block), or debug.control/TF asks for one instruction at a time.
 */
void kl_interp_run(struct kl_vcpu *v);
/* Execute exactly one instruction, then return (single-step; interrupt shadow). */
void kl_interp_one(struct kl_vcpu *v);
/* After a longjmp out of it: make rip, rflags and insn_count exact. Idempotent. */
void kl_interp_settle(struct kl_vcpu *v);

/* ---- events and control (exception.c, run.c) --------------------------------------- */

/* INT n, INT3, INTO, INT1 as instructions; @next_rip is what is pushed. May leave. */
void kl_x86_soft_int(struct kl_vcpu *v, unsigned vector, uint64_t next_rip);
/* Begin delivery of what is pending. Called by run.c between instructions. */
void kl_x86_deliver(struct kl_vcpu *v, unsigned vector, bool has_error, uint32_t error, bool soft,
		    uint64_t push_rip);

/* What the pending exception leaves behind: CR2, DR6. Once. */
void kl_x86_apply_payload(struct kl_vcpu *v);

/*
 * KVM_RUN. 0: v->exit is filled; or -errno (-EINTR, -EFAULT, -EIO...).
 * uapi has copied the program's answer to the previous exit into v->exit / pio_data.
 */
int kl_x86_run(struct kl_vcpu *v) KL_MUST_CHECK;

/* ---- life and state (state.c, cpuid.c, msr.c) -------------------------------------- */

int kl_x86_vm_init(struct kl_x86_vm *vm) KL_MUST_CHECK;
void kl_x86_vm_destroy(struct kl_x86_vm *vm);
/* Allocates, resets to the power-on state, registers with the VM. */
int kl_x86_vcpu_create(struct kl_x86_vm *vm, unsigned id, struct kl_vcpu **out) KL_MUST_CHECK;
void kl_x86_vcpu_destroy(struct kl_vcpu *v);
void kl_x86_reset(struct kl_vcpu *v, bool init_event);

void kl_x86_get_regs(struct kl_vcpu *v, struct kvm_regs *r);
void kl_x86_set_regs(struct kl_vcpu *v, const struct kvm_regs *r);
void kl_x86_get_sregs(struct kl_vcpu *v, struct kvm_sregs *s);
int kl_x86_set_sregs(struct kl_vcpu *v, const struct kvm_sregs *s) KL_MUST_CHECK;
void kl_x86_get_sregs2(struct kl_vcpu *v, struct kvm_sregs2 *s);
int kl_x86_set_sregs2(struct kl_vcpu *v, const struct kvm_sregs2 *s) KL_MUST_CHECK;
void kl_x86_get_fpu(struct kl_vcpu *v, struct kvm_fpu *f);
void kl_x86_set_fpu(struct kl_vcpu *v, const struct kvm_fpu *f);
void kl_x86_get_xsave(struct kl_vcpu *v, void *buf, unsigned size);
int kl_x86_set_xsave(struct kl_vcpu *v, const void *buf, unsigned size) KL_MUST_CHECK;
void kl_x86_get_xcrs(struct kl_vcpu *v, struct kvm_xcrs *x);
int kl_x86_set_xcrs(struct kl_vcpu *v, const struct kvm_xcrs *x) KL_MUST_CHECK;
void kl_x86_get_debugregs(struct kl_vcpu *v, struct kvm_debugregs *d);
int kl_x86_set_debugregs(struct kl_vcpu *v, const struct kvm_debugregs *d) KL_MUST_CHECK;
void kl_x86_get_events(struct kl_vcpu *v, struct kvm_vcpu_events *e);
int kl_x86_set_events(struct kl_vcpu *v, const struct kvm_vcpu_events *e) KL_MUST_CHECK;
int kl_x86_get_mp_state(struct kl_vcpu *v, struct kvm_mp_state *m) KL_MUST_CHECK;
int kl_x86_set_mp_state(struct kl_vcpu *v, const struct kvm_mp_state *m) KL_MUST_CHECK;

/* Host-initiated MSR access: 0, or -EINVAL (refused or unknown). */
int kl_x86_get_msr(struct kl_vcpu *v, uint32_t index, uint64_t *data) KL_MUST_CHECK;
int kl_x86_set_msr(struct kl_vcpu *v, uint32_t index, uint64_t data) KL_MUST_CHECK;
/* KVM_GET_MSR_INDEX_LIST, KVM_GET_MSR_FEATURE_INDEX_LIST, system KVM_GET_MSRS. */
extern const uint32_t kl_x86_msr_list[], kl_x86_feature_msr_list[];
extern const unsigned kl_x86_nr_feature_msrs;
unsigned kl_x86_nr_msrs(void);
int kl_x86_get_feature_msr(uint32_t index, uint64_t *data) KL_MUST_CHECK;

/* KVM_X86_SET_MSR_FILTER, from a checked copy. Takes ownership of nothing. 0 or -errno. */
int kl_x86_set_msr_filter(struct kl_x86_vm *vm, const struct kvm_msr_filter *f) KL_MUST_CHECK;

/* KVM_GET_SUPPORTED_CPUID / KVM_GET_EMULATED_CPUID: entries written, or -E2BIG. */
int kl_x86_supported_cpuid(struct kvm_cpuid_entry2 *e, unsigned max) KL_MUST_CHECK;
int kl_x86_emulated_cpuid(struct kvm_cpuid_entry2 *e, unsigned max) KL_MUST_CHECK;
/* KVM_SET_CPUID2: copies @e. 0, -EINVAL, -ENOMEM. */
int kl_x86_set_cpuid(struct kl_vcpu *v, const struct kvm_cpuid_entry2 *e, unsigned n) KL_MUST_CHECK;
/* KVM_GET_CPUID2. Entries in v->cpuid with dynamic bits (OSXSAVE, APIC...) up to date. */
void kl_x86_refresh_cpuid(struct kl_vcpu *v);
const struct kvm_cpuid_entry2 *kl_x86_find_cpuid(struct kl_vcpu *v, uint32_t fn, uint32_t index);

/* KVM_INTERRUPT (userspace irqchip): 0, -EINVAL, -EEXIST, -ENXIO. */
int kl_x86_interrupt(struct kl_vcpu *v, unsigned vector) KL_MUST_CHECK;
bool kl_x86_ready_for_interrupt(struct kl_vcpu *v); /* kvm_run.ready_for_interrupt_injection */
/* The PIC, or the program in its place, wants an interrupt delivered, and the APIC lets it; Xen
 * does; any of these. OUTSIDE; the last two may sleep. */
bool kl_x86_has_pic_interrupt(struct kl_vcpu *v);
bool kl_x86_has_xen_interrupt(struct kl_vcpu *v);
bool kl_x86_has_extint(struct kl_vcpu *v);
/*
 * In a hypercall that waits: sleep until an event is there, *@waiting is false, or a signal or a
 * request is pending. Who takes *@waiting away then sets KL_REQ_EVENT. Context: guest mode paused.
 */
void kl_x86_wait(struct kl_vcpu *v, const _Atomic bool *waiting);
/* One more NMI, as KVM_NMI. Any thread; does not sleep. */
void kl_x86_nmi(struct kl_vcpu *v);
/* How many of those are still to be delivered. The vCPU's thread. */
uint32_t kl_x86_nmis_waiting(struct kl_vcpu *v);

uint64_t kl_x86_get_cr8(struct kl_vcpu *v);
void kl_x86_set_cr8(struct kl_vcpu *v, uint64_t cr8);

/* The guest's TSC now. */
uint64_t kl_x86_tsc(struct kl_vcpu *v);
