#include "files.h"

#include <elf.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "error.h"
#include "sha256.h"

namespace gqsa {
namespace {

using nlohmann::json;

constexpr int kDeepest = 64;  // levels of a JSON document

#if defined(__x86_64__)
constexpr std::uint16_t kMachine = EM_X86_64;
#elif defined(__aarch64__)
constexpr std::uint16_t kMachine = EM_AARCH64;
#else
#error "The native runtime is for x86-64 and aarch64."
#endif

// A file descriptor that closes itself.
class Descriptor {
 public:
  // O_NONBLOCK: to open a pipe waits for nobody, who may never come.
  explicit Descriptor(const std::string& path)
      : fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

Error cannot_read(const std::string& path, const std::string& why) {
  return artefact_error(path + " cannot be read: " + why + ".");
}

// Open a regular file and tell its size.
std::uint64_t size_of(const Descriptor& file, const std::string& path, const std::string& missing) {
  if (file.get() < 0) {
    if (errno == ENOENT) throw artefact_error(missing);
    throw cannot_read(path, std::strerror(errno));
  }
  struct stat status{};
  if (fstat(file.get(), &status) != 0) throw cannot_read(path, std::strerror(errno));
  if (!S_ISREG(status.st_mode)) throw cannot_read(path, "it is not a file");
  return static_cast<std::uint64_t>(status.st_size);
}

}  // namespace

std::string quote(const std::string& text) {
  static const char* digits = "0123456789abcdef";
  std::string result = "'";
  std::size_t end = std::min<std::size_t>(text.size(), 80);
  while (end < text.size() && (static_cast<unsigned char>(text[end]) >> 6) == 2)
    --end;
  for (const char byte : text.substr(0, end)) {
    const auto c = static_cast<unsigned char>(byte);
    if (c < 0x20 || c == 0x7f) {
      result += std::string("\\x") + digits[c >> 4] + digits[c & 15];
    } else {
      result += byte;
    }
  }
  return result + (end < text.size() ? "...'" : "'");
}

std::string join(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words)
    text += (text.empty() ? "" : ", ") + word;
  return text;
}

bool is_file(const std::string& path) {
  struct stat status{};
  return stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode);
}

bool is_directory(const std::string& path) {
  struct stat status{};
  return stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode);
}

std::string join_path(const std::string& directory, const std::string& name) {
  return directory.empty() || directory.back() == '/' ? directory + name : directory + "/" + name;
}

std::string read_file(const std::string& path, std::uint64_t most_bytes,
                      const std::string& missing) {
  Descriptor file(path);
  const std::uint64_t size = size_of(file, path, missing);
  if (size > most_bytes) {
    throw cannot_read(path, "it has " + std::to_string(size) + " bytes, and at most " +
                                std::to_string(most_bytes) + " are read");
  }
  std::string text(size, '\0');
  std::size_t done = 0;
  while (done < text.size()) {
    const ssize_t got = read(file.get(), &text[done], text.size() - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw cannot_read(path, std::strerror(errno));
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  text.resize(done);
  return text;
}

json parse_json(std::string_view text, const std::string& where, bool distinct) {
  std::vector<std::set<std::string>> keys;
  auto watch = [&](int depth, json::parse_event_t event, json& parsed) {
    if (event == json::parse_event_t::object_start || event == json::parse_event_t::array_start) {
      if (depth > kDeepest) throw cannot_read(where, "it is nested too deeply");
    }
    if (distinct && event == json::parse_event_t::object_start) keys.emplace_back();
    if (distinct && event == json::parse_event_t::object_end) keys.pop_back();
    if (distinct && event == json::parse_event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys.back().insert(key).second) {
        throw cannot_read(where, "the key " + quote(key) + " stands twice");
      }
    }
    return true;
  };
  if (text.substr(0, 3) == "\xef\xbb\xbf") throw cannot_read(where, "it begins with a mark");
  try {
    return json::parse(text.begin(), text.end(), watch);
  } catch (const json::parse_error& error) {  // its own words may quote bytes that are no text
    throw cannot_read(where, "it is not JSON at byte " + std::to_string(error.byte));
  } catch (const json::exception&) {
    throw cannot_read(where, "it has a number that is none");
  }
}

json read_settings(const std::string& path) {
  if (!is_file(path)) return json::object();
  json data = parse_json(read_file(path, kMostJsonBytes, ""), path, false);
  if (!data.is_object()) throw artefact_error(path + " should hold one JSON object.");
  return data;
}

Mapping::Mapping(const std::string& path) {
  Descriptor file(path);
  size_ = size_of(file, path, "The artefact is incomplete: there is no " + path + ".");
  if (size_ == 0) throw artefact_error(path + " cannot be mapped: it is empty.");
  void* memory = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (memory == MAP_FAILED) {
    throw artefact_error(path + " cannot be mapped: " + std::strerror(errno) + ".");
  }
  data_ = static_cast<const unsigned char*>(memory);
}

Mapping::~Mapping() { munmap(const_cast<unsigned char*>(data_), size_); }

std::string hash_file(const std::string& path) {
  const Mapping file(path);
  return sha256(file.data(), file.size());
}

void check_shared_library(const std::string& path) {
  const auto refuse = [&](const std::string& what) {
    return artefact_error(path + " " + what + "; copy the artefact or its libraries again.");
  };
  Descriptor file(path);
  const std::uint64_t size =
      size_of(file, path, "The runtime is incomplete: there is no " + path + ".");
  Elf64_Ehdr header{};
  if (pread(file.get(), &header, sizeof header, 0) != static_cast<ssize_t>(sizeof header) ||
      std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_ident[EI_CLASS] != ELFCLASS64 ||
      header.e_type != ET_DYN || header.e_phentsize != sizeof(Elf64_Phdr)) {
    throw refuse("is truncated or is not a shared library");
  }
  if (header.e_machine != kMachine) throw refuse("is for another kind of machine");
  std::vector<Elf64_Phdr> segments(header.e_phnum);
  const auto bytes = segments.size() * sizeof(Elf64_Phdr);
  if (header.e_phoff > size || bytes > size - header.e_phoff ||
      pread(file.get(), segments.data(), bytes, static_cast<off_t>(header.e_phoff)) !=
          static_cast<ssize_t>(bytes)) {
    throw refuse("is truncated");
  }
  for (const Elf64_Phdr& segment : segments) {
    if (segment.p_type == PT_LOAD &&
        (segment.p_offset > size || segment.p_filesz > size - segment.p_offset)) {
      throw refuse("is truncated");
    }
  }
}

}  // namespace gqsa
