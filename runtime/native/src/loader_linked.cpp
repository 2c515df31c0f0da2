// Loading for a program that has the model's code and TVM's runtime linked in: for systems whose C
// library TVM's own runtime libraries do not know, as Android's.
#include <mutex>

#include "error.h"
#include "files.h"
#include "library.h"

namespace gqsa {
namespace {

constexpr const char* kSelf = "/proc/self/exe";

}  // namespace

tvm::Any load_module(const std::string& directory, const Manifest&, const Variant& variant,
                     const std::string&) {
  // The program is the library that the manifest names: another model's weights or another
  // compilation's would be read as if they were its own.
  if (variant.file != kProgram || hash_file(kSelf) != variant.sha256) {
    throw artefact_error("This program has the code of another artefact than " + directory +
                         "; run the gqsa-run in that folder, or copy the artefact again.");
  }
  static std::once_flag once;
  std::call_once(once, [] {
    tvm::connect({TVMFFIGetVersion, TVMFFIObjectIncRef, TVMFFIObjectDecRef, TVMFFIFunctionGetGlobal,
                  TVMFFIFunctionCall, TVMFFIErrorMoveFromRaised, TVMFFITensorFromDLPack});
  });
  return tvm::call(tvm::global("ffi.SystemLib"), {});
}

}  // namespace gqsa
