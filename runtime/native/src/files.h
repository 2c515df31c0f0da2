// Files of an artefact: untrusted, so sizes are limited and everything is checked before it is
// used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace gqsa {

constexpr std::uint64_t kMostJsonBytes = 100'000'000;

bool is_file(const std::string& path);
bool is_directory(const std::string& path);
std::string join_path(const std::string& directory, const std::string& name);

// A whole file; `missing` is the error where there is none. Throws Error (artefact).
std::string read_file(const std::string& path, std::uint64_t most_bytes,
                      const std::string& missing);

// A JSON document of at most kMostJsonBytes and 64 levels; `distinct` refuses a key that stands
// twice in an object. Throws Error (artefact), naming `where`.
nlohmann::json parse_json(std::string_view text, const std::string& where, bool distinct);

// An optional JSON object: empty where there is no such file.
nlohmann::json read_settings(const std::string& path);

// A file mapped for reading. Pages are read when they are first used.
class Mapping {
 public:
  explicit Mapping(const std::string& path);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  const unsigned char* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  const unsigned char* data_ = nullptr;
  std::size_t size_ = 0;
};

// The SHA-256 of a file in hexadecimal.
std::string hash_file(const std::string& path);

// Refuse a shared library that is truncated or for another machine: the dynamic loader would crash
// on the first and explain the second badly.
void check_shared_library(const std::string& path);

}  // namespace gqsa
