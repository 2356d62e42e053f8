// Every schema of the library, and nothing else. Shapes and meanings: include/mamba_ssm/ops.h.
//
// Arguments after `*` are keyword-only, so that adding one later breaks no caller. Training ops
// return fresh tensors; decode ops mark the cache they change. An op named X_bwd is the derivative
// of X; optional gradients are None where the input is absent. An op named Y_out is Y into tensors
// of any strides that the caller made, such as parts of a larger tensor: its last arguments are the
// results of Y, under their names. X_fwd is X as training runs it.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mamba_ssm, m) {
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, Tensor? seq_idx=None, "
      "Tensor? initial_states=None, *, bool silu=False) -> (Tensor out, Tensor final_states)");
  m.def(
      "causal_conv1d_out(Tensor x, Tensor weight, Tensor? bias=None, Tensor? seq_idx=None, "
      "Tensor? initial_states=None, *, bool silu=False, Tensor(a!) out, Tensor(b!) final_states) "
      "-> ()");
  m.def(
      "causal_conv1d_bwd(Tensor dout, Tensor? dfinal_states, Tensor x, Tensor weight, "
      "Tensor? bias=None, Tensor? seq_idx=None, Tensor? initial_states=None, *, bool silu=False) "
      "-> "
      "(Tensor dx, Tensor dweight, Tensor? dbias, Tensor? dinitial_states)");
  m.def(
      "causal_conv1d_bwd_out(Tensor dout, Tensor? dfinal_states, Tensor x, Tensor weight, "
      "Tensor? bias=None, Tensor? seq_idx=None, Tensor? initial_states=None, *, bool silu=False, "
      "Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!)? dbias=None, "
      "Tensor(d!)? dinitial_states=None) -> ()");
  m.def(
      "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias=None, "
      "Tensor? cache_seqlens=None, Tensor? conv_state_indices=None, *, bool silu=False) -> Tensor");
  m.def("causal_conv1d_varlen_states(Tensor x, Tensor cu_seqlens, int state_len) -> Tensor");

  m.def(
      "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D=None, "
      "Tensor? z=None, Tensor? delta_bias=None, Tensor? initial_state=None, Tensor? seq_idx=None, "
      "*, bool delta_softplus=False) -> (Tensor out, Tensor last_state)");
  // The forward as training runs it: also keeps the state at every chunk start for the backward.
  m.def(
      "selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D=None, "
      "Tensor? z=None, Tensor? delta_bias=None, Tensor? initial_state=None, Tensor? seq_idx=None, "
      "*, bool delta_softplus=False) -> (Tensor out, Tensor last_state, Tensor states)");
  m.def(
      "selective_scan_bwd(Tensor dout, Tensor? dlast_state, Tensor states, Tensor u, Tensor delta, "
      "Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, Tensor? delta_bias=None, "
      "Tensor? initial_state=None, Tensor? seq_idx=None, *, bool delta_softplus=False) -> "
      "(Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor? dD, Tensor? dz, "
      "Tensor? ddelta_bias, Tensor? dinitial_state)");
  m.def(
      "selective_scan_bwd_out(Tensor dout, Tensor? dlast_state, Tensor states, Tensor u, "
      "Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, "
      "Tensor? delta_bias=None, Tensor? initial_state=None, Tensor? seq_idx=None, *, "
      "bool delta_softplus=False, Tensor(a!) du, Tensor(b!) ddelta, Tensor(c!) dA, "
      "Tensor(d!) dB, Tensor(e!) dC, Tensor(f!)? dD=None, Tensor(g!)? dz=None, "
      "Tensor(h!)? ddelta_bias=None, Tensor(i!)? dinitial_state=None) -> ()");

  m.def(
      "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
      "Tensor? D=None, Tensor? z=None, Tensor? dt_bias=None, Tensor? state_batch_indices=None, "
      "*, bool dt_softplus=False, Tensor(b!)? intermediate_states=None, "
      "bool A_is_log=False) -> Tensor");

  // Schemas know no infinite default: without dt_max there is no upper limit.
  m.def(
      "ssd_chunk_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, "
      "Tensor? z=None, Tensor? dt_bias=None, Tensor? initial_states=None, Tensor? seq_idx=None, "
      "Tensor? cu_seqlens=None, *, bool dt_softplus=False, float dt_min=0.0, float? dt_max=None) "
      "-> (Tensor out, Tensor final_states)");
  m.def(
      "ssd_chunk_scan_bwd(Tensor dout, Tensor? dfinal_states, Tensor x, Tensor dt, Tensor A, "
      "Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, Tensor? dt_bias=None, "
      "Tensor? initial_states=None, Tensor? seq_idx=None, Tensor? cu_seqlens=None, *, "
      "bool dt_softplus=False, float dt_min=0.0, float? dt_max=None) -> (Tensor dx, Tensor ddt, "
      "Tensor dA, Tensor dB, Tensor dC, Tensor? dD, Tensor? dz, Tensor? ddt_bias, "
      "Tensor? dinitial_states)");
  m.def(
      "ssd_chunk_scan_bwd_out(Tensor dout, Tensor? dfinal_states, Tensor x, Tensor dt, Tensor A, "
      "Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, Tensor? dt_bias=None, "
      "Tensor? initial_states=None, Tensor? seq_idx=None, Tensor? cu_seqlens=None, *, "
      "bool dt_softplus=False, float dt_min=0.0, float? dt_max=None, Tensor(a!) dx, "
      "Tensor(b!) ddt, Tensor(c!) dA, Tensor(d!) dB, Tensor(e!) dC, Tensor(f!)? dD=None, "
      "Tensor(g!)? dz=None, Tensor(h!)? ddt_bias=None, Tensor(i!)? dinitial_states=None) -> ()");

  m.def(
      "rms_norm_gated(Tensor x, Tensor weight, Tensor? bias=None, Tensor? z=None, *, "
      "float eps=1e-6, int? group_size=None, bool norm_before_gate=True, bool is_rms_norm=True) -> "
      "Tensor");
  m.def(
      "rms_norm_gated_bwd(Tensor dout, Tensor x, Tensor weight, Tensor? bias=None, "
      "Tensor? z=None, *, float eps=1e-6, int? group_size=None, bool norm_before_gate=True, "
      "bool is_rms_norm=True) -> (Tensor dx, Tensor dweight, Tensor? dbias, Tensor? dz)");
  m.def(
      "rms_norm_gated_bwd_out(Tensor dout, Tensor x, Tensor weight, Tensor? bias=None, "
      "Tensor? z=None, *, float eps=1e-6, int? group_size=None, bool norm_before_gate=True, "
      "bool is_rms_norm=True, Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!)? dbias=None, "
      "Tensor(d!)? dz=None) -> ()");

  m.def(
      "decode_linear(Tensor x, Tensor weight, Tensor? bias=None, *, Tensor? z=None, "
      "Tensor? norm_weight=None, float eps=1e-6) -> Tensor");
  m.def(
      "decode_linear_prenorm(Tensor x, Tensor weight, Tensor? bias=None, *, "
      "Tensor? residual=None, Tensor norm_weight, float eps=1e-6, "
      "bool residual_in_fp32=False) -> (Tensor out, Tensor residual_out)");

  // residual_out is None unless prenorm asks for it, and where nothing was added to x: it is x.
  m.def(
      "layer_norm(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, "
      "Tensor? x1=None, Tensor? weight1=None, Tensor? bias1=None, Tensor? rowscale=None, "
      "Tensor? dropout_mask=None, Tensor? dropout_mask1=None, *, float eps=1e-6, "
      "float dropout_p=0.0, bool prenorm=False, bool residual_in_fp32=False, "
      "bool is_rms_norm=False) -> (Tensor out, Tensor? out1, Tensor? residual_out)");
  // Starts from `sum`: residual_out, or x where that is None. dresidual and dx1 are None where they
  // would be dx, bit for bit.
  m.def(
      "layer_norm_bwd(Tensor dout, Tensor? dout1, Tensor? dresidual_out, Tensor sum, "
      "Tensor weight, Tensor? bias=None, Tensor? weight1=None, Tensor? bias1=None, "
      "Tensor? rowscale=None, Tensor? dropout_mask=None, Tensor? dropout_mask1=None, *, "
      "float eps=1e-6, float dropout_p=0.0, bool is_rms_norm=False, bool has_residual=False, "
      "bool has_x1=False) -> (Tensor dx, Tensor dweight, Tensor? dbias, Tensor? dresidual, "
      "Tensor? dx1, Tensor? dweight1, Tensor? dbias1)");
}
