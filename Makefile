# SPDX-License-Identifier: MIT
# A thin face over meson and ninja. `make help` lists the targets.

BUILD ?= build
PREFIX ?= /usr/local
BUILDTYPE ?= debugoptimized
MESON ?= meson
NINJA ?= ninja
# At most this many compilers at once; empty: as ninja likes
JOBS ?=
j = $(if $(JOBS),-j$(JOBS))

.PHONY: all build run test test-asan test-tsan test-all mutants mutate mutate-sample coverage evidence models conformance linux stress fuzz bench install \
	uninstall check-format format tidy check-docs deps clean distclean help

all: build

build: $(BUILD)/build.ninja
	@$(NINJA) -C $(BUILD) $(j)

# Installs missing packages through apt first; says what is missing where it cannot.
$(BUILD)/build.ninja: | deps
	@PKG_CONFIG_PATH= $(MESON) setup --prefix=$(PREFIX) -Dbuildtype=$(BUILDTYPE) -Dtests=enabled \
		$(BUILD) $(MESONFLAGS)

deps:
	@tools/install-deps build

run: build
	$(BUILD)/kvmlet run --stats -- $(BUILD)/examples/hello-vmm

test: build
	@$(MESON) test -C $(BUILD) --no-rebuild --print-errorlogs $(if $(TESTS),$(TESTS))

build-asan/build.ninja: | deps
	@$(MESON) setup -Db_sanitize=address,undefined -Db_lundef=false -Dtests=enabled build-asan
build-tsan/build.ninja: | deps
	@$(MESON) setup -Db_sanitize=thread -Db_lundef=false -Dtests=enabled build-tsan

test-asan test-tsan: test-%: build-%/build.ninja
	@$(NINJA) -C build-$* $(j)
	@$(MESON) test -C build-$* --no-rebuild --print-errorlogs --timeout-multiplier 5 \
		$(if $(TESTS),$(TESTS))

test-all: test test-asan test-tsan

# The tests must notice each of these bugs
mutants:
	@tools/install-deps build mutants
	@tests/mutants/run $(MUTANTS)

# Lines and branches of the memory engine that tests reach; MISSING=1 also lists what they do not
build-cov/build.ninja: | deps
	@$(MESON) setup -Db_coverage=true -Dchecks=enabled -Doptimization=0 -Dwerror=false -Dtests=enabled build-cov
coverage: build-cov/build.ninja
	@$(NINJA) -C build-cov $(j)
	@tools/coverage run build-cov || echo 'What these have reached counts all the same.'
	@tools/coverage report build-cov $(if $(MISSING),--missing)
	@tools/coverage record build-cov > tests/records/coverage.txt

# Small mistakes of all kinds in src/mem and src/mmu, COUNT drawn by SEED: the tests must notice.
# Which tests pass through which line is from make coverage.
mutate:
	@[ -d build-cov/cover ] || $(MAKE) coverage
	@tests/mutants/generic --seed $(or $(SEED),1) --count $(or $(COUNT),300) --record

# A few of them, without coverage: that they can still be made and are noticed
mutate-sample:
	@tools/install-deps build mutants
	@tests/mutants/generic --sample

# docs/evidence.md
evidence:
	@tools/gen-evidence

# SPIN models of the protocols, and of the bugs that they exclude
models:
	@tools/install-deps models
	@tests/models/run $(MODELS)

# TESTS="name ..." selects; REAL=1 runs each on /dev/kvm beside it
conformance: build
	@tests/conformance/run --kvmlet $(BUILD)/kvmlet $(if $(REAL),--real) $(TESTS)

# A guest with Debian's kernel. CASES="name ..." selects (tests/linux/run --list), CASES=all: every one
linux: build
	@tests/linux/run --kvmlet $(BUILD)/kvmlet \
		$(if $(filter all,$(CASES)),,$(or $(CASES),--verbose boot/6.1/q35/2))

# SECONDS=N: how long; SEED=N. BUILD=build-asan or build-tsan (after make test-asan) is another build
stress: build
	$(BUILD)/kvmlet run -- $(BUILD)/tests/stress/mem-stress --seconds $(or $(SECONDS),60) --seed $(or $(SEED),1)
	$(BUILD)/tests/stress/gpc-stress --threads 8 --seconds $(or $(SECONDS),60) --seed $(or $(SEED),1)
	$(BUILD)/tests/stress/gmem-stress --seconds $(or $(SECONDS),60) --seed $(or $(SEED),1)
	$(BUILD)/tests/stress/dirty-stress --seconds $(or $(SECONDS),60) --seed $(or $(SEED),1)

# Guests that do anything, and calls of all kinds: SECONDS=N, SEED=N. The build with sanitizers finds most.
# RECORD=1 adds the run to tests/records/runs.txt
record = $(if $(RECORD),tools/gen-evidence --run $(1) ASan+UBSan --)
fuzz: build-asan/build.ninja
	@$(NINJA) -C build-asan $(j) kvmlet libkvmlet-preload.so tests/fuzz/guest-fuzz tests/fuzz/call-fuzz
	$(call record,guest-fuzz) build-asan/kvmlet run -- build-asan/tests/fuzz/guest-fuzz --seconds $(or $(SECONDS),60) --seed $(or $(SEED),1)
	$(call record,call-fuzz) build-asan/kvmlet run -- build-asan/tests/fuzz/call-fuzz --threads 4 --seconds $(or $(SECONDS),60) --seed $(or $(SEED),1)

bench: build
	@bench/run $(BUILD)
	@bench/run-mem $(BUILD)
	@bench/run-dirty $(BUILD)
	@$(BUILD)/bench/gpc-bench
	@$(BUILD)/bench/track-bench
	@bench/run-cpu $(BUILD)
	@bench/run-code-size $(BUILD)
	@bench/run-linux $(BUILD)

install: build
	@DESTDIR=$(DESTDIR) $(MESON) install -C $(BUILD) --no-rebuild

uninstall:
	@$(NINJA) -C $(BUILD) uninstall

SOURCES = $(shell git ls-files '*.c' '*.h' 2>/dev/null || find . -name '*.[ch]')

check-format:
	@tools/install-deps format
	@clang-format --dry-run -Werror $(SOURCES)

format:
	@tools/install-deps format
	@clang-format -i $(SOURCES)

tidy: build
	@tools/install-deps tidy
	@clang-tidy -p $(BUILD) --quiet $(filter src/%.c,$(SOURCES))

# Licence lines, layering, barrier pairs, links, requirements and exhibits, the generated lock table,
# manual pages
check-docs:
	@tools/install-deps docs
	@tools/check-source
	@tools/check-requirements
	@tools/check-oracle
	@tools/gen-locking --check
	@tools/gen-evidence --check
	@mandoc -Tlint -Wwarning man/*.[0-9]

clean:
	@[ ! -f $(BUILD)/build.ninja ] || $(NINJA) -C $(BUILD) clean

distclean:
	rm -rf build build-asan build-tsan build-cov

help:
	@echo 'make               build everything into $(BUILD)/'
	@echo 'make run           run examples/hello-vmm under kvmlet run --stats'
	@echo 'make test          all tests (TESTS="name ..." selects)'
	@echo 'make test-asan     the tests under AddressSanitizer and UBSan, in build-asan/'
	@echo 'make test-tsan     the tests under ThreadSanitizer, in build-tsan/'
	@echo 'make mutants       put known bugs in, one by one: the tests must notice (MUTANTS="name ...")'
	@echo 'make mutate        put small mistakes into src/mem and src/mmu: COUNT=300, SEED=1'
	@echo 'make mutate-sample a few of those, each against one test'
	@echo 'make coverage      which lines and branches of the memory engine tests reach (MISSING=1: and which not)'
	@echo 'make evidence      write docs/evidence.md from what there is and from tests/records'
	@echo 'make models        check the SPIN models (MODELS="b16 ...")'
	@echo 'make conformance   the KVM selftests (TESTS="name ...", REAL=1: on /dev/kvm beside)'
	@echo "make linux         boot Debian's Linux under QEMU on kvmlet (CASES=\"name ...\", CASES=all)"
	@echo 'make stress        SECONDS=1800: memory and slots change under running vCPUs'
	@echo 'make fuzz          SECONDS=1200: random guests in all modes, under AddressSanitizer and UBSan'
	@echo 'make bench         measure, side by side with /dev/kvm where there is one'
	@echo 'make install       PREFIX=$(PREFIX), DESTDIR honoured'
	@echo 'make check-format  clang-format; make tidy: clang-tidy'
	@echo 'make deps          install the Debian packages that building needs'
