// Checks that this machine can run an artefact, then loads TVM's runtime and the compiled code; as
// runtime/library.py. Every check comes before the first library is loaded.
//
// Loading is in loader_shared.cpp for a program that opens libraries, in loader_linked.cpp for one
// that has a model's code and TVM's runtime linked in.
#pragma once

#include <string>

#include "manifest.h"
#include "tvm.h"

namespace gqsa {

// An artefact's program that has the model's code linked in, which the manifest then names as its
// library.
constexpr const char* kProgram = "gqsa-run";

// The code to run: `name`'s, or the first that this machine can run. Throws Error (artefact; usage
// where there is no such variant).
const Variant& choose_variant(const Manifest& manifest, const std::string& name);

// Load TVM's runtime, once a process, and a variant's module, after checking all of them.
// `runtime_dirs`: folders for an artefact that brings no runtime, see gqsa_load_options.
tvm::Any load_module(const std::string& directory, const Manifest& manifest, const Variant& variant,
                     const std::string& runtime_dirs);

}  // namespace gqsa
