/* test_diffenc.c - the algorithms of diffenc.c: which times, noise and weights they take, what they make of
 * them, and what they say when it goes wrong.
 *
 * The equations under them are shown elsewhere: `diffenc check` proves each identity, and the golden files
 * hold losses and gradients of another implementation (tests/reference.py). So they are taken as given here,
 * and an algorithm is done a second time with its draws written out. */

#include "test.h"

enum { HEIGHT = 4, WIDTH = 6, D = HEIGHT * WIDTH, COUNT = 5, CLASSES = 3, SEED = 21 };

typedef struct { Lab lab; unsigned char images[COUNT * D], labels[COUNT]; } Case;

/* Weights and their average are random and differ, so that taking the wrong ones shows, and labels do. */
static void case_new(Case *c, const char *name, int timesteps, double dropout, ScheduleKind schedule,
                     int threads) {
    Config config = small_model(name, NET_UNET, 4, HEIGHT, WIDTH, 1);
    config.timesteps = timesteps;
    config.dropout = dropout;
    config.schedule = schedule;
    config.classes = CLASSES;
    lab_new(&c->lab, config, threads);
    fill_weights(&c->lab.model);
    for (size_t i = 0; i < c->lab.model.weight_count; i++)
        c->lab.model.ema[i] = (real)0.75 * c->lab.model.params[i];
    for (int i = 0; i < COUNT; i++)
        c->labels[i] = (unsigned char)(2 * i % CLASSES);
    for (int i = 0; i < COUNT * D; i++)
        c->images[i] = (unsigned char)random_bits(random_stream(SEED, RANDOM_CHECK, 3, 0), (uint32_t)i);
}

/* A new graph with these weights, without dropout. */
static Method restart(Case *c, const real *weights) {
    network_restart(c->lab.network, weights, NULL);
    return method_begin(c->lab.network);
}

static Tensor *noise_of(const Method *m, RandomPurpose purpose, int step, int example) {
    const RandomStream stream = random_stream(SEED, purpose, (uint32_t)step, (uint32_t)example);
    return gaussian(m->graph, HEIGHT, WIDTH, 1, stream);
}

/* ---- times ---- */

/* A time of a batch or an evaluation with finite T is the next multiple of 1/T, in (0, 1]. */
static int on_next_step(double t, double exact, int T) {
    const double step = floor(t * T + 0.5);
    return t == step / T && step >= 1 && step <= T && t >= exact && t - exact < 1.0 / T + 1e-15;
}

static void test_example_time(void) {
    static const int batches[4] = {1, 7, 64, 100}, steps[4] = {1, 2, 20, 50};   /* 100 is a multiple of all */
    for (int b = 0; b < 4; b++)
        for (uint32_t n = 0; n < 50; n++) {
            const int batch = batches[b], T = steps[b];
            const double u = random_uniform(random_stream(SEED, RANDOM_TIME, 0, (uint32_t)b), n);
            int hit[100] = {0}, hit_step[101] = {0}, inside = 1, each = 1;
            for (int i = 0; i < 100; i++) {
                const double t = example_time(u, i % batch, batch, 0), grid = example_time(u, i, 100, T);
                inside &= t >= 0 && t < 1 && fabs(remainder(t - u - (double)(i % batch) / batch, 1)) < 4e-15;
                inside &= on_next_step(grid, example_time(u, i, 100, 0), T);
                if (inside)
                    hit[(int)(t * batch)] += i < batch, hit_step[(int)(grid * T + 0.5)]++;
            }
            for (int i = 0; i < 100; i++)
                each &= hit[i] == (i < batch) && hit_step[i + 1] == (i < T ? 100 / T : 0);
            CHECK(inside, "batch %d: times are (u + i/B) mod 1, and with T %d rounded up", batch, T);
            CHECK(each, "each %dth of [0, 1) has one time, each of %d steps as many", batch, T);
        }
    CHECK(example_time(0, 0, 1, 10) == 0.1 && example_time(0, 0, 1, 1) == 1 && example_time(0, 0, 1, 0) == 0,
          "t = 0 belongs to the first step");
    CHECK(example_time(1 - DBL_EPSILON / 2, 3, 7, 0) < 1, "never 1");
}

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Low discrepancy: wherever a run of draws begins, its n times leave no gap of more than 2/n (those of this
 * sequence are at most 1.9/n), and their mean is that of [0, 1). Times tied to i/N would leave half of [0, 1)
 * empty in half of the run. */
static void test_evaluation_time(void) {
    static const int lengths[4] = {8, 50, 500, 2000};
    static const double starts[4] = {0, 17, 5000, 123456789};
    double t[2000] = {0};
    for (int l = 0; l < 4; l++)
        for (int s = 0; s < 4; s++) {
            const int n = lengths[l];
            const double u = random_uniform(random_stream(SEED, RANDOM_CHECK, 0, 0), (uint32_t)(4 * l + s));
            double gap = 0, mean = 0;
            for (int i = 0; i < n; i++)
                mean += (t[i] = evaluation_time(u, starts[s] + i, 0)) / n;
            qsort(t, (size_t)n, sizeof *t, ascending);
            for (int i = 0; i < n; i++)
                gap = fmax(gap, i ? t[i] - t[i - 1] : t[0] + 1 - t[n - 1]);
            CHECK(t[0] >= 0 && t[n - 1] < 1, "%d times lie in [0, 1)", n);
            CHECK(gap < 2.0 / n, "%d times from %.0f: a gap of %.3g / n", n, starts[s], gap * n);
            CHECK(fabs(mean - 0.5) < 2.0 / n, "%d times from %.0f: the mean is %.4g", n, starts[s], mean);
            for (int i = 0; i < 8; i++)
                CHECK(on_next_step(evaluation_time(u, i, 10), evaluation_time(u, i, 0), 10), "T 10: %d", i);
        }
}

/* ---- a training step ---- */

/* The examples of a step, their draws written out. */
static void examples_of_step(const Case *c, int step, Example *example, real *noise) {
    const double u = random_uniform(random_stream(SEED, RANDOM_TIME, (uint32_t)step, 0), 0);
    for (int i = 0; i < COUNT; i++) {
        real *eps = noise + 2 * i * D, *eps_0 = eps + D;
        random_normal(random_stream(SEED, RANDOM_NOISE, (uint32_t)step, (uint32_t)i), eps, D);
        random_normal(random_stream(SEED, RANDOM_NOISE_0, (uint32_t)step, (uint32_t)i), eps_0, D);
        const double t = example_time(u, i, COUNT, c->lab.model.config.timesteps);
        example[i] = (Example){c->images + i * D, t, eps, eps_0, c->labels[i]};
    }
}

typedef struct { const Case *c; const Example *example; double (*terms)[3]; } ByHand;

/* One example in four trains the encoder, all of them where the schedule is learned. */
static int trains_encoder(const Case *c, int i) {
    return c->lab.model.config.schedule == SCHEDULE_LEARNED || i % 4 == 0;
}

static void training_by_hand(Network *n, int i, void *context) {
    const ByHand *b = context;
    const Method m = method_begin(n);
    n->encoder_fixed = !trains_encoder(b->c, i);
    LossTerms l = objective(&m, b->example[i]);
    b->terms[i][0] = number_of(l.recon), b->terms[i][1] = number_of(l.latent);
    b->terms[i][2] = number_of(l.diffusion);
    backward(bits_per_dimension(&m, l), 1.0 / COUNT);
}

static int take_step(Case *c, const Optimizer *o, StepReport *r, Error *error) {
    return training_step(&c->lab.model, &c->lab.workers, o, c->images, c->labels, COUNT, SEED, r, error);
}

/* Three steps against the same by hand: the same bits. */
static void test_training_step(const char *name, int timesteps, ScheduleKind schedule) {
    Case c, same;
    Optimizer o = optimizer_default();
    Error error;
    o.learning_rate = 0.01;
    case_new(&c, name, timesteps, 0, schedule, 1), case_new(&same, name, timesteps, 0, schedule, 3);
    for (int step = 0; step < 3; step++) {
        Example example[COUNT];
        real noise[2 * COUNT * D];
        double terms[COUNT][3], mean[4] = {0}, worst = 0;
        StepReport r;
        examples_of_step(&same, step, example, noise);
        ByHand b = {&same, example, terms};
        const real *gradient = workers_gradient(&same.lab.workers, COUNT, training_by_hand, &b);
        const double norm = optimizer_step(&same.lab.workers, &o, gradient);
        CHECK(take_step(&c, &o, &r, &error) == 0, "%s", name);
        const Model *m = &c.lab.model;
        CHECK(memcmp(m->params, same.lab.model.params, m->weight_count * sizeof(real)) == 0 &&
                  m->step == (uint64_t)step + 1,
              "%s: step %d has the times and noise of its seed and number", name, step + 1);
        int trained = 0;
        for (int i = 0; i < COUNT; i++)
            trained += trains_encoder(&same, i);
        for (int i = 0; i < 3 * COUNT; i++)
            if (i % 3 == 2 || trains_encoder(&same, i / 3)) {
                const double bits = terms[i / 3][i % 3] / ((i % 3 == 2 ? COUNT : trained) * D * log(2));
                mean[i % 3] += bits, mean[3] += bits;
            }
        const double got[4] = {r.recon, r.latent, r.diffusion, r.total};
        for (int i = 0; i < 4; i++)
            worst = worse(worst, got[i], mean[i], 1e-12 * mean[i]);
        CHECK(worst <= 1 && r.gradient_norm == norm, "%s: the report is off by %.3g", name, worst);
    }
    lab_free(&c.lab), lab_free(&same.lab);
}

/* Dropout does not depend on the threads, and a given batch has none, behind a training step either. */
static void test_dropout(void) {
    static const int threads[3] = {1, 4, 1};
    const Optimizer o = optimizer_default();
    Case c[3];   /* with dropout, twice, and without */
    Error error;
    Example example[COUNT];
    StepReport r[3];
    real noise[2 * COUNT * D];
    double terms[COUNT][3], total = 0;
    for (int i = 0; i < 3; i++) {
        case_new(&c[i], "diffenc-1-1", 0, i < 2 ? 0.3 : 0, SCHEDULE_FIXED, threads[i]);
        CHECK(take_step(&c[i], &o, &r[i], &error) == 0, "a step, dropout %d", i);
    }
    const size_t bytes = c[0].lab.model.weight_count * sizeof(real);
    CHECK(memcmp(c[0].lab.model.params, c[1].lab.model.params, bytes) == 0, "4 threads drop out what 1 does");
    fill_weights(&c[0].lab.model);   /* as they were before the step */
    examples_of_step(&c[0], 0, example, noise);
    batch_gradient(&c[0].lab.workers, example, COUNT, terms);
    for (int i = 0; i < COUNT; i++)
        total += terms[i][2] / (COUNT * D * log(2));
    CHECK(fabs(total - r[2].diffusion) <= 1e-12 * total, "a given batch loses nothing");
    CHECK(fabs(total - r[0].diffusion) > 1e-6 * total, "a training step does");
    for (int i = 0; i < 3; i++)
        lab_free(&c[i].lab);
}

/* A weight that is no number makes a loss that is none: the model stays as it was, and the line tells. */
static void test_divergence(const char *weight, const char *loss) {
    Case c;
    const Optimizer o = optimizer_default();
    Error error = {""};
    StepReport r;
    case_new(&c, "diffenc-1-1", 0, 0, SCHEDULE_FIXED, 2);
    Model *m = &c.lab.model;
    m->step = 6;
    m->params[parameter_named(m, weight)->offset] = (real)NAN;
    const size_t bytes = m->weight_count * sizeof(real);
    real *before = memcpy(allocate(1, bytes), m->params, bytes);
    CHECK(take_step(&c, &o, &r, &error) == -1, "%s is no number and the step is taken", weight);
    CHECK(strstr(error.text, "step 7: diverged") && strstr(error.text, loss), "it says '%s'", error.text);
    CHECK(memcmp(before, m->params, bytes) == 0 && m->step == 6 &&
          dot(m->adam_m, m->adam_m, m->weight_count) == 0, "%s: the model stays as it was", weight);
    free(before), lab_free(&c.lab);
}

/* ---- the bound on a data set ---- */

/* ||sigma_t^2 x^ - dx_t/dlambda|| / ||dx_t/dlambda||, value by value. */
static double error_by_hand(const Method *m, Tensor *x, Tensor *eps, double t) {
    const Encoded e = encode(m, x, t, 1);
    Tensor *gamma_t = gamma_at(m, t), *exact = exact_counterterm(m, e, gamma_t);
    const Tensor *x_hat = predict(m, diffuse(e.x_t, gamma_t, eps), t).x_hat;
    double difference = 0, norm = 0;
    for (int i = 0; i < D; i++) {
        const double here = (double)exact->value[i], variance = number_of(sigma_squared(gamma_t));
        difference += pow(variance * (double)x_hat->value[i] - here, 2);
        norm += here * here;
    }
    return sqrt(difference / norm);
}

/* Every image by hand, the draws counted on over images and repetitions, and what is told of each of them;
 * the terms do not change when nothing is told. */
static void test_evaluate(const char *name, int timesteps, int repeats) {
    Case c;
    double terms[COUNT][4], again[COUNT][4], draws[3 * COUNT][DRAW_COLUMNS], worst = 0, worst_error = 0;
    case_new(&c, name, timesteps, 0.3, SCHEDULE_FIXED, 2);
    const double u = random_uniform(random_stream(SEED, RANDOM_EVAL_TIME, 0, 0), 0);
    evaluate(&c.lab.workers, c.images, c.labels, COUNT, repeats, SEED, terms, draws);
    for (int i = 0; i < COUNT; i++) {
        double want[4] = {0};
        for (int repeat = 0; repeat < repeats; repeat++) {
            const Method m = restart(&c, c.lab.model.ema);
            const Example e = {c.images + i * D, evaluation_time(u, repeat * COUNT + i, timesteps),
                               noise_of(&m, RANDOM_EVAL_NOISE, repeat, i)->value,
                               noise_of(&m, RANDOM_EVAL_NOISE_0, repeat, i)->value, c.labels[i]};
            const LossTerms l = objective(&m, e);
            const Tensor *const of[4] = {l.recon, l.latent, l.diffusion, bits_per_dimension(&m, l)};
            for (int k = 0; k < 4; k++)
                want[k] += number_of(of[k]) / repeats / (k < 3 ? D * log(2) : 1);
            const double *draw = draws[repeat * COUNT + i], loss = number_of(of[2]) / (D * log(2));
            worst = worse(worst, draw[DRAW_TIME], e.t, 0);
            worst = worse(worst, draw[DRAW_LAMBDA], 13.3 - 18.3 * e.t, 1e-12);
            worst = worse(worst, draw[DRAW_LOSS], loss, 1e-12 * loss);
            worst = worse(worst, draw[DRAW_LOSS_BY_LAMBDA], loss / 18.3, 1e-12 * loss);
            const double error = draw[DRAW_COUNTERTERM_ERROR];
            if (c.lab.model.config.kind == VDM)
                CHECK(isnan(error), "%s: a counterterm's error of %g", name, error);
            else
                worst_error = worse(worst_error, error,
                                    error_by_hand(&m, scale_pixels(&m, e.k),
                                                  noise_of(&m, RANDOM_EVAL_NOISE, repeat, i), e.t),
                                    4 * EPS * (1 + error));
        }
        for (int k = 0; k < 4; k++)
            worst = worse(worst, terms[i][k], want[k], 1e-12 * fabs(want[k]));
    }
    CHECK(worst <= 1, "%s, T %d, %d draws an image: off by %.3g tolerances", name, timesteps, repeats, worst);
    CHECK(worst_error <= 1, "%s, T %d: the counterterm's error is off by %.3g tolerances", name, timesteps,
          worst_error);
    lab_free(&c.lab);
    case_new(&c, name, timesteps, 0.3, SCHEDULE_FIXED, 5);
    evaluate(&c.lab.workers, c.images, c.labels, COUNT, repeats, SEED, again, NULL);
    CHECK(memcmp(terms, again, sizeof terms) == 0, "%s: 5 threads give the bits of 2", name);
    for (int i = 0; i < COUNT; i++)
        c.labels[i] = (unsigned char)((c.labels[i] + 1) % CLASSES);
    evaluate(&c.lab.workers, c.images, c.labels, COUNT, repeats, SEED, again, NULL);
    for (int i = 0; i < COUNT; i++) /* the encoder alone moves what is lost at t = 0 and 1 */
        for (int k = 0; k < 3; k++)
            CHECK((terms[i][k] == again[i][k]) == (k < 2 && c.lab.model.config.kind != DIFFENC),
                  "%s: the bound on image %d is one given the class, term %d", name, i, k);
    lab_free(&c.lab);
}

static void test_step_distances(void) {
    enum { T = 3 };
    Case c;
    double distance[T * COUNT], worst = 0;
    case_new(&c, "diffenc-1-1", T, 0, SCHEDULE_FIXED, 2);
    step_distances(&c.lab.workers, c.images, c.labels, COUNT, SEED, distance);
    for (int step = 1; step <= T; step++)
        for (int i = 0; i < COUNT; i++) {
            const Method m = restart(&c, c.lab.model.ema);
            m.network->label = c.labels[i];
            Tensor *x = scale_pixels(&m, c.images + i * D);
            Tensor *eps = noise_of(&m, RANDOM_EVAL_STEP_NOISE, step, i);
            const double want = number_of(distance_at(&m, x, eps, (step - 1.0) / T, (double)step / T));
            worst = worse(worst, distance[(step - 1) * COUNT + i], want, 0);
        }
    CHECK(worst == 0, "distances of every step and image");
    lab_free(&c.lab);
}

/* An image and its ink, the sum of its pixels. */
typedef struct { double ink; uint32_t index; } Inked;

/* The times of an evaluation do not go with the order of the images: sorted by ink they have the same bound.
 * With random weights that hardly depends on the ink; after a few steps it does, and times tied to i/N move
 * it by 1.4%, with MNIST by 3.3%. */
static void test_order(const char *where) {
    enum { IMAGES = 2000, STEPS = 150, BATCH = 8 };
    Dataset data;
    Lab lab;
    Error error = {""};
    Optimizer o = optimizer_default();
    StepReport r;
    double mean[2] = {0}, (*terms)[4] = allocate(IMAGES, sizeof *terms);
    Inked *inked = allocate_zeroed(IMAGES, sizeof *inked);
    CHECK(dataset_open(&data, where, SPLIT_TEST, SEED, &error) == 0, "%s", error.text);
    if (error.text[0])
        exit(test_report());
    const size_t size = (size_t)data.height * data.width * data.channels;
    unsigned char *images = allocate(IMAGES, size);
    Config config = small_model("vdm-1", NET_UNET, 4, data.height, data.width, data.channels);
    config.fourier_first = 0, config.dropout = 0;
    lab_new(&lab, config, 2);
    o.learning_rate = 0.01;
    for (int sorted = 0; sorted < 2; sorted++) {
        for (uint32_t i = 0; i < IMAGES; i++) {
            const uint32_t index = sorted ? inked[i].index : i;
            unsigned char *k = images + i * size;
            dataset_image(&data, index, k);
            for (size_t p = 0; p < size && !sorted; p++)
                inked[i].ink += k[p], inked[i].index = i;
        }
        for (int step = 0; step < STEPS && !sorted; step++)
            training_step(&lab.model, &lab.workers, &o, images + step * BATCH * size, NULL, BATCH, SEED, &r,
                          &error);
        evaluate(&lab.workers, images, NULL, IMAGES, 2, SEED, terms, NULL);
        for (int i = 0; i < IMAGES; i++)
            mean[sorted] += terms[i][3] / IMAGES;
        qsort(inked, IMAGES, sizeof *inked, ascending);   /* by its first member */
    }
    const double moved = fabs(mean[1] / mean[0] - 1);
    printf("%s: sorted by ink, the bound moves from %.4f to %.4f, by %.3f%%\n", where, mean[0], mean[1],
           100 * moved);
    CHECK(moved < 0.005, "%s: sorted by ink, the bound moves by %g of itself", where, moved);
    lab_free(&lab), dataset_close(&data), free(images), free(inked), free(terms);
}

/* ---- sampling ---- */

/* The loop by hand, step after step, each with a graph of its own. */
static void test_sample(const char *name, int T, int deterministic, int draw_pixels) {
    Case c;
    unsigned char k[COUNT * D], want[D] = {0};
    case_new(&c, name, 0, 0.3, SCHEDULE_FIXED, 3);
    sample_images(&c.lab.workers, c.labels, COUNT, T, deterministic, SEED, draw_pixels, k, 0, NULL);
    for (int i = 0; i < COUNT; i++) {
        real z[D];
        Method m = restart(&c, c.lab.model.ema);
        m.network->label = c.labels[i];
        memcpy(z, noise_of(&m, RANDOM_SAMPLER, T + 1, i)->value, sizeof z);
        for (int step = T; step >= 1; step--) {
            m = restart(&c, c.lab.model.ema);
            Tensor *z_t = constant(m.graph, HEIGHT, WIDTH, 1, z);
            const double before = (step - 1.0) / T, t = (double)step / T;
            z_t = deterministic ? deterministic_step(&m, z_t, predict(&m, z_t, t).x_hat, before, t)
                                : ancestral_step(&m, z_t, before, t, noise_of(&m, RANDOM_SAMPLER, step, i));
            memcpy(z, z_t->value, sizeof z);
            const RandomStream pixels = random_stream(SEED, RANDOM_PIXELS, 0, (uint32_t)i);
            decode_pixels(&m, z_t, draw_pixels ? &pixels : NULL, want);   /* the last one counts */
        }
        CHECK(memcmp(want, k + i * D, D) == 0, "%s, %d steps: image %d by hand", name, T, i);
    }
    lab_free(&c.lab);
}

/* Once the flag is set no work begins: nothing is written. */
static void test_stop(void) {
    Case c;
    unsigned char k[COUNT * D] = {0};
    const volatile sig_atomic_t stop = 1;
    case_new(&c, "vdm-1", 0, 0, SCHEDULE_FIXED, 2);
    c.lab.workers.stop = &stop;
    const int hours = 1000000;   /* that many steps would take, if it went on */
    sample_images(&c.lab.workers, c.labels, COUNT, hours, 0, SEED, 0, k, 0, NULL);
    for (int i = 0; i < COUNT; i++)
        CHECK(k[i * D] == 0, "a stopped sampler writes image %d", i);
    lab_free(&c.lab);
}

/* Pixels come from the softmax of z_0/alpha_0 and variance exp(gamma_0): the likeliest, or drawn. */
static void test_decode(void) {
    Case c;
    real z[D];
    unsigned char k[D];
    const RandomStream draws = random_stream(SEED, RANDOM_PIXELS, 0, 0);
    int right = 0;
    case_new(&c, "vdm-1", 0, 0, SCHEDULE_FIXED, 1);
    c.lab.model.config.gamma_min = -9;   /* some levels wide */
    fill_normal(z, D, 0, 0, 0.5);
    for (int drawn = 0; drawn < 2; drawn++) {
        const Method m = restart(&c, c.lab.model.params);
        decode_pixels(&m, constant(m.graph, HEIGHT, WIDTH, 1, z), drawn ? &draws : NULL, k);
        for (uint32_t i = 0; i < D; i++) {
            const double u = (double)z[i] * sqrt(1 + exp(-9.0));
            right += k[i] == (drawn ? level_draw(u, exp(9.0), random_uniform(draws, i)) : nearest_level(u));
        }
    }
    CHECK(right == 2 * D, "%d of %d pixels", right, 2 * D);
    lab_free(&c.lab);
}

int main(void) {
    test_example_time();
    test_evaluation_time();
    test_training_step("vdm-1", 0, SCHEDULE_FIXED);
    test_training_step("diffenc-1-1", 0, SCHEDULE_FIXED);
    test_training_step("diffenc-1-1", 0, SCHEDULE_LEARNED);
    test_training_step("diffenc-1-nt", 7, SCHEDULE_FIXED);
    test_dropout();
    test_divergence("score.conv_out.bias", "the diffusion loss is nan");
    test_divergence("encoder.conv_out.bias", "the recon loss is nan");
    test_evaluate("diffenc-1-1", 0, 1);
    test_evaluate("diffenc-1-nt", 0, 3);
    test_evaluate("vdm-1", 5, 2);
    test_step_distances();
    if (!SANITIZED)
        test_order("digits");
    if (!SANITIZED && getenv("MNIST_DIR"))
        test_order(getenv("MNIST_DIR"));
    else
        printf("skipped: MNIST_DIR is not set, or too slow\n");
    test_sample("vdm-1", 4, 0, 0);
    test_sample("vdm-1", 4, 1, 0);
    test_sample("diffenc-1-1", 3, 0, 1);
    test_sample("diffenc-1-1", 3, 1, 1);
    test_stop();
    test_decode();
    return test_report();
}
