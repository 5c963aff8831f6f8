/* The C module's manual: every exported name, its meaning and its return codes.
 *
 * Declarations only. The C files include this after <stddef.h> and <stdint.h>. The cffi builder reads it as it
 * stands, so it has no directives and no include guard.
 *
 * These rules hold for every function. The caller owns all memory: ask for a size, pass zeroed memory of that size
 * aligned to 8 bytes, keep it in place while in use, free it at any time. No function allocates, blocks, prints or
 * keeps anything outside that memory: two threads may use two objects at once, but not one. Sizes are in bytes;
 * token ids are 0 .. n_vocab-1; log-probabilities are natural. */

enum {
    TOAI_VERSION = 3, /* rises when an equal seed may give other ids, or a declaration here changes */

    TOAI_OK = 0,
    TOAI_E_ARG = -1,       /* a null or misaligned pointer, a parameter out of its bounds, too little memory */
    TOAI_E_TOKEN = -2,     /* a token id outside 0 .. n_vocab-1 */
    TOAI_E_NONFINITE = -3, /* a NaN or +inf among the logits, or no finite logit */
    TOAI_E_BANNED = -4,    /* the logits are sound, but bias, suppression and the mask leave no token to choose */
    TOAI_E_FULL = -5,      /* more distinct tokens accepted than n_ctx */

    TOAI_MAX_VOCAB = 16777216,
    TOAI_MAX_CTX = 268435456,      /* keeps every size within 32 bits */
    TOAI_MAX_TOP = 20,             /* greatest n_top */
    TOAI_MAX_PATTERNS = 64,        /* stop patterns in one matcher */
    TOAI_MAX_PATTERN_BYTES = 1024, /* bytes in one stop pattern */
};

/* ---- sampler ----------------------------------------------------------------------------------------------
 *
 * Chooses one token from one vector of logits, in this order:
 *
 *   1. bias        x += bias; a bias of -100 or less bans the token.
 *   2. repeat      if the token is among the last repeat_last_n accepted (prompt and generated):
 *                  x = x > 0 ? x / repeat_penalty : x * repeat_penalty.
 *   3. presence,   x -= presence_penalty + frequency_penalty * c, where c > 0 is how often the token was
 *      frequency   generated (the prompt does not count).
 *   4. suppress    if the call asks for it, the ids in `suppress` are banned.
 *   5. mask        if the call has one, the tokens that it does not allow are banned.
 *   6. temperature p = softmax(x / temperature). 0 (or less than 1e-5) takes the greatest x, lowest id on ties,
 *                  and ends here.
 *   7. top_k       keeps the top_k greatest x; among equals the lowest ids.
 *   8. top_p       of those, keeps the fewest best whose share of the mass of all is at least top_p, at least one.
 *   9. min_p       of those, keeps the ones with p >= min_p * max p.
 *  10. draw        draws one of those by p.
 *
 * Tokens so improbable that all of them together weigh less than 2^-53 of the whole are never drawn. */

typedef struct toai_sampler toai_sampler;

typedef struct toai_sampler_params {
    int32_t n_vocab;          /* 1 .. TOAI_MAX_VOCAB */
    int32_t n_ctx;            /* 1 .. TOAI_MAX_CTX; bounds how many tokens can be accepted */
    int32_t top_k;            /* <= 0 or >= n_vocab: off */
    double temperature;       /* 0 .. 100 */
    double top_p;             /* 0 .. 1; 1: off */
    double min_p;             /* 0 .. 1; 0: off */
    float repeat_penalty;     /* 1e-30 .. 1000; 1: off */
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

/* The result of the last sample or score call. */
typedef struct toai_sampler_result {
    double logprob;         /* of the chosen or scored token under softmax(logits); valid if n_top >= 0 */
    int32_t n_top;          /* entries below; fewer than asked when fewer logits are finite */
    int32_t top_id[20];     /* best first, lowest id first among equals */
    double top_logprob[20];
    float cut_logit;        /* the candidates were the tokens with an adjusted logit (-inf: banned) greater than */
    int32_t cut_id;         /* this, and those equal to it with an id no greater than cut_id (sample only) */
} toai_sampler_result;

/* Returns the size of one sampler, or 0 when a parameter is out of its bounds. */
size_t toai_sampler_size(const toai_sampler_params *params);

/* Makes a sampler in `memory`: zeroed, aligned to 8, `size` bytes as toai_sampler_size returned.
 * Returns TOAI_OK, TOAI_E_ARG or TOAI_E_TOKEN (in bias_id or suppress). */
int32_t toai_sampler_init(toai_sampler *memory, size_t size, const toai_sampler_params *params);

/* Adds the prompt's tokens to the history, not as generated. Only repeat_penalty reads them.
 * Returns TOAI_OK, TOAI_E_ARG or TOAI_E_TOKEN, which leave the history as it was, or TOAI_E_FULL. */
int32_t toai_sampler_accept(toai_sampler *sampler, const int32_t *tokens, int32_t n_tokens);

/* Chooses a token from n_vocab logits and adds it to the history as generated. Reads the logits only.
 *
 * `allowed` is NULL, or a mask: one bit per token, in one word per 64 tokens, aligned to a word. Token i is allowed
 * if bit i % 64 of allowed[i / 64] is 1; bits past n_vocab are ignored. The token is the one that the same seed
 * gives for logits of -inf at all other tokens. Log-probabilities stay those of the logits before the mask. Tokens
 * whose word is 0 cost nothing after the first pass.
 *
 * Returns the token's id, or TOAI_E_ARG, TOAI_E_NONFINITE, TOAI_E_BANNED or TOAI_E_FULL: then nothing was drawn or
 * added. TOAI_E_BANNED without bias or suppression means that the mask allows no token with a finite logit: a
 * grammar is stuck. */
int32_t toai_sampler_sample(toai_sampler *sampler, const float *logits, int32_t suppress, const uint64_t *allowed);

/* Computes the log-probabilities of a given token and of the best n_top from the raw logits. Reads and changes
 * neither the history nor the random state.
 * Returns TOAI_OK, TOAI_E_ARG (also when n_top is -1), TOAI_E_TOKEN or TOAI_E_NONFINITE. */
int32_t toai_sampler_score(toai_sampler *sampler, const float *logits, int32_t token);

/* Returns the result inside the sampler's memory. The address stays the same for the sampler's life. */
const toai_sampler_result *toai_sampler_get_result(const toai_sampler *sampler);

/* ---- stop matcher -----------------------------------------------------------------------------------------
 *
 * Finds the first of many byte patterns in a stream: stop sequences. The match that ends first wins; of those that
 * end at the same byte, the longest. Bytes that could still become part of a match are held: the longest end of
 * the stream that begins some pattern. The matcher only counts; the caller keeps the held bytes. Time is linear in
 * the bytes fed, for any patterns. */

typedef struct toai_stop toai_stop;

/* Returns the size of a matcher whose patterns have n_bytes bytes in all, or 0 when a count is out of bounds. */
size_t toai_stop_size(int32_t n_patterns, size_t n_bytes);

/* Makes a matcher of 1 .. TOAI_MAX_PATTERNS patterns, each 1 .. TOAI_MAX_PATTERN_BYTES long, one after another in
 * `bytes`. Only this call reads the two arrays. Returns TOAI_OK or TOAI_E_ARG. */
int32_t toai_stop_init(toai_stop *memory, size_t size, const uint8_t *bytes, const int32_t *lengths,
                       int32_t n_patterns);

/* Feeds n bytes. Returns how many of the held bytes followed by these n the caller may pass on:
 *   r >= 0: no match yet; the first r pass, the rest is now held;
 *   r < 0:  a match begins after the first -1 - r bytes, which pass; the rest is dropped. Later calls return -1. */
int64_t toai_stop_feed(toai_stop *stop, const uint8_t *bytes, size_t n);

/* ---- hooks ------------------------------------------------------------------------------------------------
 *
 * Functions whose addresses go to libllama, so that its threads never wait for the interpreter lock, and one that
 * walks its vocabulary. */

/* Ends an evaluation that runs in another thread. Write the fields at any time; a double is written in one piece. */
typedef struct toai_abort {
    double deadline; /* seconds of CLOCK_MONOTONIC; 0: none */
    int32_t asked;   /* not 0: end now */
    int32_t reserved;
} toai_abort;

/* Returns true if the evaluation is to end. `abort` is a toai_abort. */
_Bool toai_abort_asked(void *abort);

enum { TOAI_LOG_BYTES = 4096 };

/* The warnings and errors of a load, cut off where the text is full. Zero it before use. */
typedef struct toai_log {
    uint32_t used; /* bytes in text, or more if some did not fit */
    char text[4096];
} toai_log;

/* Appends a message of level 3 (warning) or 4 (error); drops others. `log` is a toai_log. Safe in threads. */
void toai_log_append(int level, const char *text, void *log);

enum {
    TOAI_KIND_EOG = 1,     /* ends generation */
    TOAI_KIND_CONTROL = 2, /* a control token */
    TOAI_KIND_USER = 4,    /* a user-defined token */
    TOAI_KIND_BYTE = 8,    /* stands for one byte */
    TOAI_KIND_LSTRIP = 16, /* takes the white space before it, when parsed from text */
    TOAI_KIND_RSTRIP = 32, /* takes the white space after it */
};

/* libllama's functions llama_vocab_is_eog, llama_vocab_get_attr and llama_token_to_piece. */
typedef struct toai_vocab_calls {
    _Bool (*is_eog)(const void *vocab, int32_t token);
    int (*attr)(const void *vocab, int32_t token);
    int32_t (*piece)(const void *vocab, int32_t token, char *out, int32_t n_out, int32_t lstrip, _Bool special);
} toai_vocab_calls;

/* Writes the TOAI_KIND_ bits of each token to kinds[0 .. n_vocab-1]. Returns the bytes of the longest piece, or
 * TOAI_E_ARG. */
int32_t toai_scan_vocab(const toai_vocab_calls *calls, const void *vocab, int32_t n_vocab, uint8_t *kinds);
