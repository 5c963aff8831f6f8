/* Filters and draws. top_k, top_p and min_p each keep a number of the first tokens in falling order, so one
 * `struct cut` gives the candidates, and each filter only raises it. The last pass weighs the tokens above the cut
 * and draws one. Nothing is sorted but a bounded number of candidates. */

#include <float.h>

#include "sampler.h"

enum {
    MAX_TURNS = 40, /* see cut_ranks(); 4 * log2 of the most ranks in a usual scratch, less than it takes to notice */
};

/* The cut that keeps every finite logit. */
static struct cut every_finite(const toai_sampler *s)
{
    return (struct cut){-FLT_MAX, s->n_vocab - 1};
}

/* ---- filters ------------------------------------------------------------------------------------------ */

/* Puts the ranks of the tokens that `all` keeps, with logits from `low` up to but not `end`, into the scratch; of those
 * equal to `low` at most max_ties. Returns how many there are, or -1 if the scratch is too small. */
static int32_t gather(toai_sampler *s, struct view view, struct cut all, float low, float end, int32_t max_ties)
{
    float patched[BLOCK];
    uint64_t least = rank(all.x, all.id);
    int32_t count = 0, n_ties = 0;
    for (int32_t b = 0; b < s->n_blocks; b++) {
        if (s->block_max[b] < low)
            continue;
        const float *x = read_block(s, &view, b, patched);
        uint64_t bits = s->simd.at_least(x, low);
        if (s->block_max[b] >= end)
            bits &= ~s->simd.at_least(x, end);
        for (; bits != 0; bits &= bits - 1) {
            int32_t i = __builtin_ctzll(bits);
            uint64_t ranked = rank(x[i], b * BLOCK + i);
            if (ranked < least || (x[i] == low && ++n_ties > max_ties))
                continue;
            if (count == s->max_scratch)
                return -1;
            s->scratch[count++] = ranked;
        }
    }
    return count;
}

/* See sampler.h for the result.
 *
 * The k-th greatest of the block maxima, `low`, is no greater than the k-th greatest logit, since k different
 * blocks hold a logit that is at least `low`; so only logits >= low matter. Those > low lie in at most k - 1
 * blocks, so there are at most 64 (k - 1) of them; of those equal to `low` only the first k can enter. For k <= 63
 * that is at most 4095: it never fails. If the logits are in random order it gathers about k + k^2 / n_blocks.
 * O(n_blocks + k log n_blocks) to find `low`, one read of each block whose maximum reaches it, O(k log n) to pop. */
int32_t gather_best(toai_sampler *s, struct view view, int32_t k, int32_t *n)
{
    float low = -FLT_MAX;
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
    int32_t count = gather(s, view, every_finite(s), low, INFINITY, k);
    make_heap(scratch, count);
    int32_t n_best = count < k ? count : k;
    for (int32_t i = 0; i < n_best; i++)
        pop(scratch, count - i);
    *n = count;
    return n_best;
}

/* e[i] = the weight of token 64 block + i if it is within the cut, else 0; returns their sum. The weight is
 * exp((x - top) / T) if by_mass, else 1. */
static float block_weights(const toai_sampler *s, const float *x, int32_t block, struct cut cut,
                           const struct softmax *softmax, int by_mass, float *e)
{
    float low = block > cut.id / BLOCK ? above(cut.x) : cut.x, sum;
    if (by_mass) {
        sum = s->simd.softmax_block(x, softmax, low, e);
    } else {
        for (int32_t i = 0; i < BLOCK; i++)
            e[i] = x[i] >= low ? 1.0f : 0.0f;
        sum = (float)__builtin_popcountll(s->simd.at_least(x, low));
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

/* e[i] = the weight of the token ranked[i] for i < n <= 64, else 0. */
static void ranked_weights(const toai_sampler *s, const uint64_t *ranked, int32_t n, const struct softmax *softmax,
                           int by_mass, float *e)
{
    float x[BLOCK];
    for (int32_t i = 0; i < BLOCK; i++)
        x[i] = i < n ? cut_of(ranked[i]).x : -INFINITY;
    block_weights(s, x, 0, (struct cut){-FLT_MAX, BLOCK}, softmax, by_mass, e);
}

/* The weight of n ranks. */
static double weight_of_ranks(const toai_sampler *s, const uint64_t *ranked, int32_t n, const struct softmax *softmax,
                              int by_mass)
{
    float e[BLOCK];
    double sum = 0;
    for (int32_t i = 0; i < n; i += BLOCK) {
        ranked_weights(s, ranked + i, n - i < BLOCK ? n - i : BLOCK, softmax, by_mass, e);
        for (int32_t j = 0; j < BLOCK; j++)
            sum += (double)e[j];
    }
    return sum;
}

/* The cut that keeps the fewest best of n > 0 ranks whose weight and `reached` are together at least `target`; that
 * of all n if rounding leaves the sum just below it. Changes the order of the ranks. O(n): each turn of the first
 * loop sets aside about half of them. Unlucky pivots end it, and what is left costs O(log n) for each kept rank. */
static struct cut cut_ranks(const toai_sampler *s, uint64_t *ranked, int32_t n, const struct softmax *softmax,
                            int by_mass, double reached, double target)
{
    float e[BLOCK];
    for (int turns = 0; n > BLOCK && turns < MAX_TURNS; turns++) {
        int32_t n_better = partition(ranked, n);
        double weight = weight_of_ranks(s, ranked, n_better, softmax, by_mass);
        if (reached + weight >= target) {
            n = n_better;
        } else {
            reached += weight;
            ranked += n_better;
            n -= n_better;
        }
    }
    make_heap(ranked, n);
    for (int32_t left = n; left > 0;) {
        int32_t n_now = left < BLOCK ? left : BLOCK;
        for (int32_t i = 0; i < n_now; i++)
            pop(ranked, left - i);
        ranked_weights(s, ranked + left - n_now, n_now, softmax, by_mass, e);
        for (int32_t i = n_now - 1; i >= 0; i--) {
            reached += (double)e[i];
            if (reached >= target)
                return cut_of(ranked[left - n_now + i]);
        }
        left -= n_now;
    }
    return cut_of(ranked[0]);
}

static float greater(float a, float b)
{
    return a > b ? a : b;
}

/* The logit that weighs exp(-depth), or the least one. */
static float logit_at(const toai_sampler *s, float top, double depth)
{
    double x = (double)top - s->temperature * depth;
    return x < (double)-FLT_MAX ? -FLT_MAX : (float)x;
}

/* The logit below which no token is drawn: n_vocab such tokens weigh at most exp(-37) < 2^-53. */
static float negligible(const toai_sampler *s, float top)
{
    return logit_at(s, top, log((double)s->n_vocab) + 37.0);
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

/* Adds up the weight of each bucket's tokens, at least of those from `low` up. Returns the weight of all that `all`
 * keeps. Blocks below `floor` are not read. */
static double fill_buckets(toai_sampler *s, struct view view, struct cut all, const struct softmax *softmax,
                           int by_mass, float floor, float low, float per_unit)
{
    float patched[BLOCK], e[BLOCK], top = softmax->top;
    int32_t index[BLOCK];
    double total = 0;
    memset(s->buckets, 0, 2 * N_BUCKETS * sizeof *s->buckets);
    for (int32_t b = 0; b < s->n_blocks; b++) {
        if (s->block_max[b] < floor)
            continue;
        const float *x = read_block(s, &view, b, patched);
        total += (double)block_weights(s, x, b, all, softmax, by_mass, e);
        if (s->block_max[b] < low)
            continue;
        uint64_t bits = s->simd.at_least(x, low);
        if (__builtin_popcountll(bits) < BLOCK / 4) {
            for (; bits != 0; bits &= bits - 1) {
                int32_t i = __builtin_ctzll(bits);
                s->buckets[bucket_of(x[i], top, per_unit)] += (double)e[i];
            }
            continue;
        }
        s->simd.buckets(x, top, per_unit, index);
        for (int32_t i = 0; i < BLOCK; i += 2) { /* two rows: neighbours often share a bucket */
            s->buckets[index[i]] += (double)e[i];
            s->buckets[N_BUCKETS + index[i + 1]] += (double)e[i + 1];
        }
    }
    return total;
}

/* Adds up the weights for buckets of 1 << shift keys each, from `high` down to `low`. */
static void fill_narrow_buckets(toai_sampler *s, struct view view, struct cut all, const struct softmax *softmax,
                                int by_mass, uint32_t low, uint32_t high, uint32_t shift)
{
    float patched[BLOCK], e[BLOCK];
    memset(s->buckets, 0, 2 * N_BUCKETS * sizeof *s->buckets);
    for (int32_t b = 0; b < s->n_blocks; b++) {
        if (s->block_max[b] < float_of(low))
            continue;
        const float *x = read_block(s, &view, b, patched);
        uint64_t bits = s->simd.at_least(x, float_of(low)) & ~s->simd.at_least(x, float_of(high + 1));
        block_weights(s, x, b, all, softmax, by_mass, e);
        for (; bits != 0; bits &= bits - 1) {
            int32_t i = __builtin_ctzll(bits);
            s->buckets[(high - key_of(x[i])) >> shift] += (double)e[i];
        }
    }
}

/* The cut among the tokens of the logit x, which enter by id and weigh `weight` each. */
static struct cut cut_ties(toai_sampler *s, struct view view, struct cut all, float x, double weight, double reached,
                           double target)
{
    float patched[BLOCK];
    for (int32_t b = 0; b < s->n_blocks; b++) {
        if (s->block_max[b] < x)
            continue;
        const float *block = read_block(s, &view, b, patched);
        uint64_t bits = s->simd.at_least(block, x) & ~s->simd.at_least(block, above(x));
        for (; bits != 0; bits &= bits - 1) {
            struct cut tie = {x, b * BLOCK + __builtin_ctzll(bits)};
            reached += weight;
            if (reached >= target || (x == all.x && tie.id >= all.id))
                return tie;
        }
    }
    return (struct cut){x, s->n_vocab - 1}; /* rounding left the sum just below the target */
}

/* The highest cut within `all` that keeps at least `share` of the weight of all (by_mass: softmax weights), or at
 * least `share` tokens (else).
 *
 * Adds up the weight of each of 1024 buckets of equal width below the greatest logit (the last one reaches down
 * to the end), and finds the bucket that holds the cut. Tokens that each weigh less than (1 - share) / n_vocab of the
 * greatest are together lighter than what the cut leaves out, so the buckets need none of them: most often few tokens
 * remain. If the bucket's tokens are more than the scratch holds, splits its range of keys into up to 1024 parts and
 * repeats: each turn makes the range of 32-bit keys 1024 times narrower, so there are at most four, and a part of one
 * key holds only equal logits. O(n_vocab) for each turn; logits in random order need one. */
static struct cut find_cut(toai_sampler *s, struct view view, struct cut all, const struct softmax *softmax,
                           int by_mass, double share)
{
    float top = softmax->top, floor = all.x, least = all.x;
    double depth = log((double)s->n_vocab) + 16.0, reached = 0;
    if (by_mass) {
        depth = 0.01 + log((double)s->n_vocab / (1.0 - share)); /* the 0.01 is more than rounding takes */
        floor = greater(negligible(s, top), floor);
        least = greater(logit_at(s, top, depth), floor);
        depth *= s->temperature;
    }
    float per_unit = (float)(N_BUCKETS / depth);
    double total = fill_buckets(s, view, all, softmax, by_mass, floor, least, per_unit);
    double target = by_mass ? share * total : share;
    int32_t bucket = find_bucket(s, target, &reached);
    uint32_t low = bucket_floor(bucket, key_of(floor), top, per_unit);
    uint32_t high = bucket == 0 ? key_of(top) : bucket_floor(bucket - 1, key_of(floor), top, per_unit) - 1;
    for (;;) {
        int32_t count = gather(s, view, all, float_of(low), float_of(high + 1), INT32_MAX);
        if (count == 0)
            return all;
        if (count > 0)
            return cut_ranks(s, s->scratch, count, softmax, by_mass, reached, target);
        if (low == high) {
            double weight = weight_of_ranks(s, s->scratch, 1, softmax, by_mass);
            return cut_ties(s, view, all, float_of(low), weight, reached, target);
        }
        uint32_t shift = 0;
        while ((high - low) >> shift >= N_BUCKETS)
            shift++;
        fill_narrow_buckets(s, view, all, softmax, by_mass, low, high, shift);
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
static int32_t draw(toai_sampler *s, struct view view, struct cut cut, const struct softmax *softmax)
{
    float patched[BLOCK], e[BLOCK];
    float floor = greater(negligible(s, softmax->top), cut.x);
    double total = 0, reached = 0;
    struct view blocks = view;
    for (int32_t b = 0; b < s->n_blocks; b++) {
        s->block_mass[b] = 0;
        if (s->block_max[b] >= floor)
            s->block_mass[b] = block_weights(s, read_block(s, &blocks, b, patched), b, cut, softmax, 1, e);
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
    block_weights(s, read_block(s, &blocks, block, patched), block, cut, softmax, 1, e);
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
    struct cut cut = every_finite(s);
    int32_t n = 0, n_best = -1;

    if (s->temperature == 0.0) {
        int32_t id = first_best(s, view, top);
        s->result.cut_logit = top;
        s->result.cut_id = id;
        return id;
    }
    struct softmax softmax = softmax_at(s->temperature, top);
    if (s->top_k > 0 && s->top_k < s->n_vocab) {
        n_best = gather_best(s, view, s->top_k, &n);
        if (n_best > 0)
            cut = cut_of(s->scratch[n - n_best]);
        else
            cut = find_cut(s, view, cut, &softmax, 0, s->top_k);
    }
    if (s->top_p < 1.0) {
        uint64_t *best = s->scratch + n - n_best;
        if (n_best > 0)
            cut = cut_ranks(s, best, n_best, &softmax, 1, 0,
                            s->top_p * weight_of_ranks(s, best, n_best, &softmax, 1));
        else
            cut = find_cut(s, view, cut, &softmax, 1, s->top_p);
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
    return draw(s, view, cut, &softmax);
}
