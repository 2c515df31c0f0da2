#include "../unicode.h"
#include "steps.h"

namespace gqsa {
namespace {

void add(const Config& config, Normalizer& steps) {
  const std::string type = config.type();
  if (type == "Sequence") {
    const Config inner = config.at("normalizers");
    for (std::size_t i = 0; i < inner.list().size(); ++i)
      add(inner.item(i), steps);
  } else if (type == "NFC" || type == "NFD" || type == "NFKC" || type == "NFKD") {
    const Form form = type == "NFC"    ? Form::nfc
                      : type == "NFD"  ? Form::nfd
                      : type == "NFKC" ? Form::nfkc
                                       : Form::nfkd;
    steps.push_back([form](std::string& text) { text = normalize(text, form); });
  } else if (type == "Prepend") {
    steps.push_back([prefix = config.text("prepend")](std::string& text) {
      if (!text.empty()) text.insert(0, prefix);
    });
  } else if (type == "Replace") {
    const Config pattern = config.at("pattern");
    if (!pattern.has("String")) throw config.unsupported("a Replace of a pattern");
    const std::string from = pattern.text("String"), to = config.text("content");
    if (from.empty()) throw pattern.damaged("is empty");
    steps.push_back([from, to](std::string& text) { replace_all(text, from, to); });
  } else {
    throw config.unsupported("the normalizer " + quote(type));
  }
}

}  // namespace

void replace_all(std::string& text, const std::string& from, const std::string& to) {
  std::string result;
  std::size_t at = 0;
  for (std::size_t found; (found = text.find(from, at)) != std::string::npos;
       at = found + from.size()) {
    result.append(text, at, found - at).append(to);
  }
  text = result.append(text, at, std::string::npos);
}

Normalizer read_normalizer(const Config& config) {
  Normalizer steps;
  if (!config.is_null()) add(config, steps);
  return steps;
}

}  // namespace gqsa
