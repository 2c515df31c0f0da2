// The PTX instructions that the kernels write as assembly, as functions of their operands in order.
#pragma once

// Bit i of `table` is the result where the bits of a, b, c are those of i: a is 4, b 2, c 1.
inline void ptx_lop3_b32(unsigned& d, unsigned a, unsigned b, unsigned c, unsigned table) {
  d = 0;
  for (unsigned i = 0; i < 8; ++i) {
    if (table >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
}

// A warp's product: row g = lane / 4 and columns 2 (lane % 4) and the next of d; a has rows g and
// g + 8, b has column g, each with inputs 2 (lane % 4), the next, and these 8 further on.
inline void ptx_mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(
    float& d0, float& d1, float& d2, float& d3, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
    unsigned b0, unsigned b1, float c0, float c1, float c2, float c3) {
  uint64_t given[3] = {a0 | uint64_t(a1) << 32, a2 | uint64_t(a3) << 32, b0 | uint64_t(b1) << 32};
  uint64_t all[3][32];
  for (int i = 0; i < 3; ++i) {
    const uint64_t* values = emulation::exchange(0xffffffffu, given[i], 10 + i);
    std::copy(values, values + 32, all[i]);
  }
  auto number = [](uint64_t word, int at) {
    const uint16_t bits = uint16_t(word >> (16 * at));
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return float(value);
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
