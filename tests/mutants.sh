#!/bin/sh
# mutants.sh - prove that the proofs can fail. A copy of the sources gets one deliberate fault after the other,
# each of a kind that is easily made and hard to see in a loss curve; `diffenc check`, or else a test, must turn red.
#
#   sh tests/mutants.sh            all of them, a few minutes on two cores
#   sh tests/mutants.sh WORD       those whose description contains WORD
#
# A fault is the replacement of a piece of text that occurs exactly once in its file. If it does not, the source
# has moved on and the fault is stale, which counts as a failure like a survivor does.

set -u
wanted=${1:-}
tree=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/mutants.XXXXXX") || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
cd "$tree" || exit 1
cp ./*.c ./*.h Makefile "$work" && mkdir "$work/tests" && cp -r tests/*.c tests/*.h tests/golden "$work/tests" || exit 1
cd "$work" || exit 1
# Threads that spin while they wait slow everything down on a busy machine. Of test_main two parts are asked: the golden
# files, which know what another implementation computes, and trainings that are stopped and resumed.
export OMP_WAIT_POLICY=passive ONLY="golden resume" DIFFENC=./diffenc_mutant

# -O1 builds fast. No name of a directory is assumed: the Makefile prints it.
build() {
    make --no-print-directory DOUBLE=1 CFLAGS=-O1 diffenc_mutant tests_mutant >build.log 2>&1
}
cat >>Makefile <<'END'

TESTED = tensor autograd nn diffenc main
diffenc_mutant: $(BUILD)/diffenc
	@cp $(BUILD)/diffenc diffenc_mutant
tests_mutant: $(TESTED:%=$(BUILD)/test_%)
	@for t in $(TESTED); do cp $(BUILD)/test_$$t .; done
.PHONY: diffenc_mutant tests_mutant
END

# replace FILE OLD NEW: literally, OLD occurring exactly once.
replace() {
    OLD=$2 NEW=$3 awk '
        BEGIN { old = ENVIRON["OLD"]; new = ENVIRON["NEW"] }
        {
            line = $0
            while ((at = index(line, old)) > 0) {
                found++
                printf "%s%s", substr(line, 1, at - 1), new
                line = substr(line, at + length(old))
            }
            print line
        }
        END { exit found != 1 }' "$1" >replaced && ! cmp -s replaced "$1" && cp replaced "$1"
}

killed=0 survived=0 changed=
# mutant DESCRIPTION FILE OLD NEW
mutant() {
    case $1 in *"$wanted"*) ;; *) return ;; esac
    if [ -n "$changed" ]; then cp "$tree/$changed" "$changed"; fi
    changed=$2
    if ! replace "$2" "$3" "$4"; then
        survived=$((survived + 1))
        echo "STALE     $1 ($2)"
        return
    fi
    if ! build; then
        survived=$((survived + 1))
        echo "STALE     $1 ($2): does not build: $(grep error build.log | head -n 1)"
        return
    fi
    if ! ./diffenc_mutant check --stop >check.log 2>&1; then
        killed=$((killed + 1))
        echo "killed    $1: $(awk '/FAILED/ { print substr($0, 17, 70); exit }' check.log | sed 's/ *$//')"
        return
    fi
    for t in tensor autograd nn diffenc main; do
        if ! ./test_$t >test.log 2>&1; then
            killed=$((killed + 1))
            echo "killed    $1: test_$t: $(head -n 1 test.log)"
            return
        fi
    done
    survived=$((survived + 1))
    echo "SURVIVED  $1 ($2)"
}

# Nothing can be said before everything is green.
if ! build; then cat build.log; exit 1; fi
if ! ./diffenc_mutant check --stop >check.log 2>&1; then
    echo "without any fault: $(grep FAILED check.log)"
    exit 1
fi

# ---- the method ----

mutant 'forward process: sigma_t^2 for sigma_t' diffenc.c \
    'return add(mul(alpha_of(gamma_t), x_t), mul(sigma_of(gamma_t), eps));' \
    'return add(mul(alpha_of(gamma_t), x_t), mul(sigma_squared(gamma_t), eps));'
mutant 'v: sign of sigma_t x_t' diffenc.c \
    'return sub(mul(alpha_of(gamma_t), eps), mul(sigma_of(gamma_t), x_t));' \
    'return add(mul(alpha_of(gamma_t), eps), mul(sigma_of(gamma_t), x_t));'
mutant 'x^ from eps^: missing sigma_t' diffenc.c \
    'sub(z_t, mul(sigma, output))' \
    'sub(z_t, output)'
mutant 'encoder: alpha_t x for alpha_t^2 x' diffenc.c \
    'e.x_t = mul(alpha_squared(gamma_t), x);' \
    'e.x_t = mul(alpha_of(gamma_t), x);'
mutant 'dy/dgamma instead of dy/dlambda' diffenc.c \
    'number(m->graph, -1) : NULL' \
    'number(m->graph, 1) : NULL'
mutant 'dy/dlambda: the derivative by the time that the network sees' diffenc.c \
    'network_time(m, with_tangent(gamma_t, gamma_dot))' \
    'with_tangent(network_time(m, gamma_t), gamma_dot)'
mutant 'time of the networks: from the learned end points' diffenc.c \
    'affine(1 / range, sub(gamma_t, number(m->graph, low)), 0)' \
    'mul(reciprocal(m->gamma_range), sub(gamma_t, m->gamma_min))'
mutant 'residual: sign of dy/dlambda' diffenc.c \
    'add(gap, sub(e.y, e.y_dot))' \
    'add(gap, add(e.y, e.y_dot))'
mutant 'residual: sign of the gap' diffenc.c \
    'r : add(r, mul(gap_factor, drift_gap(m, e, p)))' \
    'r : sub(r, mul(gap_factor, drift_gap(m, e, p)))'
mutant 'residual, v: missing sigma_t' diffenc.c \
    'gap_factor = sigma;' \
    'gap_factor = number(m->graph, 1);'
mutant 'residual, eps: missing alpha_t' diffenc.c \
    'gap_factor = mul(alpha, sigma);' \
    'gap_factor = sigma; (void)alpha;'
mutant 'continuous loss: alpha_t^2 for SNR, x-prediction' diffenc.c \
    'case PREDICT_X: return mul(snr_of(gamma_t), loss);' \
    'case PREDICT_X: return mul(alpha_squared(gamma_t), loss);'
mutant 'continuous loss: no gamma prime' diffenc.c \
    'affine(0.5, mul(m->gamma_range, squared_norm(r)), 0)' \
    'affine(0.5, squared_norm(r), 0)'
mutant 'rho: its first order in s - t' diffenc.c \
    'return affine(-1, exponential_minus_1(gamma_difference(m, s, t)), 0);' \
    'return affine(-1, gamma_difference(m, s, t), 0);'
mutant 'sigma_Q^2: sigma_t^2 for sigma_s^2' diffenc.c \
    'mul(sigma_squared(gamma_at(m, s)), noise_share(m, s, t))' \
    'mul(sigma_squared(gamma_at(m, t)), noise_share(m, s, t))'
mutant 'counterterm: sigma_s^2 for sigma_t^2' diffenc.c \
    'mul(affine(-1, gamma_difference(m, s, t), 0), sigma_squared(gamma_at(m, t)))' \
    'mul(affine(-1, gamma_difference(m, s, t), 0), sigma_squared(gamma_at(m, s)))'
mutant 'step distance: x_t - x_s for x_s - x_t' diffenc.c \
    'sub(at_s.x_t, at_t.x_t)' \
    'sub(at_t.x_t, at_s.x_t)'
mutant 'step KL: sign of log w' diffenc.c \
    '(w - 1 - log(w))' \
    '(w - 1 + log(w))'
mutant 'finite T: a step twice as long' diffenc.c \
    'fmax(e.t - 1.0 / c->timesteps, 0)' \
    'fmax(e.t - 2.0 / c->timesteps, 0)'
mutant 'reconstruction: exp(gamma_0) for exp(gamma_0/2)' diffenc.c \
    'exponential(affine(0.5, gamma_0, 0))' \
    'exponential(affine(1, gamma_0, 0))'
mutant 'latent: alpha_1^4 for alpha_1^2' diffenc.c \
    'add(mul(alpha2, squared_norm(x_1)),' \
    'add(mul(mul(alpha2, alpha2), squared_norm(x_1)),'
mutant 'bits per dimension: in nats' diffenc.c \
    'affine(1 / (dimension(m) * log(2)), sum, 0)' \
    'affine(1.0 / dimension(m), sum, 0)'
mutant 'times of a batch: all the same' diffenc.c \
    'fmod(u + (double)i / batch, 1)' \
    'fmod(u + 0 * (double)i / batch, 1)'
mutant 'times of an evaluation: all the same' diffenc.c \
    'fmod(u + j * ((sqrt(5) - 1) / 2), 1)' \
    'fmod(u + 0 * j * ((sqrt(5) - 1) / 2), 1)'
mutant 'evaluation: the repetitions of an image at the same time' diffenc.c \
    'evaluation_time(e->u, (double)repeat * e->count + i, m.config->timesteps)' \
    'evaluation_time(e->u, (double)i, m.config->timesteps)'
mutant 'training step: the gradient of the sum over the batch' diffenc.c \
    'backward(bits_per_dimension(m, terms), 1.0 / batch);' \
    'backward(bits_per_dimension(m, terms), 1.0); (void)batch;'
mutant 'training step: recon and latent summed instead of averaged' diffenc.c \
    'mean[term] /= count;' \
    'mean[term] /= b->batch;'
mutant 'training step: other examples train the encoder too' diffenc.c \
    'n->encoder_fixed = !trains_encoder(b, m.config, i);' \
    'n->encoder_fixed = 0;'
mutant 'training step: the same noise at every step' diffenc.c \
    'random_stream(b->seed, RANDOM_NOISE, b->step, index)' \
    'random_stream(b->seed, RANDOM_NOISE, 0, index)'
mutant 'generative mean: no counterterm' diffenc.c \
    'x_factor = add(x_factor, counterterm_factor(m, s, t));' \
    'x_factor = add(x_factor, affine(0, counterterm_factor(m, s, t), 0));'
mutant 'sampler: variance for standard deviation' diffenc.c \
    'mul(square_root(generative_variance(m, s, t)), eps)' \
    'mul(generative_variance(m, s, t), eps)'
mutant 'sampler: the loop ends a step early' diffenc.c \
    'step >= 1 &&' \
    'step >= 2 &&'
mutant 'sampler: the loop takes the times of the step before' diffenc.c \
    't = (double)step / T;' \
    't = (double)(step < T ? step + 1 : T) / T;'
mutant 'deterministic sampler: the noise is scaled for t' diffenc.c \
    'return diffuse(x_s, gamma_s, eps_hat);' \
    'return diffuse(x_s, gamma_t, eps_hat); (void)gamma_s;'
mutant 'exact dx_t/dlambda: sign of dy/dlambda' diffenc.c \
    'sub(e.x_t, sub(e.y, e.y_dot))' \
    'sub(e.x_t, add(e.y, e.y_dot))'

# ---- reverse mode and tangents ----

mutant 'convolution: kernel not transposed for the input gradient' autograd.c \
    'convolve3x3_fast(h, w, out, in, y->gradient, transposed_kernel(kernel), NULL, dx, dx, scratch);' \
    'convolve3x3_fast(h, w, out, in, y->gradient, kernel->value, NULL, dx, dx, scratch);'
mutant 'dense layer: kernel not transposed for the input gradient' autograd.c \
    'matrix_product(h * w, out, in, y->gradient, transposed_kernel(kernel), NULL, dx, dx, scratch);' \
    'matrix_product(h * w, out, in, y->gradient, kernel->value, NULL, dx, dx, scratch);'
mutant 'convolution: forgotten gradient of the residual' autograd.c \
    'add_gradient(y->input[3], y->gradient, element_count(y), 1);' \
    'add_gradient(y->input[3], y->gradient, element_count(y), 0);'
mutant 'convolution: forgotten tangent of the bias' autograd.c \
    'again(y, 0, x_dot, kernel, bias_dot, residual_dot)' \
    'again(y, 0, x_dot, kernel, NULL, residual_dot)'
mutant 'subtraction: sign of the tangent' autograd.c \
    'bare_add(a->tangent, factor, b->tangent)' \
    'bare_add(a->tangent, -factor, b->tangent)'
mutant 'concatenation: both get the gradient of the first' autograd.c \
    'y->gradient[(size_t)i * y->channels + first + c]' \
    'y->gradient[(size_t)i * y->channels + 0 * first + c]'
mutant 'reverse sweep: a gradient begins with what is in its memory' autograd.c \
    'memset(a->gradient, 0, count * sizeof(real));' \
    ';'
mutant 'product rule: half of it' autograd.c \
    'bare_add(again(y, y->option, a->tangent, b, NULL, NULL), 1, of_b)' \
    'a->tangent ? again(y, y->option, a->tangent, b, NULL, NULL) : of_b'
mutant 'number times tensor: gradient of the number from one element' autograd.c \
    'sum += dy[i];' \
    'sum = dy[i];'
mutant 'softmax tangent: a term of its gradient missing' autograd.c \
    'g[j] * (s_dot[j] - mean) - inner * s_dot[j];' \
    'g[j] * (s_dot[j] - mean);'
mutant 'attention: the gradient of q is written, not added' autograd.c \
    'ds, k_scaled, NULL, dq + at, dq + at, scratch)' \
    'ds, k_scaled, NULL, NULL, dq + at, scratch)'
mutant 'multiples: gradient with the first factor alone' autograd.c \
    '(real)factor[f] * y->gradient' \
    '(real)factor[0] * y->gradient'
mutant 'tangents: half of the constant of an operator' autograd.c \
    'memcpy(t->number, y->number, sizeof t->number);' \
    't->number[0] = 0.5 * y->number[0];'
mutant 'max-pooling: the tangent takes its own largest' autograd.c \
    'again(y, 1, x->tangent, NULL, NULL, NULL)' \
    'again(y, 0, x->tangent, NULL, NULL, NULL)'
mutant 'dropout: another mask for the tangent' autograd.c \
    't->stream = y->stream, t->position = y->position;' \
    't->stream = y->stream, t->position = y->position + DROPOUT_RUN;'
mutant 'upsampling: taps in the wrong order in the input gradient' autograd.c \
    'transposed + (3 - tap) * size' \
    'transposed + tap * size'
mutant 'upsampling: rows and columns of the taps exchanged' autograd.c \
    'tap / 2, column = 2 * (i % x->width) + tap % 2' \
    'tap % 2, column = 2 * (i % x->width) + tap / 2'
mutant 'upsampling: the gradient is gathered from the opposite corner' autograd.c \
    'y->gradient + upsampled_place(x, y, tap, i)' \
    'y->gradient + upsampled_place(x, y, 3 - tap, i)'
mutant 'second derivative of swish' autograd.c \
    's * (1 - s) * (2 + x * (1 - 2 * s))' \
    's * (1 - s) * (2 + x * (1 - s))'
mutant 'likelihood: sign of the gradient by log variance' autograd.c \
    'dlog_variance[0] -=' \
    'dlog_variance[0] +='

# ---- minimal filtering ----

mutant 'filtering: a sign in A^T' tensor.c \
    'odd + 8 * odd2 + m[5 * step];' \
    'odd + 8 * odd2 - m[5 * step];'
mutant 'filtering: a sign in G' tensor.c \
    '-SIXTH * (k0 + k2), -SIXTH * k1,' \
    '-SIXTH * (k0 + k2), SIXTH * k1,'
mutant 'filtering: a term missing in G^T' tensor.c \
    'even2 - even + u[5 * step];' \
    'even2 - even;'
mutant 'filtering: the gradient of the last tiles alone' tensor.c \
    '.start = first ? kernels.data : NULL,' \
    '.start = NULL,'
mutant 'filtering: no bias' tensor.c \
    'from[c] + (bias ? bias[c] : 0)' \
    'from[c] + 0 * (bias ? bias[c] : 0)'

# ---- group normalisation ----

mutant 'group norm: gradient without mean(g xhat)' tensor.c \
    'j.slope[c] = -t->rstd[c] * t->rstd[c] * j.mean_xhat[c];' \
    'j.slope[c] = 0;'
mutant 'group norm: gradient without mean(g)' tensor.c \
    'j.offset[c] = -t->rstd[c] * j.mean[c] - j.slope[c] * t->mean[c];' \
    'j.offset[c] = -j.slope[c] * t->mean[c];'
mutant 'group norm: a term missing in the gradient of the tangent' tensor.c \
    '+ b * of_x_dot.slope[c];' \
    ';'
mutant 'group norm: no curvature of swish in the gradient of the tangent' tensor.c \
    'of_u(&t, times_curve, du, du);' \
    'memset(du, 0, t.count * sizeof(real));'
mutant 'group norm: no dropout in the gradient of the tangent' tensor.c \
    'multiply(t.count, n->dropout_factor, du);' \
    ';'

# ---- networks ----

mutant 'encoder: another dropout mask at every time' nn.c \
    'n->graph.dropout_position = 0;' \
    ';'
mutant 'encoder: the dropout masks of the score network' nn.c \
    'n->graph.dropout_stream.purpose = masks;' \
    'n->graph.dropout_stream.purpose = RANDOM_DROPOUT; (void)masks;'
mutant '1x1 kernels are not transposed' nn.c \
    'if (p->rank > 1)' \
    'if (p->rank > 2)'
mutant 'gradient: with the kernels of the first step, transposed' nn.c \
    '    transpose_kernels(w);' \
    '    if (!w->transposed) transpose_kernels(w);'
mutant 'gradient: a batch begins with the gradient of the last one' nn.c \
    'memset(n->gradient, 0, w->model->weight_count * sizeof(real));' \
    ';'
mutant 'gradient: the last slot is left out of the sum' nn.c \
    'for (int s = 1; s < slots; s++)' \
    'for (int s = 1; s + 1 < slots; s++)'
mutant 'gradient: as many slots as threads' nn.c \
    'pairs < 1 ? 1 : pairs < GRADIENT_SLOTS ? pairs : GRADIENT_SLOTS;' \
    'w->threads < pairs ? w->threads : pairs;'
mutant 'time: seen in 1000 radians, not cycles' nn.c \
    '1000 / 6.283185307179586 * exp' \
    '1000 * exp'
mutant 'Muon: the momentum itself, not a step ahead' nn.c \
    'u[j] = momentum * m[j] + (1 - momentum) * g[j];' \
    'u[j] = m[j];'
mutant 'the encoder learns at the full rate' nn.c \
    'p->in_encoder ? rate * o->encoder_rate : rate' \
    'rate'
mutant 'AdamW: the schedule decays' nn.c \
    'p->decays = p->is_kernel || initial == INIT_ONE;' \
    'p->decays = initial != INIT_ZERO;'
mutant 'Muon: orthogonalises the classes' nn.c \
    'rank > 1 && strcmp(name, "class.kernel") != 0;' \
    'rank > 1;'
mutant 'classes: the networks see the first one' diffenc.c \
    'm->network->label = e.label;' \
    'm->network->label = 0 * e.label;'
mutant 'AdamW: no bias correction of the second moment' nn.c \
    'v_scale = (real)(1 / (1 - pow(o->beta2, step)))' \
    'v_scale = (real)(1 + 0 * pow(o->beta2, step))'
mutant 'kept outputs come back in the wrong order' nn.c \
    'concatenate(h, kept[blocks - i])' \
    'concatenate(h, kept[i])'

echo "mutants: $killed killed, $survived survived"
[ "$survived" -eq 0 ]
