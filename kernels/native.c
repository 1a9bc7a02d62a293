/* The compiled part of the CPU's products and of its decode step, for brise/kernels/native.py, which compiles this
   file: what Python calls. */

#include <stdlib.h>
#include <string.h>

#include "native_vectors.h"
#include "native_weights.h"
#include "native_products.h"
#include "native_integers.h"
#include "native_tile_x.h"
#include "native_tiles.h"

int brise_lanes(void) { return LANES; }

#ifdef __AVX512BF16__
int brise_has_bf16(void) { return 1; }
#else
int brise_has_bf16(void) { return 0; }
#endif

#include "native_rows.h"
#include "native_step.h"

int brise_tile_parts(const weight *w, int kind) { return tile_parts(w, kind); }

INLINE void put(int kind, void *out, ptrdiff_t at, vec v) {
    if (kind == FP32) store((float *)out + at, v);
    else if (kind == BF16) store_bf16((uint16_t *)out + at, v);
    else store_fp16((uint16_t *)out + at, v);
}

/* sums fp32 [M][N] plus an fp32 bias [N] where there is one -> out [M][N] of a kind */
static void finish(const float *sums, const float *bias, void *out, ptrdiff_t m, ptrdiff_t size, int kind) {
    for (ptrdiff_t t = 0; t < m; t++)
        for (ptrdiff_t n = 0; n < size; n += LANES) {
            const ptrdiff_t at = t * size + n, left = size - n;
            if (left >= LANES) {
                const vec sum = load(sums + at);
                put(kind, out, at, bias ? add(sum, load(bias + n)) : sum);
                continue;
            }
            float last[LANES] = {0}, done[LANES];
            for (ptrdiff_t i = 0; i < left; i++) last[i] = bias ? sums[at + i] + bias[n + i] : sums[at + i];
            put(kind, done, 0, load(last));
            const ptrdiff_t each = kind == FP32 ? 4 : 2;
            memcpy((char *)out + at * each, done, left * each);
        }
}

/* x [M][K] times w, plus an fp32 bias [N] where there is one -> out [M][N], both of a kind; 1 where there is no memory for
   it. Rows `alone` do not depend on one another, in any bit. */
int brise_matmul(const weight *w, const char *x, const float *bias, char *out, ptrdiff_t m, int kind, int alone) {
    const int way = way_of(w, kind, m, alone), direct = kind == FP32 && !bias;
    const ptrdiff_t most = at_a_time(w, way, m), size = x_size(w, way, most), each = kind == FP32 ? 4 : 2;
    char *ordered_x = malloc(size + (direct ? 0 : most * w->n * 4) + 1);
    if (!ordered_x) return 1;
    for (ptrdiff_t first = 0; first < m; first += most, x += most * w->k * each, out += most * w->n * each) {
        const ptrdiff_t count = m - first < most ? m - first : most;
        float *sums = (float *)(direct ? out : ordered_x + size);
#pragma omp parallel for schedule(static) if (count * w->k > 1 << 15)
        for (ptrdiff_t t = 0; t < count; t++) order(w, way, kind, x, count, t, ordered_x);
        all_rows(w, way, ordered_x, count, sums);
        if (!direct) finish(sums, bias, out, count, w->n, kind);
    }
    free(ordered_x);
    return 0;
}

/* x fp32 [M][K] times a dense fp32 weight [N][K] -> out fp32 [M][N]; K of whole vectors */
void brise_dense(const float *x, const float *dense, float *out, ptrdiff_t m, ptrdiff_t n, ptrdiff_t k) {
    const weight w = {.codes = dense, .n = n, .k = k, .bits = 32};
    all_rows(&w, AS_IT_IS, x, m, out);
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

INLINE void decode_row(int bits, int has_zero, int kind, const strip *s, ptrdiff_t n, void *out) {
    const weight *w = s->w;
    const ptrdiff_t width = w->k * bits / 8, part = width / w->groups, parameters = (n - s->first) * w->groups;
    const table16 values = table(w->values);
    for (ptrdiff_t g = 0; g < w->groups; g++) {
        const vec scale = all(s->scale[parameters + g]);
        const vec zero = all(has_zero ? s->zero[parameters + g] : 0);
        for (ptrdiff_t b = g * part; b < (g + 1) * part; b += LANES) {
            const uint8_t *p = (const uint8_t *)w->codes + n * width + b;
            const ivec codes = bits == 8 && !has_zero ? signed_bytes(p, LANES) : bytes(p);
            const ptrdiff_t at = (n - s->first) * w->k + b * 8 / bits;
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
    case FP32: decode_row(BITS, ZERO, FP32, &s, row, to); break; \
    case BF16: decode_row(BITS, ZERO, BF16, &s, row, to); break; \
    default: decode_row(BITS, ZERO, FP16, &s, row, to); \
    }

/* rows begin .. end of 4 or 8 bits -> out [rows][K]: fp32, or each rounded once, to nearest even, to bf16 or fp16 */
void brise_decode(const weight *w, void *out, ptrdiff_t begin, ptrdiff_t end, int kind) {
    const ptrdiff_t bytes_a_row = w->k * (kind == FP32 ? 4 : 2);
#pragma omp parallel for schedule(static) if ((end - begin) * w->k > 1 << 20)
    for (ptrdiff_t row = begin; row < end; row++) {
        float scale[w->groups], zero[w->zero ? w->groups : 1];
        const strip s = {w, 0, scales_of(w, row, 1, scale), zeros_of(w, row, 1, zero), row, 0};
        void *to = (char *)out + (row - begin) * bytes_a_row;
        if (w->bits == 8 && w->zero) { DECODE(8, 1) }
        else if (w->bits == 8) { DECODE(8, 0) }
        else if (w->zero) { DECODE(4, 1) }
        else { DECODE(4, 0) }
    }
}
