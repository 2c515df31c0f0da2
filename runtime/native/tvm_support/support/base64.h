// Base64 on top of another stream, by TVM-FFI's own functions. See ../tvm/support/io.h.
#pragma once

#include <tvm/ffi/extra/base64.h>

#include <memory>
#include <string>

#include "bytes_io.h"

namespace tvm::support {

// Keeps what is written until Finish writes it all, coded.
class Base64OutStream : public BytesOutStream {
 public:
  explicit Base64OutStream(Stream* out) : BytesOutStream(&bytes_), out_(out) {}
  void Finish() {
    const ffi::String coded = ffi::Base64Encode(ffi::Bytes(bytes_));
    out_->Write(coded.data(), coded.size());
  }

 private:
  Stream* out_;
  std::string bytes_;
};

// InitPosition reads and decodes all that the other stream has.
class Base64InStream : public Stream {
 public:
  explicit Base64InStream(Stream* in) : in_(in) {}
  void InitPosition() {
    std::string coded;
    char part[4096];
    while (const std::size_t count = in_->Read(part, sizeof part))
      coded.append(part, count);
    bytes_ = ffi::Base64Decode(ffi::String(coded));
    decoded_ = std::make_unique<BytesInStream>(bytes_);
  }

  using Stream::Read;
  using Stream::Write;
  std::size_t Read(void* bytes, std::size_t size) override {
    return decoded_ != nullptr ? decoded_->Read(bytes, size) : 0;
  }
  std::size_t Write(const void*, std::size_t) override { return 0; }

 private:
  Stream* in_;
  ffi::Bytes bytes_;
  std::unique_ptr<BytesInStream> decoded_;
};

}  // namespace tvm::support
