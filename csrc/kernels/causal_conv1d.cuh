// What the CUDA kernels of the causal convolution share: the row as they see it, taps, and how rows
// are cut into strips.
//
// The extended row: x at 0 <= t < seqlen, the columns of initial_states at -(width-1) <= t < 0.
// Seen so, the taps need no special case at the start of a row, dinitial_states is dx at t < 0, and
// final_states is the end of the extended row.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "causal_conv1d.h"
#include "device.cuh"
#include "packed_sequences.cuh"

namespace mamba_ssm::kernels {

/// Channels of a thread that walks packs of them: 8 bytes. 16 spill the backward (sm_90).
template <class T>
constexpr int kPackedChannels = 8 / sizeof(T);

/// Inputs of one extended row; zero outside of it.
template <class T>
struct ExtendedRow {
  const CausalConv1dParams& p;
  int64_t b;

  __device__ Accumulate<T> operator()(int64_t c, int64_t t) const {
    if (t >= p.seqlen) return 0;
    if (t >= 0) {
      return to_accumulate(static_cast<const T*>(
          p.x.data)[b * p.x.stride[0] + c * p.x.stride[1] + t * p.x.stride[2]]);
    }
    const int64_t column = t + p.width - 1;
    if (!given(p.initial_states) || column < 0) return 0;
    return to_accumulate(static_cast<const T*>(
        p.initial_states.data)[b * p.initial_states.stride[0] + c * p.initial_states.stride[1] +
                               column * p.initial_states.stride[2]]);
  }
};

/// Ids of one extended row: initial_states belong to the row's first sequence.
struct ExtendedIds {
  SequenceIds ids;
  int64_t first;

  __device__ int64_t operator()(int64_t t) const { return t < 0 ? first : ids[t]; }
};

/// The ids of row b for a warp whose taps reach back to `begin`. Whole warps only.
template <bool kPacked>
__device__ ExtendedIds extended_ids(const CausalConv1dParams& p, int64_t b, int64_t begin) {
  ExtendedIds ids{SequenceIds(p.seq_idx, b), 0};
  if (kPacked && given(p.seq_idx) && begin < 0) ids.first = first_sequence(ids.ids, p.seqlen);
  return ids;
}

/// Which taps of a token count, walking along an extended row.
template <int kWidth, bool kPacked>
struct TapFilter {
  int64_t previous[kWidth - 1];  // ids of the tokens before the next one

  __device__ __forceinline__ TapFilter(const ExtendedIds& ids, int64_t t) {
    if constexpr (kPacked) {
#pragma unroll
      for (int k = 0; k < kWidth - 1; ++k) previous[k] = ids(t - (kWidth - 1) + k);
    }
  }

  /// Bit k stands for tap k of the next token, whose id is `id`; none if that is padding.
  __device__ __forceinline__ unsigned next(int64_t id) {
    constexpr unsigned kSelf = 1u << (kWidth - 1);
    if constexpr (!kPacked) {
      return 2 * kSelf - 1;
    } else {
      unsigned taps = kSelf;
#pragma unroll
      for (int k = 0; k < kWidth - 1; ++k) {
        if (previous[k] == id) taps |= 1u << k;
        previous[k] = k + 2 < kWidth ? previous[(k + 1) % (kWidth - 1)] : id;
      }
      return id >= 0 ? taps : 0;
    }
  }
};

/// The same for the kVec tokens from t on, kWidth bits for each; none where there is no token.
template <int kWidth, bool kPacked, int kVec>
__device__ __forceinline__ unsigned filter_taps(const ExtendedIds& ids, int64_t t, int64_t seqlen) {
  static_assert(kWidth * kVec <= 32);
  unsigned taps = ~0u;
  if constexpr (kPacked) {
    if (t >= seqlen) return 0;
    TapFilter<kWidth, true> filter(ids, t);
    taps = 0;
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      const int64_t id = t + e < seqlen ? ids(t + e) : kNoSequence;
      const unsigned next = filter.next(id);
      if (t + e >= 0) taps |= next << (e * kWidth);
    }
  }
  return taps;
}

/// Weights and bias of channels c .. c + kVec - 1.
template <class T, int kVec, int kWidth>
struct Taps {
  using Acc = Accumulate<T>;
  Acc weight[kWidth][kVec];
  Acc bias[kVec];

  __device__ __forceinline__ Taps(const View<2>& w, const View<1>& b, int64_t c) {
    ParameterBits<Acc, kWidth * kVec> weight_bits;
    weight_bits.template load<kVec>(w.data, w.dtype, c * w.stride[0], w.stride[0], w.stride[1]);
    ParameterBits<Acc, kVec> bias_bits;
    if (given(b)) bias_bits.load(b.data, b.dtype, c * b.stride[0], b.stride[0]);
#pragma unroll
    for (int i = 0; i < kWidth * kVec; ++i) {
      weight[i / kVec][i % kVec] = weight_bits.value(w.dtype, i);
    }
#pragma unroll
    for (int e = 0; e < kVec; ++e) bias[e] = given(b) ? bias_bits.value(b.dtype, e) : Acc(0);
  }
};

/// The sum before the activation at token t of channel c, any width.
template <class T>
__device__ Accumulate<T> preactivation(const CausalConv1dParams& p, const ExtendedIds& ids,
                                       int64_t b, int64_t c, int64_t t) {
  using Acc = Accumulate<T>;
  const ExtendedRow<T> input{p, b};
  const int64_t id = ids(t);
  Acc sum = given(p.bias) ? load_as<Acc>(p.bias.data, p.bias.dtype, c * p.bias.stride[0]) : Acc(0);
  for (int64_t k = 0; k < p.width; ++k) {
    const int64_t s = t - (p.width - 1) + k;
    if (given(p.seq_idx) && ids(s) != id) continue;
    sum += load_as<Acc>(p.weight.data, p.weight.dtype,
                        c * p.weight.stride[0] + k * p.weight.stride[1]) *
           input(c, s);
  }
  return sum;
}

/// Rows cut in time. The warps of a block own neighboring strips of one group of channels, or one
/// strip of neighboring channels.
struct Strips {
  unsigned groups;  // of channels, one to a block
  unsigned blocks;  // per row and group, at least 1
  int length;       // tokens of a strip
};

/// Where a warp stands whose threads own kVec channels each and walk one strip.
template <int kWarps, int kVec>
struct ChannelWalk {
  int64_t b, c, begin;
  int length;     // 0 behind the end of the row
  int64_t block;  // among those of all rows

  __device__ ChannelWalk(const CausalConv1dParams& p, const Strips& strips) {
    const unsigned group = blockIdx.x % strips.groups;
    const unsigned index = blockIdx.x / strips.groups;
    const unsigned strip = index % strips.blocks * kWarps + threadIdx.x / kWarpSize;
    block = index;
    b = index / strips.blocks;
    c = (int64_t{group} * kWarpSize + threadIdx.x % kWarpSize) * kVec;
    begin = int64_t{strip} * strips.length;
    const int64_t rest = p.seqlen - begin;
    length = rest < 0 ? 0 : rest < strips.length ? static_cast<int>(rest) : strips.length;
  }
};

/// Inputs of tokens t - (kWidth - 1) .. t of a few channels, for a thread that walks t.
template <class T, int kVec, int kWidth>
struct Window {
  using Acc = Accumulate<T>;
  Acc input[kWidth][kVec];

  /// The inputs before token t; its own comes with the first call of `push`.
  __device__ __forceinline__ void start(const CausalConv1dParams& p, int64_t b, int64_t c,
                                        int64_t t) {
    const T* const x = static_cast<const T*>(p.x.data) + b * p.x.stride[0] + c * p.x.stride[1];
    const ExtendedRow<T> row{p, b};
#pragma unroll
    for (int k = 1; k < kWidth; ++k) {
      const int64_t s = t - kWidth + k;
      if (s >= 0 && s < p.seqlen) {
        Pack<T, kVec> pack;
        pack.load(x + s * p.x.stride[2]);
#pragma unroll
        for (int e = 0; e < kVec; ++e) input[k][e] = pack[e];
      } else {
#pragma unroll
        for (int e = 0; e < kVec; ++e) input[k][e] = row(c + e, s);
      }
    }
  }

  __device__ __forceinline__ void push(const Pack<T, kVec>& next) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
#pragma unroll
      for (int k = 0; k + 1 < kWidth; ++k) input[k][e] = input[k + 1][e];
      input[kWidth - 1][e] = next[e];
    }
  }
};

/// Into how many blocks to cut each of `rows` rows, at least 1 and at most `most`, so that all of
/// them fill `places` resident blocks a whole number of times, or nearly: as few as do.
inline int64_t blocks_of_row(int64_t rows, int64_t places, int64_t most) {
  constexpr int kMostWaves = 8;
  constexpr double kGood = 0.9;
  int64_t best = 1;
  double best_share = 0;  // of the places in use, over all waves
  for (int waves = 1; waves <= kMostWaves && best_share < kGood; ++waves) {
    const int64_t blocks = std::clamp<int64_t>(waves * places / rows, 1, most);
    const int64_t used = rows * blocks;
    const double share = static_cast<double>(used) / (ceil_div(used, places) * places);
    if (share > best_share) {
      best = blocks;
      best_share = share;
    }
  }
  return best;
}

/// Cuts rows for warps that walk strips of kVec * 32 channels, `resident` blocks of kWarps to a
/// multiprocessor; strips are multiples of `step` tokens.
template <int kWarps, int kVec>
Strips cut_channels(const CausalConv1dParams& p, int resident, int step) {
  constexpr int kLeastTokens = 32;  // of a strip: it reads width - 1 more
  Strips strips;
  strips.groups = static_cast<unsigned>(ceil_div(p.dim, kWarpSize * kVec));
  const int64_t most = std::max<int64_t>(ceil_div(p.seqlen, kLeastTokens * kWarps), 1);
  const int64_t rows = std::max<int64_t>(p.batch * strips.groups, 1);
  const int64_t blocks = blocks_of_row(rows, int64_t{multiprocessor_count()} * resident, most);
  constexpr int64_t kMostTokens = 1 << 24;  // of a strip: they are counted in int
  const int64_t tokens = std::clamp<int64_t>(ceil_div(p.seqlen, blocks * kWarps), 1, kMostTokens);
  strips.length = static_cast<int>(ceil_div(tokens, step) * step);
  strips.blocks = static_cast<unsigned>(
      std::max<int64_t>(ceil_div(p.seqlen, int64_t{strips.length} * kWarps), 1));
  return strips;
}

/// Calls f(std::integral_constant) with the width, for the widths that have an arm of their own.
template <class F>
void for_width(int64_t width, F f) {
  switch (width) {
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 3:
      return f(std::integral_constant<int, 3>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
  }
}

inline bool has_own_arm(int64_t width) { return width >= 2 && width <= 4; }

template <class F>
void for_flag(bool flag, F f) {
  if (flag) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

/// True if every tensor moves packs of kVec neighboring channels.
template <class T, int kVec, class... Views>
bool channels_are_packed(int64_t dim, const Views&... views) {
  const auto packed = [](const View<3>& v) {
    return reinterpret_cast<uintptr_t>(v.data) % (kVec * sizeof(T)) == 0 && v.stride[1] == 1 &&
           v.stride[0] % kVec == 0 && v.stride[2] % kVec == 0;
  };
  return dim % kVec == 0 && (packed(views) && ...);
}

/// True if every tensor is dense in time and all stand at the same distance from a 16-byte boundary
/// in every row, so that one choice of vectors fits them all.
template <class T, class... Views>
bool tokens_are_vectors(const View<3>& x, const Views&... views) {
  constexpr int64_t kSize = Vector<T>::kSize;
  const auto same_phase = [](int64_t a, int64_t b) { return (a - b) % kSize == 0; };
  const auto address = [](const View<3>& v) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(v.data) / sizeof(T));
  };
  return x.stride[2] == 1 &&
         ((views.stride[2] == 1 && same_phase(address(views), address(x)) &&
           same_phase(views.stride[0], x.stride[0]) && same_phase(views.stride[1], x.stride[1])) &&
          ...);
}

/// The most slots that a row of x leaves empty in its first 16-byte vector.
template <class T>
int64_t most_phase(const View<3>& x) {
  return allows_vectors<T>(x.data, x.stride[0], x.stride[1]) ? 0 : Vector<T>::kSize - 1;
}

}  // namespace mamba_ssm::kernels
