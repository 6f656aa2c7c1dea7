/* test_tensor.c - every function of tensor.c against the plainest loop that says the same, in double, or in
 * long double where cancellation would make double no better than what is tested.
 *
 * Tolerances. EPS is the distance from 1 to the next real, twice the largest relative error of one rounding.
 * A sum of n products is then within n EPS times the sum of their magnitudes, twice the textbook bound, which
 * leaves room for the rounding of the loop in double when real is double itself. Where another tolerance is
 * used, the reason stands beside it. Statistics of random numbers lie within 5 standard errors: the seeds are
 * fixed, so that a test which passes once passes always. */

#define _POSIX_C_SOURCE 200809L

#include "test.h"

#include <sys/wait.h>
#include <unistd.h>

static const double STANDARD_ERRORS = 5;

static Arena *lent;   /* scratch memory of the loops */

static RandomStream check_stream(uint32_t example) { return random_stream(2023, RANDOM_CHECK, 0, example); }

/* count numbers, normal with the given mean and standard deviation, in memory of exactly that size, so that a
 * sanitizer notices one read too far. */
static real *normals(size_t count, uint32_t example, double mean, double deviation) {
    real *x = allocate(count, sizeof(real));
    random_normal(check_stream(example), x, count);
    for (size_t i = 0; i < count; i++)
        x[i] = (real)(mean + deviation * (double)x[i]);
    return x;
}

static real *copy_of(const real *x, size_t count) {
    return memcpy(allocate(count, sizeof(real)), x, count * sizeof(real));
}

static double sigmoid(double u) { return 1 / (1 + exp(-u)); }

/* ---- errors and memory ---- */

static void test_fail(void) {
    Error error;
    CHECK(fail(&error, "%s: holds %d of %d bytes", "file", 3, 7) == -1, "fail returns -1");
    CHECK(strcmp(error.text, "file: holds 3 of 7 bytes") == 0, "message is '%s'", error.text);
    CHECK(fail(&error, "%0600d", 1) == -1 && strlen(error.text) == sizeof error.text - 1,
          "a long message is cut off");
    fail(&error, "%s: gone", "a\x1b]0;b\xff");
    CHECK(strcmp(error.text, "a\\x1b]0;b\\xff: gone") == 0, "%s", error.text);
}

/* What commands a terminal or is not UTF-8 is escaped; the rest is shown as it is. */
static void test_printable(void) {
    static const char *const texts[][2] = {
        { "caf\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80 \\", "caf\xc3\xa9 \xe2\x82\xac \xf0\x9f\x98\x80 \\" },
        { "\x1b[2J\r\n\t\x7f", "\\x1b[2J\\x0d\\x0a\\x09\\x7f" },
        { "\xc2\x9b" "2J", "\\xc2\\x9b2J" },           /* a control character of two bytes */
        { "lat\xfcn \xc3", "lat\\xfcn \\xc3" },        /* Latin-1; the end of a character is missing */
        { "\xe0\x80\xaf\xc0\xaf\xed\xa0\x80\xf4\x90\x80\x80",
          "\\xe0\\x80\\xaf\\xc0\\xaf\\xed\\xa0\\x80\\xf4\\x90\\x80\\x80" },
        { "", "" },
    };
    char buffer[64];
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++)
        CHECK(strcmp(printable(texts[i][0], buffer, sizeof buffer), texts[i][1]) == 0, "%s", buffer);
    for (size_t size = 1; size < 12; size++) {           /* no escape and no character is cut in two */
        printable("ab\xc3\xa9\x1b", buffer, size);
        CHECK(strlen(buffer) == (size < 3 ? size - 1 : size < 5 ? 2 : size < 9 ? 4 : 8), "%s", buffer);
    }
}

/* The exit status of a process that asks for count * size bytes. */
static int status_of_allocation(void *(*function)(size_t, size_t), size_t count, size_t size) {
    int status = -1;
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
        if (!freopen("/dev/null", "w", stderr))
            _exit(2);
        function(count, size);
        _exit(0);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status),
          "the process ends by itself");
    return WEXITSTATUS(status);
}

static void test_allocate(void) {
    char *zeros = allocate_zeroed(1000, 3);
    int sum = 0;
    for (int i = 0; i < 3000; i++)
        sum |= zeros[i];
    CHECK(sum == 0, "allocate_zeroed gives zeros");
    free(zeros);
    void *nothing = allocate(0, 8), *none = allocate_zeroed(0, 0);
    CHECK(nothing && none, "no elements: still a pointer");
    free(nothing), free(none);
    CHECK(status_of_allocation(allocate, SIZE_MAX / 4, 16) == 1, "a size that overflows exits with 1");
    CHECK(status_of_allocation(allocate, SIZE_MAX / 2, 2) == 1, "so does more than the address space");
    CHECK(status_of_allocation(allocate_zeroed, SIZE_MAX / 4, 16) == 1, "allocate_zeroed: the same");
}

/* One pass over an arena: `count` requests, from nothing to some megabytes; every byte is written. */
static void arena_pass(Arena *arena, int count, char **memory, size_t *size) {
    for (int i = 0; i < count; i++) {
        size[i] = i % 29 == 28 ? (size_t)1500000 : random_bits(check_stream(1), (uint32_t)i) % 5000;
        memory[i] = arena_allocate(arena, size[i], 1);
        memset(memory[i], i % 251, size[i]);
    }
}

static void test_arena(void) {
    enum { COUNT = 200 };
    Arena *arena = arena_new();
    char *first[COUNT], *second[COUNT];
    size_t size[COUNT];
    CHECK(arena_capacity(arena) == 0, "a new arena holds nothing");
    const ArenaMark empty = arena_mark(arena);
    arena_pass(arena, COUNT, first, size);
    int aligned = 1, intact = 1;
    for (int i = 0; i < COUNT; i++) {
        aligned &= (uintptr_t)first[i] % 64 == 0;
        for (size_t j = 0; j < size[i]; j++)
            intact &= first[i][j] == (char)(i % 251);
    }
    CHECK(aligned, "memory begins at multiples of 64");
    CHECK(intact, "no two pieces of memory overlap");

    const size_t capacity = arena_capacity(arena);
    for (int pass = 0; pass < 3; pass++) {
        if (pass == 1)
            arena_release(arena, empty);
        else
            arena_reset(arena);
        arena_pass(arena, COUNT, second, size);
        CHECK(memcmp(first, second, sizeof first) == 0 && arena_capacity(arena) == capacity,
              "the same requests find the same memory");
    }

    /* Marks nest, also when several blocks lie between them. */
    arena_reset(arena);
    char *outer = arena_allocate(arena, 100, 1);
    const ArenaMark mark = arena_mark(arena);
    memset(outer, 7, 100);
    for (int pass = 0; pass < 3; pass++) {
        arena_pass(arena, COUNT, second, size);
        CHECK(pass == 0 || memcmp(first, second, sizeof first) == 0, "released memory is handed out again");
        memcpy(first, second, sizeof first);
        arena_release(arena, mark);
    }
    CHECK(outer[0] == 7 && outer[99] == 7, "what lies before a mark stays");
    CHECK(arena_allocate(arena, 7, sizeof(real)) == (void *)first[0], "7 elements begin where 1 would");
    arena_free(arena), arena_free(NULL);
}

/* ---- random numbers ---- */

static void test_philox(void) {
    /* Random123, kat_vectors, "philox4x32 10": counter, key, result. The counter is (position / 4, example,
     * step, purpose), the key is the seed. */
    static const uint32_t known[2][10] = {
        {0, 0, 0, 0, 0, 0, 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
        {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344, 0xa4093822, 0x299f31d0,
         0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}};
    for (int i = 0; i < 2; i++)
        for (uint32_t j = 0; j < 4; j++) {
            const uint32_t *k = known[i];
            const RandomStream s = {k[4] | (uint64_t)k[5] << 32, k[3], k[2], k[1]};
            const uint32_t bits = random_bits(s, 4 * k[0] + j);
            CHECK(bits == k[6 + j], "known answer %d, word %u: %08x", i, (unsigned)j, (unsigned)bits);
        }
}

static void test_random_positions(void) {
    const RandomStream s = random_stream(0x123456789abcdefu, RANDOM_NOISE, 77, 5);
    CHECK(s.seed == 0x123456789abcdefu && s.purpose == RANDOM_NOISE && s.step == 77 && s.example == 5,
          "a stream is named by seed, purpose, step, example");
    int uniform_of_bits = 1, in_range = 1;
    for (uint32_t p = 0; p < 1000; p++) {
        const uint64_t high = random_bits(s, 2 * p), low = random_bits(s, 2 * p + 1);
        const double want = (double)((high << 32 | low) >> 11) / 9007199254740992.0;
        uniform_of_bits &= random_uniform(s, p) == want;
        in_range &= want >= 0 && want < 1;
    }
    CHECK(uniform_of_bits, "uniform number p is made of bits 2p and 2p+1");
    CHECK(in_range, "uniform numbers lie in [0, 1)");
    real all[100], few[100];
    random_normal(s, all, 100);
    for (size_t count = 0; count <= 9; count++) {
        few[count] = 42;
        random_normal(s, few, count);
        CHECK(memcmp(few, all, count * sizeof(real)) == 0 && few[count] == 42,
              "%zu normal numbers are the first ones", count);
    }
}

static void test_uniform_moments(void) {
    enum { COUNT = 200000, BINS = 256 };
    static int bin[BINS];
    double sum = 0, square = 0, chi_squared = 0;
    for (uint32_t i = 0; i < COUNT; i++) {
        const double u = random_uniform(check_stream(2), i);
        sum += u - 0.5;
        square += (u - 0.5) * (u - 0.5) - 1.0 / 12;
        bin[(int)(u * BINS)]++;
    }
    for (int b = 0; b < BINS; b++)
        chi_squared += pow(bin[b] - (double)COUNT / BINS, 2) / ((double)COUNT / BINS);
    CHECK(fabs(sum) < STANDARD_ERRORS * sqrt(COUNT / 12.0), "mean of uniform numbers: %g", sum / COUNT);
    /* The variance of (u - 1/2)^2 is 1/80 - 1/144 = 1/180. */
    CHECK(fabs(square) < STANDARD_ERRORS * sqrt(COUNT / 180.0), "variance of uniform numbers: %g",
          square / COUNT);
    CHECK(fabs(chi_squared - (BINS - 1)) < STANDARD_ERRORS * sqrt(2.0 * (BINS - 1)),
          "chi squared %g of %d bins", chi_squared, BINS);
}

static void test_normal_moments(void) {
    enum { COUNT = 200000, BINS = 64 };
    real *x = normals(COUNT, 3, 0, 1);
    static int bin[BINS];
    /* E x^k of a standard normal and the variance of x^k, k = 1..4. */
    static const double moment[5] = {1, 0, 1, 0, 3}, variance[5] = {0, 1, 2, 15, 96};
    for (int k = 1; k <= 4; k++) {
        double sum = 0;
        for (size_t i = 0; i < COUNT; i++)
            sum += pow((double)x[i], k) - moment[k];
        CHECK(fabs(sum) < STANDARD_ERRORS * sqrt(COUNT * variance[k]), "E x^%d = %g", k,
              sum / COUNT + moment[k]);
    }
    double neighbours = 0, chi_squared = 0;   /* cosine and sine of a pair, and one pair and the next */
    for (size_t i = 0; i + 1 < COUNT; i++)
        neighbours += (double)x[i] * (double)x[i + 1];
    CHECK(fabs(neighbours) < STANDARD_ERRORS * sqrt(COUNT), "neighbours correlate: %g", neighbours / COUNT);
    for (size_t i = 0; i < COUNT; i++)
        bin[(int)(BINS * 0.5 * erfc(-(double)x[i] / sqrt(2)))]++;
    for (int b = 0; b < BINS; b++)
        chi_squared += pow(bin[b] - (double)COUNT / BINS, 2) / ((double)COUNT / BINS);
    CHECK(fabs(chi_squared - (BINS - 1)) < STANDARD_ERRORS * sqrt(2.0 * (BINS - 1)),
          "chi squared %g of %d bins", chi_squared, BINS);
    free(x);
}

/* Streams that differ in one of the four names have nothing to do with each other. */
static void test_streams_independent(void) {
    enum { COUNT = 50000, STREAMS = 7 };
    const RandomStream stream[STREAMS] = {
        random_stream(1, RANDOM_NOISE, 2, 3), random_stream(2, RANDOM_NOISE, 2, 3),
        random_stream(1 + ((uint64_t)1 << 32), RANDOM_NOISE, 2, 3), random_stream(1, RANDOM_NOISE_0, 2, 3),
        random_stream(1, RANDOM_NOISE, 3, 3), random_stream(1, RANDOM_NOISE, 2, 4),
        random_stream(1, RANDOM_NOISE, 3, 2)};
    real *x[STREAMS];
    for (int s = 0; s < STREAMS; s++) {
        x[s] = allocate(COUNT, sizeof(real));
        random_normal(stream[s], x[s], COUNT);
        for (int r = 0; r < s; r++)
            CHECK(fabs(dot(x[r], x[s], COUNT)) < STANDARD_ERRORS * sqrt(COUNT),
                  "streams %d and %d correlate: %g", r, s, dot(x[r], x[s], COUNT) / COUNT);
    }
    for (int s = 0; s < STREAMS; s++)
        free(x[s]);
}

static void test_dropout(void) {
    enum { COUNT = 100000, LAGS = 2 * DROPOUT_RUN };
    static const double rates[5] = {0, 0.1, 0.25, 0.5, 0.9};
    real *factor = allocate(COUNT, sizeof(real)), *part = allocate(COUNT, sizeof(real));
    for (int r = 0; r < 5; r++) {
        const double p = floor(rates[r] * 65536 + 0.5) / 65536;
        int dropped = 0, known = 1;
        double worst = 0;
        random_dropout(check_stream(4), 0, COUNT, rates[r], factor);
        for (int i = 0; i < COUNT; i++) {
            dropped += factor[i] == 0;
            known &= factor[i] == 0 || factor[i] == (real)(1 / (1 - p));
        }
        CHECK(known, "rate %g: factors are 0 or 1/(1-p)", rates[r]);
        CHECK(fabs(dropped - p * COUNT) <= STANDARD_ERRORS * sqrt(p * (1 - p) * COUNT),
              "rate %g: %g are dropped", rates[r], (double)dropped / COUNT);
        for (int lag = 1; lag <= LAGS; lag++) {   /* sum of (drop[i] - p)(drop[i - lag] - p) */
            int both = 0, either = 0;
            for (int i = lag; i < COUNT; i++) {
                both += (factor[i] == 0) & (factor[i - lag] == 0);
                either += (factor[i] == 0) + (factor[i - lag] == 0);
            }
            worst = fmax(worst, fabs(both - p * either + p * p * (COUNT - lag)));
        }
        CHECK(worst <= STANDARD_ERRORS * p * (1 - p) * sqrt(COUNT), "rate %g: factors correlate", rates[r]);
        static const int counts[8] = {1, 7, 8, 100, 127, 128, 129, 5000};
        for (int c = 0; c < 8; c++) {
            part[counts[c]] = 42;
            random_dropout(check_stream(4), 0, (size_t)counts[c], rates[r], part);
            CHECK(memcmp(part, factor, counts[c] * sizeof(real)) == 0 && part[counts[c]] == 42,
                  "rate %g: the first %d factors depend on how many are made", rates[r], counts[c]);
        }
        for (int first = DROPOUT_RUN; first < 5 * DROPOUT_RUN; first += DROPOUT_RUN) {
            random_dropout(check_stream(4), (uint32_t)first, 300, rates[r], part);
            CHECK(memcmp(part, factor + first, 300 * sizeof(real)) == 0, "rate %g: factors from position %d",
                  rates[r], first);
        }
    }
    random_dropout(check_stream(4), 0, COUNT, 0.5, factor);
    random_dropout(check_stream(5), 0, COUNT, 0.5, part);
    const double together = dot(factor, part, COUNT);
    CHECK(fabs(together - COUNT) < STANDARD_ERRORS * sqrt(3.0 * COUNT), "two masks correlate");
    free(factor), free(part);
}

/* ---- products and convolutions ---- */

typedef enum { PLAIN, FAST, PRODUCT } Way;

static void convolve_by(Way way, int h, int w, int in, int out, const real *x, const real *kernel,
                        const real *bias, const real *start, real *y) {
    if (way == PRODUCT)
        matrix_product(h * w, in, out, x, kernel, bias, start, y, lent);
    else
        (way == FAST ? convolve3x3_fast : convolve3x3)(h, w, in, out, x, kernel, bias, start, y, lent);
}

/* got against want + start + bias (channels of them), each of which may be NULL. */
static double sum_error(const real *got, const double *want, const double *size, size_t count, double terms,
                        const real *start, const real *bias, int channels) {
    double worst = 0;
    for (size_t i = 0; i < count; i++) {
        const double s = start ? (double)start[i] : 0, b = bias ? (double)bias[i % channels] : 0;
        worst = worse(worst, got[i], want[i] + s + b, (terms + 2) * EPS * (size[i] + fabs(s) + fabs(b)));
    }
    return worst;
}

/* A convolution [h, w, in] -> [h, w, out] and its gradients against naive loops, which also add up the
 * magnitudes of their terms. The plain sums; minimal filtering, which has to keep within the same bound; or
 * with a kernel of one tap the product of matrices [h w, in] and [in, out]. */
static void check_convolution(Way way, int h, int w, int in, int out, int variant) {
    const int taps = way == PRODUCT ? 1 : 9, reach = taps / 9;
    const size_t x_count = (size_t)h * w * in, y_count = (size_t)h * w * out;
    const size_t kernel_count = (size_t)taps * in * out;
    real *x = normals(x_count, 40, 0, 1), *kernel = normals(kernel_count, 41, 0, 1),
         *bias = normals((size_t)out, 42, 0, 1), *dy = normals(y_count, 43, 0, 1);
    double *sums = allocate_zeroed(2 * (x_count + y_count + kernel_count), sizeof(double)), *sum_y = sums,
           *sum_dx = sum_y + y_count, *sum_dkernel = sum_dx + x_count, *size_y = sum_dkernel + kernel_count,
           *size_dx = size_y + y_count, *size_dkernel = size_dx + x_count;
    for (int i = 0; i < taps * h * w; i++) {
        const int tap = i % taps, at = i / taps, row = at / w + tap / 3 - reach,
                  column = at % w + tap % 3 - reach;
        for (int k = 0; k < in && row >= 0 && row < h && column >= 0 && column < w; k++)
            for (int o = 0; o < out; o++) {
                const size_t at_x = ((size_t)row * w + column) * in + k, at_y = (size_t)at * out + o,
                             at_kernel = ((size_t)tap * in + k) * out + o;
                const double xv = x[at_x], kv = kernel[at_kernel], dv = dy[at_y];
                sum_y[at_y] += xv * kv, size_y[at_y] += fabs(xv * kv);
                sum_dx[at_x] += dv * kv, size_dx[at_x] += fabs(dv * kv);
                sum_dkernel[at_kernel] += dv * xv, size_dkernel[at_kernel] += fabs(dv * xv);
            }
    }
    real *y = normals(y_count, 44, 0, 1), *y_start = copy_of(y, y_count), *dx = normals(x_count, 45, 0, 1),
         *dx_start = copy_of(dx, x_count), *transposed = allocate(kernel_count, sizeof(real)),
         *dkernel = normals(kernel_count, 46, 0, 1), *dkernel_start = copy_of(dkernel, kernel_count);
    const real *with_bias = variant % 2 ? bias : NULL;
    const int start = variant / 2 % 3;   /* none, elsewhere, in place */
    convolve_by(way, h, w, in, out, x, kernel, with_bias, start == 0 ? NULL : start == 1 ? y_start : y, y);
    double worst = sum_error(y, sum_y, size_y, y_count, taps * in, start ? y_start : NULL, with_bias, out);
    CHECK(worst <= 1, "way %d, %dx%d, %d -> %d: %.3g tolerances", way, h, w, in, out, worst);
    transpose_kernel(taps, in, out, kernel, transposed);
    convolve_by(way, h, w, out, in, dy, transposed, NULL, start ? dx : NULL, dx);
    worst = sum_error(dx, sum_dx, size_dx, x_count, taps * out, start ? dx_start : NULL, NULL, 1);
    CHECK(worst <= 1, "way %d by its input, %dx%d, %d -> %d: %.3g tolerances", way, h, w, in, out, worst);
    if (way == PRODUCT)
        matrix_product_transposed(h * w, in, out, x, dy, dkernel, lent);
    else
        (way == FAST ? convolve3x3_by_kernel_fast : convolve3x3_by_kernel)(h, w, in, out, x, dy, dkernel,
                                                                           lent);
    worst = sum_error(dkernel, sum_dkernel, size_dkernel, kernel_count, h * w, dkernel_start, NULL, 1);
    CHECK(worst <= 1, "way %d by its kernel, %dx%d, %d -> %d: %.3g tolerances", way, h, w, in, out, worst);
    free(x), free(kernel), free(bias), free(dy), free(sums), free(y), free(y_start);
    free(dx), free(dx_start), free(transposed), free(dkernel), free(dkernel_start);
}

static void test_products(void) {
    int variant = 0;
    for (int rows = 1; rows <= 25; rows++)   /* every height and width of a block */
        for (int columns = 1; columns <= 70; columns++, variant++)
            check_convolution(PRODUCT, rows, 1, 1 + variant % 11, columns, variant);
    static const int sizes[6] = {1, 3, 16, 26, 33, 65};
    for (int shape = 0; shape < 6 * 6 * 6; shape++)
        check_convolution(PRODUCT, sizes[shape / 36], 1, sizes[shape / 6 % 6], sizes[shape % 6], shape);
    check_convolution(PRODUCT, 97, 1, 1200, 130, 3);   /* long sums and large matrices */
    check_convolution(PRODUCT, 28, 28, 50, 784, 4);
}

static void test_convolution(void) {
    static const int heights[4] = {1, 2, 3, 9}, widths[4] = {1, 2, 4, 7}, ins[7] = {1, 2, 3, 5, 16, 17, 37};
    static const int outs[8] = {1, 3, 8, 16, 31, 32, 33, 70};
    int variant = 0;
    for (int shape = 0; shape < 4 * 4 * 7 * 8; shape++)
        check_convolution(PLAIN, heights[shape / 224], widths[shape / 56 % 4], ins[shape / 8 % 7],
                          outs[shape % 8], variant++);
    check_convolution(PLAIN, 28, 28, 32, 32, 1);
    check_convolution(PLAIN, 28, 28, 1, 16, 3);
    check_convolution(PLAIN, 14, 14, 64, 32, 5);

    /* Whole tiles and parts of them, whole vectors and parts of them, images of one line of tiles and of
     * many, and below the sizes from which on filtering pays. */
    static const int sides[5][2] = {{14, 14}, {15, 21}, {4, 200}, {61, 17}, {12, 13}};
    static const int channels[5][2] = {{16, 16}, {32, 48}, {17, 33}, {20, 16}, {15, 16}};
    for (int s = 0; s < 5; s++)
        for (int c = 0; c < 5; c++)
            check_convolution(FAST, sides[s][0], sides[s][1], channels[c][0], channels[c][1], variant++);
    check_convolution(FAST, 28, 28, 32, 32, 1);
}

/* ---- group normalisation ---- */

/* A case, and what the formulas say of it in double. Arrays [positions, channels]; scale, bias [channels]. Of
 * y the gradients are by dy; of y_dot, those with _t, by dy as dy_dot. */
enum { Y, Y_DOT, DX, DX_T, DX_DOT_T, DX_T_ALONE, DX_DOT_T_ALONE, DSCALE, DBIAS, DSCALE_T, DBIAS_T, RESULTS };
typedef struct {
    GroupNorm n;
    size_t count;
    real *x, *x_dot, *dy, *scale, *bias, *factor;
    double *want[RESULTS];
    double condition;   /* 1 + |mean| / deviation, the largest: what a rounding of x does to xhat */
} NormCase;

/* swish, its slope and its curvature at u; without swish those of the identity. */
typedef struct { double value, slope, curve; } Swish;

static Swish swish_of(int on, double u) {
    const double s = sigmoid(u);
    const double ds = s * (1 - s);
    const Swish identity = {u, 1, 0}, full = {u * s, s + u * ds, 2 * ds + u * ds * (1 - 2 * s)};
    return on ? full : identity;
}

/* The elements of one group as a list of `size` indices into the arrays. */
static int group_members(const GroupNorm *n, int group, size_t *member) {
    const int width = n->channels / n->groups;
    int size = 0;
    for (int i = 0; i < n->positions; i++)
        for (int c = group * width; c < (group + 1) * width; c++)
            member[size++] = (size_t)i * n->channels + c;
    return size;
}

static long double mean_over(const double *a, const double *b, int size) {
    long double sum = 0;
    for (int i = 0; i < size; i++)
        sum += (long double)a[i] * (b ? b[i] : 1);
    return sum / size;
}

/* One group, step by step forward, each step with its reverse:
 *     c = x - mean(x), r = (mean(c^2) + 1e-6)^(-1/2), y = factor f(scale r c + bias), f = swish
 *     c_dot = x_dot - mean(x_dot), q = mean(c c_dot), xhat_dot = r c_dot - r^3 c q
 *     y_dot = factor f'(scale r c + bias) scale xhat_dot */
static void norm_group(NormCase *t, const size_t *member, int size) {
    enum { X, C, C_DOT, XHAT_DOT, BAR_N, BAR_N_T, BAR_C, ARRAYS };
    double *memory = allocate_zeroed((size_t)ARRAYS * size, sizeof(double)), *a[ARRAYS];
    const int channels = t->n.channels;
    for (int i = 0; i < ARRAYS; i++)
        a[i] = memory + (size_t)i * size;
    for (int i = 0; i < size; i++)
        a[X][i] = t->x[member[i]], a[C_DOT][i] = t->x_dot[member[i]];
    const long double mean = mean_over(a[X], NULL, size), mean_dot = mean_over(a[C_DOT], NULL, size);
    for (int i = 0; i < size; i++)
        a[C][i] = (double)(a[X][i] - mean), a[C_DOT][i] = (double)(a[C_DOT][i] - mean_dot);
    const double r = 1 / sqrt((double)mean_over(a[C], a[C], size) + 1e-6),
                 q = (double)mean_over(a[C], a[C_DOT], size);
    t->condition = fmax(t->condition, 1 + fabs((double)mean) * r);

    for (int i = 0; i < size; i++) {
        const size_t at = member[i];
        const double scale = t->scale[at % channels];
        const double factor = t->n.dropout_factor ? (double)t->factor[at] : 1;
        const double dy = factor * (double)t->dy[at];
        const Swish f = swish_of(t->n.swish, scale * r * a[C][i] + (double)t->bias[at % channels]);
        a[XHAT_DOT][i] = r * a[C_DOT][i] - r * r * r * a[C][i] * q;
        t->want[Y][at] = factor * f.value;
        t->want[Y_DOT][at] = factor * f.slope * scale * a[XHAT_DOT][i];
        a[BAR_N][i] = dy * f.slope;
        a[BAR_N_T][i] = dy * f.curve * scale * a[XHAT_DOT][i];
        t->want[DSCALE][at % channels] += a[BAR_N][i] * r * a[C][i];
        t->want[DBIAS][at % channels] += a[BAR_N][i];
        t->want[DSCALE_T][at % channels] += dy * f.slope * a[XHAT_DOT][i] + a[BAR_N_T][i] * r * a[C][i];
        t->want[DBIAS_T][at % channels] += a[BAR_N_T][i];
    }
    for (int tangent = 0; tangent < 2; tangent++) {   /* back from n and, for the tangent, from xhat_dot */
        double *bar_n = a[tangent ? BAR_N_T : BAR_N], bar_r = 0, bar_q = 0;
        for (int i = 0; i < size; i++) {
            const double scale = t->scale[member[i] % channels], bar = tangent ? a[BAR_N][i] * scale : 0;
            bar_q -= r * r * r * bar * a[C][i];
            bar_r += bar_n[i] * scale * a[C][i] + bar * (a[C_DOT][i] - 3 * r * r * a[C][i] * q);
            a[BAR_C][i] = bar_n[i] * scale * r - r * r * r * q * bar;
        }
        for (int i = 0; i < size; i++)
            a[BAR_C][i] += bar_q * a[C_DOT][i] / size - r * r * r * bar_r * a[C][i] / size;
        const double mean_bar = (double)mean_over(a[BAR_C], NULL, size);
        for (int i = 0; i < size; i++)
            t->want[tangent ? DX_T : DX][member[i]] = a[BAR_C][i] - mean_bar;
    }
    free(memory);
}

/* x has this mean and deviation, but its first position lies `corner` further off. */
static NormCase norm_case(int positions, int channels, int groups, int swish, int with_dropout, double mean,
                          double deviation, double corner) {
    NormCase t = {.count = (size_t)positions * channels, .condition = 1};
    t.x = normals(t.count, 50, mean, deviation);
    for (int c = 0; c < channels; c++)
        t.x[c] += (real)corner;
    t.x_dot = normals(t.count, 51, 0.3, 1), t.dy = normals(t.count, 52, 0.2, 1);
    t.scale = normals((size_t)channels, 53, 1, 0.4), t.bias = normals((size_t)channels, 54, 0, 0.5);
    t.factor = allocate(t.count, sizeof(real));
    random_dropout(check_stream(55), 0, t.count, 0.25, t.factor);
    const GroupNorm n = {.positions = positions, .channels = channels, .groups = groups, .swish = swish,
                         .scale = t.scale, .bias = t.bias, .dropout_factor = with_dropout ? t.factor : NULL,
                         .mean = allocate((size_t)groups, sizeof(real)),
                         .rstd = allocate((size_t)groups, sizeof(real))};
    t.n = n;
    for (int i = 0; i < RESULTS; i++)
        t.want[i] = allocate_zeroed(t.count, sizeof(double));
    size_t *member = allocate(t.count, sizeof *member);
    for (int g = 0; g < groups; g++)
        norm_group(&t, member, group_members(&n, g, member));
    free(member);
    return t;
}

static void norm_free(NormCase *t) {
    free(t->n.mean), free(t->n.rstd);
    free(t->x), free(t->x_dot), free(t->dy), free(t->scale), free(t->bias), free(t->factor);
    for (int i = 0; i < RESULTS; i++)
        free(t->want[i]);
}

/* got, which was `before` (NULL: nothing), against want, in units of the tolerance: relative to the largest
 * element, because sums over the group mix all of them; EPS for each of a handful of roundings and for the
 * random walk of a sum over the positions, times the condition. */
static double norm_error(const NormCase *t, const real *got, const double *want, const real *before,
                         size_t count) {
    double largest = 0, worst = 0;
    for (size_t i = 0; i < count; i++)
        largest = fmax(largest, fmax(fabs(want[i]), before ? fabs((double)before[i]) : 0));
    for (size_t i = 0; i < count; i++)
        worst = worse(worst, got[i], want[i] + (before ? (double)before[i] : 0),
                      (4 + sqrt(t->n.positions)) * EPS * t->condition * largest);
    return worst;
}

/* What is written, and gradients, which are added to what is there; each of these may be absent, so that
 * those by x and x_dot are there a second time, alone. */
static void check_group_norm(int positions, int channels, int groups, int variant, double mean,
                             double deviation, double corner) {
    /* xhat_dot is J x_dot, the derivative of xhat by x, and symmetric: the gradient by x_dot is that of y. */
    static const int wanted[RESULTS] = {Y, Y_DOT, DX, DX_T, DX, DX_T, DX, DSCALE, DBIAS, DSCALE_T, DBIAS_T};
    static const char *const names[RESULTS] = {
        "y", "y_dot", "dx", "tangent's dx", "tangent's dx_dot", "tangent's dx alone",
        "tangent's dx_dot alone", "dscale", "dbias", "tangent's dscale", "tangent's dbias"};
    NormCase t = norm_case(positions, channels, groups, variant % 2, variant / 2 % 2, mean, deviation,
                           corner);
    real *before = normals(t.count, 57, 0, 0.1), *got[RESULTS];
    for (int i = 0; i < RESULTS; i++)
        got[i] = copy_of(before, i >= DSCALE ? (size_t)channels : t.count);
    group_norm(&t.n, t.x, got[Y], lent);
    group_norm_tangent(&t.n, t.x, t.x_dot, got[Y_DOT], lent);
    group_norm_backward(&t.n, t.x, t.dy, got[DX], NULL, got[DBIAS], lent);
    group_norm_backward(&t.n, t.x, t.dy, NULL, got[DSCALE], NULL, lent);
    group_norm_tangent_backward(&t.n, t.x, t.x_dot, t.dy, got[DX_T], got[DX_DOT_T], got[DSCALE_T],
                                got[DBIAS_T], lent);
    group_norm_tangent_backward(&t.n, t.x, t.x_dot, t.dy, got[DX_T_ALONE], NULL, NULL, NULL, lent);
    group_norm_tangent_backward(&t.n, t.x, t.x_dot, t.dy, NULL, got[DX_DOT_T_ALONE], NULL, NULL, lent);
    for (int i = 0; i < RESULTS; i++) {
        const double worst = norm_error(&t, got[i], t.want[wanted[i]], i <= Y_DOT ? NULL : before,
                                        i >= DSCALE ? (size_t)channels : t.count);
        CHECK(worst <= 1,
              "group norm, %s, %dx%d, %d groups, swish %d, dropout %d, mean %g, deviation %g, corner %g:"
              " %.3g tolerances", names[i], positions, channels, groups, t.n.swish,
              t.n.dropout_factor != NULL, mean, deviation, corner, worst);
        free(got[i]);
    }
    free(before);
    norm_free(&t);
}

static void test_group_norm(void) {
    static const int shapes[13][3] = {{1, 4, 1},    {1, 16, 4},   {2, 8, 2},     {5, 6, 2},   {6, 7, 7},
                                      {3, 5, 1},    {63, 36, 9},  {49, 128, 32}, {784, 8, 2}, {196, 24, 6},
                                      {784, 32, 8}, {784, 16, 4}, {100, 256, 32}};
    static const double means[3] = {0, 3, 100};
    for (int s = 0; s < 13; s++)
        for (int variant = 0; variant < 4; variant++)
            for (int m = 0; m < 3; m++)
                check_group_norm(shapes[s][0], shapes[s][1], shapes[s][2], variant, means[m], 1, 0);
    for (int variant = 0; variant < 4; variant++)
        for (int corner = -30; corner <= 30; corner += 60)
            check_group_norm(784, 16, 4, variant, 0.5, 1, corner);

    for (int m = 0; m < 3; m++)   /* all elements of a group equal: the deviation is taken as 1e-3 */
        check_group_norm(49, 8, 2, m, means[m], 0, 0);
}

/* ---- softmax ---- */

static void check_softmax(int rows, int columns, double spread) {
    const size_t count = (size_t)rows * columns;
    real *s = normals(count, 60, 0, spread), *p = copy_of(s, count), *dp = normals(count, 61, 0, 1),
         *ds = copy_of(dp, count);
    double worst = 0, worst_backward = 0;
    softmax_rows(p, rows, columns);
    softmax_rows_backward(p, ds, rows, columns);
    for (int i = 0; i < rows; i++) {
        const real *row = s + (size_t)i * columns, *pi = p + (size_t)i * columns;
        const real *dpi = dp + (size_t)i * columns, *dsi = ds + (size_t)i * columns;
        long double sum = 0;
        double top = -INFINITY, inner = 0, size = 0;
        for (int j = 0; j < columns; j++)
            top = fmax(top, row[j]);
        for (int j = 0; j < columns; j++) {
            sum += exp((double)row[j] - top);
            inner += (double)pi[j] * (double)dpi[j];
            size += fabs((double)pi[j] * (double)dpi[j]);
        }
        for (int j = 0; j < columns; j++) {
            /* The rounding of s - top is a relative error of its exponential. What lies below the smallest
             * exponential of fast_exp may come out as that. */
            const double depth = top - (double)row[j], want = (double)(exp(-depth) / sum);
            worst = worse(worst, pi[j], want, (8 + sqrt(columns) + depth) * EPS * want + 2e-38);
            worst_backward = worse(worst_backward, dsi[j], (double)pi[j] * ((double)dpi[j] - inner),
                                   4 * EPS * (double)pi[j] * (fabs((double)dpi[j]) + size) + 2e-38);
        }
    }
    CHECK(worst <= 1, "softmax_rows %d x %d, spread %g: %.3g tolerances", rows, columns, spread, worst);
    CHECK(worst_backward <= 1, "softmax_rows_backward %d x %d, spread %g: %.3g tolerances", rows, columns,
          spread, worst_backward);
    free(s), free(p), free(dp), free(ds);
}

static void test_softmax(void) {
    static const double spreads[4] = {0, 1, 30, 1e4};
    for (int k = 0; k < 4; k++) {
        for (int columns = 1; columns <= 70; columns++)
            check_softmax(1 + columns % 5, columns, spreads[k]);
        check_softmax(20, 196, spreads[k]);
        check_softmax(7, 784, spreads[k]);
    }
}

static void test_dot(void) {
    for (size_t count = 0; count <= 200; count++) {
        real *x = normals(count, 62, 1, 2), *y = normals(count, 63, 0, 2);
        double sum = 0, size = 0;
        for (size_t i = 0; i < count; i++) {
            sum += (double)x[i] * (double)y[i];
            size += fabs((double)x[i] * (double)y[i]);
        }
        CHECK(fabs(dot(x, y, count) - sum) <= (double)count * DBL_EPSILON * size, "dot of %zu elements",
              count);
        free(x), free(y);
    }
    const real huge[2] = {(real)1e30, 1};
    CHECK(fabs(dot(huge, huge, 2) / 1e60 - 1) < 1e-6, "dot does not overflow where real would");
}

/* ---- levels of pixels ---- */

static double level(int c) { return 2 * (c + 0.5) / 256 - 1; }

/* -log p(k | u) and its derivatives, and how far roundings may take them. */
typedef struct { double value, by_u, by_precision, value_tolerance, u_tolerance, precision_tolerance; } Level;

static Level level_naive(double u, int k, double precision) {
    const long double h = precision / 2;
    long double excess[256], least = INFINITY, sum = 0, mean = 0, mean_excess = 0, shift = 0, u_shift = 0,
                             p_shift = 0;
    double nearest = 0;
    for (int c = 0; c < 256; c++) {   /* (u - x(c))^2 - (u - x(k))^2 */
        excess[c] = (long double)(level(k) - level(c)) * ((long double)u - level(k) + u - level(c));
        if (excess[c] < least)
            least = excess[c], nearest = level(c);
    }
    for (int c = 0; c < 256; c++)
        sum += expl(-h * (excess[c] - least));
    for (int c = 0; c < 256; c++) {
        const long double p = expl(-h * (excess[c] - least)) / sum;
        mean += p * (level(c) - level(k));
        mean_excess += p * excess[c];
    }
    /* The program takes logits from the nearest level: h step (step - 2d), step = x(c) - x(nearest), d = u -
     * x(nearest). Roundings of d and of step - 2d move a logit by some EPS h |step| (|step| + 4 |d|), a sum
     * over the levels by some EPS; what is summed are 1, step and step (step - 2d). */
    const long double d = fabs(u - nearest), step_k = fabs(level(k) - nearest);
    for (int c = 0; c < 256; c++) {
        const long double p = expl(-h * (excess[c] - least)) / sum, step = fabs(level(c) - nearest);
        const long double moved = p * (1 + h * step * (step + 4 * d));
        shift += moved;
        u_shift += moved * step;
        p_shift += moved * step * (step + 4 * d);
    }
    const double roundings = 8 * EPS;
    const double clamped = 1e-35;   /* in float no weight is less than exp(-87) = 1.6e-38 */
    Level l = {.value = (double)(logl(sum) - h * least), .by_u = (double)(precision * mean),
               .by_precision = (double)(-mean_excess / 2)};
    l.value_tolerance = roundings * (double)(shift + h * step_k * (step_k + 4 * d));
    l.u_tolerance = precision * (roundings * (double)(u_shift + u_shift * shift + step_k) + clamped);
    l.precision_tolerance = roundings * (double)(p_shift + p_shift * shift + step_k * (step_k + 4 * d));
    l.precision_tolerance += clamped * (1 + fabs(u));
    return l;
}

static void check_level_softmax(double precision, double reach) {
    enum { COUNT = 200 };
    real *drawn = normals(COUNT, 70, 0, reach), du[COUNT];
    unsigned char k[COUNT];
    double u[COUNT], value = 0, value_tolerance = 0, by_precision = 0, precision_tolerance = 0, worst = 0,
           dprecision = 0;
    for (int i = 0; i < COUNT; i++)   /* half of them near u, the others anywhere */
        u[i] = drawn[i], k[i] = (unsigned char)(i % 2 ? nearest_level(u[i]) ^ (i / 2 % 4)
                                                      : (int)(random_bits(check_stream(71), i) % 256));
    const double sum = level_softmax(COUNT, u, k, precision, du, &dprecision);
    for (int i = 0; i < COUNT; i++) {
        const Level l = level_naive(u[i], k[i], precision);
        real one;
        double one_dprecision, one_worst = 0;
        const double one_value = level_softmax(1, u + i, k + i, precision, &one, &one_dprecision);
        one_worst = worse(one_worst, one_value, l.value, l.value_tolerance);
        one_worst = worse(one_worst, one, l.by_u, l.u_tolerance);
        one_worst = worse(one_worst, one_dprecision, l.by_precision, l.precision_tolerance);
        worst = worse(worst, one_worst, 0, 1);
        worst = worse(worst, du[i], one, 0);
        value += l.value, value_tolerance += l.value_tolerance;
        by_precision += l.by_precision, precision_tolerance += l.precision_tolerance;
    }
    CHECK(worst <= 1, "level_softmax, precision %g, u to %g: %.3g tolerances", precision, reach, worst);
    CHECK(fabs(sum - value) <= value_tolerance, "level_softmax, precision %g, u to %g: %.9g for %.9g",
          precision, reach, sum, value);
    CHECK(fabs(dprecision - by_precision) <= precision_tolerance,
          "level_softmax by the precision %g, u to %g: %.9g for %.9g", precision, reach, dprecision,
          by_precision);
    free(drawn);
}

static void test_level_softmax(void) {
    static const double precisions[8] = {1e-8, 1e-2, 1, 100, 1e4, 597195.6137928, 1e7, 1e9};   /* exp(13.3) */
    static const double reaches[4] = {0.01, 0.7, 5, 1000};
    for (int p = 0; p < 8; p++)
        for (int r = 0; r < 4; r++)
            check_level_softmax(precisions[p], reaches[r]);
}

static void test_nearest_level(void) {
    int right = 1;
    for (int i = -3000; i <= 3000; i++) {
        const double u = i / 2000.0;   /* halfway between two levels either will do */
        double least = INFINITY;
        for (int c = 0; c < 256; c++)
            least = fmin(least, fabs(u - level(c)));
        right &= fabs(u - level(nearest_level(u))) <= least + DBL_EPSILON;
    }
    CHECK(right, "nearest_level is the nearest");
    for (int c = 0; c < 256; c++)
        CHECK(nearest_level(level(c)) == c, "level %d is its own nearest", c);
    CHECK(nearest_level(-INFINITY) == 0 && nearest_level(INFINITY) == 255, "far outside");
    CHECK(nearest_level(NAN) >= 0 && nearest_level(NAN) < 256, "not a number still gives a level");
}

/* Evenly spread uniform numbers must come out as often as the probability says, within one at either end. */
static void test_level_draw(void) {
    enum { COUNT = 4000 };
    static const double us[6] = {0, 0.3, -0.99, 1.7, -40, 1000}, precisions[4] = {1e-3, 10, 3e3, 6e5};
    for (int i = 0; i < 6; i++)
        for (int p = 0; p < 4; p++) {
            int drawn[256] = {0}, last = 0, ascending = 1;
            double worst = 0;
            for (int j = 0; j < COUNT; j++) {
                const int c = level_draw(us[i], precisions[p], (j + 0.5) / COUNT);
                ascending &= c >= last;
                drawn[last = c]++;
            }
            for (int c = 0; c < 256; c++)
                worst = worse(worst, drawn[c], COUNT * exp(-level_naive(us[i], c, precisions[p]).value),
                              1 + 1e-6);
            CHECK(worst <= 1, "level_draw at u %g, precision %g: off by %.3g draws of %d", us[i],
                  precisions[p], worst, COUNT);
            CHECK(ascending, "level_draw is the inverse of the distribution function");
            const int low = level_draw(us[i], precisions[p], 0),
                      high = level_draw(us[i], precisions[p], 1 - DBL_EPSILON / 2);
            CHECK(low >= 0 && low <= high && high < 256, "level_draw at the ends of [0, 1)");
        }
}

/* ---- exp, clock ---- */

/* The softmax of (0, -d) is (1, exp(-d)) / (1 + exp(-d)). */
static void test_exp(void) {
    double worst = 0, worst_at = 0;
    for (int i = 0; i <= 1000000; i++) {
        real s[2] = {0, (real)(i % 2 ? -87.0 * i / 1000000 : -pow(i / 1000000.0, 3))};
        const double e = exp((double)s[1]), at = s[1];
        softmax_rows(s, 1, 2);
        const double error = fabs((double)s[1] * (1 + e) / e - 1);
        if (!(error <= worst))
            worst = error, worst_at = at;
    }
    /* 2e-7 in float and libm's in double, and three roundings: of the sum, its reciprocal and the product. */
    CHECK(worst < (sizeof(real) == sizeof(float) ? 2e-7 : EPS) + 1.5 * EPS, "exp is off by %.3g at %.9g",
          worst, worst_at);
    real s[4] = {0, -100, (real)-1e30, (real)-INFINITY};
    softmax_rows(s, 1, 4);
    CHECK(s[0] == 1 && (double)s[1] < 4e-38 && s[2] >= 0 && s[3] >= 0 && (double)s[3] < 4e-38,
          "exponentials of what lies far below are clamped");
}

static void test_clock(void) {
    double last = seconds_now(), start = last;
    int forward = 1;
    for (int i = 0; i < 1000 || (last == start && i < 10000000); i++) {
        const double now = seconds_now();
        forward &= now >= last;
        last = now;
    }
    CHECK(forward && last > start && last - start < 10, "the clock goes forward: %g s", last - start);
}

/* ---- work in parts ---- */

enum { PIECES = 10 };
typedef struct { int *done, *parts; Arena **scratch; } Pieces;

static void count_pieces(const void *context, int first, int end, Arena *scratch) {
    const Pieces *p = context;
    for (int i = first; i < end; i++)
        p->done[i]++;
#pragma omp critical
    p->scratch[(*p->parts)++] = scratch;
}

/* A part is not divided again; what is done all at once may be. */
static void count_again(const void *context, int first, int end, Arena *scratch) {
    (void)first, (void)end;
    in_parts(count_pieces, context, PIECES, scratch);
}

static void test_in_parts(void) {
    Arena *arena = arena_new(), *scratch[16] = {0};
    for (int parts = 0; parts < 8; parts++)
        for (int count = 0; count <= PIECES; count++) {
            int done[PIECES] = {0}, made = 0, once = 1, own = 1;
            const Pieces pieces = {done, &made, scratch};
            arena_divide(arena, parts);
            in_parts(count_pieces, &pieces, count, arena);
            for (int i = 0; i < PIECES; i++)
                once &= done[i] == (i < count);
            for (int i = 0; i < made; i++)
                for (int j = 0; j < i; j++)
                    own &= scratch[i] != scratch[j];
            const int wanted = parts < count ? parts : count;
            CHECK(once && own && made == (wanted > 1 ? wanted : 1), "%d pieces in %d parts: %d parts", count,
                  parts, made);
            made = 0;
            in_parts(count_again, &pieces, count, arena);
            CHECK(made == (parts > 1 ? wanted > 1 ? wanted : parts : 1),
                  "%d pieces in %d parts, again in parts: %d", count, parts, made);
        }
    arena_free(arena);
}

/* The loops that are divided, one after the other into `y`: products with whole and partial vectors, plain
 * sums, minimal filtering with whole and partial tiles, and group normalisation. Returns how many numbers. */
static size_t divided_loops(const real *a, const real *b, real *y, Arena *scratch) {
    static const int shapes[4][4] = {{28, 28, 32, 32}, {15, 21, 17, 33}, {61, 17, 16, 20}, {14, 14, 64, 32}};
    real mean[8], rstd[8], *const first = y;
    const GroupNorm n = {.positions = 98, .channels = 24, .groups = 6, .swish = 1, .scale = b,
                         .bias = b + 24, .dropout_factor = b + 48, .mean = mean, .rstd = rstd};
    matrix_product(50, 19, 70, a, b, a + 7, b, y, scratch), y += 50 * 70;
    convolve3x3(9, 8, 5, 3, a, b, NULL, NULL, y, scratch), y += 9 * 8 * 3;
    for (int i = 0; i < 4; i++) {
        const int h = shapes[i][0], w = shapes[i][1], in = shapes[i][2], out = shapes[i][3];
        convolve3x3_fast(h, w, in, out, a, b, i % 2 ? NULL : b, i / 2 ? a : NULL, y, scratch);
        y += h * w * out;
    }
    group_norm(&n, a, y, scratch), y += 98 * 24;
    return (size_t)(y - first);
}

static void test_same_bits_in_parts(void) {
    enum { MOST = 100000 };
    real *a = normals(MOST, 90, 0, 1), *b = normals(MOST, 91, 0, 1);
    real *whole = allocate_zeroed(MOST, sizeof(real)), *y = allocate_zeroed(MOST, sizeof(real));
    Arena *arena = arena_new();
    const size_t count = divided_loops(a, b, whole, arena);
    for (int parts = 2; parts < 8; parts++) {
        arena_divide(arena, parts);
        memset(y, 0, MOST * sizeof(real));
        divided_loops(a, b, y, arena);
        CHECK(count <= MOST && memcmp(y, whole, count * sizeof(real)) == 0, "%d parts: the same bits", parts);
    }
    free(a), free(b), free(whole), free(y), arena_free(arena);
}

int main(void) {
    static void (*const tests[])(void) = {
        test_fail, test_printable, test_allocate, test_arena, test_philox, test_random_positions,
        test_uniform_moments, test_normal_moments, test_streams_independent, test_dropout, test_products,
        test_convolution, test_group_norm, test_softmax, test_dot, test_level_softmax, test_nearest_level,
        test_level_draw, test_exp, test_clock, test_in_parts, test_same_bits_in_parts};
    lent = arena_new();
    for (size_t i = 0; i < sizeof tests / sizeof tests[0]; i++)
        tests[i]();
    CHECK(arena_mark(lent).used == 0, "the loops give all scratch memory back");
    arena_free(lent);
    return test_report();
}
