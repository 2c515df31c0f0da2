// gqsa.h over the C++ parts. Every function is a `guard`: what is thrown ends here.
#include <algorithm>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "error.h"
#include "gqsa.h"
#include "model.h"
#include "unicode.h"

struct gqsa_model {
  gqsa::Model model;
  gqsa::Generation last;  // its tokens are the caller's until the next call
};

struct gqsa_sampler {
  gqsa::Sampler sampler;
};

namespace {

using gqsa::usage_error;

struct Failure {
  std::string message, detail;
};
thread_local Failure last_failure;

gqsa_status fail(gqsa_status status, const char* message, const char* detail) noexcept {
  try {
    last_failure.message = message;
    last_failure.detail = detail;
  } catch (...) {
    last_failure.message.clear();
    last_failure.detail.clear();
  }
  return status;
}

template <typename F>
gqsa_status guard(F&& function) noexcept {
  try {
    function();
    return GQSA_OK;
  } catch (const gqsa::Error& error) {
    return fail(static_cast<gqsa_status>(error.kind), error.what(), error.detail.c_str());
  } catch (const std::bad_alloc&) {
    return fail(GQSA_ERROR_MEMORY, "There is not enough memory.", "");
  } catch (const std::exception& error) {
    return fail(GQSA_ERROR_RUNTIME, error.what(), "");
  } catch (...) {
    return fail(GQSA_ERROR_RUNTIME, "Something failed that does not say what.", "");
  }
}

void require(bool given, const char* name) {
  if (!given) throw usage_error(std::string(name) + " is NULL.");
}

std::string text_of(const char* text) { return text != nullptr ? text : ""; }

gqsa::Sampling from_c(const gqsa_sampling& s) {
  gqsa::Sampling sampling{s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty, {}};
  if (s.seed >= 0) sampling.seed = static_cast<std::uint64_t>(s.seed);
  return sampling;
}

gqsa_sampling to_c(const gqsa::Sampling& s) {
  return {s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty, -1};
}

std::vector<std::int32_t> ids_of(const int32_t* ids, size_t count) {
  require(ids != nullptr || count == 0, "The array of token ids");
  return count == 0 ? std::vector<std::int32_t>() : std::vector<std::int32_t>(ids, ids + count);
}

}  // namespace

const char* gqsa_version(void) { return GQSA_VERSION; }

const char* gqsa_last_error(void) { return last_failure.message.c_str(); }
const char* gqsa_last_error_detail(void) { return last_failure.detail.c_str(); }

void gqsa_load_options_init(gqsa_load_options* options) {
  if (options != nullptr) *options = {0, 0, 0, 1, nullptr, nullptr};
}

gqsa_status gqsa_load(const char* directory, const gqsa_load_options* options, gqsa_model** model) {
  return guard([&] {
    require(directory != nullptr, "The directory");
    require(model != nullptr, "The place for the model");
    *model = nullptr;
    gqsa_load_options given;
    gqsa_load_options_init(&given);
    if (options != nullptr) given = *options;
    const gqsa::LoadOptions load{{given.threads, given.context_length, given.max_batch},
                                 given.verify != 0,
                                 text_of(given.variant),
                                 text_of(given.runtime_dir)};
    *model = new gqsa_model{gqsa::Model(directory, load), {}};
  });
}

void gqsa_free(gqsa_model* model) {
  guard([&] { delete model; });
}

gqsa_status gqsa_get_info(const gqsa_model* model, gqsa_info* info) {
  return guard([&] {
    require(model != nullptr && info != nullptr, "The model or the place for the answer");
    const gqsa::Manifest& m = model->model.manifest();
    const gqsa::Session& session = model->model.session();
    *info = {m.name.c_str(),
             model->model.variant().target.name.c_str(),
             static_cast<int32_t>(m.variants.size()),
             static_cast<int32_t>(session.vocab_size()),
             session.context_length(),
             static_cast<int32_t>(session.max_batch()),
             session.threads(),
             model->model.has_chat_template() ? 1 : 0,
             m.weights_bytes,
             m.kv_bytes_per_token};
  });
}

gqsa_status gqsa_tokenize(const gqsa_model* model, const char* text, size_t bytes, uint32_t flags,
                          int32_t* ids, size_t capacity, size_t* count) {
  return guard([&] {
    require(model != nullptr && count != nullptr, "The model or the place for the count");
    require(text != nullptr || bytes == 0, "The text");
    require(ids != nullptr || capacity == 0, "The array of token ids");
    const auto found = model->model.tokenize(std::string(bytes > 0 ? text : "", bytes),
                                             (flags & GQSA_ADD_SPECIAL_TOKENS) != 0,
                                             (flags & GQSA_PLAIN_TEXT) != 0);
    *count = found.size();
    std::copy_n(found.begin(), std::min(capacity, found.size()), ids);
  });
}

gqsa_status gqsa_detokenize(const gqsa_model* model, const int32_t* ids, size_t count,
                            int32_t skip_special_tokens, char* text, size_t capacity,
                            size_t* bytes) {
  return guard([&] {
    require(model != nullptr && bytes != nullptr, "The model or the place for the length");
    require(text != nullptr || capacity == 0, "The place for the text");
    require(ids != nullptr || count == 0, "The array of token ids");
    const std::string found = model->model.tokenizer().decode(ids, count, skip_special_tokens != 0);
    *bytes = found.size();
    std::copy_n(found.begin(), std::min(capacity, found.size()), text);
  });
}

gqsa_status gqsa_sequence_open(gqsa_model* model, int64_t* sequence) {
  return guard([&] {
    require(model != nullptr && sequence != nullptr, "The model or the place for the sequence");
    *sequence = model->model.session().add();
  });
}

gqsa_status gqsa_sequence_close(gqsa_model* model, int64_t sequence) {
  return guard([&] {
    require(model != nullptr, "The model");
    model->model.session().remove(sequence);
  });
}

gqsa_status gqsa_prefill(gqsa_model* model, int64_t sequence, const int32_t* tokens, size_t count,
                         float* logits) {
  return guard([&] {
    require(model != nullptr, "The model");
    gqsa::Session& session = model->model.session();
    const gqsa::Logits found = session.prefill(sequence, ids_of(tokens, count));
    if (logits != nullptr) std::copy_n(found.data, session.vocab_size(), logits);
  });
}

gqsa_status gqsa_decode(gqsa_model* model, const int64_t* sequences, const int32_t* tokens,
                        size_t count, float* logits) {
  return guard([&] {
    require(model != nullptr && logits != nullptr, "The model or the place for the logits");
    require(sequences != nullptr || count == 0, "The array of sequences");
    gqsa::Session& session = model->model.session();
    const gqsa::Logits found = session.decode(
        std::vector<std::int64_t>(sequences, sequences + count), ids_of(tokens, count));
    std::copy_n(found.data, static_cast<std::int64_t>(count) * session.vocab_size(), logits);
  });
}

gqsa_status gqsa_sampling_init(const gqsa_model* model, gqsa_sampling* sampling) {
  return guard([&] {
    require(model != nullptr && sampling != nullptr, "The model or the place for the options");
    *sampling = to_c(model->model.sampling());
  });
}

gqsa_status gqsa_sampler_create(const gqsa_model* model, const gqsa_sampling* sampling,
                                const int32_t* prompt, size_t count, gqsa_sampler** sampler) {
  return guard([&] {
    require(model != nullptr && sampler != nullptr, "The model or the place for the sampler");
    const gqsa::Sampling chosen = sampling != nullptr ? from_c(*sampling) : model->model.sampling();
    const auto vocab = static_cast<std::size_t>(model->model.session().vocab_size());
    *sampler = new gqsa_sampler{gqsa::Sampler(chosen, vocab, ids_of(prompt, count))};
  });
}

gqsa_status gqsa_sample(gqsa_sampler* sampler, const float* logits, int32_t* token) {
  return guard([&] {
    require(sampler != nullptr && logits != nullptr && token != nullptr,
            "The sampler, the logits or the place for the token");
    *token = sampler->sampler(logits);
  });
}

void gqsa_sampler_free(gqsa_sampler* sampler) { delete sampler; }

gqsa_status gqsa_generate_options_init(const gqsa_model* model, gqsa_generate_options* options) {
  return guard([&] {
    require(model != nullptr && options != nullptr, "The model or the place for the options");
    *options = {
        to_c(model->model.sampling()), gqsa::GenerateOptions().max_tokens, nullptr, 0, 0, 0};
  });
}

gqsa_status gqsa_generate(gqsa_model* model, const char* prompt, size_t bytes,
                          const gqsa_generate_options* options, gqsa_text_callback callback,
                          void* user, gqsa_result* result) {
  return guard([&] {
    require(model != nullptr, "The model");
    require(prompt != nullptr || bytes == 0, "The prompt");
    gqsa::GenerateOptions chosen;
    chosen.sampling = model->model.sampling();
    if (options != nullptr) {
      chosen.sampling = from_c(options->sampling);
      chosen.max_tokens = options->max_tokens;
      chosen.ignore_eos = options->ignore_eos != 0;
      chosen.chat = options->chat != 0;
      require(options->stop != nullptr || options->stop_count == 0, "The array of stop strings");
      for (size_t i = 0; i < options->stop_count; ++i) {
        require(options->stop[i] != nullptr, "A stop string");
        chosen.stop.emplace_back(options->stop[i]);
      }
    }
    const auto emit = [&](const std::string& text) {
      return callback == nullptr || callback(text.data(), text.size(), user) == 0;
    };
    model->last = model->model.generate(std::string(bytes > 0 ? prompt : "", bytes), chosen, emit);
    if (result != nullptr) {
      const gqsa::Generation& last = model->last;
      *result = {static_cast<gqsa_finish>(last.finish),
                 last.prompt_tokens,
                 last.token_ids.size(),
                 last.token_ids.data(),
                 last.prefill_seconds,
                 last.decode_seconds};
    }
  });
}
