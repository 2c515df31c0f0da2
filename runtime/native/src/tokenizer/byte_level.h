// GPT-2's way to write bytes as printable characters, which byte-level vocabularies are made of.
#pragma once

#include <string>
#include <string_view>

namespace gqsa {

std::string bytes_to_characters(std::string_view bytes);

// The bytes that a token stands for; its own where it has a character that stands for none.
std::string characters_to_bytes(std::string_view token);

}  // namespace gqsa
