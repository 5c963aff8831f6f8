/* Invariant: for any parameters, history, logits and mask, every return code is the documented one, the candidates
 * are those of the plain sampler in reference.h, the chosen token is one of them, both copies of the SIMD loops
 * agree, a mask gives the token that logits of -inf give, log-probabilities are right, and nothing outside the
 * sampler's memory is touched. */

#define _DEFAULT_SOURCE
#include <float.h>

#include "sampler.h"

#include "check.h"
#include "reference.h"

struct input {
    const uint8_t *data;
    size_t n;
};

static uint32_t take(struct input *in, int n_bytes)
{
    uint32_t value = 0;
    for (; n_bytes > 0; n_bytes--) {
        value = value << 8 | (in->n > 0 ? *in->data : 0);
        if (in->n > 0) {
            in->data++;
            in->n--;
        }
    }
    return value;
}

static float take_float(struct input *in)
{
    static const float special[] = {0,        -0.0f, 1,       -1,  FLT_MAX,  -FLT_MAX, FLT_MIN,
                                    1e-45f, 100,   -100, 88, -INFINITY, INFINITY, NAN,  20,       5};
    uint32_t kind = take(in, 1), bits;
    float x;
    if (kind < 16)
        return special[kind];
    if (kind < 128)
        return (float)(int32_t)(take(in, 2) - 32768) / 2048.0f;
    if (kind < 200)
        return (float)(int32_t)(kind - 164);
    bits = take(in, 4);
    memcpy(&x, &bits, sizeof x);
    return x;
}

static double take_share(struct input *in)
{
    uint32_t value = take(in, 2);
    return value < 100 ? 0 : value > 60000 ? 1 : value > 50000 ? (value - 50000) * 1e-6 : value / 50000.0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct input in = {data, n};
    toai_sampler_params p = {0};
    int32_t ids[40];
    float bias[40];

    p.n_vocab = 1 + (int32_t)(take(&in, 2) % (n % 16 == 0 ? 12000 : 300));
    p.n_ctx = 40;
    p.temperature = take(&in, 1) % 8 == 0 ? 0 : take(&in, 2) / 6553.6;
    p.top_k = (int32_t)(take(&in, 2) % 3 == 0 ? 0 : take(&in, 2) % 2000);
    p.top_p = take_share(&in);
    p.min_p = take(&in, 1) % 2 ? 0 : take_share(&in);
    p.repeat_penalty = take(&in, 1) % 2 ? 1 : 0.5f + (float)take(&in, 1) / 100;
    p.repeat_last_n = (int32_t)(take(&in, 1) % 50) - 1;
    p.presence_penalty = take(&in, 1) % 2 ? 0 : (float)take(&in, 1) / 60 - 2;
    p.frequency_penalty = take(&in, 1) % 2 ? 0 : (float)take(&in, 1) / 60 - 2;
    p.n_top = (int32_t)(take(&in, 1) % 22) - 1;
    p.seed = take(&in, 4);
    p.n_bias = (int32_t)(take(&in, 1) % 41);
    p.n_suppress = (int32_t)(take(&in, 1) % (uint32_t)(p.n_bias + 1));
    for (int32_t i = 0; i < p.n_bias; i++) {
        ids[i] = (int32_t)(take(&in, 2) % (uint32_t)p.n_vocab);
        bias[i] = take_float(&in);
        if (!isfinite(bias[i]))
            bias[i] = -100;
    }
    p.bias_id = p.suppress = ids;
    p.bias = bias;

    struct model m = new_model(&p, 60);
    for (uint32_t i = take(&in, 1) % 30; i > 0; i--)
        accept_in_all(&m, (int32_t)(take(&in, 2) % (uint32_t)p.n_vocab));

    /* Logits beyond the input repeat the input, or are noise, or 0. */
    float *x = calloc((size_t)p.n_vocab, sizeof *x);
    uint32_t fill = take(&in, 1) % 3;
    uint64_t random = 1 + take(&in, 4);
    int32_t given = 0;
    for (int32_t i = 0; i < p.n_vocab; i++) {
        if (in.n > 0) {
            x[i] = take_float(&in);
            given = i + 1;
        } else if (fill == 0 && given > 0) {
            x[i] = x[i % given];
        } else if (fill == 1) {
            x[i] = (float)(roll_unit(&random) * 20 - 10);
        }
    }
    uint64_t *allowed = new_mask(p.n_vocab, &random);
    for (int i = 0; i < 4; i++)
        if (check_step(&m, x, i % 2, i < 2 ? allowed : NULL) == TOAI_E_NONFINITE)
            break;
    free(allowed);
    free(x);
    free_model(&m);
    return 0;
}
