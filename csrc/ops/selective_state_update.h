// What a call of selective_state_update must look like. Meaning: <mamba_ssm/ops.h>.
#pragma once

#include "checks.h"

namespace mamba_ssm::ops {

template <class Size>
struct SelectiveStateUpdateSizes {
  Size batch, nheads, headdim, ngroups, dstate, num_slots;
  bool with_heads;  // state has 4 dimensions, not 3
};

template <class Access, class Tensor = typename Access::Tensor>
SelectiveStateUpdateSizes<typename Access::Size> check_selective_state_update(
    const Checks<Access>& checks, const Tensor& state, const Tensor& x, const Tensor& dt,
    const Tensor& A, const Tensor& B, const Tensor& C, const std::optional<Tensor>& D,
    const std::optional<Tensor>& z, const std::optional<Tensor>& dt_bias,
    const std::optional<Tensor>& state_batch_indices) {
  using Size = typename Access::Size;
  using Dim = typename Checks<Access>::Dim;
  checks.rank("state", state, {3, 4},
              "(num_slots, dim, dstate) or (num_slots, nheads, headdim, dstate)");
  checks.activation("state", state);
  const bool heads = state.dim() == 4;
  checks.rank("x", x, {heads ? 3 : 2}, heads ? "(batch, nheads, headdim)" : "(batch, dim)");
  checks.activation("x", x);
  const ScalarType T = x.scalar_type();
  if (T == ScalarType::Double) {
    checks.dtype("state", state, {T});
  } else {
    checks.parameter("state", state, T);
  }
  const Dim batch{"batch", Access::size(x, 0)};
  const Dim nheads{"nheads", heads ? Access::size(x, 1) : Size(1)};
  const Dim headdim{heads ? "headdim" : "dim", Access::size(state, heads ? 2 : 1)};
  const Dim dstate{"dstate", Access::size(state, heads ? 3 : 2)};
  const Dim slots = state_batch_indices ? Dim{"num_slots", Access::size(state, 0)} : batch;

  // Without heads every argument lacks the nheads (or ngroups) axis.
  const auto per_row = [&](const char* name, const Tensor& tensor) {
    if (heads) {
      checks.shape(name, tensor, {batch, nheads, headdim});
    } else {
      checks.shape(name, tensor, {batch, headdim});
    }
  };
  const auto parameter = [&](const char* name, const std::optional<Tensor>& tensor) {
    if (!tensor) return;
    if (heads) {
      checks.shape(name, *tensor, {nheads, headdim});
    } else {
      checks.shape(name, *tensor, {headdim});
    }
    checks.parameter(name, *tensor, T);
  };

  per_row("x", x);
  if (heads) {
    checks.shape("state", state, {slots, nheads, headdim, dstate});
    checks.shape("A", A, {nheads, headdim, dstate});
  } else {
    checks.shape("state", state, {slots, headdim, dstate});
    checks.shape("A", A, {headdim, dstate});
  }
  checks.parameter("A", A, T);
  per_row("dt", dt);
  checks.dtype("dt", dt, {T, accumulate_type(T)});
  const char* matrix_shape = heads ? "(batch, ngroups, dstate)" : "(batch, dstate)";
  checks.rank("B", B, {heads ? 3 : 2}, matrix_shape);
  const Dim ngroups{"ngroups", heads ? Access::size(B, 1) : Size(1)};
  checks.divides("B", "ngroups", ngroups.size, "nheads", nheads.size);
  for (const auto& [name, matrix] : {std::pair<const char*, const Tensor&>{"B", B}, {"C", C}}) {
    if (heads) {
      checks.shape(name, matrix, {batch, ngroups, dstate});
    } else {
      checks.shape(name, matrix, {batch, dstate});
    }
    checks.dtype(name, matrix, {T});
  }
  parameter("D", D);
  if (z) {
    per_row("z", *z);
    checks.dtype("z", *z, {T});
  }
  parameter("dt_bias", dt_bias);
  if (state_batch_indices) {
    checks.shape("state_batch_indices", *state_batch_indices, {batch});
    checks.index("state_batch_indices", *state_batch_indices);
  }
  return {batch.size, nheads.size, headdim.size, ngroups.size, dstate.size, slots.size, heads};
}

}  // namespace mamba_ssm::ops
