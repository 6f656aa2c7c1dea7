/* tensor.c - floor 1: errors, memory, random numbers, and the loops that do the arithmetic.
 *
 * Nothing here knows of graphs, networks or diffusion. The loops are plain C: constant bounds innermost,
 * so that the compiler keeps them in vector registers. There are no intrinsics and no assembly, and there
 * will be none. */

#define _POSIX_C_SOURCE 200809L

#include "diffenc.h"

#include <assert.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- errors ---- */

int fail(Error *error, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error->text, sizeof error->text, format, arguments);
    va_end(arguments);
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
};

Arena *arena_new(void) {
    return allocate_zeroed(1, sizeof(Arena));
}

void arena_free(Arena *arena) {
    if (!arena)
        return;
    for (Block *block = arena->first, *next; block; block = next) {
        next = block->next;
        free(block);
    }
    free(arena);
}

static Block *block_new(size_t size) {
    if (size > SIZE_MAX / 4)
        out_of_memory(1, size);
    Block *block = allocate(1, sizeof(Block) + ALIGNMENT + size);
    uintptr_t start = (uintptr_t)(block + 1);
    block->next = NULL;
    block->size = size;
    block->used = 0;
    block->data = (char *)(block + 1) + (ALIGNMENT - start % ALIGNMENT) % ALIGNMENT;
    return block;
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
        Block *fresh = block_new(bytes > wanted ? bytes : wanted);
        *(block ? &block->next : &arena->first) = fresh;
        arena->capacity += fresh->size;
        block = fresh;
    }
    arena->current = block;
    void *memory = block->data + block->used;
    block->used += bytes;
    return memory;
}

ArenaMark arena_mark(const Arena *arena) {
    ArenaMark mark = {arena->current, arena->current ? arena->current->used : 0};
    return mark;
}

void arena_release(Arena *arena, ArenaMark mark) {
    arena->current = mark.block ? mark.block : arena->first;
    if (arena->current)
        arena->current->used = mark.used;
}

void arena_reset(Arena *arena) {
    ArenaMark empty = {NULL, 0};
    arena_release(arena, empty);
}

size_t arena_capacity(const Arena *arena) {
    return arena->capacity;
}

/* ---- random numbers ---- */

enum { PHILOX_ROUNDS = 10, PHILOX_LANES = 16 };
/* The multipliers of the paper's table 2, and the key's steps: golden ratio, sqrt 3 - 1. */
static const uint32_t PHILOX_M0 = 0xD2511F53u, PHILOX_M1 = 0xCD9E8D57u;
static const uint32_t PHILOX_W0 = 0x9E3779B9u, PHILOX_W1 = 0xBB67AE85u;

void philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < PHILOX_ROUNDS; round++, k0 += PHILOX_W0, k1 += PHILOX_W1) {
        uint64_t p0 = (uint64_t)PHILOX_M0 * c0, p1 = (uint64_t)PHILOX_M1 * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

RandomStream random_stream(uint64_t seed, RandomPurpose purpose, uint32_t step, uint32_t example) {
    RandomStream stream = {seed, (uint32_t)purpose, step, example};
    return stream;
}

/* The 4 numbers at positions 4*block .. 4*block+3. */
static void random_block(RandomStream s, uint32_t block, uint32_t out[4]) {
    const uint32_t counter[4] = {block, s.example, s.step, s.purpose};
    const uint32_t key[2] = {(uint32_t)s.seed, (uint32_t)(s.seed >> 32)};
    philox4x32(counter, key, out);
}

uint32_t random_bits(RandomStream stream, uint32_t position) {
    uint32_t out[4];
    random_block(stream, position / 4, out);
    return out[position % 4];
}

/* 53 of 64 bits as a number in [0, 1). */
static double uniform_of(uint32_t high, uint32_t low) {
    return (double)((((uint64_t)high << 32) | low) >> 11) * (1.0 / 9007199254740992.0);
}

double random_uniform(RandomStream stream, uint32_t position) {
    uint32_t out[4];
    random_block(stream, position / 2, out);
    return position % 2 ? uniform_of(out[2], out[3]) : uniform_of(out[0], out[1]);
}

void random_normal(RandomStream stream, real *out, size_t count) {
    const double two_pi = 6.283185307179586;
    for (size_t i = 0; i < count; i += 2) {
        uint32_t bits[4];
        random_block(stream, (uint32_t)(i / 2), bits);
        double radius = sqrt(-2 * log(1 - uniform_of(bits[0], bits[1])));   /* 1 - u lies in (0, 1] */
        double angle = two_pi * uniform_of(bits[2], bits[3]);
        out[i] = (real)(radius * cos(angle));
        if (i + 1 < count)
            out[i + 1] = (real)(radius * sin(angle));
    }
}

void random_dropout(RandomStream s, uint32_t first, size_t count, double rate, real *keep) {
    /* Two 16-bit numbers a word, eight a block. PHILOX_LANES blocks are made at a time, lane by lane in
     * the inner loops, so that the rounds run in vector registers: philox4x32 above, transposed. */
    const uint32_t threshold = (uint32_t)(rate * 65536 + 0.5);
    const real factor = (real)(65536.0 / (65536.0 - threshold));
    assert(first % DROPOUT_RUN == 0 && DROPOUT_RUN == 8 * PHILOX_LANES);
    for (size_t done = 0; done < count; done += 8 * PHILOX_LANES) {
        uint32_t c[4][PHILOX_LANES], k0 = (uint32_t)s.seed, k1 = (uint32_t)(s.seed >> 32);
        for (int l = 0; l < PHILOX_LANES; l++) {
            c[0][l] = first / 8 + (uint32_t)(done / 8) + (uint32_t)l;
            c[1][l] = s.example, c[2][l] = s.step, c[3][l] = s.purpose;
        }
        for (int round = 0; round < PHILOX_ROUNDS; round++, k0 += PHILOX_W0, k1 += PHILOX_W1)
            for (int l = 0; l < PHILOX_LANES; l++) {
                uint64_t p0 = (uint64_t)PHILOX_M0 * c[0][l], p1 = (uint64_t)PHILOX_M1 * c[2][l];
                c[0][l] = (uint32_t)(p1 >> 32) ^ c[1][l] ^ k0;
                c[1][l] = (uint32_t)p1;
                c[2][l] = (uint32_t)(p0 >> 32) ^ c[3][l] ^ k1;
                c[3][l] = (uint32_t)p0;
            }
        real made[8][PHILOX_LANES];
        for (int w = 0; w < 4; w++)
            for (int l = 0; l < PHILOX_LANES; l++) {
                made[2 * w][l] = (c[w][l] & 0xFFFF) < threshold ? 0 : factor;
                made[2 * w + 1][l] = (c[w][l] >> 16) < threshold ? 0 : factor;
            }
        size_t left = count - done < 8 * PHILOX_LANES ? count - done : 8 * PHILOX_LANES;
        memcpy(keep + done, made, left * sizeof(real));   /* the order within a run is a matter of taste */
    }
}

/* ---- exp ---- */

#ifdef DIFFENC_DOUBLE
real fast_exp(real x) {
    return exp(x);
}
#define exp_inline exp
#else
/* exp(x) = 2^n exp(r), n the integer nearest to x/log 2, |r| <= log(2)/2, exp(r) by a polynomial of degree
 * 6 (Cephes' coefficients). Adding and subtracting 1.5 * 2^23 rounds to an integer without a call, and
 * leaves n in the low bits of the sum, from where it is shifted into an exponent. */
static inline float exp_inline(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f;
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

real fast_exp(real x) {
    return exp_inline(x);
}
#endif

static inline real sigmoid(real x) {
    return 1 / (1 + exp_inline(-x));
}

/* ---- the product ---- */

/* The block of c held in registers: BLOCK_ROWS rows of two vectors of LANES numbers each. Twelve rows make
 * 24 accumulators of AVX-512's 32 registers, six rows 12 of AVX's or SSE's 16. Other machines (NEON: 32
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

/* One block: R rows x N columns, of which `width` are stored. R and N are constants where this is called;
 * it must be inlined there, so that each pair gets a copy of the loops with the sums in registers. a, b, c,
 * start and bias point to the block's own first element. */
INLINE void block_product(const int R, const int N, int width, const Product *p, const real *a,
                                 const real *b, ptrdiff_t b_segment, ptrdiff_t b_row, const real *bias,
                                 const real *start, real *c) {
    real sum[BLOCK_ROWS][2 * LANES];
    for (int r = 0; r < R; r++)
#pragma omp simd
        for (int n = 0; n < N; n++)
            sum[r][n] = 0;
    const ptrdiff_t a_row = p->a_row, a_inner = p->a_inner;
    for (int s = 0; s < p->segments; s++) {
        const real *ak = a + s * p->a_segment, *bk = b + s * b_segment;
        for (int k = 0; k < p->inner; k++, ak += a_inner, bk += b_row)
            for (int r = 0; r < R; r++)   /* simd: else gcc takes so short a loop apart */
#pragma omp simd
                for (int n = 0; n < N; n++)
                    sum[r][n] += ak[r * a_row] * bk[n];
    }
    for (int r = 0; r < R; r++) {
        if (bias)
            for (int n = 0; n < width; n++)
                sum[r][n] += bias[n];
        if (start)
            for (int n = 0; n < width; n++)
                sum[r][n] += start[r * p->c_row + n];
        for (int n = 0; n < width; n++)
            c[r * p->c_row + n] = sum[r][n];
    }
}

/* R rows: choose the copy of the loop. A width below LANES computes a whole vector and stores a part of
 * it. */
static void block_rows(int R, int width, const Product *p, const real *a, const real *b,
                       ptrdiff_t b_segment, ptrdiff_t b_row, const real *bias, const real *start, real *c) {
#define CASE(r)                                                                         \
    case r:                                                                             \
        if (width == 2 * LANES)                                                         \
            block_product(r, 2 * LANES, 2 * LANES, p, a, b, b_segment, b_row, bias, start, c);  \
        else if (width == LANES)                                                        \
            block_product(r, LANES, LANES, p, a, b, b_segment, b_row, bias, start, c);          \
        else                                                                            \
            block_product(r, LANES, width, p, a, b, b_segment, b_row, bias, start, c);          \
        break;
    switch (R) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if defined __AVX512F__
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
#undef CASE
}

void product(const Product *p, Arena *scratch) {
    const int blocks = (p->rows + BLOCK_ROWS - 1) / BLOCK_ROWS; /* of nearly equal height: 28 = 10 + 9 + 9 */
    const ArenaMark mark = arena_mark(scratch);
    for (int j = 0; j < p->columns;) {
        int width = p->columns - j >= 2 * LANES ? 2 * LANES
                    : p->columns - j >= LANES   ? LANES
                                                : p->columns - j;
        const real *b = p->b + j;
        ptrdiff_t b_segment = p->b_segment, b_row = p->b_row;
        if (width < LANES) {   /* the last columns: a copy of them in whole vectors, zeros behind */
            real *packed = arena_allocate(scratch, (size_t)p->segments * p->inner * LANES, sizeof(real)),
                 *to = packed;
            for (int s = 0; s < p->segments; s++)
                for (int k = 0; k < p->inner; k++, to += LANES)
                    for (int n = 0; n < LANES; n++)
                        to[n] = n < width ? b[s * b_segment + k * b_row + n] : 0;
            b = packed;
            b_row = LANES;
            b_segment = (ptrdiff_t)p->inner * LANES;
        }
        for (int line = 0; line < p->lines; line++)
            for (int q = 0, i = 0; q < blocks; q++) {
                int end = (int)((long)(q + 1) * p->rows / blocks);
                ptrdiff_t at = line * p->c_line + i * p->c_row + j;
                block_rows(end - i, width, p, p->a + line * p->a_line + i * p->a_row, b, b_segment, b_row,
                           p->bias ? p->bias + j : NULL, p->start ? p->start + at : NULL, p->c + at);
                i = end;
            }
        j += width;
    }
    arena_release(scratch, mark);
}

void matrix_product(int rows, int inner, int columns, const real *a, const real *b, const real *bias,
                    const real *start, real *c, Arena *scratch) {
    const Product p = {.lines = 1, .rows = rows, .columns = columns, .segments = 1, .inner = inner,
                       .a = a, .a_row = inner, .a_inner = 1, .b = b, .b_row = columns,
                       .c = c, .c_row = columns, .bias = bias, .start = start};
    product(&p, scratch);
}

void matrix_product_transposed(int rows, int inner, int columns, const real *a, const real *b, real *c,
                               Arena *scratch) {
    const Product p = {.lines = 1, .rows = inner, .columns = columns, .segments = 1, .inner = rows,
                       .a = a, .a_row = 1, .a_inner = inner, .b = b, .b_row = columns,
                       .c = c, .c_row = columns, .start = c};
    product(&p, scratch);
}

void transpose(const real *a, int rows, int columns, real *out) {
    /* In tiles, so that reads and writes both use whole cache lines. */
    enum { TILE = 16 };
    for (int i0 = 0; i0 < rows; i0 += TILE)
        for (int j0 = 0; j0 < columns; j0 += TILE)
            for (int j = j0; j < columns && j < j0 + TILE; j++)
                for (int i = i0; i < rows && i < i0 + TILE; i++)
                    out[(size_t)j * rows + i] = a[(size_t)i * columns + j];
}

/* ---- convolution ---- */

/* x [h, w, c] in an image [rows, columns, c] of zeros, `border` from its upper left corner. */
static real *in_zeros(int h, int w, int c, const real *x, int border, int rows, int columns, Arena *scratch) {
    const size_t line = (size_t)columns * c, left = (size_t)border * c, filled = (size_t)w * c;
    real *image = arena_allocate(scratch, rows * line, sizeof(real));
    memset(image, 0, border * line * sizeof(real));
    for (int i = 0; i < h; i++) {
        real *to = image + (i + border) * line;
        memset(to, 0, left * sizeof(real));
        memcpy(to + left, x + i * filled, filled * sizeof(real));
        memset(to + left + filled, 0, (line - left - filled) * sizeof(real));
    }
    memset(image + (h + border) * line, 0, (rows - h - border) * line * sizeof(real));
    return image;
}

/* With a border one wide, the 3 x c inputs under one line of a kernel are one contiguous run at every
 * position. */
static real *with_border(int h, int w, int c, const real *x, Arena *scratch) {
    return in_zeros(h, w, c, x, 1, h + 2, w + 2, scratch);
}

void convolve3x3(int h, int w, int in, int out, const real *x, const real *kernel, const real *bias,
                 const real *start, real *y, Arena *scratch) {
    /* y[i][j][o] = sum over ky, kx, c of padded[i+ky][j+kx][c] kernel[ky][kx][c][o]: a segment is one line
     * of the kernel, 3*in numbers long; the next one lies a line of the padded image further down. */
    const ArenaMark mark = arena_mark(scratch);
    const Product p = {.lines = h, .rows = w, .columns = out, .segments = 3, .inner = 3 * in,
                       .a = with_border(h, w, in, x, scratch), .a_line = (ptrdiff_t)(w + 2) * in, .a_row = in,
                       .a_segment = (ptrdiff_t)(w + 2) * in, .a_inner = 1,
                       .b = kernel, .b_segment = 3 * (ptrdiff_t)in * out, .b_row = out,
                       .c = y, .c_line = (ptrdiff_t)w * out, .c_row = out, .bias = bias, .start = start};
    product(&p, scratch);
    arena_release(scratch, mark);
}

void flip_kernel(int taps, int in, int out, const real *kernel, real *flipped) {
    for (int t = 0; t < taps; t++)
        transpose(kernel + (size_t)t * in * out, in, out, flipped + (size_t)(taps - 1 - t) * in * out);
}

void convolve3x3_by_kernel(int h, int w, int in, int out, const real *x, const real *dy, real *dkernel,
                           Arena *scratch) {
    /* dkernel[ky][kx][c][o] += sum over i, j of padded[i+ky][j+kx][c] dy[i][j][o]: the same product with
     * the roles changed. A row is one (kx, c), a line one ky, and the sum runs over the pixels, a segment
     * being a line. */
    const ArenaMark mark = arena_mark(scratch);
    const Product p = {.lines = 3, .rows = 3 * in, .columns = out, .segments = h, .inner = w,
                       .a = with_border(h, w, in, x, scratch), .a_line = (ptrdiff_t)(w + 2) * in, .a_row = 1,
                       .a_segment = (ptrdiff_t)(w + 2) * in, .a_inner = in,
                       .b = dy, .b_segment = (ptrdiff_t)w * out, .b_row = out,
                       .c = dkernel, .c_line = 3 * (ptrdiff_t)in * out, .c_row = out, .start = dkernel};
    product(&p, scratch);
    arena_release(scratch, mark);
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

/* One of these matrices times a line of numbers, `step` apart, for N channels at once. */
typedef void LineTransform(int N, const real *from, ptrdiff_t step, real *to, ptrdiff_t to_step);

/* The six lines of B^T, G and A alike: the outer ones, and sum and difference of two pairs between them. */
static inline void put_six(real *to, ptrdiff_t step, real first, real a, real b, real c, real d, real last) {
    to[0] = first;
    to[step] = a + b;
    to[2 * step] = a - b;
    to[3 * step] = c + d;
    to[4 * step] = c - d;
    to[5 * step] = last;
}

static inline void transform_input(int N, const real *x, ptrdiff_t step, real *to, ptrdiff_t to_step) {
#pragma omp simd
    for (int n = 0; n < N; n++) {   /* B^T */
        const real x0 = x[n], x1 = x[step + n], x2 = x[2 * step + n], x3 = x[3 * step + n],
                   x4 = x[4 * step + n], x5 = x[5 * step + n];
        const real even = x4 - 4 * x2, odd = x3 - 4 * x1, even2 = x4 - x2, odd2 = 2 * (x3 - x1);
        put_six(to + n, to_step, 4 * x0 - 5 * x2 + x4, even, odd, even2, odd2, 4 * x1 - 5 * x3 + x5);
    }
}

static inline void transform_kernel(int N, const real *k, ptrdiff_t step, real *to, ptrdiff_t to_step) {
#pragma omp simd
    for (int n = 0; n < N; n++) {   /* G */
        const real k0 = k[n], k1 = k[step + n], k2 = k[2 * step + n];
        const real even = -SIXTH * (k0 + k2), odd = -SIXTH * k1, even2 = SIXTH * (k0 / 4 + k2),
                   odd2 = SIXTH / 2 * k1;
        put_six(to + n, to_step, k0 / 4, even, odd, even2, odd2, k2);
    }
}

static inline void transform_output(int N, const real *m, ptrdiff_t step, real *to, ptrdiff_t to_step) {
#pragma omp simd
    for (int n = 0; n < N; n++) {   /* A^T */
        const real m0 = m[n], m1 = m[step + n], m2 = m[2 * step + n], m3 = m[3 * step + n],
                   m4 = m[4 * step + n], m5 = m[5 * step + n];
        const real even = m1 + m2, odd = m1 - m2, even2 = m3 + m4, odd2 = m3 - m4;
        to[n] = m0 + even + even2;
        to[to_step + n] = odd + 2 * odd2;
        to[2 * to_step + n] = even + 4 * even2;
        to[3 * to_step + n] = odd + 8 * odd2 + m5;
    }
}

static inline void transpose_output(int N, const real *y, ptrdiff_t step, real *to, ptrdiff_t to_step) {
#pragma omp simd
    for (int n = 0; n < N; n++) {   /* A */
        const real y0 = y[n], y1 = y[step + n], y2 = y[2 * step + n], y3 = y[3 * step + n];
        const real even = y0 + y2, odd = y1 + y3, even2 = y0 + 4 * y2, odd2 = 2 * y1 + 8 * y3;
        put_six(to + n, to_step, y0, even, odd, even2, odd2, y3);
    }
}

static inline void transpose_kernel(int N, const real *u, ptrdiff_t step, real *to, ptrdiff_t to_step) {
#pragma omp simd
    for (int n = 0; n < N; n++) {   /* G^T */
        const real u0 = u[n], u1 = u[step + n], u2 = u[2 * step + n], u3 = u[3 * step + n],
                   u4 = u[4 * step + n], u5 = u[5 * step + n];
        const real even = SIXTH * (u1 + u2), odd = SIXTH * (u2 - u1), even2 = SIXTH * (u3 + u4),
                   odd2 = SIXTH / 2 * (u3 - u4);
        to[n] = u0 / 4 - even + even2 / 4;
        to[to_step + n] = odd + odd2;
        to[2 * to_step + n] = even2 - even + u5;
    }
}

/* A square of from_size numbers a side becomes one of to_size: the transform down its columns, then along
 * its lines. N channels; y and x are the distances in each direction. */
INLINE void transform_square(LineTransform transform, const int from_size, const int to_size, const int N,
                             const real *from, ptrdiff_t from_y, ptrdiff_t from_x, real *to, ptrdiff_t to_y,
                             ptrdiff_t to_x) {
    real half[REACH][REACH][LANES];
    for (int x = 0; x < from_size; x++)
        transform(N, from + x * from_x, from_y, half[0][x], REACH * LANES);
    for (int y = 0; y < to_size; y++)
        transform(N, half[y][0], LANES, to + y * to_y, to_x);
}

/* The tiles of an image are taken some lines at a time, about TILES_AT_ONCE of them, so that what is made of
 * them stays in the core's cache. Each of the 36 places of the transformed tiles is a plane
 * [tiles, channels] of its own. */
enum { TILES_AT_ONCE = 32 };

typedef struct {
    int lines, columns, lines_at_once;   /* of tiles */
    ptrdiff_t tiles;                     /* at once */
} Tiling;

static Tiling tiling(int h, int w) {
    Tiling t = {.lines = (h + TILE - 1) / TILE, .columns = (w + TILE - 1) / TILE};
    t.lines_at_once = 1 + (TILES_AT_ONCE - 1) / t.columns;
    t.lines_at_once = t.lines_at_once < t.lines ? t.lines_at_once : t.lines;
    t.tiles = (ptrdiff_t)t.lines_at_once * t.columns;
    return t;
}

/* Planes are one vector further apart than they are large: else all of them would meet in the same lines of
 * the cache. */
static ptrdiff_t plane(ptrdiff_t size) {
    return size + LANES;
}

/* Some lines of tiles into planes: B^T x B of `size` 6 from an image with its border, where tiles overlap by
 * two, and A dy A^T of `size` 4. The image is [.., width, channels], from the first tile's corner on. */
INLINE void transform_tiles(LineTransform transform, const int size, const Tiling *t, int lines, int channels,
                            int width, const real *image, real *planes) {
    const ptrdiff_t apart = plane(t->tiles * channels), line = (ptrdiff_t)width * channels;
    for (int i = 0; i < lines; i++)
        for (int j = 0; j < t->columns; j++) {
            const real *from = image + (ptrdiff_t)i * TILE * line + (ptrdiff_t)j * TILE * channels;
            real *to = planes + ((ptrdiff_t)i * t->columns + j) * channels;
            int c = 0;
            for (; c + LANES <= channels; c += LANES)
                transform_square(transform, size, REACH, LANES, from + c, line, channels, to + c,
                                 REACH * apart, apart);
            if (c < channels)
                transform_square(transform, size, REACH, channels - c, from + c, line, channels, to + c,
                                 REACH * apart, apart);
        }
}

/* G k G^T of all pairs of channels, `size` of them, into planes; and its transpose, dk += G^T u G. */
static void transform_kernels(ptrdiff_t size, const real *kernel, real *planes) {
    const ptrdiff_t apart = plane(size);
    ptrdiff_t c = 0;
    for (; c + LANES <= size; c += LANES)
        transform_square(transform_kernel, 3, REACH, LANES, kernel + c, 3 * size, size, planes + c,
                         REACH * apart, apart);
    if (c < size)
        transform_square(transform_kernel, 3, REACH, (int)(size - c), kernel + c, 3 * size, size, planes + c,
                         REACH * apart, apart);
}

static void add_kernels(ptrdiff_t size, const real *planes, real *dkernel) {
    const ptrdiff_t apart = plane(size);
    for (ptrdiff_t c = 0; c < size; c += LANES) {
        const int N = size - c < LANES ? (int)(size - c) : LANES;
        real made[9][LANES];
        transform_square(transpose_kernel, REACH, 3, N, planes + c, REACH * apart, apart, made[0], 3 * LANES,
                         LANES);
        for (int tap = 0; tap < 9; tap++)
            for (int n = 0; n < N; n++)
                dkernel[tap * size + c + n] += made[tap][n];
    }
}

/* N channels of one tile of outputs, of which rows x columns lie in the image: y = A^T m A + bias + start. */
INLINE void write_tile(const int N, const real *m, ptrdiff_t apart, int rows, int columns, ptrdiff_t line,
                       ptrdiff_t step, const real *bias, const real *start, real *y) {
    real tile[TILE][TILE][LANES];
    transform_square(transform_output, REACH, TILE, N, m, REACH * apart, apart, tile[0][0], TILE * LANES,
                     LANES);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) {
            const ptrdiff_t at = i * line + j * step;
#pragma omp simd
            for (int n = 0; n < N; n++)
                y[at + n] = tile[i][j][n] + (bias ? bias[n] : 0) + (start ? start[at + n] : 0);
        }
}

/* Below these sizes the transforms cost more than they save. */
static int filtering_pays(int h, int w, int in, int out) {
    return in >= 16 && out >= 16 && h * w >= 196;
}

void convolve3x3_fast(int h, int w, int in, int out, const real *x, const real *kernel, const real *bias,
                      const real *start, real *y, Arena *scratch) {
    if (!filtering_pays(h, w, in, out)) {
        convolve3x3(h, w, in, out, x, kernel, bias, start, y, scratch);
        return;
    }
    const ArenaMark mark = arena_mark(scratch);
    const Tiling t = tiling(h, w);
    const int width = t.columns * TILE + 2;
    const ptrdiff_t size = (ptrdiff_t)in * out, x_apart = plane(t.tiles * in), m_apart = plane(t.tiles * out);
    const real *image = in_zeros(h, w, in, x, 1, t.lines * TILE + 2, width, scratch);
    real *xs = arena_allocate(scratch, PLACES * x_apart, sizeof(real)),
         *ms = arena_allocate(scratch, PLACES * m_apart, sizeof(real)),
         *ks = arena_allocate(scratch, PLACES * plane(size), sizeof(real));
    transform_kernels(size, kernel, ks);
    for (int first = 0; first < t.lines; first += t.lines_at_once) {
        const int lines = t.lines - first < t.lines_at_once ? t.lines - first : t.lines_at_once;
        transform_tiles(transform_input, REACH, &t, lines, in, width,
                        image + (ptrdiff_t)first * TILE * width * in, xs);
        for (int place = 0; place < PLACES; place++)
            matrix_product(lines * t.columns, in, out, xs + place * x_apart, ks + place * plane(size), NULL,
                           NULL, ms + place * m_apart, scratch);
        for (int i = 0; i < lines * t.columns; i++) {
            const int row = (first + i / t.columns) * TILE, column = i % t.columns * TILE;
            const int rows = h - row < TILE ? h - row : TILE, columns = w - column < TILE ? w - column : TILE;
            for (int c = 0; c < out; c += LANES) {
                const ptrdiff_t at = ((ptrdiff_t)row * w + column) * out + c, line = (ptrdiff_t)w * out;
                const real *m = ms + (ptrdiff_t)i * out + c, *b = bias ? bias + c : NULL,
                           *s = start ? start + at : NULL;
                if (out - c >= LANES)
                    write_tile(LANES, m, m_apart, rows, columns, line, out, b, s, y + at);
                else
                    write_tile(out - c, m, m_apart, rows, columns, line, out, b, s, y + at);
            }
        }
    }
    arena_release(scratch, mark);
}

void convolve3x3_by_kernel_fast(int h, int w, int in, int out, const real *x, const real *dy, real *dkernel,
                                Arena *scratch) {
    if (!filtering_pays(h, w, in, out)) {
        convolve3x3_by_kernel(h, w, in, out, x, dy, dkernel, scratch);
        return;
    }
    const ArenaMark mark = arena_mark(scratch);
    const Tiling t = tiling(h, w);
    const int width = t.columns * TILE;
    const ptrdiff_t size = (ptrdiff_t)in * out, x_apart = plane(t.tiles * in), m_apart = plane(t.tiles * out);
    const real *image = in_zeros(h, w, in, x, 1, t.lines * TILE + 2, width + 2, scratch), *dy_image = dy;
    if (h % TILE || w % TILE)
        dy_image = in_zeros(h, w, out, dy, 0, t.lines * TILE, width, scratch);
    real *xs = arena_allocate(scratch, PLACES * x_apart, sizeof(real)),
         *ms = arena_allocate(scratch, PLACES * m_apart, sizeof(real)),
         *ks = arena_allocate(scratch, PLACES * plane(size), sizeof(real));
    for (int first = 0; first < t.lines; first += t.lines_at_once) {
        const int lines = t.lines - first < t.lines_at_once ? t.lines - first : t.lines_at_once;
        transform_tiles(transform_input, REACH, &t, lines, in, width + 2,
                        image + (ptrdiff_t)first * TILE * (width + 2) * in, xs);
        transform_tiles(transpose_output, TILE, &t, lines, out, width,
                        dy_image + (ptrdiff_t)first * TILE * width * out, ms);
        for (int place = 0; place < PLACES; place++) {
            real *k = ks + place * plane(size);
            product(&(Product){.lines = 1, .rows = in, .columns = out, .segments = 1,
                               .inner = lines * t.columns, .a = xs + place * x_apart, .a_row = 1,
                               .a_inner = in, .b = ms + place * m_apart, .b_row = out, .c = k, .c_row = out,
                               .start = first ? k : NULL}, scratch);
        }
    }
    add_kernels(size, ks, dkernel);
    arena_release(scratch, mark);
}

/* ---- group normalisation ---- */

static const double GROUP_NORM_EPS = 1e-6;
enum { MAX_CHANNELS = 4096 };   /* of one tensor; nn.c refuses models beyond it */

/* The loops that matter take channels LANES at a time and walk down the positions with them, so that what
 * belongs to a channel stays in registers; N is the constant LANES for whole blocks and what is left for
 * the last one. */

static void check_norm(const GroupNorm *n) {
    assert(n->groups > 0 && n->channels > 0 && n->channels <= MAX_CHANNELS && n->channels % n->groups == 0);
}

/* per[channels] = the value of each channel's group, so that inner loops run over channels without a
 * division. */
static void spread(const GroupNorm *n, const real *group, real *per) {
    check_norm(n);
    for (int c = 0; c < n->channels; c++)
        per[c] = group[c / (n->channels / n->groups)];
}

/* group[groups] = the mean over each group of per-channel sums. */
static void group_means(const GroupNorm *n, const real *sum, real *group) {
    check_norm(n);
    const int width = n->channels / n->groups;
    for (int g = 0; g < n->groups; g++) {
        double total = 0;
        for (int c = g * width; c < (g + 1) * width; c++)
            /* NOLINTNEXTLINE(clang-analyzer-core.uninitialized.Assign): paired_sums fills all of it */
            total += sum[c];
        group[g] = (real)(total / ((double)n->positions * width));
    }
}

/* swish(u) = u s and its derivatives, s = sigmoid(u). */
static inline real swish_slope(real u, real s) {
    return s * (1 + u * (1 - s));
}
static inline real swish_curve(real u, real s) {
    return s * (1 - s) * (2 + u * (1 - 2 * s));
}

/* For N channels: sum[n] = sum of u and sum_product[n] = sum of u (w - shift) over all positions. Four
 * partial sums, so that an addition need not wait for the one before. */
static inline void paired_sums_block(const int N, int positions, int C, const real *u, const real *u_shift,
                                     const real *w, const real *w_shift, real *sum, real *sum_product) {
    enum { PARTS = 4 };
    real s[PARTS][LANES] = {{0}}, p[PARTS][LANES] = {{0}};
    int i = 0;
    for (; i + PARTS <= positions; i += PARTS)
        for (int part = 0; part < PARTS; part++) {
            const real *ui = u + (size_t)(i + part) * C, *wi = w + (size_t)(i + part) * C;
#pragma omp simd
            for (int n = 0; n < N; n++) {
                const real d = ui[n] - u_shift[n];
                s[part][n] += d;
                p[part][n] += d * (wi[n] - w_shift[n]);
            }
        }
    for (; i < positions; i++)
        for (int n = 0; n < N; n++) {
            const real d = u[(size_t)i * C + n] - u_shift[n];
            s[0][n] += d;
            p[0][n] += d * (w[(size_t)i * C + n] - w_shift[n]);
        }
    for (int n = 0; n < N; n++) {
        sum[n] = (s[0][n] + s[1][n]) + (s[2][n] + s[3][n]);
        sum_product[n] = (p[0][n] + p[1][n]) + (p[2][n] + p[3][n]);
    }
}

/* Per channel: sum = sum of (u - u_shift), sum_product = sum of (u - u_shift)(w - w_shift), over all
 * positions. */
static void paired_sums(const GroupNorm *n, const real *u, const real *u_shift, const real *w,
                        const real *w_shift, real *sum, real *sum_product) {
    const int C = n->channels;
    check_norm(n);
    for (int c = 0; c < C; c += LANES)
        if (C - c >= LANES)
            paired_sums_block(LANES, n->positions, C, u + c, u_shift + c, w + c, w_shift + c, sum + c,
                              sum_product + c);
        else
            paired_sums_block(C - c, n->positions, C, u + c, u_shift + c, w + c, w_shift + c, sum + c,
                              sum_product + c);
}

/* n = gain x + offset, per channel. */
static void gain_and_offset(const GroupNorm *n, real *gain, real *offset) {
    spread(n, n->rstd, gain);
    spread(n, n->mean, offset);
    for (int c = 0; c < n->channels; c++) {
        gain[c] *= n->scale[c];
        offset[c] = n->bias[c] - offset[c] * gain[c];
    }
}

/* Mean and variance in one pass, of the distances to the mean of a few positions spread over the image:
 * close to the mean of all, so that no digits are lost in the difference of large sums. One position alone
 * could be the outlier. */
static void group_statistics(const GroupNorm *n, const real *x) {
    enum { SAMPLES = 16 };
    const int C = n->channels, width = C / n->groups;
    const double count = (double)n->positions * width;
    real sum[MAX_CHANNELS], squares[MAX_CHANNELS], near[MAX_CHANNELS];
    memset(near, 0, C * sizeof(real));
    for (size_t s = 0; s < SAMPLES; s++)
        for (int c = 0; c < C; c++)
            near[c] += x[s * n->positions / SAMPLES * C + c] / SAMPLES;
    paired_sums(n, x, near, x, near, sum, squares);
    for (int g = 0; g < n->groups; g++) {
        double mean = 0, variance = 0;
        for (int c = g * width; c < (g + 1) * width; c++)
            mean += (double)near[c] + sum[c] / (double)n->positions;
        mean /= width;
        for (int c = g * width; c < (g + 1) * width; c++) {
            const double shift = near[c] - mean;
            variance += squares[c] + 2 * shift * sum[c] + shift * shift * n->positions;
        }
        n->mean[g] = (real)mean;
        n->rstd[g] = (real)(1 / sqrt(variance / count + GROUP_NORM_EPS));
    }
}

static inline void normalise_block(const int N, int positions, int C, int swish, const real *x,
                                   const real *gain, const real *offset, real *y) {
    if (swish)
        for (int i = 0; i < positions; i++, x += C, y += C)
#pragma omp simd
            for (int n = 0; n < N; n++) {
                const real u = x[n] * gain[n] + offset[n];
                y[n] = u * sigmoid(u);
            }
    else
        for (int i = 0; i < positions; i++, x += C, y += C)
#pragma omp simd
            for (int n = 0; n < N; n++)
                y[n] = x[n] * gain[n] + offset[n];
}

void group_norm(const GroupNorm *n, const real *x, real *y) {
    const int C = n->channels;
    real gain[MAX_CHANNELS], offset[MAX_CHANNELS];
    group_statistics(n, x);
    gain_and_offset(n, gain, offset);
    for (int c = 0; c < C; c += LANES)
        if (C - c >= LANES)
            normalise_block(LANES, n->positions, C, n->swish, x + c, gain + c, offset + c, y + c);
        else
            normalise_block(C - c, n->positions, C, n->swish, x + c, gain + c, offset + c, y + c);
    for (size_t i = 0; n->keep && i < (size_t)n->positions * C; i++)
        y[i] *= n->keep[i];
}

/* The reverse of normalisation alone: for dn [positions, channels], the gradient by n,
 *     dscale += sum dn xhat,  dbias += sum dn,
 *     dx = start + rstd (g - mean(g) - xhat mean(g xhat)),  g = scale dn, means over the group. */
static void normalise_backward(const GroupNorm *n, const real *x, const real *dn, const real *start, real *dx,
                               real *dscale, real *dbias) {
    const int C = n->channels;
    real mean[MAX_CHANNELS], rstd[MAX_CHANNELS], sum[MAX_CHANNELS], sum_xhat[MAX_CHANNELS],
        zero[MAX_CHANNELS];
    spread(n, n->mean, mean);
    spread(n, n->rstd, rstd);
    memset(zero, 0, C * sizeof(real));
    paired_sums(n, dn, zero, x, mean, sum, sum_xhat);
    for (int c = 0; c < C; c++) {
        sum_xhat[c] *= rstd[c];
        if (dbias)
            dbias[c] += sum[c];
        if (dscale)
            dscale[c] += sum_xhat[c];
        sum[c] *= n->scale[c];
        sum_xhat[c] *= n->scale[c];
    }
    if (!dx)
        return;
    real group[MAX_CHANNELS], offset[MAX_CHANNELS], slope[MAX_CHANNELS], gain[MAX_CHANNELS];
    group_means(n, sum, group);
    spread(n, group, offset);
    group_means(n, sum_xhat, group);
    spread(n, group, slope);
    for (int c = 0; c < C; c++) {
        gain[c] = rstd[c] * n->scale[c];
        slope[c] *= -rstd[c] * rstd[c];
        offset[c] = -rstd[c] * offset[c] - slope[c] * mean[c];
    }
    for (int i = 0; i < n->positions; i++) {
        const size_t at = (size_t)i * C;
        if (start)
#pragma omp simd
            for (int c = 0; c < C; c++)
                dx[at + c] = start[at + c] + (gain[c] * dn[at + c] + slope[c] * x[at + c] + offset[c]);
        else
#pragma omp simd
            for (int c = 0; c < C; c++)
                dx[at + c] = gain[c] * dn[at + c] + slope[c] * x[at + c] + offset[c];
    }
}

/* dn = dy swish'(n) */
static inline void swish_backward_block(const int N, int positions, int C, const real *x, const real *gain,
                                        const real *offset, const real *dy, real *dn) {
    for (int i = 0; i < positions; i++, x += C, dy += C, dn += C)
#pragma omp simd
        for (int n = 0; n < N; n++) {
            const real u = x[n] * gain[n] + offset[n];
            dn[n] = dy[n] * swish_slope(u, sigmoid(u));
        }
}

void group_norm_backward(const GroupNorm *n, const real *x, const real *dy, const real *start, real *dx,
                         real *dscale, real *dbias, Arena *scratch) {
    const ArenaMark mark = arena_mark(scratch);
    const int C = n->channels;
    const size_t count = (size_t)n->positions * C;
    const real *dn = dy;
    if (n->swish) {
        real gain[MAX_CHANNELS], offset[MAX_CHANNELS], *made = arena_allocate(scratch, count, sizeof(real));
        gain_and_offset(n, gain, offset);
        for (int c = 0; c < C; c += LANES)
            if (C - c >= LANES)
                swish_backward_block(LANES, n->positions, C, x + c, gain + c, offset + c, dy + c, made + c);
            else
                swish_backward_block(C - c, n->positions, C, x + c, gain + c, offset + c, dy + c, made + c);
        dn = made;
    }
    if (n->keep) {
        real *made = arena_allocate(scratch, count, sizeof(real));
        for (size_t i = 0; i < count; i++)
            made[i] = dn[i] * n->keep[i];
        dn = made;
    }
    normalise_backward(n, x, dn, start, dx, dscale, dbias);
    arena_release(scratch, mark);
}

/* xhat_dot = rstd (v - mean(v) - xhat mean(xhat v)), the tangent of xhat for a tangent v of x. The same
 * linear, symmetric map J takes tangents forward and gradients back. Returns in inner[groups] mean(xhat
 * v). */
static void normalise_tangent(const GroupNorm *n, const real *x, const real *v, real *out, real *inner) {
    const int C = n->channels;
    real mean[MAX_CHANNELS], rstd[MAX_CHANNELS], sum[MAX_CHANNELS], sum_xhat[MAX_CHANNELS],
        zero[MAX_CHANNELS];
    spread(n, n->mean, mean);
    spread(n, n->rstd, rstd);
    memset(zero, 0, C * sizeof(real));
    paired_sums(n, v, zero, x, mean, sum, sum_xhat);
    for (int c = 0; c < C; c++)
        sum_xhat[c] *= rstd[c];
    group_means(n, sum, inner);
    spread(n, inner, sum);
    group_means(n, sum_xhat, inner);
    spread(n, inner, sum_xhat);
    for (int i = 0; i < n->positions; i++)
#pragma omp simd
        for (int c = 0; c < C; c++) {
            const size_t at = (size_t)i * C + c;
            const real xhat = (x[at] - mean[c]) * rstd[c];
            out[at] = rstd[c] * (v[at] - sum[c] - xhat * sum_xhat[c]);
        }
}

void group_norm_tangent(const GroupNorm *n, const real *x, const real *x_dot, real *y_dot) {
    const int C = n->channels;
    real inner[MAX_CHANNELS], gain[MAX_CHANNELS], offset[MAX_CHANNELS];
    normalise_tangent(n, x, x_dot, y_dot, inner);
    gain_and_offset(n, gain, offset);
    for (int i = 0; i < n->positions; i++)
        if (n->swish)
#pragma omp simd
            for (int c = 0; c < C; c++) {
                const size_t at = (size_t)i * C + c;
                const real u = x[at] * gain[c] + offset[c];
                y_dot[at] *= n->scale[c] * swish_slope(u, sigmoid(u));
            }
        else
#pragma omp simd
            for (int c = 0; c < C; c++)
                y_dot[(size_t)i * C + c] *= n->scale[c];
    for (size_t i = 0; n->keep && i < (size_t)n->positions * C; i++)
        y_dot[i] *= n->keep[i];
}

void group_norm_tangent_backward(const GroupNorm *n, const real *x, const real *x_dot, const real *dy_dot,
                                 real *dx, real *dx_dot, real *dscale, real *dbias, Arena *scratch) {
    /* y_dot = keep swish'(n) n_dot with n_dot = scale xhat_dot. Two gradients flow back: dn through
     * swish'(n), which is the plain reverse mode, and g = scale dn_dot through the map xhat_dot = J(x)
     * x_dot, for which
     *     dx_dot = J g
     *     dx     = -rstd [ xhat mean(g xhat_dot) + mean(xhat x_dot) J g + mean(xhat g) xhat_dot ]
     * because d xhat = J dx and d rstd = -rstd^2 mean(xhat dx). */
    const ArenaMark mark = arena_mark(scratch);
    const int C = n->channels;
    const size_t count = (size_t)n->positions * C;
    real *xhat_dot = arena_allocate(scratch, count, sizeof(real)),
         *g = arena_allocate(scratch, count, sizeof(real));
    real *dn = arena_allocate(scratch, count, sizeof(real)),
         *Jg = arena_allocate(scratch, count, sizeof(real));
    real mean[MAX_CHANNELS], rstd[MAX_CHANNELS], x_inner[MAX_CHANNELS], g_inner[MAX_CHANNELS],
        group[MAX_CHANNELS];
    real gain[MAX_CHANNELS], offset[MAX_CHANNELS], sum[MAX_CHANNELS], mixed[MAX_CHANNELS], zero[MAX_CHANNELS];
    spread(n, n->mean, mean);
    spread(n, n->rstd, rstd);
    gain_and_offset(n, gain, offset);
    memset(zero, 0, C * sizeof(real));
    normalise_tangent(n, x, x_dot, xhat_dot, group);
    spread(n, group, x_inner);
    for (size_t at = 0; at < count; at++)
        g[at] = n->keep ? dy_dot[at] * n->keep[at] : dy_dot[at];
    for (int i = 0; n->swish && i < n->positions; i++)
#pragma omp simd
        for (int c = 0; c < C; c++) {
            const size_t at = (size_t)i * C + c;
            const real u = x[at] * gain[c] + offset[c], s = sigmoid(u), d = g[at];
            dn[at] = d * swish_curve(u, s) * n->scale[c] * xhat_dot[at];
            g[at] = d * swish_slope(u, s);
        }
    paired_sums(n, g, zero, xhat_dot, zero, sum, mixed);   /* mixed = sum of dn_dot xhat_dot */
    for (int c = 0; c < C; c++) {
        if (dscale)
            dscale[c] += mixed[c];
        mixed[c] *= n->scale[c];
    }
    group_means(n, mixed, group);
    spread(n, group, mixed);
    for (int i = 0; i < n->positions; i++)
#pragma omp simd
        for (int c = 0; c < C; c++)
            g[(size_t)i * C + c] *= n->scale[c];
    normalise_tangent(n, x, g, Jg, group);
    spread(n, group, g_inner);
    if (n->swish)
        normalise_backward(n, x, dn, dx, dx, dscale, dbias);
    for (int i = 0; dx && i < n->positions; i++)
#pragma omp simd
        for (int c = 0; c < C; c++) {
            const size_t at = (size_t)i * C + c;
            dx[at] -= rstd[c] * ((x[at] - mean[c]) * rstd[c] * mixed[c] + x_inner[c] * Jg[at]
                                 + g_inner[c] * xhat_dot[at]);
        }
    for (size_t at = 0; dx_dot && at < count; at++)
        dx_dot[at] += Jg[at];
    arena_release(scratch, mark);
}

/* ---- softmax ---- */

/* Sums over a row keep one partial sum a lane, so that they run in vector registers in a fixed order. */
void softmax_rows(real *s, int rows, int columns) {
    for (int i = 0; i < rows; i++, s += columns) {
        real lane[LANES], top = s[0], total = 0;
        int j = 0;
        for (int l = 0; l < LANES; l++)
            lane[l] = s[0];
        for (; j + LANES <= columns; j += LANES)
            for (int l = 0; l < LANES; l++)
                lane[l] = s[j + l] > lane[l] ? s[j + l] : lane[l];
        for (; j < columns; j++)
            top = s[j] > top ? s[j] : top;
        for (int l = 0; l < LANES; l++) {
            top = lane[l] > top ? lane[l] : top;
            lane[l] = 0;
        }
        for (j = 0; j + LANES <= columns; j += LANES)
            for (int l = 0; l < LANES; l++) {
                s[j + l] = exp_inline(s[j + l] - top);
                lane[l] += s[j + l];
            }
        for (; j < columns; j++)
            total += s[j] = exp_inline(s[j] - top);
        for (int l = 0; l < LANES; l++)
            total += lane[l];
        const real scale = 1 / total;
        for (j = 0; j < columns; j++)
            s[j] *= scale;
    }
}

/* sum of x[j] y[j] over a row, in real: twice as fast as dot, and rows of a softmax are no place for
 * cancellation. */
static real row_dot(const real *x, const real *y, int columns) {
    real lane[LANES] = {0}, total = 0;
    int j = 0;
    for (; j + LANES <= columns; j += LANES)
#pragma omp simd
        for (int l = 0; l < LANES; l++)
            lane[l] += x[j + l] * y[j + l];
    for (; j < columns; j++)
        total += x[j] * y[j];
    for (int l = 0; l < LANES; l++)
        total += lane[l];
    return total;
}

/* dp -> p (dp - sum(p dp)), row by row. */
void softmax_rows_backward(const real *p, real *dp, int rows, int columns) {
    for (int i = 0; i < rows; i++, p += columns, dp += columns) {
        const real inner = row_dot(p, dp, columns);
        for (int j = 0; j < columns; j++)
            dp[j] = p[j] * (dp[j] - inner);
    }
}

double dot(const real *x, const real *y, size_t count) {
    double lane[LANES] = {0}, total = 0;
    size_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int l = 0; l < LANES; l++)
            lane[l] += (double)x[i + l] * (double)y[i + l];
    for (; i < count; i++)
        total += (double)x[i] * (double)y[i];
    for (int l = 0; l < LANES; l++)
        total += lane[l];
    return total;
}

/* x(c) = 2 (c + 1/2)/256 - 1 and the c whose x(c) is nearest to u. */
enum { LEVELS = 256 };
static double level_value(int c) {
    return 2 * (c + 0.5) / LEVELS - 1;
}
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
     * and its derivatives are 2 h (E x(c) - x(k)) by u and d_k^2 - E d_c^2 by h, E under p(c). */
    const real h = (real)(precision / 2), spacing = (real)2 / LEVELS;
    double total = 0, by_h = 0;
    for (size_t i = 0; i < count; i++) {
        /* Distances are taken from the nearest level, where they are small and exact: x(c) = x(c*) +
         * spacing j. */
        const int nearest = nearest_level(u[i]);
        const real d = (real)(u[i] - level_value(nearest));
        real weight[LANES] = {0}, first[LANES] = {0}, second[LANES] = {0};
        for (int c = 0; c < LEVELS; c += LANES)
            for (int l = 0; l < LANES; l++) {
                real step = spacing * (real)(c + l - nearest);
                real excess = step * (step - 2 * d);   /* d_c^2 - d_*^2 */
                real w = exp_inline(-h * excess);
                weight[l] += w;
                first[l] += w * step;
                second[l] += w * excess;
            }
        double w = 0, w1 = 0, w2 = 0;
        for (int l = 0; l < LANES; l++)
            w += weight[l], w1 += first[l], w2 += second[l];
        const double step_k = (double)spacing * (k[i] - nearest),
                     excess_k = step_k * (step_k - 2 * (double)d);
        total += h * excess_k + log(w);
        du[i] = (real)(2 * (double)h * (w1 / w - step_k));
        by_h += excess_k - w2 / w;
    }
    *dprecision = by_h / 2;
    return total;
}

double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}
