// The PTX instructions that the kernels write as assembly, as functions of their operands in order.
#pragma once

// Bit i of `table` is the result where the bits of a, b, c are those of i: a is 4, b 2, c 1.
inline void ptx_lop3_b32(unsigned& d, unsigned a, unsigned b, unsigned c, unsigned table) {
  d = 0;
  for (unsigned i = 0; i < 8; ++i) {
    if (table >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
}

// Two int16 of `a` times the low (high) two unsigned bytes of `b`, added to `c` in 32 bits.
inline int emulated_dp2a(unsigned a, unsigned b, int c) {
  return c + int16_t(a) * int(b & 0xff) + int16_t(a >> 16) * int(b >> 8 & 0xff);
}
inline void ptx_dp2a_lo_s32_u32(int& d, unsigned a, unsigned b, int c) {
  d = emulated_dp2a(a, b, c);
}
inline void ptx_dp2a_hi_s32_u32(int& d, unsigned a, unsigned b, int c) {
  d = emulated_dp2a(a, b >> 16, c);
}

// Two floats rounded to 16 bits, ties to even; the first one is the upper.
inline void ptx_cvt_rn_bf16x2_f32(unsigned& d, float high, float low) {
  auto rounded = [](float x) {
    const unsigned bits = __float_as_uint(x);
    if (x != x) return 0x7fffu;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  d = rounded(high) << 16 | rounded(low);
}

inline size_t __cvta_generic_to_shared(const void* at) {
  return size_t(static_cast<const unsigned char*>(at) - emulation::shared_memory);
}

inline void ptx_mov_u32(unsigned& d, unsigned a) { d = a; }

inline void ptx_ld_shared_v4_u32(unsigned& d0, unsigned& d1, unsigned& d2, unsigned& d3,
                                 unsigned at) {
  if (at % 16) emulation::fail(emulation::UNSUPPORTED, "a load of 16 bytes that is not aligned");
  unsigned found[4];
  std::memcpy(found, emulation::shared_memory + at, 16);
  d0 = found[0], d1 = found[1], d2 = found[2], d3 = found[3];
}

// Four matrices of 8 x 8 16-bit numbers: lane 8 i + r has the address of row r of the i-th.
inline void ptx_ldmatrix_sync_aligned_m8n8_x4_shared_b16(
    unsigned& d0, unsigned& d1, unsigned& d2, unsigned& d3, unsigned row) {
  if (row % 16) emulation::fail(emulation::UNSUPPORTED, "a row of ldmatrix that is not aligned");
  const uint64_t* rows = emulation::exchange(0xffffffffu, row, 20);
  unsigned* const found[4] = {&d0, &d1, &d2, &d3};
  const int lane = emulation::current->lane;
  for (int i = 0; i < 4; ++i) {
    std::memcpy(found[i], emulation::shared_memory + rows[8 * i + lane / 4] + lane % 4 * 4, 4);
  }
}

inline float ptx_half(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return float(value);
}
inline float ptx_bfloat(uint16_t bits) { return __uint_as_float(unsigned(bits) << 16); }

// A warp's product: row g = lane / 4 and columns 2 (lane % 4) and the next of d; a has rows g and
// g + 8, b has column g, each with inputs 2 (lane % 4), the next, and these 8 further on.
inline void emulated_mma(
    float (*decode)(uint16_t), float& d0, float& d1, float& d2, float& d3, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
    unsigned b0, unsigned b1, float c0, float c1, float c2, float c3) {
  uint64_t given[3] = {a0 | uint64_t(a1) << 32, a2 | uint64_t(a3) << 32, b0 | uint64_t(b1) << 32};
  uint64_t all[3][32];
  for (int i = 0; i < 3; ++i) {
    const uint64_t* values = emulation::exchange(0xffffffffu, given[i], 10 + i);
    std::copy(values, values + 32, all[i]);
  }
  auto number = [decode](uint64_t word, int at) {
    return decode(uint16_t(word >> (16 * at)));
  };
  const int lane = emulation::current->lane, group = lane / 4, column = lane % 4 * 2;
  auto sum = [&](float c, int down, int right) {
    double total = 0;
    for (int k = 0; k < 16; ++k) {
      const int owner = k % 8 / 2, upper = k / 8, low = k % 2;
      const float a = number(all[upper][group * 4 + owner], 2 * down + low);
      const float b = number(all[2][(column + right) * 4 + owner], 2 * upper + low);
      total += double(a) * b;
    }
    return float(c + total);
  };
  d0 = sum(c0, 0, 0);
  d1 = sum(c1, 0, 1);
  d2 = sum(c2, 1, 0);
  d3 = sum(c3, 1, 1);
}

#define EMULATED_MMA(name, decode)                                                               \
  inline void name(float& d0, float& d1, float& d2, float& d3, unsigned a0, unsigned a1,         \
                   unsigned a2, unsigned a3, unsigned b0, unsigned b1, float c0, float c1,       \
                   float c2, float c3) {                                                         \
    emulated_mma(decode, d0, d1, d2, d3, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3);                \
  }
EMULATED_MMA(ptx_mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32, ptx_half)
EMULATED_MMA(ptx_mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32, ptx_bfloat)
#undef EMULATED_MMA
