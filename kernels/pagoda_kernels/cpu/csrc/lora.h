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
  // Steps of so many rows, none of which has an adapter.
  void expect(int64_t num_tokens);

  int64_t num_tokens() const { return static_cast<int64_t>(slots_.size()); }
  int32_t slot_of(int64_t token) const { return slots_[static_cast<size_t>(token)]; }
  const std::vector<Group>& groups() const { return groups_; }
  const std::vector<int32_t>& rows() const { return rows_; }

 private:
  void group();

  std::vector<int32_t> slots_;  // by token
  std::vector<Group> groups_;
  std::vector<int32_t> rows_;  // of all groups, group after group

  friend class LoraLinear;
};

// Rows of one adapter of one layer: `rows` of x and output, `first_row` and on among the rows of all adapters.
struct LoraRows {
  const LoraAdapter* adapter;
  const int32_t* rows;
  int64_t first_row, num_rows;
};

// What the adapters of `groups`, all for layers of these sizes, add to rows of `output`. `num_rows`: of all groups.
void add_lora(const std::vector<LoraRows>& groups, int64_t num_rows, int64_t in_features, int64_t out_features, DType dtype,
              const void* x, DType output_dtype, void* output);

// The adapters of one linear layer, or of several that are fused: see KernelBackend.lora_linear (pagoda_kernels).
class LoraLinear : public torch::CustomClassHolder {
 public:
  LoraLinear(c10::intrusive_ptr<LoraBatch> batch, int64_t in_features, int64_t out_features);

  void set(int64_t slot, const at::Tensor& a, const std::vector<at::Tensor>& b, const std::vector<int64_t>& columns,
           const std::vector<int64_t>& widths, const std::vector<double>& scales);
  void clear(int64_t slot);
  // `rows`: int64, of each row of x which one of the step it is; none: all of them, in order.
  void add(const at::Tensor& x, const at::Tensor& output, const std::optional<at::Tensor>& rows) const;
  // The same for all `num_rows` rows of the step at these addresses.
  void add(DType dtype, const void* x, DType output_dtype, void* output, int64_t num_rows) const;

  const c10::intrusive_ptr<LoraBatch>& batch() const { return batch_; }
  // The adapter in a slot; null: none, or it has nothing for this layer.
  const LoraAdapter* find(int64_t slot) const;

 private:
  void add(const LoraBatch& batch, DType dtype, const void* x, DType output_dtype, void* output) const;

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
