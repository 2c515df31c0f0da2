#include "unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "error.h"

namespace gqsa {
namespace {

// Bytes of a whole character that begins at `at`, or 0; `part` is then how many bytes begin one, at
// least 1 (Unicode's table 3-7 of well-formed sequences).
std::size_t whole(std::string_view bytes, std::size_t at, std::size_t& part) {
  const auto byte = [&](std::size_t i) {
    return at + i < bytes.size() ? static_cast<unsigned char>(bytes[at + i]) : 0u;
  };
  const unsigned lead = byte(0);
  part = 1;
  if (lead < 0x80) return 1;
  const std::size_t size = lead >= 0xc2 && lead < 0xe0   ? 2
                           : lead >= 0xe0 && lead < 0xf0 ? 3
                           : lead >= 0xf0 && lead < 0xf5 ? 4
                                                         : 0;
  if (size == 0) return 0;
  const unsigned least = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
  const unsigned most = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
  if (byte(1) < least || byte(1) > most) return 0;
  for (part = 2; part < size; ++part) {
    if (byte(part) >> 6 != 2) return 0;
  }
  return size;
}

}  // namespace

bool is_utf8(std::string_view bytes) {
  std::size_t part = 0;
  for (std::size_t at = 0; at < bytes.size();) {
    const std::size_t size = whole(bytes, at, part);
    if (size == 0) return false;
    at += size;
  }
  return true;
}

std::size_t character_size(std::string_view text, std::size_t at) {
  const auto lead = static_cast<unsigned char>(text[at]);
  const std::size_t size = lead < 0xc0 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  return std::min(size, text.size() - at);
}

char32_t character_at(std::string_view text, std::size_t at) {
  const std::size_t size = character_size(text, at);
  const auto lead = static_cast<unsigned char>(text[at]);
  char32_t character = size == 1 ? lead : lead & (0xffu >> (size + 1));
  for (std::size_t i = 1; i < size; ++i) {
    character = character << 6 | (static_cast<unsigned char>(text[at + i]) & 0x3f);
  }
  return character;
}

void append_utf8(std::string& text, char32_t c) {
  if (c < 0x80) {
    text += static_cast<char>(c);
    return;
  }
  const int more = c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
  static constexpr unsigned kLeads[] = {0, 0xc0, 0xe0, 0xf0};
  text += static_cast<char>(kLeads[more] | c >> (6 * more));
  for (int i = more - 1; i >= 0; --i)
    text += static_cast<char>(0x80 | (c >> (6 * i) & 0x3f));
}

std::size_t count_characters(std::string_view text) {
  std::size_t count = 0;
  for (const char byte : text)
    count += (static_cast<unsigned char>(byte) >> 6) != 2;
  return count;
}

std::string_view skip_characters(std::string_view text, std::size_t count) {
  std::size_t at = 0;
  for (; count > 0 && at < text.size(); --count)
    at += character_size(text, at);
  return text.substr(at);
}

std::string lossy_utf8(std::string_view bytes) {
  std::string text;
  text.reserve(bytes.size());
  std::size_t part = 0;
  for (std::size_t at = 0; at < bytes.size();) {
    const std::size_t size = whole(bytes, at, part);
    if (size > 0) {
      text.append(bytes, at, size);
      at += size;
    } else {
      text += "\xef\xbf\xbd";
      at += part;
    }
  }
  return text;
}

bool is_whitespace(char32_t c) {
  return (c >= 0x09 && c <= 0x0d) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f ||
         c == 0x3000;
}

bool is_numeric(char32_t c) {
  const utf8proc_category_t category = utf8proc_category(static_cast<utf8proc_int32_t>(c));
  return category == UTF8PROC_CATEGORY_ND || category == UTF8PROC_CATEGORY_NL ||
         category == UTF8PROC_CATEGORY_NO;
}

std::string normalize(std::string_view text, Form form) {
  int options = UTF8PROC_STABLE;
  options |= form == Form::nfc || form == Form::nfkc ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE;
  if (form == Form::nfkc || form == Form::nfkd) options |= UTF8PROC_COMPAT;
  utf8proc_uint8_t* made = nullptr;
  const utf8proc_ssize_t size = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                                             static_cast<utf8proc_ssize_t>(text.size()), &made,
                                             static_cast<utf8proc_option_t>(options));
  const std::unique_ptr<utf8proc_uint8_t, void (*)(void*)> owner(made, std::free);
  if (size < 0) {
    throw Error(Kind::runtime,
                std::string("The text cannot be normalised: ") + utf8proc_errmsg(size) + ".");
  }
  return {reinterpret_cast<const char*>(made), static_cast<std::size_t>(size)};
}

}  // namespace gqsa
