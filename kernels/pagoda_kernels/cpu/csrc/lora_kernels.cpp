// Low-rank adapters: products with A in float32, and what B makes of them added to an output. Rows of one adapter are gathered.
//
// A row's sums run over the inputs in chunks of `kLoraChunk`, each in order, and over the chunks in order; then over the rank, in
// order, starting with what the output has. None of that depends on other rows.

#include "parallel.h"
#include "scratch.h"
#include "tile.h"

namespace pagoda::PAGODA_ISA {
namespace {

template <class T>
inline void widen_row(const T* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int here = static_cast<int>(smaller<int64_t>(kLanes, count - i));
    store(to + i, load(from + i, here));
  }
}

inline void widen_row(DType dtype, const void* from, int64_t first, float* to, int64_t count) {
  if (dtype == DType::kFloat32) {
    widen_row(static_cast<const float*>(from) + first, to, count);
  } else {
    widen_row(static_cast<const BFloat16*>(from) + first, to, count);
  }
}

template <class T>
inline void narrow_row(const float* from, T* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int here = static_cast<int>(smaller<int64_t>(kLanes, count - i));
    store(to + i, load(from + i, here), here);
  }
}

// Weights of adapters come from memory: few rows are done with them before the next ones are there. These are asked for a little
// ahead on every processor: what follows a piece of them is not as long as to be asked for far ahead (`Streamed`).
template <class T>
struct DotAdapter : DotNarrow<T> {
  static constexpr bool prefetches(int rows) { return rows <= kStreamRows; }
};

template <class T>
inline void multiply_add_matrix(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_stride, const void* b,
                                int64_t first, int64_t b_stride, int64_t panel_stride, float* c, int64_t c_stride,
                                bool accumulate) {
  using Dot = DotAdapter<T>;
  const TileOperands<Dot> operands{depth,  a,           a_stride, static_cast<const T*>(b) + first, b_stride, panel_stride, c,
                                   c_stride, accumulate};
  multiply_matrix<Dot>(rows, columns / kLanes, operands, rows <= kWideTileRows);
}

inline void multiply(DType dtype, int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_stride, const void* b,
                     int64_t first, int64_t b_stride, int64_t panel_stride, float* c, int64_t c_stride, bool accumulate) {
  (dtype == DType::kFloat32 ? multiply_add_matrix<float> : multiply_add_matrix<BFloat16>)(
      rows, columns, depth, a, a_stride, b, first, b_stride, panel_stride, c, c_stride, accumulate);
}

}  // namespace

void lora_shrink(const LoraShrinkArguments& a) {
  parallel_for_dynamic(a.num_threads, a.num_tasks, a.cost, [&](int64_t index) {
    static thread_local Scratch scratch;
    const LoraTask& task = a.tasks[index];
    const int64_t begin = task.part * kLoraChunk, depth = smaller(kLoraChunk, a.in_features - begin);
    float* x = static_cast<float*>(scratch.get(kLoraRows * (kLoraChunk + kLanes) * static_cast<int64_t>(sizeof(float))));
    constexpr int64_t kStride = kLoraChunk + kLanes;
    for (int64_t row = 0; row < task.num_rows; ++row)
      widen_row(a.dtype, a.x, task.rows[row] * a.in_features + begin, x + row * kStride, depth);
    float* output = a.output + (task.first_row * a.num_chunks + task.part) * a.rank_stride;
    multiply(task.adapter->dtype, task.num_rows, task.adapter->rank_padded, depth, x, kStride, task.adapter->a,
             begin * task.adapter->rank_padded, task.adapter->rank_padded, kPanel, output, a.num_chunks * a.rank_stride, false);
  });
}

void lora_expand(const LoraExpandArguments& a) {
  parallel_for_dynamic(a.num_threads, a.num_tasks, a.cost, [&](int64_t index) {
    static thread_local Scratch scratch;
    const LoraTask& task = a.tasks[index];
    const LoraPart& part = task.adapter->parts[task.part];
    const int64_t rank_stride = ceil_div(part.rank, kLanes) * kLanes;
    const int64_t columns = smaller(kLoraColumns, part.columns - task.column);
    const int64_t padded = ceil_div(columns, kPanel) * kPanel;
    Pieces sizes(nullptr);
    sizes.take<float>(kLoraRows * rank_stride);
    sizes.take<float>(kLoraRows * kLoraColumns);
    Pieces pieces(scratch.get(sizes.used()));
    float* shrunk = pieces.take<float>(kLoraRows * rank_stride);
    float* sums = pieces.take<float>(kLoraRows * kLoraColumns);
    const Vector scale = broadcast(part.scale);
    for (int64_t row = 0; row < task.num_rows; ++row) {
      const float* chunks = a.shrunk + (task.first_row + row) * a.num_chunks * a.rank_stride + part.first;
      for (int64_t r = 0; r < part.rank; r += kLanes) {
        const int here = static_cast<int>(smaller<int64_t>(kLanes, part.rank - r));
        Vector sum = load(chunks + r, here);
        for (int64_t chunk = 1; chunk < a.num_chunks; ++chunk) sum = add(sum, load(chunks + chunk * a.rank_stride + r, here));
        store(shrunk + row * rank_stride + r, multiply(sum, scale));
      }
      widen_row(a.dtype, a.output, task.rows[row] * a.out_features + part.column + task.column, sums + row * kLoraColumns, columns);
    }
    multiply(task.adapter->dtype, task.num_rows, padded, part.rank, shrunk, rank_stride, part.b, task.column * part.rank, kPanel,
             part.rank * kPanel, sums, kLoraColumns, true);
    for (int64_t row = 0; row < task.num_rows; ++row) {
      const int64_t at = task.rows[row] * a.out_features + part.column + task.column;
      if (a.dtype == DType::kFloat32) {
        narrow_row(sums + row * kLoraColumns, static_cast<float*>(a.output) + at, columns);
      } else {
        narrow_row(sums + row * kLoraColumns, static_cast<BFloat16*>(a.output) + at, columns);
      }
    }
  });
}

}  // namespace pagoda::PAGODA_ISA
