/* Products with integer weights of 2, 4 and 8 bits by tile registers (AMX): one instruction multiplies 16 rows of 64
   codes with 16 columns and adds up in 32 bits. Included by native.c.

   A column is a digit of x. What a token multiplies of a group, or of 64 bytes of a row where that is less, is written as
   whole numbers q of up to 31 bits in units of a power of 2, and these as four signed bytes, q = d0 + 2^8 d1 + 2^16 d2 +
   2^24 d3. Every sum of a chunk, at most 2 * 64 * 255 * 128, is exact, and so is its fp32; then scales come in, and each
   digit's sums are added up in fp32 on their own. x is rounded by 2^-30 of the largest, or 2^-26.

   Bytes of one code are multiplied where they lie. So are those of two, low + 16 high: with x of the low ones, and then
   their high halves, 16 high, with a sixteenth of x of the high ones less what the first product had there; only the halves
   have to be made. Those of four are taken apart.

   A chunk is 64 bytes of a row. Columns are the lanes of a register: [tokens of a pass][groups of a chunk][4 digits]; of
   other groups the digits are zeros. Few lanes are kept dense, so that a register has several rows of the result.

   Like the other products it adds up the same numbers in the same order whatever stands beside a row. */

/* how a row is cut for m tokens */
typedef struct {
    ptrdiff_t chunks, group;          /* of a row; and of a group, where it is whole chunks */
    int parts, phases, tokens, lanes; /* groups of a chunk; codes of a byte; tokens of a pass; and their lanes */
} tiling;

static tiling tiling_of(const weight *w, ptrdiff_t m) {
    const ptrdiff_t row = w->k * w->bits / 8, group = row / w->groups;
    tiling t = {(row + 63) / 64, 1, 1, 8 / (int)w->bits, 1, 4};
    if (w->groups == 1) t.group = t.chunks; /* it may end within a chunk */
    else if (group >= 64) t.group = group / 64;
    else t.parts = (int)(64 / group);
    while (t.tokens < m && t.tokens < 4 / t.parts) t.tokens *= 2;
    t.lanes = 4 * t.parts * t.tokens;
    return t;
}

/* x of a pass and chunk: units of the lanes, what their digits add up to (times the middle code, without zero points),
   and a tile for each phase, 16 rows of `lanes` words */
static ptrdiff_t record_of(const tiling *t) { return 128 + t->phases * 64 * t->lanes; }
static ptrdiff_t passes_of(const tiling *t, ptrdiff_t m) { return (m + t->tokens - 1) / t->tokens; }

#if defined(__AMX_INT8__) && defined(__linux__)

#include <sys/syscall.h>
#include <unistd.h>

/* passes at a time: tile registers for their results */
enum { PASSES = 4, TILE = 1024, AHEAD = 1 << 16 };

/* the system gives a process these registers if it asks; 18 is their number, 0x1023 the request */
static int tiles_allowed(void) {
    static int known; /* 0: not asked yet; whoever asks at the same time gets the same answer */
    if (!known) known = syscall(SYS_arch_prctl, 0x1023, 18) ? -1 : 1;
    return known > 0;
}

static int in_tiles(const weight *w) {
    const ptrdiff_t row = w->k * w->bits / 8, group = row / w->groups;
    if (!w->integers || (w->bits != 2 && w->bits != 4 && w->bits != 8)) return 0;
    return (w->groups == 1 || group % 64 == 0 || group == 16 || group == 32) && tiles_allowed();
}

static ptrdiff_t tiles_size(const weight *w, ptrdiff_t m) {
    const tiling t = tiling_of(w, m);
    return passes_of(&t, m) * t.chunks * record_of(&t);
}

/* a lane's four digits of 4 channels each, of 4 rows of a tile -> into `to`, whose rows are `stride` bytes long */
INLINE void put_rows(char *to, ptrdiff_t stride, ivec rows) {
    _mm_storeu_si128((__m128i *)to, _mm512_castsi512_si128(rows));
    _mm_storeu_si128((__m128i *)(to + stride), _mm512_extracti32x4_epi32(rows, 1));
    _mm_storeu_si128((__m128i *)(to + 2 * stride), _mm512_extracti32x4_epi32(rows, 2));
    _mm_storeu_si128((__m128i *)(to + 3 * stride), _mm512_extracti32x4_epi32(rows, 3));
}

/* one part of a chunk of one token: its numbers into lanes `lane` .. of the record */
INLINE void order_part(const weight *w, const tiling *t, const float *numbers, int part, int lane, char *record) {
    const int phases = t->phases, each = 4 / t->parts; /* blocks of 4 rows */
    const ptrdiff_t stride = 4 * t->lanes;
    const ivec steps = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                          _mm512_set1_epi32(phases));
    const ivec turned = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400); /* digit by digit */
    const ivec half = _mm512_set1_epi32(0x808080);
    numbers += part * each * 16 * phases;
    ivec magnitude = _mm512_setzero_si512(), sum = magnitude;
    for (int i = 0; i < each * phases; i++)
        magnitude = _mm512_max_epu32(magnitude, _mm512_and_si512(_mm512_castps_si512(load(numbers + i * LANES)),
                                                                 _mm512_set1_epi32(0x7fffffff)));
    const uint32_t largest = _mm512_reduce_max_epu32(magnitude);
    /* the unit is 2^-29 times the power of 2 below the largest, so that the top digit has room; and it is no denormal */
    const uint32_t power = largest >> 23 < 30 ? 30 : largest >> 23;
    const vec unit = _mm512_castsi512_ps(_mm512_set1_epi32((int)((power - 29) << 23)));
    const vec units = _mm512_castsi512_ps(_mm512_set1_epi32((int)((283 - power) << 23)));
    char *tiles = record + 128 + part * each * 4 * stride;
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
            /* times what a code of 1 in every place gives: bytes of 17, and high halves of 16 */
            sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(phases != 2 ? 1 : i ? 16 : 17), rows);
            for (int p = 0; p < t->parts; p++)
                put_rows(tiles + i * 16 * stride + b * 4 * stride + (lane + 4 * p) * 4, stride,
                         p == part ? rows : _mm512_setzero_si512());
        }
    }
    const __m256i two = _mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
    const __m128 middle = _mm_set1_ps(w->zero ? 1.0f : (float)(1 << (w->bits - 1)));
    const __m128 weights = _mm_setr_ps(1, 256, 65536, 16777216);
    const __m128 of_digits = largest < 0x7f800000 ? _mm_mul_ps(_mm512_castps512_ps128(unit), weights)
                                                  : _mm_set1_ps(NAN); /* of what is not finite all is nan */
    for (int at = lane + 4 * part; at < LANES; at += t->lanes) {
        _mm_storeu_ps((float *)record + at, of_digits);
        _mm_storeu_ps((float *)record + LANES + at, _mm_mul_ps(_mm_cvtepi32_ps(four), middle));
    }
}

static void order_token_tiles(int kind, const weight *w, const void *x, ptrdiff_t m, ptrdiff_t token, char *own) {
    const tiling t = tiling_of(w, m);
    const ptrdiff_t record = record_of(&t), width = 64 * t.phases;
    const int first = 4 * t.parts * (int)(token % t.tokens);
    own += token / t.tokens * t.chunks * record;
    for (ptrdiff_t at = 0; at < w->k; at += width, own += record) {
        float numbers[4 * 64];
        const ptrdiff_t left = w->k - at < width ? w->k - at : width;
        for (ptrdiff_t i = left; i < width; i++) numbers[i] = 0;
        if (kind == FP32) memcpy(numbers, (const float *)x + token * w->k + at, left * 4);
        else halves_to_floats(kind, (const uint16_t *)x + token * w->k + at, numbers, left);
        for (int part = 0; part < t.parts; part++) order_part(w, &t, numbers, part, first, own);
        if (token < m - 1) continue;
        /* lanes of no token */
        for (int lane = first + 4 * t.parts; lane < t.lanes; lane += 4) {
            for (int row = 0; row < 16 * t.phases; row++)
                _mm_storeu_si128((__m128i *)(own + 128 + (row * t.lanes + lane) * 4), _mm_setzero_si128());
            _mm_storeu_ps((float *)own + lane, _mm_setzero_ps());
            _mm_storeu_ps((float *)own + LANES + lane, _mm_setzero_ps());
        }
    }
}

/* tiles 0 to 3 take results, 4 and 5 codes, 6 and 7 digits */
static void configure(int lanes) {
    struct {
        uint8_t palette, start, none[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } __attribute__((aligned(64))) c = {1, 0, {0}, {0}, {0}};
    for (int i = 0; i < 8; i++) c.rows[i] = 16, c.bytes[i] = (uint16_t)(i == 4 || i == 5 ? 64 : 4 * lanes);
    _tile_loadconfig(&c);
}

/* a chunk of `rows` rows, of each the bytes that are there -> tiles of its phases; the first of one or two phases, which
   can be read where it lies, only where `copies` */
INLINE void unpack(int phases, int copies, const uint8_t *p, ptrdiff_t row, int rows, __mmask64 there, uint8_t *tiles) {
    for (int r = 0; r < rows; r++, p += row, tiles += 64) {
        if (phases == 1 && !copies) continue;
        const ivec codes = there == ~(__mmask64)0 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(there, p);
        if (phases <= 2 && copies) _mm512_store_si512(tiles, codes);
        if (phases == 2) _mm512_store_si512(tiles + TILE, _mm512_and_si512(codes, _mm512_set1_epi8((char)0xf0)));
        for (int i = 0; i < 4 && phases == 4; i++)
            _mm512_store_si512(tiles + i * TILE, _mm512_and_si512(_mm512_srli_epi16(codes, 2 * i), _mm512_set1_epi8(3)));
    }
}

/* the codes' tiles, the first where it lies, times the digits' of each pass -> sums [passes][16 rows][lanes] */
INLINE void multiply_tiles(int phases, int passes, const uint8_t *first, ptrdiff_t row, const uint8_t *tiles, const char *x, ptrdiff_t pass, int lanes,
                           int32_t *sums) {
    const ptrdiff_t stride = 4 * lanes;
    x += 128;
    _tile_zero(0);
    if (passes > 1) _tile_zero(1);
    if (passes > 2) _tile_zero(2);
    if (passes > 3) _tile_zero(3);
#define PHASE(CODES, I) \
    _tile_loadd(CODES, I ? tiles + (I) * TILE : first, I ? 64 : row); \
    _tile_loadd(6, x + (I) * 16 * stride, stride); \
    _tile_dpbusd(0, CODES, 6); \
    if (passes > 1) { _tile_loadd(7, x + pass + (I) * 16 * stride, stride); _tile_dpbusd(1, CODES, 7); } \
    if (passes > 2) { _tile_loadd(6, x + 2 * pass + (I) * 16 * stride, stride); _tile_dpbusd(2, CODES, 6); } \
    if (passes > 3) { _tile_loadd(7, x + 3 * pass + (I) * 16 * stride, stride); _tile_dpbusd(3, CODES, 7); }
    PHASE(4, 0)
    if (phases > 1) { PHASE(5, 1) }
    if (phases > 2) { PHASE(4, 2) PHASE(5, 3) }
#undef PHASE
    _tile_stored(0, sums, stride);
    if (passes > 1) _tile_stored(1, sums + 16 * lanes, stride);
    if (passes > 2) _tile_stored(2, sums + 32 * lanes, stride);
    if (passes > 3) _tile_stored(3, sums + 48 * lanes, stride);
}

/* parameters [rows][G] of a strip -> [G / parts][16 rows][parts], zeros where there are none */
static void by_chunk(const tiling *t, ptrdiff_t groups, ptrdiff_t rows, const float *from, float *to) {
    if (rows == 16 && t->parts == 1) {
        const ivec at = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                           _mm512_set1_epi32((int)groups));
        for (ptrdiff_t g = 0; g < groups; g++) store(to + 16 * g, _mm512_i32gather_ps(at, from + g, 4));
        return;
    }
    for (ptrdiff_t g = 0; g < groups; g += t->parts)
        for (ptrdiff_t r = 0; r < 16; r++)
            for (ptrdiff_t p = 0; p < t->parts; p++) *to++ = r < rows && g + p < groups ? from[r * groups + g + p] : 0;
}

/* exact sums of a chunk times its scales and units, into the sums of the row; `index`: the parameter of a lane, `next`:
   of the next register's */
INLINE void add_up(int lanes, int passes, const int32_t *exact, const char *x, ptrdiff_t pass, const float *scale,
                   const float *zero, ivec index, ptrdiff_t next, float *sums) {
    for (int p = 0; p < passes; p++, x += pass) {
        const vec unit = load((const float *)x), digits = load((const float *)x + LANES);
        for (int i = 0; i < lanes; i++, exact += LANES, sums += LANES) {
            vec v = number(whole(exact));
            v = zero ? _mm512_fnmadd_ps(_mm512_permutexvar_ps(index, load(zero + i * next)), digits, v) : sub(v, digits);
            store(sums, fma3(mul(v, _mm512_permutexvar_ps(index, load(scale + i * next))), unit, load(sums)));
        }
    }
}

/* up to 16 rows from n on times passes of x -> sums [passes][16][lanes]. What a chunk takes of one another waits a round:
   its codes are unpacked, then multiplied, then added up. */
INLINE void strip_of_tiles(int phases, int lanes, const weight *w, const tiling *t, const char *x, int passes, ptrdiff_t n, int rows,
                           const float *scale, const float *zero, float *sums) {
    uint8_t tiles[2][4 * TILE] __attribute__((aligned(64)));
    int32_t exact[2][PASSES * 16 * LANES] __attribute__((aligned(64)));
    const ptrdiff_t row = w->k * w->bits / 8, record = record_of(t), pass = t->chunks * record;
    const uint8_t *codes = (const uint8_t *)w->codes + n * row;
    if (rows < 16) memset(tiles, 0, sizeof tiles);
    memset(sums, 0, passes * 16 * lanes * sizeof *sums);
    int32_t which[LANES];
    for (int i = 0; i < LANES; i++) which[i] = i / lanes * t->parts + i % lanes / 4 % t->parts;
    const ivec index = whole(which);
    const ptrdiff_t next = 16 / lanes * t->parts;
    ptrdiff_t within = 0;
    /* chunks whose codes can be read where they lie */
    const ptrdiff_t where_they_lie = phases <= 2 && rows == 16 ? row / 64 : 0;
    for (ptrdiff_t c = 0; c < t->chunks + 2; c++) {
        if (c > 0 && c <= t->chunks) {
            const int lies = c - 1 < where_they_lie;
            uint8_t *made = tiles[(c - 1) & 1];
            multiply_tiles(phases, passes, lies ? codes + (c - 1) * 64 : made, lies ? row : 64, made, x + (c - 1) * record,
                           pass, lanes, exact[(c - 1) & 1]);
        }
        if (c < t->chunks) {
            for (int line = 0; line < 16; line++) __builtin_prefetch(codes + AHEAD + (c * 16 + line) * 64, 0, 2);
            const ptrdiff_t left = row - c * 64;
            const __mmask64 there = left < 64 ? ((__mmask64)1 << left) - 1 : ~(__mmask64)0;
            if (c < where_they_lie) unpack(phases, 0, codes + c * 64, row, 16, ~(__mmask64)0, tiles[c & 1]);
            else unpack(phases, 1, codes + c * 64, row, rows, there, tiles[c & 1]);
        }
        if (c > 1) {
            add_up(lanes, passes, exact[c & 1], x + (c - 2) * record, pass, scale, zero, index, next, sums);
            if (++within == t->group) within = 0, scale += 16 * t->parts, zero += zero ? 16 * t->parts : 0;
        }
    }
}

/* rows n .. n+rows of a strip times m tokens of x, as the other products' blocks are */
static void rows_of_tiles(const strip *s, ptrdiff_t rows, const char *x, ptrdiff_t m, float *out) {
    const weight *w = s->w;
    const tiling t = tiling_of(w, m);
    const ptrdiff_t size = (w->groups + t.parts) * 16, pass = t.chunks * record_of(&t), passes = passes_of(&t, m);
    float scale[size + LANES], zero[s->zero ? size + LANES : 1], sums[PASSES * 16 * LANES];
    by_chunk(&t, w->groups, rows, s->scale, scale);
    if (s->zero) by_chunk(&t, w->groups, rows, s->zero, zero);
    /* of the strip after the next */
    const ptrdiff_t bytes = 16 * w->groups * (w->scale_kind == FP32 ? 4 : w->scale_kind == DOUBLE ? 1 : 2);
    for (ptrdiff_t i = 0; i < bytes; i += 64)
        __builtin_prefetch((const char *)w->scale + (s->first / 16 + 2) * bytes + i, 0, 2);
    configure(t.lanes);
    for (ptrdiff_t p = 0; p < passes; p += PASSES) {
        const int some = (int)(passes - p < PASSES ? passes - p : PASSES);
#define OF_LANES(PHASES, N) \
    strip_of_tiles(PHASES, N, w, &t, x + p * pass, some, s->first, (int)rows, scale, s->zero ? zero : 0, sums)
#define STRIP_OF(PHASES) \
    do { if (t.lanes == 4) OF_LANES(PHASES, 4); else if (t.lanes == 8) OF_LANES(PHASES, 8); else OF_LANES(PHASES, 16); } while (0)
        if (w->bits == 8) STRIP_OF(1);
        else if (w->bits == 4) STRIP_OF(2);
        else STRIP_OF(4);
#undef STRIP_OF
        for (ptrdiff_t token = p * t.tokens; token < (p + some) * t.tokens && token < m; token++)
            for (ptrdiff_t r = 0; r < rows; r++) {
                const float *own = sums + ((token / t.tokens - p) * 16 + r) * t.lanes + token % t.tokens * 4 * t.parts;
                float sum = 0;
                for (int part = 0; part < t.parts; part++, own += 4) sum += (own[0] + own[1]) + (own[2] + own[3]);
                out[token * s->stride + s->first + r] = sum;
            }
    }
    _tile_release();
}

#else

static int in_tiles(const weight *w) { return (void)w, 0; }
static ptrdiff_t tiles_size(const weight *w, ptrdiff_t m) { return (void)w, (void)m, 0; }
static void order_token_tiles(int kind, const weight *w, const void *x, ptrdiff_t m, ptrdiff_t token, char *own) {
    (void)kind, (void)w, (void)x, (void)m, (void)token, (void)own;
}
static void rows_of_tiles(const strip *s, ptrdiff_t rows, const char *x, ptrdiff_t m, float *out) {
    (void)s, (void)rows, (void)x, (void)m, (void)out;
}

#endif
