/* fuzz_tensors.c - libFuzzer: any bytes as a safetensors file. What is accepted is read to its last byte.
 * clang -g -O1 -fsanitize=fuzzer,address,undefined tests/fuzz/fuzz_tensors.c data.c tensor.c -lm */

#include "../../diffenc.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    Bytes bytes = { malloc(size + 1), size };
    if (size > 0) memcpy(bytes.data, data, size);
    TensorFile file;
    Error error;
    if (tensors_parse(bytes, "fuzz", &file, &error) != 0) return 0;
    for (int i = 0; i < file.tensor_count; i++) {
        const TensorEntry *entry = &file.tensors[i];
        if (tensors_find(&file, entry->name) != entry) abort();
        real *values = malloc((entry->count + 1) * sizeof *values);
        tensors_copy(entry, "fuzz", entry->rank, entry->shape, values, &error);
        free(values);
    }
    for (int i = 0; i < file.metadata_count; i++) {
        if (tensors_metadata(&file, file.metadata[2 * i]) != file.metadata[2 * i + 1]) abort();
    }
    tensors_free(&file);
    return 0;
}
