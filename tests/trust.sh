#!/bin/sh
# trust.sh - what needs builds of its own: the same bits with and without OpenMP, valgrind, ThreadSanitizer.
#
# Two minutes and a half on two cores. Each step prints one line, ok or FAILED (then with the end of what it said); the last
# line is the sum. What the machine has no tool for is skipped, and said.

cd "$(dirname "$0")/.." || exit 1
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
passed=0
failed=0

step() {   # step NAME COMMAND...
    name=$1
    shift
    if "$@" >"$work/log" 2>&1; then
        echo "ok      $name"
        passed=$((passed + 1))
    else
        echo "FAILED  $name"
        tail -n 20 "$work/log"
        failed=$((failed + 1))
    fi
}

# Build diffenc, with the given choices of the Makefile, into build/trust-NAME.
build() {   # build NAME CHOICE...
    build=build/trust-$1
    shift
    make -s BUILD="$build" "$@" "$build/diffenc"
}

# Images of 12 by 8 pixels: the bytes of a source file behind an IDX header. They make a step short enough for tools
# that slow a program down fifty times.
mkdir "$work/small"
for name in train-images-idx3-ubyte t10k-images-idx3-ubyte; do
    { printf '\000\000\010\003\000\000\000\050\000\000\000\014\000\000\000\010'; head -c 3840 tensor.c; } \
        >"$work/small/$name"
done

# A command for each kind of work, with every kind of layer in it, into the directory DIR.
small_work() {   # small_work DIR THREADS PROGRAM...
    dir=$1 threads=$2
    shift 2
    "$@" train --data "$work/small" --net unet --model diffenc-1-1 --channels 4 --encoder-channels 4 --batch 5 \
        --schedule learned --steps 2 --sample-steps 1 --eval-every 2 --eval-limit 2 --threads "$threads" --out "$dir" &&
    "$@" train --data "$work/small" --net flat --model vdm-1 --channels 4 --batch 3 --timesteps 3 --steps 1 \
        --threads "$threads" --out "$dir/flat" &&
    "$@" eval "$dir/checkpoint.safetensors" --data "$work/small" --limit 3 --timesteps 2 --variance-ratio optimal \
        --threads "$threads" &&
    "$@" eval "$dir/checkpoint.safetensors" "$dir/flat/checkpoint.safetensors" --data "$work/small" --limit 3 \
        --csv "$dir/eval.csv" --chart "$dir/eval.svg" --threads "$threads" &&
    "$@" sample "$dir/checkpoint.safetensors" --count 3 --steps 2 --pixels drawn --threads "$threads" --out "$dir/s.png" &&
    "$@" show "$dir/checkpoint.safetensors" --data "$work/small" --count 1 --threads "$threads" --out "$dir/show.png" &&
    "$@" grad tests/golden/diffenc-unet-x-T4.checkpoint.safetensors --threads "$threads" \
        --batch tests/golden/diffenc-unet-x-T4.batch.safetensors --out "$dir/gradient"
}

# ---- the same bits ----

# Widths that are no multiple of a vector, more examples than gradient slots, attention over 784 and over 49 positions.
bits_work() {   # bits_work NAME THREADS BUILD
    program=build/trust-$3/diffenc
    "$program" train --model diffenc-2-2 --net unet --channels 12 --encoder-channels 8 --batch 18 --steps 3 \
        --sample-steps 3 --seed 5 --threads "$2" --out "$work/$1" &&
    "$program" train --model diffenc-1-nt --net flat --channels 8 --batch 3 --steps 2 --sample-steps 1 --threads "$2" \
        --out "$work/$1-flat" &&
    "$program" sample "$work/$1/checkpoint.safetensors" --count 3 --steps 4 --threads "$2" --out "$work/$1/drawn.png" &&
    "$program" eval "$work/$1/checkpoint.safetensors" --limit 5 --timesteps 3 --threads "$2" >"$work/$1/eval"
}

same_bits() {   # same_bits NAME NAME: checkpoints, pictures, evaluation, log without its seconds
    for file in checkpoint.safetensors samples-3.png drawn.png eval; do
        cmp "$work/$1/$file" "$work/$2/$file" || return 1
    done
    for file in checkpoint.safetensors samples-2.png; do
        cmp "$work/$1-flat/$file" "$work/$2-flat/$file" || return 1
    done
    for run in $1 $2; do
        cut -d, -f1-7 "$work/$run/log.csv" >"$work/$run/log"
    done
    cmp "$work/$1/log" "$work/$2/log"
}

step "build with OpenMP" build openmp
step "build without OpenMP" build serial OPENMP=
step "a training and its samples, 1 thread" bits_work one 1 openmp
for threads in 2 5; do
    step "the same, $threads threads" bits_work "$threads" "$threads" openmp
    step "1 and $threads threads: the same bits" same_bits one "$threads"
done
step "the same without OpenMP" bits_work serial 1 serial
step "with and without OpenMP: the same bits" same_bits one serial

# ---- valgrind ----

# It knows no AVX-512, so the build is for an older machine. Memory that OpenMP's own threads still hold at the end is
# only "possibly lost"; what this program loses would be lost for good.
if command -v valgrind >/dev/null; then
    checked="valgrind -q --error-exitcode=9 --leak-check=full --show-leak-kinds=definite,indirect \
        --errors-for-leak-kinds=definite,indirect --track-origins=yes"
    step "build for valgrind" build valgrind MARCH=x86-64-v3 CFLAGS="-O1 -g"
    step "valgrind: every command, 1 thread" small_work "$work/valgrind1" 1 $checked build/trust-valgrind/diffenc
    # Images of 28x28 and 16 channels are what minimal filtering begins with.
    step "valgrind: a training step with minimal filtering" $checked build/trust-valgrind/diffenc train --model vdm-1 \
        --channels 16 --batch 1 --steps 1 --sample-steps 1 --sample-every 0 --threads 1 --out "$work/filtering"
    step "valgrind: every command, 2 threads" small_work "$work/valgrind2" 2 $checked build/trust-valgrind/diffenc
else
    echo "skipped: valgrind is not installed"
fi

# ---- threads ----

# ThreadSanitizer sees only what was compiled with it. gcc's libgomp is not: the end of a parallel loop is invisible to
# it and every value that one thread makes and another then reads is reported (117 times in two training steps). clang's
# libomp loads Archer, a tool that tells ThreadSanitizer of OpenMP's barriers, where it is installed; with it and without
# the runtime's own accesses (ignore_noninstrumented_modules) there was not one report. That it would have found a race
# is shown first, on a program that has one.
race='int main(void) { int sum = 0;
_Pragma("omp parallel for num_threads(3)") for (int i = 0; i < 1000; i++) sum += i;
return sum < 0; }'
TSAN_OPTIONS="ignore_noninstrumented_modules=1 exitcode=66"
export TSAN_OPTIONS
if echo "$race" | clang -g -fopenmp -fsanitize=thread -x c - -o "$work/race" 2>/dev/null &&
    ARCHER_OPTIONS=verbose=1 "$work/race" 2>&1 | grep -q "Archer detected"; then
    step "ThreadSanitizer finds a race where there is one" sh -c "'$work/race'; test \$? = 66"
    step "build for ThreadSanitizer" build thread CC=clang SANITIZE=thread CFLAGS="-O2 -g"
    step "ThreadSanitizer: every command, 3 threads" small_work "$work/thread" 3 build/trust-thread/diffenc
else
    echo "skipped: ThreadSanitizer (needs clang, its libomp and Archer)"
fi

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
