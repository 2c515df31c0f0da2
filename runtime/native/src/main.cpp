// gqsa-run: one prompt in, the generated text and nothing else on standard output. It is written
// against gqsa.h alone, as any other program would be.
#include <unistd.h>

#include <climits>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>
#include <vector>

#include "arguments.h"
#include "error.h"
#include "gqsa.h"

namespace {

using gqsa::Arguments;
using gqsa::usage_error;

constexpr int kFailure = 1, kBadUsage = 2;
constexpr std::size_t kMostPrompt = 64 << 20;  // bytes

// A failed call of gqsa.h, as an exception of this program.
void check(gqsa_status status) {
  if (status != GQSA_OK) {
    throw gqsa::Error(static_cast<gqsa::Kind>(status), gqsa_last_error(), gqsa_last_error_detail());
  }
}

std::string read_all(std::istream& stream, const std::string& what) {
  std::string text;
  std::vector<char> block(1 << 16);
  while (stream.read(block.data(), static_cast<std::streamsize>(block.size())),
         stream.gcount() > 0) {
    text.append(block.data(), static_cast<std::size_t>(stream.gcount()));
    if (text.size() > kMostPrompt) {
      throw usage_error(what + " has more than " + std::to_string(kMostPrompt >> 20) +
                        " MiB, which fit no context; give a shorter prompt.");
    }
  }
  return text;
}

std::string read_prompt(const Arguments& a) {
  if (a.prompt && a.file) throw usage_error("Give the prompt with -p or with -f, not with both.");
  if (a.file) {
    std::ifstream file(*a.file, std::ios::binary);
    if (!file.is_open() || std::filesystem::is_directory(*a.file)) {
      throw usage_error(*a.file + " cannot be read; give -f a text file.");
    }
    return read_all(file, *a.file);
  }
  if (a.prompt && *a.prompt != "-") return *a.prompt;
  if (!a.prompt && isatty(STDIN_FILENO) != 0) {
    throw usage_error("There is no prompt; give one with -p TEXT, -f FILE or standard input.");
  }
  return read_all(std::cin, "Standard input");
}

// The folder that this program lies in: a bundle has it beside the model.
std::string own_directory() {
  char path[PATH_MAX];
  const ssize_t size = readlink("/proc/self/exe", path, sizeof path);
  const std::string text(path, size > 0 ? static_cast<std::size_t>(size) : 0);
  const std::size_t slash = text.rfind('/');
  return slash == std::string::npos ? "." : text.substr(0, slash);
}

void show_settings(const Arguments& a) {
  std::ostringstream out;
  const auto line = [&](const char* name, const auto& value) {
    out << "  " << std::left;
    out.width(20);
    out << name << value << "\n";
  };
  const auto maybe = [&](const char* name, const auto& value) {
    if (value) line(name, *value);
  };
  out << "gqsa-run\n";
  line("artefact", a.directory);
  line("chat template", a.chat ? "true" : "false");
  line("max tokens", a.max_tokens);
  maybe("temperature", a.temperature);
  maybe("top_k", a.top_k);
  maybe("top_p", a.top_p);
  maybe("min_p", a.min_p);
  maybe("repetition_penalty", a.repetition_penalty);
  maybe("seed", a.seed);
  for (const std::string& stop : a.stop)
    line("stop", gqsa::quote(stop));
  maybe("context", a.context);
  maybe("threads", a.threads);
  std::cerr << out.str();
}

// What the callback needs to know.
struct Output {
  bool json;
  std::string text;
};

int32_t take(const char* text, size_t bytes, void* user) {
  auto& output = *static_cast<Output*>(user);
  if (output.json) {
    output.text.append(text, bytes);
    return 0;
  }
  // A reader that is gone ends the program by SIGPIPE; a full disk ends the generation.
  const bool written = std::fwrite(text, 1, bytes, stdout) == bytes && std::fflush(stdout) == 0;
  return written ? 0 : 1;
}

double rate(double count, double seconds) { return seconds > 0 && count > 0 ? count / seconds : 0; }

const char* name_of(gqsa_finish finish) {
  static const char* const names[] = {"eos", "stop", "length", "callback"};
  return names[finish];
}

void show_figures(const gqsa_result& r) {
  std::fprintf(stderr, "[prompt %zu tokens, %.1f tokens/s; generated %zu tokens", r.prompt_tokens,
               rate(static_cast<double>(r.prompt_tokens), r.prefill_seconds), r.generated_tokens);
  if (r.generated_tokens > 1) {
    std::fprintf(stderr, ", %.1f tokens/s",
                 rate(static_cast<double>(r.generated_tokens) - 1, r.decode_seconds));
  }
  std::fprintf(stderr, "; ended by %s]\n", name_of(r.finish));
}

void print_json(const Output& output, const gqsa_result& r) {
  nlohmann::ordered_json data;
  data["text"] = output.text;
  data["token_ids"] = std::vector<std::int32_t>(r.token_ids, r.token_ids + r.generated_tokens);
  data["finish_reason"] = name_of(r.finish);
  data["prompt_tokens"] = r.prompt_tokens;
  data["generated_tokens"] = r.generated_tokens;
  data["first_token_seconds"] = r.prefill_seconds;
  data["prefill_tokens_per_second"] = rate(static_cast<double>(r.prompt_tokens), r.prefill_seconds);
  data["decode_tokens_per_second"] =
      rate(static_cast<double>(r.generated_tokens) - 1, r.decode_seconds);
  if (!(std::cout << data.dump(2) << "\n" << std::flush)) {
    throw gqsa::Error(gqsa::Kind::runtime, "The result cannot be written to standard output.");
  }
}

void run(Arguments a) {
  if (a.directory.empty()) a.directory = own_directory();
  const std::string prompt = read_prompt(a);
  show_settings(a);

  gqsa_load_options load;
  gqsa_load_options_init(&load);
  load.max_batch = 1;  // one sequence: the cache holds one context, not a whole batch
  load.context_length = a.context.value_or(0);
  load.threads = static_cast<int32_t>(std::min<std::int64_t>(a.threads.value_or(0), INT32_MAX));
  load.verify = a.verify ? 1 : 0;
  load.variant = a.variant.empty() ? nullptr : a.variant.c_str();
  gqsa_model* loaded = nullptr;
  check(gqsa_load(a.directory.c_str(), &load, &loaded));
  const std::unique_ptr<gqsa_model, void (*)(gqsa_model*)> model(loaded, gqsa_free);
  gqsa_info info;
  check(gqsa_get_info(loaded, &info));
  if (info.variants > 1) std::cerr << "Running the code for " << info.variant << ".\n";

  gqsa_generate_options options;
  check(gqsa_generate_options_init(loaded, &options));
  gqsa_sampling& sampling = options.sampling;
  sampling.temperature = a.temperature.value_or(sampling.temperature);
  sampling.top_k = a.top_k.value_or(sampling.top_k);
  sampling.top_p = a.top_p.value_or(sampling.top_p);
  sampling.min_p = a.min_p.value_or(sampling.min_p);
  sampling.repetition_penalty = a.repetition_penalty.value_or(sampling.repetition_penalty);
  sampling.seed = a.seed.value_or(-1);
  options.max_tokens = a.max_tokens;
  options.chat = a.chat ? 1 : 0;
  std::vector<const char*> stops;
  for (const std::string& stop : a.stop)
    stops.push_back(stop.c_str());
  options.stop = stops.data();
  options.stop_count = stops.size();

  Output output{a.json, ""};
  gqsa_result result;
  check(gqsa_generate(loaded, prompt.data(), prompt.size(), &options, take, &output, &result));
  if (result.finish == GQSA_FINISH_CALLBACK) {
    throw gqsa::Error(gqsa::Kind::runtime, "The text cannot be written to standard output.");
  }
  if (a.json) {
    print_json(output, result);
    return;
  }
  if (isatty(STDOUT_FILENO) != 0) std::puts("");
  if (info.has_chat_template != 0 && !a.chat) {
    std::cerr << "This model has a chat template; --chat applies it.\n";
  }
  show_figures(result);
}

}  // namespace

int main(int count, char** words) {
  bool verbose = false;
  try {
    const Arguments arguments = gqsa::parse_arguments(count, words);
    verbose = arguments.verbose;
    if (arguments.help) {
      std::fputs(gqsa::kHelp, stdout);
      return 0;
    }
    if (arguments.version) {
      std::printf("gqsa-run %s\n", gqsa_version());
      return 0;
    }
    run(arguments);
    return 0;
  } catch (const gqsa::Error& error) {
    std::cerr << "error: " << error.what() << "\n";
    if (verbose && !error.detail.empty()) std::cerr << error.detail << "\n";
    return error.kind == gqsa::Kind::usage ? kBadUsage : kFailure;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return kFailure;
  }
}
