/* test_data.c - tests of data.c: what is written can be read, what is broken is refused with the right words.
 *
 * With MNIST_DIR set in the environment the real MNIST is read from there as well. With FUZZ_SEEDS set, small
 * files that are parsed here are left in that directory, by kind, for fuzzers to begin with. */

#define _POSIX_C_SOURCE 200809L
#define _XOPEN_SOURCE 700

#include "test.h"

#include <dirent.h>
#include <errno.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static char directory[64] = "/tmp/test_data.XXXXXX";   /* where the test runs */
static Error error;   /* of the last call that failed */

enum { RECORD = 3073 };   /* bytes of an image of CIFAR-10 */

static Bytes read_file(const char *name) {
    FILE *stream = fopen(name, "rb");
    CHECK(stream != NULL, "cannot read %s", name);
    Bytes bytes = { calloc(1, 1 << 20), 0 };
    if (stream != NULL) {
        bytes.size = fread(bytes.data, 1, 1 << 20, stream);
        fclose(stream);
    }
    return bytes;
}

static int is_equal(Bytes bytes, const void *expected, size_t size) {
    return bytes.size == size && memcmp(bytes.data, expected, size) == 0;
}

/* The file begins with this text, and `data` end it. */
static void check_file(const char *name, const char *text, const void *data, size_t size) {
    Bytes file = read_file(name);
    const size_t length = strlen(text);
    CHECK(file.size == length + size && memcmp(file.data, text, length) == 0
          && memcmp(file.data + length, data, size) == 0, "%s holds something else", name);
    free(file.data);
}

/* Set the limit on memory; returns the one before. */
static rlim_t limit_memory(rlim_t value) {
    struct rlimit limit;
    getrlimit(RLIMIT_AS, &limit);
    const rlim_t before = limit.rlim_cur;
    limit.rlim_cur = value;
    setrlimit(RLIMIT_AS, &limit);
    return before;
}

static int files_in_directory(void) {
    int count = 0;
    DIR *stream = opendir(directory);
    while (stream != NULL && readdir(stream) != NULL) count++;
    if (stream != NULL) closedir(stream);
    return count - 2;
}

#define CHECK_MESSAGE(fragment) \
    CHECK(strstr(error.text, fragment) != NULL, "expected \"%s\" in \"%s\"", fragment, error.text) 
/* The call must fail with this in its message. */
#define REFUSED(call, fragment) \
    do { \
        CHECK((call) != 0, "accepted: %s", fragment); \
        CHECK_MESSAGE(fragment); \
    } while (0)

#define ACCEPTED(call) CHECK((call) == 0, "%s", error.text)

/* A copy on the heap of exactly this size, so that a sanitizer sees every read beyond its end. */
static Bytes copy_of(const void *data, size_t size) {
    Bytes bytes = { malloc(size > 0 ? size : 1), size };
    if (size > 0) memcpy(bytes.data, data, size);
    return bytes;
}

/* Leave a file for the fuzzer of its kind. */
static void leave_seed(const char *kind, const void *data, size_t size) {
    static int number;
    const char *where = getenv("FUZZ_SEEDS");
    char path[512];
    if (where == NULL) return;
    snprintf(path, sizeof path, "%s/%s/%d", where, kind, number++);
    write_file(path, data, size);
}

/* ---- gzip ---- */

/* Made with zlib: a stored block; a fixed block behind a header with every field; a dynamic block. */
static const unsigned char gzip_stored[65] =
    "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\x01\x2a\x00\xd5\xff\x44\x69\x66\x66\x45\x6e\x63\x20\x44\x69\x66"
    "\x66\x45\x6e\x63\x20\x44\x69\x66\x66\x45\x6e\x63\x2c\x20\x61\x20\x6c\x65\x61\x72\x6e\x65\x64\x20\x65\x6e"
    "\x63\x6f\x64\x65\x72\x55\x29\xed\x34\x2a\x00\x00\x00";
static const unsigned char gzip_fixed[71] =
    "\x1f\x8b\x08\x1e\x00\x00\x00\x00\x00\x03\x05\x00\x65\x78\x74\x72\x61\x6e\x61\x6d\x65\x00\x63\x6f\x6d\x6d"
    "\x65\x6e\x74\x00\x03\xa5\x73\xc9\x4c\x4b\x73\xcd\x4b\x56\x70\x41\xa5\x75\x14\x12\x15\x72\x52\x13\x8b\xf2"
    "\x52\x53\x14\x52\xf3\x92\xf3\x53\x52\x8b\x00\x55\x29\xed\x34\x2a\x00\x00\x00";
static const unsigned char gzip_dynamic[255] =
    "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\x35\xd1\xd9\x0a\xc4\x20\x10\x44\xd1\x6f\x8d\xe3\x12\x6d\xdb\x3d"
    "\xe4\xf7\xc7\x4b\xf0\xb1\xa8\xf2\x40\xe3\x65\x5c\xb2\x55\x44\x6d\x71\xe6\x32\x92\xac\xca\x54\x9b\x5c\xbe"
    "\x76\xe3\x74\x37\x21\xed\x26\xec\x99\x8e\x3d\x4b\xc5\xd0\xec\x99\xd4\x3d\x33\x8e\x30\x01\x06\x40\xa5\xc9"
    "\x00\x8e\x59\x04\x10\x00\xf9\xde\xec\x26\x00\x14\xc2\x04\x88\x00\x2f\x8d\x00\xdc\xcc\x1a\x40\x04\xd0\xef"
    "\xcd\x6e\x2c\x40\x25\x08\xc0\x00\x78\x69\x0c\x40\x63\x56\x01\x32\xc0\xfa\xde\xec\xc6\x03\xdc\x84\x1b\x60"
    "\x02\x54\x1a\x01\x68\xcc\x3c\xc0\x02\x98\xee\x1c\xa7\x00\x9e\x90\x00\x32\x40\xa6\xc9\x00\x37\xb3\x0a\xb0"
    "\x00\x92\x39\xc7\x65\x80\x48\xe8\x00\x09\xa0\xd0\x38\x00\xc7\xac\x01\x64\x80\x69\xcf\x71\x3f\x80\x4e\x68"
    "\x00\x0a\xf0\xd0\xfc\x00\x02\xb3\x08\x10\x01\x96\x9c\xe3\x32\x40\x27\x04\x80\x07\x60\xd1\x78\x80\xc2\x2c"
    "\x00\x08\x80\xa6\x73\x9c\x02\x44\x42\x03\x78\x00\x84\xa6\x00\x28\xb3\x04\x30\x00\xe4\xfc\xb6\x7a\x00\x4f"
    "\xe8\x00\x0a\xb0\x68\x0a\x80\x65\x36\x00\x3a\xc0\x1f\x50\xcb\x0a\x3c\x58\x02\x00\x00";
static const char short_text[] = "DiffEnc DiffEnc DiffEnc, a learned encoder";
enum { SHORT = sizeof short_text - 1, LONG = 600 };

static void long_text(unsigned char *text) {
    for (int i = 0; i < LONG; i++) text[i] = (unsigned char)(97 + i * i % 13 + (i % 5 == 0 ? i * 7 % 11 : 0));
}

static void check_inflate(const unsigned char *data, size_t size, const void *expected,
                          size_t expected_size) {
    Bytes out;
    int status = gzip_inflate(data, size, "x.gz", SIZE_MAX, &out, &error);
    ACCEPTED(status);
    if (status != 0) return;
    CHECK(is_equal(out, expected, expected_size), "wrong content");
    free(out.data);
    leave_seed("gzip", data, size);

    /* Every truncation is refused, and every changed bit is refused or changes nothing that matters. */
    for (size_t length = 0; length < size; length++) {
        Bytes cut = copy_of(data, length);
        CHECK(gzip_inflate(cut.data, cut.size, "x.gz", SIZE_MAX, &out, &error) != 0, "cut at %zu", length);
        CHECK(out.data == NULL && out.size == 0, "something is left");
        free(cut.data);
    }
    for (size_t bit = 0; bit < 8 * size; bit++) {
        Bytes changed = copy_of(data, size);
        changed.data[bit / 8] ^= (unsigned char)(1 << bit % 8);
        if (gzip_inflate(changed.data, changed.size, "x.gz", SIZE_MAX, &out, &error) == 0) {
            CHECK(is_equal(out, expected, expected_size), "bit %zu", bit);
            free(out.data);
        }
        free(changed.data);
    }
}

/* A deflate stream written bit by bit, lowest bit first, behind a plain gzip header. */
typedef struct { unsigned char data[256]; size_t bits; } BitStream;

static void put_bits(BitStream *stream, unsigned value, int count) {
    for (int i = 0; i < count; i++, stream->bits++)
        stream->data[stream->bits / 8] |= (unsigned char)((value >> i & 1) << stream->bits % 8);
}

static BitStream begin_bits(void) { return (BitStream){ { 0x1f, 0x8b, 8 }, 80 }; }

/* Streams that must be refused, as pairs of a value and its number of bits. */
#define FIXED { 1 | 1 << 1, 3 }
#define DYNAMIC { 1 | 2 << 1, 3 }
/* The head of a dynamic block of 258 + 1 codes, whose lengths are coded by 18 codes of three symbols, 0, 1
 * and 18 (many zeros), of one, two and two bits. The order is 16 17 18 0 8 ... 14 1. */
#define DYNAMIC_259 DYNAMIC, { 1 | 14 << 10, 14 }, { 2 << 6 | 1 << 9, 27 }, { 0, 24 }, { 2, 3 }
#define ZEROS(n) { 3 | ((n) - 11) << 2, 9 }

typedef struct { const char *message; struct { unsigned value; int count; } bits[16]; } Broken;

static const Broken broken[] = {
    { "block of unknown type", { { 1 | 3 << 1, 3 } } },
    /* 'a' reversed, length 3, distance 2, with one byte there; distance symbol 30; length symbol 286 */
    { "distance that is too far back", { FIXED, { 0x89, 8 }, { 0x40, 7 }, { 0x10, 5 } } },
    { "invalid distance", { FIXED, { 0x89, 8 }, { 0x40, 7 }, { 0x0f, 5 } } },
    { "invalid length", { FIXED, { 0x63, 8 } } },
    { "stored block of two lengths", { { 1, 8 }, { 0x1234, 16 } } },
    { "more codes than there are symbols", { DYNAMIC, { 30, 5 } } },
    { "over-subscribed code", { DYNAMIC, { 0, 14 }, { 01111, 12 } } },
    { "incomplete code", { DYNAMIC, { 0, 14 }, { 1, 3 } } },
    { "repeats a code length before the first", { DYNAMIC, { 0, 14 }, { 011, 6 }, { 0, 6 } } },
    { "more code lengths than codes", { DYNAMIC_259, ZEROS(138), ZEROS(138) } },
    { "no code for the end of a block", { DYNAMIC_259, ZEROS(138), ZEROS(121) } },
    /* literal 255, end of block, length 3 */
    { "over-subscribed code", { DYNAMIC_259, ZEROS(138), ZEROS(117), { 1, 2 }, { 1, 2 }, { 1, 2 } } },
    /* end of block, length 3, which comes, but the one distance has no code */
    { "invalid code", { DYNAMIC_259, ZEROS(138), ZEROS(118), { 1, 2 }, { 1, 2 }, { 0, 1 }, { 1, 1 } } },
    /* A legal one, for a single distance code may be of one bit: 'a', end of block, distance 1; 'a', end. */
    { NULL, { DYNAMIC_259, ZEROS(97), { 1, 2 }, ZEROS(138), ZEROS(20), { 1, 2 }, { 0, 1 }, { 1, 2 },
              { 0, 1 }, { 1, 1 } } },
};

static void test_gzip(void) {
    unsigned char text[LONG], members[sizeof gzip_stored + sizeof gzip_dynamic + 1], both[SHORT + LONG];
    Bytes out;
    long_text(text);
    check_inflate(gzip_stored, sizeof gzip_stored, short_text, SHORT);
    check_inflate(gzip_fixed, sizeof gzip_fixed, short_text, SHORT);
    check_inflate(gzip_dynamic, sizeof gzip_dynamic, text, LONG);
    memcpy(members, gzip_fixed, sizeof gzip_fixed);
    members[12] ^= 1;                                    /* the header's extra field */
    REFUSED(gzip_inflate(members, sizeof gzip_fixed, "x.gz", SIZE_MAX, &out, &error),
            "x.gz: has a header of a wrong CRC");

    size_t size = sizeof gzip_stored + sizeof gzip_dynamic;
    memcpy(members, gzip_stored, sizeof gzip_stored);
    memcpy(members + sizeof gzip_stored, gzip_dynamic, sizeof gzip_dynamic);
    memcpy(both, short_text, SHORT);
    memcpy(both + SHORT, text, LONG);
    ACCEPTED(gzip_inflate(members, size, "x.gz", SIZE_MAX, &out, &error));
    CHECK(is_equal(out, both, sizeof both), "two members");
    free(out.data);
    leave_seed("gzip", members, size);
    members[size] = 1;
    REFUSED(gzip_inflate(members, size + 1, "x.gz", SIZE_MAX, &out, &error),
            "x.gz: has trailing garbage (gzip byte");
    REFUSED(gzip_inflate((const unsigned char *)"hello, world", 12, "x.gz", SIZE_MAX, &out, &error),
            "is not gzip");
    REFUSED(gzip_inflate(NULL, 0, "x.gz", SIZE_MAX, &out, &error), "x.gz: is empty");

    for (size_t i = 0; i < sizeof broken / sizeof broken[0]; i++) {
        BitStream stream = begin_bits();
        for (int k = 0; k < 16; k++) put_bits(&stream, broken[i].bits[k].value, broken[i].bits[k].count);
        size = (stream.bits + 7) / 8;
        memcpy(stream.data + size, "\x43\xbe\xb7\xe8\1\0\0\0", 8);
        const size_t given = broken[i].message ? sizeof stream.data : size + 8;
        int status = gzip_inflate(stream.data, given, "x.gz", SIZE_MAX, &out, &error);
        CHECK((status != 0) == (broken[i].message != NULL), "%d: %s", (int)i, error.text);
        if (status != 0 && broken[i].message != NULL) CHECK_MESSAGE(broken[i].message);
        if (status == 0) CHECK(is_equal(out, "a", 1), "wrong content");
        free(out.data);
        leave_seed("gzip", stream.data, size + 8);
    }

    /* `most` bytes, without a look at the rest; and an end of zeros, but of nothing else. */
    ACCEPTED(gzip_inflate(gzip_dynamic, 200, "x.gz", 100, &out, &error));
    CHECK(is_equal(out, text, 100), "the first 100 bytes");
    free(out.data);
    for (int end = 0; end < 2; end++) {
        unsigned char padded[sizeof gzip_stored + 500] = { 0 };
        memcpy(padded, gzip_stored, sizeof gzip_stored);
        padded[sizeof padded - 1] = (unsigned char)end;
        int status = gzip_inflate(padded, sizeof padded, "x.gz", SIZE_MAX, &out, &error);
        CHECK((status == 0) == (end == 0), "zeros, then %d: %s", end, status ? error.text : "accepted");
        CHECK(status != 0 || is_equal(out, short_text, SHORT), "content");
        free(out.data);
    }
}

/* ---- files ---- */

/* A stream without an end: a zero, then 258 more and 258 more for 13 bits each; its bytes repeat after 13. */
static void make_bomb(unsigned char *bomb, int size) {
    BitStream stream = begin_bits();
    put_bits(&stream, 1 | 1 << 1, 3);
    put_bits(&stream, 0x0c, 8);
    for (int i = 0; i < 16; i++) put_bits(&stream, 0xa3, 13);
    memcpy(bomb, stream.data, 26);
    for (int i = 26; i < size; i++) bomb[i] = bomb[i - 13];
}

/* A file that needs more memory than there is, is refused like any other. */
static void test_out_of_memory(void) {
    enum { BOMB = 1 << 19, HELD = 64000000, LIMIT = 85000000 };
    static unsigned char bomb[BOMB];
    TensorFile file;
    Dataset dataset = { 0 };
    Bytes out, bytes;
    if (SANITIZED) {
        printf("skipped: out of memory (a sanitizer needs more than any limit leaves)\n");
        return;
    }
    bytes = (Bytes){ calloc(1, 16 + HELD), 16 + HELD };
    write_file("large", "", 0);
    CHECK(truncate("large", 2 * LIMIT) == 0, "cannot make a large file");
    make_bomb(bomb, BOMB);
    const rlim_t before = limit_memory(LIMIT);
    REFUSED(tensors_read("large", &file, &error), "large: out of memory, needs ");
    REFUSED(gzip_inflate(bomb, sizeof bomb, "x.gz", SIZE_MAX, &out, &error), "x.gz: out of memory, needs");
    CHECK(out.data == NULL && out.size == 0, "something is left");
    memset(bytes.data, 0, 16);
    bytes.size = 10000 * RECORD;
    REFUSED(cifar_parse(&bytes, "x.bin", &dataset, &error), "x.bin: out of memory, needs 30720000 bytes");
    CHECK(dataset.pixels == NULL && dataset.count == 0, "something is left");
    limit_memory(before);
    free(bytes.data);
}

static int write_new(FILE *stream, const void *context) {
    (void)context;
    for (int i = 0; i < 100000; i++)
        if (fputs("new ", stream) < 0) return -1;
    return 0;
}

static void test_file_replace(void) {
    write_file("kept", "old", 3);
    int files = files_in_directory();
    REFUSED(file_replace("no/such/place", write_new, NULL, &error), "no/such/place: No such file");
    CHECK(file_replace(directory, write_new, NULL, &error) != 0, "a directory is replaced");
    REFUSED(file_replace("/dev/null", write_new, NULL, &error), "/dev/null: is not a regular file");

    /* A link stays, what it points to is replaced, where it is; a link to nothing is refused. */
    struct stat status;
    CHECK(mkdir("behind", 0777) == 0, "cannot make a directory");
    write_file("behind/target", "old", 3);
    CHECK(symlink("behind/target", "link") == 0, "no link");
    CHECK(symlink("none", "dangling") == 0, "no link");
    ACCEPTED(file_replace("link", write_new, NULL, &error));
    CHECK(lstat("link", &status) == 0 && S_ISLNK(status.st_mode), "the link is replaced");
    CHECK(stat("behind/target", &status) == 0 && status.st_size == 400000, "the target is not replaced");
    REFUSED(file_replace("dangling", write_new, NULL, &error), "dangling: No such file or directory");
    unlink("behind/target"), rmdir("behind"), unlink("link"), unlink("dangling");
    CHECK(files_in_directory() == files, "a temporary file is left");

    /* What is no file is refused at once: a FIFO would wait, /dev/zero would never end. */
    TensorFile file;
    CHECK(mkfifo("fifo", 0600) == 0, "no FIFO");
    alarm(60);
    REFUSED(tensors_read("fifo", &file, &error), "fifo: is a device or a pipe, expected a file");
    REFUSED(tensors_read("/dev/zero", &file, &error), "/dev/zero: is a device or a pipe, expected a file");
    REFUSED(tensors_read(directory, &file, &error), ": is a directory, expected a file");
    alarm(0);
    unlink("fifo");

    char stale[32];
    snprintf(stale, sizeof stale, "kept.tmp.%ld", (long)getpid());
    write_file(stale, "left by a crash", 15);
    ACCEPTED(file_replace("kept", write_new, NULL, &error));
    Bytes bytes = read_file("kept");
    CHECK(bytes.size == 400000 && memcmp(bytes.data, "new new ", 8) == 0, "the new file is not there");
    free(bytes.data);
    CHECK(files_in_directory() == files, "a temporary file is left");
}

/* ---- images ---- */

static uint32_t big_endian(const unsigned char *data) {
    return (uint32_t)data[0] << 24 | (uint32_t)data[1] << 16 | (uint32_t)data[2] << 8 | data[3];
}

/* CRC-32 one bit at a time, as the PNG specification defines it. */
static uint32_t crc_of(const unsigned char *data, size_t size) {
    uint32_t crc = 0xffffffff;
    for (size_t i = 0; i < 8 * size; i++) {
        uint32_t bit = (crc ^ (uint32_t)(data[i / 8] >> i % 8)) & 1;
        crc = crc >> 1 ^ (bit ? 0xedb88320 : 0);
    }
    return ~crc;
}

/* The next chunk of a PNG must be of this type. Returns its data, and its length. */
static const unsigned char *next_chunk(const Bytes *file, size_t *at, const char *type, size_t *length) {
    const unsigned char *chunk = file->data + *at;
    *length = file->size - *at >= 12 ? big_endian(chunk) : SIZE_MAX;
    if (*length > file->size - *at - 12 || memcmp(chunk + 4, type, 4) != 0) {
        CHECK(0, "no chunk %s", type);
        exit(test_report());
    }
    CHECK(big_endian(chunk + 8 + *length) == crc_of(chunk + 4, *length + 4), "CRC of %s", type);
    *at += *length + 12;
    return chunk + 8;
}

/* A zlib stream must hold this: it is read as gzip with the check sums of what is expected. */
static void check_zlib(const unsigned char *data, size_t size, const unsigned char *expected, size_t length) {
    uint32_t low = 1, high = 0, crc = crc_of(expected, length);
    unsigned char *member = calloc(1, size + 12);
    Bytes out;
    memcpy(member, "\x1f\x8b\x08\0\0\0\0\0\0", 10);
    memcpy(member + 10, data + 2, size - 6);
    for (int b = 0; b < 4; b++) {
        member[size + 4 + (size_t)b] = (unsigned char)(crc >> 8 * b);
        member[size + 8 + (size_t)b] = (unsigned char)((uint32_t)length >> 8 * b);
    }
    for (size_t i = 0; i < length; i++) {
        low = (low + expected[i]) % 65521;
        high = (high + low) % 65521;
    }
    CHECK((data[0] * 256 + data[1]) % 31 == 0 && (data[0] & 15) == 8, "zlib header");
    CHECK(big_endian(data + size - 4) == (high << 16 | low), "Adler-32");
    ACCEPTED(gzip_inflate(member, size + 12, "zlib", SIZE_MAX, &out, &error));
    CHECK(is_equal(out, expected, length), "other pixels");
    free(out.data), free(member);
}

/* Write a PNG, animated if there is a delay, and compare its pixels. Returns the size of the file. */
static size_t check_png(const char *name, Pictures p, int delay) {
    ACCEPTED(pictures_write(name, p, delay, &error));
    Bytes file = read_file(name);
    const int height = p.height, width = p.width;
    size_t at = 8, stride = (size_t)(width * p.channels) + 1, length, size = file.size;
    uint32_t sequence = 0;
    unsigned char *rows = calloc((size_t)height, stride);
    CHECK(file.size > 8 && memcmp(file.data, "\x89PNG\r\n\x1a\n", 8) == 0, "signature");
    const unsigned char *data = next_chunk(&file, &at, "IHDR", &length);
    CHECK(length == 13 && (int)big_endian(data) == width && (int)big_endian(data + 4) == height, "size");
    CHECK(memcmp(data + 8, p.channels == 3 ? "\x08\2\0\0" : "\x08\0\0\0", 5) == 0, "kind");
    if (delay > 0) {
        data = next_chunk(&file, &at, "acTL", &length);
        CHECK(length == 8 && (int)big_endian(data) == p.count && big_endian(data + 4) == 0, "acTL");
    }
    for (int frame = 0; frame < p.count; frame++) {
        for (int y = 0; y < height; y++, p.pixels += stride - 1)
            memcpy(rows + (size_t)y * stride + 1, p.pixels, stride - 1);
        if (delay > 0) {
            data = next_chunk(&file, &at, "fcTL", &length);
            CHECK(length == 26 && big_endian(data) == sequence++ && (int)big_endian(data + 4) == width &&
                  (int)big_endian(data + 8) == height && big_endian(data + 12) + big_endian(data + 16) == 0 &&
                  (int)big_endian(data + 20) == delay * 65536 + 1000 && data[24] + data[25] == 0, "fcTL");
        }
        data = next_chunk(&file, &at, frame > 0 ? "fdAT" : "IDAT", &length);
        const size_t numbers = frame > 0 ? 4 : 0;
        CHECK(frame == 0 || big_endian(data) == sequence++, "number of frame %d", frame);
        check_zlib(data + numbers, length - numbers, rows, (size_t)height * stride);
    }
    next_chunk(&file, &at, "IEND", &length);
    CHECK(length == 0 && at == file.size, "%s: no end", name);
    free(rows), free(file.data);
    return size;
}

/* Digits that come out of noise, in 40 frames of 16: a megabyte must hold them. test_main.c has an animation
 * read by a program that no one here wrote. */
static void test_animation(void) {
    enum { FRAMES = 40, SIDE = 122 };
    static unsigned char noisy[FRAMES][16 * 784], images[16 * 784];
    Dataset digits;
    dataset_open(&digits, "digits", SPLIT_TRAIN, 1, &error);
    for (int f = 0; f < FRAMES; f++) {
        const RandomStream stream = random_stream(1, RANDOM_CHECK, 0, (uint32_t)f);
        for (uint32_t i = 0; i < 16; i++)
            dataset_image(&digits, i, images + i * 784);
        for (uint32_t p = 0; p < sizeof images; p++) {
            const double noise = 256 * (random_uniform(stream, p) - 0.5), clean = (double)f / (FRAMES - 1);
            const double mixed = clean * images[p] + (1 - clean) * (128 + noise);
            images[p] = (unsigned char)fmin(fmax(mixed, 0), 255);
        }
        memcpy(noisy[f], images, sizeof images);
    }
    Arena *arena = arena_new();
    const Pictures grids = picture_grids((Pictures){noisy[0], FRAMES * 16, 28, 28, 1}, 16, 4, arena);
    CHECK(grids.height == SIDE && grids.width == SIDE && grids.count == FRAMES, "%d grids of %d x %d",
          grids.count, grids.height, grids.width);
    const size_t size = check_png("a.apng", grids, 50);
    CHECK(size < 650000, "40 frames of 16 digits take %d bytes", (int)size);
    arena_free(arena);
}

static void test_npy(void) {
    static const unsigned char pixels[2 * 1 * 3 * 2] = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 255 };
    char expected[129];
    ACCEPTED(pictures_write("a.npy", (Pictures){pixels, 2, 1, 3, 2}, 0, &error));
    Bytes file = read_file("a.npy");
    snprintf(expected, sizeof expected, "..........%-117s\n",
             "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 1, 3, 2), }");
    memcpy(expected, "\x93NUMPY\1\0\x76", 10);
    CHECK(file.size == 128 + sizeof pixels && memcmp(file.data, expected, 128) == 0, "header");
    CHECK(memcmp(file.data + 128, pixels, sizeof pixels) == 0, "pixels");
    free(file.data);
    ACCEPTED(pictures_write("b.npy", (Pictures){pixels, 1, 4, 3, 1}, 0, &error));
    file = read_file("b.npy");
    CHECK(file.size == 140 && strstr((const char *)file.data + 10, "(1, 4, 3, 1)") != NULL, "one image");
    free(file.data);
}

/* Dots and lines are where they should be, in their colour, and nothing else is lit. */
static void test_points(void) {
    enum { SIZE = 512 };
    static unsigned char canvas[SIZE * SIZE * 3];
    static const unsigned char points[4] = { 0, 255, 100, 50 }, colour[3] = { 255, 128, 0 };
    static const unsigned char from[2] = { 150, 10 }, to[2] = { 200, 60 };
    lines_draw(canvas, SIZE, points, points, 2, SIZE / 400.0, colour);
    lines_draw(canvas, SIZE, from, to, 1, 1, colour);
    int lit = 0, outside = 0, other = 0;
    for (int p = 0; p < SIZE * SIZE; p++) {
        const unsigned char *pixel = canvas + (size_t)p * 3;
        const int x = p % SIZE, y = p / SIZE;
        const int is_dot = (x < 4 && y > 507) || (abs(x - 200) < 4 && abs(y - 100) < 4);
        lit += pixel[0] > 0;
        outside += pixel[0] > 0 && !is_dot && abs(x - 300 - (y - 20)) > 4;
        other += pixel[2] != 0 || abs(2 * pixel[1] - pixel[0]) > 2;
    }
    CHECK(lit > 200 && lit < 600 && outside + other == 0, "%d lit, %d outside, %d in other colours", lit,
          outside, other);
    CHECK(canvas[(100 * SIZE + 200) * 3] == 255 && canvas[(70 * SIZE + 350) * 3] == 255, "not lit");
}

static void test_images(void) {
    enum { HEIGHT = 150, WIDTH = 160 };
    static unsigned char pixels[HEIGHT * WIDTH * 3];
    for (size_t i = 0; i < sizeof pixels; i++) pixels[i] = (unsigned char)(i * i / 7);
    check_png("a.png", (Pictures){pixels, 1, HEIGHT, WIDTH, 3}, 0);
    check_png("b.png", (Pictures){pixels, 1, HEIGHT, WIDTH, 1}, 0);
    check_png("c.png", (Pictures){pixels, 1, 257, 254, 1}, 0);
    for (int length = 0; length < 600; length++) {       /* runs of all lengths, in grey and in colour */
        const int channels = length % 2 ? 1 : 3;
        unsigned char runs[606] = { 0 };
        for (int i = 0; i < 606; i++)
            runs[i] = i < channels || i >= channels + length ? (unsigned char)(i * 37) : runs[i - channels];
        const size_t size = check_png("d.png", (Pictures){runs, 1, 2, 303 / channels, channels}, 0);
        CHECK(length < 599 || size < 100, "%d bytes for what is even", (int)size);
    }

    ACCEPTED(pictures_write("a.pgm", (Pictures){pixels, 1, 2, 3, 1}, 0, &error));
    check_file("a.pgm", "P5\n3 2\n255\n", pixels, 6);
    ACCEPTED(pictures_write("a.ppm", (Pictures){pixels, 1, 2, 1, 3}, 0, &error));
    check_file("a.ppm", "P6\n1 2\n255\n", pixels, 6);
    const Pictures two = {(const unsigned char *)"\1\2", 1, 1, 2, 1};
    ACCEPTED(pictures_write("b.PPM", two, 0, &error));
    check_file("b.PPM", "P6\n2 1\n255\n", "\1\1\1\2\2\2", 6);

    REFUSED(pictures_write("x.png", (Pictures){pixels, 1, 4, 4, 2}, 0, &error),
            "x.png: images of two channels");
    REFUSED(pictures_write("x.png", (Pictures){pixels, 1, 30000, 30000, 1}, 0, &error), "is too large");
    CHECK(picture_path_check("x.npy", 2, &error) == 0 && picture_path_check("x.apng", 3, &error) == 0, "%s",
          error.text);
    CHECK(picture_path_check("x.pgm", 1, &error) == 0 && picture_path_check("x.png", 3, &error) == 0, "%s",
          error.text);
    REFUSED(picture_path_check("x.pgm", 3, &error), "x.pgm: a .pgm holds grey images only");
    REFUSED(picture_path_check("x.jpg", 1, &error), "x.jpg: unknown kind of image");
    CHECK(picture_path_check("png", 1, &error) != 0 && picture_path_check(".png", 1, &error) != 0, "no name");

    Arena *arena = arena_new();
    const Pictures all = picture_grids((Pictures){pixels, 5, 4, 6, 3}, 5, 3, arena);
    const unsigned char *grid = all.pixels;
    const int height = all.height, width = all.width;
    CHECK(height == 2 * 4 + 3 * 2 && width == 3 * 6 + 4 * 2, "grid of %d x %d", height, width);
    int same = 1;
    for (int y = 0; y < height; y++)
        for (int x = 0; x < width; x++) {
            int row = y / 6, column = x / 8, inside = y % 6 >= 2 && x % 8 >= 2 && 3 * row + column < 5;
            const unsigned char *image = pixels + (3 * row + column) * 4 * 6 * 3;
            for (int c = 0; c < 3; c++)
                same &= grid[(y * width + x) * 3 + c] ==
                        (inside ? image[((y % 6 - 2) * 6 + x % 8 - 2) * 3 + c] : 255);
        }
    CHECK(same, "the grid holds other pixels");
    arena_free(arena);
}

/* Draw a chart; the result is its text, on the heap. */
static char *chart_text(const Curve *curves, int count) {
    FILE *stream = fopen("chart.svg", "wb");
    chart_svg(stream, "a & b", "x < y", "\x1b", curves, count);
    CHECK(fclose(stream) == 0, "cannot write a chart");
    Bytes bytes = read_file("chart.svg");
    bytes.data[bytes.size] = '\0';
    char *text = (char *)bytes.data;
    CHECK(strncmp(text, "<svg xmlns=", 11) == 0 && strcmp(text + bytes.size - 7, "</svg>\n") == 0, "ends");
    for (const char *plot = strstr(text, "</style>"); plot && (plot = strchr(plot, '\'')); plot++)
        CHECK(strncmp(plot, "'nan", 4) != 0 && strncmp(plot, "'inf", 4) != 0 && strncmp(plot, "'-nan", 5) != 0
              && strncmp(plot, "'-inf", 5) != 0, "not a number: %.40s", plot);
    return text;
}

static void test_chart(void) {
    enum { COUNT = 1000 };
    static double x[COUNT], falling[COUNT], deviation[COUNT];
    for (int i = 0; i < COUNT; i++) {
        x[i] = 100 * i;
        falling[i] = i % 9 ? 1.0134 + 10 * exp(-i / 30.0) : NAN;
        deviation[i] = i % 2 ? 0.001 : NAN;
    }
    const Curve curves[2] = {{"<&'\">", x, falling, NULL, COUNT}, {"band", x, falling, deviation, 20}};
    char *text = chart_text(curves, 2);
    static const char *const there[] = {
        "<polyline points='", "<polygon points='", ">&#60;&#38;&#39;&#34;&#62;<", ">band<", ">a &#38; b<",
        ">x &#60; y<", ">\\x1b<", ">1.05<", ">20000<"
    };
    for (size_t i = 0; i < sizeof there / sizeof there[0]; i++)
        CHECK(strstr(text, there[i]), "no %s", there[i]);
    CHECK(!strstr(text, ">2.00<"), "the end of the curve is flat");
    free(text);
    /* Numbers at the edge of what there is: the sanitizers watch. */
    static const double odd[9][2] = { { NAN, INFINITY }, { 1e300, -1e300 }, { 0, 0 }, { 1e29, -1e29 },
                                      { 1e6, 1e6 + 1e-9 }, { 1e-300, 2e-300 }, { 0, 5e-324 }, { 5, 6 },
                                      { 5e-324, 5e-324 } };
    for (int i = 0; i < 81; i++) {
        const Curve curve = { "odd", odd[i / 9], odd[i % 9], odd[i % 7], 2 };
        text = chart_text(&curve, i % 5 > 0);
        CHECK(strlen(text) < 10000, "%d bytes for two points", (int)strlen(text));
        free(text);
    }
}

/* ---- data sets ---- */

static void test_idx_labels(void) {
    static const unsigned char good[11] = { 0, 0, 8, 1, 0, 0, 0, 3, 4, 255, 0 };
    static const struct { unsigned char place, value; size_t size; } bad[] = {
        { 0, 0, 0 }, { 0, 0, 7 }, { 0, 0, 10 }, { 11, 0, 12 }, { 7, 2, 11 }, { 7, 4, 11 }, { 4, 1, 11 },
        { 3, 3, 11 }, { 2, 9, 11 }, { 7, 2, 10 }, { 7, 4, 12 },
    };
    Dataset dataset = { .count = 3, .split = SPLIT_TEST };
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        unsigned char changed[12] = { 0 };
        memcpy(changed, good, sizeof good);
        changed[bad[i].place] = bad[i].value;
        Bytes bytes = copy_of(changed, bad[i].size);
        REFUSED(idx_labels_parse(&bytes, "x.idx", &dataset, &error),
                "bytes, expected an IDX file of 3 labels for the images of t10k-images-idx3-ubyte");
        CHECK(dataset.labels == NULL && dataset.classes == 0, "something is left");
        free(bytes.data);
    }
    CHECK_MESSAGE("x.idx: holds 12 bytes");
    Bytes bytes = copy_of(good, sizeof good);
    ACCEPTED(idx_labels_parse(&bytes, "x.idx", &dataset, &error));
    CHECK(bytes.data == NULL && dataset.classes == 256 && dataset_label(&dataset, 0) == 4 &&
          dataset_label(&dataset, 1) == 255 && dataset_label(&dataset, 2) == 0, "labels");
    leave_seed("idx", good, sizeof good);
    dataset_close(&dataset);
}

static void test_idx(void) {
    static const unsigned char good[] = { 0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6 };
    static const struct { unsigned char data[24]; size_t size; const char *message; } bad[] = {
        { { 0 }, 0, "x.idx: holds 0 bytes, expected an IDX header of 16" },
        { { 0, 0, 8, 3, 0, 0, 0, 2 }, 8, "x.idx: holds 8 bytes, expected an IDX header of 16" },
        { { 0, 0, 8, 1, 0, 0, 0, 2 }, 10, "x.idx: holds 10 bytes, expected an IDX header of 16" },
        { { 'P', 'K', 8, 3 }, 16, "x.idx: magic number 0x504b0803, expected 0x00000803 (IDX images)" },
        { { 0, 0, 8, 3, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1 }, 16, "holds no images" },
        { { 0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1 }, 16, "images of 0 x 1 pixels" },
        { { 0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0 }, 16,
          "images of 1 x 65536 pixels, expected 1 to 32768 each way" },
        { { 0, 0, 8, 3, 0, 0, 0xea, 0x60, 0, 0, 0, 28, 0, 0, 0, 28 }, 20,
          "x.idx: holds 4 of the 47040000 bytes its header promises" },
        { { 0, 0, 8, 3, 255, 255, 255, 255, 0, 0, 128, 0, 0, 0, 128, 0 }, 16,
          "holds 0 of the 4611686017353646080 bytes" },
        { { 0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 3 }, 20,
          "x.idx: holds more than the 3 bytes its header promises" },
    };
    Dataset dataset = { 0 };
    Bytes bytes = copy_of(good, sizeof good);
    ACCEPTED(idx_parse(&bytes, "x.idx", &dataset, &error));
    CHECK(dataset.count == 2 && dataset.height == 1 && dataset.width == 3 && dataset.channels == 1, "shape");
    unsigned char image[3];
    dataset_image(&dataset, 1, image);
    CHECK(memcmp(image, "\4\5\6", 3) == 0, "pixels");
    leave_seed("idx", good, sizeof good);
    CHECK(bytes.data == NULL, "not taken over");
    dataset_close(&dataset);
    CHECK(dataset.pixels == NULL, "not closed");
    test_idx_labels();
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        bytes = copy_of(bad[i].data, bad[i].size);
        CHECK(idx_parse(&bytes, "x.idx", &dataset, &error) != 0, "accepted: %s", bad[i].message);
        CHECK_MESSAGE(bad[i].message);
        leave_seed("idx", bad[i].data, bad[i].size);
        free(bytes.data);
    }
}

static void test_cifar(void) {
    static unsigned char batch[2 * RECORD], image[3072];
    Dataset dataset = { 0 };
    for (int i = 0; i < 2 * RECORD; i++) batch[i] = i % RECORD == 0 ? 9 : (unsigned char)(i * 31 / 7);
    batch[RECORD] = 3;
    Bytes bytes = copy_of(batch, sizeof batch);
    ACCEPTED(cifar_parse(&bytes, "x.bin", &dataset, &error));
    CHECK(dataset.count == 2 && dataset.height == 32 && dataset.width == 32 && dataset.channels == 3,
          "shape");
    dataset_image(&dataset, 1, image);
    int same = 1;
    for (int p = 0; p < 1024; p++)
        for (int c = 0; c < 3; c++) same &= image[3 * p + c] == batch[RECORD + 1 + 1024 * c + p];
    CHECK(same, "planes are not turned into pixels");
    ACCEPTED(cifar_parse(&bytes, "x.bin", &dataset, &error));
    CHECK(dataset.count == 4 && dataset.classes == 10, "a second batch");
    for (uint32_t i = 0; i < 4; i++) CHECK(dataset_label(&dataset, i) == (i % 2 ? 3 : 9), "label %d", (int)i);
    dataset_close(&dataset);
    leave_seed("cifar", batch, sizeof batch);
    bytes.size--;
    REFUSED(cifar_parse(&bytes, "x.bin", &dataset, &error),
            "x.bin: holds 6145 bytes, expected a multiple of 3,073");
    bytes.size = 0;
    REFUSED(cifar_parse(&bytes, "x.bin", &dataset, &error), "x.bin: holds 0 bytes");
    bytes.size = 10001 * RECORD;                         /* not looked at any further */
    REFUSED(cifar_parse(&bytes, "x.bin", &dataset, &error),
            "x.bin: holds more than the 10,000 images of a batch");
    bytes.size = 2 * RECORD;
    bytes.data[RECORD] = 10;
    REFUSED(cifar_parse(&bytes, "x.bin", &dataset, &error), "x.bin: image 1 has label 10, expected 0 to 9");
    free(bytes.data);
}

/* The directory can be opened; pixel `at` of its images has this value, the last one this label. */
static void check_open(Split split, uint32_t count, int channels, size_t at, int pixel, int label) {
    Dataset dataset;
    ACCEPTED(dataset_open(&dataset, directory, split, 0, &error));
    CHECK(dataset.count == count && dataset.split == split && dataset.channels == channels
          && dataset.pixels[at] == pixel, "other images");
    CHECK(dataset_label(&dataset, count - 1) == label && !dataset.labels == (label < 0), "other labels");
    dataset_close(&dataset);
}

static void refuse_open(const char *where, Split split, const char *part) {
    Dataset dataset;
    REFUSED(dataset_open(&dataset, where, split, 0, &error), part);
    CHECK(dataset.pixels == NULL && dataset.labels == NULL, "not closed");
}

static void test_open(void) {
    static unsigned char batch[2 * RECORD];
    static const unsigned char idx[] = { 0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 2, 7, 8 };
    refuse_open("nowhere", SPLIT_TRAIN, "nowhere: No such file or directory");
    refuse_open(directory, SPLIT_TRAIN, "holds neither train-images-idx3-ubyte (MNIST) nor data_batch_1.bin");
    refuse_open("kept", SPLIT_TRAIN, "Not a directory");
    refuse_open("no\nsuch\x1b[2J", SPLIT_TRAIN, "no\\x0asuch\\x1b[2J: No such file or directory");

    for (int i = 0; i < 2 * RECORD; i++) batch[i] = i % RECORD == 0 ? 1 : (unsigned char)(i / RECORD + 1);
    write_file("data_batch_2.bin", batch, 2 * RECORD);
    write_file("data_batch_5.bin", batch, RECORD);
    check_open(SPLIT_TRAIN, 3, 3, 3072, 2, 1);           /* batches are joined in their order */
    check_open(SPLIT_TRAIN, 3, 3, 2 * 3072, 1, 1);
    write_file("data_batch_4.bin", batch, RECORD - 1);
    refuse_open(directory, SPLIT_TRAIN, "/data_batch_4.bin: holds 3072 bytes");
    refuse_open(directory, SPLIT_TEST, "holds neither t10k-images-idx3-ubyte (MNIST) nor test_batch.bin");
    write_file("test_batch.bin", batch, RECORD);
    check_open(SPLIT_TEST, 1, 3, 0, 1, 1);
    write_file("train-images-idx3-ubyte", idx, sizeof idx);
    check_open(SPLIT_TRAIN, 1, 1, 1, 8, -1);

    /* Labels beside the images, plain or packed; absent ones are no error, others that are wrong are one. */
    static const unsigned char labels[] = { 0, 0, 8, 1, 0, 0, 0, 1, 6 };
    write_file("train-labels-idx1-ubyte", labels, sizeof labels);
    check_open(SPLIT_TRAIN, 1, 1, 1, 8, 6);
    write_file("train-labels-idx1-ubyte", labels, sizeof labels - 1);
    refuse_open(directory, SPLIT_TRAIN, "/train-labels-idx1-ubyte: holds 8 bytes, expected an IDX file of "
                                        "1 labels for the images of train-images-idx3-ubyte");
    unlink("train-labels-idx1-ubyte");
    write_file("train-labels-idx1-ubyte.gz", gzip_stored, sizeof gzip_stored);
    refuse_open(directory, SPLIT_TRAIN, "/train-labels-idx1-ubyte.gz: holds ");
    unlink("train-labels-idx1-ubyte.gz");
    write_file("t10k-images-idx3-ubyte.gz", gzip_stored, sizeof gzip_stored);
    refuse_open(directory, SPLIT_TEST, "/t10k-images-idx3-ubyte.gz: magic number 0x44696666, expected");
    write_file("t10k-images-idx3-ubyte.gz", idx, sizeof idx);
    refuse_open(directory, SPLIT_TEST, "is not gzip");

    /* Gzip is known by its content too. A member with one small image, then half a megabyte of gzip with
     * 80 MB of zeros: refused at the first of them, in no memory to speak of. */
    enum { BOMB = 1 << 19 };
    unsigned char *packed = calloc(1, 41 + BOMB);
    memcpy(packed, "\x1f\x8b\x08\0\0\0\0\0\0\0\1\x12\0\xed\xff", 15);
    memcpy(packed + 15, idx, sizeof idx);
    for (int b = 0; b < 4; b++) packed[33 + b] = (unsigned char)(crc_of(idx, sizeof idx) >> 8 * b);
    packed[37] = sizeof idx;
    write_file("train-images-idx3-ubyte", packed, 41);
    check_open(SPLIT_TRAIN, 1, 1, 1, 8, -1);
    make_bomb(packed + 41, BOMB);
    write_file("train-images-idx3-ubyte", packed, 41 + BOMB);
    free(packed);
    const rlim_t before = SANITIZED ? 0 : limit_memory(20000000);
    refuse_open(directory, SPLIT_TRAIN,
                "/train-images-idx3-ubyte: holds more than the 2 bytes its header promises");
    if (!SANITIZED) limit_memory(before);

    /* Of two files of one name, the plain one is read, and it is said that there is another. */
    write_file("train-images-idx3-ubyte", idx, sizeof idx);
    write_file("train-images-idx3-ubyte.gz", gzip_stored, sizeof gzip_stored);
    const int terminal = dup(STDERR_FILENO);
    CHECK(freopen("said", "w", stderr) != NULL, "no stderr");
    check_open(SPLIT_TRAIN, 1, 1, 1, 8, -1);
    fflush(stderr);
    dup2(terminal, STDERR_FILENO);
    Bytes said = read_file("said");
    CHECK(strstr((char *)said.data, "/train-images-idx3-ubyte.gz: is not read, since train-images") &&
          said.data[said.size - 1] == '\n', "nothing is said of the other file");
    free(said.data);
}

/* Other pixels, another shape, order or seed: another digest. One value is given, for all machines. */
static void test_digest(void) {
    unsigned char pixels[6][24], labels[2] = { 3, 5 }, *at;
    uint64_t digests[10];
    Dataset sets[10];
    for (int i = 0; i < 6; i++)
        for (int p = 0; p < 24; p++) pixels[i][p] = (unsigned char)(p * 37);
    for (int i = 0; i < 6; i++) sets[i] = (Dataset){ 2, 3, 4, 1, pixels[i], SPLIT_TRAIN, .seed = 5 };
    pixels[1][23] ^= 1;
    at = pixels[2];
    at[7] ^= 128, at[15] ^= 128;                         /* the highest bits of two words */
    memcpy(pixels[3], pixels[0] + 12, 12);
    memcpy(pixels[3] + 12, pixels[0], 12);               /* the images the other way round */
    sets[4] = (Dataset){ 1, 3, 4, 1, pixels[4], SPLIT_TRAIN, .seed = 5 };
    sets[5] = (Dataset){ 2, 4, 3, 1, pixels[5], SPLIT_TRAIN, .seed = 5 };
    for (int i = 6; i < 9; i++)
        sets[i] = (Dataset){ 2, 3, 4, 1, NULL, i == 6 ? SPLIT_TEST : SPLIT_TRAIN, .seed = i == 8 ? 6 : 5 };
    for (int i = 0; i < 9; i++) {
        digests[i] = dataset_digest(&sets[i], 0);
        for (int j = 0; j < i; j++) CHECK(digests[i] != digests[j], "sets %d and %d have one digest", i, j);
    }
    sets[0].seed = 7;
    sets[0].split = SPLIT_TEST;
    CHECK(dataset_digest(&sets[0], 1) == digests[0], "the digest of a file depends on a seed");
    sets[0].labels = labels;
    CHECK(dataset_digest(&sets[0], 0) == digests[0], "the digest of images depends on labels");
    const uint64_t labelled = dataset_digest(&sets[0], 1);
    labels[1] ^= 1;
    CHECK(labelled != digests[0] && dataset_digest(&sets[0], 1) != labelled, "labels do not count");
    CHECK(digests[0] == 0x37680030c26bb3e5, "digest %llx", (unsigned long long)digests[0]);
}

static void test_digits(void) {
    Dataset train, again, test, other;
    unsigned char a[784], b[784];
    dataset_open(&train, "digits", SPLIT_TRAIN, 1, &error);
    dataset_open(&again, "digits", SPLIT_TRAIN, 1, &error);
    dataset_open(&test, "digits", SPLIT_TEST, 1, &error);
    dataset_open(&other, "digits", SPLIT_TRAIN, 2, &error);
    CHECK(train.count == 60000 && test.count == 10000 && train.height == 28 && train.width == 28, "size");
    for (uint32_t i = 0; i < 300; i++) {
        dataset_image(&train, i * 199, a);
        dataset_image(&again, i * 199, b);
        CHECK(memcmp(a, b, 784) == 0, "digit %u is not the same twice", (unsigned)i * 199);
        int sum = 0, most = 0, border = 0;
        for (int p = 0; p < 784; p++) {
            sum += a[p];
            if (a[p] > most) most = a[p];
            if (p / 28 == 0 || p / 28 == 27 || p % 28 == 0 || p % 28 == 27) border += a[p];
        }
        CHECK(sum > 4000 && sum < 70000 && most > 200 && border == 0, "digit %u: sum %d, most %d, border %d",
              (unsigned)i * 199, sum, most, border);
        dataset_image(&test, i, a);
        dataset_image(&train, i, b);
        CHECK(memcmp(a, b, 784) != 0, "test digit %u is a training digit", (unsigned)i);
        dataset_image(&other, i, a);
        CHECK(memcmp(a, b, 784) != 0, "digit %u does not depend on the seed", (unsigned)i);
    }
    /* The labels tell: a test digit is nearest to the mean of its own class far more often than not. */
    static double mean[10][784];
    int right = 0;
    for (uint32_t i = 0; i < 2000; i++) {
        dataset_image(&train, i, a);
        for (int p = 0; p < 784; p++) mean[dataset_label(&train, i)][p] += a[p] / 200.0;
    }
    for (uint32_t i = 0; i < 500; i++) {
        int nearest = 0;
        double distance[10] = { 0 };
        dataset_image(&test, i, a);
        for (int k = 0; k < 10; k++) {
            for (int p = 0; p < 784; p++) distance[k] += (a[p] - mean[k][p]) * (a[p] - mean[k][p]);
            nearest = distance[k] < distance[nearest] ? k : nearest;
        }
        right += nearest == dataset_label(&test, i);
    }
    CHECK(right > 300 && train.classes == 10, "%d of 500 digits are like their class", right);
    dataset_close(&train);
}

/* Points lie on a spiral of 2.5 turns, spread about it by 3 and as many everywhere along it; they are not cut
 * off at 0 and 255, and fill most of what there is. */
static void test_swirl(void) {
    enum { COUNT = 10000 };
    Dataset train, test, other;
    const double two_pi = 8 * atan(1), turn = 116 / 2.5;
    double square = 0;
    int counted = 0, low = 255, high = 0, edge = 0, same = 0, inner = 0;
    ACCEPTED(dataset_open(&train, "swirl", SPLIT_TRAIN, 1, &error));
    ACCEPTED(dataset_open(&test, "swirl", SPLIT_TEST, 1, &error));
    ACCEPTED(dataset_open(&other, "swirl", SPLIT_TRAIN, 2, &error));
    CHECK(train.count == 60000 && test.count == 10000 && train.height == 1 && train.width == 1 &&
          train.channels == 2 && train.classes == 0 && dataset_label(&train, 7) == -1, "shape");
    const uint64_t digest = dataset_digest(&train, 1);
    CHECK(digest != dataset_digest(&test, 1) && digest != dataset_digest(&other, 1), "digests");
    for (uint32_t i = 0; i < COUNT; i++) {
        unsigned char p[2], again[2];
        dataset_image(&train, i, p);
        dataset_image(&train, i, again);
        CHECK(memcmp(p, again, 2) == 0, "point %d is another the second time", (int)i);
        dataset_image(&test, i, again);
        same += memcmp(p, again, 2) == 0;
        dataset_image(&other, i, again);
        same += memcmp(p, again, 2) == 0;
        for (int axis = 0; axis < 2; axis++) {
            low = p[axis] < low ? p[axis] : low;
            high = p[axis] > high ? p[axis] : high;
            edge += p[axis] == 0 || p[axis] == 255;
        }
        const double x = p[0] - 127.5, y = p[1] - 127.5, r = sqrt(x * x + y * y);
        const double first = turn * (atan2(y, x) / two_pi + (y < 0));
        const double k = fmax(0, nearbyint((r - first) / turn));
        inner += r < 58;
        if (r > 20 && r < 100) {
            square += (r - first - k * turn) * (r - first - k * turn);
            counted++;
        }
    }
    const double spread = sqrt(square / counted);
    CHECK(spread > 2.7 && spread < 3.5, "spread %.3f", spread);
    CHECK(low < 20 && high > 235 && edge < COUNT / 1000, "%d to %d, %d at the edge", low, high, edge);
    CHECK(inner > 0.22 * COUNT && inner < 0.29 * COUNT, "%d in the inner half", inner);
    CHECK(same < 20, "%d points do not depend on split or seed", same);
}

static void test_shuffle(void) {
    static const uint32_t counts[6] = { 1, 2, 3, 10, 100, 1000 };
    for (int k = 0; k < 6; k++) {
        uint32_t count = counts[k];
        int order[1000], differ_epoch = 0, differ_seed = 0, fixed = 0;
        for (uint32_t epoch = 0; epoch < 5; epoch++) {
            char seen[1000] = { 0 };
            for (uint32_t i = 0; i < count; i++) {
                uint32_t index = dataset_shuffle(7, epoch, i, count);
                CHECK(index < count && !seen[index], "count %u: %u is twice or outside", (unsigned)count,
                      (unsigned)index);
                if (index < count) seen[index] = 1;
                if (epoch == 0) order[i] = (int)index;
                fixed += index == i;
                differ_epoch += order[i] != (int)index;
                differ_seed += dataset_shuffle(8, epoch, i, count) != index;
            }
        }
        CHECK(count < 10 || (differ_epoch > 2 * (int)count && differ_seed > 2 * (int)count),
              "count %u: the same order", (unsigned)count);
        CHECK(count < 10 || fixed < (int)count, "count %u: %d of 5 epochs stay in place", (unsigned)count,
              fixed);
    }
    for (uint32_t i = 0; i < 100; i++) {
        uint32_t index = dataset_shuffle(1, 0, UINT32_MAX - 1 - i, UINT32_MAX);
        CHECK(index < UINT32_MAX && index != dataset_shuffle(1, 0, i, UINT32_MAX), "the largest count");
    }
}

static void test_mnist(void) {
    static const struct {
        Split split;
        uint32_t count;
        uint64_t sum, weighted, digest;  /* of all pixels; of pixel * (place % 251) of the first 100 images */
        int labels[5];
    } known[2] = { { SPLIT_TRAIN, 60000, 1567298545, 317163866, 0x3aea0b5a31fc24b9, { 5, 0, 4, 1, 9 } },
                   { SPLIT_TEST, 10000, 264923200, 298271224, 0x959af0812824e46d, { 7, 2, 1, 0, 4 } } };
    const char *where = getenv("MNIST_DIR");
    if (where == NULL) printf("skipped: MNIST_DIR is not set\n");
    for (int i = 0; i < 2 && where != NULL; i++) {
        Dataset dataset;
        int status = dataset_open(&dataset, where, known[i].split, 0, &error);
        ACCEPTED(status);
        if (status != 0) continue;
        uint64_t sum = 0, weighted = 0;
        for (size_t p = 0; p < (size_t)dataset.count * 784; p++) sum += dataset.pixels[p];
        for (size_t p = 0; p < 78400; p++) weighted += p % 251 * dataset.pixels[p];
        CHECK(dataset.count == known[i].count && dataset.height == 28 && dataset.width == 28,
              "size of MNIST");
        const double start = seconds_now();   /* some 0.02 s, and on a busy machine less than 2 */
        CHECK(dataset_digest(&dataset, 0) == known[i].digest, "digest of MNIST");
        CHECK(SANITIZED || seconds_now() - start < 2, "a digest takes %.3f s", seconds_now() - start);
        CHECK(sum == known[i].sum && weighted == known[i].weighted, "pixels of MNIST");
        for (uint32_t k = 0; k < 5 && dataset.labels; k++)
            CHECK(dataset_label(&dataset, k) == known[i].labels[k], "label %d of MNIST", (int)k);
        dataset_close(&dataset);
    }
}

/* ---- safetensors ---- */

static int parse_text(const char *header, size_t data_size, TensorFile *file) {
    size_t length = strlen(header);
    Bytes bytes = { calloc(8 + length + data_size, 1), 8 + length + data_size };
    for (int i = 0; i < 8; i++) bytes.data[i] = (unsigned char)((uint64_t)length >> 8 * i);
    memcpy(bytes.data + 8, header, length);
    leave_seed("tensors", bytes.data, bytes.size);
    return tensors_parse(bytes, "x.safetensors", file, &error);
}

static void test_tensors(void) {
    static const float singles[6] = { 1.5f, -2, 3e-20f, 0, 5, 1e30f };
    static const double doubles[2] = { 0.1, -1e300 };
    static const unsigned char bytes[3] = { 1, 2, 255 };
    TensorEntry out[4] = {
        { "b.kernel", TYPE_F32, 2, { 2, 3 }, .data = singles },
        { "a \"quoted\\\" name", TYPE_F64, 1, { 2 }, .data = doubles },
        { "images", TYPE_U8, 3, { 1, 3, 1 }, .data = bytes },
        { "empty", TYPE_F32, 2, { 0, 5 }, .data = NULL },
    };
    const char *metadata[6] = { "step", "12", "config", "{\"line\":\n\"\x01\xc3\xa9\"}",
                                      "", "path/\xe6\x97\xa5\"\\" };
    TensorFile file;
    const char *path = "t.safetensors";
    ACCEPTED(tensors_write(path, &(TensorFile){{NULL, 0}, out, 4, metadata, 3}, &error));
    ACCEPTED(tensors_read(path, &file, &error));
    CHECK(file.tensor_count == 4 && file.metadata_count == 3, "counts");
    for (int i = 0; i < 3; i++) {
        const char *value = tensors_metadata(&file, metadata[2 * i]);
        CHECK(value != NULL && strcmp(value, metadata[2 * i + 1]) == 0, "metadata %s", metadata[2 * i]);
    }
    CHECK(tensors_metadata(&file, "none") == NULL && tensors_find(&file, "none") == NULL, "found nothing");
    const TensorEntry *entry = tensors_find(&file, "b.kernel");
    real values[6];
    CHECK(entry != NULL && entry->type == TYPE_F32 && entry->rank == 2 && entry->count == 6 &&
          entry->size == 24 && ((const unsigned char *)entry->data - file.bytes.data) % 8 == 0, "b.kernel");
    ACCEPTED(tensors_copy(entry, path, 2, out[0].shape, values, &error));
    for (int i = 0; i < 6; i++) CHECK(values[i] == (real)singles[i], "value %d", i);
    REFUSED(tensors_copy(entry, "x", 2, out[3].shape, values, &error),
            "x: tensor b.kernel is [2, 3], expected [0, 5]");
    REFUSED(tensors_copy(entry, "x", 0, out[3].shape, values, &error),
            "x: tensor b.kernel is [2, 3], expected []");
    entry = tensors_find(&file, "a \"quoted\\\" name");
    CHECK(entry != NULL && entry->type == TYPE_F64 && entry->count == 2, "a");
    int status = tensors_copy(entry, "x", 1, out[1].shape, values, &error);
    if (sizeof(real) == 8) CHECK(status == 0 && values[0] == (real)0.1 && values[1] == (real)-1e300,
                                 "doubles");
    if (sizeof(real) == 4) CHECK(status != 0, "a double beyond float is accepted");
    CHECK(values[0] == (real)0.1, "double");
    entry = tensors_find(&file, "images");
    CHECK(entry != NULL && entry->type == TYPE_U8 && memcmp(entry->data, bytes, 3) == 0, "images");
    REFUSED(tensors_copy(entry, "x", 3, out[2].shape, values, &error),
            "x: tensor images is not of type F32 or F64");
    entry = tensors_find(&file, "empty");
    CHECK(entry != NULL && entry->count == 0, "empty");
    ACCEPTED(tensors_copy(entry, "x", 2, out[3].shape, values, &error));
    tensors_free(&file);

    /* Every truncation is refused. */
    Bytes whole = read_file("t.safetensors");
    leave_seed("tensors", whole.data, whole.size);
    const char *header = (const char *)whole.data + 8;
    CHECK(strstr(header, "\"path/\xe6\x97\xa5\\\"\\\\\"") && strstr(header, ":\\u000a\\\"\\u0001"),
          "not as JSON wants it");
    for (size_t length = 0; length < whole.size; length++)
        REFUSED(tensors_parse(copy_of(whole.data, length), "x", &file, &error),
                length < 8 ? "expected a safetensors file" : "x: is truncated, holds ");
    free(whole.data);

    const float infinite[2] = { 1, INFINITY };
    TensorEntry bad = { "w", TYPE_F32, 1, { 2 }, .data = infinite };
    ACCEPTED(tensors_write(path, &(TensorFile){{NULL, 0}, &bad, 1, NULL, 0}, &error));
    ACCEPTED(tensors_read(path, &file, &error));
    REFUSED(tensors_copy(tensors_find(&file, "w"), "x", 1, bad.shape, values, &error),
            "x: tensor w: value 1 is not a finite number");
    tensors_free(&file);
    const TensorFile empty = {{NULL, 0}, NULL, 0, metadata, 1}, nothing = {{NULL, 0}, NULL, 0, NULL, 0};
    CHECK(tensors_write(path, &empty, &error) == 0 && tensors_read(path, &file, &error) == 0,
          "metadata alone: %s", error.text);
    CHECK(file.tensor_count == 0 && tensors_metadata(&file, "step") != NULL, "metadata alone");
    tensors_free(&file);
    CHECK(tensors_write(path, &nothing, &error) == 0 && tensors_read(path, &file, &error) == 0,
          "nothing: %s", error.text);
    tensors_free(&file);
    REFUSED(tensors_read("missing", &file, &error), "missing: No such file or directory");
}

#define TENSOR(name, type, shape, begin, end) \
    "\"" name "\":{\"dtype\":\"" type "\",\"shape\":" shape ",\"data_offsets\":[" begin "," end "]}"

static void test_tensor_headers(void) {
    static const struct {
        const char *header;
        size_t data_size;
        const char *message;             /* NULL: accepted */
    } headers[] = {
        { "{}", 0, NULL }, { "{ }   ", 0, NULL }, { "{" TENSOR("a", "F32", "[2]", "0", "8") "}", 8, NULL },
        { "{" TENSOR("b", "BF16", "[]", "4", "6") ",\n\t" TENSOR("a", "I32", "[1,1]", "0", "4") "}", 6,
          NULL },
        { "{" TENSOR("e", "F64", "[0]", "4", "4") "," TENSOR("a", "F8_E5M2", "[4]", "0", "4") ","
              TENSOR("z", "F64", "[0]", "0", "0") "}", 4, NULL },
        { "{\"__metadata__\":{\"a\":\"\\u00e9\\u20ac\\n\"}}", 0, NULL }, { "{\"__metadata__\":{}}", 0, NULL },
        { "", 0, "expected '{' (header byte 0)" }, { "{", 0, "expected '\"'" },
        { "{}}", 0, "expected only spaces after the header (header byte 2)" },
        { "{\"a\"}", 0, "expected ':'" }, { "{\"a\":1}", 0, "expected '{'" },
        { "{\"a\":{}}", 0, "expected dtype, shape, two data_offsets" }, { "{\"a", 0, "is truncated" },
        { "{\"a\\", 0, "is truncated" }, { "{\"a\\x\":1}", 0, "invalid escape" },
        { "{\"a\\u12\":1}", 0, "invalid escape" }, { "{\"a\\ud800\":1}", 0, "escape of a surrogate" },
        { "{\"a\\udc00\":1}", 0, "escape of a surrogate" },
        { "{\"a\\u0000\":1}", 0, "escape of a surrogate or of 0" },
        { "{\"a\n\":1}", 0, "control character in a string" },
        { "{" TENSOR("a\\u001b[2J\xff", "U8", "[1]", "0", "1") "}", 1, NULL },
        { "{" TENSOR("a", "F32", "[2]", "0", "8") ",}", 8, "expected '\"'" },
        { "{" TENSOR("a", "F32", "[2]", "0", "8") TENSOR("b", "F32", "[0]", "8", "8") "}", 8,
          "expected ','" },
        { "{" TENSOR("a", "F32", "[2,]", "0", "8") "}", 8, "expected a whole number" },
        { "{" TENSOR("a", "F32", "[-2]", "0", "8") "}", 8, "expected a whole number that is not negative" },
        { "{" TENSOR("a", "F32", "[2.0]", "0", "8") "}", 8, "expected ','" },
        { "{" TENSOR("a", "F32", "[02]", "0", "8") "}", 8, "the number begins with 0" },
        { "{" TENSOR("a", "F32", "[99999999999999999999]", "0", "8") "}", 8, "the number is too large" },
        { "{" TENSOR("a", "F32", "[4294967296,4294967296]", "0", "0") "}", 0, "the shape is too large" },
        { "{" TENSOR("a", "F32", "[4611686018427387904]", "0", "0") "}", 0, "the shape is too large" },
        { "{" TENSOR("a", "F32", "[1,1,1,1,1,1,1,1,1]", "0", "4") "}", 4, "more numbers than expected" },
        { "{" TENSOR("\\u001b[2J\xff", "F33", "[2]", "1", "2") "}", 2, "tensor \\x1b[2J\\xff: its data" },
        { "{" TENSOR("a", "F32", "[2]", "0", "8,9") "}", 8, "more numbers than expected" },
        { "{" TENSOR("a", "F33", "[2305843009213693952]", "0", "0") "}", 0, "data_offsets do not fit" },
        { "{" TENSOR("a", "F32", "[2]", "8", "0") "}", 8, "data_offsets do not fit" },
        { "{" TENSOR("a", "F32", "[2]", "0", "8") "}", 7,
          "x.safetensors: is truncated, holds 69 of 70 bytes" },
        { "{" TENSOR("a", "U8", "[9000000000000000000]", "0", "9000000000000000000") "," TENSOR("b", "U8",
              "[1]", "0", "1") "}", 9, "is truncated, holds " },
        { "{" TENSOR("a", "F32", "[3]", "0", "8") "}", 8, "data_offsets do not fit" },
        { "{" TENSOR("a", "F32", "[2]", "0", "8") "}", 9, "1 bytes at its end belong to no tensor" },
        { "{" TENSOR("a", "F32", "[2]", "1", "9") "}", 9, "tensor a: its data leave a gap" },
        { "{" TENSOR("a", "U8", "[4]", "0", "4") "," TENSOR("b", "U8", "[4]", "3", "7") "}", 7,
          "tensor b: its data overlap" },
        { "{" TENSOR("a", "U8", "[4]", "0", "4") "," TENSOR("b", "U8", "[4]", "0", "4") "}", 4, "overlap" },
        { "{" TENSOR("a", "U8", "[4]", "0", "4") "," TENSOR("a", "U8", "[4]", "4", "8") "}", 8,
          "the name a is there twice" },
        { "{" TENSOR("a", "U8", "[4]", "0", "4") "," TENSOR("\\u0061", "U8", "[4]", "4", "8") "}", 8,
          "the name a is there twice" },
        { "{\"__metadata__\":{\"k\":\"1\",\"k\":\"2\"}}", 0, "the name k is there twice" },
        { "{\"__metadata__\":{\"k\":1}}", 0, "expected '\"'" },
        { "{\"__metadata__\":{},\"__metadata__\":{}}", 0, "a second __metadata__" },
        { "{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\"}}", 0, "each of dtype, shape and data_offsets once" },
        { "{\"a\":{\"dtype\":\"U8\",\"more\":1}}", 0, "each of dtype, shape and data_offsets once" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0]}}", 0, "two data_offsets" },
    };
    TensorFile file;
    for (size_t i = 0; i < sizeof headers / sizeof headers[0]; i++) {
        int status = parse_text(headers[i].header, headers[i].data_size, &file);
        CHECK((status == 0) == (headers[i].message == NULL), "%s: %s", headers[i].header,
              status ? error.text : "accepted");
        if (status == 0) {
            const char *value = tensors_metadata(&file, "a");
            if (value != NULL) CHECK(strcmp(value, "\xc3\xa9\xe2\x82\xac\n") == 0, "escapes");
            tensors_free(&file);
        } else if (headers[i].message != NULL) {
            CHECK_MESSAGE(headers[i].message);
            CHECK_MESSAGE("x.safetensors: ");
        }
    }
    REFUSED(tensors_parse(copy_of("\0\1\2", 3), "x", &file, &error),
            "x: holds 3 bytes, expected a safetensors file");
    REFUSED(tensors_parse(copy_of("\x10\0\0\0\0\0\0\0{}", 10), "x", &file, &error),
            "x: is truncated, holds 2 of the 16 bytes of its header");
    REFUSED(tensors_parse(copy_of(gzip_stored, sizeof gzip_stored), "x", &file, &error),
            "x: is a gzip file, expected a safetensors file");
    REFUSED(tensors_parse(copy_of("\2\0\0\0\0\0\0\0{x", 10), "a\x1b]0;b\xff", &file, &error),
            "a\\x1b]0;b\\xff: ");
    REFUSED(tensors_parse(copy_of("PK\3\4\x14\0\0\0\x08\0", 10), "x", &file, &error),
            "x: is a ZIP file, expected a safetensors file");
    REFUSED(tensors_parse(copy_of("\x10\0\0\0\0\0\0\xff{}", 10), "x", &file, &error),
            "bytes, expected at most 100000000");
}

int main(void) {
    static const char *const elsewhere[2] = { "MNIST_DIR", "FUZZ_SEEDS" };
    for (int i = 0; i < 2; i++) {
        char path[4096];
        const char *where = getenv(elsewhere[i]);
        if (where != NULL && realpath(where, path) != NULL) setenv(elsewhere[i], path, 1);
    }
    if (mkdtemp(directory) == NULL || chdir(directory) != 0) {
        perror(directory);
        return 1;
    }
    static void (*const tests[])(void) = {
        test_file_replace, test_out_of_memory, test_open, test_digest, test_gzip, test_images,
        test_animation, test_npy, test_points, test_chart, test_idx, test_cifar, test_digits, test_swirl,
        test_shuffle, test_mnist, test_tensors, test_tensor_headers};
    for (size_t i = 0; i < sizeof tests / sizeof tests[0]; i++)
        tests[i]();

    DIR *stream = opendir(directory);
    for (struct dirent *entry; stream != NULL && (entry = readdir(stream)) != NULL;)
        if (entry->d_name[0] != '.') unlink(entry->d_name);
    if (stream != NULL) closedir(stream);
    CHECK(rmdir(directory) == 0, "%s: %s", directory, strerror(errno));
    return test_report();
}
