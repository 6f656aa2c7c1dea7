/* test.h - the least a test program needs: CHECK counts, test_report tells and gives the exit status; and the
 * helpers that several of them use. */

#ifndef TEST_H
#define TEST_H

#include "derivatives.h"

#include <float.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* 1 where a sanitizer needs memory and time of its own. */
#if defined __has_feature
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED 1
#endif
#endif
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
#define SANITIZED 1
#endif
#ifndef SANITIZED
#define SANITIZED 0
#endif

static int test_passed, test_failed;

/* Count one check; when `condition` does not hold, print where and the message, which is a printf format. */
#define CHECK(condition, ...) test_check((condition) ? 1 : 0, __FILE__, __LINE__, __VA_ARGS__)

static void test_check(int holds, const char *file, int line, const char *format, ...) {
    va_list arguments;
    if (holds) {
        test_passed++;
        return;
    }
    test_failed++;
    if (test_failed > 50)
        return;   /* the first ones tell the most */
    printf("%s:%d: ", file, line);
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
}

/* "test_data: 123 passed, 0 failed", with the name of the file that calls. Returns the exit status. */
#define test_report() test_report_of(__FILE__)

static int test_report_of(const char *file) {
    const char *slash = strrchr(file, '/'), *name = slash != NULL ? slash + 1 : file;
    printf("%.*s: %d passed, %d failed\n", (int)strcspn(name, "."), name, test_passed, test_failed);
    return test_failed > 0;
}

/* ---- numbers ---- */

/* The relative spacing of `real`, in which tolerances are counted. */
static const double EPS = sizeof(real) == sizeof(float) ? FLT_EPSILON : DBL_EPSILON;

/* The worst so far of |got - want| / tolerance; what is not a number is infinitely bad. */
static inline double worse(double worst, double got, double want, double tolerance) {
    const double ratio = got == want ? 0 : fabs(got - want) / tolerance;
    return ratio <= worst ? worst : ratio >= 0 ? ratio : INFINITY;
}

/* Normal numbers; each `example` has its own. */
static inline void fill_normal(real *x, size_t count, uint32_t example, double mean, double deviation) {
    random_normal(random_stream(7, RANDOM_CHECK, 1, example), x, count);
    for (size_t i = 0; i < count; i++)
        x[i] = (real)(mean + deviation * (double)x[i]);
}

/* ---- files ---- */

static inline void write_file(const char *path, const void *data, size_t size) {
    FILE *stream = fopen(path, "wb");
    const int written = stream && fwrite(data, 1, size, stream) == size && fclose(stream) == 0;
    CHECK(written, "%s: cannot be written", path);
}

/* ---- models ---- */

/* A small model: `name` as "diffenc-1-1", as many channels in both networks. */
static inline Config small_model(const char *name, NetKind net, int channels, int height, int width,
                                 int image_channels) {
    Config c = config_default();
    Error error = {""};
    CHECK(config_parse_model(&c, name, &error) == 0, "%s", error.text);
    c.net = net;
    c.channels = c.encoder_channels = channels;
    c.height = height, c.width = width, c.image_channels = image_channels;
    return c;
}

/* There is nothing to test if there is no model. */
static inline void model_make(Model *model, Config config, uint64_t seed) {
    Error error = {""};
    const int status = model_new(model, &config, seed, &error);
    CHECK(status == 0, "model_new: %s", error.text);
    if (status)
        exit(test_report());
}

/* Random numbers for all weights, also where a model starts at zero, of a size that keeps values near 1. */
static inline void fill_weights(Model *m) {
    for (int i = 0; i < m->parameter_count; i++) {
        const Parameter *p = &m->parameter[i];
        fill_normal(m->params + p->offset, p->count, (uint32_t)(1000 + i), p->initial == INIT_ONE,
                    p->rank > 1 ? 1 / sqrt((double)p->taps * p->in) : 0.3);
    }
}

static inline const Parameter *parameter_named(const Model *model, const char *name) {
    for (int i = 0; i < model->parameter_count; i++)
        if (strcmp(model->parameter[i].name, name) == 0)
            return &model->parameter[i];
    return NULL;
}

/* A model, its workers, and the network of the first of them. */
typedef struct { Model model; Workers workers; Network *network; } Lab;

static inline void lab_new(Lab *lab, Config config, int threads) {
    model_make(&lab->model, config, 3);
    workers_new(&lab->workers, &lab->model, threads);
    lab->network = &lab->workers.network[0];
}

static inline void lab_free(Lab *lab) {
    workers_free(&lab->workers);
    model_free(&lab->model);
}

#endif
