/* Products with quantized weights on a CPU, for brise/kernels/native.py, which compiles this file.

   A weight of N rows: packed codes of 2, 4 or 8 bits, K of them a row, the first of a byte in its lowest bits; an
   fp32 scale, and where there are any an fp32 zero point, for each of G groups of a row.
       w[n][k] = (value(code) - zero[n][g]) * scale[n][g]
   With up to 4 bits value is a table of 16, which fits one AVX-512 register, so that looking up 16 codes is one
   instruction; 8-bit codes are their own values.

   Codes are read a chunk at a time, as many 32-bit words as a register has lanes. All first codes of the words are
   multiplied, then all second ones: x comes in that order, [M][chunks][codes a word][lanes], and 0 behind its end. A
   group is a part of a chunk, or chunks.

   Whatever M is and however the rows are shared out, each product adds up the same numbers in the same order: a row
   of the result depends on no other row of x, in any bit. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stddef.h>

#if defined(__AVX512F__)

#define LANES 16
typedef __m512 vec;
typedef __m512i ivec;
typedef struct { vec all; } table16;
static inline vec load(const float *p) { return _mm512_loadu_ps(p); }
static inline void store(float *p, vec v) { _mm512_storeu_ps(p, v); }
static inline vec all(float f) { return _mm512_set1_ps(f); }
static inline vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
static inline vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
static inline vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
static inline vec fma3(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline ivec bytes(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
static inline ivec shift(ivec i, int bits) { return _mm512_srli_epi32(i, bits); }
static inline vec number(ivec i) { return _mm512_cvtepi32_ps(i); }
static inline table16 table(const float *p) { table16 t = {load(p)}; return t; }
/* the lowest 4 bits of each lane choose */
static inline vec look(table16 t, ivec i) { return _mm512_permutexvar_ps(i, t.all); }
static inline ivec words(const uint8_t *p, int count) {
    return count >= 16 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi32((1u << count) - 1, p);
}
static inline ivec signed_bytes(const uint8_t *p, int count) {
    const __m128i all = count >= 16 ? _mm_loadu_si128((const __m128i *)p) : _mm_maskz_loadu_epi8((1u << count) - 1, p);
    return _mm512_cvtepi8_epi32(_mm_xor_si128(all, _mm_set1_epi8(-128)));
}
static inline ivec whole(const int32_t *p) { return _mm512_loadu_si512(p); }
/* p[lane's group], of which there are count */
static inline vec spread(const float *p, int count, ivec group) {
    return _mm512_permutexvar_ps(group, _mm512_maskz_loadu_ps((1u << count) - 1, p));
}
static inline ivec rounded(vec v) {
    ivec u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
}
static inline void store_bf16(uint16_t *p, vec v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(rounded(v)));
}
static inline void store_fp16(uint16_t *p, vec v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
/* a0 b0 a1 b1 ...: first half, second half */
static inline void mix(vec a, vec b, vec *first, vec *second) {
    const ivec low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    *first = _mm512_permutex2var_ps(a, low, b);
    *second = _mm512_permutex2var_ps(a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b);
}

#elif defined(__AVX2__)

#define LANES 8
typedef __m256 vec;
typedef __m256i ivec;
typedef struct { vec low, high; } table16;
static inline vec load(const float *p) { return _mm256_loadu_ps(p); }
static inline void store(float *p, vec v) { _mm256_storeu_ps(p, v); }
static inline vec all(float f) { return _mm256_set1_ps(f); }
static inline vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
static inline vec sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
static inline vec mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
static inline vec fma3(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline ivec bytes(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
static inline ivec shift(ivec i, int bits) { return _mm256_srli_epi32(i, bits); }
static inline vec number(ivec i) { return _mm256_cvtepi32_ps(i); }
static inline table16 table(const float *p) { table16 t = {load(p), load(p + 8)}; return t; }
/* the lowest 3 bits choose in each half, the fourth, shifted to the sign, between them */
static inline vec look(table16 t, ivec i) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, i), _mm256_permutevar8x32_ps(t.high, i),
                            _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}
static inline ivec lanes_below(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline ivec words(const uint8_t *p, int count) {
    return count >= 8 ? _mm256_loadu_si256((const __m256i *)p) : _mm256_maskload_epi32((const int *)p, lanes_below(count));
}
static inline ivec signed_bytes(const uint8_t *p, int count) {
    uint8_t held[8] = {0};
    for (int i = 0; i < 8 && i < count; i++) held[i] = p[i];
    return _mm256_cvtepi8_epi32(_mm_xor_si128(_mm_loadl_epi64((const __m128i *)held), _mm_set1_epi8(-128)));
}
static inline ivec whole(const int32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
/* p[lane's group], of which there are count */
static inline vec spread(const float *p, int count, ivec group) {
    return _mm256_permutevar8x32_ps(_mm256_maskload_ps(p, lanes_below(count)), group);
}
static inline void store_bf16(uint16_t *p, vec v) {
    ivec u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    u = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    u = _mm256_permute4x64_epi64(_mm256_packus_epi32(u, u), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(u));
}
static inline void store_fp16(uint16_t *p, vec v) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void mix(vec a, vec b, vec *first, vec *second) {
    vec low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
    *first = _mm256_permute2f128_ps(low, high, 0x20);
    *second = _mm256_permute2f128_ps(low, high, 0x31);
}

#else
#error "needs AVX2 or AVX-512"
#endif

#define INLINE static inline __attribute__((always_inline))
enum { FP32 = 0, BF16 = 1, FP16 = 2 };

typedef struct {
    const uint8_t *codes;
    const float *scale, *zero, *values;
    ptrdiff_t n, k, groups;
} weight;

int brise_lanes(void) { return LANES; }

INLINE float total(vec v) {
    float lanes[LANES], sum = 0;
    store(lanes, v);
    for (int i = 0; i < LANES; i++) sum += lanes[i];
    return sum;
}

/* how a row is cut: bytes a row, a chunk and a group; chunks; the group of each lane where a chunk holds several */
typedef struct {
    ptrdiff_t row, chunk, group, chunks;
    int32_t lane[LANES];
} cut;

static cut cut_of(const weight *w, int bits) {
    cut c = {w->k * bits / 8, bits == 8 ? LANES : 4 * LANES, 0, 0, {0}};
    c.group = c.row / w->groups;
    c.chunks = (c.row + c.chunk - 1) / c.chunk;
    for (int i = 0; i < LANES; i++)
        if (c.group < c.chunk) c.lane[i] = (int32_t)(i * (c.chunk / LANES) / c.group);
    return c;
}

/* the scales, or zero points, of a chunk's lanes */
INLINE vec of_groups(const float *p, const weight *w, const cut *c, ptrdiff_t n, ptrdiff_t chunk) {
    const float *row = p + n * w->groups;
    if (c->group >= c->chunk) return all(row[chunk * c->chunk / c->group]);
    const ptrdiff_t first = chunk * c->chunk / c->group, most = c->chunk / c->group, left = w->groups - first;
    return spread(row + first, (int)(left < most ? left : most), whole(c->lane));
}

/* rows n .. n+rows of the weight with tokens of x -> out[token][n], N numbers a token */
INLINE void product(int bits, int has_zero, int rows, int tokens, const weight *w, const cut *c, ptrdiff_t n,
                    const float *x, float *out) {
    const int a_word = bits == 8 ? 1 : 32 / bits;
    const table16 values = table(w->values);
    vec sums[4][4];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) sums[r][t] = all(0);
    for (ptrdiff_t chunk = 0; chunk < c->chunks; chunk++) {
        const ptrdiff_t at = chunk * c->chunk, left = (c->row - at) * LANES / c->chunk;
        ivec codes[4];
        vec parts[4][4], zero[4];
        for (int r = 0; r < rows; r++) {
            const uint8_t *p = w->codes + (n + r) * c->row + at;
            __builtin_prefetch(p + rows * c->row); /* the next rows; past the last it asks for nothing */
            codes[r] = bits == 8 ? signed_bytes(p, left < LANES ? (int)left : LANES)
                                 : words(p, left < LANES ? (int)left : LANES);
            if (has_zero) zero[r] = of_groups(w->zero, w, c, n + r, chunk);
            if (has_zero && bits == 8) zero[r] = sub(zero[r], all(128));
            for (int t = 0; t < tokens; t++) parts[r][t] = all(0);
        }
#pragma GCC unroll 16
        for (int i = 0; i < a_word; i++) {
            vec v[4];
            for (int r = 0; r < rows; r++) {
                v[r] = bits == 8 ? number(codes[r]) : look(values, i ? shift(codes[r], bits * i) : codes[r]);
                if (has_zero) v[r] = sub(v[r], zero[r]);
            }
            for (int t = 0; t < tokens; t++) {
                const vec with = load(x + ((t * c->chunks + chunk) * a_word + i) * LANES);
                for (int r = 0; r < rows; r++) parts[r][t] = fma3(v[r], with, parts[r][t]);
            }
        }
        for (int r = 0; r < rows; r++) {
            const vec scale = of_groups(w->scale, w, c, n + r, chunk);
            for (int t = 0; t < tokens; t++) sums[r][t] = fma3(parts[r][t], scale, sums[r][t]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) out[t * w->n + n + r] = total(sums[r][t]);
}

#ifdef __AVX512BF16__

/* As product, for 4 bits without zero points and x in bf16, [M][chunks][4][32]: the values are rounded to bf16, and
   two products at a time are added up in fp32. */
INLINE void product_bf16(int rows, int tokens, const weight *w, const cut *c, ptrdiff_t n, const uint16_t *x,
                         float *out) {
    uint16_t twice[32];
    for (int i = 0; i < 2; i++) store_bf16(twice + 16 * i, load(w->values));
    const ivec values = _mm512_loadu_si512(twice);
    vec sums[4][4];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) sums[r][t] = all(0);
    for (ptrdiff_t chunk = 0; chunk < c->chunks; chunk++) {
        const ptrdiff_t at = chunk * c->chunk, left = (c->row - at) / 4;
        ivec codes[4];
        vec parts[4][4];
        for (int r = 0; r < rows; r++) {
            const uint8_t *p = w->codes + (n + r) * c->row + at;
            __builtin_prefetch(p + rows * c->row);
            codes[r] = words(p, left < LANES ? (int)left : LANES);
            for (int t = 0; t < tokens; t++) parts[r][t] = all(0);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __m512bh v[4];
            for (int r = 0; r < rows; r++)
                v[r] = (__m512bh)_mm512_permutexvar_epi16(i ? _mm512_srli_epi16(codes[r], 4 * i) : codes[r], values);
            for (int t = 0; t < tokens; t++) {
                const __m512bh with = (__m512bh)_mm512_loadu_si512(x + ((t * c->chunks + chunk) * 4 + i) * 32);
                for (int r = 0; r < rows; r++) parts[r][t] = _mm512_dpbf16_ps(parts[r][t], v[r], with);
            }
        }
        for (int r = 0; r < rows; r++) {
            const vec scale = of_groups(w->scale, w, c, n + r, chunk);
            for (int t = 0; t < tokens; t++) sums[r][t] = fma3(parts[r][t], scale, sums[r][t]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) out[t * w->n + n + r] = total(sums[r][t]);
}

int brise_has_bf16(void) { return 1; }

#else

INLINE void product_bf16(int rows, int tokens, const weight *w, const cut *c, ptrdiff_t n, const uint16_t *x,
                         float *out) {
    (void)rows, (void)tokens, (void)w, (void)c, (void)n, (void)x, (void)out;
}

int brise_has_bf16(void) { return 0; }

#endif

#define KINDS(WITH) WITH(2, 0) WITH(2, 1) WITH(4, 0) WITH(4, 1) WITH(8, 0) WITH(8, 1)
#define BLOCK(BITS, ZERO) \
    static void block_##BITS##_##ZERO(const weight *w, const cut *c, ptrdiff_t n, int rows, int tokens, const void *x, \
                                      float *out) { \
        SIZES(product, BITS, ZERO) \
    }
#define SIZES(PRODUCT, ...) \
    if (rows == 2) PRODUCT(__VA_ARGS__, 2, 4, w, c, n, x, out); \
    else if (rows == 4 && tokens == 2) PRODUCT(__VA_ARGS__, 4, 2, w, c, n, x, out); \
    else if (rows == 4) PRODUCT(__VA_ARGS__, 4, 1, w, c, n, x, out); \
    else if (tokens == 4) PRODUCT(__VA_ARGS__, 1, 4, w, c, n, x, out); \
    else if (tokens == 2) PRODUCT(__VA_ARGS__, 1, 2, w, c, n, x, out); \
    else PRODUCT(__VA_ARGS__, 1, 1, w, c, n, x, out);

KINDS(BLOCK)

/* of one kind only, but a macro wants something before the sizes */
#define PRODUCT_BF16(KIND, ...) product_bf16(__VA_ARGS__)
static void block_bf16(const weight *w, const cut *c, ptrdiff_t n, int rows, int tokens, const void *x, float *out) {
    SIZES(PRODUCT_BF16, 4)
}

/* As product, for a dense weight fp32 [N][K] that lies where codes do, and x as it comes. */
INLINE void product_dense(int rows, int tokens, const weight *w, const cut *c, ptrdiff_t n, const float *x,
                          float *out) {
    (void)c;
    const float *dense = (const float *)w->codes + n * w->k;
    vec sums[4][4];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) sums[r][t] = all(0);
    for (ptrdiff_t k = 0; k < w->k; k += LANES) {
        vec v[4];
        for (int r = 0; r < rows; r++) {
            v[r] = load(dense + r * w->k + k);
            __builtin_prefetch(dense + (rows + r) * w->k + k);
        }
        for (int t = 0; t < tokens; t++) {
            const vec with = load(x + t * w->k + k);
            for (int r = 0; r < rows; r++) sums[r][t] = fma3(v[r], with, sums[r][t]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) out[t * w->n + n + r] = total(sums[r][t]);
}

#define PRODUCT_DENSE(KIND, ...) product_dense(__VA_ARGS__)
static void block_dense(const weight *w, const cut *c, ptrdiff_t n, int rows, int tokens, const void *x, float *out) {
    SIZES(PRODUCT_DENSE, 32)
}

typedef void block(const weight *, const cut *, ptrdiff_t, int, int, const void *, float *);

/* m tokens of x, each `token` bytes long, times all rows */
static void all_blocks(block *run, const weight *w, const cut *c, const void *x, ptrdiff_t token, ptrdiff_t m,
                       float *out) {
    /* a strip of rows stays in the cache while all tokens pass */
    const ptrdiff_t strip = 16, strips = (w->n + strip - 1) / strip;
#pragma omp parallel for schedule(static) if (m * w->n * w->k > 1 << 20)
    for (ptrdiff_t s = 0; s < strips; s++) {
        const ptrdiff_t stop = (s + 1) * strip < w->n ? (s + 1) * strip : w->n;
        ptrdiff_t step;
        for (ptrdiff_t t = 0; t < m; t += step) {
            step = m - t >= 4 ? 4 : m - t >= 2 ? 2 : 1;
            /* as many sums as fit the registers */
            const ptrdiff_t most = step == 4 ? 2 : 4;
            ptrdiff_t rows;
            for (ptrdiff_t row = s * strip; row < stop; row += rows) {
                rows = stop - row >= most ? most : 1;
                run(w, c, row, (int)rows, (int)step, (const char *)x + t * token, out + t * w->n);
            }
        }
    }
}

/* x -> out fp32 [M][N]; with bf16, x is bf16 and the weight has 4 bits and no zero points */
void brise_matmul(const void *x, const uint8_t *codes, const float *scale, const float *zero, const float *values,
                  float *out, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, ptrdiff_t groups, int bits, int bf16) {
    const weight w = {codes, scale, zero, values, n, k, groups};
    const cut c = cut_of(&w, bits);
    block *run = bits == 8 ? (zero ? block_8_1 : block_8_0) : bits == 4 ? (zero ? block_4_1 : block_4_0)
                                                             : (zero ? block_2_1 : block_2_0);
    const ptrdiff_t token = c.chunks * c.chunk * (bits == 8 ? 1 : 8 / bits) * (bf16 ? 2 : 4);
    all_blocks(bf16 ? block_bf16 : run, &w, &c, x, token, m, out);
}

/* x fp32 [M][K] times a dense fp32 weight [N][K] -> out fp32 [M][N]; K of whole vectors */
void brise_dense(const float *x, const float *dense, float *out, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k) {
    const weight w = {(const uint8_t *)dense, 0, 0, 0, n, k, 1};
    all_blocks(block_dense, &w, 0, x, k * 4, m, out);
}

/* sum = x + branch (x where there is none), out = sum / sqrt(mean(sum^2) + eps) * scale; [rows][width], whole vectors */
void brise_rms_norm(const float *x, const float *branch, const float *scale, float *sum, float *out, ptrdiff_t rows,
                    ptrdiff_t width, double eps) {
    for (ptrdiff_t r = 0; r < rows; r++) {
        vec squares = all(0);
        for (ptrdiff_t k = 0; k < width; k += LANES) {
            const ptrdiff_t at = r * width + k;
            const vec v = branch ? add(load(x + at), load(branch + at)) : load(x + at);
            store(sum + at, v);
            squares = fma3(v, v, squares);
        }
        const vec inverse = all(1.0f / sqrtf((float)(total(squares) / width + eps)));
        for (ptrdiff_t k = 0; k < width; k += LANES)
            store(out + r * width + k, mul(mul(load(sum + r * width + k), inverse), load(scale + k)));
    }
}

/* the weights of LANES bytes, of the low or the high half of each */
INLINE vec decode(int bits, int has_zero, table16 values, ivec codes, int half, vec scale, vec zero) {
    vec v = bits == 8 ? number(codes) : look(values, half ? shift(codes, 4) : codes);
    return mul(has_zero ? sub(v, zero) : v, scale);
}

INLINE void put(int kind, void *out, ptrdiff_t at, vec v) {
    if (kind == FP32) store((float *)out + at, v);
    else if (kind == BF16) store_bf16((uint16_t *)out + at, v);
    else store_fp16((uint16_t *)out + at, v);
}

INLINE void decode_row(int bits, int has_zero, int kind, const weight *w, ptrdiff_t n, void *out) {
    const ptrdiff_t width = w->k * bits / 8, part = width / w->groups;
    const table16 values = table(w->values);
    for (ptrdiff_t g = 0; g < w->groups; g++) {
        const vec scale = all(w->scale[n * w->groups + g]);
        const vec zero = all(has_zero ? w->zero[n * w->groups + g] : 0);
        for (ptrdiff_t b = g * part; b < (g + 1) * part; b += LANES) {
            const uint8_t *p = w->codes + n * width + b;
            const ivec codes = bits == 8 && !has_zero ? signed_bytes(p, LANES) : bytes(p);
            const ptrdiff_t at = n * w->k + b * 8 / bits;
            vec even = decode(bits, has_zero, values, codes, 0, scale, zero);
            if (bits == 8) {
                put(kind, out, at, even);
                continue;
            }
            vec first, second;
            mix(even, decode(bits, has_zero, values, codes, 1, scale, zero), &first, &second);
            put(kind, out, at, first);
            put(kind, out, at + LANES, second);
        }
    }
}

#define DECODE(BITS, ZERO) \
    switch (kind) { \
    case FP32: decode_row(BITS, ZERO, FP32, &w, row, out); break; \
    case BF16: decode_row(BITS, ZERO, BF16, &w, row, out); break; \
    default: decode_row(BITS, ZERO, FP16, &w, row, out); \
    }

/* 4 or 8 bits -> out [N][K]: fp32, or each rounded once, to nearest even, to bf16 or fp16 */
void brise_decode(const uint8_t *codes, const float *scale, const float *zero, const float *values, void *out,
                  ptrdiff_t n, ptrdiff_t k, ptrdiff_t groups, int bits, int kind) {
    const weight w = {codes, scale, zero, values, n, k, groups};
#pragma omp parallel for schedule(static) if (n * k > 1 << 20)
    for (ptrdiff_t row = 0; row < n; row++) {
        if (bits == 8 && zero) { DECODE(8, 1) }
        else if (bits == 8) { DECODE(8, 0) }
        else if (zero) { DECODE(4, 1) }
        else { DECODE(4, 0) }
    }
}
