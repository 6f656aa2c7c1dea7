/* tensor.c - floor 1: errors, memory, random numbers, and the loops that do the arithmetic.
 *
 * Nothing here knows of graphs, networks or diffusion. The loops are plain C: constant bounds innermost, so
 * that the compiler keeps them in vector registers. There are no intrinsics and no assembly, and there will
 * be none. */

#define _POSIX_C_SOURCE 200809L

#include "diffenc.h"

#include <assert.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- what the compiler is told ---- */

/* The block of c held in registers: BLOCK_ROWS rows of two vectors of LANES numbers each. Twelve rows make 24
 * accumulators of AVX-512's 32 registers, six rows 12 of AVX's or SSE's 16. Other machines (NEON: 32
 * registers of 16 bytes) get the last choice too. */
#if defined __AVX512F__
enum { LANES = 64 / sizeof(real), BLOCK_ROWS = 12 };
#elif defined __AVX__
enum { LANES = 32 / sizeof(real), BLOCK_ROWS = 6 };
#else
enum { LANES = 16 / sizeof(real), BLOCK_ROWS = 6 };
#endif

/* A function whose loops are fast only with the constants of its call: gcc wants to be told to inline it. */
#ifdef __GNUC__
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

/* ---- errors ---- */

/* Bytes of the printable UTF-8 character at `text`; 0 if there is none: what is longer than it need be, a
 * surrogate (RFC 3629) or a control character. */
static size_t character_length(const char *text) {
    static const uint32_t least[5] = {0, 0x20, 0xa0, 0x800, 0x10000};
    const unsigned char *u = (const unsigned char *)text;
    const size_t length = *u < 0x80 ? 1 : *u < 0xc0 ? 0 : *u < 0xe0 ? 2 : *u < 0xf0 ? 3 : *u < 0xf8 ? 4 : 0;
    uint32_t code = length == 1 ? *u : *u & 0x7f >> length;
    for (size_t i = 1; i < length; i++) {
        if (u[i] >> 6 != 2)
            return 0;
        code = code << 6 | (u[i] & 0x3f);
    }
    return code < least[length] || code == 0x7f || code >> 11 == 0x1b || code > 0x10ffff ? 0 : length;
}

const char *printable(const char *text, char *buffer, size_t size) {
    size_t at = 0;
    while (*text) {
        const size_t length = character_length(text), shown = length ? length : 4;
        char escape[8];
        snprintf(escape, sizeof escape, "\\x%02x", (unsigned char)*text);
        if (at + shown >= size)
            break;
        memcpy(buffer + at, length ? text : escape, shown);
        at += shown;
        text += length ? length : 1;
    }
    buffer[at] = '\0';
    return buffer;
}

int fail(Error *error, const char *format, ...) {
    char text[sizeof error->text];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    printable(text, error->text, sizeof error->text);
    return -1;
}

/* ---- memory ---- */

static void out_of_memory(size_t count, size_t size) {
    fprintf(stderr, "diffenc: out of memory: %.1f MiB more were needed\n",
            (double)count * (double)size / (1024.0 * 1024.0));
    exit(1);
}

void *allocate(size_t count, size_t size) {
    const size_t bytes = count * size;
    void *memory = size && count > SIZE_MAX / 2 / size ? NULL : malloc(bytes > 0 ? bytes : 1);
    if (!memory)
        out_of_memory(count, size);
    return memory;
}

void *allocate_zeroed(size_t count, size_t size) {
    void *memory = calloc(count ? count : 1, size ? size : 1);
    if (!memory)
        out_of_memory(count, size);
    return memory;
}

enum { ALIGNMENT = 64 };
static const size_t FIRST_BLOCK = (size_t)1 << 20;   /* bytes; each further block doubles what there is */

typedef struct Block Block;
struct Block {
    Block *next;
    size_t size, used;   /* bytes of `data` */
    char *data;          /* aligned to ALIGNMENT, inside this same allocation */
};

struct Arena {
    Block *first, *current;
    size_t capacity;
    int parts;       /* that work is divided into where it can be; 0 or 1: it is not */
    Arena *helper;   /* of the next part, or NULL */
};

Arena *arena_new(void) { return allocate_zeroed(1, sizeof(Arena)); }

void arena_free(Arena *arena) {
    for (Block *block = arena ? arena->first : NULL, *next; block; block = next) {
        next = block->next;
        free(block);
    }
    if (arena)
        arena_free(arena->helper);
    free(arena);
}

void *arena_allocate(Arena *arena, size_t count, size_t size) {
    if (size && count > SIZE_MAX / 4 / size)
        out_of_memory(count, size);
    size_t bytes = (count * size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    Block *block = arena->current;
    /* Blocks behind the current one are left from an earlier pass and empty; the first that is large enough
     * serves. The same sequence of requests therefore finds the same blocks again. */
    while (block && block->used + bytes > block->size && block->next) {
        block = block->next;
        block->used = 0;
    }
    if (!block || block->used + bytes > block->size) {
        size_t wanted = arena->capacity > FIRST_BLOCK ? arena->capacity : FIRST_BLOCK;
        wanted = bytes > wanted ? bytes : wanted;
        Block *fresh = allocate(1, sizeof(Block) + ALIGNMENT + wanted);
        char *data = (char *)(fresh + 1);
        data += (ALIGNMENT - (uintptr_t)data % ALIGNMENT) % ALIGNMENT;
        *fresh = (Block){.size = wanted, .data = data};
        *(block ? &block->next : &arena->first) = fresh;
        arena->capacity += wanted;
        block = fresh;
    }
    arena->current = block;
    void *memory = block->data + block->used;
    block->used += bytes;
    return memory;
}

ArenaMark arena_mark(const Arena *arena) {
    return (ArenaMark){arena->current, arena->current ? arena->current->used : 0};
}

void arena_release(Arena *arena, ArenaMark mark) {
    arena->current = mark.block ? mark.block : arena->first;
    if (arena->current)
        arena->current->used = mark.used;
}

void arena_reset(Arena *arena) { arena_release(arena, (ArenaMark){NULL, 0}); }

size_t arena_capacity(const Arena *arena) { return arena->capacity; }

/* ---- work on several threads ---- */

void arena_divide(Arena *arena, int parts) {
    arena->parts = parts;
    for (; parts > 1; parts--, arena = arena->helper)
        if (!arena->helper)
            arena->helper = arena_new();
}

/* Tasks, because a thread that waits for them does those that nobody has begun: on a busy machine it would
 * otherwise wait until the system lets the others run, at each of the hundred calls that a network makes. */
void in_parts(PartWork *work, const void *context, int count, Arena *scratch) {
    const int wanted = scratch->parts, parts = wanted < count ? wanted : count;
    if (parts < 2) {
        work(context, 0, count, scratch);
        return;
    }
    Arena *own = scratch;
    scratch->parts = 1;   /* what a part calls is not divided again */
    for (int i = 0; i < parts; i++, own = own->helper) {
        const int first = (int)((int64_t)count * i / parts), end = (int)((int64_t)count * (i + 1) / parts);
#pragma omp task if (i < parts - 1) firstprivate(work)
        work(context, first, end, own);
    }
#pragma omp taskwait
    scratch->parts = wanted;
}

/* ---- random numbers ---- */

/* Philox4x32-10 [Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011]: the multipliers of
 * their table 2, and the steps of the key, golden ratio and sqrt 3 - 1. */
enum { PHILOX_ROUNDS = 10, PHILOX_LANES = 16 };
static const uint32_t PHILOX_M0 = 0xD2511F53u, PHILOX_M1 = 0xCD9E8D57u;
static const uint32_t PHILOX_W0 = 0x9E3779B9u, PHILOX_W1 = 0xBB67AE85u;

RandomStream random_stream(uint64_t seed, RandomPurpose purpose, uint32_t step, uint32_t example) {
    return (RandomStream){seed, (uint32_t)purpose, step, example};
}

/* The 4 numbers of each of `lanes` blocks, side by side, so that the rounds run in vector registers where
 * there are many: block b has those at positions 4b .. 4b+3. */
INLINE void random_blocks(RandomStream s, uint32_t block, const int lanes, uint32_t c[4][PHILOX_LANES]) {
    uint32_t k0 = (uint32_t)s.seed, k1 = (uint32_t)(s.seed >> 32);
    for (int l = 0; l < lanes; l++)
        c[0][l] = block + (uint32_t)l, c[1][l] = s.example, c[2][l] = s.step, c[3][l] = s.purpose;
    for (int round = 0; round < PHILOX_ROUNDS; round++, k0 += PHILOX_W0, k1 += PHILOX_W1)
        for (int l = 0; l < lanes; l++) {
            const uint64_t p0 = (uint64_t)PHILOX_M0 * c[0][l], p1 = (uint64_t)PHILOX_M1 * c[2][l];
            c[0][l] = (uint32_t)(p1 >> 32) ^ c[1][l] ^ k0, c[1][l] = (uint32_t)p1;
            c[2][l] = (uint32_t)(p0 >> 32) ^ c[3][l] ^ k1, c[3][l] = (uint32_t)p0;
        }
}

uint32_t random_bits(RandomStream stream, uint32_t position) {
    uint32_t c[4][PHILOX_LANES];
    random_blocks(stream, position / 4, 1, c);
    return c[position % 4][0];
}

/* 53 of 64 bits as a number in [0, 1). */
static double uniform_of(uint32_t high, uint32_t low) {
    return (double)((((uint64_t)high << 32) | low) >> 11) * (1.0 / 9007199254740992.0);
}

double random_uniform(RandomStream stream, uint32_t position) {
    uint32_t c[4][PHILOX_LANES];
    random_blocks(stream, position / 2, 1, c);
    return position % 2 ? uniform_of(c[2][0], c[3][0]) : uniform_of(c[0][0], c[1][0]);
}

void random_normal(RandomStream stream, real *out, size_t count) {
    const double two_pi = 6.283185307179586;
    for (size_t i = 0; i < count; i += 2) {
        uint32_t c[4][PHILOX_LANES];
        random_blocks(stream, (uint32_t)(i / 2), 1, c);
        double radius = sqrt(-2 * log(1 - uniform_of(c[0][0], c[1][0])));   /* 1 - u lies in (0, 1] */
        double angle = two_pi * uniform_of(c[2][0], c[3][0]);
        out[i] = (real)(radius * cos(angle));
        if (i + 1 < count)
            out[i + 1] = (real)(radius * sin(angle));
    }
}

void random_dropout(RandomStream s, uint32_t first, size_t count, double rate, real *factor) {
    /* A block gives eight numbers of 16 bits. */
    const uint32_t threshold = (uint32_t)(rate * 65536 + 0.5);
    const real kept = (real)(65536.0 / (65536.0 - threshold));
    assert(first % DROPOUT_RUN == 0 && DROPOUT_RUN == 8 * PHILOX_LANES);
    for (size_t done = 0; done < count; done += DROPOUT_RUN) {
        uint32_t c[4][PHILOX_LANES];
        random_blocks(s, first / 8 + (uint32_t)(done / 8), PHILOX_LANES, c);
        real made[8][PHILOX_LANES];   /* in this order: it is part of what a seed means */
        for (int w = 0; w < 4; w++)
            for (int l = 0; l < PHILOX_LANES; l++) {
                made[2 * w][l] = (c[w][l] & 0xFFFF) < threshold ? 0 : kept;
                made[2 * w + 1][l] = (c[w][l] >> 16) < threshold ? 0 : kept;
            }
        const size_t left = count - done < DROPOUT_RUN ? count - done : DROPOUT_RUN;
        memcpy(factor + done, made, left * sizeof(real));
    }
}

/* ---- exp ---- */

/* exp(x) that vectorises: within 2e-7 in float, where x is clamped to [-87, 88]; libm's in double. exp(x) =
 * 2^n exp(r), n the integer nearest to x/log 2, |r| <= log(2)/2, exp(r) by a polynomial of degree 6 (Cephes'
 * coefficients). Adding and subtracting 1.5 * 2^23 rounds to an integer without a call, and leaves n in the
 * low bits of the sum, from where it is shifted into an exponent. */
INLINE real fast_exp(real x) {
#ifdef DIFFENC_DOUBLE
    return exp(x);
#else
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f, power;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;
    memcpy(&power, &bits, sizeof power);
    return p * power;
#endif
}

/* ---- matrix products ---- */

/* The one loop under every convolution and matrix product, forward and backward. For each line
 *
 *     c(i, j) = bias[j] + start(i, j) + sum over s < segments, k < inner of  a(s, i, k) b(s, k, j)
 *
 * Line l begins at a + l*a_line, its row i lies i*a_row further on, and of that the element (s, k)
 * s*a_segment + k*a_inner; b and c likewise. Rows of `a` or b may overlap: that makes a 3x3 convolution of an
 * image with a border of zeros a plain product. */
typedef struct {
    int lines, rows, columns, segments, inner;
    const real *a, *b;
    ptrdiff_t a_line, a_row, a_segment, a_inner;
    ptrdiff_t b_line, b_segment, b_inner;
    const real *bias;    /* [columns], or NULL */
    const real *start;   /* laid out like c, or NULL; c itself: add to c */
    real *c;
    ptrdiff_t c_line, c_row;
} Product;

/* R rows x N columns of c, of which `width` are stored. R and N are constants where this is called, and each
 * pair gets a copy of the loops with the sums in registers; simd, else gcc takes such short loops apart. The
 * pointers lead to the block's own first elements. They are arguments, because clang keeps the sums in memory
 * where they are members of *p. */
INLINE void block_product(const int R, const int N, const int width, const Product *p, const real *a,
                          const real *b, ptrdiff_t b_segment, ptrdiff_t b_inner, const real *bias,
                          const real *start, real *c) {
    real sum[BLOCK_ROWS][2 * LANES];
    for (int r = 0; r < R; r++)
#pragma omp simd
        for (int n = 0; n < N; n++)
            sum[r][n] = 0;
    const ptrdiff_t a_row = p->a_row, a_inner = p->a_inner;
    const int stored = width < N ? width : N;
    for (int s = 0; s < p->segments; s++) {
        const real *ak = a + s * p->a_segment, *bk = b + s * b_segment;
        for (int k = 0; k < p->inner; k++, ak += a_inner, bk += b_inner)
            for (int r = 0; r < R; r++)
#pragma omp simd
                for (int n = 0; n < N; n++)
                    sum[r][n] += ak[r * a_row] * bk[n];
    }
    for (int r = 0; r < R; r++) {
        if (bias)
#pragma omp simd
            for (int n = 0; n < stored; n++)
                sum[r][n] += bias[n];
        if (start)
#pragma omp simd
            for (int n = 0; n < stored; n++)
                sum[r][n] += start[r * p->c_row + n];
#pragma omp simd
        for (int n = 0; n < stored; n++)
            c[r * p->c_row + n] = sum[r][n];
    }
}

/* R rows: choose the copy of the loops. */
static void block_rows(int R, int width, const Product *p, const real *a, const real *b, ptrdiff_t b_segment,
                       ptrdiff_t b_inner, const real *bias, const real *start, real *c) {
#define CASE(r)                                                                                      \
    case r:                                                                                          \
        if (width == 2 * LANES)                                                                      \
            block_product(r, 2 * LANES, 2 * LANES, p, a, b, b_segment, b_inner, bias, start, c);     \
        else if (width == LANES)                                                                     \
            block_product(r, LANES, LANES, p, a, b, b_segment, b_inner, bias, start, c);             \
        else if (width == LANES / 2)                                                                 \
            block_product(r, LANES / 2, LANES / 2, p, a, b, b_segment, b_inner, bias, start, c);     \
        else                                                                                         \
            block_product(r, LANES, width, p, a, b, b_segment, b_inner, bias, start, c);             \
        break;
    switch (R) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if defined __AVX512F__
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
#undef CASE
}

/* b [segments, inner, width] in whole vectors, zeros behind its columns. */
static void copy_to_vectors(const Product *p, int width, const real *b, real *copy) {
    for (int s = 0; s < p->segments; s++)
        for (int k = 0; k < p->inner; k++, copy += LANES)
            for (int n = 0; n < LANES; n++)
                copy[n] = n < width ? b[s * p->b_segment + k * p->b_inner + n] : 0;
}

/* Blocks of rows, nearly equal in height: 28 = 10 + 9 + 9. */
static int blocks_of(const Product *p) { return (p->rows + BLOCK_ROWS - 1) / BLOCK_ROWS; }

/* Blocks first..end-1 of all lines. */
static void product_part(const void *product, int first, int end, Arena *scratch) {
    const Product *p = product;
    const int blocks = blocks_of(p);
    const int least = p->rows / blocks, higher = p->rows % blocks;
    const ArenaMark mark = arena_mark(scratch);
    for (int j = 0, width; j < p->columns; j += width) {
        const int left = p->columns - j;
        width = left >= 2 * LANES ? 2 * LANES : left >= LANES ? LANES : left;
        /* The last columns need a copy, unless rows of b are known to go on. */
        const int partial = width < LANES && width != LANES / 2 && p->b_inner < j + LANES;
        const size_t copied = partial ? (size_t)p->segments * p->inner * LANES : 0;
        real *copy = arena_allocate(scratch, copied, sizeof(real));
        const ptrdiff_t b_segment = partial ? p->inner * LANES : p->b_segment;
        const ptrdiff_t b_inner = partial ? LANES : p->b_inner;
        for (int line = 0, number = 0; line < p->lines; line++) {
            const real *b = p->b + line * p->b_line + j;
            if (partial && (line == 0 || p->b_line))
                copy_to_vectors(p, width, b, copy);
            for (int block = 0, i = 0, height; block < blocks; block++, i += height, number++) {
                height = least + (block < higher);
                if (number < first || number >= end)
                    continue;
                const ptrdiff_t at = line * p->c_line + i * p->c_row + j;
                block_rows(height, width, p, p->a + line * p->a_line + i * p->a_row, partial ? copy : b,
                           b_segment, b_inner, p->bias ? p->bias + j : NULL, p->start ? p->start + at : NULL,
                           p->c + at);
            }
        }
    }
    arena_release(scratch, mark);
}

static void product(const Product *p, Arena *scratch) {
    in_parts(product_part, p, p->lines * blocks_of(p), scratch);
}

void matrix_product(int rows, int inner, int columns, const real *a, const real *b, const real *bias,
                    const real *start, real *c, Arena *scratch) {
    const Product p = {.lines = 1, .rows = rows, .columns = columns, .segments = 1, .inner = inner,
                       .a = a, .a_row = inner, .a_inner = 1, .b = b, .b_inner = columns, .bias = bias,
                       .start = start, .c = c, .c_row = columns};
    product(&p, scratch);
}

void matrix_product_transposed(int rows, int inner, int columns, const real *a, const real *b, real *c,
                               Arena *scratch) {
    const Product p = {.lines = 1, .rows = inner, .columns = columns, .segments = 1, .inner = rows,
                       .a = a, .a_row = 1, .a_inner = inner, .b = b, .b_inner = columns, .start = c,
                       .c = c, .c_row = columns};
    product(&p, scratch);
}

void transpose(const real *a, int rows, int columns, real *out) {
    enum { SIDE = 16 };   /* of a square, in which reads and writes both use whole cache lines */
    for (int i0 = 0; i0 < rows; i0 += SIDE)
        for (int j0 = 0; j0 < columns; j0 += SIDE)
            for (int j = j0; j < columns && j < j0 + SIDE; j++)
                for (int i = i0; i < rows && i < i0 + SIDE; i++)
                    out[(size_t)j * rows + i] = a[(size_t)i * columns + j];
}

/* ---- convolution ---- */

/* x [h, w, c] in an image of zeros, of which these are `rows` lines of `columns` pixels from line `top` on:
 * x begins in line 0, behind `border` pixels. */
static real *in_zeros(int h, int w, int c, const real *x, int border, int top, int rows, int columns,
                      Arena *scratch) {
    const size_t line = (size_t)columns * c, left = (size_t)border * c;
    real *image = arena_allocate(scratch, rows * line, sizeof(real)), *to = image;
    for (int i = top; i < top + rows; i++, to += line) {
        const size_t filled = i >= 0 && i < h ? (size_t)w * c : 0;
        memset(to, 0, left * sizeof(real));
        if (filled)
            memcpy(to + left, x + i * filled, filled * sizeof(real));
        memset(to + left + filled, 0, (line - left - filled) * sizeof(real));
    }
    return image;
}

/* Few output channels would leave most of a vector empty. So `group` neighbouring pixels of a line are then
 * computed as one pixel of group*out channels. Its kernel [3, 2 + group, in, LANES] holds each pixel's nine
 * taps, with zeros around them. */
static int pixels_in_group(int w, int out) {
    int group = 1;
    for (int size = 2; size * out <= LANES; size++)
        group = w % size == 0 ? size : group;
    return group;
}

static real *widened_kernel(int group, int in, int out, const real *kernel, Arena *scratch) {
    const size_t count = (size_t)3 * (2 + group) * in * LANES;
    real *wide = arena_allocate(scratch, count, sizeof(real));
    memset(wide, 0, count * sizeof(real));
    for (int tap = 0; tap < 9; tap++)
        for (int c = 0; c < in; c++, kernel += out)
            for (int pixel = 0; pixel < group; pixel++) {
                real *to = wide + (((size_t)tap / 3 * (2 + group) + tap % 3 + pixel) * in + c) * LANES;
                for (int o = 0; o < out; o++)
                    to[pixel * out + o] = kernel[o];
            }
    return wide;
}

/* y[i][j][o] = sum over ky, kx, c of image[i+ky][j+kx][c] kernel[ky][kx][c][o], where `image` is x with a
 * border one wide. The rows are a column of pixels, and a segment is one line of the kernel: the 3*in inputs
 * under it are contiguous. */
void convolve3x3(int h, int w, int in, int out, const real *x, const real *kernel, const real *bias,
                 const real *start, real *y, Arena *scratch) {
    const ArenaMark mark = arena_mark(scratch);
    const int group = pixels_in_group(w, out), inner = (2 + group) * in, columns = group * out;
    const ptrdiff_t line = (ptrdiff_t)(w + 2) * in, b_inner = group > 1 ? LANES : out;
    real *all_bias = arena_allocate(scratch, (size_t)columns, sizeof(real));
    for (int i = 0; bias && i < columns; i++)
        all_bias[i] = bias[i % out];
    const Product p = {.lines = w / group, .rows = h, .columns = columns, .segments = 3, .inner = inner,
                       .a = in_zeros(h, w, in, x, 1, -1, h + 2, w + 2, scratch), .a_line = group * in,
                       .a_row = line, .a_segment = line, .a_inner = 1,
                       .b = group > 1 ? widened_kernel(group, in, out, kernel, scratch) : kernel,
                       .b_segment = inner * b_inner, .b_inner = b_inner, .bias = bias ? all_bias : NULL,
                       .start = start, .c = y, .c_line = columns, .c_row = (ptrdiff_t)w * out};
    product(&p, scratch);
    arena_release(scratch, mark);
}

/* dkernel[ky][kx][c][o] += sum over i, j of image[i+ky][j+kx][c] dy[i][j][o]: a line is one ky, a row one
 * (kx, c), and a segment of the sum one line of the image. Where the outputs are few, they are the rows, and
 * (kx, c) the columns, which fill vectors. */
void convolve3x3_by_kernel(int h, int w, int in, int out, const real *x, const real *dy, real *dkernel,
                           Arena *scratch) {
    const ArenaMark mark = arena_mark(scratch);
    const int few = out < LANES, taps = 3 * in;
    const ptrdiff_t line = (ptrdiff_t)(w + 2) * in, size = (ptrdiff_t)taps * out;
    const real *image = in_zeros(h, w, in, x, 1, -1, h + 2, w + 2, scratch);
    real *made = few ? arena_allocate(scratch, (size_t)(3 * size), sizeof(real)) : dkernel;
    Product p = {.lines = 3, .rows = taps, .columns = out, .segments = h, .inner = w, .a = image,
                 .a_line = line, .a_row = 1, .a_segment = line, .a_inner = in, .b = dy,
                 .b_segment = (ptrdiff_t)w * out, .b_inner = out, .start = dkernel, .c = dkernel,
                 .c_line = size, .c_row = out};
    if (few)
        p = (Product){.lines = 3, .rows = out, .columns = taps, .segments = h, .inner = w, .a = dy,
                      .a_row = 1, .a_segment = (ptrdiff_t)w * out, .a_inner = out, .b = image,
                      .b_line = line, .b_segment = line, .b_inner = in, .c = made, .c_line = size,
                      .c_row = taps};
    product(&p, scratch);
    for (int ky = 0; few && ky < 3; ky++, dkernel += size)
        for (int o = 0; o < out; o++, made += taps)
            for (int k = 0; k < taps; k++)
                dkernel[k * out + o] += made[k];
    arena_release(scratch, mark);
}

void transpose_kernel(int taps, int in, int out, const real *kernel, real *transposed) {
    for (int t = 0; t < taps; t++)
        transpose(kernel + (size_t)t * in * out, in, out, transposed + (size_t)(taps - 1 - t) * in * out);
}

/* ---- group normalisation ---- */

static const double GROUP_NORM_EPS = 1e-6;

/* An image as the loops see it: two rows are joined into one, again and again, until it has LONG_ROW columns
 * or the number of rows is odd. Then few channels fill vectors too, and the sums over the rows run in so
 * many columns side by side that none waits for itself. Arrays [columns] hold what belongs to a channel,
 * again for each position of a row. */
enum { LONG_ROW = 4 * LANES };
typedef struct {
    const GroupNorm *n;
    const real *x;
    int rows, columns;
    size_t count;
    real *mean, *rstd;          /* [columns], of the channel's group */
    real *gain, *offset;        /* [columns]: u = scale xhat + bias = gain x + offset */
    real *scale, *zero, *one;   /* [columns] */
    real *y;                    /* group_norm's result */
    Arena *scratch;
} Norm;

static real *per_column(const Norm *t) {
    return arena_allocate(t->scratch, (size_t)t->columns, sizeof(real));
}

/* What was found out for each channel holds in the further columns of the row as well. */
static real *repeated(const Norm *t, real *array) {
    const int channels = t->n->channels;
    for (int c = channels; c < t->columns; c += channels)
        memcpy(array + c, array, channels * sizeof(real));
    return array;
}

/* Per channel, over all positions: sum of u - u_shift and sum_product of (u - u_shift)(w - w_shift). u, w
 * [rows, columns], shifts [columns]; sum and sum_product need [columns], of which the first `channels` are
 * the result. */
static void channel_sums(const Norm *t, const real *u, const real *u_shift, const real *w,
                         const real *w_shift, real *restrict sum, real *restrict sum_product) {
    const int columns = t->columns, channels = t->n->channels;
    memset(sum, 0, columns * sizeof(real));
    memset(sum_product, 0, columns * sizeof(real));
    for (int i = 0; i < t->rows; i++, u += columns, w += columns)
#pragma omp simd
        for (int c = 0; c < columns; c++) {
            const real d = u[c] - u_shift[c];
            sum[c] += d;
            sum_product[c] += d * (w[c] - w_shift[c]);
        }
    for (int first = channels; first < columns; first += channels)
        for (int c = 0; c < channels; c++) {
            sum[c] += sum[first + c];
            sum_product[c] += sum_product[first + c];
        }
}

/* [columns]: the mean, over the group of the channel, of what has these sums per channel, times their
 * weights. */
static real *group_means(const Norm *t, const real *weight, const real *sum) {
    const int width = t->n->channels / t->n->groups;
    real *mean = per_column(t);
    for (int first = 0; first < t->n->channels; first += width) {
        double total = 0;
        for (int c = first; c < first + width; c++)
            total += (double)weight[c] * (double)sum[c];
        for (int c = first; c < first + width; c++)
            mean[c] = (real)(total / ((double)t->n->positions * width));
    }
    return repeated(t, mean);
}

/* Mean and variance in one pass over the distances to a number close to the mean, so that no digits are lost
 * in the difference of large sums. That number is the mean of a few positions, because a single one could be
 * an outlier. */
static void group_statistics(const Norm *t) {
    enum { SAMPLES = 16 };
    const GroupNorm *n = t->n;
    const int C = n->channels, width = C / n->groups;
    const double count = (double)n->positions * width;
    real *sum = per_column(t), *squares = per_column(t), *near = per_column(t);
    memset(near, 0, C * sizeof(real));
    for (size_t s = 0; s < SAMPLES; s++)
        for (int c = 0; c < C; c++)
            near[c] += t->x[s * n->positions / SAMPLES * C + c] / SAMPLES;
    channel_sums(t, t->x, repeated(t, near), t->x, near, sum, squares);
    for (int g = 0; g < n->groups; g++) {
        double mean = 0, variance = 0;
        for (int c = g * width; c < (g + 1) * width; c++)
            mean += sum[c] + (double)near[c] * n->positions;
        mean /= count;
        for (int c = g * width; c < (g + 1) * width; c++) {
            const double shift = near[c] - mean;
            variance += squares[c] + 2 * shift * sum[c] + shift * shift * n->positions;
        }
        n->mean[g] = (real)mean;
        n->rstd[g] = (real)(1 / sqrt(variance / count + GROUP_NORM_EPS));
    }
}

static Norm norm_of(const GroupNorm *n, const real *x, int with_statistics, Arena *scratch) {
    assert(n->groups > 0 && n->channels > 0 && n->channels % n->groups == 0);
    Norm t = {.n = n, .x = x, .rows = n->positions, .columns = n->channels, .scratch = scratch,
              .count = (size_t)n->positions * n->channels};
    for (; t.columns < LONG_ROW && t.rows % 2 == 0; t.rows /= 2)
        t.columns *= 2;
    if (with_statistics)
        group_statistics(&t);
    t.mean = per_column(&t), t.rstd = per_column(&t), t.gain = per_column(&t), t.offset = per_column(&t);
    t.scale = per_column(&t), t.zero = per_column(&t), t.one = per_column(&t);
    for (int c = 0, width = n->channels / n->groups; c < n->channels; c++) {
        t.mean[c] = n->mean[c / width];
        t.rstd[c] = n->rstd[c / width];
        t.scale[c] = n->scale[c];
        t.gain[c] = t.rstd[c] * t.scale[c];
        t.offset[c] = n->bias[c] - t.mean[c] * t.gain[c];
        t.zero[c] = 0;
        t.one[c] = 1;
    }
    real *const arrays[] = {t.mean, t.rstd, t.scale, t.gain, t.offset, t.zero, t.one};
    for (int i = 0; i < 7; i++)
        repeated(&t, arrays[i]);
    return t;
}

/* The derivative of xhat by x, a symmetric linear map: it takes tangents forward and gradients back. Means
 * are over the group.
 *
 *     J v = rstd (v - mean(v) - xhat mean(xhat v)) = rstd v + slope x + offset */
typedef struct {
    real *slope, *offset;        /* [columns], for J's argument v times `weight` */
    real *sum, *sum_xhat;        /* [channels], over the positions, of v and of xhat v */
    real *mean, *mean_xhat;      /* [columns], of weight v and of xhat weight v */
} Jacobian;

static Jacobian jacobian(const Norm *t, const real *weight, const real *v) {
    Jacobian j = {per_column(t), per_column(t), per_column(t), per_column(t), NULL, NULL};
    channel_sums(t, v, t->zero, t->x, t->mean, j.sum, j.sum_xhat);
    for (int c = 0; c < t->n->channels; c++)
        j.sum_xhat[c] *= t->rstd[c];
    j.mean = group_means(t, weight, j.sum);
    j.mean_xhat = group_means(t, weight, j.sum_xhat);
    for (int c = 0; c < t->columns; c++) {
        j.slope[c] = -t->rstd[c] * t->rstd[c] * j.mean_xhat[c];
        j.offset[c] = -t->rstd[c] * j.mean[c] - j.slope[c] * t->mean[c];
    }
    return j;
}

/* swish(u) = u s and its derivatives, s = sigmoid(u), times v. */
INLINE real sigmoid(real u) { return 1 / (1 + fast_exp(-u)); }
INLINE real swish_of_u(real u, real v) {
    (void)v;
    return u * sigmoid(u);
}
INLINE real times_slope(real u, real v) {
    const real s = sigmoid(u);
    return v * s * (1 + u * (1 - s));
}
INLINE real times_curve(real u, real v) {
    const real s = sigmoid(u);
    return v * s * (1 - s) * (2 + u * (1 - 2 * s));
}

/* to = f(u, v) of images u and v. f is a constant where this is called. */
INLINE void of_u(const Norm *t, real f(real u, real v), const real *v, real *to) {
    for (size_t at = 0; at < t->count; at += t->columns)
#pragma omp simd
        for (int c = 0; c < t->columns; c++)
            to[at + c] = f(t->gain[c] * t->x[at + c] + t->offset[c], v[at + c]);
}

/* to = p v + q w + r with images v and w, or added to what is there. to: NULL if nobody wants it */
INLINE void combine(const Norm *t, const int added, const real *p, const real *v, const real *q,
                    const real *w, const real *r, real *to) {
    for (size_t at = 0; to && at < t->count; at += t->columns)
#pragma omp simd
        for (int c = 0; c < t->columns; c++)
            to[at + c] = p[c] * v[at + c] + q[c] * w[at + c] + r[c] + (added ? to[at + c] : 0);
}

static void multiply(size_t count, const real *factor, real *to) {
    for (size_t i = 0; factor && i < count; i++)
        to[i] *= factor[i];
}

/* The rows first..end-1 of y. */
static void norm_rows(const void *norm, int first, int end, Arena *scratch) {
    Norm t = *(const Norm *)norm;
    const size_t at = (size_t)first * t.columns;
    const real *factor = t.n->dropout_factor;
    real *y = t.y + at;
    (void)scratch;
    t.x += at;
    t.count = (size_t)(end - first) * t.columns;
    if (t.n->swish)
        of_u(&t, swish_of_u, t.x, y);
    else
        combine(&t, 0, t.gain, t.x, t.zero, t.x, t.offset, y);
    multiply(t.count, factor ? factor + at : NULL, y);
}

void group_norm(const GroupNorm *n, const real *x, real *y, Arena *scratch) {
    const ArenaMark mark = arena_mark(scratch);
    Norm t = norm_of(n, x, 1, scratch);
    t.y = y;
    in_parts(norm_rows, &t, t.rows, scratch);
    arena_release(scratch, mark);
}

/* du = dy factor swish'(u), in scratch memory */
static real *back_to_u(const Norm *t, const real *dy) {
    real *du = arena_allocate(t->scratch, t->count, sizeof(real));
    if (t->n->swish)
        of_u(t, times_slope, dy, du);
    else
        memcpy(du, dy, t->count * sizeof(real));
    multiply(t->count, t->n->dropout_factor, du);
    return du;
}

/* sum += a + b, each [channels] */
static void add_sums(const GroupNorm *n, const real *a, const real *b, real *sum) {
    for (int c = 0; sum && c < n->channels; c++)
        sum[c] += a[c] + b[c];
}

/* dx += J (scale du) */
void group_norm_backward(const GroupNorm *n, const real *x, const real *dy, real *dx, real *dscale,
                         real *dbias, Arena *scratch) {
    const ArenaMark mark = arena_mark(scratch);
    const Norm t = norm_of(n, x, 0, scratch);
    const real *du = back_to_u(&t, dy);
    const Jacobian of_du = jacobian(&t, t.scale, du);
    add_sums(n, of_du.sum_xhat, t.zero, dscale);
    add_sums(n, of_du.sum, t.zero, dbias);
    combine(&t, 1, t.gain, du, of_du.slope, x, of_du.offset, dx);
    arena_release(scratch, mark);
}

/* u_dot = scale J x_dot */
static void make_u_dot(const Norm *t, const Jacobian *of_x_dot, const real *x_dot, real *u_dot) {
    real *slope = per_column(t), *offset = per_column(t);
    for (int c = 0; c < t->columns; c++) {
        slope[c] = t->scale[c] * of_x_dot->slope[c];
        offset[c] = t->scale[c] * of_x_dot->offset[c];
    }
    combine(t, 0, t->gain, x_dot, slope, t->x, offset, u_dot);
}

/* y_dot = factor swish'(u) u_dot */
void group_norm_tangent(const GroupNorm *n, const real *x, const real *x_dot, real *y_dot, Arena *scratch) {
    const ArenaMark mark = arena_mark(scratch);
    const Norm t = norm_of(n, x, 0, scratch);
    const Jacobian of_x_dot = jacobian(&t, t.one, x_dot);
    make_u_dot(&t, &of_x_dot, x_dot, y_dot);
    if (n->swish)
        of_u(&t, times_slope, y_dot, y_dot);
    multiply(t.count, n->dropout_factor, y_dot);
    arena_release(scratch, mark);
}

/* What flows back to u and to u_dot is du = dy_dot factor swish''(u) u_dot and du_dot = dy_dot factor
 * swish'(u). With g = scale du_dot and xhat_dot = J x_dot, and because d xhat = J dx and d rstd = -rstd^2
 * mean(xhat dx),
 *
 *     dx_dot += J g
 *     dx     += J (scale du) - rstd [xhat mean(g xhat_dot) + mean(xhat x_dot) J g + mean(xhat g) xhat_dot] */
void group_norm_tangent_backward(const GroupNorm *n, const real *x, const real *x_dot, const real *dy_dot,
                                 real *dx, real *dx_dot, real *dscale, real *dbias, Arena *scratch) {
    const ArenaMark mark = arena_mark(scratch);
    const Norm t = norm_of(n, x, 0, scratch);
    const Jacobian of_x_dot = jacobian(&t, t.one, x_dot);
    const real *du_dot = back_to_u(&t, dy_dot);
    real *du = arena_allocate(scratch, t.count, sizeof(real));
    if (n->swish) {
        make_u_dot(&t, &of_x_dot, x_dot, du);
        of_u(&t, times_curve, du, du);
        multiply(t.count, dy_dot, du);
        multiply(t.count, n->dropout_factor, du);
    } else
        memset(du, 0, t.count * sizeof(real));
    const Jacobian of_du = jacobian(&t, t.scale, du), of_du_dot = jacobian(&t, t.scale, du_dot);
    real *inner = per_column(&t), *by_du_dot = per_column(&t), *by_x_dot = per_column(&t);
    channel_sums(&t, du_dot, t.zero, x_dot, of_x_dot.mean, by_du_dot, inner);
    for (int c = 0; c < n->channels; c++)   /* the sum of du_dot xhat_dot */
        inner[c] = t.rstd[c] * (inner[c] - of_x_dot.mean_xhat[c] * of_du_dot.sum_xhat[c]);
    add_sums(n, of_du.sum_xhat, inner, dscale);
    add_sums(n, of_du.sum, t.zero, dbias);
    const real *mean_inner = group_means(&t, t.scale, inner);
    for (int c = 0; c < t.columns; c++) {   /* the bracket, by du_dot, x_dot, x and 1 */
        const real rstd = t.rstd[c], a = rstd * of_x_dot.mean_xhat[c], b = rstd * of_du_dot.mean_xhat[c];
        const real slope = rstd * rstd * mean_inner[c];
        by_du_dot[c] = -a * t.gain[c];
        by_x_dot[c] = -b * rstd;
        of_du.slope[c] -= slope + a * of_du_dot.slope[c] + b * of_x_dot.slope[c];
        of_du.offset[c] -= a * of_du_dot.offset[c] + b * of_x_dot.offset[c] - slope * t.mean[c];
    }
    combine(&t, 1, t.gain, du_dot, of_du_dot.slope, x, of_du_dot.offset, dx_dot);
    combine(&t, 1, t.gain, du, of_du.slope, x, of_du.offset, dx);
    combine(&t, 1, by_du_dot, du_dot, by_x_dot, x_dot, t.zero, dx);
    arena_release(scratch, mark);
}

/* ---- softmax ---- */

/* The maximum and the sums run in vector registers, in the same order whenever the same program runs. */
void softmax_rows(real *s, int rows, int columns) {
    for (int i = 0; i < rows; i++, s += columns) {
        real top = s[0], sum = 0;
#pragma omp simd reduction(max : top)
        for (int j = 0; j < columns; j++)
            top = s[j] > top ? s[j] : top;
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < columns; j++)
            sum += s[j] = fast_exp(s[j] - top);
        const real scale = 1 / sum;
        for (int j = 0; j < columns; j++)
            s[j] *= scale;
    }
}

/* dp -> p (dp - sum(p dp)), row by row. */
void softmax_rows_backward(const real *p, real *dp, int rows, int columns) {
    for (int i = 0; i < rows; i++, p += columns, dp += columns) {
        real inner = 0;   /* in real: twice as fast as dot, and nothing cancels in a softmax's row */
#pragma omp simd reduction(+ : inner)
        for (int j = 0; j < columns; j++)
            inner += p[j] * dp[j];
        for (int j = 0; j < columns; j++)
            dp[j] = p[j] * (dp[j] - inner);
    }
}

double dot(const real *x, const real *y, size_t count) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < count; i++)
        sum += (double)x[i] * (double)y[i];
    return sum;
}

/* ---- levels of pixels ---- */

/* x(c) = 2 (c + 1/2)/256 - 1 and the c whose x(c) is nearest to u. */
enum { LEVELS = 256 };
static double level_value(int c) { return 2 * (c + 0.5) / LEVELS - 1; }
int nearest_level(double u) {
    const double position = (u + 1) * (LEVELS / 2.0);
    return position > 0 ? position < LEVELS ? (int)position : LEVELS - 1 : 0;
}

int level_draw(double u, double precision, double uniform) {
    const int nearest = nearest_level(u);
    const double least = (u - level_value(nearest)) * (u - level_value(nearest));
    double weight[LEVELS], sum = 0;
    for (int c = 0; c < LEVELS; c++)
        sum += weight[c] = exp(-precision / 2 * ((u - level_value(c)) * (u - level_value(c)) - least));
    double left = uniform * sum;
    for (int c = 0; c < LEVELS; c++)
        if ((left -= weight[c]) < 0)
            return c;
    return nearest;   /* only rounding leads here */
}

double level_softmax(size_t count, const double *u, const unsigned char *k, double precision, real *du,
                     double *dprecision) {
    /* With d_c = u - x(c) and c* the nearest level,
     *     -log p(k) = h (d_k^2 - d_*^2) + log sum_c exp(-h (d_c^2 - d_*^2)),   h = precision / 2,
     * and its derivatives are 2 h (E x(c) - x(k)) by u and d_k^2 - E d_c^2 by h, E under p(c). A level j
     * steps from the nearest weighs at most exp(-h spacing^2 j (j - 1)): where that is nothing, it is left
     * out. */
    const real h = (real)(precision / 2), spacing = (real)2 / LEVELS;
    double total = 0, by_h = 0;
    int reach = 1;
    while (reach < LEVELS && h * spacing * spacing * (real)(reach * (reach - 1)) < 87)
        reach++;
    for (size_t i = 0; i < count; i++) {
        /* Distances are taken from the nearest level, where they are small and exact: x(c) = x(c*) + spacing
         * j. */
        const int nearest = nearest_level(u[i]);
        const real d = (real)(u[i] - level_value(nearest));
        real weights[LANES] = {0}, steps[LANES] = {0}, excesses[LANES] = {0};   /* of w, w step, w excess */
        const int first = nearest > reach ? (nearest - reach) / LANES * LANES : 0;
        const int last = nearest + reach < LEVELS ? nearest + reach : LEVELS - 1;
        for (int c = first; c <= last; c += LANES)   /* by lanes: one long sum would be too coarse */
            for (int l = 0; l < LANES; l++) {
                const real step = spacing * (real)(c + l - nearest), excess = step * (step - 2 * d);
                const real w = fast_exp(-h * excess);   /* excess = d_c^2 - d_*^2 */
                weights[l] += w;
                steps[l] += w * step;
                excesses[l] += w * excess;
            }
        double sum = 0, step_sum = 0, excess_sum = 0;
        for (int l = 0; l < LANES; l++)
            sum += weights[l], step_sum += steps[l], excess_sum += excesses[l];
        const double step_k = (double)spacing * (k[i] - nearest);
        const double excess_k = step_k * (step_k - 2 * (double)d);
        total += h * excess_k + log(sum);
        du[i] = (real)(2 * (double)h * (step_sum / sum - step_k));
        by_h += excess_k - excess_sum / sum;
    }
    *dprecision = by_h / 2;
    return total;
}

double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---- convolution by minimal filtering ---- */

/* A tile of 4x4 outputs depends on 6x6 inputs. Winograd's minimal filtering F(4x4, 3x3) [Lavin and Gray,
 * "Fast algorithms for convolutional neural networks", 2016] computes it with 36 multiplications a pair of
 * channels instead of 144:
 *
 *     y = A^T [ sum over input channels of (G k G^T) o (B^T x B) ] A          o: element by element
 *
 *           4  0 -5  0  1  0             1/4    0     0
 *           0 -4 -4  1  1  0            -1/6  -1/6  -1/6            1  1  1  1  1  0
 *     B^T = 0  4 -4 -1  1  0        G = -1/6   1/6  -1/6      A^T = 0  1 -1  2 -2  0
 *           0 -2 -1  2  1  0            1/24  1/12   1/6            0  1  1  4  4  0
 *           0  2 -1 -2  1  0            1/24 -1/12   1/6            0  1 -1  8 -8  1
 *           0  4  0 -5  0  1              0     0     1
 *
 * The sum over channels, for many tiles at once, is a matrix product of its own for each of the 36 places.
 * The map is linear in the kernel; its transpose is the gradient, where the sum runs over the tiles:
 *
 *     dk = G^T [ sum over tiles of (B^T x B)^T o (A dy A^T) ] G */
enum { TILE = 4, REACH = TILE + 2, PLACES = REACH * REACH };
static const real SIXTH = (real)(1.0 / 6);

/* One of these matrices times a column of numbers, `step` apart. */
typedef void Transform(const real *from, ptrdiff_t step, real *to, ptrdiff_t to_step);

/* The six lines of B^T, G and A alike: the outer ones, and sum and difference of two pairs between them. */
INLINE void put_six(real *to, ptrdiff_t step, real first, real a, real b, real c, real d, real last) {
    to[0] = first;
    to[step] = a + b;
    to[2 * step] = a - b;
    to[3 * step] = c + d;
    to[4 * step] = c - d;
    to[5 * step] = last;
}

INLINE void input_transform(const real *x, ptrdiff_t step, real *to, ptrdiff_t to_step) {   /* B^T */
    const real x1 = x[step], x2 = x[2 * step], x3 = x[3 * step], x4 = x[4 * step];
    put_six(to, to_step, 4 * x[0] - 5 * x2 + x4, x4 - 4 * x2, x3 - 4 * x1, x4 - x2, 2 * (x3 - x1),
            4 * x1 - 5 * x3 + x[5 * step]);
}

INLINE void kernel_transform(const real *k, ptrdiff_t step, real *to, ptrdiff_t to_step) {   /* G */
    const real k0 = k[0], k1 = k[step], k2 = k[2 * step];
    put_six(to, to_step, k0 / 4, -SIXTH * (k0 + k2), -SIXTH * k1, SIXTH * (k0 / 4 + k2), SIXTH / 2 * k1, k2);
}

INLINE void output_transform(const real *m, ptrdiff_t step, real *to, ptrdiff_t to_step) {   /* A^T */
    const real even = m[step] + m[2 * step], odd = m[step] - m[2 * step];
    const real even2 = m[3 * step] + m[4 * step], odd2 = m[3 * step] - m[4 * step];
    to[0] = m[0] + even + even2;
    to[to_step] = odd + 2 * odd2;
    to[2 * to_step] = even + 4 * even2;
    to[3 * to_step] = odd + 8 * odd2 + m[5 * step];
}

INLINE void output_transposed(const real *y, ptrdiff_t step, real *to, ptrdiff_t to_step) {   /* A */
    const real y0 = y[0], y1 = y[step], y2 = y[2 * step], y3 = y[3 * step];
    put_six(to, to_step, y0, y0 + y2, y1 + y3, y0 + 4 * y2, 2 * y1 + 8 * y3, y3);
}

INLINE void kernel_transposed(const real *u, ptrdiff_t step, real *to, ptrdiff_t to_step) {   /* G^T */
    const real even = SIXTH * (u[step] + u[2 * step]), odd = SIXTH * (u[2 * step] - u[step]);
    const real even2 = SIXTH * (u[3 * step] + u[4 * step]), odd2 = SIXTH / 2 * (u[3 * step] - u[4 * step]);
    to[0] = u[0] / 4 - even + even2 / 4;
    to[to_step] = odd + odd2;
    to[2 * to_step] = even2 - even + u[5 * step];
}

/* Where squares of pixels lie in memory, each pixel with `channels` numbers: one square after the other, or
 * as the tiles of an image, or as transformed tiles, whose 36 places are a plane each. All distances are
 * counted in numbers. */
typedef struct {
    real *data;
    ptrdiff_t next, line, column;   /* from tile to tile */
    ptrdiff_t y, x;                 /* within a tile */
} Squares;

/* N channels of a square of from_size numbers a side become one of to_size: the transform of its columns,
 * then of its lines. */
INLINE void transform_square(Transform transform, const int from_size, const int to_size, const int N,
                             const real *from, const Squares *f, real *to, const Squares *t) {
    real half[REACH][REACH][LANES];
    for (int x = 0; x < from_size; x++)
#pragma omp simd
        for (int n = 0; n < N; n++)
            transform(from + x * f->x + n, f->y, half[0][x] + n, REACH * LANES);
    for (int y = 0; y < to_size; y++)
#pragma omp simd
        for (int n = 0; n < N; n++)
            transform(half[y][0] + n, LANES, to + y * t->y + n, t->x);
}

/* `count` squares, which are the tiles from `first` on of an image with `columns` in a line. */
INLINE void transform_squares(Transform transform, const int from_size, const int to_size, int first,
                              int count, int columns, int channels, const Squares *from, const Squares *to) {
    for (int i = 0; i < count; i++) {
        const int line = (first + i) / columns, column = (first + i) % columns;
        const real *f = from->data + i * from->next + line * from->line + column * from->column;
        real *t = to->data + i * to->next + line * to->line + column * to->column;
        int c = 0;
        for (; c + LANES <= channels; c += LANES)
            transform_square(transform, from_size, to_size, LANES, f + c, from, t + c, to);
        if (c < channels)
            transform_square(transform, from_size, to_size, channels - c, f + c, from, t + c, to);
    }
}

/* The tiles of an image are taken some at a time, so that what is made of them stays in the core's cache.
 * Each of the 36 places of the transformed tiles is a plane [tiles, channels] of its own, and likewise [in,
 * out] of the transformed kernels. */
enum { TILES_AT_ONCE = 32, TILES_SUMMED_AT_ONCE = 64 };   /* long sums over them pay more than the cache */

/* `tiles` tiles of some channels as planes. A vector stays free behind each plane, else all of them would
 * compete for the same lines of the cache. */
static Squares planes(int tiles, ptrdiff_t channels, Arena *scratch) {
    const ptrdiff_t plane = tiles * channels + LANES;
    return (Squares){.data = arena_allocate(scratch, (size_t)(PLACES * plane), sizeof(real)),
                     .next = channels, .y = REACH * plane, .x = plane};
}

/* The tiles of an image [.., width, channels] that begins at `data`. */
static Squares image_tiles(const real *data, int width, int channels) {
    return (Squares){.data = (real *)data, .line = (ptrdiff_t)TILE * width * channels,
                     .column = (ptrdiff_t)TILE * channels, .y = (ptrdiff_t)width * channels, .x = channels};
}

/* Below these sizes the transforms cost more than they save. */
static int filtering_pays(int h, int w, int in, int out) { return in >= 16 && out >= 16 && h * w >= 196; }

/* How many tiles make up a side of so many numbers. */
static int tiles_along(int side) { return (side + TILE - 1) / TILE; }

/* What convolve3x3_fast was asked for. */
typedef struct {
    int h, w, in, out;
    const real *x, *kernel, *bias, *start;
    real *y;
} Convolution;

/* Tiles first..end-1 of y. Each part transforms the kernel for itself, which takes no longer than to fetch it
 * from the cache of another core. */
static void convolve_tiles(const void *convolution, int first, int end, Arena *scratch) {
    const Convolution *v = convolution;
    const int h = v->h, w = v->w, in = v->in, out = v->out, size = in * out;
    const int columns = tiles_along(w), width = columns * TILE + 2;
    const int line = first / columns, lines = (end - 1) / columns + 1 - line;   /* that these tiles lie in */
    const int groups = (end - first + TILES_AT_ONCE - 1) / TILES_AT_ONCE;
    const int at_once = (end - first + groups - 1) / groups;   /* nearly equal groups: 49 = 25 + 24 */
    const ArenaMark mark = arena_mark(scratch);
    const Squares xs = planes(at_once, in, scratch), ys = planes(at_once, out, scratch);
    const Squares kernels = planes(1, size, scratch);
    const real *image = in_zeros(h, w, in, v->x, 1, line * TILE - 1, lines * TILE + 2, width, scratch);
    real *y = v->y, *made = arena_allocate(scratch, (size_t)TILE * TILE * out, sizeof(real));
    const Squares tiles = image_tiles(image, width, in);
    const Squares made_tile = {.data = made, .y = TILE * out, .x = out};
    const Squares taps = {.data = (real *)v->kernel, .y = 3 * size, .x = size};
    transform_squares(kernel_transform, 3, REACH, 0, 1, 1, size, &taps, &kernels);
    for (int count; first < end; first += count) {
        count = end - first < at_once ? end - first : at_once;
        transform_squares(input_transform, REACH, REACH, first - line * columns, count, columns, in, &tiles,
                          &xs);
        const Product p = {.lines = PLACES, .rows = count, .columns = out, .segments = 1, .inner = in,
                           .a = xs.data, .a_line = xs.x, .a_row = in, .a_inner = 1, .b = kernels.data,
                           .b_line = kernels.x, .b_inner = out, .c = ys.data, .c_line = ys.x,
                           .c_row = out};
        product(&p, scratch);
        Squares sums = ys;
        for (int tile = first; tile < first + count; tile++, sums.data += sums.next) {
            const int top = tile / columns * TILE, left = tile % columns * TILE;
            transform_squares(output_transform, REACH, TILE, 0, 1, 1, out, &sums, &made_tile);
            for (int i = top; i < h && i < top + TILE; i++)
                for (int j = left; j < w && j < left + TILE; j++) {
                    const real *from = made + ((i - top) * TILE + j - left) * out;
                    const ptrdiff_t at = ((ptrdiff_t)i * w + j) * out;
                    const real *bias = v->bias, *start = v->start ? v->start + at : NULL;
#pragma omp simd
                    for (int c = 0; c < out; c++)
                        y[at + c] = from[c] + (bias ? bias[c] : 0) + (start ? start[c] : 0);
                }
        }
    }
    arena_release(scratch, mark);
}

void convolve3x3_fast(int h, int w, int in, int out, const real *x, const real *kernel, const real *bias,
                      const real *start, real *y, Arena *scratch) {
    const Convolution v = {h, w, in, out, x, kernel, bias, start, y};
    if (filtering_pays(h, w, in, out))
        in_parts(convolve_tiles, &v, tiles_along(h) * tiles_along(w), scratch);
    else
        convolve3x3(h, w, in, out, x, kernel, bias, start, y, scratch);
}

void convolve3x3_by_kernel_fast(int h, int w, int in, int out, const real *x, const real *dy, real *dkernel,
                                Arena *scratch) {
    if (!filtering_pays(h, w, in, out)) {
        convolve3x3_by_kernel(h, w, in, out, x, dy, dkernel, scratch);
        return;
    }
    const ArenaMark mark = arena_mark(scratch);
    const int lines = tiles_along(h), columns = tiles_along(w), size = in * out;
    const int height = lines * TILE, width = columns * TILE;
    const int wanted = 1 + (TILES_SUMMED_AT_ONCE - 1) / columns;   /* lines */
    const int at_once = (wanted < lines ? wanted : lines) * columns;
    const Squares xs = planes(at_once, in, scratch), ys = planes(at_once, out, scratch);
    const Squares kernels = planes(1, size, scratch);
    const real *image = in_zeros(h, w, in, x, 1, -1, height + 2, width + 2, scratch), *dy_image = dy;
    if (h != height || w != width)
        dy_image = in_zeros(h, w, out, dy, 0, 0, height, width, scratch);
    const Squares x_tiles = image_tiles(image, width + 2, in), dy_tiles = image_tiles(dy_image, width, out);
    for (int first = 0, count; first < lines * columns; first += count) {
        count = lines * columns - first < at_once ? lines * columns - first : at_once;
        transform_squares(input_transform, REACH, REACH, first, count, columns, in, &x_tiles, &xs);
        transform_squares(output_transposed, TILE, REACH, first, count, columns, out, &dy_tiles, &ys);
        const Product p = {.lines = PLACES, .rows = in, .columns = out, .segments = 1, .inner = count,
                           .a = xs.data, .a_line = xs.x, .a_row = 1, .a_inner = in, .b = ys.data,
                           .b_line = ys.x, .b_inner = out, .start = first ? kernels.data : NULL,
                           .c = kernels.data, .c_line = kernels.x, .c_row = out};
        product(&p, scratch);
    }
    real *made = arena_allocate(scratch, (size_t)9 * size, sizeof(real));
    const Squares taps = {.data = made, .y = 3 * size, .x = size};
    transform_squares(kernel_transposed, REACH, 3, 0, 1, 1, size, &kernels, &taps);
    for (int i = 0; i < 9 * size; i++)
        dkernel[i] += made[i];
    arena_release(scratch, mark);
}
