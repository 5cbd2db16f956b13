// Floating-point weights to codes: who works on which block. quantize_codes.cuh says how a block is packed,
// quantize_scales.cuh how the scales of double quantization are.
#include "lowbit/quantize_scales.cuh"

extern "C" __device__ float lowbit_dynamic_map[256] = {};

namespace lowbit {

// Blocks of 16 to 512 weights, all of them whole, in a tensor without gaps: a block is up to 32 neighbours' vectors.
template <typename T, int kBits>
__device__ void quantize_vectors(const Source& source, const Rule& rule, const Target& out) {
  constexpr int kUnroll = sizeof(T) == 4 ? 1 : 2;
  __shared__ Tables tables;
  load_tables(rule, tables);
  const int lanes = static_cast<int>(out.block_size) / kVector;
  const int64_t count = out.block_count * out.block_size;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads * kUnroll + threadIdx.x) * kVector;
  Loaded<T> loaded[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t at = first + u * kThreads * kVector;
    loaded[u].load(static_cast<const T*>(source.base) + at, at < count);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t at = first + u * kThreads * kVector;
    float weights[kVector];
    loaded[u].widen(weights);
    Extremes range;
    range.add(weights, rule.shift != Shift::kNone);
    range.join(lanes, rule.shift != Shift::kNone);
    const bool is_negative = rule.signed_absmax && first_extreme_is_negative(weights, range.magnitude, lanes);
    if (at >= count) continue;
    const int64_t index = at >> (31 - __clz(static_cast<int>(out.block_size)));
    const bool writes = threadIdx.x % lanes == 0;
    const Outcome outcome = finish_block(rule, out, range, is_negative, index, at, writes);
    if (!range.is_finite()) report_nonfinite(out, at, weights);
    encode<kBits>(rule, tables, outcome, out, at, weights);
  }
}

// Calls `work(offset, weights)` for each of this thread's vectors of a block that the whole CTA works on.
template <typename T, typename Work>
__device__ __forceinline__ void for_each_vector(const T* block, int64_t length, Work&& work) {
  constexpr int kUnroll = sizeof(T) == 4 ? 1 : 2;
  constexpr int kStep = kThreads * kVector;
#pragma unroll 1
  for (int64_t first = threadIdx.x * kVector; first < length; first += kUnroll * kStep) {
    Loaded<T> loaded[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) loaded[u].load(block + first + u * kStep, first + u * kStep < length);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float weights[kVector];
      loaded[u].widen(weights);
      if (first + u * kStep < length) work(first + u * kStep, weights);
    }
  }
}

// The extremes of a block of which every thread of the CTA has seen a part.
__device__ __forceinline__ void join_over_cta(Extremes& range, bool with_ends) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ Extremes of_warps[kWarps];
  range.join(kWarp, with_ends);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = range;
  __syncthreads();
  range = of_warps[threadIdx.x % kWarps];
  range.join(kWarps, with_ends);
  __syncthreads();
}

// Whether the first weight of the largest magnitude is negative, of a block that the CTA works on.
template <typename T>
__device__ __forceinline__ bool first_extreme_of_cta_is_negative(const T* block, int64_t length, int magnitude) {
  __shared__ unsigned long long first;
  if (threadIdx.x == 0) first = ~0ull;
  __syncthreads();
  for_each_vector(block, length, [&](int64_t offset, const float (&weights)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const int bits = __float_as_int(weights[i]);
      const unsigned long long place = static_cast<unsigned long long>(offset + i) * 2 + (bits < 0);
      if ((bits & 0x7fffffff) == magnitude) atomicMin(&first, place);
    }
  });
  __syncthreads();
  const bool is_negative = first & 1;
  __syncthreads();
  return is_negative;
}

// Longer blocks, all of them whole, in a tensor without gaps: a CTA a block. What is read again is in the caches.
template <typename T, int kBits>
__device__ void quantize_long(const Source& source, const Rule& rule, const Target& out) {
  __shared__ Tables tables;
  load_tables(rule, tables);
  for (int64_t index = blockIdx.x; index < out.block_count; index += gridDim.x) {
    const int64_t first = index * out.block_size;
    const T* block = static_cast<const T*>(source.base) + first;
    Extremes range;
    for_each_vector(block, out.block_size,
                    [&](int64_t, const float (&weights)[kVector]) { range.add(weights, rule.shift != Shift::kNone); });
    join_over_cta(range, rule.shift != Shift::kNone);
    const bool is_negative =
        rule.signed_absmax && first_extreme_of_cta_is_negative(block, out.block_size, range.magnitude);
    const Outcome outcome = finish_block(rule, out, range, is_negative, index, first, threadIdx.x == 0);
    for_each_vector(block, out.block_size, [&](int64_t offset, const float (&weights)[kVector]) {
      if (!range.is_finite()) report_nonfinite(out, first + offset, weights);
      encode<kBits>(rule, tables, outcome, out, first + offset, weights);
    });
  }
}

// The weights of one block of any tensor.
template <typename T>
struct BlockSource {
  const Source& source;
  const T* start;  // of a block within a row; null where blocks straddle rows
  int64_t row;
  int64_t col;
  int64_t length;

  __device__ __forceinline__ BlockSource(const Source& from, const Target& out, int64_t index) : source(from) {
    const int64_t rows = from.shape[0] * from.shape[1], cols = from.shape[2];
    row = out.straddles_rows ? 0 : index / out.blocks_per_row;
    col = (out.straddles_rows ? index : index - row * out.blocks_per_row) * out.block_size;
    length = min(out.block_size, (out.straddles_rows ? rows * cols : cols) - col);
    start = out.straddles_rows ? nullptr : static_cast<const T*>(from.base) + offset_of(row, col);
  }
  // Where the block's weight i stands in the tensor, counted in row-major order.
  __device__ __forceinline__ int64_t position(int64_t i) const { return row * source.shape[2] + col + i; }
  __device__ __forceinline__ float read(int64_t i) const {
    if (start != nullptr) return to_float(start[i * source.strides[2]]);
    const int64_t at = position(i), in_row = at / source.shape[2];
    return to_float(static_cast<const T*>(source.base)[offset_of(in_row, at - in_row * source.shape[2])]);
  }

 private:
  __device__ __forceinline__ int64_t offset_of(int64_t in_row, int64_t in_col) const {
    const int64_t expert = in_row / source.shape[1];
    return expert * source.strides[0] + (in_row - expert * source.shape[1]) * source.strides[1] +
           in_col * source.strides[2];
  }
};

// A warp a block, whatever its size and the tensor's strides.
template <typename T, int kBits>
__device__ void quantize_blocks(const Source& source, const Rule& rule, const Target& out) {
  __shared__ Tables tables;
  load_tables(rule, tables);
  const int lane = threadIdx.x % kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
       index < out.block_count; index += step) {
    const BlockSource<T> block(source, out, index);
    Extremes range;
    for (int64_t i = lane; i < block.length; i += kWarp) {
      const float w = block.read(i);
      range.add(w, true);
      if (!(fabsf(w) < INFINITY)) report(out, 0, block.position(i));
    }
    range.join(kWarp, true);
    bool is_negative = false;
    for (int64_t i = lane; rule.signed_absmax && i - lane < block.length; i += kWarp) {
      const int bits = i < block.length ? __float_as_int(block.read(i)) : 0;
      const bool holds = i < block.length && (bits & 0x7fffffff) == range.magnitude;
      const uint32_t holders = __ballot_sync(kAllLanes, holds);
      if (holders != 0) {
        is_negative = __shfl_sync(kAllLanes, bits, __ffs(holders) - 1) < 0;
        break;
      }
    }
    const Outcome outcome = finish_block(rule, out, range, is_negative, index, block.position(0), lane == 0);
    const auto encoded = [&](int64_t i) {
      if (outcome.is_constant || i >= block.length) return static_cast<int>(rule.zero_code);
      return code_of<kBits>(rule, tables, outcome.block, block.read(i));
    };
    // A block starts with a byte: its size is even, and so is the row's number of codes.
    const int64_t code = block.row * out.row_codes + block.col;
    if constexpr (kBits == 8) {
      for (int64_t i = lane; i < block.length; i += kWarp) out.codes[code + i] = static_cast<uint8_t>(encoded(i));
    } else {
      for (int64_t i = 2 * lane; i < block.length; i += 2 * kWarp) {
        out.codes[(code + i) / 2] = static_cast<uint8_t>(encoded(i) << 4 | encoded(i + 1));
      }
    }
  }
}

}  // namespace lowbit

#define ENTRIES(name, T)                                                                                            \
  extern "C" __global__ void __launch_bounds__(lowbit::kThreads)                                                    \
      quantize_vectors_##name(const __grid_constant__ lowbit::Source source,                                        \
                              const __grid_constant__ lowbit::Rule rule, const __grid_constant__ lowbit::Target out) { \
    if (out.bits == 8) lowbit::quantize_vectors<T, 8>(source, rule, out);                                           \
    else lowbit::quantize_vectors<T, 4>(source, rule, out);                                                         \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(lowbit::kThreads)                                                    \
      quantize_long_##name(const __grid_constant__ lowbit::Source source,                                           \
                           const __grid_constant__ lowbit::Rule rule, const __grid_constant__ lowbit::Target out) { \
    if (out.bits == 8) lowbit::quantize_long<T, 8>(source, rule, out);                                              \
    else lowbit::quantize_long<T, 4>(source, rule, out);                                                            \
  }                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(lowbit::kThreads)                                                    \
      quantize_blocks_##name(const __grid_constant__ lowbit::Source source,                                         \
                             const __grid_constant__ lowbit::Rule rule, const __grid_constant__ lowbit::Target out) { \
    if (out.bits == 8) lowbit::quantize_blocks<T, 8>(source, rule, out);                                            \
    else lowbit::quantize_blocks<T, 4>(source, rule, out);                                                          \
  }
LOWBIT_FOR_EACH_DTYPE(ENTRIES)

extern "C" __global__ void __launch_bounds__(lowbit::kThreads)
    sum_scales(const float* scales, int64_t count, double* sums) {
  lowbit::sum_scales(scales, count, sums);
}

extern "C" __global__ void __launch_bounds__(lowbit::kThreads)
    quantize_scales(const float* scales, int64_t count, const double* sums, int32_t sum_count, uint8_t* codes,
                    float* scale_2, float* scale_offset) {
  lowbit::quantize_scales(scales, count, sums, sum_count, codes, scale_2, scale_offset);
}
