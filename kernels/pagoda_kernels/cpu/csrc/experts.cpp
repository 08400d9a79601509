#include "experts.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "checks.h"
#include "dispatch.h"

namespace pagoda {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

void softmax(float* values, int64_t size) {
  const float greatest = *std::max_element(values, values + size);
  float total = 0.0f;
  for (int64_t i = 0; i < size; ++i) total += values[i] = std::exp(values[i] - greatest);
  for (int64_t i = 0; i < size; ++i) values[i] /= total;
}

// The `count` best of `scores`, best first, of equal ones the first; `scores` are lost.
void take_best(float* scores, int64_t size, int64_t count, int32_t* ids) {
  for (int64_t k = 0; k < count; ++k) {
    ids[k] = static_cast<int32_t>(std::max_element(scores, scores + size) - scores);
    scores[ids[k]] = kMinusInfinity;
  }
}

at::Tensor activated(const at::Tensor& gate_up, Activation activation) {
  at::Tensor output = at::empty({gate_up.size(0), gate_up.size(1) / 2}, gate_up.options());
  GatedActivationArguments g{};
  g.dtype = dtype_of(gate_up);
  g.activation = activation;
  g.x = gate_up.const_data_ptr();
  g.output = output.mutable_data_ptr();
  g.num_rows = gate_up.size(0);
  g.size = output.size(1);
  g.num_threads = at::get_num_threads();
  active_kernels().gated_activation(g);
  return output;
}

// Products with the weights of some experts, whose rows follow each other in `x` and in what is returned, of `type`.
at::Tensor multiply_group(const std::vector<const PackedLinear*>& linears, const std::vector<int64_t>& counts,
                          const at::Tensor& x, at::ScalarType type) {
  const int64_t outputs = linears[0]->out_features, inputs = x.size(1);
  at::Tensor output = at::empty({x.size(0), outputs}, x.options().dtype(type));
  const DType dtype = dtype_of(x), output_dtype = dtype_of(output);
  std::vector<LinearArguments> products;
  products.reserve(linears.size());
  int64_t row = 0;
  for (size_t index = 0; index < linears.size(); row += counts[index++]) {
    const char* from = static_cast<const char*>(x.const_data_ptr()) + row * inputs * size_of(dtype);
    char* to = static_cast<char*>(output.mutable_data_ptr()) + row * outputs * size_of(output_dtype);
    products.push_back(linears[index]->arguments(dtype, from, counts[index], inputs, to));
    products.back().output_dtype = output_dtype;
  }
  // Experts are packed alike; where one has a value that bfloat16 does not hold, it is of another kind.
  for (size_t first = 0; first < products.size();) {
    size_t last = first + 1;
    const auto is_alike = [&](const LinearArguments& other) {
      return other.kind == products[first].kind && other.scale_dtype == products[first].scale_dtype &&
             (other.block_scales == nullptr) == (products[first].block_scales == nullptr);
    };
    while (last < products.size() && is_alike(products[last])) ++last;
    const Kernels& kernels = active_kernels();
    (products[first].scales != nullptr ? kernels.linear_quantized : kernels.linear)(&products[first],
                                                                                 static_cast<int64_t>(last - first));
    first = last;
  }
  return output;
}

template <class T>
void write_sums(const at::Tensor& outputs, const std::vector<int64_t>& places, const std::vector<float>& weights,
                int64_t top_k, const std::optional<at::Tensor>& shared, const std::optional<at::Tensor>& gate,
                at::Tensor& into) {
  const int64_t tokens = into.size(0), hidden = into.size(1);
  const float* from = outputs.const_data_ptr<float>();
  const float* of_shared = shared ? shared->const_data_ptr<float>() : nullptr;
  const float* gates = gate ? gate->const_data_ptr<float>() : nullptr;
  T* const to = into.mutable_data_ptr<T>();
  at::parallel_for(0, tokens, 16, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(static_cast<size_t>(hidden));
    for (int64_t t = begin; t < end; ++t) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t k = 0; k < top_k; ++k) {
        if (places[static_cast<size_t>(t * top_k + k)] < 0) continue;
        const float weight = weights[static_cast<size_t>(t * top_k + k)];
        const float* row = from + places[static_cast<size_t>(t * top_k + k)] * hidden;
        for (int64_t i = 0; i < hidden; ++i) sums[static_cast<size_t>(i)] += weight * row[i];
      }
      if (of_shared != nullptr) {
        const float weight = gates != nullptr ? sigmoid(gates[t]) : 1.0f;
        for (int64_t i = 0; i < hidden; ++i) sums[static_cast<size_t>(i)] += weight * of_shared[t * hidden + i];
      }
      for (int64_t i = 0; i < hidden; ++i) to[t * hidden + i] = static_cast<T>(sums[static_cast<size_t>(i)]);
    }
  });
}

}  // namespace

Experts::Experts(const PackedLinearTuple& router, const std::optional<at::Tensor>& correction_bias, int64_t top_k,
                 int64_t scoring, bool normalize, double scaling, int64_t num_groups, int64_t top_groups,
                 int64_t group_members, int64_t activation)
    : router_(unpack_linear(router)),
      correction_bias_(correction_bias),
      top_k_(top_k),
      scoring_(static_cast<Scoring>(scoring)),
      normalize_(normalize),
      scaling_(static_cast<float>(scaling)),
      num_groups_(num_groups),
      top_groups_(top_groups),
      group_members_(group_members),
      activation_(gated_activation_of(activation)) {
  const int64_t experts = router_.out_features;
  TORCH_CHECK(top_k > 0 && top_k <= experts && num_groups > 0 && experts % num_groups == 0 && group_members > 0 &&
                  (num_groups == 1 || group_members <= experts / num_groups),
              "top_k ", top_k, " of ", experts, " experts in ", num_groups, " groups, compared by their ", group_members,
              " best, is not possible");
  if (correction_bias_) check(*correction_bias_, "correction_bias", {experts}, at::kFloat);
}

void Experts::add_expert(const PackedLinearTuple& gate_up, const PackedLinearTuple& down) {
  experts_.push_back({unpack_linear(gate_up), unpack_linear(down)});
  TORCH_CHECK(experts_.back().gate_up.out_features == experts_.front().gate_up.out_features &&
                  experts_.back().down.out_features == experts_.front().down.out_features,
              "the experts' sizes differ");
}

void Experts::set_shared(const PackedLinearTuple& gate_up, const PackedLinearTuple& down,
                         const std::optional<PackedLinearTuple>& gate) {
  shared_ = GatedExpert{unpack_linear(gate_up), unpack_linear(down)};
  if (gate) shared_gate_ = unpack_linear(*gate);
}

void Experts::set_first_expert(int64_t first) {
  TORCH_CHECK(first >= 0 && first <= router_.out_features, "there is no expert ", first, " of ", router_.out_features);
  first_expert_ = first;
  is_part_ = true;
}

void Experts::set_load(const at::Tensor& load) {
  check(load, "load", {router_.out_features}, at::kLong);
  load_ = load;
}

void Experts::set_lora(int64_t index, const c10::intrusive_ptr<LoraLinear>& gate_up, const c10::intrusive_ptr<LoraLinear>& down) {
  TORCH_CHECK(index >= 0 && index < static_cast<int64_t>(experts_.size()), "there is no expert ", index);
  GatedExpert& expert = experts_[static_cast<size_t>(index)];
  expert.lora_gate_up = gate_up;
  expert.lora_down = down;
  lora_batch_ = gate_up->batch();
}

void Experts::set_shared_lora(const c10::intrusive_ptr<LoraLinear>& gate_up, const c10::intrusive_ptr<LoraLinear>& down) {
  TORCH_CHECK(shared_, "there is no shared expert");
  shared_->lora_gate_up = gate_up;
  shared_->lora_down = down;
}

// `x`, `output`: rows by expert, at `places`. An expert's rows of one adapter are a group.
void Experts::add_lora_of_experts(const std::vector<int32_t>& ids, const std::vector<int64_t>& places, const at::Tensor& x,
                                  const at::Tensor& output, bool is_down) const {
  struct Pair {
    const LoraAdapter* adapter;  // of one expert's layer
    int32_t place;
  };
  std::vector<Pair> pairs;
  for (size_t row = 0; row < places.size(); ++row) {
    const int32_t slot = places[row] < 0 ? -1 : lora_batch_->slot_of(static_cast<int64_t>(row) / top_k_);
    if (slot < 0) continue;
    const GatedExpert& expert = experts_[static_cast<size_t>(ids[row] - first_expert_)];
    const LoraAdapter* const adapter = (is_down ? expert.lora_down : expert.lora_gate_up)->find(slot);
    if (adapter != nullptr) pairs.push_back({adapter, static_cast<int32_t>(places[row])});
  }
  std::sort(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) {
    return std::less<const LoraAdapter*>()(a.adapter, b.adapter) || (a.adapter == b.adapter && a.place < b.place);
  });
  std::vector<int32_t> rows;
  rows.reserve(pairs.size());
  for (const Pair& pair : pairs) rows.push_back(pair.place);
  std::vector<LoraRows> groups;
  for (size_t at = 0; at < pairs.size(); ++at) {
    if (at == 0 || pairs[at].adapter != pairs[at - 1].adapter)
      groups.push_back({pairs[at].adapter, rows.data() + at, static_cast<int64_t>(at), 0});
    ++groups.back().num_rows;
  }
  add_lora(groups, static_cast<int64_t>(rows.size()), x.size(1), output.size(1), dtype_of(x), x.const_data_ptr(),
           dtype_of(output), output.mutable_data_ptr());
}

void Experts::choose(float* logits, float* weights, int32_t* ids) const {
  const int64_t experts = router_.out_features;
  std::vector<float> scores(logits, logits + experts);
  if (scoring_ == Scoring::kSoftmaxOfChosen) {
    take_best(scores.data(), experts, top_k_, ids);
    for (int64_t k = 0; k < top_k_; ++k) weights[k] = logits[ids[k]];
    softmax(weights, top_k_);
    return;
  }
  if (scoring_ == Scoring::kSoftmax) {
    softmax(scores.data(), experts);
  } else {
    for (float& score : scores) score = sigmoid(score);
  }
  std::vector<float> compared = scores;
  if (correction_bias_) {
    const float* bias = correction_bias_->const_data_ptr<float>();
    for (int64_t e = 0; e < experts; ++e) compared[static_cast<size_t>(e)] += bias[e];
  }
  if (num_groups_ > 1) {
    const int64_t size = experts / num_groups_;
    std::vector<float> of_groups(static_cast<size_t>(num_groups_)), group;
    for (int64_t g = 0; g < num_groups_; ++g) {
      group.assign(compared.begin() + g * size, compared.begin() + (g + 1) * size);
      std::partial_sort(group.begin(), group.begin() + group_members_, group.end(), std::greater<float>());
      of_groups[static_cast<size_t>(g)] = std::accumulate(group.begin(), group.begin() + group_members_, 0.0f);
    }
    std::vector<int32_t> best(static_cast<size_t>(top_groups_));
    take_best(of_groups.data(), num_groups_, top_groups_, best.data());
    for (int64_t g = 0; g < num_groups_; ++g) {
      if (std::find(best.begin(), best.end(), g) == best.end())
        std::fill(compared.begin() + g * size, compared.begin() + (g + 1) * size, kMinusInfinity);
    }
  }
  take_best(compared.data(), experts, top_k_, ids);
  float total = 1e-20f;
  for (int64_t k = 0; k < top_k_; ++k) total += weights[k] = scores[static_cast<size_t>(ids[k])];
  for (int64_t k = 0; k < top_k_; ++k) weights[k] = (normalize_ ? weights[k] / total : weights[k]) * scaling_;
}

at::Tensor Experts::run_shared(const at::Tensor& x) const {
  const std::vector<int64_t> all = {x.size(0)};
  const at::Tensor gate_up = multiply_group({&shared_->gate_up}, all, x, x.scalar_type());
  if (shared_->lora_gate_up) shared_->lora_gate_up->add(x, gate_up, std::nullopt);
  const at::Tensor units = activated(gate_up, activation_);
  at::Tensor output = multiply_group({&shared_->down}, all, units, at::kFloat);
  if (shared_->lora_down) shared_->lora_down->add(units, output, std::nullopt);
  return output;
}

at::Tensor Experts::forward(const at::Tensor& x) const {
  const int64_t own = static_cast<int64_t>(experts_.size());
  TORCH_CHECK(is_part_ ? first_expert_ + own <= router_.out_features : own == router_.out_features, own,
              " experts are there, from ", first_expert_, " on, of ", router_.out_features);
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16),
              "x must be a contiguous float32 or bfloat16 [rows, hidden_size]");
  const int64_t tokens = x.size(0), hidden = x.size(1), experts = router_.out_features, rows = tokens * top_k_;
  at::Tensor output = at::empty(x.sizes(), x.options());
  if (tokens == 0) return output;

  at::Tensor logits = multiply_group({&router_}, {tokens}, x, at::kFloat);
  std::vector<float> weights(static_cast<size_t>(rows));
  std::vector<int32_t> ids(static_cast<size_t>(rows));
  float* const logit = logits.mutable_data_ptr<float>();
  at::parallel_for(0, tokens, 32, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) choose(logit + t * experts, &weights[t * top_k_], &ids[t * top_k_]);
  });

  if (load_) {
    int64_t* const load = load_->mutable_data_ptr<int64_t>();
    for (const int32_t id : ids) ++load[id];
  }
  // Rows by expert, in the order of tokens: those of expert e are counts[e] ones from first[e] on. A row whose expert is on
  // another rank has no place.
  std::vector<int64_t> first(static_cast<size_t>(own) + 1, 0), places(static_cast<size_t>(rows), -1);
  const auto own_expert = [&](int32_t id) { return id >= first_expert_ && id < first_expert_ + own ? id - first_expert_ : -1; };
  for (const int32_t id : ids) {
    if (own_expert(id) >= 0) ++first[static_cast<size_t>(own_expert(id)) + 1];
  }
  std::vector<const PackedLinear*> gate_ups, downs;
  std::vector<int64_t> counts;
  for (int64_t e = 0; e < own; ++e) {
    const int64_t count = first[static_cast<size_t>(e) + 1];
    if (count > 0) {
      gate_ups.push_back(&experts_[static_cast<size_t>(e)].gate_up);
      downs.push_back(&experts_[static_cast<size_t>(e)].down);
      counts.push_back(count);
    }
    first[static_cast<size_t>(e) + 1] += first[static_cast<size_t>(e)];
  }
  const int64_t own_rows = first.back();
  for (size_t row = 0; row < places.size(); ++row) {
    if (own_expert(ids[row]) >= 0) places[row] = first[static_cast<size_t>(own_expert(ids[row]))]++;
  }

  const at::Tensor grouped = at::empty({own_rows, hidden}, x.options());
  const int64_t row_bytes = hidden * x.element_size();
  const char* const from = static_cast<const char*>(x.const_data_ptr());
  char* const to = static_cast<char*>(grouped.mutable_data_ptr());
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (places[static_cast<size_t>(row)] < 0) continue;
      __builtin_memcpy(to + places[static_cast<size_t>(row)] * row_bytes, from + row / top_k_ * row_bytes, row_bytes);
    }
  });

  at::Tensor outputs;
  if (own_rows > 0) {
    const bool has_lora = lora_batch_ && !lora_batch_->groups().empty();
    TORCH_CHECK(!has_lora || lora_batch_->num_tokens() == tokens, "the step's adapters are set for ", lora_batch_->num_tokens(),
                " rows, not ", tokens);
    const at::Tensor gate_up = multiply_group(gate_ups, counts, grouped, x.scalar_type());
    if (has_lora) add_lora_of_experts(ids, places, grouped, gate_up, false);
    const at::Tensor units = activated(gate_up, activation_);
    outputs = multiply_group(downs, counts, units, at::kFloat);
    if (has_lora) add_lora_of_experts(ids, places, units, outputs, true);
  } else {
    outputs = at::empty({0, hidden}, x.options().dtype(at::kFloat));
  }
  std::optional<at::Tensor> shared, gate;
  if (shared_) shared = run_shared(x);
  if (shared_gate_) gate = multiply_group({&*shared_gate_}, {tokens}, x, at::kFloat);
  if (x.scalar_type() == at::kFloat) {
    write_sums<float>(outputs, places, weights, top_k_, shared, gate, output);
  } else {
    write_sums<at::BFloat16>(outputs, places, weights, top_k_, shared, gate, output);
  }
  return output;
}

}  // namespace pagoda
