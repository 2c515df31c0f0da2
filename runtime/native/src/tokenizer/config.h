// Reading tokenizer.json: every part is an object with a "type", and what is not supported is
// refused by name rather than left out.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "../error.h"

namespace gqsa {

// A part of the document and its place in it, for errors.
struct Config {
  const nlohmann::json& node;
  std::string file, place;

  // The part at a key; the document's null is a part too. Throws where there is none.
  Config at(const char* key) const;
  Config item(std::size_t index) const;
  bool has(const char* key) const;  // and it is not null
  bool is_null() const { return node.is_null(); }
  const nlohmann::json& list() const;  // throws where it is none

  std::string type() const { return text("type"); }
  std::string text(const char* key) const;
  std::string text() const;
  bool flag(const char* key, bool otherwise) const;
  std::int64_t integer(const char* key) const;

  Error damaged(const std::string& what) const;
  // `what` is used and this runtime cannot.
  Error unsupported(const std::string& what) const;
};

}  // namespace gqsa
