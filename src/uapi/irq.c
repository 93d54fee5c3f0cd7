/* SPDX-License-Identifier: MIT */
/*
 * The ioctls of the in-engine interrupt controllers.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/failpoint.h"
#include "host/guard.h"
#include "uapi/object.h"
#include "x86/ioapic.h"
#include "x86/irq_routing.h"
#include "x86/pic.h"
#include "x86/pit.h"

/* ---- creation ---------------------------------------------------------------------- */

static long create_irqchip(struct kl_uvm *vm)
{
	struct kl_x86_vm *kvm = &vm->kvm;
	int r;

	kl_mutex_lock(&kvm->lock);
	if (kvm->irqchip)
		r = -EEXIST;
	else if (vm->nr_vcpus)
		r = -EINVAL;
	else
		r = kl_irqchip_create(kvm);
	kl_mutex_unlock(&kvm->lock);
	return r;
}

int kl_vm_split_irqchip(struct kl_uvm *vm, uint64_t pins)
{
	struct kl_x86_vm *kvm = &vm->kvm;
	int r;

	if (pins > KL_MAX_IRQ_ROUTES)
		return -EINVAL;
	kl_mutex_lock(&kvm->lock);
	if (kvm->irqchip || vm->nr_vcpus)
		r = -EEXIST;
	else
		r = kl_irqchip_create_split(kvm, (unsigned)pins);
	kl_mutex_unlock(&kvm->lock);
	return r;
}

static long create_pit(struct kl_x86_vm *kvm, uint32_t flags)
{
	struct kl_pit *pit;
	int r = 0;

	kl_mutex_lock(&kvm->lock);
	if (kvm->pit)
		r = -EEXIST;
	else if (!kl_irqchip_in_kernel(kvm))
		r = -ENOENT;
	else
		r = kl_pit_create(kvm, flags, &pit);
	if (!r)
		atomic_store_explicit(&kvm->pit, pit, memory_order_release);
	kl_mutex_unlock(&kvm->lock);
	return r;
}

static long create_pit2(struct kl_x86_vm *kvm, unsigned long arg)
{
	struct kvm_pit_config c;

	if (kl_copy_from_user(&c, (void *)arg, sizeof(c)))
		return -EFAULT;
	return create_pit(kvm, c.flags);
}

/* What KVM_CREATE_DEVICE makes on x86 is VFIO's, and there is none. */
static long create_device(unsigned long arg)
{
	struct kvm_create_device c;

	return kl_copy_from_user(&c, (void *)arg, sizeof(c)) ? -EFAULT : -ENODEV;
}

/* ---- state ------------------------------------------------------------------------- */

static long get_irqchip(struct kl_x86_vm *kvm, unsigned long arg)
{
	struct kvm_irqchip chip;

	if (kl_copy_from_user(&chip, (void *)arg, sizeof(chip)))
		return -EFAULT;
	if (!kl_irqchip_in_kernel(kvm))
		return -ENXIO;
	switch (chip.chip_id) {
	case KVM_IRQCHIP_PIC_MASTER:
	case KVM_IRQCHIP_PIC_SLAVE:
		kl_pic_get(kvm->pic, chip.chip_id == KVM_IRQCHIP_PIC_SLAVE, &chip.chip.pic);
		break;
	case KVM_IRQCHIP_IOAPIC:
		kl_ioapic_get(kvm->ioapic, &chip.chip.ioapic);
		break;
	default:
		return -EINVAL;
	}
	return kl_copy_to_user((void *)arg, &chip, sizeof(chip)) ? -EFAULT : 0;
}

static long set_irqchip(struct kl_x86_vm *kvm, unsigned long arg)
{
	struct kvm_irqchip chip;
	long r = 0;

	if (kl_copy_from_user(&chip, (void *)arg, sizeof(chip)))
		return -EFAULT;
	if (!kl_irqchip_in_kernel(kvm))
		return -ENXIO;
	switch (chip.chip_id) {
	case KVM_IRQCHIP_PIC_MASTER:
	case KVM_IRQCHIP_PIC_SLAVE:
		kl_pic_set(kvm->pic, chip.chip_id == KVM_IRQCHIP_PIC_SLAVE, &chip.chip.pic);
		break;
	case KVM_IRQCHIP_IOAPIC:
		kl_ioapic_set(kvm->ioapic, &chip.chip.ioapic);
		break;
	default:
		r = -EINVAL;
		break;
	}
	kl_pic_update(kvm->pic);
	return r;
}

static long get_pit(struct kl_x86_vm *kvm, unsigned long arg)
{
	struct kl_pit *pit = kvm->pit;
	struct kvm_pit_state2 s;
	struct kvm_pit_state old;

	_Static_assert(sizeof(old) == sizeof(s.channels), "ABI");
	if (kl_copy_from_user(&old, (void *)arg, sizeof(old)))
		return -EFAULT;
	if (!pit)
		return -ENXIO;
	kl_pit_get(pit, &s);
	return kl_copy_to_user((void *)arg, s.channels, sizeof(old)) ? -EFAULT : 0;
}

static long get_pit2(struct kl_x86_vm *kvm, unsigned long arg)
{
	struct kl_pit *pit = kvm->pit;
	struct kvm_pit_state2 s;

	if (!pit)
		return -ENXIO;
	kl_pit_get(pit, &s);
	return kl_copy_to_user((void *)arg, &s, sizeof(s)) ? -EFAULT : 0;
}

static long set_pit(struct kl_x86_vm *kvm, unsigned long arg, bool v2)
{
	struct kl_pit *pit = kvm->pit;
	struct kvm_pit_state2 s = {0};

	if (kl_copy_from_user(&s, (void *)arg, v2 ? sizeof(s) : sizeof(s.channels)))
		return -EFAULT;
	if (!pit)
		return -ENXIO;
	kl_pit_set(pit, &s, v2);
	return 0;
}

static long reinject_control(struct kl_x86_vm *kvm, unsigned long arg)
{
	struct kl_pit *pit = kvm->pit;
	struct kvm_reinject_control c;

	if (kl_copy_from_user(&c, (void *)arg, sizeof(c)))
		return -EFAULT;
	if (!pit)
		return -ENXIO;
	kl_pit_set_reinject(pit, c.pit_reinject);
	return 0;
}

/* ---- lines and messages ------------------------------------------------------------ */

static long irq_line(struct kl_x86_vm *kvm, unsigned long arg, bool status)
{
	struct kvm_irq_level l;

	if (kl_copy_from_user(&l, (void *)arg, sizeof(l)))
		return -EFAULT;
	if (!kvm->irqchip)
		return -ENXIO;
	l.status = kl_irq_set(kvm, KL_IRQ_USER, l.irq, l.level, status);
	if (status && kl_copy_to_user((void *)arg, &l, sizeof(l)))
		return -EFAULT;
	return 0;
}

static long signal_msi(struct kl_x86_vm *kvm, unsigned long arg)
{
	struct kvm_msi m;
	struct kl_msi msi;

	if (kl_copy_from_user(&m, (void *)arg, sizeof(m)))
		return -EFAULT;
	if (!kvm->irqchip || (m.flags & ~(uint32_t)KVM_MSI_VALID_DEVID))
		return -EINVAL;
	msi = (struct kl_msi){m.address_lo, m.address_hi, m.data};
	return kl_irq_send_msi(kvm, &msi);
}

static long set_gsi_routing(struct kl_x86_vm *kvm, unsigned long arg)
{
	const char *user = (const char *)arg; /* at any address */
	struct kvm_irq_routing_entry *e = NULL;
	struct kvm_irq_routing head;
	size_t size;
	long r;

	if (kl_copy_from_user(&head, user, sizeof(head)))
		return -EFAULT;
	if (!kvm->irqchip || head.nr > KL_MAX_IRQ_ROUTES || head.flags)
		return -EINVAL;
	size = head.nr * sizeof(*e);
	if (size) {
		e = kl_failpoint("irq-routing-copy") ? NULL : malloc(size);
		if (!e)
			return -ENOMEM;
		if (kl_copy_from_user(e, user + sizeof(head), size)) {
			free(e);
			return -EFAULT;
		}
	}
	r = kl_irq_set_routing(kvm, e, head.nr, kl_irqchip_split(kvm));
	free(e);
	return r;
}

long kl_vm_irq_ioctl(struct kl_uvm *vm, unsigned cmd, unsigned long arg)
{
	struct kl_x86_vm *kvm = &vm->kvm;

	switch (cmd) {
	case KVM_CREATE_IRQCHIP:
		return create_irqchip(vm);
	case KVM_IRQ_LINE:
	case KVM_IRQ_LINE_STATUS:
		return irq_line(kvm, arg, cmd == KVM_IRQ_LINE_STATUS);
	case KVM_GET_IRQCHIP:
		return get_irqchip(kvm, arg);
	case KVM_SET_IRQCHIP:
		return set_irqchip(kvm, arg);
	case KVM_CREATE_PIT:
		return create_pit(kvm, KVM_PIT_SPEAKER_DUMMY);
	case KVM_CREATE_PIT2:
		return create_pit2(kvm, arg);
	case KVM_GET_PIT:
		return get_pit(kvm, arg);
	case KVM_SET_PIT:
		return set_pit(kvm, arg, false);
	case KVM_GET_PIT2:
		return get_pit2(kvm, arg);
	case KVM_SET_PIT2:
		return set_pit(kvm, arg, true);
	case KVM_REINJECT_CONTROL:
		return reinject_control(kvm, arg);
	case KVM_SET_GSI_ROUTING:
		return set_gsi_routing(kvm, arg);
	case KVM_SIGNAL_MSI:
		return signal_msi(kvm, arg);
	case KVM_IRQFD:
		return kl_vm_irqfd(vm, arg);
	case KVM_CREATE_DEVICE:
		return create_device(arg);
	default:
		return -ENOTTY;
	}
}
