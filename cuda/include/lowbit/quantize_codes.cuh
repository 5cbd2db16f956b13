// From the weights of a block to its scale and codes: the arithmetic of rust/core/src/reference.rs to the last bit.
#pragma once

#include "weight.cuh"

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
// settle those in the bin itself. Bins are as many as banks, so that no lane waits for another. A threshold that is the
// last number of its bin, like that between FP4's two zeros, needs no comparison.
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
// whose scale or shift its dtype cannot hold, counted in weights; both start beyond any index. Null where nobody asks.
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

// Lowers a number of the status to `index`.
__device__ __forceinline__ void report(const Target& out, int which, int64_t index) {
  if (out.status != nullptr) atomicMin(out.status + which, static_cast<unsigned long long>(index));
}

struct Tables {
  float thresholds[kCodebookLength];
  int ranks[kBins];
  int order[kCodebookLength];
  // Of each bin: its first threshold, and the codes below and above that, 4 bits each.
  float edges[kBins];
  int codes[kBins];
};

__device__ __forceinline__ void load_tables(const Rule& rule, Tables& tables) {
  const int i = threadIdx.x;
  if (i < kBins) {
    const int rank = rule.ranks[i], next = min(rank + 1, kCodebookLength - 1);
    tables.ranks[i] = rank;
    tables.edges[i] = rule.thresholds[rank];
    tables.codes[i] = rule.order[rank] | rule.order[next] << 4;
  }
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
  __device__ __forceinline__ void add(const float (&weights)[kVector], bool with_ends) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) add(weights[i], false);
    if (!with_ends) return;
#pragma unroll
    for (int i = 0; i < kVector; ++i) add(weights[i], true);
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

// Four times the bin of |u| <= limit: an offset into a table of words.
__device__ __forceinline__ uint32_t bin_of(const Rule& rule, float u) {
  // A sum of this size ends in two bits of quarters, above which rounding toward zero leaves its whole part: the bin.
  const float shifted = __fmaf_rz(u, rule.bin_scale, 2097152.0f + kBins / 2);
  return __float_as_uint(shifted) & (kBins - 1) * 4;
}

template <typename T>
__device__ __forceinline__ T word_at(const T (&table)[kBins], uint32_t offset) {
  return *reinterpret_cast<const T*>(reinterpret_cast<const char*>(table) + offset);
}

// The code of |u| <= limit where no bin has more than one threshold to compare with. kIsSorted: codes are ranks.
template <int kBits, bool kIsSorted>
__device__ __forceinline__ uint32_t quick_code(const Rule& rule, const Tables& tables, float u) {
  if constexpr (kBits == 8) {
    return __float2int_rn(u) & 255;
  } else {
    const uint32_t bin = bin_of(rule, u);
    const bool is_above = u > word_at(tables.edges, bin);
    if constexpr (kIsSorted) return word_at(tables.ranks, bin) + (is_above ? 1 : 0);
    return word_at(tables.codes, bin) >> (is_above ? 4 : 0) & 15;
  }
}

// The code of |u| <= limit for every table.
template <int kBits>
__device__ __forceinline__ int any_code(const Rule& rule, const Tables& tables, float u) {
  if constexpr (kBits == 8) {
    return __float2int_rn(u) & 255;
  } else {
    int rank = word_at(tables.ranks, bin_of(rule, u));
    for (int step = 0; step < rule.steps; ++step) rank += u > tables.thresholds[rank] ? 1 : 0;
    return tables.order[rank];
  }
}

// The code of one weight of a block.
template <int kBits>
__device__ __forceinline__ int code_of(const Rule& rule, const Tables& tables, const Block& block, float w) {
  return any_code<kBits>(rule, tables, block.is_plain() ? block.normalized(w) : block.normalized_in_fp64(rule, w));
}

// As `codes_of`, for blocks and tables that are seldom; apart from it, so that the frequent ones' instructions lie
// together.
template <int kBits>
__device__ __noinline__ void codes_of_rare(const Rule& rule, const Tables& tables, const Block& block,
                                           const float* weights, int* codes) {
#pragma unroll 1
  for (int i = 0; i < kVector; ++i) codes[i] = code_of<kBits>(rule, tables, block, weights[i]);
}

template <int kBits, bool kIsSorted>
__device__ __forceinline__ void quick_codes_of(const Rule& rule, const Tables& tables, const Block& block,
                                               const float (&weights)[kVector], int (&codes)[kVector]) {
  if (rule.shift != Shift::kNone) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      codes[i] = quick_code<kBits, kIsSorted>(rule, tables, block.normalized(weights[i]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      codes[i] = quick_code<kBits, kIsSorted>(rule, tables, __fmul_rn(weights[i], block.inverse));
    }
  }
}

// The codes of a thread's weights of a block.
template <int kBits>
__device__ __forceinline__ void codes_of(const Rule& rule, const Tables& tables, const Block& block,
                                         const float (&weights)[kVector], int (&codes)[kVector]) {
  if (block.is_plain() && rule.steps <= 1) {
    if (rule.is_sorted) quick_codes_of<kBits, true>(rule, tables, block, weights, codes);
    else quick_codes_of<kBits, false>(rule, tables, block, weights, codes);
    return;
  }
  // Copies, so that the originals need no address.
  float from[kVector];
  int to[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) from[i] = weights[i];
  codes_of_rare<kBits>(rule, tables, block, from, to);
#pragma unroll
  for (int i = 0; i < kVector; ++i) codes[i] = to[i];
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
      report(out, 1, first);
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
    words[i / kInWord] += static_cast<uint32_t>(codes[i]) * (1u << bit);
  }
  if constexpr (kBits == 8) {
    *reinterpret_cast<uint4*>(out.codes + index) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
    *reinterpret_cast<uint2*>(out.codes + index / 2) = make_uint2(words[0], words[1]);
  }
}

// Encodes and stores a thread's weights of a block, the first of which has this index.
template <int kBits>
__device__ __forceinline__ void encode(const Rule& rule, const Tables& tables, const Outcome& outcome,
                                       const Target& out, int64_t index, const float (&weights)[kVector]) {
  int codes[kVector];
  if (outcome.is_constant) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) codes[i] = rule.zero_code;
  } else {
    codes_of<kBits>(rule, tables, outcome.block, weights, codes);
  }
  store_codes<kBits>(out, index, codes);
}

// Tells of weights that are NaN or infinite, the first of which would have this index.
__device__ __forceinline__ void report_nonfinite(const Target& out, int64_t index, const float (&weights)[kVector]) {
  int first = kVector;
#pragma unroll
  for (int i = kVector - 1; i >= 0; --i) first = fabsf(weights[i]) < INFINITY ? first : i;
  if (first < kVector) report(out, 0, index + first);
}

// A thread's weights as they lie in memory.
template <typename T>
struct Loaded {
  static constexpr int kPart = 16 / sizeof(T);
  Vector<T, kPart> parts[kVector / kPart];

  __device__ __forceinline__ void load(const T* from, bool is_inside) {
#pragma unroll
    for (int part = 0; part < kVector / kPart; ++part) {
      parts[part] = {};
      if (is_inside) parts[part] = *reinterpret_cast<const Vector<T, kPart>*>(from + part * kPart);
    }
  }
  __device__ __forceinline__ void widen(float (&weights)[kVector]) const {
#pragma unroll
    for (int i = 0; i < kVector; ++i) weights[i] = to_float(parts[i / kPart].values[i % kPart]);
  }
};

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

}  // namespace lowbit
