// manifest.json: what an artefact is and needs. runtime/manifest.py is the schema; as there,
// nothing that does not fit it is believed.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace gqsa {

constexpr const char* kManifestFile = "manifest.json";

struct Target {
  std::string name, kind, arch, triple;
  std::vector<std::string> flags;
  std::int64_t device_type = 0;
};

struct Variant {
  Target target;
  std::string file, sha256;  // of the compiled library
};

struct Parameter {
  std::string name, dtype, sha256;
  std::vector<std::int64_t> shape;
};

struct Manifest {
  std::string tvm, tvm_ffi;  // releases
  std::vector<Variant> variants;
  std::string name;
  std::int64_t vocab_size = 0, hidden_size = 0, context_length = 0, prefill_chunk = 0,
               max_batch = 0;
  std::vector<std::int64_t> eos_token_ids;
  std::int64_t page_size = 0, kv_bytes_per_token = 0;
  std::int64_t weights_bytes = 0;
  std::string parameters_file;
  std::vector<Parameter> parameters;
};

// Read the manifest of an artefact directory. Throws Error (artefact; usage where there is no such
// directory or it is no artefact).
Manifest read_manifest(const std::string& directory);

// Check a document; `where` names it in errors.
Manifest parse_manifest(std::string_view text, const std::string& where);

}  // namespace gqsa
