#include "library.h"

#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <set>
#include <vector>

#include "cpus.h"
#include "error.h"
#include "files.h"
#include "sha256.h"

// Where the build found TVM's runtime, and its release.
#ifndef GQSA_DEFAULT_RUNTIME
#define GQSA_DEFAULT_RUNTIME ""
#define GQSA_DEFAULT_TVM ""
#endif

namespace gqsa {
namespace {

constexpr const char* kBundle = "lib";
constexpr std::array<const char*, 3> kLibraries = {"libtvm_ffi.so", "libtvm_runtime.so",
                                                   "libtvm_runtime_extra.so"};
constexpr std::uint64_t kMostLibraryBytes = std::uint64_t{1} << 31;

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

std::string join(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

// Why this machine cannot run a variant; empty where it can.
std::string objection(const Target& target) {
  const std::string begin = "This artefact was compiled for " + quote(target.name);
  if (target.device_type != kDLCPU) {
    return begin + " (" + quote(target.kind) +
           "), which this runtime cannot drive; compile it again with --target cpu.";
  }
  const std::string machine = host_arch();
  if (machine != target.arch) {
    return begin + " (" + quote(target.arch) + ") and this machine is " + machine +
           "; compile it again for this machine's target.";
  }
  const std::set<std::string> have = host_flags();
  std::vector<std::string> missing;
  for (const std::string& flag : target.flags) {
    if (!have.empty() && have.count(flag) == 0) missing.push_back(flag.substr(0, 40));
  }
  if (missing.empty()) return "";
  return begin + " and this machine lacks " + join(missing) +
         "; compile it again with an older level as --target.";
}

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  std::size_t begin = 0;
  for (std::size_t end; begin <= list.size(); begin = end + 1) {
    end = std::min(list.find(':', begin), list.size());
    if (end > begin) parts.push_back(list.substr(begin, end - begin));
  }
  return parts;
}

// The paths of TVM's libraries in loading order.
std::vector<std::string> find_runtime(const std::string& directory, const Manifest& manifest,
                                      const std::string& runtime_dirs) {
  const std::string bundle = join_path(directory, kBundle);
  std::vector<std::string> folders;
  if (is_directory(bundle)) {
    folders = {bundle};
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
  return paths;
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
      throw artefact_error("TVM's runtime cannot be loaded: " +
                           std::string(why != nullptr ? why : path) + ".");
    }
    if (path.size() >= 13 && path.compare(path.size() - 13, 13, kLibraries[0]) == 0) {
      tvm::connect(handle);
      check_ffi(manifest.tvm_ffi);
    }
  }
  loaded = manifest.tvm;
}

}  // namespace

const Variant& choose_variant(const Manifest& manifest, const std::string& name) {
  if (!name.empty()) {
    std::vector<std::string> names;
    for (const Variant& variant : manifest.variants) {
      names.push_back(variant.target.name.substr(0, 40));
      if (variant.target.name != name) continue;
      const std::string why = objection(variant.target);
      if (!why.empty()) throw artefact_error(why);
      return variant;
    }
    throw usage_error("The artefact has no code for " + quote(name) + "; choose one of " +
                      join(names) + ".");
  }
  // A system that does not tell its features gets what asks for least: the last.
  std::string why;
  for (const Variant& variant : manifest.variants) {
    const bool last = &variant == &manifest.variants.back();
    if (!last && host_flags().empty()) continue;
    why = objection(variant.target);
    if (why.empty()) return variant;
  }
  throw artefact_error(why);
}

tvm::Any load_module(const std::string& directory, const Manifest& manifest,
                     const Variant& variant, const std::string& runtime_dirs) {
  const std::string path = join_path(directory, variant.file);
  {
    const std::string missing = "The artefact is incomplete: there is no " + path + ".";
    const std::string code = read_file(path, kMostLibraryBytes, missing);
    if (sha256(code.data(), code.size()) != variant.sha256) {
      throw artefact_error(path +
                           " is damaged: its SHA-256 is not the manifest's. Copy or compile the "
                           "artefact again.");
    }
  }
  check_shared_library(path);
  load_runtime(directory, manifest, runtime_dirs);
  // dlopen looks for a plain name in the system's folders.
  const std::string file = path.find('/') == std::string::npos ? "./" + path : path;
  try {
    return tvm::call(tvm::global("ffi.ModuleLoadFromFile"), {file});
  } catch (const Error& error) {
    throw Error(Kind::artefact, path + " cannot be loaded: " + error.what(), error.detail);
  }
}

}  // namespace gqsa
