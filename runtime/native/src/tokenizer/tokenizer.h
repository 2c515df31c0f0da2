// A tokenizer.json with a BPE model, byte-level or SentencePiece-style: text to tokens and back, as
// Hugging Face's tokenizers does it. What the file uses beyond that is refused by name.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "bpe.h"
#include "steps.h"

namespace gqsa {

class Tokenizer {
 public:
  // Throws Error (artefact).
  static Tokenizer read(const std::string& path);
  Tokenizer(std::string_view json, const std::string& name);

  // Token ids of valid UTF-8. `add_special`: with what the model puts around a text. `plain`:
  // special tokens spelled out in the text are text.
  std::vector<std::int32_t> encode(std::string_view text, bool add_special, bool plain) const;

  std::string decode(const std::int32_t* ids, std::size_t count, bool skip_special) const;
  std::string decode(const std::vector<std::int32_t>& ids) const {
    return decode(ids.data(), ids.size(), true);
  }

  std::optional<std::int32_t> find(const std::string& token) const;

  // The spellings of the special tokens.
  const std::set<std::string>& special() const { return special_; }

 private:
  struct Added {
    std::string text;  // normalised where the normalised text is searched for it
    std::int32_t id;
    bool special, left_strip, right_strip;
  };
  // Added tokens by their first byte, the longest first.
  using Index = std::array<std::vector<Added>, 256>;
  struct Section {
    std::string text;
    std::int32_t id;  // an added token's, or -1
    bool first;       // the whole text begins with it
  };

  void read_added(const Config& config);
  std::vector<Section> cut(const Section& section, const Index& index, bool plain) const;

  Normalizer normalizer_;
  PreTokenizer pre_tokenizer_;
  Decoder decoder_;
  Surroundings surroundings_;
  std::unique_ptr<const Bpe> model_;
  std::unique_ptr<Index> raw_, normalized_;
  std::map<std::int32_t, std::string> added_;
  std::map<std::string, std::int32_t> added_ids_;
  std::set<std::string> special_;
};

}  // namespace gqsa
