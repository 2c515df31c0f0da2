#include "model.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "error.h"
#include "files.h"
#include "text.h"
#include "unicode.h"

namespace gqsa {
namespace {

using nlohmann::json;

// A value of generation_config.json; null where it has none.
json get(const json& config, const char* key) { return config.value(key, json()); }

Error wrong(const std::string& path, const char* key, const char* rule) {
  return artefact_error(path + ": " + key + " should be " + rule + ".");
}

void read_number(const json& config, const char* key, const std::string& path, double& value) {
  const json found = get(config, key);
  if (found.is_null()) return;
  if (!found.is_number()) throw wrong(path, key, "a number");
  value = found.get<double>();
}

// top_k, which some models write as 50.0.
void read_whole(const json& config, const char* key, const std::string& path, std::int64_t& value) {
  double number = static_cast<double>(value);
  read_number(config, key, path, number);
  if (number != std::floor(number)) throw wrong(path, key, "a whole number");
  constexpr double kMost = 1LL << 31;  // beyond any vocabulary
  value = static_cast<std::int64_t>(std::max(-kMost, std::min(kMost, number)));
}

// "eos_token" and its like: plain text, or an object with a "content".
std::optional<std::string> token_text(const json& config, const char* key) {
  const auto found = config.find(key);
  if (found == config.end()) return std::nullopt;
  const json text = found->is_object() ? found->value("content", json()) : *found;
  if (!text.is_string()) return std::nullopt;
  return text.get<std::string>();
}

// The text without white space at its ends, as a template's `trim` cuts it.
std::string trimmed(std::string_view text) {
  std::size_t begin = text.size(), end = 0;
  for (std::size_t at = 0; at < text.size(); at += character_size(text, at)) {
    const char32_t c = character_at(text, at);
    if (is_whitespace(c) || (c >= 0x1c && c <= 0x1f)) continue;  // as Python's strip
    begin = std::min(begin, at);
    end = at + character_size(text, at);
  }
  return std::string(text.substr(std::min(begin, end), end - std::min(begin, end)));
}

}  // namespace

Model::Model(const std::string& directory, const LoadOptions& options) {
  Manifest manifest = read_manifest(directory);
  // The tokenizer comes before the weights: what reading it takes is free again when they come.
  tokenizer_ =
      std::make_unique<const Tokenizer>(Tokenizer::read(join_path(directory, "tokenizer.json")));
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
  eos_.insert(manifest.eos_token_ids.begin(), manifest.eos_token_ids.end());
  read_generation_config(directory);
  read_chat(directory);
  program_ = std::make_shared<const Program>(directory, std::move(manifest), options.variant,
                                             options.verify, options.runtime_dirs);
  session_ = std::make_unique<Session>(program_, options.limits);
}

void Model::read_generation_config(const std::string& directory) {
  const std::string path = join_path(directory, "generation_config.json");
  const json config = read_settings(path);
  read_whole(config, "top_k", path, sampling_.top_k);
  read_number(config, "top_p", path, sampling_.top_p);
  read_number(config, "min_p", path, sampling_.min_p);
  read_number(config, "repetition_penalty", path, sampling_.repetition_penalty);
  // As in Hugging Face's generate, a model that does not say do_sample is greedy.
  const json sample = get(config, "do_sample");
  if (!sample.is_null() && !sample.is_boolean()) throw wrong(path, "do_sample", "true or false");
  double temperature = 1.0;
  read_number(config, "temperature", path, temperature);
  if (sample == true) sampling_.temperature = temperature;
  // Models disagree with themselves about the end of a text: take all that they say.
  const json eos = get(config, "eos_token_id");
  for (const json& id : eos.is_array() ? eos : json::array({eos})) {
    if (id.is_null()) continue;
    const bool large = id.is_number_unsigned() && id.get<std::uint64_t>() >> 63 != 0;
    if (!id.is_number_integer() || large) {
      throw wrong(path, "eos_token_id", "a token id or a list of them");
    }
    if (id.is_number_unsigned() && id.get<std::uint64_t>() < (1u << 31)) {
      eos_.insert(id.get<std::int32_t>());
    }
  }
  const json settings = read_settings(join_path(directory, "tokenizer_config.json"));
  if (const auto text = token_text(settings, "eos_token")) {
    if (const auto id = tokenizer_->find(*text)) eos_.insert(*id);
  }
}

void Model::read_chat(const std::string& directory) {
  has_chat_template_ = is_file(join_path(directory, "chat_template.jinja"));
  chat_file_ = join_path(directory, "chat_prompt.json");
  const json chat = read_settings(chat_file_);
  if (chat.empty()) return;
  const json before = chat.value("before", json()), after = chat.value("after", json());
  const json trim = chat.value("trim", json());
  if (!before.is_string() || !after.is_string() || !trim.is_boolean()) {
    throw artefact_error(chat_file_ + " should have the texts before and after, and trim.");
  }
  chat_ = ChatPrompt{before.get<std::string>(), after.get<std::string>(), trim.get<bool>()};
}

std::vector<std::int32_t> Model::tokenize(const std::string& text, bool add_special,
                                          bool plain) const {
  if (!is_utf8(text)) throw usage_error("The text is not UTF-8; convert it to UTF-8.");
  return tokenizer_->encode(text, add_special, plain);
}

std::vector<std::int32_t> Model::prompt_ids(const std::string& prompt, bool chat) const {
  if (!chat) return tokenize(prompt, true, false);
  if (!is_utf8(prompt)) throw usage_error("The text is not UTF-8; convert it to UTF-8.");
  if (!chat_) {
    throw usage_error(has_chat_template_
                          ? "The model's chat template can be run by gqsa run only (there is no " +
                                chat_file_ + "); give the prompt as the template writes it."
                          : "This model has no chat template, so it cannot chat; give it a prompt "
                            "to continue instead.");
  }
  return chat_ids(chat_->trim ? trimmed(prompt) : prompt);
}

// Only the template writes special tokens: one that is spelled out in the message is plain text.
std::vector<std::int32_t> Model::chat_ids(const std::string& message) const {
  std::vector<std::int32_t> ids;
  const auto put = [&](const std::string& text, bool plain) {
    const std::vector<std::int32_t> part = tokenize(text, false, plain);
    ids.insert(ids.end(), part.begin(), part.end());
  };
  std::vector<std::string> spellings(tokenizer_->special().begin(), tokenizer_->special().end());
  std::stable_sort(spellings.begin(), spellings.end(),
                   [](const auto& a, const auto& b) { return a.size() > b.size(); });
  std::string text = chat_->before;
  for (std::size_t at = 0; at < message.size();) {
    const auto spelled = std::find_if(spellings.begin(), spellings.end(), [&](const auto& each) {
      return message.compare(at, each.size(), each) == 0;
    });
    if (spelled == spellings.end()) {
      text += message[at++];
      continue;
    }
    put(text, false);
    put(*spelled, true);
    text.clear();
    at += spelled->size();
  }
  put(text + chat_->after, false);
  return ids;
}

}  // namespace gqsa
