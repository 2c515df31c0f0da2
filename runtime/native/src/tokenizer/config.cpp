#include "config.h"

namespace gqsa {

using nlohmann::json;

namespace {

const json kNull;

}  // namespace

Error Config::damaged(const std::string& what) const {
  return artefact_error(file + " is damaged: " + (place.empty() ? "the document" : place) + " " +
                        what + ".");
}

Error Config::unsupported(const std::string& what) const {
  return artefact_error(file + " uses " + what + (place.empty() ? "" : " (in " + place + ")") +
                        ", which the native runtime does not support; run this artefact with the "
                        "Python runtime.");
}

bool Config::has(const char* key) const {
  return node.is_object() && node.find(key) != node.end() && !node.at(key).is_null();
}

Config Config::at(const char* key) const {
  if (!node.is_object()) throw damaged("should be an object");
  const auto found = node.find(key);
  return {found == node.end() ? kNull : *found, file, place.empty() ? key : place + "." + key};
}

Config Config::item(std::size_t index) const {
  return {list().at(index), file, place + "[" + std::to_string(index) + "]"};
}

const json& Config::list() const {
  if (!node.is_array()) throw damaged("should be a list");
  return node;
}

std::string Config::text(const char* key) const { return at(key).text(); }

std::string Config::text() const {
  if (!node.is_string()) throw damaged("should be text");
  return node.get<std::string>();
}

bool Config::flag(const char* key, bool otherwise) const {
  const Config value = at(key);
  if (value.is_null()) return otherwise;
  if (!value.node.is_boolean()) throw value.damaged("should be true or false");
  return value.node.get<bool>();
}

std::int64_t Config::integer(const char* key) const {
  const Config value = at(key);
  if (!value.node.is_number_integer() ||
      (value.node.is_number_unsigned() && value.node.get<std::uint64_t>() >> 63 != 0)) {
    throw value.damaged("should be a whole number");
  }
  return value.node.get<std::int64_t>();
}

}  // namespace gqsa
