/* test_nn.c - configurations, parameters, dropout, batches on threads and the optimiser.
 *
 * What the networks compute is shown elsewhere: the golden files hold the values and gradients of another
 * implementation (tests/reference.py), and `diffenc check` proves the derivatives. */

#include "test.h"

#include <assert.h>

/* ---- configuration ---- */

static void test_parse_model(void) {
    static const struct { const char *name; ModelKind kind; int score, encoder; } good[6] = {
        {"vdm-8", VDM, 8, 0}, {"vdm-1", VDM, 1, 0}, {"vdm-256", VDM, 256, 0},
        {"diffenc-8-nt", DIFFENC_NT, 8, 0}, {"diffenc-32-4", DIFFENC, 32, 4},
        {"diffenc-1-256", DIFFENC, 1, 256}};
    static const char *const bad[24] = {
        "", "vdm", "vdm-", "vdm-0", "vdm-257", "vdm-8x", "vdm--8", "vdm-+8", " vdm-8", "vdm-8 ", "VDM-8",
        "vdm-8-nt", "vdm-99999999999999999999", "diffenc", "diffenc-8", "diffenc-8-", "diffenc-8-0",
        "diffenc-8-ntx", "diffenc--2", "diffenc-0-nt", "diffenc-8-257", "diffenc-nt", "diffenc-8-2-2",
        "diffenc-8--2"};
    Error error;
    for (int i = 0; i < 6; i++) {
        Config c = config_default();
        char name[32];
        CHECK(config_parse_model(&c, good[i].name, &error) == 0, "%s is a model", good[i].name);
        CHECK(c.kind == good[i].kind && c.score_blocks == good[i].score &&
              c.encoder_blocks == good[i].encoder, "%s is understood as kind %d, L %d, E %d", good[i].name,
              (int)c.kind, c.score_blocks, c.encoder_blocks);
        config_model_name(&c, name);
        CHECK(strcmp(name, good[i].name) == 0, "%s is called %s", good[i].name, name);
    }
    for (int i = 0; i < 24; i++) {
        Config c = config_default();
        error.text[0] = 0;
        CHECK(config_parse_model(&c, bad[i], &error) == -1, "'%s' is no model", bad[i]);
        CHECK(strstr(error.text, bad[i]) && strstr(error.text, "diffenc-L-nt"), "'%s': message is '%s'",
              bad[i], error.text);
    }
}

/* A refusal must name the option and the reason: the message must hold `part`. */
static void refuse(Config c, const char *part) {
    Error error = {""};
    Model model;
    size_t count;
    CHECK(config_check(&c, &error) == -1, "must be refused because of: %s", part);
    CHECK(strstr(error.text, part), "message '%s' does not hold '%s'", error.text, part);
    CHECK(model_new(&model, &c, 1, &error) == -1 && model_size(&c, &count, &error) == -1,
          "no model is made: %s", part);
}

static void accept(Config c, const char *what) {
    Error error = {""};
    size_t count = 0;
    CHECK(config_check(&c, &error) == 0, "%s: refused: %s", what, error.text);
    CHECK(model_size(&c, &count, &error) == 0 && count > 0, "%s: parameters can be counted", what);
}

static void test_config_check(void) {
    const Config d = config_default();
    Config c;
    CHECK(d.kind == DIFFENC && d.score_blocks == 4 && d.encoder_blocks == 2 && d.net == NET_FLAT &&
          d.channels == 32 && d.encoder_channels == 16 && d.height == 28 && d.width == 28 &&
          d.image_channels == 1, "the default model");
    CHECK(d.prediction == PREDICT_V && d.schedule == SCHEDULE_FIXED && d.gamma_min == -13.3 &&
              d.gamma_max == 5 && d.timesteps == 0 && d.variance_ratio == 1 && d.dropout == 0.1,
          "the default method");
    accept(d, "the default");
    c = d; c.height = 0; refuse(c, "image size 0x28");
    c = d; c.width = 5000; refuse(c, "image size 28x5000");
    c = d; c.image_channels = 0; refuse(c, "image channels 0");
    c = d; c.image_channels = 4; refuse(c, "image channels 4: must be 1 to 3");
    c = d; c.height = c.width = 1; c.image_channels = 2; accept(c, "points");
    c.net = NET_UNET; accept(c, "points in a U-Net, which has no level");
    c.channels = 132; refuse(c, "132 channels do not divide into 32 groups");
    c = d; c.score_blocks = 0; refuse(c, "L 0");
    c = d; c.score_blocks = 257; refuse(c, "L 257");
    c = d; c.encoder_blocks = -1; refuse(c, "E -1");
    c = d; c.encoder_blocks = 0; refuse(c, "E 0");
    c = d; c.width = 30; refuse(c, "encoder: a U-Net of 2 blocks halves the image 2 times");
    c = d; c.height = 27; refuse(c, "encoder: a U-Net of 2 blocks halves the image 1 times");
    c = d; c.kind = VDM; c.height = 27; accept(c, "a flat network takes any size");
    c.net = NET_UNET; refuse(c, "net unet");
    c = d; c.channels = 30; refuse(c, "channels 30: must be a multiple of 4");
    c = d; c.channels = 0; refuse(c, "channels 0");
    c = d; c.channels = 1028; refuse(c, "channels 1028");
    c = d; c.channels = 132; refuse(c, "132 channels do not divide into 32 groups");
    c = d; c.channels = 68; refuse(c, "do not divide into 32 groups");   /* [h | kept] has 136 */
    c = d; c.encoder_channels = 6; refuse(c, "encoder-channels 6");
    c = d; c.encoder_channels = 36; refuse(c, "encoder-channels 36");   /* [up | kept] has 144 at level 1 */
    c = d; c.encoder_channels = 1024; refuse(c, "encoder-channels 1024: level 1");
    c = d; c.kind = VDM; c.encoder_channels = 6; accept(c, "without an encoder its size is of no account");
    c = d; c.gamma_min = 5; refuse(c, "gamma-min 5, gamma-max 5");
    c = d; c.gamma_min = NAN; refuse(c, "gamma-min nan");
    c = d; c.gamma_max = INFINITY; refuse(c, "gamma-max inf");
    c = d; c.gamma_min = -41; refuse(c, "gamma-min -41");
    c = d; c.timesteps = -1; refuse(c, "timesteps -1");
    c = d; c.timesteps = 1000001; refuse(c, "timesteps 1000001");
    c = d; c.timesteps = 10; c.variance_ratio = 0; refuse(c, "variance-ratio 0");
    c.variance_ratio = NAN; refuse(c, "variance-ratio nan");
    c = d; c.variance_ratio = 0.9; refuse(c, "diverges in continuous time");
    c.timesteps = 10; accept(c, "a variance ratio in finite time");
    c = d; c.classes = -1; refuse(c, "classes -1");
    c = d; c.classes = 257; refuse(c, "classes 257: must be from 1 to 256");
    c.classes = 256; accept(c, "as many classes as a byte can tell apart");
    c = d; c.dropout = 1; refuse(c, "dropout 1");
    c = d; c.dropout = -0.1; refuse(c, "dropout -0.1");
    c = d; c.dropout = NAN; refuse(c, "dropout nan");
    c = d; c.channels = 128; c.encoder_channels = 64; c.score_blocks = 32; c.encoder_blocks = 8;
    c.height = c.width = 32; c.image_channels = 3; accept(c, "the paper's largest");
}

static void test_unet_levels(void) {
    /* blocks, height, levels: stop behind the level that leaves it odd or at most 8; height 1: none */
    static const int known[16][3] = {{2, 28, 2}, {8, 28, 2}, {1, 28, 1}, {2, 32, 2}, {8, 32, 2},
                                     {2, 12, 1}, {1, 8, 1},  {4, 8, 1},  {4, 16, 1}, {8, 64, 3},
                                     {2, 64, 2}, {1, 64, 1}, {4, 20, 2}, {3, 36, 2}, {2, 1, 0},  {3, 2, 1}};
    for (int i = 0; i < 16; i++)
        CHECK(unet_levels(known[i][0], known[i][1]) == known[i][2],
              "%d blocks on height %d: %d levels, not %d", known[i][0], known[i][1],
              unet_levels(known[i][0], known[i][1]), known[i][2]);
}

/* ---- parameters ---- */

/* How a parameter begins, by the end of its name. */
static Initial initial_of(const char *name) {
    static const struct { const char *end; Initial initial; } rules[9] = {
        {"gamma.b", INIT_GAMMA_B},   {"gamma.w", INIT_GAMMA_W},       {".scale", INIT_ONE},
        {".bias", INIT_ZERO},        {".time.kernel", INIT_ZERO},     {".conv2.kernel", INIT_ZERO},
        {"class.kernel", INIT_ZERO}, {".attn.out.kernel", INIT_ZERO}, {".conv_out.kernel", INIT_ZERO}};
    for (int i = 0; i < 9; i++)
        if (strlen(name) >= strlen(rules[i].end) &&
            strcmp(name + strlen(name) - strlen(rules[i].end), rules[i].end) == 0)
            return rules[i].initial;
    return INIT_LECUN;
}

/* So many weights, one parameter after the other without gaps; `name` is one of the last. Names and shapes
 * are those of the golden checkpoints, which could not be read otherwise. */
static void check_parameters(Config c, size_t weights, const char *name) {
    Model m;
    size_t offset = 0, count = 0;
    Error error;
    model_make(&m, c, 1);
    CHECK(m.weight_count == weights, "%s: %zu weights, not %zu", name, m.weight_count, weights);
    CHECK(parameter_named(&m, name), "%s is missing", name);
    for (int i = 0; i < m.parameter_count; offset += m.parameter[i++].count) {
        const Parameter *p = &m.parameter[i];
        CHECK(p->offset == offset && p->count == (size_t)p->taps * p->in * p->out, "%s: where it lies",
              p->name);
        CHECK(p->initial == initial_of(p->name), "%s: initial values", p->name);
        CHECK(parameter_named(&m, p->name) == p, "%s is there twice", p->name);
    }
    CHECK(model_size(&c, &count, &error) == 0 && count == m.weight_count, "%s: model_size counts the same",
          name);
    model_free(&m);
}

/* A ResBlock from n to m channels in a network of width w has n (2 + 9 m) + m (4 w + 4 + 9 m) weights, and
 * (n + 1) m more where n and m differ. */
static void test_parameters(void) {
    Config c = small_model("diffenc-2-2", NET_FLAT, 8, 28, 28, 1);
    c.encoder_channels = 4;
    /* time 1344, conv_in 368, 4 blocks of 1456, attention 304, 3 blocks of 2184, norm_out 16, conv_out 73 */
    const size_t score = 14481;
    /* time 352, conv_in 40, down 376 + 1072, mid 2 x 1328 + 304, up 264 + 2056 + 132 + 564, out 8 + 37 */
    const size_t encoder = 7861;
    check_parameters(small_model("vdm-2", NET_FLAT, 8, 28, 28, 1), score, "score.up.2.skip.kernel");
    c.schedule = SCHEDULE_LEARNED;
    check_parameters(c, score + encoder + 2, "encoder.up.1.0.skip.bias");
    c.schedule = SCHEDULE_FIXED;
    c.classes = 10;
    check_parameters(c, score + encoder + 10 * (32 + 16), "encoder.class.kernel");
    /* two levels of two blocks, 8 and 16 channels: time 1344, conv_in 1088, down 2 x 1456 + 4192 + 5216,
     * mid 2 x 5216 + 1120, up 1040 + 8080 + 5216 + 520 + 2184 + 1456, out 16 + 219 */
    check_parameters(small_model("diffenc-4-nt", NET_UNET, 8, 28, 28, 3), 45035, "score.up.1.1.conv2.bias");
    /* no level: of either network time 352, mid 2 x 376 + 88, out 8 + 74, and conv_in 364 and 76 */
    check_parameters(small_model("diffenc-2-2", NET_UNET, 4, 1, 1, 2), 2988, "encoder.mid.1.conv2.bias");
}

/* LeCun: a normal cut off at two of its standard deviations, with variance 1/fan_in after the cut. */
static void check_lecun(const Model *m, const Parameter *p) {
    const real *w = m->params + p->offset;
    const double n = (double)p->count, fan_in = (double)p->taps * p->in, cut = 0.87962566103423978;
    double sum = 0, square = 0, largest = 0, inside = 0;
    for (size_t i = 0; i < p->count; i++) {
        const double x = (double)w[i] * sqrt(fan_in);   /* variance 1 */
        sum += x;
        square += x * x;
        largest = fmax(largest, fabs(x) * cut);
        inside += fabs(x) * cut < 1;
    }
    /* A normal's share within 1 of what lies within 2: erf(1/sqrt 2)/erf(sqrt 2). The variance of x^2 is at
     * most 2, that of the uncut normal. */
    const double share = erf(sqrt(0.5)) / erf(sqrt(2));
    CHECK(fabs(sum) < 5 * sqrt(n), "%s: mean %g standard deviations", p->name, sum / n);
    CHECK(fabs(square / n - 1) < 5 * sqrt(2 / n), "%s: variance %g / fan_in", p->name, square / n);
    CHECK(fabs(inside - share * n) < 5 * sqrt(share * (1 - share) * n), "%s: %g lie within one", p->name,
          inside / n);
    CHECK(largest <= 2 * (1 + EPS) && (n < 2000 || largest > 1.95),
          "%s: the largest is %g standard deviations", p->name, largest);
}

static void test_initial_values(void) {
    Model a, b, other;
    Config c = small_model("diffenc-2-2", NET_UNET, 16, 28, 28, 1);
    c.schedule = SCHEDULE_LEARNED;
    model_make(&a, c, 5);
    model_make(&b, c, 5);
    model_make(&other, c, 6);
    for (int i = 0; i < a.parameter_count; i++) {
        const Parameter *p = &a.parameter[i];
        const real *w = a.params + p->offset;
        size_t zeros = 0, ones = 0;
        for (size_t j = 0; j < p->count; j++)
            zeros += w[j] == 0, ones += w[j] == 1;
        if (p->initial == INIT_ZERO)
            CHECK(zeros == p->count, "%s starts at zero", p->name);
        if (p->initial == INIT_ONE)
            CHECK(ones == p->count, "%s starts at one", p->name);
        if (p->initial == INIT_GAMMA_B)
            CHECK(w[0] == (real)-13.3, "gamma.b starts at gamma_min");
        if (p->initial == INIT_GAMMA_W)
            CHECK(w[0] == (real)18.3, "gamma.w starts at gamma_max - gamma_min");
        if (p->initial == INIT_LECUN) {
            check_lecun(&a, p);
            CHECK(memcmp(w, other.params + p->offset, p->count * sizeof(real)), "%s depends on the seed",
                  p->name);
        }
    }
    size_t equal = 0;
    const Parameter *p = parameter_named(&a, "score.down.0.0.conv1.kernel");
    const Parameter *q = parameter_named(&a, "score.mid.0.conv1.kernel");
    for (size_t i = 0; i < p->count; i++)
        equal += a.params[p->offset + i] == a.params[q->offset + i];
    CHECK(equal < 10, "parameters have streams of their own");
    CHECK(memcmp(a.params, b.params, a.weight_count * sizeof(real)) == 0,
          "the same seed gives the same weights");
    CHECK(memcmp(a.params, a.ema, a.weight_count * sizeof(real)) == 0, "the average starts at the weights");
    CHECK(dot(a.adam_m, a.adam_m, a.weight_count) == 0 && dot(a.adam_v, a.adam_v, a.weight_count) == 0 &&
          a.step == 0, "the optimiser starts at zero");
    model_free(&a), model_free(&b), model_free(&other);
}

/* ---- networks ---- */

/* A fresh model leaves z as it is and encodes everything as zero: conv_out starts at zero. */
static void test_fresh_networks(void) {
    Lab lab;
    real z[64];
    lab_new(&lab, small_model("diffenc-1-1", NET_FLAT, 8, 8, 8, 1), 1);
    fill_normal(z, 64, 4, 0, 1);
    Graph *g = network_restart(lab.network, lab.model.params, NULL);
    Tensor *x = constant(g, 8, 8, 1, z), *y = encoder_network(lab.network, x, number(g, 0.5), 1);
    CHECK(memcmp(score_network(lab.network, x, number(g, 0.5))->value, z, sizeof z) == 0,
          "a fresh score network gives z back");
    CHECK(dot(y->value, y->value, 64) == 0, "a fresh encoder gives zero");
    lab_free(&lab);
}

/* With an embedding of zeros all classes are alike; a row that is not zero moves its own class in its own
 * network and no other; and the gradient of the embedding is zero but for the row of the example's class. */
static void test_classes(void) {
    enum { CLASSES = 4, COUNT = 64, OWN = 2 };
    static const char *const names[2] = {"score.class.kernel", "encoder.class.kernel"};
    Lab lab;
    real x[COUNT], before[2][COUNT];
    Config c = small_model("diffenc-1-1", NET_FLAT, 8, 8, 8, 1);
    c.classes = CLASSES;
    lab_new(&lab, c, 1);
    fill_weights(&lab.model);
    fill_normal(x, COUNT, 4, 0, 0.5);
    const Parameter *const tables[2] = {parameter_named(&lab.model, names[0]),
                                        parameter_named(&lab.model, names[1])};
    assert(tables[0] && tables[1]);
    real *gradient = allocate(lab.model.weight_count, sizeof *gradient);
    for (int k = 0; k < 2; k++)
        memset(lab.model.params + tables[k]->offset, 0, tables[k]->count * sizeof(real));
    for (int moved = -1; moved < 2; moved++)   /* the network whose row OWN is not zero */
        for (int label = 0; label < CLASSES; label++) {
            for (int k = 0; k < 2; k++) {
                real *row = lab.model.params + tables[k]->offset + (size_t)OWN * tables[k]->out;
                for (int j = 0; j < tables[k]->out; j++)
                    row[j] = (real)(k == moved ? 0.3 : 0);
            }
            memset(gradient, 0, lab.model.weight_count * sizeof *gradient);
            Graph *g = network_restart(lab.network, lab.model.params, gradient);
            lab.network->label = label;
            Tensor *image = constant(g, 8, 8, 1, x), *out[2];
            out[0] = score_network(lab.network, image, number(g, 0.5));
            out[1] = encoder_network(lab.network, image, number(g, 0.5), 1);
            for (int k = 0; k < 2; k++) {
                if (moved < 0 && label == 0)
                    memcpy(before[k], out[k]->value, sizeof before[k]);
                CHECK((memcmp(before[k], out[k]->value, sizeof before[k]) != 0) ==
                          (k == moved && label == OWN),
                      "%s, row %d of network %d: class %d", names[k], OWN, moved, label);
            }
            backward(squared_norm(add(out[0], out[1])), 1);
            for (int k = 0; k < 2; k++)
                for (int row = 0; row < CLASSES; row++) {
                    const real *g = gradient + tables[k]->offset + (size_t)row * tables[k]->out;
                    CHECK((dot(g, g, (size_t)tables[k]->out) > 0) == (row == label),
                          "%s: the gradient of row %d of an example of class %d", names[k], row, label);
                }
        }
    free(gradient), lab_free(&lab);
}

/* ---- dropout ---- */

/* Within an example each network has one mask, however often either is asked and in whatever order; and the
 * two masks differ, else both networks would lose the same elements. */
static void test_one_mask_an_example(void) {
    enum { COUNT = 12 * 8 };
    Lab lab;
    real x[COUNT], first_y[COUNT], first_score[COUNT];
    lab_new(&lab, small_model("diffenc-1-2", NET_FLAT, 8, 12, 8, 1), 1);
    fill_weights(&lab.model);
    fill_normal(x, COUNT, 5, 0, 0.5);
    Network *n = lab.network;
    for (int calls = 0; calls < 4; calls++) {
        Graph *g = network_restart(lab.network, lab.model.params, NULL);
        Tensor *image = constant(g, 12, 8, 1, x), *y = NULL, *score = NULL;
        g->dropout = 0.3;
        g->dropout_stream = random_stream(9, RANDOM_DROPOUT, 0, 4);
        if (calls % 2)
            score = score_network(n, image, number(g, 0.4));
        for (int i = 0; i <= calls; i++) {
            Tensor *t = number(g, i == calls ? 0.4 : 0.7);
            y = encoder_network(n, image, i == 1 ? with_tangent(t, number(g, 1)) : t, 1);
            CHECK(!y->tangent == (i != 1), "a tangent comes out only if one was asked for");
        }
        CHECK(g->dropout_stream.purpose == RANDOM_ENCODER_DROPOUT, "the encoder draws from its own stream");
        if (!score)
            score = score_network(n, image, number(g, 0.4));
        CHECK(calls % 2 || g->dropout_stream.purpose == RANDOM_DROPOUT, "so does the score network");
        if (calls == 0) {
            memcpy(first_y, y->value, sizeof first_y);
            memcpy(first_score, score->value, sizeof first_score);
        }
        /* with a tangent some sums may run in another order */
        double worst = 0;
        for (int i = 0; i < COUNT; i++)
            worst = worse(worst, y->value[i], first_y[i], 100 * EPS);
        CHECK(worst <= 1, "call %d of the encoder has the mask of the first", calls + 1);
        CHECK(memcmp(score->value, first_score, sizeof first_score) == 0,
              "%d encoder calls: the score's mask stays", calls + 1);
    }
    lab_free(&lab);
}

/* ---- batches ---- */

typedef struct { int *calls; const Config *config; } Batch;

/* Any loss that uses every parameter, with dropout, its random numbers given by the example. */
static void example_work(Network *n, int example, void *context) {
    const Batch *batch = context;
    const Config *c = batch->config;
    const size_t count = (size_t)c->height * c->width * c->image_channels;
    real z[256];
    batch->calls[example]++;   /* one thread a call */
    n->graph.dropout = 0.25;
    n->graph.dropout_stream = random_stream(9, RANDOM_DROPOUT, 3, (uint32_t)example);
    random_normal(random_stream(9, RANDOM_NOISE, 3, (uint32_t)example), z, count);
    Tensor *x = constant(&n->graph, c->height, c->width, c->image_channels, z), *b, *w;
    schedule_parameters(n, &b, &w);
    Tensor *t = number(&n->graph, (example + 0.5) / 40);
    Tensor *y = encoder_network(n, x, with_tangent(t, affine(0.01, w, 0)), 1);
    Tensor *score = score_network(n, add(x, mul(b, y)), t);
    backward(add(squared_norm(sub(score, y)), squared_norm(y->tangent)), 1);
}

static void count_work(Network *n, int example, void *context) {
    const int fresh = n->graph.last == NULL && n->graph.dropout == 0;
    ((int *)context)[example] += fresh && n->weights == n->model->ema && n->gradient == NULL;
}

static void test_workers(void) {
    static const int batches[4] = {1, 5, 16, 33}, threads[5] = {1, 2, 3, 4, 5};
    Model m;
    Config c = small_model("diffenc-1-1", NET_FLAT, 4, 4, 4, 1);
    c.schedule = SCHEDULE_LEARNED;
    model_make(&m, c, 3);
    fill_weights(&m);
    m.params[parameter_named(&m, "gamma.b")->offset] = (real)0.5;
    m.params[parameter_named(&m, "gamma.w")->offset] = (real)0.7;
    const size_t count = m.weight_count;
    real *first = allocate(count, sizeof(real));
    double *sum = allocate(count, sizeof(double)), *size = allocate(count, sizeof(double));
    int calls[33];
    Batch batch = {calls, &m.config};
    for (int b = 0; b < 4; b++)
        for (int t = 0; t < 5; t++) {
            Workers w;
            workers_new(&w, &m, threads[t]);
            for (int again = 0; again < 2; again++) {
                memset(calls, 0, sizeof calls);
                const real *gradient = workers_gradient(&w, batches[b], example_work, &batch);
                if (t == 0 && !again)
                    memcpy(first, gradient, count * sizeof(real));
                CHECK(memcmp(first, gradient, count * sizeof(real)) == 0,
                      "batch %d: %d threads give the bits of 1, call %d", batches[b], threads[t], again + 1);
            }
            int once = 1;
            for (int i = 0; i < 33; i++)
                once &= calls[i] == (i < batches[b]);
            CHECK(once, "batch %d, %d threads: every example once", batches[b], threads[t]);
            memset(calls, 0, sizeof calls);
            workers_run(&w, m.ema, batches[b], count_work, calls);
            for (int i = 0; i < 33; i++)
                once &= calls[i] == (i < batches[b]);
            CHECK(once, "batch %d, %d threads, no gradients: every example once", batches[b], threads[t]);
            workers_free(&w);
        }

    /* The gradient of a batch is the sum of those of its examples; here of 33, the last batch above. */
    Workers w;
    workers_new(&w, &m, 1);
    memset(sum, 0, count * sizeof(double));
    memset(size, 0, count * sizeof(double));
    size_t memory = 0;
    real *alone = allocate(count, sizeof(real));
    int steady = 1, used = 0;
    for (int e = 0; e < 33; e++) {
        memset(alone, 0, count * sizeof(real));
        network_restart(&w.network[0], m.params, alone);
        example_work(&w.network[0], e, &batch);
        for (size_t i = 0; i < count; i++)
            sum[i] += (double)alone[i], size[i] += fabs((double)alone[i]);
        const size_t before = memory;
        memory = arena_capacity(w.network[0].graph.arena);
        steady &= e == 0 || memory == before;
    }
    double worst = 0, largest = 0;
    for (size_t i = 0; i < count; i++)
        largest = fmax(largest, size[i]);
    /* 33 additions; relative to the largest, because what normalisation makes small (a bias in front of it)
     * is the sum of large terms. */
    for (size_t i = 0; i < count; i++)
        worst = worse(worst, first[i], sum[i], 33 * EPS * largest);
    for (int i = 0; i < m.parameter_count; i++) {
        const Parameter *p = &m.parameter[i];
        used += dot(first + p->offset, first + p->offset, p->count) > 0;
    }
    CHECK(worst <= 1, "the gradient of a batch is a sum: %.3g tolerances", worst);
    CHECK(used == m.parameter_count, "%d of %d parameters have a gradient", used, m.parameter_count);
    CHECK(memory > 0 && steady, "after the first example the arena does not grow");
    workers_free(&w);

    /* More threads: never more than one arena of that size each, however the examples were dealt. */
    workers_new(&w, &m, 3);
    for (int pass = 0; pass < 4; pass++)
        workers_gradient(&w, 33, example_work, &batch);
    for (int i = 0; i < 3; i++)
        CHECK(arena_capacity(w.network[i].graph.arena) <= memory,
              "each of 3 arenas holds at most %zu bytes", memory);
    workers_free(&w), free(first), free(sum), free(size), free(alone), model_free(&m);
}

#ifdef _OPENMP
/* The last part to come ends the waiting of the others; where one thread did them all, none would come. */
static void meet(const void *context, int first, int end, Arena *scratch) {
    int *arrived = *(int *const *)context, now = 0;
    const double start = seconds_now();
    (void)scratch;
#pragma omp atomic
    *arrived += end - first;
    while (now < 3 && seconds_now() - start < 20) {
#pragma omp atomic read
        now = *arrived;
    }
    CHECK(now == 3, "three threads work on one example at the same time");
}

static void meet_work(Network *n, int example, void *context) {
    (void)example;
    in_parts(meet, context, 3, n->graph.arena);
}
#endif

/* The score network's output, one example after the other. */
static void score_work(Network *n, int example, void *context) {
    const Config *c = &n->model->config;
    const RandomStream stream = random_stream(9, RANDOM_NOISE, 5, (uint32_t)example);
    Tensor *z = gaussian(&n->graph, c->height, c->width, 1, stream);
    const Tensor *y = score_network(n, z, number(&n->graph, 0.3));
    memcpy((real *)context + (size_t)example * element_count(y), y->value, element_count(y) * sizeof(real));
}

/* Threads that have no example of their own help with the last ones: the bits are the same. */
static void test_helpers(void) {
    enum { PIXELS = 28 * 28, MOST = 4 };
    for (int net = 0; net < 2; net++) {
        Model m;
        Workers w;
        real *want = allocate(MOST * PIXELS, sizeof(real)), *got = allocate(MOST * PIXELS, sizeof(real));
        model_make(&m, small_model("vdm-2", net ? NET_UNET : NET_FLAT, 16, 28, 28, 1), 1);
        fill_normal(m.ema, m.weight_count, 11, 0, 0.2);
        workers_new(&w, &m, 1);
        workers_run(&w, m.ema, MOST, score_work, want);
        workers_free(&w);
        for (int threads = 2; threads <= 5; threads++)
            for (int count = 1; count <= MOST; count++) {
                workers_new(&w, &m, threads);
                memset(got, 0, MOST * PIXELS * sizeof(real));
                workers_run(&w, m.ema, count, score_work, got);
                CHECK(memcmp(got, want, (size_t)count * PIXELS * sizeof(real)) == 0,
                      "%s: %d examples on %d threads, the bits of one", net ? "U-Net" : "flat", count,
                      threads);
                workers_free(&w);
            }
        free(want), free(got), model_free(&m);
    }
#ifdef _OPENMP
    Model m;
    Workers w;
    int arrived = 0, *context = &arrived;
    model_make(&m, small_model("vdm-1", NET_FLAT, 4, 4, 4, 1), 1);
    workers_new(&w, &m, 3);
    workers_run(&w, m.ema, 1, meet_work, &context);
    workers_free(&w), model_free(&m);
#endif
}

/* ---- the optimiser ---- */

/* One weight through AdamW and the moving average, as written in their papers. */
typedef struct { double w, m, v, ema; } Scalar;

/* AdamW's step at rate 1. */
static double scalar_adam(Scalar *s, const Optimizer *o, double g, int step) {
    s->m = o->beta1 * s->m + (1 - o->beta1) * g;
    s->v = o->beta2 * s->v + (1 - o->beta2) * g * g;
    return s->m / (1 - pow(o->beta1, step)) / (sqrt(s->v / (1 - pow(o->beta2, step))) + o->epsilon);
}

/* x [rows, columns] <- x (3.4445 I - 4.775 x^T x + 2.0315 (x^T x)^2), five times from x / ||x||. */
static void orthogonal(int rows, int columns, double *x) {
    double *a = allocate((size_t)columns * columns, sizeof *a);
    double *y = allocate((size_t)rows * columns, sizeof *y);
    double norm = 0;
    for (int i = 0; i < rows * columns; i++)
        norm += x[i] * x[i];
    for (int i = 0; i < rows * columns; i++)
        x[i] /= sqrt(norm);
    for (int round = 0; round < 5; round++) {
        for (int i = 0; i < columns * columns; i++) {
            a[i] = 0;
            for (int r = 0; r < rows; r++)
                a[i] += x[r * columns + i / columns] * x[r * columns + i % columns];
        }
        for (int i = 0; i < rows * columns; i++) {
            const int r = i / columns, c = i % columns;
            y[i] = 3.4445 * x[i];
            for (int k = 0; k < columns; k++) {
                double square = 0;
                for (int l = 0; l < columns; l++)
                    square += a[k * columns + l] * a[l * columns + c];
                y[i] += x[r * columns + k] * (2.0315 * square - 4.775 * a[k * columns + c]);
            }
        }
        memcpy(x, y, (size_t)rows * columns * sizeof *x);
    }
    free(a), free(y);
}

/* Muon's step at rate 1 for a kernel as a matrix [taps in, out]. */
static void muon_by_hand(const Parameter *p, double momentum, Scalar *s, const real *g, double *u) {
    const int rows = p->taps * p->in, columns = p->out;
    for (int i = 0; i < rows * columns; i++) {
        s[i].m = momentum * s[i].m + (1 - momentum) * (double)g[i];
        u[i] = momentum * s[i].m + (1 - momentum) * (double)g[i];
    }
    orthogonal(rows, columns, u);
    for (int i = 0; i < rows * columns; i++)
        u[i] *= 0.2 * sqrt(rows > columns ? rows : columns);
}

/* `steps` steps under gradients of norm up to some hundreds, against the scalars. */
static void check_optimizer(const char *what, Optimizer o, int steps) {
    Lab lab[2];   /* of one thread and of three */
    Config c = small_model("diffenc-1-1", NET_FLAT, 4, 4, 4, 1);
    c.schedule = SCHEDULE_LEARNED, c.classes = 3;
    for (int i = 0; i < 2; i++) {
        lab_new(&lab[i], c, 1 + 2 * i);
        fill_weights(&lab[i].model);
        memcpy(lab[i].model.ema, lab[i].model.params, lab[i].model.weight_count * sizeof(real));
    }
    const Model m = lab[0].model, same = lab[1].model;
    Scalar *scalar = allocate_zeroed(m.weight_count, sizeof *scalar);
    double *u = allocate(m.weight_count, sizeof *u);
    real *g = allocate(m.weight_count, sizeof(real));
    for (size_t i = 0; i < m.weight_count; i++)
        scalar[i].w = scalar[i].ema = (double)m.params[i];
    double worst_w = 0, worst_ema = 0, worst_m = 0, worst_v = 0;
    for (int step = 1; step <= steps; step++) {
        fill_normal(g, m.weight_count, (uint32_t)(100 + step), 0.3, step % 2 ? 2 : 0.01);
        double norm = 0;
        for (size_t i = 0; i < m.weight_count; i++)
            norm += (double)g[i] * (double)g[i];
        norm = sqrt(norm);
        const double clip = o.clip > 0 && norm > o.clip ? o.clip / norm : 1;
        const double average = fmin(o.ema, (1.0 + step) / (35.0 + step));
        const double up = o.warmup > 0 ? (double)step / o.warmup : 1;
        const double down = o.cooldown > 0 ? (o.steps - step + 1) / (o.cooldown * o.steps) : 1;
        const double told = optimizer_step(&lab[0].workers, &o, g);
        CHECK(fabs(told - norm) <= (double)m.weight_count * DBL_EPSILON * norm,
              "%s: the norm before clipping", what);
        optimizer_step(&lab[1].workers, &o, g);
        for (int i = 0; i < m.parameter_count; i++) {
            const Parameter *p = &m.parameter[i];
            const char *last = strrchr(p->name, '.');
            /* Nothing of the schedule decays, no bias, and no class, whose embedding is not Muon's either. */
            const int is_kernel = strcmp(last, ".kernel") == 0 && !strstr(p->name, ".class.");
            const int decays = is_kernel || strcmp(last, ".scale") == 0;
            const int by_muon = o.muon && is_kernel;
            double rate = o.learning_rate * fmin(fmin(up, down), 1);
            if (strncmp(p->name, "encoder.", 8) == 0)
                rate *= o.encoder_rate;
            if (by_muon)
                muon_by_hand(p, o.momentum, scalar + p->offset, g + p->offset, u + p->offset);
            for (size_t j = p->offset; j < p->offset + p->count; j++) {
                Scalar *s = &scalar[j];
                if (!by_muon)
                    u[j] = scalar_adam(s, &o, clip * (double)g[j], step);
                s->w -= rate * (u[j] + (decays ? o.weight_decay * s->w : 0));
                s->ema = average * s->ema + (1 - average) * s->w;
                /* 1 - beta2 is off by EPS / 2 / (1 - beta2) = 50 EPS where beta2 is rounded, and so are the
                 * second moment and with half of it the step of the weight; sums round once a step. */
                const double steps_rounded = 64 * step * o.learning_rate;
                worst_m = worse(worst_m, m.adam_m[j], s->m, 16 * EPS * (fabs(s->m) + (by_muon ? 1 : clip)));
                worst_v = worse(worst_v, m.adam_v[j], s->v, 64 * EPS * s->v);
                worst_w = worse(worst_w, m.params[j], s->w, EPS * (step * fabs(s->w) + steps_rounded));
                worst_ema = worse(worst_ema, m.ema[j], s->ema,
                                  EPS * (2 * step * (fabs(s->w) + fabs(s->ema)) + steps_rounded));
            }
        }
    }
    CHECK(worst_m <= 1, "%s: first moments, %.3g tolerances", what, worst_m);
    CHECK(worst_v <= 1, "%s: second moments, %.3g tolerances", what, worst_v);
    CHECK(worst_w <= 1, "%s: weights, %.3g tolerances", what, worst_w);
    CHECK(worst_ema <= 1, "%s: averages, %.3g tolerances", what, worst_ema);
    CHECK(lab[0].model.step == (uint64_t)steps, "%s: steps are counted", what);
    CHECK(memcmp(m.params, same.params, m.weight_count * sizeof(real)) == 0 &&
              memcmp(m.ema, same.ema, m.weight_count * sizeof(real)) == 0,
          "%s: 3 threads give the same bits as 1", what);
    free(scalar), free(g), free(u), lab_free(&lab[0]), lab_free(&lab[1]);
}

static void test_optimizer(void) {
    const Optimizer d = optimizer_default();
    CHECK(d.learning_rate == 2e-4 && d.encoder_rate == 1 && !d.muon && d.momentum == 0.95 && d.warmup == 0 &&
          d.beta1 == 0.9 && d.beta2 == 0.99 && d.epsilon == 1e-8 && d.weight_decay == 0.01 && d.clip == 0 &&
          d.ema == 0.9999, "the paper's optimiser");
    Optimizer o = d;
    check_optimizer("the default", o, 12);
    o.learning_rate = 0.05, o.weight_decay = 0.5;
    check_optimizer("a large rate, a strong decay", o, 12);
    o.warmup = 5;
    check_optimizer("warm-up", o, 12);
    o.clip = 1;
    check_optimizer("clipping", o, 12);
    o.ema = 0.5;
    check_optimizer("a short average", o, 12);
    o.muon = 1, o.encoder_rate = 0.1;
    check_optimizer("Muon, a slow encoder", o, 12);
    o.momentum = 0.8, o.weight_decay = 0, o.epsilon = 0.1;
    check_optimizer("another momentum, no decay, a large epsilon", o, 12);
    o.cooldown = 0.5, o.steps = 12, o.warmup = 0;   /* 1 for 7 steps, then 5/6, 4/6, ... 1/6 of the rate */
    check_optimizer("cooling down", o, 12);
}

/* A gradient with one number that is not finite, or whose square is not, leaves everything as it was. */
static void test_not_finite(void) {
    static const double bad[4] = {NAN, INFINITY, -INFINITY, sizeof(real) == sizeof(float) ? 1e30 : 1e200};
    const Optimizer o = optimizer_default();
    Lab lab;
    lab_new(&lab, small_model("vdm-1", NET_FLAT, 4, 4, 4, 1), 1);
    const Model *m = &lab.model;
    const size_t count = m->weight_count, bytes = count * sizeof(real);
    real *g = allocate(count, sizeof(real)), *before = allocate(4 * count, sizeof(real));
    const real *const vector[4] = {m->params, m->ema, m->adam_m, m->adam_v};
    fill_normal(g, count, 1, 0, 1);
    optimizer_step(&lab.workers, &o, g);
    for (int v = 0; v < 4; v++)
        memcpy(before + v * count, vector[v], bytes);
    for (int i = 0; i < 4; i++) {
        g[count / 2 + (size_t)i] = (real)bad[i];
        CHECK(!isfinite(optimizer_step(&lab.workers, &o, g)), "the norm tells of %g", bad[i]);
        int same = m->step == 1;
        for (int v = 0; v < 4; v++)
            same &= memcmp(before + v * count, vector[v], bytes) == 0;
        CHECK(same, "a gradient with %g changes nothing", bad[i]);
        g[count / 2 + (size_t)i] = 0;
    }
    free(g), free(before), lab_free(&lab);
}

int main(void) {
    static void (*const tests[])(void) = {
        test_parse_model, test_config_check, test_unet_levels, test_parameters, test_initial_values,
        test_fresh_networks, test_classes, test_one_mask_an_example, test_workers, test_helpers,
        test_optimizer, test_not_finite};
    for (size_t i = 0; i < sizeof tests / sizeof tests[0]; i++)
        tests[i]();
    return test_report();
}
