// What a call of selective_scan must look like. Meaning: <mamba_ssm/ops.h>.
#pragma once

#include <mamba_ssm/limits.h>

#include "checks.h"

namespace mamba_ssm::ops {

template <class Size>
struct SelectiveScanSizes {
  Size batch, dim, seqlen, dstate, chunks;
  ScalarType state_type;  // of last_state and states: complex with A
};

/// B or C: constant (dim, dstate), or per time with one group or several.
template <class Access, class Tensor = typename Access::Tensor>
void check_scan_matrix(const Checks<Access>& checks, const char* name, const Tensor& matrix,
                       const Tensor& u, const Tensor& A) {
  const bool complex_A = is_complex(A.scalar_type());
  const auto batch = Access::size(u, 0), dim = Access::size(u, 1), dstate = Access::size(A, 1);
  const auto columns = Access::size(u, 2) * (complex_A ? 2 : 1);
  const char* columns_name = complex_A ? "2 * seqlen" : "seqlen";
  checks.rank(name, matrix, {2, 3, 4},
              "(dim, dstate), (batch, dstate, seqlen) or (batch, groups, dstate, seqlen)");
  if (matrix.dim() == 2) {
    checks.shape(name, matrix, {{"dim", dim}, {"dstate", dstate}});
    if (complex_A) {
      checks.dtype(name, matrix, {A.scalar_type()});
    } else {
      checks.parameter(name, matrix, u.scalar_type());
    }
    return;
  }
  if (matrix.dim() == 3) {
    checks.shape(name, matrix, {{"batch", batch}, {"dstate", dstate}, {columns_name, columns}});
  } else {
    const auto groups = Access::size(matrix, 1);
    checks.shape(
        name, matrix,
        {{"batch", batch}, {"groups", groups}, {"dstate", dstate}, {columns_name, columns}});
    checks.divides(name, "groups", groups, "dim", dim);
  }
  checks.dtype(name, matrix, {u.scalar_type()});
}

/// Arguments that forward and backward share.
template <class Access, class Tensor = typename Access::Tensor>
SelectiveScanSizes<typename Access::Size> check_selective_scan(
    const Checks<Access>& checks, const Tensor& u, const Tensor& delta, const Tensor& A,
    const Tensor& B, const Tensor& C, const std::optional<Tensor>& D,
    const std::optional<Tensor>& z, const std::optional<Tensor>& delta_bias,
    const std::optional<Tensor>& initial_state, const std::optional<Tensor>& seq_idx) {
  checks.rank("u", u, {3}, "(batch, dim, seqlen)");
  checks.activation("u", u);
  const ScalarType T = u.scalar_type();
  const auto batch = Access::size(u, 0), dim = Access::size(u, 1), seqlen = Access::size(u, 2);
  checks.shape("delta", delta, {{"batch", batch}, {"dim", dim}, {"seqlen", seqlen}});
  checks.dtype("delta", delta, {T});
  checks.rank("A", A, {2}, "(dim, dstate)");
  const auto dstate = Access::size(A, 1);
  checks.shape("A", A, {{"dim", dim}, {"dstate", dstate}});
  checks.at_least("A", A, "dstate", 1, 1);
  ScalarType state_type = accumulate_type(T);
  if (is_complex(A.scalar_type())) {
    state_type = complex_of(state_type);
    checks.dtype("A", A, {state_type});
  } else {
    checks.parameter("A", A, T);
  }
  check_scan_matrix(checks, "B", B, u, A);
  check_scan_matrix(checks, "C", C, u, A);
  if (D) {
    checks.shape("D", *D, {{"dim", dim}});
    checks.parameter("D", *D, T);
  }
  if (z) {
    checks.shape("z", *z, {{"batch", batch}, {"dim", dim}, {"seqlen", seqlen}});
    checks.dtype("z", *z, {T});
  }
  if (delta_bias) {
    checks.shape("delta_bias", *delta_bias, {{"dim", dim}});
    checks.parameter("delta_bias", *delta_bias, T);
  }
  if (initial_state) {
    checks.shape("initial_state", *initial_state,
                 {{"batch", batch}, {"dim", dim}, {"dstate", dstate}});
    if (is_complex(state_type)) {
      checks.dtype("initial_state", *initial_state, {state_type});
    } else {
      checks.dtype("initial_state", *initial_state, {T, state_type});
    }
  }
  if (seq_idx) {
    checks.shape("seq_idx", *seq_idx, {{"batch", batch}, {"seqlen", seqlen}});
    checks.index("seq_idx", *seq_idx);
  }
  const auto chunks = (seqlen + (kSelectiveScanChunk - 1)) / kSelectiveScanChunk;
  return {batch, dim, seqlen, dstate, chunks, state_type};
}

/// Incoming gradients and saved states of the backward.
template <class Access, class Tensor = typename Access::Tensor>
void check_selective_scan_gradients(const Checks<Access>& checks,
                                    const SelectiveScanSizes<typename Access::Size>& sizes,
                                    const Tensor& u, const Tensor& dout,
                                    const std::optional<Tensor>& dlast_state,
                                    const Tensor& states) {
  checks.shape("dout", dout,
               {{"batch", sizes.batch}, {"dim", sizes.dim}, {"seqlen", sizes.seqlen}});
  checks.dtype("dout", dout, {u.scalar_type()});
  if (dlast_state) {
    checks.shape("dlast_state", *dlast_state,
                 {{"batch", sizes.batch}, {"dim", sizes.dim}, {"dstate", sizes.dstate}});
    checks.dtype("dlast_state", *dlast_state, {sizes.state_type});
  }
  checks.shape("states", states,
               {{"batch", sizes.batch},
                {"chunks", sizes.chunks},
                {"dim", sizes.dim},
                {"dstate", sizes.dstate}});
  checks.dtype("states", states, {sizes.state_type});
  if (!states.is_contiguous()) {
    checks.fail("states must be contiguous, as selective_scan_fwd returns it");
  }
}

/// Gradients that the caller made.
template <class Access, class Tensor = typename Access::Tensor>
void check_selective_scan_bwd_results(
    const Checks<Access>& checks, const Tensor& u, const Tensor& delta, const Tensor& A,
    const Tensor& B, const Tensor& C, const std::optional<Tensor>& D,
    const std::optional<Tensor>& z, const std::optional<Tensor>& delta_bias,
    const std::optional<Tensor>& initial_state, const Tensor& du, const Tensor& ddelta,
    const Tensor& dA, const Tensor& dB, const Tensor& dC, const std::optional<Tensor>& dD,
    const std::optional<Tensor>& dz, const std::optional<Tensor>& ddelta_bias,
    const std::optional<Tensor>& dinitial_state) {
  checks.result("du", du, "u", u);
  checks.result("ddelta", ddelta, "delta", delta);
  checks.result("dA", dA, "A", A);
  checks.result("dB", dB, "B", B);
  checks.result("dC", dC, "C", C);
  checks.result("dD", dD, "D", D);
  checks.result("dz", dz, "z", z);
  checks.result("ddelta_bias", ddelta_bias, "delta_bias", delta_bias);
  checks.result("dinitial_state", dinitial_state, "initial_state", initial_state);
}

}  // namespace mamba_ssm::ops
