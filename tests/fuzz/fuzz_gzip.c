/* fuzz_gzip.c - libFuzzer: any bytes as a gzip stream, all of it and its first bytes. */

#include "diffenc.h"

#include <stdlib.h>
#include <string.h>

/* A byte of deflate makes at most 1032. So streams up to this size stay below the 64 MB of `make fuzz`. */
enum { LONGEST = 30000 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    Bytes out, first;
    Error error;
    if (size > LONGEST || gzip_inflate(data, size, "fuzz", SIZE_MAX, &out, &error))
        return 0;
    if (out.size > 1032 * size)
        abort();
    for (size_t most = 0; most <= 2 * out.size + 1; most = 2 * most + 1) {
        const size_t expected = most < out.size ? most : out.size;
        if (gzip_inflate(data, size, "fuzz", most, &first, &error) || first.size != expected ||
            memcmp(first.data, out.data, expected) != 0)
            abort();
        free(first.data);
    }
    free(out.data);
    return 0;
}
