/* The C module's manual: every exported name, its meaning and its return codes.
 *
 * Pure declarations. The C files include this after <stddef.h> and <stdint.h>; the cffi builder reads it as
 * it stands, so it has no directives and no include guard.
 *
 * Rules that hold for all of it. The caller owns all memory: ask for a size, hand over zeroed memory of that
 * size aligned to 8 bytes, keep it in place while in use, free it whenever you like. No function allocates,
 * blocks, prints or keeps anything outside that memory, so one object may serve one thread at a time and two
 * objects never touch. Sizes are in bytes; token ids are 0 .. n_vocab-1; log-probabilities are natural. */

enum {
    TOAI_VERSION = 1, /* rises when an equal seed may give other ids, or a declaration here changes */

    TOAI_OK = 0,
    TOAI_E_ARG = -1,       /* a null or misaligned pointer, a parameter out of its bounds, too little memory */
    TOAI_E_TOKEN = -2,     /* a token id outside 0 .. n_vocab-1 */
    TOAI_E_NONFINITE = -3, /* a NaN or +inf among the logits, or not one finite logit */
    TOAI_E_BANNED = -4,    /* the logits are sound, but bias and suppression leave no token to choose */
    TOAI_E_FULL = -5,      /* more distinct tokens accepted than n_ctx allows for */

    TOAI_MAX_VOCAB = 16777216,
    TOAI_MAX_TOP = 20,             /* greatest n_top */
    TOAI_MAX_PATTERNS = 64,        /* stop patterns in one matcher */
    TOAI_MAX_PATTERN_BYTES = 1024, /* bytes in one stop pattern */
};

/* ---- sampler ----------------------------------------------------------------------------------------------
 *
 * One token from one vector of logits. The order of work:
 *
 *   1. bias        x += bias; a bias of -100 or less bans the token.
 *   2. repeat      if the token is among the last repeat_last_n accepted (prompt and generated):
 *                  x = x > 0 ? x / repeat_penalty : x * repeat_penalty.
 *   3. presence,   x -= presence_penalty + frequency_penalty * c, where c > 0 is how often the token was
 *      frequency   generated (the prompt does not count).
 *   4. suppress    if the call asks for it, the ids in `suppress` are banned.
 *   5. temperature p = softmax(x / temperature). 0 (or less than 1e-5) takes the greatest x, lowest id on ties,
 *                  and ends here.
 *   6. top_k       the top_k greatest x; equal values enter by lowest id.
 *   7. top_p       the shortest run of the best of those whose share of their mass is at least top_p, and never
 *                  fewer than one token.
 *   8. min_p       of those, the ones with p >= min_p * max p.
 *   9. one of them drawn by p.
 *
 * Tokens so improbable that all of them together weigh less than 2^-53 of the whole are never drawn. */

typedef struct toai_sampler toai_sampler;

typedef struct toai_sampler_params {
    int32_t n_vocab;          /* 1 .. TOAI_MAX_VOCAB */
    int32_t n_ctx;            /* > 0; bounds how many tokens can be accepted */
    int32_t top_k;            /* <= 0 or >= n_vocab: off */
    double temperature;       /* 0 .. 100 */
    double top_p;             /* 0 .. 1; 1: off */
    double min_p;             /* 0 .. 1; 0: off */
    float repeat_penalty;     /* 0.001 .. 1000; 1: off */
    int32_t repeat_last_n;    /* 0: off; < 0 or > n_ctx: n_ctx */
    float presence_penalty;   /* -1000 .. 1000; 0: off */
    float frequency_penalty;  /* -1000 .. 1000; 0: off */
    int32_t n_top;            /* -1: no log-probabilities; 0: the chosen token's; 1 .. TOAI_MAX_TOP: best n too */
    int32_t n_bias;           /* entries in bias_id and bias; a repeated id keeps its last bias */
    const int32_t *bias_id;   /* read by toai_sampler_init only */
    const float *bias;        /* finite; read by toai_sampler_init only */
    int32_t n_suppress;       /* entries in suppress */
    const int32_t *suppress;  /* read by toai_sampler_init only */
    uint64_t seed;            /* equal seeds, parameters and logits give equal ids */
} toai_sampler_params;

/* What the last sample or score call left behind. */
typedef struct toai_sampler_result {
    double logprob;         /* of the chosen or scored token under softmax(logits); valid if n_top >= 0 */
    int32_t n_top;          /* entries below; fewer than asked when fewer logits are finite */
    int32_t top_id[20];     /* best first, lowest id first among equals */
    double top_logprob[20];
    float cut_logit;        /* the candidates were the tokens whose adjusted logit is greater than this, and */
    int32_t cut_id;         /* those equal to it with an id no greater than this (sample only) */
} toai_sampler_result;

/* Memory for one sampler. Returns 0 when a parameter is out of its bounds. */
size_t toai_sampler_size(const toai_sampler_params *params);

/* Makes a sampler in `memory` (zeroed, `size` bytes as toai_sampler_size said, aligned to 8).
 * Returns TOAI_OK, TOAI_E_ARG or TOAI_E_TOKEN (in bias_id or suppress). */
int32_t toai_sampler_init(toai_sampler *memory, size_t size, const toai_sampler_params *params);

/* Adds tokens to the history without generating them: the prompt. Only the penalties read it.
 * Returns TOAI_OK, TOAI_E_ARG, TOAI_E_TOKEN or TOAI_E_FULL; on an error the tokens before it were added. */
int32_t toai_sampler_accept(toai_sampler *sampler, const int32_t *tokens, int32_t n_tokens);

/* Chooses a token from n_vocab logits (only read) and adds it to the history as generated.
 * Returns its id, or TOAI_E_ARG, TOAI_E_NONFINITE, TOAI_E_BANNED, TOAI_E_FULL: then nothing was drawn or added. */
int32_t toai_sampler_sample(toai_sampler *sampler, const float *logits, int32_t suppress);

/* Log-probabilities of a given token and of the best n_top, of the logits as they stand; the history, the
 * random state and the penalties have no part in it.
 * Returns TOAI_OK, TOAI_E_ARG (also when n_top is -1), TOAI_E_TOKEN or TOAI_E_NONFINITE. */
int32_t toai_sampler_score(toai_sampler *sampler, const float *logits, int32_t token);

/* The result inside the sampler's memory: one address for the sampler's whole life. */
const toai_sampler_result *toai_sampler_get_result(const toai_sampler *sampler);

/* ---- stop matcher -----------------------------------------------------------------------------------------
 *
 * Finds the first of many byte patterns in a stream. The match that ends first wins; of those ending at the same
 * byte, the longest. Bytes that could still become part of a match are held: exactly the longest end of the
 * stream that begins some pattern. The matcher only counts; the caller keeps the held bytes. Time is linear in
 * the bytes fed, whatever the patterns are. */

typedef struct toai_stop toai_stop;

/* Memory for a matcher whose patterns have n_bytes bytes in all. Returns 0 when the counts are out of bounds. */
size_t toai_stop_size(int32_t n_patterns, size_t n_bytes);

/* Makes a matcher of 1 .. TOAI_MAX_PATTERNS patterns, each 1 .. TOAI_MAX_PATTERN_BYTES long, lying one after
 * another in `bytes`; both arrays are read by this call only. Returns TOAI_OK or TOAI_E_ARG. */
int32_t toai_stop_init(toai_stop *memory, size_t size, const uint8_t *bytes, const int32_t *lengths,
                       int32_t n_patterns);

/* Feeds n bytes. Of the held bytes followed by these, the first r may leave:
 *   r >= 0: no match yet, the rest is now held;
 *   r < 0:  a match begins after the first -1 - r bytes; what follows is dropped, and later calls return -1. */
int64_t toai_stop_feed(toai_stop *stop, const uint8_t *bytes, size_t n);
