// What a call of selective_state_update must look like. Meaning: <mamba_ssm/ops.h>.
#pragma once

#include "checks.h"

namespace mamba_ssm::ops {

template <class Size>
struct SelectiveStateUpdateSizes {
  Size batch, tokens, nheads, headdim, ngroups, dstate, num_slots;
  bool with_tokens;  // x has an axis of them
  bool with_heads;   // state has 4 dimensions, not 3
};

template <class Access, class Tensor = typename Access::Tensor>
SelectiveStateUpdateSizes<typename Access::Size> check_selective_state_update(
    const Checks<Access>& checks, const Tensor& state, const Tensor& x, const Tensor& dt,
    const Tensor& A, const Tensor& B, const Tensor& C, const std::optional<Tensor>& D,
    const std::optional<Tensor>& z, const std::optional<Tensor>& dt_bias,
    const std::optional<Tensor>& state_batch_indices,
    const std::optional<Tensor>& intermediate_states) {
  using Size = typename Access::Size;
  using Dim = typename Checks<Access>::Dim;
  checks.rank("state", state, {3, 4},
              "(num_slots, dim, dstate) or (num_slots, nheads, headdim, dstate)");
  checks.activation("state", state);
  const bool heads = state.dim() == 4;
  checks.rank("x", x, {heads ? 3 : 2, heads ? 4 : 3},
              heads ? "(batch, nheads, headdim) or (batch, tokens, nheads, headdim)"
                    : "(batch, dim) or (batch, tokens, dim)");
  checks.activation("x", x);
  const bool with_tokens = x.dim() == state.dim();
  const ScalarType T = x.scalar_type();
  const auto state_type = [&](const char* name, const Tensor& tensor) {
    if (T == ScalarType::Double) {
      checks.dtype(name, tensor, {T});
    } else {
      checks.parameter(name, tensor, T);
    }
  };
  state_type("state", state);
  const Dim batch{"batch", Access::size(x, 0)};
  const Dim tokens{"tokens", with_tokens ? Access::size(x, 1) : Size(1), with_tokens};
  const Dim nheads{"nheads", heads ? Access::size(x, x.dim() - 2) : Size(1), heads};
  const Dim headdim{heads ? "headdim" : "dim", Access::size(state, heads ? 2 : 1)};
  const Dim dstate{"dstate", Access::size(state, heads ? 3 : 2)};
  const Dim slots = state_batch_indices ? Dim{"num_slots", Access::size(state, 0)} : batch;

  checks.shape("x", x, {batch, tokens, nheads, headdim});
  checks.shape("state", state, {slots, nheads, headdim, dstate});
  checks.shape("A", A, {nheads, headdim, dstate});
  checks.parameter("A", A, T);
  checks.shape("dt", dt, {batch, tokens, nheads, headdim});
  checks.dtype("dt", dt, {T, accumulate_type(T)});
  checks.rank("B", B, {x.dim()},
              heads
                  ? (with_tokens ? "(batch, tokens, ngroups, dstate)" : "(batch, ngroups, dstate)")
                  : (with_tokens ? "(batch, tokens, dstate)" : "(batch, dstate)"));
  const Dim ngroups{"ngroups", heads ? Access::size(B, B.dim() - 2) : Size(1), heads};
  checks.divides("B", "ngroups", ngroups.size, "nheads", nheads.size);
  for (const auto& [name, matrix] : {std::pair<const char*, const Tensor&>{"B", B}, {"C", C}}) {
    checks.shape(name, matrix, {batch, tokens, ngroups, dstate});
    checks.dtype(name, matrix, {T});
  }
  const auto parameter = [&](const char* name, const std::optional<Tensor>& tensor) {
    if (!tensor) return;
    checks.shape(name, *tensor, {nheads, headdim});
    checks.parameter(name, *tensor, T);
  };
  parameter("D", D);
  if (z) {
    checks.shape("z", *z, {batch, tokens, nheads, headdim});
    checks.dtype("z", *z, {T});
  }
  parameter("dt_bias", dt_bias);
  if (state_batch_indices) {
    checks.shape("state_batch_indices", *state_batch_indices, {batch});
    checks.index("state_batch_indices", *state_batch_indices);
  }
  if (intermediate_states) {
    checks.shape("intermediate_states", *intermediate_states,
                 {batch, tokens, nheads, headdim, dstate});
    state_type("intermediate_states", *intermediate_states);
  }
  return {batch.size,  tokens.size, nheads.size, headdim.size, ngroups.size,
          dstate.size, slots.size,  with_tokens, heads};
}

}  // namespace mamba_ssm::ops
