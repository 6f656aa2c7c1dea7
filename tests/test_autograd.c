/* test_autograd.c - every function of autograd.c: its value against the plainest loop that says the same, or
 * against the loop of tensor.c that computes it, which test_tensor.c knows, to the bit; and its gradient,
 * tangent and gradient through the tangent against differences (derivatives.c).
 *
 * Tolerances. EPS is the distance from 1 to the next real. A sum of n products is within n EPS times the sum
 * of their magnitudes, twice the textbook bound. Elementwise functions are computed in double and rounded
 * once: 2 EPS, and 4 EPS where libm's own error counts, in double. Another tolerance has its reason beside
 * it. */

#include "test.h"

static const double TWO_PI = 6.283185307179586;

static Graph graph;   /* a new one for every test */

/* A constant of normal numbers, other ones each time. */
static Tensor *normal(int height, int width, int channels) {
    static uint32_t drawn;
    return gaussian(&graph, height, width, channels, random_stream(11, RANDOM_CHECK, 0, drawn++));
}

static double at(const Tensor *t, size_t i) { return (double)t->value[i]; }

static double pixel(const Tensor *t, int i, int j, int c) {
    return at(t, ((size_t)i * t->width + j) * t->channels + c);
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
    const real values[6] = {1, -2, 3, -4, 5, -6};
    const unsigned char bytes[3] = {0, 128, 255};
    real gradient[6] = {0};
    Tensor *t = constant(&graph, 1, 2, 3, values), *zeros = constant(&graph, 1, 2, 3, NULL);
    CHECK(has_shape(t, 1, 2, 3) && element_count(t) == 6 && !t->needs_gradient && !t->tangent,
          "a constant's fields");
    CHECK(t->value != values && memcmp(t->value, values, sizeof values) == 0, "a constant is a copy");
    for (size_t i = 0; i < 6; i++)
        check_near(at(zeros, i), 0, 0, "constant of NULL", i);
    CHECK(has_shape(number(&graph, 0.25), 1, 1, 1) && at(number(&graph, 0.25), 0) == 0.25, "a number");
    /* gamma is a number, and its roundoff would be multiplied by 2 pi 128 in the Fourier features. */
    const Tensor *third = affine(1.0 / 3, number(&graph, 1), 0);
    CHECK(number_of(third) == 1.0 / 3 && at(third, 0) == (double)(real)(1.0 / 3), "a number, in double");
    t = from_bytes(&graph, 1, 1, 3, bytes, 2.0 / 256, 1.0 / 256 - 1);
    for (size_t i = 0; i < 3; i++)
        check_near(at(t, i), 2 * (bytes[i] + 0.5) / 256 - 1, EPS, "from_bytes", i);
    t = parameter(&graph, 1, 2, 3, values, NULL, gradient);
    CHECK(t->value == values && t->gradient == gradient && t->needs_gradient, "a parameter lives elsewhere");
    CHECK(!parameter(&graph, 1, 2, 3, values, NULL, NULL)->needs_gradient,
          "a parameter without gradient is a constant");
}

/* ---- elementwise ---- */

static void test_arithmetic(void) {
    for (int s = 0; s < 4; s++) {   /* which of the operands are numbers */
        Tensor *a = s & 1 ? normal(1, 1, 1) : normal(2, 3, 5), *b = s & 2 ? normal(1, 1, 1) : normal(2, 3, 5);
        const Tensor *results[4] = {add(a, b), sub(a, b), mul(a, b), affine(-1.5, a, 0.25)};
        for (int r = 0; r < 4; r++)
            CHECK(element_count(results[r]) == (size_t)(s == 3 || (s == 1 && r == 3) ? 1 : 30),
                  "the result has the shape of the larger operand, case %d, %d", s, r);
        for (size_t i = 0; i < element_count(results[0]); i++) {
            const double x = at(a, element_count(a) > 1 ? i : 0), y = at(b, element_count(b) > 1 ? i : 0);
            check_near(at(results[0], i), x + y, EPS * (fabs(x) + fabs(y)), "add", i);
            check_near(at(results[1], i), x - y, EPS * (fabs(x) + fabs(y)), "sub", i);
            check_near(at(results[2], i), x * y, EPS * fabs(x * y), "mul", i);
            if (i < element_count(a))
                check_near(at(results[3], i), -1.5 * x + 0.25, EPS * (1.5 * fabs(x) + 0.25), "affine", i);
        }
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
        {"exponential", exponential, exp, 0},    {"exponential_minus_1", exponential_minus_1, expm1, 0},
        {"square_root", square_root, sqrt, 1},   {"hyperbolic_tangent", hyperbolic_tangent, tanh, 0},
        {"absolute", absolute, fabs, 0},         {"reciprocal", reciprocal, reciprocal_of, 1},
        {"logistic", logistic, logistic_of, 0},  {"softplus", softplus, softplus_of, 0},
        {"swish", swish, swish_of, 0},
    };
    const real inputs[] = {(real)-80, (real)-13.3, (real)-2, (real)-0.5, (real)-1e-6, (real)1e-6,
                           (real)0.5, (real)1,     (real)3,  (real)13.3, (real)80};
    enum { COUNT = sizeof inputs / sizeof inputs[0] };
    for (size_t f = 0; f < sizeof functions / sizeof functions[0]; f++) {
        const int first = functions[f].positive_only ? 5 : 0;
        Tensor *x = constant(&graph, 1, COUNT - first, 1, inputs + first), *y = functions[f].ours(x);
        for (size_t i = 0; i < element_count(x); i++) {
            const double want = functions[f].theirs(at(x, i));
            check_near(at(y, i), want, 4 * EPS * fabs(want), functions[f].name, i);
        }
    }
    Tensor *cycles = constant(&graph, 1, 1, 40, NULL);
    for (int i = 0; i < 40; i++)   /* whole cycles are taken off without rounding, however many there are */
        cycles->value[i] = (real)(128 * (i - 20) + 0.05 * i);
    const Tensor *s = sine(cycles), *c = cosine(cycles);
    for (size_t i = 0; i < 40; i++) {
        check_near(at(s, i), sine_of(at(cycles, i)), 4 * EPS, "sine", i);
        check_near(at(c, i), cosine_of(at(cycles, i)), 4 * EPS, "cosine", i);
    }
}

/* What elementwise operators and sums make is kept in double beside its value. */
static void test_numbers(void) {
    const unsigned char k = 100;
    Tensor *a = number(&graph, 1.0 / 3), *b = number(&graph, 0.7), *image = normal(2, 2, 4);
    const Tensor *results[] = {
        add(a, b), sub(a, b), mul(a, b), affine(0.1, a, 1.0 / 7), with_tangent(a, b), exponential(a),
        exponential_minus_1(a), reciprocal(a), square_root(a), absolute(a), logistic(a), softplus(a),
        hyperbolic_tangent(a), swish(a), sine(a), cosine(a), sum(image), squared_norm(image), sum(a),
        squared_norm(a), level_likelihood(a, b, &k), multiples(a, (const double[]){0.3}, 1),
    };
    for (size_t i = 0; i < sizeof results / sizeof results[0]; i++)
        CHECK((IN_DOUBLE || results[i]->exact) && (real)number_of(results[i]) == results[i]->value[0],
              "number %zu is %.17g, in double %.17g", i, at(results[i], 0), number_of(results[i]));
    CHECK(number_of(sub(a, b)) == 1.0 / 3 - 0.7 && number_of(exponential(a)) == exp(1.0 / 3),
          "digits beyond real's");
}

static void test_sums(void) {
    Tensor *x = normal(7, 5, 3);
    double added = 0, squares = 0, magnitude = 0;
    for (size_t i = 0; i < element_count(x); i++)
        added += at(x, i), magnitude += fabs(at(x, i)), squares += at(x, i) * at(x, i);
    /* Sums are kept in double: one rounding, and in double as many as there are terms. */
    const double rounding = (double)element_count(x) * DBL_EPSILON;
    check_near(at(sum(x), 0), added, rounding * magnitude + EPS * fabs(added), "sum", 0);
    check_near(at(squared_norm(x), 0), squares, (rounding + EPS) * squares, "squared_norm", 0);
}

/* ---- linear maps ---- */

static const real *values_of(const Tensor *a) { return a ? a->value : NULL; }

static int same_values(const Tensor *got, const real *want) {
    return memcmp(got->value, want, element_count(got) * sizeof(real)) == 0;
}

static real *memory(const Tensor *like) {
    return arena_allocate(graph.arena, element_count(like), sizeof(real));
}

static void check_convolve(int h, int w, int in, int out, int taps, int with_bias, int with_residual) {
    Tensor *x = normal(h, w, in), *kernel = normal(taps, in, out);
    Tensor *bias = with_bias ? normal(1, 1, out) : NULL, *residual = with_residual ? normal(h, w, out) : NULL;
    const Tensor *y = convolve(x, kernel, bias, residual);
    real *want = memory(y);
    if (taps == 9)
        convolve3x3_fast(h, w, in, out, x->value, kernel->value, values_of(bias), values_of(residual), want,
                         graph.arena);
    else
        matrix_product(h * w, in, out, x->value, kernel->value, values_of(bias), values_of(residual), want,
                       graph.arena);
    CHECK(has_shape(y, h, w, out) && same_values(y, want), "convolution %dx%d, %d to %d, %d taps", h, w, in,
          out, taps);
}

static void test_convolve(void) {
    check_convolve(1, 1, 1, 1, 9, 0, 0);
    check_convolve(5, 7, 3, 17, 9, 1, 1);
    check_convolve(3, 13, 5, 41, 9, 0, 1);
    check_convolve(14, 15, 20, 33, 9, 1, 1);
    check_convolve(1, 1, 19, 7, 1, 1, 0);
    check_convolve(5, 3, 6, 33, 1, 1, 1);
    Tensor *x = normal(16, 16, 16), *kernel = normal(9, 16, 16);
    graph.plain_sums = 1;
    const Tensor *plain = convolve(x, kernel, NULL, NULL);
    graph.plain_sums = 0;
    real *want = memory(plain);
    convolve3x3(16, 16, 16, 16, x->value, kernel->value, NULL, NULL, want, graph.arena);
    CHECK(same_values(plain, want), "plain sums");
    CHECK(!same_values(convolve(x, kernel, NULL, NULL), want), "the two ways round differently");
}

/* y[2i+a][2j+b] = x[i][j] kernel[a][b] + bias */
static void test_upsample(void) {
    for (int with_bias = 0; with_bias < 2; with_bias++) {
        Tensor *x = normal(3, 2, 5), *kernel = normal(4, 5, 33), *bias = with_bias ? normal(1, 1, 33) : NULL;
        const Tensor *y = upsample(x, kernel, bias);
        CHECK(has_shape(y, 6, 4, 33), "shape of an upsampling");
        for (int tap = 0; tap < 4; tap++) {
            real want[6 * 33];
            matrix_product(6, 5, 33, x->value, kernel->value + tap * 5 * 33, values_of(bias), NULL, want,
                           graph.arena);
            for (int i = 0; i < 6; i++)
                CHECK(memcmp(y->value + ((i / 2 * 2 + tap / 2) * 4 + i % 2 * 2 + tap % 2) * 33, want + i * 33,
                             33 * sizeof(real)) == 0,
                      "upsampling: tap %d of pixel %d", tap, i);
        }
    }
}

/* a b,  0.3 a b^T,  and softmax(q k^T / sqrt(n)) by rows. */
static void test_matrices(void) {
    enum { ROWS = 6, N = 7, COLUMNS = 5 };
    Tensor *a = normal(3, 2, N), *b = normal(N, 1, COLUMNS), *bt = normal(COLUMNS, 1, N);
    const Tensor *ab = matrix_multiply(1, a, b, 0), *outer = matrix_multiply(0.3, a, bt, 1),
                 *weights = attention_weights(a, bt);
    CHECK(has_shape(ab, 3, 2, COLUMNS) && has_shape(outer, 3, 2, COLUMNS) &&
          has_shape(weights, 3, 2, COLUMNS), "shapes of matrix products");
    real *p = memory(weights);
    for (int at_y = 0; at_y < ROWS * COLUMNS; at_y++) {
        double sum = 0, outer_sum = 0, magnitude = 0;
        for (int k = 0; k < N; k++) {
            const double ak = at(a, (size_t)at_y / COLUMNS * N + (size_t)k);
            const double bk = at(b, (size_t)k * COLUMNS + (size_t)at_y % COLUMNS);
            const double btk = at(bt, (size_t)at_y % COLUMNS * N + (size_t)k);
            sum += ak * bk, outer_sum += ak * btk, magnitude += fabs(ak) * (fabs(bk) + fabs(btk));
        }
        check_near(at(ab, (size_t)at_y), sum, N * EPS * magnitude, "matrix_multiply", (size_t)at_y);
        check_near(at(outer, (size_t)at_y), 0.3 * outer_sum, N * EPS * magnitude, "times a transpose",
                   (size_t)at_y);
        p[at_y] = (real)(outer_sum / sqrt(N));
    }
    softmax_rows(p, ROWS, COLUMNS);
    for (size_t i = 0; i < ROWS * COLUMNS; i++)   /* exponents up to about 5 carry n EPS each */
        check_near(at(weights, i), (double)p[i], 8 * N * EPS, "attention_weights", i);
}

/* softmax(q k^T / sqrt(n)) v. Its weights are kept for a backward, or made a few rows at a time, to the same
 * bits. */
static void test_attention(void) {
    enum { ROWS = 70, N = 5, COLUMNS = 33, CHANNELS = 6 };
    Tensor *q = normal(10, 7, N), *k = normal(COLUMNS, 1, N), *v = normal(COLUMNS, 1, CHANNELS);
    const size_t before = graph.bytes;
    const Tensor *few = attend(q, k, v), *weights = attention_weights(q, k);
    const size_t bytes = graph.bytes;
    real *gradient = allocate_zeroed(ROWS * N, sizeof(real));
    const Tensor *kept = attend(parameter(&graph, 10, 7, N, q->value, NULL, gradient), k, v);
    CHECK(has_shape(few, 10, 7, CHANNELS) && same_values(few, kept->value), "attention without a backward");
    CHECK(!few->saved && kept->saved && graph.bytes - bytes == (CHANNELS + COLUMNS) * ROWS * sizeof(real) &&
              bytes - before == (CHANNELS + 2 * COLUMNS) * ROWS * sizeof(real),
          "attention keeps its weights for a backward only");
    for (size_t i = 0; i < ROWS * CHANNELS; i++) {
        double sum = 0, magnitude = 0;
        for (size_t j = 0; j < COLUMNS; j++) {
            const double term = at(weights, i / CHANNELS * COLUMNS + j) * at(v, j * CHANNELS + i % CHANNELS);
            sum += term, magnitude += fabs(term);
        }
        /* exponents as in test_matrices(), scaled in another order */
        check_near(at(few, i), sum, (16 * N + COLUMNS) * EPS * magnitude, "attend", i);
    }
    free(gradient);
}

/* ---- layers and shapes ---- */

static void check_normalise(int h, int w, int channels, int kind) {
    real mean[32], rstd[32];
    graph.dropout = 0.25;
    graph.dropout_stream = random_stream(5, RANDOM_DROPOUT, 3, 2);
    graph.dropout_position = DROPOUT_RUN;
    Tensor *x = normal(h, w, channels), *scale = normal(1, 1, channels), *bias = normal(1, 1, channels);
    const Tensor *y = normalise(x, scale, bias, kind);
    const size_t used = graph.dropout_position - DROPOUT_RUN;
    real *want = memory(y), *factor = memory(y);
    random_dropout(graph.dropout_stream, DROPOUT_RUN, element_count(x), 0.25, factor);
    const GroupNorm n = {h * w, channels, group_count(channels), kind != NORM_ONLY, scale->value, bias->value,
                         kind == NORM_SWISH_DROPOUT ? factor : NULL, mean, rstd};
    group_norm(&n, x->value, want, graph.arena);
    CHECK(has_shape(y, h, w, channels) && same_values(y, want), "normalise %dx%dx%d, kind %d", h, w, channels,
          kind);
    CHECK(kind == NORM_SWISH_DROPOUT ? used >= element_count(x) : used == 0,
          "kind %d took %zu numbers for dropout", kind, used);
}

static void test_normalise(void) {
    CHECK(group_count(4) == 1 && group_count(20) == 5 && group_count(128) == 32 && group_count(256) == 32,
          "group counts");
    CHECK(group_count(132) == 0 && group_count(3) == 0, "group counts that do not come out even");
    for (int kind = NORM_ONLY; kind <= NORM_SWISH_DROPOUT; kind++) {
        check_normalise(1, 1, 4, kind);
        check_normalise(3, 5, 20, kind);
        check_normalise(2, 1, 256, kind);
    }
}

static void test_shapes(void) {
    Tensor *a = normal(3, 2, 4), *b = normal(3, 2, 7);
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
    Tensor *x = normal(4, 6, 3);
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
    backward(sum(max_pool(parameter(&graph, 2, 2, 1, equal, NULL, gradient))), 1);
    CHECK(gradient[0] == 1 && gradient[1] == 0 && gradient[2] == 0 && gradient[3] == 0, "max_pool of equals");
}

/* ---- losses ---- */

static void test_likelihood(void) {
    enum { COUNT = 24 };
    for (int v = 0; v < 3; v++) {
        unsigned char k[COUNT], likely[COUNT], drawn[COUNT];
        real du[COUNT];
        double exact[COUNT], by_precision;
        const RandomStream draws = random_stream(11, RANDOM_CHECK, 2, 0);
        Tensor *log_variance = number(&graph, (double[3]){-13.3, -8, -2}[v]);
        Tensor *u = affine(exp(number_of(log_variance) / 2), normal(2, 3, 4), 0.1);
        const double precision = exp(-number_of(log_variance));
        level_choose(u, log_variance, NULL, likely);
        level_choose(u, log_variance, &draws, drawn);
        for (uint32_t i = 0; i < COUNT; i++) {
            exact[i] = u->exact ? u->exact[i] : at(u, i);
            k[i] = (unsigned char)(nearest_level(exact[i]) ^ (int)(i % 4));
            CHECK(likely[i] == nearest_level(exact[i]) &&
                      drawn[i] == level_draw(exact[i], precision, random_uniform(draws, i)),
                  "level_choose at %g: %d and %d", exact[i], likely[i], drawn[i]);
        }
        const double want = level_softmax(COUNT, exact, k, precision, du, &by_precision);
        CHECK(number_of(level_likelihood(u, log_variance, k)) == want, "level_likelihood: not %g", want);
    }
}

/* ---- tangents and reverse mode ---- */

static void test_tangents(void) {
    Tensor *a = normal(2, 2, 4), *a_dot = normal(2, 2, 4), *carrier = with_tangent(a, a_dot);
    CHECK(carrier->tangent == a_dot && memcmp(carrier->value, a->value, 16 * sizeof(real)) == 0,
          "with_tangent");
    CHECK(without_tangent(carrier)->tangent == NULL && without_tangent(a) == a, "without_tangent");
    CHECK(swish(a)->tangent == NULL && add(a, a_dot)->tangent == NULL, "no tangent comes of none");
    const Tensor *y = swish(mul(carrier, carrier));
    CHECK(y->tangent && !y->tangent->tangent, "a tangent has no tangent of its own");
    CHECK(!mul(carrier, without_tangent(carrier))->tangent->needs_gradient,
          "constants need no gradient, nor their tangents");
}

static void test_backward(void) {
    const real values[3] = {1, 2, 3};
    real gradient[3] = {10, 20, 30};
    Tensor *p = parameter(&graph, 1, 1, 3, values, NULL, gradient);
    backward(squared_norm(p), 0.5);
    CHECK(gradient[0] == 11 && gradient[1] == 22 && gradient[2] == 33,
          "backward adds weight times the gradient");
    backward(sum(p), 2);
    CHECK(gradient[0] == 13 && gradient[1] == 24 && gradient[2] == 35,
          "a second backward in the same graph adds again");
    backward(sum(normal(1, 1, 3)), 1);   /* nothing to do, and no harm */
    Tensor *used_often = affine(1, p, 0), *hundredfold = used_often;
    for (int i = 0; i < 99; i++)
        hundredfold = add(hundredfold, used_often);
    backward(sum(hundredfold), 1);
    CHECK(gradient[0] == 113 && gradient[2] == 135, "a tensor used a hundred times: %g", (double)gradient[0]);
}

/* Gradients are given back during the sweep: a chain of a thousand tensors does with a few of them. */
static void test_memory(void) {
    enum { LENGTH = 1000, COUNT = 4096 };
    real *values = allocate_zeroed(COUNT, sizeof(real)), *gradient = allocate_zeroed(COUNT, sizeof(real));
    Tensor *x = parameter(&graph, 1, 1, COUNT, values, NULL, gradient);
    for (int i = 0; i < LENGTH; i++)
        x = affine(1, x, 0.5);
    Tensor *result = sum(x);
    CHECK(graph.bytes == ((size_t)LENGTH * COUNT + 1) * sizeof(real),
          "a graph knows how many bytes its values take");
    const ArenaMark before = arena_mark(graph.arena);
    backward(result, 1);
    const ArenaMark after = arena_mark(graph.arena);
    CHECK(before.block == after.block && after.used - before.used <= 4 * COUNT * sizeof(real),
          "the sweep of a chain takes the memory of a few gradients");
    CHECK(gradient[0] == 1 && gradient[COUNT - 1] == 1, "the gradient of a long chain is %g",
          (double)gradient[0]);
    free(values), free(gradient);
}

static void test_shapes_only(void) {
    graph.shapes_only = 1;
    graph_begin(&graph, graph.arena);
    Tensor *x = constant(&graph, 1024, 1024, 64, NULL),
           *kernel = parameter(&graph, 9, 64, 8, NULL, NULL, NULL);
    Tensor *y = with_tangent(convolve(x, kernel, NULL, NULL), constant(&graph, 1024, 1024, 8, NULL));
    y = max_pool(normalise(y, constant(&graph, 1, 1, 8, NULL), constant(&graph, 1, 1, 8, NULL), NORM_SWISH));
    CHECK(has_shape(y, 512, 512, 8) && y->value == NULL && has_shape(y->tangent, 512, 512, 8),
          "shapes without values");
    CHECK(arena_capacity(graph.arena) < 8 << 20, "shapes take no memory for values");
}

static void test_clock(void) {
    OperatorTime times[MOST_OPERATORS] = {{0}};
    graph.times = times;
    Tensor *x = normal(28, 28, 16);
    convolve(swish(x), normal(9, 16, 16), NULL, x);
    CHECK(strcmp(times[0].op->name, "function") == 0 && strcmp(times[1].op->name, "convolution") == 0,
          "operators are timed as they come");
    CHECK(!times[2].op, "and no others");
    CHECK(times[1].seconds[0] > 0 && times[1].seconds[1] == 0, "forward and backward are timed apart");
}

/* ---- derivatives ---- */

static void test_derivatives(void) {
    for (int i = 0; i < operator_count(); i++) {
        const Subject s = operator_subject(i);
        const DerivativeErrors e = derivative_errors(&s, 64, 1000 + (uint64_t)i);
        const double errors[3] = {e.gradient, e.tangent, e.through_tangent};
        static const char *const of[3] = {"gradient", "tangent", "gradient through the tangent"};
        for (int k = 0; k < 3; k++)
            CHECK(errors[k] <= derivative_limit(), "%s (row %d): %s off by %g", operator_title(i), i, of[k],
                  errors[k]);
    }
}

int main(void) {
    static void (*const tests[])(void) = {
        test_leaves, test_arithmetic, test_functions, test_numbers, test_sums, test_convolve,
        test_upsample, test_matrices, test_attention, test_normalise, test_shapes, test_likelihood,
        test_tangents, test_backward, test_memory, test_shapes_only, test_clock, test_derivatives};
    for (size_t i = 0; i < sizeof tests / sizeof tests[0]; i++) {
        Arena *arena = arena_new();
        graph = (Graph){0};
        graph_begin(&graph, arena);
        tests[i]();
        arena_free(arena);
    }
    return test_report();
}
