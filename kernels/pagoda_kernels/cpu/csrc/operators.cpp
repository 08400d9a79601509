// The kernels as torch operators `pagoda_cpu::*`. Checks here, arithmetic elsewhere.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "decoder.h"
#include "dispatch.h"
#include "encoder.h"
#include "experts.h"
#include "kernels.h"
#include "step.h"

namespace {

using at::Tensor;
using pagoda::check;
using pagoda::dtype_of;
using pagoda::pointer_or_null;
using OptionalTensor = std::optional<Tensor>;

// Of attention, what follows from the caches, the batch and the query. Values are the first `value_dim` numbers of a token's.
pagoda::AttentionArguments attention_arguments(const Tensor& query, const Tensor& k_cache, const Tensor& v_cache,
                                               int64_t value_dim, const Tensor& query_start_loc, const Tensor& seq_lens,
                                               const Tensor& block_table, double scale, Tensor& output) {
  const int64_t rows = seq_lens.size(0), blocks = k_cache.size(0), kv_heads = k_cache.size(1);
  const int64_t block_size = k_cache.size(2), head_dim = k_cache.size(3);
  check(query, "query", {query.size(0), query.size(1), head_dim}, k_cache.scalar_type());
  check(k_cache, "k_cache", {blocks, kv_heads, block_size, head_dim}, k_cache.scalar_type());
  check(v_cache, "v_cache", k_cache.sizes(), k_cache.scalar_type());
  check(query_start_loc, "query_start_loc", {rows + 1}, at::kInt);
  check(seq_lens, "seq_lens", {rows}, at::kInt);
  check(block_table, "block_table", {rows, block_table.size(1)}, at::kInt);
  TORCH_CHECK(head_dim % 2 == 0, "head_dim must be even, not ", head_dim);
  TORCH_CHECK(query.size(1) % kv_heads == 0, query.size(1), " query heads are no multiple of ", kv_heads, " KV heads");
  output = at::empty({query.size(0), query.size(1), value_dim}, query.options());
  pagoda::AttentionArguments a{};
  a.dtype = dtype_of(query);
  a.query = query.const_data_ptr();
  a.output = output.mutable_data_ptr();
  a.k_cache = k_cache.const_data_ptr();
  a.v_cache = v_cache.const_data_ptr();
  a.query_start_loc = query_start_loc.const_data_ptr<int32_t>();
  a.seq_lens = seq_lens.const_data_ptr<int32_t>();
  a.block_table = block_table.const_data_ptr<int32_t>();
  a.table_stride = block_table.size(1);
  a.num_rows = rows;
  a.num_heads = query.size(1);
  a.num_kv_heads = kv_heads;
  a.head_dim = head_dim;
  a.value_dim = value_dim;
  a.block_size = block_size;
  a.scale = static_cast<float>(scale);
  a.num_threads = at::get_num_threads();
  return a;
}

Tensor paged_attention(const Tensor& query, const Tensor& k_cache, const Tensor& v_cache, const Tensor& query_start_loc,
                       const Tensor& seq_lens, const Tensor& block_table, double scale, int64_t sliding_window,
                       double soft_cap, const OptionalTensor& sinks) {
  if (sinks) check(*sinks, "sinks", {query.size(1)}, at::kFloat);
  Tensor output;
  pagoda::AttentionArguments a = attention_arguments(query, k_cache, v_cache, k_cache.size(3), query_start_loc, seq_lens,
                                                     block_table, scale, output);
  a.sinks = sinks ? sinks->const_data_ptr<float>() : nullptr;
  a.sliding_window = sliding_window;
  a.soft_cap = static_cast<float>(soft_cap);
  pagoda::active_kernels().attention(a);
  return output;
}

Tensor latent_attention(const Tensor& query, const Tensor& cache, int64_t rank, const Tensor& query_start_loc,
                        const Tensor& seq_lens, const Tensor& block_table, double scale) {
  TORCH_CHECK(cache.size(1) == 1 && 0 < rank && rank <= cache.size(3), "a latent cache has one head, of at least ", rank,
              " numbers, not ", cache.sizes());
  Tensor output;
  const pagoda::AttentionArguments a =
      attention_arguments(query, cache, cache, rank, query_start_loc, seq_lens, block_table, scale, output);
  pagoda::active_kernels().attention(a);
  return output;
}

// A view of heads [T, heads, head_dim] whose heads lie next to each other; `stride` from token to token.
int64_t token_stride(const Tensor& heads, const char* name) {
  TORCH_CHECK(heads.dim() == 3 && heads.stride(2) == 1 && (heads.size(1) == 1 || heads.stride(1) == heads.size(2)), name,
              " must be [tokens, heads, head_dim] with a token's heads next to each other");
  return heads.stride(0);
}

pagoda::HeadsArguments heads_arguments(const Tensor& key) {
  pagoda::HeadsArguments a{};
  a.dtype = dtype_of(key);
  a.key = key.const_data_ptr();
  a.key_stride = token_stride(key, "key");
  a.num_tokens = key.size(0);
  a.num_kv_heads = key.size(1);
  a.head_dim = key.size(2);
  a.block_size = 1;
  a.num_threads = at::get_num_threads();
  return a;
}

void set_query(pagoda::HeadsArguments& a, const Tensor& query, Tensor& output) {
  TORCH_CHECK(query.size(0) == a.num_tokens && query.size(2) == a.head_dim && dtype_of(query) == a.dtype,
              "query must match key");
  a.query = query.const_data_ptr();
  a.query_stride = token_stride(query, "query");
  a.num_heads = query.size(1);
  output = at::empty(query.sizes(), query.options());
  a.query_output = output.mutable_data_ptr();
}

void set_rotation(pagoda::HeadsArguments& a, const Tensor& cosines, const Tensor& sines, bool interleaved) {
  const int64_t half = cosines.size(-1);
  TORCH_CHECK(2 * half <= a.head_dim, "cos must be of at most head_dim / 2 = ", a.head_dim / 2, " angles, not ", half);
  check(cosines, "cos", {a.num_tokens, half}, at::kFloat);
  check(sines, "sin", {a.num_tokens, half}, at::kFloat);
  a.rotary_dim = 2 * half;
  a.interleaved = interleaved;
  a.cosines = cosines.const_data_ptr<float>();
  a.sines = sines.const_data_ptr<float>();
}

void set_cache(pagoda::HeadsArguments& a, const Tensor& value, const Tensor& k_cache, const Tensor& v_cache,
               const Tensor& slot_mapping) {
  TORCH_CHECK(value.size(0) == a.num_tokens && value.size(1) == a.num_kv_heads && value.size(2) == a.head_dim &&
                  dtype_of(value) == a.dtype,
              "value must match key");
  check(k_cache, "k_cache", {k_cache.size(0), a.num_kv_heads, k_cache.size(2), a.head_dim}, value.scalar_type());
  check(v_cache, "v_cache", k_cache.sizes(), value.scalar_type());
  check(slot_mapping, "slot_mapping", {a.num_tokens}, at::kLong);
  a.value = value.const_data_ptr();
  a.value_stride = token_stride(value, "value");
  a.k_cache = k_cache.mutable_data_ptr();
  a.v_cache = v_cache.mutable_data_ptr();
  a.slot_mapping = slot_mapping.const_data_ptr<int64_t>();
  a.block_size = k_cache.size(2);
}

void write_kv(const Tensor& key, const Tensor& value, const Tensor& k_cache, const Tensor& v_cache,
              const Tensor& slot_mapping) {
  pagoda::HeadsArguments a = heads_arguments(key);
  set_cache(a, value, k_cache, v_cache, slot_mapping);
  pagoda::active_kernels().heads(a);
}

std::tuple<Tensor, Tensor> apply_rotary(const Tensor& query, const Tensor& key, const Tensor& cosines,
                                        const Tensor& sines, bool interleaved) {
  pagoda::HeadsArguments a = heads_arguments(key);
  Tensor turned_query, turned_key = at::empty(key.sizes(), key.options());
  set_query(a, query, turned_query);
  set_rotation(a, cosines, sines, interleaved);
  a.key_output = turned_key.mutable_data_ptr();
  pagoda::active_kernels().heads(a);
  return {turned_query, turned_key};
}

Tensor rotate_and_store(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cosines,
                        const Tensor& sines, const OptionalTensor& query_norm, const OptionalTensor& key_norm,
                        double epsilon, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slot_mapping,
                        bool interleaved) {
  pagoda::HeadsArguments a = heads_arguments(key);
  Tensor turned_query;
  set_query(a, query, turned_query);
  set_rotation(a, cosines, sines, interleaved);
  set_cache(a, value, k_cache, v_cache, slot_mapping);
  a.float32_norm = query_norm && query_norm->scalar_type() == at::kFloat;
  const at::ScalarType norm_type = a.float32_norm ? at::kFloat : key.scalar_type();
  if (query_norm) check(*query_norm, "query_norm", {a.head_dim}, norm_type);
  if (key_norm) check(*key_norm, "key_norm", {a.head_dim}, norm_type);
  a.query_norm = pointer_or_null(query_norm);
  a.key_norm = pointer_or_null(key_norm);
  a.epsilon = static_cast<float>(epsilon);
  pagoda::active_kernels().heads(a);
  return turned_query;
}

pagoda::NormArguments norm_arguments(const Tensor& x, const Tensor& weight, double epsilon, Tensor& normed) {
  const bool float32_weight = weight.scalar_type() == at::kFloat;
  check(weight, "weight", {x.size(-1)}, float32_weight ? at::kFloat : x.scalar_type());
  normed = at::empty(x.sizes(), x.options());
  pagoda::NormArguments a{};
  a.float32_weight = float32_weight;
  a.dtype = dtype_of(x);
  a.weight = weight.const_data_ptr();
  a.normed = normed.mutable_data_ptr();
  a.size = x.size(-1);
  a.num_rows = x.numel() / a.size;
  a.epsilon = static_cast<float>(epsilon);
  a.num_threads = at::get_num_threads();
  return a;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double epsilon) {
  Tensor normed;
  const Tensor rows = x.contiguous();
  pagoda::NormArguments a = norm_arguments(rows, weight, epsilon, normed);
  a.x = rows.const_data_ptr();
  pagoda::active_kernels().norm(a);
  return normed;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double epsilon) {
  Tensor normed;
  const Tensor rows = x.contiguous();
  pagoda::NormArguments a = norm_arguments(rows, weight, epsilon, normed);
  check(residual, "residual", rows.sizes(), rows.scalar_type());
  Tensor stream = at::empty_like(rows);
  a.x = rows.const_data_ptr();
  a.residual = residual.const_data_ptr();
  a.stream = stream.mutable_data_ptr();
  pagoda::active_kernels().norm(a);
  return {normed, stream};
}

Tensor activate_and_mul(const Tensor& x, pagoda::Activation activation) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) % 2 == 0, "x must be [rows, 2 * size], not ", x.sizes());
  const Tensor rows = x.contiguous();
  Tensor output = at::empty({x.size(0), x.size(1) / 2}, x.options());
  pagoda::GatedActivationArguments a{};
  a.dtype = dtype_of(x);
  a.activation = activation;
  a.x = rows.const_data_ptr();
  a.output = output.mutable_data_ptr();
  a.num_rows = x.size(0);
  a.size = x.size(1) / 2;
  a.num_threads = at::get_num_threads();
  pagoda::active_kernels().gated_activation(a);
  return output;
}

Tensor silu_and_mul(const Tensor& x) { return activate_and_mul(x, pagoda::Activation::kSilu); }
Tensor gelu_and_mul(const Tensor& x) { return activate_and_mul(x, pagoda::Activation::kGeluTanh); }
Tensor clamped_swiglu_and_mul(const Tensor& x) { return activate_and_mul(x, pagoda::Activation::kClampedSwiglu); }

Tensor gated_delta_net(const Tensor& projected, const Tensor& gates, bool interleaved, const Tensor& conv_weight,
                       const Tensor& decay_log, const Tensor& step_bias, const Tensor& norm_weight, double epsilon,
                       int64_t num_key_heads, const Tensor& first_states, const Tensor& other_states,
                       const Tensor& conv_states, const Tensor& query_start_loc, const Tensor& seq_lens,
                       const Tensor& block_table, int64_t block_size) {
  const int64_t tokens = projected.size(0), rows = seq_lens.size(0), value_heads = decay_log.size(0);
  const int64_t key_dim = first_states.size(2), value_dim = first_states.size(3), first_heads = first_states.size(1);
  const int64_t channels = 2 * num_key_heads * key_dim + value_heads * value_dim, taps = conv_weight.size(0) - 1;
  TORCH_CHECK(num_key_heads > 0 && value_heads % num_key_heads == 0, value_heads, " value heads are no multiple of ",
              num_key_heads, " key heads");
  check(projected, "projected", {tokens, channels + value_heads * value_dim}, projected.scalar_type());
  check(gates, "gates", {tokens, 2 * value_heads}, at::kFloat);
  check(conv_weight, "conv_weight", {taps + 1, channels}, at::kFloat);
  check(decay_log, "decay_log", {value_heads}, at::kFloat);
  check(step_bias, "step_bias", {value_heads}, at::kFloat);
  check(norm_weight, "norm_weight", {value_dim}, at::kFloat);
  check(query_start_loc, "query_start_loc", {rows + 1}, at::kInt);
  check(seq_lens, "seq_lens", {rows}, at::kInt);
  check(block_table, "block_table", {rows, block_table.size(1)}, at::kInt);
  const int64_t blocks = first_states.size(0);
  check(first_states[0], "first_states[0]", {first_heads, key_dim, value_dim}, at::kFloat);
  TORCH_CHECK(other_states.size(0) == blocks && conv_states.size(0) == blocks, "states must be of as many blocks");
  check(other_states[0], "other_states[0]", {value_heads - first_heads, key_dim, value_dim}, at::kFloat);
  check(conv_states[0], "conv_states[0]", {taps, channels}, at::kFloat);
  Tensor output = at::empty({tokens, value_heads * value_dim}, projected.options());
  pagoda::DeltaNetArguments a{};
  a.dtype = dtype_of(projected);
  a.projected = projected.const_data_ptr();
  a.projected_stride = projected.size(1);
  a.gates = gates.const_data_ptr<float>();
  a.interleaved = interleaved;
  a.conv_weight = conv_weight.const_data_ptr<float>();
  a.decay_log = decay_log.const_data_ptr<float>();
  a.step_bias = step_bias.const_data_ptr<float>();
  a.norm_weight = norm_weight.const_data_ptr<float>();
  a.output = output.mutable_data_ptr();
  a.first_states = first_states.mutable_data_ptr<float>();
  a.other_states = other_states.mutable_data_ptr<float>();
  a.conv_states = conv_states.mutable_data_ptr<float>();
  a.first_stride = first_states.stride(0);
  a.other_stride = other_states.stride(0);
  a.conv_stride = conv_states.stride(0);
  a.num_first_heads = first_heads;
  a.query_start_loc = query_start_loc.const_data_ptr<int32_t>();
  a.seq_lens = seq_lens.const_data_ptr<int32_t>();
  a.block_table = block_table.const_data_ptr<int32_t>();
  a.table_stride = block_table.size(1);
  a.num_rows = rows;
  a.num_key_heads = num_key_heads;
  a.num_value_heads = value_heads;
  a.key_dim = key_dim;
  a.value_dim = value_dim;
  a.conv_size = taps + 1;
  a.block_size = block_size;
  a.epsilon = static_cast<float>(epsilon);
  a.num_threads = at::get_num_threads();
  pagoda::active_kernels().delta_net(a);
  return output;
}

constexpr int64_t kPanel = 32;

Tensor run_packed(const Tensor& x, const pagoda::PackedLinear& linear, std::optional<at::ScalarType> out_dtype) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x must be a contiguous [rows, in_features], not ", x.sizes());
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
              "x must be float32 or bfloat16, not ", x.scalar_type());
  const at::ScalarType type = out_dtype.value_or(x.scalar_type());
  TORCH_CHECK(type == x.scalar_type() || type == at::kFloat, "out_dtype must be float32 or that of x, not ", type);
  Tensor output = at::empty({x.size(0), linear.out_features}, x.options().dtype(type));
  pagoda::LinearArguments a =
      linear.arguments(dtype_of(x), x.const_data_ptr(), x.size(0), x.size(1), output.mutable_data_ptr());
  a.output_dtype = dtype_of(output);
  pagoda::run_linear(a);
  return output;
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t out_features,
              std::optional<at::ScalarType> out_dtype) {
  return run_packed(x, {weight, bias, std::nullopt, std::nullopt, std::nullopt, out_features, 0, false}, out_dtype);
}

Tensor linear_quantized(const Tensor& x, const Tensor& weight, const Tensor& scales, const OptionalTensor& zeros,
                        const OptionalTensor& block_scales, const OptionalTensor& bias, int64_t out_features,
                        int64_t group_size, bool four_bits, std::optional<at::ScalarType> out_dtype) {
  return run_packed(x, {weight, bias, scales, zeros, block_scales, out_features, group_size, four_bits}, out_dtype);
}

// A product for each head: x [T, heads, in_features] to [T, heads, out_features], which is a view. `weight` has the panels of
// one head behind those of the other.
Tensor linear_heads(const Tensor& x, const Tensor& weight, int64_t out_features) {
  TORCH_CHECK(x.dim() == 3 && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16),
              "x must be a float32 or bfloat16 [tokens, heads, in_features]");
  const int64_t tokens = x.size(0), heads = x.size(1), inputs = x.size(2);
  const Tensor by_head = x.transpose(0, 1).contiguous(), output = at::empty({heads, tokens, out_features}, x.options());
  if (tokens == 0) return output.transpose(0, 1);
  const int64_t panels = (out_features + kPanel - 1) / kPanel;
  TORCH_CHECK(weight.dim() > 2 && weight.size(0) == heads * panels, "weight must have ", panels, " panels for each of ", heads,
              " heads");
  const auto bytes = [](const Tensor& tensor, int64_t index) {
    return static_cast<char*>(tensor.data_ptr()) + index * tensor[0].numel() * tensor.element_size();
  };
  std::vector<pagoda::LinearArguments> products;
  products.reserve(static_cast<size_t>(heads));
  pagoda::PackedLinear one;
  one.out_features = out_features;
  for (int64_t head = 0; head < heads; ++head) {
    one.weight = weight.narrow(0, head * panels, panels);
    products.push_back(one.arguments(dtype_of(x), bytes(by_head, head), tokens, inputs, bytes(output, head)));
  }
  pagoda::active_kernels().linear(products.data(), heads);
  return output.transpose(0, 1);
}

void pack(const Tensor& weight, const Tensor& packed) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "weight must be a contiguous [out_features, in_features]");
  const bool is_wide = weight.scalar_type() == at::kFloat;
  TORCH_CHECK(is_wide || (weight.scalar_type() == at::kBFloat16 && weight.size(1) % 2 == 0),
              "weight must be float32, or bfloat16 with an even number of inputs");
  const int64_t panels = (weight.size(0) + kPanel - 1) / kPanel, words = is_wide ? weight.size(1) : weight.size(1) / 2;
  if (is_wide) {
    check(packed, "packed", {panels, words, kPanel}, at::kFloat);
  } else {
    check(packed, "packed", {panels, words, kPanel, 2}, at::kBFloat16);
  }
  pagoda::active_kernels().pack({weight.const_data_ptr(), packed.mutable_data_ptr(), weight.size(0), words,
                                 at::get_num_threads()});
}

// Rows of a packed weight, as an embedding has them: ids [T] to [T, in_features], in float32 where asked.
Tensor packed_rows(const Tensor& weight, const Tensor& ids, int64_t num_rows, bool as_float) {
  check(ids, "ids", {ids.numel()}, at::kLong);
  TORCH_CHECK(weight.is_contiguous() && weight.dim() == (weight.scalar_type() == at::kFloat ? 3 : 4),
              "weight must be packed");
  const bool is_wide = weight.scalar_type() == at::kFloat;
  const int64_t words = weight.size(1), panel_words = words * kPanel, count = ids.numel();
  const auto type = is_wide || as_float ? at::kFloat : at::kBFloat16;
  Tensor rows = at::empty({count, is_wide ? words : 2 * words}, weight.options().dtype(type));
  const uint32_t* packed = static_cast<const uint32_t*>(weight.const_data_ptr());
  uint32_t* output = static_cast<uint32_t*>(rows.mutable_data_ptr());
  const int64_t* id = ids.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < count; ++t)
    TORCH_CHECK(id[t] >= 0 && id[t] < num_rows, "id ", id[t], " is not between 0 and ", num_rows - 1);
  at::parallel_for(0, count, 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const uint32_t* from = packed + id[t] / kPanel * panel_words + id[t] % kPanel;
      if (is_wide || !as_float) {
        for (int64_t w = 0; w < words; ++w) output[t * words + w] = from[w * kPanel];
      } else {
        for (int64_t w = 0; w < words; ++w) {
          output[2 * (t * words + w)] = from[w * kPanel] << 16;
          output[2 * (t * words + w) + 1] = from[w * kPanel] & 0xFFFF0000u;
        }
      }
    }
  });
  return rows;
}

void soft_cap(Tensor logits, double cap) {
  check(logits, "logits", {logits.size(0), logits.size(1)}, at::kFloat);
  TORCH_CHECK(cap > 0, "cap must be positive, not ", cap);
  pagoda::active_kernels().soft_cap({logits.mutable_data_ptr<float>(), logits.size(0), logits.size(1),
                                     static_cast<float>(cap), at::get_num_threads()});
}

std::tuple<Tensor, Tensor> greedy_sample(const Tensor& logits) {
  const int64_t rows = logits.size(0), size = logits.size(1);
  check(logits, "logits", {rows, size}, at::kFloat);
  TORCH_CHECK(size > 0 && size < (1 << 24), "a vocabulary of ", size, " is not between 1 and 2^24 - 1");
  Tensor ids = at::empty({rows}, logits.options().dtype(at::kLong)), best = at::empty({rows}, logits.options());
  pagoda::active_kernels().greedy({logits.const_data_ptr<float>(), ids.mutable_data_ptr<int64_t>(),
                                   best.mutable_data_ptr<float>(), rows, size, at::get_num_threads()});
  return {ids, best};
}

void apply_token_bitmask(Tensor logits, const Tensor& rows, const Tensor& bitmask) {
  const int64_t count = rows.size(0), words = bitmask.size(1), size = logits.size(1);
  check(logits, "logits", {logits.size(0), size}, at::kFloat);
  check(rows, "rows", {count}, at::kLong);
  check(bitmask, "bitmask", {count, words}, at::kInt);
  TORCH_CHECK(32 * words <= size, "bitmask has ", words, " words for a vocabulary of ", size);
  const int64_t* const row = rows.const_data_ptr<int64_t>();
  for (int64_t m = 0; m < count; ++m) {
    TORCH_CHECK(row[m] >= 0 && row[m] < logits.size(0), "rows has ", row[m], " of ", logits.size(0), " rows");
  }
  pagoda::active_kernels().token_bitmask({logits.mutable_data_ptr<float>(), row,
                                          reinterpret_cast<const uint32_t*>(bitmask.const_data_ptr<int32_t>()), count, words,
                                          size, at::get_num_threads()});
}

void use_level(const std::string& level) {
  TORCH_CHECK(pagoda::use_level(level), "this processor cannot run ", level);
}

}  // namespace

TORCH_LIBRARY(pagoda_cpu, m) {
  m.def("available_levels() -> str[]", &pagoda::available_levels);
  m.def("active_level() -> str", []() -> std::string { return pagoda::active_kernels().name; });
  m.def("use_level(str level) -> ()", &use_level);
  m.def(
      "gather_step(Tensor token_pool, Tensor block_table, int block_size, Tensor req_indices, Tensor query_start_loc, "
      "Tensor num_computed_tokens, Tensor(a!) input_ids, Tensor(b!) positions, Tensor(c!) slot_mapping, "
      "Tensor(d!) seq_lens, Tensor(e!) row_table) -> ()");
  m.def(
      "paged_attention(Tensor query, Tensor k_cache, Tensor v_cache, Tensor query_start_loc, Tensor seq_lens, "
      "Tensor block_table, float scale, int sliding_window, float soft_cap, Tensor? sinks) -> Tensor");
  m.def(
      "latent_attention(Tensor query, Tensor cache, int rank, Tensor query_start_loc, Tensor seq_lens, Tensor block_table, "
      "float scale) -> Tensor");
  m.def(
      "write_kv(Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()");
  m.def("apply_rotary(Tensor query, Tensor key, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)");
  m.def(
      "rotate_and_store(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor? query_norm, "
      "Tensor? key_norm, float eps, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, bool interleaved) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def("silu_and_mul(Tensor x) -> Tensor");
  m.def("gelu_and_mul(Tensor x) -> Tensor");
  m.def("clamped_swiglu_and_mul(Tensor x) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias, int out_features, ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "linear_quantized(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? block_scales, Tensor? bias, "
      "int out_features, int group_size, bool four_bits, ScalarType? out_dtype=None) -> Tensor");
  m.def("linear_heads(Tensor x, Tensor weight, int out_features) -> Tensor");
  m.def(
      "gated_delta_net(Tensor projected, Tensor gates, bool interleaved, Tensor conv_weight, Tensor decay_log, "
      "Tensor step_bias, Tensor norm_weight, float eps, int num_key_heads, Tensor(a!) first_states, Tensor(b!) other_states, "
      "Tensor(c!) conv_states, Tensor query_start_loc, Tensor seq_lens, Tensor block_table, int block_size) -> Tensor");
  m.def("pack(Tensor weight, Tensor(a!) packed) -> ()");
  m.def("soft_cap(Tensor(a!) logits, float cap) -> ()");
  m.def("greedy_sample(Tensor logits) -> (Tensor, Tensor)");
  m.def("apply_token_bitmask(Tensor(a!) logits, Tensor rows, Tensor bitmask) -> ()");
  m.def("packed_rows(Tensor weight, Tensor ids, int num_rows, bool as_float) -> Tensor");
  m.class_<pagoda::LoraBatch>("LoraBatch")
      .def(torch::init<>())
      .def("set", &pagoda::LoraBatch::set)
      .def("expect", &pagoda::LoraBatch::expect);
  m.class_<pagoda::LoraLinear>("LoraLinear")
      .def(torch::init<c10::intrusive_ptr<pagoda::LoraBatch>, int64_t, int64_t>())
      .def("set", &pagoda::LoraLinear::set)
      .def("clear", &pagoda::LoraLinear::clear)
      .def("add",
           static_cast<void (pagoda::LoraLinear::*)(const Tensor&, const Tensor&, const std::optional<Tensor>&) const>(
               &pagoda::LoraLinear::add),
           "", {torch::arg("x"), torch::arg("output"), torch::arg("rows") = c10::IValue()});
  m.class_<pagoda::Experts>("Experts")
      .def(torch::init<pagoda::PackedLinearTuple, std::optional<Tensor>, int64_t, int64_t, bool, double, int64_t, int64_t,
                       int64_t, int64_t>())
      .def("add_expert", &pagoda::Experts::add_expert)
      .def("set_shared", &pagoda::Experts::set_shared)
      .def("set_first_expert", &pagoda::Experts::set_first_expert)
      .def("set_load", &pagoda::Experts::set_load)
      .def("set_lora", &pagoda::Experts::set_lora)
      .def("set_shared_lora", &pagoda::Experts::set_shared_lora)
      .def("forward", &pagoda::Experts::forward);
  m.class_<pagoda::Decoder>("Decoder")
      .def(torch::init<double, Tensor>())
      .def("add_layer", &pagoda::Decoder::add_layer)
      .def("set_norms", &pagoda::Decoder::set_norms)
      .def("set_sinks", &pagoda::Decoder::set_sinks)
      .def("set_mlp", &pagoda::Decoder::set_mlp)
      .def("set_experts", &pagoda::Decoder::set_experts)
      .def("set_lora", &pagoda::Decoder::set_lora)
      .def("capture", &pagoda::Decoder::capture)
      .def("forward", &pagoda::Decoder::forward);
  m.class_<pagoda::Encoder>("Encoder")
      .def(torch::init<int64_t, int64_t, int64_t, double, bool, bool, std::string>())
      .def("set_embedding", &pagoda::Encoder::set_embedding)
      .def("set_relative_bias", &pagoda::Encoder::set_relative_bias)
      .def("set_final_norm", &pagoda::Encoder::set_final_norm)
      .def("add_layer", &pagoda::Encoder::add_layer)
      .def("forward", &pagoda::Encoder::forward);
}

TORCH_LIBRARY_IMPL(pagoda_cpu, CPU, m) {
  m.impl("gather_step", &pagoda::gather_step);
  m.impl("paged_attention", &paged_attention);
  m.impl("latent_attention", &latent_attention);
  m.impl("write_kv", &write_kv);
  m.impl("apply_rotary", &apply_rotary);
  m.impl("rotate_and_store", &rotate_and_store);
  m.impl("rms_norm", &rms_norm);
  m.impl("add_rms_norm", &add_rms_norm);
  m.impl("silu_and_mul", &silu_and_mul);
  m.impl("gelu_and_mul", &gelu_and_mul);
  m.impl("clamped_swiglu_and_mul", &clamped_swiglu_and_mul);
  m.impl("linear", &linear);
  m.impl("linear_quantized", &linear_quantized);
  m.impl("linear_heads", &linear_heads);
  m.impl("gated_delta_net", &gated_delta_net);
  m.impl("pack", &pack);
  m.impl("soft_cap", &soft_cap);
  m.impl("greedy_sample", &greedy_sample);
  m.impl("apply_token_bitmask", &apply_token_bitmask);
  m.impl("packed_rows", &packed_rows);
}
