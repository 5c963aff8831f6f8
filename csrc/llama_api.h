/* The part of libllama's C API that tinyoai calls, declared for the versions that engine/llamacpp/library.py knows.
 *
 * Declarations only, read by cffi. The two parameter structs are passed by value and differ between versions from
 * `tail` on, so `tail` is as long as any version needs: structs of this size travel in memory, and the library reads
 * and writes only its own part. */

typedef int32_t llama_token;
typedef struct llama_model llama_model;
typedef struct llama_context llama_context;
typedef struct llama_vocab llama_vocab;
typedef struct llama_adapter_lora llama_adapter_lora;
typedef struct llama_memory_i *llama_memory_t;

typedef struct llama_batch {
    int32_t n_tokens;
    llama_token *token;
    float *embd;
    int32_t *pos;
    int32_t *n_seq_id;
    int32_t **seq_id;
    int8_t *logits;
} llama_batch;

typedef struct llama_model_params {
    void *devices;
    void *tensor_buft_overrides;
    int32_t n_gpu_layers;
    int32_t split_mode;
    int32_t load_mode;
    int32_t lazy_mode;
    int32_t main_gpu;
    float *tensor_split;
    void *progress_callback;
    void *progress_callback_user_data;
    void *kv_overrides;
    _Bool vocab_only;
    _Bool check_tensors;
    _Bool use_extra_bufts;
    _Bool no_host;
    _Bool no_alloc;
    _Bool load_mtp;
    uint8_t tail[256];
} llama_model_params;

typedef struct llama_context_params {
    uint32_t n_ctx;
    uint32_t n_batch;
    uint32_t n_ubatch;
    uint32_t n_seq_max;
    uint32_t n_rs_seq;
    uint32_t n_outputs_max;
    uint32_t n_outputs_max_per_seq;
    int32_t n_threads;
    int32_t n_threads_batch;
    int32_t ctx_type;
    int32_t rope_scaling_type;
    int32_t pooling_type;
    int32_t attention_type;
    int32_t flash_attn_type;
    float rope_freq_base;
    float rope_freq_scale;
    float yarn_ext_factor;
    float yarn_attn_factor;
    float yarn_beta_fast;
    float yarn_beta_slow;
    uint32_t yarn_orig_ctx;
    float defrag_thold;
    void *cb_eval;
    void *cb_eval_user_data;
    int32_t type_k;
    int32_t type_v;
    uint8_t tail[256];
} llama_context_params;

const char *llama_version(void);
void llama_backend_init(void);
void llama_log_set(void *log_callback, void *user_data);

llama_model_params llama_model_default_params(void);
llama_context_params llama_context_default_params(void);
llama_model *llama_model_load_from_file(const char *path, llama_model_params params);
void llama_model_free(llama_model *model);
llama_context *llama_init_from_model(llama_model *model, llama_context_params params);
void llama_free(llama_context *ctx);

llama_adapter_lora *llama_adapter_lora_init(llama_model *model, const char *path);
void llama_adapter_lora_free(llama_adapter_lora *adapter);
int32_t llama_set_adapters_lora(llama_context *ctx, llama_adapter_lora **adapters, size_t n_adapters, float *scales);

const llama_vocab *llama_model_get_vocab(const llama_model *model);
int32_t llama_model_n_ctx_train(const llama_model *model);
int32_t llama_model_n_embd(const llama_model *model);
int32_t llama_model_n_embd_out(const llama_model *model);
_Bool llama_model_has_encoder(const llama_model *model);
_Bool llama_model_has_decoder(const llama_model *model);
_Bool llama_model_is_recurrent(const llama_model *model);
_Bool llama_model_is_hybrid(const llama_model *model);
int32_t llama_model_n_swa(const llama_model *model);
uint32_t llama_n_ctx(const llama_context *ctx);
uint32_t llama_n_ctx_seq(const llama_context *ctx);

int32_t llama_vocab_type(const llama_vocab *vocab);
int32_t llama_vocab_n_tokens(const llama_vocab *vocab);
int llama_vocab_get_attr(const llama_vocab *vocab, llama_token token);
_Bool llama_vocab_is_eog(const llama_vocab *vocab, llama_token token);
llama_token llama_vocab_bos(const llama_vocab *vocab);
llama_token llama_vocab_eos(const llama_vocab *vocab);
llama_token llama_vocab_sep(const llama_vocab *vocab);
_Bool llama_vocab_get_add_bos(const llama_vocab *vocab);
_Bool llama_vocab_get_add_eos(const llama_vocab *vocab);
_Bool llama_vocab_get_add_sep(const llama_vocab *vocab);
int32_t llama_tokenize(const llama_vocab *vocab, const char *text, int32_t text_len, llama_token *tokens,
                       int32_t n_tokens_max, _Bool add_special, _Bool parse_special);
int32_t llama_token_to_piece(const llama_vocab *vocab, llama_token token, char *buf, int32_t length, int32_t lstrip,
                             _Bool special);

int32_t llama_decode(llama_context *ctx, llama_batch batch);
void llama_set_n_threads(llama_context *ctx, int32_t n_threads, int32_t n_threads_batch);
void llama_set_embeddings(llama_context *ctx, _Bool embeddings);
void llama_set_abort_callback(llama_context *ctx, void *abort_callback, void *abort_callback_data);
float *llama_get_logits_ith(llama_context *ctx, int32_t i);
float *llama_get_embeddings_ith(llama_context *ctx, int32_t i);
float *llama_get_embeddings_seq(llama_context *ctx, int32_t seq_id);

llama_memory_t llama_get_memory(const llama_context *ctx);
_Bool llama_memory_seq_rm(llama_memory_t mem, int32_t seq_id, int32_t p0, int32_t p1);
void llama_memory_seq_cp(llama_memory_t mem, int32_t src, int32_t dst, int32_t p0, int32_t p1);
int32_t llama_memory_seq_pos_max(llama_memory_t mem, int32_t seq_id);
size_t llama_state_seq_get_size(llama_context *ctx, int32_t seq_id);
size_t llama_state_seq_get_data(llama_context *ctx, uint8_t *dst, size_t size, int32_t seq_id);
size_t llama_state_seq_set_data(llama_context *ctx, const uint8_t *src, size_t size, int32_t seq_id);
