#!/bin/sh
# test_paper.sh - does `make paper` make its tables, and go on where it was interrupted?
#
#     tests/test_paper.sh [PROGRAM]        (default ./diffenc)
#
# Tiny settings, the built-in digits. It is stopped, killed and begun again on the way, then called once more,
# when nothing may be left to do. Where PyTorch is, tests/reference.py gives its opinion on two checkpoints.
# Exit status: 0 only if nothing failed.

set -u
here=$(cd "$(dirname "$0")" && pwd)
program=$(cd "$(dirname "${1:-$here/../diffenc}")" && pwd)/$(basename "${1:-diffenc}")
# shellcheck source=tests/checks.sh
. "$here/checks.sh"

paper() {
    SEEDS="1 2" STEPS=20 MNIST_DIR=digits OUT=paper LIMIT=24 REPEATS=1 FINITE_LIMIT=2 SAMPLE_STEPS=4 \
        exec python3 "$here/paper.py" "$program"
}

# interrupt SIGNAL FILE: start, and send the signal once the file is there. Its exit status goes to $status.
interrupt() {
    (paper) >out.txt 2>err.txt &
    job=$!
    waited=0
    while [ ! -e "$2" ] && kill -0 "$job" 2>/dev/null && [ "$waited" -lt 1200 ]; do
        sleep 0.1
        waited=$((waited + 1))
    done
    kill -s "$1" "$job" 2>/dev/null
    wait "$job" 2>/dev/null
    status=$?
    job=
}

is() { [ "$1" = "$2" ] || { echo "$1, not $2"; cat err.txt; return 1; }; }
begun_anew() { grep -e '--out paper/vdm-4-seed1$' -e '--out paper/diffenc-4-nt-seed1 .*[0-9]$' err.txt; }

interrupt TERM paper/diffenc-4-nt-seed1/checkpoint.safetensors
check "SIGTERM ends it with status 143" is "$status" 143
interrupt KILL paper/diffenc-4-2-seed2/checkpoint.safetensors
check "what was trained is not trained again, what was begun is resumed" eval '! begun_anew'
interrupt INT paper/commands/finite-vdm-4-T100.txt
check "SIGINT ends it with status 130" is "$status" 130
(paper) >out.txt 2>err.txt
check "it ends well" is $? 0
check "it names its results" is "$(cat out.txt)" paper/results.md
check "no training is left to the last call" sh -c '! grep "diffenc train" err.txt'

# Every row of every table has a finite number in each column but the first; no other number is not finite.
rows() {
    awk -F '|' '
        /^\| --- / { body = 1; next }
        !/^\|/ { body = 0 }
        body {
            rows++
            for (i = 3; i < NF; i++)
                if ($i !~ /[0-9]/ && $i !~ /^ (none|not measured) $/) {
                    print "no number in column " i - 1 ": " $0
                    bad = 1
                }
        }
        END {
            if (rows < 60)
                print "only " rows " rows"
            exit bad || rows < 60
        }' paper/results.md && ! grep -wiE '[-+]?(nan|inf)' paper/results.md
}
check "each row has its numbers" rows
for model in vdm-4 vdm-4-wide diffenc-4-nt diffenc-4-2 vdm-4-learned diffenc-4-2-learned vdm-4-longer; do
    check "$model is in the tables of bounds and of costs" \
        is "$(grep -c "^| $model | [0-9]" paper/results.md | awk '{ print ($1 >= 2) }')" 1
done
check "each t has its row" is "$(grep -c '^| [01]\.[0-9]* | ' paper/results.md)" 30
for T in 10 30 100 300 1000; do
    models=$(grep -c "^| [-a-z0-9]* | $T | [0-9]*\.[0-9]* | " paper/results.md)
    check "T = $T has its three models" is "$models" 3
done

# Figures are traced: each number in brackets to a command, each command to what it printed.
traced() {
    grep -o '\[[0-9][0-9]*\]' paper/results.md | tr -d '[]' | sort -u >used.txt
    sed -n 's/^\([0-9][0-9]*\)\. `.*/\1/p' paper/results.md | sort -u >listed.txt
    [ -s used.txt ] && [ -z "$(comm -23 used.txt listed.txt)" ] || return 1
    sed -n 's/^[0-9][0-9]*\. `\(.* \(eval\|sample\|show\) .*\)`$/$ \1/p' paper/results.md >lines.txt
    [ -s lines.txt ] || return 1
    while IFS= read -r line; do
        grep -qxF -e "$line" paper/commands/*.txt || { echo "$line"; return 1; }
    done <lines.txt
}
check "each figure is traced to a command" traced

pictures() {
    sed -n 's/^!\[.*\](\([^)]*\)).*/\1/p' paper/results.md >pictures.txt
    [ "$(wc -l <pictures.txt)" -ge 13 ] || return 1
    while read -r file; do
        case $file in
            *.png) [ "$(head -c 4 "paper/$file" | tail -c 3)" = PNG ] ;;
            *.svg) grep -q '</svg>' "paper/$file" && ! grep -wi 'nan' "paper/$file" ;;
        esac || { echo "$file"; return 1; }
    done <pictures.txt
}
check "charts and pictures are there" pictures

cp paper/results.md before.md
(paper) >out.txt 2>err.txt
check "a second call ends well" is $? 0
check "a second call runs nothing" is "$(cat err.txt)" ""
check "a second call writes the same" cmp before.md paper/results.md
STEPS=30 MNIST_DIR=digits OUT=paper python3 "$here/paper.py" "$program" >out.txt 2>err.txt
check "other steps are refused in the same directory" is $? 1
check "in one line" is "$(grep -c 'was made with' err.txt)" 1

# The averaged weights of a checkpoint as those in training, so that `grad` has the loss of `eval`.
agrees() {
    "$python" - "$here" "$program" "$1" <<'END'
import subprocess, sys
here, program, checkpoint = sys.argv[1:]
sys.path.insert(0, here)
import reference
tensors, metadata = reference.read_safetensors(checkpoint)
tensors.update({name.replace("ema.", "params."): t for name, t in tensors.items() if name.startswith("ema.")})
reference.write_safetensors("averaged.safetensors", tensors, metadata)
reference.main(["batch", checkpoint, "--count", "6", "--out", "batch.safetensors"])
subprocess.run([program, "grad", "averaged.safetensors", "--batch", "batch.safetensors", "--out", "grad"],
               check=True)
losses = reference.read_safetensors("grad")[0]
output = subprocess.run([sys.executable, here + "/reference.py", "--eval", checkpoint, "--batch",
                         "batch.safetensors"], check=True, stdout=subprocess.PIPE, text=True).stdout
mean = [float(word) for line in output.splitlines() if line.startswith("mean") for word in line.split()[1:]]
d = int(metadata["height"]) * int(metadata["width"]) * int(metadata["image_channels"])
for name, expected in zip(("recon", "latent", "diffusion"), mean):
    got = losses["loss." + name].mean() / (d * reference.math.log(2))
    print(name, got, expected)
    assert abs(got - expected) < 1e-5 * abs(expected) + 1e-6
END
}
python=
for candidate in python3 /usr/bin/python3; do
    "$candidate" -c 'import torch, numpy' 2>/dev/null && python=$candidate
done
if [ -n "$python" ]; then
    check "the reference agrees on nt" agrees paper/diffenc-4-nt-seed1/checkpoint.safetensors
    check "the reference agrees on DiffEnc" agrees paper/diffenc-4-2-learned-seed1/checkpoint.safetensors
else
    echo "skipped: no PyTorch to hold the bounds against"
fi

echo "test_paper: $passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
