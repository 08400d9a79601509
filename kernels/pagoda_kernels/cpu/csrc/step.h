// The inputs of a step from the tables of all requests.
#pragma once

#include <ATen/core/Tensor.h>

namespace pagoda {

// See KernelBackend.gather_step (pagoda_kernels/interface.py); the last five are filled.
void gather_step(const at::Tensor& token_pool, const at::Tensor& block_table, int64_t block_size, const at::Tensor& req_indices,
                 const at::Tensor& query_start_loc, const at::Tensor& num_computed_tokens, const at::Tensor& input_ids,
                 const at::Tensor& positions, const at::Tensor& slot_mapping, const at::Tensor& seq_lens,
                 const at::Tensor& row_table);

}  // namespace pagoda
