// What a call of ssd_chunk_scan must look like. Meaning: <mamba_ssm/ops.h>.
#pragma once

#include "checks.h"

namespace mamba_ssm::ops {

template <class Size>
struct SsdChunkScanSizes {
  Size batch, seqlen, nheads, headdim, ngroups, dstate;
  Size num_sequences;     // of final_states: those of cu_seqlens, else the rows of the batch
  ScalarType state_type;  // of final_states
};

/// Arguments that forward and backward share.
template <class Access, class Tensor = typename Access::Tensor>
SsdChunkScanSizes<typename Access::Size> check_ssd_chunk_scan(
    const Checks<Access>& checks, const Tensor& x, const Tensor& dt, const Tensor& A,
    const Tensor& B, const Tensor& C, const std::optional<Tensor>& D,
    const std::optional<Tensor>& z, const std::optional<Tensor>& dt_bias,
    const std::optional<Tensor>& initial_states, const std::optional<Tensor>& seq_idx,
    const std::optional<Tensor>& cu_seqlens, double dt_min, double dt_max) {
  checks.rank("x", x, {4}, "(batch, seqlen, nheads, headdim)");
  checks.activation("x", x);
  const ScalarType T = x.scalar_type();
  const ScalarType state_type = accumulate_type(T);
  const auto batch = Access::size(x, 0), seqlen = Access::size(x, 1), nheads = Access::size(x, 2),
             headdim = Access::size(x, 3);
  checks.shape("dt", dt, {{"batch", batch}, {"seqlen", seqlen}, {"nheads", nheads}});
  checks.dtype("dt", dt, {T, state_type});
  checks.shape("A", A, {{"nheads", nheads}});
  checks.parameter("A", A, T);
  checks.rank("B", B, {4}, "(batch, seqlen, ngroups, dstate)");
  const auto ngroups = Access::size(B, 2), dstate = Access::size(B, 3);
  checks.shape("B", B,
               {{"batch", batch}, {"seqlen", seqlen}, {"ngroups", ngroups}, {"dstate", dstate}});
  checks.divides("B", "ngroups", ngroups, "nheads", nheads);
  checks.at_least("B", B, "dstate", 3, 1);
  checks.dtype("B", B, {T});
  checks.shape("C", C,
               {{"batch", batch}, {"seqlen", seqlen}, {"ngroups", ngroups}, {"dstate", dstate}});
  checks.dtype("C", C, {T});
  if (D) {
    checks.rank("D", *D, {1, 2}, "(nheads) or (nheads, headdim)");
    if (D->dim() == 1) {
      checks.shape("D", *D, {{"nheads", nheads}});
    } else {
      checks.shape("D", *D, {{"nheads", nheads}, {"headdim", headdim}});
    }
    checks.parameter("D", *D, T);
  }
  if (z) {
    checks.shape("z", *z,
                 {{"batch", batch}, {"seqlen", seqlen}, {"nheads", nheads}, {"headdim", headdim}});
    checks.dtype("z", *z, {T});
  }
  if (dt_bias) {
    checks.shape("dt_bias", *dt_bias, {{"nheads", nheads}});
    checks.parameter("dt_bias", *dt_bias, T);
  }
  auto num_sequences = batch;
  if (cu_seqlens) {
    checks.rank("cu_seqlens", *cu_seqlens, {1}, "(num_sequences + 1)");
    checks.index("cu_seqlens", *cu_seqlens);
    checks.at_least("cu_seqlens", *cu_seqlens, "num_sequences + 1", 0, 1);
    if (batch != 1) {
      checks.fail("cu_seqlens needs x with batch = 1, got x of shape " + checks.text_of(x));
    }
    num_sequences = Access::size(*cu_seqlens, 0) - 1;
  }
  if (initial_states) {
    checks.rank("initial_states", *initial_states, {4}, "(num_sequences, nheads, headdim, dstate)");
    const bool single = cu_seqlens && Access::size(*initial_states, 0) == 1;
    checks.shape("initial_states", *initial_states,
                 {{cu_seqlens ? "num_sequences" : "batch", single ? 1 : num_sequences},
                  {"nheads", nheads},
                  {"headdim", headdim},
                  {"dstate", dstate}});
    checks.dtype("initial_states", *initial_states, {T, state_type});
  }
  if (seq_idx) {
    checks.shape("seq_idx", *seq_idx, {{"batch", batch}, {"seqlen", seqlen}});
    checks.index("seq_idx", *seq_idx);
  }
  if (!(dt_min <= dt_max)) {
    std::ostringstream text;
    text << "dt_min must not exceed dt_max, got dt_min = " << dt_min << " and dt_max = " << dt_max;
    checks.fail(text.str());
  }
  return {batch, seqlen, nheads, headdim, ngroups, dstate, num_sequences, state_type};
}

/// Incoming gradients of the backward.
template <class Access, class Tensor = typename Access::Tensor>
void check_ssd_chunk_scan_gradients(const Checks<Access>& checks,
                                    const SsdChunkScanSizes<typename Access::Size>& sizes,
                                    const Tensor& x, const Tensor& dout,
                                    const std::optional<Tensor>& dfinal_states) {
  checks.shape("dout", dout,
               {{"batch", sizes.batch},
                {"seqlen", sizes.seqlen},
                {"nheads", sizes.nheads},
                {"headdim", sizes.headdim}});
  checks.dtype("dout", dout, {x.scalar_type()});
  if (dfinal_states) {
    checks.shape("dfinal_states", *dfinal_states,
                 {{"num_sequences", sizes.num_sequences},
                  {"nheads", sizes.nheads},
                  {"headdim", sizes.headdim},
                  {"dstate", sizes.dstate}});
    checks.dtype("dfinal_states", *dfinal_states, {sizes.state_type});
  }
}

/// Gradients that the caller made.
template <class Access, class Tensor = typename Access::Tensor>
void check_ssd_chunk_scan_bwd_results(
    const Checks<Access>& checks, const Tensor& x, const Tensor& dt, const Tensor& A,
    const Tensor& B, const Tensor& C, const std::optional<Tensor>& D,
    const std::optional<Tensor>& z, const std::optional<Tensor>& dt_bias,
    const std::optional<Tensor>& initial_states, const Tensor& dx, const Tensor& ddt,
    const Tensor& dA, const Tensor& dB, const Tensor& dC, const std::optional<Tensor>& dD,
    const std::optional<Tensor>& dz, const std::optional<Tensor>& ddt_bias,
    const std::optional<Tensor>& dinitial_states) {
  checks.result("dx", dx, "x", x);
  checks.result("ddt", ddt, "dt", dt);
  checks.result("dA", dA, "A", A);
  checks.result("dB", dB, "B", B);
  checks.result("dC", dC, "C", C);
  checks.result("dD", dD, "D", D);
  checks.result("dz", dz, "z", z);
  checks.result("ddt_bias", ddt_bias, "dt_bias", dt_bias);
  checks.result("dinitial_states", dinitial_states, "initial_states", initial_states);
}

}  // namespace mamba_ssm::ops
