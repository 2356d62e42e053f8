// mamba_inner: the body of a Mamba block between in_proj and its result, as one autograd node.
//
//   x, z   = halves of xz                                            (batch, dim, seqlen) each
//   x      = causal_conv1d(x), SiLU
//   x_dbl  = x_proj_weight x                                         (batch, rows, seqlen)
//   delta  = delta_proj_weight x_dbl[:, :dt_rank], B, C = next and last rows of x_dbl
//   y      = selective_scan(x, delta, A, B, C, D, z, delta_bias)
//   result = y^T out_proj_weight^T                                   (batch, seqlen, d_model)
//
// What is made here is stored as (channels, batch, seqlen) and seen as (batch, channels, seqlen).
// Time is contiguous, as convolution and scan walk it; each projection is one matrix product over
// all tokens, and so is the gradient of each weight; a part of the channels is a range of rows.
// Gradients of parts of a tensor are written where they belong in its gradient. So no tensor is
// ever rearranged: at both ends, where layouts are the caller's, are kernels that take any strides
// and operands of products.
//
// Source: Mamba (arXiv 2312.00752), section 3.4, figure 3.
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
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

  c10::SymInt batch() const { return xz.sym_size(0); }
  c10::SymInt dim() const { return xz.sym_size(1) / 2; }
  c10::SymInt seqlen() const { return xz.sym_size(2); }
  int64_t dt_rank() const { return delta_proj_weight.size(1); }
  /// Rows of x_dbl that B or C takes: a complex state takes two.
  int64_t rows() const { return A.size(1) * (A.is_complex() ? 2 : 1); }
  /// The halves of xz or of its gradient.
  Tensor x_of(const Tensor& pair) const { return pair.narrow_symint(1, 0, dim()); }
  Tensor z_of(const Tensor& pair) const { return pair.narrow_symint(1, dim(), dim()); }
  Tensor x() const { return x_of(xz); }
  Tensor z() const { return z_of(xz); }

  /// `columns` (channels, batch * seqlen) seen as (batch, channels, seqlen).
  Tensor by_batch(const Tensor& columns) const {
    return columns.view_symint({columns.sym_size(0), batch(), seqlen()}).transpose(0, 1);
  }

  void check() const;
};

/// The inverse of by_batch: a view, of tensors stored that way.
Tensor columns_of(const Tensor& tensor) {
  return tensor.transpose(0, 1).view_symint(
      {tensor.sym_size(1), tensor.sym_size(0) * tensor.sym_size(2)});
}

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
      dt = a.by_batch(at::mm(a.delta_proj_weight, columns_of(x_dbl.narrow(1, 0, a.dt_rank()))));
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
  const Tensor conv =
      a.by_batch(at::empty_symint({a.dim(), a.batch() * a.seqlen()}, a.xz.options()));
  const Tensor final_states =
      at::empty_symint({a.batch(), a.dim(), a.conv1d_weight.sym_size(2) - 1}, a.xz.options());
  causal_conv1d_out(a.x(), a.conv1d_weight.squeeze(1), from_saved(a.conv1d_bias), std::nullopt,
                    std::nullopt, /*silu=*/true, conv, final_states);
  return conv;
}

Tensor project_x(const Arguments& a, const Tensor& conv) {
  return a.by_batch(at::mm(a.x_proj_weight, columns_of(conv)));
}

Tensor project_out(const Arguments& a, const Tensor& y) {
  const Tensor tokens = columns_of(y).t(), weight = a.out_proj_weight.t();
  const Tensor out = a.out_proj_bias.defined() ? at::addmm(a.out_proj_bias, tokens, weight)
                                               : at::mm(tokens, weight);
  return out.view_symint({a.batch(), a.seqlen(), out.sym_size(1)});
}

/// The forward without gradients.
Tensor forward_only(const Arguments& a) {
  const auto guard = without_autocast();
  const Tensor conv = convolve(a);
  const Projections projections(a, project_x(a, conv), Tensor());
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
    const Tensor x_dbl = project_x(a, conv);
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
    variable_list inputs = saved;
    inputs.push_back(gradients[0]);
    return once_differentiable("mamba_inner", inputs, [&] {
      return GivenTensors::select(gradients_of(ctx, saved, gradients[0]),
                                  ctx->saved_data["given"].toInt(), kOthers);
    });
  }

  /// The gradients of all arguments, from that of the result (batch, seqlen, d_model).
  static variable_list gradients_of(AutogradContext* ctx, const variable_list& saved,
                                    const Tensor& dresult) {
    const auto a = Arguments::from(saved, ctx->saved_data["delta_softplus"].toBool(), 1,
                                   ctx->saved_data["b_c_dt_rms_eps"].toDouble());
    const Tensor* kept = saved.data() + Arguments::kTensors;
    const Tensor &x_dbl = kept[0], &y = kept[1], &states = kept[2];
    const Tensor conv = kept[3].defined() ? kept[3] : convolve(a);
    const Projections projections(a, x_dbl, kept[4]);

    // out_proj
    const Tensor dout = dresult.flatten(0, 1);  // (batch * seqlen, d_model)
    const Tensor dy = a.by_batch(at::mm(a.out_proj_weight.t(), dout.t()));
    const Tensor dout_proj_weight = at::mm(dout.t(), columns_of(y).t());
    Tensor dout_proj_bias;
    if (a.out_proj_bias.defined()) dout_proj_bias = dout.sum(0);

    // scan; dB and dC go to their rows of dx_dbl where nothing lies between
    const Tensor dxz = at::empty_like(a.xz);
    // Like x_dbl, and no view: Inductor then knows its blocks of rows as slices. Blocks of
    // something else, at an offset that depends on batch and seqlen, it would put at offset 0.
    const Tensor dx_dbl = at::empty_like(x_dbl);
    const int64_t rows = a.rows(), total = a.x_proj_weight.size(0);
    const bool complex_A = a.A.is_complex();
    const auto place = [&](const Tensor& given, int64_t first) {
      return given.defined() ? Tensor() : dx_dbl.narrow(1, first, rows);
    };
    const Tensor dB_rows = place(a.B, a.dt_rank()), dC_rows = place(a.C, total - rows);
    const auto written = [&](const Tensor& matrix, const Tensor& drows,
                             const std::optional<RmsNorm>& norm) {
      return drows.defined() && !norm && !complex_A ? drows : at::empty_like(matrix);
    };
    const Tensor dB = written(projections.B, dB_rows, projections.B_norm);
    const Tensor dC = written(projections.C, dC_rows, projections.C_norm);
    const Tensor dconv = at::empty_like(conv), dA = at::empty_like(a.A);
    Tensor ddelta = at::empty_like(projections.delta);
    const Tensor dD = like(a.D), ddelta_bias = like(a.delta_bias);
    selective_scan_bwd_out(dy, std::nullopt, states, conv, projections.delta, a.A, projections.B,
                           projections.C, from_saved(a.D), a.z(), from_saved(a.delta_bias),
                           std::nullopt, std::nullopt, a.delta_softplus, dconv, ddelta, dA, dB, dC,
                           from_saved(dD), a.z_of(dxz), from_saved(ddelta_bias), std::nullopt);

    // x_dbl, block by block: dt, B rows, C rows
    Tensor ddt_rms_weight, db_rms_weight, dc_rms_weight, dB_proj_bias, dC_proj_bias;
    if (projections.dt_norm) {
      std::tie(ddelta, ddt_rms_weight) =
          projections.dt_norm->backward(ddelta, a.dt_rms_weight.scalar_type());
    }
    Tensor ddt_rows = columns_of(dx_dbl.narrow(1, 0, a.dt_rank()));
    at::mm_out(ddt_rows, a.delta_proj_weight.t(), columns_of(ddelta));
    const auto project_back = [&](const Tensor& dmatrix, const Tensor& place,
                                  const std::optional<RmsNorm>& norm, const Tensor& rms_weight,
                                  Tensor& drms_weight, const Tensor& bias, Tensor& dbias) {
      if (!dmatrix.is_same(place)) {
        Tensor drows = scan_to_rows(dmatrix, complex_A);
        if (norm) std::tie(drows, drms_weight) = norm->backward(drows, rms_weight.scalar_type());
        place.copy_(drows);
      }
      if (bias.defined()) dbias = as_type(place.sum(at::IntArrayRef{0, 2}), bias.scalar_type());
    };
    if (!a.B.defined()) {
      project_back(dB, dB_rows, projections.B_norm, a.b_rms_weight, db_rms_weight, a.B_proj_bias,
                   dB_proj_bias);
    }
    if (!a.C.defined()) {
      project_back(dC, dC_rows, projections.C_norm, a.c_rms_weight, dc_rms_weight, a.C_proj_bias,
                   dC_proj_bias);
    }
    const Tensor ddelta_proj_weight =
        at::mm(columns_of(ddelta), columns_of(x_dbl.narrow(1, 0, a.dt_rank())).t());
    const Tensor dx_proj_weight = at::mm(columns_of(dx_dbl), columns_of(conv).t());

    // convolution
    Tensor dx_columns = columns_of(dconv);
    at::addmm_out(dx_columns, dx_columns, a.x_proj_weight.t(), columns_of(dx_dbl));
    const Tensor conv1d_weight = a.conv1d_weight.squeeze(1);
    const Tensor dconv1d_weight = at::empty_like(conv1d_weight), dconv1d_bias = like(a.conv1d_bias);
    causal_conv1d_bwd_out(dconv, std::nullopt, a.x(), conv1d_weight, from_saved(a.conv1d_bias),
                          std::nullopt, std::nullopt, /*silu=*/true, a.x_of(dxz), dconv1d_weight,
                          from_saved(dconv1d_bias), std::nullopt);
    return {dxz,
            dconv1d_weight.unsqueeze(1),
            dconv1d_bias,
            dx_proj_weight,
            ddelta_proj_weight,
            dout_proj_weight,
            dout_proj_bias,
            dA,
            dB,
            dC,
            dD,
            ddelta_bias,
            dB_proj_bias,
            dC_proj_bias,
            db_rms_weight,
            dc_rms_weight,
            ddt_rms_weight};
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
