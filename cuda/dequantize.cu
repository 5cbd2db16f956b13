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

// 8 codes of `bits` bits each as one load.
struct Codes {
  uint2 words;
};

__device__ __forceinline__ Codes load_codes(const Weight& w, int64_t index) {
  if (w.bits == 8) return {*reinterpret_cast<const uint2*>(w.codes + index)};
  return {make_uint2(*reinterpret_cast<const uint32_t*>(w.codes + index / 2), 0)};
}

__device__ __forceinline__ float decode(const Weight& w, const float* table, const Codes& codes, int i) {
  if (w.bits == 8) return static_cast<float>(signed_byte(i < 4 ? codes.words.x : codes.words.y, i % 4));
  return table[nibble(codes.words.x, i)];
}

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

// A position in the window: of a vector, of its codes and of its block.
struct Place {
  int64_t out;
  int64_t code;
  int64_t block;
};

// The host sees to it that a vector lies in one row and one block; it passes a window whose weights, codes and blocks
// are all consecutive as a single row, which takes no division.
__device__ __forceinline__ Place place_of(const Weight& w, const Window& window, int64_t vector) {
  int64_t row = 0;
  if (window.rows > 1) {
    const int64_t per_row = window.cols / kVector;
    row = (vector >> 31) == 0 ? static_cast<uint32_t>(vector) / static_cast<uint32_t>(per_row) : vector / per_row;
    vector -= row * per_row;
  }
  const int64_t col = window.first_col + vector * kVector;
  const int64_t code = (window.first_row + row) * w.row_codes + col;
  const bool is_flat = w.straddles_rows || w.blocks_per_row * w.block_size == w.row_codes;
  const int64_t block = is_flat ? divided_by_block_size(w, code) : block_of(w, window.first_row + row, col);
  return {row * window.cols + vector * kVector, code, block};
}

// For windows of whole vectors, but for the end of a single row. Codes and `out` are aligned to vectors. All loads of a
// thread's vectors are on their way before the first is waited for; those that depend on another follow together.
template <typename T, bool kDoubleQuant>
__device__ void dequantize_vectors(const Weight& w, const Window& window, T* out, const float* table) {
  const int64_t count = window.rows * window.cols;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kUnroll + threadIdx.x;
  Codes codes[kUnroll];
  Place places[kUnroll];
  float scales[kUnroll], shifts[kUnroll], scales_2[kUnroll];
  int scale_codes[kUnroll];
  int64_t left[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t vector = first + u * kThreads;
    left[u] = count - vector * kVector;
    if (left[u] >= kVector) {
      places[u] = place_of(w, window, vector);
      codes[u] = load_codes(w, places[u].code);
      if constexpr (kDoubleQuant) {
        scale_codes[u] = static_cast<const uint8_t*>(w.scales)[places[u].block];
        scales_2[u] = w.scale_2[places[u].block / kScalesPerScale2];
      } else {
        scales[u] = load(w.scales, w.scale_dtype, places[u].block);
      }
      shifts[u] = w.shifts == nullptr ? 0.0f : shift_of(w, places[u].block);
    }
  }
  if constexpr (kDoubleQuant) {
    const float offset = *w.scale_offset;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (left[u] >= kVector) {
        scales[u] = __fadd_rn(__fmul_rn(lowbit_dynamic_map[scale_codes[u]], scales_2[u]), offset);
      }
    }
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (left[u] >= kVector) {
      float values[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float value = decode(w, table, codes[u], i);
        values[i] = w.shifts == nullptr ? __fmul_rn(value, scales[u]) : __fmaf_rn(value, scales[u], shifts[u]);
      }
      store_vector(out + places[u].out, values);
    } else if (left[u] > 0) {
      const int64_t at = count - left[u];
      for (int64_t i = at; i < count; ++i) {
        const int64_t index = window.first_row * w.row_codes + window.first_col + i;
        out[i] = from_float<T>(weight_at(w, table, index / w.row_codes, index % w.row_codes));
      }
    }
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
    if (w.scale_2 == nullptr) lowbit::dequantize_vectors<T, false>(w, part, out, table);                              \
    else lowbit::dequantize_vectors<T, true>(w, part, out, table);                                                    \
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
