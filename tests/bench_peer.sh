#!/bin/sh
# bench_peer.sh - the same training step and sampling in PyTorch, in ONNX Runtime and in diffenc, by turns.
#
#     tests/bench_peer.sh [PROGRAM [ROUNDS]]        (default ./diffenc and 3; `make bench-peer`)
#
# Each round measures every model once with the one and once with the other, each in a process of its own, so
# that whatever else the machine does meets both. Before the first round PyTorch tries its memory layouts and
# ways to compute dy/dlambda, and the fastest are kept. Then it runs twice: with the system's allocator, as a
# user has it, and with one that keeps freed memory, which few have. Both programs take the median of STEPS
# steps after one to warm up.
#
# ONNX Runtime gets the score networks as PyTorch exports them and evaluates them for 1, 16 and 64 images at
# once. It comes from npm into build/onnxruntime (290 MB, once); without node and npm it is left out.
#
# Environment: PYTHON (python3, else /usr/bin/python3, whichever has PyTorch), THREADS (all), STEPS (3), BATCH
# (64), MODELS (for PyTorch; "" leaves it out), COUNTS (for ONNX Runtime; "" leaves it out), and of sampling
# COUNT (64 images) and SAMPLER_STEPS (10; more of them with ONNX Runtime where it has fewer images at once).
# Exit status: 0, 1 when a measurement fails, 2 for wrong usage, 3 when PyTorch is missing, or all peers.

set -u
here=$(dirname "$0")
program=${1:-$here/../diffenc}
rounds=${2:-3}
THREADS=${THREADS:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)}
STEPS=${STEPS:-3}
BATCH=${BATCH:-64}
MODELS=${MODELS-vdm-4 diffenc-4-nt diffenc-4-2 sampling}
COUNTS=${COUNTS-1 16 64}
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

work=$(mktemp -d) || exit 1
lines=$work/lines
trap 'rm -rf "$work"' EXIT
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

# keep ROW COMMAND...: run it, keep its line with round and row of the table (_ for spaces) in front, give up
# when it fails.
keep() {
    row=$1
    shift
    line=$("$@" </dev/null) || { say "failed: $*"; exit 1; }
    echo "$round $row $line" >> "$lines"
}

# What is measured, one "MODEL WHAT ALLOCATOR OPTIONS" a line, with PyTorch's fastest options found by it.
cases=
for model in $MODELS; do
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

# ONNX Runtime's networks, where its node package is to be had.
runtime=$here/../build/onnxruntime
networks=
if [ -z "$COUNTS" ]; then
    :
elif ! command -v node >/dev/null || ! command -v npm >/dev/null; then
    say "no ONNX Runtime to compare with: apt-get install nodejs npm"
elif ! mkdir -p "$runtime" || ! { [ -d "$runtime/node_modules/onnxruntime-node" ] ||
    npm install --prefix "$runtime" --ignore-scripts --silent onnxruntime-node@1.30 >&2; }; then
    say "no ONNX Runtime to compare with: npm cannot install onnxruntime-node"
else
    for net in flat unet; do
        for count in $COUNTS; do
            "$python" "$here/reference.py" export --net "$net" --count "$count" --out "$work/$net-$count" ||
                { say "failed: the export of vdm-4, $net"; exit 1; }
            networks="$networks $net-$count"
        done
    done
fi

[ -n "$cases$networks" ] || exit 3
round=1
while [ "$round" -le "$rounds" ]; do
    echo "round $round of $rounds" >&2
    while read -r model what allocator options; do
        [ -n "$model" ] || continue
        name=${model}_$what
        [ "$allocator" = keep ] && name=$name,_memory_kept
        # shellcheck disable=SC2086 # options are words
        keep "$name" torch "$model" "$what" --allocator "$allocator" $options
        keep "$name" ours "$model" "$what"
    done <<END
$cases
END
    for network in $networks; do
        count=${network#*-}
        evaluations=$(((64 * SAMPLER_STEPS + count - 1) / count))
        name=${network%-*},_${count}_at_once
        keep "$name" env NODE_PATH="$runtime/node_modules" \
            node "$here/bench_onnx.js" "$work/$network" "$THREADS" "$evaluations"
        keep "$name" "$program" bench --sampling vdm-4 --net "${network%-*}" --threads "$THREADS" \
            --count "$count" --steps "$evaluations" --runs 1
    done
    round=$((round + 1))
done

# table PEER TITLE UNIT: medians over the rounds of what PEER and diffenc took, in seconds ("s"), or in
# milliseconds for an image and step ("ms").
table() {
    grep -q " $1 " "$lines" || return 0
    awk -v peer="$1" -v title="$2" -v unit="$3" '
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
    $3 == peer || $3 == "diffenc" {
        if ($3 == peer && !($2 in known)) {
            known[$2] = 1
            names[++count] = $2
        }
        seconds[$3, $2, $1] = field("seconds") * (unit == "ms" ? 1000 / field("count") / field("steps") : 1)
        bytes[$3, $2, $1] = field($3 == "torch" ? "peak_rss_bytes" : "peak_bytes")
        if ($1 > rounds)
            rounds = $1
    }
    END {
        printf "\n%-32s %15s %10s %8s %17s %15s %12s %8s\n", "", title " " unit, "diffenc " unit,
               "faster", "", title " MB", "diffenc MB", "smaller"
        for (c = 1; c <= count; c++) {
            name = names[c]
            worst = 1e30
            best = 0
            for (r = 1; r <= rounds; r++) {
                a[r] = seconds[peer, name, r]
                b[r] = seconds["diffenc", name, r]
                m[r] = bytes[peer, name, r] / 1e6
                n[r] = bytes["diffenc", name, r] / 1e6
                ratio[r] = a[r] / b[r]
                worst = ratio[r] < worst ? ratio[r] : worst
                best = ratio[r] > best ? ratio[r] : best
            }
            gsub("_", " ", name)
            printf "%-32s %15.3f %10.3f %7.2fx %17s %15.1f %12.1f %7.1fx\n", name, median(a, rounds),
                   median(b, rounds), median(ratio, rounds), sprintf("(%.2f..%.2f)", worst, best),
                   median(m, rounds), median(n, rounds), median(m, rounds) / median(n, rounds)
        }
    }' "$lines"
}

cpu=$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo 2>/dev/null | head -n 1)
[ -n "$cpu" ] || cpu=$(sysctl -n machdep.cpu.brand_string 2>/dev/null || uname -m)
echo "machine   $cpu, $THREADS threads"
echo "diffenc   $(sed -n 's/.* compiler=//p' "$lines" | tail -n 1)"
echo "figures   medians of $rounds rounds, in parentheses the worst and the best of them"
peer=$(grep ' torch ' "$lines" | tail -n 1)
if [ -n "$peer" ]; then
    blas=$(value blas "$peer")
    echo "PyTorch   $(value version "$peer"), BLAS $blas, $("$python" --version 2>&1)"
    case $blas in
        reference | openblas-pthread)
            echo "NOTE      unfair: this BLAS slows PyTorch down; apt-get install libopenblas0-openmp" ;;
    esac
    echo "step      $BATCH images of 28x28x1; sampling: $COUNT images, $SAMPLER_STEPS steps"
    echo "memory kept: PyTorch's allocator keeps freed memory (see --allocator of tests/reference.py)"
fi
table torch PyTorch s
peer=$(grep ' onnx ' "$lines" | tail -n 1)
if [ -n "$peer" ]; then
    echo
    echo "ONNX Runtime $(value version "$peer"): the network of vdm-4, ms for an image and step"
fi
table onnx "ONNX Runtime" ms
