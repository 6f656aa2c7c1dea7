#!/bin/sh
# test_mpi.sh - do several ranks train, evaluate and draw what one does, and end together?
#
#     tests/test_mpi.sh PROGRAM        (built by `make MPI=1`; `make MPI=1 test-mpi` does both)
#
# Tiny models on the built-in digits, up to three ranks on this machine. MPIRUN is another launcher than Open MPI's.
# Exit status: 0 only if nothing failed.

set -u
here=$(cd "$(dirname "$0")" && pwd)
program=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
launch=${MPIRUN:-mpirun --oversubscribe --allow-run-as-root}
# shellcheck source=tests/checks.sh
. "$here/checks.sh"

is() { [ "$1" = "$2" ] || { echo "$1, not $2"; cat err.txt; return 1; }; }

# Each rank leaves the number of its process in pid.RANK.
cat >rank <<'END'
echo $$ >pid.${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-0}}
exec "$@"
END

# ranks COUNT ARGUMENTS...: the program on so many ranks. Where one waits for another for good, this ends it.
ranks() {
    count=$1
    shift
    # shellcheck disable=SC2086
    timeout -k 5 60 $launch -n "$count" sh rank "$program" "$@" >out.txt 2>err.txt
}

train() {   # train RANKS THREADS DIRECTORY OPTIONS...
    count=$1 threads=$2 out=$3
    shift 3
    ranks "$count" train --channels 8 --encoder-channels 4 --batch 10 --sample-steps 2 --eval-every 3 --eval-limit 5 \
        --threads "$threads" --out "$out" "$@"
}

# ---- the same training ----

log() { cut -d, -f1-8 "$1/log.csv"; }
same_bits() {
    for file in checkpoint.safetensors samples-6.png; do
        cmp "$1/$file" "$2/$file" || return 1
    done
    [ "$(log "$1")" = "$(log "$2")" ]
}

# near DIRECTORY DIRECTORY BOUND: the largest difference of two weights, as a share of the largest one in their tensor,
# and of two numbers in the logs, as a share of one, are below the bound.
near() {
    python3 - "$@" <<'END'
import array, csv, json, os, struct, sys

def tensors(directory):
    with open(directory + "/checkpoint.safetensors", "rb") as file:
        size, = struct.unpack("<Q", file.read(8))
        header, data = json.loads(file.read(size)), file.read()
    for name in sorted(header):
        if name.startswith(("params.", "ema.", "loss", "grad.")):
            begin, end = header[name]["data_offsets"]
            yield array.array("f", data[begin:end])

def numbers(directory):
    if not os.path.exists(directory + "/log.csv"):
        return [0]
    with open(directory + "/log.csv") as file:
        return [float(x) for row in list(csv.reader(file))[1:] for x in row[:8] if x]

weights = max(max(abs(p - q) for p, q in zip(a, b)) / (max(map(abs, a)) + 1e-3)
              for a, b in zip(tensors(sys.argv[1]), tensors(sys.argv[2])))
a, b = numbers(sys.argv[1]), numbers(sys.argv[2])
logs = max(abs(p - q) / (abs(p) + 1e-3) for p, q in zip(a, b))
print(f"weights {weights:.2g}, log {logs:.2g}", file=sys.stderr)
sys.exit(len(a) != len(b) or not max(weights, logs) < float(sys.argv[3]))
END
}

"$program" train --channels 8 --encoder-channels 4 --batch 10 --sample-steps 2 --eval-every 3 --eval-limit 5 \
    --threads 1 --steps 6 --out alone >/dev/null 2>&1
for count in 1 2 3; do
    check "$count ranks train" train "$count" 1 "$count" --steps 6
    check "$count ranks: one line for each test bound" is "$(grep -c 'test.*bpd on 5 images' out.txt)" 2
    check "$count ranks write what one writes" is "$(ls -A "$count")" "$(ls -A alone)"
    check "$count ranks and none: the same weights up to rounding" near "$count" alone 1e-4
done
check "one rank and none: the same bits" same_bits 1 alone
for count in 2 3; do
    train "$count" 2 "$count-threads" --steps 6
    check "$count ranks of 1 and of 2 threads: the same bits" same_bits "$count" "$count-threads"
done
check "fewer examples than ranks" train 3 1 few --batch 2 --steps 1 --eval-limit 2

# ---- the other commands: the same bits ----

golden=$here/golden/diffenc-unet-x-T4
checkpoint=alone/checkpoint.safetensors
for count in 1 3; do
    ranks "$count" eval $checkpoint --limit 7 --repeats 2 --timesteps 3 --variance-ratio optimal --chart "$count.svg"
    cp out.txt "$count.eval"
    ranks "$count" eval $checkpoint few/checkpoint.safetensors --limit 2 --csv "$count.csv"
    cat out.txt >>"$count.eval"
    ranks "$count" sample $checkpoint --count 5 --steps 3 --out "$count.png"
    ranks "$count" sample $checkpoint --count 2 --steps 3 --trajectory --out "$count.apng"
    ranks "$count" show $checkpoint --times 0,1 --out "$count.ppm"
    mkdir "gradient$count"
    ranks "$count" grad "$golden.checkpoint.safetensors" --batch "$golden.batch.safetensors" \
        --out "gradient$count/checkpoint.safetensors"
done
check "1 and 3 ranks: the same gradient up to rounding" near gradient1 gradient3 1e-4
check "an evaluation says something" grep -q "total: .* bpd" 1.eval
for file in eval svg csv png apng ppm; do
    check "1 and 3 ranks: the same .$file" cmp 1.$file 3.$file
done

# ---- how it ends ----

begin() {   # begin RANKS DIRECTORY: a long training in the background, until it has taken some steps
    train "$1" 1 "$2" --steps 100000 --save-every 2 --eval-every 0 &
    job=$!
    waited=0
    while ! grep -q ^5, "$2/log.csv" 2>/dev/null && [ "$waited" -lt 300 ]; do
        sleep 0.1
        waited=$((waited + 1))
    done
}

end() {   # wait for it; its exit status goes to $status
    wait "$job"
    status=$?
    job=
}

ends_in_order() {   # ends_in_order REASON: in one line of the program, and status 1 (that of `timeout` is 124)
    is "$status" 1 && is "$(grep -c '^diffenc: ' err.txt)" 1 && grep -q "$1" err.txt
}
steps_in() { tail -n 1 "$1/log.csv" | cut -d, -f1; }

for rank in 0 1; do
    begin 2 stop$rank
    kill -s TERM "$(cat pid.$rank)"
    end
    check "SIGTERM of rank $rank: the status" is "$status" 143
    check "SIGTERM of rank $rank: the last step is saved" \
        grep "^diffenc: stopped by SIGTERM; .* at step $(steps_in stop$rank), --resume goes on" err.txt
done
check "two ranks' checkpoint is resumed by three" train 3 1 stop1 --resume \
    --steps "$(($(steps_in stop1) + 3))" --eval-every 0
train 1 1 straight --steps "$(steps_in stop1)" --eval-every 0
check "two ranks and then three: the training that one rank does" near stop1 straight 1e-4

begin 2 lost
kill -s KILL "$(cat pid.1)"
end
check "a lost rank ends the others" is "$status" 137
check "a lost rank leaves a checkpoint" ranks 1 train --resume --steps 0 --out lost

# A disk of its own with room for one checkpoint and a half, where making one is allowed.
mkdir disk
if [ "$(id -u)" = 0 ] && mount -t tmpfs -o size=$(($(wc -c <$checkpoint) * 3 / 2)) none disk 2>/dev/null; then
    cp $checkpoint disk
    train 2 1 disk --resume --steps 7
    status=$?
    check "a full disk" ends_in_order "checkpoint.safetensors: No space left on device"
    check "a full disk leaves the old checkpoint and nothing else" \
        eval "cmp $checkpoint disk/checkpoint.safetensors && ! ls disk/*.tmp*"
    umount disk
else
    echo "skipped: a full disk (no right to mount one)"
fi

begin 2 moved
mv moved moved-away
end
# It notices the move between two files, or when it cannot make one.
check "rank 0 fails on the way" ends_in_order "^diffenc: moved.*: \(was removed or replaced\|No such file\)"
train 2 1 alone --steps 9
status=$?
check "rank 0 is refused a directory" ends_in_order "there is a checkpoint already"
ranks 1 train --out never : -n 1 "$program" train --data nowhere --out never
status=$?
check "rank 1 fails alone" ends_in_order "nowhere: No such file"
check "rank 1 fails alone: nothing is left" [ ! -e never ]

# ---- make paper ----

paper() {
    SEEDS=1 STEPS=2 MNIST_DIR=digits OUT=$1 LIMIT=6 REPEATS=1 FINITE_LIMIT=2 SAMPLE_STEPS=2 LAUNCH=$2 \
        python3 "$here/paper.py" "$program"
}
rows() { sed -n '/^| [a-z0-9-]* | 1 |/p' "$1/results.md" | cut -d'|' -f2-7; }
check "two ranks' tables" paper paper2 "$launch -n 2"
check "one rank's tables" paper paper1 ""
check "the tables of one rank and two" is "$(rows paper1)" "$(rows paper2)"

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
