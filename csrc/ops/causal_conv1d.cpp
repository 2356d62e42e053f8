// causal_conv1d and its decode ops: check, allocate, run. Contracts: include/mamba_ssm/ops.h.
#include "causal_conv1d.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "packed_sequences.h"
#include "run.h"

namespace mamba_ssm::ops {
namespace {

using kernels::CausalConv1dParams;
using kernels::CausalConv1dUpdateParams;
using kernels::CausalConv1dVarlenStatesParams;
using kernels::cpu_kernels;

/// Checks what forward and backward share and fills the common part of their Params.
CausalConv1dParams check(const StableChecks& checks, const Tensor& x, const Tensor& weight,
                         const OptionalTensor& bias, const OptionalTensor& seq_idx,
                         const OptionalTensor& initial_states, bool silu) {
  const auto sizes = check_causal_conv1d(checks, x, weight, bias, seq_idx, initial_states);
  CausalConv1dParams p{};
  p.batch = sizes.batch;
  p.dim = sizes.dim;
  p.seqlen = sizes.seqlen;
  p.width = sizes.width;
  p.silu = silu;
  p.dtype = dtype_of(x.scalar_type());
  p.x = view<3>(x);
  p.weight = view<2>(weight);
  p.bias = view<1>(bias);
  p.seq_idx = view<2>(seq_idx);
  p.initial_states = view<3>(initial_states);
  return p;
}

void forward(const StableChecks& checks, CausalConv1dParams& p, const Tensor& x, const Tensor& out,
             const Tensor& final_states) {
  p.out = view<3>(out);
  p.final_states = view<3>(final_states);
  if constexpr (kWithCuda) {
    if (x.is_cuda()) {
      const CudaScope scope(x);
      check_launch(checks.op(), kernels::causal_conv1d_fwd_cuda(p, scope.stream()));
      return;
    }
  }
  parallel(causal_conv1d_fwd_items(p), x.numel() * p.width,
           [&](int64_t begin, int64_t end) { cpu_kernels().causal_conv1d_fwd(p, begin, end); });
}

std::tuple<Tensor, Tensor> causal_conv1d(Tensor x, Tensor weight, OptionalTensor bias,
                                         OptionalTensor seq_idx, OptionalTensor initial_states,
                                         bool silu) {
  const StableChecks checks("causal_conv1d", "x", x);
  CausalConv1dParams p = check(checks, x, weight, bias, seq_idx, initial_states, silu);
  Tensor out = allocate_like(checks.op(), x);
  Tensor final_states = allocate_columns(checks.op(), x, p.batch, p.dim, p.width - 1);
  forward(checks, p, x, out, final_states);
  return {out, final_states};
}

void causal_conv1d_out(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor seq_idx,
                       OptionalTensor initial_states, bool silu, Tensor out, Tensor final_states) {
  const StableChecks checks("causal_conv1d_out", "x", x);
  CausalConv1dParams p = check(checks, x, weight, bias, seq_idx, initial_states, silu);
  check_causal_conv1d_results(checks, {p.batch, p.dim, p.seqlen, p.width}, x, out, final_states);
  forward(checks, p, x, out, final_states);
}

using Gradients = std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor>;

void backward(const StableChecks& checks, CausalConv1dParams& p, const Tensor& dout,
              const OptionalTensor& dfinal_states, const Tensor& x, const Gradients& gradients) {
  check_causal_conv1d_gradients(checks, {p.batch, p.dim, p.seqlen, p.width}, x, dout,
                                dfinal_states);
  const auto& [dx, dweight, dbias, dinitial_states] = gradients;
  p.dout = view<3>(dout);
  p.dfinal_states = view<3>(dfinal_states);
  p.dx = view<3>(dx);
  p.dweight = view<2>(dweight);
  p.dbias = view<1>(dbias);
  p.dinitial_states = view<3>(dinitial_states);
  if constexpr (kWithCuda) {
    if (x.is_cuda()) {
      const CudaScope scope(x);
      const Workspace workspace(checks.op(), x, kernels::causal_conv1d_bwd_cuda_workspace(p));
      check_launch(checks.op(),
                   kernels::causal_conv1d_bwd_cuda(p, workspace.data(), scope.stream()));
      return;
    }
  }
  parallel(causal_conv1d_bwd_items(p), 2 * x.numel() * p.width,
           [&](int64_t begin, int64_t end) { cpu_kernels().causal_conv1d_bwd(p, begin, end); });
}

Gradients causal_conv1d_bwd(Tensor dout, OptionalTensor dfinal_states, Tensor x, Tensor weight,
                            OptionalTensor bias, OptionalTensor seq_idx,
                            OptionalTensor initial_states, bool silu) {
  const StableChecks checks("causal_conv1d_bwd", "x", x);
  CausalConv1dParams p = check(checks, x, weight, bias, seq_idx, initial_states, silu);
  OptionalTensor dinitial_states;
  if (initial_states) {
    dinitial_states = allocate_columns(checks.op(), x, p.batch, p.dim, p.width - 1);
  }
  Gradients gradients{allocate_like(checks.op(), x), allocate_like(checks.op(), weight),
                      allocate_like(checks.op(), bias), dinitial_states};
  backward(checks, p, dout, dfinal_states, x, gradients);
  return gradients;
}

void causal_conv1d_bwd_out(Tensor dout, OptionalTensor dfinal_states, Tensor x, Tensor weight,
                           OptionalTensor bias, OptionalTensor seq_idx,
                           OptionalTensor initial_states, bool silu, Tensor dx, Tensor dweight,
                           OptionalTensor dbias, OptionalTensor dinitial_states) {
  const StableChecks checks("causal_conv1d_bwd_out", "x", x);
  CausalConv1dParams p = check(checks, x, weight, bias, seq_idx, initial_states, silu);
  check_causal_conv1d_bwd_results(checks, x, weight, bias, initial_states, dx, dweight, dbias,
                                  dinitial_states);
  backward(checks, p, dout, dfinal_states, x, {dx, dweight, dbias, dinitial_states});
}

Tensor causal_conv1d_update(Tensor x, Tensor conv_state, Tensor weight, OptionalTensor bias,
                            OptionalTensor cache_seqlens, OptionalTensor conv_state_indices,
                            bool silu) {
  const StableChecks checks("causal_conv1d_update", "x", x);
  const auto sizes = check_causal_conv1d_update(checks, x, conv_state, weight, bias, cache_seqlens,
                                                conv_state_indices);
  checks.writable("conv_state", conv_state);
  check_index_below(checks, "conv_state_indices", conv_state_indices, sizes.num_slots);
  Tensor out = allocate_like(checks.op(), x);
  CausalConv1dUpdateParams p{};
  p.batch = sizes.batch;
  p.dim = sizes.dim;
  p.seqlen = sizes.seqlen;
  p.width = sizes.width;
  p.state_len = sizes.state_len;
  p.num_slots = sizes.num_slots;
  p.silu = silu;
  p.dtype = dtype_of(x.scalar_type());
  const auto with_time = [](const Tensor& tensor) {
    if (tensor.dim() == 3) return view<3>(tensor);
    const kernels::View<2> flat = view<2>(tensor);
    return kernels::View<3>{flat.data, flat.dtype, {flat.stride[0], flat.stride[1], 1}};
  };
  p.x = with_time(x);
  p.out = with_time(out);
  p.conv_state = view<3>(conv_state);
  p.weight = view<2>(weight);
  p.bias = view<1>(bias);
  p.cache_seqlens = view<1>(cache_seqlens);
  p.conv_state_indices = view<1>(conv_state_indices);
  if constexpr (kWithCuda) {
    if (x.is_cuda()) {
      const CudaScope scope(x);
      check_launch(checks.op(), kernels::causal_conv1d_update_cuda(p, scope.stream()));
      return out;
    }
  }
  parallel(causal_conv1d_update_items(p), x.numel() * (p.width + p.state_len),
           [&](int64_t begin, int64_t end) { cpu_kernels().causal_conv1d_update(p, begin, end); });
  return out;
}

Tensor causal_conv1d_varlen_states(Tensor x, Tensor cu_seqlens, int64_t state_len) {
  const StableChecks checks("causal_conv1d_varlen_states", "x", x);
  check_causal_conv1d_varlen_states(checks, x, cu_seqlens, state_len);
  check_offsets(checks, cu_seqlens, "total_tokens", x.size(0));
  CausalConv1dVarlenStatesParams p{};
  p.total_tokens = x.size(0);
  p.dim = x.size(1);
  p.num_sequences = cu_seqlens.size(0) - 1;
  p.state_len = state_len;
  p.dtype = dtype_of(x.scalar_type());
  Tensor states = allocate_columns(checks.op(), x, p.num_sequences, p.dim, state_len);
  p.x = view<2>(x);
  p.cu_seqlens = view<1>(cu_seqlens);
  p.states = view<3>(states);
  if constexpr (kWithCuda) {
    if (x.is_cuda()) {
      const CudaScope scope(x);
      check_launch(checks.op(), kernels::causal_conv1d_varlen_states_cuda(p, scope.stream()));
      return states;
    }
  }
  parallel(causal_conv1d_varlen_states_items(p), states.numel(), [&](int64_t begin, int64_t end) {
    cpu_kernels().causal_conv1d_varlen_states(p, begin, end);
  });
  return states;
}

void register_all(torch::stable::detail::StableLibrary& m) {
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d));
  m.impl("causal_conv1d_out", TORCH_BOX(&causal_conv1d_out));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&causal_conv1d_bwd));
  m.impl("causal_conv1d_bwd_out", TORCH_BOX(&causal_conv1d_bwd_out));
  m.impl("causal_conv1d_update", TORCH_BOX(&causal_conv1d_update));
  m.impl("causal_conv1d_varlen_states", TORCH_BOX(&causal_conv1d_varlen_states));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CPU, m) { register_all(m); }
#ifdef MAMBA_SSM_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mamba_ssm, CUDA, m) { register_all(m); }
#endif

}  // namespace mamba_ssm::ops
