#include "tokenizer.h"

#include <algorithm>

#include "../files.h"
#include "../unicode.h"

namespace gqsa {
namespace {

constexpr std::int64_t kMostTokens = 1 << 24;

}  // namespace

Tokenizer Tokenizer::read(const std::string& path) {
  const std::string missing = "The artefact is incomplete: there is no " + path + ".";
  return Tokenizer(read_file(path, kMostJsonBytes, missing), path);
}

Tokenizer::Tokenizer(std::string_view json, const std::string& name)
    : raw_(std::make_unique<Index>()), normalized_(std::make_unique<Index>()) {
  const nlohmann::json data = parse_json(json, name, false);
  const Config config{data, name, ""};
  if (!data.is_object()) throw config.damaged("should be an object");
  normalizer_ = read_normalizer(config.at("normalizer"));
  pre_tokenizer_ = read_pre_tokenizer(config.at("pre_tokenizer"));
  decoder_ = read_decoder(config.at("decoder"));
  surroundings_ = read_post_processor(config.at("post_processor"));
  model_ = std::make_unique<const Bpe>(config.at("model"));
  read_added(config.at("added_tokens"));
}

void Tokenizer::read_added(const Config& config) {
  if (config.is_null()) return;
  for (std::size_t i = 0; i < config.list().size(); ++i) {
    const Config token = config.item(i);
    Added added{token.text("content"), 0, token.flag("special", false), token.flag("lstrip", false),
                token.flag("rstrip", false)};
    if (added.text.empty()) continue;
    if (token.flag("single_word", false)) throw token.unsupported("a single_word token");
    const std::int64_t id = token.integer("id");
    const std::optional<std::int32_t> known = model_->find(added.text);
    if (id < 0 || id >= kMostTokens || (known && *known != id)) {
      throw token.damaged("has another id than its vocabulary");
    }
    added.id = static_cast<std::int32_t>(id);
    if (!added_.emplace(added.id, added.text).second)
      throw token.damaged("has an id that is taken");
    added_ids_[added.text] = added.id;
    if (added.special) special_.insert(added.text);
    const bool normalized = token.flag("normalized", true);
    if (normalized) {  // which is also how the token reads when it is decoded
      for (const auto& step : normalizer_)
        step(added.text);
      added_[added.id] = added.text;
      if (added.text.empty()) continue;
    }
    Index& index = normalized ? *normalized_ : *raw_;
    index[static_cast<unsigned char>(added.text[0])].push_back(added);
  }
  for (Index* index : {raw_.get(), normalized_.get()}) {
    for (auto& list : *index) {
      std::stable_sort(list.begin(), list.end(), [](const Added& a, const Added& b) {
        return a.text.size() > b.text.size();
      });
    }
  }
}

// Cut a text at the added tokens in it: from left to right, and of several the longest.
std::vector<Tokenizer::Section> Tokenizer::cut(const Section& section, const Index& index,
                                               bool plain) const {
  const std::string& text = section.text;
  std::vector<Section> sections;
  std::size_t start = 0;
  const auto put = [&](std::size_t begin, std::size_t end, std::int32_t id) {
    if (begin < end) {
      sections.push_back({text.substr(begin, end - begin), id, section.first && begin == 0});
    }
  };
  for (std::size_t at = 0; at < text.size();) {
    const auto& list = index[static_cast<unsigned char>(text[at])];
    const auto found = std::find_if(list.begin(), list.end(), [&](const Added& token) {
      return text.compare(at, token.text.size(), token.text) == 0;
    });
    if (found == list.end()) {
      ++at;
      continue;
    }
    std::size_t begin = at, end = at + found->text.size();
    at = end;
    if (plain && found->special) continue;
    if (found->left_strip) {
      for (std::size_t i = begin; i > start;) {
        do
          --i;
        while (i > start && (static_cast<unsigned char>(text[i]) >> 6) == 2);
        if (!is_whitespace(character_at(text, i))) break;
        begin = i;
      }
    }
    if (found->right_strip) {
      while (end < text.size() && is_whitespace(character_at(text, end))) {
        end += character_size(text, end);
      }
    }
    put(start, begin, -1);
    put(std::max(begin, start), std::max(end, start), found->id);
    start = std::max(end, start);
    at = std::max(at, start);
  }
  put(start, text.size(), -1);
  return sections;
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text, bool add_special,
                                            bool plain) const {
  std::vector<std::int32_t> ids;
  if (add_special) ids = surroundings_.before;
  for (Section& outer : cut({std::string(text), -1, true}, *raw_, plain)) {
    if (outer.id >= 0) {
      ids.push_back(outer.id);
      continue;
    }
    for (const auto& step : normalizer_)
      step(outer.text);
    for (Section& inner : cut(outer, *normalized_, plain)) {
      if (inner.id >= 0) {
        ids.push_back(inner.id);
        continue;
      }
      for (const Piece& piece : pre_tokenize(pre_tokenizer_, {inner.text, inner.first})) {
        model_->encode(piece.text, ids);
      }
    }
  }
  if (add_special) ids.insert(ids.end(), surroundings_.after.begin(), surroundings_.after.end());
  return ids;
}

std::string Tokenizer::decode(const std::int32_t* ids, std::size_t count, bool skip_special) const {
  std::vector<std::string> tokens;
  for (std::size_t i = 0; i < count; ++i) {
    const auto added = added_.find(ids[i]);
    std::optional<std::string_view> token = added != added_.end()
                                                ? std::optional<std::string_view>(added->second)
                                                : model_->token(ids[i]);
    if (!token) continue;
    std::string text(*token);
    if (!skip_special || special_.count(text) == 0) tokens.push_back(std::move(text));
  }
  for (const auto& step : decoder_)
    step(tokens);
  std::string text;
  for (const std::string& token : tokens)
    text += token;
  return text;
}

std::optional<std::int32_t> Tokenizer::find(const std::string& token) const {
  const auto added = added_ids_.find(token);
  return added != added_ids_.end() ? std::optional<std::int32_t>(added->second)
                                   : model_->find(token);
}

}  // namespace gqsa
