// selective_scan: check, allocate, run. Contract: include/mamba_ssm/ops.h.
#include "selective_scan.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "packed_sequences.h"
#include "run.h"

namespace mamba_ssm::ops {
namespace {

using kernels::cpu_kernels;
using kernels::SelectiveScanParams;
using kernels::View;

/// B or C as (batch, groups, dstate, seqlen), whatever rank it came in. For complex A a value per
/// time is a pair of neighbours along the last axis.
View<4> matrix_view(const Tensor& M, bool complex_A) {
  if (M.dim() == 2) {  // (dim, dstate), constant: every channel is a group of its own
    const View<2> constant = view<2>(M);
    return {constant.data,
            constant.dtype,
            {0, constant.stride[0], constant.stride[1], 0},
            constant.imag};
  }
  View<4> v;
  if (M.dim() == 3) {
    const View<3> single = view<3>(M);
    v = {single.data, single.dtype, {single.stride[0], 0, single.stride[1], single.stride[2]}};
  } else {
    v = view<4>(M);
  }
  if (complex_A) {
    v.imag = v.stride[3];
    v.stride[3] *= 2;
  }
  return v;
}

int64_t groups_of(const Tensor& M) {
  return M.dim() == 4 ? M.size(1) : M.dim() == 3 ? 1 : M.size(0);
}

/// A checked call: what forward and backward share.
struct Scan {
  SelectiveScanSizes<int64_t> sizes;
  SelectiveScanParams p{};
};

Scan check(const StableChecks& checks, const Tensor& u, const Tensor& delta, const Tensor& A,
           const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
           const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
           const OptionalTensor& seq_idx, bool delta_softplus) {
  Scan scan{
      check_selective_scan(checks, u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx)};
  SelectiveScanParams& p = scan.p;
  p.batch = scan.sizes.batch;
  p.dim = scan.sizes.dim;
  p.seqlen = scan.sizes.seqlen;
  p.dstate = scan.sizes.dstate;
  p.groups_B = groups_of(B);
  p.groups_C = groups_of(C);
  p.constant_B = B.dim() == 2;
  p.constant_C = C.dim() == 2;
  p.complex_A = is_complex(A.scalar_type());
  p.delta_softplus = delta_softplus;
  p.dtype = dtype_of(u.scalar_type());
  p.u = view<3>(u);
  p.delta = view<3>(delta);
  p.z = view<3>(z);
  p.A = view<2>(A);
  p.B = matrix_view(B, p.complex_A);
  p.C = matrix_view(C, p.complex_A);
  p.D = view<1>(D);
  p.delta_bias = view<1>(delta_bias);
  p.initial_state = view<3>(initial_state);
  return scan;
}

int64_t work_of(const SelectiveScanParams& p) { return p.batch * p.dim * p.seqlen * p.dstate; }

std::tuple<Tensor, Tensor, OptionalTensor> forward(
    const char* op, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
    const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
    const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
    const OptionalTensor& seq_idx, bool delta_softplus, bool keep_states) {
  const StableChecks checks(op, "u", u);
  Scan scan =
      check(checks, u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus);
  SelectiveScanParams& p = scan.p;
  const OptionalTensor marks = mark_sequences(checks, seq_idx);
  if (marks) p.marks = static_cast<const uint8_t*>(marks->data_ptr());
  Tensor out = allocate_like(op, u);
  Tensor last_state = allocate(op, u, {p.batch, p.dim, p.dstate}, scan.sizes.state_type);
  OptionalTensor states;
  if (keep_states) {
    states = allocate(op, u, {p.batch, scan.sizes.chunks, p.dim, p.dstate}, scan.sizes.state_type);
    p.states = states->data_ptr();
  }
  p.out = view<3>(out);
  p.last_state = view<3>(last_state);
  if constexpr (kWithCuda) {
    if (u.is_cuda()) {
      const CudaScope scope(u);
      const Workspace workspace(op, u, kernels::selective_scan_fwd_cuda_workspace(p));
      check_launch(op, kernels::selective_scan_fwd_cuda(p, workspace.data(), scope.stream()));
      return {out, last_state, states};
    }
  }
  parallel(selective_scan_fwd_items(p), work_of(p),
           [&](int64_t begin, int64_t end) { cpu_kernels().selective_scan_fwd(p, begin, end); });
  return {out, last_state, states};
}

std::tuple<Tensor, Tensor> selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,
                                          OptionalTensor D, OptionalTensor z,
                                          OptionalTensor delta_bias, OptionalTensor initial_state,
                                          OptionalTensor seq_idx, bool delta_softplus) {
  auto [out, last_state, states] =
      forward("selective_scan", u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx,
              delta_softplus, /*keep_states=*/false);
  return {out, last_state};
}

std::tuple<Tensor, Tensor, Tensor> selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B,
                                                      Tensor C, OptionalTensor D, OptionalTensor z,
                                                      OptionalTensor delta_bias,
                                                      OptionalTensor initial_state,
                                                      OptionalTensor seq_idx, bool delta_softplus) {
  auto [out, last_state, states] =
      forward("selective_scan", u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx,
              delta_softplus, /*keep_states=*/true);
  return {out, last_state, *states};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor,
                             OptionalTensor, OptionalTensor>;

/// Runs a checked backward into `gradients`.
void backward(const StableChecks& checks, Scan& scan, const Tensor& dout,
              const OptionalTensor& dlast_state, const Tensor& states, const Tensor& u,
              const OptionalTensor& seq_idx, const Gradients& gradients) {
  SelectiveScanParams& p = scan.p;
  check_selective_scan_gradients(checks, scan.sizes, u, dout, dlast_state, states);
  const OptionalTensor marks = mark_sequences(checks, seq_idx);
  if (marks) p.marks = static_cast<const uint8_t*>(marks->data_ptr());

  const auto& [du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state] = gradients;
  p.states = states.data_ptr();
  p.dout = view<3>(dout);
  p.dlast_state = view<3>(dlast_state);
  p.du = view<3>(du);
  p.ddelta = view<3>(ddelta);
  p.dz = view<3>(dz);
  p.dA = view<2>(dA);
  p.dB = matrix_view(dB, p.complex_A);
  p.dC = matrix_view(dC, p.complex_A);
  p.dD = view<1>(dD);
  p.ddelta_bias = view<1>(ddelta_bias);
  p.dinitial_state = view<3>(dinitial_state);
  if constexpr (kWithCuda) {
    if (u.is_cuda()) {
      const CudaScope scope(u);
      const Workspace workspace(checks.op(), u, kernels::selective_scan_bwd_cuda_workspace(p));
      check_launch(checks.op(),
                   kernels::selective_scan_bwd_cuda(p, workspace.data(), scope.stream()));
      return;
    }
  }
  const Workspace workspace(checks.op(), u, kernels::selective_scan_bwd_cpu_workspace(p));
  parallel(selective_scan_bwd_items(p), 3 * work_of(p), [&](int64_t begin, int64_t end) {
    cpu_kernels().selective_scan_bwd(p, workspace.data(), begin, end);
  });
  parallel(selective_scan_bwd_reduce_items(p), work_of(p) / 16, [&](int64_t begin, int64_t end) {
    cpu_kernels().selective_scan_bwd_reduce(p, workspace.data(), begin, end);
  });
}

Gradients selective_scan_bwd(Tensor dout, OptionalTensor dlast_state, Tensor states, Tensor u,
                             Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                             OptionalTensor z, OptionalTensor delta_bias,
                             OptionalTensor initial_state, OptionalTensor seq_idx,
                             bool delta_softplus) {
  const StableChecks checks("selective_scan_bwd", "u", u);
  Scan scan =
      check(checks, u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus);
  const auto like = [&](const auto& tensor) { return allocate_like(checks.op(), tensor); };
  Gradients gradients{like(u), like(delta),      like(A),
                      like(B), like(C),          like(D),
                      like(z), like(delta_bias), like(initial_state)};
  backward(checks, scan, dout, dlast_state, states, u, seq_idx, gradients);
  return gradients;
}

void selective_scan_bwd_out(Tensor dout, OptionalTensor dlast_state, Tensor states, Tensor u,
                            Tensor delta, Tensor A, Tensor B, Tensor C, OptionalTensor D,
                            OptionalTensor z, OptionalTensor delta_bias,
                            OptionalTensor initial_state, OptionalTensor seq_idx,
                            bool delta_softplus, Tensor du, Tensor ddelta, Tensor dA, Tensor dB,
                            Tensor dC, OptionalTensor dD, OptionalTensor dz,
                            OptionalTensor ddelta_bias, OptionalTensor dinitial_state) {
  const StableChecks checks("selective_scan_bwd_out", "u", u);
  Scan scan =
      check(checks, u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus);
  check_selective_scan_bwd_results(checks, u, delta, A, B, C, D, z, delta_bias, initial_state, du,
                                   ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state);
  backward(checks, scan, dout, dlast_state, states, u, seq_idx,
           {du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state});
}

void register_all(torch::stable::detail::StableLibrary& m) {
  m.impl("selective_scan", TORCH_BOX(&selective_scan));
  m.impl("selective_scan_fwd", TORCH_BOX(&selective_scan_fwd));
  m.impl("selective_scan_bwd", TORCH_BOX(&selective_scan_bwd));
  m.impl("selective_scan_bwd_out", TORCH_BOX(&selective_scan_bwd_out));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CPU, m) { register_all(m); }
#ifdef MAMBA_SSM_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CUDA, m) { register_all(m); }
#endif

}  // namespace mamba_ssm::ops
