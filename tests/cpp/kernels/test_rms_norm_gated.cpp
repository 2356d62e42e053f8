// The CPU kernels of rms_norm_gated against the definition in rms_norm_gated.h, in double.
#include <catch2/catch_test_macros.hpp>
#include <string>

#include "arrays.h"

namespace mamba_ssm::kernels {
namespace {

struct Case {
  std::string what;
  std::array<int64_t, 3> rows = {1, 2, 5};
  int64_t groups = 1, group_size = 24;
  bool bias = true, z = true, norm_before_gate = true, is_rms_norm = true;
  DType dtype = DType::kFloat32, weight_dtype = DType::kFloat32;
  Layout layout = Layout::kDense;

  std::array<int64_t, 4> shape() const { return {rows[0], rows[1], rows[2], groups * group_size}; }
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
  for (const int64_t size : {1, 4, 15, 16, 17, 64, 130, 700}) {
    add("group size", [=](Case& c) { c.group_size = size; });
    add("groups of that size", [=](Case& c) { c.group_size = size, c.groups = 3; });
  }
  add("no bias", [](Case& c) { c.bias = false; });
  add("no gate", [](Case& c) { c.z = false; });
  add("many rows", [](Case& c) { c.rows = {3, 7, 11}; });
  add("no rows", [](Case& c) { c.rows = {2, 0, 3}; });
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    add("16-bit", [=](Case& c) { c.dtype = dtype; });
    add("16-bit weights", [=](Case& c) { c.weight_dtype = dtype; });
  }
  add("float64", [](Case& c) { c.dtype = c.weight_dtype = DType::kFloat64; });
  for (const Layout layout : {Layout::kTransposed, Layout::kSliced}) {
    add("layout", [=](Case& c) { c.layout = layout; });
  }
  const std::vector<Case> before = all;
  for (Case c : before) {
    c.norm_before_gate = false, c.what += ", gate first";
    all.push_back(c);
    c.is_rms_norm = false, c.what += ", with mean";
    all.push_back(c);
  }
  return all;
}

struct Inputs {
  Array<4> x, z, dout;
  Array<1> weight, bias;
};

Inputs make_inputs(const Case& c) {
  std::mt19937_64 random(7);
  Inputs in;
  in.x = Array<4>(c.dtype, c.shape(), c.layout).randomize(random);
  in.dout = Array<4>(c.dtype, c.shape(), c.layout).randomize(random);
  if (c.z) in.z = Array<4>(c.dtype, c.shape(), c.layout).randomize(random, -3, 3);
  const std::array<int64_t, 1> channels = {c.groups * c.group_size};
  in.weight = Array<1>(c.weight_dtype, channels, c.layout).randomize(random, 0.5, 1.5);
  if (c.bias) in.bias = Array<1>(c.weight_dtype, channels, c.layout).randomize(random);
  return in;
}

struct Results {
  Array<4> out, dx, dz;
  Array<1> dweight, dbias;
};

Results make_results(const Case& c, DType dtype, DType weight_dtype) {
  Results r;
  r.out = Array<4>(dtype, c.shape(), c.layout);
  r.dx = Array<4>(dtype, c.shape(), c.layout);
  if (c.z) r.dz = Array<4>(dtype, c.shape(), c.layout);
  const std::array<int64_t, 1> channels = {c.groups * c.group_size};
  r.dweight = Array<1>(weight_dtype, channels, c.layout);
  if (c.bias) r.dbias = Array<1>(weight_dtype, channels, c.layout);
  return r;
}

constexpr double kEps = 1e-3;

/// The definition, group by group.
Results reference(const Case& c, const Inputs& in) {
  Results r = make_results(c, DType::kFloat64, DType::kFloat64);
  r.dweight.fill(0);
  r.dbias.fill(0);
  const auto size = static_cast<double>(c.group_size);
  const Array<4> groups(DType::kFloat64, {c.rows[0], c.rows[1], c.rows[2], c.groups});
  groups.for_each([&](const std::array<int64_t, 4>& index) {
    const auto at = [&](int64_t k) {
      return std::array<int64_t, 4>{index[0], index[1], index[2], index[3] * c.group_size + k};
    };
    const auto channel = [&](int64_t k) {
      return std::array<int64_t, 1>{index[3] * c.group_size + k};
    };
    const auto z = [&](int64_t k) { return c.z ? in.z.real(at(k)) : 0; };
    const auto gate = [&](int64_t k) { return c.z ? silu(z(k)) : 1; };
    const auto source = [&](int64_t k) {
      return in.x.real(at(k)) * (c.norm_before_gate ? 1 : gate(k));
    };
    double mean = 0, variance = 0, mean_g = 0, mean_ng = 0;
    for (int64_t k = 0; k < c.group_size && !c.is_rms_norm; ++k) mean += source(k) / size;
    for (int64_t k = 0; k < c.group_size; ++k) variance += std::pow(source(k) - mean, 2) / size;
    const double rstd = 1 / std::sqrt(variance + kEps);
    const auto n = [&](int64_t k) { return (source(k) - mean) * rstd; };
    const auto norm = [&](int64_t k) {
      return n(k) * in.weight.real(channel(k)) + (c.bias ? in.bias.real(channel(k)) : 0);
    };
    const auto dnorm = [&](int64_t k) {
      return in.dout.real(at(k)) * (c.norm_before_gate ? gate(k) : 1);
    };
    const auto g = [&](int64_t k) { return dnorm(k) * in.weight.real(channel(k)); };
    for (int64_t k = 0; k < c.group_size; ++k) {
      if (!c.is_rms_norm) mean_g += g(k) / size;
      mean_ng += n(k) * g(k) / size;
    }
    for (int64_t k = 0; k < c.group_size; ++k) {
      r.out.set(at(k), norm(k) * (c.norm_before_gate ? gate(k) : 1));
      const double ds = (g(k) - mean_g - n(k) * mean_ng) * rstd;
      r.dx.set(at(k), c.norm_before_gate ? ds : ds * gate(k));
      if (c.z) {
        const double upstream =
            c.norm_before_gate ? in.dout.real(at(k)) * norm(k) : ds * in.x.real(at(k));
        r.dz.set(at(k), upstream * silu_derivative(z(k)));
      }
      r.dweight.add(channel(k), dnorm(k) * n(k));
      if (c.bias) r.dbias.add(channel(k), dnorm(k));
    }
  });
  return r;
}

Results run(const CpuKernels& kernels, const Case& c, Inputs& in, bool one_by_one) {
  Results r = make_results(c, c.dtype, c.weight_dtype);
  RmsNormGatedParams p{};
  std::copy(c.rows.begin(), c.rows.end(), p.axes.size);
  p.rows = c.rows[0] * c.rows[1] * c.rows[2];
  p.channels = c.groups * c.group_size;
  p.group_size = c.group_size;
  p.eps = kEps;
  p.norm_before_gate = c.norm_before_gate;
  p.is_rms_norm = c.is_rms_norm;
  p.dtype = c.dtype;
  p.x = in.x.view();
  p.z = in.z.view();
  p.weight = in.weight.view();
  p.bias = in.bias.view();
  p.out = r.out.view();
  run_items(rms_norm_gated_fwd_items(p), one_by_one,
            [&](int64_t begin, int64_t end) { kernels.rms_norm_gated_fwd(p, begin, end); });
  p.out = {};
  p.dout = in.dout.view();
  p.dx = r.dx.view();
  p.dz = r.dz.view();
  p.dweight = r.dweight.view();
  p.dbias = r.dbias.view();
  std::vector<unsigned char> workspace(rms_norm_gated_bwd_cpu_workspace(p), 0xcb);
  run_items(rms_norm_gated_bwd_items(p), one_by_one, [&](int64_t begin, int64_t end) {
    kernels.rms_norm_gated_bwd(p, workspace.data(), begin, end);
  });
  run_items(rms_norm_gated_bwd_reduce_items(p), one_by_one, [&](int64_t begin, int64_t end) {
    kernels.rms_norm_gated_bwd_reduce(p, workspace.data(), begin, end);
  });
  return r;
}

template <class F>
void for_each_result(Results& a, Results& b, F f) {
  f("out", a.out, b.out);
  f("dx", a.dx, b.dx);
  f("dz", a.dz, b.dz);
  f("dweight", a.dweight, b.dweight);
  f("dbias", a.dbias, b.dbias);
}

TEST_CASE("rms_norm_gated, forward and backward", "[rms_norm_gated]") {
  for (const Case& c : cases()) {
    Inputs in = make_inputs(c);
    Results expected = reference(c, in);
    for (const CpuKernels* kernels : tables()) {
      CAPTURE(c.what, kernels->isa, c.groups, c.group_size, c.dtype, c.layout);
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
