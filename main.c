/* main.c - the roof: the command line, settings and checkpoints, progress, logs and reports.
 *
 * Results go to stdout, progress to stderr. Exit status 0, 1 for a failure, 2 for wrong usage. SIGINT,
 * SIGTERM, SIGHUP and SIGPIPE end what is being computed, save what a training has learned, and give 128 +
 * the signal's number, as the shell would say it.
 *
 * A command is a function of a Job, which holds its options and everything it works with. The memory that a
 * command needs comes from the Job's arena, and main() gives all of it back in one place, so that a command
 * may return wherever something goes wrong. */

#define _POSIX_C_SOURCE 200809L

#include "diffenc.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_max_threads(void) { return 1; }
static int omp_get_thread_limit(void) { return 1; }
#endif

/* Exit statuses. A command may also return -1 for a failure, or DONE where nothing is left to do and nothing
 * failed: --help was answered, or another rank writes the results. */
enum { OK = 0, FAILURE = 1, USAGE = 2, DONE = 3 };

enum { MAX_THREADS = 256, MAX_BATCH = 1 << 20 };

static const char *const VERSION = "diffenc 1.0";
static const double LOG_2 = 0.6931471805599453;
static const char *const TERMS[4] = {"recon", "latent", "diffusion", "total"};

static void say(const Error *error) { fprintf(stderr, "diffenc: %s\n", error->text); }

/* ---- signals ---- */

/* The one global that is not const: a handler has no other way to say something. */
static volatile sig_atomic_t stop_signal = 0;

/* A second SIGINT or SIGTERM ends the program at once. Nobody sends the other two twice on purpose: when a
 * terminal closes, SIGHUP and then SIGPIPE arrive while the checkpoint is being written. */
static void on_signal(int number) {
    stop_signal = number;
    signal(SIGINT, SIG_DFL);
    signal(SIGTERM, SIG_DFL);
    signal(SIGHUP, SIG_IGN);
    signal(SIGPIPE, SIG_IGN);
}

static const struct { int number; const char *name; } SIGNALS[4] = {
    {SIGINT, "SIGINT"}, {SIGTERM, "SIGTERM"}, {SIGHUP, "SIGHUP"}, {SIGPIPE, "SIGPIPE"}};

/* SA_RESTART: a write goes on where the signal interrupted it. What the parent ignores stays ignored. */
static void catch_signals(void) {
    const struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    struct sigaction before;
    for (int i = 0; i < 4; i++)
        if (sigaction(SIGNALS[i].number, NULL, &before) == 0 && before.sa_handler != SIG_IGN)
            sigaction(SIGNALS[i].number, &action, NULL);
}

/* The signal that came to any rank. All ranks ask at the same places, and so go the same way. */
static int stopped(void) {
    const int agreed = ranks_agree(stop_signal);
    if (agreed)
        stop_signal = agreed;
    return agreed;
}

static const char *signal_name(void) {
    int i = 0;
    while (i < 3 && SIGNALS[i].number != stop_signal)
        i++;
    return SIGNALS[i].name;
}

/* ---- a command's options, and everything it works with ---- */

enum { TEXT_SIZE = 1024 }; /* bytes of a text that an option holds */

/* What a training was told; it travels in a checkpoint. */
typedef struct {
    Config config;
    Optimizer optimizer;
    int batch, conditional;
    uint64_t seed;
    char data[TEXT_SIZE];
    uint64_t data_digest; /* of these images, wherever they lie; 0: not known */
    uint64_t step;        /* of the checkpoint */
    char made_by[TEXT_SIZE];
} Settings;

/* What a command needs of a checkpoint: the weights in training, only their average, or everything. */
typedef enum { LOAD_PARAMS, LOAD_EMA, LOAD_ALL } Load;

typedef struct Command Command;
typedef struct Evaluated Evaluated;
typedef struct {
    /* Options; which command has which is said by OPTIONS. */
    int threads, steps, save_every, keep_every, sample_every, sample_steps, eval_every, eval_limit, resume;
    int count, one_class, sampler, draw, trajectory, split, limit, repeats, timesteps;
    uint64_t seed;
    char out[TEXT_SIZE], chart[TEXT_SIZE], csv[TEXT_SIZE]; /* files to be written */
    char ratio[TEXT_SIZE], batch[TEXT_SIZE], times[TEXT_SIZE], init[TEXT_SIZE];
    char where[TEXT_SIZE]; /* of the data; "": as in training */
    Settings settings;
    const char *checkpoint; /* the present one */
    const Command *command;
    char **arguments;     /* behind the command's name; once they are parsed, checkpoints come first */
    int checkpoint_count; /* so many */
    Arena *arena;
    double amplify;
    double need;       /* bytes of memory, as far as known */
    double model_need; /* what the present model has of it */
    Model model;
    Workers workers;
    Dataset data;
    Error error;
    Evaluated *evaluated; /* [checkpoint_count] */
    /* Of a training. */
    unsigned char *test, *test_labels; /* [test_count] images */
    int test_count, lock; /* descriptor of OUT/.lock */
    FILE *log;
    double seconds, step_seconds, next_report; /* of its steps, also before it was resumed; of one of them */
    uint64_t first_step;
    double first_seconds; /* before that step */
    double best;          /* the least test bound */
    unsigned long long newest_grid; /* its step; 0: none */
    const char *end;                /* why the training ended, or NULL */
    double last_line, work_began;   /* when */
    int parts_done;                 /* of the present work: checkpoints */
    int line_is_open;               /* the terminal's cursor stands behind the progress line */
} Job;

struct Command {
    const char *name;
    int taker;
    Load load;
    int (*run)(Job *job);
    int (*run_elsewhere)(int argc, char **argv); /* instead of all that stands before */
    const char *usage, *help;
};

/* Who takes an option: commands, and the metadata of checkpoints. What is FIXED makes the model and the order
 * of the data, and cannot change when a training is resumed; what is NETWORK says what the weights are. In
 * what is OWN the trainings of a group differ: the seed makes the digits, too. */
enum { TRAIN = 1, SAMPLE = 2, EVAL = 4, SHOW = 8, GRAD = 16, INFO = 32 };
enum { RECORD = 64, KEPT = 128, SHAPE = 256, OWN = 512 };
enum { ALL = TRAIN | SAMPLE | EVAL | SHOW | GRAD, SETTING = TRAIN | RECORD, FIXED = SETTING | KEPT };
enum { NETWORK = FIXED | SHAPE };

typedef enum { INT, RANGE, NUMBER, COUNT, TEXT, CHOICE, MODEL } OptionType;

/* `place` in a Job is an int (INT), two of them (RANGE, "A..B"), a double, a uint64_t (COUNT), a
 * char[TEXT_SIZE], an int or an enumeration (CHOICE) or a Config (MODEL); what stands there before parsing is
 * the default. Numbers must lie in [low, high], which are wide where config_check knows the range. The
 * argument of a choice lists the choices, counted from 0. A text whose argument is FILE must be given. An
 * option of a command without an argument is 1 when it is there. */
typedef struct {
    const char *name;
    int takers;
    OptionType type;
    size_t place;
    double low, high;
    const char *argument, *help;
} Option;

/* An enumeration is read and written as an int. */
typedef char ENUMERATIONS_ARE_INTS[sizeof(NetKind) == sizeof(int) ? 1 : -1];

#define IN(member) offsetof(Job, member)
#define C(member) IN(settings.config.member)
#define O(member) IN(settings.optimizer.member)

static const Option OPTIONS[] = {
    {"model", NETWORK, MODEL, IN(settings.config), 0, 0, "NAME", "vdm-L, diffenc-L-nt or diffenc-L-E"},
    {"net", NETWORK, CHOICE, C(net), 0, 0, "flat|unet", "body of the score network"},
    {"channels", NETWORK, INT, C(channels), -1e9, 1e9, "N", "of the score network, a multiple of 4"},
    {"encoder-channels", FIXED, INT, C(encoder_channels), -1e9, 1e9, "N", "of the encoder, a multiple of 4"},
    {"fourier", NETWORK, RANGE, C(fourier_first), 0, 0, "FIRST..LAST", "features of z, as powers of two"},
    {"predict", NETWORK, CHOICE, C(prediction), 0, 0, "v|eps|x", "what the score network predicts"},
    {"schedule", FIXED, CHOICE, C(schedule), 0, 0, "fixed|learned", "the end points of gamma(t)"},
    {"gamma-min", FIXED, NUMBER, C(gamma_min), -1e9, 1e9, "X", "gamma(0); where a learned schedule starts"},
    {"gamma-max", FIXED, NUMBER, C(gamma_max), -1e9, 1e9, "X", "gamma(1); where a learned schedule starts"},
    {"timesteps", FIXED, INT, C(timesteps), -1e9, 1e9, "T", "number of time steps; 0: continuous time"},
    {"variance-ratio", FIXED, NUMBER, C(variance_ratio), 0, 1e9, "W", "sigma_Q^2/sigma_P^2, finite T only"},
    {"conditional", FIXED, INT, IN(settings.conditional), 0, 1, "", "the networks see each image's label"},
    {"batch", FIXED, INT, IN(settings.batch), 1, MAX_BATCH, "N", "examples in a step"},
    {"seed", FIXED | OWN, COUNT, IN(settings.seed), 0, 0, "N",
     "same seed, binary and machine: the same bits"},
    {"data", SETTING, TEXT, IN(settings.data), 0, 0, "DIR|digits|swirl",
     "(Fashion-)MNIST, CIFAR-10; built in"},
    {"dropout", SETTING, NUMBER, C(dropout), -1e9, 1e9, "X", "rate in training"},
    {"optimizer", SETTING, CHOICE, O(muon), 0, 0, "adamw|muon", "of the kernels; AdamW has the rest"},
    {"momentum", SETTING, NUMBER, O(momentum), 0, 0.9999, "X", "of Muon"},
    {"lr", SETTING, NUMBER, O(learning_rate), 0, 1e6, "X", "learning rate"},
    {"encoder-lr", SETTING, NUMBER, O(encoder_rate), 0, 1e6, "X", "of the encoder, as a share of --lr"},
    {"warmup", SETTING, INT, O(warmup), 0, 2e9, "N", "steps over which the learning rate rises from 0"},
    {"cooldown", SETTING, NUMBER, O(cooldown), 0, 1, "X", "over this last share of the steps it falls to 0"},
    {"weight-decay", SETTING, NUMBER, O(weight_decay), 0, 1e6, "X", "of kernels and scales"},
    {"clip", SETTING, NUMBER, O(clip), 0, 1e30, "X", "largest norm of the whole gradient; 0: no clipping"},
    {"ema", SETTING, NUMBER, O(ema), 0, 1, "X", "decay of the moving average of the weights"},
    {"step", RECORD, COUNT, IN(settings.step), 0, 0, "", ""},
    {"data-digest", RECORD | OWN, COUNT, IN(settings.data_digest), 0, 0, "", ""},
    {"height", RECORD, INT, C(height), -1e9, 1e9, "", ""},
    {"width", RECORD, INT, C(width), -1e9, 1e9, "", ""},
    {"image-channels", RECORD, INT, C(image_channels), -1e9, 1e9, "", ""},
    {"classes", RECORD, INT, C(classes), -1e9, 1e9, "", ""},
    {"made-by", RECORD | OWN, TEXT, IN(settings.made_by), 0, 0, "", ""},
    {"data", EVAL | SHOW, TEXT, IN(where), 0, 0, "DIR|digits|swirl",
     "needed unless the model was trained on built-in data"},
    {"split", EVAL, CHOICE, IN(split), 0, 0, "train|test", "which images"},
    {"limit", EVAL, INT, IN(limit), 0, 1e9, "N", "only N images, evenly over the split; 0: all"},
    {"repeats", EVAL, INT, IN(repeats), 1, 1e6, "N", "draws of time and noise for each image"},
    {"timesteps", EVAL, INT, IN(timesteps), -1, 1e6, "T", "T; 0: continuous time; -1: as in training"},
    {"variance-ratio", EVAL, TEXT, IN(ratio), 0, 0, "W|optimal", "as for train, or the best at each t"},
    {"chart", EVAL, TEXT, IN(chart), 0, 0, "FILE.svg", "the loss over t and lambda, the counterterm's error"},
    {"csv", EVAL, TEXT, IN(csv), 0, 0, "FILE.csv", "the values, a line for each checkpoint"},
    {"count", SAMPLE, INT, IN(count), 0, 65536, "N",
     "images; 0: 64, or 8 per class, a row each; with --trajectory 8, or 1 per class; 2000 of points"},
    {"class", SAMPLE, INT, IN(one_class), -1, 255, "K", "only this class; -1: all of them"},
    {"count", SHOW, INT, IN(count), 0, 4096, "N",
     "test images, evenly over the split; 0: one of each class, or 4; 500 points"},
    {"times", SHOW, TEXT, IN(times), 0, 0, "T,T,...", "ascending, from 0 to 1"},
    {"amplify", SHOW, NUMBER, IN(amplify), 1e-3, 1e6, "X", "red and blue by this factor"},
    {"steps", TRAIN, INT, IN(steps), 0, 2e9, "N", "in total, resumed or not; 0: initial checkpoint only"},
    {"steps", SAMPLE, INT, IN(steps), 0, 1e6, "T", "0: the model's T, or 250 in continuous time"},
    {"seed", SAMPLE | EVAL, COUNT, IN(seed), 0, 0, "N", "the same seed, the same result"},
    {"sampler", SAMPLE, CHOICE, IN(sampler), 0, 0, "ancestral|deterministic", "draws of z_s, or none"},
    {"pixels", SAMPLE, CHOICE, IN(draw), 0, 0, "likely|drawn", "the likeliest given z_0, or drawn"},
    {"batch", GRAD, TEXT, IN(batch), 0, 0, "FILE",
     "images U8 [B,H,W,C], t [B], eps, eps0 [B,H,W,C]; labels U8 [B] of a conditional model"},
    {"threads", ALL, INT, IN(threads), 1, MAX_THREADS, "N", "train and grad use at most 16"},
    {"save-every", TRAIN, INT, IN(save_every), 0, 2e9, "N", "between checkpoints; 0: at the end only"},
    {"keep-every", TRAIN, INT, IN(keep_every), 0, 2e9, "N", "between numbered checkpoints; 0: none"},
    {"sample-every", TRAIN, INT, IN(sample_every), 0, 2e9, "N", "between grids; 0: at the end only"},
    {"sample-steps", TRAIN, INT, IN(sample_steps), 0, 1e6, "T", "steps of a grid, at most T; 0: no grids"},
    {"eval-every", TRAIN, INT, IN(eval_every), 0, 2e9, "N", "between bounds on test images; 0: none"},
    {"eval-limit", TRAIN, INT, IN(eval_limit), 1, 1e9, "N", "test images of such a bound"},
    {"out", TRAIN, TEXT, IN(out), 0, 0, "DIR", "where checkpoint, log.csv, report.html and samples go"},
    {"trajectory", SAMPLE, INT, IN(trajectory), 0, 1, "",
     "x^ above z_t from noise to image; x^ alone as .apng"},
    {"out", SAMPLE, TEXT, IN(out), 0, 0, "FILE",
     "a grid: .png, .pgm, .ppm or -; each: N-%03d.png; all: .npy"},
    {"out", SHOW, TEXT, IN(out), 0, 0, "FILE", "of each image x_t, y, (x_t - x_s)/(t - s) over t"},
    {"out", GRAD, TEXT, IN(out), 0, 0, "FILE", "loss.recon, .latent, .diffusion in nats, bpd, grad.NAME"},
    {"init", TRAIN, TEXT, IN(init), 0, 0, "CHECKPOINT", "start from its averaged weights"},
    {"resume", TRAIN, INT, IN(resume), 0, 1, "", "go on where the checkpoint in --out stands"},
};
enum { OPTION_COUNT = sizeof OPTIONS / sizeof OPTIONS[0] };

static int smaller(int a, int b) { return a < b ? a : b; }

static void *zeroed(const Job *job, size_t count, size_t size) {
    return memset(arena_allocate(job->arena, count, size), 0, count * size);
}

/* The paper's settings at a laptop's size, with which a checkpoint older than an option was trained. */
static Settings settings_of_paper(void) {
    return (Settings){config_default(), optimizer_default(), .batch = 64, .seed = 1, .data = "digits"};
}

/* The recipe: with none that was tried did diffenc-4-2 learn clearly more in twenty minutes on two cores. */
static Settings settings_default(void) {
    Settings s = settings_of_paper();
    Config *c = &s.config;
    Optimizer *o = &s.optimizer;
    c->net = NET_UNET, c->channels = 32, c->encoder_channels = 8, c->dropout = 0;
    c->fourier_first = 0, c->fourier_last = 7;
    o->muon = 1, o->momentum = 0.9, o->learning_rate = 0.004, o->encoder_rate = 0.1;
    o->warmup = 200, o->cooldown = 1, o->clip = 1;
    s.batch = 16;
    return s;
}

static Job *job_new(const Command *command, char **arguments) {
    Job *job = allocate_zeroed(1, sizeof *job);
    job->command = command, job->arguments = arguments, job->settings = settings_default();
    job->arena = arena_new();
    job->threads = smaller(omp_get_max_threads(), MAX_THREADS);
    job->save_every = 1000, job->sample_steps = 100, job->eval_limit = 256;
    job->split = SPLIT_TEST, job->repeats = 1, job->timesteps = -1, job->seed = 1;
    job->one_class = -1, job->amplify = 1;
    strcpy(job->times, "0,0.125,0.25,0.375,0.5,0.625,0.75,0.875,1");
    if (command->taker == TRAIN) {
        job->steps = 30000;
        strcpy(job->out, "run");
    }
    return job;
}

/* The option of this name that one of the takers has, or NULL. */
static const Option *option_find(int takers, const char *name, size_t length) {
    for (const Option *o = OPTIONS; o < OPTIONS + OPTION_COUNT; o++)
        if (o->takers & takers && strlen(o->name) == length && strncmp(o->name, name, length) == 0)
            return o;
    return NULL;
}

/* A number with the fewest digits that read back as the same one, of type real or double. */
static void number_text(double value, int is_real, char text[32]) {
    for (int digits = 1, same = 0; digits <= 17 && !same; digits++) {
        snprintf(text, 32, "%.*g", digits, value);
        const double read = strtod(text, NULL);
        same = is_real ? (real)read == (real)value : read == value;
    }
}

/* Choice `index` of "a|b|c" into `text`; 0 if there are not so many. */
static int choice_text(const char *choices, int index, char text[TEXT_SIZE]) {
    for (; index > 0 && *choices; index--) {
        choices += strcspn(choices, "|");
        choices += *choices == '|';
    }
    snprintf(text, TEXT_SIZE, "%.*s", (int)strcspn(choices, "|"), choices);
    return *text != 0;
}

static const char *option_text(const Option *o, const Job *job, char text[TEXT_SIZE]) {
    const void *place = (const char *)job + o->place;
    const int *whole = place;
    switch (o->type) {
    case INT: snprintf(text, TEXT_SIZE, "%d", *whole); break;
    case RANGE: snprintf(text, TEXT_SIZE, "%d..%d", whole[0], whole[1]); break;
    case NUMBER: number_text(*(const double *)place, 0, text); break;
    case COUNT: snprintf(text, TEXT_SIZE, "%llu", (unsigned long long)*(const uint64_t *)place); break;
    case TEXT: snprintf(text, TEXT_SIZE, "%s", (const char *)place); break;
    case CHOICE: choice_text(o->argument, *whole, text); break;
    case MODEL: config_model_name(place, text);
    }
    return text;
}

/* Set an option from a text, or say what was expected: "lr 'x': expected a number from 0 to 1000000". A TEXT
 * will be printed, and stand in the header of a checkpoint. */
static int option_set(const Option *o, Job *job, const char *text, Error *error) {
    const char *expected = o->argument;
    void *place = (char *)job + o->place;
    int *whole = place, good = 0, length = 0;
    char shown[TEXT_SIZE], *end;
    const double value = strtod(text, &end);
    switch (o->type) {
    case MODEL: return config_parse_model(place, text, error);
    case INT:
    case NUMBER:
        if (!*text || *end || !(value >= o->low && value <= o->high) ||
            (o->type == INT && value != floor(value)))
            return fail(error, "%s '%.40s': expected a %snumber from %.10g to %.10g", o->name, text,
                        o->type == INT ? "whole " : "", o->low, o->high);
        if (o->type == INT)
            *whole = (int)value;
        else
            *(double *)place = value;
        return 0;
    case COUNT:
        expected = "a whole number from 0 to 18446744073709551615";
        errno = 0;
        *(uint64_t *)place = strtoull(text, &end, 10);
        good = *text >= '0' && *text <= '9' && !*end && !errno;
        break;
    case RANGE: good = sscanf(text, "%4d..%4d%n", whole, whole + 1, &length) == 2 && !text[length]; break;
    case CHOICE:
        for (*whole = 0; choice_text(o->argument, *whole, shown) && strcmp(text, shown) != 0;)
            ++*whole;
        good = *shown != 0;
        break;
    case TEXT:
        expected = "some text in UTF-8, shorter than 960 bytes, without control characters";
        good = *text && strlen(text) < 960 && strcmp(printable(text, shown, sizeof shown), text) == 0;
        snprintf(place, TEXT_SIZE, "%s", text);
    }
    return good ? 0 : fail(error, "%s '%.80s': expected %s", o->name, text, expected);
}

static int asks_help(const char *text) { return strcmp(text, "-h") == 0 || strcmp(text, "--help") == 0; }

static void print_help(const Job *job) {
    printf("usage: diffenc %s %s\n\n", job->command->name, job->command->usage);
    for (const Option *o = OPTIONS; o < OPTIONS + OPTION_COUNT; o++) {
        char value[TEXT_SIZE], text[2 * TEXT_SIZE];
        if (!(o->takers & job->command->taker))
            continue;
        option_text(o, job, value);
        snprintf(text, sizeof text, *o->argument && *value ? "%s (default %s)" : "%s", o->help, value);
        int column = printf("  --%s %-*s", o->name, 23 - (int)strlen(o->name), o->argument), length;
        for (const char *word = text; *word; word += length, word += strspn(word, " ")) {
            length = (int)(strncmp(word, "(default ", 9) != 0 ? strcspn(word, " ") : strlen(word));
            if (column + 1 + length > 80)   /* a default may hold spaces, and stays in one line */
                column = printf("\n%28s", "") - 1;
            column += printf(" %.*s", length, word);
        }
        printf("\n");
    }
}

/* Set an option. A training that has its model already goes on from a checkpoint: what the command line asks
 * for must agree with it, or be something that may change on the way. Then the change is announced. */
static int option_apply(const Option *o, Job *job, const char *text) {
    const int resuming = job->model.params && (o->takers & SETTING) == SETTING;
    char was[TEXT_SIZE], now[TEXT_SIZE];
    option_text(o, job, was);
    if (option_set(o, job, text, &job->error))
        return -1;
    option_text(o, job, now);
    if (!resuming || strcmp(was, now) == 0)
        return 0;
    if (o->takers & KEPT)
        return fail(&job->error, "%s: was trained with --%s %.60s, not %.60s; another --out starts anew",
                    job->out, o->name, was, now);
    fprintf(stderr, "diffenc: --%s changes from %s to %s\n", o->name, was, now);
    return 0;
}

/* Parse a command's arguments; all but `train` take a checkpoint, `eval` several. Returns 0, -1 or DONE. */
static int parse_options(Job *job) {
    const Command *command = job->command;
    Error *error = &job->error;
    for (char **argument = job->arguments; *argument; argument++) {
        const char *text = *argument, *value = strchr(text, '=');
        const int is_option = strncmp(text, "--", 2) == 0;
        const Option *o = is_option ? option_find(command->taker, text + 2, strcspn(text + 2, "=")) : NULL;
        if (asks_help(text)) {
            print_help(job);
            return DONE;
        }
        if (!is_option && command->taker != TRAIN && (!job->checkpoint || command->taker == EVAL)) {
            job->arguments[job->checkpoint_count++] = *argument;
            job->checkpoint = job->arguments[0];
            continue;
        }
        if (!o)
            return fail(error, "unknown option or argument '%.60s' (see diffenc %s --help)", text,
                        command->name);
        if (!*o->argument && value)
            return fail(error, "--%s takes no value", o->name);
        value = !*o->argument ? "1" : value ? value + 1 : *++argument;
        if (!value)
            return fail(error, "--%s needs a value", o->name);
        if (option_apply(o, job, value))
            return -1;
    }
    if (command->taker != TRAIN && !job->checkpoint)
        return fail(error, "expected a checkpoint (usage: diffenc %s %s)", command->name, command->usage);
    for (const Option *o = OPTIONS; o < OPTIONS + OPTION_COUNT; o++)
        if (o->takers & command->taker && strcmp(o->argument, "FILE") == 0 && !*((char *)job + o->place))
            return fail(error, "expected --%s FILE (usage: diffenc %s %s)", o->name, command->name,
                        command->usage);
    job->threads = smaller(job->threads, omp_get_thread_limit());
    return 0;
}

/* ---- settings in a checkpoint ---- */

/* "encoder-channels" on the command line is "encoder_channels" in a file. */
static const char *metadata_key(const char *name, char key[TEXT_SIZE]) {
    snprintf(key, TEXT_SIZE, "%s", name);
    for (char *dash = key; (dash = strchr(dash, '-')) != NULL;)
        *dash = '_';
    return key;
}

static int settings_read(Job *job, const TensorFile *f, const char *path) {
    const char *format = tensors_metadata(f, "format"), *version = tensors_metadata(f, "format_version");
    Settings *s = &job->settings;
    Error *error = &job->error, inner;
    *s = settings_of_paper();
    if (!format || strcmp(format, "diffenc") != 0)
        return fail(error, "%s: is no checkpoint of this program: metadata 'format' is not 'diffenc'", path);
    if (!version || strcmp(version, "1") != 0)
        return fail(error, "%s: format version %.20s, not 1", path, version ? version : "missing");
    for (const Option *o = OPTIONS; o < OPTIONS + OPTION_COUNT; o++) {
        char key[TEXT_SIZE];
        const char *text = o->takers & RECORD ? tensors_metadata(f, metadata_key(o->name, key)) : NULL;
        if (text && option_set(o, job, text, &inner))
            return fail(error, "%s: metadata: %s", path, inner.text);
    }
    if (s->step > UINT32_MAX)
        return fail(error, "%s: metadata: step %llu is beyond 4294967295", path, (unsigned long long)s->step);
    if (s->conditional != (s->config.classes > 0))
        return fail(error, "%s: metadata: conditional %d with %d classes", path, s->conditional,
                    s->config.classes);
    return config_check(&s->config, &inner) ? fail(error, "%s: metadata: %s", path, inner.text) : 0;
}

/* ---- memory ---- */

static size_t image_size(const Config *c) { return (size_t)c->height * c->width * c->image_channels; }

/* Bytes that this process may have: the machine's, or less where a limit of the process or of one of its
 * control groups, from its own up to the root, says so: "4:memory:/GROUP" of version 1, "0::/GROUP" of 2. */
static double memory_limit(void) {
    double limit = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE), value;
    char line[TEXT_SIZE], path[TEXT_SIZE + 64];
    struct rlimit own;
    if (getrlimit(RLIMIT_AS, &own) == 0 && own.rlim_cur != RLIM_INFINITY)
        limit = fmin(limit, (double)own.rlim_cur);
    FILE *stream = fopen("/proc/self/cgroup", "r");
    while (stream && fgets(line, sizeof line, stream)) {
        const int newer = strncmp(line, "0::", 3) == 0;
        char *group = newer || strstr(line, ":memory:") ? strchr(line, '/') : NULL;
        for (char *end = group ? group + strcspn(group, "\n") : NULL; end; end = strrchr(group, '/')) {
            *end = 0;
            snprintf(path, sizeof path, "/sys/fs/cgroup%s%s/memory.%s", newer ? "" : "/memory", group,
                     newer ? "max" : "limit_in_bytes");
            FILE *file = fopen(path, "r");
            if (file && fscanf(file, "%lf", &value) == 1) /* "max" is none */
                limit = fmin(limit, value);
            if (file)
                fclose(file);
        }
    }
    if (stream)
        fclose(stream);
    return limit;
}

/* Add `more` bytes to what the command needs; fails if the machine has less. */
static int memory_check(Job *job, double more) {
    const double have = memory_limit();
    job->need += more;
    if (job->need < have)
        return 0;
    return fail(&job->error, "this needs about %.0f MiB of memory, there are %.0f MiB for it",
                ldexp(job->need, -20), ldexp(have, -20));
}

/* The same for a model's vectors, in place of the one before, and one example's graph for each thread; in
 * training also gradient slots, and the graph's gradients where a thread has a slot; a chart and a trajectory
 * take a second pass. */
static int model_memory_check(Job *job, size_t weights) {
    const int training = (job->command->taker & (TRAIN | GRAD)) != 0;
    const double with_gradient = job->threads < GRADIENT_SLOTS ? job->threads : GRADIENT_SLOTS;
    Model m = {.config = job->settings.config};
    Network n = {.model = &m, .graph = {.shapes_only = 1}};
    graph_begin(&n.graph, arena_new());
    const Method method = method_begin(&n);
    const Example example = {NULL, 0.5, NULL, NULL, 0};
    objective(&method, example);
    const double graphs = training ? fmax(1.5 * with_gradient, job->threads)
                                   : job->threads * (*job->chart || job->trajectory ? 2 : 1);
    job->need -= job->model_need;
    job->model_need = graphs * (double)n.graph.bytes +
                      (double)weights * sizeof(real) * (5 + (training ? GRADIENT_SLOTS : 0));
    arena_free(n.graph.arena);
    free(m.parameter);
    return memory_check(job, job->model_need);
}

/* ---- checkpoints ---- */

static const ElementType TYPE_OF_REAL = sizeof(real) == sizeof(double) ? TYPE_F64 : TYPE_F32;
enum { NAME_SIZE = 80 }; /* "adam.m." and the name of a parameter */

/* A parameter's part of a vector as a tensor called "PREFIX.NAME", which is put into `name`. */
static TensorEntry tensor_out(const char *prefix, const Parameter *p, const real *vector,
                            char name[NAME_SIZE]) {
    TensorEntry out = {.name = name, .type = TYPE_OF_REAL, .rank = p->rank, .data = vector + p->offset};
    snprintf(name, NAME_SIZE, "%s.%s", prefix, p->name);
    memcpy(out.shape, p->shape, sizeof p->shape);
    return out;
}

/* Tensor `i` of the 4 parameter_count of a checkpoint, and where it lies in the model. */
static TensorEntry checkpoint_tensor(const Model *m, int i, char name[NAME_SIZE], real **values) {
    static const char *const prefixes[4] = {"params", "ema", "adam.m", "adam.v"};
    real *const vectors[4] = {m->params, m->ema, m->adam_m, m->adam_v};
    const int vector = i / m->parameter_count;
    const Parameter *p = &m->parameter[i % m->parameter_count];
    *values = vectors[vector] + p->offset;
    return tensor_out(prefixes[vector], p, vectors[vector], name);
}

/* What is not finite is not written: it could not be read again, and would replace what can. */
static int checkpoint_write(Job *job, const char *path) {
    const Model *m = &job->model;
    const int count = 4 * m->parameter_count;
    TensorEntry *out = arena_allocate(job->arena, (size_t)count, sizeof *out);
    char(*names)[NAME_SIZE] = arena_allocate(job->arena, (size_t)count, sizeof *names);
    const char *metadata[2 * OPTION_COUNT + 4] = {"format", "diffenc", "format_version", "1"};
    TensorFile file = {.tensors = out, .tensor_count = count, .metadata = metadata, .metadata_count = 2};
    job->settings.step = m->step;
    strcpy(job->settings.made_by, VERSION);
    for (const Option *o = OPTIONS; o < OPTIONS + OPTION_COUNT; o++)
        if (o->takers & RECORD) {
            char(*text)[TEXT_SIZE] = arena_allocate(job->arena, 2, sizeof *text);
            metadata[2 * file.metadata_count] = metadata_key(o->name, text[0]);
            metadata[2 * file.metadata_count++ + 1] = option_text(o, job, text[1]);
        }
    for (int i = 0; i < count; i++) {
        const size_t size = m->parameter[i % m->parameter_count].count;
        real *values;
        out[i] = checkpoint_tensor(m, i, names[i], &values);
        if (!isfinite(dot(values, values, size)))
            return fail(&job->error, "step %llu: diverged: %s is not finite any more",
                        (unsigned long long)m->step, names[i]);
    }
    return tensors_write(path, &file, &job->error);
}

static int checkpoint_load(Job *job, const TensorFile *f, const char *path, Load load) {
    const Model *m = &job->model;
    char model[32];
    int known = 0;
    config_model_name(&m->config, model);
    for (int i = 0; i < 4 * m->parameter_count; i++) {
        char name[NAME_SIZE];
        real *values;
        const TensorEntry tensor = checkpoint_tensor(m, i, name, &values);
        const TensorEntry *entry = tensors_find(f, name);
        known += entry != NULL;
        if (load != LOAD_ALL && i / m->parameter_count != (int)load)
            continue;
        if (!entry)
            return fail(&job->error, "%s: holds no tensor '%s', which model %s needs", path, name, model);
        if (tensors_copy(entry, path, tensor.rank, tensor.shape, values, &job->error))
            return -1;
    }
    if (known != f->tensor_count) /* the file is not what its metadata claim */
        return fail(&job->error, "%s: holds %d tensors that model %s does not have", path,
                    f->tensor_count - known, model);
    return 0;
}

/* Settings and model from a file. The file's word for the size of a model counts for nothing before the file
 * was seen to hold its weights and the machine to have memory for its graph. */
static int checkpoint_take(Job *job, const TensorFile *f, const char *path) {
    const Config *c = &job->settings.config;
    Error *error = &job->error;
    size_t weights = 0;
    if (settings_read(job, f, path) || model_size(c, &weights, error))
        return -1;
    if (weights > f->bytes.size / sizeof(float))
        return fail(error, "%s: holds %zu bytes, too few for %zu weights", path, f->bytes.size, weights);
    if (model_memory_check(job, weights) || model_new(&job->model, c, job->settings.seed, error) ||
        checkpoint_load(job, f, path, job->command->load))
        return -1;
    job->model.step = job->settings.step;
    if (job->command->load == LOAD_ALL && f->tensors[0].type != TYPE_OF_REAL)
        fprintf(stderr, "diffenc: %s: was written in another precision, continuing in %s\n", path,
                TYPE_OF_REAL == TYPE_F64 ? "double" : "single");
    return 0;
}

/* A new model's weights: the averaged ones of a checkpoint whose networks are the same. */
static int init_take(Job *job, const TensorFile *f, const char *path) {
    for (const Option *o = OPTIONS; o < OPTIONS + OPTION_COUNT; o++) {
        char key[TEXT_SIZE], wanted[TEXT_SIZE];
        const char *found = o->takers & SHAPE ? tensors_metadata(f, metadata_key(o->name, key)) : NULL;
        if (found && strcmp(found, option_text(o, job, wanted)) != 0)
            return fail(&job->error, "%s: was trained with --%s %.60s, not %.60s", path, o->name, found,
                        wanted);
    }
    if (checkpoint_load(job, f, path, LOAD_EMA))
        return -1;
    memcpy(job->model.params, job->model.ema, job->model.weight_count * sizeof(real));
    return 0;
}

static int file_take(Job *job, const char *path, int (*take)(Job *, const TensorFile *, const char *)) {
    TensorFile f;
    if (tensors_read(path, &f, &job->error))
        return -1;
    const int status = take(job, &f, path);
    tensors_free(&f);
    return status;
}

/* ---- data and pictures ---- */

static const char *path_in(const char *directory, const char *name, char path[TEXT_SIZE]) {
    snprintf(path, TEXT_SIZE, "%.*s/%.60s", TEXT_SIZE - 64, directory, name);
    return path;
}

/* Refuse data whose shape or labels do not fit the model. `name` is for the message. */
static int shape_check(Job *job, const char *name, const Dataset *data) {
    const Config *c = &job->settings.config;
    if (job->settings.conditional && data->classes == 0)
        return fail(&job->error, "%s: holds no labels, which a conditional model needs", name);
    if (job->settings.conditional && data->classes > c->classes)
        return fail(&job->error, "%s: holds labels of %d classes, the model is for %d", name, data->classes,
                    c->classes);
    if (data->height == c->height && data->width == c->width && data->channels == c->image_channels)
        return 0;
    return fail(&job->error, "%s: images are %dx%dx%d, the model is for %dx%dx%d", name, data->height,
                data->width, data->channels, c->height, c->width, c->image_channels);
}

/* Open data for the model. Where there is none yet, it will be made for these data. */
static int data_open(Job *job, const char *where, Split split, Dataset *data) {
    Config *c = &job->settings.config;
    Error inner;
    if (dataset_open(data, where, split, job->settings.seed, &inner))
        return fail(&job->error, "%s%s", inner.text,
                    job->resume                   ? "; --data says where the data are now"
                    : strcmp(where, "mnist") == 0 ? "; 'make mnist' fetches them"
                                                  : "");
    if (!job->model.params && split == SPLIT_TRAIN) {
        c->height = data->height, c->width = data->width, c->image_channels = data->channels;
        c->classes = job->settings.conditional ? data->classes : 0;
    }
    return shape_check(job, where, data);
}

/* How many images a limit leaves of the data; 0: all. */
static int limited(const Dataset *data, int limit) {
    return limit > 0 && (uint32_t)limit < data->count ? limit : (int)data->count;
}

/* `count` images, the first one of each of so many classes, the others evenly over the whole split: files may
 * be sorted. And their labels, or NULL. */
static unsigned char *images_of(Job *job, const Dataset *data, int count, int classes,
                                unsigned char **labels) {
    const size_t d = (size_t)data->height * data->width * data->channels;
    unsigned char *images = arena_allocate(job->arena, (size_t)count, d);
    *labels = data->classes ? arena_allocate(job->arena, (size_t)count, 1) : NULL;
    for (int i = 0; i < count; i++) {
        uint32_t index = 0;
        while (index < data->count && i < classes && dataset_label(data, index) != i)
            index++;
        if (i >= classes || index == data->count)
            index = (uint32_t)((uint64_t)i * data->count / (unsigned)count);
        dataset_image(data, index, images + (size_t)i * d);
        if (*labels)
            (*labels)[i] = (unsigned char)dataset_label(data, index);
    }
    return images;
}

static int is_same(const struct stat *a, const struct stat *b) {
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino;
}

static int is_stdout(const char *path) { return strcmp(path, "-") == 0; }

/* Before minutes of work: can a file be made there, and would that spoil an input? */
static int output_check(Job *job, const char *output, const char *input) {
    char directory[TEXT_SIZE];
    struct stat in, out;
    if (!*output || (job->command->taker & (SAMPLE | SHOW) && is_stdout(output)))
        return 0;
    snprintf(directory, sizeof directory, "%s", output);
    char *slash = strrchr(directory, '/');
    strcpy(slash ? slash + 1 : directory, ".");
    if (access(directory, W_OK | X_OK))
        return fail(&job->error, "%s: %s", output, strerror(errno));
    if (stat(output, &out) == 0 && stat(input, &in) == 0 && is_same(&out, &in))
        return fail(&job->error, "%s: is the same file as the input %s", output, input);
    return 0;
}

static int outputs_check(Job *job, const char *input) {
    return output_check(job, job->out, input) || output_check(job, job->chart, input) ||
           output_check(job, job->csv, input);
}

/* Where a line goes that tells of what was written. */
static FILE *tell(const Job *job) { return is_stdout(job->out) ? stderr : stdout; }

/* Several as a grid, a single one without a border. */
static int grid_write(Job *job, const char *path, Pictures p, int columns) {
    const Pictures grid = p.count > 1 ? picture_grids(p, p.count, columns, job->arena) : p;
    return pictures_write(path, grid, 0, &job->error);
}

/* Points, the images of the swirl, are seen together, in panels that begin black. */
enum { PANEL = 512, PANEL_SIZE = 3 * PANEL * PANEL, MANY_POINTS = 2000, FEW_POINTS = 500 };
static const unsigned char POINT_COLOUR[3] = {255, 200, 90};
static const double POINT_RADIUS = PANEL / 400.0;

static int is_points(const Config *c) { return c->image_channels == 2 && image_size(c) == 2; }

/* Images [sets, count] as pictures: each of them, or a panel for each set of points. */
static Pictures pictures_of(Job *job, unsigned char *images, int sets, int count) {
    const Config *c = &job->model.config;
    if (!is_points(c))
        return (Pictures){images, sets * count, c->height, c->width, c->image_channels};
    unsigned char *panels = zeroed(job, (size_t)sets, PANEL_SIZE);
    for (size_t i = 0; i < (size_t)sets; i++) {
        const unsigned char *points = images + 2 * i * (size_t)count;
        lines_draw(panels + i * PANEL_SIZE, PANEL, points, points, count, POINT_RADIUS, POINT_COLOUR);
    }
    return (Pictures){panels, sets, PANEL, PANEL, 3};
}

/* ---- progress ---- */

static const char *time_text(double seconds, char text[32]) {
    const long long s = (long long)seconds;
    snprintf(text, 32, "%lld:%02d:%02d left", s / 3600, (int)(s / 60 % 60), (int)(s % 60));
    return text;
}

/* How many columns there are on stderr: any number where it is no terminal. */
static int line_width(void) {
    struct winsize size;
    if (!isatty(STDERR_FILENO))
        return INT_MAX;
    return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

/* A line of progress, which takes the place of the one before on a terminal. */
static void show_line(Job *job, const char *text) {
    const int terminal = isatty(STDERR_FILENO);
    fprintf(stderr, terminal ? "\r%.*s\33[K" : "%.*s\n", line_width() - 1, text);
    job->line_is_open = terminal && *text;
}

/* What is printed next begins a line of its own. */
static void end_line(Job *job) {
    if (job->line_is_open)
        fputc('\n', stderr);
    job->line_is_open = 0;
}

/* How many images a grid or an evaluation has behind it, on a terminal and until its result is there. */
static void work_progress(void *watcher, int done, int count) {
    Job *job = watcher;
    const double now = seconds_now();
    const int parts = job->checkpoint_count > 0 ? job->checkpoint_count : 1;
    char line[128], left[32];
    done += job->parts_done * count, count *= parts;
    if (done == 0) {
        end_line(job);
        job->work_began = job->last_line = now;
    } else if (done == count && job->line_is_open) {
        show_line(job, "");
    } else if (now - job->last_line >= 0.1) {
        job->last_line = now;
        snprintf(line, sizeof line, "%d/%d images  %s", done, count,
                 time_text((now - job->work_began) / done * (count - done), left));
        show_line(job, line);
    }
}

/* ---- means ---- */

/* Mean and standard error of terms - minus [count], by term; minus may be NULL. */
static void mean_by_term(double (*terms)[4], double (*minus)[4], int count, double result[4][2]) {
    for (int term = 0; term < 4; term++) {
        double sum = 0, squares = 0;
        for (int i = 0; i < count; i++)
            sum += terms[i][term] - (minus ? minus[i][term] : 0);
        for (int i = 0; i < count; i++) {
            const double gap = terms[i][term] - (minus ? minus[i][term] : 0) - sum / count;
            squares += gap * gap;
        }
        result[term][0] = sum / count;
        result[term][1] = count > 1 ? sqrt(squares / (count - 1.0) / count) : 0;
    }
}

/* ---- diffenc train: its directory ---- */

/* Whether a training writes files of this name: 1, their temporary ones (file_replace): 2, or 0. */
static int file_kind(const char *name) {
    static const char *const own[6] = {
        "checkpoint.safetensors%n", "checkpoint-%*[0-9].safetensors%n", "best.safetensors%n",
        "log.csv%n",                "report.html%n",                    "samples-%*[0-9].png%n"};
    for (int i = 0; i < 6; i++) {
        int whole = 0, temporary = 0;
        sscanf(name, own[i], &whole);
        if (whole && !name[whole])
            return 1;
        sscanf(name + whole, ".tmp.%*[0-9]%n", &temporary);
        if (whole && temporary && !name[whole + temporary])
            return 2;
    }
    return 0;
}

/* A new training writes over nothing, a resumed one follows no link out of its directory. Temporary files are
 * of trainings that were killed while they wrote: whoever holds the lock is alone here. */
static int directory_inspect(Job *job) {
    char path[TEXT_SIZE];
    struct stat status;
    unsigned long long grid;
    int result = 0;
    DIR *listing = opendir(job->out);
    if (!listing)
        return fail(&job->error, "%s: cannot be read: %s", job->out, strerror(errno));
    for (struct dirent *entry; result == 0 && (entry = readdir(listing)) != NULL;) {
        const int kind = file_kind(entry->d_name);
        path_in(job->out, entry->d_name, path);
        if (kind == 2)
            unlink(path);
        else if (kind == 1 && !job->resume)
            result = fail(&job->error, "%s: is there already; another --out starts anew", path);
        else if (kind == 1 && (lstat(path, &status) || !S_ISREG(status.st_mode)))
            result = fail(&job->error, "%s: is not a regular file; a training writes to no other", path);
        else if (kind == 1 && sscanf(entry->d_name, "samples-%llu.png", &grid) == 1)
            job->newest_grid = grid > job->newest_grid ? grid : job->newest_grid;
    }
    closedir(listing);
    return result;
}

/* A directory and those that it is to lie in. Returns 0, or -1 and errno. */
static int directory_make(const char *path) {
    char part[TEXT_SIZE];
    for (const char *end = path; end;) {
        end = strchr(end + 1, '/');
        snprintf(part, sizeof part, "%.*s", end ? (int)(end - path) : TEXT_SIZE, path);
        if (mkdir(part, 0777) && errno != EEXIST)
            return -1;
    }
    return 0;
}

/* One training at a time in a directory. The lock goes with the process, however that ends. */
static int directory_enter(Job *job) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    char path[TEXT_SIZE];
    ranks_agree(0); /* what another rank refuses leaves no directory */
    if (this_rank() > 0)
        return 0;
    if (!job->resume && directory_make(job->out))
        return fail(&job->error, "%s: cannot be created: %s", job->out, strerror(errno));
    path_in(job->out, ".lock", path);
    job->lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0666);
    if (job->lock < 0)
        return fail(&job->error, "%s: cannot be written: %s", path, strerror(errno));
    if (fcntl(job->lock, F_SETLK, &lock))
        return fail(&job->error, "%s: another training is at work in this directory (%s)", job->out,
                    strerror(errno));
    if (!job->resume && access(job->checkpoint, F_OK) == 0)
        return fail(&job->error, "%s: there is a checkpoint already; --resume goes on with it",
                    job->checkpoint);
    return directory_inspect(job);
}

/* Files are written by path, so before each of them: is this still the directory that was locked? */
static int directory_check(const Job *job, Error *error) {
    char path[TEXT_SIZE];
    struct stat locked, here;
    if (fstat(job->lock, &locked) == 0 && stat(path_in(job->out, ".lock", path), &here) == 0 &&
        is_same(&locked, &here))
        return 0;
    return fail(error, "%s: was removed or replaced while this training was at work in it", job->out);
}

/* ---- diffenc train: its log ---- */

static const char *const LOG_HEADER =
    "step,bpd,recon,latent,diffusion,gradient_norm,test_bpd,test_error,seconds\n";

enum { LINE_SIZE = 4096, COLUMNS = 9, TEST_COLUMN = 6 }; /* a diverging number has up to 316 digits */

/* The numbers of a line; 0 if it is none of a log. A test bound and its error that are not there are NAN. */
static int log_line(const char *line, double value[COLUMNS]) {
    for (int i = 0; i < COLUMNS; i++) {
        char *end;
        value[i] = strtod(line, &end);
        if (end == line && (i == TEST_COLUMN || i == TEST_COLUMN + 1))
            value[i] = NAN;
        else if (end == line)
            return 0;
        if (*end != (i < COLUMNS - 1 ? ',' : '\n'))
            return 0;
        line = end + 1;
    }
    return 1;
}

/* Check that a log is that of the checkpoint at `step`: the header, then consecutive steps, that one among
 * them or just before the first. *kept gets the length up to that step; what is behind it, whole lines or the
 * beginning of one, was written between the checkpoint and the end of the training. The seconds and the best
 * bound go on from what is kept. */
static int log_check(Job *job, uint64_t step, long *kept) {
    FILE *log = job->log;
    char line[LINE_SIZE];
    double value[COLUMNS], last = 0;
    job->best = INFINITY;
    if (fgets(line, sizeof line, log) && strcmp(line, LOG_HEADER) != 0)
        return 0;
    *kept = ftell(log);
    while (fgets(line, sizeof line, log)) {
        if (!log_line(line, value))
            return feof(log) && last >= (double)step && strspn(line, "0123456789.,+-einfa") == strlen(line);
        if (value[0] != last + 1 && (last > 0 || value[0] > (double)step + 1))
            return 0;
        if (value[0] <= (double)step) {
            *kept = ftell(log);
            job->seconds = fmin(fmax(value[COLUMNS - 1], 0), 1e12); /* neither of them NAN */
            job->best = fmin(job->best, value[TEST_COLUMN]);
        }
        last = value[0];
    }
    return last == 0 || last >= (double)step;
}

/* Open log.csv: a new one, or that of the training which goes on. */
static int log_open(Job *job) {
    const int flags = O_RDWR | O_APPEND | O_CREAT | O_CLOEXEC | O_NOFOLLOW | (job->resume ? 0 : O_EXCL);
    char path[TEXT_SIZE];
    long kept;
    if (this_rank() > 0)
        return 0;
    const int file = open(path_in(job->out, "log.csv", path), flags, 0666);
    job->log = file < 0 ? NULL : fdopen(file, "a+");
    if (!job->log)
        return fail(&job->error, "%s: cannot be opened for writing: %s", path, strerror(errno));
    rewind(job->log);
    if (!log_check(job, job->model.step, &kept))
        return fail(&job->error,
                    "%s: is not the log of this training; move it away and --resume begins a new one", path);
    if (ftruncate(file, kept) || fseek(job->log, 0, SEEK_END) ||
        (kept == 0 && fputs(LOG_HEADER, job->log) < 0) || fflush(job->log))
        return fail(&job->error, "%s: cannot be written: %s", path, strerror(errno));
    return 0;
}

/* ---- diffenc train: its report ---- */

static const char *time_left(const Job *job, char text[32]) {
    return time_text(job->step_seconds * (job->steps - (double)job->model.step), text);
}

static void put_base64(FILE *out, const char *path) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    unsigned char b[3] = {0};
    FILE *in = fopen(path, "rb");
    for (size_t count; in && (count = fread(b, 1, 3, in)) > 0; memset(b, 0, 3)) {
        const unsigned bits = (unsigned)b[0] << 16 | (unsigned)b[1] << 8 | b[2];
        for (unsigned i = 0; i < 4; i++)
            putc(i <= count ? digits[bits >> (18 - 6 * i) & 63] : '=', out);
    }
    if (in)
        fclose(in);
}

/* The log as charts. Noise would hide what is learned, so each point is the mean of a run of steps. */
static void put_charts(FILE *out, const Job *job) {
    enum { POINTS = 120 };
    static const char *const label = "bits per dimension";
    double(*mean)[POINTS] = zeroed(job, COLUMNS, sizeof *mean), value[COLUMNS];
    double(*count)[POINTS] = zeroed(job, COLUMNS, sizeof *count);
    char line[LINE_SIZE];
    int tests = 0;
    for (rewind(job->log); fgets(line, sizeof line, job->log);) {
        const double steps = (double)job->model.step;
        const int found = log_line(line, value) && value[0] >= 1 && value[0] <= steps;
        const int point = found ? (int)((value[0] - 1) * POINTS / steps) : 0;
        for (int i = 0; i < COLUMNS; i++)
            if (found && isfinite(value[i])) {
                mean[i][point] += value[i];
                count[i][point]++;
            }
        tests += found && isfinite(value[TEST_COLUMN]);
    }
    fseek(job->log, 0, SEEK_END);
    for (int i = 0; i < COLUMNS * POINTS; i++) /* 0 / 0 is NAN, which a chart leaves out */
        mean[i / POINTS][i % POINTS] /= count[i / POINTS][i % POINTS];
    const Curve total[2] = {{"training", mean[0], mean[1], NULL, POINTS},
                            {"test, with standard error", mean[0], mean[TEST_COLUMN],
                             mean[TEST_COLUMN + 1], POINTS}};
    chart_svg(out, "Loss", "step", label, total, tests > 0 ? 2 : 1);
    for (int term = 0; term < 3; term++) {
        const Curve curve = {TERMS[term], mean[0], mean[2 + term], NULL, POINTS};
        chart_svg(out, TERMS[term], "step", label, &curve, 1);
    }
}

static int write_report(FILE *stream, const void *context) {
    static const char *const head =
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>\n"
        "<style>:root{color-scheme:light dark}body{font:16px/1.5 sans-serif;max-width:1320px;margin:auto;"
        "padding:1rem;background:#fff;color:#222}main{display:grid;gap:1.5rem;"
        "grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr))}main .chart,img{width:100%}"
        "img{image-rendering:pixelated}figure{margin:0}dl{columns:15rem;margin:0}dt{float:left;clear:left;"
        "width:9.5rem;opacity:.7}dd{margin-left:9.5rem;overflow-wrap:anywhere}"
        "@media(max-width:600px){main .chart{font-size:19px;overflow:visible}}"
        "@media(prefers-color-scheme:dark){body{background:#15171b;color:#ddd}}</style>\n";
    const Job *job = context;
    const unsigned long long step = job->model.step;
    char text[TEXT_SIZE], left[32];
    config_model_name(&job->settings.config, text);
    fprintf(stream, "%s%s<title>%s</title>\n<h1>%s, ", head,
            job->end ? "" : "<meta http-equiv=refresh content=10>", text, text);
    put_escaped(stream, job->settings.data);
    fprintf(stream, "</h1>\n<p><b>Step %llu of %d</b>, epoch %.2f, %.3g seconds a step, ", step, job->steps,
            (double)step * job->settings.batch / job->data.count, job->step_seconds);
    put_escaped(stream, job->end ? job->end : time_left(job, left));
    fputs(".</p>\n<main>", stream);
    put_charts(stream, job);
    if (job->newest_grid > 0) {
        snprintf(text, sizeof text, "%.960s/samples-%llu.png", job->out, job->newest_grid);
        fprintf(stream, "<figure><img alt='samples' src='data:image/png;base64,");
        put_base64(stream, text);
        fprintf(stream, "'><figcaption>Samples at step %llu</figcaption></figure>\n", job->newest_grid);
    }
    fputs("<dl>\n", stream);
    for (const Option *o = OPTIONS; o < OPTIONS + OPTION_COUNT; o++)
        if (o->takers & TRAIN && *o->argument) {
            fprintf(stream, "<dt>%s<dd>", o->name);
            put_escaped(stream, option_text(o, job, text));
        }
    fputs("</dl></main>\n", stream);
    return ferror(stream);
}

/* A report that cannot be written neither ends a training nor hides why it failed. The log may be
 * long: a hundredth of the time at most goes into reading it. */
static void report(Job *job) {
    const double start = seconds_now();
    char path[TEXT_SIZE];
    Error error;
    if ((directory_check(job, &error) ||
         file_replace(path_in(job->out, "report.html", path), write_report, job, &error)) &&
        job->end != job->error.text) {
        end_line(job);
        say(&error);
    }
    job->next_report = seconds_now() + fmax(10, 100 * (seconds_now() - start));
}

/* ---- diffenc train ---- */

static void progress(Job *job, const StepReport *r) {
    const unsigned long long step = job->model.step;
    const double now = seconds_now();
    const int last = step == (unsigned)job->steps || stop_signal, width = line_width();
    char line[LINE_SIZE], terms[LINE_SIZE / 2], speed[64], left[32];
    if (!last && job->last_line > 0 && now - job->last_line < (width < INT_MAX ? 0.1 : 10))
        return;
    job->last_line = now;
    snprintf(terms, sizeof terms, " (recon %.4f  latent %.4f  diffusion %.4f)", r->recon, r->latent,
             r->diffusion);
    snprintf(speed, sizeof speed, "  %.1f images/s", job->settings.batch / job->step_seconds);
    for (int parts = 2, length = width; parts >= 0 && length >= width; parts--) /* as many as have room */
        length = snprintf(line, sizeof line, "step %llu/%d  %.4f bpd%s%s  %s", step, job->steps, r->total,
                          parts > 1 ? terms : "", parts > 0 ? speed : "", time_left(job, left));
    show_line(job, line);
}

static int due(uint64_t step, int every) { return every > 0 && step > 0 && step % (uint64_t)every == 0; }

static int save_as(Job *job, const char *path) {
    if (this_rank() > 0)
        return 0;
    return directory_check(job, &job->error) ? -1 : checkpoint_write(job, path);
}

/* The checkpoint, and the log up to it, which a resumed training asks for. */
static int save(Job *job) {
    const unsigned long long step = job->model.step;
    char path[TEXT_SIZE];
    if (job->log)
        fsync(fileno(job->log));
    snprintf(path, sizeof path, "%.960s/checkpoint-%llu.safetensors", job->out, step);
    if (due(step, job->keep_every) && save_as(job, path))
        return -1;
    return save_as(job, job->checkpoint);
}

/* Before the results of what is called `name` are written: was the work ended by a signal, are they numbers,
 * does another rank write them, is the directory of a training still there? */
static int result_check(Job *job, const char *name, int finite) {
    if (stopped())
        return fail(&job->error, "stopped by %s, nothing was written", signal_name());
    if (!finite)
        return fail(&job->error, "%s: the result is not finite", name);
    if (this_rank() > 0)
        return DONE;
    return job->log ? directory_check(job, &job->error) : OK;
}

/* The classes that samples take turns in: 0 where there are none, or --class says which. */
static int sampled_classes(const Job *job) { return job->one_class < 0 ? job->model.config.classes : 0; }

/* How many samples of one class follow one another: a row of a grid, or of a trajectory. */
static int of_a_class(const Job *job) { return job->trajectory ? 1 : 8; }

static int sample_count(const Job *job) {
    if (job->count > 0)
        return job->count;
    if (is_points(&job->model.config))
        return MANY_POINTS;
    if (sampled_classes(job) > 0)
        return of_a_class(job) * sampled_classes(job);
    return job->trajectory ? 8 : 64;
}

static unsigned char *sample_labels(Job *job, int count) {
    const int classes = sampled_classes(job);
    unsigned char *labels = arena_allocate(job->arena, (size_t)count, 1);
    for (int i = 0; i < count; i++)
        labels[i] = (unsigned char)(classes > 0 ? i / of_a_class(job) % classes : job->one_class);
    return labels;
}

/* Whether a path has one %d, %3d or %03d, and no other %: then it may be a format. */
static int is_numbered(const char *path) {
    const char *number = strchr(path, '%');
    const size_t digits = number ? strspn(number + 1, "0123456789") : 0;
    return number && digits < 3 && number[1 + digits] == 'd' && !strchr(number + 1, '%');
}

/* A file for each image; none of them may be the checkpoint. */
static int files_write(Job *job, Pictures images) {
    Pictures image = images;
    char path[TEXT_SIZE];
    image.count = 1;
    for (int i = 0; i < images.count; i++, image.pixels += image_size(&job->model.config)) {
        snprintf(path, sizeof path, job->out, i);
        if (output_check(job, path, job->checkpoint) || pictures_write(path, image, 0, &job->error))
            return -1;
    }
    return 0;
}

/* Samples in one file, all of them or as a grid, points beside as many of the data; or in a file each. */
static int sample_to(Job *job, const char *path, int steps, uint64_t seed) {
    const Config *c = &job->model.config;
    const int count = sample_count(job);
    const int columns = sampled_classes(job) > 0 ? of_a_class(job) : (int)ceil(sqrt(count));
    const size_t all = (size_t)count * image_size(c);
    unsigned char *images = arena_allocate(job->arena, 1 + (size_t)is_points(c), all);
    unsigned char *labels = sample_labels(job, count);
    int status = sample_images(&job->workers, labels, count, steps, job->sampler, seed, job->draw, images, 0,
                               NULL);
    if ((status = result_check(job, path, status == 0)))
        return status;
    const Pictures each = {images, count, c->height, c->width, c->image_channels};
    if (has_extension(path, ".npy"))
        return pictures_write(path, each, 0, &job->error);
    if (!job->log && is_numbered(path))
        return files_write(job, each);
    if (!is_points(c))
        return grid_write(job, path, pictures_of(job, images, 1, count), columns);
    if (job->data.count == 0 && data_open(job, "swirl", SPLIT_TEST, &job->data))
        return -1;
    memcpy(images + all, images, all);
    memcpy(images, images_of(job, &job->data, count, 0, &labels), all);
    return grid_write(job, path, pictures_of(job, images, 2, count), 2);
}

/* A grid of a training. What goes wrong with it ends no training, and one that a signal ended is drawn again
 * by a resumed training. A model of finite T has no use for more steps than T. */
static void sample_grid(Job *job) {
    const int timesteps = job->model.config.timesteps;
    const unsigned long long step = job->model.step;
    const int steps = timesteps > 0 ? smaller(timesteps, job->sample_steps) : job->sample_steps;
    char path[TEXT_SIZE];
    if (steps == 0)
        return;
    snprintf(path, sizeof path, "%.960s/samples-%llu.png", job->out, step);
    const int status = sample_to(job, path, steps, job->settings.seed);
    if (stopped())
        return;
    end_line(job);
    if (status < 0) {
        say(&job->error);
        return;
    }
    job->newest_grid = step;
    printf("%s\n", path);
}

enum { FEW_STEPS = 20 }; /* after which the speed is known */

/* A step on the next images of their epoch, and what follows it: evaluation, a line in the log, progress. */
static int train_step(Job *job) {
    const Settings *s = &job->settings;
    const size_t d = image_size(&s->config);
    unsigned char *images = arena_allocate(job->arena, (size_t)s->batch, d);
    unsigned char *labels = arena_allocate(job->arena, (size_t)s->batch, 1);
    char left[32];
    StepReport r = {0};
    char test[1024] = ",", path[TEXT_SIZE];
    const double start = seconds_now();
    for (int i = 0; i < s->batch; i++) {
        const uint64_t n = job->model.step * (uint64_t)s->batch + (uint64_t)i;
        const uint32_t position = (uint32_t)(n % job->data.count), epoch = (uint32_t)(n / job->data.count);
        const uint32_t index = dataset_shuffle(s->seed, epoch, position, job->data.count);
        dataset_image(&job->data, index, images + (size_t)i * d);
        labels[i] = (unsigned char)dataset_label(&job->data, index);
    }
    if (training_step(&job->model, &job->workers, &s->optimizer, images, labels, s->batch, s->seed, &r,
                      &job->error))
        return stopped() ? 0 : -1; /* a step in which a signal came is not taken */
    const unsigned long long step = job->model.step;
    job->seconds += seconds_now() - start; /* without evaluations, grids and files */
    job->step_seconds = (job->seconds - job->first_seconds) / (double)(step - job->first_step);
    if (due(step, job->eval_every)) {
        double result[4][2], (*terms)[4];
        terms = arena_allocate(job->arena, (size_t)job->test_count, sizeof *terms);
        evaluate(&job->workers, job->test, job->test_labels, job->test_count, 1, s->seed, terms, NULL);
        mean_by_term(terms, NULL, job->test_count, result);
        if (!stopped()) {
            snprintf(test, sizeof test, "%.6f,%.6f", result[3][0], result[3][1]);
            end_line(job);
            printf("step %llu: test %.4f +- %.4f bpd on %d images\n", step, result[3][0], result[3][1],
                   job->test_count);
            if (result[3][0] < job->best && save_as(job, path_in(job->out, "best.safetensors", path)))
                return -1;
            job->best = fmin(job->best, result[3][0]);
        }
    }
    if (this_rank() > 0)
        return 0;
    fprintf(job->log, "%llu,%.6f,%.6f,%.6f,%.6f,%.6f,%s,%.3f\n", step, r.total, r.recon, r.latent,
            r.diffusion, r.gradient_norm, test, job->seconds);
    progress(job, &r);
    if (step - job->first_step == FEW_STEPS && step < (unsigned)job->steps) {
        end_line(job);
        printf("%.3g seconds a step, %s\n", job->step_seconds, time_left(job, left));
    }
    if (fflush(job->log))
        return fail(&job->error, "%s/log.csv: cannot be written: %s", job->out, strerror(errno));
    if (seconds_now() > job->next_report)
        report(job);
    return 0;
}

/* A grid is drawn after the checkpoint of its step and before the next step: a training that was stopped or
 * killed in between makes up for it when it goes on. */
static int train_loop(Job *job) {
    const uint64_t *step = &job->model.step, steps = (uint64_t)job->steps;
    const ArenaMark mark = arena_mark(job->arena);
    int status = 0;
    job->settings.optimizer.steps = job->steps;
    job->first_step = *step, job->first_seconds = job->seconds;
    job->next_report = seconds_now() + 1;
    while (status == 0 && *step < steps && !stopped()) {
        if (due(*step, job->sample_every))
            sample_grid(job);
        if (!stopped() && (status = train_step(job)) == 0 && *step < steps &&
            (due(*step, job->save_every) || due(*step, job->sample_every) || due(*step, job->keep_every)))
            status = save(job);
        arena_release(job->arena, mark);
    }
    if (status == 0)
        status = save(job);
    if (status == 0 && *step > 0 && !stopped())
        sample_grid(job);
    return status;
}

/* The data of a training; those of a resumed one may have moved, but not changed. */
static int train_data(Job *job) {
    Settings *s = &job->settings;
    Dataset test = {0};
    if (data_open(job, s->data, SPLIT_TRAIN, &job->data))
        return -1;
    const uint64_t digest = dataset_digest(&job->data, s->conditional);
    if (job->resume && s->data_digest && s->data_digest != digest)
        return fail(&job->error, "%s: holds other images%s than this training began with", s->data,
                    s->conditional ? " or labels" : "");
    s->data_digest = digest;
    job->need += job->data.pixels ? (double)job->data.count * (double)image_size(&s->config) : 0;
    if (!job->eval_every)
        return 0;
    const int status = data_open(job, s->data, SPLIT_TEST, &test);
    job->test_count = limited(&test, job->eval_limit);
    job->test = status ? NULL : images_of(job, &test, job->test_count, 0, &job->test_labels);
    dataset_close(&test);
    return status;
}

/* What can be refused is, most of it before memory is taken; a new training's directory is made last. */
static int train_prepare(Job *job) {
    Settings *s = &job->settings;
    Error *error = &job->error;
    size_t weights;
    if (job->resume) { /* locked before it is read: what another training writes meanwhile would be lost */
        if (access(job->checkpoint, F_OK))
            return fail(error, "%s: there is no checkpoint to resume", job->checkpoint);
        if (directory_enter(job) || file_take(job, job->checkpoint, checkpoint_take) || parse_options(job))
            return -1;
    }
    if (train_data(job) || config_check(&s->config, error))
        return -1;
    job->model.config = s->config; /* with what may change on the way */
    if (job->resume)
        return log_open(job);
    if (model_size(&s->config, &weights, error) || model_memory_check(job, weights) ||
        model_new(&job->model, &s->config, s->seed, error) ||
        (*job->init && file_take(job, job->init, init_take)) || directory_enter(job))
        return -1;
    return save(job) || log_open(job) ? -1 : 0; /* a log without a checkpoint would be a stranger's */
}

/* From here on a signal ends the work instead of the program. */
static void workers_start(Job *job) {
    catch_signals();
    workers_new(&job->workers, &job->model, job->threads);
    job->workers.stop = &stop_signal;
    job->workers.progress = isatty(STDERR_FILENO) ? work_progress : NULL;
    job->workers.watcher = job;
}

static int train(Job *job) {
    const Config *c = &job->settings.config;
    char model[32], checkpoint[TEXT_SIZE];
    job->checkpoint = path_in(job->out, "checkpoint.safetensors", checkpoint);
    if (!job->resume && config_check(c, &job->error)) /* known from the options alone */
        return USAGE;
    if (job->resume && *job->init) {
        fail(&job->error, "init %s: begins a new training, --resume goes on with one", job->init);
        return USAGE;
    }
    if (train_prepare(job))
        return -1;
    workers_start(job);
    config_model_name(c, model);
    const int threads = rank_count() * job->threads;
    if (job->model.step > (uint64_t)job->steps)
        fprintf(stderr, "diffenc: %s: is at step %llu already, beyond --steps %d\n", checkpoint,
                (unsigned long long)job->model.step, job->steps);
    printf("%s: %zu weights, %s (%u images of %dx%dx%d), %d thread%s, about %.0f MiB of memory, "
           "from step %llu to %d (%.2f epochs), into %s\n",
           model, job->model.weight_count, job->settings.data, (unsigned)job->data.count, c->height, c->width,
           c->image_channels, threads, threads > 1 ? "s" : "", ldexp(job->need, -20),
           (unsigned long long)job->model.step, job->steps,
           (double)job->steps * job->settings.batch / job->data.count, job->out);
    const int status = train_loop(job);
    job->end = status ? job->error.text : stopped() ? "stopped; --resume goes on" : "finished";
    if (job->model.step > 0 && this_rank() == 0)
        report(job);
    if (status)
        return FAILURE;
    const unsigned long long step = job->model.step;
    if (!stopped()) {
        printf("%s at step %llu\n", checkpoint, step);
        return 0;
    }
    return fail(&job->error, "stopped by %s; %s at step %llu, --resume goes on", signal_name(), checkpoint,
                step);
}

/* ---- what the commands on a checkpoint have in common ---- */

/* No path in a checkpoint is opened unasked: the file may be a stranger's. */
static int job_data(Job *job, Split split) {
    const char *trained_on = job->settings.data;
    if (!*job->where && strcmp(trained_on, "digits") != 0 && strcmp(trained_on, "swirl") != 0)
        return fail(&job->error, "%s: was trained on '%s'; give --data with a path of your own",
                    job->checkpoint, trained_on);
    if (!*job->where)
        strcpy(job->where, trained_on);
    if (data_open(job, job->where, split, &job->data))
        return -1;
    DIR *listing = opendir(job->where);
    int status = 0;
    for (struct dirent *entry; status == 0 && listing && (entry = readdir(listing)) != NULL;) {
        char path[TEXT_SIZE];
        status = outputs_check(job, path_in(job->where, entry->d_name, path)) ? -1 : 0;
    }
    if (listing)
        closedir(listing);
    return status;
}

/* ---- diffenc sample ---- */

enum { TIMES = 10, FRAMES = 40, HELD = 12, DELAY = 80 }; /* of a picture; of an animation */

/* Rows are samples, columns times: x^ above z_t. An animation shows x^ alone, its end for a second more. */
static int trajectory_write(Job *job, int count, int steps) {
    const int animated = has_extension(job->out, ".apng");
    const int times = smaller(animated ? FRAMES : TIMES, steps + 1);
    const size_t all = (size_t)count * image_size(&job->model.config), sets = 2 * (size_t)times;
    unsigned char *images = arena_allocate(job->arena, sets + 1, all);
    int status = sample_images(&job->workers, sample_labels(job, count), count, steps, job->sampler,
                                   job->seed, job->draw, images + sets * all, times, images);
    if ((status = result_check(job, job->out, status == 0)))
        return status;
    const Pictures p = pictures_of(job, images, (int)sets, count);
    const size_t size = (size_t)p.height * p.width * p.channels, rows = p.count / sets;
    const size_t shown = animated ? (times + HELD) * rows : (size_t)p.count;
    unsigned char *film = arena_allocate(job->arena, shown, size);
    for (size_t i = 0; i < shown; i++) {
        const size_t time = animated ? (size_t)smaller((int)(i / rows), times - 1) : i % times;
        const size_t is_z = animated ? 0 : i / times % 2, row = animated ? i % rows : i / sets;
        memcpy(film + i * size, p.pixels + ((2 * time + is_z) * rows + row) * size, size);
    }
    const Pictures pictures = {film, (int)shown, p.height, p.width, p.channels};
    if (!animated)
        return grid_write(job, job->out, pictures, times);
    const Pictures frames = picture_grids(pictures, (int)rows, (int)ceil(sqrt((double)rows)), job->arena);
    return pictures_write(job->out, frames, DELAY, &job->error);
}

static int sample(Job *job) {
    const Config *c = &job->model.config;
    const int steps = job->steps > 0 ? job->steps : c->timesteps > 0 ? c->timesteps : 250;
    const int count = sample_count(job);
    if (job->one_class >= 0 && job->one_class >= c->classes) {
        fail(&job->error, "class %d: the model has %d classes, counted from 0", job->one_class, c->classes);
        return USAGE;
    }
    const int numbers = has_extension(job->out, ".npy") || (is_numbered(job->out) && !job->trajectory);
    const int channels = is_points(c) && !numbers ? 3 : c->image_channels;
    /* Thrice the pictures: as they are, as a grid, as a file. */
    const double each = count * (double)image_size(c) + (is_points(c) ? PANEL_SIZE : 0);
    if (picture_path_check(job->out, channels, &job->error) ||
        memory_check(job, 3 * each * (job->trajectory ? 2 * FRAMES : 1)))
        return -1;
    const int status =
        job->trajectory ? trajectory_write(job, count, steps) : sample_to(job, job->out, steps, job->seed);
    if (status)
        return status;
    fprintf(tell(job), "%s: %d images, %d steps\n", job->out, count, steps);
    return 0;
}

/* ---- diffenc eval: what is kept of a checkpoint, and what comes of comparing several ---- */

enum { BINS = 32 }; /* of t in [0, 1], in a chart */

struct Evaluated {
    const char *path;
    char name[TEXT_SIZE]; /* what may be printed of the path */
    Settings settings;
    char training[OPTION_COUNT][TEXT_SIZE]; /* what a group has in common */
    double (*terms)[4];      /* [count] of the images */
    double value[4][2];      /* their means and standard errors, in bits per dimension */
    double difference[4][2]; /* the same of each image's difference to the first checkpoint */
    double over_seeds[4][2]; /* the same over the seeds of a group, which its first one stands for */
    int seeds;               /* of that group */
    const Evaluated *group;  /* its first one, or NULL */
    double by_time[DRAW_COLUMNS][BINS]; /* means of the draws with t in a bin */
};

static void mean_by_time(double (*draws)[DRAW_COLUMNS], size_t count, double mean[DRAW_COLUMNS][BINS]) {
    double number[BINS] = {0};
    for (size_t i = 0; i < count; i++) {
        const int bin = smaller((int)(draws[i][DRAW_TIME] * BINS), BINS - 1);
        number[bin]++;
        for (int column = 0; column < DRAW_COLUMNS; column++)
            mean[column][bin] += draws[i][column];
    }
    for (int i = 0; i < DRAW_COLUMNS * BINS; i++) /* 0 / 0 is NAN, which a chart leaves out */
        mean[i / BINS][i % BINS] /= number[i % BINS];
}

/* The regularised incomplete beta function I_x(a, b), by 400 levels of its continued fraction, which settles
 * quickly below the mean (a + 1)/(a + b + 2). [DLMF 8.17.22] */
static double incomplete_beta(double a, double b, double x) {
    double fraction = 1;
    if (x > (a + 1) / (a + b + 2))
        return 1 - incomplete_beta(b, a, 1 - x);
    for (int level = 400; level >= 1; level--) {
        const double m = floor(level / 2.0), factor = level % 2 ? -(a + m) * (a + b + m) : m * (b - m);
        fraction = 1 + factor * x / ((a + level - 1) * (a + level)) / fraction;
    }
    return exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x)) / (a * fraction);
}

/* Welch's t-test of two means with standard errors, by term. */
static void print_welch(const Evaluated *a, const Evaluated *b) {
    printf("Welch's t-test: %s minus %s\n", b->name, a->name);
    for (int term = 0; term < 4; term++) {
        const double *p = a->over_seeds[term], *q = b->over_seeds[term];
        const double difference = q[0] - p[0], u = p[1] * p[1], v = q[1] * q[1], t = difference / sqrt(u + v);
        const double freedom = (u + v) * (u + v) / (u * u / (a->seeds - 1) + v * v / (b->seeds - 1));
        printf("%-10s %9.5f  ", TERMS[term], difference);
        if (sqrt(u + v) > 1e-12 * (fabs(p[0]) + fabs(q[0]))) /* else rounding alone tells them apart */
            printf("t %.4f, %.2f degrees of freedom, p %.4g\n", t, freedom,
                   incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t)));
        else
            printf("no spread over the seeds\n");
    }
}

static void print_row(double value[4][2], const char *name) {
    for (int term = 0; term < 4; term++)
        printf("%9.5f +- %.5f  ", value[term][0], value[term][1]);
    printf("%s\n", name);
}

/* Each checkpoint, its difference to the first, and groups that differ in the seed alone, each seed once. */
static void print_comparison(Job *job) {
    Evaluated *const all = job->evaluated, *const end = all + job->checkpoint_count;
    double(*values)[4] = arena_allocate(job->arena, (size_t)job->checkpoint_count, sizeof *values);
    for (int term = 0; term < 4; term++)
        printf("    %-18s", TERMS[term]);
    printf("checkpoint\n");
    for (Evaluated *e = all; e < end; e++)
        print_row(e->value, e->name);
    printf("difference to %s with the standard error of the paired difference:\n", all->name);
    for (Evaluated *e = all + 1; e < end; e++)
        print_row(e->difference, e->name);
    for (Evaluated *first = all; first < end; first++) {
        for (Evaluated *e = first; e < end; e++) {
            int is_new = 1;
            if (e->group || memcmp(first->training, e->training, sizeof e->training) != 0)
                continue;
            e->group = first;
            for (const Evaluated *k = first; k < e; k++)
                is_new &= k->group != first || k->settings.seed != e->settings.seed;
            for (int term = 0; term < 4; term++)
                values[first->seeds][term] = e->value[term][0];
            first->seeds += is_new;
        }
        if (first->seeds < 2)
            continue;
        mean_by_term(values, NULL, first->seeds, first->over_seeds);
        printf("mean over %d seeds with its standard error:\n", first->seeds);
        print_row(first->over_seeds, first->name);
        for (const Evaluated *other = all; other < first; other++)
            if (other->seeds > 1)
                print_welch(other, first);
    }
}

static int write_csv(FILE *stream, const void *context) {
    const Job *job = context;
    fputs("checkpoint,recon,latent,diffusion,total,recon_error,latent_error,diffusion_error,total_error,"
          "difference,difference_error,model,seed,step\n",
          stream);
    for (const Evaluated *e = job->evaluated; e < job->evaluated + job->checkpoint_count; e++) {
        const char *quote = strpbrk(e->path, ",\"\r\n") ? "\"" : "";
        char model[32];
        fputs(quote, stream);
        for (const char *at = e->path; *at; at++)
            fprintf(stream, *at == '"' ? "%c%c" : "%c", *at, *at);
        fputs(quote, stream);
        for (int i = 0; i < 8; i++)
            fprintf(stream, ",%.9g", e->value[i % 4][i / 4]);
        config_model_name(&e->settings.config, model);
        fprintf(stream, ",%.9g,%.9g,%s,%llu,%llu\n", e->difference[3][0], e->difference[3][1], model,
                (unsigned long long)e->settings.seed, (unsigned long long)e->settings.step);
    }
    return ferror(stream);
}

/* Three charts below one another, the last one without VDM, whose x does not move. */
static int write_chart(FILE *stream, const void *context) {
    static const char *const texts[3][3] = {
        {"Diffusion loss over t", "t", "bits per dimension"},
        {"Diffusion loss over lambda", "lambda", "bits per dimension and unit of lambda"},
        {"Relative error of the counterterm", "t", "|| sigma_t^2 x^ - dx_t/dlambda || / || dx_t/dlambda ||"}};
    static const int columns[3][2] = {
        {DRAW_TIME, DRAW_LOSS}, {DRAW_LAMBDA, DRAW_LOSS_BY_LAMBDA}, {DRAW_TIME, DRAW_COUNTERTERM_ERROR}};
    const Job *job = context;
    const int n = job->checkpoint_count, height = 410 + 22 * n; /* chart_svg() has a line for each curve */
    Curve *curves = arena_allocate(job->arena, (size_t)n, sizeof *curves);
    fprintf(stream, "<svg xmlns='http://www.w3.org/2000/svg' class='chart' viewBox='0 0 640 %d'>\n",
            3 * height);
    for (int i = 0; i < 3; i++) {
        int count = 0;
        for (const Evaluated *e = job->evaluated; e < job->evaluated + n; e++)
            if (i < 2 || e->settings.config.kind != VDM)
                curves[count++] =
                    (Curve){e->path, e->by_time[columns[i][0]], e->by_time[columns[i][1]], NULL, BINS};
        fprintf(stream, "<svg y='%d' width='640' height='%d'>\n", i * height, height);
        if (count > 0)
            chart_svg(stream, texts[i][0], texts[i][1], texts[i][2], curves, count);
        fputs("</svg>\n", stream);
    }
    fputs("</svg>\n", stream);
    return ferror(stream);
}

/* ---- diffenc eval ---- */

/* The bound with the best sigma_P^2 at each t beside that of sigma_Q. `others`: recon + latent. */
static void print_optimal_variance(const double *distance, int count, int timesteps, int d, double others) {
    double plain = 0, best = 0;
    printf("   t        w*       KL* (bpd)   KL at w = 1\n");
    for (int step = 0; step < timesteps; step++) {
        double sum = 0;
        for (int i = 0; i < count; i++)
            sum += distance[(size_t)step * count + i];
        const double w = best_variance_ratio(sum / count, d), kl = -0.5 * log(w) / LOG_2,
                     kl_1 = 0.5 * (sum / count) / d / LOG_2;
        plain += kl_1;
        best += kl;
        if (timesteps <= 32 || step % (timesteps / 16) == 0 || step == timesteps - 1)
            printf("%8.5f  %8.6f  %10.6f  %10.6f\n", (step + 1.0) / timesteps, w, kl, kl_1);
    }
    printf("diffusion, all %d steps: %.5f bpd with sigma_P = sigma_Q, %.5f with the best sigma_P\n"
           "total: %.5f bpd with sigma_P = sigma_Q, %.5f with the best sigma_P\n",
           timesteps, plain, best, others + plain, others + best);
}

/* --timesteps and --variance-ratio (a number, "optimal" or "") into the configuration. */
static int eval_config(Job *job) {
    Config *c = &job->settings.config;
    const int optimal = strcmp(job->ratio, "optimal") == 0;
    if (job->timesteps >= 0)
        c->timesteps = job->timesteps;
    if (job->timesteps >= 0 || optimal)
        c->variance_ratio = 1;
    if (*job->ratio && !optimal &&
        option_set(option_find(RECORD, "variance-ratio", 14), job, job->ratio, &job->error))
        return -1;
    if (optimal && c->timesteps == 0)
        return fail(&job->error, "variance-ratio optimal: in continuous time it is 1; give --timesteps");
    if (optimal && job->checkpoint_count > 1)
        return fail(&job->error, "variance-ratio optimal: takes one checkpoint at a time");
    if (*job->csv && strcmp(job->csv, job->chart) == 0)
        return fail(&job->error, "csv %s: is where the chart goes", job->csv);
    job->model.config = *c;
    return config_check(c, &job->error);
}

/* Begin with checkpoint `i`, in the place of another one. The first of all is there already. */
static int eval_take(Job *job, int i) {
    Evaluated *e = &job->evaluated[i];
    e->path = job->arguments[i];
    printable(e->path, e->name, sizeof e->name);
    if (job->checkpoint != e->path) {
        workers_free(&job->workers);
        model_free(&job->model);
        job->checkpoint = e->path;
        if (outputs_check(job, e->path) || file_take(job, e->path, checkpoint_take) ||
            shape_check(job, e->path, &job->data))
            return -1;
        workers_start(job);
    }
    e->settings = job->settings;
    for (int k = 0; k < OPTION_COUNT; k++)
        if ((OPTIONS[k].takers & (RECORD | OWN)) == RECORD)
            option_text(&OPTIONS[k], job, e->training[k]);
    return eval_config(job) ? USAGE : OK;
}

/* Its bound, from the same draws of time and noise as that of all others. */
static int eval_one(Job *job, int i, const unsigned char *images, const unsigned char *labels, int count,
                    double (*draws)[DRAW_COLUMNS]) {
    Evaluated *e = &job->evaluated[i];
    e->terms = arena_allocate(job->arena, (size_t)count, sizeof *e->terms);
    evaluate(&job->workers, images, labels, count, job->repeats, job->seed, e->terms, draws);
    if (stopped())
        return result_check(job, e->path, 0);
    mean_by_term(e->terms, NULL, count, e->value);
    mean_by_term(e->terms, job->evaluated->terms, count, e->difference);
    if (draws)
        mean_by_time(draws, (size_t)count * (size_t)job->repeats, e->by_time);
    return result_check(job, e->path, isfinite(e->value[3][0] + e->value[3][1]));
}

static int eval(Job *job) {
    const Config *c = &job->model.config;
    const int n = job->checkpoint_count;
    int status = job_data(job, (Split)job->split);
    job->evaluated = zeroed(job, (size_t)n, sizeof *job->evaluated);
    if (status || (status = eval_take(job, 0)))
        return status;
    const int count = limited(&job->data, job->limit);
    const int T = strcmp(job->ratio, "optimal") == 0 ? c->timesteps : 0;
    const size_t d = image_size(c), distances = (size_t)count * (size_t)T;
    /* Times and noise are drawn by the index of image and repetition. */
    if ((double)count * job->repeats > INT_MAX)
        return fail(&job->error, "%d images %d times: more draws than %d", count, job->repeats, INT_MAX);
    const size_t draw_count = *job->chart ? (size_t)count * (size_t)job->repeats : 0;
    if (memory_check(job, count * ((double)d + (T + 4.0 * n) * sizeof(double)) +
                              (double)draw_count * sizeof(double[DRAW_COLUMNS])))
        return -1;
    for (int i = 1; i < n; i++) /* what can be refused is, before minutes of work */
        if ((status = eval_take(job, i)))
            return status;
    double *distance = arena_allocate(job->arena, distances, sizeof *distance), all = 0;
    double(*draws)[DRAW_COLUMNS] = draw_count ? arena_allocate(job->arena, draw_count, sizeof *draws) : NULL;
    unsigned char *labels, *images = images_of(job, &job->data, count, 0, &labels);
    for (job->parts_done = 0; job->parts_done < n; job->parts_done++)
        if (eval_take(job, job->parts_done) ||
            eval_one(job, job->parts_done, images, labels, count, draws) < 0)
            return -1;
    job->parts_done = 0;
    if (T > 0)
        step_distances(&job->workers, images, labels, count, job->seed, distance);
    for (size_t i = 0; i < distances && !stop_signal; i++)
        all += distance[i];
    if ((status = result_check(job, job->checkpoint, isfinite(all))))
        return status;
    printf("%d %s images of %s, ", count, job->split == SPLIT_TEST ? "test" : "training", job->where);
    if (n == 1)
        printf("step %llu, ", (unsigned long long)job->model.step);
    printf("EMA weights, bits per dimension%s with standard error:\n",
           n == 1 && c->classes ? " given the class" : "");
    if (n > 1)
        print_comparison(job);
    for (int term = 0; term < 4 && n == 1; term++)
        printf("%-10s %9.5f +- %.5f\n", TERMS[term], job->evaluated->value[term][0],
               job->evaluated->value[term][1]);
    if (T > 0)
        print_optimal_variance(distance, count, T, (int)d,
                               job->evaluated->value[0][0] + job->evaluated->value[1][0]);
    if (*job->csv && file_replace(job->csv, write_csv, job, &job->error))
        return -1;
    return *job->chart ? file_replace(job->chart, write_chart, job, &job->error) : 0;
}

/* ---- diffenc show ---- */

enum { MOST_TIMES = 64, SHOW_ROWS = 3 };

typedef struct {
    const Config *config;
    const unsigned char *images, *labels;
    double time[MOST_TIMES];
    int times;
    unsigned char *pictures; /* [count, SHOW_ROWS, times, height, width] of red, green, blue */
    double *change;          /* [count, times, height, width]: (x_t - x_s)/(t - s), s the time before t; or 0,
                              * or NAN where x_t or y are not finite */
} Show;

/* --times T,T,... */
static int times_parse(Job *job, Show *s) {
    for (char *at = job->times, *end;; at = end + 1) {
        double *t = &s->time[s->times];
        *t = strtod(at, &end);
        const int good = end != at && *t >= 0 && *t <= 1 && (s->times == 0 || *t > t[-1]);
        if (!good || ++s->times == MOST_TIMES || (*end && *end != ','))
            return fail(&job->error, "times '%.40s': expected fewer than %d ascending numbers from 0 to 1",
                        job->times, MOST_TIMES);
        if (!*end)
            return 0;
    }
}

/* Values in [-1, 1] as pixels of three colours. Returns whether all are finite. */
static int to_pixels(const Tensor *a, unsigned char *out) {
    const size_t channels = (size_t)a->channels;
    int finite = 1;
    for (size_t i = 0; i < 3 * element_count(a) / channels; i++) {
        const real value = a->value[i / 3 * channels + (i % 3 < channels ? i % 3 : 0)];
        finite = finite && isfinite(value);
        out[i] = (unsigned char)(finite ? nearest_level(value) : 0);
    }
    return finite;
}

/* For one image over t: x_t, y, and the change of x_t since the time before, summed over the channels. */
static void show_example(Network *n, int i, void *context) {
    const Show *s = context;
    const size_t d = image_size(s->config), area = d / (size_t)s->config->image_channels;
    n->graph.dropout = 0;
    n->label = s->labels ? s->labels[i] : 0;
    for (int column = 0; column < s->times; column++) {
        network_begin(n);
        const Method m = method_begin(n);
        const double t = s->time[column], before = s->time[column > 0 ? column - 1 : 0];
        Tensor *x = scale_pixels(&m, s->images + (size_t)i * d);
        const Encoded e = encode(&m, x, t, 0), at_s = encode(&m, x, before, 0);
        const size_t times = (size_t)s->times, picture = (size_t)i * times + (size_t)column;
        unsigned char *out = s->pictures + 3 * area * (picture + (size_t)i * (SHOW_ROWS - 1) * times);
        double *change = s->change + picture * area;
        const int finite = to_pixels(e.x_t, out) &
                           to_pixels(e.y ? e.y : affine(0, e.x_t, 0), out + 3 * area * times);
        for (size_t k = 0; k < d && column > 0; k++)
            change[k * area / d] += ((double)e.x_t->value[k] - (double)at_s.x_t->value[k]) / (t - before);
        *change = finite ? *change : NAN;
    }
}

/* The changes in blue, white and red. Returns the one that is all red. */
static double draw_changes(const Show *s, int count, double amplify) {
    const size_t row = (size_t)s->times * s->config->height * s->config->width;
    double most = 1e-30;
    for (size_t i = 0; i < (size_t)count * row; i++)
        most = fmax(most, fabs(s->change[i]));
    for (size_t i = 0; i < (size_t)count * row; i++) {
        unsigned char *rgb = s->pictures + 3 * (i + (i / row + 1) * (SHOW_ROWS - 1) * row);
        const double value = s->change[i] * amplify / most;
        rgb[1] = (unsigned char)(255.5 - 255 * fmin(fabs(value), 1));
        rgb[0] = value > 0 ? 255 : rgb[1];
        rgb[2] = value < 0 ? 255 : rgb[1];
    }
    return most / amplify;
}

/* For each time the points x_t, with lines from x. */
static int show_points(Job *job, const Show *s, int count) {
    static const unsigned char blue[3] = {60, 90, 130};
    unsigned char *panels = zeroed(job, (size_t)s->times, PANEL_SIZE);
    for (int i = 0; i < count * s->times; i++) {
        const int example = i / s->times, column = i % s->times;
        const unsigned char *x = s->images + 2 * example,
                            *x_t = s->pictures + 3 * (SHOW_ROWS * (i - column) + column);
        lines_draw(panels + column * PANEL_SIZE, PANEL, x, x_t, 1, 0.5, blue);
        lines_draw(panels + column * PANEL_SIZE, PANEL, x_t, x_t, 1, POINT_RADIUS, POINT_COLOUR);
    }
    if (grid_write(job, job->out, (Pictures){panels, s->times, PANEL, PANEL, 3}, (int)ceil(sqrt(s->times))))
        return -1;
    fprintf(tell(job), "%s: %d points x_t and their way from x, t = %s\n", job->out, count, job->times);
    return 0;
}

static int show(Job *job) {
    const Config *c = &job->model.config;
    Show s = {.config = c};
    if (times_parse(job, &s))
        return USAGE;
    const size_t pixels = (size_t)s.times * c->height * c->width, each = 3 * SHOW_ROWS * pixels;
    if (picture_path_check(job->out, 3, &job->error))
        return -1;
    if (c->kind == VDM)
        return fail(&job->error, "%s: vdm-%d has no encoder to show: x_t = x", job->checkpoint,
                    c->score_blocks);
    if (job_data(job, SPLIT_TEST))
        return -1;
    const int classes = job->count ? 0 : smaller(job->data.classes, 64);
    const int usual = classes ? classes : is_points(c) ? FEW_POINTS : 4;
    const int count = limited(&job->data, job->count ? job->count : usual);
    const double panels = is_points(c) ? 3.0 * s.times * PANEL_SIZE : 0;
    if (memory_check(job, count * (3.0 * (double)each + (double)pixels * sizeof(double)) + panels))
        return -1;
    unsigned char *labels, *images = images_of(job, &job->data, count, classes, &labels);
    s.images = images, s.labels = labels;
    s.pictures = arena_allocate(job->arena, (size_t)count, each);
    s.change = zeroed(job, (size_t)count, pixels * sizeof(double));
    workers_run(&job->workers, job->model.ema, count, show_example, &s);
    ranks_gather(s.pictures, 1, count, each);
    ranks_gather(s.change, 1, count, pixels * sizeof(double));
    double sum = 0;
    for (size_t i = 0; i < (size_t)count * pixels; i++)
        sum += fabs(s.change[i]);
    const int status = result_check(job, job->checkpoint, isfinite(sum));
    if (status)
        return status;
    if (is_points(c))
        return show_points(job, &s, count);
    const double scale = draw_changes(&s, count, job->amplify);
    const Pictures p = {s.pictures, count * SHOW_ROWS * s.times, c->height, c->width, 3};
    if (grid_write(job, job->out, p, s.times))
        return -1;
    fprintf(tell(job),
            "%s: rows x_t, y, (x_t - x_s)/(t - s) of %d images, columns t = %s, blue -%.4g .. red +%.4g\n",
            job->out, count, job->times, scale, scale);
    return 0;
}

/* ---- diffenc grad ---- */

/* The examples of a batch: numbers in the arena, images in the file. Returns how many there are, or -1. */
static int batch_read(Job *job, const TensorFile *f, const char *path, Example **examples) {
    static const char *const names[4] = {"images", "t", "eps", "eps0"};
    const Config *c = &job->model.config;
    const TensorEntry *entry[4];
    Error *error = &job->error;
    real *number[4]; /* by name: t [count], eps and eps0 [count, d] */
    for (int i = 0; i < 4; i++)
        if (!(entry[i] = tensors_find(f, names[i])))
            return fail(error, "%s: holds no tensor '%s', which a batch needs", path, names[i]);
    const TensorEntry *images = entry[0], *labels = c->classes ? tensors_find(f, "labels") : NULL;
    const unsigned char *pixels = images->data, *classes = labels ? labels->data : NULL;
    const int64_t *shape = images->shape, count = shape[0];
    if (images->type != TYPE_U8 || images->rank != 4 || shape[1] != c->height || shape[2] != c->width ||
        shape[3] != c->image_channels || count < 1 || count > MAX_BATCH)
        return fail(error, "%s: images: expected U8 [B,%d,%d,%d] with B from 1 to %d", path, c->height,
                    c->width, c->image_channels, MAX_BATCH);
    if (c->classes && (!labels || labels->type != TYPE_U8 || labels->rank != 1 || labels->shape[0] != count))
        return fail(error, "%s: labels: expected U8 [%d], as the model is conditional", path, (int)count);
    for (int i = 1; i < 4; i++) {
        number[i] = arena_allocate(job->arena, i == 1 ? (size_t)count : images->count, sizeof(real));
        if (tensors_copy(entry[i], path, i == 1 ? 1 : 4, shape, number[i], error))
            return -1;
    }
    *examples = arena_allocate(job->arena, (size_t)count, sizeof **examples);
    for (int i = 0; i < count; i++) {
        const size_t at = (size_t)i * image_size(c);
        const double t = (double)number[1][i], steps = t * c->timesteps;
        const int label = classes ? classes[i] : 0;
        char text[32];
        (*examples)[i] = (Example){pixels + at, t, number[2] + at, number[3] + at, label};
        number_text(t, 1, text);
        if (classes && label >= c->classes)
            return fail(error, "%s: labels[%d] is %d, expected a class from 0 to %d", path, i, label,
                        c->classes - 1);
        if (!(t >= 0 && t <= 1))
            return fail(error, "%s: t[%d] is %s, expected a time from 0 to 1", path, i, text);
        if (c->timesteps && (fabs(steps - floor(steps + 0.5)) > 1e-6 * c->timesteps || steps < 0.5))
            return fail(error, "%s: t[%d] is %s, expected a multiple of 1/%d above 0", path, i, text,
                        c->timesteps);
    }
    return (int)count;
}

/* Loss terms [B] by name, their mean in bits per dimension, and the gradient of each parameter. */
static int gradient_write(Job *job, double (*terms)[3], int batch, const real *gradient) {
    static const char *const LOSS_NAMES[4] = {"loss.recon", "loss.latent", "loss.diffusion", "bpd"};
    const Model *m = &job->model;
    const int count = m->parameter_count + 4;
    TensorEntry *out = arena_allocate(job->arena, (size_t)count, sizeof *out);
    char(*names)[NAME_SIZE] = arena_allocate(job->arena, (size_t)count, sizeof *names);
    real *losses = arena_allocate(job->arena, 3 * (size_t)batch + 1, sizeof *losses);
    double bpd = 0;
    for (int i = 0; i < 3 * batch; i++) {
        losses[i % 3 * batch + i / 3] = (real)terms[i / 3][i % 3];
        bpd += terms[i / 3][i % 3] / (image_size(&m->config) * LOG_2 * batch);
    }
    losses[3 * batch] = (real)bpd;
    for (int i = 0; i < 4; i++)
        out[i] = (TensorEntry){.name = LOSS_NAMES[i], .type = TYPE_OF_REAL, .rank = 1,
                               .shape = {i < 3 ? batch : 1}, .data = losses + (size_t)i * batch};
    for (int i = 4; i < count; i++)
        out[i] = tensor_out("grad", &m->parameter[i - 4], gradient, names[i]);
    return tensors_write(job->out, &(TensorFile){.tensors = out, .tensor_count = count}, &job->error);
}

static int grad_take(Job *job, const TensorFile *f, const char *path) {
    Example *examples = NULL;
    const int count = batch_read(job, f, path, &examples);
    if (count < 0)
        return -1;
    double(*terms)[3] = arena_allocate(job->arena, (size_t)count, sizeof *terms);
    const real *gradient = batch_gradient(&job->workers, examples, count, terms);
    int finite = stopped() || isfinite(dot(gradient, gradient, job->model.weight_count)); /* or it is NULL */
    for (int i = 0; i < 3 * count && finite && !stop_signal; i++)
        finite = isfinite(terms[i / 3][i % 3]);
    const int status = result_check(job, job->checkpoint, finite);
    return status ? status : gradient_write(job, terms, count, gradient);
}

static int grad(Job *job) {
    return outputs_check(job, job->batch) ? -1 : file_take(job, job->batch, grad_take);
}

/* ---- diffenc info ---- */

static int info(Job *job) {
    const Model *m = &job->model;
    char text[TEXT_SIZE];
    printf("%s: %zu weights\n", printable(job->checkpoint, text, sizeof text), m->weight_count);
    for (int i = 0, first = 0; i < m->parameter_count; i++) { /* parts are what names begin with */
        const Parameter *p = &m->parameter[i], *next = p + 1;
        const int length = (int)strcspn(p->name, ".");
        if (i + 1 < m->parameter_count && strncmp(p->name, next->name, (size_t)length + 1) == 0)
            continue;
        printf("  %-18.*s %zu\n", length, p->name, p->offset + p->count - m->parameter[first].offset);
        first = i + 1;
    }
    for (const Option *o = OPTIONS; o < OPTIONS + OPTION_COUNT; o++) {
        option_text(o, job, text);
        if (o->takers & RECORD && *text)
            printf("  %-18s %s\n", o->name, text);
    }
    return 0;
}

/* ---- commands ---- */

static const Command COMMANDS[] = {
    {"train", TRAIN, LOAD_ALL, train, NULL, "[options]", "train a model"},
    {"sample", SAMPLE, LOAD_EMA, sample, NULL, "CHECKPOINT --out FILE [options]",
     "draw images from a checkpoint"},
    {"eval", EVAL, LOAD_EMA, eval, NULL, "CHECKPOINT... [options]",
     "the variational bound on a data set, by term; checkpoints compared"},
    {"show", SHOW, LOAD_EMA, show, NULL, "CHECKPOINT --out FILE [options]",
     "the encoder at work: x_t, y and their change over t"},
    {"grad", GRAD, LOAD_PARAMS, grad, NULL, "CHECKPOINT --batch FILE --out FILE [options]",
     "loss terms and gradients of a given batch, from file to file"},
    {"info", INFO, LOAD_PARAMS, info, NULL, "CHECKPOINT",
     "what a checkpoint is: weights by part, settings, step"},
    {"check", 0, 0, NULL, check_main, "", "prove every gradient and every identity of the method"},
    {"bench", 0, 0, NULL, bench_main, "", "speed: kernels against the machine's peak, a training step"},
};
enum { COMMAND_COUNT = sizeof COMMANDS / sizeof COMMANDS[0] };

/* Run a command, say what went wrong, free everything. Returns the exit status. */
static int run(const Command *command, char **arguments) {
    Job *job = job_new(command, arguments);
    ranks_begin();
    int status = parse_options(job);
    if (status < 0)
        status = USAGE;
    if (status == OK && job->checkpoint) { /* all but train begin with one */
        status = outputs_check(job, job->checkpoint) ? -1 : file_take(job, job->checkpoint, checkpoint_take);
        if (status == OK)
            workers_start(job);
    }
    if (status == OK)
        status = command->run(job);
    end_line(job);
    ranks_end(status == OK || status == DONE ? NULL : job->error.text);
    workers_free(&job->workers);
    model_free(&job->model);
    dataset_close(&job->data);
    arena_free(job->arena);
    if (job->log)
        fclose(job->log);
    free(job);
    return status == DONE ? OK : status >= 0 ? status : stop_signal ? 128 + stop_signal : FAILURE;
}

int main(int argc, char **argv) {
    char *asked[4] = {argv[0], argc > 2 ? argv[2] : NULL, "--help", NULL};
    if (argc > 2 && strcmp(argv[1], "help") == 0)
        argc = 3, argv = asked; /* diffenc help COMMAND */
    if (argc > 2 && asks_help(argv[2]))
        argv[2] = asked[2]; /* check and bench know no -h */
    const char *name = argc > 1 ? argv[1] : "";
    const Command *command = COMMANDS;
    int descriptor, status;
    while ((descriptor = open("/dev/null", O_RDWR)) >= 0 && descriptor <= STDERR_FILENO)
        ; /* where one of the three is closed, the next file opened would take the place of the terminal */
    close(descriptor);
    setvbuf(stdout, NULL, _IOLBF, 0); /* whoever reads a result through a pipe has each line at once */
    signal(SIGXFSZ, SIG_IGN);         /* a write beyond the limit on file sizes then fails, and is reported */
    while (command < COMMANDS + COMMAND_COUNT && strcmp(name, command->name) != 0)
        command++;
    if (command < COMMANDS + COMMAND_COUNT) {
        status = command->run ? run(command, argv + 2) : command->run_elsewhere(argc - 1, argv + 1);
    } else if (strcmp(name, "--version") == 0) {
        printf("%s\n", VERSION);
        status = OK;
    } else if (argc < 2 || asks_help(name) || strcmp(name, "help") == 0) {
        FILE *to = argc < 2 ? stderr : stdout;
        fprintf(to, "DiffEnc: variational diffusion with a learned encoder\n\n"
                    "usage: diffenc COMMAND [options]\n\n");
        for (command = COMMANDS; command < COMMANDS + COMMAND_COUNT; command++)
            fprintf(to, "  %-8s %s\n", command->name, command->help);
        fprintf(to, "\ndiffenc help COMMAND names every option with its default.\n");
        status = argc < 2 ? USAGE : OK;
    } else {
        Error error;
        fail(&error, "unknown command '%.60s' (see diffenc --help)", name);
        say(&error);
        status = USAGE;
    }
    if (ferror(stdout))
        putchar('\n'); /* what failed before fails again, and tells why */
    if ((fflush(stdout) || ferror(stdout)) && status == OK) {
        fprintf(stderr, "diffenc: standard output: %s\n", strerror(errno));
        status = FAILURE;
    }
    return status;
}
