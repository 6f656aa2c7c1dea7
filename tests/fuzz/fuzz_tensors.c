/* fuzz_tensors.c - libFuzzer: any bytes as a safetensors file. What is accepted is read to its last byte. */

#include "diffenc.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const Bytes bytes = {malloc(size), size};   /* a copy of this size exactly: the parser writes to it */
    TensorFile file;
    Error error;
    memcpy(bytes.data, data, size);
    if (tensors_parse(bytes, "fuzz", &file, &error))
        return 0;
    for (int i = 0; i < file.tensor_count; i++) {
        const TensorEntry *entry = &file.tensors[i];
        real *values = malloc(entry->count * sizeof *values);
        if (tensors_find(&file, entry->name) != entry)
            abort();
        tensors_copy(entry, "fuzz", entry->rank, entry->shape, values, &error);
        free(values);
    }
    for (int i = 0; i < file.metadata_count; i++)
        if (tensors_metadata(&file, file.metadata[2 * i]) != file.metadata[2 * i + 1])
            abort();
    tensors_free(&file);
    return 0;
}
