/* check.c - `diffenc check`: every gradient and every identity of the method, with the error that was measured.
 *
 * For those who doubt. Each proof below is one function that quotes the equation it is about, computes its two sides in
 * different ways, one of them with the program's own functions, and states the difference as a claim with a limit. The
 * claims are printed one a line. In the double build rounding stays far below every limit; in the float build the same
 * proofs run with limits that float's rounding needs, and those that it makes meaningless are left out.
 *
 * Nothing here is trained: weights are random, those that begin at zero included, because an identity that holds for
 * any network holds for a trained one. */

#include "derivatives.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const double PI = 3.14159265358979323846;

/* ---- claims ---- */

typedef struct {
    char text[72];
    double error, limit;
} Claim;

enum { MAX_CLAIMS = 8 };
typedef struct {
    Claim claim[MAX_CLAIMS];
    int count;
    char note[400];            /* numbers worth seeing that are not a claim; printed below */
} Report;

static void claim(Report *r, double error, double limit, const char *format, ...)
#ifdef __GNUC__
    __attribute__((format(printf, 4, 5)))
#endif
    ;

static void claim(Report *r, double error, double limit, const char *format, ...) {
    va_list arguments;
    Claim *c = &r->claim[r->count++];
    c->error = error;
    c->limit = limit;
    va_start(arguments, format);
    vsnprintf(c->text, sizeof c->text, format, arguments);
    va_end(arguments);
}

static int holds(const Claim *c) {
    return c->error <= c->limit;   /* not so for what is not a number */
}

static const int DOUBLE = sizeof(real) == sizeof(double);

/* A limit that is a matter of rounding: for double, and for float. */
static double rounding(double in_double, double in_float) {
    return DOUBLE ? in_double : in_float;
}

/* A standard normal number leaves +-5 once in 1.7 million draws. */
static const double Z_LIMIT = 5;

static double worse(double a, double b) {
    return a > b || isnan(a) ? a : b;
}

static double relative_error(double a, double b) {
    return fabs(a - b) / worse(fabs(b), 1e-300);
}

static double value(const Tensor *a) {
    return (double)a->value[0];
}

/* || a - b || / || b ||; b NULL: zero, and the norm of a itself. */
static double distance(const Tensor *a, const Tensor *b) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < element_count(a); i++) {
        const double bi = b ? (double)b->value[i] : 0;
        difference += pow((double)a->value[i] - bi, 2);
        norm += bi * bi;
    }
    return sqrt(difference) / (b ? worse(sqrt(norm), 1e-300) : 1);
}

/* ---- a small model to look at ---- */

static const char *const MODEL_NAME[] = {"VDM", "DiffEnc-nt", "DiffEnc"};
static const char *const PREDICTION_NAME[] = {"v", "eps", "x"};

enum { MAX_PIXELS = 128 };

typedef struct {
    Model model;
    Workers workers;
    Network *network;
    uint64_t seed;
    unsigned char k[MAX_PIXELS];
    real eps[MAX_PIXELS], eps_0[MAX_PIXELS];
    Example example;           /* of the above, at t = 1/2 */
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
    model_flip(&lab->model, 1);
    workers_new(&lab->workers, &lab->model, 1);
    lab->network = &lab->workers.network[0];
    lab->seed = seed;
    for (size_t i = 0; i < d; i++)
        lab->k[i] = (unsigned char)random_bits(random_stream(seed, RANDOM_CHECK, 11, 0), (uint32_t)i);
    random_normal(random_stream(seed, RANDOM_CHECK, 12, 0), lab->eps, d);
    random_normal(random_stream(seed, RANDOM_CHECK, 13, 0), lab->eps_0, d);
    const Example example = {.k = lab->k, .t = 0.5, .eps = lab->eps, .eps_0 = lab->eps_0};
    lab->example = example;
}

static void lab_close(Lab *lab) {
    workers_free(&lab->workers);
    model_free(&lab->model);
}

/* A new graph, without dropout. */
static Method lab_begin(Lab *lab) {
    lab->network->weights = lab->model.params;
    lab->network->gradient = NULL;
    lab->network->flipped = NULL;
    lab->network->graph.dropout = 0;
    network_begin(lab->network);
    return method_begin(lab->network);
}

/* An image, and d. */
static Tensor *image(const Method *m, const real *values) {
    return constant(m->graph, m->config->height, m->config->width, m->config->image_channels, values);
}
static int pixels(const Method *m) {
    return m->config->height * m->config->width * m->config->image_channels;
}

/* The noise of a draw. */
static Tensor *normal_image(const Method *m, uint64_t seed, uint32_t draw) {
    Tensor *eps = image(m, NULL);
    random_normal(random_stream(seed, RANDOM_CHECK, 14, draw), eps->value, element_count(eps));
    return eps;
}

/* The schedule at one t by its definition, in double whatever the build. */
typedef struct {
    double gamma, alpha, sigma, alpha2, sigma2;
} Schedule;

static Schedule schedule_of_gamma(double gamma) {
    const double sigma2 = 1 / (1 + exp(-gamma)), alpha2 = 1 / (1 + exp(gamma));
    const Schedule s = {gamma, sqrt(alpha2), sqrt(sigma2), alpha2, sigma2};
    return s;
}

static Schedule schedule_at(const Config *c, double t) {
    return schedule_of_gamma(c->gamma_min + (c->gamma_max - c->gamma_min) * t);
}

/* Pairs s < t: the ends of time, long and short steps. */
enum { TIME_PAIRS = 4 };
static const double TIMES[TIME_PAIRS][2] = {{0, 0.25}, {0.3, 0.7}, {0.5, 0.53}, {0.75, 1}};

/* ---- derivatives ---- */

static void claim_derivatives(Report *r, DerivativeErrors e, const char *name) {
    claim(r, e.gradient, derivative_limit(), "%s: gradient", name);
    if (e.tangent >= 0) {
        claim(r, e.tangent, derivative_limit(), "%s: tangent", name);
        claim(r, e.through_tangent, derivative_limit(), "%s: gradient through the tangent", name);
    }
}

/* How many points are tried until one is found where no kink is so near that its derivatives cannot be measured. */
enum { POINTS = 4 };
static int is_measured(DerivativeErrors e) {
    return e.gradient != INFINITY && e.tangent != INFINITY && e.through_tangent != INFINITY;
}

/* All rows of the table that have the same title as row `variant`, the first of them. */
static void prove_operator(Report *r, int variant, uint64_t seed) {
    DerivativeErrors worst = {-1, -1, -1};
    if (variant > 0 && strcmp(operator_title(variant), operator_title(variant - 1)) == 0)
        return;
    for (int i = variant; i < operator_count() && strcmp(operator_title(i), operator_title(variant)) == 0; i++) {
        const Subject s = operator_subject(i);
        const DerivativeErrors e = derivative_errors(&s, 16, seed + (uint64_t)i);
        worst.gradient = worse(e.gradient, worst.gradient);
        worst.tangent = worse(e.tangent, worst.tangent);
        worst.through_tangent = worse(e.through_tangent, worst.through_tangent);
    }
    claim_derivatives(r, worst, operator_title(variant));
}

static Tensor *build_score(const Subject *s, Graph *graph, Tensor **leaf) {
    (void)graph;
    return score_network(s->network, leaf[0], 0.37);
}

/* The time is a plain number to a network; only its derivative by lambda is a tensor. */
static Tensor *build_encoder(const Subject *s, Graph *graph, Tensor **leaf) {
    (void)graph;
    return encoder_network(s->network, leaf[0], (double)leaf[1]->value[0], leaf[1]->tangent);
}

/* The networks as functions of image, time and weights; the image carries a tangent, and for the encoder the time does.
 * Every parameter tensor takes part. sin(2^7 2 pi z) turns by a radian in 1/800, sin(1000 t) in 1/1000, and a pixel's way
 * through max-pooling may change over a short length: that is what the scales of leaves and weights say. */
static void prove_network(Report *r, int variant, uint64_t seed) {
    const char *const names[] = {"score network, flat, 5x7x3", "score network, U-Net of 2 levels, 20x4x1",
                                 "score network, U-Net, 4x6x3", "encoder, U-Net of 2 levels, 20x4x1"};
    const int is_encoder = variant == 3;
    Config c = small_config(is_encoder ? DIFFENC : VDM);
    DerivativeErrors e = {.gradient = INFINITY};
    if (variant == 0)
        c.height = 5, c.width = 7, c.image_channels = 3, c.channels = 12;
    if (variant == 1)
        c.net = NET_UNET, c.score_blocks = 2, c.channels = 4, c.height = 20, c.width = 4;
    if (variant == 2)
        c.net = NET_UNET, c.score_blocks = 2, c.image_channels = 3;
    if (variant == 3)
        c.encoder_blocks = 2, c.height = 20, c.width = 4;
    if (variant > 0 && !DOUBLE)
        return;   /* between the kinks of max-pooling there is no room for steps as long as float needs them */
    for (uint64_t point = 0; point < POINTS && !is_measured(e); point++) {
        Lab lab;
        lab_open(&lab, c, seed + 1000 * point);
        Subject s = {.build = is_encoder ? build_encoder : build_score, .network = lab.network, .dropout = 0.1,
                     .weight_scale = 0.02,
                     .leaf = {{c.height, c.width, c.image_channels, 1, -1, 1, is_encoder ? 0.02 : 1.0 / 400},
                              {is_encoder, 1, 1, TANGENT_ONLY, 0.2, 0.8, 1.0 / 1000}}};
        e = derivative_errors(&s, 3, seed + 1000 * point);
        lab_close(&lab);
    }
    claim_derivatives(r, e, names[variant]);
}

/* dy/dlambda as the loss uses it. */
static Tensor *build_y_dot(const Subject *s, Graph *graph, Tensor **leaf) {
    const Method m = method_begin(s->network);
    (void)graph, (void)leaf;
    return encode(&m, scale_pixels(&m, s->context), 0.6, 1).y_dot;
}

/* encode() where lambda is e more than at a time t, which is then t - e/(gamma_max - gamma_min). */
typedef struct {
    Lab *lab;
    double t;
    int want_y;
} AtLambda;

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

/* dy/dlambda at fixed x, lambda = -gamma; and its gradient by every parameter of the encoder and of the schedule. */
static void prove_y_dot(Report *r, int variant, uint64_t seed) {
    Config c = small_config(DIFFENC);
    Lab lab;
    Method m;
    (void)variant;
    c.schedule = SCHEDULE_LEARNED;
    lab_open(&lab, c, seed);
    const Tensor *measured = difference_by_lambda(&lab, 0.6, 1, &m);
    claim(r, distance(encode(&m, scale_pixels(&m, lab.k), 0.6, 1).y_dot, measured), derivative_limit(),
          "dy/dlambda: against differences in lambda");
    if (!DOUBLE) {   /* for the same reason */
        lab_close(&lab);
        return;
    }
    const Subject s = {.build = build_y_dot, .context = lab.k, .network = lab.network, .weight_scale = 0.02};
    claim(r, derivative_errors(&s, 2, seed).gradient, derivative_limit(), "dy/dlambda: gradient by every parameter");
    lab_close(&lab);
}

static Tensor *build_objective(const Subject *s, Graph *graph, Tensor **leaf) {
    const Method m = method_begin(s->network);
    (void)graph, (void)leaf;
    return bits_per_dimension(&m, objective(&m, *(const Example *)s->context));
}

/* The whole training objective by every parameter: each model, prediction, continuous and finite time; schedules fixed
 * (eps) and learned, both networks, dropout on with the same mask in every evaluation. */
static void prove_objective(Report *r, int variant, uint64_t seed) {
    Config c = small_config((ModelKind)(variant / 6));
    DerivativeErrors e = {.gradient = INFINITY};
    c.prediction = (Prediction)(variant / 2 % 3);
    c.schedule = c.prediction == PREDICT_EPS ? SCHEDULE_FIXED : SCHEDULE_LEARNED;
    c.net = c.prediction == PREDICT_X && DOUBLE ? NET_UNET : NET_FLAT;
    if (variant % 2)
        c.timesteps = 8, c.variance_ratio = 0.8;
    for (uint64_t point = 0; point < POINTS && !is_measured(e); point++) {
        Lab lab;
        lab_open(&lab, c, seed + 1000 * point);
        const Subject s = {.build = build_objective, .context = &lab.example, .network = lab.network, .dropout = 0.1,
                           .weight_scale = 0.02};
        e = derivative_errors(&s, 3, seed + 1000 * point);
        lab_close(&lab);
    }
    claim(r, e.gradient, derivative_limit(), "objective of %s, %s-prediction, %s: gradient", MODEL_NAME[c.kind],
          PREDICTION_NAME[c.prediction], c.timesteps ? "finite T" : "continuous");
}

/* ---- the forward process ---- */

/* rho as the program has it: sigma_Q^2 / sigma_s^2, from the variance it samples with. */
static double noise_share_of(const Method *m, double s, double t) {
    return value(generative_variance(m, s, t)) / value(sigma_squared(gamma_at(m, s)));
}

/* q(z_t|z_s,x) = N(alpha_ts z_s + alpha_t (x_t - x_s), sigma_ts^2) over q(z_s|x) = N(alpha_s x_s, sigma_s^2) gives
 * q(z_t|x) = N(alpha_t x_t, sigma_t^2):
 *     alpha_ts alpha_s x_s + alpha_t (x_t - x_s) = alpha_t x_t,    alpha_ts^2 sigma_s^2 + sigma_ts^2 = sigma_t^2 */
static void prove_composition(Report *r, int variant, uint64_t seed) {
    Lab lab;
    double mean_error = 0, variance_error = 0;
    lab_open(&lab, small_config((ModelKind)variant), seed);
    for (int i = 0; i < TIME_PAIRS; i++) {
        const Method m = lab_begin(&lab);
        const double s = TIMES[i][0], t = TIMES[i][1];
        Tensor *x = scale_pixels(&m, lab.k), *gamma_s = gamma_at(&m, s), *gamma_t = gamma_at(&m, t), *no_noise = image(&m, NULL);
        const Encoded at_s = encode(&m, x, s, 0), at_t = encode(&m, x, t, 0);
        const double alpha_t = schedule_at(m.config, t).alpha, alpha_ts = alpha_t / schedule_at(m.config, s).alpha;
        Tensor *mean = add(affine(alpha_ts, diffuse(at_s.x_t, gamma_s, no_noise), 0),
                           affine(alpha_t, sub(at_t.x_t, at_s.x_t), 0));
        mean_error = worse(distance(mean, diffuse(at_t.x_t, gamma_t, no_noise)), mean_error);
        const double sigma_t2 = value(sigma_squared(gamma_t)), sigma_ts2 = sigma_t2 * noise_share_of(&m, s, t);
        const double composed = alpha_ts * alpha_ts * value(sigma_squared(gamma_s)) + sigma_ts2;
        variance_error = worse(relative_error(composed, schedule_at(m.config, t).sigma2), variance_error);
    }
    claim(r, mean_error, rounding(1e-13, 1e-5), "%s: mean of q(z_t|z_s,x) q(z_s|x) = q(z_t|x)", MODEL_NAME[variant]);
    claim(r, variance_error, rounding(1e-13, 1e-5), "%s: variance of the same", MODEL_NAME[variant]);
    lab_close(&lab);
}

/* q(z_s | z_t, x) by Bayes' rule: precisions add, means are weighted with them.
 *     1/v = 1/sigma_s^2 + alpha_ts^2/sigma_ts^2
 *     mu = v [alpha_s x_s/sigma_s^2 + alpha_ts (z_t - alpha_t (x_t - x_s))/sigma_ts^2] */
typedef struct {
    Tensor *mean;
    double variance;
} Gaussian;

static Gaussian bayes(const Method *m, Tensor *x_s, Tensor *x_t, Tensor *z_t, double s, double t) {
    const Schedule at_s = schedule_at(m->config, s), at_t = schedule_at(m->config, t);
    const double alpha_ts = at_t.alpha / at_s.alpha, sigma_ts2 = at_t.sigma2 - alpha_ts * alpha_ts * at_s.sigma2;
    Gaussian q = {image(m, NULL), 1 / (1 / at_s.sigma2 + alpha_ts * alpha_ts / sigma_ts2)};
    for (int i = 0; i < pixels(m); i++) {
        const double xs = (double)x_s->value[i], xt = (double)x_t->value[i], z = (double)z_t->value[i];
        q.mean->value[i] = (real)(q.variance * (at_s.alpha * xs / at_s.sigma2
                                                + alpha_ts * (z - at_t.alpha * (xt - xs)) / sigma_ts2));
    }
    return q;
}

/* mu_Q = alpha_ts (sigma_s^2/sigma_t^2) z_t + alpha_s rho x_t + alpha_s (x_s - x_t), which is the generative mean at
 * x^ = x_t with the counterterm taken out and the change of x put in;  sigma_Q^2 = sigma_s^2 rho. */
static void prove_posterior(Report *r, int variant, uint64_t seed) {
    Lab lab;
    double mean_error = 0, variance_error = 0;
    lab_open(&lab, small_config((ModelKind)variant), seed);
    for (int i = 0; i < TIME_PAIRS; i++) {
        const Method m = lab_begin(&lab);
        const double s = TIMES[i][0], t = TIMES[i][1];
        const Schedule at_s = schedule_at(m.config, s), at_t = schedule_at(m.config, t);
        Tensor *x = scale_pixels(&m, lab.k), *x_s = encode(&m, x, s, 0).x_t;
        Tensor *x_t = encode(&m, x, t, 0).x_t, *z_t = diffuse(x_t, gamma_at(&m, t), normal_image(&m, seed, 0));
        const double counterterm = variant == VDM ? 0 : (at_t.gamma - at_s.gamma) * at_t.sigma2;
        Tensor *change = sub(sub(x_s, x_t), affine(counterterm, x_t, 0));
        Tensor *mu_q = add(generative_mean(&m, z_t, x_t, s, t), affine(at_s.alpha, change, 0));
        const Gaussian q = bayes(&m, x_s, x_t, z_t, s, t);
        mean_error = worse(distance(mu_q, q.mean), mean_error);
        variance_error = worse(relative_error(value(generative_variance(&m, s, t)), q.variance), variance_error);
    }
    claim(r, mean_error, rounding(1e-12, 1e-4), "%s: mu_Q of q(z_s|z_t,x) = Bayes' rule", MODEL_NAME[variant]);
    claim(r, variance_error, rounding(1e-12, 1e-4), "%s: sigma_Q^2 of the same", MODEL_NAME[variant]);
    lab_close(&lab);
}

/* z_t = alpha_t x_t + sigma_t eps has mean alpha_t x_t, variance sigma_t^2, and independent pixels: z-scores over many
 * draws of (z_t - alpha_t x_t)/sigma_t, its square, and the product of neighbours. */
static void prove_moments(Report *r, int variant, uint64_t seed) {
    enum { DRAWS = 1000 };
    Lab lab;
    const double t = 0.7;
    double sum = 0, squares = 0, products = 0;
    lab_open(&lab, small_config((ModelKind)variant), seed);
    Method m = lab_begin(&lab);
    const double n = (double)DRAWS * pixels(&m);
    const Schedule at = schedule_at(m.config, t);
    for (int draw = 0; draw < DRAWS; draw++) {
        m = lab_begin(&lab);
        const Tensor *x_t = encode(&m, scale_pixels(&m, lab.k), t, 0).x_t;
        const Tensor *z = diffuse((Tensor *)x_t, gamma_at(&m, t), normal_image(&m, seed, (uint32_t)draw));
        double before = 0;
        for (int i = 0; i < pixels(&m); i++) {
            const double u = ((double)z->value[i] - at.alpha * (double)x_t->value[i]) / at.sigma;
            sum += u, squares += u * u - 1, products += u * before;
            before = u;
        }
    }
    claim(r, fabs(sum) / sqrt(n), Z_LIMIT, "%s: mean of diffuse(), standard errors", MODEL_NAME[variant]);
    claim(r, fabs(squares) / sqrt(2 * n), Z_LIMIT, "%s: variance of diffuse(), standard errors", MODEL_NAME[variant]);
    claim(r, fabs(products) / sqrt(n), Z_LIMIT, "%s: covariance of pixels, standard errors", MODEL_NAME[variant]);
    lab_close(&lab);
}

/* ---- the loss ---- */

/* Everything about one step t -> s of a random model. */
typedef struct {
    Encoded at_s, at_t;
    Tensor *z_t, *eps, *gamma_t;
    Predicted p;
} Step;

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
 *     d/2 (w - 1 - log w) + w/2 ||..||^2/sigma_Q^2 = d/2 (v_Q/v_P - 1 - log(v_Q/v_P)) + ||mu_P - mu_Q||^2/(2 v_P) */
static void prove_step_kl(Report *r, int variant, uint64_t seed) {
    Config c = small_config((ModelKind)variant);
    Lab lab;
    double distance_error = 0, kl_error = 0;
    c.timesteps = 1000, c.variance_ratio = 0.7;
    lab_open(&lab, c, seed);
    for (int i = 0; i < TIME_PAIRS; i++) {
        const Method m = lab_begin(&lab);
        const double s = TIMES[i][0], t = TIMES[i][1], d = pixels(&m);
        const Step step = step_at(&m, &lab, s, t);
        const Gaussian q = bayes(&m, step.at_s.x_t, step.at_t.x_t, step.z_t, s, t);
        const double square = value(squared_norm(sub(generative_mean(&m, step.z_t, step.p.x_hat, s, t), q.mean)));
        Tensor *ours = step_distance(&m, step.at_s, step.at_t, step.p, s, t);
        distance_error = worse(relative_error(value(ours), square / q.variance), distance_error);
        const double p_variance = value(generative_variance(&m, s, t)), ratio = q.variance / p_variance;
        const double kl = d / 2 * (ratio - 1 - log(ratio)) + square / (2 * p_variance);
        kl_error = worse(relative_error(value(step_kl(&m, ours, c.variance_ratio)), kl), kl_error);
    }
    claim(r, distance_error, rounding(1e-10, 1e-2), "%s: the two forms of ||mu_P - mu_Q||^2/sigma_Q^2", MODEL_NAME[variant]);
    claim(r, kl_error, rounding(1e-10, 1e-2), "%s: step KL = KL of two Gaussians, w = 0.7", MODEL_NAME[variant]);
    lab_close(&lab);
}

/* The same KL as the mean of log q - log p over draws of z_s from q; the means are w/v_P apart as above. */
static void prove_step_kl_by_draws(Report *r, int variant, uint64_t seed) {
    enum { DRAWS = 20000 };
    Config c = small_config((ModelKind)variant);
    Lab lab;
    const double s = 0.4, t = 0.5;
    double sum = 0, squares = 0;
    c.timesteps = 10, c.variance_ratio = 0.7;
    lab_open(&lab, c, seed);
    const Method m = lab_begin(&lab);
    const Step step = step_at(&m, &lab, s, t);
    const Gaussian q = bayes(&m, step.at_s.x_t, step.at_t.x_t, step.z_t, s, t);
    const Tensor *mu_p = generative_mean(&m, step.z_t, step.p.x_hat, s, t);
    const double kl = value(step_kl(&m, step_distance(&m, step.at_s, step.at_t, step.p, s, t), c.variance_ratio));
    const double p_variance = value(generative_variance(&m, s, t));
    Tensor *noise = image(&m, NULL);
    for (int draw = 0; draw < DRAWS; draw++) {
        double log_ratio = pixels(&m) / 2.0 * log(p_variance / q.variance);
        random_normal(random_stream(seed, RANDOM_CHECK, 15, (uint32_t)draw), noise->value, (size_t)pixels(&m));
        for (int i = 0; i < pixels(&m); i++) {
            const double u = (double)noise->value[i], mu_q = (double)q.mean->value[i];
            const double from_p = mu_q + sqrt(q.variance) * u - (double)mu_p->value[i];
            log_ratio += from_p * from_p / (2 * p_variance) - u * u / 2;
        }
        sum += log_ratio - kl, squares += pow(log_ratio - kl, 2);
    }
    claim(r, fabs(sum) / sqrt(squares), Z_LIMIT, "%s: step KL = mean of log q/p, standard errors", MODEL_NAME[variant]);
    lab_close(&lab);
}

/* For the same x^ the three predictions are the same model:  v^ = (alpha z - x^)/sigma,  eps^ = (z - alpha x^)/sigma.
 * Their residuals and weights must give the same L. */
static void prove_predictions(Report *r, int variant, uint64_t seed) {
    Lab lab;
    double loss[3], x_error = 0;
    lab_open(&lab, small_config((ModelKind)variant), seed);
    for (int prediction = 0; prediction < 3; prediction++) {
        lab.model.config.prediction = PREDICT_V;
        const Method m = lab_begin(&lab);
        const Schedule at = schedule_at(m.config, 0.5);
        const Step step = step_at(&m, &lab, 0.4, 0.5);
        Tensor *x_hat = step.p.x_hat, *output[3];
        output[PREDICT_V] = affine(1 / at.sigma, sub(affine(at.alpha, step.z_t, 0), x_hat), 0);
        output[PREDICT_EPS] = affine(1 / at.sigma, sub(step.z_t, affine(at.alpha, x_hat, 0)), 0);
        output[PREDICT_X] = x_hat;
        lab.model.config.prediction = (Prediction)prediction;
        const Predicted p = {output[prediction], x_from_output(&m, output[prediction], step.z_t, step.gamma_t)};
        x_error = worse(distance(p.x_hat, x_hat), x_error);
        loss[prediction] = value(continuous_loss(&m, continuous_residual(&m, step.at_t, p, step.gamma_t, step.eps),
                                                 step.gamma_t));
    }
    claim(r, x_error, rounding(1e-12, 1e-4), "%s: x^ from v^, eps^ and x^ is the same", MODEL_NAME[variant]);
    claim(r, worse(relative_error(loss[1], loss[0]), relative_error(loss[2], loss[0])), rounding(1e-11, 1e-3),
          "%s: L is the same for v-, eps- and x-prediction", MODEL_NAME[variant]);
    lab_close(&lab);
}

/* The other form of r with v-prediction:  nt (1 + sigma^2)(v - v^);  DiffEnc the same + sigma (y - dy/dlambda). */
static void prove_residual(Report *r, int variant, uint64_t seed) {
    const ModelKind kind = variant == 0 ? DIFFENC_NT : DIFFENC;
    Lab lab;
    lab_open(&lab, small_config(kind), seed);
    const Method m = lab_begin(&lab);
    const Schedule at = schedule_at(m.config, 0.6);
    const Step step = step_at(&m, &lab, 0.5, 0.6);
    Tensor *v = sub(affine(at.alpha, step.eps, 0), affine(at.sigma, step.at_t.x_t, 0));
    Tensor *other = affine(1 + at.sigma2, sub(v, step.p.output), 0);
    if (kind == DIFFENC)
        other = add(other, affine(at.sigma, sub(step.at_t.y, step.at_t.y_dot), 0));
    const Tensor *ours = continuous_residual(&m, step.at_t, step.p, step.gamma_t, step.eps);
    claim(r, distance(ours, other), rounding(1e-12, 1e-4), "%s: the two forms of r", MODEL_NAME[kind]);
    lab_close(&lab);
}

/* Whether DiffEnc with y = 0 is DiffEnc-nt, in every term of the objective, with the same score network. */
static void prove_zero_encoder(Report *r, int variant, uint64_t seed) {
    Config c = small_config(DIFFENC);
    Lab with, without;
    double error = 0;
    c.timesteps = variant ? 8 : 0;
    lab_open(&with, c, seed);
    c.kind = DIFFENC_NT, c.encoder_blocks = 0;
    lab_open(&without, c, seed);
    const Parameter *last = &with.model.parameter[with.model.gamma_first - 2];   /* conv_out's kernel, then its bias */
    memset(with.model.params + last->offset, 0, (last[0].count + last[1].count) * sizeof(real));
    memcpy(without.model.params, with.model.params, without.model.weight_count * sizeof(real));
    const Method a = lab_begin(&with), b = lab_begin(&without);
    const LossTerms ours = objective(&a, with.example), other = objective(&b, with.example);
    error = worse(relative_error(value(ours.recon), value(other.recon)), error);
    error = worse(relative_error(value(ours.latent), value(other.latent)), error);
    error = worse(relative_error(value(ours.diffusion), value(other.diffusion)), error);
    claim(r, error, rounding(1e-13, 1e-5), "DiffEnc with y = 0 is DiffEnc-nt, %s", variant ? "finite T" : "continuous");
    lab_close(&with);
    lab_close(&without);
}

/* DiffEnc with y = x has VDM's forward process:  alpha_t^2 x + sigma_t^2 x = x.  The encoder is made to return a
 * constant, and x is an image of that constant. */
static void prove_identity_encoder(Report *r, int variant, uint64_t seed) {
    Lab lab;
    double error = 0;
    (void)variant;
    lab_open(&lab, small_config(DIFFENC), seed);
    memset(lab.k, 77, sizeof lab.k);
    const Parameter *last = &lab.model.parameter[lab.model.gamma_first - 2];
    memset(lab.model.params + last->offset, 0, last->count * sizeof(real));
    lab.model.params[last[1].offset] = (real)atanh(2 * 77.5 / 256 - 1);
    for (int i = 0; i <= 10; i++) {
        const Method m = lab_begin(&lab);
        Tensor *x = scale_pixels(&m, lab.k), *gamma = gamma_at(&m, i / 10.0);
        const Encoded e = encode(&m, x, i / 10.0, 1);
        error = worse(worse(distance(e.x_t, x), distance(e.y_dot, NULL)), error);
        error = worse(distance(diffuse(e.x_t, gamma, image(&m, lab.eps)), diffuse(x, gamma, image(&m, lab.eps))), error);
    }
    claim(r, error, rounding(1e-13, 1e-5), "DiffEnc with y = x has VDM's forward process, x_t = x");
    lab_close(&lab);
}

/* -log p(k | z_0) as a softmax over the 256 levels written out, and KL(q(z_1|x) || N(0,1)) as the KL of Gaussians. */
static void prove_other_terms(Report *r, int variant, uint64_t seed) {
    Lab lab;
    double recon = 0, latent = 0;
    lab_open(&lab, small_config((ModelKind)variant), seed);
    const Method m = lab_begin(&lab);
    const LossTerms terms = objective(&m, lab.example);
    const Schedule at_0 = schedule_at(m.config, 0), at_1 = schedule_at(m.config, 1);
    Tensor *x = scale_pixels(&m, lab.k);
    const Tensor *x_0 = encode(&m, x, 0, 0).x_t, *x_1 = encode(&m, x, 1, 0).x_t;
    for (int i = 0; i < pixels(&m); i++) {
        const double z_0 = at_0.alpha * (double)x_0->value[i] + at_0.sigma * (double)lab.eps_0[i];
        double logit[256], sum = 0;
        for (int c = 0; c < 256; c++)
            logit[c] = -pow(z_0 / at_0.alpha - ((2 * c + 1) / 256.0 - 1), 2) / (2 * exp(at_0.gamma));
        for (int c = 0; c < 256; c++)
            sum += exp(logit[c] - logit[lab.k[i]]);
        recon += log(sum);
        latent += 0.5 * (at_1.sigma2 + pow(at_1.alpha * (double)x_1->value[i], 2) - 1 - log(at_1.sigma2));
    }
    claim(r, fabs(value(terms.recon) - recon) / pixels(&m), rounding(1e-10, 1e-3), "%s: recon = -log softmax, nats a pixel",
          MODEL_NAME[variant]);
    claim(r, fabs(value(terms.latent) - latent) / pixels(&m), rounding(1e-14, 1e-7),
          "%s: latent = KL(q(z_1|x) || N(0,1)), nats a pixel", MODEL_NAME[variant]);
    lab_close(&lab);
}

/* The slope of log y over log x by least squares. */
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
    lab_begin(lab);
    lab->network->graph.dropout = dropout;
    lab->network->graph.dropout_stream = random_stream(lab->seed, RANDOM_DROPOUT, 0, 0);
    const Method m = method_begin(lab->network);
    return value(objective(&m, lab->example).diffusion);
}

/* T KL(t - 1/T, t) -> L_inf(t) with a difference of order 1/T, for the training objective itself, with dropout. A step
 * must be short against the fastest wave of the time embedding, sin(1000 t), where there is an encoder. Over four
 * doublings terms of order 1/T^2 bend the line by a few percent of a percent; 0.02 leaves room for that. */
static void prove_limit(Report *r, int variant, uint64_t seed) {
    enum { COUNT = 5 };
    const int first = variant == DIFFENC ? 1 << 16 : DOUBLE ? 1 << 11 : 1 << 7;
    double T[COUNT], excess[COUNT];
    Lab lab;
    if (variant == DIFFENC && !DOUBLE)
        return;   /* x_s - x_t is below float's resolution there */
    lab_open(&lab, small_config((ModelKind)variant), seed);
    const double limit = diffusion_term(&lab, 0, 0.1);
    for (int i = 0; i < COUNT; i++) {
        T[i] = first << i;
        excess[i] = diffusion_term(&lab, first << i, 0.1) - limit;
    }
    claim(r, fabs(-order_of(T, excess, COUNT) - 1), rounding(0.02, 0.2), "%s: T KL_T -> L_inf like 1/T: |order - 1|",
          MODEL_NAME[variant]);
    snprintf(r->note, sizeof r->note, "T = %g: (T KL_T - L_inf)/L_inf = %.2e", T[COUNT - 1], excess[COUNT - 1] / limit);
    lab_close(&lab);
}

/* w* = 1/(1 + D/d), D = E ||mu_P - mu_Q||^2/sigma_Q^2, makes the step KL least, and then KL* = -(d/2) log w*. */
static void prove_best_variance(Report *r, int variant, uint64_t seed) {
    Lab lab;
    lab_open(&lab, small_config((ModelKind)variant), seed);
    const Method m = lab_begin(&lab);
    const Step step = step_at(&m, &lab, 0.4, 0.5);
    Tensor *D = step_distance(&m, step.at_s, step.at_t, step.p, 0.4, 0.5);
    const double d = pixels(&m), w = 1 / (1 + value(D) / d), best = -d / 2 * log(w);
    double least = INFINITY, at = 0;
    for (int i = -400; i <= 400; i++) {   /* steps of 1/400 in log w, from w* exp(-1) to w* exp(1) */
        const double kl = value(step_kl(&m, D, w * exp(i / 400.0)));
        if (kl < least)
            least = kl, at = i / 400.0;
    }
    claim(r, fabs(at), rounding(0, 0.01), "%s: no w of a scan is better than w*: |log w/w*|", MODEL_NAME[variant]);
    claim(r, relative_error(value(step_kl(&m, D, w)), best), rounding(1e-12, 1e-4), "%s: KL at w* = -(d/2) log w*",
          MODEL_NAME[variant]);
    lab_close(&lab);
}

/* Any other w adds T d/2 (w - 1 - log w): the bound at w = 1.3 grows with T by that slope. */
static void prove_divergence(Report *r, int variant, uint64_t seed) {
    const double w = 1.3;
    const int T = 1 << 12;
    double bound[2];
    Lab lab;
    (void)variant;
    lab_open(&lab, small_config(VDM), seed);
    lab.model.config.variance_ratio = w;
    for (int i = 0; i < 2; i++)
        bound[i] = diffusion_term(&lab, T << i, 0);
    const double d = lab.model.config.height * lab.model.config.width;
    claim(r, relative_error((bound[1] - bound[0]) / T, d / 2 * (w - 1 - log(w))), 1e-3,
          "w = 1.3: the bound grows by d/2 (w - 1 - log w) a step");
    lab_close(&lab);
}

/* One ancestral step is generative_mean() + sqrt(generative_variance()) eps at the network's x^; and the pixels of a
 * noiseless z_0 = alpha_0 x come back. */
static void prove_sampler(Report *r, int variant, uint64_t seed) {
    Config c = small_config((ModelKind)variant);
    Lab lab;
    unsigned char k[MAX_PIXELS];
    int wrong = 0;
    c.timesteps = 10, c.variance_ratio = 0.7;
    lab_open(&lab, c, seed);
    const Method m = lab_begin(&lab);
    Tensor *z_t = normal_image(&m, seed, 1), *eps = image(&m, lab.eps);
    const Predicted p = predict(&m, z_t, 0.5);
    Tensor *mean = generative_mean(&m, z_t, p.x_hat, 0.4, 0.5);
    const double deviation = sqrt(value(generative_variance(&m, 0.4, 0.5)));
    claim(r, distance(ancestral_step(&m, z_t, 0.4, 0.5, eps), add(mean, affine(deviation, eps, 0))), rounding(1e-13, 1e-5),
          "%s: an ancestral step is mu_P + sigma_P eps", MODEL_NAME[variant]);
    decode_pixels(&m, affine(schedule_at(m.config, 0).alpha, scale_pixels(&m, lab.k), 0), NULL, k);
    for (int i = 0; i < pixels(&m); i++)
        wrong += k[i] != lab.k[i];
    claim(r, wrong, 0, "%s: pixels decoded from alpha_0 x are x's", MODEL_NAME[variant]);
    lab_close(&lab);
}

/* ---- exactness ---- */

/* Data whose every pixel is N(m, s^2): then x, x_t, y and z_t are jointly Gaussian as long as the encoder is affine in
 * x, the best network E[. | z_t] is known, and so is the entropy of the data, which no bound can go below. The
 * program's own loss functions, given that network's answer, must come to it.
 *
 * Expectations need no draws: losses are quadratic in x and eps, and for those the two points m +- s and +-1 with equal
 * weights are exact. The image has 2x2 pixels, one for each combination: its loss is four times the expectation. */
static const double DATA_MEAN = 0.2, DATA_DEVIATION = 0.6;
enum { EXACT_PIXELS = 4 };

/* x_t = a x + b, y = p x + q and dy/dlambda = p_dot x + q_dot; the encoder changes with lambda in both p and q. */
typedef struct {
    double a, b, p, q, p_dot, q_dot;
} AffineEncoder;

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
static double posterior_variance_of_x(AffineEncoder e, Schedule at) {
    const double gain = at.alpha * e.a, s2 = DATA_DEVIATION * DATA_DEVIATION;
    return s2 * at.sigma2 / (gain * gain * s2 + at.sigma2);
}

/* The answer of the best network: x^ = c E[x | z_t] + offset. */
static Predicted best_prediction(const Method *m, Tensor *z_t, double t, double c, double offset) {
    const Schedule at = schedule_at(m->config, t);
    const AffineEncoder e = affine_encoder(m->config->kind, at);
    const double k = posterior_variance_of_x(e, at) * at.alpha * e.a / at.sigma2;   /* E[x|z] = mean + k (z - E z) */
    Tensor *x = affine(k, z_t, DATA_MEAN - k * at.alpha * (e.a * DATA_MEAN + e.b));
    Predicted p = {.x_hat = affine(c, x, offset)};
    p.output = affine(1 / at.sigma, sub(affine(at.alpha, z_t, 0), p.x_hat), 0);     /* v^ */
    return p;
}

/* What x^ should be the expectation of. Continuous time: r is 0 for  x_t - sigma^2/(1 + sigma^2) (y - dy/dlambda), for
 * VDM x;  a step: mu_P = mu_Q for  [rho x_t + x_s - x_t]/weight,  weight = rho + (lambda_s - lambda_t) sigma_t^2, for
 * VDM x with weight rho. As c x + offset. */
typedef struct {
    double c, offset, weight;
} Target;

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
    const real x[EXACT_PIXELS] = {(real)(DATA_MEAN - DATA_DEVIATION), (real)(DATA_MEAN + DATA_DEVIATION),
                                  (real)(DATA_MEAN - DATA_DEVIATION), (real)(DATA_MEAN + DATA_DEVIATION)};
    return image(m, x);
}
static Tensor *exact_eps(const Method *m) {
    const real eps[EXACT_PIXELS] = {-1, -1, 1, 1};
    return image(m, eps);
}

/* Everything except diffusion, minus what no bound can avoid: the entropy of the data, d/2 log(2 pi e s^2), and what
 * N(0,1) misses of the true q(z_1), KL(N(alpha_1 (a m + b), alpha_1^2 a^2 s^2 + sigma_1^2) || N(0,1)). The decoder is the
 * best one, q(x | z_0) itself, whose entropy is d/2 log(2 pi e Var[x|z_0]). */
static double ends_minus_floor(Lab *lab) {
    const Method m = lab_begin(lab);
    const Schedule at_0 = schedule_at(m.config, 0), at_1 = schedule_at(m.config, 1);
    const AffineEncoder e_0 = affine_encoder(m.config->kind, at_0), e_1 = affine_encoder(m.config->kind, at_1);
    const double d = EXACT_PIXELS, gain = at_1.alpha * e_1.a * DATA_DEVIATION, variance = gain * gain + at_1.sigma2;
    const double mean = at_1.alpha * (e_1.a * DATA_MEAN + e_1.b);
    const double recon = d / 2 * log(2 * PI * exp(1) * posterior_variance_of_x(e_0, at_0));
    const double entropy = d / 2 * log(2 * PI * exp(1) * DATA_DEVIATION * DATA_DEVIATION);
    const double latent = value(latent_loss(&m, encode_affine(&m, exact_x(&m), 1).x_t));
    return recon + latent - entropy - d / 2 * (variance + mean * mean - 1 - log(variance));
}

/* E L_inf(t), nats per image. */
static double best_continuous_loss(Lab *lab, double t) {
    const Method m = lab_begin(lab);
    const Target target = continuous_target(m.config->kind, schedule_at(m.config, t));
    const Encoded e = encode_affine(&m, exact_x(&m), t);
    Tensor *gamma = gamma_at(&m, t), *eps = exact_eps(&m);
    const Predicted p = best_prediction(&m, diffuse(e.x_t, gamma, eps), t, target.c, target.offset);
    return value(continuous_loss(&m, continuous_residual(&m, e, p, gamma, eps), gamma));
}

/* What the best x^ has to leave undone, in closed form. The model sees z_t alone; the true reverse process is
 * q(z_s | z_t and everything noisier). For VDM that is the same, because its z_t, made from z_s, adds nothing about x. An
 * encoder lets x act again on the way from z_s to z_t, so there the noisier z do tell more than z_t. Let V be the variance of
 * x given all of z_t .. z_1, U the variance given z_t alone, and mu_Q depend on x by the factor g = alpha_s weight c. A
 * step reveals g^2/sigma_Q^2 more:  1/V_s = 1/V_t + g^2/sigma_Q^2.  p(z_s|z_t) with the variance sigma_Q^2/w then misses,
 * per pixel,
 *     1/2 [w (1 + g^2 U/sigma_Q^2) - 1 - log(w (1 + g^2 V/sigma_Q^2))]
 * and the decoder, which sees z_0 alone, log(U/V)/2. Best is w = 1/(1 + g^2 U/sigma_Q^2). */
static double missed_by_steps(const Config *c, int T, int best_variance) {
    const Schedule at_1 = schedule_at(c, 1), at_0 = schedule_at(c, 0);
    double V = posterior_variance_of_x(affine_encoder(c->kind, at_1), at_1), missed = 0;
    for (int i = T; i >= 1; i--) {
        const Schedule at_s = schedule_at(c, (i - 1.0) / T), at_t = schedule_at(c, (double)i / T);
        const Target target = step_target(c->kind, at_s, at_t);
        const double U = posterior_variance_of_x(affine_encoder(c->kind, at_t), at_t);
        const double revealed = at_s.alpha2 * pow(target.weight * target.c, 2) / (at_s.sigma2 * -expm1(at_s.gamma - at_t.gamma));
        const double w = best_variance ? 1 / (1 + revealed * U) : 1;
        missed += (w * (1 + revealed * U) - 1 - log(w) - log1p(revealed * V)) / 2;
        V = 1 / (1 / V + revealed);
    }
    return missed + log(posterior_variance_of_x(affine_encoder(c->kind, at_0), at_0) / V) / 2;
}

/* The limit T -> infinity of the same: sums become integrals over lambda, in which a step reveals SNR (1 + sigma_t^2)^2
 * c^2 per unit (VDM: SNR). What V contributes cancels. 0 for VDM. */
static double missed_in_continuous_time(const Config *c) {
    enum { INTERVALS = 4096 };
    const Schedule at_0 = schedule_at(c, 0), at_1 = schedule_at(c, 1);
    double integral = 0;
    for (int i = 0; i <= INTERVALS; i++) {
        const Schedule at = schedule_at(c, (double)i / INTERVALS);
        const double factor = c->kind == VDM ? 1 : (1 + at.sigma2) * continuous_target(c->kind, at).c;
        integral += (i == 0 || i == INTERVALS ? 1 : i % 2 ? 4 : 2) / (3.0 * INTERVALS) * (c->gamma_max - c->gamma_min)
                  * exp(-at.gamma) * factor * factor * posterior_variance_of_x(affine_encoder(c->kind, at), at);
    }
    return (integral - log(posterior_variance_of_x(affine_encoder(c->kind, at_1), at_1)
                           / posterior_variance_of_x(affine_encoder(c->kind, at_0), at_0))) / 2;
}

/* Sum of the T step KLs, each with its best variance or with w = 1. */
static double best_finite_loss(Lab *lab, int T, int best_variance) {
    double sum = 0;
    for (int i = 1; i <= T; i++) {
        const Method m = lab_begin(lab);
        const double s = (i - 1.0) / T, t = (double)i / T;
        const Target target = step_target(m.config->kind, schedule_at(m.config, s), schedule_at(m.config, t));
        Tensor *x = exact_x(&m), *gamma = gamma_at(&m, t);
        const Encoded e_s = encode_affine(&m, x, s), e_t = encode_affine(&m, x, t);
        const Predicted p = best_prediction(&m, diffuse(e_t.x_t, gamma, exact_eps(&m)), t, target.c, target.offset);
        Tensor *D = step_distance(&m, e_s, e_t, p, s, t);
        sum += value(step_kl(&m, D, best_variance ? 1 / (1 + value(D) / EXACT_PIXELS) : 1));
    }
    return sum;
}

/* bound = recon + latent + diffusion = entropy of the data + KL(q(z_1) || p(z_1)) + what the best x^ leaves undone:
 *   - VDM: nothing is left undone in continuous time (Simpson's rule in t), nor for any finite T if every step has its
 *     best variance w*: there the bound is the entropy;
 *   - with w = 1 the excess falls with T from above, in the end like 1/T;
 *   - with an encoder, nt or affine, the same holds but for the closed form above, which is small and not zero. */
static void prove_exact(Report *r, int variant, uint64_t seed) {
    enum { INTERVALS = 4096, DOUBLINGS = 10 };
    Config c = small_config((ModelKind)variant);
    Lab lab;
    double T[DOUBLINGS], excess[DOUBLINGS], above[DOUBLINGS], step_error = 0, best_error = 0, rise = 0, integral = 0;
    c.height = 2, c.width = 2, c.channels = 4;
    lab_open(&lab, c, seed);
    const double ends = ends_minus_floor(&lab), d = EXACT_PIXELS, left = missed_in_continuous_time(&c);
    for (int i = 0; i <= INTERVALS; i++)
        integral += (i == 0 || i == INTERVALS ? 1 : i % 2 ? 4 : 2) * best_continuous_loss(&lab, (double)i / INTERVALS);
    integral /= 3.0 * INTERVALS;
    for (int i = 0; i < DOUBLINGS; i++) {
        T[i] = 2 << i;
        excess[i] = (best_finite_loss(&lab, 2 << i, 0) + ends) / d;
        above[i] = excess[i] - left;
        step_error = worse(fabs(excess[i] - missed_by_steps(&c, 2 << i, 0)) / worse(excess[i], 1), step_error);
        best_error = worse(fabs((best_finite_loss(&lab, 2 << i, 1) + ends) / d - missed_by_steps(&c, 2 << i, 1)), best_error);
        rise = worse(above[i] > 0 ? 0 : INFINITY, worse(i > 0 ? above[i] / above[i - 1] : 0, rise));
        snprintf(r->note + strlen(r->note), sizeof r->note - strlen(r->note), "%s%d: %.2e", i ? ", " : "excess at T = ",
                 2 << i, excess[i]);
    }
    snprintf(r->note + strlen(r->note), sizeof r->note - strlen(r->note), ", continuous: %.2e", (integral + ends) / d);
    const char *name = MODEL_NAME[variant], *plus = variant == VDM ? "" : " + closed form";
    const double limit = rounding(1e-10, 1e-4);   /* nats a pixel; Simpson's rule is good to 1e-12 */
    claim(r, fabs((integral + ends) / d - left), limit, "%s: Gaussian data, continuous: bound = entropy%s", name, plus);
    claim(r, best_error, limit, "%s: finite T, w = w*: bound = entropy%s", name, plus);
    claim(r, step_error, limit, "%s: finite T, w = 1: bound = entropy + closed form", name);
    claim(r, rise, 1, "%s: excess falls to continuous time's: largest ratio 2T/T", name);
    claim(r, fabs(-order_of(T + 7, above + 7, DOUBLINGS - 7) - 1), 0.02, "%s: it falls like 1/T: |order - 1|", name);
    lab_close(&lab);
}

/* ---- the counterterm ---- */

/* dx_t/dlambda = sigma_t^2 (x_t - y + dy/dlambda), y = 0 for nt: against the tangent of x_t written out with a gamma
 * that carries dgamma/dlambda = -1, and against differences in lambda. */
static void prove_counterterm(Report *r, int variant, uint64_t seed) {
    const ModelKind kind = variant == 0 ? DIFFENC_NT : DIFFENC;
    const double t = 0.6;
    Lab lab;
    Method m;
    lab_open(&lab, small_config(kind), seed);
    const Tensor *measured = difference_by_lambda(&lab, t, 0, &m);
    Tensor *x = scale_pixels(&m, lab.k), *gamma = with_tangent(gamma_at(&m, t), number(m.graph, -1));
    Tensor *x_t = mul(alpha_squared(gamma), x);
    if (kind == DIFFENC)
        x_t = add(x_t, mul(sigma_squared(gamma), encoder_network(m.network, x, t, time_by_lambda(&m))));
    const Tensor *ours = exact_counterterm(&m, encode(&m, x, t, 1), gamma_at(&m, t));
    claim(r, distance(ours, x_t->tangent), rounding(1e-12, 1e-4), "%s: dx_t/dlambda = tangent of x_t", MODEL_NAME[kind]);
    claim(r, distance(ours, measured), derivative_limit(), "%s: dx_t/dlambda against differences", MODEL_NAME[kind]);
    lab_close(&lab);
}

/* ---- the command ---- */

typedef struct {
    const char *group;
    void (*prove)(Report *r, int variant, uint64_t seed);
    int variants;              /* 0: one for each row of the table of operators */
} Proof;

/* What takes long comes last. */
static const Proof PROOFS[] = {
    {"derivatives", prove_operator, 0},
    {"derivatives", prove_y_dot, 1},
    {"forward process", prove_composition, 3},
    {"forward process", prove_posterior, 3},
    {"forward process", prove_moments, 3},
    {"loss", prove_step_kl, 3},
    {"loss", prove_step_kl_by_draws, 3},
    {"loss", prove_predictions, 3},
    {"loss", prove_residual, 2},
    {"loss", prove_zero_encoder, 2},
    {"loss", prove_identity_encoder, 1},
    {"loss", prove_other_terms, 3},
    {"loss", prove_limit, 3},
    {"loss", prove_best_variance, 3},
    {"loss", prove_divergence, 1},
    {"loss", prove_sampler, 3},
    {"exactness", prove_exact, 3},
    {"counterterm", prove_counterterm, 2},
    {"derivatives", prove_network, 4},
    {"derivatives", prove_objective, 18},
};
enum { PROOF_COUNT = sizeof PROOFS / sizeof PROOFS[0] };

static int variants_of(const Proof *p) {
    return p->variants ? p->variants : operator_count();
}

/* The proof and its variant that come at place `index`. */
static const Proof *proof_at(int index, int *variant) {
    const Proof *p = PROOFS;
    for (*variant = index; *variant >= variants_of(p); p++)
        *variant -= variants_of(p);
    return p;
}

static void print_report(const Proof *p, const Report *r, int *claims, int *failed) {
    for (int i = 0; i < r->count; i++) {
        const Claim *c = &r->claim[i];
        printf("%-16s%-70s %9.2e  limit %8.2e  %s\n", p->group, c->text, c->error, c->limit, holds(c) ? "ok" : "FAILED");
        *claims += 1;
        *failed += !holds(c);
    }
    if (r->note[0])
        printf("%16s(%s)\n", "", r->note);
    fflush(stdout);
}

static const char HELP[] =
    "usage: diffenc check [options]\n"
    "Prove every gradient and every identity of the method; one line for each claim with the error measured.\n"
    "\n"
    "  --seed N   random points, weights and noise (default 1)\n"
    "  --stop     prove nothing more after the first claim that fails (default: go on)\n";

/* 0, or the exit status plus 1. */
static int parse_arguments(int argc, char **argv, uint64_t *seed, int *stop) {
    for (int i = 1; i < argc; i++) {
        char *end = NULL;
        if (strcmp(argv[i], "--help") == 0) {
            fputs(HELP, stdout);
            return 1;
        }
        if (strcmp(argv[i], "--stop") == 0) {
            *stop = 1;
        } else if (strcmp(argv[i], "--seed") == 0 && i + 1 < argc) {
            *seed = strtoull(argv[++i], &end, 10);
            if (argv[i][0] < '0' || argv[i][0] > '9' || *end) {
                fprintf(stderr, "diffenc: check: --seed %s: expected a whole number\n", argv[i]);
                return 3;
            }
        } else {
            const int known = strcmp(argv[i], "--seed") == 0;
            fprintf(stderr, "diffenc: check: %s %s (see diffenc check --help)\n", known ? "no value for" : "unknown option",
                    argv[i]);
            return 3;
        }
    }
    return 0;
}

int check_main(int argc, char **argv) {
    uint64_t seed = 1;
    int stop = 0, stopped = 0, total_proofs = 0, claims = 0, failed = 0;
    const int parsed = parse_arguments(argc, argv, &seed, &stop);
    if (parsed)
        return parsed - 1;
    for (int i = 0; i < PROOF_COUNT; i++)
        total_proofs += variants_of(&PROOFS[i]);
    if (!DOUBLE)
        printf("Single precision: limits are what its rounding leaves. `make check` proves more, in double precision.\n");
#pragma omp parallel for ordered schedule(dynamic, 1)
    for (int i = 0; i < total_proofs; i++) {
        Report r = {.count = 0};
        int variant, skip;
        const Proof *p = proof_at(i, &variant);
#pragma omp atomic read
        skip = stopped;
        if (!skip)
            p->prove(&r, variant, seed);
#pragma omp ordered
        {   /* in the order of the table, whichever is done first */
            if (!(stop && failed))
                print_report(p, &r, &claims, &failed);
#pragma omp atomic write
            stopped = stop && failed;
        }
    }
    printf("%d claims, %d failed\n", claims, failed);
    return failed > 0;
}
