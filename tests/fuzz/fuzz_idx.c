/* fuzz_idx.c - libFuzzer: any bytes as an IDX file. */

#include "diffenc.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const Bytes bytes = {(unsigned char *)data, size};
    Dataset dataset = {0};
    Error error;
    if (idx_parse(&bytes, "fuzz", &dataset, &error) == 0)
        dataset_close(&dataset);
    return 0;
}
