// Rounds rows of activations to int8, a block for each: absmax, codes, and the columns of outliers, in one pass over x.
// And gathers those columns of x and of the weight for the product.
#include "lowbit/int8_rows.cuh"
#include "lowbit/ptx.cuh"

namespace lowbit::rows {

constexpr int kMaxThreads = 512;
constexpr int kMaxWarps = kMaxThreads / 32;
// Units of 16 bytes that a thread keeps from the first look to the second; of longer rows, others are read twice.
constexpr int kKept = 8;

__device__ __forceinline__ uint32_t block_max(uint32_t value) {
  __shared__ uint32_t of_warp[kMaxWarps];
  value = __reduce_max_sync(~0u, value);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  return __reduce_max_sync(~0u, threadIdx.x % 32 < blockDim.x / 32 ? of_warp[threadIdx.x % 32] : 0);
}

// Numbers of a row that lie side by side: 16 bytes, or one where rows do not begin where 16 may be read. They stay as
// they were read, so that all of a thread's loads are under way before the first is waited for.
template <typename T, bool kIsVectorized>
struct Unit {
  static constexpr int kCount = kIsVectorized ? 16 / sizeof(T) : 1;
  static constexpr int kWords = kIsVectorized ? 4 : 1;
  uint32_t words[kWords];

  static __device__ __forceinline__ Unit load(const T* row, int index) {
    Unit unit;
    if constexpr (kIsVectorized) {
      const uint4 bits = __ldg(reinterpret_cast<const uint4*>(row) + index);
      unit.words[0] = bits.x, unit.words[1] = bits.y, unit.words[2] = bits.z, unit.words[3] = bits.w;
    } else {
      unit.words[0] = 0;
      memcpy(unit.words, row + index, sizeof(T));
    }
    return unit;
  }

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(words[i]);
    } else {
      const uint16_t bits = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
      T number;
      memcpy(&number, &bits, sizeof(bits));
      return to_float(number);
    }
  }

  // The bits of the largest magnitude in fp32. Those of 16-bit floats are in the order of the numbers as well.
  __device__ __forceinline__ uint32_t largest() const {
    if constexpr (sizeof(T) == 2 && kIsVectorized) {
      uint32_t most = 0;
#pragma unroll
      for (const uint32_t pair : words) most = __vmaxu2(most, pair & 0x7fff7fff);
      Unit<T, false> number{{max(most & 0xffff, most >> 16)}};
      return magnitude(number[0]);
    } else {
      uint32_t most = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i) most = max(most, magnitude((*this)[i]));
      return most;
    }
  }
};

template <typename T, bool kIsVectorized>
class Row {
  using U = Unit<T, kIsVectorized>;
  static constexpr int kCount = U::kCount;

 public:
  __device__ __forceinline__ explicit Row(const RowOperands& o)
      : o_(o),
        outliers_{o.outliers, Outliers::words_of(o.cols)},
        x_(static_cast<const T*>(o.x) + blockIdx.x * o.x_stride),
        codes_(o.codes + blockIdx.x * o.codes_stride),
        limit_(o.limit()) {}

  __device__ __forceinline__ void round() {
    const int units = o_.cols / kCount;  // one at least
    U kept[kKept];
    uint32_t beyond = 0;  // a bit for each that is kept: whether it has outliers
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      // Behind the last unit, it once more.
      kept[i] = U::load(x_, min(static_cast<int>(i * blockDim.x + threadIdx.x), units - 1));
    }
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int index = i * blockDim.x + threadIdx.x;
      if (index < units && look(index, kept[i])) beyond |= 1u << i;
    }
    for (int index = kKept * blockDim.x + threadIdx.x; index < units; index += blockDim.x) {
      look(index, U::load(x_, index));
    }
    const Rounding rounding(__uint_as_float(block_max(most_)));
    if (threadIdx.x == 0) o_.scales[blockIdx.x] = rounding.scale;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int index = i * blockDim.x + threadIdx.x;
      if (index < units) store(index, kept[i], rounding, (beyond >> i & 1) != 0);
    }
    for (int index = kKept * blockDim.x + threadIdx.x; index < units; index += blockDim.x) {
      store(index, U::load(x_, index), rounding, limit_ != ~0u);
    }
    for (int64_t col = o_.cols + threadIdx.x; col < o_.codes_stride; col += blockDim.x) codes_[col] = 0;
  }

 private:
  // Whether a unit has outliers. Few have, so that all of it is looked at first.
  __device__ __forceinline__ bool look(int index, const U& unit) {
    const uint32_t largest = unit.largest();
    if (largest < limit_) {
      most_ = max(most_, largest);
      return false;
    }
    uint32_t beyond = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t bits = magnitude(unit[i]);
      const bool is_below = bits < limit_;
      most_ = max(most_, is_below ? bits : 0);
      beyond |= is_below ? 0 : 1u << i;
    }
    // Nobody waits for this, as one would for a look at what others have said before.
    atomicOr(outliers_.flags() + index * kCount / 32, beyond << index * kCount % 32);
    return true;
  }

  __device__ __forceinline__ void store(int index, const U& unit, const Rounding& rounding, bool has_outliers) const {
    alignas(kCount) uint8_t out[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = rounding.code(unit[i]);
    if (has_outliers) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[i] = magnitude(unit[i]) < limit_ ? out[i] : 0;
    }
    memcpy(__builtin_assume_aligned(codes_ + index * kCount, kCount), out, kCount);
  }

  const RowOperands& o_;
  const Outliers outliers_;
  const T* x_;
  int8_t* codes_;
  uint32_t limit_;
  uint32_t most_ = 0;
};

template <typename T, bool kIsVectorized>
__device__ __forceinline__ void round_row(const RowOperands& o) {
  Row<T, kIsVectorized>(o).round();
  allow_next_kernel();
}

constexpr int kGatherThreads = 256;

// Lists flagged columns in order, the first ones in shared memory and in one block all of them in global memory;
// returns their number.
__device__ __forceinline__ int list_columns(const Outliers& outliers, int32_t (&columns)[kSideCapacity]) {
  __shared__ int32_t of_warp[kGatherThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int total = 0;
  for (int first = 0; first < outliers.words; first += kGatherThreads) {
    const int word = first + threadIdx.x;
    uint32_t flags = word < outliers.words ? __ldcg(outliers.flags() + word) : 0;
    const int own = __popc(flags);
    int before = own;
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, before, distance);
      if (lane >= distance) before += other;
    }
    if (lane == 31) of_warp[warp] = before;
    __syncthreads();
    int at = total + before - own;
    for (int i = 0; i < kGatherThreads / 32; ++i) {
      if (i < warp) at += of_warp[i];
      total += of_warp[i];
    }
    for (; flags != 0; flags &= flags - 1, ++at) {
      const int column = 32 * word + __ffs(flags) - 1;
      if (at < kSideCapacity) columns[at] = column;
      if (blockIdx.x == 0) outliers.columns()[at] = column;
    }
    __syncthreads();
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *outliers.count() = total;
  return total;
}

// Rows of what is multiplied beside the integers: columns of outliers side by side in 16 bits. Rows of x come first,
// with what they are beyond their codes, then rows of the weight. Threads have numbers of several rows at once.
template <typename T>
__device__ __forceinline__ void gather_rows(const GatherOperands& o) {
  using Number = typename Side<T>::Number;
  constexpr int kParts = Side<T>::kParts;
  __shared__ int32_t columns[kSideCapacity];
  allow_next_kernel();
  wait_for_previous_kernel();
  const int all = list_columns(Outliers{o.outliers, Outliers::words_of(o.cols)}, columns);
  const int count = min(all * kParts, kSideCapacity), padded = (count + 15) / 16 * 16;
  if (count == 0) return;
  const int at_once = kGatherThreads / padded;
  const int slot = threadIdx.x % padded;
  if (threadIdx.x / padded >= at_once) return;
  const int column = slot < count ? columns[slot / kParts] : 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * at_once;
  const int64_t rows = static_cast<int64_t>(o.tokens) + o.rows;
#pragma unroll 4
  for (int64_t row = int64_t{blockIdx.x} * at_once + threadIdx.x / padded; row < rows; row += step) {
    const bool is_x = row < o.tokens;
    const int64_t output = row - o.tokens;
    Number number = from_float<Number>(0.0f);
    if (slot >= count) {
    } else if (is_x) {
      number = beyond_code<T>(to_float(static_cast<const T*>(o.x)[row * o.x_stride + column]),
                              o.codes[row * o.codes_stride + column], o.scales[row], slot % kParts);
    } else {
      number = from_float<Number>(static_cast<float>(o.weights[output * o.cols + column]));
    }
    static_cast<Number*>(is_x ? o.x_side : o.w_side)[(is_x ? row : output) * kSideCapacity + slot] = number;
  }
}

}  // namespace lowbit::rows

#define ENTRY(name, type)                                                                           \
  extern "C" __global__ void __launch_bounds__(512, 2) int8_rows_##name(lowbit::RowOperands o) {      \
    lowbit::rows::round_row<type, true>(o);                                                         \
  }                                                                                                 \
  extern "C" __global__ void __launch_bounds__(512, 2) int8_elements_##name(lowbit::RowOperands o) {  \
    lowbit::rows::round_row<type, false>(o);                                                        \
  }                                                                                                 \
  extern "C" __global__ void __launch_bounds__(256) int8_gather_##name(lowbit::GatherOperands o) {  \
    lowbit::rows::gather_rows<type>(o);                                                              \
  }
LOWBIT_FOR_EACH_DTYPE(ENTRY)
#undef ENTRY
