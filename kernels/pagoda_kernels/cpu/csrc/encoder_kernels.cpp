// What an encoder has beside its linear layers: LayerNorm, the sum of embeddings, attention in both directions.

#include "parallel.h"
#include "row_vectors.h"
#include "scratch.h"
#include "tile.h"

namespace pagoda::PAGODA_ISA {
namespace {

template <class T>
void layer_norm_rows(const LayerNormArguments& a) {
  parallel_for(a.num_threads, a.num_rows, a.num_rows * a.size * 3, [&](int64_t row) {
    // In float32 until it is normalized: a sum that is rounded first would lose what its mean is small against.
    static thread_local Scratch scratch;
    float* wide = static_cast<float*>(scratch.get(a.size * static_cast<int64_t>(sizeof(float))));
    const T* x = static_cast<const T*>(a.x) + row * a.size;
    const T* residual = a.residual == nullptr ? nullptr : static_cast<const T*>(a.residual) + row * a.size;
    Vector total = zero();
    for_each_vector(a.size, [&](int64_t i, int count) {
      Vector value = load_some(x + i, count);
      if (residual != nullptr) value = add(value, load_some(residual + i, count));
      store_some(wide + i, value, count);
      total = add(total, value);
    });
    if (a.stream != nullptr) {
      T* stream = static_cast<T*>(a.stream) + row * a.size;
      for_each_vector(a.size, [&](int64_t i, int count) { store_some(stream + i, load_some(wide + i, count), count); });
    }
    const Vector mean = broadcast(sum(total) / static_cast<float>(a.size));
    Vector squares = zero();
    for_each_vector(a.size, [&](int64_t i, int count) {
      Vector difference = subtract(load_some(wide + i, count), mean);
      if (count < kLanes) difference = where_lane_in(0, count, difference, zero());
      squares = multiply_add(difference, difference, squares);
    });
    const Vector scale = broadcast(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(a.size) + a.epsilon));
    const T* weight = static_cast<const T*>(a.weight);
    const T* bias = static_cast<const T*>(a.bias);
    T* normed = static_cast<T*>(a.normed) + row * a.size;
    for_each_vector(a.size, [&](int64_t i, int count) {
      Vector value = multiply(subtract(load_some(wide + i, count), mean), scale);
      value = multiply(value, load_some(weight + i, count));
      if (bias != nullptr) value = add(value, load_some(bias + i, count));
      store_some(normed + i, value, count);
    });
  });
}

template <class T>
void embedding_rows(const EmbeddingArguments& a) {
  parallel_for(a.num_threads, a.num_rows, a.num_rows * a.size * 4, [&](int64_t row) {
    const T* word = static_cast<const T*>(a.words) + a.ids[row] * a.size;
    const T* position = a.positions == nullptr ? nullptr : static_cast<const T*>(a.positions) + a.position_ids[row] * a.size;
    const int64_t type_id = a.type_ids == nullptr ? 0 : a.type_ids[row];
    const T* type = a.types == nullptr ? nullptr : static_cast<const T*>(a.types) + type_id * a.size;
    T* output = static_cast<T*>(a.output) + row * a.size;
    for_each_vector(a.size, [&](int64_t i, int count) {
      Vector value = load_some(word + i, count);
      if (type != nullptr) value = add(value, load_some(type + i, count));
      if (position != nullptr) value = add(value, load_some(position + i, count));
      store_some(output + i, value, count);
    });
  });
}

constexpr int64_t kQueryTile = 4 * kTileRows;

inline int64_t rounded_up(int64_t size, int64_t unit) { return ceil_div(size, unit) * unit; }

// One row's queries, keys or values of one head in float32, [length][width] with zeros behind head_dim, rotated where there are
// angles.
template <class T>
void widen_head(const RaggedAttentionArguments& a, const T* from, int64_t stride, int64_t first_token, int64_t length,
                bool rotates, float* to, int64_t width) {
  const int64_t half = a.head_dim / 2;
  for (int64_t token = 0; token < length; ++token, from += stride, to += width) {
    for (int64_t i = a.head_dim; i < width; ++i) to[i] = 0.0f;
    if (!rotates) {
      for_each_vector(a.head_dim, [&](int64_t i, int count) { store_some(to + i, load_some(from + i, count), count); });
      continue;
    }
    const float* cosines = a.cosines + (first_token + token) * half;
    const float* sines = a.sines + (first_token + token) * half;
    for_each_vector(half, [&](int64_t i, int count) {
      const Vector first = load_some(from + i, count), second = load_some(from + half + i, count);
      const Vector cosine = load_some(cosines + i, count), sine = load_some(sines + i, count);
      store_some(to + i, multiply_add(subtract(zero(), second), sine, multiply(first, cosine)), count);
      store_some(to + half + i, multiply_add(first, sine, multiply(second, cosine)), count);
    });
  }
}

// keys [padded_length][width] to panels of 32 keys, [panel][width][32]: the columns of a product.
inline void transpose_keys(const float* keys, int64_t padded_length, int64_t width, float* panels) {
  for (int64_t key = 0; key < padded_length; key += kLanes) {
    float* to = panels + key / kPanel * width * kPanel + key % kPanel;
    for (int64_t i = 0; i < width; i += kLanes) {
      IntVector block[kLanes];
      for (int lane = 0; lane < kLanes; ++lane)
        block[lane] = load_bits(reinterpret_cast<const uint32_t*>(keys + (key + lane) * width + i));
      transpose(block);
      for (int lane = 0; lane < kLanes; ++lane) store_bits(to + (i + lane) * kPanel, block[lane]);
    }
  }
}

// Scores of one query over keys 0 .. count - 1 of the tile to their exponentials, zeros for keys outside of [begin, end) and in
// the padding; returns their sum.
inline float softmax_row(float* scores, int64_t padded, int64_t begin, int64_t end, float scale, const float* bias) {
  const Vector factor = broadcast(scale), lowest = broadcast(-__builtin_inff());
  Vector greatest_lanes = lowest;
  for (int64_t i = 0; i < padded; i += kLanes) {
    Vector score = multiply(load(scores + i), factor);
    if (bias != nullptr) score = add(score, load(bias + i));
    score = where_lane_in(begin - i, end - i, score, lowest);
    store(scores + i, score);
    greatest_lanes = maximum(greatest_lanes, score);
  }
  const Vector largest = broadcast(greatest(greatest_lanes));
  Vector total = zero();
  for (int64_t i = 0; i < padded; i += kLanes) {
    const Vector weight = exponential(subtract(load(scores + i), largest));
    store(scores + i, weight);
    total = add(total, weight);
  }
  return sum(total);
}

// The biases of a query at `position` to the keys from `first_key` on.
inline void gather_bias(const RaggedAttentionArguments& a, int64_t head, int64_t position, int64_t first_key,
                        int64_t count, float* to) {
  const float* table = a.relative_bias + head * (2 * a.max_distance + 1) + a.max_distance;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t distance = first_key + i - position;
    to[i] = table[larger(-a.max_distance, smaller(a.max_distance, distance))];
  }
}

template <class T>
void attend_head(const RaggedAttentionArguments& a, int64_t row, int64_t head) {
  static thread_local Scratch scratch;
  const int64_t first_token = a.query_start_loc[row], length = a.query_start_loc[row + 1] - first_token;
  const int64_t begin_query = larger<int64_t>(0, a.first_query - first_token);
  const int64_t end_query = smaller(length, a.last_query - first_token);
  if (begin_query >= end_query) return;
  const int64_t width = rounded_up(a.head_dim, kLanes), padded_length = rounded_up(length, kPanel);
  const auto lay_out = [&](Pieces& pieces, float*& query, float*& keys, float*& panels, float*& values, float*& scores,
                           float*& bias, float*& sums) {
    query = pieces.take<float>((end_query - begin_query) * width);
    keys = pieces.take<float>(padded_length * width);
    panels = pieces.take<float>(padded_length * width);
    values = pieces.take<float>(padded_length * width);
    scores = pieces.take<float>(kQueryTile * padded_length);
    bias = pieces.take<float>(padded_length);
    sums = pieces.take<float>(kQueryTile * width);
  };
  float *query, *keys, *panels, *values, *scores, *bias, *sums;
  Pieces sizes(nullptr);
  lay_out(sizes, query, keys, panels, values, scores, bias, sums);
  Pieces pieces(scratch.get(sizes.used()));
  lay_out(pieces, query, keys, panels, values, scores, bias, sums);

  const int64_t heads_size = a.num_heads * a.head_dim, stride = 3 * heads_size;
  const T* qkv = static_cast<const T*>(a.qkv) + first_token * stride + head * a.head_dim;
  const bool rotates = a.cosines != nullptr;
  widen_head(a, qkv + begin_query * stride, stride, first_token + begin_query, end_query - begin_query, rotates, query, width);
  widen_head(a, qkv + heads_size, stride, first_token, length, rotates, keys, width);
  widen_head(a, qkv + 2 * heads_size, stride, first_token, length, false, values, width);
  __builtin_memset(keys + length * width, 0, (padded_length - length) * width * sizeof(float));
  __builtin_memset(values + length * width, 0, (padded_length - length) * width * sizeof(float));
  transpose_keys(keys, padded_length, width, panels);

  T* output = static_cast<T*>(a.output) + first_token * heads_size + head * a.head_dim;
  for (int64_t tile = begin_query; tile < end_query; tile += kQueryTile) {
    const int64_t rows = smaller(kQueryTile, end_query - tile);
    // The keys that any query of the tile sees, from whole panels.
    const int64_t first_key = a.window == 0 ? 0 : larger<int64_t>(0, tile - a.window) / kPanel * kPanel;
    const int64_t last_key = a.window == 0 ? length : smaller(length, tile + rows + a.window);
    const int64_t padded = rounded_up(last_key - first_key, kPanel);
    const TileOperands<DotFloat32> products{
        a.head_dim, query + (tile - begin_query) * width, width, panels + first_key * width, kPanel, width * kPanel, scores, padded, false};
    multiply_matrix<DotFloat32>(rows, padded / kLanes, products, true);
    float totals[kQueryTile];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t position = tile + r;
      const int64_t begin = a.window == 0 ? 0 : larger<int64_t>(0, position - a.window);
      const int64_t end = a.window == 0 ? length : smaller(length, position + a.window + 1);
      if (a.relative_bias != nullptr) gather_bias(a, head, position, first_key, padded, bias);
      totals[r] = softmax_row(scores + r * padded, padded, begin - first_key, end - first_key, a.scale,
                              a.relative_bias == nullptr ? nullptr : bias);
    }
    const TileOperands<DotFloat32> weighted{
        last_key - first_key, scores, padded, values + first_key * width, width, kPanel, sums, width, false};
    multiply_matrix<DotFloat32>(rows, width / kLanes, weighted, true);
    for (int64_t r = 0; r < rows; ++r) {
      const Vector inverse = broadcast(1.0f / totals[r]);
      T* to = output + (tile + r) * heads_size;
      for_each_vector(a.head_dim, [&](int64_t i, int count) {
        store_some(to + i, multiply(load(sums + r * width + i), inverse), count);
      });
    }
  }
}

template <class T>
void attend_heads(const RaggedAttentionArguments& a) {
  const int64_t tokens = a.query_start_loc[a.num_rows];
  parallel_for_dynamic(a.num_threads, a.num_rows * a.num_heads, tokens * a.num_heads * a.head_dim * 64,
                       [&](int64_t task) { attend_head<T>(a, task / a.num_heads, task % a.num_heads); });
}

template <class Arguments, class Run32, class Run16, class RunHalf>
inline void by_dtype(const Arguments& a, Run32 run32, Run16 run16, RunHalf run_half) {
  switch (a.dtype) {
    case DType::kFloat32:
      return run32(a);
    case DType::kBFloat16:
      return run16(a);
    case DType::kHalf:
      return run_half(a);
  }
}

}  // namespace

void layer_norm(const LayerNormArguments& a) {
  by_dtype(a, layer_norm_rows<float>, layer_norm_rows<BFloat16>, layer_norm_rows<Half>);
}

void embedding(const EmbeddingArguments& a) {
  by_dtype(a, embedding_rows<float>, embedding_rows<BFloat16>, embedding_rows<Half>);
}

void ragged_attention(const RaggedAttentionArguments& a) {
  by_dtype(a, attend_heads<float>, attend_heads<BFloat16>, attend_heads<Half>);
}

}  // namespace pagoda::PAGODA_ISA
