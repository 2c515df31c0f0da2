// Loading for a program that brings nothing of TVM: its libraries and the model's are opened.
#include <dlfcn.h>
#include <sys/stat.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <set>
#include <sstream>
#include <vector>

#include "error.h"
#include "files.h"
#include "library.h"

// Where the build found TVM's runtime, and its release.
#ifndef GQSA_DEFAULT_RUNTIME
#define GQSA_DEFAULT_RUNTIME ""
#define GQSA_DEFAULT_TVM ""
#endif

namespace gqsa {
namespace {

constexpr const char* kBundle = "lib";
constexpr const char* kSums = "SHA256SUMS";  // of the bundle's libraries, as sha256sum writes it
constexpr std::array<const char*, 3> kLibraries = {"libtvm_ffi.so", "libtvm_runtime.so",
                                                   "libtvm_runtime_extra.so"};

// The first three numbers of a version: post releases are the same code.
struct Release {
  unsigned numbers[3] = {0, 0, 0};
  explicit Release(const std::string& text) {
    std::sscanf(text.c_str(), "%9u.%9u.%9u", &numbers[0], &numbers[1], &numbers[2]);
  }
  bool same_series(const Release& other) const {
    return numbers[0] == other.numbers[0] && numbers[1] == other.numbers[1];
  }
  bool operator==(const Release& other) const {
    return same_series(other) && numbers[2] == other.numbers[2];
  }
};

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  std::size_t begin = 0;
  for (std::size_t end; begin <= list.size(); begin = end + 1) {
    end = std::min(list.find(':', begin), list.size());
    if (end > begin) parts.push_back(list.substr(begin, end - begin));
  }
  return parts;
}

// Compare the libraries of a bundle with the hashes that it was made with.
void check_bundle(const std::string& bundle) {
  const std::string path = join_path(bundle, kSums);
  if (!is_file(path)) return;  // a bundle of a release that wrote none
  std::istringstream sums(read_file(path, 1 << 16, ""));
  std::set<std::string> listed;
  for (std::string sum, name; sums >> sum >> name;) {
    if (listed.insert(name).second && sum != hash_file(join_path(bundle, name))) {
      throw artefact_error(join_path(bundle, name) + " is damaged: its SHA-256 is not that in " +
                           kSums + "; copy the artefact again.");
    }
  }
  for (const char* name : kLibraries) {
    if (listed.count(name) == 0) throw artefact_error(path + " does not list " + name + ".");
  }
}

// The paths of TVM's libraries in loading order.
std::vector<std::string> find_runtime(const std::string& directory, const Manifest& manifest,
                                      const std::string& runtime_dirs) {
  const std::string bundle = join_path(directory, kBundle);
  std::vector<std::string> folders;
  bool checked = false;
  if (is_directory(bundle)) {
    folders = {bundle};
    checked = true;
  } else if (!runtime_dirs.empty()) {
    folders = split(runtime_dirs);
  } else if (const char* given = std::getenv("GQSA_RUNTIME"); given != nullptr && *given != 0) {
    folders = split(given);
  } else {
    folders = split(GQSA_DEFAULT_RUNTIME);
    if (!folders.empty() && !(Release(GQSA_DEFAULT_TVM) == Release(manifest.tvm))) {
      throw artefact_error("The artefact was compiled with apache-tvm " + quote(manifest.tvm) +
                           " and this program was built with " GQSA_DEFAULT_TVM
                           "; compile the model with --bundle, or name that release's library "
                           "folders in GQSA_RUNTIME.");
    }
  }
  std::vector<std::string> paths;
  for (const char* name : kLibraries) {
    std::string found;
    for (const std::string& folder : folders) {
      const std::string path = join_path(folder, name);
      if (found.empty() && is_file(path)) found = path;
    }
    if (found.empty()) {
      throw artefact_error(std::string("There is no ") + name + " in " +
                           (folders.empty() ? bundle : join(folders)) +
                           "; compile the model with --bundle, or name the folders of TVM's "
                           "runtime libraries in GQSA_RUNTIME.");
    }
    check_shared_library(found);
    paths.push_back(found);
  }
  if (checked) check_bundle(bundle);
  return paths;
}

template <typename F>
void look_up(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  if (function == nullptr) {
    throw artefact_error(std::string("libtvm_ffi.so has no function ") + name +
                         "; it is of another release.");
  }
}

tvm::Api functions_of(void* library) {
  tvm::Api api{};
  look_up(library, "TVMFFIGetVersion", api.get_version);
  look_up(library, "TVMFFIObjectIncRef", api.inc_ref);
  look_up(library, "TVMFFIObjectDecRef", api.dec_ref);
  look_up(library, "TVMFFIFunctionGetGlobal", api.get_global);
  look_up(library, "TVMFFIFunctionCall", api.call);
  look_up(library, "TVMFFIErrorMoveFromRaised", api.take_error);
  look_up(library, "TVMFFITensorFromDLPack", api.tensor_from_dlpack);
  return api;
}

void check_ffi(const std::string& wanted) {
  TVMFFIVersion have{};
  tvm::api().get_version(&have);
  const Release want(wanted);
  if (have.major != want.numbers[0] || have.minor != want.numbers[1] ||
      have.patch < want.numbers[2]) {
    throw artefact_error("The artefact was compiled with apache-tvm-ffi " + quote(wanted) +
                         " and libtvm_ffi.so is " + std::to_string(have.major) + "." +
                         std::to_string(have.minor) + "." + std::to_string(have.patch) +
                         "; use that release's or compile again.");
  }
}

// TVM's runtime in this process: there can be only one, and it stays.
void load_runtime(const std::string& directory, const Manifest& manifest,
                  const std::string& runtime_dirs) {
  static std::mutex mutex;
  static std::string loaded;  // its release
  const std::lock_guard<std::mutex> lock(mutex);
  if (!loaded.empty()) {
    if (!(Release(loaded) == Release(manifest.tvm))) {
      throw artefact_error("The artefact was compiled with apache-tvm " + quote(manifest.tvm) +
                           " and this process has loaded the TVM runtime " + quote(loaded) +
                           " already; run the artefact in a process of its own.");
    }
    return;
  }
  for (const std::string& path : find_runtime(directory, manifest, runtime_dirs)) {
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
    if (handle == nullptr) {
      const char* why = dlerror();
      throw artefact_error(
          "TVM's runtime cannot be loaded: " + std::string(why != nullptr ? why : path) + ".");
    }
    if (path.size() >= 13 && path.compare(path.size() - 13, 13, kLibraries[0]) == 0) {
      tvm::connect(functions_of(handle));
      check_ffi(manifest.tvm_ffi);
    }
  }
  loaded = manifest.tvm;
}

// A file's path, spelled in a way that no other file has had at the same place: the system's loader
// knows libraries by their names, and asked for an artefact that was compiled again under its old
// one it would give the code from before, to run with the new weights.
std::string spelling(const std::string& directory, const std::string& name) {
  struct stat found{};
  if (stat(join_path(directory, name).c_str(), &found) != 0) return join_path(directory, name);
  std::ostringstream file;
  file << found.st_dev << ' ' << found.st_ino << ' ' << found.st_mtim.tv_sec << ' '
       << found.st_mtim.tv_nsec;
  const std::size_t mark = std::hash<std::string>()(file.str());
  std::string path = directory;
  for (int bit = 0; bit < 32; ++bit)
    path += (mark >> bit & 1) != 0 ? "/." : "//";
  return path + "/" + name;
}

std::string replaced(std::string text, const std::string& old, const std::string& by) {
  for (std::size_t at = 0; (at = text.find(old, at)) != std::string::npos; at += by.size())
    text.replace(at, old.size(), by);
  return text;
}

}  // namespace

tvm::Any load_module(const std::string& directory, const Manifest& manifest, const Variant& variant,
                     const std::string& runtime_dirs) {
  const std::string path = join_path(directory, variant.file);
  if (variant.file == kProgram) {
    throw artefact_error("The model's code is in a program of its own: run " + path + ".");
  }
  if (hash_file(path) != variant.sha256) {
    throw artefact_error(path +
                         " is damaged: its SHA-256 is not the manifest's. Copy or compile the "
                         "artefact again.");
  }
  check_shared_library(path);
  load_runtime(directory, manifest, runtime_dirs);
  const std::string spelt = spelling(directory, variant.file);
  try {
    return tvm::call(tvm::global("ffi.ModuleLoadFromFile"), {spelt});
  } catch (const Error& error) {
    throw Error(Kind::artefact,
                path + " cannot be loaded: " + replaced(error.what(), spelt, variant.file),
                replaced(error.detail, spelt, variant.file));
  }
}

}  // namespace gqsa
