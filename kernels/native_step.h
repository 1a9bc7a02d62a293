/* A decode step on a CPU: a few tokens of each of a few texts through all blocks of the model, in one call. Included by
   native.c; laid out for Python in native_step.py.

   At batch 1 a block is seven small products and some arithmetic, and between calls of one operator after the other the
   memory, which is what takes the time, stands idle. Here the threads start once, each owns rows of every weight, and
   they meet at barriers. What all of them need and is quickly made (norms, the order of x) each makes for itself.

   Everything is fp32. No sum depends on the number of threads or on other rows: a token's result is the same, in every
   bit, whatever it is computed beside. */

/* slots of the ring that are attended to at a time; their results are then put together */
enum { SEGMENT = 128 };

typedef struct {
    const float *attention_norm, *mlp_norm;
    weight q, k, v, o, gate, up, down;
    float *keys, *values; /* [texts][groups][slots][head], the position p in slot p % slots */
} blocks_of_model;

typedef struct {
    const blocks_of_model *blocks;
    int64_t threads, layers, texts, tokens, width, heads, groups, head, inner, slots, window; /* window 0: none */
    double eps, scale;
    const float *cos, *sin;      /* [texts][tokens][head] */
    const int32_t *first, *seen; /* [texts]: position of the first token, -1 to rest; positions with these tokens */
    float *x;                    /* [texts * tokens][width], in and out */
    float *qkv, *context, *gate_up, *gated, *branch, *parts, *own;
} step;

typedef struct {
    int64_t qkv, context, gate_up, gated, branch, parts, own; /* numbers that each scratch takes, all threads together */
} sizes;

static ptrdiff_t parts_of(const step *s) { return (s->slots + SEGMENT - 1) / SEGMENT; }
/* of one segment: for each query of a KV head its maximum, its sum, and the weighted values */
static ptrdiff_t queries_of(const step *s) { return s->heads / s->groups * s->tokens; }
static ptrdiff_t part_size(const step *s) { return queries_of(s) * (2 + s->head); }

/* a thread's own: x normed, x in the order of a product, a query, scores, what slots hold */
static ptrdiff_t most_ordered(const step *s) {
    const ptrdiff_t rows = s->texts * s->tokens;
    ptrdiff_t most = 0;
    for (ptrdiff_t i = 0; i < s->layers; i++) {
        const blocks_of_model *l = s->blocks + i;
        const weight *all_weights[7] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
        for (int j = 0; j < 7; j++) {
            const ptrdiff_t size = x_size(all_weights[j], way_of(all_weights[j], FP32, rows, 1), rows) / 4;
            if (size > most) most = size;
        }
    }
    return most;
}
static ptrdiff_t own_size(const step *s, ptrdiff_t ordered) {
    return s->texts * s->tokens * s->width + ordered + s->head + 2 * SEGMENT;
}

void brise_step_sizes(const step *s, sizes *z) {
    const ptrdiff_t rows = s->texts * s->tokens;
    z->qkv = rows * (s->heads + 2 * s->groups) * s->head;
    z->context = rows * s->heads * s->head;
    z->gate_up = rows * 2 * s->inner;
    z->gated = rows * s->inner;
    z->branch = rows * s->width;
    z->parts = s->texts * s->groups * parts_of(s) * part_size(s);
    z->own = s->threads * own_size(s, most_ordered(s));
}

/* share `me` of `count` things */
static ptrdiff_t share(ptrdiff_t count, ptrdiff_t me, ptrdiff_t threads) { return count * me / threads; }

/* this thread's strips of n rows */
static void own_rows(ptrdiff_t n, ptrdiff_t me, ptrdiff_t threads, ptrdiff_t *begin, ptrdiff_t *end) {
    const ptrdiff_t strips = (n + STRIP - 1) / STRIP;
    *begin = share(strips, me, threads) * STRIP;
    *end = share(strips, me + 1, threads) * STRIP;
    if (*end > n) *end = n;
    if (*begin > n) *begin = n;
}

static void norm(const float *x, const float *scale, float *out, ptrdiff_t rows, ptrdiff_t width, double eps) {
    for (ptrdiff_t r = 0; r < rows; r++, x += width, out += width) {
        vec squares = all(0);
        for (ptrdiff_t k = 0; k < width; k += LANES) squares = fma3(load(x + k), load(x + k), squares);
        const vec inverse = all(1.0f / sqrtf((float)(total(squares) / width + eps)));
        for (ptrdiff_t k = 0; k < width; k += LANES) store(out + k, mul(mul(load(x + k), inverse), load(scale + k)));
    }
}

/* dimension i turns with i + head / 2 */
static void turn(const float *x, const float *cos, const float *sin, float *out, ptrdiff_t head) {
    const ptrdiff_t half = head / 2;
    for (ptrdiff_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        out[i] = a * cos[i] - b * sin[i];
        out[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

/* the new key and value of one token and head go into the ring */
static void remember(const step *s, const blocks_of_model *l, ptrdiff_t text, ptrdiff_t token, ptrdiff_t group) {
    if (s->first[text] < 0) return;
    const ptrdiff_t row = text * s->tokens + token, slot = (s->first[text] + token) % s->slots;
    const float *k = s->qkv + (row * (s->heads + 2 * s->groups) + s->heads + group) * s->head;
    const float *v = k + s->groups * s->head;
    const ptrdiff_t at = ((text * s->groups + group) * s->slots + slot) * s->head;
    turn(k, s->cos + row * s->head, s->sin + row * s->head, l->keys + at, s->head);
    for (ptrdiff_t i = 0; i < s->head; i++) l->values[at + i] = v[i];
}

/* q . k for each of count keys, -inf where the query does not see it: a slot holds the newest position that belongs into
   it, which is held[j]; seen are the positions after `behind` and up to `position` */
static float score(const step *s, const float *q, const float *keys, const int32_t *held, ptrdiff_t count,
                   ptrdiff_t behind, ptrdiff_t position, float *scores) {
    const float scale = (float)s->scale;
    float largest = -INFINITY;
    for (ptrdiff_t j = 0; j < count; j++) {
        vec sum = all(0);
        for (ptrdiff_t i = 0; i < s->head; i += LANES) sum = fma3(load(q + i), load(keys + j * s->head + i), sum);
        const float found = total(sum) * scale;
        scores[j] = held[j] <= position && held[j] > behind ? found : -INFINITY;
        largest = scores[j] > largest ? scores[j] : largest;
    }
    return largest;
}

/* scores -> their weights e^(score - largest), and the sum of those; no weight at all, rather than the least that the
   series knows, where there is no score: what lies in a slot that is not seen may be anything */
static float weigh(float *scores, ptrdiff_t count, float largest) {
    vec sum = all(0);
    for (ptrdiff_t j = 0; j < count; j += LANES) {
        float some[LANES];
        for (ptrdiff_t i = 0; i < LANES; i++) some[i] = j + i < count ? scores[j + i] : -INFINITY;
        float weights[LANES];
        store(weights, exponential(sub(load(some), all(largest))));
        for (ptrdiff_t i = 0; i < LANES; i++) {
            weights[i] = some[i] == -INFINITY ? 0 : weights[i];
            if (j + i < count) scores[j + i] = weights[i];
        }
        sum = add(sum, load(weights));
    }
    return total(sum);
}

/* out [vectors] = the sum of weights times values */
INLINE void gather(int vectors, const float *weights, const float *values, ptrdiff_t count, ptrdiff_t head, float *out) {
    vec sums[4];
    for (int i = 0; i < vectors; i++) sums[i] = all(0);
    for (ptrdiff_t j = 0; j < count; j++) {
        if (weights[j] == 0) continue;
        for (int i = 0; i < vectors; i++)
            sums[i] = fma3(all(weights[j]), load(values + j * head + i * LANES), sums[i]);
    }
    for (int i = 0; i < vectors; i++) store(out + i * LANES, sums[i]);
}

/* the queries of one KV head over slots begin .. end; q, scores and held are scratch */
static void attend(const step *s, const blocks_of_model *l, ptrdiff_t text, ptrdiff_t group, ptrdiff_t begin,
                   ptrdiff_t end, float *q, float *scores, int32_t *held, float *part) {
    const ptrdiff_t queries = queries_of(s), each = s->heads / s->groups, head = s->head, count = end - begin;
    const ptrdiff_t at = ((text * s->groups + group) * s->slots + begin) * head;
    const ptrdiff_t newest = s->seen[text] - 1, round = newest - newest % s->slots;
    for (ptrdiff_t j = begin; j < end; j++)
        held[j - begin] = (int32_t)(round + j <= newest ? round + j : round + j - s->slots);
    for (ptrdiff_t r = 0; r < queries; r++) {
        const ptrdiff_t row = text * s->tokens + r / each, position = s->first[text] + r / each;
        turn(s->qkv + (row * (s->heads + 2 * s->groups) + group * each + r % each) * head, s->cos + row * head,
             s->sin + row * head, q, head);
        float *out = part + r * (2 + head);
        out[0] = score(s, q, l->keys + at, held, count, s->window ? position - s->window : -1, position, scores);
        /* nothing seen, no number; but a score that is none must come out as one that is none */
        ptrdiff_t some = out[0] > -INFINITY;
        for (ptrdiff_t j = 0; j < count && !some; j++) some = scores[j] != scores[j];
        out[1] = some ? weigh(scores, count, out[0]) : 0;
        if (!some) continue;
        ptrdiff_t i = 0;
        for (; i + 4 * LANES <= head; i += 4 * LANES) gather(4, scores, l->values + at + i, count, head, out + 2 + i);
        for (; i < head; i += LANES) gather(1, scores, l->values + at + i, count, head, out + 2 + i);
    }
}

static ptrdiff_t used(const step *s, ptrdiff_t text) {
    return s->first[text] < 0 ? 0 : s->seen[text] < s->slots ? s->seen[text] : s->slots;
}

/* the segments of one query put together -> its context; a text that rests gets zeros */
static void combine(const step *s, ptrdiff_t text, ptrdiff_t group, ptrdiff_t r) {
    const ptrdiff_t each = s->heads / s->groups, head = s->head, count = (used(s, text) + SEGMENT - 1) / SEGMENT;
    const float *part = s->parts + (text * s->groups + group) * parts_of(s) * part_size(s) + r * (2 + head);
    float *out = s->context + ((text * s->tokens + r / each) * s->heads + group * each + r % each) * head;
    float largest = -INFINITY, sum = 0;
    for (ptrdiff_t i = 0; i < head; i++) out[i] = 0;
    for (ptrdiff_t p = 0; p < count; p++)
        if (part[p * part_size(s)] > largest) largest = part[p * part_size(s)];
    for (ptrdiff_t p = 0; p < count; p++) {
        const float *from = part + p * part_size(s);
        if (from[1] == 0) continue;
        const vec weigh = exponential(all(from[0] - largest));
        float weighs[LANES];
        store(weighs, weigh);
        sum += from[1] * weighs[0];
        for (ptrdiff_t i = 0; i < head; i += LANES) store(out + i, fma3(weigh, load(from + 2 + i), load(out + i)));
    }
    if (count)
        for (ptrdiff_t i = 0; i < head; i++) out[i] /= sum;
}

static void attention(const step *s, const blocks_of_model *l, float *own, ptrdiff_t me, ptrdiff_t threads) {
    ptrdiff_t all_segments = 0, done = 0;
    for (ptrdiff_t b = 0; b < s->texts; b++) all_segments += (used(s, b) + SEGMENT - 1) / SEGMENT * s->groups;
    const ptrdiff_t begin = share(all_segments, me, threads), end = share(all_segments, me + 1, threads);
    for (ptrdiff_t b = 0; b < s->texts; b++) {
        const ptrdiff_t count = (used(s, b) + SEGMENT - 1) / SEGMENT;
        for (ptrdiff_t u = 0; u < count * s->groups; u++, done++) {
            if (done < begin || done >= end) continue;
            const ptrdiff_t g = u / count, first = u % count * SEGMENT, last = first + SEGMENT;
            float *part = s->parts + ((b * s->groups + g) * parts_of(s) + u % count) * part_size(s);
            attend(s, l, b, g, first, last < used(s, b) ? last : used(s, b), own, own + s->head,
                   (int32_t *)(own + s->head + SEGMENT), part);
        }
    }
}

/* this thread's rows of w times x into out, `stride` numbers a token */
static void own_product(const weight *w, const float *x, ptrdiff_t m, float *own, float *out, ptrdiff_t stride,
                        ptrdiff_t me, ptrdiff_t threads) {
    ptrdiff_t begin, end;
    own_rows(w->n, me, threads, &begin, &end);
    const cut c = cut_of(w);
    const int way = way_of(w, FP32, m, 1);
    const int needs_order = way == IN_TILES || w->bits < 8; /* widths are whole vectors, and of 8 bits lanes hold a code */
    for (ptrdiff_t t = 0; t < m && needs_order; t++) order(w, way, FP32, x, m, t, own);
    for (ptrdiff_t row = begin; row < end; row += STRIP)
        rows_of(w, way, &c, needs_order ? own : x, m, out, stride, row,
                row + STRIP < end ? row + STRIP : end);
}

/* x += w times from, each thread its columns */
static void add_product(const step *s, const weight *w, const float *from, float *own, ptrdiff_t me, ptrdiff_t threads) {
    const ptrdiff_t m = s->texts * s->tokens;
    ptrdiff_t begin, end;
    own_rows(w->n, me, threads, &begin, &end);
    own_product(w, from, m, own, s->branch, s->width, me, threads);
    for (ptrdiff_t t = 0; t < m; t++)
        for (ptrdiff_t n = begin; n < end; n++) s->x[t * s->width + n] += s->branch[t * s->width + n];
}

/* silu(gate) * up -> [m][inner]; a thread has the same rows of both, so that it need not wait for another */
static void gate(const step *s, const blocks_of_model *l, const float *x, float *own, ptrdiff_t me, ptrdiff_t threads) {
    const ptrdiff_t m = s->texts * s->tokens, inner = s->inner;
    ptrdiff_t begin, end;
    own_rows(inner, me, threads, &begin, &end);
    own_product(&l->gate, x, m, own, s->gate_up, 2 * inner, me, threads);
    own_product(&l->up, x, m, own, s->gate_up + inner, 2 * inner, me, threads);
    for (ptrdiff_t t = 0; t < m; t++)
        for (ptrdiff_t n = begin; n < end; n += LANES) {
            const float *g = s->gate_up + t * 2 * inner + n;
            const vec v = load(g), bottom = add(all(1), exponential(sub(all(0), v)));
            store(s->gated + t * inner + n, mul(divide(v, bottom), load(g + inner)));
        }
}

void brise_step(const step *s) {
    const ptrdiff_t rows = s->texts * s->tokens, cut_row = (s->heads + 2 * s->groups) * s->head;
    const ptrdiff_t ordered = most_ordered(s);
    ptrdiff_t numbers = 0;
    for (ptrdiff_t i = 0; i < s->layers; i++) numbers += (s->width + cut_row) * s->width + 3 * s->width * s->inner;
#pragma omp parallel num_threads(s->threads) if (numbers * rows > 1 << 18)
    {
        const ptrdiff_t me = omp_get_thread_num(), threads = omp_get_num_threads();
        float *normed = s->own + me * own_size(s, ordered), *own = normed + rows * s->width;
        float *small = own + ordered;
        for (ptrdiff_t i = 0; i < s->layers; i++) {
            const blocks_of_model *l = s->blocks + i;
            norm(s->x, l->attention_norm, normed, rows, s->width, s->eps);
            own_product(&l->q, normed, rows, own, s->qkv, cut_row, me, threads);
            own_product(&l->k, normed, rows, own, s->qkv + l->q.n, cut_row, me, threads);
            own_product(&l->v, normed, rows, own, s->qkv + l->q.n + l->k.n, cut_row, me, threads);
#pragma omp barrier
            for (ptrdiff_t u = share(rows * s->groups, me, threads); u < share(rows * s->groups, me + 1, threads); u++)
                remember(s, l, u / s->groups / s->tokens, u / s->groups % s->tokens, u % s->groups);
#pragma omp barrier
            attention(s, l, small, me, threads);
#pragma omp barrier
            const ptrdiff_t all_queries = s->texts * s->groups * queries_of(s);
            for (ptrdiff_t u = share(all_queries, me, threads); u < share(all_queries, me + 1, threads); u++)
                combine(s, u / queries_of(s) / s->groups, u / queries_of(s) % s->groups, u % queries_of(s));
#pragma omp barrier
            add_product(s, &l->o, s->context, own, me, threads);
#pragma omp barrier
            norm(s->x, l->mlp_norm, normed, rows, s->width, s->eps);
            gate(s, l, normed, own, me, threads);
#pragma omp barrier
            add_product(s, &l->down, s->gated, own, me, threads);
#pragma omp barrier
        }
    }
}
