#include "params.h"

#include <algorithm>
#include <atomic>
#include <nlohmann/json.hpp>
#include <system_error>
#include <thread>
#include <unordered_map>

#include "cpus.h"
#include "error.h"
#include "sha256.h"

namespace gqsa {
namespace {

using nlohmann::json;

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kMostHashers = 8;  // threads; memory has no more to give

struct Code {
  const char *dtype, *code;
  std::uint8_t kind, bits;  // kind: DLPack's int 0, uint 1, float 2, bfloat 4
};
constexpr Code kCodes[] = {
    {"float32", "F32", 2, 32}, {"float16", "F16", 2, 16}, {"bfloat16", "BF16", 4, 16},
    {"float64", "F64", 2, 64}, {"int8", "I8", 0, 8},      {"int16", "I16", 0, 16},
    {"int32", "I32", 0, 32},   {"int64", "I64", 0, 64},   {"uint8", "U8", 1, 8},
    {"uint16", "U16", 1, 16},  {"uint32", "U32", 1, 32},  {"uint64", "U64", 1, 64},
};

const Code& code_of(const Parameter& parameter) {
  for (const Code& code : kCodes) {
    if (parameter.dtype == code.dtype) return code;
  }
  throw artefact_error("The manifest gives " + quote(parameter.name) + " the unknown dtype " +
                       quote(parameter.dtype) + ".");
}

json read_header(const std::string& path, const Mapping& file, std::size_t& begin) {
  std::uint64_t size = 0;
  for (std::size_t i = 0; i < 8 && i < file.size(); ++i) {
    size |= std::uint64_t{file.data()[i]} << (8 * i);
  }
  if (file.size() < 8 || size > std::min<std::uint64_t>(file.size() - 8, kMostJsonBytes)) {
    throw artefact_error(path + " is truncated or is not a safetensors file.");
  }
  begin = 8 + size;
  json header;
  try {
    const auto* text = reinterpret_cast<const char*>(file.data()) + 8;
    header = parse_json({text, static_cast<std::size_t>(size)}, path, false);
  } catch (const Error&) {
    header = nullptr;
  }
  if (!header.is_object()) {
    throw artefact_error(path + " has a damaged header; copy or compile the artefact again.");
  }
  return header;
}

// Bytes of a tensor; none where a size is negative or the product does not fit.
bool count_bytes(const std::vector<std::int64_t>& shape, std::uint64_t itemsize,
                 std::uint64_t& bytes) {
  bytes = itemsize;
  for (const std::int64_t size : shape) {
    if (size < 0 || __builtin_mul_overflow(bytes, static_cast<std::uint64_t>(size), &bytes)) {
      return false;
    }
  }
  return true;
}

ParameterView view(const std::string& path, const Mapping& file, std::size_t begin,
                   const json& header, const Parameter& parameter) {
  const Code& code = code_of(parameter);
  const std::string name = "The parameter " + quote(parameter.name) + " in " + path;
  const auto entry = header.find(parameter.name);
  if (entry == header.end() || !entry->is_object()) {
    throw artefact_error(path + " has no parameter " + quote(parameter.name) +
                         ", which the manifest lists.");
  }
  if (entry->value("dtype", json()) != code.code ||
      entry->value("shape", json()) != json(parameter.shape)) {
    throw artefact_error(name + " has another dtype or shape than the manifest says.");
  }
  const json offsets = entry->value("data_offsets", json());
  std::uint64_t bytes = 0;
  if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
      !offsets[1].is_number_unsigned() || !count_bytes(parameter.shape, code.bits / 8, bytes)) {
    throw artefact_error(name + " has broken offsets.");
  }
  const auto first = offsets[0].get<std::uint64_t>(), last = offsets[1].get<std::uint64_t>();
  if (last < first || last - first != bytes) throw artefact_error(name + " has broken offsets.");
  if (last > file.size() - begin) {
    throw artefact_error(path + " is truncated: " + quote(parameter.name) +
                         " lies beyond its end. Copy or compile the artefact again.");
  }
  const unsigned char* data = file.data() + begin + first;
  if (bytes > 0 && reinterpret_cast<std::uintptr_t>(data) % kAlignment != 0) {
    throw artefact_error(name + " is not aligned to 64 bytes.");
  }
  return {data, static_cast<std::size_t>(bytes)};
}

void check_hashes(const std::string& path, const std::vector<Parameter>& parameters,
                  const std::vector<ParameterView>& views) {
  std::atomic<std::size_t> next{0}, damaged{views.size()};
  const auto work = [&] {
    for (std::size_t i = next++; i < views.size(); i = next++) {
      if (sha256(views[i].data, views[i].bytes) != parameters[i].sha256) {
        std::size_t first = damaged;
        while (i < first && !damaged.compare_exchange_weak(first, i)) {
        }
      }
    }
  };
  std::vector<std::thread> threads;
  const std::size_t count = std::min(kMostHashers, allowed_cpus().size());
  threads.reserve(count);
  try {
    for (std::size_t i = 1; i < count; ++i)
      threads.emplace_back(work);
  } catch (const std::system_error&) {  // those that have started do the work
  }
  work();
  for (std::thread& thread : threads)
    thread.join();
  if (damaged < views.size()) {
    throw artefact_error("The parameter " + quote(parameters[damaged].name) + " in " + path +
                         " is damaged: its SHA-256 is not the manifest's. Copy or compile the "
                         "artefact again.");
  }
}

}  // namespace

Dtype dtype_of(const Parameter& parameter) {
  const Code& code = code_of(parameter);
  return {code.kind, code.bits};
}

Parameters map_parameters(const std::string& path, const std::vector<Parameter>& parameters,
                          bool verify) {
  Parameters result{std::make_unique<Mapping>(path), {}};
  std::size_t begin = 0;
  const json header = read_header(path, *result.file, begin);
  std::unordered_map<std::string, bool> listed;
  for (const Parameter& parameter : parameters) {
    listed[parameter.name] = true;
    result.views.push_back(view(path, *result.file, begin, header, parameter));
  }
  for (const auto& [name, _] : header.items()) {
    if (listed.count(name) == 0 && name != "__metadata__" && name.rfind("_pad.", 0) != 0) {
      throw artefact_error(path + " has the parameter " + quote(name) +
                           ", which the manifest does not list; copy or compile the artefact "
                           "again.");
    }
  }
  if (verify) check_hashes(path, parameters, result.views);
  return result;
}

}  // namespace gqsa
