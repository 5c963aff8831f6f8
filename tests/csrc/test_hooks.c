/* Tests the hooks for libllama: the abort flag, the log from several threads, and the walk over a vocabulary. */

#define _DEFAULT_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#include "../../csrc/hooks.c"

#include "check.h"

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void test_abort(void)
{
    toai_abort asked = {0};
    CHECK(!toai_abort_asked(&asked), "nothing is asked");
    asked.asked = 1;
    CHECK(toai_abort_asked(&asked), "asked");
    asked.asked = 0;
    asked.deadline = now() + 100.0;
    CHECK(!toai_abort_asked(&asked), "the deadline is far");
    asked.deadline = now() - 0.001;
    CHECK(toai_abort_asked(&asked), "the deadline is over");
    asked.deadline = -1.0;
    CHECK(!toai_abort_asked(&asked), "a negative deadline is none");
    const double zero = 0.0;
    asked.deadline = zero / zero;
    CHECK(!toai_abort_asked(&asked), "a NaN is no deadline");
}

static void test_log_levels(void)
{
    struct guarded g = guard(NULL, sizeof(toai_log), 0);
    toai_log *log = g.data;
    memset(log, 0, sizeof *log);
    for (int level = -1; level < 8; level++)
        toai_log_append(level, "x", log);
    CHECK(log->used == 2 && !memcmp(log->text, "xx", 2), "only warnings and errors: %u", log->used);
    toai_log_append(4, NULL, log);
    toai_log_append(4, "x", NULL);
    CHECK(log->used == 2, "nothing");
    unguard(g);
}

static void test_log_is_cut_off(void)
{
    struct guarded g = guard(NULL, sizeof(toai_log), 0);
    toai_log *log = g.data;
    memset(log, 0, sizeof *log);
    static char text[3 * TOAI_LOG_BYTES];
    memset(text, 'a', sizeof text - 1);
    toai_log_append(4, "begin", log);
    toai_log_append(4, text, log);
    toai_log_append(4, text, log);
    CHECK(log->used >= TOAI_LOG_BYTES, "full");
    CHECK(!memcmp(log->text, "begina", 6) && log->text[TOAI_LOG_BYTES - 1] == 'a', "the first bytes stay");
    const uint32_t used = log->used;
    for (int i = 0; i < 1000; i++)
        toai_log_append(4, text, log);
    CHECK(log->used == used, "a full log does not count on, so that it never wraps");
    unguard(g);
}

static toai_log shared;

static void *append(void *letter)
{
    char text[8];
    memset(text, *(const char *)letter, 7);
    text[7] = 0;
    for (int i = 0; i < 70; i++)
        toai_log_append(3, text, &shared);
    return NULL;
}

static void test_log_from_threads(void)
{
    pthread_t threads[8];
    static char letters[] = "abcdefgh";
    for (int i = 0; i < 8; i++)
        CHECK(!pthread_create(&threads[i], NULL, append, &letters[i]), "thread");
    for (int i = 0; i < 8; i++)
        pthread_join(threads[i], NULL);
    CHECK(shared.used == 8 * 70 * 7, "all bytes: %u", shared.used);
    for (uint32_t i = 0; i < shared.used; i += 7)
        for (uint32_t j = 1; j < 7; j++)
            CHECK(shared.text[i] == shared.text[i + j], "a message is in one piece at %u", i);
}

enum { N_VOCAB = 100 };

static _Bool is_eog(const void *vocab, int32_t token)
{
    CHECK(vocab && token >= 0 && token < N_VOCAB, "token %d", token);
    return token == 7;
}

static int attr(const void *vocab, int32_t token)
{
    CHECK(vocab && token >= 0 && token < N_VOCAB, "token %d", token);
    switch (token) {
    case 7: return 1 << 3;
    case 8: return 1 << 4 | 1 << 7;
    case 9: return 1 << 5;
    case 10: return 1 << 3 | 1 << 8;
    default: return 1 << 2;
    }
}

static int32_t longest = 33;

static int32_t piece(const void *vocab, int32_t token, char *out, int32_t n_out, int32_t lstrip, _Bool special)
{
    CHECK(vocab && out && n_out == 0 && lstrip == 0 && special, "arguments");
    return token == 50 ? -longest : token == 51 ? 0 : -1;
}

static void test_scan(void)
{
    const toai_vocab_calls calls = {is_eog, attr, piece};
    const int vocab = 0;
    struct guarded g = guard(NULL, N_VOCAB, 0);
    uint8_t *kinds = g.data;
    CHECK(toai_scan_vocab(&calls, &vocab, N_VOCAB, kinds) == 33, "the longest piece");
    for (int i = 0; i < N_VOCAB; i++) {
        const int expected = i == 7    ? TOAI_KIND_EOG | TOAI_KIND_CONTROL
                             : i == 8  ? TOAI_KIND_USER | TOAI_KIND_LSTRIP
                             : i == 9  ? TOAI_KIND_BYTE
                             : i == 10 ? TOAI_KIND_CONTROL | TOAI_KIND_RSTRIP
                                       : 0;
        CHECK(kinds[i] == expected, "kind %d of token %d", kinds[i], i);
    }
    longest = INT32_MAX;
    CHECK(toai_scan_vocab(&calls, &vocab, N_VOCAB, kinds) == INT32_MAX, "no overflow");
    unguard(g);
}

static void test_scan_arguments(void)
{
    const toai_vocab_calls calls = {is_eog, attr, piece};
    const toai_vocab_calls lacking[] = {{NULL, attr, piece}, {is_eog, NULL, piece}, {is_eog, attr, NULL}};
    uint8_t kinds[N_VOCAB];
    const int vocab = 0;
    for (size_t i = 0; i < 3; i++)
        CHECK(toai_scan_vocab(&lacking[i], &vocab, N_VOCAB, kinds) == TOAI_E_ARG, "function %zu", i);
    CHECK(toai_scan_vocab(NULL, &vocab, N_VOCAB, kinds) == TOAI_E_ARG, "calls");
    CHECK(toai_scan_vocab(&calls, NULL, N_VOCAB, kinds) == TOAI_E_ARG, "vocab");
    CHECK(toai_scan_vocab(&calls, &vocab, N_VOCAB, NULL) == TOAI_E_ARG, "kinds");
    CHECK(toai_scan_vocab(&calls, &vocab, 0, kinds) == TOAI_E_ARG, "no tokens");
    CHECK(toai_scan_vocab(&calls, &vocab, -1, kinds) == TOAI_E_ARG, "negative");
    CHECK(toai_scan_vocab(&calls, &vocab, TOAI_MAX_VOCAB + 1, kinds) == TOAI_E_ARG, "too many");
}

int main(void)
{
    test_abort();
    test_log_levels();
    test_log_is_cut_off();
    test_log_from_threads();
    test_scan();
    test_scan_arguments();
    return 0;
}
