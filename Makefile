# DiffEnc in C. `make` builds ./diffenc; everything else is below, with its reason, which `make help` prints.
#
#   make CC=clang            another compiler
#   make MARCH=x86-64-v3     another machine than this one (default: native)
#   make DOUBLE=1            ./diffenc-double: the same sources in double precision, where gradients are proven
#   make OPENMP=             without threads (default: found out below)
#   make MPI=1               for `mpirun -n R ./diffenc ...`: batches on more machines than one
#   make SANITIZE=address,undefined    for tests
#
# Objects of each such choice live in a directory of their own, so choices can be mixed without cleaning.

CC      = $(if $(MPI),mpicc,cc)
MARCH   = native
PREFIX  = /usr/local
DESTDIR =

# `$(call accepts,FLAG)` is FLAG if the compiler can build and link a program with it, else nothing.
accepts = $(shell echo 'int main(void){return 0;}' | $(CC) $(1) -x c - -o /dev/null 2>/dev/null && echo $(1))

# A machine that was named and that the compiler does not know is an error; a compiler without "native" builds for any.
ifeq ($(call accepts,-march=$(MARCH)),)
$(if $(filter native,$(MARCH)),,$(error MARCH=$(MARCH): $(CC) knows no such machine))
endif

OPENMP := $(call accepts,-fopenmp)
SIMD   := $(call accepts,-fopenmp-simd)
ARCH   := $(call accepts,-march=$(MARCH)) $(call accepts,-mprefer-vector-width=512) \
          $(call accepts,-fno-tree-loop-distribute-patterns) $(call accepts,-fno-thread-jumps)

# -ffp-contract=fast: ISO mode forbids fused multiply-add otherwise, a third of the speed.
# -fno-tree-loop-distribute-patterns: gcc would call memset for the sums that are to stay in registers.
# -fno-thread-jumps: gcc would take the clamps of exp as three ways through what follows and compute all of them.
# -fno-math-errno, -fno-trapping-math: square roots and selections may run in vector registers; values do not change.
# -Wno-pass-failed: clang would warn of each loop that it does not vectorise, which costs speed and nothing else.
CFLAGS  = -O3 -g -Wall -Wextra -Wpedantic
FLAGS   = -std=c99 $(CFLAGS) $(ARCH) -ffp-contract=fast -fno-math-errno -fno-trapping-math $(OPENMP) $(SIMD) \
          $(if $(OPENMP),,-Wno-unknown-pragmas) $(call accepts,-Wno-pass-failed) \
          $(if $(DOUBLE),-DDIFFENC_DOUBLE) $(if $(MPI),-DDIFFENC_MPI) \
          $(if $(SANITIZE),-fsanitize=$(SANITIZE) -fno-sanitize-recover=all)

# Threads of some systems have stacks of 128 KiB.
FRAMES := $(call accepts,-Wframe-larger-than=16384)

PROGRAM = diffenc$(if $(DOUBLE),-double)
comma   = ,
space   = $() $()
BUILD   = build/$(subst $(space),-,$(notdir $(CC)))-$(MARCH)$(if $(OPENMP),,-serial)$(if $(SANITIZE),-$(subst $(comma),-,$(SANITIZE)))$(if $(DOUBLE),-double)
FLOORS  = tensor autograd nn diffenc data
LIBRARY = $(FLOORS:%=$(BUILD)/%.o)
PROVERS = $(BUILD)/check.o $(BUILD)/bench.o $(BUILD)/derivatives.o
TESTS   = $(FLOORS:%=$(BUILD)/test_%) $(BUILD)/test_main
COMPILE = $(CC) $(FLAGS) -I. -Itests

# Build the program. It is copied here only when it differs, so that switching between choices is safe.
all: $(BUILD)/diffenc
	@cmp -s $(BUILD)/diffenc $(PROGRAM) || cp $(BUILD)/diffenc $(PROGRAM)

$(BUILD)/diffenc: $(LIBRARY) $(BUILD)/main.o $(PROVERS)
	$(CC) $(FLAGS) $(LDFLAGS) $^ -o $@ -lm

$(BUILD)/%.o: %.c diffenc.h $(BUILD)/command
	$(COMPILE) $(if $(SANITIZE),,$(FRAMES)) -c $< -o $@

$(BUILD)/%.o: tests/%.c diffenc.h tests/test.h tests/derivatives.h $(BUILD)/command
	$(COMPILE) -c $< -o $@

# Changed only when the command of the compiler changes: then everything is compiled anew.
$(BUILD)/command: always
	@mkdir -p $(BUILD)
	@echo '$(COMPILE) $(LDFLAGS)' | cmp -s - $@ || echo '$(COMPILE) $(LDFLAGS)' >$@

$(BUILD)/test_%: $(BUILD)/test_%.o $(LIBRARY) $(BUILD)/derivatives.o
	$(CC) $(FLAGS) $(LDFLAGS) $^ -o $@ -lm

# The main job in less than a minute: train a small DiffEnc on the built-in digits and draw some of each.
RUN = run-digits
run: all
	@test ! -e $(RUN) || { echo "$(RUN) is there already: RUN=DIRECTORY names another, or move it away."; exit 1; }
	./$(PROGRAM) train --data digits --conditional --channels 16 --lr 0.016 --steps 2400 --out $(RUN)
	@echo "Look at $(RUN)/samples-2400.png and $(RUN)/report.html."

# All tests, in single and in double precision; the last line is the sum of both. Real data are added where mnist/ is
# there, or MNIST_DIR=DIR says where they are.
test:
	@$(MAKE) --no-print-directory all tests
	@$(MAKE) --no-print-directory all tests DOUBLE=1
	@$(if $(MNIST_DIR),,$(if $(wildcard mnist),MNIST_DIR='$(CURDIR)/mnist')) sh tests/run.sh $(BUILD) $(BUILD)-double

tests: $(TESTS)

# Prove every gradient and every identity of the method, in double precision.
check:
	@$(MAKE) --no-print-directory all DOUBLE=1
	./diffenc-double check

# Prove that the proofs can fail: one deliberate fault after the other must turn a check or a test red.
mutants:
	sh tests/mutants.sh

# Speed: kernels against the machine's peak, whole training steps, sampling.
bench: all
	./$(PROGRAM) bench

# The paper's claims put to the test: tables, charts and pictures from MNIST in OUT (run-paper), in one to two hours on
# two cores. SEEDS, STEPS, MNIST_DIR and more: see tests/paper.py, which needs Python 3. Interrupted, it goes on.
paper: all
	python3 tests/paper.py ./$(PROGRAM)

# The same steps in PyTorch, in turns with ours.
bench-peer: all
	sh tests/bench_peer.sh ./$(PROGRAM)

# Feed each parser of files with made-up ones for FUZZ_SECONDS (clang and its libFuzzer), beginning with those of the
# tests. Nothing 64 KiB long may make it ask for 64 MB at once.
FUZZ_SECONDS = 60
FUZZERS = idx cifar gzip tensors batch log
fuzz:
	@$(MAKE) --no-print-directory fuzzing CC=clang OPENMP= SIMD= CFLAGS="-O1 -g" \
	    SANITIZE=fuzzer-no-link,address,undefined

fuzzing: $(BUILD)/test_data $(FUZZERS:%=$(BUILD)/fuzz_%)
	@mkdir -p $(FUZZERS:%=$(BUILD)/corpus/%) $(addprefix $(BUILD)/seeds/,idx cifar gzip tensors batch log)
	@cp tests/golden/*.batch.safetensors tests/golden/*.checkpoint.safetensors $(BUILD)/seeds/batch
	@printf 'step,bpd,recon,latent,diffusion,gradient_norm,test_bpd,test_error,seconds\n1,2,.1,.1,1.8,3,,,0.1\n2,2,.1,.1,1.8,3,1.9,.1,0' \
	    >$(BUILD)/seeds/log/log.csv
	FUZZ_SEEDS=$(BUILD)/seeds $(BUILD)/test_data
	@for f in $(FUZZERS); do \
	    echo "== $$f"; \
	    $(BUILD)/fuzz_$$f -max_total_time=$(FUZZ_SECONDS) -max_len=65536 -malloc_limit_mb=64 -rss_limit_mb=1024 \
	        -timeout=60 -verbosity=0 -print_final_stats=1 -artifact_prefix=$(BUILD)/ \
	        $(BUILD)/corpus/$$f $(BUILD)/seeds/$$f || exit 1; \
	done

$(BUILD)/fuzz_%: tests/fuzz/fuzz_%.c tests/fuzz/program.h $(BUILD)/program.o $(PROVERS) $(LIBRARY)
	$(COMPILE) -fsanitize=fuzzer $< $(BUILD)/program.o $(PROVERS) $(LIBRARY) -o $@ -lm

# The whole program under another name than main, for the fuzzers that drive it.
$(BUILD)/program.o: main.c diffenc.h $(BUILD)/command
	$(COMPILE) -Dmain=diffenc_main -c $< -o $@

# What needs builds of its own: the same bits with and without OpenMP, valgrind, ThreadSanitizer.
trust: all
	sh tests/trust.sh

# Ranks of `make MPI=1`, up to three on this machine, against one: `make MPI=1 test-mpi`.
test-mpi: $(BUILD)/diffenc
	sh tests/test_mpi.sh $(BUILD)/diffenc

# Fetch MNIST into mnist/, with checksums.
mnist:
	sh tests/fetch_mnist.sh mnist

# Remove what was built.
clean:
	rm -rf build diffenc diffenc-double

# Copy the program to $(PREFIX)/bin.
install: all
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 $(PROGRAM) $(DESTDIR)$(PREFIX)/bin/$(PROGRAM)

# Take it away from there.
uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/$(PROGRAM)

# What there is to make: each target with the comment above it.
help:
	@awk '/^#/ { for (i = 2; i <= NF; i++) word[++n] = $$i; next } \
	    /^[a-z-]+:/ && n { \
	        line = sprintf("%-11s", substr($$1, 1, length($$1) - 1)); \
	        for (i = 1; i <= n; i++) { \
	            if (length(line word[i]) > 78) { print line; line = sprintf("%11s", "") } \
	            line = line " " word[i] \
	        } \
	        print line \
	    } \
	    !/=/ { n = 0 }' $(firstword $(MAKEFILE_LIST))

.PHONY: all always run test tests check mutants bench bench-peer paper fuzz fuzzing trust test-mpi mnist clean \
        install uninstall help
.SECONDARY:
