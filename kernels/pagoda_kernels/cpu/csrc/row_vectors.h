// A row in pieces: whole vectors, then what is left.
#pragma once

#include "simd.h"

namespace pagoda::PAGODA_ISA {
namespace {

// Calls body(offset, count) for the pieces of a row of `size` elements.
template <class Body>
inline void for_each_vector(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, kLanes);
  if (i < size) body(i, static_cast<int>(size - i));
}
template <class T>
inline Vector load_some(const T* p, int count) {
  return count == kLanes ? load(p) : load(p, count);
}
template <class T>
inline void store_some(T* p, Vector a, int count) {
  if (count == kLanes) {
    store(p, a);
  } else {
    store(p, a, count);
  }
}

}  // namespace
}  // namespace pagoda::PAGODA_ISA
