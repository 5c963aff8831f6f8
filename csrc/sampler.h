/* The sampler's memory and what its files share; api.h is the interface. history.c keeps the adjusted tokens,
 * choose.c filters and draws, sampler.c makes samplers and runs a call. */

#ifndef TOAI_SAMPLER_H
#define TOAI_SAMPLER_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "api.h"
#include "order.h"
#include "simd.h"

enum {
    MIN_SCRATCH = 4096, /* > 64 * 63 + 63: see gather_best() */
};

/* A token whose logit is adjusted. */
struct entry {
    int32_t id;
    int32_t n_recent;    /* times within the last repeat_last_n tokens */
    int32_t n_generated; /* times generated */
    float bias;
    int32_t suppress;
};

/* The logits of one pass, read block after block: raw, or with the adjusted values and the mask in place. */
struct view {
    const float *logits;
    const uint64_t *allowed; /* the mask; NULL: every token */
    int32_t n_entries;       /* 0: raw */
    int32_t at;              /* entries before this one lie before the block last read */
};

struct toai_sampler {
    toai_sampler_result result;

    /* for the sampler's life */
    struct simd simd;
    int32_t n_vocab, n_blocks, top_k, n_top, n_window;
    int32_t max_entries, max_scratch;
    double temperature, top_p, min_p;
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
    double *buckets;   /* N_BUCKETS for even places of a block, then as many for odd ones */
    uint64_t *scratch; /* candidates as rank() */
};

/* ---- history.c ---------------------------------------------------------------------------------------- */

/* The entry of a token, made if it has none; NULL when there is no room. O(n_entries) to make one. */
struct entry *get_or_add_entry(toai_sampler *s, int32_t id);

/* Adds a token to the history. Returns TOAI_OK or TOAI_E_FULL. */
int32_t history_add(toai_sampler *s, int32_t id, int generated);

/* Adds tokens that were not generated. O(n_tokens log n_tokens) for a new sampler. Returns TOAI_OK or TOAI_E_FULL. */
int32_t history_add_prompt(toai_sampler *s, const int32_t *tokens, int32_t n_tokens);

/* Computes the adjusted logit of every entry. */
void adjust_entries(toai_sampler *s, const float *logits, int suppress);

/* ---- choose.c ----------------------------------------------------------------------------------------- */

/* Filters the candidates and draws one; returns its id. block_max must be that of the view, `top` its greatest,
 * and `top` finite. */
int32_t choose(toai_sampler *s, struct view view, float top);

/* The best k tokens, in order, at scratch[n - 1], scratch[n - 2], ...: sets n and returns how many there are
 * (fewer if fewer logits are finite), or -1 if the scratch is too small. It never is for k <= 63. */
int32_t gather_best(toai_sampler *s, struct view view, int32_t k, int32_t *n);

/* ---- reading blocks ----------------------------------------------------------------------------------- */

/* Applies a word of the mask to a block; returns x, or `patched` (which may be x) with -inf in place of what the
 * word does not allow. */
const float *mask_block(const toai_sampler *s, const float *x, uint64_t allowed, float *patched);

static inline const float *read_unmasked(const toai_sampler *s, struct view *view, int32_t block, float *patched)
{
    int32_t first = block * BLOCK, at = view->at;
    int32_t end = s->n_vocab - first < BLOCK ? s->n_vocab : first + BLOCK;
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

/* Block `block` as 64 floats: the logits themselves, or `patched` with adjusted values, and -inf for masked tokens
 * and past the end. A pass must read blocks in rising order; all of its searches for entries then take
 * O(n_entries). */
static inline const float *read_block(const toai_sampler *s, struct view *view, int32_t block, float *patched)
{
    const float *x = read_unmasked(s, view, block, patched);
    if (__builtin_expect(view->allowed != NULL, 0))
        return mask_block(s, x, view->allowed[block], patched);
    return x;
}

#endif
