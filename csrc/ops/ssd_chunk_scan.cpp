// ssd_chunk_scan: check, allocate, run. Contract: include/mamba_ssm/ops.h.
#include "ssd_chunk_scan.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "packed_sequences.h"
#include "run.h"

namespace mamba_ssm::ops {
namespace {

using kernels::cpu_kernels;
using kernels::SsdChunkScanParams;
using kernels::View;

/// D or its gradient as (nheads, headdim): one number per head has stride 0 over headdim.
View<2> view_per_channel(const OptionalTensor& D) {
  if (!D || D->dim() == 2) return view<2>(D);
  const View<1> per_head = view<1>(*D);
  return {per_head.data, per_head.dtype, {per_head.stride[0], 0}};
}

/// A checked call: what forward and backward share.
struct Scan {
  SsdChunkScanSizes<int64_t> sizes;
  SsdChunkScanParams p{};
  OptionalTensor marks{};  // keeps p.marks alive
};

Scan check(const StableChecks& checks, const Tensor& x, const Tensor& dt, const Tensor& A,
           const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
           const OptionalTensor& dt_bias, const OptionalTensor& initial_states,
           const OptionalTensor& seq_idx, const OptionalTensor& cu_seqlens, bool dt_softplus,
           double dt_min, std::optional<double> dt_max) {
  const double upper = dt_max.value_or(std::numeric_limits<double>::infinity());
  Scan scan{check_ssd_chunk_scan(checks, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx,
                                 cu_seqlens, dt_min, upper)};
  if (cu_seqlens) check_offsets(checks, *cu_seqlens, "seqlen", scan.sizes.seqlen);
  SsdChunkScanParams& p = scan.p;
  p.batch = scan.sizes.batch;
  p.seqlen = scan.sizes.seqlen;
  p.nheads = scan.sizes.nheads;
  p.headdim = scan.sizes.headdim;
  p.ngroups = scan.sizes.ngroups;
  p.dstate = scan.sizes.dstate;
  p.num_sequences = scan.sizes.num_sequences;
  p.num_initial_states = initial_states ? initial_states->size(0) : 0;
  p.dt_softplus = dt_softplus;
  p.D_per_channel = D && D->dim() == 2;
  p.dt_min = dt_min;
  p.dt_max = upper;
  p.dtype = dtype_of(x.scalar_type());
  p.x = view<4>(x);
  p.z = view<4>(z);
  p.dt = view<3>(dt);
  p.A = view<1>(A);
  p.B = view<4>(B);
  p.C = view<4>(C);
  p.D = view_per_channel(D);
  p.dt_bias = view<1>(dt_bias);
  p.initial_states = view<4>(initial_states);
  p.cu_seqlens = view<1>(cu_seqlens);
  return scan;
}

/// Turns seq_idx into the marks that the kernels read.
void mark(const StableChecks& checks, Scan& scan, const OptionalTensor& seq_idx,
          const OptionalTensor& cu_seqlens) {
  scan.marks = mark_sequences(checks, seq_idx, cu_seqlens);
  if (scan.marks) scan.p.marks = static_cast<const uint8_t*>(scan.marks->data_ptr());
}

int64_t work_of(const SsdChunkScanParams& p) {
  return p.batch * p.seqlen * p.nheads * p.headdim * p.dstate;
}

std::tuple<Tensor, Tensor> ssd_chunk_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C,
                                          OptionalTensor D, OptionalTensor z,
                                          OptionalTensor dt_bias, OptionalTensor initial_states,
                                          OptionalTensor seq_idx, OptionalTensor cu_seqlens,
                                          bool dt_softplus, double dt_min,
                                          std::optional<double> dt_max) {
  const StableChecks checks("ssd_chunk_scan", "x", x);
  Scan scan = check(checks, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens,
                    dt_softplus, dt_min, dt_max);
  SsdChunkScanParams& p = scan.p;
  mark(checks, scan, seq_idx, cu_seqlens);
  Tensor out = allocate(checks.op(), x, {p.batch, p.seqlen, p.nheads, p.headdim}, x.scalar_type());
  Tensor final_states = allocate(checks.op(), x, {p.num_sequences, p.nheads, p.headdim, p.dstate},
                                 scan.sizes.state_type);
  p.out = view<4>(out);
  p.final_states = view<4>(final_states);
  if constexpr (kWithCuda) {
    if (x.is_cuda()) {
      const CudaScope scope(x);
      const Workspace workspace(checks.op(), x, kernels::ssd_chunk_scan_fwd_cuda_workspace(p));
      check_launch(checks.op(),
                   kernels::ssd_chunk_scan_fwd_cuda(p, workspace.data(), scope.stream()));
      return {out, final_states};
    }
  }
  parallel(ssd_chunk_scan_fwd_items(p), work_of(p),
           [&](int64_t begin, int64_t end) { cpu_kernels().ssd_chunk_scan_fwd(p, begin, end); });
  return {out, final_states};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor,
                             OptionalTensor, OptionalTensor>;

/// Runs a checked backward into `gradients`.
void backward(const StableChecks& checks, Scan& scan, const Tensor& dout,
              const OptionalTensor& dfinal_states, const Tensor& x, const OptionalTensor& seq_idx,
              const OptionalTensor& cu_seqlens, const Gradients& gradients) {
  SsdChunkScanParams& p = scan.p;
  check_ssd_chunk_scan_gradients(checks, scan.sizes, x, dout, dfinal_states);
  mark(checks, scan, seq_idx, cu_seqlens);

  const auto& [dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states] = gradients;
  p.dout = view<4>(dout);
  p.dfinal_states = view<4>(dfinal_states);
  p.dx = view<4>(dx);
  p.dz = view<4>(dz);
  p.ddt = view<3>(ddt);
  p.dA = view<1>(dA);
  p.dB = view<4>(dB);
  p.dC = view<4>(dC);
  p.dD = view_per_channel(dD);
  p.ddt_bias = view<1>(ddt_bias);
  p.dinitial_states = view<4>(dinitial_states);
  if constexpr (kWithCuda) {
    if (x.is_cuda()) {
      const CudaScope scope(x);
      const Workspace workspace(checks.op(), x, kernels::ssd_chunk_scan_bwd_cuda_workspace(p));
      check_launch(checks.op(),
                   kernels::ssd_chunk_scan_bwd_cuda(p, workspace.data(), scope.stream()));
      return;
    }
  }
  const Workspace workspace(checks.op(), x, kernels::ssd_chunk_scan_bwd_cpu_workspace(p));
  parallel(ssd_chunk_scan_bwd_items(p), 3 * work_of(p), [&](int64_t begin, int64_t end) {
    cpu_kernels().ssd_chunk_scan_bwd(p, workspace.data(), begin, end);
  });
  parallel(ssd_chunk_scan_bwd_reduce_items(p), work_of(p) / 16, [&](int64_t begin, int64_t end) {
    cpu_kernels().ssd_chunk_scan_bwd_reduce(p, workspace.data(), begin, end);
  });
}

Gradients ssd_chunk_scan_bwd(Tensor dout, OptionalTensor dfinal_states, Tensor x, Tensor dt,
                             Tensor A, Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
                             OptionalTensor dt_bias, OptionalTensor initial_states,
                             OptionalTensor seq_idx, OptionalTensor cu_seqlens, bool dt_softplus,
                             double dt_min, std::optional<double> dt_max) {
  const StableChecks checks("ssd_chunk_scan_bwd", "x", x);
  Scan scan = check(checks, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens,
                    dt_softplus, dt_min, dt_max);
  const auto like = [&](const auto& tensor) { return allocate_like(checks.op(), tensor); };
  Gradients gradients{like(x), like(dt),      like(A),
                      like(B), like(C),       like(D),
                      like(z), like(dt_bias), like(initial_states)};
  backward(checks, scan, dout, dfinal_states, x, seq_idx, cu_seqlens, gradients);
  return gradients;
}

void ssd_chunk_scan_bwd_out(Tensor dout, OptionalTensor dfinal_states, Tensor x, Tensor dt,
                            Tensor A, Tensor B, Tensor C, OptionalTensor D, OptionalTensor z,
                            OptionalTensor dt_bias, OptionalTensor initial_states,
                            OptionalTensor seq_idx, OptionalTensor cu_seqlens, bool dt_softplus,
                            double dt_min, std::optional<double> dt_max, Tensor dx, Tensor ddt,
                            Tensor dA, Tensor dB, Tensor dC, OptionalTensor dD, OptionalTensor dz,
                            OptionalTensor ddt_bias, OptionalTensor dinitial_states) {
  const StableChecks checks("ssd_chunk_scan_bwd_out", "x", x);
  Scan scan = check(checks, x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens,
                    dt_softplus, dt_min, dt_max);
  check_ssd_chunk_scan_bwd_results(checks, x, dt, A, B, C, D, z, dt_bias, initial_states, dx, ddt,
                                   dA, dB, dC, dD, dz, ddt_bias, dinitial_states);
  backward(checks, scan, dout, dfinal_states, x, seq_idx, cu_seqlens,
           {dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_states});
}

void register_all(torch::stable::detail::StableLibrary& m) {
  m.impl("ssd_chunk_scan", TORCH_BOX(&ssd_chunk_scan));
  m.impl("ssd_chunk_scan_bwd", TORCH_BOX(&ssd_chunk_scan_bwd));
  m.impl("ssd_chunk_scan_bwd_out", TORCH_BOX(&ssd_chunk_scan_bwd_out));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CPU, m) { register_all(m); }
#ifdef MAMBA_SSM_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CUDA, m) { register_all(m); }
#endif

}  // namespace mamba_ssm::ops
