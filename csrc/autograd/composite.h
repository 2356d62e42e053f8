// What composites share: their types, and how a node gets tensors of which some are not given.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>

#include <string>

#include "dispatch.h"

namespace mamba_ssm {

/// `tensor` in type `type`. (at::to returns its argument where it has that type already, which
/// below autograd no op may do.)
inline Tensor as_type(const Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

/// A fresh tensor like `tensor`; undefined for an undefined one.
inline Tensor like(const Tensor& tensor) {
  return tensor.defined() ? at::empty_like(tensor) : Tensor();
}

/// Inside a composite every dtype is chosen already: autocast must not touch its products.
inline c10::impl::ExcludeDispatchKeyGuard without_autocast() {
  return c10::impl::ExcludeDispatchKeyGuard(c10::autocast_dispatch_keyset);
}

/// Under autocast, casts the tensors that are given to its dtype; the casts are differentiable.
inline void cast_for_autocast(at::Device device, std::initializer_list<Tensor*> tensors) {
  if (!at::autocast::is_autocast_available(device.type())) return;  // meta
  if (!at::autocast::is_autocast_enabled(device.type())) return;
  const auto type = at::autocast::get_autocast_dtype(device.type());
  for (Tensor* tensor : tensors) {
    if (tensor->defined()) *tensor = as_type(*tensor, type);
  }
}

/// The tensors of a call that are given. A node's list of tensors must not hold undefined ones, so
/// it gets these, and a number with a bit for every tensor of the call that says whether it is
/// here.
struct GivenTensors {
  using List = torch::autograd::variable_list;

  List defined;
  int64_t bits = 0;

  explicit GivenTensors(const List& tensors) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (!tensors[i].defined()) continue;
      defined.push_back(tensors[i]);
      bits |= int64_t{1} << i;
    }
  }

  /// All `count` tensors of the call again.
  static List restore(at::TensorList defined, int64_t bits, size_t count) {
    List tensors(count);
    size_t next = 0;
    for (size_t i = 0; i < count; ++i) {
      if (bits >> i & 1) tensors[i] = defined[next++];
    }
    return tensors;
  }

  /// What a backward returns: of the gradients of all tensors those of the given ones, then nothing
  /// for the `others`, the node's arguments behind its list.
  static List select(const List& gradients, int64_t bits, size_t others) {
    List selected;
    for (size_t i = 0; i < gradients.size(); ++i) {
      if (bits >> i & 1) selected.push_back(gradients[i]);
    }
    selected.resize(selected.size() + others);
    return selected;
  }
};

/// Gives `gradients` a history that leads to `inputs` and cannot be walked.
struct NotTwice : torch::autograd::Function<NotTwice> {
  using List = torch::autograd::variable_list;

  static List forward(torch::autograd::AutogradContext* ctx, at::TensorList /*inputs*/,
                      at::TensorList gradients, const std::string& name) {
    ctx->saved_data["name"] = name;
    return gradients.vec();
  }

  static List backward(torch::autograd::AutogradContext* ctx, const List& /*gradients*/) {
    TORCH_CHECK(false, ctx->saved_data["name"].toStringRef(), " cannot be differentiated twice");
  }
};

/// The gradients that `backward` computes from `inputs`. It writes into views of them, which
/// autograd does not follow; so it runs unrecorded, and a derivative of its results is refused.
template <class Backward>
torch::autograd::variable_list once_differentiable(const char* name,
                                                   const torch::autograd::variable_list& inputs,
                                                   const Backward& backward) {
  if (!at::GradMode::is_enabled()) return backward();
  torch::autograd::variable_list all;
  {
    const at::NoGradGuard no_grad;
    all = backward();
  }
  const GivenTensors from(inputs), gradients(all);
  return GivenTensors::restore(
      NotTwice::apply(at::TensorList(from.defined), at::TensorList(gradients.defined),
                      std::string(name)),
      gradients.bits, all.size());
}

}  // namespace mamba_ssm
