#include "text.h"

#include <algorithm>

#include "unicode.h"

namespace gqsa {
namespace {

constexpr std::string_view kBroken = "\xef\xbf\xbd";  // U+FFFD

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

}  // namespace

std::string TextDecoder::new_text() const {
  const std::int32_t* first = ids_.data() + start_;
  const std::string before = tokenizer_.decode(first, emitted_ - start_, true);
  const std::string text = tokenizer_.decode(first, ids_.size() - start_, true);
  return std::string(skip_characters(text, count_characters(before)));
}

std::string TextDecoder::push(std::int32_t token) {
  ids_.push_back(token);
  std::string text = new_text();
  if (text.empty() || ends_with(text, kBroken)) return "";
  // The emitted tokens stay as context for the next ones, those before them can go.
  start_ = emitted_;
  emitted_ = ids_.size();
  return text;
}

std::string TextDecoder::flush() {
  std::string text = new_text();
  start_ = emitted_ = ids_.size();
  return text;
}

std::string StopStrings::push(const std::string& text) {
  if (stopped_) return "";
  std::string held = held_ + text;
  std::size_t end = std::string::npos, size = 0;  // of what is complete first; the longest of those
  for (const std::string& stop : stops_) {
    const std::size_t at = held.find(stop);
    if (at == std::string::npos) continue;
    if (at + stop.size() < end || (at + stop.size() == end && stop.size() > size)) {
      end = at + stop.size();
      size = stop.size();
    }
  }
  if (end != std::string::npos) {
    stopped_ = true;
    held_.clear();
    return held.substr(0, end - size);
  }
  std::size_t keep = 0;
  for (const std::string& stop : stops_) {
    for (std::size_t n = std::min(held.size(), stop.size() - 1); n > keep; --n) {
      if (ends_with(held, std::string_view(stop).substr(0, n))) keep = n;
    }
  }
  held_ = held.substr(held.size() - keep);
  return held.substr(0, held.size() - keep);
}

std::string StopStrings::flush() {
  std::string held;
  held.swap(held_);
  return held;
}

}  // namespace gqsa
