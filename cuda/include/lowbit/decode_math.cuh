// From codes and activations to products on the tensor cores. The weights are operand A, 16 rows; the tokens are the
// columns of operand B. A product does not mind which in-features are its k = 0..15 as long as both operands agree: a
// lane takes consecutive bytes of a row, and consecutive activations to match, so that no byte has to move.
#pragma once

#include "decode_plan.cuh"
#include "ptx.cuh"

namespace lowbit {

// As T, in the low half of a word.
template <typename T>
__device__ __forceinline__ uint32_t bits_of(float value) {
  const T rounded = from_float<T>(value);
  return *reinterpret_cast<const uint16_t*>(&rounded);
}

__device__ __forceinline__ uint32_t word_of(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// Writes the pair table of `codebook[code]`, `code` = lane % 16, with the even code of a byte in its high nibble.
template <typename T>
__device__ __forceinline__ void write_pair_table(uint8_t* table, float value, int warp, int warps, int lane) {
  const uint32_t bits = bits_of<T>(value);
  constexpr int kLanesOfAnEntry = kGap / 16, kEntriesAtOnce = kLanes / kLanesOfAnEntry;
  for (int first = warp * kEntriesAtOnce; first < 256; first += warps * kEntriesAtOnce) {
    const int entry = first + lane / kLanesOfAnEntry;
    const uint32_t even = __shfl_sync(kWholeWarp, bits, entry >> 4), odd = __shfl_sync(kWholeWarp, bits, entry & 15);
    const uint32_t pair = even | odd << 16;
    *reinterpret_cast<uint4*>(table + entry * kTableStride + lane % kLanesOfAnEntry * 16) =
        make_uint4(pair, pair, pair, pair);
  }
}

// A pair of fp32 as the sum of two pairs of float16, lower halves first.
struct Parts {
  uint32_t first, second;

  __device__ __forceinline__ Parts(float even, float odd) {
    const __half2 rounded = __floats2half2_rn(even, odd);
    const float2 widened = __half22float2(rounded);
    const __half2 rest = __floats2half2_rn(even - widened.x, odd - widened.y);
    first = *reinterpret_cast<const uint32_t*>(&rounded);
    second = *reinterpret_cast<const uint32_t*>(&rest);
  }
};

// As `write_pair_table`, with the first parts of pairs in the entries and the second ones in the gaps behind them.
__device__ __forceinline__ void write_parts_table(uint8_t* table, float value, int warp, int warps, int lane) {
  constexpr int kLanesOfAnEntry = kGap / 16, kEntriesAtOnce = kLanes / kLanesOfAnEntry;
  for (int first = warp * kEntriesAtOnce; first < 256; first += warps * kEntriesAtOnce) {
    const int entry = first + lane / kLanesOfAnEntry;
    const Parts pair(__shfl_sync(kWholeWarp, value, entry >> 4), __shfl_sync(kWholeWarp, value, entry & 15));
    uint8_t* to = table + entry * kTableStride + lane % kLanesOfAnEntry * 16;
    *reinterpret_cast<uint4*>(to) = make_uint4(pair.first, pair.first, pair.first, pair.first);
    *reinterpret_cast<uint4*>(to + kGap) = make_uint4(pair.second, pair.second, pair.second, pair.second);
  }
}

// The two weights of byte `i` of `codes`, from this lane's copy of the table.
__device__ __forceinline__ uint32_t look_up_pair(const uint8_t* table, uint32_t lane_offset, uint32_t codes, int i) {
  // Bytes of the offset, lowest first: the lane's, then the code byte; lane_offset has zeros above.
  return *reinterpret_cast<const uint32_t*>(table + __byte_perm(codes, lane_offset, 0x7604 | i << 4));
}

// Bytes `2 half` and `2 half + 1` of `codes`, int8, as T. Exact: a number's lower 7 bits are set beside 128 (bf16) or
// the number plus 128 beside 1024 (fp16), and what is too much is taken away.
template <typename T>
__device__ __forceinline__ uint32_t convert_int8_pair(uint32_t codes, int half);

template <>
__device__ __forceinline__ uint32_t convert_int8_pair<bfloat16>(uint32_t codes, int half) {
  const uint32_t bytes = __byte_perm(codes, 0, half == 0 ? 0x4140 : 0x4342);
  const uint32_t low_bits = (bytes & 0x007f007fu) | 0x43004300u, sign = (bytes & 0x00800080u) | 0x43004300u;
  const __nv_bfloat162 value =
      __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&low_bits), *reinterpret_cast<const __nv_bfloat162*>(&sign));
  return *reinterpret_cast<const uint32_t*>(&value);
}

template <>
__device__ __forceinline__ uint32_t convert_int8_pair<float16>(uint32_t codes, int half) {
  const uint32_t shifted = __byte_perm(codes ^ 0x80808080u, 0x64646464u, half == 0 ? 0x4140 : 0x4342);
  const __half2 value = __hsub2(*reinterpret_cast<const __half2*>(&shifted), __float2half2_rn(1152.0f));
  return *reinterpret_cast<const uint32_t*>(&value);
}

// A lane's codes of a visit, rows g and g + 8.
template <typename Shape>
struct Codes {
  static constexpr int kWords = Shape::kLaneBytes / 4;
  uint32_t words[Shape::kGroups][2][kWords];

  // `place`: the lane's offset in a stage for group 0. Groups differ in bits of the chunk, which the swizzle XORs.
  __device__ __forceinline__ void read(const uint8_t* stage, uint32_t place) {
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint8_t* from = stage + (place ^ group * (4 * Shape::kLaneBytes)) + half * (8 * kUnitBytes);
        if constexpr (kWords == 2) {
          const uint2 pair = *reinterpret_cast<const uint2*>(from);
          words[group][half][0] = pair.x;
          words[group][half][1] = pair.y;
        } else {
          words[group][half][0] = *reinterpret_cast<const uint32_t*>(from);
        }
      }
    }
  }

  // Operand A of product `i` of a group.
  template <typename T>
  __device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint8_t* table, uint32_t lane_offset, int group,
                                           int i) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (Shape::kBits == 4) {
        const uint32_t word = words[group][half][i / 2];
        a[half] = look_up_pair(table, lane_offset, word, i % 2 * 2);
        a[half + 2] = look_up_pair(table, lane_offset, word, i % 2 * 2 + 1);
      } else {
        a[half] = convert_int8_pair<T>(words[group][half][i], 0);
        a[half + 2] = convert_int8_pair<T>(words[group][half][i], 1);
      }
    }
  }
};

// A lane's activations of a unit: of column g of each tile of columns, those that match its codes.
template <typename T, typename Shape, int kTiles>
struct Activations {
  static constexpr int kWords = Shape::kLaneCols / 2;
  static constexpr int kTokens = kTokenTile / Operand<T>::kColumns;  // of a tile
  uint32_t words[kTiles][Shape::kGroups][kWords];

  // Columns of operand B that are no tokens repeat the last one: nobody reads what becomes of them. In-features past
  // the end become 0.
  __device__ __forceinline__ void load(const DecodeOperands& operands, int cols, int unit, int lane) {
    const int g = lane >> 2, t = lane & 3;
    const int col = unit * Shape::kUnit, groups = (cols - col) / Shape::kGroup;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint32_t token = min(tile * kTokens + g / Operand<T>::kColumns, operands.tokens - 1);
      load_tile(tile, static_cast<const T*>(operands.x) + static_cast<uint64_t>(token) * operands.x_stride +
                          (col + t * Shape::kLaneCols), groups, lane);
    }
  }

  // The sum of token g over group t of four, for a tile of tokens. A product with ones in row i alone puts the sums of
  // group i there; then they change places.
  __device__ __forceinline__ float group_sum(int tile, int quad, int lane) const {
    const int g = lane >> 2, t = lane & 3;
    using Number = typename Operand<T>::Number;
    const uint32_t one = bits_of<Number>(1.0f), ones = one | one << 16;
    float d[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t in_row = g == i ? ones : 0;
      const uint32_t a[4] = {in_row, 0, in_row, 0};
#pragma unroll
      for (int j = 0; j < Shape::kProducts; ++j) {
        const uint32_t (&x)[kWords] = words[tile][4 * quad + i];
        multiply_tile<Number>(d, a, x[2 * j], x[2 * j + 1], d[0], d[1], d[2], d[3]);
      }
    }
    const int holder = t * 4 + g / 2;
    const float even = __shfl_sync(kWholeWarp, d[0], holder), odd = __shfl_sync(kWholeWarp, d[1], holder);
    return g % 2 == 0 ? even : odd;
  }

  // What products of the lane's columns 2 t and 2 t + 1 of a tile, which are one token's, have to be multiplied by.
  __device__ __forceinline__ float factor(int tile) const { return factors[tile]; }

 private:
  float factors[kTiles];  // of float32

  __device__ __forceinline__ void load_tile(int tile, const T* from, int groups, int lane) {
    constexpr int kLoads = kWords / 4 * Operand<T>::kColumns, kInLoad = 16 / sizeof(T);
    uint4 loaded[Shape::kGroups][kLoads];
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        loaded[group][i] = load_16_if(from + group * Shape::kGroup + i * kInLoad, group < groups);
      }
    }
    if constexpr (Operand<T>::kColumns == 2) {
      split(tile, loaded, lane);
    } else {
#pragma unroll
      for (int group = 0; group < Shape::kGroups; ++group) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) words[tile][group][i] = word_of(loaded[group][i / 4], i % 4);
      }
    }
  }

  // The part of float32 activations that column g has: the first in even columns, the second in odd ones.
  template <int kLoads>
  __device__ __forceinline__ void split(int tile, const uint4 (&loaded)[Shape::kGroups][kLoads], int lane) {
    float largest = 0.0f;
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < 4 * kLoads; ++i) {
        largest = fmaxf(largest, fabsf(__uint_as_float(word_of(loaded[group][i / 4], i % 4))));
      }
    }
    // The four lanes of a column have all of its activations in the unit.
    largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 2));
    const Magnitude magnitude(largest);
    const bool is_second = lane >> 2 & 1;
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const uint4& four = loaded[group][i / 2];
        const Parts parts(__uint_as_float(word_of(four, i % 2 * 2)) * magnitude.up,
                          __uint_as_float(word_of(four, i % 2 * 2 + 1)) * magnitude.up);
        words[tile][group][i] = is_second ? parts.second : parts.first;
      }
    }
    // Column 2 t is in the four lanes from 8 t on.
    factors[tile] = __shfl_sync(kWholeWarp, magnitude.down, (lane & 3) * 8);
  }
};

}  // namespace lowbit
