/* SPDX-License-Identifier: MIT */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/failpoint.h"
#include "host/timer.h"
#include "x86/irq_routing.h"
#include "x86/lapic.h"
#include "x86/pit.h"

#define FREQUENCY     1193181u
#define NS_PER_S      1000000000ull
#define MIN_PERIOD_NS 200000u /* KVM's default for kvm.min_timer_period_us */
#define GSI           0

#define PORT_BASE    0x40
#define PORT_SPEAKER 0x61
#define CONTROL      3

#define NO_MODE 0xff /* before the guest has chosen one */

/* kvm_pit_channel_state: rw_mode, read_state, write_state. */
enum { LATCH, LSB, MSB, WORD, WORD_MSB };

struct kl_pit {
	struct kl_x86_vm *vm;
	struct kl_mutex lock; /* rank PIT */
	struct kvm_pit_channel_state ch[3];
	uint32_t flags;
	bool speaker; /* has port 0x61; immutable */

	struct kl_timer timer;
	uint64_t period; /* ns */
	bool periodic;
	_Atomic uint64_t expires;

	_Atomic bool reinject; /* written under the lock */
	_Atomic int pending;
	_Atomic bool irq_ack;
	struct kl_irq_listener listener; /* in the VM's list while reinject */
};

/* ---- ticks ------------------------------------------------------------------------- */

static void tick(struct kl_pit *pit)
{
	if (atomic_load(&pit->reinject) && !atomic_exchange(&pit->irq_ack, false))
		return;
	kl_irq_set(pit->vm, KL_IRQ_PIT, GSI, true, false);
	kl_irq_set(pit->vm, KL_IRQ_PIT, GSI, false, false);
	kl_apic_nmi_watchdog(pit->vm);
}

static void expired(struct kl_timer *t)
{
	struct kl_pit *pit = kl_container_of(t, struct kl_pit, timer);
	uint64_t next;

	if (atomic_load(&pit->reinject))
		atomic_fetch_add(&pit->pending, 1); /* (a) */
	tick(pit);
	if (!pit->periodic)
		return;
	next = atomic_load_explicit(&pit->expires, memory_order_relaxed) + pit->period;
	atomic_store_explicit(&pit->expires, next, memory_order_relaxed);
	kl_timer_arm(t, next);
}

static void acked(struct kl_irq_listener *l)
{
	struct kl_pit *pit = kl_container_of(l, struct kl_pit, listener);
	int n;

	atomic_store(&pit->irq_ack, true); /* (a) */
	n = atomic_load(&pit->pending);
	while (n > 0 && !atomic_compare_exchange_weak(&pit->pending, &n, n - 1))
		;
	if (n > 1)
		tick(pit);
}

static void reset_reinject(struct kl_pit *pit)
{
	atomic_store(&pit->pending, 0);
	atomic_store(&pit->irq_ack, true);
}

/* What was lost while the line was masked is not made up for. */
static void masked(struct kl_irq_listener *l, bool mask)
{
	if (!mask)
		reset_reinject(kl_container_of(l, struct kl_pit, listener));
}

void kl_pit_set_reinject(struct kl_pit *pit, bool reinject)
{
	kl_mutex_lock(&pit->lock);
	if (atomic_load(&pit->reinject) != reinject) {
		if (reinject) {
			reset_reinject(pit);
			kl_irq_listener_add(pit->vm, &pit->listener);
		} else {
			kl_irq_listener_del(pit->vm, &pit->listener);
		}
		atomic_store(&pit->reinject, reinject);
	}
	kl_mutex_unlock(&pit->lock);
}

/* ---- counting ---------------------------------------------------------------------- */

static uint64_t scale(uint64_t val, uint64_t mul, uint64_t div)
{
	return (uint64_t)((unsigned __int128)val * mul / div);
}

static uint64_t to_ticks(uint64_t ns)
{
	return scale(ns, FREQUENCY, NS_PER_S);
}

/* Clock ticks since the counter was loaded; the first channel's start anew with each period. */
static uint64_t elapsed(struct kl_pit *pit, unsigned n)
{
	uint64_t now = kl_timer_now();

	if (n)
		return to_ticks(now - (uint64_t)pit->ch[n].count_load_time);
	if (!pit->period)
		return 0;
	return to_ticks(pit->period -
			(atomic_load_explicit(&pit->expires, memory_order_relaxed) - now));
}

static uint32_t current_count(struct kl_pit *pit, unsigned n)
{
	const struct kvm_pit_channel_state *c = &pit->ch[n];
	uint64_t d = elapsed(pit, n);

	switch (c->mode) {
	case 0:
	case 1:
	case 4:
	case 5: /* goes on below zero */
		return (uint32_t)(c->count - d) & 0xffff;
	case 3: /* by twos */
		return c->count - (uint32_t)(2 * d % c->count);
	default:
		return c->count - (uint32_t)(d % c->count);
	}
}

static bool output(struct kl_pit *pit, unsigned n)
{
	const struct kvm_pit_channel_state *c = &pit->ch[n];
	uint64_t d = elapsed(pit, n);

	switch (c->mode) {
	case 1:
		return d < c->count;
	case 2:
		return d && d % c->count == 0;
	case 3:
		return d % c->count < (c->count + 1ull) >> 1;
	case 4:
	case 5:
		return d == c->count;
	default:
		return d >= c->count;
	}
}

static void stop_timer(struct kl_pit *pit)
{
	kl_timer_cancel(&pit->timer);
}

static void start_timer(struct kl_pit *pit, uint32_t count, bool periodic)
{
	uint64_t interval = scale(count, NS_PER_S, FREQUENCY), at;

	/* The HPET has taken the interrupt over. */
	if (pit->flags & KVM_PIT_FLAGS_HPET_LEGACY)
		return;
	stop_timer(pit);
	reset_reinject(pit);
	pit->periodic = periodic;
	pit->period = periodic ? kl_max(interval, (uint64_t)MIN_PERIOD_NS) : interval;
	at = kl_timer_now() + interval;
	atomic_store_explicit(&pit->expires, at, memory_order_relaxed);
	kl_timer_arm(&pit->timer, at);
}

static void load_count(struct kl_pit *pit, unsigned n, uint32_t val)
{
	kl_assert_held(&pit->lock);
	if (!val)
		val = 0x10000;
	pit->ch[n].count = val;
	if (n) {
		pit->ch[n].count_load_time = (int64_t)kl_timer_now();
		return;
	}
	switch (pit->ch[0].mode) {
	case 0:
	case 1:
	case 4:
		start_timer(pit, val, false);
		break;
	case 2:
	case 3:
		start_timer(pit, val, true);
		break;
	default:
		stop_timer(pit);
	}
}

/* ---- ports ------------------------------------------------------------------------- */

static void latch_count(struct kl_pit *pit, unsigned n)
{
	struct kvm_pit_channel_state *c = &pit->ch[n];

	if (c->count_latched)
		return;
	c->latched_count = (uint16_t)current_count(pit, n);
	c->count_latched = c->rw_mode;
}

static void latch_status(struct kl_pit *pit, unsigned n)
{
	struct kvm_pit_channel_state *c = &pit->ch[n];

	if (c->status_latched)
		return;
	c->status = (uint8_t)(output(pit, n) << 7 | c->rw_mode << 4 | c->mode << 1 | c->bcd);
	c->status_latched = 1;
}

static void write_control(struct kl_pit *pit, uint8_t val)
{
	unsigned n = val >> 6, access = val >> 4 & 3;
	struct kvm_pit_channel_state *c;

	if (n == 3) { /* read-back, of several at once; inverted bits */
		for (n = 0; n < 3; n++) {
			if (!(val & (2u << n)))
				continue;
			if (!(val & 0x20))
				latch_count(pit, n);
			if (!(val & 0x10))
				latch_status(pit, n);
		}
		return;
	}
	if (access == LATCH) {
		latch_count(pit, n);
		return;
	}
	c = &pit->ch[n];
	c->rw_mode = c->read_state = c->write_state = (uint8_t)access;
	c->mode = val >> 1 & 7;
	if (c->mode > 5)
		c->mode -= 4;
	c->bcd = val & 1;
}

static void write_count(struct kl_pit *pit, unsigned n, uint8_t val)
{
	struct kvm_pit_channel_state *c = &pit->ch[n];

	switch (c->write_state) {
	case MSB:
		load_count(pit, n, (uint32_t)val << 8);
		break;
	case WORD:
		c->write_latch = val;
		c->write_state = WORD_MSB;
		break;
	case WORD_MSB:
		load_count(pit, n, c->write_latch | (uint32_t)val << 8);
		c->write_state = WORD;
		break;
	default:
		load_count(pit, n, val);
		break;
	}
}

static uint8_t read_latch(struct kvm_pit_channel_state *c)
{
	uint8_t latched = c->count_latched;

	c->count_latched = latched == WORD ? MSB : 0;
	return (uint8_t)(latched == MSB ? c->latched_count >> 8 : c->latched_count);
}

static uint8_t read_count(struct kl_pit *pit, unsigned n)
{
	struct kvm_pit_channel_state *c = &pit->ch[n];
	uint32_t count;

	if (c->status_latched) {
		c->status_latched = 0;
		return c->status;
	}
	if (c->count_latched)
		return read_latch(c);
	count = current_count(pit, n);
	switch (c->read_state) {
	case WORD:
		c->read_state = WORD_MSB;
		return (uint8_t)count;
	case WORD_MSB:
		c->read_state = WORD;
		return (uint8_t)(count >> 8);
	case MSB:
		return (uint8_t)(count >> 8);
	default:
		return (uint8_t)count;
	}
}

static void set_gate(struct kvm_pit_channel_state *c, uint8_t gate)
{
	bool restarts = c->mode == 1 || c->mode == 2 || c->mode == 3 || c->mode == 5;

	if (restarts && c->gate < gate)
		c->count_load_time = (int64_t)kl_timer_now();
	c->gate = gate;
}

static void write_speaker(struct kl_pit *pit, uint8_t val)
{
	if (val & 2)
		pit->flags |= KVM_PIT_FLAGS_SPEAKER_DATA_ON;
	else
		pit->flags &= ~(uint32_t)KVM_PIT_FLAGS_SPEAKER_DATA_ON;
	set_gate(&pit->ch[2], val & 1);
}

static uint8_t read_speaker(struct kl_pit *pit)
{
	unsigned refresh = kl_timer_now() >> 14 & 1; /* about 15 us */
	unsigned data = !!(pit->flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON);

	return (uint8_t)(data << 1 | pit->ch[2].gate | (unsigned)output(pit, 2) << 5 |
			 refresh << 4);
}

/* Only the lowest byte counts, however wide the access. The control port reads as nothing. */
int kl_pit_pio(struct kl_pit *pit, uint16_t port, unsigned len, void *data, bool write)
{
	bool speaker = pit->speaker && port == PORT_SPEAKER;
	unsigned n = port & 3u;
	uint32_t val = 0;

	if (!speaker && (port < PORT_BASE || port + len > PORT_BASE + 4u))
		return -EOPNOTSUPP;
	if (!speaker && !write && n == CONTROL)
		return 0;
	kl_mutex_lock(&pit->lock);
	if (write) {
		if (speaker)
			write_speaker(pit, *(uint8_t *)data);
		else if (n == CONTROL)
			write_control(pit, *(uint8_t *)data);
		else
			write_count(pit, n, *(uint8_t *)data);
	} else {
		val = speaker ? read_speaker(pit) : read_count(pit, n);
		memcpy(data, &val, kl_min(len, (unsigned)sizeof(val)));
	}
	kl_mutex_unlock(&pit->lock);
	return 0;
}

/* ---- life and state ---------------------------------------------------------------- */

int kl_pit_create(struct kl_x86_vm *vm, uint32_t flags, struct kl_pit **out)
{
	struct kl_pit *pit = kl_failpoint("pit-alloc") ? NULL : calloc(1, sizeof(*pit));

	if (!pit)
		return -ENOMEM;
	if (kl_timer_get()) {
		free(pit);
		return -ENOMEM;
	}
	pit->vm = vm;
	pit->speaker = flags & KVM_PIT_SPEAKER_DUMMY;
	kl_mutex_init(&pit->lock, KL_RANK_PIT);
	kl_timer_init(&pit->timer, expired);
	pit->listener = (struct kl_irq_listener){.gsi = GSI, .acked = acked, .masked = masked};
	kl_mutex_lock(&pit->lock);
	for (unsigned n = 0; n < 3; n++) {
		pit->ch[n].mode = NO_MODE;
		pit->ch[n].gate = n != 2;
		load_count(pit, n, 0);
	}
	kl_mutex_unlock(&pit->lock);
	kl_pit_set_reinject(pit, true);
	*out = pit;
	return 0;
}

void kl_pit_destroy(struct kl_pit *pit)
{
	if (!pit)
		return;
	kl_pit_set_reinject(pit, false);
	stop_timer(pit);
	kl_timer_put();
	kl_mutex_destroy(&pit->lock);
	free(pit);
}

void kl_pit_get(struct kl_pit *pit, struct kvm_pit_state2 *s)
{
	memset(s, 0, sizeof(*s));
	kl_mutex_lock(&pit->lock);
	memcpy(s->channels, pit->ch, sizeof(s->channels));
	s->flags = pit->flags;
	kl_mutex_unlock(&pit->lock);
}

void kl_pit_set(struct kl_pit *pit, const struct kvm_pit_state2 *s, bool v2)
{
	bool taken_over;
	uint8_t mode;

	kl_mutex_lock(&pit->lock);
	taken_over = v2 && (s->flags & ~pit->flags & KVM_PIT_FLAGS_HPET_LEGACY);
	memcpy(pit->ch, s->channels, sizeof(pit->ch));
	if (v2)
		pit->flags = s->flags;
	for (unsigned n = 0; n < 3; n++) {
		mode = pit->ch[n].mode;
		/* Stop the timer, and keep the mode for when the HPET gives it back. */
		if (taken_over && n == 0)
			pit->ch[n].mode = NO_MODE;
		load_count(pit, n, s->channels[n].count);
		pit->ch[n].mode = mode;
	}
	kl_mutex_unlock(&pit->lock);
}
