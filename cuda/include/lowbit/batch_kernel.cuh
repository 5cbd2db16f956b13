// The body of linear_batch.
#pragma once

#include "batch_decode.cuh"
#include "batch_engine.cuh"
#include "batch_feeder.cuh"

namespace lowbit {

// Sums of up to 64 tokens and all rows of a tile, in the gaps of the table of codes. Rows change places by groups of 8, so
// that lanes of a fragment, four tokens apart by two, meet no bank twice.
struct BatchSums {
  static constexpr int kTokens = kGapBytes / (kBatchRows * 4);
  uint8_t* table;

  __device__ __forceinline__ float* at(int token, int row) const {
    const int index = token * kBatchRows + (row ^ (token >> 1 & 3) << 3);
    return reinterpret_cast<float*>(table + (index / 32) * kTableStride + kGap) + index % 32;
  }
};

template <typename T, int kTokens, int kThreads>
struct Batch {
  using Engine = BatchEngine<T, kTokens, kThreads>;
  const Weight& w;
  const BatchOperands& operands;
  uint8_t* table;
  uint8_t* ring;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  StepShare share;
  BatchStage layout;
  Engine engine;

  __device__ __forceinline__ Batch(const Weight& w_, const BatchOperands& operands_, uint8_t* memory)
      : w(w_),
        operands(operands_),
        table(memory),
        ring(memory + kTableBytes),
        share{operands_.steps_each, operands_.steps_rest},
        layout(w_, operands_, kTokens) {}

  __device__ __forceinline__ void run() {
    const int begin = share.begin(blockIdx.x), end = share.begin(blockIdx.x + 1);
    const uint32_t ring_bytes = operands.stages * layout.bytes;
    BatchCopier<kTokens, kThreads> copier(w, operands, layout, begin, end);
    // Places in the ring: what is filled, scaled and multiplied next.
    uint32_t filled = 0, scaled = 0, place = 0;
    for (int i = 0; i < operands.stages - 2; ++i) {
      copier.copy_step(shared_address(ring) + filled);
      filled += layout.bytes;
    }
    const float multiplier = write_batch_table(w, table, warp, kThreads / 32, lane);
    BatchScaler<kTokens, kThreads> scaler(w, operands, begin, end, multiplier);
    for (int i = 0; i < 2; ++i) {
      scaler.load();
      scaler.store(ring + scaled, layout);
      scaled += layout.bytes;
    }
    const BatchDecoder decoder(w, operands, layout, table, lane);
    for (int step = begin; step < end;) {
      const int tile = step / operands.steps, tile_end = min((tile + 1) * operands.steps, end);
      engine.clear();
#pragma unroll 1
      for (; step < tile_end; ++step) {
        wait_for_stage();
        copier.copy_step(shared_address(ring) + filled);
        scaler.load();
        multiply(decoder, place);
        scaler.store(ring + scaled, layout);
        advance(place, ring_bytes), advance(filled, ring_bytes), advance(scaled, ring_bytes);
      }
      engine.finish();
      finish_tile(tile);
    }
  }

 private:
  __device__ __forceinline__ void advance(uint32_t& place, uint32_t ring_bytes) const {
    place += layout.bytes;
    if (place == ring_bytes) place = 0;
  }

  // A barrier: the copies of a step are there, and all warps are done with the step before the one before.
  __device__ __forceinline__ void wait_for_stage() {
    switch (operands.stages) {
      case 4: wait_for_copies<1>(); break;
      case 6: wait_for_copies<3>(); break;
      case 8: wait_for_copies<5>(); break;
      default: wait_for_copies<0>(); break;
    }
    publish_to_products();
    __syncthreads();
  }

  __device__ __forceinline__ void multiply(const BatchDecoder& decoder, uint32_t place) {
    const int first = Engine::slice(warp) * Engine::kSixteenths;
    uint32_t a[Engine::kRowTiles][Engine::kSixteenths][4];
#pragma unroll
    for (int i = 0; i < Engine::kRowTiles; ++i) decoder.decode<T>(a[i], ring + place, Engine::row(warp, i), first);
    engine.multiply(a, shared_address(ring) + place, first);
  }

  // Writes a tile, or what this CTA has of it.
  __device__ __forceinline__ void finish_tile(int index) {
    const BatchTile tile(w, operands, kTokens, index);
    const int first = share.owner(index * operands.steps), last = share.owner((index + 1) * operands.steps - 1);
    float* partial = first == last ? nullptr : partial_of(blockIdx.x, index);
#pragma unroll
    for (int token = 0; token < kTokens; token += BatchSums::kTokens) {
      if (token >= tile.tokens_left) break;
      collect(token);
      const int tokens = min(min(kTokens, tile.tokens_left) - token, BatchSums::kTokens);
      for (int i = threadIdx.x; i < tokens * (kBatchRows / 4); i += kThreads) {
        const int of = i / (kBatchRows / 4), row = i % (kBatchRows / 4) * 4;
        const float4 sums = *reinterpret_cast<const float4*>(BatchSums{table}.at(of, row));
        if (partial == nullptr) write(tile, token + of, row, sums);
        else reinterpret_cast<float4*>(partial)[token * (kBatchRows / 4) + i] = sums;
      }
    }
    if (partial != nullptr && is_last_to_arrive(index, last - first + 1)) add_partials(tile, index, first, last);
  }

  __device__ __forceinline__ float* partial_of(int cta, int index) const {
    const int place = 2 * cta + (index * operands.steps > share.begin(cta) ? 1 : 0);
    return operands.partials + static_cast<int64_t>(place) * kTokens * kBatchRows;
  }

  // The sums of all warps for up to 64 tokens from `token` on, in shared memory, slice after slice of the in-features.
  __device__ __forceinline__ void collect(int token) {
    const BatchSums sums{table};
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int slice = 0; slice < Engine::kSlices; ++slice) {
      __syncthreads();
      if (Engine::slice(warp) != slice) continue;
#pragma unroll
      for (int i = 0; i < Engine::kRowTiles; ++i) {
        const int row = Engine::row(warp, i) + g;
#pragma unroll
        for (int n = 0; n < BatchSums::kTokens / 8; ++n) {
          if (token / 8 + n >= kTokens / 8) break;
          const float(&d)[4] = engine.d[i][token / 8 + n];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            float* to = sums.at(n * 8 + t * 2 + j % 2, row + j / 2 * 8);
            *to = slice == 0 ? d[j] : *to + d[j];
          }
        }
      }
    }
    __syncthreads();
  }

  // Whether the other parts of a tile have been written; then they are visible.
  __device__ __forceinline__ bool is_last_to_arrive(int index, int parts) const {
    __threadfence();
    __syncthreads();
    // Wraps around to 0 by itself.
    const bool is_last =
        threadIdx.x == 0 && atomicInc(operands.arrivals + index, parts - 1) == static_cast<uint32_t>(parts - 1);
    const bool all = __syncthreads_or(is_last);
    if (all) __threadfence();
    return all;
  }

  __device__ __forceinline__ void add_partials(const BatchTile& tile, int index, int first, int last) const {
    const int tokens = min(kTokens, tile.tokens_left);
    for (int i = threadIdx.x; i < tokens * (kBatchRows / 4); i += kThreads) {
      float4 sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (int cta = first; cta <= last; ++cta) {
        const float4 part = __ldcg(reinterpret_cast<const float4*>(partial_of(cta, index)) + i);
        sums.x += part.x, sums.y += part.y, sums.z += part.z, sums.w += part.w;
      }
      write(tile, i / (kBatchRows / 4), i % (kBatchRows / 4) * 4, sums);
    }
  }

  // Four rows of a token, with the bias.
  __device__ __forceinline__ void write(const BatchTile& tile, int token, int row, const float4& sums) const {
    float values[4] = {sums.x, sums.y, sums.z, sums.w};
    T* out = static_cast<T*>(operands.out) + (tile.token + token) * w.rows + tile.row + row;
    const int count = min(tile.rows_left - row, 4);
    if (operands.bias != nullptr) {
      for (int i = 0; i < count; ++i) values[i] += load(operands.bias, operands.bias_dtype, tile.row + row + i);
    }
    if (count == 4 && w.rows % 4 == 0) {
      const uint2 packed = {pack_pair(values[0], values[1], T{}), pack_pair(values[2], values[3], T{})};
      *reinterpret_cast<uint2*>(out) = packed;
      return;
    }
    for (int i = 0; i < count; ++i) out[i] = from_float<T>(values[i]);
  }
};

}  // namespace lowbit
