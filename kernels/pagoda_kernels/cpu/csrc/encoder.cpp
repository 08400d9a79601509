#include "encoder.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <omp.h>

#include <algorithm>
#include <array>
#include <atomic>

#include "checks.h"
#include "dispatch.h"

namespace pagoda {
namespace {

PackedLinear unpack(const PackedLinearTuple& parts) {
  PackedLinear linear;
  std::tie(linear.weight, linear.bias, linear.scales, linear.zeros, linear.block_scales, linear.out_features,
           linear.group_size, linear.four_bits) = parts;
  return linear;
}

Activation activation_of(const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  TORCH_CHECK(name == "relu", "activation must be gelu, gelu_tanh, relu or silu, not ", name);
  return Activation::kRelu;
}

// Ids are indices into tables: one out of range would read foreign memory.
void check_range(const at::Tensor& ids, const char* name, int64_t size) {
  const int64_t* values = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i)
    TORCH_CHECK(values[i] >= 0 && values[i] < size, name, " has ", values[i], ", which is not below ", size);
}

// How the tokens of a step are divided among threads. Threads that wait for each other at every product lose most of a
// machine that they do not have for themselves.
struct Division {
  std::vector<int64_t> rows;  // whole rows, from each number to the next: a task; one number or none: they are not divided so
  bool shares_rows = false;   // each thread has as many tokens, of a row too; they meet once a layer, before attention
};

// Threads that meet. One that waits long sleeps: OpenMP's barrier spins meanwhile, and takes the core from the very thread that
// it waits for where others use the machine, too.
class Meeting {
 public:
  void wait(int team) {
    const int round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == team) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      round_.notify_all();
      return;
    }
    for (int spins = 0; spins < kSpins; ++spins) {
      if (round_.load(std::memory_order_acquire) != round) return;
      __builtin_ia32_pause();
    }
    while (round_.load(std::memory_order_acquire) == round) round_.wait(round, std::memory_order_acquire);
  }

 private:
  static constexpr int kSpins = 2000;  // some tens of microseconds
  std::atomic<int> arrived_{0}, round_{0};
};

// Fewer tokens a thread than this are not worth that each thread reads all weights.
constexpr int64_t kLeastTokens = 32;

Division divided(const int32_t* starts, int64_t num_rows, int threads) {
  const int64_t tokens = starts[num_rows];
  Division division;
  if (threads == 1 || tokens < kLeastTokens * threads) return division;
  // Many small tasks, so that no thread has long to wait for the last one, but not smaller than a tile's rows are worth.
  const int64_t wanted = std::max<int64_t>(2 * kLeastTokens, tokens / (8 * threads));
  division.rows.push_back(0);
  for (int64_t row = 0; row < num_rows; ++row)
    if (starts[row + 1] - starts[division.rows.back()] >= wanted || row + 1 == num_rows) division.rows.push_back(row + 1);
  if (static_cast<int64_t>(division.rows.size()) - 1 < 4 * threads) {
    division.rows.clear();
    division.shares_rows = true;
  }
  return division;
}

}  // namespace

Encoder::Encoder(int64_t num_heads, int64_t head_dim, int64_t intermediate_size, double epsilon, bool norm_first,
                 bool gated, const std::string& activation)
    : num_heads_(num_heads),
      head_dim_(head_dim),
      intermediate_size_(intermediate_size),
      epsilon_(static_cast<float>(epsilon)),
      norm_first_(norm_first),
      gated_(gated),
      activation_(activation_of(activation)) {}

void Encoder::check_norm(const LayerNormWeights& norm) const {
  if (norm.weight) check(*norm.weight, "norm", {words_.size(1)}, words_.scalar_type());
  if (norm.bias) check(*norm.bias, "norm_bias", {words_.size(1)}, words_.scalar_type());
}

void Encoder::set_embedding(const at::Tensor& words, const OptionalTensor& positions, const OptionalTensor& types,
                            const OptionalTensor& norm, const OptionalTensor& norm_bias) {
  check(words, "words", {words.size(0), words.size(1)}, words.scalar_type());
  if (positions) check(*positions, "positions", {positions->size(0), words.size(1)}, words.scalar_type());
  if (types) check(*types, "types", {types->size(0), words.size(1)}, words.scalar_type());
  words_ = words;
  positions_ = positions;
  types_ = types;
  embedding_norm_ = {norm, norm_bias};
  check_norm(embedding_norm_);
}

void Encoder::set_relative_bias(const at::Tensor& bias) {
  check(bias, "bias", {num_heads_, bias.size(1)}, at::kFloat);
  TORCH_CHECK(bias.size(1) % 2 == 1, "bias must have 2 * max_distance + 1 columns, not ", bias.size(1));
  relative_bias_ = bias;
}

void Encoder::set_final_norm(const at::Tensor& norm, const OptionalTensor& norm_bias) {
  final_norm_ = {norm, norm_bias};
  check_norm(final_norm_);
}

void Encoder::add_layer(const OptionalTensor& attention_norm, const OptionalTensor& attention_norm_bias,
                        const OptionalTensor& mlp_norm, const OptionalTensor& mlp_norm_bias, const PackedLinearTuple& qkv,
                        const PackedLinearTuple& output, const PackedLinearTuple& up, const PackedLinearTuple& down,
                        int64_t window, int64_t rotary) {
  layers_.push_back(EncoderLayer{{attention_norm, attention_norm_bias}, {mlp_norm, mlp_norm_bias}, unpack(qkv),
                                 unpack(output), unpack(up), unpack(down), window, rotary});
  const EncoderLayer& layer = layers_.back();
  check_norm(layer.attention_norm);
  check_norm(layer.mlp_norm);
  TORCH_CHECK(layer.qkv.out_features == 3 * num_heads_ * head_dim_ && layer.output.out_features == words_.size(1) &&
                  layer.up.out_features == (gated_ ? 2 : 1) * intermediate_size_ &&
                  layer.down.out_features == words_.size(1),
              "the layer's sizes do not fit the encoder's");
}

at::Tensor Encoder::forward(const at::Tensor& input_ids, const at::Tensor& positions, const OptionalTensor& type_ids,
                            const at::Tensor& query_start_loc, const std::vector<at::Tensor>& cosines,
                            const std::vector<at::Tensor>& sines) const {
  const int64_t tokens = input_ids.numel(), rows = query_start_loc.numel() - 1, size = words_.size(1);
  check(input_ids, "input_ids", {tokens}, at::kLong);
  check(positions, "positions", {tokens}, at::kLong);
  check(query_start_loc, "query_start_loc", {rows + 1}, at::kInt);
  check_range(input_ids, "input_ids", words_.size(0));
  if (positions_) check_range(positions, "positions", positions_->size(0));
  if (type_ids) {
    TORCH_CHECK(types_, "the encoder has no token types");
    check(*type_ids, "type_ids", {tokens}, at::kLong);
    check_range(*type_ids, "type_ids", types_->size(0));
  }
  TORCH_CHECK(cosines.size() == sines.size(), "cosines and sines must be as many");
  for (size_t i = 0; i < cosines.size(); ++i) {
    check(cosines[i], "cosines", {tokens, head_dim_ / 2}, at::kFloat);
    check(sines[i], "sines", {tokens, head_dim_ / 2}, at::kFloat);
  }
  const int32_t* starts = query_start_loc.const_data_ptr<int32_t>();
  TORCH_CHECK(starts[0] == 0 && starts[rows] == tokens, "query_start_loc must run from 0 to ", tokens);

  const Kernels& kernels = active_kernels();
  const DType dtype = dtype_of(words_);
  const int threads = at::get_num_threads();
  const Division division = divided(starts, rows, threads);
  const auto buffer = [&](int64_t columns) { return at::empty({tokens, columns}, words_.options()); };
  const at::Tensor stream = buffer(size), delta = buffer(size), attended = buffer(num_heads_ * head_dim_);
  const at::Tensor normed = norm_first_ ? buffer(size) : stream;
  const at::Tensor activated = buffer(intermediate_size_), up = gated_ ? buffer(2 * intermediate_size_) : activated;
  // Two where threads share rows: one may begin the next layer while another still attends in this one.
  const at::Tensor qkv = buffer(3 * num_heads_ * head_dim_);
  const at::Tensor other_qkv = division.shares_rows ? buffer(3 * num_heads_ * head_dim_) : qkv;

  // Checked here: nothing may be thrown among several threads.
  std::vector<std::array<LinearArguments, 4>> products;
  for (size_t index = 0; index < layers_.size(); ++index) {
    const EncoderLayer& layer = layers_[index];
    const auto of = [&](const PackedLinear& linear, const at::Tensor& x, const at::Tensor& output,
                        Activation activation = Activation::kNone) {
      LinearArguments a = linear.arguments(dtype, x.const_data_ptr(), tokens, x.size(1), output.mutable_data_ptr());
      a.activation = activation;
      return a;
    };
    const bool has_norm = layer.attention_norm.weight.has_value();
    TORCH_CHECK(has_norm || (norm_first_ && index == 0), "layer ", index, " needs a norm");
    TORCH_CHECK(layer.rotary < static_cast<int64_t>(cosines.size()), "the angles of rotary ", layer.rotary, " are missing");
    products.push_back({of(layer.qkv, norm_first_ && has_norm ? normed : stream, index % 2 == 0 ? qkv : other_qkv),
                        of(layer.output, attended, delta),
                        of(layer.up, normed, gated_ ? up : activated, gated_ ? Activation::kNone : activation_),
                        of(layer.down, activated, delta)});
  }

  // Norms, products and attention of the tokens `begin` to `end` - 1, which belong to the given rows.
  struct Part {
    int64_t first_row, last_row, begin, end;
    int num_threads;
  };
  const auto at_row = [&](const void* values, int64_t row, int64_t columns) {
    return static_cast<const char*>(values) + row * columns * words_.element_size();
  };
  const auto at_row_of = [&](const at::Tensor& tensor, int64_t row) {
    return const_cast<char*>(at_row(tensor.const_data_ptr(), row, tensor.size(1)));
  };
  const auto layer_norm = [&](const Part& part, const at::Tensor& x, const at::Tensor* residual,
                              const LayerNormWeights& weights, const at::Tensor& output, const at::Tensor* sum) {
    LayerNormArguments a{};
    a.dtype = dtype;
    a.x = at_row_of(x, part.begin);
    a.residual = residual == nullptr ? nullptr : at_row_of(*residual, part.begin);
    a.weight = weights.weight->const_data_ptr();
    a.bias = pointer_or_null(weights.bias);
    a.normed = at_row_of(output, part.begin);
    a.stream = sum == nullptr ? nullptr : at_row_of(*sum, part.begin);
    a.num_rows = part.end - part.begin;
    a.size = size;
    a.epsilon = epsilon_;
    a.num_threads = part.num_threads;
    kernels.layer_norm(a);
  };
  const auto multiply = [&](const Part& part, LinearArguments a, const at::Tensor& x, const at::Tensor& output) {
    a.x = at_row_of(x, part.begin);
    a.output = at_row_of(output, part.begin);
    a.num_rows = part.end - part.begin;
    a.num_threads = part.num_threads;
    run_linear(a);
  };
  // `wait` returns when the keys and values of all rows are there.
  const auto run = [&](const Part& part, const auto& wait) {
    EmbeddingArguments e{};
    e.dtype = dtype;
    e.words = words_.const_data_ptr();
    e.positions = pointer_or_null(positions_);
    e.types = pointer_or_null(types_);
    e.ids = input_ids.const_data_ptr<int64_t>() + part.begin;
    e.position_ids = positions.const_data_ptr<int64_t>() + part.begin;
    e.type_ids = type_ids ? type_ids->const_data_ptr<int64_t>() + part.begin : nullptr;
    e.output = at_row_of(stream, part.begin);
    e.num_rows = part.end - part.begin;
    e.size = size;
    e.num_threads = part.num_threads;
    kernels.embedding(e);
    if (embedding_norm_.weight) layer_norm(part, stream, nullptr, embedding_norm_, stream, nullptr);
    for (size_t index = 0; index < layers_.size(); ++index) {
      const EncoderLayer& layer = layers_[index];
      const at::Tensor& own_qkv = index % 2 == 0 ? qkv : other_qkv;
      // With the norm first, what the layer below added to the stream waits in `delta` to be added in the same pass.
      const at::Tensor* pending = norm_first_ && index > 0 ? &delta : nullptr;
      const at::Tensor* input = &stream;
      if (norm_first_ && layer.attention_norm.weight) {
        layer_norm(part, stream, pending, layer.attention_norm, normed, pending == nullptr ? nullptr : &stream);
        input = &normed;
      }
      multiply(part, products[index][0], *input, own_qkv);
      wait();

      RaggedAttentionArguments a{};
      a.dtype = dtype;
      a.qkv = own_qkv.const_data_ptr();
      a.output = attended.mutable_data_ptr();
      a.query_start_loc = starts + part.first_row;
      if (layer.rotary >= 0) {
        a.cosines = cosines[layer.rotary].const_data_ptr<float>();
        a.sines = sines[layer.rotary].const_data_ptr<float>();
      }
      if (relative_bias_) {
        a.relative_bias = relative_bias_->const_data_ptr<float>();
        a.max_distance = relative_bias_->size(1) / 2;
      }
      a.num_rows = part.last_row - part.first_row;
      a.num_heads = num_heads_;
      a.head_dim = head_dim_;
      a.window = layer.window;
      a.first_query = part.begin;
      a.last_query = part.end;
      a.scale = 1.0f / __builtin_sqrtf(static_cast<float>(head_dim_));
      a.num_threads = part.num_threads;
      kernels.ragged_attention(a);

      multiply(part, products[index][1], attended, delta);
      if (norm_first_) {
        layer_norm(part, delta, &stream, layer.mlp_norm, normed, &stream);
      } else {
        layer_norm(part, delta, &stream, layer.attention_norm, stream, nullptr);
      }
      multiply(part, products[index][2], normed, gated_ ? up : activated);
      if (gated_) {
        GatedActivationArguments g{};
        g.dtype = dtype;
        g.activation = activation_;
        g.x = at_row_of(up, part.begin);
        g.output = at_row_of(activated, part.begin);
        g.num_rows = part.end - part.begin;
        g.size = intermediate_size_;
        g.num_threads = part.num_threads;
        kernels.gated_activation(g);
      }
      multiply(part, products[index][3], activated, delta);
      if (!norm_first_) layer_norm(part, delta, &stream, layer.mlp_norm, stream, nullptr);
    }
  };

  if (division.rows.size() > 1) {
    std::atomic<size_t> next = 0;
#pragma omp parallel num_threads(threads)
    for (size_t task = next++; task + 1 < division.rows.size(); task = next++) {
      const int64_t first = division.rows[task], last = division.rows[task + 1];
      run(Part{first, last, starts[first], starts[last], 1}, [] {});
    }
  } else if (division.shares_rows) {
    Meeting meeting;
#pragma omp parallel num_threads(threads)
    {
      const int64_t team = omp_get_num_threads(), own = omp_get_thread_num();
      const int64_t begin = own * tokens / team, end = (own + 1) * tokens / team;
      const int64_t first = std::upper_bound(starts, starts + rows + 1, begin) - starts - 1;
      const int64_t last = std::lower_bound(starts, starts + rows + 1, end) - starts;
      run(Part{first, last, begin, end, 1}, [&] { meeting.wait(static_cast<int>(team)); });
    }
  } else {
    run(Part{0, rows, 0, tokens, threads}, [] {});
  }
  const Part whole{0, rows, 0, tokens, threads};
  if (norm_first_ && !layers_.empty()) stream.add_(delta);
  if (final_norm_.weight) layer_norm(whole, stream, nullptr, final_norm_, stream, nullptr);
  return stream;
}

}  // namespace pagoda
