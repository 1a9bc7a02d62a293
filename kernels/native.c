/* Products with quantized weights on a CPU, for brise/kernels/native.py, which compiles this file.

   A weight of N rows: packed codes of 2, 4 or 8 bits, K of them a row, the first of a byte in its lowest bits; an
   fp32 scale, and where there are any an fp32 zero point, for each of G groups of a row.
       w[n][k] = (value(code) - zero[n][g]) * scale[n][g]
   With up to 4 bits value is a table of 16, which fits one AVX-512 register, so that looking up 16 codes is one
   instruction; 8-bit codes are their own values. Codes are taken from their bytes by phase (all first codes of 16
   bytes, then all second ones), so x comes in the order [M][phases][K / phases].

   Whatever M is and however the rows are shared out, each product adds up the same numbers in the same order: a row
   of the result depends on no other row of x, in any bit. */

#include <immintrin.h>
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
enum { MOST_ROWS = 2, MOST_TOKENS = 4 };
enum { FP32 = 0, BF16 = 1, FP16 = 2 };

typedef struct {
    const uint8_t *codes;
    const float *scale, *zero, *values;
    ptrdiff_t n, k, groups;
} weight;

int brise_lanes(void) { return LANES; }

/* the weights of LANES bytes in one phase */
INLINE vec decode(int bits, int has_zero, table16 values, ivec codes, int phase, vec scale, vec zero) {
    vec v = bits == 8 ? number(codes) : look(values, phase ? shift(codes, bits * phase) : codes);
    return mul(has_zero ? sub(v, zero) : v, scale);
}

INLINE float total(vec v) {
    float lanes[LANES], sum = 0;
    store(lanes, v);
    for (int i = 0; i < LANES; i++) sum += lanes[i];
    return sum;
}

/* rows n .. n+rows of the weight with tokens of x -> out[token][n], N numbers a token */
INLINE void product(int bits, int has_zero, int rows, int tokens, const weight *w, ptrdiff_t n, const float *x,
                    float *out) {
    const int phases = 8 / bits;
    const ptrdiff_t width = w->k / phases, part = width / w->groups;
    const table16 values = table(w->values);
    vec sums[MOST_ROWS][MOST_TOKENS][2];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) sums[r][t][0] = sums[r][t][1] = all(0);
    for (ptrdiff_t g = 0; g < w->groups; g++) {
        vec scale[MOST_ROWS], zero[MOST_ROWS];
        for (int r = 0; r < rows; r++) {
            scale[r] = all(w->scale[(n + r) * w->groups + g]);
            zero[r] = all(has_zero ? w->zero[(n + r) * w->groups + g] : 0);
        }
        for (ptrdiff_t b = g * part; b < (g + 1) * part; b += LANES) {
            ivec codes[MOST_ROWS];
            for (int r = 0; r < rows; r++) codes[r] = bytes(w->codes + (n + r) * width + b);
            for (int p = 0; p < phases; p++) {
                vec v[MOST_ROWS];
                for (int r = 0; r < rows; r++) v[r] = decode(bits, has_zero, values, codes[r], p, scale[r], zero[r]);
                for (int t = 0; t < tokens; t++) {
                    vec at = load(x + (t * phases + p) * width + b);
                    for (int r = 0; r < rows; r++) sums[r][t][p & 1] = fma3(v[r], at, sums[r][t][p & 1]);
                }
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) out[t * w->n + n + r] = total(add(sums[r][t][0], sums[r][t][1]));
}

#define TOKENS(BITS, ZERO, ROWS) \
    switch (tokens) { \
    case 1: product(BITS, ZERO, ROWS, 1, w, n, x, out); break; \
    case 2: product(BITS, ZERO, ROWS, 2, w, n, x, out); break; \
    case 3: product(BITS, ZERO, ROWS, 3, w, n, x, out); break; \
    default: product(BITS, ZERO, ROWS, 4, w, n, x, out); \
    }

#define PRODUCTS(NAME, BITS, ZERO) \
    static void NAME(const weight *w, ptrdiff_t n, int rows, int tokens, const float *x, float *out) { \
        if (rows == 2) { TOKENS(BITS, ZERO, 2) } else { TOKENS(BITS, ZERO, 1) } \
    }

PRODUCTS(product_2, 2, 0)
PRODUCTS(product_2_zero, 2, 1)
PRODUCTS(product_4, 4, 0)
PRODUCTS(product_4_zero, 4, 1)
PRODUCTS(product_8_zero, 8, 1)

/* x fp32 [M][phases][K / phases] -> out fp32 [M][N]; 8 bits need zero points */
void brise_matmul(const float *x, const uint8_t *codes, const float *scale, const float *zero, const float *values,
                  float *out, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, ptrdiff_t groups, int bits) {
    const weight w = {codes, scale, zero, values, n, k, groups};
    void (*run)(const weight *, ptrdiff_t, int, int, const float *, float *);
    if (bits == 8) run = product_8_zero;
    else if (bits == 4) run = zero ? product_4_zero : product_4;
    else run = zero ? product_2_zero : product_2;
    /* a strip of rows stays in the cache while all tokens pass */
    const ptrdiff_t strip = 16, strips = (n + strip - 1) / strip;
#pragma omp parallel for schedule(static) if (m * n * k > 65536)
    for (ptrdiff_t s = 0; s < strips; s++) {
        const ptrdiff_t stop = (s + 1) * strip < n ? (s + 1) * strip : n;
        for (ptrdiff_t t = 0; t < m; t += MOST_TOKENS) {
            const int tokens = m - t < MOST_TOKENS ? (int)(m - t) : MOST_TOKENS;
            for (ptrdiff_t row = s * strip; row < stop; row += MOST_ROWS)
                run(&w, row, stop - row < MOST_ROWS ? 1 : 2, tokens, x + t * k, out + t * n);
        }
    }
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
            const ivec codes = bytes(w->codes + n * width + b);
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
#pragma omp parallel for schedule(static) if (n * k > 65536)
    for (ptrdiff_t row = 0; row < n; row++) {
        if (bits == 8) { DECODE(8, 1) }
        else if (zero) { DECODE(4, 1) }
        else { DECODE(4, 0) }
    }
}
