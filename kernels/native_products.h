/* Products with quantized and dense weights, a block of rows and tokens at a time. Included by native.c.

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

enum { FP32 = 0, BF16 = 1, FP16 = 2 };
/* tokens at a time of a dense weight: more registers, more tokens */
enum { MOST = LANES == 16 ? 8 : 4 };

/* out has `stride` numbers a token, of which n are this weight's */
typedef struct {
    const uint8_t *codes;
    const float *scale, *zero, *values;
    ptrdiff_t n, k, groups, stride;
} weight;

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

/* rows n .. n+rows of the weight with tokens of x -> out[token][n] */
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
        for (int t = 0; t < tokens; t++) out[t * w->stride + n + r] = total(sums[r][t]);
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
        for (int t = 0; t < tokens; t++) out[t * w->stride + n + r] = total(sums[r][t]);
}

#else

INLINE void product_bf16(int rows, int tokens, const weight *w, const cut *c, ptrdiff_t n, const uint16_t *x,
                         float *out) {
    (void)rows, (void)tokens, (void)w, (void)c, (void)n, (void)x, (void)out;
}

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
    vec sums[4][MOST];
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
        for (int t = 0; t < tokens; t++) out[t * w->stride + n + r] = total(sums[r][t]);
}

#define PRODUCT_DENSE(KIND, ...) product_dense(__VA_ARGS__)
static void block_dense(const weight *w, const cut *c, ptrdiff_t n, int rows, int tokens, const void *x, float *out) {
    if (tokens == MOST && rows == 2) product_dense(2, MOST, w, c, n, x, out);
    else if (tokens == MOST) product_dense(1, MOST, w, c, n, x, out);
    else SIZES(PRODUCT_DENSE, 32)
}

typedef void block(const weight *, const cut *, ptrdiff_t, int, int, const void *, float *);

static block *block_for(int bits, int has_zero) {
    if (bits == 8) return has_zero ? block_8_1 : block_8_0;
    if (bits == 4) return has_zero ? block_4_1 : block_4_0;
    return has_zero ? block_2_1 : block_2_0;
}

/* m tokens of x, each `token` bytes long, times rows begin .. end of the weight */
static void rows_of(block *run, const weight *w, const cut *c, const void *x, ptrdiff_t token, ptrdiff_t m, float *out,
                    ptrdiff_t begin, ptrdiff_t end) {
    ptrdiff_t step;
    for (ptrdiff_t t = 0; t < m; t += step) {
        /* as many sums as fit the registers; codes need them for two kinds */
        step = run == block_dense && m - t >= MOST ? MOST : m - t >= 4 ? 4 : m - t >= 2 ? 2 : 1;
        const ptrdiff_t most = step < 4 ? 4 : 2;
        ptrdiff_t rows;
        for (ptrdiff_t row = begin; row < end; row += rows) {
            rows = end - row >= most ? most : 1;
            run(w, c, row, (int)rows, (int)step, (const char *)x + t * token, out + t * w->stride);
        }
    }
}

/* rows that stay in the cache while all tokens pass */
enum { STRIP = 16 };

static void all_blocks(block *run, const weight *w, const cut *c, const void *x, ptrdiff_t token, ptrdiff_t m,
                       float *out) {
    const ptrdiff_t strips = (w->n + STRIP - 1) / STRIP;
#pragma omp parallel for schedule(static) if (m * w->n * w->k > 1 << 18)
    for (ptrdiff_t s = 0; s < strips; s++) {
        const ptrdiff_t stop = (s + 1) * STRIP < w->n ? (s + 1) * STRIP : w->n;
        rows_of(run, w, c, x, token, m, out, s * STRIP, stop);
    }
}
