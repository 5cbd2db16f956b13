// Who does what in linear_decode: rows to CTAs, in-features to warps, and where things lie in shared memory.
//
// A CTA takes an even share of the rows, cut into tiles of 16. Its warps share the in-features: these are cut into units of
// 128 bytes of codes a row, and a warp visits (unit, tile) after (unit, tile), with the activations of the unit in registers
// and a sum of its own for every tile. The units that are left when all warps have had equally many are shared out tile by
// tile, so that no warp has a whole round more than another.
#pragma once

#include "ptx.cuh"
#include "weight.cuh"

namespace lowbit {

constexpr int kLanes = 32;
constexpr uint32_t kWholeWarp = 0xffffffffu;
constexpr int kTileRows = 16;
constexpr int kUnitBytes = 128;
// Tokens in one product of the tensor cores.
constexpr int kTokenTile = 8;

#ifndef LOWBIT_SLOTS
#define LOWBIT_SLOTS 2
#endif
// Visits that a warp has under way. More of them wait longer in the queues of the memory, and finish less evenly.
constexpr int kSlots = LOWBIT_SLOTS;

// The pair table of 4-bit codes: 256 entries, one for each byte, 32 copies of each, so that a lane reads its own bank. Entries
// are 256 bytes apart, which makes an address of a byte without arithmetic; the gaps between them hold sums.
constexpr int kTableStride = 256;
constexpr int kTableBytes = 256 * kTableStride;
constexpr int kGap = kTableStride / 2;
constexpr int kGapBytes = 256 * kGap;
// The 256 values of a double-quantized scale, a copy for each row of a fragment.
constexpr int kScaleMapCopies = 8;
constexpr int kScaleMapBytes = 256 * kScaleMapCopies * 4;

// Activations and results of one call; mirrored by the host.
struct DecodeOperands {
  const void* x;     // [tokens, cols] of T, rows x_stride elements apart; 16-byte aligned, x_stride a multiple of 8
  const void* bias;  // [rows] of bias_dtype, or null
  void* out;         // [tokens, rows] of T
  int64_t x_stride;
  int32_t tokens;
  Dtype bias_dtype;
  int32_t is_dependent;  // the launch may start before the previous kernel's end; only the order of loads follows from it
};

// How scales are stored: fp32, fp16 or bf16 as scale_dtype says, 8-bit codes.
enum class Scales { k32, k16, kDouble };

// The sizes that a kind of weight implies. kGroup: in-features between two applications of a scale.
template <int kBits_, int kGroup_, Scales kScales_, bool kShift_>
struct DecodeShape {
  static constexpr Scales kScales = kScales_;
  static constexpr int kBits = kBits_;
  static constexpr int kGroup = kGroup_;
  static constexpr bool kShift = kShift_;
  static constexpr int kUnit = kUnitBytes * 8 / kBits;
  static constexpr int kGroups = kUnit / kGroup;
  // A lane's codes of a group and a row: consecutive bytes, the quarter that its place in the fragment asks for.
  static constexpr int kLaneBytes = kGroup * kBits / 8 / 4;
  static constexpr int kLaneCols = kGroup / 4;
  static constexpr int kProducts = kLaneCols / 4;
  // One row's scales of a unit in a stage of the ring, as stored; 4 bytes at kScale2Offset hold the entry of scale_2.
  static constexpr int kScaleBytes = 4 * kGroups;
  static constexpr int kScale2Offset = 12;
  static constexpr int kCodesBytes = kTileRows * kUnitBytes;
  static constexpr int kShiftOffset = kCodesBytes + kTileRows * kScaleBytes;
  static constexpr int kStageBytes = kShiftOffset + (kShift ? kTileRows * kScaleBytes : 0);
  static constexpr int kScaleMap = kBits == 4 ? kTableBytes : 0;
  static constexpr int kRings = kScaleMap + (kScales == Scales::kDouble ? kScaleMapBytes : 0);
};

// Shared memory: the pair table with sums in its gaps, the map of double-quantized scales at kScaleMap, the rings of the warps
// at kRings, and what is left, for sums.
template <typename Shape>
struct DecodeMemory {
  uint32_t spare;
  int tiles;  // tiles whose sums fit

  __device__ __forceinline__ DecodeMemory(int warps, int tile_bytes) {
    spare = Shape::kRings + warps * kSlots * Shape::kStageBytes;
    const int gaps = Shape::kBits == 4 ? kGapBytes : 0;
    tiles = (gaps + static_cast<int>(dynamic_shared_bytes() - spare)) / tile_bytes;
  }

  // Where byte `offset` of the sums lies.
  __device__ __forceinline__ uint32_t sums(uint32_t offset) const {
    if (Shape::kBits == 8) return spare + offset;
    const uint32_t in_gap = kGap + offset / kGap * kTableStride + offset % kGap;
    return offset < kGapBytes ? in_gap : spare + offset - kGapBytes;
  }
};

// The rows of a CTA.
struct RowShare {
  int first, count, tiles;

  __device__ __forceinline__ explicit RowShare(int rows) {
    const int index = blockIdx.x, ctas = gridDim.x;
    const int each = rows / ctas, rest = rows % ctas;
    first = index * each + min(index, rest);
    count = each + (index < rest ? 1 : 0);
    tiles = (count + kTileRows - 1) / kTileRows;
  }
};

// The units of a warp, in rounds. In every full round each warp takes one unit; in the last one `parts` warps share a unit,
// each with its part of the tiles.
struct UnitShare {
  int warp, warps;
  int full_rounds, rounds;
  int last_unit, part, parts;

  __device__ __forceinline__ UnitShare(int units, int warp_, int warps_) : warp(warp_), warps(warps_) {
    full_rounds = units / warps;
    const int rest = units % warps;
    parts = rest > 0 ? warps / rest : 1;
    part = rest > 0 ? warp / rest : 0;
    last_unit = rest > 0 ? full_rounds * warps + warp % rest : 0;
    rounds = full_rounds + (rest > 0 && part < parts ? 1 : 0);
  }

  __device__ __forceinline__ int unit(int round) const {
    return round < full_rounds ? round * warps + warp : last_unit;
  }
  // The first and the end of this warp's tiles among [begin, end), in a round.
  __device__ __forceinline__ int first_tile(int round, int begin, int end) const {
    return round < full_rounds ? begin : begin + (end - begin) * part / parts;
  }
  __device__ __forceinline__ int end_tile(int round, int begin, int end) const {
    return round < full_rounds ? end : begin + (end - begin) * (part + 1) / parts;
  }
};

// A warp's next visit, in the order in which the sums are built: for each pass over as many tiles as have room, for each round,
// for each tile.
struct Cursor {
  int pass_begin, pass_end, round, tile, tile_end;

  __device__ __forceinline__ void start(const UnitShare& share, int tiles, int tiles_a_pass) {
    pass_begin = 0;
    pass_end = min(tiles_a_pass, tiles);
    round = 0;
    tile = tile_end = 0;
    if (share.rounds == 0) pass_begin = pass_end = tiles;
    else enter_round(share, tiles, tiles_a_pass);
  }
  __device__ __forceinline__ bool is_done() const { return pass_begin == pass_end; }

  __device__ __forceinline__ void advance(const UnitShare& share, int tiles, int tiles_a_pass) {
    if (++tile < tile_end) return;
    ++round;
    enter_round(share, tiles, tiles_a_pass);
  }

 private:
  // Moves on to the next round in which this warp has a tile.
  __device__ __forceinline__ void enter_round(const UnitShare& share, int tiles, int tiles_a_pass) {
    while (true) {
      if (round == share.rounds) {
        round = 0;
        pass_begin = pass_end;
        pass_end = min(pass_end + tiles_a_pass, tiles);
      }
      if (is_done()) return;
      tile = share.first_tile(round, pass_begin, pass_end);
      tile_end = share.end_tile(round, pass_begin, pass_end);
      if (tile < tile_end) return;
      ++round;
    }
  }
};

}  // namespace lowbit
