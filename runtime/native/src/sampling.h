// Choosing the next token, in the order of Hugging Face's generate; as runtime/sampling.py.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace gqsa {

// How to choose; the defaults are greedy.
struct Sampling {
  double temperature = 0.0;
  std::int64_t top_k = 0;
  double top_p = 1.0, min_p = 0.0, repetition_penalty = 1.0;
  std::optional<std::uint64_t> seed;

  // Throws Error (usage) where a value is out of its range.
  void check() const;
};

// The draws of numpy's default_rng(seed).random(): PCG64 seeded by SeedSequence, so that both
// runtimes draw the same tokens.
class Random {
 public:
  explicit Random(std::optional<std::uint64_t> seed);
  double operator()();  // in [0, 1)

 private:
  unsigned __int128 state_, increment_;
};

// A token that may be drawn, and its probability.
struct Candidate {
  std::int32_t token;
  double weight;
};

// The tokens that may be drawn from float32 logits [size], at a temperature above 0.
std::vector<Candidate> distribution(const float* logits, std::size_t size,
                                    const Sampling& sampling);

// Chooses the tokens of one sequence.
class Sampler {
 public:
  Sampler(const Sampling& sampling, std::size_t vocab_size,
          const std::vector<std::int32_t>& prompt);
  std::int32_t operator()(const float* logits);

 private:
  Sampling sampling_;
  Random random_;
  std::vector<bool> seen_;
  std::vector<float> penalised_;
};

}  // namespace gqsa
