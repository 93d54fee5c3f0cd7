/* SPDX-License-Identifier: MIT */
/*
 * How linux-vmm starts Linux: the kernel where its boot protocol wants it
 * (Documentation/arch/x86/boot.rst), and ACPI tables that name processors, interrupts and devices.
 */
#include "linux-vmm.h"

#include <asm/bootparam.h>
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define ZERO_PAGE 0x7000ul
#define GDT       0x8000ul
#define COMMAND   0x20000ul
#define EBDA      0x9fc00ul
#define ACPI      0xe0000ul
#define KERNEL    0x100000ul

/* ---- the kernel -------------------------------------------------------------------------- */

/* All of @file at guest-physical @gpa, from @offset on; its length. */
static size_t load_file(const char *file, size_t offset, uint64_t gpa)
{
	int fd = open(file, O_RDONLY | O_CLOEXEC);
	size_t done = 0;
	struct stat st;
	ssize_t n;

	if (fd < 0 || fstat(fd, &st))
		err(1, "%s", file);
	if ((size_t)st.st_size < offset || gpa + (size_t)st.st_size - offset > memory)
		errx(1, "%s: does not fit into memory", file);
	while ((n = pread(fd, ram + gpa + done, (size_t)st.st_size - offset - done,
			  (off_t)(offset + done))) > 0)
		done += (size_t)n;
	close(fd);
	return done;
}

static void add_e820(struct boot_params *params, uint64_t addr, uint64_t end, uint32_t type)
{
	params->e820_table[params->e820_entries++] =
		(struct boot_e820_entry){.addr = addr, .size = end - addr, .type = type};
}

static void write_acpi(void);

void load_linux(const char *kernel, const char *initrd, const char *words)
{
	struct boot_params *params = (void *)(ram + ZERO_PAGE);
	uint8_t head[0x400];
	const struct setup_header *header = (void *)(head + 0x1f1);
	int fd = open(kernel, O_RDONLY | O_CLOEXEC);
	struct stat st;

	if (fd < 0 || read(fd, head, sizeof(head)) != sizeof(head))
		err(1, "%s", kernel);
	close(fd);
	if (header->header != 0x53726448 || header->version < 0x020a)
		errx(1, "%s: no kernel in the format that I know", kernel);
	params->hdr = *header;
	load_file(kernel, (size_t)(header->setup_sects + 1) * 512, KERNEL);

	params->hdr.type_of_loader = 0xff;
	params->hdr.cmd_line_ptr = COMMAND;
	snprintf((char *)ram + COMMAND, 2048, "%s", words);
	if (initrd) {
		uint64_t top =
			memory < params->hdr.initrd_addr_max ? memory : params->hdr.initrd_addr_max;

		if (stat(initrd, &st))
			err(1, "%s", initrd);
		if ((size_t)st.st_size > top - KERNEL)
			errx(1, "%s: does not fit into memory", initrd);
		params->hdr.ramdisk_image = (uint32_t)((top - (size_t)st.st_size) & ~(PAGE - 1));
		params->hdr.ramdisk_size =
			(uint32_t)load_file(initrd, 0, params->hdr.ramdisk_image);
	}
	add_e820(params, 0, EBDA, 1);
	add_e820(params, EBDA, KERNEL, 2);
	add_e820(params, KERNEL, memory, 1);
	params->acpi_rsdp_addr = ACPI;
	write_acpi();
}

/* Flat 32-bit protected mode at the kernel's entry, with the address of its parameters in ESI. */
void set_boot_state(int vcpu)
{
	static const uint64_t gdt[4] = {0, 0, 0x00cf9b000000ffff, 0x00cf93000000ffff};
	struct kvm_regs regs = {.rip = KERNEL, .rsi = ZERO_PAGE, .rflags = 2};
	struct kvm_segment flat = {.limit = 0xffffffff, .present = 1, .s = 1, .g = 1, .db = 1};
	struct kvm_sregs sregs;

	memcpy(ram + GDT, gdt, sizeof(gdt));
	CALL(vcpu, KVM_GET_SREGS, &sregs);
	sregs.gdt.base = GDT;
	sregs.gdt.limit = sizeof(gdt) - 1;
	flat.selector = 0x18;
	flat.type = 3;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = flat;
	flat.selector = 0x10;
	flat.type = 11;
	sregs.cs = flat;
	sregs.cr0 |= 1; /* PE */
	CALL(vcpu, KVM_SET_SREGS, &sregs);
	CALL(vcpu, KVM_SET_REGS, &regs);
}

/* ---- ACPI -------------------------------------------------------------------------------- */

struct __attribute__((packed)) table {
	char signature[4];
	uint32_t length;
	uint8_t revision, checksum;
	char oem[6], oem_table[8];
	uint32_t oem_revision;
	char creator[4];
	uint32_t creator_revision;
};

static uint8_t *at; /* where the next byte goes */

static void put(uint64_t value, unsigned bytes)
{
	memcpy(at, &value, bytes);
	at += bytes;
}

static void put_string(const char *s, size_t len)
{
	memcpy(at, s, len);
	at += len;
}

static uint8_t checksum(const uint8_t *p, size_t len)
{
	uint8_t sum = 0;

	while (len--)
		sum += *p++;
	return (uint8_t)-sum;
}

static uint8_t *begin_table(const char *signature, uint8_t revision)
{
	struct table *t = (void *)(at = ram + (((size_t)(at - ram) + 15) & ~15ul));

	*t = (struct table){.revision = revision, .oem = "KVMLET", .oem_table = "LINUXVMM"};
	memcpy(t->signature, signature, 4);
	at += sizeof(*t);
	return (uint8_t *)t;
}

static uint64_t end_table(uint8_t *table)
{
	struct table *t = (void *)table;

	t->length = (uint32_t)(at - table);
	t->checksum = checksum(table, t->length);
	return (uint64_t)(table - ram);
}

/* A package in AML: the length, in two bytes, comes when the end is known. */
static uint8_t *begin_package(uint64_t opcode, unsigned bytes)
{
	put(opcode, bytes);
	at += 2;
	return at - 2;
}

static void end_package(uint8_t *length)
{
	size_t len = (size_t)(at - length);

	length[0] = (uint8_t)(0x40 | (len & 15));
	length[1] = (uint8_t)(len >> 4);
}

static uint8_t *begin_device(const char *name)
{
	uint8_t *device = begin_package(0x825b, 2);

	put_string(name, 4);
	return device;
}

/* Name(_CRS, Buffer() { ... }) of @len bytes, which the caller puts, and an end tag */
static uint8_t *begin_resources(unsigned len)
{
	uint8_t *buffer;

	put_string("\x08_CRS", 5);
	buffer = begin_package(0x11, 1);
	put(0x0a, 1);
	put(len + 2, 1);
	return buffer;
}

static void end_resources(uint8_t *buffer)
{
	put(0x0079, 2);
	end_package(buffer);
}

static uint64_t write_dsdt(void)
{
	uint8_t *dsdt = begin_table("DSDT", 2), *scope, *device, *buffer;

	/* Name(_S5, Package() {5, 0, 0, 0}): how to turn the machine off */
	put_string("\x08_S5_\x12\x07\x04\x0a\x05\0\0\0", 13);
	scope = begin_package(0x10, 1);
	put_string("\\_SB_", 5);
	device = begin_device("COM1");
	put_string("\x08_HID\x0c\x41\xd0\x05\x01", 10); /* PNP0501 */
	buffer = begin_resources(8 + 3);
	put(0x0147, 2);
	put(SERIAL, 2);
	put(SERIAL, 2);
	put(0x0800, 2);
	put(0x22, 1);
	put(1 << SERIAL_GSI, 2);
	end_resources(buffer);
	end_package(device);
	for (unsigned i = 0; i < NR_DEVICES; i++) {
		char name[5];

		snprintf(name, sizeof(name), "VR%02u", i);
		device = begin_device(name);
		put_string("\x08_HID\x0dLNRO0005", 15);
		put_string("\x08_UID\x0a", 6);
		put(i, 1);
		buffer = begin_resources(12 + 9);
		put(0x01000986, 4); /* memory, 32 bits, writable */
		put(VIRTIO + i * PAGE, 4);
		put(PAGE, 4);
		put(0x0103000689, 5); /* an interrupt, edge, active high */
		put(FIRST_GSI + i, 4);
		end_resources(buffer);
		end_package(device);
	}
	end_package(scope);
	return end_table(dsdt);
}

static uint64_t write_madt(void)
{
	uint8_t *madt = begin_table("APIC", 3);

	put(LAPIC, 4);
	put(0, 4);
	for (int i = 0; i < nr_cpus; i++) {
		put(0x0800, 2); /* a local APIC */
		put((uint64_t)i, 1);
		put((uint64_t)i, 1);
		put(1, 4);
	}
	put(0x0c01, 2); /* an IOAPIC */
	put(0, 2);
	put(IOAPIC, 4);
	put(0, 4);
	return end_table(madt);
}

static void put_port(uint8_t *fadt, unsigned offset, uint64_t port)
{
	uint8_t address[12] = {1 /* I/O */, 8, 0, 1};

	memcpy(address + 4, &port, 8);
	memcpy(fadt + offset, address, 12);
}

static uint64_t write_fadt(uint64_t dsdt)
{
	uint8_t *fadt = begin_table("FACP", 6);
	uint32_t flags = 1u << 20;       /* no hardware but what the tables name */
	uint16_t boot = 1 << 2 | 1 << 5; /* no VGA, no clock in CMOS */

	memset(at, 0, 276 - sizeof(struct table));
	at = fadt + 276;
	memcpy(fadt + 40, &dsdt, 4);
	memcpy(fadt + 109, &boot, 2);
	memcpy(fadt + 112, &flags, 4);
	memcpy(fadt + 140, &dsdt, 8);
	put_port(fadt, 244, POWER);
	put_port(fadt, 256, POWER + 1);
	return end_table(fadt);
}

static void write_acpi(void)
{
	uint64_t fadt, madt, xsdt;
	uint8_t *rsdp = ram + ACPI, *table;

	at = rsdp + 64;
	fadt = write_fadt(write_dsdt());
	madt = write_madt();
	table = begin_table("XSDT", 1);
	put(fadt, 8);
	put(madt, 8);
	xsdt = end_table(table);

	at = rsdp;
	put_string("RSD PTR ", 8);
	put(0, 1);
	put_string("KVMLET", 6);
	put(2, 1);
	put(0, 4);
	put(36, 4);
	put(xsdt, 8);
	put(0, 4);
	rsdp[8] = checksum(rsdp, 20);
	rsdp[32] = checksum(rsdp, 36);
}
