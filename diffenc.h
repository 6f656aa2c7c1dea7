/* diffenc.h - DiffEnc and the variational diffusion model, whole: every type and function of the program.
 *
 * This header is the manual. It follows the files from the ground up; a file calls only files on lower
 * floors:
 *
 *     tensor.c    floor 1   errors, memory, random numbers, the loops that do the arithmetic
 *     autograd.c  floor 2   tensors that remember how they were made: reverse mode, and tangents
 *     nn.c        floor 3   layers, the networks, parameters, batches on threads and ranks, optimisers, EMA
 *     diffenc.c   floor 4   the method: its equations, a training step, the bound on a data set, the samplers
 *     data.c      beside    files in and out; it uses tensor.c alone
 *     main.c      roof      the command line, settings and checkpoints, progress, logs, reports
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

#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

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

/* `text` with control characters and bytes that are not UTF-8 escaped (\x1b), cut to `size` bytes: nothing
 * that a file holds may command the terminal. Returns `buffer`. */
const char *printable(const char *text, char *buffer, size_t size);

/* Format the message into `error`, printable as a message may quote a file, and return -1, so that `return
 * fail(error, ...)` is one line. */
int fail(Error *error, const char *format, ...)
#ifdef __GNUC__
    __attribute__((format(printf, 2, 3)))
#endif
    ;

/* ---- memory ---- */

/* malloc and calloc for sizes that the program itself chose: out of memory, or a product that overflows,
 * prints one line and exits with status 1. */
void *allocate(size_t count, size_t size);
void *allocate_zeroed(size_t count, size_t size);

/* An arena hands out memory, aligned to 64 bytes, by moving a pointer, and takes all of it back at once. It
 * keeps its blocks, so that a second pass of the same size allocates nothing. One thread uses an arena at a
 * time. */
typedef struct Arena Arena;
typedef struct {
    void *block;
    size_t used;
} ArenaMark;

Arena *arena_new(void);
void arena_free(Arena *arena);
void *arena_allocate(Arena *arena, size_t count, size_t size);
ArenaMark arena_mark(const Arena *arena);
void arena_release(Arena *arena, ArenaMark mark);   /* everything allocated since the mark */
void arena_reset(Arena *arena);                     /* everything */
size_t arena_capacity(const Arena *arena);          /* bytes of all blocks, in use or not */

/* ---- work on several threads ---- */

/* Do pieces 0..count-1 of some work: all at once, or in as many parts as arena_divide says, each with scratch
 * memory of its own, on the threads of the parallel region that have nothing else to do. Where a part ends
 * must not change what is computed. */
typedef void PartWork(const void *context, int first, int end, Arena *scratch);
void in_parts(PartWork *work, const void *context, int count, Arena *scratch);
void arena_divide(Arena *arena, int parts);   /* of all work with this scratch memory from now on */

/* ---- random numbers ---- */

/* What a number is drawn for. Streams with different purposes are independent. The numbers are part of the
 * meaning of a seed: append, never reorder. */
typedef enum {
    RANDOM_WEIGHTS,        /* initial weights; example = index of the parameter */
    RANDOM_SHUFFLE,        /* order of the examples; step = epoch */
    RANDOM_TIME,           /* the one u of a training step */
    RANDOM_NOISE,          /* eps of z_t */
    RANDOM_NOISE_0,        /* eps_0 of z_0 */
    RANDOM_DROPOUT,        /* dropout masks of the score network */
    RANDOM_SAMPLER,        /* z_1 and the noise of the ancestral sampler; step = the time step */
    RANDOM_PIXELS,         /* pixels drawn from p(k | z_0) */
    RANDOM_GLYPHS,         /* built-in data; step = split, example = index */
    RANDOM_EVAL_TIME,      /* the one u of an evaluation */
    RANDOM_EVAL_NOISE,     /* eps of an evaluation; step = repetition */
    RANDOM_EVAL_NOISE_0,   /* eps_0 of an evaluation */
    RANDOM_CHECK,          /* whatever a test or check needs */
    RANDOM_ENCODER_DROPOUT,
    RANDOM_EVAL_STEP_NOISE /* eps of every step of finite T; step = the time step */
} RandomPurpose;

/* One stream of random numbers, a pure function of these four: there is no state to be saved or shared. */
typedef struct {
    uint64_t seed;
    uint32_t purpose, step, example;
} RandomStream;

RandomStream random_stream(uint64_t seed, RandomPurpose purpose, uint32_t step, uint32_t example);
uint32_t random_bits(RandomStream stream, uint32_t position);
double random_uniform(RandomStream stream, uint32_t position);       /* in [0, 1): of bits 2p and 2p + 1 */
void random_normal(RandomStream stream, real *out, size_t count);    /* the first `count` of the stream */

/* factor [count], for positions from `first` on, a multiple of DROPOUT_RUN: 1/(1-p) with probability 1-p,
 * else 0. p is `rate` to a multiple of 2^-16. Positions in different runs are independent. */
enum { DROPOUT_RUN = 128 };
void random_dropout(RandomStream stream, uint32_t first, size_t count, double rate, real *factor);

/* ---- the loops that do the arithmetic ---- */

/* Matrices and images are contiguous. `bias` and `start` may be NULL; `start` is laid out like the result,
 * may be the result itself and is added to it. What computes the gradient of a matrix or a kernel adds it to
 * what is there. */

/* c [rows, columns] = a [rows, inner] b [inner, columns] + bias + start */
void matrix_product(int rows, int inner, int columns, const real *a, const real *b, const real *bias,
                    const real *start, real *c, Arena *scratch);

/* c [inner, columns] += a^T b for a [rows, inner], b [rows, columns] */
void matrix_product_transposed(int rows, int inner, int columns, const real *a, const real *b, real *c,
                               Arena *scratch);

/* out [columns, rows] = a [rows, columns] transposed */
void transpose(const real *a, int rows, int columns, real *out);

/* y [h, w, out] = 3x3 convolution, stride 1, zero padding, of x [h, w, in] by kernel [3, 3, in, out]. The
 * gradient of x is the convolution of dy by the transposed kernel. */
void convolve3x3(int h, int w, int in, int out, const real *x, const real *kernel, const real *bias,
                 const real *start, real *y, Arena *scratch);
void convolve3x3_by_kernel(int h, int w, int in, int out, const real *x, const real *dy, real *dkernel,
                           Arena *scratch);

/* transposed [taps, out, in]: the transposed matrices of kernel [taps, in, out], taps in reverse order. */
void transpose_kernel(int taps, int in, int out, const real *kernel, real *transposed);

/* The same two by minimal filtering where that is faster: two to three times as fast, rounded four times as
 * coarsely, to 1e-6 of the result's norm in float. */
void convolve3x3_fast(int h, int w, int in, int out, const real *x, const real *kernel, const real *bias,
                      const real *start, real *y, Arena *scratch);
void convolve3x3_by_kernel_fast(int h, int w, int in, int out, const real *x, const real *dy, real *dkernel,
                                Arena *scratch);

/* y = dropout_factor swish(u), u = scale xhat + bias, xhat = (x - mean) / sqrt(variance + 1e-6), over equal
 * runs of channels. x, y [positions, channels]; scale, bias [channels]; dropout_factor like x, or NULL;
 * without swish u takes its place. mean and rstd (1 / deviation) [groups] are results of group_norm that the
 * others need. */
typedef struct {
    int positions, channels, groups, swish;
    const real *scale, *bias, *dropout_factor;
    real *mean, *rstd;
} GroupNorm;

void group_norm(const GroupNorm *n, const real *x, real *y, Arena *scratch);
void group_norm_tangent(const GroupNorm *n, const real *x, const real *x_dot, real *y_dot, Arena *scratch);

/* The gradients are added; each may be NULL. */
void group_norm_backward(const GroupNorm *n, const real *x, const real *dy, real *dx, real *dscale,
                         real *dbias, Arena *scratch);
void group_norm_tangent_backward(const GroupNorm *n, const real *x, const real *x_dot, const real *dy_dot,
                                 real *dx, real *dx_dot, real *dscale, real *dbias, Arena *scratch);

/* In place: each row of s [rows, columns] becomes its softmax p; the gradient dp by p becomes that by s. */
void softmax_rows(real *s, int rows, int columns);
void softmax_rows_backward(const real *p, real *dp, int rows, int columns);

/* Sum of -log p(k | u): a softmax over the 256 levels c of -(u - x(c))^2 precision / 2, x(c) = 2 (c +
 * 1/2)/256 - 1. u, k, du [count]; du and *dprecision are its derivatives. u is double: its distance to a
 * level counts. */
double level_softmax(size_t count, const double *u, const unsigned char *k, double precision, real *du,
                     double *dprecision);
int level_draw(double u, double precision, double uniform);   /* a level from it, by a number in [0, 1) */
int nearest_level(double u);                                  /* the most likely one */

double dot(const real *x, const real *y, size_t count);       /* summed in double, in a fixed order */
double seconds_now(void);                                     /* of a clock that only goes forward */

/* ==== floor 2: autograd.c ============================================================================== */

typedef struct Tensor Tensor;
typedef struct Graph Graph;

/* `forward` fills self->value from the values of self->input; `backward` adds to their gradients what
 * self->gradient contributes, and may overwrite that. What either takes from the arena is scratch memory. */
typedef struct {
    const char *name;
    void (*forward)(Tensor *self);
    void (*backward)(Tensor *self);
    int exact;                      /* float builds keep its results in double as well */
} Operator;

/* A tensor: its value, and how it was made. */
struct Tensor {
    Graph *graph;
    const Operator *op;             /* NULL: a leaf (constant or parameter) */
    int height, width, channels;    /* a parameter: [taps, in, out], [1, in, out] or [1, 1, n] */
    real *value;                    /* [height, width, channels] */
    double *exact;                  /* float builds: numbers and elementwise results, in double as well */
    real *gradient;                 /* the same shape; NULL while nothing needs it, or given back */
    Tensor *tangent;                /* d value / d lambda as a tensor of the same shape; NULL: zero */
    int needs_gradient;             /* some parameter is among its ancestors */
    Tensor *input[4];
    Tensor *previous;               /* the tensor made before this one: the order of the reverse sweep */
    const real *transposed_kernel;  /* parameters: taps reversed and in/out exchanged, or NULL */
    double number[2];               /* constants of the operator (a factor, a rate) */
    int option;                     /* likewise (a kind, a number of groups) */
    void *saved;                    /* what forward keeps for backward */
    RandomStream stream;            /* dropout: where the mask comes from */
    uint32_t position;
};

/* Seconds spent in an operator, forward and backward. */
typedef struct {
    const Operator *op;
    double seconds[2];
} OperatorTime;
enum { MOST_OPERATORS = 32 };

/* A graph lives in an arena and is built anew for every example; graph_begin forgets all of it. */
struct Graph {
    Arena *arena;
    Tensor *last;                   /* the newest tensor */
    int shapes_only;                /* build without values, to count parameters and memory */
    int plain_sums;                 /* 3x3 convolutions to come go by these */
    size_t bytes;                   /* of all values made so far */
    double dropout;                 /* rate in [0, 1); 0 outside of training */
    RandomStream dropout_stream;    /* of the current example */
    uint32_t dropout_position;      /* next free position in it */
    struct Spare { size_t count; real *memory; } spare[64];   /* gradients given back, to be used again */
    int spare_count;
    OperatorTime *times;            /* NULL, or [MOST_OPERATORS], at first all zeros */
};

void graph_begin(Graph *graph, Arena *arena);   /* resets the arena; keeps dropout, times and shapes_only */
size_t element_count(const Tensor *a);
double number_of(const Tensor *a);              /* element 0, in double */

/* Leaves: a constant with a copy of `value`, or zeros for NULL; factor k + offset for bytes k; standard
 * normal numbers; a single number; a parameter whose value and gradient live elsewhere (gradient NULL: a
 * constant). */
Tensor *constant(Graph *graph, int height, int width, int channels, const real *value);
Tensor *from_bytes(Graph *graph, int height, int width, int channels, const unsigned char *k, double factor,
                   double offset);
Tensor *gaussian(Graph *graph, int height, int width, int channels, RandomStream stream);
Tensor *number(Graph *graph, double value);
Tensor *parameter(Graph *graph, int height, int width, int channels, const real *value,
                  const real *transposed_kernel, real *gradient);

/* The value of `a` with another tangent, or without one. Gradients flow through to `a`. */
Tensor *with_tangent(Tensor *a, Tensor *tangent);
Tensor *without_tangent(Tensor *a);

/* Elementwise; one of two operands may be a single number. */
Tensor *add(Tensor *a, Tensor *b);
Tensor *sub(Tensor *a, Tensor *b);
Tensor *mul(Tensor *a, Tensor *b);
Tensor *affine(double factor, Tensor *a, double offset);   /* factor a + offset */
Tensor *exponential(Tensor *a);
Tensor *exponential_minus_1(Tensor *a);
Tensor *reciprocal(Tensor *a);
Tensor *square_root(Tensor *a);
Tensor *absolute(Tensor *a);
Tensor *logistic(Tensor *a);                /* sigmoid(a) = 1 / (1 + exp(-a)) */
Tensor *softplus(Tensor *a);                /* log(1 + exp(a)) = -log sigmoid(-a) */
Tensor *hyperbolic_tangent(Tensor *a);
Tensor *swish(Tensor *a);                   /* a sigmoid(a) */
Tensor *sine(Tensor *cycles);               /* sin(2 pi a): in cycles, so that reducing them is exact */
Tensor *cosine(Tensor *cycles);

Tensor *sum(Tensor *a);                     /* of all elements, a number */
Tensor *squared_norm(Tensor *a);            /* || a ||^2, a number */

/* conv(x) + bias + residual. kernel [9, in, out] (3x3, zero padding) or [1, in, out] (1x1, a dense layer at
 * every position), bias [1, 1, out], residual [height, width, out]; the last two may be NULL. 3x3 kernels go
 * by minimal filtering, or by plain sums if the graph says so, which round a quarter as much; tangents and
 * gradients always by filtering. */
Tensor *convolve(Tensor *x, Tensor *kernel, Tensor *bias, Tensor *residual);

/* Transposed convolution 2x2, stride 2: kernel [4, in, out], y [2 height, 2 width, out],
 * y[2i+a][2j+b] = x[i][j] kernel[2a+b] + bias. */
Tensor *upsample(Tensor *x, Tensor *kernel, Tensor *bias);

/* factor a b, or factor a b^T. Rows are positions, columns channels: a [rows, n], b [n, m] or [m, n] -> [a's
 * height, a's width, m]. */
Tensor *matrix_multiply(double factor, Tensor *a, Tensor *b, int b_transposed);

/* Group normalisation (eps 1e-6) with min(32, channels/4) groups, then swish and dropout at the graph's rate
 * if asked: one pass over memory instead of four. scale, bias [1, 1, channels]. group_count is 0 where groups
 * would not come out even. */
enum { NORM_ONLY = 0, NORM_SWISH = 1, NORM_SWISH_DROPOUT = 2 };
Tensor *normalise(Tensor *x, Tensor *scale, Tensor *bias, int kind);
int group_count(int channels);

/* softmax(q k^T / sqrt(channels)) over all positions: q, k [height, width, channels] -> [height, width,
 * positions]; and that times v, a few rows at a time while they are in the cache. */
Tensor *attention_weights(Tensor *q, Tensor *k);
Tensor *attend(Tensor *q, Tensor *k, Tensor *v);

Tensor *concatenate(Tensor *a, Tensor *b);                   /* along the channels */
Tensor *multiples(Tensor *a, const double *factors, int n);   /* [h, w, c] -> [h, w, c n], factors fastest */
Tensor *max_pool(Tensor *x);                                 /* 2x2, stride 2; the first of equals wins */

/* sum over pixel values of -log softmax over the 256 levels c of -(u - x(c))^2 exp(-log_variance)/2, at level
 * k, as a number. log_variance is a number, k [element_count(u)] is read at once. level_choose takes a level
 * for each u from that softmax: drawn by a stream of uniform numbers, or for NULL the most likely one. */
Tensor *level_likelihood(Tensor *u, Tensor *log_variance, const unsigned char *k);
void level_choose(const Tensor *u, const Tensor *log_variance, const RandomStream *draws, unsigned char *k);

/* Add weight * d result / d parameter to the gradients of all parameters; result is a single number. */
void backward(Tensor *result, double weight);

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
    int fourier_first, fourier_last;   /* frequencies of the features: 2^first .. 2^last; paper: 6, 7 */
    int height, width, image_channels;
    Prediction prediction;
    ScheduleKind schedule;
    double gamma_min, gamma_max;       /* the paper's are -13.3 and 5; where a learned schedule starts */
    int timesteps;                     /* T, or 0 for continuous time */
    double variance_ratio;             /* w: sigma_P^2 = sigma_Q^2 / w; 1 in continuous time */
    double dropout;                    /* in training, in [0, 1) */
    int classes;                       /* the networks see which of so many; 0: they see none */
} Config;

/* The paper's choices at a laptop's size: diffenc-4-2, flat, 32 and 16 channels, 28x28x1. */
Config config_default(void);

/* "vdm-8", "diffenc-8-nt", "diffenc-8-2": sets kind, score_blocks and encoder_blocks. */
int config_parse_model(Config *config, const char *name, Error *error);
void config_model_name(const Config *config, char name[32]);

/* Refuse what cannot be built, naming the option and the reason. */
int config_check(const Config *config, Error *error);

/* Levels of a U-Net of `blocks` blocks: halve the height up to `blocks` times, stop after the level that
 * leaves it odd or at most 8; none where the height is 1. Each has blocks/levels, rounded down. */
int unet_levels(int blocks, int height);

typedef enum { INIT_ZERO, INIT_ONE, INIT_LECUN, INIT_GAMMA_B, INIT_GAMMA_W } Initial;

typedef struct {
    char name[56];                     /* "score.down.0.conv1.kernel" */
    int rank;
    int64_t shape[4];
    int taps, in, out;                 /* the same as a tensor: [taps, in, out] */
    Initial initial;
    int is_kernel;                     /* what Muon may train: no vector, and no table of classes */
    int decays;                        /* by weight decay */
    int in_encoder;
    size_t offset, count;              /* where it lies in the vectors of the model */
} Parameter;

/* A model is its configuration and one long vector of weights, with companions of the same length. */
typedef struct {
    Config config;
    Parameter *parameter;
    int parameter_count;
    size_t weight_count;
    real *params;                      /* the weights in training */
    real *ema;                         /* their moving average: what is evaluated and sampled from */
    real *adam_m, *adam_v;             /* AdamW's moments; Muon's momentum stands in the first */
    uint64_t step;                     /* training steps taken */
} Model;

/* List the parameters, allocate the vectors, draw the initial weights. Returns 0, or -1 with error. */
int model_new(Model *model, const Config *config, uint64_t seed, Error *error);
void model_free(Model *model);

/* Only count the weights of such a model. */
int model_size(const Config *config, size_t *weight_count, Error *error);

/* One example's view of a model: a graph, and the parameters as leaves of it, found by name. Where the graph
 * has shapes only, the networks list their parameters: names and shapes are written down once. */
typedef struct {
    Graph graph;
    Model *model;
    const real *weights;               /* a vector of the model */
    const real *transposed;            /* its kernels transposed, or NULL */
    real *gradient;                    /* NULL: no gradients wanted */
    Tensor **leaf;                     /* [parameter_count] */
    int next;                          /* where to look first for the next parameter */
    int label;                         /* the example's class, where the model has classes */
    int encoder_fixed;                 /* no gradient of the encoder's weights in this example */
    char scope[40];                    /* "score.down.0." */
    const volatile sig_atomic_t *stop;
} Network;

void network_begin(Network *network);                        /* a new graph; resets the arena */
Tensor *network_renew(Network *network, const Tensor *t);    /* the same, but for the value of t */

/* The score network's output for z [h, w, c]: v, eps or x as the prediction says. t is lambda as the networks
 * see it, a number (`network_time` in diffenc.c). */
Tensor *score_network(Network *network, Tensor *z, Tensor *t);

/* y(x, lambda) in (-1, 1), [h, w, c], by plain sums where it reaches the score network, whose features sin(2
 * pi 128 z) magnify the rounding of minimal filtering 800 times: at t = 0 the reconstruction sees it alone.
 * It carries dy/dlambda if t carries a tangent. All calls for one example share one dropout mask: y stays one
 * function of lambda, and x_s - x_t shrinks with s - t. */
Tensor *encoder_network(Network *network, Tensor *x, Tensor *t, int plain_sums);

void schedule_parameters(Network *network, Tensor **b, Tensor **w);   /* gamma.b, gamma.w: numbers */

/* mpirun starts a program built by `make MPI=1` several times, on one machine or many, as ranks 0, 1, 2, ...
 * All of them run the same command, each with the whole model and a share of the examples, and meet where
 * results are put together. A rank that went another way would leave the rest waiting for good. So what only
 * one of them can know, a signal or a failure, they tell one another at each meeting. Rank 0 alone prints and
 * writes. Without MPI there is one rank. */
int this_rank(void);
int rank_count(void);
void ranks_begin(void);
int ranks_agree(int flag);   /* the largest flag of all ranks; does not return where a rank has failed */
void ranks_end(const char *failure);   /* NULL, or why this rank has failed, as a line for the terminal */

/* All ranks get each other's share of the records [rows, count], which have `size` bytes each. */
void ranks_gather(void *records, int rows, int count, size_t size);

/* Threads, each with an arena, a graph and a network of its own. A gradient is summed in slots, example i of
 * the rank's share in slot i mod (number of slots), which depends on the share alone; a slot is worked on by
 * one thread at a time, in order; slots and then ranks are added in order: the same bits for any number of
 * threads. */
enum { GRADIENT_SLOTS = 16 };

typedef struct {
    int threads;
    Model *model;
    Network *network;                  /* [threads] */
    real *slot[GRADIENT_SLOTS];        /* [weight_count] each; NULL until gradients are asked for */
    real *transposed;                  /* [weight_count] likewise */
    Arena *results;
    const volatile sig_atomic_t *stop; /* NULL, or not 0 when runs are to end early */
    void (*progress)(void *watcher, int done, int count);   /* NULL, or told of each example of workers_run */
    void *watcher;
} Workers;

void workers_new(Workers *workers, Model *model, int threads);
void workers_free(Workers *workers);
int network_stopped(const Network *network);

/* Memory for the results of a batch, kept from step to step. */
void *workers_results(Workers *workers, size_t count, size_t size);

/* Call `work` once for each example of the rank's share of 0..count-1, on the threads, with a network whose
 * graph has just begun. workers_run: with any vector of weights, without dropout and gradients; threads left
 * without an example help those that have one. */
typedef void (*ExampleWork)(Network *network, int example, void *context);
void workers_run(Workers *workers, const real *weights, int count, ExampleWork work, void *context);

/* With model->params, and `work` calls backward(): returns the sum of the gradients of all examples of all
 * ranks, [weight_count], or NULL when a rank was stopped. */
const real *workers_gradient(Workers *workers, int count, ExampleWork work, void *context);

typedef struct {
    double learning_rate;
    double encoder_rate;               /* the encoder's weights learn at this share of it */
    int muon;                          /* kernels by Muon instead of AdamW */
    double momentum;                   /* of Muon */
    int warmup;                        /* steps of linear warm-up; 0: none */
    double cooldown, steps;            /* over this last fraction of `steps` the rate falls to zero */
    double beta1, beta2, epsilon;      /* of AdamW */
    double weight_decay;               /* of kernels and scales */
    double clip;                       /* largest norm of the whole gradient; 0: no clipping */
    double ema;                        /* decay; at first (1 + step)/(35 + step), where that is less */
} Optimizer;

Optimizer optimizer_default(void);   /* the paper's, and 0.95 for Muon; the program's recipe is in main.c */

/* One step of the workers' model and of the moving average; step is counted up. Returns the norm of the
 * gradient before clipping, to which Muon's momentum is not subject. If that is not finite nothing is
 * changed. */
double optimizer_step(Workers *workers, const Optimizer *optimizer, const real *gradient);

/* Why a step cannot be taken, as an error: the first loss that is not finite, or else the largest one, and
 * the same of the parameters' gradients. */
int diverged(const Model *model, const char *const *names, const double *losses, int count,
             const real *gradient, Error *error);

/* ==== floor 4: diffenc.c =============================================================================== */

/* The method of one example. 0 <= s < t <= 1; everything is per example and made of graph operations, so
 * every function can be differentiated. Equations and sources stand in diffenc.c. */
typedef struct {
    Network *network;
    Graph *graph;
    const Config *config;
    Tensor *gamma_min, *gamma_range;   /* b and |w| in gamma(t) = b + |w| t */
} Method;

Method method_begin(Network *network);

Tensor *scale_pixels(const Method *m, const unsigned char *k);
Tensor *gamma_at(const Method *m, double t);
Tensor *alpha_squared(Tensor *gamma);
Tensor *sigma_squared(Tensor *gamma);
Tensor *alpha_of(Tensor *gamma);
Tensor *sigma_of(Tensor *gamma);
Tensor *snr_of(Tensor *gamma);
Tensor *network_time(const Method *m, Tensor *gamma_t);           /* what the networks see of lambda */

typedef struct {
    Tensor *x_t;
    Tensor *y;        /* NULL unless the encoder is trained */
    Tensor *y_dot;    /* dy/dlambda at fixed x; NULL unless asked for */
} Encoded;

Encoded encode(const Method *m, Tensor *x, double t, int with_derivative);
Tensor *exact_counterterm(const Method *m, Encoded e, Tensor *gamma_t);   /* dx_t/dlambda */

Tensor *diffuse(Tensor *x_t, Tensor *gamma_t, Tensor *eps);       /* z_t */
Tensor *v_target(Tensor *x_t, Tensor *gamma_t, Tensor *eps);      /* v_t */

typedef struct {
    Tensor *output;   /* v^, eps^ or x^, as the model predicts */
    Tensor *x_hat;
} Predicted;

Predicted predict(const Method *m, Tensor *z_t, double t);
Tensor *x_from_output(const Method *m, Tensor *output, Tensor *z_t, Tensor *gamma_t);
double counterterm_error(const Method *m, Tensor *x, Tensor *eps, double t);

/* The loss terms, nats per example. */
Tensor *continuous_residual(const Method *m, Encoded e, Predicted p, Tensor *gamma_t, Tensor *eps);   /* r */
Tensor *continuous_loss(const Method *m, Tensor *r, Tensor *gamma_t);
Tensor *step_distance(const Method *m, Encoded at_s, Encoded at_t, Predicted p, double s, double t);
Tensor *distance_at(const Method *m, Tensor *x, Tensor *eps, double s, double t);
Tensor *step_kl(const Method *m, Tensor *distance, double variance_ratio);
double best_variance_ratio(double mean_distance, int d);
Tensor *reconstruction_loss(const Method *m, const unsigned char *k, Tensor *x_0, Tensor *eps_0);
Tensor *latent_loss(const Method *m, Tensor *x_1);

/* One example: the pixels, its time, the noise of z_t and z_0, [d] each, and its class. */
typedef struct {
    const unsigned char *k;
    double t;
    const real *eps, *eps_0;
    int label;
} Example;

typedef struct {
    Tensor *recon, *latent, *diffusion;   /* numbers, nats */
} LossTerms;

LossTerms objective(const Method *m, Example example);
Tensor *bits_per_dimension(const Method *m, LossTerms terms);

/* The time of example i of a training batch, and of draw j of an evaluation; u is one uniform number for all
 * of them. */
double example_time(double u, int i, int batch, int timesteps);
double evaluation_time(double u, double j, int timesteps);

Tensor *generative_mean(const Method *m, Tensor *z_t, Tensor *x_hat, double s, double t);
Tensor *generative_variance(const Method *m, double s, double t);
Tensor *ancestral_step(const Method *m, Tensor *z_t, double s, double t, Tensor *eps);
Tensor *deterministic_step(const Method *m, Tensor *z_t, Tensor *x_hat, double s, double t);
void decode_pixels(const Method *m, Tensor *z_0, const RandomStream *draws, unsigned char *k);

/* Of one batch: the mean of the loss by term in bits per dimension, and the norm of its gradient. */
typedef struct {
    double recon, latent, diffusion, total, gradient_norm;
} StepReport;

/* Here and below, labels [one for each image] are read by a model with classes, and must be less than their
 * number; else they may be NULL. */

/* One training step on images [batch, height, width, channels]: noise and times from (seed, model->step), the
 * gradient of the mean bits per dimension (by the encoder's weights from a quarter of the batch, see
 * diffenc.c), the optimiser's step. Returns 0, or -1 with error and the model unchanged when a loss or a
 * gradient is not finite, or the workers were stopped. */
int training_step(Model *model, Workers *workers, const Optimizer *optimizer, const unsigned char *images,
                  const unsigned char *labels, int batch, uint64_t seed, StepReport *report, Error *error);

/* The loss terms of given examples in nats, [batch], and the gradient of the mean bits per dimension. No
 * dropout. */
const real *batch_gradient(Workers *workers, const Example *examples, int batch, double (*terms)[3]);

/* What `evaluate` tells of a single draw: its t and lambda, its diffusion loss in bits per dimension, as a
 * density over t (whose mean is the loss) and over lambda, and counterterm_error. */
enum {
    DRAW_TIME,
    DRAW_LAMBDA,
    DRAW_LOSS,
    DRAW_LOSS_BY_LAMBDA,
    DRAW_COUNTERTERM_ERROR,
    DRAW_COLUMNS
};

/* With the weights `ema`, for each of `count` images: recon, latent, diffusion and total in bits per
 * dimension, the mean over `repeats` draws of time and noise, which do not depend on the model; draws
 * [repeats, count] may be NULL; and [T, count]: ||mu_P - mu_Q||^2/sigma_Q^2 of every step. */
void evaluate(Workers *workers, const unsigned char *images, const unsigned char *labels, int count,
              int repeats, uint64_t seed, double (*terms)[4], double (*draws)[DRAW_COLUMNS]);
void step_distances(Workers *workers, const unsigned char *images, const unsigned char *labels, int count,
                    uint64_t seed, double *distance);

/* Draw `count` images [count, height, width, channels] with the weights `ema`, in T ancestral or
 * deterministic steps. Pixels are the most likely ones, or drawn from p(k | z_0). The way there goes into
 * trajectory: x^ and z_t as pixels, [frames, 2, count, height, width, channels], at times evenly from 1 to 0,
 * 2 to T + 1 frames and up to 1000; or frames is 0. Returns 0, or -1 where some z_0 is not finite. */
int sample_images(Workers *workers, const unsigned char *labels, int count, int timesteps, int deterministic,
                  uint64_t seed, int draw_pixels, unsigned char *images, int frames,
                  unsigned char *trajectory);

/* ==== beside: data.c =================================================================================== */

/* Functions that take an Error and return int return 0, or -1 with error and nothing new to free. */

typedef struct { unsigned char *data; size_t size; } Bytes;   /* data from malloc */

/* Inflate all members of a gzip stream, or its first `most` bytes: what follows is not even looked at. */
int gzip_inflate(const unsigned char *data, size_t size, const char *name, uint64_t most, Bytes *out,
                 Error *error);

/* Write a file so that a crash at any moment leaves the old one or the new one: to a temporary file beside
 * it, flushed to the disk, renamed. A symbolic link stays: the file it points to is replaced. What is no
 * regular file is refused. `write` puts the content into a FILE and returns 0, or -1 and errno. */
typedef int (*FileWriter)(FILE *stream, const void *context);
int file_replace(const char *path, FileWriter write, const void *context, Error *error);

/* ---- images ---- */

int has_extension(const char *path, const char *extension);   /* ".png", in letters of any case */

typedef struct {
    const unsigned char *pixels;   /* [count, height, width, channels] */
    int count, height, width, channels;
} Pictures;

/* By the path's end: one picture of 1 or 3 channels as .png, .pgm (1 channel) or .ppm; any number as .npy, or
 * as frames of an endless .apng or .png, `delay` milliseconds each, below 65536. "-" is stdout, as .png. */
int pictures_write(const char *path, Pictures pictures, int delay, Error *error);
int picture_path_check(const char *path, int channels, Error *error);   /* before hours of work */

/* A grid of at most `columns` of every `each` of them, 2 white pixels around each one. */
Pictures picture_grids(Pictures pictures, int each, int columns, Arena *arena);

/* Lines with round ends and soft edges between points [count] (x, y), dots where from = to, on canvas [size,
 * size, 3], which holds all from (0, 0) to (255, 255): the real x in -1..1 of a level is at pixel (x + 1)/2
 * size - 1/2. They only brighten, so a canvas begins black. The radius is in pixels. */
void lines_draw(unsigned char *canvas, int size, const unsigned char *from, const unsigned char *to,
                int count, double radius, const unsigned char colour[3]);

/* A chart as SVG, on its own or inside HTML, light or dark as the reader's system is. What is not finite is
 * left out; the beginning of a falling curve is cut off where its end would look flat. */
typedef struct {
    const char *name;
    const double *x, *y, *error;   /* [count]; error: NULL, or standard errors, drawn as a band */
    int count;
} Curve;
void chart_svg(FILE *out, const char *title, const char *x_label, const char *y_label, const Curve *curves,
               int count);

/* `text` for XML or HTML; like printable(), and <, >, &, ' and " are escaped. */
void put_escaped(FILE *out, const char *text);

/* ---- data sets ---- */

typedef enum { SPLIT_TRAIN, SPLIT_TEST } Split;

typedef struct {
    uint32_t count;          /* images; built in: 60000 for training and 10000 for testing */
    int height, width, channels;
    unsigned char *pixels;   /* [count, height, width, channels], or NULL: built in, digits or the swirl */
    Split split;
    uint64_t seed;           /* of what is built in */
    unsigned char *labels;   /* [count], below `classes`, or NULL: built in, or there are none */
    int classes;             /* 0: there are no labels */
} Dataset;

/* Open `where`: "digits" or "swirl" (built in, drawn from `seed`; points of a spiral, images of 1x1 pixels
 * with channels x and y), or a directory with MNIST or Fashion-MNIST (train-images-idx3-ubyte or t10k-...,
 * labels where there are some), or else the batches of CIFAR-10 that are there. All may be .gz; where both
 * are, the plain one is read, and a line on stderr says so. */
int dataset_open(Dataset *dataset, const char *where, Split split, uint64_t seed, Error *error);
void dataset_close(Dataset *dataset);

/* Copy image `index` to `out` [height, width, channels]. What is built in is a function of (seed, split,
 * index). Its label, or -1 where there is none. */
void dataset_image(const Dataset *dataset, uint32_t index, unsigned char *out);
int dataset_label(const Dataset *dataset, uint32_t index);

/* A hash of shape, pixels and labels, if they count, or of what makes built-in data; alike everywhere. */
uint64_t dataset_digest(const Dataset *dataset, int with_labels);

/* Index `position` in the order of an epoch: for each (seed, epoch) a permutation of 0..count-1. */
uint32_t dataset_shuffle(uint64_t seed, uint32_t epoch, uint32_t position, uint32_t count);

/* The images of an IDX file; their labels; what a CIFAR-10 batch adds to both. IDX takes `bytes` over. */
int idx_parse(Bytes *bytes, const char *name, Dataset *dataset, Error *error);
int idx_labels_parse(Bytes *bytes, const char *name, Dataset *dataset, Error *error);
int cifar_parse(const Bytes *bytes, const char *name, Dataset *dataset, Error *error);

/* ---- safetensors: https://github.com/huggingface/safetensors ---- */

typedef enum { TYPE_U8, TYPE_F32, TYPE_F64, TYPE_OTHER } ElementType;

typedef struct {
    const char *name;
    ElementType type;
    int rank;
    int64_t shape[8];
    const void *data;     /* as this machine has it; of a file that was read: little-endian, not aligned */
    size_t count, size;   /* elements, bytes: of what was read */
} TensorEntry;

typedef struct {
    Bytes bytes;
    TensorEntry *tensors;    /* sorted by name when read, like the metadata */
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

/* Of `file` the tensors and metadata, in the order they have; names and metadata are UTF-8. */
int tensors_write(const char *path, const TensorFile *file, Error *error);

/* ==== roof: main.c ===================================================================================== */

/* The commands `check` and `bench` live in tests/check.c and tests/bench.c; arguments as main's without
 * the program. */
int check_main(int argc, char **argv);
int bench_main(int argc, char **argv);

#endif
