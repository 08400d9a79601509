// An encoder, embeddings included, as one operator, for a single rank.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

#include <optional>
#include <string>
#include <vector>

#include "decoder.h"

namespace pagoda {

using OptionalTensor = std::optional<at::Tensor>;

struct LayerNormWeights {
  OptionalTensor weight, bias;  // without a weight there is no norm
};

struct EncoderLayer {
  LayerNormWeights attention_norm, mlp_norm;
  PackedLinear qkv, output, up, down;
  int64_t window = 0;
  int64_t rotary = -1;  // which of the angles given to `forward`; -1: none
};

// See KernelBackend.encoder (pagoda_kernels): what the arguments are is documented there.
class Encoder : public torch::CustomClassHolder {
 public:
  Encoder(int64_t num_heads, int64_t head_dim, int64_t intermediate_size, double epsilon, bool norm_first, bool gated,
          const std::string& activation);

  void set_embedding(const at::Tensor& words, const OptionalTensor& positions, const OptionalTensor& types,
                     const OptionalTensor& norm, const OptionalTensor& norm_bias);
  void set_relative_bias(const at::Tensor& bias);
  void set_final_norm(const at::Tensor& norm, const OptionalTensor& norm_bias);
  void add_layer(const OptionalTensor& attention_norm, const OptionalTensor& attention_norm_bias,
                 const OptionalTensor& mlp_norm, const OptionalTensor& mlp_norm_bias, const PackedLinearTuple& qkv,
                 const PackedLinearTuple& output, const PackedLinearTuple& up, const PackedLinearTuple& down,
                 int64_t window, int64_t rotary);

  at::Tensor forward(const at::Tensor& input_ids, const at::Tensor& positions, const OptionalTensor& type_ids,
                     const at::Tensor& query_start_loc, const std::vector<at::Tensor>& cosines,
                     const std::vector<at::Tensor>& sines) const;

 private:
  void check_norm(const LayerNormWeights& norm) const;

  int64_t num_heads_, head_dim_, intermediate_size_;
  float epsilon_;
  bool norm_first_, gated_;
  Activation activation_;
  at::Tensor words_;
  OptionalTensor positions_, types_, relative_bias_;
  LayerNormWeights embedding_norm_, final_norm_;
  std::vector<EncoderLayer> layers_;
};

}  // namespace pagoda
