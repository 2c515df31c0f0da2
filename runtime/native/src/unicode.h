// UTF-8 and what Unicode says of characters.
#pragma once

#include <string>
#include <string_view>

namespace gqsa {

bool is_utf8(std::string_view bytes);

// Bytes of the character that begins at `at` of valid UTF-8.
std::size_t character_size(std::string_view text, std::size_t at);
char32_t character_at(std::string_view text, std::size_t at);
void append_utf8(std::string& text, char32_t character);
std::size_t count_characters(std::string_view text);
// The text after its first `count` characters.
std::string_view skip_characters(std::string_view text, std::size_t count);

// Bytes as text: what is no UTF-8 becomes U+FFFD, one for each maximal part of a character.
std::string lossy_utf8(std::string_view bytes);

// White_Space, as `\s` of the patterns and Rust's char::is_whitespace have it.
bool is_whitespace(char32_t character);
// The general categories Nd, Nl and No.
bool is_numeric(char32_t character);

enum class Form { nfc, nfd, nfkc, nfkd };
std::string normalize(std::string_view text, Form form);

}  // namespace gqsa
