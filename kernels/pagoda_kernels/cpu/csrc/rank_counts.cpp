// Counters in memory that several processes share, one a rank and cache line: each says how far its rank has come.
//
// A rank writes what it has to say, then posts a greater count; who waits for the count sees what was written before. Whoever
// waits looks a few times and then sleeps in the kernel (futex(2)), so that ranks may be more than there are cores.
#include <ATen/core/Tensor.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <torch/library.h>
#include <unistd.h>

#include <cstdint>

namespace {

constexpr int64_t kCountsPerLine = 64 / sizeof(uint32_t);

uint32_t* count_of(const at::Tensor& counts, int64_t rank) {
  TORCH_CHECK(counts.scalar_type() == at::kInt && counts.dim() == 2 && counts.is_contiguous() &&
                  counts.size(1) == kCountsPerLine && rank >= 0 && rank < counts.size(0),
              "counts must be int32 [ranks, ", kCountsPerLine, "], rank one of them");
  return reinterpret_cast<uint32_t*>(counts.data_ptr<int32_t>()) + rank * kCountsPerLine;
}

// Counts wrap around: one is behind another if it is less than half of all numbers away.
bool is_behind(uint32_t count, uint32_t other) { return static_cast<int32_t>(count - other) < 0; }

int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * int64_t{1000000000} + time.tv_nsec;
}

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

void post_count(const at::Tensor& counts, int64_t rank, int64_t count) {
  uint32_t* own = count_of(counts, rank);
  __atomic_store_n(own, static_cast<uint32_t>(count), __ATOMIC_SEQ_CST);
  // Not FUTEX_PRIVATE_FLAG: who waits is in another process.
  syscall(SYS_futex, own, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

// Waits until the counts of ranks first … last - 1 are `count` or more, for `microseconds` at most: the rank that is behind then, or -1.
int64_t wait_for_counts(const at::Tensor& counts, int64_t first, int64_t last, int64_t count, int64_t spin_microseconds,
                        int64_t microseconds) {
  const int64_t started = now_ns(), deadline = started + 1000 * microseconds;
  const int64_t spins_end = started + 1000 * spin_microseconds;
  const auto wanted = static_cast<uint32_t>(count);
  for (int64_t rank = first; rank < last; ++rank) {
    uint32_t* place = count_of(counts, rank);
    while (true) {
      const uint32_t seen = __atomic_load_n(place, __ATOMIC_ACQUIRE);
      if (!is_behind(seen, wanted)) break;
      const int64_t now = now_ns();
      if (now < spins_end) {
        for (int i = 0; i < 16; ++i) pause_briefly();
        continue;
      }
      if (now >= deadline) return rank;
      const int64_t left = deadline - now;
      const timespec timeout{left / 1000000000, left % 1000000000};
      syscall(SYS_futex, place, FUTEX_WAIT, seen, &timeout, nullptr, 0);
    }
  }
  return -1;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pagoda_cpu, m) {
  m.def("post_count(Tensor(a!) counts, int rank, int count) -> ()", &post_count);
  m.def(
      "wait_for_counts(Tensor counts, int first, int last, int count, int spin_microseconds, int microseconds) -> int",
      &wait_for_counts);
}
