// Streams of bytes, as the runtime sources in TVM's wheel use them. The wheel leaves out the
// headers of this folder; these are our own, with no more than those sources ask for.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tvm::support {

// How a type is written and read. TVM's sources specialise it for types of theirs.
template <typename T, typename = void>
struct Serializer {
  static constexpr bool enabled = false;
};

class Stream {
 public:
  virtual ~Stream() = default;
  // Up to `size` bytes; returns how many there were.
  virtual std::size_t Read(void* bytes, std::size_t size) = 0;
  virtual std::size_t Write(const void* bytes, std::size_t size) = 0;

  template <typename T>
  bool Read(T* value) {
    static_assert(Serializer<T>::enabled);
    return Serializer<T>::Read(this, value);
  }
  template <typename T>
  void Write(const T& value) {
    static_assert(Serializer<T>::enabled);
    Serializer<T>::Write(this, value);
  }
  template <typename T>
  bool ReadArray(T* values, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      if (!Read(values + i)) return false;
    }
    return true;
  }
  template <typename T>
  void WriteArray(const T* values, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i)
      Write(values[i]);
  }
};

}  // namespace tvm::support
