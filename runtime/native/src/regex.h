// The patterns of tokenizer.json. They are written for Oniguruma; PCRE2 runs them. What the two
// read differently is translated or refused.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace gqsa {

class Regex {
 public:
  // `where` names the pattern in errors. Throws Error (artefact) for a syntax that is not
  // supported.
  Regex(const std::string& pattern, const std::string& where);
  ~Regex();
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;

  // Call `take(begin, end)` for each match in valid UTF-8 text, in order. Empty matches are left
  // out. Throws Error (artefact) where a match takes too many steps.
  void each(std::string_view text, const std::function<void(std::size_t, std::size_t)>& take) const;

 private:
  struct Compiled;
  std::unique_ptr<Compiled> compiled_;
};

// An Oniguruma pattern as PCRE2 reads the same; throws as Regex does.
std::string translate_pattern(const std::string& pattern, const std::string& where);

}  // namespace gqsa
