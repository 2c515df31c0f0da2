// gqsa-probe fuzz manifest|params|tokenizer FILE SEED COUNT: mutated copies of a file to its
// reader. For params, FILE is the manifest's and the parameters lie beside it.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cctype>
#include <iostream>
#include <random>
#include <stdexcept>

#include "error.h"
#include "files.h"
#include "manifest.h"
#include "params.h"
#include "probe.h"
#include "tokenizer/tokenizer.h"

namespace {

using Random = std::mt19937_64;

constexpr std::uint64_t kMost = 1 << 26;

std::size_t below(Random& random, std::size_t limit) { return limit == 0 ? 0 : random() % limit; }

// What numbers, names and texts are turned into.
const std::vector<std::string>& morsels() {
  static const std::vector<std::string> list = {"-1",
                                                "0",
                                                "1",
                                                "2147483648",
                                                "4294967296",
                                                "9223372036854775807",
                                                "9223372036854775808",
                                                "18446744073709551615",
                                                "1e999",
                                                "-1e5",
                                                "0.5",
                                                "null",
                                                "true",
                                                "[]",
                                                "{}",
                                                "[[]]",
                                                "\"\"",
                                                "\"\\u0000\"",
                                                "\"\\ud800\"",
                                                "\"..\"",
                                                "\"/etc/passwd\"",
                                                "\"\\p{\"",
                                                "\"(?<=a+)b\"",
                                                "\"(a*)*b\"",
                                                "\"NFC\"",
                                                "\"Sequence\"",
                                                "\"Metaspace\"",
                                                "\"Replace\"",
                                                "\"Strip\"",
                                                "\xff",
                                                "\xc0\x80",
                                                ",",
                                                ":",
                                                "\"",
                                                "{",
                                                "}",
                                                "[",
                                                "]",
                                                "{\"String\":\"\"}",
                                                "{\"String\":\"a\"}"};
  return list;
}

// The next number, text or word at or after a place: [begin, end).
std::pair<std::size_t, std::size_t> token_at(const std::string& text, std::size_t from) {
  const std::size_t begin = text.find_first_of("\"0123456789tfn-", from);
  if (begin == std::string::npos) return {text.size(), text.size()};
  std::size_t end = begin + 1;
  if (text[begin] == '"') {
    while (end < text.size() && text[end] != '"')
      end += text[end] == '\\' ? 2 : 1;
    return {begin, std::min(end + 1, text.size())};
  }
  while (end < text.size() && (std::isalnum(static_cast<unsigned char>(text[end])) != 0 ||
                               text[end] == '.' || text[end] == '-')) {
    ++end;
  }
  return {begin, end};
}

void mutate(std::string& text, Random& random) {
  const std::size_t at = below(random, text.size());
  const std::string& morsel = morsels()[below(random, morsels().size())];
  switch (below(random, 8)) {
    case 0:
      if (!text.empty()) text[at] = static_cast<char>(random());
      break;
    case 1:
      if (!text.empty()) text[at] = static_cast<char>(text[at] ^ (1 << below(random, 8)));
      break;
    case 2:
      text.erase(at, 1 + below(random, 40));
      break;
    case 3:
      text.insert(at, morsel);
      break;
    case 4:
      text.insert(at, text.substr(below(random, text.size()), below(random, 200)));
      break;
    case 5:
      if (below(random, 4) == 0) text.resize(at);
      break;
    default: {
      const auto [begin, end] = token_at(text, at);
      text.replace(begin, end - begin, morsel);
    }
  }
}

// Bytes as a file with a name.
class MemoryFile {
 public:
  explicit MemoryFile(const std::string& bytes)
      : fd_(memfd_create("fuzz", MFD_CLOEXEC)), path_("/proc/self/fd/" + std::to_string(fd_)) {
    if (fd_ < 0 || write(fd_, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size())) {
      throw std::runtime_error("memfd");
    }
  }
  ~MemoryFile() { close(fd_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  const std::string& path() const { return path_; }

 private:
  int fd_;
  std::string path_;
};

void use_tokenizer(const std::string& json) {
  const gqsa::Tokenizer tokenizer(json, "tokenizer.json");
  for (const bool plain : {false, true}) {
    const std::string text =
        "The quick  brown <|im_end|> fox\n\n 123 caf\u00e9 \u4e2d\u6587 \U0001f600's ";
    std::vector<std::int32_t> ids = tokenizer.encode(text, true, plain);
    for (std::int32_t id : {0, 1, 255, 300, 1 << 23, 0x7fffffff, -1})
      ids.push_back(id);
    tokenizer.decode(ids.data(), ids.size(), plain);
  }
}

// Read the bytes of every parameter: what was accepted must be there.
void use_parameters(const std::string& bytes, const gqsa::Manifest& manifest) {
  const MemoryFile file(bytes);
  const gqsa::Parameters found = gqsa::map_parameters(file.path(), manifest.parameters, false);
  unsigned sum = 0;
  for (const gqsa::ParameterView& view : found.views) {
    for (std::size_t i = 0; i < view.bytes; i += 512)
      sum += view.data[i];
    if (view.bytes > 0) sum += view.data[view.bytes - 1];
  }
  if (sum == 1) std::cerr << ' ';  // so that it is computed
}

}  // namespace

int fuzz(const std::vector<std::string>& words) {
  const std::string &kind = words.at(0), &path = words.at(1);
  Random random(std::stoull(words.at(2)));
  const long count = std::stol(words.at(3));
  std::string original = gqsa::read_file(path, kMost, path);
  gqsa::Manifest manifest;
  std::size_t header = original.size();
  if (kind == "params") {
    manifest = gqsa::parse_manifest(original, path);
    original = gqsa::read_file(path.substr(0, path.rfind('/') + 1) + manifest.parameters_file,
                               kMost, path);
    header = original.find_last_not_of(' ', original.find("  ")) + 64;  // its text, then padding
  }
  long accepted = 0;
  for (long i = 0; i < count; ++i) {
    std::string head = original.substr(0, header);
    for (std::size_t n = 1 + below(random, 4); n > 0; --n)
      mutate(head, random);
    const std::string mutant = head + original.substr(std::min(header, original.size()));
    try {
      if (kind == "manifest") {
        gqsa::parse_manifest(mutant, "manifest.json");
      } else if (kind == "params") {
        use_parameters(mutant, manifest);
      } else {
        use_tokenizer(mutant);
      }
      ++accepted;
    } catch (const gqsa::Error& error) {
      const std::string said = error.what();
      if (said.empty() || said.find('\n') != std::string::npos || said.size() > 1000) {
        std::cerr << "not one sentence: " << said << "\n";
        return 1;
      }
    }
  }
  std::cout << kind << ": " << count << " mutants, " << accepted << " accepted\n";
  return 0;
}
