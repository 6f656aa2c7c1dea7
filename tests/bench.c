/* bench.c - the command `diffenc bench`: how fast the loops, a training step and the sampler are, held
 * against what the machine can do.
 *
 * Each measurement runs in a child process of its own, so that a peak of memory belongs to one model and
 * nothing is left in heap or caches for the next; what it allocates goes with it. The parent never starts
 * threads, because OpenMP's do not survive a fork. Figures are medians of several runs, beside them the
 * slowest and the fastest. The machine's peak is measured between the runs, so that a share of it stays right
 * while other programs come and go.
 *
 * Operations are floating-point additions and multiplications; a fused multiply-add is two. Products with the
 * zeros around an image count, as everybody counts convolutions and as the machine computes them: at 28x28
 * they are 4.7% of a 3x3 convolution, at 7x7 18%. A convolution counts as its plain sums also where minimal
 * filtering needs a quarter of the multiplications: so a share of the peak can exceed 100%. */

#define _POSIX_C_SOURCE 200809L
#define _DARWIN_C_SOURCE   /* macOS shows ru_maxrss only then */

#include "diffenc.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#ifdef _OPENMP
#include <omp.h>
#endif

enum { OK = 0, FAILURE = 1, USAGE = 2, MAX_THREADS = 256, MAX_RUNS = 1000 };

/* ---- measuring ---- */

typedef struct {
    double median, least, most;   /* seconds */
    double peak;                  /* the machine's operations per second meanwhile, with these threads */
} Timing;

static int ascending(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static Timing timing_of(double *seconds, double *peaks, int count) {   /* and sorts them */
    const int low = (count - 1) / 2, high = count / 2;
    qsort(seconds, (size_t)count, sizeof *seconds, ascending);
    qsort(peaks, (size_t)count, sizeof *peaks, ascending);
    return (Timing){(seconds[low] + seconds[high]) / 2, seconds[0], seconds[count - 1],
                    (peaks[low] + peaks[high]) / 2};
}

/* Work of one thread, on memory of its own that it finds by its number. */
typedef void (*ThreadWork)(void *context, int thread);

/* Seconds of one call while all threads work at once; the last one to finish counts. */
static double seconds_of(int threads, long repeat, ThreadWork work, void *context) {
    const double start = seconds_now();
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++)
        for (long i = 0; i < repeat; i++)
            work(context, thread);
    return (seconds_now() - start) / (double)repeat;
}

/* NUMBERS independent chains of multiply-adds. A FEW links of one at a time, so that loading and storing it
 * does not count, yet so few that a processor has enough chains in work at once to hide the latency. */
enum { NUMBERS = 256, FEW = 4, PASSES = 2000000 };
static const double CHAIN_OPERATIONS = 2.0 * FEW * NUMBERS * PASSES;

static void multiply_add_chains(void *context, int thread) {
    const real *factor_and_term = context;   /* not known to the compiler */
    const real factor = factor_and_term[0], term = factor_and_term[1];
    real x[NUMBERS] = {0};
    for (int pass = 0; pass < PASSES; pass++)
        for (int i = 0; i < NUMBERS; i++) {
            real xi = x[i];
            for (int link = 0; link < FEW; link++)
                xi = xi * factor + term;
            x[i] = xi;
        }
    ((real *)context)[2 + thread] = x[thread];   /* so that the loop cannot be left out */
}

/* The machine's operations per second, measured for some tens of milliseconds. */
static double peak_now(int threads) {
    real cell[2 + MAX_THREADS] = {(real)0.5, 1};
    return CHAIN_OPERATIONS * threads / seconds_of(threads, 1, multiply_add_chains, cell);
}

/* A run is as many calls as take 50 ms; finding the number also warms up. Twice, lest an interruption be
 * taken for the work. */
static Timing time_work(int runs, int threads, ThreadWork work, void *context) {
    double seconds[MAX_RUNS], peaks[MAX_RUNS];
    long repeat = 1;
    while (seconds_of(threads, repeat, work, context) * (double)repeat < 0.05 ||
           seconds_of(threads, repeat, work, context) * (double)repeat < 0.05)
        repeat *= 2;
    for (int i = 0; i < runs; i++) {
        peaks[i] = peak_now(threads);
        seconds[i] = seconds_of(threads, repeat, work, context);
    }
    return timing_of(seconds, peaks, runs);
}

static double peak_bytes(void) {   /* the most memory this process ever had, as the system counts it */
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    return (double)usage.ru_maxrss;
#else
    return 1024.0 * (double)usage.ru_maxrss;
#endif
}

/* What is to be measured, and what came out. */
typedef struct {
    Config config;
    int threads, runs, batch;
    int count, timesteps, sampling;   /* images, steps T; sampling instead of training */
    double bandwidth;                 /* of the memory, bytes per second, with these threads */
} Job;

typedef struct {
    Timing seconds;
    double bandwidth, bytes;
    double optimizer;                /* seconds of its step; the rest is of a training step of one thread: */
    OperatorTime times[MOST_OPERATORS];
    double operations[MOST_OPERATORS][2];    /* forward and backward */
} Result;

typedef void (*Measurement)(const Job *job, Result *result);

static void in_child(Measurement measurement, const Job *job, Result *result) {
    int channel[2], status = -1;
    fflush(stdout);
    const pid_t child = pipe(channel) ? -1 : fork();
    if (child == 0) {
        Result made = {0};
        measurement(job, &made);
        fflush(stdout);
        _exit(write(channel[1], &made, sizeof made) == (ssize_t)sizeof made ? OK : FAILURE);
    }
    if (child > 0) {
        close(channel[1]);
        const ssize_t got = read(channel[0], result, sizeof *result);   /* so small that it comes whole */
        close(channel[0]);
        if (waitpid(child, &status, 0) == child && status == 0 && got == (ssize_t)sizeof *result)
            return;
    }
    fprintf(stderr, "diffenc: bench: a measuring process failed with status %d\n", status);
    exit(FAILURE);
}

static Error failure;   /* of the call that is looked at */
static void stop_on(int status) {
    if (status) {
        fprintf(stderr, "diffenc: bench: %s\n", failure.text);
        exit(FAILURE);
    }
}

/* ---- the machine ---- */

/* STREAM's triad: 128 MiB an array, more than common caches hold. Each number counts three times: b and c are
 * read, a is written. */
typedef struct {
    real *a, *b, *c;
    size_t count;   /* of one thread */
} Triad;

static void triad(void *context, int thread) {
    const Triad *t = context;
    real *restrict a = t->a + t->count * (size_t)thread;
    const real *restrict b = t->b + t->count * (size_t)thread, *restrict c = t->c + t->count * (size_t)thread;
    for (size_t i = 0; i < t->count; i++)
        a[i] = b[i] + (real)0.5 * c[i];
}

static void triad_fill(void *context, int thread) {   /* by the thread that will use it */
    const Triad *t = context;
    for (size_t i = t->count * (size_t)thread; i < t->count * (size_t)(thread + 1); i++)
        t->a[i] = t->b[i] = t->c[i] = 1;
}

static void measure_machine(const Job *job, Result *result) {
    const size_t threads = (size_t)job->threads, all = ((size_t)1 << 27) / sizeof(real) / threads * threads;
    real cell[2 + MAX_THREADS] = {(real)0.5, 1}, *memory = allocate(3 * all, sizeof(real));
    Triad arrays = {.a = memory, .b = memory + all, .c = memory + 2 * all, .count = all / threads};
    seconds_of(job->threads, 1, triad_fill, &arrays);
    const Timing chains = time_work(job->runs, job->threads, multiply_add_chains, cell),
                 t = time_work(job->runs, job->threads, triad, &arrays);
    const double flop = CHAIN_OPERATIONS * job->threads / 1e9, bytes = 3e-9 * sizeof(real) * (double)all;
    result->bandwidth = 1e9 * bytes / t.median;
    printf("multiply-add peak %7.1f GFLOP/s (%.1f..%.1f)\nmemory bandwidth  %7.1f GB/s    (%.1f..%.1f)\n",
           flop / chains.median, flop / chains.most, flop / chains.least, bytes / t.median, bytes / t.most,
           bytes / t.least);
}

/* ---- a model ---- */

/* A model with its threads, and random images for a batch. */
typedef struct { Model model; Workers workers; Optimizer optimizer; unsigned char *images; } Setup;

static void setup(Setup *s, const Job *job, int threads, int images) {
    const Config *c = &job->config;
    const size_t bytes = (size_t)images * c->height * c->width * c->image_channels;
    stop_on(model_new(&s->model, c, 1, &failure));
    workers_new(&s->workers, &s->model, threads);
    s->optimizer = optimizer_default();
    s->images = allocate(bytes, 1);
    for (size_t i = 0; i < bytes; i++)
        s->images[i] = (unsigned char)random_bits(random_stream(1, RANDOM_CHECK, 1, 0), (uint32_t)i);
}

/* ---- kernels ---- */

typedef enum {
    FORWARD, BY_INPUT, BY_KERNEL, FAST_FORWARD, FAST_BY_INPUT, FAST_BY_KERNEL, DENSE, ATTENTION, NORM,
    NORM_BACK, DROPOUT, LEVELS_256
} Loop;

/* A loop on an image [side, side, in] -> [side, side, out]. `amount` is what one value of the output takes:
 * operations, or bytes read and written where the loop is bound by memory. */
typedef struct { const char *name; Loop loop; int side, in, out; double amount; int is_bytes; } Kernel;

enum { ARRAYS = 6 };
typedef struct {
    const Kernel *kernel;
    real *array[MAX_THREADS][ARRAYS];   /* each large enough for an image or a kernel */
    Arena *arena[MAX_THREADS];
    unsigned char *pixels;              /* for the softmax over the levels: k and u, only read */
    double *levels;
} KernelWork;

/* softmax(q k^T / sqrt(c)) v and back to q, k and v, through the graph as in training. */
static void attention_both_ways(int side, int channels, real *const a[ARRAYS], Arena *arena) {
    Graph graph = {0};
    graph_begin(&graph, arena);
    Tensor *q = parameter(&graph, side, side, channels, a[0], NULL, a[3]);
    Tensor *k = parameter(&graph, side, side, channels, a[1], NULL, a[4]);
    Tensor *v = parameter(&graph, side, side, channels, a[2], NULL, a[5]);
    backward(sum(attend(q, k, v)), 1);
}

static void run_kernel(void *context, int thread) {
    const KernelWork *work = context;
    const Kernel *k = work->kernel;
    const int side = k->side, in = k->in, out = k->out, positions = side * side;
    real *const *a = work->array[thread];
    real *x = a[0], *y = a[1], *dx = a[2], *kernel = a[3], *dkernel = a[4], *bias = a[5];
    Arena *arena = work->arena[thread];
    const size_t values = (size_t)positions * out;
    double by_precision;
    const GroupNorm norm = {.positions = positions, .channels = out, .groups = group_count(out), .swish = 1,
                            .scale = kernel, .bias = kernel + out, .mean = bias, .rstd = bias + out};
    switch (k->loop) {
    case FORWARD: convolve3x3(side, side, in, out, x, kernel, bias, NULL, y, arena); break;
    case BY_INPUT: convolve3x3(side, side, out, in, y, kernel, NULL, NULL, dx, arena); break;
    case BY_KERNEL: convolve3x3_by_kernel(side, side, in, out, x, y, dkernel, arena); break;
    case FAST_FORWARD: convolve3x3_fast(side, side, in, out, x, kernel, bias, NULL, y, arena); break;
    case FAST_BY_INPUT: convolve3x3_fast(side, side, out, in, y, kernel, NULL, NULL, dx, arena); break;
    case FAST_BY_KERNEL: convolve3x3_by_kernel_fast(side, side, in, out, x, y, dkernel, arena); break;
    case DENSE: matrix_product(positions, in, out, x, kernel, bias, NULL, y, arena); break;
    case ATTENTION: attention_both_ways(side, in, a, arena); break;
    case NORM: group_norm(&norm, x, y, arena); break;
    case NORM_BACK: group_norm_backward(&norm, x, y, dx, dkernel, dkernel + out, arena); break;
    case DROPOUT: random_dropout(random_stream(1, RANDOM_CHECK, 0, 0), 0, values, 0.1, y); break;
    case LEVELS_256: level_softmax(values, work->levels, work->pixels, 600000, dx, &by_precision); break;
    }
}

static void print_rate(const char *name, double amount, int is_bytes, Timing t, const Job *job) {
    printf("%-30s %8.1f %-7s (%.1f..%.1f) %4.0f%% %10.1f us\n", name, amount / t.median / 1e9,
           is_bytes ? "GB/s" : "GFLOP/s", amount / t.most / 1e9, amount / t.least / 1e9,
           100 * amount / t.median / (is_bytes ? job->bandwidth : t.peak), 1e6 * t.median);
}

static void bench_kernel(const Job *job, const Kernel *k) {
    const size_t image = (size_t)k->side * k->side * (k->in > k->out ? k->in : k->out);
    const size_t taps = 9 * (size_t)k->in * k->out, count = image > taps ? image : taps;
    KernelWork *work = allocate_zeroed(1, sizeof *work);
    char name[64];
    work->kernel = k;
    work->pixels = allocate_zeroed(count, 1);
    work->levels = allocate_zeroed(count, sizeof(double));
    for (int i = 0; i < job->threads; i++) {
        work->arena[i] = arena_new();
        for (int j = 0; j < ARRAYS; j++) {
            work->array[i][j] = allocate(count, sizeof(real));
            random_normal(random_stream(1, RANDOM_CHECK, 0, (uint32_t)j), work->array[i][j], count);
        }
    }
    const Timing t = time_work(job->runs, job->threads, run_kernel, work);
    snprintf(name, sizeof name, "%-16s %dx%d %d->%d", k->name, k->side, k->side, k->in, k->out);
    print_rate(name, k->amount * k->side * k->side * k->out * job->threads, k->is_bytes, t, job);
}

static void run_optimizer(void *context, int thread) {   /* it shares its work among the threads itself */
    Setup *s = context;
    (void)thread;
    optimizer_step(&s->workers, &s->optimizer, s->model.ema);   /* any gradient */
}

/* Of each weight the gradient is read twice, first for its norm; w, m, v and the average are also written. */
static void bench_optimizer(const Job *job) {
    Setup s;
    char name[64];
    setup(&s, job, job->threads, 1);
    const Timing t = time_work(job->runs, 1, run_optimizer, &s);
    snprintf(name, sizeof name, "%-16s %zu weights", "AdamW + EMA", s.model.weight_count);
    print_rate(name, 10.0 * sizeof(real) * (double)s.model.weight_count, 1, t, job);
}

static void bench_kernels(const Job *job, Result *unused) {
    static const int SIZES[][2] = {{28, 16}, {28, 32}, {28, 64}, {14, 64}, {7, 128}, {32, 128}};
    static const Kernel OTHERS[] = {
        {"1x1", DENSE, 28, 64, 32, 2 * 64, 0},
        {"attention, both", ATTENTION, 28, 32, 32, 6 * 2 * 784, 0},          /* 2 products forward, 4 back */
        {"norm, swish", NORM, 28, 32, 32, 2 * sizeof(real), 1},              /* x, y */
        {"norm, swish back", NORM_BACK, 28, 32, 32, 4 * sizeof(real), 1},    /* x, dy, dx twice */
        {"dropout mask", DROPOUT, 28, 32, 32, sizeof(real), 1},
        /* For each of 256 levels 31: 4 up to the exponent, 22 in its exponential, 5 in the three sums. */
        {"256-way softmax", LEVELS_256, 28, 1, 1, 256 * 31, 0},
    };
    (void)unused;
    printf("\neach kernel, all threads at once: median, (slowest..fastest run), share of the peak, one call\n"
           "(in a cache, GB/s can go beyond the memory's; `3x3` are the plain sums, `fast` is what training\n"
           "runs: minimal filtering with a quarter of the multiplications, counted here as the plain sums\n"
           "it stands for and so beyond the peak)\n");
    for (size_t i = 0; i < sizeof SIZES / sizeof SIZES[0]; i++) {
        static const char *const NAMES[] = {"3x3 forward",  "3x3 by input",  "3x3 by kernel",
                                            "fast forward", "fast by input", "fast by kernel"};
        for (int j = 0, c = SIZES[i][1]; j < 6; j++) {
            const Kernel kernel = {NAMES[j], (Loop)(FORWARD + j), SIZES[i][0], c, c, 18.0 * c, 0};
            bench_kernel(job, &kernel);
        }
    }
    for (size_t i = 0; i < sizeof OTHERS / sizeof OTHERS[0]; i++)
        bench_kernel(job, &OTHERS[i]);
    bench_optimizer(job);
}

/* ---- a training step, and sampling ---- */

static void step(Setup *s, int batch) {
    StepReport report;
    stop_on(training_step(&s->model, &s->workers, &s->optimizer, s->images, NULL, batch, 1, &report,
                          &failure));
}

/* `runs` steps, or samplings, after one to warm up, and the peak of memory. */
static void measure_model(const Job *job, Result *result) {
    double seconds[MAX_RUNS], peaks[MAX_RUNS];
    Setup s;
    setup(&s, job, job->threads, job->sampling ? job->count : job->batch);
    for (int i = -1; i < job->runs; i++) {
        const double start = seconds_now();
        if (job->sampling)
            sample_images(&s.workers, NULL, job->count, i < 0 ? 1 : job->timesteps, 0, 1, 0, s.images, 0,
                          NULL);
        else
            step(&s, job->batch);
        if (i >= 0) {
            seconds[i] = seconds_now() - start;
            peaks[i] = peak_now(job->threads);
        }
    }
    result->seconds = timing_of(seconds, peaks, job->runs);
    result->bytes = peak_bytes();
}

/* Operations of the products in an operator, forward: 2 for each value of the result and each of the numbers
 * summed up for it, channels (times the taps of a convolution) or positions. Attention has two products. */
static double product_operations(const Tensor *t) {
    const char *name = t->op->name;
    const double per_channel = 2.0 * (double)element_count(t), channels = t->input[0]->channels;
    if (strcmp(name, "convolution") == 0)
        return per_channel * channels * t->input[1]->height;
    if (strcmp(name, "attention") == 0)   /* q k^T as large as P v, for as many channels */
        return 2 * per_channel * t->input[1]->height * t->input[1]->width;
    if (strcmp(name, "upsampling") == 0 || strcmp(name, "matrix product") == 0 ||
        strcmp(name, "attention weights") == 0)
        return per_channel * channels;
    return 0;
}

/* Counted on the graph itself, values and tangents alike: what was computed forward, and, going back, as much
 * again for each of the two factors that has a gradient: thrice forward, less where the input is data. */
static void count_operations(const Graph *graph, int examples, double operations[MOST_OPERATORS][2]) {
    for (const Tensor *t = graph->last; t; t = t->previous) {
        const double forward = t->op ? examples * product_operations(t) : 0;
        int i = 0;
        while (forward > 0 && graph->times[i].op != t->op)
            i++;
        operations[i][0] += forward;
        if (forward > 0)
            operations[i][1] += forward * (t->input[0]->needs_gradient + t->input[1]->needs_gradient);
    }
}

/* A training step on one thread with the clock running, after one to warm up. The graph of its last example
 * is still there to be counted; all examples have the same. */
static void measure_profile(const Job *job, Result *result) {
    Setup s;
    setup(&s, job, 1, job->batch);
    Graph *graph = &s.workers.network[0].graph;
    graph->times = result->times;
    for (int i = 0; i < 2; i++) {
        memset(result, 0, sizeof *result);
        const double start = seconds_now();
        step(&s, job->batch);
        const double stepped = seconds_now();
        run_optimizer(&s, 0);
        result->seconds.median = stepped - start;
        result->optimizer = seconds_now() - stepped;
    }
    count_operations(graph, job->batch, result->operations);
}

/* Operators by falling time. */
static void print_profile(const Result *r, int batch) {
    const double all = r->seconds.median, to_ms = 1e3 / batch;
    double outside = all - r->optimizer, seconds[MOST_OPERATORS];
    printf("  where the time goes, one thread, ms per example (GFLOP/s of products):\n");
    for (int i = 0; i < MOST_OPERATORS; i++)
        outside -= seconds[i] = r->times[i].seconds[0] + r->times[i].seconds[1];
    for (int top = 0;; top = 0) {
        for (int i = 1; i < MOST_OPERATORS; i++)
            top = seconds[i] > seconds[top] ? i : top;
        if (seconds[top] <= 0)
            break;
        printf("    %-22s %5.1f%%", r->times[top].op->name, 100 * seconds[top] / all);
        seconds[top] = 0;
        for (int back = 0; back < 2; back++) {
            const double part = r->times[top].seconds[back], operations = r->operations[top][back];
            char rate[32] = "";
            if (operations > 0)
                snprintf(rate, sizeof rate, "(%5.1f)", operations / part / 1e9);
            printf("   %s %7.3f %-7s", back ? "backward" : "forward", to_ms * part, rate);
        }
        printf("\n");
    }
    printf("    %-22s %5.1f%%   %15.3f\n", "noise, graph, slots", 100 * outside / all, to_ms * outside);
    printf("    %-22s %5.1f%%   %15.3f\n", "AdamW, EMA", 100 * r->optimizer / all, to_ms * r->optimizer);
}

static void bench_step(const Job *job, const char *model, double *first_median) {
    Job single = *job;
    Result of_step, of_single, profile;
    single.threads = 1, single.runs = (job->runs + 1) / 2;
    in_child(measure_model, job, &of_step);
    in_child(measure_model, &single, &of_single);
    in_child(measure_profile, job, &profile);
    const Timing t = of_step.seconds;
    double operations = 0;
    for (int j = 0; j < MOST_OPERATORS; j++)
        operations += profile.operations[j][0] + profile.operations[j][1];
    *first_median = *first_median > 0 ? *first_median : t.median;
    printf("\n%s, %s of %d channels, a training step of %d examples: %.4f s (%.4f..%.4f), %.1f images/s\n",
           model, job->config.net == NET_UNET ? "U-Net" : "flat", job->config.channels, job->batch, t.median,
           t.least, t.most, job->batch / t.median);
    printf("  arithmetic   %.1f GFLOP in plain sums, %.1f GFLOP/s, %.0f%% of the peak\n", operations / 1e9,
           operations / t.median / 1e9, 100 * operations / t.median / t.peak);
    if (job->threads > 1)
        printf("  %d threads    %.2f times as fast as one (%.3f s)\n", job->threads,
               of_single.seconds.median / t.median, of_single.seconds.median);
    printf("  takes        %.2f times as long as vdm-4, %.1f MB of memory\n", t.median / *first_median,
           of_step.bytes / 1e6);
    print_profile(&profile, job->batch);
}

/* Each model with the net that was asked for, and with the U-Net and the batch that are recommended. */
static void bench_steps(const Job *all) {
    static const char *const MODELS[] = {"vdm-4", "diffenc-4-nt", "diffenc-4-2"};
    double first_median[2] = {0, 0};
    for (int i = 0; i < 3; i++) {
        Job job = *all;
        stop_on(config_parse_model(&job.config, MODELS[i], &failure));
        bench_step(&job, MODELS[i], &first_median[0]);
        job.batch = 16;
        job.config.net = NET_UNET, job.config.channels = 32, job.config.encoder_channels = 8;
        job.config.fourier_first = 0, job.config.dropout = 0;
        bench_step(&job, MODELS[i], &first_median[1]);
    }
}

static void bench_sampling(const Job *all) {
    printf("\nsampling with vdm-4, %d steps each\n", all->timesteps);
    for (int i = 0; i < 4; i++) {
        Job job = *all;
        Result r;
        job.config.net = i / 2 ? NET_UNET : NET_FLAT;
        job.count = i % 2 ? 1 : all->count;
        job.sampling = 1;
        stop_on(config_parse_model(&job.config, "vdm-4", &failure));
        in_child(measure_model, &job, &r);
        printf("  %s, %5d at once %8.2f images/s (%.2f..%.2f), %.2f ms a step and image, %.1f MB\n",
               i / 2 ? "unet" : "flat", job.count, job.count / r.seconds.median, job.count / r.seconds.most,
               job.count / r.seconds.least, 1e3 * r.seconds.median / job.count / job.timesteps,
               r.bytes / 1e6);
    }
}

/* ---- the command ---- */

#if defined __clang__
static const char COMPILER[] = __VERSION__;
#elif defined __GNUC__
static const char COMPILER[] = "gcc " __VERSION__;
#else
static const char COMPILER[] = "an unnamed compiler";
#endif

static int wrong_usage(const Error *error) {
    fprintf(stderr, "diffenc: bench: %s\n", error->text);
    return USAGE;
}

/* One line to be read by a program: tests/bench_peer.sh holds it against PyTorch's. */
static int print_line(const char *model, Job *job) {
    Result r;
    Error error;
    if (config_parse_model(&job->config, model, &error) || config_check(&job->config, &error))
        return wrong_usage(&error);
    in_child(measure_model, job, &r);
    printf("diffenc %s %s seconds=%.5f min=%.5f max=%.5f peak_bytes=%.0f threads=%d net=%s", model,
           job->sampling ? "sampling" : "step", r.seconds.median, r.seconds.least, r.seconds.most, r.bytes,
           job->threads, job->config.net == NET_FLAT ? "flat" : "unet");
    if (job->sampling)
        printf(" count=%d steps=%d", job->count, job->timesteps);
    else
        printf(" batch=%d", job->batch);
    printf(" compiler=%s\n", COMPILER);
    return OK;
}

typedef struct {
    const char *name, *argument, *help;
    int *number, most;                  /* a number from 1 to `most`, or */
    const char **text, *choices;        /* a text; "a|b|c", if it is one of these */
} Option;

static int is_choice(const char *choices, const char *text) {
    const char *found = strstr(choices, text), *end = found ? found + strlen(text) : NULL;
    return *text && found && (found == choices || found[-1] == '|') && (!*end || *end == '|');
}

static void print_help(const Option *options, int count) {
    printf("usage: diffenc bench [options]\n\n");
    for (const Option *o = options; o < options + count; o++) {
        printf("  %-10s %-6s %s", o->name, o->argument, o->help);
        if (o->number)
            printf(" (default %d)", *o->number);
        printf("\n");
    }
}

/* 0 to go on, 1 after --help, or -1 with error. */
static int parse(int argc, char **argv, const Option *options, int count, Error *error) {
    for (int i = 1; i < argc; i++) {
        const size_t length = strcspn(argv[i], "=");
        const Option *o = options;
        while (o < options + count && (strlen(o->name) != length || strncmp(o->name, argv[i], length) != 0))
            o++;
        if (strcmp(argv[i], "--help") == 0) {
            print_help(options, count);
            return 1;
        }
        if (o == options + count)
            return fail(error, "unknown option or argument '%.60s' (see diffenc bench --help)", argv[i]);
        const char *value = argv[i][length] ? argv[i] + length + 1 : argv[++i];   /* argv ends with NULL */
        char *end = NULL;
        if (!value)
            return fail(error, "%s needs a value", o->name);
        const long number = strtol(value, &end, 10);
        if (o->number && (end == value || *end || number < 1 || number > o->most))
            return fail(error, "%s '%.40s': expected a whole number from 1 to %d", o->name, value, o->most);
        if (o->choices && !is_choice(o->choices, value))
            return fail(error, "%s '%.40s': expected %s", o->name, value, o->choices);
        if (o->number)
            *o->number = (int)number;
        else
            *o->text = value;
    }
    return 0;
}

int bench_main(int argc, char **argv) {
    int most_threads = 1;
    const char *only = NULL, *step = NULL, *sampling = NULL, *net = "flat";
    Job job = {.config = config_default(), .threads = 1, .runs = 5, .batch = 64, .count = 16,
               .timesteps = 20};
#ifdef _OPENMP
    most_threads = MAX_THREADS;
    job.threads = omp_get_max_threads() < MAX_THREADS ? omp_get_max_threads() : MAX_THREADS;
#endif
    const Option options[] = {
        {"--threads", "N", "threads that work at once", &job.threads, most_threads, NULL, NULL},
        {"--runs", "N", "figures are medians of so many runs", &job.runs, MAX_RUNS, NULL, NULL},
        {"--only", "PART", "peak, kernels, step or sampling", NULL, 0, &only, "peak|kernels|step|sampling"},
        {"--net", "NET", "the score network of a step, unet or else flat", NULL, 0, &net, "flat|unet"},
        {"--batch", "N", "examples of a step", &job.batch, 65536, NULL, NULL},
        {"--count", "N", "images to sample", &job.count, 65536, NULL, NULL},
        {"--steps", "T", "steps of the sampler", &job.timesteps, 1000000, NULL, NULL},
        {"--step", "MODEL", "just a training step of this model, in one line", NULL, 0, &step, NULL},
        {"--sampling", "MODEL", "just sampling from this model, in one line", NULL, 0, &sampling, NULL},
    };
    Error error;
    int status = parse(argc, argv, options, sizeof options / sizeof options[0], &error);
    if (status == 0 && step && sampling)
        status = fail(&error, "--step and --sampling: one at a time");
    if (status)
        return status < 0 ? wrong_usage(&error) : OK;
    job.config.net = strcmp(net, "unet") ? NET_FLAT : NET_UNET;
    job.sampling = sampling != NULL;
    if (step || sampling)
        return print_line(step ? step : sampling, &job);
    Result machine;
    printf("%d threads, numbers of %d bytes, %s\n", job.threads, (int)sizeof(real), COMPILER);
    in_child(measure_machine, &job, &machine);
    job.bandwidth = machine.bandwidth;
    if (!only || strcmp(only, "kernels") == 0)
        in_child(bench_kernels, &job, &machine);
    if (!only || strcmp(only, "step") == 0)
        bench_steps(&job);
    if (!only || strcmp(only, "sampling") == 0)
        bench_sampling(&job);
    return OK;
}
