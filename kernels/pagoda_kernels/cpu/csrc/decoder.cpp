#include "decoder.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "checks.h"
#include "dispatch.h"

namespace pagoda {
namespace {

constexpr int64_t kPanel = 32;

PackedLinear unpack(const PackedLinearTuple& parts) {
  PackedLinear linear;
  std::tie(linear.weight, linear.bias, linear.scales, linear.zeros, linear.out_features, linear.group_size,
           linear.four_bits) = parts;
  return linear;
}

}  // namespace

LinearArguments PackedLinear::arguments(DType dtype, const void* x, int64_t num_rows, int64_t in_features,
                                        void* output) const {
  const int64_t panels = (out_features + kPanel - 1) / kPanel;
  LinearArguments a{};
  a.dtype = a.output_dtype = dtype;
  if (scales) {
    const int64_t unit = four_bits ? 8 : 4;
    TORCH_CHECK(group_size > 0 && in_features % unit == 0 && group_size % unit == 0, "in_features ", in_features,
                " and group_size ", group_size, " must be multiples of ", unit);
    const int64_t groups = (in_features + group_size - 1) / group_size;
    check(weight, "weight", {panels, in_features / unit, kPanel, 4}, at::kByte);
    check(*scales, "scales", {groups, panels * kPanel}, at::kFloat);
    if (zeros) check(*zeros, "zeros", {groups, panels * kPanel}, at::kByte);
    a.kind = four_bits ? WeightKind::kInt4 : WeightKind::kInt8;
    a.scales = scales->const_data_ptr<float>();
    a.zeros = zeros ? zeros->const_data_ptr<uint8_t>() : nullptr;
    a.group_size = group_size;
  } else if (weight.scalar_type() == at::kFloat) {
    check(weight, "weight", {panels, in_features, kPanel}, at::kFloat);
    a.kind = WeightKind::kFloat32;
  } else {
    TORCH_CHECK(in_features % 2 == 0, "in_features must be even, not ", in_features);
    check(weight, "weight", {panels, in_features / 2, kPanel, 2}, at::kBFloat16);
    a.kind = WeightKind::kBFloat16;
  }
  if (bias) {
    TORCH_CHECK(bias->numel() == out_features && bias->is_contiguous() && dtype_of(*bias) == dtype,
                "bias must be [", out_features, "] of the dtype of x");
  }
  a.x = x;
  a.weight = weight.const_data_ptr();
  a.bias = pointer_or_null(bias);
  a.output = output;
  a.num_rows = num_rows;
  a.in_features = in_features;
  a.out_features = out_features;
  a.num_threads = at::get_num_threads();
  return a;
}

void run_linear(const LinearArguments& a) {
  if (a.num_rows == 0) return;
  const Kernels& kernels = active_kernels();
  (a.scales != nullptr ? kernels.linear_quantized : kernels.linear)(a);
}

void Decoder::add_layer(const at::Tensor& input_norm, const at::Tensor& post_attention_norm,
                        const std::optional<at::Tensor>& query_norm, const std::optional<at::Tensor>& key_norm,
                        const PackedLinearTuple& qkv, const PackedLinearTuple& output, const PackedLinearTuple& gate_up,
                        const PackedLinearTuple& down, int64_t sliding_window) {
  layers_.push_back(DecoderLayer{input_norm, post_attention_norm, query_norm, key_norm, unpack(qkv), unpack(output),
                                 unpack(gate_up), unpack(down), sliding_window});
  const DecoderLayer& layer = layers_.back();
  TORCH_CHECK(layer.qkv.out_features == (num_heads_ + 2 * num_kv_heads_) * head_dim_ &&
                  layer.gate_up.out_features == 2 * intermediate_size_ &&
                  layer.output.out_features == final_norm_.numel() && layer.down.out_features == final_norm_.numel(),
              "the layer's sizes do not fit the decoder's");
}

at::Tensor Decoder::forward(const at::Tensor& embedded, const at::Tensor& cosines, const at::Tensor& sines,
                            const std::vector<at::Tensor>& k_caches, const std::vector<at::Tensor>& v_caches,
                            const at::Tensor& query_start_loc, const at::Tensor& seq_lens,
                            const at::Tensor& block_table, const at::Tensor& slot_mapping) {
  const int64_t tokens = embedded.size(0), hidden_size = final_norm_.numel(), rows = seq_lens.size(0);
  const at::ScalarType type = embedded.scalar_type();
  check(embedded, "embedded", {tokens, hidden_size}, final_norm_.scalar_type());
  check(cosines, "cosines", {tokens, head_dim_ / 2}, at::kFloat);
  check(sines, "sines", {tokens, head_dim_ / 2}, at::kFloat);
  check(query_start_loc, "query_start_loc", {rows + 1}, at::kInt);
  check(seq_lens, "seq_lens", {rows}, at::kInt);
  check(block_table, "block_table", {rows, block_table.size(1)}, at::kInt);
  check(slot_mapping, "slot_mapping", {tokens}, at::kLong);
  TORCH_CHECK(k_caches.size() == layers_.size() && v_caches.size() == layers_.size(), "a KV cache a layer is needed");

  const Kernels& kernels = active_kernels();
  const DType dtype = dtype_of(embedded);
  const int threads = at::get_num_threads();
  const int64_t heads_size = num_heads_ * head_dim_, qkv_size = heads_size + 2 * num_kv_heads_ * head_dim_;
  const auto buffer = [&](int64_t columns) { return at::empty({tokens, columns}, embedded.options()); };
  const at::Tensor stream = buffer(hidden_size), normed = buffer(hidden_size), delta = buffer(hidden_size);
  const at::Tensor qkv = buffer(qkv_size), query = buffer(heads_size), attended = buffer(heads_size);
  const at::Tensor gate_up = buffer(2 * intermediate_size_), activated = buffer(intermediate_size_);
  const auto element = [&](const at::Tensor& tensor, int64_t index) {
    return static_cast<const char*>(tensor.const_data_ptr()) + index * size_of(dtype);
  };

  // Adds `added` to the stream and normalizes it. At the bottom there is no stream: the embeddings become it.
  const auto add_and_norm = [&](const at::Tensor& added, const void* residual, const at::Tensor& weight) {
    NormArguments a{};
    a.dtype = dtype;
    a.x = added.const_data_ptr();
    a.residual = residual;
    a.weight = weight.const_data_ptr();
    a.normed = normed.mutable_data_ptr();
    a.stream = stream.mutable_data_ptr();
    a.num_rows = tokens;
    a.size = hidden_size;
    a.epsilon = epsilon_;
    a.num_threads = threads;
    kernels.norm(a);
  };
  const auto multiply = [&](const PackedLinear& linear, const at::Tensor& x, const at::Tensor& output) {
    run_linear(linear.arguments(dtype, x.const_data_ptr(), tokens, x.size(1), output.mutable_data_ptr()));
  };

  for (size_t index = 0; index < layers_.size(); ++index) {
    const DecoderLayer& layer = layers_[index];
    const at::Tensor &k_cache = k_caches[index], &v_cache = v_caches[index];
    const int64_t block_size = k_cache.size(2);
    check(k_cache, "k_cache", {k_cache.size(0), num_kv_heads_, block_size, head_dim_}, type);
    check(v_cache, "v_cache", k_cache.sizes(), type);

    add_and_norm(index == 0 ? embedded : delta, index == 0 ? nullptr : stream.const_data_ptr(), layer.input_norm);
    multiply(layer.qkv, normed, qkv);

    HeadsArguments h{};
    h.dtype = dtype;
    h.query = element(qkv, 0);
    h.key = element(qkv, heads_size);
    h.value = element(qkv, heads_size + num_kv_heads_ * head_dim_);
    h.query_stride = h.key_stride = h.value_stride = qkv_size;
    h.query_norm = pointer_or_null(layer.query_norm);
    h.key_norm = pointer_or_null(layer.key_norm);
    h.epsilon = epsilon_;
    h.cosines = cosines.const_data_ptr<float>();
    h.sines = sines.const_data_ptr<float>();
    h.query_output = query.mutable_data_ptr();
    h.k_cache = k_cache.mutable_data_ptr();
    h.v_cache = v_cache.mutable_data_ptr();
    h.slot_mapping = slot_mapping.const_data_ptr<int64_t>();
    h.num_tokens = tokens;
    h.num_heads = num_heads_;
    h.num_kv_heads = num_kv_heads_;
    h.head_dim = head_dim_;
    h.block_size = block_size;
    h.num_threads = threads;
    kernels.heads(h);

    AttentionArguments a{};
    a.dtype = dtype;
    a.query = query.const_data_ptr();
    a.output = attended.mutable_data_ptr();
    a.k_cache = k_cache.const_data_ptr();
    a.v_cache = v_cache.const_data_ptr();
    a.query_start_loc = query_start_loc.const_data_ptr<int32_t>();
    a.seq_lens = seq_lens.const_data_ptr<int32_t>();
    a.block_table = block_table.const_data_ptr<int32_t>();
    a.table_stride = block_table.size(1);
    a.num_rows = rows;
    a.num_heads = num_heads_;
    a.num_kv_heads = num_kv_heads_;
    a.head_dim = head_dim_;
    a.block_size = block_size;
    a.sliding_window = layer.sliding_window;
    a.scale = 1.0f / __builtin_sqrtf(static_cast<float>(head_dim_));
    a.num_threads = threads;
    kernels.attention(a);

    multiply(layer.output, attended, delta);
    add_and_norm(delta, index == 0 ? embedded.const_data_ptr() : stream.const_data_ptr(), layer.post_attention_norm);
    multiply(layer.gate_up, normed, gate_up);

    GatedActivationArguments g{};
    g.dtype = dtype;
    g.activation = Activation::kSilu;
    g.x = gate_up.const_data_ptr();
    g.output = activated.mutable_data_ptr();
    g.num_rows = tokens;
    g.size = intermediate_size_;
    g.num_threads = threads;
    kernels.gated_activation(g);
    multiply(layer.down, activated, delta);
  }
  add_and_norm(delta, stream.const_data_ptr(), final_norm_);
  return normed;
}

}  // namespace pagoda
