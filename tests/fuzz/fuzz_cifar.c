/* fuzz_cifar.c - libFuzzer: any bytes as two CIFAR-10 batches, which are joined. */

#include "diffenc.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const Bytes bytes = {(unsigned char *)data, size};
    Dataset dataset = {0};
    Error error;
    for (int batch = 0; batch < 2; batch++)
        cifar_parse(&bytes, "fuzz", &dataset, &error);
    dataset_close(&dataset);
    return 0;
}
