// The CPU kernels of causal_conv1d against the definition in causal_conv1d.h, in double.
#include <catch2/catch_test_macros.hpp>
#include <string>

#include "arrays.h"

namespace mamba_ssm::kernels {
namespace {

struct Case {
  std::string what;
  int64_t batch = 2, dim = 19, seqlen = 37, width = 4;
  bool silu = true, bias = true, initial_states = true;
  DType dtype = DType::kFloat32, weight_dtype = DType::kFloat32, id_dtype = DType::kInt32;
  Packing packing = Packing::kNone;
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
  for (const int64_t width : {1, 2, 3, 5, 9}) {
    add("width", [=](Case& c) { c.width = width; });
  }
  for (const int64_t dim : {1, 8, 64, 100}) add("dim", [=](Case& c) { c.dim = dim; });
  for (const int64_t seqlen : {1, 2, 3, 16, 200})
    add("seqlen", [=](Case& c) { c.seqlen = seqlen; });
  add("shorter than the filter", [](Case& c) { c.seqlen = 2, c.width = 7; });
  add("no silu", [](Case& c) { c.silu = false; });
  add("no bias", [](Case& c) { c.bias = false; });
  add("no initial states", [](Case& c) { c.initial_states = false; });
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    add("16-bit", [=](Case& c) { c.dtype = dtype; });
    add("16-bit weights", [=](Case& c) { c.weight_dtype = dtype; });
    add("16-bit, channel last", [=](Case& c) { c.dtype = dtype, c.layout = Layout::kTransposed; });
  }
  add("float64", [](Case& c) { c.dtype = c.weight_dtype = DType::kFloat64; });
  for (const Layout layout : {Layout::kTransposed, Layout::kSliced}) {
    add("layout", [=](Case& c) { c.layout = layout; });
    add("layout, packed", [=](Case& c) { c.layout = layout, c.packing = Packing::kPadded; });
    add("layout, long", [=](Case& c) { c.layout = layout, c.seqlen = 200, c.dim = 33; });
  }
  for (const Packing packing : {Packing::kRuns, Packing::kPadded}) {
    add("packed", [=](Case& c) { c.packing = packing; });
    add("packed, int64", [=](Case& c) { c.packing = packing, c.id_dtype = DType::kInt64; });
    add("packed, wide filter", [=](Case& c) { c.packing = packing, c.width = 9; });
    add("packed, from zero", [=](Case& c) { c.packing = packing, c.initial_states = false; });
    add("packed, no silu", [=](Case& c) { c.packing = packing, c.silu = false; });
  }
  return all;
}

std::vector<Case> empty_cases() {
  Case no_rows, no_channels, no_tokens;
  no_rows.batch = 0, no_rows.what = "no rows";
  no_channels.dim = 0, no_channels.what = "no channels";
  no_tokens.seqlen = 0, no_tokens.what = "no tokens";
  return {no_rows, no_channels, no_tokens};
}

struct Inputs {
  Array<3> x, initial_states, dout, dfinal_states;
  Array<2> weight, seq_idx;
  Array<1> bias;
};

Inputs make_inputs(const Case& c) {
  std::mt19937_64 random(7);
  Inputs in;
  const std::array<int64_t, 3> states = {c.batch, c.dim, c.width - 1};
  in.x = Array<3>(c.dtype, {c.batch, c.dim, c.seqlen}, c.layout).randomize(random);
  in.dout = Array<3>(c.dtype, {c.batch, c.dim, c.seqlen}, c.layout).randomize(random);
  in.dfinal_states = Array<3>(c.dtype, states, c.layout).randomize(random);
  in.weight = Array<2>(c.weight_dtype, {c.dim, c.width}, c.layout).randomize(random);
  if (c.initial_states) {
    in.initial_states = Array<3>(c.dtype, states, Layout::kTransposed).randomize(random);
  }
  if (c.bias) in.bias = Array<1>(c.weight_dtype, {c.dim}, c.layout).randomize(random);
  in.seq_idx = make_seq_idx(c.packing, c.id_dtype, c.batch, c.seqlen);
  return in;
}

struct Results {
  Array<3> out, final_states;    // forward
  Array<3> dx, dinitial_states;  // backward
  Array<2> dweight;
  Array<1> dbias;
};

Results make_results(const Case& c, DType dtype, DType weight_dtype) {
  Results r;
  const std::array<int64_t, 3> states = {c.batch, c.dim, c.width - 1};
  r.out = Array<3>(dtype, {c.batch, c.dim, c.seqlen}, c.layout);
  r.final_states = Array<3>(dtype, states, c.layout);
  r.dx = Array<3>(dtype, {c.batch, c.dim, c.seqlen}, c.layout);
  r.dweight = Array<2>(weight_dtype, {c.dim, c.width}, c.layout);
  if (c.initial_states) r.dinitial_states = Array<3>(dtype, states, c.layout);
  if (c.bias) r.dbias = Array<1>(weight_dtype, {c.dim}, c.layout);
  return r;
}

/// The definition, position by position.
Results reference(const Case& c, const Inputs& in) {
  Results r = make_results(c, DType::kFloat64, DType::kFloat64);
  r.dx.fill(0);
  r.dweight.fill(0);
  r.dbias.fill(0);
  r.dinitial_states.fill(0);
  const int64_t taps = c.width - 1;
  for (int64_t b = 0; b < c.batch; ++b) {
    const auto id = [&](int64_t t) { return in.seq_idx ? in.seq_idx.real({b, t}) : 0; };
    int64_t first = c.seqlen, last = -1;  // tokens that are not padding
    for (int64_t t = 0; t < c.seqlen; ++t) {
      if (id(t) < 0) continue;
      first = std::min(first, t);
      last = t;
    }
    // Whether position s, a column of the initial states if negative, counts for token t.
    const auto visible = [&](int64_t s, int64_t t) {
      if (s < 0) return bool(in.initial_states) && (t < 0 || id(first) == id(t));
      return id(s) == id(t);
    };
    for (int64_t ch = 0; ch < c.dim; ++ch) {
      const auto input = [&](int64_t s) {
        return s < 0 ? in.initial_states.real({b, ch, s + taps}) : in.x.real({b, ch, s});
      };
      const auto add_gradient = [&](int64_t s, double g) {
        s < 0 ? r.dinitial_states.add({b, ch, s + taps}, g) : r.dx.add({b, ch, s}, g);
      };
      for (int64_t t = 0; t < c.seqlen; ++t) {
        if (id(t) < 0) {
          r.out.set({b, ch, t}, 0);
          continue;
        }
        double a = in.bias ? in.bias.real({ch}) : 0;
        for (int64_t k = 0; k < c.width; ++k) {
          const int64_t s = t - taps + k;
          if (visible(s, t)) a += in.weight.real({ch, k}) * input(s);
        }
        r.out.set({b, ch, t}, c.silu ? silu(a) : a);

        const double da = in.dout.real({b, ch, t}) * (c.silu ? silu_derivative(a) : 1);
        if (in.bias) r.dbias.add({ch}, da);
        for (int64_t k = 0; k < c.width; ++k) {
          const int64_t s = t - taps + k;
          if (!visible(s, t)) continue;
          r.dweight.add({ch, k}, da * input(s));
          add_gradient(s, da * in.weight.real({ch, k}));
        }
      }
      for (int64_t j = 0; j < taps; ++j) {
        const int64_t s = last - taps + 1 + j;
        const bool seen = visible(s, last);
        r.final_states.set({b, ch, j}, seen ? input(s) : 0);
        if (seen) add_gradient(s, in.dfinal_states.real({b, ch, j}));
      }
    }
  }
  return r;
}

Results run(const CpuKernels& kernels, const Case& c, Inputs& in, bool one_by_one) {
  Results r = make_results(c, c.dtype, c.weight_dtype);
  CausalConv1dParams p{};
  p.batch = c.batch, p.dim = c.dim, p.seqlen = c.seqlen, p.width = c.width;
  p.silu = c.silu;
  p.dtype = c.dtype;
  p.x = in.x.view();
  p.weight = in.weight.view();
  p.bias = in.bias.view();
  p.seq_idx = in.seq_idx.view();
  p.initial_states = in.initial_states.view();
  p.out = r.out.view();
  p.final_states = r.final_states.view();
  run_items(causal_conv1d_fwd_items(p), one_by_one,
            [&](int64_t begin, int64_t end) { kernels.causal_conv1d_fwd(p, begin, end); });
  p.out = {};
  p.final_states = {};
  p.dout = in.dout.view();
  p.dfinal_states = in.dfinal_states.view();
  p.dx = r.dx.view();
  p.dweight = r.dweight.view();
  p.dbias = r.dbias.view();
  p.dinitial_states = r.dinitial_states.view();
  run_items(causal_conv1d_bwd_items(p), one_by_one,
            [&](int64_t begin, int64_t end) { kernels.causal_conv1d_bwd(p, begin, end); });
  return r;
}

template <class F>
void for_each_result(Results& a, Results& b, F f) {
  f("out", a.out, b.out);
  f("final_states", a.final_states, b.final_states);
  f("dx", a.dx, b.dx);
  f("dweight", a.dweight, b.dweight);
  f("dbias", a.dbias, b.dbias);
  f("dinitial_states", a.dinitial_states, b.dinitial_states);
}

TEST_CASE("causal_conv1d, forward and backward", "[causal_conv1d]") {
  std::vector<Case> all = cases();
  for (const Case& c : empty_cases()) all.push_back(c);
  for (const Case& c : all) {
    Inputs in = make_inputs(c);
    Results expected = reference(c, in);
    for (const CpuKernels* kernels : tables()) {
      CAPTURE(c.what, kernels->isa, c.dim, c.seqlen, c.width, c.dtype, c.layout, c.packing);
      Results together = run(*kernels, c, in, /*one_by_one=*/false);
      Results apart = run(*kernels, c, in, /*one_by_one=*/true);
      for_each_result(together, expected, [&](const char* name, auto& actual, auto& wanted) {
        CAPTURE(name);
        // Gradients of weights are sums over batch * seqlen terms.
        const double sum = name[1] == 'w' || name[1] == 'b' ? 4 : 1;
        CHECK(actual.error(wanted) <=
              sum * std::max(tolerance(c.dtype), tolerance(c.weight_dtype)));
        CHECK(actual.red_zones_intact());
      });
      for_each_result(together, apart, [&](const char* name, auto& one, auto& other) {
        CAPTURE(name);
        CHECK(one.same_bytes(other));
      });
    }
  }
}

struct UpdateCase {
  const char* what;
  int64_t seqlen, width, state_len;
  bool ring, indexed;
  DType dtype = DType::kFloat32;
  Layout layout = Layout::kDense;
};

TEST_CASE("causal_conv1d_update", "[causal_conv1d]") {
  const UpdateCase cases[] = {
      {"base", 1, 4, 4, false, false},
      {"state as short as possible", 1, 4, 3, false, false},
      {"long state", 1, 4, 9, false, false},
      {"several tokens", 3, 4, 5, false, false},
      {"more tokens than states", 8, 4, 5, false, false},
      {"no token", 0, 4, 5, false, false},
      {"width 1 without a state", 2, 1, 0, false, false},
      {"width 2", 1, 2, 4, false, true},
      {"width 7", 2, 7, 8, false, true},
      {"slots", 1, 4, 4, false, true},
      {"ring", 1, 4, 6, true, false},
      {"ring, several tokens", 4, 4, 6, true, true},
      {"ring, more tokens than states", 11, 4, 6, true, false},
      {"float16", 2, 4, 5, false, true, DType::kFloat16},
      {"bfloat16", 2, 4, 5, true, true, DType::kBFloat16},
      {"float64", 2, 4, 5, true, true, DType::kFloat64},
      {"transposed", 2, 4, 5, true, true, DType::kFloat32, Layout::kTransposed},
      {"sliced", 2, 4, 5, false, true, DType::kFloat32, Layout::kSliced},
  };
  constexpr int64_t kBatch = 4, kDim = 21, kSlots = 6;
  for (const UpdateCase& c : cases) {
    std::mt19937_64 random(7);
    const DType weight_dtype = accumulate_type(c.dtype);
    Array<3> x = Array<3>(c.dtype, {kBatch, kDim, c.seqlen}, c.layout).randomize(random);
    const Array<3> state_before =
        Array<3>(c.dtype, {kSlots, kDim, c.state_len}, c.layout).randomize(random);
    Array<2> weight = Array<2>(weight_dtype, {kDim, c.width}).randomize(random);
    Array<1> bias = Array<1>(weight_dtype, {kDim}).randomize(random);
    Array<1> positions, slots;
    if (c.ring) {
      positions = Array<1>(DType::kInt64, {kBatch});
      for (int64_t b = 0; b < kBatch; ++b) positions.set({b}, static_cast<double>(5 * b - 3));
    }
    if (c.indexed) {  // one slot of padding on either side of the pool
      slots = Array<1>(DType::kInt32, {kBatch}, Layout::kSliced);
      for (const auto& [b, slot] : {std::pair(0, 5), {1, -1}, {2, 0}, {3, int(kSlots)}}) {
        slots.set({b}, slot);
      }
    }

    Array<3> expected_out(DType::kFloat64, {kBatch, kDim, c.seqlen});
    Array<3> expected_state = state_before;
    for (int64_t b = 0; b < kBatch; ++b) {
      const auto slot = static_cast<int64_t>(c.indexed ? slots.real({b}) : static_cast<double>(b));
      const int64_t next = c.ring ? ((5 * b - 3) % c.state_len + c.state_len) % c.state_len : 0;
      for (int64_t ch = 0; ch < kDim; ++ch) {
        if (slot < 0 || slot >= kSlots) {
          for (int64_t t = 0; t < c.seqlen; ++t) expected_out.set({b, ch, t}, 0);
          continue;
        }
        std::vector<double> inputs;  // (state_len + seqlen), oldest first
        for (int64_t j = 0; j < c.state_len; ++j) {
          inputs.push_back(state_before.real({slot, ch, (next + j) % c.state_len}));
        }
        for (int64_t t = 0; t < c.seqlen; ++t) {
          inputs.push_back(x.real({b, ch, t}));
          double a = bias.real({ch});
          for (int64_t k = 0; k < c.width; ++k) {
            a += weight.real({ch, k}) * inputs[inputs.size() - static_cast<size_t>(c.width - k)];
          }
          expected_out.set({b, ch, t}, silu(a));
        }
        for (int64_t j = 0; j < c.state_len; ++j) {
          const int64_t column = c.ring ? (next + c.seqlen + j) % c.state_len : j;
          expected_state.set({slot, ch, column}, inputs[static_cast<size_t>(c.seqlen + j)]);
        }
      }
    }

    for (const CpuKernels* kernels : tables()) {
      for (const bool one_by_one : {false, true}) {
        CAPTURE(c.what, kernels->isa, one_by_one);
        Array<3> out(c.dtype, {kBatch, kDim, c.seqlen}, c.layout);
        Array<3> state = state_before;
        CausalConv1dUpdateParams p{};
        p.batch = kBatch, p.dim = kDim, p.seqlen = c.seqlen, p.width = c.width;
        p.state_len = c.state_len, p.num_slots = kSlots;
        p.silu = true;
        p.dtype = c.dtype;
        p.x = x.view();
        p.conv_state = state.view();
        p.weight = weight.view();
        p.bias = bias.view();
        p.cache_seqlens = positions.view();
        p.conv_state_indices = slots.view();
        p.out = out.view();
        run_items(causal_conv1d_update_items(p), one_by_one, [&](int64_t begin, int64_t end) {
          kernels->causal_conv1d_update(p, begin, end);
        });
        CHECK(out.error(expected_out) <= tolerance(c.dtype));
        CHECK(out.red_zones_intact());
        CHECK(state.same_bytes(expected_state));
      }
    }
  }
}

TEST_CASE("causal_conv1d_varlen_states", "[causal_conv1d]") {
  constexpr int64_t kTokens = 13, kDim = 9;
  const std::vector<int64_t> starts = {0, 5, 5, 6, 13};
  const auto sequences = static_cast<int64_t>(starts.size()) - 1;
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kFloat64}) {
    for (const int64_t state_len : {0, 1, 3, 8}) {
      std::mt19937_64 random(7);
      Array<2> x = Array<2>(dtype, {kTokens, kDim}, Layout::kSliced).randomize(random);
      Array<1> cu_seqlens(DType::kInt64, {sequences + 1});
      for (int64_t i = 0; i <= sequences; ++i) {
        cu_seqlens.set({i}, static_cast<double>(starts[static_cast<size_t>(i)]));
      }
      Array<3> expected(dtype, {sequences, kDim, state_len}, Layout::kTransposed);
      expected.for_each([&](const std::array<int64_t, 3>& index) {
        const auto [i, ch, j] = index;
        const int64_t t = starts[static_cast<size_t>(i) + 1] - state_len + j;
        expected.set(index, t >= starts[static_cast<size_t>(i)] ? x[{t, ch}] : 0);
      });
      for (const CpuKernels* kernels : tables()) {
        CAPTURE(kernels->isa, dtype, state_len);
        Array<3> states(dtype, {sequences, kDim, state_len}, Layout::kTransposed);
        CausalConv1dVarlenStatesParams p{};
        p.total_tokens = kTokens, p.dim = kDim, p.num_sequences = sequences;
        p.state_len = state_len;
        p.dtype = dtype;
        p.x = x.view();
        p.cu_seqlens = cu_seqlens.view();
        p.states = states.view();
        run_items(causal_conv1d_varlen_states_items(p), true, [&](int64_t begin, int64_t end) {
          kernels->causal_conv1d_varlen_states(p, begin, end);
        });
        CHECK(states.same_bytes(expected));
      }
    }
  }
}

}  // namespace
}  // namespace mamba_ssm::kernels
