/* A weight as it is stored, and what a product needs of it and of x. Included by native.c; laid out for Python in
   native_weights.py.

   N rows of packed codes of 2, 3, 4 or 8 bits, K of them a row, the first in the lowest bits; a scale, and where
   there are any a zero point, for each of G groups of a row.
       w[n][k] = (value(code) - zero[n][g]) * scale[n][g]
   With up to 4 bits value is a table of 16, which fits one AVX-512 register, so that looking up 16 codes is one
   instruction; 8-bit codes are their own values. A dense weight, of 32 bits, is fp32 [N][K] in place of codes.

   Scales and zero points are read as they are stored, a strip of rows at a time, so that no second copy of them is
   held or, worse, made for every product: the pages of that would cost as much as the product itself. */

enum { FP32 = 0, BF16 = 1, FP16 = 2, DOUBLE = 3 };
/* double-quantized scales that share one absmax */
enum { SCALE_BLOCK = 256 };
/* rows that stay in the cache while all tokens pass */
enum { STRIP = 16 };

typedef struct {
    const void *codes;
    const void *scale;         /* [N][G] of kind FP32, BF16 or FP16; DOUBLE: bytes, map[byte] * absmax + offset */
    const void *zero;          /* 0 for none; fp32 [N][G], or packed as codes are, whole bytes a row */
    const float *values;       /* [16] */
    const float *absmax, *map, *offset; /* of DOUBLE: [ceil(N * G / 256)], [256], [1] */
    int64_t n, k, groups, bits, scale_kind, zero_packed, integers; /* integers: a code is its own value */
} weight;

/* what a lane holds: a byte of 8 bits, a word of 2 or 4, and of 3 bits three words, which end with a code */
static ptrdiff_t bytes_a_lane(int64_t bits) { return bits == 8 ? 1 : bits == 3 ? 12 : 4; }
static ptrdiff_t codes_a_lane(int64_t bits) { return bits >= 8 ? 1 : bits == 3 ? 32 : 32 / bits; }

/* How a row is cut. Codes are read a chunk at a time, one lane's for each lane of a register; a group is a part of a
   chunk, or chunks. Bytes of a row and of a chunk, chunks; scales of a chunk, 1 or more and then that of each lane; chunks
   of a group. */
typedef struct {
    ptrdiff_t row, chunk, chunks, scales, group;
    int32_t lane[LANES];
} cut;

static cut cut_of(const weight *w) {
    cut c = {w->k * w->bits / 8, bytes_a_lane(w->bits) * LANES, 0, 1, 1, {0}};
    if (w->bits == 32) return c;
    const ptrdiff_t group = c.row / w->groups;
    c.chunks = (c.row + c.chunk - 1) / c.chunk;
    if (w->groups == 1) c.group = c.chunks; /* it may end within a chunk */
    else if (group >= c.chunk) c.group = group / c.chunk;
    else c.scales = c.chunk / group;
    for (int i = 0; i < LANES && c.scales > 1; i++) c.lane[i] = (int32_t)(i * (c.chunk / LANES) / group);
    return c;
}

/* the group that a chunk begins with, counted from chunk to chunk: a division would take as long as the chunk */
typedef struct {
    ptrdiff_t group, within;
} place;

INLINE void go_on(place *at, const cut *c) {
    if (c->scales > 1) at->group += c->scales;
    else if (++at->within == c->group) at->within = 0, at->group++;
}

INLINE vec load_kind(int kind, const void *p, ptrdiff_t at) {
    if (kind == FP32) return load((const float *)p + at);
    return kind == BF16 ? load_bf16((const uint16_t *)p + at) : load_fp16((const uint16_t *)p + at);
}

INLINE void halves_to_floats(int kind, const uint16_t *from, float *to, ptrdiff_t count) {
    ptrdiff_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load_kind(kind, from, i));
    if (i == count) return;
    uint16_t last[LANES] = {0};
    float found[LANES];
    for (ptrdiff_t j = i; j < count; j++) last[j - i] = from[j];
    store(found, load_kind(kind, last, 0));
    for (ptrdiff_t j = i; j < count; j++) to[j] = found[j - i];
}

/* the scales of rows n .. n+rows, fp32 [rows][G]: where they lie, or made in `own` */
static const float *scales_of(const weight *w, ptrdiff_t n, ptrdiff_t rows, float *own) {
    const ptrdiff_t first = n * w->groups, count = rows * w->groups;
    if (w->scale_kind == FP32) return (const float *)w->scale + first;
    if (w->scale_kind == BF16) halves_to_floats(BF16, (const uint16_t *)w->scale + first, own, count);
    else if (w->scale_kind == FP16) halves_to_floats(FP16, (const uint16_t *)w->scale + first, own, count);
    else
        for (ptrdiff_t i = 0, stop; i < count; i = stop) {
            stop = ((first + i) / SCALE_BLOCK + 1) * SCALE_BLOCK - first;
            if (stop > count) stop = count;
            const float absmax = w->absmax[(first + i) / SCALE_BLOCK], offset = *w->offset;
            for (ptrdiff_t j = i; j < stop; j++) own[j] = w->map[((const uint8_t *)w->scale)[first + j]] * absmax + offset;
        }
    return own;
}

/* and the zero points; 0 where there are none */
static const float *zeros_of(const weight *w, ptrdiff_t n, ptrdiff_t rows, float *own) {
    const ptrdiff_t row = (w->groups * w->bits + 7) / 8, pairs = w->bits == 4 ? w->groups / 2 : 0;
    if (!w->zero || !w->zero_packed) return w->zero ? (const float *)w->zero + n * w->groups : 0;
    const uint8_t *from = (const uint8_t *)w->zero + n * row;
    float *to = own;
    for (ptrdiff_t r = 0; r < rows; r++, from += row, to += w->groups) {
        /* the usual case, written so that compilers see it */
        for (ptrdiff_t i = 0; i < pairs; i++) to[2 * i] = from[i] & 15, to[2 * i + 1] = from[i] >> 4;
        for (ptrdiff_t g = 2 * pairs; g < w->groups; g++) {
            const ptrdiff_t bit = g * w->bits, next = bit % 8 + w->bits > 8 ? from[bit / 8 + 1] << 8 : 0;
            to[g] = (from[bit / 8] | next) >> bit % 8 & ((1 << w->bits) - 1);
        }
    }
    return own;
}

/* rows first .. of a weight, with their scales and zero points [rows][G], and where the results go: `stride` numbers a
   token */
typedef struct {
    const weight *w;
    const cut *c;
    const float *scale, *zero;
    ptrdiff_t first, stride;
} strip;

/* the scales, or zero points, of the lanes of a chunk whose first group's is *p and of whose groups `there` are */
INLINE vec of_lanes(const float *p, const cut *c, lanes there) {
    return c->scales == 1 ? all(*p) : spread(p, there, whole(c->lane));
}
INLINE lanes groups_there(const strip *s, const place *at) {
    const ptrdiff_t left = s->w->groups - at->group;
    return first_lanes((int)(left < s->c->scales ? left : s->c->scales));
}

/* numbers that a token of x has in the order of the product, zeros behind its end among them */
static ptrdiff_t ordered_size(const weight *w) {
    const ptrdiff_t chunk = codes_a_lane(w->bits) * LANES;
    return (w->k + chunk - 1) / chunk * chunk;
}

/* All first codes of a chunk's lanes are multiplied, then all second ones, so x [M][K] is put into the order [M][chunks]
   [codes a lane][lanes], in fp32. */
INLINE void order_kind(int kind, const weight *w, const void *x, ptrdiff_t token, float *own) {
    const ptrdiff_t a_lane = codes_a_lane(w->bits), size = ordered_size(w);
    for (ptrdiff_t at = 0; at < size; at += a_lane * LANES)
        for (ptrdiff_t i = 0; i < a_lane; i++)
            for (ptrdiff_t lane = 0; lane < LANES; lane++) {
                const ptrdiff_t k = at + lane * a_lane + i, from = token * w->k + k;
                float v = 0;
                if (k < w->k && kind == FP32) v = ((const float *)x)[from];
                if (k < w->k && kind == BF16) v = from_bf16(((const uint16_t *)x)[from]);
                if (k < w->k && kind == FP16) v = from_fp16(((const uint16_t *)x)[from]);
                own[token * size + at + i * LANES + lane] = v;
            }
}

static void order_token(int kind, const weight *w, const void *x, ptrdiff_t token, float *own) {
    if (kind == FP32) order_kind(FP32, w, x, token, own);
    else if (kind == BF16) order_kind(BF16, w, x, token, own);
    else order_kind(FP16, w, x, token, own);
}

/* the same for a product in bf16: 4 bits, and twice as many words, of 16 bits, at a time */
static void order_token_bf16(const weight *w, const uint16_t *x, ptrdiff_t token, uint16_t *own) {
    const ptrdiff_t size = ordered_size(w);
    for (ptrdiff_t at = 0; at < size; at += 8 * LANES)
        for (ptrdiff_t i = 0; i < 4; i++)
            for (ptrdiff_t word = 0; word < 2 * LANES; word++) {
                const ptrdiff_t k = at + word * 4 + i;
                own[token * size + at + i * 2 * LANES + word] = k < w->k ? x[token * w->k + k] : 0;
            }
}
