#include "step.h"

#include <algorithm>

#include "checks.h"

namespace pagoda {

void gather_step(const at::Tensor& token_pool, const at::Tensor& block_table, int64_t block_size, const at::Tensor& req_indices,
                 const at::Tensor& query_start_loc, const at::Tensor& num_computed_tokens, const at::Tensor& input_ids,
                 const at::Tensor& positions, const at::Tensor& slot_mapping, const at::Tensor& seq_lens,
                 const at::Tensor& row_table) {
  const int64_t rows = req_indices.size(0), all_rows = seq_lens.size(0), all_tokens = input_ids.size(0);
  const int64_t max_num_reqs = token_pool.size(0), length = token_pool.size(1), blocks = block_table.size(1);
  const int64_t columns = row_table.size(1), stride = row_table.stride(0);
  check(token_pool, "token_pool", {max_num_reqs, length}, at::kLong);
  check(block_table, "block_table", {max_num_reqs, blocks}, at::kInt);
  check(req_indices, "req_indices", {rows}, at::kLong);
  check(query_start_loc, "query_start_loc", {query_start_loc.numel()}, at::kInt);
  check(num_computed_tokens, "num_computed_tokens", {rows}, at::kLong);
  check(input_ids, "input_ids", {all_tokens}, at::kLong);
  check(positions, "positions", {all_tokens}, at::kLong);
  check(slot_mapping, "slot_mapping", {all_tokens}, at::kLong);
  check(seq_lens, "seq_lens", {all_rows}, at::kInt);
  TORCH_CHECK(row_table.scalar_type() == at::kInt && row_table.size(0) == all_rows && row_table.stride(1) == 1,
              "the rows' block table must be int32 [", all_rows, ", columns]");
  TORCH_CHECK(rows <= all_rows && columns <= blocks && query_start_loc.numel() > rows, "there is no room for ", rows,
              " rows of ", columns, " blocks");
  const int64_t* pool = token_pool.const_data_ptr<int64_t>();
  const int32_t* tables = block_table.const_data_ptr<int32_t>();
  const int64_t* index_of = req_indices.const_data_ptr<int64_t>();
  const int64_t* computed = num_computed_tokens.const_data_ptr<int64_t>();
  const int32_t* start = query_start_loc.const_data_ptr<int32_t>();
  int64_t* ids = input_ids.mutable_data_ptr<int64_t>();
  int64_t* places = positions.mutable_data_ptr<int64_t>();
  int64_t* mapping = slot_mapping.mutable_data_ptr<int64_t>();
  int32_t* lengths = seq_lens.mutable_data_ptr<int32_t>();
  int32_t* row_tables = row_table.mutable_data_ptr<int32_t>();
  TORCH_CHECK(start[rows] + all_rows - rows == all_tokens, "there is room for ", all_tokens, " tokens, not for ",
              start[rows] + all_rows - rows);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t req_index = index_of[row], first = computed[row], end = first + start[row + 1] - start[row];
    TORCH_CHECK(req_index >= 0 && req_index < max_num_reqs && first >= 0 && end <= length && end <= blocks * block_size,
                "request slot ", req_index,
                " has no positions ", first, " to ", end);
    const int32_t* table = tables + req_index * blocks;
    int64_t token = start[row];
    for (int64_t position = first; position < end; ++position, ++token) {
      ids[token] = pool[req_index * length + position];
      places[token] = position;
      mapping[token] = table[position / block_size] * block_size + position % block_size;
    }
    lengths[row] = static_cast<int32_t>(end);
    std::copy_n(table, columns, row_tables + row * stride);
  }
  for (int64_t row = rows, token = start[rows]; row < all_rows; ++row, ++token) {
    ids[token] = places[token] = mapping[token] = 0;
    lengths[row] = 1;
    std::fill_n(row_tables + row * stride, columns, 0);
  }
}

}  // namespace pagoda
