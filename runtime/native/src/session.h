// The compiled functions, their parameters and one paged key/value cache; as runtime/engine.py.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "manifest.h"
#include "params.h"
#include "tvm.h"
#include "workers.h"

namespace gqsa {

// Compiled code and mapped parameters of one artefact.
class Program {
 public:
  Program(const std::string& directory, Manifest manifest, const std::string& variant, bool verify,
          const std::string& runtime_dirs);

  const Manifest& manifest() const { return manifest_; }
  const Variant& variant() const { return *variant_; }
  const tvm::Any& module() const { return module_; }
  const tvm::Any& parameters() const { return parameters_; }

 private:
  Manifest manifest_;
  const Variant* variant_;
  Parameters mapped_;  // before what refers to it
  tvm::Any module_, parameters_;
};

// Limits that are 0 are the artefact's own.
struct SessionLimits {
  int threads = 0;
  std::int64_t context_length = 0, max_batch = 0;
};

// The logits of a pass: `data` is float32 [rows, vocab_size], TVM's memory, which `tensor` keeps.
struct Logits {
  tvm::Any tensor;
  const float* data = nullptr;
};

class Session {
 public:
  Session(std::shared_ptr<const Program> program, const SessionLimits& limits);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  std::int64_t context_length() const { return context_length_; }
  std::int64_t max_batch() const { return max_batch_; }
  std::int64_t vocab_size() const { return vocab_size_; }
  int threads() const { return threads_; }

  // Call a function on the thread that passes run on; they then need no other one to be woken.
  void run(const std::function<void()>& function) { workers_->run(function); }

  std::int64_t add();
  void remove(std::int64_t sequence);

  // Append tokens to a sequence, in chunks; the last one's logits.
  Logits prefill(std::int64_t sequence, const std::vector<std::int32_t>& tokens);
  // Append one token to each of several sequences; a row of logits for each.
  Logits decode(const std::vector<std::int64_t>& sequences,
                const std::vector<std::int32_t>& tokens);
  // The compiled embedding would take another token's row. Throws Error (usage).
  void check_tokens(const std::vector<std::int32_t>& tokens) const;

 private:
  void start();
  std::int64_t length(std::int64_t sequence) const;
  void require_room(std::int64_t tokens) const;
  tvm::Any pass(const std::vector<std::int64_t>& sequences, const std::int32_t* tokens,
                std::size_t count, const std::vector<std::int32_t>* rows);
  tvm::Any compute(const std::int32_t* tokens, std::size_t count,
                   const std::vector<std::int32_t>* rows) const;
  // End a pass that failed: the cache has no token of it.
  void forget(const std::vector<std::int64_t>& sequences, std::int64_t each) const;
  Logits checked(tvm::Any result, std::size_t rows) const;

  std::shared_ptr<const Program> program_;
  std::int64_t context_length_, max_batch_, vocab_size_;
  int threads_;
  std::map<std::int64_t, std::int64_t> lengths_;
  std::int64_t next_ = 0;
  Workers* workers_;
  tvm::Any vm_, forward_, hidden_, kv_;
  tvm::Any add_, remove_, begin_, end_, pop_;
};

}  // namespace gqsa
