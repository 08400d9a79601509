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
  slots_.clear();
  if (slots) {
    check(*slots, "slots", {slots->size(0)}, at::kInt);
    const int32_t* slot = slots->const_data_ptr<int32_t>();
    slots_.assign(slot, slot + slots->size(0));
  }
  group();
}

void LoraBatch::expect(int64_t num_tokens) {
  slots_.assign(static_cast<size_t>(num_tokens), -1);
  group();
}

void LoraBatch::group() {
  groups_.clear();
  rows_.clear();
  for (size_t row = 0; row < slots_.size(); ++row)
    if (slots_[row] >= 0) rows_.push_back(static_cast<int32_t>(row));
  std::stable_sort(rows_.begin(), rows_.end(), [&](int32_t a, int32_t b) { return slot_of(a) < slot_of(b); });
  for (size_t at = 0; at < rows_.size(); ++at) {
    if (groups_.empty() || groups_.back().slot != slot_of(rows_[at]))
      groups_.push_back({slot_of(rows_[at]), static_cast<int64_t>(at), 0});
    ++groups_.back().num_rows;
  }
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
  place->view = {dtype_of(a), a.const_data_ptr(), a.size(1), place->parts.data(), static_cast<int64_t>(place->parts.size())};
}

void LoraLinear::clear(int64_t slot) {
  if (slot >= 0 && slot < static_cast<int64_t>(adapters_.size())) adapters_[static_cast<size_t>(slot)].reset();
}

const LoraAdapter* LoraLinear::find(int64_t slot) const {
  if (slot >= static_cast<int64_t>(adapters_.size()) || !adapters_[static_cast<size_t>(slot)]) return nullptr;
  return &adapters_[static_cast<size_t>(slot)]->view;
}

void LoraLinear::add(const at::Tensor& x, const at::Tensor& output, const std::optional<at::Tensor>& rows) const {
  if (batch_->groups().empty()) return;
  check(x, "x", {x.size(0), in_features_}, x.scalar_type());
  check(output, "output", {x.size(0), out_features_}, output.scalar_type());
  const DType dtype = dtype_of(x), output_dtype = dtype_of(output);
  if (!rows) return add(dtype, x.const_data_ptr(), output_dtype, output.mutable_data_ptr(), x.size(0));
  check(*rows, "rows", {x.size(0)}, at::kLong);
  LoraBatch some;
  some.slots_.reserve(static_cast<size_t>(x.size(0)));
  for (int64_t row = 0; row < x.size(0); ++row) {
    const int64_t token = rows->const_data_ptr<int64_t>()[row];
    TORCH_CHECK(token >= 0 && token < batch_->num_tokens(), "row ", token, " of a step of ", batch_->num_tokens());
    some.slots_.push_back(batch_->slot_of(token));
  }
  some.group();
  add(some, dtype, x.const_data_ptr(), output_dtype, output.mutable_data_ptr());
}

void LoraLinear::add(DType dtype, const void* x, DType output_dtype, void* output, int64_t num_rows) const {
  if (batch_->groups().empty()) return;
  TORCH_CHECK(num_rows == batch_->num_tokens(), "the step's adapters are set for ", batch_->num_tokens(), " rows, not ", num_rows);
  add(*batch_, dtype, x, output_dtype, output);
}

void LoraLinear::add(const LoraBatch& batch, DType dtype, const void* x, DType output_dtype, void* output) const {
  static thread_local std::vector<LoraRows> groups;
  groups.clear();
  for (const LoraBatch::Group& group : batch.groups()) {
    const LoraAdapter* const adapter = find(group.slot);
    if (adapter != nullptr)
      groups.push_back({adapter, batch.rows().data() + group.first_row, group.first_row, group.num_rows});
  }
  add_lora(groups, static_cast<int64_t>(batch.rows().size()), in_features_, out_features_, dtype, x, output_dtype, output);
}

void add_lora(const std::vector<LoraRows>& groups, int64_t num_rows, int64_t in_features, int64_t out_features, DType dtype,
              const void* x, DType output_dtype, void* output) {
  if (groups.empty()) return;
  TORCH_CHECK(dtype != DType::kHalf && output_dtype != DType::kHalf, "adapters are added to float32 and bfloat16 outputs");
  static thread_local std::vector<LoraTask> shrink_tasks, expand_tasks;
  static thread_local std::vector<float> shrunk;
  shrink_tasks.clear();
  expand_tasks.clear();
  const int64_t num_chunks = ceil_div(in_features, kLoraChunk);
  int64_t rank_stride = 0, shrink_cost = 0, expand_cost = 0;
  for (const LoraRows& group : groups) {
    const LoraAdapter& adapter = *group.adapter;
    rank_stride = std::max(rank_stride, adapter.rank_padded);
    const int64_t bytes = adapter.rank_padded * in_features * size_of(adapter.dtype);
    shrink_cost += std::max(bytes, bytes / 16 * group.num_rows);
    for (int64_t done = 0; done < group.num_rows; done += kLoraRows) {
      LoraTask task{&adapter, group.rows + done, group.first_row + done, std::min(kLoraRows, group.num_rows - done), 0, 0};
      for (task.part = 0; task.part < num_chunks; ++task.part) shrink_tasks.push_back(task);
      for (task.part = 0; task.part < adapter.num_parts; ++task.part) {
        const LoraPart& part = adapter.parts[task.part];
        for (task.column = 0; task.column < part.columns; task.column += kLoraColumns) expand_tasks.push_back(task);
        expand_cost += std::max(part.rank * part.columns * size_of(adapter.dtype), part.rank * part.columns / 4 * task.num_rows);
      }
    }
  }
  LoraShrinkArguments shrink{};
  shrink.dtype = dtype;
  shrink.x = x;
  shrink.output = reserve(shrunk, num_rows * num_chunks * rank_stride);
  shrink.tasks = shrink_tasks.data();
  shrink.num_tasks = static_cast<int64_t>(shrink_tasks.size());
  shrink.in_features = in_features;
  shrink.num_chunks = num_chunks;
  shrink.rank_stride = rank_stride;
  shrink.cost = shrink_cost / kShare;
  shrink.num_threads = at::get_num_threads();
  active_kernels().lora_shrink(shrink);
  LoraExpandArguments expand{};
  expand.dtype = output_dtype;
  expand.shrunk = shrink.output;
  expand.output = output;
  expand.tasks = expand_tasks.data();
  expand.num_tasks = static_cast<int64_t>(expand_tasks.size());
  expand.out_features = out_features;
  expand.num_chunks = num_chunks;
  expand.rank_stride = rank_stride;
  expand.cost = expand_cost / kShare;
  expand.num_threads = shrink.num_threads;
  active_kernels().lora_expand(expand);
}

}  // namespace pagoda
