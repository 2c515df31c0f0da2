// Streams over bytes in memory. See ../tvm/support/io.h.
#pragma once

#include <tvm/ffi/string.h>
#include <tvm/support/io.h>
#include <tvm/support/serializer.h>

#include <algorithm>
#include <cstring>
#include <string>

namespace tvm::support {

// Reads bytes that outlive it.
class BytesInStream : public Stream {
 public:
  BytesInStream(const char* bytes, std::size_t size) : bytes_(bytes), left_(size) {}
  explicit BytesInStream(const std::string& bytes) : BytesInStream(bytes.data(), bytes.size()) {}
  explicit BytesInStream(const ffi::Bytes& bytes) : BytesInStream(bytes.data(), bytes.size()) {}

  using Stream::Read;
  using Stream::Write;
  std::size_t Read(void* bytes, std::size_t size) override {
    const std::size_t count = std::min(size, left_);
    if (count > 0) std::memcpy(bytes, bytes_, count);
    bytes_ += count;
    left_ -= count;
    return count;
  }
  std::size_t Write(const void*, std::size_t) override { return 0; }

 private:
  const char* bytes_;
  std::size_t left_;
};

// Appends to a text that outlives it.
class BytesOutStream : public Stream {
 public:
  explicit BytesOutStream(std::string* bytes) : bytes_(bytes) {}

  using Stream::Read;
  using Stream::Write;
  std::size_t Read(void*, std::size_t) override { return 0; }
  std::size_t Write(const void* bytes, std::size_t size) override {
    bytes_->append(static_cast<const char*>(bytes), size);
    return size;
  }

 private:
  std::string* bytes_;
};

}  // namespace tvm::support
