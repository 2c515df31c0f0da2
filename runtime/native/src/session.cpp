#include "session.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <set>

#include "cpus.h"
#include "error.h"
#include "files.h"
#include "library.h"

namespace gqsa {
namespace {

constexpr int kCpu = 1, kPooledAllocator = 2;
constexpr std::size_t kAlignment = 64;  // where TVM's code takes its arguments to be

std::int64_t limit(const char* name, std::int64_t asked, std::int64_t most) {
  if (asked == 0) return most;
  if (asked < 1 || asked > most) {
    throw usage_error(std::string(name) + " is " + std::to_string(asked) +
                      " and the artefact was compiled for 1 to " + std::to_string(most) +
                      "; choose one of those or compile the model again.");
  }
  return asked;
}

// int32 [n] on a 64-byte boundary, and the tensor over it.
class Ids {
 public:
  Ids(const std::int32_t* ids, std::size_t count)
      : memory_(std::aligned_alloc(kAlignment,
                                   (count * 4 + kAlignment - 1) / kAlignment * kAlignment)) {
    if (memory_ == nullptr) throw Error(Kind::memory, "There is not enough memory for the tokens.");
    std::memcpy(memory_, ids, count * 4);
    tensor_ = tvm::tensor(memory_, {static_cast<std::int64_t>(count)}, {kDLInt, 32, 1});
  }
  ~Ids() {
    tensor_ = tvm::Any();
    std::free(memory_);
  }
  Ids(const Ids&) = delete;
  Ids& operator=(const Ids&) = delete;
  const tvm::Any& tensor() const { return tensor_; }

 private:
  void* memory_;
  tvm::Any tensor_;
};

tvm::Any function(const tvm::Any& module, const char* name) {
  tvm::Any found = tvm::call(tvm::global("ffi.ModuleGetFunction"), {module, name, true});
  if (found.type() != kTVMFFIFunction) {
    throw artefact_error(std::string("The artefact's library is not a compiled model: it has no "
                                     "function ") +
                         name + ".");
  }
  return found;
}

std::string gigabytes(std::int64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f GB", static_cast<double>(bytes) / 1e9);
  return text;
}

}  // namespace

Program::Program(const std::string& directory, Manifest manifest, const std::string& variant,
                 bool verify, const std::string& runtime_dirs)
    : manifest_(std::move(manifest)), variant_(&choose_variant(manifest_, variant)) {
  mapped_ =
      map_parameters(join_path(directory, manifest_.parameters_file), manifest_.parameters, verify);
  module_ = load_module(directory, manifest_, *variant_, runtime_dirs);
  std::vector<tvm::Any> tensors;
  for (std::size_t i = 0; i < manifest_.parameters.size(); ++i) {
    const Parameter& parameter = manifest_.parameters[i];
    const Dtype dtype = dtype_of(parameter);
    tensors.push_back(
        tvm::tensor(mapped_.views[i].data, parameter.shape, {dtype.code, dtype.bits, 1}));
  }
  parameters_ = tvm::call(tvm::global("ffi.Array"),
                          std::vector<tvm::Argument>(tensors.begin(), tensors.end()));
}

Session::Session(std::shared_ptr<const Program> program, const SessionLimits& limits)
    : program_(std::move(program)) {
  const Manifest& m = program_->manifest();
  context_length_ = limit("context_length", limits.context_length, m.context_length);
  max_batch_ = limit("max_batch", limits.max_batch, m.max_batch);
  vocab_size_ = m.vocab_size;
  std::vector<int> cpus = allowed_cpus();
  const int most = static_cast<int>(cpus.size());
  if (limits.threads != 0 && (limits.threads < 1 || limits.threads > most)) {
    throw usage_error("threads is " + std::to_string(limits.threads) +
                      " and this process may use " + std::to_string(most) + " CPUs; choose 1 to " +
                      std::to_string(most) + ".");
  }
  threads_ = limits.threads != 0 ? limits.threads : std::min(default_threads(), most);
  cpus.resize(static_cast<std::size_t>(threads_));
  workers_ = &Workers::share(cpus);
  workers_->run([this] { start(); });
}

Session::~Session() {
  const auto free = [this] {
    for (tvm::Any* any : {&kv_, &forward_, &hidden_, &vm_})
      *any = tvm::Any();
  };
  workers_->run(free);
}

void Session::start() {
  const Manifest& m = program_->manifest();
  vm_ = tvm::call(function(program_->module(), "vm_load_executable"), {});
  tvm::call(function(vm_, "vm_initialization"), {kCpu, 0, kPooledAllocator});
  forward_ = function(vm_, "forward");
  hidden_ = function(vm_, "hidden_states");
  const tvm::Any create = function(vm_, "create_kv_cache");
  const std::int64_t pages = (context_length_ + m.page_size - 1) / m.page_size * max_batch_;
  const std::int64_t tokens = pages * m.page_size;
  try {
    kv_ = tvm::call(create, {tvm::shape({max_batch_, tokens, m.prefill_chunk})});
  } catch (const Error& error) {
    throw Error(
        Kind::memory,
        "The key/value cache of " + std::to_string(tokens) + " tokens (" +
            gigabytes(tokens * std::min(m.kv_bytes_per_token,
                                        std::numeric_limits<std::int64_t>::max() / tokens)) +
            ") cannot be made: " + error.what() + " Ask for a smaller context or batch.",
        error.detail);
  }
  add_ = tvm::global("vm.builtin.kv_state_add_sequence");
  remove_ = tvm::global("vm.builtin.kv_state_remove_sequence");
  begin_ = tvm::global("vm.builtin.kv_state_begin_forward");
  end_ = tvm::global("vm.builtin.kv_state_end_forward");
  pop_ = tvm::global("vm.builtin.kv_state_popn");
}

std::int64_t Session::add() {
  if (static_cast<std::int64_t>(lengths_.size()) >= max_batch_) {
    throw usage_error("The session holds " + std::to_string(max_batch_) +
                      " sequences, all that max_batch allows; finish one first or load the "
                      "artefact with a larger max_batch.");
  }
  const std::int64_t sequence = next_++;
  workers_->run([&] { tvm::call(add_, {kv_, sequence}); });
  lengths_[sequence] = 0;
  return sequence;
}

void Session::remove(std::int64_t sequence) {
  if (lengths_.erase(sequence) > 0) workers_->run([&] { tvm::call(remove_, {kv_, sequence}); });
}

std::int64_t Session::length(std::int64_t sequence) const {
  const auto found = lengths_.find(sequence);
  if (found == lengths_.end()) {
    throw usage_error("The session has no sequence " + std::to_string(sequence) +
                      "; open one first.");
  }
  return found->second;
}

void Session::require_room(std::int64_t tokens) const {
  if (tokens > context_length_) {
    throw usage_error("The prompt has " + std::to_string(tokens) + " tokens and the context " +
                      std::to_string(context_length_) +
                      "; shorten the prompt, or compile the model with a larger --context.");
  }
}

void Session::check_tokens(const std::vector<std::int32_t>& tokens) const {
  if (tokens.empty()) throw usage_error("The prompt is empty; at least one token is needed.");
  for (const std::int32_t token : tokens) {
    if (token < 0 || token >= vocab_size_) {
      throw usage_error("The prompt has the token id " + std::to_string(token) +
                        ", and the model's vocabulary is 0 to " + std::to_string(vocab_size_ - 1) +
                        ".");
    }
  }
}

Logits Session::prefill(std::int64_t sequence, const std::vector<std::int32_t>& tokens) {
  check_tokens(tokens);
  require_room(length(sequence) + static_cast<std::int64_t>(tokens.size()));
  const auto chunk = static_cast<std::size_t>(program_->manifest().prefill_chunk);
  std::size_t start = 0;
  for (; tokens.size() - start > chunk; start += chunk) {
    pass({sequence}, &tokens[start], chunk, nullptr);
  }
  const std::size_t left = tokens.size() - start;
  const std::vector<std::int32_t> rows = {static_cast<std::int32_t>(left - 1)};
  return checked(pass({sequence}, &tokens[start], left, &rows), 1);
}

Logits Session::decode(const std::vector<std::int64_t>& sequences,
                       const std::vector<std::int32_t>& tokens) {
  check_tokens(tokens);
  if (tokens.size() != sequences.size()) {
    throw usage_error("There are not as many tokens as sequences; give one for each.");
  }
  if (std::set<std::int64_t>(sequences.begin(), sequences.end()).size() != sequences.size()) {
    throw usage_error("A sequence is named twice; decode takes one token for each.");
  }
  std::vector<std::int32_t> rows;
  for (const std::int64_t sequence : sequences) {
    require_room(length(sequence) + 1);
    rows.push_back(static_cast<std::int32_t>(rows.size()));
  }
  return checked(pass(sequences, tokens.data(), tokens.size(), &rows), rows.size());
}

tvm::Any Session::pass(const std::vector<std::int64_t>& sequences, const std::int32_t* tokens,
                       std::size_t count, const std::vector<std::int32_t>* rows) {
  const auto each = static_cast<std::int64_t>(count / sequences.size());
  tvm::Any result;
  workers_->run([&] {
    const std::vector<std::int64_t> lengths(sequences.size(), each);
    tvm::call(begin_, {kv_, tvm::shape(sequences), tvm::shape(lengths)});
    try {
      result = compute(tokens, count, rows);
      tvm::call(end_, {kv_});
    } catch (...) {
      forget(sequences, each);
      throw;
    }
  });
  for (const std::int64_t sequence : sequences)
    lengths_[sequence] += each;
  return result;
}

tvm::Any Session::compute(const std::int32_t* tokens, std::size_t count,
                          const std::vector<std::int32_t>* rows) const {
  const Ids ids(tokens, count);
  if (rows == nullptr) return tvm::call(hidden_, {ids.tensor(), kv_, program_->parameters()});
  const Ids chosen(rows->data(), rows->size());
  return tvm::call(forward_, {ids.tensor(), chosen.tensor(), kv_, program_->parameters()});
}

void Session::forget(const std::vector<std::int64_t>& sequences, std::int64_t each) const {
  const auto attempt = [](const tvm::Any& function, std::initializer_list<tvm::Argument> given) {
    try {
      tvm::call(function, given);
    } catch (const Error&) {  // the pass's own error says more
    }
  };
  attempt(end_, {kv_});
  for (const std::int64_t sequence : sequences)
    attempt(pop_, {kv_, sequence, each});
}

Logits Session::checked(tvm::Any result, std::size_t rows) const {
  const DLTensor& t = result.tensor();
  if (t.ndim != 2 || t.shape[0] != static_cast<std::int64_t>(rows) || t.shape[1] != vocab_size_ ||
      t.dtype.code != kDLFloat || t.dtype.bits != 32 || t.dtype.lanes != 1) {
    throw artefact_error(
        "The compiled code gave logits of another shape than the manifest says; "
        "copy or compile the artefact again.");
  }
  const auto* data =
      reinterpret_cast<const float*>(static_cast<const char*>(t.data) + t.byte_offset);
  return {std::move(result), data};
}

}  // namespace gqsa
