// A decoder's whole stack of layers as one operator, for a single rank.
#pragma once

#include "experts.h"
#include "lora.h"

namespace pagoda {

// A layer: attention and MLP, each with a norm before it, behind it, on both sides or none, and added to the residual stream.
struct DecoderLayer {
  int64_t num_heads, num_kv_heads, head_dim;
  PackedLinear qkv, output;
  float scale, soft_cap;  // soft_cap 0: none
  int64_t sliding_window;  // 0: none
  size_t group, rotary;
  bool interleaved;
  std::optional<at::Tensor> before_attention, after_attention, before_mlp, after_mlp, query_norm, key_norm, sinks;
  double residual_multiplier = 1.0;
  // Either an MLP, or a mixture of experts.
  PackedLinear gate_up, down;
  Activation activation = Activation::kSilu;
  c10::intrusive_ptr<Experts> experts;
  // Of adapters; null where there are none.
  c10::intrusive_ptr<LoraLinear> lora_qkv, lora_output, lora_gate_up, lora_down;

  int64_t heads_size() const { return num_heads * head_dim; }
  int64_t qkv_size() const { return (num_heads + 2 * num_kv_heads) * head_dim; }
};

using OptionalWeight = std::optional<at::Tensor>;

class Decoder : public torch::CustomClassHolder {
 public:
  Decoder(double epsilon, at::Tensor final_norm)
      : epsilon_(static_cast<float>(epsilon)), final_norm_(std::move(final_norm)) {}

  // Appends a layer; what follows here is about the last one. `rotary`: which of the rotary embeddings it has.
  void add_layer(int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, const PackedLinearTuple& qkv,
                 const PackedLinearTuple& output, double scale, double soft_cap, int64_t sliding_window, int64_t group,
                 int64_t rotary, bool interleaved);
  void set_norms(const OptionalWeight& before_attention, const OptionalWeight& after_attention,
                 const OptionalWeight& before_mlp, const OptionalWeight& after_mlp, const OptionalWeight& query,
                 const OptionalWeight& key, double residual_multiplier);
  void set_sinks(const at::Tensor& sinks);
  void set_mlp(const PackedLinearTuple& gate_up, const PackedLinearTuple& down, int64_t activation);
  void set_experts(const c10::intrusive_ptr<Experts>& experts);
  // What adapters add to the layer's products; of the MLP where it is one.
  using OptionalLora = std::optional<c10::intrusive_ptr<LoraLinear>>;
  void set_lora(const c10::intrusive_ptr<LoraLinear>& qkv, const c10::intrusive_ptr<LoraLinear>& output,
                const OptionalLora& gate_up, const OptionalLora& down);

  // From now on `forward` writes the residual stream before these layers (their number: after the last one) side by side into
  // the first T rows of `output`, [max T, layers.size() * hidden_size].
  void capture(const std::vector<int64_t>& layers, const at::Tensor& output);

  // Embeddings [T, hidden_size] to hidden states after the final norm. `cosines` and `sines`: of each rotary embedding.
  // `k_caches` and `v_caches`: one a layer, written in place; `block_tables` and `slot_mappings`: one a group of layers.
  at::Tensor forward(const at::Tensor& embedded, const std::vector<at::Tensor>& cosines,
                     const std::vector<at::Tensor>& sines, const std::vector<at::Tensor>& k_caches,
                     const std::vector<at::Tensor>& v_caches, const at::Tensor& query_start_loc,
                     const at::Tensor& seq_lens, const std::vector<at::Tensor>& block_tables,
                     const std::vector<at::Tensor>& slot_mappings);

 private:
  DecoderLayer& last();

  float epsilon_;
  at::Tensor final_norm_;
  std::vector<DecoderLayer> layers_;
  std::vector<int64_t> captured_layers_;
  at::Tensor captured_;
};

}  // namespace pagoda
