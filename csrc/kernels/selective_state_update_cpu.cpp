// Selective state update on CPU.
//
// kLanes channels of one (batch row, head) at a time: what belongs to a channel (dt, x, z, out) is
// one vector of them, what belongs to a state (A, B, C and the state) is a vector of states of one
// channel. B and C serve all channels; the sums over the states of each are turned into one vector
// of channels at the end.
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

inline Run run(const View<2>& v, int64_t i, int64_t j) {
  return {v.data, v.dtype, i * v.stride[0] + j * v.stride[1], v.stride[1]};
}
inline Run run(const View<3>& v, int64_t i, int64_t j, int64_t k) {
  return {v.data, v.dtype, i * v.stride[0] + j * v.stride[1] + k * v.stride[2], v.stride[2]};
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

/// One vector of states of each channel: s = decay(i) s + dtx[i] B, sums[i] += s C.
template <class S, class Access, class F>
inline void advance(Access state, int64_t channel_stride, int channels, const S* dtx, Vector<S> B,
                    Vector<S> C, Vector<S>* sums, F decay) {
  for (int i = 0; i < channels; ++i) {
    const Vector<S> s = decay(i) * state.load(i * channel_stride) + dtx[i] * B;
    sums[i] = sums[i] + state.without_rest(s * C);
    state.store(i * channel_stride, s);
  }
}

/// Channels [d0, d0 + channels), at most kLanes, of head h of batch row b.
template <class S>
void update_channels(const SelectiveStateUpdateParams& p, int64_t b, int64_t slot, int64_t h,
                     int64_t d0, int channels) {
  using V = Vector<S>;
  const int64_t group = h / (p.nheads / p.ngroups);
  V d = load_run<S>(run(p.dt, b, h, d0), channels);
  if (p.dt_bias) d = d + load_run<S>(run(p.dt_bias, h, d0), channels);
  if (p.dt_softplus) d = softplus(d);
  const V x = load_run<S>(run(p.x, b, h, d0), channels);

  // A that is the same for all states of a channel: one exponential for each channel.
  const bool one_decay = p.A.stride[2] == 0 && p.dstate > 0;
  const int64_t A_stride = p.A.stride[1];
  S dt[kLanes], dtx[kLanes], decay[kLanes];  // (channels)
  store(dt, d);
  store(dtx, d * x);
  if (one_decay) {
    Run A = run(p.A, h, d0, 0);
    A.stride = A_stride;
    store(decay, exp_precise(d * load_run<S>(A, channels)));
  }

  V sums[kLanes] = {};  // (channels)
  for (int64_t n0 = 0; n0 < p.dstate; n0 += kLanes) {
    const int states = static_cast<int>(p.dstate - n0 < kLanes ? p.dstate - n0 : kLanes);
    const V B = load_run<S>(run(p.B, b, group, n0), states);
    const V C = load_run<S>(run(p.C, b, group, n0), states);
    const Run A = run(p.A, h, d0, n0);
    const Run state = {p.state.data, p.state.dtype,
                       slot * p.state.stride[0] + h * p.state.stride[1] + d0 * p.state.stride[2] +
                           n0 * p.state.stride[3],
                       p.state.stride[3]};
    const int64_t channel_stride = p.state.stride[2];
    with_access<S>(state, states, [&](auto access) {
      if (one_decay) {
        advance<S>(access, channel_stride, channels, dtx, B, C, sums,
                   [&](int i) { return V{} + decay[i]; });
      } else {
        advance<S>(access, channel_stride, channels, dtx, B, C, sums, [&](int i) {
          const Run row = {A.data, A.dtype, A.offset + i * A_stride, A.stride};
          return exp_precise(dt[i] * load_run<S>(row, states));
        });
      }
    });
  }
  V y = sum_lanes(sums);
  if (p.D) y = y + load_run<S>(run(p.D, h, d0), channels) * x;
  if (p.z) y = y * silu(load_run<S>(run(p.z, b, h, d0), channels));
  store_run<S>(run(p.out, b, h, d0), channels, y);
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
        update_channels<S>(p, b, slot, h, d, channels);
      } else {
        store_run<S>(run(p.out, b, h, d), channels, Vector<S>{});
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
