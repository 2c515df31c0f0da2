#include <algorithm>
#include <memory>

#include "../regex.h"
#include "../unicode.h"
#include "byte_level.h"
#include "steps.h"

namespace gqsa {
namespace {

// GPT-2's cut into words, which ByteLevel makes by itself.
constexpr const char* kWords =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// A part of a piece of text.
struct Span {
  std::size_t begin, end;
  bool matches;
};

// Calls its argument for every match in a text, in order.
using Finder =
    std::function<void(const std::string&, const std::function<void(std::size_t, std::size_t)>&)>;

// The matches and what lies between them, which together are the text.
std::vector<Span> cut(const std::string& text, const Finder& find, bool invert) {
  std::vector<Span> spans;
  std::size_t at = 0;
  find(text, [&](std::size_t begin, std::size_t end) {
    if (at < begin) spans.push_back({at, begin, invert});
    spans.push_back({begin, end, !invert});
    at = end;
  });
  if (at < text.size()) spans.push_back({at, text.size(), invert});
  return spans;
}

enum class Behavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };

Behavior read_behavior(const Config& config) {
  const std::string name = config.text();
  if (name == "Removed") return Behavior::removed;
  if (name == "Isolated") return Behavior::isolated;
  if (name == "MergedWithPrevious") return Behavior::merged_with_previous;
  if (name == "MergedWithNext") return Behavior::merged_with_next;
  if (name == "Contiguous") return Behavior::contiguous;
  throw config.unsupported("the behavior " + quote(name));
}

// Join a match to the span before it; of several matches in a row only the first.
std::vector<Span> merge_back(const std::vector<Span>& spans) {
  std::vector<Span> merged;
  bool previous = false;
  for (const Span& span : spans) {
    if (span.matches && !previous && !merged.empty()) {
      merged.back().end = span.end;
    } else {
      merged.push_back(span);
    }
    previous = span.matches;
  }
  return merged;
}

std::vector<Span> merge_forward(std::vector<Span> spans) {
  std::vector<Span> merged;
  bool previous = false;
  for (auto span = spans.rbegin(); span != spans.rend(); ++span) {
    if (span->matches && !previous && !merged.empty()) {
      merged.back().begin = span->begin;
    } else {
      merged.push_back(*span);
    }
    previous = span->matches;
  }
  std::reverse(merged.begin(), merged.end());
  return merged;
}

std::vector<Span> behave(std::vector<Span> spans, Behavior behavior) {
  switch (behavior) {
    case Behavior::removed:
      spans.erase(std::remove_if(spans.begin(), spans.end(), [](auto& s) { return s.matches; }),
                  spans.end());
      return spans;
    case Behavior::merged_with_previous:
      return merge_back(spans);
    case Behavior::merged_with_next:
      return merge_forward(std::move(spans));
    case Behavior::contiguous: {
      std::vector<Span> joined;
      for (const Span& span : spans) {
        if (!joined.empty() && joined.back().matches == span.matches) {
          joined.back().end = span.end;
        } else {
          joined.push_back(span);
        }
      }
      return joined;
    }
    case Behavior::isolated:
      break;
  }
  return spans;
}

void put(const Piece& piece, const std::vector<Span>& spans, std::vector<Piece>& out) {
  for (const Span& span : spans) {
    if (span.end > span.begin) {
      out.push_back(
          {piece.text.substr(span.begin, span.end - span.begin), piece.first && span.begin == 0});
    }
  }
}

Finder find_pattern(const std::string& pattern, const std::string& where) {
  const auto regex = std::make_shared<const Regex>(pattern, where);
  return [regex](const std::string& text, const auto& take) { regex->each(text, take); };
}

Finder find_text(const std::string& wanted) {
  return [wanted](const std::string& text, const auto& take) {
    for (std::size_t at = 0; (at = text.find(wanted, at)) != std::string::npos;
         at += wanted.size()) {
      take(at, at + wanted.size());
    }
  };
}

Finder find_digits() {
  return [](const std::string& text, const auto& take) {
    for (std::size_t at = 0, size; at < text.size(); at += size) {
      size = character_size(text, at);
      if (is_numeric(character_at(text, at))) take(at, at + size);
    }
  };
}

void add_split(const Config& config, PreTokenizer& steps) {
  const Config pattern = config.at("pattern");
  Finder find;
  if (pattern.has("Regex")) {
    find = find_pattern(pattern.text("Regex"), config.file);
  } else {
    const std::string wanted = pattern.text("String");
    if (wanted.empty()) throw pattern.damaged("is empty");
    find = find_text(wanted);
  }
  const Behavior behavior = read_behavior(config.at("behavior"));
  const bool invert = config.flag("invert", false);
  steps.push_back([find, behavior, invert](const Piece& piece, std::vector<Piece>& out) {
    put(piece, behave(cut(piece.text, find, invert), behavior), out);
  });
}

void add_byte_level(const Config& config, PreTokenizer& steps) {
  const bool space = config.flag("add_prefix_space", true);
  const Finder find = config.flag("use_regex", true) ? find_pattern(kWords, config.file) : nullptr;
  steps.push_back([space, find](const Piece& piece, std::vector<Piece>& out) {
    Piece whole = piece;
    if (space && whole.text.front() != ' ') whole.text.insert(0, " ");
    const std::size_t begin = out.size();
    if (find) {
      put(whole, cut(whole.text, find, false), out);
    } else {
      out.push_back(whole);
    }
    for (std::size_t i = begin; i < out.size(); ++i)
      out[i].text = bytes_to_characters(out[i].text);
  });
}

void add_metaspace(const Config& config, PreTokenizer& steps) {
  const std::string mark = config.text("replacement");
  if (mark.empty()) throw config.damaged("has no replacement");
  std::string scheme = config.has("prepend_scheme") ? config.text("prepend_scheme") : "always";
  if (!config.flag("add_prefix_space", true)) scheme = "never";
  if (scheme != "always" && scheme != "first" && scheme != "never") {
    throw config.unsupported("the prepend scheme " + quote(scheme));
  }
  const bool split = config.flag("split", true);
  const Finder find = find_text(mark);
  steps.push_back([=](const Piece& piece, std::vector<Piece>& out) {
    Piece whole = piece;
    replace_all(whole.text, " ", mark);
    if (whole.text.rfind(mark, 0) != 0 &&
        (scheme == "always" || (scheme == "first" && piece.first))) {
      whole.text.insert(0, mark);
    }
    if (split) {
      put(whole, behave(cut(whole.text, find, false), Behavior::merged_with_next), out);
    } else {
      out.push_back(whole);
    }
  });
}

void add(const Config& config, PreTokenizer& steps) {
  const std::string type = config.type();
  if (type == "Sequence") {
    const Config inner = config.at("pretokenizers");
    for (std::size_t i = 0; i < inner.list().size(); ++i)
      add(inner.item(i), steps);
  } else if (type == "Split") {
    add_split(config, steps);
  } else if (type == "ByteLevel") {
    add_byte_level(config, steps);
  } else if (type == "Digits") {
    const Behavior behavior =
        config.flag("individual_digits", false) ? Behavior::isolated : Behavior::contiguous;
    steps.push_back([behavior](const Piece& piece, std::vector<Piece>& out) {
      put(piece, behave(cut(piece.text, find_digits(), false), behavior), out);
    });
  } else if (type == "Metaspace") {
    add_metaspace(config, steps);
  } else {
    throw config.unsupported("the pre-tokenizer " + quote(type));
  }
}

}  // namespace

PreTokenizer read_pre_tokenizer(const Config& config) {
  PreTokenizer steps;
  if (!config.is_null()) add(config, steps);
  return steps;
}

std::vector<Piece> pre_tokenize(const PreTokenizer& steps, Piece piece) {
  std::vector<Piece> pieces;
  if (!piece.text.empty()) pieces.push_back(std::move(piece));
  for (const auto& step : steps) {
    std::vector<Piece> cut;
    for (const Piece& each : pieces)
      step(each, cut);
    pieces = std::move(cut);
  }
  return pieces;
}

}  // namespace gqsa
