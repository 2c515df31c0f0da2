/* Every function of gqsa.h from C: prints a JSON object for the tests. Usage: gqsa-api DIR PROMPT */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gqsa.h"

static void check(gqsa_status status, const char *what) {
  if (status != GQSA_OK) {
    fprintf(stderr, "%s: %d %s\n", what, (int)status, gqsa_last_error());
    exit(1);
  }
}

static void expect(gqsa_status status, gqsa_status wanted, const char *words, const char *what) {
  if (status != wanted || strstr(gqsa_last_error(), words) == NULL) {
    fprintf(stderr, "%s: expected %d (%s), got %d: %s\n", what, (int)wanted, words, (int)status,
            gqsa_last_error());
    exit(1);
  }
}

static int32_t stop_at_once(const char *text, size_t bytes, void *user) {
  (void)text;
  *(size_t *)user += bytes;
  return 1;
}

static int32_t count_bytes(const char *text, size_t bytes, void *user) {
  (void)text;
  *(size_t *)user += bytes;
  return 0;
}

static void print_ids(const char *name, const int32_t *ids, size_t count, const char *end) {
  printf("\"%s\": [", name);
  for (size_t i = 0; i < count; ++i) printf("%s%d", i > 0 ? ", " : "", ids[i]);
  printf("]%s", end);
}

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  const char *prompt = argv[2];
  gqsa_model *model = NULL;
  expect(gqsa_load("/no/such/folder", NULL, &model), GQSA_ERROR_USAGE, "does not exist", "load");
  expect(gqsa_load(NULL, NULL, &model), GQSA_ERROR_USAGE, "NULL", "load of NULL");
  gqsa_load_options load;
  gqsa_load_options_init(&load);
  load.max_batch = 2;
  load.threads = 1;
  check(gqsa_load(argv[1], &load, &model), "load");
  gqsa_info info;
  check(gqsa_get_info(model, &info), "info");

  int32_t ids[512];
  size_t count = 0, again = 0;
  check(gqsa_tokenize(model, prompt, strlen(prompt), GQSA_ADD_SPECIAL_TOKENS, NULL, 0, &count),
        "count");
  check(gqsa_tokenize(model, prompt, strlen(prompt), GQSA_ADD_SPECIAL_TOKENS, ids, 512, &again),
        "tokenize");
  if (count != again || count == 0 || count > 512) return 1;
  expect(gqsa_tokenize(model, "\xff", 1, 0, ids, 512, &again), GQSA_ERROR_USAGE, "UTF-8", "bytes");
  char text[4096];
  size_t bytes = 0;
  check(gqsa_detokenize(model, ids, count, 1, text, sizeof text, &bytes), "detokenize");
  if (bytes != strlen(prompt) || memcmp(text, prompt, bytes) != 0) return 1;

  /* Two sequences of the same prompt, decoded together, greedily. */
  const size_t vocab = (size_t)info.vocab_size;
  float *logits = malloc(2 * vocab * sizeof *logits);
  int64_t sequences[2], third;
  gqsa_sampler *samplers[2];
  gqsa_sampling greedy;
  check(gqsa_sampling_init(model, &greedy), "sampling");
  greedy.temperature = 0;
  int32_t tokens[2], made[2][8];
  for (int i = 0; i < 2; ++i) {
    check(gqsa_sequence_open(model, &sequences[i]), "open");
    check(gqsa_sampler_create(model, &greedy, ids, count, &samplers[i]), "sampler");
    check(gqsa_prefill(model, sequences[i], ids, count, logits), "prefill");
    check(gqsa_sample(samplers[i], logits, &tokens[i]), "sample");
    made[i][0] = tokens[i];
  }
  expect(gqsa_sequence_open(model, &third), GQSA_ERROR_USAGE, "max_batch", "a third sequence");
  for (int step = 1; step < 8; ++step) {
    check(gqsa_decode(model, sequences, tokens, 2, logits), "decode");
    for (int i = 0; i < 2; ++i) {
      check(gqsa_sample(samplers[i], logits + (size_t)i * vocab, &tokens[i]), "sample");
      made[i][step] = tokens[i];
    }
  }
  if (memcmp(made[0], made[1], sizeof made[0]) != 0) return 1;
  const int64_t twice[2] = {sequences[0], sequences[0]};
  expect(gqsa_decode(model, twice, tokens, 2, logits), GQSA_ERROR_USAGE, "twice", "one twice");
  const int32_t outside = info.vocab_size;
  expect(gqsa_prefill(model, sequences[0], &outside, 1, NULL), GQSA_ERROR_USAGE, "vocabulary",
         "a token outside");
  expect(gqsa_prefill(model, sequences[0], ids, 0, NULL), GQSA_ERROR_USAGE, "empty", "no token");
  int32_t *many = calloc((size_t)info.context_length + 1, sizeof *many);
  expect(gqsa_prefill(model, sequences[0], many, (size_t)info.context_length + 1, NULL),
         GQSA_ERROR_USAGE, "context", "too many tokens");
  free(many);
  for (int i = 0; i < 2; ++i) {
    gqsa_sampler_free(samplers[i]);
    check(gqsa_sequence_close(model, sequences[i]), "close");
    check(gqsa_sequence_close(model, sequences[i]), "close again");
  }
  expect(gqsa_prefill(model, sequences[0], ids, count, NULL), GQSA_ERROR_USAGE, "no sequence",
         "a closed sequence");

  gqsa_generate_options options;
  check(gqsa_generate_options_init(model, &options), "options");
  options.sampling = greedy;
  options.max_tokens = 8;
  options.ignore_eos = 1;
  gqsa_result result;
  size_t seen = 0;
  check(gqsa_generate(model, prompt, strlen(prompt), &options, count_bytes, &seen, &result),
        "generate");
  if (memcmp(result.token_ids, made[0], sizeof made[0]) != 0) return 1;
  if (result.finish != GQSA_FINISH_LENGTH || result.generated_tokens != 8) return 1;
  printf("{");
  print_ids("prompt", ids, count, ", ");
  print_ids("tokens", result.token_ids, result.generated_tokens, ", ");
  printf("\"bytes\": %zu, ", seen);
  /* At the first of several pieces, and at the only one: there is nothing left to stop. */
  int stopped = 1;
  for (options.max_tokens = 1; options.max_tokens <= 8; options.max_tokens += 7) {
    check(gqsa_generate(model, prompt, strlen(prompt), &options, stop_at_once, &seen, &result),
          "generate");
    if (result.finish != GQSA_FINISH_CALLBACK || result.generated_tokens != 1) stopped = 0;
  }
  options.max_tokens = 8;
  printf("\"stopped\": %d, ", stopped);
  options.sampling.top_p = 2;
  expect(gqsa_generate(model, prompt, strlen(prompt), &options, NULL, NULL, NULL),
         GQSA_ERROR_USAGE, "top_p", "a wrong option");
  expect(gqsa_generate(model, "", 0, NULL, NULL, NULL, NULL), GQSA_ERROR_USAGE, "empty", "nothing");
  /* A second model beside the first: they share the workers, and neither disturbs the other. */
  gqsa_model *second = NULL;
  check(gqsa_load(argv[1], &load, &second), "a second load");
  options.sampling = greedy;
  check(gqsa_generate(second, prompt, strlen(prompt), &options, NULL, NULL, &result), "second");
  if (memcmp(result.token_ids, made[0], sizeof made[0]) != 0) return 1;
  gqsa_free(second);
  check(gqsa_generate(model, prompt, strlen(prompt), &options, NULL, NULL, &result), "first again");
  if (memcmp(result.token_ids, made[0], sizeof made[0]) != 0) return 1;
  printf("\"variant\": \"%s\", \"threads\": %d, \"vocab_size\": %d}\n", info.variant, info.threads,
         info.vocab_size);
  free(logits);
  gqsa_free(model);
  gqsa_free(NULL);
  return 0;
}
