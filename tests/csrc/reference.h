/* A plain version of the sampler: adjusts, sorts and sums the whole vocabulary in doubles. Include it after sampler.h
 * and check.h. check_step() samples once with both and compares everything. */

/* The sampler's weights are floats. A rounded difference, a rounded product and the series have a relative error of
 * up to about |z| * 1.2e-7 + 2e-7, and |z| is at most 13 where 262,144 tokens still matter. So a cut by mass may be
 * anywhere within this relative distance of the exact one. */
#define MASS_SLACK 4e-6

struct model {
    toai_sampler_params params;
    toai_sampler *sampler;  /* as built */
    toai_sampler *portable; /* with the loops for any machine */
    toai_sampler *unmasked; /* gets logits of -inf instead of a mask; no log-probabilities */
    size_t size;
    float *bias;
    char *suppress;
    int32_t *n_generated, *history;
    int32_t n_history;
    float *x; /* adjusted logits */
    uint64_t *order;
};

static toai_sampler *new_sampler(const toai_sampler_params *params, int32_t expected)
{
    size_t size = toai_sampler_size(params);
    CHECK(size > 0, "parameters refused");
    toai_sampler *sampler = calloc(1, size);
    CHECK(sampler != NULL, "out of memory");
    int32_t code = toai_sampler_init(sampler, size, params);
    CHECK(code == expected, "init gave %d", code);
    return sampler;
}

static struct model new_model(const toai_sampler_params *params, int32_t max_history)
{
    size_t n = (size_t)params->n_vocab;
    struct model m = {.params = *params, .size = toai_sampler_size(params)};
    m.sampler = new_sampler(params, TOAI_OK);
    m.portable = new_sampler(params, TOAI_OK);
    m.portable->simd = simd_any;
    toai_sampler_params no_top = *params;
    no_top.n_top = -1;
    m.unmasked = new_sampler(&no_top, TOAI_OK);
    m.bias = calloc(n, sizeof *m.bias);
    m.suppress = calloc(n, 1);
    m.n_generated = calloc(n, sizeof *m.n_generated);
    m.history = calloc((size_t)max_history + 1, sizeof *m.history);
    m.x = calloc(n, sizeof *m.x);
    m.order = calloc(n, sizeof *m.order);
    for (int32_t i = 0; i < params->n_bias; i++)
        m.bias[params->bias_id[i]] = params->bias[i];
    for (int32_t i = 0; i < params->n_suppress; i++)
        m.suppress[params->suppress[i]] = 1;
    return m;
}

static void free_model(struct model *m)
{
    free(m->sampler);
    free(m->portable);
    free(m->unmasked);
    free(m->bias);
    free(m->suppress);
    free(m->n_generated);
    free(m->history);
    free(m->x);
    free(m->order);
}

static int by_rank(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

static void accept_in_all(struct model *m, int32_t token)
{
    CHECK(toai_sampler_accept(m->sampler, &token, 1) == TOAI_OK, "accept %d", token);
    CHECK(toai_sampler_accept(m->portable, &token, 1) == TOAI_OK, "accept %d", token);
    CHECK(toai_sampler_accept(m->unmasked, &token, 1) == TOAI_OK, "accept %d", token);
    m->history[m->n_history++] = token;
}

static int is_allowed(const uint64_t *allowed, int32_t id)
{
    return allowed == NULL || (allowed[id / 64] >> id % 64 & 1);
}

/* A random mask: of all tokens, of few, of one, of none, or of whole words. */
static uint64_t *new_mask(int32_t n_vocab, uint64_t *random)
{
    int32_t n = (n_vocab + 63) / 64;
    uint64_t *allowed = malloc((size_t)n * sizeof *allowed);
    uint64_t kind = roll(random) % 7;
    for (int32_t i = 0; i < n; i++) {
        uint64_t some = roll(random), few = some & roll(random) & roll(random) & roll(random);
        switch (kind) {
        case 0: allowed[i] = UINT64_MAX; break;
        case 1: allowed[i] = some; break;
        case 2: allowed[i] = few; break;
        case 3: allowed[i] = roll(random) % 4 ? 0 : some | few; break;
        case 4: allowed[i] = some % 3 == 0 ? 0 : some % 3 == 1 ? UINT64_MAX : some; break;
        case 5: allowed[i] = 0; break;
        default: allowed[i] = ~few; break;
        }
    }
    if (kind == 5) {
        int32_t id = (int32_t)(roll(random) % (2 * (uint64_t)n_vocab));
        if (id < n_vocab)
            allowed[id / 64] |= (uint64_t)1 << id % 64;
    }
    return allowed;
}

/* Sets m->x to the adjusted logits, and m->order to the ranks of all tokens, the best first. */
static void adjust_plainly(struct model *m, const float *logits, int suppress, const uint64_t *allowed)
{
    const toai_sampler_params *p = &m->params;
    int32_t last_n = p->repeat_last_n < 0 || p->repeat_last_n > p->n_ctx ? p->n_ctx : p->repeat_last_n;
    char *recent = calloc((size_t)p->n_vocab, 1);
    for (int32_t i = m->n_history; i > 0 && i > m->n_history - last_n; i--)
        recent[m->history[i - 1]] = 1;
    for (int32_t i = 0; i < p->n_vocab; i++) {
        float x = logits[i] + m->bias[i];
        if (m->bias[i] <= -100 || (suppress && m->suppress[i]))
            x = -INFINITY;
        if (recent[i])
            x = x > 0 ? x / p->repeat_penalty : x * p->repeat_penalty;
        if (m->n_generated[i] > 0)
            x -= p->presence_penalty + p->frequency_penalty * (float)m->n_generated[i];
        m->x[i] = !is_allowed(allowed, i) ? -INFINITY : x > FLT_MAX ? FLT_MAX : x;
        m->order[i] = rank(m->x[i], i);
    }
    free(recent);
    qsort(m->order, (size_t)p->n_vocab, sizeof *m->order, by_rank);
}

static double weight_of(const struct model *m, uint64_t ranked, float top)
{
    return exp(((double)cut_of(ranked).x - (double)top) / m->params.temperature);
}

/* Sets the smallest and the largest correct number of candidates. */
static void count_plainly(const struct model *m, int32_t *least, int32_t *most)
{
    const toai_sampler_params *p = &m->params;
    float top = cut_of(m->order[0]).x;
    int32_t n = 0;
    while (n < p->n_vocab && cut_of(m->order[n]).x > -INFINITY && (p->top_k <= 0 || n < p->top_k))
        n++;
    *least = *most = n;
    if (p->top_p < 1) {
        double total = 0, reached = 0;
        int32_t i = 0;
        for (i = 0; i < n; i++)
            total += weight_of(m, m->order[i], top);
        for (i = 0; i < n && (i == 0 || reached < (p->top_p - MASS_SLACK) * total); i++)
            reached += weight_of(m, m->order[i], top);
        *least = i;
        for (; i < n && reached < (p->top_p + MASS_SLACK) * total; i++)
            reached += weight_of(m, m->order[i], top);
        *most = i;
    }
    if (p->min_p > 0) {
        int32_t low = 0, high = 0;
        while (high < n && weight_of(m, m->order[high], top) >= p->min_p * (1 - 1e-9))
            high++;
        while (low < high && (low == 0 || weight_of(m, m->order[low], top) >= p->min_p * (1 + 1e-9)))
            low++;
        *least = low < *least ? low : *least;
        *most = high < *most ? high : *most;
    }
}

static void check_logprobs(const struct model *m, const float *logits, int32_t id, int32_t n_finite, double slack)
{
    const toai_sampler_result *result = toai_sampler_get_result(m->sampler);
    const int32_t n_vocab = m->params.n_vocab;
    uint64_t *order = calloc((size_t)n_vocab, sizeof *order);
    double total = 0;
    for (int32_t i = 0; i < n_vocab; i++)
        order[i] = rank(logits[i], i);
    qsort(order, (size_t)n_vocab, sizeof *order, by_rank);
    double top = (double)cut_of(order[0]).x;
    for (int32_t i = n_vocab - 1; i >= 0; i--)
        total += exp((double)cut_of(order[i]).x - top);
    double logprob = (double)logits[id] - top - log(total);
    CHECK(logprob == result->logprob || fabs(logprob - result->logprob) <= slack, "token %d: %.9f, not %.9f", id,
          result->logprob, logprob);
    int32_t n_top = m->params.n_top < n_finite ? m->params.n_top : n_finite;
    CHECK(result->n_top == n_top, "%d top tokens, not %d", result->n_top, n_top);
    for (int32_t i = 0; i < n_top; i++) {
        struct cut one = cut_of(order[i]);
        CHECK(result->top_id[i] == one.id, "top %d is %d, not %d", i, result->top_id[i], one.id);
        CHECK(fabs((double)one.x - top - log(total) - result->top_logprob[i]) <= slack, "top %d: %.9f", i,
              result->top_logprob[i]);
    }
    free(order);
}

/* Samples with logits of -inf where the mask has no bit. */
static int32_t sample_unmasked(struct model *m, const float *logits, int suppress, const uint64_t *allowed)
{
    float *x = calloc((size_t)m->params.n_vocab, sizeof *x);
    for (int32_t i = 0; i < m->params.n_vocab; i++)
        x[i] = is_allowed(allowed, i) ? logits[i] : -INFINITY;
    int32_t id = toai_sampler_sample(m->unmasked, x, suppress, NULL);
    free(x);
    return id;
}

/* Checks that `id` is the token that the random state `random` draws from the candidates up to `cut`, in order of id.
 * The sampler's rounding may move the bounds of a token by MASS_SLACK of the whole. */
static void check_draw(const struct model *m, uint64_t random, uint64_t cut, int32_t id)
{
    float top = cut_of(m->order[0]).x;
    double total = 0, before = 0;
    for (int32_t i = 0; i < m->params.n_vocab; i++) {
        uint64_t ranked = rank(m->x[i], i);
        if (i == id)
            before = total;
        if (ranked >= cut && m->x[i] > -INFINITY)
            total += weight_of(m, ranked, top);
    }
    uint64_t z = random + 0x9e3779b97f4a7c15u; /* splitmix64 */
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    double aim = total * (double)(z >> 11) * 0x1p-53, after = before + weight_of(m, rank(m->x[id], id), top);
    CHECK(before - MASS_SLACK * total <= aim && aim <= after + MASS_SLACK * total,
          "token %d has %.9g to %.9g of %.9g, which %.9g is not in", id, before, after, total, aim);
}

/* Samples once and checks the result. Returns what the sampler returned. */
static int32_t check_step(struct model *m, const float *logits, int suppress, const uint64_t *allowed)
{
    const toai_sampler_params *p = &m->params;
    const toai_sampler_result *result = toai_sampler_get_result(m->sampler);
    struct guarded g = guard(logits, (size_t)p->n_vocab * sizeof *logits, 1);
    int32_t n_finite = 0, n_unsound = 0, least, most;
    for (int32_t i = 0; i < p->n_vocab; i++) {
        n_finite += isfinite(logits[i]) != 0;
        n_unsound += isnan(logits[i]) || logits[i] == INFINITY;
    }
    size_t n_words = ((size_t)p->n_vocab + 63) / 64;
    struct guarded mask = guard(allowed, n_words * sizeof *allowed, 1);
    const uint64_t *words = allowed == NULL ? NULL : mask.data;
    uint64_t random = m->sampler->random;
    int32_t id = toai_sampler_sample(m->sampler, g.data, suppress, words);
    int32_t portable_id = toai_sampler_sample(m->portable, g.data, suppress, words);
    CHECK(id == portable_id, "the portable loops gave %d, not %d", portable_id, id);
    unguard(mask);
    if (n_unsound > 0 || n_finite == 0) {
        CHECK(id == TOAI_E_NONFINITE, "gave %d for unsound logits", id);
        unguard(g);
        return id;
    }
    int32_t unmasked_id = sample_unmasked(m, logits, suppress, allowed);
    if (unmasked_id == TOAI_E_NONFINITE && allowed != NULL)
        unmasked_id = TOAI_E_BANNED; /* -inf everywhere */
    CHECK(id == unmasked_id, "gave %d with a mask, %d with logits of -inf", id, unmasked_id);
    adjust_plainly(m, logits, suppress, allowed);
    if (cut_of(m->order[0]).x == -INFINITY) {
        CHECK(id == TOAI_E_BANNED, "gave %d though all are banned", id);
        unguard(g);
        return id;
    }
    CHECK(id >= 0 && id < p->n_vocab, "gave %d", id);
    if (p->temperature < 1e-5) {
        CHECK(id == cut_of(m->order[0]).id, "greedy took %d, not %d", id, cut_of(m->order[0]).id);
    } else {
        uint64_t cut = rank(result->cut_logit, result->cut_id);
        int32_t n = 0;
        while (n < p->n_vocab && m->order[n] >= cut && cut_of(m->order[n]).x > -INFINITY)
            n++;
        count_plainly(m, &least, &most);
        CHECK(least <= n && n <= most, "%d candidates, not %d to %d", n, least, most);
        CHECK(rank(m->x[id], id) >= cut, "token %d is no candidate", id);
        CHECK(m->x[id] > -INFINITY, "token %d is banned", id);
        check_draw(m, random, cut, id);
    }
    if (p->n_top >= 0) {
        check_logprobs(m, logits, id, n_finite, 2e-6 + fabs(result->logprob) * 1e-9);
        CHECK(toai_sampler_score(m->sampler, g.data, id) == TOAI_OK, "score");
        check_logprobs(m, logits, id, n_finite, 2e-6 + fabs(result->logprob) * 1e-9);
    }
    m->n_generated[id]++;
    m->history[m->n_history++] = id;
    CHECK(memcmp(logits, g.data, (size_t)p->n_vocab * sizeof *logits) == 0, "logits were written");
    unguard(g);
    return id;
}
