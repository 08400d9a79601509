// Tiles of keys and values, read out of the pages of the KV cache into the order in which matrix products want them.
#pragma once

#include "tile.h"

namespace pagoda::PAGODA_ISA {
namespace {

constexpr int64_t kTileKeys = 64;
constexpr int kSecondLevel = 2;  // __builtin_prefetch's locality

// Where the keys and values of a tile lie: those of keys low .. high - 1 begin `offsets` elements into the caches.
struct TileRows {
  int64_t low, high;
  int64_t offsets[kTileKeys];
};

template <class T>
struct Format {
  static constexpr int64_t kPair = 1;
  using Dot = DotFloat32;
  using Element = float;
};

#if defined(PAGODA_BF16_DOT)
// bfloat16 is multiplied in pairs: of dimensions for scores, of keys for values.
template <>
struct Format<BFloat16> {
  static constexpr int64_t kPair = 2;
  using Dot = DotBFloat16;
  using Element = uint32_t;
};
#endif

// The weights of kLanes * num_vectors keys, as pairs of bfloat16.
[[maybe_unused]] void pack_pairs(const float* weights, uint32_t* pairs, int64_t num_vectors) {
  for (int64_t v = 0; v < num_vectors; ++v)
    store(reinterpret_cast<BFloat16*>(pairs) + v * kLanes, load(weights + v * kLanes));
}

template <class T>
class CacheTiles {
 public:
  using Element = typename Format<T>::Element;
  static constexpr int64_t kPair = Format<T>::kPair;

  explicit CacheTiles(const AttentionArguments& arguments)
      : a_(arguments),
        padded_dim_(ceil_div(arguments.value_dim, kLanes) * kLanes),
        score_steps_(ceil_div(arguments.head_dim, kPair)) {}

  static constexpr int64_t kLineElements = 64 / static_cast<int64_t>(sizeof(T));  // of a line of the processor's caches

  // Of a head's values, filled up to whole vectors.
  int64_t padded_dim() const { return padded_dim_; }

  // Steps of depth of a score: dimensions of a head, or pairs of them.
  int64_t score_steps() const { return score_steps_; }

  // Where keys rows.low .. rows.high - 1 of a tile that begins at `first_key` lie, of a row of the batch and a KV head.
  void locate(int64_t row, int64_t kv_head, int64_t first_key, TileRows& rows) const {
    const int32_t* table = a_.block_table + row * a_.table_stride;
    int64_t block = (first_key + rows.low) / a_.block_size, place = (first_key + rows.low) % a_.block_size;
    for (int64_t t = rows.low; t < rows.high; ++block, place = 0) {
      const int64_t page = table[block] * a_.num_kv_heads + kv_head;
      int64_t offset = (page * a_.block_size + place) * a_.head_dim;
      for (; place < a_.block_size && t < rows.high; ++place, ++t, offset += a_.head_dim) rows.offsets[t] = offset;
    }
  }

  // The tile's keys, transposed: [score_steps][kTileKeys]. The rest of their last vector becomes zero: what the cache holds
  // there belongs to others. Meanwhile, keys and values of the tile after it are asked for.
  void load_keys(const TileRows& tile, const TileRows& next, Element* keys) const {
    const T* cache = static_cast<const T*>(a_.k_cache);
    const int64_t chunks = ceil_div(score_steps_, kLanes);
    for (int64_t t = 0; t < tile.high; t += kLanes) {
      const T* rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        rows[i] = t + i >= tile.low && t + i < tile.high ? cache + tile.offsets[t + i] : nullptr;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t step = chunk * kLanes;
        prefetch(next, t + chunk * kLanes / chunks, t + (chunk + 1) * kLanes / chunks);
        if constexpr (kPair == 1 && __is_same(T, BFloat16)) {
          if (chunk % 2 == 0 && step + 2 * kLanes <= a_.head_dim) {
            transpose_pairs(rows, step, keys + step * kTileKeys + t);
            continue;
          }
          if (chunk % 2 == 1 && step + kLanes <= a_.head_dim) continue;
        }
        transpose_keys(rows, step, smaller<int64_t>(kLanes, score_steps_ - step), keys + step * kTileKeys + t);
      }
    }
    prefetch(next, ceil_div(tile.high, kLanes) * kLanes, next.high);
  }

  // The tile's values: [kTileKeys / kPair][padded_dim].
  void load_values(const TileRows& rows, float* values) const {
    for (int64_t t = rows.low; t < rows.high; ++t) {
      const T* from = static_cast<const T*>(a_.v_cache) + rows.offsets[t];
      float* to = values + t * padded_dim_;
      int64_t d = 0;
      for (; d + kLanes <= a_.value_dim; d += kLanes) store(to + d, load(from + d));
      if (d < a_.value_dim) store(to + d, load(from + d, static_cast<int>(a_.value_dim - d)));
    }
  }

  // Pairs of keys: the even one in the low half, zero for a key that is not there.
  void load_values(const TileRows& rows, uint32_t* values) const {
    const T* cache = static_cast<const T*>(a_.v_cache);
    const T nothing[kLanes] = {};
    for (int64_t pair = rows.low / 2; 2 * pair < rows.high; ++pair) {
      const T* even = 2 * pair >= rows.low ? cache + rows.offsets[2 * pair] : nullptr;
      const T* odd = 2 * pair + 1 < rows.high ? cache + rows.offsets[2 * pair + 1] : nullptr;
      uint32_t* to = values + pair * padded_dim_;
      int64_t d = 0;
      for (; d + kLanes <= a_.value_dim; d += kLanes)
        store_bits(to + d, pairs_of(even == nullptr ? nothing : even + d, odd == nullptr ? nothing : odd + d));
      for (; d < a_.value_dim; ++d) {
        const uint32_t low_half = even == nullptr ? 0 : even[d].bits;
        const uint32_t high_half = odd == nullptr ? 0 : odd[d].bits;
        to[d] = low_half | high_half << 16;
      }
      for (; d < padded_dim_; ++d) to[d] = 0;
    }
  }

 private:
  // Asks for keys first .. last - 1 and their values, line after line and into the second-level cache, which takes in more lines at
  // once than the first: of pages that lie anywhere, Zen 4 reads 20 instead of 11 GB/s a core that way.
  // Inlined, for GCC takes a function that only prefetches for one without an effect, and drops its calls.
  [[gnu::always_inline]] void prefetch(const TileRows& next, int64_t first, int64_t last) const {
    for (int64_t t = larger(first, next.low); t < smaller(last, next.high); ++t) {
      for (int64_t dim = 0; dim < a_.head_dim; dim += kLineElements) {
        __builtin_prefetch(static_cast<const T*>(a_.k_cache) + next.offsets[t] + dim, 0, kSecondLevel);
        __builtin_prefetch(static_cast<const T*>(a_.v_cache) + next.offsets[t] + dim, 0, kSecondLevel);
      }
    }
  }

  // Steps `step` to `step + count - 1` of kLanes keys, as rows of keys [count][kTileKeys].
  void transpose_keys(const T* const* rows, int64_t step, int64_t count, Element* keys) const {
    IntVector block[kLanes];
    const int elements = static_cast<int>(smaller(count * kPair, a_.head_dim - step * kPair));
    for (int i = 0; i < kLanes; ++i) {
      if (rows[i] == nullptr) {
        block[i] = as_bits(zero());
      } else if (elements == kLanes * kPair) {
        block[i] = key_bits(rows[i] + step * kPair, work_tag());
      } else {
        alignas(64) T whole[kLanes * kPair] = {};
        for (int e = 0; e < elements; ++e) whole[e] = rows[i][step * kPair + e];
        block[i] = key_bits(whole, work_tag());
      }
    }
    transpose(block);
    for (int64_t i = 0; i < count; ++i) store_bits(keys + i * kTileKeys, block[i]);
  }

  // Dimensions `dim` to `dim + 2 * kLanes - 1` of kLanes keys in bfloat16: turned as pairs, then widened.
  static void transpose_pairs(const T* const* rows, int64_t dim, float* keys) {
    IntVector block[kLanes];
    for (int i = 0; i < kLanes; ++i)
      block[i] = rows[i] == nullptr ? as_bits(zero()) : load_bits(reinterpret_cast<const uint32_t*>(rows[i] + dim));
    transpose(block);
    for (int64_t i = 0; i < kLanes; ++i) {
      store(keys + 2 * i * kTileKeys, first_of_pairs(block[i]));
      store(keys + (2 * i + 1) * kTileKeys, second_of_pairs(block[i]));
    }
  }

  static Element work_tag() { return Element(); }
  static IntVector key_bits(const T* p, float) { return as_bits(load(p)); }
  static IntVector key_bits(const T* p, uint32_t) { return load_bits(reinterpret_cast<const uint32_t*>(p)); }

  const AttentionArguments& a_;
  const int64_t padded_dim_;
  const int64_t score_steps_;
};

}  // namespace
}  // namespace pagoda::PAGODA_ISA
