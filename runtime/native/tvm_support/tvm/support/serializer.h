// The binary form of TVM's modules: numbers as they lie in memory (little-endian machines only),
// and before the items of a text or a list their number in 64 bits. See io.h.
#pragma once

#include <dlpack/dlpack.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/endian.h>
#include <tvm/ffi/string.h>
#include <tvm/support/io.h>

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

namespace tvm::support {

static_assert(TVM_FFI_IO_NO_ENDIAN_SWAP, "only little-endian machines are supported");

template <typename T>
struct Serializer<T, std::enable_if_t<std::is_arithmetic_v<T> || std::is_enum_v<T>>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const T& value) { stream->Write(&value, sizeof value); }
  static bool Read(Stream* stream, T* value) {
    return stream->Read(value, sizeof *value) == sizeof *value;
  }
};

template <>
struct Serializer<std::string> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const std::string& text) {
    stream->Write(static_cast<std::uint64_t>(text.size()));
    stream->Write(text.data(), text.size());
  }
  static bool Read(Stream* stream, std::string* text) {
    std::uint64_t size = 0;
    if (!stream->Read(&size)) return false;
    // In steps: a length that lies ends with the bytes, not with the memory.
    text->clear();
    while (text->size() < size) {
      const std::size_t begin = text->size();
      const auto part = static_cast<std::size_t>(std::min<std::uint64_t>(size - begin, 1 << 20));
      text->resize(begin + part);
      if (stream->Read(text->data() + begin, part) != part) return false;
    }
    return true;
  }
};

template <>
struct Serializer<ffi::String> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const ffi::String& text) {
    stream->Write(std::string(text.data(), text.size()));
  }
  static bool Read(Stream* stream, ffi::String* text) {
    std::string read;
    if (!stream->Read(&read)) return false;
    *text = ffi::String(std::move(read));
    return true;
  }
};

// std::vector and ffi::Array look the same in a file.
template <typename List, typename T>
struct ListSerializer {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const List& list) {
    stream->Write(static_cast<std::uint64_t>(list.size()));
    for (const T& item : list)
      stream->Write(item);
  }
  static bool Read(Stream* stream, List* list) {
    std::uint64_t size = 0;
    if (!stream->Read(&size)) return false;
    *list = List();
    for (std::uint64_t i = 0; i < size; ++i) {
      T item{};
      if (!stream->Read(&item)) return false;
      list->push_back(std::move(item));
    }
    return true;
  }
};
template <typename T>
struct Serializer<std::vector<T>> : ListSerializer<std::vector<T>, T> {};
template <typename T>
struct Serializer<ffi::Array<T>> : ListSerializer<ffi::Array<T>, T> {};

template <typename K, typename V>
struct Serializer<ffi::Map<K, V>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const ffi::Map<K, V>& map) {
    stream->Write(static_cast<std::uint64_t>(map.size()));
    for (const auto& item : map) {
      stream->Write(K(item.first));
      stream->Write(V(item.second));
    }
  }
  static bool Read(Stream* stream, ffi::Map<K, V>* map) {
    std::uint64_t size = 0;
    if (!stream->Read(&size)) return false;
    *map = ffi::Map<K, V>();
    for (std::uint64_t i = 0; i < size; ++i) {
      K key;
      V value;
      if (!stream->Read(&key) || !stream->Read(&value)) return false;
      map->Set(std::move(key), std::move(value));
    }
    return true;
  }
};

template <>
struct Serializer<DLDataType> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const DLDataType& dtype) {
    stream->Write(dtype.code);
    stream->Write(dtype.bits);
    stream->Write(dtype.lanes);
  }
  static bool Read(Stream* stream, DLDataType* dtype) {
    return stream->Read(&dtype->code) && stream->Read(&dtype->bits) && stream->Read(&dtype->lanes);
  }
};

template <>
struct Serializer<DLDevice> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const DLDevice& device) {
    stream->Write(static_cast<std::int32_t>(device.device_type));
    stream->Write(device.device_id);
  }
  static bool Read(Stream* stream, DLDevice* device) {
    std::int32_t type = 0;
    if (!stream->Read(&type) || !stream->Read(&device->device_id)) return false;
    device->device_type = static_cast<DLDeviceType>(type);
    return true;
  }
};

}  // namespace tvm::support
