#include "lora.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "checks.h"
#include "dispatch.h"

namespace pagoda {
namespace {

constexpr int64_t kPanel = 32;
// One row's work is about what waking a thread costs. Two save half of it.
constexpr int64_t kShare = 2;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory that is kept from call to call.
template <class T>
T* reserve(std::vector<T>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(static_cast<size_t>(size));
  return buffer.data();
}

}  // namespace

void LoraBatch::set(const std::optional<at::Tensor>& slots) {
  groups_.clear();
  rows_.clear();
  num_tokens_ = 0;
  if (!slots) return;
  num_tokens_ = slots->size(0);
  check(*slots, "slots", {num_tokens_}, at::kInt);
  const int32_t* slot = slots->const_data_ptr<int32_t>();
  std::vector<int32_t> order;
  for (int64_t row = 0; row < num_tokens_; ++row)
    if (slot[row] >= 0) order.push_back(static_cast<int32_t>(row));
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return slot[a] < slot[b]; });
  for (size_t at = 0; at < order.size(); ++at) {
    if (groups_.empty() || groups_.back().slot != slot[order[at]])
      groups_.push_back({slot[order[at]], static_cast<int64_t>(at), 0});
    ++groups_.back().num_rows;
  }
  rows_ = std::move(order);
}

LoraLinear::LoraLinear(c10::intrusive_ptr<LoraBatch> batch, int64_t in_features, int64_t out_features)
    : batch_(std::move(batch)), in_features_(in_features), out_features_(out_features) {}

void LoraLinear::set(int64_t slot, const at::Tensor& a, const std::vector<at::Tensor>& b, const std::vector<int64_t>& columns,
                     const std::vector<int64_t>& widths, const std::vector<double>& scales) {
  TORCH_CHECK(slot >= 0 && slot < 1 << 20, "slot ", slot);
  TORCH_CHECK(!b.empty() && b.size() == columns.size() && b.size() == widths.size() && b.size() == scales.size(),
              "a B, a column, a width and a scale for each part are needed");
  const at::ScalarType type = a.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "A and B must be float32 or bfloat16, not ", type);
  TORCH_CHECK(a.dim() == 2 && a.size(1) % kLoraAlignment == 0, "A must be [in_features, a multiple of ", kLoraAlignment, "]");
  check(a, "A", {in_features_, a.size(1)}, type);
  Adapter adapter;
  adapter.a = a;
  adapter.b = b;
  int64_t first = 0;
  for (size_t index = 0; index < b.size(); ++index) {
    TORCH_CHECK(b[index].dim() == 3, "B must be [panels, rank, ", kPanel, "]");
    const int64_t rank = b[index].size(1), panels = ceil_div(widths[index], kPanel);
    check(b[index], "B", {panels, rank, kPanel}, type);
    TORCH_CHECK(rank > 0 && columns[index] >= 0 && widths[index] > 0 && columns[index] + widths[index] <= out_features_,
                "a part does not fit the outputs");
    adapter.parts.push_back({b[index].const_data_ptr(), rank, first, columns[index], widths[index], panels * kPanel,
                             static_cast<float>(scales[index])});
    first += rank;
  }
  TORCH_CHECK(first <= a.size(1), "the ranks of all parts are more than A has");
  if (static_cast<int64_t>(adapters_.size()) <= slot) adapters_.resize(static_cast<size_t>(slot) + 1);
  std::optional<Adapter>& place = adapters_[static_cast<size_t>(slot)];
  place = std::move(adapter);
  place->view = {dtype_of(a), a.const_data_ptr(), a.size(1), place->parts.data()};
}

void LoraLinear::clear(int64_t slot) {
  if (slot >= 0 && slot < static_cast<int64_t>(adapters_.size())) adapters_[static_cast<size_t>(slot)].reset();
}

void LoraLinear::add(const at::Tensor& x, const at::Tensor& output) const {
  if (batch_->groups().empty()) return;
  check(x, "x", {x.size(0), in_features_}, x.scalar_type());
  check(output, "output", {x.size(0), out_features_}, x.scalar_type());
  add(dtype_of(x), x.const_data_ptr(), output.mutable_data_ptr(), x.size(0));
}

void LoraLinear::add(DType dtype, const void* x, void* output, int64_t num_rows) const {
  const std::vector<LoraBatch::Group>& groups = batch_->groups();
  if (groups.empty()) return;
  TORCH_CHECK(num_rows == batch_->num_tokens(), "the step's adapters are set for ", batch_->num_tokens(), " rows, not ", num_rows);
  TORCH_CHECK(dtype != DType::kHalf, "adapters are added to float32 and bfloat16 outputs");
  static thread_local std::vector<LoraTask> shrink_tasks, expand_tasks;
  static thread_local std::vector<float> shrunk;
  shrink_tasks.clear();
  expand_tasks.clear();
  const int64_t num_chunks = ceil_div(in_features_, kLoraChunk);
  int64_t rank_stride = 0, shrink_cost = 0, expand_cost = 0;
  for (const LoraBatch::Group& group : groups) {
    if (group.slot >= static_cast<int64_t>(adapters_.size()) || !adapters_[static_cast<size_t>(group.slot)]) continue;
    const Adapter& adapter = *adapters_[static_cast<size_t>(group.slot)];
    rank_stride = std::max(rank_stride, adapter.view.rank_padded);
    const int64_t bytes = adapter.view.rank_padded * in_features_ * size_of(adapter.view.dtype);
    shrink_cost += std::max(bytes, bytes / 16 * group.num_rows);
    for (int64_t done = 0; done < group.num_rows; done += kLoraRows) {
      LoraTask task{&adapter.view, batch_->rows().data() + group.first_row + done, group.first_row + done,
                    std::min(kLoraRows, group.num_rows - done), 0, 0};
      for (task.part = 0; task.part < num_chunks; ++task.part) shrink_tasks.push_back(task);
      for (task.part = 0; task.part < static_cast<int64_t>(adapter.parts.size()); ++task.part) {
        const LoraPart& part = adapter.parts[static_cast<size_t>(task.part)];
        for (task.column = 0; task.column < part.columns; task.column += kLoraColumns) expand_tasks.push_back(task);
        expand_cost += std::max(part.rank * part.columns * size_of(adapter.view.dtype), part.rank * part.columns / 4 * task.num_rows);
      }
    }
  }
  if (shrink_tasks.empty()) return;
  LoraShrinkArguments shrink{};
  shrink.dtype = dtype;
  shrink.x = x;
  shrink.output = reserve(shrunk, static_cast<int64_t>(batch_->rows().size()) * num_chunks * rank_stride);
  shrink.tasks = shrink_tasks.data();
  shrink.num_tasks = static_cast<int64_t>(shrink_tasks.size());
  shrink.in_features = in_features_;
  shrink.num_chunks = num_chunks;
  shrink.rank_stride = rank_stride;
  shrink.cost = shrink_cost / kShare;
  shrink.num_threads = at::get_num_threads();
  active_kernels().lora_shrink(shrink);
  LoraExpandArguments expand{};
  expand.dtype = dtype;
  expand.shrunk = shrink.output;
  expand.output = output;
  expand.tasks = expand_tasks.data();
  expand.num_tasks = static_cast<int64_t>(expand_tasks.size());
  expand.out_features = out_features_;
  expand.num_chunks = num_chunks;
  expand.rank_stride = rank_stride;
  expand.cost = expand_cost / kShare;
  expand.num_threads = shrink.num_threads;
  active_kernels().lora_expand(expand);
}

}  // namespace pagoda
