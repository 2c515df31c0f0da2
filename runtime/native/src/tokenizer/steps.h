// The parts of a tokenizer as lists of steps, read from tokenizer.json.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "config.h"

namespace gqsa {

// normalizer: change a text in place.
using Normalizer = std::vector<std::function<void(std::string&)>>;
Normalizer read_normalizer(const Config& config);

// pre_tokenizer: cut a piece of text, none of which are empty, into smaller ones. `first` marks the
// one that the text begins with.
struct Piece {
  std::string text;
  bool first;
};
using PreTokenizer = std::vector<std::function<void(const Piece&, std::vector<Piece>&)>>;
PreTokenizer read_pre_tokenizer(const Config& config);
std::vector<Piece> pre_tokenize(const PreTokenizer& steps, Piece piece);

// decoder: change a list of tokens, whose texts in a row are the result.
using Decoder = std::vector<std::function<void(std::vector<std::string>&)>>;
Decoder read_decoder(const Config& config);

// post_processor: the tokens around a text.
struct Surroundings {
  std::vector<std::int32_t> before, after;
};
Surroundings read_post_processor(const Config& config);

// Replace every `from`, which is not empty.
void replace_all(std::string& text, const std::string& from, const std::string& to);

}  // namespace gqsa
