// Byte-pair encoding: the model part of tokenizer.json.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "config.h"

namespace gqsa {

class Bpe {
 public:
  explicit Bpe(const Config& config);

  // Append the tokens of a piece of text.
  void encode(std::string_view text, std::vector<std::int32_t>& ids) const;

  std::optional<std::int32_t> find(std::string_view token) const;
  // The token of an id; none where there is no such token.
  std::optional<std::string_view> token(std::int32_t id) const;

 private:
  struct Merge {
    std::int32_t left, right;
    std::uint32_t rank;
    std::int32_t made;
  };
  struct Span {
    std::uint32_t begin = 0, size = 0;
    bool used = false;
  };

  void read_vocabulary(const Config& config);
  void read_merges(const Config& config);
  const Merge* merge(std::int32_t left, std::int32_t right) const;
  std::vector<std::int32_t> characters(std::string_view text) const;

  std::string text_;                  // all tokens
  std::vector<Span> spans_;           // of each id
  std::vector<std::int32_t> sorted_;  // ids by their tokens
  std::vector<Merge> merges_;         // by left and right
  std::vector<std::int32_t> bytes_;   // the tokens of bytes, or -1; empty without byte_fallback
  std::optional<std::int32_t> unknown_;
  bool fuse_unknown_ = false, ignore_merges_ = false;
};

}  // namespace gqsa
