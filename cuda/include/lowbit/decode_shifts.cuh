// The part of a product that shifts make: shift[row, group] * (the group's sum of x), 4 groups by two more products on
// the tensor cores. These take bf16, so that both factors are split into three parts that hold all 24 bits of fp32;
// what is left out is below 2^-24 of a term. A lane needs one group's numbers only, t's.
#pragma once

#include "decode_math.cuh"

namespace lowbit {

// value = high + middle + low.
struct ThreeParts {
  uint32_t high, middle, low;

  __device__ __forceinline__ explicit ThreeParts(float value) {
    const bfloat16 first = from_float<bfloat16>(value);
    const float rest = value - to_float(first);
    const bfloat16 second = from_float<bfloat16>(rest);
    high = bits_of<bfloat16>(value);
    middle = bits_of<bfloat16>(rest);
    low = bits_of<bfloat16>(rest - to_float(second));
  }
};

// Operand B: column g is token g, and t's four rows belong to group t. Made once a unit.
struct GroupSums {
  uint32_t high_middle, low_high;

  __device__ __forceinline__ void set(float sum) {
    const ThreeParts x(sum);
    high_middle = x.high | x.middle << 16;
    low_high = x.low | x.high << 16;
  }
};

// d += shift of rows g and g + 8 in group t, times the sums.
__device__ __forceinline__ void add_shifts(float (&d)[4], float upper, float lower, const GroupSums& sums) {
  const ThreeParts u(upper), l(lower);
  // (high + middle) of one factor times (high + middle) of the other,
  const uint32_t main[4] = {u.high * 0x10001u, l.high * 0x10001u, u.middle * 0x10001u, l.middle * 0x10001u};
  multiply_tile<bfloat16>(d, main, sums.high_middle, sums.high_middle, d[0], d[1], d[2], d[3]);
  // and high times low both ways.
  const uint32_t rest[4] = {u.high | u.low << 16, l.high | l.low << 16, 0, 0};
  multiply_tile<bfloat16>(d, rest, sums.low_high, 0, d[0], d[1], d[2], d[3]);
}

}  // namespace lowbit
