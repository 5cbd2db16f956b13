// Packed weights to floating-point numbers. Bound by memory: vectors of 8 weights, neighbours in a warp.
#include <cassert>

#include "lowbit/weight.cuh"

extern "C" __device__ float lowbit_dynamic_map[256] = {};

namespace lowbit {

constexpr int kThreads = 256;
constexpr int kVector = 8;
// Vectors that a thread has in flight.
constexpr int kUnroll = 4;

// Which part of the weight is asked for: rows x cols of it from (first_row, first_col) on.
// Mirrored by Window in rust/core/src/cuda/dequantize.rs.
struct Window {
  int64_t first_row;
  int64_t first_col;
  int64_t rows;
  int64_t cols;
};

// 8 codes of kBits each as one load.
template <int kBits>
struct Codes {
  uint2 words;

  // `at` counts in codes.
  __device__ __forceinline__ void load(const uint8_t* codes, uint32_t at) {
    if constexpr (kBits == 8) words = __ldg(reinterpret_cast<const uint2*>(codes + at));
    else words.x = __ldg(reinterpret_cast<const uint32_t*>(codes + at / 2));
  }

  __device__ __forceinline__ float decode(const float* table, int i) const {
    if constexpr (kBits == 8) return static_cast<float>(signed_byte(i < 4 ? words.x : words.y, i % 4));
    else return table[nibble(words.x, i)];
  }
};

template <typename T>
__device__ __forceinline__ void store_vector(T* out, const float (&values)[kVector]) {
  constexpr int kPart = 16 / sizeof(T);
#pragma unroll
  for (int part = 0; part < kVector; part += kPart) {
    Vector<T, kPart> vector;
#pragma unroll
    for (int i = 0; i < kPart; ++i) vector.values[i] = from_float<T>(values[part + i]);
    *reinterpret_cast<Vector<T, kPart>*>(out + part) = vector;
  }
}

// Where the vectors of a CTA lie. What they have in common is counted in 64 bits, once; the rest fits in 32.
//
// A window whose weights, codes and blocks are all consecutive is passed as a single row. In others a row may end
// anywhere, but not within a vector or a block.
template <bool kIsFlat>
struct Places {
  const Weight& w;
  const Window& window;
  int64_t first;            // vector of the window
  int64_t code, block;      // of the first vector, where all are consecutive
  uint32_t code_in_block;

  __device__ __forceinline__ Places(const Weight& w_, const Window& window_)
      : w(w_), window(window_), first(static_cast<int64_t>(blockIdx.x) * kThreads * kUnroll) {
    if constexpr (kIsFlat) {
      code = window.first_row * w.row_codes + window.first_col + first * kVector;
      block = divided_by_block_size(w, code);
      code_in_block = static_cast<uint32_t>(code - block * w.block_size);
    }
  }

  // The codes and the block of vector `i` of the CTA.
  template <int kBits>
  __device__ __forceinline__ int64_t find(uint32_t i, Codes<kBits>& codes) const {
    if constexpr (kIsFlat) {
      codes.load(w.codes + code * kBits / 8, i * kVector);
      const uint32_t in_block = code_in_block + i * kVector;
      return block + (w.block_shift >= 0 ? in_block >> w.block_shift : in_block / static_cast<uint32_t>(w.block_size));
    } else {
      const int64_t per_row = window.cols / kVector, vector = first + i;
      const int64_t row = (vector >> 31) == 0 ? static_cast<uint32_t>(vector) / static_cast<uint32_t>(per_row)
                                              : vector / per_row;
      const int64_t col = window.first_col + (vector - row * per_row) * kVector;
      const int64_t at = (window.first_row + row) * w.row_codes + col;
      codes.load(w.codes + at * kBits / 8, 0);
      return block_of(w, window.first_row + row, col);
    }
  }
};

// For windows of whole vectors, but for the end of a single row. Codes and `out` are aligned to vectors. All loads of a
// thread's vectors are on their way before the first is waited for; those that depend on another follow together.
template <typename T, int kBits, bool kDoubleQuant, bool kIsFlat>
__device__ __forceinline__ void dequantize_vectors(const Weight& w, const Window& window, T* out, const float* table) {
  const Places<kIsFlat> places(w, window);
  const int64_t left = window.rows * window.cols - places.first * kVector;
  const uint32_t whole = static_cast<uint32_t>(min(left / kVector, static_cast<int64_t>(kThreads * kUnroll)));
  out += places.first * kVector;
  Codes<kBits> codes[kUnroll];
  float scales[kUnroll], shifts[kUnroll], scales_2[kUnroll];
  int scale_codes[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const uint32_t i = threadIdx.x + u * kThreads;
    if (i >= whole) break;
    const int64_t block = places.find(i, codes[u]);
    if constexpr (kDoubleQuant) {
      scale_codes[u] = static_cast<const uint8_t*>(w.scales)[block];
      scales_2[u] = w.scale_2[block / kScalesPerScale2];
    } else {
      scales[u] = load(w.scales, w.scale_dtype, block);
    }
    shifts[u] = w.shifts == nullptr ? 0.0f : shift_of(w, block);
  }
  if constexpr (kDoubleQuant) {
    const float offset = *w.scale_offset;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (threadIdx.x + u * kThreads >= whole) break;
      scales[u] = __fadd_rn(__fmul_rn(lowbit_dynamic_map[scale_codes[u]], scales_2[u]), offset);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const uint32_t i = threadIdx.x + u * kThreads;
    if (i >= whole) break;
    float values[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const float value = codes[u].decode(table, k);
      values[k] = w.shifts == nullptr ? __fmul_rn(value, scales[u]) : __fmaf_rn(value, scales[u], shifts[u]);
    }
    store_vector(out + i * kVector, values);
  }
  // What is behind the last vector.
  const int64_t rest = whole * kVector + threadIdx.x;
  if (threadIdx.x < kVector && whole < kThreads * kUnroll && rest < left) {
    const int64_t index = window.first_row * w.row_codes + window.first_col + places.first * kVector + rest;
    out[rest] = from_float<T>(weight_at(w, table, index / w.row_codes, index % w.row_codes));
  }
}

template <typename T, int kBits>
__device__ __forceinline__ void dequantize_any_vectors(const Weight& w, const Window& window, T* out, const float* table) {
  const bool is_flat = window.rows == 1 && (w.straddles_rows || w.blocks_per_row * w.block_size == w.row_codes);
  if (w.scale_2 == nullptr) {
    if (is_flat) dequantize_vectors<T, kBits, false, true>(w, window, out, table);
    else dequantize_vectors<T, kBits, false, false>(w, window, out, table);
  } else {
    if (is_flat) dequantize_vectors<T, kBits, true, true>(w, window, out, table);
    else dequantize_vectors<T, kBits, true, false>(w, window, out, table);
  }
}

// For every window, one weight a thread.
template <typename T>
__device__ void dequantize_elements(const Weight& w, const Window& window, T* out) {
  __shared__ float table[kCodebookLength];
  load_codebook(w, table);
  const int64_t count = window.rows * window.cols;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    const int64_t row = i / window.cols;
    out[i] = from_float<T>(weight_at(w, table, window.first_row + row, window.first_col + i - row * window.cols));
  }
}

// Row `rows[i]` of the weight into row i of `out`. An index that the weight lacks stops the program, as in torch.
template <typename T>
__device__ void dequantize_rows(const Weight& w, const int64_t* rows, int64_t count, T* out) {
  __shared__ float table[kCodebookLength];
  load_codebook(w, table);
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const int64_t row = rows[i];
    assert(row >= 0 && row < w.rows && "input: an index outside the rows of the embedding");
    for (int64_t col = threadIdx.x; col < w.cols; col += kThreads) {
      out[i * w.cols + col] = from_float<T>(weight_at(w, table, row, col));
    }
  }
}

}  // namespace lowbit

#define ENTRIES(name, T)                                                                                              \
  extern "C" __global__ void __launch_bounds__(lowbit::kThreads)                                                      \
      dequantize_vectors_##name(const __grid_constant__ lowbit::Weight w, const __grid_constant__ lowbit::Window part, \
                                T* out) {                                                                             \
    __shared__ float table[lowbit::kCodebookLength];                                                                  \
    lowbit::load_codebook(w, table);                                                                                  \
    if (w.bits == 4) lowbit::dequantize_any_vectors<T, 4>(w, part, out, table);                                       \
    else lowbit::dequantize_any_vectors<T, 8>(w, part, out, table);                                                   \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(lowbit::kThreads)                                                      \
      dequantize_elements_##name(const __grid_constant__ lowbit::Weight w,                                            \
                                 const __grid_constant__ lowbit::Window part, T* out) {                               \
    lowbit::dequantize_elements<T>(w, part, out);                                                                     \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(lowbit::kThreads)                                                      \
      dequantize_rows_##name(const __grid_constant__ lowbit::Weight w, const int64_t* rows, int64_t count, T* out) {  \
    lowbit::dequantize_rows<T>(w, rows, count, out);                                                                  \
  }
LOWBIT_FOR_EACH_DTYPE(ENTRIES)
