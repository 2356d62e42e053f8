// Selective scan on CPU, forward and backward.
//
// The forward is the recurrence of selective_scan.h. With g_t = exp(d_t A) dh_t, the gradient of
// h_{t-1}, and q_t = g_t h_{t-1}, the one of d_t A, the backward is
//
//   dh_t     = g_{t+1} + C_t dy_t         dC_t  = dy_t h_t           dB_t = d_t u_t dh_t
//   ddelta_t = softplus' sum_n (u_t B_t dh_t + A q_t)                dA   = sum_t d_t q_t
//   du_t     = d_t sum_n B_t dh_t + D dy_t                           dD   = sum_t u_t dy_t
//
// with dy_t = dout_t silu(z_t), and with conjugates where torch has them if A is complex.
//
// Layout: a vector holds one quantity of kWidth consecutive channels, so that only the sums of dB
// and dC over channels cross its lanes. float32 and 16-bit types with real A use vectors of
// float32; float64 and complex A run the same code with vectors of one lane.
//
// Schedule: a unit of channels walks its row in tiles of kTile tokens, the distance between two of
// the states kept for the backward. A tile is loaded (u, delta, z transposed to (token, channel);
// softplus), scanned and stored (gate; transposed back). B and C are transposed to (token, state)
// once for all channels of the unit; kScanStates states at a time go over the tokens of the tile in
// registers. The backward goes from the last tile to the first: it scans a tile again from its kept
// state, leaving all h_t and decays in scratch, and sweeps back over them.
#include "selective_scan_cpu.h"

#include <cmath>

#include "cpu.h"
#include "mamba_ssm/limits.h"
#include "packed_sequences.h"
#include "simd.h"

namespace mamba_ssm::kernels::MAMBA_SSM_ISA {
namespace {

constexpr int kTile = static_cast<int>(kSelectiveScanChunk);
static_assert(kTile % kLanes == 0 && kScanUnit % kLanes == 0);

// ---- Arithmetic of one lane or of a vector of them

template <class S>
struct Complex {
  S re, im;
};

template <class S>
inline Complex<S> operator+(Complex<S> a, Complex<S> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class S>
inline Complex<S> operator*(Complex<S> a, Complex<S> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class S>
inline Complex<S> operator*(S a, Complex<S> b) {
  return {a * b.re, a * b.im};
}

/// a conj(b)
template <class V>
inline V times_conj(V a, V b) {
  return a * b;
}
template <class S>
inline Complex<S> times_conj(Complex<S> a, Complex<S> b) {
  return {a.re * b.re + a.im * b.im, a.im * b.re - a.re * b.im};
}

/// Re(a conj(b))
template <class V>
inline V inner(V a, V b) {
  return a * b;
}
template <class S>
inline S inner(Complex<S> a, Complex<S> b) {
  return a.re * b.re + a.im * b.im;
}

/// What a state adds to y: C h, complex 2 Re(C h).
template <class V>
inline V readout(V C, V h) {
  return C * h;
}
template <class S>
inline S readout(Complex<S> C, Complex<S> h) {
  return S(2) * (C.re * h.re - C.im * h.im);
}
/// The gradient of readout(C, h) with respect to h; to C with h in its place.
template <class V>
inline V readout_gradient(V dy, V C) {
  return dy * C;
}
template <class S>
inline Complex<S> readout_gradient(S dy, Complex<S> C) {
  return {S(2) * dy * C.re, S(-2) * dy * C.im};
}

template <class V>
struct ElementOf {
  using type = V;
};
template <>
struct ElementOf<VecF> {
  using type = float;
};
template <class V>
using Element = typename ElementOf<V>::type;

/// Lanes of V.
template <class V>
constexpr int kWidth = sizeof(V) / sizeof(Element<V>);

/// The real type an element is made of.
template <class E>
struct ScalarOf {
  using type = E;
};
template <class S>
struct ScalarOf<Complex<S>> {
  using type = S;
};
template <class E>
using Scalar = typename ScalarOf<E>::type;

/// 1, complex 2.
template <class E>
constexpr int kParts = sizeof(E) / sizeof(Scalar<E>);

template <class V>
inline V load_lanes(const Element<V>* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
inline void store_lanes(Element<V>* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
template <class V>
inline V in_all_lanes(Element<V> x) {
  if constexpr (kWidth<V> == 1) {
    return x;
  } else {
    return x - V{};  // exact for any x, so that it costs nothing but the broadcast
  }
}

using MAMBA_SSM_ISA::softplus;  // of vectors
inline float softplus(float x) { return x <= 20 ? ::log1pf(::expf(x)) : x; }
inline double softplus(double x) { return x <= 20 ? ::log1p(::exp(x)) : x; }

/// sigmoid(x) and 1 - sigmoid(x), each with a small relative error at any x.
template <class Real>
struct Sigmoid {
  Real s, complement;
};
inline Sigmoid<VecF> sigmoid_of(VecF x) {
  const VecF w = exp_negative(negative_abs(x));
  const VecF larger = 1.0f / (1.0f + w);
  const VecF smaller = select(x != x, x, w * larger);
  return {select(x > 0.0f, larger, smaller), select(x > 0.0f, smaller, larger)};
}
inline Sigmoid<float> sigmoid_of(float x) { return {1 / (1 + ::expf(-x)), 1 / (1 + ::expf(x))}; }
inline Sigmoid<double> sigmoid_of(double x) { return {1 / (1 + ::exp(-x)), 1 / (1 + ::exp(x))}; }

inline VecF softplus_slope(VecF x) { return select(x > 20.0f, broadcast(1.0f), sigmoid_of(x).s); }
template <class S>
inline S softplus_slope(S x) {
  return x > 20 ? S(1) : sigmoid_of(x).s;
}

// exp(d A) is computed from a rate: A in units of kRateUnit.
template <class State>
constexpr float kRateUnit = kWidth<State> > 1 ? 0.69314718f : 1.0f;

inline VecF rate_of(VecF A) { return A * kLog2E; }
template <class State>
inline State rate_of(State A) {
  return A;
}

/// exp(d A) from the rate of A; kBounded: it is far from overflow and underflow.
template <bool kBounded>
inline VecF decay(VecF d, VecF rate) {
  return kBounded ? exp2_bounded(d * rate) : exp2(d * rate);
}
template <bool kBounded>
inline float decay(float d, float rate) {
  return ::expf(d * rate);
}
template <bool kBounded>
inline double decay(double d, double rate) {
  return ::exp(d * rate);
}
template <bool kBounded>
inline Complex<float> decay(float d, Complex<float> rate) {
  const float magnitude = ::expf(d * rate.re);
  return {magnitude * ::cosf(d * rate.im), magnitude * ::sinf(d * rate.im)};
}
template <bool kBounded>
inline Complex<double> decay(double d, Complex<double> rate) {
  const double magnitude = ::exp(d * rate.re);
  return {magnitude * ::cos(d * rate.im), magnitude * ::sin(d * rate.im)};
}

// ---- Tiles: kWidth rows of a matrix that lies anywhere, transposed to (column, row)

/// Two dimensions of a view. Offset and strides count elements; the imaginary part of a complex
/// element is `imag` behind.
struct Matrix {
  void* data;
  DType dtype;
  int64_t offset, row_stride, col_stride, imag;
};

inline Matrix matrix(const View<2>& v, int64_t row, int64_t col) {
  const int64_t offset = row * v.stride[0] + col * v.stride[1];
  return {v.data, v.dtype, offset, v.stride[0], v.stride[1], v.imag};
}
inline Matrix matrix(const View<3>& v, int64_t i, int64_t row, int64_t col) {
  const int64_t offset = i * v.stride[0] + row * v.stride[1] + col * v.stride[2];
  return {v.data, v.dtype, offset, v.stride[1], v.stride[2], v.imag};
}
/// The last two dimensions of a view (batch, groups, dstate, seqlen).
inline Matrix tokens_matrix(const View<4>& v, int64_t b, int64_t g, int64_t n, int64_t t) {
  const int64_t offset = b * v.stride[0] + g * v.stride[1] + n * v.stride[2] + t * v.stride[3];
  return {v.data, v.dtype, offset, v.stride[2], v.stride[3], v.imag};
}
/// (dim, dstate) of a view that is constant over batch and time.
inline Matrix constant_matrix(const View<4>& v, int64_t c, int64_t n) {
  return {v.data, v.dtype, c * v.stride[1] + n * v.stride[2], v.stride[1], v.stride[2], v.imag};
}
/// Rows of a contiguous array (rows, cols) of E.
template <class E>
inline Matrix contiguous_matrix(void* data, int64_t cols, int64_t row, int64_t col) {
  const DType dtype = sizeof(Scalar<E>) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;
  return {data, dtype, (row * cols + col) * kParts<E>, cols * kParts<E>, kParts<E>, 1};
}

template <class E>
inline E load_element(const Matrix& m, int64_t at) {
  if constexpr (kParts<E> == 2) {
    using S = Scalar<E>;
    return {load_as<S>(m.data, m.dtype, at), load_as<S>(m.data, m.dtype, at + m.imag)};
  } else {
    return load_as<E>(m.data, m.dtype, at);
  }
}
template <class E>
inline void store_element(const Matrix& m, int64_t at, E x) {
  if constexpr (kParts<E> == 2) {
    store_as(m.data, m.dtype, at, x.re);
    store_as(m.data, m.dtype, at + m.imag, x.im);
  } else {
    store_as(m.data, m.dtype, at, x);
  }
}

template <class T>
void load_vector_tile(const Matrix& m, int rows, int cols, float* tile) {
  const T* src = static_cast<const T*>(m.data) + m.offset;
  int j = 0;
  if (m.col_stride == 1) {
    for (; j + kLanes <= cols; j += kLanes) {
      VecF x[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const T* row = src + i * m.row_stride + j;
        x[i] = i < rows ? load(row) : VecF{};
      }
      transpose(x);
      for (int i = 0; i < kLanes; ++i) store(tile + (j + i) * kLanes, x[i]);
    }
  } else if (m.row_stride == 1 && rows == kLanes) {
    for (; j < cols; ++j) store(tile + j * kLanes, load(src + j * m.col_stride));
  }
  for (; j < cols; ++j) {
    for (int i = 0; i < kLanes; ++i) {
      tile[j * kLanes + i] =
          i < rows ? to_accumulate(src[i * m.row_stride + j * m.col_stride]) : 0.0f;
    }
  }
}

template <class T>
void store_vector_tile(const Matrix& m, int rows, int cols, const float* tile) {
  T* dst = static_cast<T*>(m.data) + m.offset;
  int j = 0;
  if (m.col_stride == 1) {
    for (; j + kLanes <= cols; j += kLanes) {
      VecF x[kLanes];
      for (int i = 0; i < kLanes; ++i) x[i] = load(tile + (j + i) * kLanes);
      transpose(x);
      for (int i = 0; i < kLanes; ++i) {
        if (i < rows) store(dst + i * m.row_stride + j, x[i]);
      }
    }
  } else if (m.row_stride == 1 && rows == kLanes) {
    for (; j < cols; ++j) store(dst + j * m.col_stride, load(tile + j * kLanes));
  }
  for (; j < cols; ++j) {
    for (int i = 0; i < rows; ++i) {
      dst[i * m.row_stride + j * m.col_stride] = from_accumulate<T>(tile[j * kLanes + i]);
    }
  }
}

/// tile[j][i] = m[i][j] for i < rows, 0 for rows <= i < kWidth<V>; j < cols.
template <class V>
inline void load_tile(const Matrix& m, int rows, int cols, Element<V>* tile) {
  if constexpr (kWidth<V> == 1) {
    for (int j = 0; j < cols; ++j) {
      tile[j] = load_element<V>(m, m.offset + j * m.col_stride);
    }
  } else if (m.dtype == DType::kFloat32) {
    load_vector_tile<float>(m, rows, cols, tile);
  } else if (m.dtype == DType::kFloat16) {
    load_vector_tile<Half>(m, rows, cols, tile);
  } else {
    load_vector_tile<BFloat16>(m, rows, cols, tile);
  }
}

/// m[i][j] = tile[j][i] for i < rows, j < cols.
template <class V>
inline void store_tile(const Matrix& m, int rows, int cols, const Element<V>* tile) {
  if constexpr (kWidth<V> == 1) {
    for (int j = 0; j < cols; ++j) store_element(m, m.offset + j * m.col_stride, tile[j]);
  } else if (m.dtype == DType::kFloat32) {
    store_vector_tile<float>(m, rows, cols, tile);
  } else if (m.dtype == DType::kFloat16) {
    store_vector_tile<Half>(m, rows, cols, tile);
  } else {
    store_vector_tile<BFloat16>(m, rows, cols, tile);
  }
}

/// Prefetches part `part` of `parts` of m[0, rows)[0, cols).
inline void prefetch_part(const Matrix& m, int64_t rows, int64_t cols, int part, int parts) {
  asm volatile("");  // else GCC drops the call: a function of prefetches alone has no effect
  constexpr int64_t kLine = 64;
  const int64_t size = m.dtype == DType::kFloat32 ? 4 : m.dtype == DType::kFloat64 ? 8 : 2;
  const bool by_row = m.col_stride == 1;
  const int64_t runs = by_row ? rows : cols, length = (by_row ? cols : rows) * size;
  const int64_t stride = (by_row ? m.row_stride : m.col_stride) * size;
  const char* const data = static_cast<const char*>(m.data) + m.offset * size;
  for (int64_t i = runs * part / parts; i < runs * (part + 1) / parts; ++i) {
    for (int64_t at = 0; at < length; at += kLine) {
      __builtin_prefetch(data + i * stride + at, 0, 2);
    }
  }
}

// ---- The recurrence over one tile

/// States that a scan, and a scan with a sweep, keep in registers at a time.
template <class Real>
constexpr int kScanStates = kWidth<Real> < 8 ? kWidth<Real> : 8;
template <class Real>
constexpr int kSweepStates = kWidth<Real> < 4 ? kWidth<Real> : 4;

/// States whose B and C are loaded at a time: what one transposition yields.
template <class Real>
constexpr int kGroup = kWidth<Real>;

/// What scan and sweep read and write: one tile of one vector of channels, one group of states.
/// A block is the states that one call keeps in registers.
template <class Real, class State>
struct Tile {
  using S = Element<Real>;
  using E = Element<State>;
  int tokens;
  bool constant_B, constant_C;
  bool bounded;          // as decay has it
  const uint8_t* marks;  // (tokens)
  const S* d;            // (tokens, width)
  const S* dtu;          // (tokens, width)                    d_t u_t
  const E* rate;         // (group, width)
  const E* B;            // (tokens, group) or, constant, (group, width)
  const E* C;            // as B
  S* y;                  // (tokens, width)                    += sum_n C_t h_t
  E* h;                  // (group, width)                     state before, then after the tile
  // The backward only.
  E* kept;       // (tokens + 1, {h_{t-1}, decay_t}, block, width)   left by scan for sweep
  const S* dy;   // (tokens, width)
  S* dBu;        // (tokens, width)                    += sum_n B_t dh_t
  S* drate;      // (tokens, width)                    += sum_n rate q_t
  E* dh;         // (group, width)                     dL/dh after, then before the tile
  E* dA;         // (group, width)                     +=
  E* dB;         // (tokens, {dB, dC}, block, width)   +=; constant: (group, width)
  E* dC;         // (tokens, {dC, ...}, ...)           as dB
  bool restart;  // dB and dC per time: = instead of +=
};

template <bool kConstant, class State, class Real>
inline State coefficient(const Element<State>* x, int t, int n) {
  if constexpr (kConstant) {
    return load_lanes<State>(x + n * kWidth<Real>);
  } else {
    return in_all_lanes<State>(x[t * kGroup<Real> + n]);
  }
}

/// Scans states [n0, n0 + kStates) of the group; kKeep: and leaves h and the decays in s.kept.
template <int kStates, bool kKeep, bool kConstantB, bool kConstantC, bool kBounded, class Real,
          class State>
void scan_block(const Tile<Real, State>& s, int n0) {
  constexpr int kW = kWidth<Real>;
  State rate[kStates], h[kStates];
  const auto keep = [&](int row, int k, State x) {
    if (kKeep) store_lanes<State>(s.kept + (row * kStates + k) * kW, x);
  };
  for (int k = 0; k < kStates; ++k) {
    rate[k] = load_lanes<State>(s.rate + (n0 + k) * kW);
    h[k] = load_lanes<State>(s.h + (n0 + k) * kW);
    keep(0, k, h[k]);
  }
  for (int t = 0; t < s.tokens; ++t) {
    if (s.marks[t] == kPadding) {
      for (int k = 0; k < kStates; ++k) keep(2 * t + 2, k, h[k]);
      continue;
    }
    if (s.marks[t] == kReset) {
      for (int k = 0; k < kStates; ++k) h[k] = State{};
    }
    const Real d = load_lanes<Real>(s.d + t * kW);
    const Real dtu = load_lanes<Real>(s.dtu + t * kW);
    Real y = {};
    for (int k = 0; k < kStates; ++k) {
      const State a = decay<kBounded>(d, rate[k]);
      h[k] = a * h[k] + dtu * coefficient<kConstantB, State, Real>(s.B, t, n0 + k);
      y = y + readout(coefficient<kConstantC, State, Real>(s.C, t, n0 + k), h[k]);
      keep(2 * t + 1, k, a);
      keep(2 * t + 2, k, h[k]);
    }
    store_lanes<Real>(s.y + t * kW, load_lanes<Real>(s.y + t * kW) + y);
  }
  for (int k = 0; k < kStates; ++k) store_lanes<State>(s.h + (n0 + k) * kW, h[k]);
}

/// The way back over what scan_block left in s.kept.
template <int kStates, bool kConstantB, bool kConstantC, class Real, class State>
void sweep_block(const Tile<Real, State>& s, int n0) {
  using E = Element<State>;
  constexpr int kW = kWidth<Real>;
  const auto kept = [&](int row, int k) {
    return load_lanes<State>(s.kept + (row * kStates + k) * kW);
  };
  const auto add_to = [](E* sum, State x) { store_lanes<State>(sum, load_lanes<State>(sum) + x); };
  // Sums over channels, which go on from vector to vector.
  const auto pass_on = [&](E* sums, int t, int k, State x) {
    E* const sum = sums + (2 * t * kStates + k) * kW;
    store_lanes<State>(sum, s.restart ? x : x + load_lanes<State>(sum));
  };
  State rate[kStates], h[kStates], dh[kStates], dA[kStates], dB[kStates], dC[kStates];
  for (int k = 0; k < kStates; ++k) {
    rate[k] = load_lanes<State>(s.rate + (n0 + k) * kW);
    h[k] = kept(2 * s.tokens, k);
    dh[k] = load_lanes<State>(s.dh + (n0 + k) * kW);
    dA[k] = dB[k] = dC[k] = State{};
  }
  for (int t = s.tokens - 1; t >= 0; --t) {
    if (s.marks[t] == kPadding) {
      for (int k = 0; k < kStates; ++k) {
        if (!kConstantB) pass_on(s.dB, t, k, State{});
        if (!kConstantC) pass_on(s.dC, t, k, State{});
      }
      continue;
    }
    const Real d = load_lanes<Real>(s.d + t * kW);
    const Real dtu = load_lanes<Real>(s.dtu + t * kW);
    const Real dy = load_lanes<Real>(s.dy + t * kW);
    Real dBu = {}, drate = {};
    for (int k = 0; k < kStates; ++k) {
      const State B = coefficient<kConstantB, State, Real>(s.B, t, n0 + k);
      const State C = coefficient<kConstantC, State, Real>(s.C, t, n0 + k);
      dh[k] = readout_gradient(dy, C) + dh[k];
      if constexpr (kConstantB) {
        dB[k] = dtu * dh[k] + dB[k];
      } else {
        pass_on(s.dB, t, k, dtu * dh[k]);
      }
      if constexpr (kConstantC) {
        dC[k] = readout_gradient(dy, h[k]) + dC[k];
      } else {
        pass_on(s.dC, t, k, readout_gradient(dy, h[k]));
      }
      dBu = inner(dh[k], B) + dBu;
      h[k] = kept(2 * t, k);  // of the token before
    }
    if (s.marks[t] == kReset) {  // that token is of another sequence
      for (int k = 0; k < kStates; ++k) dh[k] = State{};
    } else {
      for (int k = 0; k < kStates; ++k) {
        dh[k] = times_conj(dh[k], kept(2 * t + 1, k));
        const State q = times_conj(dh[k], h[k]);
        dA[k] = d * q + dA[k];
        drate = inner(q, rate[k]) + drate;
      }
    }
    store_lanes<Real>(s.dBu + t * kW, load_lanes<Real>(s.dBu + t * kW) + dBu);
    store_lanes<Real>(s.drate + t * kW, load_lanes<Real>(s.drate + t * kW) + drate);
  }
  for (int k = 0; k < kStates; ++k) {
    store_lanes<State>(s.dh + (n0 + k) * kW, dh[k]);
    add_to(s.dA + (n0 + k) * kW, dA[k]);
    if (kConstantB) add_to(s.dB + (n0 + k) * kW, dB[k]);
    if (kConstantC) add_to(s.dC + (n0 + k) * kW, dC[k]);
  }
}

// Run-time values that the loops above want as constants.

template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

/// f(Constant<flag>{})
template <class F>
inline void with_flag(bool flag, F f) {
  if (flag) {
    f(Constant<true>{});
  } else {
    f(Constant<false>{});
  }
}

/// f(Constant<block>{}, n0) for blocks that cover the states [0, states) of a group: of kBlock
/// states while they are more than half filled (what is missing in a group is zeros), then of one.
template <int kBlock, class F>
inline void for_each_block(int states, F f) {
  int n0 = 0;
  for (; states - n0 > kBlock / 2; n0 += kBlock) f(Constant<kBlock>{}, n0);
  for (; n0 < states; ++n0) f(Constant<1>{}, n0);
}

template <int kStates, bool kKeep, class Real, class State>
void scan(const Tile<Real, State>& s, int n0) {
  with_flag(s.constant_B, [&](auto constant_B) {
    with_flag(s.constant_C, [&](auto constant_C) {
      if constexpr (kWidth<Real> == 1) {
        scan_block<kStates, kKeep, constant_B.value, constant_C.value, false>(s, n0);
      } else {
        with_flag(s.bounded, [&](auto bounded) {
          scan_block<kStates, kKeep, constant_B.value, constant_C.value, bounded.value>(s, n0);
        });
      }
    });
  });
}

template <int kStates, class Real, class State>
void sweep(const Tile<Real, State>& s, int n0) {
  with_flag(s.constant_B, [&](auto constant_B) {
    with_flag(s.constant_C, [&](auto constant_C) {
      sweep_block<kStates, constant_B.value, constant_C.value>(s, n0);
    });
  });
}

// ---- A unit of channels

/// Channels of a unit. What is in scratch for one limits it; vectors also gain from sharing B and
/// C.
template <class Real>
constexpr int kUnit = kWidth<Real> == 1 ? 8 : kScanUnit;

template <class Real>
constexpr int kVectors = kUnit<Real> / kWidth<Real>;

/// One quantity of a unit over a tile: (vectors, tokens, width). The room for one token more keeps
/// the same token of several quantities from differing in high address bits only, where caches and
/// store buffers would confuse them.
template <class Real>
struct Tokens {
  alignas(64) Element<Real> data[kVectors<Real>][(kTile + 1) * kWidth<Real>];

  Element<Real>* operator[](int v) { return data[v]; }
  Real at(int v, int t) const { return load_lanes<Real>(data[v] + t * kWidth<Real>); }
  void set(int v, int t, Real x) { store_lanes<Real>(data[v] + t * kWidth<Real>, x); }
};

/// One quantity of a unit and all its states: (vectors, states, width), if they fit; else of one
/// group at a time, and the rest is elsewhere.
template <class Real, class State>
struct States {
  alignas(64) Element<State> data[kVectors<Real>][kScanResidentStates * kWidth<Real>];

  Element<State>* group(int v, int64_t n0, bool resident) {
    return data[v] + (resident ? n0 * kWidth<Real> : 0);
  }
};

/// One quantity of one group of states: (group, width).
template <class Real, class State>
struct Group {
  alignas(64) Element<State> data[kGroup<Real> * kWidth<Real>];
};

constexpr uint8_t kNoMarks[kTile] = {};

struct ChannelRange {
  int64_t begin, end;
};

/// Up to kUnit channels of one batch row that share B and C: where their data is, and the loads
/// that forward and backward have in common.
template <class Real, class State>
struct Unit {
  using S = Element<Real>;
  using E = Element<State>;
  static constexpr int kW = kWidth<Real>;

  const SelectiveScanParams& p;
  const int64_t b, channel;
  const int channels, vectors;
  const bool resident;
  alignas(64) S delta_bias[kUnit<Real>], D[kUnit<Real>];
  alignas(64) S bound[kUnit<Real>];  // while |d| < bound, exp(d A) is far from 0 and infinity
  alignas(64) E B[kTile * kGroup<Real>], C[kTile * kGroup<Real>];  // (tokens, group), per time

  Unit(const SelectiveScanParams& params, int64_t row, ChannelRange range)
      : p(params),
        b(row),
        channel(range.begin),
        channels(static_cast<int>(range.end - range.begin)),
        vectors((channels + kW - 1) / kW),
        resident(p.dstate <= kScanResidentStates) {
    for (int i = 0; i < kUnit<Real>; ++i) {
      delta_bias[i] = load_parameter(p.delta_bias, i);
      D[i] = load_parameter(p.D, i);
    }
    if constexpr (kW > 1) {
      for (int v = 0; v < vectors; ++v) {
        Real peak = {};  // of |rate|
        for (int64_t n0 = 0; n0 < p.dstate; n0 += kGroup<Real>) {
          Group<Real, State> rates;
          load_rates(v, n0, rates.data);
          for (int n = 0; n < kGroup<Real>; ++n) {
            const Real size = -negative_abs(load_lanes<Real>(rates.data + n * kW));
            peak = select(size <= peak, peak, size + 0.0f * peak);  // a NaN stays
          }
        }
        store_lanes<Real>(bound + v * kW, 125.0f / peak);  // 2^-126 is the least normal number
      }
    }
  }

  S load_parameter(const View<1>& v, int i) const {
    return v && i < channels ? load_as<S>(v.data, v.dtype, (channel + i) * v.stride[0]) : S(0);
  }
  int64_t first_channel(int v) const { return channel + v * kW; }
  int rows(int v) const { return channels - v * kW < kW ? channels - v * kW : kW; }
  int states(int64_t n0) const {
    return static_cast<int>(p.dstate - n0 < kGroup<Real> ? p.dstate - n0 : kGroup<Real>);
  }
  int tokens(int64_t t0) const {
    return static_cast<int>(p.seqlen - t0 < kTile ? p.seqlen - t0 : kTile);
  }
  const uint8_t* marks(int64_t t0) const {
    return p.marks ? p.marks + b * p.seqlen + t0 : kNoMarks;
  }

  void load(const View<3>& x, int v, int64_t t0, S* tile) const {
    load_tile<Real>(matrix(x, b, first_channel(v), t0), rows(v), tokens(t0), tile);
  }
  void store(const View<3>& x, int v, int64_t t0, const S* tile) const {
    store_tile<Real>(matrix(x, b, first_channel(v), t0), rows(v), tokens(t0), tile);
  }

  /// A group of states of m, rows channels: (group, width), 0 beyond dstate and if m is absent.
  void load_group(const Matrix& m, int v, int64_t n0, E* group) const {
    const int count = m.data ? states(n0) : 0;
    if (count > 0) load_tile<State>(m, rows(v), count, group);
    for (int i = count * kW; i < kGroup<Real> * kW; ++i) group[i] = E{};
  }
  void store_group(const Matrix& m, int v, int64_t n0, const E* group) const {
    store_tile<State>(m, rows(v), states(n0), group);
  }
  Matrix states_of(const View<3>& x, int v, int64_t n0) const {
    return matrix(x, b, first_channel(v), n0);
  }
  Matrix kept_states(int v, int64_t n0, int64_t t0) const {
    if (p.seqlen == 0) return {};
    const int64_t chunks = (p.seqlen + kTile - 1) / kTile;
    const int64_t row = (b * chunks + t0 / kTile) * p.dim + first_channel(v);
    return contiguous_matrix<E>(p.states, p.dstate, row, n0);
  }
  void load_rates(int v, int64_t n0, E* rates) const {
    load_group(matrix(p.A, first_channel(v), n0), v, n0, rates);
    for (int n = 0; n < kGroup<Real>; ++n) {
      store_lanes<State>(rates + n * kW, rate_of(load_lanes<State>(rates + n * kW)));
    }
  }

  /// B and C of a group of states: per time for the whole unit, constant ones for each vector.
  void load_B_C(int64_t n0, int64_t t0) {
    const auto load_group_of = [&](const View<4>& x, int64_t groups, E* tile) {
      const Matrix m = tokens_matrix(x, b, channel / (p.dim / groups), n0, t0);
      load_tile<State>(m, states(n0), tokens(t0), tile);
    };
    if (!p.constant_B) load_group_of(p.B, p.groups_B, B);
    if (!p.constant_C) load_group_of(p.C, p.groups_C, C);
  }
  void load_constant_B_C(int v, int64_t n0, E* group_B, E* group_C) const {
    const int64_t c = first_channel(v);
    if (p.constant_B) load_group(constant_matrix(p.B, c, n0), v, n0, group_B);
    if (p.constant_C) load_group(constant_matrix(p.C, c, n0), v, n0, group_C);
  }

  /// d, u and D u of a tile; slope = dd/ddelta unless null. Returns whether |d| < bound wherever it
  /// is used: what stands at padding must not choose the path that the other tokens take.
  bool load_inputs(int v, int64_t t0, S* d, S* u, S* Du, S* slope) const {
    load(p.delta, v, t0, d);
    load(p.u, v, t0, u);
    const Real bias_v = load_lanes<Real>(delta_bias + v * kW), D_v = load_lanes<Real>(D + v * kW);
    const auto step = [&](int i) {
      const Real delta = load_lanes<Real>(d + i) + bias_v;
      const Real d_t = p.delta_softplus ? softplus(delta) : delta;
      const Real one = in_all_lanes<Real>(S(1));
      if (slope) store_lanes<Real>(slope + i, p.delta_softplus ? softplus_slope(delta) : one);
      store_lanes<Real>(Du + i, D_v * load_lanes<Real>(u + i));
      store_lanes<Real>(d + i, d_t);
      return d_t;
    };
    const int end = tokens(t0) * kW;
    if constexpr (kW == 1) {
      for (int i = 0; i < end; ++i) step(i);
      return false;
    } else {
      const Real bound_v = load_lanes<Real>(bound + v * kW);
      VecI below = VecI{} - 1;
      const uint8_t* const mark = marks(t0);
      for (int i = 0; i < end; i += kW) {
        const VecI padding = VecI{} - (mark[i / kW] == kPadding);
        below &= (negative_abs(step(i)) > -bound_v) | padding;
      }
      int32_t all = -1;
      for (int lane = 0; lane < kW; ++lane) all &= below[lane];
      return all != 0;
    }
  }

  /// Parts that the next tile is prefetched in: blocks of states that the unit scans per tile.
  int parts() const {
    return vectors * static_cast<int>((p.dstate + kScanStates<Real> - 1) / kScanStates<Real>);
  }
  /// Prefetches one part of the tile at t0. Neighbouring rows lie far apart, which hardware does
  /// not foresee, and all at once they would be more than it can have under way.
  void prefetch(const View<3>& x, int64_t t0, int part) const {
    if (!x || part >= parts()) return;
    prefetch_part(matrix(x, b, channel, t0), channels, tokens(t0), part, parts());
  }
  void prefetch_kept_states(int64_t t0, int part) const {
    if (part < parts()) prefetch_part(kept_states(0, 0, t0), channels, p.dstate, part, parts());
  }
};

// ---- Forward

template <class Real, class State>
void scan_unit(const SelectiveScanParams& p, int64_t b, ChannelRange channels) {
  using E = Element<State>;
  Unit<Real, State> unit(p, b, channels);
  Tokens<Real> d, dtu, y;
  States<Real, State> rates, states;
  bool bounded[kVectors<Real>];

  for (int64_t t0 = 0; t0 == 0 || t0 < p.seqlen; t0 += kTile) {  // once if there are no tokens
    const bool first = t0 == 0, last = t0 + kTile >= p.seqlen;
    const int tokens = unit.tokens(t0);
    const uint8_t* const marks = unit.marks(t0);

    for (int v = 0; v < unit.vectors; ++v) {
      bounded[v] = unit.load_inputs(v, t0, d[v], dtu[v], y[v], nullptr);
      for (int t = 0; t < tokens; ++t) dtu.set(v, t, d.at(v, t) * dtu.at(v, t));
    }

    int part = 0;
    for (int64_t n0 = 0; n0 < p.dstate; n0 += kGroup<Real>) {
      unit.load_B_C(n0, t0);
      for (int v = 0; v < unit.vectors; ++v) {
        E* const rate = rates.group(v, n0, unit.resident);
        E* const h = states.group(v, n0, unit.resident);
        const Matrix last_state = unit.states_of(p.last_state, v, n0);
        if (first || !unit.resident) {
          unit.load_rates(v, n0, rate);
          unit.load_group(first ? unit.states_of(p.initial_state, v, n0) : last_state, v, n0, h);
        }
        if (p.states && tokens > 0) unit.store_group(unit.kept_states(v, n0, t0), v, n0, h);
        Group<Real, State> B, C;
        unit.load_constant_B_C(v, n0, B.data, C.data);

        Tile<Real, State> tile{};
        tile.tokens = tokens;
        tile.constant_B = p.constant_B;
        tile.constant_C = p.constant_C;
        tile.bounded = bounded[v];
        tile.marks = marks;
        tile.d = d[v];
        tile.dtu = dtu[v];
        tile.rate = rate;
        tile.B = p.constant_B ? B.data : unit.B;
        tile.C = p.constant_C ? C.data : unit.C;
        tile.y = y[v];
        tile.h = h;
        for_each_block<kScanStates<Real>>(unit.states(n0), [&](auto block, int n) {
          if (!last) {
            const View<3>* const streams[] = {&p.delta, &p.u, &p.z, &p.out};
            for (const View<3>* x : streams) unit.prefetch(*x, t0 + kTile, part);
            ++part;
          }
          scan<block.value, false>(tile, n);
        });
        if (last || !unit.resident) unit.store_group(last_state, v, n0, h);
      }
    }

    for (int v = 0; v < unit.vectors; ++v) {
      Tokens<Real>& z = d;
      if (p.z) unit.load(p.z, v, t0, z[v]);
      for (int t = 0; t < tokens; ++t) {
        const Real gate = p.z ? z.at(v, t) * sigmoid_of(z.at(v, t)).s : in_all_lanes<Real>(1);
        y.set(v, t, marks[t] == kPadding ? Real{} : y.at(v, t) * gate);
      }
      unit.store(p.out, v, t0, y[v]);
    }
  }
}

// ---- Backward

/// Where the partial sums of a block of channels go.
template <class S, class E>
struct PartialSums {
  S* workspace;
  SelectiveScanWorkspace at;
  E* dB = nullptr;  // (dstate, seqlen) of the block; null if constant or not wanted
  E* dC = nullptr;
  bool first = true;  // the first unit of the block, which starts dB and dC
};

/// row[t] = sum over the lanes of sums[t * pitch], added to row[t] unless it is the first.
template <class State>
void add_lane_sums(const Element<State>* sums, int pitch, int tokens, bool first,
                   Element<State>* row) {
  if constexpr (kWidth<State> == 1) {
    for (int t = 0; t < tokens; ++t) row[t] = first ? sums[t * pitch] : row[t] + sums[t * pitch];
  } else {
    for (int t0 = 0; t0 < tokens; t0 += kLanes) {
      VecF x[kLanes];
      for (int i = 0; i < kLanes; ++i) x[i] = load(sums + (t0 + i) * pitch);
      const VecF total = sum_lanes(x);
      if (t0 + kLanes <= tokens) {
        store(row + t0, first ? total : load(row + t0) + total);
      } else {
        for (int i = 0; t0 + i < tokens; ++i) {
          row[t0 + i] = first ? total[i] : row[t0 + i] + total[i];
        }
      }
    }
  }
}

template <class Real, class State>
struct Sweep {
  using S = Element<Real>;
  using E = Element<State>;
  static constexpr int kW = kWidth<Real>;
  static constexpr int kStates = kSweepStates<Real>;

  const SelectiveScanParams& p;
  const PartialSums<S, E>& sums;
  Unit<Real, State> unit;
  Tokens<Real> d, u, slope, dtu, y, dy, dz, dBu, drate;
  bool bounded[kVectors<Real>];
  States<Real, State> rates, dstates, dAs;
  Group<Real, State> h[kVectors<Real>];
  Group<Real, State> B[kVectors<Real>], C[kVectors<Real>];    // constant ones
  Group<Real, State> dB[kVectors<Real>], dC[kVectors<Real>];  // of constant ones
  // Of one block of states, as Tile has them.
  alignas(64) E kept[(kTile + 1) * 2 * kStates * kW];
  alignas(64) E dB_dC[kTile * 2 * kStates * kW];
  alignas(64) S dD[kUnit<Real>] = {}, ddelta_bias[kUnit<Real>] = {};

  Sweep(const SelectiveScanParams& params, int64_t b, ChannelRange channels,
        const PartialSums<S, E>& partial_sums)
      : p(params), sums(partial_sums), unit(params, b, channels) {}

  void run() {
    for (int64_t t0 = (p.seqlen - 1) / kTile * kTile; t0 >= 0; t0 -= kTile) {  // at least once
      load_tokens(t0);
      int part = 0;
      for (int64_t n0 = 0; n0 < p.dstate; n0 += kGroup<Real>) {
        load_states(t0, n0);
        for_each_block<kStates>(unit.states(n0), [&](auto block, int n) {
          for (int v = 0; v < unit.vectors; ++v) {
            if (t0 > 0) prefetch(t0 - kTile, part++);
            const Tile<Real, State> s = tile(t0, n0, v, block.value);
            scan<block.value, true>(s, n);
            sweep<block.value>(s, n);
          }
          add_sums(t0, n0 + n, block.value);
        });
        store_states(t0, n0);
      }
      store_tokens(t0);
    }
    for (int i = 0; i < unit.channels; ++i) {
      const int64_t c = unit.b * p.dim + unit.channel + i;
      sums.workspace[sums.at.dD + c] = dD[i];
      sums.workspace[sums.at.ddelta_bias + c] = ddelta_bias[i];
    }
  }

  void prefetch(int64_t t0, int part) const {
    unit.prefetch_kept_states(t0, part);
    const View<3>* const streams[] = {&p.delta, &p.u, &p.z, &p.dout, &p.ddelta, &p.du, &p.dz};
    for (const View<3>* x : streams) unit.prefetch(*x, t0, part);
  }

  void load_tokens(int64_t t0) {
    for (int v = 0; v < unit.vectors; ++v) {
      bounded[v] = unit.load_inputs(v, t0, d[v], u[v], y[v], slope[v]);
      unit.load(p.dout, v, t0, dy[v]);
      if (p.z) unit.load(p.z, v, t0, dz[v]);
      for (int t = 0; t < unit.tokens(t0); ++t) {
        if (p.z) {
          const Real dout_t = dy.at(v, t), z_t = dz.at(v, t);
          const Sigmoid<Real> gate = sigmoid_of(z_t);
          dy.set(v, t, dout_t * (z_t * gate.s));
          dz.set(v, t, dout_t * (gate.s * (S(1) + z_t * gate.complement)));  // lacks y_t
        }
        dtu.set(v, t, d.at(v, t) * u.at(v, t));
        dBu.set(v, t, Real{});
        drate.set(v, t, Real{});
      }
    }
  }

  /// A group of states of a partial sum (batch, dim, dstate); absent unless `present`.
  Matrix partial(int64_t at, int v, int64_t n0, bool present = true) const {
    if (!present) return {};
    const int64_t row = unit.b * p.dim + unit.first_channel(v);
    return contiguous_matrix<E>(sums.workspace + at, p.dstate, row, n0);
  }

  void load_states(int64_t t0, int64_t n0) {
    const bool first = t0 + kTile >= p.seqlen;
    unit.load_B_C(n0, t0);
    for (int v = 0; v < unit.vectors; ++v) {
      if (first || !unit.resident) {
        unit.load_rates(v, n0, rates.group(v, n0, unit.resident));
        const Matrix dstate =
            first ? unit.states_of(p.dlast_state, v, n0) : partial(sums.at.dstate, v, n0);
        unit.load_group(dstate, v, n0, dstates.group(v, n0, unit.resident));
        unit.load_group(partial(sums.at.dA, v, n0, !first), v, n0, dAs.group(v, n0, unit.resident));
      }
      unit.load_group(unit.kept_states(v, n0, t0), v, n0, h[v].data);
      unit.load_constant_B_C(v, n0, B[v].data, C[v].data);
      if (p.constant_B) {
        unit.load_group(partial(sums.at.dB, v, n0, p.dB && !first), v, n0, dB[v].data);
      }
      if (p.constant_C) {
        unit.load_group(partial(sums.at.dC, v, n0, p.dC && !first), v, n0, dC[v].data);
      }
    }
  }

  void store_states(int64_t t0, int64_t n0) {
    const bool last = t0 == 0;
    for (int v = 0; v < unit.vectors; ++v) {
      const E* const dstate = dstates.group(v, n0, unit.resident);
      if (last || !unit.resident) {
        unit.store_group(partial(sums.at.dA, v, n0), v, n0, dAs.group(v, n0, unit.resident));
      }
      if (!unit.resident) unit.store_group(partial(sums.at.dstate, v, n0), v, n0, dstate);
      if (last && p.dinitial_state) {
        unit.store_group(unit.states_of(p.dinitial_state, v, n0), v, n0, dstate);
      }
      if (p.constant_B && p.dB) unit.store_group(partial(sums.at.dB, v, n0), v, n0, dB[v].data);
      if (p.constant_C && p.dC) unit.store_group(partial(sums.at.dC, v, n0), v, n0, dC[v].data);
    }
  }

  Tile<Real, State> tile(int64_t t0, int64_t n0, int v, int block) {
    Tile<Real, State> s{};
    s.tokens = unit.tokens(t0);
    s.constant_B = p.constant_B;
    s.constant_C = p.constant_C;
    s.bounded = bounded[v];
    s.marks = unit.marks(t0);
    s.d = d[v];
    s.dtu = dtu[v];
    s.rate = rates.group(v, n0, unit.resident);
    s.B = p.constant_B ? B[v].data : unit.B;
    s.C = p.constant_C ? C[v].data : unit.C;
    s.y = y[v];
    s.h = h[v].data;
    s.kept = kept;
    s.dy = dy[v];
    s.dBu = dBu[v];
    s.drate = drate[v];
    s.dh = dstates.group(v, n0, unit.resident);
    s.dA = dAs.group(v, n0, unit.resident);
    s.dB = p.constant_B ? dB[v].data : dB_dC;
    s.dC = p.constant_C ? dC[v].data : dB_dC + block * kW;
    s.restart = v == 0;
    return s;
  }

  /// dB and dC of states [n, n + block), summed over the channels of the unit.
  void add_sums(int64_t t0, int64_t n, int block) const {
    for (int k = 0; k < block && n + k < p.dstate; ++k) {
      const int64_t row = (n + k) * p.seqlen + t0;
      const auto add = [&](E* rows, const E* channel_sums) {
        if (rows == nullptr) return;
        add_lane_sums<State>(channel_sums + k * kW, 2 * block * kW, unit.tokens(t0), sums.first,
                             rows + row);
      };
      add(sums.dB, dB_dC);
      add(sums.dC, dB_dC + block * kW);
    }
  }

  void store_tokens(int64_t t0) {
    const int tokens = unit.tokens(t0);
    const uint8_t* const marks = unit.marks(t0);
    Tokens<Real>&du = dBu, &ddelta = drate;
    for (int v = 0; v < unit.vectors; ++v) {
      const Real D_v = load_lanes<Real>(unit.D + v * kW);
      Real dD_v = {}, ddelta_bias_v = {};
      for (int t = 0; t < tokens; ++t) {
        if (marks[t] == kPadding) {
          du.set(v, t, Real{});
          ddelta.set(v, t, Real{});
          dz.set(v, t, Real{});
          continue;
        }
        const Real dd = u.at(v, t) * dBu.at(v, t) + drate.at(v, t) * S(kRateUnit<Real>);
        du.set(v, t, d.at(v, t) * dBu.at(v, t) + D_v * dy.at(v, t));
        ddelta.set(v, t, dd * slope.at(v, t));
        dz.set(v, t, dz.at(v, t) * y.at(v, t));
        dD_v = dy.at(v, t) * u.at(v, t) + dD_v;
        ddelta_bias_v = ddelta.at(v, t) + ddelta_bias_v;
      }
      S *const dD_sum = dD + v * kW, *const ddelta_bias_sum = ddelta_bias + v * kW;
      store_lanes<Real>(dD_sum, load_lanes<Real>(dD_sum) + dD_v);
      store_lanes<Real>(ddelta_bias_sum, load_lanes<Real>(ddelta_bias_sum) + ddelta_bias_v);
      if (p.du) unit.store(p.du, v, t0, du[v]);
      if (p.ddelta) unit.store(p.ddelta, v, t0, ddelta[v]);
      if (p.dz) unit.store(p.dz, v, t0, dz[v]);
    }
  }
};

// ---- Sums of the partial sums

/// sums[i] = partials[i] + partials[stride + i] + ... (count of them), in this order; i < length.
template <class S>
void sum_partials(const S* partials, int64_t stride, int64_t count, int length, S* sums) {
  for (int i = 0; i < length; ++i) sums[i] = S(0);
  for (int64_t k = 0; k < count; ++k) {
    for (int i = 0; i < length; ++i) sums[i] += partials[k * stride + i];
  }
}

constexpr int kReduceTile = 256;  // real elements summed at a time: a few vectors of any kind

/// dB or dC of one (batch row, group, state): sums over the blocks of the group.
template <class E>
void reduce_row(const SelectiveScanParams& p, int64_t blocks_per_row, int64_t groups, int64_t item,
                const Scalar<E>* partials, const View<4>& gradient) {
  const int64_t n = item % p.dstate, g = item / p.dstate % groups, b = item / p.dstate / groups;
  const int64_t count = blocks_per_row / groups;
  const int64_t row = p.seqlen * kParts<E>;
  partials += ((b * blocks_per_row + g * count) * p.dstate + n) * row;
  for (int64_t i0 = 0; i0 < row; i0 += kReduceTile) {
    const int length = static_cast<int>(row - i0 < kReduceTile ? row - i0 : kReduceTile);
    E sums[kReduceTile / kParts<E>];
    sum_partials(partials + i0, p.dstate * row, count, length, reinterpret_cast<Scalar<E>*>(sums));
    for (int i = 0; i < length / kParts<E>; ++i) {
      const Matrix to = tokens_matrix(gradient, b, g, n, i0 / kParts<E> + i);
      store_element(to, to.offset, sums[i]);
    }
  }
}

/// dA, dD, ddelta_bias and constant dB, dC of a unit of channels: sums over the batch.
template <class E>
void reduce_channels(const SelectiveScanParams& p, const SelectiveScanWorkspace& layout,
                     const Scalar<E>* workspace, int64_t begin) {
  using S = Scalar<E>;
  const int64_t end = begin + kScanUnit < p.dim ? begin + kScanUnit : p.dim;
  const auto sum_states = [&](int64_t at, auto target) {
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t n = 0; n < p.dstate; ++n) {
        E sum;
        sum_partials(workspace + at + (c * p.dstate + n) * kParts<E>, p.dim * p.dstate * kParts<E>,
                     p.batch, kParts<E>, reinterpret_cast<S*>(&sum));
        const Matrix to = target(c, n);
        store_element(to, to.offset, sum);
      }
    }
  };
  const auto sum_channels = [&](int64_t at, const View<1>& gradient) {
    for (int64_t c = begin; c < end; ++c) {
      S sum;
      sum_partials(workspace + at + c, p.dim, p.batch, 1, &sum);
      store_as(gradient.data, gradient.dtype, c * gradient.stride[0], sum);
    }
  };
  if (p.dA) sum_states(layout.dA, [&](int64_t c, int64_t n) { return matrix(p.dA, c, n); });
  if (p.dB && p.constant_B) {
    sum_states(layout.dB, [&](int64_t c, int64_t n) { return constant_matrix(p.dB, c, n); });
  }
  if (p.dC && p.constant_C) {
    sum_states(layout.dC, [&](int64_t c, int64_t n) { return constant_matrix(p.dC, c, n); });
  }
  if (p.dD) sum_channels(layout.dD, p.dD);
  if (p.ddelta_bias) sum_channels(layout.ddelta_bias, p.ddelta_bias);
}

template <class Real_, class State_>
struct Types {
  using Real = Real_;
  using State = State_;
};

/// f(Types<Real, State>{}) for the arithmetic that a call needs.
template <class F>
void with_types(const SelectiveScanParams& p, F f) {
  if (p.dtype == DType::kFloat64) {
    if (p.complex_A) {
      f(Types<double, Complex<double>>{});
    } else {
      f(Types<double, double>{});
    }
  } else if (p.complex_A) {
    f(Types<float, Complex<float>>{});
  } else {
    f(Types<VecF, VecF>{});
  }
}

/// f(range, first) for the units of a block of channels.
template <class Real, class F>
void for_each_unit(const SelectiveScanBlocks& blocks, int64_t block, F f) {
  const int64_t span = block / blocks.per_span * blocks.span, span_end = span + blocks.span;
  const int64_t begin = span + block % blocks.per_span * blocks.block;
  const int64_t end = begin + blocks.block < span_end ? begin + blocks.block : span_end;
  for (int64_t c = begin; c < end; c += kUnit<Real>) {
    f(ChannelRange{c, c + kUnit<Real> < end ? c + kUnit<Real> : end}, c == begin);
  }
}

}  // namespace

void selective_scan_fwd_cpu(const SelectiveScanParams& p, int64_t begin, int64_t end) noexcept {
  const SelectiveScanBlocks blocks = selective_scan_fwd_blocks(p);
  with_types(p, [&](auto types) {
    using Real = typename decltype(types)::Real;
    using State = typename decltype(types)::State;
    for (int64_t item = begin; item < end; ++item) {
      for_each_unit<Real>(blocks, item % blocks.per_row, [&](ChannelRange channels, bool) {
        scan_unit<Real, State>(p, item / blocks.per_row, channels);
      });
    }
  });
}

void selective_scan_bwd_cpu(const SelectiveScanParams& p, void* workspace, int64_t begin,
                            int64_t end) noexcept {
  const SelectiveScanBlocks blocks = selective_scan_bwd_blocks(p);
  with_types(p, [&](auto types) {
    using Real = typename decltype(types)::Real;
    using State = typename decltype(types)::State;
    using S = Element<Real>;
    using E = Element<State>;
    for (int64_t item = begin; item < end; ++item) {
      PartialSums<S, E> sums;
      sums.workspace = static_cast<S*>(workspace);
      sums.at = selective_scan_bwd_layout(p);
      const int64_t rows = item * p.dstate * p.seqlen * kParts<E>;
      if (p.dB && !p.constant_B) {
        sums.dB = reinterpret_cast<E*>(sums.workspace + sums.at.dB + rows);
      }
      if (p.dC && !p.constant_C) {
        sums.dC = reinterpret_cast<E*>(sums.workspace + sums.at.dC + rows);
      }
      for_each_unit<Real>(blocks, item % blocks.per_row, [&](ChannelRange channels, bool first) {
        sums.first = first;
        Sweep<Real, State>(p, item / blocks.per_row, channels, sums).run();
      });
    }
  });
}

// Work items: the rows of dB, those of dC, the units of channels.
void selective_scan_bwd_reduce_cpu(const SelectiveScanParams& p, void* workspace, int64_t begin,
                                   int64_t end) noexcept {
  const int64_t blocks_per_row = selective_scan_bwd_blocks(p).per_row;
  const SelectiveScanWorkspace layout = selective_scan_bwd_layout(p);
  const int64_t rows_B = p.dB && !p.constant_B ? p.batch * p.groups_B * p.dstate : 0;
  const int64_t rows_C = p.dC && !p.constant_C ? p.batch * p.groups_C * p.dstate : 0;
  with_types(p, [&](auto types) {
    using E = Element<typename decltype(types)::State>;
    const auto* const sums = static_cast<const Scalar<E>*>(workspace);
    for (int64_t item = begin; item < end; ++item) {
      if (item < rows_B) {
        reduce_row<E>(p, blocks_per_row, p.groups_B, item, sums + layout.dB, p.dB);
      } else if (item < rows_B + rows_C) {
        reduce_row<E>(p, blocks_per_row, p.groups_C, item - rows_B, sums + layout.dC, p.dC);
      } else {
        reduce_channels<E>(p, layout, sums, (item - rows_B - rows_C) * kScanUnit);
      }
    }
  });
}

}  // namespace mamba_ssm::kernels::MAMBA_SSM_ISA
