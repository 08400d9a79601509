// What stands between the matrix products: norms, the gated activation, and the way of heads from projection to cache.

#include "parallel.h"
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

// Calls body(offset, load, store) for pieces of a row of `size` elements: whole vectors, then what is left.
template <class Body>
inline void for_each_vector(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, kLanes);
  if (i < size) body(i, static_cast<int>(size - i));
}
template <class T>
inline Vector load_some(const T* p, int count) {
  return count == kLanes ? load(p) : load(p, count);
}
template <class T>
inline void store_some(T* p, Vector a, int count) {
  if (count == kLanes) {
    store(p, a);
  } else {
    store(p, a, count);
  }
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

template <class T>
void norm_rows(const NormArguments& a) {
  parallel_for(a.num_threads, a.num_rows, a.num_rows * a.size, [&](int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row * a.size;
    const T* weight = static_cast<const T*>(a.weight);
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
      const Vector unit = rounded(multiply(load_some(stream + i, count), scale), weight);
      store_some(normed + i, multiply(unit, load_some(weight + i, count)), count);
    });
  });
}

// GELU in its tanh form is x * sigmoid of this, as 1 + tanh(u) = 2 * sigmoid(2u).
inline Vector gelu_argument(Vector x) {
  const Vector cubic = multiply_add(multiply(multiply(x, x), broadcast(0.044715f)), x, x);
  return multiply(cubic, broadcast(1.5957691216057308f));
}

template <class T>
void activate_rows(const GatedActivationArguments& a) {
  parallel_for(a.num_threads, a.num_rows, a.num_rows * a.size * 4, [&](int64_t row) {
    const T* gate = static_cast<const T*>(a.x) + row * 2 * a.size;
    const T* up = gate + a.size;
    T* output = static_cast<T*>(a.output) + row * a.size;
    for_each_vector(a.size, [&](int64_t i, int count) {
      const Vector x = load_some(gate + i, count);
      const Vector steepness = a.activation == Activation::kSilu ? x : gelu_argument(x);
      const Vector activated = divide(x, add(broadcast(1.0f), exponential(subtract(zero(), steepness))));
      store_some(output + i, multiply(rounded(activated, gate), load_some(up + i, count)), count);
    });
  });
}

// One head: normalized where there is a weight, turned where there is an angle. `from` and `to` may be the same.
template <class T>
inline void turn_head(const T* from, T* to, const T* weight, float epsilon, const float* cosines, const float* sines,
                      int64_t head_dim) {
  const T* source = from;
  if (weight != nullptr) {
    const Vector scale = inverse_rms(from, head_dim, epsilon);
    for_each_vector(head_dim, [&](int64_t i, int count) {
      const Vector unit = rounded(multiply(load_some(from + i, count), scale), weight);
      store_some(to + i, multiply(unit, load_some(weight + i, count)), count);
    });
    source = to;
  }
  const int64_t half = head_dim / 2;
  if (cosines == nullptr) {
    if (source != to) __builtin_memcpy(to, source, head_dim * sizeof(T));
    return;
  }
  for_each_vector(half, [&](int64_t i, int count) {
    const Vector first = load_some(source + i, count), second = load_some(source + half + i, count);
    const Vector cosine = load_some(cosines + i, count), sine = load_some(sines + i, count);
    store_some(to + i, multiply_add(subtract(zero(), second), sine, multiply(first, cosine)), count);
    store_some(to + half + i, multiply_add(first, sine, multiply(second, cosine)), count);
  });
}

template <class T>
void heads_of_tokens(const HeadsArguments& a) {
  const int64_t heads = a.num_heads + 2 * a.num_kv_heads;
  parallel_for(a.num_threads, a.num_tokens, a.num_tokens * heads * a.head_dim * 2, [&](int64_t token) {
    const int64_t half = a.head_dim / 2;
    const float* cosines = a.cosines == nullptr ? nullptr : a.cosines + token * half;
    const float* sines = a.sines == nullptr ? nullptr : a.sines + token * half;
    if (a.query != nullptr) {
      const T* query = static_cast<const T*>(a.query) + token * a.query_stride;
      T* output = static_cast<T*>(a.query_output) + token * a.num_heads * a.head_dim;
      for (int64_t h = 0; h < a.num_heads; ++h)
        turn_head(query + h * a.head_dim, output + h * a.head_dim, static_cast<const T*>(a.query_norm), a.epsilon,
                  cosines, sines, a.head_dim);
    }
    const T* key = static_cast<const T*>(a.key) + token * a.key_stride;
    const int64_t slot = a.slot_mapping == nullptr ? 0 : a.slot_mapping[token];
    const int64_t block = slot / a.block_size, offset = slot % a.block_size;
    for (int64_t h = 0; h < a.num_kv_heads; ++h) {
      const int64_t place = ((block * a.num_kv_heads + h) * a.block_size + offset) * a.head_dim;
      T* to = a.key_output != nullptr ? static_cast<T*>(a.key_output) + (token * a.num_kv_heads + h) * a.head_dim
                                      : static_cast<T*>(a.k_cache) + place;
      turn_head(key + h * a.head_dim, to, static_cast<const T*>(a.key_norm), a.epsilon, cosines, sines, a.head_dim);
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

void heads(const HeadsArguments& a) {
  by_dtype(a, heads_of_tokens<float>, heads_of_tokens<BFloat16>, heads_of_tokens<Half>);
}

}  // namespace pagoda::PAGODA_ISA
