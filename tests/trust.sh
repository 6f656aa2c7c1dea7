#!/bin/sh
# trust.sh - what needs builds of its own or a shell: the same bits with and without OpenMP, other flags, old
# checkpoints, a limit of memory, kills at the worst moments, valgrind, ThreadSanitizer.
#
# Three minutes on two cores. Each step prints one line, ok or FAILED (then with the end of what it said); the
# last line is the sum. What the machine has no tool for is skipped, and said.

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

# Images of 12 by 8 pixels: the bytes of a source file behind an IDX header. They make a step short enough for
# tools that slow a program down fifty times.
mkdir "$work/small"
for split in train t10k; do
    {
        printf '\000\000\010\003\000\000\000\050\000\000\000\014\000\000\000\010'
        head -c 3840 tensor.c
    } >"$work/small/$split-images-idx3-ubyte"
done

# A command for each kind of work, with every kind of layer in it, into the directory DIR.
small_work() {   # small_work DIR THREADS PROGRAM...
    dir=$1 threads=$2
    shift 2
    checkpoint=$dir/checkpoint.safetensors
    "$@" train --data "$work/small" --net unet --model diffenc-1-1 --channels 4 --encoder-channels 4 \
        --batch 5 --schedule learned --steps 2 --sample-steps 1 --eval-every 2 --eval-limit 2 \
        --threads "$threads" --out "$dir" &&
    "$@" train --data "$work/small" --net flat --model vdm-1 --channels 4 --batch 3 --timesteps 3 --steps 1 \
        --threads "$threads" --out "$dir/flat" &&
    "$@" eval "$checkpoint" --data "$work/small" --limit 3 --timesteps 2 --variance-ratio optimal \
        --threads "$threads" &&
    "$@" eval "$checkpoint" "$dir/flat/checkpoint.safetensors" --data "$work/small" --limit 3 \
        --csv "$dir/eval.csv" --chart "$dir/eval.svg" --threads "$threads" &&
    "$@" sample "$checkpoint" --count 3 --steps 2 --pixels drawn --threads "$threads" --out "$dir/s.png" &&
    "$@" show "$checkpoint" --data "$work/small" --count 1 --threads "$threads" --out "$dir/show.png" &&
    "$@" grad tests/golden/diffenc-unet-x-T4.checkpoint.safetensors --threads "$threads" \
        --batch tests/golden/diffenc-unet-x-T4.batch.safetensors --out "$dir/gradient"
}

# ---- the same bits ----

# Widths that are no multiple of a vector, more examples than gradient slots, attention over 784 and over 49
# positions.
bits_work() {   # bits_work NAME THREADS BUILD
    program=build/trust-$3/diffenc
    "$program" train --model diffenc-2-2 --net unet --channels 12 --encoder-channels 8 --batch 18 --steps 3 \
        --sample-steps 3 --seed 5 --threads "$2" --out "$work/$1" &&
    "$program" train --model diffenc-1-nt --net flat --channels 8 --batch 3 --steps 2 --sample-steps 1 \
        --threads "$2" --out "$work/$1-flat" &&
    "$program" sample "$work/$1/checkpoint.safetensors" --count 3 --steps 4 --threads "$2" \
        --out "$work/$1/drawn.png" &&
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

# ---- other flags ----

# What other flags compiled is compiled anew, and what the same flags compiled is not.
rebuilds() {
    object=build/trust-flags/data.o
    make -s BUILD=build/trust-flags CFLAGS=-O0 $object && touch "$work/built" &&
        make -s BUILD=build/trust-flags CFLAGS=-O0 $object && test ! $object -nt "$work/built" &&
        make -s BUILD=build/trust-flags CFLAGS=-Og $object && test $object -nt "$work/built"
}
step "changed CFLAGS compile anew" rebuilds

# ---- old checkpoints ----

# Options that came later had the paper's values before: a checkpoint without a word of them is evaluated, and
# goes on, to the same bits as one that names them, and then names them too.
old_checkpoint() {
    program=build/trust-openmp/diffenc
    $program train --data "$work/small" --net flat --model diffenc-1-1 --channels 4 --encoder-channels 4 \
        --batch 3 --fourier 6..7 --optimizer adamw --encoder-lr 1 --cooldown 0 --clip 0 --steps 2 \
        --sample-steps 0 --threads 1 --out "$work/named" &&
        cp -r "$work/named" "$work/unnamed" &&
        python3 - "$work/unnamed/checkpoint.safetensors" <<'END' || return 1
import json, struct, sys
content = open(sys.argv[1], "rb").read()
length, = struct.unpack("<Q", content[:8])
header = json.loads(content[8:8 + length])
for key in "fourier optimizer encoder_lr cooldown clip conditional classes data_digest".split():
    del header["__metadata__"][key]
text = json.dumps(header).encode()
open(sys.argv[1], "wb").write(struct.pack("<Q", len(text)) + text + content[8 + length:])
END
    for run in named unnamed; do
        cp "$work/$run/checkpoint.safetensors" "$work/same-name" &&
            $program eval "$work/same-name" --data "$work/small" --threads 1 >"$work/$run/bound" &&
            $program train --resume --steps 4 --sample-steps 0 --threads 1 --out "$work/$run" || return 1
    done
    cmp "$work/named/bound" "$work/unnamed/bound" &&
        cmp "$work/named/checkpoint.safetensors" "$work/unnamed/checkpoint.safetensors" &&
        grep -q '"optimizer":"adamw".*"encoder_lr":"1"' "$work/unnamed/checkpoint.safetensors"
}
if command -v python3 >/dev/null; then
    step "a checkpoint older than some options goes on as it began" old_checkpoint
else
    echo "skipped: a checkpoint older than some options (no python3)"
fi

# ---- a limit of memory ----

# A control group of 20 MB, as far as its file says so: it lies where only this process sees it.
# shellcheck disable=SC2016 # expanded by the inner shell
in_group='mount -t tmpfs none /sys/fs/cgroup && echo 20000000 >/sys/fs/cgroup/memory.max && exec "$@"'
small_group() {
    unshare -m sh -c "$in_group" - build/trust-openmp/diffenc train --steps 1 --out "$work/much" 2>&1 |
        grep "needs about [0-9]* MiB of memory, there are 19 MiB" && test ! -e "$work/much"
}
if unshare -m sh -c "$in_group" - true 2>/dev/null; then
    step "a control group's memory is kept to" small_group
else
    echo "skipped: a control group's memory (no right to mount)"
fi

# The same of the older kind, where there is one, and of the group above that of the process.
group=/sys/fs/cgroup/memory/diffenc.$$
# shellcheck disable=SC2016
older_group() {
    mkdir "$group/inner" && echo 20000000 >"$group/memory.limit_in_bytes" &&
        sh -c 'echo $$ >"$0/inner/cgroup.procs" && exec "$@"' "$group" \
            build/trust-openmp/diffenc train --steps 1 --out "$work/more" 2>&1 |
        grep "needs about [0-9]* MiB of memory, there are 19 MiB" && test ! -e "$work/more"
}
if mkdir "$group" 2>/dev/null && [ -e "$group/memory.limit_in_bytes" ]; then
    step "the memory of a control group above is kept to" older_group
    rmdir "$group/inner" "$group"
else
    echo "skipped: the memory of a control group above (none of version 1, or no right to make one)"
fi

# ---- kills at the worst moments ----

there() {   # there PATTERN: is there such a file?
    for file in $1; do
        [ -e "$file" ] && return 0
    done
    return 1
}

wait_for() {   # wait_for PATTERN: until such a file is there, about a second at most
    looks=0
    until there "$1" || [ $looks = 50000 ]; do
        looks=$((looks + 1))
    done
}

# Trainings killed in turns at any moment, while a grid is written, and while a report is, which SIGTERM asks
# for. The last one ends as if nothing had been, and leaves nothing behind.
# shellcheck disable=SC2086 # options are words
killed_training() {
    kills=18 steps=240 grids=0 reports=0 out=$work/killed
    train="build/trust-openmp/diffenc train --threads 1 --steps $steps --save-every 2 --sample-every 2"
    train="$train --sample-steps 2"
    model="--data $work/small --net flat --model vdm-1 --channels 4 --batch 3"
    began=$(date +%s%N)
    $train $model --out "$work/quiet" || return 1
    share=$((($(date +%s%N) - began) / kills))
    for i in $(seq $kills); do
        resume=$model
        [ ! -e "$out/checkpoint.safetensors" ] || resume=--resume
        $train $resume --out "$out" &
        child=$!
        sleep "$(awk "BEGIN { print $share * ($i * 37 % 100) / 50 / 1e9 }")"
        case $((i % 3)) in
            1) wait_for "$out/samples-*.tmp.*" ;;
            2) kill -TERM $child; wait_for "$out/report.html.tmp.*" ;;
        esac
        kill -KILL $child
        wait $child
        ! there "$out/samples-*.tmp.*" || grids=$((grids + 1))
        ! there "$out/report.html.tmp.*" || reports=$((reports + 1))
    done
    echo "of $kills trainings $grids were killed while they wrote a grid, $reports while they wrote a report"
    [ $grids -gt 1 ] && [ $reports -gt 1 ] && $train --resume --out "$out" || return 1
    for run in quiet killed; do
        cut -d, -f1-8 "$work/$run/log.csv" >"$work/$run/log" && ls "$work/$run" >"$work/$run.files"
        for file in "$work/$run"/samples-*.png; do
            cat "$file"
        done >"$work/$run/grids"
    done
    cmp "$work/quiet.files" "$work/killed.files" || return 1
    for file in checkpoint.safetensors log grids; do
        cmp "$work/quiet/$file" "$out/$file" || return 1
    done
}
step "trainings, killed while they write" killed_training

# A grid of 16,384 images takes a while to be written. Cut off, there is none, or the one from before.
killed_sample() {
    sample="build/trust-openmp/diffenc sample $work/quiet/checkpoint.safetensors --steps 1 --threads 1 --out"
    $sample "$work/whole.png" --count 16384 && $sample "$work/before.png" --count 1 &&
        cp "$work/before.png" "$work/old.png" || return 1
    for picture in old new; do
        $sample "$work/$picture.png" --count 16384 &
        child=$!
        until there "$work/$picture.png.tmp.*" || ! kill -0 $child; do :; done
        kill -KILL $child
        wait $child
        [ $? = 137 ] || return 1
    done
    cmp "$work/old.png" "$work/before.png" && test ! -e "$work/new.png" &&
        $sample "$work/new.png" --count 16384 && cmp "$work/new.png" "$work/whole.png"
}
step "sample, killed while it writes" killed_sample

# ---- valgrind ----

# It knows no AVX-512, so the build is for an older machine. Memory that OpenMP's threads hold at the end
# is only "possibly lost"; what this program loses would be lost for good.
if command -v valgrind >/dev/null; then
    checked="valgrind -q --error-exitcode=9 --leak-check=full --show-leak-kinds=definite,indirect \
        --errors-for-leak-kinds=definite,indirect --track-origins=yes"
    step "build for valgrind" build valgrind MARCH=x86-64-v3 CFLAGS="-O1 -g"
    step "valgrind: every command, 1 thread" \
        small_work "$work/valgrind1" 1 $checked build/trust-valgrind/diffenc
    # Images of 28x28 and 16 channels are what minimal filtering begins with.
    step "valgrind: a training step with minimal filtering" \
        $checked build/trust-valgrind/diffenc train --model vdm-1 --channels 16 --batch 1 --steps 1 \
        --sample-steps 1 --sample-every 0 --threads 1 --out "$work/filtering"
    step "valgrind: every command, 2 threads" \
        small_work "$work/valgrind2" 2 $checked build/trust-valgrind/diffenc
else
    echo "skipped: valgrind is not installed"
fi

# ---- threads ----

# ThreadSanitizer sees only what was compiled with it. gcc's libgomp is not: the end of a parallel loop is
# invisible to it and every value that one thread makes and another then reads is reported (117 times in two
# steps). clang's libomp loads Archer, a tool that tells ThreadSanitizer of OpenMP's barriers, where it is
# installed; with it and without the runtime's own accesses (ignore_noninstrumented_modules) there was not
# one report. That it would have found a race is shown first, on a program that has one.
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
