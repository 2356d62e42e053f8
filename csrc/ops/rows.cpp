#include "rows.h"

namespace mamba_ssm::ops {

Rows::Rows(std::initializer_list<OptionalTensor*> inputs)
    : leading_((*inputs.begin())->value().dim() - 1) {
  if (merge(inputs)) return;
  for (OptionalTensor* input : inputs) {
    if (*input) *input = torch::stable::contiguous(**input);
  }
  merge(inputs);
}

/// False if more than kAxes are left.
bool Rows::merge(std::initializer_list<OptionalTensor*> inputs) {
  const Tensor& x = ***inputs.begin();
  axes_ = {};
  for (int64_t& axis : innermost_) axis = -1;
  int at = kAxes;         // where the last axis went; the axes are filled from the back
  int64_t previous = -1;  // the axis before, counted from the back
  for (int64_t axis = leading_ - 1; axis >= 0; --axis) {
    const int64_t size = x.size(axis);
    if (size == 1) continue;
    bool merges = previous >= 0;
    for (const OptionalTensor* input : inputs) {
      if (!merges) break;
      if (!*input) continue;
      merges = (*input)->stride(axis) == (*input)->stride(previous) * x.size(previous);
    }
    previous = axis;
    if (merges) {
      axes_.size[at] *= size;
      continue;
    }
    if (at == 0) return false;
    axes_.size[--at] = size;
    innermost_[at] = axis;
  }
  return true;
}

kernels::View<4> Rows::view(const OptionalTensor& tensor) const {
  kernels::View<4> v;
  if (!tensor) return v;
  v.data = tensor->data_ptr();
  v.dtype = dtype_of(tensor->scalar_type());
  for (int i = 0; i < kAxes; ++i) {
    v.stride[i] = innermost_[i] < 0 ? 0 : tensor->stride(innermost_[i]);
  }
  v.stride[kAxes] = tensor->dim() > leading_ ? tensor->stride(leading_) : 0;
  return v;
}

Tensor allocate_rows(const char* op, const Tensor& like, ScalarType type) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < like.dim(); ++i) sizes.push_back(like.size(i));
  return allocate(op, like, sizes, type);
}

}  // namespace mamba_ssm::ops
