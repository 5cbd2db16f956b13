// Floating-point weights to codes, with the arithmetic of rust/core/src/reference.rs to the last bit.
#include "lowbit/weight.cuh"

extern "C" __device__ float lowbit_dynamic_map[256] = {};

namespace lowbit {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
// Weights that a thread has of a block: as many as make the arithmetic for whole blocks small beside that for weights.
constexpr int kVector = 16;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kInfinityBits = 0x7f800000;
constexpr int kBins = 32;

// A strided tensor [experts, rows, cols], strides in elements. Mirrored in rust/core/src/cuda/quantize.rs, as is Rule.
struct Source {
  const void* base;
  int64_t shape[3];
  int64_t strides[3];
};

// How normalized weights become codes. A number's rank among the sorted values is counted in two steps: its bin, out of
// kBins equal ones that cover -limit to limit, tells how many thresholds lie in the bins below, and `steps` comparisons
// settle those in the bin itself. Bins are as many as banks, so that no lane waits for another.
struct Rule {
  float limit;
  float bin_scale;
  int32_t steps;
  int32_t is_sorted;      // codes are ranks
  int32_t zero_code;
  int32_t signed_absmax;
  Shift shift;
  float thresholds[kCodebookLength];
  uint8_t order[kCodebookLength];
  uint8_t ranks[kBins];
};
static_assert(sizeof(Source) == 56 && sizeof(Rule) == 140, "as rust/core/src/cuda/quantize.rs has them");

// Where codes go. `status` holds the lowest index of a weight that is NaN or infinite, and the lowest index of a block
// whose scale or shift its dtype cannot hold, counted in weights; both start beyond any index.
struct Target {
  uint8_t* codes;
  void* scales;
  void* shifts;
  unsigned long long* status;
  int64_t block_size;
  int64_t blocks_per_row;
  int64_t row_codes;
  int64_t block_count;
  int32_t straddles_rows;
  int32_t bits;
  Dtype scale_dtype;      // of the buffer that scales are written to
  Dtype shift_dtype;
};
static_assert(sizeof(Target) == 80, "as rust/core/src/cuda/quantize.rs has it");

struct Tables {
  float thresholds[kCodebookLength];
  int ranks[kBins];
  int order[kCodebookLength];
};

__device__ __forceinline__ void load_tables(const Rule& rule, Tables& tables) {
  const int i = threadIdx.x;
  if (i < kBins) tables.ranks[i] = rule.ranks[i];
  if (i < kCodebookLength) {
    tables.thresholds[i] = rule.thresholds[i];
    tables.order[i] = rule.order[i];
  }
  __syncthreads();
}

// Flips the lower bits of negative numbers, so that bit patterns order as signed integers; its own inverse.
__device__ __forceinline__ int ordered(int bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

// The largest magnitude and the ends of a range of weights, as integers that order as the numbers do.
struct Extremes {
  int magnitude = 0;  // beyond kInfinityBits for NaN
  int low = 0x7fffffff;
  int high = static_cast<int>(0x80000000u);

  __device__ __forceinline__ void add(float w, bool with_ends) {
    const int bits = __float_as_int(w);
    magnitude = max(magnitude, bits & 0x7fffffff);
    if (with_ends) {
      low = min(low, ordered(bits));
      high = max(high, ordered(bits));
    }
  }
  // Joins the extremes of `lanes` neighbours, a power of two.
  __device__ __forceinline__ void join(int lanes, bool with_ends) {
    for (int step = lanes / 2; step > 0; step /= 2) {
      magnitude = max(magnitude, __shfl_xor_sync(kAllLanes, magnitude, step));
      if (with_ends) {
        low = min(low, __shfl_xor_sync(kAllLanes, low, step));
        high = max(high, __shfl_xor_sync(kAllLanes, high, step));
      }
    }
  }
  __device__ __forceinline__ bool is_finite() const { return magnitude < kInfinityBits; }
  __device__ __forceinline__ float lowest() const { return __int_as_float(ordered(low)); }
  __device__ __forceinline__ float highest() const { return __int_as_float(ordered(high)); }
};

// How the weights of one block are normalized: u = (w - shift) * limit / extent.
struct Block {
  float extent;
  float shift;
  float inverse;

  __device__ __forceinline__ Block(const Rule& rule, const Extremes& range, bool is_negative, float stored_shift) {
    shift = stored_shift;
    if (rule.shift != Shift::kNone) {
      // The largest distance is that of an end, for a minimum of the upper one: rounding keeps order.
      extent = fmaxf(range.highest() - shift, rule.shift == Shift::kMiddle ? shift - range.lowest() : 0.0f);
    } else {
      extent = __int_as_float(range.magnitude);
      if (is_negative) extent = -extent;
    }
    inverse = rule.limit / extent;
  }
  // Whether `inverse` is in the range of fp32.
  __device__ __forceinline__ bool is_plain() const { return inverse != 0.0f && fabsf(inverse) < INFINITY; }
  __device__ __forceinline__ float normalized(float w) const { return __fmul_rn(w - shift, inverse); }
  // For extents whose inverse is not.
  __device__ __forceinline__ float normalized_in_fp64(const Rule& rule, float w) const {
    const double wide = static_cast<double>(rule.limit) / static_cast<double>(extent);
    return static_cast<float>((static_cast<double>(w) - static_cast<double>(shift)) * wide);
  }
};

// The rank of |u| <= limit; in 8 bits, the code itself. kSteps: `steps`, or 0 for a number known at run time.
template <int kBits, int kSteps>
__device__ __forceinline__ int rank_of(const Rule& rule, const Tables& tables, float u) {
  if constexpr (kBits == 8) {
    return __float2int_rn(u) & 255;
  } else {
    // A sum of this size has the whole part of its small addend above its two lowest bits, as rounding toward zero leaves
    // it: four times the bin, which is where its rank lies.
    const float shifted = __fmaf_rz(u, rule.bin_scale, 2097152.0f + kBins / 2);
    const char* ranks = reinterpret_cast<const char*>(tables.ranks);
    int rank = *reinterpret_cast<const int*>(ranks + (__float_as_uint(shifted) & (kBins - 1) * 4));
    const int steps = kSteps > 0 ? kSteps : rule.steps;
    for (int step = 0; step < steps; ++step) rank += u > tables.thresholds[rank] ? 1 : 0;
    return rank;
  }
}

// The code of one weight of a block.
template <int kBits>
__device__ __forceinline__ int code_of(const Rule& rule, const Tables& tables, const Block& block, float w) {
  const float u = block.is_plain() ? block.normalized(w) : block.normalized_in_fp64(rule, w);
  const int rank = rank_of<kBits, 0>(rule, tables, u);
  return rule.is_sorted ? rank : tables.order[rank];
}

// As `codes_of`, for blocks that are seldom; apart from it, so that the frequent ones' instructions lie together.
template <int kBits>
__device__ __noinline__ void codes_of_rare(const Rule& rule, const Tables& tables, const Block& block,
                                           const float* weights, int* codes) {
#pragma unroll 1
  for (int i = 0; i < kVector; ++i) codes[i] = code_of<kBits>(rule, tables, block, weights[i]);
}

// The codes of a thread's weights of a block.
template <int kBits>
__device__ __forceinline__ void codes_of(const Rule& rule, const Tables& tables, const Block& block,
                                         const float (&weights)[kVector], int (&codes)[kVector]) {
  if (block.is_plain() && rule.steps <= 1) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) codes[i] = rank_of<kBits, 1>(rule, tables, block.normalized(weights[i]));
  } else if (block.is_plain() && rule.steps == 2) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) codes[i] = rank_of<kBits, 2>(rule, tables, block.normalized(weights[i]));
  } else {
    // Copies, so that the originals need no address.
    float from[kVector];
    int to[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) from[i] = weights[i];
    codes_of_rare<kBits>(rule, tables, block, from, to);
#pragma unroll
    for (int i = 0; i < kVector; ++i) codes[i] = to[i];
    return;
  }
  if (rule.is_sorted) return;
#pragma unroll
  for (int i = 0; i < kVector; ++i) codes[i] = tables.order[codes[i]];
}

// What is stored for a block, and how its weights are then encoded.
struct Outcome {
  Block block;
  bool is_constant;  // every code is that of zero
};

// `first` is the index of the block's first weight; one lane a block has `writes`.
__device__ __forceinline__ Outcome finish_block(const Rule& rule, const Target& out, const Extremes& range,
                                                bool is_negative, int64_t index, int64_t first, bool writes) {
  const bool is_finite = range.is_finite();
  float exact = is_finite ? range.lowest() : NAN;
  // The middle of zeros of either sign is +0.
  if (rule.shift == Shift::kMiddle) exact = static_cast<float>((double{exact} + range.highest()) * 0.5) + 0.0f;
  const float shift = rule.shift != Shift::kNone ? rounded(out.shift_dtype, exact) : 0.0f;
  const Block block(rule, range, is_negative, shift);
  if (writes) {
    const float scale = !is_finite ? NAN : rule.limit == 1.0f ? block.extent : block.extent / rule.limit;
    const float stored = store(out.scales, out.scale_dtype, index, scale);
    if (rule.shift != Shift::kNone) store(out.shifts, out.shift_dtype, index, shift);
    if (is_finite && !(fabsf(stored) < INFINITY && fabsf(shift) < INFINITY)) {
      atomicMin(out.status + 1, static_cast<unsigned long long>(first));
    }
  }
  return {block, !is_finite || block.extent == 0.0f};
}

// A thread's codes as they are stored.
template <int kBits>
__device__ __forceinline__ void store_codes(const Target& out, int64_t index, const int (&codes)[kVector]) {
  constexpr int kInWord = 32 / kBits;
  uint32_t words[kVector / kInWord] = {};
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const int bit = kBits == 8 ? 8 * (i % 4) : 8 * (i % 8 / 2) + (i % 2 == 0 ? 4 : 0);
    words[i / kInWord] |= static_cast<uint32_t>(codes[i]) << bit;
  }
  if constexpr (kBits == 8) {
    *reinterpret_cast<uint4*>(out.codes + index) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
    *reinterpret_cast<uint2*>(out.codes + index / 2) = make_uint2(words[0], words[1]);
  }
}

// Whether the first of the weights with the largest magnitude, among those of `lanes` neighbours, is negative.
__device__ __forceinline__ bool first_extreme_is_negative(const float (&weights)[kVector], int magnitude, int lanes) {
  int sign = -1;
#pragma unroll
  for (int i = kVector - 1; i >= 0; --i) {
    const int bits = __float_as_int(weights[i]);
    if ((bits & 0x7fffffff) == magnitude) sign = bits < 0;
  }
  const int lane = threadIdx.x % kWarp;
  const uint32_t group = (lanes == kWarp ? kAllLanes : ((1u << lanes) - 1)) << (lane / lanes * lanes);
  const uint32_t holders = __ballot_sync(kAllLanes, sign >= 0) & group;
  return __shfl_sync(kAllLanes, sign, max(__ffs(holders) - 1, 0)) > 0;
}

// Blocks of 16 to 512 weights, all of them whole, in a tensor without gaps: a block is up to 32 neighbours' vectors.
template <typename T, int kBits>
__device__ void quantize_vectors(const Source& source, const Rule& rule, const Target& out) {
  constexpr int kUnroll = sizeof(T) == 4 ? 1 : 2;
  constexpr int kPart = 16 / sizeof(T);
  __shared__ Tables tables;
  load_tables(rule, tables);
  const int lanes = static_cast<int>(out.block_size) / kVector;
  const int64_t count = out.block_count * out.block_size;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads * kUnroll + threadIdx.x) * kVector;
  Vector<T, kPart> loaded[kUnroll][kVector / kPart];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t at = first + u * kThreads * kVector;
#pragma unroll
    for (int part = 0; part < kVector / kPart; ++part) {
      loaded[u][part] = {};
      if (at < count) {
        const T* from = static_cast<const T*>(source.base) + at + part * kPart;
        loaded[u][part] = *reinterpret_cast<const Vector<T, kPart>*>(from);
      }
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t at = first + u * kThreads * kVector;
    float weights[kVector];
    Extremes range;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      weights[i] = to_float(loaded[u][i / kPart].values[i % kPart]);
      range.add(weights[i], false);
    }
    if (rule.shift != Shift::kNone) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) range.add(weights[i], true);
    }
    range.join(lanes, rule.shift != Shift::kNone);
    const bool is_negative = rule.signed_absmax && first_extreme_is_negative(weights, range.magnitude, lanes);
    if (at >= count) continue;
    const int64_t index = at >> (31 - __clz(static_cast<int>(out.block_size)));
    const bool writes = threadIdx.x % lanes == 0;
    const Outcome outcome = finish_block(rule, out, range, is_negative, index, at, writes);
    if (!range.is_finite()) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        if (!(fabsf(weights[i]) < INFINITY)) atomicMin(out.status, static_cast<unsigned long long>(at + i));
      }
    }
    int codes[kVector];
    if (outcome.is_constant) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) codes[i] = rule.zero_code;
    } else {
      codes_of<kBits>(rule, tables, outcome.block, weights, codes);
    }
    store_codes<kBits>(out, at, codes);
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
      if (!(fabsf(w) < INFINITY)) atomicMin(out.status, static_cast<unsigned long long>(block.position(i)));
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

// Sum of `value` over the CTA, in an order that does not change; every thread gets it.
__device__ __forceinline__ double sum_over_cta(double value, double (&scratch)[kThreads]) {
  __syncthreads();
  scratch[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
    __syncthreads();
  }
  return scratch[0];
}

// Sums and counts of the finite scales that fall to each CTA, into sums[2 * blockIdx.x].
__device__ void sum_scales(const float* scales, int64_t count, double* sums) {
  __shared__ double scratch[kThreads];
  double sum = 0.0, finite = 0.0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    if (fabsf(scales[i]) < INFINITY) {
      sum += scales[i];
      finite += 1.0;
    }
  }
  sum = sum_over_cta(sum, scratch);
  finite = sum_over_cta(finite, scratch);
  if (threadIdx.x == 0) {
    sums[2 * blockIdx.x] = sum;
    sums[2 * blockIdx.x + 1] = finite;
  }
}

// The code of the dynamic map's value nearest to u; a tie goes to the even code. NaN takes the lowest.
__device__ __forceinline__ int nearest(const double* midpoints, double u) {
  int below = 0;
  for (int step = 128; step > 0; step /= 2) {
    const int probe = below + step;
    if (probe <= 255 && midpoints[probe - 1] < u) below = probe;
  }
  const bool is_tie = below < 255 && midpoints[below] == u;
  return is_tie && below % 2 == 1 ? below + 1 : below;
}

__device__ __forceinline__ double sum_over_warp(double value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// A warp for each 256 scales, a CTA after the other: codes, the second-level scale, and once for all the offset.
__device__ void quantize_scales(const float* scales, int64_t count, const double* sums, int32_t sum_count,
                                uint8_t* codes, float* scale_2, float* scale_offset) {
  constexpr int kEach = kScalesPerScale2 / kWarp;
  __shared__ double midpoints[kScalesPerScale2];
  const int thread = threadIdx.x, lane = thread % kWarp;
  if (thread < 255) {
    midpoints[thread] = 0.5 * (static_cast<double>(lowbit_dynamic_map[thread]) + lowbit_dynamic_map[thread + 1]);
  }
  double sum = 0.0, finite = 0.0;
  for (int i = lane; i < sum_count; i += kWarp) {
    sum += sums[2 * i];
    finite += sums[2 * i + 1];
  }
  const float offset = static_cast<float>(sum_over_warp(sum) / fmax(sum_over_warp(finite), 1.0));
  if (blockIdx.x == 0 && thread == 0) *scale_offset = offset;
  __syncthreads();
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + thread - lane; first * kEach < count; first += step) {
    float values[kEach];
    float absmax = 0.0f;
    bool all_finite = true;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t index = first * kEach + i * kWarp + lane;
      values[i] = index < count ? scales[index] : offset;
      all_finite = all_finite && fabsf(values[i]) < INFINITY;
      absmax = fmaxf(absmax, fabsf(values[i] - offset));
    }
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) absmax = fmaxf(absmax, __shfl_xor_sync(kAllLanes, absmax, lanes));
    if (!__all_sync(kAllLanes, all_finite)) absmax = NAN;
    const float inverse = 1.0f / absmax;
    const float factor = fabsf(inverse) < INFINITY ? inverse : 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int64_t index = first * kEach + i * kWarp + lane;
      if (index < count) codes[index] = static_cast<uint8_t>(nearest(midpoints, __fmul_rn(values[i] - offset, factor)));
    }
    if (lane == 0) scale_2[first / kWarp] = absmax;
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
