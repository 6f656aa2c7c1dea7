/* data.c - files in and out: gzip, PNG, PGM, PPM, NumPy, MNIST, CIFAR-10, built-in data, charts, safetensors.
 *
 * The parsers face files from strangers. Three rules make it easy to see that they are safe: memory is asked
 * for only after the file was seen to hold what it promises; every read goes through one bounded cursor; and
 * a file that is not exactly right is refused with one line: what was found and what was expected. */

#define _XOPEN_SOURCE 700   /* POSIX of 2008 with realpath */

#include "diffenc.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <libgen.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- reading bytes ---- */

/* What is being read and how far. The first failure is kept in `error`; after it bytes are zeros and lists
 * are at their end, so that a parser asks for `failed` only where it would loop or write. */
typedef struct {
    const unsigned char *data;
    size_t size, at;
    const char *name, *part;   /* of the file; what `at` counts in, for messages, or NULL */
    Error *error;
    int failed;        /* -1; or 1 where inflating has stopped, since `most` bytes are there */
    unsigned bits;     /* gzip: what is left of the last byte, with a 1 above it */
    Bytes out;         /* gzip: what came out, of which this member began at `member` */
    size_t member;
    uint64_t most;
} Cursor;

/* Fail with this message unless the condition holds. Returns whether all is well so far. */
static int require(Cursor *c, int condition, const char *format, ...) {
    char what[400], place[64] = "";
    if (c->failed || condition)
        return !c->failed;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    if (c->part)
        snprintf(place, sizeof place, " (%s byte %zu)", c->part, c->at);
    c->failed = fail(c->error, "%s: %s%s", c->name, what, place);
    return 0;
}

/* The same for a call of the system, whose reason is in errno. */
static int require_call(Cursor *c, int condition) {
    return require(c, condition, "%s", strerror(errno ? errno : EIO));
}

static unsigned take_byte(Cursor *c) {
    return require(c, c->at < c->size, "is truncated") ? c->data[c->at++] : 0;
}

static uint64_t take_little_endian(Cursor *c, int bytes) {
    uint64_t value = 0;
    for (int b = 0; b < bytes; b++)
        value |= (uint64_t)take_byte(c) << 8 * b;
    return value;
}

/* `memory` with room for `size` bytes; as it was, if there is not enough and the reading has failed. */
static void *resize(Cursor *c, void *memory, size_t size) {
    void *resized = c->failed ? NULL : realloc(memory, size ? size : 1);
    require(c, resized != NULL, "out of memory, needs %zu bytes", size);
    return resized ? resized : memory;
}

/* Room for one more item, by powers of two: memory stays in proportion to what was really read. */
static void *array_grow(Cursor *c, void *array, size_t count, size_t size) {
    return count & (count - 1) ? array : resize(c, array, (count ? 2 * count : 1) * size);
}

/* The CRC-32 of gzip and PNG; `crc` is that of the bytes before, or 0. */
static uint32_t crc_32(uint32_t crc, const unsigned char *data, size_t size) {
    crc = ~crc;
    for (size_t bit = 0; bit < 8 * size; bit++)
        crc = crc >> 1 ^ ((crc ^ data[bit / 8] >> bit % 8) & 1 ? 0xedb88320 : 0);
    return ~crc;
}

/* ---- gzip ---- */

/* A prefix code (RFC 1951, 3.2.2): how many symbols there are by length of code, and all in order of code. */
typedef struct {
    int count[16], symbol[288];
} PrefixCode;

static unsigned take_bits(Cursor *c, int count) {
    unsigned value = 0;
    for (int i = 0; i < count; i++, c->bits >>= 1) {
        c->bits = c->bits > 1 ? c->bits : 0x100 | take_byte(c);
        value |= (c->bits & 1) << i;
    }
    return value;
}

static void put_byte(Cursor *c, unsigned byte) {
    if (!c->failed && c->out.size == c->most)
        c->failed = 1;
    c->out.data = array_grow(c, c->out.data, c->out.size, 1);
    if (!c->failed)
        c->out.data[c->out.size++] = (unsigned char)byte;
}

/* Make a code from lengths[count] in 0..15. Only a code of one bit, or of none, may be incomplete. */
static void make_code(Cursor *c, PrefixCode *code, const unsigned char *lengths, int count, int allow_one) {
    int unused = 1, used = 0;
    memset(code, 0, sizeof *code);
    for (int length = 1; length <= 15; length++) {
        for (int i = 0; i < count; i++)
            if (lengths[i] == length) {
                code->symbol[used++] = i;
                code->count[length]++;
            }
        unused = 2 * unused - code->count[length];   /* once it is below 0 it stays there */
    }
    allow_one = allow_one && used <= 1 && used == code->count[1];
    require(c, unused == 0 || allow_one, "has an %s code", unused < 0 ? "over-subscribed" : "incomplete");
}

static int take_symbol(Cursor *c, const PrefixCode *code) {
    int beyond = 0, shorter = 0;   /* the first code of this length, by so much; number of shorter codes */
    for (int length = 1; length <= 15; length++) {
        beyond = 2 * beyond + (int)take_bits(c, 1);
        if (beyond < code->count[length])
            return code->symbol[shorter + beyond];
        beyond -= code->count[length];
        shorter += code->count[length];
    }
    return require(c, 0, "has an invalid code");
}

/* The two codes of a block: fixed, or sent as lengths that have a code themselves (3.2.6, 3.2.7). */
static void take_codes(Cursor *c, int is_fixed, PrefixCode *literal, PrefixCode *distance) {
    static const unsigned char order[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    unsigned char lengths[286 + 30 + 138] = {0};   /* a run may begin at the last of them */
    int literals = 288, all = 288 + 32;
    for (int i = 0; is_fixed && i < all; i++)
        lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : i < 288 ? 8 : 5;
    if (!is_fixed) {
        literals = 257 + (int)take_bits(c, 5);
        all = literals + 1 + (int)take_bits(c, 5);
        require(c, literals <= 286 && all - literals <= 30, "has more codes than there are symbols");
        for (int i = 0, count = 4 + (int)take_bits(c, 4); i < count; i++)
            lengths[order[i]] = (unsigned char)take_bits(c, 3);
        make_code(c, literal, lengths, 19, 0);
    }
    for (int i = 0, run = 1; !is_fixed && i < all && !c->failed; i += run) {
        const int symbol = take_symbol(c, literal);
        require(c, symbol != 16 || i > 0, "repeats a code length before the first");
        run = symbol < 16 ? 1 : symbol < 18 ? 3 + (int)take_bits(c, symbol - 14) : 11 + (int)take_bits(c, 7);
        memset(lengths + i, symbol < 16 ? symbol : symbol == 16 && i > 0 ? lengths[i - 1] : 0, (size_t)run);
        require(c, i + run <= all, "has more code lengths than codes");
    }
    require(c, lengths[256], "has no code for the end of a block");
    make_code(c, literal, lengths, literals, !is_fixed);
    make_code(c, distance, lengths + literals, all - literals, !is_fixed);
}

/* Lengths and distances are sent as small floating-point numbers: `symbol` counts 2^fine steps to a doubling,
 * further bits of the stream choose within a step (the tables of RFC 1951, 3.2.5). */
static size_t take_scaled(Cursor *c, int symbol, int fine) {
    const int steps = 1 << fine, more = (symbol >> fine) - 1;
    return more < 0 ? (size_t)symbol : ((size_t)(steps + symbol % steps) << more) + take_bits(c, more);
}

static void inflate_block(Cursor *c, unsigned type) {
    PrefixCode literal, distance;
    require(c, type < 3, "has a block of unknown type");
    if (type == 0) {
        c->bits = 0;   /* the rest of a byte is padding */
        const uint64_t length = take_little_endian(c, 2);
        require(c, take_little_endian(c, 2) == (length ^ 0xffff), "has a stored block of two lengths");
        for (uint64_t i = 0; i < length && !c->failed; i++)
            put_byte(c, take_byte(c));
        return;
    }
    take_codes(c, type == 1, &literal, &distance);
    for (int symbol = 0; symbol != 256 && !c->failed;) {
        symbol = take_symbol(c, &literal);
        if (symbol < 256)
            put_byte(c, (unsigned)symbol);
        if (symbol <= 256)
            continue;
        require(c, symbol <= 285, "has an invalid length");
        const size_t length = symbol < 285 ? 3 + take_scaled(c, symbol - 257, 2) : 258;
        const int step = take_symbol(c, &distance);
        require(c, step <= 29, "has an invalid distance");
        const size_t back = c->failed ? 0 : 1 + take_scaled(c, step, 1);
        require(c, back <= c->out.size - c->member, "has a distance that is too far back");
        /* Byte by byte: the copy may overlap its source, and then the bytes just written repeat. */
        for (size_t i = 0; i < length && !c->failed; i++)
            put_byte(c, c->out.data[c->out.size - back]);
    }
}

/* One member (RFC 1952, 2.3): header, deflate blocks, CRC-32 and length of what came out. */
static void inflate_member(Cursor *c) {
    enum { HEADER_CRC = 2, EXTRA = 4, NAME = 8, COMMENT = 16 };
    const unsigned char *header = c->data + c->at, *other = c->data;
    require(c, take_byte(c) == 0x1f && take_byte(c) == 0x8b,
            header > other ? "has trailing garbage" : "is not gzip");
    require(c, take_byte(c) == 8, "has an unknown compression method");
    const unsigned flags = take_byte(c);
    require(c, flags < 32, "has unknown flags");
    take_little_endian(c, 6);   /* time, hints, system */
    for (uint64_t extra = flags & EXTRA ? take_little_endian(c, 2) : 0; extra > 0; extra--)
        take_byte(c);
    for (unsigned text = NAME; text <= COMMENT; text *= 2)
        while ((flags & text) && take_byte(c)) { }
    const uint64_t crc = crc_32(0, header, (size_t)(c->data + c->at - header)) & 0xffff;
    require(c, !(flags & HEADER_CRC) || take_little_endian(c, 2) == crc, "has a header of a wrong CRC");
    c->member = c->out.size;
    for (unsigned last = 0; !last && !c->failed;) {
        last = take_bits(c, 1);
        inflate_block(c, take_bits(c, 2));
    }
    c->bits = 0;
    const size_t size = c->out.size - c->member;
    require(c, c->failed || take_little_endian(c, 4) == crc_32(0, c->out.data + c->member, size),
            "has a wrong CRC");
    require(c, take_little_endian(c, 4) == (size & 0xffffffff), "has a wrong length");
}

int gzip_inflate(const unsigned char *data, size_t size, const char *name, uint64_t most, Bytes *out,
                 Error *error) {
    Cursor c = {.data = data, .size = size, .name = name, .part = "gzip", .error = error, .most = most};
    c.out.data = allocate(1, 1);
    require(&c, size > 0, "is empty, expected a gzip stream");
    while (!c.failed && c.at < size) {
        inflate_member(&c);
        while (c.at < size && data[c.at] == 0)   /* padding, as on tapes */
            c.at++;
    }
    if (c.failed < 0) {
        free(c.out.data);
        c.out = (Bytes){NULL, 0};
    }
    *out = c.out;
    return c.failed < 0 ? -1 : 0;
}

/* ---- files ---- */

/* The first `most` bytes of a file, or all. Pipes may block and /dev/zero never ends: both are refused. */
static int file_bytes(const char *path, uint64_t most, Bytes *bytes, Error *error) {
    Cursor c = {.name = path, .error = error};
    struct stat status = {0};
    *bytes = (Bytes){NULL, 0};
    require_call(&c, stat(path, &status) == 0);
    require(&c, !S_ISDIR(status.st_mode), "is a directory, expected a file");
    require(&c, S_ISREG(status.st_mode), "is a device or a pipe, expected a file");
    FILE *stream = c.failed ? NULL : fopen(path, "rb");
    require_call(&c, stream != NULL);
    const uint64_t there = (uint64_t)status.st_size, size = there < most ? there : most;
    bytes->data = resize(&c, NULL, (size_t)size);
    if (bytes->data)
        bytes->size = fread(bytes->data, 1, (size_t)size, stream);
    require_call(&c, !stream || !ferror(stream));
    if (stream)
        fclose(stream);
    if (c.failed) {
        free(bytes->data);
        *bytes = (Bytes){NULL, 0};
    }
    return bytes->data ? 0 : -1;
}

int has_extension(const char *path, const char *extension) {
    const size_t length = strlen(path), end = strlen(extension);
    return length > end && strcasecmp(path + length - end, extension) == 0;
}

/* The first `most` bytes of a file, inflated if its name or its content says gzip. */
static int file_read(const char *path, uint64_t most, Bytes *bytes, Error *error) {
    const uint64_t packed = 2 * most + (1 << 20);   /* no real gzip stream is longer than what is in it */
    if (file_bytes(path, packed, bytes, error))
        return -1;
    const Bytes file = *bytes;
    bytes->size = file.size < most ? file.size : (size_t)most;
    if (!has_extension(path, ".gz") && (file.size < 3 || memcmp(file.data, "\x1f\x8b\x08", 3) != 0))
        return 0;
    const int status = gzip_inflate(file.data, file.size, path, most, bytes, error);
    free(file.data);
    return status;
}

int file_replace(const char *path, FileWriter write, const void *context, Error *error) {
    char target[PATH_MAX], temporary[PATH_MAX + 32];
    struct stat status;
    Cursor c = {.name = path, .error = error};
    const int is_new = lstat(path, &status) != 0 && errno == ENOENT;
    require_call(&c, is_new || realpath(path, target));
    if (is_new)
        snprintf(target, sizeof target, "%s", path);
    /* A rename would turn /dev/null into a plain file. */
    require(&c, c.failed || stat(target, &status) != 0 || S_ISREG(status.st_mode), "is not a regular file");
    if (c.failed)
        return -1;
    snprintf(temporary, sizeof temporary, "%s.tmp.%ld", target, (long)getpid());
    unlink(temporary);   /* whatever has this name was left by a process that is no more */
    const int file = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    FILE *stream = file < 0 ? NULL : fdopen(file, "wb");
    require_call(&c, stream != NULL);
    errno = 0;
    require_call(&c, !stream || (write(stream, context) == 0 && fflush(stream) == 0 && fsync(file) == 0));
    require_call(&c, (stream ? fclose(stream) : file < 0 ? 0 : close(file)) == 0);
    require_call(&c, c.failed || rename(temporary, target) == 0);
    if (c.failed) {
        unlink(temporary);
        return -1;
    }
    /* The new name of a file is on the disk when its directory is. A directory that can be written but not
     * read, or a file system that cannot do it (EINVAL), is no failure. */
    const int directory = open(dirname(temporary), O_RDONLY | O_CLOEXEC);
    require_call(&c, directory < 0 || fsync(directory) == 0 || errno == EINVAL);
    if (directory >= 0)
        close(directory);
    return c.failed;
}

/* ---- images ---- */

static void put_big_endian(FILE *stream, uint32_t value) {
    for (int shift = 24; shift >= 0; shift -= 8)
        putc((int)(value >> shift & 255), stream);
}

/* Bits of a deflate stream, a code's highest one first. */
static void put_code(Cursor *c, unsigned code, int length) {
    while (length-- > 0) {
        c->bits = (c->bits | (code >> length & 1) << 9) >> 1;
        if (c->bits & 1) {   /* the 1 has come down from above: a byte is full */
            put_byte(c, c->bits >> 1);
            c->bits = 0x100;
        }
    }
}

/* A symbol in the fixed code of inflate_block(): a byte, the end or a length. */
static void put_symbol(Cursor *c, unsigned s) {
    const unsigned code = s < 144 ? 0x30 + s : s < 256 ? 0x100 + s : s < 280 ? s - 256 : s - 88;
    put_code(c, code, s < 144 ? 8 : s < 256 ? 9 : s < 280 ? 7 : 8);
}

/* A zlib stream (RFC 1950) of one block. Only repeats of the previous pixel are looked for, in runs whose
 * length needs no further bits: noise does not get smaller anyway, and most of the rest is black. */
static void deflate(Cursor *c, const unsigned char *data, size_t size, unsigned pixel) {
    uint32_t low = 1, high = 0;   /* Adler-32 */
    c->bits = 0x100;
    put_byte(c, 0x78);
    put_byte(c, 0x01);
    put_code(c, 6, 3);   /* the last block; it has the fixed code */
    for (size_t at = 0, run; at < size; at += run) {
        const size_t most = at < pixel ? 0 : size - at < 258 ? size - at : 258;
        for (run = 0; run < most && data[at + run] == data[at + run - pixel];)
            run++;
        run = run < 3 ? 1 : run > 10 && run < 258 ? 10 : run;
        put_symbol(c, run == 1 ? data[at] : run == 258 ? 285 : 254 + (unsigned)run);
        put_code(c, pixel - 1, run == 1 ? 0 : 5);   /* the distance */
    }
    put_symbol(c, 256);
    put_code(c, 0, 7);   /* to the end of a byte */
    for (size_t i = 0; i < size; i++) {
        low = (low + data[i]) % 65521;
        high = (high + low) % 65521;
    }
    for (int shift = 24; shift >= 0; shift -= 8)
        put_byte(c, (high << 16 | low) >> shift & 255);
}

/* A chunk of a PNG: length, type, numbers, bytes, CRC. */
static void put_chunk(FILE *out, const char *type, size_t count, const uint32_t *numbers, const void *bytes,
                      size_t size) {
    unsigned char head[28];
    memcpy(head, type, 4);
    for (size_t i = 0; i < 4 * count; i++)
        head[4 + i] = (unsigned char)(numbers[i / 4] >> 8 * (3 - i % 4));
    put_big_endian(out, (uint32_t)(4 * count + size));
    fwrite(head, 1, 4 + 4 * count, out);
    fwrite(bytes, 1, size, out);
    put_big_endian(out, crc_32(crc_32(0, head, 4 + 4 * count), bytes, size));
}

typedef struct { const char *path; Pictures pictures; int delay; } Image;

/* A PNG without filters of its rows; with a delay it is animated (https://www.w3.org/TR/png-3/). */
static int write_png(FILE *stream, const void *context) {
    const Pictures p = ((const Image *)context)->pictures;
    const int delay = ((const Image *)context)->delay;
    const uint32_t width = (uint32_t)p.width, height = (uint32_t)p.height;
    const unsigned pixel = (unsigned)p.channels, colour = pixel == 3 ? 2 : 0;
    const size_t row = 1 + (size_t)width * pixel;   /* it begins with the 0 of no filter */
    unsigned char *rows = allocate_zeroed(height, row);
    uint32_t sequence = 0;
    Error error;
    Cursor c = {.name = "png", .error = &error, .most = UINT64_MAX};
    fputs("\x89PNG\r\n\x1a\n", stream);
    put_chunk(stream, "IHDR", 3, (uint32_t[]){width, height, 8 << 24 | colour << 16}, "", 1);
    if (delay > 0)
        put_chunk(stream, "acTL", 2, (uint32_t[]){(uint32_t)p.count, 0}, "", 0);
    for (size_t frame = 0; frame < (size_t)p.count; frame++) {
        for (size_t y = 0; y < height; y++)
            memcpy(rows + y * row + 1, p.pixels + (frame * height + y) * (row - 1), row - 1);
        c.out.size = 0;
        deflate(&c, rows, height * row, pixel);
        const uint32_t control[6] = {sequence++, width, height, 0, 0, (uint32_t)delay << 16 | 1000};
        if (delay > 0)
            put_chunk(stream, "fcTL", 6, control, "\0", 2);
        put_chunk(stream, frame > 0 ? "fdAT" : "IDAT", frame > 0, &sequence, c.out.data, c.out.size);
        sequence += frame > 0;
    }
    put_chunk(stream, "IEND", 0, NULL, "", 0);
    free(c.out.data);
    free(rows);
    return c.failed || ferror(stream);
}

/* PGM, PPM, or NumPy's format: a header, which has 128 bytes in the last one, then the pixels as they are. */
static int write_pixels(FILE *stream, const void *context) {
    const char *path = ((const Image *)context)->path;
    const Pictures p = ((const Image *)context)->pictures;
    const int is_ppm = has_extension(path, ".ppm");
    const size_t copies = is_ppm && p.channels == 1 ? 3 : 1;   /* grey is three equal colours */
    const size_t size = (size_t)p.height * (size_t)p.width * (size_t)p.channels * (size_t)p.count;
    char header[119];
    snprintf(header, sizeof header, "{'descr': '|u1', 'fortran_order': False, 'shape': (%d, %d, %d, %d), }",
             p.count, p.height, p.width, p.channels);
    if (has_extension(path, ".npy"))
        fprintf(stream, "\x93NUMPY\x01%c\x76%c%-117s\n", 0, 0, header);
    else
        fprintf(stream, "P%d\n%d %d\n255\n", is_ppm ? 6 : 5, p.width, p.height);
    for (size_t i = 0; i < copies * size; i++)
        putc(p.pixels[i / copies], stream);
    return ferror(stream);
}

static int is_png(const char *path) {
    return has_extension(path, ".png") || has_extension(path, ".apng") || strcmp(path, "-") == 0;
}

int picture_path_check(const char *path, int channels, Error *error) {
    Cursor c = {.name = path, .error = error};
    const int is_npy = has_extension(path, ".npy"), is_pgm = has_extension(path, ".pgm");
    require(&c, is_npy || is_pgm || has_extension(path, ".ppm") || is_png(path),
            "unknown kind of image, expected a name that ends in .png, .apng, .pgm, .ppm or .npy");
    require(&c, channels == 1 || !is_pgm, "a .pgm holds grey images only, expected .png or .ppm for colour");
    require(&c, channels != 2 || is_npy, "images of two channels are written as .npy only");
    return c.failed;
}

int pictures_write(const char *path, Pictures p, int delay, Error *error) {
    const Image image = {path, p, delay};
    Cursor c = {.name = path, .error = error, .failed = picture_path_check(path, p.channels, error)};
    assert(p.count > 0 && p.height > 0 && p.width > 0 && p.channels > 0 && p.channels < 4);
    assert(p.count == 1 || has_extension(path, ".npy") || (is_png(path) && delay));
    require(&c, p.height * (p.width * 3.0 + 1) <= 1.9e9, "an image of %d x %d pixels is too large", p.width,
            p.height);
    if (c.failed)
        return -1;
    if (strcmp(path, "-") != 0)
        return file_replace(path, is_png(path) ? write_png : write_pixels, &image, error);
    write_png(stdout, &image);   /* what goes wrong is said at the program's end, as for all of stdout */
    return 0;
}

Pictures picture_grids(Pictures p, int each, int columns, Arena *arena) {
    const int gap = 2, across = columns > each ? each : columns, down = (each + across - 1) / across;
    const int height = down * (p.height + gap) + gap, width = across * (p.width + gap) + gap;
    const size_t row = (size_t)p.width * (size_t)p.channels, grid_row = (size_t)width * (size_t)p.channels;
    const size_t grid_rows = (size_t)(p.count / each) * (size_t)height;
    unsigned char *grids = arena_allocate(arena, grid_rows, grid_row);
    assert(columns > 0 && each > 0 && p.count % each == 0);
    memset(grids, 255, grid_rows * grid_row);
    for (int i = 0; i < p.count * p.height; i++) {
        const int picture = i / p.height, at = picture % each;
        const int x = gap + at % across * (p.width + gap);
        const int y = picture / each * height + gap + at / across * (p.height + gap) + i % p.height;
        memcpy(grids + (size_t)y * grid_row + (size_t)(x * p.channels), p.pixels + (size_t)i * row, row);
    }
    return (Pictures){grids, p.count / each, height, width, p.channels};
}

/* ---- charts ---- */

enum { CHART_WIDTH = 640, PLOT_X = 62, PLOT_Y = 56, PLOT_WIDTH = 552, PLOT_HEIGHT = 290 };

/* Values from `low` to `high` go over `length` units of the picture, beginning at `from`. */
typedef struct { double low, high, step, from, length; } Axis;

static double axis_place(const Axis *a, double value) {
    return a->from + (value - a->low) / (a->high - a->low) * a->length;
}

/* Widen an axis, above all one too short to be labelled; its step is 1, 2 or 5 times a power of ten. */
static void axis_divide(Axis *a, double margin, int most_steps) {
    const double size = 1e-6 + fabs(a->low) + fabs(a->high), range = a->high - a->low;
    margin = range > 1e-6 * size ? margin * range : 0.05 * size;
    a->low -= margin;
    a->high += margin;
    const double step = (a->high - a->low) / most_steps, power = pow(10, floor(log10(step)));
    a->step = power * (step <= power ? 1 : step <= 2 * power ? 2 : step <= 5 * power ? 5 : 10);
}

/* The value of a curve (side 0), or an edge of its band (1: above, -1: below); NAN where it is not drawn. */
static double curve_value(const Curve *c, int i, int side) {
    const double error = c->error && isfinite(c->error[i]) ? c->error[i] : 0, y = c->y[i] + side * error;
    return fabs(c->x[i]) < 1e30 && fabs(c->y[i]) + error < 1e30 ? y : NAN;
}

/* The axes hold all curves, with one exception. A loss falls so far in its first steps that its end would
 * look flat: where the first tenth, or a single point, would take most of the height, it is cut off. */
static void choose_axes(const Curve *curves, int count, Axis *across, Axis *up) {
    double late = -INFINITY;
    *across = (Axis){INFINITY, -INFINITY, 0, PLOT_X, PLOT_WIDTH};
    *up = (Axis){INFINITY, -INFINITY, 0, PLOT_Y + PLOT_HEIGHT, -PLOT_HEIGHT};
    for (int i = 0; i < 2 * count; i++)   /* twice: the second time it is known where the first tenth ends */
        for (int k = 0; k < curves[i % count].count; k++) {
            const Curve *c = &curves[i % count];
            const double high = curve_value(c, k, 1), x = isnan(high) ? NAN : c->x[k];
            across->low = fmin(across->low, x);   /* which is not NAN when the other is */
            across->high = fmax(across->high, x);
            up->low = fmin(up->low, curve_value(c, k, -1));
            up->high = fmax(up->high, high);
            if (i >= count && x >= across->low + (across->high - across->low) / 10)
                late = fmax(late, k > 0 ? fmin(high, curve_value(c, k - 1, 1)) : high);
        }
    if (up->high - up->low > 2.5 * (late - up->low))
        up->high = late;
    axis_divide(across, 0, 6);
    axis_divide(up, 0.04, 10);
}

void put_escaped(FILE *out, const char *text) {
    char shown[512];
    for (const char *at = printable(text, shown, sizeof shown); *at; at++)
        fprintf(out, strchr("<>&'\"", *at) ? "&#%d;" : "%c", *at);
}

static void put_text(FILE *out, double x, double y, const char *anchor, const char *text) {
    fprintf(out, "<text x='%.1f' y='%.1f' text-anchor='%s'>", x, y, anchor);
    put_escaped(out, text);
    fputs("</text>\n", out);
}

/* Grid lines and their labels, with the decimals that the step needs. */
static void put_grid(FILE *out, const Axis *a) {
    const int decimals = (int)fmax(0, -floor(log10(a->step) + 1e-9)), is_up = a->length < 0;
    const double first = ceil(a->low / a->step - 1e-9), last = floor(a->high / a->step + 1e-9);
    for (int i = 0; i <= last - first; i++) {
        const double value = (first + i) * a->step, at = axis_place(a, value);
        char label[64];
        snprintf(label, sizeof label, "%.*f", decimals, value);
        const double x = is_up ? PLOT_X : at, y = is_up ? at : PLOT_Y + PLOT_HEIGHT;
        fprintf(out, "<path class='grid' d='M%.1f %.1f%c%d'/>", x, y, is_up ? 'h' : 'v',
                is_up ? PLOT_WIDTH : -PLOT_HEIGHT);
        put_text(out, is_up ? x - 7 : x, is_up ? y + 5 : y + 20, is_up ? "end" : "middle", label);
    }
}

/* Points of a curve, or of an edge of its band; the lower edge goes back. */
static void put_points(FILE *out, const Axis *across, const Axis *up, const Curve *c, int side) {
    double x = -1, y = 0;
    for (int k = 0; k < c->count; k++) {
        const int i = side < 0 ? c->count - 1 - k : k;
        const double value = curve_value(c, i, side);
        if (isnan(value))
            continue;
        x = axis_place(across, c->x[i]);
        y = fmin(fmax(axis_place(up, value), -999), 1999);
        fprintf(out, "%.1f,%.1f ", x, y);
    }
    if (x >= 0)
        fprintf(out, "%.1f,%.1f ", x, y);   /* of one point it makes a line, which is a dot */
}

void chart_svg(FILE *out, const char *title, const char *x_label, const char *y_label, const Curve *curves,
               int count) {
    enum { COLOURS = 6 };
    static const char style[] =   /* the names are for a whole page, on which there may be many charts */
        "<style>.chart{background:#fff;color:#222;font:15px sans-serif}.chart text{fill:currentColor}\n"
        ".chart polyline,.chart path{fill:none;stroke:currentColor;stroke-width:2;stroke-linecap:round;"
        "stroke-linejoin:round}\n.chart polygon{fill:currentColor;opacity:.22}"
        ".chart .grid{stroke-width:.6;opacity:.35}.chart .title{font-size:18px;font-weight:bold}\n"
        ".chart .c0{color:#0a62c4}.chart .c1{color:#c2410c}.chart .c2{color:#15803d}"
        ".chart .c3{color:#8e24aa}.chart .c4{color:#946200}.chart .c5{color:#0e7490}\n"
        "@media(prefers-color-scheme:dark){.chart{background:#15171b;color:#ddd}"
        ".chart .c0{color:#6cb2ff}.chart .c1{color:#ff9a5c}.chart .c2{color:#5fd38a}"
        ".chart .c3{color:#d99bf0}.chart .c4{color:#e3bd55}.chart .c5{color:#5fd0e6}}</style>\n";
    const int bottom = PLOT_Y + PLOT_HEIGHT + 42;
    Axis across, up;
    choose_axes(curves, count, &across, &up);
    fprintf(out, "<svg xmlns='http://www.w3.org/2000/svg' class='chart' viewBox='0 0 %d %d'>\n%s",
            CHART_WIDTH, bottom + 14 + 22 * count, style);
    put_text(out, PLOT_X, 22, "start' class='title", title);
    put_text(out, PLOT_X, 45, "start", y_label);
    put_text(out, PLOT_X + PLOT_WIDTH / 2.0, bottom, "middle", x_label);
    put_grid(out, &across);
    put_grid(out, &up);
    for (int i = 0; i < count; i++) {   /* a line of the legend; an svg in the svg cuts off what leaves it */
        const int y = bottom + 24 + 22 * i;
        fprintf(out, "<g class='c%d' stroke-dasharray='%d'><path d='M%d %dh24'/>", i % COLOURS,
                i / COLOURS * 7, PLOT_X, y - 5);
        fprintf(out, "<svg x='%d' y='%d' width='%d' height='%d' viewBox='%d %d %d %d'><polygon points='",
                PLOT_X, PLOT_Y, PLOT_WIDTH, PLOT_HEIGHT, PLOT_X, PLOT_Y, PLOT_WIDTH, PLOT_HEIGHT);
        for (int side = 1; side >= -1 && curves[i].error; side -= 2)
            put_points(out, &across, &up, &curves[i], side);
        fputs("'/><polyline points='", out);
        put_points(out, &across, &up, &curves[i], 0);
        fputs("'/></svg></g>\n", out);
        put_text(out, PLOT_X + 32, y, "start", curves[i].name);
    }
    fputs("</svg>\n", out);
}

/* ---- built-in digits ---- */

enum { DIGIT_SIZE = 28, MOST_POINTS = 24, PEN_UP = -1, END = -2 };

/* The strokes of the digits and of second ways to write some: points (x, y) in 0..100, y downwards, through
 * which a smooth curve goes. A point given twice is a corner. */
static const signed char glyphs[14][44] = {
    {52,0, 26,12, 13,50, 26,88, 50,100, 76,86, 88,48, 74,12, 48,0, 30,8, END},
    {50,0, 50,50, 50,100, END},
    {14,20, 32,3, 58,0, 82,16, 78,40, 54,68, 12,100, 12,100, 50,98, 90,98, END},
    {14,12, 40,0, 74,8, 76,32, 42,46, 42,46, 76,56, 84,80, 52,100, 12,90, END},
    {24,0, 18,28, 12,56, 12,56, 50,56, 90,54, PEN_UP, 72,4, 70,52, 66,100, END},
    {84,0, 54,2, 26,2, 26,2, 20,42, 20,42, 54,34, 84,56, 80,86, 46,100, 10,92, END},
    {70,0, 40,22, 18,58, 22,90, 50,100, 78,86, 76,62, 50,54, 22,72, END},
    {12,6, 50,4, 86,2, 86,2, 62,46, 42,100, END},
    {78,14, 50,0, 24,12, 32,36, 54,48, 78,68, 72,92, 48,100, 24,90, 26,68, 50,48, 72,30, 78,12, END},
    {80,22, 56,0, 26,10, 18,34, 40,50, 66,42, 80,18, 80,18, 76,58, 66,100, END},
    {26,20, 50,0, 50,0, 50,50, 50,100, PEN_UP, 22,100, 50,100, 78,100, END},   /* 1 with flag and foot */
    {14,22, 36,2, 66,2, 82,22, 68,52, 38,84, 20,98, 10,86, 26,76, 58,92, 92,92, END},   /* 2 with a loop */
    {64,0, 38,34, 8,68, 8,68, 50,68, 92,66, PEN_UP, 64,0, 64,50, 62,100, END},   /* 4 closed */
    {12,6, 50,4, 86,2, 86,2, 62,46, 42,100, PEN_UP, 30,52, 52,50, 76,48, END},   /* 7 with a bar */
};

/* Points [x or y] in pixels, and which stroke each belongs to. */
typedef struct {
    int count, stroke[MOST_POINTS];
    double at[2][MOST_POINTS], radius;
} Glyph;

/* Digit `index`: the points wobble, the glyph is narrowed, slanted and turned, then scaled to its height and
 * put into the middle, as the images of MNIST were, and moved a little. */
static Glyph digit_glyph(RandomStream stream, uint32_t index) {
    static const signed char variants[10] = {0, 10, 11, 3, 12, 5, 6, 13, 8, 9};
    double low[2] = {1e9, 1e9}, high[2] = {-1e9, -1e9}, random[8];
    uint32_t position = 0;
    for (; position < 8; position++)
        random[position] = random_uniform(stream, position);
    const int digit = (int)(index % 10), glyph = random[0] < 0.35 ? variants[digit] : digit;
    const double narrow = 0.75 + 0.25 * random[1], slant = 0.3 * random[2], turn = 0.2 * random[3] - 0.1;
    Glyph g = {.radius = 1 + 0.6 * random[7]};
    for (const signed char *p = glyphs[glyph]; *p != END; p += 2, g.count++) {
        const int i = g.count, lifted = *p == PEN_UP;
        p += lifted;
        assert(i < MOST_POINTS);
        g.stroke[i] = i > 0 ? g.stroke[i - 1] + lifted : 0;
        if (i > 0 && p[0] == p[-2] && p[1] == p[-1])
            position -= 2;   /* the two points of a corner stay together */
        const double wobbled = narrow * (p[0] - 50 + 5 * (random_uniform(stream, position++) - 0.5));
        const double down = p[1] - 50 + 5 * (random_uniform(stream, position++) - 0.5);
        const double across = wobbled - slant * down;
        g.at[0][i] = across * cos(turn) - down * sin(turn);
        g.at[1][i] = across * sin(turn) + down * cos(turn);
        for (int axis = 0; axis < 2; axis++) {
            low[axis] = fmin(low[axis], g.at[axis][i]);
            high[axis] = fmax(high[axis], g.at[axis][i]);
        }
    }
    const double scale = (17 + 2 * random[4]) / fmax(high[1] - low[1], high[0] - low[0]);
    for (int axis = 0; axis < 2; axis++)
        for (int i = 0; i < g.count; i++)
            g.at[axis][i] = (DIGIT_SIZE - 1) / 2.0 + 2 * (random[5 + axis] - 0.5) +
                            scale * (g.at[axis][i] - (low[axis] + high[axis]) / 2);
    return g;
}

/* A line on canvas [size, size, channels], whose pixel (x, y) is centred on (x, y). It only brightens, so
 * that the joints of a long curve do not show. */
static void line_draw(unsigned char *canvas, int size, int channels, const double from[2],
                      const double to[2], double radius, const unsigned char *colour) {
    const double along_x = to[0] - from[0], along_y = to[1] - from[1];
    const double square = along_x * along_x + along_y * along_y;
    int first[2], end[2];
    for (int axis = 0; axis < 2; axis++) {
        first[axis] = (int)fmax(fmin(from[axis], to[axis]) - radius, 0);
        end[axis] = (int)fmin(fmax(from[axis], to[axis]) + radius + 2, size);
    }
    for (int y = first[1]; y < end[1]; y++)
        for (int x = first[0]; x < end[0]; x++) {
            const double along = (x - from[0]) * along_x + (y - from[1]) * along_y;
            const double part = square > 0 ? fmin(fmax(along / square, 0), 1) : 0;
            const double across_x = x - from[0] - part * along_x, across_y = y - from[1] - part * along_y;
            const double cover = fmin(radius + 0.5 - sqrt(across_x * across_x + across_y * across_y), 1);
            unsigned char *pixel = canvas + ((size_t)y * (size_t)size + (size_t)x) * (size_t)channels;
            for (int c = 0; c < channels; c++)
                pixel[c] = (unsigned char)fmax(pixel[c], (double)lround(colour[c] * cover));
        }
}

static void digit_draw(uint64_t seed, Split split, uint32_t index, unsigned char *out) {
    enum { PIECES = 5 };
    const unsigned char white = 255;
    const Glyph g = digit_glyph(random_stream(seed, RANDOM_GLYPHS, (uint32_t)split, index), index);
    memset(out, 0, DIGIT_SIZE * DIGIT_SIZE);
    for (int i = 0; i + 1 < g.count; i++) {
        /* A Catmull-Rom curve from point i to i+1 looks at the points before and after. */
        const int before = i > 0 && g.stroke[i - 1] == g.stroke[i] ? i - 1 : i;
        const int after = i + 2 < g.count && g.stroke[i + 2] == g.stroke[i] ? i + 2 : i + 1;
        double from[2] = {g.at[0][i], g.at[1][i]}, to[2];
        for (int piece = 1; piece <= PIECES && g.stroke[i] == g.stroke[i + 1]; piece++) {
            const double u = (double)piece / PIECES, a = -u * (1 - u) * (1 - u) / 2, d = u * u * (u - 1) / 2;
            const double b = 1 + u * u * (1.5 * u - 2.5), c = u * (0.5 + u * (2 - 1.5 * u));
            for (int axis = 0; axis < 2; axis++) {
                const double *p = g.at[axis];
                to[axis] = a * p[before] + b * p[i] + c * p[i + 1] + d * p[after];
            }
            line_draw(out, DIGIT_SIZE, 1, from, to, g.radius, &white);
            memcpy(from, to, sizeof from);
        }
    }
}

/* ---- built-in points ---- */

/* A spiral of two and a half turns, as dense at its end as at its beginning, and a normal number each way. */
static void swirl_point(uint64_t seed, Split split, uint32_t index, unsigned char *out) {
    const RandomStream stream = random_stream(seed, RANDOM_GLYPHS, (uint32_t)split, index);
    const double part = sqrt(random_uniform(stream, 0)), turn = 8 * atan(1);
    const double away = 3 * sqrt(-2 * log(1 - random_uniform(stream, 1)));
    for (int axis = 0; axis < 2; axis++) {
        const double sideways = axis * turn / 4, along = cos(2.5 * turn * part - sideways);
        const double at = 128 + 116 * part * along + away * cos(turn * random_uniform(stream, 2) - sideways);
        out[axis] = (unsigned char)fmin(fmax(at, 0), 255);
    }
}

void lines_draw(unsigned char *canvas, int size, const unsigned char *from, const unsigned char *to,
                int count, double radius, const unsigned char colour[3]) {
    for (const unsigned char *p = from, *q = to; p < from + 2 * (size_t)count; p += 2, q += 2) {
        const double start[2] = {(p[0] + 0.5) * size / 256 - 0.5, (p[1] + 0.5) * size / 256 - 0.5};
        const double end[2] = {(q[0] + 0.5) * size / 256 - 0.5, (q[1] + 0.5) * size / 256 - 0.5};
        line_draw(canvas, size, 3, start, end, radius, colour);
    }
}

/* ---- data sets ---- */

enum { SIDE = 32, PLANE = SIDE * SIDE, RECORD = 1 + 3 * PLANE, MOST_RECORDS = 10000 };   /* CIFAR-10 */

static const char *const file_names[2][8] = {   /* by split: MNIST's images and labels, then CIFAR-10 */
    {"train-images-idx3-ubyte", "train-labels-idx1-ubyte", "data_batch_1.bin", "data_batch_2.bin",
     "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin"},
    {"t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", "test_batch.bin"},
};

/* Big-endian magic number, count, height, width. Returns the bytes of pixels they promise, 0 if wrong. */
static uint64_t idx_header(const Bytes *bytes, uint32_t header[4]) {
    for (size_t i = 0; i < 16; i++)
        header[i / 4] = header[i / 4] << 8 | (i < bytes->size ? bytes->data[i] : 0);
    const int is_header = header[0] == 0x803 && header[2] - 1 < 32768 && header[3] - 1 < 32768;
    return is_header ? (uint64_t)header[1] * header[2] * header[3] : 0;
}

int idx_parse(Bytes *bytes, const char *name, Dataset *dataset, Error *error) {
    uint32_t header[4] = {0};
    Cursor c = {.name = name, .error = error};
    const uint64_t promised = idx_header(bytes, header), held = bytes->size - 16;
    require(&c, bytes->size >= 16, "holds %zu bytes, expected an IDX header of 16", bytes->size);
    require(&c, header[0] == 0x803, "magic number 0x%08x, expected 0x00000803 (IDX images)",
            (unsigned)header[0]);
    require(&c, header[1] > 0, "holds no images");
    require(&c, promised > 0, "images of %u x %u pixels, expected 1 to 32768 each way", (unsigned)header[2],
            (unsigned)header[3]);
    require(&c, held >= promised, "holds %" PRIu64 " of the %" PRIu64 " bytes its header promises", held,
            promised);
    require(&c, held == promised, "holds more than the %" PRIu64 " bytes its header promises", promised);
    if (c.failed)
        return -1;
    memmove(bytes->data, bytes->data + 16, (size_t)promised);
    *dataset = (Dataset){header[1], (int)header[2], (int)header[3], 1, bytes->data, .split = dataset->split};
    bytes->data = NULL;
    return 0;
}

int idx_labels_parse(Bytes *bytes, const char *name, Dataset *dataset, Error *error) {
    const uint32_t n = dataset->count;
    const unsigned char header[8] = {0, 0, 8, 1, n >> 24, n >> 16 & 255, n >> 8 & 255, n & 255};
    Cursor c = {.name = name, .error = error};
    require(&c, bytes->size == 8 + (size_t)n && memcmp(bytes->data, header, 8) == 0,
            "holds %zu bytes, expected an IDX file of %u labels for the images of %s", bytes->size,
            (unsigned)n, file_names[dataset->split][0]);
    if (c.failed)
        return -1;
    dataset->labels = memmove(bytes->data, bytes->data + 8, n);
    bytes->data = NULL;
    for (uint32_t i = 0; i < n; i++)
        if (dataset->classes <= dataset->labels[i])
            dataset->classes = dataset->labels[i] + 1;
    return 0;
}

int cifar_parse(const Bytes *bytes, const char *name, Dataset *dataset, Error *error) {
    Cursor c = {.name = name, .error = error};
    const size_t count = bytes->size / RECORD, had = dataset->count;
    require(&c, count <= MOST_RECORDS, "holds more than the 10,000 images of a batch");
    require(&c, count > 0 && bytes->size % RECORD == 0,
            "holds %zu bytes, expected a multiple of 3,073 (a label, 32 x 32 x 3 pixels)", bytes->size);
    for (size_t i = 0; i < count && !c.failed; i++)
        require(&c, bytes->data[i * RECORD] < 10, "image %zu has label %d, expected 0 to 9", i,
                bytes->data[i * RECORD]);
    unsigned char *pixels = resize(&c, dataset->pixels, (had + count) * 3 * PLANE);
    unsigned char *labels = resize(&c, dataset->labels, had + count);
    *dataset = (Dataset){dataset->count, SIDE, SIDE, 3, pixels, dataset->split, 0, labels, 10};
    if (c.failed)
        return -1;
    dataset->count += (uint32_t)count;
    for (size_t i = 0; i < count; i++)
        labels[had + i] = bytes->data[i * RECORD];
    pixels += had * 3 * PLANE;
    for (size_t i = 0; i < count * 3 * PLANE; i++)   /* from planes to pixels */
        pixels[i] = bytes->data[i / (3 * PLANE) * RECORD + 1 + i % 3 * PLANE + i / 3 % PLANE];
    return 0;
}

/* Add DIRECTORY/NAME or DIRECTORY/NAME.gz, the name of this kind in the list, reading hardly more than it may
 * hold. Where neither is there, nothing is added. */
static int dataset_add(Dataset *dataset, const char *where, int kind, Error *error) {
    char plain[PATH_MAX + 64], packed[PATH_MAX + 68];
    const char *name = file_names[dataset->split][kind];
    uint64_t most = kind == 1 ? 8 + (uint64_t)dataset->count + 1 : (uint64_t)(MOST_RECORDS + 1) * RECORD;
    uint32_t header[4] = {0};
    Bytes bytes = {NULL, 0};
    snprintf(plain, sizeof plain, "%s/%s", where, name);
    snprintf(packed, sizeof packed, "%s.gz", plain);
    const int is_plain = access(plain, F_OK) == 0 || errno != ENOENT, is_packed = access(packed, F_OK) == 0;
    if (is_plain && is_packed) {
        fail(error, "%s: is not read, since %s is there too", packed, name);
        fprintf(stderr, "diffenc: %s\n", error->text);
    }
    if (!is_plain && !is_packed)
        return 0;
    const char *path = is_plain ? plain : packed;
    if (kind == 0 && file_read(path, 16, &bytes, error) == 0)
        most = 16 + idx_header(&bytes, header) + 1;
    free(bytes.data);
    if (file_read(path, most, &bytes, error))
        return -1;
    const int status = kind == 0   ? idx_parse(&bytes, path, dataset, error)
                       : kind == 1 ? idx_labels_parse(&bytes, path, dataset, error)
                                   : cifar_parse(&bytes, path, dataset, error);
    free(bytes.data);
    return status;
}

int dataset_open(Dataset *dataset, const char *where, Split split, uint64_t seed, Error *error) {
    const int is_test = split == SPLIT_TEST;
    const uint32_t count = is_test ? 10000 : 60000;
    Cursor c = {.name = where, .error = error};
    *dataset = (Dataset){.split = split};
    if (strcmp(where, "digits") == 0)
        *dataset = (Dataset){count, DIGIT_SIZE, DIGIT_SIZE, 1, NULL, split, seed, NULL, 10};
    if (strcmp(where, "swirl") == 0)
        *dataset = (Dataset){count, 1, 1, 2, NULL, split, seed, NULL, 0};
    const int is_built_in = dataset->count > 0;
    require_call(&c, is_built_in || access(where, F_OK) == 0);
    for (int i = 0; file_names[split][i] && !is_built_in && !c.failed; i++)
        if (i == 0 || (i == 1) == (dataset->channels == 1))
            c.failed = dataset_add(dataset, where, i, error);
    require(&c, dataset->count > 0, "holds neither %s (MNIST) nor %s (CIFAR-10), plain or with .gz",
            file_names[split][0], is_test ? "test_batch.bin" : "data_batch_1.bin to ..5.bin");
    if (!c.failed && !is_built_in && !is_test && dataset->channels == 3 && dataset->count < 5 * MOST_RECORDS)
        fprintf(stderr, "diffenc: %s: holds %u images, all five batches 50000\n", where,
                (unsigned)dataset->count);
    if (c.failed)
        dataset_close(dataset);
    return c.failed;
}

void dataset_close(Dataset *dataset) {
    free(dataset->pixels);
    free(dataset->labels);
    *dataset = (Dataset){0};
}

static size_t pixels_of(const Dataset *d) {
    return (size_t)d->height * (size_t)d->width * (size_t)d->channels;
}

void dataset_image(const Dataset *dataset, uint32_t index, unsigned char *out) {
    const size_t size = pixels_of(dataset);
    assert(index < dataset->count);
    if (dataset->pixels)
        memcpy(out, dataset->pixels + index * size, size);
    else
        (dataset->channels == 1 ? digit_draw : swirl_point)(dataset->seed, dataset->split, index, out);
}

int dataset_label(const Dataset *dataset, uint32_t index) {
    assert(index < dataset->count);
    const int digit = (int)(index % 10);   /* as digit_glyph() has it */
    return dataset->labels ? dataset->labels[index] : dataset->classes > 0 ? digit : -1;
}

/* FNV-1a over little-endian words of 8 bytes. Without the shift, high bits would never reach low ones. */
static uint64_t digest_add(uint64_t digest, const unsigned char *bytes, size_t size) {
    for (size_t at = 0; at < size; at += 8) {
        uint64_t word = 0;
        for (size_t b = 0; b < 8 && at + b < size; b++)
            word |= (uint64_t)bytes[at + b] << 8 * b;
        digest = (digest ^ word) * 0x100000001b3;
        digest ^= digest >> 32;
    }
    return digest;
}

uint64_t dataset_digest(const Dataset *d, int with_labels) {
    enum { BUILT_IN = 3 };   /* and 4 for testing; an earlier edition, with other digits, had 1 and 2 */
    const uint64_t numbers[6] = {d->count, (uint64_t)d->height, (uint64_t)d->width, (uint64_t)d->channels,
                                 d->pixels ? 0 : BUILT_IN + (uint64_t)d->split, d->pixels ? 0 : d->seed};
    unsigned char head[48];
    for (size_t i = 0; i < 48; i++)
        head[i] = (unsigned char)(numbers[i / 8] >> 8 * (i % 8));
    const uint64_t digest = digest_add(digest_add(0xcbf29ce484222325, head, 48), d->pixels,
                                       d->pixels ? d->count * pixels_of(d) : 0);
    return digest_add(digest, d->labels, d->labels && with_labels ? d->count : 0);
}

/* The Feistel network permutes 0..4^half-1, the smallest such range that holds `count` indices. A result
 * outside is put through it again: a walk that began inside comes back inside, and no two walks meet. */
uint32_t dataset_shuffle(uint64_t seed, uint32_t epoch, uint32_t position, uint32_t count) {
    enum { ROUNDS = 6 };
    int half = 1;
    while ((uint64_t)count > (uint64_t)1 << 2 * half)
        half++;
    const uint32_t mask = ((uint32_t)1 << half) - 1;
    assert(position < count);
    do
        for (uint32_t round = 0; round < ROUNDS; round++) {
            const uint32_t left = position >> half, right = position & mask;
            const uint32_t mixed = random_bits(random_stream(seed, RANDOM_SHUFFLE, epoch, round), right);
            position = right << half | (left ^ (mixed & mask));
        }
    while (position >= count);
    return position;
}

/* ---- safetensors: reading ---- */

/* What follows reads not JSON but what the header of a safetensors file can be: an object of objects with
 * three known keys, and of one object of strings. Nothing recurses. */

/* Take the character if it comes next, behind spaces. */
static int accept(Cursor *c, char character) {
    while (c->at < c->size && memchr(" \t\n\r", c->data[c->at], 4))
        c->at++;
    const int is_next = !c->failed && c->at < c->size && c->data[c->at] == (unsigned char)character;
    c->at += (size_t)is_next;
    return is_next;
}

static int expect(Cursor *c, char character) {
    return require(c, accept(c, character), "expected '%c'", character);
}

/* Whether item i of a list in such brackets, "[]" or "{}", follows; takes what stands before it. */
static int next_item(Cursor *c, const char *brackets, int i) {
    return (i > 0 || expect(c, brackets[0])) && !accept(c, brackets[1]) && (i == 0 || expect(c, ','));
}

/* What stands behind a backslash, as UTF-8 at `out`; returns its end. */
static char *take_escape(Cursor *c, char *out) {
    static const char escapes[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    const unsigned letter = take_byte(c);
    const char *known = memchr(escapes, (int)letter, 8);
    char digits[5] = "";
    for (int i = 0; !known && i < 4; i++)
        digits[i] = (char)take_byte(c);
    const unsigned code = known ? (unsigned)meanings[known - escapes] : (unsigned)strtoul(digits, NULL, 16);
    require(c, known || (letter == 'u' && strspn(digits, "0123456789abcdefABCDEF") == 4), "invalid escape");
    require(c, code > 0 && code >> 11 != 0x1b, "escape of a surrogate or of 0");
    if (code >= 0x800)
        *out++ = (char)(0xe0 | code >> 12);
    if (code >= 0x80)
        *out++ = (char)(code >= 0x800 ? 0x80 | (code >> 6 & 0x3f) : 0xc0 | code >> 6);
    *out++ = (char)(code < 0x80 ? code : 0x80 | (code & 0x3f));
    return out;
}

/* A string, decoded where it stands, in bytes that belong to the TensorFile: no escape is shorter than what
 * it means, and the closing quote has room for the 0 at the end. So names need no memory of their own. */
static const char *take_string(Cursor *c) {
    expect(c, '"');
    char *string = (char *)c->data + c->at, *out = string;
    for (unsigned code; (code = take_byte(c)) != '"' && !c->failed;) {
        require(c, code >= 0x20, "control character in a string");
        if (code == '\\')
            out = take_escape(c, out);
        else
            *out++ = (char)code;
    }
    if (c->failed)
        return "";
    *out = '\0';
    return string;
}

static const char *take_key(Cursor *c) {
    const char *key = take_string(c);
    expect(c, ':');
    return key;
}

/* [1, 2, 3] with at most `most` whole numbers. Returns how many. */
static int take_integers(Cursor *c, int64_t *values, int most) {
    int count = 0;
    while (next_item(c, "[]", count) && require(c, count < most, "more numbers than expected")) {
        int64_t value = 0;
        accept(c, ' ');
        const size_t start = c->at;
        for (unsigned digit; c->at < c->size && (digit = c->data[c->at] - (unsigned)'0') < 10; c->at++)
            if (require(c, value < INT64_MAX / 10, "the number is too large"))
                value = 10 * value + (int)digit;
        require(c, c->at > start, "expected a whole number that is not negative");
        require(c, c->at <= start + 1 || c->data[start] != '0', "the number begins with 0");
        values[count++] = value;
    }
    return count;
}

static const char *const TYPE_NAMES[TYPE_OTHER] = {"U8", "F32", "F64"};
static const unsigned char TYPE_SIZES[TYPE_OTHER] = {1, 4, 8};

/* {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}. The tensors read so far need `*needed` bytes of
 * data; while that is more than there are, the file is truncated and they have no place. */
static TensorEntry take_tensor(Cursor *c, const char *name, const Bytes *data, uint64_t *needed) {
    TensorEntry entry = {.name = name, .rank = -1, .count = 1};
    int64_t offsets[2] = {0};
    int offset_count = -1;
    const char *type = "";
    for (int i = 0; next_item(c, "{}", i); i++) {
        const char *key = take_key(c);
        if (strcmp(key, "dtype") == 0 && !*type)
            type = take_string(c);
        else if (strcmp(key, "shape") == 0 && entry.rank < 0)
            entry.rank = take_integers(c, entry.shape, 8);
        else if (strcmp(key, "data_offsets") == 0 && offset_count < 0)
            offset_count = take_integers(c, offsets, 2);
        else
            require(c, 0, "expected each of dtype, shape and data_offsets once");
    }
    require(c, *type && entry.rank >= 0 && offset_count == 2, "expected dtype, shape, two data_offsets");
    while (entry.type < TYPE_OTHER && strcmp(type, TYPE_NAMES[entry.type]) != 0)
        entry.type++;
    const int is_other = entry.type == TYPE_OTHER;
    const size_t each = is_other ? 1 : TYPE_SIZES[entry.type];
    for (int i = 0; i < entry.rank; i++) {
        const size_t length = (size_t)entry.shape[i];
        require(c, !length || entry.count <= SIZE_MAX / each / length, "the shape is too large");
        entry.count *= length;
    }
    const uint64_t begin = (uint64_t)offsets[0], end = (uint64_t)offsets[1];
    entry.size = (size_t)(end - begin);
    /* Of another type no more is known than that an element has at least one bit. */
    const int fits = is_other ? entry.count / 8 <= entry.size : entry.size == entry.count * each;
    require(c, begin <= end && fits, "data_offsets do not fit the shape");
    *needed = end > *needed ? end : *needed;
    entry.data = data->data + (*needed <= data->size ? begin : 0);
    return entry;
}

static int compare_places(const void *left, const void *right) {
    const TensorEntry *a = left, *b = right;
    const unsigned char *p = a->data, *q = b->data;
    const int place = (p > q) - (p < q);
    return place ? place : (a->size > b->size) - (a->size < b->size);   /* the empty ones first */
}

/* Tensors and pairs of metadata both begin with their name, so that one comparison serves both. */
static int compare_names(const void *left, const void *right) {
    return strcmp(*(const char *const *)left, *(const char *const *)right);
}

/* A header may hold a million names: sorted, equal ones are found in a second, pair by pair in hours. */
static void sort_names(Cursor *c, void *items, int count, size_t size) {
    qsort(items, (size_t)count, size, compare_names);
    for (char *item = items; count > 1; count--, item += size)
        require(c, compare_names(item, item + size) != 0, "the name %s is there twice", *(char **)item);
}

static void take_metadata(Cursor *c, TensorFile *file) {
    for (int i = 0; next_item(c, "{}", i); i++) {
        const char *key = take_key(c), *pair[2] = {key, take_string(c)};
        file->metadata = array_grow(c, file->metadata, (size_t)file->metadata_count, sizeof pair);
        if (!c->failed)
            memcpy(file->metadata + 2 * file->metadata_count++, pair, sizeof pair);
    }
}

static void take_header(Cursor *c, TensorFile *file, const Bytes *data) {
    const size_t before = (size_t)(data->data - file->bytes.data);
    uint64_t needed = 0;
    int metadata_seen = 0;
    for (int i = 0; next_item(c, "{}", i); i++) {
        const char *name = take_key(c);
        if (strcmp(name, "__metadata__") == 0) {
            require(c, !metadata_seen++, "a second __metadata__");
            take_metadata(c, file);
            continue;
        }
        const TensorEntry entry = take_tensor(c, name, data, &needed);
        file->tensors = array_grow(c, file->tensors, (size_t)file->tensor_count, sizeof entry);
        if (!c->failed)
            file->tensors[file->tensor_count++] = entry;
    }
    accept(c, ' ');
    require(c, c->at == c->size, "expected only spaces after the header");
    c->part = NULL;   /* from here on, messages tell of the whole */
    require(c, needed <= data->size, "is truncated, holds %zu of %" PRIu64 " bytes", before + data->size,
            before + needed);
    qsort(file->tensors, (size_t)file->tensor_count, sizeof *file->tensors, compare_places);
    const unsigned char *end = data->data;
    for (const TensorEntry *e = file->tensors; e < file->tensors + file->tensor_count && !c->failed; e++) {
        const unsigned char *begin = e->data;
        require(c, begin == end, "tensor %s: its data %s", e->name,
                begin < end ? "overlap those of another" : "leave a gap before them");
        end += e->size;
    }
    require(c, needed == data->size, "%" PRIu64 " bytes at its end belong to no tensor", data->size - needed);
    sort_names(c, file->metadata, file->metadata_count, 2 * sizeof *file->metadata);
    sort_names(c, file->tensors, file->tensor_count, sizeof *file->tensors);
}

int tensors_parse(Bytes bytes, const char *name, TensorFile *file, Error *error) {
    enum { LONGEST = 100000000 };   /* the limit of the format's own implementation */
    Cursor c = {.data = bytes.data, .size = bytes.size, .name = name, .error = error};
    *file = (TensorFile){bytes, allocate(1, sizeof(TensorEntry)), 0, allocate(2, sizeof(char *)), 0};
    require(&c, bytes.size >= 8, "holds %zu bytes, expected a safetensors file", bytes.size);
    /* The first bytes of these can be a length too, but no header follows. */
    const char *start = bytes.size > 8 && bytes.data[8] != '{' ? (const char *)bytes.data : "";
    require(&c, strncmp(start, "\x1f\x8b", 2) != 0, "is a gzip file, expected a safetensors file");
    require(&c, strncmp(start, "PK", 2) != 0, "is a ZIP file, expected a safetensors file");
    const uint64_t length = take_little_endian(&c, 8), rest = bytes.size - c.at;
    require(&c, length <= LONGEST, "a header of %" PRIu64 " bytes, expected at most %d (safetensors)", length,
            LONGEST);
    require(&c, length <= rest, "is truncated, holds %zu of the %zu bytes of its header", (size_t)rest,
            (size_t)length);
    if (!c.failed) {
        c = (Cursor){.data = bytes.data + 8, .size = length, .name = name, .part = "header", .error = error};
        take_header(&c, file, &(Bytes){bytes.data + 8 + length, (size_t)(rest - length)});
    }
    if (c.failed)
        tensors_free(file);
    return c.failed;
}

int tensors_read(const char *path, TensorFile *file, Error *error) {
    Bytes bytes;
    return file_bytes(path, UINT64_MAX, &bytes, error) ? -1 : tensors_parse(bytes, path, file, error);
}

void tensors_free(TensorFile *file) {
    free(file->bytes.data);
    free(file->tensors);
    free(file->metadata);
    *file = (TensorFile){.tensors = NULL};
}

const TensorEntry *tensors_find(const TensorFile *file, const char *name) {
    return bsearch(&name, file->tensors, (size_t)file->tensor_count, sizeof *file->tensors, compare_names);
}

const char *tensors_metadata(const TensorFile *file, const char *key) {
    const size_t size = 2 * sizeof *file->metadata;
    const char **pair = bsearch(&key, file->metadata, (size_t)file->metadata_count, size, compare_names);
    return pair ? pair[1] : NULL;
}

/* [28, 28, 1]. Returns `text`. */
static const char *shape_text(int rank, const int64_t *shape, char text[192]) {
    int length = sprintf(text, "[");
    for (int i = 0; i < rank; i++)
        length += sprintf(text + length, "%s%" PRId64, i > 0 ? ", " : "", shape[i]);
    return strcat(text, "]");
}

int tensors_copy(const TensorEntry *entry, const char *path, int rank, const int64_t *shape, real *out,
                 Error *error) {
    Cursor c = {.data = entry->data, .size = entry->size, .name = path, .error = error};
    const int is_single = entry->type == TYPE_F32;
    char found[192], expected[192];
    require(&c, is_single || entry->type == TYPE_F64, "tensor %s is not of type F32 or F64", entry->name);
    require(&c, rank == entry->rank && memcmp(shape, entry->shape, (size_t)rank * sizeof *shape) == 0,
            "tensor %s is %s, expected %s", entry->name, shape_text(entry->rank, entry->shape, found),
            shape_text(rank, shape, expected));
    for (size_t i = 0; i < entry->count && !c.failed; i++) {
        const uint64_t bits = take_little_endian(&c, is_single ? 4 : 8);
        const union { uint32_t bits; float value; } single = {(uint32_t)bits};
        const union { uint64_t bits; double value; } full = {bits};
        out[i] = is_single ? (real)single.value : (real)full.value;
        require(&c, isfinite(out[i]), "tensor %s: value %zu is not a finite number", entry->name, i);
    }
    return c.failed;
}

/* ---- safetensors: writing ---- */

static void put_string(FILE *stream, const char *text) {
    putc('"', stream);
    for (; *text; text++)
        fprintf(stream, *text > 0 && *text < 0x20 ? "\\u%04x" : strchr("\"\\", *text) ? "\\%c" : "%c", *text);
    putc('"', stream);
}

/* Numbers of 1, 4 or 8 bytes, which stand in this machine's order, in little-endian order. */
static void put_little_endian(FILE *stream, const void *numbers, size_t count, size_t size) {
    const uint16_t one = 1;
    const size_t flip = *(const unsigned char *)&one ? 0 : size - 1;
    for (size_t b = 0; b < count * size; b++)
        putc_unlocked(((const unsigned char *)numbers)[b ^ flip], stream);
}

static size_t elements_of(const TensorEntry *tensor) {
    size_t count = 1;
    for (int i = 0; i < tensor->rank; i++)
        count *= (size_t)tensor->shape[i];
    return count;
}

/* The header's length is written when it is known. Spaces behind let the data begin at a multiple of 8. */
static int write_tensors(FILE *stream, const void *context) {
    const TensorFile *file = context;
    size_t offset = 0;
    char shape[192];
    fprintf(stream, "%8s{\"__metadata__\":{", "");
    for (int i = 0; i < 2 * file->metadata_count; i++) {
        fputs(i == 0 ? "" : i % 2 ? ":" : ",", stream);
        put_string(stream, file->metadata[i]);
    }
    putc('}', stream);
    for (int i = 0; i < file->tensor_count; i++) {
        const TensorEntry *t = &file->tensors[i];
        const size_t begin = offset;
        offset += elements_of(t) * TYPE_SIZES[t->type];
        putc(',', stream);
        put_string(stream, t->name);
        fprintf(stream, ":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}", TYPE_NAMES[t->type],
                shape_text(t->rank, t->shape, shape), begin, offset);
    }
    fprintf(stream, "}%*s", (int)(-(ftell(stream) + 1) & 7), "");
    const uint64_t length = (uint64_t)ftell(stream) - 8;
    int failed = fseek(stream, 0, SEEK_SET);
    put_little_endian(stream, &length, 1, 8);
    failed |= fseek(stream, 0, SEEK_END);
    for (int i = 0; i < file->tensor_count; i++) {
        const TensorEntry *t = &file->tensors[i];
        put_little_endian(stream, t->data, elements_of(t), TYPE_SIZES[t->type]);
    }
    return failed || ferror(stream);
}

int tensors_write(const char *path, const TensorFile *file, Error *error) {
    return file_replace(path, write_tensors, file, error);
}
