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
cp ./*.c ./*.h Makefile "$work" && mkdir "$work/tests" && cp tests/*.c tests/*.h "$work/tests" || exit 1
cd "$work" || exit 1

# -O1 builds fast. No name of a directory is assumed: the Makefile prints it.
build() {
    make --no-print-directory DOUBLE=1 CFLAGS=-O1 diffenc_mutant tests_mutant >build.log 2>&1
}
cat >>Makefile <<'END'

TESTED = tensor autograd nn diffenc
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
    for t in tensor autograd nn diffenc; do
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
    'return affine(-1, reciprocal(m->gamma_range), 0);' \
    'return affine(1, reciprocal(m->gamma_range), 0);'
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
    'fmod(u + (double)example / batch, 1)' \
    'fmod(u + 0 * (double)example / batch, 1)'
mutant 'generative mean: no counterterm' diffenc.c \
    'x_factor = add(x_factor, counterterm_factor(m, s, t));' \
    'x_factor = add(x_factor, affine(0, counterterm_factor(m, s, t), 0));'
mutant 'sampler: variance for standard deviation' diffenc.c \
    'mul(square_root(generative_variance(m, s, t)), eps)' \
    'mul(generative_variance(m, s, t), eps)'
mutant 'exact dx_t/dlambda: sign of dy/dlambda' diffenc.c \
    'sub(e.x_t, sub(e.y, e.y_dot))' \
    'sub(e.x_t, add(e.y, e.y_dot))'

# ---- reverse mode and tangents ----

mutant 'convolution: kernel not transposed for the input gradient' autograd.c \
    'convolve3x3_fast(h, w, out, in, y->gradient, flipped(kernel), NULL, start, dx, scratch);' \
    'convolve3x3_fast(h, w, out, in, y->gradient, kernel->value, NULL, start, dx, scratch);'
mutant 'convolution: forgotten gradient of the residual' autograd.c \
    '    if (residual)' \
    '    if (residual && 0)'
mutant 'convolution: forgotten tangent of the bias' autograd.c \
    'convolve(x->tangent, kernel, bias_dot, residual_dot)' \
    'convolve(x->tangent, kernel, NULL, residual_dot)'
mutant 'subtraction: sign of the tangent' autograd.c \
    'affine(b_factor, b->tangent, 0)' \
    'affine(-b_factor, b->tangent, 0)'
mutant 'concatenation: both get the gradient of the first' autograd.c \
    'const real *dy = y->gradient + (size_t)i * y->channels + first;' \
    'const real *dy = y->gradient + (size_t)i * y->channels + 0 * first;'
mutant 'reverse sweep: a gradient begins with what is in its memory' autograd.c \
    'a->gradient_is_empty = 1;' \
    'a->gradient_is_empty = 0;'
mutant 'product rule: half of it' autograd.c \
    'add_or(mul_or(a->tangent, b), mul_or(a, b->tangent))' \
    'a->tangent ? mul(a->tangent, b) : mul(a, b->tangent)'
mutant 'number times tensor: gradient of the number from one element' autograd.c \
    'sum += dy[i];' \
    'sum = dy[i];'
mutant 'softmax tangent: a term of its gradient missing' autograd.c \
    'g[j] * (s_dot[j] - mean) - inner * s_dot[j];' \
    'g[j] * (s_dot[j] - mean);'
mutant 'max-pooling: the tangent takes its own largest' autograd.c \
    'y_dot->option = 1;' \
    'y_dot->option = 0;'
mutant 'dropout: another mask for the tangent' autograd.c \
    'y_dot->position = y->position;' \
    'y_dot->position = y->position + DROPOUT_RUN;'
mutant 'upsampling: taps in the wrong order in the input gradient' autograd.c \
    'flipped(kernel) + (3 - tap) * in * out' \
    'flipped(kernel) + tap * in * out'
mutant 'second derivative of swish' autograd.c \
    'return s * (1 - s) * (2 + x * (1 - 2 * s));' \
    'return s * (1 - s) * (2 + x * (1 - s));'
mutant 'likelihood: sign of the gradient by log variance' autograd.c \
    'dlog_variance[0] -=' \
    'dlog_variance[0] +='

# ---- minimal filtering ----

mutant 'filtering: a sign in A^T' tensor.c \
    'odd + 8 * odd2 + m5;' \
    'odd + 8 * odd2 - m5;'
mutant 'filtering: a sign in G' tensor.c \
    'odd = -SIXTH * k1,' \
    'odd = SIXTH * k1,'
mutant 'filtering: a term missing in G^T' tensor.c \
    'even2 - even + u5;' \
    'even2 - even;'
mutant 'filtering: the gradient of the last tiles alone' tensor.c \
    '.start = first ? k : NULL}' \
    '.start = NULL}'
mutant 'filtering: no bias' tensor.c \
    '(bias ? bias[n] : 0) + (start' \
    '0 * (bias ? bias[n] : 0) + (start'

# ---- group normalisation ----

mutant 'group norm: gradient without mean(g xhat)' tensor.c \
    'slope[c] *= -rstd[c] * rstd[c];' \
    'slope[c] *= 0;'
mutant 'group norm: gradient without mean(g)' tensor.c \
    'offset[c] = -rstd[c] * offset[c] - slope[c] * mean[c];' \
    'offset[c] = -slope[c] * mean[c];'
mutant 'group norm: a term missing in the gradient of the tangent' tensor.c \
    '+ g_inner[c] * xhat_dot[at]);' \
    '+ 0 * g_inner[c] * xhat_dot[at]);'
mutant 'group norm: no curvature of swish in the gradient of the tangent' tensor.c \
    'd * swish_curve(u, s) * n->scale[c] * xhat_dot[at]' \
    '0 * swish_curve(u, s) * n->scale[c] * xhat_dot[at]'

# ---- networks ----

mutant 'encoder: another dropout mask at every time' nn.c \
    'n->graph.dropout_position = 0;' \
    ';'
mutant '1x1 kernels are not flipped' nn.c \
    'if (p->rank > 1)' \
    'if (p->rank > 2)'
mutant 'time: frequencies of the tangent' nn.c \
    'with_tangent(cycles, outer_scale(t_dot, frequency, half))' \
    'affine(1, with_tangent(cycles, affine(0.5, outer_scale(t_dot, frequency, half), 0)), 0)'
mutant 'AdamW: no bias correction of the second moment' nn.c \
    'v_scale = (real)(1 / (1 - pow(o->beta2, step)))' \
    'v_scale = (real)(1 + 0 * pow(o->beta2, step))'
mutant 'kept outputs come back in the wrong order' nn.c \
    'concatenate(h, kept[blocks - i])' \
    'concatenate(h, kept[i])'

echo "mutants: $killed killed, $survived survived"
[ "$survived" -eq 0 ]
