#include "library.h"

#include <dlpack/dlpack.h>

#include <set>
#include <vector>

#include "cpus.h"
#include "error.h"

namespace gqsa {
namespace {

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

}  // namespace gqsa
