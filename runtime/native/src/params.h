// params.safetensors, mapped and checked against the manifest; nothing in its header is trusted.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "files.h"
#include "manifest.h"

namespace gqsa {

struct ParameterView {
  const unsigned char* data;
  std::size_t bytes;
};

// A dtype by the manifest's name, as DLPack has it.
struct Dtype {
  std::uint8_t code, bits;
};
Dtype dtype_of(const Parameter& parameter);

// The mapped parameters in the manifest's order: views of the file, not copies.
struct Parameters {
  std::unique_ptr<Mapping> file;
  std::vector<ParameterView> views;
};

// Map a parameters file; `verify` compares every SHA-256. Throws Error (artefact).
Parameters map_parameters(const std::string& path, const std::vector<Parameter>& parameters,
                          bool verify);

}  // namespace gqsa
