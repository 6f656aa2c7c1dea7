/* data.c - files in and out: gzip, PNG, PGM, PPM, charts, MNIST, CIFAR-10, built-in digits, safetensors.
 *
 * The parsers face files from strangers. Three rules make it easy to see that they are safe: memory is asked
 * for only after the file was seen to hold what it promises; every read goes through one bounded cursor; and
 * a file that is not exactly right is refused with one line: what was found and what was expected. */

#define _POSIX_C_SOURCE 200809L

#include "diffenc.h"

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- bytes and numbers ---- */

/* 47040000 as "47,040,000", for messages. Returns `text`. */
static const char *grouped(uint64_t value, char text[32]) {
    for (int at = snprintf(text, 32, "%" PRIu64, value) - 3; at > 0; at -= 3) {
        memmove(text + at + 1, text + at, strlen(text + at) + 1);
        text[at] = ',';
    }
    return text;
}

static unsigned char *put_big_endian(unsigned char *at, uint32_t value) {
    for (int shift = 24; shift >= 0; shift -= 8)
        *at++ = (unsigned char)(value >> shift);
    return at;
}

/* The CRC-32 of gzip and PNG, of data behind those that gave `crc` (0 at the start). */
static uint32_t crc_32(uint32_t crc, const unsigned char *data, size_t size) {
    uint32_t table[256];
    for (uint32_t i = 0; i < 256; i++) {
        table[i] = i;
        for (int bit = 0; bit < 8; bit++)
            table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xedb88320 : 0);
    }
    crc = ~crc;
    for (size_t i = 0; i < size; i++)
        crc = table[(crc ^ data[i]) & 255] ^ crc >> 8;
    return ~crc;
}

/* What is being read and how far. The first failure is kept in `error`; after it bytes are zeros and lists
 * are at their end, so that a parser asks for `failed` only where it would loop or write. */
typedef struct {
    const unsigned char *data;
    size_t size, at;
    const char *name, *part;   /* of the file; of what in it, where messages shall tell the byte, or NULL */
    Error *error;
    int failed;
} Cursor;

/* What must hold, or else the reading fails with this message. Returns whether all is well. */
static int require(Cursor *c, int condition, const char *format, ...) {
    if (c->failed || condition)
        return !c->failed;
    char what[400], place[80] = "", number[32];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(what, sizeof what, format, arguments);
    va_end(arguments);
    if (c->part)
        snprintf(place, sizeof place, " (%s byte %s)", c->part, grouped(c->at, number));
    fail(c->error, "%s: %s%s", c->name, what, place);
    c->failed = -1;
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

/* `memory` with room for `size` bytes of what a file holds. Where there is not so much, the reading of that
 * file has failed, the result is NULL, and `memory` stays as it was. */
static void *resize(Cursor *c, void *memory, size_t size) {
    char text[32];
    void *resized = c->failed ? NULL : realloc(memory, size ? size : 1);
    require(c, resized != NULL, "out of memory, needs %s bytes", grouped(size, text));
    return resized;
}

/* Room for one more item in an array of `count` items, which has room for the next power of two: memory stays
 * in proportion to what was really read. */
static void *array_grow(Cursor *c, void *array, size_t count, size_t size) {
    void *grown = count & (count - 1) ? NULL : resize(c, array, (count ? 2 * count : 1) * size);
    return grown ? grown : array;
}

/* ---- gzip ---- */

/* A prefix code (RFC 1951, 3.2.2): how many symbols there are by length of code, and all in order of code. */
typedef struct {
    int count[16], symbol[288];
} PrefixCode;

typedef struct {
    Cursor in;
    uint32_t bits;             /* taken from `in` and not used yet, the next one lowest */
    int bit_count;
    Bytes out;
    size_t member;             /* where in `out` this member begins: no distance reaches before it */
} Inflater;

static unsigned peek_bits(Inflater *s, int count) {
    for (; s->bit_count < count; s->bit_count += 8)
        s->bits |= (uint32_t)take_byte(&s->in) << s->bit_count;
    return s->bits & ((1u << count) - 1);
}

static unsigned take_bits(Inflater *s, int count) {
    const unsigned value = peek_bits(s, count);
    s->bits >>= count;
    s->bit_count -= count;
    return value;
}

/* Go on with whole bytes: what is left of the last one is padding, those not touched go back. */
static void align_to_byte(Inflater *s) {
    s->in.at -= (size_t)(s->bit_count / 8);
    s->bits = 0;
    s->bit_count = 0;
}

static void put_byte(Inflater *s, unsigned byte) {
    s->out.data = array_grow(&s->in, s->out.data, s->out.size, 1);
    if (!s->in.failed)
        s->out.data[s->out.size++] = (unsigned char)byte;
}

/* Make a code from lengths[count] in 0..15. One that leaves bit patterns unused is refused, but for what the
 * RFC allows of some: a single code of one bit, or none at all. */
static void make_code(Inflater *s, PrefixCode *code, const unsigned char *lengths, int count, int may_be_1) {
    int unused = 1, place[17] = {0};   /* where the symbols of each length begin */
    memset(code->count, 0, sizeof code->count);
    for (int i = 0; i < count; i++)
        code->count[lengths[i]]++;
    for (int length = 1; length <= 15; length++) {
        place[length + 1] = place[length] + code->count[length];
        unused = 2 * unused - code->count[length];
        require(&s->in, unused >= 0, "has an over-subscribed code");
    }
    const int used = place[16], is_1 = used <= 1 && used == code->count[1];
    require(&s->in, unused == 0 || (may_be_1 && is_1), "has an incomplete code");
    for (int i = 0; i < count; i++)
        if (lengths[i])
            code->symbol[place[lengths[i]]++] = i;
}

/* Looking 15 bits ahead never runs out of a whole stream: 8 bytes of CRC and length follow the last code. */
static unsigned take_symbol(Inflater *s, const PrefixCode *code) {
    const unsigned ahead = peek_bits(s, 15);
    int beyond = 0, shorter = 0;   /* the first code of this length, by so much; number of shorter codes */
    for (int length = 1; length <= 15; length++) {
        beyond = 2 * beyond + (int)(ahead >> (length - 1) & 1);
        if (beyond < code->count[length]) {
            take_bits(s, length);
            return (unsigned)code->symbol[shorter + beyond];
        }
        beyond -= code->count[length];
        shorter += code->count[length];
    }
    return (unsigned)require(&s->in, 0, "has an invalid code");
}

static void fixed_codes(Inflater *s, PrefixCode *literal, PrefixCode *distance) {
    unsigned char lengths[288];
    for (int i = 0; i < 288; i++)
        lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
    make_code(s, literal, lengths, 288, 0);
    memset(lengths, 5, 32);
    make_code(s, distance, lengths, 32, 0);
}

static void dynamic_codes(Inflater *s, PrefixCode *literal, PrefixCode *distance) {
    static const unsigned char order[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    unsigned char lengths[286 + 30 + 138] = {0};   /* a run may begin at the last of them */
    const int literals = 257 + (int)take_bits(s, 5), all = literals + 1 + (int)take_bits(s, 5);
    const int count = 4 + (int)take_bits(s, 4);
    require(&s->in, literals <= 286 && all - literals <= 30, "has more codes than there are symbols");
    for (int i = 0; i < count; i++)
        lengths[order[i]] = (unsigned char)take_bits(s, 3);
    make_code(s, literal, lengths, 19, 0);
    for (int i = 0, run = 1; i < all && !s->in.failed; i += run) {
        const int symbol = (int)take_symbol(s, literal);
        require(&s->in, symbol != 16 || i > 0, "repeats a code length before the first");
        run = symbol < 16 ? 1 : symbol < 18 ? 3 + (int)take_bits(s, symbol - 14) : 11 + (int)take_bits(s, 7);
        memset(lengths + i, symbol < 16 ? symbol : symbol == 16 && i > 0 ? lengths[i - 1] : 0, (size_t)run);
        require(&s->in, i + run <= all, "has more code lengths than codes");
    }
    require(&s->in, lengths[256], "has no code for the end of a block");
    make_code(s, literal, lengths, literals, 1);
    make_code(s, distance, lengths + literals, all - literals, 1);
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
    require(in, type < 3, "has a block of unknown type");
    if (type == 0) {
        align_to_byte(s);
        const uint64_t length = take_little_endian(in, 2);
        require(in, take_little_endian(in, 2) == (length ^ 0xffff), "has a stored block of two lengths");
        for (uint64_t i = 0; i < length && !in->failed; i++)
            put_byte(s, take_byte(in));
    } else {
        (type == 1 ? fixed_codes : dynamic_codes)(s, &literal, &distance);
        inflate_compressed(s, &literal, &distance);
    }
}

/* One member (RFC 1952, 2.3): header, deflate blocks, CRC-32 and length of what came out. */
static void inflate_member(Inflater *s) {
    enum { HEADER_CRC = 2, EXTRA = 4, NAME = 8, COMMENT = 16 };
    Cursor *in = &s->in;
    const size_t start = in->at;
    const char *other = start > 0 ? "has trailing garbage" : "is not gzip";
    require(in, take_byte(in) == 0x1f && take_byte(in) == 0x8b, other);
    require(in, take_byte(in) == 8, "has an unknown compression method");
    const unsigned flags = take_byte(in);
    require(in, flags < 32, "has unknown flags");
    take_little_endian(in, 6);   /* time, hints, system */
    for (uint64_t extra = flags & EXTRA ? take_little_endian(in, 2) : 0; extra > 0; extra--)
        take_byte(in);
    for (unsigned text = NAME; text <= COMMENT; text *= 2)
        while ((flags & text) && take_byte(in)) { }
    const uint32_t crc = crc_32(0, in->data + start, in->at - start) & 0xffff;
    require(in, !(flags & HEADER_CRC) || take_little_endian(in, 2) == crc, "has a wrong header CRC");
    s->member = s->out.size;
    for (unsigned last = 0; !last && !in->failed;) {
        last = take_bits(s, 1);
        inflate_block(s, take_bits(s, 2));
    }
    align_to_byte(s);
    const unsigned char *made = s->out.data + s->member;
    const size_t size = s->out.size - s->member;
    require(in, take_little_endian(in, 4) == crc_32(0, made, size), "has a wrong CRC");
    require(in, take_little_endian(in, 4) == (size & 0xffffffff), "has a wrong length");
}

int gzip_inflate(const unsigned char *data, size_t size, const char *name, Bytes *out, Error *error) {
    Inflater s = {.in = {data, size, 0, name, "gzip", error, 0}, .out = {allocate(1, 1), 0}};
    require(&s.in, size > 0, "is empty, expected a gzip stream");
    while (!s.in.failed && s.in.at < size)
        inflate_member(&s);
    if (s.in.failed)
        free(s.out.data);
    *out = s.in.failed ? (Bytes){NULL, 0} : s.out;
    return s.in.failed;
}

/* ---- files ---- */

/* The bytes of a file as they are. */
static int file_bytes(const char *path, Bytes *bytes, Error *error) {
    Cursor c = {.name = path, .error = error};
    *bytes = (Bytes){NULL, 0};
    FILE *stream = fopen(path, "rb");
    if (!stream)
        return fail(error, "%s: %s", path, strerror(errno));
    for (size_t wanted = 1, got = 1; got == wanted; bytes->size += got) {   /* twice as much each time */
        wanted = bytes->size ? bytes->size : 1;
        bytes->data = array_grow(&c, bytes->data, bytes->size, 1);
        got = c.failed ? 0 : fread(bytes->data + bytes->size, 1, wanted, stream);
    }
    require(&c, !ferror(stream), "%s", strerror(errno));
    fclose(stream);
    if (c.failed) {
        free(bytes->data);
        *bytes = (Bytes){NULL, 0};
    }
    return c.failed;
}

static int has_extension(const char *path, const char *extension) {
    const size_t length = strlen(path), end = strlen(extension);
    return length > end && strcasecmp(path + length - end, extension) == 0;
}

int file_read(const char *path, Bytes *bytes, Error *error) {
    if (file_bytes(path, bytes, error))
        return -1;
    unsigned char *packed = bytes->data;
    if (!has_extension(path, ".gz") && (bytes->size < 3 || memcmp(packed, "\x1f\x8b\x08", 3) != 0))
        return 0;
    const int status = gzip_inflate(packed, bytes->size, path, bytes, error);
    free(packed);
    return status;
}

/* The new name of a file is on the disk when its directory is. A directory that can be written but not read,
 * or a file system that cannot do it (EINVAL), is no failure. `path` is spoilt. */
static int directory_sync(char *path) {
    char *slash = strrchr(path, '/');
    strcpy(slash ? slash + 1 : path, ".");
    const int descriptor = open(path, O_RDONLY);
    const int reason = descriptor >= 0 && fsync(descriptor) != 0 && errno != EINVAL ? errno : 0;
    if (descriptor >= 0)
        close(descriptor);
    return reason;
}

int file_replace(const char *path, FileWriter write, const void *context, Error *error) {
    char temporary[4096];
    struct stat status;
    /* A rename would turn /dev/null into a plain file. */
    if (stat(path, &status) == 0 && !S_ISREG(status.st_mode))
        return fail(error, "%s: is not a regular file", path);
    if ((size_t)snprintf(temporary, sizeof temporary, "%s.tmp.%ld", path, (long)getpid()) >= sizeof temporary)
        return fail(error, "%s: %s", path, strerror(ENAMETOOLONG));
    unlink(temporary);   /* whatever has this name was left by a process that is no more */
    const int descriptor = open(temporary, O_WRONLY | O_CREAT | O_EXCL, 0666);
    FILE *stream = descriptor < 0 ? NULL : fdopen(descriptor, "wb");
    if (!stream)
        return fail(error, "%s: %s", path, strerror(errno));
    errno = 0;
    int reason = 0;
    if (write(stream, context) != 0 || fflush(stream) != 0 || fsync(descriptor) != 0)
        reason = errno ? errno : EIO;
    if ((fclose(stream) != 0 || (!reason && rename(temporary, path) != 0)) && !reason)
        reason = errno;
    if (reason)
        unlink(temporary);
    else
        reason = directory_sync(temporary);
    return reason ? fail(error, "%s: %s", path, strerror(reason)) : 0;
}

/* ---- images ---- */

typedef struct {
    const unsigned char *pixels;
    int height, width, channels, is_ppm;
} Image;

static void put_chunk(FILE *stream, const char *type, const unsigned char *data, size_t size) {
    unsigned char length[4], crc[4];
    put_big_endian(length, (uint32_t)size);
    put_big_endian(crc, crc_32(crc_32(0, (const unsigned char *)type, 4), data, size));
    fwrite(length, 1, 4, stream);
    fwrite(type, 1, 4, stream);
    fwrite(data, 1, size, stream);
    fwrite(crc, 1, 4, stream);
}

/* A PNG whose pixels are not compressed (deflate blocks of type "stored"): they are few. */
static int write_png(void *stream, const void *context) {
    const Image *image = context;
    const size_t row = (size_t)image->width * (size_t)image->channels + 1, size = row * (size_t)image->height;
    unsigned char header[13] = {[8] = 8, [9] = image->channels == 3 ? 2 : 0};   /* 8 bits, RGB or grey */
    put_big_endian(put_big_endian(header, (uint32_t)image->width), (uint32_t)image->height);
    unsigned char *data = allocate(2 + size + 5 * (size / 65535 + 1) + 4, 1), *at = data;
    const unsigned char *pixels = image->pixels;
    uint32_t low = 1, high = 0;   /* Adler-32 (RFC 1950) */
    *at++ = 0x78;
    *at++ = 0x01;
    for (size_t i = 0; i < size; i++) {
        if (i % 65535 == 0) {
            const unsigned left = size - i <= 65535 ? (unsigned)(size - i) : 65535, inverse = ~left;
            const unsigned block[5] = {size - i <= 65535, left, left >> 8, inverse, inverse >> 8};
            for (int b = 0; b < 5; b++)
                *at++ = (unsigned char)block[b];
        }
        *at = i % row == 0 ? 0 : *pixels++;   /* 0: this row has no filter */
        low = (low + *at++) % 65521;
        high = (high + low) % 65521;
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
    if (has_extension(path, ".pgm") && channels != 1)
        return fail(error, "%s: a .pgm holds grey images only, expected .png or .ppm for colour", path);
    if (has_extension(path, ".png") || has_extension(path, ".ppm") || has_extension(path, ".pgm"))
        return 0;
    return fail(error, "%s: unknown kind of image, expected a name that ends in .png, .pgm or .ppm", path);
}

int image_write(const char *path, const unsigned char *pixels, int height, int width, int channels,
                Error *error) {
    const Image image = {pixels, height, width, channels, has_extension(path, ".ppm")};
    assert(height > 0 && width > 0 && (channels == 1 || channels == 3));
    if ((double)height * (width * 3.0 + 2) > 2e9)
        return fail(error, "%s: an image of %d x %d pixels is too large", path, width, height);
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

/* ---- drawing: for charts and for the built-in digits ---- */

/* An image [height, width, channels] on white (255) or black (0), and the part of it that may be drawn to:
 * left <= x < right, top <= y < bottom. Pixel (x, y) is the square around the point (x, y). */
typedef struct {
    unsigned char *pixels;
    int width, channels, background, left, top, right, bottom;
} Canvas;

static const unsigned char WHITE[3] = {255, 255, 255}, GRID[3] = {228, 228, 228}, INK[3] = {60, 60, 60};

static int clamp(double value, int low, int high) {
    return value < low ? low : value > high ? high : (int)value;
}

/* A line with round ends and soft edges. The values of a pixel go from the background towards the colour by
 * how much of it is covered, and never back, so that the joints of a long curve do not show. */
static void draw_line(const Canvas *canvas, double x0, double y0, double x1, double y1, double radius,
                      const unsigned char *colour) {
    const double along_x = x1 - x0, along_y = y1 - y0, square = along_x * along_x + along_y * along_y;
    const int left = clamp(fmin(x0, x1) - radius, canvas->left, canvas->right);
    const int right = clamp(fmax(x0, x1) + radius + 2, canvas->left, canvas->right);
    const int bottom = clamp(fmax(y0, y1) + radius + 2, canvas->top, canvas->bottom);
    for (int y = clamp(fmin(y0, y1) - radius, canvas->top, canvas->bottom); y < bottom; y++)
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

/* On a canvas of three channels. */
static void draw_rectangle(const Canvas *canvas, int left, int top, int width, int height,
                           const unsigned char *colour) {
    for (int y = clamp(top, canvas->top, canvas->bottom); y < top + height && y < canvas->bottom; y++)
        for (int x = clamp(left, canvas->left, canvas->right); x < left + width && x < canvas->right; x++)
            memcpy(canvas->pixels + (y * (ptrdiff_t)canvas->width + x) * 3, colour, 3);
}

/* Letters of 5 x 8 dots, 6 from one to the next: 40 bits, row by row, the upper left dot highest. */
static const char font_letters[] = "0123456789.-+/abcdefghijklmnopqrstuvwxyz";
static const uint64_t font[] = {
    0x74675cc5c0, 0x23084211c0, 0x74426443e0, 0x744260c5c0, 0x11952f8840, 0xfc3c10c5c0, 0x3221e8c5c0,
    0xf844221080, 0x7462e8c5c0, 0x7462f08980, 0x0000003180, 0x0001f00000, 0x0109f21000, 0x0844444200,
    0x001c17c5e0, 0x843d18c7c0, 0x001f0841e0, 0x085f18c5e0, 0x001d1fc1e0, 0x3251e42100, 0x001f18bc2e,
    0x843d18c620, 0x20184211c0, 0x100c210a4c, 0x84254c5240, 0x61084211c0, 0x00355ad6a0, 0x003d18c620,
    0x001d18c5c0, 0x003d18fa10, 0x001f18bc21, 0x002d984200, 0x001f0707c0, 0x423c8424c0, 0x002318c5e0,
    0x0023152880, 0x002b5ad540, 0x0022a22a20, 0x002318bc2e, 0x003e2223e0,
};

/* Text from its upper left corner (left, top), each dot a square of `dot` pixels. Capitals are drawn small,
 * what the font does not have is drawn as a space. */
static void draw_text(const Canvas *canvas, int left, int top, int dot, const char *text) {
    for (; *text; text++, left += 6 * dot) {
        const char *found = strchr(font_letters, tolower((unsigned char)*text));
        for (int i = 0; found && i < 40; i++)
            if (font[found - font_letters] >> (39 - i) & 1)
                draw_rectangle(canvas, left + i % 5 * dot, top + i / 5 * dot, dot, dot, INK);
    }
}

/* ---- charts ---- */

typedef struct {
    double low, high, step, scale;   /* of the values shown; from one tick to the next; pixels for 1 */
} Axis;

static int compare_doubles(const void *left, const void *right) {
    const double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

/* Whether point k can be drawn: it is finite, and small enough to compute with. */
static int curve_has(const Curve *curve, int k) {
    return fabs(curve->x[k]) < 1e30 && fabs(curve->y[k]) < 1e30;
}

/* The axis for all x, or all y, of all curves, on `extent` pixels with at most `ticks` steps of 1, 2 or 5
 * times a power of ten. The uppermost 2% of y (of a few numbers: one) are left out if they would more than
 * double the range: the first losses of a training must not flatten the rest of it. */
static Axis axis_of(const Curve *curves, int curve_count, int is_y, int extent, double ticks) {
    size_t total = 1, count = 0;
    for (int i = 0; i < curve_count; i++)
        total += (size_t)curves[i].count;
    double *values = allocate_zeroed(total, sizeof *values);
    for (int i = 0; i < curve_count; i++)
        for (int k = 0; k < curves[i].count; k++)
            if (curve_has(&curves[i], k))
                values[count++] = is_y ? curves[i].y[k] : curves[i].x[k];
    qsort(values, count, sizeof *values, compare_doubles);
    const size_t last = count ? count - 1 : 0, rare = is_y && last ? (last + 43) / 50 : 0;
    const double most = values[last - rare];
    double low = values[0], high = values[last] - most > most - low ? most : values[last];
    free(values);
    /* A constant needs some height too, and a range that is all rounding noise is a constant. */
    const int constant = high - low <= fmax(1e-9 * fmax(fabs(low), fabs(high)), 1e-300);
    const double size = fabs(low) > 1e-300 ? fabs(low) : 10, part = is_y ? 0.04 : 0;
    const double margin = constant ? 0.1 * size : part * (high - low);
    low -= margin;
    high += margin;
    const double power = pow(10, floor(log10((high - low) / ticks))), steps = (high - low) / power;
    const double step = power * (steps <= ticks ? 1 : steps <= 2 * ticks ? 2 : steps <= 5 * ticks ? 5 : 10);
    return (Axis){low, high, step, (extent - 1) / (high - low)};
}

/* Grid lines across the plot and the numbers beside or below it. */
static void draw_ticks(const Canvas *canvas, const Canvas *plot, Axis axis, int is_y, int dot) {
    const int decimals = axis.step < 1 ? (int)ceil(-log10(axis.step) - 1e-9) : 0, beyond = 3 * dot;
    const double first = ceil(axis.low / axis.step);
    for (int k = 0; (first + k) * axis.step <= axis.high; k++) {
        char text[32];
        const double value = (first + k) * axis.step;
        const int plain = fabs(value) < 1e6 && axis.step >= 1e-4, at = (int)((value - axis.low) * axis.scale);
        const int length = 6 * dot * (plain ? snprintf(text, sizeof text, "%.*f", decimals, value)
                                            : snprintf(text, sizeof text, "%.3g", value));
        const int x = plot->left + (is_y ? -beyond : at), y = is_y ? plot->bottom - 1 - at : plot->top;
        draw_rectangle(canvas, x, y, is_y ? plot->right - x : 1, is_y ? 1 : plot->bottom + beyond - y, GRID);
        draw_text(canvas, x - (is_y ? dot + length : length / 2), is_y ? y - beyond : plot->bottom + 5 * dot,
                  dot, text);
    }
}

static void draw_curve(const Canvas *plot, const Curve *curve, Axis x_axis, Axis y_axis, int dot) {
    double last_x = -1, last_y = 0;
    for (int k = 0; k < curve->count; k++) {
        if (!curve_has(curve, k))
            continue;
        const double x = plot->left + (curve->x[k] - x_axis.low) * x_axis.scale;
        const double y = fmax(plot->bottom - 1 - (curve->y[k] - y_axis.low) * y_axis.scale, -1e5);
        const int first = last_x < 0;   /* it is drawn thicker, since there may be no other */
        const double radius = (first ? 1.5 : 0.5) * dot;
        draw_line(plot, first ? x : last_x, first ? y : last_y, x, y, radius, curve->colour);
        last_x = x;
        last_y = y;
    }
}

void chart_draw(const Curve *curves, int curve_count, const char *x_label, const char *y_label,
                unsigned char *pixels, int height, int width) {
    const int dot = clamp(fmin(height / 300.0, width / 400.0), 1, 8), line = 12 * dot, letter = 6 * dot;
    const int left = clamp(8 * letter + 3 * dot, 0, width), right = clamp(width - 2 * letter, left, width);
    const int top = clamp(18 * dot, 0, height), bottom = clamp(height - 2 * line - 5 * dot, top, height);
    const int across = right - left, down = bottom - top;
    const Canvas canvas = {pixels, width, 3, 255, 0, 0, width, height};
    const Canvas plot = {pixels, width, 3, 255, left, top, right, bottom};
    const Axis x_axis = axis_of(curves, curve_count, 0, across, fmax(across / (9.0 * letter), 1));
    const Axis y_axis = axis_of(curves, curve_count, 1, down, fmax(down / (3.0 * line), 1));
    memset(pixels, 255, (size_t)height * (size_t)width * 3);
    draw_ticks(&canvas, &plot, x_axis, 0, dot);
    draw_ticks(&canvas, &plot, y_axis, 1, dot);
    draw_rectangle(&canvas, left, top, dot, down, INK);
    draw_rectangle(&canvas, left, bottom, across, dot, INK);
    draw_text(&canvas, left - 4 * letter, 4 * dot, dot, y_label);
    draw_text(&canvas, right - (int)strlen(x_label) * letter, bottom + 5 * dot + line, dot, x_label);

    /* The legend stands in the upper right corner, where a falling curve leaves room. */
    int longest = 0;
    for (int i = 0; i < curve_count; i++) {
        longest = clamp((double)strlen(curves[i].name), longest, 1000);
        draw_curve(&plot, &curves[i], x_axis, y_axis, dot);
    }
    const int corner = right - (longest + 6) * letter;
    draw_rectangle(&canvas, corner, top + 3 * dot, right - letter - corner,
                   curve_count ? curve_count * line + 4 * dot : 0, WHITE);
    for (int i = 0, y = top + 6 * dot; i < curve_count; i++, y += line) {
        draw_rectangle(&canvas, corner + letter, y + 2 * dot, 2 * letter, 3 * dot, curves[i].colour);
        draw_text(&canvas, corner + 4 * letter, y, dot, curves[i].name);
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
    const Canvas canvas = {out, DIGIT_SIZE, 1, 0, 0, 0, DIGIT_SIZE, DIGIT_SIZE};
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
            draw_line(&canvas, from[0], from[1], to[0], to[1], g.radius, WHITE);
            memcpy(from, to, sizeof from);
        }
    }
}

/* ---- data sets ---- */

int idx_parse(const Bytes *bytes, const char *name, Dataset *dataset, Error *error) {
    char text[2][32];
    uint32_t header[4] = {0};   /* big-endian: magic number, count, height, width */
    Cursor c = {bytes->data, bytes->size, 0, name, NULL, error, 0};
    for (size_t i = 0; i < 16 && i < bytes->size; i++)
        header[i / 4] = header[i / 4] << 8 | take_byte(&c);
    const unsigned magic = header[0], height = header[2], width = header[3];
    const char *plural = magic == 0x801 ? "" : "s";
    require(&c, magic == 0x803 || magic >> 8 != 8, "magic number 0x%08x is that of IDX with %u dimension%s, "
            "expected 0x00000803 (images)", magic, magic & 255, plural);
    require(&c, magic == 0x803 || bytes->size < 4,
            "magic number 0x%08x is not that of IDX, expected 0x00000803 (images)", magic);
    require(&c, bytes->size >= 16, "holds %d bytes, expected an IDX header of 16", (int)bytes->size);
    require(&c, header[1] > 0, "holds no images");
    require(&c, height - 1 < 32768 && width - 1 < 32768, "images of %s x %s pixels, expected 1 to 32,768 "
            "each way", grouped(height, text[0]), grouped(width, text[1]));
    const uint64_t expected = (uint64_t)header[1] * height * width, held = bytes->size - c.at;
    require(&c, held >= expected, "holds %s of the %s bytes its header promises", grouped(held, text[0]),
            grouped(expected, text[1]));
    require(&c, held == expected, "holds %s bytes, more than the %s its header promises",
            grouped(held, text[0]), grouped(expected, text[1]));
    unsigned char *pixels = resize(&c, NULL, (size_t)expected);
    if (!pixels)
        return -1;
    memcpy(pixels, bytes->data + c.at, (size_t)expected);
    *dataset = (Dataset){header[1], (int)height, (int)width, 1, pixels, dataset->split, dataset->seed};
    return 0;
}

int cifar_parse(const Bytes *bytes, const char *name, Dataset *dataset, Error *error) {
    enum { SIDE = 32, PLANE = SIDE * SIDE, RECORD = 1 + 3 * PLANE };
    char text[32];
    Cursor c = {.name = name, .error = error};
    const size_t count = bytes->size / RECORD, had = dataset->count;
    if (count == 0 || bytes->size % RECORD != 0 || count > UINT32_MAX - had)
        return fail(error, "%s: holds %s bytes, expected a multiple of 3,073 (a label, 32 x 32 x 3 pixels)",
                    name, grouped(bytes->size, text));
    for (const unsigned char *label = bytes->data; label < bytes->data + bytes->size; label += RECORD)
        if (*label > 9)
            return fail(error, "%s: image %s has label %d, expected 0 to 9", name,
                        grouped((uint64_t)(label - bytes->data) / RECORD, text), *label);
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

/* Add the images of DIRECTORY/NAME or DIRECTORY/NAME.gz. Where neither is there, nothing is added. */
static int dataset_add(Dataset *dataset, const char *where, const char *name, int is_mnist, Error *error) {
    char path[4096];
    Bytes bytes;
    if ((size_t)snprintf(path, sizeof path, "%s/%s.gz", where, name) >= sizeof path)
        return fail(error, "%s: %s", where, strerror(ENAMETOOLONG));
    const size_t plain = strlen(path) - 3;
    path[plain] = '\0';
    if (access(path, F_OK) != 0 && errno == ENOENT)
        path[plain] = '.';
    if (access(path, F_OK) != 0 && errno == ENOENT)
        return 0;
    if (file_read(path, &bytes, error))
        return -1;
    const int status = (is_mnist ? idx_parse : cifar_parse)(&bytes, path, dataset, error);
    free(bytes.data);
    return status;
}

int dataset_open(Dataset *dataset, const char *where, Split split, uint64_t seed, Error *error) {
    static const char *const names[2][7] = {   /* MNIST, then CIFAR-10 */
        {"train-images-idx3-ubyte", "data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin",
         "data_batch_4.bin", "data_batch_5.bin"}, {"t10k-images-idx3-ubyte", "test_batch.bin"},
    };
    const int is_test = split == SPLIT_TEST, is_digits = strcmp(where, "digits") == 0;
    *dataset = (Dataset){.split = split, .seed = seed};
    if (is_digits)
        *dataset = (Dataset){is_test ? 10000 : 60000, DIGIT_SIZE, DIGIT_SIZE, 1, NULL, split, seed};
    int failed = !is_digits && access(where, F_OK) != 0 ? fail(error, "%s: %s", where, strerror(errno)) : 0;
    for (int i = 0; names[is_test][i] && dataset->channels != 1 && !failed; i++)
        failed = dataset_add(dataset, where, names[is_test][i], i == 0, error);
    if (!dataset->count && !failed)
        failed = fail(error, "%s: holds neither %s (MNIST) nor %s (CIFAR-10), plain or with .gz", where,
                      names[is_test][0], is_test ? "test_batch.bin" : "data_batch_1.bin to data_batch_5.bin");
    if (failed)
        dataset_close(dataset);
    return failed;
}

void dataset_close(Dataset *dataset) {
    free(dataset->pixels);
    *dataset = (Dataset){0};
}

void dataset_image(const Dataset *dataset, uint32_t index, unsigned char *out) {
    const size_t image = (size_t)dataset->height * (size_t)dataset->width * (size_t)dataset->channels;
    assert(index < dataset->count);
    if (dataset->pixels)
        memcpy(out, dataset->pixels + index * image, image);
    else
        digit_draw(dataset->seed, dataset->split, index, out);
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

static void skip_space(Cursor *c) {
    while (c->at < c->size && memchr(" \t\n\r", c->data[c->at], 4))
        c->at++;
}

/* Take the character if it comes next. */
static int accept(Cursor *c, char character) {
    skip_space(c);
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

/* The four digits of \uXXXX. */
static unsigned take_hexadecimal(Cursor *c) {
    char digits[5] = "";
    for (int i = 0; i < 4; i++)
        digits[i] = (char)take_byte(c);
    require(c, strspn(digits, "0123456789abcdefABCDEF") == 4, "invalid \\u escape");
    return (unsigned)strtoul(digits, NULL, 16);
}

/* What stands behind a backslash, as UTF-8 at `out`; returns its end. Two \u may be one letter (UTF-16). */
static char *take_escape(Cursor *c, char *out) {
    static const char escapes[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    static const unsigned char first[4] = {0x00, 0xc0, 0xe0, 0xf0};
    const unsigned letter = take_byte(c);
    const char *known = memchr(escapes, (int)letter, 8);
    unsigned code = known ? (unsigned char)meanings[known - escapes] : 0;
    if (!known && require(c, letter == 'u', "unknown escape")) {
        code = take_hexadecimal(c);
        if (code >> 10 == 0x36 && take_byte(c) == '\\' && take_byte(c) == 'u') {
            const unsigned low = take_hexadecimal(c) ^ 0xdc00;
            code = low < 0x400 ? 0x10000 + ((code & 0x3ff) << 10 | low) : 0;
        }
        require(c, code != 0 && code >> 11 != 0x1b, "invalid \\u escape");
    }
    int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;   /* bytes to follow */
    *out++ = (char)(first[more] | code >> 6 * more);
    while (more-- > 0)
        *out++ = (char)(0x80 | (code >> 6 * more & 0x3f));
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

/* A key and its colon. Names are printed in messages: they must not be able to command the terminal. */
static const char *take_name(Cursor *c) {
    const char *name = take_string(c);
    for (const char *letter = name; *letter; letter++)
        require(c, !iscntrl((unsigned char)*letter), "control character in a name");
    expect(c, ':');
    return name;
}

static int64_t take_integer(Cursor *c) {
    int64_t value = 0;
    skip_space(c);
    const size_t start = c->at;
    for (; c->at < c->size && isdigit(c->data[c->at]); c->at++)
        if (require(c, value < INT64_MAX / 10, "the number is too large"))
            value = 10 * value + (c->data[c->at] - '0');
    require(c, c->at > start, "expected a whole number that is not negative");
    require(c, c->at <= start + 1 || c->data[start] != '0', "the number begins with 0");
    return value;
}

/* [1, 2, 3] with at most `most` numbers. Returns how many. */
static int take_integers(Cursor *c, int64_t *values, int most) {
    int count = 0;
    while (next_item(c, "[]", count) && require(c, count < most, "more numbers than expected"))
        values[count++] = take_integer(c);
    return count;
}

/* The first three are those of ElementType, in its order; the rest are TYPE_OTHER. */
static const struct {
    char name[8];
    unsigned char size;
} element_types[] = {
    {"U8", 1}, {"F32", 4}, {"F64", 8}, {"F16", 2}, {"BF16", 2}, {"I8", 1}, {"I16", 2}, {"I32", 4}, {"I64", 8},
    {"U16", 2}, {"U32", 4}, {"U64", 8}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"BOOL", 1},
};
enum { TYPES = sizeof element_types / sizeof element_types[0] };

/* {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, whose data lie in data[size]. */
static TensorEntry take_tensor(Cursor *c, const char *name, const unsigned char *data, size_t size) {
    TensorEntry entry = {.name = name, .rank = -1, .count = 1};
    int64_t offsets[2] = {0};
    int type = -1, offset_count = -1;
    for (int i = 0; next_item(c, "{}", i); i++) {
        const char *key = take_name(c);
        if (strcmp(key, "dtype") == 0 && type < 0) {
            const char *name_of_type = take_string(c);
            for (type = 0; type < TYPES && strcmp(name_of_type, element_types[type].name) != 0;)
                type++;
            require(c, type < TYPES, "unknown dtype");
        } else if (strcmp(key, "shape") == 0 && entry.rank < 0)
            entry.rank = take_integers(c, entry.shape, 8);
        else if (strcmp(key, "data_offsets") == 0 && offset_count < 0)
            offset_count = take_integers(c, offsets, 2);
        else
            require(c, 0, "expected each of dtype, shape and data_offsets once");
    }
    if (!require(c, type >= 0 && entry.rank >= 0 && offset_count == 2,
                 "expected dtype, shape and two data_offsets before this"))
        return entry;
    const size_t each = element_types[type].size, begin = (size_t)offsets[0], end = (size_t)offsets[1];
    for (int i = 0; i < entry.rank; i++) {
        const size_t length = (size_t)entry.shape[i];
        require(c, !length || entry.count <= SIZE_MAX / each / length, "the shape is too large");
        entry.count *= length;
    }
    entry.type = type < TYPE_OTHER ? (ElementType)type : TYPE_OTHER;
    entry.size = entry.count * each;
    require(c, begin <= end && end <= size, "data_offsets leave the file");
    if (require(c, end - begin == entry.size, "data_offsets do not fit the shape"))
        entry.data = data + begin;
    return entry;
}

/* Tensors and pairs of metadata both begin with their name, so that one comparison serves both. */
static int compare_names(const void *left, const void *right) {
    return strcmp(*(const char *const *)left, *(const char *const *)right);
}

static int compare_places(const void *left, const void *right) {
    const TensorEntry *a = left, *b = right;
    const int place = (a->data > b->data) - (a->data < b->data);
    return place ? place : (a->size > b->size) - (a->size < b->size);   /* the empty ones first */
}

/* Sort items by name, to find them later by halving; none may be there twice. */
static void sort_names(Cursor *c, void *items, int count, size_t size) {
    qsort(items, (size_t)count, size, compare_names);
    for (char *item = items; count > 1; count--, item += size)
        require(c, compare_names(item, item + size) != 0, "the name %.200s is there twice", *(char **)item);
}

static void take_header(Cursor *c, TensorFile *file, const unsigned char *data, size_t size) {
    const size_t pair = 2 * sizeof *file->metadata;
    int metadata_seen = 0;
    for (int i = 0; next_item(c, "{}", i); i++) {
        const char *name = take_name(c);
        if (strcmp(name, "__metadata__") != 0) {
            const TensorEntry entry = take_tensor(c, name, data, size);
            file->tensors = array_grow(c, file->tensors, (size_t)file->tensor_count, sizeof entry);
            if (!c->failed)
                file->tensors[file->tensor_count++] = entry;
            continue;
        }
        require(c, !metadata_seen++, "a second __metadata__");
        for (int k = 0; next_item(c, "{}", k); k++) {
            const char *key = take_name(c), *value = take_string(c);
            file->metadata = array_grow(c, file->metadata, (size_t)file->metadata_count, pair);
            if (c->failed)
                return;
            file->metadata[2 * file->metadata_count] = key;
            file->metadata[2 * file->metadata_count++ + 1] = value;
        }
    }
    skip_space(c);
    require(c, c->at == c->size, "expected only spaces after the header");
    if (c->failed)
        return;
    c->part = NULL;   /* from here on, messages tell of the whole */
    qsort(file->tensors, (size_t)file->tensor_count, sizeof *file->tensors, compare_places);
    const unsigned char *end = data;
    for (const TensorEntry *e = file->tensors; e < file->tensors + file->tensor_count && !c->failed; e++) {
        require(c, e->data == end, "tensor %.200s: its data %s", e->name,
                e->data < end ? "overlap those of another" : "leave a gap before them");
        end = e->data + e->size;
    }
    require(c, end == data + size, "%td bytes at its end belong to no tensor", data + size - end);
    sort_names(c, file->metadata, file->metadata_count, pair);
    sort_names(c, file->tensors, file->tensor_count, sizeof *file->tensors);
}

int tensors_parse(Bytes bytes, const char *name, TensorFile *file, Error *error) {
    enum { LONGEST = 100000000 };   /* the limit of the format's own implementation */
    char text[2][32];
    Cursor c = {bytes.data, bytes.size, 0, name, NULL, error, 0};
    *file = (TensorFile){bytes, allocate(1, sizeof(TensorEntry)), 0, allocate(2, sizeof(char *)), 0};
    require(&c, bytes.size >= 8, "holds %d bytes, expected a safetensors file", (int)bytes.size);
    const uint64_t length = take_little_endian(&c, 8), rest = bytes.size - c.at;
    require(&c, length <= LONGEST, "a header of %s bytes, expected at most 100,000,000 (safetensors)",
            grouped(length, text[0]));
    if (require(&c, length <= rest, "holds %s of the %s bytes of its header", grouped(rest, text[0]),
                grouped(length, text[1]))) {
        c = (Cursor){bytes.data + 8, (size_t)length, 0, name, "header", error, 0};
        take_header(&c, file, bytes.data + 8 + length, (size_t)(rest - length));
    }
    if (c.failed)
        tensors_free(file);
    return c.failed;
}

int tensors_read(const char *path, TensorFile *file, Error *error) {
    Bytes bytes;
    /* Not file_read: the length of a header could look like the magic number of gzip. */
    return file_bytes(path, &bytes, error) ? -1 : tensors_parse(bytes, path, file, error);
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
    char text[2][192];
    Cursor c = {entry->data, entry->size, 0, path, NULL, error, 0};
    const int is_single = entry->type == TYPE_F32;
    require(&c, is_single || entry->type == TYPE_F64, "tensor %s is not of type F32 or F64", entry->name);
    require(&c, rank == entry->rank && memcmp(shape, entry->shape, (size_t)rank * sizeof *shape) == 0,
            "tensor %s is %s, expected %s", entry->name, shape_text(entry->rank, entry->shape, text[0]),
            shape_text(rank, shape, text[1]));
    for (size_t i = 0; i < entry->count && !c.failed; i++) {
        const uint64_t bits = take_little_endian(&c, is_single ? 4 : 8);
        const union { uint32_t bits; float value; } single = {(uint32_t)bits};
        const union { uint64_t bits; double value; } full = {bits};
        out[i] = is_single ? (real)single.value : (real)full.value;
        if (!isfinite(out[i]))
            require(&c, 0, "tensor %s: value %s is not a finite number", entry->name, grouped(i, text[0]));
    }
    return c.failed;
}

/* ---- safetensors: writing ---- */

static void put_string(FILE *stream, const char *text) {
    putc('"', stream);
    for (; *text; text++)
        fprintf(stream, (*text & 0xe0) == 0 ? "\\u%04x" : strchr("\"\\", *text) ? "\\%c" : "%c", *text);
    putc('"', stream);
}

/* A number of 1, 4 or 8 bytes, which stand in this machine's order, in little-endian order. */
static void put_little_endian(FILE *stream, const unsigned char *number, size_t size) {
    const uint16_t one = 1;
    const size_t flip = *(const unsigned char *)&one ? 0 : size - 1;
    for (size_t b = 0; b < size; b++)
        putc_unlocked(number[b ^ flip], stream);
}

static size_t tensor_bytes(const TensorOut *tensor) {
    size_t bytes = element_types[tensor->type].size;
    for (int i = 0; i < tensor->rank; i++)
        bytes *= (size_t)tensor->shape[i];
    return bytes;
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
        fprintf(stream, ":{\"dtype\":\"%s\",\"shape\":[", element_types[t->type].name);
        for (int d = 0; d < t->rank; d++)
            fprintf(stream, "%s%" PRId64, d ? "," : "", t->shape[d]);
        const size_t begin = offset;
        offset += tensor_bytes(t);
        fprintf(stream, "],\"data_offsets\":[%zu,%zu]}", begin, offset);
    }
    const long header = ftell(stream) + 1;
    fprintf(stream, "}%*s", (int)(-header & 7), "");
    const uint64_t length = (uint64_t)ftell(stream) - 8;
    if (fseek(stream, 0, SEEK_SET) != 0)
        return -1;
    put_little_endian(stream, (const unsigned char *)&length, 8);
    if (fseek(stream, 0, SEEK_END) != 0)
        return -1;
    for (int i = 0; i < list->tensor_count; i++) {
        const TensorOut *t = &list->tensors[i];
        const size_t bytes = tensor_bytes(t), size = element_types[t->type].size;
        for (size_t b = 0; b < bytes; b += size)
            put_little_endian(stream, (const unsigned char *)t->data + b, size);
    }
    return ferror(stream);
}

int tensors_write(const char *path, const TensorOut *tensors, int tensor_total, const char *const *metadata,
                  int metadata_count, Error *error) {
    const TensorList list = {tensors, tensor_total, metadata_count, metadata};
    return file_replace(path, write_tensors, &list, error);
}
