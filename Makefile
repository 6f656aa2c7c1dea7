# DiffEnc in C. `make` builds ./diffenc; everything else is below, with its reason.
#
#   make CC=clang            another compiler
#   make MARCH=x86-64-v3     another machine than this one (default: native)
#   make DOUBLE=1            ./diffenc-double: the same sources in double precision, where gradients are proven
#   make OPENMP=             without threads (default: found out below)
#   make SANITIZE=address,undefined    for tests
#
# Objects of each such choice live in a directory of their own, so choices can be mixed without cleaning.

CC      = cc
MARCH   = native
PREFIX  = /usr/local
DESTDIR =

# `$(call accepts,FLAG)` is FLAG if the compiler can build and link a program with it, else nothing.
accepts = $(shell echo 'int main(void){return 0;}' | $(CC) $(1) -x c - -o /dev/null 2>/dev/null && echo $(1))

OPENMP := $(call accepts,-fopenmp)
SIMD   := $(call accepts,-fopenmp-simd)
ARCH   := $(call accepts,-march=$(MARCH)) $(call accepts,-mprefer-vector-width=512) \
          $(call accepts,-fno-tree-loop-distribute-patterns) $(call accepts,-fno-thread-jumps)

# -ffp-contract=fast: ISO mode forbids fused multiply-add otherwise, a third of the speed.
# -fno-tree-loop-distribute-patterns: gcc would call memset for the sums that are to stay in registers.
# -fno-thread-jumps: gcc would take the clamps of exp as three ways through what follows and compute all of them.
# -fno-math-errno, -fno-trapping-math: square roots and selections may run in vector registers; values do not change.
CFLAGS  = -O3 -g -Wall -Wextra -Wpedantic
FLAGS   = -std=c99 $(CFLAGS) $(ARCH) -ffp-contract=fast -fno-math-errno -fno-trapping-math $(OPENMP) $(SIMD) \
          $(if $(OPENMP),,-Wno-unknown-pragmas) \
          $(if $(DOUBLE),-DDIFFENC_DOUBLE) $(if $(SANITIZE),-fsanitize=$(SANITIZE) -fno-sanitize-recover=all)

PROGRAM = diffenc$(if $(DOUBLE),-double)
comma   = ,
BUILD   = build/$(notdir $(CC))-$(MARCH)$(if $(OPENMP),,-serial)$(if $(SANITIZE),-$(subst $(comma),-,$(SANITIZE)))$(if $(DOUBLE),-double)
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

$(BUILD)/%.o: %.c diffenc.h | $(BUILD)
	$(COMPILE) -c $< -o $@

$(BUILD)/%.o: tests/%.c diffenc.h tests/test.h tests/derivatives.h | $(BUILD)
	$(COMPILE) -c $< -o $@

$(BUILD)/test_%: $(BUILD)/test_%.o $(LIBRARY) $(BUILD)/derivatives.o
	$(CC) $(FLAGS) $(LDFLAGS) $^ -o $@ -lm

$(BUILD):
	@mkdir -p $@

# The main job in about a minute: train a small DiffEnc on the built-in digits and draw samples.
run: all
	@rm -rf run
	./$(PROGRAM) train --data digits --model diffenc-2-2 --net unet --channels 16 --encoder-channels 8 \
	    --batch 16 --steps 900 --lr 2e-3 --warmup 50 --clip 1 --save-every 300 --sample-steps 60 --out run
	@echo "Look at run/samples-900.png and run/loss.png; run/checkpoint.safetensors goes on with --resume."

# All tests, in single and in double precision; the last line is the sum of both. MNIST_DIR=DIR adds the real data.
test:
	@$(MAKE) --no-print-directory all tests
	@$(MAKE) --no-print-directory all tests DOUBLE=1
	@sh tests/run.sh $(BUILD) $(BUILD)-double

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

# The same steps in PyTorch, in turns with ours.
bench-peer: all
	sh tests/bench_peer.sh ./$(PROGRAM)

# Feed the parsers of files with made-up ones, SECONDS each (clang and its libFuzzer).
FUZZ_SECONDS = 60
FUZZERS = idx cifar gzip tensors
fuzz:
	@mkdir -p build/fuzz
	@for f in $(FUZZERS); do \
	    clang -std=c99 -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -I. \
	        tests/fuzz/fuzz_$$f.c data.c tensor.c -o build/fuzz/$$f -lm && mkdir -p build/fuzz/corpus-$$f && \
	    build/fuzz/$$f -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=1024 -timeout=10 -max_len=65536 \
	        -artifact_prefix=build/fuzz/ -verbosity=0 -print_final_stats=1 build/fuzz/corpus-$$f || exit 1; \
	done

# What takes long: valgrind, many kills, threads, with and without OpenMP.
trust: all
	sh tests/trust.sh

# Fetch MNIST into mnist/, with checksums.
mnist:
	sh tests/fetch_mnist.sh mnist

clean:
	rm -rf build diffenc diffenc-double

install: all
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 $(PROGRAM) $(DESTDIR)$(PREFIX)/bin/$(PROGRAM)

.PHONY: all run test tests check mutants bench bench-peer fuzz trust mnist clean install
.SECONDARY:
