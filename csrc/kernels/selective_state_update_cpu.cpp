// Selective state update on CPU.
//
// kLanes channels of one (batch row, head) at a time: what belongs to a channel (dt, x, z, out) is
// one vector of them, what belongs to a state (A, B, C and the state) is a vector of states of one
// channel. B and C serve all channels; the sums over the states of each are turned into one vector
// of channels at the end. Several tokens pass over a vector of states of each channel together: it
// is loaded before the first and stored after the last of them.
#include "selective_state_update_cpu.h"

#include "cpu.h"
#include "simd.h"

namespace mamba_ssm::kernels::MAMBA_SSM_ISA {
namespace {

/// Elements of a view from some element on, a stride apart.
struct Run {
  void* data;
  DType dtype;
  int64_t offset, stride;
};

/// From the element at the given indices on, along the last axis.
template <int kRank, class... Index>
inline Run run(const View<kRank>& v, Index... index) {
  static_assert(sizeof...(index) == kRank);
  int64_t offset = 0;
  int axis = 0;
  ((offset += index * v.stride[axis++]), ...);
  return {v.data, v.dtype, offset, v.stride[kRank - 1]};
}

// How to move vectors of S, `offset` elements from the start of a run.

/// kLanes neighbors.
template <class S, class T>
struct Dense {
  T* data;

  Vector<S> load(int64_t offset) const { return MAMBA_SSM_ISA::load(data + offset); }
  void store(int64_t offset, Vector<S> v) const { MAMBA_SSM_ISA::store(data + offset, v); }
  Vector<S> without_rest(Vector<S> v) const { return v; }
};

/// Up to kLanes elements of any type and stride. The rest of the lanes is 0 when loaded.
template <class S>
struct Scattered {
  Run run;
  int count;

  __attribute__((noinline)) Vector<S> load(int64_t offset) const {
    S lanes[kLanes] = {};
    for (int i = 0; i < count; ++i) {
      lanes[i] = load_as<S>(run.data, run.dtype, run.offset + offset + i * run.stride);
    }
    return MAMBA_SSM_ISA::load(lanes);
  }
  __attribute__((noinline)) void store(int64_t offset, Vector<S> v) const {
    S lanes[kLanes];
    MAMBA_SSM_ISA::store(lanes, v);
    for (int i = 0; i < count; ++i) {
      store_as(run.data, run.dtype, run.offset + offset + i * run.stride, lanes[i]);
    }
  }
  /// 0 in the rest of the lanes, where infinity times 0 may have left NaN.
  Vector<S> without_rest(Vector<S> v) const {
    for (int i = count; i < kLanes; ++i) v[i] = 0;
    return v;
  }
};

/// f(Dense or Scattered) for `count` elements, at most kLanes.
template <class S, class F>
inline void with_access(const Run& run, int count, F f) {
  const auto dense = [&](auto element) {
    using T = decltype(element);
    f(Dense<S, T>{static_cast<T*>(run.data) + run.offset});
  };
  if (run.stride == 1 && count == kLanes) {
    if constexpr (sizeof(S) == sizeof(double)) {
      if (run.dtype == DType::kFloat64) return dense(double{});
    } else {
      if (run.dtype == DType::kFloat32) return dense(float{});
      if (run.dtype == DType::kFloat16) return dense(Half{});
      if (run.dtype == DType::kBFloat16) return dense(BFloat16{});
    }
  }
  f(Scattered<S>{run, count});
}

template <class S>
inline Vector<S> load_run(const Run& run, int count) {
  Vector<S> v;
  with_access<S>(run, count, [&](auto access) { v = access.load(0); });
  return v;
}

template <class S>
inline void store_run(const Run& run, int count, Vector<S> v) {
  with_access<S>(run, count, [&](auto access) { access.store(0, v); });
}

/// A from what stands in memory.
template <class S>
inline Vector<S> rates(const SelectiveStateUpdateParams& p, Vector<S> A) {
  return p.A_is_log ? -exp_precise(A) : A;
}

/// Tokens that pass over the states together: each has a sum for each channel under way.
constexpr int kTokensOfPass = 8;

/// Channels [d0, d0 + count), at most kLanes, of head h of batch row b.
struct Channels {
  int64_t b, slot, h, d0;
  int count;
  bool one_decay;  // A is the same for all states of a channel
};

/// What the channels need of one token.
template <class S>
struct Token {
  S dt[kLanes], dtx[kLanes];
  S decay[kLanes];  // with one_decay
  Vector<S> x;
};

/// Inline, so that a token is known to stand in no memory that a state may be stored to.
template <class S>
__attribute__((always_inline)) inline Token<S> load_token(const SelectiveStateUpdateParams& p,
                                                          const Channels& c, int64_t t) {
  Token<S> token;
  Vector<S> d = load_run<S>(run(p.dt, c.b, t, c.h, c.d0), c.count);
  if (p.dt_bias) d = d + load_run<S>(run(p.dt_bias, c.h, c.d0), c.count);
  if (p.dt_softplus) d = softplus(d);
  token.x = load_run<S>(run(p.x, c.b, t, c.h, c.d0), c.count);
  store(token.dt, d);
  store(token.dtx, d * token.x);
  if (c.one_decay) {
    Run A = run(p.A, c.h, c.d0, 0);
    A.stride = p.A.stride[1];
    store(token.decay, exp_precise(d * rates<S>(p, load_run<S>(A, c.count))));
  }
  return token;
}

/// One token over one vector of states of each channel: s = decay(i) s + dtx[i] B, sums[i] += s C.
/// The first token finds s in the state's memory, the others what the one before them held; the
/// last one stores it there.
template <class S, class Access, class F>
inline void advance(Access state, int64_t channel_stride, bool first, bool last, int channels,
                    const S* dtx, Vector<S> B, Vector<S> C, Vector<S>* held, Vector<S>* sums,
                    F decay) {
  for (int i = 0; i < channels; ++i) {
    const Vector<S> before = first ? state.load(i * channel_stride) : held[i];
    const Vector<S> s = decay(i) * before + dtx[i] * B;
    sums[i] = sums[i] + state.without_rest(s * C);
    if (last) state.store(i * channel_stride, s);
    if (held) held[i] = s;
  }
}

/// Up to kTokens tokens from t0 on; kTokens = 1 is for a call of one token without
/// intermediate_states.
template <class S, int kTokens>
void update_tokens(const SelectiveStateUpdateParams& p, const Channels& c, int64_t t0) {
  using V = Vector<S>;
  constexpr bool kAlone = kTokens == 1;
  const int64_t rest = p.tokens - t0;
  const int count = kAlone ? 1 : static_cast<int>(rest < kTokens ? rest : kTokens);
  const int64_t group = c.h / (p.nheads / p.ngroups);
  // A state of type S holds what the next tokens start from. One of 16 bits stays as it was before
  // the call until the last token, and the tokens before t0 advance it anew.
  const bool exact =
      p.state.dtype == (sizeof(S) == sizeof(double) ? DType::kFloat64 : DType::kFloat32);
  const int64_t begin = kAlone || exact ? t0 : 0, end = t0 + count;
  const bool stored = exact || end == p.tokens;

  Token<S> tokens[kTokens], earlier;
  V sums[kTokens][kLanes];  // (tokens, channels)
  V held[kLanes], unread[kAlone ? 1 : kLanes] = {};
  for (int k = 0; k < count; ++k) {
    tokens[k] = load_token<S>(p, c, t0 + k);
    for (V& sum : sums[k]) sum = V{};
  }
  for (int64_t n0 = 0; n0 < p.dstate; n0 += kLanes) {
    const int width = static_cast<int>(p.dstate - n0 < kLanes ? p.dstate - n0 : kLanes);
    const Run A = run(p.A, c.h, c.d0, n0);
    const int64_t A_stride = p.A.stride[1];
    with_access<S>(run(p.state, c.slot, c.h, c.d0, n0), width, [&](auto access) {
      for (int64_t t = begin; t < (kAlone ? begin + 1 : end); ++t) {
        const bool again = !kAlone && t < t0;
        const int64_t k = kAlone ? 0 : t - t0;
        const bool first = kAlone || t == begin, last = kAlone || (stored && t + 1 == end);
        if (again) earlier = load_token<S>(p, c, t);
        const Token<S>& token = again ? earlier : tokens[k];
        const V B = load_run<S>(run(p.B, c.b, t, group, n0), width);
        const V C = load_run<S>(run(p.C, c.b, t, group, n0), width);
        const auto advance_by = [&](auto decay) {
          advance<S>(access, p.state.stride[2], first, last, c.count, token.dtx, B, C,
                     kAlone ? nullptr : held, again ? unread : sums[k], decay);
        };
        if (c.one_decay) {
          advance_by([&](int i) { return V{} + token.decay[i]; });
        } else {
          advance_by([&](int i) {
            const Run row = {A.data, A.dtype, A.offset + i * A_stride, A.stride};
            return exp_precise(token.dt[i] * rates<S>(p, load_run<S>(row, width)));
          });
        }
        if (!kAlone && !again && p.intermediate_states) {
          for (int i = 0; i < c.count; ++i) {
            store_run<S>(run(p.intermediate_states, c.b, t, c.h, c.d0 + i, n0), width, held[i]);
          }
        }
      }
    });
  }
  for (int k = 0; k < count; ++k) {
    const int64_t t = t0 + k;
    V y = sum_lanes(sums[k]);
    if (p.D) y = y + load_run<S>(run(p.D, c.h, c.d0), c.count) * tokens[k].x;
    if (p.z) y = y * silu(load_run<S>(run(p.z, c.b, t, c.h, c.d0), c.count));
    store_run<S>(run(p.out, c.b, t, c.h, c.d0), c.count, y);
  }
}

template <class S>
void update(const SelectiveStateUpdateParams& p, int64_t begin, int64_t end) {
  const int64_t blocks = (p.headdim + kUpdateChannels - 1) / kUpdateChannels;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t h = item / blocks % p.nheads, b = item / blocks / p.nheads;
    const View<1>& indices = p.state_batch_indices;
    const int64_t slot =
        indices ? load_as<int64_t>(indices.data, indices.dtype, b * indices.stride[0]) : b;
    const int64_t first = item % blocks * kUpdateChannels;
    const int64_t last = first + kUpdateChannels < p.headdim ? first + kUpdateChannels : p.headdim;
    for (int64_t d = first; d < last; d += kLanes) {
      const int channels = static_cast<int>(last - d < kLanes ? last - d : kLanes);
      if (slot >= 0 && slot < p.num_slots) {
        const Channels c = {b, slot, h, d, channels, p.A.stride[2] == 0 && p.dstate > 0};
        if (p.tokens == 1 && !p.intermediate_states) {
          update_tokens<S, 1>(p, c, 0);
        } else {
          for (int64_t t0 = 0; t0 < p.tokens; t0 += kTokensOfPass) {
            update_tokens<S, kTokensOfPass>(p, c, t0);
          }
        }
      } else {
        for (int64_t t = 0; t < p.tokens; ++t) {
          store_run<S>(run(p.out, b, t, h, d), channels, Vector<S>{});
        }
      }
    }
  }
}

}  // namespace

void selective_state_update_cpu(const SelectiveStateUpdateParams& p, int64_t begin,
                                int64_t end) noexcept {
  if (p.dtype == DType::kFloat64) {
    update<double>(p, begin, end);
  } else {
    update<float>(p, begin, end);
  }
}

}  // namespace mamba_ssm::kernels::MAMBA_SSM_ISA
