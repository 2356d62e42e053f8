// Selective state update: decode steps of Mamba-1 and Mamba-2.
//
// The states of one (slot, head, channel) are a row. Where rows are dense and aligned, kLanes
// threads own a row, its 16-byte vectors interleaved between them, and hold kItems rows in
// registers, all of them on their way at once: neighboring channels of one batch row if each head
// has one decay (kTied; B and C then serve them all), else batch rows of one channel (A, D and
// dt_bias serve them all). Everything else: a warp per row, element by element.
//
// Several tokens of a call follow one another in the same threads, in the same order of operations
// as calls of one token each, with the rows in registers all along (kTokens).
//
// At batch 1 a warp's own latency counts, and in large calls the issue slots, so the vector kernel
// is sparing with instructions: the grid has an axis for each index (no divisions), what is one
// number per row is the work of one lane, and the sums of the rows are halved between the lanes
// until each lane has the row that it loaded the numbers of. In a small call the addresses are
// computed while the kernel before is still at work (kEarly).
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
  bool starts_next_early;   // the next kernel, before the loads and not behind them
  bool dt_softplus, A_is_log;
  View<1> state_batch_indices;
  NarrowView<4> state;
  NarrowView<3> x, dt, z, A, B, C, out;  // of one token
  NarrowView<2> D, dt_bias;
  // The rest is read by a call of several tokens, or with intermediate_states.
  int tokens;
  struct {
    int64_t x, dt, z, B, C, out;
  } token_stride;
  bool packed_intermediate;  // of the state's type, allows vectors
  View<5> intermediate_states;
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

/// Where the element at the given indices is, computed here and not where it is used. No element
/// has 64 bits.
template <int kRank, class... Index>
__device__ __forceinline__ const void* early_address(const NarrowView<kRank>& v, Index... index) {
  const void* address =
      static_cast<const char*>(v.data) +
      offset(v, index...) * (v.dtype == DType::kFloat32 ? sizeof(float) : sizeof(Half));
  asm volatile("" : "+l"(address));
  __builtin_assume(__isGlobal(address));
  return address;
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

/// Stores the states of channel d from n on as they are after token t.
template <class S, int kVec>
__device__ __forceinline__ void store_intermediate(const UpdateVectorsParams& p,
                                                   const Accumulate<S> (&s)[kVec], unsigned b,
                                                   int t, unsigned h, unsigned d, unsigned n) {
  const View<5>& v = p.intermediate_states;
  const int64_t to = offset(v, b, t, h, d, n);
  if (p.packed_intermediate) {
    Pack<S, kVec> rounded;
    rounded.round(s);
    rounded.store_streaming(static_cast<S*>(v.data) + to);
    return;
  }
#pragma unroll
  for (int e = 0; e < kVec; ++e) store_as(v.data, v.dtype, to + e * v.stride[4], s[e]);
}

/// Blocks that a multiprocessor should hold: as many as leave registers for the rows of a thread.
template <class S, int kItems, bool kTied, bool kTokens>
constexpr int kResident = kItems == 1 || kTokens     ? 4
                          : sizeof(S) == 4 && !kTied ? 8
                          : kTied                    ? 6
                                                     : 4;

/// kTied: one decay per head, A of (nheads) and dt of (batch, tokens, nheads).
/// kTokens: any number of tokens, and intermediate_states; else one token.
template <class T, class S, int kLanes, int kVectors, int kItems, bool kTied, bool kTokens>
__global__ void __launch_bounds__(kThreads, kResident<S, kItems, kTied, kTokens>)
    update_vectors(const UpdateVectorsParams p) {
  using Acc = Accumulate<T>;
  constexpr int kVec = 16 / sizeof(S);
  constexpr int kShare = kLanes / kItems;
  constexpr int kChannels = kTied ? kItems : 1;  // of a thread
  constexpr int kRows = kTied ? 1 : kItems;      // batch rows of a thread
  // A token is loaded while the one before is at work.
  constexpr bool kAhead = kTokens && kItems * kVectors == 1;
  constexpr bool kEarly = !kTokens && kItems == 1;
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
  const auto state_index = [&](int v) { return (v * kLanes + lane) * kVec; };  // first of vector v
  const unsigned group = p.heads_of_group == gridDim.y ? 0 : h / p.heads_of_group;
  if (p.starts_next_early) let_next_start();
  struct {
    const void *state, *dt, *dt_bias, *x, *z, *D, *A, *B, *C, *out;
  } early = {};
  if constexpr (kEarly) {
    const unsigned n = state_index(0);
    early = {early_address(p.state, 0, h, d0, n),
             early_address(p.dt, b, h, d),
             early_address(p.dt_bias, h, d),
             early_address(p.x, b, h, d),
             early_address(p.z, b, h, d),
             early_address(p.D, h, d),
             early_address(p.A, h, d0, kTied ? 0 : n),
             early_address(p.B, b, group, n),
             early_address(p.C, b, group, n),
             early_address(p.out, b, h, d)};
  }
  wait_for_previous();
  if (d0 - first >= p.headdim) return;

  // Loads come first, to be on their way together; nothing is converted before the last of them.
  int32_t slot[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) slot[i] = b0 + i < p.batch ? slot_of(p, b0 + i) : -1;
  const auto exists = [&](int i) {
    return kTied ? slot[0] >= 0 && d0 + i < p.headdim : slot[kTied ? 0 : i] >= 0 && d0 < p.headdim;
  };
  const auto state_row = [&](int i) {
    const auto data = static_cast<S*>(kEarly ? const_cast<void*>(early.state) : p.state.data);
    return data +
           (kEarly ? offset(p.state, slot[0])
                   : offset(p.state, slot[kTied ? 0 : i], h, kTied ? d0 + i : d0) + lane * kVec);
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
  ParameterBits<Acc, 1> dt_bias = {};
  ParameterBits<Acc, 1> D = {};
  struct Token {
    ParameterBits<Acc, 1> dt = {};
    T x = {};
    T z = {};
    Pack<T, kVec> B[kRows][kVectors] = {};
    Pack<T, kVec> C[kRows][kVectors] = {};
  } token;
  const bool owner = b < p.batch && d < p.headdim;
  const auto load_number = [&](auto& bits, const auto& view, const void* early, int64_t token,
                               auto... index) {
    kEarly ? bits.load(early, view.dtype, 0)
           : bits.load(view.data, view.dtype, offset(view, index...) + token);
  };
  const auto activation = [&](const NarrowView<3>& view, const void* early, int64_t token) {
    return kEarly ? *static_cast<const T*>(early)
                  : static_cast<const T*>(view.data)[offset(view, b, h, d) + token];
  };
  const auto load_numbers = [&](Token& token, int64_t t) {  // and with the first what all share
    if (!owner) return;
    load_number(token.dt, p.dt, early.dt, t * p.token_stride.dt, b, h, d);
    if (t == 0 && given(p.dt_bias)) load_number(dt_bias, p.dt_bias, early.dt_bias, 0, h, d);
    token.x = activation(p.x, early.x, t * p.token_stride.x);
    if (given(p.z)) token.z = activation(p.z, early.z, t * p.token_stride.z);
    if (t == 0 && given(p.D)) load_number(D, p.D, early.D, 0, h, d);
  };
  load_numbers(token, 0);
  if constexpr (kTied) {
    load_number(A[0], p.A, early.A, 0, h);
  } else {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (d0 >= p.headdim || state_index(v) >= p.dstate) continue;
      const void* const data = kEarly ? early.A : p.A.data;
      const int64_t from =
          kEarly ? offset(p.A, 0, 0, v * kLanes * kVec) : offset(p.A, h, d0, state_index(v));
      if (p.packed_A) {
        A[v].load_floats(static_cast<const float*>(data) + from);
      } else {
        A[v].load(data, p.A.dtype, from, p.A.stride[2]);
      }
    }
  }
  const auto load_projection = [&](Pack<T, kVec>(&packs)[kVectors], const NarrowView<3>& view,
                                   const void* early, unsigned row, int64_t token_offset) {
    const T* const from = static_cast<const T*>(kEarly ? early : view.data) +
                          (kEarly ? 0 : offset(view, row, group) + token_offset);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (state_index(v) >= p.dstate) continue;
      const unsigned n = kEarly ? v * kLanes * kVec : state_index(v);
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
  const auto load_projections = [&](Token& token, int64_t t) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (slot[i] < 0) continue;
      load_projection(token.B[i], p.B, early.B, b0 + i, t * p.token_stride.B);
      load_projection(token.C[i], p.C, early.C, b0 + i, t * p.token_stride.C);
    }
  };
  load_projections(token, 0);
  if (!p.starts_next_early) let_next_start();

  Acc rate[kTied ? 1 : kVectors][kTied ? 1 : kVec];  // A
#pragma unroll
  for (int v = 0; v < (kTied ? 1 : kVectors); ++v) {
#pragma unroll
    for (int e = 0; e < (kTied ? 1 : kVec); ++e) {
      rate[v][e] = A[v].value(p.A.dtype, e);
      if (p.A_is_log) rate[v][e] = -fast_exp2(Acc(kLog2E) * rate[v][e]);
    }
  }

  // With several tokens the states are kept as sums are, and rounded at the end.
  Acc held[kTokens ? kItems : 1][kTokens ? kVectors : 1][kVec] = {};
  if constexpr (kTokens) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (!exists(i) || state_index(v) >= p.dstate) continue;
#pragma unroll
        for (int e = 0; e < kVec; ++e) held[i][v][e] = state[i][v][e];
      }
    }
  }
  const int tokens = kTokens ? p.tokens : 1;
  for (int t = 0;;) {
    Token next;
    if (kAhead && t + 1 < tokens) {
      load_numbers(next, t + 1);
      load_projections(next, t + 1);
    }
    Acc delta = token.dt.value(p.dt.dtype, 0);
    if (given(p.dt_bias)) delta += dt_bias.value(p.dt_bias.dtype, 0);
    if (p.dt_softplus) delta = softplus(delta);
    const Acc own_input = delta * to_accumulate(token.x);
    // What a whole row shares of its decays: the decay, or the step.
    Acc own_decay = Acc(kLog2E) * delta;
    if (kTied) own_decay = fast_exp2(own_decay * rate[0][0]);
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
          const Acc factor = kTied ? decay : fast_exp2(decay * rate[kTied ? 0 : v][kTied ? 0 : e]);
          const Acc before = kTokens ? held[kTokens ? i : 0][kTokens ? v : 0][e] : state[i][v][e];
          s[e] = factor * before + input * token.B[kTied ? 0 : i][v][e];
          sums[i] += s[e] * token.C[kTied ? 0 : i][v][e];
        }
        if constexpr (kTokens) {
#pragma unroll
          for (int e = 0; e < kVec; ++e) held[i][v][e] = s[e];
          if (given(p.intermediate_states)) {
            store_intermediate<S>(p, s, kTied ? b0 : b0 + i, t, h, kTied ? d0 + i : d0,
                                  state_index(v));
          }
        } else {
          state[i][v].round(s);
          state[i][v].store_streaming(state_row(i) + v * kLanes * kVec);
        }
      }
    }
    Acc y = sum_items<kLanes>(sums, lane);
    if (lane % kShare == 0 && owner) {
      if (given(p.D)) y += D.value(p.D.dtype, 0) * to_accumulate(token.x);
      if (given(p.z)) y *= silu(to_accumulate(token.z));
      bool there = slot[0] >= 0;
#pragma unroll
      for (int i = 1; i < kRows; ++i) {
        if (own == i) there = slot[i] >= 0;
      }
      T* const out =
          kEarly ? static_cast<T*>(const_cast<void*>(early.out))
                 : static_cast<T*>(p.out.data) + offset(p.out, b, h, d) + t * p.token_stride.out;
      *out = from_accumulate<T>(there ? y : Acc(0));
    }
    if (!kTokens || ++t == tokens) break;
    if (kAhead) {
      token = next;
    } else {
      load_numbers(token, t);
      load_projections(token, t);
    }
  }
  if constexpr (kTokens) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!exists(i)) continue;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (state_index(v) >= p.dstate) continue;
        state[i][v].round(held[i][v]);
        state[i][v].store_streaming(state_row(i) + v * kLanes * kVec);
      }
    }
  }
}

/// A warp per row, kTokens of its tokens at a time: each has a sum under way. kTokens = 1 is for a
/// call of one token without intermediate_states.
template <class T, int kTokens>
__global__ void __launch_bounds__(kThreads) update_any(const SelectiveStateUpdateParams p) {
  using Acc = Accumulate<T>;
  constexpr bool kAlone = kTokens == 1;
  const int lane = threadIdx.x % kWarpSize;
  const auto element = [&](const auto& v, auto... index) {
    return load_as<Acc>(v.data, v.dtype, offset(v, index...));
  };
  // A state of type Acc holds what the next tokens start from. One of 16 bits stays as it was
  // before the call until the last token, and the tokens before t0 advance it anew.
  const bool exact =
      p.state.dtype == (sizeof(Acc) == sizeof(double) ? DType::kFloat64 : DType::kFloat32);
  const int64_t rows = p.batch * p.nheads * p.headdim;
  for (int64_t row = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize; row < rows;
       row += gridDim.x * int64_t{kWarps}) {
    const int64_t d = row % p.headdim;
    const int64_t h = row / p.headdim % p.nheads;
    const int64_t b = row / p.headdim / p.nheads;
    const int64_t group = h / (p.nheads / p.ngroups);
    const int64_t slot = slot_of(p, b);
    const auto step = [&](int64_t t) {
      Acc delta = element(p.dt, b, t, h, d);
      if (given(p.dt_bias)) delta += element(p.dt_bias, h, d);
      return p.dt_softplus ? softplus(delta) : delta;
    };
    for (int64_t t0 = 0; t0 < (kAlone ? 1 : p.tokens); t0 += kTokens) {
      const int count =
          kAlone ? 1 : static_cast<int>(min(p.tokens - t0, static_cast<int64_t>(kTokens)));
      Acc sums[kTokens] = {};
      if (slot >= 0) {
        Acc delta[kTokens];
        Acc x[kTokens];
#pragma unroll 1
        for (int k = 0; k < count; ++k) {
          delta[k] = step(t0 + k);
          x[k] = element(p.x, b, t0 + k, h, d);
        }
        for (int64_t n = lane; n < p.dstate; n += kWarpSize) {
          const int64_t state = offset(p.state, slot, h, d, n);
          Acc A = element(p.A, h, d, n);
          if (p.A_is_log) A = -exp(A);
          Acc s = load_as<Acc>(p.state.data, p.state.dtype, state);
          const auto advance = [&](int64_t t, Acc delta, Acc x) {
            s = fma(exp(delta * A), s, delta * x * element(p.B, b, t, group, n));
          };
          if (!kAlone && !exact) {
#pragma unroll 1
            for (int64_t t = 0; t < t0; ++t) advance(t, step(t), element(p.x, b, t, h, d));
          }
#pragma unroll 1
          for (int k = 0; k < count; ++k) {
            advance(t0 + k, delta[k], x[k]);
            sums[k] = fma(s, element(p.C, b, t0 + k, group, n), sums[k]);
            if (!kAlone && given(p.intermediate_states)) {
              const View<5>& v = p.intermediate_states;
              store_as(v.data, v.dtype, offset(v, b, t0 + k, h, d, n), s);
            }
          }
          if (kAlone || exact || t0 + count == p.tokens) {
            store_as(p.state.data, p.state.dtype, state, s);
          }
        }
      }
#pragma unroll 1
      for (int k = 0; k < count; ++k) {
        Acc y = sums[k];
#pragma unroll
        for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
          y += __shfl_xor_sync(kAllLanes, y, distance);
        }
        if (lane != 0) continue;
        if (slot >= 0) {
          if (given(p.D)) y = fma(element(p.D, h, d), element(p.x, b, t0 + k, h, d), y);
          if (given(p.z)) y *= silu(element(p.z, b, t0 + k, h, d));
        }
        static_cast<T*>(p.out.data)[offset(p.out, b, t0 + k, h, d)] = from_accumulate<T>(y);
      }
    }
  }
}

/// False if the call does not fit update_vectors.
template <class T, class S, int kLanes, int kVectors, int kItems, bool kTied, bool kTokens>
bool launch_arm(const SelectiveStateUpdateParams& p, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(S);
  constexpr int kChannels = kThreads / kLanes * (kTied ? kItems : 1);  // of a block
  constexpr int64_t kMostBlocks = 65535;                               // of a grid in y and z
  const auto is_packed = [](const View<4>& v) {
    return v.stride[3] == 1 && v.stride[0] % kVec == 0 && v.stride[1] % kVec == 0 &&
           v.stride[2] % kVec == 0 && reinterpret_cast<uintptr_t>(v.data) % (kVec * sizeof(T)) == 0;
  };
  const auto of_token = [](const View<4>& v) {
    return View<3>{v.data, v.dtype, {v.stride[0], v.stride[2], v.stride[3]}};
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
  v.A_is_log = p.A_is_log;
  v.state_batch_indices = p.state_batch_indices;
  v.tokens = static_cast<int>(p.tokens);
  v.token_stride = {p.x.stride[1], p.dt.stride[1], p.z.stride[1],
                    p.B.stride[1], p.C.stride[1],  p.out.stride[1]};
  const View<5>& states = p.intermediate_states;
  v.packed_intermediate = states.dtype == p.state.dtype && states.stride[4] == 1 &&
                          allows_vectors<S>(states.data, states.stride[0], states.stride[1],
                                            states.stride[2], states.stride[3]);
  v.intermediate_states = states;
  const bool fits = narrow(p.state, &v.state) && narrow(of_token(p.x), &v.x) &&
                    narrow(of_token(p.dt), &v.dt) && narrow(of_token(p.z), &v.z) &&
                    narrow(p.A, &v.A) && narrow(of_token(p.B), &v.B) &&
                    narrow(of_token(p.C), &v.C) && narrow(of_token(p.out), &v.out) &&
                    narrow(p.D, &v.D) && narrow(p.dt_bias, &v.dt_bias);
  const int64_t batch_blocks = ceil_div(p.batch, kTied ? 1 : kItems);
  if (!fits || std::max({p.headdim, p.num_slots, p.tokens}) > INT32_MAX / 2 ||
      batch_blocks > kMostBlocks || p.nheads > kMostBlocks) {
    return false;
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(p.headdim, kChannels)),
                  static_cast<unsigned>(p.nheads), static_cast<unsigned>(batch_blocks));
  // The blocks of the next kernel must not be in the way of those that have not loaded yet, nor of
  // their loads, which are the fewest in a block of single rows of their own decays.
  constexpr int kBlocks = kTied || kItems > 1 ? 1 : 4;  // of a multiprocessor
  v.starts_next_early = int64_t{grid.x} * grid.y * grid.z <= kBlocks * multiprocessor_count();
  launch_overlapped<update_vectors<T, S, kLanes, kVectors, kItems, kTied, kTokens>>(grid, kThreads,
                                                                                    0, stream, v);
  return true;
}

/// Rows of up to kLanes * kVectors vectors. In a large call a thread holds as many rows as
/// registers allow; in a small one, one row: there a warp's own latency counts.
template <class T, class S, int kLanes, int kVectors, bool kTokens>
bool launch_vectors(const SelectiveStateUpdateParams& p, cudaStream_t stream) {
  constexpr int64_t kThreadsPerSm = 1024;
  // A held state of 16 bits takes twice its registers.
  constexpr int kMost = kTokens ? 2 * sizeof(S) : 8;  // vectors of tied rows
  constexpr int kTiedItems = std::min(kLanes, kMost / kVectors);
  constexpr int kItems = std::min(kLanes, kMost / 2 / kVectors);
  const bool tied = p.A.stride[1] == 0 && p.A.stride[2] == 0 && p.dt.stride[3] == 0 &&
                    (!given(p.dt_bias) || p.dt_bias.stride[1] == 0);
  const int64_t threads = p.batch * p.nheads * p.headdim * kLanes;
  if (threads <= multiprocessor_count() * kThreadsPerSm) {
    return tied ? launch_arm<T, S, kLanes, kVectors, 1, true, kTokens>(p, stream)
                : launch_arm<T, S, kLanes, kVectors, 1, false, kTokens>(p, stream);
  }
  return tied ? launch_arm<T, S, kLanes, kVectors, kTiedItems, true, kTokens>(p, stream)
              : launch_arm<T, S, kLanes, kVectors, kItems, false, kTokens>(p, stream);
}

/// Launches update_vectors if the state has dense and aligned rows of S that fit one of its arms.
template <class T, class S, bool kTokens>
bool try_vectors(const SelectiveStateUpdateParams& p, DType dtype, cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(S);
  if (p.state.dtype != dtype || p.state.stride[3] != 1 || p.dstate % kVec != 0 ||
      !allows_vectors<S>(p.state.data, p.state.stride[0], p.state.stride[1], p.state.stride[2])) {
    return false;
  }
  if (p.dstate <= 16) return launch_vectors<T, S, 16 / kVec, 1, kTokens>(p, stream);
  if (p.dstate <= 64) return launch_vectors<T, S, 64 / kVec, 1, kTokens>(p, stream);
  if (p.dstate <= 128) return launch_vectors<T, S, 128 / kVec, 1, kTokens>(p, stream);
  if (p.dstate <= 512) return launch_vectors<T, S, kWarpSize, 16 / kVec, kTokens>(p, stream);
  return false;
}

template <class T, bool kTokens>
cudaError_t launch(const SelectiveStateUpdateParams& p, cudaStream_t stream) {
  if constexpr (sizeof(T) <= 4) {
    if (p.dstate > 0) {
      if (try_vectors<T, float, kTokens>(p, DType::kFloat32, stream)) return cudaGetLastError();
      if constexpr (sizeof(T) == 2) {
        if (try_vectors<T, T, kTokens>(p, p.dtype, stream)) return cudaGetLastError();
      }
    }
  }
  const int64_t blocks = ceil_div(p.batch * p.nheads * p.headdim, kWarps);
  update_any<T, kTokens ? 8 : 1>
      <<<static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX)), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

template <class T>
CudaStatus launch_selective_state_update(const SelectiveStateUpdateParams& p,
                                         CudaStream stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (p.batch == 0 || p.tokens == 0 || p.nheads == 0 || p.headdim == 0) return cudaSuccess;
  const bool one_token = p.tokens == 1 && !given(p.intermediate_states);
  return one_token ? launch<T, false>(p, stream) : launch<T, true>(p, stream);
}

template CudaStatus launch_selective_state_update<MAMBA_SSM_ELEMENT>(
    const SelectiveStateUpdateParams&, CudaStream);

}  // namespace mamba_ssm::kernels
