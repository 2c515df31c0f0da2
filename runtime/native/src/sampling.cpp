#include "sampling.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <random>
#include <string>

#include "error.h"

namespace gqsa {
namespace {

Error not_numbers() {
  return artefact_error(
      "The model's logits are not finite numbers: its weights or its kernels are "
      "broken. Run gqsa eval on the checkpoint to see which.");
}

// numpy's SeedSequence: a pool of four words mixed from the entropy, then eight words for PCG64.
std::array<std::uint32_t, 8> seed_words(std::uint64_t seed) {
  std::uint32_t constant = 0x43b0d7e5;
  const auto hash = [&](std::uint32_t value) {
    value ^= constant;
    constant *= 0x931e8875;
    value *= constant;
    return value ^ value >> 16;
  };
  const auto mix = [](std::uint32_t x, std::uint32_t y) {
    const std::uint32_t result = x * 0xca01f9dd - y * 0x4973f715;
    return result ^ result >> 16;
  };
  std::array<std::uint32_t, 4> pool{};
  const std::uint32_t entropy[4] = {static_cast<std::uint32_t>(seed),
                                    static_cast<std::uint32_t>(seed >> 32), 0, 0};
  for (int i = 0; i < 4; ++i)
    pool[i] = hash(entropy[i]);
  for (int from = 0; from < 4; ++from) {
    for (int to = 0; to < 4; ++to) {
      if (from != to) pool[to] = mix(pool[to], hash(pool[from]));
    }
  }
  std::array<std::uint32_t, 8> words{};
  constant = 0x8b51f9dd;
  for (int i = 0; i < 8; ++i) {
    std::uint32_t value = pool[i % 4] ^ constant;
    constant *= 0x58f38ded;
    value *= constant;
    words[i] = value ^ value >> 16;
  }
  return words;
}

constexpr unsigned __int128 wide(std::uint64_t high, std::uint64_t low) {
  return static_cast<unsigned __int128>(high) << 64 | low;
}

constexpr unsigned __int128 kMultiplier = wide(2549297995355413924u, 4865540595714422341u);

constexpr double kMostPenalty = 1e30;  // and at least its inverse: a float has both

// Keep those that pass and make their weights sum to 1.
template <typename F>
void keep(std::vector<Candidate>& candidates, F&& passes) {
  candidates.erase(
      std::remove_if(candidates.begin(), candidates.end(), [&](auto& c) { return !passes(c); }),
      candidates.end());
  double sum = 0;
  for (const Candidate& c : candidates)
    sum += c.weight;
  for (Candidate& c : candidates)
    c.weight /= sum;
}

// Whether a comes before b among the likeliest: of equal ones the first.
bool likelier(const Candidate& a, const Candidate& b) {
  return a.weight > b.weight || (a.weight == b.weight && a.token < b.token);
}

// The first of the largest logits. Lanes side by side, which compilers turn into vectors: one by
// one, a vocabulary of 49152 takes a fiftieth of a small model's token.
std::size_t likeliest(const float* logits, std::size_t size) {
  constexpr std::size_t kLanes = 16;
  std::array<float, kLanes> tops;
  tops.fill(-INFINITY);
  std::array<std::int32_t, kLanes> broken{};
  std::size_t at = 0;
  for (; at + kLanes <= size; at += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const float value = logits[at + lane];
      tops[lane] = value > tops[lane] ? value : tops[lane];
      broken[lane] |= value != value;
    }
  }
  float top = -INFINITY;
  std::int32_t nan = 0;
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    top = std::max(top, tops[lane]);
    nan |= broken[lane];
  }
  for (; at < size; ++at) {
    top = logits[at] > top ? logits[at] : top;
    nan |= logits[at] != logits[at];
  }
  if (nan != 0 || !std::isfinite(top)) throw not_numbers();
  return static_cast<std::size_t>(std::find(logits, logits + size, top) - logits);
}

}  // namespace

void Sampling::check() const {
  const auto require = [](bool good, const std::string& what) {
    if (!good) throw usage_error(what + ".");
  };
  require(temperature >= 0 && std::isfinite(temperature), "temperature must be 0 or more");
  require(top_k >= 0, "top_k must be a whole number, 0 up");
  require(top_p > 0 && top_p <= 1, "top_p must be above 0 and at most 1");
  require(min_p >= 0 && min_p <= 1, "min_p must be between 0 and 1");
  require(repetition_penalty >= 1 / kMostPenalty && repetition_penalty <= kMostPenalty,
          "repetition_penalty must be between 1e-30 and 1e30");
}

Random::Random(std::optional<std::uint64_t> seed) {
  std::random_device device;
  const std::uint64_t value = seed ? *seed : std::uint64_t{device()} << 32 | device();
  const auto w = seed_words(value);
  const auto word = [&](int i) { return std::uint64_t{w[2 * i + 1]} << 32 | w[2 * i]; };
  increment_ = wide(word(2), word(3)) << 1 | 1;
  state_ = (increment_ + wide(word(0), word(1))) * kMultiplier + increment_;
}

double Random::operator()() {
  state_ = state_ * kMultiplier + increment_;
  const auto folded = static_cast<std::uint64_t>(state_ >> 64) ^ static_cast<std::uint64_t>(state_);
  const int turn = static_cast<int>(state_ >> 122);
  const std::uint64_t bits = folded >> turn | folded << (-turn & 63);
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

std::vector<Candidate> distribution(const float* logits, std::size_t size, const Sampling& o) {
  std::vector<Candidate> found(size);
  for (std::size_t i = 0; i < size; ++i)
    found[i] = {static_cast<std::int32_t>(i), logits[i]};
  const auto k = static_cast<std::size_t>(o.top_k);
  double top = -INFINITY;
  for (const Candidate& c : found) {
    if (std::isnan(c.weight)) throw not_numbers();
    top = std::max(top, c.weight);
  }
  if (!std::isfinite(top)) throw not_numbers();
  if (k > 0 && k < size) {
    std::nth_element(found.begin(), found.begin() + (k - 1), found.end(), likelier);
    found.resize(k);
    std::sort(found.begin(), found.end(), [](auto& a, auto& b) { return a.token < b.token; });
  }
  for (Candidate& c : found)
    c.weight = std::exp((c.weight - top) / o.temperature);
  keep(found, [](const Candidate&) { return true; });
  if (o.top_p < 1) {
    // Tokens below (1 - p) / n sum to less than 1 - p: the cut lies above them all, and the sort,
    // which would dominate at a large vocabulary, is left with a few.
    const double least = (1 - o.top_p) / static_cast<double>(found.size());
    found.erase(
        std::remove_if(found.begin(), found.end(), [&](auto& c) { return !(c.weight >= least); }),
        found.end());
    std::sort(found.begin(), found.end(), likelier);
    double before = 0;
    keep(found, [&](const Candidate& c) {
      const bool inside = before < o.top_p;
      before += c.weight;
      return inside;
    });
  }
  if (o.min_p > 0) {
    double most = 0;
    for (const Candidate& c : found)
      most = std::max(most, c.weight);
    keep(found, [&](const Candidate& c) { return c.weight >= o.min_p * most; });
  }
  return found;
}

Sampler::Sampler(const Sampling& sampling, std::size_t vocab_size,
                 const std::vector<std::int32_t>& prompt)
    : sampling_(sampling), random_(sampling.seed), seen_(vocab_size) {
  sampling.check();
  for (const std::int32_t token : prompt) {
    if (token >= 0 && static_cast<std::size_t>(token) < vocab_size) seen_[token] = true;
  }
}

std::int32_t Sampler::operator()(const float* logits) {
  const std::size_t size = seen_.size();
  if (sampling_.repetition_penalty != 1) {
    const auto penalty = static_cast<float>(sampling_.repetition_penalty);
    penalised_.assign(logits, logits + size);
    for (std::size_t i = 0; i < size; ++i) {
      float& value = penalised_[i];
      if (seen_[i]) value = value > 0 ? value / penalty : value * penalty;
    }
    logits = penalised_.data();
  }
  std::int32_t token = 0;
  if (sampling_.temperature == 0) {
    token = static_cast<std::int32_t>(likeliest(logits, size));
  } else {
    const std::vector<Candidate> candidates = distribution(logits, size, sampling_);
    double sum = 0;
    for (const Candidate& c : candidates)
      sum += c.weight;
    const double drawn = random_() * sum;
    double before = 0;
    token = candidates.back().token;
    for (const Candidate& c : candidates) {
      before += c.weight;
      if (before > drawn) {
        token = c.token;
        break;
      }
    }
  }
  seen_[token] = true;
  return token;
}

}  // namespace gqsa
