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
