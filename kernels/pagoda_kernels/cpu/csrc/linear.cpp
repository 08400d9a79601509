// Linear layers over packed float32 or bfloat16 weights, for any number of rows.
//
// Few rows: every panel of weights is read once, from memory at its bandwidth. Many rows: a block of panels and depth stays in
// the second-level cache while all rows of the task pass over it. Sums run over the depth in order in both.

#include "group.h"
#include "parallel.h"
#include "scratch.h"
#include "tile.h"
#include "write_rows.h"

namespace pagoda::PAGODA_ISA {
namespace {

constexpr int64_t kRowBlock = 96;       // rows of a task, where there are many
constexpr int64_t kPanelBlock = 4;      // panels of a task, where there are many rows
constexpr int64_t kFewPanelBlock = 2;   // and where there are few
constexpr int64_t kDepthBlockBytes = 64 * 1024;  // of one panel
constexpr int64_t kCacheLine = 64;

// A product, cut into tasks.
template <class Dot>
struct PackedProduct {
  const LinearArguments* a;
  const typename Dot::A* x;
  int64_t x_stride;
  int64_t num_steps;
  int64_t panels, row_block, panel_block, step_block, row_tasks, cost;
  WriteRows write;

  PackedProduct(const LinearArguments& arguments, const typename Dot::A* inputs, int64_t stride, int64_t steps)
      : a(&arguments), x(inputs), x_stride(stride), num_steps(steps), write(write_rows_of(arguments)) {
    panels = ceil_div(a->out_features, kPanel);
    const bool few_rows = a->num_rows <= kTileRows;
    row_block = few_rows ? a->num_rows : ceil_div(a->num_rows, ceil_div(a->num_rows, kRowBlock));
    panel_block = few_rows ? kFewPanelBlock : kPanelBlock;
    step_block = few_rows ? num_steps : kDepthBlockBytes / (kPanel * static_cast<int64_t>(sizeof(typename Dot::B)));
    row_tasks = ceil_div(a->num_rows, row_block);
    const int64_t bytes = panels * kPanel * num_steps * static_cast<int64_t>(sizeof(typename Dot::B));
    cost = larger(bytes, bytes / kLanes * a->num_rows);
  }

  int64_t num_tasks() const { return row_tasks * ceil_div(panels, panel_block); }

  void run(int64_t task) const {
    static thread_local Scratch scratch;
    const auto* weight = static_cast<const typename Dot::B*>(a->weight);
    const int64_t row = task % row_tasks * row_block, panel = task / row_tasks * panel_block;
    const int64_t rows = smaller(row_block, a->num_rows - row), taken = smaller(panel_block, panels - panel);
    const int64_t sum_stride = panel_block * kPanel;
    float* sums = static_cast<float*>(scratch.get(row_block * sum_stride * static_cast<int64_t>(sizeof(float))));
    const bool one_tile = rows <= kTileRows;
    for (int64_t step = 0; step < num_steps; step += step_block) {
      const int64_t steps = smaller(step_block, num_steps - step);
      for (int64_t p = 0; p < taken; ++p) {
        const typename Dot::B* b = weight + ((panel + p) * num_steps + step) * kPanel;
        // Blocks of depth of these panels follow each other, then those of the next task's panels.
        const void* next = p + 1 < taken              ? b + num_steps * kPanel
                           : step + steps < num_steps ? weight + (panel * num_steps + step + steps) * kPanel
                                                      : b + steps * kPanel;
        const TileOperands<Dot> operands{steps,
                                         x + row * x_stride + step * Dot::kAStep,
                                         x_stride,
                                         b,
                                         kPanel,
                                         num_steps * kPanel,
                                         sums + p * kPanel,
                                         sum_stride,
                                         step > 0,
                                         one_tile ? reinterpret_cast<const char*>(b) + kFarBytes : next};
        multiply_matrix<Dot>(rows, kPanelVectors, operands, false);
      }
    }
    const int64_t column = panel * kPanel;
    write(*a, sums, sum_stride, row, rows, column, smaller(taken * kPanel, a->out_features - column));
  }
};

template <class Dot>
void multiply_packed(const LinearArguments* a, int64_t count, const typename Dot::A* x, int64_t x_stride,
                     int64_t num_steps) {
  if (count == 1) {
    const PackedProduct<Dot> product(*a, x, x_stride, num_steps);
    parallel_for_dynamic(a->num_threads, product.num_tasks(), product.cost, [&](int64_t task) { product.run(task); });
    return;
  }
  static thread_local Scratch scratch;
  GroupStart* starts = static_cast<GroupStart*>(scratch.get((count + 1) * static_cast<int64_t>(sizeof(GroupStart))));
  starts[0] = {0, 0};
  int64_t cost = 0;
  for (int64_t index = 0; index < count; ++index) {
    const PackedProduct<Dot> product(a[index], x, x_stride, num_steps);
    starts[index + 1] = {starts[index].row + a[index].num_rows, starts[index].task + product.num_tasks()};
    cost += product.cost;
  }
  parallel_for_dynamic(a->num_threads, starts[count].task, cost, [&](int64_t task) {
    const int64_t index = product_at<&GroupStart::task>(starts, count, task);
    const PackedProduct<Dot> product(a[index], x + starts[index].row * x_stride, x_stride, num_steps);
    product.run(task - starts[index].task);
  });
}

// Inputs in float32, from row to row at `stride` elements.
struct WideInputs {
  const float* values;
  int64_t stride;
};

// A copy where x is not float32. A copy too where there are many rows, with a gap between them: rows a power of two apart share
// one set of the cache, which holds fewer of them than a tile has.
inline WideInputs widened(const LinearArguments* products, int64_t count) {
  const LinearArguments& a = *products;
  int64_t num_rows = 0, most = 0;
  for (int64_t index = 0; index < count; ++index) {
    num_rows += products[index].num_rows;
    most = larger(most, products[index].num_rows);
  }
  if (a.dtype == DType::kFloat32 && most <= kTileRows) return {static_cast<const float*>(a.x), a.in_features};
  static thread_local Scratch scratch;
  const int64_t stride = ceil_div(a.in_features, kLanes) * kLanes + kCacheLine / static_cast<int64_t>(sizeof(float));
  float* wide = static_cast<float*>(scratch.get(num_rows * stride * static_cast<int64_t>(sizeof(float))));
  parallel_for(a.num_threads, num_rows, num_rows * a.in_features / 4, [&](int64_t row) {
    for (int64_t i = 0; i < a.in_features; i += kLanes) {
      const int count_here = static_cast<int>(smaller<int64_t>(kLanes, a.in_features - i));
      const int64_t at = row * a.in_features + i;
      const Vector x = a.dtype == DType::kFloat32 ? load(static_cast<const float*>(a.x) + at, count_here)
                                                  : load(static_cast<const BFloat16*>(a.x) + at, count_here);
      store(wide + row * stride + i, x);
    }
  });
  return {wide, stride};
}

}  // namespace

void linear(const LinearArguments* products, int64_t count) {
  const LinearArguments& a = *products;
  if (a.kind == WeightKind::kFloat32) {
    const WideInputs x = widened(products, count);
    multiply_packed<Streamed<DotFloat32>>(products, count, x.values, x.stride, a.in_features);
    return;
  }
#if defined(PAGODA_BF16_DOT)
  if (a.dtype == DType::kBFloat16) {
    multiply_packed<Streamed<DotBFloat16>>(products, count, static_cast<const uint32_t*>(a.x), a.in_features / 2,
                                           a.in_features / 2);
    return;
  }
#endif
  const WideInputs x = widened(products, count);
  multiply_packed<Streamed<DotBFloat16Weights>>(products, count, x.values, x.stride, a.in_features / 2);
}

void pack(const PackArguments& a) {
  const uint32_t* rows = static_cast<const uint32_t*>(a.weight);
  uint32_t* packed = static_cast<uint32_t*>(a.packed);
  const int64_t panels = ceil_div(a.num_rows, kPanel);
  parallel_for(a.num_threads, panels, panels * kPanel * a.row_words * 4, [&](int64_t panel) {
    for (int64_t column = 0; column < kPanel; column += kLanes) {
      const int64_t row = panel * kPanel + column;
      uint32_t* to = packed + panel * a.row_words * kPanel + column;
      for (int64_t word = 0; word < a.row_words; word += kLanes) {
        const int64_t count = smaller<int64_t>(kLanes, a.row_words - word);
        IntVector vectors[kLanes];
        if (count == kLanes && row + kLanes <= a.num_rows) {
          for (int64_t r = 0; r < kLanes; ++r) vectors[r] = load_bits(rows + (row + r) * a.row_words + word);
        } else {
          alignas(64) uint32_t block[kLanes][kLanes] = {};
          for (int64_t r = 0; r < kLanes; ++r) {
            if (row + r < a.num_rows) __builtin_memcpy(block[r], rows + (row + r) * a.row_words + word, count * 4);
            vectors[r] = load_bits(block[r]);
          }
        }
        transpose(vectors);
        for (int64_t k = 0; k < count; ++k) store_bits(to + (word + k) * kPanel, vectors[k]);
      }
    }
  });
}

}  // namespace pagoda::PAGODA_ISA
