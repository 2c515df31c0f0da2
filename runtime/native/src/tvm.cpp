#include "tvm.h"

#include <memory>

#include "error.h"

namespace gqsa::tvm {
namespace {

Api functions;

std::string text(const TVMFFIByteArray& bytes) { return {bytes.data, bytes.size}; }

// The error that the last call left behind.
Error raised() {
  TVMFFIObjectHandle handle = nullptr;
  functions.take_error(&handle);
  if (handle == nullptr) return Error(Kind::runtime, "TVM failed and does not say why.");
  const TVMFFIErrorCell& cell = *TVMFFIErrorGetCellPtr(handle);
  const std::string kind = text(cell.kind), message = text(cell.message);
  const Kind ours = kind == "MemoryError" ? Kind::memory : Kind::runtime;
  Error error(ours, "TVM: " + kind + ": " + message.substr(0, message.find('\n')) + ".",
              message + "\n" + text(cell.backtrace));
  functions.dec_ref(handle);
  return error;
}

// What a tensor of ours keeps: TVM gives it back to `release` when the last reference is gone.
struct Managed {
  DLManagedTensor tensor{};
  std::vector<std::int64_t> shape;

  static void release(DLManagedTensor* self) { delete static_cast<Managed*>(self->manager_ctx); }
};

}  // namespace

void connect(const Api& given) { functions = given; }

const Api& api() { return functions; }

Any& Any::operator=(Any&& other) noexcept {
  if (this != &other) {
    Any old(value_);
    value_ = other.value_;
    other.value_ = {};
  }
  return *this;
}

Any::~Any() {
  if (value_.type_index >= kTVMFFIStaticObjectBegin && value_.v_obj != nullptr) {
    functions.dec_ref(value_.v_obj);
  }
}

const DLTensor& Any::tensor() const {
  if (type() != kTVMFFITensor) throw Error(Kind::runtime, "The compiled code gave no tensor.");
  return *TVMFFITensorGetDLTensorPtr(value_.v_obj);
}

Any call(const Any& function, const Argument* arguments, std::size_t count) {
  if (function.type() != kTVMFFIFunction) throw Error(Kind::runtime, "TVM gave no function.");
  static_assert(sizeof(Argument) == sizeof(TVMFFIAny));
  TVMFFIAny result{};
  auto* views = const_cast<TVMFFIAny*>(static_cast<const TVMFFIAny*>(arguments));
  if (functions.call(function.raw().v_obj, views, static_cast<std::int32_t>(count), &result) != 0) {
    throw raised();
  }
  return Any(result);
}

Any find_global(const std::string& name) {
  const TVMFFIByteArray bytes{name.data(), name.size()};
  TVMFFIObjectHandle handle = nullptr;
  if (functions.get_global(&bytes, &handle) != 0) throw raised();
  TVMFFIAny value{};
  if (handle != nullptr) {
    value.type_index = kTVMFFIFunction;
    value.v_obj = static_cast<TVMFFIObject*>(handle);
  }
  return Any(value);
}

Any global(const std::string& name) {
  Any function = find_global(name);
  if (function.is_none()) {
    throw artefact_error("TVM's runtime has no function " + name +
                         "; it is incomplete or of another release.");
  }
  return function;
}

Any shape(const std::vector<std::int64_t>& sizes) {
  static const Any& make = *new Any(global("ffi.Shape"));  // for the process
  return call(make, std::vector<Argument>(sizes.begin(), sizes.end()));
}

Any tensor(const void* data, const std::vector<std::int64_t>& shape, DLDataType dtype) {
  auto managed = std::make_unique<Managed>();
  managed->shape = shape;
  DLTensor& tensor = managed->tensor.dl_tensor;
  tensor.data = const_cast<void*>(data);
  tensor.device = {kDLCPU, 0};
  tensor.ndim = static_cast<std::int32_t>(shape.size());
  tensor.dtype = dtype;
  tensor.shape = managed->shape.data();
  managed->tensor.manager_ctx = managed.get();
  managed->tensor.deleter = Managed::release;
  TVMFFIObjectHandle handle = nullptr;
  if (functions.tensor_from_dlpack(&managed->tensor, 0, 0, &handle) != 0) throw raised();
  managed.release();  // TVM's now
  TVMFFIAny value{};
  value.type_index = kTVMFFITensor;
  value.v_obj = static_cast<TVMFFIObject*>(handle);
  return Any(value);
}

}  // namespace gqsa::tvm
