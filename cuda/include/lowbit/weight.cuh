// A packed weight as kernels get it, and the meaning of its bytes: w = scale[block] * codebook[code] + shift[block].
#pragma once

#include "dtype.cuh"

// The dynamic map of double-quantized scales. The host fills it when it loads a module that has it.
extern "C" __device__ float lowbit_dynamic_map[256];

namespace lowbit {

constexpr int kCodebookLength = 16;
// Scales that share an entry of scale_2.
constexpr int kScalesPerScale2 = 256;

// The shift of a block as it is packed: its smallest weight, or the middle between that and its largest.
enum class Shift : int32_t { kNone, kMinimum, kMiddle };

// Mirrored field by field by KernelWeight in rust/core/src/cuda/weight.rs.
struct Weight {
  const uint8_t* codes;
  const void* scales;         // scale_dtype, or uint8 codes under double quantization
  const float* scale_2;       // null without double quantization
  const float* scale_offset;  // null without double quantization
  const void* shifts;         // scale_dtype; null where the format has none
  const float* codebook;      // of a custom format; null where `table` holds the values
  int64_t rows;
  int64_t cols;
  int64_t row_codes;          // codes from one row to the next, padding included
  int64_t blocks_per_row;
  int64_t block_size;
  int32_t block_shift;        // log2(block_size), or -1 where that is none
  int32_t straddles_rows;     // blocks and codes run through the flattened matrix
  int32_t bits;
  Dtype scale_dtype;
  int32_t codebook_length;
  float table[kCodebookLength];
};
static_assert(sizeof(Weight) == 176, "as KernelWeight has it");

// Copies the codebook into shared memory; codes that it lacks read as 0. Ends with a barrier.
__device__ __forceinline__ void load_codebook(const Weight& w, float (&table)[kCodebookLength]) {
  const int code = threadIdx.x;
  if (code < kCodebookLength) {
    table[code] = w.codebook == nullptr ? w.table[code] : code < w.codebook_length ? w.codebook[code] : 0.0f;
  }
  __syncthreads();
}

__device__ __forceinline__ int64_t divided_by_block_size(const Weight& w, int64_t index) {
  return w.block_shift >= 0 ? index >> w.block_shift : index / w.block_size;
}

__device__ __forceinline__ int64_t block_of(const Weight& w, int64_t row, int64_t col) {
  return w.straddles_rows ? divided_by_block_size(w, row * w.cols + col)
                          : row * w.blocks_per_row + divided_by_block_size(w, col);
}

__device__ __forceinline__ float scale_of(const Weight& w, int64_t block) {
  if (w.scale_2 == nullptr) return load(w.scales, w.scale_dtype, block);
  const float value = lowbit_dynamic_map[static_cast<const uint8_t*>(w.scales)[block]];
  // Two roundings, by definition.
  return __fadd_rn(__fmul_rn(value, w.scale_2[block / kScalesPerScale2]), *w.scale_offset);
}

__device__ __forceinline__ float shift_of(const Weight& w, int64_t block) {
  return load(w.shifts, w.scale_dtype, block);
}

// The number that the code at `index`, counted in codes from the start of the buffer, stands for.
__device__ __forceinline__ float code_value(const Weight& w, const float* table, int64_t index) {
  if (w.bits == 8) return static_cast<float>(static_cast<int8_t>(w.codes[index]));
  const uint8_t byte = w.codes[index / 2];
  return table[index % 2 == 0 ? byte >> 4 : byte & 15];
}

// The weight at (row, col) in fp32, with one rounding.
__device__ __forceinline__ float weight_at(const Weight& w, const float* table, int64_t row, int64_t col) {
  const float value = code_value(w, table, row * w.row_codes + col);
  const int64_t block = block_of(w, row, col);
  const float scale = scale_of(w, block);
  return w.shifts == nullptr ? __fmul_rn(value, scale) : __fmaf_rn(value, scale, shift_of(w, block));
}

// Code `i` of consecutive 4-bit codes in a little-endian word: the even one of a byte is in its high nibble.
__device__ __forceinline__ int nibble(uint32_t word, int i) {
  return (word >> (8 * (i / 2) + (i % 2 == 0 ? 4 : 0))) & 15;
}

__device__ __forceinline__ int signed_byte(uint32_t word, int i) {
  return static_cast<int8_t>((word >> (8 * i)) & 255);
}

}  // namespace lowbit
