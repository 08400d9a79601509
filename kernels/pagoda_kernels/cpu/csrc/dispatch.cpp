#include "dispatch.h"

namespace pagoda {
namespace {

struct Level {
  Kernels kernels;
  bool (*is_supported)();
  bool (*is_fast)();  // null: where it is supported
};

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512_bf16() {
#if defined(PAGODA_EMULATE_BF16_DOT)
  return has_avx512_vnni();
#else
  return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16");
#endif
}

// Intel's cores (Sapphire and Emerald Rapids) begin a product of bfloat16 pairs every other cycle, 89 GFLOP/s of one at 2.8 GHz, and
// two of float32 every cycle, 179: there bfloat16 weights are widened. AMD's (Zen 4) multiply pairs at twice the rate of float32.
bool multiplies_bf16_fast() { return !__builtin_cpu_is("intel"); }

// Slowest first. A level brings kernels of its own only where its instructions make a difference.
const Level kLevels[] = {
    {{"avx2", avx2::attention, avx2::norm, avx2::gated_activation, avx2::heads, avx2::greedy, avx2::linear, avx2::linear_quantized,
      avx2::pack, avx2::layer_norm, avx2::embedding, avx2::ragged_attention, avx2::soft_cap, avx2::delta_net,
      avx2::lora_shrink, avx2::lora_expand, avx2::token_bitmask},
     has_avx2,
     nullptr},
    {{"avx512", avx512::attention, avx512::norm, avx512::gated_activation, avx512::heads, avx512::greedy, avx512::linear,
      avx512::linear_quantized, avx512::pack, avx512::layer_norm, avx512::embedding, avx512::ragged_attention, avx512::soft_cap, avx512::delta_net,
      avx512::lora_shrink, avx512::lora_expand, avx512::token_bitmask},
     has_avx512,
     nullptr},
    {{"avx512_vnni", avx512::attention, avx512::norm, avx512::gated_activation, avx512::heads, avx512::greedy, avx512::linear,
      avx512_vnni::linear_quantized, avx512::pack, avx512::layer_norm, avx512::embedding, avx512::ragged_attention, avx512::soft_cap, avx512::delta_net,
      avx512::lora_shrink, avx512::lora_expand, avx512::token_bitmask},
     has_avx512_vnni,
     nullptr},
    {{"avx512_bf16", avx512_bf16::attention, avx512::norm, avx512::gated_activation, avx512::heads, avx512::greedy,
      avx512_bf16::linear, avx512_vnni::linear_quantized, avx512::pack, avx512::layer_norm, avx512::embedding, avx512::ragged_attention, avx512::soft_cap, avx512::delta_net,
      avx512::lora_shrink, avx512::lora_expand, avx512::token_bitmask},
     has_avx512_bf16,
     multiplies_bf16_fast},
};

const Level* fastest_level() {
  const Level* fastest = nullptr;
  for (const Level& level : kLevels)
    if (level.is_supported() && (level.is_fast == nullptr || level.is_fast())) fastest = &level;
  return fastest;
}

const Level* active_level = fastest_level();

}  // namespace

const Kernels& active_kernels() { return active_level->kernels; }

std::vector<std::string> available_levels() {
  std::vector<std::string> names;
  for (const Level& level : kLevels)
    if (level.is_supported()) names.emplace_back(level.kernels.name);
  return names;
}

bool use_level(const std::string& name) {
  for (const Level& level : kLevels) {
    if (name == level.kernels.name && level.is_supported()) {
      active_level = &level;
      return true;
    }
  }
  return false;
}

}  // namespace pagoda
