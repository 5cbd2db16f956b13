// The body of linear_batch.
#pragma once

#include "batch_decode.cuh"
#include "batch_engine.cuh"
#include "batch_feeder.cuh"
#include "mbarrier.cuh"

namespace lowbit {

// Four sums of each thread of a slice, side by side in the gaps of the table of codes: of all rows of a tile, and of as many
// tokens as have room.
template <int kRows>
struct BatchSums {
  static constexpr int kTokens = kGapBytes / (kRows * 4);
  uint8_t* table;

  __device__ __forceinline__ float4* four_at(int place) const {
    const int byte = place * 16;
    return reinterpret_cast<float4*>(table + byte / kGap * kTableStride + kGap + byte % kGap);
  }
};

// Results of all rows of a tile and as many tokens as have room, as they lie in memory, in the same gaps. A token's chunks of
// 8 rows change places, so that those of 8 tokens meet no bank twice.
template <int kRows>
struct BatchResults {
  static constexpr int kChunks = kRows / 8, kGapChunks = kGap / 16;
  static constexpr int kTokens = kGapBytes / (kRows * 2);
  uint32_t table;

  __device__ __forceinline__ uint32_t at(int token, int chunk) const {
    const int gap = token * (kChunks / kGapChunks) + chunk / kGapChunks;
    return table + gap * kTableStride + kGap + (chunk ^ token) % kGapChunks * 16;
  }
};

template <typename T, typename Shape>
struct Batch {
  using Engine = BatchEngine<T, Shape>;
  using Sums = BatchSums<Shape::kRows>;
  using Results = BatchResults<Shape::kRows>;
  static constexpr int kRows = Shape::kRows, kTokens = Shape::kTokens, kConsumers = Shape::kConsumers;
  const Weight& w;
  const BatchOperands& operands;
  const BatchMaps& maps;
  uint8_t* table;
  // The shuffle tells the compiler that a warp has one value.
  int warp = __shfl_sync(kWholeWarp, threadIdx.x / 32, 0);
  int lane = threadIdx.x % 32;
  StepShare share;
  BatchStage layout;
  Ring ring;

  __device__ __forceinline__ Batch(const Weight& w_, const BatchOperands& operands_, const BatchMaps& maps_,
                                   uint8_t* memory)
      : w(w_),
        operands(operands_),
        maps(maps_),
        table(memory),
        share{operands_.steps_each, operands_.steps_rest},
        layout(BatchStage::of(w_, operands_, Shape{})),
        ring(shared_address(memory) + kTableBytes, operands_.stage_bytes, operands_.stages) {}

  __device__ __forceinline__ void run() {
    if (blockDim.x != Shape::kThreads) __trap();
    // Nothing but parameters is read before this, so that the launch may always be a dependent one.
    allow_next_kernel();
    wait_for_previous_kernel();
    if (operands.gate != nullptr && __ldcg(operands.gate) <= operands.gate_above) return;
    const int begin = share.begin(blockIdx.x), end = share.begin(blockIdx.x + 1);
    if (threadIdx.x < operands.stages) {
      init_barrier(ring.barriers + threadIdx.x * 16, kArrivals);
      init_barrier(ring.barriers + threadIdx.x * 16 + 8, kConsumers / 32 * kArrivalsOfWarp);
      publish_to_products();  // to the copy engine, too
    }
    __syncthreads();
    if (begin == end) return;
    if (warp < kConsumers / 32) {
      share_registers(true);
      if (w.bits == 4) {
        const BatchCodebook codebook(w, lane);
        write_pair_table<T>(table, codebook.value * codebook.inverse, warp, kConsumers / 32, lane);
        sync_consumers();
      }
      consume(begin, end);
    } else {
      share_registers(false);
      produce(begin, end, threadIdx.x - kConsumers);
    }
  }

 private:
#if defined(LOWBIT_HAS_WGMMA)

  // A warp arrives when its scales are stored; the copy engine tells of the rest.
  static constexpr int kArrivals = Shape::kProducers / 32 * kArrivalsOfWarp;

  __device__ __forceinline__ void produce(int begin, int end, int thread) {
    switch (scale_loads<Shape>(w)) {
      case ScaleLoads::kFloat32Pieces: return produce_with<ScaleLoads::kFloat32Pieces>(begin, end, thread);
      case ScaleLoads::kDoubleQuantizedPieces: return produce_with<ScaleLoads::kDoubleQuantizedPieces>(begin, end, thread);
      default: return produce_with<ScaleLoads::kSingle>(begin, end, thread);
    }
  }

  template <ScaleLoads kLoads>
  __device__ __forceinline__ void produce_with(int begin, int end, int thread) {
    const float multiplier = w.bits == 4 ? BatchCodebook(w, lane).divisor : kInt8Divisor<T>;
    BatchTiles<Shape> tiles(w, operands, maps, layout, begin);
    BatchScaler<T, Shape, kLoads> scaler(w, operands, begin, end, multiplier, thread);
    RingPlace place(ring);
    for (int left = end - begin; left > 0;) {
      const StepGroup group = scaler.next_group();
#pragma unroll
      for (int step = 0; step < scaler.kGroup; ++step) {
        if (step < group.begin) continue;
        if (step == group.end) break;
        wait_for_phase(place.free(), place.parity ^ 1);
        if (thread == 0) tiles.copy_step(place.stage, place.full());
        scaler.store(step, place.stage, layout);
        arrive_as_warp(place.full());
        place.advance(ring);
      }
      left -= group.end - group.begin;
    }
  }

#else

  static constexpr int kArrivals = Shape::kProducers;

  // Copies of half a ring are under way before the oldest is waited for.
  __device__ __forceinline__ void produce(int begin, int end, int thread) {
    const float multiplier = w.bits == 4 ? BatchCodebook(w, lane).divisor : kInt8Divisor<T>;
    BatchCopier<Shape> copier(w, operands, layout, begin, thread);
    BatchScaler<T, Shape, ScaleLoads::kSingle> scaler(w, operands, begin, end, multiplier, thread);
    const int ahead = operands.stages / 2;
    RingPlace place(ring), published(ring);
    StepGroup group = {0, 0};
#pragma unroll 1
    for (int step = begin; step < end + ahead; ++step) {
      if (step < end) {
        wait_for_phase(place.free(), place.parity ^ 1);
        copier.copy_step(place.stage);
        if (group.begin == group.end) group = scaler.next_group();
        scaler.store(group.begin++, place.stage, layout);
        place.advance(ring);
      }
      commit_copies();
      if (step - begin < ahead) continue;
      wait_for_all_but(ahead);
      arrive(published.full());
      published.advance(ring);
    }
  }

  // Until at most `pending` of the latest groups of copies are under way.
  static __device__ __forceinline__ void wait_for_all_but(int pending) {
    switch (pending) {
      case 2: wait_for_copies<2>(); break;
      case 3: wait_for_copies<3>(); break;
      case 4: wait_for_copies<4>(); break;
      default: wait_for_copies<1>(); break;
    }
  }

#endif

  __device__ __forceinline__ void consume(int begin, int end) {
    Engine engine(w, operands, layout, table, warp, lane);
    RingPlace place(ring);
    for (int step = begin; step < end;) {
      const int tile = step / operands.steps, tile_end = min((tile + 1) * operands.steps, end);
      engine.clear();
      engine.multiply(ring, place, tile_end - step);
      step = tile_end;
      finish_tile(engine, tile);
    }
  }

  // Among the threads that multiply.
  __device__ __forceinline__ void sync_consumers() const { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); }

  // Writes a tile, or what this CTA has of it.
  __device__ __forceinline__ void finish_tile(Engine& engine, int index) {
    const BatchTile tile(w, operands, Shape{}, index);
    const int first = share.owner(index * operands.steps), last = share.owner((index + 1) * operands.steps - 1);
    add_slices(engine, tile.tokens_left);
    if (first != last) {
      if (Engine::slice(warp) == 0) store_fragments(engine, partial_of(blockIdx.x, index), tile.tokens_left);
      if (!is_last_to_arrive(index, last - first + 1)) return;
      if (Engine::slice(warp) == 0) add_partials(engine, tile.tokens_left, index, first, last);
    }
    write_tile(engine, tile);
  }

  // Sums of a lane for 8 tokens and 16 rows, and those of the other lanes of a slice, side by side: number `i` of them.
  static constexpr int kSliceThreads = kConsumers / Engine::kSlices, kEights = kTokens / 8;
  __device__ __forceinline__ static int fragment(int row_tile, int eight) {
    return (row_tile * kEights + eight) * kSliceThreads + threadIdx.x % kSliceThreads;
  }

  // Adds the sums of the other slices of the in-features to the first one's, as many as have room at a time.
  __device__ __forceinline__ void add_slices(Engine& engine, int tokens_left) {
    if constexpr (Engine::kSlices == 1) return;
    static_assert(Engine::kSlices <= 2, "one slice beside the first");
    constexpr int kRoom = Sums::kTokens / 8;
#pragma unroll
    for (int begin = 0; begin < kEights; begin += kRoom) {
      if (begin * 8 >= tokens_left) break;
#pragma unroll
      for (int slice = 1; slice >= 0; --slice) {
        sync_consumers();
        if (Engine::slice(warp) != slice) continue;
#pragma unroll
        for (int i = 0; i < Engine::kRowTiles; ++i) {
#pragma unroll
          for (int n = begin; n < kEights && n < begin + kRoom; ++n) {
            const int place = (i * kRoom + n - begin) * kSliceThreads + threadIdx.x % kSliceThreads;
            float4& sums = *Sums{table}.four_at(place);
            float(&d)[4] = engine.d[i][n];
            if (slice == 1) sums = make_float4(d[0], d[1], d[2], d[3]);
            else d[0] += sums.x, d[1] += sums.y, d[2] += sums.z, d[3] += sums.w;
          }
        }
      }
    }
  }

  __device__ __forceinline__ void store_fragments(const Engine& engine, float* partial, int tokens_left) const {
#pragma unroll
    for (int i = 0; i < Engine::kRowTiles; ++i) {
#pragma unroll
      for (int n = 0; n < kEights; ++n) {
        if (n * 8 >= tokens_left) break;
        const float(&d)[4] = engine.d[i][n];
        reinterpret_cast<float4*>(partial)[fragment(i, n)] = make_float4(d[0], d[1], d[2], d[3]);
      }
    }
  }

  // The sums of all CTAs of a tile, in their order. Some loads are always under way at a time: a branch between any two would
  // make each wait for the one before.
  __device__ __forceinline__ void add_partials(Engine& engine, int tokens_left, int index, int first, int last) const {
    constexpr int kLoads = kEights % 16 == 0 ? 16 : kEights % 12 == 0 ? 12 : kEights;
    engine.clear();
    for (int cta = first; cta <= last; ++cta) {
      const float4* from = reinterpret_cast<const float4*>(partial_of(cta, index));
#pragma unroll
      for (int i = 0; i < Engine::kRowTiles; ++i) {
#pragma unroll
        for (int begin = 0; begin < kEights; begin += kLoads) {
          if (begin * 8 >= tokens_left) break;
          float4 parts[kLoads];
#pragma unroll
          for (int n = 0; n < kLoads; ++n) {
            parts[n] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if ((begin + n) * 8 < tokens_left) parts[n] = __ldcg(from + fragment(i, begin + n));
          }
#pragma unroll
          for (int n = 0; n < kLoads; ++n) {
            float(&d)[4] = engine.d[i][begin + n];
            d[0] += parts[n].x, d[1] += parts[n].y, d[2] += parts[n].z, d[3] += parts[n].w;
          }
        }
      }
    }
  }

  __device__ __forceinline__ float* partial_of(int cta, int index) const {
    const int place = 2 * cta + (index * operands.steps > share.begin(cta) ? 1 : 0);
    return operands.partials + static_cast<int64_t>(place) * kTokens * kRows;
  }

  // Turns the first slice's sums, as many tokens at a time as have room, from fragments into rows of results.
  __device__ __forceinline__ void write_tile(const Engine& engine, const BatchTile& tile) {
    const Results results{shared_address(table)};
#pragma unroll
    for (int token = 0; token < kTokens; token += Results::kTokens) {
      if (token >= tile.tokens_left) break;
      sync_consumers();
      if (Engine::slice(warp) == 0) store_results(engine, tile, results, token);
      sync_consumers();
      const int tokens = min(min(kTokens, tile.tokens_left) - token, Results::kTokens);
      for (int i = threadIdx.x; i < tokens * Results::kChunks; i += kConsumers) {
        const int of = i / Results::kChunks, chunk = i % Results::kChunks;
        write(tile, token + of, chunk * 8, load_shared_16(results.at(of, chunk)));
      }
    }
  }

  // With the bias, from token `first` on.
  __device__ __forceinline__ void store_results(const Engine& engine, const BatchTile& tile, const Results& results,
                                                int first) const {
    const int token = lane / 16 * 8 + lane % 8, upper = lane / 8 % 2;
#pragma unroll
    for (int i = 0; i < Engine::kRowTiles; ++i) {
      const int row = Engine::row(warp, i);
      const float bias[2] = {bias_of(tile, row + lane / 4), bias_of(tile, row + lane / 4 + 8)};
#pragma unroll
      for (int n = first / 8; n < kEights && n < (first + Results::kTokens) / 8; n += 2) {
        const float(&low)[4] = engine.d[i][n], (&high)[4] = engine.d[i][n + 1];
        const uint32_t packed[4] = {pack<T>(low[0] + bias[0], low[1] + bias[0]), pack<T>(low[2] + bias[1], low[3] + bias[1]),
                                    pack<T>(high[0] + bias[0], high[1] + bias[0]),
                                    pack<T>(high[2] + bias[1], high[3] + bias[1])};
        store_columns(results.at(n * 8 - first + token, row / 8 + upper), packed);
      }
    }
  }

  __device__ __forceinline__ float bias_of(const BatchTile& tile, int row) const {
    if (operands.bias == nullptr || row >= tile.rows_left) return 0.0f;
    return load(operands.bias, operands.bias_dtype, tile.row + row);
  }

  // Whether the other parts of a tile have been written; then they are visible.
  __device__ __forceinline__ bool is_last_to_arrive(int index, int parts) const {
    __threadfence();
    sync_consumers();
    // Wraps around to 0 by itself.
    uint32_t arrived = 0;
    if (lane == 0 && warp == 0) arrived = atomicInc(operands.arrivals + index, parts - 1);
    const bool is_last = any_consumer(arrived == static_cast<uint32_t>(parts - 1));
    if (is_last) __threadfence();
    return is_last;
  }

  __device__ __forceinline__ bool any_consumer(bool value) const {
    uint32_t result;
    asm volatile(
        "{\n.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\nbarrier.red.or.pred q, 1, %2, p;\nselp.u32 %0, 1, 0, q;\n}"
        : "=r"(result)
        : "r"(static_cast<uint32_t>(value)), "n"(kConsumers)
        : "memory");
    return result != 0;
  }

  // Two results as they lie in memory.
  template <typename U>
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return bits_of<U>(low) | bits_of<U>(high) << 16;
  }

  // Eight rows of a token.
  __device__ __forceinline__ void write(const BatchTile& tile, int token, int row, const uint4& results) const {
    T* out = static_cast<T*>(operands.out) + (tile.token + token) * w.rows + tile.row + row;
    const int count = min(tile.rows_left - row, 8);
    if (count == 8 && w.rows % 8 == 0) {
      *reinterpret_cast<uint4*>(out) = results;
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i >= count) break;
      reinterpret_cast<uint16_t*>(out)[i] = static_cast<uint16_t>(word_of(results, i / 2) >> i % 2 * 16);
    }
  }
};

}  // namespace lowbit

// An entry for a type of activations and the parameters of a BatchShape, of which the first is the tokens of a tile.
#define LOWBIT_BATCH(name, type, tokens, ...)                                                                     \
  extern "C" __global__ void                                                                                      \
      __launch_bounds__(lowbit::BatchShape<tokens, __VA_ARGS__>::kThreads, 1) name##_##type##_##tokens(           \
      const __grid_constant__ lowbit::Weight w, const __grid_constant__ lowbit::BatchOperands operands,           \
      const __grid_constant__ lowbit::BatchMaps maps) {                                                           \
    extern __shared__ __align__(1024) uint8_t memory[];                                                           \
    lowbit::Batch<lowbit::type, lowbit::BatchShape<tokens, __VA_ARGS__>>(w, operands, maps, memory).run();        \
  }
