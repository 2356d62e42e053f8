// The CPU kernels of ssd_chunk_scan against the definition in ssd_chunk_scan.h, in double.
#include <kernels/packed_sequences.h>

#include <catch2/catch_test_macros.hpp>
#include <string>

#include "arrays.h"

namespace mamba_ssm::kernels {
namespace {

enum class Skip { kNone, kPerHead, kPerChannel };  // D

struct Case {
  std::string what;
  int64_t batch = 2, seqlen = 37, nheads = 4, headdim = 24, ngroups = 2, dstate = 20;
  bool softplus = true, z = true, dt_bias = true;
  Skip D = Skip::kPerHead;
  double dt_min = 0, dt_max = std::numeric_limits<double>::infinity();
  double least_A = -1;            // A is drawn from [least_A, least_A / 8]
  int64_t initial_states = -1;    // their number; -1: one per sequence; 0: absent
  std::vector<int64_t> bounds{};  // cu_seqlens
  DType dtype = DType::kFloat32, dt_dtype = DType::kFloat32, parameter_dtype = DType::kFloat32;
  DType state_dtype = DType::kFloat32;  // of initial_states
  Packing packing = Packing::kNone;
  Layout layout = Layout::kDense;
  // Steps of 0.5 with x = 0, which make sums of d A large, between small ones with large x.
  bool uneven = false;
  bool expanded = false;  // dout with stride 0 over tokens and channels

  int64_t num_sequences() const {
    return bounds.empty() ? batch : static_cast<int64_t>(bounds.size()) - 1;
  }
  int64_t num_initial_states() const {
    return initial_states < 0 ? num_sequences() : initial_states;
  }
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
  for (const int64_t headdim : {1, 16, 33, 80}) {
    add("headdim", [=](Case& c) { c.headdim = headdim; });
  }
  for (const int64_t dstate : {1, 3, 16, 64}) add("dstate", [=](Case& c) { c.dstate = dstate; });
  for (const int64_t seqlen : {1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 150}) {
    add("seqlen", [=](Case& c) { c.seqlen = seqlen; });
  }
  add("large", [](Case& c) { c.headdim = c.dstate = 256, c.nheads = 2; });
  add("one group", [](Case& c) { c.nheads = 7, c.ngroups = 1; });
  add("groups of one head", [](Case& c) { c.ngroups = 4; });
  add("no softplus", [](Case& c) { c.softplus = false; });
  add("no z", [](Case& c) { c.z = false; });
  add("no D", [](Case& c) { c.D = Skip::kNone; });
  add("D per channel", [](Case& c) { c.D = Skip::kPerChannel; });
  add("no dt_bias", [](Case& c) { c.dt_bias = false; });
  add("no initial states", [](Case& c) { c.initial_states = 0; });
  add("nothing optional", [](Case& c) {
    c.z = c.dt_bias = c.softplus = false, c.D = Skip::kNone, c.initial_states = 0;
  });
  add("limits of dt", [](Case& c) { c.dt_min = 0.8, c.dt_max = 1.1; });
  for (const double A : {-16.0, -1e3, -3e38}) {
    add("fast decay", [=](Case& c) { c.least_A = A; });
  }
  add("uneven steps", [](Case& c) {
    c.uneven = true, c.least_A = -1e3, c.softplus = c.dt_bias = false, c.D = Skip::kNone;
  });
  add("growth", [](Case& c) { c.least_A = 0.2; });
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    add("16-bit", [=](Case& c) { c.dtype = c.dt_dtype = dtype; });
    add("16-bit, dt float32", [=](Case& c) { c.dtype = dtype; });
    add("16-bit, states too", [=](Case& c) { c.dtype = c.dt_dtype = c.state_dtype = dtype; });
    add("16-bit parameters", [=](Case& c) { c.parameter_dtype = dtype; });
    add("16-bit, packed",
        [=](Case& c) { c.dtype = c.dt_dtype = dtype, c.packing = Packing::kPadded; });
    add("16-bit, layout",
        [=](Case& c) { c.dtype = c.dt_dtype = dtype, c.layout = Layout::kTransposed; });
  }
  const auto make_float64 = [](Case& c) {
    c.dtype = c.dt_dtype = c.parameter_dtype = c.state_dtype = DType::kFloat64;
  };
  add("float64", make_float64);
  add("float64, long", [=](Case& c) { make_float64(c), c.seqlen = 150, c.headdim = 5; });
  add("float64, packed", [=](Case& c) { make_float64(c), c.packing = Packing::kPadded; });
  for (const Layout layout : {Layout::kTransposed, Layout::kSliced}) {
    add("layout", [=](Case& c) { c.layout = layout; });
    add("layout, packed", [=](Case& c) { c.layout = layout, c.packing = Packing::kPadded; });
  }
  add("expanded dout", [](Case& c) { c.expanded = true; });
  for (const Packing packing : {Packing::kRuns, Packing::kPadded}) {
    add("packed", [=](Case& c) { c.packing = packing; });
    add("packed, long", [=](Case& c) { c.packing = packing, c.seqlen = 150; });
    add("packed, from zero", [=](Case& c) { c.packing = packing, c.initial_states = 0; });
  }
  const auto pack = [](Case& c) { c.batch = 1, c.bounds = {0, 0, 5, 5, 37, 50, 117, 150, 150}; };
  const auto with_bounds = [&](const char* what, auto change) {
    add(what, [&](Case& c) { pack(c), c.seqlen = 150, change(c); });
  };
  with_bounds("cu_seqlens", [](Case&) {});
  with_bounds("cu_seqlens, one initial state", [](Case& c) { c.initial_states = 1; });
  with_bounds("cu_seqlens, no initial states", [](Case& c) { c.initial_states = 0; });
  with_bounds("cu_seqlens and marks", [](Case& c) { c.packing = Packing::kRuns; });
  with_bounds("cu_seqlens, float64", make_float64);
  add("cu_seqlens of nothing", [](Case& c) { c.batch = 1, c.seqlen = 0, c.bounds = {0, 0}; });
  add("no rows", [](Case& c) { c.batch = 0; });
  add("no tokens", [](Case& c) { c.seqlen = 0; });
  add("no heads", [](Case& c) { c.nheads = 0; });
  add("no channels", [](Case& c) { c.headdim = 0; });
  add("no states", [](Case& c) { c.dstate = 0; });
  return all;
}

struct Inputs {
  Array<4> x, z, B, C, dout, initial_states, dfinal_states;
  Array<3> dt;
  Array<1> A, dt_bias, cu_seqlens;
  Array<2> D, seq_idx;
};

/// D as the kernels see it: a number per head has stride 0 over headdim.
View<2> D_view(const Case& c, Array<2>& D) {
  View<2> v = D.view();
  if (c.D == Skip::kPerHead) v.stride[1] = 0;
  return v;
}
Array<2> make_D(const Case& c, DType dtype) {
  if (c.D == Skip::kNone) return {};
  return Array<2>(dtype, {c.nheads, c.D == Skip::kPerHead ? 1 : c.headdim}, c.layout);
}

Inputs make_inputs(const Case& c) {
  std::mt19937_64 random(7);
  Inputs in;
  const DType parameter = c.parameter_dtype;
  const std::array<int64_t, 4> tokens = {c.batch, c.seqlen, c.nheads, c.headdim};
  const std::array<int64_t, 4> matrices = {c.batch, c.seqlen, c.ngroups, c.dstate};
  in.x = Array<4>(c.dtype, tokens, c.layout).randomize(random);
  in.dt = Array<3>(c.dt_dtype, {c.batch, c.seqlen, c.nheads}, c.layout).randomize(random, 0, 0.5);
  if (c.uneven) {
    in.dt.for_each([&](const std::array<int64_t, 3>& i) {
      in.dt.set(i, i[1] % 16 == 3 ? 0.5 : 2e-3 * in.dt[i]);
    });
    in.x.for_each(
        [&](const std::array<int64_t, 4>& i) { in.x.set(i, i[1] % 16 == 3 ? 0 : 1e3 * in.x[i]); });
  }
  in.A = Array<1>(parameter, {c.nheads}, c.layout).randomize(random, c.least_A, c.least_A / 8);
  in.B = Array<4>(c.dtype, matrices, c.layout).randomize(random);
  in.C = Array<4>(c.dtype, matrices, c.layout).randomize(random);
  if (c.z) in.z = Array<4>(c.dtype, tokens, c.layout).randomize(random);
  in.D = make_D(c, parameter);
  in.D.randomize(random);
  if (c.dt_bias) in.dt_bias = Array<1>(parameter, {c.nheads}, c.layout).randomize(random, 0, 0.5);
  if (c.num_initial_states() > 0) {
    in.initial_states =
        Array<4>(c.state_dtype, {c.num_initial_states(), c.nheads, c.headdim, c.dstate}, c.layout)
            .randomize(random);
  }
  in.dout = Array<4>(c.dtype, tokens, c.layout).randomize(random);
  if (c.expanded) {
    const Array<4> source = in.dout;
    in.dout.for_each([&](const std::array<int64_t, 4>& i) {
      in.dout.set(i, source[{i[0], 0, i[2], 0}]);
    });
  }
  in.dfinal_states = Array<4>(accumulate_type(c.dtype),
                              {c.num_sequences(), c.nheads, c.headdim, c.dstate}, c.layout)
                         .randomize(random);
  in.seq_idx = make_seq_idx(c.packing, DType::kInt64, c.batch, c.seqlen);
  if (!c.bounds.empty()) {
    in.cu_seqlens = Array<1>(DType::kInt32, {static_cast<int64_t>(c.bounds.size())}, c.layout);
    in.cu_seqlens.for_each([&](const std::array<int64_t, 1>& i) {
      in.cu_seqlens.set(i, static_cast<double>(c.bounds[static_cast<size_t>(i[0])]));
    });
  }
  return in;
}

std::vector<uint8_t> make_marks(const Case& c, Inputs& in) {
  std::vector<uint8_t> marks(static_cast<size_t>(c.batch * c.seqlen) + 1, kContinue);
  if (in.seq_idx) {
    SequenceMarksParams p{};
    p.batch = c.batch, p.seqlen = c.seqlen;
    p.seq_idx = in.seq_idx.view();
    p.marks = marks.data();
    sequence_marks_cpu(p, 0, c.batch);
  }
  return marks;
}

struct Results {
  Array<4> out, final_states;  // forward
  Array<4> dx, dz, dB, dC, dinitial_states;
  Array<3> ddt;
  Array<1> dA, ddt_bias;
  Array<2> dD;
};

/// Arrays for the results, of the dtypes that the kernels give them, or all float64.
Results make_results(const Case& c, bool float64) {
  const auto type = [&](DType dtype) { return float64 ? DType::kFloat64 : dtype; };
  const DType activation = type(c.dtype), parameter = type(c.parameter_dtype);
  const std::array<int64_t, 4> tokens = {c.batch, c.seqlen, c.nheads, c.headdim};
  const std::array<int64_t, 4> matrices = {c.batch, c.seqlen, c.ngroups, c.dstate};
  Results r;
  r.out = Array<4>(activation, tokens, c.layout);
  r.final_states = Array<4>(type(accumulate_type(c.dtype)),
                            {c.num_sequences(), c.nheads, c.headdim, c.dstate}, c.layout);
  r.dx = Array<4>(activation, tokens, c.layout);
  if (c.z) r.dz = Array<4>(activation, tokens, c.layout);
  r.ddt = Array<3>(type(c.dt_dtype), {c.batch, c.seqlen, c.nheads}, c.layout);
  r.dA = Array<1>(parameter, {c.nheads}, c.layout);
  r.dB = Array<4>(activation, matrices, c.layout);
  r.dC = Array<4>(activation, matrices, c.layout);
  r.dD = make_D(c, parameter);
  if (c.dt_bias) r.ddt_bias = Array<1>(parameter, {c.nheads}, c.layout);
  if (c.num_initial_states() > 0) {
    r.dinitial_states = Array<4>(type(c.state_dtype),
                                 {c.num_initial_states(), c.nheads, c.headdim, c.dstate}, c.layout);
  }
  return r;
}

/// One sequence and head of the reference: tokens [begin, end) of row b.
struct Span {
  int64_t b, begin, end, sequence, head;
};

/// The definition, token by token, and its derivative in reverse.
void reference(const Case& c, const Inputs& in, const std::vector<uint8_t>& marks, Span span,
               Results& r) {
  const int64_t b = span.b, h = span.head, group = h / (c.nheads / c.ngroups);
  const auto mark = [&](int64_t t) { return marks[static_cast<size_t>(b * c.seqlen + t)]; };
  const auto D = [&](int64_t k) {
    return !in.D ? 0 : in.D.real({h, c.D == Skip::kPerHead ? 0 : k});
  };
  const double A = in.A.real({h});
  struct Step {
    double d, slope;
  };
  const auto step = [&](int64_t t) -> Step {
    const double raw = in.dt.real({b, t, h}) + (in.dt_bias ? in.dt_bias.real({h}) : 0);
    const bool curved = c.softplus && raw <= 20;
    const double d = curved ? std::log1p(std::exp(raw)) : raw;
    const double slope = curved ? 1 / (1 + std::exp(-raw)) : 1;
    if (d < c.dt_min) return {c.dt_min, 0};
    if (d > c.dt_max) return {c.dt_max, 0};
    return {d, slope};
  };
  const auto at = [&](int64_t k, int64_t n) { return static_cast<size_t>(k * c.dstate + n); };
  const auto for_each_state = [&](auto f) {
    for (int64_t k = 0; k < c.headdim; ++k) {
      for (int64_t n = 0; n < c.dstate; ++n) f(k, n);
    }
  };
  using State = std::vector<double>;
  const auto states = static_cast<size_t>(c.headdim * c.dstate);
  const bool has_initial = in.initial_states && span.sequence < c.num_initial_states();
  State state(states, 0);
  if (has_initial) {
    for_each_state([&](int64_t k, int64_t n) {
      state[at(k, n)] = in.initial_states.real({span.sequence, h, k, n});
    });
  }
  std::vector<State> history;           // the state that each token starts from
  std::vector<std::vector<double>> ys;  // y of each token
  for (int64_t t = span.begin; t < span.end; ++t) {
    if (mark(t) == kReset) state.assign(states, 0);
    history.push_back(state);
    ys.emplace_back(static_cast<size_t>(c.headdim), 0);
    const double d = step(t).d, decay = std::exp(d * A);
    for (int64_t k = 0; k < c.headdim; ++k) {
      if (mark(t) == kPadding) {
        r.out.set({b, t, h, k}, 0);
        continue;
      }
      const double x = in.x.real({b, t, h, k});
      double y = D(k) * x;
      for (int64_t n = 0; n < c.dstate; ++n) {
        double& s = state[at(k, n)];
        s = decay * s + d * x * in.B.real({b, t, group, n});
        y += s * in.C.real({b, t, group, n});
      }
      ys.back()[static_cast<size_t>(k)] = y;
      r.out.set({b, t, h, k}, in.z ? y * silu(in.z.real({b, t, h, k})) : y);
    }
  }
  State dstate(states);
  for_each_state([&](int64_t k, int64_t n) {
    r.final_states.set({span.sequence, h, k, n}, state[at(k, n)]);
    dstate[at(k, n)] = in.dfinal_states.real({span.sequence, h, k, n});
  });

  for (int64_t t = span.end; t-- > span.begin;) {
    const auto i = static_cast<size_t>(t - span.begin);
    if (mark(t) == kPadding) {
      r.ddt.set({b, t, h}, 0);
      for (int64_t k = 0; k < c.headdim; ++k) {
        r.dx.set({b, t, h, k}, 0);
        if (in.z) r.dz.set({b, t, h, k}, 0);
      }
      continue;
    }
    const Step s = step(t);
    const double decay = std::exp(s.d * A);
    double dd = 0, dexponent = 0;  // gradients of d as a factor of x, and of d A
    for (int64_t k = 0; k < c.headdim; ++k) {
      const double x = in.x.real({b, t, h, k});
      double dy = in.dout.real({b, t, h, k});
      if (in.z) {
        const double z = in.z.real({b, t, h, k});
        r.dz.set({b, t, h, k}, dy * ys[i][static_cast<size_t>(k)] * silu_derivative(z));
        dy *= silu(z);
      }
      if (in.D) r.dD.add({h, c.D == Skip::kPerHead ? 0 : k}, dy * x);
      double du = 0;
      for (int64_t n = 0; n < c.dstate; ++n) {
        const double B = in.B.real({b, t, group, n}), before = history[i][at(k, n)];
        double& ds = dstate[at(k, n)];
        r.dC.add({b, t, group, n}, dy * (decay * before + s.d * x * B));
        ds += dy * in.C.real({b, t, group, n});
        r.dB.add({b, t, group, n}, s.d * x * ds);
        du += B * ds;
        dexponent += ds * decay * before;
        ds = mark(t) == kReset ? 0 : decay * ds;
      }
      dd += x * du;
      r.dx.set({b, t, h, k}, s.d * du + D(k) * dy);
    }
    r.dA.add({h}, s.d * dexponent);
    const double ddt = (dd + A * dexponent) * s.slope;
    r.ddt.set({b, t, h}, ddt);
    if (in.dt_bias) r.ddt_bias.add({h}, ddt);
  }
  if (has_initial) {
    for_each_state([&](int64_t k, int64_t n) {
      r.dinitial_states.set({span.sequence, h, k, n}, dstate[at(k, n)]);
    });
  }
}

Results reference(const Case& c, Inputs& in) {
  Results r = make_results(c, /*float64=*/true);
  r.dA.fill(0);
  r.dB.fill(0);
  r.dC.fill(0);
  r.dD.fill(0);
  r.ddt_bias.fill(0);
  const std::vector<uint8_t> marks = make_marks(c, in);
  for (int64_t s = 0; s < c.num_sequences(); ++s) {
    for (int64_t h = 0; h < c.nheads; ++h) {
      const auto i = static_cast<size_t>(s);
      reference(c, in, marks,
                c.bounds.empty() ? Span{s, 0, c.seqlen, s, h}
                                 : Span{0, c.bounds[i], c.bounds[i + 1], s, h},
                r);
    }
  }
  return r;
}

Results run(const CpuKernels& kernels, const Case& c, Inputs& in, bool one_by_one) {
  Results r = make_results(c, /*float64=*/false);
  const std::vector<uint8_t> marks = make_marks(c, in);
  SsdChunkScanParams p{};
  p.batch = c.batch;
  p.seqlen = c.seqlen;
  p.nheads = c.nheads;
  p.headdim = c.headdim;
  p.ngroups = c.ngroups;
  p.dstate = c.dstate;
  p.num_sequences = c.num_sequences();
  p.num_initial_states = c.num_initial_states();
  p.dt_softplus = c.softplus;
  p.D_per_channel = c.D == Skip::kPerChannel;
  p.dt_min = c.dt_min;
  p.dt_max = c.dt_max;
  p.dtype = c.dtype;
  p.x = in.x.view();
  p.z = in.z.view();
  p.dt = in.dt.view();
  p.A = in.A.view();
  p.B = in.B.view();
  p.C = in.C.view();
  p.D = D_view(c, in.D);
  p.dt_bias = in.dt_bias.view();
  p.initial_states = in.initial_states.view();
  p.marks = in.seq_idx ? marks.data() : nullptr;
  p.cu_seqlens = in.cu_seqlens.view();
  p.out = r.out.view();
  p.final_states = r.final_states.view();
  run_items(ssd_chunk_scan_fwd_items(p), one_by_one,
            [&](int64_t begin, int64_t end) { kernels.ssd_chunk_scan_fwd(p, begin, end); });

  p.out = {};
  p.final_states = {};
  p.dout = in.dout.view();
  if (c.expanded) p.dout.stride[1] = p.dout.stride[3] = 0;
  p.dfinal_states = in.dfinal_states.view();
  p.dx = r.dx.view();
  p.dz = r.dz.view();
  p.ddt = r.ddt.view();
  p.dA = r.dA.view();
  p.dB = r.dB.view();
  p.dC = r.dC.view();
  p.dD = D_view(c, r.dD);
  p.ddt_bias = r.ddt_bias.view();
  p.dinitial_states = r.dinitial_states.view();
  const DType sum_type = accumulate_type(c.dtype);
  const size_t bytes = ssd_chunk_scan_bwd_cpu_workspace(p);
  Array<1> workspace(sum_type, {static_cast<int64_t>(bytes / size_of(sum_type))});
  run_items(ssd_chunk_scan_bwd_items(p), one_by_one, [&](int64_t begin, int64_t end) {
    kernels.ssd_chunk_scan_bwd(p, workspace.view().data, begin, end);
  });
  run_items(ssd_chunk_scan_bwd_reduce_items(p), one_by_one, [&](int64_t begin, int64_t end) {
    kernels.ssd_chunk_scan_bwd_reduce(p, workspace.view().data, begin, end);
  });
  CHECK(workspace.red_zones_intact());
  return r;
}

template <class F>
void for_each_result(const Results& a, const Results& b, F f) {
  f("out", a.out, b.out);
  f("final_states", a.final_states, b.final_states);
  f("dx", a.dx, b.dx);
  f("dz", a.dz, b.dz);
  f("ddt", a.ddt, b.ddt);
  f("dA", a.dA, b.dA);
  f("dB", a.dB, b.dB);
  f("dC", a.dC, b.dC);
  f("dD", a.dD, b.dD);
  f("ddt_bias", a.ddt_bias, b.ddt_bias);
  f("dinitial_states", a.dinitial_states, b.dinitial_states);
}

TEST_CASE("ssd_chunk_scan, forward and backward", "[ssd_chunk_scan]") {
  for (const Case& c : cases()) {
    Inputs in = make_inputs(c);
    const Results expected = reference(c, in);
    for (const CpuKernels* kernels : tables()) {
      CAPTURE(c.what, kernels->isa, c.seqlen, c.headdim, c.dstate, c.least_A, c.dtype, c.layout,
              c.packing);
      const Results together = run(*kernels, c, in, /*one_by_one=*/false);
      const Results apart = run(*kernels, c, in, /*one_by_one=*/true);
      for_each_result(together, expected, [&](const char* name, auto& actual, auto& wanted) {
        CAPTURE(name);
        CHECK(actual.error(wanted) <=
              std::max({tolerance(c.dtype), tolerance(c.dt_dtype), tolerance(c.parameter_dtype),
                        tolerance(c.state_dtype)}));
        CHECK(actual.red_zones_intact());
      });
      for_each_result(together, apart, [&](const char* name, auto& one, auto& other) {
        CAPTURE(name);
        CHECK(one.same_bytes(other));
      });
    }
  }
}

/// Tokens [begin, end) of an array (batch, seqlen, ...).
template <int kRank>
Array<kRank> tokens_of(const Array<kRank>& whole, DType dtype, int64_t begin, int64_t end) {
  auto shape = whole.shape();
  shape[1] = end - begin;
  Array<kRank> part(dtype, shape);
  part.for_each([&](std::array<int64_t, kRank> i) {
    const auto to = i;
    i[1] += begin;
    part.set(to, whole[i]);
  });
  return part;
}

template <int kRank>
bool equal(const Array<kRank>& a, const Array<kRank>& b) {
  bool same = true;
  a.for_each([&](const std::array<int64_t, kRank>& i) { same = same && a[i] == b[i]; });
  return same;
}

// So long that the backward cannot keep all states of the whole, but all of each part.
TEST_CASE("ssd_chunk_scan, a sequence in two parts", "[ssd_chunk_scan]") {
  Case c;
  c.batch = 1, c.seqlen = 5120, c.nheads = 4, c.headdim = 64, c.ngroups = 1, c.dstate = 128;
  Inputs in = make_inputs(c);
  const auto part_of = [&](int64_t begin, int64_t end) {
    Inputs part = in;
    for (Array<4> Inputs::*tensor :
         {&Inputs::x, &Inputs::z, &Inputs::B, &Inputs::C, &Inputs::dout}) {
      part.*tensor = tokens_of(in.*tensor, c.dtype, begin, end);
    }
    part.dt = tokens_of(in.dt, c.dtype, begin, end);
    return part;
  };
  const int64_t middle = c.seqlen / 2;
  Case half = c;
  half.seqlen = middle;
  for (const CpuKernels* kernels : tables()) {
    CAPTURE(kernels->isa);
    const Results whole = run(*kernels, c, in, /*one_by_one=*/false);
    Inputs first = part_of(0, middle), second = part_of(middle, c.seqlen);
    second.initial_states = run(*kernels, half, first, /*one_by_one=*/false).final_states;
    const Results b = run(*kernels, half, second, /*one_by_one=*/false);
    first.dfinal_states = b.dinitial_states;
    const Results a = run(*kernels, half, first, /*one_by_one=*/false);
    const auto check = [&](const char* name, const auto& all, const auto& early, const auto& late) {
      CAPTURE(name);
      CHECK(equal(tokens_of(all, c.dtype, 0, middle), early));
      CHECK(equal(tokens_of(all, c.dtype, middle, c.seqlen), late));
    };
    check("out", whole.out, a.out, b.out);
    check("dx", whole.dx, a.dx, b.dx);
    check("dz", whole.dz, a.dz, b.dz);
    check("ddt", whole.ddt, a.ddt, b.ddt);
    check("dB", whole.dB, a.dB, b.dB);
    check("dC", whole.dC, a.dC, b.dC);
    CHECK(equal(whole.final_states, b.final_states));
    CHECK(equal(whole.dinitial_states, a.dinitial_states));
  }
}

}  // namespace
}  // namespace mamba_ssm::kernels
