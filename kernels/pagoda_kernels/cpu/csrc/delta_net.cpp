// The gated delta net (Yang et al., 2024) behind its projections: causal convolution, delta rule token by token, gated norm.

#include "activations.h"
#include "parallel.h"
#include "row_vectors.h"
#include "scratch.h"
#include "simd.h"

extern "C" float expf(float);
extern "C" float log1pf(float);

namespace pagoda::PAGODA_ISA {
namespace {

// Value dimensions whose sums are in registers at a time, in vectors.
constexpr int kColumns = 4;

inline Vector rounded(Vector x, const float*) { return x; }
template <class T>
inline Vector rounded(Vector x, const T*) {
  alignas(64) T lanes[kLanes];
  store(lanes, x);
  return load(lanes);
}

inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

inline void copy(const float* from, float* to, int64_t count) {
  __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
}

// `x` divided by its length, times `factor`.
inline void normalize(float* x, int64_t size, float factor) {
  Vector squares = zero();
  for_each_vector(size, [&](int64_t i, int count) {
    const Vector v = load_some(x + i, count);
    squares = multiply_add(v, v, squares);
  });
  const Vector scale = broadcast(factor / __builtin_sqrtf(sum(squares) + 1e-6f));
  for_each_vector(size, [&](int64_t i, int count) { store_some(x + i, multiply(load_some(x + i, count), scale), count); });
}

// One key head, and the value heads that read it, of one row.
template <class T>
class HeadOfRow {
 public:
  HeadOfRow(const DeltaNetArguments& arguments, int64_t row, int64_t head, Scratch& scratch)
      : a(arguments), row_(row), head_(head), group_(a.num_value_heads / a.num_key_heads) {
    const int64_t all_keys = a.num_key_heads * a.key_dim, values = group_ * a.value_dim;
    channels_[0] = head * a.key_dim;
    channels_[1] = all_keys + head * a.key_dim;
    channels_[2] = 2 * all_keys + head * values;
    sizes_[0] = sizes_[1] = a.key_dim;
    sizes_[2] = values;
    if (a.interleaved) {
      const int64_t first = head * 2 * (a.key_dim + values);
      inputs_[0] = first;
      inputs_[1] = first + a.key_dim;
      inputs_[2] = first + 2 * a.key_dim;
      gate_ = inputs_[2] + values;
    } else {
      for (int part = 0; part < 3; ++part) inputs_[part] = channels_[part];
      gate_ = 2 * all_keys + (a.num_value_heads + head * group_) * a.value_dim;
    }
    num_channels_ = 2 * a.key_dim + values;
    num_all_channels_ = 2 * all_keys + a.num_value_heads * a.value_dim;
    num_taps_ = a.conv_size - 1;
    const int64_t floats = (num_taps_ + 1) * num_channels_ + a.value_dim;
    history_ = static_cast<float*>(scratch.get(floats * static_cast<int64_t>(sizeof(float))));
    mixed_ = history_ + num_taps_ * num_channels_;
    read_ = mixed_ + num_channels_;
  }

  void run() {
    const int64_t begin = a.query_start_loc[row_], end = a.query_start_loc[row_ + 1];
    if (begin == end) return;
    const int64_t first = a.seq_lens[row_] - (end - begin);
    const int32_t* table = a.block_table + row_ * a.table_stride;
    int64_t block = table[first / a.block_size];
    if (first == 0) {
      start(block);
    } else {
      const int64_t before = table[(first - 1) / a.block_size];
      load_history(before);
      move_states(before, block);
    }
    for (int64_t token = begin, position = first; token < end; ++token, ++position) {
      if (position > first && position % a.block_size == 0) {
        const int64_t next = table[position / a.block_size];
        store_history(block);
        move_states(block, next);
        block = next;
      }
      run_token(token, block);
    }
    store_history(block);
  }

 private:
  float* state(int64_t block, int64_t value_head) const {
    const int64_t size = a.key_dim * a.value_dim;
    if (value_head < a.num_first_heads) return a.first_states + block * a.first_stride + value_head * size;
    return a.other_states + block * a.other_stride + (value_head - a.num_first_heads) * size;
  }

  void start(int64_t block) {
    for (int64_t i = 0; i < num_taps_ * num_channels_; ++i) history_[i] = 0.0f;
    for (int64_t member = 0; member < group_; ++member)
      __builtin_memset(state(block, head_ * group_ + member), 0, static_cast<size_t>(a.key_dim * a.value_dim) * sizeof(float));
  }

  void move_states(int64_t from, int64_t to) const {
    if (from == to) return;
    for (int64_t member = 0; member < group_; ++member)
      copy(state(from, head_ * group_ + member), state(to, head_ * group_ + member), a.key_dim * a.value_dim);
  }

  // Calls body(place in a block's inputs of the convolution, place in `history_`, count) for every run of channels.
  template <class Body>
  void for_each_run(const Body& body) const {
    for (int64_t tap = 0; tap < num_taps_; ++tap) {
      int64_t own = tap * num_channels_;
      for (int part = 0; part < 3; own += sizes_[part], ++part)
        body(tap * num_all_channels_ + channels_[part], own, sizes_[part]);
    }
  }
  void load_history(int64_t block) {
    const float* from = a.conv_states + block * a.conv_stride;
    for_each_run([&](int64_t place, int64_t own, int64_t count) { copy(from + place, history_ + own, count); });
  }
  void store_history(int64_t block) const {
    float* to = a.conv_states + block * a.conv_stride;
    for_each_run([&](int64_t place, int64_t own, int64_t count) { copy(history_ + own, to + place, count); });
  }

  // The token's queries, keys and values behind convolution and SiLU, as a T has them, into `mixed_`.
  void convolve(const T* inputs) {
    int64_t own = 0;
    for (int part = 0; part < 3; own += sizes_[part], ++part) {
      const T* x = inputs + inputs_[part];
      const float* weight = a.conv_weight + channels_[part];
      for_each_vector(sizes_[part], [&](int64_t i, int count) {
        const Vector newest = load_some(x + i, count);
        Vector total = zero();
        for (int64_t tap = 0; tap < num_taps_; ++tap) {
          float* past = history_ + tap * num_channels_ + own + i;
          total = multiply_add(load_some(past, count), load_some(weight + tap * num_all_channels_ + i, count), total);
          store_some(past, tap + 1 < num_taps_ ? load_some(past + num_channels_, count) : newest, count);
        }
        total = multiply_add(newest, load_some(weight + num_taps_ * num_all_channels_ + i, count), total);
        store_some(mixed_ + own + i, rounded(silu(rounded(total, x)), x), count);
      });
    }
  }

  void run_token(int64_t token, int64_t block) {
    const T* inputs = static_cast<const T*>(a.projected) + token * a.projected_stride;
    convolve(inputs);
    float *query = mixed_, *key = mixed_ + a.key_dim;
    normalize(query, a.key_dim, 1.0f / __builtin_sqrtf(static_cast<float>(a.key_dim)));
    normalize(key, a.key_dim, 1.0f);
    for (int64_t member = 0; member < group_; ++member) {
      const int64_t value_head = head_ * group_ + member;
      const float* gates = a.gates + token * 2 * a.num_value_heads;
      const float* write_gate = a.interleaved ? gates + 2 * head_ * group_ + member : gates + value_head;
      const float step = write_gate[a.interleaved ? group_ : a.num_value_heads];
      const float beta = 1.0f / (1.0f + expf(-*write_gate));
      const float decay = expf(-expf(a.decay_log[value_head]) * softplus(step + a.step_bias[value_head]));
      update(state(block, value_head), query, key, key + a.key_dim + member * a.value_dim, decay, beta);
      write_output(inputs + gate_ + member * a.value_dim,
                   static_cast<T*>(a.output) + (token * a.num_value_heads + value_head) * a.value_dim);
    }
  }

  // S = decay * S + key (value - decay * key S) * beta, and what the query reads of it, into `read_`.
  void update(float* state, const float* query, const float* key, const float* value, float decay, float beta) const {
    for (int64_t column = 0; column < a.value_dim; column += kColumns * kLanes) {
      const int64_t left = a.value_dim - column;
      if (left >= kColumns * kLanes) {
        update_columns<kColumns, true>(state, query, key, value, decay, beta, column, kLanes);
      } else {
        for (int64_t c = column; c < a.value_dim; c += kLanes)
          update_columns<1, false>(state, query, key, value, decay, beta, c, static_cast<int>(smaller<int64_t>(kLanes, a.value_dim - c)));
      }
    }
  }

  template <int kVectors, bool kWhole>
  void update_columns(float* state, const float* query, const float* key, const float* value, float decay, float beta,
                      int64_t column, int count) const {
    const auto read = [&](const float* p) { return kWhole ? load(p) : load_some(p, count); };
    Vector change[kVectors], output[kVectors];
    for (int v = 0; v < kVectors; ++v) change[v] = output[v] = zero();
    const float* row = state + column;
    for (int64_t i = 0; i < a.key_dim; ++i, row += a.value_dim) {
      const Vector weight = broadcast(key[i]);
      for (int v = 0; v < kVectors; ++v) change[v] = multiply_add(weight, read(row + v * kLanes), change[v]);
    }
    const Vector decays = broadcast(decay), betas = broadcast(beta);
    for (int v = 0; v < kVectors; ++v)
      change[v] = multiply(subtract(read(value + column + v * kLanes), multiply(change[v], decays)), betas);
    float* to = state + column;
    for (int64_t i = 0; i < a.key_dim; ++i, to += a.value_dim) {
      const Vector weight = broadcast(key[i]), reader = broadcast(query[i]);
      for (int v = 0; v < kVectors; ++v) {
        const Vector now = multiply_add(weight, change[v], multiply(decays, read(to + v * kLanes)));
        if (kWhole) {
          store(to + v * kLanes, now);
        } else {
          store_some(to + v * kLanes, now, count);
        }
        output[v] = multiply_add(reader, now, output[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) store_some(read_ + column + v * kLanes, output[v], count);
  }

  // RMSNorm of what was read, times SiLU of the gate; rounded where transformers rounds.
  void write_output(const T* gate, T* output) const {
    Vector squares = zero();
    for_each_vector(a.value_dim, [&](int64_t i, int count) {
      const Vector x = rounded(load_some(read_ + i, count), gate);
      store_some(read_ + i, x, count);
      squares = multiply_add(x, x, squares);
    });
    const Vector scale = broadcast(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(a.value_dim) + a.epsilon));
    for_each_vector(a.value_dim, [&](int64_t i, int count) {
      const Vector unit = rounded(multiply(load_some(read_ + i, count), scale), gate);
      const Vector weighted = rounded(multiply(unit, load_some(a.norm_weight + i, count)), gate);
      store_some(output + i, multiply(weighted, silu(load_some(gate + i, count))), count);
    });
  }

  const DeltaNetArguments& a;
  const int64_t row_, head_, group_;
  int64_t channels_[3], sizes_[3], inputs_[3];  // of queries, keys and values
  int64_t gate_, num_channels_, num_all_channels_, num_taps_;
  float *history_, *mixed_, *read_;  // [taps, channels], [channels], [value_dim]
};

template <class T>
void run_heads(const DeltaNetArguments& a) {
  const int64_t num_tokens = a.query_start_loc[a.num_rows];
  const int64_t cost = 2 * num_tokens * a.num_value_heads * a.key_dim * a.value_dim;
  parallel_for_dynamic(a.num_threads, a.num_rows * a.num_key_heads, cost, [&](int64_t task) {
    static thread_local Scratch scratch;
    HeadOfRow<T>(a, task / a.num_key_heads, task % a.num_key_heads, scratch).run();
  });
}

}  // namespace

void delta_net(const DeltaNetArguments& a) {
  switch (a.dtype) {
    case DType::kFloat32:
      return run_heads<float>(a);
    case DType::kBFloat16:
      return run_heads<BFloat16>(a);
    case DType::kHalf:
      return run_heads<Half>(a);
  }
}

}  // namespace pagoda::PAGODA_ISA
