// The CUDA functions that the generated code calls, outside half precision.
#pragma once

#include <cmath>

#define EMULATED_MIN_MAX(T)                          \
  inline T max(T a, T b) { return a > b ? a : b; }   \
  inline T min(T a, T b) { return a < b ? a : b; }
EMULATED_MIN_MAX(int)
EMULATED_MIN_MAX(unsigned)
EMULATED_MIN_MAX(int64_t)
EMULATED_MIN_MAX(float)
#undef EMULATED_MIN_MAX

template <typename T>
inline T __shfl_of(unsigned mask, T value, int kind, unsigned source) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 8 bytes at most");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* all = emulation::exchange(mask, bits, kind);
  T result;
  std::memcpy(&result, &all[source], sizeof(T));
  return result;
}

inline unsigned emulated_lane() { return emulation::current->lane; }

inline void whole_warp(int width) {
  if (width != 32) emulation::fail(emulation::UNSUPPORTED, "a shuffle within a part of the warp");
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  whole_warp(width);
  return __shfl_of(mask, value, 1, unsigned(lane) % 32);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  whole_warp(width);
  return __shfl_of(mask, value, 2, emulated_lane() ^ unsigned(lanes));
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  whole_warp(width);
  const unsigned lane = emulated_lane();
  return __shfl_of(mask, value, 3, lane + delta < 32 ? lane + delta : lane);
}

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::exchange(mask, 0, 4); }

inline void __threadfence() {}

// Blocks do not overlap, and threads change only where they wait: plain code is atomic.
inline unsigned atomicInc(unsigned* at, unsigned most) {
  const unsigned old = *at;
  *at = old >= most ? 0 : old + 1;
  return old;
}

template <typename T>
T __ldcg(const T* at) { return *at; }

template <typename T>
T __ldg(const T* at) { return *at; }

template <typename T>
T __ldcs(const T* at) { return *at; }

template <typename T>
void __stcg(T* at, T value) { *at = value; }

inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float rsqrtf(float x) { return float(1.0 / std::sqrt(double(x))); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }

// Byte i of the result is the one of `low` (0 to 3) or `high` (4 to 7) that nibble i names.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned bytes) {
  const uint64_t both = low | uint64_t(high) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= unsigned(both >> (8 * (bytes >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return result;
}
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
