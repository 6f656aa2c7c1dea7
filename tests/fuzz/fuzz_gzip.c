/* fuzz_gzip.c - libFuzzer: any bytes as a gzip stream. */

#include "diffenc.h"

#include <stdlib.h>

/* A byte of deflate makes at most 1032. So streams up to this size stay below the 64 MB of `make fuzz`. */
enum { LONGEST = 30000 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    Bytes out;
    Error error;
    if (size > LONGEST || gzip_inflate(data, size, "fuzz", &out, &error))
        return 0;
    if (out.size > 1032 * size)
        abort();
    free(out.data);
    return 0;
}
