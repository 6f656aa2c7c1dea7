/* fuzz_cifar.c - libFuzzer: any bytes as a CIFAR-10 batch.
 * clang -g -O1 -fsanitize=fuzzer,address,undefined tests/fuzz/fuzz_cifar.c data.c tensor.c -lm */

#include "../../diffenc.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    Bytes bytes = { (unsigned char *)data, size };
    Dataset dataset = { 0 };
    Error error;
    if (cifar_parse(&bytes, "fuzz", &dataset, &error) == 0) dataset_close(&dataset);
    return 0;
}
