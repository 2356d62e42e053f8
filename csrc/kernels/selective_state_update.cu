// Selective state update: one decode step of Mamba-1 and Mamba-2.
//
// The states of one (slot, head, channel) are a row. Where rows are dense and aligned, kLanes
// threads own a row, its 16-byte vectors interleaved between them, and work on kItems rows at a
// time so that enough of the state is in flight: channels of one head if the head has one decay (B,
// C and the decay then serve all of them), else batch rows of one channel (which share A, D and
// dt_bias). Everything else: a warp per row, element by element.
#include <cuda_runtime.h>

#include <algorithm>

#include "launch.cuh"

namespace mamba_ssm::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
#ifndef SSU_VECTORS
#define SSU_VECTORS 8
#endif
#ifndef SSU_WARPS
#define SSU_WARPS 64
#endif
#ifndef SSU_VECTORS_UNTIED
#define SSU_VECTORS_UNTIED 4
#endif
#ifndef SSU_BLOCKS
#define SSU_BLOCKS 4
#endif
/// Rows that a thread works on at a time: 8 vectors of the state in flight, 4 where A, B and C take
/// registers as well.
template <int kVectors, bool kTied>
constexpr int kItemsOf = (kTied ? SSU_VECTORS : SSU_VECTORS_UNTIED) / kVectors;
constexpr int kWarpsPerSm = SSU_WARPS;       // tied: a warp makes more passes once there are so many

/// log1p(exp(x)) for x <= 20, else x.
template <class Acc>
__device__ __forceinline__ Acc softplus(Acc x) {
  return x <= Acc(20) ? log1p(exp(x)) : x;
}

/// The slot of batch row b, or -1 for a row without one.
__device__ int64_t slot_of(const SelectiveStateUpdateParams& p, int64_t b) {
  int64_t slot = b;
  if (given(p.state_batch_indices)) {
    slot = load_as<int64_t>(p.state_batch_indices.data, p.state_batch_indices.dtype,
                            b * p.state_batch_indices.stride[0]);
  }
  return slot >= 0 && slot < p.num_slots ? slot : -1;
}

/// The part of B or C that meets a thread's vectors of the state.
template <class T, int kVec, int kLanes, int kVectors>
struct Projection {
  Pack<T, kVec> pack[kVectors];

  __device__ __forceinline__ void load(const View<3>& v, int64_t b, int64_t group, int lane,
                                       int dstate, bool vectors) {
    const T* const row = static_cast<const T*>(v.data) + b * v.stride[0] + group * v.stride[1];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int n = (i * kLanes + lane) * kVec;
      if (n >= dstate) continue;
      if (vectors) {
        pack[i].load(row + n);
      } else {
        Accumulate<T> values[kVec];
#pragma unroll
        for (int e = 0; e < kVec; ++e) values[e] = to_accumulate(row[(n + e) * v.stride[2]]);
        pack[i].round(values);  // exact: they come from T
      }
    }
  }
};

/// How the rows of a call are dealt out to the warps of update_vectors.
struct Tiles {
  unsigned channels;        // tiles of a head
  unsigned batch;           // tiles of the batch
  unsigned heads_of_group;  // that read one group of B and C
  int passes;               // of kItems rows each that a warp makes
  bool vectors_BC;          // B and C allow vectors too
};

template <class T, class S, int kLanes, int kVectors, bool kTied>
__global__ void __launch_bounds__(kThreads, SSU_BLOCKS)
    update_vectors(const SelectiveStateUpdateParams p, const Tiles tiles) {
  using Acc = Accumulate<T>;
  constexpr int kVec = 16 / sizeof(S);
  constexpr int kRows = kWarpSize / kLanes;  // side by side in a warp
  constexpr int kItems = kItemsOf<kVectors, kTied>;
  constexpr int kBatchItems = kTied ? 1 : kItems;
  // What is one number per row is loaded and computed by one lane: item i by lane i % kLanes.
  constexpr int kOwn = (kItems + kLanes - 1) / kLanes;

  const int lane = threadIdx.x % kLanes;
  const unsigned warp_tiles = tiles.channels * static_cast<unsigned>(p.nheads);
  const unsigned tile = blockIdx.x * kWarps + threadIdx.x / kWarpSize;
  const int64_t b0 = int64_t{tile / warp_tiles} * kBatchItems;
  const unsigned head_tile = tile % warp_tiles;
  const unsigned h = head_tile / tiles.channels;
  if (b0 >= p.batch) return;
  const int dstate = static_cast<int>(p.dstate);
  const auto state_index = [&](int v) { return (v * kLanes + lane) * kVec; };  // first of vector v

  // Item i is channel d0 + i * kRows of batch row b0, or channel d0 of batch row b0 + i.
  int64_t d0 = int64_t{head_tile % tiles.channels} * (kTied ? tiles.passes * kItems * kRows : kRows) +
               threadIdx.x % kWarpSize / kLanes;
  const auto batch_row = [&](int i) { return kTied ? b0 : b0 + i; };
  const auto channel = [&](int i) { return kTied ? d0 + i * kRows : d0; };
  const auto exists = [&](int i) { return batch_row(i) < p.batch && channel(i) < p.headdim; };

  // All loads are on their way before anything is converted or computed.
  ParameterBits<Acc, kTied ? 1 : kVectors * kVec> A;
  ParameterBits<Acc, 1> dt_bias;
  Projection<T, kVec, kLanes, kVectors> B[kBatchItems];
  Projection<T, kVec, kLanes, kVectors> C[kBatchItems];
  S* rows[kBatchItems];  // (slot, h, 0, 0), null without a slot
  unsigned with_slot = 0;  // bit i: item i has one
#pragma unroll
  for (int i = 0; i < kBatchItems; ++i) {
    const int64_t slot = batch_row(i) < p.batch ? slot_of(p, batch_row(i)) : -1;
    if (slot >= 0) with_slot |= kTied ? ~0u : 1u << i;
    rows[i] = slot < 0 ? nullptr
                       : static_cast<S*>(p.state.data) + slot * p.state.stride[0] +
                             h * p.state.stride[1] + lane * kVec;
  }
  if (d0 < p.headdim) {
    const int64_t d = kTied ? 0 : d0;
    const unsigned group = h / tiles.heads_of_group;
#pragma unroll
    for (int i = 0; i < kBatchItems; ++i) {
      if (batch_row(i) >= p.batch) continue;
      B[i].load(p.B, batch_row(i), group, lane, dstate, tiles.vectors_BC);
      C[i].load(p.C, batch_row(i), group, lane, dstate, tiles.vectors_BC);
    }
    A.load(p.A.data, p.A.dtype, [&](int i) {
      const int n = state_index(i / kVec) + i % kVec;  // behind dstate: loaded for nothing
      return h * p.A.stride[0] + d * p.A.stride[1] + (n < dstate ? n : 0) * p.A.stride[2];
    });
    if (given(p.dt_bias)) {
      dt_bias.load(p.dt_bias.data, p.dt_bias.dtype, [&](int) {
        return h * p.dt_bias.stride[0] + d * p.dt_bias.stride[1];
      });
    }
  }

  Acc own_delta[kOwn] = {};
  Acc decay = 0;  // tied
  for (int pass = 0; pass < (kTied ? tiles.passes : 1); ++pass) {
    Pack<S, kVec> state[kItems][kVectors];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const S* const row = rows[kTied ? 0 : i];
      if (row == nullptr || !exists(i)) continue;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (state_index(v) >= dstate) continue;
        state[i][v].load(row + channel(i) * p.state.stride[2] + v * kLanes * kVec);
      }
    }
    T own_x[kOwn] = {};
    T own_z[kOwn];
    ParameterBits<Acc, 1> own_dt[kOwn];
    ParameterBits<Acc, 1> own_D[kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int i = j * kLanes + lane;
      if (i >= kItems || !exists(i)) continue;
      const int64_t b = batch_row(i);
      const int64_t d = channel(i);
      own_x[j] = static_cast<const T*>(
          p.x.data)[b * p.x.stride[0] + h * p.x.stride[1] + d * p.x.stride[2]];
      own_dt[j].load(p.dt.data, p.dt.dtype, [&](int) {
        return b * p.dt.stride[0] + h * p.dt.stride[1] + d * p.dt.stride[2];
      });
      if (given(p.z)) {
        own_z[j] = static_cast<const T*>(
            p.z.data)[b * p.z.stride[0] + h * p.z.stride[1] + d * p.z.stride[2]];
      }
      if (given(p.D)) {
        own_D[j].load(p.D.data, p.D.dtype,
                      [&](int) { return h * p.D.stride[0] + d * p.D.stride[1]; });
      }
    }

    Acc own_input[kOwn];  // delta x
    Acc own_sum[kOwn] = {};
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      if (!kTied || pass == 0) {
        Acc delta = own_dt[j].value(p.dt.dtype, 0);
        if (given(p.dt_bias)) delta += dt_bias.value(p.dt_bias.dtype, 0);
        own_delta[j] = p.dt_softplus ? softplus(delta) : delta;
      }
      own_input[j] = own_delta[j] * to_accumulate(own_x[j]);
    }
    if (kTied && pass == 0) {
      // Lane 0 owns item 0, which exists if any does.
      decay = exp(__shfl_sync(kAllLanes, own_delta[0], 0, kLanes) * A.value(p.A.dtype, 0));
    }

#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      S* const row = rows[kTied ? 0 : i];
      const Acc input = __shfl_sync(kAllLanes, own_input[i / kLanes], i % kLanes, kLanes);
      const Acc delta =
          kTied ? Acc(0) : __shfl_sync(kAllLanes, own_delta[i / kLanes], i % kLanes, kLanes);
      Acc sum = 0;
      if (row != nullptr && exists(i)) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          if (state_index(v) >= dstate) continue;
          Acc s[kVec];
#pragma unroll
          for (int e = 0; e < kVec; ++e) {
            const Acc factor =
                kTied ? decay : exp(delta * A.value(p.A.dtype, kTied ? 0 : v * kVec + e));
            s[e] = factor * Acc(state[i][v][e]) + input * B[kTied ? 0 : i].pack[v][e];
            sum += s[e] * C[kTied ? 0 : i].pack[v][e];
          }
          state[i][v].round(s);
          state[i][v].store(row + channel(i) * p.state.stride[2] + v * kLanes * kVec);
        }
      }
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, distance);
      }
      if (lane == i % kLanes) own_sum[i / kLanes] = sum;
    }

#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int i = j * kLanes + lane;
      if (i >= kItems || !exists(i)) continue;
      Acc y = own_sum[j];
      if (given(p.D)) y += own_D[j].value(p.D.dtype, 0) * to_accumulate(own_x[j]);
      if (given(p.z)) y *= silu(to_accumulate(own_z[j]));
      if (!(with_slot >> i & 1)) y = 0;
      static_cast<T*>(p.out.data)[batch_row(i) * p.out.stride[0] + h * p.out.stride[1] +
                                  channel(i) * p.out.stride[2]] = from_accumulate<T>(y);
    }
    d0 += kItems * kRows;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) update_any(const SelectiveStateUpdateParams p) {
  using Acc = Accumulate<T>;
  const int lane = threadIdx.x % kWarpSize;
  int64_t item = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize;
  const int64_t d = item % p.headdim;
  item /= p.headdim;
  const int64_t h = item % p.nheads;
  const int64_t b = item / p.nheads;
  if (b >= p.batch) return;
  const auto element = [&](const View<3>& v, int64_t i, int64_t j, int64_t k) {
    return load_as<Acc>(v.data, v.dtype, i * v.stride[0] + j * v.stride[1] + k * v.stride[2]);
  };
  const int64_t slot = slot_of(p, b);
  Acc sum = 0;
  if (slot >= 0) {
    Acc delta = element(p.dt, b, h, d);
    if (given(p.dt_bias)) {
      delta += load_as<Acc>(p.dt_bias.data, p.dt_bias.dtype,
                            h * p.dt_bias.stride[0] + d * p.dt_bias.stride[1]);
    }
    if (p.dt_softplus) delta = softplus(delta);
    const Acc x = element(p.x, b, h, d);
    const int64_t group = h / (p.nheads / p.ngroups);
    const int64_t row = slot * p.state.stride[0] + h * p.state.stride[1] + d * p.state.stride[2];
    for (int64_t n = lane; n < p.dstate; n += kWarpSize) {
      const int64_t offset = row + n * p.state.stride[3];
      const Acc s = exp(delta * element(p.A, h, d, n)) *
                        load_as<Acc>(p.state.data, p.state.dtype, offset) +
                    delta * x * element(p.B, b, group, n);
      sum += s * element(p.C, b, group, n);
      store_as(p.state.data, p.state.dtype, offset, s);
    }
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, distance);
    }
    if (given(p.D)) {
      sum += load_as<Acc>(p.D.data, p.D.dtype, h * p.D.stride[0] + d * p.D.stride[1]) * x;
    }
    if (given(p.z)) sum *= silu(element(p.z, b, h, d));
  }
  if (lane == 0) {
    static_cast<T*>(
        p.out.data)[b * p.out.stride[0] + h * p.out.stride[1] + d * p.out.stride[2]] =
        from_accumulate<T>(sum);
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T, class S, int kLanes, int kVectors>
void launch_vectors(const SelectiveStateUpdateParams& p, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(S);
  constexpr int kRows = kWarpSize / kLanes;
  const auto allows_packs = [](const View<3>& v) {
    return v.stride[2] == 1 && v.stride[0] % kVec == 0 && v.stride[1] % kVec == 0 &&
           reinterpret_cast<uintptr_t>(v.data) % (kVec * sizeof(T)) == 0;
  };
  const bool tied = p.A.stride[1] == 0 && p.A.stride[2] == 0 && p.dt.stride[2] == 0 &&
                    (!given(p.dt_bias) || p.dt_bias.stride[1] == 0);
  Tiles tiles;
  tiles.heads_of_group = static_cast<unsigned>(p.nheads / p.ngroups);
  tiles.vectors_BC = allows_packs(p.B) && allows_packs(p.C);
  const auto launch = [&](auto tied_arm) {
    const int64_t blocks = ceil_div(int64_t{tiles.channels} * tiles.batch * p.nheads, kWarps);
    update_vectors<T, S, kLanes, kVectors, decltype(tied_arm)::value>
        <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p, tiles);
  };
  if (tied) {
    const int64_t most = ceil_div(p.headdim, kItemsOf<kVectors, true> * kRows);
    const int64_t wanted = int64_t{multiprocessor_count()} * kWarpsPerSm;
    const int64_t passes = p.batch * p.nheads * most / wanted;
    tiles.passes = static_cast<int>(std::clamp<int64_t>(passes, 1, std::min<int64_t>(most, 8)));
    tiles.channels = static_cast<unsigned>(ceil_div(most, tiles.passes));
    tiles.batch = static_cast<unsigned>(p.batch);
    launch(std::true_type{});
  } else {
    tiles.passes = 1;
    tiles.channels = static_cast<unsigned>(ceil_div(p.headdim, kRows));
    tiles.batch = static_cast<unsigned>(ceil_div(p.batch, kItemsOf<kVectors, false>));
    launch(std::false_type{});
  }
}

/// Launches update_vectors if the state has dense and aligned rows of S that fit one of its arms.
template <class T, class S>
bool try_vectors(const SelectiveStateUpdateParams& p, DType dtype, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(S);
  if (p.state.dtype != dtype || p.state.stride[3] != 1 || p.dstate % kVec != 0 ||
      !allows_vectors<S>(p.state.data, p.state.stride[0], p.state.stride[1], p.state.stride[2])) {
    return false;
  }
  constexpr int kSixteen = 16 / kVec;  // vectors that hold 16 states
  if (p.dstate <= 16) {
    launch_vectors<T, S, kSixteen, 1>(p, stream);
  } else if (p.dstate <= 8 * 16) {
    launch_vectors<T, S, 8, kSixteen>(p, stream);
  } else if (p.dstate <= 32 * 16) {
    launch_vectors<T, S, 32, kSixteen>(p, stream);
  } else {
    return false;
  }
  return true;
}

}  // namespace

template <class T>
CudaStatus launch_selective_state_update(const SelectiveStateUpdateParams& p,
                                         CudaStream stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (p.batch == 0 || p.nheads == 0 || p.headdim == 0) return cudaSuccess;
  if constexpr (sizeof(T) <= 4) {
    if (p.dstate > 0) {
      if (try_vectors<T, float>(p, DType::kFloat32, stream)) return cudaGetLastError();
      if constexpr (sizeof(T) == 2) {
        if (try_vectors<T, T>(p, p.dtype, stream)) return cudaGetLastError();
      }
    }
  }
  const int64_t blocks = ceil_div(p.batch * p.nheads * p.headdim, kWarps);
  update_any<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template CudaStatus launch_selective_state_update<MAMBA_SSM_ELEMENT>(
    const SelectiveStateUpdateParams&, CudaStream);

}  // namespace mamba_ssm::kernels
