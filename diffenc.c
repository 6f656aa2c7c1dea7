/* diffenc.c - floor 4: the method, and nothing else.
 *
 * Written to be read beside the paper: Nielsen, Christensen, Dittadi, Winther, "DiffEnc: Variational
 * Diffusion with a Learned Encoder", ICLR 2024 [DiffEnc], which extends Kingma, Salimans, Poole, Ho,
 * "Variational Diffusion Models", 2021 [VDM]. Symbols are the papers': alpha, sigma, gamma = -lambda =
 * -log SNR, z_t, x_t, y, v, eps; 0 <= s < t <= 1. An expression such as add(mul(alpha, x), mul(sigma,
 * eps)) computes at once and remembers how, so all of it can be differentiated. No loop over pixels, no
 * memory, no thread and no file appears here. */

#include "diffenc.h"

#include <math.h>
#include <stddef.h>

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

/* gamma(t) = b + |w| t; b = gamma_min, |w| = gamma_max - gamma_min when the schedule is fixed. [VDM,
 * noise schedule] */
Tensor *gamma_at(const Method *m, double t) {
    return add(m->gamma_min, affine(t, m->gamma_range, 0));
}

/* gamma_s - gamma_t = lambda_t - lambda_s, without the difference of two nearly equal numbers. */
static Tensor *gamma_difference(const Method *m, double s, double t) {
    return affine(s - t, m->gamma_range, 0);
}

Tensor *alpha_squared(Tensor *gamma) { return logistic(affine(-1, gamma, 0)); }
Tensor *sigma_squared(Tensor *gamma) { return logistic(gamma); }
Tensor *alpha_of(Tensor *gamma) { return square_root(alpha_squared(gamma)); }
Tensor *sigma_of(Tensor *gamma) { return square_root(sigma_squared(gamma)); }
Tensor *snr_of(Tensor *gamma) { return exponential(affine(-1, gamma, 0)); }

/* The networks see the normalised time (gamma_t - gamma_min)/(gamma_max - gamma_min) = t. By lambda =
 * -gamma its derivative is -1/(gamma_max - gamma_min). */
Tensor *time_by_lambda(const Method *m) {
    return affine(-1, reciprocal(m->gamma_range), 0);
}

/* ---- the encoder ---- */

/* VDM          x_t = x
 * DiffEnc-nt   x_t = alpha_t^2 x
 * DiffEnc      x_t = alpha_t^2 x + sigma_t^2 y(x, lambda_t)     [DiffEnc, parameterization of the encoder]
 *
 * For dy/dlambda, the time enters the encoder with its derivative by lambda, and y comes out with it. */
Encoded encode(const Method *m, Tensor *x, double t, int with_derivative) {
    Encoded e = {x, NULL, NULL};
    Tensor *gamma_t = gamma_at(m, t);
    if (m->config->kind == VDM)
        return e;
    e.x_t = mul(alpha_squared(gamma_t), x);
    if (m->config->kind == DIFFENC_NT)
        return e;
    Tensor *y = encoder_network(m->network, x, t, with_derivative ? time_by_lambda(m) : NULL);
    e.y_dot = y->tangent;
    e.y = with_derivative ? with_tangent(y, NULL) : y;
    e.x_t = add(e.x_t, mul(sigma_squared(gamma_t), e.y));
    return e;
}

/* dx_t/dlambda = sigma_t^2 (x_t - y + dy/dlambda), for which the generative model has sigma_t^2 x^; y = 0
 * for nt, and VDM's x does not move. [DiffEnc, same] */
Tensor *exact_counterterm(const Method *m, Encoded e, Tensor *gamma_t) {
    if (m->config->kind == VDM)
        return affine(0, e.x_t, 0);
    Tensor *rate = m->config->kind == DIFFENC ? sub(e.x_t, sub(e.y, e.y_dot)) : e.x_t;
    return mul(sigma_squared(gamma_t), rate);
}

/* ---- forward process ---- */

/* z_t = alpha_t x_t + sigma_t eps, a draw from q(z_t | x) = N(alpha_t x_t, sigma_t^2 I). */
Tensor *diffuse(Tensor *x_t, Tensor *gamma_t, Tensor *eps) {
    return add(mul(alpha_of(gamma_t), x_t), mul(sigma_of(gamma_t), eps));
}

/* v_t = alpha_t eps - sigma_t x_t */
Tensor *v_target(Tensor *x_t, Tensor *gamma_t, Tensor *eps) {
    return sub(mul(alpha_of(gamma_t), eps), mul(sigma_of(gamma_t), x_t));
}

/* ---- prediction ---- */

/* v:    x^ = alpha_t z_t - sigma_t v^
 * eps:  x^ = (z_t - sigma_t eps^) / alpha_t
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
    p.output = score_network(m->network, z_t, t);
    p.x_hat = x_from_output(m, p.output, z_t, gamma_at(m, t));
    return p;
}

/* ---- diffusion loss, continuous time ---- */

/* How far x_t is from following the generative model, as far as it goes beyond VDM:
 *     nt       x^ - x_t
 *     DiffEnc  x^ - x_t + y - dy/dlambda */
static Tensor *drift_gap(const Method *m, Encoded e, Predicted p) {
    Tensor *gap = sub(p.x_hat, e.x_t);
    return m->config->kind == DIFFENC ? add(gap, sub(e.y, e.y_dot)) : gap;
}

/* v:    r = v_t - v^   + sigma_t gap                             [DiffEnc, v-parameterization; VDM: no gap]
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

/* L_inf at one t: 1/2 gamma'(t) weight ||r||^2, weight = alpha_t^2 (v), 1 (eps), SNR (x). [DiffEnc,
 * infinite depth; VDM, continuous-time model] */
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
 * s. */
static Tensor *noise_share(const Method *m, double s, double t) {
    return affine(-1, exponential_minus_1(gamma_difference(m, s, t)), 0);
}

/* sigma_Q^2 = sigma_s^2 rho, the variance of q(z_s | z_t, x). [VDM, appendix A] */
static Tensor *posterior_variance(const Method *m, double s, double t) {
    return mul(sigma_squared(gamma_at(m, s)), noise_share(m, s, t));
}

/* (lambda_s - lambda_t) sigma_t^2: the generative model's stand-in for the encoder's change is this
 * times x^. [DiffEnc, parameterization of the generative model] */
static Tensor *counterterm_factor(const Method *m, double s, double t) {
    return mul(affine(-1, gamma_difference(m, s, t), 0), sigma_squared(gamma_at(m, t)));
}

/* ||mu_P - mu_Q||^2 / sigma_Q^2, where z_t cancels:
 *     mu_P - mu_Q = alpha_s [rho (x^ - x_t) + (lambda_s - lambda_t) sigma_t^2 x^ - (x_s - x_t)]
 * (VDM: the first term only). [DiffEnc, finite depth] */
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

/* ---- the other two terms ---- */

/* -log p(k | z_0): per value a softmax over the 256 levels c of -(z_0/alpha_0 - x(c))^2 / (2
 * exp(gamma_0)), with z_0/alpha_0 = x_0 + exp(gamma_0/2) eps_0. */
Tensor *reconstruction_loss(const Method *m, const unsigned char *k, Tensor *x_0, Tensor *eps_0) {
    Tensor *gamma_0 = gamma_at(m, 0);
    Tensor *z_over_alpha = add(x_0, mul(exponential(affine(0.5, gamma_0, 0)), eps_0));
    return level_likelihood(z_over_alpha, gamma_0, k);
}

/* KL(q(z_1|x) || N(0,I)) = 1/2 sum(alpha_1^2 x_1^2 + sigma_1^2 - log sigma_1^2 - 1), where what does not
 * depend on x is the small difference of sigma^2 - 1 = -alpha^2 and -log sigma^2 = log(1 + exp(-gamma)). */
Tensor *latent_loss(const Method *m, Tensor *x_1) {
    Tensor *gamma_1 = gamma_at(m, 1), *alpha2 = alpha_squared(gamma_1);
    Tensor *per_value = sub(softplus(affine(-1, gamma_1, 0)), alpha2);
    return affine(0.5, add(mul(alpha2, squared_norm(x_1)), affine(dimension(m), per_value, 0)), 0);
}

/* ---- the objective ---- */

/* -log p(x) <= recon + latent + diffusion, estimated at one t and one eps. [VDM,
 * variational lower bound] */
LossTerms objective(const Method *m, Example e) {
    const Config *c = m->config;
    const int h = c->height, w = c->width, channels = c->image_channels;
    Tensor *x = scale_pixels(m, e.k);
    Tensor *eps = constant(m->graph, h, w, channels, e.eps),
           *eps_0 = constant(m->graph, h, w, channels, e.eps_0);
    Tensor *gamma_t = gamma_at(m, e.t);
    LossTerms terms;

    const Encoded at_0 = encode(m, x, 0, 0), at_1 = encode(m, x, 1, 0);
    terms.recon = reconstruction_loss(m, e.k, at_0.x_t, eps_0);
    terms.latent = latent_loss(m, at_1.x_t);

    if (c->timesteps > 0) {   /* L_T = T E_i KL_i */
        Tensor *distance = distance_at(m, x, eps, fmax(e.t - 1.0 / c->timesteps, 0), e.t);
        terms.diffusion = affine(c->timesteps, step_kl(m, distance, c->variance_ratio), 0);
    } else {
        const Encoded at_t = encode(m, x, e.t, 1);
        const Predicted p = predict(m, diffuse(at_t.x_t, gamma_t, eps), e.t);
        terms.diffusion = continuous_loss(m, continuous_residual(m, at_t, p, gamma_t, eps), gamma_t);
    }
    return terms;
}

/* (recon + latent + diffusion) / (d log 2) */
Tensor *bits_per_dimension(const Method *m, LossTerms terms) {
    Tensor *sum = add(add(terms.recon, terms.latent), terms.diffusion);
    return affine(1 / (dimension(m) * log(2)), sum, 0);
}

/* t_i = (u + i/B) mod 1; with finite T rounded up to the next multiple of 1/T. [VDM,
 * low-discrepancy sampler] */
double example_time(double u, int example, int batch, int timesteps) {
    const double t = fmod(u + (double)example / batch, 1);
    if (timesteps == 0)
        return t;
    const double i = ceil(t * timesteps);   /* t = 0 belongs to the first step */
    return fmax(i, 1) / timesteps;
}

/* ---- sampling ---- */

/* mu_P = alpha_ts (sigma_s^2/sigma_t^2) z_t + alpha_s rho x^                          [VDM]
 *        + alpha_s (lambda_s - lambda_t) sigma_t^2 x^   for DiffEnc, nt and trained   [DiffEnc] */
Tensor *generative_mean(const Method *m, Tensor *z_t, Tensor *x_hat, double s, double t) {
    Tensor *gamma_s = gamma_at(m, s), *gamma_t = gamma_at(m, t), *alpha_s = alpha_of(gamma_s);
    Tensor *alpha_ts = mul(alpha_of(gamma_t), reciprocal(alpha_s));
    Tensor *variance_ts = mul(sigma_squared(gamma_s), reciprocal(sigma_squared(gamma_t)));
    Tensor *x_factor = noise_share(m, s, t);
    if (m->config->kind != VDM)
        x_factor = add(x_factor, counterterm_factor(m, s, t));
    return add(mul(mul(alpha_ts, variance_ts), z_t), mul(mul(alpha_s, x_factor), x_hat));
}

/* sigma_P^2 = sigma_Q^2 / w */
Tensor *generative_variance(const Method *m, double s, double t) {
    return affine(1 / m->config->variance_ratio, posterior_variance(m, s, t), 0);
}

/* z_s ~ p(z_s | z_t) = N(mu_P, sigma_P^2 I). The encoder plays no part in sampling. */
Tensor *ancestral_step(const Method *m, Tensor *z_t, double s, double t, Tensor *eps) {
    const Predicted p = predict(m, z_t, t);
    Tensor *mean = generative_mean(m, z_t, p.x_hat, s, t);
    return add(mean, mul(square_root(generative_variance(m, s, t)), eps));
}

/* argmax or a draw of p(k | z_0), whose logits are -(z_0/alpha_0 - x(k))^2 exp(-gamma_0)/2 */
void decode_pixels(const Method *m, Tensor *z_0, const double *u, unsigned char *k) {
    Tensor *gamma_0 = gamma_at(m, 0);
    level_choose(mul(z_0, reciprocal(alpha_of(gamma_0))), gamma_0, u, k);
}
