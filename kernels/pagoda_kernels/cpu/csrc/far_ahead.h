// Weights asked for long before they are multiplied, into the second-level cache.
//
//   memory    │ block being multiplied │ next block             │      Every tile of rows passes over the block. The first two ask
//   tile 0        asks for ───────────► ▓▓▓▓▓▓▓▓▓▓▓▓               for a half of the next one each, a line a step, so that memory
//   tile 1        asks for ───────────►             ▓▓▓▓▓▓▓▓▓▓▓▓   is read while they multiply. A single tile asks for all of it.
//   tile 2...
//
// What pays was measured (benchmarks/NOTES.md). Intel's cores with AVX-512 multiply floats a third faster at 32 rows than where
// they are not asked, and read more at few than where they are asked 2 KiB ahead into the first-level cache. On AMD's of the Zen 4
// kind it cost a third at four rows: kernels of their level, `avx512_bf16`, go without, as those of AVX2 do. Products of int8 and
// int4 gained nothing.
#pragma once

#include "simd.h"

namespace pagoda::PAGODA_ISA {
namespace {

#if defined(__AVX512F__) && !defined(PAGODA_BF16_DOT)
constexpr bool kAsksFar = true;
#else
constexpr bool kAsksFar = false;
#endif
constexpr int64_t kFarBytes = 8192;      // ahead, of a single tile, whose weights are one stream
constexpr int64_t kStepBytes = 2 * 64;   // of weights that are multiplied in a step
constexpr int64_t kAskingTiles = 2;

// Two lines a step, which are the same one where `stride` is that of half a step.
struct FarAhead {
  const char* begin;
  int64_t stride;
  void prefetch(int64_t step) const {
    __builtin_prefetch(begin + step * stride, 0, 2);
    __builtin_prefetch(begin + step * stride + stride / 2, 0, 2);
  }
};

// What tile number `tile` of `tiles`, each of `num_steps` steps, asks for of what is at `where`. One that needs not ask repeats a line.
inline FarAhead far_ahead(const void* where, int64_t num_steps, int64_t tile, int64_t tiles) {
  const char* next = static_cast<const char*>(where);
  const int64_t asking = smaller(tiles, kAskingTiles);
  if (tile >= asking) return {next, 0};
  return {next + tile * num_steps * (kStepBytes / asking), kStepBytes / asking};
}

}  // namespace
}  // namespace pagoda::PAGODA_ISA
