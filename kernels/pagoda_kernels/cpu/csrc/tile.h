// The innermost loop of everything that multiplies matrices: a tile of C += A x B kept in registers.
//
//            B   [depth][columns], columns along vectors            Each element of C is one chain of fused multiply-adds
//                ┌──────┬──────┐                                    over the depth, in order, whatever the tile's size. So a
//     A          │ v v v│ v v v│ panel_stride from one panel        row's result has the same bits alone and in any batch.
//   ┌───────┐    └──────┴──────┘ of kPanel columns to the next
//   │ r     │    ┌─────────────┐
//   │ r     │    │ accumulators│ C
//   └───────┘    └─────────────┘
//
// A `Dot` says what an element of A and B is and how one step of depth is multiplied.
#pragma once

#include "far_ahead.h"
#include "simd.h"

namespace pagoda::PAGODA_ISA {
namespace {

constexpr int64_t kPanel = 32;  // columns of a panel of packed weights
constexpr int kPanelVectors = kPanel / kLanes;

// Weights that come from memory in order are asked for so many bytes ahead. Where this pays, it was measured: see `Streamed`.
constexpr int64_t kPrefetchBytes = 2048;
constexpr int kStreamRows = 8;

// float32 times elements of any type, widened as they are read: the same products as with a widened copy. A step is one of
// depth.
template <class T>
struct DotNarrow {
  using A = float;
  using B = T;
  static constexpr bool kAsksFar = false;
  static constexpr bool prefetches(int) { return false; }
  static constexpr int kParts = 1;
  static constexpr int kAStep = 1;
  static Vector load_part(const T* b, int) { return load(b); }
  static Vector step(Vector accumulator, const float* a, Vector b, int) {
    return multiply_add(broadcast(*a), b, accumulator);
  }
};

using DotFloat32 = DotNarrow<float>;

// float32 times bfloat16 in pairs, exactly: a bfloat16 is the upper half of a float32. A step is two of depth.
struct DotBFloat16Weights {
  using A = float;
  using B = uint32_t;
  static constexpr bool kAsksFar = false;
  static constexpr bool prefetches(int) { return false; }
  static constexpr int kParts = 2;
  static constexpr int kAStep = 2;
  static Vector load_part(const uint32_t* b, int part) {
    return part == 0 ? first_of_pairs(load_bits(b)) : second_of_pairs(load_bits(b));
  }
  static Vector step(Vector accumulator, const float* a, Vector b, int part) {
    return multiply_add(broadcast(a[part]), b, accumulator);
  }
};

#if defined(PAGODA_BF16_DOT)
// bfloat16 pairs times bfloat16 pairs with float32 sums. A step is two of depth.
struct DotBFloat16 {
  using A = uint32_t;
  using B = uint32_t;
  static constexpr bool kAsksFar = false;
  static constexpr bool prefetches(int) { return false; }
  static constexpr int kParts = 1;
  static constexpr int kAStep = 1;
  static IntVector load_part(const uint32_t* b, int) { return load_bits(b); }
  static Vector step(Vector accumulator, const uint32_t* a, IntVector b, int) {
#if defined(PAGODA_EMULATE_BF16_DOT)
    const IntVector pair = broadcast_bits(*a);
    accumulator = multiply_add(first_of_pairs(pair), first_of_pairs(b), accumulator);
    return multiply_add(second_of_pairs(pair), second_of_pairs(b), accumulator);
#else
    return _mm512_dpbf16_ps(accumulator, (__m512bh)broadcast_bits(*a), (__m512bh)b);
#endif
  }
};
#endif

// The same where B comes from memory. Few rows are done with weights before the next ones are there, so these are asked for:
// far ahead into the second-level cache (`TileOperands::next`), or into the first where that was measured to be better.
template <class Dot>
struct Streamed : Dot {
  static constexpr bool kAsksFar = pagoda::PAGODA_ISA::kAsksFar;
  static constexpr bool prefetches(int rows) { return !kAsksFar && rows <= kStreamRows; }
};

#if defined(PAGODA_BF16_DOT)
// Processors with products of bfloat16 keep up with few rows by themselves, and lose a sixth where they are asked, too. With more
// rows they read too slowly to notice what comes next.
template <>
struct Streamed<DotBFloat16> : DotBFloat16 {
  static constexpr bool prefetches(int rows) { return rows > kStreamRows; }
};
#endif

// Where the tile's operands lie. Strides are in elements: of A and C from row to row, of B from step to step.
template <class Dot>
struct TileOperands {
  int64_t num_steps;
  const typename Dot::A* a;
  int64_t a_stride;
  const typename Dot::B* b;
  int64_t b_stride;
  int64_t panel_stride;
  float* c;
  int64_t c_stride;
  bool accumulate;  // add to C instead of overwriting it
  // Where `kAsksFar`: what is multiplied next, as long as `num_steps` of B. The first tiles of rows ask for it.
  const void* next = nullptr;
  FarAhead ask = {};
};

template <class Dot, int kRows, int kVectors>
inline void multiply_tile(const TileOperands<Dot>& t) {
  Vector sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[r][v] = t.accumulate ? load(t.c + r * t.c_stride + v * kLanes) : zero();
  for (int64_t step = 0; step < t.num_steps; ++step) {
    const auto* b = t.b + step * t.b_stride;
    const auto* a = t.a + step * Dot::kAStep;
    if constexpr (Dot::kAsksFar) t.ask.prefetch(step);
    if constexpr (Dot::prefetches(kRows)) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        __builtin_prefetch(reinterpret_cast<const char*>(b + v / kPanelVectors * t.panel_stride +
                                                         v % kPanelVectors * kLanes) + kPrefetchBytes);
    }
#pragma GCC unroll 2
    for (int part = 0; part < Dot::kParts; ++part) {
      decltype(Dot::load_part(b, 0)) columns[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        columns[v] = Dot::load_part(b + v / kPanelVectors * t.panel_stride + v % kPanelVectors * kLanes, part);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[r][v] = Dot::step(sums[r][v], a + r * t.a_stride, columns[v], part);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(t.c + r * t.c_stride + v * kLanes, sums[r][v]);
}

#if defined(__AVX512F__)
constexpr int kTileRows = 12;      // of a tile two vectors wide
constexpr int kWideTileRows = 6;   // of a tile four vectors wide
constexpr int kWideVectors = 4;
#else
constexpr int kTileRows = 6;
constexpr int kWideTileRows = 6;
constexpr int kWideVectors = 2;
#endif

template <class Dot, int kVectors, int kRows>
inline void multiply_rows(int64_t rows, const TileOperands<Dot>& t) {
  if (rows == kRows) {
    multiply_tile<Dot, kRows, kVectors>(t);
  } else if constexpr (kRows > 1) {
    multiply_rows<Dot, kVectors, kRows - 1>(rows, t);
  }
}

template <class Dot, int kVectors, int kMaxRows>
inline void multiply_columns(int64_t num_rows, TileOperands<Dot> t) {
  // Tiles of nearly equal height: a last one of a row or two would leave the multipliers idle.
  const int64_t tiles = ceil_div(num_rows, kMaxRows);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t rows = ceil_div(num_rows, tiles - tile);
    if constexpr (Dot::kAsksFar) t.ask = far_ahead(t.next, t.num_steps, tile, tiles);
    multiply_rows<Dot, kVectors, kMaxRows>(rows, t);
    t.a += rows * t.a_stride;
    t.c += rows * t.c_stride;
    num_rows -= rows;
  }
}

// C [num_rows][num_vectors * kLanes] = A x B, or += with accumulate. Vectors of B follow each other panel by panel.
// `wide` prefers tiles that are broad and low: better where B is in the innermost cache.
template <class Dot>
inline void multiply_matrix(int64_t num_rows, int64_t num_vectors, const TileOperands<Dot>& operands, bool wide) {
  int64_t done = 0;
  const auto at = [&](int64_t vector) {
    TileOperands<Dot> t = operands;
    t.b += vector / kPanelVectors * t.panel_stride + vector % kPanelVectors * kLanes;
    t.c += vector * kLanes;
    return t;
  };
  if (kWideVectors > 2 && wide) {
    for (; done + kWideVectors <= num_vectors; done += kWideVectors)
      multiply_columns<Dot, kWideVectors, kWideTileRows>(num_rows, at(done));
  }
  for (; done + 2 <= num_vectors; done += 2) multiply_columns<Dot, 2, kTileRows>(num_rows, at(done));
  if (done < num_vectors) multiply_columns<Dot, 1, kTileRows>(num_rows, at(done));
}

}  // namespace
}  // namespace pagoda::PAGODA_ISA
