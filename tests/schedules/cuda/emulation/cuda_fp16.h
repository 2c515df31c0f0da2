// Half precision, rounded after every operation as the GPU does.
#pragma once

#include <cmath>

struct half {
  _Float16 value;
  half() = default;
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  half(T number) : value(_Float16(float(number))) {}
  operator float() const { return float(value); }
  half& operator+=(half other) { return *this = half(float(*this) + float(other)); }
};
using __half = half;

inline half operator+(half a, half b) { return half(float(a) + float(b)); }
inline half operator-(half a, half b) { return half(float(a) - float(b)); }
inline half operator*(half a, half b) { return half(float(a) * float(b)); }
inline bool __hgt(half a, half b) { return float(a) > float(b); }
inline bool __hlt(half a, half b) { return float(a) < float(b); }
inline float __half2float(half a) { return float(a); }
inline half __float2half(float a) { return half(a); }
inline half __float2half_rn(float a) { return half(a); }

struct alignas(4) half2 { half x, y; };
using __half2 = half2;

// A float32 sum of an exact product and a half has more than twice a half's digits, and a double
// holds it exactly but for ties that no 11-bit result can see.
inline half fused(half a, half b, half c) {
  half result;
  result.value = _Float16(double(float(a)) * double(float(b)) + double(float(c)));
  return result;
}
inline half2 __hfma2(half2 a, half2 b, half2 c) { return {fused(a.x, b.x, c.x), fused(a.y, b.y, c.y)}; }
inline half2 __hadd2(half2 a, half2 b) { return {a.x + b.x, a.y + b.y}; }
inline half2 __hsub2(half2 a, half2 b) { return {a.x - b.x, a.y - b.y}; }
inline half2 __hmul2(half2 a, half2 b) { return {a.x * b.x, a.y * b.y}; }
inline half2 operator+(half2 a, half2 b) { return __hadd2(a, b); }
inline half2 operator*(half2 a, half2 b) { return __hmul2(a, b); }
inline half2 __floats2half2_rn(float x, float y) { return {half(x), half(y)}; }
inline float __low2float(half2 a) { return float(a.x); }
inline float __high2float(half2 a) { return float(a.y); }
inline float2 __half22float2(half2 a) { return {float(a.x), float(a.y)}; }
