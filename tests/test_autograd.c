/* test_autograd.c - every function of autograd.c: its value against the plainest loop that says the same, and
 * its gradient, tangent and gradient through the tangent against differences (derivatives.c).
 *
 * Tolerances. EPS is the distance from 1 to the next real. A sum of n products is within n EPS times the sum
 * of their magnitudes, twice the textbook bound. Elementwise functions are computed in double and rounded
 * once: 2 EPS, and 4 EPS where libm's own error counts, in double. Another tolerance has its reason beside
 * it. */

#include "derivatives.h"
#include "test.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

static const double TWO_PI = 6.283185307179586;

/* A graph of its own for every test. */
typedef struct {
    Arena *arena;
    Graph graph;
    uint32_t drawn;
} Desk;

static Desk *desk_new(void) {
    Desk *desk = allocate_zeroed(1, sizeof *desk);
    desk->arena = arena_new();
    graph_begin(&desk->graph, desk->arena);
    return desk;
}

static void desk_free(Desk *desk) {
    arena_free(desk->arena);
    free(desk);
}

/* A constant of normal numbers, other ones each time. */
static Tensor *normal(Desk *desk, int height, int width, int channels) {
    const size_t count = (size_t)height * width * channels;
    real *values = allocate(count, sizeof(real));
    random_normal(random_stream(11, RANDOM_CHECK, 0, desk->drawn++), values, count);
    Tensor *t = constant(&desk->graph, height, width, channels, values);
    free(values);
    return t;
}

static double at(const Tensor *t, size_t i) { return (double)t->value[i]; }

static double pixel(const Tensor *t, int i, int j, int c) {   /* 0 outside the image */
    const int inside = i >= 0 && j >= 0 && i < t->height && j < t->width;
    return inside ? at(t, ((size_t)i * t->width + j) * t->channels + c) : 0;
}

static int has_shape(const Tensor *t, int height, int width, int channels) {
    return t->height == height && t->width == width && t->channels == channels;
}

/* Whether `got` is within `tolerance` of `want`; what is not a number is not. */
static void check_near(double got, double want, double tolerance, const char *what, size_t index) {
    CHECK(fabs(got - want) <= tolerance, "%s: element %zu is %.17g, should be %.17g +- %g", what, index, got,
          want, tolerance);
}

/* ---- leaves ---- */

static void test_leaves(void) {
    Desk *desk = desk_new();
    const real values[6] = {1, -2, 3, -4, 5, -6};
    const unsigned char bytes[3] = {0, 128, 255};
    real gradient[6] = {0};
    Tensor *t = constant(&desk->graph, 1, 2, 3, values), *zeros = constant(&desk->graph, 1, 2, 3, NULL);
    CHECK(has_shape(t, 1, 2, 3) && element_count(t) == 6 && !t->needs_gradient && !t->tangent,
          "a constant's fields");
    CHECK(t->value != values && memcmp(t->value, values, sizeof values) == 0, "a constant is a copy");
    for (size_t i = 0; i < 6; i++)
        check_near(at(zeros, i), 0, 0, "constant of NULL", i);
    CHECK(has_shape(number(&desk->graph, 0.25), 1, 1, 1) && at(number(&desk->graph, 0.25), 0) == 0.25,
          "a number");
    /* gamma is a number, and its roundoff would be multiplied by 2 pi 128 in the Fourier features. */
    const Tensor *third = affine(1.0 / 3, number(&desk->graph, 1), 0);
    CHECK(number_of(third) == 1.0 / 3 && at(third, 0) == (double)(real)(1.0 / 3),
          "a number is kept in double");
    t = from_bytes(&desk->graph, 1, 1, 3, bytes, 2.0 / 256, 1.0 / 256 - 1);
    for (size_t i = 0; i < 3; i++)
        check_near(at(t, i), 2 * (bytes[i] + 0.5) / 256 - 1, EPS, "from_bytes", i);
    t = parameter(&desk->graph, 1, 2, 3, values, NULL, gradient);
    CHECK(t->value == values && t->gradient == gradient && t->needs_gradient, "a parameter lives elsewhere");
    CHECK(!parameter(&desk->graph, 1, 2, 3, values, NULL, NULL)->needs_gradient,
          "a parameter without gradient is a constant");
    desk_free(desk);
}

/* ---- elementwise ---- */

static void test_arithmetic(void) {
    const int shapes[4][2][3] = {
        {{2, 3, 5}, {2, 3, 5}}, {{2, 3, 5}, {1, 1, 1}}, {{1, 1, 1}, {2, 3, 5}}, {{1, 1, 1}, {1, 1, 1}}};
    for (int s = 0; s < 4; s++) {
        Desk *desk = desk_new();
        Tensor *a = normal(desk, shapes[s][0][0], shapes[s][0][1], shapes[s][0][2]);
        Tensor *b = normal(desk, shapes[s][1][0], shapes[s][1][1], shapes[s][1][2]);
        const Tensor *sum = add(a, b), *difference = sub(a, b), *product_of = mul(a, b),
                     *scaled = affine(-1.5, a, 0.25);
        const size_t count = s < 3 ? 30 : 1;
        CHECK(element_count(sum) == count && element_count(difference) == count
                  && element_count(product_of) == count,
              "the result has the shape of the larger operand, case %d", s);
        for (size_t i = 0; i < count; i++) {
            const double x = at(a, element_count(a) > 1 ? i : 0), y = at(b, element_count(b) > 1 ? i : 0);
            check_near(at(sum, i), x + y, EPS * (fabs(x) + fabs(y)), "add", i);
            check_near(at(difference, i), x - y, EPS * (fabs(x) + fabs(y)), "sub", i);
            check_near(at(product_of, i), x * y, EPS * fabs(x * y), "mul", i);
        }
        for (size_t i = 0; i < element_count(a); i++)
            check_near(at(scaled, i), -1.5 * at(a, i) + 0.25, EPS * (1.5 * fabs(at(a, i)) + 0.25), "affine",
                       i);
        desk_free(desk);
    }
}

static double logistic_of(double x) { return x > 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x)); }
static double softplus_of(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }
static double reciprocal_of(double x) { return 1 / x; }
static double swish_of(double x) { return x * logistic_of(x); }
static double sine_of(double x) { return sin(TWO_PI * (x - nearbyint(x))); }
static double cosine_of(double x) { return cos(TWO_PI * (x - nearbyint(x))); }

static void test_functions(void) {
    const struct {
        const char *name;
        Tensor *(*ours)(Tensor *);
        double (*theirs)(double);
        int positive_only;
    } functions[] = {
        {"exponential", exponential, exp, 0},
        {"exponential_minus_1", exponential_minus_1, expm1, 0},
        {"reciprocal", reciprocal, reciprocal_of, 1},
        {"square_root", square_root, sqrt, 1},
        {"absolute", absolute, fabs, 0},
        {"logistic", logistic, logistic_of, 0},
        {"softplus", softplus, softplus_of, 0},
        {"hyperbolic_tangent", hyperbolic_tangent, tanh, 0},
        {"swish", swish, swish_of, 0},
    };
    const real inputs[] = {(real)-80, (real)-13.3, (real)-2, (real)-0.5, (real)-1e-6, (real)1e-6,
                           (real)0.5, (real)1,     (real)3,  (real)13.3, (real)80};
    enum { COUNT = sizeof inputs / sizeof inputs[0] };
    Desk *desk = desk_new();
    Tensor *all = constant(&desk->graph, 1, COUNT, 1, inputs),
           *positive = constant(&desk->graph, 1, COUNT - 5, 1, inputs + 5);
    for (size_t f = 0; f < sizeof functions / sizeof functions[0]; f++) {
        Tensor *x = functions[f].positive_only ? positive : all;
        const Tensor *y = functions[f].ours(x);
        for (size_t i = 0; i < element_count(x); i++) {
            const double want = functions[f].theirs(at(x, i));
            check_near(at(y, i), want, 4 * EPS * fabs(want), functions[f].name, i);
        }
    }
    Tensor *cycles = constant(&desk->graph, 1, 1, 40, NULL);
    for (int i = 0; i < 40; i++)   /* whole cycles are taken off without rounding, however many there are */
        cycles->value[i] = (real)(128 * (i - 20) + 0.05 * i);
    const Tensor *s = sine(cycles), *c = cosine(cycles);
    for (size_t i = 0; i < 40; i++) {
        check_near(at(s, i), sine_of(at(cycles, i)), 4 * EPS, "sine", i);
        check_near(at(c, i), cosine_of(at(cycles, i)), 4 * EPS, "cosine", i);
    }
    desk_free(desk);
}

/* What elementwise operators and sums make is kept in double beside its value. */
static void test_numbers(void) {
    Desk *desk = desk_new();
    const unsigned char k = 100;
    Tensor *a = number(&desk->graph, 1.0 / 3), *b = number(&desk->graph, 0.7), *image = normal(desk, 2, 2, 4);
    const Tensor *results[] = {
        add(a, b), sub(a, b), mul(a, b), affine(0.1, a, 1.0 / 7), with_tangent(a, b), exponential(a),
        exponential_minus_1(a), reciprocal(a), square_root(a), absolute(a), logistic(a), softplus(a),
        hyperbolic_tangent(a), swish(a), sine(a), cosine(a), sum(image), squared_norm(image), sum(a),
        squared_norm(a), level_likelihood(a, b, &k), multiples(a, (const double[]){0.3}, 1),
    };
    for (size_t i = 0; i < sizeof results / sizeof results[0]; i++)
        CHECK((real)number_of(results[i]) == results[i]->value[0], "number %zu is %.17g, in double %.17g", i,
              at(results[i], 0), number_of(results[i]));
    CHECK(number_of(sub(a, b)) == 1.0 / 3 - 0.7 && number_of(exponential(a)) == exp(1.0 / 3),
          "digits beyond real's");
    desk_free(desk);
}

static void test_sums(void) {
    Desk *desk = desk_new();
    Tensor *x = normal(desk, 7, 5, 3);
    double added = 0, squares = 0, magnitude = 0;
    for (size_t i = 0; i < element_count(x); i++)
        added += at(x, i), magnitude += fabs(at(x, i)), squares += at(x, i) * at(x, i);
    /* Sums are kept in double: one rounding, and in double as many as there are terms. */
    check_near(at(sum(x), 0), added,
               (double)element_count(x) * DBL_EPSILON * magnitude + EPS * fabs(added), "sum", 0);
    check_near(at(squared_norm(x), 0), squares, ((double)element_count(x) * DBL_EPSILON + EPS) * squares,
               "squared_norm", 0);
    desk_free(desk);
}

/* ---- linear maps ---- */

/* y[i][j][o] = bias[o] + residual[i][j][o] + sum over a, b, c of x[i+a-1][j+b-1][c] kernel[a][b][c][o], or
 * without neighbours for one tap. */
static void check_convolve(int h, int w, int in, int out, int taps, int with_bias, int with_residual) {
    Desk *desk = desk_new();
    const int side = taps == 9 ? 3 : 1;
    Tensor *x = normal(desk, h, w, in), *kernel = normal(desk, taps, in, out);
    Tensor *bias = with_bias ? normal(desk, 1, 1, out) : NULL,
           *residual = with_residual ? normal(desk, h, w, out) : NULL;
    const Tensor *y = convolve(x, kernel, bias, residual);
    CHECK(has_shape(y, h, w, out), "shape of a convolution %dx%d, %d to %d, %d taps", h, w, in, out, taps);
    for (int i = 0; i < h; i++)
        for (int j = 0; j < w; j++)
            for (int o = 0; o < out; o++) {
                double sum = (bias ? at(bias, (size_t)o) : 0) + (residual ? pixel(residual, i, j, o) : 0),
                       magnitude = 2;
                for (int a = 0; a < side; a++)
                    for (int b = 0; b < side; b++)
                        for (int c = 0; c < in; c++) {
                            const double term = pixel(x, i + a - side / 2, j + b - side / 2, c)
                                                * pixel(kernel, side * a + b, c, o);
                            sum += term, magnitude += fabs(term);
                        }
                check_near(pixel(y, i, j, o), sum, (taps * in + 2) * EPS * magnitude, "convolve",
                           ((size_t)i * w + j) * out + o);
            }
    desk_free(desk);
}

static void test_convolve(void) {
    check_convolve(1, 1, 1, 1, 9, 0, 0);
    check_convolve(5, 7, 3, 17, 9, 1, 1);
    check_convolve(4, 28, 16, 32, 9, 1, 0);
    check_convolve(3, 13, 5, 41, 9, 0, 1);
    check_convolve(1, 1, 19, 7, 1, 1, 0);
    check_convolve(5, 3, 6, 33, 1, 1, 1);
    check_convolve(2, 9, 16, 16, 1, 0, 0);
    check_convolve(14, 15, 20, 33, 9, 1, 1);

    /* By minimal filtering, or by plain sums. */
    Desk *desk = desk_new();
    Tensor *x = normal(desk, 16, 16, 16), *kernel = normal(desk, 9, 16, 16);
    const size_t bytes = element_count(x) * sizeof(real);
    real *want = allocate(2, bytes), *plain = want + element_count(x);
    convolve3x3_fast(16, 16, 16, 16, x->value, kernel->value, NULL, NULL, want, desk->graph.arena);
    convolve3x3(16, 16, 16, 16, x->value, kernel->value, NULL, NULL, plain, desk->graph.arena);
    CHECK(memcmp(want, plain, bytes) != 0, "the two ways of convolving round differently");
    CHECK(memcmp(convolve(x, kernel, NULL, NULL)->value, want, bytes) == 0, "which loop runs");
    CHECK(memcmp(convolve_by_plain_sums(x, kernel, NULL, NULL)->value, plain, bytes) == 0, "plain sums");
    free(want);
    desk_free(desk);
}

/* y[2i+a][2j+b] = x[i][j] kernel[a][b] + bias */
static void check_upsample(int h, int w, int in, int out, int with_bias) {
    Desk *desk = desk_new();
    Tensor *x = normal(desk, h, w, in), *kernel = normal(desk, 4, in, out),
           *bias = with_bias ? normal(desk, 1, 1, out) : NULL;
    const Tensor *y = upsample(x, kernel, bias);
    CHECK(has_shape(y, 2 * h, 2 * w, out), "shape of an upsampling");
    for (int i = 0; i < 2 * h; i++)
        for (int j = 0; j < 2 * w; j++)
            for (int o = 0; o < out; o++) {
                double sum = bias ? at(bias, (size_t)o) : 0, magnitude = 1;
                for (int c = 0; c < in; c++) {
                    const double term = pixel(x, i / 2, j / 2, c) * pixel(kernel, 2 * (i % 2) + j % 2, c, o);
                    sum += term, magnitude += fabs(term);
                }
                check_near(pixel(y, i, j, o), sum, (in + 1) * EPS * magnitude, "upsample",
                           ((size_t)i * 2 * w + j) * out + o);
            }
    desk_free(desk);
}

/* a b,  0.3 a b^T,  and softmax(q k^T / sqrt(n)) by rows. */
static void test_matrices(void) {
    Desk *desk = desk_new();
    const int rows = 6, n = 7, m = 5;
    Tensor *a = normal(desk, 3, 2, n), *b = normal(desk, n, 1, m), *bt = normal(desk, 5, 1, n);
    const Tensor *ab = matrix_multiply(1, a, b, 0), *outer = matrix_multiply(0.3, a, bt, 1),
                 *p = attention_weights(a, bt);
    CHECK(has_shape(ab, 3, 2, m) && has_shape(outer, 3, 2, 5) && has_shape(p, 3, 2, 5),
          "shapes of matrix products");
    for (int i = 0; i < rows; i++) {
        double weight[5], sum_of_weights = 0;
        for (int j = 0; j < m; j++) {
            double sum = 0, outer_sum = 0, magnitude = 0;
            for (int k = 0; k < n; k++) {
                sum += at(a, (size_t)i * n + k) * at(b, (size_t)k * m + j);
                outer_sum += at(a, (size_t)i * n + k) * at(bt, (size_t)j * n + k);
                magnitude += fabs(at(a, (size_t)i * n + k))
                             * (fabs(at(b, (size_t)k * m + j)) + fabs(at(bt, (size_t)j * n + k)));
            }
            check_near(at(ab, (size_t)i * m + j), sum, n * EPS * magnitude, "matrix_multiply",
                       (size_t)i * m + j);
            check_near(at(outer, (size_t)i * 5 + j), 0.3 * outer_sum, n * EPS * magnitude,
                       "times a transpose", (size_t)i * 5 + j);
            sum_of_weights += weight[j] = exp(outer_sum / sqrt(n));
        }
        for (int j = 0; j < m; j++)   /* exponents up to about 5 carry n EPS each, and so do exponentials */
            check_near(at(p, (size_t)i * 5 + j), weight[j] / sum_of_weights, 8 * n * EPS, "attention_weights",
                       (size_t)i * 5 + j);
    }
    desk_free(desk);
}

/* ---- layers and shapes ---- */

/* The mean and 1/sqrt(variance + 1e-6) of group g of `width` channels. */
static void statistics(const Tensor *x, int g, int width, double *mean, double *rstd) {
    const int positions = x->height * x->width;
    double sum = 0, squares = 0;
    for (int i = 0; i < positions; i++)
        for (int c = g * width; c < (g + 1) * width; c++)
            sum += at(x, (size_t)i * x->channels + c);
    *mean = sum / (positions * width);
    for (int i = 0; i < positions; i++)
        for (int c = g * width; c < (g + 1) * width; c++)
            squares += pow(at(x, (size_t)i * x->channels + c) - *mean, 2);
    *rstd = 1 / sqrt(squares / (positions * width) + 1e-6);
}

static void check_normalise(int h, int w, int channels, int kind) {
    Desk *desk = desk_new();
    desk->graph.dropout = 0.25;
    desk->graph.dropout_stream = random_stream(5, RANDOM_DROPOUT, 3, 2);
    desk->graph.dropout_position = DROPOUT_RUN;
    Tensor *x = normal(desk, h, w, channels), *scale = normal(desk, 1, 1, channels),
           *bias = normal(desk, 1, 1, channels);
    const Tensor *y = normalise(x, scale, bias, kind);
    const int groups = group_count(channels), width = channels / groups;
    real *keep = allocate(element_count(x), sizeof(real));
    random_dropout(desk->graph.dropout_stream, DROPOUT_RUN, element_count(x), 0.25, keep);
    for (int i = 0; i < h * w; i++)
        for (int c = 0; c < channels; c++) {
            const size_t index = (size_t)i * channels + c;
            double mean, rstd;
            statistics(x, c / width, width, &mean, &rstd);
            const double n = (at(x, index) - mean) * rstd * at(scale, (size_t)c) + at(bias, (size_t)c);
            double want = kind == NORM_ONLY ? n : swish_of(n);
            if (kind == NORM_SWISH_DROPOUT)
                want *= (double)keep[index];
            /* A dozen roundings on numbers of size |x - mean| rstd |scale| + |bias|; the slope of swish is
             * below 1.1, the factor of dropout 4/3; and a mean of positions * width numbers. */
            const double size = fabs((at(x, index) - mean) * rstd * at(scale, (size_t)c))
                                + fabs(at(bias, (size_t)c)) + 1;
            check_near(at(y, index), want, (20 + h * w * width / 4.0) * EPS * size, "normalise", index);
        }
    const size_t used = desk->graph.dropout_position - DROPOUT_RUN;
    CHECK(kind == NORM_SWISH_DROPOUT ? used >= element_count(x) : used == 0,
          "kind %d took %zu numbers for dropout", kind, used);
    free(keep);
    desk_free(desk);
}

static void test_normalise(void) {
    CHECK(group_count(4) == 1 && group_count(20) == 5 && group_count(128) == 32 && group_count(256) == 32,
          "group counts");
    CHECK(group_count(132) == 0 && group_count(3) == 0, "group counts that do not come out even");
    for (int kind = NORM_ONLY; kind <= NORM_SWISH_DROPOUT; kind++) {
        check_normalise(1, 1, 4, kind);
        check_normalise(3, 5, 20, kind);
        check_normalise(4, 4, 64, kind);
        check_normalise(2, 1, 256, kind);
    }
}

static void test_shapes(void) {
    Desk *desk = desk_new();
    Tensor *a = normal(desk, 3, 2, 4), *b = normal(desk, 3, 2, 7);
    const double factors[3] = {64, -0.5, 128};
    const Tensor *joined = concatenate(a, b), *scaled = multiples(a, factors, 3);
    CHECK(has_shape(joined, 3, 2, 11) && has_shape(scaled, 3, 2, 12), "shapes");
    for (size_t i = 0; i < 6; i++) {
        for (size_t c = 0; c < 11; c++)
            check_near(at(joined, 11 * i + c), c < 4 ? at(a, 4 * i + c) : at(b, 7 * i + c - 4), 0,
                       "concatenate", 11 * i + c);
        for (size_t c = 0; c < 12; c++) {
            const double want = at(a, 4 * i + c / 3) * factors[c % 3];
            check_near(at(scaled, 12 * i + c), want, EPS * fabs(want), "multiples", 12 * i + c);
        }
    }
    Tensor *x = normal(desk, 4, 6, 3);
    const Tensor *pooled = max_pool(x);
    CHECK(has_shape(pooled, 2, 3, 3), "shape of max-pooling");
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 3; j++)
            for (int c = 0; c < 3; c++)
                check_near(pixel(pooled, i, j, c),
                           fmax(fmax(pixel(x, 2 * i, 2 * j, c), pixel(x, 2 * i, 2 * j + 1, c)),
                                fmax(pixel(x, 2 * i + 1, 2 * j, c), pixel(x, 2 * i + 1, 2 * j + 1, c))),
                           0, "max_pool", (size_t)(3 * i + j) * 3 + c);
    const real equal[4] = {2, 2, 2, 2};   /* the first of equals gets the gradient */
    real gradient[4] = {0};
    backward(sum(max_pool(parameter(&desk->graph, 2, 2, 1, equal, NULL, gradient))), 1);
    CHECK(gradient[0] == 1 && gradient[1] == 0 && gradient[2] == 0 && gradient[3] == 0, "max_pool of equals");
    desk_free(desk);
}

/* ---- losses ---- */

static double level(int c) { return 2 * (c + 0.5) / 256 - 1; }

static void test_likelihood(void) {
    const double log_variances[3] = {-13.3, -8, -2};
    for (int v = 0; v < 3; v++) {
        Desk *desk = desk_new();
        enum { COUNT = 24 };
        unsigned char k[COUNT], likely[COUNT], drawn[COUNT];
        double want = 0, uniform[COUNT];
        const RandomStream draws = random_stream(11, RANDOM_CHECK, 2, 0);
        Tensor *noise = normal(desk, 2, 3, 4), *x = constant(&desk->graph, 2, 3, 4, NULL);
        for (int i = 0; i < COUNT; i++) {
            k[i] = (unsigned char)random_bits(random_stream(11, RANDOM_CHECK, 1, 0), (uint32_t)i);
            x->value[i] = (real)level(k[i]);
            uniform[i] = random_uniform(draws, (uint32_t)i);
        }
        Tensor *u = add(x, affine(exp(log_variances[v] / 2), noise, 0)),
               *log_variance = number(&desk->graph, log_variances[v]);
        const double precision = exp(-log_variances[v]);
        level_choose(u, log_variance, NULL, likely);
        level_choose(u, log_variance, &draws, drawn);
        for (int i = 0; i < COUNT; i++) {
            double logit[256], sum = 0, below = 0;
            int best = 0;
            for (int c = 0; c < 256; c++) {
                logit[c] = -pow(at(u, (size_t)i) - level(c), 2) * precision / 2;
                best = logit[c] > logit[best] ? c : best;
            }
            for (int c = 0; c < 256; c++)
                sum += exp(logit[c] - logit[k[i]]);
            want += log(sum);
            CHECK(likely[i] == best, "level_choose: %d is likeliest at %g, not %d", best, at(u, (size_t)i),
                  likely[i]);
            for (int c = 0; c < drawn[i]; c++)
                below += exp(logit[c] - logit[k[i]]) / sum;
            CHECK(below <= uniform[i] + 1e-9
                      && below + exp(logit[drawn[i]] - logit[k[i]]) / sum >= uniform[i] - 1e-9,
                  "level_choose: %d is not what %g draws", drawn[i], uniform[i]);
        }
        /* A logit is about 1/2 at some distance from u, where rounding u moves it by EPS sqrt(precision). */
        check_near(at(level_likelihood(u, log_variance, k), 0), want, COUNT * 4 * EPS * (sqrt(precision) + 8),
                   "level_likelihood", 0);
        desk_free(desk);
    }
}

/* ---- tangents and reverse mode ---- */

static void test_tangents(void) {
    Desk *desk = desk_new();
    Tensor *a = normal(desk, 2, 2, 4), *a_dot = normal(desk, 2, 2, 4), *carrier = with_tangent(a, a_dot);
    CHECK(carrier->tangent == a_dot && memcmp(carrier->value, a->value, 16 * sizeof(real)) == 0,
          "with_tangent");
    CHECK(without_tangent(carrier)->tangent == NULL && without_tangent(a) == a, "without_tangent");
    CHECK(swish(a)->tangent == NULL && add(a, a_dot)->tangent == NULL, "no tangent comes of none");
    const Tensor *y = swish(mul(carrier, carrier));
    CHECK(y->tangent && !y->tangent->tangent, "a tangent has no tangent of its own");
    CHECK(!mul(carrier, without_tangent(carrier))->tangent->needs_gradient,
          "constants need no gradient, nor their tangents");
    desk_free(desk);
}

static void test_backward(void) {
    Desk *desk = desk_new();
    const real values[3] = {1, 2, 3};
    real gradient[3] = {10, 20, 30};
    Tensor *p = parameter(&desk->graph, 1, 1, 3, values, NULL, gradient);
    backward(squared_norm(p), 0.5);
    CHECK(gradient[0] == 11 && gradient[1] == 22 && gradient[2] == 33,
          "backward adds weight times the gradient");
    backward(sum(p), 2);
    CHECK(gradient[0] == 13 && gradient[1] == 24 && gradient[2] == 35,
          "a second backward in the same graph adds again");
    backward(sum(normal(desk, 1, 1, 3)), 1);   /* nothing to do, and no harm */
    Tensor *used_often = affine(1, p, 0), *hundredfold = used_often;
    for (int i = 0; i < 99; i++)
        hundredfold = add(hundredfold, used_often);
    backward(sum(hundredfold), 1);
    CHECK(gradient[0] == 113 && gradient[2] == 135, "a tensor used a hundred times: %g", (double)gradient[0]);
    desk_free(desk);
}

/* Gradients are given back during the sweep: a chain of a thousand tensors does with a few of them. */
static void test_memory(void) {
    enum { LENGTH = 1000, COUNT = 4096 };
    Desk *desk = desk_new();
    real *values = allocate_zeroed(COUNT, sizeof(real)), *gradient = allocate_zeroed(COUNT, sizeof(real));
    Tensor *x = parameter(&desk->graph, 1, 1, COUNT, values, NULL, gradient);
    for (int i = 0; i < LENGTH; i++)
        x = affine(1, x, 0.5);
    Tensor *result = sum(x);
    CHECK(desk->graph.bytes == ((size_t)LENGTH * COUNT + 1) * sizeof(real),
          "a graph knows how many bytes its values take");
    const ArenaMark before = arena_mark(desk->arena);
    backward(result, 1);
    const ArenaMark after = arena_mark(desk->arena);
    CHECK(before.block == after.block && after.used - before.used <= 4 * COUNT * sizeof(real),
          "the sweep of a chain takes the memory of a few gradients");
    CHECK(gradient[0] == 1 && gradient[COUNT - 1] == 1, "the gradient of a long chain is %g",
          (double)gradient[0]);
    free(values);
    free(gradient);
    desk_free(desk);
}

static void test_shapes_only(void) {
    Desk *desk = desk_new();
    desk->graph.shapes_only = 1;
    graph_begin(&desk->graph, desk->arena);
    Tensor *x = constant(&desk->graph, 1024, 1024, 64, NULL),
           *kernel = parameter(&desk->graph, 9, 64, 8, NULL, NULL, NULL);
    Tensor *y = with_tangent(convolve(x, kernel, NULL, NULL), constant(&desk->graph, 1024, 1024, 8, NULL));
    y = max_pool(normalise(y, constant(&desk->graph, 1, 1, 8, NULL), constant(&desk->graph, 1, 1, 8, NULL),
                           NORM_SWISH));
    CHECK(has_shape(y, 512, 512, 8) && y->value == NULL && has_shape(y->tangent, 512, 512, 8),
          "shapes without values");
    CHECK(arena_capacity(desk->arena) < 8 << 20, "shapes take no memory for values");
    desk_free(desk);
}

static void test_clock(void) {
    Desk *desk = desk_new();
    OperatorTime times[MOST_OPERATORS] = {{0}};
    desk->graph.times = times;
    Tensor *x = normal(desk, 28, 28, 16);
    convolve(swish(x), normal(desk, 9, 16, 16), NULL, x);
    CHECK(strcmp(times[0].op->name, "function") == 0 && strcmp(times[1].op->name, "convolution") == 0,
          "operators are timed as they come");
    CHECK(!times[2].op, "and no others");
    CHECK(times[1].seconds[0] > 0 && times[1].seconds[1] == 0, "forward and backward are timed apart");
    desk_free(desk);
}

/* ---- derivatives ---- */

static void test_derivatives(void) {
    for (int i = 0; i < operator_count(); i++) {
        const Subject s = operator_subject(i);
        const DerivativeErrors e = derivative_errors(&s, 64, 1000 + (uint64_t)i);
        CHECK(e.gradient <= derivative_limit(), "%s (row %d): gradient off by %g", operator_title(i), i,
              e.gradient);
        CHECK(e.tangent <= derivative_limit(), "%s (row %d): tangent off by %g", operator_title(i), i,
              e.tangent);
        CHECK(e.through_tangent <= derivative_limit(), "%s (row %d): gradient through the tangent off by %g",
              operator_title(i), i, e.through_tangent);
    }
}

int main(void) {
    test_leaves();
    test_arithmetic();
    test_functions();
    test_numbers();
    test_sums();
    test_convolve();
    check_upsample(3, 2, 5, 7, 1);
    check_upsample(1, 4, 16, 33, 0);
    test_matrices();
    test_normalise();
    test_shapes();
    test_likelihood();
    test_tangents();
    test_backward();
    test_memory();
    test_shapes_only();
    test_clock();
    test_derivatives();
    return test_report();
}
