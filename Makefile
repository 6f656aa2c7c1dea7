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
ARCH   := $(call accepts,-march=$(MARCH)) $(call accepts,-mprefer-vector-width=512)

# -ffp-contract=fast: ISO mode forbids fused multiply-add otherwise, a third of the speed.
# -fno-math-errno, -fno-trapping-math: square roots and selections may run in vector registers; values do not change.
CFLAGS  = -O3 -g -Wall -Wextra -Wpedantic
FLAGS   = -std=c99 $(CFLAGS) $(ARCH) -ffp-contract=fast -fno-math-errno -fno-trapping-math $(OPENMP) -I. \
          $(if $(DOUBLE),-DDIFFENC_DOUBLE) $(if $(SANITIZE),-fsanitize=$(SANITIZE) -fno-sanitize-recover=all)

PROGRAM = diffenc$(if $(DOUBLE),-double)
comma   = ,
BUILD   = build/$(notdir $(CC))-$(MARCH)$(if $(DOUBLE),-double)$(if $(OPENMP),,-serial)$(if $(SANITIZE),-$(subst $(comma),-,$(SANITIZE)))
FLOORS  = tensor autograd nn diffenc data
LIBRARY = $(FLOORS:%=$(BUILD)/%.o)
OBJECTS = $(LIBRARY) $(BUILD)/main.o $(BUILD)/check.o $(BUILD)/bench.o
TESTS   = $(FLOORS:%=$(BUILD)/test_%) $(BUILD)/test_main

# Build the program. The copy is made only when it changed, so that switching between choices is safe.
all: $(BUILD)/diffenc
	@cmp -s $(BUILD)/diffenc $(PROGRAM) || cp $(BUILD)/diffenc $(PROGRAM)

$(BUILD)/diffenc: $(OBJECTS)
	$(CC) $(FLAGS) $(LDFLAGS) $^ -o $@ -lm

$(BUILD)/%.o: %.c diffenc.h | $(BUILD)
	$(CC) $(FLAGS) -c $< -o $@

$(BUILD)/%.o: tests/%.c diffenc.h tests/test.h | $(BUILD)
	$(CC) $(FLAGS) -c $< -o $@

$(BUILD)/test_%: $(BUILD)/test_%.o $(LIBRARY)
	$(CC) $(FLAGS) $(LDFLAGS) $^ -o $@ -lm

$(BUILD):
	@mkdir -p $@

# Train a small model on the built-in digits for about a minute, and say where the pictures are.
run: all
	./$(PROGRAM) train --data digits --model diffenc-2-2 --net unet --channels 16 --encoder-channels 8 --batch 32 \
	    --steps 400 --lr 2e-3 --out run

# All tests, in both precisions; the last line is the sum.
test:
	@$(MAKE) --no-print-directory all tests
	@$(MAKE) --no-print-directory all tests DOUBLE=1
	@sh tests/run.sh $(BUILD) $(BUILD:%=%)

tests: $(TESTS)

clean:
	rm -rf build diffenc diffenc-double

install: all
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 $(PROGRAM) $(DESTDIR)$(PREFIX)/bin/$(PROGRAM)

.PHONY: all run test tests clean install
.SECONDARY:
