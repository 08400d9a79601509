// Packed linear layers, as Python hands them over and as kernels are called with them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace pagoda {

// A packed linear layer: what the operators `linear` and `linear_quantized` take.
struct PackedLinear {
  at::Tensor weight;
  std::optional<at::Tensor> bias, scales, zeros, block_scales;
  int64_t out_features = 0;
  int64_t group_size = 0;
  bool four_bits = false;

  // Arguments for `num_rows` rows of `x` and an output in its dtype; checks that they fit the weight.
  LinearArguments arguments(DType dtype, const void* x, int64_t num_rows, int64_t in_features, void* output) const;
};

// weight, bias, scales, zeros, block_scales, out_features, group_size, four_bits: a PackedLinear as Python hands it over.
using PackedLinearTuple = std::tuple<at::Tensor, std::optional<at::Tensor>, std::optional<at::Tensor>,
                                     std::optional<at::Tensor>, std::optional<at::Tensor>, int64_t, int64_t, bool>;

void run_linear(const LinearArguments& arguments);

PackedLinear unpack_linear(const PackedLinearTuple& parts);

// As KernelBackend.fused_experts numbers them.
inline Activation gated_activation_of(int64_t number) {
  constexpr Activation kActivations[] = {Activation::kSilu, Activation::kGeluTanh, Activation::kClampedSwiglu};
  TORCH_CHECK(number >= 0 && number < 3, "there is no activation ", number);
  return kActivations[number];
}

}  // namespace pagoda
