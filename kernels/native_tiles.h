/* Products by tile registers (AMX): one instruction multiplies 16 rows of 64 bytes with up to 16 columns. Included by
   native.c; how x is written for it is in native_tile_x.h.

   A chunk is 64 bytes of a row as it is stored. Columns are the lanes of a register, [tokens of a pass][groups of a chunk]
   [digits]; of other groups there are zeros. Few lanes are kept dense, so that a register has several rows of the result.

   Integers of 2, 4 and 8 bits are multiplied as bytes, exactly, with bytes that are the digits of x. Of the other formats of
   4 bits the values are looked up, in bf16, and multiplied with x in bf16.

   Like the other products it adds up the same numbers in the same order whatever stands beside a row. */

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__)

/* passes at a time, a register each for their results; and the bytes of a register */
enum { PASSES = 4, TILE = 1024 };

/* gcc's intrinsics do not tell it what they read: all that was written at p and elsewhere is to be in memory by then */
#define WRITTEN(P) __asm__ volatile("" : : "r"(P) : "memory")

/* tiles 0 to 3 take results, 4 and 5 codes, 6 and 7 digits */
static void configure(int lanes) {
    struct {
        uint8_t palette, start, none[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } __attribute__((aligned(64))) c = {1, 0, {0}, {0}, {0}};
    for (int i = 0; i < 8; i++) c.rows[i] = 16, c.bytes[i] = (uint16_t)(i == 4 || i == 5 ? 64 : 4 * lanes);
    WRITTEN(&c);
    _tile_loadconfig(&c);
}

/* what a product is, as the compiler sees it: of integers, of 8, 4 or 2 bits, or of values that are looked up */
enum { BYTES = 1, HALVES = 2, QUARTERS = 4, VALUES = 0 };

/* a chunk of `rows` rows, of each the bytes that are there -> tiles of its phases; the first of bytes and halves, which
   can be read where it lies, only where `copies` */
INLINE void unpack(int form, int copies, const uint8_t *p, ptrdiff_t row, int rows, __mmask64 there, ivec values,
                   uint8_t *tiles) {
    for (int r = 0; r < rows; r++, p += row, tiles += 64) {
        __builtin_prefetch(p + 16 * row, 0, 2); /* the next strip */
        if (form == BYTES && !copies) continue;
        const ivec codes = there == ~(__mmask64)0 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(there, p);
        if ((form == BYTES || form == HALVES) && copies) _mm512_store_si512(tiles, codes);
        if (form == HALVES) _mm512_store_si512(tiles + TILE, _mm512_and_si512(codes, _mm512_set1_epi8((char)0xf0)));
        for (int i = 0; i < 4 && form == QUARTERS; i++)
            _mm512_store_si512(tiles + i * TILE, _mm512_and_si512(_mm512_srli_epi16(codes, 2 * i), _mm512_set1_epi8(3)));
        for (int i = 0; i < 4 && form == VALUES; i++) /* the lowest bits choose */
            _mm512_store_si512(tiles + i * TILE, _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * i), values));
    }
}

/* the codes' tiles, the first where it lies, times the x of each pass; at the end of a run -> sums [passes][16 rows][lanes]
 */
INLINE void multiply_tiles(int form, int passes, int begins, int ends, const uint8_t *first, ptrdiff_t row,
                           const uint8_t *tiles, const char *x, ptrdiff_t pass, int lanes, void *sums) {
    const ptrdiff_t stride = 4 * lanes, next = 16 * stride;
    if (form != VALUES) x += UNITS;
    WRITTEN(tiles);
    if (begins) {
        _tile_zero(0);
        if (passes > 1) _tile_zero(1);
        if (passes > 2) _tile_zero(2);
        if (passes > 3) _tile_zero(3);
    }
#define WITH(SUM, CODES, X, PASS, I) \
    do { \
        _tile_loadd(X, x + (PASS) * pass + (I) * next, stride); \
        if (form == VALUES) _tile_dpbf16ps(SUM, CODES, X); \
        else _tile_dpbusd(SUM, CODES, X); \
    } while (0)
#define PHASE(CODES, I) \
    do { \
        if (I) _tile_loadd(CODES, tiles + (I) * TILE, 64); \
        else _tile_loadd(CODES, first, row); \
        WITH(0, CODES, 6, 0, I); \
        if (passes > 1) WITH(1, CODES, 7, 1, I); \
        if (passes > 2) WITH(2, CODES, 6, 2, I); \
        if (passes > 3) WITH(3, CODES, 7, 3, I); \
    } while (0)
    PHASE(4, 0);
    if (form != BYTES) PHASE(5, 1);
    if (form == QUARTERS || form == VALUES) {
        PHASE(4, 2);
        PHASE(5, 3);
    }
#undef PHASE
#undef WITH
    if (!ends) return;
    _tile_stored(0, sums, stride);
    if (passes > 1) _tile_stored(1, (char *)sums + next, stride);
    if (passes > 2) _tile_stored(2, (char *)sums + 2 * next, stride);
    if (passes > 3) _tile_stored(3, (char *)sums + 3 * next, stride);
}

/* parameters [rows][G] of a strip -> [G / parts][16 rows][parts], zeros where there are none */
static void by_chunk(int parts, ptrdiff_t groups, ptrdiff_t rows, const float *from, float *to) {
    for (ptrdiff_t g = 0; g < groups; g += parts, to += 16 * parts) {
        if (rows < 16 || g + parts > groups)
            for (ptrdiff_t i = 0; i < 16 * parts; i++)
                to[i] = i / parts < rows && g + i % parts < groups ? from[i / parts * groups + g + i % parts] : 0;
        else if (parts == 4)
            for (int r = 0; r < 16; r++) _mm_storeu_ps(to + 4 * r, _mm_loadu_ps(from + r * groups + g));
        else if (parts == 2)
            for (int r = 0; r < 16; r++) memcpy(to + 2 * r, from + r * groups + g, 8);
        else if ((g | 3) >= groups)
            for (int r = 0; r < 16; r++) to[r] = from[r * groups + g];
        else if (g % 4 == 0) /* four at a time, of four rows */
            for (int r = 0; r < 16; r += 4) {
                const float *p = from + r * groups + g;
                __m128 a = _mm_loadu_ps(p), b = _mm_loadu_ps(p + groups), c = _mm_loadu_ps(p + 2 * groups);
                __m128 d = _mm_loadu_ps(p + 3 * groups);
                _MM_TRANSPOSE4_PS(a, b, c, d);
                _mm_storeu_ps(to + r, a), _mm_storeu_ps(to + 16 + r, b);
                _mm_storeu_ps(to + 32 + r, c), _mm_storeu_ps(to + 48 + r, d);
            }
    }
}

/* sums of a run times its scales, and of integers the units, into the sums of the row; `index`: the parameter of a lane,
   `next`: of the next register's */
INLINE void add_up(int form, int lanes, int passes, const void *found, const char *x, ptrdiff_t pass, const float *scale,
                   const float *zero, ivec index, ptrdiff_t next, float *sums) {
    for (int p = 0; p < passes; p++, x += pass) {
        vec unit = all(1);
        ivec of_codes = _mm512_setzero_si512();
        if (form != VALUES) unit = load((const float *)x), of_codes = whole((const int32_t *)x + LANES);
        for (int i = 0; i < lanes; i++, found = (const float *)found + LANES, sums += LANES) {
            const vec by = _mm512_permutexvar_ps(index, load(scale + i * next));
            if (form == VALUES) {
                store(sums, fma3(load(found), by, load(sums)));
                continue;
            }
            vec v = number(zero ? whole(found) : _mm512_sub_epi32(whole(found), of_codes));
            if (zero)
                v = _mm512_fnmadd_ps(_mm512_permutexvar_ps(index, load(zero + i * next)), _mm512_castsi512_ps(of_codes), v);
            store(sums, fma3(mul(v, by), unit, load(sums)));
        }
    }
}

/* up to 16 rows from n on times passes of x -> sums [passes][16][lanes]. What a chunk takes of one another waits a round:
   its codes are unpacked, then multiplied, then added up. */
INLINE void strip_of_tiles(int form, int lanes, const weight *w, const tiling *t, const char *x, int passes, ptrdiff_t n,
                           int rows, const float *scale, const float *zero, float *sums) {
    /* what is read and what is written at a time does not lie whole pages apart, which the processor takes for the same */
    uint8_t tiles[2][5 * TILE + 512] __attribute__((aligned(64)));
    float found[2][PASSES * 16 * LANES + 512] __attribute__((aligned(64))); /* of integers, int32 */
    const ptrdiff_t row = w->k * w->bits / 8;
    const uint8_t *codes = (const uint8_t *)w->codes + n * row;
    if (rows < 16) memset(tiles, 0, sizeof tiles);
    memset(sums, 0, passes * 16 * lanes * sizeof *sums);
    int32_t which[LANES];
    for (int i = 0; i < LANES; i++) which[i] = i / lanes * t->parts + i % lanes / t->digits % t->parts;
    const ivec index = whole(which);
    uint16_t twice[32];
    for (int i = 0; i < 2; i++) store_bf16(twice + 16 * i, load(w->values));
    const ivec values = _mm512_loadu_si512(twice);
    ptrdiff_t within = 0, run = 0, group = 0; /* chunks of the run that is multiplied, and of that and the group added up */
    /* chunks whose codes can be read where they lie */
    const ptrdiff_t whole_chunks = rows == 16 ? row / 64 : 0;
    for (ptrdiff_t c = 0; c < t->chunks + 2; c++) {
        if (c > 0 && c <= t->chunks) {
            const int lies = c - 1 < whole_chunks && (form == BYTES || form == HALVES);
            uint8_t *made = tiles[(c - 1) & 1];
            const int begins = run == 0, ends = ++run == t->run;
            if (ends) run = 0;
            multiply_tiles(form, passes, begins, ends, lies ? codes + (c - 1) * 64 : made, lies ? row : 64, made,
                           x + (c - 1) * t->record, t->pass, lanes, found[(c - 1) & 1]);
        }
        if (c < t->chunks) {
            const ptrdiff_t left = row - c * 64;
            const __mmask64 there = left < 64 ? ((__mmask64)1 << left) - 1 : ~(__mmask64)0;
            if (c < whole_chunks) unpack(form, 0, codes + c * 64, row, 16, ~(__mmask64)0, values, tiles[c & 1]);
            else unpack(form, 1, codes + c * 64, row, rows, there, values, tiles[c & 1]);
        }
        if (c > 1 && ++within == t->run) {
            add_up(form, lanes, passes, found[c & 1], x + (c - 2) * t->record, t->pass, scale, zero, index,
                   16 / lanes * t->parts, sums);
            group += within, within = 0;
            if (group == t->group) group = 0, scale += 16 * t->parts, zero += zero ? 16 * t->parts : 0;
        }
    }
}

/* with fewer lanes than a register has there is one pass */
#define OF_LANES(FORM) \
    do { \
        if (t->lanes == 4) strip_of_tiles(FORM, 4, w, t, x, 1, n, rows, scale, zero, sums); \
        else if (t->lanes == 8) strip_of_tiles(FORM, 8, w, t, x, 1, n, rows, scale, zero, sums); \
        else strip_of_tiles(FORM, 16, w, t, x, passes, n, rows, scale, zero, sums); \
    } while (0)
static void any_strip(const weight *w, const tiling *t, const char *x, int passes, ptrdiff_t n, int rows,
                      const float *scale, const float *zero, float *sums) {
    if (!w->integers) OF_LANES(VALUES);
    else if (w->bits == 8) OF_LANES(BYTES);
    else if (w->bits == 4) OF_LANES(HALVES);
    else OF_LANES(QUARTERS);
}
#undef OF_LANES

/* rows n .. n+rows of a strip times m tokens of x, as the other products' blocks are */
static void rows_of_tiles(const strip *s, ptrdiff_t rows, const char *x, ptrdiff_t m, float *out) {
    const weight *w = s->w;
    const tiling t = tiling_of(w, m);
    const ptrdiff_t size = (w->groups + t.parts) * 16 + LANES, passes = passes_of(&t, m);
    float scale[size], zero[s->zero ? size : 1], sums[PASSES * 16 * LANES];
    by_chunk(t.parts, w->groups, rows, s->scale, scale);
    if (s->zero) by_chunk(t.parts, w->groups, rows, s->zero, zero);
    /* of the strip after the next */
    const ptrdiff_t bytes = 16 * w->groups * (w->scale_kind == FP32 ? 4 : w->scale_kind == DOUBLE ? 1 : 2);
    for (ptrdiff_t i = 0; i < bytes; i += 64)
        __builtin_prefetch((const char *)w->scale + (s->first / 16 + 2) * bytes + i, 0, 2);
    configure(t.lanes);
    for (ptrdiff_t p = 0; p < passes; p += PASSES) {
        const int some = (int)(passes - p < PASSES ? passes - p : PASSES);
        any_strip(w, &t, x + p * t.pass, some, s->first, (int)rows, scale, s->zero ? zero : 0, sums);
        for (ptrdiff_t token = p * t.tokens; token < (p + some) * t.tokens && token < m; token++)
            for (ptrdiff_t r = 0; r < rows; r++) {
                const float *own = sums + ((token / t.tokens - p) * 16 + r) * t.lanes;
                own += token % t.tokens * t.parts * t.digits;
                float sum = 0;
                for (int part = 0; part < t.parts; part++, own += t.digits)
                    sum += t.digits == 1 ? own[0] : (own[0] + own[1]) + (own[2] + own[3]);
                out[token * s->stride + s->first + r] = sum;
            }
    }
    _tile_release();
}

#else

static void rows_of_tiles(const strip *s, ptrdiff_t rows, const char *x, ptrdiff_t m, float *out) {
    (void)s, (void)rows, (void)x, (void)m, (void)out;
}

#endif
