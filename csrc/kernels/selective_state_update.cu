// Selective state update: one decode step of Mamba-1 and Mamba-2.
//
// The states of one (slot, head, channel) are a row. Where rows are dense and aligned, kLanes
// threads own a row, its 16-byte vectors interleaved between them, and hold kItems rows in
// registers, all of them on their way at once: neighboring channels of one batch row if each head
// has one decay (kTied; B and C then serve them all), else batch rows of one channel (A, D and
// dt_bias serve them all). Everything else: a warp per row, element by element.
//
// At batch 1 a warp's own latency counts, and in large calls the issue slots, so the vector kernel
// is sparing with instructions: the grid has an axis for each index (no divisions), what is one
// number per row is the work of one lane, and the sums of the rows are halved between the lanes
// until each lane has the row that it loaded the numbers of.
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "launch.cuh"
#include "scan.cuh"

namespace mamba_ssm::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;

/// The slot of batch row b, or -1 for a row without one.
template <class Params>
__device__ __forceinline__ int64_t slot_of(const Params& p, int64_t b) {
  int64_t slot = b;
  if (given(p.state_batch_indices)) {
    slot = load_index(p.state_batch_indices.data, p.state_batch_indices.dtype,
                      b * p.state_batch_indices.stride[0]);
  }
  return slot >= 0 && slot < p.num_slots ? slot : -1;
}

/// Of the element at the given indices; axes left out are at 0.
template <int kRank, class... Index>
__device__ __forceinline__ int64_t offset(const View<kRank>& v, Index... index) {
  int64_t sum = 0;
  int axis = 0;
  ((sum += index * v.stride[axis++]), ...);
  return sum;
}

/// A view whose strides fit 32 bits: a product with an index, 64 bits wide, is one instruction.
template <int kRank>
struct NarrowView {
  void* data;
  DType dtype;
  int32_t stride[kRank];
};

/// A call as update_vectors sees it. The grid is (channels, heads, batch): blocks that run together
/// read what stands together in memory.
struct UpdateVectorsParams {
  unsigned headdim, dstate, batch, num_slots;
  unsigned heads_of_group;  // that read one group of B and C
  bool packed_A;            // float32 and allows vectors
  bool packed_BC;           // B and C allow packs, like the state
  bool dt_softplus;
  View<1> state_batch_indices;
  NarrowView<4> state;
  NarrowView<3> x, dt, z, A, B, C, out;
  NarrowView<2> D, dt_bias;
};

template <int kRank>
__device__ __forceinline__ bool given(const NarrowView<kRank>& v) {
  return v.data != nullptr;
}

/// Of the element at the given indices; axes left out are at 0.
template <int kRank, class... Index>
__device__ __forceinline__ int64_t offset(const NarrowView<kRank>& v, Index... index) {
  int64_t sum = 0;
  int axis = 0;
  ((sum += static_cast<int64_t>(static_cast<int32_t>(index)) * v.stride[axis++]), ...);
  return sum;
}

/// False if a stride does not fit.
template <int kRank>
bool narrow(const View<kRank>& v, NarrowView<kRank>* narrowed) {
  narrowed->data = v.data;
  narrowed->dtype = v.dtype;
  for (int i = 0; i < kRank; ++i) {
    if (v.stride[i] != static_cast<int32_t>(v.stride[i])) return false;
    narrowed->stride[i] = static_cast<int32_t>(v.stride[i]);
  }
  return true;
}

/// Sums each of the kItems values over kLanes lanes; lane l gets that of item l / (kLanes /
/// kItems).
template <int kLanes, int kItems, class Acc>
__device__ __forceinline__ Acc sum_items(Acc (&value)[kItems], unsigned lane) {
  constexpr int kShare = kLanes / kItems;
#pragma unroll
  for (int half = kItems / 2; half > 0; half /= 2) {
    const bool upper = lane & (half * kShare);
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const Acc sent = upper ? value[i] : value[i + half];
      const Acc kept = upper ? value[i + half] : value[i];
      value[i] = kept + __shfl_xor_sync(kAllLanes, sent, half * kShare);
    }
  }
#pragma unroll
  for (int distance = kShare / 2; distance > 0; distance /= 2) {
    value[0] += __shfl_xor_sync(kAllLanes, value[0], distance);
  }
  return value[0];
}

/// Blocks that a multiprocessor should hold: as many as leave registers for the rows of a thread.
template <class S, int kItems, bool kTied>
constexpr int kResident = kItems == 1                ? 4
                          : sizeof(S) == 4 && !kTied ? 8
                          : kTied                    ? 6
                                                     : 4;

/// kTied: one decay per head, A of (nheads) and dt of (batch, nheads).
template <class T, class S, int kLanes, int kVectors, int kItems, bool kTied>
__global__ void __launch_bounds__(kThreads, kResident<S, kItems, kTied>)
    update_vectors(const UpdateVectorsParams p) {
  using Acc = Accumulate<T>;
  constexpr int kVec = 16 / sizeof(S);
  constexpr int kShare = kLanes / kItems;
  constexpr int kChannels = kTied ? kItems : 1;  // of a thread
  constexpr int kRows = kTied ? 1 : kItems;      // batch rows of a thread
  static_assert(kShare >= 1);

  // Item i is channel d0 + i of batch row b0, or channel d0 of batch row b0 + i.
  const unsigned lane = threadIdx.x % kLanes;
  const unsigned own = lane / kShare;  // the item whose numbers this lane looks after
  const unsigned first = threadIdx.x % kWarpSize / kLanes * kChannels;
  const unsigned warp = blockIdx.x * kWarps + threadIdx.x / kWarpSize;
  const unsigned d0 = warp * (kWarpSize / kLanes * kChannels) + first;
  const unsigned b0 = blockIdx.z * kRows;
  const unsigned h = blockIdx.y;
  const unsigned d = kTied ? d0 + own : d0;
  const unsigned b = kTied ? b0 : b0 + own;
  if (d0 - first >= p.headdim) return;
  const auto state_index = [&](int v) { return (v * kLanes + lane) * kVec; };  // first of vector v

  // Loads come first, to be on their way together; nothing is converted before the last of them.
  int32_t slot[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) slot[i] = b0 + i < p.batch ? slot_of(p, b0 + i) : -1;
  const auto exists = [&](int i) {
    return kTied ? slot[0] >= 0 && d0 + i < p.headdim : slot[kTied ? 0 : i] >= 0 && d0 < p.headdim;
  };
  const auto state_row = [&](int i) {
    return static_cast<S*>(p.state.data) +
           offset(p.state, slot[kTied ? 0 : i], h, kTied ? d0 + i : d0) + lane * kVec;
  };
  Pack<S, kVec> state[kItems][kVectors];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (!exists(i)) continue;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (state_index(v) < p.dstate) state[i][v].load(state_row(i) + v * kLanes * kVec);
    }
  }
  ParameterBits<Acc, kTied ? 1 : kVec> A[kTied ? 1 : kVectors] = {};
  ParameterBits<Acc, 1> dt = {};
  ParameterBits<Acc, 1> dt_bias = {};
  ParameterBits<Acc, 1> D = {};
  T x = {};
  T z = {};
  const bool owner = b < p.batch && d < p.headdim;
  if (owner) {
    dt.load(p.dt.data, p.dt.dtype, offset(p.dt, b, h, d));
    if (given(p.dt_bias)) dt_bias.load(p.dt_bias.data, p.dt_bias.dtype, offset(p.dt_bias, h, d));
    x = static_cast<const T*>(p.x.data)[offset(p.x, b, h, d)];
    if (given(p.z)) z = static_cast<const T*>(p.z.data)[offset(p.z, b, h, d)];
    if (given(p.D)) D.load(p.D.data, p.D.dtype, offset(p.D, h, d));
  }
  if constexpr (kTied) {
    A[0].load(p.A.data, p.A.dtype, offset(p.A, h));
  } else {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (d0 >= p.headdim || state_index(v) >= p.dstate) continue;
      const int64_t from = offset(p.A, h, d0, state_index(v));
      if (p.packed_A) {
        A[v].load_floats(static_cast<const float*>(p.A.data) + from);
      } else {
        A[v].load(p.A.data, p.A.dtype, from, p.A.stride[2]);
      }
    }
  }
  const unsigned group = p.heads_of_group == gridDim.y ? 0 : h / p.heads_of_group;
  Pack<T, kVec> B[kRows][kVectors] = {};
  Pack<T, kVec> C[kRows][kVectors] = {};
  const auto load_projection = [&](Pack<T, kVec>(&packs)[kVectors], const NarrowView<3>& view,
                                   unsigned row) {
    const T* const from = static_cast<const T*>(view.data) + offset(view, row, group);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const unsigned n = state_index(v);
      if (n >= p.dstate) continue;
      if (p.packed_BC) {
        packs[v].load(from + n);
      } else {
        Acc values[kVec];
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          values[e] = to_accumulate(from[offset(view, 0, 0, n + e)]);
        }
        packs[v].round(values);  // exact: they come from T
      }
    }
  };
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (slot[i] < 0) continue;
    load_projection(B[i], p.B, b0 + i);
    load_projection(C[i], p.C, b0 + i);
  }

  Acc delta = dt.value(p.dt.dtype, 0);
  if (given(p.dt_bias)) delta += dt_bias.value(p.dt_bias.dtype, 0);
  if (p.dt_softplus) delta = softplus(delta);
  const Acc own_input = delta * to_accumulate(x);
  // What a whole row shares of its decays: the decay, or the step.
  Acc own_decay = Acc(kLog2E) * delta;
  if (kTied) own_decay = fast_exp2(own_decay * A[0].value(p.A.dtype, 0));
  Acc sums[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const Acc input = __shfl_sync(kAllLanes, own_input, i * kShare, kLanes);
    const Acc decay = __shfl_sync(kAllLanes, own_decay, i * kShare, kLanes);
    sums[i] = 0;
    if (!exists(i)) continue;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (state_index(v) >= p.dstate) continue;
      Acc s[kVec];
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        const Acc factor = kTied ? decay : fast_exp2(decay * A[kTied ? 0 : v].value(p.A.dtype, e));
        s[e] = factor * Acc(state[i][v][e]) + input * B[kTied ? 0 : i][v][e];
        sums[i] += s[e] * C[kTied ? 0 : i][v][e];
      }
      state[i][v].round(s);
      state[i][v].store_streaming(state_row(i) + v * kLanes * kVec);
    }
  }
  Acc y = sum_items<kLanes>(sums, lane);
  if (lane % kShare == 0 && owner) {
    if (given(p.D)) y += D.value(p.D.dtype, 0) * to_accumulate(x);
    if (given(p.z)) y *= silu(to_accumulate(z));
    bool there = slot[0] >= 0;
#pragma unroll
    for (int i = 1; i < kRows; ++i) {
      if (own == i) there = slot[i] >= 0;
    }
    static_cast<T*>(p.out.data)[offset(p.out, b, h, d)] = from_accumulate<T>(there ? y : Acc(0));
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
    return load_as<Acc>(v.data, v.dtype, offset(v, i, j, k));
  };
  const int64_t slot = slot_of(p, b);
  Acc sum = 0;
  if (slot >= 0) {
    Acc delta = element(p.dt, b, h, d);
    if (given(p.dt_bias)) {
      delta += load_as<Acc>(p.dt_bias.data, p.dt_bias.dtype, offset(p.dt_bias, h, d));
    }
    if (p.dt_softplus) delta = softplus(delta);
    const Acc x = element(p.x, b, h, d);
    const int64_t group = h / (p.nheads / p.ngroups);
    for (int64_t n = lane; n < p.dstate; n += kWarpSize) {
      const int64_t state = offset(p.state, slot, h, d, n);
      const Acc s =
          exp(delta * element(p.A, h, d, n)) * load_as<Acc>(p.state.data, p.state.dtype, state) +
          delta * x * element(p.B, b, group, n);
      sum += s * element(p.C, b, group, n);
      store_as(p.state.data, p.state.dtype, state, s);
    }
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, distance);
    }
    if (given(p.D)) {
      sum += load_as<Acc>(p.D.data, p.D.dtype, offset(p.D, h, d)) * x;
    }
    if (given(p.z)) sum *= silu(element(p.z, b, h, d));
  }
  if (lane == 0) {
    static_cast<T*>(p.out.data)[offset(p.out, b, h, d)] = from_accumulate<T>(sum);
  }
}

/// False if the call does not fit update_vectors.
template <class T, class S, int kLanes, int kVectors, int kItems, bool kTied>
bool launch_arm(const SelectiveStateUpdateParams& p, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(S);
  constexpr int kChannels = kThreads / kLanes * (kTied ? kItems : 1);  // of a block
  constexpr int64_t kMostBlocks = 65535;                               // of a grid in y and z
  const auto is_packed = [](const View<3>& v) {
    return v.stride[2] == 1 && v.stride[0] % kVec == 0 && v.stride[1] % kVec == 0 &&
           reinterpret_cast<uintptr_t>(v.data) % (kVec * sizeof(T)) == 0;
  };
  UpdateVectorsParams v;
  v.headdim = static_cast<unsigned>(p.headdim);
  v.dstate = static_cast<unsigned>(p.dstate);
  v.batch = static_cast<unsigned>(p.batch);
  v.num_slots = static_cast<unsigned>(p.num_slots);
  v.heads_of_group = static_cast<unsigned>(p.nheads / p.ngroups);
  v.packed_A = p.A.dtype == DType::kFloat32 && p.A.stride[2] == 1 &&
               allows_vectors<float>(p.A.data, p.A.stride[0], p.A.stride[1]);
  v.packed_BC = is_packed(p.B) && is_packed(p.C);
  v.dt_softplus = p.dt_softplus;
  v.state_batch_indices = p.state_batch_indices;
  const bool fits = narrow(p.state, &v.state) && narrow(p.x, &v.x) && narrow(p.dt, &v.dt) &&
                    narrow(p.z, &v.z) && narrow(p.A, &v.A) && narrow(p.B, &v.B) &&
                    narrow(p.C, &v.C) && narrow(p.out, &v.out) && narrow(p.D, &v.D) &&
                    narrow(p.dt_bias, &v.dt_bias);
  const int64_t batch_blocks = ceil_div(p.batch, kTied ? 1 : kItems);
  if (!fits || std::max(p.headdim, p.num_slots) > INT32_MAX / 2 || batch_blocks > kMostBlocks ||
      p.nheads > kMostBlocks) {
    return false;
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(p.headdim, kChannels)),
                  static_cast<unsigned>(p.nheads), static_cast<unsigned>(batch_blocks));
  update_vectors<T, S, kLanes, kVectors, kItems, kTied><<<grid, kThreads, 0, stream>>>(v);
  return true;
}

/// Rows of up to kLanes * kVectors vectors. In a large call a thread holds as many rows as
/// registers allow; in a small one, one row: there a warp's own latency counts.
template <class T, class S, int kLanes, int kVectors>
bool launch_vectors(const SelectiveStateUpdateParams& p, cudaStream_t stream) {
  constexpr int64_t kThreadsPerSm = 1024;
  constexpr int kTiedItems = std::min(kLanes, 8 / kVectors);
  constexpr int kItems = std::min(kLanes, 4 / kVectors);
  const bool tied = p.A.stride[1] == 0 && p.A.stride[2] == 0 && p.dt.stride[2] == 0 &&
                    (!given(p.dt_bias) || p.dt_bias.stride[1] == 0);
  const int64_t threads = p.batch * p.nheads * p.headdim * kLanes;
  if (threads <= multiprocessor_count() * kThreadsPerSm) {
    return tied ? launch_arm<T, S, kLanes, kVectors, 1, true>(p, stream)
                : launch_arm<T, S, kLanes, kVectors, 1, false>(p, stream);
  }
  return tied ? launch_arm<T, S, kLanes, kVectors, kTiedItems, true>(p, stream)
              : launch_arm<T, S, kLanes, kVectors, kItems, false>(p, stream);
}

/// Launches update_vectors if the state has dense and aligned rows of S that fit one of its arms.
template <class T, class S>
bool try_vectors(const SelectiveStateUpdateParams& p, DType dtype, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(S);
  if (p.state.dtype != dtype || p.state.stride[3] != 1 || p.dstate % kVec != 0 ||
      !allows_vectors<S>(p.state.data, p.state.stride[0], p.state.stride[1], p.state.stride[2])) {
    return false;
  }
  if (p.dstate <= 16) return launch_vectors<T, S, 16 / kVec, 1>(p, stream);
  if (p.dstate <= 64) return launch_vectors<T, S, 64 / kVec, 1>(p, stream);
  if (p.dstate <= 128) return launch_vectors<T, S, 128 / kVec, 1>(p, stream);
  if (p.dstate <= 512) return launch_vectors<T, S, kWarpSize, 16 / kVec>(p, stream);
  return false;
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
