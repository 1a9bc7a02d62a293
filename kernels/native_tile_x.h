/* x as tile registers multiply it (native_tiles.h): a record for each pass and chunk. Included by native.c.

   Of integers a column is a digit of x. What a token multiplies of a group is written as whole numbers q of up to 31 bits
   in units of a power of 2, and these as four signed bytes, q = d0 + 2^8 d1 + 2^16 d2 + 2^24 d3. Every sum of a run, the
   chunks of a group, is exact in 32 bits; then scales come in, and each digit's sums are added up in fp32 on their own.
   x is rounded by 2^-30 of the largest, or 2^-26. With zero points a run is a chunk, whose sums, at most 2 * 64 * 255 * 128,
   are exact in fp32 as well: what zero points take away from them is of their size.

   Bytes of one code are multiplied where they lie. So are those of two, low + 16 high: with x of the low ones, and then
   their high halves, 16 high, with a sixteenth of x of the high ones less what the first product had there; only the
   halves have to be made. Those of four are taken apart.

   Of values in bf16 a column is a token, and x is as it comes. */

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__)

#include <sys/syscall.h>
#include <unistd.h>

/* how a row is cut for m tokens */
typedef struct {
    ptrdiff_t chunks, group;          /* of a row; and of a group, where it is whole chunks */
    int parts, phases, tokens, lanes; /* groups of a chunk; tiles of one; tokens of a pass; and their lanes */
    int digits;                       /* lanes of a group */
    ptrdiff_t run, record, pass;      /* chunks whose sums are added up before scales come in; bytes of x of a chunk, a pass */
} tiling;

/* integers: of a record first, where a run ends, the units of the lanes and what their digits add up to: int32, times the
   middle code, or without one, for zero points, fp32; then a tile for each phase, 16 rows of `lanes` words. A run of LONGEST
   chunks adds up to less than 2^31. */
enum { UNITS = 128, LONGEST = 256 };

static tiling tiling_of(const weight *w, ptrdiff_t m) {
    const ptrdiff_t row = w->k * w->bits / 8, group = row / w->groups;
    tiling t = {(row + 63) / 64, 1, 1, 4, 1, 0, 1, 1, 0, 0};
    if (w->integers) t.phases = 8 / (int)w->bits, t.digits = 4;
    if (w->groups == 1) t.group = t.chunks; /* it may end within a chunk */
    else if (group >= 64) t.group = group / 64;
    else t.parts = (int)(64 / group);
    if (!w->zero && t.group <= LONGEST) t.run = t.group;
    const int one = t.digits * t.parts;
    while (one * t.tokens < LANES && (t.tokens < m || one * t.tokens < 4)) t.tokens *= 2;
    t.lanes = one * t.tokens;
    t.record = (w->integers ? UNITS : 0) + t.phases * 64 * t.lanes;
    t.pass = t.chunks * t.record;
    return t;
}

/* the system gives a process these registers if it asks; 18 is their number, 0x1023 the request */
static int tiles_allowed(void) {
    static int known; /* 0: not asked yet; whoever asks at the same time gets the same answer */
    if (!known) known = syscall(SYS_arch_prctl, 0x1023, 18) ? -1 : 1;
    return known > 0;
}

/* groups of a chunk of a weight that tile registers multiply with some number of tokens of a kind; else 0 */
static int tile_parts(const weight *w, int kind) {
    const ptrdiff_t row = w->k * w->bits / 8, group = row / w->groups;
    const int looked_up = w->bits == 4 && !w->integers && !w->zero && kind == BF16;
    const int integers = w->integers && (w->bits == 2 || w->bits == 4 || w->bits == 8);
    const int parts = w->groups == 1 || group % 64 == 0 ? 1 : group == 32 ? 2 : group == 16 ? 4 : 0;
    /* few groups a chunk, or a register has place for few tokens */
    return tiles_allowed() && ((integers && parts <= 2) || looked_up) ? parts : 0;
}

/* Whether they do, of m tokens. A chunk of one group costs no more than in vectors from two tokens on; else it takes more of
   them. So the number of tokens chooses, but not where they are to be `alone`, in no bit dependent on others. */
static int in_tiles(const weight *w, int kind, ptrdiff_t m, int alone) {
    const int parts = tile_parts(w, kind);
    if (alone || m > 3) return alone ? parts == 1 : parts > 0;
    /* of one token, scales that come in at every chunk take longer here than in vectors */
    return parts == 1 && (m > 1 || tiling_of(w, m).run > 1 || !in_integers(w));
}

static ptrdiff_t passes_of(const tiling *t, ptrdiff_t m) { return (m + t->tokens - 1) / t->tokens; }

static ptrdiff_t tiles_size(const weight *w, ptrdiff_t m) {
    const tiling t = tiling_of(w, m);
    return passes_of(&t, m) * t.pass;
}

/* a lane's four digits of 4 channels each, of 4 rows of a tile -> into `to`, whose rows are `stride` bytes long */
INLINE void put_rows(char *to, ptrdiff_t stride, ivec rows) {
    _mm_storeu_si128((__m128i *)to, _mm512_castsi512_si128(rows));
    _mm_storeu_si128((__m128i *)(to + stride), _mm512_extracti32x4_epi32(rows, 1));
    _mm_storeu_si128((__m128i *)(to + 2 * stride), _mm512_extracti32x4_epi32(rows, 2));
    _mm_storeu_si128((__m128i *)(to + 3 * stride), _mm512_extracti32x4_epi32(rows, 3));
}

/* the bits of the largest of whole vectors */
INLINE uint32_t largest_of(const float *numbers, ptrdiff_t count) {
    ivec magnitude = _mm512_setzero_si512();
    for (ptrdiff_t i = 0; i < count; i += LANES)
        magnitude = _mm512_max_epu32(magnitude, _mm512_and_si512(_mm512_castps_si512(load(numbers + i)),
                                                                 _mm512_set1_epi32(0x7fffffff)));
    return _mm512_reduce_max_epu32(magnitude);
}

/* the unit is 2^-29 times the power of 2 below the largest, so that the top digit has room; and it is no denormal */
INLINE uint32_t power_of(uint32_t largest) { return largest >> 23 < 30 ? 30 : largest >> 23; }

/* one part of a chunk of one token: its numbers into lanes `lane` .. of the record; -> the sum so far and its digits, times
   what a code of 1 in every place gives: bytes of 17, and high halves of 16 */
INLINE ivec order_part(const tiling *t, const float *numbers, uint32_t largest, int part, int lane, char *record,
                       ivec sum) {
    const int phases = t->phases, each = 4 / t->parts; /* blocks of 4 rows */
    const ptrdiff_t stride = 4 * t->lanes;
    const ivec steps = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                          _mm512_set1_epi32(phases));
    const ivec turned = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400); /* digit by digit */
    const ivec half = _mm512_set1_epi32(0x808080);
    const vec units = _mm512_castsi512_ps(_mm512_set1_epi32((int)((283 - power_of(largest)) << 23)));
    char *tiles = record + UNITS + part * each * 4 * stride;
    for (int b = 0; b < each; b++) {
        ivec low = _mm512_setzero_si512();
        for (int i = 0; i < phases; i++) {
            const vec v = _mm512_i32gather_ps(steps, numbers + b * 16 * phases + i, 4);
            const int high = phases == 2 && i == 1;
            ivec q = _mm512_cvtps_epi32(mul(high ? mul(v, all(0.0625f)) : v, units));
            if (high) q = _mm512_sub_epi32(q, low);
            low = q;
            const ivec digits = _mm512_xor_si512(_mm512_add_epi32(q, half), half);
            const ivec rows = _mm512_shuffle_epi8(digits, turned);
            sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(phases != 2 ? 1 : i ? 16 : 17), rows);
            for (int p = 0; p < t->parts; p++)
                put_rows(tiles + i * 16 * stride + b * 4 * stride + (lane + 4 * p) * 4, stride,
                         p == part ? rows : _mm512_setzero_si512());
        }
    }
    return sum;
}

/* units and sums of a part into its lanes */
static void put_units(const weight *w, const tiling *t, uint32_t largest, ivec sum, int part, int lane, char *record) {
    const __m256i two = _mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
    const __m128i of_codes = w->zero ? _mm_castps_si128(_mm_cvtepi32_ps(four)) : _mm_slli_epi32(four, (int)w->bits - 1);
    const __m128 unit = _mm_castsi128_ps(_mm_set1_epi32((int)((power_of(largest) - 29) << 23)));
    const __m128 weights = _mm_setr_ps(1, 256, 65536, 16777216);
    const __m128 of_digits = largest < 0x7f800000 ? _mm_mul_ps(unit, weights)
                                                  : _mm_set1_ps(NAN); /* of what is not finite all is nan */
    for (int at = lane + 4 * part; at < LANES; at += t->lanes) {
        _mm_storeu_ps((float *)record + at, of_digits);
        _mm_storeu_si128((__m128i *)record + (LANES + at) / 4, of_codes);
    }
}

/* a token's x in bf16, pair by pair of words of four codes: into its lanes, and zeros into those of other groups */
static void order_pairs(const weight *w, const tiling *t, const uint16_t *x, int lane, char *own) {
    const int each = 16 / t->parts;
    for (ptrdiff_t at = 0; at < w->k; at += 128, own += t->record)
        for (int i = 0; i < 4; i++)
            for (int row = 0; row < 16; row++) {
                uint32_t *to = (uint32_t *)own + (i * 16 + row) * t->lanes + lane;
                const ptrdiff_t k = at + row * 8 + i;
                const uint32_t first = k < w->k ? x[k] : 0, second = k + 4 < w->k ? x[k + 4] : 0;
                for (int p = 0; p < t->parts; p++) to[p] = p == row / each ? first | second << 16 : 0;
            }
}

/* x of a chunk in fp32, zeros behind its end */
static void read_chunk(int kind, const weight *w, const tiling *t, const void *x, ptrdiff_t chunk, float *numbers) {
    const ptrdiff_t width = 64 * t->phases, at = chunk * width, left = w->k - at < width ? w->k - at : width;
    for (ptrdiff_t i = left; i < width; i++) numbers[i] = 0;
    if (kind == FP32) memcpy(numbers, (const float *)x + at, left * 4);
    else halves_to_floats(kind, (const uint16_t *)x + at, numbers, left);
}

static void order_digits(int kind, const weight *w, const tiling *t, const void *x, int lane, char *own) {
    const ptrdiff_t part_width = 64 * t->phases / t->parts;
    for (ptrdiff_t begin = 0, end; begin < t->chunks; begin = end) { /* a row is whole runs */
        end = begin + t->run;
        float numbers[4 * 64];
        uint32_t largest[4] = {0};
        ivec sums[4];
        for (ptrdiff_t c = begin; c < end; c++) {
            read_chunk(kind, w, t, x, c, numbers);
            for (int part = 0; part < t->parts; part++) {
                const uint32_t found = largest_of(numbers + part * part_width, part_width);
                if (found > largest[part]) largest[part] = found;
                sums[part] = _mm512_setzero_si512();
            }
        }
        for (ptrdiff_t c = begin; c < end; c++) {
            if (t->run > 1) read_chunk(kind, w, t, x, c, numbers);
            for (int part = 0; part < t->parts; part++)
                sums[part] = order_part(t, numbers + part * part_width, largest[part], part, lane, own + c * t->record,
                                        sums[part]);
        }
        for (int part = 0; part < t->parts; part++)
            put_units(w, t, largest[part], sums[part], part, lane, own + (end - 1) * t->record);
    }
}

static void order_token_tiles(int kind, const weight *w, const void *x, ptrdiff_t m, ptrdiff_t token, char *own) {
    const tiling t = tiling_of(w, m);
    const ptrdiff_t header = w->integers ? UNITS : 0;
    const int one = t.digits * t.parts, lane = one * (int)(token % t.tokens);
    own += token / t.tokens * t.pass;
    x = (const char *)x + token * w->k * (kind == FP32 ? 4 : 2);
    if (w->integers) order_digits(kind, w, &t, x, lane, own);
    else order_pairs(w, &t, x, lane, own);
    if (token < m - 1) return;
    /* lanes of no token, whose results no one reads: but what lay there could be numbers that take long */
    for (ptrdiff_t c = 0; c < t.chunks; c++, own += t.record)
        for (int i = lane + one; i < t.lanes; i++) {
            for (int row = 0; row < 16 * t.phases; row++) ((uint32_t *)(own + header))[row * t.lanes + i] = 0;
            if (header) ((float *)own)[i] = ((float *)own)[LANES + i] = 0;
        }
}

#else

static int tile_parts(const weight *w, int kind) { return (void)w, (void)kind, 0; }
static int in_tiles(const weight *w, int kind, ptrdiff_t m, int alone) { return (void)w, (void)kind, (void)m, (void)alone, 0; }
static ptrdiff_t tiles_size(const weight *w, ptrdiff_t m) { return (void)w, (void)m, 0; }
static void order_token_tiles(int kind, const weight *w, const void *x, ptrdiff_t m, ptrdiff_t token, char *own) {
    (void)kind, (void)w, (void)x, (void)m, (void)token, (void)own;
}

#endif
