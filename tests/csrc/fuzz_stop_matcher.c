/* Invariant: for any pieces of a stream, the matcher passes on the same bytes as a plain search of the whole stream:
 * all before the match that ends first (the longest of those), or without a match all but the longest end that
 * begins a pattern. It touches nothing outside its memory. */

#define _DEFAULT_SOURCE
#include <stddef.h>
#include <stdint.h>

#include "../../csrc/api.h"
#include "check.h"

/* Returns the total number of bytes that pass; sets *found if there is a match. */
static size_t search_plainly(const uint8_t *text, size_t n, const uint8_t *bytes, const int32_t *lengths,
                             int32_t n_patterns, int *found)
{
    *found = 0;
    for (size_t end = 1; end <= n; end++) {
        size_t longest = 0;
        const uint8_t *pattern = bytes;
        for (int32_t i = 0; i < n_patterns; pattern += lengths[i++]) {
            size_t length = (size_t)lengths[i];
            if (length <= end && length > longest && memcmp(text + end - length, pattern, length) == 0)
                longest = length;
        }
        if (longest > 0) {
            *found = 1;
            return end - longest;
        }
    }
    size_t held = 0;
    const uint8_t *pattern = bytes;
    for (int32_t i = 0; i < n_patterns; pattern += lengths[i++])
        for (size_t k = 1; k < (size_t)lengths[i] && k <= n; k++)
            if (k > held && memcmp(text + n - k, pattern, k) == 0)
                held = k;
    return n - held;
}

static void check_stream(const uint8_t *bytes, const int32_t *lengths, int32_t n_patterns, const uint8_t *text,
                         size_t n, size_t piece)
{
    size_t n_bytes = 0, at = 0, left = 0;
    for (int32_t i = 0; i < n_patterns; i++)
        n_bytes += (size_t)lengths[i];
    size_t size = toai_stop_size(n_patterns, n_bytes);
    CHECK(size > 0, "%d patterns of %zu bytes refused", n_patterns, n_bytes);
    toai_stop *stop = calloc(1, size);
    struct guarded patterns = guard(bytes, n_bytes, 1);
    CHECK(toai_stop_init(stop, size, patterns.data, lengths, n_patterns) == TOAI_OK, "init");
    unguard(patterns); /* the matcher must not read them again */

    struct guarded window = guard(NULL, n, 0); /* each piece ends at its end */
    int matched = 0, found;
    while (at < n) {
        size_t take = piece == 0 || piece > n - at ? n - at : piece;
        uint8_t *bytes_fed = (uint8_t *)window.data + n - take;
        memcpy(bytes_fed, text + at, take);
        int64_t r = toai_stop_feed(stop, bytes_fed, take);
        at += take;
        if (r < 0) {
            left += (size_t)(-1 - r);
            matched = 1;
            CHECK(toai_stop_feed(stop, text, n < 5 ? n : 5) == -1, "bytes passed after the match");
            break;
        }
        left += (size_t)r;
    }
    size_t expected = search_plainly(text, n, bytes, lengths, n_patterns, &found);
    CHECK(found == matched, "match %d, not %d", matched, found);
    CHECK(left == expected, "%zu bytes left, not %zu, in pieces of %zu", left, expected, piece);
    unguard(window);
    free(stop);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    uint8_t bytes[4096], text[4096];
    int32_t lengths[64], n_patterns = 0;
    size_t n_bytes = 0, n_text = 0;

    if (n < 4)
        return 0;
    int32_t wanted = 1 + data[0] % 64;
    uint8_t letters = data[1]; /* a small alphabet makes patterns overlap */
    uint8_t longest = 1 + data[2] % 60;
    data += 3;
    n -= 3;
    while (n_patterns < wanted && n > 0) {
        size_t length = 1 + *data % longest;
        data++;
        n--;
        size_t i = 0;
        for (; i < length && n > 0 && n_bytes < sizeof bytes; i++, data++, n--)
            bytes[n_bytes++] = letters < 200 ? *data % (1 + letters % 4) : *data;
        if (i == 0)
            break;
        lengths[n_patterns++] = (int32_t)i;
    }
    for (; n > 0 && n_text < sizeof text; data++, n--)
        text[n_text++] = letters < 200 ? *data % (1 + letters % 4) : *data;
    if (n_patterns == 0)
        return 0;
    check_stream(bytes, lengths, n_patterns, text, n_text, 0);
    check_stream(bytes, lengths, n_patterns, text, n_text, 1);
    check_stream(bytes, lengths, n_patterns, text, n_text, 7);
    return 0;
}
