// The errors a user can cause: one or two sentences each, as in the Python runtime.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace gqsa {

// The numbers are gqsa_status's.
enum class Kind { artefact = 1, usage = 2, runtime = 3, memory = 4 };

class Error : public std::runtime_error {
 public:
  Error(Kind what_kind, const std::string& message, std::string more = "")
      : std::runtime_error(message), kind(what_kind), detail(std::move(more)) {}

  Kind kind;
  std::string detail;  // for developers, e.g. TVM's own trace
};

inline Error artefact_error(const std::string& message) { return Error(Kind::artefact, message); }
inline Error usage_error(const std::string& message) { return Error(Kind::usage, message); }

// Control characters of an untrusted text would garble a terminal; a long one would drown the rest.
std::string quote(const std::string& text);
// With commas between them.
std::string join(const std::vector<std::string>& words);

}  // namespace gqsa
