/* diffenc.h - DiffEnc and the variational diffusion model, whole: every type and function of the program.
 *
 * This header is the manual. It follows the files from the ground up; a file calls only files on lower
 * floors:
 *
 *     tensor.c    floor 1   errors, memory, random numbers, the loops that do the arithmetic
 *     autograd.c  floor 2   tensors that remember how they were made: reverse mode, and tangents
 *     nn.c        floor 3   layers, the two networks, parameters, batches on threads, AdamW and EMA
 *     diffenc.c   floor 4   the method: schedule, forward process, the loss terms, the sampler
 *     data.c      beside    files in and out; it uses tensor.c alone
 *     main.c      roof      the command line and the training loop
 *
 * Sources: [DiffEnc] Nielsen, Christensen, Dittadi, Winther, "DiffEnc: Variational Diffusion with a
 * Learned Encoder", ICLR 2024, arXiv 2310.19789. [VDM] Kingma, Salimans, Poole, Ho, "Variational Diffusion
 * Models", NeurIPS 2021, arXiv 2107.00630.
 *
 * Conventions. An image is [height, width, channels], channels last, contiguous; a vector is [1, 1, n];
 * where a matrix is meant, its rows are the height*width positions and its columns the channels. There is
 * no batch axis: one example is one graph, and a batch is a loop over examples. */

#ifndef DIFFENC_H
#define DIFFENC_H

#include <stddef.h>
#include <stdint.h>

/* The number type of the whole program. `make DOUBLE=1` defines DIFFENC_DOUBLE; there gradients and
 * identities are checked to 1e-7 and better instead of to rounding noise. */
#ifdef DIFFENC_DOUBLE
typedef double real;
#else
typedef float real;
#endif

/* ==== floor 1: tensor.c ================================================================================ */

/* ---- errors ---- */

/* What went wrong, as one line without the program's name: what, where, why. A function that can fail for a
 * reason outside the program (a file, an option, the machine) takes one as its last argument, fills it and
 * returns -1 (or NULL). Mistakes inside the program are assertions instead. */
typedef struct {
    char text[512];
} Error;

/* Format the message into `error` and return -1, so that `return fail(error, ...)` is one line. */
int fail(Error *error, const char *format, ...)
#ifdef __GNUC__
    __attribute__((format(printf, 2, 3)))
#endif
    ;

/* ---- memory ---- */

/* malloc and calloc that never return NULL: out of memory prints one line with the size asked for and
 * exits with status 1. `size * count` that overflows is the same failure. For memory whose size the
 * program itself chose; what a file asks for is checked against the file's own size first. */
void *allocate(size_t count, size_t size);
void *allocate_zeroed(size_t count, size_t size);

/* An arena hands out memory by moving a pointer, and takes all of it back at once. It grows in blocks
 * while it is used for the first time and keeps them, so a second pass of the same size allocates nothing.
 * Results are aligned to 64 bytes, a cache line and the widest vector. One thread uses an arena at a time. */
typedef struct Arena Arena;

/* A point to which an arena can be rolled back. */
typedef struct {
    void *block;
    size_t used;
} ArenaMark;

Arena *arena_new(void);
void arena_free(Arena *arena);
void *arena_allocate(Arena *arena, size_t count, size_t size);
ArenaMark arena_mark(const Arena *arena);
void arena_release(Arena *arena, ArenaMark mark);
void arena_reset(Arena *arena);              /* release everything, keep the blocks */
size_t arena_capacity(const Arena *arena);   /* bytes of all blocks, in use or not */

/* ---- random numbers ---- */

/* Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): 128 bits of
 * counter and 64 bits of key give 128 random bits. There is no state to be saved or shared. */
void philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

/* What a number is drawn for. Streams with different purposes are independent. The numbers are part of the
 * meaning of a seed: append, never reorder. */
typedef enum {
    RANDOM_WEIGHTS,        /* initial weights; example = index of the parameter */
    RANDOM_SHUFFLE,        /* order of the examples; step = epoch */
    RANDOM_TIME,           /* the one u of a training step */
    RANDOM_NOISE,          /* eps of z_t */
    RANDOM_NOISE_0,        /* eps_0 of z_0 */
    RANDOM_DROPOUT,        /* dropout masks of a training step */
    RANDOM_SAMPLER,        /* z_1 and the noise of the ancestral sampler; step = the time step */
    RANDOM_PIXELS,         /* pixels drawn from p(k | z_0) */
    RANDOM_GLYPHS,         /* the built-in digits; step = split, example = index */
    RANDOM_EVAL_TIME,      /* the one u of an evaluation */
    RANDOM_EVAL_NOISE,     /* eps of an evaluation; step = repetition */
    RANDOM_EVAL_NOISE_0,   /* eps_0 of an evaluation */
    RANDOM_CHECK           /* whatever a test or check needs */
} RandomPurpose;

/* Names one stream of random numbers: a pure function of these four and the position within the stream. */
typedef struct {
    uint64_t seed;
    uint32_t purpose, step, example;
} RandomStream;

RandomStream random_stream(uint64_t seed, RandomPurpose purpose, uint32_t step, uint32_t example);

/* The number at `position` of a stream: 32 random bits; uniform in [0,1) with 53 bits (uses positions 2p,
 * 2p+1). */
uint32_t random_bits(RandomStream stream, uint32_t position);
double random_uniform(RandomStream stream, uint32_t position);

/* count standard normal numbers (Box-Muller in double), the first ones of the stream. */
void random_normal(RandomStream stream, real *out, size_t count);

/* Dropout factors for positions [first, first+count): keep[i] is 1/(1-p) with probability 1-p, else 0; p
 * is `rate` rounded to a multiple of 2^-16. Made again in the backward pass instead of being stored.
 * Random bits are taken in runs: `first` is a multiple of DROPOUT_RUN; masks of one stream are independent
 * unless they share a run. */
enum { DROPOUT_RUN = 128 };
void random_dropout(RandomStream stream, uint32_t first, size_t count, double rate, real *keep);

/* ---- the loops that do the arithmetic ---- */

/* The one loop under every convolution and matrix product, forward and backward:
 *
 *     c[i][j] = bias[j] + start[i][j] + sum over s < segments, k < inner of  a(s, i, k) * b(s, k, j)
 *
 * Rows come in `lines` of `rows` each (the lines of an image, or 1): row i = line*rows + r of `a` begins
 * at a + line*a_line + r*a_row, and its element (s, k) is s*a_segment + k*a_inner further on; likewise
 * b(s, k, j) is b[s*b_segment + k*b_row + j]. Rows of `a` may overlap: that is what makes a 3x3
 * convolution of a zero-bordered image a plain product. */
typedef struct {
    int lines, rows, columns, segments, inner;
    const real *a;
    ptrdiff_t a_line, a_row, a_segment, a_inner;
    const real *b;
    ptrdiff_t b_segment, b_row;
    real *c;
    ptrdiff_t c_line, c_row;
    const real *bias;                              /* [columns], or NULL */
    const real *start;                             /* laid out like c, or NULL; c itself: accumulate */
} Product;

void product(const Product *p, Arena *scratch);

/* c [rows, columns] = a [rows, inner] b [inner, columns] + bias + start, all contiguous: the everyday
 * case. */
void matrix_product(int rows, int inner, int columns, const real *a, const real *b, const real *bias,
                    const real *start, real *c, Arena *scratch);

/* c [inner, columns] += a^T b for a [rows, inner], b [rows, columns]: the gradient by a matrix. */
void matrix_product_transposed(int rows, int inner, int columns, const real *a, const real *b, real *c,
                               Arena *scratch);

/* out [columns, rows] = a [rows, columns] transposed. */
void transpose(const real *a, int rows, int columns, real *out);

/* 3x3 convolution, stride 1, zero padding. x [h, w, in], kernel [3, 3, in, out], bias [out] or NULL, start
 * [h, w, out] or NULL, y [h, w, out]. */
void convolve3x3(int h, int w, int in, int out, const real *x, const real *kernel, const real *bias,
                 const real *start, real *y, Arena *scratch);

/* Its gradients, dy [h, w, out]. By the input it is the same convolution with the flipped kernel, so it
 * needs none of its own: convolve3x3(h, w, out, in, dy, flipped, NULL, start, dx). By the kernel:
 * dkernel += . flip_kernel: [taps, in, out] -> [taps, out, in], the taps in reverse order. */
void flip_kernel(int taps, int in, int out, const real *kernel, real *flipped);
void convolve3x3_by_kernel(int h, int w, int in, int out, const real *x, const real *dy, real *dkernel,
                           Arena *scratch);

/* The same two by Winograd's minimal filtering, with a quarter of the multiplications: two to three times
 * as fast, and rounded four times as coarsely, 1e-6 of the result's norm in float. Small images and few
 * channels, where it would not be faster, go the plain way. */
void convolve3x3_fast(int h, int w, int in, int out, const real *x, const real *kernel, const real *bias,
                      const real *start, real *y, Arena *scratch);
void convolve3x3_by_kernel_fast(int h, int w, int in, int out, const real *x, const real *dy, real *dkernel,
                                Arena *scratch);

/* Group normalisation, then swish if asked, then dropout if asked, in one pass:
 *     xhat = (x - mean) / sqrt(variance + 1e-6) per group;  n = scale xhat + bias;  y = keep swish(n)
 * x, y [positions, channels]; scale, bias [channels]; the groups are equal runs of channels. `keep` holds
 * dropout factors [positions, channels], or NULL. `mean` and `rstd` [groups] (reciprocal standard
 * deviations) are results that the other three functions take. */
typedef struct {
    int positions, channels, groups, swish;
    const real *scale, *bias, *keep;
    real *mean, *rstd;
} GroupNorm;

void group_norm(const GroupNorm *n, const real *x, real *y);

/* dx = start + , dscale += , dbias += ; each may be NULL, start NULL is zero and start = dx accumulates. */
void group_norm_backward(const GroupNorm *n, const real *x, const real *dy, const real *start, real *dx,
                         real *dscale, real *dbias, Arena *scratch);

/* The tangent of y for a tangent x_dot of x, and the reverse mode of that: gradients by x, x_dot, scale,
 * bias. */
void group_norm_tangent(const GroupNorm *n, const real *x, const real *x_dot, real *y_dot);
void group_norm_tangent_backward(const GroupNorm *n, const real *x, const real *x_dot, const real *dy_dot,
                                 real *dx, real *dx_dot, real *dscale, real *dbias, Arena *scratch);

/* In place, each row of s [rows, columns] becomes its softmax. */
void softmax_rows(real *s, int rows, int columns);

/* For a softmax p [rows, columns] and its gradient dp: dp becomes the gradient of what went in. In place. */
void softmax_rows_backward(const real *p, real *dp, int rows, int columns);

/* -log p(k | u) summed over count values: a softmax over the 256 levels c of -(u - x(c))^2 * precision / 2
 * with x(c) = 2 (c + 1/2)/256 - 1. Writes the derivative by each u to du [count] and returns the sum;
 * *dprecision gets the derivative by the precision. u is double because what counts is its distance to a
 * level, 1/500 of it. The 256 logits live in registers only. */
double level_softmax(size_t count, const double *u, const unsigned char *k, double precision, real *du,
                     double *dprecision);

/* The level c with x(c) nearest to u, the most likely one. */
int nearest_level(double u);

/* A level drawn from that softmax at one u by a uniform number in [0, 1). */
int level_draw(double u, double precision, double uniform);

/* exp(x) that compilers vectorise: relative error below 2e-7 in float, libm's in double; clamped to finite
 * results (x in [-87, 88] for float). */
real fast_exp(real x);

/* sum of x[i] y[i] in double, in a fixed order. */
double dot(const real *x, const real *y, size_t count);

/* Seconds of a clock that only goes forward. */
double seconds_now(void);

/* ==== floor 2: autograd.c ============================================================================== */

typedef struct Tensor Tensor;
typedef struct Graph Graph;

/* An operator is a pair of plain functions. `forward` fills self->value from the values of self->input.
 * `backward` adds to the gradients of the inputs what self->gradient contributes to them. */
typedef struct {
    const char *name;
    void (*forward)(Tensor *self);
    void (*backward)(Tensor *self);
} Operator;

/* A tensor: its value, and how it was made. */
struct Tensor {
    Graph *graph;
    const Operator *op;             /* NULL: a leaf (constant or parameter) */
    int height, width, channels;    /* a parameter: [taps, in, out], [1, in, out] or [1, 1, n] */
    real *value;                    /* [height, width, channels] */
    double number_value;            /* of a tensor that is a single number: the same, in double */
    double *wide;                   /* what elementwise operators made in a float build, in double */
    real *gradient;                 /* the same shape; NULL while nothing needs it, or given back */
    Tensor *tangent;                /* d value / d lambda as a tensor of the same shape; NULL: zero */
    int needs_gradient;             /* some parameter is among its ancestors */
    int gradient_is_empty;          /* memory is there, but nothing was written yet */
    Tensor *input[4];
    Tensor *previous;               /* the tensor made before this one: the order of the reverse sweep */
    const real *flipped;            /* parameters: taps reversed and in/out exchanged, or NULL */
    double number[2];               /* constants of the operator (a factor, a rate) */
    int option;                     /* likewise (a kind, a number of groups) */
    void *saved;                    /* what forward keeps for backward */
    RandomStream stream;            /* dropout: where the mask comes from */
    uint32_t position;
};

/* A graph lives in an arena and is built anew for every example: calling an operator computes its value at
 * once and writes down how. graph_begin forgets all of it. */
struct Graph {
    Arena *arena;
    Tensor *last;                   /* the newest tensor */
    int plain_sums;                 /* convolve values without minimal filtering, which rounds more */
    int shapes_only;                /* build without values, to count parameters and memory */
    size_t bytes;                   /* of all values made so far */
    int inside_tangent;             /* a tangent is being made: operators look at no tangents */
    double dropout;                 /* rate in [0, 1); 0 outside of training */
    RandomStream dropout_stream;    /* of the current example */
    uint32_t dropout_position;      /* next free position in it */
    struct { size_t count; real *memory; } spare[64];   /* gradients given back during the reverse sweep */
    int spare_count;
    double *seconds;                /* NULL, or time by operator: [OPERATOR_COUNT][2], forward, backward */
};

enum { OPERATOR_COUNT = 32 };       /* upper bound; operator_name(i) is NULL behind the last */
const char *operator_name(int index);

void graph_begin(Graph *graph, Arena *arena);   /* resets the arena */

/* ---- leaves ---- */

/* A constant with a copy of `value`, or zeros for NULL. */
Tensor *constant(Graph *graph, int height, int width, int channels, const real *value);
Tensor *number(Graph *graph, double value);     /* [1, 1, 1] */

/* The constant factor k + offset for bytes k [height, width, channels]. */
Tensor *from_bytes(Graph *graph, int height, int width, int channels, const unsigned char *k, double factor,
                   double offset);

/* A parameter whose value and gradient live elsewhere; gradient NULL: treated as a constant. */
Tensor *parameter(Graph *graph, int height, int width, int channels, const real *value, const real *flipped,
                  real *gradient);

/* ---- tangents ---- */

/* The same value as `a`, carrying the given tangent from here on; gradients flow through to `a`. With
 * NULL: the value of `a` without its tangent. */
Tensor *with_tangent(Tensor *a, Tensor *tangent);

/* ---- arithmetic, elementwise; one of the two operands may be a single number ---- */

Tensor *add(Tensor *a, Tensor *b);
Tensor *sub(Tensor *a, Tensor *b);
Tensor *mul(Tensor *a, Tensor *b);
Tensor *affine(double factor, Tensor *a, double offset);   /* factor a + offset */

/* ---- functions, elementwise ---- */

Tensor *exponential(Tensor *a);
Tensor *exponential_minus_1(Tensor *a);
Tensor *logarithm(Tensor *a);
Tensor *reciprocal(Tensor *a);
Tensor *square_root(Tensor *a);
Tensor *absolute(Tensor *a);
Tensor *logistic(Tensor *a);                /* sigmoid(a) = 1 / (1 + exp(-a)) */
Tensor *softplus(Tensor *a);                /* log(1 + exp(a)) = -log sigmoid(-a) */
Tensor *hyperbolic_tangent(Tensor *a);
Tensor *swish(Tensor *a);                   /* a sigmoid(a) */
Tensor *sine(Tensor *cycles);               /* sin(2 pi a): in cycles, so that reducing them is exact */
Tensor *cosine(Tensor *cycles);

/* ---- sums ---- */

Tensor *total(Tensor *a);                   /* the sum of all elements, a number */
Tensor *squared_norm(Tensor *a);            /* || a ||^2, a number */

/* ---- linear maps ---- */

/* A convolution with kernel [9, in, out] (3x3, zero padding) or [1, in, out] (1x1, a dense layer at every
 * position), bias [1, 1, out] and residual [height, width, out], each of which may be NULL:  y = conv(x) +
 * bias + residual. */
Tensor *convolve(Tensor *x, Tensor *kernel, Tensor *bias, Tensor *residual);

/* Transposed convolution 2x2, stride 2: kernel [4, in, out], y [2 height, 2 width, out],
 * y[2i+a][2j+b] = x[i][j] kernel[2a+b] + bias. */
Tensor *upsample(Tensor *x, Tensor *kernel, Tensor *bias);

/* Matrices: rows are positions, columns are channels. a [rows, n] times b [n rows, m] -> [a's height,
 * width, m]. */
Tensor *matrix_multiply(Tensor *a, Tensor *b);

/* factor * a b^T for a [rows, n], b [m rows, n] -> [a's height, width, m]. */
Tensor *outer_product(double factor, Tensor *a, Tensor *b);

/* ---- layers ---- */

/* Group normalisation (eps 1e-6) with min(32, channels/4) groups, then swish and dropout at the graph's
 * rate if asked: one pass over memory instead of four. scale, bias [1, 1, channels]. */
enum { NORM_ONLY = 0, NORM_SWISH = 1, NORM_SWISH_DROPOUT = 2 };
Tensor *normalise(Tensor *x, Tensor *scale, Tensor *bias, int kind);
int group_count(int channels);              /* 0 where the groups would not come out even */

/* softmax(q k^T / sqrt(channels)) over all positions: q, k [height, width, channels] -> [height, width,
 * positions]. The matrix is stored once, for the backward pass. */
Tensor *attention_weights(Tensor *q, Tensor *k);

/* attention_weights(q, k) v. Without tangents it is one operator that works on a few rows at a time, while
 * they are in the cache, and stores the matrix once, for the backward pass. */
Tensor *attend(Tensor *q, Tensor *k, Tensor *v);

/* ---- shapes ---- */

Tensor *concatenate(Tensor *a, Tensor *b);                 /* along the channels */
Tensor *spread_over(Tensor *vector, int height, int width);/* [1, 1, n] -> [height, width, n] */

/* [h, w, c] -> [h, w, c * count]: every channel times every factor, the factors fastest. */
Tensor *outer_scale(Tensor *a, const double *factors, int count);

/* 2x2 max-pooling, stride 2; the first of equals wins. */
Tensor *max_pool(Tensor *x);

/* ---- losses ---- */

/* sum over pixel values of -log softmax over the 256 levels c of -(u - x(c))^2 exp(-log_variance)/2, at
 * level k. u [height, width, channels], log_variance a number, k [height*width*channels] bytes (copied). A
 * number. */
Tensor *level_likelihood(Tensor *u, Tensor *log_variance, const unsigned char *k);

/* One level for each element of u from the same softmax: drawn by the uniform numbers `uniform`
 * [elements], or, where that is NULL, the most likely one. */
void level_choose(const Tensor *u, const Tensor *log_variance, const double *uniform, unsigned char *k);

/* ---- reverse mode ---- */

/* Add weight * d result / d parameter to the gradients of all parameters; result is a single number. */
void backward(Tensor *result, double weight);

size_t element_count(const Tensor *a);

/* ==== floor 3: nn.c ==================================================================================== */

typedef enum { VDM, DIFFENC_NT, DIFFENC } ModelKind;
typedef enum { NET_FLAT, NET_UNET } NetKind;
typedef enum { PREDICT_V, PREDICT_EPS, PREDICT_X } Prediction;
typedef enum { SCHEDULE_FIXED, SCHEDULE_LEARNED } ScheduleKind;

/* Everything that fixes what a model computes. It travels with every checkpoint. */
typedef struct {
    ModelKind kind;
    int score_blocks;                  /* L of vdm-L, diffenc-L-nt, diffenc-L-E; at least 1 */
    int encoder_blocks;                /* E; 0 unless kind is DIFFENC */
    NetKind net;                       /* the body of the score network */
    int channels, encoder_channels;    /* n of the score network and of the encoder, multiples of 4 */
    int height, width, image_channels;
    Prediction prediction;
    ScheduleKind schedule;
    double gamma_min, gamma_max;       /* the paper's are -13.3 and 5; where a learned schedule starts */
    int timesteps;                     /* T, or 0 for continuous time */
    double variance_ratio;             /* w: sigma_P^2 = sigma_Q^2 / w; 1 in continuous time */
    double dropout;                    /* in training, in [0, 1) */
} Config;

/* The paper's choices at a laptop's size: diffenc-4-2, flat, 32 and 16 channels, 28x28x1. */
Config config_default(void);

/* "vdm-8", "diffenc-8-nt", "diffenc-8-2": sets kind, score_blocks and encoder_blocks. */
int config_parse_model(Config *config, const char *name, Error *error);
void config_model_name(const Config *config, char name[32]);

/* Refuse what cannot be built, naming the option and the reason. */
int config_check(const Config *config, Error *error);

/* Levels of a U-Net of `blocks` blocks on an image: halve the height up to `blocks` times, stop after the
 * level that leaves it odd or at most 8. */
int unet_levels(int blocks, int height);

/* ---- parameters ---- */

typedef enum { INIT_ZERO, INIT_ONE, INIT_LECUN, INIT_GAMMA_B, INIT_GAMMA_W } Initial;

typedef struct {
    char name[56];                     /* "score.down.0.conv1.kernel" */
    int rank;
    int64_t shape[4];
    int taps, in, out;                 /* the same as a tensor: [taps, in, out] */
    Initial initial;
    size_t offset, count;              /* where it lies in the vectors of the model */
} Parameter;

/* A model is its configuration and one long vector of weights, of which there are companions of the same
 * length. */
typedef struct {
    Config config;
    Parameter *parameter;
    int parameter_count;
    int encoder_first, gamma_first;    /* where these parameters begin in the list; the score's begin at 0 */
    size_t weight_count;
    real *params;                      /* the weights in training */
    real *ema;                         /* their moving average: what is evaluated and sampled from */
    real *adam_m, *adam_v;             /* AdamW's moments */
    real *flipped;                     /* each kernel of params with taps reversed and in/out exchanged */
    uint64_t step;                     /* training steps taken */
} Model;

/* List the parameters, allocate the vectors, draw the initial weights. Returns 0, or -1 with error. */
int model_new(Model *model, const Config *config, uint64_t seed, Error *error);
void model_free(Model *model);

/* Bytes of all vectors of a model with this configuration; parameters are only counted, nothing is
 * allocated. */
int model_size(const Config *config, size_t *weight_count, Error *error);

/* ---- networks ---- */

/* One example's view of a model: a graph, and the parameters as leaves of it. A network function takes
 * parameters one after the other in a fixed order. Without weights (shapes only) it declares them, which
 * is how names and shapes come to be written down once. */
typedef struct {
    Graph graph;
    Model *model;
    const real *weights, *flipped;     /* vectors of the model; flipped may be NULL */
    real *gradient;                    /* NULL: no gradients wanted */
    Tensor **leaf;                     /* [parameter_count] */
    int next;                          /* the parameter that is taken next */
    int declaring;
    char scope[40];                    /* "score.down.0." */
} Network;

/* Begin a new example: resets the arena. */
void network_begin(Network *network);

/* The score network's output for z [h, w, c] at t; v, eps or x as the prediction says. The networks see
 * the normalised time (gamma - gamma_min)/(gamma_max - gamma_min), which for gamma(t) linear in t is t
 * itself, whatever its end points. */
Tensor *score_network(Network *network, Tensor *z, double t);

/* y(x, lambda) in (-1, 1), [h, w, c]. With t_dot, the derivative of the normalised time by lambda (a
 * number), y carries the tangent dy/dlambda; NULL: no tangent. All calls for one example share one dropout
 * mask: y stays one function of lambda. Call it before score_network, which goes on with the numbers
 * behind that mask. */
Tensor *encoder_network(Network *network, Tensor *x, double t, Tensor *t_dot);

/* gamma.b and gamma.w of the learned schedule, numbers. */
void schedule_parameters(Network *network, Tensor **b, Tensor **w);

/* ---- batches ---- */

/* Threads, each with an arena, a graph and a network of its own. Examples are dealt to GRADIENT_SLOTS
 * sums, example i to slot i mod GRADIENT_SLOTS, in order within the slot; a slot is worked on by one
 * thread at a time, and the slots are added in order. So the result has the same bits for any number of
 * threads. */
enum { GRADIENT_SLOTS = 16 };

typedef struct {
    int threads;
    Model *model;
    Network *network;                  /* [threads] */
    real *slot[GRADIENT_SLOTS];        /* [weight_count] each; NULL until gradients are asked for */
    Arena *results;
} Workers;

void workers_new(Workers *workers, Model *model, int threads);
void workers_free(Workers *workers);
size_t workers_memory(const Workers *workers);   /* bytes of the arenas */

/* Memory for the results of a batch, kept from step to step: after the first step a training allocates
 * nothing. */
void *workers_results(Workers *workers, size_t count, size_t size);

/* Calls `work` once for each example 0..count-1, on the threads, with a network whose graph has just
 * begun. Weights are model->params (with gradients) or any vector like it. Work that wants gradients calls
 * backward(). */
typedef void (*ExampleWork)(Network *network, int example, void *context);
void workers_run(Workers *workers, const real *weights, int with_gradients, int count, ExampleWork work,
                 void *context);

/* The sum of all slots of the last run with gradients, [weight_count], in slot 0. */
const real *workers_gradient(Workers *workers);

/* ---- training ---- */

typedef struct {
    double learning_rate;              /* 2e-4 */
    int warmup;                        /* steps of linear warm-up; 0: none */
    double beta1, beta2, epsilon;      /* 0.9, 0.99, 1e-8 */
    double weight_decay;               /* 0.01; biases are left alone */
    double clip;                       /* largest norm of the whole gradient; 0: no clipping */
    double ema;                        /* 0.9999; at first (1 + step)/(10 + step), where that is less */
} Optimizer;

Optimizer optimizer_default(void);

/* One step of AdamW and of the moving average with the given gradient [weight_count]; step is counted up.
 * Returns the norm of the gradient before clipping. If that is not finite nothing is changed. */
double optimizer_step(Model *model, const Optimizer *optimizer, const real *gradient, int threads);

/* Make model->flipped from model->params; needed before a run with gradients. */
void model_flip(Model *model, int threads);

/* ==== floor 4: diffenc.c =============================================================================== */

/* The method of one example. s < t in [0, 1]; d = height*width*channels; everything below is per example
 * and made of graph operations, so every function here can be differentiated. */
typedef struct {
    Network *network;
    Graph *graph;
    const Config *config;
    Tensor *gamma_min, *gamma_range;   /* b and |w| in gamma(t) = b + |w| t */
} Method;

Method method_begin(Network *network);

/* ---- pixels and schedule  [VDM, noise schedule] ---- */

Tensor *scale_pixels(const Method *m, const unsigned char *k);   /* x = 2 (k + 1/2)/256 - 1 */
Tensor *gamma_at(const Method *m, double t);                     /* gamma = -lambda = -log SNR */
Tensor *alpha_squared(Tensor *gamma);
Tensor *sigma_squared(Tensor *gamma);
Tensor *alpha_of(Tensor *gamma);
Tensor *sigma_of(Tensor *gamma);
Tensor *snr_of(Tensor *gamma);
Tensor *time_by_lambda(const Method *m);                         /* d normalised time / d lambda */

/* ---- the encoder  [DiffEnc, parameterization of the encoder and generative model] ---- */

typedef struct {
    Tensor *x_t;
    Tensor *y;        /* NULL unless the encoder is trained */
    Tensor *y_dot;    /* dy/dlambda at fixed x; NULL unless asked for */
} Encoded;

Encoded encode(const Method *m, Tensor *x, double t, int with_derivative);

Tensor *exact_counterterm(const Method *m, Encoded e, Tensor *gamma_t);   /* dx_t/dlambda */

/* ---- forward process ---- */

Tensor *diffuse(Tensor *x_t, Tensor *gamma_t, Tensor *eps);       /* z_t = alpha_t x_t + sigma_t eps */
Tensor *v_target(Tensor *x_t, Tensor *gamma_t, Tensor *eps);      /* v_t = alpha_t eps - sigma_t x_t */

/* ---- prediction ---- */

typedef struct {
    Tensor *output;   /* v^, eps^ or x^, as the model predicts */
    Tensor *x_hat;
} Predicted;

Predicted predict(const Method *m, Tensor *z_t, double t);
Tensor *x_from_output(const Method *m, Tensor *output, Tensor *z_t, Tensor *gamma_t);

/* ---- the loss terms, in nats per example ---- */

/* r of the continuous loss, and 1/2 gamma' weight ||r||^2. */
Tensor *continuous_residual(const Method *m, Encoded e, Predicted p, Tensor *gamma_t, Tensor *eps);
Tensor *continuous_loss(const Method *m, Tensor *r, Tensor *gamma_t);

/* ||mu_P - mu_Q||^2 / sigma_Q^2 of one step t -> s: twice the step KL at w = 1. distance_at encodes x,
 * draws z_t and asks the score network itself. */
Tensor *step_distance(const Method *m, Encoded at_s, Encoded at_t, Predicted p, double s, double t);
Tensor *distance_at(const Method *m, Tensor *x, Tensor *eps, double s, double t);
Tensor *step_kl(const Method *m, Tensor *distance, double variance_ratio);

Tensor *reconstruction_loss(const Method *m, const unsigned char *k, Tensor *x_0, Tensor *eps_0);
Tensor *latent_loss(const Method *m, Tensor *x_1);

/* One training example: the pixels, its time, and the noise of z_t and z_0, [d] each. */
typedef struct {
    const unsigned char *k;
    double t;
    const real *eps, *eps_0;
} Example;

typedef struct {
    Tensor *recon, *latent, *diffusion;   /* numbers, nats */
} LossTerms;

LossTerms objective(const Method *m, Example example);
Tensor *bits_per_dimension(const Method *m, LossTerms terms);

/* t_i of example i of B from the one uniform u of a step: VDM's low-discrepancy times, rounded up to the
 * next multiple of 1/T if T is finite (timesteps > 0). [VDM, low-discrepancy
 * sampler] */
double example_time(double u, int example, int batch, int timesteps);

/* ---- sampling ---- */

/* Mean and variance of p(z_s | z_t), and one draw from it. */
Tensor *generative_mean(const Method *m, Tensor *z_t, Tensor *x_hat, double s, double t);
Tensor *generative_variance(const Method *m, double s, double t);
Tensor *ancestral_step(const Method *m, Tensor *z_t, double s, double t, Tensor *eps);

/* The pixels at the end: the most likely of p(k | z_0), or drawn from it with one uniform number per value
 * (u NULL: the most likely). */
void decode_pixels(const Method *m, Tensor *z_0, const double *u, unsigned char *k);

/* ==== beside: data.c =================================================================================== */

/* Functions that return int return 0, or -1 with error and then nothing to free. */

/* `text` with control characters and bytes that are not UTF-8 escaped (\x1b), cut to `size` bytes: nothing
 * that a file holds may command the terminal. Returns `buffer`. */
const char *printable(const char *text, char *buffer, size_t size);

typedef struct { unsigned char *data; size_t size; } Bytes;   /* data from malloc */

/* Inflate all members of a gzip stream, or its first `most` bytes: what follows is not even looked at. */
int gzip_inflate(const unsigned char *data, size_t size, const char *name, uint64_t most, Bytes *out,
                 Error *error);

/* Write a file so that a crash at any moment leaves the old one or the new one: to a temporary file beside
 * it, flushed to the disk, renamed. A symbolic link stays: the file it points to is replaced. What is no
 * regular file is refused. `write` puts the content into a FILE and returns 0, or -1 and errno. */
typedef int (*FileWriter)(void *stream, const void *context);
int file_replace(const char *path, FileWriter write, const void *context, Error *error);

/* ---- images ---- */

/* pixels [height, width, channels], 1 or 3 channels, as .png, .pgm (1 channel) or .ppm: by the path's end. */
int image_write(const char *path, const unsigned char *pixels, int height, int width, int channels,
                Error *error);
int image_path_check(const char *path, int channels, Error *error);   /* before hours of work */

/* `count` images in a grid of at most `columns`, 2 white pixels around each. free() the result. */
unsigned char *image_grid(const unsigned char *images, int count, int columns, int height, int width,
                          int channels, int *grid_height, int *grid_width);

/* Curves in pixels [height, width, 3], a grey line at every whole y. What is not finite is left out. */
typedef struct { const double *at[2]; int count; unsigned char colour[3]; } Curve;   /* x, y [count] */
void chart_draw(const Curve *curves, int curve_count, unsigned char *pixels, int height, int width);

/* ---- data sets ---- */

typedef enum { SPLIT_TRAIN, SPLIT_TEST } Split;

typedef struct {
    uint32_t count;          /* images; digits: 60000 for training and 10000 for testing */
    int height, width, channels;
    unsigned char *pixels;   /* [count, height, width, channels], or NULL: the built-in digits */
    Split split;
    uint64_t seed;           /* of the built-in digits */
} Dataset;

/* Open `where`: the word "digits" (built in, drawn from `seed`), or a directory with MNIST or Fashion-MNIST
 * (train-images-idx3-ubyte, t10k-images-idx3-ubyte) or with those of CIFAR-10's data_batch_1.bin to
 * data_batch_5.bin, test_batch.bin that are there; MNIST comes first. All may be .gz; where both are, the
 * plain one is read, and a line on stderr says so. */
int dataset_open(Dataset *dataset, const char *where, Split split, uint64_t seed, Error *error);
void dataset_close(Dataset *dataset);

/* Copy image `index` to `out` [height, width, channels]. A digit is a function of (seed, split, index). */
void dataset_image(const Dataset *dataset, uint32_t index, unsigned char *out);

/* A hash of shape and pixels, or of split and seed of the built-in digits; the same on all machines. */
uint64_t dataset_digest(const Dataset *dataset);

/* Index `position` in the order of an epoch: for each (seed, epoch) a permutation of 0..count-1. */
uint32_t dataset_shuffle(uint64_t seed, uint32_t epoch, uint32_t position, uint32_t count);

/* The images of an IDX file, which takes `bytes` over; of a CIFAR-10 batch, behind those already there. */
int idx_parse(Bytes *bytes, const char *name, Dataset *dataset, Error *error);
int cifar_parse(const Bytes *bytes, const char *name, Dataset *dataset, Error *error);

/* ---- safetensors: https://github.com/huggingface/safetensors ---- */

typedef enum { TYPE_U8, TYPE_F32, TYPE_F64, TYPE_OTHER } ElementType;

typedef struct {
    const char *name;
    ElementType type;
    int rank;
    int64_t shape[8];
    size_t count, size;          /* elements, bytes */
    const unsigned char *data;   /* not aligned */
} TensorEntry;

typedef struct {
    Bytes bytes;
    TensorEntry *tensors;    /* sorted by name, like the metadata */
    int tensor_count;
    const char **metadata;   /* key, value, key, value, ... */
    int metadata_count;      /* pairs */
} TensorFile;

/* Read and check a whole file: data of tensors without overlap or gap. tensors_parse takes `bytes` over. */
int tensors_read(const char *path, TensorFile *file, Error *error);
int tensors_parse(Bytes bytes, const char *name, TensorFile *file, Error *error);
void tensors_free(TensorFile *file);
const TensorEntry *tensors_find(const TensorFile *file, const char *name);   /* or NULL */
const char *tensors_metadata(const TensorFile *file, const char *key);       /* or NULL */

/* A tensor of type F32 or F64 and of this shape into `out`; values that are not finite are refused. */
int tensors_copy(const TensorEntry *entry, const char *path, int rank, const int64_t *shape, real *out,
                 Error *error);

typedef struct {
    const char *name;
    ElementType type;
    int rank;
    int64_t shape[8];
    const void *data;   /* of that type, in this machine's order */
} TensorOut;

int tensors_write(const char *path, const TensorOut *tensors, int tensor_count, const char *const *metadata,
                  int metadata_count, Error *error);

/* ==== roof: main.c ===================================================================================== */

/* The mean loss of one batch in bits per dimension, by term, and the norm of its gradient. */
typedef struct {
    double recon, latent, diffusion, total, gradient_norm;
} StepReport;

/* One training step on images [batch, height, width, channels]: noise and times from (seed, model->step),
 * the gradient of the mean bits per dimension over the batch, AdamW and EMA. Returns 0, or -1 with error
 * and the model unchanged when a loss or a gradient is not finite. */
int training_step(Model *model, Workers *workers, const Optimizer *optimizer, const unsigned char *images,
                  int batch, uint64_t seed, StepReport *report, Error *error);

/* Draw `count` images [count, height, width, channels] with the weights `ema`, T steps of the ancestral
 * sampler from the given seed. Pixels are the most likely ones, or drawn from p(k | z_0). */
void sample_images(Model *model, Workers *workers, int count, int timesteps, uint64_t seed, int draw_pixels,
                   unsigned char *images);

/* The commands `check` and `bench` live in tests/check.c and tests/bench.c; arguments as main's without
 * the program. */
int check_main(int argc, char **argv);
int bench_main(int argc, char **argv);

#endif
