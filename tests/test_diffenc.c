/* test_diffenc.c - every function of diffenc.c against the equation it stands for, in plain double.
 *
 * What the networks answer is taken as given here (test_nn.c looks after it); everything around them is
 * computed a second time. The posterior q(z_s | z_t, x) comes from Bayes' rule and not from the paper's
 * closed form. In double the derivatives, dy/dlambda and the gradient of the whole loss, are held against
 * central differences. */

#include "../diffenc.h"
#include "test.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

static const double EPS = sizeof(real) == sizeof(float) ? FLT_EPSILON : DBL_EPSILON;
static const int IN_DOUBLE = sizeof(real) == sizeof(double);

enum { HEIGHT = 4, WIDTH = 6, D = HEIGHT * WIDTH };   /* one channel; small enough for one U-Net level */

static double worse(double worst, double got, double want, double tolerance) {
    const double ratio = got == want ? 0 : fabs(got - want) / tolerance;
    return ratio <= worst ? worst : ratio >= 0 ? ratio : INFINITY;
}

static int close_to(double got, double want, double tolerance) {
    return worse(0, got, want, tolerance) <= 1;
}

/* Single numbers are computed in double in either build: gammas and what is made of them, and the losses'
 * sums. */
static const double NUMBER = 32 * DBL_EPSILON;   /* relative: a few roundings, exponentials of up to 13 */

static double number_of(const Tensor *a) {
    return a->number_value;
}

/* What elementwise operators made is there in double, too. */
static double element(const Tensor *a, size_t i) {
    return a->wide ? a->wide[i] : (double)a->value[i];
}

static double sigmoid(double u) {
    return 1 / (1 + exp(-u));
}

/* ---- a small model to test with ---- */

typedef struct {
    char name[64];            /* "diffenc-1-1 v" */
    Model model;
    Workers workers;
    Method m;
    double gamma_min, range;  /* b and |w| */
    unsigned char k[D];
    real x[D], eps[D], eps_0[D];
} Case;

static void normals(real *x, size_t count, uint32_t example, double deviation) {
    random_normal(random_stream(11, RANDOM_CHECK, 2, example), x, count);
    for (size_t i = 0; i < count; i++)
        x[i] = (real)(deviation * (double)x[i]);
}

/* A model with random numbers everywhere, also where it would start at zero. A learned schedule gets a
 * negative w, whose magnitude counts, and end points of its own. */
static void case_new(Case *c, const char *name, NetKind net, Prediction prediction, ScheduleKind schedule,
                     int timesteps, double variance_ratio) {
    Config config = config_default();
    Error error = {""};
    static const char *const predictions[3] = {"v", "eps", "x"};
    memset(c, 0, sizeof *c);
    int status = config_parse_model(&config, name, &error);
    config.net = net, config.prediction = prediction, config.schedule = schedule;
    config.timesteps = timesteps, config.variance_ratio = variance_ratio;
    config.height = HEIGHT, config.width = WIDTH, config.channels = 4, config.encoder_channels = 4;
    status = status || model_new(&c->model, &config, 4, &error);
    CHECK(status == 0, "%s: %s", name, error.text);
    if (status)
        exit(test_report());
    snprintf(c->name, sizeof c->name, "%s %s%s%s", name, predictions[prediction],
             schedule == SCHEDULE_LEARNED ? " learned" : "", timesteps ? " finite" : "");
    for (int i = 0; i < c->model.parameter_count; i++) {
        const Parameter *p = &c->model.parameter[i];
        real *w = c->model.params + p->offset;
        normals(w, p->count, (uint32_t)(1000 + i), p->rank > 1 ? 1 / sqrt((double)p->taps * p->in) : 0.3);
        for (size_t j = 0; j < p->count && strstr(p->name, "scale"); j++)
            w[j] += 1;
    }
    c->gamma_min = config.gamma_min;
    c->range = config.gamma_max - config.gamma_min;
    if (schedule == SCHEDULE_LEARNED) {
        real *b = c->model.params + c->model.parameter[c->model.gamma_first].offset;
        b[0] = (real)-9.7, b[1] = (real)-13.9;
        c->gamma_min = (double)b[0];
        c->range = fabs((double)b[1]);
    }
    workers_new(&c->workers, &c->model, 1);
    normals(c->eps, D, 1, 1), normals(c->eps_0, D, 2, 1);
    for (int i = 0; i < D; i++) {
        const uint32_t bits = random_bits(random_stream(11, RANDOM_CHECK, 3, 0), (uint32_t)i);
        c->k[i] = (unsigned char)(i == 0 ? 0 : i == 1 ? 255 : bits);
        c->x[i] = (real)(2 * (c->k[i] + 0.5) / 256 - 1);
    }
}

static void case_free(Case *c) {
    workers_free(&c->workers);
    model_free(&c->model);
}

/* A new graph; gradients go to `gradient` unless that is NULL. */
static const Method *restart(Case *c, real *gradient) {
    Network *n = &c->workers.network[0];
    n->weights = c->model.params;
    n->flipped = NULL;
    n->gradient = gradient;
    network_begin(n);
    c->m = method_begin(n);
    return &c->m;
}

static void set_dropout(Case *c, double rate) {
    c->workers.network[0].graph.dropout = rate;
    c->workers.network[0].graph.dropout_stream = random_stream(11, RANDOM_DROPOUT, 0, 0);
}

static Tensor *image(const Method *m, const real *values) {
    return constant(m->graph, HEIGHT, WIDTH, 1, values);
}

/* got against want, each within its tolerance. */
static void check_image(const Case *c, const char *what, const Tensor *got, const double *want,
                        const double *tolerance) {
    double worst = 0;
    CHECK(got->height == HEIGHT && got->width == WIDTH && got->channels == 1, "%s: %s: shape", c->name, what);
    for (int i = 0; i < D; i++)
        worst = worse(worst, got->value[i], want[i], tolerance[i]);
    CHECK(worst <= 1, "%s: %s: %.3g tolerances", c->name, what, worst);
}

/* ---- section 3 of the design, in double ---- */

typedef struct { double gamma, alpha, sigma; } Moment;

static Moment moment_of_gamma(double gamma) {
    const Moment m = {gamma, sqrt(sigmoid(-gamma)), sqrt(sigmoid(gamma))};
    return m;
}

static Moment moment_at(const Case *c, double t) {
    return moment_of_gamma(c->gamma_min + c->range * t);
}

/* Bayes: the prior z_s ~ N(alpha_s x_s, sigma_s^2) and the likelihood
 * z_t ~ N(alpha_ts z_s + alpha_t (x_t - x_s), sigma_ts^2). */
typedef struct { double mean, variance; } Gaussian;

static Gaussian posterior(Moment s, Moment t, double x_s, double x_t, double z_t) {
    const double alpha_ts = t.alpha / s.alpha, variance_s = s.sigma * s.sigma;
    const double variance_ts = t.sigma * t.sigma * -expm1(s.gamma - t.gamma);
    const double precision = 1 / variance_s + alpha_ts * alpha_ts / variance_ts;
    const double weighted =
        s.alpha * x_s / variance_s + alpha_ts * (z_t - t.alpha * (x_t - x_s)) / variance_ts;
    const Gaussian q = {weighted / precision, 1 / precision};
    return q;
}

/* p(z_s | z_t): VDM's is the posterior of an image x^ that does not move; the others add the counterterm. */
static Gaussian generative(const Case *c, Moment s, Moment t, double x_hat, double z_t) {
    Gaussian p = posterior(s, t, x_hat, x_hat, z_t);
    if (c->model.config.kind != VDM)
        p.mean += s.alpha * (t.gamma - s.gamma) * t.sigma * t.sigma * x_hat;   /* lambda_s - lambda_t */
    p.variance /= c->model.config.variance_ratio;
    return p;
}

/* KL of two Gaussians of one dimension. */
static double kl(Gaussian q, Gaussian p) {
    return 0.5 * (q.variance / p.variance - 1 - log(q.variance / p.variance))
           + 0.5 * (q.mean - p.mean) * (q.mean - p.mean) / p.variance;
}

static double x_of(Prediction prediction, Moment t, double output, double z_t) {
    return prediction == PREDICT_V ? t.alpha * z_t - t.sigma * output
         : prediction == PREDICT_EPS ? (z_t - t.sigma * output) / t.alpha : output;
}

/* What the network would have to answer for x^. */
static double output_of(Prediction prediction, Moment t, double x_hat, double z_t) {
    return prediction == PREDICT_V ? (t.alpha * z_t - x_hat) / t.sigma
         : prediction == PREDICT_EPS ? (z_t - t.alpha * x_hat) / t.sigma : x_hat;
}

static double level(int k) {
    return 2 * (k + 0.5) / 256 - 1;
}

static double level_loss(double u, int k, double gamma_0) {
    double logit[256], top = -INFINITY, sum = 0;
    for (int c = 0; c < 256; c++) {
        logit[c] = -(u - level(c)) * (u - level(c)) / (2 * exp(gamma_0));
        top = fmax(top, logit[c]);
    }
    for (int c = 0; c < 256; c++)
        sum += exp(logit[c] - top);
    return top + log(sum) - logit[k];
}

/* Fourth-order central difference from the values at -2, -1, 1, 2 steps. */
static double central(const double value[4], double step) {
    return (8 * (value[2] - value[1]) - (value[3] - value[0])) / (12 * step);
}
static const double STENCIL[4] = {-2, -1, 1, 2};

/* ---- pixels and schedule ---- */

static void test_pixels(Case *c) {
    const Method *m = restart(c, NULL);
    const Tensor *x = scale_pixels(m, c->k);
    double want[D], tolerance[D];
    for (int i = 0; i < D; i++)
        want[i] = 2 * (c->k[i] + 0.5) / 256 - 1, tolerance[i] = 0;   /* multiples of 1/256: exact */
    check_image(c, "scale_pixels", x, want, tolerance);
    CHECK(x->value[0] == -1 + 1.0 / 256 && x->value[1] == 1 - 1.0 / 256,
          "%s: the darkest and the brightest pixel", c->name);
}

static void test_schedule(Case *c) {
    for (int i = 0; i <= 20; i++) {
        const Method *m = restart(c, NULL);
        const double t = i / 20.0;
        Tensor *gamma = gamma_at(m, t);
        const Moment at = moment_at(c, t);
        const double alpha2 = at.alpha * at.alpha, sigma2 = at.sigma * at.sigma, snr = exp(-at.gamma);
        CHECK(close_to(number_of(gamma), at.gamma, NUMBER * (fabs(c->gamma_min) + c->range)),
              "%s: gamma(%g) = %.17g", c->name, t, number_of(gamma));
        CHECK(gamma->value[0] == (real)number_of(gamma), "%s: gamma(%g) as a real", c->name, t);
        CHECK(close_to(number_of(alpha_of(gamma)), at.alpha, NUMBER * at.alpha), "%s: alpha at %g", c->name,
              t);
        CHECK(close_to(number_of(sigma_of(gamma)), at.sigma, NUMBER * at.sigma), "%s: sigma at %g", c->name,
              t);
        CHECK(close_to(number_of(alpha_squared(gamma)), alpha2, NUMBER * alpha2), "%s: alpha^2 at %g",
              c->name, t);
        CHECK(close_to(number_of(sigma_squared(gamma)), sigma2, NUMBER * sigma2), "%s: sigma^2 at %g",
              c->name, t);
        CHECK(close_to(number_of(snr_of(gamma)), snr, NUMBER * snr), "%s: SNR at %g", c->name, t);
        CHECK(close_to(alpha2 + sigma2, 1, NUMBER) && close_to(alpha2 / sigma2, snr, NUMBER * snr),
              "SNR = alpha^2/sigma^2, alpha^2 + sigma^2 = 1");
    }
    const Method *m = restart(c, NULL);
    CHECK(close_to(number_of(gamma_at(m, 0)), c->gamma_min, 0), "%s: gamma(0) is gamma_min", c->name);
    CHECK(close_to(number_of(time_by_lambda(m)), -1 / c->range, NUMBER / c->range), "%s: dt/dlambda",
          c->name);
}

/* ---- the encoder ---- */

static void encoder_output(Case *c, double t, double y[D]) {
    const Method *m = restart(c, NULL);
    const Tensor *out = encoder_network(m->network, image(m, c->x), t, NULL);
    for (int i = 0; i < D; i++)
        y[i] = out->value[i];
}

/* dy/dlambda by differences in t, where the embedding turns by up to 1000 radians a unit: the error of a step
 * h is (1000 h)^4 / 30 of the derivative, nothing at 1e-6, and rounding leaves 1e-16 / h = 1e-10. (A larger
 * step would also meet the places where max-pooling passes from one pixel to another.) */
static void encoder_difference(Case *c, double t, double y_dot[D]) {
    const double step = 1e-6;
    double y[4][D];
    for (int i = 0; i < 4; i++)
        encoder_output(c, t + STENCIL[i] * step, y[i]);
    for (int i = 0; i < D; i++) {
        const double value[4] = {y[0][i], y[1][i], y[2][i], y[3][i]};
        y_dot[i] = central(value, step) / -c->range;
    }
}

static void test_encode(Case *c, double t) {
    const ModelKind kind = c->model.config.kind;
    double y[D] = {0}, y_dot[D] = {0}, want[D], tolerance[D], tolerance_with[D], largest = 0;
    if (kind == DIFFENC) {
        encoder_output(c, t, y);
        encoder_difference(c, t, y_dot);
    }
    const Method *m = restart(c, NULL);
    const Moment at = moment_at(c, t);
    const double alpha2 = at.alpha * at.alpha, sigma2 = at.sigma * at.sigma;
    const Encoded plain = encode(m, image(m, c->x), t, 0), with = encode(m, image(m, c->x), t, 1);
    for (int i = 0; i < D; i++) {
        want[i] = kind == VDM ? (double)c->x[i] : alpha2 * (double)c->x[i] + sigma2 * y[i];
        tolerance[i] = kind == VDM ? 0 : 4 * EPS;
        tolerance_with[i] = kind == VDM ? 0 : 20 * EPS;
    }
    check_image(c, "x_t", plain.x_t, want, tolerance);
    check_image(c, "x_t, with derivative", with.x_t, want, tolerance_with);
    CHECK(!plain.y_dot && !plain.x_t->tangent && !with.x_t->tangent, "%s: x_t has no tangent", c->name);
    CHECK(!plain.y == (kind != DIFFENC) && !with.y_dot == (kind != DIFFENC),
          "%s: y where there is an encoder", c->name);
    if (kind == DIFFENC) {
        CHECK(!with.y->tangent && !with.y_dot->tangent, "%s: y has no tangent once it was taken", c->name);
        memset(tolerance, 0, sizeof tolerance);
        check_image(c, "y", plain.y, y, tolerance);
        for (int i = 0; i < D; i++)   /* with tangents some sums may run in another order */
            tolerance[i] = 16 * EPS;
        check_image(c, "y, with derivative", with.y, y, tolerance);
        for (int i = 0; i < D; i++)
            largest = fmax(largest, fabs(y_dot[i]));
        for (int i = 0; i < D; i++)
            tolerance[i] = 1e-8 * largest;
        CHECK(largest > 1e-3 || !IN_DOUBLE, "%s: dy/dlambda is not zero", c->name);
        if (IN_DOUBLE)
            check_image(c, "dy/dlambda", with.y_dot, y_dot, tolerance);
    }
    /* dx_t/dlambda by the product rule: d alpha^2/dlambda = alpha^2 sigma^2 = -d sigma^2/dlambda. */
    for (int i = 0; i < D; i++) {
        const double dot = kind == DIFFENC ? (double)with.y_dot->value[i] : 0;
        want[i] = kind == VDM ? 0 : alpha2 * sigma2 * ((double)c->x[i] - y[i]) + sigma2 * dot;
        tolerance[i] = (8 * EPS + NUMBER) * sigma2 * (1 + fabs(y[i]) + fabs(dot));
    }
    check_image(c, "dx_t/dlambda", exact_counterterm(m, with, gamma_at(m, t)), want, tolerance);
}

/* ---- forward process and prediction ---- */

static void test_forward(Case *c, double t) {
    const Method *m = restart(c, NULL);
    Tensor *gamma = gamma_at(m, t), *x = image(m, c->x), *eps = image(m, c->eps);
    const Moment at = moment_at(c, t);
    Tensor *z = diffuse(x, gamma, eps), *v = v_target(x, gamma, eps);
    double want_z[D], want_v[D], want_x[D], tolerance[D];
    for (int i = 0; i < D; i++) {
        const double xi = c->x[i], e = c->eps[i];
        want_z[i] = at.alpha * xi + at.sigma * e;
        want_v[i] = at.alpha * e - at.sigma * xi;
        tolerance[i] = 4 * EPS * (fabs(xi) + fabs(e));
    }
    check_image(c, "z_t", z, want_z, tolerance);
    check_image(c, "v_t", v, want_v, tolerance);
    const Prediction prediction = c->model.config.prediction;
    Tensor *output = image(m, c->eps_0);   /* any answer */
    for (int i = 0; i < D; i++) {
        want_x[i] = x_of(prediction, at, c->eps_0[i], z->value[i]);
        tolerance[i] = 4 * EPS * (fabs((double)z->value[i]) + fabs((double)c->eps_0[i])) / at.alpha;
    }
    check_image(c, "x^", x_from_output(m, output, z, gamma), want_x, tolerance);
    /* The right answer leads back to x. */
    Tensor *truth = prediction == PREDICT_V ? v : prediction == PREDICT_EPS ? eps : x;
    const Tensor *back = x_from_output(m, truth, z, gamma);
    for (int i = 0; i < D; i++) {
        want_x[i] = c->x[i];
        tolerance[i] = 8 * EPS * (fabs((double)c->x[i]) + fabs((double)c->eps[i])) / at.alpha;
    }
    check_image(c, "x from the true output", back, want_x, tolerance);

    const Predicted p = predict(m, z, t);
    const Tensor *alone = score_network(m->network, z, t);
    CHECK(memcmp(p.output->value, alone->value, D * sizeof(real)) == 0, "%s: the output is the network's",
          c->name);
    for (int i = 0; i < D; i++) {
        want_x[i] = x_of(prediction, at, alone->value[i], z->value[i]);
        tolerance[i] = 4 * EPS * (fabs((double)z->value[i]) + fabs((double)alone->value[i])) / at.alpha;
    }
    check_image(c, "x^ of the network", p.x_hat, want_x, tolerance);
}

/* ---- continuous time ---- */

/* r at one pixel, for any answer. */
static double residual(const Case *c, Moment t, double x_t, double y, double y_dot, double output, double z_t,
                       double eps) {
    const Prediction prediction = c->model.config.prediction;
    const double x_hat = x_of(prediction, t, output, z_t), v = t.alpha * eps - t.sigma * x_t;
    const double bracket = c->model.config.kind == VDM ? 0
                         : x_hat - x_t + (c->model.config.kind == DIFFENC ? y - y_dot : 0);
    return prediction == PREDICT_V ? v - output + t.sigma * bracket
         : prediction == PREDICT_EPS ? eps - output + t.alpha * t.sigma * bracket
         : x_hat - x_t + t.sigma * t.sigma * bracket;
}

static double weight_of(Prediction prediction, Moment t) {
    return prediction == PREDICT_V ? t.alpha * t.alpha : prediction == PREDICT_EPS ? 1 : exp(-t.gamma);
}

/* r and the loss for an arbitrary answer of the network; returns the loss. */
static double test_continuous(Case *c, double t, const double x_hat[D]) {
    const Prediction prediction = c->model.config.prediction;
    const int trained = c->model.config.kind == DIFFENC;
    const Method *m = restart(c, NULL);
    Tensor *gamma = gamma_at(m, t), *eps = image(m, c->eps);
    const Encoded e = encode(m, image(m, c->x), t, 1);
    Tensor *z = diffuse(e.x_t, gamma, eps);
    const Moment at = moment_at(c, t);
    real answer[D];
    for (int i = 0; i < D; i++)
        answer[i] = (real)output_of(prediction, at, x_hat[i], z->value[i]);
    Tensor *output = image(m, answer);
    const Predicted p = {output, x_from_output(m, output, z, gamma)};
    Tensor *r = continuous_residual(m, e, p, gamma, eps), *loss = continuous_loss(m, r, gamma);
    double want[D], tolerance[D], sum = 0, sum_tolerance = 0;
    for (int i = 0; i < D; i++) {
        const double x_t = e.x_t->value[i], y = trained ? (double)e.y->value[i] : 0;
        const double y_dot = trained ? (double)e.y_dot->value[i] : 0;
        want[i] = residual(c, at, x_t, y, y_dot, answer[i], z->value[i], c->eps[i]);
        const double size = fabs(x_t) + fabs(y) + fabs(y_dot) + fabs((double)answer[i]);
        tolerance[i] = 8 * EPS * (size + fabs((double)z->value[i]) + fabs((double)c->eps[i])) / at.alpha;
        sum += want[i] * want[i];
        sum_tolerance += 2 * fabs(want[i]) * tolerance[i];
        /* The shorter form for v-prediction. */
        if (prediction == PREDICT_V && c->model.config.kind != VDM) {
            const double v = at.alpha * (double)c->eps[i] - at.sigma * x_t;
            const double z_t =
                at.alpha * x_t + at.sigma * (double)c->eps[i]; /* without the program's rounding */
            const double shorter =
                (1 + at.sigma * at.sigma) * (v - (double)answer[i]) + at.sigma * (y - y_dot);
            CHECK(close_to(residual(c, at, x_t, y, y_dot, answer[i], z_t, c->eps[i]), shorter,
                           1e-13 * (1 + fabs(shorter))),
                  "%s: the two forms of r agree", c->name);
        }
    }
    check_image(c, "r", r, want, tolerance);
    const double weight = 0.5 * c->range * weight_of(prediction, at);
    CHECK(close_to(number_of(loss), weight * sum, weight * (sum_tolerance + NUMBER * sum)),
          "%s: L_inf at %g is %.9g, not %.9g", c->name, t, number_of(loss), weight * sum);
    return number_of(loss);
}

/* The three predictions say the same in different words: for the same x^ their losses are equal. */
static void test_predictions_agree(const char *name, double t) {
    double loss[3], x_hat[D];
    real noise[D];
    normals(noise, D, 20, 0.5);
    for (int p = 0; p < 3; p++) {
        Case c;
        case_new(&c, name, NET_FLAT, (Prediction)p, SCHEDULE_FIXED, 0, 1);
        for (int i = 0; i < D; i++)
            x_hat[i] = (double)c.x[i] + (double)noise[i];
        loss[p] = test_continuous(&c, t, x_hat);
        case_free(&c);
    }
    /* What divides by sigma or alpha magnifies roundings, and so does SNR. */
    const Moment at = moment_of_gamma(-13.3 + 18.3 * t);
    const double tolerance = 100 * EPS * loss[0] / (at.alpha * at.sigma);
    CHECK(close_to(loss[1], loss[0], tolerance) && close_to(loss[2], loss[0], tolerance),
          "%s at %g: v %.9g, eps %.9g, x %.9g", name, t, loss[0], loss[1], loss[2]);
}

/* ---- finite time ---- */

/* ||mu_P - mu_Q||^2 / sigma_Q^2 and the KL, from the Gaussians themselves; *tolerance for the former. */
static double distance_of(const Case *c, double s, double t, const Encoded *at_s, const Encoded *at_t,
                          const Tensor *x_hat, const Tensor *z, double *divergence, double *tolerance) {
    const Moment ms = moment_at(c, s), mt = moment_at(c, t);
    double sum = 0;
    *divergence = *tolerance = 0;
    for (int i = 0; i < D; i++) {
        const double x_s = at_s->x_t->value[i], x_t = at_t->x_t->value[i], x = x_hat->value[i];
        const Gaussian q = posterior(ms, mt, x_s, x_t, z->value[i]),
                       p = generative(c, ms, mt, x, z->value[i]);
        const double difference = p.mean - q.mean;
        /* The program subtracts numbers of these sizes; each is a real, rounded a few times. */
        const double size = (-expm1(ms.gamma - mt.gamma) + (mt.gamma - ms.gamma)) * (fabs(x) + fabs(x_t));
        const double off = 4 * EPS * (size + fabs(x_s) + fabs(x_t));
        sum += difference * difference / q.variance;
        *tolerance += ms.alpha * off * (2 * fabs(difference) + ms.alpha * off) / q.variance;
        *divergence += kl(q, p);
    }
    return sum;
}

static void test_finite(Case *c, double s, double t) {
    const double w = c->model.config.variance_ratio;
    const Method *m = restart(c, NULL);
    Tensor *x = image(m, c->x), *eps = image(m, c->eps);
    const Encoded at_s = encode(m, x, s, 0), at_t = encode(m, x, t, 0);
    Tensor *z = diffuse(at_t.x_t, gamma_at(m, t), eps);
    const Predicted p = predict(m, z, t);
    Tensor *distance = step_distance(m, at_s, at_t, p, s, t);
    double divergence, tolerance;
    const double want = distance_of(c, s, t, &at_s, &at_t, p.x_hat, z, &divergence, &tolerance);
    /* In double the Gaussians' own difference of means is what limits the comparison. */
    tolerance += 1e-10 * want;
    CHECK(close_to(number_of(distance), want, tolerance),
          "%s: distance of the step %g to %g is %.9g, not %.9g", c->name, t, s, number_of(distance), want);
    CHECK(number_of(distance_at(m, x, eps, s, t)) == number_of(distance), "%s: distance_at", c->name);
    CHECK(close_to(number_of(step_kl(m, distance, w)), divergence, w * tolerance + 1e-10 * fabs(divergence)),
          "%s: KL of the step %g to %g is %.9g, not %.9g", c->name, t, s, number_of(step_kl(m, distance, w)),
          divergence);
    /* The best variance: w* = 1 / (1 + distance / d), and there the KL is -(d/2) log w*. */
    const double best = 1 / (1 + number_of(distance) / D), least = -(D / 2.0) * log(best);
    CHECK(close_to(number_of(step_kl(m, distance, best)), least, NUMBER * (D + least)),
          "%s: KL at the best variance", c->name);
    CHECK(number_of(step_kl(m, distance, best * 1.1)) > least &&
              number_of(step_kl(m, distance, best * 0.9)) > least,
          "%s: the best variance is the best", c->name);
}

/* T KL of the step t -> t - 1/T goes to the continuous loss at t, with an error of first order in 1/T; under
 * dropout too, because one mask serves all times of an example. The encoder turns up to 1000 radians a unit
 * of time, so that 1/T must lie well below 1/1000; rounding leaves 1e-16 T = 2e-9. */
static void test_limit(Case *c, double t, double dropout) {
    double error[2];
    set_dropout(c, dropout);
    const Method *m = restart(c, NULL);
    Tensor *eps = image(m, c->eps), *gamma = gamma_at(m, t);
    const Encoded e = encode(m, image(m, c->x), t, 1);
    const Predicted p = predict(m, diffuse(e.x_t, gamma, eps), t);
    const double limit = number_of(continuous_loss(m, continuous_residual(m, e, p, gamma, eps), gamma));
    for (int i = 0; i < 2; i++) {
        const double steps = i ? 2e7 : 2e6;
        m = restart(c, NULL);
        const Tensor *distance = distance_at(m, image(m, c->x), image(m, c->eps), t - 1 / steps, t);
        error[i] = steps * number_of(distance) / 2 - limit;
    }
    set_dropout(c, 0);
    CHECK(fabs(error[0]) < 0.005 * limit, "%s: T KL at T = 2e6 is off the limit %.9g by %.3g", c->name, limit,
          error[0]);
    CHECK(fabs(error[1] - error[0] / 10) < 0.01 * fabs(error[0]) + 1e-8 * limit,
          "%s: ten times the steps, error %.3g after %.3g", c->name, error[1], error[0]);
}

/* ---- the other two terms ---- */

static void test_reconstruction(Case *c) {
    const Method *m = restart(c, NULL);
    const double gamma_0 = c->gamma_min, precision = exp(-gamma_0);
    static const double noise[4] = {0, 1, 10, 200};   /* far beyond what eps_0 will be */
    for (int n = 0; n < 4; n++) {
        real eps[D];
        double want = 0, tolerance = 0;
        for (int i = 0; i < D; i++) {
            eps[i] = (real)(noise[n] * (double)c->eps_0[i]);
            const double u = (double)c->x[i] + exp(gamma_0 / 2) * (double)eps[i],
                         value = level_loss(u, c->k[i], gamma_0);
            want += value;
            /* u is rounded; the slope of the value is at most precision times the distance of k from u. */
            tolerance += 4 * EPS * (1 + fabs(u)) * (precision * fabs(u - (double)c->x[i]) + precision / 128);
            tolerance += 16 * EPS * (1 + value + precision * (u - (double)c->x[i]) * (u - (double)c->x[i]));
        }
        const Tensor *loss = reconstruction_loss(m, c->k, image(m, c->x), image(m, eps));
        CHECK(close_to(number_of(loss), want, tolerance),
              "%s: reconstruction with %g times the noise: %.9g, not %.9g", c->name, noise[n],
              number_of(loss), want);
    }
}

static void test_latent(Case *c) {
    const Method *m = restart(c, NULL);
    const Moment at = moment_at(c, 1);
    const Gaussian standard = {0, 1};
    double want = 0;
    for (int i = 0; i < D; i++) {
        const Gaussian q = {at.alpha * (double)c->x[i], at.sigma * at.sigma};
        want += kl(q, standard);
    }
    const double got = number_of(latent_loss(m, image(m, c->x)));
    CHECK(close_to(got, want, NUMBER * D), "%s: latent loss %.9g, not %.9g", c->name, got, want);
}

/* ---- the objective ---- */

/* The three terms of one example in nats, given the networks' answers, and how far roundings may take them.
 */
static void plain_objective(Case *c, double t, double term[3], double tolerance[3]) {
    const Config *config = &c->model.config;
    const int trained = config->kind == DIFFENC, finite = config->timesteps > 0;
    const double s = t - (finite ? 1.0 / config->timesteps : 0);
    double y[4][D] = {{0}}, x_at[4][D], y_dot[D] = {0}, z[D], output[D];
    const double times[4] = {0, 1, t, s};
    Moment at[4];
    for (int j = 0; j < 4; j++) {
        at[j] = moment_at(c, times[j]);
        if (trained)
            encoder_output(c, times[j], y[j]);
        for (int i = 0; i < D; i++)
            x_at[j][i] = config->kind == VDM ? (double)c->x[i] : at[j].alpha * at[j].alpha * (double)c->x[i]
                                                                 + at[j].sigma * at[j].sigma * y[j][i];
    }
    const Method *m = restart(c, NULL);
    const Encoded e = encode(m, image(m, c->x), t, !finite);
    Tensor *z_t = diffuse(e.x_t, gamma_at(m, t), image(m, c->eps));
    const Tensor *answer = score_network(m->network, z_t, t);   /* the very same z_t: it turns fast */
    for (int i = 0; i < D; i++) {
        z[i] = element(z_t, i), output[i] = element(answer, i);
        y_dot[i] = e.y_dot ? element(e.y_dot, i) : 0;
    }
    const double rounding = 16 * EPS;
    memset(term, 0, 3 * sizeof *term);
    memset(tolerance, 0, 3 * sizeof *tolerance);
    const Gaussian standard = {0, 1};
    for (int i = 0; i < D; i++) {
        const double u = x_at[0][i] + exp(at[0].gamma / 2) * (double)c->eps_0[i];
        term[0] += level_loss(u, c->k[i], at[0].gamma);
        tolerance[0] += 8 * EPS * exp(-at[0].gamma) * (fabs(u - (double)c->x[i]) + 1.0 / 128);
        const Gaussian q = {at[1].alpha * x_at[1][i], at[1].sigma * at[1].sigma};
        term[1] += kl(q, standard);
        const double x_hat = x_of(config->prediction, at[2], output[i], z[i]);
        const double size = fabs(output[i]) + fabs(z[i]) + fabs(x_at[2][i]) + fabs(y[2][i] - y_dot[i]) +
                            fabs((double)c->eps[i]);
        if (finite) {
            const Gaussian posterior_i = posterior(at[3], at[2], x_at[3][i], x_at[2][i], z[i]);
            const Gaussian generative_i = generative(c, at[3], at[2], x_hat, z[i]);
            term[2] += config->timesteps * kl(posterior_i, generative_i);
            const double off = rounding * (fabs(x_hat) + fabs(x_at[2][i]) + fabs(x_at[3][i]) + size);
            const double difference = generative_i.mean - posterior_i.mean;
            tolerance[2] += config->timesteps * (fabs(difference) + off) * off / generative_i.variance;
        } else {
            const double r = residual(c, at[2], x_at[2][i], y[2][i], y_dot[i], output[i], z[i], c->eps[i]);
            const double weight = 0.5 * c->range * weight_of(config->prediction, at[2]);
            term[2] += weight * r * r;
            tolerance[2] += weight * rounding * (r * r + fabs(r) * size);
        }
    }
    tolerance[0] += 16 * EPS * (term[0] + D);
    tolerance[1] = 8 * EPS * term[1] + NUMBER * D;   /* x_1 is rounded */
    tolerance[2] += rounding * fabs(term[2]) + 1e-10 * fabs(term[2]);
}

static void test_objective(Case *c, double t) {
    double term[3], tolerance[3];
    plain_objective(c, t, term, tolerance);
    const Method *m = restart(c, NULL);
    const Example example = {c->k, t, c->eps, c->eps_0};
    const LossTerms terms = objective(m, example);
    const Tensor *const got[3] = {terms.recon, terms.latent, terms.diffusion};
    static const char *const names[3] = {"reconstruction", "latent", "diffusion"};
    double sum = 0;
    for (int i = 0; i < 3; i++) {
        CHECK(close_to(number_of(got[i]), term[i], tolerance[i]),
              "%s: %s at %g is %.9g, not %.9g (within %.2g)", c->name, names[i], t, number_of(got[i]),
              term[i], tolerance[i]);
        sum += number_of(got[i]);
    }
    const double bits = number_of(bits_per_dimension(m, terms)), want = sum / (D * log(2));
    CHECK(close_to(bits, want, NUMBER * fabs(want)), "%s: %.9g bits per dimension, not %.9g", c->name, bits,
          want);
}

static void test_example_time(void) {
    static const int batches[5] = {1, 2, 7, 64, 100};
    for (int b = 0; b < 5; b++)
        for (uint32_t n = 0; n < 50; n++) {
            const int batch = batches[b];
            const double u = random_uniform(random_stream(11, RANDOM_TIME, 0, (uint32_t)b), n);
            int hit[100] = {0}, each = 1, inside = 1;
            for (int i = 0; i < batch; i++) {
                const double t = example_time(u, i, batch, 0);
                inside &= t >= 0 && t < 1 && fabs(remainder(t - u - (double)i / batch, 1)) < 1e-15 * 4;
                if (inside)
                    hit[(int)(t * batch)]++;
            }
            for (int i = 0; i < batch; i++)
                each &= hit[i] == 1;
            CHECK(inside, "batch %d: times are (u + i/B) mod 1", batch);
            CHECK(each, "batch %d: each of %d equal parts of [0, 1) has one time", batch, batch);
        }
    static const int steps[5] = {1, 2, 5, 20, 50};
    for (int s = 0; s < 5; s++)
        for (uint32_t n = 0; n < 50; n++) {
            const int T = steps[s], batch = 100;   /* a multiple of every T */
            const double u = random_uniform(random_stream(11, RANDOM_TIME, 1, (uint32_t)s), n);
            int hit[51] = {0}, multiples = 1, even = 1;
            for (int i = 0; i < batch; i++) {
                const double t = example_time(u, i, batch, T), exact = example_time(u, i, batch, 0);
                const int step = (int)(t * T + 0.5);
                multiples &= step >= 1 && step <= T && t == (double)step / T && t >= exact &&
                             t - exact < 1.0 / T + 1e-15;
                if (multiples)
                    hit[step]++;
            }
            for (int i = 1; i <= T; i++)
                even &= hit[i] == batch / T;
            CHECK(multiples, "T %d: times are the next multiples of 1/T in (0, 1]", T);
            CHECK(even, "T %d: every step is drawn equally often", T);
        }
    CHECK(example_time(0, 0, 1, 10) == 0.1 && example_time(0, 0, 1, 1) == 1,
          "t = 0 belongs to the first step");
    CHECK(example_time(0, 0, 1, 0) == 0, "in continuous time 0 is 0");
    const double last = example_time(1 - DBL_EPSILON / 2, 0, 1, 0);
    CHECK(last < 1 && example_time(1 - DBL_EPSILON / 2, 3, 7, 0) < 1, "never 1");
}

/* ---- sampling ---- */

static void test_sampler(Case *c, double s, double t) {
    const Method *m = restart(c, NULL);
    const Moment ms = moment_at(c, s), mt = moment_at(c, t);
    Tensor *z = image(m, c->eps_0), *noise = image(m, c->eps);
    const Predicted p = predict(m, z, t);
    const Tensor *mean = generative_mean(m, z, p.x_hat, s, t), *step = ancestral_step(m, z, s, t, noise);
    const double variance = number_of(generative_variance(m, s, t));
    double want_mean[D], want_step[D], tolerance[D], want_variance = 0;
    for (int i = 0; i < D; i++) {
        const Gaussian want = generative(c, ms, mt, p.x_hat->value[i], z->value[i]);
        want_variance = want.variance;
        want_mean[i] = want.mean;
        want_step[i] = want.mean + sqrt(want.variance) * (double)c->eps[i];
        tolerance[i] = 8 * EPS * (fabs((double)z->value[i]) + fabs((double)c->eps[i])
                                  + (1 + mt.gamma - ms.gamma) * fabs((double)p.x_hat->value[i]));
    }
    check_image(c, "mu_P", mean, want_mean, tolerance);
    CHECK(close_to(variance, want_variance, 1e-12 * want_variance), "%s: sigma_P^2 is %.9g, not %.9g",
          c->name, variance, want_variance);
    check_image(c, "z_s", step, want_step, tolerance);
}

static void test_decode(Case *c) {
    const Method *m = restart(c, NULL);
    const Moment at = moment_at(c, 0);
    real z[D];
    unsigned char k[D];
    int right = 1;
    for (int n = 0; n < 20; n++) {
        normals(z, D, (uint32_t)(30 + n), n < 15 ? 0.6 : 3);
        decode_pixels(m, image(m, z), NULL, k);
        for (int i = 0; i < D; i++) {
            double least = INFINITY;
            const double u = (double)z[i] / at.alpha;
            for (int level_k = 0; level_k < 256; level_k++)
                least = fmin(least, fabs(u - level(level_k)));
            right &= fabs(u - level(k[i])) <= least + 4 * EPS * (1 + fabs(u));
        }
    }
    CHECK(right, "%s: decoded pixels are the most likely ones", c->name);
    decode_pixels(m, mul(image(m, c->x), alpha_of(gamma_at(m, 0))), NULL, k);
    CHECK(memcmp(k, c->k, D) == 0, "%s: alpha_0 x decodes to its pixels", c->name);

    /* Evenly spread uniform numbers: each level as often as its probability says, within one, and within what
     * rounding z does to 12000 draws: EPS precision times the spacing of the levels each. */
    enum { ROUNDS = 500 };
    int drawn[256] = {0};
    double worst = 0, u[D];
    for (int i = 0; i < D; i++)
        z[i] = (real)0.1234;
    for (int r = 0; r < ROUNDS; r++) {
        for (int i = 0; i < D; i++)
            u[i] = (r * D + i + 0.5) / (ROUNDS * D);
        restart(c, NULL);
        decode_pixels(&c->m, image(&c->m, z), u, k);
        for (int i = 0; i < D; i++)
            drawn[k[i]]++;
    }
    for (int level_k = 0; level_k < 256; level_k++)
        worst = worse(worst, drawn[level_k],
                      ROUNDS * D * exp(-level_loss((double)z[0] / at.alpha, level_k, at.gamma)),
                      1 + ROUNDS * D * 4 * EPS * exp(-at.gamma) / 128);
    CHECK(worst <= 1, "%s: drawn pixels are off by %.3g tolerances", c->name, worst);
}

/* ---- the gradient of the whole loss ---- */

static double loss_of(Case *c, double t, real *gradient) {
    const Method *m = restart(c, gradient);
    const Example example = {c->k, t, c->eps, c->eps_0};
    Tensor *loss = bits_per_dimension(m, objective(m, example));
    if (gradient)
        backward(loss, 1);
    return number_of(loss);
}

/* Two weights of every parameter, against a difference of fourth order. sin(2 pi 128 z) bends at 800 a unit,
 * so a step h has an error of (800 h)^4 / 30 = 1e-10; rounding leaves 1e-16 / h = 1e-11 of the loss. */
static void test_gradient(Case *c, double t, double dropout) {
    set_dropout(c, dropout);
    real *gradient = allocate_zeroed(c->model.weight_count, sizeof(real));
    loss_of(c, t, gradient);
    double largest = 0;
    for (size_t i = 0; i < c->model.weight_count; i++)
        largest = fmax(largest, fabs((double)gradient[i]));
    for (int i = 0; i < c->model.parameter_count; i++) {
        const Parameter *p = &c->model.parameter[i];
        double worst = 0;
        for (uint32_t n = 0; n < 2; n++) {
            const size_t at =
                p->offset + random_bits(random_stream(11, RANDOM_CHECK, 4, (uint32_t)i), n) % p->count;
            const real kept = c->model.params[at];
            const double step = 1e-5;
            double value[4];
            for (int j = 0; j < 4; j++) {
                c->model.params[at] = (real)((double)kept + STENCIL[j] * step);
                value[j] = loss_of(c, t, NULL);
            }
            c->model.params[at] = kept;
            worst = worse(worst, gradient[at], central(value, step),
                          1e-7 * (fabs((double)gradient[at]) + 0.01 * largest));
        }
        CHECK(worst <= 1, "%s, dropout %g: gradient by %s: %.3g tolerances", c->name, dropout, p->name,
              worst);
        CHECK(dot(gradient + p->offset, gradient + p->offset, p->count) > 0, "%s: %s has a gradient", c->name,
              p->name);
    }
    set_dropout(c, 0);
    free(gradient);
}

/* ---- all cases ---- */

static void test_case(const char *name, NetKind net, Prediction prediction, ScheduleKind schedule) {
    static const double times[4] = {0.05, 0.45, 0.7, 1};
    Case c;
    case_new(&c, name, net, prediction, schedule, 0, 1);
    test_pixels(&c);
    test_schedule(&c);
    test_reconstruction(&c);
    test_latent(&c);
    test_decode(&c);
    real noise[D];
    double x_hat[D];
    normals(noise, D, 21, 0.5);
    for (int i = 0; i < D; i++)
        x_hat[i] = (double)c.x[i] + (double)noise[i];
    for (int i = 0; i < 4; i++) {
        test_encode(&c, times[i]);
        test_forward(&c, times[i]);
        test_continuous(&c, times[i], x_hat);
        test_objective(&c, times[i]);
    }
    if (IN_DOUBLE) {
        test_limit(&c, 0.45, 0);
        test_limit(&c, 0.7, 0.3);
        test_gradient(&c, schedule == SCHEDULE_LEARNED ? 0.55 : 0.8, schedule == SCHEDULE_LEARNED ? 0 : 0.3);
    }
    case_free(&c);

    static const double ratios[2] = {1, 0.8};
    for (int w = 0; w < 2; w++) {
        case_new(&c, name, net, prediction, schedule, 10, ratios[w]);
        test_finite(&c, 0.5, 0.6);
        test_finite(&c, 0, 0.1);
        test_finite(&c, 0.9, 1);
        test_finite(&c, 0.25, 0.75);
        test_sampler(&c, 0.5, 0.6);
        test_sampler(&c, 0, 0.1);
        test_sampler(&c, 0, 1);
        test_objective(&c, 0.1);
        test_objective(&c, 0.6);
        test_objective(&c, 1);
        if (IN_DOUBLE && w && schedule == SCHEDULE_LEARNED)
            test_gradient(&c, 0.6, 0);
        case_free(&c);
    }
}

int main(void) {
    static const char *const names[3] = {"vdm-1", "diffenc-1-nt", "diffenc-1-1"};
    test_example_time();
    for (int k = 0; k < 3; k++) {
        for (int p = 0; p < 3; p++)
            for (int schedule = 0; schedule < 2; schedule++)
                test_case(names[k], (k + p + schedule) % 2 ? NET_UNET : NET_FLAT, (Prediction)p,
                          (ScheduleKind)schedule);
        test_predictions_agree(names[k], 0.3);
        test_predictions_agree(names[k], 0.6);
        test_predictions_agree(names[k], 0.9);
    }
    return test_report();
}
