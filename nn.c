/* nn.c - floor 3: layers, the score network, the encoder, parameters, batches on threads, AdamW, Muon, EMA.
 *
 * A layer is a function from tensor to tensor that takes its parameters from the network by name. The
 * first time a network is run it has no weights and only declares them; there is no second place where
 * shapes are listed. */

#include "diffenc.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

/* ---- configuration ---- */

enum { MOST_BLOCKS = 256, MOST_CHANNELS = 1024, MOST_CLASSES = 256 };
enum { LARGEST_SIDE = 4096, HIGHEST_FOURIER = 12 };

Config config_default(void) {
    return (Config){.kind = DIFFENC, .score_blocks = 4, .encoder_blocks = 2, .net = NET_FLAT,
                    .channels = 32, .encoder_channels = 16, .fourier_first = 6, .fourier_last = 7,
                    .height = 28, .width = 28, .image_channels = 1, .prediction = PREDICT_V,
                    .schedule = SCHEDULE_FIXED, .gamma_min = -13.3, .gamma_max = 5, .variance_ratio = 1,
                    .dropout = 0.1};
}

void config_model_name(const Config *config, char name[32]) {
    if (config->kind == VDM)
        snprintf(name, 32, "vdm-%d", config->score_blocks);
    else if (config->kind == DIFFENC_NT)
        snprintf(name, 32, "diffenc-%d-nt", config->score_blocks);
    else
        snprintf(name, 32, "diffenc-%d-%d", config->score_blocks, config->encoder_blocks);
}

static int blocks_fit(const Config *c) {
    return c->score_blocks >= 1 && c->score_blocks <= MOST_BLOCKS &&
           c->encoder_blocks >= (c->kind == DIFFENC) && c->encoder_blocks <= MOST_BLOCKS;
}

/* What was read has to give the same name again: nothing may stand before, between or behind it. */
int config_parse_model(Config *config, const char *name, Error *error) {
    Config c = *config;
    char again[32];
    c.score_blocks = c.encoder_blocks = 0;
    if (sscanf(name, "vdm-%3d", &c.score_blocks) == 1)
        c.kind = VDM;
    else
        c.kind = sscanf(name, "diffenc-%3d-%3d", &c.score_blocks, &c.encoder_blocks) == 2 ? DIFFENC
                                                                                          : DIFFENC_NT;
    config_model_name(&c, again);
    if (strcmp(name, again) != 0 || !blocks_fit(&c))
        return fail(error,
                    "model '%.40s': expected vdm-L, diffenc-L-nt or diffenc-L-E with L and E from 1 to %d",
                    name, MOST_BLOCKS);
    *config = c;
    return 0;
}

int unet_levels(int blocks, int height) {
    int levels = height > 1;
    for (height /= 2; levels < blocks && height % 2 == 0 && height > 8; height /= 2)
        levels++;
    return levels;
}

/* A network with so many channels at its first level, twice as many at each further one: all inputs of group
 * normalisation, among them [h | kept] with twice a level's channels, must come out even. */
static int check_channels(const char *option, int channels, int levels, Error *error) {
    if (channels < 4 || channels > MOST_CHANNELS || channels % 4)
        return fail(error, "%s %d: must be a multiple of 4 from 4 to %d", option, channels, MOST_CHANNELS);
    for (int level = 0; level == 0 || level < levels; level++) {
        const int64_t width = (int64_t)channels << level;
        if (width > MOST_CHANNELS)
            return fail(error, "%s %d: level %d of the U-Net would have %lld channels, %d are the most",
                        option, channels, level, (long long)width, MOST_CHANNELS);
        if (!group_count((int)width) || !group_count((int)(2 * width)))
            return fail(error, "%s %d: %lld channels do not divide into 32 groups", option, channels,
                        (long long)(group_count((int)width) ? 2 * width : width));
    }
    return 0;
}

static int check_unet(const char *what, int blocks, const Config *c, Error *error) {
    const int levels = unet_levels(blocks, c->height);
    if (c->height % (1 << levels) || c->width % (1 << levels))
        return fail(error, "%s: a U-Net of %d blocks halves the image %d times, which %dx%d does not allow",
                    what, blocks, levels, c->height, c->width);
    return 0;
}

int config_check(const Config *c, Error *error) {
    if (c->height < 1 || c->width < 1 || c->height > LARGEST_SIDE || c->width > LARGEST_SIDE)
        return fail(error, "image size %dx%d: each side must be from 1 to %d", c->height, c->width,
                    LARGEST_SIDE);
    if (c->image_channels < 1 || c->image_channels > 3)
        return fail(error, "image channels %d: must be 1 to 3", c->image_channels);
    if (!blocks_fit(c))
        return fail(error, "model: L %d and E %d must be from 1 to %d", c->score_blocks, c->encoder_blocks,
                    MOST_BLOCKS);
    if (c->net == NET_UNET && check_unet("net unet", c->score_blocks, c, error))
        return -1;
    if (c->kind == DIFFENC && check_unet("encoder", c->encoder_blocks, c, error))
        return -1;
    if (check_channels("channels", c->channels,
                       c->net == NET_UNET ? unet_levels(c->score_blocks, c->height) : 1, error))
        return -1;
    if (c->kind == DIFFENC && check_channels("encoder-channels", c->encoder_channels,
                                             unet_levels(c->encoder_blocks, c->height), error))
        return -1;
    if (c->fourier_first < 0 || c->fourier_first > c->fourier_last || c->fourier_last > HIGHEST_FOURIER)
        return fail(error, "fourier %d..%d: must be ascending and within 0..%d", c->fourier_first,
                    c->fourier_last, HIGHEST_FOURIER);
    if (!(c->gamma_min < c->gamma_max) || !(c->gamma_min >= -40) || !(c->gamma_max <= 40))
        return fail(error, "gamma-min %g, gamma-max %g: must be ascending and within -40..40", c->gamma_min,
                    c->gamma_max);
    if (c->timesteps < 0 || c->timesteps > 1000000)
        return fail(error, "timesteps %d: must be from 1 to 1000000, or 0 for continuous time", c->timesteps);
    if (!(c->variance_ratio > 0) || !(c->variance_ratio <= 1e6))
        return fail(error, "variance-ratio %g: must be greater than 0 and at most 1e6", c->variance_ratio);
    if (c->variance_ratio != 1 && c->timesteps == 0)
        return fail(
            error,
            "variance-ratio %g: the bound diverges in continuous time unless it is 1; give --timesteps",
            c->variance_ratio);
    if (c->classes < 0 || c->classes > MOST_CLASSES)
        return fail(error, "classes %d: must be from 1 to %d, or 0 for a model without", c->classes,
                    MOST_CLASSES);
    if (!(c->dropout >= 0) || !(c->dropout < 1))
        return fail(error, "dropout %g: must be at least 0 and less than 1", c->dropout);
    return 0;
}

/* ---- parameters ---- */

/* Append "NAME.INDEX." to the scope, without what is NULL or negative; the caller restores the returned
 * length. */
static size_t scope_enter(Network *n, const char *name, int index) {
    const size_t length = strlen(n->scope);
    if (name)
        snprintf(n->scope + length, sizeof n->scope - length, "%s.", name);
    const size_t named = strlen(n->scope);
    if (index >= 0)
        snprintf(n->scope + named, sizeof n->scope - named, "%d.", index);
    return length;
}

static void scope_leave(Network *n, size_t length) { n->scope[length] = 0; }

static void declare(Network *n, const char *name, int rank, int taps, int in, int out, Initial initial) {
    Model *m = n->model;
    Parameter *grown = realloc(m->parameter, (m->parameter_count + 1) * sizeof(Parameter));
    if (!grown) {
        fputs("diffenc: out of memory\n", stderr);
        exit(1);
    }
    m->parameter = grown;
    Parameter *p = &m->parameter[m->parameter_count++];
    *p = (Parameter){.rank = rank, .taps = taps, .in = in, .out = out, .initial = initial,
                     .count = (size_t)taps * in * out, .offset = m->weight_count};
    snprintf(p->name, sizeof p->name, "%s%s", n->scope, name);
    /* The classes' embedding is a table and no kernel. Decay would draw a row back to zero while its class is
     * not drawn, the more the rarer the class is. */
    p->is_kernel = rank > 1 && strcmp(name, "class.kernel") != 0;
    p->decays = p->is_kernel || initial == INIT_ONE;   /* no bias, nothing of the schedule */
    p->in_encoder = strncmp(p->name, "encoder.", 8) == 0;
    m->weight_count += p->count;
    const int side = taps == 9 ? 3 : 2;
    const int64_t shape[4] = {side, side, in, out};
    for (int i = 0; i < rank; i++)   /* the last `rank` of the four */
        p->shape[i] = shape[4 - rank + i];
}

/* The index of the parameter "SCOPE NAME". The search begins behind the one found last, where the next one
 * nearly always is. */
static int find_parameter(Network *n, const char *name) {
    const size_t length = strlen(n->scope);
    const Model *m = n->model;
    for (int tried = 0; tried < m->parameter_count; tried++, n->next++) {
        const char *found = m->parameter[n->next %= m->parameter_count].name;
        if (strncmp(found, n->scope, length) == 0 && strcmp(found + length, name) == 0)
            return n->next++;
    }
    assert(!"a parameter that was not declared");
    return 0;
}

/* A parameter as a leaf of the graph: a vector [out] (rank 1), a matrix [in, out] (rank 2) or a kernel
 * [side, side, in, out] (rank 4). */
static Tensor *take(Network *n, const char *name, int rank, int taps, int in, int out, Initial initial) {
    if (n->graph.shapes_only) {
        declare(n, name, rank, taps, in, out, initial);
        return parameter(&n->graph, taps, in, out, NULL, NULL, NULL);
    }
    const int index = find_parameter(n, name);
    const Parameter *p = &n->model->parameter[index];
    const int learns = n->gradient && !(p->in_encoder && n->encoder_fixed);
    assert(p->taps == taps && p->in == in && p->out == out);
    if (!n->leaf[index])
        n->leaf[index] = parameter(&n->graph, taps, in, out, n->weights + p->offset,
                                   n->transposed && rank > 1 ? n->transposed + p->offset : NULL,
                                   learns ? n->gradient + p->offset : NULL);
    return n->leaf[index];
}

/* ---- layers ---- */

/* 3x3 convolution (taps 9) or the same dense layer at every position (taps 1), with bias and residual. */
static Tensor *affine_map(Network *n, const char *name, int taps, Tensor *x, int out, Initial initial,
                          Tensor *residual) {
    const size_t scope = scope_enter(n, name, -1);
    Tensor *kernel = take(n, "kernel", taps == 1 ? 2 : 4, taps, x->channels, out, initial);
    Tensor *bias = take(n, "bias", 1, 1, 1, out, INIT_ZERO);
    scope_leave(n, scope);
    return convolve(x, kernel, bias, residual);
}

static Tensor *dense(Network *n, const char *name, Tensor *x, int out, Initial initial, Tensor *residual) {
    return affine_map(n, name, 1, x, out, initial, residual);
}

static Tensor *conv3x3(Network *n, const char *name, Tensor *x, int out, Initial initial, Tensor *residual) {
    return affine_map(n, name, 9, x, out, initial, residual);
}

static Tensor *norm(Network *n, const char *name, Tensor *x, int kind) {
    const size_t scope = scope_enter(n, name, -1);
    Tensor *scale = take(n, "scale", 1, 1, 1, x->channels, INIT_ONE);
    Tensor *bias = take(n, "bias", 1, 1, 1, x->channels, INIT_ZERO);
    scope_leave(n, scope);
    return normalise(x, scale, bias, kind);
}

/* The row of the classes' embedding that belongs to the example, plus h: a product with a row of zeros and
 * one 1. */
static Tensor *add_class(Network *n, Tensor *h) {
    const int classes = n->model->config.classes;
    real one_hot[MOST_CLASSES] = {0};
    if (classes == 0)
        return h;
    one_hot[n->label] = 1;
    Tensor *rows = take(n, "class.kernel", 2, 1, classes, h->channels, INIT_ZERO);
    return convolve(constant(&n->graph, 1, 1, classes, one_hot), rows, NULL, h);
}

/* [1, 1, 4 channels]: sines and cosines of 1000 t at channels/2 frequencies, then two dense layers, before
 * whose last swish the class comes in. Cycles instead of radians, because whole ones are then taken off
 * without rounding. */
static Tensor *time_embedding(Network *n, Tensor *t, int channels) {
    const int half = channels / 2;
    double frequency[MOST_CHANNELS / 2];
    for (int j = 0; j < half; j++)
        frequency[j] = 1000 / 6.283185307179586 * exp(-log(10000) * j / (half - 1));
    Tensor *cycles = multiples(t, frequency, half);
    Tensor *h = concatenate(sine(cycles), cosine(cycles));
    const size_t scope = scope_enter(n, "time", -1);
    h = swish(dense(n, "dense0", h, 4 * channels, INIT_LECUN, NULL));
    h = dense(n, "dense1", h, 4 * channels, INIT_LECUN, NULL);
    scope_leave(n, scope);
    return swish(add_class(n, h));
}

/* h = conv1(swish(GN(x))) + dense_nobias(time);  h = conv2(dropout(swish(GN(h))));  x + h, x through a 1x1
 * skip where the channels differ. The time is added to conv1's bias, and x is where conv2 starts its sums:
 * neither is a pass over memory of its own. */
static Tensor *res_block(Network *n, const char *name, int index, Tensor *x, Tensor *time, int out) {
    const size_t scope = scope_enter(n, name, index);
    Tensor *h = norm(n, "norm1", x, NORM_SWISH);
    Tensor *kernel = take(n, "conv1.kernel", 4, 9, x->channels, out, INIT_LECUN);
    Tensor *bias = take(n, "conv1.bias", 1, 1, 1, out, INIT_ZERO);
    Tensor *projection = take(n, "time.kernel", 2, 1, time->channels, out, INIT_ZERO);
    h = convolve(h, kernel, convolve(time, projection, NULL, bias), NULL);
    h = norm(n, "norm2", h, NORM_SWISH_DROPOUT);
    Tensor *skip = x->channels == out ? x : dense(n, "skip", x, out, INIT_LECUN, NULL);
    h = conv3x3(n, "conv2", h, out, INIT_ZERO, skip);
    scope_leave(n, scope);
    return h;
}

/* x + out(softmax(q k^T / sqrt(channels)) v), q, k, v of GN(x): one head over all positions. */
static Tensor *attention(Network *n, const char *name, Tensor *x) {
    const size_t scope = scope_enter(n, name, -1);
    Tensor *h = norm(n, "norm", x, NORM_ONLY);
    Tensor *q = dense(n, "q", h, x->channels, INIT_LECUN, NULL);
    Tensor *k = dense(n, "k", h, x->channels, INIT_LECUN, NULL);
    Tensor *v = dense(n, "v", h, x->channels, INIT_LECUN, NULL);
    h = dense(n, "out", attend(q, k, v), x->channels, INIT_ZERO, x);
    scope_leave(n, scope);
    return h;
}

static Tensor *middle(Network *n, Tensor *h, Tensor *time) {
    h = res_block(n, "mid", 0, h, time, h->channels);
    h = attention(n, "mid.attn", h);
    return res_block(n, "mid", 1, h, time, h->channels);
}

/* [z | sin(2^f 2 pi z) | cos(2^f 2 pi z)] for each f, ascending: [h, w, c] -> [h, w, c (1 + 2 count)]. [VDM
 * (34)] */
static Tensor *fourier_features(const Config *config, Tensor *z) {
    double frequency[HIGHEST_FOURIER + 1];
    const int count = config->fourier_last - config->fourier_first + 1;
    for (int i = 0; i < count; i++)
        frequency[i] = ldexp(1, config->fourier_first + i);
    Tensor *cycles = multiples(z, frequency, count);
    return concatenate(concatenate(z, sine(cycles)), cosine(cycles));
}

/* ---- bodies ---- */

/* The paper's: no resolution is lost. Each of the L + 1 kept outputs comes back, the last one first. */
static Tensor *flat_body(Network *n, Tensor *h, Tensor *time, int blocks) {
    const int channels = h->channels;
    Tensor *kept[MOST_BLOCKS + 1] = {h};
    for (int i = 0; i < blocks; i++)
        kept[i + 1] = h = res_block(n, "down", i, h, time, channels);
    h = middle(n, h, time);
    for (int i = 0; i <= blocks; i++)
        h = res_block(n, "up", i, concatenate(h, kept[blocks - i]), time, channels);
    return h;
}

/* Down and up through levels of halved resolution and doubled channels. A single row has no level. */
static Tensor *unet_body(Network *n, Tensor *h, Tensor *time, int blocks) {
    const int channels = h->channels, levels = unet_levels(blocks, h->height);
    const int per_level = levels > 0 ? blocks / levels : 0;
    Tensor *kept[MOST_BLOCKS];
    for (int level = 0; level < levels; level++) {
        const size_t scope = scope_enter(n, "down", level);
        for (int i = 0; i < per_level; i++)
            h = res_block(n, NULL, i, h, time, channels << level);
        scope_leave(n, scope);
        kept[level] = h;
        h = max_pool(h);
    }
    h = middle(n, h, time);
    for (int step = 0; step < levels; step++) {
        const int level = levels - 1 - step;
        const size_t scope = scope_enter(n, "up", step);
        Tensor *kernel = take(n, "upsample.kernel", 4, 4, h->channels, channels << level, INIT_LECUN);
        Tensor *bias = take(n, "upsample.bias", 1, 1, 1, channels << level, INIT_ZERO);
        h = concatenate(upsample(h, kernel, bias), kept[level]);
        for (int i = 0; i < per_level; i++)
            h = res_block(n, NULL, i, h, time, channels << level);
        scope_leave(n, scope);
    }
    return h;
}

/* conv_in of x, a body, swish(GN), conv_out; added to `base` unless that is NULL. Each network draws its
 * dropout masks from a stream of its own, so one does not depend on whether the other has run. */
static Tensor *image_network(Network *n, const char *name, RandomPurpose masks, NetKind net, int blocks,
                             int channels, Tensor *x, Tensor *t, int out, Tensor *base) {
    n->scope[0] = 0;
    scope_enter(n, name, -1);
    n->graph.dropout_stream.purpose = masks;
    n->graph.dropout_position = 0;
    Tensor *time = time_embedding(n, t, channels);
    Tensor *h = conv3x3(n, "conv_in", x, channels, INIT_LECUN, NULL);
    h = net == NET_FLAT ? flat_body(n, h, time, blocks) : unet_body(n, h, time, blocks);
    return conv3x3(n, "conv_out", norm(n, "norm_out", h, NORM_SWISH), out, INIT_ZERO, base);
}

Tensor *score_network(Network *n, Tensor *z, Tensor *t) {
    const Config *c = &n->model->config;
    n->graph.plain_sums = 0;
    return image_network(n, "score", RANDOM_DROPOUT, c->net, c->score_blocks, c->channels,
                         fourier_features(c, z), t, z->channels, z);
}

Tensor *encoder_network(Network *n, Tensor *x, Tensor *t, int plain_sums) {
    const Config *c = &n->model->config;
    n->graph.plain_sums = plain_sums;
    return hyperbolic_tangent(image_network(n, "encoder", RANDOM_ENCODER_DROPOUT, NET_UNET, c->encoder_blocks,
                                            c->encoder_channels, x, t, x->channels, NULL));
}

void schedule_parameters(Network *n, Tensor **b, Tensor **w) {
    strcpy(n->scope, "gamma.");
    *b = take(n, "b", 1, 1, 1, 1, INIT_GAMMA_B);
    *w = take(n, "w", 1, 1, 1, 1, INIT_GAMMA_W);
}

/* ---- models ---- */

/* Run the networks once without values: that lists the parameters. */
static void declare_parameters(Model *m) {
    const Config *c = &m->config;
    Network n = {.model = m, .graph = {.shapes_only = 1}};
    Arena *arena = arena_new();
    graph_begin(&n.graph, arena);
    Tensor *image = constant(&n.graph, c->height, c->width, c->image_channels, NULL);
    Tensor *t = number(&n.graph, 0);
    score_network(&n, image, t);
    if (c->kind == DIFFENC)
        encoder_network(&n, image, t, 0);
    if (c->schedule == SCHEDULE_LEARNED) {
        Tensor *b, *w;
        schedule_parameters(&n, &b, &w);
    }
    arena_free(arena);
}

int model_size(const Config *config, size_t *weight_count, Error *error) {
    Model m = {.config = *config};
    if (config_check(config, error))
        return -1;
    declare_parameters(&m);
    *weight_count = m.weight_count;
    free(m.parameter);
    return 0;
}

/* A normal number cut off at two standard deviations, by drawing again; *position moves on. */
static double truncated_normal(RandomStream stream, uint32_t *position) {
    for (;;) {
        double u = 1 - random_uniform(stream, *position), v = random_uniform(stream, *position + 1);
        *position += 2;
        double x = sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
        if (fabs(x) <= 2)
            return x;
    }
}

static void initialise(const Model *m, int index, uint64_t seed) {
    const Parameter *p = &m->parameter[index];
    real *w = m->params + p->offset;
    /* 0.8796... is the standard deviation of a normal cut off at 2; dividing by it leaves the variance at
     * 1/fan_in. */
    const double spread = sqrt(1.0 / ((double)p->taps * p->in)) / 0.87962566103423978;
    const RandomStream stream = random_stream(seed, RANDOM_WEIGHTS, 0, (uint32_t)index);
    uint32_t position = 0;
    for (size_t i = 0; i < p->count; i++)
        switch (p->initial) {
        case INIT_ZERO: w[i] = 0; break;
        case INIT_ONE: w[i] = 1; break;
        case INIT_LECUN: w[i] = (real)(spread * truncated_normal(stream, &position)); break;
        case INIT_GAMMA_B: w[i] = (real)m->config.gamma_min; break;
        case INIT_GAMMA_W: w[i] = (real)(m->config.gamma_max - m->config.gamma_min); break;
        }
}

int model_new(Model *m, const Config *config, uint64_t seed, Error *error) {
    *m = (Model){.config = *config};
    if (config_check(config, error))
        return -1;
    declare_parameters(m);
    m->params = allocate_zeroed(m->weight_count, sizeof(real));
    m->ema = allocate_zeroed(m->weight_count, sizeof(real));
    m->adam_m = allocate_zeroed(m->weight_count, sizeof(real));
    m->adam_v = allocate_zeroed(m->weight_count, sizeof(real));
    for (int i = 0; i < m->parameter_count; i++)
        initialise(m, i, seed);
    memcpy(m->ema, m->params, m->weight_count * sizeof(real));
    return 0;
}

void model_free(Model *m) {
    free(m->parameter);
    free(m->params);
    free(m->ema);
    free(m->adam_m);
    free(m->adam_v);
    memset(m, 0, sizeof *m);
}

/* ---- ranks ---- */

/* The first of a rank's share of the examples; behind it the share of the next rank begins. */
static int share_begin(int count, int rank) { return (int)((int64_t)count * rank / rank_count()); }

#ifdef DIFFENC_MPI
#include <mpi.h>

int rank_count(void) {
    int begun, count = 1;
    MPI_Initialized(&begun);
    if (begun)
        MPI_Comm_size(MPI_COMM_WORLD, &count);
    return count;
}

int this_rank(void) {
    int rank = 0;
    if (rank_count() > 1)
        MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    return rank;
}

void ranks_begin(void) {
    int provided;
    MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided);
    if (this_rank() > 0 && (!freopen("/dev/null", "w", stdout) || !freopen("/dev/null", "w", stderr)))
        exit(1);
}

/* The largest flag of all ranks. Where some have failed, the first of them says why; rank 0 alone then has an
 * exit status other than 0, for mpirun ends all others when it sees one. */
static int meet(int flag, const char *failure) {
    enum { FAILED = 1000 };   /* more than any signal's number */
    struct { int flag, rank; } most = {failure ? FAILED : flag, this_rank()};
    char text[sizeof(Error)];
    MPI_Allreduce(MPI_IN_PLACE, &most, 1, MPI_2INT, MPI_MAXLOC, MPI_COMM_WORLD);
    if (most.flag == FAILED) {
        const int rank = this_rank();
        snprintf(text, sizeof text, "%s", failure ? failure : "");
        MPI_Bcast(text, sizeof text, MPI_CHAR, most.rank, MPI_COMM_WORLD);
        fprintf(stderr, "diffenc: %s\n", text);
        MPI_Finalize();
        if (!failure || rank > 0)
            exit(rank == 0);
    }
    return most.flag;
}

int ranks_agree(int flag) {
    return rank_count() > 1 ? meet(flag, NULL) : flag;
}

void ranks_end(const char *failure) {
    meet(0, failure);
    if (!failure)
        MPI_Finalize();
}

void ranks_gather(void *records, int rows, int count, size_t size) {
    for (int rank = 0; rank < rank_count() && rank_count() > 1 && rows > 0; rank++) {
        const int begin = share_begin(count, rank), end = share_begin(count, rank + 1);
        MPI_Datatype record, share;
        MPI_Type_contiguous((int)size, MPI_BYTE, &record);
        MPI_Type_vector(rows, end - begin, count, record, &share);
        MPI_Type_commit(&share);
        MPI_Bcast((char *)records + (size_t)begin * size, 1, share, rank, MPI_COMM_WORLD);
        MPI_Type_free(&share);
        MPI_Type_free(&record);
    }
}

/* Each rank adds up one block of the vector, in the order of the ranks: how MPI goes about it decides nothing
 * about the bits. All blocks are of one length, so vector and scratch have room for rank_count() more. */
static void sum_over_ranks(real *vector, size_t count, real *scratch) {
    const MPI_Datatype type = sizeof(real) == sizeof(float) ? MPI_FLOAT : MPI_DOUBLE;
    const size_t ranks = (size_t)rank_count(), block = (count + ranks - 1) / ranks;
    real *own = vector + block * (size_t)this_rank();
    if (ranks == 1)
        return;
    MPI_Alltoall(vector, (int)block, type, scratch, (int)block, type, MPI_COMM_WORLD);
    memcpy(own, scratch, block * sizeof(real));
    for (const real *from = scratch + block; from < scratch + ranks * block; from += block)
        for (size_t i = 0; i < block; i++)
            own[i] += from[i];
    MPI_Allgather(MPI_IN_PLACE, 0, type, vector, (int)block, type, MPI_COMM_WORLD);
}
#else
int rank_count(void) { return 1; }
int this_rank(void) { return 0; }
void ranks_begin(void) {}
int ranks_agree(int flag) { return flag; }
void ranks_end(const char *failure) {
    if (failure)
        fprintf(stderr, "diffenc: %s\n", failure);
}
void ranks_gather(void *records, int rows, int count, size_t size) {
    (void)records, (void)rows, (void)count, (void)size;
}
static void sum_over_ranks(real *vector, size_t count, real *scratch) {
    (void)vector, (void)count, (void)scratch;
}
#endif

/* ---- batches ---- */

void network_begin(Network *n) {
    graph_begin(&n->graph, n->graph.arena);
    memset(n->leaf, 0, n->model->parameter_count * sizeof *n->leaf);
}

Tensor *network_renew(Network *n, const Tensor *t) {
    const size_t bytes = element_count(t) * sizeof(real);
    const int height = t->height, width = t->width, channels = t->channels;
    real *value = allocate(1, bytes);
    memcpy(value, t->value, bytes);
    network_begin(n);
    Tensor *carried = constant(&n->graph, height, width, channels, value);
    free(value);
    return carried;
}

void workers_new(Workers *w, Model *model, int threads) {
    *w = (Workers){.threads = threads, .model = model, .results = arena_new()};
    w->network = allocate_zeroed((size_t)threads, sizeof *w->network);
    for (int i = 0; i < threads; i++) {
        w->network[i].model = model;
        w->network[i].graph.arena = arena_new();
        w->network[i].leaf = allocate_zeroed((size_t)model->parameter_count, sizeof(Tensor *));
    }
}

void workers_free(Workers *w) {
    for (int i = 0; i < w->threads; i++) {
        arena_free(w->network[i].graph.arena);
        free(w->network[i].leaf);
    }
    free(w->network);
    for (int i = 0; i < GRADIENT_SLOTS; i++)
        free(w->slot[i]);
    free(w->transposed);
    arena_free(w->results);
    memset(w, 0, sizeof *w);
}

void *workers_results(Workers *w, size_t count, size_t size) {
    arena_reset(w->results);
    return arena_allocate(w->results, count, size);
}

static int workers_stopped(const Workers *w) { return w->stop && *w->stop; }
int network_stopped(const Network *n) { return n->stop && *n->stop; }

static Network *network_of_thread(Workers *w) {
#ifdef _OPENMP
    return &w->network[omp_get_thread_num()];
#else
    return &w->network[0];
#endif
}

void workers_run(Workers *w, const real *weights, int count, ExampleWork work, void *context) {
    const int begin = share_begin(count, this_rank()), end = share_begin(count, this_rank() + 1);
    int done = 0;
    const int left_over = (end - begin) % w->threads;   /* when all threads have had the same number */
    ranks_agree(0);   /* whether all have come so far is better known before the work than after it */
    if (w->progress)
        w->progress(w->watcher, 0, end - begin);
#pragma omp parallel for num_threads(w->threads) schedule(dynamic, 1)
    for (int example = begin; example < end; example++) {
        Network *n = network_of_thread(w);
        n->weights = weights;
        n->transposed = NULL, n->gradient = NULL;
        n->stop = w->stop;
        n->graph.dropout = 0;
        network_begin(n);
        if (workers_stopped(w))
            continue;
        if (example >= end - left_over)   /* threads that have no example help those that have one */
            arena_divide(n->graph.arena, (w->threads + left_over - 1) / left_over);
        work(n, example, context);
        arena_divide(n->graph.arena, 1);
#pragma omp critical
        if (w->progress)
            w->progress(w->watcher, ++done, end - begin);
    }
}

/* An input's gradient needs each kernel transposed: made once for all examples of a batch. */
static void transpose_kernels(Workers *w) {
    const Model *m = w->model;
    if (!w->transposed)
        w->transposed = allocate(m->weight_count + (size_t)rank_count(), sizeof(real));
#pragma omp parallel for num_threads(w->threads) schedule(dynamic, 1)
    for (int i = 0; i < m->parameter_count; i++) {
        const Parameter *p = &m->parameter[i];
        if (p->rank > 1)
            transpose_kernel(p->taps, p->in, p->out, m->params + p->offset, w->transposed + p->offset);
    }
}

/* slot[0] becomes the sum of the first `slots`. */
static void sum_slots(Workers *w, int slots) {
    enum { RUN = 4096 };   /* weights that stay in the first-level cache while all slots are added to them */
    const size_t count = w->model->weight_count;
#pragma omp parallel for num_threads(w->threads)
    for (size_t begin = 0; begin < count; begin += RUN) {
        const size_t end = begin + RUN < count ? begin + RUN : count;
        real *total = w->slot[0];
        for (int s = 1; s < slots; s++)
            for (size_t i = begin; i < end; i++)
                total[i] += w->slot[s][i];
    }
}

const real *workers_gradient(Workers *w, int count, ExampleWork work, void *context) {
    const int begin = share_begin(count, this_rank()), end = share_begin(count, this_rank() + 1);
    /* Each slot has to be zeroed and summed: two examples to a slot halve that cost. */
    const int pairs = (end - begin) / 2;
    const int slots = pairs < 1 ? 1 : pairs < GRADIENT_SLOTS ? pairs : GRADIENT_SLOTS;
    transpose_kernels(w);
    for (int i = 0; i < slots; i++)
        if (!w->slot[i])
            w->slot[i] = allocate(w->model->weight_count + (size_t)rank_count(), sizeof(real));
#pragma omp parallel for num_threads(w->threads) schedule(dynamic, 1)
    for (int slot = 0; slot < slots; slot++) {
        Network *n = network_of_thread(w);
        n->weights = w->model->params;
        n->transposed = w->transposed;
        n->gradient = w->slot[slot];
        memset(n->gradient, 0, w->model->weight_count * sizeof(real));
        for (int example = begin + slot; example < end && !workers_stopped(w); example += slots) {
            network_begin(n);
            n->encoder_fixed = 0;
            work(n, example, context);
        }
    }
    sum_slots(w, slots);
    if (ranks_agree(workers_stopped(w)))
        return NULL;
    sum_over_ranks(w->slot[0], w->model->weight_count, w->transposed);
    return w->slot[0];
}

/* ---- training ---- */

Optimizer optimizer_default(void) {
    return (Optimizer){.learning_rate = 2e-4, .encoder_rate = 1, .momentum = 0.95, .beta1 = 0.9,
                       .beta2 = 0.99, .epsilon = 1e-8, .weight_decay = 0.01, .ema = 0.9999};
}

/* AdamW: u [count], the step at rate 1. m / (1 - beta1^step) and v / (1 - beta2^step) undo the moments' start
 * at zero. */
static void adam_update(const Optimizer *o, double step, size_t count, const real *restrict g, real clip,
                        real *restrict m, real *restrict v, real *restrict u) {
    const real b1 = (real)o->beta1, b2 = (real)o->beta2, epsilon = (real)o->epsilon;
    const real m_scale = (real)(1 / (1 - pow(o->beta1, step))),
               v_scale = (real)(1 / (1 - pow(o->beta2, step)));
    for (size_t j = 0; j < count; j++) {
        const real gj = g[j] * clip;
        m[j] = b1 * m[j] + (1 - b1) * gj;
        v[j] = b2 * v[j] + (1 - b2) * gj * gj;
        u[j] = m_scale * m[j] / ((real)sqrt(v_scale * v[j]) + epsilon);
    }
}

/* x [rows, columns] with all singular values near 1. Of x / ||x||, whose singular values are at most 1, each
 * round makes x (c_0 I + c_1 a + c_2 a^2), a = x^T x: it multiplies small ones by 3.4 and keeps the rest
 * between 0.7 and 1.2. */
static void orthogonalise(int rows, int columns, real *x, Arena *scratch) {
    enum { ROUNDS = 5 };
    static const real c[3] = {(real)3.4445, (real)-4.775, (real)2.0315};
    const size_t count = (size_t)rows * columns, square = (size_t)columns * columns;
    const real scale = (real)(1 / (sqrt(dot(x, x, count)) + 1e-30));
    real *a = arena_allocate(scratch, square, sizeof *a), *b = arena_allocate(scratch, square, sizeof *b);
    real *next = arena_allocate(scratch, count, sizeof *next);
    for (size_t i = 0; i < count; i++)
        x[i] *= scale;
    for (int round = 0; round < ROUNDS; round++) {
        memset(a, 0, square * sizeof *a);
        matrix_product_transposed(rows, columns, columns, x, x, a, scratch);
        matrix_product(columns, columns, columns, a, a, NULL, NULL, b, scratch);
        for (size_t i = 0; i < square; i++)
            b[i] = c[2] * b[i] + c[1] * a[i] + (i % ((size_t)columns + 1) == 0 ? c[0] : 0);
        matrix_product(rows, columns, columns, x, b, NULL, NULL, next, scratch);
        memcpy(x, next, count * sizeof *x);
    }
}

/* Muon (Jordan and others, 2024) for a kernel as a matrix [taps in, out]: u is its momentum made orthogonal,
 * so that rare directions move as far as frequent ones, times what makes its elements as large as AdamW's
 * steps are. */
static void muon_update(const Parameter *p, real momentum, const real *restrict g, real *restrict m,
                        real *restrict u, Arena *scratch) {
    const int rows = p->taps * p->in, columns = p->out;
    for (size_t j = 0; j < p->count; j++) {
        m[j] = momentum * m[j] + (1 - momentum) * g[j];
        u[j] = momentum * m[j] + (1 - momentum) * g[j];
    }
    orthogonalise(rows, columns, u, scratch);
    const real size = (real)(0.2 * sqrt(rows > columns ? rows : columns));
    for (size_t j = 0; j < p->count; j++)
        u[j] *= size;
}

double optimizer_step(Workers *workers, const Optimizer *o, const real *gradient) {
    Model *m = workers->model;
    const double largest = 1e19;   /* AdamW squares it: in float an overflow would stay in adam_v for good */
    const double norm = sqrt(dot(gradient, gradient, m->weight_count));
    if (!isfinite(norm) || (o->clip > 0 && norm > o->clip ? o->clip : norm) > largest)
        return isfinite(norm) ? INFINITY : norm;
    const double step = (double)++m->step;
    const real clip = (real)(o->clip > 0 && norm > o->clip ? o->clip / norm : 1);
    const double up = o->warmup > 0 ? step / o->warmup : 1;
    const double down = o->cooldown > 0 ? (o->steps - step + 1) / (o->cooldown * o->steps) : 1;
    const double rate = o->learning_rate * fmax(fmin(fmin(up, down), 1), 0);
    const real keep = (real)fmin((1 + step) / (35 + step), o->ema);
#pragma omp parallel for num_threads(workers->threads) schedule(dynamic, 1)
    for (int i = 0; i < m->parameter_count; i++) {
        const Parameter *p = &m->parameter[i];
        Arena *scratch = network_of_thread(workers)->graph.arena;
        const ArenaMark mark = arena_mark(scratch);
        real *restrict u = arena_allocate(scratch, p->count, sizeof *u);
        const real *g = gradient + p->offset;
        if (o->muon && p->is_kernel)
            muon_update(p, (real)o->momentum, g, m->adam_m + p->offset, u, scratch);
        else
            adam_update(o, step, p->count, g, clip, m->adam_m + p->offset, m->adam_v + p->offset, u);
        const real own_rate = (real)(p->in_encoder ? rate * o->encoder_rate : rate);
        const real decay = p->decays ? own_rate * (real)o->weight_decay : 0;
        real *restrict w = m->params + p->offset, *restrict ema = m->ema + p->offset;
        for (size_t j = 0; j < p->count; j++) {
            w[j] -= decay * w[j] + own_rate * u[j];
            ema[j] = keep * ema[j] + (1 - keep) * w[j];
        }
        arena_release(scratch, mark);
    }
    return norm;
}

int diverged(const Model *m, const char *const *names, const double *losses, int count, const real *gradient,
             Error *error) {
    const Parameter *steepest = m->parameter;
    double most = -1;
    int worst = 0;
    for (int i = 0; i < m->parameter_count && isfinite(most); i++) {
        const Parameter *p = &m->parameter[i];
        const double square = dot(gradient + p->offset, gradient + p->offset, p->count);
        if (!(square <= most))
            most = square, steepest = p;
    }
    for (int i = 1; i < count && isfinite(losses[worst]); i++)
        if (!(losses[i] <= losses[worst]))
            worst = i;
    /* A NaN may have a sign, which means nothing. */
    return fail(error, "step %llu: diverged: the %s loss is %g, the gradient of %s has the norm %g",
                (unsigned long long)m->step + 1, names[worst], fabs(losses[worst]), steepest->name,
                fabs(sqrt(most)));
}
