/* Products with quantized and dense weights, a block of rows and tokens at a time. Included by native.c.

   Whatever M is and however the rows are shared out, each product adds up the same numbers in the same order: a row
   of the result depends on no other row of x, in any bit. */

/* tokens at a time of a dense weight: more registers, more tokens */
enum { MOST = LANES == 16 ? 8 : 4 };

/* the codes of LANES lanes, of which `left` bytes are there */
INLINE void read_codes(int bits, const uint8_t *p, int left, ivec codes[3]) {
    if (bits == 3) three_words(p, left / 12, codes);
    else if (bits == 8) codes[0] = signed_bytes(p, left);
    else codes[0] = words(p, first_lanes(left / 4));
}

/* code i of each lane in its lowest bits; what is above them is of other codes */
INLINE ivec code(int bits, const ivec codes[3], int i) {
    const int word = bits * i / 32, bit = bits * i % 32;
    const ivec low = bit ? shift(codes[word], bit) : codes[word];
    return bit + bits > 32 ? either(low, shift_left(codes[word + 1], 32 - bit)) : low;
}

/* rows n .. n+rows of the weight with tokens of x -> out[token][n] */
INLINE void product(int bits, int has_zero, int rows, int tokens, const strip *s, ptrdiff_t n, const float *x,
                    float *out) {
    const int a_lane = (int)codes_a_lane(bits), bytes = (int)bytes_a_lane(bits) * LANES;
    const cut *c = s->c;
    const uint8_t *own = (const uint8_t *)s->w->codes + n * c->row;
    const table16 values = table(s->w->values);
    vec sums[4][4];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) sums[r][t] = all(0);
    const ptrdiff_t row = c->row, groups = s->w->groups, chunks = c->chunks;
    const float *scales = s->scale + (n - s->first) * groups, *zeros = s->zero + (n - s->first) * groups;
    place at = {0, 0};
    for (ptrdiff_t chunk = 0; chunk < chunks; chunk++, go_on(&at, c)) {
        const lanes held = groups_there(s, &at);
        const ptrdiff_t first = chunk * bytes;
        const int left = (int)(row - first < bytes ? row - first : bytes);
        ivec codes[4][3];
        vec parts[4][4], zero[4];
        for (int r = 0; r < rows; r++) {
            const uint8_t *p = own + r * row + first;
            /* the next rows; past the last it asks for nothing */
            for (int line = 0; line < bytes; line += 64) __builtin_prefetch(p + rows * row + line);
            read_codes(bits, p, left, codes[r]);
            if (has_zero) zero[r] = of_lanes(zeros + r * groups + at.group, c, held);
            if (has_zero && bits == 8) zero[r] = sub(zero[r], all(128));
            for (int t = 0; t < tokens; t++) parts[r][t] = all(0);
        }
#pragma GCC unroll 32
        for (int i = 0; i < a_lane; i++) {
            vec v[4];
            for (int r = 0; r < rows; r++) {
                v[r] = bits == 8 ? number(codes[r][0]) : look(values, code(bits, codes[r], i));
                if (has_zero) v[r] = sub(v[r], zero[r]);
            }
            for (int t = 0; t < tokens; t++) {
                const vec with = load(x + ((t * chunks + chunk) * a_lane + i) * LANES);
                for (int r = 0; r < rows; r++) parts[r][t] = fma3(v[r], with, parts[r][t]);
            }
        }
        for (int r = 0; r < rows; r++) {
            const vec scale = of_lanes(scales + r * groups + at.group, c, held);
            for (int t = 0; t < tokens; t++) sums[r][t] = fma3(parts[r][t], scale, sums[r][t]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) out[t * s->stride + n + r] = total(sums[r][t]);
}

#ifdef __AVX512BF16__

/* As product, for 4 bits without zero points and x in bf16, [M][chunks][4][32]: the values are rounded to bf16, and
   two products at a time are added up in fp32. */
INLINE void product_bf16(int rows, int tokens, const strip *s, ptrdiff_t n, const uint16_t *x, float *out) {
    const cut *c = s->c;
    const uint8_t *own = (const uint8_t *)s->w->codes + n * c->row;
    uint16_t twice[32];
    for (int i = 0; i < 2; i++) store_bf16(twice + 16 * i, load(s->w->values));
    const ivec values = _mm512_loadu_si512(twice);
    vec sums[4][4];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) sums[r][t] = all(0);
    const ptrdiff_t row = c->row, groups = s->w->groups, chunks = c->chunks;
    const float *scales = s->scale + (n - s->first) * groups;
    place at = {0, 0};
    for (ptrdiff_t chunk = 0; chunk < chunks; chunk++, go_on(&at, c)) {
        const lanes held = groups_there(s, &at);
        const lanes there = first_lanes((int)(row - chunk * 4 * LANES) / 4);
        ivec codes[4];
        vec parts[4][4];
        for (int r = 0; r < rows; r++) {
            const uint8_t *p = own + r * row + chunk * 4 * LANES;
            __builtin_prefetch(p + rows * row);
            codes[r] = words(p, there);
            for (int t = 0; t < tokens; t++) parts[r][t] = all(0);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __m512bh v[4];
            for (int r = 0; r < rows; r++)
                v[r] = (__m512bh)_mm512_permutexvar_epi16(i ? _mm512_srli_epi16(codes[r], 4 * i) : codes[r], values);
            for (int t = 0; t < tokens; t++) {
                const __m512bh with = (__m512bh)_mm512_loadu_si512(x + ((t * chunks + chunk) * 4 + i) * 32);
                for (int r = 0; r < rows; r++) parts[r][t] = _mm512_dpbf16_ps(parts[r][t], v[r], with);
            }
        }
        for (int r = 0; r < rows; r++) {
            const vec scale = of_lanes(scales + r * groups + at.group, c, held);
            for (int t = 0; t < tokens; t++) sums[r][t] = fma3(parts[r][t], scale, sums[r][t]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) out[t * s->stride + n + r] = total(sums[r][t]);
}

#else

INLINE void product_bf16(int rows, int tokens, const strip *s, ptrdiff_t n, const uint16_t *x, float *out) {
    (void)rows, (void)tokens, (void)s, (void)n, (void)x, (void)out;
}

#endif

#define KINDS(WITH) WITH(2, 0) WITH(2, 1) WITH(3, 0) WITH(3, 1) WITH(4, 0) WITH(4, 1) WITH(8, 0) WITH(8, 1)
#define BLOCK(BITS, ZERO) \
    static void block_##BITS##_##ZERO(const strip *s, ptrdiff_t n, int rows, int tokens, const void *x, float *out) { \
        SIZES(product, BITS, ZERO) \
    }
#define SIZES(PRODUCT, ...) \
    if (rows == 2) PRODUCT(__VA_ARGS__, 2, 4, s, n, x, out); \
    else if (rows == 4 && tokens == 2) PRODUCT(__VA_ARGS__, 4, 2, s, n, x, out); \
    else if (rows == 4) PRODUCT(__VA_ARGS__, 4, 1, s, n, x, out); \
    else if (tokens == 4) PRODUCT(__VA_ARGS__, 1, 4, s, n, x, out); \
    else if (tokens == 2) PRODUCT(__VA_ARGS__, 1, 2, s, n, x, out); \
    else PRODUCT(__VA_ARGS__, 1, 1, s, n, x, out);

KINDS(BLOCK)

/* of one kind only, but a macro wants something before the sizes */
#define PRODUCT_BF16(KIND, ...) product_bf16(__VA_ARGS__)
static void block_bf16(const strip *s, ptrdiff_t n, int rows, int tokens, const void *x, float *out) {
    SIZES(PRODUCT_BF16, 4)
}

/* As product, for a dense weight fp32 [N][K] that lies where codes do, and x as it comes. */
INLINE void product_dense(int rows, int tokens, const strip *s, ptrdiff_t n, const float *x, float *out) {
    const ptrdiff_t width = s->w->k;
    const float *dense = (const float *)s->w->codes + n * width;
    vec sums[4][MOST];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) sums[r][t] = all(0);
    for (ptrdiff_t k = 0; k < width; k += LANES) {
        vec v[4];
        for (int r = 0; r < rows; r++) {
            v[r] = load(dense + r * width + k);
            __builtin_prefetch(dense + (rows + r) * width + k);
        }
        for (int t = 0; t < tokens; t++) {
            const vec with = load(x + t * width + k);
            for (int r = 0; r < rows; r++) sums[r][t] = fma3(v[r], with, sums[r][t]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) out[t * s->stride + n + r] = total(sums[r][t]);
}

#define PRODUCT_DENSE(KIND, ...) product_dense(__VA_ARGS__)
static void block_dense(const strip *s, ptrdiff_t n, int rows, int tokens, const void *x, float *out) {
    if (tokens == MOST && rows == 2) product_dense(2, MOST, s, n, x, out);
    else if (tokens == MOST) product_dense(1, MOST, s, n, x, out);
    else SIZES(PRODUCT_DENSE, 32)
}
