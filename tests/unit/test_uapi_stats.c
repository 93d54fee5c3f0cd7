/* SPDX-License-Identifier: MIT */
/*
 * Statistics: layout of the files [api.rst 4.134], every figure driven by a guest that does
 * what it counts, and the --stats table equal to the sum of the files.
 */
#include <poll.h>
#include <pthread.h>
#include <stdio.h>

#include "host/cpu.h"
#include "mem/notifier.h"
#include "uapi_guest.h"

struct figures {
	unsigned n;
	struct kvm_stats_header head;
	char name[64][48];
	uint32_t flags[64];
	uint64_t value[64];
};

static ssize_t stats_pread(struct dev *d, void *buf, size_t len, off_t at)
{
	ssize_t r;

	kl_engine_enter();
	r = kl_uapi_read(d->obj, buf, len, &at);
	kl_engine_leave();
	return r;
}

static void read_figures(struct dev *owner, struct figures *f)
{
	struct dev d = make(owner, KVM_GET_STATS_FD, 0);
	const size_t entry = sizeof(struct kvm_stats_desc) + 48;

	memset(f, 0, sizeof(*f));
	assert_int_equal(stats_pread(&d, &f->head, sizeof(f->head), 0), sizeof(f->head));
	f->n = f->head.num_desc;
	assert_in_range(f->n, 1, 64);
	for (unsigned i = 0; i < f->n; i++) {
		char raw[sizeof(struct kvm_stats_desc) + 48];
		struct kvm_stats_desc *desc = (void *)raw;

		assert_int_equal(
			stats_pread(&d, raw, entry, (off_t)(f->head.desc_offset + i * entry)),
			entry);
		assert_int_equal(desc->size, 1);
		memcpy(f->name[i], raw + sizeof(*desc), 48);
		f->flags[i] = desc->flags;
		assert_int_equal(
			stats_pread(&d, &f->value[i], 8, (off_t)f->head.data_offset + desc->offset),
			8);
	}
	dev_close(&d);
}

static uint64_t figure(const struct figures *f, const char *name)
{
	for (unsigned i = 0; i < f->n; i++) {
		if (!strcmp(f->name[i], name))
			return f->value[i];
	}
	fail_msg("no figure %s", name);
	return 0;
}

/* ---- layout ------------------------------------------------------------------------ */

static void check_layout(struct dev *owner, const char *id_end)
{
	struct dev d = make(owner, KVM_GET_STATS_FD, 0);
	struct kvm_stats_header h;
	char id[48], whole[8192], parts[8192], want[48];
	const size_t entry = sizeof(struct kvm_stats_desc) + 48;
	ssize_t size, at = 0;

	size = stats_pread(&d, whole, sizeof(whole), 0);
	memcpy(&h, whole, sizeof(h));
	assert_int_equal(h.flags, 0);
	assert_int_equal(h.name_size, 48);
	assert_int_equal(h.id_offset, sizeof(h));
	assert_int_equal(h.desc_offset, sizeof(h) + 48);
	assert_int_equal(h.data_offset, h.desc_offset + h.num_desc * entry);
	assert_int_equal(size, h.data_offset + h.num_desc * 8);
	memcpy(id, whole + h.id_offset, 48);
	snprintf(want, sizeof(want), "kvm-%d%s", (int)getpid(), id_end);
	assert_string_equal(id, want);
	for (unsigned i = 0; i < h.num_desc; i++) {
		char *p = whole + h.desc_offset + i * entry;
		struct kvm_stats_desc *desc = (void *)p;

		assert_in_range(strnlen(p + sizeof(*desc), 48), 1, 47);
		assert_int_equal(desc->flags & ~0xfu, 0);
		assert_in_range(desc->flags, KVM_STATS_TYPE_CUMULATIVE, KVM_STATS_TYPE_INSTANT);
		assert_int_equal(desc->exponent, 0);
		assert_int_equal(desc->bucket_size, 0);
		assert_true(desc->offset + 8 <= h.num_desc * 8);
		assert_int_equal(desc->offset % 8, 0);
		for (unsigned j = 0; j < i; j++)
			assert_string_not_equal(p + sizeof(*desc),
						p + sizeof(*desc) - (i - j) * entry);
	}
	/* Any cut of the file gives the same bytes; read() moves on, past the end is 0. */
	for (size_t step = 1; at < size; step = step % 101 + 7) {
		ssize_t n = kl_uapi_read(d.obj, parts + at, step, NULL);

		assert_true(n > 0 && n <= (ssize_t)step);
		at += n;
		assert_int_equal(kl_uapi_lseek(d.obj, 3, SEEK_SET), at);
	}
	assert_int_equal(at, size);
	assert_memory_equal(parts, whole, size);
	assert_int_equal(kl_uapi_read(d.obj, parts, 8, NULL), 0);
	assert_int_equal(stats_pread(&d, parts, 8, size), 0);
	assert_int_equal(stats_pread(&d, parts, 8, INT64_MAX), 0);
	assert_int_equal(stats_pread(&d, parts, SIZE_MAX, size - 3), 3);
	assert_int_equal(stats_pread(&d, parts, 8, -1), -EINVAL);
	assert_int_equal(stats_pread(&d, NULL, 8, 0), -EFAULT);
	assert_int_equal(stats_pread(&d, NULL, 8, size - 8), -EFAULT);
	assert_int_equal(stats_pread(&d, parts, 0, 0), 0);
	assert_int_equal(dev_ioctl(&d, KVM_GET_STATS_FD, 0), -ENOTTY);
	dev_close(&d);
}

static void layout(void **state)
{
	struct guest g;

	(void)state;
	guest_make(&g, false);
	check_layout(&g.vm, "");
	check_layout(&g.vcpu, "/vcpu-0");
	guest_free(&g);
}

/* ---- figures ----------------------------------------------------------------------- */

static struct guest g;
static struct figures vm0, vm1, vcpu0, vcpu1;

static int setup(void **state)
{
	(void)state;
	guest_make(&g, false);
	read_figures(&g.vm, &vm0);
	read_figures(&g.vcpu, &vcpu0);
	return 0;
}

static int teardown(void **state)
{
	(void)state;
	guest_free(&g);
	return 0;
}

static uint64_t vcpu_delta(const char *name)
{
	read_figures(&g.vcpu, &vcpu1);
	return figure(&vcpu1, name) - figure(&vcpu0, name);
}

static uint64_t vm_delta(const char *name)
{
	read_figures(&g.vm, &vm1);
	return figure(&vm1, name) - figure(&vm0, name);
}

static void exits_are_counted(void **state)
{
	(void)state;
	/* out 0x80,al; in al,0x80; mov [0],al; mov al,[1]; hlt */
	guest_code(&g, 0xe6, 0x80, 0xe4, 0x80, 0xa2, 0x00, 0x00, 0xa0, 0x01, 0x00, 0xf4);
	assert_exit(&g, KVM_EXIT_IO);
	assert_int_equal(vcpu_delta("io_exits"), 1);
	assert_exit(&g, KVM_EXIT_IO);
	assert_int_equal(vcpu_delta("io_exits"), 2);
	assert_int_equal(vcpu_delta("mmio_exits"), 0);
	assert_exit(&g, KVM_EXIT_MMIO);
	assert_exit(&g, KVM_EXIT_MMIO);
	assert_int_equal(vcpu_delta("mmio_exits"), 2);
	assert_int_equal(vcpu_delta("halt_exits"), 0);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(vcpu_delta("halt_exits"), 1);
	assert_int_equal(vcpu_delta("exits"), 5);
	assert_int_equal(vcpu_delta("io_exits"), 2);
	assert_int_equal(vcpu_delta("signal_exits"), 0);
}

static void instructions_are_counted(void **state)
{
	(void)state;
	/* mov cx,100; l: dec cx; jnz l; hlt */
	guest_code(&g, 0xb9, 0x64, 0x00, 0x49, 0x75, 0xfd, 0xf4);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(vcpu_delta("instructions"), 1 + 200 + 1);
}

static void faults_are_counted(void **state)
{
	(void)state;
	/* Code, then two more pages: cs: mov [0x3000],al; cs: mov [0x4000],al; again; hlt */
	guest_code(&g, 0x2e, 0xa2, 0x00, 0x30, 0x2e, 0xa2, 0x00, 0x40, 0x2e, 0xa2, 0x00, 0x30,
		   0xf4);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_in_range(vcpu_delta("pf_taken"), 2, 6);
	assert_true(vcpu_delta("pf_fixed") >= 2);
	assert_true(vcpu_delta("pf_fixed") <= vcpu_delta("pf_taken"));
	assert_true(vm_delta("pages_4k") >= 2);
}

static void interrupts_are_counted(void **state)
{
	struct kvm_interrupt irq = {.irq = 0x20};

	(void)state;
	set_vector(&g, 2, 0x2000);
	set_vector(&g, 0x20, 0x2000);
	g.ram[0x2000] = 0xcf;
	guest_code(&g, 0x90, 0xf4, 0xfb, 0x90, 0xf4); /* nop; hlt; sti; nop; hlt */
	assert_int_equal(dev_ioctl(&g.vcpu, KVM_NMI, 0), 0);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(vcpu_delta("nmi_injections"), 1);
	assert_int_equal(vcpu_delta("irq_injections"), 0);
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_INTERRUPT, &irq), 0);
	/* It returns behind the hlt, into zeroes: add [bx+si],al, on MMIO. */
	assert_exit(&g, KVM_EXIT_MMIO);
	assert_int_equal(vcpu_delta("irq_injections"), 1);
}

static void guest_page_faults_are_counted(void **state)
{
	uint32_t *pd = (uint32_t *)(g.ram + 0x4000);
	struct kvm_sregs s;

	(void)state;
	/* 32-bit paging, 4 MiB page at 0, nothing behind it; no IDT: a #PF ends in shutdown. */
	guest_code(&g, 0xa0, 0x00, 0x00, 0x80, 0x00); /* mov al,[0x800000] */
	pd[0] = 0x83;
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_GET_SREGS, &s), 0);
	s.cr0 |= 0x80000001;
	s.cr3 = 0x4000;
	s.cr4 |= 0x10;
	s.idt.limit = 0;
	s.cs = (struct kvm_segment){
		.limit = ~0u, .selector = 8, .type = 11, .present = 1, .db = 1, .s = 1, .g = 1};
	s.ds = (struct kvm_segment){
		.limit = ~0u, .selector = 16, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1};
	assert_int_equal(dev_ioctl_p(&g.vcpu, KVM_SET_SREGS, &s), 0);
	assert_exit(&g, KVM_EXIT_SHUTDOWN);
	assert_int_equal(vcpu_delta("pf_guest"), 1);
}

static void emulation_is_counted(void **state)
{
	struct kvm_enable_cap cap = {.cap = KVM_CAP_EXIT_ON_EMULATION_FAILURE, .args = {1}};

	(void)state;
	assert_int_equal(dev_ioctl_p(&g.vm, KVM_ENABLE_CAP, &cap), 0);
	guest_code(&g, 0xa2, 0x00, 0x00, 0xd9, 0x06, 0x00, 0x00); /* mov [0],al; fld dword [0] */
	assert_exit(&g, KVM_EXIT_MMIO);
	assert_int_equal(vcpu_delta("insn_emulation"), 1);
	assert_int_equal(vcpu_delta("insn_emulation_fail"), 0);
	assert_exit(&g, KVM_EXIT_INTERNAL_ERROR);
	assert_int_equal(vcpu_delta("insn_emulation_fail"), 1);
}

static void hypercalls_are_counted(void **state)
{
	(void)state;
	if (kl_host_is_intel())
		guest_code(&g, 0x0f, 0x01, 0xc1, 0xf4); /* vmcall; hlt */
	else
		guest_code(&g, 0x0f, 0x01, 0xd9, 0xf4); /* vmmcall; hlt */
	assert_exit(&g, KVM_EXIT_HLT);
	assert_int_equal(vcpu_delta("hypercalls"), 1);
}

static void signals_are_counted(void **state)
{
	(void)state;
	guest_code(&g, 0xeb, 0xfe);
	/* As if a signal had been deferred between entering the engine and the guest. */
	kl_engine_enter();
	kl_self.sig_pending = 1;
	assert_int_equal(kl_uapi_ioctl(g.vcpu.obj, KVM_RUN, 0, &(struct kl_object *){0}), -EINTR);
	kl_self.sig_pending = 0;
	kl_engine_leave();
	assert_int_equal(g.run->exit_reason, KVM_EXIT_INTR);
	assert_int_equal(vcpu_delta("signal_exits"), 1);
}

static void *run_thread(void *arg)
{
	(void)arg;
	return (void *)guest_run(&g);
}

static void memory_events_are_counted(void **state)
{
	_Atomic uint8_t *flag = (void *)(g.ram + 0x3000);
	struct kl_notifier_range range = {
		.start = (uint64_t)g.ram + 0x5000,
		.end = (uint64_t)g.ram + 0x6000,
		.event = KL_EVENT_UNMAP,
		.may_block = true,
	};
	pthread_t thread;

	(void)state;
	/* l: cs: inc byte [0x3000]; cs: mov al,[0x5000]; cs: cmp byte [0x3001],0; je l; hlt */
	guest_code(&g, 0x2e, 0xfe, 0x06, 0x00, 0x30, 0x2e, 0xa0, 0x00, 0x50, 0x2e, 0x80, 0x3e, 0x01,
		   0x30, 0x00, 0x74, 0xef, 0xf4);
	assert_int_equal(pthread_create(&thread, NULL, run_thread, NULL), 0);
	while (*flag < 2) /* once round: the page at 0x5000 is mapped */
		sched_yield();
	kl_engine_enter();
	assert_int_equal(kl_notifier_begin(&range), 0);
	kl_notifier_end(&range);
	kl_engine_leave();
	flag[1] = 1;
	assert_int_equal(pthread_join(thread, NULL), 0);
	assert_int_equal(vm_delta("mmu_invalidations"), 1);
	assert_true(vm_delta("remote_tlb_flush_requests") >= 1);
	assert_true(vm_delta("remote_tlb_flush") >= 1);
	assert_true(vcpu_delta("tlb_flush") >= 1);
	assert_true(vcpu_delta("request_exits") >= 1);
	assert_int_equal(vm_delta("memslot_changes"), 0);
	assert_int_equal(set_slot(&g, 1, 0, MMIO, 4096, g.ram), 0);
	assert_int_equal(set_slot(&g, 1, 0, MMIO, 0, g.ram), 0);
	assert_int_equal(vm_delta("memslot_changes"), 2);
}

/* ---- the two agree ----------------------------------------------------------------- */

static uint64_t row(const char *table, const char *section, const char *name)
{
	const char *p = strstr(table, section);
	char line[64];

	assert_non_null(p);
	snprintf(line, sizeof(line), "\n  %-28s", name);
	p = strstr(p, line);
	if (!p)
		fail_msg("no row %s", name);
	return strtoull(p + strlen(line), NULL, 10);
}

static void print_table(char *buf, size_t size)
{
	int fds[2];
	ssize_t n;

	assert_int_equal(pipe(fds), 0);
	kl_engine_enter();
	kl_uapi_print_stats(fds[1]);
	kl_engine_leave();
	n = read(fds[0], buf, size - 1);
	assert_true(n > 0);
	buf[n] = '\0';
	close(fds[0]);
	close(fds[1]);
}

static void table_agrees(void **state)
{
	char before[8192], living[8192], after[8192];
	struct figures f[2];

	(void)state;
	print_table(before, sizeof(before)); /* of what earlier tests left, and of g */
	guest_code(&g, 0xe6, 0x80, 0xa2, 0x00, 0x00, 0xf4);
	assert_exit(&g, KVM_EXIT_IO);
	assert_exit(&g, KVM_EXIT_MMIO);
	assert_exit(&g, KVM_EXIT_HLT);
	print_table(living, sizeof(living));
	read_figures(&g.vm, &f[0]);
	read_figures(&g.vcpu, &f[1]);
	guest_free(&g);
	print_table(after, sizeof(after));
	for (int k = 0; k < 2; k++) {
		const char *section = k ? "vCPU counters" : "VM counters";
		const struct figures *old = k ? &vcpu0 : &vm0;

		for (unsigned i = 0; i < f[k].n; i++) {
			const char *name = f[k].name[i];
			uint64_t delta = f[k].value[i] - figure(old, name);

			assert_int_equal(row(living, section, name) - row(before, section, name),
					 delta);
			if ((f[k].flags[i] & KVM_STATS_TYPE_MASK) == KVM_STATS_TYPE_CUMULATIVE)
				assert_int_equal(row(after, section, name),
						 row(living, section, name));
		}
	}
	assert_int_equal(row(living, "exits to", "IO") - row(before, "exits to", "IO"), 1);
	assert_int_equal(row(living, "exits to", "MMIO") - row(before, "exits to", "MMIO"), 1);
	assert_int_equal(row(living, "exits to", "HLT") - row(before, "exits to", "HLT"), 1);
	assert_int_equal(row(after, "exits to", "HLT"), row(living, "exits to", "HLT"));
	assert_int_equal(row(after, "kvmlet", "VMs"), row(before, "kvmlet", "VMs"));
	assert_true(row(after, "kvmlet", "vCPUs") >= 1);
	guest_make(&g, false); /* for teardown */
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(layout),
		T(exits_are_counted),
		T(instructions_are_counted),
		T(faults_are_counted),
		T(interrupts_are_counted),
		T(guest_page_faults_are_counted),
		T(emulation_is_counted),
		T(hypercalls_are_counted),
		T(signals_are_counted),
		T(memory_events_are_counted),
		T(table_agrees),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
