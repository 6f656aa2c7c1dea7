/* nn.c - floor 3: layers, the score network, the encoder, parameters, batches on threads, AdamW and EMA.
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

enum { MAX_BLOCKS = 256, MAX_SIDE = 4096, MAX_CHANNELS = 1024 };

Config config_default(void) {
    Config c = {.kind = DIFFENC,
                .score_blocks = 4,
                .encoder_blocks = 2,
                .net = NET_FLAT,
                .channels = 32,
                .encoder_channels = 16,
                .height = 28,
                .width = 28,
                .image_channels = 1,
                .prediction = PREDICT_V,
                .schedule = SCHEDULE_FIXED,
                .gamma_min = -13.3,
                .gamma_max = 5,
                .timesteps = 0,
                .variance_ratio = 1,
                .dropout = 0.1};
    return c;
}

/* A block count 1..MAX_BLOCKS at `text`; *end is set behind it. 0 if there is none. */
static int block_count(const char *text, const char **end) {
    int n = 0;
    for (*end = text; **end >= '0' && **end <= '9' && n <= MAX_BLOCKS; (*end)++)
        n = 10 * n + (**end - '0');
    return n <= MAX_BLOCKS ? n : 0;
}

int config_parse_model(Config *config, const char *name, Error *error) {
    const char *end = name;
    if (strncmp(name, "vdm-", 4) == 0) {
        config->kind = VDM;
        config->encoder_blocks = 0;
        config->score_blocks = block_count(name + 4, &end);
        if (config->score_blocks && !*end)
            return 0;
    } else if (strncmp(name, "diffenc-", 8) == 0) {
        config->score_blocks = block_count(name + 8, &end);
        if (config->score_blocks && strcmp(end, "-nt") == 0) {
            config->kind = DIFFENC_NT;
            config->encoder_blocks = 0;
            return 0;
        }
        if (config->score_blocks && *end == '-') {
            config->kind = DIFFENC;
            config->encoder_blocks = block_count(end + 1, &end);
            if (config->encoder_blocks && !*end)
                return 0;
        }
    }
    return fail(error, "model '%.40s': expected vdm-L, diffenc-L-nt or diffenc-L-E with L and E from 1 to %d",
                name, MAX_BLOCKS);
}

void config_model_name(const Config *config, char name[32]) {
    if (config->kind == VDM)
        snprintf(name, 32, "vdm-%d", config->score_blocks);
    else if (config->kind == DIFFENC_NT)
        snprintf(name, 32, "diffenc-%d-nt", config->score_blocks);
    else
        snprintf(name, 32, "diffenc-%d-%d", config->score_blocks, config->encoder_blocks);
}

int unet_levels(int blocks, int height) {
    for (int i = 0; i < blocks; i++) {
        height /= 2;
        if (height % 2 == 1 || height <= 8)
            return i + 1;
    }
    return blocks;
}

/* `what` has n channels at its first level; every group normalisation in it must come out even. */
static int check_channels(const char *option, int channels, int levels, Error *error) {
    if (channels < 4 || channels > MAX_CHANNELS || channels % 4)
        return fail(error, "%s %d: must be a multiple of 4 from 4 to %d", option, channels, MAX_CHANNELS);
    for (int level = 0; level < levels; level++) {
        const int64_t width = (int64_t)channels << level;
        if (width > MAX_CHANNELS)
            return fail(error, "%s %d: level %d of the U-Net would have %lld channels, %d are the most",
                        option, channels, level, (long long)width, MAX_CHANNELS);
        if (!group_count((int)width) || !group_count((int)(2 * width)))
            return fail(error, "%s %d: %lld channels do not divide into 32 groups", option, channels,
                        (long long)width);
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
    if (c->height < 1 || c->width < 1 || c->height > MAX_SIDE || c->width > MAX_SIDE)
        return fail(error, "image size %dx%d: each side must be from 1 to %d", c->height, c->width, MAX_SIDE);
    if (c->image_channels != 1 && c->image_channels != 3)
        return fail(error, "image channels %d: must be 1 or 3", c->image_channels);
    if (c->score_blocks < 1 || c->score_blocks > MAX_BLOCKS || c->encoder_blocks < (c->kind == DIFFENC) ||
        c->encoder_blocks > MAX_BLOCKS)
        return fail(error, "model: L %d and E %d must be from 1 to %d", c->score_blocks, c->encoder_blocks,
                    MAX_BLOCKS);
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
    if (!(c->dropout >= 0) || !(c->dropout < 1))
        return fail(error, "dropout %g: must be at least 0 and less than 1", c->dropout);
    return 0;
}

/* ---- parameters ---- */

/* Append "NAME." to the scope; the caller restores the returned length. */
static size_t scope_enter(Network *n, const char *name, int index) {
    const size_t length = strlen(n->scope);
    if (index >= 0)
        snprintf(n->scope + length, sizeof n->scope - length, "%s.%d.", name, index);
    else
        snprintf(n->scope + length, sizeof n->scope - length, "%s.", name);
    return length;
}

static void scope_leave(Network *n, size_t length) {
    n->scope[length] = 0;
}

static void declare(Network *n, const char *name, int rank, int taps, int in, int out, Initial initial) {
    Model *m = n->model;
    Parameter *grown = realloc(m->parameter, (m->parameter_count + 1) * sizeof(Parameter));
    if (!grown) {
        fputs("diffenc: out of memory\n", stderr);
        exit(1);
    }
    m->parameter = grown;
    Parameter *p = &m->parameter[m->parameter_count++];
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "%s%s", n->scope, name);
    p->rank = rank;
    p->taps = taps, p->in = in, p->out = out;
    p->initial = initial;
    p->count = (size_t)taps * in * out;
    p->offset = m->weight_count;
    m->weight_count += p->count;
    const int side = taps == 9 ? 3 : 2;
    const int64_t shape[4] = {side, side, in, out};
    for (int i = 0; i < rank; i++)   /* the last `rank` of the four */
        p->shape[i] = shape[4 - rank + i];
}

/* The next parameter, as a leaf of the graph: a vector [out] (rank 1), a matrix [in, out] (rank 2) or a
 * kernel [side, side, in, out] (rank 4). */
static Tensor *take(Network *n, const char *name, int rank, int taps, int in, int out, Initial initial) {
    if (n->declaring) {
        declare(n, name, rank, taps, in, out, initial);
        return parameter(&n->graph, taps, in, out, NULL, NULL, NULL);
    }
    const int index = n->next++;
    const Parameter *p = &n->model->parameter[index];
    assert(p->taps == taps && p->in == in && p->out == out && strstr(p->name, name));
    if (!n->leaf[index])
        n->leaf[index] = parameter(&n->graph, taps, in, out, n->weights + p->offset,
                                   n->flipped && rank > 1 ? n->flipped + p->offset : NULL,
                                   n->gradient ? n->gradient + p->offset : NULL);
    return n->leaf[index];
}

/* ---- layers ---- */

/* 3x3 convolution (taps 9) or the same dense layer at every position (taps 1), with bias and residual. */
static Tensor *linear(Network *n, const char *name, int taps, Tensor *x, int out, Initial initial,
                      Tensor *residual) {
    const size_t scope = scope_enter(n, name, -1);
    Tensor *kernel = take(n, "kernel", taps == 1 ? 2 : 4, taps, x->channels, out, initial);
    Tensor *bias = take(n, "bias", 1, 1, 1, out, INIT_ZERO);
    scope_leave(n, scope);
    return convolve(x, kernel, bias, residual);
}

static Tensor *norm(Network *n, const char *name, Tensor *x, int kind) {
    const size_t scope = scope_enter(n, name, -1);
    Tensor *scale = take(n, "scale", 1, 1, 1, x->channels, INIT_ONE);
    Tensor *bias = take(n, "bias", 1, 1, 1, x->channels, INIT_ZERO);
    scope_leave(n, scope);
    return normalise(x, scale, bias, kind);
}

/* [1, 1, 4 channels]: sines and cosines of 1000 t at channels/2 frequencies, then two dense layers. Cycles
 * instead of radians, counted in double and without the whole ones: in float, 1000 t itself would be off
 * by 6e-5. */
static Tensor *time_embedding(Network *n, double t, Tensor *t_dot, int channels) {
    const int half = channels / 2;
    double frequency[MAX_CHANNELS / 2];
    real fraction[MAX_CHANNELS / 2];
    for (int j = 0; j < half; j++) {
        frequency[j] = 1000 / 6.283185307179586 * exp(-log(10000) * j / (half - 1));
        fraction[j] = (real)(frequency[j] * t - floor(frequency[j] * t));
    }
    Tensor *cycles = constant(&n->graph, 1, 1, half, fraction);
    if (t_dot)
        cycles = with_tangent(cycles, outer_scale(t_dot, frequency, half));
    Tensor *h = concatenate(sine(cycles), cosine(cycles));
    const size_t scope = scope_enter(n, "time", -1);
    h = swish(linear(n, "dense0", 1, h, 4 * channels, INIT_LECUN, NULL));
    h = swish(linear(n, "dense1", 1, h, 4 * channels, INIT_LECUN, NULL));
    scope_leave(n, scope);
    return h;
}

/* h = conv1(swish(GN(x))) + dense(time);  h = conv2(dropout(swish(GN(h))));  x + h, x through a 1x1 skip
 * where the channels differ. The time is added to conv1's bias, and x is where conv2 starts its sums:
 * neither is a pass over memory of its own. */
static Tensor *res_block(Network *n, const char *name, int index, Tensor *x, Tensor *time, int out) {
    const size_t scope = scope_enter(n, name, index);
    Tensor *h = norm(n, "norm1", x, NORM_SWISH);
    Tensor *kernel = take(n, "conv1.kernel", 4, 9, x->channels, out, INIT_LECUN);
    Tensor *bias = take(n, "conv1.bias", 1, 1, 1, out, INIT_ZERO);
    Tensor *projection = take(n, "time.kernel", 2, 1, time->channels, out, INIT_ZERO);
    h = convolve(h, kernel, convolve(time, projection, NULL, bias), NULL);
    h = norm(n, "norm2", h, NORM_SWISH_DROPOUT);
    Tensor *skip = x->channels == out ? x : linear(n, "skip", 1, x, out, INIT_LECUN, NULL);
    h = linear(n, "conv2", 9, h, out, INIT_ZERO, skip);
    scope_leave(n, scope);
    return h;
}

/* x + out(softmax(q k^T / sqrt(channels)) v), q, k, v of GN(x): one head over all positions. */
static Tensor *attention(Network *n, const char *name, Tensor *x) {
    const size_t scope = scope_enter(n, name, -1);
    Tensor *h = norm(n, "norm", x, NORM_ONLY);
    Tensor *q = linear(n, "q", 1, h, x->channels, INIT_LECUN, NULL);
    Tensor *k = linear(n, "k", 1, h, x->channels, INIT_LECUN, NULL);
    Tensor *v = linear(n, "v", 1, h, x->channels, INIT_LECUN, NULL);
    h = attend(q, k, v);
    h = linear(n, "out", 1, h, x->channels, INIT_ZERO, x);
    scope_leave(n, scope);
    return h;
}

static Tensor *middle(Network *n, Tensor *h, Tensor *time) {
    h = res_block(n, "mid", 0, h, time, h->channels);
    h = attention(n, "mid.attn", h);
    return res_block(n, "mid", 1, h, time, h->channels);
}

/* [z | sin(2^f 2 pi z) | cos(2^f 2 pi z)], f = 6, 7: [h, w, c] -> [h, w, 5c]. [VDM,
 * Fourier features] */
static Tensor *fourier_features(Tensor *z) {
    const double frequency[2] = {64, 128};
    Tensor *cycles = outer_scale(z, frequency, 2);
    return concatenate(concatenate(z, sine(cycles)), cosine(cycles));
}

/* ---- bodies ---- */

/* The paper's: no resolution is lost. Each of the L + 1 kept outputs comes back, the last one first. */
static Tensor *flat_body(Network *n, Tensor *h, Tensor *time, int blocks) {
    const int channels = h->channels;
    Tensor *kept[MAX_BLOCKS + 1] = {h};
    for (int i = 0; i < blocks; i++)
        kept[i + 1] = h = res_block(n, "down", i, h, time, channels);
    h = middle(n, h, time);
    for (int i = 0; i <= blocks; i++)
        h = res_block(n, "up", i, concatenate(h, kept[blocks - i]), time, channels);
    return h;
}

/* Down and up through levels of halved resolution and doubled channels. */
static Tensor *unet_body(Network *n, Tensor *h, Tensor *time, int blocks) {
    const int channels = h->channels, levels = unet_levels(blocks, h->height);
    const int per_level = blocks / levels;
    Tensor *kept[MAX_BLOCKS];
    for (int level = 0; level < levels; level++) {
        const size_t scope = scope_enter(n, "down", level);
        n->scope[strlen(n->scope) - 1] = 0;   /* "down.LEVEL" + ".BLOCK." */
        for (int i = 0; i < per_level; i++)
            h = res_block(n, "", i, h, time, channels << level);
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
        n->scope[strlen(n->scope) - 1] = 0;
        for (int i = 0; i < per_level; i++)
            h = res_block(n, "", i, h, time, channels << level);
        scope_leave(n, scope);
    }
    return h;
}

/* conv_in of x, a body, swish(GN), conv_out; added to `base` unless that is NULL. */
static Tensor *image_network(Network *n, NetKind net, int blocks, int channels, Tensor *x, double t,
                             Tensor *t_dot, int out, Tensor *base) {
    Tensor *time = time_embedding(n, t, t_dot, channels);
    Tensor *h = linear(n, "conv_in", 9, x, channels, INIT_LECUN, NULL);
    h = net == NET_FLAT ? flat_body(n, h, time, blocks) : unet_body(n, h, time, blocks);
    return linear(n, "conv_out", 9, norm(n, "norm_out", h, NORM_SWISH), out, INIT_ZERO, base);
}

Tensor *score_network(Network *n, Tensor *z, double t) {
    const Config *c = &n->model->config;
    n->next = 0;
    strcpy(n->scope, "score.");
    return image_network(n, c->net, c->score_blocks, c->channels, fourier_features(z), t, NULL, z->channels,
                         z);
}

Tensor *encoder_network(Network *n, Tensor *x, double t, Tensor *t_dot) {
    const Config *c = &n->model->config;
    n->next = n->model->encoder_first;
    strcpy(n->scope, "encoder.");
    /* The same dropout mask at every time of an example: otherwise x_s - x_t would be the difference of
     * two masks, which does not shrink with s - t, and T KL_T would grow with T instead of going to L_inf. */
    n->graph.dropout_position = 0;
    /* y reaches the score network through sin(2 pi 128 z), which magnifies its rounding 800 times. At t = 0
     * the reconstruction sees it alone. */
    n->graph.plain_sums = t > 0;
    Tensor *y = hyperbolic_tangent(
        image_network(n, NET_UNET, c->encoder_blocks, c->encoder_channels, x, t, t_dot, x->channels, NULL));
    n->graph.plain_sums = 0;
    return y;
}

void schedule_parameters(Network *n, Tensor **b, Tensor **w) {
    n->next = n->model->gamma_first;
    strcpy(n->scope, "gamma.");
    *b = take(n, "b", 1, 1, 1, 1, INIT_GAMMA_B);
    *w = take(n, "w", 1, 1, 1, 1, INIT_GAMMA_W);
}

/* ---- models ---- */

/* Run the networks once without values: that lists the parameters. */
static void declare_parameters(Model *m) {
    const Config *c = &m->config;
    Network n = {.model = m, .declaring = 1};
    Arena *arena = arena_new();
    n.graph.shapes_only = 1;
    graph_begin(&n.graph, arena);
    Tensor *image = constant(&n.graph, c->height, c->width, c->image_channels, NULL);
    score_network(&n, image, 0);
    m->encoder_first = m->parameter_count;
    if (c->kind == DIFFENC)
        encoder_network(&n, image, 0, NULL);
    m->gamma_first = m->parameter_count;
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
    memset(m, 0, sizeof *m);
    m->config = *config;
    if (config_check(config, error))
        return -1;
    declare_parameters(m);
    m->params = allocate_zeroed(m->weight_count, sizeof(real));
    m->ema = allocate_zeroed(m->weight_count, sizeof(real));
    m->adam_m = allocate_zeroed(m->weight_count, sizeof(real));
    m->adam_v = allocate_zeroed(m->weight_count, sizeof(real));
    m->flipped = allocate_zeroed(m->weight_count, sizeof(real));
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
    free(m->flipped);
    memset(m, 0, sizeof *m);
}

void model_flip(Model *m, int threads) {
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int i = 0; i < m->parameter_count; i++) {
        const Parameter *p = &m->parameter[i];
        if (p->rank > 1)
            flip_kernel(p->taps, p->in, p->out, m->params + p->offset, m->flipped + p->offset);
    }
}

/* ---- batches ---- */

void network_begin(Network *n) {
    graph_begin(&n->graph, n->graph.arena);
    memset(n->leaf, 0, n->model->parameter_count * sizeof *n->leaf);
}

void workers_new(Workers *w, Model *model, int threads) {
    memset(w, 0, sizeof *w);
    w->threads = threads;
    w->model = model;
    w->results = arena_new();
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
    arena_free(w->results);
    memset(w, 0, sizeof *w);
}

void *workers_results(Workers *w, size_t count, size_t size) {
    arena_reset(w->results);
    return arena_allocate(w->results, count, size);
}

size_t workers_memory(const Workers *w) {
    size_t bytes = 0;
    for (int i = 0; i < w->threads; i++)
        bytes += arena_capacity(w->network[i].graph.arena);
    return bytes;
}

static int thread_index(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

void workers_run(Workers *w, const real *weights, int with_gradients, int count, ExampleWork work,
                 void *context) {
    const int tasks = with_gradients && count > GRADIENT_SLOTS ? GRADIENT_SLOTS : count;
    for (int i = 0; with_gradients && i < GRADIENT_SLOTS; i++)
        if (!w->slot[i])
            w->slot[i] = allocate(w->model->weight_count, sizeof(real));
#pragma omp parallel for num_threads(w->threads) schedule(dynamic, 1)
    for (int task = 0; task < (with_gradients ? GRADIENT_SLOTS : tasks); task++) {
        Network *n = &w->network[thread_index()];
        n->weights = weights;
        n->flipped = with_gradients ? w->model->flipped : NULL;
        n->gradient = with_gradients ? w->slot[task] : NULL;
        if (with_gradients)
            memset(n->gradient, 0, w->model->weight_count * sizeof(real));
        for (int example = task; example < count; example += tasks) {
            network_begin(n);
            work(n, example, context);
        }
    }
}

const real *workers_gradient(Workers *w) {
    enum { RUN = 4096 };   /* weights that stay in the first-level cache while all slots are added to them */
    const size_t count = w->model->weight_count;
#pragma omp parallel for num_threads(w->threads)
    for (size_t begin = 0; begin < count; begin += RUN) {
        const size_t end = begin + RUN < count ? begin + RUN : count;
        real *sum = w->slot[0];
        for (int s = 1; s < GRADIENT_SLOTS; s++)
            for (size_t i = begin; i < end; i++)
                sum[i] += w->slot[s][i];
    }
    return w->slot[0];
}

/* ---- training ---- */

Optimizer optimizer_default(void) {
    Optimizer o = {.learning_rate = 2e-4, .beta1 = 0.9, .beta2 = 0.99, .epsilon = 1e-8, .weight_decay = 0.01,
                   .ema = 0.9999};
    return o;
}

/* A bias by its name: ".bias", or b of the schedule. */
static int is_bias(const char *name) {
    const size_t length = strlen(name);
    return (length > 5 && strcmp(name + length - 5, ".bias") == 0) || strcmp(name, "gamma.b") == 0;
}

double optimizer_step(Model *m, const Optimizer *o, const real *gradient, int threads) {
    (void)threads;
    /* AdamW squares the gradient: an overflow there would stay in adam_v for good. In double, squared once
     * more. */
    const double largest = sizeof(real) == sizeof(float) ? 1e19 : 1e75;
    const double norm = sqrt(dot(gradient, gradient, m->weight_count));
    if (!isfinite(norm) || (o->clip > 0 && norm > o->clip ? o->clip : norm) > largest)
        return isfinite(norm) ? INFINITY : norm;
    const double step = (double)++m->step;
    const real clip = (real)(o->clip > 0 && norm > o->clip ? o->clip / norm : 1);
    const double rate = o->learning_rate * (o->warmup > 0 && step < o->warmup ? step / o->warmup : 1);
    const double average = (1 + step) / (10 + step) < o->ema ? (1 + step) / (10 + step) : o->ema;
    const real b1 = (real)o->beta1, b2 = (real)o->beta2, epsilon = (real)o->epsilon, keep = (real)average;
    /* m / (1 - beta1^step) and v / (1 - beta2^step) undo the moments' start at zero. */
    const real m_scale = (real)(1 / (1 - pow(o->beta1, step))),
               v_scale = (real)(1 / (1 - pow(o->beta2, step)));
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int i = 0; i < m->parameter_count; i++) {
        const Parameter *p = &m->parameter[i];
        const real decay = (real)(is_bias(p->name) ? 0 : rate * o->weight_decay);
        const real *restrict g = gradient + p->offset;
        real *restrict w = m->params + p->offset, *restrict ema = m->ema + p->offset;
        real *restrict m1 = m->adam_m + p->offset, *restrict m2 = m->adam_v + p->offset;
        for (size_t j = 0; j < p->count; j++) {
            const real gj = g[j] * clip;
            m1[j] = b1 * m1[j] + (1 - b1) * gj;
            m2[j] = b2 * m2[j] + (1 - b2) * gj * gj;
            w[j] -= decay * w[j] + (real)rate * (m_scale * m1[j]) / ((real)sqrt(v_scale * m2[j]) + epsilon);
            ema[j] = keep * ema[j] + (1 - keep) * w[j];
        }
    }
    return norm;
}
