/* Which way a product goes, its x in order for that, and its rows a strip at a time. Included by native.c. */

#ifdef _OPENMP
int omp_get_max_threads(void);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
#else
static int omp_get_max_threads(void) { return 1; }
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

/* AS_IT_IS: of a dense weight, whose x needs no order; IN_SHORT_INTEGERS: of x in 16 bits */
enum { AS_IT_IS, IN_FP32, IN_BF16, IN_INTEGERS, IN_SHORT_INTEGERS, IN_TILES };

/* of m tokens of x of a kind; each `alone`: in no bit dependent on the others, nor on how many there are */
static int way_of(const weight *w, int kind, ptrdiff_t m, int alone) {
    if (w->bits == 32) return AS_IT_IS;
    if (in_tiles(w, kind, m, alone)) return IN_TILES;
    if (in_integers(w)) return kind == FP32 ? IN_INTEGERS : IN_SHORT_INTEGERS;
    return kind == BF16 && w->bits == 4 && !w->zero && brise_has_bf16() ? IN_BF16 : IN_FP32;
}

/* bytes that m tokens of x take in order, and one of them where each has its own */
static ptrdiff_t token_size(const weight *w, int way) {
    if (way == AS_IT_IS) return w->k * 4;
    if (way == IN_INTEGERS || way == IN_SHORT_INTEGERS) return integers_size(w, way == IN_INTEGERS ? 3 : 2);
    return ordered_size(w) * (way == IN_BF16 ? 2 : 4);
}
static ptrdiff_t x_size(const weight *w, int way, ptrdiff_t m) {
    return way == AS_IT_IS ? 0 : way == IN_TILES ? tiles_size(w, m) : m * token_size(w, way);
}

/* tokens of m whose x stays in a core's cache while all rows pass, where each costs time of its own */
static ptrdiff_t at_a_time(const weight *w, int way, ptrdiff_t m) {
    const ptrdiff_t found = way == IN_TILES ? (1 << 20) / (ordered_size(w) * 4) / 16 * 16 : m;
    return found >= m ? m : found < 16 ? 16 : found;
}

/* a token of x [m][K] of a kind -> its place among those in order */
static void order(const weight *w, int way, int kind, const void *x, ptrdiff_t m, ptrdiff_t token, void *own) {
    if (way == IN_TILES) order_token_tiles(kind, w, x, m, token, own);
    else if (way == IN_INTEGERS || way == IN_SHORT_INTEGERS) order_token_integers(kind, w, x, token, own);
    else if (way == IN_BF16) order_token_bf16(w, x, token, own);
    else if (way == IN_FP32) order_token(kind, w, x, token, own);
}

static block *block_for(const weight *w, int way) {
    if (way == AS_IT_IS) return block_dense;
    if (way == IN_BF16) return block_bf16;
    if (way == IN_INTEGERS || way == IN_SHORT_INTEGERS) return block_integers(w, way == IN_INTEGERS ? 3 : 2);
    if (w->bits == 8) return w->zero ? block_8_1 : block_8_0;
    if (w->bits == 4) return w->zero ? block_4_1 : block_4_0;
    if (w->bits == 3) return w->zero ? block_3_1 : block_3_0;
    return w->zero ? block_2_1 : block_2_0;
}

/* m tokens of x in order, times rows begin .. end of the weight, at most STRIP, into out, `stride` numbers a token */
static void rows_of(const weight *w, int way, const cut *c, const void *x, ptrdiff_t m, float *out, ptrdiff_t stride,
                    ptrdiff_t begin, ptrdiff_t end) {
    const int coded = way != AS_IT_IS;
    float scale[coded && w->scale_kind != FP32 ? STRIP * w->groups : 1], zero[coded && w->zero ? STRIP * w->groups : 1];
    strip s = {w, c, 0, 0, begin, stride};
    if (coded) s.scale = scales_of(w, begin, end - begin, scale), s.zero = zeros_of(w, begin, end - begin, zero);
    if (way == IN_TILES) {
        rows_of_tiles(&s, end - begin, x, m, out);
        return;
    }
    block *run = block_for(w, way);
    const ptrdiff_t token = token_size(w, way);
    ptrdiff_t step;
    for (ptrdiff_t t = 0; t < m; t += step) {
        /* as many sums as fit the registers; codes need them for two kinds */
        step = !coded && m - t >= MOST ? MOST : m - t >= 4 ? 4 : m - t >= 2 ? 2 : 1;
        const ptrdiff_t most = step < 4 ? 4 : 2;
        ptrdiff_t rows;
        for (ptrdiff_t row = begin; row < end; row += rows) {
            rows = end - row >= most ? most : 1;
            run(&s, row, (int)rows, (int)step, (const char *)x + t * token, out + t * stride);
        }
    }
}

static void all_rows(const weight *w, int way, const void *x, ptrdiff_t m, float *out) {
    const cut c = cut_of(w);
    const ptrdiff_t strips = (w->n + STRIP - 1) / STRIP, shares = 8 * omp_get_max_threads();
    /* cores are not equally fast, nor undisturbed: who is done first takes more */
    const ptrdiff_t share = strips > shares ? strips / shares : 1;
#pragma omp parallel for schedule(dynamic, share) if (m * w->n * w->k > 1 << 18)
    for (ptrdiff_t s = 0; s < strips; s++) {
        const ptrdiff_t stop = (s + 1) * STRIP < w->n ? (s + 1) * STRIP : w->n;
        rows_of(w, way, &c, x, m, out, w->n, s * STRIP, stop);
    }
}
