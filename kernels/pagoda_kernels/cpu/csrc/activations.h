// Activation functions of a vector.
#pragma once

#include "simd.h"

namespace pagoda::PAGODA_ISA {
namespace {

inline Vector sigmoid_of(Vector x, Vector steepness) {
  return divide(x, add(broadcast(1.0f), exponential(subtract(zero(), steepness))));
}

// x * sigmoid(x).
inline Vector silu(Vector x) { return sigmoid_of(x, x); }

// GELU in its tanh form is x * sigmoid of a cubic, as 1 + tanh(u) = 2 * sigmoid(2u).
inline Vector gelu_tanh(Vector x) {
  const Vector cubic = multiply_add(multiply(multiply(x, x), broadcast(0.044715f)), x, x);
  return sigmoid_of(x, multiply(cubic, broadcast(1.5957691216057308f)));
}

// GELU by the error function: x * (1 - erfc(x / sqrt 2) / 2). The complement, for its relative error is small in the tail, too:
// t * exp(-z^2 + P(t)) with t = 1 / (1 + z / 2) (Press et al., Numerical Recipes, 6.2), within 1.2e-7 of erfc(z), z >= 0.
inline Vector gelu(Vector x) {
  const Vector z = multiply(absolute(x), broadcast(0.70710678118654752f));
  const Vector t = divide(broadcast(1.0f), multiply_add(z, broadcast(0.5f), broadcast(1.0f)));
  Vector p = broadcast(0.17087277f);
  p = multiply_add(p, t, broadcast(-0.82215223f));
  p = multiply_add(p, t, broadcast(1.48851587f));
  p = multiply_add(p, t, broadcast(-1.13520398f));
  p = multiply_add(p, t, broadcast(0.27886807f));
  p = multiply_add(p, t, broadcast(-0.18628806f));
  p = multiply_add(p, t, broadcast(0.09678418f));
  p = multiply_add(p, t, broadcast(0.37409196f));
  p = multiply_add(p, t, broadcast(1.00002368f));
  p = multiply_add(p, t, broadcast(-1.26551223f));
  const Vector exponent = multiply_add(subtract(zero(), z), z, p);
  const Vector half = multiply(multiply(t, exponential(exponent)), broadcast(0.5f));
  return multiply(x, where_at_least(x, zero(), subtract(broadcast(1.0f), half), half));
}

inline Vector activated(Activation activation, Vector x) {
  switch (activation) {
    case Activation::kNone:
    case Activation::kClampedSwiglu:  // is of two halves
      return x;
    case Activation::kSilu:
      return silu(x);
    case Activation::kGeluTanh:
      return gelu_tanh(x);
    case Activation::kGelu:
      return gelu(x);
    case Activation::kRelu:
      return maximum(zero(), x);
  }
  return x;
}

}  // namespace
}  // namespace pagoda::PAGODA_ISA
