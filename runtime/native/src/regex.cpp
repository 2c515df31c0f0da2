#include "regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <cctype>

#include "error.h"
#include "unicode.h"

namespace gqsa {
namespace {

constexpr std::size_t kLongestPattern = 1 << 14;
constexpr std::uint32_t kMostSteps = 10'000'000, kMostHeapKilobytes = 64 << 10;

// White_Space, for inside a class: PCRE2's \s has U+180E too, which has not been one since Unicode
// 6.3.
constexpr const char* kSpaces =
    "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}"
    "\\x{205f}\\x{3000}";

bool is_one_of(char c, std::string_view set) { return set.find(c) != std::string_view::npos; }

// Reads a pattern from left to right and writes what PCRE2 takes for the same.
class Translator {
 public:
  Translator(const std::string& pattern, const std::string& where) : in_(pattern), where_(where) {}

  std::string translate() {
    if (in_.size() > kLongestPattern) throw refuse("it is too long");
    while (at_ < in_.size()) {
      const char c = in_[at_];
      if (c == '\\') {
        escape(false);
      } else if (c == '[') {
        character_class();
      } else if (c == '(') {
        group();
      } else if (c == '{') {
        repetition();
      } else if (is_one_of(c, "^$.")) {
        throw refuse(std::string("it has ") + c);
      } else {
        out_ += in_[at_++];
      }
    }
    return out_;
  }

 private:
  Error refuse(const std::string& what) const {
    return artefact_error(where_ + " has the pattern " + quote(in_) + ", and " + what +
                          ", which this runtime does not support.");
  }

  void escape(bool in_class) {
    const char c = at_ + 1 < in_.size() ? in_[at_ + 1] : '\0';
    if (c == 's' || c == 'S') {
      if (in_class && c == 'S') throw refuse("it has \\S in a class");
      out_ += in_class ? kSpaces : std::string(c == 's' ? "[" : "[^") + kSpaces + "]";
      at_ += 2;
    } else if (c == 'p' || c == 'P') {
      const std::size_t end = in_.find('}', at_);
      if (at_ + 2 >= in_.size() || in_[at_ + 2] != '{' || end == std::string::npos) {
        throw refuse("it has \\p without {...}");
      }
      out_ += in_.substr(at_, end + 1 - at_);
      at_ = end + 1;
    } else if (c == 'd' || is_one_of(c, "rntfv")) {
      out_ += c == 'd' ? "\\p{Nd}" : c == 'v' ? "\\x{b}" : in_.substr(at_, 2);
      at_ += 2;
    } else if (c != '\0' && static_cast<unsigned char>(c) < 0x80 && std::ispunct(c) != 0) {
      out_ += in_.substr(at_, 2);
      at_ += 2;
    } else {
      throw refuse("it has \\" + std::string(1, c == '\0' ? '?' : c));
    }
  }

  void character_class() {
    out_ += in_[at_++];
    if (at_ < in_.size() && in_[at_] == '^') out_ += in_[at_++];
    if (at_ < in_.size() && in_[at_] == ']') throw refuse("it has an empty class");
    while (at_ < in_.size() && in_[at_] != ']') {
      if (in_[at_] == '\\') {
        escape(true);
      } else if (in_[at_] == '[' || in_.compare(at_, 2, "&&") == 0) {
        throw refuse("it has a class in a class");
      } else {
        out_ += in_[at_++];
      }
    }
    if (at_ == in_.size()) throw refuse("a class in it has no end");
    out_ += in_[at_++];
  }

  void group() {
    for (const std::string_view open : {"(?:", "(?i:", "(?=", "(?!", "(?<=", "(?<!", "(?>"}) {
      if (in_.compare(at_, open.size(), open) == 0) {
        out_ += open;
        at_ += open.size();
        return;
      }
    }
    if (in_.compare(at_, 2, "(?") == 0 || in_.compare(at_, 2, "(*") == 0) {
      throw refuse("it has " + quote(in_.substr(at_, 4)));
    }
    out_ += in_[at_++];
  }

  void repetition() {
    const std::size_t end = in_.find('}', at_);
    if (end == std::string::npos || end == at_ + 1 || end > at_ + 12 ||
        in_.find_first_not_of("0123456789,", at_ + 1) != end) {
      throw refuse("it has a { that begins no number of times");
    }
    // In Oniguruma {n,m}+ repeats the repetition; in PCRE2 it is possessive.
    if (end + 1 < in_.size() && in_[end + 1] == '+') throw refuse("it has {...}+");
    if (in_[at_ + 1] == ',') {
      out_ += "{0";  // {,m}
      ++at_;
    }
    out_ += in_.substr(at_, end + 1 - at_);
    at_ = end + 1;
  }

  const std::string& in_;
  const std::string& where_;
  std::string out_;
  std::size_t at_ = 0;
};

}  // namespace

std::string translate_pattern(const std::string& pattern, const std::string& where) {
  return Translator(pattern, where).translate();
}

struct Regex::Compiled {
  std::string where;
  pcre2_code* code = nullptr;
  pcre2_match_context* limits = nullptr;

  ~Compiled() {
    pcre2_match_context_free(limits);
    pcre2_code_free(code);
  }
};

Regex::Regex(const std::string& pattern, const std::string& where)
    : compiled_(std::make_unique<Compiled>()) {
  const std::string translated = translate_pattern(pattern, where);
  int error = 0;
  PCRE2_SIZE offset = 0;
  compiled_->where = where;
  compiled_->code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &offset, nullptr);
  compiled_->limits = pcre2_match_context_create(nullptr);
  if (compiled_->code == nullptr || compiled_->limits == nullptr) {
    PCRE2_UCHAR text[128] = {};
    pcre2_get_error_message(error, text, sizeof text);
    throw artefact_error(where + " has the pattern " + quote(pattern) +
                         ", which cannot be read: " + reinterpret_cast<const char*>(text) + ".");
  }
  pcre2_set_match_limit(compiled_->limits, kMostSteps);
  pcre2_set_heap_limit(compiled_->limits, kMostHeapKilobytes);
}

Regex::~Regex() = default;
Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;

void Regex::each(std::string_view text,
                 const std::function<void(std::size_t, std::size_t)>& take) const {
  const std::unique_ptr<pcre2_match_data, void (*)(pcre2_match_data*)> match(
      pcre2_match_data_create_from_pattern(compiled_->code, nullptr), pcre2_match_data_free);
  if (match == nullptr) throw Error(Kind::memory, "There is not enough memory to cut the text.");
  for (std::size_t at = 0; at < text.size();) {
    const int found =
        pcre2_match(compiled_->code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), at,
                    PCRE2_NO_UTF_CHECK, match.get(), compiled_->limits);
    if (found == PCRE2_ERROR_NOMATCH) return;
    if (found < 0) {
      throw artefact_error(compiled_->where +
                           " has a pattern that takes too many steps on this text.");
    }
    const PCRE2_SIZE* span = pcre2_get_ovector_pointer(match.get());
    if (span[1] > span[0]) {
      take(span[0], span[1]);
      at = span[1];
    } else {
      const std::size_t next = std::max<std::size_t>(span[0], at);
      at = next < text.size() ? next + character_size(text, next) : text.size();
    }
  }
}

}  // namespace gqsa
