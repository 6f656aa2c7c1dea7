/* check.c - `diffenc check`: every gradient and every identity of the method, with the error that was
 * measured.
 *
 * For those who doubt. Each proof below is one function that quotes the equation it is about, computes its
 * two sides in different ways, one of them with the program's own functions, and states the difference as
 * a claim with a limit. The claims are printed one a line. In the double build rounding stays far below
 * every limit; in the float build the same proofs run with limits that float's rounding needs, and those
 * that it makes meaningless are left out.
 *
 * Nothing here is trained: weights are random, those that begin at zero included, because an identity that
 * holds for any network holds for a trained one. */

#include "derivatives.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const double PI = 3.14159265358979323846;

/* ---- claims ---- */

typedef struct { char text[72]; double error, limit; } Claim;

enum { MAX_CLAIMS = 8 };
typedef struct {
    uint64_t seed;
    int variant;               /* of the proof */
    const char *about;         /* what comes before the claims' texts, or NULL */
    Claim claim[MAX_CLAIMS];
    int count;
    char note[400];            /* numbers worth seeing that are not a claim; printed below */
} Report;

static void claim(Report *r, double error, double limit, const char *format, ...) {
    va_list arguments;
    Claim *c = &r->claim[r->count++];
    c->error = error;
    c->limit = limit;
    const int prefix = r->about ? snprintf(c->text, sizeof c->text, "%s: ", r->about) : 0;
    va_start(arguments, format);
    vsnprintf(c->text + prefix, sizeof c->text - (size_t)prefix, format, arguments);
    va_end(arguments);
}

static void note(Report *r, const char *format, ...) {
    const size_t used = strlen(r->note);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(r->note + used, sizeof r->note - used, format, arguments);
    va_end(arguments);
}

static int holds(const Claim *c) { return c->error <= c->limit; }   /* what is not a number does not */

/* A limit that is a matter of rounding: for double, and for float. */
static double rounding(double in_double, double in_float) { return IN_DOUBLE ? in_double : in_float; }

/* In standard errors. A standard normal number lies beyond +-5 once in 1.7 million draws. */
static const double Z_LIMIT = 5;

static double relative_error(double a, double b) { return fabs(a - b) / larger(fabs(b), 1e-300); }

static double value(const Tensor *a) { return (double)a->value[0]; }

/* || a - b || / || b ||; b NULL: the norm of a. */
static double distance(const Tensor *a, const Tensor *b) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < element_count(a); i++) {
        const double bi = b ? (double)b->value[i] : 0;
        difference += pow((double)a->value[i] - bi, 2);
        norm += bi * bi;
    }
    return sqrt(difference) / (b ? larger(sqrt(norm), 1e-300) : 1);
}

/* ---- a small model to look at ---- */

enum { MODELS = 3, MAX_PIXELS = 128 };
static const char *const MODEL_NAME[MODELS] = {"VDM", "DiffEnc-nt", "DiffEnc"};

typedef struct {
    Model model;
    Workers workers;
    Network *network;
    uint64_t seed;
    unsigned char k[MAX_PIXELS];
    real eps[MAX_PIXELS], eps_0[MAX_PIXELS];
    Example example;           /* of the above, at t = 1/2, of a class in the middle */
} Lab;

static Config small_config(ModelKind kind) {
    Config c = config_default();
    c.kind = kind;
    c.score_blocks = 1;
    c.encoder_blocks = kind == DIFFENC;
    c.channels = 8, c.encoder_channels = 4;
    c.height = 4, c.width = 6, c.image_channels = 1;
    c.dropout = 0;
    return c;
}

/* Initial weights plus noise of 0.1, so that nothing is zero; random pixels and noise. */
static void lab_open(Lab *lab, Config config, uint64_t seed) {
    Error error;
    const size_t d = (size_t)config.height * config.width * config.image_channels;
    memset(lab, 0, sizeof *lab);
    if (d > MAX_PIXELS || model_new(&lab->model, &config, seed, &error)) {
        fprintf(stderr, "diffenc: check: %s\n", d > MAX_PIXELS ? "too many pixels" : error.text);
        exit(1);
    }
    real *noise = allocate(lab->model.weight_count, sizeof(real));
    random_normal(random_stream(seed, RANDOM_CHECK, 10, 0), noise, lab->model.weight_count);
    for (size_t i = 0; i < lab->model.weight_count; i++)
        lab->model.params[i] += (real)0.1 * noise[i];
    free(noise);
    workers_new(&lab->workers, &lab->model, 1);
    lab->network = &lab->workers.network[0];
    lab->seed = seed;
    for (size_t i = 0; i < d; i++)
        lab->k[i] = (unsigned char)random_bits(random_stream(seed, RANDOM_CHECK, 11, 0), (uint32_t)i);
    random_normal(random_stream(seed, RANDOM_CHECK, 12, 0), lab->eps, d);
    random_normal(random_stream(seed, RANDOM_CHECK, 13, 0), lab->eps_0, d);
    const Example example = {.k = lab->k, .t = 0.5, .eps = lab->eps, .eps_0 = lab->eps_0,
                             .label = config.classes / 2};
    lab->example = example;
    lab->network->label = example.label;
}

static void lab_close(Lab *lab) {
    workers_free(&lab->workers), model_free(&lab->model);
}

/* A new graph, without dropout. */
static Method lab_begin(Lab *lab) {
    network_restart(lab->network, lab->model.params, NULL);
    return method_begin(lab->network);
}

/* An image, and d. */
static Tensor *image(const Method *m, const real *values) {
    return constant(m->graph, m->config->height, m->config->width, m->config->image_channels, values);
}
static int pixels(const Method *m) {
    return m->config->height * m->config->width * m->config->image_channels;
}

static Tensor *normal_image(const Method *m, const Lab *lab, uint32_t draw) {
    Tensor *eps = image(m, NULL);
    random_normal(random_stream(lab->seed, RANDOM_CHECK, 14, draw), eps->value, element_count(eps));
    return eps;
}

/* The schedule at one t by its definition, in double whatever the build. */
typedef struct { double gamma, alpha, sigma, alpha2, sigma2; } Schedule;

static Schedule schedule_at(const Config *c, double t) {
    const double gamma = c->gamma_min + (c->gamma_max - c->gamma_min) * t;
    const double sigma2 = 1 / (1 + exp(-gamma)), alpha2 = 1 / (1 + exp(gamma));
    const Schedule s = {gamma, sqrt(alpha2), sqrt(sigma2), alpha2, sigma2};
    return s;
}

/* Pairs s < t: the ends of time, long and short steps. */
enum { TIME_PAIRS = 4 };
static const double TIMES[TIME_PAIRS][2] = {{0, 0.25}, {0.3, 0.7}, {0.5, 0.53}, {0.75, 1}};

/* ---- derivatives ---- */

static void claim_derivatives(Report *r, DerivativeErrors e, const char *name) {
    r->about = name;
    claim(r, e.gradient, derivative_limit(), "gradient");
    if (!(e.tangent < 0)) {   /* what is not a number is a claim, too */
        claim(r, e.tangent, derivative_limit(), "tangent");
        claim(r, e.through_tangent, derivative_limit(), "gradient through the tangent");
    }
}

/* Of a function of a model's weights and, if it has any, of leaves. So many points are tried until one is
 * found where no kink is so near that nothing can be measured. */
static DerivativeErrors model_errors(Lab *lab, uint64_t seed, Config config, Subject subject) {
    enum { POINTS = 4 };
    DerivativeErrors e = {0};
    for (uint64_t point = 0; point < POINTS; point++) {
        lab_open(lab, config, seed + 1000 * point);
        subject.network = lab->network, subject.context = &lab->example;
        subject.weight_scale = 0.02, subject.dropout = 0.1;
        e = derivative_errors(&subject, 3, lab->seed);
        lab_close(lab);
        if (e.gradient != INFINITY && e.tangent != INFINITY && e.through_tangent != INFINITY)
            break;
    }
    return e;
}

/* All rows of the table that have the same title as this one, the first of them. */
static void prove_operator(Report *r, Lab *lab) {
    const int first = r->variant;
    const char *title = operator_title(first);
    DerivativeErrors worst = {-1, -1, -1};
    (void)lab;
    if (first > 0 && strcmp(operator_title(first - 1), title) == 0)
        return;
    for (int i = first; i < operator_count() && strcmp(operator_title(i), title) == 0; i++) {
        const Subject s = operator_subject(i);
        const DerivativeErrors e = derivative_errors(&s, 16, r->seed + (uint64_t)i);
        worst.gradient = larger(e.gradient, worst.gradient);
        worst.tangent = larger(e.tangent, worst.tangent);
        worst.through_tangent = larger(e.through_tangent, worst.through_tangent);
    }
    claim_derivatives(r, worst, title);
}

static Tensor *build_score(const Subject *s, Graph *graph, Tensor **leaf) {
    (void)graph;
    return score_network(s->network, leaf[0], leaf[1]);
}

static Tensor *build_encoder(const Subject *s, Graph *graph, Tensor **leaf) {
    (void)graph;
    return encoder_network(s->network, leaf[0], leaf[1], 1);
}

/* The networks as functions of image, time and weights; image and time carry tangents. Every parameter tensor
 * takes part, the embedding of classes too where there are any. sin(2^7 2 pi z) turns by a radian in 1/800,
 * and sin(1000 t) in 1/1000; a pixel's way through max-pooling may change over a short length: that is what
 * the scales say. */
static void prove_network(Report *r, Lab *lab) {
    const char *const names[] = {"score network, flat, 5x7x3", "score network, U-Net of 2 levels, 20x4x1",
                                 "score network, U-Net, 4x6x3", "encoder, U-Net of 2 levels, 20x4x1",
                                 "score network, 3 classes", "encoder, 3 classes"};
    const int variant = r->variant, is_encoder = variant == 3 || variant == 5;
    Config c = small_config(is_encoder ? DIFFENC : VDM);
    if (variant == 0)
        c.height = 5, c.width = 7, c.image_channels = 3, c.channels = 12;
    if (variant == 1)
        c.net = NET_UNET, c.score_blocks = 2, c.channels = 4, c.height = 20, c.width = 4;
    if (variant == 2)
        c.net = NET_UNET, c.score_blocks = 2, c.image_channels = 3;
    if (variant == 3)
        c.encoder_blocks = 2, c.height = 20, c.width = 4;
    if (variant > 3)
        c.classes = 3;
    if (variant % 4 > 0 && !IN_DOUBLE)
        return;   /* between the kinks of max-pooling there is no room for steps as long as float's */
    const Subject subject = {
        .build = is_encoder ? build_encoder : build_score,
        .leaf = {{c.height, c.width, c.image_channels, 1, -1, 1, is_encoder ? 0.02 : 1.0 / 400},
                 {1, 1, 1, 1, 0.2, 0.8, 1.0 / 1000}}};
    claim_derivatives(r, model_errors(lab, r->seed, c, subject), names[variant]);
}

/* dy/dlambda as the loss uses it. */
static Tensor *build_y_dot(const Subject *s, Graph *graph, Tensor **leaf) {
    const Method m = method_begin(s->network);
    (void)graph, (void)leaf;
    return encode(&m, scale_pixels(&m, s->context), 0.6, 1).y_dot;
}

/* encode() where lambda is e more than at a time t, which is then t - e/(gamma_max - gamma_min). */
typedef struct { Lab *lab; double t; int want_y; } AtLambda;

static void encoded_along_lambda(void *context, double e, double *out) {
    const AtLambda *at = context;
    const Method m = lab_begin(at->lab);
    const Encoded encoded = encode(&m, scale_pixels(&m, at->lab->k), at->t - e / value(m.gamma_range), 0);
    for (int i = 0; i < pixels(&m); i++)
        out[i] = (double)(at->want_y ? encoded.y : encoded.x_t)->value[i];
}

/* dy/dlambda or dx_t/dlambda by differences. A new graph; `m` is set to it. */
static Tensor *difference_by_lambda(Lab *lab, double t, int want_y, Method *m) {
    double derivative[MAX_PIXELS], error[MAX_PIXELS];
    AtLambda at = {lab, t, want_y};
    *m = lab_begin(lab);
    const int d = pixels(m);
    differentiate(encoded_along_lambda, &at, (size_t)d, 0.02, derivative, error);
    *m = lab_begin(lab);
    Tensor *result = image(m, NULL);
    for (int i = 0; i < d; i++)
        result->value[i] = (real)derivative[i];
    return result;
}

/* dy/dlambda at fixed x, lambda = -gamma; its gradient with respect to every parameter of the encoder and of
 * the schedule. */
static void prove_y_dot(Report *r, Lab *lab) {
    Config c = small_config(DIFFENC);
    Method m;
    c.schedule = SCHEDULE_LEARNED;
    lab_open(lab, c, r->seed);
    const Tensor *measured = difference_by_lambda(lab, 0.6, 1, &m);
    const Tensor *y_dot = encode(&m, scale_pixels(&m, lab->k), 0.6, 1).y_dot;
    r->about = "dy/dlambda";
    claim(r, distance(y_dot, measured), derivative_limit(), "against differences in lambda");
    if (IN_DOUBLE) {
        const Subject s = {.build = build_y_dot, .context = lab->k, .network = lab->network,
                           .weight_scale = 0.02};
        const DerivativeErrors e = derivative_errors(&s, 2, lab->seed);
        claim(r, e.gradient, derivative_limit(), "gradient of every parameter");
    }
    lab_close(lab);
}

static Tensor *build_objective(const Subject *s, Graph *graph, Tensor **leaf) {
    const Method m = method_begin(s->network);
    (void)graph, (void)leaf;
    return bits_per_dimension(&m, objective(&m, *(const Example *)s->context));
}

/* The whole training objective by every parameter: each model, prediction, continuous and finite time;
 * schedules fixed (eps) and learned, both networks, dropout on with the same mask in every evaluation. The
 * last two are DiffEnc with classes. */
static void prove_objective(Report *r, Lab *lab) {
    const char *const predictions[] = {"v", "eps", "x"};
    const int variant = r->variant, has_classes = variant >= 18;
    Config c = small_config(has_classes ? DIFFENC : (ModelKind)(variant / 6));
    const Subject subject = {.build = build_objective};
    c.classes = has_classes ? 3 : 0;
    c.prediction = (Prediction)(variant / 2 % 3);
    c.schedule = c.prediction == PREDICT_EPS ? SCHEDULE_FIXED : SCHEDULE_LEARNED;
    c.net = c.prediction == PREDICT_X && IN_DOUBLE ? NET_UNET : NET_FLAT;
    if (variant % 2)
        c.timesteps = 8, c.variance_ratio = 0.8;
    r->about = MODEL_NAME[c.kind];
    claim(r, model_errors(lab, r->seed, c, subject).gradient, derivative_limit(),
          "objective, %s-prediction, %s%s: gradient", predictions[c.prediction],
          c.timesteps ? "finite T" : "continuous", has_classes ? ", 3 classes" : "");
}

/* ---- the forward process ---- */

/* q(z_s | z_t, x) by Bayes' rule: precisions add, means are weighted with them.
 *     1/v = 1/sigma_s^2 + alpha_ts^2/sigma_ts^2
 *     mu = v [alpha_s x_s/sigma_s^2 + alpha_ts (z_t - alpha_t (x_t - x_s))/sigma_ts^2] */
typedef struct { Tensor *mean; double variance; } Gaussian;

static Gaussian bayes(const Method *m, Tensor *x_s, Tensor *x_t, Tensor *z_t, double s, double t) {
    const Schedule at_s = schedule_at(m->config, s), at_t = schedule_at(m->config, t);
    const double alpha_ts = at_t.alpha / at_s.alpha;
    const double sigma_ts2 = at_t.sigma2 - alpha_ts * alpha_ts * at_s.sigma2;
    Gaussian q = {image(m, NULL), 1 / (1 / at_s.sigma2 + alpha_ts * alpha_ts / sigma_ts2)};
    for (int i = 0; i < pixels(m); i++) {
        const double xs = (double)x_s->value[i], xt = (double)x_t->value[i], z = (double)z_t->value[i];
        q.mean->value[i] = (real)(q.variance * (at_s.alpha * xs / at_s.sigma2
                                                + alpha_ts * (z - at_t.alpha * (xt - xs)) / sigma_ts2));
    }
    return q;
}

/* q(z_t|z_s,x) = N(alpha_ts z_s + alpha_t (x_t - x_s), sigma_ts^2) over q(z_s|x) = N(alpha_s x_s, sigma_s^2)
 * gives q(z_t|x) = N(alpha_t x_t, sigma_t^2), with sigma_ts^2 = sigma_t^2 rho of the program:
 *     alpha_ts alpha_s x_s + alpha_t (x_t - x_s) = alpha_t x_t
 *     alpha_ts^2 sigma_s^2 + sigma_ts^2 = sigma_t^2
 * mu_Q = alpha_ts (sigma_s^2/sigma_t^2) z_t + alpha_s rho x_t + alpha_s (x_s - x_t), which is the generative
 * mean at x^ = x_t with the counterterm taken out and the change of x put in;  sigma_Q^2 = sigma_s^2 rho. */
static void prove_forward_process(Report *r, Lab *lab) {
    double mean_error = 0, variance_error = 0, mu_error = 0, sigma_error = 0;
    for (int i = 0; i < TIME_PAIRS; i++) {
        const Method m = lab_begin(lab);
        const double s = TIMES[i][0], t = TIMES[i][1];
        const Schedule at_s = schedule_at(m.config, s), at_t = schedule_at(m.config, t);
        Tensor *x = scale_pixels(&m, lab->k), *x_s = encode(&m, x, s, 0).x_t, *x_t = encode(&m, x, t, 0).x_t;
        Tensor *gamma_s = gamma_at(&m, s), *gamma_t = gamma_at(&m, t), *no_noise = image(&m, NULL);
        const double alpha_ts = at_t.alpha / at_s.alpha, sigma_q2 = value(generative_variance(&m, s, t));
        const double sigma_s2 = value(sigma_squared(gamma_s)), rho = sigma_q2 / sigma_s2;
        Tensor *mean = add(affine(alpha_ts, diffuse(x_s, gamma_s, no_noise), 0),
                           affine(at_t.alpha, sub(x_t, x_s), 0));
        const double variance = alpha_ts * alpha_ts * sigma_s2 + value(sigma_squared(gamma_t)) * rho;
        mean_error = larger(distance(mean, diffuse(x_t, gamma_t, no_noise)), mean_error);
        variance_error = larger(relative_error(variance, at_t.sigma2), variance_error);

        const double counterterm = m.config->kind == VDM ? 0 : (at_t.gamma - at_s.gamma) * at_t.sigma2;
        Tensor *z_t = diffuse(x_t, gamma_t, normal_image(&m, lab, 0));
        Tensor *change = sub(sub(x_s, x_t), affine(counterterm, x_t, 0));
        Tensor *mu_q = add(generative_mean(&m, z_t, x_t, s, t), affine(at_s.alpha, change, 0));
        const Gaussian q = bayes(&m, x_s, x_t, z_t, s, t);
        mu_error = larger(distance(mu_q, q.mean), mu_error);
        sigma_error = larger(relative_error(sigma_q2, q.variance), sigma_error);
    }
    claim(r, mean_error, rounding(1e-13, 1e-5), "q(z_t|z_s,x) over q(z_s|x) is q(z_t|x): mean");
    claim(r, variance_error, rounding(1e-13, 1e-5), "q(z_t|z_s,x) over q(z_s|x) is q(z_t|x): variance");
    claim(r, mu_error, rounding(1e-12, 1e-4), "q(z_s|z_t,x) by Bayes' rule: mu_Q");
    claim(r, sigma_error, rounding(1e-12, 1e-4), "q(z_s|z_t,x) by Bayes' rule: sigma_Q^2");
}

/* z_t = alpha_t x_t + sigma_t eps has mean alpha_t x_t, variance sigma_t^2, and independent pixels: z-scores
 * over many draws of u = (z_t - alpha_t x_t)/sigma_t, its square, and the product of neighbours. */
static void prove_moments(Report *r, Lab *lab) {
    enum { DRAWS = 1000 };
    const double t = 0.7;
    double sum = 0, squares = 0, products = 0, n = 0;
    for (int draw = 0; draw < DRAWS; draw++) {
        const Method m = lab_begin(lab);
        const Schedule at = schedule_at(m.config, t);
        Tensor *x_t = encode(&m, scale_pixels(&m, lab->k), t, 0).x_t;
        const Tensor *z = diffuse(x_t, gamma_at(&m, t), normal_image(&m, lab, (uint32_t)draw));
        double before = 0;
        for (int i = 0; i < pixels(&m); i++) {
            const double u = ((double)z->value[i] - at.alpha * (double)x_t->value[i]) / at.sigma;
            sum += u, squares += u * u - 1, products += u * before, n += 1;
            before = u;
        }
    }
    claim(r, fabs(sum) / sqrt(n), Z_LIMIT, "mean of diffuse(), standard errors");
    claim(r, fabs(squares) / sqrt(2 * n), Z_LIMIT, "variance of diffuse(), standard errors");
    claim(r, fabs(products) / sqrt(n), Z_LIMIT, "covariance of pixels, standard errors");
}

/* ---- the loss ---- */

/* Everything about one step t -> s of a random model. */
typedef struct { Encoded at_s, at_t; Tensor *z_t, *eps, *gamma_t; Predicted p; } Step;

static Step step_at(const Method *m, const Lab *lab, double s, double t) {
    Step step = {.eps = image(m, lab->eps), .gamma_t = gamma_at(m, t)};
    Tensor *x = scale_pixels(m, lab->k);
    step.at_s = encode(m, x, s, 0);
    step.at_t = encode(m, x, t, m->config->kind == DIFFENC);
    step.z_t = diffuse(step.at_t.x_t, step.gamma_t, step.eps);
    step.p = predict(m, step.z_t, t);
    return step;
}

/* mu_P - mu_Q in its two forms, and the KL of two Gaussians:
 *     ||mu_P - mu_Q||^2/sigma_Q^2 of step_distance() against generative_mean() minus Bayes' rule
 *     d/2 (w - 1 - log w) + w/2 ||mu_P - mu_Q||^2/sigma_Q^2
 *         = d/2 (v_Q/v_P - 1 - log(v_Q/v_P)) + ||mu_P - mu_Q||^2/(2 v_P) */
static void prove_step_kl(Report *r, Lab *lab) {
    double distance_error = 0, kl_error = 0;
    lab->model.config.variance_ratio = 0.7;
    for (int i = 0; i < TIME_PAIRS; i++) {
        const Method m = lab_begin(lab);
        const double s = TIMES[i][0], t = TIMES[i][1], d = pixels(&m);
        const Step step = step_at(&m, lab, s, t);
        const Gaussian q = bayes(&m, step.at_s.x_t, step.at_t.x_t, step.z_t, s, t);
        Tensor *mu_p = generative_mean(&m, step.z_t, step.p.x_hat, s, t);
        Tensor *ours = step_distance(&m, step.at_s, step.at_t, step.p, s, t);
        const double square = value(squared_norm(sub(mu_p, q.mean)));
        const double p_variance = value(generative_variance(&m, s, t)), ratio = q.variance / p_variance;
        const double kl = d / 2 * (ratio - 1 - log(ratio)) + square / (2 * p_variance);
        distance_error = larger(relative_error(value(ours), square / q.variance), distance_error);
        kl_error = larger(relative_error(value(step_kl(&m, ours, m.config->variance_ratio)), kl), kl_error);
    }
    claim(r, distance_error, rounding(1e-10, 1e-2), "the two forms of ||mu_P - mu_Q||^2/sigma_Q^2");
    claim(r, kl_error, rounding(1e-10, 1e-2), "step KL is the KL of two Gaussians, w = 0.7");
}

/* The same KL as the mean of log q(z_s) - log p(z_s) over draws of z_s = mu_Q + sigma_Q u. */
static void prove_step_kl_by_draws(Report *r, Lab *lab) {
    enum { DRAWS = 20000 };
    const double s = 0.4, t = 0.5;
    double sum = 0, squares = 0;
    lab->model.config.variance_ratio = 0.7;
    const Method m = lab_begin(lab);
    const Step step = step_at(&m, lab, s, t);
    const Gaussian q = bayes(&m, step.at_s.x_t, step.at_t.x_t, step.z_t, s, t);
    const Tensor *mu_p = generative_mean(&m, step.z_t, step.p.x_hat, s, t);
    Tensor *ours = step_distance(&m, step.at_s, step.at_t, step.p, s, t);
    const double kl = value(step_kl(&m, ours, m.config->variance_ratio));
    const double p_variance = value(generative_variance(&m, s, t));
    real u[MAX_PIXELS];
    for (int draw = 0; draw < DRAWS; draw++) {
        double log_ratio = pixels(&m) / 2.0 * log(p_variance / q.variance);
        random_normal(random_stream(lab->seed, RANDOM_CHECK, 15, (uint32_t)draw), u, (size_t)pixels(&m));
        for (int i = 0; i < pixels(&m); i++) {
            const double z_s = (double)q.mean->value[i] + sqrt(q.variance) * (double)u[i];
            log_ratio += pow(z_s - (double)mu_p->value[i], 2) / (2 * p_variance) - pow((double)u[i], 2) / 2;
        }
        sum += log_ratio - kl, squares += pow(log_ratio - kl, 2);
    }
    claim(r, fabs(sum) / sqrt(squares), Z_LIMIT, "step KL is the mean of log q/p, standard errors");
}

/* For the same x^ the three predictions are the same model:
 *     v^ = (alpha z - x^)/sigma,  eps^ = (z - alpha x^)/sigma
 * Their residuals and weights must give the same L. */
static void prove_predictions(Report *r, Lab *lab) {
    double loss[3], x_error = 0;
    for (int prediction = 0; prediction < 3; prediction++) {
        lab->model.config.prediction = PREDICT_V;
        const Method m = lab_begin(lab);
        const Schedule at = schedule_at(m.config, 0.5);
        const Step step = step_at(&m, lab, 0.4, 0.5);
        Tensor *x_hat = step.p.x_hat, *output[3];
        output[PREDICT_V] = affine(1 / at.sigma, sub(affine(at.alpha, step.z_t, 0), x_hat), 0);
        output[PREDICT_EPS] = affine(1 / at.sigma, sub(step.z_t, affine(at.alpha, x_hat, 0)), 0);
        output[PREDICT_X] = x_hat;
        lab->model.config.prediction = (Prediction)prediction;
        Predicted p = {.output = output[prediction]};
        p.x_hat = x_from_output(&m, p.output, step.z_t, step.gamma_t);
        x_error = larger(distance(p.x_hat, x_hat), x_error);
        Tensor *residual = continuous_residual(&m, step.at_t, p, step.gamma_t, step.eps);
        loss[prediction] = value(continuous_loss(&m, residual, step.gamma_t));
    }
    const double loss_error = larger(relative_error(loss[1], loss[0]), relative_error(loss[2], loss[0]));
    claim(r, x_error, rounding(1e-12, 1e-4), "x^ from v^, eps^ and x^ is the same");
    claim(r, loss_error, rounding(1e-11, 1e-3), "L is the same for v-, eps- and x-prediction");
}

/* The other form of r with v-prediction:
 *     VDM  v - v^;   nt  (1 + sigma^2)(v - v^);   DiffEnc  (1 + sigma^2)(v - v^) + sigma (y - dy/dlambda) */
static void prove_residual(Report *r, Lab *lab) {
    const Method m = lab_begin(lab);
    const Schedule at = schedule_at(m.config, 0.6);
    const Step step = step_at(&m, lab, 0.5, 0.6);
    Tensor *v = sub(affine(at.alpha, step.eps, 0), affine(at.sigma, step.at_t.x_t, 0));
    Tensor *other = affine(m.config->kind == VDM ? 1 : 1 + at.sigma2, sub(v, step.p.output), 0);
    if (m.config->kind == DIFFENC)
        other = add(other, affine(at.sigma, sub(step.at_t.y, step.at_t.y_dot), 0));
    const Tensor *ours = continuous_residual(&m, step.at_t, step.p, step.gamma_t, step.eps);
    claim(r, distance(ours, other), rounding(1e-12, 1e-4), "the two forms of r");
}

/* The kernel of the encoder's conv_out; its bias is the parameter after it. */
static const Parameter *last_layer(const Model *m) {
    const Parameter *p = m->parameter;
    while (strcmp(p->name, "encoder.conv_out.kernel") != 0)
        p++;
    return p;
}

/* DiffEnc with y = 0 is DiffEnc-nt, in every term of the objective, with the same score network. */
static void prove_zero_encoder(Report *r, Lab *with) {
    Lab without;
    lab_open(&without, small_config(DIFFENC_NT), r->seed);
    const Parameter *last = last_layer(&with->model);
    memset(with->model.params + last->offset, 0, (last[0].count + last[1].count) * sizeof(real));
    memcpy(without.model.params, with->model.params, without.model.weight_count * sizeof(real));
    for (int finite = 0; finite < 2; finite++) {
        with->model.config.timesteps = without.model.config.timesteps = finite ? 8 : 0;
        const Method a = lab_begin(with), b = lab_begin(&without);
        const LossTerms ours = objective(&a, with->example), other = objective(&b, without.example);
        double error = relative_error(value(ours.recon), value(other.recon));
        error = larger(relative_error(value(ours.latent), value(other.latent)), error);
        error = larger(relative_error(value(ours.diffusion), value(other.diffusion)), error);
        claim(r, error, rounding(1e-13, 1e-5), "DiffEnc with y = 0 is DiffEnc-nt, %s",
              finite ? "finite T" : "continuous");
    }
    lab_close(&without);
}

/* DiffEnc with y = x has VDM's forward process:  alpha_t^2 x + sigma_t^2 x = x.  The encoder is made to
 * return a constant, and x is an image of that constant. */
static void prove_identity_encoder(Report *r, Lab *lab) {
    const unsigned char level = 77;
    double error = 0;
    memset(lab->k, level, sizeof lab->k);
    const Parameter *last = last_layer(&lab->model);
    memset(lab->model.params + last->offset, 0, last->count * sizeof(real));
    lab->model.params[last[1].offset] = (real)atanh(2 * (level + 0.5) / 256 - 1);
    for (int i = 0; i <= 10; i++) {
        const Method m = lab_begin(lab);
        Tensor *x = scale_pixels(&m, lab->k), *gamma = gamma_at(&m, i / 10.0), *eps = image(&m, lab->eps);
        const Encoded e = encode(&m, x, i / 10.0, 1);
        error = larger(larger(distance(e.x_t, x), distance(e.y_dot, NULL)), error);
        error = larger(distance(diffuse(e.x_t, gamma, eps), diffuse(x, gamma, eps)), error);
    }
    claim(r, error, rounding(1e-13, 1e-5), "DiffEnc with y = x has VDM's forward process, x_t = x");
}

/* -log p(k | z_0) as a softmax over the 256 levels written out, and KL(q(z_1|x) || N(0,1)) as the KL of
 * Gaussians. */
static void prove_other_terms(Report *r, Lab *lab) {
    double recon = 0, latent = 0;
    const Method m = lab_begin(lab);
    const LossTerms terms = objective(&m, lab->example);
    const Schedule at_0 = schedule_at(m.config, 0), at_1 = schedule_at(m.config, 1);
    Tensor *x = scale_pixels(&m, lab->k), *x_0 = encode(&m, x, 0, 0).x_t, *x_1 = encode(&m, x, 1, 0).x_t;
    for (int i = 0; i < pixels(&m); i++) {
        const double z_0 = at_0.alpha * (double)x_0->value[i] + at_0.sigma * (double)lab->eps_0[i];
        double logit[256], sum = 0;
        for (int c = 0; c < 256; c++)
            logit[c] = -pow(z_0 / at_0.alpha - ((2 * c + 1) / 256.0 - 1), 2) / (2 * exp(at_0.gamma));
        for (int c = 0; c < 256; c++)
            sum += exp(logit[c] - logit[lab->k[i]]);
        recon += log(sum);
        latent += 0.5 * (at_1.sigma2 + pow(at_1.alpha * (double)x_1->value[i], 2) - 1 - log(at_1.sigma2));
    }
    const double d = pixels(&m);
    claim(r, fabs(value(terms.recon) - recon) / d, rounding(1e-10, 1e-3),
          "recon is -log softmax written out, nats a pixel");
    claim(r, fabs(value(terms.latent) - latent) / d, rounding(1e-14, 1e-7),
          "latent is KL(q(z_1|x) || N(0,1)), nats a pixel");
}

/* The slope of log |y| over log x by least squares. */
static double order_of(const double *x, const double *y, int count) {
    double sx = 0, sy = 0, sxx = 0, sxy = 0;
    for (int i = 0; i < count; i++) {
        const double a = log(x[i]), b = log(fabs(y[i]));
        sx += a, sy += b, sxx += a * a, sxy += a * b;
    }
    return (count * sxy - sx * sy) / (count * sxx - sx * sx);
}

static double diffusion_term(Lab *lab, int timesteps, double dropout) {
    lab->model.config.timesteps = timesteps;
    const Method m = lab_begin(lab);
    m.graph->dropout = dropout;
    m.graph->dropout_stream = random_stream(lab->seed, RANDOM_DROPOUT, 0, 0);
    return value(objective(&m, lab->example).diffusion);
}

/* T KL(t - 1/T, t) -> L_inf(t) with a difference of order 1/T, for the training objective itself, with
 * dropout. Where there is an encoder, a step must be short against the fastest wave of the time embedding,
 * sin(1000 t). Terms of order 1/T^2 bend the line by less than the limit. */
static void prove_limit(Report *r, Lab *lab) {
    enum { COUNT = 5 };
    const int trained = lab->model.config.kind == DIFFENC;
    const int first = trained ? 1 << 16 : IN_DOUBLE ? 1 << 11 : 1 << 7;
    double T[COUNT], excess[COUNT];
    if (trained && !IN_DOUBLE)
        return;   /* x_s - x_t is below float's resolution there */
    const double limit = diffusion_term(lab, 0, 0.1);
    for (int i = 0; i < COUNT; i++) {
        T[i] = first << i;
        excess[i] = diffusion_term(lab, first << i, 0.1) - limit;
    }
    claim(r, fabs(-order_of(T, excess, COUNT) - 1), rounding(0.02, 0.2),
          "T KL_T goes to L_inf like 1/T: |order - 1|");
    note(r, "T = %g: (T KL_T - L_inf)/L_inf = %.2e", T[COUNT - 1], excess[COUNT - 1] / limit);
}

/* w* = 1/(1 + D/d), D = ||mu_P - mu_Q||^2/sigma_Q^2, makes the step KL least; then KL* = -(d/2) log w*. */
static void prove_best_variance(Report *r, Lab *lab) {
    const Method m = lab_begin(lab);
    const Step step = step_at(&m, lab, 0.4, 0.5);
    Tensor *D = step_distance(&m, step.at_s, step.at_t, step.p, 0.4, 0.5);
    const double d = pixels(&m), w = 1 / (1 + value(D) / d), best = -d / 2 * log(w);
    double least = INFINITY, at = 0;
    for (int i = -400; i <= 400; i++) {   /* in steps of 1/400 of log w */
        const double kl = value(step_kl(&m, D, w * exp(i / 400.0)));
        if (kl < least)
            least = kl, at = i / 400.0;
    }
    claim(r, fabs(at), rounding(0, 0.01), "no w of a scan is better than w*: |log w/w*|");
    claim(r, relative_error(value(step_kl(&m, D, w)), best), rounding(1e-12, 1e-4),
          "KL at w* is -(d/2) log w*");
}

/* Any other w adds T d/2 (w - 1 - log w): the bound at w = 1.3 grows with T by that slope; what is left of
 * the other terms is of order 1/T^2. */
static void prove_divergence(Report *r, Lab *lab) {
    const double w = 1.3;
    const int T = 1 << 12;
    lab->model.config.variance_ratio = w;
    const double d = lab->model.config.height * lab->model.config.width;
    const double slope = (diffusion_term(lab, 2 * T, 0) - diffusion_term(lab, T, 0)) / T;
    claim(r, relative_error(slope, d / 2 * (w - 1 - log(w))), 1e-3,
          "w = 1.3: the bound grows by d/2 (w - 1 - log w) a step");
}

/* One ancestral step is generative_mean() + sqrt(generative_variance()) eps at the network's x^; and the
 * pixels of a noiseless z_0 = alpha_0 x come back. */
static void prove_sampler(Report *r, Lab *lab) {
    unsigned char k[MAX_PIXELS];
    int wrong = 0;
    lab->model.config.variance_ratio = 0.7;
    const Method m = lab_begin(lab);
    Tensor *z_t = normal_image(&m, lab, 1), *eps = image(&m, lab->eps);
    Tensor *mean = generative_mean(&m, z_t, predict(&m, z_t, 0.5).x_hat, 0.4, 0.5);
    const double deviation = sqrt(value(generative_variance(&m, 0.4, 0.5)));
    claim(r, distance(ancestral_step(&m, z_t, 0.4, 0.5, eps), add(mean, affine(deviation, eps, 0))),
          rounding(1e-13, 1e-5), "an ancestral step is mu_P + sigma_P eps");
    decode_pixels(&m, affine(schedule_at(m.config, 0).alpha, scale_pixels(&m, lab->k), 0), NULL, k);
    for (int i = 0; i < pixels(&m); i++)
        wrong += k[i] != lab->k[i];
    claim(r, wrong, 0, "pixels decoded from alpha_0 x are those of x");
}

/* ---- exactness ---- */

/* Data whose every pixel is N(m, s^2): then x, x_t, y and z_t are jointly Gaussian as long as the encoder
 * is affine in x, the best network E[. | z_t] is known, and so is the entropy of the data, which no bound
 * can go below. The program's own loss functions, given that network's answer, must come to it.
 *
 * Expectations need no draws: losses are quadratic in x and eps, and for those the two points m +- s and
 * +-1 with equal weights are exact. The image has 2x2 pixels, one for each combination: its loss is four
 * times the expectation. */
static const double DATA_MEAN = 0.2, DATA_DEVIATION = 0.6;
enum { EXACT_PIXELS = 4 };

/* x_t = a x + b, y = p x + q, dy/dlambda = p_dot x + q_dot; p and q both change with lambda. */
typedef struct { double a, b, p, q, p_dot, q_dot; } AffineEncoder;

static AffineEncoder affine_encoder(ModelKind kind, Schedule at) {
    const double lambda = -at.gamma;
    AffineEncoder e = {.a = kind == VDM ? 1 : at.alpha2};
    if (kind == DIFFENC) {
        e.p = 0.5 + 0.4 * sin(lambda / 4), e.p_dot = 0.1 * cos(lambda / 4);
        e.q = 0.3 * cos(lambda / 3), e.q_dot = -0.1 * sin(lambda / 3);
        e.a += at.sigma2 * e.p, e.b = at.sigma2 * e.q;
    }
    return e;
}

/* The same for graph tensors; VDM and nt by the program's encode(). */
static Encoded encode_affine(const Method *m, Tensor *x, double t) {
    const AffineEncoder a = affine_encoder(m->config->kind, schedule_at(m->config, t));
    Tensor *gamma = gamma_at(m, t);
    if (m->config->kind != DIFFENC)
        return encode(m, x, t, 0);
    Encoded e = {NULL, affine(a.p, x, a.q), affine(a.p_dot, x, a.q_dot)};
    e.x_t = add(mul(alpha_squared(gamma), x), mul(sigma_squared(gamma), e.y));
    return e;
}

/* Var[x | z_t] for z_t = alpha (a x + b) + sigma eps. */
static double variance_given_z(ModelKind kind, Schedule at) {
    const double gain = at.alpha * affine_encoder(kind, at).a, s2 = DATA_DEVIATION * DATA_DEVIATION;
    return s2 * at.sigma2 / (gain * gain * s2 + at.sigma2);
}

/* The answer of the best network: x^ = c E[x | z_t] + offset, where E[x | z_t] = m + gain (z_t - E z_t). */
static Predicted best_prediction(const Method *m, Tensor *z_t, double t, double c, double offset) {
    const Schedule at = schedule_at(m->config, t);
    const AffineEncoder e = affine_encoder(m->config->kind, at);
    const double gain = variance_given_z(m->config->kind, at) * at.alpha * e.a / at.sigma2;
    Tensor *x = affine(gain, z_t, DATA_MEAN - gain * at.alpha * (e.a * DATA_MEAN + e.b));
    Predicted p = {.x_hat = affine(c, x, offset)};
    p.output = affine(1 / at.sigma, sub(affine(at.alpha, z_t, 0), p.x_hat), 0);   /* v^ */
    return p;
}

/* What x^ should be the expectation of, as c x + offset.
 *     continuous time: r = 0 for  x^ = x_t - sigma^2/(1 + sigma^2) (y - dy/dlambda);   VDM: x
 *     a step: mu_P = mu_Q for  x^ = (rho x_t + x_s - x_t)/weight,
 *             weight = rho + (lambda_s - lambda_t) sigma_t^2;   VDM: x, weight = rho */
typedef struct { double c, offset, weight; } Target;

static Target continuous_target(ModelKind kind, Schedule at) {
    const AffineEncoder e = affine_encoder(kind, at);
    const double share = at.sigma2 / (1 + at.sigma2);
    const Target target = {e.a - share * (e.p - e.p_dot), e.b - share * (e.q - e.q_dot), 0};
    return target;
}

static Target step_target(ModelKind kind, Schedule at_s, Schedule at_t) {
    const AffineEncoder s = affine_encoder(kind, at_s), t = affine_encoder(kind, at_t);
    const double rho = -expm1(at_s.gamma - at_t.gamma);
    const double weight = rho + (kind == VDM ? 0 : (at_t.gamma - at_s.gamma) * at_t.sigma2);
    const Target target = {(rho * t.a + s.a - t.a) / weight, (rho * t.b + s.b - t.b) / weight, weight};
    return target;
}

/* The image whose pixels are the four combinations of the two points of x and of eps. */
static Tensor *exact_x(const Method *m) {
    const real low = (real)(DATA_MEAN - DATA_DEVIATION), high = (real)(DATA_MEAN + DATA_DEVIATION);
    const real x[EXACT_PIXELS] = {low, high, low, high};
    return image(m, x);
}
static Tensor *exact_eps(const Method *m) {
    const real eps[EXACT_PIXELS] = {-1, -1, 1, 1};
    return image(m, eps);
}

static double entropy_of_normal(double variance) { return log(2 * PI * exp(1) * variance) / 2; }

/* Everything except diffusion, minus what no bound can avoid: the entropy of the data, and what N(0,1) misses
 * of the true q(z_1) = N(alpha_1 (a m + b), alpha_1^2 a^2 s^2 + sigma_1^2). The decoder is the best one,
 * q(x | z_0) itself, so that recon is its entropy. Nats a pixel, as everything below. */
static double ends_minus_floor(Lab *lab) {
    const Method m = lab_begin(lab);
    const Schedule at_0 = schedule_at(m.config, 0), at_1 = schedule_at(m.config, 1);
    const AffineEncoder e = affine_encoder(m.config->kind, at_1);
    const double mean = at_1.alpha * (e.a * DATA_MEAN + e.b);
    const double variance = pow(at_1.alpha * e.a * DATA_DEVIATION, 2) + at_1.sigma2;
    const double recon = entropy_of_normal(variance_given_z(m.config->kind, at_0));
    const double latent = value(latent_loss(&m, encode_affine(&m, exact_x(&m), 1).x_t)) / EXACT_PIXELS;
    return recon + latent - entropy_of_normal(DATA_DEVIATION * DATA_DEVIATION)
         - (variance + mean * mean - 1 - log(variance)) / 2;
}

/* E L_inf(t) */
static double best_continuous_loss(Lab *lab, double t) {
    const Method m = lab_begin(lab);
    const Target target = continuous_target(m.config->kind, schedule_at(m.config, t));
    const Encoded e = encode_affine(&m, exact_x(&m), t);
    Tensor *gamma = gamma_at(&m, t), *eps = exact_eps(&m);
    const Predicted p = best_prediction(&m, diffuse(e.x_t, gamma, eps), t, target.c, target.offset);
    return value(continuous_loss(&m, continuous_residual(&m, e, p, gamma, eps), gamma)) / EXACT_PIXELS;
}

/* The sum of E KL over the T steps, each with its best variance or with w = 1. */
static double best_finite_loss(Lab *lab, int T, int best_variance) {
    double sum = 0;
    for (int i = 1; i <= T; i++) {
        const Method m = lab_begin(lab);
        const double s = (i - 1.0) / T, t = (double)i / T;
        const Target target = step_target(m.config->kind, schedule_at(m.config, s), schedule_at(m.config, t));
        const Encoded e_s = encode_affine(&m, exact_x(&m), s), e_t = encode_affine(&m, exact_x(&m), t);
        Tensor *z_t = diffuse(e_t.x_t, gamma_at(&m, t), exact_eps(&m));
        const Predicted p = best_prediction(&m, z_t, t, target.c, target.offset);
        Tensor *D = step_distance(&m, e_s, e_t, p, s, t);
        sum += value(step_kl(&m, D, best_variance ? 1 / (1 + value(D) / EXACT_PIXELS) : 1)) / EXACT_PIXELS;
    }
    return sum;
}

/* What the best x^ has to leave undone, in closed form. The model sees z_t alone; the true reverse process
 * is q(z_s | z_t and everything noisier). For VDM that is the same, because its z_t, made from z_s, adds
 * nothing about x. An encoder lets x act again on the way from z_s to z_t, so there the noisier z do tell
 * more than z_t. Let V be the variance of x given all of z_t .. z_1, U the variance given z_t alone, and
 * g = alpha_s weight c the factor by which mu_Q depends on x. A step reveals
 *     1/V_s = 1/V_t + g^2/sigma_Q^2
 * and p(z_s|z_t) with the variance sigma_Q^2/w then misses
 *     1/2 [w (1 + U g^2/sigma_Q^2) - 1 - log(w (1 + V g^2/sigma_Q^2))],    best w = 1/(1 + U g^2/sigma_Q^2)
 * and the decoder, which sees z_0 alone, log(U/V)/2. */
static double missed_by_steps(const Config *c, int T, int best_variance) {
    double V = variance_given_z(c->kind, schedule_at(c, 1)), missed = 0;
    for (int i = T; i >= 1; i--) {
        const Schedule at_s = schedule_at(c, (i - 1.0) / T), at_t = schedule_at(c, (double)i / T);
        const Target target = step_target(c->kind, at_s, at_t);
        const double sigma_q2 = at_s.sigma2 * -expm1(at_s.gamma - at_t.gamma);
        const double revealed = at_s.alpha2 * pow(target.weight * target.c, 2) / sigma_q2;
        const double U = variance_given_z(c->kind, at_t), w = best_variance ? 1 / (1 + revealed * U) : 1;
        missed += (w * (1 + revealed * U) - 1 - log(w) - log1p(revealed * V)) / 2;
        V = 1 / (1 / V + revealed);
    }
    return missed + log(variance_given_z(c->kind, schedule_at(c, 0)) / V) / 2;
}

/* Weights of Simpson's rule on [0, 1]; good to 1e-12 for what is integrated here. */
enum { INTERVALS = 4096 };
static double simpson(int i) { return (i == 0 || i == INTERVALS ? 1 : i % 2 ? 4 : 2) / (3.0 * INTERVALS); }

/* The limit T -> infinity of the same. The sum becomes an integral over t, in which a step reveals
 * gamma' SNR (1 + sigma_t^2)^2 c^2 (VDM: gamma' SNR) per unit, and what V contributes cancels. 0 for VDM. */
static double missed_in_continuous_time(const Config *c) {
    double integral = 0;
    for (int i = 0; i <= INTERVALS; i++) {
        const Schedule at = schedule_at(c, (double)i / INTERVALS);
        const double factor = c->kind == VDM ? 1 : (1 + at.sigma2) * continuous_target(c->kind, at).c;
        const double revealed = (c->gamma_max - c->gamma_min) * exp(-at.gamma) * factor * factor;
        integral += simpson(i) * revealed * variance_given_z(c->kind, at);
    }
    const double U_0 = variance_given_z(c->kind, schedule_at(c, 0));
    return (integral - log(variance_given_z(c->kind, schedule_at(c, 1)) / U_0)) / 2;
}

/* bound = recon + latent + diffusion
 *       = entropy of the data + KL(q(z_1) || p(z_1)) + what the best x^ leaves undone:
 *   - VDM: nothing is left undone in continuous time, nor for any finite T if every step has its best
 *     variance w*: there the bound is the entropy;
 *   - with w = 1 the excess falls with T from above, in the end like 1/T; its terms of order 1/T^2 bend
 *     that by a hundredth at T = 256;
 *   - with an encoder, nt or affine, the same holds but for the closed form above, small and not zero. */
static void prove_exact(Report *r, Lab *lab) {
    enum { DOUBLINGS = 10, LATE = 7 };
    Config *c = &lab->model.config;
    double T[DOUBLINGS], above[DOUBLINGS], integral = 0, step_error = 0, best_error = 0, largest_ratio = 0;
    c->height = 2, c->width = 2;
    const double ends = ends_minus_floor(lab), left = missed_in_continuous_time(c);
    for (int i = 0; i <= INTERVALS; i++)
        integral += simpson(i) * best_continuous_loss(lab, (double)i / INTERVALS);
    for (int i = 0; i < DOUBLINGS; i++) {
        const int steps = 2 << i;
        const double excess = best_finite_loss(lab, steps, 0) + ends;
        const double excess_at_best = best_finite_loss(lab, steps, 1) + ends;
        T[i] = steps;
        above[i] = excess - left;
        step_error = larger(fabs(excess - missed_by_steps(c, steps, 0)) / larger(excess, 1), step_error);
        best_error = larger(fabs(excess_at_best - missed_by_steps(c, steps, 1)), best_error);
        largest_ratio = larger(i > 0 ? above[i] / above[i - 1] : 0, largest_ratio);
        largest_ratio = larger(above[i] > 0 ? 0 : INFINITY, largest_ratio);
        note(r, "%s%d: %.2e", i ? ", " : "excess at T = ", steps, excess);
    }
    note(r, ", continuous: %.2e", integral + ends);
    const char *bound = c->kind == VDM ? "bound is the entropy" : "bound is entropy + closed form";
    const double limit = rounding(1e-10, 1e-4);   /* nats a pixel */
    claim(r, fabs(integral + ends - left), limit, "Gaussian data, continuous: %s", bound);
    claim(r, best_error, limit, "Gaussian data, finite T, w*: %s", bound);
    claim(r, step_error, limit, "Gaussian data, finite T: bound is entropy + closed form");
    claim(r, largest_ratio, 1, "excess falls from above: largest ratio, 2T to T");
    claim(r, fabs(-order_of(T + LATE, above + LATE, DOUBLINGS - LATE) - 1), 0.02,
          "excess falls like 1/T: |order - 1|");
}

/* Deterministic steps carry z_1 to z_0 by an affine map as long as x^ is affine, so two points tell it: the
 * mean plus and minus a standard deviation of q(z_1). With the exact denoiser they arrive, as T grows, where
 * they lie in q(z_0), whose mean is alpha_0 (a m + b) and whose variance is alpha_0^2 a^2 s^2 + sigma_0^2. */
static void prove_deterministic_sampler(Report *r, Lab *lab) {
    enum { DOUBLINGS = 5 };
    const Config *c = &lab->model.config;
    double T[DOUBLINGS], mean_error[DOUBLINGS], variance_error[DOUBLINGS];
    const Schedule ends[2] = {schedule_at(c, 0), schedule_at(c, 1)};
    double mean[2], deviation[2];
    for (int end = 0; end < 2; end++) {
        const AffineEncoder e = affine_encoder(c->kind, ends[end]);
        mean[end] = ends[end].alpha * (e.a * DATA_MEAN + e.b);
        deviation[end] = sqrt(pow(ends[end].alpha * e.a * DATA_DEVIATION, 2) + ends[end].sigma2);
    }
    for (int i = 0; i < DOUBLINGS; i++) {
        const int steps = 256 << i;
        double z[2] = {mean[1] - deviation[1], mean[1] + deviation[1]};
        for (int step = steps; step >= 1; step--) {
            const Method m = lab_begin(lab);
            const double s = (step - 1.0) / steps, t = (double)step / steps;
            const Target target = continuous_target(c->kind, schedule_at(c, t));
            for (int point = 0; point < 2; point++) {
                Tensor *z_t = number(m.graph, z[point]);
                Tensor *x_hat = best_prediction(&m, z_t, t, target.c, target.offset).x_hat;
                z[point] = number_of(deterministic_step(&m, z_t, x_hat, s, t));
            }
        }
        T[i] = steps;
        mean_error[i] = fabs((z[0] + z[1]) / 2 - mean[0]);
        variance_error[i] = fabs(pow((z[1] - z[0]) / 2, 2) / pow(deviation[0], 2) - 1);
    }
    const int last = DOUBLINGS - 1;
    claim(r, mean_error[last], 2e-3, "deterministic, T = 4096: mean of z_0 is the data's");
    claim(r, variance_error[last], 1e-2, "deterministic, T = 4096: variance of z_0 is the data's");
    if (c->kind != VDM)   /* whose mean is exact for any T */
        claim(r, fabs(-order_of(T + 2, mean_error + 2, DOUBLINGS - 2) - 1), 0.1,
              "deterministic, mean: |order - 1|");
    claim(r, fabs(-order_of(T + 2, variance_error + 2, DOUBLINGS - 2) - 1), 0.1,
          "deterministic, variance: |order - 1|");
    note(r, "T = 4096: mean off by %.2e, variance by %.2e of itself", mean_error[last], variance_error[last]);
}

/* ---- the counterterm ---- */

/* dx_t/dlambda = sigma_t^2 (x_t - y + dy/dlambda), y = 0 for nt, against the tangent of x_t written out
 * with a gamma that carries dgamma/dlambda = -1, and against differences in lambda. */
static void prove_counterterm(Report *r, Lab *lab) {
    const double t = 0.6;
    Method m;
    const Tensor *measured = difference_by_lambda(lab, t, 0, &m);
    Tensor *x = scale_pixels(&m, lab->k), *gamma = with_tangent(gamma_at(&m, t), number(m.graph, -1));
    Tensor *x_t = mul(alpha_squared(gamma), x);
    if (m.config->kind == DIFFENC)
        x_t = add(x_t, mul(sigma_squared(gamma), encoder_network(m.network, x, network_time(&m, gamma), 1)));
    const Tensor *ours = exact_counterterm(&m, encode(&m, x, t, 1), gamma_at(&m, t));
    claim(r, distance(ours, x_t->tangent), rounding(1e-12, 1e-4), "dx_t/dlambda is the tangent of x_t");
    claim(r, distance(ours, measured), derivative_limit(), "dx_t/dlambda against differences");
}

/* ---- the command ---- */

/* A proof is made of so many models, from `first` on, or of as many variants that make what they need. */
enum { NO_MODEL = -1 };
typedef struct {
    const char *group;
    void (*prove)(Report *r, Lab *lab);
    int first, variants;       /* 0 variants: the rows of the operators */
} Proof;

/* What takes long comes last. */
static const Proof PROOFS[] = {
    {"derivatives", prove_operator, NO_MODEL, 0},
    {"derivatives", prove_y_dot, NO_MODEL, 1},
    {"forward process", prove_forward_process, VDM, MODELS},
    {"forward process", prove_moments, VDM, MODELS},
    {"loss", prove_step_kl, VDM, MODELS},
    {"loss", prove_step_kl_by_draws, VDM, MODELS},
    {"loss", prove_predictions, VDM, MODELS},
    {"loss", prove_residual, VDM, MODELS},
    {"loss", prove_zero_encoder, DIFFENC, 1},
    {"loss", prove_identity_encoder, DIFFENC, 1},
    {"loss", prove_other_terms, VDM, MODELS},
    {"loss", prove_limit, VDM, MODELS},
    {"loss", prove_best_variance, VDM, MODELS},
    {"loss", prove_divergence, VDM, 1},
    {"loss", prove_sampler, VDM, MODELS},
    {"exactness", prove_exact, VDM, MODELS},
    {"exactness", prove_deterministic_sampler, VDM, 2},
    {"counterterm", prove_counterterm, DIFFENC_NT, 2},
    {"derivatives", prove_network, NO_MODEL, 6},
    {"derivatives", prove_objective, NO_MODEL, 20},
};
enum { PROOF_COUNT = sizeof PROOFS / sizeof PROOFS[0] };

static int variants_of(const Proof *p) { return p->variants ? p->variants : operator_count(); }

/* The proof and its variant that come at place `index`. */
static const Proof *proof_at(int index, int *variant) {
    const Proof *p = PROOFS;
    for (*variant = index; *variant >= variants_of(p); p++)
        *variant -= variants_of(p);
    return p;
}

/* A claim about one model alone has its name in its text. */
static void run_proof(const Proof *p, Report *r) {
    Lab lab;
    if (p->first == NO_MODEL) {
        p->prove(r, &lab);
        return;
    }
    const ModelKind kind = (ModelKind)(p->first + r->variant);
    lab_open(&lab, small_config(kind), r->seed);
    r->about = p->variants > 1 ? MODEL_NAME[kind] : NULL;
    p->prove(r, &lab);
    lab_close(&lab);
}

static void print_report(const Proof *p, const Report *r, int *claims, int *failed) {
    for (int i = 0; i < r->count; i++) {
        const Claim *c = &r->claim[i];
        printf("%-16s%-70s %9.2e  limit %8.2e  %s\n", p->group, c->text, c->error, c->limit,
               holds(c) ? "ok" : "FAILED");
        *claims += 1;
        *failed += !holds(c);
    }
    if (r->note[0])
        printf("%16s(%s)\n", "", r->note);
    fflush(stdout);
}

static const char HELP[] =
    "usage: diffenc check [options]\n"
    "Prove every gradient and identity of the method: a line each, with its error.\n"
    "\n"
    "  --seed N   random points, weights and noise (default 1)\n"
    "  --stop     end soon after the first claim that fails (default: go on)\n";

/* -1, or an exit status: there is nothing more to do. */
static int parse_arguments(int argc, char **argv, uint64_t *seed, int *stop) {
    for (int i = 1; i < argc; i++) {
        char *end = NULL;
        if (strcmp(argv[i], "--help") == 0) {
            fputs(HELP, stdout);
            return 0;
        }
        if (strcmp(argv[i], "--stop") == 0) {
            *stop = 1;
        } else if (strcmp(argv[i], "--seed") == 0) {
            const char *text = i + 1 < argc ? argv[++i] : "";
            *seed = strtoull(text, &end, 10);
            if (text[0] < '0' || text[0] > '9' || *end) {
                fprintf(stderr, "diffenc: check: --seed '%s': expected a whole number\n", text);
                return 2;
            }
        } else {
            fprintf(stderr, "diffenc: check: unknown option %s (see diffenc check --help)\n", argv[i]);
            return 2;
        }
    }
    return -1;
}

/* Proofs are run on all threads and printed in the order of the table, so many at a time. */
enum { BATCH = 24 };

int check_main(int argc, char **argv) {
    uint64_t seed = 1;
    int stop = 0, places = 0, claims = 0, failed = 0;
    const int status = parse_arguments(argc, argv, &seed, &stop);
    if (status >= 0)
        return status;
    for (int i = 0; i < PROOF_COUNT; i++)
        places += variants_of(&PROOFS[i]);
    if (!IN_DOUBLE)
        printf("Single precision: limits are what its rounding leaves. `make check` proves more.\n");
    for (int first = 0; first < places && !(stop && failed); first += BATCH) {
        const int count = places - first < BATCH ? places - first : BATCH;
        Report report[BATCH];
        memset(report, 0, sizeof report);
#pragma omp parallel for schedule(dynamic, 1)
        for (int i = 0; i < count; i++) {
            report[i].seed = seed;
            run_proof(proof_at(first + i, &report[i].variant), &report[i]);
        }
        for (int i = 0; i < count; i++)
            print_report(proof_at(first + i, &report[i].variant), &report[i], &claims, &failed);
    }
    printf("%d claims, %d failed\n", claims, failed);
    return failed > 0;
}
