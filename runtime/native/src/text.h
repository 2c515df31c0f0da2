// Tokens to text as they come, and stop strings; as runtime/tokens.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tokenizer/tokenizer.h"

namespace gqsa {

// Turns tokens into text as they come, never giving part of a character. `context` are tokens
// before the first one, whose text is not given: a SentencePiece tokenizer drops the space before a
// text's first word, which a continuation keeps.
class TextDecoder {
 public:
  TextDecoder(const Tokenizer& tokenizer, std::vector<std::int32_t> context)
      : tokenizer_(tokenizer), ids_(std::move(context)), emitted_(ids_.size()) {}

  std::string push(std::int32_t token);
  // What is held back, broken characters included: for the end of a text.
  std::string flush();

 private:
  std::string new_text() const;

  const Tokenizer& tokenizer_;
  std::vector<std::int32_t> ids_;
  std::size_t start_ = 0, emitted_;
};

// Cuts a stream of text at the first stop string, holding back what may become one.
class StopStrings {
 public:
  explicit StopStrings(std::vector<std::string> stops) : stops_(std::move(stops)) {}

  std::string push(const std::string& text);
  std::string flush();
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace gqsa
