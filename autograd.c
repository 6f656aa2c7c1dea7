/* autograd.c - floor 2: tensors that remember how they were made.
 *
 * Calling an operator computes its value at once and notes its inputs; `backward` walks the notes in
 * reverse. A tensor may carry a tangent, its derivative by lambda. An operator that receives tangents
 * records the tangent of its result as ordinary tensors, made with ordinary operators, so one reverse
 * sweep differentiates through values and tangents alike: that is all it takes to train through
 * dy/dlambda.
 *
 * Each operator is three functions: NAME_forward, NAME_backward, and the constructor of its name, which
 * knows the shape and the rule for the tangent. */

#include "diffenc.h"

#include <assert.h>
#include <math.h>
#include <string.h>

static const double TWO_PI = 6.283185307179586;

size_t element_count(const Tensor *a) {
    return (size_t)a->height * a->width * a->channels;
}

static int positions(const Tensor *a) {
    return a->height * a->width;
}

static int same_shape(const Tensor *a, const Tensor *b) {
    return a->height == b->height && a->width == b->width && a->channels == b->channels;
}

/* ---- making tensors ---- */

void graph_begin(Graph *graph, Arena *arena) {
    Graph fresh = {.arena = arena, .shapes_only = graph->shapes_only, .dropout = graph->dropout,
                   .dropout_stream = graph->dropout_stream, .seconds = graph->seconds};
    *graph = fresh;
    arena_reset(arena);
}

static Tensor *tensor_new(Graph *graph, int height, int width, int channels) {
    Tensor *t = arena_allocate(graph->arena, 1, sizeof *t);
    memset(t, 0, sizeof *t);
    t->graph = graph;
    t->height = height;
    t->width = width;
    t->channels = channels;
    t->previous = graph->last;
    graph->last = t;
    return t;
}

static real *reals(Graph *graph, size_t count) {
    graph->bytes += count * sizeof(real);
    return graph->shapes_only ? NULL : arena_allocate(graph->arena, count, sizeof(real));
}

Tensor *constant(Graph *graph, int height, int width, int channels, const real *value) {
    Tensor *t = tensor_new(graph, height, width, channels);
    t->value = reals(graph, element_count(t));
    if (t->value && value) {
        memcpy(t->value, value, element_count(t) * sizeof(real));
        t->number_value = value[0];
    } else if (t->value)
        memset(t->value, 0, element_count(t) * sizeof(real));
    return t;
}

Tensor *from_bytes(Graph *graph, int height, int width, int channels, const unsigned char *k, double factor,
                   double offset) {
    Tensor *t = constant(graph, height, width, channels, NULL);
    for (size_t i = 0; t->value && i < element_count(t); i++)
        t->value[i] = (real)(factor * k[i] + offset);
    return t;
}

/* Numbers and what elementwise operators make are kept in double as well. They are few and small, the
 * schedule and the images; and the Fourier features multiply by 2 pi 128 whatever rounding there is in
 * z_t. */
static double element(const Tensor *a, size_t i) {
    return a->wide ? a->wide[i] : element_count(a) == 1 ? a->number_value : (double)a->value[i];
}

static void set_element(Tensor *a, size_t i, double value) {
    a->value[i] = (real)value;
    if (a->wide)
        a->wide[i] = value;
    else
        a->number_value = value;   /* of use only where there is one element */
}

static double number_of(const Tensor *a) {
    return a->number_value;
}

static void set_number(Tensor *a, double value) {
    set_element(a, 0, value);
}

Tensor *number(Graph *graph, double value) {
    Tensor *t = constant(graph, 1, 1, 1, NULL);
    if (t->value)
        set_number(t, value);
    return t;
}

Tensor *parameter(Graph *graph, int height, int width, int channels, const real *value, const real *flipped,
                  real *gradient) {
    Tensor *t = tensor_new(graph, height, width, channels);
    t->value = (real *)value;   /* nothing writes to the value of a leaf */
    t->flipped = flipped;
    t->gradient = gradient;
    t->needs_gradient = gradient != NULL;
    if (value && element_count(t) == 1)
        t->number_value = value[0];
    return t;
}

/* An operator's result, its value not yet computed. Unused inputs are NULL. */
static Tensor *result_of(const Operator *op, int height, int width, int channels, Tensor *a, Tensor *b,
                         Tensor *c, Tensor *d) {
    Tensor *t = tensor_new(a->graph, height, width, channels);
    t->op = op;
    t->value = reals(a->graph, element_count(t));
    t->input[0] = a, t->input[1] = b, t->input[2] = c, t->input[3] = d;
    for (int i = 0; i < 4; i++)
        t->needs_gradient |= t->input[i] && t->input[i]->needs_gradient;
    return t;
}

static Tensor *elementwise(const Operator *op, const Tensor *shape, Tensor *a, Tensor *b) {
    Tensor *t = result_of(op, shape->height, shape->width, shape->channels, a, b, NULL, NULL);
    if (sizeof(real) < sizeof(double) && t->value && element_count(t) > 1)
        t->wide = arena_allocate(t->graph->arena, element_count(t), sizeof(double));
    return t;
}

/* A constructor that gives tangents asks `if (carries_tangent(y))`, makes the tangent out of ordinary
 * operators, and hands it over with set_tangent. In between no operator looks at tangents, so the tangent
 * has none of its own. */
static int carries_tangent(Tensor *y) {
    if (y->graph->inside_tangent)
        return 0;
    for (int i = 0; i < 4; i++)
        if (y->input[i] && y->input[i]->tangent)
            return y->graph->inside_tangent = 1;
    return 0;
}

static Tensor *set_tangent(Tensor *y, Tensor *tangent) {
    y->graph->inside_tangent = 0;
    y->tangent = tangent;
    return y;
}

/* Sums and products in which NULL stands for a tangent of zero. */
static Tensor *add_or(Tensor *a, Tensor *b) {
    return a && b ? add(a, b) : a ? a : b;
}
static Tensor *mul_or(Tensor *a, Tensor *b) {
    return a && b ? mul(a, b) : NULL;
}

/* ---- gradients ---- */

/* Where to add gradient for `a`: zeros the first time. NULL if nobody wants it. */
static real *gradient_to_add(Tensor *a) {
    if (!a || !a->needs_gradient)
        return NULL;
    if (a->gradient_is_empty)
        memset(a->gradient, 0, element_count(a) * sizeof(real));
    a->gradient_is_empty = 0;
    return a->gradient;
}

/* The same for loops that can write as well as add: *start is what to add to, NULL the first time. */
static real *gradient_to_write(Tensor *a, const real **start) {
    if (!a || !a->needs_gradient)
        return NULL;
    *start = a->gradient_is_empty ? NULL : a->gradient;
    a->gradient_is_empty = 0;
    return a->gradient;
}

static void take_gradient(Tensor *a) {
    Graph *graph = a->graph;
    const size_t count = element_count(a);
    a->gradient_is_empty = 1;
    for (int i = 0; i < graph->spare_count; i++)
        if (graph->spare[i].count == count) {
            a->gradient = graph->spare[i].memory;
            graph->spare[i] = graph->spare[--graph->spare_count];
            return;
        }
    a->gradient = arena_allocate(graph->arena, count, sizeof(real));
}

static void give_gradient_back(Tensor *a) {
    Graph *graph = a->graph;
    if (graph->spare_count < (int)(sizeof graph->spare / sizeof graph->spare[0])) {
        graph->spare[graph->spare_count].count = element_count(a);
        graph->spare[graph->spare_count++].memory = a->gradient;
    }
    a->gradient = NULL;
}

static double *clock_of(const Tensor *t, int direction);

void backward(Tensor *result, double weight) {
    assert(element_count(result) == 1);
    if (!result->needs_gradient)
        return;
    take_gradient(result);
    result->gradient[0] = (real)weight;
    result->gradient_is_empty = 0;
    for (Tensor *t = result; t; t = t->previous) {
        if (!t->op || !t->gradient)
            continue;
        for (int i = 0; i < 4; i++)
            if (t->input[i] && t->input[i]->needs_gradient && !t->input[i]->gradient)
                take_gradient(t->input[i]);
        double *clock = clock_of(t, 1), start = clock ? seconds_now() : 0;
        t->op->backward(t);
        if (clock)
            *clock += seconds_now() - start;
        give_gradient_back(t);
    }
}

/* ---- elementwise arithmetic ---- */

/* Element i of an operand that may be a single number: index i * step. */
static size_t step_of(const Tensor *a) {
    return element_count(a) > 1;
}

static Tensor *larger(Tensor *a, Tensor *b) {
    return element_count(a) >= element_count(b) ? a : b;
}

/* dinput += factor * sum or elements of dy, as the operand was a number or a tensor. */
static void add_gradient(Tensor *input, const real *dy, size_t count, double factor) {
    const real *start = NULL, f = (real)factor;
    real *dx = gradient_to_write(input, &start);
    if (dx && element_count(input) == count) {
        if (start)
            for (size_t i = 0; i < count; i++)
                dx[i] += f * dy[i];
        else
            for (size_t i = 0; i < count; i++)
                dx[i] = f * dy[i];
    } else if (dx) {
        double sum = 0;
        for (size_t i = 0; i < count; i++)
            sum += dy[i];
        dx[0] = (start ? dx[0] : 0) + (real)(factor * sum);
    }
}

/* input[0] * number[0] + input[1] * number[1]: addition and subtraction. */
static void add_forward(Tensor *y) {
    const Tensor *a = y->input[0], *b = y->input[1];
    const size_t a_step = step_of(a), b_step = step_of(b), count = element_count(y);
    for (size_t i = 0; i < count; i++)
        set_element(y, i, y->number[0] * element(a, i * a_step) + y->number[1] * element(b, i * b_step));
}

static void add_backward(Tensor *y) {
    add_gradient(y->input[0], y->gradient, element_count(y), y->number[0]);
    add_gradient(y->input[1], y->gradient, element_count(y), y->number[1]);
}

static void mul_forward(Tensor *y) {
    const Tensor *a = y->input[0], *b = y->input[1];
    const size_t a_step = step_of(a), b_step = step_of(b), count = element_count(y);
    for (size_t i = 0; i < count; i++)
        set_element(y, i, element(a, i * a_step) * element(b, i * b_step));
}

static void mul_backward(Tensor *y) {
    const size_t count = element_count(y);
    for (int side = 0; side < 2; side++) {
        Tensor *a = y->input[side], *b = y->input[1 - side];
        const size_t b_step = step_of(b);
        real *da = gradient_to_add(a);
        if (da && element_count(a) == count)
            for (size_t i = 0; i < count; i++)
                da[i] += y->gradient[i] * b->value[i * b_step];
        else if (da)
            da[0] += (real)dot(y->gradient, b->value, count);
    }
}

static void affine_forward(Tensor *y) {
    for (size_t i = 0; i < element_count(y); i++)
        set_element(y, i, y->number[0] * element(y->input[0], i) + y->number[1]);
}

static void affine_backward(Tensor *y) {
    add_gradient(y->input[0], y->gradient, element_count(y), y->number[0]);
}

/* The value of the input; its tangent was replaced. */
static void copy_forward(Tensor *y) {
    for (size_t i = 0; i < element_count(y); i++)
        set_element(y, i, element(y->input[0], i));
}

static void copy_backward(Tensor *y) {
    add_gradient(y->input[0], y->gradient, element_count(y), 1);
}

/* ---- elementwise functions ---- */

typedef enum {
    EXP, EXPM1, LOG, RECIPROCAL, SQRT, ABS, SIGN, LOGISTIC, SOFTPLUS, TANH, SWISH, SWISH_SLOPE, SINE, COSINE
} Function;

static double logistic_of(double x) {
    return 1 / (1 + exp(-x));
}

static double
cycle(double x) { /* radians of a number of cycles; whole cycles are taken off without rounding */
    return TWO_PI * (x - floor(x + 0.5));
}

static double function_of(Function f, double x) {
    const double s = f == SWISH || f == SWISH_SLOPE || f == LOGISTIC ? logistic_of(x) : 0;
    switch (f) {
    case EXP: return exp(x);
    case EXPM1: return expm1(x);
    case LOG: return log(x);
    case RECIPROCAL: return 1 / x;
    case SQRT: return sqrt(x);
    case ABS: return fabs(x);
    case SIGN: return x > 0 ? 1 : x < 0 ? -1 : 0;
    case LOGISTIC: return s;
    case SOFTPLUS: return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x));
    case TANH: return tanh(x);
    case SWISH: return x * s;
    case SWISH_SLOPE: return s * (1 + x * (1 - s));
    case SINE: return sin(cycle(x));
    case COSINE: return cos(cycle(x));
    }
    return 0;
}

/* d function / dx at x, where its value is y. */
static double slope_of(Function f, double x, double y) {
    const double s = f == SWISH || f == SWISH_SLOPE ? logistic_of(x) : 0;
    switch (f) {
    case EXP: return y;
    case EXPM1: return y + 1;
    case LOG: return 1 / x;
    case RECIPROCAL: return -y * y;
    case SQRT: return 0.5 / y;
    case ABS: return x > 0 ? 1 : x < 0 ? -1 : 0;
    case SIGN: return 0;
    case LOGISTIC: return y * (1 - y);
    case SOFTPLUS: return logistic_of(x);
    case TANH: return 1 - y * y;
    case SWISH: return s * (1 + x * (1 - s));
    case SWISH_SLOPE: return s * (1 - s) * (2 + x * (1 - 2 * s));
    case SINE: return TWO_PI * cos(cycle(x));
    case COSINE: return -TWO_PI * sin(cycle(x));
    }
    return 0;
}

static void function_forward(Tensor *y) {
    for (size_t i = 0; i < element_count(y); i++)
        set_element(y, i, function_of((Function)y->option, element(y->input[0], i)));
}

static void function_backward(Tensor *y) {
    real *dx = gradient_to_add(y->input[0]);
    for (size_t i = 0; i < element_count(y); i++)
        dx[i] +=
            (real)(y->gradient[i] * slope_of((Function)y->option, element(y->input[0], i), element(y, i)));
}

/* ---- sums ---- */

static void total_forward(Tensor *y) {
    const size_t count = element_count(y->input[0]);
    double sum = 0;
    for (size_t i = 0; i < count; i++)
        sum += y->input[0]->value[i];
    set_number(y, sum);
}

static void total_backward(Tensor *y) {
    real *dx = gradient_to_add(y->input[0]);
    const size_t count = element_count(y->input[0]);
    for (size_t i = 0; i < count; i++)
        dx[i] += y->gradient[0];
}

static void squared_norm_forward(Tensor *y) {
    const Tensor *x = y->input[0];
    set_number(y, dot(x->value, x->value, element_count(x)));
}

static void squared_norm_backward(Tensor *y) {
    add_gradient(y->input[0], y->input[0]->value, element_count(y->input[0]), 2 * (double)y->gradient[0]);
}

/* ---- linear maps ---- */

/* A kernel's flipped copy: the one its owner keeps, or one made here and kept for the rest of the graph. */
static const real *flipped(Tensor *kernel) {
    if (!kernel->flipped) {
        real *made = arena_allocate(kernel->graph->arena, element_count(kernel), sizeof(real));
        flip_kernel(kernel->height, kernel->width, kernel->channels, kernel->value, made);
        kernel->flipped = made;
    }
    return kernel->flipped;
}

/* dbias [channels] += the sum of dy over all positions. */
static void bias_backward(Tensor *bias, const Tensor *y) {
    real *dbias = gradient_to_add(bias);
    if (dbias)
        for (int i = 0; i < positions(y); i++)
            for (int c = 0; c < y->channels; c++)
                dbias[c] += y->gradient[(size_t)i * y->channels + c];
}

static void convolve_forward(Tensor *y) {
    const Tensor *x = y->input[0], *kernel = y->input[1];
    const int h = x->height, w = x->width, in = x->channels, out = y->channels;
    const real *bias = y->input[2] ? y->input[2]->value : NULL,
               *start = y->input[3] ? y->input[3]->value : NULL;
    Arena *scratch = y->graph->arena;
    if (kernel->height != 9)
        matrix_product(h * w, in, out, x->value, kernel->value, bias, start, y->value, scratch);
    else if (y->graph->plain_sums && !y->graph->inside_tangent)
        convolve3x3(h, w, in, out, x->value, kernel->value, bias, start, y->value, scratch);
    else
        convolve3x3_fast(h, w, in, out, x->value, kernel->value, bias, start, y->value, scratch);
}

static void convolve_backward(Tensor *y) {
    Tensor *x = y->input[0], *kernel = y->input[1], *residual = y->input[3];
    const int h = x->height, w = x->width, in = x->channels, out = y->channels;
    Arena *scratch = y->graph->arena;
    const real *start;
    real *dx = gradient_to_write(x, &start), *dkernel = gradient_to_add(kernel);
    if (dx && kernel->height == 9)
        convolve3x3_fast(h, w, out, in, y->gradient, flipped(kernel), NULL, start, dx, scratch);
    else if (dx)
        matrix_product(h * w, out, in, y->gradient, flipped(kernel), NULL, start, dx, scratch);
    if (dkernel && kernel->height == 9)
        convolve3x3_by_kernel_fast(h, w, in, out, x->value, y->gradient, dkernel, scratch);
    else if (dkernel)
        matrix_product_transposed(h * w, in, out, x->value, y->gradient, dkernel, scratch);
    bias_backward(y->input[2], y);
    if (residual)
        add_gradient(residual, y->gradient, element_count(y), 1);
}

/* Tap (a, b) of the kernel maps x [h, w] to every second position of y [2h, 2w], beginning at (a, b). */
static Product upsample_tap(const Tensor *x, const Tensor *y, int tap) {
    const ptrdiff_t out = y->channels;
    Product p = {.lines = x->height,
                 .rows = x->width,
                 .columns = y->channels,
                 .segments = 1,
                 .inner = x->channels,
                 .a = x->value,
                 .a_line = (ptrdiff_t)x->width * x->channels,
                 .a_row = x->channels,
                 .a_inner = 1,
                 .b = y->input[1]->value + (ptrdiff_t)tap * x->channels * out,
                 .b_row = out,
                 .c = y->value + ((tap / 2) * (ptrdiff_t)y->width + tap % 2) * out,
                 .c_line = 2 * (ptrdiff_t)y->width * out,
                 .c_row = 2 * out,
                 .bias = y->input[2] ? y->input[2]->value : NULL};
    return p;
}

static void upsample_forward(Tensor *y) {
    for (int tap = 0; tap < 4; tap++) {
        const Product p = upsample_tap(y->input[0], y, tap);
        product(&p, y->graph->arena);
    }
}

static void upsample_backward(Tensor *y) {
    Tensor *x = y->input[0], *kernel = y->input[1];
    const ptrdiff_t in = x->channels, out = y->channels;
    const real *start;
    real *dx = gradient_to_write(x, &start), *dkernel = gradient_to_add(kernel);
    for (int tap = 0; tap < 4; tap++) {
        const Product f = upsample_tap(x, y, tap);
        const real *dy = y->gradient + (f.c - y->value);
        if (dx) {   /* dx[i][j] += dy[2i+a][2j+b] kernel[a,b]^T */
            const Product p = {.lines = f.lines,
                               .rows = f.rows,
                               .columns = (int)in,
                               .segments = 1,
                               .inner = (int)out,
                               .a = dy,
                               .a_line = f.c_line,
                               .a_row = f.c_row,
                               .a_inner = 1,
                               .b = flipped(kernel) + (3 - tap) * in * out,
                               .b_row = in,
                               .c = dx,
                               .c_line = f.a_line,
                               .c_row = in,
                               .start = tap ? dx : start};
            product(&p, y->graph->arena);
        }
        if (dkernel) {   /* dkernel[a,b] += sum over i, j of x[i][j]^T dy[2i+a][2j+b] */
            real *dtap = dkernel + tap * in * out;
            const Product p = {.lines = 1,
                               .rows = (int)in,
                               .columns = (int)out,
                               .segments = f.lines,
                               .inner = f.rows,
                               .a = x->value,
                               .a_row = 1,
                               .a_segment = f.a_line,
                               .a_inner = in,
                               .b = dy,
                               .b_segment = f.c_line,
                               .b_row = f.c_row,
                               .c = dtap,
                               .c_row = out,
                               .start = dtap};
            product(&p, y->graph->arena);
        }
    }
    bias_backward(y->input[2], y);
}

static void matrix_multiply_forward(Tensor *y) {
    const Tensor *a = y->input[0], *b = y->input[1];
    matrix_product(positions(a), a->channels, b->channels, a->value, b->value, NULL, NULL, y->value,
                   y->graph->arena);
}

static void matrix_multiply_backward(Tensor *y) {
    Tensor *a = y->input[0], *b = y->input[1];
    Arena *scratch = y->graph->arena;
    const ArenaMark mark = arena_mark(scratch);
    const real *start;
    real *da = gradient_to_write(a, &start), *db = gradient_to_add(b);
    if (da) {
        real *bt = arena_allocate(scratch, element_count(b), sizeof(real));
        transpose(b->value, positions(b), b->channels, bt);
        matrix_product(positions(a), b->channels, a->channels, y->gradient, bt, NULL, start, da, scratch);
    }
    if (db)
        matrix_product_transposed(positions(a), a->channels, b->channels, a->value, y->gradient, db, scratch);
    arena_release(scratch, mark);
}

/* A copy of x [rows, columns] times a factor, transposed if asked. */
static real *scaled_copy(const Tensor *x, double factor, int transposed) {
    real *copy = arena_allocate(x->graph->arena, element_count(x), sizeof(real));
    if (transposed)
        transpose(x->value, positions(x), x->channels, copy);
    else
        memcpy(copy, x->value, element_count(x) * sizeof(real));
    for (size_t i = 0; i < element_count(x); i++)
        copy[i] *= (real)factor;
    return copy;
}

static void outer_product_forward(Tensor *y) {
    const Tensor *a = y->input[0], *b = y->input[1];
    const ArenaMark mark = arena_mark(y->graph->arena);
    matrix_product(positions(a), a->channels, positions(b), a->value, scaled_copy(b, y->number[0], 1), NULL,
                   NULL, y->value, y->graph->arena);
    arena_release(y->graph->arena, mark);
}

static void outer_product_backward(Tensor *y) {
    Tensor *a = y->input[0], *b = y->input[1];
    Arena *scratch = y->graph->arena;
    const ArenaMark mark = arena_mark(scratch);
    const real *start;
    real *da = gradient_to_write(a, &start), *db = gradient_to_add(b);
    if (da)
        matrix_product(positions(a), positions(b), a->channels, y->gradient, scaled_copy(b, y->number[0], 0),
                       NULL, start, da, scratch);
    if (db)
        matrix_product_transposed(positions(a), positions(b), a->channels, y->gradient,
                                  scaled_copy(a, y->number[0], 0), db, scratch);
    arena_release(scratch, mark);
}

/* ---- attention ---- */

static void attention_weights_forward(Tensor *p) {
    outer_product_forward(p);
    softmax_rows(p->value, positions(p), p->channels);
}

static void attention_weights_backward(Tensor *p) {
    softmax_rows_backward(p->value, p->gradient, positions(p), p->channels);   /* ours alone: done in place */
    outer_product_backward(p);
}

/* Rows that are worked on at a time: 28 rows of 784 logits are 88 KB, well within a core's own cache. */
enum { ATTENTION_ROWS = 28 };

static void attend_forward(Tensor *y) {
    const Tensor *q = y->input[0], *k = y->input[1], *v = y->input[2];
    Arena *scratch = y->graph->arena;
    const ArenaMark mark = arena_mark(scratch);
    const int rows = positions(q), columns = positions(k), channels = q->channels;
    const real *kt = scaled_copy(k, y->number[0], 1);
    for (int i = 0; i < rows; i += ATTENTION_ROWS) {
        const int n = rows - i < ATTENTION_ROWS ? rows - i : ATTENTION_ROWS;
        real *p = (real *)y->saved + (size_t)i * columns;
        matrix_product(n, channels, columns, q->value + (size_t)i * channels, kt, NULL, NULL, p, scratch);
        softmax_rows(p, n, columns);
        matrix_product(n, columns, v->channels, p, v->value, NULL, NULL, y->value + (size_t)i * v->channels,
                       scratch);
    }
    arena_release(scratch, mark);
}

/* For a few rows at a time: dP = dy v^T, dS = softmax backward, then dq = dS k, dk += dS^T q, dv += P^T
 * dy. */
static void attend_backward(Tensor *y) {
    Tensor *q = y->input[0], *k = y->input[1], *v = y->input[2];
    Arena *scratch = y->graph->arena;
    const ArenaMark mark = arena_mark(scratch);
    const int rows = positions(q), columns = positions(k), channels = q->channels;
    const real *start = NULL, *k_scaled = scaled_copy(k, y->number[0], 0),
               *q_scaled = scaled_copy(q, y->number[0], 0);
    const real *vt = scaled_copy(v, 1, 1);
    real *ds = arena_allocate(scratch, (size_t)ATTENTION_ROWS * columns, sizeof(real));
    real *dq = gradient_to_write(q, &start), *dk = gradient_to_add(k), *dv = gradient_to_add(v);
    for (int i = 0; i < rows; i += ATTENTION_ROWS) {
        const int n = rows - i < ATTENTION_ROWS ? rows - i : ATTENTION_ROWS;
        const real *p = (real *)y->saved + (size_t)i * columns, *dy = y->gradient + (size_t)i * v->channels;
        const size_t at = (size_t)i * channels;
        matrix_product(n, v->channels, columns, dy, vt, NULL, NULL, ds, scratch);
        softmax_rows_backward(p, ds, n, columns);
        if (dq)
            matrix_product(n, columns, channels, ds, k_scaled, NULL, start ? dq + at : NULL, dq + at,
                           scratch);
        if (dk)
            matrix_product_transposed(n, columns, channels, ds, q_scaled + at, dk, scratch);
        if (dv)
            matrix_product_transposed(n, columns, v->channels, p, dy, dv, scratch);
    }
    arena_release(scratch, mark);
}

/* p_dot = p (s_dot - sum(p s_dot)) per row, for a softmax p and the tangent s_dot of what went in. */
static void softmax_tangent_forward(Tensor *y) {
    const Tensor *p = y->input[0], *s_dot = y->input[1];
    memcpy(y->value, s_dot->value, element_count(y) * sizeof(real));
    softmax_rows_backward(p->value, y->value, positions(p), p->channels);   /* the Jacobian is symmetric */
}

static void softmax_tangent_backward(Tensor *y) {
    const int columns = y->channels;
    real *dp = gradient_to_add(y->input[0]), *ds_dot = gradient_to_add(y->input[1]);
    for (int i = 0; i < positions(y); i++) {
        const size_t row = (size_t)i * columns;
        const real *p = y->input[0]->value + row, *s_dot = y->input[1]->value + row, *g = y->gradient + row;
        const real mean = (real)dot(p, s_dot, columns), inner = (real)dot(p, g, columns);
        for (int j = 0; j < columns; j++) {
            if (dp)
                dp[row + j] += g[j] * (s_dot[j] - mean) - inner * s_dot[j];
            if (ds_dot)
                ds_dot[row + j] += p[j] * (g[j] - inner);
        }
    }
}

/* ---- normalisation ---- */

int group_count(int channels) {
    int groups = channels / 4 < 32 ? channels / 4 : 32;
    return groups > 0 && channels % groups == 0 ? groups : 0;
}

/* What the loops of tensor.c want to know; the dropout mask is made anew each time instead of being kept.
 * The tangent shares `saved`, stream and position with its value, and so has the same statistics and the
 * same mask. */
static GroupNorm norm_of(const Tensor *y, const Tensor *scale, const Tensor *bias) {
    GroupNorm n = {.positions = positions(y), .channels = y->channels, .groups = group_count(y->channels),
                   .swish = y->option != NORM_ONLY, .scale = scale->value, .bias = bias->value,
                   .mean = y->saved, .rstd = (real *)y->saved + group_count(y->channels)};
    if (y->option == NORM_SWISH_DROPOUT && y->number[0] > 0) {
        real *keep = arena_allocate(y->graph->arena, element_count(y), sizeof(real));
        random_dropout(y->stream, y->position, element_count(y), y->number[0], keep);
        n.keep = keep;
    }
    return n;
}

static void normalise_forward(Tensor *y) {
    const ArenaMark mark = arena_mark(y->graph->arena);
    const GroupNorm n = norm_of(y, y->input[1], y->input[2]);
    group_norm(&n, y->input[0]->value, y->value);
    arena_release(y->graph->arena, mark);
}

static void normalise_backward(Tensor *y) {
    const ArenaMark mark = arena_mark(y->graph->arena);
    const GroupNorm n = norm_of(y, y->input[1], y->input[2]);
    const real *start = NULL;
    real *dx = gradient_to_write(y->input[0], &start);
    group_norm_backward(&n, y->input[0]->value, y->gradient, start, dx, gradient_to_add(y->input[1]),
                        gradient_to_add(y->input[2]), y->graph->arena);
    arena_release(y->graph->arena, mark);
}

static void normalise_tangent_forward(Tensor *y) {
    const ArenaMark mark = arena_mark(y->graph->arena);
    const GroupNorm n = norm_of(y, y->input[2], y->input[3]);
    group_norm_tangent(&n, y->input[0]->value, y->input[1]->value, y->value);
    arena_release(y->graph->arena, mark);
}

static void normalise_tangent_backward(Tensor *y) {
    const ArenaMark mark = arena_mark(y->graph->arena);
    const GroupNorm n = norm_of(y, y->input[2], y->input[3]);
    group_norm_tangent_backward(&n, y->input[0]->value, y->input[1]->value, y->gradient,
                                gradient_to_add(y->input[0]), gradient_to_add(y->input[1]),
                                gradient_to_add(y->input[2]), gradient_to_add(y->input[3]), y->graph->arena);
    arena_release(y->graph->arena, mark);
}

/* ---- shapes ---- */

static void concatenate_forward(Tensor *y) {
    const Tensor *a = y->input[0], *b = y->input[1];
    for (int i = 0; i < positions(y); i++) {
        real *to = y->value + (size_t)i * y->channels;
        memcpy(to, a->value + (size_t)i * a->channels, a->channels * sizeof(real));
        memcpy(to + a->channels, b->value + (size_t)i * b->channels, b->channels * sizeof(real));
    }
}

static void concatenate_backward(Tensor *y) {
    for (int side = 0, first = 0; side < 2; first += y->input[side++]->channels) {
        const int channels = y->input[side]->channels;
        const real *start = NULL;
        real *dx = gradient_to_write(y->input[side], &start);
        for (int i = 0; dx && i < positions(y); i++) {
            const real *dy = y->gradient + (size_t)i * y->channels + first;
            real *to = dx + (size_t)i * channels;
            if (start)
                for (int c = 0; c < channels; c++)
                    to[c] += dy[c];
            else
                memcpy(to, dy, channels * sizeof(real));
        }
    }
}

static void spread_over_forward(Tensor *y) {
    for (int i = 0; i < positions(y); i++)
        memcpy(y->value + (size_t)i * y->channels, y->input[0]->value, y->channels * sizeof(real));
}

static void spread_over_backward(Tensor *y) {
    bias_backward(y->input[0], y);
}

/* saved: the factors, double [option]. */
static void outer_scale_forward(Tensor *y) {
    const double *factor = y->saved;
    const size_t count = element_count(y->input[0]);
    for (size_t i = 0; i < count; i++)
        for (int f = 0; f < y->option; f++)
            set_element(y, i * y->option + f, factor[f] * element(y->input[0], i));
}

static void outer_scale_backward(Tensor *y) {
    const double *factor = y->saved;
    const size_t count = element_count(y->input[0]);
    real *dx = gradient_to_add(y->input[0]);
    for (size_t i = 0; i < count; i++)
        for (int f = 0; f < y->option; f++)
            dx[i] += (real)factor[f] * y->gradient[i * y->option + f];
}

/* saved: for each element of y the index of the element of x that it is. A tangent takes over those of its
 * value (option 1) instead of looking for the largest. */
static void max_pool_forward(Tensor *y) {
    const Tensor *x = y->input[0];
    const size_t right = x->channels, down = (size_t)x->width * x->channels;
    uint32_t *chosen = y->saved;
    size_t at = 0;
    for (int i = 0; i < y->height; i++)
        for (int j = 0; j < y->width; j++)
            for (int c = 0; c < y->channels; c++, at++) {
                const size_t corner = 2 * i * down + 2 * j * right + c;
                const size_t candidate[4] = {corner, corner + right, corner + down, corner + down + right};
                if (!y->option) {
                    size_t best = corner;
                    for (int k = 1; k < 4; k++)
                        best = x->value[candidate[k]] > x->value[best] ? candidate[k] : best;
                    chosen[at] = (uint32_t)best;
                }
                y->value[at] = x->value[chosen[at]];
            }
}

static void max_pool_backward(Tensor *y) {
    const uint32_t *chosen = y->saved;
    real *dx = gradient_to_add(y->input[0]);
    for (size_t i = 0; i < element_count(y); i++)
        dx[chosen[i]] += y->gradient[i];
}

/* ---- losses ---- */

/* saved: the derivative by the log variance, the derivatives by u, the pixels. */
typedef struct {
    double by_precision;
    real *by_u;
    unsigned char *k;
} Likelihood;

static void level_likelihood_forward(Tensor *y) {
    Likelihood *l = y->saved;
    Arena *scratch = y->graph->arena;
    const ArenaMark mark = arena_mark(scratch);
    const size_t count = element_count(y->input[0]);
    double *u = arena_allocate(scratch, count, sizeof *u);
    for (size_t i = 0; i < count; i++)
        u[i] = element(y->input[0], i);
    set_number(y, level_softmax(count, u, l->k, exp(-number_of(y->input[1])), l->by_u, &l->by_precision));
    arena_release(scratch, mark);
}

static void level_likelihood_backward(Tensor *y) {
    const Likelihood *l = y->saved;
    real *dlog_variance = gradient_to_add(y->input[1]);
    if (y->input[0]->needs_gradient)
        add_gradient(y->input[0], l->by_u, element_count(y->input[0]), y->gradient[0]);
    if (dlog_variance)
        dlog_variance[0] -= (real)(y->gradient[0] * l->by_precision * exp(-number_of(y->input[1])));
}

/* ---- the operators ---- */

enum {
    ADD,
    MUL,
    AFFINE,
    COPY,
    FUNCTION,
    TOTAL,
    SQUARED_NORM,
    CONVOLVE,
    UPSAMPLE,
    MATRIX_MULTIPLY,
    OUTER_PRODUCT,
    ATTENTION_WEIGHTS,
    ATTEND,
    SOFTMAX_TANGENT,
    NORMALISE,
    NORMALISE_TANGENT,
    CONCATENATE,
    SPREAD_OVER,
    OUTER_SCALE,
    MAX_POOL,
    LEVEL_LIKELIHOOD
};

static const Operator OPERATORS[OPERATOR_COUNT] = {
    [ADD] = {"add", add_forward, add_backward},
    [MUL] = {"multiply", mul_forward, mul_backward},
    [AFFINE] = {"affine", affine_forward, affine_backward},
    [COPY] = {"copy", copy_forward, copy_backward},
    [FUNCTION] = {"function", function_forward, function_backward},
    [TOTAL] = {"total", total_forward, total_backward},
    [SQUARED_NORM] = {"squared norm", squared_norm_forward, squared_norm_backward},
    [CONVOLVE] = {"convolution", convolve_forward, convolve_backward},
    [UPSAMPLE] = {"upsampling", upsample_forward, upsample_backward},
    [MATRIX_MULTIPLY] = {"matrix product", matrix_multiply_forward, matrix_multiply_backward},
    [OUTER_PRODUCT] = {"outer product", outer_product_forward, outer_product_backward},
    [ATTENTION_WEIGHTS] = {"attention weights", attention_weights_forward, attention_weights_backward},
    [ATTEND] = {"attention", attend_forward, attend_backward},
    [SOFTMAX_TANGENT] = {"softmax tangent", softmax_tangent_forward, softmax_tangent_backward},
    [NORMALISE] = {"group norm", normalise_forward, normalise_backward},
    [NORMALISE_TANGENT] = {"group norm tangent", normalise_tangent_forward, normalise_tangent_backward},
    [CONCATENATE] = {"concatenation", concatenate_forward, concatenate_backward},
    [SPREAD_OVER] = {"spread", spread_over_forward, spread_over_backward},
    [OUTER_SCALE] = {"outer scale", outer_scale_forward, outer_scale_backward},
    [MAX_POOL] = {"max pool", max_pool_forward, max_pool_backward},
    [LEVEL_LIKELIHOOD] = {"level likelihood", level_likelihood_forward, level_likelihood_backward},
};

const char *operator_name(int index) {
    return index >= 0 && index < OPERATOR_COUNT ? OPERATORS[index].name : NULL;
}

static double *clock_of(const Tensor *t, int direction) {
    return t->graph->seconds ? t->graph->seconds + 2 * (t->op - OPERATORS) + direction : NULL;
}

static Tensor *compute(Tensor *y) {
    if (y->graph->shapes_only)
        return y;
    double *clock = clock_of(y, 0), start = clock ? seconds_now() : 0;
    y->op->forward(y);
    if (element_count(y) == 1 && (real)y->number_value != y->value[0])
        y->number_value = y->value[0];   /* the operator knows nothing of double */
    if (clock)
        *clock += seconds_now() - start;
    return y;
}

Tensor *with_tangent(Tensor *a, Tensor *tangent) {
    Tensor *y = compute(elementwise(&OPERATORS[COPY], a, a, NULL));
    y->tangent = tangent;
    return y;
}

static Tensor *combine(Tensor *a, Tensor *b, double b_factor) {
    Tensor *y = elementwise(&OPERATORS[ADD], larger(a, b), a, b);
    assert(same_shape(a, b) || element_count(a) == 1 || element_count(b) == 1);
    y->number[0] = 1;
    y->number[1] = b_factor;
    compute(y);
    if (!carries_tangent(y))
        return y;
    Tensor *b_dot = b->tangent && b_factor != 1 ? affine(b_factor, b->tangent, 0) : b->tangent;
    Tensor *y_dot = add_or(a->tangent, b_dot);
    if (element_count(y_dot) < element_count(y))   /* the tangent of the number alone: the same everywhere */
        y_dot = add(constant(y->graph, y->height, y->width, y->channels, NULL), y_dot);
    return set_tangent(y, y_dot);
}

Tensor *add(Tensor *a, Tensor *b) {
    return combine(a, b, 1);
}

Tensor *sub(Tensor *a, Tensor *b) {
    return combine(a, b, -1);
}

Tensor *mul(Tensor *a, Tensor *b) {
    Tensor *y = compute(elementwise(&OPERATORS[MUL], larger(a, b), a, b));
    assert(same_shape(a, b) || element_count(a) == 1 || element_count(b) == 1);
    return carries_tangent(y) ? set_tangent(y, add_or(mul_or(a->tangent, b), mul_or(a, b->tangent))) : y;
}

Tensor *affine(double factor, Tensor *a, double offset) {
    Tensor *y = elementwise(&OPERATORS[AFFINE], a, a, NULL);
    y->number[0] = factor;
    y->number[1] = offset;
    compute(y);
    return carries_tangent(y) ? set_tangent(y, affine(factor, a->tangent, 0)) : y;
}

static Tensor *function(Function f, Tensor *a);

/* The slope of a function as tensors: of its argument x and its value y, so that it can be differentiated
 * again. */
static Tensor *slope_tensor(Function f, Tensor *x, Tensor *y) {
    switch (f) {
    case EXP: return y;
    case EXPM1: return affine(1, y, 1);
    case LOG: return function(RECIPROCAL, x);
    case RECIPROCAL: return affine(-1, mul(y, y), 0);
    case SQRT: return affine(0.5, function(RECIPROCAL, y), 0);
    case ABS: return function(SIGN, x);
    case LOGISTIC: return mul(y, affine(-1, y, 1));
    case SOFTPLUS: return function(LOGISTIC, x);
    case TANH: return affine(-1, mul(y, y), 1);
    case SWISH: return function(SWISH_SLOPE, x);
    case SINE: return affine(TWO_PI, function(COSINE, x), 0);
    case COSINE: return affine(-TWO_PI, function(SINE, x), 0);
    default: assert(!"a function that is only ever a slope"); return NULL;
    }
}

static Tensor *function(Function f, Tensor *a) {
    Tensor *y = elementwise(&OPERATORS[FUNCTION], a, a, NULL);
    y->option = (int)f;
    compute(y);
    return carries_tangent(y) ? set_tangent(y, mul(slope_tensor(f, a, y), a->tangent)) : y;
}

Tensor *exponential(Tensor *a) { return function(EXP, a); }
Tensor *exponential_minus_1(Tensor *a) { return function(EXPM1, a); }
Tensor *logarithm(Tensor *a) { return function(LOG, a); }
Tensor *reciprocal(Tensor *a) { return function(RECIPROCAL, a); }
Tensor *square_root(Tensor *a) { return function(SQRT, a); }
Tensor *absolute(Tensor *a) { return function(ABS, a); }
Tensor *logistic(Tensor *a) { return function(LOGISTIC, a); }
Tensor *softplus(Tensor *a) { return function(SOFTPLUS, a); }
Tensor *hyperbolic_tangent(Tensor *a) { return function(TANH, a); }
Tensor *swish(Tensor *a) { return function(SWISH, a); }
Tensor *sine(Tensor *cycles) { return function(SINE, cycles); }
Tensor *cosine(Tensor *cycles) { return function(COSINE, cycles); }

Tensor *total(Tensor *a) {
    Tensor *y = compute(result_of(&OPERATORS[TOTAL], 1, 1, 1, a, NULL, NULL, NULL));
    return carries_tangent(y) ? set_tangent(y, total(a->tangent)) : y;
}

Tensor *squared_norm(Tensor *a) {
    Tensor *y = compute(result_of(&OPERATORS[SQUARED_NORM], 1, 1, 1, a, NULL, NULL, NULL));
    return carries_tangent(y) ? set_tangent(y, affine(2, total(mul(a, a->tangent)), 0)) : y;
}

Tensor *convolve(Tensor *x, Tensor *kernel, Tensor *bias, Tensor *residual) {
    assert((kernel->height == 9 || kernel->height == 1) && kernel->width == x->channels && !kernel->tangent);
    Tensor *y = compute(
        result_of(&OPERATORS[CONVOLVE], x->height, x->width, kernel->channels, x, kernel, bias, residual));
    if (!carries_tangent(y))
        return y;
    Tensor *bias_dot = bias ? bias->tangent : NULL, *residual_dot = residual ? residual->tangent : NULL;
    if (x->tangent)
        return set_tangent(y, convolve(x->tangent, kernel, bias_dot, residual_dot));
    if (bias_dot)
        bias_dot = spread_over(bias_dot, y->height, y->width);
    return set_tangent(y, add_or(bias_dot, residual_dot));
}

Tensor *upsample(Tensor *x, Tensor *kernel, Tensor *bias) {
    assert(kernel->height == 4 && kernel->width == x->channels && !kernel->tangent &&
           !(bias && bias->tangent));
    Tensor *y = compute(result_of(&OPERATORS[UPSAMPLE], 2 * x->height, 2 * x->width, kernel->channels, x,
                                  kernel, bias, NULL));
    return carries_tangent(y) ? set_tangent(y, upsample(x->tangent, kernel, NULL)) : y;
}

Tensor *matrix_multiply(Tensor *a, Tensor *b) {
    assert(a->channels == positions(b));
    Tensor *y =
        compute(result_of(&OPERATORS[MATRIX_MULTIPLY], a->height, a->width, b->channels, a, b, NULL, NULL));
    if (!carries_tangent(y))
        return y;
    return set_tangent(y, add_or(a->tangent ? matrix_multiply(a->tangent, b) : NULL,
                                 b->tangent ? matrix_multiply(a, b->tangent) : NULL));
}

Tensor *outer_product(double factor, Tensor *a, Tensor *b) {
    assert(a->channels == b->channels);
    Tensor *y = result_of(&OPERATORS[OUTER_PRODUCT], a->height, a->width, positions(b), a, b, NULL, NULL);
    y->number[0] = factor;
    compute(y);
    if (!carries_tangent(y))
        return y;
    return set_tangent(y, add_or(a->tangent ? outer_product(factor, a->tangent, b) : NULL,
                                 b->tangent ? outer_product(factor, a, b->tangent) : NULL));
}

Tensor *attention_weights(Tensor *q, Tensor *k) {
    assert(q->channels == k->channels);
    const double factor = 1 / sqrt(q->channels);
    Tensor *p = result_of(&OPERATORS[ATTENTION_WEIGHTS], q->height, q->width, positions(k), q, k, NULL, NULL);
    p->number[0] = factor;
    compute(p);
    if (!carries_tangent(p))
        return p;
    Tensor *s_dot = add_or(q->tangent ? outer_product(factor, q->tangent, k) : NULL,
                           k->tangent ? outer_product(factor, q, k->tangent) : NULL);
    return set_tangent(p, compute(result_of(&OPERATORS[SOFTMAX_TANGENT], p->height, p->width, p->channels, p,
                                            s_dot, NULL, NULL)));
}

Tensor *attend(Tensor *q, Tensor *k, Tensor *v) {
    if (q->tangent || k->tangent || v->tangent)
        return matrix_multiply(attention_weights(q, k), v);
    Tensor *y = result_of(&OPERATORS[ATTEND], q->height, q->width, v->channels, q, k, v, NULL);
    y->number[0] = 1 / sqrt(q->channels);
    y->saved = reals(y->graph, (size_t)positions(q) * positions(k));
    return compute(y);
}

Tensor *normalise(Tensor *x, Tensor *scale, Tensor *bias, int kind) {
    assert(group_count(x->channels) && scale->channels == x->channels && bias->channels == x->channels);
    Graph *graph = x->graph;
    Tensor *y = result_of(&OPERATORS[NORMALISE], x->height, x->width, x->channels, x, scale, bias, NULL);
    y->option = kind;
    y->saved = reals(graph, 2 * (size_t)group_count(x->channels));
    if (kind == NORM_SWISH_DROPOUT) {
        y->number[0] = graph->dropout;
        y->stream = graph->dropout_stream;
        y->position = graph->dropout_position;
        graph->dropout_position +=
            (uint32_t)((element_count(y) + DROPOUT_RUN - 1) / DROPOUT_RUN * DROPOUT_RUN);
    }
    compute(y);
    if (!carries_tangent(y))
        return y;
    Tensor *y_dot = result_of(&OPERATORS[NORMALISE_TANGENT], x->height, x->width, x->channels, x, x->tangent,
                              scale, bias);
    y_dot->option = kind;
    y_dot->saved = y->saved;
    y_dot->number[0] = y->number[0];
    y_dot->stream = y->stream;
    y_dot->position = y->position;
    return set_tangent(y, compute(y_dot));
}

Tensor *concatenate(Tensor *a, Tensor *b) {
    assert(a->height == b->height && a->width == b->width);
    Tensor *y = compute(
        result_of(&OPERATORS[CONCATENATE], a->height, a->width, a->channels + b->channels, a, b, NULL, NULL));
    if (!carries_tangent(y))
        return y;
    Graph *graph = y->graph;
    return set_tangent(y, concatenate(
        a->tangent ? a->tangent : constant(graph, a->height, a->width, a->channels, NULL),
        b->tangent ? b->tangent : constant(graph, b->height, b->width, b->channels, NULL)));
}

Tensor *spread_over(Tensor *vector, int height, int width) {
    assert(positions(vector) == 1);
    Tensor *y = compute(
        result_of(&OPERATORS[SPREAD_OVER], height, width, vector->channels, vector, NULL, NULL, NULL));
    return carries_tangent(y) ? set_tangent(y, spread_over(vector->tangent, height, width)) : y;
}

Tensor *outer_scale(Tensor *a, const double *factors, int count) {
    const Tensor shape = {.height = a->height, .width = a->width, .channels = a->channels * count};
    Tensor *y = elementwise(&OPERATORS[OUTER_SCALE], &shape, a, NULL);
    y->option = count;
    y->saved = arena_allocate(a->graph->arena, (size_t)count, sizeof(double));
    memcpy(y->saved, factors, (size_t)count * sizeof(double));
    compute(y);
    return carries_tangent(y) ? set_tangent(y, outer_scale(a->tangent, factors, count)) : y;
}

Tensor *max_pool(Tensor *x) {
    assert(x->height % 2 == 0 && x->width % 2 == 0);
    Tensor *y =
        result_of(&OPERATORS[MAX_POOL], x->height / 2, x->width / 2, x->channels, x, NULL, NULL, NULL);
    y->saved = reals(x->graph, element_count(y) * ((sizeof(uint32_t) + sizeof(real) - 1) / sizeof(real)));
    compute(y);
    if (!carries_tangent(y))
        return y;
    Tensor *y_dot =
        result_of(&OPERATORS[MAX_POOL], y->height, y->width, y->channels, x->tangent, NULL, NULL, NULL);
    y_dot->saved = y->saved;
    y_dot->option = 1;
    return set_tangent(y, compute(y_dot));
}

Tensor *level_likelihood(Tensor *u, Tensor *log_variance, const unsigned char *k) {
    assert(element_count(log_variance) == 1 && !u->tangent && !log_variance->tangent);
    Tensor *y = result_of(&OPERATORS[LEVEL_LIKELIHOOD], 1, 1, 1, u, log_variance, NULL, NULL);
    const size_t count = element_count(u);
    Likelihood *l = y->saved = arena_allocate(u->graph->arena, 1, sizeof *l);
    l->by_u = reals(u->graph, count);
    if (!u->graph->shapes_only) {
        l->k = arena_allocate(u->graph->arena, count, 1);
        memcpy(l->k, k, count);
    }
    return compute(y);
}

void level_choose(const Tensor *u, const Tensor *log_variance, const double *uniform, unsigned char *k) {
    const double precision = exp(-number_of(log_variance));
    for (size_t i = 0; i < element_count(u); i++) {
        const double ui = element(u, i);
        k[i] = (unsigned char)(uniform ? level_draw(ui, precision, uniform[i]) : nearest_level(ui));
    }
}
