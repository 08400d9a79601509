// Work for all threads of torch's own OpenMP pool, or for the calling thread alone where it is too little to share.
#pragma once

#include <omp.h>

#include <cstdint>

#include "simd.h"

namespace pagoda::PAGODA_ISA {
namespace {

// Waking a thread and waiting for it costs a few microseconds. In that time a core does about this many multiply-adds,
// or reads this many bytes from memory: the unit in which callers give the cost of their work.
constexpr int64_t kForkCost = 64 * 1024;

// Threads that `cost` is worth, at most one a task.
inline int threads_for(int num_threads, int64_t num_tasks, int64_t cost) {
  if (cost <= kForkCost) return 1;
  return static_cast<int>(larger<int64_t>(1, smaller<int64_t>(num_threads, num_tasks)));
}

// Calls run(task) for every task, in contiguous shares. For tasks of equal cost.
template <class Run>
inline void parallel_for(int num_threads, int64_t num_tasks, int64_t cost, const Run& run) {
  const int threads = threads_for(num_threads, num_tasks, cost);
  if (threads == 1) {
    for (int64_t task = 0; task < num_tasks; ++task) run(task);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int64_t team = omp_get_num_threads(), own = omp_get_thread_num();
    const int64_t end = (own + 1) * num_tasks / team;
    for (int64_t task = own * num_tasks / team; task < end; ++task) run(task);
  }
}

// The same for tasks of unequal cost: each thread takes the next one when it is done with its last.
template <class Run>
inline void parallel_for_dynamic(int num_threads, int64_t num_tasks, int64_t cost, const Run& run) {
  const int threads = threads_for(num_threads, num_tasks, cost);
  if (threads == 1) {
    for (int64_t task = 0; task < num_tasks; ++task) run(task);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t task = 0; task < num_tasks; ++task) run(task);
}

}  // namespace
}  // namespace pagoda::PAGODA_ISA
