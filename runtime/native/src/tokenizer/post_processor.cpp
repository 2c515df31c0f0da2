#include <limits>

#include "steps.h"

namespace gqsa {
namespace {

std::int32_t token_id(const Config& config, const nlohmann::json& value) {
  if (!value.is_number_unsigned() ||
      value.get<std::uint64_t>() > std::numeric_limits<std::int32_t>::max()) {
    throw config.damaged("has something that is no token id");
  }
  return value.get<std::int32_t>();
}

Surroundings read_template(const Config& config) {
  Surroundings found;
  bool text = false;
  const Config single = config.at("single"), special = config.at("special_tokens");
  for (std::size_t i = 0; i < single.list().size(); ++i) {
    const Config part = single.item(i);
    if (part.has("Sequence")) {
      if (text) throw part.damaged("has the text twice");
      text = true;
      continue;
    }
    const Config token = special.at(part.at("SpecialToken").text("id").c_str());
    const Config ids = token.at("ids");
    for (const auto& id : ids.list()) {
      (text ? found.after : found.before).push_back(token_id(ids, id));
    }
  }
  if (!text) throw single.damaged("has no text");
  return found;
}

// "sep" and "cls" of Bert's and Roberta's: a token's text and its id.
std::int32_t pair_id(const Config& pair) {
  if (pair.list().size() != 2) throw pair.damaged("should be a token and its id");
  return token_id(pair, pair.node[1]);
}

}  // namespace

Surroundings read_post_processor(const Config& config) {
  Surroundings found;
  if (config.is_null()) return found;
  const std::string type = config.type();
  if (type == "Sequence") {
    const Config inner = config.at("processors");
    for (std::size_t i = 0; i < inner.list().size(); ++i) {
      const Surroundings next = read_post_processor(inner.item(i));
      found.before.insert(found.before.begin(), next.before.begin(), next.before.end());
      found.after.insert(found.after.end(), next.after.begin(), next.after.end());
    }
  } else if (type == "TemplateProcessing") {
    found = read_template(config);
  } else if (type == "BertProcessing" || type == "RobertaProcessing") {
    found = {{pair_id(config.at("cls"))}, {pair_id(config.at("sep"))}};
  } else if (type != "ByteLevel") {  // which only changes where tokens say they stand in the text
    throw config.unsupported("the post-processor " + quote(type));
  }
  return found;
}

}  // namespace gqsa
