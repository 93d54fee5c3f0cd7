/* SPDX-License-Identifier: MIT */
/* Machine checks that the program injects, and the MSRs of the banks. */
#include "x86_env.h"

#include "x86/mce.h"
#include "x86/msr.h"

#define VAL  (1ull << 63)
#define OVER (1ull << 62)
#define UC   (1ull << 61)
#define PCC  (1ull << 57)
#define MCIP 4ull
#define BANK 5u

#define MC_CTL(n)    (0x400u + 4 * (n))
#define MC_STATUS(n) (0x401u + 4 * (n))
#define MC_ADDR(n)   (0x402u + 4 * (n))
#define MC_CTL2(n)   (0x280u + (n))

static uint64_t msr(struct env *e, uint32_t index)
{
	uint64_t data = 0;

	assert_int_equal(kl_x86_get_msr(e->v, index, &data), 0);
	return data;
}

static int inject(struct env *e, unsigned bank, uint64_t status, uint64_t mcg_status)
{
	struct kvm_x86_mce m = {.status = status,
				.addr = 0x1234000,
				.misc = 0x8c,
				.mcg_status = mcg_status,
				.bank = (uint8_t)bank};

	return kl_mce_inject(e->v, &m);
}

static void start(struct env *e)
{
	env_code(e, 0xf4);
	mode64(e, 0);
	e->v->cr4 |= KL_CR4_MCE;
	assert_int_equal(kl_mce_setup(e->v, KL_MCG_CTL_P | KL_MCG_SER_P | 10), 0);
}

static void setup_checks(void **state)
{
	struct env *e = *state;
	uint64_t data;

	assert_int_equal(msr(e, 0x179), 32);
	assert_int_equal(kl_mce_setup(e->v, 0), -EINVAL);
	assert_int_equal(kl_mce_setup(e->v, 33), -EINVAL);
	assert_int_equal(kl_mce_setup(e->v, 10 | 1ull << 9), -EINVAL);
	assert_int_equal(kl_mce_setup(e->v, 10 | KL_MCG_CTL_P | 0x30000), 0);
	assert_int_equal(msr(e, 0x179), 10 | KL_MCG_CTL_P | 0x30000);
	assert_int_equal(msr(e, KL_MSR_MCG_CTL), ~0ull);
	assert_int_equal(msr(e, MC_CTL(9)), ~0ull);
	assert_int_equal(kl_x86_get_msr(e->v, MC_CTL(10), &data), -EINVAL);
	assert_int_equal(kl_x86_set_msr(e->v, MC_CTL(10), 0), -EINVAL);
	assert_int_equal(kl_x86_set_msr(e->v, MC_CTL(1), 5), -EINVAL);
	assert_int_equal(kl_x86_set_msr(e->v, MC_CTL(1), ~1ull), 0);
	assert_int_equal(kl_x86_set_msr(e->v, KL_MSR_MCG_CTL, 1), -EINVAL);
	assert_int_equal(kl_x86_set_msr(e->v, 0x179, 10), -EINVAL);
	assert_int_equal(inject(e, 10, VAL, 0), -EINVAL);
	assert_int_equal(inject(e, 1, UC, 0), -EINVAL);
}

static void uncorrected(void **state)
{
	struct env *e = *state;

	start(e);
	assert_int_equal(inject(e, BANK, VAL | UC | PCC, MCIP), 0);
	assert_vector(e, 18);
	assert_int_equal(msr(e, MC_STATUS(BANK)), VAL | UC | PCC);
	assert_int_equal(msr(e, MC_ADDR(BANK)), 0x1234000);
	assert_int_equal(msr(e, KL_MSR_MCG_STATUS), MCIP);
	/* A second one before the first was dealt with. */
	enter_at(e, CODE, STACK);
	assert_int_equal(inject(e, BANK, VAL | UC | PCC, MCIP), 0);
	assert_run(e, KVM_EXIT_SHUTDOWN);
	/* Overflow, when the guest has only said that it is ready. */
	assert_int_equal(kl_x86_set_msr(e->v, KL_MSR_MCG_STATUS, 0), 0);
	mode64(e, 0);
	e->v->cr4 |= KL_CR4_MCE;
	assert_int_equal(inject(e, BANK, VAL | UC | PCC, MCIP), 0);
	assert_vector(e, 18);
	assert_int_equal(msr(e, MC_STATUS(BANK)), VAL | UC | PCC | OVER);
}

static void without_cr4_mce(void **state)
{
	struct env *e = *state;

	start(e);
	e->v->cr4 &= ~(uint64_t)KL_CR4_MCE;
	assert_int_equal(inject(e, BANK, VAL | UC | PCC, MCIP), 0);
	assert_run(e, KVM_EXIT_SHUTDOWN);
}

static void reporting_off(void **state)
{
	struct env *e = *state;

	start(e);
	assert_int_equal(kl_x86_set_msr(e->v, MC_CTL(BANK), 0), 0);
	assert_int_equal(inject(e, BANK, VAL | UC | PCC, MCIP), 0);
	assert_int_equal(kl_x86_set_msr(e->v, MC_CTL(BANK), ~0ull), 0);
	assert_int_equal(kl_x86_set_msr(e->v, KL_MSR_MCG_CTL, 0), 0);
	assert_int_equal(inject(e, BANK, VAL | UC | PCC, MCIP), 0);
	assert_int_equal(msr(e, MC_STATUS(BANK)), 0);
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->rip, CODE + 1);
}

static void corrected(void **state)
{
	struct env *e = *state;

	start(e);
	assert_int_equal(inject(e, BANK, VAL | 1, MCIP), 0);
	assert_int_equal(msr(e, MC_STATUS(BANK)), VAL | 1);
	assert_int_equal(inject(e, BANK, VAL | 2, MCIP), 0);
	assert_int_equal(msr(e, MC_STATUS(BANK)), VAL | OVER | 2);
	/* It does not overwrite an uncorrected one. */
	assert_int_equal(kl_x86_set_msr(e->v, MC_STATUS(BANK), VAL | UC | 7), 0);
	assert_int_equal(inject(e, BANK, VAL | 3, MCIP), 0);
	assert_int_equal(msr(e, MC_STATUS(BANK)), VAL | UC | OVER | 7);
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->rip, CODE + 1);
}

/* No action required: in the registers, no exception. */
static void ucna(void **state)
{
	struct env *e = *state;

	start(e);
	assert_int_equal(kl_mce_setup(e->v, KL_MCG_CTL_P | KL_MCG_CMCI_P | 10), 0);
	assert_int_equal(kl_x86_set_msr(e->v, MC_CTL2(BANK), 1ull << 30 | 1), 0);
	assert_int_equal(inject(e, BANK, VAL | UC, 0), 0);
	assert_int_equal(msr(e, MC_ADDR(BANK)), 0x1234000);
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->rip, CODE + 1);
}

/* By the guest: #GP where the program may. */
static void guest_msrs(void **state)
{
	struct env *e = *state;
	uint64_t data;

	env_code(e, 0x0f, 0x30, 0xf4); /* wrmsr; hlt */
	mode64(e, 0);
	e->v->gpr[KL_RCX] = MC_STATUS(0);
	e->v->gpr[KL_RAX] = 1;
	assert_vector(e, 13);
	mode64(e, 0);
	e->v->gpr[KL_RCX] = MC_STATUS(0);
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->rip, CODE + 3);
	mode64(e, 0);
	e->v->gpr[KL_RCX] = MC_CTL2(0);
	assert_vector(e, 13);
	assert_int_equal(kl_x86_get_msr(e->v, MC_CTL2(0), &data), 0);
	assert_int_equal(kl_mce_setup(e->v, KL_MCG_CMCI_P | 10), 0);
	mode64(e, 0);
	e->v->gpr[KL_RCX] = MC_CTL2(0);
	assert_run(e, KVM_EXIT_HLT);
	assert_int_equal(e->v->rip, CODE + 3);
	mode64(e, 0);
	e->v->gpr[KL_RCX] = MC_CTL2(0);
	e->v->gpr[KL_RAX] = 1u << 29; /* reserved */
	assert_vector(e, 13);
}

#define TEST(fn) cmocka_unit_test_setup_teardown(fn, env_setup, env_teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TEST(setup_checks), TEST(uncorrected), TEST(without_cr4_mce), TEST(reporting_off),
		TEST(corrected),    TEST(ucna),        TEST(guest_msrs),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
