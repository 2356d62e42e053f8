// Calling torch ops from C++ with types: one look-up per op, then a direct dispatcher call.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <optional>
#include <vector>

namespace mamba_ssm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// The op `name` ("mamba_ssm::...") as a function of type Signature.
template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

/// Autograd keeps absent optional arguments as undefined tensors.
inline Tensor to_saved(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }
inline OptionalTensor from_saved(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

/// True if the call has to be recorded: gradients are on and some argument wants one.
inline bool needs_gradient(const std::vector<Tensor>& arguments) {
  if (!at::GradMode::is_enabled()) return false;
  for (const Tensor& argument : arguments) {
    if (argument.defined() && argument.requires_grad()) return true;
  }
  return false;
}

}  // namespace mamba_ssm
