/* fuzz_gzip.c - libFuzzer: any bytes as a gzip stream.
 * clang -g -O1 -fsanitize=fuzzer,address,undefined tests/fuzz/fuzz_gzip.c data.c tensor.c -lm */

#include "../../diffenc.h"

#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    Bytes out;
    Error error;
    if (gzip_inflate(data, size, "fuzz", &out, &error) == 0) free(out.data);
    return 0;
}
