/* SPDX-License-Identifier: MIT */
/*
 * Exits and their completion: ports, MMIO with several fragments, MSRs, emulation failures,
 * memory that vanished; what immediate_exit leaves behind.
 */
#include <pthread.h>
#include <sched.h>

#include "x86_env.h"

#define assert_mmio(e, gpa_, len_, write_)                            \
	do {                                                          \
		assert_run(e, KVM_EXIT_MMIO);                         \
		assert_int_equal((e)->v->exit.mmio.gpa, gpa_);        \
		assert_int_equal((e)->v->exit.mmio.len, len_);        \
		assert_int_equal((e)->v->exit.mmio.is_write, write_); \
	} while (0)

static void answer(struct env *e, uint64_t data)
{
	memcpy(e->v->exit.mmio.data, &data, 8);
}

static uint64_t written(struct env *e)
{
	uint64_t data;

	memcpy(&data, e->v->exit.mmio.data, 8);
	return data;
}

static void mmio_read(void **state)
{
	struct env *e = *state;

	env_code(e, 0x8b, 0x04, 0x25, 0, 0x40, 0x10, 0, 0xf4); /* mov eax, [P_MMIO]; hlt */
	mode64(e, 0);
	e->v->gpr[KL_RAX] = ~0ull;
	assert_mmio(e, MMIO_GPA, 4, 0);
	assert_int_equal(e->v->rip, CODE);
	assert_int_equal(e->v->gpr[KL_RAX], ~0ull);
	answer(e, 0xffffffff12345678);
	/* Completed first, although nothing more may run. */
	e->v->immediate_exit = true;
	assert_int_equal(env_run(e), -EINTR);
	assert_int_equal(e->v->gpr[KL_RAX], 0x12345678);
	assert_int_equal(e->v->rip, CODE + 7);
	assert_int_equal(env_run(e), -EINTR);
	e->v->immediate_exit = false;
	assert_run(e, KVM_EXIT_HLT);
}

static void mmio_write(void **state)
{
	struct env *e = *state;

	/* mov byte [P_MMIO + 1], 0x5a; hlt */
	env_code(e, 0xc6, 0x04, 0x25, 1, 0x40, 0x10, 0, 0x5a, 0xf4);
	mode64(e, 0);
	assert_mmio(e, MMIO_GPA + 1, 1, 1);
	assert_int_equal(written(e), 0x5a);
	assert_int_equal(e->v->rip, CODE + 8);
	assert_run(e, KVM_EXIT_HLT);
}

static void mmio_read_modify_write(void **state)
{
	struct env *e = *state;

	/* add [P_MMIO], rax; hlt */
	env_code(e, 0x48, 0x01, 0x04, 0x25, 0, 0x40, 0x10, 0, 0xf4);
	mode64(e, 0);
	e->v->gpr[KL_RAX] = 5;
	assert_mmio(e, MMIO_GPA, 8, 0);
	answer(e, 0x10);
	assert_mmio(e, MMIO_GPA, 8, 1);
	assert_int_equal(written(e), 0x15);
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->rip, CODE + 9);
}

static void mmio_two_reads(void **state)
{
	struct env *e = *state;

	env_code(e, 0x48, 0xa7, 0xf4); /* cmpsq; hlt */
	mode64(e, 0);
	e->v->gpr[KL_RSI] = P_MMIO;
	e->v->gpr[KL_RDI] = P_MMIO + 0x20;
	assert_mmio(e, MMIO_GPA, 8, 0);
	answer(e, 7);
	assert_mmio(e, MMIO_GPA + 0x20, 8, 0);
	answer(e, 7);
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->rflags & KL_FL_ZF, KL_FL_ZF);
	assert_int_equal(e->v->gpr[KL_RSI], P_MMIO + 8);
	assert_int_equal(e->v->rip, CODE + 3);
}

/* Across pages: RAM below, MMIO above, and MMIO on both sides. */
static void mmio_across_pages(void **state)
{
	struct env *e = *state;

	/* mov rax, [rsi]; mov [rdi], rax; hlt */
	env_code(e, 0x48, 0x8b, 0x06, 0x48, 0x89, 0x07, 0xf4);
	mode64(e, 0);
	e->v->gpr[KL_RSI] = P_MMIO + 0x1000 - 3;
	e->v->gpr[KL_RDI] = P_MMIO + 0x2000 - 2;
	assert_mmio(e, MMIO_GPA + 0x1000 - 3, 3, 0);
	answer(e, 0x332211);
	assert_mmio(e, MMIO_GPA + 0x1000, 5, 0);
	answer(e, 0x8877665544);
	assert_mmio(e, MMIO_GPA + 0x2000 - 2, 2, 1);
	assert_int_equal(e->v->gpr[KL_RAX], 0x8877665544332211);
	assert_int_equal(written(e), 0x2211);
	assert_int_equal(get64(e, P_MMIO + 0x2000) & 0xffffffffffff, 0x887766554433);
	assert_run(e, KVM_EXIT_HLT);
}

static void mmio_string(void **state)
{
	struct env *e = *state;

	env_code(e, 0xf3, 0xa4, 0xf4); /* rep movsb; hlt */
	mode64(e, 0);
	e->v->gpr[KL_RSI] = P_MMIO;
	e->v->gpr[KL_RDI] = 0x20000;
	e->v->gpr[KL_RCX] = 3;
	for (unsigned i = 0; i < 3; i++) {
		assert_mmio(e, MMIO_GPA + i, 1, 0);
		assert_int_equal(e->v->gpr[KL_RCX], 3 - i);
		answer(e, 'a' + i);
	}
	assert_run(e, KVM_EXIT_HLT);
	assert_memory_equal(e->mem + 0x20000, "abc", 3);
	env_code(e, 0xf3, 0xaa, 0xf4); /* rep stosb; hlt */
	mode64(e, 0);
	e->v->gpr[KL_RDI] = P_MMIO;
	e->v->gpr[KL_RCX] = 2;
	e->v->gpr[KL_RAX] = 0x77;
	assert_mmio(e, MMIO_GPA, 1, 1);
	assert_int_equal(e->v->gpr[KL_RCX], 1);
	assert_mmio(e, MMIO_GPA + 1, 1, 1);
	assert_int_equal(written(e), 0x77);
	assert_run(e, KVM_EXIT_HLT);
}

static void read_only_slot(void **state)
{
	struct env *e = *state;
	uint8_t *rom =
		mmap(NULL, 0x1000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	assert_true(rom != MAP_FAILED);
	memset(rom, 0x3c, 0x1000);
	/* mov al, [P_MMIO]; mov [P_MMIO], ah; hlt */
	env_code(e, 0x8a, 0x04, 0x25, 0, 0x40, 0x10, 0, 0x88, 0x24, 0x25, 0, 0x40, 0x10, 0, 0xf4);
	mode64(e, 0);
	assert_int_equal(env_slot(e, 1, KVM_MEM_READONLY, MMIO_GPA, 0x1000, rom), 0);
	assert_mmio(e, MMIO_GPA, 1, 1);
	assert_int_equal(e->v->gpr[KL_RAX], 0x3c);
	assert_int_equal(rom[0], 0x3c);
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(env_slot(e, 1, 0, MMIO_GPA, 0, rom), 0);
	munmap(rom, 0x1000);
}

static void emulation_failure(void **state)
{
	struct env *e = *state;

	/* fld dword [P_MMIO] is not among what KVM emulates; from ring 3 that is #UD. */
	env_code(e, 0xd9, 0x04, 0x25, 0, 0x40, 0x10, 0);
	mode64(e, 0);
	e->vm->exit_on_emulation_error = true;
	assert_run(e, KVM_EXIT_INTERNAL_ERROR);
	assert_int_equal(e->v->exit.internal.suberror, KVM_INTERNAL_ERROR_EMULATION);
	assert_true(e->v->exit.internal.insn_len >= 7);
	assert_memory_equal(e->v->exit.internal.insn, e->mem + CODE, 7);
	assert_int_equal(e->v->rip, CODE);
	e->vm->exit_on_emulation_error = false;
	mode64(e, 3);
	assert_vector(e, 6);
	mode64(e, 0);
	assert_run(e, KVM_EXIT_INTERNAL_ERROR);
}

static void fetch_from_nowhere(void **state)
{
	struct env *e = *state;

	mode64(e, 0);
	e->v->rip = P_MMIO;
	assert_run(e, KVM_EXIT_INTERNAL_ERROR);
	assert_int_equal(e->v->exit.internal.suberror, KVM_INTERNAL_ERROR_EMULATION);
}

/* ---- own devices ---- */

static unsigned device_writes;
static uint64_t device_addr;

static int device(struct kl_x86_vm *vm, bool pio, uint64_t addr, unsigned len, const void *data)
{
	if (addr != (pio ? 0x80 : MMIO_GPA))
		return -EOPNOTSUPP;
	device_addr = addr;
	device_writes++;
	return 0;
}

static void own_devices_come_first(void **state)
{
	struct env *e = *state;

	/* out 0x80, al; mov [P_MMIO], al; out 0x81, al; hlt */
	env_code(e, 0xe6, 0x80, 0x88, 0x04, 0x25, 0, 0x40, 0x10, 0, 0xe6, 0x81, 0xf4);
	mode64(e, 0);
	e->vm->io_write = device;
	device_writes = 0;
	assert_run(e, KVM_EXIT_IO);
	assert_int_equal(e->v->exit.io.port, 0x81);
	assert_int_equal(device_writes, 2);
	assert_int_equal(device_addr, MMIO_GPA);
	assert_run(e, KVM_EXIT_HLT);
}

/* ---- ports ---- */

static void port_in(void **state)
{
	struct env *e = *state;

	env_code(e, 0xec, 0xed, 0xf4); /* in al, dx; in eax, dx; hlt */
	mode64(e, 0);
	e->v->gpr[KL_RDX] = 0x3f8;
	e->v->gpr[KL_RAX] = 0x1122334455667788;
	assert_run(e, KVM_EXIT_IO);
	assert_true(e->v->exit.io.in);
	assert_int_equal(e->v->exit.io.size, 1);
	assert_int_equal(e->v->exit.io.count, 1);
	assert_int_equal(e->v->exit.io.port, 0x3f8);
	assert_int_equal(e->v->rip, CODE);
	e->v->pio_data[0] = 0xab;
	assert_run(e, KVM_EXIT_IO);
	assert_int_equal(e->v->gpr[KL_RAX], 0x11223344556677ab);
	assert_int_equal(e->v->rip, CODE + 1);
	memcpy(e->v->pio_data, "\x01\x02\x03\x84", 4);
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->gpr[KL_RAX], 0x84030201);
	/* The program moves rIP away: the IN is dropped. */
	enter_at(e, CODE, STACK);
	assert_run(e, KVM_EXIT_IO);
	e->v->rip = CODE + 2;
	e->v->pio_data[0] = 0x99;
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->gpr[KL_RAX], 0);
}

static void port_7e(void **state)
{
	struct env *e = *state;

	env_code(e, 0xe6, 0x7e, 0xe6, 0x7f, 0xf4);
	mode64(e, 0);
	assert_run(e, KVM_EXIT_IO);
	assert_int_equal(e->v->rip, CODE + 2); /* KVM's quirk */
	assert_run(e, KVM_EXIT_IO);
	assert_int_equal(e->v->exit.io.port, 0x7f);
	assert_int_equal(e->v->rip, CODE + 2);
	e->vm->disabled_quirks = KL_QUIRK_OUT_7E_INC_RIP;
	enter_at(e, CODE, STACK);
	e->v->pending = KL_PENDING_NONE;
	assert_run(e, KVM_EXIT_IO);
	assert_int_equal(e->v->rip, CODE);
}

static void port_strings(void **state)
{
	struct env *e = *state;

	env_code(e, 0xf3, 0x6c, 0xf4); /* rep insb; hlt */
	mode64(e, 0);
	e->v->gpr[KL_RDX] = 0x10;
	e->v->gpr[KL_RDI] = 0x20000 - 2; /* only two elements in the first page */
	e->v->gpr[KL_RCX] = 5;
	assert_run(e, KVM_EXIT_IO);
	assert_int_equal(e->v->exit.io.count, 2);
	assert_int_equal(e->v->gpr[KL_RCX], 5);
	memcpy(e->v->pio_data, "ab", 2);
	assert_run(e, KVM_EXIT_IO);
	assert_int_equal(e->v->exit.io.count, 3);
	assert_int_equal(e->v->gpr[KL_RCX], 3);
	memcpy(e->v->pio_data, "cde", 3);
	assert_run(e, KVM_EXIT_HLT);
	assert_memory_equal(e->mem + 0x20000 - 2, "abcde", 5);

	env_code(e, 0xf3, 0x66, 0x6f, 0xf4); /* rep outsw; hlt */
	mode64(e, 0);
	e->v->gpr[KL_RDX] = 0x10;
	e->v->gpr[KL_RSI] = 0x20000 - 2;
	e->v->gpr[KL_RCX] = 2;
	assert_run(e, KVM_EXIT_IO);
	assert_false(e->v->exit.io.in);
	assert_int_equal(e->v->exit.io.size, 2);
	assert_memory_equal(e->v->pio_data, "ab", 2);
	assert_int_equal(e->v->gpr[KL_RCX], 1); /* done when it exits */
	assert_run(e, KVM_EXIT_IO);
	assert_memory_equal(e->v->pio_data, "cd", 2);
	assert_int_equal(e->v->rip, CODE + 3);
	assert_run(e, KVM_EXIT_HLT);
}

static void port_permissions(void **state)
{
	struct env *e = *state;
	uint16_t base = 0x68;

	env_code(e, 0xe6, 0x09, 0xe6, 0x0a);
	mode64(e, 3);
	memcpy(e->mem + TSS + 102, &base, 2);
	assert_vector(e, 13); /* the bitmap begins behind the TSS limit */
	mode64(e, 3);
	memcpy(e->mem + TSS + 102, &base, 2);
	e->mem[TSS + 0x68] = 0xff;
	e->mem[TSS + 0x69] = 0xfd; /* port 9 is open */
	e->mem[TSS + 0x6a] = 0xff;
	e->v->seg[KL_TR].limit = 0x6a;
	assert_run(e, KVM_EXIT_IO);
	assert_int_equal(e->v->exit.io.port, 9);
	assert_vector(e, 13);
	mode64(e, 3);
	e->v->rflags |= KL_FL_IOPL;
	assert_run(e, KVM_EXIT_IO);
}

/* ---- MSRs ---- */

static void msr_exits(void **state)
{
	struct env *e = *state;
	uint8_t deny[8] = {0};
	struct kvm_msr_filter filter = {
		.ranges = {{.flags = KVM_MSR_FILTER_READ,
			    .nmsrs = 1,
			    .base = 0xc0000100,
			    .bitmap = deny}},
	};

	env_code(e, 0x0f, 0x32, 0x0f, 0x30, 0xf4); /* rdmsr; wrmsr; hlt */
	mode64(e, 0);
	e->v->gpr[KL_RCX] = 0xdeadbeef;
	assert_vector(e, 13);
	mode64(e, 0);
	e->v->gpr[KL_RCX] = 0xdeadbeef;
	e->vm->user_space_msr_mask = KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER;
	assert_run(e, KVM_EXIT_X86_RDMSR);
	assert_int_equal(e->v->exit.msr.index, 0xdeadbeef);
	assert_int_equal(e->v->exit.msr.why, KVM_MSR_EXIT_REASON_UNKNOWN);
	assert_int_equal(e->v->rip, CODE);
	e->v->exit.msr.data = 0x1111222233334444;
	assert_run(e, KVM_EXIT_X86_WRMSR);
	assert_int_equal(e->v->exit.msr.data, 0x1111222233334444);
	assert_int_equal(e->v->gpr[KL_RAX], 0x33334444);
	assert_int_equal(e->v->rip, CODE + 2);
	e->v->exit.msr.error = 1;
	assert_vector(e, 13);

	assert_int_equal(kl_x86_set_msr_filter(e->vm, &filter), 0);
	mode64(e, 0);
	e->v->gpr[KL_RCX] = 0xc0000100;
	assert_run(e, KVM_EXIT_X86_RDMSR);
	assert_int_equal(e->v->exit.msr.why, KVM_MSR_EXIT_REASON_FILTER);
	e->v->exit.msr.error = 0;
	e->v->exit.msr.data = 0x5000;
	assert_run(e, KVM_EXIT_HLT); /* writes are not filtered */
	assert_int_equal(e->v->seg[KL_FS].base, 0x5000);
}

/* ---- memory that is not there ---- */

/* Gone behind the engine's back (N7): -EFAULT, and once it is back the guest goes on. */
static void vanished_memory(void **state)
{
	struct env *e = *state;

	/* mov al, [0x20000]; mov [0x20000], al; hlt */
	env_code(e, 0x8a, 0x04, 0x25, 0, 0, 2, 0, 0x88, 0x04, 0x25, 0, 0, 2, 0, 0xf4);
	mode64(e, 0);
	assert_run(e, KVM_EXIT_HLT); /* everything is mapped and cached */
	assert_int_equal(munmap(e->mem + 0x20000, 0x1000), 0);
	enter_at(e, CODE, STACK);
	assert_int_equal(env_run(e), -EFAULT);
	assert_int_equal(e->v->rip, CODE);
	assert_int_equal(env_run(e), -EFAULT);
	assert_true(mmap(e->mem + 0x20000, 0x1000, PROT_READ,
			 MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED);
	assert_int_equal(env_run(e), -EFAULT); /* readable, not writable */
	assert_int_equal(e->v->rip, CODE + 7);
	assert_int_equal(mprotect(e->mem + 0x20000, 0x1000, PROT_READ | PROT_WRITE), 0);
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->rip, CODE + 15);
}

static void vanished_stack_in_delivery(void **state)
{
	struct env *e = *state;

	env_code(e, 0x0f, 0x0b);
	mode64(e, 0);
	e->v->gpr[KL_RSP] = 0x31000;
	assert_int_equal(munmap(e->mem + 0x30000, 0x1000), 0);
	assert_int_equal(env_run(e), -EFAULT);
	assert_true(e->v->exc.injected); /* begun, and begun again later */
	assert_true(mmap(e->mem + 0x30000, 0x1000, PROT_READ | PROT_WRITE,
			 MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED);
	assert_vector(e, 6);
}

/* With an interrupt controller HLT sleeps in KVM_RUN; an NMI wakes it, a flush does not. */
static void hlt_with_irqchip_waits(void **state)
{
	struct env *e = *state;
	pthread_t t;
	void *r;

	env_code(e, 0xf4);
	mode64(e, 0);
	memcpy(e->mem + HANDLER(2), (uint8_t[]){0xe6, 0x55}, 2); /* out 0x55, al */
	assert_int_equal(pthread_create(&t, NULL, env_thread, e), 0);
	while (!atomic_load(&e->v->core.sleeping))
		sched_yield();
	assert_int_equal(atomic_load(&e->v->mp_state), KVM_MP_STATE_HALTED);
	assert_int_equal(kl_vcpus_flush(&e->vm->mem, true), 0); /* does not wait for a sleeper */
	assert_int_equal(atomic_load(&e->v->core.requests), KL_REQ_TLB_FLUSH);
	atomic_fetch_add(&e->v->nmi.pending, 1);
	kl_vcpu_request(&e->v->core, KL_REQ_EVENT);
	assert_int_equal(pthread_join(t, &r), 0);
	assert_int_equal((intptr_t)r, 0);
	assert_int_equal(e->v->exit.reason, KVM_EXIT_IO);
	assert_int_equal(e->v->exit.io.port, 0x55);
}

/* So it does without one if the program wants no exit. */
static void hlt_without_exit_waits(void **state)
{
	struct env *e = *state;
	pthread_t t;
	void *r;

	env_code(e, 0xf4);
	mode64(e, 0);
	e->vm->disabled_exits |= KVM_X86_DISABLE_EXITS_HLT;
	memcpy(e->mem + HANDLER(2), (uint8_t[]){0xe6, 0x55}, 2); /* out 0x55, al */
	assert_int_equal(pthread_create(&t, NULL, env_thread, e), 0);
	while (!atomic_load(&e->v->core.sleeping))
		sched_yield();
	kl_x86_nmi(e->v);
	assert_int_equal(pthread_join(t, &r), 0);
	assert_int_equal((intptr_t)r, 0);
	assert_int_equal(e->v->exit.reason, KVM_EXIT_IO);
}

int main(void)
{
#define TEST(f) cmocka_unit_test_setup_teardown(f, env_setup, env_teardown)
	const struct CMUnitTest tests[] = {
		TEST(mmio_read),
		TEST(mmio_write),
		TEST(mmio_read_modify_write),
		TEST(mmio_two_reads),
		TEST(mmio_across_pages),
		TEST(mmio_string),
		TEST(read_only_slot),
		TEST(emulation_failure),
		TEST(fetch_from_nowhere),
		TEST(own_devices_come_first),
		TEST(port_in),
		TEST(port_7e),
		TEST(port_strings),
		TEST(port_permissions),
		TEST(msr_exits),
		TEST(vanished_memory),
		TEST(vanished_stack_in_delivery),
		TEST(hlt_without_exit_waits),
		cmocka_unit_test_setup_teardown(hlt_with_irqchip_waits, env_setup_apic,
						env_teardown),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
