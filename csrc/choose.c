/* Filters and draws. top_k, top_p and min_p each keep a number of the first tokens in falling order, so one
 * `struct cut` gives the candidates, and each filter only raises it. The last pass weighs the tokens above the cut
 * and draws one. Nothing is sorted but a bounded number of candidates. */

#include <float.h>

#include "sampler.h"

/* ---- filters ------------------------------------------------------------------------------------------ */

/* See sampler.h for the result.
 *
 * The k-th greatest of the block maxima, `low`, is no greater than the k-th greatest logit, since k different
 * blocks hold a logit that is at least `low`; so only logits >= low matter. Those > low lie in at most k - 1
 * blocks, so there are at most 64 (k - 1) of them; of those equal to `low` only the first k can enter. For k <= 63
 * that is at most 4095: it never fails. If the logits are in random order it gathers about k + k^2 / n_blocks.
 * O(n_blocks + k log n_blocks) to find `low`, one read of each block whose maximum reaches it, O(k log n) to pop. */
int32_t gather_best(toai_sampler *s, struct view view, int32_t k, int32_t *n)
{
    float patched[BLOCK], low = -FLT_MAX;
    uint64_t *scratch = s->scratch;
    if (k < s->n_blocks) {
        for (int32_t b = 0; b < s->n_blocks; b++)
            scratch[b] = rank(s->block_max[b], b);
        make_heap(scratch, s->n_blocks);
        for (int32_t i = 0; i < k - 1; i++)
            pop(scratch, s->n_blocks - i);
        low = cut_of(scratch[0]).x;
        low = low < -FLT_MAX ? -FLT_MAX : low;
    }
    int32_t count = 0, n_ties = 0;
    for (int32_t b = 0; b < s->n_blocks; b++) {
        if (s->block_max[b] < low)
            continue;
        const float *x = read_block(s, &view, b, patched);
        for (uint64_t bits = s->simd.at_least(x, low); bits != 0; bits &= bits - 1) {
            int32_t i = __builtin_ctzll(bits);
            if (x[i] == low && ++n_ties > k)
                continue;
            if (count == s->max_scratch)
                return -1;
            scratch[count++] = rank(x[i], b * BLOCK + i);
        }
    }
    make_heap(scratch, count);
    int32_t n_best = count < k ? count : k;
    for (int32_t i = 0; i < n_best; i++)
        pop(scratch, count - i);
    *n = count;
    return n_best;
}

/* e[i] = the weight of token 64 block + i if it is within the cut, else 0; returns their sum. The weight is
 * exp((x - top) / T) if by_mass, else 1. */
static float block_weights(const toai_sampler *s, const float *x, int32_t block, struct cut cut, float top,
                           int by_mass, float *e)
{
    float low = block > cut.id / BLOCK ? above(cut.x) : cut.x;
    float sum;
    if (by_mass) {
        sum = s->simd.softmax_block(x, top, s->rate, s->rate_rest, low, e);
    } else {
        uint64_t bits = s->simd.at_least(x, low);
        for (int32_t i = 0; i < BLOCK; i++)
            e[i] = (float)(bits >> i & 1);
        sum = (float)__builtin_popcountll(bits);
    }
    if (block == cut.id / BLOCK) {
        sum = 0;
        for (int32_t i = 0; i < BLOCK; i++) {
            if (x[i] == cut.x && block * BLOCK + i > cut.id)
                e[i] = 0;
            sum += e[i];
        }
    }
    return sum;
}

/* e[i] = the weight of the token ranked[-i] for i < n <= 64, else 0. */
static void ranked_weights(const toai_sampler *s, const uint64_t *ranked, int32_t n, float top, float *e)
{
    float x[BLOCK];
    for (int32_t i = 0; i < BLOCK; i++)
        x[i] = i < n ? cut_of(ranked[-i]).x : -INFINITY;
    s->simd.softmax_block(x, top, s->rate, s->rate_rest, -FLT_MAX, e);
}

/* The logit below which no token is drawn: n_vocab such tokens weigh at most exp(-37) < 2^-53. */
static float negligible(const toai_sampler *s, float top)
{
    double x = (double)top - s->temperature * (log((double)s->n_vocab) + 37.0);
    return x < (double)-FLT_MAX ? -FLT_MAX : (float)x;
}

/* The top_p cut of n tokens that lie in falling order at last[0], last[-1], ... O(n). */
static struct cut top_p_of_sorted(const toai_sampler *s, const uint64_t *last, int32_t n, float top)
{
    float e[BLOCK];
    double total = 0, reached = 0;
    for (int32_t i = 0; i < n; i += BLOCK) {
        ranked_weights(s, last - i, n - i < BLOCK ? n - i : BLOCK, top, e);
        for (int32_t j = 0; j < BLOCK; j++)
            total += (double)e[j];
    }
    for (int32_t i = 0; i < n; i += BLOCK) {
        ranked_weights(s, last - i, n - i < BLOCK ? n - i : BLOCK, top, e);
        for (int32_t j = 0; j < BLOCK && i + j < n; j++) {
            reached += (double)e[j];
            if (reached >= s->top_p * total)
                return cut_of(last[-(i + j)]);
        }
    }
    return cut_of(last[1 - n]);
}

/* The least key from `low` up whose float lies in this bucket or a better one. 32 steps. */
static uint32_t bucket_floor(int32_t bucket, uint32_t low, float top, float per_unit)
{
    uint32_t high = key_of(top);
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (bucket_of(float_of(middle), top, per_unit) <= bucket)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* Adds up the buckets from the best until *reached plus their weight is at least `target`. Returns that bucket,
 * or the last one with any weight, and sets *reached to the weight before it. */
static int32_t find_bucket(const toai_sampler *s, double target, double *reached)
{
    int32_t last = 0;
    double before = *reached, before_last = *reached;
    for (int32_t b = 0; b < N_BUCKETS; b++) {
        double weight = s->buckets[b] + s->buckets[N_BUCKETS + b];
        if (weight <= 0)
            continue;
        last = b;
        before_last = before;
        before += weight;
        if (before >= target)
            break;
    }
    *reached = before_last;
    return last;
}

/* The highest cut within `all` that keeps at least `share` of the weight of all (by_mass: softmax weights), or at
 * least `share` tokens (else).
 *
 * Adds up the weight of each of 1024 buckets of equal width below the greatest logit (the last one reaches down
 * to the end), finds the bucket that holds the cut, and sorts that bucket's tokens. If they are more than the
 * scratch holds, splits the bucket's range of keys into up to 1024 parts and repeats: each turn makes the range of
 * 32-bit keys 1024 times narrower, so there are at most four, and a part of one key holds only equal logits, which
 * enter by id. O(n_vocab) for each turn; logits in random order need one. */
static struct cut find_cut(toai_sampler *s, struct view view, struct cut all, float top, int by_mass, double share)
{
    float patched[BLOCK], e[BLOCK];
    int32_t index[BLOCK];
    float per_unit = (float)(N_BUCKETS / ((log((double)s->n_vocab) + 16.0) * (by_mass ? s->temperature : 1.0)));
    float floor = by_mass && negligible(s, top) > all.x ? negligible(s, top) : all.x;
    double total = 0, target, reached = 0;

    memset(s->buckets, 0, 2 * N_BUCKETS * sizeof *s->buckets);
    struct view blocks = view;
    for (int32_t b = 0; b < s->n_blocks; b++) {
        if (s->block_max[b] < floor)
            continue;
        const float *x = read_block(s, &blocks, b, patched);
        total += (double)block_weights(s, x, b, all, top, by_mass, e);
        s->simd.buckets(x, top, per_unit, index);
        for (int32_t i = 0; i < BLOCK; i += 2) { /* two rows: neighbours often share a bucket */
            s->buckets[index[i]] += (double)e[i];
            s->buckets[N_BUCKETS + index[i + 1]] += (double)e[i + 1];
        }
    }
    target = by_mass ? share * total : share;
    int32_t bucket = find_bucket(s, target, &reached);
    uint32_t floor_key = key_of(floor);
    uint32_t low = bucket_floor(bucket, floor_key, top, per_unit);
    uint32_t high = bucket == 0 ? key_of(top) : bucket_floor(bucket - 1, floor_key, top, per_unit) - 1;

    for (;;) {
        int32_t count = 0, n_met = 0;
        struct cut tie = {0, -1};
        double tie_reached = reached;
        uint32_t shift = 0;
        while ((high - low) >> shift >= N_BUCKETS)
            shift++;
        memset(s->buckets, 0, 2 * N_BUCKETS * sizeof *s->buckets);
        blocks = view;
        for (int32_t b = 0; b < s->n_blocks; b++) {
            if (s->block_max[b] < float_of(low))
                continue;
            const float *x = read_block(s, &blocks, b, patched);
            uint64_t bits = s->simd.at_least(x, float_of(low)) & ~s->simd.at_least(x, float_of(high + 1));
            if (bits == 0)
                continue;
            block_weights(s, x, b, all, top, by_mass, e);
            for (; bits != 0; bits &= bits - 1) {
                int32_t i = __builtin_ctzll(bits);
                if (e[i] == 0.0f)
                    continue;
                n_met++;
                if (count < s->max_scratch)
                    s->scratch[count++] = rank(x[i], b * BLOCK + i);
                s->buckets[(high - key_of(x[i])) >> shift] += (double)e[i];
                if (low == high && (tie.id < 0 || tie_reached < target)) {
                    tie_reached += (double)e[i];
                    tie = (struct cut){x[i], b * BLOCK + i};
                }
            }
        }
        if (n_met == 0)
            return all;
        if (n_met == count) {
            make_heap(s->scratch, count);
            for (int32_t left = count; left > 0;) {
                int32_t n = left < BLOCK ? left : BLOCK;
                for (int32_t i = 0; i < n; i++)
                    pop(s->scratch, left - i);
                if (by_mass)
                    ranked_weights(s, s->scratch + left - 1, n, top, e);
                for (int32_t i = 0; i < n; i++) {
                    reached += by_mass ? (double)e[i] : 1.0;
                    if (reached >= target)
                        return cut_of(s->scratch[left - 1 - i]);
                }
                left -= n;
            }
            return cut_of(s->scratch[0]); /* rounding left the sum just below the target */
        }
        if (low == high)
            return tie;
        bucket = find_bucket(s, target, &reached);
        high -= (uint32_t)bucket << shift;
        uint32_t width = (1u << shift) - 1;
        low = high - low > width ? high - width : low;
    }
}

/* ---- drawing ------------------------------------------------------------------------------------------ */

/* splitmix64 (Steele, Lea and Flood, 2014): a counter through a bit mixer. */
static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* Draws one of the candidates by weight: one pass adds up the weights of each block that has candidates, then a
 * walk finds the block and the token in it. O(64 per block that reaches the cut + n_blocks). */
static int32_t draw(toai_sampler *s, struct view view, struct cut cut, float top)
{
    float patched[BLOCK], e[BLOCK];
    float far = negligible(s, top), floor = far > cut.x ? far : cut.x;
    double total = 0, reached = 0;
    struct view blocks = view;
    for (int32_t b = 0; b < s->n_blocks; b++) {
        s->block_mass[b] = 0;
        if (s->block_max[b] >= floor)
            s->block_mass[b] = block_weights(s, read_block(s, &blocks, b, patched), b, cut, top, 1, e);
        total += (double)s->block_mass[b];
    }
    double aim = total * ((double)(next_random(&s->random) >> 11) * 0x1p-53);
    int32_t block = -1;
    for (int32_t b = 0; b < s->n_blocks; b++) { /* ends at the last block with weight if rounding overshoots */
        if (s->block_mass[b] <= 0)
            continue;
        reached += block < 0 ? 0 : (double)s->block_mass[block];
        block = b;
        if (reached + (double)s->block_mass[b] > aim)
            break;
    }
    blocks = view;
    block_weights(s, read_block(s, &blocks, block, patched), block, cut, top, 1, e);
    int32_t chosen = -1;
    for (int32_t i = 0; i < BLOCK; i++) {
        if (e[i] <= 0)
            continue;
        chosen = block * BLOCK + i;
        reached += (double)e[i];
        if (reached > aim)
            break;
    }
    return chosen;
}

/* The lowest id among the tokens with the greatest logit. */
static int32_t first_best(const toai_sampler *s, struct view view, float top)
{
    float patched[BLOCK];
    int32_t b = 0;
    while (s->block_max[b] < top)
        b++;
    return b * BLOCK + __builtin_ctzll(s->simd.at_least(read_block(s, &view, b, patched), top));
}

int32_t choose(toai_sampler *s, struct view view, float top)
{
    struct cut cut = {-FLT_MAX, s->n_vocab - 1}; /* every finite logit */
    int32_t n = 0, n_best = -1;

    if (s->temperature == 0.0) {
        int32_t id = first_best(s, view, top);
        s->result.cut_logit = top;
        s->result.cut_id = id;
        return id;
    }
    if (s->top_k > 0 && s->top_k < s->n_vocab) {
        n_best = gather_best(s, view, s->top_k, &n);
        if (n_best > 0)
            cut = cut_of(s->scratch[n - n_best]);
        else
            cut = find_cut(s, view, cut, top, 0, s->top_k);
    }
    if (s->top_p < 1.0) {
        if (n_best > 0)
            cut = top_p_of_sorted(s, s->scratch + n - 1, n_best, top);
        else
            cut = find_cut(s, view, cut, top, 1, s->top_p);
    }
    if (s->min_p > 0.0) { /* p / max p = exp((x - top) / T) */
        double low = (double)top + s->temperature * log(s->min_p);
        if (low > (double)cut.x) {
            float least = (float)low;
            cut = (struct cut){(double)least < low ? above(least) : least, s->n_vocab - 1};
        }
    }
    s->result.cut_logit = cut.x;
    s->result.cut_id = cut.id;
    return draw(s, view, cut, top);
}
