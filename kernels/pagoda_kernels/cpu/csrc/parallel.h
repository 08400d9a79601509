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

// Every parallel region below has all threads, also those without work: OpenMP's pool ends threads that a smaller team leaves
// over, and starts them anew for the next greater one.

// Calls run(task) for every task, in contiguous shares. For tasks of equal cost.
template <class Run>
inline void parallel_for(int num_threads, int64_t num_tasks, int64_t cost, const Run& run) {
  const int threads = threads_for(num_threads, num_tasks, cost);
  if (threads == 1) {
    for (int64_t task = 0; task < num_tasks; ++task) run(task);
    return;
  }
#pragma omp parallel num_threads(num_threads)
  {
    const int64_t team = omp_get_num_threads(), own = omp_get_thread_num();
    const int64_t end = (own + 1) * num_tasks / team;
    for (int64_t task = own * num_tasks / team; task < end; ++task) run(task);
  }
}

// One thread's share of tasks: those from `next` on are not taken yet. A cache line each.
struct alignas(64) TaskRange {
  int64_t next;
  int64_t end;
};
constexpr int64_t kMaxTeam = 256;

// The same for tasks of unequal cost, or threads of unequal speed: each thread works through its own contiguous share, so that
// what it reads of memory is one stream, and then takes what is left of the others'.
template <class Run>
inline void parallel_for_dynamic(int num_threads, int64_t num_tasks, int64_t cost, const Run& run) {
  const int threads = threads_for(num_threads < kMaxTeam ? num_threads : kMaxTeam, num_tasks, cost);
  if (threads == 1) {
    for (int64_t task = 0; task < num_tasks; ++task) run(task);
    return;
  }
  // The team may turn out smaller than asked for: shares are those of the threads asked for, and all are taken by someone.
  TaskRange ranges[kMaxTeam];
  for (int64_t share = 0; share < threads; ++share)
    ranges[share] = {share * num_tasks / threads, (share + 1) * num_tasks / threads};
#pragma omp parallel num_threads(num_threads)
  {
    const int64_t own = omp_get_thread_num();
    for (int64_t offset = 0; offset < threads; ++offset) {
      TaskRange& range = ranges[(own + offset) % threads];
      while (__atomic_load_n(&range.next, __ATOMIC_RELAXED) < range.end) {
        const int64_t task = __atomic_fetch_add(&range.next, 1, __ATOMIC_RELAXED);
        if (task < range.end) run(task);
      }
    }
  }
}

}  // namespace
}  // namespace pagoda::PAGODA_ISA
