// The tensor cores of linear_batch: wgmma on compute capability 9.0, mma.sync elsewhere. Either way a warp has 16 rows
// of the weight for each of its row tiles, as operand A in registers, and all tokens of the tile as operand B from
// shared memory. With mma.sync, warps that have the same rows share a step's in-features, and their sums are added at the end.
#pragma once

#include "batch_decode.cuh"
#include "batch_plan.cuh"
#include "mbarrier.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace lowbit {

// By a warp that needs the stage of a ring no more.
__device__ __forceinline__ void release(uint32_t free_barrier) { arrive_as_warp(free_barrier); }

#if defined(LOWBIT_HAS_WGMMA)

// Of producers and of consumers: together the 64 K of a multiprocessor.
__device__ __forceinline__ void share_registers(bool is_consumer) {
  if (is_consumer) take_registers<224>();
  else give_up_registers<56>();
}

// Products of a unit, some in-features of a row tile, are under way while the next unit is decoded: operands have two places.
template <typename T, typename Shape>
struct BatchEngine {
  static constexpr int kTokens = Shape::kTokens, kEights = kTokens / 8;
  static constexpr int kSlices = 1;
  static constexpr int kRowTiles = 1;
  static constexpr int kChunk = Shape::kChunk;  // 16 in-features each, of a unit
  static constexpr int kUnits = Shape::kSixteenths / kChunk;
  using Operand = uint32_t[kChunk][4];
  using Sums = float[kEights][4];
  Sums d[kRowTiles];
  BatchDecoder<T, Shape> decoder;
  uint32_t described;  // operand B, from the start of a stage

  static __device__ __forceinline__ int slice(int) { return 0; }
  static __device__ __forceinline__ int row(int warp, int) { return warp * 16; }

  __device__ __forceinline__ BatchEngine(const Weight& w, const BatchOperands& operands, const BatchStage& layout,
                                         const uint8_t* table, int warp, int lane)
      : decoder(w, operands, layout, table, row(warp, 0), 0, lane), described(kept(describe_operand(0))) {}

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kEights; ++n) d[0][n][0] = d[0][n][1] = d[0][n][2] = d[0][n][3] = 0.0f;
    keep(d[0]);
  }

  // Goes through `steps` stages, at least one.
  __device__ __forceinline__ void multiply(const Ring& ring, RingPlace& place, int steps) {
    if (decoder.is_common()) multiply_decoded<true>(ring, place, steps);
    else multiply_decoded<false>(ring, place, steps);
  }

 private:
  // Two places: of the unit that is multiplied, and of the one that is decoded.
  struct Units {
    Operand a[2];
    float2 scales[2];
    RowNumbers numbers;
    uint32_t free_before = 0;  // the barrier of the stage before, while its products are under way
  };

  template <bool kIsCommon>
  __device__ __forceinline__ void multiply_decoded(const Ring& ring, RingPlace& place, int steps) {
    Units units;
    wait_for_phase(place.full(), place.parity);
    decode<kIsCommon>(units, 0, place.stage, 0);
    while (true) {
      multiply_step<kIsCommon, 0>(units, ring, place, --steps);
      if (steps == 0) break;
      if (kUnits % 2 == 0) continue;
      multiply_step<kIsCommon, 1>(units, ring, place, --steps);
      if (steps == 0) break;
    }
    if constexpr (!Shape::kScalesSums) {
      wait_for_products<0>();
      keep(units.a[0]);
      keep(units.a[1]);
      release(units.free_before);
      keep(d[0]);
    }
  }

  // The step at `place`, whose first unit is decoded, in place kFirst; decodes the first unit of the next step, if any.
  template <bool kIsCommon, int kFirst>
  __device__ __forceinline__ void multiply_step(Units& units, const Ring& ring, RingPlace& place, int steps_left) {
    const uint32_t stage = place.stage, free = place.free();
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      const int now = (unit + kFirst) % 2, other = 1 - now;
      Sums sums;
      start(Shape::kScalesSums ? sums : d[0], units.a[now], stage, unit);
      if constexpr (!Shape::kScalesSums) {
        wait_for_products<1>();
        keep(units.a[other]);
        if (unit == 0 && units.free_before != 0) release(units.free_before);
      }
      if (unit < kUnits - 1) {
        decode<kIsCommon>(units, other, stage, unit + 1);
      } else {
        place.advance(ring);
        if (steps_left > 0) {
          wait_for_phase(place.full(), place.parity);
          decode<kIsCommon>(units, other, place.stage, 0);
        }
      }
      if constexpr (Shape::kScalesSums) {
        wait_for_products<0>();
        keep(units.a[now]);
        if (unit == kUnits - 1) release(free);
        add(sums, units.scales[now]);
      }
    }
    units.free_before = free;
  }

  template <bool kIsCommon>
  __device__ __forceinline__ void decode(Units& units, int to, uint32_t stage, int unit) const {
    const int first = unit * kChunk;
    if constexpr (Shape::kScalesSums) {
      units.scales[to] = decoder.scales_of_sums(stage, first);
      decoder.template decode_values<kIsCommon>(units.a[to], stage, 0, first);
    } else {
      decoder.template decode<kIsCommon>(units.a[to], stage, 0, first, units.numbers);
    }
  }

  // Sums and operands of products that are under way must stay where they are, which the compiler does not know.
  static __device__ __forceinline__ void keep(Operand& a) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
    }
  }
  static __device__ __forceinline__ void keep(Sums& sums) {
#pragma unroll
    for (int n = 0; n < kEights; ++n) keep_in_registers(sums[n]);
  }

  __device__ __forceinline__ void start(Sums& sums, const Operand& a, uint32_t stage, int chunk) const {
    const uint32_t x = described + stage / 16;
    begin_products();
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int sixteenth = chunk * kChunk + i;
      const uint64_t b = whole_descriptor(x + (sixteenth / 4 * Shape::kPanelBytes + sixteenth % 4 * 32) / 16);
      if (Shape::kScalesSums && i == 0) multiply_tokens<T, kTokens, true>(sums, a[i], b);
      else multiply_tokens<T, kTokens, false>(sums, a[i], b);
    }
    end_products();
  }

  __device__ __forceinline__ void add(Sums& sums, const float2& scales) {
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
      keep_in_registers(sums[n]);
#pragma unroll
      for (int j = 0; j < 4; ++j) d[0][n][j] = fmaf(j < 2 ? scales.x : scales.y, sums[n][j], d[0][n][j]);
    }
  }
};

#else

__device__ __forceinline__ void share_registers(bool) {}

template <typename T, typename Shape>
struct BatchEngine {
  static constexpr int kTokens = Shape::kTokens;
  static constexpr int kSlices = 2;  // of the in-features of a step, 4 warps each
  static constexpr int kRowTiles = 2;
  static constexpr int kSixteenths = Shape::kSixteenths / kSlices;
  static constexpr int kChunk = 2;  // 16 in-features each, that are decoded together
  float d[kRowTiles][kTokens / 8][4];
  BatchDecoder<T, Shape> decoder;
  int slice_first;

  __device__ __forceinline__ BatchEngine(const Weight& w, const BatchOperands& operands, const BatchStage& layout,
                                         const uint8_t* table, int warp, int lane)
      : decoder(w, operands, layout, table, row(warp, 0), slice(warp) * kSixteenths, lane),
        slice_first(slice(warp) * kSixteenths) {}

  static __device__ __forceinline__ int slice(int warp) { return warp / 4; }
  static __device__ __forceinline__ int row(int warp, int tile) { return warp % 4 * 32 + tile * 16; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int n = 0; n < kTokens / 8; ++n) d[i][n][0] = d[i][n][1] = d[i][n][2] = d[i][n][3] = 0.0f;
    }
  }

  // Goes through `steps` stages.
  __device__ __forceinline__ void multiply(const Ring& ring, RingPlace& place, int steps) {
#pragma unroll 1
    for (; steps > 0; --steps) {
      wait_for_phase(place.full(), place.parity);
#pragma unroll
      for (int first = 0; first < kSixteenths; first += kChunk) {
        uint32_t a[kRowTiles][kChunk][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          RowNumbers numbers;
          decoder.template decode<false>(a[i], place.stage, i, first, numbers);
        }
#pragma unroll
        for (int j = 0; j < kChunk; ++j) multiply_sixteenth(a, place.stage, slice_first + first, j);
      }
      release(place.free());
      place.advance(ring);
    }
  }

 private:
  // 16 tokens at once: lane l gives the address of a row of matrix l / 8, which are tokens 0..7 and 8..15, each with
  // its lower and its upper 8 in-features.
  __device__ __forceinline__ void multiply_sixteenth(const uint32_t (&a)[kRowTiles][kChunk][4], uint32_t x, int first,
                                                     int j) {
    const int lane = threadIdx.x % 32, token = lane / 16 * 8 + lane % 8, chunk = (first + j) % 4 * 2 + lane / 8 % 2;
    const uint32_t from = x + (first + j) / 4 * Shape::kPanelBytes + token * 128 + (chunk ^ token % 8) * 16;
#pragma unroll
    for (int n = 0; n < kTokens / 16; ++n) {
      uint32_t b[4];
      load_matrices(b, from + n * 16 * 128);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        float(&low)[4] = d[i][2 * n], (&high)[4] = d[i][2 * n + 1];
        multiply_tile<T>(low, a[i][j], b[0], b[1], low[0], low[1], low[2], low[3]);
        multiply_tile<T>(high, a[i][j], b[2], b[3], high[0], high[1], high[2], high[3]);
      }
    }
  }
};

#endif

}  // namespace lowbit
