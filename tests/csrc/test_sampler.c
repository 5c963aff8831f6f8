/* Compares the sampler with the plain one in reference.h, at chosen sizes, shapes and parameters. */

#define _DEFAULT_SOURCE
#include <float.h>

#include "sampler.h"

#include "check.h"
#include "reference.h"

static toai_sampler_params defaults(int32_t n_vocab)
{
    return (toai_sampler_params){
        .n_vocab = n_vocab, .n_ctx = 64, .temperature = 1, .top_p = 1, .repeat_penalty = 1, .n_top = -1};
}

enum shape { NORMAL, PEAKED, RISING, EQUAL, FEW_VALUES, CLOSE, HUGE_SPREAD, SMALL, HOLES, N_SHAPES };

static float *new_logits(int32_t n, enum shape shape, uint64_t *random)
{
    float *x = malloc((size_t)n * sizeof *x);
    for (int32_t i = 0; i < n; i++) {
        double u = 0;
        for (int j = 0; j < 6; j++)
            u += roll_unit(random) - 0.5;
        switch (shape) {
        case NORMAL: x[i] = (float)(u * 1.4); break;
        case PEAKED: x[i] = (float)(u * 12); break;
        case RISING: x[i] = (float)i * 1e-4f; break;
        case EQUAL: x[i] = -3.25f; break;
        case FEW_VALUES: x[i] = (float)(int)(u * 2); break;
        case CLOSE: x[i] = 17.0f + (float)(roll(random) % 40000) * 0x1p-19f; break;
        case HUGE_SPREAD: x[i] = (float)(u * 1e38); break;
        case SMALL: x[i] = (float)(u * 1e-38 * roll_unit(random)); break;
        case HOLES: x[i] = roll(random) % 3 ? -INFINITY : (float)(u * 3); break;
        default: abort();
        }
    }
    if (shape == HOLES)
        x[roll(random) % (uint64_t)n] = 1.5f;
    return x;
}

static void test_shapes_and_parameters(void)
{
    static const int32_t sizes[] = {1, 2, 3, 63, 64, 65, 127, 128, 1000, 4160, 9001};
    static const int32_t ks[] = {0, 1, 2, 40, 63, 64, 500, 8999, 1000000};
    static const double ps[] = {0, 1e-9, 0.3, 0.95, 0.9999999, 1};
    static const double min_ps[] = {0, 0, 0.05, 1};
    static const double temperatures[] = {0, 1e-6, 0.02, 0.8, 1, 7, 100};
    uint64_t random = 7;
    for (size_t a = 0; a < sizeof sizes / sizeof *sizes; a++)
        for (int shape = 0; shape < N_SHAPES; shape++) {
            float *x = new_logits(sizes[a], (enum shape)shape, &random);
            for (int turn = 0; turn < 24; turn++) {
                toai_sampler_params p = defaults(sizes[a]);
                int32_t ids[4];
                float bias[4];
                p.top_k = ks[roll(&random) % 9];
                p.top_p = ps[roll(&random) % 6];
                p.min_p = min_ps[roll(&random) % 4];
                p.temperature = temperatures[roll(&random) % 7];
                p.n_top = (int32_t)(roll(&random) % 22) - 1;
                p.seed = roll(&random);
                if (turn % 3 == 0) {
                    static const float biases[] = {-100, -3, 2.5f, 100, 3e38f};
                    p.n_bias = p.n_suppress = 4;
                    for (int i = 0; i < 4; i++) {
                        ids[i] = (int32_t)(roll(&random) % (uint64_t)sizes[a]);
                        bias[i] = biases[roll(&random) % 5];
                    }
                    p.bias_id = p.suppress = ids;
                    p.bias = bias;
                    p.repeat_penalty = turn % 2 ? 1.3f : 1e-29f;
                    p.repeat_last_n = (int32_t)(roll(&random) % 20) - 1;
                    p.presence_penalty = 0.4f;
                    p.frequency_penalty = -0.25f;
                }
                struct model m = new_model(&p, 64);
                for (int i = 0; i < 10; i++)
                    accept_in_all(&m, (int32_t)(roll(&random) % (uint64_t)sizes[a]));
                uint64_t *allowed = new_mask(sizes[a], &random);
                for (int i = 0; i < 3; i++)
                    check_step(&m, x, i == 1, i == 2 ? allowed : NULL);
                free(allowed);
                free_model(&m);
            }
            free(x);
        }
}

/* The vocabularies of real models, from peaked to flat and with many ties: few candidates, more than the scratch holds,
 * and more in one bucket than it holds. */
static void test_large_vocabularies(void)
{
    static const int32_t sizes[] = {49152, 128256, 151936, 262144};
    static const struct {
        int32_t top_k;
        double top_p, min_p;
    } turns[] = {{0, 0.95, 0}, {0, 0.99999, 0}, {20, 0.95, 0}, {5000, 0.95, 0}, {40000, 0.5, 0}, {0, 1, 0.05}, {0, 1, 0}};
    uint64_t random = 11;
    for (int shape = 0; shape < N_SHAPES; shape++) {
        float *x = new_logits(262144, (enum shape)shape, &random);
        for (int turn = 0; turn < 7; turn++) {
            toai_sampler_params p = defaults(sizes[(turn + shape) % 4]);
            p.top_k = turns[turn].top_k;
            p.top_p = turns[turn].top_p;
            p.min_p = turns[turn].min_p;
            p.temperature = turn % 2 ? 1.5 : 0.8;
            p.n_top = turn == 0 ? 20 : -1;
            p.seed = roll(&random);
            p.repeat_penalty = 1.1f;
            p.repeat_last_n = 64;
            struct model m = new_model(&p, 64);
            for (int i = 0; i < 20; i++)
                accept_in_all(&m, (int32_t)(roll(&random) % (uint64_t)p.n_vocab));
            uint64_t *allowed = new_mask(p.n_vocab, &random);
            check_step(&m, x, 0, NULL);
            check_step(&m, x, 0, allowed);
            free(allowed);
            free_model(&m);
        }
        free(x);
    }
}

/* Logits of one bucket for which partition() takes the second worst rank as its pivot, so that it sets aside two. */
static void test_unlucky_pivots(void)
{
    enum { N = 4000 };
    static int32_t place[N];
    static float x[N];
    for (int32_t i = 0; i < N; i++)
        place[i] = i;
    for (int32_t n = N; n >= 3; n -= 2) { /* gives the two worst logits, and moves places as partition() moves ranks */
        int32_t worst = place[0], pivot = place[n / 2], n_better = 0;
        x[worst] = (float)(N - n) * 0x1p-20f;
        x[pivot] = (float)(N - n + 1) * 0x1p-20f;
        for (int32_t i = 0; i < n; i++) {
            int32_t moved = place[i];
            place[i] = place[n_better];
            place[n_better] = moved;
            n_better += moved != worst && moved != pivot;
        }
    }
    x[place[0]] = x[place[1]] = (float)N * 0x1p-20f;
    for (int turn = 0; turn < 3; turn++) {
        toai_sampler_params p = defaults(N);
        p.top_p = turn == 0 ? 0.01 : turn == 1 ? 0.5 : 0.9;
        struct model m = new_model(&p, 1);
        check_step(&m, x, 0, NULL);
        free_model(&m);
    }
}

/* Errors must not lean to one side: they would add up in the sum of many weights, and move the cut of top_p. */
static void test_weights(void)
{
    static const double temperatures[] = {0.1, 0.7, 1, 3};
    static const double depths[] = {0.1, 0.33, 3, 11, 17};
    uint64_t random = 5;
    for (int a = 0; a < 4; a++)
        for (int b = 0; b < 5; b++) {
            toai_sampler_params p = defaults(BLOCK);
            p.temperature = temperatures[a];
            toai_sampler *s = new_sampler(&p, TOAI_OK);
            struct softmax softmax = softmax_at(p.temperature, 20);
            double lean = 0, worst = 0;
            for (int turn = 0; turn < 2000; turn++) {
                float x[BLOCK], e[BLOCK];
                for (int i = 0; i < BLOCK; i++) { /* whole multiples of 2^-18, so that x - 20 is exact */
                    double depth = (depths[b] - 0.02 * roll_unit(&random)) * p.temperature;
                    x[i] = 20 - (float)(int)(depth * 0x1p18) * 0x1p-18f;
                }
                s->simd.softmax_block(x, &softmax, -FLT_MAX, e);
                for (int i = 0; i < BLOCK; i++) {
                    double error = (double)e[i] / exp(((double)x[i] - 20) / p.temperature) - 1;
                    lean += error / (2000 * BLOCK);
                    worst = fabs(error) > worst ? fabs(error) : worst;
                }
            }
            CHECK(worst < 2e-7 + depths[b] * 1.3e-7, "an error of %g at depth %g", worst, depths[b]);
            CHECK(fabs(lean) < 2e-8 + depths[b] * 1e-8, "errors lean by %g at depth %g / %g", lean, depths[b],
                  p.temperature);
            free(s);
        }
    float x[BLOCK] = {0}, e[BLOCK];
    toai_sampler_params p = defaults(BLOCK);
    toai_sampler *s = new_sampler(&p, TOAI_OK);
    for (int a = 0; a < 6; a++) { /* the bounds of a temperature among them */
        static const double all[] = {1e-5, 0.1, 0.7, 1, 3, 100};
        struct softmax softmax = softmax_at(all[a], 0);
        x[1] = -INFINITY;
        x[2] = -FLT_MAX;
        x[3] = (float)(-86.9 * all[a]);
        x[4] = (float)(-88.1 * all[a]);
        CHECK(s->simd.softmax_block(x, &softmax, -FLT_MAX, e) == 61 - 1 + e[3], "the sum at %g", all[a]);
        CHECK(e[0] == 1 && e[1] == 0 && e[2] == 0 && e[3] > 0 && e[4] == 0, "%g %g %g %g %g at %g", (double)e[0],
              (double)e[1], (double)e[2], (double)e[3], (double)e[4], all[a]);
    }
    free(s);
}

static void test_rare_tokens_come(void)
{
    toai_sampler_params p = defaults(2 * BLOCK);
    float x[2 * BLOCK];
    for (int i = 0; i < 2 * BLOCK; i++)
        x[i] = -INFINITY;
    x[0] = 0;
    x[BLOCK] = -10.5f;
    toai_sampler *s = new_sampler(&p, TOAI_OK);
    int n = 0;
    for (int i = 0; i < 600000; i++)
        n += toai_sampler_sample(s, x, 0, NULL) == BLOCK;
    CHECK(n > 2 && n < 40, "%d times, where 16 were expected", n);
    free(s);
}

static void test_ties_enter_by_id(void)
{
    uint64_t random = 1;
    float *x = new_logits(100000, EQUAL, &random);
    toai_sampler_params p = defaults(100000);
    p.top_p = 0.25;
    toai_sampler *s = new_sampler(&p, TOAI_OK);
    CHECK(toai_sampler_sample(s, x, 0, NULL) < 25000, "top_p of equal logits");
    CHECK(s->result.cut_id == 24999, "cut at %d", s->result.cut_id);
    free(s);
    p.top_p = 1;
    p.top_k = 7777;
    s = new_sampler(&p, TOAI_OK);
    CHECK(toai_sampler_sample(s, x, 0, NULL) < 7777, "top_k of equal logits");
    CHECK(s->result.cut_id == 7776, "cut at %d", s->result.cut_id);
    free(s);
    free(x);
}

/* -0 and 0 are equal but neighbours as keys. Here a part of a split range ends exactly at the key of -0, and many
 * zeros just above it are outside of it. */
static void test_a_range_that_ends_at_minus_zero(void)
{
    enum { N = 20000 };
    float *x = malloc(N * sizeof *x);
    for (int32_t i = 0; i < N; i++)
        x[i] = i % 4 == 0 ? 0.0f : i % 4 == 1 ? -0.0f : -0x1p-149f * (float)(1 + i % 8000);
    x[777] = 0x1p-149f * 0x1fffff;
    x[778] = -x[777];
    for (int32_t k = 5000; k < N; k += 2500) {
        toai_sampler_params p = defaults(N);
        p.top_k = k;
        struct model m = new_model(&p, 1);
        check_step(&m, x, 0, NULL);
        free_model(&m);
    }
    free(x);
}

static void test_unsound_logits_anywhere(void)
{
    static const float unsound[] = {NAN, INFINITY};
    float x[131];
    toai_sampler_params p = defaults(131);
    int32_t banned = 77;
    float bias = -100;
    p.n_bias = 1;
    p.bias_id = &banned;
    p.bias = &bias;
    toai_sampler *s = new_sampler(&p, TOAI_OK);
    for (int32_t i = 0; i < 131; i++)
        for (int j = 0; j < 2; j++) {
            for (int32_t k = 0; k < 131; k++)
                x[k] = (float)k;
            x[i] = unsound[j];
            int32_t id = toai_sampler_sample(s, x, 0, NULL);
            CHECK(id == TOAI_E_NONFINITE, "%g at %d gave %d", (double)unsound[j], i, id);
        }
    for (int32_t k = 0; k < 131; k++)
        x[k] = -INFINITY;
    CHECK(toai_sampler_sample(s, x, 0, NULL) == TOAI_E_NONFINITE, "no finite logit");
    x[banned] = 1;
    CHECK(toai_sampler_sample(s, x, 0, NULL) == TOAI_E_BANNED, "the only finite one is banned");
    x[130] = -1000;
    CHECK(toai_sampler_sample(s, x, 0, NULL) == 130, "the only one left");
    free(s);
}

static void test_masks(void)
{
    toai_sampler_params p = defaults(131);
    float x[131];
    uint64_t allowed[4] = {0};
    for (int32_t i = 0; i < 131; i++)
        x[i] = (float)i;
    p.temperature = 0;
    p.n_top = 2;
    toai_sampler *s = new_sampler(&p, TOAI_OK);
    CHECK(toai_sampler_sample(s, x, 0, allowed) == TOAI_E_BANNED, "nothing is allowed");
    allowed[2] = ~(uint64_t)7; /* only bits past n_vocab */
    CHECK(toai_sampler_sample(s, x, 0, allowed) == TOAI_E_BANNED, "only bits past the end");
    allowed[0] = 1u << 5 | 1u << 3;
    CHECK(toai_sampler_sample(s, x, 0, allowed) == 5, "the better one of two");
    CHECK(s->result.top_id[0] == 130 && s->result.top_id[1] == 129, "top tokens of the raw logits");
    CHECK(fabs(s->result.logprob - s->result.top_logprob[0] + 125) < 1e-5, "a raw log-probability");
    x[5] = -INFINITY;
    CHECK(toai_sampler_sample(s, x, 0, allowed) == 3, "the only finite one of two");
    allowed[2] |= 4;
    CHECK(toai_sampler_sample(s, x, 0, allowed) == 130, "the last token");
    CHECK(toai_sampler_sample(s, x, 0, NULL) == 130, "no mask");
    x[64] = NAN;
    CHECK(toai_sampler_sample(s, x, 0, allowed) == TOAI_E_NONFINITE, "a NaN at a masked token");
    x[64] = 0;
    uint64_t before = s->random;
    CHECK(toai_sampler_sample(s, x, 0, (uint64_t *)((char *)allowed + 4)) == TOAI_E_ARG, "a misaligned mask");
    CHECK(toai_sampler_sample(s, (float *)((char *)x + 2), 0, NULL) == TOAI_E_ARG, "misaligned logits");
    CHECK(s->random == before, "a refused call changed the random state");
    free(s);
}

static void test_bounds(void)
{
    toai_sampler_params good = defaults(100), p;
#define REFUSED(change)                                                                                        \
    p = good;                                                                                                  \
    p.change;                                                                                                  \
    CHECK(toai_sampler_size(&p) == 0, "accepted " #change)
    CHECK(toai_sampler_size(&good) > 0, "refused the defaults");
    CHECK(toai_sampler_size(NULL) == 0, "accepted NULL");
    REFUSED(n_vocab = 0);
    REFUSED(n_vocab = TOAI_MAX_VOCAB + 1);
    REFUSED(n_ctx = 0);
    REFUSED(n_ctx = TOAI_MAX_CTX + 1);
    REFUSED(temperature = -0.1);
    REFUSED(temperature = NAN);
    REFUSED(temperature = 101);
    REFUSED(top_p = 1.01);
    REFUSED(top_p = NAN);
    REFUSED(min_p = -1);
    REFUSED(repeat_penalty = 0);
    REFUSED(repeat_penalty = NAN);
    REFUSED(presence_penalty = INFINITY);
    REFUSED(frequency_penalty = -2000);
    REFUSED(n_top = -2);
    REFUSED(n_top = TOAI_MAX_TOP + 1);
    REFUSED(n_bias = -1);
    REFUSED(n_bias = 1);
    REFUSED(n_suppress = 1);
#undef REFUSED
    size_t size = toai_sampler_size(&good);
    char *memory = calloc(1, size + 8);
    CHECK(toai_sampler_init((toai_sampler *)memory, size - 1, &good) == TOAI_E_ARG, "too little memory");
    CHECK(toai_sampler_init(NULL, size, &good) == TOAI_E_ARG, "no memory");
    CHECK(toai_sampler_init((toai_sampler *)memory, size, NULL) == TOAI_E_ARG, "no parameters");
    free(memory);

    int32_t ids[2] = {3, 100};
    float bias[2] = {1, 1};
    p = good;
    p.n_bias = 2;
    p.bias_id = ids;
    p.bias = bias;
    free(new_sampler(&p, TOAI_E_TOKEN));
    ids[1] = -1;
    free(new_sampler(&p, TOAI_E_TOKEN));
    ids[1] = 3;
    bias[1] = NAN;
    free(new_sampler(&p, TOAI_E_ARG));
    p = good;
    ids[1] = 100;
    p.n_suppress = 2;
    p.suppress = ids;
    free(new_sampler(&p, TOAI_E_TOKEN));

    toai_sampler *s = new_sampler(&good, TOAI_OK);
    float x[100] = {0};
    CHECK(toai_sampler_sample(s, NULL, 0, NULL) == TOAI_E_ARG, "no logits");
    CHECK(toai_sampler_accept(s, NULL, 1) == TOAI_E_ARG, "no tokens");
    CHECK(toai_sampler_accept(s, ids, 2) == TOAI_E_TOKEN, "a token that is too large");
    CHECK(toai_sampler_score(s, x, 0) == TOAI_E_ARG, "score without log-probabilities");
    free(s);
    good.n_top = 0;
    s = new_sampler(&good, TOAI_OK);
    CHECK(toai_sampler_score(s, x, 100) == TOAI_E_TOKEN, "score of a token that is too large");
    CHECK(toai_sampler_score(s, x, -1) == TOAI_E_TOKEN, "score of a negative token");
    CHECK(toai_sampler_score(s, x, 99) == TOAI_OK, "score");
    CHECK(fabs(s->result.logprob + log(100)) < 1e-6, "score gave %g", s->result.logprob);
    free(s);
}

static void test_history_is_bounded(void)
{
    toai_sampler_params p = defaults(1000);
    float x[1000] = {0};
    p.n_ctx = 50;
    p.presence_penalty = 1000; /* no token comes twice */
    toai_sampler *s = new_sampler(&p, TOAI_OK);
    for (int i = 0; i < 50; i++)
        CHECK(toai_sampler_sample(s, x, 0, NULL) >= 0, "token %d", i);
    uint64_t random = s->random;
    CHECK(toai_sampler_sample(s, x, 0, NULL) == TOAI_E_FULL, "51 distinct tokens of 50");
    CHECK(s->random == random && s->n_entries == 50, "a refused call changed the sampler");
    free(s);

    p.presence_penalty = 0;
    p.repeat_penalty = 1.5f;
    p.repeat_last_n = 7;
    s = new_sampler(&p, TOAI_OK);
    for (int32_t i = 0; i < 5000; i++) {
        int32_t token = i * 37 % 1000;
        CHECK(toai_sampler_accept(s, &token, 1) == TOAI_OK, "token %d", i);
        CHECK(s->n_entries <= 7, "%d entries for a window of 7", s->n_entries);
    }
    free(s);
}

/* A prompt in one call leaves the history that its tokens leave one by one. */
static void test_prompt_in_one_call(void)
{
    static const int32_t counts[] = {0, 1, 2, 7, 8, 63, 300, 4096, 4097, 9000};
    static const int32_t windows[] = {-1, 1, 7, 64, 5000};
    static int32_t tokens[9000];
    uint64_t random = 3;
    for (int turn = 0; turn < 200; turn++) {
        int32_t n_vocab = turn % 2 ? 90 : 50000, n = counts[turn % 10], ids[3] = {1, 40, 89};
        float bias[3] = {1, -100, 0};
        toai_sampler_params p = defaults(n_vocab);
        p.n_ctx = 9000;
        p.repeat_penalty = 1.2f;
        p.repeat_last_n = windows[turn / 10 % 5];
        p.presence_penalty = 0.1f;
        p.n_bias = p.n_suppress = turn % 3 ? 3 : 0;
        p.bias_id = p.suppress = ids;
        p.bias = bias;
        toai_sampler *whole = new_sampler(&p, TOAI_OK), *parts = new_sampler(&p, TOAI_OK);
        for (int32_t i = 0; i < n; i++)
            tokens[i] = (int32_t)(roll(&random) % (uint64_t)n_vocab);
        for (int again = 0; again < 2; again++) { /* the second time the window is not empty */
            CHECK(toai_sampler_accept(whole, n > 0 ? tokens : NULL, n) == TOAI_OK, "%d tokens", n);
            for (int32_t i = 0; i < n; i++)
                CHECK(toai_sampler_accept(parts, tokens + i, 1) == TOAI_OK, "token %d", i);
            CHECK(whole->n_entries == parts->n_entries, "%d entries, not %d", whole->n_entries, parts->n_entries);
            CHECK(memcmp(whole->entries, parts->entries, (size_t)parts->n_entries * sizeof *parts->entries) == 0,
                  "entries of %d tokens, window %d", n, p.repeat_last_n);
            CHECK(whole->n_accepted == parts->n_accepted, "%d accepted", whole->n_accepted);
            for (int32_t i = 0; i < parts->n_accepted; i++) { /* from the oldest: it may lie elsewhere in the ring */
                int32_t at = whole->n_accepted == whole->n_window ? (whole->window_at + i) % whole->n_window : i;
                int32_t other = parts->n_accepted == parts->n_window ? (parts->window_at + i) % parts->n_window : i;
                CHECK(whole->window[at] == parts->window[other], "place %d of the window", i);
            }
        }
        tokens[0] = n_vocab;
        int32_t n_entries = whole->n_entries;
        CHECK(toai_sampler_accept(whole, tokens, 2) == TOAI_E_TOKEN && whole->n_entries == n_entries, "a bad token");
        free(whole);
        free(parts);
    }
}

static void test_seeds(void)
{
    toai_sampler_params p = defaults(500);
    float x[500] = {0};
    int n_equal = 0;
    for (uint64_t seed = 0; seed < 50; seed++) {
        p.seed = seed;
        toai_sampler *a = new_sampler(&p, TOAI_OK), *b = new_sampler(&p, TOAI_OK);
        p.seed = seed + 1;
        toai_sampler *c = new_sampler(&p, TOAI_OK);
        for (int i = 0; i < 20; i++) {
            int32_t id = toai_sampler_sample(a, x, 0, NULL);
            CHECK(id == toai_sampler_sample(b, x, 0, NULL), "seed %d is not repeatable", (int)seed);
            n_equal += id == toai_sampler_sample(c, x, 0, NULL);
        }
        free(a);
        free(b);
        free(c);
    }
    CHECK(n_equal < 20, "neighbouring seeds agree %d times in 1000 draws of 500", n_equal);
}

/* softmax_block() for one logit; test_copies_agree() checks the sum. */
static float plain_weight(float v, const struct softmax *softmax, float low)
{
    union {
        float f;
        uint32_t i;
    } shifted, power;
    float d = v - softmax->top;
    d = d > softmax->farthest ? d : softmax->farthest;
    float z = d * softmax->rate;
    shifted.f = z + 12583039.0f;
    float f = (z - (shifted.f - 12583039.0f)) + d * softmax->rate_rest;
    float f2 = f * f;
    float p = f2 * 0x1.416b60p-13f + (f * 0x1.5f082ep-10f + 0x1.3b2de0p-7f);
    p = p * f2 + (f * 0x1.c6af7cp-5f + 0x1.ebfbdcp-3f);
    p = p * f2 + (f * 0x1.62e430p-1f + 1.0f);
    power.i = shifted.i << 23;
    return v >= low ? p * power.f : 0.0f;
}

/* Every copy of the loops that this machine can run gives the same bits as plain loops: a seed gives the same ids on
 * every machine. */
static void test_copies_agree(void)
{
    static const struct {
        const char *name;
        const struct simd *simd;
    } copies[] = {
        {"any", &simd_any},
#ifdef HAVE_AVX2_COPY
        {"avx2", &simd_avx2},
#endif
    };
    size_t n_copies = sizeof copies / sizeof *copies;
#ifdef HAVE_AVX2_COPY
    if (!__builtin_cpu_supports("avx2"))
        n_copies = 1;
#endif
    enum { N_BLOCKS = 3 };
    uint64_t random = 11;
    for (int turn = 0; turn < 400; turn++) {
        float *x = new_logits(N_BLOCKS * BLOCK, (enum shape)(turn % N_SHAPES), &random);
        if (turn % 5 == 0)
            x[roll(&random) % (N_BLOCKS * BLOCK)] = roll(&random) % 2 ? INFINITY : NAN;
        float best[N_BLOCKS];
        int sound = 1;
        for (int b = 0; b < N_BLOCKS; b++) {
            best[b] = -INFINITY;
            for (int i = 0; i < BLOCK; i++) {
                float v = x[b * BLOCK + i];
                sound &= v < INFINITY;
                best[b] = v > best[b] ? v : best[b];
            }
        }
        float top = best[0], low = turn % 2 ? x[roll(&random) % BLOCK] : -INFINITY;
        struct softmax softmax = softmax_at(0.3 + roll_unit(&random), top);
        float per_unit = top - best[1] > 0 ? 100 / (top - best[1]) : 50;
        for (size_t copy = 0; copy < n_copies; copy++) {
            const char *name = copies[copy].name;
            struct simd simd = *copies[copy].simd;
            float found[N_BLOCKS];
            CHECK(simd.scan(x, N_BLOCKS, found) == sound, "%s: turn %d", name, turn);
            if (!sound)
                continue;
            for (int b = 0; b < N_BLOCKS; b++)
                CHECK(found[b] == best[b], "%s: turn %d, block %d", name, turn, b);
            uint64_t bits = simd.at_least(x, low);
            for (int i = 0; i < BLOCK; i++)
                CHECK((bits >> i & 1) == (x[i] >= low), "%s: turn %d, bit %d", name, turn, i);
            float e[BLOCK], lane[8] = {0};
            float sum = simd.softmax_block(x, &softmax, low, e);
            for (int i = 0; i < BLOCK; i++) {
                float plain = plain_weight(x[i], &softmax, low);
                CHECK(memcmp(&e[i], &plain, sizeof plain) == 0, "%s: turn %d, weight %d: %a and %a", name,
                      turn, i, (double)e[i], (double)plain);
                lane[i % 8] += plain;
            }
            float total =
                ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
            CHECK(memcmp(&sum, &total, sizeof total) == 0, "%s: turn %d: %a and %a", name, turn,
                  (double)sum, (double)total);
            int32_t index[BLOCK];
            simd.buckets(x, top, per_unit, index);
            for (int i = 0; i < BLOCK; i++)
                CHECK(index[i] == bucket_of(x[i], top, per_unit), "%s: turn %d, bucket %d", name, turn, i);
            uint64_t allowed = roll(&random);
            float masked[BLOCK];
            memcpy(masked, x, sizeof masked);
            simd.mask(masked, allowed);
            for (int i = 0; i < BLOCK; i++)
                CHECK(allowed >> i & 1 ? memcmp(masked + i, x + i, sizeof *x) == 0 : masked[i] == -INFINITY,
                      "%s: turn %d, masked %d", name, turn, i);
        }
        free(x);
    }
}

int main(void)
{
    test_copies_agree();
    test_shapes_and_parameters();
    test_large_vocabularies();
    test_unlucky_pivots();
    test_weights();
    test_rare_tokens_come();
    test_ties_enter_by_id();
    test_a_range_that_ends_at_minus_zero();
    test_unsound_logits_anywhere();
    test_masks();
    test_bounds();
    test_history_is_bounded();
    test_prompt_in_one_call();
    test_seeds();
    return 0;
}
