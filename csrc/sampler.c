/* Makes samplers and runs their calls. api.h says what a call does, and in which order.
 *
 * Logits are read in blocks of 64. One dense pass finds each block's maximum and any NaN; after it, most steps need
 * only the few blocks whose maximum is high enough. The vocabulary is not copied: a block that holds an adjusted
 * token (bias, penalty, suppression) or a masked one is read through a 256-byte patched copy on the stack, so
 * adjustments cost only the blocks they touch.
 *
 * Cost: O(n_vocab) dense work plus O(n_adjusted). Peaked logits take one such pass for the maxima and one for the
 * weights of top_p, or without a filter for those of the draw. Flat ones take two more: many blocks hold candidates. */

#include <float.h>

#include "sampler.h"

/* ---- memory ------------------------------------------------------------------------------------------- */

static int in_range(double x, double low, double high)
{
    return x >= low && x <= high; /* false for NaN */
}

static int sound_params(const toai_sampler_params *p)
{
    return p != NULL && p->n_vocab >= 1 && p->n_vocab <= TOAI_MAX_VOCAB && p->n_ctx >= 1
        && p->n_ctx <= TOAI_MAX_CTX && in_range(p->temperature, 0, 100) && in_range(p->top_p, 0, 1) && in_range(p->min_p, 0, 1)
        && in_range((double)p->repeat_penalty, 1e-30, 1000) && in_range((double)p->presence_penalty, -1000, 1000)
        && in_range((double)p->frequency_penalty, -1000, 1000) && p->n_top >= -1 && p->n_top <= TOAI_MAX_TOP
        && p->n_bias >= 0 && p->n_suppress >= 0 && (p->n_bias == 0 || (p->bias_id != NULL && p->bias != NULL))
        && (p->n_suppress == 0 || p->suppress != NULL);
}

static int sound_logits(const float *logits)
{
    return logits != NULL && (uintptr_t)logits % _Alignof(float) == 0;
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

/* The most adjusted tokens at any one time: those given by the parameters, in the window, and generated. One more
 * than the window holds, because a token enters it before the oldest leaves. */
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

/* Sets the array pointers to the memory after the struct, unless s is NULL. Returns the size of all. */
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

/* ---- scanning ----------------------------------------------------------------------------------------- */

static float greatest(const toai_sampler *s)
{
    float top = -INFINITY;
    for (int32_t b = 0; b < s->n_blocks; b++)
        top = s->block_max[b] > top ? s->block_max[b] : top;
    return top;
}

/* Sets block_max to the greatest raw logit of each block. Returns 0 if the logits hold a NaN or +inf. */
static int scan_raw(toai_sampler *s, const float *logits)
{
    float patched[BLOCK];
    int32_t n_whole = s->n_vocab / BLOCK;
    int sound = s->simd.scan(logits, n_whole, s->block_max);
    if (n_whole < s->n_blocks) {
        struct view raw = {.logits = logits};
        sound &= s->simd.scan(read_block(s, &raw, n_whole, patched), 1, s->block_max + n_whole);
    }
    return sound;
}

/* Updates block_max for the adjusted tokens: reads only the blocks that hold one. */
static void scan_adjusted(toai_sampler *s, struct view view)
{
    float patched[BLOCK];
    for (int32_t i = 0, last = -1; i < view.n_entries; i++) {
        int32_t block = s->entries[i].id / BLOCK;
        if (block != last)
            s->simd.scan(read_block(s, &view, block, patched), 1, s->block_max + block);
        last = block;
    }
}

/* Not inline, and without the view: the loops that read blocks then keep the view in registers. */
const float *mask_block(const toai_sampler *s, const float *x, uint64_t allowed, float *patched)
{
    if (allowed == UINT64_MAX)
        return x;
    if (x != patched)
        memcpy(patched, x, BLOCK * sizeof *patched);
    s->simd.mask(patched, allowed);
    return patched;
}

/* Updates block_max for the adjusted tokens and the mask. Blocks without an allowed token are not read; after this
 * their maximum of -inf keeps every later pass from reading them. */
static void scan_masked(toai_sampler *s, struct view view)
{
    float patched[BLOCK];
    for (int32_t b = 0; b < s->n_blocks; b++) {
        if (view.allowed[b] == 0)
            s->block_max[b] = -INFINITY;
        else if (read_block(s, &view, b, patched) == patched)
            s->simd.scan(patched, 1, s->block_max + b);
    }
}

/* ---- log-probabilities -------------------------------------------------------------------------------- */

/* Fills the result's top list. block_max must be that of the raw logits, `top` their greatest. Returns the logarithm
 * of the sum of exp(x - top). Each block's sum is a float, the sum of blocks a double: each term has a relative
 * error of about 1e-7, and these partly cancel, so the logarithm is within 1e-6. */
static double measure(toai_sampler *s, const float *logits, float top)
{
    float patched[BLOCK], e[BLOCK];
    double sum = 0;
    struct softmax softmax = softmax_at(1.0, top);
    struct view raw = {.logits = logits};
    for (int32_t b = 0; b < s->n_blocks; b++)
        if (s->block_max[b] >= top - 88.0f) /* below that every weight is 0 */
            sum += (double)s->simd.softmax_block(read_block(s, &raw, b, patched), &softmax, -FLT_MAX, e);
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
    s->simd = simd_best();
    s->n_vocab = p->n_vocab;
    s->n_blocks = count_blocks(p->n_vocab);
    s->top_k = p->top_k;
    s->n_top = p->n_top;
    s->n_window = window_size(p);
    s->max_entries = max_entries(p);
    s->temperature = p->temperature < 1e-5 ? 0.0 : p->temperature;
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
        get_or_add_entry(s, p->bias_id[i])->bias = p->bias[i];
    }
    for (int32_t i = 0; i < p->n_suppress; i++) {
        if (p->suppress[i] < 0 || p->suppress[i] >= p->n_vocab)
            return TOAI_E_TOKEN;
        get_or_add_entry(s, p->suppress[i])->suppress = 1;
    }
    return TOAI_OK;
}

int32_t toai_sampler_accept(toai_sampler *s, const int32_t *tokens, int32_t n_tokens)
{
    if (s == NULL || n_tokens < 0 || (tokens == NULL && n_tokens > 0))
        return TOAI_E_ARG;
    int outside = 0;
    for (int32_t i = 0; i < n_tokens; i++)
        outside |= tokens[i] < 0 || tokens[i] >= s->n_vocab;
    if (outside)
        return TOAI_E_TOKEN;
    return history_add_prompt(s, tokens, n_tokens);
}

int32_t toai_sampler_sample(toai_sampler *s, const float *logits, int32_t suppress, const uint64_t *allowed)
{
    if (s == NULL || !sound_logits(logits) || (uintptr_t)allowed % _Alignof(uint64_t) != 0)
        return TOAI_E_ARG;
    if (!scan_raw(s, logits))
        return TOAI_E_NONFINITE;
    float raw_top = greatest(s), top = raw_top;
    if (raw_top == -INFINITY)
        return TOAI_E_NONFINITE;
    double log_sum = s->n_top >= 0 ? measure(s, logits, raw_top) : 0.0;
    struct view view = {.logits = logits, .allowed = allowed, .n_entries = s->n_entries};
    if (s->n_entries > 0 || allowed != NULL) {
        adjust_entries(s, logits, suppress);
        if (allowed != NULL)
            scan_masked(s, view);
        else
            scan_adjusted(s, view);
        top = greatest(s);
        if (top == -INFINITY)
            return TOAI_E_BANNED;
    }
    uint64_t random = s->random;
    int32_t id = choose(s, view, top);
    int32_t code = history_add(s, id, 1);
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
    if (s == NULL || !sound_logits(logits) || s->n_top < 0)
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
