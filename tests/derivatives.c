/* derivatives.c - proving derivatives against differences; see derivatives.h. */

#include "derivatives.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- differences ---- */

/* Steps FIRST_STEP * scale, and each half of the one before. With n of them the error of the extrapolation is
 * of order step^(2n); that of rounding is the roundoff of the values divided by the last step. */
#ifdef DIFFENC_DOUBLE
enum { STEPS = 4 };
static const double FIRST_STEP = 1.0 / 16;
#else
enum { STEPS = 2 };
static const double FIRST_STEP = 1.0 / 8;
#endif

double larger(double a, double b) { return a > b || isnan(a) ? a : b; }

double derivative_limit(void) { return IN_DOUBLE ? 1e-7 : 3e-2; }

/* The result F of a network carries a roundoff of about 1e-14 F (1e-6 F in float), which division by the last
 * step raises to 1e-12 F (1e-5 F). A derivative below this much of F can therefore not be compared to within
 * the limit. */
double derivative_floor(void) { return IN_DOUBLE ? 1e-4 : 1e-2; }

/* Derivatives from steps first, first/2, ... extrapolated to zero, and their errors: how far the last two
 * orders are apart, and the roundoff of the path's values divided by the last step. Returns for how many the
 * former is the trouble, which shorter steps may cure. */
static size_t extrapolate(Path path, void *context, size_t count, double first, double *derivative,
                          double *error) {
    const double roundoff = IN_DOUBLE ? 1e-14 : 1e-6;
    double *at[STEPS], *minus = allocate(count, sizeof(double)), square = 0;
    size_t apart = 0;
    for (int k = 0; k < STEPS; k++) {
        const double step = first / (1 << k);
        at[k] = allocate(count, sizeof(double));
        path(context, step, at[k]);
        path(context, -step, minus);
        for (size_t i = 0; i < count; i++) {
            error[i] = roundoff * fabs(minus[i]) / step;
            at[k][i] = (at[k][i] - minus[i]) / (2 * step);
        }
    }
    for (int order = 1; order < STEPS; order++)   /* the error's term in step^(2 order) is cancelled */
        for (int k = STEPS - 1; k >= order; k--)
            for (size_t i = 0; i < count; i++)
                at[k][i] += (at[k][i] - at[k - 1][i]) / (pow(4, order) - 1);
    for (size_t i = 0; i < count; i++)
        square += at[STEPS - 1][i] * at[STEPS - 1][i] / (double)count;
    for (size_t i = 0; i < count; i++) {
        const double change = fabs(at[STEPS - 1][i] - at[STEPS - 2][i]);
        apart += change > error[i] + 1e-9 * sqrt(square);
        error[i] += change;
        derivative[i] = at[STEPS - 1][i];
    }
    for (int k = 0; k < STEPS; k++)
        free(at[k]);
    free(minus);
    return apart;
}

/* Where the path has a kink near by - the largest of four pixels changes - the orders disagree, and shorter
 * steps are tried. Each number keeps the value with the smallest error. */
void differentiate(Path path, void *context, size_t count, double scale, double *derivative, double *error) {
    enum { SHORTER = 8 };
    const int attempts = IN_DOUBLE ? 5 : 1;   /* float has no digits to spare for shorter steps */
    double *other = allocate(2 * count, sizeof(double)), *other_error = other + count;
    double step = FIRST_STEP * scale;
    size_t apart = extrapolate(path, context, count, step, derivative, error);
    for (int attempt = 1; attempt < attempts && apart > 0; attempt++) {
        apart = extrapolate(path, context, count, step /= SHORTER, other, other_error);
        for (size_t i = 0; i < count; i++)
            if (other_error[i] < error[i]) {
                derivative[i] = other[i];
                error[i] = other_error[i];
            }
    }
    free(other);
}

/* ---- evaluating a subject ---- */

/* A run of the point: a leaf's values, a leaf's tangent, or a parameter. */
typedef struct { size_t first, count; double scale; int is_tangent; } Segment;

typedef struct {
    const Subject *subject;
    Network *network;
    Graph *graph, own_graph;
    Arena *own_arena, *memory;     /* of the graph, and of what stands here */
    Segment *segment;
    int leaves, segments;
    size_t values, count;          /* numbers in the leaves' values, and in the whole point */
    real *point, *moved;           /* [count] */
    real *gradient;                /* [count] */
    double *direction;             /* [count] */
    real *projection;              /* [result]: a random functional that makes a number of the result */
    double size;                   /* the larger of that number and the Euclidean norm of its terms */
    size_t result;                 /* elements of the result */
    int of_tangent;                /* it is the tangent of the result that is looked at */
    double worst, errors, derivatives;   /* comparisons: the largest error, and sums of squares */
} Probe;

static size_t leaf_size(const Leaf l) { return (size_t)(l[LEAF_HEIGHT] * l[LEAF_WIDTH] * l[LEAF_CHANNELS]); }

/* Part `at` of the point, in the shape of a leaf. */
static Tensor *part(Graph *graph, const Leaf l, const real *point, real *gradient, size_t at) {
    return parameter(graph, (int)l[LEAF_HEIGHT], (int)l[LEAF_WIDTH], (int)l[LEAF_CHANNELS], point + at, NULL,
                     gradient ? gradient + at : NULL);
}

Graph *network_restart(Network *network, const real *weights, real *gradient) {
    network->weights = weights;
    network->gradient = gradient;
    network->transposed = NULL;
    network->graph.dropout = 0;
    network_begin(network);
    return &network->graph;
}

/* The result, or its tangent, at a point; backward() will add to `gradient`, unless that is NULL. */
static Tensor *run_subject(Probe *p, const real *point, real *gradient) {
    const Subject *s = p->subject;
    Tensor *leaf[MAX_LEAVES] = {NULL};
    size_t at = 0, tangent_at = p->values;
    if (p->network) {
        const size_t weights = p->count - p->network->model->weight_count;
        network_restart(p->network, point + weights, gradient ? gradient + weights : NULL);
    } else
        graph_begin(p->graph, p->own_arena);
    p->graph->dropout = s->dropout;
    p->graph->dropout_stream = random_stream(7, RANDOM_DROPOUT, 0, 0);
    for (int i = 0; i < p->leaves; i++) {
        leaf[i] = part(p->graph, s->leaf[i], point, gradient, at);
        at += leaf_size(s->leaf[i]);
        if (s->leaf[i][LEAF_TANGENT]) {
            leaf[i] = with_tangent(leaf[i], part(p->graph, s->leaf[i], point, gradient, tangent_at));
            tangent_at += leaf_size(s->leaf[i]);
        }
    }
    Tensor *y = s->build(s, p->graph, leaf);
    return p->of_tangent ? y->tangent : y;
}

/* The result at point + e direction. */
static const Tensor *evaluate_along(Probe *p, double e) {
    for (size_t i = 0; i < p->count; i++)
        p->moved[i] = (real)(p->point[i] + e * p->direction[i]);
    return run_subject(p, p->moved, NULL);
}

static void values_along(void *context, double e, double *value) {
    Probe *p = context;
    const Tensor *y = evaluate_along(p, e);
    for (size_t i = 0; i < p->result; i++)
        value[i] = (double)y->value[i];
}

static void projection_along(void *context, double e, double *value) {
    Probe *p = context;
    *value = dot(p->projection, evaluate_along(p, e)->value, p->result);
}

/* ---- a probe ---- */

static void add_segment(Probe *p, size_t count, double scale, int is_tangent) {
    const Segment s = {p->count, count, scale > 0 ? scale : 1, is_tangent};
    p->segment[p->segments++] = s;
    p->count += count;
}

static void add_segments(Probe *p) {
    const Subject *s = p->subject;
    const int parameters = p->network ? p->network->model->parameter_count : 0;
    p->segment = arena_allocate(p->memory, 2 * MAX_LEAVES + (size_t)parameters, sizeof *p->segment);
    for (; p->leaves < MAX_LEAVES && s->leaf[p->leaves][LEAF_HEIGHT] > 0; p->leaves++)
        add_segment(p, leaf_size(s->leaf[p->leaves]), s->leaf[p->leaves][LEAF_SCALE], 0);
    p->values = p->count;
    for (int i = 0; i < p->leaves; i++)
        if (s->leaf[i][LEAF_TANGENT])
            add_segment(p, leaf_size(s->leaf[i]), 1, 1);
    for (int i = 0; i < parameters; i++)
        add_segment(p, p->network->model->parameter[i].count, s->weight_scale, 0);
}

/* Leaves from their ranges, tangents normal, weights the model's. */
static void set_point(Probe *p, uint64_t seed) {
    const RandomStream uniform = random_stream(seed, RANDOM_CHECK, 0, 0);
    random_normal(random_stream(seed, RANDOM_CHECK, 1, 0), p->point, p->count);
    for (int i = 0; i < p->leaves; i++) {
        const double *l = p->subject->leaf[i];
        const int given = l[LEAF_LOW] < l[LEAF_HIGH];
        const double low = given ? l[LEAF_LOW] : -1.5, high = given ? l[LEAF_HIGH] : 1.5;
        for (size_t j = p->segment[i].first; j < p->segment[i].first + p->segment[i].count; j++)
            p->point[j] = (real)(low + (high - low) * random_uniform(uniform, (uint32_t)j));
    }
    if (p->network) {
        const Model *m = p->network->model;
        memcpy(p->point + p->count - m->weight_count, m->params, m->weight_count * sizeof(real));
    }
}

static void set_projection(Probe *p, uint64_t seed) {
    const Tensor *y = run_subject(p, p->point, NULL);
    p->result = element_count(y);
    p->projection = arena_allocate(p->memory, p->result, sizeof(real));
    random_normal(random_stream(seed, RANDOM_CHECK, 2, (uint32_t)p->of_tangent), p->projection, p->result);
    if (p->result == 1)
        p->projection[0] = 1;
    p->size = 0;
    for (size_t i = 0; i < p->result; i++)
        p->size += pow((double)p->projection[i] * (double)y->value[i], 2);
    p->size = fmax(sqrt(p->size), fabs(dot(p->projection, y->value, p->result)));
}

static void set_gradient(Probe *p) {
    memset(p->gradient, 0, p->count * sizeof(real));
    Tensor *y = run_subject(p, p->point, p->gradient);
    backward(sum(mul(y, constant(p->graph, y->height, y->width, y->channels, p->projection))), 1);
}

static void probe_begin(Probe *p, const Subject *subject, uint64_t seed) {
    memset(p, 0, sizeof *p);
    p->subject = subject;
    p->network = subject->network;
    p->graph = p->network ? &p->network->graph : &p->own_graph;
    p->own_arena = arena_new(), p->memory = arena_new();
    add_segments(p);
    p->point = arena_allocate(p->memory, p->count, sizeof(real));
    p->moved = allocate(p->count, sizeof(real));   /* of this size exactly: a sanitizer sees who reads */
    p->gradient = allocate(p->count, sizeof(real));   /* or writes beyond the end */
    p->direction = arena_allocate(p->memory, p->count, sizeof(double));
    set_point(p, seed);
}

/* ---- comparing ---- */

enum { DIRECTIONS = 4 };   /* tries */

/* Of the comparisons made so far. In double the worst one counts; in float, where differences leave a few
 * digits, the Euclidean norm of all errors relative to that of all derivatives. */
static double result_of(const Probe *p) {
    return IN_DOUBLE ? p->worst : sqrt(p->errors / larger(p->derivatives, 1e-300));
}

/* One comparison, relative to the largest of |measured| and `least`. Returns 0 and leaves it out where the
 * measurement itself is not good to a third of the limit, because of a kink too near; that is judged without
 * looking at what is claimed. */
static int compare(Probe *p, double claimed, double measured, double measurement_error, double least) {
    const double size = larger(larger(fabs(measured), least), 1e-300), error = fabs(claimed - measured);
    if (IN_DOUBLE && measurement_error > derivative_limit() / 3 * size)
        return 0;
    p->worst = larger(error / size, p->worst);
    p->errors += error * error;
    p->derivatives += size * size;
    return 1;
}

/* Gradient times direction against the difference along it. */
static int compare_along(Probe *p, double typical) {
    double claimed = 0, measured, measurement_error;
    for (size_t i = 0; i < p->count; i++)
        claimed += (double)p->gradient[i] * p->direction[i];
    differentiate(projection_along, p, 1, 1, &measured, &measurement_error);
    return compare(p, claimed, measured, measurement_error, larger(typical, derivative_floor() * p->size));
}

/* A segment's part of a random direction, whose length is the segment's scale. */
static void choose_direction(Probe *p, const Segment *s, RandomStream stream) {
    const double length = s->scale * sqrt(12.0 / (double)s->count);
    for (size_t i = 0; i < s->count; i++)
        p->direction[s->first + i] = length * (random_uniform(stream, (uint32_t)i) - 0.5);
}

/* Some elements of one segment, then random directions within it until one can be measured. Returns how many
 * could. */
static int compare_segment(Probe *p, const Segment *s, int samples, RandomStream stream) {
    const double norm = sqrt(dot(p->gradient + s->first, p->gradient + s->first, s->count));
    const double typical = s->scale * norm / sqrt((double)s->count);   /* root mean square */
    const int all = s->count <= (size_t)samples;
    int known = 0, done = 0;
    memset(p->direction, 0, p->count * sizeof(double));
    for (int i = 0; i < (all ? (int)s->count : samples); i++) {
        const size_t at = s->first + (all ? (size_t)i : random_bits(stream, (uint32_t)i) % s->count);
        p->direction[at] = s->scale;
        known += compare_along(p, typical);
        p->direction[at] = 0;
    }
    for (int i = 0; i < DIRECTIONS && !done; i++, stream.step++) {
        choose_direction(p, s, stream);
        known += done = compare_along(p, typical);
    }
    return known;
}

/* The gradient of the result or of its tangent: every segment by itself, then all of them at once. */
static double gradient_error(Probe *p, int samples, uint64_t seed) {
    int done = 0;
    p->worst = p->errors = p->derivatives = 0;
    set_projection(p, seed);
    set_gradient(p);
    for (int i = 0; i < p->segments; i++) {
        const Segment *s = &p->segment[i];
        if (s->is_tangent && !p->of_tangent)
            continue;
        if (!compare_segment(p, s, samples, random_stream(seed, RANDOM_CHECK, 100, (uint32_t)i)))
            return INFINITY;
    }
    for (int k = 0; k < DIRECTIONS && !done; k++) {
        for (int i = 0; i < p->segments; i++)
            choose_direction(p, &p->segment[i],
                             random_stream(seed, RANDOM_CHECK, 200 + (uint32_t)k, (uint32_t)i));
        done = compare_along(p, 0);
    }
    return done ? result_of(p) : INFINITY;
}

/* Every element of the result's tangent against the difference of the result along the tangents of the
 * leaves. */
static double tangent_error(Probe *p) {
    double scale = 1, mean_square = 0;
    int known = 0;
    const Tensor *y = run_subject(p, p->point, NULL);
    if (!y->tangent)   /* INFINITY where a leaf has one: an operator may not drop it */
        return p->segments > p->leaves && p->segment[p->leaves].is_tangent ? INFINITY : -1;
    double *tangent = arena_allocate(p->memory, 3 * p->result, sizeof(double));
    double *measured = tangent + p->result, *error = measured + p->result;
    for (size_t i = 0; i < p->result; i++)
        tangent[i] = (double)y->tangent->value[i];
    memset(p->direction, 0, p->count * sizeof(double));
    for (int i = 0, t = p->leaves; i < p->leaves; i++)
        if (p->subject->leaf[i][LEAF_TANGENT]) {
            scale = p->segment[i].scale < scale ? p->segment[i].scale : scale;
            for (size_t j = 0; j < p->segment[i].count; j++)
                p->direction[p->segment[i].first + j] = (double)p->point[p->segment[t].first + j];
            t++;
        }
    differentiate(values_along, p, p->result, scale, measured, error);
    for (size_t i = 0; i < p->result; i++)
        mean_square += measured[i] * measured[i] / (double)p->result;
    p->worst = p->errors = p->derivatives = 0;
    for (size_t i = 0; i < p->result; i++)
        known += compare(p, tangent[i], measured[i], error[i], sqrt(mean_square));
    return known ? result_of(p) : INFINITY;
}

DerivativeErrors derivative_errors(const Subject *subject, int samples, uint64_t seed) {
    DerivativeErrors e;
    Probe p;
    probe_begin(&p, subject, seed);
    e.gradient = gradient_error(&p, samples, seed);
    e.tangent = e.through_tangent = tangent_error(&p);
    p.of_tangent = 1;
    if (e.tangent >= 0 && e.tangent < INFINITY)
        e.through_tangent = gradient_error(&p, samples, seed);
    free(p.moved), free(p.gradient), arena_free(p.own_arena), arena_free(p.memory);
    return e;
}

/* ---- every operator ---- */

enum {
    UNARY, BINARY, MUL_ITSELF, AFFINE, CONVOLVE, CONVOLVE_RESIDUAL, CONVOLVE_PLAIN, UPSAMPLE, MATRIX_MULTIPLY,
    MATRIX_TRANSPOSED, NORMALISE, NORMALISE_SWISH, NORMALISE_DROPOUT, ATTEND, MULTIPLES
};

/* a^2 with a tangent given by hand. */
static Tensor *build_square(Tensor *a) {
    Tensor *still = without_tangent(a);
    return with_tangent(mul(still, still), affine(2, mul(still, a->tangent), 0));
}

static Tensor *build_likelihood(Tensor *u, Tensor *log_variance) {
    unsigned char k[64];
    for (int i = 0; i < 64; i++)
        k[i] = (unsigned char)(100 + i % 3);
    return level_likelihood(u, log_variance, k);
}

/* A row of the table below: a function of one or two tensors, or what else is built. Where `same` is not
 * empty, input i of the operator is leaf same[i] - '0' instead of leaf i: one tensor as several inputs. */
typedef struct {
    const char *title;
    int which;
    const char *same;
    Leaf leaf[MAX_LEAVES];
    Tensor *(*unary)(Tensor *a), *(*binary)(Tensor *a, Tensor *b);
} Row;

static Tensor *build_operator(const Subject *s, Graph *graph, Tensor **leaf) {
    const double factors[3] = {64, -0.7, 3};
    const Row *row = s->context;
    Tensor *a[MAX_LEAVES];
    graph->plain_sums = row->which == CONVOLVE_PLAIN;
    for (int i = 0; i < MAX_LEAVES; i++)
        a[i] = i < (int)strlen(row->same) ? leaf[row->same[i] - '0'] : leaf[i];
    switch (row->which) {
    case UNARY: return row->unary(a[0]);
    case BINARY: return row->binary(a[0], a[1]);
    case MUL_ITSELF: return mul(a[0], mul(a[0], add(a[0], a[0])));
    case AFFINE: return affine(-1.7, a[0], 0.4);
    case CONVOLVE: case CONVOLVE_PLAIN: return convolve(a[0], a[1], a[2], a[3]);
    case CONVOLVE_RESIDUAL: return convolve(a[0], a[1], NULL, a[2]);
    case UPSAMPLE: return upsample(a[0], a[1], a[2]);
    case MATRIX_MULTIPLY: return matrix_multiply(1, a[0], a[1], 0);
    case MATRIX_TRANSPOSED: return matrix_multiply(0.3, a[0], a[1], 1);
    case NORMALISE: return normalise(a[0], a[1], a[2], NORM_ONLY);
    case NORMALISE_SWISH: return normalise(a[0], a[1], a[2], NORM_SWISH);
    case NORMALISE_DROPOUT: return normalise(a[0], a[1], a[2], NORM_SWISH_DROPOUT);
    case ATTEND: return attend(a[0], a[1], a[2]);
    default: return multiples(a[0], factors, 3);
    }
}

/* Leaves are {height, width, channels, tangent, low, high, scale}. Where two inputs may carry a tangent, the
 * rows are: the first alone, the second alone, both. Where a tensor is several inputs, they come last. */
static const Row ROWS[] = {
    {"add", BINARY, "", {{3, 5, 7, 1}, {3, 5, 7}}, .binary = add},
    {"add", BINARY, "", {{3, 5, 7}, {3, 5, 7, 1}}, .binary = add},
    {"add", BINARY, "", {{3, 5, 7, 1}, {3, 5, 7, 1}}, .binary = add},
    {"add a number", BINARY, "", {{3, 5, 7, 1}, {1, 1, 1}}, .binary = add},
    {"add a number", BINARY, "", {{3, 5, 7}, {1, 1, 1, 1}}, .binary = add},
    {"add a number", BINARY, "", {{3, 5, 7, 1}, {1, 1, 1, 1}}, .binary = add},
    {"add to a number", BINARY, "", {{1, 1, 1, 1}, {2, 3, 4}}, .binary = add},
    {"add numbers", BINARY, "", {{1, 1, 1, 1}, {1, 1, 1, 1}}, .binary = add},
    {"sub", BINARY, "", {{2, 3, 5, 1}, {2, 3, 5}}, .binary = sub},
    {"sub", BINARY, "", {{2, 3, 5}, {2, 3, 5, 1}}, .binary = sub},
    {"sub", BINARY, "", {{2, 3, 5, 1}, {2, 3, 5, 1}}, .binary = sub},
    {"sub a number", BINARY, "", {{2, 3, 5}, {1, 1, 1, 1}}, .binary = sub},
    {"sub a number", BINARY, "", {{2, 3, 5, 1}, {1, 1, 1, 1}}, .binary = sub},
    {"sub from a number", BINARY, "", {{1, 1, 1}, {2, 3, 5, 1}}, .binary = sub},
    {"sub from a number", BINARY, "", {{1, 1, 1, 1}, {2, 3, 5}}, .binary = sub},
    {"mul", BINARY, "", {{3, 3, 3, 1}, {3, 3, 3}}, .binary = mul},
    {"mul", BINARY, "", {{3, 3, 3}, {3, 3, 3, 1}}, .binary = mul},
    {"mul", BINARY, "", {{3, 3, 3, 1}, {3, 3, 3, 1}}, .binary = mul},
    {"mul by a number", BINARY, "", {{3, 3, 3, 1}, {1, 1, 1}}, .binary = mul},
    {"mul by a number", BINARY, "", {{3, 3, 3}, {1, 1, 1, 1}}, .binary = mul},
    {"mul by a number", BINARY, "", {{3, 3, 3, 1}, {1, 1, 1, 1}}, .binary = mul},
    {"mul a number", BINARY, "", {{1, 1, 1, 1}, {3, 3, 3, 1}}, .binary = mul},
    {"mul numbers", BINARY, "", {{1, 1, 1, 1}, {1, 1, 1, 1}}, .binary = mul},
    {"2 a^3", MUL_ITSELF, "", .leaf = {{3, 2, 4, 1}}},
    {"affine", AFFINE, "", .leaf = {{3, 2, 4, 1}}},
    {"exp", UNARY, "", {{3, 2, 4, 1}}, .unary = exponential},
    {"expm1", UNARY, "", {{3, 2, 4, 1}}, .unary = exponential_minus_1},
    {"softplus", UNARY, "", {{3, 2, 4, 1}}, .unary = softplus},
    {"reciprocal", UNARY, "", {{3, 2, 4, 1, 0.3, 2, 0.2}}, .unary = reciprocal},
    {"sqrt", UNARY, "", {{3, 2, 4, 1, 0.3, 2, 0.2}}, .unary = square_root},
    {"abs, positive", UNARY, "", {{3, 2, 4, 1, 0.3, 2, 0.2}}, .unary = absolute},
    {"abs, negative", UNARY, "", {{3, 2, 4, 1, -2, -0.3, 0.2}}, .unary = absolute},
    {"sigmoid", UNARY, "", {{3, 2, 4, 1}}, .unary = logistic},
    {"tanh", UNARY, "", {{3, 2, 4, 1}}, .unary = hyperbolic_tangent},
    {"swish", UNARY, "", {{3, 2, 4, 1}}, .unary = swish},
    {"sine", UNARY, "", {{3, 2, 4, 1, -2, 2, 0.2}}, .unary = sine},
    {"cosine", UNARY, "", {{3, 2, 4, 1, -2, 2, 0.2}}, .unary = cosine},
    {"sum", UNARY, "", {{3, 5, 2, 1}}, .unary = sum},
    {"squared norm", UNARY, "", {{3, 5, 2, 1}}, .unary = squared_norm},
    {"3x3", CONVOLVE, "", .leaf = {{3, 5, 3, 1}, {9, 3, 5}}},
    {"3x3, one pixel", CONVOLVE, "", .leaf = {{1, 1, 4, 1}, {9, 4, 3}}},
    {"3x3, filtering", CONVOLVE, "", .leaf = {{14, 15, 16, 1}, {9, 16, 17}, {1, 1, 17, 1}, {14, 15, 17, 1}}},
    {"3x3, one line", CONVOLVE, "", .leaf = {{1, 9, 2, 1}, {9, 2, 1}, {1, 1, 1, 1}, {1, 9, 1, 1}}},
    {"3x3, wide", CONVOLVE, "", .leaf = {{4, 13, 17, 1}, {9, 17, 41}, {1, 1, 41}, {4, 13, 41}}},
    {"3x3 + bias", CONVOLVE, "", .leaf = {{7, 4, 5, 1}, {9, 5, 9}, {1, 1, 9}}},
    {"3x3 + bias", CONVOLVE, "", .leaf = {{7, 4, 5}, {9, 5, 9}, {1, 1, 9, 1}}},
    {"3x3 + bias", CONVOLVE, "", .leaf = {{7, 4, 5, 1}, {9, 5, 9}, {1, 1, 9, 1}}},
    {"3x3 + residual", CONVOLVE_RESIDUAL, "", .leaf = {{3, 4, 5, 1}, {9, 5, 6}, {3, 4, 6}}},
    {"3x3 + residual", CONVOLVE_RESIDUAL, "", .leaf = {{3, 4, 5}, {9, 5, 6}, {3, 4, 6, 1}}},
    {"3x3 + bias + residual", CONVOLVE, "", .leaf = {{3, 4, 5}, {9, 5, 6}, {1, 1, 6, 1}, {3, 4, 6, 1}}},
    {"3x3 + itself", CONVOLVE_RESIDUAL, "010", .leaf = {{5, 3, 6, 1}, {9, 6, 6}}},
    {"3x3 of itself", CONVOLVE, "00", .leaf = {{9, 4, 4}}},
    {"3x3, filtering, of itself", CONVOLVE, "00", .leaf = {{9, 22, 22}}},
    {"3x3, plain sums", CONVOLVE_PLAIN, "",
     .leaf = {{14, 15, 16, 1}, {9, 16, 17}, {1, 1, 17, 1}, {14, 15, 17, 1}}},
    {"1x1", CONVOLVE, "", .leaf = {{3, 5, 7, 1}, {1, 7, 3}}},
    {"1x1 + bias + residual", CONVOLVE, "", .leaf = {{5, 3, 6, 1}, {1, 6, 33}, {1, 1, 33, 1}, {5, 3, 33, 1}}},
    {"1x1 + bias", CONVOLVE, "", .leaf = {{1, 1, 19}, {1, 19, 8}, {1, 1, 8, 1}}},
    {"1x1 + itself", CONVOLVE_RESIDUAL, "010", .leaf = {{2, 3, 5, 1}, {1, 5, 5}}},
    {"1x1 + itself", CONVOLVE, "0100", .leaf = {{1, 1, 5, 1}, {1, 5, 5}}},
    {"1x1 of itself", CONVOLVE, "00", .leaf = {{1, 4, 4}}},
    {"upsample", UPSAMPLE, "", .leaf = {{3, 2, 5, 1}, {4, 5, 7}}},
    {"upsample of itself", UPSAMPLE, "00", .leaf = {{4, 3, 3}}},
    {"upsample + itself", UPSAMPLE, "010", .leaf = {{1, 1, 5}, {4, 5, 5}}},
    {"upsample + bias", UPSAMPLE, "", .leaf = {{1, 5, 9, 1}, {4, 9, 3}, {1, 1, 3}}},
    {"matrix product", MATRIX_MULTIPLY, "", .leaf = {{3, 2, 7, 1}, {7, 1, 5}}},
    {"matrix product", MATRIX_MULTIPLY, "", .leaf = {{3, 2, 7}, {7, 1, 5, 1}}},
    {"matrix product", MATRIX_MULTIPLY, "", .leaf = {{3, 2, 9, 1}, {3, 3, 18, 1}}},
    {"matrix square", MATRIX_MULTIPLY, "00", .leaf = {{5, 1, 5, 1}}},
    {"0.3 a b^T", MATRIX_TRANSPOSED, "", .leaf = {{3, 3, 4, 1}, {2, 3, 4}}},
    {"0.3 a b^T", MATRIX_TRANSPOSED, "", .leaf = {{3, 3, 4}, {2, 3, 4, 1}}},
    {"0.3 a b^T", MATRIX_TRANSPOSED, "", .leaf = {{3, 3, 13, 1}, {5, 3, 13, 1}}},
    {"0.3 a a^T", MATRIX_TRANSPOSED, "00", .leaf = {{3, 1, 4, 1}}},
    {"group norm", NORMALISE, "", .leaf = {{3, 5, 12, 1}, {1, 1, 12}, {1, 1, 12}}},
    {"group norm, one position", NORMALISE, "", .leaf = {{1, 1, 8, 1}, {1, 1, 8}, {1, 1, 8}}},
    {"group norm, 256 channels", NORMALISE_SWISH, "", .leaf = {{1, 2, 256, 1}, {1, 1, 256}, {1, 1, 256}}},
    {"group norm, swish", NORMALISE_SWISH, "", .leaf = {{4, 3, 20, 1}, {1, 1, 20}, {1, 1, 20}}},
    {"group norm, swish, dropout", NORMALISE_DROPOUT, "", .leaf = {{5, 3, 20, 1}, {1, 1, 20}, {1, 1, 20}}},
    {"group norm, one group", NORMALISE_DROPOUT, "", .leaf = {{5, 5, 4, 1}, {1, 1, 4}, {1, 1, 4}}},
    {"attention weights", BINARY, "", {{3, 3, 4, 1}, {3, 3, 4}}, .binary = attention_weights},
    {"attention weights", BINARY, "", {{3, 3, 4}, {3, 3, 4, 1}}, .binary = attention_weights},
    {"attention weights", BINARY, "", {{3, 3, 5, 1}, {7, 3, 5, 1}}, .binary = attention_weights},
    {"attention weights of itself", BINARY, "00", {{2, 3, 5, 1}}, .binary = attention_weights},
    {"attention", ATTEND, "", .leaf = {{3, 3, 4}, {5, 3, 4}, {5, 3, 6}}},
    {"attention", ATTEND, "", .leaf = {{3, 3, 4, 1}, {5, 3, 4}, {5, 3, 6, 1}}},
    {"attention, 60 rows", ATTEND, "", .leaf = {{6, 10, 4}, {5, 3, 4}, {5, 3, 6}}},
    {"attention, q is k", ATTEND, "001", .leaf = {{6, 10, 4}, {6, 10, 5}}},
    {"attention, q is v", ATTEND, "010", .leaf = {{6, 10, 4}, {6, 10, 4}}},
    {"attention, k is v", ATTEND, "011", .leaf = {{6, 10, 4}, {6, 10, 4}}},
    {"attention to itself", ATTEND, "000", .leaf = {{6, 10, 4}}},
    {"attention to itself", ATTEND, "000", .leaf = {{3, 3, 4, 1}}},
    {"concatenate", BINARY, "", {{3, 3, 4, 1}, {3, 3, 5}}, .binary = concatenate},
    {"concatenate", BINARY, "", {{3, 3, 4}, {3, 3, 5, 1}}, .binary = concatenate},
    {"concatenate", BINARY, "", {{3, 3, 4, 1}, {3, 3, 5, 1}}, .binary = concatenate},
    {"concatenate with itself", BINARY, "00", {{3, 1, 3, 1}}, .binary = concatenate},
    {"multiples", MULTIPLES, "", .leaf = {{3, 1, 4, 1}}},
    {"group norm of itself", NORMALISE_SWISH, "000", .leaf = {{1, 1, 12}}},
    {"group norm, scale is bias", NORMALISE, "011", .leaf = {{3, 5, 12, 1}, {1, 1, 12}}},
    {"add to itself", BINARY, "00", {{2, 3, 4, 1}}, .binary = add},
    {"sub from itself", BINARY, "00", {{2, 3, 4, 1}}, .binary = sub},
    {"mul by itself", BINARY, "00", {{2, 3, 4, 1}}, .binary = mul},
    {"likelihood of itself", BINARY, "00", {{1, 1, 1, 0, -0.3, -0.1, 0.03}}, .binary = build_likelihood},
    {"max pool", UNARY, "", {{4, 6, 5, 1, 0, 0, 0.01}}, .unary = max_pool},
    {"a tangent replaced", UNARY, "", {{3, 1, 4, 1}}, .unary = build_square},
    {"level likelihood", BINARY, "", {{3, 2, 3, 0, -0.3, -0.1, 0.03}, {1, 1, 1, 0, -6, -4, 0.5}},
     .binary = build_likelihood},
    {"level likelihood, sharp", BINARY, "",
     {{3, 2, 3, 0, -0.225, -0.20, 3e-4}, {1, 1, 1, 0, -13.3, -13, 0.03}}, .binary = build_likelihood},
};

int operator_count(void) { return (int)(sizeof ROWS / sizeof ROWS[0]); }

const char *operator_title(int index) { return ROWS[index].title; }

Subject operator_subject(int index) {
    Subject s = {.build = build_operator, .context = &ROWS[index], .dropout = 0.3};
    memcpy(s.leaf, ROWS[index].leaf, sizeof s.leaf);
    return s;
}
