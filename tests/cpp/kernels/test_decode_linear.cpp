// The CPU kernel of decode_linear against the definition in decode_linear.h, in double.
#include <catch2/catch_test_macros.hpp>
#include <string>

#include "arrays.h"
#include "kernels/decode_linear.h"

namespace mamba_ssm::kernels {
namespace {

struct Case {
  std::string what;
  int64_t rows = 3, in_features = 24, out_features = 70;
  bool bias = true, norm = true, residual = true, z = false;
  DType dtype = DType::kFloat32, residual_dtype = DType::kFloat32;
  Layout layout = Layout::kDense;
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
  for (const int64_t size : {1, 7, 16, 33, 511, 512, 513, 1100}) {
    add("features", [=](Case& c) { c.in_features = size; });
  }
  for (const int64_t size : {1, 63, 64, 65, 200}) {
    add("outputs", [=](Case& c) { c.out_features = size; });
  }
  add("one row", [](Case& c) { c.rows = 1; });
  add("no bias", [](Case& c) { c.bias = false; });
  add("no residual", [](Case& c) { c.residual = false; });
  add("gate", [](Case& c) { c.residual = false, c.z = true; });
  add("no norm", [](Case& c) { c.norm = c.residual = false; });
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    add("16-bit", [=](Case& c) { c.dtype = dtype; });
    add("16-bit residual", [=](Case& c) { c.dtype = c.residual_dtype = dtype; });
  }
  add("float64", [](Case& c) { c.dtype = c.residual_dtype = DType::kFloat64; });
  for (const Layout layout : {Layout::kTransposed, Layout::kSliced}) {
    add("layout", [=](Case& c) { c.layout = layout; });
  }
  return all;
}

constexpr double kEps = 1e-3;

struct Results {
  Array<2> out, residual_out;
};

TEST_CASE("decode_linear", "[decode_linear]") {
  for (const Case& c : cases()) {
    std::mt19937_64 random(7);
    const DType parameter = c.dtype == DType::kFloat64 ? c.dtype : DType::kFloat32;
    const std::array<int64_t, 2> shape = {c.rows, c.in_features};
    const std::array<int64_t, 2> out_shape = {c.rows, c.out_features};
    Array<2> x = Array<2>(c.dtype, shape, c.layout).randomize(random);
    Array<2> weight =
        Array<2>(c.dtype, {c.out_features, c.in_features}, c.layout).randomize(random);
    Array<1> norm_weight, bias;
    Array<2> residual, z;
    if (c.norm) {
      norm_weight = Array<1>(parameter, {c.in_features}, c.layout).randomize(random, 0.5, 1.5);
    }
    if (c.bias) bias = Array<1>(parameter, {c.out_features}, c.layout).randomize(random);
    if (c.residual) residual = Array<2>(c.residual_dtype, shape, c.layout).randomize(random);
    if (c.z) z = Array<2>(c.dtype, shape, c.layout).randomize(random, -3, 3);

    Results expected;
    expected.out = Array<2>(DType::kFloat64, out_shape, Layout::kDense);
    if (c.residual) expected.residual_out = Array<2>(DType::kFloat64, shape, Layout::kDense);
    expected.out.for_each([&](const std::array<int64_t, 2>& at) {
      double squares = 0, sum = 0;
      for (int64_t i = 0; i < c.in_features; ++i) {
        double s = x.real({at[0], i}) + (c.residual ? residual.real({at[0], i}) : 0);
        if (c.residual) expected.residual_out.set({at[0], i}, s);
        if (c.z) s *= silu(z.real({at[0], i}));
        squares += s * s;
        if (c.norm) s *= norm_weight.real({i});
        sum += s * weight.real({at[1], i});
      }
      if (c.norm) sum /= std::sqrt(squares / static_cast<double>(c.in_features) + kEps);
      expected.out.set(at, sum + (c.bias ? bias.real({at[1]}) : 0));
    });

    for (const CpuKernels* kernels : tables()) {
      CAPTURE(c.what, kernels->isa, c.in_features, c.out_features, c.dtype, c.layout);
      const auto run = [&](bool one_by_one) {
        Results r;
        r.out = Array<2>(c.dtype, out_shape, c.layout);
        if (c.residual) r.residual_out = Array<2>(c.residual_dtype, shape, c.layout);
        DecodeLinearParams p{};
        p.rows = c.rows;
        p.in_features = c.in_features;
        p.out_features = c.out_features;
        p.eps = kEps;
        p.dtype = c.dtype;
        p.x = x.view();
        p.residual = residual.view();
        p.z = z.view();
        p.norm_weight = norm_weight.view();
        p.weight = weight.view();
        p.bias = bias.view();
        p.out = r.out.view();
        p.residual_out = r.residual_out.view();
        const int64_t items = (c.out_features + kLinearOutputs - 1) / kLinearOutputs;
        run_items(items, one_by_one,
                  [&](int64_t begin, int64_t end) { kernels->decode_linear(p, begin, end); });
        return r;
      };
      Results together = run(/*one_by_one=*/false), apart = run(/*one_by_one=*/true);
      const double terms = std::sqrt(static_cast<double>(c.in_features));
      CHECK(together.out.error(expected.out) <= 4 * terms * tolerance(c.dtype));
      CHECK(together.out.red_zones_intact());
      CHECK(together.out.same_bytes(apart.out));
      if (c.residual) {
        CHECK(together.residual_out.error(expected.residual_out) <=
              4 * tolerance(c.residual_dtype));
        CHECK(together.residual_out.red_zones_intact());
        CHECK(together.residual_out.same_bytes(apart.residual_out));
      }
    }
  }
}

}  // namespace
}  // namespace mamba_ssm::kernels
