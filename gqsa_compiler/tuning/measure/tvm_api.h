// TVM's runtime libraries, loaded by path: nothing is linked with them.
#pragma once

#include <dlfcn.h>
#include <dlpack/dlpack.h>
#include <tvm/ffi/c_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace measure {

using std::string;
using std::vector;

[[noreturn]] inline void fail(const string& what) { throw std::runtime_error(what); }

template <typename F>
void look_up(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  if (function == nullptr) fail(string("a library has no function ") + name);
}

inline void* load_library(const string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) fail(dlerror());
  return library;
}

// What is called of TVM.
class Runtime {
 public:
  // The folder has libtvm_ffi.so and libtvm_runtime.so, and for a GPU libtvm_runtime_cuda.so.
  Runtime(const string& folder, bool gpu) {
    void* first = load_library(folder + "/libtvm_ffi.so");
    load_library(folder + "/libtvm_runtime.so");
    if (gpu) load_library(folder + "/libtvm_runtime_cuda.so");
    look_up(first, "TVMFFIFunctionGetGlobal", get_global_);
    look_up(first, "TVMFFIFunctionCall", call_);
    look_up(first, "TVMFFIErrorMoveFromRaised", take_error_);
    look_up(first, "TVMFFIEnvSetStream", set_stream_);
  }

  TVMFFIAny call(TVMFFIObjectHandle function, vector<TVMFFIAny>& arguments) const {
    TVMFFIAny result{};
    const auto count = static_cast<std::int32_t>(arguments.size());
    if (call_(function, arguments.data(), count, &result) != 0) {
      TVMFFIObjectHandle error = nullptr;
      take_error_(&error);
      if (error == nullptr) fail("TVM failed and does not say why");
      const TVMFFIErrorCell& cell = *TVMFFIErrorGetCellPtr(error);
      fail(string(cell.message.data, cell.message.size));
    }
    return result;
  }

  // The function `main` of a library. Modules stay loaded.
  TVMFFIObjectHandle load_kernel(const string& path) const {
    vector<TVMFFIAny> file{text(path.c_str())};
    const TVMFFIAny module = call(global("ffi.ModuleLoadFromFile"), file);
    TVMFFIAny inside{};
    inside.type_index = kTVMFFIBool;
    inside.v_int64 = 1;
    vector<TVMFFIAny> query{module, text("main"), inside};
    const TVMFFIAny function = call(global("ffi.ModuleGetFunction"), query);
    if (function.type_index != kTVMFFIFunction) fail(path + " has no function main");
    return function.v_obj;
  }

  // Lets kernels of a device be launched into a stream.
  void use_stream(DLDevice device, void* stream) const {
    if (set_stream_(device.device_type, device.device_id, stream, nullptr) != 0) {
      fail("TVM does not take a stream");
    }
  }

 private:
  static TVMFFIAny text(const char* words) {
    TVMFFIAny value{};
    value.type_index = kTVMFFIRawStr;
    value.v_c_str = words;
    return value;
  }

  TVMFFIObjectHandle global(const string& name) const {
    const TVMFFIByteArray bytes{name.data(), name.size()};
    TVMFFIObjectHandle function = nullptr;
    if (get_global_(&bytes, &function) != 0 || function == nullptr) {
      fail("TVM's runtime has no function " + name);
    }
    return function;
  }

  decltype(&TVMFFIFunctionGetGlobal) get_global_;
  decltype(&TVMFFIFunctionCall) call_;
  decltype(&TVMFFIErrorMoveFromRaised) take_error_;
  int (*set_stream_)(std::int32_t, std::int32_t, void*, void**);
};

}  // namespace measure
