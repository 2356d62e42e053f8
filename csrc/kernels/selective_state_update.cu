// Selective state update: one decode step of Mamba-1 and Mamba-2.
//
// The states of one (slot, head, channel) are a row. Where rows are dense and aligned, kLanes
// threads own a row, its 16-byte vectors interleaved between them, and work on kItems rows at a
// time so that enough of the state is in flight: channels of one head if the head has one decay (B,
// C and the decay then serve all of them), else batch rows of one channel (which share A, D and
// dt_bias). Everything else: a warp per row, element by element.
//
// At batch 1 a warp's own latency counts, so the vector kernel is sparing with instructions: the
// grid has an axis for each index (no divisions), offsets are products of unsigned indices, and
// what is one number per row is the work of one lane.
#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "launch.cuh"

namespace mamba_ssm::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;

/// log1p(exp(x)) for x <= 20, else x.
template <class Acc>
__device__ __forceinline__ Acc softplus(Acc x) {
  return x <= Acc(20) ? log1p(exp(x)) : x;
}

/// The slot of batch row b, or -1 for a row without one.
__device__ __forceinline__ int64_t slot_of(const SelectiveStateUpdateParams& p, int64_t b) {
  int64_t slot = b;
  if (given(p.state_batch_indices)) {
    slot = load_as<int64_t>(p.state_batch_indices.data, p.state_batch_indices.dtype,
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

/// How the rows of a call are dealt out to the grid of update_vectors: (batch, channels, heads).
struct Tiles {
  int rounds;               // that a warp makes, kItems rows of a thread each
  unsigned heads_of_group;  // that read one group of B and C
  bool packed_BC;           // B and C allow packs, like the state
};

/// Rows that a thread works on at a time: up to 8 vectors of the state in flight; 4 if every row
/// also brings its own B and C.
template <int kLanes, int kVectors, bool kTied>
constexpr int kItemsOf = std::min(kLanes, (kTied ? 8 : 4) / kVectors);

template <class T, class S, int kLanes, int kVectors, bool kTied>
__global__ void __launch_bounds__(kThreads, kLanes == 2 ? 5 : 4)
    update_vectors(const SelectiveStateUpdateParams p, const Tiles tiles) {
  using Acc = Accumulate<T>;
  constexpr int kVec = 16 / sizeof(S);
  constexpr int kRows = kWarpSize / kLanes;  // side by side in a warp
  constexpr int kItems = kItemsOf<kLanes, kVectors, kTied>;
  constexpr int kProjections = kTied ? 1 : kItems;  // of B and C, in registers
  static_assert(kItems >= 1 && kItems <= kLanes);

  const unsigned lane = threadIdx.x % kLanes;
  const unsigned row = threadIdx.x % kWarpSize / kLanes;
  const unsigned tile = blockIdx.y * kWarps + threadIdx.x / kWarpSize;
  const unsigned rows = kItems * tiles.rounds;  // of a thread
  // Item i of a round is channel d0 + i * kRows of batch row b0, or channel d0 of batch row b0 + i.
  unsigned b0 = kTied ? blockIdx.x : blockIdx.x * rows;
  unsigned d0 = (kTied ? tile * rows * kRows : tile * kRows) + row;
  const unsigned h = blockIdx.z;
  const unsigned group = p.ngroups == 1 ? 0 : h / tiles.heads_of_group;
  const unsigned batch = static_cast<unsigned>(p.batch);
  const unsigned headdim = static_cast<unsigned>(p.headdim);
  const unsigned dstate = static_cast<unsigned>(p.dstate);
  if (d0 - row >= headdim) return;
  S* const states = static_cast<S*>(p.state.data);
  const auto batch_row = [&](unsigned i) { return kTied ? b0 : b0 + i; };
  const auto channel = [&](unsigned i) { return kTied ? d0 + i * kRows : d0; };
  const auto exists = [&](unsigned i) { return batch_row(i) < batch && channel(i) < headdim; };
  const auto state_index = [&](int v) { return (v * kLanes + lane) * kVec; };  // first of vector v

  // Loads come first, to be on their way together; nothing is converted before the last of them.
  ParameterBits<Acc, kTied ? 1 : kVec> A[kTied ? 1 : kVectors] = {};
  ParameterBits<Acc, 1> dt_bias = {};
  ParameterBits<Acc, 1> own_D = {};
  ParameterBits<Acc, 1> own_dt = {};
  Pack<T, kVec> B[kProjections][kVectors];
  Pack<T, kVec> C[kProjections][kVectors];
  const auto load_projection = [&](Pack<T, kVec>(&packs)[kVectors], const View<3>& v, unsigned b) {
    const T* const first = static_cast<const T*>(v.data) + offset(v, b, group);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const unsigned n = state_index(i);
      if (n >= dstate) continue;
      if (tiles.packed_BC) {
        packs[i].load(first + n);
      } else {
        Acc values[kVec];
#pragma unroll
        for (int e = 0; e < kVec; ++e) values[e] = to_accumulate(first[(n + e) * v.stride[2]]);
        packs[i].round(values);  // exact: they come from T
      }
    }
  };
  int64_t slot = kTied ? slot_of(p, b0) : 0;
  if (d0 < headdim) {
    if constexpr (kTied) {
      A[0].load(p.A.data, p.A.dtype, h * p.A.stride[0]);
      own_dt.load(p.dt.data, p.dt.dtype, offset(p.dt, b0, h));
      load_projection(B[0], p.B, b0);
      load_projection(C[0], p.C, b0);
    } else {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (state_index(v) >= dstate) continue;
        A[v].load(p.A.data, p.A.dtype, offset(p.A, h, d0, state_index(v)), p.A.stride[2]);
      }
      if (given(p.D)) own_D.load(p.D.data, p.D.dtype, offset(p.D, h, d0));
    }
    if (given(p.dt_bias)) dt_bias.load(p.dt_bias.data, p.dt_bias.dtype, offset(p.dt_bias, h, d0));
  }

  Acc own_delta = 0;
  Acc decay = 0;                               // tied
  Acc log2_decay[kTied ? 1 : kVectors][kVec];  // of delta = 1, not tied
#pragma unroll 1
  for (int round = 0; round < tiles.rounds; ++round) {
    // What is one number per row, lane i loads and computes for item i.
    const bool owner = lane < kItems && exists(lane);
    int64_t own_row = -1;  // offset of the state; negative without a slot
    T own_x = {};
    T own_z = {};
    if (owner) {
      const unsigned b = batch_row(lane);
      const unsigned d = channel(lane);
      if (!kTied) slot = slot_of(p, b);
      if (slot >= 0) own_row = offset(p.state, slot, h, d);
      own_x = static_cast<const T*>(p.x.data)[offset(p.x, b, h, d)];
      if (given(p.z)) own_z = static_cast<const T*>(p.z.data)[offset(p.z, b, h, d)];
      if (!kTied) own_dt.load(p.dt.data, p.dt.dtype, offset(p.dt, b, h, d));
      if (kTied && given(p.D)) own_D.load(p.D.data, p.D.dtype, offset(p.D, h, d));
    }
    int64_t item_row[kItems];
    Pack<S, kVec> state[kItems][kVectors];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      item_row[i] = __shfl_sync(kAllLanes, own_row, i, kLanes);
      if (item_row[i] < 0) continue;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (state_index(v) < dstate) state[i][v].load(states + item_row[i] + state_index(v));
      }
      if constexpr (!kTied) {
        load_projection(B[i], p.B, batch_row(i));
        load_projection(C[i], p.C, batch_row(i));
      }
    }

    if (!kTied || round == 0) {
      own_delta = own_dt.value(p.dt.dtype, 0);
      if (given(p.dt_bias)) own_delta += dt_bias.value(p.dt_bias.dtype, 0);
      if (p.dt_softplus) own_delta = softplus(own_delta);
      if (kTied) decay = exp(own_delta * A[0].value(p.A.dtype, 0));
    }
    if (!kTied && round == 0) {
#pragma unroll
      for (int v = 0; v < (kTied ? 1 : kVectors); ++v) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          log2_decay[v][e] = Acc(kLog2E) * A[v].value(p.A.dtype, kTied ? 0 : e);
        }
      }
    }
    const Acc own_input = own_delta * to_accumulate(own_x);
    Acc own_sum = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const Acc input = __shfl_sync(kAllLanes, own_input, i, kLanes);
      const Acc delta = kTied ? Acc(0) : __shfl_sync(kAllLanes, own_delta, i, kLanes);
      Acc sum = 0;
      if (item_row[i] >= 0) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          if (state_index(v) >= dstate) continue;
          Acc s[kVec];
#pragma unroll
          for (int e = 0; e < kVec; ++e) {
            const Acc factor = kTied ? decay : fast_exp2(delta * log2_decay[kTied ? 0 : v][e]);
            s[e] = factor * Acc(state[i][v][e]) + input * B[kTied ? 0 : i][v][e];
            sum += s[e] * C[kTied ? 0 : i][v][e];
          }
          state[i][v].round(s);
          state[i][v].store(states + item_row[i] + state_index(v));
        }
      }
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, distance);
      }
      if (lane == i) own_sum = sum;
    }

    if (owner) {
      if (own_row >= 0) {
        if (given(p.D)) own_sum += own_D.value(p.D.dtype, 0) * to_accumulate(own_x);
        if (given(p.z)) own_sum *= silu(to_accumulate(own_z));
      }
      static_cast<T*>(p.out.data)[offset(p.out, batch_row(lane), h, channel(lane))] =
          from_accumulate<T>(own_sum);
    }
    b0 += kTied ? 0 : kItems;
    d0 += kTied ? kItems * kRows : 0;
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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// False if the call does not fit a grid of update_vectors.
template <class T, class S, int kLanes, int kVectors>
bool launch_vectors(const SelectiveStateUpdateParams& p, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(S);
  constexpr int kRows = kWarpSize / kLanes;
  constexpr int64_t kMostRounds = 8;
  constexpr int64_t kWarpsPerSm = 64;  // a warp makes more rounds once there are so many
  constexpr int64_t kMostIndex = INT32_MAX / 2;
  constexpr int64_t kMostBlocks = 65535;  // of a grid in y and z
  const auto is_packed = [](const View<3>& v) {
    return v.stride[2] == 1 && v.stride[0] % kVec == 0 && v.stride[1] % kVec == 0 &&
           reinterpret_cast<uintptr_t>(v.data) % (kVec * sizeof(T)) == 0;
  };
  const bool tied = p.A.stride[1] == 0 && p.A.stride[2] == 0 && p.dt.stride[2] == 0 &&
                    (!given(p.dt_bias) || p.dt_bias.stride[1] == 0);
  // Rows of a thread lie along the channels, with at least a block of warps left, or the batch.
  const int64_t items = tied ? kItemsOf<kLanes, kVectors, true> : kItemsOf<kLanes, kVectors, false>;
  const int64_t row_tiles = ceil_div(p.headdim, kRows);
  const int64_t walks = tied ? ceil_div(row_tiles, items) : ceil_div(p.batch, items);
  const int64_t others = tied ? p.batch * p.nheads : p.nheads * row_tiles;
  const int64_t wanted = int64_t{multiprocessor_count()} * kWarpsPerSm;
  const int64_t most = std::min<int64_t>(tied ? walks / kWarps : walks, kMostRounds);
  const int64_t rounds =
      std::clamp<int64_t>(walks * others / wanted, 1, std::max<int64_t>(most, 1));
  Tiles tiles;
  tiles.rounds = static_cast<int>(rounds);
  tiles.heads_of_group = static_cast<unsigned>(p.nheads / p.ngroups);
  tiles.packed_BC = is_packed(p.B) && is_packed(p.C);
  const int64_t batch_blocks = tied ? p.batch : ceil_div(walks, rounds);
  const int64_t channel_blocks = ceil_div(tied ? ceil_div(walks, rounds) : row_tiles, kWarps);
  if (p.batch > kMostIndex || p.headdim > kMostIndex || channel_blocks > kMostBlocks ||
      p.nheads > kMostBlocks) {
    return false;
  }
  const dim3 grid(static_cast<unsigned>(batch_blocks), static_cast<unsigned>(channel_blocks),
                  static_cast<unsigned>(p.nheads));
  if (tied) {
    update_vectors<T, S, kLanes, kVectors, true><<<grid, kThreads, 0, stream>>>(p, tiles);
  } else {
    update_vectors<T, S, kLanes, kVectors, false><<<grid, kThreads, 0, stream>>>(p, tiles);
  }
  return true;
}

/// Launches update_vectors if the state has dense and aligned rows of S that fit one of its arms.
template <class T, class S>
bool try_vectors(const SelectiveStateUpdateParams& p, DType dtype, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(S);
  if (p.state.dtype != dtype || p.state.stride[3] != 1 || p.dstate % kVec != 0 ||
      !allows_vectors<S>(p.state.data, p.state.stride[0], p.state.stride[1], p.state.stride[2])) {
    return false;
  }
  if (p.dstate <= 2 * 8) return launch_vectors<T, S, 2, 8 / kVec>(p, stream);
  if (p.dstate <= 8 * 16) return launch_vectors<T, S, 8, 16 / kVec>(p, stream);
  if (p.dstate <= 32 * 16) return launch_vectors<T, S, 32, 16 / kVec>(p, stream);
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
