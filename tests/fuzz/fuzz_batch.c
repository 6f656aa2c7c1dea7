/* fuzz_batch.c - libFuzzer: any bytes as a batch of `grad` and as a checkpoint, with and without a finite T.
 */

#include "program.h"

#define GOLDEN "tests/golden/vdm-flat-v"
#define FINITE "tests/golden/nt-flat-eps-T10"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char file[PATH], out[PATH], command[4 * PATH];
    place("file", file);
    place("out", out);
    write_bytes(file, data, size);
    unlink(out);
    snprintf(command, sizeof command, "grad " GOLDEN ".checkpoint.safetensors --batch %s --out %s", file,
             out);
    const int status = program(command);
    if ((status == 0) != (access(out, F_OK) == 0))   /* a result, or a message and no file */
        abort();
    snprintf(command, sizeof command, "grad " FINITE ".checkpoint.safetensors --batch %s --out %s", file,
             out);
    program(command);
    snprintf(command, sizeof command, "grad %s --batch " GOLDEN ".batch.safetensors --out %s", file, out);
    program(command);
    snprintf(command, sizeof command, "eval %s --data %s.none", file, file);   /* reads the other weights */
    program(command);
    return 0;
}
