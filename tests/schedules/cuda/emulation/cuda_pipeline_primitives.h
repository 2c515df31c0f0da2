// Copies on their way: nothing has arrived until a thread waits for it.
#pragma once

#include <deque>
#include <map>

namespace emulation {

struct Copy { void* to; const void* from; size_t zeros; };
struct Pipeline { std::vector<Copy> open; std::deque<std::vector<Copy>> batches; };

// Of each thread of the block that runs; a kernel has to wait for all it asked for.
inline std::map<const Thread*, Pipeline> pipelines;

}  // namespace emulation

inline void __pipeline_memcpy_async(void* to, const void* from, size_t size, size_t zeros = 0) {
  if (size != 16 || reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    emulation::fail(emulation::UNSUPPORTED, "a copy that is not of 16 aligned bytes");
  }
  emulation::pipelines[emulation::current].open.push_back({to, from, zeros});
}

inline void __pipeline_commit() {
  auto& pipeline = emulation::pipelines[emulation::current];
  pipeline.batches.push_back(std::move(pipeline.open));
  pipeline.open.clear();
}

inline void __pipeline_wait_prior(size_t behind) {
  auto& batches = emulation::pipelines[emulation::current].batches;
  for (; batches.size() > behind; batches.pop_front()) {
    for (const auto& copy : batches.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, 16 - copy.zeros);
    }
  }
}
