// Memory that a thread keeps from call to call, so that kernels do not ask the system for pages in every layer.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "kernels.h"

namespace pagoda::PAGODA_ISA {
namespace {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  // At least `bytes` bytes, aligned to 64; what an earlier call gave is lost. Null where there is no memory.
  void* get(int64_t bytes) {
    if (bytes > size_) {
      std::free(memory_);
      size_ = (bytes + 63) / 64 * 64;
      memory_ = std::aligned_alloc(64, static_cast<size_t>(size_));
      if (memory_ == nullptr) std::abort();
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

// Hands out pieces of one buffer; without a buffer it only adds up their sizes.
class Pieces {
 public:
  explicit Pieces(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* piece = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace pagoda::PAGODA_ISA
