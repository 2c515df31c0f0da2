// Text from a prompt. Passes and the choice of tokens take turns on the session's thread, for a
// slice of time at once: waking a thread twice for each token costs a small model a twentieth of
// its speed. As runtime/generation.py and runtime/stream.py.
#include <algorithm>
#include <chrono>
#include <exception>

#include "error.h"
#include "model.h"
#include "text.h"

namespace gqsa {
namespace {

constexpr std::size_t kContextTokens = 8;  // prompt tokens that the decoder sees before the first
constexpr double kSlice = 0.02;            // seconds; a reader does not see such delays

double seconds() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

// A sequence of the session, for as long as this lives.
class Sequence {
 public:
  explicit Sequence(Session& session) : session_(session), id_(session.add()) {}
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;
  ~Sequence() {
    try {
      session_.remove(id_);
    } catch (const Error&) {  // what failed before says more
    }
  }
  std::int64_t id() const { return id_; }

 private:
  Session& session_;
  std::int64_t id_;
};

// What a token released, and how many there were then.
struct Released {
  std::string text;
  std::size_t tokens;
  double time;
};

// One answer, token by token.
class Answer {
 public:
  Answer(Session& session, const Tokenizer& tokenizer, const GenerateOptions& options,
         const std::set<std::int32_t>& eos, const std::vector<std::int32_t>& prompt,
         std::size_t most)
      : session_(session),
        options_(options),
        eos_(eos),
        prompt_(prompt),
        most_(most),
        sampler_(options.sampling, static_cast<std::size_t>(session.vocab_size()), prompt),
        decoder_(tokenizer, {prompt.end() - context(), prompt.end()}),
        stops_(options.stop),
        sequence_(session) {
    result_.prompt_tokens = prompt.size();
  }

  bool done() const { return done_; }

  // The next token. Called on the session's thread.
  Released step() {
    if (result_.token_ids.empty()) {
      logits_ = session_.prefill(sequence_.id(), prompt_);
    } else {
      logits_ = session_.decode({sequence_.id()}, {result_.token_ids.back()});
    }
    const std::int32_t token = sampler_(logits_.data);
    const double chosen = seconds();
    std::string text;
    if (!options_.ignore_eos && eos_.count(token) > 0) {
      result_.finish = Finish::eos;
      done_ = true;
    } else {
      result_.token_ids.push_back(token);
      text = stops_.push(decoder_.push(token));
      done_ = result_.token_ids.size() == most_;
    }
    if (done_) {
      text += stops_.push(decoder_.flush());
      text += stops_.flush();
    }
    if (stops_.stopped()) {
      result_.finish = Finish::stop;
      done_ = true;
    }
    return {std::move(text), result_.token_ids.size(), chosen};
  }

  // The reader wants no more after this piece, be it the last: tokens made ahead are forgotten.
  void cut(const Released& last) {
    result_.finish = Finish::callback;
    result_.token_ids.resize(last.tokens);
    done_ = true;
  }

  Generation take() { return std::move(result_); }

 private:
  std::ptrdiff_t context() const {
    return static_cast<std::ptrdiff_t>(options_.chat ? 0
                                                     : std::min(kContextTokens, prompt_.size()));
  }

  Session& session_;
  const GenerateOptions& options_;
  const std::set<std::int32_t>& eos_;
  const std::vector<std::int32_t>& prompt_;
  std::size_t most_;
  Sampler sampler_;
  TextDecoder decoder_;
  StopStrings stops_;
  Sequence sequence_;
  Logits logits_;
  Generation result_;
  bool done_ = false;
};

// Steps of one slice; what fails, after the pieces before it.
std::exception_ptr steps(Answer& answer, bool only_one, std::vector<Released>& pieces) {
  const double end = seconds() + kSlice;
  try {
    do {
      pieces.push_back(answer.step());
    } while (!only_one && !answer.done() && seconds() < end);
  } catch (...) {
    return std::current_exception();
  }
  return nullptr;
}

}  // namespace

Generation Model::generate(const std::string& prompt, const GenerateOptions& options,
                           const std::function<bool(const std::string&)>& emit) {
  const std::vector<std::int32_t> ids = prompt_ids(prompt, options.chat);
  session_->check_tokens(ids);
  const std::int64_t room = session_->context_length() - static_cast<std::int64_t>(ids.size());
  if (room < 1) {
    throw usage_error("The prompt has " + std::to_string(ids.size()) + " tokens and the context " +
                      std::to_string(session_->context_length()) +
                      ", which leaves no room for an answer; shorten the prompt, or compile the "
                      "model with a larger --context.");
  }
  if (options.max_tokens < 1) {
    throw usage_error("max_tokens is " + std::to_string(options.max_tokens) +
                      " and must be at least 1.");
  }
  for (const std::string& stop : options.stop) {
    if (stop.empty()) {
      throw usage_error("A stop string is empty; leave it out or give it some text.");
    }
  }
  const auto most = static_cast<std::size_t>(std::min(options.max_tokens, room));
  const double started = seconds();
  Answer answer(*session_, *tokenizer_, options, eos_, ids, most);
  double first = 0, last = 0;
  while (!answer.done()) {
    std::vector<Released> pieces;
    std::exception_ptr failure;
    // The first token alone: it is waited for.
    session_->run([&] { failure = steps(answer, first == 0, pieces); });
    for (const Released& piece : pieces) {
      if (first == 0) first = piece.time;
      last = piece.time;
      if (!piece.text.empty() && emit && !emit(piece.text)) {
        answer.cut(piece);
        failure = nullptr;
        break;
      }
    }
    if (failure) std::rethrow_exception(failure);
  }
  Generation result = answer.take();
  result.prefill_seconds = first - started;
  result.decode_seconds = last - first;
  return result;
}

}  // namespace gqsa
