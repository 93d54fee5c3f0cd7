/* SPDX-License-Identifier: MIT */
/* What the parts of linux-vmm share: docs/tutorial.md walks through them. */
#pragma once

#include <kvmlet/kvmlet.h>

#include <linux/kvm.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>

#define PAGE 4096ul

/* Guest-physical. RAM begins at 0 and ends below the devices. */
#define VIRTIO     0xd0000000ul /* a page of registers for each device */
#define IOAPIC     0xfec00000ul
#define LAPIC      0xfee00000ul
#define NR_DEVICES 4
#define FIRST_GSI  16 /* their interrupts */
#define MAX_MEMORY (2048ul << 20)
#define HOTPLUG    0x100000000ul /* memory that comes and goes, in blocks */
#define BLOCK      (4ul << 20)
#define MAX_BLOCKS 128

#define MAX_CPUS 16

/* Ports */
#define SERIAL     0x3f8
#define SERIAL_GSI 4
#define POWER      0x600
#define POWER_OFF  (5 << 2 | 1 << 5) /* what the guest writes there: state S5, now */

extern int kvm, vm, nr_cpus;
extern struct vcpu {
	int fd;
	pthread_t thread;
} vcpus[MAX_CPUS];

int call(int fd, const char *name, unsigned long cmd, unsigned long arg);
#define CALL(fd, cmd, arg) call(fd, #cmd, cmd, (unsigned long)(arg))

/* Everybody stops, after what they have begun, and goes on. */
void vcpus_stop(void);
void vcpus_go(void);
void serial_stop(void);
void serial_go(void);
/* State, through @put, which returns 0 or -errno, and @get. */
typedef int put_fn(const void *buf, size_t len);
typedef void get_fn(void *buf, size_t len);
int serial_save(put_fn *put);
void serial_load(get_fn *get);

/* linux-vmm-memory.c. What returns an int: 0 or -errno. */
extern uint8_t *ram;
extern size_t memory; /* its size in bytes */
void memory_start(void);
struct kvmlet_gpc *memory_cache(void);
int memory_read(kl_gpa_t gpa, void *buf, size_t len);
int memory_write(kl_gpa_t gpa, const void *buf, size_t len);
int memory_discard(kl_gpa_t gpa);
bool memory_plugged(unsigned block);
int memory_plug(unsigned block);
void memory_unplug(unsigned block);
void memory_log(bool on);
size_t memory_each_page(bool all, void (*page)(kl_gpa_t gpa, const uint8_t *data));

/* linux-vmm-migrate.c. The first returns if the guest stays here: -errno. */
int migrate_to(const char *path);
void migrate_from(const char *path);

/* linux-vmm-boot.c */
void load_linux(const char *kernel, const char *initrd, const char *words);
void set_boot_state(int vcpu);

/* linux-vmm-virtio.c */
int interrupt(unsigned gsi);
void virtio_mmio(struct kvm_run *run);
void virtio_stop(void);
void virtio_go(void);
int virtio_save(put_fn *put);
void virtio_load(get_fn *get);

/* linux-vmm-devices.c */
enum { DISK, CONSOLE, BALLOON, MEMORY };
void disk_start(unsigned nr, const char *file);
void console_start(unsigned nr);
void balloon_start(unsigned nr, unsigned mib);
void balloon_resize(unsigned nr, unsigned mib);
void hotplug_start(unsigned nr, unsigned mib);
void hotplug_resize(unsigned nr, unsigned mib);
void hotplug_hold(unsigned nr, bool hold);
