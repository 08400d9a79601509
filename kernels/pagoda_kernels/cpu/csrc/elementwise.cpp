// What stands between the matrix products: norms, the gated activation, and the way of heads from projection to cache.

#include "activations.h"
#include "parallel.h"
#include "row_vectors.h"
#include "simd.h"

namespace pagoda::PAGODA_ISA {
namespace {

// `x` after it was stored as a T: what torch computes on after an operation that rounds to T.
inline Vector rounded(Vector x, const float*) { return x; }
template <class T>
inline Vector rounded(Vector x, const T*) {
  alignas(64) T lanes[kLanes];
  store(lanes, x);
  return load(lanes);
}

// 1 / sqrt(mean of squares + epsilon) of a row.
template <class T>
inline Vector inverse_rms(const T* row, int64_t size, float epsilon) {
  Vector squares = zero();
  for_each_vector(size, [&](int64_t i, int count) {
    const Vector x = load_some(row + i, count);
    squares = multiply_add(x, x, squares);
  });
  return broadcast(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(size) + epsilon));
}

// Numbers of unit root mean square times the norm's weight, as a T: rounded before the product too, unless the weight is wider.
template <class T>
inline void store_weighted(T* to, Vector unit, const T* weight, int count) {
  store_some(to, multiply(rounded(unit, weight), load_some(weight, count)), count);
}
template <class T, class Weight>
inline void store_weighted(T* to, Vector unit, const Weight* weight, int count) {
  store_some(to, multiply(unit, load_some(weight, count)), count);
}

template <class T, class Weight>
void norm_rows_by(const NormArguments& a) {
  parallel_for(a.num_threads, a.num_rows, a.num_rows * a.size, [&](int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row * a.size;
    const Weight* weight = static_cast<const Weight*>(a.weight);
    T* normed = static_cast<T*>(a.normed) + row * a.size;
    const T* stream = x;
    if (a.residual != nullptr) {
      const T* residual = static_cast<const T*>(a.residual) + row * a.size;
      T* added = static_cast<T*>(a.stream) + row * a.size;
      for_each_vector(a.size, [&](int64_t i, int count) {
        store_some(added + i, add(load_some(x + i, count), load_some(residual + i, count)), count);
      });
      stream = added;
    }
    const Vector scale = inverse_rms(stream, a.size, a.epsilon);
    for_each_vector(a.size, [&](int64_t i, int count) {
      store_weighted(normed + i, multiply(load_some(stream + i, count), scale), weight + i, count);
    });
  });
}

template <class T>
void norm_rows(const NormArguments& a) {
  a.float32_weight ? norm_rows_by<T, float>(a) : norm_rows_by<T, T>(a);
}

constexpr float kSwigluAlpha = 1.702f;
constexpr float kSwigluLimit = 7.0f;

template <class T>
void activate_rows(const GatedActivationArguments& a) {
  parallel_for(a.num_threads, a.num_rows, a.num_rows * a.size * 4, [&](int64_t row) {
    const T* gate = static_cast<const T*>(a.x) + row * 2 * a.size;
    const T* up = gate + a.size;
    T* output = static_cast<T*>(a.output) + row * a.size;
    for_each_vector(a.size, [&](int64_t i, int count) {
      if (a.activation == Activation::kClampedSwiglu) {
        const Vector limit = broadcast(kSwigluLimit), x = minimum(load_some(gate + i, count), limit);
        const Vector other = maximum(minimum(load_some(up + i, count), limit), broadcast(-kSwigluLimit));
        const Vector decay = exponential(multiply(x, broadcast(-kSwigluAlpha)));
        const Vector swish = divide(x, add(broadcast(1.0f), decay));
        store_some(output + i, multiply(swish, add(other, broadcast(1.0f))), count);
        return;
      }
      const Vector value = activated(a.activation, load_some(gate + i, count));
      store_some(output + i, multiply(rounded(value, gate), load_some(up + i, count)), count);
    });
  });
}

// The turn of one head, and how it is normalized before where there is a weight.
struct Turn {
  const void* weight;
  bool float32_weight;
  float epsilon;
  const float* cosines;  // of the token, or null
  const float* sines;
  int64_t rotary_dim;
  bool interleaved;
};

template <class T, class Weight>
inline void normalize_head(const T* from, T* to, const Turn& turn, int64_t head_dim) {
  const Weight* weight = static_cast<const Weight*>(turn.weight);
  const Vector scale = inverse_rms(from, head_dim, turn.epsilon);
  for_each_vector(head_dim, [&](int64_t i, int count) {
    store_weighted(to + i, multiply(load_some(from + i, count), scale), weight + i, count);
  });
}

// `x` with every two neighbours turned by the angle of their pair. Pairs are pulled apart, turned as vectors, and put back.
template <class T>
inline void turn_neighbours(const T* from, T* to, const Turn& turn) {
  for_each_vector(turn.rotary_dim / 2, [&](int64_t i, int count) {
    alignas(64) T evens[kLanes], odds[kLanes];
    for (int lane = 0; lane < count; ++lane) {
      evens[lane] = from[2 * (i + lane)];
      odds[lane] = from[2 * (i + lane) + 1];
    }
    const Vector first = load_some(evens, count), second = load_some(odds, count);
    const Vector cosine = load_some(turn.cosines + i, count), sine = load_some(turn.sines + i, count);
    store_some(evens, multiply_add(subtract(zero(), second), sine, multiply(first, cosine)), count);
    store_some(odds, multiply_add(first, sine, multiply(second, cosine)), count);
    for (int lane = 0; lane < count; ++lane) {
      to[2 * (i + lane)] = evens[lane];
      to[2 * (i + lane) + 1] = odds[lane];
    }
  });
}

// One head: normalized where there is a weight, turned where there is an angle. `from` and `to` may be the same.
template <class T>
inline void turn_head(const T* from, T* to, const Turn& turn, int64_t head_dim) {
  const T* source = from;
  if (turn.weight != nullptr) {
    turn.float32_weight ? normalize_head<T, float>(from, to, turn, head_dim) : normalize_head<T, T>(from, to, turn, head_dim);
    source = to;
  }
  const int64_t turned = turn.cosines == nullptr ? 0 : turn.rotary_dim, half = turned / 2;
  if (source != to && turned < head_dim) __builtin_memcpy(to + turned, source + turned, (head_dim - turned) * sizeof(T));
  if (turned == 0) return;
  if (turn.interleaved) {
    turn_neighbours(source, to, turn);
    return;
  }
  for_each_vector(half, [&](int64_t i, int count) {
    const Vector first = load_some(source + i, count), second = load_some(source + half + i, count);
    const Vector cosine = load_some(turn.cosines + i, count), sine = load_some(turn.sines + i, count);
    store_some(to + i, multiply_add(subtract(zero(), second), sine, multiply(first, cosine)), count);
    store_some(to + half + i, multiply_add(first, sine, multiply(second, cosine)), count);
  });
}

template <class T>
void heads_of_tokens(const HeadsArguments& a) {
  const int64_t heads = a.num_heads + 2 * a.num_kv_heads;
  parallel_for(a.num_threads, a.num_tokens, a.num_tokens * heads * a.head_dim * 2, [&](int64_t token) {
    const int64_t half = a.rotary_dim / 2;
    Turn turn{a.query_norm, a.float32_norm, a.epsilon, a.cosines, a.sines, a.rotary_dim, a.interleaved};
    if (turn.cosines != nullptr) turn.cosines += token * half;
    if (turn.sines != nullptr) turn.sines += token * half;
    if (a.query != nullptr) {
      const T* query = static_cast<const T*>(a.query) + token * a.query_stride;
      T* output = static_cast<T*>(a.query_output) + token * a.num_heads * a.head_dim;
      for (int64_t h = 0; h < a.num_heads; ++h)
        turn_head(query + h * a.head_dim, output + h * a.head_dim, turn, a.head_dim);
    }
    turn.weight = a.key_norm;
    const T* key = static_cast<const T*>(a.key) + token * a.key_stride;
    const int64_t slot = a.slot_mapping == nullptr ? 0 : a.slot_mapping[token];
    const int64_t block = slot / a.block_size, offset = slot % a.block_size;
    for (int64_t h = 0; h < a.num_kv_heads; ++h) {
      const int64_t place = ((block * a.num_kv_heads + h) * a.block_size + offset) * a.head_dim;
      T* to = a.key_output != nullptr ? static_cast<T*>(a.key_output) + (token * a.num_kv_heads + h) * a.head_dim
                                      : static_cast<T*>(a.k_cache) + place;
      turn_head(key + h * a.head_dim, to, turn, a.head_dim);
      if (a.value != nullptr) {
        const T* value = static_cast<const T*>(a.value) + token * a.value_stride + h * a.head_dim;
        __builtin_memcpy(static_cast<T*>(a.v_cache) + place, value, a.head_dim * sizeof(T));
      }
    }
  });
}

// One pass: every lane keeps the greatest of its logits and where it first was. Ids are exact as floats.
void greedy_rows(const GreedyArguments& a) {
  parallel_for(a.num_threads, a.num_rows, a.num_rows * a.size * 4, [&](int64_t row) {
    const float* logits = a.logits + row * a.size;
    alignas(64) float lanes[kLanes], ids[kLanes], not_numbers[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) ids[lane] = static_cast<float>(lane);
    Vector best = broadcast(-__builtin_inff()), best_ids = load(ids), here = best_ids, is_nan = zero();
    for_each_vector(a.size, [&](int64_t i, int count) {
      Vector x = load_some(logits + i, count);
      if (count < kLanes) x = where_lane_in(0, count, x, broadcast(-__builtin_inff()));
      is_nan = maximum(is_nan, where_at_least(x, x, zero(), broadcast(1.0f)));
      best_ids = where_at_least(best, x, best_ids, here);
      best = where_at_least(best, x, best, x);
      here = add(here, broadcast(static_cast<float>(kLanes)));
    });
    store(lanes, best);
    store(ids, best_ids);
    store(not_numbers, is_nan);
    int first = 0;
    bool has_nan = false;
    for (int lane = 0; lane < kLanes; ++lane) {
      has_nan = has_nan || not_numbers[lane] != 0.0f;
      if (lanes[lane] > lanes[first] || (lanes[lane] == lanes[first] && ids[lane] < ids[first])) first = lane;
    }
    a.best[row] = has_nan ? __builtin_nanf("") : lanes[first];
    a.ids[row] = has_nan ? 0 : static_cast<int64_t>(ids[first]);
  });
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

void norm(const NormArguments& a) { by_dtype(a, norm_rows<float>, norm_rows<BFloat16>, norm_rows<Half>); }

void gated_activation(const GatedActivationArguments& a) {
  by_dtype(a, activate_rows<float>, activate_rows<BFloat16>, activate_rows<Half>);
}

void greedy(const GreedyArguments& a) { greedy_rows(a); }

// Words of allowed and forbidden tokens are mixed without an order that a branch predictor could learn, so there is no branch
// for a token, and none but the first for a word.
void token_bitmask(const TokenBitmaskArguments& a) {
  const Vector forbidden = broadcast(-__builtin_inff());
  parallel_for(a.num_threads, a.count, a.count * a.words * 32 * 4, [&](int64_t m) {
    float* logits = a.logits + a.rows[m] * a.size;
    const uint32_t* mask = a.mask + m * a.words;
    for (int64_t w = 0; w < a.words; ++w, logits += 32) {
      if (mask[w] == ~0u) continue;
      for (int i = 0; i < 32; i += kLanes) store(logits + i, where_bit(mask[w] >> i, load(logits + i), forbidden));
    }
  });
}

void soft_cap(const SoftCapArguments& a) {
  const Vector steepness = broadcast(2.0f / a.cap), cap = broadcast(a.cap), one = broadcast(1.0f), two = broadcast(2.0f);
  parallel_for(a.num_threads, a.num_rows, a.num_rows * a.size * 4, [&](int64_t row) {
    float* values = a.values + row * a.size;
    for_each_vector(a.size, [&](int64_t i, int count) {
      // tanh(x) = 1 - 2 / (e^2x + 1)
      const Vector power = exponential(multiply(load_some(values + i, count), steepness));
      store_some(values + i, multiply(subtract(one, divide(two, add(power, one))), cap), count);
    });
  });
}

void heads(const HeadsArguments& a) {
  by_dtype(a, heads_of_tokens<float>, heads_of_tokens<BFloat16>, heads_of_tokens<Half>);
}

}  // namespace pagoda::PAGODA_ISA
