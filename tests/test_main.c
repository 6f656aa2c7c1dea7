/* test_main.c - the program from outside: commands run through the shell, files looked at afterwards.
 *
 * The program under test is named by the environment variable DIFFENC (default ./diffenc); it must be of the
 * same precision as this test. Run from the top of the source tree, where tests/golden is. Commands are
 * written as one would type them: $D is the program, $W a directory that is made for this run and removed at
 * its end, $TINY the options of a model and data whose training step takes milliseconds. They and the test
 * itself run in $W, where `tests` leads to the tests of the source tree, $TOP. */

#define _POSIX_C_SOURCE 200809L
#define _XOPEN_SOURCE 700

#include "test.h"

#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { TEXT = 1 << 14, PATH = 4096 };

/* ---- running commands ---- */

/* A command and what it left: its exit status as the shell would say it, whether that came of a signal, and
 * the beginning of its output. */
typedef struct { char command[TEXT]; int status, by_signal; char out[TEXT], error[TEXT]; } Outcome;

static void read_text(const char *name, char text[TEXT]) {
    FILE *stream = fopen(name, "rb");
    text[stream ? fread(text, 1, TEXT - 1, stream) : 0] = 0;
    if (stream)
        fclose(stream);
}

/* Begin a shell command with its output in NAME.out and NAME.error. The shell becomes the program where the
 * command says exec, so that a signal reaches it. Nothing here may take ten minutes: an alarm ends what
 * hangs. */
static pid_t begin(const char *name, const char *command) {
    char line[TEXT + 128];
    snprintf(line, sizeof line, "%s.out", name);
    unlink(line);   /* whoever waits for output waits for this command's */
    snprintf(line, sizeof line, "exec >%s.out 2>%s.error </dev/null\n%s", name, name, command);
    fflush(stdout);
    const pid_t child = fork();
    if (child < 0) {   /* and -1 must never reach kill(), which would take it for everybody */
        perror("fork");
        exit(1);
    }
    if (child == 0) {
        alarm(600);
        execl("/bin/sh", "sh", "-c", line, (char *)NULL);
        _exit(127);
    }
    return child;
}

/* Wait for the end of a command; what it was is left to the caller. */
static void end(pid_t child, const char *name, Outcome *o) {
    char file[64];
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR)
        ;
    o->by_signal = WIFSIGNALED(status);
    o->status = o->by_signal ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    snprintf(file, sizeof file, "%s.out", name);
    read_text(file, o->out);
    snprintf(file, sizeof file, "%s.error", name);
    read_text(file, o->error);
}

static Outcome run(const char *format, ...) {
    Outcome o;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(o.command, sizeof o.command, format, arguments);
    va_end(arguments);
    end(begin("last", o.command), "last", &o);
    return o;
}

/* Every error is one line that begins with the program's name; a training may tell its progress before. */
static int is_one_line(const char *error) {
    int lines = 0;
    for (const char *line = error; *line;) {
        const size_t length = strcspn(line, "\n");
        if (strncmp(line, "diffenc: ", 9) == 0 && line[length] == '\n')
            lines++;
        else if (strncmp(line, "step ", 5) != 0)
            return 0;
        line += length + (line[length] == '\n');
    }
    return lines == 1;
}

/* Commands with the arguments of run(): one that must succeed; one that must succeed and say `part`; and one
 * that must be refused with `status` and a line that holds `part`. Macros, as C passes no `...` on. */
#define succeed(...) expect(0, "", run(__VA_ARGS__))
#define say(part, ...) expect(0, part, run(__VA_ARGS__))
#define refuse(status, part, ...) expect(status, part, run(__VA_ARGS__))

static Outcome expect(int status, const char *part, Outcome o) {
    CHECK(o.status == status && (strstr(o.error, part) || (status == 0 && strstr(o.out, part))),
          "%s: exits with %d, expected %d and '%s': %s%s", o.command, o.status, status, part, o.out, o.error);
    if (status > 0)
        CHECK(is_one_line(o.error), "%s: not one line: '%s'", o.command, o.error);
    return o;
}

/* How many files a pattern of the shell matches. */
static int file_count(const char *pattern) {
    glob_t found;
    const int count = glob(pattern, 0, NULL, &found) == 0 ? (int)found.gl_pathc : 0;
    globfree(&found);
    return count;
}

static int same_files(const char *a, const char *b) { return run("cmp %s %s", a, b).status == 0; }

/* What a message must say, and the command that must be refused with it before anything is written. Every
 * output is called out..., and none of these may be there afterwards. */
typedef struct { const char *part, *command; } Refusal;

static void refuse_all(int status, const Refusal *list, size_t size) {
    for (size_t i = 0; i < size / sizeof *list; i++) {
        refuse(status, list[i].part, "%s", list[i].command);
        CHECK(file_count("out*") == 0, "%s: leaves an output", list[i].command);
        succeed("rm -rf out*");
    }
}

static void pause_for(double seconds) { poll(NULL, 0, (int)(1000 * seconds)); }

/* ---- files for the tests ---- */

/* The first `size` bytes of a file that has no fewer, or zeros after a failed check; free() the result. */
static unsigned char *bytes_of(const char *name, size_t size) {
    unsigned char *bytes = allocate_zeroed(1, size);
    FILE *stream = fopen(name, "rb");
    const size_t found = stream ? fread(bytes, 1, size, stream) : 0;
    if (stream)
        fclose(stream);
    CHECK(found == size, "%s has %zu bytes, expected %zu", name, found, size);
    return bytes;
}

/* The numbers of a tensor; free() the result. Only failures are counted. */
static real *values_of(const TensorEntry *entry, const char *path) {
    Error error;
    real *values = allocate_zeroed(entry->count, sizeof *values);
    if (tensors_copy(entry, path, entry->rank, entry->shape, values, &error))
        CHECK(0, "%s", error.text);
    return values;
}

/* A file as tensors, or an empty list after a failed check. */
static TensorFile read_tensors(const char *name) {
    TensorFile file;
    Error error;
    if (tensors_read(name, &file, &error)) {
        CHECK(0, "%s", error.text);
        memset(&file, 0, sizeof file);
    }
    return file;
}

/* Can a checkpoint be read, and is every number of it finite? Only failures are counted: the caller checks
 * the rest. */
static int is_whole(const char *name) {
    const int failed = test_failed;
    TensorFile file = read_tensors(name);
    for (int i = 0; i < file.tensor_count; i++)
        free(values_of(&file.tensors[i], name));
    const int whole = file.tensor_count > 0 && test_failed == failed;
    tensors_free(&file);
    return whole;
}

/* A text of a checkpoint's metadata, "" if it is missing. */
static void metadata_of(const char *name, const char *key, char text[64]) {
    TensorFile file = read_tensors(name);
    const char *found = tensors_metadata(&file, key);
    snprintf(text, 64, "%s", found ? found : "");
    tensors_free(&file);
}

static long step_of(const char *name) {
    char text[64];
    metadata_of(name, "step", text);
    return strtol(text, NULL, 10);
}

/* Write a file that was read, changed in place, and free it. */
static void write_tensors(const char *name, TensorFile *file) {
    Error error;
    CHECK(tensors_write(name, file, &error) == 0, "%s", error.text);
    tensors_free(file);
}

/* Copy FROM to TO with one text of the metadata changed, and the tensor called `drop` (or NULL) left out. */
static void rewrite(const char *from, const char *to, const char *key, const char *value, const char *drop) {
    TensorFile file = read_tensors(from);
    const int count = file.tensor_count;
    file.tensor_count = 0;
    for (int i = 0; i < count; i++)
        if (!drop || strcmp(file.tensors[i].name, drop) != 0)
            file.tensors[file.tensor_count++] = file.tensors[i];
    for (int i = 0; i < 2 * file.metadata_count; i += 2)
        if (strcmp(file.metadata[i], key) == 0)
            file.metadata[i + 1] = value;
    write_tensors(to, &file);
}

/* Copy FROM to TO with the first value of a tensor overwritten by a NaN. */
static void poison(const char *from, const char *to, const char *tensor) {
    TensorFile file = read_tensors(from);
    const TensorEntry *entry = tensors_find(&file, tensor);
    CHECK(entry != NULL, "%s holds no %s", from, tensor);
    if (entry)
        memset((void *)entry->data, 0xff, entry->size / entry->count);
    write_tensors(to, &file);
}

/* An IDX file of images: its header promises `count`, `held` bytes of pixels follow. */
static void write_idx(const char *name, uint32_t magic, uint32_t count, uint32_t height, uint32_t width,
                      size_t held) {
    const uint32_t header[4] = {magic, count, height, width};
    unsigned char *bytes = allocate_zeroed(16 + held, 1);
    for (int i = 0; i < 16; i++)
        bytes[i] = (unsigned char)(header[i / 4] >> (24 - 8 * (i % 4)));
    for (size_t i = 0; i < held; i++)
        bytes[16 + i] = (unsigned char)(i * 7);
    write_file(name, bytes, 16 + held);
    free(bytes);
}

/* `count` images of a CIFAR-10 batch: a label, then 1024 red, 1024 green and 1024 blue values. */
static void write_cifar(const char *name, int count) {
    unsigned char *bytes = allocate((size_t)count, 3073);
    for (int i = 0; i < count * 3073; i++)
        bytes[i] = (unsigned char)(i % 3073 == 0 ? i / 3073 % 10 : i % 32 * 7 + (i % 3073 - 1) / 1024 * 10);
    write_file(name, bytes, (size_t)count * 3073);
    free(bytes);
}

/* ---- golden files ---- */

static double norm_of(const TensorFile *file, const char *name) {
    const TensorEntry *entry = tensors_find(file, name);
    real *values = values_of(entry, name);
    const double norm = sqrt(dot(values, values, entry->count));
    free(values);
    return norm;
}

static double norm_in(const char *path, const char *name) {
    TensorFile file = read_tensors(path);
    const double norm = norm_of(&file, name);
    tensors_free(&file);
    return norm;
}

/* The norm that an error of the tensor called `name` is measured by: its own, with one exception. A constant
 * added to all keys shifts every logit of a row alike, which the softmax does not see: the gradient of
 * mid.attn.k.bias is zero in exact arithmetic and rounding noise in any other. Its measure is the gradient of
 * mid.attn.k.kernel. */
static double measure(const TensorFile *expected, const char *name) {
    char kernel[128];
    const char *tail = strstr(name, "mid.attn.k.bias");
    snprintf(kernel, sizeof kernel, "%.*smid.attn.k.kernel", tail ? (int)(tail - name) : 0, name);
    return norm_of(expected, tail ? kernel : name);
}

/* Relative to the norm of each tensor. In single precision the schedule and z_t are kept in double; what is
 * left is the rounding of the networks, which the Fourier features multiply by 2 pi 128 on the way back. */
static double golden_tolerance(void) { return IN_DOUBLE ? 1e-9 : 2e-4; }

static void golden_compare(const char *name, const TensorFile *got, const TensorFile *expected) {
    CHECK(got->tensor_count == expected->tensor_count, "%s: %d tensors, expected %d", name, got->tensor_count,
          expected->tensor_count);
    for (int i = 0; i < expected->tensor_count; i++) {
        const TensorEntry *e = &expected->tensors[i], *g = tensors_find(got, e->name);
        const int alike =
            g && g->rank == e->rank && memcmp(g->shape, e->shape, (size_t)e->rank * sizeof *e->shape) == 0;
        CHECK(alike, "%s: %s is missing or of another shape", name, e->name);
        if (!alike)
            continue;
        double square = 0;
        real *a = values_of(g, g->name), *b = values_of(e, e->name);
        for (size_t k = 0; k < e->count; k++)
            square += ((double)a[k] - (double)b[k]) * ((double)a[k] - (double)b[k]);
        const double difference = sqrt(square), norm = measure(expected, e->name);
        CHECK(difference <= golden_tolerance() * norm, "%s: %s differs by %.2e of its norm %.2e", name,
              e->name, difference / norm, norm);
        free(a), free(b);
    }
}

static void test_golden(void) {
    glob_t found;
    const int none = glob("tests/golden/*.checkpoint.safetensors", 0, NULL, &found);
    CHECK(none == 0, "tests/golden is empty, or this is not the top of the source tree");
    for (size_t i = 0; none == 0 && i < found.gl_pathc; i++) {
        char base[PATH], path[PATH + 64];
        snprintf(base, sizeof base, "%.*s",
                 (int)(strstr(found.gl_pathv[i], ".checkpoint") - found.gl_pathv[i]), found.gl_pathv[i]);
        succeed("$D grad %s.checkpoint.safetensors --batch %s.batch.safetensors --out golden", base, base);
        snprintf(path, sizeof path, "%s.expected.safetensors", base);
        TensorFile got = read_tensors("golden"), expected = read_tensors(path);
        golden_compare(base, &got, &expected);
        tensors_free(&expected), tensors_free(&got);
    }
    globfree(&found);
}

/* ---- help ---- */

static void test_help(void) {
    static const char *const commands[8] = {"train", "sample", "eval", "show",
                                            "grad",  "info",   "check", "bench"};
    const Outcome all = succeed("$D --help | awk 'length > 80 {exit 1} {print}'");
    succeed("$D -h >asked && $D help | cmp - asked && $D --version | grep -qx 'diffenc [0-9.]*'");
    for (int i = 0; i < 8; i++) {
        char line[64];
        snprintf(line, sizeof line, "\n  %s ", commands[i]);
        CHECK(strstr(all.out, line), "--help names %s", commands[i]);
        const Outcome o = succeed("$D %s --help", commands[i]);
        snprintf(line, sizeof line, "usage: diffenc %s ", commands[i]);
        CHECK(strstr(o.out, line) == o.out, "%s --help begins with its usage", commands[i]);
        succeed("c=%s; $D $c --help >asked && $D $c -h | cmp - asked && $D help $c | cmp - asked &&"
                " awk 'length > 80 {exit 1}' asked",
                commands[i]);
        /* Every number and choice tells its default. */
        for (const char *at = o.out; (at = strstr(at, "\n  --")) != NULL; at++) {
            const char *argument = at + 5 + strcspn(at + 5, " \n");
            const char *next = strstr(at + 1, "\n  --");
            const size_t length = next ? (size_t)(next - at - 1) : strlen(at + 1);
            const int must = strncmp(argument, " N", 2) == 0 || strncmp(argument, " T", 2) == 0;
            CHECK(!must || (memchr(at + 1, '(', length) && strstr(at, "(default ") < at + 1 + length),
                  "%s --help: no default in '%.*s'", commands[i], (int)length, at + 1);
        }
    }
}

/* ---- training ---- */

/* The same checkpoint, log (but for the seconds) and samples: all those of the undisturbed training `a`, and
 * whoever was stopped has more of them. */
static void same_trainings(const char *a, const char *b, int steps) {
    const Outcome o =
        run("cd %s && test -e samples-%d.png || exit 1\n"
            "for f in checkpoint.safetensors samples-*; do cmp $f ../%s/$f || exit 1; done\n"
            "cut -d, -f1-8 log.csv >../columns && cut -d, -f1-8 ../%s/log.csv | cmp ../columns -",
            a, steps, b, b);
    CHECK(o.status == 0, "%s and %s: %s%s", a, b, o.out, o.error);
}

/* What goes on to `steps` steps is what was not interrupted; `options` are those of the whole training. */
static void check_resumed(const char *directory, int steps, const char *options) {
    char undisturbed[64];
    snprintf(undisturbed, sizeof undisturbed, "%s-not", directory);
    succeed("$D train --resume --sample-steps 2 --steps %d --out %s", steps, directory);
    succeed("$D train $TINY %s --steps %d --out %s", options, steps, undisturbed);
    same_trainings(undisturbed, directory, steps);
}

/* Each way to train: uninterrupted, and stopped after two of four steps and resumed with other numbers of
 * threads. What a crash could have left in the log, and taken from the samples, is made up for. */
static void test_resume(void) {
    static const char *const ways[7] = {
        "--model vdm-1 --predict eps --data digits",
        "--model diffenc-1-nt --timesteps 4 --predict x",
        "--model diffenc-1-1 --schedule learned --timesteps 5 --variance-ratio 0.9",
        "--model diffenc-1-1 --predict x --warmup 3 --clip 1 --weight-decay 0.1 --ema 0.5 --dropout 0.1",
        "--model diffenc-2-2 --seed 18446744073709551615 --eval-every 2 --eval-limit 3 --sample-every 2",
        "--model vdm-1 --net flat --batch 3 --schedule learned --gamma-min -10",
        "--model diffenc-1-1 --conditional --data named --eval-every 2 --eval-limit 3 --sample-every 2"};
    for (int i = 0; i < 7; i++) {
        succeed("rm -rf a b");
        const Outcome o = succeed("$D train $TINY %s --steps 4 --threads %d --out a", ways[i], i % 2 ? 5 : 2);
        CHECK(strstr(o.error, "step 4/4") && strstr(o.error, "left\n"), "progress ends at the last step: %s",
              o.error);
        CHECK(file_count("a/report.html") == 1 && file_count("a/samples-4.png") == 1, "%s: no pictures",
              ways[i]);
        succeed("$D train $TINY %s --steps 2 --threads 1 --out b", ways[i]);
        succeed("rm b/samples-2.png && printf '3,9,9,9,9,9,,,9\\n3,9,9' >>b/log.csv &&"
                " sed -i '/^2,/s/[^,]*$/1234.5/' b/log.csv");
        succeed("$D train --resume --sample-steps 2 %s --steps 4 --threads 3 --out b",
                i == 4 || i == 6 ? "--eval-every 2 --eval-limit 3 --sample-every 2" : "");
        same_trainings("a", "b", 4);
        succeed("grep -q '^3,.*,123[45]\\..*' b/log.csv");   /* the seconds of training go on */
        CHECK(is_whole("a/checkpoint.safetensors"), "%s: a checkpoint that is not finite", ways[i]);
    }
    CHECK(file_count("a/*.tmp*") + file_count("b/*.tmp*") == 0, "temporary files are left");
    succeed("$D train $TINY --steps 1 --out of-1 && $D train $TINY --steps 1 --seed 2 --out of-2");
    static const char *const kernel = "params.score.conv_in.kernel";
    CHECK(norm_in("of-1/checkpoint.safetensors", kernel) != norm_in("of-2/checkpoint.safetensors", kernel),
          "another seed gives the same weights");
}

/* A number behind a label of a text, NAN where there is none. */
static double number_behind(const char *text, const char *label) {
    const char *at = strstr(text, label);
    return at ? strtod(at + strlen(label), NULL) : NAN;
}

/* Every kind of model, prediction, schedule and time learns: the bound on the same images with the same noise
 * falls. */
static void test_learning(void) {
    static const char *const ways[5] = {"--predict v", "--timesteps 4 --model vdm-1", "--schedule learned",
                                        "--model diffenc-1-nt --predict eps",
                                        "--predict x --schedule learned --timesteps 3 --variance-ratio 1.1"};
    for (int i = 0; i < 5; i++) {
        succeed("rm -rf learn && $D train $TINY %s --steps 0 --out learn", ways[i]);
        const Outcome before = succeed("$D eval learn/checkpoint.safetensors --data small");
        succeed("$D train --resume --lr 0.01 --dropout 0.01 --steps 40 --sample-steps 2 --out learn");
        const Outcome after = succeed("$D eval learn/checkpoint.safetensors --data small");
        const double first = number_behind(before.out, "\ntotal "),
                     last = number_behind(after.out, "\ntotal ");
        CHECK(last < 0.9 * first, "%s: from %.4f to %.4f bpd", ways[i], first, last);
        if (strstr(ways[i], "learned")) {
            const double b = norm_in("learn/checkpoint.safetensors", "ema.gamma.b");   /* of one number */
            const double w = norm_in("learn/checkpoint.safetensors", "ema.gamma.w");
            CHECK(fabs(b - 13.3) > 1e-4 && fabs(w - 18.3) > 1e-4, "%s: the schedule stays at -%g, %g",
                  ways[i], b, w);
        }
    }
}

/* `--steps 0` writes the initial checkpoint and stops; what goes on from there is what would have been. */
static void test_steps_0(void) {
    succeed("$D train $TINY --steps 0 --out zero");
    CHECK(step_of("zero/checkpoint.safetensors") == 0 && is_whole("zero/checkpoint.safetensors"),
          "initial checkpoint");
    CHECK(file_count("zero/*.png") == 0, "pictures of no training");
    check_resumed("zero", 2, "");
    say("zero/checkpoint.safetensors: is at step 2 already, beyond --steps 1\n",
        "$D train --resume --sample-steps 2 --steps 1 --out zero");
    CHECK(step_of("zero/checkpoint.safetensors") == 2, "a total that is passed already changes nothing");
    same_trainings("zero-not", "zero", 2);
    refuse(1, "there is a checkpoint already", "$D train $TINY --steps 2 --out zero");
    refuse(1, "there is no checkpoint to resume", "$D train --resume --steps 2 --out nothing");
    CHECK(file_count("nothing") == 0, "a refused training made a directory");
}

/* NAME with its numbers in the other precision. */
static void change_precision(const char *name) {
    TensorFile file = read_tensors(name);
    Arena *arena = arena_new();
    for (int i = 0; i < file.tensor_count; i++) {
        TensorEntry *entry = &file.tensors[i];
        real *values = values_of(entry, name);
        void *other = arena_allocate(arena, entry->count, sizeof(double));
        for (size_t j = 0; j < entry->count; j++)
            if (IN_DOUBLE)
                ((float *)other)[j] = (float)values[j];
            else
                ((double *)other)[j] = (double)values[j];
        free(values);
        entry->type = IN_DOUBLE ? TYPE_F32 : TYPE_F64;
        entry->data = other;
    }
    write_tensors(name, &file);
    arena_free(arena);
}

/* A resumed training keeps the model and the order of the data; other settings may change, which is said. */
static void test_changed_settings(void) {
    succeed("$D train $TINY --steps 1 --out kept && cp -r kept changed");
    refuse(1, "--model diffenc-1-1, not vdm-1", "$D train --resume --steps 2 --model vdm-1 --out kept");
    refuse(1, "--seed 1, not 2", "$D train --resume --steps 2 --seed 2 --out kept");
    refuse(1, "--batch 4, not 5", "$D train --resume --steps 2 --batch 5 --out kept");
    refuse(1, "images are 28x28x1, the model is for 12x8x1",
           "$D train --resume --steps 2 --data digits --out kept 2>said; s=$?; tail -n 1 said >&2; exit $s");
    CHECK(step_of("kept/checkpoint.safetensors") == 1, "a refused resume changed the checkpoint");
    succeed("$D train --resume $TINY --steps 2 --out kept");   /* the same again is no change */
    say("diffenc: --lr changes from 0.004 to 0.03125\n",
        "$D train --resume --sample-steps 2 --steps 2 --lr 0.03125 --out changed");
    char rate[64];
    metadata_of("changed/checkpoint.safetensors", "lr", rate);
    CHECK(strcmp(rate, "0.03125") == 0, "the checkpoint has the learning rate %s", rate);
    static const char *const kernel = "params.score.conv_out.kernel";
    CHECK(norm_in("kept/checkpoint.safetensors", kernel) != norm_in("changed/checkpoint.safetensors", kernel),
          "the learning rate is applied");
    change_precision("kept/checkpoint.safetensors");
    say("was written in another precision", "$D train --resume --sample-steps 2 --steps 3 --out kept");
}

/* Data that change below a training, and a test split that is not like the training images. */
static void test_changed_data(void) {
    succeed("cp -r small moved && $D train $TINY --data moved --steps 1 --out data");
    write_idx("moved/t10k-images-idx3-ubyte", 0x803, 9, 16, 8, 9 * 16 * 8);
    refuse(1, "images are 16x8x1, the model is for 12x8x1",
           "$D train --resume --eval-every 1 --steps 2 --out data");
    refuse(1, "images are 16x8x1, the model is for 12x8x1",
           "$D train $TINY --data moved --eval-every 1 --steps 2 --out out");
    CHECK(file_count("out*") == 0, "a refused training made a directory");
    write_idx("moved/train-images-idx3-ubyte", 0x803, 6, 12, 8, 6 * 12 * 8);
    refuse(1, "other images than this training began with", "$D train --resume --steps 2 --out data");
    succeed("cp small/* moved && printf x | dd of=moved/train-images-idx3-ubyte bs=1 seek=99 conv=notrunc");
    refuse(1, "other images than this training began with", "$D train --resume --steps 2 --out data");
    write_idx("moved/train-images-idx3-ubyte", 0x803, 7, 16, 8, 7 * 16 * 8);
    refuse(1, "images are 16x8x1, the model is for 12x8x1", "$D train --resume --steps 2 --out data");
    CHECK(step_of("data/checkpoint.safetensors") == 1, "a refused resume changed the checkpoint");
    /* The same images at another path are the same data, and from another directory the old path is none. */
    succeed("rm -r moved && cp -r small again-small");
    refuse(1, "No such file or directory; --data says where", "$D train --resume --steps 2 --out data");
    succeed("$D train --resume --data again-small --sample-steps 2 --steps 2 --out data");
    succeed("$D train $TINY --data again-small --steps 2 --out data-not");
    same_trainings("data-not", "data", 2);
}

/* Numbered checkpoints are those of shorter trainings; the best one is that of the least bound in the log,
 * also of the part before a resume. */
static void test_kept_checkpoints(void) {
    static const char *const best = "keep/best.safetensors";
    static const char *const least =
        "awk -F, 'NR > 1 && (!b || $7 < b) {b = $7; s = $1} END {print s}' keep/log.csv";
    succeed("$D train $TINY --lr 0.2 --steps 5 --keep-every 2 --eval-every 1 --eval-limit 2 --out keep");
    CHECK(file_count("keep/checkpoint-*.safetensors") == 2, "checkpoints of steps 2 and 4 were to be kept");
    succeed("$D train $TINY --lr 0.2 --steps 4 --out keep4 && test $(%s) = %ld &&"
            " cmp keep4/checkpoint.safetensors keep/checkpoint-4.safetensors",
            least, step_of(best));
    succeed("cp %s was-best && sed -i '/^2,/s/,[^,]*,[^,]*,[^,]*$/,0.1,0.1,9/' keep/log.csv &&"
            " $D train --resume --steps 9 --eval-every 1 --eval-limit 2 --sample-steps 0 --out keep &&"
            " cmp was-best %s",
            best, best);
}

/* A new training from the averaged weights of another one; what is told of a checkpoint. */
static void test_init_and_info(void) {
    static const Refusal list[] = {
        {"good: was trained with --model vdm-1, not diffenc-1-1", "$D train $TINY --init good --out out"},
        {"--predict v, not eps", "$D train $TINY --predict eps --init finite --out out"},
        {"is [4, 16], expected [8, 32]", "$D train $TINY --encoder-channels 8 --init finite --out out"},
        {"no-such: No such file", "$D train $TINY --init no-such --out out"},
    };
    static const char *const vectors[3] = {"params", "ema", "adam.m"};
    succeed("$D train $TINY --steps 0 --init finite --seed 2 --out init");
    TensorFile from = read_tensors("finite"), to = read_tensors("init/checkpoint.safetensors");
    for (int i = 0; i < 3; i++) {
        char name[64];
        snprintf(name, sizeof name, "%s.score.conv_in.kernel", vectors[i]);
        const TensorEntry *got = tensors_find(&to, name);
        const TensorEntry *want = tensors_find(&from, "ema.score.conv_in.kernel");
        CHECK(got && want && (memcmp(got->data, want->data, want->size) == 0) == (i < 2),
              "%s is not what --init makes of ema", name);
    }
    tensors_free(&from), tensors_free(&to);
    CHECK(step_of("init/checkpoint.safetensors") == 0, "--init begins at step 0");
    refuse_all(1, list, sizeof list);
    refuse(2, "init good: begins a new training", "$D train --resume --init good --out init");
    const Outcome o = succeed("$D info $T10");
    CHECK(number_behind(o.out, "\n  score ") + number_behind(o.out, "\n  gamma ") ==
                  number_behind(o.out, "safetensors: ") &&
              number_behind(o.out, "\n  timesteps ") == 10,
          "%s", o.out);
    succeed("$D info init/checkpoint.safetensors | grep -q '^  made-by  *diffenc [0-9]'");
}

/* ---- ended from outside ---- */

/* Wait until the training that writes to NAME.out has told of its model (signals are caught from there on),
 * or, with `steps`, has logged that many into NAME/log.csv. */
static void wait_for(const char *name, int steps) {
    char file[64], text[TEXT];
    snprintf(file, sizeof file, steps ? "%s/log.csv" : "%s.out", name);
    for (int i = 0; i < 3000; i++) {
        int lines = -1;
        read_text(file, text);
        for (const char *at = text; (at = strchr(at, '\n')) != NULL; at++)
            lines++;
        if (lines >= steps)
            return;
        pause_for(0.01);
    }
    CHECK(0, "a training does not begin");
}

/* Hold a training while it writes a checkpoint, to be seen by the temporary file with its process number: 1,
 * or 0 when it has ended before. A running one could be done with the file before a signal comes, so the file
 * is looked for again when the training stands still. */
static int stop_in_checkpoint(pid_t child) {
    char temporary[64];
    snprintf(temporary, sizeof temporary, "killed/checkpoint.safetensors.tmp.%ld", (long)child);
    for (;;) {
        siginfo_t now = {.si_pid = 0};
        const int seen = access(temporary, F_OK) == 0;
        if (seen)
            kill(child, SIGSTOP);
        waitid(P_PID, (id_t)child, &now, WEXITED | WNOWAIT | (seen ? WSTOPPED : WNOHANG));
        if (now.si_pid != 0 && now.si_code != CLD_STOPPED)
            return 0;
        if (seen && access(temporary, F_OK) == 0)
            return 1;
        if (seen)
            kill(child, SIGCONT);
    }
}

/* SIGKILL at random moments, each followed by a resume: every checkpoint in between is whole, and the final
 * weights are those of a training that nobody disturbed. How long that one takes sets the times of the kills,
 * so that nearly all of them come before the last step. Every other kill then waits until a checkpoint is
 * being written. */
static void test_kill(void) {
    const char *wanted = getenv("KILLS");
    const int kills = wanted ? (int)strtol(wanted, NULL, 10) : 50, steps = 2 * kills;
    const double start = seconds_now();
    succeed("$D train $TINY --save-every 1 --sample-every 7 --steps %d --out quiet", steps);
    const double longest = (seconds_now() - start) / kills + 0.02;
    int killed = 0, torn = 0;
    char command[512];
    snprintf(command, sizeof command, "test -e killed/checkpoint.safetensors && R=--resume\n"
             "exec $D train $TINY $R --save-every 1 --sample-every 7 --steps %d --out killed", steps);
    for (int i = 0; i < kills; i++) {
        Outcome o;
        const pid_t child = begin("killed", command);
        pause_for(longest * random_uniform(random_stream(1, RANDOM_CHECK, 0, (uint32_t)i), 0));
        torn += i % 2 && stop_in_checkpoint(child);
        kill(child, SIGKILL);
        end(child, "killed", &o);
        const int saved = file_count("killed/checkpoint.safetensors");
        killed += o.by_signal;
        if ((!o.by_signal && o.status != 0) || (saved && !is_whole("killed/checkpoint.safetensors")))
            CHECK(0, "kill %d: status %d, %s", i, o.status, o.error);
    }
    CHECK(killed > kills / 2, "only %d of %d kills came before the end of the training", killed, kills);
    CHECK(torn > kills / 10, "only %d of %d kills came while a checkpoint was written", torn, kills);
    succeed("%s", command);
    same_trainings("quiet", "killed", steps);
    CHECK(file_count("killed/*.tmp*") == 0, "%d temporary files of killed trainings are left",
          file_count("killed/*.tmp*"));
}

/* Send a signal to a training or another work: it must end within two seconds (sanitizers: ten), with the
 * signal's status and a line that names it. */
static Outcome stop(pid_t child, const char *name, int number, const char *signal_name) {
    Outcome o;
    char line[64];
    const double start = seconds_now();
    kill(child, number);
    end(child, name, &o);
    snprintf(line, sizeof line, "diffenc: stopped by %s", signal_name);
    CHECK(o.status == 128 + number && strstr(o.error, line), "%s: exits with %d: %s", signal_name, o.status,
          o.error);
    CHECK(seconds_now() - start < (SANITIZED ? 10 : 2), "%s: after %.1f s", signal_name,
          seconds_now() - start);
    return o;
}

/* Each of the four signals ends a training with everything saved; it goes on as if nothing had been. The
 * number of steps is one that a time left in 32 bits would overflow with. */
static void test_stops(void) {
    static const struct { int number; const char *name; } signals[4] = {
        {SIGINT, "SIGINT"}, {SIGTERM, "SIGTERM"}, {SIGHUP, "SIGHUP"}, {SIGPIPE, "SIGPIPE"}};
    for (int i = 0; i < 4; i++) {
        char log[TEXT], line[64];
        succeed("rm -rf stopped stopped-not");
        const pid_t child =
            begin("stopped", "exec $D train $TINY --save-every 0 --steps 2000000000 --out stopped");
        wait_for("stopped", 2);
        refuse(1, "another training is at work in this directory", "$D train $TINY --steps 1 --out stopped");
        const Outcome o = stop(child, "stopped", signals[i].number, signals[i].name);
        const long step = step_of("stopped/checkpoint.safetensors");
        CHECK(step >= 2 && is_whole("stopped/checkpoint.safetensors"), "the checkpoint is at step %ld", step);
        snprintf(line, sizeof line, "checkpoint.safetensors at step %ld,", step);
        CHECK(strstr(o.error, line) && !strstr(o.error, "  -"),
              "where the training stands, no negative time: %s", o.error);
        read_text("stopped/log.csv", log);
        snprintf(line, sizeof line, "\n%ld,", step);
        CHECK(strstr(log, line), "the log ends at step %ld: %s", step, log);
        check_resumed("stopped", (int)step + 1, "");
    }
}

/* The report while a training runs and after its end. One that cannot be written ends no training. The grid
 * in it is that of the file. */
static void test_report_html(void) {
    static const char *const report = "live/report.html";
    char text[TEXT];
    const pid_t child =
        begin("live", "exec $D train $TINY --eval-every 1 --eval-limit 2 --steps 1000000 --out live");
    for (int look = 0; look < 1000 && file_count(report) == 0; look++)
        pause_for(0.03);
    read_text(report, text);
    CHECK(strstr(text, "http-equiv=refresh") && strstr(text, " left.</p>") && strstr(text, ">test, with"),
          "a report of no running training: %s", text);
    succeed("rm live/report.html && mkdir live/report.html");
    const Outcome o = stop(child, "live", SIGTERM, "SIGTERM");
    CHECK(strstr(o.error, "report.html: is not a regular file"), "%s", o.error);
    const long steps = step_of("live/checkpoint.safetensors") + 1;
    succeed("rmdir live/report.html && $D train --resume --steps %ld --sample-steps 2 --out live", steps);
    read_text(report, text);
    CHECK(strstr(text, "finished.</p>") && !strstr(text, "http-equiv"), "a report of no end: %s", text);
    succeed("sed -n \"s/.*base64,\\([^']*\\)'.*/\\1/p\" %s | base64 -d | cmp - live/samples-%ld.png", report,
            steps);
    succeed("test $(grep -c '</svg>$' %s) = 4 && ! grep -o 'https*:[^ ]*' %s | grep -v w3.org/2000/svg",
            report, report);
}

/* The same wherever the program is: in a step, which is then completed; in a grid of a million
 * steps, for which the checkpoint is there already; in `sample` and `eval`, which leave nothing; and behind a
 * closed pipe. */
static void test_stops_anywhere(void) {
    static const char *const work[3] = {
        "exec $D sample good --count 4 --steps 1000000 --out out.png",
        "exec $D eval good good --limit 10 --repeats 100000 --csv out.csv --chart out.svg",
        "exec $D eval good --timesteps 10000 --variance-ratio optimal --limit 1000"};
    succeed("$D train $TINY --batch 100000 --steps 0 --out slow");
    pid_t child = begin("slow", "exec $D train --resume --steps 2 --out slow");
    wait_for("slow", 0);
    pause_for(0.3);
    stop(child, "slow", SIGINT, "SIGINT");
    CHECK(step_of("slow/checkpoint.safetensors") == 0, "half a step was taken");
    child =
        begin("grid", "exec $D train $TINY --timesteps 1000000 --sample-steps 1000000 --steps 3 --out grid");
    wait_for("grid", 3);
    pause_for(0.3);
    CHECK(step_of("grid/checkpoint.safetensors") == 3, "the checkpoint comes before its grid");
    stop(child, "grid", SIGTERM, "SIGTERM");
    succeed("$D train --resume --steps 3 --sample-steps 2 --out grid");   /* obeyed with a finite T, too */
    CHECK(file_count("grid/samples-3.png") == 1, "the grid is made up for");
    for (int i = 0; i < 3; i++) {
        child = begin("work", work[i]);
        pause_for(0.5);
        stop(child, "work", SIGHUP, "SIGHUP");
        CHECK(file_count("out*") == 0, "%s: something is left", work[i]);
    }
    say("stopped by SIGPIPE", "($D train $TINY --steps 100000 --eval-every 1 --eval-limit 1 --out pipe\n"
                              "echo $? >pipe.status) | head -n 1; test $(cat pipe.status) = 141");
    CHECK(is_whole("pipe/checkpoint.safetensors"), "the checkpoint behind a closed pipe");
    succeed("$D train $TINY --steps 1 --sample-steps 0 --out gridless && test ! -e gridless/samples-1.png");
}

/* A signal that the parent ignores is none (nohup); a second one ends the program at once. Here its orderly
 * end would wait for ever to say what stopped it: stderr is a pipe that is full. */
static void test_second_signal(void) {
    static char block[4096];
    Outcome o;
    succeed("mkfifo full.pipe");
    const int full = open("full.pipe", O_RDWR | O_NONBLOCK);
    while (write(full, block, sizeof block) > 0)
        ;
    const pid_t child = begin("slow", "trap '' HUP; exec $D train --resume --steps 2 --out slow 2>full.pipe");
    wait_for("slow", 0);
    kill(child, SIGHUP);
    pause_for(0.3);
    CHECK(waitpid(child, NULL, WNOHANG) == 0, "an ignored SIGHUP ends a training");
    for (int i = 0; i < 5; i++, pause_for(0.3))   /* one that comes too early is the first one once more */
        kill(child, SIGTERM);
    kill(child, SIGKILL);
    end(child, "slow", &o);
    close(full);
    CHECK(o.by_signal && o.status == 128 + SIGTERM, "a second signal: status %d", o.status);
    succeed("$D train --resume --steps 0 --out slow");   /* the lock went with the process */
}

/* ---- directories and files that are not the program's ---- */

/* A directory that is taken away and made anew by another training: the first one ends and writes nothing
 * there. */
static void test_two_trainings(void) {
    Outcome o;
    const pid_t child = begin("rr", "exec $D train $TINY --save-every 1 --steps 1000000 --out rr");
    wait_for("rr", 2);
    succeed("mv rr rr.old && $D train $TINY --steps 3 --seed 2 --out rr");
    end(child, "rr", &o);
    CHECK(o.status == 1, "the first training goes on");
    /* The second message: it was taken away after the look, while a file was being written. */
    CHECK(strstr(o.error, "rr: was removed or replaced") || strstr(o.error, "No such file or directory"),
          "%s", o.error);
    CHECK(step_of("rr/checkpoint.safetensors") == 3, "the checkpoint is of the first training");
    check_resumed("rr", 4, "--seed 2");
}

/* Nothing is cut, overwritten, followed or removed that a training did not make. */
static void test_strangers_files(void) {
    static const char *const logs[6] = {
        "sed 's/$/\\r/' log.csv", "sed 's/$/,0/' log.csv", "echo hello", "printf 'my notes, without an end'",
        "head -n 2 log.csv", "grep -v ^1, log.csv | sed 's/^2,/9,/'"};
    succeed("$D train $TINY --steps 2 --out own && touch own/samples-a.tmp.b own/samples-1.png.tmp.7");
    for (int i = 0; i < 6; i++) {
        succeed("cd own && cp log.csv .. && %s >../changed.csv && cp ../changed.csv log.csv", logs[i]);
        refuse(1, "is not the log of this training", "$D train --resume --steps 3 --out own");
        CHECK(same_files("changed.csv", "own/log.csv"), "%s: was changed", logs[i]);
        succeed("cp log.csv own");
    }
    succeed("cd own && mv log.csv ../elsewhere && ln -s ../elsewhere log.csv");
    refuse(1, "log.csv: is not a regular file", "$D train --resume --steps 3 --out own");
    succeed("cd own && rm log.csv && mkfifo log.csv");
    refuse(1, "log.csv: is not a regular file", "$D train --resume --steps 3 --out own");
    succeed("cd own && rm log.csv && cp ../elsewhere log.csv && mv checkpoint.safetensors .. &&"
            " ln -s ../checkpoint.safetensors checkpoint.safetensors");
    refuse(1, "checkpoint.safetensors: is not a regular file", "$D train --resume --steps 3 --out own");
    succeed("cd own && rm checkpoint.safetensors && mv ../checkpoint.safetensors . &&"
            " cd - >/dev/null && $D train --resume --steps 3 --sample-steps 2 --out own >&- 2>&- <&- &&"
            " cd own && test -e samples-a.tmp.b && test ! -e samples-1.png.tmp.7");
    succeed("$D train $TINY --steps 3 --out own-not");
    same_trainings("own-not", "own", 3);
    succeed("mkdir log pic && echo mine >log/log.csv && echo mine >pic/samples-7.png");
    refuse(1, "log.csv: is there already", "$D train $TINY --steps 1 --out log");
    refuse(1, "samples-7.png: is there already", "$D train $TINY --steps 1 --out pic");
    succeed("mkdir best kept-5 && for f in best/best kept-5/checkpoint-5; do echo mine >$f.safetensors;done");
    refuse(1, "best.safetensors: is there already", "$D train $TINY --steps 1 --out best");
    refuse(1, "checkpoint-5.safetensors: is there already", "$D train $TINY --steps 1 --out kept-5");
    succeed("test $(cat log/log.csv pic/samples-7.png best/* kept-5/* | grep -cx mine) = 4");
}

/* No command writes over what it reads, under whatever name. */
static void test_output_is_input(void) {
    succeed("cd $W && cp good same && ln -s same same.png && ln same same.pgm && cp -r small read &&"
            " ln -s $W/read/t10k-images-idx3-ubyte read.png");
    refuse(1, "is the same file as the input", "$D sample $W/same --steps 1 --out $W/same.png");
    refuse(1, "is the same file as the input", "$D sample $W/same --steps 1 --out $W/same.pgm");
    refuse(1, "is the same file as the input", "$D show $W/finite --data $W/read --out $W/read.png");
    refuse(1, "is the same file as the input", "$D grad $W/same --batch $W/good --out $W/same");
    refuse(1, "is the same file as the input", "$D eval $W/good $W/same --csv $W/same.png");
    refuse(1, "is the same file as the input", "$D eval $W/good $W/good $W/same --limit 1 --chart $W/same");
    refuse(1, "is the same file as the input", "$D eval $W/finite --data $W/read --csv $W/read.png");
    refuse(1, "is the same file as the input",
           "cp $VB $W/batch.own; $D grad $V --batch $W/batch.own --out $W/../${W##*/}/batch.own");
    CHECK(same_files("same", "good") &&
              same_files("read/t10k-images-idx3-ubyte", "small/t10k-images-idx3-ubyte"),
          "an input was written over");
}

/* A stranger's checkpoint: what it says does not reach the terminal raw, opens no path, takes no memory. */
static void test_stranger(void) {
    rewrite("good", "bad.name", "model", "vdm\33[31m\nroot# \xc2\x9b" "1m", NULL);
    rewrite("good", "bad.data", "data", "\33]0;title\7", NULL);
    rewrite("good", "bad.where", "data", "/no-such/place", NULL);
    rewrite("good", "bad.large", "height", "256", NULL);
    rewrite("bad.large", "bad.large", "width", "256", NULL);
    static const char *const files[2] = {"bad.name", "bad.data"};
    for (int i = 0; i < 2; i++) {
        const Outcome o = run("$D eval %s --limit 1", files[i]);
        CHECK(o.status == 1 && is_one_line(o.error) && !strpbrk(o.error, "\33\7") &&
              !strstr(o.error, "\xc2\x9b") && strstr(o.error, "\\x1b"), "%s: %s", files[i], o.error);
    }
    refuse(1, "give --data with a path of your own", "$D eval bad.where");
    rewrite("finite", "bad.where", "data", "/no-such/place", NULL);
    refuse(1, "give --data with a path of your own", "$D show bad.where --out out.png");
    if (!SANITIZED) {
        const double start = seconds_now();
        refuse(1, "MiB of memory", "ulimit -v 2000000; $D sample bad.large --count 1 --out out.png");
        refuse(1, "MiB of memory", "ulimit -v 150000; $D sample good --count 65536 --steps 1 --out out.png");
        CHECK(seconds_now() - start < 20, "that takes %.1f s", seconds_now() - start);
    }
}

/* Threads of some systems have stacks of 128 KiB, and the whole program may have one of 256. */
static void test_small_stacks(void) {
    if (!SANITIZED)
        succeed("ulimit -s 256; OMP_STACKSIZE=128k $D train --model diffenc-2-2 --net unet --channels 128"
                " --encoder-channels 64 --batch 2 --steps 1 --sample-steps 1 --threads 2 --out stacks");
}

/* What the Makefile makes of choices: an unknown machine is an error, a compiler may have a space, and an
 * example that would be trained again is not removed. */
static void test_makefile(void) {
    Outcome o = run("make -C $TOP -n MARCH=bogus all");
    CHECK(o.status == 2 && strstr(o.error, "MARCH=bogus"), "%s", o.error);
    say("build/env-gcc-", "make -C $TOP -n CC='env gcc' BUILD_ONLY= all");
    o = run("mkdir trained && touch trained/mine && make -C $TOP -s -o all run RUN=$W/trained");
    CHECK(o.status == 2 && strstr(o.out, "is there already") && file_count("trained/mine") == 1, "%s", o.out);
    setenv("M", "make -s CC=true", 1);   /* quick: a compiler that takes everything */
    o = succeed("$M -C $TOP help | awk 'length > 80 {exit 1} {print}'");
    CHECK(strstr(o.out, "\nuninstall   Take") && !strstr(o.out, "-ffp-contract"), "%s", o.out);
    succeed("mkdir -p house/mnist && ln -s $TOP/* house 2>/dev/null; MNIST_DIR= $M -C house -n test | grep -q"
            " \"MNIST_DIR='.*/house/mnist' sh tests/run.sh\"");
    succeed("$M -C $TOP -o all install PREFIX=$W/usr && test -x $W/usr/bin/diffenc && "
            "$M -C $TOP uninstall PREFIX=$W/usr && ! test -e $W/usr/bin/diffenc");
    if (run("git -C $TOP rev-parse").status == 0)   /* what the README has made is no news to git */
        succeed("cd $TOP && for f in $(grep -o -e '--out [a-z./-]*' README.md | cut -c 7- | grep -v /); do"
                " git check-ignore -q $f || { echo $f; exit 1; }; done");
}

/* What is printed is what is used. */
static void test_thread_count(void) {
#ifdef _OPENMP
    const char *const expected = ", 8 threads, about ";
#else
    const char *const expected = ", 1 thread, about ";
#endif
    Outcome o = succeed("$D train $TINY --threads 8 --steps 7 --sample-steps 0 --out eight");
    CHECK(strstr(o.out, expected) && strstr(o.out, "0 to 7 (4.00 epochs)"), "%s", o.out);
    CHECK(!strstr(o.out, "seconds a step"), "%s", o.out);
    say(" seconds a step, 0:00:00 left\n",   /* known after the first 20 */
        "$D train $TINY --steps 22 --sample-steps 0 --out longer");
}

/* On a terminal the progress is one line that is written over and over, and fits; that of a grid or an
 * evaluation is gone at its end. What else is said begins a new one. */
static void test_terminal(void) {
    static const struct { unsigned short columns; const char *command, *begin, *part; } list[5] = {
        {130, "$D train $TINY --lr 1e6 --steps 400 --out seen", "\rstep 1/400  ", "bpd (recon "},
        {60, "$D train $TINY $S --out s60", "\rstep 1/1  ", " images/s  0:00:00 left\33[K"},
        {40, "$D train $TINY $S --out s40", "\rstep 1/1  ", " bpd  0:00:00 left\33[K"},
        {25, "$D train $TINY $S --out s25", "\rstep 1/1  ", " bpd  0:\33[K"},
        {30, "$D eval good good --limit 4 --repeats 200", "\r", "/8 images  0:0"}};
    for (int i = 0; i < 5; i++) {
        const struct winsize size = {.ws_col = list[i].columns};
        const int terminal = posix_openpt(O_RDWR | O_NOCTTY);
        if (terminal < 0 || grantpt(terminal) || unlockpt(terminal)) {
            printf("skipped: the progress line (no terminal to be had)\n");
            return;
        }
        ioctl(terminal, TIOCSWINSZ, &size);
        run("exec 2>%s; S='--steps 1 --sample-steps 0'; %s", ptsname(terminal), list[i].command);
        char text[TEXT] = "";
        size_t length = 0;
        for (ssize_t got; (got = read(terminal, text + length, sizeof text - 1 - length)) > 0;)
            length += (size_t)got;   /* a busy system hands it over in pieces */
        close(terminal);
        CHECK(strstr(text, list[i].begin) == text && strstr(text, list[i].part), "%s: progress is '%s'",
              list[i].command, text);
        for (const char *at = text; (at = strchr(at, '\r')) != NULL; at++)
            CHECK(strcspn(at + 1, "\n\33") < list[i].columns, "%s: too long for %d columns: %s",
                  list[i].command, list[i].columns, text);
        CHECK(i > 0 || (strstr(text, "\ndiffenc: step ") && !strstr(text, "left  diffenc")),
              "the error begins a line: %s", text);
        CHECK(i < 4 || strcmp(text + strlen(text) - 4, "\r\33[K") == 0, "something is left: %s", text);
    }
}

/* ---- full disks ---- */

/* A file may not grow beyond 40 KiB: the checkpoint of this model is larger. SIGXFSZ would end the program
 * before it can say why. */
static void test_file_limit(void) {
    succeed("$D train $TINY --steps 1 --out full && cp full/checkpoint.safetensors old");
    refuse(1, "checkpoint.safetensors: File too large",
           "ulimit -f 80; $D train --resume --sample-steps 2 --steps 2 --out full");
    CHECK(same_files("old", "full/checkpoint.safetensors"), "the old checkpoint is intact");
    refuse(1, "out.png: File too large", "ulimit -f 8; $D sample old --steps 1 --out out.png");
    refuse(1, "out.grad: File too large", "ulimit -f 8; $D grad $V --batch $VB --out out.grad");
    CHECK(file_count("full/*.tmp*") == 0 && file_count("out*") == 0, "something is left");
    check_resumed("full", 2, "");
    refuse(1, "standard output: No space left on device", "$D train --help >/dev/full");
    refuse(1, "standard output: No space left on device", "$D eval old --data small >/dev/full");
}

/* The same on a disk of its own with room for one checkpoint and a half, where making one is allowed; it then
 * becomes read-only. */
static void test_small_disk(void) {
    succeed("$D train $TINY --steps 0 --out small-enough && cp small-enough/checkpoint.safetensors old");
    if (geteuid() != 0 ||
        run("mkdir disk && mount -t tmpfs -o size=$(($(wc -c <old) * 3 / 2)) none disk").status) {
        printf("skipped: a full disk (no right to mount one)\n");
        return;
    }
    succeed("cp old disk/checkpoint.safetensors");
    refuse(1, "checkpoint.safetensors: No space left on device", "$D train --resume --steps 1 --out disk");
    CHECK(same_files("old", "disk/checkpoint.safetensors"), "the old checkpoint is intact");
    CHECK(file_count("disk/*.tmp*") == 0, "a temporary file is left");
    succeed("head -c 1000000 /dev/zero >disk/fill 2>/dev/null; test -s disk/fill");
    refuse(1, "No space left on device", "$D train --resume --steps 1 --out disk");
    refuse(1, "No space left on device", "$D sample old --count 1 --steps 1 --out disk/out.png");
    CHECK(file_count("disk/out*") == 0, "part of a picture is left");
    CHECK(same_files("old", "disk/checkpoint.safetensors"), "the old checkpoint is intact");
    succeed("mount -o remount,ro disk");
    refuse(1, "Read-only file system", "$D sample old --count 1 --steps 1 --out disk/out.png");
    refuse(1, "Read-only file system", "$D train --resume --steps 1 --out disk");
    refuse(1, "Read-only file system", "$D train $TINY --steps 1 --out disk/new");
    succeed("umount disk");
}

/* Where no output can be made, that is said at once and not after the work, which here would take hours. */
static void test_no_directory(void) {
    const double start = seconds_now();
    refuse(1, "out.png: No such file or directory",
           "ulimit -t 20; $D sample old --count 65536 --steps 1000000 --out none/out.png");
    refuse(1, "No such file or directory", "$D show old --out none/out.png");
    refuse(1, "No such file or directory", "$D grad $V --batch $VB --out none/out");
    refuse(1, "Not a directory",
           "ulimit -t 20; $D sample old --count 65536 --steps 1000000 --out old/out.png");
    refuse(1, "Not a directory", "$D train $TINY --steps 1 --out old/out/in");
    succeed("$D train $TINY --steps 0 --out $W/made//by/it/ && test -f made/by/it/checkpoint.safetensors");
    refuse(1, "Not a directory", "$D train $TINY --steps 1 --out old");
    succeed("mkdir kept.png");
    refuse(1, "is not a regular file", "$D sample old --count 1 --steps 1 --out kept.png");
    /* root may write anywhere, so it asks as somebody else. */
    setenv("AS", geteuid() ? "" : "setpriv --reuid 65534 --regid 65534 --clear-groups", 1);
    succeed("mkdir locked && cp old locked/checkpoint.safetensors && touch locked/.lock"
            " && chmod 555 locked && chmod 444 locked/* && chmod 755 $W");
    if (run("$AS $D train --resume --steps 0 --out locked").status == 127)
        printf("skipped: a directory without the right to write (setpriv or the program cannot be run)\n");
    else {
        refuse(1, "Permission denied",
               "ulimit -t 20; $AS $D sample old --count 65536 --steps 1000000 --out locked/out.png");
        refuse(1, "Permission denied", "$AS $D train $TINY --steps 1 --out locked/out");
        refuse(1, "Permission denied", "$AS $D train $TINY --steps 1 --out locked");
        refuse(1, "Permission denied", "$AS $D train --resume --steps 1 --out locked");
        CHECK(same_files("old", "locked/checkpoint.safetensors") && file_count("locked/*") == 1,
              "a directory that is not to be written is as it was");
    }
    CHECK(seconds_now() - start < 20, "that takes %.1f seconds", seconds_now() - start);
}

/* ---- bad input ---- */

static void test_wrong_usage(void) {
    /* An option of train out of range, and what is said of it by name; test_nn.c knows what config_check and
     * config_parse_model refuse. */
    static const char *const options[][2] = {
        {"--steps many", "steps 'many'"}, {"--steps 1.5", "steps '1.5'"}, {"--steps=", "steps ''"},
        {"--steps -1", "steps '-1'"}, {"--steps 99999999999999999999", "steps '99999999999999999999'"},
        {"--save-every -1", "save-every '-1'"}, {"--batch 0", "batch '0'"},
        {"--batch 4294967297", "batch '4294967297'"}, {"--threads 0", "threads '0'"},
        {"--channels 6", "channels 6: must be a multiple of 4"}, {"--gamma-max nan", "gamma-max 'nan'"},
        {"--timesteps 4 --variance-ratio=-1", "variance-ratio '-1'"}, {"--lr inf", "lr 'inf'"},
        {"--lr -1", "lr '-1'"}, {"--clip -1", "clip '-1'"}, {"--ema 1.1", "ema '1.1'"},
        {"--seed 18446744073709551616", "seed '18446744073709551616'"}, {"--seed -1", "seed '-1'"},
        {"--seed 0x10", "seed '0x10'"}, {"--model unet", "model 'unet'"}, {"--net net", "net 'net'"},
        {"--predict y", "predict 'y'"}, {"--fourier 7", "fourier '7': expected FIRST..LAST"},
        {"--fourier 3..2", "fourier 3..2: must be ascending"}, {"--fourier 0..13", "fourier 0..13"},
        {"--cooldown 1.5", "cooldown '1.5'"}, {"--data=", "data ''"},
    };
    for (size_t i = 0; i < sizeof options / sizeof options[0]; i++)
        refuse(2, options[i][1], "$D train %s --out out", options[i][0]);
    CHECK(file_count("out*") == 0, "wrong options make a directory");
    static const Refusal list[] = {
        {"unknown command 'trian'", "$D trian"},
        {"unknown option or argument '--modle'", "$D train --modle vdm-1 --out out"},
        {"unknown option or argument 'digits'", "$D train digits --out out"},
        {"unknown option or argument '--resumed'", "$D train --resumed --out out"},
        {"--resume takes no value", "$D train --resume=yes --out out"},
        {"--steps needs a value", "$D train --out out --steps"},
        {"expected a checkpoint", "$D sample --out out.png"}, {"--out FILE", "$D sample good"},
        {"unknown option or argument 'two'", "$D sample good two --out out.png"},
        {"count '1e30'", "$D sample good --count 1e30 --out out.png"},
        {"steps '-1'", "$D sample good --steps -1 --out out.png"},
        {"pixels 'red'", "$D sample good --pixels red --out out.png"}, {"expected a checkpoint", "$D eval"},
        {"limit '-1'", "$D eval good --limit -1"}, {"split 'all'", "$D eval good --split all"},
        {"variance-ratio optimal", "$D eval good --variance-ratio optimal"},
        {"variance-ratio 2: the bound diverges", "$D eval good --variance-ratio 2"},
        {"variance-ratio 'best'", "$D eval good --timesteps 4 --variance-ratio best"},
        {"variance-ratio 0", "$D eval good --timesteps 4 --variance-ratio 0"},
        {"variance-ratio optimal: takes one checkpoint",
         "$D eval good good --timesteps 4 --variance-ratio optimal"},
        {"csv out: is where the chart goes", "$D eval good --chart out --csv out"},
        {"expected a checkpoint", "$D show"},
        {"times '0,2': expected fewer than 64 ascending", "$D show finite --times 0,2 --out out.png"},
        {"times '0.5,0.5'", "$D show finite --times 0.5,0.5 --out out.png"},
        {"times '0,,1'", "$D show finite --times 0,,1 --out out.png"},
        {"times '0,1x'", "$D show finite --times 0,1x --out out.png"},
        {"amplify '0'", "$D show finite --amplify 0 --out out.png"},
        {"--batch FILE", "$D grad good --out out"}, {"unknown option", "$D check --quick"},
        {"unknown option", "$D bench --quick"},
    };
    refuse_all(2, list, sizeof list);
    const Outcome o = run("$D");
    CHECK(o.status == 2 && strstr(o.error, "usage: diffenc COMMAND"), "no command at all shows the usage: %s",
          o.error);
}

/* What is broken in the files is refused in test_data.c. */
static void test_bad_data(void) {
    static const Refusal list[] = {
        {"mnist: No such file or directory; 'make mnist' fetches", "$D train $TINY --data mnist --out out"},
        {"encoder: a U-Net of 1 blocks halves the image 1 times, which 9x10 does not allow",
         "$D train $TINY --net flat --data odd --out out"},
        {"net unet: a U-Net of 2 blocks halves the image 1 times, which 9x10 does not allow",
         "$D train $TINY --model vdm-2 --data odd --out out"},
        {"images are 9x10x1, the model is for 28x28x1", "$D eval good --data odd --split train"},
    };
    succeed("mkdir odd");
    write_idx("odd/train-images-idx3-ubyte", 0x803, 10, 9, 10, 900);
    refuse_all(1, list, sizeof list);
}

/* What is broken in the files is refused in test_data.c; here, what the program does not expect in them. A
 * row is a change of the metadata, or a tensor left out, and a command that reads the result, `bad`. */
static void test_bad_checkpoints(void) {
    static const struct { const char *from, *key, *value, *drop, *part, *command; } changed[] = {
        {"good", "model", "vdm-2", NULL, ".down.1.0.norm1.scale', which model vdm-2 needs", "$D eval bad"},
        {"deep", "model", "vdm-1", NULL, "tensors that model vdm-1 does not have", "$D eval bad"},
        {"learned", "schedule", "fixed", NULL, "holds 2 tensors that model diffenc-1-nt does not have",
         "$D grad bad --batch tests/golden/nt-flat-eps-T10.batch.safetensors --out out"},
        {"good", "channels", "8", NULL, "ema.score.time.dense0.kernel is [4, 16], expected [8, 32]",
         "$D show bad --out out.png"},
        {"good", "", "", "ema.score.conv_in.bias", "bad: holds no tensor 'ema.score.conv_in.bias'",
         "$D eval good bad --limit 1 --csv out"},
        {"good", "format", "pt", NULL, "metadata 'format' is not 'diffenc'", "$D eval bad"},
        {"good", "format_version", "2", NULL, "format version 2", "$D eval bad"},
        {"good", "model", "resnet-50", NULL, "metadata: model 'resnet-50'", "$D eval bad"},
        {"good", "step", "4294967296", NULL, "metadata: step 4294967296", "$D eval bad"},
        {"good", "gamma_min", "6", NULL, "metadata: gamma-min 6, gamma-max 5", "$D eval bad"},
        {"good", "height", "0", NULL, "metadata: image size 0x28", "$D eval bad"},
        {"huge", "net", "flat", NULL, "bad: ", "$D eval bad --limit 1"},
    };
    static const Refusal list[] = {
        {"No such file or directory", "$D sample no-such --out out.png"},
        {"bad.nan: tensor ema.score.conv_in.kernel: value 0 is not a finite number",
         "$D sample bad.nan --out out.png"},
        {"adam.v.score.conv_in.kernel: value 0 is not a finite number",
         "mkdir nan && cp bad.nan-adam nan/checkpoint.safetensors; $D train --resume --out nan"},
        {"a .pgm holds grey images only", "$D sample colour --out out.pgm"},
        {"expected a name that ends in", "$D sample good --out out.jpg"},
        {"expected a name that ends in", "$D show good --out out"},
        {"a .pgm holds grey images only", "$D show finite --out out.pgm"},
        {"good: vdm-1 has no encoder to show", "$D show good --out out.png"},
        {"good: images are 12x8x1, the model is for 28x28x1", "$D eval finite finite good --data small"},
        {"No such file or directory", "$D eval good --chart none/out.svg"},
        {"MiB of memory", "$D eval good --repeats 200000 --chart out"},
        {"No such file or directory", "$D grad good --batch no-such --out out"},
    };
    succeed("cp $T10 learned");
    rewrite("colour", "huge", "model", "vdm-256", NULL);
    rewrite("huge", "huge", "channels", "1024", NULL);
    poison("good", "bad.nan", "ema.score.conv_in.kernel");
    poison("good", "bad.nan-adam", "adam.v.score.conv_in.kernel");
    const double start = seconds_now();
    for (size_t i = 0; i < sizeof changed / sizeof changed[0]; i++) {
        const Refusal refusal = {changed[i].part, changed[i].command};
        rewrite(changed[i].from, "bad", changed[i].key, changed[i].value, changed[i].drop);
        refuse_all(1, &refusal, sizeof refusal);
    }
    refuse_all(1, list, sizeof list);
    /* The huge one claims a model of 10^10 weights in a file of some kilobytes. */
    CHECK(seconds_now() - start < 20, "refusing bad checkpoints takes %.1f seconds", seconds_now() - start);
}

/* A batch for `grad`: B images [HEIGHT, WIDTH, 1], every number of t as given, `without` is left out. */
static void write_batch(const char *name, int batch, int height, int width, double t, double first_noise,
                        const char *without) {
    enum { MOST = 4 * 12 * 8 };
    static unsigned char images[MOST];
    real times[4], noise[MOST];
    for (int i = 0; i < MOST; i++)
        images[i] = (unsigned char)(31 * i), noise[i] = i ? (real)sin(i) : (real)first_noise;
    for (int i = 0; i < 4; i++)
        times[i] = (real)t;
    const ElementType type = IN_DOUBLE ? TYPE_F64 : TYPE_F32;
    const TensorEntry all[4] = {{"images", TYPE_U8, 4, {batch, height, width, 1}, .data = images},
                                {"t", type, 1, {batch}, .data = times},
                                {"eps", type, 4, {batch, height, width, 1}, .data = noise},
                                {"eps0", type, 4, {batch, height, width, 1}, .data = noise}};
    TensorEntry some[4];
    int count = 0;
    for (int i = 0; i < 4; i++)
        if (!without || strcmp(all[i].name, without) != 0)
            some[count++] = all[i];
    Error error;
    CHECK(!tensors_write(name, &(TensorFile){{NULL, 0}, some, count, NULL, 0}, &error), "%s", error.text);
}

static void test_bad_batches(void) {
    static const struct { int width; double t, first_noise; const char *without, *part, *command; } list[] = {
        {7, 0.3, 1, NULL, "images: expected U8 [B,8,8,1]", "$D grad $V"},
        {8, 0.3, 1, "eps0", "holds no tensor 'eps0'", "$D grad $V"},
        {8, 0.3, 1, "t", "holds no tensor 't'", "$D grad $V"},
        {8, 0.3, 1, "images", "holds no tensor 'images'", "$D grad $V"},
        {8, 1.5, 1, NULL, "t[0] is 1.5, expected a time from 0 to 1", "$D grad $V"},
        {8, 1.0000001, 1, NULL, "t[0] is 1.0000001", "$D grad $V"},
        {8, -0.1, 1, NULL, "t[0] is -0.1, expected a time from 0 to 1", "$D grad $V"},
        {8, 0.3, NAN, NULL, "eps: value 0 is not a finite number", "$D grad $V"},
        {8, 0.55, 1, NULL, "t[0] is 0.55, expected a multiple of 1/10 above 0", "$D grad $T10"},
        {8, 0, 1, NULL, "t[0] is 0, expected a multiple of 1/10 above 0", "$D grad $T10"},
    };
    for (size_t i = 0; i < sizeof list / sizeof list[0]; i++) {
        write_batch("batch", 2, 8, list[i].width, list[i].t, list[i].first_noise, list[i].without);
        refuse(1, list[i].part, "%s --batch batch --out out", list[i].command);
        CHECK(file_count("out*") == 0, "%s: leaves an output", list[i].part);
    }
    write_batch("batch", 2, 8, 8, 0.3, 1, NULL);
    succeed("$D grad $V --batch batch --out fine && $D grad $T10 --batch batch --out fine");
}

/* ---- classes ---- */

/* A conditional model learns; its bound is one given the class, which other labels change; its samples come
 * one class a row, or all of one class. */
static void test_classes(void) {
    enum { COUNT = 24, CLASSES = 3, HEAD = 128, SIZE = 12 * 8 };
    static const Refusal list[] = {
        {"small: holds no labels", "$D train $TINY --conditional --out out"},
        {"swirl: holds no labels", "$D train --data swirl --conditional --steps 1 --out out"},
        {"small: holds no labels", "$D eval conditional --data small"},
        {"small: holds no labels", "$D show conditional --data small --out out.png"},
        {"digits: holds labels of 10 classes, the model is for 3", "$D eval conditional --data digits"},
        {"--conditional 0, not 1", "$D train --resume --conditional --out m3"},
        {"conditional 0 with 3 classes", "$D sample unconditional --out out.png"},
        {"classes 300: must be from 1 to 256", "$D sample many --out out.png"},
        {"is [3, 16], expected [4, 16]", "$D sample more --out out.png"},
        {"conditional 1 with 0 classes", "$D sample without --out out.png"},
        {"labels: expected U8 [2]", "$D grad $C --batch unnamed --out out"},
        {"labels[0] is 255, expected a class from 0 to 2", "$D grad $C --batch foreign --out out"},
    };
    static const Refusal wrong[] = {
        {"class 3: the model has 3 classes", "$D sample conditional --class 3 --out out.png"},
        {"class 0: the model has 0 classes", "$D sample good --class 0 --out out.png"},
        {"class '-2'", "$D sample conditional --class -2 --out out.png"},
        {"conditional takes no value", "$D train --conditional=1 --out out"},
    };
    char text[64];
    setenv("C", "tests/golden/diffenc-unet-v-3-classes.checkpoint.safetensors", 1);
    succeed("$D train $TINY --data named --conditional --steps 0 --out c");
    const Outcome before = succeed("$D eval c/checkpoint.safetensors --data named");
    succeed("$D train --resume --lr 0.01 --encoder-lr 1 --steps 40 --sample-steps 2 --out c");
    succeed("cp c/checkpoint.safetensors conditional");
    const Outcome after = say("given the class", "$D eval conditional --data named");
    const double first = number_behind(before.out, "\ntotal "), last = number_behind(after.out, "\ntotal ");
    CHECK(last < 0.9 * first, "with classes: from %.4f to %.4f bpd", first, last);
    metadata_of("conditional", "conditional", text);
    CHECK(strcmp(text, "1") == 0, "a conditional model says so: %s", text);
    metadata_of("conditional", "classes", text);
    CHECK(strcmp(text, "3") == 0, "and of how many classes: %s", text);

    succeed("cp -r named renamed");
    write_file("renamed/t10k-labels-idx1-ubyte", "\0\0\10\1\0\0\0\11\2\2\1\1\0\0\2\1\0", 17);
    const Outcome renamed = succeed("$D eval conditional --data renamed");
    CHECK(number_behind(renamed.out, "\ntotal ") != last, "other labels, the same bound: %s", renamed.out);
    succeed("$D show conditional --data named --count 9 --out show.png");
    succeed("$D show conditional --data renamed --count 9 --out renamed.png");
    CHECK(!same_files("show.png", "renamed.png"), "other labels, the same encoder");

    succeed("$D sample conditional --steps 4 --out all.pgm && head -n 2 all.pgm | grep -qx '82 44'");
    succeed("$D sample conditional --steps 4 --out all.npy");   /* in the order of that grid, 3 rows of 8 */
    unsigned char *all = bytes_of("all.npy", HEAD + COUNT * SIZE);
    for (int class = 0; class < CLASSES; class ++) {
        succeed("$D sample conditional --class %d --count %d --steps 4 --out one.npy", class, COUNT);
        unsigned char *one = bytes_of("one.npy", HEAD + COUNT * SIZE);
        for (int i = HEAD; i < HEAD + COUNT * SIZE; i += SIZE)
            CHECK((memcmp(all + i, one + i, SIZE) == 0) == ((i - HEAD) / SIZE / 8 == class),
                  "class %d, byte %d", class, i);
        free(one);
    }
    free(all);
    succeed("$D sample conditional --trajectory --steps 4 --out way.pgm");
    succeed("$D sample conditional --trajectory --class 1 --count 3 --steps 4 --out one.pgm");
    enum { ROW = 14 * 52 };   /* of x^ at 5 times; below it are those of z_t */
    unsigned char *way = bytes_of("way.pgm", 13 + 6 * ROW), *one = bytes_of("one.pgm", 13 + 6 * ROW);
    for (int i = 0; i < CLASSES; i++)
        CHECK((memcmp(way + 13 + 2 * i * ROW, one + 13 + 2 * i * ROW, ROW) == 0) == (i == 1),
              "trajectory %d is of class %d", i, i);
    free(way), free(one);

    rewrite("conditional", "unconditional", "conditional", "0", NULL);
    rewrite("conditional", "many", "classes", "300", NULL);
    rewrite("conditional", "more", "classes", "4", NULL);
    rewrite("conditional", "without", "classes", "0", NULL);
    rewrite("tests/golden/diffenc-unet-v-3-classes.batch.safetensors", "unnamed", "", "", "labels");
    poison("tests/golden/diffenc-unet-v-3-classes.batch.safetensors", "foreign", "labels");
    refuse_all(1, list, sizeof list);
    refuse_all(2, wrong, sizeof wrong);
}

/* ---- numbers and machines at their end ---- */

/* What cannot go on stops with the step and what was not finite, and the checkpoint before it can be gone on
 * with. */
static void test_divergence(void) {
    static const char *const ways[4] = {"--lr 1e3", "--lr 1e6", "--lr 1e6 --clip 1",
                                        "--lr 1e6 --weight-decay 1e6"};
    for (int i = 0; i < 4; i++) {
        succeed("rm -rf wild");
        const Outcome o = run("$D train $TINY %s --save-every 1 --steps 400 --out wild", ways[i]);
        const char *line = strstr(o.error, "diffenc: ");
        CHECK(o.status == 1 && is_one_line(o.error), "%s: exits with %d: %s", ways[i], o.status, o.error);
        int step = 0, named = 0;
        if (line && sscanf(line, "diffenc: step %d: %n", &step, &named) == 1)
            CHECK(step > 1 && named && strstr(line, " loss is ") &&
                      (strstr(line, "gradient of score.") || strstr(line, "gradient of encoder.")),
                  "%s: does not name the term and the parameter: %s", ways[i], line);
        else
            CHECK(0, "%s: names no step: %s", ways[i], o.error);
        CHECK(is_whole("wild/checkpoint.safetensors"), "%s: the last checkpoint is not finite", ways[i]);
        const long last = step_of("wild/checkpoint.safetensors");
        CHECK(last >= 1 && last < step, "%s: stopped at step %d, the checkpoint is of step %ld", ways[i],
              step, last);
        succeed("$D train --resume --steps 1 --sample-steps 2 --out wild");
    }
}

static void test_memory(void) {
    const double start = seconds_now();
    refuse(1, "MiB of memory, there are",
           "$D train --net flat --channels 1024 --model diffenc-256-2 --out out");
    refuse(1, "MiB of memory, there are",
           "$D train --net flat --channels 1024 --encoder-channels 512 --model diffenc-100-200 --out out");
    CHECK(seconds_now() - start < 5 || SANITIZED, "that takes %.1f seconds", seconds_now() - start);
    CHECK(file_count("out*") == 0, "a directory is made for a training that cannot be");
    if (SANITIZED) {
        printf("skipped: out of memory (a sanitizer needs more than any limit leaves)\n");
        return;
    }
    /* 200 MB of address space are enough for the program but not for this model's vectors or graph. */
    refuse(1, "MiB of memory",
           "ulimit -v 200000; $D train --threads 1 --channels 256 --model vdm-8 --out big");
    refuse(1, "MiB of memory",
           "ulimit -v 200000; $D train --threads 1 --channels 64 --model vdm-8 --out big2");
    CHECK(file_count("big*/checkpoint*") == 0, "part of a checkpoint is left");
}

/* A model whose weights and averages are all 1e30: what comes out is not finite, and no file is left. */
static void test_not_finite(void) {
    static const char *const work[5] = {
        "sample mad --count 2 --steps 3 --out out.png", "eval mad --limit 2 --data small",
        "eval finite mad --limit 2 --data small --csv out --chart out.svg",
        "show mad --count 2 --data small --out out.png", "grad mad --batch mad.batch --out out"};
    static real large[1 << 16], zero[1 << 16];
    TensorFile file = read_tensors("finite");
    for (int i = 0; i < 1 << 16; i++)
        large[i] = (real)(IN_DOUBLE ? 1e200 : 1e30);
    for (int i = 0; i < file.tensor_count; i++)
        file.tensors[i].data = strncmp(file.tensors[i].name, "adam", 4) == 0 ? zero : large;
    write_tensors("mad", &file);
    write_batch("mad.batch", 2, 12, 8, 0.5, 1, NULL);
    for (int i = 0; i < 5; i++) {
        refuse(1, "is not finite", "$D %s", work[i]);
        CHECK(file_count("out*") == 0, "%s: leaves a file", work[i]);
    }
}

/* ---- what comes out ---- */

static void test_images(void) {
    static const char *const others[3] = {"--pixels drawn", "--seed 2", "--sampler deterministic"};
    succeed("$D sample good --count 5 --steps 3 --out pic.pgm");
    for (int i = 0; i < 3; i++)
        succeed("$D sample good --count 5 --steps 3 %s --out pic2.pgm && ! cmp pic.pgm pic2.pgm", others[i]);
    say("1 images, 4 steps", "$D sample finite --count 1 --out pic2.pgm");   /* its T */
}

/* The same five images in every form: all as numbers, each in a file, in a grid, on stdout. */
static void test_forms(void) {
    enum { SIZE = 28 * 28, HEAD = 128 };
    char text[TEXT];
    say("five.npy: 5 images, 3 steps", "$D sample good --count 5 --steps 3 --out five.npy");
    succeed("test $(wc -c <five.npy) = %d && grep -q \"'shape': (5, 28, 28, 1)\" five.npy", HEAD + 5 * SIZE);
    unsigned char *all = bytes_of("five.npy", HEAD + 5 * SIZE);
    succeed("$D sample good --count 5 --steps 3 --out five.pgm");
    unsigned char *grid = bytes_of("five.pgm", 13 + 92 * 62);
    say("each-%02d.pgm: 5 images, 3 steps", "$D sample good --count 5 --steps 3 --out each-%%02d.pgm");
    CHECK(file_count("each-*") == 5, "a file for each");
    for (int i = 0; i < 5; i++) {
        const unsigned char *image = all + HEAD + i * SIZE;
        int same = 1;
        for (int y = 0; y < 28; y++)
            same &= memcmp(grid + 13 + (i / 3 * 30 + 2 + y) * 92 + i % 3 * 30 + 2, image + y * 28, 28) == 0;
        CHECK(same, "image %d of the grid is not that of five.npy", i);
        snprintf(text, sizeof text, "each-%02d.pgm", i);
        unsigned char *one = bytes_of(text, 13 + SIZE);
        CHECK(memcmp(one, "P5\n28 28\n255\n", 13) == 0 && memcmp(one + 13, image, SIZE) == 0,
              "%s is not image %d of five.npy", text, i);
        free(one);
    }
    free(all), free(grid);
    succeed("$D sample good --count 1 --steps 3 --out one.pgm && cmp one.pgm each-00.pgm");
    succeed("$D sample good --count 2 --steps 3 --out %%d.pgm && cmp 0.pgm one.pgm && cmp 1.pgm each-01.pgm");
    succeed("$D sample good --count 2 --steps 1 --out '%%d%%d.png' && test -f '%%d%%d.png'");
    succeed("$D sample good --count 2 --steps 1 --out %%s.png && test -f %%s.png");
    Outcome o = succeed("S='sample good --count 5 --steps 3 --out'; $D $S std.png && $D $S - >std2.png &&"
                        " cmp std.png std2.png");
    CHECK(strcmp(o.error, "-: 5 images, 3 steps\n") == 0, "beside a picture on stdout: %s", o.error);
    o = run("$D sample good --count 1 --steps 1 --out - >/dev/full");
    CHECK(o.status == 1 && strstr(o.error, "standard output: No space left"), "exits with %d: %s", o.status,
          o.error);
    succeed("cp good like-1.png");
    refuse(1, "is the same file as the input", "$D sample like-1.png --count 3 --steps 1 --out like-%%d.png");
    CHECK(same_files("good", "like-1.png"), "a checkpoint was overwritten");
}

/* From noise to images: what the last column shows is what is sampled; as many columns as there are times. */
static void test_trajectory(void) {
    enum { ACROSS = 302, DOWN = 182, HEAD = 15 };
    say("3 images, 12 steps", "$D sample good --trajectory --count 3 --steps 12 --out way.pgm");
    succeed("$D sample good --count 3 --steps 12 --out end-%%d.pgm");
    unsigned char *way = bytes_of("way.pgm", HEAD + ACROSS * DOWN);
    CHECK(memcmp(way, "P5\n302 182\n255\n", HEAD) == 0, "way.pgm begins with %.15s", (char *)way);
    for (int row = 0; row < 6; row++) {
        char name[32];
        snprintf(name, sizeof name, "end-%d.pgm", row / 2);
        unsigned char *end = bytes_of(name, 13 + 28 * 28);
        int apart[2] = {0, 0}; /* in the last column, and in the first */
        for (int i = 0; i < 28 * 28; i++)
            for (int first = 0; first < 2; first++) {
                const int x = 2 + (first ? 0 : 9 * 30) + i % 28, y = 2 + row * 30 + i / 28;
                const int gap = abs(way[HEAD + y * ACROSS + x] - end[13 + i]);
                apart[first] = gap > apart[first] ? gap : apart[first];
            }
        CHECK(apart[0] <= 2 && apart[1] > 50, "row %d is %d levels from the image at the end, %d at first",
              row, apart[0], apart[1]);
        free(end);
    }
    free(way);
    succeed("$D sample good --trajectory --count 3 --steps 12 --threads 3 --out 3.pgm && cmp way.pgm 3.pgm");
    char head[TEXT];
    succeed("$D sample finite --trajectory --out short.pgm");   /* 5 times of 12x8 images, by default 8 */
    read_text("short.pgm", head);
    CHECK(strncmp(head, "P5\n52 226\n255\n", 14) == 0, "a trajectory of 4 steps: %.14s", head);

    /* 40 frames of 2 by 2 images, the last one 12 times more; read by a program that no one here wrote. */
    enum { FRAME = 62 * 62, FRAMES = 52 };
    succeed("$D sample good --trajectory --count 4 --steps 50 --out way.apng");
    unsigned char *png = bytes_of("way.apng", 45);
    CHECK(memcmp(png + 37, "acTL\0\0\0\64", 8) == 0, "way.apng has no %d frames", FRAMES);
    free(png);
    if (run("command -v ffmpeg").status) {
        printf("skipped: an animation of samples read by ffmpeg (there is none)\n");
        return;
    }
    succeed("ffmpeg -v error -nostdin -i way.apng -pix_fmt gray -f rawvideo way.raw &&"
            " test $(wc -c <way.raw) = %d && $D sample good --count 4 --steps 50 --out four.pgm",
            FRAME * FRAMES);
    unsigned char *raw = bytes_of("way.raw", FRAME * FRAMES), *four = bytes_of("four.pgm", 13 + FRAME);
    int apart = 0;
    for (int i = 0; i < FRAME; i++)
        apart = (int)fmax(abs(raw[39 * FRAME + i] - four[13 + i]), apart);
    CHECK(apart <= 2, "the animation ends %d levels from the samples", apart);
    CHECK(memcmp(raw, raw + 39 * FRAME, FRAME) != 0 &&
              memcmp(raw + 38 * FRAME, raw + 39 * FRAME, FRAME) != 0 &&
              memcmp(raw + 39 * FRAME, raw + 51 * FRAME, FRAME) == 0,
          "the animation does not hold its last image");
    free(raw), free(four);
}

/* How many values in panel `column` of a row of two are not those of points; with lines, how many are darker:
 * lines only brighten. */
static int panel_differs(const char *name, int column, const unsigned char *points, int count, int lines) {
    enum { PANEL = 512, GAP = 2, WIDTH = 2 * PANEL + 3 * GAP, HEIGHT = PANEL + 2 * GAP, HEAD = 16 };
    static const unsigned char colour[3] = {255, 200, 90};
    unsigned char *file = bytes_of(name, HEAD + 3 * WIDTH * HEIGHT);
    unsigned char *want = allocate_zeroed(1, 3 * PANEL * PANEL);
    lines_draw(want, PANEL, points, points, count, PANEL / 400.0, colour);
    int differ = memcmp(file, "P6\n1030 516\n255\n", HEAD) != 0;
    for (int i = 0; i < 3 * PANEL * PANEL; i++) {
        const int y = GAP + i / 3 / PANEL, x = GAP + column * (PANEL + GAP) + i / 3 % PANEL;
        const int value = file[HEAD + 3 * (y * WIDTH + x) + i % 3];
        differ += lines ? value < want[i] : value != want[i];
    }
    free(file), free(want);
    return differ;
}

/* Points instead of images: data beside samples; and where the encoder moves them, at first nowhere and in
 * the end, where there is only alpha_1^2 x, into the middle. */
static void test_swirl(void) {
    unsigned char data[2 * 50];
    Dataset swirl;
    Error error;
    CHECK(dataset_open(&swirl, "swirl", SPLIT_TEST, 1, &error) == 0, "%s", error.text);
    for (int i = 0; i < 50; i++)
        dataset_image(&swirl, (uint32_t)i * swirl.count / 50, data + 2 * i);
    dataset_close(&swirl);
    succeed("$D train $TINY --data swirl --model diffenc-1-nt --steps 2 --eval-every 1 --out points &&"
            " cp points/checkpoint.safetensors swirl");
    unsigned char *png = bytes_of("points/samples-2.png", 26);
    CHECK(memcmp(png + 16, "\0\0\4\6\0\0\2\4\10\2", 10) == 0, "the points of a training are no 1030x516");
    free(png);
    say("5 test images of swirl", "$D eval swirl --limit 5");
    succeed("$D sample swirl --count 50 --steps 5 --out swirl.ppm");
    succeed("$D sample swirl --count 50 --steps 5 --out swirl.npy");
    unsigned char *samples = bytes_of("swirl.npy", 128 + 2 * 50);
    CHECK(panel_differs("swirl.ppm", 0, data, 50, 0) == 0, "the data are not on the left");
    CHECK(panel_differs("swirl.ppm", 1, samples + 128, 50, 0) == 0, "the samples are not on the right");
    free(samples);
    say("50 points", "$D show swirl --count 50 --times 0,1 --out swirl.ppm");
    CHECK(panel_differs("swirl.ppm", 0, data, 50, 1) == 0 && panel_differs("swirl.ppm", 0, data, 50, 0) < 500,
          "x_t at t = 0 is not x, or there are lines that lead away");
    for (int i = 0; i < 100; i++)
        data[i] = (unsigned char)nearest_level((2 * (data[i] + 0.5) / 256 - 1) / (1 + exp(5)));
    CHECK(panel_differs("swirl.ppm", 1, data, 50, 1) == 0, "x_t at t = 1 is not alpha_1^2 x");
    CHECK(panel_differs("swirl.ppm", 1, data, 50, 0) > 5000, "there are no lines from x to x_t");
    succeed("$D sample swirl --trajectory --count 9 --steps 3 --out way.ppm &&"
            " head -n 2 way.ppm | grep -qx '2058 1030'");
    refuse(1, "holds grey images only", "$D sample swirl --count 1 --out swirl.pgm");
    refuse(1, "written as .npy only", "$D sample swirl --steps 1000000 --out point-%%d.png");   /* at once */
}

/* Nine times across; two images of three rows each. What nt shows can be computed by hand: x_t = alpha_t^2 x,
 * where the first pixel of the first image is black, -255/256. */
static void test_show(void) {
    static const char *const kinds[2] = {"diffenc-1-nt", "diffenc-1-1"};
    char text[TEXT];
    double steepest = 0, before = 1;
    int at = 0;
    for (int column = 0; column < 9; column++) {
        const double alpha_squared = 1 / (1 + exp(-13.3 + 18.3 * column / 8)),
                     change = 8 * (before - alpha_squared);
        if (change > steepest)
            steepest = change, at = column;
        before = alpha_squared;
    }
    for (int i = 1; i >= 0; i--) {
        succeed("$D train $TINY --model %s --steps 1 --out show-%s", kinds[i], kinds[i]);
        const Outcome o = succeed(
            "$D show show-%s/checkpoint.safetensors --data small --count 2 --out show%d.ppm", kinds[i], i);
        snprintf(text, sizeof text, "show%d.ppm", i);
        read_text(text, text);
        CHECK(strncmp(text, "P6\n92 86\n255\n", 13) == 0, "show%d.ppm begins with %.20s", i, text);
        if (i == 0)
            CHECK(fabs(number_behind(o.out, ", blue -") / (steepest * 255 / 256) - 1) < 1e-3 &&
                      number_behind(o.out, ", blue -") == number_behind(o.out, " .. red +"),
                  "expected a scale of %g: %s", steepest * 255 / 256, o.out);
    }
    CHECK(!same_files("show0.ppm", "show1.ppm"), "nt and DiffEnc are the same picture");
    /* The first pixel of a picture: x_t at t = 0, y = 0, and its change, which is white at first. */
    static const unsigned char want[4][3] = {{0, 0, 0}, {128, 128, 128}, {255, 255, 255}, {255, 0, 0}};
    for (int i = 0; i < 4; i++) {
        const int row = 2 + 14 * (i < 2 ? i : 2), column = 2 + 10 * (i < 3 ? 0 : at);
        const unsigned char *rgb = (const unsigned char *)text + 13 + 3 * (row * 92 + column);
        CHECK(memcmp(rgb, want[i], 3) == 0, "pixel %d of nt is %d, %d, %d", i, rgb[0], rgb[1], rgb[2]);
    }
    say(" of 4 images", "$D show finite --data small --out show.ppm");   /* where there are no labels */
    /* Nine images of three classes: the first of class 0 is image 3, which begins with 3 * 96 * 7 mod 256. */
    succeed("cp -r small labelled");
    write_file("labelled/t10k-labels-idx1-ubyte", "\0\0\10\1\0\0\0\11\2\2\1\0\0\1\0\0\0", 17);
    say(" of 3 images", "$D show finite --data labelled --times 0 --out show.ppm");
    read_text("show.ppm", text);
    CHECK(memcmp(text + 14 + 3 * (2 * 12 + 2), "\340\340\340", 3) == 0, "one of each class");
    const Outcome o = succeed("$D show finite --data small --count 2 --times 0.25,1 --out show.ppm");
    const Outcome amplified =
        succeed("$D show finite --data small --count 2 --times=0.25,1 --amplify 4 --out show4.ppm");
    read_text("show.ppm", text);
    CHECK(strncmp(text, "P6\n22 86\n255\n", 13) == 0, "two times across: %.20s", text);
    CHECK(strstr(o.out, "columns t = 0.25,1,") && !same_files("show.ppm", "show4.ppm") &&
              fabs(number_behind(amplified.out, "red +") * 4 / number_behind(o.out, "red +") - 1) < 1e-3,
          "amplified by 4: %s%s", o.out, amplified.out);
    succeed("$D show finite --data small --count 2 --times 0.25,1 --threads 3 --out show4.ppm");
    CHECK(same_files("show.ppm", "show4.ppm"), "3 threads show another picture");
}

static void test_eval(void) {
    static const char *const terms[4] = {"\nrecon ", "\nlatent ", "\ndiffusion ", "\ntotal "};
    Outcome o = say("8 test images of digits", "$D eval good --limit 8");
    double value[4];
    for (int i = 0; i < 4; i++) {
        value[i] = number_behind(o.out, terms[i]);
        const char *at = strstr(o.out, terms[i]), *sign = at ? strstr(at, " +- ") : NULL;
        CHECK(isfinite(value[i]) && sign && sign < at + 1 + strcspn(at + 1, "\n"), "eval tells%s: %s",
              terms[i], o.out);
    }
    /* Four numbers of five decimals each. */
    CHECK(fabs(value[0] + value[1] + value[2] - value[3]) < 3e-5, "the total is the sum: %s", o.out);
    o = say("8 training images of digits", "$D eval good --limit 8 --split train --seed 3");
    CHECK(number_behind(o.out, terms[3]) != value[3], "%s", o.out);
    o = succeed("$D eval good --limit 8 --timesteps 5 --variance-ratio optimal");
    const double plain = number_behind(o.out, "\ntotal:"),
                 best = number_behind(o.out, "with sigma_P = sigma_Q,");
    const char *total = strstr(o.out, "\ntotal:");
    CHECK(total && plain >= number_behind(total, "sigma_Q,") && best <= plain, "the best bound is none: %s",
          o.out);
    succeed("$D eval finite --data small --limit 2");
    succeed("$D eval finite --data small --limit 2 --timesteps 0");
    /* A step's KL is d/2 (w - 1 - log w) more than w times the one at w = 1: here for 3 steps, in bits. */
    o = succeed("$D eval good --limit 2 --timesteps 3");
    const Outcome half = succeed("$D eval good --limit 2 --timesteps 3 --variance-ratio 0.5");
    const double want = number_behind(o.out, terms[2]) / 2 + 1.5 * (log(2) - 0.5) / log(2);
    CHECK(fabs(number_behind(half.out, terms[2]) - want) < 2e-5, "w = 0.5: not %.5f: %s", want, half.out);
}

/* A limit takes images evenly over the split: of nine the first, the fourth and the seventh. */
static void test_limit(void) {
    succeed("mkdir few && cp small/train* few && {"
            " printf '\\0\\0\\10\\3\\0\\0\\0\\3\\0\\0\\0\\14\\0\\0\\0\\10'; for i in 0 3 6; do"
            " tail -c +$((17 + 96 * i)) small/t10k-images-idx3-ubyte | head -c 96; done; }"
            " >few/t10k-images-idx3-ubyte");
    const Outcome three = succeed("$D eval finite --data small --limit 3 | tail -n +2"),
                  few = succeed("$D eval finite --data few | tail -n +2"),
                  all = succeed("$D eval finite --data small | tail -n +2");
    CHECK(strstr(few.out, "total") && strcmp(three.out, few.out) == 0 && strcmp(three.out, all.out) != 0,
          "--limit 3: %s, the three images: %s", three.out, few.out);
    succeed("for data in small few; do"
            " $D train $TINY --data $data --steps 1 --eval-every 1 --eval-limit 3 --out limit-$data &&"
            " tail -n 1 limit-$data/log.csv | cut -d, -f7,8 >$data.bound || exit 1; done;"
            " grep -q ..., few.bound && cmp small.bound few.bound");
}

/* The numbers of a line that `eval --csv` wrote: four terms, their errors, the difference and its error. */
static void csv_line(const char *name, int line, double value[10]) {
    char text[TEXT];
    read_text(name, text);
    const char *at = text;
    for (int i = 0; i <= line && at; i++)
        at = strchr(at, '\n') ? strchr(at, '\n') + 1 : NULL;
    for (int i = 0; i < 10; i++) {
        at = at ? strchr(at, ',') : NULL;
        value[i] = at ? strtod(++at, NULL) : NAN;
    }
    CHECK(isfinite(value[9]), "%s has no line %d: %s", name, line, text);
}

/* Two-sided p of Student's t by plain sums: with t = sqrt(freedom) tan(angle) the density is
 * cos(angle)^(freedom - 1). */
static double student_p(double t, double freedom) {
    enum { STEPS = 200000 };
    double inside = 0, all = 0;
    for (int i = 0; i < STEPS; i++) {
        const double angle = 2 * atan(1) * (i + 0.5) / STEPS, density = pow(cos(angle), freedom - 1);
        all += density;
        inside += angle < atan(fabs(t) / sqrt(freedom)) ? density : 0;
    }
    return 1 - inside / all;
}

static int is_xml(const char *name) {
    return run("if command -v xmllint; then xmllint --noout %s\n"
               "else ! command -v python3 || python3 -c 'import xml.dom.minidom as d; d.parse(\"%s\")'; fi",
               name, name)
               .status == 0;
}

/* Trainings of a few steps: three seeds of a DiffEnc, two of a VDM, two of the same at another rate, and a
 * third seed of it at another step. */
static void test_comparison(void) {
    static const char *const ways[8] = {
        "a1 --seed 1", "a2 --seed 2", "a3 --seed 3", "b1 --seed 1 --model vdm-1", "b2 --seed 2 --model vdm-1",
        "c1 --seed 1 --model vdm-1 --lr 0.01", "c2 --seed 2 --model vdm-1 --lr 0.01",
        "b3 --seed 3 --model vdm-1 --steps 3"};
    double all[10][10], one[10];
    for (int i = 0; i < 8; i++)
        succeed("$D train $TINY --lr 0.03 --steps 4 --out c-%s && cp c-%.2s/checkpoint.safetensors %.2s",
                ways[i], ways[i], ways[i]);
    const Outcome o =
        say("9 test images of small, EMA weights",
            "$D eval --csv all.csv a1 a2 --data=small a3 b1 b2 --repeats 2 c1 c2 b3 a2 a1 --chart all.svg");
    for (int i = 0; i < 10; i++) {
        csv_line("all.csv", i, all[i]);
        succeed("$D eval %.2s --data small --repeats 2 --csv one.csv", i < 8 ? ways[i] : i < 9 ? "a2" : "a1");
        csv_line("one.csv", 0, one);
        CHECK(memcmp(all[i], one, 8 * sizeof *one) == 0,
              "line %d of the table is not that of the checkpoint alone", i);
        CHECK(fabs(all[i][8] - (all[i][3] - all[0][3])) < 1e-7, "line %d: the difference is %g", i,
              all[i][8]);
    }
    CHECK(all[9][8] == 0 && all[9][9] == 0, "a checkpoint differs from itself by %g +- %g", all[9][8],
          all[9][9]);
    CHECK(run("grep -qx 'b3,.*,vdm-1,3,3' all.csv").status == 0, "the table lacks model, seed or step");

    /* Of two images the error is half their distance, so paired errors are sums or differences of errors. */
    succeed("$D eval a1 b1 --data small --limit 2 --csv 'two,\"2\".csv' && cp two* two.csv");
    csv_line("two.csv", 0, all[7]);
    csv_line("two.csv", 1, one);
    CHECK(fabs(one[9] - fabs(one[7] - all[7][7])) < 1e-6 || fabs(one[9] - one[7] - all[7][7]) < 1e-6,
          "errors of %g and %g, paired %g", all[7][7], one[7], one[9]);
    CHECK(one[9] != hypot(one[7], all[7][7]) && one[9] > 0, "the error of the difference is not paired");
    succeed("ln -s good 'go,\"o\"d' && $D eval 'go,\"o\"d' --limit 1 --csv one.csv &&"
            " grep -q '^\"go,\"\"o\"\"d\",' one.csv");

    /* The groups: a of three seeds, b and c of two; a1 and a2 again and b3 of another step count for none. */
    const char *at = o.out;
    for (int i = 0; i < 3; i++) {
        const int first = i == 0 ? 0 : 2 * i + 1, seeds = i == 0 ? 3 : 2;
        double mean = 0, square = 0;
        for (int k = first; k < first + seeds; k++)
            mean += all[k][3] / seeds;
        for (int k = first; k < first + seeds; k++)
            square += (all[k][3] - mean) * (all[k][3] - mean);
        all[i][4] = mean, all[i][5] = sqrt(square / (seeds - 1) / seeds);
        char want[64];
        snprintf(want, sizeof want, "%9.5f +- %.5f  %.1s1\n", all[i][4], all[i][5], &"abc"[i]);
        at = strstr(at, "mean over ");
        CHECK(at && strtol(at + 10, NULL, 10) == seeds && strstr(at, want), "group %d, expected %s in: %s", i,
              want, o.out);
        at = at ? at + 1 : o.out;
    }
    CHECK(!strstr(at, "mean over"), "more groups than three: %s", o.out);
    for (int i = 0; i < 3; i++) {
        static const int pair[3][2] = {{0, 1}, {0, 2}, {1, 2}};
        static const char *const titles[3] = {"t-test: b1 minus a1", "t-test: c1 minus a1",
                                              "t-test: c1 minus b1"};
        const int p = pair[i][0], q = pair[i][1];
        const double u = all[p][5] * all[p][5], v = all[q][5] * all[q][5],
                     t = (all[q][4] - all[p][4]) / sqrt(u + v),
                     freedom = (u + v) * (u + v) / (u * u / (p == 0 ? 2 : 1) + v * v);
        at = strstr(o.out, titles[i]);
        const char *total = at ? strstr(at, "\ntotal ") : NULL;
        CHECK(total && fabs(number_behind(total, " t ") - t) < 1e-3 * fabs(t) + 1e-4 &&
                  fabs(number_behind(total, ", ") - freedom) < 0.006 &&
                  fabs(number_behind(total, ", p ") - student_p(t, freedom)) < 1e-3,
              "%s: expected t %.4f, %.2f degrees, p %.4f: %s", titles[i], t, freedom, student_p(t, freedom),
              o.out);
    }
    CHECK(at && strstr(at, "\nlatent       0.00000  no spread over the seeds\n"),
          "a VDM's latent loss does not depend on its weights: %s", o.out);
    CHECK(is_xml("all.svg") &&
              run("test $(grep -c '>a1</text>' all.svg) = 6 && test $(grep -c '>b1</text>' all.svg) = 2")
                      .status == 0,
          "all.svg is no XML, or has not two charts of all and one of DiffEnc");
    succeed("$D eval good --limit 3 --chart vdm.svg && ! grep -q counterterm vdm.svg");
    CHECK(is_xml("vdm.svg"), "vdm.svg is no XML");
}

static void test_colour(void) {
    char text[TEXT];
    succeed("mkdir cifar");
    write_cifar("cifar/data_batch_1.bin", 5);
    write_cifar("cifar/test_batch.bin", 3);
    say("diffenc: cifar: holds 5 images, all five batches 50000\nstep 1",
        "$D train $TINY --data cifar --steps 1 --eval-every 1 --out colours");
    succeed("$D sample colours/checkpoint.safetensors --count 2 --steps 2 --out colour.ppm");
    read_text("colour.ppm", text);
    CHECK(strncmp(text, "P6\n70 36\n255\n", 13) == 0, "colour.ppm begins with %.20s", text);
    say("3 test images of ", "$D eval colours/checkpoint.safetensors --data cifar");
    succeed("cp colours/checkpoint.safetensors colour");
    succeed("$D show colour --data cifar --times 0 --count 1 --out colour.ppm");
    read_text("colour.ppm", text);
    CHECK(memcmp(text, "P6\n36 104\n255\n", 14) == 0 &&
              memcmp(text + 14 + 3 * (2 * 36 + 2), "\7\21\33", 3) == 0,
          "x_t at t = 0 is not in the colours of x");
}

/* ---- all ---- */

/* Images of 12 by 8 pixels, so few that an epoch ends within two steps, and the checkpoints that the tests of
 * bad input and of output start from. */
static void make_models(void) {
    succeed("mkdir small");
    write_idx("small/train-images-idx3-ubyte", 0x803, 7, 12, 8, 7 * 12 * 8);
    write_idx("small/t10k-images-idx3-ubyte", 0x803, 9, 12, 8, 9 * 12 * 8);
    succeed("cp -r small named");   /* the same, of 3 classes */
    write_file("named/train-labels-idx1-ubyte", "\0\0\10\1\0\0\0\7\0\1\2\0\1\2\0", 15);
    write_file("named/t10k-labels-idx1-ubyte", "\0\0\10\1\0\0\0\11\1\1\0\0\2\2\1\0\2", 17);
    succeed("$D train $TINY --data digits --model vdm-1 --steps 1 --out m1 && cp "
            "m1/checkpoint.safetensors good");
    succeed("$D train $TINY --model vdm-2 --steps 0 --out m2 && cp m2/checkpoint.safetensors deep");
    succeed("$D train $TINY --timesteps 4 --steps 1 --out m3 && cp m3/checkpoint.safetensors finite");
}

int main(void) {
    static const int signals[4] = {SIGINT, SIGTERM, SIGHUP, SIGPIPE};
    char directory[] = "/tmp/test_main.XXXXXX";
    for (int i = 0; i < 4; i++)   /* what nohup or a shell's & has switched off would stop no training */
        signal(signals[i], SIG_DFL);
    if (!mkdtemp(directory)) {
        perror(directory);
        return 1;
    }
    const char *program = getenv("DIFFENC");
    char tiny[PATH], top[PATH], path[PATH + 16];
    if (!getcwd(top, sizeof top) || !realpath(program ? program : "diffenc", path)) {
        perror("the program");
        return 1;
    }
    setenv("W", directory, 1);
    setenv("D", path, 1);
    setenv("TOP", top, 1);
    setenv("V", "tests/golden/vdm-flat-v.checkpoint.safetensors", 1);
    setenv("VB", "tests/golden/vdm-flat-v.batch.safetensors", 1);
    setenv("T10", "tests/golden/nt-flat-eps-T10.checkpoint.safetensors", 1);
    snprintf(path, sizeof path, "%s/tests", top);
    if (chdir(directory) || symlink(path, "tests")) {
        perror(directory);
        return 1;
    }
    snprintf(tiny, sizeof tiny,
             "--data %s/small --net unet --model diffenc-1-1 --channels 4 --encoder-channels 4 --batch 4"
             " --sample-steps 2 --warmup 0 --cooldown 0", directory);
    setenv("TINY", tiny, 1);
    setenv("LC_ALL", "C", 1);
    /* Threads that spin while they wait slow down tests on a busy machine. */
    setenv("OMP_WAIT_POLICY", "passive", 0);
    static const struct { const char *name; void (*run)(void); } tests[] = {
        {"golden", test_golden}, {"help", test_help}, {"models", make_models}, {"usage", test_wrong_usage},
        {"resume", test_resume}, {"learning", test_learning}, {"steps 0", test_steps_0},
        {"settings", test_changed_settings}, {"changed data", test_changed_data},
        {"kept checkpoints", test_kept_checkpoints}, {"init and info", test_init_and_info},
        {"images", test_images}, {"forms", test_forms}, {"trajectory", test_trajectory},
        {"swirl", test_swirl}, {"show", test_show}, {"eval", test_eval}, {"limit", test_limit},
        {"comparison", test_comparison}, {"colour", test_colour}, {"data", test_bad_data},
        {"checkpoints", test_bad_checkpoints}, {"batches", test_bad_batches}, {"classes", test_classes},
        {"divergence", test_divergence}, {"memory", test_memory}, {"file limit", test_file_limit},
        {"small disk", test_small_disk}, {"directory", test_no_directory}, {"stop", test_stops},
        {"report", test_report_html}, {"stop anywhere", test_stops_anywhere}, {"two", test_two_trainings},
        {"strangers", test_strangers_files}, {"same", test_output_is_input}, {"stranger", test_stranger},
        {"not finite", test_not_finite}, {"stacks", test_small_stacks}, {"makefile", test_makefile},
        {"thread count", test_thread_count}, {"second signal", test_second_signal},
        {"terminal", test_terminal}, {"kill", test_kill}};
    for (size_t i = 0; i < sizeof tests / sizeof tests[0]; i++) {
        const double start = seconds_now();
        const char *only = getenv("ONLY");   /* names of tests, to run them alone */
        if (only && !strstr(only, tests[i].name) && tests[i].run != make_models)
            continue;
        tests[i].run();
        if (getenv("VERBOSE"))
            printf("%s: %.1f s\n", tests[i].name, seconds_now() - start);
    }
    if (file_count("disk/checkpoint*"))
        run("umount $W/disk");
    if (!getenv("KEEP"))
        run("rm -rf $W");
    return test_report();
}
