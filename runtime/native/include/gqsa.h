/* gqsa.h: run compiled GQSA artefacts from C, C++ or anything with a C interface.
 *
 * Every function that can fail returns a gqsa_status and leaves one sentence in gqsa_last_error().
 * Nothing throws across this interface. A model and what belongs to it is for one thread at a time;
 * different models may be used from different threads. Text is UTF-8 with its length in bytes.
 */
#ifndef GQSA_H_
#define GQSA_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define GQSA_API __attribute__((visibility("default")))
#else
#define GQSA_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum gqsa_status {
  GQSA_OK = 0,
  GQSA_ERROR_ARTEFACT = 1, /* the artefact is damaged, or for another machine or release */
  GQSA_ERROR_USAGE = 2,    /* the request itself is wrong */
  GQSA_ERROR_RUNTIME = 3,  /* TVM or the system failed */
  GQSA_ERROR_MEMORY = 4    /* not enough memory */
} gqsa_status;

typedef struct gqsa_model gqsa_model;     /* a loaded artefact with one key/value cache */
typedef struct gqsa_sampler gqsa_sampler; /* chooses the tokens of one sequence */

/* The release, for example "0.1.0". */
GQSA_API const char *gqsa_version(void);

/* What the last failed call of this thread said: one or two sentences, "" before any failure. Valid
 * until the thread's next failure. The detail is TVM's own trace, mostly empty. */
GQSA_API const char *gqsa_last_error(void);
GQSA_API const char *gqsa_last_error_detail(void);

/* ---- loading ---------------------------------------------------------------------------- */

typedef struct gqsa_load_options {
  int32_t threads;         /* worker threads; 0: one for every core this process may use */
  int64_t context_length;  /* tokens a sequence may have; 0: as compiled */
  int32_t max_batch;       /* sequences at once; 0: as compiled */
  int32_t verify;          /* not 0: compare every parameter's SHA-256 */
  const char *variant;     /* target name of the code to run; NULL: the best for this machine */
  const char *runtime_dir; /* folders of TVM's runtime libraries, with ':' between them, for an
                              artefact that brings none; NULL: $GQSA_RUNTIME, else those that this
                              library was built with */
} gqsa_load_options;

GQSA_API void gqsa_load_options_init(gqsa_load_options *options);

/* Load an artefact. options may be NULL. Free the model with gqsa_free. */
GQSA_API gqsa_status gqsa_load(const char *directory, const gqsa_load_options *options,
                               gqsa_model **model);
/* Frees the model and its cache; the worker threads stay asleep for the next one. NULL is allowed. */
GQSA_API void gqsa_free(gqsa_model *model);

typedef struct gqsa_info {
  const char *name;    /* of the model */
  const char *variant; /* target name of the code that runs */
  int32_t variants;    /* for how many targets the artefact has code */
  int32_t vocab_size;
  int64_t context_length;
  int32_t max_batch;
  int32_t threads;
  int32_t has_chat_template; /* the model was trained to chat */
  int64_t weights_bytes;
  int64_t kv_cache_bytes_per_token;
} gqsa_info;

/* The strings belong to the model. */
GQSA_API gqsa_status gqsa_get_info(const gqsa_model *model, gqsa_info *info);

/* ---- text and tokens -------------------------------------------------------------------- */

enum {
  GQSA_ADD_SPECIAL_TOKENS = 1, /* what the model puts around a text, e.g. its first token */
  GQSA_PLAIN_TEXT = 2          /* special tokens spelled out in the text are plain text */
};

/* Turn text into at most capacity token ids; *count is how many there are in all, so a caller with
 * too small an array calls again. ids may be NULL if capacity is 0. */
GQSA_API gqsa_status gqsa_tokenize(const gqsa_model *model, const char *text, size_t bytes,
                                   uint32_t flags, int32_t *ids, size_t capacity, size_t *count);

/* Turn token ids into at most capacity bytes of text, without a final 0; *bytes is how long the
 * text is in all. */
GQSA_API gqsa_status gqsa_detokenize(const gqsa_model *model, const int32_t *ids, size_t count,
                                     int32_t skip_special_tokens, char *text, size_t capacity,
                                     size_t *bytes);

/* ---- passes over the model ----------------------------------------------------------------
 * A pass that fails appends nothing. A long prompt is several: those before stay, so close the
 * sequence of a gqsa_prefill that failed. */

/* Open an empty sequence in the cache; at most max_batch can be open. */
GQSA_API gqsa_status gqsa_sequence_open(gqsa_model *model, int64_t *sequence);
/* Forget a sequence and free its pages; one that is gone already is no error. */
GQSA_API gqsa_status gqsa_sequence_close(gqsa_model *model, int64_t sequence);

/* Append count tokens (at least one, any number that the context holds) to a sequence. logits gets
 * the last token's vocab_size floats, unless it is NULL. */
GQSA_API gqsa_status gqsa_prefill(gqsa_model *model, int64_t sequence, const int32_t *tokens,
                                  size_t count, float *logits);
/* Append one token to each of count different sequences. logits gets [count, vocab_size] floats. */
GQSA_API gqsa_status gqsa_decode(gqsa_model *model, const int64_t *sequences,
                                 const int32_t *tokens, size_t count, float *logits);

/* ---- sampling ----------------------------------------------------------------------------- */

typedef struct gqsa_sampling {
  double temperature; /* 0: greedy */
  int64_t top_k;      /* 0: all */
  double top_p;       /* 1: off */
  double min_p;       /* 0: off */
  double repetition_penalty; /* 1: off */
  int64_t seed;       /* negative: another one each time */
} gqsa_sampling;

/* The model's own, from generation_config.json; greedy where that does not say do_sample. */
GQSA_API gqsa_status gqsa_sampling_init(const gqsa_model *model, gqsa_sampling *sampling);

/* prompt: the tokens that the repetition penalty counts as seen. Free with gqsa_sampler_free. */
GQSA_API gqsa_status gqsa_sampler_create(const gqsa_model *model, const gqsa_sampling *sampling,
                                         const int32_t *prompt, size_t count,
                                         gqsa_sampler **sampler);
GQSA_API gqsa_status gqsa_sample(gqsa_sampler *sampler, const float *logits, int32_t *token);
GQSA_API void gqsa_sampler_free(gqsa_sampler *sampler); /* NULL is allowed */

/* ---- generation ---------------------------------------------------------------------------- */

/* Gets each piece of text as it comes: whole characters, no stop string. Not 0 ends the generation
 * (finish GQSA_FINISH_CALLBACK). It must not use the model. */
typedef int32_t (*gqsa_text_callback)(const char *text, size_t bytes, void *user);

typedef enum gqsa_finish {
  GQSA_FINISH_EOS = 0,     /* the model ended its text */
  GQSA_FINISH_STOP = 1,    /* a stop string, which is not in the text */
  GQSA_FINISH_LENGTH = 2,  /* max_tokens, or the context is full */
  GQSA_FINISH_CALLBACK = 3 /* the callback asked for it */
} gqsa_finish;

typedef struct gqsa_generate_options {
  gqsa_sampling sampling;
  int64_t max_tokens;
  const char *const *stop; /* stop strings, 0 at their ends */
  size_t stop_count;
  int32_t ignore_eos; /* not 0: go on after an end-of-text token */
  int32_t chat;       /* not 0: wrap the prompt as a user's message, as the artefact's
                         chat_prompt.json says */
} gqsa_generate_options;

/* The model's own sampling, 256 tokens. */
GQSA_API gqsa_status gqsa_generate_options_init(const gqsa_model *model,
                                                gqsa_generate_options *options);

typedef struct gqsa_result {
  gqsa_finish finish;
  size_t prompt_tokens;
  size_t generated_tokens;  /* the end-of-text token not among them */
  const int32_t *token_ids; /* the generated ones; the model's until its next call */
  double prefill_seconds;   /* to the first token */
  double decode_seconds;    /* the other tokens */
} gqsa_result;

/* Continue a prompt. options NULL: the model's own. callback and result may be NULL. */
GQSA_API gqsa_status gqsa_generate(gqsa_model *model, const char *prompt, size_t bytes,
                                   const gqsa_generate_options *options,
                                   gqsa_text_callback callback, void *user, gqsa_result *result);

#ifdef __cplusplus
}
#endif
#endif /* GQSA_H_ */
