#include "bpe.h"

#include <algorithm>
#include <cstdio>
#include <queue>
#include <tuple>

#include "../unicode.h"

namespace gqsa {
namespace {

constexpr std::int64_t kMostTokens = 1 << 24;

// A part of the text while it is merged; parts that are gone have no length.
struct Part {
  std::int32_t id;
  int before, after;
  bool gone;
};

// A merge that may be made at a part. The queue's top is the one of least rank, then the leftmost.
struct Chance {
  std::uint32_t rank;
  int at;
  std::int32_t made;
  bool operator<(const Chance& other) const {
    return std::tie(other.rank, other.at) < std::tie(rank, at);
  }
};

}  // namespace

Bpe::Bpe(const Config& config) {
  const std::string type = config.has("type") ? config.type() : "BPE";
  if (type != "BPE") throw config.unsupported("the model " + quote(type));
  for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (config.has(affix) && !config.text(affix).empty()) throw config.unsupported(affix);
  }
  if (config.has("dropout") && config.at("dropout").node != 0) throw config.unsupported("dropout");
  fuse_unknown_ = config.flag("fuse_unk", false);
  ignore_merges_ = config.flag("ignore_merges", false);
  read_vocabulary(config.at("vocab"));
  read_merges(config.at("merges"));
  if (config.has("unk_token")) {
    unknown_ = find(config.text("unk_token"));
    if (!unknown_) throw config.damaged("has an unk_token that is not in its vocabulary");
  }
  if (config.flag("byte_fallback", false)) {
    for (int byte = 0; byte < 256; ++byte) {
      char name[8];
      std::snprintf(name, sizeof name, "<0x%02X>", byte);
      bytes_.push_back(find(name).value_or(-1));
    }
  }
}

void Bpe::read_vocabulary(const Config& config) {
  if (!config.node.is_object()) throw config.damaged("should be an object");
  // The library keeps an object's keys sorted by their bytes, as `find` needs them.
  for (const auto& [token, value] : config.node.items()) {
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() >= kMostTokens) {
      throw config.damaged("gives " + quote(token) + " something that is no token id");
    }
    const auto id = value.get<std::size_t>();
    if (id >= spans_.size()) spans_.resize(id + 1);
    if (spans_[id].used) throw config.damaged("has the id " + std::to_string(id) + " twice");
    spans_[id] = {static_cast<std::uint32_t>(text_.size()),
                  static_cast<std::uint32_t>(token.size()), true};
    text_ += token;
    sorted_.push_back(static_cast<std::int32_t>(id));
  }
  spans_.shrink_to_fit();
  text_.shrink_to_fit();
  sorted_.shrink_to_fit();
}

void Bpe::read_merges(const Config& config) {
  const auto id_of = [&](std::string_view token) {
    const std::optional<std::int32_t> id = find(token);
    if (!id) throw config.damaged("merges " + quote(std::string(token)) + ", which is no token");
    return *id;
  };
  merges_.reserve(config.list().size());
  std::string joined;
  for (const auto& entry : config.list()) {
    std::string_view left, right;
    if (entry.is_string()) {  // "a b"
      const std::string_view pair = entry.get_ref<const std::string&>();
      const std::size_t space = pair.find(' ');
      if (space == std::string_view::npos || pair.find(' ', space + 1) != std::string_view::npos) {
        throw config.damaged("has an entry that is no pair");
      }
      left = pair.substr(0, space);
      right = pair.substr(space + 1);
    } else if (entry.is_array() && entry.size() == 2 && entry[0].is_string() &&
               entry[1].is_string()) {
      left = entry[0].get_ref<const std::string&>();
      right = entry[1].get_ref<const std::string&>();
    } else {
      throw config.damaged("has an entry that is no pair");
    }
    joined.assign(left).append(right);
    merges_.push_back(
        {id_of(left), id_of(right), static_cast<std::uint32_t>(merges_.size()), id_of(joined)});
  }
  // Of a pair that stands twice the last counts.
  std::sort(merges_.begin(), merges_.end(), [](const Merge& a, const Merge& b) {
    return std::tie(a.left, a.right, b.rank) < std::tie(b.left, b.right, a.rank);
  });
}

const Bpe::Merge* Bpe::merge(std::int32_t left, std::int32_t right) const {
  const auto found =
      std::lower_bound(merges_.begin(), merges_.end(), std::make_pair(left, right),
                       [](const Merge& m, const auto& key) {
                         return std::tie(m.left, m.right) < std::tie(key.first, key.second);
                       });
  const bool hit = found != merges_.end() && found->left == left && found->right == right;
  return hit ? &*found : nullptr;
}

std::optional<std::string_view> Bpe::token(std::int32_t id) const {
  if (id < 0 || static_cast<std::size_t>(id) >= spans_.size() || !spans_[id].used) {
    return std::nullopt;
  }
  return std::string_view(text_).substr(spans_[id].begin, spans_[id].size);
}

std::optional<std::int32_t> Bpe::find(std::string_view wanted) const {
  const auto found =
      std::lower_bound(sorted_.begin(), sorted_.end(), wanted,
                       [&](std::int32_t id, std::string_view key) { return *token(id) < key; });
  if (found == sorted_.end() || *token(*found) != wanted) return std::nullopt;
  return *found;
}

// The tokens of the characters; of what has none, its bytes' or the unknown one.
std::vector<std::int32_t> Bpe::characters(std::string_view text) const {
  std::vector<std::int32_t> ids;
  bool pending = false;  // an unknown token that may take in the next one
  for (std::size_t at = 0, size; at < text.size(); at += size) {
    size = character_size(text, at);
    const std::string_view character = text.substr(at, size);
    if (const auto id = find(character)) {
      if (pending) ids.push_back(*unknown_);
      pending = false;
      ids.push_back(*id);
      continue;
    }
    const auto byte_id = [&](char byte) {
      return bytes_.empty() ? -1 : bytes_[static_cast<unsigned char>(byte)];
    };
    if (std::all_of(character.begin(), character.end(), [&](char b) { return byte_id(b) >= 0; })) {
      for (const char byte : character)
        ids.push_back(byte_id(byte));
    } else if (unknown_) {
      if (pending && !fuse_unknown_) ids.push_back(*unknown_);
      pending = true;
    }
  }
  if (pending) ids.push_back(*unknown_);
  return ids;
}

void Bpe::encode(std::string_view text, std::vector<std::int32_t>& ids) const {
  if (ignore_merges_) {
    if (const auto id = find(text)) {
      ids.push_back(*id);
      return;
    }
  }
  std::vector<Part> parts;
  for (const std::int32_t id : characters(text)) {
    const int at = static_cast<int>(parts.size());
    parts.push_back({id, at - 1, at + 1, false});
  }
  if (parts.empty()) return;
  parts.back().after = -1;
  std::priority_queue<Chance> queue;
  const auto offer = [&](int at) {
    if (at < 0 || parts[at].after < 0) return;
    const Merge* found = merge(parts[at].id, parts[parts[at].after].id);
    if (found != nullptr) queue.push({found->rank, at, found->made});
  };
  for (std::size_t i = 0; i + 1 < parts.size(); ++i)
    offer(static_cast<int>(i));
  while (!queue.empty()) {
    const Chance chance = queue.top();
    queue.pop();
    Part& part = parts[chance.at];
    if (part.gone || part.after < 0) continue;
    Part& next = parts[part.after];
    const Merge* found = merge(part.id, next.id);
    if (found == nullptr || found->made != chance.made) continue;  // made of other parts since
    part.id = chance.made;
    part.after = next.after;
    next.gone = true;
    if (part.after >= 0) parts[part.after].before = chance.at;
    offer(part.before);
    offer(chance.at);
  }
  for (int at = 0; at >= 0; at = parts[at].after)
    ids.push_back(parts[at].id);
}

}  // namespace gqsa
