#include "decoder.h"

#include <ATen/Parallel.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#include "checks.h"
#include "dispatch.h"
#include "experts.h"

namespace pagoda {
namespace {

constexpr int64_t kPanel = 32;

}  // namespace

PackedLinear unpack_linear(const PackedLinearTuple& parts) {
  PackedLinear linear;
  std::tie(linear.weight, linear.bias, linear.scales, linear.zeros, linear.block_scales, linear.out_features,
           linear.group_size, linear.four_bits) = parts;
  return linear;
}

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
    const at::ScalarType scale_type = block_scales                             ? at::kChar
                                      : scales->scalar_type() == at::kHalf ? at::kHalf
                                                                               : at::kFloat;
    const bool has_mins = zeros && zeros->scalar_type() != at::kByte;
    check(*scales, "scales", {panels, groups, kPanel}, scale_type);
    if (zeros) check(*zeros, "zeros", {panels, groups, kPanel}, has_mins ? scale_type : at::kByte);
    a.kind = four_bits ? WeightKind::kInt4 : WeightKind::kInt8;
    a.scales = scales->const_data_ptr();
    if (block_scales) {
      const int64_t blocks = block_scales->dim() == 4 ? block_scales->size(1) : 0;
      TORCH_CHECK(blocks > 0 && groups % blocks == 0, "block_scales must be of a part of ", groups, " groups");
      check(*block_scales, "block_scales", {panels, blocks, has_mins ? 2 : 1, kPanel}, at::kHalf);
      a.block_scales = block_scales->const_data_ptr();
      a.block_groups = groups / blocks;
    } else {
      a.scale_dtype = dtype_of(*scales);
    }
    if (has_mins) {
      a.mins = zeros->const_data_ptr();
    } else if (zeros) {
      a.zeros = zeros->const_data_ptr<uint8_t>();
    }
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
  (a.scales != nullptr ? kernels.linear_quantized : kernels.linear)(&a, 1);
}

DecoderLayer& Decoder::last() {
  TORCH_CHECK(!layers_.empty(), "there is no layer yet");
  return layers_.back();
}

void Decoder::add_layer(int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, const PackedLinearTuple& qkv,
                        const PackedLinearTuple& output, double scale, double soft_cap, int64_t sliding_window,
                        int64_t group, int64_t rotary, bool interleaved) {
  DecoderLayer layer{};
  layer.num_heads = num_heads;
  layer.num_kv_heads = num_kv_heads;
  layer.head_dim = head_dim;
  layer.qkv = unpack_linear(qkv);
  layer.output = unpack_linear(output);
  layer.scale = static_cast<float>(scale);
  layer.soft_cap = static_cast<float>(soft_cap);
  layer.sliding_window = sliding_window;
  layer.group = static_cast<size_t>(group);
  layer.rotary = static_cast<size_t>(rotary);
  layer.interleaved = interleaved;
  TORCH_CHECK(layer.qkv.out_features == layer.qkv_size() && layer.output.out_features == final_norm_.numel() &&
                  num_kv_heads > 0 && num_heads % num_kv_heads == 0 && head_dim % 2 == 0,
              "the layer's sizes do not fit");
  layers_.push_back(std::move(layer));
}

void Decoder::set_norms(const OptionalWeight& before_attention, const OptionalWeight& after_attention,
                        const OptionalWeight& before_mlp, const OptionalWeight& after_mlp, const OptionalWeight& query,
                        const OptionalWeight& key, double residual_multiplier) {
  DecoderLayer& layer = last();
  for (const OptionalWeight* weight : {&before_attention, &after_attention, &before_mlp, &after_mlp}) {
    if (*weight) check(**weight, "norm", {final_norm_.numel()}, final_norm_.scalar_type());
  }
  for (const OptionalWeight* weight : {&query, &key}) {
    if (*weight) check(**weight, "norm of heads", {layer.head_dim}, final_norm_.scalar_type());
  }
  layer.before_attention = before_attention;
  layer.after_attention = after_attention;
  layer.before_mlp = before_mlp;
  layer.after_mlp = after_mlp;
  layer.query_norm = query;
  layer.key_norm = key;
  layer.residual_multiplier = residual_multiplier;
}

void Decoder::set_sinks(const at::Tensor& sinks) {
  check(sinks, "sinks", {last().num_heads}, at::kFloat);
  last().sinks = sinks;
}

void Decoder::set_mlp(const PackedLinearTuple& gate_up, const PackedLinearTuple& down, int64_t activation) {
  DecoderLayer& layer = last();
  layer.gate_up = unpack_linear(gate_up);
  layer.down = unpack_linear(down);
  layer.activation = gated_activation_of(activation);
  TORCH_CHECK(layer.gate_up.out_features % 2 == 0 && layer.down.out_features == final_norm_.numel(),
              "the MLP's sizes do not fit");
}

void Decoder::set_lora(const c10::intrusive_ptr<LoraLinear>& qkv, const c10::intrusive_ptr<LoraLinear>& output,
                       const OptionalLora& gate_up, const OptionalLora& down) {
  DecoderLayer& layer = last();
  layer.lora_qkv = qkv;
  layer.lora_output = output;
  if (gate_up) layer.lora_gate_up = *gate_up;
  if (down) layer.lora_down = *down;
}

void Decoder::set_experts(const c10::intrusive_ptr<Experts>& experts) { last().experts = experts; }

void Decoder::capture(const std::vector<int64_t>& layers, const at::Tensor& output) {
  const int64_t num_layers = static_cast<int64_t>(layers_.size()), num_captured = static_cast<int64_t>(layers.size());
  for (const int64_t layer : layers) {
    TORCH_CHECK(layer >= 0 && layer <= num_layers, "layer ", layer, " is not one of 0 to ", num_layers);
  }
  check(output, "output", {output.size(0), num_captured * final_norm_.numel()}, final_norm_.scalar_type());
  captured_layers_ = layers;
  captured_ = output;
}

at::Tensor Decoder::forward(const at::Tensor& embedded, const std::vector<at::Tensor>& cosines,
                            const std::vector<at::Tensor>& sines, const std::vector<at::Tensor>& k_caches,
                            const std::vector<at::Tensor>& v_caches, const at::Tensor& query_start_loc,
                            const at::Tensor& seq_lens, const std::vector<at::Tensor>& block_tables,
                            const std::vector<at::Tensor>& slot_mappings) {
  const int64_t tokens = embedded.size(0), hidden_size = final_norm_.numel(), rows = seq_lens.size(0);
  const at::ScalarType type = embedded.scalar_type(), norm_type = final_norm_.scalar_type();
  check(embedded, "embedded", {tokens, hidden_size}, norm_type == at::kFloat ? type : norm_type);
  TORCH_CHECK(cosines.size() == sines.size(), "cosines and sines of each rotary embedding are needed");
  for (size_t rotary = 0; rotary < cosines.size(); ++rotary) {
    check(cosines[rotary], "cosines", {tokens, cosines[rotary].size(1)}, at::kFloat);
    check(sines[rotary], "sines", cosines[rotary].sizes(), at::kFloat);
  }
  check(query_start_loc, "query_start_loc", {rows + 1}, at::kInt);
  check(seq_lens, "seq_lens", {rows}, at::kInt);
  TORCH_CHECK(block_tables.size() == slot_mappings.size(), "a block table and a slot mapping a group are needed");
  for (size_t group = 0; group < block_tables.size(); ++group) {
    check(block_tables[group], "block_table", {rows, block_tables[group].size(1)}, at::kInt);
    check(slot_mappings[group], "slot_mapping", {tokens}, at::kLong);
  }
  TORCH_CHECK(captured_layers_.empty() || tokens <= captured_.size(0), tokens, " tokens, captured are at most ",
              captured_.size(0));
  TORCH_CHECK(k_caches.size() == layers_.size() && v_caches.size() == layers_.size(), "a KV cache a layer is needed");

  const Kernels& kernels = active_kernels();
  const DType dtype = dtype_of(embedded);
  const int threads = at::get_num_threads();
  int64_t qkv_size = 0, heads_size = 0, units = 0;
  for (const DecoderLayer& layer : layers_) {
    qkv_size = std::max(qkv_size, layer.qkv_size());
    heads_size = std::max(heads_size, layer.heads_size());
    units = std::max(units, layer.gate_up.out_features / 2);
  }
  const auto buffer = [&](int64_t columns) { return at::empty({tokens, columns}, embedded.options()); };
  const at::Tensor stream = buffer(hidden_size), normed = buffer(hidden_size), delta = buffer(hidden_size);
  // Of the widest layer; rows of a narrower one follow each other as in a tensor of its own.
  const at::Tensor qkv = buffer(qkv_size), query = buffer(heads_size), attended = buffer(heads_size);
  const at::Tensor gate_up = buffer(2 * units), activated = buffer(units);
  const auto element = [&](const at::Tensor& tensor, int64_t index) {
    return static_cast<const char*>(tensor.const_data_ptr()) + index * size_of(dtype);
  };
  const auto normalize = [&](const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight,
                             const at::Tensor& output) {
    NormArguments a{};
    a.dtype = dtype;
    a.x = x.const_data_ptr();
    a.residual = residual.defined() ? residual.const_data_ptr() : nullptr;
    a.weight = weight.const_data_ptr();
    a.float32_weight = norm_type == at::kFloat;
    a.normed = output.mutable_data_ptr();
    a.stream = stream.mutable_data_ptr();
    a.num_rows = tokens;
    a.size = hidden_size;
    a.epsilon = epsilon_;
    a.num_threads = threads;
    kernels.norm(a);
  };
  const auto capture = [&](int64_t index, const at::Tensor& residual) {
    for (size_t place = 0; place < captured_layers_.size(); ++place) {
      if (captured_layers_[place] != index) continue;
      const at::Tensor states = residual.to(captured_.scalar_type());  // as it is, but for embeddings of another type
      const size_t size = hidden_size * captured_.element_size(), stride = captured_layers_.size() * size;
      const char* from = static_cast<const char*>(states.const_data_ptr());
      char* to = static_cast<char*>(captured_.mutable_data_ptr()) + place * size;
      for (int64_t token = 0; token < tokens; ++token) std::memcpy(to + token * stride, from + token * size, size);
    }
  };
  const auto multiply = [&](const PackedLinear& linear, const at::Tensor& x, int64_t in_features,
                            const at::Tensor& output, const c10::intrusive_ptr<LoraLinear>& lora) {
    run_linear(linear.arguments(dtype, x.const_data_ptr(), tokens, in_features, output.mutable_data_ptr()));
    if (lora) lora->add(dtype, x.const_data_ptr(), dtype, output.mutable_data_ptr(), tokens);
  };

  // The residual stream is `residual + pending`, and not summed up before it is needed. At the bottom there is no residual: the
  // embeddings are the stream.
  at::Tensor pending = embedded, residual;
  const auto begin_branch = [&](const OptionalWeight& norm) -> const at::Tensor& {
    if (norm) {
      normalize(pending, residual, *norm, normed);
    } else if (residual.defined()) {
      at::add_out(const_cast<at::Tensor&>(stream), pending, residual);
    }
    residual = residual.defined() ? stream : pending;
    return norm ? normed : residual;
  };
  const auto end_branch = [&](const at::Tensor& output, const OptionalWeight& norm, double multiplier) {
    pending = output;
    if (norm) {
      normalize(output, at::Tensor(), *norm, output);
    } else if (multiplier != 1.0) {
      pending.mul_(multiplier);
    }
  };

  for (size_t index = 0; index < layers_.size(); ++index) {
    const DecoderLayer& layer = layers_[index];
    const at::Tensor &k_cache = k_caches[index], &v_cache = v_caches[index];
    TORCH_CHECK(layer.group < block_tables.size(), "there is no block table of group ", layer.group);
    TORCH_CHECK(layer.rotary < cosines.size(), "there is no rotary embedding ", layer.rotary);
    const at::Tensor &block_table = block_tables[layer.group], &slot_mapping = slot_mappings[layer.group];
    const at::Tensor &cosine = cosines[layer.rotary], &sine = sines[layer.rotary];
    const int64_t block_size = k_cache.size(2);
    TORCH_CHECK(2 * cosine.size(1) <= layer.head_dim, "more angles than pairs of a head");
    check(k_cache, "k_cache", {k_cache.size(0), layer.num_kv_heads, block_size, layer.head_dim}, type);
    check(v_cache, "v_cache", k_cache.sizes(), type);

    const at::Tensor& input = begin_branch(layer.before_attention);
    capture(static_cast<int64_t>(index), residual);
    multiply(layer.qkv, input, hidden_size, qkv, layer.lora_qkv);

    HeadsArguments h{};
    h.dtype = dtype;
    h.query = element(qkv, 0);
    h.key = element(qkv, layer.heads_size());
    h.value = element(qkv, layer.heads_size() + layer.num_kv_heads * layer.head_dim);
    h.query_stride = h.key_stride = h.value_stride = layer.qkv_size();
    h.query_norm = pointer_or_null(layer.query_norm);
    h.key_norm = pointer_or_null(layer.key_norm);
    h.float32_norm = norm_type == at::kFloat;
    h.epsilon = epsilon_;
    h.cosines = cosine.const_data_ptr<float>();
    h.sines = sine.const_data_ptr<float>();
    h.rotary_dim = 2 * cosine.size(1);
    h.interleaved = layer.interleaved;
    h.query_output = query.mutable_data_ptr();
    h.k_cache = k_cache.mutable_data_ptr();
    h.v_cache = v_cache.mutable_data_ptr();
    h.slot_mapping = slot_mapping.const_data_ptr<int64_t>();
    h.num_tokens = tokens;
    h.num_heads = layer.num_heads;
    h.num_kv_heads = layer.num_kv_heads;
    h.head_dim = layer.head_dim;
    h.block_size = block_size;
    h.num_threads = threads;
    kernels.heads(h);

    AttentionArguments a{};
    a.dtype = dtype;
    a.query = query.const_data_ptr();
    a.output = attended.mutable_data_ptr();
    a.k_cache = k_cache.const_data_ptr();
    a.v_cache = v_cache.const_data_ptr();
    a.sinks = layer.sinks ? layer.sinks->const_data_ptr<float>() : nullptr;
    a.query_start_loc = query_start_loc.const_data_ptr<int32_t>();
    a.seq_lens = seq_lens.const_data_ptr<int32_t>();
    a.block_table = block_table.const_data_ptr<int32_t>();
    a.table_stride = block_table.size(1);
    a.num_rows = rows;
    a.num_heads = layer.num_heads;
    a.num_kv_heads = layer.num_kv_heads;
    a.head_dim = a.value_dim = layer.head_dim;
    a.block_size = block_size;
    a.sliding_window = layer.sliding_window;
    a.scale = layer.scale;
    a.soft_cap = layer.soft_cap;
    a.num_threads = threads;
    kernels.attention(a);

    multiply(layer.output, attended, layer.heads_size(), delta, layer.lora_output);
    end_branch(delta, layer.after_attention, layer.residual_multiplier);
    const at::Tensor& mlp_input = begin_branch(layer.before_mlp);
    if (layer.experts) {
      end_branch(layer.experts->forward(mlp_input), layer.after_mlp, layer.residual_multiplier);
      continue;
    }
    multiply(layer.gate_up, mlp_input, hidden_size, gate_up, layer.lora_gate_up);

    GatedActivationArguments g{};
    g.dtype = dtype;
    g.activation = layer.activation;
    g.x = gate_up.const_data_ptr();
    g.output = activated.mutable_data_ptr();
    g.num_rows = tokens;
    g.size = layer.gate_up.out_features / 2;
    g.num_threads = threads;
    kernels.gated_activation(g);
    multiply(layer.down, activated, g.size, delta, layer.lora_down);
    end_branch(delta, layer.after_mlp, layer.residual_multiplier);
  }
  begin_branch(final_norm_);
  capture(static_cast<int64_t>(layers_.size()), residual);
  return normed;
}

}  // namespace pagoda
