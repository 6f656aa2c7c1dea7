/* main.c - the roof: the command line, the training loop, progress and logs.
 *
 * Results go to stdout, progress to stderr. Exit status 0, 1 for a failure, 2 for wrong usage; a training
 * stopped by a signal saves everything and exits with 128 + the signal's number, as the shell would say
 * it. */

#define _POSIX_C_SOURCE 200809L

#include "diffenc.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#ifdef _OPENMP
#include <omp.h>
#endif

/* What a command returns: its exit status, or HELP after --help, which main() turns into OK. */
enum { OK = 0, FAILURE = 1, USAGE = 2, HELP = 3 };

enum { MAX_THREADS = 256, MAX_BATCH = 1 << 20 };

static const double LOG_2 = 0.6931471805599453;

static int report(const Error *error) {
    fprintf(stderr, "diffenc: %s\n", error->text);
    return FAILURE;
}

/* ---- options ---- */

typedef enum {
    OPTION_INT,
    OPTION_REAL,
    OPTION_SEED,
    OPTION_TEXT,
    OPTION_FLAG,
    OPTION_CHOICE,
    OPTION_MODEL
} OptionType;

enum { TEXT_SIZE = 1024 };   /* bytes of a text an option holds */

/* One option of a command. `target` points to an int (INT, FLAG, CHOICE), a double, a uint64_t, a
 * char[TEXT_SIZE] or a Config; what it holds before parsing is the default. Numbers must lie in [low,
 * high]. The argument of a choice lists the choices, "a|b|c", and the int counts them from 0. */
typedef struct {
    const char *name;
    OptionType type;
    void *target;
    double low, high;
    const char *argument, *help;
    int given;
} Option;

/* What an option holds, as text; numbers with the fewest digits that read back as the same number. */
static void option_text(const Option *o, char text[TEXT_SIZE]) {
    const char *choice = o->argument;
    switch (o->type) {
    case OPTION_INT: case OPTION_FLAG: snprintf(text, TEXT_SIZE, "%d", *(int *)o->target); break;
    case OPTION_REAL:
        for (int digits = 1, same = 0; digits <= 17 && !same; digits++) {
            snprintf(text, TEXT_SIZE, "%.*g", digits, *(double *)o->target);
            same = strtod(text, NULL) == *(double *)o->target;
        }
        break;
    case OPTION_SEED: snprintf(text, TEXT_SIZE, "%llu", (unsigned long long)*(uint64_t *)o->target); break;
    case OPTION_TEXT: snprintf(text, TEXT_SIZE, "%s", (const char *)o->target); break;
    case OPTION_MODEL: config_model_name(o->target, text); break;
    case OPTION_CHOICE:
        for (int i = *(int *)o->target; i > 0; i--)
            choice += strcspn(choice, "|") + 1;
        snprintf(text, TEXT_SIZE, "%.*s", (int)strcspn(choice, "|"), choice);
    }
}

/* The index of `text` among the choices "a|b|c", or -1. */
static int choice_index(const char *choices, const char *text) {
    const size_t length = strlen(text);
    int index = 0;
    for (const char *choice = choices; *choice; index++) {
        const size_t end = strcspn(choice, "|");
        if (end == length && strncmp(choice, text, length) == 0)
            return index;
        choice += end + (choice[end] == '|');
    }
    return -1;
}

/* Set an option from a text, or say what was expected: "lr 'x': expected a number from 0 to 1e+06". */
static int option_set(Option *o, const char *text, Error *error) {
    char *end = NULL;
    errno = 0;
    switch (o->type) {
    case OPTION_TEXT:
        if (!*text || strlen(text) >= TEXT_SIZE - 64)
            return fail(error, "%s '%.20s': expected a text of 1 to %d characters", o->name, text,
                        TEXT_SIZE - 65);
        snprintf(o->target, TEXT_SIZE, "%s", text);
        return 0;
    case OPTION_SEED: {
        const unsigned long long value = strtoull(text, &end, 10);
        if (*text < '0' || *text > '9' || *end || errno)
            return fail(error, "%s '%.40s': expected a whole number from 0 to 18446744073709551615", o->name,
                        text);
        *(uint64_t *)o->target = value;
        return 0;
    }
    case OPTION_CHOICE: {
        const int index = choice_index(o->argument, text);
        if (index < 0)
            return fail(error, "%s '%.40s': expected %s", o->name, text, o->argument);
        *(int *)o->target = index;
        return 0;
    }
    case OPTION_MODEL: return config_parse_model(o->target, text, error);
    case OPTION_INT: case OPTION_REAL: case OPTION_FLAG: break;
    }
    const double value = strtod(text, &end);
    const int whole = o->type != OPTION_REAL;
    if (!*text || *end || !(value >= o->low && value <= o->high) || (whole && value != floor(value)))
        return fail(error, "%s '%.40s': expected a %snumber from %g to %.10g", o->name, text,
                    whole ? "whole " : "", o->low, o->high);
    if (whole)
        *(int *)o->target = (int)value;
    else
        *(double *)o->target = value;
    return 0;
}

static void print_options(const Option *options, int count) {
    for (int i = 0; i < count; i++) {
        char left[64], value[TEXT_SIZE];
        snprintf(left, sizeof left, "--%s %s", options[i].name, options[i].argument);
        option_text(&options[i], value);
        printf("  %-28s %s", left, options[i].help);
        if (options[i].type != OPTION_FLAG && *value)
            printf(" (default %s)", value);
        printf("\n");
    }
}

/* Parse the arguments of a command; what is no option goes to `operand` (NULL: none is taken). Returns OK
 * to go on, USAGE after an error, HELP after --help. */
static int parse_options(int argc, char **argv, Option *options, int count, const char *usage,
                         const char **operand) {
    Error error;
    const char *command = argv[0];
    for (int i = 1; i < argc; i++) {
        const char *argument = argv[i], *equals = strchr(argument, '=');
        if (strcmp(argument, "--help") == 0) {
            printf("usage: diffenc %s\n\n", usage);
            print_options(options, count);
            return HELP;
        }
        if (strncmp(argument, "--", 2) != 0 && operand && !*operand) {
            *operand = argument;
            continue;
        }
        const size_t length = equals ? (size_t)(equals - argument) : strlen(argument);
        Option *o = NULL;
        for (int j = 0; j < count; j++)
            if (strncmp(argument, "--", 2) == 0 && strlen(options[j].name) + 2 == length &&
                strncmp(options[j].name, argument + 2, length - 2) == 0)
                o = &options[j];
        int status = -1;
        if (!o)
            fail(&error, "unknown option or argument '%.60s' (see diffenc %s --help)", argument, command);
        else if (o->type == OPTION_FLAG)
            status = equals ? fail(&error, "--%s takes no value", o->name) : option_set(o, "1", &error);
        else if (!equals && i + 1 == argc)
            status = fail(&error, "--%s needs a value", o->name);
        else
            status = option_set(o, equals ? equals + 1 : argv[++i], &error);
        if (status) {
            fprintf(stderr, "diffenc: %s: %s\n", command, error.text);
            return USAGE;
        }
        o->given = 1;
    }
    return OK;
}

static int default_threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads() < MAX_THREADS ? omp_get_max_threads() : MAX_THREADS;
#else
    return 1;
#endif
}

/* ---- settings: what a training was told, and how that travels in a checkpoint ---- */

typedef struct {
    Config config;
    int net, prediction, schedule;   /* these three of the configuration, as choices */
    Optimizer optimizer;
    int batch;
    uint64_t seed;
    char data[TEXT_SIZE];
    uint64_t images;                 /* how many there are in these data */
} Settings;

static Settings settings_default(void) {
    Settings s = {.config = config_default(),
                  .optimizer = optimizer_default(),
                  .batch = 64,
                  .seed = 1,
                  .data = "digits"};
    s.net = (int)s.config.net;
    s.prediction = (int)s.config.prediction;
    s.schedule = (int)s.config.schedule;
    return s;
}

/* The table of all settings: the command line, the metadata of a checkpoint and the comparison of the two
 * walk over it. The first FIXED_SETTINGS make the model and the data's order; a resumed training cannot
 * change them. */
enum { SETTINGS = 19, FIXED_SETTINGS = 13 };

static void settings_options(Settings *s, Option *list) {
    Config *c = &s->config;
    Optimizer *o = &s->optimizer;
    const Option options[SETTINGS] = {
        {"model", OPTION_MODEL, c, 0, 0, "NAME", "vdm-L, diffenc-L-nt or diffenc-L-E", 0},
        {"net", OPTION_CHOICE, &s->net, 0, 0, "flat|unet", "body of the score network", 0},
        {"channels", OPTION_INT, &c->channels, 4, 1024, "N", "of the score network, a multiple of 4", 0},
        {"encoder-channels", OPTION_INT, &c->encoder_channels, 4, 1024, "N",
         "of the encoder, a multiple of 4", 0},
        {"predict", OPTION_CHOICE, &s->prediction, 0, 0, "v|eps|x", "what the score network predicts", 0},
        {"schedule", OPTION_CHOICE, &s->schedule, 0, 0, "fixed|learned", "the end points of gamma(t)", 0},
        {"gamma-min", OPTION_REAL, &c->gamma_min, -40, 40, "X", "gamma(0); where a learned schedule starts",
         0},
        {"gamma-max", OPTION_REAL, &c->gamma_max, -40, 40, "X", "gamma(1); where a learned schedule starts",
         0},
        {"timesteps", OPTION_INT, &c->timesteps, 1, 1e6, "T",
         "finite number of time steps; without it: continuous", 0},
        {"variance-ratio", OPTION_REAL, &c->variance_ratio, 1e-6, 1e6, "W",
         "sigma_Q^2 / sigma_P^2, finite T only", 0},
        {"batch", OPTION_INT, &s->batch, 1, MAX_BATCH, "N", "examples in a step", 0},
        {"seed", OPTION_SEED, &s->seed, 0, 0, "N", "the same seed gives the same bits", 0},
        {"data", OPTION_TEXT, s->data, 0, 0, "DIR|digits",
         "MNIST, Fashion-MNIST or CIFAR-10, or built-in digits", 0},
        {"dropout", OPTION_REAL, &c->dropout, 0, 0.99, "X", "rate in training", 0},
        {"lr", OPTION_REAL, &o->learning_rate, 0, 1e6, "X", "learning rate of AdamW", 0},
        {"warmup", OPTION_INT, &o->warmup, 0, 2e9, "N", "steps over which the learning rate rises from 0", 0},
        {"weight-decay", OPTION_REAL, &o->weight_decay, 0, 1e6, "X", "of AdamW, not on biases", 0},
        {"clip", OPTION_REAL, &o->clip, 0, 1e30, "X", "largest norm of the whole gradient; 0: no clipping",
         0},
        {"ema", OPTION_REAL, &o->ema, 0, 1, "X", "decay of the moving average of the weights", 0},
    };
    memcpy(list, options, sizeof options);
}

/* The choices into the configuration; then it must be one that can be built. */
static int settings_check(Settings *s, Error *error) {
    s->config.net = (NetKind)s->net;
    s->config.prediction = (Prediction)s->prediction;
    s->config.schedule = (ScheduleKind)s->schedule;
    return config_check(&s->config, error);
}

/* "encoder-channels" on the command line is "encoder_channels" in a file. */
static void metadata_key(const char *name, char key[32]) {
    snprintf(key, 32, "%s", name);
    for (char *dash = key; (dash = strchr(dash, '-')) != NULL;)
        *dash = '_';
}

/* All that a checkpoint says about itself besides the tensors and its format: the settings, and what only
 * files know. */
enum { FILE_OPTIONS = SETTINGS + 5 };

static void file_options(Settings *s, uint64_t *step, Option *list) {
    const Option more[FILE_OPTIONS - SETTINGS] = {
        {"step", OPTION_SEED, step, 0, 0, "", "", 0},
        {"images", OPTION_SEED, &s->images, 0, 0, "", "", 0},
        {"height", OPTION_INT, &s->config.height, 1, 1e6, "", "", 0},
        {"width", OPTION_INT, &s->config.width, 1, 1e6, "", "", 0},
        {"image-channels", OPTION_INT, &s->config.image_channels, 1, 3, "", "", 0},
    };
    settings_options(s, list);
    memcpy(list + SETTINGS, more, sizeof more);
}

static int settings_read(const TensorFile *f, const char *path, Settings *s, uint64_t *step, Error *error) {
    const char *format = tensors_metadata(f, "format"), *version = tensors_metadata(f, "format_version");
    Option options[FILE_OPTIONS];
    Error inner;
    *s = settings_default();
    *step = 0;
    if (!format || strcmp(format, "diffenc") != 0)
        return fail(error, "%s: is no checkpoint of this program: metadata 'format' is not 'diffenc'", path);
    if (!version || strcmp(version, "1") != 0)
        return fail(error, "%s: format version %.20s, this program reads version 1", path,
                    version ? version : "missing");
    file_options(s, step, options);
    for (int i = 0; i < FILE_OPTIONS; i++) {
        char key[32];
        metadata_key(options[i].name, key);
        const char *text = tensors_metadata(f, key);
        const int continuous = options[i].target == &s->config.timesteps && text && strcmp(text, "0") == 0;
        if (!text && i == 0)
            return fail(error, "%s: metadata 'model' is missing", path);
        if (text && !continuous && option_set(&options[i], text, &inner))
            return fail(error, "%s: metadata: %s", path, inner.text);
    }
    if (*step > UINT32_MAX)
        return fail(error, "%s: metadata: step %llu is beyond 4294967295", path, (unsigned long long)*step);
    return settings_check(s, &inner) ? fail(error, "%s: metadata: %s", path, inner.text) : 0;
}

/* ---- checkpoints ---- */

static const char *const VECTORS[4] = {"params", "ema", "adam.m", "adam.v"};

static real *vector_of(Model *m, int index) {
    real *const vectors[4] = {m->params, m->ema, m->adam_m, m->adam_v};
    return vectors[index];
}

static const ElementType TYPE_OF_REAL = sizeof(real) == sizeof(double) ? TYPE_F64 : TYPE_F32;

enum { NAME_SIZE = 80 };   /* "adam.m." and the name of a parameter */

/* A parameter's part of a vector as a tensor of a file. `name` holds "PREFIX.NAME" as long as the result
 * is used. */
static TensorOut tensor_out(const char *prefix, const Parameter *p, const real *vector,
                            char name[NAME_SIZE]) {
    TensorOut out = {.name = name, .type = TYPE_OF_REAL, .rank = p->rank, .data = vector + p->offset};
    snprintf(name, NAME_SIZE, "%s.%s", prefix, p->name);
    memcpy(out.shape, p->shape, sizeof p->shape);
    return out;
}

/* A checkpoint that could not be read again must not take the place of one that can: what is not finite is
 * not written. */
static int checkpoint_write(const char *path, Model *m, const Settings *s, Error *error) {
    const int count = 4 * m->parameter_count;
    TensorOut *out = allocate((size_t)count, sizeof *out);
    char(*names)[NAME_SIZE] = allocate((size_t)count, sizeof *names);
    char(*text)[2][TEXT_SIZE] = allocate(FILE_OPTIONS, sizeof *text);   /* keys and values */
    const char *metadata[2 * FILE_OPTIONS + 4] = {"format", "diffenc", "format_version", "1"};
    Option options[FILE_OPTIONS];
    Settings copy = *s;
    int status = 0;
    file_options(&copy, &m->step, options);
    for (int i = 0; i < FILE_OPTIONS; i++) {
        metadata_key(options[i].name, text[i][0]);
        option_text(&options[i], text[i][1]);
        metadata[2 * i + 4] = text[i][0], metadata[2 * i + 5] = text[i][1];
    }
    for (int i = 0; i < count && status == 0; i++) {
        const Parameter *p = &m->parameter[i % m->parameter_count];
        const real *vector = vector_of(m, i / m->parameter_count);
        out[i] = tensor_out(VECTORS[i / m->parameter_count], p, vector, names[i]);
        if (!isfinite(dot(vector + p->offset, vector + p->offset, p->count)))
            status = fail(error, "step %llu: diverged: %s is not finite any more",
                          (unsigned long long)m->step, names[i]);
    }
    if (status == 0)
        status = tensors_write(path, out, count, metadata, FILE_OPTIONS + 2, error);
    free(text);
    free(names);
    free(out);
    return status;
}

/* What a command needs of a checkpoint: only the weights in training (grad), only their average (sample,
 * eval, show), or everything (resume). */
typedef enum { LOAD_PARAMS, LOAD_EMA, LOAD_ALL } Load;

static int checkpoint_load(const TensorFile *f, const char *path, Load load, Model *m, Error *error) {
    int known = 0;
    for (int i = 0; i < 4 * m->parameter_count; i++) {
        const int vector = i / m->parameter_count;
        const Parameter *p = &m->parameter[i % m->parameter_count];
        char name[NAME_SIZE];
        snprintf(name, sizeof name, "%s.%s", VECTORS[vector], p->name);
        const TensorEntry *entry = tensors_find(f, name);
        known += entry != NULL;
        if (load != LOAD_ALL && vector != (load == LOAD_PARAMS ? 0 : 1))
            continue;
        if (!entry)
            return fail(error, "%s: holds no tensor '%s', which model %s needs", path, name,
                        tensors_metadata(f, "model"));
        if (tensors_copy(entry, path, p->rank, p->shape, vector_of(m, vector) + p->offset, error))
            return -1;
    }
    /* A tensor the model has no use for says that the file is not what its metadata claim. */
    return known == f->tensor_count ? 0
                                    : fail(error, "%s: holds %d tensors that model %s does not have", path,
                                           f->tensor_count - known, tensors_metadata(f, "model"));
}

/* On failure the model is empty, and model_free does no harm. */
static int checkpoint_read(const char *path, Load load, Model *m, Settings *s, Error *error) {
    TensorFile f;
    uint64_t step;
    size_t weights = 0;
    memset(m, 0, sizeof *m);
    if (tensors_read(path, &f, error))
        return -1;
    int status = settings_read(&f, path, s, &step, error) || model_size(&s->config, &weights, error) ? -1 : 0;
    if (status == 0 &&
        weights > f.bytes.size / sizeof(float)) /* before the metadata's word is taken for it */
        status = fail(error, "%s: holds %zu bytes, too few for the %zu weights of model %s", path,
                      f.bytes.size, weights, tensors_metadata(&f, "model"));
    if (status == 0 && (status = model_new(m, &s->config, s->seed, error)) == 0) {
        m->step = step;
        if ((status = checkpoint_load(&f, path, load, m, error)) != 0)
            model_free(m);
        else if (load == LOAD_ALL && f.tensors[0].type != TYPE_OF_REAL)
            fprintf(stderr, "diffenc: %s: was written in another precision, goes on in %s\n", path,
                    TYPE_OF_REAL == TYPE_F64 ? "double" : "single");
    }
    tensors_free(&f);
    return status;
}

/* ---- one training step ---- */

typedef struct {
    const Model *model;
    const unsigned char *images;
    int batch;
    uint64_t seed;
    double u;
    double (*terms)[3];   /* [batch]: recon, latent, diffusion in nats */
} Batch;

static size_t image_size(const Config *c) {
    return (size_t)c->height * c->width * c->image_channels;
}

static real *noise(Network *n, RandomStream stream, size_t count) {
    real *eps = arena_allocate(n->graph.arena, count, sizeof(real));
    random_normal(stream, eps, count);
    return eps;
}

static Tensor *image_of(const Method *m, const real *values) {
    const Config *c = m->config;
    return constant(m->graph, c->height, c->width, c->image_channels, values);
}

static void terms_of(LossTerms terms, double out[3]) {
    out[0] = terms.recon->number_value;
    out[1] = terms.latent->number_value;
    out[2] = terms.diffusion->number_value;
}

/* One example's part of the loss and of the gradient of a batch. */
static void learn(Network *n, Example example, int batch, double terms_out[3]) {
    const Method m = method_begin(n);
    const LossTerms terms = objective(&m, example);
    terms_of(terms, terms_out);
    backward(bits_per_dimension(&m, terms), 1.0 / batch);
}

static void training_example(Network *n, int i, void *context) {
    const Batch *b = context;
    const Config *c = &b->model->config;
    const uint32_t step = (uint32_t)b->model->step, index = (uint32_t)i;
    const size_t d = image_size(c);
    n->graph.dropout = c->dropout;
    n->graph.dropout_stream = random_stream(b->seed, RANDOM_DROPOUT, step, index);
    const Example example = {.k = b->images + (size_t)i * d,
                             .t = example_time(b->u, i, b->batch, c->timesteps),
                             .eps = noise(n, random_stream(b->seed, RANDOM_NOISE, step, index), d),
                             .eps_0 = noise(n, random_stream(b->seed, RANDOM_NOISE_0, step, index), d)};
    learn(n, example, b->batch, b->terms[i]);
}

/* The parameter with the largest gradient, or the first one whose gradient is not finite; *norm is that
 * gradient's. */
static const Parameter *steepest(const Model *m, const real *gradient, double *norm) {
    const Parameter *found = m->parameter;
    double most = -1;
    for (int i = 0; i < m->parameter_count && isfinite(most); i++) {
        const Parameter *p = &m->parameter[i];
        const double square = dot(gradient + p->offset, gradient + p->offset, p->count);
        if (!(square <= most))
            most = square, found = p;
    }
    *norm = sqrt(most);
    return found;
}

static const char *const TERMS[3] = {"recon", "latent", "diffusion"};

/* Why a step cannot be taken: the first term of the loss that is not finite, or the largest one, and the same
 * of the gradient by parameter. A NaN may have a sign, which means nothing. */
static int diverged(const Model *m, const double mean[3], const real *gradient, Error *error) {
    double norm;
    const Parameter *p = steepest(m, gradient, &norm);
    int term = 0;
    for (int i = 1; i < 3 && isfinite(mean[term]); i++)
        if (!(mean[i] <= mean[term]))
            term = i;
    return fail(error, "step %llu: diverged: the %s loss is %g, the gradient of %s has the norm %g",
                (unsigned long long)m->step + 1, TERMS[term], fabs(mean[term]), p->name, fabs(norm));
}

int training_step(Model *model, Workers *workers, const Optimizer *optimizer, const unsigned char *images,
                  int batch, uint64_t seed, StepReport *r, Error *error) {
    const double per_bit = 1 / (image_size(&model->config) * LOG_2);
    Batch b = {.model = model, .images = images, .batch = batch, .seed = seed,
               .u = random_uniform(random_stream(seed, RANDOM_TIME, (uint32_t)model->step, 0), 0),
               .terms = workers_results(workers, (size_t)batch, sizeof *b.terms)};
    model_flip(model, workers->threads);
    workers_run(workers, model->params, 1, batch, training_example, &b);

    double mean[3] = {0};
    for (int i = 0; i < batch; i++)
        for (int term = 0; term < 3; term++)
            mean[term] += b.terms[i][term] * per_bit / batch;
    r->total = mean[0] + mean[1] + mean[2];
    const real *gradient = workers_gradient(workers);
    if (!isfinite(r->total))
        return diverged(model, mean, gradient, error);
    r->gradient_norm = optimizer_step(model, optimizer, gradient, workers->threads);
    if (!isfinite(r->gradient_norm))
        return diverged(model, mean, gradient, error);
    r->recon = mean[0], r->latent = mean[1], r->diffusion = mean[2];
    return 0;
}

/* ---- evaluation ---- */

typedef struct {
    const Model *model;
    const Dataset *data;
    int count;
    uint64_t seed;
    double u;
    double (*terms)[4];   /* [count]: recon, latent, diffusion and their sum */
    double *distance;     /* NULL, or [T, count]: ||mu_P - mu_Q||^2 / sigma_Q^2 of every step */
} Evaluation;

/* An image of the data, in memory of the current example. */
static const unsigned char *pixels_of(Network *n, const Dataset *data, int index) {
    unsigned char *k = arena_allocate(n->graph.arena, image_size(&n->model->config), 1);
    dataset_image(data, (uint32_t)index, k);
    return k;
}

static void evaluation_example(Network *n, int i, void *context) {
    const Evaluation *e = context;
    const Config *c = &e->model->config;
    const size_t d = image_size(c);
    const uint32_t index = (uint32_t)i;
    n->graph.dropout = 0;
    const Example example = {.k = pixels_of(n, e->data, i),
                             .t = example_time(e->u, i, e->count, c->timesteps),
                             .eps = noise(n, random_stream(e->seed, RANDOM_EVAL_NOISE, 0, index), d),
                             .eps_0 = noise(n, random_stream(e->seed, RANDOM_EVAL_NOISE_0, 0, index), d)};
    Method m = method_begin(n);
    double *terms = e->terms[i];
    terms_of(objective(&m, example), terms);
    terms[3] = terms[0] + terms[1] + terms[2];
    for (int step = 1; e->distance && step <= c->timesteps; step++) {
        network_begin(n);
        m = method_begin(n);
        Tensor *x = scale_pixels(&m, pixels_of(n, e->data, i));
        Tensor *eps =
            image_of(&m, noise(n, random_stream(e->seed, RANDOM_EVAL_NOISE, (uint32_t)step, index), d));
        const double s = (double)(step - 1) / c->timesteps, t = (double)step / c->timesteps;
        e->distance[(size_t)(step - 1) * e->count + i] = distance_at(&m, x, eps, s, t)->number_value;
    }
}

/* Mean and standard error of x[i * stride], i < count. */
static void mean_and_error(const double *x, int count, int stride, double *mean, double *standard_error) {
    double sum = 0, squares = 0;
    for (int i = 0; i < count; i++)
        sum += x[(size_t)i * stride];
    *mean = sum / count;
    for (int i = 0; i < count; i++)
        squares += (x[(size_t)i * stride] - *mean) * (x[(size_t)i * stride] - *mean);
    *standard_error = count > 1 ? sqrt(squares / (count - 1.0) / count) : 0;
}

/* The bound on the first `count` images with the weights `ema`: for each of recon, latent, diffusion and
 * their sum the mean and the standard error in bits per dimension. */
static void evaluate(Model *model, Workers *workers, const Dataset *data, int count, uint64_t seed,
                     double result[4][2], double *distance) {
    const double per_bit = 1 / (image_size(&model->config) * LOG_2);
    Evaluation e = {.model = model, .data = data, .count = count, .seed = seed, .distance = distance,
                    .u = random_uniform(random_stream(seed, RANDOM_EVAL_TIME, 0, 0), 0)};
    e.terms = allocate((size_t)count, sizeof *e.terms);
    workers_run(workers, model->ema, 0, count, evaluation_example, &e);
    for (int term = 0; term < 4; term++) {
        mean_and_error(&e.terms[0][term], count, 4, &result[term][0], &result[term][1]);
        result[term][0] *= per_bit;
        result[term][1] *= per_bit;
    }
    free(e.terms);
}

/* ---- sampling ---- */

typedef struct {
    const Config *config;
    int timesteps, draw_pixels;
    uint64_t seed;
    unsigned char *images;
} Sampling;

static void sample_example(Network *n, int i, void *context) {
    const Sampling *s = context;
    const size_t d = image_size(s->config);
    const int T = s->timesteps;
    const uint32_t index = (uint32_t)i;
    real *z = allocate(d, sizeof *z);   /* outside of the arena, which begins anew with each step */
    n->graph.dropout = 0;
    random_normal(random_stream(s->seed, RANDOM_SAMPLER, (uint32_t)T + 1, index), z, d);
    for (int step = T; step >= 1; step--) {
        network_begin(n);
        const Method m = method_begin(n);
        const RandomStream stream = random_stream(s->seed, RANDOM_SAMPLER, (uint32_t)step, index);
        Tensor *eps = image_of(&m, noise(n, stream, d));
        const double before = (double)(step - 1) / T, t = (double)step / T;
        memcpy(z, ancestral_step(&m, image_of(&m, z), before, t, eps)->value, d * sizeof *z);
    }
    network_begin(n);
    const Method m = method_begin(n);
    double *u = s->draw_pixels ? arena_allocate(n->graph.arena, d, sizeof *u) : NULL;
    for (size_t j = 0; u && j < d; j++)
        u[j] = random_uniform(random_stream(s->seed, RANDOM_PIXELS, 0, index), (uint32_t)j);
    decode_pixels(&m, image_of(&m, z), u, s->images + (size_t)i * d);
    free(z);
}

void sample_images(Model *model, Workers *workers, int count, int timesteps, uint64_t seed, int draw_pixels,
                   unsigned char *images) {
    Sampling s = {.config = &model->config, .timesteps = timesteps, .draw_pixels = draw_pixels, .seed = seed,
                  .images = images};
    workers_run(workers, model->ema, 0, count, sample_example, &s);
}

static int grid_write(const char *path, const unsigned char *images, int count, int columns, const Config *c,
                      Error *error) {
    int height, width;
    unsigned char *grid =
        image_grid(images, count, columns, c->height, c->width, c->image_channels, &height, &width);
    const int status = image_write(path, grid, height, width, c->image_channels, error);
    free(grid);
    return status;
}

static int square_columns(int count) {
    return (int)ceil(sqrt(count));
}

/* ---- the log of a training ---- */

/* Loss curves are averages over at most CURVE_POINTS equal runs of steps, so their memory does not grow. */
enum { CURVE_POINTS = 600 };

typedef struct {
    FILE *csv;
    int per_point;
    double sum[CURVE_POINTS][4];   /* step, recon, latent, diffusion */
    int count[CURVE_POINTS];
} Log;

static const char *const LOG_HEADER = "step,bpd,recon,latent,diffusion,gradient_norm,test_bpd,seconds\n";

static void log_point(Log *log, double step, double recon, double latent, double diffusion) {
    const int at = (int)((step - 1) / log->per_point);
    if (at < 0 || at >= CURVE_POINTS)
        return;
    const double values[4] = {step, recon, latent, diffusion};
    for (int i = 0; i < 4; i++)
        log->sum[at][i] += values[i];
    log->count[at]++;
}

/* Open log.csv. A resumed one keeps its lines up to the step of the checkpoint; what a crash left behind
 * them, whole lines or half of one, is cut off. */
static int log_open(Log *log, const char *path, uint64_t step, int steps, Error *error) {
    char line[256];
    long kept = 0;
    memset(log, 0, sizeof *log);
    log->per_point = steps > 0 ? (steps - 1) / CURVE_POINTS + 1 : 1;
    log->csv = fopen(path, step > 0 ? "a+" : "w+");
    if (!log->csv)
        return fail(error, "%s: cannot be opened for writing: %s", path, strerror(errno));
    rewind(log->csv);
    while (fgets(line, sizeof line, log->csv)) {
        unsigned long long at;
        double bpd, recon, latent, diffusion;
        const int numbers = sscanf(line, "%llu,%lf,%lf,%lf,%lf", &at, &bpd, &recon, &latent, &diffusion);
        if (!strchr(line, '\n') || (numbers == 5 ? at > step : strcmp(line, LOG_HEADER) != 0))
            break;
        if (numbers == 5)
            log_point(log, (double)at, recon, latent, diffusion);
        kept = ftell(log->csv);
    }
    if (ftruncate(fileno(log->csv), kept) || fseek(log->csv, 0, SEEK_END) ||
        (kept == 0 && fputs(LOG_HEADER, log->csv) < 0) || fflush(log->csv))
        return fail(error, "%s: cannot be written: %s", path, strerror(errno));
    return 0;
}

/* The three terms differ by factors of a thousand and more, so the chart shows their logarithms to base 10:
 * recon green, latent orange, diffusion blue. */
static int log_draw(const Log *log, const char *path, Error *error) {
    enum { HEIGHT = 600, WIDTH = 900 };
    double(*values)[CURVE_POINTS] = allocate(4, sizeof *values);
    int points = 0;
    for (int i = 0; i < CURVE_POINTS; i++)
        if (log->count[i]) {
            values[0][points] = log->sum[i][0] / log->count[i];
            for (int j = 1; j < 4; j++)
                values[j][points] = log10(log->sum[i][j] / log->count[i]);
            points++;
        }
    const Curve curves[3] = {{{values[0], values[1]}, points, {44, 160, 44}},
                             {{values[0], values[2]}, points, {255, 127, 14}},
                             {{values[0], values[3]}, points, {31, 119, 180}}};
    unsigned char *pixels = allocate((size_t)HEIGHT * WIDTH, 3);
    chart_draw(curves, 3, pixels, HEIGHT, WIDTH);
    const int status = image_write(path, pixels, HEIGHT, WIDTH, 3, error);
    free(pixels);
    free(values);
    return status;
}

/* ---- signals ---- */

/* The one global that is not const: a handler has no other way to say something. */
static volatile sig_atomic_t stop_signal = 0;

static void on_signal(int number) {
    stop_signal = number;
    signal(SIGINT, SIG_DFL);   /* a second one ends the program at once */
    signal(SIGTERM, SIG_DFL);
}

static void catch_signals(void) {
    /* SA_RESTART: a write goes on where the signal came upon it. */
    const struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

/* ---- diffenc train ---- */

/* What a training would take: vectors, gradient slots, and one example's graph, with its gradients, for each
 * thread. */
static int memory_check(const Config *config, int threads, Error *error) {
    const double have = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    Model m = {.config = *config};
    Network n = {.model = &m, .declaring = 1, .graph = {.shapes_only = 1}};
    size_t weights = 0;
    if (model_size(config, &weights, error))
        return -1;
    graph_begin(&n.graph, arena_new());
    const Method method = method_begin(&n);
    const Example example = {NULL, 0.5, NULL, NULL};
    objective(&method, example);
    const double need = (double)weights * sizeof(real) * (5 + GRADIENT_SLOTS) +
                        1.5 * (double)n.graph.bytes * threads;
    arena_free(n.graph.arena);
    free(m.parameter);
    return need < have
               ? 0
               : fail(error, "this model needs about %.1f GiB of memory to train, the machine has %.1f GiB",
                      ldexp(need, -30), ldexp(have, -30));
}

typedef struct {
    Settings settings;
    char out[TEXT_SIZE];
    int steps, threads, save_every, sample_every, sample_steps, eval_every, eval_limit, resume;
    Model model;
    Workers workers;
    Dataset data, test;
    Log log;
    double started, last_line;
    uint64_t first_step;
    int line_is_open;   /* the terminal's cursor stands behind the progress line */
} Training;

static void path_in(const char *directory, const char *name, char path[TEXT_SIZE]) {
    snprintf(path, TEXT_SIZE, "%.*s/%.60s", TEXT_SIZE - 64, directory, name);
}

/* A resumed training goes on with the settings of its checkpoint, `saved`. What was said on the command
 * line must agree, or be something that may change on the way: then it is said. */
static int resume_settings(Training *t, const Option *options, Settings *saved, Error *error) {
    Option theirs[SETTINGS];
    char mine[TEXT_SIZE], was[TEXT_SIZE];
    settings_options(saved, theirs);
    for (int i = 0; i < SETTINGS; i++) {
        option_text(&options[i], mine);
        option_text(&theirs[i], was);
        if (!options[i].given || strcmp(mine, was) == 0)
            continue;
        if (i < FIXED_SETTINGS)
            return fail(error, "%s: was trained with --%s %.60s, not %.60s; another --out starts anew",
                        t->out, options[i].name, was, mine);
        fprintf(stderr, "diffenc: --%s changes from %s to %s\n", options[i].name, was, mine);
        if (option_set(&theirs[i], mine, error))
            return -1;
    }
    t->settings = *saved;
    return 0;
}

/* One training at a time in a directory. The lock goes with the process, however that ends. */
static int directory_lock(const char *directory, Error *error) {
    char path[TEXT_SIZE];
    if (mkdir(directory, 0777) && errno != EEXIST)
        return fail(error, "%s: cannot be created: %s", directory, strerror(errno));
    path_in(directory, ".lock", path);
    const int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (file < 0)
        return fail(error, "%s: cannot be written: %s", path, strerror(errno));
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    if (fcntl(file, F_SETLK, &lock) == 0)
        return 0;
    return errno == EACCES || errno == EAGAIN
               ? fail(error, "%s: another training is at work in this directory", directory)
               : fail(error, "%s: cannot be locked: %s", path, strerror(errno));
}

/* A training that was killed while it wrote left temporary files (file_replace); the lock says that no one
 * is at them. */
static void remove_leftovers(const char *directory) {
    static const char *const names[3] = {"checkpoint.safetensors.tmp.", "loss.png.tmp.", "samples-"};
    DIR *listing = opendir(directory);
    for (struct dirent *entry; listing && (entry = readdir(listing)) != NULL;)
        for (int i = 0; i < 3; i++)
            if (strncmp(entry->d_name, names[i], strlen(names[i])) == 0 && strstr(entry->d_name, ".tmp."))
                unlinkat(dirfd(listing), entry->d_name, 0);
    if (listing)
        closedir(listing);
}

/* What is said next begins a line of its own. */
static void end_line(Training *t) {
    if (t->line_is_open)
        fputc('\n', stderr);
    t->line_is_open = 0;
}

static void progress(Training *t, const StepReport *r) {
    const double now = seconds_now(), done = (double)(t->model.step - t->first_step);
    const double per_step = (now - t->started) / done, left = per_step * (t->steps - (double)t->model.step);
    const int terminal = isatty(STDERR_FILENO), last = t->model.step == (uint64_t)t->steps || stop_signal;
    if (!last && done > 1 && now - t->last_line < (terminal ? 0.1 : 10))
        return;
    t->last_line = now;
    fprintf(stderr,
            "%sstep %llu/%d  %.4f bpd (recon %.4f  latent %.4f  diffusion %.4f)  %.1f images/s  %d:%02d:%02d "
            "left%s",
            terminal ? "\r" : "", (unsigned long long)t->model.step, t->steps, r->total, r->recon, r->latent,
            r->diffusion, t->settings.batch / per_step, (int)(left / 3600), (int)(left / 60) % 60,
            (int)left % 60, terminal ? "  " : "\n");
    t->line_is_open = terminal;
    fflush(stderr);
}

static int save(Training *t, Error *error) {
    char path[TEXT_SIZE];
    path_in(t->out, "checkpoint.safetensors", path);
    if (checkpoint_write(path, &t->model, &t->settings, error))
        return -1;
    path_in(t->out, "loss.png", path);
    return t->model.step > 0 ? log_draw(&t->log, path, error) : 0;
}

static int sample_grid(Training *t, Error *error) {
    enum { COUNT = 64 };
    const Config *c = &t->model.config;
    char name[64], path[TEXT_SIZE];
    snprintf(name, sizeof name, "samples-%llu.png", (unsigned long long)t->model.step);
    path_in(t->out, name, path);
    unsigned char *images = allocate(COUNT, image_size(c));
    const int steps = c->timesteps > 0 ? c->timesteps : t->sample_steps;
    sample_images(&t->model, &t->workers, COUNT, steps, t->settings.seed, 0, images);
    const int status = grid_write(path, images, COUNT, square_columns(COUNT), c, error);
    free(images);
    if (status == 0) {
        end_line(t);
        printf("%s\n", path);
    }
    return status;
}

static int due(uint64_t step, int every) {
    return every > 0 && step > 0 && step % (uint64_t)every == 0;
}

/* The images of the next step, by the order of its epoch. */
static void next_images(const Training *t, unsigned char *images) {
    const Settings *s = &t->settings;
    for (int i = 0; i < s->batch; i++) {
        const uint64_t n = t->model.step * (uint64_t)s->batch + (uint64_t)i;
        const uint32_t position = (uint32_t)(n % t->data.count), epoch = (uint32_t)(n / t->data.count);
        dataset_image(&t->data, dataset_shuffle(s->seed, epoch, position, t->data.count),
                      images + (size_t)i * image_size(&s->config));
    }
}

/* One step with all that follows it: a line in the log, the evaluation, the progress. */
static int train_step(Training *t, unsigned char *images, Error *error) {
    const Settings *s = &t->settings;
    StepReport r = {0};
    next_images(t, images);
    if (training_step(&t->model, &t->workers, &s->optimizer, images, s->batch, s->seed, &r, error))
        return -1;
    const uint64_t step = t->model.step;
    log_point(&t->log, (double)step, r.recon, r.latent, r.diffusion);
    fprintf(t->log.csv, "%llu,%.6f,%.6f,%.6f,%.6f,%.6f,", (unsigned long long)step, r.total, r.recon,
            r.latent, r.diffusion, r.gradient_norm);
    if (due(step, t->eval_every)) {
        double result[4][2];
        const int limit = (uint32_t)t->eval_limit < t->test.count ? t->eval_limit : (int)t->test.count;
        evaluate(&t->model, &t->workers, &t->test, limit, s->seed, result, NULL);
        fprintf(t->log.csv, "%.6f", result[3][0]);
        end_line(t);
        printf("step %llu: test %.4f +- %.4f bpd on %d images\n", (unsigned long long)step, result[3][0],
               result[3][1], limit);
    }
    fprintf(t->log.csv, ",%.3f\n", seconds_now() - t->started);
    progress(t, &r);
    return fflush(t->log.csv) ? fail(error, "%s/log.csv: cannot be written: %s", t->out, strerror(errno)) : 0;
}

/* The samples of a step are drawn before the next step, not behind their own: so a training that was stopped
 * or killed in between makes up for them when it goes on. */
static int train_loop(Training *t, Error *error) {
    unsigned char *images = allocate((size_t)t->settings.batch, image_size(&t->model.config));
    int status = 0;
    t->first_step = t->model.step;
    t->started = seconds_now();
    while (status == 0 && t->model.step < (uint64_t)t->steps && !stop_signal) {
        if (due(t->model.step, t->sample_every))
            status = sample_grid(t, error);
        if (status == 0)
            status = train_step(t, images, error);
        if (status == 0 && t->model.step < (uint64_t)t->steps && due(t->model.step, t->save_every))
            status = save(t, error);
    }
    free(images);
    if (status == 0)
        status = save(t, error);
    if (status == 0 && !stop_signal && t->model.step > 0)
        status = sample_grid(t, error);
    return status;
}

static int data_check(const Dataset *data, const char *where, const Config *c, Error *error) {
    if (data->height == c->height && data->width == c->width && data->channels == c->image_channels)
        return 0;
    return fail(error, "%s: images are %dx%dx%d, the model is for %dx%dx%d", where, data->height, data->width,
                data->channels, c->height, c->width, c->image_channels);
}

/* Everything that can be refused before memory is taken; a new training's directory is made last. */
static int train_prepare(Training *t, const Option *options, Error *error) {
    Settings *s = &t->settings;
    Config *c = &s->config;
    char path[TEXT_SIZE];
    path_in(t->out, "checkpoint.safetensors", path);
    if (t->resume) {   /* locked before it is read: what another training writes meanwhile would be lost */
        Settings saved;
        if (access(path, F_OK))
            return fail(error, "%s: there is no checkpoint to resume", path);
        if (directory_lock(t->out, error) || checkpoint_read(path, LOAD_ALL, &t->model, &saved, error) ||
            resume_settings(t, options, &saved, error))
            return -1;
    }
    if (dataset_open(&t->data, s->data, SPLIT_TRAIN, s->seed, error) ||
        (t->eval_every && dataset_open(&t->test, s->data, SPLIT_TEST, s->seed, error)))
        return -1;
    if (!t->resume)
        c->height = t->data.height, c->width = t->data.width, c->image_channels = t->data.channels;
    if (data_check(&t->data, s->data, c, error) || (t->eval_every && data_check(&t->test, s->data, c, error)))
        return -1;
    if (t->resume && s->images && s->images != t->data.count)
        return fail(error, "%s: holds %llu images, the training began with %llu", s->data,
                    (unsigned long long)t->data.count, (unsigned long long)s->images);
    s->images = t->data.count;
    if (settings_check(s, error) || memory_check(c, t->threads, error))
        return -1;
    if (!t->resume) {
        if (directory_lock(t->out, error))
            return -1;
        if (access(path, F_OK) == 0)
            return fail(
                error,
                "%s: there is a checkpoint already; --resume goes on with it, another --out starts anew",
                path);
        if (model_new(&t->model, c, s->seed, error))
            return -1;
    }
    t->model.config = *c;   /* with what may change on the way */
    remove_leftovers(t->out);
    path_in(t->out, "log.csv", path);
    return log_open(&t->log, path, t->model.step, t->steps, error);
}

static int train_command(int argc, char **argv) {
    Training t = {.settings = settings_default(),
                  .out = "run",
                  .steps = 10000,
                  .threads = default_threads(),
                  .save_every = 500,
                  .sample_steps = 100,
                  .eval_limit = 256};
    const Option own[] = {
        {"steps", OPTION_INT, &t.steps, 0, 2e9, "N",
         "steps in total, resumed or not; 0: initial checkpoint only", 0},
        {"threads", OPTION_INT, &t.threads, 1, MAX_THREADS, "N", "threads; more than 16 bring nothing", 0},
        {"save-every", OPTION_INT, &t.save_every, 0, 2e9, "N",
         "steps between checkpoints; 0: at the end only", 0},
        {"sample-every", OPTION_INT, &t.sample_every, 0, 2e9, "N",
         "steps between sample grids; 0: at the end only", 0},
        {"sample-steps", OPTION_INT, &t.sample_steps, 1, 1e6, "T",
         "sampler steps of a grid (continuous time)", 0},
        {"eval-every", OPTION_INT, &t.eval_every, 0, 2e9, "N",
         "steps between evaluations on the test split; 0: none", 0},
        {"eval-limit", OPTION_INT, &t.eval_limit, 1, 1e9, "N", "test images of such an evaluation", 0},
        {"out", OPTION_TEXT, t.out, 0, 0, "DIR", "where checkpoint, log.csv, loss.png and samples go", 0},
        {"resume", OPTION_FLAG, &t.resume, 0, 1, "", "go on where the checkpoint in --out stands", 0},
    };
    enum { COUNT = SETTINGS + sizeof own / sizeof own[0] };
    Option options[COUNT];
    settings_options(&t.settings, options);
    memcpy(options + SETTINGS, own, sizeof own);
    int status = parse_options(argc, argv, options, COUNT, "train [options]", NULL);
    if (status)
        return status;
    Error error;
    if (!t.resume && settings_check(&t.settings, &error)) {   /* what the options alone tell is wrong usage */
        fprintf(stderr, "diffenc: train: --%s\n", error.text);
        return USAGE;
    }
    status = train_prepare(&t, options, &error);
    if (status == 0) {
        const Config *c = &t.model.config;
        char model[32];
        workers_new(&t.workers, &t.model, t.threads);
        catch_signals();
        config_model_name(c, model);
        printf("%s: %zu weights, %s (%u images of %dx%dx%d), %d threads, from step %llu to %d, into %s\n",
               model, t.model.weight_count, t.settings.data, (unsigned)t.data.count, c->height, c->width,
               c->image_channels, t.threads, (unsigned long long)t.model.step, t.steps, t.out);
        fflush(stdout);
        status = train_loop(&t, &error);
        end_line(&t);
    }
    if (status == 0)
        printf("%s/checkpoint.safetensors at step %llu\n", t.out, (unsigned long long)t.model.step);
    else
        report(&error);
    if (t.log.csv)
        fclose(t.log.csv);
    workers_free(&t.workers);
    model_free(&t.model);
    dataset_close(&t.data);
    dataset_close(&t.test);
    return status ? FAILURE : stop_signal ? 128 + stop_signal : OK;
}

/* ---- what the commands on a checkpoint have in common ---- */

typedef struct {
    const char *checkpoint;
    char out[TEXT_SIZE], where[TEXT_SIZE];   /* the output; the data, "": those of the training */
    int threads;
    Settings settings;
    Model model;
    Workers workers;
    Dataset data;
    Error error;
} Job;

/* Whether a file can be made there is better known before minutes of work than after. */
static int directory_check(const char *path, Error *error) {
    char directory[TEXT_SIZE];
    snprintf(directory, sizeof directory, "%s", path);
    char *slash = strrchr(directory, '/');
    strcpy(slash ? slash + 1 : directory, ".");
    return access(directory, W_OK | X_OK) ? fail(error, "%s: %s", path, strerror(errno)) : 0;
}

/* Parse the options, of which those that want a FILE must be given, read the checkpoint and make workers.
 * Returns 0, an exit status, or -1 with job->error; job_end takes any of them. */
static int job_begin(Job *job, int argc, char **argv, Option *options, int count, const char *usage,
                     Load load) {
    const int parsed = parse_options(argc, argv, options, count, usage, &job->checkpoint);
    if (parsed)
        return parsed;
    const char *missing = job->checkpoint ? NULL : "a checkpoint";
    char file[64];
    for (int i = 0; i < count && !missing; i++)
        if (strcmp(options[i].argument, "FILE") == 0 && !options[i].given) {
            snprintf(file, sizeof file, "--%s FILE", options[i].name);
            missing = file;
        }
    if (missing) {
        fprintf(stderr, "diffenc: %s: expected %s (usage: diffenc %s)\n", argv[0], missing, usage);
        return USAGE;
    }
    if ((*job->out && directory_check(job->out, &job->error)) ||
        checkpoint_read(job->checkpoint, load, &job->model, &job->settings, &job->error))
        return -1;
    workers_new(&job->workers, &job->model, job->threads);
    return 0;
}

static int job_data(Job *job, Split split) {
    const char *where = *job->where ? job->where : job->settings.data;
    return dataset_open(&job->data, where, split, job->settings.seed, &job->error) ||
                   data_check(&job->data, where, &job->model.config, &job->error)
               ? -1
               : 0;
}

/* Say what went wrong, free everything, return the exit status. */
static int job_end(Job *job, int status) {
    if (status < 0)
        status = report(&job->error);
    workers_free(&job->workers);
    model_free(&job->model);
    dataset_close(&job->data);
    return status;
}

/* ---- diffenc sample ---- */

static int sample_command(int argc, char **argv) {
    Job job = {.threads = default_threads()};
    int count = 64, steps = 0, draw = 0;
    uint64_t seed = 1;
    Option options[] = {
        {"count", OPTION_INT, &count, 1, 65536, "N", "images", 0},
        {"steps", OPTION_INT, &steps, 0, 1e6, "T",
         "steps of the sampler; 0: the model's T, or 250 in continuous time", 0},
        {"seed", OPTION_SEED, &seed, 0, 0, "N", "the same seed gives the same images", 0},
        {"pixels", OPTION_CHOICE, &draw, 0, 0, "likely|drawn",
         "the most likely pixels given z_0, or drawn ones", 0},
        {"threads", OPTION_INT, &job.threads, 1, MAX_THREADS, "N", "threads", 0},
        {"out", OPTION_TEXT, job.out, 0, 0, "FILE", "a grid of the images: .png, .pgm or .ppm", 0},
    };
    int status = job_begin(&job, argc, argv, options, sizeof options / sizeof options[0],
                           "sample CHECKPOINT --out FILE [options]", LOAD_EMA);
    const Config *c = &job.model.config;
    if (status || (status = image_path_check(job.out, c->image_channels, &job.error)) != 0)
        return job_end(&job, status);
    if (steps == 0)
        steps = c->timesteps > 0 ? c->timesteps : 250;
    unsigned char *images = allocate((size_t)count, image_size(c));
    sample_images(&job.model, &job.workers, count, steps, seed, draw, images);
    status = grid_write(job.out, images, count, square_columns(count), c, &job.error);
    free(images);
    if (status == 0)
        printf("%s: %d images, %d steps\n", job.out, count, steps);
    return job_end(&job, status);
}

/* ---- diffenc eval ---- */

/* The bound with the best sigma_P^2 at each t beside that with sigma_P = sigma_Q:
 * w* = 1 / (1 + E||mu_P - mu_Q||^2 / (d sigma_Q^2)),  KL* = -(d/2) log w*. */
static void print_optimal_variance(const double *distance, int count, int timesteps, size_t d,
                                   double others) {
    double plain = 0, best = 0;
    printf("   t        w*       KL* (bpd)   KL at w = 1\n");
    for (int step = 0; step < timesteps; step++) {
        double mean, standard_error;
        mean_and_error(distance + (size_t)step * count, count, 1, &mean, &standard_error);
        const double w = 1 / (1 + mean / (double)d), kl = -0.5 * log(w) / LOG_2,
                     kl_1 = 0.5 * mean / (double)d / LOG_2;
        plain += kl_1;
        best += kl;
        if (timesteps <= 32 || step % (timesteps / 16) == 0 || step == timesteps - 1)
            printf("%8.5f  %8.6f  %10.6f  %10.6f\n", (step + 1.0) / timesteps, w, kl, kl_1);
    }
    printf("diffusion, all %d steps: %.5f bpd with sigma_P = sigma_Q, %.5f with the best sigma_P\n",
           timesteps, plain, best);
    printf("total: %.5f bpd with sigma_P = sigma_Q, %.5f with the best sigma_P\n", others + plain,
           others + best);
}

static int eval_command(int argc, char **argv) {
    Job job = {.threads = default_threads()};
    char ratio[TEXT_SIZE] = "";
    int split = SPLIT_TEST, limit = 0, timesteps = -1;
    uint64_t seed = 1;
    Option options[] = {
        {"data", OPTION_TEXT, job.where, 0, 0, "DIR|digits",
         "as for train; without it the data the model was trained on", 0},
        {"split", OPTION_CHOICE, &split, 0, 0, "train|test", "which images", 0},
        {"limit", OPTION_INT, &limit, 0, 1e9, "N", "only the first N images; 0: all", 0},
        {"timesteps", OPTION_INT, &timesteps, -1, 1e6, "T",
         "finite T; 0: continuous time; -1: as it was trained", 0},
        {"variance-ratio", OPTION_TEXT, ratio, 0, 0, "W|optimal",
         "finite T only: sigma_Q^2/sigma_P^2, or the best at each t", 0},
        {"seed", OPTION_SEED, &seed, 0, 0, "N", "of times and noise", 0},
        {"threads", OPTION_INT, &job.threads, 1, MAX_THREADS, "N", "threads", 0},
    };
    int status = job_begin(&job, argc, argv, options, sizeof options / sizeof options[0],
                           "eval CHECKPOINT [options]", LOAD_EMA);
    if (status)
        return job_end(&job, status);
    Config *c = &job.model.config;
    const int optimal = strcmp(ratio, "optimal") == 0;
    if (timesteps >= 0)
        c->timesteps = timesteps;
    if (timesteps >= 0 || optimal)
        c->variance_ratio = 1;
    Option given_ratio = {"variance-ratio", OPTION_REAL, &c->variance_ratio, 1e-6, 1e6, "", "", 0};
    status = *ratio && !optimal ? option_set(&given_ratio, ratio, &job.error) : 0;
    if (status == 0 && optimal && c->timesteps == 0)
        status = fail(&job.error, "variance-ratio optimal: in continuous time it is 1; give --timesteps");
    if (status || config_check(c, &job.error)) {
        fprintf(stderr, "diffenc: eval: --%s\n", job.error.text);
        return job_end(&job, USAGE);
    }
    if (job_data(&job, (Split)split))
        return job_end(&job, -1);
    const int count = limit > 0 && (uint32_t)limit < job.data.count ? limit : (int)job.data.count;
    double result[4][2];
    double *distance = optimal ? allocate((size_t)count * c->timesteps, sizeof *distance) : NULL;
    evaluate(&job.model, &job.workers, &job.data, count, seed, result, distance);
    printf("%d %s images of %s, step %llu, EMA weights, bits per dimension with standard error:\n", count,
           split == SPLIT_TEST ? "test" : "training", *job.where ? job.where : job.settings.data,
           (unsigned long long)job.model.step);
    for (int term = 0; term < 4; term++)
        printf("%-10s %9.5f +- %.5f\n", term < 3 ? TERMS[term] : "total", result[term][0], result[term][1]);
    if (distance)
        print_optimal_variance(distance, count, c->timesteps, image_size(c), result[0][0] + result[1][0]);
    free(distance);
    return job_end(&job, 0);
}

/* ---- diffenc show ---- */

enum { SHOW_TIMES = 9, SHOW_ROWS = 3 };

typedef struct {
    const Model *model;
    const Dataset *data;
    unsigned char *images;   /* [count, SHOW_ROWS, SHOW_TIMES, d] */
} Show;

/* Values in [-scale, scale] as grey levels. */
static void to_pixels(const Tensor *a, double scale, unsigned char *out) {
    for (size_t i = 0; i < element_count(a); i++)
        out[i] = (unsigned char)nearest_level(a->value[i] / scale);
}

/* For one image, over t from 0 to 1: x_t, y, and dx_t/dlambda = sigma_t^2 (x_t - y + dy/dlambda). */
static void show_example(Network *n, int i, void *context) {
    const Show *s = context;
    const size_t d = image_size(&s->model->config);
    n->graph.dropout = 0;
    for (int column = 0; column < SHOW_TIMES; column++) {
        network_begin(n);
        const Method m = method_begin(n);
        const double t = column / (SHOW_TIMES - 1.0);
        const Encoded e = encode(&m, scale_pixels(&m, pixels_of(n, s->data, i)), t, 1);
        unsigned char *out = s->images + ((size_t)i * SHOW_ROWS * SHOW_TIMES + column) * d;
        to_pixels(e.x_t, 1, out);
        to_pixels(e.y ? e.y : image_of(&m, NULL), 1, out + SHOW_TIMES * d);
        to_pixels(exact_counterterm(&m, e, gamma_at(&m, t)), 0.25, out + 2 * SHOW_TIMES * d);
    }
}

static int show_command(int argc, char **argv) {
    Job job = {.threads = default_threads()};
    int count = 4;
    Option options[] = {
        {"data", OPTION_TEXT, job.where, 0, 0, "DIR|digits",
         "as for train; without it the data the model was trained on", 0},
        {"count", OPTION_INT, &count, 1, 64, "N", "test images", 0},
        {"threads", OPTION_INT, &job.threads, 1, MAX_THREADS, "N", "threads", 0},
        {"out", OPTION_TEXT, job.out, 0, 0, "FILE",
         "for each image three rows over t = 0..1: x_t, y, dx_t/dlambda", 0},
    };
    int status = job_begin(&job, argc, argv, options, sizeof options / sizeof options[0],
                           "show CHECKPOINT --out FILE [options]", LOAD_EMA);
    const Config *c = &job.model.config;
    if (status || (status = image_path_check(job.out, c->image_channels, &job.error)) != 0 ||
        (status = job_data(&job, SPLIT_TEST)) != 0)
        return job_end(&job, status);
    const int pictures = count * SHOW_ROWS * SHOW_TIMES;
    Show show = {&job.model, &job.data, allocate((size_t)pictures, image_size(c))};
    workers_run(&job.workers, job.model.ema, 0, count, show_example, &show);
    status = grid_write(job.out, show.images, pictures, SHOW_TIMES, c, &job.error);
    free(show.images);
    if (status == 0)
        printf("%s: rows x_t, y, dx_t/dlambda (grey: 0, white: 0.25) of %d images, columns t = 0..1\n",
               job.out, count);
    return job_end(&job, status);
}

/* ---- diffenc grad ---- */

typedef struct {
    const Model *model;
    int batch;
    unsigned char *images;   /* [batch, d] */
    real *t, *eps, *eps_0;   /* [batch], [batch, d], [batch, d] */
    double (*terms)[3];
} GivenBatch;

static void given_example(Network *n, int i, void *context) {
    const GivenBatch *b = context;
    const size_t at = (size_t)i * image_size(&b->model->config);
    n->graph.dropout = 0;
    const Example example = {b->images + at, b->t[i], b->eps + at, b->eps_0 + at};
    learn(n, example, b->batch, b->terms[i]);
}

/* Take images, t, eps and eps0 of a batch out of a file. The images that the file really holds set what is
 * allocated, a small multiple of its size. The batch begins empty; on failure it keeps what it holds so far,
 * for batch_free. */
static int batch_take(const TensorFile *f, const char *path, const Config *c, GivenBatch *b, Error *error) {
    static const char *const names[4] = {"images", "t", "eps", "eps0"};
    const TensorEntry *entry[4];
    for (int i = 0; i < 4; i++)
        if (!(entry[i] = tensors_find(f, names[i])))
            return fail(error, "%s: holds no tensor '%s', which a batch needs", path, names[i]);
    const TensorEntry *images = entry[0];
    if (images->type != TYPE_U8 || images->rank != 4 || images->shape[1] != c->height ||
        images->shape[2] != c->width || images->shape[3] != c->image_channels || images->shape[0] < 1 ||
        images->shape[0] > MAX_BATCH)
        return fail(error, "%s: images: expected U8 [B,%d,%d,%d] with B from 1 to %d", path, c->height,
                    c->width, c->image_channels, MAX_BATCH);
    b->batch = (int)images->shape[0];
    b->images = allocate(images->count, 1);
    memcpy(b->images, images->data, images->count);
    real **const numbers[4] = {NULL, &b->t, &b->eps, &b->eps_0};
    for (int i = 1; i < 4; i++) {
        *numbers[i] = allocate(i == 1 ? (size_t)b->batch : images->count, sizeof(real));
        if (tensors_copy(entry[i], path, i == 1 ? 1 : 4, images->shape, *numbers[i], error))
            return -1;
    }
    for (int i = 0; i < b->batch; i++) {
        const double t = (double)b->t[i], steps = t * c->timesteps;
        if (!(t >= 0 && t <= 1))
            return fail(error, "%s: t[%d] is %g, expected a time from 0 to 1", path, i, t);
        if (c->timesteps && (fabs(steps - floor(steps + 0.5)) > 1e-6 * c->timesteps || steps < 0.5))
            return fail(error, "%s: t[%d] is %g, expected a multiple of 1/%d above 0", path, i, t,
                        c->timesteps);
    }
    return 0;
}

static int batch_read(const char *path, const Config *c, GivenBatch *b, Error *error) {
    TensorFile f;
    if (tensors_read(path, &f, error))
        return -1;
    const int status = batch_take(&f, path, c, b, error);
    tensors_free(&f);
    return status;
}

static void batch_free(GivenBatch *b) {
    free(b->images);
    free(b->t);
    free(b->eps);
    free(b->eps_0);
    free(b->terms);
}

static int gradient_write(const char *path, const Model *m, const GivenBatch *b, const real *gradient,
                          Error *error) {
    const int count = m->parameter_count + 4;
    TensorOut *out = allocate_zeroed((size_t)count, sizeof *out);
    char(*names)[NAME_SIZE] = allocate((size_t)count, sizeof *names);
    real *losses = allocate_zeroed(3 * (size_t)b->batch + 1, sizeof *losses);
    double bpd = 0;
    for (int i = 0; i < 3 * b->batch; i++) {
        losses[i % 3 * b->batch + i / 3] = (real)b->terms[i / 3][i % 3];
        bpd += b->terms[i / 3][i % 3] / (image_size(&m->config) * LOG_2 * b->batch);
    }
    losses[3 * b->batch] = (real)bpd;
    for (int i = 0; i < 4; i++) {
        const Parameter loss = {.rank = 1, .shape = {i < 3 ? b->batch : 1}, .offset = (size_t)i * b->batch};
        out[i] = tensor_out("loss", &loss, losses, names[i]);
        snprintf(names[i], NAME_SIZE, "%s%s", i < 3 ? "loss." : "", i < 3 ? TERMS[i] : "bpd");
    }
    for (int i = 4; i < count; i++)
        out[i] = tensor_out("grad", &m->parameter[i - 4], gradient, names[i]);
    const int status = tensors_write(path, out, count, NULL, 0, error);
    free(losses);
    free(names);
    free(out);
    return status;
}

static int grad_command(int argc, char **argv) {
    Job job = {.threads = default_threads()};
    char batch_path[TEXT_SIZE] = "";
    Option options[] = {
        {"batch", OPTION_TEXT, batch_path, 0, 0, "FILE",
         "safetensors: images U8 [B,H,W,C], t [B], eps, eps0 [B,H,W,C]", 0},
        {"out", OPTION_TEXT, job.out, 0, 0, "FILE",
         "safetensors: loss.recon|latent|diffusion [B] in nats, bpd [1], grad.NAME", 0},
        {"threads", OPTION_INT, &job.threads, 1, MAX_THREADS, "N", "threads", 0},
    };
    int status = job_begin(&job, argc, argv, options, sizeof options / sizeof options[0],
                           "grad CHECKPOINT --batch FILE --out FILE [options]", LOAD_PARAMS);
    if (status)
        return job_end(&job, status);
    GivenBatch b = {.model = &job.model};
    status = batch_read(batch_path, &job.model.config, &b, &job.error);
    if (status == 0) {
        b.terms = allocate((size_t)b.batch, sizeof *b.terms);
        model_flip(&job.model, job.threads);
        workers_run(&job.workers, job.model.params, 1, b.batch, given_example, &b);
        status = gradient_write(job.out, &job.model, &b, workers_gradient(&job.workers), &job.error);
    }
    batch_free(&b);
    return job_end(&job, status);
}

/* ---- commands ---- */

typedef struct {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *help;
} Command;

static const Command COMMANDS[] = {
    {"train", train_command, "train a model"},
    {"sample", sample_command, "draw images from a checkpoint"},
    {"eval", eval_command, "the variational bound on a data set, by term"},
    {"show", show_command, "the encoder at work: x_t, y and their change over t"},
    {"grad", grad_command, "loss terms and gradients of a given batch, from file to file"},
    {"check", check_main, "prove every gradient and every identity of the method"},
    {"bench", bench_main, "speed: kernels against the machine's peak, a training step"},
};

int main(int argc, char **argv) {
    const int count = sizeof COMMANDS / sizeof COMMANDS[0];
    signal(SIGXFSZ, SIG_IGN);   /* a write beyond the limit on file sizes then fails, and is reported */
    for (int i = 0; argc > 1 && i < count; i++)
        if (strcmp(argv[1], COMMANDS[i].name) == 0) {
            int status = COMMANDS[i].run(argc - 1, argv + 1);
            if (status == HELP)
                status = OK;
            if (fflush(stdout) && status == OK) {
                fprintf(stderr, "diffenc: standard output: %s\n", strerror(errno));
                status = FAILURE;
            }
            return status;
        }
    const int help = argc > 1 && (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "help") == 0);
    if (argc > 1 && !help) {
        fprintf(stderr, "diffenc: unknown command '%s' (see diffenc --help)\n", argv[1]);
        return USAGE;
    }
    FILE *to = help ? stdout : stderr;
    fprintf(to,
            "DiffEnc: variational diffusion with a learned encoder\n\nusage: diffenc COMMAND [options]\n\n");
    for (int i = 0; i < count; i++)
        fprintf(to, "  %-8s %s\n", COMMANDS[i].name, COMMANDS[i].help);
    fprintf(to, "\ndiffenc COMMAND --help names every option with its default.\n");
    return help ? OK : USAGE;
}
