// A mixture of experts as one operator: router, experts grouped by the rows that chose them, the shared expert, the weighted sum.
#pragma once

#include <torch/custom_class.h>

#include "lora.h"
#include "packed_linear.h"

namespace pagoda {

// As RouterConfig (pagoda/models/layer_config.py) describes it.
enum class Scoring : int64_t { kSoftmax, kSigmoid, kSoftmaxOfChosen };

struct GatedExpert {
  PackedLinear gate_up, down;
  c10::intrusive_ptr<LoraLinear> lora_gate_up{}, lora_down{};  // null where there are no adapters
};

class Experts : public torch::CustomClassHolder {
 public:
  Experts(const PackedLinearTuple& router, const std::optional<at::Tensor>& correction_bias, int64_t top_k, int64_t scoring,
          bool normalize, double scaling, int64_t num_groups, int64_t top_groups, int64_t group_members,
          int64_t activation);

  void add_expert(const PackedLinearTuple& gate_up, const PackedLinearTuple& down);
  void set_shared(const PackedLinearTuple& gate_up, const PackedLinearTuple& down,
                  const std::optional<PackedLinearTuple>& gate);

  // Those that were added are experts `first` and the following ones; others are on other ranks, and add nothing here.
  void set_first_expert(int64_t first);
  // int64 [experts], to which every `forward` adds how many rows chose each.
  void set_load(const at::Tensor& load);

  // What adapters add to the products of the expert that was added as number `index`, and of the shared one.
  void set_lora(int64_t index, const c10::intrusive_ptr<LoraLinear>& gate_up, const c10::intrusive_ptr<LoraLinear>& down);
  void set_shared_lora(const c10::intrusive_ptr<LoraLinear>& gate_up, const c10::intrusive_ptr<LoraLinear>& down);

  // x [T, hidden_size] to the same shape and dtype.
  at::Tensor forward(const at::Tensor& x) const;

 private:
  void choose(float* logits, float* weights, int32_t* ids) const;
  at::Tensor run_shared(const at::Tensor& x) const;
  void add_lora_of_experts(const std::vector<int32_t>& ids, const std::vector<int64_t>& places, const at::Tensor& x,
                           const at::Tensor& output, bool is_down) const;

  PackedLinear router_;
  std::optional<at::Tensor> correction_bias_;
  int64_t top_k_;
  Scoring scoring_;
  bool normalize_;
  float scaling_;
  int64_t num_groups_, top_groups_, group_members_;
  Activation activation_;
  std::vector<GatedExpert> experts_;
  int64_t first_expert_ = 0;
  bool is_part_ = false;
  std::optional<at::Tensor> load_;
  std::optional<GatedExpert> shared_;
  std::optional<PackedLinear> shared_gate_;
  c10::intrusive_ptr<LoraBatch> lora_batch_;  // null where there are no adapters
};

}  // namespace pagoda
