// Without arguments: a JSON request a line on standard input, its JSON answer on standard output.
// `gqsa-probe fuzz ...`: see fuzz.cpp.
#include "probe.h"

#include <cmath>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>

#include "cpus.h"
#include "error.h"
#include "manifest.h"
#include "params.h"
#include "regex.h"
#include "sampling.h"
#include "sha256.h"
#include "text.h"
#include "tokenizer/tokenizer.h"
#include "unicode.h"

namespace {

using gqsa::Tokenizer;
using nlohmann::json;

gqsa::Sampling sampling_of(const json& request) {
  gqsa::Sampling s;
  s.temperature = request.value("temperature", s.temperature);
  s.top_k = request.value("top_k", s.top_k);
  s.top_p = request.value("top_p", s.top_p);
  s.min_p = request.value("min_p", s.min_p);
  s.repetition_penalty = request.value("repetition_penalty", s.repetition_penalty);
  if (request.contains("seed")) s.seed = request["seed"].get<std::uint64_t>();
  return s;
}

std::vector<float> floats_of(const json& list) {
  std::vector<float> values;
  for (const json& value : list)
    values.push_back(value.is_null() ? NAN : value.get<float>());
  return values;
}

json answer(const json& request) {
  static std::map<std::string, Tokenizer> tokenizers;
  const auto tokenizer = [&]() -> const Tokenizer& {
    const auto path = request.at("file").get<std::string>();
    const auto found = tokenizers.find(path);
    return found != tokenizers.end()
               ? found->second
               : tokenizers.emplace(path, Tokenizer::read(path)).first->second;
  };
  const auto op = request.at("op").get<std::string>();
  if (op == "encode") {
    json all = json::array();
    for (const json& text : request.at("texts")) {
      all.push_back(tokenizer().encode(text.get<std::string>(), request.value("special", true),
                                       request.value("plain", false)));
    }
    return all;
  }
  if (op == "decode") {
    json all = json::array();
    for (const json& ids : request.at("ids")) {
      const auto list = ids.get<std::vector<std::int32_t>>();
      all.push_back(tokenizer().decode(list.data(), list.size(), request.value("skip", true)));
    }
    return all;
  }
  if (op == "stream") {
    gqsa::TextDecoder decoder(tokenizer(), request.at("context").get<std::vector<std::int32_t>>());
    gqsa::StopStrings stops(request.at("stops").get<std::vector<std::string>>());
    json pieces = json::array();
    for (const json& id : request.at("ids")) {
      pieces.push_back(stops.push(decoder.push(id.get<std::int32_t>())));
    }
    std::string last = stops.push(decoder.flush());
    pieces.push_back(last + stops.flush());
    return {{"pieces", pieces}, {"stopped", stops.stopped()}};
  }
  if (op == "random") {
    gqsa::Random random(request.at("seed").get<std::uint64_t>());
    json draws = json::array();
    for (int i = 0; i < request.at("count"); ++i)
      draws.push_back(random());
    return draws;
  }
  if (op == "sample") {
    const std::vector<float> logits = floats_of(request.at("logits"));
    gqsa::Sampler sampler(sampling_of(request), logits.size(),
                          request.value("prompt", std::vector<std::int32_t>()));
    json tokens = json::array();
    for (int i = 0; i < request.at("count"); ++i)
      tokens.push_back(sampler(logits.data()));
    return tokens;
  }
  if (op == "sha256") {
    const auto hex = request.at("bytes").get<std::vector<unsigned char>>();
    return {gqsa::sha256(hex.data(), hex.size()), gqsa::sha256(hex.data(), hex.size(), true)};
  }
  if (op == "lossy") {
    const auto bytes = request.at("bytes").get<std::vector<unsigned char>>();
    return gqsa::lossy_utf8({reinterpret_cast<const char*>(bytes.data()), bytes.size()});
  }
  if (op == "split") {  // the matches of a pattern, as texts
    json found = json::array();
    const auto text = request.at("text").get<std::string>();
    gqsa::Regex(request.at("pattern").get<std::string>(), "tokenizer.json")
        .each(text, [&](std::size_t a, std::size_t b) { found.push_back(text.substr(a, b - a)); });
    return found;
  }
  if (op == "host") {
    return {{"arch", gqsa::host_arch()},
            {"flags", gqsa::host_flags()},
            {"cpus", gqsa::allowed_cpus()},
            {"threads", gqsa::default_threads()}};
  }
  if (op == "manifest") {
    const gqsa::Manifest m = gqsa::read_manifest(request.at("directory").get<std::string>());
    const auto file = request.at("directory").get<std::string>() + "/" + m.parameters_file;
    gqsa::map_parameters(file, m.parameters, true);
    return {{"name", m.name}, {"variants", m.variants.size()}};
  }
  return answer_of_model(request);
}

}  // namespace

int main(int count, char** words) {
  if (count > 1 && std::string(words[1]) == "fuzz") {
    return fuzz(std::vector<std::string>(words + 2, words + count));
  }
  for (std::string line; std::getline(std::cin, line);) {
    json reply;
    try {
      reply = {{"ok", answer(json::parse(line))}};
    } catch (const gqsa::Error& error) {
      reply = {{"error", error.what()}, {"kind", static_cast<int>(error.kind)}};
    }
    std::cout << reply.dump(-1, ' ', false, json::error_handler_t::replace) << std::endl;
  }
  return 0;
}
