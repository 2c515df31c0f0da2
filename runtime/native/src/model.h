// An artefact's public face: text in, text out; as runtime/model.py and runtime/generation.py.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "sampling.h"
#include "session.h"
#include "tokenizer/tokenizer.h"

namespace gqsa {

enum class Finish { eos = 0, stop = 1, length = 2, callback = 3 };

struct GenerateOptions {
  Sampling sampling;
  std::int64_t max_tokens = 256;
  std::vector<std::string> stop;
  bool ignore_eos = false, chat = false;
};

struct Generation {
  std::vector<std::int32_t> token_ids;  // the end-of-text token not among them
  Finish finish = Finish::length;
  std::size_t prompt_tokens = 0;
  double prefill_seconds = 0, decode_seconds = 0;
};

struct LoadOptions {
  SessionLimits limits;
  bool verify = true;
  std::string variant, runtime_dirs;
};

class Model {
 public:
  Model(const std::string& directory, const LoadOptions& options);

  const Manifest& manifest() const { return program_->manifest(); }
  const Variant& variant() const { return program_->variant(); }
  const Tokenizer& tokenizer() const { return *tokenizer_; }
  Session& session() { return *session_; }
  const Session& session() const { return *session_; }
  bool has_chat_template() const { return has_chat_template_; }
  // The model's own, from generation_config.json.
  const Sampling& sampling() const { return sampling_; }

  // Token ids of a prompt. Throws Error (usage) where it is not UTF-8.
  std::vector<std::int32_t> tokenize(const std::string& text, bool add_special, bool plain) const;

  // Continue a prompt; `emit` gets the text in pieces, and ends the generation if it says false.
  Generation generate(const std::string& prompt, const GenerateOptions& options,
                      const std::function<bool(const std::string&)>& emit);

 private:
  // A user's message between what the model's chat template puts around it.
  struct ChatPrompt {
    std::string before, after;
    bool trim;
  };

  void read_chat(const std::string& directory);
  void read_generation_config(const std::string& directory);
  std::vector<std::int32_t> prompt_ids(const std::string& prompt, bool chat) const;
  std::vector<std::int32_t> chat_ids(const std::string& message) const;

  std::unique_ptr<const Tokenizer> tokenizer_;
  std::shared_ptr<const Program> program_;
  std::unique_ptr<Session> session_;
  Sampling sampling_;
  std::set<std::int32_t> eos_;
  std::optional<ChatPrompt> chat_;
  std::string chat_file_;
  bool has_chat_template_ = false;
};

}  // namespace gqsa
