/* data.c - files in and out: gzip, PNG/PGM/PPM, charts, MNIST, CIFAR-10, built-in digits, safetensors.
 *
 * Every parser here faces files from strangers. Three rules make it easy to see that they are safe: memory is
 * asked for only after the file was seen to hold what it promises; each read is bounded where it is made; and
 * a file that is not exactly right is refused with one line that says what was found and what was expected.
 * It is not a general library: it reads and writes what this program needs and nothing else. */

#define _POSIX_C_SOURCE 200809L

#include "diffenc.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- small helpers ---- */

/* 47040000 as "47,040,000", for messages. Returns `text`. */
static const char *grouped(uint64_t value, char text[32])
{
    int length = snprintf(text, 32, "%" PRIu64, value);
    for (int at = length - 3; at > 0; at -= 3) {
        memmove(text + at + 1, text + at, strlen(text + at) + 1);
        text[at] = ',';
    }
    return text;
}

static uint32_t big_endian_32(const unsigned char *data)
{
    return (uint32_t)data[0] << 24 | (uint32_t)data[1] << 16 | (uint32_t)data[2] << 8 | data[3];
}

static unsigned char *put_big_endian_32(unsigned char *at, uint32_t value)
{
    for (int shift = 24; shift >= 0; shift -= 8) *at++ = (unsigned char)(value >> shift);
    return at;
}

/* The CRC-32 of gzip and PNG, four bits at a time: a table of 16 numbers can be checked by eye. */
static uint32_t crc_32(const unsigned char *data, size_t size)
{
    static const uint32_t table[16] = {
        0x00000000, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158, 0x5005713c,
        0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4, 0xa00ae278, 0xbdbdf21c,
    };
    uint32_t crc = 0xffffffff;
    for (size_t i = 0; i < size; i++) {
        crc = table[(crc ^ data[i]) & 15] ^ crc >> 4;
        crc = table[(crc ^ data[i] >> 4) & 15] ^ crc >> 4;
    }
    return ~crc;
}

/* Make room for `more` bytes behind the `bytes->size` there are. The room doubles, so that it stays in
 * proportion to what was really read. Returns 0, or -1 when there is no memory. */
static int bytes_reserve(Bytes *bytes, size_t *capacity, size_t more)
{
    if (more <= *capacity - bytes->size) return 0;
    if (*capacity > (SIZE_MAX - more) / 2) return -1;
    unsigned char *data = realloc(bytes->data, *capacity * 2 + more);
    if (data == NULL) return -1;
    bytes->data = data;
    *capacity = *capacity * 2 + more;
    return 0;
}

/* ---- gzip ---- */

/* A prefix code as one table over the next `longest` bits of the stream: symbol << 4 | length, or 0 where no
 * code begins so. It is made anew for every block, which costs little beside decoding the block. */
typedef struct {
    int longest;
    uint16_t entry[1 << 15];
} PrefixCode;

/* `fault` is set by the first thing that goes wrong and says what; from then on the stream reads as zeros. */
typedef struct {
    const unsigned char *data;
    size_t size, at;                  /* bytes, and how many of them went into `bits` */
    uint64_t bits;
    int bit_count;
    Bytes out;
    size_t capacity, member_start;    /* where in `out` this member begins: no distance reaches before it */
    const char *fault;
    PrefixCode literal, distance;
} Inflater;

static void inflate_fault(Inflater *s, const char *fault)
{
    if (s->fault == NULL) s->fault = fault;
}

static void inflate_refill(Inflater *s)
{
    for (; s->bit_count <= 56 && s->at < s->size; s->bit_count += 8) {
        s->bits |= (uint64_t)s->data[s->at++] << s->bit_count;
    }
}

/* The next `count` bits, at most 16. */
static unsigned inflate_bits(Inflater *s, int count)
{
    inflate_refill(s);
    if (s->bit_count < count) inflate_fault(s, "is truncated");
    if (s->fault != NULL) return 0;
    unsigned value = (unsigned)(s->bits & ((1u << count) - 1));
    s->bits >>= count;
    s->bit_count -= count;
    return value;
}

/* The byte of the stream that comes next. Only called between bytes. */
static size_t inflate_position(const Inflater *s)
{
    return s->at - (size_t)(s->bit_count / 8);
}

/* Make the table from lengths[count] in 0..15 (RFC 1951, 3.2.2). A code that leaves bit patterns unused is
 * refused, but for the one the RFC allows: a single code of one bit, or none at all. */
static void inflate_code(Inflater *s, PrefixCode *code, const unsigned char *lengths, int count,
                         int single_allowed)
{
    int tally[16] = { 0 }, unused = 1;
    unsigned next[16] = { 0 };
    for (int i = 0; i < count; i++) tally[lengths[i]]++;
    tally[0] = 0;
    code->longest = 0;
    for (int length = 1; length <= 15; length++) {
        next[length] = (next[length - 1] + (unsigned)tally[length - 1]) << 1;
        unused = 2 * unused - tally[length];
        if (unused < 0) inflate_fault(s, "has an over-subscribed code");
        if (s->fault != NULL) return;
        if (tally[length] > 0) code->longest = length;
    }
    if (unused > 0 && !(single_allowed && code->longest <= 1)) inflate_fault(s, "has an incomplete code");

    size_t entries = (size_t)1 << code->longest;
    memset(code->entry, 0, entries * sizeof code->entry[0]);
    for (int symbol = 0; symbol < count; symbol++) {
        int length = lengths[symbol];
        if (length == 0) continue;
        /* Codes are sent with their first bit lowest, so the table is indexed by the reversed code. */
        size_t reversed = 0;
        for (int bit = 0; bit < length; bit++) reversed = reversed << 1 | (next[length] >> bit & 1);
        next[length]++;
        for (size_t i = reversed; i < entries; i += (size_t)1 << length) {
            code->entry[i] = (uint16_t)(symbol << 4 | length);
        }
    }
}

static unsigned inflate_symbol(Inflater *s, const PrefixCode *code)
{
    inflate_refill(s);
    unsigned entry = code->entry[s->bits & ((1u << code->longest) - 1)];
    int length = entry & 15;
    if (s->bit_count < (length > 0 ? length : code->longest)) inflate_fault(s, "is truncated");
    if (length == 0) inflate_fault(s, "has an invalid code");
    if (s->fault != NULL) return 0;
    s->bits >>= length;
    s->bit_count -= length;
    return entry >> 4;
}

static void inflate_put(Inflater *s, unsigned byte)
{
    if (s->fault != NULL) return;
    if (bytes_reserve(&s->out, &s->capacity, 1)) inflate_fault(s, "needs more memory than there is");
    else s->out.data[s->out.size++] = (unsigned char)byte;
}

static void inflate_stored(Inflater *s)
{
    inflate_bits(s, s->bit_count % 8);
    unsigned length = inflate_bits(s, 16);
    if (inflate_bits(s, 16) != (length ^ 0xffff)) inflate_fault(s, "has a stored block of two lengths");
    for (; length > 0 && s->fault == NULL; length--) inflate_put(s, inflate_bits(s, 8));
}

static void inflate_fixed_codes(Inflater *s)
{
    unsigned char lengths[288];
    for (int i = 0; i < 288; i++) lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
    inflate_code(s, &s->literal, lengths, 288, 0);
    memset(lengths, 5, 32);
    inflate_code(s, &s->distance, lengths, 32, 0);
}

static void inflate_dynamic_codes(Inflater *s)
{
    static const char order[19] = { 16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15 };
    unsigned char lengths[286 + 30 + 138] = { 0 };            /* a run may begin at the last of them */
    int literals = (int)inflate_bits(s, 5) + 257, distances = (int)inflate_bits(s, 5) + 1;
    int count = (int)inflate_bits(s, 4) + 4;
    if (literals > 286 || distances > 30) inflate_fault(s, "has more codes than there are symbols");
    for (int i = 0; i < count; i++) lengths[(int)order[i]] = (unsigned char)inflate_bits(s, 3);
    inflate_code(s, &s->literal, lengths, 19, 0);
    for (int i = 0; i < literals + distances && s->fault == NULL;) {
        unsigned symbol = inflate_symbol(s, &s->literal);
        unsigned char value = (unsigned char)symbol;
        int repeat = 1;
        if (symbol == 16 && i == 0) inflate_fault(s, "repeats a code length before the first");
        if (symbol >= 16) value = symbol == 16 && i > 0 ? lengths[i - 1] : 0;
        if (symbol == 16) repeat = 3 + (int)inflate_bits(s, 2);
        if (symbol == 17) repeat = 3 + (int)inflate_bits(s, 3);
        if (symbol == 18) repeat = 11 + (int)inflate_bits(s, 7);
        memset(lengths + i, value, (size_t)repeat);
        i += repeat;
        if (i > literals + distances) inflate_fault(s, "has more code lengths than codes");
    }
    if (lengths[256] == 0) inflate_fault(s, "has no code for the end of a block");
    if (s->fault != NULL) return;
    inflate_code(s, &s->literal, lengths, literals, 1);
    inflate_code(s, &s->distance, lengths + literals, distances, 1);
}

static void inflate_compressed(Inflater *s)
{
    static const uint16_t length_base[29] = {
        3,  4,  5,  6,  7,  8,  9,  10, 11, 13,  15,  17,  19,  23, 27,
        31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258,
    };
    static const uint16_t distance_base[30] = {
        1,   2,   3,   4,   5,    7,    9,    13,   17,   25,   33,   49,   65,    97,    129,
        193, 257, 385, 513, 769,  1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577,
    };
    for (;;) {
        unsigned symbol = inflate_symbol(s, &s->literal);
        if (s->fault != NULL || symbol == 256) return;
        if (symbol > 285) inflate_fault(s, "has an invalid length");
        if (symbol < 256) inflate_put(s, symbol);
        if (symbol < 256 || symbol > 285) continue;
        symbol -= 257;
        unsigned length = length_base[symbol];
        if (symbol >= 8 && symbol < 28) length += inflate_bits(s, (int)symbol / 4 - 1);
        symbol = inflate_symbol(s, &s->distance);
        if (symbol > 29) inflate_fault(s, "has an invalid distance");
        if (s->fault != NULL || symbol > 29) return;
        size_t distance = distance_base[symbol] + inflate_bits(s, symbol < 2 ? 0 : (int)symbol / 2 - 1);
        if (distance > s->out.size - s->member_start) inflate_fault(s, "has a distance that is too far back");
        if (s->fault != NULL) return;
        /* Byte by byte: the copy may overlap its source, and then the bytes just written repeat. */
        for (; length > 0; length--) inflate_put(s, s->out.data[s->out.size - distance]);
    }
}

/* One member (RFC 1952, 2.3): header, deflate blocks, CRC-32 and length of what came out. */
static void inflate_member(Inflater *s)
{
    size_t start = inflate_position(s);
    const char *not_gzip = start == 0 ? "is not gzip" : "has trailing garbage";
    if (inflate_bits(s, 8) != 0x1f || inflate_bits(s, 8) != 0x8b) inflate_fault(s, not_gzip);
    if (inflate_bits(s, 8) != 8) inflate_fault(s, "has an unknown compression method");
    unsigned flags = inflate_bits(s, 8);
    if (flags & 0xe0) inflate_fault(s, "has unknown flags");
    for (int i = 0; i < 3; i++) inflate_bits(s, 16);                           /* time, hints, system */
    if (flags & 4) for (unsigned extra = inflate_bits(s, 16); extra > 0; extra--) inflate_bits(s, 8);
    if (flags & 8) while (inflate_bits(s, 8) != 0) { }                         /* name */
    if (flags & 16) while (inflate_bits(s, 8) != 0) { }                        /* comment */
    uint32_t crc = crc_32(s->data + start, inflate_position(s) - start);
    if ((flags & 2) && inflate_bits(s, 16) != (crc & 0xffff)) inflate_fault(s, "has a wrong header CRC");

    s->member_start = s->out.size;
    for (unsigned last = 0; !last && s->fault == NULL;) {
        last = inflate_bits(s, 1);
        unsigned type = inflate_bits(s, 2);
        if (type == 3) inflate_fault(s, "has a block of unknown type");
        if (type == 0) inflate_stored(s);
        if (type == 1) inflate_fixed_codes(s);
        if (type == 2) inflate_dynamic_codes(s);
        if (type != 0 && s->fault == NULL) inflate_compressed(s);
    }
    inflate_bits(s, s->bit_count % 8);
    size_t size = s->out.size - s->member_start;
    crc = inflate_bits(s, 16);
    crc |= (uint32_t)inflate_bits(s, 16) << 16;
    uint32_t promised = inflate_bits(s, 16);
    promised |= (uint32_t)inflate_bits(s, 16) << 16;
    if (promised != (uint32_t)size) inflate_fault(s, "has a wrong length");
    uint32_t found = size > 0 ? crc_32(s->out.data + s->member_start, size) : 0;
    if (crc != found) inflate_fault(s, "has a wrong CRC");
}

int gzip_inflate(const unsigned char *data, size_t size, const char *name, Bytes *out, Error *error)
{
    char position[32];
    *out = (Bytes){ NULL, 0 };
    if (size == 0) return fail(error, "%s: is empty, expected a gzip stream", name);
    Inflater *s = allocate_zeroed(1, sizeof *s);      /* too large for the stack of a small thread */
    s->data = data;
    s->size = size;
    do inflate_member(s);
    while (s->fault == NULL && inflate_position(s) < size);
    const char *fault = s->fault;
    grouped(inflate_position(s), position);
    *out = s->out;
    free(s);
    if (fault == NULL) return 0;
    free(out->data);
    *out = (Bytes){ NULL, 0 };
    return fail(error, "%s: the gzip stream %s (near byte %s)", name, fault, position);
}

/* ---- files ---- */

/* The bytes of a file as they are. */
static int file_bytes(const char *path, Bytes *bytes, Error *error)
{
    size_t capacity = 0, got = 1;
    *bytes = (Bytes){ NULL, 0 };
    FILE *stream = fopen(path, "rb");
    if (stream == NULL) return fail(error, "%s: %s", path, strerror(errno));
    errno = 0;
    while (got > 0 && bytes_reserve(bytes, &capacity, 65536) == 0) {
        got = fread(bytes->data + bytes->size, 1, capacity - bytes->size, stream);
        bytes->size += got;
    }
    int reason = got > 0 ? ENOMEM : ferror(stream) ? errno : 0;
    fclose(stream);
    if (reason == 0) return 0;
    free(bytes->data);
    *bytes = (Bytes){ NULL, 0 };
    return fail(error, "%s: %s", path, strerror(reason));
}

int file_read(const char *path, Bytes *bytes, Error *error)
{
    size_t length = strlen(path);
    if (file_bytes(path, bytes, error)) return -1;
    int is_gzip = length > 3 && strcmp(path + length - 3, ".gz") == 0;
    if (!is_gzip && (bytes->size < 3 || memcmp(bytes->data, "\x1f\x8b\x08", 3) != 0)) return 0;
    unsigned char *packed = bytes->data;
    int status = gzip_inflate(packed, bytes->size, path, bytes, error);
    free(packed);
    return status;
}

/* The entry of a file in its directory is on the disk when the directory is. */
static int directory_sync(const char *path)
{
    char directory[4096] = ".";
    const char *slash = strrchr(path, '/');
    int length = slash == path ? 1 : slash != NULL ? (int)(slash - path) : 1;
    if (slash != NULL) snprintf(directory, sizeof directory, "%.*s", length, path);
    int descriptor = open(directory, O_RDONLY);
    if (descriptor < 0) return 0;                  /* may be written but not read: nothing to be done */
    int status = fsync(descriptor) != 0 && errno != EINVAL ? -1 : 0;   /* EINVAL: this file system cannot */
    close(descriptor);
    return status;
}

int file_replace(const char *path, FileWriter write, const void *context, Error *error)
{
    char temporary[4096];
    struct stat status;
    /* A rename would turn /dev/null into a plain file. */
    if (stat(path, &status) == 0 && !S_ISREG(status.st_mode)) {
        return fail(error, "%s: is not a regular file", path);
    }
    size_t length = (size_t)snprintf(temporary, sizeof temporary, "%s.tmp.%ld", path, (long)getpid());
    if (length >= sizeof temporary) return fail(error, "%s: %s", path, strerror(ENAMETOOLONG));

    /* Whatever has this name was left by a process that is no more. */
    unlink(temporary);
    int descriptor = open(temporary, O_WRONLY | O_CREAT | O_EXCL, 0666), reason = 0;
    FILE *stream = descriptor < 0 ? NULL : fdopen(descriptor, "wb");
    if (stream == NULL) {
        reason = errno;
        if (descriptor >= 0) close(descriptor);
    } else {
        errno = 0;
        if (write(stream, context) != 0 || fflush(stream) != 0 || fsync(descriptor) != 0) {
            reason = errno != 0 ? errno : EIO;
        }
        if (fclose(stream) != 0 && reason == 0) reason = errno;
        if (reason == 0 && rename(temporary, path) != 0) reason = errno;
        if (reason == 0 && directory_sync(path) != 0) return fail(error, "%s: %s", path, strerror(errno));
        if (reason != 0) unlink(temporary);
    }
    return reason == 0 ? 0 : fail(error, "%s: %s", path, strerror(reason));
}

static int write_bytes(void *stream, const void *context)
{
    const Bytes *bytes = context;
    return fwrite(bytes->data, 1, bytes->size, stream) == bytes->size ? 0 : -1;
}

/* ---- images ---- */

/* Fill in the length of the PNG chunk [length, type, data, CRC] whose data ends at `end`, and append its CRC.
 * Returns where the next chunk begins. */
static unsigned char *png_close(unsigned char *chunk, unsigned char *end)
{
    put_big_endian_32(chunk, (uint32_t)(end - chunk - 8));
    return put_big_endian_32(end, crc_32(chunk + 4, (size_t)(end - chunk - 4)));
}

/* A whole PNG file. Its pixels are not compressed (deflate blocks of type "stored"): they are few. */
static Bytes png_encode(const unsigned char *pixels, int height, int width, int channels)
{
    size_t row = (size_t)width * (size_t)channels + 1, size = row * (size_t)height;
    size_t blocks = (size + 65534) / 65535;
    unsigned char *file = allocate(8 + 25 + 12 + 6 + size + 5 * blocks + 12, 1), *chunk = file + 8;
    memcpy(file, "\x89PNG\r\n\x1a\n\0\0\0\0IHDR", 16);
    unsigned char *at = put_big_endian_32(put_big_endian_32(chunk + 8, (uint32_t)width), (uint32_t)height);
    memcpy(at, channels == 3 ? "\x08\2\0\0\0" : "\x08\0\0\0\0", 5);          /* 8 bit, grey or RGB */
    chunk = png_close(chunk, at + 5);
    memcpy(chunk + 4, "IDAT\x78\x01", 6);
    at = chunk + 10;
    uint32_t low = 1, high = 0;                                              /* Adler-32 (RFC 1950) */
    for (size_t i = 0; i < size; i++) {
        if (i % 65535 == 0) {
            unsigned length = size - i < 65535 ? (unsigned)(size - i) : 65535, inverse = length ^ 0xffff;
            *at++ = size - i <= 65535;                                       /* the last block says so */
            *at++ = (unsigned char)length;
            *at++ = (unsigned char)(length >> 8);
            *at++ = (unsigned char)inverse;
            *at++ = (unsigned char)(inverse >> 8);
        }
        *at = i % row == 0 ? 0 : *pixels++;                                  /* 0: this row has no filter */
        low = (low + *at++) % 65521;
        high = (high + low) % 65521;
    }
    chunk = png_close(chunk, put_big_endian_32(at, high << 16 | low));
    memcpy(chunk + 4, "IEND", 4);
    return (Bytes){ file, (size_t)(png_close(chunk, chunk + 8) - file) };
}

/* A whole PGM or PPM file; grey becomes three equal colours in a PPM. */
static Bytes netpbm_encode(const unsigned char *pixels, int height, int width, int channels, int colour)
{
    size_t count = (size_t)height * (size_t)width * (colour ? 3 : 1);
    size_t each = colour && channels == 1 ? 3 : 1;
    unsigned char *file = allocate(count + 64, 1);
    int header = snprintf((char *)file, 64, "P%d\n%d %d\n255\n", colour ? 6 : 5, width, height);
    for (size_t i = 0; i < count; i++) file[(size_t)header + i] = pixels[i / each];
    return (Bytes){ file, (size_t)header + count };
}

static int has_extension(const char *path, const char *extension)
{
    size_t length = strlen(path), end = strlen(extension);
    return length > end && strcasecmp(path + length - end, extension) == 0;
}

int image_path_check(const char *path, int channels, Error *error)
{
    if (has_extension(path, ".pgm") && channels != 1) {
        return fail(error, "%s: a .pgm holds grey images only, expected .png or .ppm for colour", path);
    }
    if (has_extension(path, ".png") || has_extension(path, ".ppm") || has_extension(path, ".pgm")) return 0;
    return fail(error, "%s: unknown kind of image, expected a name that ends in .png, .pgm or .ppm", path);
}

int image_write(const char *path, const unsigned char *pixels, int height, int width, int channels,
                Error *error)
{
    assert(height > 0 && width > 0 && (channels == 1 || channels == 3));
    if (image_path_check(path, channels, error)) return -1;
    if ((double)height * (width * 3.0 + 2) > 2e9) {
        return fail(error, "%s: an image of %d x %d pixels is too large", path, width, height);
    }
    Bytes file = has_extension(path, ".png") ? png_encode(pixels, height, width, channels)
               : netpbm_encode(pixels, height, width, channels, has_extension(path, ".ppm"));
    int status = file_replace(path, write_bytes, &file, error);
    free(file.data);
    return status;
}

unsigned char *image_grid(const unsigned char *images, int count, int columns, int height, int width,
                          int channels, int *grid_height, int *grid_width)
{
    assert(count > 0 && columns > 0);
    if (columns > count) columns = count;
    int rows = (count + columns - 1) / columns, gap = 2;
    *grid_height = rows * (height + gap) + gap;
    *grid_width = columns * (width + gap) + gap;
    size_t row = (size_t)width * (size_t)channels, grid_row = (size_t)*grid_width * (size_t)channels;
    unsigned char *grid = allocate((size_t)*grid_height, grid_row);
    memset(grid, 255, (size_t)*grid_height * grid_row);
    for (int i = 0; i < count; i++) {
        int top = gap + i / columns * (height + gap), left = gap + i % columns * (width + gap);
        unsigned char *corner = grid + (size_t)top * grid_row + (size_t)(left * channels);
        for (int y = 0; y < height; y++, images += row) memcpy(corner + (size_t)y * grid_row, images, row);
    }
    return grid;
}

/* ---- drawing: for charts and for the built-in digits ---- */

/* An image [height, width, channels] on white (255) or black (0), and the part of it that may be drawn to:
 * left <= x < right, top <= y < bottom. Pixel (x, y) is the square around the point (x, y). */
typedef struct {
    unsigned char *pixels;
    int width, channels, background;
    int left, top, right, bottom;
} Canvas;

static unsigned char *canvas_pixel(const Canvas *canvas, int x, int y)
{
    return canvas->pixels + ((size_t)y * (size_t)canvas->width + (size_t)x) * (size_t)canvas->channels;
}

static int clamp(double value, int low, int high)
{
    return value < low ? low : value > high ? high : (int)value;
}

static void draw_rectangle(const Canvas *canvas, int left, int top, int width, int height,
                           const unsigned char *colour)
{
    for (int y = clamp(top, canvas->top, canvas->bottom); y < top + height && y < canvas->bottom; y++) {
        for (int x = clamp(left, canvas->left, canvas->right); x < left + width && x < canvas->right; x++) {
            memcpy(canvas_pixel(canvas, x, y), colour, (size_t)canvas->channels);
        }
    }
}

/* A line with round ends and soft edges. The values of a pixel go from the background towards the colour by
 * how much of it is covered, and never back, so that the joints of a long curve do not show. */
static void draw_line(const Canvas *canvas, double x0, double y0, double x1, double y1, double radius,
                      const unsigned char *colour)
{
    double along_x = x1 - x0, along_y = y1 - y0, square = along_x * along_x + along_y * along_y;
    int left = clamp(fmin(x0, x1) - radius, canvas->left, canvas->right);
    int right = clamp(fmax(x0, x1) + radius + 2, canvas->left, canvas->right);
    int bottom = clamp(fmax(y0, y1) + radius + 2, canvas->top, canvas->bottom);
    for (int y = clamp(fmin(y0, y1) - radius, canvas->top, canvas->bottom); y < bottom; y++) {
        for (int x = left; x < right; x++) {
            double part = square > 0 ? ((x - x0) * along_x + (y - y0) * along_y) / square : 0;
            part = fmin(fmax(part, 0), 1);
            double across_x = x - x0 - part * along_x, across_y = y - y0 - part * along_y;
            double cover = fmin(radius + 0.5 - sqrt(across_x * across_x + across_y * across_y), 1);
            for (int c = 0; c < canvas->channels && cover > 0; c++) {
                unsigned char *value = canvas_pixel(canvas, x, y) + c;
                int ground = canvas->background, moved = (int)lround(cover * (colour[c] - ground));
                if (abs(moved) > abs(*value - ground)) *value = (unsigned char)(ground + moved);
            }
        }
    }
}

/* Letters are 5 x 7 dots and one row for descenders, 6 dots from one to the next. */
static const char font_letters[3][15] = { "0123456789.-+/", "abcdefghijklm", "nopqrstuvwxyz" };
static const char *const font[3][8] = {
    {
        " ###    #    ###   ###     #  #####   ##  #####  ###   ###                        #",
        "#   #  ##   #   # #   #   ##  #      #        # #   # #   #               #       #",
        "#  ##   #       #     #  # #  ####  #        #  #   # #   #               #      # ",
        "# # #   #     ##    ##  #  #      # ####     #   ###   ####       ##### #####   #  ",
        "##  #   #    #        # #####     # #   #   #   #   #     #               #    #   ",
        "#   #   #   #     #   #    #  #   # #   #   #   #   #    #   ##           #   #    ",
        " ###   ###  #####  ###     #   ###   ###    #    ###   ##    ##               #    ",
        "                                                                                   ",
    },
    {
        "      #               #         ##        #       #      #  #      ##        ",
        "      #               #        #  #       #                 #       #        ",
        " ###  ####   ####  ####  ###   #     #### ####   ##     ##  #  #    #   ## # ",
        "    # #   # #     #   # #   # ####  #   # #   #   #      #  # #     #   # # #",
        " #### #   # #     #   # #####  #    #   # #   #   #      #  ##      #   # # #",
        "#   # #   # #     #   # #      #     #### #   #   #      #  # #     #   # # #",
        " #### ####   ####  ####  ####  #        # #   #  ###  #  #  #  #   ###  # # #",
        "                                     ###               ##                    ",
    },
    {
        "                                     #                                       ",
        "                                     #                                       ",
        "####   ###  ####   #### # ##   #### ####  #   # #   # # # # #   # #   # #####",
        "#   # #   # #   # #   # ##  # #      #    #   # #   # # # #  # #  #   #    # ",
        "#   # #   # #   # #   # #      ###   #    #   #  # #  # # #   #   #   #   #  ",
        "#   # #   # ####   #### #         #  #  # #   #  # #  # # #  # #   ####  #   ",
        "#   #  ###  #         # #     ####    ##   ####   #    # #  #   #     # #####",
        "            #         #                                            ###       ",
    },
};

enum { FONT_STEP = 6, FONT_ROWS = 8 };

/* Text from its upper left corner (left, top), each dot a square of `dot` pixels. Capitals are drawn small,
 * what the font does not have is drawn as a space. */
static void draw_text(const Canvas *canvas, int left, int top, int dot, const char *text,
                      const unsigned char *colour)
{
    for (; *text != '\0'; text++, left += FONT_STEP * dot) {
        char letter = *text >= 'A' && *text <= 'Z' ? (char)(*text - 'A' + 'a') : *text;
        for (int band = 0; band < 3; band++) {
            const char *found = strchr(font_letters[band], letter);
            if (found == NULL) continue;
            for (int i = 0; i < FONT_ROWS * 5; i++) {
                if (font[band][i / 5][(found - font_letters[band]) * FONT_STEP + i % 5] != '#') continue;
                draw_rectangle(canvas, left + i % 5 * dot, top + i / 5 * dot, dot, dot, colour);
            }
        }
    }
}

/* ---- charts ---- */

typedef struct {
    double low, high, step;           /* of the values shown; from one tick to the next */
} Axis;

/* An axis from low to high with at most `ticks` steps of 1, 2 or 5 times a power of ten. */
static Axis axis_fit(double low, double high, double ticks)
{
    /* A constant needs some height too, and a range that is all rounding noise is a constant. */
    if (high - low <= 1e-9 * fmax(fabs(low), fabs(high))) {
        double margin = low != 0 ? fabs(low) * 0.1 : 1;
        low -= margin;
        high += margin;
    }
    static const double factors[4] = { 1, 2, 5, 10 };
    double power = pow(10, floor(log10((high - low) / ticks)));
    int factor = 0;
    while (factor < 3 && (high - low) / (power * factors[factor]) > ticks) factor++;
    return (Axis){ low, high, power * factors[factor] };
}

static int compare_doubles(const void *left, const void *right)
{
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

/* Whether point k can be drawn: it is finite, and small enough to compute with. */
static int curve_has(const Curve *curve, int k)
{
    return fabs(curve->x[k]) < 1e30 && fabs(curve->y[k]) < 1e30;
}

/* The axis for all x, or all y, of all curves. The uppermost 2% of y (of a few numbers: one) are left out if
 * they would more than double the range: the first losses of a training must not flatten the rest of it. */
static Axis axis_of(const Curve *curves, int curve_count, int is_y, double ticks)
{
    size_t total = 1, count = 0;
    for (int i = 0; i < curve_count; i++) total += (size_t)curves[i].count;
    double *values = allocate(total, sizeof *values), low = 0, high = 1;
    for (int i = 0; i < curve_count; i++) {
        for (int k = 0; k < curves[i].count; k++) {
            if (curve_has(&curves[i], k)) values[count++] = is_y ? curves[i].y[k] : curves[i].x[k];
        }
    }
    if (count > 0) {
        qsort(values, count, sizeof *values, compare_doubles);
        double most = values[count - 1 - (count + 42) / 50];
        low = values[0];
        high = values[count - 1];
        if (is_y && high - most > most - low) high = most;
    }
    free(values);
    double margin = is_y ? 0.04 * (high - low) : 0;
    return axis_fit(low - margin, high + margin, ticks);
}

static int axis_text(double value, double step, char text[32])
{
    int plain = fabs(value) < 1e6 && step >= 1e-4;
    int decimals = step < 1 ? (int)ceil(-log10(step) - 1e-9) : 0;
    return plain ? snprintf(text, 32, "%.*f", decimals, value) : snprintf(text, 32, "%.3g", value);
}

void chart_draw(const Curve *curves, int curve_count, const char *x_label, const char *y_label,
                unsigned char *pixels, int height, int width)
{
    static const unsigned char white[3] = { 255, 255, 255 }, grid[3] = { 228, 228, 228 };
    static const unsigned char ink[3] = { 60, 60, 60 };
    int dot = clamp(fmin(height / 300.0, width / 400.0), 1, 8), letter = FONT_STEP * dot, line = 12 * dot;
    Canvas canvas = { pixels, width, 3, 255, 0, 0, width, height }, plot = canvas;
    plot.left = clamp(8 * letter + 3 * dot, 0, width);
    plot.right = clamp(width - 2 * letter, plot.left, width);
    plot.top = clamp(line * 3 / 2, 0, height);
    plot.bottom = clamp(height - 2 * line - 5 * dot, plot.top, height);
    int plot_width = plot.right - plot.left, plot_height = plot.bottom - plot.top;
    Axis x_axis = axis_of(curves, curve_count, 0, fmax(plot_width / (9.0 * letter), 1));
    Axis y_axis = axis_of(curves, curve_count, 1, fmax(plot_height / (3.0 * line), 1));
    double x_scale = (plot_width - 1) / (x_axis.high - x_axis.low);
    double y_scale = (plot_height - 1) / (y_axis.high - y_axis.low);
    char text[32];

    draw_rectangle(&canvas, 0, 0, width, height, white);
    for (double k = ceil(x_axis.low / x_axis.step); k * x_axis.step <= x_axis.high; k++) {
        int x = plot.left + (int)((k * x_axis.step - x_axis.low) * x_scale);
        int length = axis_text(k * x_axis.step + 0.0, x_axis.step, text) * letter;
        draw_rectangle(&canvas, x, plot.top, 1, plot_height + 3 * dot, grid);
        draw_text(&canvas, x - length / 2, plot.bottom + 5 * dot, dot, text, ink);
    }
    for (double k = ceil(y_axis.low / y_axis.step); k * y_axis.step <= y_axis.high; k++) {
        int y = plot.bottom - 1 - (int)((k * y_axis.step - y_axis.low) * y_scale);
        int length = axis_text(k * y_axis.step + 0.0, y_axis.step, text) * letter;
        draw_rectangle(&canvas, plot.left - 3 * dot, y, plot_width + 3 * dot, 1, grid);
        draw_text(&canvas, plot.left - 4 * dot - length, y - 3 * dot, dot, text, ink);
    }
    draw_rectangle(&canvas, plot.left, plot.top, dot, plot_height, ink);
    draw_rectangle(&canvas, plot.left, plot.bottom, plot_width, dot, ink);
    draw_text(&canvas, plot.left - 4 * letter, 4 * dot, dot, y_label, ink);
    int label = (int)strlen(x_label) * letter;
    draw_text(&canvas, plot.right - label, plot.bottom + 5 * dot + line, dot, x_label, ink);

    int longest = 0;
    for (int i = 0; i < curve_count; i++) {
        double last_x = -1, last_y = 0, radius = 0.5 * dot;
        for (int k = 0; k < curves[i].count; k++) {
            if (!curve_has(&curves[i], k)) continue;
            double x = plot.left + (curves[i].x[k] - x_axis.low) * x_scale;
            double y = fmax(plot.bottom - 1 - (curves[i].y[k] - y_axis.low) * y_scale, -1e5);
            int first = last_x < 0;
            draw_line(&plot, first ? x : last_x, first ? y : last_y, x, y, first ? 3 * radius : radius,
                      curves[i].colour);
            last_x = x;
            last_y = y;
        }
        if ((int)strlen(curves[i].name) > longest) longest = (int)strlen(curves[i].name);
    }

    /* The legend stands in the upper right corner, where a falling curve leaves room. */
    int legend = (longest + 5) * letter, left = plot.right - legend - letter;
    int legend_height = curve_count > 0 ? curve_count * line + 4 * dot : 0;
    draw_rectangle(&canvas, left, plot.top + 3 * dot, legend, legend_height, white);
    for (int i = 0; i < curve_count; i++) {
        int top = plot.top + 6 * dot + i * line;
        draw_rectangle(&canvas, left + letter, top + 2 * dot, 2 * letter, 3 * dot, curves[i].colour);
        draw_text(&canvas, left + 4 * letter, top, dot, curves[i].name, ink);
    }
}

/* ---- built-in digits ---- */

/* The strokes of the digits: points (x, y) in 0..100, y downwards, through which a smooth curve goes. A point
 * given twice is a corner. */
enum { PEN_UP = -1, END = -2, GLYPHS = 14 };
static const signed char glyph_points[GLYPHS][44] = {
    { 52,0, 26,12, 13,50, 26,88, 50,100, 76,86, 88,48, 74,12, 48,0, 30,8, END },
    { 50,0, 50,50, 50,100, END },
    { 14,20, 32,3, 58,0, 82,16, 78,40, 54,68, 12,100, 12,100, 50,98, 90,98, END },
    { 14,12, 40,0, 74,8, 76,32, 42,46, 42,46, 76,56, 84,80, 52,100, 12,90, END },
    { 24,0, 18,28, 12,56, 12,56, 50,56, 90,54, PEN_UP, 72,4, 70,52, 66,100, END },
    { 84,0, 54,2, 26,2, 26,2, 20,42, 20,42, 54,34, 84,56, 80,86, 46,100, 10,92, END },
    { 70,0, 40,22, 18,58, 22,90, 50,100, 78,86, 76,62, 50,54, 22,72, END },
    { 12,6, 50,4, 86,2, 86,2, 62,46, 42,100, END },
    { 78,14, 50,0, 24,12, 32,36, 54,48, 78,68, 72,92, 48,100, 24,90, 26,68, 50,48, 72,30, 78,12, END },
    { 80,22, 56,0, 26,10, 18,34, 40,50, 66,42, 80,18, 80,18, 76,58, 66,100, END },
    { 26,20, 50,0, 50,0, 50,50, 50,100, PEN_UP, 22,100, 50,100, 78,100, END },        /* with flag and foot */
    { 14,22, 36,2, 66,2, 82,22, 68,52, 38,84, 20,98, 10,86, 26,76, 58,92, 92,92, END },      /* with a loop */
    { 64,0, 38,34, 8,68, 8,68, 50,68, 92,66, PEN_UP, 64,0, 64,50, 62,100, END },      /* closed */
    { 12,6, 50,4, 86,2, 86,2, 62,46, 42,100, PEN_UP, 30,52, 52,50, 76,48, END },      /* with a bar */
};

/* Draw digit `index` into out[28, 28]: the points wobble, the glyph is narrowed, slanted and turned, then
 * scaled to its height and put into the middle, as the images of MNIST were, and moved a little. */
static void digit_draw(uint64_t seed, Split split, uint32_t index, unsigned char *out)
{
    static const signed char variant_of[10] = { -1, 10, 11, -1, 12, -1, -1, 13, -1, -1 };
    enum { SIZE = 28, PIECES = 5, MOST = 24 };
    static const unsigned char white = 255;
    RandomStream stream = random_stream(seed, RANDOM_GLYPHS, (uint32_t)split, index);
    uint32_t position = 0;
    int glyph = (int)(index % 10);
    if (random_uniform(stream, position++) < 0.35 && variant_of[glyph] >= 0) glyph = variant_of[glyph];
    double narrow = 0.6 + 0.4 * random_uniform(stream, position++);
    double slant = -0.1 + 0.5 * random_uniform(stream, position++);
    double turn = 0.4 * (random_uniform(stream, position++) - 0.5);
    double tall = 16 + 3 * random_uniform(stream, position++);
    double move_x = 3 * (random_uniform(stream, position++) - 0.5);
    double move_y = 3 * (random_uniform(stream, position++) - 0.5);
    double radius = 0.8 + 0.8 * random_uniform(stream, position++);

    double x[MOST], y[MOST], left = 1e9, right = -1e9, top = 1e9, bottom = -1e9;
    int count = 0, stroke[MOST];
    const signed char *point = glyph_points[glyph];
    for (int strokes = 0; *point != END; count++, point += 2) {
        if (*point == PEN_UP) {
            strokes++;
            point++;
        }
        assert(count < MOST);
        stroke[count] = strokes;
        /* The two points of a corner stay together. */
        if (count > 0 && point[0] == point[-2] && point[1] == point[-1]) {
            x[count] = x[count - 1];
            y[count] = y[count - 1];
            continue;
        }
        double across = narrow * (point[0] - 50 + 7 * (random_uniform(stream, position) - 0.5));
        double down = point[1] - 50 + 7 * (random_uniform(stream, position + 1) - 0.5);
        position += 2;
        across -= slant * down;
        x[count] = across * cos(turn) - down * sin(turn);
        y[count] = across * sin(turn) + down * cos(turn);
        left = fmin(left, x[count]);
        right = fmax(right, x[count]);
        top = fmin(top, y[count]);
        bottom = fmax(bottom, y[count]);
    }
    double scale = tall / fmax(bottom - top, right - left);
    for (int i = 0; i < count; i++) {
        x[i] = (SIZE - 1) / 2.0 + move_x + scale * (x[i] - (left + right) / 2);
        y[i] = (SIZE - 1) / 2.0 + move_y + scale * (y[i] - (top + bottom) / 2);
    }

    memset(out, 0, SIZE * SIZE);
    Canvas canvas = { out, SIZE, 1, 0, 0, 0, SIZE, SIZE };
    for (int i = 0; i + 1 < count; i++) {
        if (stroke[i] != stroke[i + 1]) continue;
        /* A Catmull-Rom curve from point i to i+1 looks at the points before and after. */
        int before = i > 0 && stroke[i - 1] == stroke[i] ? i - 1 : i;
        int after = i + 2 < count && stroke[i + 2] == stroke[i] ? i + 2 : i + 1;
        double last_x = x[i], last_y = y[i];
        for (int piece = 1; piece <= PIECES; piece++) {
            double u = (double)piece / PIECES;
            double a = -u * (1 - u) * (1 - u) / 2, b = 1 + u * u * (1.5 * u - 2.5);
            double c = u * (0.5 + u * (2 - 1.5 * u)), d = u * u * (u - 1) / 2;
            double next_x = a * x[before] + b * x[i] + c * x[i + 1] + d * x[after];
            double next_y = a * y[before] + b * y[i] + c * y[i + 1] + d * y[after];
            draw_line(&canvas, last_x, last_y, next_x, next_y, radius, &white);
            last_x = next_x;
            last_y = next_y;
        }
    }
}

/* ---- data sets ---- */

int idx_parse(const Bytes *bytes, const char *name, Dataset *dataset, Error *error)
{
    char held[32], promised[32];
    uint32_t magic = bytes->size >= 4 ? big_endian_32(bytes->data) : 0x803;
    if (magic >> 8 == 8 && magic != 0x803) {
        return fail(error, "%s: magic number 0x%08x is that of IDX with %d dimension%s, expected 0x00000803 "
                    "(images)", name, (unsigned)magic, (int)(magic & 255), magic == 0x801 ? "" : "s");
    }
    if (magic != 0x803) {
        return fail(error, "%s: magic number 0x%08x is not that of IDX, expected 0x00000803 (images)", name,
                    (unsigned)magic);
    }
    if (bytes->size < 16) {
        return fail(error, "%s: holds %d bytes, expected an IDX header of 16", name, (int)bytes->size);
    }
    uint32_t count = big_endian_32(bytes->data + 4), height = big_endian_32(bytes->data + 8);
    uint32_t width = big_endian_32(bytes->data + 12);
    if (count == 0) return fail(error, "%s: holds no images", name);
    if (height == 0 || width == 0 || height > 32768 || width > 32768) {
        return fail(error, "%s: images of %s x %s pixels, expected 1 to 32,768 each way", name,
                    grouped(height, held), grouped(width, promised));
    }
    uint64_t expected = (uint64_t)count * height * width, size = bytes->size - 16;
    if (size != expected) {
        return fail(error, size < expected ? "%s: holds %s of the %s bytes its header promises"
                                           : "%s: holds %s bytes, more than the %s its header promises",
                    name, grouped(size, held), grouped(expected, promised));
    }
    dataset->count = count;
    dataset->height = (int)height;
    dataset->width = (int)width;
    dataset->channels = 1;
    dataset->pixels = allocate((size_t)expected, 1);
    memcpy(dataset->pixels, bytes->data + 16, (size_t)expected);
    return 0;
}

int cifar_parse(const Bytes *bytes, const char *name, Dataset *dataset, Error *error)
{
    enum { PLANE = 32 * 32, RECORD = 1 + 3 * PLANE };
    char held[32], index[32];
    if (bytes->size == 0 || bytes->size % RECORD != 0 || bytes->size / RECORD > UINT32_MAX) {
        return fail(error, "%s: holds %s bytes, expected a multiple of 3,073 (a label, 32 x 32 x 3 pixels)",
                    name, grouped(bytes->size, held));
    }
    uint32_t count = (uint32_t)(bytes->size / RECORD);
    for (uint32_t i = 0; i < count; i++) {
        int label = bytes->data[(size_t)i * RECORD];
        if (label > 9) {
            return fail(error, "%s: image %s has label %d, expected 0 to 9", name, grouped(i, index), label);
        }
    }
    dataset->count = count;
    dataset->height = 32;
    dataset->width = 32;
    dataset->channels = 3;
    dataset->pixels = allocate(count, 3 * PLANE);
    unsigned char *out = dataset->pixels;
    for (uint32_t i = 0; i < count; i++) {
        const unsigned char *planes = bytes->data + (size_t)i * RECORD + 1;
        for (int p = 0; p < PLANE; p++) {
            for (int c = 0; c < 3; c++) *out++ = planes[c * PLANE + p];
        }
    }
    return 0;
}

typedef int (*DatasetParser)(const Bytes *bytes, const char *name, Dataset *dataset, Error *error);

/* Read DIRECTORY/NAME or DIRECTORY/NAME.gz and append its images. Returns 0, -1 with error, or 1 when neither
 * is there. */
static int dataset_append(Dataset *dataset, const char *directory, const char *name, DatasetParser parse,
                          Error *error)
{
    char path[4096];
    for (int packed = 0; packed < 2; packed++) {
        size_t length = (size_t)snprintf(path, sizeof path, "%s/%s%s", directory, name, packed ? ".gz" : "");
        if (length >= sizeof path) return fail(error, "%s: %s", directory, strerror(ENAMETOOLONG));
        if (access(path, F_OK) == 0) break;
        if (errno != ENOENT) return fail(error, "%s: %s", path, strerror(errno));
        if (packed) return 1;
    }
    Bytes bytes;
    Dataset part = *dataset;
    if (file_read(path, &bytes, error)) return -1;
    int status = parse(&bytes, path, &part, error);
    free(bytes.data);
    if (status != 0) return -1;
    if (dataset->count > 0) {
        size_t image = (size_t)part.height * (size_t)part.width * (size_t)part.channels;
        unsigned char *pixels = allocate((size_t)dataset->count + part.count, image);
        memcpy(pixels, dataset->pixels, dataset->count * image);
        memcpy(pixels + dataset->count * image, part.pixels, part.count * image);
        part.count += dataset->count;
        free(part.pixels);
        free(dataset->pixels);
        part.pixels = pixels;
    }
    *dataset = part;
    return 0;
}

int dataset_open(Dataset *dataset, const char *where, Split split, uint64_t seed, Error *error)
{
    int is_train = split == SPLIT_TRAIN;
    *dataset = (Dataset){ is_train ? 60000 : 10000, 28, 28, 1, NULL, split, seed };
    if (strcmp(where, "digits") == 0) return 0;
    dataset->count = 0;
    const char *mnist = is_train ? "train-images-idx3-ubyte" : "t10k-images-idx3-ubyte";
    int status = dataset_append(dataset, where, mnist, idx_parse, error);
    int batches = status != 1 ? 0 : is_train ? 5 : 1;
    for (int batch = 1; batch <= batches && status >= 0; batch++) {
        char name[32] = "test_batch.bin";
        if (is_train) snprintf(name, sizeof name, "data_batch_%d.bin", batch);
        int found = dataset_append(dataset, where, name, cifar_parse, error);
        if (found != 1) status = found;
    }
    struct stat directory;
    if (status == 1 && stat(where, &directory) != 0) {
        fail(error, "%s: %s", where, strerror(errno));
    } else if (status == 1) {
        fail(error, "%s: holds neither %s (MNIST) nor %s (CIFAR-10), plain or with .gz", where, mnist,
             is_train ? "data_batch_1.bin to data_batch_5.bin" : "test_batch.bin");
    }
    if (status != 0) dataset_close(dataset);
    return status == 0 ? 0 : -1;
}

void dataset_close(Dataset *dataset)
{
    free(dataset->pixels);
    *dataset = (Dataset){ 0 };
}

void dataset_image(const Dataset *dataset, uint32_t index, unsigned char *out)
{
    assert(index < dataset->count);
    if (dataset->pixels == NULL) {
        digit_draw(dataset->seed, dataset->split, index, out);
        return;
    }
    size_t image = (size_t)dataset->height * (size_t)dataset->width * (size_t)dataset->channels;
    memcpy(out, dataset->pixels + index * image, image);
}

/* The Feistel network permutes 0..4^half-1, the smallest such range that holds `count` indices. A result
 * outside is put through it again: a walk that began inside comes back inside, and no two walks meet. */
uint32_t dataset_shuffle(uint64_t seed, uint32_t epoch, uint32_t position, uint32_t count)
{
    enum { ROUNDS = 6 };
    assert(position < count);
    int half = 1;
    while ((uint64_t)count > (uint64_t)1 << 2 * half) half++;
    uint32_t mask = ((uint32_t)1 << half) - 1;
    do {
        uint32_t left = position >> half, right = position & mask;
        for (uint32_t round = 0; round < ROUNDS; round++) {
            uint32_t mixed = random_bits(random_stream(seed, RANDOM_SHUFFLE, epoch, round), right);
            uint32_t swapped = left ^ (mixed & mask);
            left = right;
            right = swapped;
        }
        position = left << half | right;
    } while (position >= count);
    return position;
}

/* ---- safetensors: reading ---- */

/* Where the header is being read. This is not a parser of JSON but of what a safetensors header can be: an
 * object of objects with three known keys, and of one object of strings. Nothing recurses. */
typedef struct {
    unsigned char *start, *at, *end;
    const char *name;                 /* the file's, for messages */
    Error *error;
} Header;

static int header_fail(const Header *h, const char *what)
{
    return fail(h->error, "%s: header byte %ld: %s", h->name, (long)(h->at - h->start), what);
}

/* The next character that is not white space, 0 at the end. */
static int header_look(Header *h)
{
    while (h->at < h->end && (*h->at == ' ' || *h->at == '\t' || *h->at == '\n' || *h->at == '\r')) h->at++;
    return h->at < h->end ? *h->at : 0;
}

static int header_expect(Header *h, char character)
{
    char what[] = "expected ' '";
    what[10] = character;
    if (header_look(h) != character) return header_fail(h, what);
    h->at++;
    return 0;
}

/* After '{' or '[' and after each item: 1 when another item follows, 0 when `close` ended the list, or -1. */
static int header_next(Header *h, char close, int first)
{
    if (header_look(h) == close) {
        h->at++;
        return 0;
    }
    return first || header_expect(h, ',') == 0 ? 1 : -1;
}

/* The four digits of \uXXXX, or -1. */
static int32_t header_hexadecimal(Header *h)
{
    int32_t value = 0;
    for (int i = 0; i < 4; i++, h->at++) {
        static const char digits[] = "0123456789abcdef0123456789ABCDEF";
        const char *digit = h->at < h->end && *h->at != 0 ? strchr(digits, *h->at) : NULL;
        if (digit == NULL) return -1;
        value = value << 4 | (int32_t)((digit - digits) & 15);
    }
    return value;
}

/* A string, decoded where it stands: no escape is shorter than what it means, and the closing quote has room
 * for the 0 at the end. So names need no memory of their own. Returns NULL with error. */
static char *header_string(Header *h)
{
    static const char escapes[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    if (header_expect(h, '"')) return NULL;
    unsigned char *string = h->at, *out = string;
    while (h->at < h->end && *h->at != '"') {
        int32_t code = *h->at;
        if (code < 0x20) return header_fail(h, "control character in a string"), NULL;
        h->at++;
        if (code != '\\') {
            *out++ = (unsigned char)code;
            continue;
        }
        const char *known = h->at < h->end && *h->at != 0 ? strchr(escapes, *h->at) : NULL;
        if (known != NULL) {
            h->at++;
            *out++ = (unsigned char)meanings[known - escapes];
            continue;
        }
        if (h->at == h->end || *h->at++ != 'u') return header_fail(h, "unknown escape"), NULL;
        code = header_hexadecimal(h);
        if (code >= 0xd800 && code < 0xdc00 && h->end - h->at >= 2 && h->at[0] == '\\' && h->at[1] == 'u') {
            h->at += 2;
            int32_t low = header_hexadecimal(h);
            if (low >= 0xdc00 && low < 0xe000) code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
        }
        if (code <= 0 || (code >= 0xd800 && code < 0xe000)) return header_fail(h, "invalid \\u escape"), NULL;
        int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;      /* bytes to follow */
        static const unsigned char first[4] = { 0x00, 0xc0, 0xe0, 0xf0 };
        *out++ = (unsigned char)(first[more] | code >> 6 * more);
        while (more-- > 0) *out++ = (unsigned char)(0x80 | (code >> 6 * more & 0x3f));
    }
    if (h->at == h->end) return header_fail(h, "the string is not closed"), NULL;
    h->at++;
    *out = 0;
    return (char *)string;
}

static int header_integer(Header *h, uint64_t *value)
{
    int first = header_look(h);
    if (first < '0' || first > '9') return header_fail(h, "expected a whole number that is not negative");
    const unsigned char *start = h->at;
    for (*value = 0; h->at < h->end && *h->at >= '0' && *h->at <= '9'; h->at++) {
        if (*value > INT64_MAX / 10 - 1) return header_fail(h, "the number is too large");
        *value = *value * 10 + (uint64_t)(*h->at - '0');
    }
    return first == '0' && h->at - start > 1 ? header_fail(h, "the number begins with 0") : 0;
}

/* [1, 2, 3] with at most `most` numbers. Returns how many, or -1. */
static int header_integers(Header *h, uint64_t *values, int most)
{
    int count = 0, more;
    if (header_expect(h, '[')) return -1;
    while ((more = header_next(h, ']', count == 0)) > 0) {
        if (count == most) return header_fail(h, "more numbers than expected");
        if (header_integer(h, &values[count++])) return -1;
    }
    return more < 0 ? -1 : count;
}

/* The first three are those of ElementType, in its order; the rest are TYPE_OTHER. */
static const struct {
    char name[8];
    unsigned char size;
} element_types[] = {
    { "U8", 1 },  { "F32", 4 }, { "F64", 8 }, { "F16", 2 }, { "BF16", 2 }, { "I8", 1 },      { "I16", 2 },
    { "I32", 4 }, { "I64", 8 }, { "U16", 2 }, { "U32", 4 }, { "U64", 8 },  { "F8_E4M3", 1 }, { "F8_E5M2", 1 },
    { "BOOL", 1 },
};
enum { ELEMENT_TYPES = sizeof element_types / sizeof element_types[0] };

/* {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, whose data lie in data[size]. */
static int header_tensor(Header *h, TensorEntry *entry, const unsigned char *data, size_t size)
{
    uint64_t shape[8], offsets[2] = { 0, 0 };
    int kind = -1, rank = -1, offset_count = -1, more, first = 1;
    if (header_expect(h, '{')) return -1;
    for (; (more = header_next(h, '}', first)) > 0; first = 0) {
        char *key = header_string(h), *type;
        if (key == NULL || header_expect(h, ':')) return -1;
        if (strcmp(key, "dtype") == 0 && kind < 0) {
            if ((type = header_string(h)) == NULL) return -1;
            for (kind = 0; kind < ELEMENT_TYPES && strcmp(type, element_types[kind].name) != 0;) kind++;
            if (kind == ELEMENT_TYPES) return header_fail(h, "unknown dtype");
        } else if (strcmp(key, "shape") == 0 && rank < 0) {
            if ((rank = header_integers(h, shape, 8)) < 0) return -1;
        } else if (strcmp(key, "data_offsets") == 0 && offset_count < 0) {
            if ((offset_count = header_integers(h, offsets, 2)) < 0) return -1;
        } else {
            return header_fail(h, "expected each of dtype, shape and data_offsets once");
        }
    }
    if (more < 0) return -1;
    if (kind < 0 || rank < 0 || offset_count != 2) {
        return header_fail(h, "expected dtype, shape and two data_offsets before this");
    }
    size_t limit = SIZE_MAX / element_types[kind].size;
    entry->count = 1;
    entry->rank = rank;
    entry->type = kind < TYPE_OTHER ? (ElementType)kind : TYPE_OTHER;
    for (int i = 0; i < rank; i++) {
        if (shape[i] != 0 && entry->count > limit / shape[i]) return header_fail(h, "the shape is too large");
        entry->count *= (size_t)shape[i];
        entry->shape[i] = (int64_t)shape[i];
    }
    entry->size = entry->count * element_types[kind].size;
    if (offsets[0] > offsets[1] || offsets[1] > size) return header_fail(h, "data_offsets leave the file");
    if (offsets[1] - offsets[0] != entry->size) return header_fail(h, "data_offsets do not fit the shape");
    entry->data = data + offsets[0];
    return 0;
}

/* Room for one more item in an array of `count` items, which has room for the next power of two. */
static void *array_grow(void *array, int count, size_t size)
{
    if ((count & (count - 1)) != 0) return array;
    void *grown = allocate(count == 0 ? 1 : 2 * (size_t)count, size);
    if (count > 0) memcpy(grown, array, (size_t)count * size);
    free(array);
    return grown;
}

/* Tensors and pairs of metadata both begin with their name, so that one comparison serves both. */
static int compare_names(const void *left, const void *right)
{
    return strcmp(*(char *const *)left, *(char *const *)right);
}

static int compare_places(const void *left, const void *right)
{
    const TensorEntry *a = left, *b = right;
    if (a->data != b->data) return a->data < b->data ? -1 : 1;
    return (a->size > b->size) - (a->size < b->size);
}

/* Sort items by name, to find them later by halving. Returns a name that is there twice, or NULL. */
static const char *sort_names(void *items, int count, size_t size)
{
    if (count > 0) qsort(items, (size_t)count, size, compare_names);
    for (int i = 1; i < count; i++) {
        char *item = (char *)items + (size_t)i * size;
        if (compare_names(item - size, item) == 0) return *(char **)item;
    }
    return NULL;
}

static int header_metadata(Header *h, TensorFile *file)
{
    int more, first = 1;
    if (file->metadata != NULL) return header_fail(h, "a second __metadata__");
    file->metadata = allocate(2, sizeof *file->metadata);
    if (header_expect(h, '{')) return -1;
    for (; (more = header_next(h, '}', first)) > 0; first = 0) {
        file->metadata = array_grow(file->metadata, file->metadata_count, 2 * sizeof *file->metadata);
        char **pair = file->metadata + 2 * file->metadata_count;
        if ((pair[0] = header_string(h)) == NULL || header_expect(h, ':')) return -1;
        if ((pair[1] = header_string(h)) == NULL) return -1;
        file->metadata_count++;
    }
    return more;
}

/* The whole header; the data that follow it are data[size]. */
static int header_parse(Header *h, TensorFile *file, const unsigned char *data, size_t size)
{
    int more, first = 1;
    if (header_expect(h, '{')) return -1;
    for (; (more = header_next(h, '}', first)) > 0; first = 0) {
        char *name = header_string(h);
        if (name == NULL || header_expect(h, ':')) return -1;
        if (strcmp(name, "__metadata__") == 0) {
            if (header_metadata(h, file)) return -1;
            continue;
        }
        /* Names are printed in messages: they must not be able to command the terminal. */
        for (const char *c = name; *c != '\0'; c++) {
            if ((unsigned char)*c < 0x20 || *c == 0x7f) return header_fail(h, "control character in a name");
        }
        file->tensors = array_grow(file->tensors, file->tensor_count, sizeof *file->tensors);
        TensorEntry *entry = &file->tensors[file->tensor_count];
        *entry = (TensorEntry){ .name = name };
        if (header_tensor(h, entry, data, size)) return -1;
        file->tensor_count++;
    }
    if (more < 0) return -1;
    if (header_look(h) != 0 || h->at < h->end) return header_fail(h, "expected only spaces after the header");

    if (file->tensor_count > 0) {
        qsort(file->tensors, (size_t)file->tensor_count, sizeof *file->tensors, compare_places);
    }
    const unsigned char *covered = data;
    for (int i = 0; i < file->tensor_count; i++) {
        const TensorEntry *entry = &file->tensors[i];
        if (entry->data != covered) {
            return fail(h->error, "%s: tensor %s: its data %s", h->name, entry->name,
                        entry->data < covered ? "overlap those of another" : "leave a gap before them");
        }
        covered += entry->size;
    }
    char rest[32];
    if (covered != data + size) {
        return fail(h->error, "%s: %s bytes at its end belong to no tensor", h->name,
                    grouped((uint64_t)(data + size - covered), rest));
    }
    if (sort_names(file->metadata, file->metadata_count, 2 * sizeof *file->metadata) != NULL) {
        return fail(h->error, "%s: a key of __metadata__ is there twice", h->name);
    }
    const char *twice = sort_names(file->tensors, file->tensor_count, sizeof *file->tensors);
    return twice == NULL ? 0 : fail(h->error, "%s: the name %.200s is there twice", h->name, twice);
}

/* tensors_parse but for freeing what there is after a failure. */
static int file_parse(TensorFile *file, const char *name, Error *error)
{
    enum { LONGEST = 100000000 };     /* the limit of the format's own implementation */
    char held[32], promised[32];
    size_t size = file->bytes.size;
    uint64_t length = 0;
    if (size < 8) return fail(error, "%s: holds %d bytes, expected a safetensors file", name, (int)size);
    for (int i = 0; i < 8; i++) length |= (uint64_t)file->bytes.data[i] << 8 * i;
    if (length > LONGEST) {
        return fail(error, "%s: a header of %s bytes, expected at most 100,000,000 (safetensors)", name,
                    grouped(length, promised));
    }
    if (length > size - 8) {
        return fail(error, "%s: holds %s of the %s bytes of its header", name, grouped(size - 8, held),
                    grouped(length, promised));
    }
    unsigned char *start = file->bytes.data + 8, *end = start + length;
    Header header = { start, start, end, name, error };
    return header_parse(&header, file, end, size - 8 - (size_t)length);
}

int tensors_parse(Bytes bytes, const char *name, TensorFile *file, Error *error)
{
    *file = (TensorFile){ .bytes = bytes };
    if (file_parse(file, name, error) == 0) return 0;
    tensors_free(file);
    return -1;
}

int tensors_read(const char *path, TensorFile *file, Error *error)
{
    Bytes bytes;
    /* Not file_read: the length of a header could look like the magic number of gzip. */
    if (file_bytes(path, &bytes, error)) return -1;
    return tensors_parse(bytes, path, file, error);
}

void tensors_free(TensorFile *file)
{
    free(file->bytes.data);
    free(file->tensors);
    free(file->metadata);
    *file = (TensorFile){ .tensors = NULL };
}

const TensorEntry *tensors_find(const TensorFile *file, const char *name)
{
    if (file->tensor_count == 0) return NULL;
    return bsearch(&name, file->tensors, (size_t)file->tensor_count, sizeof *file->tensors, compare_names);
}

const char *tensors_metadata(const TensorFile *file, const char *key)
{
    if (file->metadata_count == 0) return NULL;
    size_t size = 2 * sizeof *file->metadata;
    char **pair = bsearch(&key, file->metadata, (size_t)file->metadata_count, size, compare_names);
    return pair == NULL ? NULL : pair[1];
}

/* [28, 28, 1] for messages. Returns `text`. */
static const char *shape_text(int rank, const int64_t *shape, char text[192])
{
    char *at = text;
    for (int i = 0; i < rank; i++) at += sprintf(at, "%s%" PRId64, i > 0 ? ", " : "[", shape[i]);
    strcpy(at, rank > 0 ? "]" : "[]");
    return text;
}

int tensors_copy(const TensorEntry *entry, const char *path, int rank, const int64_t *shape, real *out,
                 Error *error)
{
    char found[192], expected[192], index[32];
    if (entry->type != TYPE_F32 && entry->type != TYPE_F64) {
        return fail(error, "%s: tensor %s is not of type F32 or F64", path, entry->name);
    }
    int same = rank == entry->rank;
    for (int i = 0; same && i < rank; i++) same = shape[i] == entry->shape[i];
    if (!same) {
        return fail(error, "%s: tensor %s is %s, expected %s", path, entry->name,
                    shape_text(entry->rank, entry->shape, found), shape_text(rank, shape, expected));
    }
    for (size_t i = 0; i < entry->count; i++) {
        size_t size = entry->type == TYPE_F32 ? 4 : 8;
        uint64_t bits = 0;
        for (size_t b = 0; b < size; b++) bits |= (uint64_t)entry->data[i * size + b] << 8 * b;
        uint32_t low_bits = (uint32_t)bits;
        float single;
        double value;
        memcpy(&single, &low_bits, 4);
        memcpy(&value, &bits, 8);
        out[i] = size == 4 ? (real)single : (real)value;
        if (!isfinite(out[i])) {
            return fail(error, "%s: tensor %s: value %s is not a finite number", path, entry->name,
                        grouped(i, index));
        }
    }
    return 0;
}

/* ---- safetensors: writing ---- */

static void put_string(FILE *stream, const char *text)
{
    putc('"', stream);
    for (; *text != '\0'; text++) {
        if ((unsigned char)*text < 0x20) fprintf(stream, "\\u%04x", (unsigned)*text);
        else if (*text == '"' || *text == '\\') fprintf(stream, "\\%c", *text);
        else putc(*text, stream);
    }
    putc('"', stream);
}

static size_t tensor_count(const TensorOut *tensor)
{
    size_t count = 1;
    for (int i = 0; i < tensor->rank; i++) count *= (size_t)tensor->shape[i];
    return count;
}

/* The header as text, padded with spaces so that the data begin at a multiple of 8. */
static void put_header(FILE *stream, const TensorOut *tensors, int tensor_total, const char *const *metadata,
                       int metadata_count)
{
    size_t offset = 0;
    fputs("{\"__metadata__\":{", stream);
    for (int i = 0; i < metadata_count; i++) {
        if (i > 0) putc(',', stream);
        put_string(stream, metadata[2 * i]);
        putc(':', stream);
        put_string(stream, metadata[2 * i + 1]);
    }
    putc('}', stream);
    for (int i = 0; i < tensor_total; i++) {
        const TensorOut *tensor = &tensors[i];
        assert(tensor->type != TYPE_OTHER && tensor->rank >= 0 && tensor->rank <= 8);
        putc(',', stream);
        put_string(stream, tensor->name);
        fprintf(stream, ":{\"dtype\":\"%s\",\"shape\":[", element_types[tensor->type].name);
        for (int d = 0; d < tensor->rank; d++) fprintf(stream, "%s%" PRId64, d ? "," : "", tensor->shape[d]);
        size_t end = offset + tensor_count(tensor) * element_types[tensor->type].size;
        fprintf(stream, "],\"data_offsets\":[%zu,%zu]}", offset, end);
        offset = end;
    }
    putc('}', stream);
    while (ftell(stream) % 8 != 0) putc(' ', stream);
}

typedef struct {
    const TensorOut *tensors;
    int tensor_count;
    Bytes header;
} TensorWriting;

/* Write count numbers of `size` bytes in little-endian order, whatever this machine's is. */
static int put_little_endian(FILE *stream, const unsigned char *data, size_t count, size_t size)
{
    unsigned char buffer[4096];
    size_t filled = 0;
    for (size_t i = 0; i < count; i++, data += size) {
        uint32_t half = 0;
        uint64_t bits = *data;
        if (size == 4) memcpy(&half, data, 4);
        if (size == 4) bits = half;
        if (size == 8) memcpy(&bits, data, 8);
        for (size_t b = 0; b < size; b++) buffer[filled++] = (unsigned char)(bits >> 8 * b);
        if (filled < sizeof buffer && i + 1 < count) continue;
        if (fwrite(buffer, 1, filled, stream) != filled) return -1;
        filled = 0;
    }
    return 0;
}

static int write_tensors(void *stream, const void *context)
{
    const TensorWriting *writing = context;
    uint64_t length = writing->header.size;
    unsigned char prefix[8];
    for (int i = 0; i < 8; i++) prefix[i] = (unsigned char)(length >> 8 * i);
    if (fwrite(prefix, 1, 8, stream) != 8 || write_bytes(stream, &writing->header)) return -1;
    for (int i = 0; i < writing->tensor_count; i++) {
        const TensorOut *tensor = &writing->tensors[i];
        size_t size = element_types[tensor->type].size;
        if (put_little_endian(stream, tensor->data, tensor_count(tensor), size)) return -1;
    }
    return 0;
}

int tensors_write(const char *path, const TensorOut *tensors, int tensor_total, const char *const *metadata,
                  int metadata_count, Error *error)
{
    char *text = NULL;
    size_t size = 0;
    FILE *stream = open_memstream(&text, &size);
    if (stream == NULL) return fail(error, "%s: %s", path, strerror(errno));
    put_header(stream, tensors, tensor_total, metadata, metadata_count);
    int status = ferror(stream);
    if (fclose(stream) != 0) status = -1;
    TensorWriting writing = { tensors, tensor_total, { (unsigned char *)text, size } };
    if (status != 0) fail(error, "%s: %s", path, strerror(ENOMEM));
    else status = file_replace(path, write_tensors, &writing, error);
    free(text);
    return status == 0 ? 0 : -1;
}
