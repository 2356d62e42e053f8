// mamba2_inner: the body of a Mamba-2 block between in_proj and its result, as one autograd node.
//
//   z0, x0, z, xBC, dt = parts of zxbcdt                 (batch, seqlen, parts), never copied
//   xBC     = causal_conv1d(xBC), SiLU
//   x, B, C = parts of xBC
//   y       = ssd_chunk_scan(x, dt, A, B, C, D, dt_bias)
//   y       = rms_norm_gated(y, gate z), or gated inside the scan where there is no norm
//   result  = [silu(z0) x0, y] out_proj_weight^T + out_proj_bias
//
// Everything stays channel-last, as in_proj writes it and out_proj reads it. Gradients of parts of
// a tensor are written where they belong in its gradient. Source: Mamba-2 (arXiv 2405.21060),
// section 7, figure 6.
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/zeros.h>
#include <mamba_ssm/ops.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "composite.h"
#include "derivatives.h"
#include "meta.h"

namespace mamba_ssm {

std::tuple<Tensor, Tensor> mamba2_inner(
    const Tensor& zxbcdt, const Tensor& conv1d_weight, const OptionalTensor& conv1d_bias,
    const Tensor& A, int64_t headdim, int64_t ngroups, const OptionalTensor& D,
    const OptionalTensor& dt_bias, const OptionalTensor& norm_weight,
    const OptionalTensor& out_proj_weight, const OptionalTensor& out_proj_bias,
    const OptionalTensor& initial_states, const OptionalTensor& seq_idx,
    const OptionalTensor& cu_seqlens, bool silu, double norm_eps, bool norm_before_gate,
    double dt_min, std::optional<double> dt_max) {
  static const auto op = find_op<decltype(mamba2_inner)>("mamba_ssm::mamba2_inner");
  return op.call(zxbcdt, conv1d_weight, conv1d_bias, A, headdim, ngroups, D, dt_bias, norm_weight,
                 out_proj_weight, out_proj_bias, initial_states, seq_idx, cu_seqlens, silu,
                 norm_eps, norm_before_gate, dt_min, dt_max);
}

namespace {

using c10::SymInt;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// What a call has besides tensors.
struct Options {
  int64_t headdim, ngroups;
  bool silu;
  double norm_eps;
  bool norm_before_gate;
  double dt_min;
  std::optional<double> dt_max;
};

/// The arguments of a call. Tensors that are not given are undefined.
struct Arguments {
  Tensor zxbcdt, conv1d_weight, conv1d_bias, A, D, dt_bias, norm_weight, out_proj_weight,
      out_proj_bias, initial_states, seq_idx, cu_seqlens;
  Options options;

  static constexpr size_t kTensors = 12;

  variable_list tensors() const {
    return {
        zxbcdt,          conv1d_weight, conv1d_bias,    A,       D,         dt_bias, norm_weight,
        out_proj_weight, out_proj_bias, initial_states, seq_idx, cu_seqlens};
  }

  static Arguments from(at::TensorList t, const Options& options) {
    return {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9], t[10], t[11], options};
  }

  // Sizes come from the parameters, which are numbers where those of zxbcdt may be symbols.
  int64_t nheads() const { return A.size(0); }
  int64_t dim() const { return nheads() * options.headdim; }
  int64_t channels() const { return conv1d_weight.size(0); }  // of the convolution
  int64_t rows() const { return (channels() - dim()) / 2; }   // of B or C
  int64_t dstate() const { return rows() / options.ngroups; }
  int64_t group_size() const { return dim() / options.ngroups; }
  /// Columns of zxbcdt without z0 and x0.
  int64_t ssm_columns() const { return dim() + channels() + nheads(); }
  int64_t d_nonssm() const {
    return (zxbcdt.sym_size(2) - ssm_columns()).guard_int(__FILE__, __LINE__) / 2;
  }

  /// The parts of zxbcdt or of its gradient, as their kernels take them.
  struct Parts {
    Tensor z0, x0;  // (batch, seqlen, d_nonssm)
    Tensor z;       // (batch, seqlen, dim)
    Tensor xBC;     // (batch, channels, seqlen)
    Tensor dt;      // (batch, seqlen, nheads)
  };
  Parts parts_of(const Tensor& whole) const {
    const int64_t d = d_nonssm();
    return {whole.narrow(2, 0, d), whole.narrow(2, d, d), whole.narrow(2, 2 * d, dim()),
            whole.narrow(2, 2 * d + dim(), channels()).transpose(1, 2),
            whole.narrow(2, 2 * d + dim() + channels(), nheads())};
  }
  Parts parts() const { return parts_of(zxbcdt); }

  Tensor by_head(const Tensor& columns) const {
    return columns.unflatten(2, {nheads(), options.headdim});
  }
  /// The parts of `xBC` (batch, channels, seqlen) or of its gradient, as the scan takes them.
  struct ScanParts {
    Tensor x, B, C;
  };
  ScanParts scan_parts_of(const Tensor& xBC) const {
    const Tensor tokens = xBC.transpose(1, 2);
    const auto by_group = [&](const Tensor& columns) {
      return columns.unflatten(2, {options.ngroups, dstate()});
    };
    return {by_head(tokens.narrow(2, 0, dim())), by_group(tokens.narrow(2, dim(), rows())),
            by_group(tokens.narrow(2, dim() + rows(), rows()))};
  }

  OptionalTensor conv_seq_idx() const {
    if (!cu_seqlens.defined()) return from_saved(seq_idx);
    return sequence_ids(cu_seqlens, zxbcdt.sym_size(1), from_saved(seq_idx));
  }

  void check() const;
};

/// The inputs of the scan behind the convolution. The backward makes them again.
struct ScanInputs {
  OptionalTensor conv_seq_idx;
  Tensor x, B, C;
  OptionalTensor z;  // where the scan applies the gate

  ScanInputs(const Arguments& a, const Arguments::Parts& parts) : conv_seq_idx(a.conv_seq_idx()) {
    const Tensor xBC =
        std::get<0>(causal_conv1d(parts.xBC, a.conv1d_weight, from_saved(a.conv1d_bias),
                                  conv_seq_idx, std::nullopt, a.options.silu));
    const auto scan = a.scan_parts_of(xBC);
    x = scan.x;
    B = scan.B;
    C = scan.C;
    if (!a.norm_weight.defined()) z = a.by_head(parts.z);
  }
};

/// What out_proj reads: y, behind its norm if there is one, and silu(z0) x0 in front of it.
Tensor out_proj_input(const Arguments& a, const Arguments::Parts& parts, const Tensor& y) {
  Tensor result = y;
  if (a.norm_weight.defined()) {
    result = rms_norm_gated(y, a.norm_weight, std::nullopt, parts.z, a.options.norm_eps,
                            a.group_size(), a.options.norm_before_gate);
  }
  return a.d_nonssm() == 0 ? result : at::cat({at::silu(parts.z0) * parts.x0, result}, 2);
}

/// The values of a call. y (batch, seqlen, dim) is what comes out of the scan.
struct Values {
  Tensor y, final_states, out;

  explicit Values(const Arguments& a) {
    const auto parts = a.parts();
    const ScanInputs in(a, parts);
    std::tie(y, final_states) = ssd_chunk_scan(
        in.x, parts.dt, a.A, in.B, in.C, from_saved(a.D), in.z, from_saved(a.dt_bias),
        from_saved(a.initial_states), from_saved(a.seq_idx), from_saved(a.cu_seqlens),
        /*dt_softplus=*/true, a.options.dt_min, a.options.dt_max);
    y = y.flatten(2);
    out = out_proj_input(a, parts, y);
    if (a.out_proj_weight.defined()) {
      out = at::linear(as_type(out, a.out_proj_weight.scalar_type()), a.out_proj_weight,
                       from_saved(a.out_proj_bias));
    }
  }
};

/// Keeps the arguments and y.
struct Mamba2Inner : torch::autograd::Function<Mamba2Inner> {
  static constexpr bool is_traceable = true;
  static constexpr size_t kOthers = 8;  // arguments of forward behind the list

  static variable_list record(const Arguments& a) {
    const GivenTensors given(a.tensors());
    const Options& o = a.options;
    return apply(at::TensorList(given.defined), given.bits, o.headdim, o.ngroups, o.silu,
                 o.norm_eps, o.norm_before_gate, o.dt_min, o.dt_max);
  }

  static variable_list forward(AutogradContext* ctx, at::TensorList defined, int64_t given,
                               int64_t headdim, int64_t ngroups, bool silu, double norm_eps,
                               bool norm_before_gate, double dt_min, std::optional<double> dt_max) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto guard = without_autocast();
    const auto a =
        Arguments::from(GivenTensors::restore(defined, given, Arguments::kTensors),
                        {headdim, ngroups, silu, norm_eps, norm_before_gate, dt_min, dt_max});
    const Values values(a);
    variable_list saved = a.tensors();
    // Nothing reads y but the norm and the projection.
    const bool keep = a.norm_weight.defined() || a.out_proj_weight.defined();
    saved.push_back(keep ? values.y : Tensor());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["given"] = given;
    ctx->saved_data["headdim"] = headdim;
    ctx->saved_data["ngroups"] = ngroups;
    ctx->saved_data["silu"] = silu;
    ctx->saved_data["norm_eps"] = norm_eps;
    ctx->saved_data["norm_before_gate"] = norm_before_gate;
    ctx->saved_data["dt_min"] = dt_min;
    ctx->saved_data["dt_max"] = dt_max;
    ctx->set_materialize_grads(false);
    return {values.out, values.final_states};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const variable_list saved = ctx->get_saved_variables();
    variable_list inputs = saved;
    inputs.insert(inputs.end(), gradients.begin(), gradients.end());
    return once_differentiable("mamba2_inner", inputs, [&] {
      return GivenTensors::select(gradients_of(ctx, saved, gradients[0], from_saved(gradients[1])),
                                  ctx->saved_data["given"].toInt(), kOthers);
    });
  }

  /// The gradients of all arguments, from those of the results; `dout` may be undefined.
  static variable_list gradients_of(AutogradContext* ctx, const variable_list& saved, Tensor dout,
                                    const OptionalTensor& dfinal_states) {
    auto& data = ctx->saved_data;
    const auto a = Arguments::from(
        saved, {data["headdim"].toInt(), data["ngroups"].toInt(), data["silu"].toBool(),
                data["norm_eps"].toDouble(), data["norm_before_gate"].toBool(),
                data["dt_min"].toDouble(), data["dt_max"].toOptional<double>()});
    const Tensor& y = saved[Arguments::kTensors];
    const at::ScalarType T = a.zxbcdt.scalar_type();
    const int64_t d_nonssm = a.d_nonssm();
    const bool has_norm = a.norm_weight.defined(), has_out_proj = a.out_proj_weight.defined();

    const auto parts = a.parts();
    const Tensor dzxbcdt = at::empty_like(a.zxbcdt);
    Arguments::Parts dparts = a.parts_of(dzxbcdt);

    // out_proj
    if (!dout.defined()) {
      const SymInt columns =
          has_out_proj ? a.out_proj_weight.sym_size(0) : SymInt(d_nonssm + a.dim());
      const auto options = has_out_proj ? a.out_proj_weight.options() : a.zxbcdt.options();
      dout = at::zeros({}, options)
                 .expand_symint({a.zxbcdt.sym_size(0), a.zxbcdt.sym_size(1), columns});
    }
    Tensor dout_proj_weight, dout_proj_bias;
    if (has_out_proj) {
      const Tensor input = as_type(out_proj_input(a, parts, y), dout.scalar_type());
      const Tensor tokens = dout.flatten(0, 1);
      dout_proj_weight = at::mm(tokens.t(), input.flatten(0, 1));
      if (a.out_proj_bias.defined()) dout_proj_bias = tokens.sum(0);
      dout = as_type(at::mm(tokens, a.out_proj_weight), T)
                 .view_symint({a.zxbcdt.sym_size(0), a.zxbcdt.sym_size(1), d_nonssm + a.dim()});
    }

    // The gated MLP
    if (d_nonssm > 0) {
      const Tensor dproduct = dout.narrow(2, 0, d_nonssm);
      at::silu_backward_out(dparts.z0, dproduct * parts.x0, parts.z0);
      at::mul_out(dparts.x0, dproduct, at::silu(parts.z0));
    }

    // norm
    Tensor dy = dout.narrow(2, d_nonssm, a.dim()), dnorm_weight;
    if (has_norm) {
      const Tensor dgated = dy;
      dy = at::empty_like(y);
      dnorm_weight = at::empty_like(a.norm_weight);
      rms_norm_gated_bwd_out(dgated, y, a.norm_weight, std::nullopt, parts.z, a.options.norm_eps,
                             a.group_size(), a.options.norm_before_gate, /*is_rms_norm=*/true, dy,
                             dnorm_weight, std::nullopt, dparts.z);
    }

    // scan
    const ScanInputs in(a, parts);
    const Tensor dxBC = at::empty_symint({a.zxbcdt.sym_size(0), a.zxbcdt.sym_size(1), a.channels()},
                                         a.zxbcdt.options())
                            .transpose(1, 2);
    const auto dscan = a.scan_parts_of(dxBC);
    const Tensor dA = at::empty_like(a.A), dD = like(a.D), ddt_bias = like(a.dt_bias);
    const Tensor dinitial_states = like(a.initial_states);
    const auto dz = has_norm ? std::nullopt : OptionalTensor(a.by_head(dparts.z));
    ssd_chunk_scan_bwd_out(a.by_head(dy), dfinal_states, in.x, parts.dt, a.A, in.B, in.C,
                           from_saved(a.D), in.z, from_saved(a.dt_bias),
                           from_saved(a.initial_states), from_saved(a.seq_idx),
                           from_saved(a.cu_seqlens), /*dt_softplus=*/true, a.options.dt_min,
                           a.options.dt_max, dscan.x, dparts.dt, dA, dscan.B, dscan.C,
                           from_saved(dD), dz, from_saved(ddt_bias), from_saved(dinitial_states));

    // convolution
    const Tensor dconv1d_weight = at::empty_like(a.conv1d_weight),
                 dconv1d_bias = like(a.conv1d_bias);
    causal_conv1d_bwd_out(dxBC, std::nullopt, parts.xBC, a.conv1d_weight, from_saved(a.conv1d_bias),
                          in.conv_seq_idx, std::nullopt, a.options.silu, dparts.xBC, dconv1d_weight,
                          from_saved(dconv1d_bias), std::nullopt);

    return {dzxbcdt,
            dconv1d_weight,
            dconv1d_bias,
            dA,
            dD,
            ddt_bias,
            dnorm_weight,
            dout_proj_weight,
            dout_proj_bias,
            dinitial_states,
            Tensor(),
            Tensor()};
  }
};

void Arguments::check() const {
  const MetaChecks checks("mamba2_inner", "zxbcdt", zxbcdt);
  checks.rank("zxbcdt", zxbcdt, {3},
              "(batch, seqlen, 2 * d_nonssm + 2 * dim + 2 * ngroups * dstate + nheads)");
  checks.activation("zxbcdt", zxbcdt);
  const at::ScalarType T = zxbcdt.scalar_type();
  const SymInt batch = zxbcdt.sym_size(0), seqlen = zxbcdt.sym_size(1);

  checks.rank("A", A, {1}, "(nheads)");
  checks.at_least("A", A, "nheads", 0, 1);
  checks.parameter("A", A, T);
  const auto vector = [&](const char* name, const Tensor& tensor, const char* size_name,
                          int64_t size) {
    if (!tensor.defined()) return;
    checks.shape(name, tensor, {{size_name, size}});
    checks.parameter(name, tensor, T);
  };
  if (options.headdim < 1) {
    checks.fail("headdim must be positive, got " + std::to_string(options.headdim));
  }
  if (options.ngroups < 1 || nheads() % options.ngroups != 0) {
    checks.fail("ngroups must divide nheads = " + std::to_string(nheads()) + ", got " +
                std::to_string(options.ngroups));
  }
  vector("dt_bias", dt_bias, "nheads", nheads());
  vector("norm_weight", norm_weight, "dim", dim());
  if (D.defined()) {
    checks.rank("D", D, {1, 2}, "(nheads) or (nheads, headdim)");
    if (D.dim() == 2) {
      checks.shape("D", D, {{"nheads", nheads()}, {"headdim", options.headdim}});
      checks.parameter("D", D, T);
    } else {
      vector("D", D, "nheads", nheads());
    }
  }

  checks.rank("conv1d_weight", conv1d_weight, {2}, "(dim + 2 * ngroups * dstate, width)");
  checks.at_least("conv1d_weight", conv1d_weight, "width", 1, 1);
  checks.parameter("conv1d_weight", conv1d_weight, T);
  const int64_t matrices = channels() - dim();  // columns of B and C
  if (matrices < 1 || matrices % (2 * options.ngroups) != 0) {
    checks.fail(
        "conv1d_weight must have dim + 2 * ngroups * dstate rows, with dim = nheads * "
        "headdim = " +
        std::to_string(dim()) + " and ngroups = " + std::to_string(options.ngroups) + ", got " +
        std::to_string(channels()));
  }
  vector("conv1d_bias", conv1d_bias, "dim + 2 * ngroups * dstate", channels());

  const SymInt left = zxbcdt.sym_size(2) - ssm_columns();
  if (left < 0 || left % 2 != 0) {
    std::ostringstream text;
    text
        << "zxbcdt must have 2 * d_nonssm + 2 * dim + 2 * ngroups * dstate + nheads = 2 * d_nonssm "
        << "+ " << ssm_columns() << " columns, got " << zxbcdt.sym_size(2);
    checks.fail(text.str());
  }

  if (out_proj_weight.defined()) {
    checks.rank("out_proj_weight", out_proj_weight, {2}, "(d_model, d_nonssm + dim)");
    checks.shape(
        "out_proj_weight", out_proj_weight,
        {{"d_model", out_proj_weight.sym_size(0)}, {"d_nonssm + dim", d_nonssm() + dim()}});
    checks.activation("out_proj_weight", out_proj_weight);
  }
  if (out_proj_bias.defined()) {
    if (!out_proj_weight.defined()) checks.fail("out_proj_bias needs out_proj_weight");
    checks.shape("out_proj_bias", out_proj_bias, {{"d_model", out_proj_weight.sym_size(0)}});
    checks.dtype("out_proj_bias", out_proj_bias, {out_proj_weight.scalar_type()});
  }

  if (seq_idx.defined()) {
    checks.shape("seq_idx", seq_idx, {{"batch", batch}, {"seqlen", seqlen}});
    checks.index("seq_idx", seq_idx);
  }
  if (cu_seqlens.defined()) {
    checks.rank("cu_seqlens", cu_seqlens, {1}, "(num_sequences + 1)");
    checks.index("cu_seqlens", cu_seqlens);
    checks.at_least("cu_seqlens", cu_seqlens, "num_sequences + 1", 0, 1);
    if (batch != 1) {
      checks.fail("cu_seqlens needs zxbcdt with batch = 1, got zxbcdt of shape " +
                  checks.text_of(zxbcdt));
    }
  }
  if (initial_states.defined()) {
    checks.rank("initial_states", initial_states, {4}, "(num_sequences, nheads, headdim, dstate)");
    const bool packed = cu_seqlens.defined(), single = packed && initial_states.sym_size(0) == 1;
    const SymInt rows = single ? SymInt(1) : packed ? cu_seqlens.sym_size(0) - 1 : batch;
    checks.shape("initial_states", initial_states,
                 {{packed ? "num_sequences" : "batch", rows},
                  {"nheads", nheads()},
                  {"headdim", options.headdim},
                  {"dstate", dstate()}});
    checks.dtype("initial_states", initial_states, {T, ops::accumulate_type(T)});
  }
  if (options.dt_max && !(options.dt_min <= *options.dt_max)) {
    std::ostringstream text;
    text << "dt_min must not exceed dt_max, got dt_min = " << options.dt_min
         << " and dt_max = " << *options.dt_max;
    checks.fail(text.str());
  }
}

/// The op, for every dispatch key: recorded where a gradient is wanted.
std::tuple<Tensor, Tensor> mamba2_inner_kernel(
    const Tensor& zxbcdt, const Tensor& conv1d_weight, const OptionalTensor& conv1d_bias,
    const Tensor& A, int64_t headdim, int64_t ngroups, const OptionalTensor& D,
    const OptionalTensor& dt_bias, const OptionalTensor& norm_weight,
    const OptionalTensor& out_proj_weight, const OptionalTensor& out_proj_bias,
    const OptionalTensor& initial_states, const OptionalTensor& seq_idx,
    const OptionalTensor& cu_seqlens, bool silu, double norm_eps, bool norm_before_gate,
    double dt_min, std::optional<double> dt_max) {
  Arguments a{zxbcdt,
              conv1d_weight,
              to_saved(conv1d_bias),
              A,
              to_saved(D),
              to_saved(dt_bias),
              to_saved(norm_weight),
              to_saved(out_proj_weight),
              to_saved(out_proj_bias),
              to_saved(initial_states),
              to_saved(seq_idx),
              to_saved(cu_seqlens),
              {headdim, ngroups, silu, norm_eps, norm_before_gate, dt_min, dt_max}};
  // The projection runs in the autocast dtype.
  cast_for_autocast(zxbcdt.device(), {&a.out_proj_weight, &a.out_proj_bias});
  a.check();
  if (needs_gradient(a.tensors())) {
    const variable_list results = Mamba2Inner::record(a);
    return {results[0], results[1]};
  }
  const auto guard = without_autocast();
  const Values values(a);
  return {values.out, values.final_states};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mamba_ssm, m) {
  m.def(
      "mamba2_inner(Tensor zxbcdt, Tensor conv1d_weight, Tensor? conv1d_bias, Tensor A, "
      "int headdim, int ngroups=1, Tensor? D=None, Tensor? dt_bias=None, Tensor? norm_weight=None, "
      "Tensor? out_proj_weight=None, Tensor? out_proj_bias=None, Tensor? initial_states=None, "
      "Tensor? seq_idx=None, Tensor? cu_seqlens=None, *, bool silu=True, float norm_eps=1e-6, "
      "bool norm_before_gate=True, float dt_min=0.0, float? dt_max=None) -> "
      "(Tensor out, Tensor final_states)");
}

TORCH_LIBRARY_IMPL(mamba_ssm, Autograd, m) { m.impl("mamba2_inner", mamba2_inner_kernel); }
TORCH_LIBRARY_IMPL(mamba_ssm, CompositeExplicitAutograd, m) {
  m.impl("mamba2_inner", mamba2_inner_kernel);
}

}  // namespace mamba_ssm
