#include "arguments.h"

#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <map>

#include "error.h"

namespace gqsa {

const char* const kHelp = R"(Usage: gqsa-run [DIR] [OPTIONS]

Generate text from a prompt, as it comes; figures go to standard error.

  DIR                        What gqsa compile has written [the folder of this program]
  -p, --prompt TEXT          The prompt [standard input]
  -f, --file FILE            Read the prompt from a text file
  --chat                     Wrap the prompt as a user's message, as the model was trained
  --max-tokens N             Most tokens to generate [256]
  --temperature X            0 always takes the likeliest token. Default of all sampling options:
                             the model's generation_config.json
  --top-k K                  Sample from the K likeliest tokens; 0: all
  --top-p P                  Sample from the likeliest tokens that sum to P
  --min-p P                  Drop tokens less likely than P times the likeliest
  --repetition-penalty X     Above 1: repeat less. 1: off
  --seed N                   Seed of the sampling
  --stop TEXT                End at this text (repeatable); it is not printed
  --context N                Longest sequence, in tokens [as compiled]
  --threads N                CPU threads [one for every core]
  --variant TARGET           The code to run, where there is code for several [the best]
  --no-verify                Do not check the parameters' hashes (that of the code always is)
  --json                     Print JSON for machines on standard output
  -v, --verbose              On an error, print TVM's trace too
  --version                  Show the version and end
  --help                     Show this and end
)";

namespace {

Error bad(const std::string& option, const std::string& text, const std::string& rule) {
  return usage_error(option + " is " + quote(text) + " and must be " + rule + ".");
}

std::int64_t whole(const std::string& option, const std::string& text, std::int64_t least) {
  char* end = nullptr;
  errno = 0;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || errno != 0 || value < least) {
    throw bad(option, text, "a whole number, " + std::to_string(least) + " or more");
  }
  return value;
}

double number(const std::string& option, const std::string& text, double least, double most) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !(value >= least) || !(value <= most) ||
      !std::isfinite(value)) {
    throw bad(option, text, std::isfinite(most) ? "between 0 and 1" : "a number, 0 or more");
  }
  return value;
}

using Take = std::function<void(const std::string& option, const std::string& text)>;

}  // namespace

Arguments parse_arguments(int count, char** words) {
  Arguments a;
  const auto count_from = [](std::int64_t least, auto& place) -> Take {
    return [least, &place](auto& option, auto& text) { place = whole(option, text, least); };
  };
  const auto share = [](auto& place) -> Take {
    return [&place](auto& option, auto& text) { place = number(option, text, 0, 1); };
  };
  const auto positive = [](auto& place) -> Take {
    return [&place](auto& option, auto& text) { place = number(option, text, 0, HUGE_VAL); };
  };
  const auto text = [](auto& place) -> Take {
    return [&place](auto&, auto& value) { place = value; };
  };
  const std::map<std::string, Take> valued = {
      {"--prompt", text(a.prompt)},
      {"--file", text(a.file)},
      {"--max-tokens", count_from(1, a.max_tokens)},
      {"--temperature", positive(a.temperature)},
      {"--top-k", count_from(0, a.top_k)},
      {"--top-p", share(a.top_p)},
      {"--min-p", share(a.min_p)},
      {"--repetition-penalty", positive(a.repetition_penalty)},
      {"--seed", count_from(0, a.seed)},
      {"--stop", [&](auto&, auto& value) { a.stop.push_back(value); }},
      {"--context", count_from(2, a.context)},
      {"--threads", count_from(1, a.threads)},
      {"--variant", text(a.variant)},
  };
  const std::map<std::string, std::function<void()>> flags = {
      {"--chat", [&] { a.chat = true; }},       {"--no-chat", [&] { a.chat = false; }},
      {"--json", [&] { a.json = true; }},       {"--no-verify", [&] { a.verify = false; }},
      {"--verbose", [&] { a.verbose = true; }}, {"--help", [&] { a.help = true; }},
      {"--version", [&] { a.version = true; }},
  };
  const std::map<char, std::string> letters = {
      {'p', "--prompt"}, {'f', "--file"}, {'v', "--verbose"}, {'h', "--help"}};
  bool options = true, directory = false;
  for (int i = 1; i < count; ++i) {
    std::string word = words[i];
    if (options && word == "--") {
      options = false;
      continue;
    }
    if (!options || word.size() < 2 || word[0] != '-') {
      if (directory) throw usage_error("There is one DIR too many: " + quote(word) + ".");
      a.directory = word;
      directory = true;
      continue;
    }
    std::string value;
    bool has_value = false;
    const std::size_t equals = word.find('=');
    if (word[1] != '-') {  // -p TEXT, -pTEXT
      const auto letter = letters.find(word[1]);
      if (letter == letters.end()) throw usage_error("There is no option " + quote(word) + ".");
      has_value = word.size() > 2;
      value = word.substr(2);
      word = letter->second;
    } else if (equals != std::string::npos) {
      has_value = true;
      value = word.substr(equals + 1);
      word.resize(equals);
    }
    if (const auto flag = flags.find(word); flag != flags.end()) {
      if (has_value) throw usage_error("The option " + word + " takes no value.");
      flag->second();
      continue;
    }
    const auto option = valued.find(word);
    if (option == valued.end()) throw usage_error("There is no option " + quote(word) + ".");
    if (!has_value) {
      if (i + 1 == count) throw usage_error("The option " + word + " needs a value.");
      value = words[++i];
    }
    option->second(word, value);
  }
  return a;
}

}  // namespace gqsa
