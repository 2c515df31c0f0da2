// Runs CUDA C on one CPU thread: a block's threads are fibers that really interleave at barriers
// and warp operations. Blocks run one after the other, so a block must never wait for another.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <csetjmp>
#include <algorithm>
#include <random>
#include <type_traits>
#include <vector>
#include <ucontext.h>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __align__(n) alignas(n)
#define __launch_bounds__(...)

namespace emulation {

struct Dim3 { unsigned x = 1, y = 1, z = 1; };

inline Dim3 block_index, block_size, grid_size;

// Exit codes: the harness turns them into errors.
enum { DEADLOCK = 3, DIVERGENCE = 4, UNSUPPORTED = 5 };

[[noreturn]] inline void fail(int code, const char* message) {
  std::fprintf(stderr, "%s\n", message);
  std::exit(code);
}

constexpr unsigned WARP = 32;
constexpr size_t STACK = 64 * 1024;

// One operation of a whole warp: every lane leaves a value, and goes on when all have.
struct Exchange {
  uint64_t number = ~0ull;
  unsigned arrived = 0;
  int kind = 0;
  uint64_t values[WARP];
};

struct Warp { Exchange exchanges[2]; };

struct Thread {
  ucontext_t context;
  jmp_buf saved;
  bool started = false, done = false;
  Dim3 index;
  unsigned lane = 0;
  Warp* warp = nullptr;
  uint64_t operations = 0;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned alive = 0, at_barrier = 0;
  uint64_t barrier = 0, progress = 0;
  const void* barrier_site = nullptr;
};

inline Block block;
inline Thread* current = nullptr;
inline jmp_buf scheduler;
inline ucontext_t scheduler_context;
inline void (*kernel)(void**) = nullptr;
inline void** kernel_arguments = nullptr;
inline unsigned char* shared_memory = nullptr;

inline void yield() {
  if (_setjmp(current->saved) == 0) _longjmp(scheduler, 1);
}

inline void release_barrier() {
  block.at_barrier = 0;
  ++block.barrier;
}

// All threads of the block that still run must come to the same place of the code.
__attribute__((noinline)) inline void barrier() {
  const void* site = __builtin_return_address(0);
  if (block.at_barrier == 0) block.barrier_site = site;
  if (block.barrier_site != site) fail(DIVERGENCE, "threads wait at different barriers");
  const uint64_t mine = block.barrier;
  ++block.progress;
  if (++block.at_barrier == block.alive) release_barrier();
  while (block.barrier == mine) yield();
}

// Leaves `value` for the warp and returns what all 32 lanes left. Two buffers are enough: nobody
// is two operations ahead of a lane that has not read yet.
inline const uint64_t* exchange(unsigned mask, uint64_t value, int kind) {
  if (mask != 0xffffffffu) fail(UNSUPPORTED, "a warp operation of a part of the lanes");
  Thread& thread = *current;
  const uint64_t number = thread.operations++;
  Exchange& slot = thread.warp->exchanges[number % 2];
  if (slot.number != number) {
    slot.number = number;
    slot.arrived = 0;
    slot.kind = kind;
  }
  if (slot.kind != kind) fail(DIVERGENCE, "lanes of a warp are in different operations");
  slot.values[thread.lane] = value;
  slot.arrived |= 1u << thread.lane;
  ++block.progress;
  while (slot.arrived != 0xffffffffu) yield();
  return slot.values;
}

inline void thread_main() {
  kernel(kernel_arguments);
  current->done = true;
  --block.alive;
  ++block.progress;
  if (block.alive > 0 && block.at_barrier == block.alive) release_barrier();
  _longjmp(scheduler, 1);
}

inline void resume(Thread& thread) {
  current = &thread;
  if (_setjmp(scheduler) != 0) return;
  if (thread.started) _longjmp(thread.saved, 1);
  thread.started = true;
  setcontext(&thread.context);
}

// order: 0 first thread first, 1 last thread first, else shuffled anew every round by this seed.
inline void run_block(std::vector<unsigned char*>& stacks, unsigned order, std::mt19937& random) {
  const unsigned count = block_size.x * block_size.y * block_size.z;
  if (count % WARP) fail(UNSUPPORTED, "a block whose threads are no whole warps");
  block = Block{};
  block.threads.resize(count);
  block.warps.resize(count / WARP);
  block.alive = count;
  while (stacks.size() < count) {
    stacks.push_back(static_cast<unsigned char*>(std::aligned_alloc(4096, STACK)));
  }
  std::vector<unsigned> turns(count);
  for (unsigned t = 0; t < count; ++t) {
    Thread& thread = block.threads[t];
    thread.index = {t % block_size.x, t / block_size.x % block_size.y,
                    t / (block_size.x * block_size.y)};
    thread.lane = t % WARP;
    thread.warp = &block.warps[t / WARP];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stacks[t];
    thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, thread_main, 0);
    turns[t] = order == 1 ? count - 1 - t : t;
  }
  while (block.alive > 0) {
    const uint64_t before = block.progress;
    if (order > 1) std::shuffle(turns.begin(), turns.end(), random);
    for (unsigned t : turns) {
      if (!block.threads[t].done) resume(block.threads[t]);
    }
    if (block.progress == before && block.alive > 0) {
      fail(DEADLOCK, "threads wait for others that never come");
    }
  }
}

inline void launch(void (*function)(void**), void** arguments, Dim3 grid, Dim3 threads,
                   unsigned char* shared, size_t shared_bytes, unsigned order) {
  static std::vector<unsigned char*> stacks;
  std::mt19937 random(order);
  kernel = function;
  kernel_arguments = arguments;
  grid_size = grid;
  block_size = threads;
  shared_memory = shared;
  std::vector<unsigned> blocks(size_t(grid.x) * grid.y * grid.z);
  for (unsigned b = 0; b < blocks.size(); ++b) blocks[b] = b;
  if (order == 1) std::reverse(blocks.begin(), blocks.end());
  if (order > 1) std::shuffle(blocks.begin(), blocks.end(), random);
  for (unsigned b : blocks) {
    block_index = {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)};
    std::memset(shared, 0xff, shared_bytes);  // NaN in every float type
    run_block(stacks, order, random);
  }
}

}  // namespace emulation

#define threadIdx (emulation::current->index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)
#define __syncthreads() emulation::barrier()

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(4) ushort2 { unsigned short x, y; };
struct alignas(8) ushort4 { unsigned short x, y, z, w; };
struct alignas(2) uchar2 { unsigned char x, y; };
struct alignas(4) uchar4 { unsigned char x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#include "intrinsics.h"
#include "ptx.h"
