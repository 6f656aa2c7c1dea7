#!/bin/sh
# bench_peer.sh - the same training step and the same sampling in PyTorch and in diffenc, by turns.
#
#     tests/bench_peer.sh [PROGRAM [ROUNDS]]        (default ./diffenc and 3; `make bench-peer`)
#
# Each round measures every model once with the one and once with the other, each in a process of its own, so
# that whatever else the machine does meets both. Before the first round PyTorch tries its memory layouts and
# ways to compute dy/dlambda, and the fastest are kept. Then it runs twice: with the system's allocator, as a
# user has it, and with one that keeps freed memory, which few have. Both programs take the median of STEPS
# steps after one to warm up.
#
# Environment: PYTHON (python3, else /usr/bin/python3, whichever has PyTorch), THREADS (all), STEPS (3), BATCH
# (64), MODELS, and of the sampling COUNT (64 images) and SAMPLER_STEPS (10).
# Exit status: 0, 1 when a measurement fails, 2 for wrong usage, 3 when PyTorch is missing.

set -u
here=$(dirname "$0")
program=${1:-$here/../diffenc}
rounds=${2:-3}
THREADS=${THREADS:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)}
STEPS=${STEPS:-3}
BATCH=${BATCH:-64}
MODELS=${MODELS:-vdm-4 diffenc-4-nt diffenc-4-2}
COUNT=${COUNT:-64}
SAMPLER_STEPS=${SAMPLER_STEPS:-10}

say() { echo "bench_peer.sh: $*" >&2; }
case $rounds in
    '' | *[!0-9]* | 0*) say "'$rounds': expected a number of rounds"; exit 2 ;;
esac
if [ ! -x "$program" ]; then
    say "$program is not there: make builds it"
    exit 1
fi
python=
for candidate in "${PYTHON:-python3}" /usr/bin/python3; do
    if "$candidate" -c 'import torch, numpy' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    say "no PyTorch to compare with: apt-get install python3-torch libopenblas0-openmp, or say PYTHON=..."
    exit 3
fi

lines=$(mktemp) || exit 1
trap 'rm -f "$lines"' EXIT
trap 'exit 1' HUP INT TERM

# value KEY LINE: what stands behind KEY= in the line.
value() { printf '%s\n' "$2" | tr ' ' '\n' | sed -n "s/^$1=//p"; }

# torch MODEL step|sampling OPTIONS...: one line of PyTorch's.
torch() {
    model=$1 what=$2
    shift 2
    if [ "$what" = step ]; then
        "$python" "$here/reference.py" --bench --model "$model" --threads "$THREADS" --batch "$BATCH" \
            --steps "$STEPS" "$@"
    else
        "$python" "$here/reference.py" --bench-sampling --model "$model" --threads "$THREADS" \
            --count "$COUNT" --steps "$SAMPLER_STEPS" "$@"
    fi
}

# ours MODEL step|sampling: one line of diffenc's.
ours() {
    if [ "$2" = step ]; then
        "$program" bench --step "$1" --threads "$THREADS" --batch "$BATCH" --runs "$STEPS"
    else
        "$program" bench --sampling "$1" --threads "$THREADS" --count "$COUNT" --steps "$SAMPLER_STEPS" \
            --runs 1
    fi
}

# keep COMMAND...: run it, keep its line with round and allocator in front, give up when it fails.
keep() {
    line=$("$@" </dev/null) || { say "failed: $*"; exit 1; }
    echo "$round $allocator $line" >> "$lines"
}

# What is measured, one "MODEL WHAT OPTIONS" a line, with PyTorch's fastest options found by it.
cases=
for model in $MODELS sampling; do
    what=step
    [ "$model" = sampling ] && model=vdm-4 what=sampling
    line=$(torch "$model" "$what") || { say "failed: PyTorch's $what of $model"; exit 1; }
    options="--layout $(value layout "$line")"
    [ "$what" = step ] && options="$options --tangent $(value tangent "$line")"
    echo "PyTorch is fastest at $model, $what, with $options" >&2
    for allocator in system keep; do
        cases="$cases$model $what $allocator $options
"
    done
done

round=1
while [ "$round" -le "$rounds" ]; do
    echo "round $round of $rounds" >&2
    while read -r model what allocator options; do
        [ -n "$model" ] || continue
        # shellcheck disable=SC2086 # options are words
        keep torch "$model" "$what" --allocator "$allocator" $options
        keep ours "$model" "$what"
    done <<END
$cases
END
    round=$((round + 1))
done

cpu=$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo 2>/dev/null | head -n 1)
[ -n "$cpu" ] || cpu=$(sysctl -n machdep.cpu.brand_string 2>/dev/null || uname -m)
peer=$(grep ' torch ' "$lines" | tail -n 1)
blas=$(value blas "$peer")
echo "machine   $cpu, $THREADS threads"
echo "diffenc   $(sed -n 's/.* compiler=//p' "$lines" | tail -n 1)"
echo "PyTorch   $(value version "$peer"), BLAS $blas, $("$python" --version 2>&1)"
case $blas in
    reference | openblas-pthread)
        echo "NOTE      unfair: this BLAS slows PyTorch down; apt-get install libopenblas0-openmp" ;;
esac
echo "step      $BATCH images of 28x28x1; sampling: $COUNT images, $SAMPLER_STEPS steps"
echo "memory kept: PyTorch with an allocator that keeps freed memory (see --allocator of tests/reference.py)"
echo "figures   medians of $rounds rounds, in parentheses the worst and the best of them"
awk '
    function field(key,   i) {
        for (i = 1; i <= NF; i++)
            if (index($i, key "=") == 1)
                return substr($i, length(key) + 2)
    }
    function median(x, n,   i, j, t, y) {
        for (i = 1; i <= n; i++)
            y[i] = x[i]
        for (i = 2; i <= n; i++)
            for (j = i; j > 1 && y[j - 1] > y[j]; j--) {
                t = y[j]; y[j] = y[j - 1]; y[j - 1] = t
            }
        return (y[int((n + 1) / 2)] + y[int(n / 2) + 1]) / 2
    }
    $3 == "torch" || $3 == "diffenc" {
        name = $4 " " $5 ($2 == "keep" ? ", memory kept" : "")
        if (!(name in known)) {
            known[name] = 1
            names[++count] = name
        }
        seconds[$3, name, $1] = field("seconds")
        bytes[$3, name, $1] = field($3 == "torch" ? "peak_rss_bytes" : "peak_bytes")
        if ($1 > rounds)
            rounds = $1
    }
    END {
        printf "\n%-32s %10s %10s %8s %17s %12s %12s %8s\n", "", "PyTorch s", "diffenc s", "faster", "",
               "PyTorch MB", "diffenc MB", "smaller"
        for (c = 1; c <= count; c++) {
            name = names[c]
            worst = 1e30
            best = 0
            for (r = 1; r <= rounds; r++) {
                a[r] = seconds["torch", name, r]
                b[r] = seconds["diffenc", name, r]
                m[r] = bytes["torch", name, r] / 1e6
                n[r] = bytes["diffenc", name, r] / 1e6
                ratio[r] = a[r] / b[r]
                worst = ratio[r] < worst ? ratio[r] : worst
                best = ratio[r] > best ? ratio[r] : best
            }
            printf "%-32s %10.3f %10.3f %7.2fx %17s %12.1f %12.1f %7.1fx\n", name, median(a, rounds),
                   median(b, rounds), median(ratio, rounds), sprintf("(%.2f..%.2f)", worst, best),
                   median(m, rounds), median(n, rounds), median(m, rounds) / median(n, rounds)
        }
    }' "$lines"
