/* diffenc.c - floor 4: the method, whole, and nothing else.
 *
 * Written to be read beside the paper: Nielsen, Christensen, Dittadi, Winther, "DiffEnc: Variational
 * Diffusion with a Learned Encoder", ICLR 2024 [DiffEnc], which extends Kingma, Salimans, Poole, Ho,
 * "Variational Diffusion Models", 2021 [VDM]. Symbols are the papers': alpha, sigma, gamma = -lambda = -log
 * SNR, z_t, x_t, y, v, eps; 0 <= s < t <= 1. An expression such as add(mul(alpha, x), mul(sigma, eps))
 * computes at once and remembers how, so all of it can be differentiated. First the equations, in the paper's
 * order, then the three algorithms made of them: a training step, the bound on a data set, sampling. */

#include "diffenc.h"

#include <math.h>
#include <string.h>

Method method_begin(Network *network) {
    Method m = {.network = network, .graph = &network->graph, .config = &network->model->config};
    if (m.config->schedule == SCHEDULE_LEARNED) {
        Tensor *b, *w;
        schedule_parameters(network, &b, &w);
        m.gamma_min = b;
        m.gamma_range = absolute(w);
    } else {
        m.gamma_min = number(m.graph, m.config->gamma_min);
        m.gamma_range = number(m.graph, m.config->gamma_max - m.config->gamma_min);
    }
    return m;
}

static int dimension(const Method *m) {   /* d */
    return m->config->height * m->config->width * m->config->image_channels;
}

/* ---- pixels and schedule ---- */

/* x = 2 (k + 1/2)/256 - 1 */
Tensor *scale_pixels(const Method *m, const unsigned char *k) {
    return from_bytes(m->graph, m->config->height, m->config->width, m->config->image_channels, k, 2.0 / 256,
                      1.0 / 256 - 1);
}

/* gamma(t) = b + |w| t; b = gamma_min, |w| = gamma_max - gamma_min when the schedule is fixed. [VDM
 * section 3.2] */
Tensor *gamma_at(const Method *m, double t) {
    return add(m->gamma_min, affine(t, m->gamma_range, 0));
}

/* gamma_s - gamma_t = lambda_t - lambda_s, without the difference of two nearly equal numbers. */
static Tensor *gamma_difference(const Method *m, double s, double t) {
    return affine(s - t, m->gamma_range, 0);
}

/* [VDM (4), section 3.2; SNR: (2), (5)] */
Tensor *alpha_squared(Tensor *gamma) { return logistic(affine(-1, gamma, 0)); }
Tensor *sigma_squared(Tensor *gamma) { return logistic(gamma); }
Tensor *alpha_of(Tensor *gamma) { return square_root(alpha_squared(gamma)); }
Tensor *sigma_of(Tensor *gamma) { return square_root(sigma_squared(gamma)); }
Tensor *snr_of(Tensor *gamma) { return exponential(affine(-1, gamma, 0)); }

/* The networks see lambda, as (gamma_t - gamma_min)/(gamma_max - gamma_min). Both constants are those of the
 * configuration even where the end points are learned: then gradients reach them through this input, too. */
Tensor *network_time(const Method *m, Tensor *gamma_t) {
    const double low = m->config->gamma_min, range = m->config->gamma_max - low;
    return affine(1 / range, sub(gamma_t, number(m->graph, low)), 0);
}

/* ---- the encoder ---- */

/* VDM          x_t = x
 * DiffEnc-nt   x_t = alpha_t^2 x
 * DiffEnc      x_t = alpha_t^2 x + sigma_t^2 y(x, lambda_t)     [DiffEnc section 4]
 *
 * dy/dlambda at fixed x is a tangent: gamma enters the encoder with its own, dgamma/dlambda = -1. */
Encoded encode(const Method *m, Tensor *x, double t, int with_derivative) {
    Encoded e = {x, NULL, NULL};
    Tensor *gamma_t = gamma_at(m, t);
    if (m->config->kind == VDM)
        return e;
    e.x_t = mul(alpha_squared(gamma_t), x);
    if (m->config->kind == DIFFENC_NT)
        return e;
    Tensor *gamma_dot = with_derivative ? number(m->graph, -1) : NULL;
    Tensor *y = encoder_network(m->network, x, network_time(m, with_tangent(gamma_t, gamma_dot)), t > 0);
    e.y_dot = y->tangent;
    e.y = without_tangent(y);
    e.x_t = add(e.x_t, mul(sigma_squared(gamma_t), e.y));
    return e;
}

/* dx_t/dlambda = sigma_t^2 (x_t - y + dy/dlambda), for which the generative model has sigma_t^2 x^; y = 0
 * for nt, and VDM's x does not move. [DiffEnc section 4] */
Tensor *exact_counterterm(const Method *m, Encoded e, Tensor *gamma_t) {
    if (m->config->kind == VDM)
        return affine(0, e.x_t, 0);
    Tensor *rate = m->config->kind == DIFFENC ? sub(e.x_t, sub(e.y, e.y_dot)) : e.x_t;
    return mul(sigma_squared(gamma_t), rate);
}

/* How well sigma_t^2 x^ stands in for it at one draw of z_t: ||sigma_t^2 x^ - dx_t/dlambda|| /
 * ||dx_t/dlambda||, NAN for VDM. [a question to DiffEnc section 4; ours] */
double counterterm_error(const Method *m, Tensor *x, Tensor *eps, double t) {
    if (m->config->kind == VDM)
        return NAN;
    Tensor *gamma_t = gamma_at(m, t);
    const Encoded e = encode(m, x, t, 1);
    Tensor *exact = exact_counterterm(m, e, gamma_t);
    const Predicted p = predict(m, diffuse(e.x_t, gamma_t, eps), t);
    Tensor *difference = sub(mul(sigma_squared(gamma_t), p.x_hat), exact);
    return sqrt(number_of(squared_norm(difference)) / number_of(squared_norm(exact)));
}

/* ---- forward process ---- */

/* z_t = alpha_t x_t + sigma_t eps, a draw from q(z_t | x) = N(alpha_t x_t, sigma_t^2 I). [VDM (1);
 * DiffEnc section 3] */
Tensor *diffuse(Tensor *x_t, Tensor *gamma_t, Tensor *eps) {
    return add(mul(alpha_of(gamma_t), x_t), mul(sigma_of(gamma_t), eps));
}

/* v_t = alpha_t eps - sigma_t x_t     [DiffEnc section 4] */
Tensor *v_target(Tensor *x_t, Tensor *gamma_t, Tensor *eps) {
    return sub(mul(alpha_of(gamma_t), eps), mul(sigma_of(gamma_t), x_t));
}

/* ---- prediction ---- */

/* v:    x^ = alpha_t z_t - sigma_t v^            [DiffEnc section 4]
 * eps:  x^ = (z_t - sigma_t eps^) / alpha_t     [VDM (10), (29), (30)]
 * x:    x^ itself */
Tensor *x_from_output(const Method *m, Tensor *output, Tensor *z_t, Tensor *gamma_t) {
    Tensor *alpha = alpha_of(gamma_t), *sigma = sigma_of(gamma_t);
    switch (m->config->prediction) {
    case PREDICT_V: return sub(mul(alpha, z_t), mul(sigma, output));
    case PREDICT_EPS: return mul(reciprocal(alpha), sub(z_t, mul(sigma, output)));
    case PREDICT_X: break;
    }
    return output;
}

Predicted predict(const Method *m, Tensor *z_t, double t) {
    Predicted p;
    Tensor *gamma_t = gamma_at(m, t);
    p.output = score_network(m->network, z_t, network_time(m, gamma_t));
    p.x_hat = x_from_output(m, p.output, z_t, gamma_t);
    return p;
}

/* ---- diffusion loss, continuous time ---- */

/* (sigma_t^2 x^ - dx_t/dlambda) / sigma_t^2: how far off the generative model's stand-in for dx_t/dlambda is.
 * A VDM has none.
 *     nt       x^ - x_t
 *     DiffEnc  x^ - x_t + y - dy/dlambda */
static Tensor *drift_gap(const Method *m, Encoded e, Predicted p) {
    Tensor *gap = sub(p.x_hat, e.x_t);
    return m->config->kind == DIFFENC ? add(gap, sub(e.y, e.y_dot)) : gap;
}

/* v:    r = v_t - v^   + sigma_t gap                             [DiffEnc section 4; VDM: no gap]
 * eps:  r = eps - eps^ + alpha_t sigma_t gap
 * x:    r = x^ - x_t   + sigma_t^2 gap */
Tensor *continuous_residual(const Method *m, Encoded e, Predicted p, Tensor *gamma_t, Tensor *eps) {
    Tensor *alpha = alpha_of(gamma_t), *sigma = sigma_of(gamma_t), *r, *gap_factor;
    switch (m->config->prediction) {
    case PREDICT_V:
        r = sub(v_target(e.x_t, gamma_t, eps), p.output);
        gap_factor = sigma;
        break;
    case PREDICT_EPS:
        r = sub(eps, p.output);
        gap_factor = mul(alpha, sigma);
        break;
    default:
        r = sub(p.x_hat, e.x_t);
        gap_factor = sigma_squared(gamma_t);
    }
    return m->config->kind == VDM ? r : add(r, mul(gap_factor, drift_gap(m, e, p)));
}

/* L_inf at one t: 1/2 gamma'(t) weight ||r||^2, weight = alpha_t^2 (v), 1 (eps), SNR (x). [DiffEnc
 * section 3, infinite-depth limit; VDM (15), (16) for x, (17) for eps] */
Tensor *continuous_loss(const Method *m, Tensor *r, Tensor *gamma_t) {
    Tensor *loss = affine(0.5, mul(m->gamma_range, squared_norm(r)), 0);
    switch (m->config->prediction) {
    case PREDICT_V: return mul(alpha_squared(gamma_t), loss);
    case PREDICT_X: return mul(snr_of(gamma_t), loss);
    case PREDICT_EPS: break;
    }
    return loss;
}

/* ---- diffusion loss, finite time ---- */

/* rho = sigma_ts^2 / sigma_t^2 = -expm1(gamma_s - gamma_t), the share of the noise of z_t that came after
 * s. [VDM (32)] */
static Tensor *noise_share(const Method *m, double s, double t) {
    return affine(-1, exponential_minus_1(gamma_difference(m, s, t)), 0);
}

/* sigma_Q^2 = sigma_s^2 rho, the variance of q(z_s | z_t, x). [VDM (23) to (25), appendix A.2] */
static Tensor *posterior_variance(const Method *m, double s, double t) {
    return mul(sigma_squared(gamma_at(m, s)), noise_share(m, s, t));
}

/* (lambda_s - lambda_t) sigma_t^2: the generative model's stand-in for the encoder's change is this
 * times x^. [DiffEnc section 4] */
static Tensor *counterterm_factor(const Method *m, double s, double t) {
    return mul(affine(-1, gamma_difference(m, s, t), 0), sigma_squared(gamma_at(m, t)));
}

/* ||mu_P - mu_Q||^2 / sigma_Q^2, where z_t cancels:
 *     mu_P - mu_Q = alpha_s [rho (x^ - x_t) + (lambda_s - lambda_t) sigma_t^2 x^ - (x_s - x_t)]
 * (VDM: the first term only). [DiffEnc sections 3 and 4; VDM (12) to (14)] */
Tensor *step_distance(const Method *m, Encoded at_s, Encoded at_t, Predicted p, double s, double t) {
    Tensor *difference = mul(noise_share(m, s, t), sub(p.x_hat, at_t.x_t));
    if (m->config->kind != VDM) {
        difference = add(difference, mul(counterterm_factor(m, s, t), p.x_hat));
        difference = sub(difference, sub(at_s.x_t, at_t.x_t));
    }
    Tensor *square = mul(alpha_squared(gamma_at(m, s)), squared_norm(difference));
    return mul(square, reciprocal(posterior_variance(m, s, t)));
}

/* The same for an image x, a draw of z_t and the networks' answers. */
Tensor *distance_at(const Method *m, Tensor *x, Tensor *eps, double s, double t) {
    Tensor *gamma_t = gamma_at(m, t);
    const Encoded at_s = encode(m, x, s, 0), at_t = encode(m, x, t, 0);
    return step_distance(m, at_s, at_t, predict(m, diffuse(at_t.x_t, gamma_t, eps), t), s, t);
}

/* KL(q(z_s|z_t,x) || p(z_s|z_t)) = d/2 (w - 1 - log w) + w/2 ||mu_P - mu_Q||^2 / sigma_Q^2,
 * sigma_P^2 = sigma_Q^2/w */
Tensor *step_kl(const Method *m, Tensor *distance, double w) {
    return affine(w / 2, distance, dimension(m) / 2.0 * (w - 1 - log(w)));
}

/* The w of the least E KL, 1/w* = 1 + E||mu_P - mu_Q||^2 / (d sigma_Q^2); there KL* = -(d/2) log w*. */
double best_variance_ratio(double mean_distance, int d) {
    return 1 / (1 + mean_distance / d);
}

/* ---- the other two terms ---- */

/* -log p(k | z_0): per value a softmax over the 256 levels c of -(z_0/alpha_0 - x(c))^2 / (2
 * exp(gamma_0)), with z_0/alpha_0 = x_0 + exp(gamma_0/2) eps_0. [VDM (8)] */
Tensor *reconstruction_loss(const Method *m, const unsigned char *k, Tensor *x_0, Tensor *eps_0) {
    Tensor *gamma_0 = gamma_at(m, 0);
    Tensor *z_over_alpha = add(x_0, mul(exponential(affine(0.5, gamma_0, 0)), eps_0));
    return level_likelihood(z_over_alpha, gamma_0, k);
}

/* KL(q(z_1|x) || N(0,I)) = 1/2 sum(alpha_1^2 x_1^2 + sigma_1^2 - log sigma_1^2 - 1). The part without x
 * is small: sigma^2 - 1 = -alpha^2, and -log sigma^2 = log(1 + exp(-gamma)). [VDM (11)] */
Tensor *latent_loss(const Method *m, Tensor *x_1) {
    Tensor *gamma_1 = gamma_at(m, 1), *alpha2 = alpha_squared(gamma_1);
    Tensor *per_value = sub(softplus(affine(-1, gamma_1, 0)), alpha2);
    return affine(0.5, add(mul(alpha2, squared_norm(x_1)), affine(dimension(m), per_value, 0)), 0);
}

/* ---- the objective ---- */

/* L_T = T E_i KL_i, or L_inf, estimated at one t and one eps. */
static Tensor *diffusion_loss(const Method *m, Tensor *x, Example e) {
    const Config *c = m->config;
    Tensor *eps = constant(m->graph, c->height, c->width, c->image_channels, e.eps);
    if (c->timesteps > 0) {
        Tensor *distance = distance_at(m, x, eps, fmax(e.t - 1.0 / c->timesteps, 0), e.t);
        return affine(c->timesteps, step_kl(m, distance, c->variance_ratio), 0);
    }
    Tensor *gamma_t = gamma_at(m, e.t);
    const Encoded at_t = encode(m, x, e.t, 1);
    const Predicted p = predict(m, diffuse(at_t.x_t, gamma_t, eps), e.t);
    return continuous_loss(m, continuous_residual(m, at_t, p, gamma_t, eps), gamma_t);
}

/* x; and from now on the networks see the example's class. The bound is then one on -log p(x | class). */
static Tensor *example_begin(const Method *m, Example e) {
    m->network->label = e.label;
    return scale_pixels(m, e.k);
}

/* -log p(x) <= recon + latent + diffusion. [VDM (11)] */
LossTerms objective(const Method *m, Example e) {
    const Config *c = m->config;
    Tensor *x = example_begin(m, e);
    Tensor *eps_0 = constant(m->graph, c->height, c->width, c->image_channels, e.eps_0);
    const Encoded at_0 = encode(m, x, 0, 0), at_1 = encode(m, x, 1, 0);
    LossTerms terms;
    terms.recon = reconstruction_loss(m, e.k, at_0.x_t, eps_0);
    terms.latent = latent_loss(m, at_1.x_t);
    terms.diffusion = diffusion_loss(m, x, e);
    return terms;
}

/* (recon + latent + diffusion) / (d log 2) */
Tensor *bits_per_dimension(const Method *m, LossTerms terms) {
    Tensor *sum = add(add(terms.recon, terms.latent), terms.diffusion);
    return affine(1 / (dimension(m) * log(2)), sum, 0);
}

/* With finite T, t is rounded up to the next multiple of 1/T; t = 0 belongs to the first step. */
static double on_grid(double t, int T) {
    return T > 0 ? fmax(ceil(t * T), 1) / T : t;
}

/* t_i = (u + i/B) mod 1: one uniform u, times evenly spread over a batch. [VDM appendix I.1] */
double example_time(double u, int i, int batch, int T) {
    return on_grid(fmod(u + (double)i / batch, 1), T);
}

/* t_j = (u + j (sqrt 5 - 1)/2) mod 1: any run of consecutive draws meets all times evenly, so that an
 * evaluation does not depend on how its images are sorted. */
double evaluation_time(double u, double j, int T) {
    return on_grid(fmod(u + j * ((sqrt(5) - 1) / 2), 1), T);
}

/* ---- sampling ---- */

/* mu_P = (alpha_t/alpha_s) (sigma_s^2/sigma_t^2) z_t + alpha_s rho x^     [VDM (28), (31) to (33)]
 *        + alpha_s (lambda_s - lambda_t) sigma_t^2 x^   for DiffEnc, nt and trained   [DiffEnc section 4] */
Tensor *generative_mean(const Method *m, Tensor *z_t, Tensor *x_hat, double s, double t) {
    Tensor *gamma_s = gamma_at(m, s), *gamma_t = gamma_at(m, t), *alpha_s = alpha_of(gamma_s);
    Tensor *alpha_ratio = mul(alpha_of(gamma_t), reciprocal(alpha_s));
    Tensor *sigma2_ratio = mul(sigma_squared(gamma_s), reciprocal(sigma_squared(gamma_t)));
    Tensor *x_factor = noise_share(m, s, t);
    if (m->config->kind != VDM)
        x_factor = add(x_factor, counterterm_factor(m, s, t));
    return add(mul(mul(alpha_ratio, sigma2_ratio), z_t), mul(mul(alpha_s, x_factor), x_hat));
}

/* sigma_P^2 = sigma_Q^2 / w */
Tensor *generative_variance(const Method *m, double s, double t) {
    return affine(1 / m->config->variance_ratio, posterior_variance(m, s, t), 0);
}

/* z_s ~ p(z_s | z_t) = N(mu_P, sigma_P^2 I). The encoder plays no part in sampling. [VDM (9)] */
Tensor *ancestral_step(const Method *m, Tensor *z_t, double s, double t, Tensor *eps) {
    const Predicted p = predict(m, z_t, t);
    Tensor *mean = generative_mean(m, z_t, p.x_hat, s, t);
    return add(mean, mul(square_root(generative_variance(m, s, t)), eps));
}

/* The deterministic sampler is ours and not the papers': DDIM for an x_t that moves,
 *     eps^ = (z_t - alpha_t x^)/sigma_t
 *     z_s = alpha_s (1 + (lambda_s - lambda_t) sigma_t^2) x^ + sigma_s eps^    (VDM: no bracket) */
Tensor *deterministic_step(const Method *m, Tensor *z_t, Tensor *x_hat, double s, double t) {
    Tensor *gamma_s = gamma_at(m, s), *gamma_t = gamma_at(m, t);
    Tensor *eps_hat = mul(reciprocal(sigma_of(gamma_t)), sub(z_t, mul(alpha_of(gamma_t), x_hat)));
    Tensor *x_s = x_hat;
    if (m->config->kind != VDM)
        x_s = add(x_hat, mul(counterterm_factor(m, s, t), x_hat));
    return diffuse(x_s, gamma_s, eps_hat);
}

/* argmax or a draw of p(k | z_0), whose logits are -(z_0/alpha_0 - x(k))^2 exp(-gamma_0)/2 */
void decode_pixels(const Method *m, Tensor *z_0, const RandomStream *draws, unsigned char *k) {
    Tensor *gamma_0 = gamma_at(m, 0);
    level_choose(mul(z_0, reciprocal(alpha_of(gamma_0))), gamma_0, draws, k);
}

/* ---- algorithm 1: one training step ---- */

static Tensor *gaussian_image(const Method *m, RandomStream stream) {
    return gaussian(m->graph, m->config->height, m->config->width, m->config->image_channels, stream);
}

static void terms_of(LossTerms terms, double out[3]) {
    out[0] = number_of(terms.recon);
    out[1] = number_of(terms.latent);
    out[2] = number_of(terms.diffusion);
}

/* An example's share of the gradient of the mean over the batch. */
static void differentiate(const Method *m, LossTerms terms, int batch, double terms_out[3]) {
    terms_of(terms, terms_out);
    backward(bits_per_dimension(m, terms), 1.0 / batch);
}

static int label_of(const unsigned char *labels, int i) {
    return labels ? labels[i] : 0;
}

typedef struct {
    const unsigned char *images;   /* [batch, d] */
    const unsigned char *labels;   /* [batch] or NULL; likewise below */
    const Example *given;          /* NULL, or [batch]: these, instead of draws of time and noise */
    int batch;
    uint32_t step;
    uint64_t seed;
    double u, (*terms)[3];         /* [batch] */
} Batch;

/* Training the encoder is dear and its rate is low, so examples 0, 4, 8, ... alone train it. Only they have
 * recon and latent, which train nothing else; and the places are fixed, so that every step divides over the
 * threads alike. AdamW and Muon do not feel that its gradient is a quarter of the whole. Where the end points
 * of the schedule are learned, recon and latent move them, and every example trains all. */
static int trains_encoder(const Batch *b, const Config *c, int i) {
    return c->schedule == SCHEDULE_LEARNED || b->batch < 4 || i % 4 == 0;
}

/* Times, noise, objective, gradient. */
static void training_example(Network *n, int i, void *context) {
    const Batch *b = context;
    const uint32_t index = (uint32_t)i;
    n->graph.dropout = n->model->config.dropout;
    n->graph.dropout_stream = random_stream(b->seed, RANDOM_DROPOUT, b->step, index);
    const Method m = method_begin(n);
    Example example = {
        .k = b->images + (size_t)i * dimension(&m),
        .t = example_time(b->u, i, b->batch, m.config->timesteps),
        .eps = gaussian_image(&m, random_stream(b->seed, RANDOM_NOISE, b->step, index))->value,
        .label = label_of(b->labels, i)};
    LossTerms terms = {number(m.graph, 0), number(m.graph, 0), NULL};
    n->encoder_fixed = !trains_encoder(b, m.config, i);
    if (n->encoder_fixed) {
        terms.diffusion = diffusion_loss(&m, example_begin(&m, example), example);
    } else {
        example.eps_0 = gaussian_image(&m, random_stream(b->seed, RANDOM_NOISE_0, b->step, index))->value;
        terms = objective(&m, example);
    }
    differentiate(&m, terms, b->batch, b->terms[i]);
}

/* The mean of each term over the examples that have it, in bits per dimension. */
static void mean_terms(const Config *c, const Batch *b, double mean[3]) {
    const double per_bit = 1 / (c->height * c->width * c->image_channels * log(2));
    for (int term = 0; term < 3; term++) {
        int count = 0;
        mean[term] = 0;
        for (int i = 0; i < b->batch; i++)
            if (term == 2 || trains_encoder(b, c, i))
                mean[term] += b->terms[i][term] * per_bit, count++;
        mean[term] /= count;
    }
}

int training_step(Model *model, Workers *workers, const Optimizer *optimizer, const unsigned char *images,
                  const unsigned char *labels, int batch, uint64_t seed, StepReport *r, Error *error) {
    static const char *const names[3] = {"recon", "latent", "diffusion"};
    const uint32_t step = (uint32_t)model->step;
    Batch b = {.images = images, .labels = labels, .batch = batch, .step = step, .seed = seed,
               .u = random_uniform(random_stream(seed, RANDOM_TIME, step, 0), 0),
               .terms = workers_results(workers, (size_t)batch, sizeof *b.terms)};
    double mean[3];
    const real *gradient = workers_gradient(workers, batch, training_example, &b);
    if (!gradient)
        return fail(error, "step %llu: stopped", (unsigned long long)model->step + 1);
    ranks_gather(b.terms, 1, batch, sizeof *b.terms);
    mean_terms(&model->config, &b, mean);
    *r = (StepReport){mean[0], mean[1], mean[2], mean[0] + mean[1] + mean[2], NAN};
    if (isfinite(r->total))
        r->gradient_norm = optimizer_step(workers, optimizer, gradient);
    return isfinite(r->gradient_norm) ? 0 : diverged(model, names, mean, 3, gradient, error);
}

static void given_example(Network *n, int i, void *context) {
    const Batch *b = context;
    n->graph.dropout = 0;
    const Method m = method_begin(n);
    differentiate(&m, objective(&m, b->given[i]), b->batch, b->terms[i]);
}

const real *batch_gradient(Workers *workers, const Example *examples, int batch, double (*terms)[3]) {
    Batch b = {.given = examples, .batch = batch, .terms = terms};
    const real *gradient = workers_gradient(workers, batch, given_example, &b);
    ranks_gather(terms, 1, batch, sizeof *terms);
    return gradient;
}

/* ---- algorithm 2: the bound on a data set ---- */

typedef struct {
    const unsigned char *images, *labels;   /* [count, d], [count] */
    int count, repeats;
    uint64_t seed;
    double u;
    double (*terms)[4];            /* [count]: recon, latent, diffusion, total */
    double (*draws)[DRAW_COLUMNS]; /* NULL, or [repeats, count] */
    double *distance;              /* NULL, or [T, count]: step_distance */
} Evaluation;

/* What is told of a draw. gamma' is the same at all t: divided by it, a loss per t is one per lambda. */
static void describe_draw(const Method *m, Example e, double diffusion, double draw[DRAW_COLUMNS]) {
    const int h = m->config->height, w = m->config->width, channels = m->config->image_channels;
    draw[DRAW_TIME] = e.t;
    draw[DRAW_LAMBDA] = -number_of(gamma_at(m, e.t));
    draw[DRAW_LOSS] = diffusion / (dimension(m) * log(2));
    draw[DRAW_LOSS_BY_LAMBDA] = draw[DRAW_LOSS] / number_of(m->gamma_range);
    draw[DRAW_COUNTERTERM_ERROR] =
        counterterm_error(m, scale_pixels(m, e.k), constant(m->graph, h, w, channels, e.eps), e.t);
}

/* The mean over some draws of time and noise. */
static void evaluate_example(Network *n, int i, void *context) {
    const Evaluation *e = context;
    double *out = e->terms[i];
    memset(out, 0, sizeof e->terms[i]);
    for (int repeat = 0; repeat < e->repeats && !network_stopped(n); repeat++) {
        const uint32_t draw = (uint32_t)repeat, index = (uint32_t)i;
        double terms[3];
        network_begin(n);
        const Method m = method_begin(n);
        const Example example = {
            .k = e->images + (size_t)i * dimension(&m),
            .t = evaluation_time(e->u, (double)repeat * e->count + i, m.config->timesteps),
            .eps = gaussian_image(&m, random_stream(e->seed, RANDOM_EVAL_NOISE, draw, index))->value,
            .eps_0 = gaussian_image(&m, random_stream(e->seed, RANDOM_EVAL_NOISE_0, draw, index))->value,
            .label = label_of(e->labels, i)};
        terms_of(objective(&m, example), terms);
        for (int term = 0; term < 3; term++)
            out[term] += terms[term] / (e->repeats * dimension(&m) * log(2));
        if (e->draws)
            describe_draw(&m, example, terms[2], e->draws[(size_t)repeat * e->count + i]);
    }
    out[3] = out[0] + out[1] + out[2];
}

void evaluate(Workers *workers, const unsigned char *images, const unsigned char *labels, int count,
              int repeats, uint64_t seed, double (*terms)[4], double (*draws)[DRAW_COLUMNS]) {
    Evaluation e = {.images = images, .labels = labels, .count = count, .repeats = repeats, .seed = seed,
                    .terms = terms, .draws = draws,
                    .u = random_uniform(random_stream(seed, RANDOM_EVAL_TIME, 0, 0), 0)};
    workers_run(workers, workers->model->ema, count, evaluate_example, &e);
    ranks_gather(terms, 1, count, sizeof *terms);
    ranks_gather(draws, draws ? repeats : 0, count, sizeof *draws);
}

/* ||mu_P - mu_Q||^2 / sigma_Q^2 of every step, from which the best sigma_P^2 follows. */
static void every_step(Network *n, int i, void *context) {
    const Evaluation *e = context;
    const int T = n->model->config.timesteps;
    n->label = label_of(e->labels, i);
    for (int step = 1; step <= T && !network_stopped(n); step++) {
        network_begin(n);
        const Method m = method_begin(n);
        Tensor *x = scale_pixels(&m, e->images + (size_t)i * dimension(&m));
        Tensor *eps =
            gaussian_image(&m, random_stream(e->seed, RANDOM_EVAL_STEP_NOISE, (uint32_t)step, (uint32_t)i));
        e->distance[(size_t)(step - 1) * e->count + i] =
            number_of(distance_at(&m, x, eps, (step - 1.0) / T, (double)step / T));
    }
}

void step_distances(Workers *workers, const unsigned char *images, const unsigned char *labels, int count,
                    uint64_t seed, double *distance) {
    Evaluation e = {.images = images, .labels = labels, .count = count, .seed = seed, .distance = distance};
    workers_run(workers, workers->model->ema, count, every_step, &e);
    ranks_gather(distance, workers->model->config.timesteps, count, sizeof *distance);
}

/* ---- algorithm 3: sampling ---- */

typedef struct {
    int timesteps, deterministic, draw_pixels;
    uint64_t seed;
    const unsigned char *labels;   /* [count] */
    unsigned char *images;   /* [count, d] */
    char *finite;            /* [count]: whether z_0 is */
    int count, frames;
    unsigned char *trajectory;   /* [frames, 2, count, d] */
} Sampling;

/* x^ and z_t as pixels, if t = step/T is the time of a frame. */
static void keep_frame(const Method *m, const Sampling *s, int i, int step, Tensor *z_t) {
    const int T = s->timesteps, past = T - step, last = s->frames - 1;
    const int frame = (past * last + T - 1) / T;   /* the first one that is not before this step */
    if (last < 1 || frame * T / last != past)
        return;
    const size_t d = (size_t)dimension(m), all = (size_t)s->count * d;
    const Tensor *x_hat = predict(m, z_t, (double)step / T).x_hat;
    unsigned char *out = s->trajectory + 2 * all * (size_t)frame + d * (size_t)i;
    for (size_t k = 0; k < d; k++) {
        out[k] = (unsigned char)nearest_level(x_hat->value[k]);
        out[all + k] = (unsigned char)nearest_level(z_t->value[k]);
    }
}

/* z_1 ~ N(0, I);  z_s ~ p(z_s | z_t), or the deterministic step, for t = 1, .., 1/T;  then pixels. */
static void sample_example(Network *n, int i, void *context) {
    const Sampling *s = context;
    const int T = s->timesteps;
    const uint32_t index = (uint32_t)i;
    n->label = label_of(s->labels, i);
    Method m = method_begin(n);
    Tensor *z = gaussian_image(&m, random_stream(s->seed, RANDOM_SAMPLER, (uint32_t)T + 1, index));
    for (int step = T; step >= 1 && !network_stopped(n); step--) {
        z = network_renew(n, z);   /* a graph for each step, which begins with z_t alone */
        m = method_begin(n);
        keep_frame(&m, s, i, step, z);
        const double before = (step - 1.0) / T, t = (double)step / T;
        if (s->deterministic)
            z = deterministic_step(&m, z, predict(&m, z, t).x_hat, before, t);
        else
            z = ancestral_step(&m, z, before, t, gaussian_image(&m, random_stream(s->seed, RANDOM_SAMPLER,
                                                                                  (uint32_t)step, index)));
    }
    keep_frame(&m, s, i, 0, z);
    s->finite[i] = isfinite(number_of(squared_norm(z))) != 0;
    const RandomStream pixels = random_stream(s->seed, RANDOM_PIXELS, 0, index);
    decode_pixels(&m, z, s->draw_pixels ? &pixels : NULL, s->images + (size_t)i * dimension(&m));
}

int sample_images(Workers *workers, const unsigned char *labels, int count, int timesteps, int deterministic,
                  uint64_t seed, int draw_pixels, unsigned char *images, int frames,
                  unsigned char *trajectory) {
    Sampling s = {timesteps, deterministic, draw_pixels, seed, labels, images,
                  workers_results(workers, (size_t)count, 1), count, frames, trajectory};
    memset(s.finite, 1, (size_t)count);
    workers_run(workers, workers->model->ema, count, sample_example, &s);
    const Config *c = &workers->model->config;
    const size_t d = (size_t)c->height * c->width * c->image_channels;
    ranks_gather(s.finite, 1, count, 1);
    ranks_gather(images, 1, count, d);
    ranks_gather(trajectory, 2 * frames, count, d);
    return memchr(s.finite, 0, (size_t)count) ? -1 : 0;
}
