/* The compiled part of the CPU's products and of its decode step, for brise/kernels/native.py, which compiles this
   file: what Python calls. */

#include "native_vectors.h"
#include "native_products.h"
#include "native_step.h"

int brise_lanes(void) { return LANES; }

#ifdef __AVX512BF16__
int brise_has_bf16(void) { return 1; }
#else
int brise_has_bf16(void) { return 0; }
#endif

/* x -> out fp32 [M][N]; with bf16, x is bf16 and the weight has 4 bits and no zero points */
void brise_matmul(const void *x, const uint8_t *codes, const float *scale, const float *zero, const float *values,
                  float *out, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, ptrdiff_t groups, int bits, int bf16) {
    const weight w = {codes, scale, zero, values, n, k, groups, n};
    const cut c = cut_of(&w, bits);
    const ptrdiff_t token = c.chunks * c.chunk * (bits == 8 ? 1 : 8 / bits) * (bf16 ? 2 : 4);
    all_blocks(bf16 ? block_bf16 : block_for(bits, zero != 0), &w, &c, x, token, m, out);
}

/* x fp32 [M][K] times a dense fp32 weight [N][K] -> out fp32 [M][N]; K of whole vectors */
void brise_dense(const float *x, const float *dense, float *out, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k) {
    const weight w = {(const uint8_t *)dense, 0, 0, 0, n, k, 1, n};
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
    const weight w = {codes, scale, zero, values, n, k, groups, n};
#pragma omp parallel for schedule(static) if (n * k > 1 << 20)
    for (ptrdiff_t row = 0; row < n; row++) {
        if (bits == 8 && zero) { DECODE(8, 1) }
        else if (bits == 8) { DECODE(8, 0) }
        else if (zero) { DECODE(4, 1) }
        else { DECODE(4, 0) }
    }
}
