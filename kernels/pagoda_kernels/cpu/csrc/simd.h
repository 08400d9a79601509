// One vector of float32, as wide as the instruction set that this translation unit is compiled for.
//
// Every kernel is written once against these functions and compiled once per instruction set, with PAGODA_ISA naming the
// namespace. Only what stands in that namespace may be called from kernels: an inline function of a shared name, such as a
// standard template, could be merged by the linker with the copy of another translation unit, and run instructions that this
// processor does not have.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

namespace pagoda::PAGODA_ISA {
namespace {

template <class T>
inline T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
inline T larger(T a, T b) {
  return a < b ? b : a;
}
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Half x) { return _cvtsh_ss(x.bits); }

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using Vector = __m512;
using IntVector = __m512i;

inline __mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << count) - 1); }

inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector broadcast(float x) { return _mm512_set1_ps(x); }
inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
inline Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Vector divide(Vector a, Vector b) { return _mm512_div_ps(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector maximum(Vector a, Vector b) { return _mm512_max_ps(a, b); }
inline Vector minimum(Vector a, Vector b) { return _mm512_min_ps(a, b); }
inline Vector absolute(Vector a) { return _mm512_abs_ps(a); }
inline Vector round_to_integer(Vector a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// Lanes of `a` where x >= bound, of `b` elsewhere (and where x is NaN).
inline Vector where_at_least(Vector x, Vector bound, Vector a, Vector b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, bound, _CMP_GE_OQ), b, a);
}
// Lanes `begin` to `end - 1` of `a`, lanes of `b` elsewhere. Any integers; lanes outside 0 .. kLanes - 1 do not exist.
inline Vector where_lane_in(int64_t begin, int64_t end, Vector a, Vector b) {
  const int low = static_cast<int>(larger<int64_t>(0, smaller<int64_t>(begin, kLanes)));
  const int high = static_cast<int>(larger<int64_t>(0, smaller<int64_t>(end, kLanes)));
  return _mm512_mask_blend_ps(first_lanes(high) & ~first_lanes(low), b, a);
}
// Lanes of `a` whose bit is set, of `b` elsewhere; the first lane has the lowest bit.
inline Vector where_bit(uint32_t bits, Vector a, Vector b) {
  return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), b, a);
}
inline Vector times_power_of_two(Vector x, Vector exponent) { return _mm512_scalef_ps(x, exponent); }

inline float sum(Vector a) { return _mm512_reduce_add_ps(a); }
inline float greatest(Vector a) { return _mm512_reduce_max_ps(a); }

inline Vector load(const float* p) { return _mm512_loadu_ps(p); }
inline Vector load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Vector load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vector load(const float* p, int count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
inline Vector load(const BFloat16* p, int count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(count), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Vector load(const Half* p, int count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}

// Nearest bfloat16, ties to even; NaN stays NaN.
inline __m256i bfloat16_bits(Vector a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  rounded = _mm512_mask_blend_epi32(is_nan, rounded, _mm512_set1_epi32(0x7FC0));
  return _mm512_cvtepi32_epi16(rounded);
}
inline void store(float* p, Vector a) { _mm512_storeu_ps(p, a); }
inline void store(BFloat16* p, Vector a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bfloat16_bits(a)); }
inline void store(Half* p, Vector a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
inline void store(float* p, Vector a, int count) { _mm512_mask_storeu_ps(p, first_lanes(count), a); }
inline void store(BFloat16* p, Vector a, int count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), bfloat16_bits(a));
}
inline void store(Half* p, Vector a, int count) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}

// Pairs of bfloat16 in 32 bits, as packed weights hold them: the low half is the first of the pair.
inline IntVector load_bits(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline IntVector broadcast_bits(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline Vector first_of_pairs(IntVector pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline Vector second_of_pairs(IntVector pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
}
// Lane i is the pair of `first`[i] and `second`[i].
inline IntVector pairs_of(const BFloat16* first, const BFloat16* second) {
  const __m256i low_halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low_halves), _mm512_castps_si512(load(second)));
}

// The 16 x 16 matrix of 32-bit elements in `rows`, transposed in place.
inline void transpose(IntVector (&rows)[kLanes]) {
  IntVector t[kLanes];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
    rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
  }
}
inline IntVector as_bits(Vector a) { return _mm512_castps_si512(a); }
inline void store_bits(void* p, IntVector a) { _mm512_storeu_si512(p, a); }

#else

constexpr int kLanes = 8;
using Vector = __m256;
using IntVector = __m256i;

inline __m256i lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline __m256i first_lanes(int count) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane_numbers()); }

inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector broadcast(float x) { return _mm256_set1_ps(x); }
inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector subtract(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
inline Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
inline Vector divide(Vector a, Vector b) { return _mm256_div_ps(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector maximum(Vector a, Vector b) { return _mm256_max_ps(a, b); }
inline Vector minimum(Vector a, Vector b) { return _mm256_min_ps(a, b); }
inline Vector absolute(Vector a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Vector round_to_integer(Vector a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Vector where_at_least(Vector x, Vector bound, Vector a, Vector b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, bound, _CMP_GE_OQ));
}
inline Vector where_lane_in(int64_t begin, int64_t end, Vector a, Vector b) {
  const int low = static_cast<int>(larger<int64_t>(0, smaller<int64_t>(begin, kLanes)));
  const int high = static_cast<int>(larger<int64_t>(0, smaller<int64_t>(end, kLanes)));
  const __m256i inside = _mm256_andnot_si256(first_lanes(low), first_lanes(high));
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(inside));
}
inline Vector where_bit(uint32_t bits, Vector a, Vector b) {
  const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lanes), lanes);
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(set));
}
// The exponent must be an integer, and the result a normal number, zero or infinity.
inline Vector times_power_of_two(Vector x, Vector exponent) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}

inline float sum(Vector a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float greatest(Vector a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

inline Vector widen(__m128i bits, const BFloat16*) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Vector widen(__m128i bits, const Half*) { return _mm256_cvtph_ps(bits); }
inline Vector load(const float* p) { return _mm256_loadu_ps(p); }
inline Vector load(const float* p, int count) { return _mm256_maskload_ps(p, first_lanes(count)); }
template <class T>
inline Vector load(const T* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p);
}
template <class T>
inline Vector load(const T* p, int count) {
  alignas(16) T whole[kLanes] = {};
  for (int i = 0; i < count; ++i) whole[i] = p[i];
  return load(whole);
}

inline __m128i narrow(Vector a, const BFloat16*) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), is_nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
inline __m128i narrow(Vector a, const Half*) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
inline void store(float* p, Vector a) { _mm256_storeu_ps(p, a); }
inline void store(float* p, Vector a, int count) { _mm256_maskstore_ps(p, first_lanes(count), a); }
template <class T>
inline void store(T* p, Vector a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a, p));
}
template <class T>
inline void store(T* p, Vector a, int count) {
  alignas(16) T whole[kLanes];
  store(whole, a);
  for (int i = 0; i < count; ++i) p[i] = whole[i];
}

inline IntVector load_bits(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline IntVector broadcast_bits(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline Vector first_of_pairs(IntVector pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
inline Vector second_of_pairs(IntVector pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
}

// The 8 x 8 matrix of 32-bit elements in `rows`, transposed in place.
inline void transpose(IntVector (&rows)[kLanes]) {
  IntVector t[kLanes], u[kLanes];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x31);
  }
}
inline IntVector as_bits(Vector a) { return _mm256_castps_si256(a); }
inline void store_bits(void* p, IntVector a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }

#endif

// e^x to about one unit in the last place; exactly 0 below -87.3 (so for -infinity), NaN for NaN.
inline Vector exponential(Vector x) {
  const Vector lowest = broadcast(-87.3f);
  const Vector bounded = minimum(broadcast(88.3f), maximum(lowest, x));
  const Vector exponent = round_to_integer(multiply(bounded, broadcast(1.44269504088896341f)));
  Vector rest = multiply_add(exponent, broadcast(-0.693359375f), bounded);
  rest = multiply_add(exponent, broadcast(2.12194440e-4f), rest);
  Vector power = broadcast(1.9875691500e-4f);
  power = multiply_add(power, rest, broadcast(1.3981999507e-3f));
  power = multiply_add(power, rest, broadcast(8.3334519073e-3f));
  power = multiply_add(power, rest, broadcast(4.1665795894e-2f));
  power = multiply_add(power, rest, broadcast(1.6666665459e-1f));
  power = multiply_add(power, rest, broadcast(5.0000001201e-1f));
  power = add(multiply_add(multiply(power, rest), rest, rest), broadcast(1.0f));
  return where_at_least(lowest, x, zero(), times_power_of_two(power, exponent));
}

}  // namespace
}  // namespace pagoda::PAGODA_ISA
