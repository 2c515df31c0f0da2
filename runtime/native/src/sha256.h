// SHA-256 (FIPS 180-4), with the processor's own instructions where it has them.
#pragma once

#include <cstddef>
#include <string>

namespace gqsa {

// The digest of `size` bytes in hexadecimal. `plain` keeps to portable code, for tests.
std::string sha256(const void* data, std::size_t size, bool plain = false);

}  // namespace gqsa
