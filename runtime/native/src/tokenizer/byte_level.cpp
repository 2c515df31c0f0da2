#include "byte_level.h"

#include <array>

#include "../unicode.h"

namespace gqsa {
namespace {

struct Tables {
  std::array<char32_t, 256> characters;
  std::array<int, 0x144> bytes;  // -1: stands for none

  Tables() {
    bytes.fill(-1);
    // Printable bytes stand for themselves, the others for the characters from U+0100 on.
    char32_t next = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
      const bool printable =
          (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
      characters[byte] = printable ? static_cast<char32_t>(byte) : next++;
      bytes[characters[byte]] = byte;
    }
  }
};

const Tables& tables() {
  static const Tables made;
  return made;
}

}  // namespace

std::string bytes_to_characters(std::string_view bytes) {
  std::string text;
  for (const char byte : bytes) {
    append_utf8(text, tables().characters[static_cast<unsigned char>(byte)]);
  }
  return text;
}

std::string characters_to_bytes(std::string_view token) {
  std::string bytes;
  for (std::size_t at = 0; at < token.size(); at += character_size(token, at)) {
    const char32_t c = character_at(token, at);
    const int byte = c < tables().bytes.size() ? tables().bytes[c] : -1;
    if (byte < 0) return std::string(token);
    bytes += static_cast<char>(byte);
  }
  return bytes;
}

}  // namespace gqsa
