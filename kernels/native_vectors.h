/* The few vector operations that the compiled code is written in, on AVX-512 and on AVX2. Included by native.c. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stddef.h>

/* the sum of the lanes, by halves */
static inline float total8(__m256 v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}

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
typedef __mmask16 lanes;
static inline lanes first_lanes(int count) { return (__mmask16)(count < 16 ? (1u << count) - 1 : 0xffff); }
static inline ivec words(const uint8_t *p, lanes there) { return _mm512_maskz_loadu_epi32(there, p); }
static inline ivec shift_left(ivec i, int bits) { return _mm512_slli_epi32(i, bits); }
static inline ivec either(ivec a, ivec b) { return _mm512_or_si512(a, b); }
/* three words a lane, the first `count` lanes of them: w[i] has word i of each */
static inline void three_words(const uint8_t *p, int count, ivec w[3]) {
    const ivec first = _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45);
    ivec from[3];
    for (int i = 0; i < 3; i++) {
        const int left = 3 * count - 16 * i;
        from[i] = words(p + 64 * i, first_lanes(left < 0 ? 0 : left));
    }
    for (int i = 0; i < 3; i++) {
        const ivec at = _mm512_add_epi32(first, _mm512_set1_epi32(i));
        const ivec low = _mm512_permutex2var_epi32(from[0], at, from[1]);
        w[i] = _mm512_mask_permutexvar_epi32(low, _mm512_cmpgt_epi32_mask(at, _mm512_set1_epi32(31)), at, from[2]);
    }
}
static inline ivec signed_bytes(const uint8_t *p, int count) {
    const __m128i all = count >= 16 ? _mm_loadu_si128((const __m128i *)p) : _mm_maskz_loadu_epi8((1u << count) - 1, p);
    return _mm512_cvtepi8_epi32(_mm_xor_si128(all, _mm_set1_epi8(-128)));
}
static inline ivec whole(const int32_t *p) { return _mm512_loadu_si512(p); }
/* p[index of a lane]; 0 where that is not there */
static inline vec spread(const float *p, lanes there, ivec index) {
    return _mm512_permutexvar_ps(index, _mm512_maskz_loadu_ps(there, p));
}
static inline ivec rounded(vec v) {
    ivec u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
}
static inline vec load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline vec load_fp16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
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

static inline float total(vec v) {
    return total8(_mm256_add_ps(_mm512_castps512_ps256(v),
                                _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1))));
}
static inline vec least(vec a, vec b) { return _mm512_min_ps(a, b); }
static inline vec most(vec a, vec b) { return _mm512_max_ps(a, b); }
static inline vec divide(vec a, vec b) { return _mm512_div_ps(a, b); }
static inline vec nearest(vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* 2^v for whole v from -126 to 127 */
static inline vec power(vec v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(127)), 23));
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
typedef __m256i lanes;
static inline lanes first_lanes(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline ivec words(const uint8_t *p, lanes there) { return _mm256_maskload_epi32((const int *)p, there); }
static inline ivec shift_left(ivec i, int bits) { return _mm256_slli_epi32(i, bits); }
static inline ivec either(ivec a, ivec b) { return _mm256_or_si256(a, b); }
/* three words a lane, the first `count` lanes of them: w[i] has word i of each */
static inline void three_words(const uint8_t *p, int count, ivec w[3]) {
    const ivec first = _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21);
    for (int i = 0; i < 3; i++)
        w[i] = _mm256_mask_i32gather_epi32(_mm256_setzero_si256(), (const int *)p + i, first, first_lanes(count), 4);
}
static inline ivec signed_bytes(const uint8_t *p, int count) {
    uint8_t held[8] = {0};
    for (int i = 0; i < 8 && i < count; i++) held[i] = p[i];
    return _mm256_cvtepi8_epi32(_mm_xor_si128(_mm_loadl_epi64((const __m128i *)held), _mm_set1_epi8(-128)));
}
static inline ivec whole(const int32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
/* p[index of a lane]; 0 where that is not there */
static inline vec spread(const float *p, lanes there, ivec index) {
    return _mm256_permutevar8x32_ps(_mm256_maskload_ps(p, there), index);
}
static inline vec load_bf16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
static inline vec load_fp16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
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
static inline float total(vec v) { return total8(v); }
static inline vec least(vec a, vec b) { return _mm256_min_ps(a, b); }
static inline vec most(vec a, vec b) { return _mm256_max_ps(a, b); }
static inline vec divide(vec a, vec b) { return _mm256_div_ps(a, b); }
static inline vec nearest(vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/* 2^v for whole v from -126 to 127 */
static inline vec power(vec v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(127)), 23));
}

#else
#error "needs AVX2 or AVX-512"
#endif

#define INLINE static inline __attribute__((always_inline))

static inline float from_fp16(uint16_t half) { return _cvtsh_ss(half); }
static inline float from_bf16(uint16_t half) {
    const union { uint32_t bits; float number; } wide = {(uint32_t)half << 16};
    return wide.number;
}

/* e^v to an ulp or two: v = n ln 2 + r, ln 2 in two parts, and the series of e^r up to r^7, whose rest is below 2^-27 of it. nan stays nan,
   and what is out of range goes to the ends of the range. */
INLINE vec exponential(vec v) {
    v = most(all(-87.0f), least(all(88.0f), v)); /* of two operands one of which is nan both give the second */
    const vec n = nearest(mul(v, all(1.44269504f)));
    const vec r = fma3(n, all(-1.42860682e-6f), fma3(n, all(-0.693145752f), v));
    vec sum = all(1.0f / 5040);
    const float rest[7] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    for (int i = 0; i < 7; i++) sum = fma3(sum, r, all(rest[i]));
    return mul(sum, power(n));
}
