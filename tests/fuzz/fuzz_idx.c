/* fuzz_idx.c - libFuzzer: any bytes as IDX files of images and of labels. */

#include "diffenc.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    Bytes bytes = {malloc(size), size};   /* a copy of this size exactly: the parser takes it over */
    Dataset dataset = {0};
    Error error;
    memcpy(bytes.data, data, size);
    if (idx_parse(&bytes, "fuzz", &dataset, &error) == 0)
        dataset_close(&dataset);
    free(bytes.data);
    bytes = (Bytes){malloc(size), size};
    memcpy(bytes.data, data, size);
    dataset.count = (uint32_t)size - 8;
    if (idx_labels_parse(&bytes, "fuzz", &dataset, &error) == 0)
        dataset_close(&dataset);
    free(bytes.data);
    return 0;
}
