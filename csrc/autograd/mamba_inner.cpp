// mamba_inner: the body of a Mamba block between in_proj and its result, as one autograd node.
//
//   x, z   = halves of xz                                            (batch, dim, seqlen) each
//   x      = causal_conv1d(x), SiLU
//   x_dbl  = x_proj_weight x                                         (batch, rows, seqlen)
//   delta  = delta_proj_weight x_dbl[:, :dt_rank], B, C = next and last rows of x_dbl
//   y      = selective_scan(x, delta, A, B, C, D, z, delta_bias)
//   result = y^T out_proj_weight^T                                   (batch, seqlen, d_model)
//
// Everything stays channel-first, so that time is contiguous from the convolution to the scan and
// the projections are matrix products with the weight on the left: no tensor is ever rearranged.
// Source: Mamba (arXiv 2312.00752), section 3.4, figure 3.
#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/rsqrt.h>
#include <mamba_ssm/ops.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "composite.h"
#include "derivatives.h"
#include "meta.h"

namespace mamba_ssm {

Tensor mamba_inner(const Tensor& xz, const Tensor& conv1d_weight, const OptionalTensor& conv1d_bias,
                   const Tensor& x_proj_weight, const Tensor& delta_proj_weight,
                   const Tensor& out_proj_weight, const OptionalTensor& out_proj_bias,
                   const Tensor& A, const OptionalTensor& B, const OptionalTensor& C,
                   const OptionalTensor& D, const OptionalTensor& delta_bias,
                   const OptionalTensor& B_proj_bias, const OptionalTensor& C_proj_bias,
                   const OptionalTensor& b_rms_weight, const OptionalTensor& c_rms_weight,
                   const OptionalTensor& dt_rms_weight, bool delta_softplus, int64_t checkpoint_lvl,
                   double b_c_dt_rms_eps) {
  static const auto op = find_op<decltype(mamba_inner)>("mamba_ssm::mamba_inner");
  return op.call(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight,
                 out_proj_bias, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, b_rms_weight,
                 c_rms_weight, dt_rms_weight, delta_softplus, checkpoint_lvl, b_c_dt_rms_eps);
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// The arguments of a call. Tensors that are not given are undefined.
struct Arguments {
  Tensor xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight,
      out_proj_bias, A, B, C, D, delta_bias, B_proj_bias, C_proj_bias, b_rms_weight, c_rms_weight,
      dt_rms_weight;
  bool delta_softplus;
  int64_t checkpoint_lvl;
  double b_c_dt_rms_eps;

  static constexpr size_t kTensors = 17;

  variable_list tensors() const {
    return {xz,
            conv1d_weight,
            conv1d_bias,
            x_proj_weight,
            delta_proj_weight,
            out_proj_weight,
            out_proj_bias,
            A,
            B,
            C,
            D,
            delta_bias,
            B_proj_bias,
            C_proj_bias,
            b_rms_weight,
            c_rms_weight,
            dt_rms_weight};
  }

  static Arguments from(at::TensorList t, bool delta_softplus, int64_t checkpoint_lvl,
                        double b_c_dt_rms_eps) {
    return {t[0],  t[1],  t[2],  t[3],           t[4],           t[5],          t[6],
            t[7],  t[8],  t[9],  t[10],          t[11],          t[12],         t[13],
            t[14], t[15], t[16], delta_softplus, checkpoint_lvl, b_c_dt_rms_eps};
  }

  c10::SymInt dim() const { return xz.sym_size(1) / 2; }
  int64_t dt_rank() const { return delta_proj_weight.size(1); }
  /// Rows of x_dbl that B or C takes: a complex state takes two.
  int64_t rows() const { return A.size(1) * (A.is_complex() ? 2 : 1); }
  Tensor x() const { return xz.narrow_symint(1, 0, dim()); }
  Tensor z() const { return xz.narrow_symint(1, dim(), dim()); }

  void check() const;
};

/// x / rms(x) * weight over dimension 1 of (batch, rows, seqlen), in float32 at least.
struct RmsNorm {
  Tensor x, weight, inverse_rms;

  RmsNorm(const Tensor& input, const Tensor& scale, double eps) {
    const auto type = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    x = as_type(input, type);
    weight = as_type(scale, type).unsqueeze(-1);
    inverse_rms = at::rsqrt(x.square().mean(1, /*keepdim=*/true) + eps);
  }

  Tensor forward(at::ScalarType type) const { return as_type(x * inverse_rms * weight, type); }

  /// dx = r (w dy - x r^2 mean(x w dy)), dweight = sum of dy x r, with r = inverse_rms.
  std::pair<Tensor, Tensor> backward(const Tensor& dy_typed, at::ScalarType weight_type) const {
    const Tensor dy = as_type(dy_typed, x.scalar_type());
    const Tensor weighted = dy * weight;
    const Tensor mean = (x * weighted).mean(1, /*keepdim=*/true);
    const Tensor dx = inverse_rms * (weighted - x * inverse_rms.square() * mean);
    const Tensor dweight = (dy * x * inverse_rms).sum(at::IntArrayRef{0, 2});
    return {as_type(dx, dy_typed.scalar_type()), as_type(dweight, weight_type)};
  }
};

/// Rows of x_dbl as selective_scan takes them: complex values are pairs along the last axis there,
/// and pairs of rows here (row 2n real, row 2n+1 imaginary).
Tensor rows_to_scan(const Tensor& rows, bool complex_A) {
  if (!complex_A) return rows;
  const auto batch = rows.sym_size(0), states = rows.sym_size(1) / 2, seqlen = rows.sym_size(2);
  return rows.reshape_symint({batch, states, 2, seqlen})
      .transpose(2, 3)
      .reshape_symint({batch, states, 2 * seqlen});
}

Tensor scan_to_rows(const Tensor& matrix, bool complex_A) {
  if (!complex_A) return matrix;
  const auto batch = matrix.sym_size(0), states = matrix.sym_size(1);
  const auto seqlen = matrix.sym_size(2) / 2;
  return matrix.reshape_symint({batch, states, seqlen, 2})
      .transpose(2, 3)
      .reshape_symint({batch, 2 * states, seqlen});
}

/// What lies between the convolution and the scan. The backward makes it again from conv and x_dbl.
struct Projections {
  Tensor B_rows, C_rows;  // of x_dbl with their biases, before the norms; undefined if given
  Tensor dt;              // delta_proj_weight x_dbl[:, :dt_rank], before the norm
  std::optional<RmsNorm> B_norm, C_norm, dt_norm;
  Tensor B, C, delta;  // as selective_scan takes them

  Projections(const Arguments& a, const Tensor& x_dbl, const Tensor& known_delta) {
    // Of the weight: the size of a traced tensor would fix all its sizes, seqlen included.
    const int64_t rows = a.rows(), total = a.x_proj_weight.size(0);
    B = a.B;
    C = a.C;
    if (!a.B.defined())
      B = project(a, x_dbl.narrow(1, a.dt_rank(), rows), a.B_proj_bias, a.b_rms_weight, B_rows,
                  B_norm);
    if (!a.C.defined())
      C = project(a, x_dbl.narrow(1, total - rows, rows), a.C_proj_bias, a.c_rms_weight, C_rows,
                  C_norm);
    delta = known_delta;
    if (!delta.defined() || a.dt_rms_weight.defined()) {
      dt = at::matmul(a.delta_proj_weight, x_dbl.narrow(1, 0, a.dt_rank()));
      delta = dt;
      if (a.dt_rms_weight.defined()) {
        dt_norm.emplace(dt, a.dt_rms_weight, a.b_c_dt_rms_eps);
        delta = dt_norm->forward(dt.scalar_type());
      }
    }
  }

 private:
  static Tensor project(const Arguments& a, const Tensor& slice, const Tensor& bias,
                        const Tensor& rms_weight, Tensor& rows, std::optional<RmsNorm>& norm) {
    rows = bias.defined() ? slice + as_type(bias, slice.scalar_type()).unsqueeze(-1) : slice;
    Tensor result = rows;
    if (rms_weight.defined()) {
      norm.emplace(rows, rms_weight, a.b_c_dt_rms_eps);
      result = norm->forward(rows.scalar_type());
    }
    return rows_to_scan(result, a.A.is_complex());
  }
};

Tensor convolve(const Arguments& a) {
  return std::get<0>(causal_conv1d(a.x(), a.conv1d_weight.squeeze(1), from_saved(a.conv1d_bias),
                                   std::nullopt, std::nullopt, /*silu=*/true));
}

Tensor project_out(const Arguments& a, const Tensor& y) {
  const Tensor out = at::matmul(y.transpose(1, 2), a.out_proj_weight.t());
  return a.out_proj_bias.defined() ? out + a.out_proj_bias : out;
}

/// sum_b left[b] right[b]^T: the gradient of a weight that multiplied from the left.
Tensor weight_gradient(const Tensor& left, const Tensor& right) {
  return at::matmul(left, right.transpose(1, 2)).sum(0);
}

/// The forward without gradients.
Tensor forward_only(const Arguments& a) {
  const auto guard = without_autocast();
  const Tensor conv = convolve(a);
  const Projections projections(a, at::matmul(a.x_proj_weight, conv), Tensor());
  const Tensor y = std::get<0>(selective_scan(
      conv, projections.delta, a.A, projections.B, projections.C, from_saved(a.D), a.z(),
      from_saved(a.delta_bias), std::nullopt, std::nullopt, a.delta_softplus));
  return project_out(a, y);
}

/// Keeps the arguments, x_dbl, the gated y and the scan's chunk states; makes the convolved x and
/// delta again, unless checkpoint_lvl is 0.
struct MambaInner : torch::autograd::Function<MambaInner> {
  static constexpr bool is_traceable = true;
  static constexpr size_t kOthers = 4;  // arguments of forward behind the list

  static Tensor record(const Arguments& a) {
    const GivenTensors given(a.tensors());
    return apply(at::TensorList(given.defined), given.bits, a.delta_softplus, a.checkpoint_lvl,
                 a.b_c_dt_rms_eps);
  }

  static Tensor forward(AutogradContext* ctx, at::TensorList defined, int64_t given,
                        bool delta_softplus, int64_t checkpoint_lvl, double b_c_dt_rms_eps) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto guard = without_autocast();
    const auto a = Arguments::from(GivenTensors::restore(defined, given, Arguments::kTensors),
                                   delta_softplus, checkpoint_lvl, b_c_dt_rms_eps);
    const Tensor conv = convolve(a);
    const Tensor x_dbl = at::matmul(a.x_proj_weight, conv);
    const Projections projections(a, x_dbl, Tensor());
    auto [y, last_state, states] = selective_scan_fwd(
        conv, projections.delta, a.A, projections.B, projections.C, from_saved(a.D), a.z(),
        from_saved(a.delta_bias), std::nullopt, std::nullopt, delta_softplus);
    variable_list saved = a.tensors();
    const bool keep = checkpoint_lvl == 0;
    for (const Tensor& tensor :
         {x_dbl, y, states, keep ? conv : Tensor(), keep ? projections.delta : Tensor()}) {
      saved.push_back(tensor);
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["given"] = given;
    ctx->saved_data["delta_softplus"] = delta_softplus;
    ctx->saved_data["b_c_dt_rms_eps"] = b_c_dt_rms_eps;
    return project_out(a, y);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const auto a = Arguments::from(saved, ctx->saved_data["delta_softplus"].toBool(), 1,
                                   ctx->saved_data["b_c_dt_rms_eps"].toDouble());
    const Tensor* kept = saved.data() + Arguments::kTensors;
    const Tensor &x_dbl = kept[0], &y = kept[1], &states = kept[2];
    const Tensor conv = kept[3].defined() ? kept[3] : convolve(a);
    const Projections projections(a, x_dbl, kept[4]);

    // out_proj
    const Tensor dout = gradients[0].transpose(1, 2);  // (batch, d_model, seqlen)
    const Tensor dy = at::matmul(a.out_proj_weight.t(), dout);
    const Tensor dout_proj_weight = weight_gradient(dout, y);
    Tensor dout_proj_bias;
    if (a.out_proj_bias.defined()) {
      dout_proj_bias = as_type(dout.sum(at::IntArrayRef{0, 2}), a.out_proj_bias.scalar_type());
    }

    // scan
    auto [dconv, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state] =
        selective_scan_bwd(dy, std::nullopt, states, conv, projections.delta, a.A, projections.B,
                           projections.C, from_saved(a.D), a.z(), from_saved(a.delta_bias),
                           std::nullopt, std::nullopt, a.delta_softplus);

    // x_dbl, block by block: dt, B rows, C rows
    Tensor ddt_rms_weight, db_rms_weight, dc_rms_weight, dB_proj_bias, dC_proj_bias;
    if (projections.dt_norm) {
      std::tie(ddelta, ddt_rms_weight) =
          projections.dt_norm->backward(ddelta, a.dt_rms_weight.scalar_type());
    }
    std::vector<Tensor> blocks{at::matmul(a.delta_proj_weight.t(), ddelta)};
    const auto project_back = [&](const Tensor& dmatrix, const std::optional<RmsNorm>& norm,
                                  const Tensor& rms_weight, Tensor& drms_weight, const Tensor& bias,
                                  Tensor& dbias) {
      Tensor drows = scan_to_rows(dmatrix, a.A.is_complex());
      if (norm) std::tie(drows, drms_weight) = norm->backward(drows, rms_weight.scalar_type());
      if (bias.defined()) dbias = as_type(drows.sum(at::IntArrayRef{0, 2}), bias.scalar_type());
      blocks.push_back(drows);
    };
    if (!a.B.defined()) {
      project_back(dB, projections.B_norm, a.b_rms_weight, db_rms_weight, a.B_proj_bias,
                   dB_proj_bias);
    }
    if (!a.C.defined()) {
      project_back(dC, projections.C_norm, a.c_rms_weight, dc_rms_weight, a.C_proj_bias,
                   dC_proj_bias);
    }
    const Tensor dx_dbl = at::cat(blocks, 1);
    const Tensor ddelta_proj_weight = weight_gradient(ddelta, x_dbl.narrow(1, 0, a.dt_rank()));
    const Tensor dx_proj_weight = weight_gradient(dx_dbl, conv);

    // convolution
    dconv = dconv + at::matmul(a.x_proj_weight.t(), dx_dbl);
    auto [dx, dconv1d_weight, dconv1d_bias, dinitial_states] =
        causal_conv1d_bwd(dconv, std::nullopt, a.x(), a.conv1d_weight.squeeze(1),
                          from_saved(a.conv1d_bias), std::nullopt, std::nullopt, /*silu=*/true);
    const variable_list all{at::cat({dx, *dz}, 1),
                            dconv1d_weight.unsqueeze(1),
                            to_saved(dconv1d_bias),
                            dx_proj_weight,
                            ddelta_proj_weight,
                            dout_proj_weight,
                            dout_proj_bias,
                            dA,
                            dB,
                            dC,
                            to_saved(dD),
                            to_saved(ddelta_bias),
                            dB_proj_bias,
                            dC_proj_bias,
                            db_rms_weight,
                            dc_rms_weight,
                            ddt_rms_weight};
    return GivenTensors::select(all, ctx->saved_data["given"].toInt(), kOthers);
  }
};

void Arguments::check() const {
  const MetaChecks checks("mamba_inner", "xz", xz);
  checks.rank("xz", xz, {3}, "(batch, 2 * dim, seqlen)");
  checks.activation("xz", xz);
  const c10::SymInt dim = this->dim();
  checks.shape("xz", xz,
               {{"batch", xz.sym_size(0)}, {"2 * dim", 2 * dim}, {"seqlen", xz.sym_size(2)}});
  checks.rank("conv1d_weight", conv1d_weight, {3}, "(dim, 1, width)");
  checks.shape("conv1d_weight", conv1d_weight,
               {{"dim", dim}, {"1", 1}, {"width", conv1d_weight.sym_size(2)}});
  checks.rank("delta_proj_weight", delta_proj_weight, {2}, "(dim, dt_rank)");
  checks.shape("delta_proj_weight", delta_proj_weight,
               {{"dim", dim}, {"dt_rank", delta_proj_weight.sym_size(1)}});
  checks.rank("A", A, {2}, "(dim, dstate)");
  checks.shape("A", A, {{"dim", dim}, {"dstate", A.sym_size(1)}});
  const int64_t projected = (B.defined() ? 0 : rows()) + (C.defined() ? 0 : rows());
  checks.rank("x_proj_weight", x_proj_weight, {2}, "(dt_rank + rows of B and C, dim)");
  checks.shape("x_proj_weight", x_proj_weight,
               {{"dt_rank + rows of B and C", dt_rank() + projected}, {"dim", dim}});
  checks.rank("out_proj_weight", out_proj_weight, {2}, "(d_model, dim)");
  checks.shape("out_proj_weight", out_proj_weight,
               {{"d_model", out_proj_weight.sym_size(0)}, {"dim", dim}});
  const auto vector = [&](const char* name, const Tensor& tensor, const char* size_name,
                          const c10::SymInt& size) {
    if (tensor.defined()) checks.shape(name, tensor, {{size_name, size}});
  };
  vector("conv1d_bias", conv1d_bias, "dim", dim);
  vector("out_proj_bias", out_proj_bias, "d_model", out_proj_weight.sym_size(0));
  vector("D", D, "dim", dim);
  vector("delta_bias", delta_bias, "dim", dim);
  vector("B_proj_bias", B_proj_bias, "rows of B", rows());
  vector("C_proj_bias", C_proj_bias, "rows of C", rows());
  vector("b_rms_weight", b_rms_weight, "rows of B", rows());
  vector("c_rms_weight", c_rms_weight, "rows of C", rows());
  vector("dt_rms_weight", dt_rms_weight, "dim", dim);
  if (checkpoint_lvl != 0 && checkpoint_lvl != 1) {
    checks.fail("checkpoint_lvl must be 0 or 1, got " + std::to_string(checkpoint_lvl));
  }
}

/// The op, for every dispatch key: recorded where a gradient is wanted.
Tensor mamba_inner_kernel(const Tensor& xz, const Tensor& conv1d_weight,
                          const OptionalTensor& conv1d_bias, const Tensor& x_proj_weight,
                          const Tensor& delta_proj_weight, const Tensor& out_proj_weight,
                          const OptionalTensor& out_proj_bias, const Tensor& A,
                          const OptionalTensor& B, const OptionalTensor& C, const OptionalTensor& D,
                          const OptionalTensor& delta_bias, const OptionalTensor& B_proj_bias,
                          const OptionalTensor& C_proj_bias, const OptionalTensor& b_rms_weight,
                          const OptionalTensor& c_rms_weight, const OptionalTensor& dt_rms_weight,
                          bool delta_softplus, int64_t checkpoint_lvl, double b_c_dt_rms_eps) {
  Arguments a{xz,
              conv1d_weight,
              to_saved(conv1d_bias),
              x_proj_weight,
              delta_proj_weight,
              out_proj_weight,
              to_saved(out_proj_bias),
              A,
              to_saved(B),
              to_saved(C),
              to_saved(D),
              to_saved(delta_bias),
              to_saved(B_proj_bias),
              to_saved(C_proj_bias),
              to_saved(b_rms_weight),
              to_saved(c_rms_weight),
              to_saved(dt_rms_weight),
              delta_softplus,
              checkpoint_lvl,
              b_c_dt_rms_eps};
  a.check();
  // The products run in the autocast dtype.
  cast_for_autocast(a.xz.device(), {&a.xz, &a.x_proj_weight, &a.delta_proj_weight,
                                    &a.out_proj_weight, &a.out_proj_bias});
  return needs_gradient(a.tensors()) ? MambaInner::record(a) : forward_only(a);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(mamba_ssm, m) {
  m.def(
      "mamba_inner(Tensor xz, Tensor conv1d_weight, Tensor? conv1d_bias, Tensor x_proj_weight, "
      "Tensor delta_proj_weight, Tensor out_proj_weight, Tensor? out_proj_bias, Tensor A, "
      "Tensor? B=None, Tensor? C=None, Tensor? D=None, Tensor? delta_bias=None, "
      "Tensor? B_proj_bias=None, Tensor? C_proj_bias=None, Tensor? b_rms_weight=None, "
      "Tensor? c_rms_weight=None, Tensor? dt_rms_weight=None, *, bool delta_softplus=True, "
      "int checkpoint_lvl=1, float b_c_dt_rms_eps=1e-6) -> Tensor");
}

TORCH_LIBRARY_IMPL(mamba_ssm, Autograd, m) { m.impl("mamba_inner", mamba_inner_kernel); }
TORCH_LIBRARY_IMPL(mamba_ssm, CompositeExplicitAutograd, m) {
  m.impl("mamba_inner", mamba_inner_kernel);
}

}  // namespace mamba_ssm
