// Causal depthwise convolution, forward.
//
// Channel-last data: a thread owns a pack of channels and walks a strip of tokens, the last width
// inputs in registers, the next ones on their way to shared memory. Channel-first data: a warp owns
// a strip of one row, a thread vectors along time; the width - 1 inputs before a vector come from
// the lane to the left; several short rows share a warp. All write the final states of a row where
// its last strip ends. Everything else (other widths, float64, strides without packs): a thread per
// output, and a kernel more for the final states.
#include <limits>

#include "causal_conv1d.cuh"
#include "launch.cuh"

namespace mamba_ssm::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;

// Walking channels; double does not.
[[maybe_unused]] constexpr int kRows =
    4;                        // tokens of a stage; after four the window is back in its registers
constexpr int kResident = 6;  // blocks of a multiprocessor
// Walking tokens; double does not.
[[maybe_unused]] constexpr int kSteps = 6;  // vectors of a thread, all in flight at once

/// The token that final states continue: the last one that is not padding. Whole warps only.
template <bool kPacked>
__device__ __forceinline__ int64_t last_token(const CausalConv1dParams& p, const ExtendedIds& ids) {
  return kPacked && given(p.seq_idx) ? last_real_token(ids.ids, p.seqlen) : p.seqlen - 1;
}

template <class T>
__device__ __forceinline__ T& state_element(const CausalConv1dParams& p, int64_t b, int64_t c,
                                            int64_t column) {
  const View<3>& v = p.final_states;
  return static_cast<T*>(v.data)[b * v.stride[0] + c * v.stride[1] + column * v.stride[2]];
}

/// One column of the final states of channel c: the end of the extended row, as seen from `last`.
template <class T>
__device__ __forceinline__ void write_final_state(const CausalConv1dParams& p,
                                                  const ExtendedIds& ids, int64_t last, int64_t b,
                                                  int64_t c, int64_t column) {
  const int64_t s = last - (p.width - 2) + column;
  const bool same_sequence = !given(p.seq_idx) || ids(s) == ids(last);
  state_element<T>(p, b, c, column) =
      from_accumulate<T>(same_sequence ? ExtendedRow<T>{p, b}(c, s) : Accumulate<T>(0));
}

template <class T, int kWidth, bool kPacked>
__global__ void __launch_bounds__(kThreads, kResident)
    forward_channel_last(const CausalConv1dParams p, const Strips strips) {
  using Acc = Accumulate<T>;
  constexpr int kVec = kPackedChannels<T>;
  constexpr int kStages = 6;  // of the ring: 24 KB a block
  // A thread reads only what it copied itself: no barriers.
  __shared__ Pack<T, kVec> ring[kStages][kRows][kThreads];

  const ChannelWalk<kWarps, kVec> walk(p, strips);
  const int64_t b = walk.b;
  const int64_t c = walk.c;
  const int length = walk.length;
  const ExtendedIds ids = extended_ids<kPacked>(p, b, walk.begin - (kWidth - 1));
  const bool ends_row = length > 0 && walk.begin + length == p.seqlen;
  const ExtendedIds row_ids = kPacked && ends_row ? extended_ids<true>(p, b, -1) : ids;
  const int64_t last = ends_row ? last_token<kPacked>(p, row_ids) : 0;
  if (c >= p.dim || length == 0) return;

  const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride[0] + c + walk.begin * p.x.stride[2];
  T* out = static_cast<T*>(p.out.data) + b * p.out.stride[0] + c + walk.begin * p.out.stride[2];
  int fetched = 0;
  int fetch_stage = 0;
  const auto fetch = [&] {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (fetched + r < length) copy_async(&ring[fetch_stage][r][threadIdx.x], x);
      x += p.x.stride[2];
    }
    commit_copies();
    fetched += kRows;
    fetch_stage = fetch_stage + 1 < kStages ? fetch_stage + 1 : 0;
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) fetch();

  const Taps<T, kVec, kWidth> taps(p.weight, p.bias, c);
  Window<T, kVec, kWidth> window;
  window.start(p, b, c, walk.begin);
  TapFilter<kWidth, kPacked> filter(ids, walk.begin);
  const auto step = [&](const Pack<T, kVec>& row, unsigned used) {
    window.push(row);
    Acc sum[kVec];
#pragma unroll
    for (int e = 0; e < kVec; ++e) sum[e] = taps.bias[e];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      if (kPacked && !(used >> k & 1)) continue;
#pragma unroll
      for (int e = 0; e < kVec; ++e) sum[e] += taps.weight[k][e] * window.input[k][e];
    }
    if (p.silu) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) sum[e] = silu(sum[e]);
    }
    if (kPacked && used == 0) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) sum[e] = 0;
    }
    Pack<T, kVec> rounded;
    rounded.round(sum);
    rounded.store(out);
    out += p.out.stride[2];
  };

  int stage = 0;
  for (int i = 0; i < length; i += kRows) {
    wait_copies<kStages - 2>();
    const Pack<T, kVec>(*rows)[kThreads] = ring[stage];
    if (i + kRows <= length) {
      unsigned used[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        used[r] = filter.next(kPacked ? ids(walk.begin + i + r) : 0);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) step(rows[r][threadIdx.x], used[r]);
    } else {
#pragma unroll 1
      for (int r = 0; i + r < length; ++r) {
        step(rows[r][threadIdx.x], filter.next(kPacked ? ids(walk.begin + i + r) : 0));
      }
    }
    fetch();
    stage = stage + 1 < kStages ? stage + 1 : 0;
  }
  if (!ends_row) return;
  if constexpr (kPacked) {
#pragma unroll 1
    for (int i = 0; i < kVec * (kWidth - 1); ++i) {
      write_final_state<T>(p, row_ids, last, b, c + i % kVec, i / kVec);
    }
  } else {
#pragma unroll
    for (int k = 1; k < kWidth; ++k) {  // the window has arrived there
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        state_element<T>(p, b, c + e, k - 1) = from_accumulate<T>(window.input[k][e]);  // exact
      }
    }
  }
}

/// kAligned: rows start and end at 16-byte boundaries. kPlain: there are neither ids nor initial
/// states, which are not asked for at every token then.
template <class T, int kWidth, bool kAligned, bool kPlain>
__global__ void __launch_bounds__(kThreads)
    forward_channel_first(const CausalConv1dParams p, const Strips strips) {
  using Acc = Accumulate<T>;
  constexpr int kVec = Vector<T>::kSize;
  constexpr int kHalo = kWidth - 1;
  constexpr int kStep = kWarpSize * kVec;  // tokens that a warp computes at a time

  const int lane = threadIdx.x % kWarpSize;
  const unsigned strip = blockIdx.x % strips.blocks;
  const unsigned index = blockIdx.x / strips.blocks;
  const int64_t c = int64_t{index % strips.groups} * kWarps + threadIdx.x / kWarpSize;
  const int64_t b = index / strips.groups;
  if (c >= p.dim) return;

  const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride[0] + c * p.x.stride[1];
  T* out = static_cast<T*>(p.out.data) + b * p.out.stride[0] + c * p.out.stride[1];
  // Vectors start at 16-byte boundaries: the first one of a row may reach back before token 0. From
  // here on tokens are counted from the start of the strip; the row has those in [head, length).
  const int phase =
      kAligned ? 0 : static_cast<int>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
  const int64_t begin = int64_t{strip} * strips.length - phase;
  const int head = begin < 0 ? phase : 0;
  const int64_t rest = p.seqlen - begin;
  const int length = rest < strips.length ? static_cast<int>(rest) : strips.length;
  x += begin;
  out += begin;
  const auto inside = [&](int u) {
    return kAligned ? u < length : u >= head && u + kVec <= length;
  };
  const ExtendedRow<T> extended{p, b};
  const auto input = [&](int u) {
    if constexpr (!kPlain) return extended(c, begin + u);
    return begin + u >= 0 && u < length ? to_accumulate(x[u]) : Acc(0);
  };

  Pack<T, kVec> vectors[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int u = step * kStep + lane * kVec;
    if (inside(u)) {
      vectors[step].load(x + u);
    } else if (!kAligned && u < length) {
      Acc values[kVec];
#pragma unroll
      for (int e = 0; e < kVec; ++e) values[e] = input(u + e);
      vectors[step].round(values);  // exact: they come from T
    }
  }
  Acc before[kHalo] = {};  // what stands left of lane 0
  if (lane == 0) {
#pragma unroll
    for (int j = 0; j < kHalo; ++j) before[j] = input(j - kHalo);
  }
  const Taps<T, 1, kWidth> taps(p.weight, p.bias, c);
  const ExtendedIds ids = extended_ids<!kPlain>(p, b, begin - kHalo);

#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (step * kStep >= length) break;
    const int u = step * kStep + lane * kVec;
    Acc window[kHalo + kVec];  // inputs of tokens u - kHalo .. u + kVec - 1
#pragma unroll
    for (int e = 0; e < kVec; ++e) window[kHalo + e] = vectors[step][e];
#pragma unroll
    for (int j = 0; j < kHalo; ++j) {
      // Lane 0 gets the end of lane 31, for the next step.
      const Acc left = __shfl_sync(kAllLanes, window[kVec + j], (lane + kWarpSize - 1) % kWarpSize);
      window[j] = lane == 0 ? before[j] : left;
      before[j] = left;
    }
    const unsigned used = filter_taps<kWidth, !kPlain, kVec>(ids, begin + u, p.seqlen);
    Acc sum[kVec];
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      sum[e] = taps.bias[0];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        if (!kPlain && !(used >> (e * kWidth + k) & 1)) continue;
        sum[e] += taps.weight[k][0] * window[e + k];
      }
    }
    if (p.silu) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) sum[e] = silu(sum[e]);
    }
    if constexpr (!kPlain) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        if (!(used >> (e * kWidth + kHalo) & 1)) sum[e] = 0;
      }
    }
    if (inside(u)) {
      Pack<T, kVec> rounded;
      rounded.round(sum);
      rounded.store(out + u);
    } else if (!kAligned) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        if (u + e >= head && u + e < length) out[u + e] = from_accumulate<T>(sum[e]);
      }
    }
  }
  if (strip == strips.blocks - 1) {
    const ExtendedIds all_ids = extended_ids<!kPlain>(p, b, -1);
    const int64_t last = last_token<!kPlain>(p, all_ids);
    if (lane < kHalo) write_final_state<T>(p, all_ids, last, b, c, lane);
  }
}

/// Rows of at most kLanes vectors, without ids or initial states, wherever they start: kLanes lanes
/// have kShortRows rows, all in flight at once.
[[maybe_unused]] constexpr int kShortRows = 4;  // double has none

template <class T, int kWidth, int kLanes>
__global__ void __launch_bounds__(kThreads)
    forward_short_rows(const CausalConv1dParams p, const unsigned rows) {
  using Acc = Accumulate<T>;
  constexpr int kVec = Vector<T>::kSize;
  constexpr int kHalo = kWidth - 1;
  constexpr unsigned kTeams = kThreads / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int u = lane * kVec;
  const int count = max(min(static_cast<int>(p.seqlen) - u, kVec), 0);
  // Rows that stand next to one another in memory are neighbors here.
  const bool batch_inside = p.x.stride[0] < p.x.stride[1];
  const unsigned inner = static_cast<unsigned>(batch_inside ? p.batch : p.dim);
  unsigned b[kShortRows], c[kShortRows];
  bool exists[kShortRows];
  Pack<T, kVec> x[kShortRows] = {};
#pragma unroll
  for (int i = 0; i < kShortRows; ++i) {
    const unsigned row = (blockIdx.x * kShortRows + i) * kTeams + threadIdx.x / kLanes;
    exists[i] = row < rows;
    b[i] = batch_inside ? row % inner : row / inner;
    c[i] = batch_inside ? row / inner : row % inner;
    if (!exists[i]) continue;
    const T* const from =
        static_cast<const T*>(p.x.data) + b[i] * p.x.stride[0] + c[i] * p.x.stride[1] + u;
    load_anywhere(x[i], from, count);
  }
#pragma unroll
  for (int i = 0; i < kShortRows; ++i) {
    const Taps<T, 1, kWidth> taps(p.weight, p.bias, exists[i] ? c[i] : 0);
    Acc window[kHalo + kVec];  // inputs of tokens u - kHalo .. u + kVec - 1
#pragma unroll
    for (int e = 0; e < kVec; ++e) window[kHalo + e] = x[i][e];
#pragma unroll
    for (int j = 0; j < kHalo; ++j) {
      const Acc left = __shfl_up_sync(kAllLanes, window[kVec + j], 1, kLanes);
      window[j] = lane == 0 ? Acc(0) : left;
    }
    Acc sum[kVec];
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      sum[e] = taps.bias[0];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sum[e] += taps.weight[k][0] * window[e + k];
      if (p.silu) sum[e] = silu(sum[e]);
    }
    if (!exists[i]) continue;
    Pack<T, kVec> rounded;
    rounded.round(sum);
    T* const to = static_cast<T*>(p.out.data) + b[i] * p.out.stride[0] + c[i] * p.out.stride[1] + u;
    store_anywhere(rounded, to, count);
    if (lane < kHalo) {
      write_final_state<T>(p, extended_ids<false>(p, b[i], -1), p.seqlen - 1, b[i], c[i], lane);
    }
  }
}

/// A block owns 32 positions of the axis that is denser in memory, kDepth of the other.
constexpr int kDepth = 8 * kWarps;

template <class T>
__global__ void __launch_bounds__(kThreads)
    forward_any(const CausalConv1dParams p, bool channels_are_dense) {
  using Acc = Accumulate<T>;
  const int64_t dense_size = channels_are_dense ? p.dim : p.seqlen;
  const int64_t other_size = channels_are_dense ? p.seqlen : p.dim;
  const int64_t dense_tiles = (dense_size + kWarpSize - 1) / kWarpSize;
  const int64_t other_tiles = (other_size + kDepth - 1) / kDepth;
  const int64_t dense = blockIdx.x % dense_tiles * kWarpSize + threadIdx.x % kWarpSize;
  const int64_t other_begin =
      blockIdx.x / dense_tiles % other_tiles * kDepth + threadIdx.x / kWarpSize;
  const int64_t b = blockIdx.x / dense_tiles / other_tiles;
  const ExtendedIds ids = extended_ids<true>(p, b, -1);
  if (dense >= dense_size) return;
#pragma unroll 1
  for (int i = 0; i < kDepth; i += kWarps) {
    const int64_t other = other_begin + i;
    if (other >= other_size) break;
    const int64_t c = channels_are_dense ? dense : other;
    const int64_t t = channels_are_dense ? other : dense;
    Acc y = 0;
    if (!given(p.seq_idx) || ids(t) >= 0) {
      y = preactivation<T>(p, ids, b, c, t);
      if (p.silu) y = silu(y);
    }
    static_cast<T*>(p.out.data)[b * p.out.stride[0] + c * p.out.stride[1] + t * p.out.stride[2]] =
        from_accumulate<T>(y);
  }
}

/// A warp per 32 channels of a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    forward_final_states(const CausalConv1dParams p, int64_t groups) {
  const int64_t item = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize;
  const int64_t b = item / groups;
  if (b >= p.batch) return;
  const int64_t c = item % groups * kWarpSize + threadIdx.x % kWarpSize;
  const ExtendedIds ids = extended_ids<true>(p, b, -1);
  const int64_t last = last_token<true>(p, ids);
  if (c >= p.dim) return;
  for (int64_t column = 0; column < p.width - 1; ++column) {
    write_final_state<T>(p, ids, last, b, c, column);
  }
}

template <class T>
void launch_final_states(const CausalConv1dParams& p, cudaStream_t stream) {
  if (p.width == 1) return;
  const int64_t groups = ceil_div(p.dim, kWarpSize);
  const auto blocks = static_cast<unsigned>(ceil_div(p.batch * groups, kWarps));
  forward_final_states<T><<<blocks, kThreads, 0, stream>>>(p, groups);
}

/// Launches one of the kernels that walk rows, if the call is what they are made for.
template <class T>
bool try_walks(const CausalConv1dParams& p, cudaStream_t stream) {
  if (!has_own_arm(p.width)) return false;
  if (channels_are_packed<T, kPackedChannels<T>>(p.dim, p.x, p.out)) {
    const Strips strips = cut_channels<kWarps, kPackedChannels<T>>(p, kResident, kRows);
    const auto blocks = static_cast<unsigned>(p.batch * strips.blocks * strips.groups);
    for_width(p.width, [&](auto width) {
      for_flag(given(p.seq_idx), [&](auto packed) {
        forward_channel_last<T, width, packed><<<blocks, kThreads, 0, stream>>>(p, strips);
      });
    });
    return true;
  }
  constexpr int kSize = Vector<T>::kSize;
  const bool plain = !given(p.seq_idx) && !given(p.initial_states);
  if (plain && p.x.stride[2] == 1 && p.out.stride[2] == 1 && p.seqlen <= kWarpSize * kSize &&
      p.batch * p.dim <= std::numeric_limits<int32_t>::max()) {
    const auto rows = static_cast<unsigned>(p.batch * p.dim);
    for_width(p.width, [&](auto width) {
      const auto launch = [&](auto lanes) {
        constexpr unsigned kRowsOfBlock = kThreads / lanes * kShortRows;
        const unsigned blocks = (rows + kRowsOfBlock - 1) / kRowsOfBlock;
        forward_short_rows<T, width, lanes><<<blocks, kThreads, 0, stream>>>(p, rows);
      };
      if (p.seqlen <= 8 * kSize) {
        launch(std::integral_constant<int, 8>{});
      } else if (p.seqlen <= 16 * kSize) {
        launch(std::integral_constant<int, 16>{});
      } else {
        launch(std::integral_constant<int, kWarpSize>{});
      }
    });
    return true;
  }
  if (tokens_are_vectors<T>(p.x, p.out)) {
    constexpr int64_t kStep = kWarpSize * kSize;
    const int64_t phase = most_phase<T>(p.x);
    const int64_t tokens = p.seqlen + phase;
    Strips strips;  // of one length, as far as whole steps allow
    strips.groups = static_cast<unsigned>(ceil_div(p.dim, kWarps));
    strips.blocks = static_cast<unsigned>(ceil_div(tokens, kSteps * kStep));
    strips.length = static_cast<int>(ceil_div(ceil_div(tokens, strips.blocks), kStep) * kStep);
    const bool aligned = plain && phase == 0 && p.seqlen % kSize == 0;
    const auto blocks = static_cast<unsigned>(p.batch * strips.blocks * strips.groups);
    for_width(p.width, [&](auto width) {
      for_flag(plain, [&](auto is_plain) {
        if (is_plain && aligned) {
          forward_channel_first<T, width, true, true><<<blocks, kThreads, 0, stream>>>(p, strips);
        } else {
          forward_channel_first<T, width, false, is_plain>
              <<<blocks, kThreads, 0, stream>>>(p, strips);
        }
      });
    });
    return true;
  }
  return false;
}

template <class T>
void launch_any(const CausalConv1dParams& p, cudaStream_t stream) {
  const bool channels_are_dense = p.x.stride[1] < p.x.stride[2] || p.seqlen == 1;
  const int64_t dense_size = channels_are_dense ? p.dim : p.seqlen;
  const int64_t other_size = channels_are_dense ? p.seqlen : p.dim;
  const int64_t tiles = ceil_div(dense_size, kWarpSize) * ceil_div(other_size, kDepth);
  forward_any<T>
      <<<static_cast<unsigned>(p.batch * tiles), kThreads, 0, stream>>>(p, channels_are_dense);
}

}  // namespace

template <class T>
CudaStatus launch_causal_conv1d_fwd(const CausalConv1dParams& p, CudaStream stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (p.batch == 0 || p.dim == 0) return cudaSuccess;
  if constexpr (sizeof(T) <= 4) {
    if (p.seqlen > 0 && try_walks<T>(p, stream)) return cudaGetLastError();
  }
  if (p.seqlen > 0) launch_any<T>(p, stream);
  launch_final_states<T>(p, stream);
  return cudaGetLastError();
}

template CudaStatus launch_causal_conv1d_fwd<MAMBA_SSM_ELEMENT>(const CausalConv1dParams&,
                                                                CudaStream);

}  // namespace mamba_ssm::kernels
