// The CPU kernels of layer_norm against the definition in layer_norm.h, in double.
#include <catch2/catch_test_macros.hpp>
#include <string>

#include "arrays.h"

namespace mamba_ssm::kernels {
namespace {

struct Case {
  std::string what;
  std::array<int64_t, 3> rows = {1, 2, 5};
  int64_t channels = 24;
  bool bias = true, residual = true, x1 = false, head1 = false, rowscale = false, masks = false;
  bool is_rms_norm = false;
  DType dtype = DType::kFloat32, weight_dtype = DType::kFloat32;
  DType residual_dtype = DType::kFloat32;
  Layout layout = Layout::kDense;

  std::array<int64_t, 4> shape() const { return {rows[0], rows[1], rows[2], channels}; }
};

/// A base row, then rows that change one thing or two.
std::vector<Case> cases() {
  std::vector<Case> all;
  const auto add = [&](const char* what, auto change) {
    Case c;
    c.what = what;
    change(c);
    all.push_back(c);
  };
  add("base", [](Case&) {});
  for (const int64_t channels : {1, 4, 15, 16, 17, 64, 130, 700}) {
    add("channels", [=](Case& c) { c.channels = channels; });
  }
  add("no bias", [](Case& c) { c.bias = false; });
  add("no residual", [](Case& c) { c.residual = false; });
  add("second input and head", [](Case& c) { c.x1 = c.head1 = true; });
  add("second head", [](Case& c) { c.head1 = true; });
  add("rowscale", [](Case& c) { c.rowscale = true; });
  add("dropout", [](Case& c) { c.masks = true; });
  add("dropout of both", [](Case& c) { c.masks = c.x1 = c.head1 = true; });
  add("dropout of scaled rows", [](Case& c) { c.masks = c.rowscale = true; });
  add("many rows", [](Case& c) { c.rows = {3, 7, 11}; });
  add("no rows", [](Case& c) { c.rows = {2, 0, 3}; });
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    add("16-bit", [=](Case& c) { c.dtype = dtype; });
    add("16-bit residual, too", [=](Case& c) { c.dtype = c.residual_dtype = dtype; });
    add("16-bit weights", [=](Case& c) { c.weight_dtype = dtype; });
  }
  add("float64", [](Case& c) {
    c.dtype = c.weight_dtype = c.residual_dtype = DType::kFloat64;
    c.x1 = c.head1 = c.masks = true;
  });
  for (const Layout layout : {Layout::kTransposed, Layout::kSliced}) {
    add("layout", [=](Case& c) { c.layout = layout; });
  }
  const std::vector<Case> with_mean = all;
  for (Case c : with_mean) {
    c.is_rms_norm = true, c.what += ", without mean";
    all.push_back(c);
  }
  return all;
}

/// A dense bool tensor; about two thirds are true.
struct Mask {
  std::vector<uint8_t> bytes;
  std::array<int64_t, 4> shape{};

  View<4> view() {
    View<4> v;
    if (bytes.empty()) return v;
    v.data = bytes.data();
    v.stride[3] = 1;
    for (size_t axis = 3; axis-- > 0;) v.stride[axis] = v.stride[axis + 1] * shape[axis + 1];
    return v;
  }
  bool operator[](const std::array<int64_t, 4>& index) const {
    int64_t at = 0;
    for (size_t axis = 0; axis < 4; ++axis) at = at * shape[axis] + index[axis];
    return bytes[static_cast<size_t>(at)] != 0;
  }
};

Mask make_mask(const Case& c, std::mt19937_64& random) {
  Mask mask;
  mask.shape = c.shape();
  for (int64_t i = 0; i < c.rows[0] * c.rows[1] * c.rows[2] * c.channels; ++i) {
    mask.bytes.push_back(random() % 3 != 0);
  }
  return mask;
}

constexpr double kEps = 1e-3;
constexpr double kDropoutScale = 1.5;

struct Inputs {
  Array<4> x, x1, residual, rowscale;
  Mask mask, mask1;
  Array<1> weight, bias, weight1, bias1;
  Array<4> sum, dout, dout1, dresidual_out;  // backward
};

Inputs make_inputs(const Case& c) {
  std::mt19937_64 random(7);
  Inputs in;
  const auto rows = [&](DType dtype) {
    return Array<4>(dtype, c.shape(), c.layout).randomize(random);
  };
  const auto parameter = [&] {
    return Array<1>(c.weight_dtype, {c.channels}, c.layout).randomize(random, 0.5, 1.5);
  };
  in.x = rows(c.dtype);
  if (c.x1) in.x1 = rows(c.dtype);
  if (c.residual) in.residual = rows(c.residual_dtype);
  if (c.rowscale) {
    in.rowscale = Array<4>(c.weight_dtype, {c.rows[0], c.rows[1], c.rows[2], 1}).randomize(random);
  }
  if (c.masks) in.mask = make_mask(c, random);
  if (c.masks && c.x1) in.mask1 = make_mask(c, random);
  in.weight = parameter();
  if (c.bias) in.bias = parameter();
  if (c.head1) in.weight1 = parameter();
  if (c.head1 && c.bias) in.bias1 = parameter();
  in.sum = rows(c.residual_dtype);
  in.dout = rows(c.dtype);
  if (c.head1) in.dout1 = rows(c.dtype);
  in.dresidual_out = rows(c.residual_dtype);
  return in;
}

struct Results {
  Array<4> out, out1, residual_out;
  Array<4> dx, dx1, dresidual;
  Array<1> dweight, dbias, dweight1, dbias1;
};

Results make_results(const Case& c, DType dtype, DType residual_dtype, DType weight_dtype) {
  Results r;
  const auto rows = [&](DType type) { return Array<4>(type, c.shape(), c.layout); };
  const auto parameter = [&] { return Array<1>(weight_dtype, {c.channels}, c.layout); };
  r.out = rows(dtype);
  if (c.head1) r.out1 = rows(dtype);
  r.residual_out = rows(residual_dtype);
  r.dx = rows(dtype);
  if (c.x1) r.dx1 = rows(dtype);
  if (c.residual) r.dresidual = rows(residual_dtype);
  r.dweight = parameter();
  if (c.bias) r.dbias = parameter();
  if (c.head1) r.dweight1 = parameter();
  if (c.head1 && c.bias) r.dbias1 = parameter();
  return r;
}

struct Statistics {
  double mean = 0, rstd = 0;
};

template <class Source>
Statistics statistics(const Case& c, Source source) {
  const auto size = static_cast<double>(c.channels);
  Statistics s;
  for (int64_t k = 0; k < c.channels && !c.is_rms_norm; ++k) s.mean += source(k) / size;
  double variance = 0;
  for (int64_t k = 0; k < c.channels; ++k) variance += std::pow(source(k) - s.mean, 2) / size;
  s.rstd = 1 / std::sqrt(variance + kEps);
  return s;
}

/// The definition, row by row; the backward from in.sum.
Results reference(const Case& c, const Inputs& in) {
  constexpr DType kDouble = DType::kFloat64;
  Results r = make_results(c, kDouble, kDouble, kDouble);
  for (Array<1>* gradient : {&r.dweight, &r.dbias, &r.dweight1, &r.dbias1}) gradient->fill(0);
  const Array<4> rows(kDouble, {c.rows[0], c.rows[1], c.rows[2], 1});
  rows.for_each([&](const std::array<int64_t, 4>& row) {
    const auto at = [&](int64_t k) { return std::array<int64_t, 4>{row[0], row[1], row[2], k}; };
    const auto dropped = [&](const Mask& mask, int64_t k, double v) {
      if (mask.bytes.empty()) return v;
      return mask[at(k)] ? v * kDropoutScale : 0.0;
    };
    const double scale = c.rowscale ? in.rowscale.real(row) : 1;
    const auto sum = [&](int64_t k) {
      double v = dropped(in.mask, k, in.x.real(at(k)) * scale);
      if (c.x1) v += dropped(in.mask1, k, in.x1.real(at(k)));
      return c.residual ? v + in.residual.real(at(k)) : v;
    };
    const Statistics forward = statistics(c, sum);
    for (int64_t k = 0; k < c.channels; ++k) {
      const double n = (sum(k) - forward.mean) * forward.rstd;
      r.residual_out.set(at(k), sum(k));
      r.out.set(at(k), n * in.weight.real({k}) + (c.bias ? in.bias.real({k}) : 0));
      if (c.head1) {
        r.out1.set(at(k), n * in.weight1.real({k}) + (c.bias ? in.bias1.real({k}) : 0));
      }
    }

    const auto stored = [&](int64_t k) { return in.sum.real(at(k)); };
    const Statistics backward = statistics(c, stored);
    const auto n = [&](int64_t k) { return (stored(k) - backward.mean) * backward.rstd; };
    const auto g = [&](int64_t k) {
      const double v = in.dout.real(at(k)) * in.weight.real({k});
      return c.head1 ? v + in.dout1.real(at(k)) * in.weight1.real({k}) : v;
    };
    double mean_g = 0, mean_ng = 0;
    for (int64_t k = 0; k < c.channels; ++k) {
      if (!c.is_rms_norm) mean_g += g(k) / static_cast<double>(c.channels);
      mean_ng += n(k) * g(k) / static_cast<double>(c.channels);
    }
    for (int64_t k = 0; k < c.channels; ++k) {
      const double dsum =
          (g(k) - mean_g - n(k) * mean_ng) * backward.rstd + in.dresidual_out.real(at(k));
      r.dx.set(at(k), dropped(in.mask, k, dsum * scale));
      if (c.x1) r.dx1.set(at(k), dropped(in.mask1, k, dsum));
      if (c.residual) r.dresidual.set(at(k), dsum);
      r.dweight.add({k}, in.dout.real(at(k)) * n(k));
      if (c.bias) r.dbias.add({k}, in.dout.real(at(k)));
      if (c.head1) r.dweight1.add({k}, in.dout1.real(at(k)) * n(k));
      if (c.head1 && c.bias) r.dbias1.add({k}, in.dout1.real(at(k)));
    }
  });
  return r;
}

Results run(const CpuKernels& kernels, const Case& c, Inputs& in, bool one_by_one) {
  Results r = make_results(c, c.dtype, c.residual_dtype, c.weight_dtype);
  LayerNormParams p{};
  std::copy(c.rows.begin(), c.rows.end(), p.axes.size);
  p.rows = c.rows[0] * c.rows[1] * c.rows[2];
  p.channels = c.channels;
  p.eps = kEps;
  p.dropout_scale = kDropoutScale;
  p.is_rms_norm = c.is_rms_norm;
  p.dtype = c.dtype;
  p.rowscale = in.rowscale.view();
  p.rowscale.stride[3] = 0;
  p.dropout_mask = in.mask.view();
  p.dropout_mask1 = in.mask1.view();
  p.weight = in.weight.view();
  p.bias = in.bias.view();
  p.weight1 = in.weight1.view();
  p.bias1 = in.bias1.view();
  p.x = in.x.view();
  p.x1 = in.x1.view();
  p.residual = in.residual.view();
  p.out = r.out.view();
  p.out1 = r.out1.view();
  p.residual_out = r.residual_out.view();
  run_items(layer_norm_fwd_items(p), one_by_one,
            [&](int64_t begin, int64_t end) { kernels.layer_norm_fwd(p, begin, end); });
  p.x = p.x1 = p.residual = p.out = p.out1 = p.residual_out = {};
  p.sum = in.sum.view();
  p.dout = in.dout.view();
  p.dout1 = in.dout1.view();
  p.dresidual_out = in.dresidual_out.view();
  p.dx = r.dx.view();
  p.dx1 = r.dx1.view();
  p.dresidual = r.dresidual.view();
  p.dweight = r.dweight.view();
  p.dbias = r.dbias.view();
  p.dweight1 = r.dweight1.view();
  p.dbias1 = r.dbias1.view();
  std::vector<unsigned char> workspace(layer_norm_bwd_cpu_workspace(p), 0xcb);
  run_items(layer_norm_bwd_items(p), one_by_one, [&](int64_t begin, int64_t end) {
    kernels.layer_norm_bwd(p, workspace.data(), begin, end);
  });
  run_items(layer_norm_bwd_reduce_items(p), one_by_one, [&](int64_t begin, int64_t end) {
    kernels.layer_norm_bwd_reduce(p, workspace.data(), begin, end);
  });
  return r;
}

template <class F>
void for_each_result(Results& a, Results& b, F f) {
  f("out", a.out, b.out);
  f("out1", a.out1, b.out1);
  f("residual_out", a.residual_out, b.residual_out);
  f("dx", a.dx, b.dx);
  f("dx1", a.dx1, b.dx1);
  f("dresidual", a.dresidual, b.dresidual);
  f("dweight", a.dweight, b.dweight);
  f("dbias", a.dbias, b.dbias);
  f("dweight1", a.dweight1, b.dweight1);
  f("dbias1", a.dbias1, b.dbias1);
}

TEST_CASE("layer_norm, forward and backward", "[layer_norm]") {
  for (const Case& c : cases()) {
    Inputs in = make_inputs(c);
    Results expected = reference(c, in);
    for (const CpuKernels* kernels : tables()) {
      CAPTURE(c.what, kernels->isa, c.channels, c.dtype, c.layout);
      Results together = run(*kernels, c, in, /*one_by_one=*/false);
      Results apart = run(*kernels, c, in, /*one_by_one=*/true);
      for_each_result(together, expected, [&](const char* name, auto& actual, auto& wanted) {
        CAPTURE(name);
        CHECK(actual.error(wanted) <= 4 * std::max(tolerance(c.dtype), tolerance(c.weight_dtype)));
        CHECK(actual.red_zones_intact());
      });
      for_each_result(together, apart, [&](const char* name, auto& one, auto& other) {
        CAPTURE(name);
        CHECK(one.same_bytes(other));
      });
    }
  }
}

}  // namespace
}  // namespace mamba_ssm::kernels
