// TVM-FFI through its C interface alone, by a table of its functions: a program that links to
// nothing of TVM (loader_shared.cpp) can check an artefact's libraries before it opens them.
#pragma once

#include <dlpack/dlpack.h>
#include <tvm/ffi/c_api.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

namespace gqsa::tvm {

// The functions of TVM-FFI that are used here.
struct Api {
  decltype(&TVMFFIGetVersion) get_version;
  decltype(&TVMFFIObjectIncRef) inc_ref;
  decltype(&TVMFFIObjectDecRef) dec_ref;
  decltype(&TVMFFIFunctionGetGlobal) get_global;
  decltype(&TVMFFIFunctionCall) call;
  decltype(&TVMFFIErrorMoveFromRaised) take_error;
  decltype(&TVMFFITensorFromDLPack) tensor_from_dlpack;
};

void connect(const Api& api);
// The functions; `connect` comes first.
const Api& api();

// A value that TVM gave: a number, or a reference to an object that ends with it.
class Any {
 public:
  Any() : value_{} {}
  explicit Any(const TVMFFIAny& owned) : value_(owned) {}
  Any(Any&& other) noexcept : value_(other.value_) { other.value_ = {}; }
  Any& operator=(Any&& other) noexcept;
  ~Any();

  bool is_none() const { return value_.type_index == kTVMFFINone; }
  std::int32_t type() const { return value_.type_index; }
  const TVMFFIAny& raw() const { return value_; }
  // The tensor's description; throws Error (runtime) where it is none.
  const DLTensor& tensor() const;

 private:
  TVMFFIAny value_;
};

// An argument: a view that lives as long as what it was made from.
struct Argument : TVMFFIAny {
  Argument(std::int64_t value) : TVMFFIAny{} { type_index = kTVMFFIInt, v_int64 = value; }
  Argument(int value) : Argument(static_cast<std::int64_t>(value)) {}
  Argument(bool value) : TVMFFIAny{} { type_index = kTVMFFIBool, v_int64 = value ? 1 : 0; }
  Argument(const char* text) : TVMFFIAny{} { type_index = kTVMFFIRawStr, v_c_str = text; }
  Argument(const std::string& text) : Argument(text.c_str()) {}
  Argument(const Any& any) : TVMFFIAny(any.raw()) {}
};

// Call a function object. Throws Error (runtime) with the first line of what TVM says.
Any call(const Any& function, const Argument* arguments, std::size_t count);
inline Any call(const Any& function, std::initializer_list<Argument> arguments) {
  return call(function, arguments.begin(), arguments.size());
}
inline Any call(const Any& function, const std::vector<Argument>& arguments) {
  return call(function, arguments.data(), arguments.size());
}

// A function of TVM's registry; none where there is no such function.
Any find_global(const std::string& name);
// The same; throws Error (runtime) where there is none.
Any global(const std::string& name);

Any shape(const std::vector<std::int64_t>& sizes);

// A CPU tensor over memory that outlives it and starts on a 64-byte boundary.
Any tensor(const void* data, const std::vector<std::int64_t>& shape, DLDataType dtype);

}  // namespace gqsa::tvm
