// The end of a product: its float32 sums with bias and activation, in the output's type.
#pragma once

#include "activations.h"
#include "simd.h"

namespace pagoda::PAGODA_ISA {
namespace {

// Writes sums [num_rows][sum_stride] to the output's rows and columns from `row` and `column` on.
using WriteRows = void (*)(const LinearArguments&, const float* sums, int64_t sum_stride, int64_t row, int64_t num_rows,
                           int64_t column, int64_t num_columns);

template <class Bias, class Output>
void write_rows(const LinearArguments& a, const float* sums, int64_t sum_stride, int64_t row, int64_t num_rows,
                int64_t column, int64_t num_columns) {
  const Bias* bias = static_cast<const Bias*>(a.bias);
  for (int64_t r = 0; r < num_rows; ++r) {
    Output* output = static_cast<Output*>(a.output) + (row + r) * a.out_features + column;
    const float* from = sums + r * sum_stride;
    for (int64_t c = 0; c < num_columns; c += kLanes) {
      const int count = static_cast<int>(smaller<int64_t>(kLanes, num_columns - c));
      Vector value = load(from + c);
      if (bias != nullptr) value = add(value, load(bias + column + c, count));
      if (a.activation != Activation::kNone) value = activated(a.activation, value);
      store(output + c, value, count);
    }
  }
}

// The one for the arguments' types.
inline WriteRows write_rows_of(const LinearArguments& a) {
  if (a.dtype == DType::kFloat32) return write_rows<float, float>;
  return a.output_dtype == DType::kFloat32 ? write_rows<BFloat16, float> : write_rows<BFloat16, BFloat16>;
}

}  // namespace
}  // namespace pagoda::PAGODA_ISA
