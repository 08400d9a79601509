// What every operator checks of its tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "kernels.h"

namespace pagoda {

inline DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kHalf;
    default:
      TORCH_CHECK(false, "float32, bfloat16 and float16 are supported, not ", tensor.scalar_type());
  }
}

inline void check(const at::Tensor& tensor, const char* name, at::IntArrayRef shape, at::ScalarType dtype) {
  TORCH_CHECK(tensor.sizes() == shape, name, " has shape ", tensor.sizes(), ", not ", shape);
  TORCH_CHECK(tensor.scalar_type() == dtype, name, " is ", tensor.scalar_type(), ", not ", dtype);
  TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

inline const void* pointer_or_null(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

}  // namespace pagoda
