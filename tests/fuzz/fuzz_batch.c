/* fuzz_batch.c - libFuzzer: any bytes as a safetensors file: a batch of `grad`, a checkpoint. */

#define main diffenc_main
#include "main.c"   /* NOLINT(bugprone-suspicious-include): what is to be fuzzed is static there */
#undef main

int check_main(int argc, char **argv) { return argc + !argv; }
int bench_main(int argc, char **argv) { return argc + !argv; }

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    const Bytes bytes = {malloc(size), size};   /* a copy of this size exactly: the parser writes to it */
    TensorFile file;
    Settings settings;
    Model model;
    uint64_t step;
    size_t weights;
    Error error;
    memcpy(bytes.data, data, size);
    if (tensors_parse(bytes, "fuzz", &file, &error))
        return 0;

    Config config = config_default();
    config.height = config.width = 8;   /* as most of tests/golden */
    for (config.timesteps = 0; config.timesteps <= 8; config.timesteps += 8) {
        GivenBatch batch = {.model = NULL};
        batch_take(&file, "fuzz", &config, &batch, &error);
        batch_free(&batch);
    }

    /* The rest of checkpoint_read. */
    if (settings_read(&file, "fuzz", &settings, &step, &error) == 0 &&
        model_size(&settings.config, &weights, &error) == 0 && weights <= size / sizeof(float) &&
        model_new(&model, &settings.config, settings.seed, &error) == 0) {
        for (Load load = LOAD_PARAMS; load <= LOAD_ALL; load++)
            checkpoint_load(&file, "fuzz", load, &model, &error);
        model_free(&model);
    }
    tensors_free(&file);
    return 0;
}
