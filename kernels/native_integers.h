/* Products with integer weights of 2 and 4 bits in integers, where the processor adds up products of bytes (VNNI).
   Included by native.c.

   What a lane multiplies of a chunk of x, 8 or 16 channels, is written as whole numbers q in units of a power of 2, and
   these as signed bytes, of fp32 three, q = d0 + 256 d1 + 65536 d2: four products of a code with a byte are then one step
   of an instruction. What they add up to in a lane, at most 8 * 15 or 16 * 3 times 2^23, fits 32 bits, so every sum up to
   there is exact; only then scales come in, in fp32. x itself is rounded, by 2^-23 of the largest at most, which is less
   than what it costs to add up such products in fp32. Of bf16 and fp16 there are two bytes, and 2^-15: far less than what
   the result is rounded by.

   Like the other products it adds up the same numbers in the same order whatever stands beside a row. */

typedef void block(const strip *, ptrdiff_t, int, int, const void *, float *);

#ifdef __AVX512VNNI__

INLINE int digits_of(int kind) { return kind == FP32 ? 3 : 2; }

/* a chunk of x: what the q of each lane add up to, their unit, then a vector for each of the bytes and each code of a byte
 */
INLINE ptrdiff_t vectors_of(int bits, int digits) { return 2 + digits * (8 / bits); }
static ptrdiff_t integers_size(const weight *w, int digits) {
    return ordered_size(w) / (32 / w->bits) * 4 * vectors_of((int)w->bits, digits);
}

INLINE void integers_kind(int kind, int bits, const weight *w, const void *x, ptrdiff_t token, char *own) {
    const int a_word = 32 / bits, phases = 8 / bits, digits = digits_of(kind), top = 8 * digits - 2;
    /* the largest that the bytes hold, and what is rounded to it, as 24 bits of a number */
    const int held = ((digits == 3 ? 0x7f7f7f : 0x7f7f) << (23 - top)) + (1 << (22 - top)) - 1;
    const ivec steps = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                          _mm512_set1_epi32(a_word));
    for (ptrdiff_t at = 0; at < w->k; at += a_word * LANES, own += vectors_of(bits, digits) * 64) {
        float numbers[16 * LANES];
        const ptrdiff_t left = w->k - at < a_word * LANES ? w->k - at : a_word * LANES;
        for (ptrdiff_t i = left; i < a_word * LANES; i++) numbers[i] = 0;
        if (kind == FP32) for (ptrdiff_t i = 0; i < left; i++) numbers[i] = ((const float *)x)[token * w->k + at + i];
        else halves_to_floats(kind, (const uint16_t *)x + token * w->k + at, numbers, left);
        vec v[16];
        ivec magnitude = _mm512_setzero_si512();
        for (int i = 0; i < a_word; i++) {
            v[i] = _mm512_i32gather_ps(steps, numbers + i, 4);
            const ivec positive = _mm512_and_si512(_mm512_castps_si512(v[i]), _mm512_set1_epi32(0x7fffffff));
            magnitude = _mm512_max_epu32(magnitude, positive);
        }
        /* with the unit 2^-top times the power of 2 below the largest, or twice that where the bytes could not hold it */
        ivec power = _mm512_srli_epi32(_mm512_add_epi32(magnitude, _mm512_set1_epi32((1 << 24) - held - 1)), 23);
        power = _mm512_max_epi32(power, _mm512_set1_epi32(top + 2)); /* and all of it numbers that are no denormals */
        const vec unit = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_sub_epi32(power, _mm512_set1_epi32(top)), 23));
        const vec units = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(254 + top), power), 23));
        const __mmask16 finite = _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(0x7f800000));
        ivec words[4][3] = {{{0}}}, sum = _mm512_setzero_si512();
        for (int i = 0; i < a_word; i++) {
            ivec q = _mm512_cvtps_epi32(mul(v[i], units));
            sum = _mm512_add_epi32(sum, q);
            for (int d = 0; d < digits; d++) {
                const ivec byte = _mm512_and_si512(q, _mm512_set1_epi32(255));
                words[i % phases][d] = _mm512_or_si512(words[i % phases][d], _mm512_slli_epi32(byte, i / phases * 8));
                q = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
            }
        }
        _mm512_storeu_si512(own, sum);
        store((float *)(own + 64), _mm512_mask_blend_ps(finite, all(NAN), unit)); /* of what is not finite all is nan */
        for (int i = 0; i < phases; i++)
            for (int d = 0; d < digits; d++) _mm512_storeu_si512(own + (2 + digits * i + d) * 64, words[i][d]);
    }
}

static void order_token_integers(int kind, const weight *w, const void *x, ptrdiff_t token, char *own) {
    own += token * integers_size(w, digits_of(kind));
    if (w->bits == 2 && kind == FP32) integers_kind(FP32, 2, w, x, token, own);
    else if (w->bits == 2 && kind == BF16) integers_kind(BF16, 2, w, x, token, own);
    else if (w->bits == 2) integers_kind(FP16, 2, w, x, token, own);
    else if (kind == FP32) integers_kind(FP32, 4, w, x, token, own);
    else if (kind == BF16) integers_kind(BF16, 4, w, x, token, own);
    else integers_kind(FP16, 4, w, x, token, own);
}

/* `one`: every chunk is whole and has one scale, so no lanes are counted and no numbers sorted to them (worth it with 4 bits)
 */
INLINE void product_integers(int bits, int has_zero, int digits, int one, int rows, int tokens, const strip *s, ptrdiff_t n,
                             const char *x, float *out) {
    const int phases = 8 / bits;
    const cut *c = s->c;
    const uint8_t *own = (const uint8_t *)s->w->codes + n * c->row;
    const ptrdiff_t record = vectors_of(bits, digits) * 64, token = record * c->chunks; /* bytes */
    const ivec mask = _mm512_set1_epi8((1 << bits) - 1);
    vec sums[4][4];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) sums[r][t] = all(0);
    const ptrdiff_t row = c->row, groups = s->w->groups, chunks = c->chunks;
    const float *scales = s->scale + (n - s->first) * groups, *zeros = s->zero + (n - s->first) * groups;
    place at = {0, 0};
    for (ptrdiff_t chunk = 0; chunk < chunks; chunk++, x += record, go_on(&at, c)) {
        const lanes held = one ? 1 : groups_there(s, &at);
        const lanes there = one ? 0xffff : first_lanes((int)(row - chunk * 4 * LANES) / 4);
        ivec codes[4][4], parts[4][4];
        for (int r = 0; r < rows; r++) {
            const uint8_t *p = own + r * row + chunk * 4 * LANES;
            __builtin_prefetch(p + rows * row);
            const ivec all_codes = one ? _mm512_loadu_si512(p) : words(p, there);
            for (int i = 0; i < phases; i++)
                codes[r][i] = _mm512_and_si512(i ? _mm512_srli_epi16(all_codes, bits * i) : all_codes, mask);
        }
        for (int t = 0; t < tokens; t++) {
            const char *bytes_of_x = x + t * token + 2 * 64;
            const ivec sum = _mm512_loadu_si512(x + t * token);
            for (int r = 0; r < rows; r++) parts[r][t] = _mm512_setzero_si512();
            for (int d = digits - 1; d >= 0; d--)
                for (int r = 0; r < rows; r++) {
                    if (d < digits - 1) parts[r][t] = _mm512_slli_epi32(parts[r][t], 8);
                    for (int i = 0; i < phases; i++)
                        parts[r][t] = _mm512_dpbusd_epi32(parts[r][t], codes[r][i],
                                                          _mm512_loadu_si512(bytes_of_x + (digits * i + d) * 64));
                }
            /* without zero points all have the middle one */
            for (int r = 0; r < rows && !has_zero; r++)
                parts[r][t] = _mm512_sub_epi32(parts[r][t], _mm512_slli_epi32(sum, bits - 1));
        }
        for (int r = 0; r < rows; r++) {
            const float *of_row = scales + r * groups + at.group;
            const vec scale = one ? all(*of_row) : of_lanes(of_row, c, held);
            ivec zero = _mm512_setzero_si512();
            if (has_zero) zero = _mm512_cvtps_epi32(of_lanes(zeros + r * groups + at.group, c, held));
            for (int t = 0; t < tokens; t++) {
                ivec part = parts[r][t];
                if (has_zero)
                    part = _mm512_sub_epi32(part, _mm512_mullo_epi32(zero, _mm512_loadu_si512(x + t * token)));
                const vec unit = load((const float *)(x + t * token + 64));
                sums[r][t] = fma3(mul(number(part), scale), unit, sums[r][t]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tokens; t++) out[t * s->stride + n + r] = total(sums[r][t]);
}

#define INTEGERS(BITS, ZERO, DIGITS) \
    static void block_integers_##BITS##_##ZERO##_##DIGITS(const strip *s, ptrdiff_t n, int rows, int tokens, \
                                                          const void *x, float *out) { \
        if (BITS == 4 && s->c->scales == 1 && s->c->row % s->c->chunk == 0) { \
            SIZES(product_integers, BITS, ZERO, DIGITS, BITS == 4) \
        } \
        else { SIZES(product_integers, BITS, ZERO, DIGITS, 0) } \
    }
INTEGERS(2, 0, 2) INTEGERS(2, 0, 3) INTEGERS(2, 1, 2) INTEGERS(2, 1, 3)
INTEGERS(4, 0, 2) INTEGERS(4, 0, 3) INTEGERS(4, 1, 2) INTEGERS(4, 1, 3)

static block *block_integers(const weight *w, int digits) {
    if (digits == 2 && w->bits == 2) return w->zero ? block_integers_2_1_2 : block_integers_2_0_2;
    if (digits == 2) return w->zero ? block_integers_4_1_2 : block_integers_4_0_2;
    if (w->bits == 2) return w->zero ? block_integers_2_1_3 : block_integers_2_0_3;
    return w->zero ? block_integers_4_1_3 : block_integers_4_0_3;
}

/* whether the weight's product is the one in integers: not of short rows, which fp32 adds up with less error; and zero
   points that are stored as fp32 may be no whole numbers */
static int in_integers(const weight *w) {
    return w->integers && (w->bits == 2 || w->bits == 4) && w->k >= 1024 && (!w->zero || w->zero_packed);
}

#else

static int in_integers(const weight *w) { return (void)w, 0; }
static block *block_integers(const weight *w, int digits) { return (void)w, (void)digits, (block *)0; }
static ptrdiff_t integers_size(const weight *w, int digits) { return (void)w, (void)digits, 0; }
static void order_token_integers(int kind, const weight *w, const void *x, ptrdiff_t token, char *own) {
    (void)kind, (void)w, (void)x, (void)token, (void)own;
}

#endif
