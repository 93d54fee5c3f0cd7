/* SPDX-License-Identifier: MIT */
/* What the parts of linux-vmm share: docs/tutorial.md walks through them. */
#pragma once

#include <kvmlet/kvmlet.h>

#include <linux/kvm.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>

#define PAGE 4096ul

/* Guest-physical. RAM begins at 0 and ends below the devices. */
#define VIRTIO     0xd0000000ul /* a page of registers for each device */
#define IOAPIC     0xfec00000ul
#define LAPIC      0xfee00000ul
#define NR_DEVICES 3
#define FIRST_GSI  16 /* their interrupts */

/* Ports */
#define SERIAL     0x3f8
#define SERIAL_GSI 4
#define POWER      0x600
#define POWER_OFF  (5 << 2 | 1 << 5) /* what the guest writes there: state S5, now */

extern int vm, nr_cpus;
extern uint8_t *ram;
extern size_t memory; /* its size in bytes */

int call(int fd, const char *name, unsigned long cmd, unsigned long arg);
#define CALL(fd, cmd, arg) call(fd, #cmd, cmd, (unsigned long)(arg))

/* linux-vmm-boot.c */
void load_linux(const char *kernel, const char *initrd, const char *words);
void set_boot_state(int vcpu);

/* linux-vmm-virtio.c */
int interrupt(unsigned gsi);
void virtio_memory(uint32_t slot, kl_gpa_t gpa, size_t size, void *hva);
void virtio_mmio(struct kvm_run *run);
void disk_start(unsigned nr, const char *file);
void console_start(unsigned nr);
void balloon_start(unsigned nr, unsigned mib);
