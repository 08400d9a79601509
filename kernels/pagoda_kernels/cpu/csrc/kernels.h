// What the kernels of every instruction set are called with. Plain structures and pointers: no torch here, so that kernels
// compile in seconds and share no inline function with anything else.
#pragma once

#include <cstdint>

namespace pagoda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

enum class DType : int32_t { kFloat32, kBFloat16, kHalf };

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Attention over paged keys and values; see KernelBackend.paged_attention and AttentionMetadata (pagoda_kernels).
struct AttentionArguments {
  DType dtype;              // of query, caches and output
  const void* query;        // [T, num_heads, head_dim]
  void* output;             // like query
  const void* k_cache;      // [num_blocks, num_kv_heads, block_size, head_dim]
  const void* v_cache;      // like k_cache
  const int32_t* query_start_loc;  // [num_rows + 1]
  const int32_t* seq_lens;         // [num_rows]
  const int32_t* block_table;      // [num_rows, table_stride]
  int64_t table_stride;
  int64_t num_rows;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t block_size;
  int64_t sliding_window;  // 0: none
  float scale;
  float soft_cap;  // 0: none
  int num_threads;
};

// normed = rms_norm(x + residual) * weight, with stream = x + residual. Without a residual, stream is not written.
struct NormArguments {
  DType dtype;
  const void* x;         // [num_rows, size], as all others but weight
  const void* residual;  // or null
  const void* weight;    // [size]
  void* normed;
  void* stream;
  int64_t num_rows;
  int64_t size;
  float epsilon;
  int num_threads;
};

enum class Activation : int32_t { kSilu, kGelu };  // GELU in its tanh form

// out[t, i] = activation(x[t, i]) * x[t, size + i].
struct GatedActivationArguments {
  DType dtype;
  Activation activation;
  const void* x;  // [num_rows, 2 * size]
  void* output;   // [num_rows, size]
  int64_t num_rows;
  int64_t size;
  int num_threads;
};

// From the fused projection to attention: norm of queries and keys where their weights are given, rotation where cosines are,
// keys and values into the cache. Each part can be left out with a null pointer.
struct HeadsArguments {
  DType dtype;
  const void* query;  // [T, num_heads, head_dim]; a token's row begins query_stride elements after the one before
  const void* key;    // [T, num_kv_heads, head_dim]
  const void* value;  // or null: only rotate
  int64_t query_stride;
  int64_t key_stride;
  int64_t value_stride;
  const void* query_norm;  // [head_dim] or null
  const void* key_norm;    // [head_dim] or null
  float epsilon;
  const float* cosines;  // [T, head_dim / 2] or null
  const float* sines;    // like cosines
  void* query_output;    // [T, num_heads, head_dim] or null
  void* key_output;      // [T, num_kv_heads, head_dim], or null: into the cache
  void* k_cache;         // [num_blocks, num_kv_heads, block_size, head_dim]
  void* v_cache;
  const int64_t* slot_mapping;  // [T]
  int64_t num_tokens;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t block_size;
  int num_threads;
};

// How a linear layer's weight is packed; the layouts are drawn in pagoda_kernels/reference/linear.py.
enum class WeightKind : int32_t { kFloat32, kBFloat16, kInt8, kInt4 };

// output = x @ weight.T + bias.
struct LinearArguments {
  DType dtype;  // of x, bias and output: float32 or bfloat16
  WeightKind kind;
  const void* x;         // [num_rows, in_features]
  const void* weight;    // packed
  const float* scales;   // of quantized weights: [num_groups, out_features rounded up to whole panels]
  const uint8_t* zeros;  // likewise; null: the middle of the range
  const void* bias;      // [out_features] or null
  void* output;          // [num_rows, out_features]
  int64_t num_rows;
  int64_t in_features;
  int64_t out_features;
  int64_t group_size;  // of quantized weights: inputs that share a scale
  int num_threads;
};

// From a weight as a checkpoint has it to panels of packed float32 or bfloat16: rows of 32-bit words (a float32, or a pair of
// bfloat16), 32 of them side by side.
struct PackArguments {
  const void* weight;  // [num_rows, row_words]
  void* packed;        // [panels, row_words, 32]
  int64_t num_rows;
  int64_t row_words;
  int num_threads;
};

// The greatest logit of each row, NaN where there is one, and the lowest id that has it.
struct GreedyArguments {
  const float* logits;  // [num_rows, size]
  int64_t* ids;         // [num_rows]
  float* best;          // [num_rows]
  int64_t num_rows;
  int64_t size;  // less than 2^24
  int num_threads;
};

struct Kernels {
  const char* name;
  void (*attention)(const AttentionArguments&);
  void (*norm)(const NormArguments&);
  void (*gated_activation)(const GatedActivationArguments&);
  void (*heads)(const HeadsArguments&);
  void (*greedy)(const GreedyArguments&);
  void (*linear)(const LinearArguments&);            // kFloat32, kBFloat16
  void (*linear_quantized)(const LinearArguments&);  // kInt8, kInt4
  void (*pack)(const PackArguments&);
};

#define PAGODA_DECLARE_KERNELS(isa)                       \
  namespace isa {                                         \
  void attention(const AttentionArguments&);              \
  void norm(const NormArguments&);                        \
  void gated_activation(const GatedActivationArguments&); \
  void heads(const HeadsArguments&);                      \
  void greedy(const GreedyArguments&);                    \
  void linear(const LinearArguments&);                    \
  void linear_quantized(const LinearArguments&);          \
  void pack(const PackArguments&);                        \
  }

PAGODA_DECLARE_KERNELS(avx2)
PAGODA_DECLARE_KERNELS(avx512)
PAGODA_DECLARE_KERNELS(avx512_vnni)
PAGODA_DECLARE_KERNELS(avx512_bf16)

#undef PAGODA_DECLARE_KERNELS

}  // namespace pagoda
