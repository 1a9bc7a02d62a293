/* Which product a weight has, and its rows a strip at a time. Included by native.c. */

static block *block_for(const weight *w) {
    if (w->bits == 32) return block_dense;
    if (in_integers(w)) return block_integers(w);
    if (w->bits == 8) return w->zero ? block_8_1 : block_8_0;
    if (w->bits == 4) return w->zero ? block_4_1 : block_4_0;
    if (w->bits == 3) return w->zero ? block_3_1 : block_3_0;
    return w->zero ? block_2_1 : block_2_0;
}

/* m tokens of x, each `token` bytes long, times rows begin .. end of the weight, at most STRIP */
static void rows_of(block *run, const weight *w, const cut *c, const void *x, ptrdiff_t token, ptrdiff_t m, float *out,
                    ptrdiff_t stride, ptrdiff_t begin, ptrdiff_t end) {
    const int coded = run != block_dense;
    float scale[coded && w->scale_kind != FP32 ? STRIP * w->groups : 1], zero[coded && w->zero ? STRIP * w->groups : 1];
    strip s = {w, c, 0, 0, begin, stride};
    if (coded) s.scale = scales_of(w, begin, end - begin, scale), s.zero = zeros_of(w, begin, end - begin, zero);
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

static void all_blocks(block *run, const weight *w, const void *x, ptrdiff_t token, ptrdiff_t m, float *out) {
    const cut c = cut_of(w);
    const ptrdiff_t strips = (w->n + STRIP - 1) / STRIP;
#pragma omp parallel for schedule(static) if (m * w->n * w->k > 1 << 18)
    for (ptrdiff_t s = 0; s < strips; s++) {
        const ptrdiff_t stop = (s + 1) * STRIP < w->n ? (s + 1) * STRIP : w->n;
        rows_of(run, w, &c, x, token, m, out, w->n, s * STRIP, stop);
    }
}
