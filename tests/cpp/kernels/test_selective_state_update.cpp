// The CPU kernel of selective_state_update against the definition in selective_state_update.h, in
// double.
#include <catch2/catch_test_macros.hpp>
#include <string>

#include "arrays.h"

namespace mamba_ssm::kernels {
namespace {

struct Case {
  std::string what;
  int64_t batch = 4, nheads = 1, headdim = 21, ngroups = 1, dstate = 16;
  bool softplus = true, indexed = false, tied = false;
  bool D = true, z = true, dt_bias = true;
  DType dtype = DType::kFloat32, dt_dtype = DType::kFloat32, state_dtype = DType::kFloat32;
  DType parameter_dtype = DType::kFloat32;
  Layout layout = Layout::kDense;
};

/// A base row, then rows that change one thing each.
std::vector<Case> cases() {
  std::vector<Case> all;
  const auto add = [&](const char* what, auto change) {
    Case c;
    c.what = what;
    change(c);
    all.push_back(c);
  };
  add("base", [](Case&) {});
  for (const int64_t dstate : {1, 5, 17, 64, 130})
    add("dstate", [=](Case& c) { c.dstate = dstate; });
  for (const int64_t headdim : {1, 8, 65}) add("headdim", [=](Case& c) { c.headdim = headdim; });
  add("heads", [](Case& c) { c.nheads = 6; });
  add("heads in groups", [](Case& c) { c.nheads = 6, c.ngroups = 3; });
  add("a group per head", [](Case& c) { c.nheads = c.ngroups = 6; });
  add("one decay per head", [](Case& c) { c.nheads = 6, c.ngroups = 2, c.tied = true; });
  add("one decay per head, 16-bit",
      [](Case& c) { c.nheads = 6, c.tied = true, c.dtype = c.dt_dtype = DType::kBFloat16; });
  add("slots", [](Case& c) { c.indexed = true; });
  add("no softplus", [](Case& c) { c.softplus = false; });
  add("no D", [](Case& c) { c.D = false; });
  add("no z", [](Case& c) { c.z = false; });
  add("no dt_bias", [](Case& c) { c.dt_bias = false; });
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    add("16-bit", [=](Case& c) { c.dtype = c.dt_dtype = c.state_dtype = dtype; });
    add("16-bit state", [=](Case& c) { c.state_dtype = dtype; });
    add("16-bit with float32 state", [=](Case& c) { c.dtype = c.dt_dtype = dtype; });
    add("16-bit with float32 dt", [=](Case& c) { c.dtype = c.state_dtype = dtype; });
    add("16-bit parameters", [=](Case& c) { c.parameter_dtype = dtype; });
  }
  add("float64",
      [](Case& c) { c.dtype = c.dt_dtype = c.state_dtype = c.parameter_dtype = DType::kFloat64; });
  for (const Layout layout : {Layout::kTransposed, Layout::kSliced}) {
    add("layout", [=](Case& c) { c.layout = layout; });
    add("layout, heads", [=](Case& c) { c.layout = layout, c.nheads = 4, c.ngroups = 2; });
    add("layout, slots", [=](Case& c) { c.layout = layout, c.indexed = true; });
  }
  add("no rows", [](Case& c) { c.batch = 0; });
  add("no channels", [](Case& c) { c.headdim = 0; });
  add("no states", [](Case& c) { c.dstate = 0; });
  return all;
}

TEST_CASE("selective_state_update", "[selective_state_update]") {
  constexpr int64_t kSlots = 6;
  for (const Case& c : cases()) {
    std::mt19937_64 random(7);
    const std::array<int64_t, 3> tokens = {c.batch, c.nheads, c.headdim};
    Array<3> x = Array<3>(c.dtype, tokens, c.layout).randomize(random);
    Array<3> dt = Array<3>(c.dt_dtype, tokens, c.layout).randomize(random);
    Array<3> z = c.z ? Array<3>(c.dtype, tokens, c.layout).randomize(random) : Array<3>();
    Array<3> A = Array<3>(c.parameter_dtype, {c.nheads, c.headdim, c.dstate}, c.layout)
                     .randomize(random, -2, 0);
    Array<3> B = Array<3>(c.dtype, {c.batch, c.ngroups, c.dstate}, c.layout).randomize(random);
    Array<3> C = Array<3>(c.dtype, {c.batch, c.ngroups, c.dstate}, c.layout).randomize(random);
    Array<2> D, dt_bias;
    if (c.D) D = Array<2>(c.parameter_dtype, {c.nheads, c.headdim}, c.layout).randomize(random);
    if (c.dt_bias) {
      dt_bias = Array<2>(c.parameter_dtype, {c.nheads, c.headdim}, c.layout).randomize(random);
    }
    const Array<4> state_before =
        Array<4>(c.state_dtype, {kSlots, c.nheads, c.headdim, c.dstate}, c.layout)
            .randomize(random);
    // One value per head, seen as full arrays through strides of 0.
    Array<1> head_A = Array<1>(c.parameter_dtype, {c.nheads}).randomize(random, -2, 0);
    Array<1> head_bias = Array<1>(c.parameter_dtype, {c.nheads}).randomize(random);
    Array<2> head_dt = Array<2>(c.dt_dtype, {c.batch, c.nheads}).randomize(random);
    if (c.tied) {
      A.for_each([&](const auto& i) { A.set(i, head_A[{i[0]}]); });
      dt.for_each([&](const auto& i) { dt.set(i, head_dt[{i[0], i[1]}]); });
      dt_bias.for_each([&](const auto& i) { dt_bias.set(i, head_bias[{i[0]}]); });
    }
    Array<1> slots;
    if (c.indexed) {  // one slot of padding on either side of the pool
      slots = Array<1>(DType::kInt64, {c.batch}, Layout::kSliced);
      for (const auto& [b, slot] : {std::pair(0, 5), {1, -1}, {2, 0}, {3, int(kSlots)}}) {
        slots.set({b}, slot);
      }
    }

    Array<3> expected_out(DType::kFloat64, tokens);
    Array<4> expected_state(DType::kFloat64, state_before.shape());
    expected_state.for_each([&](const auto& i) { expected_state.set(i, state_before[i]); });
    expected_out.for_each([&](const std::array<int64_t, 3>& index) {
      const auto [b, h, i] = index;
      const auto slot = static_cast<int64_t>(c.indexed ? slots.real({b}) : static_cast<double>(b));
      if (slot < 0 || slot >= kSlots) return expected_out.set(index, 0);
      const int64_t g = h / (c.nheads / c.ngroups);
      double d = dt.real(index) + (c.dt_bias ? dt_bias.real({h, i}) : 0);
      if (c.softplus && d <= 20) d = std::log1p(std::exp(d));
      double y = c.D ? D.real({h, i}) * x.real(index) : 0;
      for (int64_t n = 0; n < c.dstate; ++n) {
        const double s = std::exp(d * A.real({h, i, n})) * state_before.real({slot, h, i, n}) +
                         d * B.real({b, g, n}) * x.real(index);
        expected_state.set({slot, h, i, n}, s);
        y += C.real({b, g, n}) * s;
      }
      expected_out.set(index, c.z ? y * silu(z.real(index)) : y);
    });

    SelectiveStateUpdateParams p{};
    p.batch = c.batch, p.nheads = c.nheads, p.headdim = c.headdim;
    p.ngroups = c.ngroups, p.dstate = c.dstate, p.num_slots = kSlots;
    p.dt_softplus = c.softplus;
    p.dtype = c.dtype;
    p.x = x.view();
    p.dt = dt.view();
    p.z = z.view();
    p.A = A.view();
    p.B = B.view();
    p.C = C.view();
    p.D = D.view();
    p.dt_bias = dt_bias.view();
    if (c.tied) {
      p.A = {head_A.view().data, c.parameter_dtype, {head_A.view().stride[0], 0, 0}};
      p.dt_bias = {head_bias.view().data, c.parameter_dtype, {head_bias.view().stride[0], 0}};
      const View<2> v = head_dt.view();
      p.dt = {v.data, v.dtype, {v.stride[0], v.stride[1], 0}};
    }
    p.state_batch_indices = slots.view();
    for (const CpuKernels* kernels : tables()) {
      CAPTURE(c.what, kernels->isa, c.headdim, c.dstate, c.dtype, c.layout);
      const auto run = [&](bool one_by_one, Array<3>& out, Array<4>& state) {
        out = Array<3>(c.dtype, tokens, c.layout);
        state = state_before;
        p.state = state.view();
        p.out = out.view();
        run_items(selective_state_update_items(p), one_by_one, [&](int64_t begin, int64_t end) {
          kernels->selective_state_update(p, begin, end);
        });
      };
      Array<3> out, out_apart;
      Array<4> state, state_apart;
      run(false, out, state);
      run(true, out_apart, state_apart);
      CHECK(out.error(expected_out) <= tolerance(c.dtype));
      CHECK(state.error(expected_state) <= tolerance(c.state_dtype));
      CHECK(out.red_zones_intact());
      CHECK(state.red_zones_intact());
      CHECK(out.same_bytes(out_apart));
      CHECK(state.same_bytes(state_apart));
    }
  }
}

}  // namespace
}  // namespace mamba_ssm::kernels
