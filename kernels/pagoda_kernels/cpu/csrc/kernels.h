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
  void* output;             // [T, num_heads, value_dim]
  const void* k_cache;      // [num_blocks, num_kv_heads, block_size, head_dim]
  const void* v_cache;      // like k_cache, or the same
  const float* sinks;       // [num_heads] or null
  const int32_t* query_start_loc;  // [num_rows + 1]
  const int32_t* seq_lens;         // [num_rows]
  const int32_t* block_table;      // [num_rows, table_stride]
  int64_t table_stride;
  int64_t num_rows;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t value_dim;  // values are the first that many numbers of what v_cache has of a token
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
  const void* weight;    // [size], of the dtype, or float32
  bool float32_weight;   // the product with the weight is rounded, and nothing before it
  void* normed;
  void* stream;
  int64_t num_rows;
  int64_t size;
  float epsilon;
  int num_threads;
};

// kGelu: by the error function; kClampedSwiglu: gpt-oss's, of a gate and its other half.
enum class Activation : int32_t { kNone, kSilu, kGeluTanh, kGelu, kRelu, kClampedSwiglu };

// out[t, i] = activation(x[t, i]) * x[t, size + i]; see KernelBackend for each activation.
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
  bool float32_norm;       // the weights of the norms are float32; see NormArguments
  float epsilon;
  const float* cosines;  // [T, rotary_dim / 2] or null
  const float* sines;    // like cosines
  int64_t rotary_dim;    // of each head, the dimensions that are turned
  bool interleaved;      // dimension 2i is turned with 2i + 1, not with rotary_dim / 2 + i
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

// output = activation(x @ weight.T + bias).
struct LinearArguments {
  DType dtype;         // of x and bias: float32 or bfloat16
  DType output_dtype;  // the same, or float32
  WeightKind kind;
  const void* x;         // [num_rows, in_features]
  const void* weight;    // packed
  const void* scales;    // of quantized weights: [panels, num_groups, 32], of scale_dtype, or int8_t with block_scales
  const uint8_t* zeros;  // likewise; null: the middle of the range
  const void* mins;      // or, of the type of scales, what a stored 0 stands for: zeros is null then
  DType scale_dtype;     // float32 or half
  const void* block_scales;  // or null: Half [panels, num_groups / block_groups, 1, or 2 with mins, 32], to be multiplied by
  int64_t block_groups;      // groups of a block
  const void* bias;      // [out_features] or null
  void* output;          // [num_rows, out_features]
  int64_t num_rows;
  int64_t in_features;
  int64_t out_features;
  int64_t group_size;  // of quantized weights: inputs that share a scale
  int num_threads;
  Activation activation;  // of the float32 sums, before they are rounded
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

// LayerNorm (Ba et al., 2016) of x + residual; with `stream`, that sum is written there, too.
struct LayerNormArguments {
  DType dtype;
  const void* x;         // [num_rows, size], as all others but weight and bias
  const void* residual;  // or null
  const void* weight;    // [size]
  const void* bias;      // [size] or null
  void* normed;          // may be x or residual
  void* stream;          // or null; may be x or residual
  int64_t num_rows;
  int64_t size;
  float epsilon;
  int num_threads;
};

// output[t] = words[ids[t]] + positions[position_ids[t]] + types[type_ids[t]], each of the last two where it is given.
struct EmbeddingArguments {
  DType dtype;
  const void* words;  // [vocabulary, size]
  const void* positions;
  const void* types;
  const int64_t* ids;           // [num_rows]
  const int64_t* position_ids;  // [num_rows]
  const int64_t* type_ids;      // [num_rows], or null: all 0
  void* output;                 // [num_rows, size]
  int64_t num_rows;
  int64_t size;
  int num_threads;
};

// Attention of every token of a row over all tokens of its row, before and after it; keys and values are those of this step.
struct RaggedAttentionArguments {
  DType dtype;
  const void* qkv;                 // [T, 3, num_heads, head_dim]
  void* output;                    // [T, num_heads, head_dim]
  const int32_t* query_start_loc;  // [num_rows + 1]
  const float* cosines;            // [T, head_dim / 2], or null: no rotation
  const float* sines;
  const float* relative_bias;  // [num_heads, 2 * max_distance + 1], added to the scores by key's minus query's position; or null
  int64_t max_distance;        // farther ones have the bias of this distance
  int64_t num_rows;
  int64_t num_heads;
  int64_t head_dim;
  int64_t window;  // a token sees those at most so far from it; 0: all
  int64_t first_query, last_query;  // tokens that attend: from the first to before the last
  float scale;
  int num_threads;
};

// value = cap * tanh(value / cap), in place.
struct SoftCapArguments {
  float* values;  // [num_rows, size]
  int64_t num_rows;
  int64_t size;
  float cap;
  int num_threads;
};

// A gated delta net behind its projections; see KernelBackend.gated_delta_net. All but projections and output are float32.
struct DeltaNetArguments {
  DType dtype;            // of projected and output
  const void* projected;  // [T, projected_stride]: queries, keys, values and output gates
  int64_t projected_stride;
  const float* gates;        // [T, 2 * num_value_heads]: write gates and steps
  bool interleaved;          // both key head by key head
  const float* conv_weight;  // [conv_size, channels]
  const float* decay_log;    // [num_value_heads]
  const float* step_bias;    // [num_value_heads]
  const float* norm_weight;  // [value_dim]
  void* output;              // [T, num_value_heads, value_dim]
  // A block's state begins *_stride elements after that of the block before.
  float* first_states;  // [num_blocks, num_first_heads, key_dim, value_dim]
  float* other_states;  // [num_blocks, num_value_heads - num_first_heads, key_dim, value_dim]
  float* conv_states;   // [num_blocks, conv_size - 1, channels]
  int64_t first_stride;
  int64_t other_stride;
  int64_t conv_stride;
  int64_t num_first_heads;
  const int32_t* query_start_loc;  // [num_rows + 1]
  const int32_t* seq_lens;         // [num_rows]
  const int32_t* block_table;      // [num_rows, table_stride]
  int64_t table_stride;
  int64_t num_rows;
  int64_t num_key_heads;
  int64_t num_value_heads;  // a multiple of num_key_heads
  int64_t key_dim;
  int64_t value_dim;
  int64_t conv_size;
  int64_t block_size;
  float epsilon;
  int num_threads;
};

// Adapters of one linear layer. What B is multiplied by, x @ A, is kept in parts: one for each `kLoraChunk` inputs.
constexpr int64_t kLoraAlignment = 16;  // of ranks: a vector of every instruction set
constexpr int64_t kLoraChunk = 512;     // inputs
constexpr int64_t kLoraRows = 24;       // of a task
constexpr int64_t kLoraColumns = 512;   // outputs of a task

// Where the outputs of one of the layers that are fused lie, and what is added to them: scale * (x @ A) @ B.
struct LoraPart {
  const void* b;  // [columns_padded / 32, rank, 32]
  int64_t rank;
  int64_t first;   // column of A at which its ranks begin
  int64_t column;  // of the output at which it begins
  int64_t columns;
  int64_t columns_padded;
  float scale;
};

struct LoraAdapter {
  DType dtype;    // of A and B: float32 or bfloat16
  const void* a;  // [in_features, rank_padded], the ranks of all parts after each other
  int64_t rank_padded;
  const LoraPart* parts;
  int64_t num_parts;
};

// Some rows of one adapter: `rows` of x and output, `first_row` and on of what is shrunk.
struct LoraTask {
  const LoraAdapter* adapter;
  const int32_t* rows;
  int64_t first_row;
  int64_t num_rows;
  int64_t part;    // to shrink: which chunk of inputs; to expand: which of the fused layers
  int64_t column;  // to expand: from this one of the part's on
};

struct LoraShrinkArguments {
  DType dtype;    // of x: float32 or bfloat16
  const void* x;  // [T, in_features]
  float* output;  // [rows of all adapters, num_chunks, rank_stride]
  const LoraTask* tasks;
  int64_t num_tasks;
  int64_t in_features;
  int64_t num_chunks;
  int64_t rank_stride;
  int64_t cost;
  int num_threads;
};

struct LoraExpandArguments {
  DType dtype;  // of output: float32 or bfloat16
  const float* shrunk;
  void* output;  // [T, out_features]: added to
  const LoraTask* tasks;
  int64_t num_tasks;
  int64_t out_features;
  int64_t num_chunks;
  int64_t rank_stride;
  int64_t cost;
  int num_threads;
};

struct TokenBitmaskArguments {
  float* logits;         // [R, size]: minus infinity where the bit of a token is not set
  const int64_t* rows;   // [count] of R
  const uint32_t* mask;  // [count, words], 32 * words <= size
  int64_t count;
  int64_t words;
  int64_t size;
  int num_threads;
};

struct Kernels {
  const char* name;
  void (*attention)(const AttentionArguments&);
  void (*norm)(const NormArguments&);
  void (*gated_activation)(const GatedActivationArguments&);
  void (*heads)(const HeadsArguments&);
  void (*greedy)(const GreedyArguments&);
  // One product, or several of the same kinds, types and numbers of inputs as one: the rows of x, and of the output, of each follow those
  // of the one before, and their tasks are shared by all threads together.
  void (*linear)(const LinearArguments*, int64_t);            // kFloat32, kBFloat16
  void (*linear_quantized)(const LinearArguments*, int64_t);  // kInt8, kInt4
  void (*pack)(const PackArguments&);
  void (*layer_norm)(const LayerNormArguments&);
  void (*embedding)(const EmbeddingArguments&);
  void (*ragged_attention)(const RaggedAttentionArguments&);
  void (*soft_cap)(const SoftCapArguments&);
  void (*delta_net)(const DeltaNetArguments&);
  void (*lora_shrink)(const LoraShrinkArguments&);
  void (*lora_expand)(const LoraExpandArguments&);
  void (*token_bitmask)(const TokenBitmaskArguments&);
};

#define PAGODA_DECLARE_KERNELS(isa)                       \
  namespace isa {                                         \
  void attention(const AttentionArguments&);              \
  void norm(const NormArguments&);                        \
  void gated_activation(const GatedActivationArguments&); \
  void heads(const HeadsArguments&);                      \
  void greedy(const GreedyArguments&);                    \
  void linear(const LinearArguments*, int64_t);           \
  void linear_quantized(const LinearArguments*, int64_t); \
  void pack(const PackArguments&);                        \
  void layer_norm(const LayerNormArguments&);             \
  void embedding(const EmbeddingArguments&);              \
  void ragged_attention(const RaggedAttentionArguments&); \
  void soft_cap(const SoftCapArguments&);                 \
  void delta_net(const DeltaNetArguments&);               \
  void lora_shrink(const LoraShrinkArguments&);           \
  void lora_expand(const LoraExpandArguments&);           \
  void token_bitmask(const TokenBitmaskArguments&);       \
  }

PAGODA_DECLARE_KERNELS(avx2)
PAGODA_DECLARE_KERNELS(avx512)
PAGODA_DECLARE_KERNELS(avx512_vnni)
PAGODA_DECLARE_KERNELS(avx512_bf16)

#undef PAGODA_DECLARE_KERNELS

}  // namespace pagoda
