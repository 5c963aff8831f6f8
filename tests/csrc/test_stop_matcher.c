/* Tests the stop matcher: matches, bounds, and the number of steps that hostile patterns take. */

#define _DEFAULT_SOURCE
#include "../../csrc/stop_matcher.c"

#include "check.h"

static toai_stop *new_stop(const char *const *patterns, int32_t n_patterns)
{
    char bytes[65536];
    int32_t lengths[TOAI_MAX_PATTERNS];
    size_t n_bytes = 0;
    for (int32_t i = 0; i < n_patterns; i++) {
        lengths[i] = (int32_t)strlen(patterns[i]);
        memcpy(bytes + n_bytes, patterns[i], (size_t)lengths[i]);
        n_bytes += (size_t)lengths[i];
    }
    size_t size = toai_stop_size(n_patterns, n_bytes);
    toai_stop *stop = malloc(size);
    CHECK(toai_stop_init(stop, size, (const uint8_t *)bytes, lengths, n_patterns) == TOAI_OK, "init");
    return stop;
}

static int64_t feed(toai_stop *stop, const char *text)
{
    struct guarded g = guard(text, strlen(text), 1);
    int64_t r = toai_stop_feed(stop, g.data, strlen(text));
    unguard(g);
    return r;
}

static void test_matches(void)
{
    static const struct {
        const char *patterns[4];
        int32_t n_patterns;
        const char *text;
        int64_t result;
    } cases[] = {
        {{"STOP"}, 1, "and STOP now", -1 - 4},
        {{"STOP"}, 1, "and STO", 4},
        {{"STOP"}, 1, "STSTOP", -1 - 2},
        {{"STOP"}, 1, "", 0},
        {{"aab"}, 1, "aaab", -1 - 1},
        {{"abcd", "bc"}, 2, "abcd", -1 - 1},    /* ends first */
        {{"c", "bc", "abc"}, 3, "xabc", -1 - 1}, /* ends together: the longest */
        {{"abc", "abc"}, 2, "abc", -1 - 0},
        {{"abcde", "cdx"}, 2, "abcd", 0},
        {{"abcde", "cdx"}, 2, "abcdx", -1 - 2},
        {{"\n\nHuman:", "\n"}, 2, "a\nb", -1 - 1},
        {{"\xf0\x9f\x98\x80"}, 1, "x\xf0\x9f\x98", 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        toai_stop *stop = new_stop(cases[i].patterns, cases[i].n_patterns);
        int64_t r = feed(stop, cases[i].text);
        CHECK(r == cases[i].result, "case %zu gave %lld, not %lld", i, (long long)r, (long long)cases[i].result);
        if (r < 0)
            CHECK(feed(stop, cases[i].text) == -1, "case %zu did not stay at the match", i);
        free(stop);
    }
}

static void test_held_bytes_leave(void)
{
    const char *patterns[] = {"aaaa", "ab"};
    toai_stop *stop = new_stop(patterns, 2);
    CHECK(feed(stop, "xaaa") == 1, "x passes");
    CHECK(feed(stop, "c") == 4, "aaac passes");
    CHECK(feed(stop, "aa") == 0, "aa is held");
    CHECK(feed(stop, "b") == -1 - 1, "a passes before ab");
    free(stop);
}

static void test_bounds(void)
{
    CHECK(toai_stop_size(0, 0) == 0, "no patterns");
    CHECK(toai_stop_size(65, 65) == 0, "too many patterns");
    CHECK(toai_stop_size(2, 1) == 0, "an empty pattern");
    CHECK(toai_stop_size(1, 1025) == 0, "a pattern that is too long");
    uint8_t bytes[2048] = {0};
    int32_t lengths[2] = {1, 1024};
    size_t size = toai_stop_size(2, 1025);
    toai_stop *stop = malloc(size);
    CHECK(toai_stop_init(stop, size, bytes, lengths, 2) == TOAI_OK, "the largest pattern");
    CHECK(toai_stop_init(stop, size - 1, bytes, lengths, 2) == TOAI_E_ARG, "too little memory");
    CHECK(toai_stop_init(stop, size, bytes, lengths, 0) == TOAI_E_ARG, "no patterns");
    CHECK(toai_stop_init(stop, size, NULL, lengths, 2) == TOAI_E_ARG, "no bytes");
    lengths[0] = 0;
    CHECK(toai_stop_init(stop, size, bytes, lengths, 2) == TOAI_E_ARG, "an empty pattern");
    lengths[0] = 1025;
    CHECK(toai_stop_init(stop, size, bytes, lengths, 2) == TOAI_E_ARG, "a pattern that is too long");
    free(stop);
}

/* The largest automaton, whose patterns have the longest fail links, on a stream that follows and breaks them. */
static void test_hostile_patterns(void)
{
    static uint8_t bytes[64 * 1024], text[200000];
    int32_t lengths[64];
    for (int32_t i = 0; i < 64; i++) {
        lengths[i] = 1024;
        memset(bytes + i * 1024, 'a', 1024);
        bytes[i * 1024 + 1023 - i] = 'b';
    }
    size_t size = toai_stop_size(64, sizeof bytes);
    toai_stop *stop = malloc(size);
    CHECK(toai_stop_init(stop, size, bytes, lengths, 64) == TOAI_OK, "init");
    memset(text, 'a', sizeof text);
    for (size_t i = 900; i < sizeof text; i += 900)
        text[i] = 'c';
    size_t n_steps = 0;
    int64_t left = 0;
    for (size_t i = 0; i < sizeof text; i++) {
        for (int32_t state = stop->state; state >= 0 && child_of(stop, state, text[i]) < 0;
             state = stop->nodes[state].fail)
            n_steps++;
        int64_t r = toai_stop_feed(stop, text + i, 1);
        CHECK(r >= 0, "a match at %zu", i);
        left += r;
    }
    CHECK(n_steps <= sizeof text, "%zu steps back for %zu bytes", n_steps, sizeof text);
    CHECK(left + stop->nodes[stop->state].depth == (int64_t)sizeof text, "%lld bytes left", (long long)left);
    free(stop);
}

int main(void)
{
    test_matches();
    test_held_bytes_leave();
    test_bounds();
    test_hostile_patterns();
    return 0;
}
