// Attention over paged keys and values, one kernel for decoding and for prompts of any chunking.
//
// A unit is a tile of query tokens of one request with all query heads of one KV head: every key that is read serves them all.
// Its keys are walked in segments of kSegmentKeys, those in tiles of kTileKeys, both counted from the request's first token:
//
//     positions  0 ............ 511 │ 512 ........... 1023 │ 1024 ...      segment: softmax state of its own, merged in order
//                64│64│64│ ...      │ 64│64│ ...           │               tile: scores, online softmax, values
//
// What a query sees is thus cut up by its own position and window alone, and the arithmetic on a key that it does not see is
// exactly nothing. Its result has the same bits whether it is decoded or prefilled, in whatever chunks, batch and threads.
// Where there are fewer units than threads can use, the segments of a unit are computed side by side.

#include "cache_tiles.h"
#include "parallel.h"
#include "scratch.h"

namespace pagoda::PAGODA_ISA {
namespace {

constexpr int64_t kSegmentKeys = 512;
constexpr int64_t kUnitRows = 96;  // query tokens times query heads of a KV head that a unit aims at
constexpr int64_t kFewRows = 8;    // up to which values are multiplied where they are in the cache, not copied first
constexpr float kMinusInfinity = -__builtin_inff();

struct Unit {
  int32_t row;          // of the batch
  int32_t kv_head;
  int32_t first_query;  // token of the batch
  int32_t num_queries;
};

// Running softmax of `num_rows` query rows: greatest score, sum of weights, weighted sum of values.
struct State {
  float* greatest;  // [num_rows]
  float* total;     // [num_rows]
  float* values;    // [num_rows][padded_dim]
};

// A unit's view of its request.
struct Span {
  int64_t num_rows;        // query rows: queries times group
  int64_t first_position;  // of the first query
  int64_t begin, end;      // keys that any query sees
};

template <class T>
class Attention {
 public:
  explicit Attention(const AttentionArguments& arguments)
      : a_(arguments),
        tiles_(arguments),
        group_(arguments.num_heads / arguments.num_kv_heads),
        padded_dim_(tiles_.padded_dim()),
        score_steps_(tiles_.score_steps()),
        queries_per_unit_(larger<int64_t>(1, kUnitRows / group_)) {}

  void run() {
    static thread_local Scratch unit_scratch;
    const int64_t num_units = count_units();
    Unit* units = static_cast<Unit*>(unit_scratch.get(num_units * static_cast<int64_t>(sizeof(Unit))));
    const int64_t cost = list_units(units);
    const int64_t segments = ceil_div(longest(units, num_units), kSegmentKeys);
    if (segments > 1 && a_.num_threads > 1 && num_units < 2 * a_.num_threads) {
      run_split(units, num_units, segments, cost);
      return;
    }
    parallel_for_dynamic(a_.num_threads, num_units, cost, [&](int64_t index) {
      Work work = work_of_thread();
      const Unit& unit = units[index];
      const Span span = span_of(unit);
      load_queries(unit, work);
      clear(work.state, span.num_rows);
      for (int64_t s = span.begin / kSegmentKeys; s * kSegmentKeys < span.end; ++s) {
        attend_segment(unit, index + 1 < num_units ? &units[index + 1] : nullptr, span, s, work);
        merge(work.segment, work.state, span.num_rows);
      }
      write_output(unit, span.num_rows, work.state);
    });
  }

 private:
  using Format = pagoda::PAGODA_ISA::Format<T>;
  using Dot = typename Format::Dot;
  using Element = typename Format::Element;
  static constexpr int64_t kPair = Format::kPair;

  struct Work {
    Element* queries;  // [rows][score_steps]
    Element* keys;     // [score_steps][kTileKeys]
    Element* values;   // [kTileKeys / kPair][padded_dim]
    float* scores;     // [rows][kTileKeys]
    Element* weights;  // [rows][kTileKeys / kPair]; the scores themselves in float32
    State segment;
    State state;
  };

  Work lay_out(Pieces& pieces) const {
    const int64_t rows = queries_per_unit_ * group_;
    Work work;
    work.queries = pieces.take<Element>(rows * score_steps_);
    work.keys = pieces.take<Element>(score_steps_ * kTileKeys);
    work.values = pieces.take<Element>(kTileKeys / kPair * padded_dim_);
    work.scores = pieces.take<float>(rows * kTileKeys);
    work.weights = pieces.take<Element>(kPair == 1 ? 0 : rows * kTileKeys / kPair);
    work.segment = lay_out_state(pieces, rows);
    work.state = lay_out_state(pieces, rows);
    return work;
  }

  State lay_out_state(Pieces& pieces, int64_t rows) const {
    return State{pieces.take<float>(rows), pieces.take<float>(rows), pieces.take<float>(rows * padded_dim_)};
  }

  Work work_of_thread() const {
    static thread_local Scratch scratch;
    Pieces sizes(nullptr);
    lay_out(sizes);
    Pieces pieces(scratch.get(sizes.used()));
    return lay_out(pieces);
  }

  int64_t count_units() const {
    int64_t count = 0;
    for (int64_t row = 0; row < a_.num_rows; ++row)
      count += ceil_div(a_.query_start_loc[row + 1] - a_.query_start_loc[row], queries_per_unit_);
    return count * a_.num_kv_heads;
  }

  // Fills `units`, a request's last tiles, which see most keys, first. Returns what the whole costs, see kForkCost.
  int64_t list_units(Unit* units) const {
    int64_t count = 0, cost = 0;
    for (int64_t row = 0; row < a_.num_rows; ++row) {
      const int32_t begin = a_.query_start_loc[row], queries = a_.query_start_loc[row + 1] - begin;
      for (int64_t tile = ceil_div(queries, queries_per_unit_) - 1; tile >= 0; --tile) {
        const int32_t first = static_cast<int32_t>(tile * queries_per_unit_);
        const int32_t taken = static_cast<int32_t>(smaller<int64_t>(queries_per_unit_, queries - first));
        for (int32_t head = 0; head < a_.num_kv_heads; ++head) {
          units[count] = Unit{static_cast<int32_t>(row), head, begin + first, taken};
          const Span span = span_of(units[count++]);
          const int64_t elements = (span.end - span.begin) * a_.head_dim, bytes = 2 * elements * size_of(a_.dtype);
          cost += larger(bytes, elements * (8 + 2 * span.num_rows) / kLanes);
        }
      }
    }
    return cost;
  }

  int64_t longest(const Unit* units, int64_t num_units) const {
    int64_t keys = 0;
    for (int64_t index = 0; index < num_units; ++index) {
      const Span span = span_of(units[index]);
      keys = larger(keys, span.end - span.begin / kSegmentKeys * kSegmentKeys);
    }
    return keys;
  }

  Span span_of(const Unit& unit) const {
    const int64_t row_end = a_.query_start_loc[unit.row + 1];
    const int64_t first_position = a_.seq_lens[unit.row] - row_end + unit.first_query;
    int64_t begin = 0;
    if (a_.sliding_window > 0) begin = larger<int64_t>(0, first_position - a_.sliding_window + 1);
    return Span{unit.num_queries * group_, first_position, begin, first_position + unit.num_queries};
  }

  // Few units with long contexts: every (unit, segment) is a task that leaves its state, then all are merged in order.
  void run_split(const Unit* units, int64_t num_units, int64_t segments, int64_t cost) const {
    static thread_local Scratch scratch;
    const int64_t rows = queries_per_unit_ * group_;
    Pieces sizes(nullptr);
    lay_out_state(sizes, rows);
    const int64_t state_bytes = sizes.used();
    char* states = static_cast<char*>(scratch.get(num_units * segments * state_bytes));
    const auto state_of = [&](int64_t task) {
      Pieces pieces(states + task * state_bytes);
      return lay_out_state(pieces, rows);
    };
    parallel_for_dynamic(a_.num_threads, num_units * segments, cost, [&](int64_t task) {
      const Unit& unit = units[task / segments];
      const Span span = span_of(unit);
      Work work = work_of_thread();
      load_queries(unit, work);
      work.segment = state_of(task);
      attend_segment(unit, nullptr, span, span.begin / kSegmentKeys + task % segments, work);
    });
    parallel_for(a_.num_threads, num_units, num_units * segments * rows * padded_dim_, [&](int64_t index) {
      Work work = work_of_thread();
      const Span span = span_of(units[index]);
      clear(work.state, span.num_rows);
      for (int64_t s = 0; s < segments; ++s) merge(state_of(index * segments + s), work.state, span.num_rows);
      write_output(units[index], span.num_rows, work.state);
    });
  }

  void clear(const State& state, int64_t num_rows) const {
    for (int64_t r = 0; r < num_rows; ++r) {
      state.greatest[r] = kMinusInfinity;
      state.total[r] = 0.0f;
    }
    for (int64_t i = 0; i < num_rows * padded_dim_; i += kLanes) store(state.values + i, zero());
  }

  // Adds what a segment found to what the segments before it have found.
  void merge(const State& from, const State& into, int64_t num_rows) const {
    for (int64_t r = 0; r < num_rows; ++r) {
      if (from.greatest[r] == kMinusInfinity) continue;
      const float greatest_of_both = larger(into.greatest[r], from.greatest[r]);
      const Vector keep = exponential(broadcast(into.greatest[r] - greatest_of_both));
      const Vector take = exponential(broadcast(from.greatest[r] - greatest_of_both));
      into.greatest[r] = greatest_of_both;
      into.total[r] = into.total[r] * lane0(keep) + from.total[r] * lane0(take);
      float* values = into.values + r * padded_dim_;
      const float* added = from.values + r * padded_dim_;
      for (int64_t d = 0; d < padded_dim_; d += kLanes)
        store(values + d, multiply_add(load(added + d), take, multiply(load(values + d), keep)));
    }
  }

  static float lane0(Vector a) {
    alignas(64) float lanes[kLanes];
    store(lanes, a);
    return lanes[0];
  }

  void load_queries(const Unit& unit, const Work& work) const {
    const T* query = static_cast<const T*>(a_.query);
    for (int64_t q = 0; q < unit.num_queries; ++q) {
      for (int64_t g = 0; g < group_; ++g) {
        const T* from = query + ((unit.first_query + q) * a_.num_heads + unit.kv_head * group_ + g) * a_.head_dim;
        copy_elements(from, work.queries + (q * group_ + g) * score_steps_);
      }
    }
  }

  void copy_elements(const T* from, float* to) const {
    for (int64_t d = 0; d < a_.head_dim; ++d) to[d] = to_float(from[d]);
  }
  void copy_elements(const T* from, uint32_t* to) const { __builtin_memcpy(to, from, a_.head_dim * sizeof(T)); }

  // `next_unit` is probably the thread's next one, or null.
  void attend_segment(const Unit& unit, const Unit* next_unit, const Span& span, int64_t segment,
                      const Work& work) const {
    clear(work.segment, span.num_rows);
    const int64_t begin = larger(segment * kSegmentKeys, span.begin / kTileKeys * kTileKeys);
    const int64_t end = smaller((segment + 1) * kSegmentKeys, span.end);
    for (int64_t key = begin; key < end; key += kTileKeys) {
      TileRows next;
      if (key + kTileKeys < span.end) {
        find_rows(unit, span, key + kTileKeys, next);
      } else if (next_unit != nullptr) {
        const Span next_span = span_of(*next_unit);
        find_rows(*next_unit, next_span, next_span.begin / kTileKeys * kTileKeys, next);
      } else {
        next.low = next.high = 0;
      }
      attend_tile(unit, span, key, next, work);
    }
  }

  void attend_tile(const Unit& unit, const Span& span, int64_t first_key, const TileRows& next,
                   const Work& work) const {
    TileRows rows;
    find_rows(unit, span, first_key, rows);
    const int64_t num_vectors = ceil_div(rows.high, kLanes);
    tiles_.load_keys(rows, next, work.keys);
    TileOperands<Dot> scores{score_steps_, work.queries, score_steps_, work.keys, kTileKeys,
                             kPanel,       work.scores,  kTileKeys,    false};
    multiply_matrix<Dot>(span.num_rows, num_vectors, scores, true);
    for (int64_t r = 0; r < span.num_rows; ++r) softmax_row(span, r, first_key, num_vectors, work);
    if constexpr (kPair == 1) {
      if (span.num_rows <= kFewRows && a_.value_dim == padded_dim_) {
        add_values_in_place(span, first_key, rows, work);
        return;
      }
    }
    tiles_.load_values(rows, work.values);
    add_values<Dot>(span, rows.low / kPair, ceil_div(rows.high, kPair), work.values, padded_dim_, work);
  }

  // Adds the values of steps first .. last - 1 of the tile, which begin at `values`' row `first`, by their weights. From row to
  // row they are `stride` elements apart.
  template <class ValueDot>
  void add_values(const Span& span, int64_t first, int64_t last, const typename ValueDot::B* values, int64_t stride,
                  const Work& work) const {
    TileOperands<ValueDot> operands{last - first,
                                    weights_of(work) + first,
                                    kTileKeys / kPair,
                                    values + first * stride,
                                    stride,
                                    kPanel,
                                    work.segment.values,
                                    padded_dim_,
                                    true};
    multiply_matrix<ValueDot>(span.num_rows, padded_dim_ / kLanes, operands, true);
  }

  // The same straight from the cache, block by block: within one, a key's values follow those of the key before.
  void add_values_in_place(const Span& span, int64_t first_key, const TileRows& rows, const Work& work) const {
    const T* values = static_cast<const T*>(a_.v_cache);
    for (int64_t t = rows.low; t < rows.high;) {
      const int64_t left = a_.block_size - (first_key + t) % a_.block_size;
      const int64_t end = smaller(rows.high, t + left);
      add_values<DotNarrow<T>>(span, t, end, values + rows.offsets[t] - t * a_.head_dim, a_.head_dim, work);
      t = end;
    }
  }

  static Element* weights_of(const Work& work) {
    if constexpr (kPair == 1) {
      return work.scores;
    } else {
      return work.weights;
    }
  }

  void find_rows(const Unit& unit, const Span& span, int64_t first_key, TileRows& rows) const {
    rows.low = larger<int64_t>(0, span.begin - first_key);
    rows.high = smaller(kTileKeys, span.end - first_key);
    tiles_.locate(unit.row, unit.kv_head, first_key, rows);
  }

  // Turns a row's scores into weights and brings its state up to date.
  void softmax_row(const Span& span, int64_t r, int64_t first_key, int64_t num_vectors, const Work& work) const {
    const int64_t position = span.first_position + r / group_;
    const int64_t seen_end = position + 1 - first_key;
    const int64_t seen_begin = a_.sliding_window > 0 ? position - a_.sliding_window + 1 - first_key : 0;
    float* scores = work.scores + r * kTileKeys;
    Vector greatest_lanes = broadcast(kMinusInfinity);
    for (int64_t v = 0; v < num_vectors; ++v) {
      Vector score = multiply(load(scores + v * kLanes), broadcast(a_.scale));
      if (a_.soft_cap > 0.0f) score = capped(score);
      score = where_lane_in(seen_begin - v * kLanes, seen_end - v * kLanes, score, broadcast(kMinusInfinity));
      store(scores + v * kLanes, score);
      greatest_lanes = maximum(greatest_lanes, score);
    }
    const float greatest_here = greatest(greatest_lanes);
    if (greatest_here == kMinusInfinity) {
      for (int64_t v = 0; v < num_vectors; ++v) store(scores + v * kLanes, zero());
      if constexpr (kPair == 2) pack_pairs(scores, work.weights + r * (kTileKeys / 2), num_vectors);
      return;
    }
    const State& state = work.segment;
    const float before = state.greatest[r], now = larger(before, greatest_here);
    Vector total = zero();
    for (int64_t v = 0; v < num_vectors; ++v) {
      const Vector weight = exponential(subtract(load(scores + v * kLanes), broadcast(now)));
      store(scores + v * kLanes, weight);
      total = add(total, weight);
    }
    if constexpr (kPair == 2) pack_pairs(scores, work.weights + r * (kTileKeys / 2), num_vectors);
    if (before != now) {
      const Vector keep = exponential(broadcast(before - now));
      state.greatest[r] = now;
      state.total[r] *= lane0(keep);
      float* values = state.values + r * padded_dim_;
      for (int64_t d = 0; d < padded_dim_; d += kLanes) store(values + d, multiply(load(values + d), keep));
    }
    state.total[r] += sum(total);
  }

  Vector capped(Vector score) const {
    // tanh(x) = 1 - 2 / (e^2x + 1)
    const Vector power = exponential(multiply(score, broadcast(2.0f / a_.soft_cap)));
    const Vector half = divide(broadcast(2.0f), add(power, broadcast(1.0f)));
    return multiply(subtract(broadcast(1.0f), half), broadcast(a_.soft_cap));
  }

  void write_output(const Unit& unit, int64_t num_rows, const State& state) const {
    T* output = static_cast<T*>(a_.output);
    for (int64_t r = 0; r < num_rows; ++r) {
      const int64_t token = unit.first_query + r / group_, head = unit.kv_head * group_ + r % group_;
      T* to = output + (token * a_.num_heads + head) * a_.value_dim;
      float weights = state.total[r];
      // A sink is one more weight in the sum. Where it is greater than all scores by far, what is left is 0 anyway.
      if (a_.sinks != nullptr) weights += lane0(exponential(broadcast(a_.sinks[head] - state.greatest[r])));
      const Vector total = broadcast(weights);
      const float* values = state.values + r * padded_dim_;
      int64_t d = 0;
      for (; d + kLanes <= a_.value_dim; d += kLanes) store(to + d, divide(load(values + d), total));
      if (d < a_.value_dim) store(to + d, divide(load(values + d), total), static_cast<int>(a_.value_dim - d));
    }
  }

  const AttentionArguments& a_;
  const CacheTiles<T> tiles_;
  const int64_t group_;
  const int64_t padded_dim_;
  const int64_t score_steps_;
  const int64_t queries_per_unit_;
};

}  // namespace

void attention(const AttentionArguments& arguments) {
  switch (arguments.dtype) {
    case DType::kFloat32:
      return Attention<float>(arguments).run();
    case DType::kBFloat16:
      return Attention<BFloat16>(arguments).run();
    case DType::kHalf:
      return Attention<Half>(arguments).run();
  }
}

}  // namespace pagoda::PAGODA_ISA
