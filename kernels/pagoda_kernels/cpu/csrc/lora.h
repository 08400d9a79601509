// Low-rank adapters (LoRA, Hu et al., 2021) of one linear layer: several at once, each for its own rows of a step.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

#include <optional>
#include <vector>

#include "kernels.h"

namespace pagoda {

// Which rows of the present step are whose. Shared by all layers of a model.
class LoraBatch : public torch::CustomClassHolder {
 public:
  struct Group {
    int64_t slot;
    int64_t first_row;  // among the rows of all groups
    int64_t num_rows;
  };

  // `slots` int32 [T]: of each row of the step the slot of its adapter, -1: none. Undefined: no row has an adapter.
  void set(const std::optional<at::Tensor>& slots);

  int64_t num_tokens() const { return num_tokens_; }
  const std::vector<Group>& groups() const { return groups_; }
  const std::vector<int32_t>& rows() const { return rows_; }

 private:
  int64_t num_tokens_ = 0;
  std::vector<Group> groups_;
  std::vector<int32_t> rows_;  // of all groups, group after group
};

// The adapters of one linear layer, or of several that are fused: see KernelBackend.lora_linear (pagoda_kernels).
class LoraLinear : public torch::CustomClassHolder {
 public:
  LoraLinear(c10::intrusive_ptr<LoraBatch> batch, int64_t in_features, int64_t out_features);

  void set(int64_t slot, const at::Tensor& a, const std::vector<at::Tensor>& b, const std::vector<int64_t>& columns,
           const std::vector<int64_t>& widths, const std::vector<double>& scales);
  void clear(int64_t slot);
  void add(const at::Tensor& x, const at::Tensor& output) const;
  // The same for `num_rows` rows at these addresses.
  void add(DType dtype, const void* x, void* output, int64_t num_rows) const;

 private:
  struct Adapter {
    at::Tensor a;
    std::vector<at::Tensor> b;
    std::vector<LoraPart> parts;
    LoraAdapter view;
  };

  c10::intrusive_ptr<LoraBatch> batch_;
  int64_t in_features_, out_features_;
  std::vector<std::optional<Adapter>> adapters_;  // by slot
};

}  // namespace pagoda
