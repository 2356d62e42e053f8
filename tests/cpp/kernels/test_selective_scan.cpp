// The CPU kernels of selective_scan against the definition in selective_scan.h, in double.
#include <kernels/packed_sequences.h>
#include <mamba_ssm/limits.h>

#include <catch2/catch_test_macros.hpp>
#include <string>

#include "arrays.h"

namespace mamba_ssm::kernels {
namespace {

struct Case {
  std::string what;
  int64_t batch = 2, dim = 24, seqlen = 37, dstate = 8;
  int64_t groups_B = 1, groups_C = 1;
  bool constant_B = false, constant_C = false;
  bool complex_A = false, softplus = true;
  bool D = true, z = true, delta_bias = true, initial_state = true;
  DType dtype = DType::kFloat32, parameter_dtype = DType::kFloat32;
  DType state_dtype = DType::kFloat32;  // of initial_state
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
  for (const int64_t dstate : {1, 3, 16, 33}) add("dstate", [=](Case& c) { c.dstate = dstate; });
  for (const int64_t dim : {1, 5, 70}) add("dim", [=](Case& c) { c.dim = dim; });
  for (const int64_t seqlen : {1, 31, 32, 33, 150}) {
    add("seqlen", [=](Case& c) { c.seqlen = seqlen; });
  }
  add("groups", [](Case& c) { c.groups_B = 3, c.groups_C = 3; });
  add("groups of different sizes", [](Case& c) { c.groups_B = 4, c.groups_C = 6; });
  add("constant B", [](Case& c) { c.constant_B = true; });
  add("constant C", [](Case& c) { c.constant_C = true, c.groups_B = 2; });
  add("constant B and C", [](Case& c) { c.constant_B = c.constant_C = true; });
  add("complex", [](Case& c) { c.complex_A = true; });
  add("complex, groups", [](Case& c) { c.complex_A = true, c.groups_B = 2, c.groups_C = 4; });
  add("complex, constant B", [](Case& c) { c.complex_A = c.constant_B = true; });
  add("complex, constant B and C",
      [](Case& c) { c.complex_A = c.constant_B = c.constant_C = true; });
  add("complex, packed", [](Case& c) { c.complex_A = true, c.packing = Packing::kPadded; });
  add("no softplus", [](Case& c) { c.softplus = false; });
  add("no D", [](Case& c) { c.D = false; });
  add("no z", [](Case& c) { c.z = false; });
  add("no delta_bias", [](Case& c) { c.delta_bias = false; });
  add("no initial state", [](Case& c) { c.initial_state = false; });
  add("nothing optional",
      [](Case& c) { c.D = c.z = c.delta_bias = c.initial_state = c.softplus = false; });
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    add("16-bit", [=](Case& c) { c.dtype = dtype; });
    add("16-bit, state too", [=](Case& c) { c.dtype = c.state_dtype = dtype; });
    add("16-bit parameters", [=](Case& c) { c.parameter_dtype = dtype; });
    add("16-bit, packed", [=](Case& c) { c.dtype = dtype, c.packing = Packing::kRuns; });
  }
  const auto make_float64 = [](Case& c) {
    c.dtype = c.parameter_dtype = c.state_dtype = DType::kFloat64;
  };
  add("float64", make_float64);
  add("float64, complex", [=](Case& c) { make_float64(c), c.complex_A = true; });
  for (const Layout layout : {Layout::kTransposed, Layout::kSliced}) {
    add("layout", [=](Case& c) { c.layout = layout; });
    add("layout, packed", [=](Case& c) { c.layout = layout, c.packing = Packing::kPadded; });
    add("layout, constant B", [=](Case& c) { c.layout = layout, c.constant_B = true; });
  }
  for (const Packing packing : {Packing::kRuns, Packing::kPadded}) {
    add("packed", [=](Case& c) { c.packing = packing; });
    add("packed, long", [=](Case& c) { c.packing = packing, c.seqlen = 150; });
    add("packed, from zero", [=](Case& c) { c.packing = packing, c.initial_state = false; });
  }
  add("no rows", [](Case& c) { c.batch = 0; });
  add("no channels", [](Case& c) { c.dim = 0; });
  add("no tokens", [](Case& c) { c.seqlen = 0; });
  add("no states", [](Case& c) { c.dstate = 0; });
  return all;
}

/// B or C: per time (batch, groups, dstate, seqlen), or constant (dim, dstate).
struct Matrix {
  Array<4> per_time;
  Array<2> constant;
  int64_t channels_per_group = 1;

  Matrix() = default;
  Matrix(const Case& c, bool is_constant, int64_t groups, DType dtype, DType parameter_dtype)
      : channels_per_group(std::max<int64_t>(c.dim / groups, 1)) {
    if (is_constant) {
      constant = Array<2>(parameter_dtype, {c.dim, c.dstate}, c.layout, c.complex_A);
    } else {
      per_time = Array<4>(dtype, {c.batch, groups, c.dstate, c.seqlen}, c.layout, c.complex_A);
    }
  }

  Matrix& randomize(std::mt19937_64& random) {
    constant ? void(constant.randomize(random)) : void(per_time.randomize(random));
    return *this;
  }

  Matrix& fill(Number x) {
    constant ? void(constant.fill(x)) : void(per_time.fill(x));
    return *this;
  }

  View<4> view() {
    if (!constant) return per_time.view();
    const View<2> v = constant.view();
    return {v.data, v.dtype, {0, v.stride[0], v.stride[1], 0}, v.imag};
  }

  Number get(int64_t b, int64_t channel, int64_t n, int64_t t) const {
    return constant ? constant[{channel, n}] : per_time[{b, channel / channels_per_group, n, t}];
  }

  void add(int64_t b, int64_t channel, int64_t n, int64_t t, Number x) {
    constant ? constant.add({channel, n}, x)
             : per_time.add({b, channel / channels_per_group, n, t}, x);
  }

  double error(const Matrix& expected) const {
    return constant ? constant.error(expected.constant) : per_time.error(expected.per_time);
  }

  bool red_zones_intact() const {
    return constant ? constant.red_zones_intact() : per_time.red_zones_intact();
  }

  bool same_bytes(const Matrix& other) const {
    return constant.same_bytes(other.constant) && per_time.same_bytes(other.per_time);
  }
};

struct Inputs {
  Array<3> u, delta, z, dout;
  Array<2> A, seq_idx;
  Matrix B, C;
  Array<1> D, delta_bias;
  Array<3> initial_state, dlast_state;
};

Inputs make_inputs(const Case& c) {
  std::mt19937_64 random(7);
  Inputs in;
  const DType parameter = c.parameter_dtype;
  const std::array<int64_t, 3> tokens = {c.batch, c.dim, c.seqlen};
  const std::array<int64_t, 3> states = {c.batch, c.dim, c.dstate};
  in.u = Array<3>(c.dtype, tokens, c.layout).randomize(random);
  in.delta = Array<3>(c.dtype, tokens, c.layout).randomize(random, 0, 0.5);
  in.dout = Array<3>(c.dtype, tokens, c.layout).randomize(random);
  in.A = Array<2>(parameter, {c.dim, c.dstate}, c.layout, c.complex_A);
  in.A.randomize(random);
  in.A.for_each([&](const std::array<int64_t, 2>& i) {  // decays: a negative real part
    in.A.set(i, {-0.1 - std::abs(in.A[i].real()), 3 * in.A[i].imag()});
  });
  in.B = Matrix(c, c.constant_B, c.groups_B, c.dtype, parameter).randomize(random);
  in.C = Matrix(c, c.constant_C, c.groups_C, c.dtype, parameter).randomize(random);
  if (c.z) in.z = Array<3>(c.dtype, tokens, c.layout).randomize(random);
  if (c.D) in.D = Array<1>(parameter, {c.dim}, c.layout).randomize(random);
  if (c.delta_bias)
    in.delta_bias = Array<1>(parameter, {c.dim}, c.layout).randomize(random, 0, 0.5);
  if (c.initial_state) {
    in.initial_state = Array<3>(c.state_dtype, states, c.layout, c.complex_A).randomize(random);
  }
  in.dlast_state =
      Array<3>(accumulate_type(c.dtype), states, c.layout, c.complex_A).randomize(random);
  in.seq_idx = make_seq_idx(c.packing, DType::kInt64, c.batch, c.seqlen);
  return in;
}

struct Results {
  Array<3> out, last_state;  // forward
  Array<3> du, ddelta, dz, dinitial_state;
  Array<2> dA;
  Matrix dB, dC;
  Array<1> dD, ddelta_bias;
};

/// Arrays for the results, of the dtypes that the kernels give them, or all float64.
Results make_results(const Case& c, bool float64) {
  const auto type = [&](DType dtype) { return float64 ? DType::kFloat64 : dtype; };
  const DType activation = type(c.dtype), parameter = type(c.parameter_dtype);
  const std::array<int64_t, 3> tokens = {c.batch, c.dim, c.seqlen};
  const std::array<int64_t, 3> states = {c.batch, c.dim, c.dstate};
  Results r;
  r.out = Array<3>(activation, tokens, c.layout);
  r.last_state = Array<3>(type(accumulate_type(c.dtype)), states, c.layout, c.complex_A);
  r.du = Array<3>(activation, tokens, c.layout);
  r.ddelta = Array<3>(activation, tokens, c.layout);
  if (c.z) r.dz = Array<3>(activation, tokens, c.layout);
  if (c.initial_state) {
    r.dinitial_state = Array<3>(type(c.state_dtype), states, c.layout, c.complex_A);
  }
  r.dA = Array<2>(parameter, {c.dim, c.dstate}, c.layout, c.complex_A);
  r.dB = Matrix(c, c.constant_B, c.groups_B, activation, parameter);
  r.dC = Matrix(c, c.constant_C, c.groups_C, activation, parameter);
  if (c.D) r.dD = Array<1>(parameter, {c.dim}, c.layout);
  if (c.delta_bias) r.ddelta_bias = Array<1>(parameter, {c.dim}, c.layout);
  return r;
}

/// The definition, token by token, and its derivative in reverse. Gradients of complex numbers are
/// dL/dRe + i dL/dIm: that of a in w = a b is conj(b) times that of w.
Results reference(const Case& c, const Inputs& in) {
  Results r = make_results(c, /*float64=*/true);
  r.dA.fill(0);
  r.dB.fill(0);
  r.dC.fill(0);
  r.dD.fill(0);
  r.ddelta_bias.fill(0);
  const double fold = c.complex_A ? 2 : 1;  // a complex state stands for a conjugate pair
  using States = std::vector<Number>;
  const auto dstate = static_cast<size_t>(c.dstate);
  for (int64_t b = 0; b < c.batch; ++b) {
    // What the token does to the state before it.
    std::vector<SequenceMark> marks;
    double id = -1;
    for (int64_t t = 0; t < c.seqlen; ++t) {
      const double own = in.seq_idx ? in.seq_idx.real({b, t}) : 0;
      marks.push_back(own < 0 ? kPadding : id >= 0 && own != id ? kReset : kContinue);
      if (own >= 0) id = own;
    }
    for (int64_t ch = 0; ch < c.dim; ++ch) {
      const double D = in.D ? in.D.real({ch}) : 0;
      const auto raw_delta = [&](int64_t t) {
        return in.delta.real({b, ch, t}) + (in.delta_bias ? in.delta_bias.real({ch}) : 0);
      };
      const auto step = [&](int64_t t) {
        const double raw = raw_delta(t);
        return c.softplus && raw <= 20 ? std::log1p(std::exp(raw)) : raw;
      };
      States h(dstate);
      for (size_t n = 0; n < dstate && in.initial_state; ++n) {
        h[n] = in.initial_state[{b, ch, static_cast<int64_t>(n)}];
      }
      std::vector<States> history;  // the state that each token starts from
      std::vector<double> ys;
      for (int64_t t = 0; t < c.seqlen; ++t) {
        const SequenceMark mark = marks[static_cast<size_t>(t)];
        if (mark == kReset) h.assign(dstate, 0);
        history.push_back(h);
        ys.push_back(0);
        if (mark == kPadding) {
          r.out.set({b, ch, t}, 0);
          continue;
        }
        const double d = step(t), u = in.u.real({b, ch, t});
        double y = D * u;
        for (size_t n = 0; n < dstate; ++n) {
          const auto m = static_cast<int64_t>(n);
          h[n] = std::exp(d * in.A[{ch, m}]) * h[n] + d * u * in.B.get(b, ch, m, t);
          y += fold * (in.C.get(b, ch, m, t) * h[n]).real();
        }
        ys.back() = y;
        r.out.set({b, ch, t}, in.z ? y * silu(in.z.real({b, ch, t})) : y);
      }
      States dh(dstate);
      for (size_t n = 0; n < dstate; ++n) {
        const auto m = static_cast<int64_t>(n);
        r.last_state.set({b, ch, m}, h[n]);
        dh[n] = in.dlast_state[{b, ch, m}];
      }

      for (int64_t t = c.seqlen; t-- > 0;) {
        const SequenceMark mark = marks[static_cast<size_t>(t)];
        const States& before = history[static_cast<size_t>(t)];
        if (mark == kPadding) {
          r.du.set({b, ch, t}, 0);
          r.ddelta.set({b, ch, t}, 0);
          if (in.z) r.dz.set({b, ch, t}, 0);
          continue;
        }
        const double d = step(t), u = in.u.real({b, ch, t});
        double dy = in.dout.real({b, ch, t});
        if (in.z) {
          const double z = in.z.real({b, ch, t});
          r.dz.set({b, ch, t}, dy * ys[static_cast<size_t>(t)] * silu_derivative(z));
          dy *= silu(z);
        }
        double du = D * dy, dd = 0;
        if (in.D) r.dD.add({ch}, dy * u);
        for (size_t n = 0; n < dstate; ++n) {
          const auto m = static_cast<int64_t>(n);
          const Number A = in.A[{ch, m}], B = in.B.get(b, ch, m, t), C = in.C.get(b, ch, m, t);
          const Number decay = std::exp(d * A);
          const Number state = decay * before[n] + d * u * B;
          r.dC.add(b, ch, m, t, fold * dy * std::conj(state));
          dh[n] += fold * dy * std::conj(C);
          r.dB.add(b, ch, m, t, d * u * dh[n]);
          const double input = (std::conj(B) * dh[n]).real();
          du += d * input;
          const Number exponent = std::conj(decay * before[n]) * dh[n];  // gradient of d * A
          dd += u * input + (std::conj(A) * exponent).real();
          r.dA.add({ch, m}, d * exponent);
          dh[n] = mark == kReset ? 0 : std::conj(decay) * dh[n];
        }
        const double raw = raw_delta(t);
        if (c.softplus && raw <= 20) dd /= 1 + std::exp(-raw);
        r.du.set({b, ch, t}, du);
        r.ddelta.set({b, ch, t}, dd);
        if (in.delta_bias) r.ddelta_bias.add({ch}, dd);
      }
      for (size_t n = 0; n < dstate && in.initial_state; ++n) {
        r.dinitial_state.set({b, ch, static_cast<int64_t>(n)}, dh[n]);
      }
    }
  }
  return r;
}

Results run(const CpuKernels& kernels, const Case& c, Inputs& in, bool one_by_one) {
  Results r = make_results(c, /*float64=*/false);
  std::vector<uint8_t> marks(static_cast<size_t>(c.batch * c.seqlen) + 1);
  if (in.seq_idx) {
    SequenceMarksParams p{};
    p.batch = c.batch, p.seqlen = c.seqlen;
    p.seq_idx = in.seq_idx.view();
    p.marks = marks.data();
    sequence_marks_cpu(p, 0, c.batch);
  }
  const DType state_type = accumulate_type(c.dtype);
  const int64_t chunks = (c.seqlen + kSelectiveScanChunk - 1) / kSelectiveScanChunk;
  Array<1> states(state_type, {c.batch * chunks * c.dim * c.dstate * (c.complex_A ? 2 : 1)});

  SelectiveScanParams p{};
  p.batch = c.batch, p.dim = c.dim, p.seqlen = c.seqlen, p.dstate = c.dstate;
  p.groups_B = c.constant_B ? c.dim : c.groups_B;
  p.groups_C = c.constant_C ? c.dim : c.groups_C;
  p.constant_B = c.constant_B;
  p.constant_C = c.constant_C;
  p.complex_A = c.complex_A;
  p.delta_softplus = c.softplus;
  p.dtype = c.dtype;
  p.u = in.u.view();
  p.delta = in.delta.view();
  p.z = in.z.view();
  p.A = in.A.view();
  p.B = in.B.view();
  p.C = in.C.view();
  p.D = in.D.view();
  p.delta_bias = in.delta_bias.view();
  p.initial_state = in.initial_state.view();
  p.marks = in.seq_idx ? marks.data() : nullptr;
  p.out = r.out.view();
  p.last_state = r.last_state.view();
  p.states = states.view().data;
  run_items(selective_scan_fwd_items(p), one_by_one,
            [&](int64_t begin, int64_t end) { kernels.selective_scan_fwd(p, begin, end); });
  CHECK(states.red_zones_intact());

  p.out = {};
  p.last_state = {};
  p.dout = in.dout.view();
  p.dlast_state = in.dlast_state.view();
  p.du = r.du.view();
  p.ddelta = r.ddelta.view();
  p.dz = r.dz.view();
  p.dA = r.dA.view();
  p.dB = r.dB.view();
  p.dC = r.dC.view();
  p.dD = r.dD.view();
  p.ddelta_bias = r.ddelta_bias.view();
  p.dinitial_state = r.dinitial_state.view();
  const size_t bytes = selective_scan_bwd_cpu_workspace(p);
  Array<1> workspace(state_type, {static_cast<int64_t>(bytes / size_of(state_type))});
  run_items(selective_scan_bwd_items(p), one_by_one, [&](int64_t begin, int64_t end) {
    kernels.selective_scan_bwd(p, workspace.view().data, begin, end);
  });
  run_items(selective_scan_bwd_reduce_items(p), one_by_one, [&](int64_t begin, int64_t end) {
    kernels.selective_scan_bwd_reduce(p, workspace.view().data, begin, end);
  });
  CHECK(workspace.red_zones_intact());
  return r;
}

template <class F>
void for_each_result(const Results& a, const Results& b, F f) {
  f("out", a.out, b.out);
  f("last_state", a.last_state, b.last_state);
  f("du", a.du, b.du);
  f("ddelta", a.ddelta, b.ddelta);
  f("dz", a.dz, b.dz);
  f("dA", a.dA, b.dA);
  f("dB", a.dB, b.dB);
  f("dC", a.dC, b.dC);
  f("dD", a.dD, b.dD);
  f("ddelta_bias", a.ddelta_bias, b.ddelta_bias);
  f("dinitial_state", a.dinitial_state, b.dinitial_state);
}

TEST_CASE("selective_scan, forward and backward", "[selective_scan]") {
  for (const Case& c : cases()) {
    Inputs in = make_inputs(c);
    const Results expected = reference(c, in);
    for (const CpuKernels* kernels : tables()) {
      CAPTURE(c.what, kernels->isa, c.dim, c.seqlen, c.dstate, c.dtype, c.layout, c.packing);
      const Results together = run(*kernels, c, in, /*one_by_one=*/false);
      const Results apart = run(*kernels, c, in, /*one_by_one=*/true);
      for_each_result(together, expected, [&](const char* name, auto& actual, auto& wanted) {
        CAPTURE(name);
        CHECK(actual.error(wanted) <= std::max({tolerance(c.dtype), tolerance(c.parameter_dtype),
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

TEST_CASE("sequence marks", "[selective_scan]") {
  const std::vector<int> ids = {-1, 4, 4, -2, 4, 9, -1, 2, 2};
  const std::vector<uint8_t> expected = {kPadding, kContinue, kContinue, kPadding, kContinue,
                                         kReset,   kPadding,  kReset,    kContinue};
  const auto seqlen = static_cast<int64_t>(ids.size());
  for (const DType dtype : {DType::kInt32, DType::kInt64}) {
    Array<2> seq_idx(dtype, {2, seqlen}, Layout::kSliced);
    for (int64_t t = 0; t < seqlen; ++t) {
      seq_idx.set({0, t}, ids[static_cast<size_t>(t)]);
      seq_idx.set({1, t}, 5);
    }
    std::vector<uint8_t> marks(2 * ids.size(), 0xff);
    SequenceMarksParams p{};
    p.batch = 2, p.seqlen = seqlen;
    p.seq_idx = seq_idx.view();
    p.marks = marks.data();
    sequence_marks_cpu(p, 0, 2);
    CHECK(std::vector<uint8_t>(marks.begin(), marks.begin() + seqlen) == expected);
    CHECK(std::count(marks.begin() + seqlen, marks.end(), kContinue) == seqlen);
  }
}

}  // namespace
}  // namespace mamba_ssm::kernels
