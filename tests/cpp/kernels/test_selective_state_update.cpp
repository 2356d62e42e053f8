// The CPU kernel of selective_state_update against the definition in selective_state_update.h, in
// double.
#include <catch2/catch_test_macros.hpp>
#include <string>

#include "arrays.h"

namespace mamba_ssm::kernels {
namespace {

struct Case {
  std::string what;
  int64_t batch = 4, tokens = 1, nheads = 1, headdim = 21, ngroups = 1, dstate = 16;
  bool softplus = true, indexed = false, tied = false;
  bool D = true, z = true, dt_bias = true, intermediate = false;
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
  for (const int64_t tokens : {2, 8, 9, 19}) {
    add("tokens", [=](Case& c) { c.tokens = tokens; });
    add("tokens, 16-bit state", [=](Case& c) {
      c.tokens = tokens, c.state_dtype = DType::kBFloat16, c.intermediate = true;
    });
    add("tokens, one decay per head", [=](Case& c) {
      c.tokens = tokens, c.nheads = 6, c.ngroups = 2, c.tied = c.indexed = c.intermediate = true;
    });
    add("tokens, float64", [=](Case& c) {
      c.tokens = tokens, c.intermediate = true;
      c.dtype = c.dt_dtype = c.state_dtype = c.parameter_dtype = DType::kFloat64;
    });
  }
  for (const Layout layout : {Layout::kTransposed, Layout::kSliced}) {
    add("tokens, layout", [=](Case& c) {
      c.tokens = 3, c.nheads = 2, c.dstate = 17, c.layout = layout, c.intermediate = true;
    });
  }
  add("one token, intermediate state", [](Case& c) { c.intermediate = true; });
  add("no tokens", [](Case& c) { c.tokens = 0; });
  add("no rows", [](Case& c) { c.batch = 0; });
  add("no channels", [](Case& c) { c.headdim = 0; });
  add("no states", [](Case& c) { c.dstate = 0; });
  return all;
}

TEST_CASE("selective_state_update", "[selective_state_update]") {
  constexpr int64_t kSlots = 6;
  for (const Case& c : cases()) {
    std::mt19937_64 random(7);
    const std::array<int64_t, 4> tokens = {c.batch, c.tokens, c.nheads, c.headdim};
    const std::array<int64_t, 4> projections = {c.batch, c.tokens, c.ngroups, c.dstate};
    Array<4> x = Array<4>(c.dtype, tokens, c.layout).randomize(random);
    Array<4> dt = Array<4>(c.dt_dtype, tokens, c.layout).randomize(random);
    Array<4> z = c.z ? Array<4>(c.dtype, tokens, c.layout).randomize(random) : Array<4>();
    Array<3> A = Array<3>(c.parameter_dtype, {c.nheads, c.headdim, c.dstate}, c.layout)
                     .randomize(random, -2, 0);
    Array<4> B = Array<4>(c.dtype, projections, c.layout).randomize(random);
    Array<4> C = Array<4>(c.dtype, projections, c.layout).randomize(random);
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
    Array<3> head_dt = Array<3>(c.dt_dtype, {c.batch, c.tokens, c.nheads}).randomize(random);
    if (c.tied) {
      A.for_each([&](const auto& i) { A.set(i, head_A[{i[0]}]); });
      dt.for_each([&](const auto& i) { dt.set(i, head_dt[{i[0], i[1], i[2]}]); });
      dt_bias.for_each([&](const auto& i) { dt_bias.set(i, head_bias[{i[0]}]); });
    }
    Array<1> slots;
    if (c.indexed) {  // one slot of padding on either side of the pool
      slots = Array<1>(DType::kInt64, {c.batch}, Layout::kSliced);
      for (const auto& [b, slot] : {std::pair(0, 5), {1, -1}, {2, 0}, {3, int(kSlots)}}) {
        slots.set({b}, slot);
      }
    }

    Array<4> expected_out(DType::kFloat64, tokens);
    Array<4> expected_state(DType::kFloat64, state_before.shape());
    expected_state.for_each([&](const auto& i) { expected_state.set(i, state_before[i]); });
    // After each token; rows of padding stay 0.
    const std::array<int64_t, 5> kept = {c.batch, c.tokens, c.nheads, c.headdim, c.dstate};
    Array<5> expected_kept = Array<5>(DType::kFloat64, kept).fill(0);
    expected_out.for_each([&](const std::array<int64_t, 4>& index) {  // in the order of the tokens
      const auto [b, t, h, i] = index;
      const auto slot = static_cast<int64_t>(c.indexed ? slots.real({b}) : static_cast<double>(b));
      if (slot < 0 || slot >= kSlots) return expected_out.set(index, 0);
      const int64_t g = h / (c.nheads / c.ngroups);
      double d = dt.real(index) + (c.dt_bias ? dt_bias.real({h, i}) : 0);
      if (c.softplus && d <= 20) d = std::log1p(std::exp(d));
      double y = c.D ? D.real({h, i}) * x.real(index) : 0;
      for (int64_t n = 0; n < c.dstate; ++n) {
        const double s = std::exp(d * A.real({h, i, n})) * expected_state.real({slot, h, i, n}) +
                         d * B.real({b, t, g, n}) * x.real(index);
        expected_state.set({slot, h, i, n}, s);
        expected_kept.set({b, t, h, i, n}, s);
        y += C.real({b, t, g, n}) * s;
      }
      expected_out.set(index, c.z ? y * silu(z.real(index)) : y);
    });

    SelectiveStateUpdateParams p{};
    p.batch = c.batch, p.tokens = c.tokens, p.nheads = c.nheads, p.headdim = c.headdim;
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
      const View<3> v = head_dt.view();
      p.dt = {v.data, v.dtype, {v.stride[0], v.stride[1], v.stride[2], 0}};
    }
    p.state_batch_indices = slots.view();
    for (const CpuKernels* kernels : tables()) {
      CAPTURE(c.what, kernels->isa, c.headdim, c.dstate, c.dtype, c.layout);
      const auto run = [&](bool one_by_one, Array<4>& out, Array<4>& state, Array<5>& states) {
        out = Array<4>(c.dtype, tokens, c.layout);
        state = state_before;
        p.state = state.view();
        p.out = out.view();
        if (c.intermediate) states = Array<5>(c.state_dtype, kept, c.layout).fill(0);
        p.intermediate_states = states.view();
        run_items(selective_state_update_items(p), one_by_one, [&](int64_t begin, int64_t end) {
          kernels->selective_state_update(p, begin, end);
        });
      };
      Array<4> out, out_apart;
      Array<4> state, state_apart;
      Array<5> states, states_apart;
      run(false, out, state, states);
      run(true, out_apart, state_apart, states_apart);
      CHECK(out.error(expected_out) <= tolerance(c.dtype));
      CHECK(state.error(expected_state) <= tolerance(c.state_dtype));
      CHECK(out.red_zones_intact());
      CHECK(state.red_zones_intact());
      CHECK(out.same_bytes(out_apart));
      CHECK(state.same_bytes(state_apart));
      if (c.intermediate) {
        CHECK(states.error(expected_kept) <= tolerance(c.state_dtype));
        CHECK(states.red_zones_intact());
        CHECK(states.same_bytes(states_apart));
      }
      // The bits of a call for each token, if the state is not rounded between them.
      if (c.state_dtype != accumulate_type(c.dtype)) continue;
      out_apart = Array<4>(c.dtype, tokens, c.layout);
      state_apart = state_before;
      for (int64_t t = 0; t < c.tokens; ++t) {
        const auto at = [&](View<4> v) {
          if (v) {
            v.data = static_cast<unsigned char*>(v.data) +
                     t * v.stride[1] * static_cast<int64_t>(size_of(v.dtype));
          }
          return v;
        };
        SelectiveStateUpdateParams step = p;
        step.tokens = 1;
        step.x = at(p.x), step.dt = at(p.dt), step.z = at(p.z), step.B = at(p.B), step.C = at(p.C);
        step.state = state_apart.view();
        step.out = at(out_apart.view());
        step.intermediate_states = {};
        run_items(selective_state_update_items(step), false, [&](int64_t begin, int64_t end) {
          kernels->selective_state_update(step, begin, end);
        });
      }
      CHECK(out.same_bytes(out_apart));
      CHECK(state.same_bytes(state_apart));
    }
  }
}

}  // namespace
}  // namespace mamba_ssm::kernels
