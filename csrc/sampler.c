/* One token from one vector of logits: see api.h for what it does, and in which order.
 *
 * How. Logits are read in blocks of 64. One dense pass finds each block's maximum and any NaN; after it, most
 * steps need only the few blocks whose maximum is high enough. top_k, top_p and min_p each leave a run of the
 * best tokens, so the candidates are always given by one `struct cut`, and each filter only raises it. The last
 * pass weighs what is above the cut and draws. Nothing is sorted but a bounded number of candidates, and the
 * vocabulary is not copied: a block that holds an adjusted token (bias, penalty, suppression) is read through a
 * 256-byte patched copy on the stack, so adjustments cost only the blocks they touch.
 *
 * Cost: O(n_vocab) dense work, at most three such passes when a filter is on, plus O(n_adjusted). */

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "api.h"
#include "order.h"

#if (defined(__x86_64__) || defined(__i386__)) && !defined(TOAI_PORTABLE)
#define HAVE_AVX2_COPY 1
#include <immintrin.h>
#endif

enum {
    BLOCK = 64,
    N_BUCKETS = 1024,
    MIN_SCRATCH = 4096, /* > 64 * 63 + 63: see gather_best() */
};

#define LANES(name) name##_any
#define LANES_TARGET
#include "lanes.h"
#undef LANES
#undef LANES_TARGET

#ifdef HAVE_AVX2_COPY
#define LANES(name) name##_avx2
#define LANES_TARGET __attribute__((target("avx2")))
#define LANES_AVX2
#include "lanes.h"
#undef LANES
#undef LANES_TARGET
#undef LANES_AVX2
#endif

struct lanes {
    int (*scan)(const float *x, int32_t n_blocks, float *block_max);
    uint64_t (*at_least)(const float *x, float low);
    float (*weigh)(const float *x, float top, float rate, float rate_rest, float low, float *e);
    void (*buckets)(const float *x, float top, float per_unit, int32_t *index);
};

/* A token whose logit is adjusted. */
struct entry {
    int32_t id;
    int32_t n_recent;    /* times within the last repeat_last_n tokens */
    int32_t n_generated; /* times generated */
    float bias;
    int32_t suppress;
};

/* Logits as a reader sees them, block after block: raw, or with the adjusted values in place. */
struct view {
    const float *logits;
    int32_t n_entries; /* 0: raw */
    int32_t at;        /* entries before this one lie before the block last read */
};

struct toai_sampler {
    toai_sampler_result result;

    /* for the sampler's life */
    struct lanes lanes;
    int32_t n_vocab, n_blocks, top_k, n_top, n_window;
    int32_t max_entries, max_scratch;
    double temperature, top_p, min_p;
    float rate, rate_rest; /* 1 / temperature, and what rounding it lost */
    float repeat_penalty, presence_penalty, frequency_penalty;
    int32_t counts_generated; /* presence or frequency penalty is on */

    /* from token to token */
    uint64_t random;
    int32_t n_entries, n_accepted, window_at;

    /* arrays, in the same memory */
    struct entry *entries; /* by rising id */
    float *adjusted;       /* this call's logit of each entry */
    int32_t *window;       /* ring of the last n_window tokens */
    float *block_max, *block_mass;
    double *buckets;       /* N_BUCKETS for even places of a block, then as many for odd ones */
    uint64_t *scratch;     /* candidates as rank(): see there */
};

/* ---- memory ------------------------------------------------------------------------------------------- */

static int in_range(double x, double low, double high)
{
    return x >= low && x <= high; /* false for NaN */
}

static int sound_params(const toai_sampler_params *p)
{
    return p != NULL && p->n_vocab >= 1 && p->n_vocab <= TOAI_MAX_VOCAB && p->n_ctx >= 1
        && in_range(p->temperature, 0, 100) && in_range(p->top_p, 0, 1) && in_range(p->min_p, 0, 1)
        && in_range((double)p->repeat_penalty, 0.001, 1000) && in_range((double)p->presence_penalty, -1000, 1000)
        && in_range((double)p->frequency_penalty, -1000, 1000) && p->n_top >= -1 && p->n_top <= TOAI_MAX_TOP
        && p->n_bias >= 0 && p->n_suppress >= 0 && (p->n_bias == 0 || (p->bias_id != NULL && p->bias != NULL))
        && (p->n_suppress == 0 || p->suppress != NULL);
}

static int32_t window_size(const toai_sampler_params *p)
{
    if (p->repeat_penalty == 1.0f)
        return 0;
    return p->repeat_last_n < 0 || p->repeat_last_n > p->n_ctx ? p->n_ctx : p->repeat_last_n;
}

static int counts_generated(const toai_sampler_params *p)
{
    return p->presence_penalty != 0.0f || p->frequency_penalty != 0.0f;
}

/* Distinct adjusted tokens at any one time: those named at the start, in the window, and generated. One more
 * than the window, because a token enters it before the oldest leaves. */
static int32_t max_entries(const toai_sampler_params *p)
{
    int64_t n = (int64_t)p->n_bias + p->n_suppress;
    if (window_size(p) > 0)
        n += (int64_t)window_size(p) + 1;
    if (counts_generated(p))
        n += p->n_ctx;
    return (int32_t)(n < p->n_vocab ? n : p->n_vocab);
}

static int32_t count_blocks(int32_t n_vocab)
{
    return (n_vocab + BLOCK - 1) / BLOCK;
}

/* Lays the arrays out after the struct; with s == NULL only adds their sizes up. */
static size_t lay_out(toai_sampler *s, const toai_sampler_params *p)
{
    size_t n_blocks = (size_t)count_blocks(p->n_vocab), n_entries = (size_t)max_entries(p);
    size_t n_scratch = n_blocks > MIN_SCRATCH ? n_blocks : MIN_SCRATCH;
    size_t at = (sizeof *s + 7) / 8 * 8; /* the widest first, so that each array is aligned */
#define PLACE(field, count)                                                                                    \
    do {                                                                                                       \
        if (s != NULL)                                                                                         \
            s->field = (void *)((char *)s + at);                                                               \
        at += (count) * sizeof *s->field;                                                                      \
    } while (0)
    PLACE(scratch, n_scratch);
    PLACE(buckets, 2 * (size_t)N_BUCKETS);
    PLACE(entries, n_entries);
    PLACE(adjusted, n_entries);
    PLACE(block_max, n_blocks);
    PLACE(block_mass, n_blocks);
    PLACE(window, (size_t)window_size(p));
#undef PLACE
    if (s != NULL)
        s->max_scratch = (int32_t)n_scratch;
    return at;
}

size_t toai_sampler_size(const toai_sampler_params *params)
{
    return sound_params(params) ? lay_out(NULL, params) : 0;
}

/* ---- adjusted tokens ---------------------------------------------------------------------------------- */

/* The index of the first entry whose id is not less. O(log n). */
static int32_t find_entry(const toai_sampler *s, int32_t id)
{
    int32_t low = 0, high = s->n_entries;
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        if (s->entries[middle].id < id)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The entry of a token, made if need be; NULL when there is no room. O(n_entries) to make one. */
static struct entry *need_entry(toai_sampler *s, int32_t id)
{
    int32_t at = find_entry(s, id);
    struct entry *entry = s->entries + at;
    if (at < s->n_entries && entry->id == id)
        return entry;
    if (s->n_entries == s->max_entries)
        return NULL;
    memmove(entry + 1, entry, (size_t)(s->n_entries - at) * sizeof *entry);
    *entry = (struct entry){.id = id};
    s->n_entries++;
    return entry;
}

/* Takes a token out of the window, and its entry away once nothing adjusts it. */
static void forget(toai_sampler *s, int32_t id)
{
    int32_t at = find_entry(s, id);
    struct entry *entry = s->entries + at;
    if (--entry->n_recent == 0 && entry->n_generated == 0 && entry->bias == 0.0f && !entry->suppress) {
        memmove(entry, entry + 1, (size_t)(s->n_entries - at - 1) * sizeof *entry);
        s->n_entries--;
    }
}

static int32_t accept(toai_sampler *s, int32_t id, int generated)
{
    int counts = generated && s->counts_generated;
    if (s->n_window == 0 && !counts)
        return TOAI_OK;
    struct entry *entry = need_entry(s, id);
    if (entry == NULL)
        return TOAI_E_FULL;
    if (counts && entry->n_generated < INT32_MAX)
        entry->n_generated++;
    if (s->n_window > 0) {
        entry->n_recent++;
        if (s->n_accepted == s->n_window)
            forget(s, s->window[s->window_at]);
        else
            s->n_accepted++;
        s->window[s->window_at] = id;
        s->window_at = s->window_at + 1 == s->n_window ? 0 : s->window_at + 1;
    }
    return TOAI_OK;
}

static void adjust(toai_sampler *s, const float *logits, int suppress)
{
    for (int32_t i = 0; i < s->n_entries; i++) {
        const struct entry *entry = s->entries + i;
        float x = logits[entry->id] + entry->bias;
        if (entry->bias <= -100.0f || (suppress && entry->suppress))
            x = -INFINITY;
        if (entry->n_recent > 0)
            x = x > 0 ? x / s->repeat_penalty : x * s->repeat_penalty;
        if (entry->n_generated > 0)
            x -= s->presence_penalty + s->frequency_penalty * (float)entry->n_generated;
        s->adjusted[i] = x > FLT_MAX ? FLT_MAX : x;
    }
}

/* ---- reading blocks ----------------------------------------------------------------------------------- */

static int32_t block_end(const toai_sampler *s, int32_t block)
{
    return s->n_vocab - block * BLOCK < BLOCK ? s->n_vocab : (block + 1) * BLOCK;
}

/* Block `block` as 64 floats: the logits themselves, or `patched` with adjusted values and -inf past the end.
 * Blocks must be asked for in rising order; then all of a pass's searches for entries take O(n_entries). */
static const float *read_block(const toai_sampler *s, struct view *view, int32_t block, float *patched)
{
    int32_t first = block * BLOCK, end = block_end(s, block), at = view->at;
    while (at < view->n_entries && s->entries[at].id < first)
        at++;
    view->at = at;
    if (end - first == BLOCK && (at == view->n_entries || s->entries[at].id >= end))
        return view->logits + first;
    memcpy(patched, view->logits + first, (size_t)(end - first) * sizeof *patched);
    for (int32_t i = end - first; i < BLOCK; i++)
        patched[i] = -INFINITY;
    for (; at < view->n_entries && s->entries[at].id < end; at++)
        patched[s->entries[at].id - first] = s->adjusted[at];
    return patched;
}

static float greatest(const toai_sampler *s)
{
    float top = -INFINITY;
    for (int32_t b = 0; b < s->n_blocks; b++)
        top = s->block_max[b] > top ? s->block_max[b] : top;
    return top;
}

/* Fills block_max from the raw logits. Returns 0 if they hold a NaN or +inf. */
static int scan_raw(toai_sampler *s, const float *logits)
{
    float patched[BLOCK];
    int32_t n_whole = s->n_vocab / BLOCK;
    int sound = s->lanes.scan(logits, n_whole, s->block_max);
    if (n_whole < s->n_blocks) {
        struct view raw = {.logits = logits};
        sound &= s->lanes.scan(read_block(s, &raw, n_whole, patched), 1, s->block_max + n_whole);
    }
    return sound;
}

/* Corrects block_max for the adjusted tokens: only the blocks that hold one are read again. */
static void scan_adjusted(toai_sampler *s, struct view view)
{
    float patched[BLOCK];
    for (int32_t i = 0, last = -1; i < view.n_entries; i++) {
        int32_t block = s->entries[i].id / BLOCK;
        if (block != last)
            s->lanes.scan(read_block(s, &view, block, patched), 1, s->block_max + block);
        last = block;
    }
}

/* ---- filters ------------------------------------------------------------------------------------------ */

/* The best k tokens, in order, at scratch[n - 1], scratch[n - 2], ...: sets n and returns how many there are
 * (fewer if fewer logits are finite), or -1 if they cannot be told apart within the scratch.
 *
 * The k-th greatest of the block maxima, `low`, is no greater than the k-th greatest logit, since k different
 * blocks hold a logit that is at least `low`; so only logits >= low matter. Those > low lie in at most k - 1
 * blocks, thus number at most 64 (k - 1); of those equal to `low` only the first k can enter. For k <= 63 that
 * is at most 4095: it never fails. For logits in no special order about k + k^2 / n_blocks are gathered.
 * O(n_blocks + k log n_blocks) to find `low`, a look at each block whose maximum reaches it, O(k log n) to pop. */
static int32_t gather_best(toai_sampler *s, struct view view, int32_t k, int32_t *n)
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
        for (uint64_t bits = s->lanes.at_least(x, low); bits != 0; bits &= bits - 1) {
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

/* e[i] = the weight of token 64 block + i if the cut lets it in, else 0; returns their sum.
 * by_mass: exp((x - top) / T), else 1. */
static float weigh_block(const toai_sampler *s, const float *x, int32_t block, struct cut cut, float top,
                         int by_mass, float *e)
{
    float low = block > cut.id / BLOCK ? above(cut.x) : cut.x;
    float sum;
    if (by_mass) {
        sum = s->lanes.weigh(x, top, s->rate, s->rate_rest, low, e);
    } else {
        uint64_t bits = s->lanes.at_least(x, low);
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

/* Weights of ranked tokens: ranked[0], ranked[-1], ... ranked[1 - n], n <= 64. */
static void weigh_ranked(const toai_sampler *s, const uint64_t *ranked, int32_t n, float top, float *e)
{
    float x[BLOCK];
    for (int32_t i = 0; i < BLOCK; i++)
        x[i] = i < n ? cut_of(ranked[-i]).x : -INFINITY;
    s->lanes.weigh(x, top, s->rate, s->rate_rest, -FLT_MAX, e);
}

/* A logit this far below the greatest is never drawn: n_vocab such tokens weigh at most exp(-37) < 2^-53. */
static float negligible(const toai_sampler *s, float top)
{
    double x = (double)top - s->temperature * (log((double)s->n_vocab) + 37.0);
    return x < (double)-FLT_MAX ? -FLT_MAX : (float)x;
}

/* top_p of the n best, which lie in order at last[0], last[-1], ... O(n). */
static struct cut shorten(const toai_sampler *s, const uint64_t *last, int32_t n, float top)
{
    float e[BLOCK];
    double total = 0, reached = 0;
    for (int32_t i = 0; i < n; i += BLOCK) {
        weigh_ranked(s, last - i, n - i < BLOCK ? n - i : BLOCK, top, e);
        for (int32_t j = 0; j < BLOCK; j++)
            total += (double)e[j];
    }
    for (int32_t i = 0; i < n; i += BLOCK) {
        weigh_ranked(s, last - i, n - i < BLOCK ? n - i : BLOCK, top, e);
        for (int32_t j = 0; j < BLOCK && i + j < n; j++) {
            reached += (double)e[j];
            if (reached >= s->top_p * total)
                return cut_of(last[-(i + j)]);
        }
    }
    return cut_of(last[1 - n]);
}

/* The bucket of a logit by its distance from the greatest. Never falls as x falls: a rounded difference, a
 * rounded product and a truncation all keep the order. */
static int32_t bucket_of(float x, float top, float per_unit)
{
    float at = (top - x) * per_unit;
    return (int32_t)(at < (float)(N_BUCKETS - 1) ? at : (float)(N_BUCKETS - 1));
}

/* The least key, from `low` up, whose float lies in this bucket or a better one. 32 steps. */
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

/* Walks the buckets from the best until *reached plus their weight is at least `target`. Returns that bucket,
 * or the last one that holds anything, with *reached = the weight before it. */
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

/* The shortest run of the best tokens within the cut `all` whose weight (by_mass: softmax weight; else one each)
 * is at least `share` of the weight of all, or at least `share` tokens.
 *
 * Adds up the weight of each of 1024 buckets of equal width below the greatest logit (the last one reaches down
 * to the end), finds the bucket in which the run ends, and puts that bucket's tokens in order. If they are more
 * than the scratch holds, splits the bucket's range of keys into up to 1024 parts and looks again: each turn
 * makes the range of 32-bit keys 1024 times narrower, so there are at most four, and a part of one key holds
 * only equal logits, which enter by id. O(n_vocab) for each turn; logits in no special order need one. */
static struct cut find_run(toai_sampler *s, struct view view, struct cut all, float top, int by_mass, double share)
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
        total += (double)weigh_block(s, x, b, all, top, by_mass, e);
        s->lanes.buckets(x, top, per_unit, index);
        for (int32_t i = 0; i < BLOCK; i += 2) { /* two rows, so that neighbours in one bucket need not wait */
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
            uint64_t bits = s->lanes.at_least(x, float_of(low)) & ~s->lanes.at_least(x, float_of(high + 1));
            if (bits == 0)
                continue;
            weigh_block(s, x, b, all, top, by_mass, e);
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
                    weigh_ranked(s, s->scratch + left - 1, n, top, e);
                for (int32_t i = 0; i < n; i++) {
                    reached += by_mass ? (double)e[i] : 1.0;
                    if (reached >= target)
                        return cut_of(s->scratch[left - 1 - i]);
                }
                left -= n;
            }
            return cut_of(s->scratch[0]); /* rounding left the target just out of reach */
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

/* Draws one of the candidates by its weight: a pass that weighs each block which has any, then a walk to the
 * block and within it to the token. O(64 per block that reaches the cut + n_blocks). */
static int32_t draw(toai_sampler *s, struct view view, struct cut cut, float top)
{
    float patched[BLOCK], e[BLOCK];
    float far = negligible(s, top), floor = far > cut.x ? far : cut.x;
    double total = 0, reached = 0;
    struct view blocks = view;
    for (int32_t b = 0; b < s->n_blocks; b++) {
        s->block_mass[b] = 0;
        if (s->block_max[b] >= floor)
            s->block_mass[b] = weigh_block(s, read_block(s, &blocks, b, patched), b, cut, top, 1, e);
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
    weigh_block(s, read_block(s, &blocks, block, patched), block, cut, top, 1, e);
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

/* The first token with the greatest logit. */
static int32_t first_best(const toai_sampler *s, struct view view, float top)
{
    float patched[BLOCK];
    int32_t b = 0;
    while (s->block_max[b] < top)
        b++;
    return b * BLOCK + __builtin_ctzll(s->lanes.at_least(read_block(s, &view, b, patched), top));
}

static int32_t choose(toai_sampler *s, struct view view, float top)
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
            cut = find_run(s, view, cut, top, 0, s->top_k);
    }
    if (s->top_p < 1.0) {
        if (n_best > 0)
            cut = shorten(s, s->scratch + n - 1, n_best, top);
        else
            cut = find_run(s, view, cut, top, 1, s->top_p);
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

/* ---- log-probabilities -------------------------------------------------------------------------------- */

/* Fills the result's top list; block_max must be that of the raw logits, `top` their greatest. Returns the
 * logarithm of the sum of exp(x - top). Each block's sum is a float, the sum of blocks a double: relative
 * errors of some 1e-7 in each term, which partly cancel, so the logarithm is within 1e-6. */
static double measure(toai_sampler *s, const float *logits, float top)
{
    float patched[BLOCK], e[BLOCK];
    double sum = 0;
    struct view raw = {.logits = logits};
    for (int32_t b = 0; b < s->n_blocks; b++)
        if (s->block_max[b] >= top - 88.0f) /* below that every weight is 0 */
            sum += (double)s->lanes.weigh(read_block(s, &raw, b, patched), top, 1.0f, 0.0f, -FLT_MAX, e);
    double log_sum = log(sum);
    int32_t n = 0;
    s->result.n_top = 0;
    if (s->n_top > 0)
        s->result.n_top = gather_best(s, (struct view){.logits = logits}, s->n_top, &n);
    for (int32_t i = 0; i < s->result.n_top; i++) {
        struct cut one = cut_of(s->scratch[n - 1 - i]);
        s->result.top_id[i] = one.id;
        s->result.top_logprob[i] = (double)one.x - (double)top - log_sum;
    }
    return log_sum;
}

/* ---- the interface ------------------------------------------------------------------------------------ */

int32_t toai_sampler_init(toai_sampler *s, size_t size, const toai_sampler_params *p)
{
    if (s == NULL || (uintptr_t)s % 8 != 0 || !sound_params(p) || size < lay_out(NULL, p))
        return TOAI_E_ARG;
    lay_out(s, p);
    s->lanes = (struct lanes){scan_any, at_least_any, weigh_any, buckets_any};
#ifdef HAVE_AVX2_COPY
    if (__builtin_cpu_supports("avx2"))
        s->lanes = (struct lanes){scan_avx2, at_least_avx2, weigh_avx2, buckets_avx2};
#endif
    s->n_vocab = p->n_vocab;
    s->n_blocks = count_blocks(p->n_vocab);
    s->top_k = p->top_k;
    s->n_top = p->n_top;
    s->n_window = window_size(p);
    s->max_entries = max_entries(p);
    s->temperature = p->temperature < 1e-5 ? 0.0 : p->temperature;
    if (s->temperature > 0) {
        s->rate = (float)(1.0 / p->temperature);
        s->rate_rest = (float)(1.0 / p->temperature - (double)s->rate);
    }
    s->top_p = p->top_p;
    s->min_p = p->min_p;
    s->repeat_penalty = p->repeat_penalty;
    s->presence_penalty = p->presence_penalty;
    s->frequency_penalty = p->frequency_penalty;
    s->counts_generated = counts_generated(p);
    s->random = p->seed;
    s->n_entries = s->n_accepted = s->window_at = 0;
    s->result = (toai_sampler_result){0};
    for (int32_t i = 0; i < p->n_bias; i++) {
        if (p->bias_id[i] < 0 || p->bias_id[i] >= p->n_vocab)
            return TOAI_E_TOKEN;
        if (!in_range((double)p->bias[i], -FLT_MAX, FLT_MAX))
            return TOAI_E_ARG;
        need_entry(s, p->bias_id[i])->bias = p->bias[i];
    }
    for (int32_t i = 0; i < p->n_suppress; i++) {
        if (p->suppress[i] < 0 || p->suppress[i] >= p->n_vocab)
            return TOAI_E_TOKEN;
        need_entry(s, p->suppress[i])->suppress = 1;
    }
    return TOAI_OK;
}

int32_t toai_sampler_accept(toai_sampler *s, const int32_t *tokens, int32_t n_tokens)
{
    if (s == NULL || n_tokens < 0 || (tokens == NULL && n_tokens > 0))
        return TOAI_E_ARG;
    for (int32_t i = 0; i < n_tokens; i++) {
        if (tokens[i] < 0 || tokens[i] >= s->n_vocab)
            return TOAI_E_TOKEN;
        int32_t code = accept(s, tokens[i], 0);
        if (code != TOAI_OK)
            return code;
    }
    return TOAI_OK;
}

int32_t toai_sampler_sample(toai_sampler *s, const float *logits, int32_t suppress)
{
    if (s == NULL || logits == NULL)
        return TOAI_E_ARG;
    if (!scan_raw(s, logits))
        return TOAI_E_NONFINITE;
    float raw_top = greatest(s), top = raw_top;
    if (raw_top == -INFINITY)
        return TOAI_E_NONFINITE;
    double log_sum = s->n_top >= 0 ? measure(s, logits, raw_top) : 0.0;
    struct view view = {.logits = logits, .n_entries = s->n_entries};
    if (s->n_entries > 0) {
        adjust(s, logits, suppress);
        scan_adjusted(s, view);
        top = greatest(s);
        if (top == -INFINITY)
            return TOAI_E_BANNED;
    }
    uint64_t random = s->random;
    int32_t id = choose(s, view, top);
    int32_t code = accept(s, id, 1);
    if (code != TOAI_OK) {
        s->random = random;
        return code;
    }
    if (s->n_top >= 0)
        s->result.logprob = (double)logits[id] - (double)raw_top - log_sum;
    return id;
}

int32_t toai_sampler_score(toai_sampler *s, const float *logits, int32_t token)
{
    if (s == NULL || logits == NULL || s->n_top < 0)
        return TOAI_E_ARG;
    if (token < 0 || token >= s->n_vocab)
        return TOAI_E_TOKEN;
    if (!scan_raw(s, logits))
        return TOAI_E_NONFINITE;
    float top = greatest(s);
    if (top == -INFINITY)
        return TOAI_E_NONFINITE;
    s->result.logprob = (double)logits[token] - (double)top - measure(s, logits, top);
    return TOAI_OK;
}

const toai_sampler_result *toai_sampler_get_result(const toai_sampler *s)
{
    return &s->result;
}
