/* fuzz_log.c - libFuzzer: any bytes as the log of a training of two steps that goes on. A log that is refused
 * stays as it is; one that is taken loses no line up to the checkpoint's. */

#include "program.h"

#define GOLDEN "tests/golden/vdm-flat-v"

static long read_bytes(const char *path, char *bytes, size_t size) {
    FILE *stream = fopen(path, "rb");
    const long got = stream ? (long)fread(bytes, 1, size, stream) : -1;
    if (stream)
        fclose(stream);
    return got;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static char after[1 << 16], initial[1 << 20];
    static long checkpoint_size;
    char file[PATH], directory[PATH], command[4 * PATH];
    place("", directory);
    place("data", file);
    if (checkpoint_size == 0) {   /* two steps on images of 8 by 8, once */
        unsigned char idx[16 + 4 * 64] = {0, 0, 8, 3, 0, 0, 0, 4, 0, 0, 0, 8, 0, 0, 0, 8};
        mkdir(file, 0700);
        place("data/train-images-idx3-ubyte", file);
        write_bytes(file, idx, sizeof idx);
        place("run", file);
        snprintf(command, sizeof command,
                 "train --data %sdata --model vdm-1 --channels 4 --batch 1 --steps 2 --sample-steps 0"
                 " --threads 1 --out %s", directory, file);
        if (program(command) != 0)
            abort();
        place("run/checkpoint.safetensors", file);
        checkpoint_size = read_bytes(file, initial, sizeof initial);
    }
    place("run/log.csv", file);
    write_bytes(file, data, size);
    snprintf(command, sizeof command, "train --resume --steps 2 --sample-steps 0 --threads 1 --out %srun",
             directory);
    const int status = program(command);
    const long kept = read_bytes(file, after, sizeof after);
    if (kept < 0 || (status != 0 && kept != (long)size))
        abort();
    if (size > 0 && memcmp(after, data, (size_t)kept < size ? (size_t)kept : size) != 0)
        abort();
    return 0;
}
