// Several products whose tasks, and rows, are counted through.
#pragma once

#include "parallel.h"

namespace pagoda::PAGODA_ISA {
namespace {

// Of each product, where its rows and tasks begin among those of all.
struct GroupStart {
  int64_t row;
  int64_t task;
};

// The last product that begins at `position` or before. `starts` has one more than the products, for the end.
template <int64_t GroupStart::*kWhich>
inline int64_t product_at(const GroupStart* starts, int64_t count, int64_t position) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (starts[middle].*kWhich <= position ? low : high) = middle;
  }
  return low;
}

}  // namespace
}  // namespace pagoda::PAGODA_ISA
