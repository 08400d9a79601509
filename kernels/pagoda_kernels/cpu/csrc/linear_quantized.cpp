// Linear layers over int8 or int4 weights. Inputs are quantized to int8 on the fly, a scale for every row and group, and
// products are summed as integers, exactly: every instruction set gives the same sums.
//
//   output[m][n] = Σ_g  x_scale[m][g] * scale[g][n] * ( Σ_k xq[m][k] * wq[n][k]  -  zero[g][n] * Σ_k xq[m][k] )
//
// or, where a group has a min, what a stored 0 stands for,
//
//   output[m][n] = Σ_g  x_scale[m][g] * ( scale[g][n] * Σ_k xq[m][k] * wq[n][k]  +  min[g][n] * Σ_k xq[m][k] )
//
// wq is unsigned, as VNNI wants one of its two operands.

#include <new>

#include "group.h"
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
constexpr int64_t kCachedBytes = 8192;
// Tiles of so few rows are done before the next weights are there, unless these were asked for so many bytes ahead.
constexpr int kStreamRows = 8;
constexpr int64_t kPrefetchBytes = 2048;
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
constexpr int kRegisterRows = 4;
constexpr int kVectors = 2;  // of a tile: a whole panel
#else
constexpr int kTileRows = 4;
constexpr int kRegisterRows = 1;
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
inline IntVector widen_signed_bytes(const int8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
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
inline IntVector widen_signed_bytes(const int8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
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

// Asks for what a panel's columns have of a group.
template <class S>
inline void ask_panel(const S* p) {
  for (int64_t byte = 0; byte < kPanel * static_cast<int64_t>(sizeof(S)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte);
}

// Scales of a panel's columns, and what a stored 0 stands for where mins say so: of float32 or Half, [groups][kPanel].
template <class S>
struct PanelScales {
  PanelScales(const LinearArguments& a, int64_t panel, int64_t groups)
      : groups(groups),
        scales(static_cast<const S*>(a.scales) + panel * groups * kPanel),
        mins(a.mins == nullptr ? nullptr : static_cast<const S*>(a.mins) + panel * groups * kPanel) {}
  Vector scale(int64_t group, int64_t column) const { return load(scales + group * kPanel + column); }
  Vector min(int64_t group, int64_t column) const { return load(mins + group * kPanel + column); }
  void prefetch_next(int64_t group) const {  // the next panel's: no prefetcher of the processor sees them coming
    ask_panel(scales + (group + groups) * kPanel);
    if (mins != nullptr) ask_panel(mins + (group + groups) * kPanel);
  }

  int64_t groups;
  const S* scales;
  const S* mins;
};

// The same in two levels, as K-quants have them: numbers of 8 bits, times a Half for the groups of a block.
template <>
struct PanelScales<int8_t> {
  PanelScales(const LinearArguments& a, int64_t panel, int64_t groups)
      : groups(groups),
        scales(static_cast<const int8_t*>(a.scales) + panel * groups * kPanel),
        mins(a.mins == nullptr ? nullptr : static_cast<const int8_t*>(a.mins) + panel * groups * kPanel),
        block_groups(a.block_groups),
        block_stride(a.mins == nullptr ? kPanel : 2 * kPanel),
        blocks(static_cast<const Half*>(a.block_scales) + panel * (groups / a.block_groups) * block_stride) {}
  Vector scale(int64_t group, int64_t column) const {
    return multiply(widened(scales + group * kPanel + column), load(blocks + group / block_groups * block_stride + column));
  }
  Vector min(int64_t group, int64_t column) const {
    return multiply(widened(mins + group * kPanel + column),
                    load(blocks + group / block_groups * block_stride + kPanel + column));
  }
  static Vector widened(const int8_t* p) { return to_floats(widen_signed_bytes(p)); }
  void prefetch_next(int64_t group) const {  // the next panel's: no prefetcher of the processor sees them coming
    ask_panel(scales + (group + groups) * kPanel);
    if (mins != nullptr) ask_panel(mins + (group + groups) * kPanel);
    if (group % block_groups == 0) ask_panel(blocks + (group + groups) / block_groups * block_stride);
  }

  int64_t groups;
  const int8_t* scales;
  const int8_t* mins;
  int64_t block_groups;
  int64_t block_stride;
  const Half* blocks;
};

// Products of kRows rows with kVectors * kLanes columns over some groups of inputs, added up in float32 in the groups' order.
template <class S>
struct GroupsTile {
  int64_t first_group;
  int64_t num_groups;
  int64_t group_size;   // of all but a last one that the inputs do not fill
  int64_t in_features;
  const int8_t* x;         // of group 0
  int64_t x_stride;        // from four inputs to the next four
  const float* x_scales;   // of group 0, from row to row at group_stride
  const int32_t* x_sums;   // likewise
  int64_t group_stride;
  const uint8_t* weights;  // of the panel and the tile's first column
  PanelScales<S> scales;   // of the panel
  const uint8_t* zeros;    // of the panel, or null
  int64_t column;          // of the panel
  float* outputs;          // overwritten by group 0
  int64_t output_stride;
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

// Sums of products with what is stored, in float32.
template <int kBits>
inline Vector of_stored(IntVector sums, int32_t x_sum) {
  if constexpr (kBits == 8 && kSignedOffset != 0) sums = subtract_product(sums, all_lanes(-kSignedOffset), all_lanes(x_sum));
  return to_floats(sums);
}

// Always inline: sums would lie in memory for a function of its own.
template <int kBits, int kRows>
[[gnu::always_inline]] inline void multiply_group(int64_t num_steps, const int8_t* x, int64_t x_stride, const uint8_t* weights,
                           IntVector (&sums)[kRows][kVectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = no_bits();
  constexpr int64_t kBytes = kLanes * 4;
  if constexpr (kBits == 8) {
    for (int64_t step = 0; step < num_steps; ++step, x += x_stride, weights += kPanel * 4) {
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
    for (int64_t step = 0; step < num_steps; step += 2, x += 2 * x_stride, weights += kPanel * 4) {
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
        const IntVector first = four_inputs(x + r * 4), second = four_inputs(x + r * 4 + x_stride);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          sums[r][v] = dot_four_bits(sums[r][v], low[v], first);
          sums[r][v] = dot_four_bits(sums[r][v], high[v], second);
        }
      }
    }
  }
}

template <int kBits, int kRows, class S>
inline void multiply_groups(const GroupsTile<S>& t) {
  // Totals of few rows stay in registers; those of more would push the sums of products out of them.
  constexpr bool kInRegisters = kRows <= kRegisterRows;
  Vector totals[kRows][kVectors];
  const auto output = [&](int r, int v) { return t.outputs + r * t.output_stride + v * kLanes; };
  if constexpr (kInRegisters) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) totals[r][v] = t.first_group > 0 ? load(output(r, v)) : zero();
  }
  for (int64_t g = t.first_group; g < t.first_group + t.num_groups; ++g) {
    const int64_t first = g * t.group_size;
    IntVector sums[kRows][kVectors];
    multiply_group<kBits, kRows>(smaller(t.group_size, t.in_features - first) / 4, t.x + first / 4 * t.x_stride, t.x_stride,
                                 t.weights + first * kPanel * kBits / 8, sums);
    const float* x_scales = t.x_scales + g;
    const int32_t* x_sums = t.x_sums + g;
    if constexpr (kRows <= kStreamRows) t.scales.prefetch_next(g);
    const auto add_product = [&](int r, int v, Vector product, Vector factor) {
      if constexpr (kInRegisters) {
        totals[r][v] = multiply_add(product, factor, totals[r][v]);
      } else {
        store(output(r, v), multiply_add(product, factor, g > 0 ? load(output(r, v)) : zero()));
      }
    };
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int64_t column = t.column + v * kLanes;
      const Vector scale = t.scales.scale(g, column);
      if (t.scales.mins != nullptr) {
        const Vector min = t.scales.min(g, column);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const int32_t x_sum = x_sums[r * t.group_stride];
          const Vector offset = multiply(min, broadcast(static_cast<float>(x_sum)));
          const Vector product = multiply_add(scale, of_stored<kBits>(sums[r][v], x_sum), offset);
          add_product(r, v, product, broadcast(x_scales[r * t.group_stride]));
        }
        continue;
      }
      const ZeroPoints<kBits> zeros(t.zeros == nullptr ? nullptr : t.zeros + g * kPanel + column);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vector product = zeros.without(sums[r][v], x_sums[r * t.group_stride]);
        add_product(r, v, product, multiply(scale, broadcast(x_scales[r * t.group_stride])));
      }
    }
  }
  if constexpr (kInRegisters) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(output(r, v), totals[r][v]);
  }
}

template <int kBits, int kRows, class S>
inline void multiply_groups_of_rows(int64_t rows, const GroupsTile<S>& t) {
  if (rows == kRows) {
    multiply_groups<kBits, kRows>(t);
  } else if constexpr (kRows > 1) {
    multiply_groups_of_rows<kBits, kRows - 1>(rows, t);
  }
}

template <class T, int kBits, class S>
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
        panel_block_(arguments.num_rows <= kTileRows ? 2 : kPanelBlock),
        row_block_(ceil_div(tiles_, ceil_div(arguments.num_rows, kRowBlock)) * tile_rows_),
        row_tasks_(ceil_div(arguments.num_rows, row_block_)),
        write_(write_rows_of(arguments)) {}

  int64_t num_tasks() const { return row_tasks_ * ceil_div(panels_, panel_block_); }

  int64_t cost() const {
    const int64_t bytes = panels_ * panel_bytes_;
    return larger(bytes, bytes / (kLanes * 4) * a_.num_rows);
  }

  // Takes the memory for the inputs.
  void lay_out(Pieces& pieces) {
    x_.values = pieces.take<int8_t>(tiles_ * tile_bytes_);
    x_.scales = pieces.take<float>(a_.num_rows * groups_);
    x_.sums = pieces.take<int32_t>(a_.num_rows * groups_);
  }

  void quantize_row(int64_t row) const {
    const T* x = static_cast<const T*>(a_.x) + row * a_.in_features;
    int8_t* values = x_.values + row / tile_rows_ * tile_bytes_ + row % tile_rows_ * 4;
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t first = g * a_.group_size, at = row * groups_ + g;
      const int64_t size = smaller(a_.group_size, a_.in_features - first);
      quantize_group(x + first, size, values + first * tile_rows_, tile_rows_ * 4, x_.scales + at, x_.sums + at);
    }
  }

  void run(int64_t task) const {
    const int64_t row = task % row_tasks_ * row_block_, panel = task / row_tasks_ * panel_block_;
    const int64_t last = smaller(panel + panel_block_, panels_);
    for (int64_t p = panel; p < last; ++p) run_panel(row, smaller(row_block_, a_.num_rows - row), p);
  }

 private:
  void run_panel(int64_t first_row, int64_t num_rows, int64_t panel) const {
    alignas(64) float outputs[kRowBlock * kPanel];
    // Groups whose weights stay in the innermost cache while one tile after the other meets them.
    const int64_t group_bytes = a_.group_size * kPanel * kBits / 8;
    const int64_t at_once = num_rows <= tile_rows_ ? groups_ : larger<int64_t>(1, kCachedBytes / group_bytes);
    for (int64_t g = 0; g < groups_; g += at_once) {
      for (int64_t v = 0; v < kPanelVectors; v += kVectors) {
        GroupsTile<S> tile{g,
                           smaller(at_once, groups_ - g),
                           a_.group_size,
                           a_.in_features,
                           x_.values + first_row / tile_rows_ * tile_bytes_,
                           tile_rows_ * 4,
                           x_.scales + first_row * groups_,
                           x_.sums + first_row * groups_,
                           groups_,
                           static_cast<const uint8_t*>(a_.weight) + panel * panel_bytes_ + v * kLanes * 4,
                           PanelScales<S>(a_, panel, groups_),
                           a_.zeros == nullptr ? nullptr : a_.zeros + panel * groups_ * kPanel,
                           v * kLanes,
                           outputs + v * kLanes,
                           kPanel};
        multiply_rows(num_rows, tile);
      }
    }
    const int64_t column = panel * kPanel;
    write_(a_, outputs, kPanel, first_row, num_rows, column, smaller(kPanel, a_.out_features - column));
  }

  void multiply_rows(int64_t num_rows, GroupsTile<S> tile) const {
    for (int64_t row = 0; row < num_rows; row += tile_rows_) {
      multiply_groups_of_rows<kBits, kTileRows>(smaller(tile_rows_, num_rows - row), tile);
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
  const int64_t panel_block_;  // of a task
  const int64_t row_block_;    // likewise
  const int64_t row_tasks_;
  const WriteRows write_;
  QuantizedInputs x_{};
};

template <class Product>
void multiply_quantized(const LinearArguments* a, int64_t count) {
  static thread_local Scratch product_scratch, start_scratch, input_scratch;
  Product* products = static_cast<Product*>(product_scratch.get(count * static_cast<int64_t>(sizeof(Product))));
  GroupStart* starts =
      static_cast<GroupStart*>(start_scratch.get((count + 1) * static_cast<int64_t>(sizeof(GroupStart))));
  starts[0] = {0, 0};
  int64_t cost = 0;
  Pieces sizes(nullptr);
  for (int64_t index = 0; index < count; ++index) {
    Product& product = *new (products + index) Product(a[index]);
    product.lay_out(sizes);
    starts[index + 1] = {starts[index].row + a[index].num_rows, starts[index].task + product.num_tasks()};
    cost += product.cost();
  }
  Pieces pieces(input_scratch.get(sizes.used()));
  for (int64_t index = 0; index < count; ++index) products[index].lay_out(pieces);
  parallel_for(a->num_threads, starts[count].row, starts[count].row * a->in_features, [&](int64_t row) {
    const int64_t index = product_at<&GroupStart::row>(starts, count, row);
    products[index].quantize_row(row - starts[index].row);
  });
  parallel_for_dynamic(a->num_threads, starts[count].task, cost, [&](int64_t task) {
    const int64_t index = product_at<&GroupStart::task>(starts, count, task);
    products[index].run(task - starts[index].task);
  });
}

template <class T, int kBits>
void with_bits(const LinearArguments* a, int64_t count) {
  if (a->block_scales != nullptr) {
    multiply_quantized<QuantizedLinear<T, kBits, int8_t>>(a, count);
  } else if (a->scale_dtype == DType::kHalf) {
    multiply_quantized<QuantizedLinear<T, kBits, Half>>(a, count);
  } else {
    multiply_quantized<QuantizedLinear<T, kBits, float>>(a, count);
  }
}

template <class T>
void quantized_of(const LinearArguments* a, int64_t count) {
  if (a->kind == WeightKind::kInt8) {
    with_bits<T, 8>(a, count);
  } else {
    with_bits<T, 4>(a, count);
  }
}

}  // namespace

void linear_quantized(const LinearArguments* products, int64_t count) {
  if (products->dtype == DType::kFloat32) {
    quantized_of<float>(products, count);
  } else {
    quantized_of<BFloat16>(products, count);
  }
}

}  // namespace pagoda::PAGODA_ISA
