/* autograd.c - floor 2: tensors that remember how they were made.
 *
 * Calling an operator computes its value at once and notes its inputs; `backward` walks the notes in reverse.
 * A tensor may carry a tangent, its derivative with respect to lambda. An operator that receives tangents
 * records the tangent of its result as ordinary tensors, made with ordinary operators, so one reverse sweep
 * differentiates through values and tangents alike: that is all it takes to train through dy/dlambda.
 *
 * Each operator is one block: NAME_forward; NAME_backward, which owns y->gradient and may overwrite it; and
 * the function NAME, which makes the tensor and has the rule for its tangent. Rules are made of `again`,
 * which is the same operator on other inputs, and of bare operators, which look at no tangent, so a tangent
 * has none of its own. NULL stands for a tangent of zero throughout. */

#include "diffenc.h"

#include <assert.h>
#include <limits.h>
#include <math.h>
#include <string.h>

static const double TWO_PI = 6.283185307179586;

size_t element_count(const Tensor *a) { return (size_t)a->height * a->width * a->channels; }
static int positions(const Tensor *a) { return a->height * a->width; }

/* ---- making tensors ---- */

void graph_begin(Graph *graph, Arena *arena) {
    *graph = (Graph){.arena = arena, .shapes_only = graph->shapes_only, .dropout = graph->dropout,
                     .dropout_stream = graph->dropout_stream, .times = graph->times};
    arena_reset(arena);
}

static Tensor *tensor_new(Graph *graph, int height, int width, int channels) {
    Tensor *t = arena_allocate(graph->arena, 1, sizeof *t);
    *t = (Tensor){.graph = graph, .height = height, .width = width, .channels = channels,
                  .previous = graph->last};
    graph->last = t;
    return t;
}

/* Memory for values; NULL while only shapes are wanted. */
static void *memory_for(Graph *graph, size_t count, size_t size) {
    graph->bytes += count * size;
    return graph->shapes_only ? NULL : arena_allocate(graph->arena, count, size);
}

/* A tensor whose elements are also kept in double. They are few, those of the schedule and of the images; and
 * the Fourier features multiply by 2 pi 128 whatever rounding there is in z_t. */
static void keep_exact(Tensor *t) {
    if (sizeof(real) < sizeof(double) && t->value)
        t->exact = arena_allocate(t->graph->arena, element_count(t), sizeof(double));
}

/* Of an input that may be missing. */
static const real *value_of(const Tensor *a) { return a ? a->value : NULL; }
static Tensor *tangent_of(const Tensor *a) { return a ? a->tangent : NULL; }

static double element(const Tensor *a, size_t i) { return a->exact ? a->exact[i] : (double)a->value[i]; }

/* All of them, in scratch memory. */
static double *elements_of(const Tensor *a) {
    double *x = arena_allocate(a->graph->arena, element_count(a), sizeof *x);
    for (size_t i = 0; i < element_count(a); i++)
        x[i] = element(a, i);
    return x;
}

static void set_element(Tensor *a, size_t i, double value) {
    a->value[i] = (real)value;
    if (a->exact)
        a->exact[i] = value;
}

double number_of(const Tensor *a) { return element(a, 0); }

Tensor *constant(Graph *graph, int height, int width, int channels, const real *value) {
    Tensor *t = tensor_new(graph, height, width, channels);
    t->value = memory_for(graph, element_count(t), sizeof(real));
    if (t->value && value)
        memcpy(t->value, value, element_count(t) * sizeof(real));
    else if (t->value)
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

Tensor *gaussian(Graph *graph, int height, int width, int channels, RandomStream stream) {
    Tensor *t = constant(graph, height, width, channels, NULL);
    if (t->value)
        random_normal(stream, t->value, element_count(t));
    return t;
}

Tensor *number(Graph *graph, double value) {
    Tensor *t = constant(graph, 1, 1, 1, NULL);
    keep_exact(t);
    if (t->value)
        set_element(t, 0, value);
    return t;
}

Tensor *parameter(Graph *graph, int height, int width, int channels, const real *value,
                  const real *transposed_kernel, real *gradient) {
    Tensor *t = tensor_new(graph, height, width, channels);
    t->value = (real *)value;   /* nothing writes to the value of a leaf */
    t->transposed_kernel = transposed_kernel;
    t->gradient = gradient;
    t->needs_gradient = gradient != NULL;
    return t;
}

/* An operator's result, its value not yet computed. Unused inputs are NULL; the first is always there. */
static Tensor *result_of(const Operator *op, int height, int width, int channels, Tensor *a, Tensor *b,
                         Tensor *c, Tensor *d) {
    Tensor *t = tensor_new(a->graph, height, width, channels);
    t->op = op;
    t->value = memory_for(a->graph, element_count(t), sizeof(real));
    if (op->exact)
        keep_exact(t);
    t->input[0] = a, t->input[1] = b, t->input[2] = c, t->input[3] = d;
    for (int i = 0; i < 4; i++)
        t->needs_gradient |= t->input[i] && t->input[i]->needs_gradient;
    return t;
}

/* Call forward (0) or backward (1). What it takes from the arena is scratch memory and taken back. */
static void run(Tensor *t, int direction) {
    OperatorTime *time = t->graph->times;
    while (time && time->op && time->op != t->op)
        time++;
    const double start = time ? seconds_now() : 0;
    const ArenaMark mark = arena_mark(t->graph->arena);
    (direction ? t->op->backward : t->op->forward)(t);
    arena_release(t->graph->arena, mark);
    if (time) {
        time->op = t->op;
        time->seconds[direction] += seconds_now() - start;
    }
}

static Tensor *compute(Tensor *y) {
    if (!y->graph->shapes_only)
        run(y, 0);
    return y;
}

/* What y's operator, with y's constants and saved values, makes of other inputs; NULL without the first. */
static Tensor *again(const Tensor *y, int option, Tensor *a, Tensor *b, Tensor *c, Tensor *d) {
    if (!a)
        return NULL;
    Tensor *t = result_of(y->op, y->height, y->width, y->channels, a, b, c, d);
    memcpy(t->number, y->number, sizeof t->number);
    t->option = option, t->saved = y->saved;
    t->stream = y->stream, t->position = y->position;
    return compute(t);
}

/* ---- reverse mode ---- */

/* Where to add what the gradient of `a` receives; NULL if nobody wants it. The one rule for all operators: a
 * gradient is added to and never written over, so an operator may get the same tensor as several inputs. */
static real *gradient_of(Tensor *a) { return a && a->needs_gradient ? a->gradient : NULL; }

/* Gradients are needed for a short while only, and the memory of one serves the next of its size. */
static void take_gradient(Tensor *a) {
    Graph *graph = a->graph;
    const size_t count = element_count(a);
    for (int i = 0; i < graph->spare_count && !a->gradient; i++)
        if (graph->spare[i].count == count) {
            a->gradient = graph->spare[i].memory;
            graph->spare[i] = graph->spare[--graph->spare_count];
        }
    if (!a->gradient)
        a->gradient = arena_allocate(graph->arena, count, sizeof(real));
    memset(a->gradient, 0, count * sizeof(real));
}

static void give_gradient_back(Tensor *a) {
    Graph *graph = a->graph;
    if (graph->spare_count < (int)(sizeof graph->spare / sizeof graph->spare[0]))
        graph->spare[graph->spare_count++] = (struct Spare){element_count(a), a->gradient};
    a->gradient = NULL;
}

void backward(Tensor *result, double weight) {
    assert(element_count(result) == 1);
    if (!result->needs_gradient)
        return;
    take_gradient(result);
    result->gradient[0] = (real)weight;
    for (Tensor *t = result; t; t = t->previous) {
        if (!t->op || !t->gradient)
            continue;
        for (int i = 0; i < 4; i++)
            if (t->input[i] && t->input[i]->needs_gradient && !t->input[i]->gradient)
                take_gradient(t->input[i]);
        run(t, 1);
        give_gradient_back(t);
    }
}

/* The gradient of an input += factor * dy, or its sum where the input is a single number. */
static void add_gradient(Tensor *input, const real *dy, size_t count, double factor) {
    real *dx = gradient_of(input);
    if (dx && element_count(input) == count)
        for (size_t i = 0; i < count; i++)
            dx[i] += (real)factor * dy[i];
    else if (dx) {
        double sum = 0;
        for (size_t i = 0; i < count; i++)
            sum += dy[i];
        dx[0] += (real)(factor * sum);
    }
}

/* ---- sums and differences ---- */

/* A new tensor of the shape of a and b, one of which may be a single number. */
static Tensor *elementwise(const Operator *op, Tensor *a, Tensor *b) {
    assert(!b || element_count(a) == 1 || element_count(b) == 1 ||
           (a->height == b->height && a->width == b->width && a->channels == b->channels));
    const Tensor *shape = b && element_count(b) > element_count(a) ? b : a;
    return result_of(op, shape->height, shape->width, shape->channels, a, b, NULL, NULL);
}

/* Element i of an operand that may be a single number. */
static double operand(const Tensor *a, size_t i) { return element(a, element_count(a) > 1 ? i : 0); }

/* input: a, b. factor a + b; where b is missing, a constant offset takes its place. */
static void add_forward(Tensor *y) {
    const Tensor *a = y->input[0], *b = y->input[1];
    for (size_t i = 0; i < element_count(y); i++)
        set_element(y, i, y->number[0] * operand(a, i) + (b ? operand(b, i) : y->number[1]));
}

static void add_backward(Tensor *y) {
    add_gradient(y->input[1], y->gradient, element_count(y), 1);
    add_gradient(y->input[0], y->gradient, element_count(y), y->number[0]);
}

static const Operator ADD = {"add", add_forward, add_backward, 1};

static Tensor *bare_sum(double factor, Tensor *a, Tensor *b, double offset) {
    Tensor *y = elementwise(&ADD, a, b);
    y->number[0] = factor, y->number[1] = offset;
    return compute(y);
}

static Tensor *bare_affine(double factor, Tensor *a, double offset) {
    return a ? bare_sum(factor, a, NULL, offset) : NULL;
}

static Tensor *bare_add(Tensor *a, double factor, Tensor *b) {
    if (!a || !b)
        return a ? a : factor == 1 ? b : bare_affine(factor, b, 0);
    return bare_sum(factor, b, a, 0);
}

static Tensor *add_multiple(Tensor *a, double factor, Tensor *b) {
    Tensor *y = bare_add(a, factor, b);
    y->tangent = bare_add(a->tangent, factor, b->tangent);
    if (y->tangent && element_count(y->tangent) < element_count(y))   /* a number's: the same everywhere */
        y->tangent = bare_add(constant(y->graph, y->height, y->width, y->channels, NULL), 1, y->tangent);
    return y;
}

Tensor *add(Tensor *a, Tensor *b) { return add_multiple(a, 1, b); }
Tensor *sub(Tensor *a, Tensor *b) { return add_multiple(a, -1, b); }

Tensor *affine(double factor, Tensor *a, double offset) {
    Tensor *y = bare_affine(factor, a, offset);
    y->tangent = bare_affine(factor, a->tangent, 0);
    return y;
}

Tensor *with_tangent(Tensor *a, Tensor *tangent) {
    Tensor *y = bare_affine(1, a, 0);
    y->tangent = tangent;
    return y;
}

Tensor *without_tangent(Tensor *a) { return a->tangent ? with_tangent(a, NULL) : a; }

/* ---- products ---- */

/* Compute y, whose operator is linear in each of its inputs, and its tangent: the sum of what the operator
 * makes with one input after the other replaced by its tangent. */
static Tensor *with_product_rule(Tensor *y) {
    Tensor *a = compute(y)->input[0], *b = y->input[1];
    Tensor *of_b = tangent_of(b) ? again(y, y->option, a, b->tangent, NULL, NULL) : NULL;
    y->tangent = bare_add(again(y, y->option, a->tangent, b, NULL, NULL), 1, of_b);
    return y;
}

static void mul_forward(Tensor *y) {
    for (size_t i = 0; i < element_count(y); i++)
        set_element(y, i, operand(y->input[0], i) * operand(y->input[1], i));
}

static void mul_backward(Tensor *y) {
    const size_t count = element_count(y);
    for (int side = 0; side < 2; side++) {
        const Tensor *b = y->input[1 - side];
        real *da = gradient_of(y->input[side]);
        if (da && element_count(y->input[side]) == count)
            for (size_t i = 0; i < count; i++)
                da[i] += y->gradient[i] * b->value[element_count(b) > 1 ? i : 0];
        else if (da)
            da[0] += (real)dot(y->gradient, b->value, count);
    }
}

static const Operator MUL = {"multiply", mul_forward, mul_backward, 1};

static Tensor *bare_mul(Tensor *a, Tensor *b) { return compute(elementwise(&MUL, a, b)); }
Tensor *mul(Tensor *a, Tensor *b) { return with_product_rule(elementwise(&MUL, a, b)); }

/* ---- elementwise functions ---- */

typedef enum {
    EXP, EXPM1, RECIPROCAL, SQRT, ABS, SIGN, LOGISTIC, SOFTPLUS, TANH, SWISH, SWISH_SLOPE, SINE, COSINE
} Function;

static double sigmoid_of(double x) { return 1 / (1 + exp(-x)); }

/* From -1/2 to 1/2: whole cycles are taken off without rounding. */
static inline double part_of_cycle(double cycles) { return cycles - floor(cycles + 0.5); }

/* sin(2 pi cycles), by the Taylor series within a quarter: as exact as libm, but in vector registers. */
static inline double sine_of_cycles(double cycles) {
    const double part = part_of_cycle(cycles);
    const double angle = TWO_PI * (part > 0.25 ? 0.5 - part : part < -0.25 ? -0.5 - part : part);
    double sum = 1;
    for (int k = 20; k > 0; k -= 2)
        sum = 1 - angle * angle * (1.0 / (k * (k + 1))) * sum;
    return angle * sum;
}

static inline double cosine_of_cycles(double cycles) {
    return sine_of_cycles(0.25 - fabs(part_of_cycle(cycles)));
}

/* The value of a function and its slope. Each caller wants one of them, and has only that computed. */
typedef struct { double value, slope; } Point;

static inline Point function_at(Function f, double x) {
    const double s = f == LOGISTIC || f == SWISH || f == SWISH_SLOPE ? sigmoid_of(x) : 0;
    const double sign = x > 0 ? 1 : x < 0 ? -1 : 0;
    switch (f) {
    case EXP: return (Point){exp(x), exp(x)};
    case EXPM1: return (Point){expm1(x), expm1(x) + 1};
    case RECIPROCAL: return (Point){1 / x, -(1 / x) * (1 / x)};
    case SQRT: return (Point){sqrt(x), 0.5 / sqrt(x)};
    case ABS: return (Point){fabs(x), sign};
    case SIGN: return (Point){sign, 0};
    case LOGISTIC: return (Point){s, s * (1 - s)};
    case SOFTPLUS: return (Point){x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)), sigmoid_of(x)};
    case TANH: return (Point){tanh(x), 1 - tanh(x) * tanh(x)};
    case SWISH: return (Point){x * s, s * (1 + x * (1 - s))};
    case SWISH_SLOPE: return (Point){s * (1 + x * (1 - s)), s * (1 - s) * (2 + x * (1 - 2 * s))};
    case SINE: return (Point){sine_of_cycles(x), TWO_PI * cosine_of_cycles(x)};
    case COSINE: return (Point){cosine_of_cycles(x), -TWO_PI * sine_of_cycles(x)};
    }
    return (Point){0, 0};
}

/* x becomes f(x), or the slope there. Where f is a constant, the compiler can vectorise the loop. */
static inline void function_loop(const Function f, const int slope, size_t count, double *x) {
    for (size_t i = 0; i < count; i++)
        x[i] = slope ? function_at(f, x[i]).slope : function_at(f, x[i]).value;
}

/* At all elements, in scratch memory. The Fourier features are many, so theirs are loops of their own. */
static inline double *function_values(const Tensor *y, const int slope) {
    const size_t count = element_count(y);
    double *x = elements_of(y->input[0]);
    if (y->option == SINE)
        function_loop(SINE, slope, count, x);
    else if (y->option == COSINE)
        function_loop(COSINE, slope, count, x);
    else
        function_loop((Function)y->option, slope, count, x);
    return x;
}

static void function_forward(Tensor *y) {
    const double *value = function_values(y, 0);
    for (size_t i = 0; i < element_count(y); i++)
        set_element(y, i, value[i]);
}

static void function_backward(Tensor *y) {
    const double *slope = function_values(y, 1);
    for (size_t i = 0; i < element_count(y); i++)
        y->gradient[i] = (real)(y->gradient[i] * slope[i]);
    add_gradient(y->input[0], y->gradient, element_count(y), 1);
}

static const Operator FUNCTION = {"function", function_forward, function_backward, 1};

static Tensor *bare_function(Function f, Tensor *a) {
    Tensor *y = elementwise(&FUNCTION, a, NULL);
    y->option = (int)f;
    return compute(y);
}

/* The slope as tensors, of the argument x and the value y, so that it can be differentiated again. */
static Tensor *slope_tensor(Function f, Tensor *x, Tensor *y) {
    switch (f) {
    case EXP: return y;
    case EXPM1: return bare_affine(1, y, 1);
    case RECIPROCAL: return bare_affine(-1, bare_mul(y, y), 0);
    case SQRT: return bare_affine(0.5, bare_function(RECIPROCAL, y), 0);
    case ABS: return bare_function(SIGN, x);
    case LOGISTIC: return bare_mul(y, bare_affine(-1, y, 1));
    case SOFTPLUS: return bare_function(LOGISTIC, x);
    case TANH: return bare_affine(-1, bare_mul(y, y), 1);
    case SWISH: return bare_function(SWISH_SLOPE, x);
    case SINE: return bare_affine(TWO_PI, bare_function(COSINE, x), 0);
    case COSINE: return bare_affine(-TWO_PI, bare_function(SINE, x), 0);
    default: assert(!"a function that is only ever a slope"); return NULL;
    }
}

static Tensor *function(Function f, Tensor *a) {
    Tensor *y = bare_function(f, a);
    y->tangent = a->tangent ? bare_mul(slope_tensor(f, a, y), a->tangent) : NULL;
    return y;
}

Tensor *exponential(Tensor *a) { return function(EXP, a); }
Tensor *exponential_minus_1(Tensor *a) { return function(EXPM1, a); }
Tensor *reciprocal(Tensor *a) { return function(RECIPROCAL, a); }
Tensor *square_root(Tensor *a) { return function(SQRT, a); }
Tensor *absolute(Tensor *a) { return function(ABS, a); }
Tensor *logistic(Tensor *a) { return function(LOGISTIC, a); }
Tensor *softplus(Tensor *a) { return function(SOFTPLUS, a); }
Tensor *hyperbolic_tangent(Tensor *a) { return function(TANH, a); }
Tensor *swish(Tensor *a) { return function(SWISH, a); }
Tensor *sine(Tensor *cycles) { return function(SINE, cycles); }
Tensor *cosine(Tensor *cycles) { return function(COSINE, cycles); }

/* ---- reductions ---- */

static void sum_forward(Tensor *y) {
    double total = 0;
    for (size_t i = 0; i < element_count(y->input[0]); i++)
        total += y->input[0]->value[i];
    set_element(y, 0, total);
}

static void sum_backward(Tensor *y) {
    real *dx = gradient_of(y->input[0]);
    for (size_t i = 0; i < element_count(y->input[0]); i++)
        dx[i] += y->gradient[0];
}

static const Operator SUM = {"sum", sum_forward, sum_backward, 1};

Tensor *sum(Tensor *a) { return with_product_rule(result_of(&SUM, 1, 1, 1, a, NULL, NULL, NULL)); }

static void squared_norm_forward(Tensor *y) {
    set_element(y, 0, dot(y->input[0]->value, y->input[0]->value, element_count(y->input[0])));
}

static void squared_norm_backward(Tensor *y) {
    add_gradient(y->input[0], y->input[0]->value, element_count(y->input[0]), 2 * (double)y->gradient[0]);
}

static const Operator SQUARED_NORM = {"squared norm", squared_norm_forward, squared_norm_backward, 1};

Tensor *squared_norm(Tensor *a) {
    Tensor *y = compute(result_of(&SQUARED_NORM, 1, 1, 1, a, NULL, NULL, NULL));
    if (a->tangent)
        y->tangent = bare_affine(2, sum(bare_mul(a, a->tangent)), 0);
    return y;
}

/* ---- convolution ---- */

/* A kernel with its taps reversed and in and out exchanged, as the input's gradient needs it: the copy
 * its owner keeps, or else one in scratch memory. */
static const real *transposed_kernel(const Tensor *kernel) {
    if (kernel->transposed_kernel)
        return kernel->transposed_kernel;
    real *made = arena_allocate(kernel->graph->arena, element_count(kernel), sizeof(real));
    transpose_kernel(kernel->height, kernel->width, kernel->channels, kernel->value, made);
    return made;
}

/* The gradient of a bias is the sum over the positions of y: a row of ones times y's gradient. */
static void add_bias_gradient(Tensor *bias, const Tensor *y) {
    const int count = positions(y);
    real *d = gradient_of(bias), *ones = arena_allocate(y->graph->arena, (size_t)count, sizeof(real));
    for (int i = 0; i < count; i++)
        ones[i] = 1;
    if (d)
        matrix_product(1, count, y->channels, ones, y->gradient, NULL, d, d, y->graph->arena);
}

/* input: x, kernel, bias, residual. option: by plain sums. */
static void convolve_forward(Tensor *y) {
    const Tensor *x = y->input[0], *kernel = y->input[1];
    const int h = x->height, w = x->width, in = x->channels, out = y->channels;
    const real *bias = value_of(y->input[2]), *start = value_of(y->input[3]);
    if (kernel->height == 1)
        matrix_product(h * w, in, out, x->value, kernel->value, bias, start, y->value, y->graph->arena);
    else
        (y->option ? convolve3x3 : convolve3x3_fast)(h, w, in, out, x->value, kernel->value, bias, start,
                                                     y->value, y->graph->arena);
}

static void convolve_backward(Tensor *y) {
    Tensor *x = y->input[0], *kernel = y->input[1];
    const int h = x->height, w = x->width, in = x->channels, out = y->channels, is_3x3 = kernel->height == 9;
    Arena *scratch = y->graph->arena;
    real *dx = gradient_of(x), *dkernel = gradient_of(kernel);
    if (dx && is_3x3)
        convolve3x3_fast(h, w, out, in, y->gradient, transposed_kernel(kernel), NULL, dx, dx, scratch);
    else if (dx)
        matrix_product(h * w, out, in, y->gradient, transposed_kernel(kernel), NULL, dx, dx, scratch);
    if (dkernel && is_3x3)
        convolve3x3_by_kernel_fast(h, w, in, out, x->value, y->gradient, dkernel, scratch);
    else if (dkernel)
        matrix_product_transposed(h * w, in, out, x->value, y->gradient, dkernel, scratch);
    add_bias_gradient(y->input[2], y);
    add_gradient(y->input[3], y->gradient, element_count(y), 1);
}

static const Operator CONVOLVE = {"convolution", convolve_forward, convolve_backward, 0};

/* Where x has no tangent but bias or residual has one, the tangent is a 1x1 convolution of zeros with theirs
 * added. */
Tensor *convolve(Tensor *x, Tensor *kernel, Tensor *bias, Tensor *residual) {
    assert((kernel->height == 9 || kernel->height == 1) && kernel->width == x->channels && !kernel->tangent);
    Tensor *y = result_of(&CONVOLVE, x->height, x->width, kernel->channels, x, kernel, bias, residual);
    y->option = x->graph->plain_sums;
    compute(y);
    Tensor *x_dot = x->tangent, *bias_dot = tangent_of(bias), *residual_dot = tangent_of(residual);
    if (!x_dot && (bias_dot || residual_dot)) {
        x_dot = constant(x->graph, x->height, x->width, 1, NULL);
        kernel = constant(x->graph, 1, 1, kernel->channels, NULL);
    }
    y->tangent = again(y, 0, x_dot, kernel, bias_dot, residual_dot);
    return y;
}

/* ---- upsampling ---- */

/* Where position i of x lies in y under tap (tap / 2, tap % 2) of the kernel, counted in numbers. */
static size_t upsampled_place(const Tensor *x, const Tensor *y, int tap, int i) {
    const int row = 2 * (i / x->width) + tap / 2, column = 2 * (i % x->width) + tap % 2;
    return ((size_t)row * y->width + column) * y->channels;
}

/* Each tap is a matrix product, whose rows are dealt out to every second position of every second line. */
static void upsample_forward(Tensor *y) {
    const Tensor *x = y->input[0], *kernel = y->input[1];
    const int in = x->channels, out = y->channels;
    Arena *scratch = y->graph->arena;
    real *part = arena_allocate(scratch, (size_t)positions(x) * out, sizeof(real));
    for (int tap = 0; tap < 4; tap++) {
        matrix_product(positions(x), in, out, x->value, kernel->value + (size_t)tap * in * out,
                       value_of(y->input[2]), NULL, part, scratch);
        for (int i = 0; i < positions(x); i++)
            memcpy(y->value + upsampled_place(x, y, tap, i), part + (size_t)i * out, out * sizeof(real));
    }
}

static void upsample_backward(Tensor *y) {
    Tensor *x = y->input[0], *kernel = y->input[1];
    const int n = positions(x), in = x->channels, out = y->channels;
    const size_t size = (size_t)in * out;
    Arena *scratch = y->graph->arena;
    real *dx = gradient_of(x), *dkernel = gradient_of(kernel);
    const real *transposed = dx ? transposed_kernel(kernel) : NULL;
    real *dpart = arena_allocate(scratch, (size_t)n * out, sizeof(real));
    for (int tap = 0; tap < 4; tap++) {
        for (int i = 0; i < n; i++)
            memcpy(dpart + (size_t)i * out, y->gradient + upsampled_place(x, y, tap, i), out * sizeof(real));
        if (dx)
            matrix_product(n, out, in, dpart, transposed + (3 - tap) * size, NULL, dx, dx, scratch);
        if (dkernel)
            matrix_product_transposed(n, in, out, x->value, dpart, dkernel + tap * size, scratch);
    }
    add_bias_gradient(y->input[2], y);
}

static const Operator UPSAMPLE = {"upsampling", upsample_forward, upsample_backward, 0};

Tensor *upsample(Tensor *x, Tensor *kernel, Tensor *bias) {
    assert(kernel->height == 4 && kernel->width == x->channels && !kernel->tangent && !tangent_of(bias));
    const int height = 2 * x->height, width = 2 * x->width;
    Tensor *y = compute(result_of(&UPSAMPLE, height, width, kernel->channels, x, kernel, bias, NULL));
    y->tangent = again(y, 0, x->tangent, kernel, NULL, NULL);
    return y;
}

/* ---- matrix products ---- */

/* A copy of x [rows, columns] times a factor, transposed if asked, in scratch memory. */
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

/* y = factor a b, or factor a b^T (option 1). */
static void matrix_multiply_forward(Tensor *y) {
    const Tensor *a = y->input[0], *b = y->input[1];
    matrix_product(positions(a), a->channels, y->channels, a->value,
                   scaled_copy(b, y->number[0], y->option), NULL, NULL, y->value, y->graph->arena);
}

/* da += factor dy b^T (option 1: dy b);  db += factor a^T dy (option 1: dy^T a) */
static void matrix_multiply_backward(Tensor *y) {
    Tensor *a = y->input[0], *b = y->input[1];
    const int rows = positions(a), inner = a->channels, columns = y->channels;
    Arena *scratch = y->graph->arena;
    real *da = gradient_of(a), *db = gradient_of(b);
    if (da)
        matrix_product(rows, columns, inner, y->gradient, scaled_copy(b, y->number[0], !y->option), NULL, da,
                       da, scratch);
    const real *a_scaled = db ? scaled_copy(a, y->number[0], 0) : NULL;
    if (db && y->option)
        matrix_product_transposed(rows, columns, inner, y->gradient, a_scaled, db, scratch);
    else if (db)
        matrix_product_transposed(rows, inner, columns, a_scaled, y->gradient, db, scratch);
}

static const Operator MATRIX_MULTIPLY = {"matrix product", matrix_multiply_forward, matrix_multiply_backward,
                                         0};

Tensor *matrix_multiply(double factor, Tensor *a, Tensor *b, int b_transposed) {
    assert(a->channels == (b_transposed ? b->channels : positions(b)));
    const int columns = b_transposed ? positions(b) : b->channels;
    Tensor *y = result_of(&MATRIX_MULTIPLY, a->height, a->width, columns, a, b, NULL, NULL);
    y->number[0] = factor;
    y->option = b_transposed;
    return with_product_rule(y);
}

/* ---- attention ---- */

/* p_dot = p (s_dot - sum(p s_dot)) per row, for a softmax p and the tangent s_dot of what went in. */
static void softmax_tangent_forward(Tensor *y) {
    const Tensor *p = y->input[0], *s_dot = y->input[1];
    memcpy(y->value, s_dot->value, element_count(y) * sizeof(real));
    softmax_rows_backward(p->value, y->value, positions(p), p->channels);   /* the Jacobian is symmetric */
}

static void softmax_tangent_backward(Tensor *y) {
    const int columns = y->channels;
    real *dp = gradient_of(y->input[0]), *ds_dot = gradient_of(y->input[1]);
    for (int i = 0; i < positions(y); i++) {
        const size_t row = (size_t)i * columns;
        const real *p = y->input[0]->value + row, *s_dot = y->input[1]->value + row, *g = y->gradient + row;
        const real mean = (real)dot(p, s_dot, columns), inner = (real)dot(p, g, columns);
        for (int j = 0; dp && j < columns; j++)
            dp[row + j] += g[j] * (s_dot[j] - mean) - inner * s_dot[j];
        for (int j = 0; ds_dot && j < columns; j++)
            ds_dot[row + j] += p[j] * (g[j] - inner);
    }
}

static const Operator SOFTMAX_TANGENT = {"softmax tangent", softmax_tangent_forward,
                                         softmax_tangent_backward, 0};

/* p = softmax(s) per row. */
static void softmax_forward(Tensor *p) {
    memcpy(p->value, p->input[0]->value, element_count(p) * sizeof(real));
    softmax_rows(p->value, positions(p), p->channels);
}

static void softmax_backward(Tensor *p) {
    softmax_rows_backward(p->value, p->gradient, positions(p), p->channels);
    add_gradient(p->input[0], p->gradient, element_count(p), 1);
}

static const Operator SOFTMAX = {"softmax", softmax_forward, softmax_backward, 0};

Tensor *attention_weights(Tensor *q, Tensor *k) {
    Tensor *s = matrix_multiply(1 / sqrt(q->channels), q, k, 1);
    Tensor *p = compute(elementwise(&SOFTMAX, s, NULL));
    if (s->tangent)
        p->tangent = compute(elementwise(&SOFTMAX_TANGENT, p, s->tangent));
    return p;
}

/* Rows that are worked on at a time: 28 rows of 784 logits are 88 KB, well within a core's own cache. */
enum { ATTENTION_ROWS = 28 };

typedef struct {
    const Tensor *y;
    const real *k_transposed;
} Attention;

static void attend_rows(const void *context, int first, int end, Arena *scratch) {
    const Tensor *y = ((const Attention *)context)->y;
    const real *k_transposed = ((const Attention *)context)->k_transposed;
    const Tensor *q = y->input[0], *k = y->input[1], *v = y->input[2];
    const int columns = positions(k), channels = q->channels;
    const ArenaMark mark = arena_mark(scratch);
    real *few = y->saved ? NULL : arena_allocate(scratch, (size_t)ATTENTION_ROWS * columns, sizeof(real));
    for (int i = first; i < end; i += ATTENTION_ROWS) {
        const int n = end - i < ATTENTION_ROWS ? end - i : ATTENTION_ROWS;
        real *p = few ? few : (real *)y->saved + (size_t)i * columns;
        matrix_product(n, channels, columns, q->value + (size_t)i * channels, k_transposed, NULL, NULL, p,
                       scratch);
        softmax_rows(p, n, columns);
        matrix_product(n, columns, v->channels, p, v->value, NULL, NULL, y->value + (size_t)i * v->channels,
                       scratch);
    }
    arena_release(scratch, mark);
}

/* saved: the weights [rows, columns], if there is to be a backward: made again there, they would take longer
 * than they do to come back from memory. Otherwise a few rows at a time stay in the cache. */
static void attend_forward(Tensor *y) {
    const Attention a = {y, scaled_copy(y->input[1], y->number[0], 1)};
    in_parts(attend_rows, &a, positions(y), y->graph->arena);
}

/* A few rows at a time: dP = dy v^T, dS = softmax backward, then dq += dS k, dk += dS^T q, dv += P^T dy. */
static void attend_backward(Tensor *y) {
    Tensor *q = y->input[0], *k = y->input[1], *v = y->input[2];
    Arena *scratch = y->graph->arena;
    const int rows = positions(q), columns = positions(k), channels = q->channels;
    const real *k_scaled = scaled_copy(k, y->number[0], 0), *q_scaled = scaled_copy(q, y->number[0], 0);
    const real *v_transposed = scaled_copy(v, 1, 1);
    real *ds = arena_allocate(scratch, (size_t)ATTENTION_ROWS * columns, sizeof(real));
    real *dq = gradient_of(q), *dk = gradient_of(k), *dv = gradient_of(v);
    for (int i = 0; i < rows; i += ATTENTION_ROWS) {
        const int n = rows - i < ATTENTION_ROWS ? rows - i : ATTENTION_ROWS;
        const real *p = (real *)y->saved + (size_t)i * columns, *dy = y->gradient + (size_t)i * v->channels;
        const size_t at = (size_t)i * channels;
        matrix_product(n, v->channels, columns, dy, v_transposed, NULL, NULL, ds, scratch);
        softmax_rows_backward(p, ds, n, columns);
        if (dq)
            matrix_product(n, columns, channels, ds, k_scaled, NULL, dq + at, dq + at, scratch);
        if (dk)
            matrix_product_transposed(n, columns, channels, ds, q_scaled + at, dk, scratch);
        if (dv)
            matrix_product_transposed(n, columns, v->channels, p, dy, dv, scratch);
    }
}

static const Operator ATTEND = {"attention", attend_forward, attend_backward, 0};

Tensor *attend(Tensor *q, Tensor *k, Tensor *v) {
    if (q->tangent || k->tangent || v->tangent)
        return matrix_multiply(1, attention_weights(q, k), v, 0);
    Tensor *y = result_of(&ATTEND, q->height, q->width, v->channels, q, k, v, NULL);
    y->number[0] = 1 / sqrt(q->channels);
    if (y->needs_gradient || y->graph->shapes_only)
        y->saved = memory_for(y->graph, (size_t)positions(q) * positions(k), sizeof(real));
    return compute(y);
}

/* ---- group normalisation ---- */

int group_count(int channels) {
    int groups = channels / 4 < 32 ? channels / 4 : 32;
    return groups > 0 && channels % groups == 0 ? groups : 0;
}

/* What the loops of tensor.c want to know. The dropout mask is made anew each time instead of being kept. */
static GroupNorm group_norm_of(const Tensor *y) {
    const int groups = group_count(y->channels);
    GroupNorm n = {.positions = positions(y), .channels = y->channels, .groups = groups,
                   .swish = y->option != NORM_ONLY, .scale = y->input[1]->value, .bias = y->input[2]->value,
                   .mean = y->saved, .rstd = (real *)y->saved + groups};
    if (y->option == NORM_SWISH_DROPOUT && y->number[0] > 0) {
        real *factors = arena_allocate(y->graph->arena, element_count(y), sizeof(real));
        random_dropout(y->stream, y->position, element_count(y), y->number[0], factors);
        n.dropout_factor = factors;
    }
    return n;
}

/* input: x, scale, bias; a tangent has a fourth, x_dot. saved: means, reciprocal standard deviations of x. */
static void normalise_forward(Tensor *y) {
    const GroupNorm n = group_norm_of(y);
    const real *x = y->input[0]->value, *x_dot = value_of(y->input[3]);
    if (x_dot)
        group_norm_tangent(&n, x, x_dot, y->value, y->graph->arena);
    else
        group_norm(&n, x, y->value, y->graph->arena);
}

static void normalise_backward(Tensor *y) {
    const GroupNorm n = group_norm_of(y);
    const real *x = y->input[0]->value, *x_dot = value_of(y->input[3]);
    real *dx = gradient_of(y->input[0]), *dx_dot = gradient_of(y->input[3]);
    real *dscale = gradient_of(y->input[1]), *dbias = gradient_of(y->input[2]);
    if (x_dot)
        group_norm_tangent_backward(&n, x, x_dot, y->gradient, dx, dx_dot, dscale, dbias, y->graph->arena);
    else
        group_norm_backward(&n, x, y->gradient, dx, dscale, dbias, y->graph->arena);
}

static const Operator NORMALISE = {"group norm", normalise_forward, normalise_backward, 0};

Tensor *normalise(Tensor *x, Tensor *scale, Tensor *bias, int kind) {
    assert(group_count(x->channels) && scale->channels == x->channels && bias->channels == x->channels);
    assert(!scale->tangent && !bias->tangent);
    Graph *graph = x->graph;
    Tensor *y = result_of(&NORMALISE, x->height, x->width, x->channels, x, scale, bias, NULL);
    y->option = kind;
    y->saved = memory_for(graph, 2 * (size_t)group_count(x->channels), sizeof(real));
    if (kind == NORM_SWISH_DROPOUT) {
        y->number[0] = graph->dropout;
        y->stream = graph->dropout_stream, y->position = graph->dropout_position;
        graph->dropout_position +=
            (uint32_t)((element_count(y) + DROPOUT_RUN - 1) / DROPOUT_RUN * DROPOUT_RUN);
    }
    compute(y);
    if (x->tangent)   /* with the statistics and the dropout mask of its value */
        y->tangent = again(y, kind, x, scale, bias, x->tangent);
    return y;
}

/* ---- channels side by side ---- */

static void concatenate_part(const void *tensor, int first, int end, Arena *scratch) {
    const Tensor *y = tensor;
    (void)scratch;
    for (int side = 0, channel = 0; side < 2; channel += y->input[side++]->channels) {
        const Tensor *x = y->input[side];
        for (int i = first; i < end; i++)
            memcpy(y->value + (size_t)i * y->channels + channel, x->value + (size_t)i * x->channels,
                   x->channels * sizeof(real));
    }
}

static void concatenate_forward(Tensor *y) {
    in_parts(concatenate_part, y, positions(y), y->graph->arena);
}

static void concatenate_backward(Tensor *y) {
    for (int side = 0, first = 0; side < 2; first += y->input[side++]->channels) {
        const int channels = y->input[side]->channels;
        real *dx = gradient_of(y->input[side]);
        for (int i = 0; dx && i < positions(y); i++)
            for (int c = 0; c < channels; c++)
                dx[(size_t)i * channels + c] += y->gradient[(size_t)i * y->channels + first + c];
    }
}

static const Operator CONCATENATE = {"concatenation", concatenate_forward, concatenate_backward, 0};

static Tensor *tangent_or_zeros(Tensor *a) {
    return a->tangent ? a->tangent : constant(a->graph, a->height, a->width, a->channels, NULL);
}

Tensor *concatenate(Tensor *a, Tensor *b) {
    assert(a->height == b->height && a->width == b->width);
    const int channels = a->channels + b->channels;
    Tensor *y = compute(result_of(&CONCATENATE, a->height, a->width, channels, a, b, NULL, NULL));
    if (a->tangent || b->tangent)
        y->tangent = again(y, 0, tangent_or_zeros(a), tangent_or_zeros(b), NULL, NULL);
    return y;
}

/* ---- every channel at several scales ---- */

/* saved: the factors, double [option]. */
static void multiples_forward(Tensor *y) {
    const double *factor = y->saved;
    for (size_t i = 0; i < element_count(y->input[0]); i++)
        for (int f = 0; f < y->option; f++)
            set_element(y, i * y->option + f, factor[f] * element(y->input[0], i));
}

static void multiples_backward(Tensor *y) {
    const double *factor = y->saved;
    real *dx = gradient_of(y->input[0]);
    for (size_t i = 0; i < element_count(y->input[0]); i++)
        for (int f = 0; f < y->option; f++)
            dx[i] += (real)factor[f] * y->gradient[i * y->option + f];
}

static const Operator MULTIPLES = {"multiples", multiples_forward, multiples_backward, 1};

Tensor *multiples(Tensor *a, const double *factors, int count) {
    Tensor *y = result_of(&MULTIPLES, a->height, a->width, a->channels * count, a, NULL, NULL, NULL);
    y->option = count;
    y->saved = arena_allocate(a->graph->arena, (size_t)count, sizeof(double));
    memcpy(y->saved, factors, (size_t)count * sizeof(double));
    return with_product_rule(y);
}

/* ---- max-pooling ---- */

/* saved: where in x the largest of the four pixels of each element lies. A tangent takes over those of its
 * value (option 1) instead of looking for the largest. */
static void max_pool_forward(Tensor *y) {
    const Tensor *x = y->input[0];
    const int channels = x->channels, line = x->width * channels;
    int *largest = y->saved;
    for (int i = 0; i < positions(y) && !y->option; i++) {
        const int corner = 2 * (i / y->width * line + i % y->width * channels);
        for (int c = corner; c < corner + channels; c++) {
            int place = c;
            real top = x->value[c];
            for (int k = 1; k < 4; k++) {
                const int candidate = c + k / 2 * line + k % 2 * channels;
                place = x->value[candidate] > top ? candidate : place;
                top = x->value[candidate] > top ? x->value[candidate] : top;
            }
            largest[i * channels + c - corner] = place;
        }
    }
    for (size_t i = 0; i < element_count(y); i++)
        y->value[i] = x->value[largest[i]];
}

static void max_pool_backward(Tensor *y) {
    const int *largest = y->saved;
    real *dx = gradient_of(y->input[0]);
    for (size_t i = 0; i < element_count(y); i++)
        dx[largest[i]] += y->gradient[i];
}

static const Operator MAX_POOL = {"max pool", max_pool_forward, max_pool_backward, 0};

Tensor *max_pool(Tensor *x) {
    assert(x->height % 2 == 0 && x->width % 2 == 0);
    assert(element_count(x) <= INT_MAX);   /* what `saved` counts in */
    Tensor *y = result_of(&MAX_POOL, x->height / 2, x->width / 2, x->channels, x, NULL, NULL, NULL);
    y->saved = memory_for(x->graph, element_count(y), sizeof(int));
    compute(y);
    y->tangent = again(y, 1, x->tangent, NULL, NULL, NULL);
    return y;
}

/* ---- the likelihood of pixels ---- */

/* The pixels, and what forward keeps: the derivatives with respect to each u and to the precision. */
typedef struct {
    const unsigned char *k;
    real *by_u;
    double by_precision;
} Likelihood;

/* input: u, log variance. */
static void level_likelihood_forward(Tensor *y) {
    Likelihood *l = y->saved;
    set_element(y, 0, level_softmax(element_count(y->input[0]), elements_of(y->input[0]), l->k,
                                    exp(-number_of(y->input[1])), l->by_u, &l->by_precision));
}

static void level_likelihood_backward(Tensor *y) {
    const Likelihood *l = y->saved;
    real *dlog_variance = gradient_of(y->input[1]);
    add_gradient(y->input[0], l->by_u, element_count(y->input[0]), y->gradient[0]);
    if (dlog_variance)
        dlog_variance[0] -= (real)(y->gradient[0] * l->by_precision * exp(-number_of(y->input[1])));
}

static const Operator LEVEL_LIKELIHOOD = {"level likelihood", level_likelihood_forward,
                                          level_likelihood_backward, 1};

Tensor *level_likelihood(Tensor *u, Tensor *log_variance, const unsigned char *k) {
    assert(element_count(log_variance) == 1 && !u->tangent && !log_variance->tangent);
    Tensor *y = result_of(&LEVEL_LIKELIHOOD, 1, 1, 1, u, log_variance, NULL, NULL);
    Likelihood *l = y->saved = arena_allocate(u->graph->arena, 1, sizeof *l);
    l->k = k;   /* looked at once, now */
    l->by_u = memory_for(u->graph, element_count(u), sizeof(real));
    return compute(y);
}

void level_choose(const Tensor *u, const Tensor *log_variance, const RandomStream *draws, unsigned char *k) {
    const double precision = exp(-number_of(log_variance));
    for (uint32_t i = 0; i < element_count(u); i++)
        k[i] = (unsigned char)(draws ? level_draw(element(u, i), precision, random_uniform(*draws, i))
                                     : nearest_level(element(u, i)));
}
