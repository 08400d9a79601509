// Linear layers over int8 or int4 weights. Inputs are quantized to int8 on the fly, a scale for every row and group, and
// products are summed as integers, exactly: every instruction set gives the same sums.
//
//   output[m][n] = Σ_g  x_scale[m][g] * scale[g][n] * ( Σ_k xq[m][k] * wq[n][k]  -  zero[g][n] * Σ_k xq[m][k] )
//
// wq is unsigned, as VNNI wants one of its two operands.

#include "parallel.h"
#include "scratch.h"
#include "simd.h"
#include "write_rows.h"

namespace pagoda::PAGODA_ISA {
namespace {

constexpr int64_t kPanel = 32;
constexpr int kPanelVectors = kPanel / kLanes;
constexpr int64_t kRowBlock = 96;
constexpr int64_t kPanelBlock = 4;
// Tiles of so few rows are done before the next weights are there, unless these were asked for so many bytes ahead.
constexpr int kStreamRows = 8;
constexpr int64_t kPrefetchBytes = 2048;
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
constexpr int kVectors = 2;  // of a tile: a whole panel
#else
constexpr int kTileRows = 4;
constexpr int kVectors = 2;  // of a tile: half a panel
#endif

// sums + Σ over 4 of weights (unsigned) * x (signed), per 32-bit lane.
#if defined(__AVX512VNNI__)
constexpr int kSignedOffset = 0;  // what was subtracted from weights before the product
// Not through its intrinsic: GCC then copies every sum to another register and back, and to memory, in every step.
inline IntVector dot_eight_bits(IntVector sums, IntVector weights, IntVector x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(x));
  return sums;
}
inline IntVector dot_four_bits(IntVector sums, IntVector weights, IntVector x) {
  return dot_eight_bits(sums, weights, x);
}
#elif defined(__AVX512F__)
constexpr int kSignedOffset = 128;
inline IntVector dot_four_bits(IntVector sums, IntVector weights, IntVector x) {
  const IntVector pairs = _mm512_maddubs_epi16(weights, x);
  return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
// Unsigned weights times signed inputs do not fit 16 bits in pairs; magnitudes up to 128 times inputs of moved sign do.
inline IntVector dot_eight_bits(IntVector sums, IntVector weights, IntVector x) {
  const IntVector centered = _mm512_xor_si512(weights, _mm512_set1_epi8(static_cast<char>(0x80)));
  const __mmask64 negative = _mm512_movepi8_mask(centered);
  return dot_four_bits(sums, _mm512_abs_epi8(centered), _mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x));
}
#else
constexpr int kSignedOffset = 128;
inline IntVector dot_four_bits(IntVector sums, IntVector weights, IntVector x) {
  const IntVector pairs = _mm256_maddubs_epi16(weights, x);
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline IntVector dot_eight_bits(IntVector sums, IntVector weights, IntVector x) {
  const IntVector centered = _mm256_xor_si256(weights, _mm256_set1_epi8(static_cast<char>(0x80)));
  return dot_four_bits(sums, _mm256_abs_epi8(centered), _mm256_sign_epi8(x, centered));
}
#endif

#if defined(__AVX512F__)
inline IntVector no_bits() { return _mm512_setzero_si512(); }
inline IntVector low_nibbles(IntVector a) { return _mm512_and_si512(a, _mm512_set1_epi8(0x0F)); }
inline IntVector high_nibbles(IntVector a) { return low_nibbles(_mm512_srli_epi16(a, 4)); }
inline Vector to_floats(IntVector a) { return _mm512_cvtepi32_ps(a); }
inline IntVector subtract_product(IntVector a, IntVector b, IntVector c) {
  return _mm512_sub_epi32(a, _mm512_mullo_epi32(b, c));
}
inline IntVector widen_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline IntVector minus(IntVector a, int b) { return _mm512_sub_epi32(a, _mm512_set1_epi32(b)); }
inline IntVector all_lanes(int x) { return _mm512_set1_epi32(x); }
inline IntVector to_integers(Vector a) { return _mm512_cvtps_epi32(a); }
inline void store_bytes(int8_t* p, IntVector a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
}
inline int sum_of_lanes(IntVector a) { return _mm512_reduce_add_epi32(a); }
inline IntVector plus(IntVector a, IntVector b) { return _mm512_add_epi32(a, b); }
#else
inline IntVector no_bits() { return _mm256_setzero_si256(); }
inline IntVector low_nibbles(IntVector a) { return _mm256_and_si256(a, _mm256_set1_epi8(0x0F)); }
inline IntVector high_nibbles(IntVector a) { return low_nibbles(_mm256_srli_epi16(a, 4)); }
inline Vector to_floats(IntVector a) { return _mm256_cvtepi32_ps(a); }
inline IntVector subtract_product(IntVector a, IntVector b, IntVector c) {
  return _mm256_sub_epi32(a, _mm256_mullo_epi32(b, c));
}
inline IntVector widen_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline IntVector minus(IntVector a, int b) { return _mm256_sub_epi32(a, _mm256_set1_epi32(b)); }
inline IntVector all_lanes(int x) { return _mm256_set1_epi32(x); }
inline IntVector to_integers(Vector a) { return _mm256_cvtps_epi32(a); }
inline void store_bytes(int8_t* p, IntVector a) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
inline IntVector plus(IntVector a, IntVector b) { return _mm256_add_epi32(a, b); }
inline int sum_of_lanes(IntVector a) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xB1)));
}
#endif

// Inputs in int8, with the scale and the sum of every row and group. A tile of rows has its values in the order in which they are
// multiplied, four of each row at a time.
struct QuantizedInputs {
  int8_t* values;  // [num_tiles][in_features / 4][tile_rows][4]
  float* scales;   // [num_rows][num_groups]
  int32_t* sums;   // [num_rows][num_groups]
};

// Quantizes `size` inputs, a multiple of 4; each four of them begin `stride` bytes after the four before.
template <class T>
void quantize_group(const T* x, int64_t size, int8_t* values, int64_t stride, float* scale, int32_t* sum_of_values) {
  Vector greatest_lanes = zero();
  for (int64_t i = 0; i < size; i += kLanes)
    greatest_lanes = maximum(greatest_lanes, absolute(load(x + i, static_cast<int>(smaller<int64_t>(kLanes, size - i)))));
  const float largest = greatest(greatest_lanes);
  const Vector inverse = broadcast(largest > 0.0f ? 127.0f / largest : 0.0f);
  IntVector total = no_bits();
  for (int64_t i = 0; i < size; i += kLanes) {
    const int count = static_cast<int>(smaller<int64_t>(kLanes, size - i));
    const IntVector rounded = to_integers(multiply(load(x + i, count), inverse));
    total = plus(total, rounded);
    alignas(16) int8_t whole[kLanes];
    store_bytes(whole, rounded);
    for (int lane = 0; lane < count; lane += 4, values += stride) __builtin_memcpy(values, whole + lane, 4);
  }
  *scale = largest / 127.0f;
  *sum_of_values = sum_of_lanes(total);
}

// One group of a tile: products of kRows rows with kVectors * kLanes columns, added to `outputs` in float32.
struct GroupTile {
  int64_t num_steps;  // of 4 inputs
  const int8_t* x;
  int64_t x_stride;        // from step to step
  const float* x_scales;   // of the group, from row to row at group_stride
  const int32_t* x_sums;   // likewise
  int64_t group_stride;
  const uint8_t* weights;  // of the group and the tile's first column
  const float* scales;     // of the group and the tile's first column
  const uint8_t* zeros;    // likewise, or null
  float* outputs;
  int64_t output_stride;
  bool accumulate;
};

inline IntVector four_inputs(const int8_t* x) {
  uint32_t bits;
  __builtin_memcpy(&bits, x, 4);
  return broadcast_bits(bits);
}
inline void prefetch(const uint8_t* p) {
  for (int64_t line = 0; line < kVectors * kLanes * 4; line += 64)
    __builtin_prefetch(p + kPrefetchBytes + line);
}
inline IntVector load_weights(const uint8_t* p) { return load_bits(reinterpret_cast<const uint32_t*>(p)); }

// What the zeros of a vector of columns add to sums of products, and its removal.
template <int kBits>
struct ZeroPoints {
  explicit ZeroPoints(const uint8_t* zeros)
      : zeros_(zeros == nullptr ? all_lanes(128 - kSignedOffset) : minus(widen_bytes(zeros), kSignedOffset)) {}
  Vector without(IntVector sums, int32_t x_sum) const {
    return to_floats(subtract_product(sums, zeros_, all_lanes(x_sum)));
  }
  IntVector zeros_;
};
// In float32, which multiplies faster: exact for groups of up to 8808 inputs, beyond that rounded alike on every instruction set.
template <>
struct ZeroPoints<4> {
  explicit ZeroPoints(const uint8_t* zeros)
      : zeros_(subtract(zero(), zeros == nullptr ? broadcast(8.0f) : to_floats(widen_bytes(zeros)))) {}
  Vector without(IntVector sums, int32_t x_sum) const {
    return multiply_add(zeros_, broadcast(static_cast<float>(x_sum)), to_floats(sums));
  }
  Vector zeros_;
};

template <int kBits, int kRows>
inline void multiply_group(const GroupTile& t) {
  IntVector sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = no_bits();
  const int8_t* x = t.x;
  const uint8_t* weights = t.weights;
  constexpr int64_t kBytes = kLanes * 4;
  if constexpr (kBits == 8) {
    for (int64_t step = 0; step < t.num_steps; ++step, x += t.x_stride, weights += kPanel * 4) {
      IntVector columns[kVectors];
      if constexpr (kRows <= kStreamRows) prefetch(weights);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) columns[v] = load_weights(weights + v * kBytes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const IntVector inputs = four_inputs(x + r * 4);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = dot_eight_bits(sums[r][v], columns[v], inputs);
      }
    }
  } else {
    for (int64_t step = 0; step < t.num_steps; step += 2, x += 2 * t.x_stride, weights += kPanel * 4) {
      IntVector low[kVectors], high[kVectors];
      if constexpr (kRows <= kStreamRows) prefetch(weights);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const IntVector both = load_weights(weights + v * kBytes);
        low[v] = low_nibbles(both);
        high[v] = high_nibbles(both);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const IntVector first = four_inputs(x + r * 4), second = four_inputs(x + r * 4 + t.x_stride);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          sums[r][v] = dot_four_bits(sums[r][v], low[v], first);
          sums[r][v] = dot_four_bits(sums[r][v], high[v], second);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const Vector scale = load(t.scales + v * kLanes);
    const ZeroPoints<kBits> zeros(t.zeros == nullptr ? nullptr : t.zeros + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vector product = zeros.without(sums[r][v], t.x_sums[r * t.group_stride]);
      const Vector both_scales = multiply(scale, broadcast(t.x_scales[r * t.group_stride]));
      float* output = t.outputs + r * t.output_stride + v * kLanes;
      const Vector before = t.accumulate ? load(output) : zero();
      store(output, multiply_add(product, both_scales, before));
    }
  }
}

template <int kBits, int kRows>
inline void multiply_group_rows(int64_t rows, const GroupTile& t) {
  if (rows == kRows) {
    multiply_group<kBits, kRows>(t);
  } else if constexpr (kRows > 1) {
    multiply_group_rows<kBits, kRows - 1>(rows, t);
  }
}

template <class T, int kBits>
class QuantizedLinear {
 public:
  explicit QuantizedLinear(const LinearArguments& arguments)
      : a_(arguments),
        groups_(ceil_div(arguments.in_features, arguments.group_size)),
        panels_(ceil_div(arguments.out_features, kPanel)),
        panel_bytes_(arguments.in_features * kPanel * kBits / 8),
        tiles_(ceil_div(arguments.num_rows, kTileRows)),
        tile_rows_(ceil_div(arguments.num_rows, tiles_)),
        tile_bytes_(arguments.in_features * tile_rows_),
        write_(write_rows_of(arguments)) {}

  void run() {
    quantize_inputs();
    const bool few_rows = a_.num_rows <= kTileRows;
    const int64_t row_block = ceil_div(tiles_, ceil_div(a_.num_rows, kRowBlock)) * tile_rows_;
    const int64_t panel_block = few_rows ? 2 : kPanelBlock;
    const int64_t row_tasks = ceil_div(a_.num_rows, row_block);
    const int64_t bytes = panels_ * panel_bytes_;
    const int64_t cost = larger(bytes, bytes / (kLanes * 4) * a_.num_rows);
    parallel_for_dynamic(a_.num_threads, row_tasks * ceil_div(panels_, panel_block), cost, [&](int64_t task) {
      const int64_t row = task % row_tasks * row_block, panel = task / row_tasks * panel_block;
      const int64_t last = smaller(panel + panel_block, panels_);
      for (int64_t p = panel; p < last; ++p) run_panel(row, smaller(row_block, a_.num_rows - row), p);
    });
  }

 private:
  void quantize_inputs() {
    static thread_local Scratch scratch;
    Pieces sizes(nullptr);
    lay_out(sizes);
    Pieces pieces(scratch.get(sizes.used()));
    lay_out(pieces);
    const T* x = static_cast<const T*>(a_.x);
    parallel_for(a_.num_threads, a_.num_rows, a_.num_rows * a_.in_features, [&](int64_t row) {
      int8_t* values = x_.values + row / tile_rows_ * tile_bytes_ + row % tile_rows_ * 4;
      for (int64_t g = 0; g < groups_; ++g) {
        const int64_t first = g * a_.group_size, at = row * groups_ + g;
        const int64_t size = smaller(a_.group_size, a_.in_features - first);
        quantize_group(x + row * a_.in_features + first, size, values + first * tile_rows_, tile_rows_ * 4,
                       x_.scales + at, x_.sums + at);
      }
    });
  }

  void lay_out(Pieces& pieces) {
    x_.values = pieces.take<int8_t>(tiles_ * tile_bytes_);
    x_.scales = pieces.take<float>(a_.num_rows * groups_);
    x_.sums = pieces.take<int32_t>(a_.num_rows * groups_);
  }

  void run_panel(int64_t first_row, int64_t num_rows, int64_t panel) const {
    alignas(64) float outputs[kRowBlock * kPanel];
    const uint8_t* weights = static_cast<const uint8_t*>(a_.weight) + panel * panel_bytes_;
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t size = smaller(a_.group_size, a_.in_features - g * a_.group_size);
      const int64_t scale_at = g * panels_ * kPanel + panel * kPanel;
      for (int64_t v = 0; v < kPanelVectors; v += kVectors) {
        GroupTile tile{size / 4,
                       x_.values + first_row / tile_rows_ * tile_bytes_ + g * a_.group_size * tile_rows_,
                       tile_rows_ * 4,
                       x_.scales + first_row * groups_ + g,
                       x_.sums + first_row * groups_ + g,
                       groups_,
                       weights + g * a_.group_size * kPanel * kBits / 8 + v * kLanes * 4,
                       a_.scales + scale_at + v * kLanes,
                       a_.zeros == nullptr ? nullptr : a_.zeros + scale_at + v * kLanes,
                       outputs + v * kLanes,
                       kPanel,
                       g > 0};
        multiply_rows(num_rows, tile);
      }
    }
    const int64_t column = panel * kPanel;
    write_(a_, outputs, kPanel, first_row, num_rows, column, smaller(kPanel, a_.out_features - column));
  }

  void multiply_rows(int64_t num_rows, GroupTile tile) const {
    for (int64_t row = 0; row < num_rows; row += tile_rows_) {
      multiply_group_rows<kBits, kTileRows>(smaller(tile_rows_, num_rows - row), tile);
      tile.x += tile_bytes_;
      tile.x_scales += tile_rows_ * tile.group_stride;
      tile.x_sums += tile_rows_ * tile.group_stride;
      tile.outputs += tile_rows_ * tile.output_stride;
    }
  }

  const LinearArguments& a_;
  const int64_t groups_;
  const int64_t panels_;
  const int64_t panel_bytes_;
  const int64_t tiles_;       // of rows, all of them of the same height but the last
  const int64_t tile_rows_;
  const int64_t tile_bytes_;  // of a tile's inputs
  const WriteRows write_;
  QuantizedInputs x_{};
};

template <class T>
void quantized_of(const LinearArguments& a) {
  if (a.kind == WeightKind::kInt8) {
    QuantizedLinear<T, 8>(a).run();
  } else {
    QuantizedLinear<T, 4>(a).run();
  }
}

}  // namespace

void linear_quantized(const LinearArguments& a) {
  if (a.dtype == DType::kFloat32) {
    quantized_of<float>(a);
  } else {
    quantized_of<BFloat16>(a);
  }
}

}  // namespace pagoda::PAGODA_ISA
