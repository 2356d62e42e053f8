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

/// Elements of a view from some element on, a stride apart. All counts below are of elements.
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

/// `count` elements, 0 in the lanes behind them.
template <class S>
inline Vector<S> load_run(const Run& run, int count) {
  if (run.stride == 1 && count == kLanes) {
    if constexpr (sizeof(S) == sizeof(double)) {
      if (run.dtype == DType::kFloat64) {
        return load(static_cast<const double*>(run.data) + run.offset);
      }
    } else {
      if (run.dtype == DType::kFloat32) {
        return load(static_cast<const float*>(run.data) + run.offset);
      }
      if (run.dtype == DType::kFloat16) {
        return load(static_cast<const Half*>(run.data) + run.offset);
      }
      if (run.dtype == DType::kBFloat16) {
        return load(static_cast<const BFloat16*>(run.data) + run.offset);
      }
    }
  }
  S lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    lanes[i] = i < count ? load_as<S>(run.data, run.dtype, run.offset + i * run.stride) : S(0);
  }
  return load(lanes);
}

template <class S>
inline void store_run(const Run& run, int count, Vector<S> v) {
  if (run.stride == 1 && count == kLanes) {
    if constexpr (sizeof(S) == sizeof(double)) {
      if (run.dtype == DType::kFloat64) {
        return store(static_cast<double*>(run.data) + run.offset, v);
      }
    } else {
      if (run.dtype == DType::kFloat32) {
        return store(static_cast<float*>(run.data) + run.offset, v);
      }
      if (run.dtype == DType::kFloat16) {
        return store(static_cast<Half*>(run.data) + run.offset, v);
      }
      if (run.dtype == DType::kBFloat16) {
        return store(static_cast<BFloat16*>(run.data) + run.offset, v);
      }
    }
  }
  S lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < count; ++i)
    store_as(run.data, run.dtype, run.offset + i * run.stride, lanes[i]);
}

/// Channels [d0, d0 + count), at most kLanes, of head h of batch row b.
template <class S>
void update_channels(const SelectiveStateUpdateParams& p, int64_t b, int64_t slot, int64_t h,
                     int64_t d0, int count) {
  using V = Vector<S>;
  const int64_t group = h / (p.nheads / p.ngroups);
  V d = load_run<S>(run(p.dt, b, h, d0), count);
  if (p.dt_bias) d = d + load_run<S>(run(p.dt_bias, h, d0), count);
  if (p.dt_softplus) d = softplus(d);
  const V x = load_run<S>(run(p.x, b, h, d0), count);

  // A that is the same for all states of a channel: one exponential for each channel.
  const bool one_decay = p.A.stride[2] == 0;
  S dt[kLanes], dtx[kLanes], decay[kLanes];  // (channels)
  store(dt, d);
  store(dtx, d * x);
  if (one_decay && p.dstate > 0) {
    Run A = run(p.A, h, d0, 0);
    A.stride = p.A.stride[1];
    store(decay, exp_precise(d * load_run<S>(A, count)));
  }

  V sums[kLanes] = {};  // (channels)
  for (int64_t n0 = 0; n0 < p.dstate; n0 += kLanes) {
    const int states = static_cast<int>(p.dstate - n0 < kLanes ? p.dstate - n0 : kLanes);
    const V B = load_run<S>(run(p.B, b, group, n0), states);
    const V C = load_run<S>(run(p.C, b, group, n0), states);
    Run state = {p.state.data, p.state.dtype,
                 slot * p.state.stride[0] + h * p.state.stride[1] + d0 * p.state.stride[2] +
                     n0 * p.state.stride[3],
                 p.state.stride[3]};
    Run A = run(p.A, h, d0, n0);
    for (int i = 0; i < count; ++i) {
      const V a = one_decay ? V{} + decay[i] : exp_precise(dt[i] * load_run<S>(A, states));
      const V s = a * load_run<S>(state, states) + dtx[i] * B;
      sums[i] = sums[i] + s * C;
      store_run<S>(state, states, s);
      state.offset += p.state.stride[2];
      A.offset += p.A.stride[1];
    }
  }
  V y = sum_lanes(sums);
  if (p.D) y = y + load_run<S>(run(p.D, h, d0), count) * x;
  if (p.z) y = y * silu(load_run<S>(run(p.z, b, h, d0), count));
  store_run<S>(run(p.out, b, h, d0), count, y);
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
      const int count = static_cast<int>(last - d < kLanes ? last - d : kLanes);
      if (slot >= 0 && slot < p.num_slots) {
        update_channels<S>(p, b, slot, h, d, count);
      } else {
        store_run<S>(run(p.out, b, h, d), count, Vector<S>{});
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
