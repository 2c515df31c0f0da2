// Requests of gqsa-probe about whole models, which stay loaded under a name until they are freed.
#include <dlfcn.h>

#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "model.h"
#include "probe.h"
#include "tvm.h"

namespace {

using nlohmann::json;
using Ids = std::vector<std::int32_t>;

constexpr const char* kAttention = "vm.builtin.attention_kv_cache_attention_with_fused_qkv";

template <typename F>
F symbol(const char* name) {
  void* found = dlsym(RTLD_DEFAULT, name);
  if (found == nullptr) throw std::runtime_error(name);
  return reinterpret_cast<F>(found);
}

// TVM's attention, until a call of it is asked to fail.
struct Attention {
  gqsa::tvm::Any original = gqsa::tvm::global(kAttention);
  decltype(&TVMFFIErrorSetRaisedFromCStr) raise =
      symbol<decltype(&TVMFFIErrorSetRaisedFromCStr)>("TVMFFIErrorSetRaisedFromCStr");
  int calls_left = 0;  // the last of these fails; 0: none does

  static int call(void* self, const TVMFFIAny* arguments, std::int32_t count, TVMFFIAny* result) {
    auto& attention = *static_cast<Attention*>(self);
    if (attention.calls_left > 0 && --attention.calls_left == 0) {
      attention.raise("RuntimeError", "no such luck");
      return -1;
    }
    auto* given = const_cast<TVMFFIAny*>(arguments);
    return gqsa::tvm::api().call(attention.original.raw().v_obj, given, count, result);
  }
};

Attention* replace_attention() {
  const auto create = symbol<decltype(&TVMFFIFunctionCreate)>("TVMFFIFunctionCreate");
  const auto set = symbol<decltype(&TVMFFIFunctionSetGlobal)>("TVMFFIFunctionSetGlobal");
  auto* made = new Attention;  // for the process, as TVM's registry
  const TVMFFIByteArray name{kAttention, std::char_traits<char>::length(kAttention)};
  TVMFFIObjectHandle function = nullptr;
  if (create(made, Attention::call, nullptr, &function) != 0 || set(&name, function, 1) != 0) {
    throw std::runtime_error("attention cannot be replaced");
  }
  return made;
}

// That of every model that is loaded after the first call of this; a model before it brings TVM.
Attention& attention() {
  static Attention& replaced = *replace_attention();
  return replaced;
}

json generate(gqsa::Model& model, const json& request) {
  gqsa::GenerateOptions options;
  options.sampling = model.sampling();
  options.max_tokens = request.at("max_tokens");
  options.stop = request.value("stop", std::vector<std::string>());
  json pieces = json::array();
  const std::size_t wanted = request.value("pieces", SIZE_MAX);  // the last is refused
  const auto emit = [&](const std::string& text) {
    pieces.push_back(text);
    return pieces.size() < wanted;
  };
  const gqsa::Generation made = model.generate(request.at("prompt"), options, emit);
  return {{"pieces", pieces}, {"token_ids", made.token_ids}, {"finish", made.finish}};
}

json floats(const gqsa::Logits& logits, std::size_t count) {
  return std::vector<float>(logits.data, logits.data + count);
}

}  // namespace

json answer_of_model(const json& request) {
  static std::map<std::string, std::unique_ptr<gqsa::Model>> models;
  const auto op = request.at("op").get<std::string>();
  if (op == "fail") {
    attention().calls_left = request.at("calls");
    return true;
  }
  const auto name = request.at("model").get<std::string>();
  if (op == "load") {
    gqsa::LoadOptions options;
    options.limits.threads = 1;
    models[name] = std::make_unique<gqsa::Model>(request.at("directory"), options);
    return true;
  }
  if (op == "free") return models.erase(name);
  gqsa::Model& model = *models.at(name);
  gqsa::Session& session = model.session();
  const auto vocab = static_cast<std::size_t>(session.vocab_size());
  if (op == "generate") return generate(model, request);
  if (op == "open") return session.add();
  if (op == "close") {
    session.remove(request.at("sequence"));
    return true;
  }
  const Ids tokens = request.at("tokens");
  if (op == "prefill") return floats(session.prefill(request.at("sequence"), tokens), vocab);
  if (op == "step") {
    const std::vector<std::int64_t> sequences = request.at("sequences");
    return floats(session.decode(sequences, tokens), vocab * tokens.size());
  }
  throw std::runtime_error("no such op");
}
