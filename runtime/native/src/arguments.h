// The options of gqsa-run: those of `gqsa run`.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace gqsa {

struct Arguments {
  bool help = false, version = false;
  std::string directory;  // empty: where the program itself lies
  std::optional<std::string> prompt, file;
  bool chat = false, json = false, verify = true, verbose = false;
  std::int64_t max_tokens = 256;
  std::optional<double> temperature, top_p, min_p, repetition_penalty;
  std::optional<std::int64_t> top_k, seed, context, threads;
  std::vector<std::string> stop;
  std::string variant;
};

extern const char* const kHelp;

// Throws Error (usage).
Arguments parse_arguments(int count, char** words);

}  // namespace gqsa
