#!/bin/sh
# run.sh BUILD_DIR... - run all test programs of each build directory and add up what they count.
#
# A program that was not built, or that ends without its line "test_X: N passed, N failed", counts as one failed.
# Skipped parts say so in the output. The last line is the sum; the exit status is 0 only if nothing failed.

passed=0
failed=0
lines=$(mktemp) || exit 1
trap 'rm -f "$lines"' EXIT
trap 'exit 130' INT TERM

for build in "$@"; do
    echo "== $build"
    for name in test_tensor test_autograd test_nn test_diffenc test_data test_main; do
        # The output is shown while it comes, and kept for its last line.
        { DIFFENC=$build/diffenc "$build/$name" 2>&1; echo "exit $?" >>"$lines.status"; } | tee "$lines"
        status=$(sed -n 's/^exit //p' "$lines.status")
        rm -f "$lines.status"
        counts=$(sed -n "s/^$name: \([0-9][0-9]*\) passed, \([0-9][0-9]*\) failed\$/\1 \2/p" "$lines" | tail -n 1)
        if [ -z "$counts" ]; then
            echo "$build/$name: ended with status $status before its count"
            failed=$((failed + 1))
            continue
        fi
        passed=$((passed + ${counts% *}))
        failed=$((failed + ${counts#* }))
        if [ "$status" != 0 ] && [ "${counts#* }" = 0 ]; then
            echo "$build/$name: ended with status $status after its count"
            failed=$((failed + 1))
        fi
    done
done

echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
