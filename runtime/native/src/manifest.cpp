#include "manifest.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "error.h"
#include "files.h"

namespace gqsa {
namespace {

using nlohmann::json;

constexpr std::int64_t kFormatVersion = 2;
constexpr std::int64_t kAdaptersVersion = 3;
constexpr std::size_t kMostVariants = 64;
constexpr std::int64_t kPageMultiple = 8;      // what the attention kernels need
constexpr const char* kPositions = "cos_sin";  // how the names of rotary embeddings' tables end

// One JSON object of the schema: every key is asked for once, and `end` refuses the others.
class Record {
 public:
  Record(const json& value, std::string where, std::string key)
      : value_(value), where_(std::move(where)), key_(std::move(key)) {
    if (!value.is_object()) throw wrong(key_.empty() ? "the document" : key_, "an object");
  }

  std::string text(const std::string& name) { return text(get(name), path(name)); }
  std::int64_t integer(const std::string& name) { return integer(get(name), path(name)); }
  std::optional<std::int64_t> maybe_integer(const std::string& name) {
    if (get(name).is_null()) return std::nullopt;
    return integer(name);
  }
  void number(const std::string& name) {
    if (!get(name).is_number()) throw wrong(path(name), "float");
  }
  void boolean(const std::string& name) {
    if (!get(name).is_boolean()) throw wrong(path(name), "bool");
  }
  void object(const std::string& name) { record(name); }
  Record record(const std::string& name) { return Record(get(name), where_, path(name)); }

  template <typename F>
  void each(const std::string& name, F&& take) {
    const json& list = get(name);
    if (!list.is_array()) throw wrong(path(name), "a list");
    for (std::size_t i = 0; i < list.size(); ++i) {
      take(list[i], path(name) + "[" + std::to_string(i) + "]");
    }
  }
  std::vector<std::string> texts(const std::string& name) {
    std::vector<std::string> found;
    each(name, [&](const json& v, const std::string& key) { found.push_back(text(v, key)); });
    return found;
  }
  std::vector<std::int64_t> integers(const std::string& name) {
    std::vector<std::int64_t> found;
    each(name, [&](const json& v, const std::string& key) { found.push_back(integer(v, key)); });
    return found;
  }
  Record inner(const json& value, const std::string& key) { return Record(value, where_, key); }

  void end() const {
    for (const auto& [name, _] : value_.items()) {
      if (known_.count(name) == 0) {
        throw artefact_error(where_ + " has the unknown key " + quote(path(name)) + ".");
      }
    }
  }
  void skip(const std::string& name) { known_.insert(name); }

 private:
  const json& get(const std::string& name) {
    known_.insert(name);
    const auto found = value_.find(name);
    if (found == value_.end()) throw artefact_error(where_ + " has no " + path(name) + ".");
    return *found;
  }
  std::string path(const std::string& name) const {
    return key_.empty() ? name : key_ + "." + name;
  }
  std::string text(const json& value, const std::string& key) const {
    if (!value.is_string()) throw wrong(key, "text");
    return value.get<std::string>();
  }
  std::int64_t integer(const json& value, const std::string& key) const {
    if (!value.is_number_integer()) throw wrong(key, "a whole number of 64 bits");
    if (value.is_number_unsigned() && value.get<std::uint64_t>() >> 63 != 0) {
      throw artefact_error(where_ + ": " + key + " does not fit into 64 bits.");
    }
    return value.get<std::int64_t>();
  }
  Error wrong(const std::string& key, const std::string& expected) const {
    return artefact_error(where_ + ": " + key + " should be " + expected + ".");
  }

  const json& value_;
  std::string where_, key_;
  std::set<std::string> known_;
};

Target decode_target(Record r) {
  Target target;
  target.name = r.text("name");
  target.kind = r.text("kind");
  target.arch = r.text("arch");
  target.flags = r.texts("flags");
  target.device_type = r.integer("device_type");
  target.triple = r.text("triple");
  r.end();
  return target;
}

// `r` has the keys "target" and "library": a variant, or in version 1 the document itself.
Variant decode_variant(Record& r) {
  Variant variant;
  variant.target = decode_target(r.record("target"));
  Record library = r.record("library");
  variant.file = library.text("file");
  variant.sha256 = library.text("sha256");
  library.end();
  return variant;
}

void decode_model(Record r, Manifest& manifest) {
  manifest.name = r.text("name");
  for (const char* name : {"architecture", "activations"})
    r.text(name);
  for (const char* name : {"num_layers", "num_key_value_heads", "head_dim"})
    r.integer(name);
  manifest.hidden_size = r.integer("hidden_size");
  manifest.vocab_size = r.integer("vocab_size");
  manifest.context_length = r.integer("context_length");
  manifest.prefill_chunk = r.integer("prefill_chunk");
  manifest.max_batch = r.integer("max_batch");
  for (const char* name : {"sliding_window", "bos_token_id"})
    r.maybe_integer(name);
  manifest.eos_token_ids = r.integers("eos_token_ids");
  r.end();
}

// Kernels are for reports; they are checked all the same, so that both runtimes refuse the same.
void check_kernel(Record r) {
  for (const char* name : {"layer", "kernel", "weight"})
    r.text(name);
  for (const char* name : {"layout_version", "n", "k", "bytes"})
    r.integer(name);
  r.maybe_integer("group_size");
  r.object("config");
  r.number("sparsity");
  r.boolean("fallback");
  r.end();
}

Parameter decode_parameter(Record r) {
  Parameter parameter{r.text("name"), r.text("dtype"), r.text("sha256"), r.integers("shape")};
  r.end();
  return parameter;
}

void check_names(const Manifest& m, const std::string& where) {
  if (m.variants.empty() || m.variants.size() > kMostVariants) {
    throw artefact_error(where + " lists " + std::to_string(m.variants.size()) +
                         " variants; 1 to " + std::to_string(kMostVariants) + " are allowed.");
  }
  std::set<std::string> targets, files;
  std::vector<std::string> all;
  for (const Variant& variant : m.variants) {
    if (!targets.insert(variant.target.name).second) {
      throw artefact_error(where + " names " + quote(variant.target.name) + " twice.");
    }
    all.push_back(variant.file);
  }
  all.push_back(m.parameters_file);
  for (const std::string& file : all) {
    if (!files.insert(file).second) {
      throw artefact_error(where + " names " + quote(file) + " twice.");
    }
    if (file.empty() || file == "." || file == ".." ||
        file.find_first_of(std::string_view("/\\\0", 3)) != std::string::npos) {
      throw artefact_error(where + " names the file " + quote(file) +
                           ", which is not a plain name.");
    }
  }
}

// A table of positions has a row for each: code reads the rows of a context without a check.
void check_positions(const Parameter& p, std::int64_t context, const std::string& where) {
  const std::string_view name(p.name), end(kPositions);
  if (name.size() < end.size() || name.substr(name.size() - end.size()) != end) return;
  const std::int64_t rows = p.shape.empty() ? 0 : p.shape[0];
  if (rows < context) {
    throw artefact_error(where + ": parameter " + quote(p.name) + " has " + std::to_string(rows) +
                         " rows, fewer than the context of " + std::to_string(context) +
                         " tokens.");
  }
}

void check(const Manifest& m, const std::string& where) {
  check_names(m, where);
  // Beyond any model, and small enough for what TVM computes of them in 32 and 64 bits.
  const struct {
    const char* key;
    std::int64_t value, most;
  } bounded[] = {
      {"model.vocab_size", m.vocab_size, 1 << 24},
      {"model.hidden_size", m.hidden_size, 1 << 24},
      {"model.context_length", m.context_length, 1 << 27},
      {"model.prefill_chunk", m.prefill_chunk, 1 << 20},
      {"model.max_batch", m.max_batch, 1 << 16},
      {"kv_cache.page_size", m.page_size, 1 << 12},
      {"kv_cache.bytes_per_token", m.kv_bytes_per_token, std::int64_t{1} << 40},
  };
  for (const auto& [key, value, most] : bounded) {
    const std::string text = where + ": " + key + " is " + std::to_string(value) + " and must be ";
    if (value < 1) throw artefact_error(text + "positive.");
    if (value > most) throw artefact_error(text + "at most " + std::to_string(most) + ".");
  }
  if (m.page_size % kPageMultiple != 0) {
    throw artefact_error(where + ": kv_cache.page_size is " + std::to_string(m.page_size) +
                         " and must be a multiple of " + std::to_string(kPageMultiple) + ".");
  }
  if (m.max_batch > m.prefill_chunk) {
    // Decoding puts one token of every sequence into a pass, which has room for a chunk.
    throw artefact_error(where + ": model.max_batch is " + std::to_string(m.max_batch) +
                         " and must be at most model.prefill_chunk, which is " +
                         std::to_string(m.prefill_chunk) + "; compile the model again.");
  }
  std::set<std::string> names;
  bool rows = false;
  for (const Parameter& p : m.parameters) {
    if (!names.insert(p.name).second) throw artefact_error(where + " lists a parameter twice.");
    rows = rows || std::find(p.shape.begin(), p.shape.end(), m.vocab_size) != p.shape.end();
    check_positions(p, m.context_length, where);
  }
  // The embedding has a row for every token: for one beyond its end the code takes the last.
  if (!rows) {
    throw artefact_error(where + ": model.vocab_size is " + std::to_string(m.vocab_size) +
                         ", and no parameter has that many rows; copy or compile the artefact "
                         "again.");
  }
}

std::string version_text(const json& data) {
  const auto found = data.find("format_version");
  return found == data.end() ? "none" : found->dump().substr(0, 40);
}

}  // namespace

Manifest parse_manifest(std::string_view text, const std::string& where) {
  const json data = parse_json(text, where, true);
  if (!data.is_object() || data.find("format") == data.end() || data["format"] != "gqsa-artefact") {
    throw artefact_error(where + " is not the manifest of a GQSA artefact.");
  }
  const auto version = data.find("format_version");
  if (version == data.end() || !version->is_number_integer() ||
      (*version != 1 && *version != kFormatVersion && *version != kAdaptersVersion)) {
    throw artefact_error(where + " has artefact format version " + version_text(data) +
                         " and this runtime reads versions 1 to 3; compile the model again with "
                         "this release of gqsa.");
  }
  Record r(data, where, "");
  r.skip("format");
  r.skip("format_version");
  // The model's own functions take no adapter's tensors, which are the last ones.
  if (*version == kAdaptersVersion) r.skip("adapters");
  Manifest manifest;
  r.text("producer");
  Record versions = r.record("versions");
  manifest.tvm = versions.text("tvm");
  manifest.tvm_ffi = versions.text("tvm_ffi");
  versions.end();
  if (*version == 1 && data.find("variants") == data.end()) {
    manifest.variants.push_back(decode_variant(r));
  } else {
    r.each("variants", [&](const json& value, const std::string& key) {
      Record variant = r.inner(value, key);
      manifest.variants.push_back(decode_variant(variant));
      variant.end();
    });
  }
  decode_model(r.record("model"), manifest);
  Record cache = r.record("kv_cache");
  cache.text("dtype");
  manifest.page_size = cache.integer("page_size");
  manifest.kv_bytes_per_token = cache.integer("bytes_per_token");
  cache.end();
  Record memory = r.record("memory");
  manifest.weights_bytes = memory.integer("weights_bytes");
  for (const char* name : {"kv_cache_bytes_per_token", "workspace_bytes"})
    memory.integer(name);
  memory.end();
  manifest.parameters_file = r.text("parameters_file");
  r.each("parameters", [&](const json& value, const std::string& key) {
    manifest.parameters.push_back(decode_parameter(r.inner(value, key)));
  });
  r.each("kernels",
         [&](const json& value, const std::string& key) { check_kernel(r.inner(value, key)); });
  r.integer("bytes_per_token");
  r.end();
  check(manifest, where);
  return manifest;
}

Manifest read_manifest(const std::string& directory) {
  if (!is_directory(directory)) {
    throw usage_error(directory +
                      " does not exist; make an artefact with: gqsa compile MODEL -o DIR");
  }
  const std::string path = join_path(directory, kManifestFile);
  if (!is_file(path)) {
    throw usage_error(directory + " is not a compiled artefact (it has no " + kManifestFile +
                      "); compile it first: gqsa compile MODEL -o DIR");
  }
  return parse_manifest(read_file(path, kMostJsonBytes, "There is no " + path + "."), path);
}

}  // namespace gqsa
