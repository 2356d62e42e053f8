// Causal depthwise convolution, decode: a few new tokens against a cache of past inputs; and the
// caches of packed sequences.
//
// One token against a dense cache of 4 columns, the columns of a channel side by side or channels
// side by side: a thread owns a few neighboring channels and a few batch rows. Everything else: a
// thread owns one channel of one row, makes all outputs and then moves its columns, so that the
// update is safe in place.
#include <cuda_runtime.h>

#include "causal_conv1d.cuh"
#include "launch.cuh"

namespace mamba_ssm::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kStateLen = 4;  // columns of the cache that the one-token kernel is made for
constexpr int kRows = 2;      // batch rows of a thread: they share taps, and their loads overlap
template <class T>            // of a thread of the one-token kernel: 16 bytes of the cache
constexpr int kChannels = 16 / (kStateLen * sizeof(T));

/// The cache slot of row b, or -1 for a row without one.
__device__ int64_t slot_of(const CausalConv1dUpdateParams& p, int64_t b) {
  int64_t slot = b;
  if (given(p.conv_state_indices)) {
    slot = load_index(p.conv_state_indices.data, p.conv_state_indices.dtype,
                      b * p.conv_state_indices.stride[0]);
  }
  return slot >= 0 && slot < p.num_slots ? slot : -1;
}

/// The columns of kVec neighboring channels in the cache.
template <class T, int kVec, bool kChannelLast>
class CacheColumns {
 public:
  __device__ __forceinline__ void load(const T* from, int64_t column_stride) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) packs_[i].load(from + i * column_stride);
  }
  __device__ __forceinline__ Accumulate<T> operator()(int channel, int column) const {
    return kChannelLast ? packs_[column][channel] : packs_[0][channel * kStateLen + column];
  }
  /// Column 0 leaves, the new one comes last.
  __device__ __forceinline__ void push(const Pack<T, kVec>& column) {
    if constexpr (kChannelLast) {
#pragma unroll
      for (int i = 0; i + 1 < kPacks; ++i) packs_[i] = packs_[i + 1];
      packs_[kPacks - 1] = column;
    } else {
      Accumulate<T> values[kVec * kStateLen];
#pragma unroll
      for (int i = 0; i < kVec * kStateLen; ++i) {
        const bool last = i % kStateLen == kStateLen - 1;
        values[i] = last ? column[i / kStateLen] : packs_[0][i + !last];
      }
      packs_[0].round(values);  // exact: they come from T
    }
  }
  __device__ __forceinline__ void store(T* to, int64_t column_stride) const {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) packs_[i].store(to + i * column_stride);
  }

 private:
  static constexpr int kPacks = kChannelLast ? kStateLen : 1;
  Pack<T, kChannelLast ? kVec : kVec * kStateLen> packs_[kPacks];
};

template <class T, int kWidth, bool kChannelLast>
__global__ void __launch_bounds__(kThreads) update_one_token(const CausalConv1dUpdateParams p) {
  using Acc = Accumulate<T>;
  constexpr int kVec = kChannels<T>;
  const unsigned c = (blockIdx.y * kThreads + threadIdx.x) * kVec;
  const unsigned first_row = blockIdx.x * kRows;
  let_next_start();
  wait_for_previous();
  if (c >= p.dim) return;

  T* const states = static_cast<T*>(p.conv_state.data) + c * p.conv_state.stride[1];
  const T* const x = static_cast<const T*>(p.x.data) + c;
  T* const out = static_cast<T*>(p.out.data) + c;
  int64_t slot[kRows];
  CacheColumns<T, kVec, kChannelLast> state[kRows];
  Pack<T, kVec> input[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    slot[r] = first_row + r < p.batch ? slot_of(p, first_row + r) : -1;
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (slot[r] < 0) continue;
    state[r].load(states + slot[r] * p.conv_state.stride[0], p.conv_state.stride[2]);
    input[r].load(x + (first_row + r) * p.x.stride[0]);
  }
  const Taps<T, kVec, kWidth> taps(p.weight, p.bias, c);

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (first_row + r >= p.batch) break;
    Acc sum[kVec] = {};
    if (slot[r] >= 0) {
      state[r].push(input[r]);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        sum[e] = taps.bias[e];
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          sum[e] += taps.weight[k][e] * state[r](e, kStateLen - kWidth + k);
        }
        if (p.silu) sum[e] = silu(sum[e]);
      }
      state[r].store(states + slot[r] * p.conv_state.stride[0], p.conv_state.stride[2]);
    }
    Pack<T, kVec> rounded;
    rounded.round(sum);
    rounded.store(out + (first_row + r) * p.out.stride[0]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) update_any(const CausalConv1dUpdateParams p) {
  using Acc = Accumulate<T>;
  const int64_t channel_blocks = (p.dim + kThreads - 1) / kThreads;
  const int64_t c = blockIdx.x % channel_blocks * kThreads + threadIdx.x;
  const int64_t b = blockIdx.x / channel_blocks;
  if (c >= p.dim) return;
  const T* const x = static_cast<const T*>(p.x.data) + b * p.x.stride[0] + c * p.x.stride[1];
  T* const out = static_cast<T*>(p.out.data) + b * p.out.stride[0] + c * p.out.stride[1];
  const int64_t slot = slot_of(p, b);
  if (slot < 0) {
    for (int64_t t = 0; t < p.seqlen; ++t) out[t * p.out.stride[2]] = from_accumulate<T>(0);
    return;
  }
  T* const state = static_cast<T*>(p.conv_state.data) + slot * p.conv_state.stride[0] +
                   c * p.conv_state.stride[1];
  const int64_t length = p.state_len;
  const bool ring = given(p.cache_seqlens);
  int64_t next = 0;  // column of the first new token: with a ring its place, else behind the others
  if (ring && length > 0) {
    next = load_index(p.cache_seqlens.data, p.cache_seqlens.dtype, b * p.cache_seqlens.stride[0]) %
           length;
    if (next < 0) next += length;
  }
  const auto column = [&](int64_t t) {  // of token t, -length <= t < length
    const int64_t j = next + t;
    return (j < 0 ? j + length : j >= length ? j - length : j) * p.conv_state.stride[2];
  };

  for (int64_t t = 0; t < p.seqlen; ++t) {
    Acc sum = given(p.bias) ? load_as<Acc>(p.bias.data, p.bias.dtype, c * p.bias.stride[0]) : 0;
    for (int64_t k = 0; k < p.width; ++k) {
      const int64_t s = t - (p.width - 1) + k;
      const T value = s < 0 ? state[column(s)] : x[s * p.x.stride[2]];
      sum += load_as<Acc>(p.weight.data, p.weight.dtype,
                          c * p.weight.stride[0] + k * p.weight.stride[1]) *
             to_accumulate(value);
    }
    out[t * p.out.stride[2]] = from_accumulate<T>(p.silu ? silu(sum) : sum);
  }

  // The last `length` of [old columns, new tokens]; of more new tokens only the last ones stay.
  const int64_t kept = p.seqlen < length ? p.seqlen : length;
  if (ring) {
    for (int64_t i = 0; i < kept; ++i) {
      const int64_t t = p.seqlen - kept + i;
      state[column(t % length)] = x[t * p.x.stride[2]];
    }
  } else {
    for (int64_t j = 0; j < length; ++j) {
      state[j * p.conv_state.stride[2]] = j < length - kept
                                              ? state[(j + kept) * p.conv_state.stride[2]]
                                              : x[(p.seqlen - length + j) * p.x.stride[2]];
    }
  }
}

/// A thread per state element; channels are the inner axis.
template <class T>
__global__ void __launch_bounds__(kThreads) varlen_states(const CausalConv1dVarlenStatesParams p) {
  const int64_t channel_blocks = (p.dim + kThreads - 1) / kThreads;
  const int64_t c = blockIdx.x % channel_blocks * kThreads + threadIdx.x;
  const int64_t column = blockIdx.x / channel_blocks % p.state_len;
  const int64_t sequence = blockIdx.x / channel_blocks / p.state_len;
  if (c >= p.dim) return;
  const auto offset = [&](int64_t i) {
    const int64_t token =
        load_index(p.cu_seqlens.data, p.cu_seqlens.dtype, i * p.cu_seqlens.stride[0]);
    return token < 0 ? 0 : token < p.total_tokens ? token : p.total_tokens;
  };
  const int64_t token = offset(sequence + 1) - p.state_len + column;
  T value = from_accumulate<T>(0);
  if (token >= offset(sequence)) {
    value = static_cast<const T*>(p.x.data)[token * p.x.stride[0] + c * p.x.stride[1]];
  }
  static_cast<T*>(p.states.data)[sequence * p.states.stride[0] + c * p.states.stride[1] +
                                 column * p.states.stride[2]] = value;
}

/// True if update_one_token takes the call, from a cache of the given layout.
template <class T>
bool is_one_token(const CausalConv1dUpdateParams& p, bool channel_last) {
  constexpr int kVec = kChannels<T>;
  constexpr int64_t kMostBlocks = 65535;  // of a grid in y
  const View<3>& state = p.conv_state;
  const auto aligned = [](const View<3>& v) {
    return reinterpret_cast<uintptr_t>(v.data) % (kVec * sizeof(T)) == 0 && v.stride[0] % kVec == 0;
  };
  const bool dense = channel_last
                         ? state.stride[1] == 1 && aligned(state) && state.stride[2] % kVec == 0
                         : state.stride[2] == 1 && state.stride[1] == kStateLen &&
                               allows_vectors<T>(state.data, state.stride[0]);
  return p.seqlen == 1 && p.state_len == kStateLen && has_own_arm(p.width) &&
         !given(p.cache_seqlens) && p.batch <= INT32_MAX && p.dim % kVec == 0 &&
         p.dim <= kMostBlocks * kThreads * kVec && dense && p.x.stride[1] == 1 &&
         p.out.stride[1] == 1 && aligned(p.x) && aligned(p.out);
}

}  // namespace

template <class T>
CudaStatus launch_causal_conv1d_update(const CausalConv1dUpdateParams& p,
                                       CudaStream stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (p.batch == 0 || p.dim == 0 || p.seqlen == 0) return cudaSuccess;
  if constexpr (sizeof(T) <= 4) {
    const dim3 grid(static_cast<unsigned>(ceil_div(p.batch, kRows)),
                    static_cast<unsigned>(ceil_div(p.dim / kChannels<T>, kThreads)));
    if (is_one_token<T>(p, /*channel_last=*/false)) {
      for_width(p.width, [&](auto width) {
        launch_overlapped<update_one_token<T, width, false>>(grid, kThreads, 0, stream, p);
      });
      return cudaGetLastError();
    }
    if (is_one_token<T>(p, /*channel_last=*/true)) {
      for_width(p.width, [&](auto width) {
        launch_overlapped<update_one_token<T, width, true>>(grid, kThreads, 0, stream, p);
      });
      return cudaGetLastError();
    }
  }
  const int64_t blocks = ceil_div(p.dim, kThreads) * p.batch;
  update_any<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <class T>
CudaStatus launch_causal_conv1d_varlen_states(const CausalConv1dVarlenStatesParams& p,
                                              CudaStream stream_handle) {
  if (p.num_sequences == 0 || p.dim == 0 || p.state_len == 0) return cudaSuccess;
  const int64_t blocks = ceil_div(p.dim, kThreads) * p.state_len * p.num_sequences;
  varlen_states<T>
      <<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream_handle)>>>(p);
  return cudaGetLastError();
}

template CudaStatus launch_causal_conv1d_update<MAMBA_SSM_ELEMENT>(const CausalConv1dUpdateParams&,
                                                                   CudaStream);
template CudaStatus launch_causal_conv1d_varlen_states<MAMBA_SSM_ELEMENT>(
    const CausalConv1dVarlenStatesParams&, CudaStream);

}  // namespace mamba_ssm::kernels
