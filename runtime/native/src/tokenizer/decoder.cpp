#include "../unicode.h"
#include "byte_level.h"
#include "steps.h"

namespace gqsa {
namespace {

using Tokens = std::vector<std::string>;

std::string join(const Tokens& tokens) {
  std::string text;
  for (const std::string& token : tokens)
    text += token;
  return text;
}

// A byte's token, "<0x0A>": its value, or -1.
int byte_token(const std::string& token) {
  if (token.size() != 6 || token.compare(0, 3, "<0x") != 0 || token[5] != '>') return -1;
  int value = 0;
  for (int i = 3; i < 5; ++i) {
    const char c = token[i];
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                             : -1;
    if (digit < 0) return -1;
    value = value * 16 + digit;
  }
  return value;
}

// Join the tokens of bytes; bytes that are no text become as many U+FFFD.
void byte_fallback(Tokens& tokens) {
  Tokens made;
  std::string bytes;
  const auto flush = [&] {
    if (bytes.empty()) return;
    if (is_utf8(bytes)) {
      made.push_back(bytes);
    } else {
      for (std::size_t i = 0; i < bytes.size(); ++i)
        made.emplace_back("\xef\xbf\xbd");
    }
    bytes.clear();
  };
  for (std::string& token : tokens) {
    const int byte = byte_token(token);
    if (byte >= 0) {
      bytes += static_cast<char>(byte);
    } else {
      flush();
      made.push_back(std::move(token));
    }
  }
  flush();
  tokens = std::move(made);
}

// Cut at most `start` and `stop` times `content`, one character, off the ends.
void strip(std::string& token, const std::string& content, std::int64_t start, std::int64_t stop) {
  const auto size = content.size();
  for (; start > 0 && token.compare(0, size, content) == 0; --start)
    token.erase(0, size);
  for (; stop > 0 && token.size() >= size && token.compare(token.size() - size, size, content) == 0;
       --stop) {
    token.resize(token.size() - size);
  }
}

void add(const Config& config, Decoder& steps) {
  const std::string type = config.type();
  if (type == "Sequence") {
    const Config inner = config.at("decoders");
    for (std::size_t i = 0; i < inner.list().size(); ++i)
      add(inner.item(i), steps);
  } else if (type == "ByteLevel") {
    steps.push_back([](Tokens& tokens) {
      std::string bytes;
      for (const std::string& token : tokens)
        bytes += characters_to_bytes(token);
      tokens = {lossy_utf8(bytes)};
    });
  } else if (type == "ByteFallback") {
    steps.push_back(byte_fallback);
  } else if (type == "Fuse") {
    steps.push_back([](Tokens& tokens) { tokens = {join(tokens)}; });
  } else if (type == "Strip") {
    const std::string content = config.text("content");
    const std::int64_t start = config.integer("start"), stop = config.integer("stop");
    if (count_characters(content) != 1) throw config.damaged("should have one character");
    steps.push_back([=](Tokens& tokens) {
      for (std::string& token : tokens)
        strip(token, content, start, stop);
    });
  } else if (type == "Replace") {
    const Config pattern = config.at("pattern");
    if (!pattern.has("String")) throw config.unsupported("a Replace of a pattern");
    const std::string from = pattern.text("String"), to = config.text("content");
    if (from.empty()) throw pattern.damaged("is empty");
    steps.push_back([from, to](Tokens& tokens) {
      for (std::string& token : tokens)
        replace_all(token, from, to);
    });
  } else if (type == "Metaspace") {
    const std::string mark = config.text("replacement");
    if (mark.empty()) throw config.damaged("has no replacement");
    bool cut = !config.has("prepend_scheme") || config.text("prepend_scheme") != "never";
    if (!config.flag("add_prefix_space", true)) cut = false;
    steps.push_back([mark, cut](Tokens& tokens) {
      for (std::size_t i = 0; i < tokens.size(); ++i) {
        replace_all(tokens[i], mark, i == 0 && cut ? "" : " ");
      }
    });
  } else {
    throw config.unsupported("the decoder " + quote(type));
  }
}

}  // namespace

Decoder read_decoder(const Config& config) {
  Decoder steps;
  if (config.is_null()) {
    steps.push_back([](Tokens& tokens) {
      for (std::size_t i = 1; i < tokens.size(); ++i)
        tokens[i].insert(0, " ");
    });
  } else {
    add(config, steps);
  }
  return steps;
}

}  // namespace gqsa
