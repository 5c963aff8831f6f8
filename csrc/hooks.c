/* Callbacks for libllama, and a walk over its vocabulary. See api.h. */

#define _POSIX_C_SOURCE 200809L

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include "api.h"

enum { LEVEL_WARN = 3, LEVEL_ERROR = 4 };

/* Bits of llama_token_attr. */
enum { ATTR_CONTROL = 1 << 3, ATTR_USER = 1 << 4, ATTR_BYTE = 1 << 5, ATTR_LSTRIP = 1 << 7, ATTR_RSTRIP = 1 << 8 };

_Bool toai_abort_asked(void *abort)
{
    /* volatile: Python writes the fields from another thread */
    const volatile toai_abort *asked = abort;
    if (asked->asked)
        return 1;
    const double deadline = asked->deadline;
    if (!(deadline > 0.0))
        return 0;
    struct timespec now;
    if (clock_gettime(CLOCK_MONOTONIC, &now))
        return 0;
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec >= deadline;
}

void toai_log_append(int level, const char *text, void *log)
{
    toai_log *out = log;
    if (!out || !text || (level != LEVEL_WARN && level != LEVEL_ERROR))
        return;
    size_t n = strlen(text);
    if (n > TOAI_LOG_BYTES)
        n = TOAI_LOG_BYTES;
    /* each caller gets a part of its own */
    const uint32_t at = __atomic_load_n(&out->used, __ATOMIC_RELAXED) >= TOAI_LOG_BYTES
                            ? TOAI_LOG_BYTES
                            : __atomic_fetch_add(&out->used, (uint32_t)n, __ATOMIC_RELAXED);
    if (at >= TOAI_LOG_BYTES)
        return;
    if (n > TOAI_LOG_BYTES - at)
        n = TOAI_LOG_BYTES - at;
    memcpy(out->text + at, text, n);
}

int32_t toai_scan_vocab(const toai_vocab_calls *calls, const void *vocab, int32_t n_vocab, uint8_t *kinds)
{
    if (!calls || !calls->is_eog || !calls->attr || !calls->piece || !vocab || !kinds || n_vocab < 1 ||
        n_vocab > TOAI_MAX_VOCAB)
        return TOAI_E_ARG;
    int32_t longest = 1;
    for (int32_t i = 0; i < n_vocab; i++) {
        const int attr = calls->attr(vocab, i);
        uint8_t kind = 0;
        if (calls->is_eog(vocab, i))
            kind |= TOAI_KIND_EOG;
        if (attr & ATTR_CONTROL)
            kind |= TOAI_KIND_CONTROL;
        if (attr & ATTR_USER)
            kind |= TOAI_KIND_USER;
        if (attr & ATTR_BYTE)
            kind |= TOAI_KIND_BYTE;
        if (attr & ATTR_LSTRIP)
            kind |= TOAI_KIND_LSTRIP;
        if (attr & ATTR_RSTRIP)
            kind |= TOAI_KIND_RSTRIP;
        kinds[i] = kind;
        /* without room the function returns minus the size */
        char none;
        int32_t n = calls->piece(vocab, i, &none, 0, 0, 1);
        n = n < 0 && n > INT32_MIN ? -n : n;
        if (n > longest)
            longest = n;
    }
    return longest;
}
