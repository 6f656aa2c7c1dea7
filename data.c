/* data.c - files in and out: gzip, PNG, PGM, PPM, MNIST, CIFAR-10, built-in digits, a chart, safetensors.
 *
 * The parsers face files from strangers. Three rules make it easy to see that they are safe: memory is asked
 * for only after the file was seen to hold what it promises; every read goes through one bounded cursor; and
 * a file that is not exactly right is refused with one line: what was found and what was expected. */

#define _XOPEN_SOURCE 700   /* POSIX of 2008 with realpath */

#include "diffenc.h"

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- messages ---- */

/* Bytes of the UTF-8 character at `text`; 0 if there is none (RFC 3629: shortest form, no surrogates). */
static size_t utf8_length(const char *text) {
    const unsigned char *u = (const unsigned char *)text;
    const size_t length = *u < 0x80 ? 1 : *u < 0xc2 ? 0 : *u < 0xe0 ? 2 : *u < 0xf0 ? 3 : *u < 0xf5 ? 4 : 0;
    for (size_t i = 1; i < length; i++)
        if (u[i] >> 6 != 2)
            return 0;
    const int is_wrong = (*u == 0xe0 && u[1] < 0xa0) || (*u == 0xed && u[1] > 0x9f) ||
                         (*u == 0xf0 && u[1] < 0x90) || (*u == 0xf4 && u[1] > 0x8f);
    return is_wrong ? 0 : length;
}

const char *printable(const char *text, char *buffer, size_t size) {
    size_t at = 0;
    for (size_t length; *text; text += length) {
        const unsigned first = (unsigned char)text[0], second = (unsigned char)text[1];
        length = utf8_length(text);
        const int shown = length && first >= 0x20 && first != 0x7f && (first != 0xc2 || second >= 0xa0);
        length = shown ? length : 1;
        const size_t needed = shown ? length : 4;
        if (at + needed >= size)
            break;
        memcpy(buffer + at, text, length);
        if (!shown)
            sprintf(buffer + at, "\\x%02x", first);
        at += needed;
    }
    buffer[at] = '\0';
    return buffer;
}

/* fail() for messages that quote names, paths or content of files: none of it may command the terminal. */
static int refuse(Error *error, const char *format, ...) {
    char text[sizeof error->text], shown[sizeof error->text];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return fail(error, "%s", printable(text, shown, sizeof shown));
}

/* ---- reading bytes ---- */

/* What is being read and how far. The first failure is kept in `error`; after it bytes are zeros and lists
 * are at their end, so that a parser asks for `failed` only where it would loop or write. */
typedef struct {
    const unsigned char *data;
    size_t size, at;
    const char *name, *part;   /* of the file; what `at` counts in, for messages, or NULL */
    Error *error;
    int failed;
} Cursor;

/* Fail with this message unless the condition holds. Returns whether all is well so far. */
static int require(Cursor *c, int condition, const char *format, ...) {
    if (c->failed || condition)
        return !c->failed;
    char what[400];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    c->failed = c->part ? refuse(c->error, "%s: %s (%s byte %zu)", c->name, what, c->part, c->at)
                        : refuse(c->error, "%s: %s", c->name, what);
    return 0;
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

/* `memory` with room for `size` bytes. If there is not enough, the reading has failed, the result is NULL and
 * `memory` stays as it was. */
static void *resize(Cursor *c, void *memory, size_t size) {
    void *resized = c->failed ? NULL : realloc(memory, size ? size : 1);
    require(c, resized != NULL, "out of memory, needs %zu bytes", size);
    return resized;
}

/* Room for one more item in an array that has room for the next power of two: memory stays in proportion to
 * what was really read. */
static void *array_grow(Cursor *c, void *array, size_t count, size_t size) {
    void *grown = count & (count - 1) ? NULL : resize(c, array, (count ? 2 * count : 1) * size);
    return grown ? grown : array;
}

/* The CRC-32 of gzip and PNG. `crc` is that of the data before, 0 at the start. */
static uint32_t crc_32(uint32_t crc, const unsigned char *data, size_t size) {
    static const uint32_t table[16] = {   /* for half a byte */
        0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158, 0x5005713c,
        0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c};
    crc = ~crc;
    for (size_t i = 0; i < 2 * size; i++)
        crc = table[(crc ^ data[i / 2] >> 4 * (i % 2)) & 15] ^ crc >> 4;
    return ~crc;
}

/* ---- gzip ---- */

/* A prefix code (RFC 1951, 3.2.2): how many symbols there are by length of code, and all in order of code. */
typedef struct {
    int count[16], symbol[288];
} PrefixCode;

typedef struct {
    Cursor in;
    unsigned byte;   /* the last one taken from `in`; its lowest `used` bits are used up */
    int used, is_full;
    Bytes out;
    uint64_t most;   /* bytes wanted; once `out` holds them, everything stops as after a failure */
    size_t member;   /* where in `out` this member begins: no distance reaches before it */
} Inflater;

static unsigned take_bits(Inflater *s, int count) {
    unsigned value = 0;
    for (int i = 0; i < count; i++, s->used++) {
        if (s->used == 8) {
            s->byte = take_byte(&s->in);
            s->used = 0;
        }
        value |= (s->byte >> s->used & 1) << i;
    }
    return value;
}

static void put_byte(Inflater *s, unsigned byte) {
    if (!s->in.failed && s->out.size == s->most)
        s->is_full = s->in.failed = 1;
    s->out.data = array_grow(&s->in, s->out.data, s->out.size, 1);
    if (!s->in.failed)
        s->out.data[s->out.size++] = (unsigned char)byte;
}

/* Make a code from lengths[count] in 0..15. Only a code of one bit, or of none, may be incomplete. */
static void make_code(Inflater *s, PrefixCode *code, const unsigned char *lengths, int count, int allow_one) {
    int unused = 1, place[17] = {0};   /* where the symbols of each length begin */
    memset(code->count, 0, sizeof code->count);
    for (int i = 0; i < count; i++)
        code->count[lengths[i]]++;
    for (int length = 1; length <= 15; length++) {
        place[length + 1] = place[length] + code->count[length];
        unused = 2 * unused - code->count[length];
        require(&s->in, unused >= 0, "has an over-subscribed code");
    }
    allow_one = allow_one && place[16] <= 1 && place[16] == code->count[1];
    require(&s->in, unused == 0 || allow_one, "has an incomplete code");
    for (int i = 0; i < count; i++)
        if (lengths[i])
            code->symbol[place[lengths[i]]++] = i;
}

static unsigned take_symbol(Inflater *s, const PrefixCode *code) {
    int beyond = 0, shorter = 0;   /* the first code of this length, by so much; number of shorter codes */
    for (int length = 1; length <= 15; length++) {
        beyond = 2 * beyond + (int)take_bits(s, 1);
        if (beyond < code->count[length])
            return (unsigned)code->symbol[shorter + beyond];
        beyond -= code->count[length];
        shorter += code->count[length];
    }
    return (unsigned)require(&s->in, 0, "has an invalid code");
}

/* The two codes of a block: fixed, or sent as lengths that have a code themselves (3.2.6, 3.2.7). */
static void take_codes(Inflater *s, int is_fixed, PrefixCode *literal, PrefixCode *distance) {
    static const unsigned char order[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    unsigned char lengths[286 + 30 + 138] = {0};   /* a run may begin at the last of them */
    int literals = 288, all = 288 + 32;
    for (int i = 0; is_fixed && i < all; i++)
        lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : i < 288 ? 8 : 5;
    if (!is_fixed) {
        literals = 257 + (int)take_bits(s, 5);
        all = literals + 1 + (int)take_bits(s, 5);
        require(&s->in, literals <= 286 && all - literals <= 30, "has more codes than there are symbols");
        for (int i = 0, count = 4 + (int)take_bits(s, 4); i < count; i++)
            lengths[order[i]] = (unsigned char)take_bits(s, 3);
        make_code(s, literal, lengths, 19, 0);
    }
    for (int i = 0, run = 1; !is_fixed && i < all && !s->in.failed; i += run) {
        const int symbol = (int)take_symbol(s, literal);
        require(&s->in, symbol != 16 || i > 0, "repeats a code length before the first");
        run = symbol < 16 ? 1 : symbol < 18 ? 3 + (int)take_bits(s, symbol - 14) : 11 + (int)take_bits(s, 7);
        memset(lengths + i, symbol < 16 ? symbol : symbol == 16 && i > 0 ? lengths[i - 1] : 0, (size_t)run);
        require(&s->in, i + run <= all, "has more code lengths than codes");
    }
    require(&s->in, lengths[256], "has no code for the end of a block");
    make_code(s, literal, lengths, literals, !is_fixed);
    make_code(s, distance, lengths + literals, all - literals, !is_fixed);
}

/* Lengths and distances are sent as small floating-point numbers: `symbol` counts 2^fine steps to a doubling,
 * further bits of the stream choose within a step (the tables of RFC 1951, 3.2.5). */
static unsigned take_scaled(Inflater *s, unsigned symbol, int fine) {
    const unsigned steps = 1u << fine;
    const int more = (int)(symbol >> fine) - 1;
    return more < 0 ? symbol : ((steps + symbol % steps) << more) + take_bits(s, more);
}

static void inflate_compressed(Inflater *s, const PrefixCode *literal, const PrefixCode *distance) {
    for (unsigned symbol; (symbol = take_symbol(s, literal)) != 256 && !s->in.failed;) {
        if (symbol < 256) {
            put_byte(s, symbol);
            continue;
        }
        require(&s->in, symbol <= 285, "has an invalid length");
        const unsigned length = symbol < 285 ? 3 + take_scaled(s, symbol - 257, 2) : 258;
        const unsigned step = take_symbol(s, distance);
        require(&s->in, step <= 29, "has an invalid distance");
        const size_t back = s->in.failed ? 0 : 1 + take_scaled(s, step, 1);
        require(&s->in, back <= s->out.size - s->member, "has a distance that is too far back");
        /* Byte by byte: the copy may overlap its source, and then the bytes just written repeat. */
        for (unsigned i = 0; i < length && !s->in.failed; i++)
            put_byte(s, s->out.data[s->out.size - back]);
    }
}

static void inflate_block(Inflater *s, unsigned type) {
    Cursor *in = &s->in;
    PrefixCode literal, distance;
    if (type == 0) {
        s->used = 8;   /* the rest of a byte is padding */
        const uint64_t length = take_little_endian(in, 2);
        require(in, take_little_endian(in, 2) == (length ^ 0xffff), "has a stored block of two lengths");
        for (uint64_t i = 0; i < length && !in->failed; i++)
            put_byte(s, take_byte(in));
    } else if (require(in, type < 3, "has a block of unknown type")) {
        take_codes(s, type == 1, &literal, &distance);
        inflate_compressed(s, &literal, &distance);
    }
}

/* One member (RFC 1952, 2.3): header, deflate blocks, CRC-32 and length of what came out. */
static void inflate_member(Inflater *s) {
    enum { HEADER_CRC = 2, EXTRA = 4, NAME = 8, COMMENT = 16 };
    Cursor *in = &s->in;
    const char *other = in->at > 0 ? "has trailing garbage" : "is not gzip";
    require(in, take_byte(in) == 0x1f && take_byte(in) == 0x8b, other);
    require(in, take_byte(in) == 8, "has an unknown compression method");
    const unsigned flags = take_byte(in);
    require(in, flags < 32, "has unknown flags");
    take_little_endian(in, 6);   /* time, hints, system */
    for (uint64_t extra = flags & EXTRA ? take_little_endian(in, 2) : 0; extra > 0; extra--)
        take_byte(in);
    for (unsigned text = NAME; text <= COMMENT; text *= 2)
        while ((flags & text) && take_byte(in)) { }
    take_little_endian(in, flags & HEADER_CRC ? 2 : 0);   /* gzip does not check it either */
    s->member = s->out.size;
    for (unsigned last = 0; !last && !in->failed;) {
        last = take_bits(s, 1);
        inflate_block(s, take_bits(s, 2));
    }
    s->used = 8;
    const unsigned char *made = s->out.data + s->member;
    const size_t size = s->out.size - s->member;
    require(in, in->failed || take_little_endian(in, 4) == crc_32(0, made, size), "has a wrong CRC");
    require(in, take_little_endian(in, 4) == (size & 0xffffffff), "has a wrong length");
}

int gzip_inflate(const unsigned char *data, size_t size, const char *name, uint64_t most, Bytes *out,
                 Error *error) {
    Inflater s = {.in = {data, size, 0, name, "gzip", error, 0}, 0, 8, 0, {allocate(1, 1), 0}, most, 0};
    require(&s.in, size > 0, "is empty, expected a gzip stream");
    while (!s.in.failed && s.in.at < size) {
        inflate_member(&s);
        while (s.in.at < size && data[s.in.at] == 0)   /* padding, as on tapes */
            s.in.at++;
    }
    if (s.in.failed && !s.is_full) {
        free(s.out.data);
        s.out = (Bytes){NULL, 0};
    }
    *out = s.out;
    return s.in.failed && !s.is_full ? -1 : 0;
}

/* ---- files ---- */

/* The first `most` bytes of a file, or all. Pipes may block and /dev/zero never ends: both are refused. */
static int file_bytes(const char *path, uint64_t most, Bytes *bytes, Error *error) {
    Cursor c = {.name = path, .error = error};
    struct stat status = {0};
    *bytes = (Bytes){NULL, 0};
    const int file = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    const int is_open = file >= 0 && fstat(file, &status) == 0;
    require(&c, is_open, "%s", strerror(errno));
    require(&c, !S_ISDIR(status.st_mode), "is a directory, expected a file");
    require(&c, S_ISREG(status.st_mode), "is a device or a pipe, expected a file");
    const uint64_t there = c.failed ? 0 : (uint64_t)status.st_size, size = there < most ? there : most;
    bytes->data = resize(&c, NULL, (size_t)size);
    for (ssize_t got = 1; got > 0 && !c.failed; bytes->size += got > 0 ? (size_t)got : 0) {
        got = read(file, bytes->data + bytes->size, (size_t)size - bytes->size);
        require(&c, got >= 0, "%s", strerror(errno));
    }
    if (file >= 0)
        close(file);
    if (c.failed) {
        free(bytes->data);
        *bytes = (Bytes){NULL, 0};
    }
    return bytes->data ? 0 : -1;
}

static int has_extension(const char *path, const char *extension) {
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

/* The new name of a file is on the disk when its directory is. A directory that can be written but not read,
 * or a file system that cannot do it (EINVAL), is no failure. `path` is spoilt. */
static int directory_sync(char *path) {
    char *slash = strrchr(path, '/');
    strcpy(slash ? slash + 1 : path, ".");
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    const int reason = file >= 0 && fsync(file) != 0 && errno != EINVAL ? errno : 0;
    if (file >= 0)
        close(file);
    return reason;
}

int file_replace(const char *path, FileWriter write, const void *context, Error *error) {
    char target[PATH_MAX], temporary[PATH_MAX + 32];
    struct stat status;
    if (!realpath(path, target)) {
        if (errno != ENOENT || lstat(path, &status) == 0)   /* a link to nothing */
            return refuse(error, "%s: %s", path, strerror(errno));
        snprintf(target, sizeof target, "%s", path);
    }
    /* A rename would turn /dev/null into a plain file. */
    if (stat(target, &status) == 0 && !S_ISREG(status.st_mode))
        return refuse(error, "%s: is not a regular file", path);
    snprintf(temporary, sizeof temporary, "%s.tmp.%ld", target, (long)getpid());
    unlink(temporary);   /* whatever has this name was left by a process that is no more */
    const int file = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    FILE *stream = file < 0 ? NULL : fdopen(file, "wb");
    int reason = stream ? 0 : errno;
    errno = 0;
    if (stream && (write(stream, context) != 0 || fflush(stream) != 0 || fsync(file) != 0))
        reason = errno ? errno : EIO;
    if (file >= 0 && (stream ? fclose(stream) : close(file)) != 0 && !reason)
        reason = errno;
    if (!reason && rename(temporary, target) != 0)
        reason = errno;
    if (reason)
        unlink(temporary);
    else
        reason = directory_sync(temporary);
    return reason ? refuse(error, "%s: %s", path, strerror(reason)) : 0;
}

/* ---- images ---- */

typedef struct {
    const unsigned char *pixels;
    int height, width, channels, is_ppm;
} Image;

static unsigned char *put_big_endian(unsigned char *at, uint32_t value) {
    for (int shift = 24; shift >= 0; shift -= 8)
        *at++ = (unsigned char)(value >> shift);
    return at;
}

static void put_chunk(FILE *stream, const char *type, const unsigned char *data, size_t size) {
    unsigned char length[4], crc[4];
    put_big_endian(length, (uint32_t)size);
    put_big_endian(crc, crc_32(crc_32(0, (const unsigned char *)type, 4), data, size));
    fwrite(length, 1, 4, stream);
    fwrite(type, 1, 4, stream);
    fwrite(data, 1, size, stream);
    fwrite(crc, 1, 4, stream);
}

/* A PNG without compression, since the pixels are few: each row is a deflate block of type "stored". */
static int write_png(void *stream, const void *context) {
    const Image *image = context;
    const size_t row = (size_t)image->width * (size_t)image->channels, length = row + 1, inverse = ~length;
    unsigned char header[13] = {[8] = 8, [9] = image->channels == 3 ? 2 : 0};   /* 8 bits, RGB or grey */
    put_big_endian(put_big_endian(header, (uint32_t)image->width), (uint32_t)image->height);
    unsigned char *data = allocate(2 + (row + 6) * (size_t)image->height + 4, 1), *at = data;
    uint32_t low = 1, high = 0;   /* Adler-32 (RFC 1950) */
    *at++ = 0x78;
    *at++ = 0x01;
    for (int y = 0; y < image->height; y++) {   /* is it the last, length, inverse; 0: no filter; pixels */
        const size_t block[6] = {y == image->height - 1, length, length >> 8, inverse, inverse >> 8, 0};
        for (int b = 0; b < 6; b++)
            at[b] = (unsigned char)block[b];
        memcpy(at + 6, image->pixels + (size_t)y * row, row);
        at += 5;
        for (const unsigned char *end = at + length; at < end; at++) {
            low = (low + *at) % 65521;
            high = (high + low) % 65521;
        }
    }
    at = put_big_endian(at, high << 16 | low);
    fwrite("\x89PNG\r\n\x1a\n", 1, 8, stream);
    put_chunk(stream, "IHDR", header, 13);
    put_chunk(stream, "IDAT", data, (size_t)(at - data));
    put_chunk(stream, "IEND", data, 0);
    free(data);
    return ferror((FILE *)stream);
}

static int write_netpbm(void *stream, const void *context) {
    const Image *image = context;
    const size_t copies = image->is_ppm && image->channels == 1 ? 3 : 1;   /* grey is three equal colours */
    const size_t count = (size_t)image->height * (size_t)image->width * (size_t)image->channels;
    fprintf(stream, "P%d\n%d %d\n255\n", image->is_ppm ? 6 : 5, image->width, image->height);
    for (size_t i = 0; i < copies * count; i++)
        putc(image->pixels[i / copies], stream);
    return ferror((FILE *)stream);
}

int image_path_check(const char *path, int channels, Error *error) {
    const int is_pgm = has_extension(path, ".pgm");
    if (is_pgm && channels != 1)
        return refuse(error, "%s: a .pgm holds grey images only, expected .png or .ppm for colour", path);
    if (is_pgm || has_extension(path, ".png") || has_extension(path, ".ppm"))
        return 0;
    return refuse(error, "%s: unknown kind of image, expected a name that ends in .png, .pgm or .ppm", path);
}

int image_write(const char *path, const unsigned char *pixels, int height, int width, int channels,
                Error *error) {
    const Image image = {pixels, height, width, channels, has_extension(path, ".ppm")};
    assert(height > 0 && width > 0 && (channels == 1 || channels == 3));
    if ((double)width * channels > 65534 || (double)height * width * 3 > 2e9)
        return refuse(error, "%s: an image of %d x %d pixels is too large", path, width, height);
    return image_path_check(path, channels, error) ||
           file_replace(path, has_extension(path, ".png") ? write_png : write_netpbm, &image, error) ? -1 : 0;
}

unsigned char *image_grid(const unsigned char *images, int count, int columns, int height, int width,
                          int channels, int *grid_height, int *grid_width) {
    assert(count > 0 && columns > 0);
    columns = columns > count ? count : columns;
    const int rows = (count + columns - 1) / columns, gap = 2;
    *grid_height = rows * (height + gap) + gap;
    *grid_width = columns * (width + gap) + gap;
    const size_t row = (size_t)width * (size_t)channels, grid_row = (size_t)*grid_width * (size_t)channels;
    unsigned char *grid = allocate((size_t)*grid_height, grid_row);
    memset(grid, 255, (size_t)*grid_height * grid_row);
    for (int i = 0; i < count; i++) {
        const int top = gap + i / columns * (height + gap), left = gap + i % columns * (width + gap);
        unsigned char *corner = grid + (size_t)top * grid_row + (size_t)(left * channels);
        for (int y = 0; y < height; y++, images += row)
            memcpy(corner + (size_t)y * grid_row, images, row);
    }
    return grid;
}

/* ---- drawing ---- */

/* An image [height, width, channels] on white (255) or black (0). Pixel (x, y) is centred on (x, y). */
typedef struct {
    unsigned char *pixels;
    int height, width, channels, background;
} Canvas;

static int clamp(double value, int most) { return (int)fmin(fmax(value, 0), most); }

/* A line with round ends and soft edges. The values of a pixel go from the background towards the colour by
 * how much of it is covered, and never back, so that the joints of a long curve do not show. */
static void draw_line(const Canvas *canvas, double x0, double y0, double x1, double y1, double radius,
                      const unsigned char *colour) {
    const double along_x = x1 - x0, along_y = y1 - y0, square = along_x * along_x + along_y * along_y;
    const int left = clamp(fmin(x0, x1) - radius, canvas->width);
    const int right = clamp(fmax(x0, x1) + radius + 2, canvas->width);
    const int bottom = clamp(fmax(y0, y1) + radius + 2, canvas->height);
    for (int y = clamp(fmin(y0, y1) - radius, canvas->height); y < bottom; y++)
        for (int x = left; x < right; x++) {
            const double along = square > 0 ? ((x - x0) * along_x + (y - y0) * along_y) / square : 0;
            const double part = fmin(fmax(along, 0), 1);
            const double across_x = x - x0 - part * along_x, across_y = y - y0 - part * along_y;
            const double cover = fmin(radius + 0.5 - sqrt(across_x * across_x + across_y * across_y), 1);
            unsigned char *pixel = canvas->pixels + (y * (ptrdiff_t)canvas->width + x) * canvas->channels;
            for (int c = 0; c < canvas->channels && cover > 0; c++) {
                const int ground = canvas->background, moved = (int)lround(cover * (colour[c] - ground));
                if (abs(moved) > abs(pixel[c] - ground))
                    pixel[c] = (unsigned char)(ground + moved);
            }
        }
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
    const int digit = (int)(index % 10), glyph = random_uniform(stream, 0) < 0.35 ? variants[digit] : digit;
    const double narrow = 0.6 + 0.4 * random_uniform(stream, 1), tall = 16 + 3 * random_uniform(stream, 4);
    const double slant = 0.5 * random_uniform(stream, 2) - 0.1, turn = 0.4 * random_uniform(stream, 3) - 0.2;
    Glyph g = {.radius = 0.8 + 0.8 * random_uniform(stream, 7)};
    double low[2] = {1e9, 1e9}, high[2] = {-1e9, -1e9};
    uint32_t position = 8;
    for (const signed char *p = glyphs[glyph]; *p != END; p += 2, g.count++) {
        const int i = g.count, lifted = *p == PEN_UP;
        p += lifted;
        assert(i < MOST_POINTS);
        g.stroke[i] = i > 0 ? g.stroke[i - 1] + lifted : 0;
        if (i > 0 && p[0] == p[-2] && p[1] == p[-1])
            position -= 2;   /* the two points of a corner stay together */
        const double wobbled = narrow * (p[0] - 50 + 7 * (random_uniform(stream, position++) - 0.5));
        const double down = p[1] - 50 + 7 * (random_uniform(stream, position++) - 0.5);
        const double across = wobbled - slant * down;
        g.at[0][i] = across * cos(turn) - down * sin(turn);
        g.at[1][i] = across * sin(turn) + down * cos(turn);
        for (int axis = 0; axis < 2; axis++) {
            low[axis] = fmin(low[axis], g.at[axis][i]);
            high[axis] = fmax(high[axis], g.at[axis][i]);
        }
    }
    const double scale = tall / fmax(high[1] - low[1], high[0] - low[0]);
    for (uint32_t axis = 0; axis < 2; axis++) {
        const double middle = (DIGIT_SIZE - 1) / 2.0 + 3 * (random_uniform(stream, 5 + axis) - 0.5);
        for (int i = 0; i < g.count; i++)
            g.at[axis][i] = middle + scale * (g.at[axis][i] - (low[axis] + high[axis]) / 2);
    }
    return g;
}

static void digit_draw(uint64_t seed, Split split, uint32_t index, unsigned char *out) {
    enum { PIECES = 5 };
    static const unsigned char white[1] = {255};
    const Canvas canvas = {out, DIGIT_SIZE, DIGIT_SIZE, 1, 0};
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
            draw_line(&canvas, from[0], from[1], to[0], to[1], g.radius, white);
            memcpy(from, to, sizeof from);
        }
    }
}

/* ---- charts ---- */

enum { CHART_WIDTH = 640, PLOT_X = 62, PLOT_Y = 56, PLOT_WIDTH = 562, PLOT_HEIGHT = 290 };

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

/* The value of a curve (side 0), or an edge of its band (1: above, -1: below). */
static double curve_value(const Curve *c, int i, int side) {
    return c->y[i] + (c->error && isfinite(c->error[i]) ? side * c->error[i] : 0);
}

static int is_drawn(const Curve *c, int i) {
    return fabs(c->x[i]) < 1e30 && fabs(curve_value(c, i, 1)) < 1e30;   /* false for what is not a number */
}

static int compare_numbers(const void *left, const void *right) {
    const double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

/* The axes hold all curves, with one exception. A loss falls so far in its first steps that its end would
 * look flat: where the first tenth, or one value in fifty, would take most of the height, it is cut off. */
static void choose_axes(const Curve *curves, int count, Axis *across, Axis *up) {
    size_t total = 0, late = 0;
    double x[2] = {INFINITY, -INFINITY}, y[2] = {INFINITY, -INFINITY};
    for (const Curve *c = curves; c < curves + count; total += (size_t)c++->count)
        for (int i = 0; i < c->count; i++)
            if (is_drawn(c, i)) {
                x[0] = fmin(x[0], c->x[i]);
                x[1] = fmax(x[1], c->x[i]);
                y[0] = fmin(y[0], curve_value(c, i, -1));
                y[1] = fmax(y[1], curve_value(c, i, 1));
            }
    double *values = allocate(total, sizeof *values);
    for (const Curve *c = curves; c < curves + count; c++)
        for (int i = 0; i < c->count; i++)
            if (is_drawn(c, i) && c->x[i] >= x[0] + (x[1] - x[0]) / 10)
                values[late++] = curve_value(c, i, 1);
    qsort(values, late, sizeof *values, compare_numbers);
    if (late > 0 && y[1] - y[0] > 2.5 * (values[late - 1 - late / 50] - y[0]))
        y[1] = values[late - 1 - late / 50];
    free(values);
    *across = (Axis){late ? x[0] : 0, late ? x[1] : 1, 0, PLOT_X, PLOT_WIDTH};
    *up = (Axis){late ? y[0] : 0, late ? y[1] : 1, 0, PLOT_Y + PLOT_HEIGHT, -PLOT_HEIGHT};
    axis_divide(across, 0, 6);
    axis_divide(up, 0.04, 10);
}

void put_escaped(FILE *out, const char *text) {
    char shown[512];
    for (const char *at = printable(text, shown, sizeof shown); *at; at++)
        fprintf(out, strchr("<>&'\"", *at) ? "&#%d;" : "%c", *at);
}

static void put_text(FILE *out, double x, double y, const char *attributes, const char *text) {
    fprintf(out, "<text x='%.1f' y='%.1f' %s>", x, y, attributes);
    put_escaped(out, text);
    fputs("</text>\n", out);
}

/* Grid lines and their labels, with the decimals that the step needs. */
static void put_grid(FILE *out, const Axis *a, int is_vertical) {
    const int decimals = (int)fmax(0, -floor(log10(a->step) + 1e-9));
    for (double k = ceil(a->low / a->step - 1e-9); k * a->step <= a->high + 1e-9 * a->step; k++) {
        const double at = axis_place(a, k * a->step);
        char label[64];
        snprintf(label, sizeof label, "%.*f", decimals, k * a->step + 0.0);   /* 0 has no sign */
        if (is_vertical)
            fprintf(out, "<path class='grid' d='M%d %.1fh%d'/>", PLOT_X, at, PLOT_WIDTH);
        else
            fprintf(out, "<path class='grid' d='M%.1f %dv%d'/>", at, PLOT_Y, PLOT_HEIGHT);
        put_text(out, is_vertical ? PLOT_X - 7 : at, is_vertical ? at + 5 : PLOT_Y + PLOT_HEIGHT + 20,
                 is_vertical ? "text-anchor='end'" : "text-anchor='middle'", label);
    }
}

/* Points of a curve, or of an edge of its band; the lower edge goes back. A point is left out where it would
 * change no pixel: in a column, half a unit wide, among those drawn already. */
static void put_points(FILE *out, const Axis *across, const Axis *up, const Curve *c, int side) {
    double column = -1, top = 0, bottom = 0, x = -1, y = 0;
    for (int k = 0; k < c->count; k++) {
        const int i = side < 0 ? c->count - 1 - k : k;
        if (!is_drawn(c, i))
            continue;
        x = axis_place(across, c->x[i]);
        y = fmin(fmax(axis_place(up, curve_value(c, i, side)), -999), 1999);
        const int is_new = floor(2 * x) != column;
        if (!is_new && y > top - 0.5 && y < bottom + 0.5)
            continue;
        column = floor(2 * x);
        top = is_new ? y : fmin(top, y);
        bottom = is_new ? y : fmax(bottom, y);
        fprintf(out, "%.1f,%.1f ", x, y);
    }
    if (x >= 0)
        fprintf(out, "%.1f,%.1f ", x, y);   /* the true end; of one point it makes a line, which is a dot */
}

void chart_svg(FILE *out, const char *title, const char *x_label, const char *y_label, const Curve *curves,
               int count) {
    enum { COLOURS = 6 };
    static const char style[] =   /* the names are for a whole page, on which there may be many charts */
        "<style>.chart{background:#fff;color:#222;font:15px sans-serif}.chart text{fill:currentColor}\n"
        ".chart polyline,.chart path{fill:none;stroke:currentColor;stroke-width:2;stroke-linecap:round;"
        "stroke-linejoin:round}\n.chart polygon{fill:currentColor;opacity:.22}"
        ".chart .grid{stroke-width:.6;opacity:.35}\n"
        ".chart .c0{color:#0a62c4}.chart .c1{color:#c2410c}.chart .c2{color:#15803d}"
        ".chart .c3{color:#8e24aa}.chart .c4{color:#946200}.chart .c5{color:#0e7490}\n"
        "@media(prefers-color-scheme:dark){.chart{background:#15171b;color:#ddd}"
        ".chart .c0{color:#6cb2ff}.chart .c1{color:#ff9a5c}.chart .c2{color:#5fd38a}"
        ".chart .c3{color:#d99bf0}.chart .c4{color:#e3bd55}.chart .c5{color:#5fd0e6}}</style>\n";
    size_t longest = 8;
    for (const Curve *c = curves; c < curves + count; c++)
        longest = longest < strlen(c->name) ? strlen(c->name) : longest;
    const int columns = longest > 60 ? 1 : PLOT_WIDTH / (40 + 8 * (int)longest);
    const int y = PLOT_Y + PLOT_HEIGHT + 46, height = y + 10 + 22 * ((count + columns - 1) / columns);
    Axis across, up;
    choose_axes(curves, count, &across, &up);
    fprintf(out, "<svg xmlns='http://www.w3.org/2000/svg' class='chart' viewBox='0 0 %d %d'>\n%s",
            CHART_WIDTH, height, style);
    put_text(out, PLOT_X, 22, "font-size='18' font-weight='bold'", title);
    put_text(out, PLOT_X, 45, "", y_label);
    put_text(out, PLOT_X + PLOT_WIDTH / 2.0, y - 4, "text-anchor='middle'", x_label);
    put_grid(out, &across, 0);
    put_grid(out, &up, 1);
    for (int i = 0; i < count; i++) {   /* an svg in the svg cuts off what leaves the plot */
        const double x = PLOT_X + i % columns * (PLOT_WIDTH / columns), row = y + 20 + i / columns * 22;
        fprintf(out, "<g class='c%d' stroke-dasharray='%d'><path d='M%.1f %.1fh24'/>", i % COLOURS,
                i / COLOURS * 7, x, row - 5);
        fprintf(out, "<svg x='%d' y='%d' width='%d' height='%d' viewBox='%d %d %d %d'>", PLOT_X, PLOT_Y,
                PLOT_WIDTH, PLOT_HEIGHT, PLOT_X, PLOT_Y, PLOT_WIDTH, PLOT_HEIGHT);
        for (int side = curves[i].error ? 1 : -2; side > -2; side -= 2) {
            fputs(side > 0 ? "<polygon points='" : "", out);
            put_points(out, &across, &up, &curves[i], side);
            fputs(side < 0 ? "'/>" : "", out);
        }
        fputs("<polyline points='", out);
        put_points(out, &across, &up, &curves[i], 0);
        fputs("'/></svg></g>\n", out);
        put_text(out, x + 32, row, "", curves[i].name);
    }
    fputs("</svg>\n", out);
}

/* ---- data sets ---- */

enum { SIDE = 32, PLANE = SIDE * SIDE, RECORD = 1 + 3 * PLANE, MOST_RECORDS = 10000 };   /* CIFAR-10 */

/* An IDX header: big-endian magic number, count, height, width. Returns the size of a whole file with this
 * header, or of the header alone where it is wrong. */
static uint64_t idx_header(Cursor *c, uint32_t header[4]) {
    memset(header, 0, 4 * sizeof *header);
    for (int i = 0; i < 16 && c->at < c->size; i++)
        header[i / 4] = header[i / 4] << 8 | take_byte(c);
    const int is_header = c->at == 16 && header[0] == 0x803 && header[2] - 1 < 32768 && header[3] - 1 < 32768;
    return 16 + (is_header ? (uint64_t)header[1] * header[2] * header[3] : 0);
}

int idx_parse(Bytes *bytes, const char *name, Dataset *dataset, Error *error) {
    uint32_t header[4];
    Cursor c = {bytes->data, bytes->size, 0, name, NULL, error, 0};
    const uint64_t promised = idx_header(&c, header) - 16, held = bytes->size - c.at;
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
    *dataset = (Dataset){header[1], (int)header[2], (int)header[3], 1, bytes->data, dataset->split, 0};
    bytes->data = NULL;
    return 0;
}

int cifar_parse(const Bytes *bytes, const char *name, Dataset *dataset, Error *error) {
    Cursor c = {.name = name, .error = error};
    const size_t count = bytes->size / RECORD, had = dataset->count;
    require(&c, bytes->size <= (size_t)MOST_RECORDS * RECORD, "holds more than the 10,000 images of a batch");
    require(&c, count > 0 && bytes->size % RECORD == 0,
            "holds %zu bytes, expected a multiple of 3,073 (a label, 32 x 32 x 3 pixels)", bytes->size);
    for (size_t i = 0; i < count && !c.failed; i++)
        require(&c, bytes->data[i * RECORD] < 10, "image %zu has label %d, expected 0 to 9", i,
                bytes->data[i * RECORD]);
    unsigned char *pixels = resize(&c, dataset->pixels, (had + count) * 3 * PLANE);
    if (!pixels)
        return -1;
    dataset->pixels = pixels;
    dataset->count = (uint32_t)(had + count);
    dataset->height = dataset->width = SIDE;
    dataset->channels = 3;
    for (size_t i = 0; i < count * PLANE; i++)
        for (size_t channel = 0; channel < 3; channel++)
            pixels[3 * (had * PLANE + i) + channel] =
                bytes->data[i / PLANE * RECORD + 1 + channel * PLANE + i % PLANE];
    return 0;
}

/* Add the images of a file, reading no more of it than its header promises. */
static int dataset_read(Dataset *dataset, const char *path, int is_mnist, Error *error) {
    uint32_t header[4];
    uint64_t most = is_mnist ? 16 : (uint64_t)MOST_RECORDS * RECORD + 1;   /* one more than allowed */
    Bytes bytes;
    int status = file_read(path, most, &bytes, error);
    if (status == 0 && is_mnist) {
        most = idx_header(&(Cursor){.data = bytes.data, .size = bytes.size}, header) + 1;
        free(bytes.data);
        status = file_read(path, most, &bytes, error);
    }
    if (status == 0)
        status = is_mnist ? idx_parse(&bytes, path, dataset, error)
                          : cifar_parse(&bytes, path, dataset, error);
    free(bytes.data);
    return status;
}

/* Add the images of DIRECTORY/NAME or DIRECTORY/NAME.gz. Where neither is there, nothing is added. */
static int dataset_add(Dataset *dataset, const char *where, const char *name, int is_mnist, Error *error) {
    char path[PATH_MAX + 64];
    int status = 0, is_read = 0;
    for (int packed = 0; packed < 2 && status == 0; packed++) {
        snprintf(path, sizeof path, "%s/%s%s", where, name, packed ? ".gz" : "");
        if (access(path, F_OK) != 0 && errno == ENOENT)
            continue;
        if (is_read) {
            refuse(error, "%s: is not read, since %s is there too", path, name);
            fprintf(stderr, "diffenc: %s\n", error->text);
        } else
            status = dataset_read(dataset, path, is_mnist, error);
        is_read = 1;
    }
    return status;
}

int dataset_open(Dataset *dataset, const char *where, Split split, uint64_t seed, Error *error) {
    static const char *const names[2][7] = {   /* MNIST, then CIFAR-10 */
        {"train-images-idx3-ubyte", "data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin",
         "data_batch_4.bin", "data_batch_5.bin"}, {"t10k-images-idx3-ubyte", "test_batch.bin"},
    };
    const int is_test = split == SPLIT_TEST, is_digits = strcmp(where, "digits") == 0;
    *dataset = (Dataset){.split = split};
    if (is_digits)
        *dataset = (Dataset){is_test ? 10000 : 60000, DIGIT_SIZE, DIGIT_SIZE, 1, NULL, split, seed};
    int failed = !is_digits && access(where, F_OK) != 0 ? refuse(error, "%s: %s", where, strerror(errno)) : 0;
    for (int i = 0; names[is_test][i] && dataset->channels != 1 && !failed; i++)
        failed = dataset_add(dataset, where, names[is_test][i], i == 0, error);
    if (!dataset->count && !failed)
        failed = refuse(error, "%s: holds neither %s (MNIST) nor %s (CIFAR-10), plain or with .gz", where,
                        names[is_test][0], is_test ? "test_batch.bin" : "data_batch_1.bin to ..5.bin");
    if (failed)
        dataset_close(dataset);
    return failed;
}

void dataset_close(Dataset *dataset) {
    free(dataset->pixels);
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
        digit_draw(dataset->seed, dataset->split, index, out);
}

/* FNV-1a over little-endian words of 8 bytes. Without the shift, high bits would never reach low ones. */
uint64_t dataset_digest(const Dataset *d) {
    const uint64_t head[6] = {d->count, (uint64_t)d->height, (uint64_t)d->width, (uint64_t)d->channels,
                              d->pixels ? 0 : 1 + (uint64_t)d->split, d->pixels ? 0 : d->seed};
    const size_t size = d->pixels ? d->count * pixels_of(d) : 0, words = 6 + (size + 7) / 8;
    uint64_t digest = 0xcbf29ce484222325;
    for (size_t i = 0; i < words; i++) {
        uint64_t word = i < 6 ? head[i] : 0;
        for (size_t at = 8 * (i - 6), b = 0; i >= 6 && b < 8 && at + b < size; b++)
            word |= (uint64_t)d->pixels[at + b] << 8 * b;
        digest = (digest ^ word) * 0x100000001b3;
        digest ^= digest >> 32;
    }
    return digest;
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

/* JSON is UTF-8. Bytes of a path that are not are written as private characters, U+EF00 + byte. */
enum { RAW_BYTE = 0xef00 };

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
    const int is_byte = code < 0x80 || code >> 7 == (RAW_BYTE + 0x80) >> 7;
    if (!is_byte && code >= 0x800)
        *out++ = (char)(0xe0 | code >> 12);
    if (!is_byte)
        *out++ = (char)(code >= 0x800 ? 0x80 | (code >> 6 & 0x3f) : 0xc0 | code >> 6);
    *out++ = (char)(is_byte ? code : 0x80 | (code & 0x3f));
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
        for (; c->at < c->size && isdigit(c->data[c->at]); c->at++)
            if (require(c, value < INT64_MAX / 10, "the number is too large"))
                value = 10 * value + (c->data[c->at] - '0');
        require(c, c->at > start, "expected a whole number that is not negative");
        require(c, c->at <= start + 1 || c->data[start] != '0', "the number begins with 0");
        values[count++] = value;
    }
    return count;
}

static const char *const TYPE_NAMES[TYPE_OTHER] = {"U8", "F32", "F64"};
static const unsigned char TYPE_SIZES[TYPE_OTHER] = {1, 4, 8};

/* {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, whose data lie in data[size]. */
static TensorEntry take_tensor(Cursor *c, const char *name, const unsigned char *data, size_t size) {
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
    if (!require(c, *type && entry.rank >= 0 && offset_count == 2, "expected dtype, shape, two data_offsets"))
        return entry;
    while (entry.type < TYPE_OTHER && strcmp(type, TYPE_NAMES[entry.type]) != 0)
        entry.type++;
    const size_t each = entry.type < TYPE_OTHER ? TYPE_SIZES[entry.type] : 1;
    for (int i = 0; i < entry.rank; i++) {
        const size_t length = (size_t)entry.shape[i];
        require(c, !length || entry.count <= SIZE_MAX / each / length, "the shape is too large");
        entry.count *= length;
    }
    const uint64_t begin = (uint64_t)offsets[0], end = (uint64_t)offsets[1];
    if (require(c, begin <= end && end <= size, "data_offsets leave the file")) {
        entry.data = data + begin;
        entry.size = (size_t)(end - begin);
    }
    /* Of another type no more is known than that an element has at least one bit. */
    const int is_other = entry.type == TYPE_OTHER;
    require(c, is_other ? entry.count / 8 <= entry.size : entry.size == entry.count * each,
            "data_offsets do not fit the shape");
    return entry;
}

static int compare_places(const void *left, const void *right) {
    const TensorEntry *a = left, *b = right;
    const int place = (a->data > b->data) - (a->data < b->data);
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

static void take_header(Cursor *c, TensorFile *file, const unsigned char *data, size_t size) {
    const size_t pair = 2 * sizeof *file->metadata;
    int metadata_seen = 0;
    for (int i = 0; next_item(c, "{}", i); i++) {
        const char *name = take_key(c);
        const int is_metadata = strcmp(name, "__metadata__") == 0;
        require(c, !is_metadata || !metadata_seen++, "a second __metadata__");
        for (int k = 0; is_metadata && next_item(c, "{}", k); k++) {
            const char *key = take_key(c), *value = take_string(c);
            file->metadata = array_grow(c, file->metadata, (size_t)file->metadata_count, pair);
            if (c->failed)
                return;
            file->metadata[2 * file->metadata_count] = key;
            file->metadata[2 * file->metadata_count++ + 1] = value;
        }
        if (is_metadata)
            continue;
        const TensorEntry entry = take_tensor(c, name, data, size);
        file->tensors = array_grow(c, file->tensors, (size_t)file->tensor_count, sizeof entry);
        if (!c->failed)
            file->tensors[file->tensor_count++] = entry;
    }
    accept(c, ' ');
    if (!require(c, c->at == c->size, "expected only spaces after the header"))
        return;
    c->part = NULL;   /* from here on, messages tell of the whole */
    qsort(file->tensors, (size_t)file->tensor_count, sizeof *file->tensors, compare_places);
    const unsigned char *end = data;
    for (const TensorEntry *e = file->tensors; e < file->tensors + file->tensor_count; e++) {
        require(c, e->data == end, "tensor %s: its data %s", e->name,
                e->data < end ? "overlap those of another" : "leave a gap before them");
        end = e->data + e->size;
    }
    require(c, end == data + size, "%td bytes at its end belong to no tensor", data + size - end);
    sort_names(c, file->metadata, file->metadata_count, pair);
    sort_names(c, file->tensors, file->tensor_count, sizeof *file->tensors);
}

int tensors_parse(Bytes bytes, const char *name, TensorFile *file, Error *error) {
    enum { LONGEST = 100000000 };   /* the limit of the format's own implementation */
    Cursor c = {bytes.data, bytes.size, 0, name, NULL, error, 0};
    *file = (TensorFile){bytes, allocate(1, sizeof(TensorEntry)), 0, allocate(2, sizeof(char *)), 0};
    require(&c, bytes.size >= 8, "holds %d bytes, expected a safetensors file", (int)bytes.size);
    const uint64_t length = take_little_endian(&c, 8), rest = bytes.size - c.at;
    require(&c, length <= LONGEST, "a header of %" PRIu64 " bytes, expected at most %d (safetensors)", length,
            LONGEST);
    if (require(&c, length <= rest, "holds %" PRIu64 " of the %" PRIu64 " bytes of its header", rest,
                length)) {
        c = (Cursor){bytes.data + 8, (size_t)length, 0, name, "header", error, 0};
        take_header(&c, file, bytes.data + 8 + length, (size_t)(rest - length));
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

/* [28, 28, 1] for messages. Returns `text`. */
static const char *shape_text(int rank, const int64_t *shape, char text[192]) {
    char *at = text + sprintf(text, "[");
    for (int i = 0; i < rank; i++)
        at += sprintf(at, "%s%" PRId64, i > 0 ? ", " : "", shape[i]);
    strcpy(at, "]");
    return text;
}

int tensors_copy(const TensorEntry *entry, const char *path, int rank, const int64_t *shape, real *out,
                 Error *error) {
    Cursor c = {entry->data, entry->size, 0, path, NULL, error, 0};
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
        if (!isfinite(out[i]))
            require(&c, 0, "tensor %s: value %zu is not a finite number", entry->name, i);
    }
    return c.failed;
}

/* ---- safetensors: writing ---- */

static void put_string(FILE *stream, const char *text) {
    putc('"', stream);
    for (size_t length; *text; text += length ? length : 1) {
        const unsigned first = (unsigned char)*text;
        length = utf8_length(text);
        if (first < 0x20 || length == 0)
            fprintf(stream, "\\u%04x", length ? first : RAW_BYTE + first);
        else
            fprintf(stream, "%s%.*s", strchr("\"\\", *text) ? "\\" : "", (int)length, text);
    }
    putc('"', stream);
}

/* A number of 1, 4 or 8 bytes, which stand in this machine's order, in little-endian order. */
static void put_little_endian(FILE *stream, const unsigned char *number, size_t size) {
    const uint16_t one = 1;
    const size_t flip = *(const unsigned char *)&one ? 0 : size - 1;
    for (size_t b = 0; b < size; b++)
        putc_unlocked(number[b ^ flip], stream);
}

static size_t elements_of(const TensorOut *tensor) {
    size_t count = 1;
    for (int i = 0; i < tensor->rank; i++)
        count *= (size_t)tensor->shape[i];
    return count;
}

typedef struct {
    const TensorOut *tensors;
    int tensor_count, metadata_count;
    const char *const *metadata;
} TensorList;

/* The length of the header is written when it is known, which is after the header. Spaces behind it let the
 * data begin at a multiple of 8. */
static int write_tensors(void *file, const void *context) {
    const TensorList *list = context;
    FILE *stream = file;
    size_t offset = 0;
    fprintf(stream, "%8s{\"__metadata__\":{", "");
    for (int i = 0; i < 2 * list->metadata_count; i++) {
        fputs(i == 0 ? "" : i % 2 ? ":" : ",", stream);
        put_string(stream, list->metadata[i]);
    }
    putc('}', stream);
    for (int i = 0; i < list->tensor_count; i++) {
        const TensorOut *t = &list->tensors[i];
        assert(t->type != TYPE_OTHER && t->rank >= 0 && t->rank <= 8);
        putc(',', stream);
        put_string(stream, t->name);
        fprintf(stream, ":{\"dtype\":\"%s\",\"shape\":[", TYPE_NAMES[t->type]);
        for (int d = 0; d < t->rank; d++)
            fprintf(stream, "%s%" PRId64, d ? "," : "", t->shape[d]);
        fprintf(stream, "],\"data_offsets\":[%zu,", offset);
        fprintf(stream, "%zu]}", offset += elements_of(t) * TYPE_SIZES[t->type]);
    }
    fprintf(stream, "}%*s", (int)(-(ftell(stream) + 1) & 7), "");
    const uint64_t length = (uint64_t)ftell(stream) - 8;
    if (fseek(stream, 0, SEEK_SET) != 0)
        return -1;
    put_little_endian(stream, (const unsigned char *)&length, 8);
    if (fseek(stream, 0, SEEK_END) != 0)
        return -1;
    for (int i = 0; i < list->tensor_count; i++) {
        const TensorOut *t = &list->tensors[i];
        for (size_t k = 0, size = TYPE_SIZES[t->type], count = elements_of(t); k < count; k++)
            put_little_endian(stream, (const unsigned char *)t->data + k * size, size);
    }
    return ferror(stream);
}

int tensors_write(const char *path, const TensorOut *tensors, int tensor_total, const char *const *metadata,
                  int metadata_count, Error *error) {
    const TensorList list = {tensors, tensor_total, metadata_count, metadata};
    return file_replace(path, write_tensors, &list, error);
}
