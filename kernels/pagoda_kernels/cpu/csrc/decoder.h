// A decoder's whole stack of layers as one operator, for a single rank.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace pagoda {

// A packed linear layer: what the operators `linear` and `linear_quantized` take.
struct PackedLinear {
  at::Tensor weight;
  std::optional<at::Tensor> bias, scales, zeros;
  int64_t out_features = 0;
  int64_t group_size = 0;
  bool four_bits = false;

  // Arguments for `num_rows` rows of `x` and an output in its dtype; checks that they fit the weight.
  LinearArguments arguments(DType dtype, const void* x, int64_t num_rows, int64_t in_features, void* output) const;
};

// weight, bias, scales, zeros, out_features, group_size, four_bits: a PackedLinear as Python hands it over.
using PackedLinearTuple = std::tuple<at::Tensor, std::optional<at::Tensor>, std::optional<at::Tensor>,
                                     std::optional<at::Tensor>, int64_t, int64_t, bool>;

void run_linear(const LinearArguments& arguments);

struct DecoderLayer {
  at::Tensor input_norm, post_attention_norm;
  std::optional<at::Tensor> query_norm, key_norm;
  PackedLinear qkv, output, gate_up, down;
  int64_t sliding_window = 0;
};

class Decoder : public torch::CustomClassHolder {
 public:
  Decoder(int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t intermediate_size, double epsilon,
          at::Tensor final_norm)
      : num_heads_(num_heads),
        num_kv_heads_(num_kv_heads),
        head_dim_(head_dim),
        intermediate_size_(intermediate_size),
        epsilon_(static_cast<float>(epsilon)),
        final_norm_(std::move(final_norm)) {}

  void add_layer(const at::Tensor& input_norm, const at::Tensor& post_attention_norm,
                 const std::optional<at::Tensor>& query_norm, const std::optional<at::Tensor>& key_norm,
                 const PackedLinearTuple& qkv, const PackedLinearTuple& output, const PackedLinearTuple& gate_up,
                 const PackedLinearTuple& down, int64_t sliding_window);

  // Embeddings [T, hidden_size] to hidden states after the final norm. `k_caches` and `v_caches`: one a layer, written in place.
  at::Tensor forward(const at::Tensor& embedded, const at::Tensor& cosines, const at::Tensor& sines,
                     const std::vector<at::Tensor>& k_caches, const std::vector<at::Tensor>& v_caches,
                     const at::Tensor& query_start_loc, const at::Tensor& seq_lens, const at::Tensor& block_table,
                     const at::Tensor& slot_mapping);

 private:
  int64_t num_heads_, num_kv_heads_, head_dim_, intermediate_size_;
  float epsilon_;
  at::Tensor final_norm_;
  std::vector<DecoderLayer> layers_;
};

}  // namespace pagoda
