#!/bin/sh
# checks.sh - for scripts of tests, which read it: a directory of their own, and checks that are counted.
# The last job in the background stands in $job; it ends with the script.

work=$(mktemp -d) || exit 1
job=
trap 'test -z "$job" || kill "$job" 2>/dev/null; wait; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
cd "$work" || exit 1
passed=0
failed=0

# check WHAT COMMAND...: count whether the command succeeds.
check() {
    what=$1
    shift
    if "$@" >check.out 2>&1; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED $what"
        head -n 20 check.out
    fi
}
