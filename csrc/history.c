/* The tokens whose logits are adjusted: biased, suppressed, in the repetition window, or generated before. */

#include <float.h>

#include "sampler.h"

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

struct entry *get_or_add_entry(toai_sampler *s, int32_t id)
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

/* Takes a token out of the window, and removes its entry if nothing else adjusts it. */
static void window_drop(toai_sampler *s, int32_t id)
{
    int32_t at = find_entry(s, id);
    struct entry *entry = s->entries + at;
    if (--entry->n_recent == 0 && entry->n_generated == 0 && entry->bias == 0.0f && !entry->suppress) {
        memmove(entry, entry + 1, (size_t)(s->n_entries - at - 1) * sizeof *entry);
        s->n_entries--;
    }
}

int32_t history_add(toai_sampler *s, int32_t id, int generated)
{
    int counts = generated && s->counts_generated;
    if (s->n_window == 0 && !counts)
        return TOAI_OK;
    struct entry *entry = get_or_add_entry(s, id);
    if (entry == NULL)
        return TOAI_E_FULL;
    if (counts && entry->n_generated < INT32_MAX)
        entry->n_generated++;
    if (s->n_window > 0) {
        entry->n_recent++;
        if (s->n_accepted == s->n_window)
            window_drop(s, s->window[s->window_at]); /* may move entries: `entry` is not valid after it */
        else
            s->n_accepted++;
        s->window[s->window_at] = id;
        s->window_at = s->window_at + 1 == s->n_window ? 0 : s->window_at + 1;
    }
    return TOAI_OK;
}

/* Adds n tokens to the window's entries, which have room for them; n is at most max_scratch. O(n log n + n_entries):
 * sorts the ids and merges them with the entries from the end. */
static void merge_recent(toai_sampler *s, const int32_t *tokens, int32_t n)
{
    uint64_t *ids = s->scratch;
    for (int32_t i = 0; i < n; i++)
        ids[i] = (uint32_t)tokens[i];
    make_heap(ids, n);
    for (int32_t i = 0; i < n; i++)
        pop(ids, n - i);
    int32_t n_new = 0;
    for (int32_t i = 0, at = 0; i < n; i++) {
        int32_t id = (int32_t)ids[i];
        while (at < s->n_entries && s->entries[at].id < id)
            at++;
        n_new += (i == 0 || id != (int32_t)ids[i - 1]) && (at == s->n_entries || s->entries[at].id != id);
    }
    int32_t from = s->n_entries - 1, to = from + n_new;
    s->n_entries += n_new;
    for (int32_t i = n - 1; i >= 0;) {
        int32_t id = (int32_t)ids[i];
        while (from >= 0 && s->entries[from].id > id)
            s->entries[to--] = s->entries[from--];
        struct entry entry = {.id = id};
        if (from >= 0 && s->entries[from].id == id)
            entry = s->entries[from--];
        for (; i >= 0 && (int32_t)ids[i] == id; i--)
            entry.n_recent++;
        s->entries[to--] = entry;
    }
}

int32_t history_add_prompt(toai_sampler *s, const int32_t *tokens, int32_t n_tokens)
{
    if (s->n_window == 0 || n_tokens == 0)
        return TOAI_OK;
    if (n_tokens > s->n_window) { /* the others would leave the window again */
        tokens += n_tokens - s->n_window;
        n_tokens = s->n_window;
    }
    if (s->n_accepted > 0) {
        for (int32_t i = 0; i < n_tokens; i++)
            if (history_add(s, tokens[i], 0) != TOAI_OK)
                return TOAI_E_FULL;
        return TOAI_OK;
    }
    for (int32_t i = 0; i < n_tokens; i += s->max_scratch)
        merge_recent(s, tokens + i, n_tokens - i < s->max_scratch ? n_tokens - i : s->max_scratch);
    memcpy(s->window, tokens, (size_t)n_tokens * sizeof *tokens);
    s->n_accepted = n_tokens;
    s->window_at = n_tokens == s->n_window ? 0 : n_tokens;
    return TOAI_OK;
}

void adjust_entries(toai_sampler *s, const float *logits, int suppress)
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
