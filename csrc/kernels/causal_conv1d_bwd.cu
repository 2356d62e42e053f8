// Causal depthwise convolution, backward.
//
//   g[t]       = dout[t] * act'(a[t])          a: recomputed, 0 where t is padding
//   dx[s]      = sum_k weight[k] * g[s + width-1 - k]  (+ dfinal_states of s)
//   dweight[k] = sum_{b,t} g[t] * x[t - (width-1) + k]        dbias = sum_{b,t} g[t]
//
// over the taps that the forward used; dinitial_states is dx at s < 0. g[t] is formed once, in time
// order or against it, and used for the width tokens that it reaches; dx is always added up in the
// order of t, so that its bits do not depend on where a row stands in memory.
//
// Channel-last and element-wise data: a thread owns a few channels (one, if strides allow no packs)
// and walks a strip of tokens; the warps of a block walk neighboring strips of the same channels
// and add up their shares of dweight and dbias. Channel-first data: a warp walks a strip of one row
// backwards, a thread vectors along time. In both, the next tokens are on their way to shared
// memory. Other widths: as element-wise, but every g is recomputed where it is used.
//
// dweight and dbias leave a block as one partial sum: workspace (partials, dim, width + 1), the
// bias behind the taps; a second kernel adds the partials up in order.
#include "causal_conv1d.cuh"
#include "launch.cuh"

namespace mamba_ssm::kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
// Walking channels.
constexpr int kRows = 4;  // tokens of a stage; after four the window is back in its registers
template <int kVec>
constexpr int kResident = kVec == 2 ? 6 : 4;  // blocks of a multiprocessor
// Walking tokens.
constexpr int kTokenResident = 7;  // blocks of a multiprocessor

/// The tokens of the extended row that dfinal_states belongs to: [begin, last] of sequence id,
/// counted from the start of a strip.
struct FinalTokens {
  int begin, last;
  int64_t id;

  __device__ bool contains(int s) const { return s >= begin && s <= last; }
};

/// Whole warps only. Without dfinal_states no token is a final token.
template <bool kPacked>
__device__ FinalTokens final_tokens(const CausalConv1dParams& p, const ExtendedIds& ids,
                                    int64_t origin) {
  constexpr int kFar = INT32_MAX / 2;  // behind every strip
  if (!given(p.dfinal_states)) return {kFar, -kFar, 0};
  int64_t last = p.seqlen - 1;
  if (kPacked && given(p.seq_idx)) last = last_real_token(ids.ids, p.seqlen);
  const int64_t begin = last - (p.width - 2);
  const auto relative = [&](int64_t t) {
    const int64_t offset = t - origin;
    return static_cast<int>(offset < -kFar ? -kFar : offset > kFar ? kFar : offset);
  };
  return {relative(begin), relative(last), kPacked ? ids(last) : 0};
}

/// What dfinal_states adds to the gradient of a final token, `s` tokens from the start `origin` of
/// the strip.
template <class T, bool kPacked>
__device__ Accumulate<T> final_gradient(const CausalConv1dParams& p, const FinalTokens& final,
                                        const ExtendedIds& ids, int64_t b, int64_t c,
                                        int64_t origin, int s) {
  if (kPacked && ids(origin + s) != final.id) return 0;
  const View<3>& d = p.dfinal_states;
  return to_accumulate(static_cast<const T*>(
      d.data)[b * d.stride[0] + c * d.stride[1] + (s - final.begin) * d.stride[2]]);
}

/// Stores a gradient of the initial states; s < 0 is a position of the extended row.
template <class T>
__device__ void store_initial_gradient(const CausalConv1dParams& p, int64_t b, int64_t c, int64_t s,
                                       Accumulate<T> value) {
  const View<3>& d = p.dinitial_states;
  const int64_t column = s + p.width - 1;
  if (!given(d) || column < 0) return;
  static_cast<T*>(d.data)[b * d.stride[0] + c * d.stride[1] + column * d.stride[2]] =
      from_accumulate<T>(value);
}

/// g * d silu / d a = t + t (a - a s) with s = sigmoid(a), t = g s.
template <class Acc>
__device__ __forceinline__ Acc times_silu_gradient(Acc g, Acc a) {
  const Acc s = sigmoid(a);
  const Acc t = g * s;
  return t + t * (a - a * s);
}

/// g at token t of channel c, any width; zero behind the row.
template <class T>
__device__ Accumulate<T> output_gradient(const CausalConv1dParams& p, const ExtendedIds& ids,
                                         int64_t b, int64_t c, int64_t t) {
  if (t >= p.seqlen || (given(p.seq_idx) && ids(t) < 0)) return 0;
  const Accumulate<T> dout = to_accumulate(static_cast<const T*>(
      p.dout.data)[b * p.dout.stride[0] + c * p.dout.stride[1] + t * p.dout.stride[2]]);
  return p.silu ? times_silu_gradient(dout, preactivation<T>(p, ids, b, c, t)) : dout;
}

/// Sums of every thread, to be added up over the warps of a block.
template <class Acc, int kSums, int kVec>
struct BlockSums {
  Acc value[kWarps][kSums][kVec][kWarpSize];
};

/// Adds up `kSums` numbers for each of a thread's kVec channels over the warps of the block, in
/// order, and stores them as columns [column, column + count) of the block's partial sum. The whole
/// block; `shared` is free before and after.
template <int kVec, int kSums, class Acc>
__device__ void store_partial(const CausalConv1dParams& p, const ChannelWalk<kWarps, kVec>& walk,
                              const Acc (&sums)[kSums][kVec], int64_t column, int count,
                              BlockSums<Acc, kSums, kVec>& shared, Acc* partials) {
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) shared.value[warp][k][e][lane] = sums[k][e];
  }
  __syncthreads();
  const int64_t c0 = walk.c - lane * kVec;
  const int64_t columns = p.width + 1;
  for (int i = threadIdx.x; i < kWarpSize * kVec * kSums; i += kThreads) {
    const int k = i % kSums;
    const int channel = i / kSums;
    if (c0 + channel >= p.dim || k >= count) continue;
    Acc sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.value[w][k][channel % kVec][channel / kVec];
    partials[(walk.block * p.dim + c0 + channel) * columns + column + k] = sum;
  }
}

template <class T, int kVec, int kWidth, bool kPacked>
__global__ void __launch_bounds__(kThreads, kResident<kVec>)
    backward_channels(const CausalConv1dParams p, const Strips strips, Accumulate<T>* partials) {
  using Acc = Accumulate<T>;
  constexpr int kStages = 4;  // of the ring: 32 KB a block
  // A thread reads only what it copied itself: no barriers.
  struct Stage {
    Pack<T, kVec> x[kThreads];
    Pack<T, kVec> dout[kThreads];
  };
  __shared__ union {
    Stage ring[kStages][kRows];
    BlockSums<Acc, kWidth + 1, kVec> sums;
  } shared;

  const ChannelWalk<kWarps, kVec> walk(p, strips);
  const int64_t b = walk.b;
  const int64_t c = walk.c;
  const int64_t begin = walk.begin;
  const int length = walk.length;
  const ExtendedIds ids = extended_ids<kPacked>(p, b, begin - (kWidth - 1));
  const FinalTokens final = final_tokens<kPacked>(p, ids, begin);
  Acc sums[kWidth + 1][kVec] = {};  // dweight, dbias of this strip

  if (c < p.dim && (length > 0 || begin == 0)) {
    const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride[0] + c * p.x.stride[1] +
                 begin * p.x.stride[2];
    const T* dout = static_cast<const T*>(p.dout.data) + b * p.dout.stride[0] +
                    c * p.dout.stride[1] + begin * p.dout.stride[2];
    T* dx = static_cast<T*>(p.dx.data) + b * p.dx.stride[0] + c * p.dx.stride[1] +
            (begin - (kWidth - 1)) * p.dx.stride[2];
    // The strip's own tokens, then the kWidth - 1 behind it that still reach back into it.
    const int end = length + kWidth - 1;
    const int64_t rest = p.seqlen - begin;
    const int readable = rest < end ? static_cast<int>(rest) : end;
    int fetched = 0;
    int fetch_stage = 0;
    const auto fetch = [&] {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const bool there = fetched + r < readable;
        copy_async(&shared.ring[fetch_stage][r].x[threadIdx.x], x, there);
        copy_async(&shared.ring[fetch_stage][r].dout[threadIdx.x], dout, there);
        x += p.x.stride[2];
        dout += p.dout.stride[2];
      }
      commit_copies();
      fetched += kRows;
      fetch_stage = fetch_stage + 1 < kStages ? fetch_stage + 1 : 0;
    };
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) fetch();

    const Taps<T, kVec, kWidth> taps(p.weight, p.bias, c);
    Window<T, kVec, kWidth> window;
    window.start(p, b, c, begin);
    TapFilter<kWidth, kPacked> filter(ids, begin);
    Acc pending[kWidth][kVec] = {};  // dx of the tokens of the window, as far as it is known

    // One token, `u` from the start of the strip, with the taps it uses: none if it is padding or
    // behind the row. Then all contributions to dx of the token kWidth - 1 before it have come.
    // Interior: both tokens are the strip's.
    const auto step = [&](auto interior, int u, const Stage& row, unsigned used) {
      constexpr bool kInterior = decltype(interior)::value;
      window.push(row.x[threadIdx.x]);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
#pragma unroll
        for (int k = 0; k + 1 < kWidth; ++k) pending[k][e] = pending[k + 1][e];
        pending[kWidth - 1][e] = 0;
      }
      if ((kInterior && !kPacked) || used != 0) {
        const Pack<T, kVec> dout_row = row.dout[threadIdx.x];
        Acc a[kVec];
        Acc g[kVec];
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          a[e] = taps.bias[e];
          g[e] = dout_row[e];
        }
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          if (kPacked && !(used >> k & 1)) continue;
#pragma unroll
          for (int e = 0; e < kVec; ++e) a[e] += taps.weight[k][e] * window.input[k][e];
        }
        if (p.silu) {
#pragma unroll
          for (int e = 0; e < kVec; ++e) g[e] = times_silu_gradient(g[e], a[e]);
        }
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          if (kPacked && !(used >> k & 1)) continue;
#pragma unroll
          for (int e = 0; e < kVec; ++e) {
            pending[k][e] += taps.weight[k][e] * g[e];
            if (kInterior || u < length) sums[k][e] += window.input[k][e] * g[e];
          }
        }
        if (kInterior || u < length) {
#pragma unroll
          for (int e = 0; e < kVec; ++e) sums[kWidth][e] += g[e];
        }
      }
      const int s = u - (kWidth - 1);
      if (kInterior || (s >= 0 && s < length)) {
        Pack<T, kVec> rounded;
        rounded.round(pending[0]);
        rounded.store(dx);
      } else if (s < 0 && begin == 0) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          store_initial_gradient<T>(p, b, c + e, s, pending[0][e]);
        }
      }
      dx += p.dx.stride[2];
    };

    int stage = 0;
    for (int i = 0; i < end; i += kRows) {
      wait_copies<kStages - 2>();
      const Stage(&rows)[kRows] = shared.ring[stage];
      if (i >= kWidth - 1 && i + kRows <= length &&
          (i + kRows <= final.begin || i - (kWidth - 1) > final.last)) {
        unsigned used[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) used[r] = filter.next(kPacked ? ids(begin + i + r) : 0);
#pragma unroll
        for (int r = 0; r < kRows; ++r) step(std::true_type{}, i + r, rows[r], used[r]);
      } else {
#pragma unroll 1
        for (int u = i; u < i + kRows && u < end; ++u) {
          const unsigned used = u < readable ? filter.next(kPacked ? ids(begin + u) : 0) : 0;
          const int s = u - (kWidth - 1);
          if (final.contains(s)) {
#pragma unroll
            for (int e = 0; e < kVec; ++e) {
              pending[1][e] += final_gradient<T, kPacked>(p, final, ids, b, c + e, begin, s);
            }
          }
          step(std::false_type{}, u, rows[u - i], used);
        }
      }
      fetch();
      stage = stage + 1 < kStages ? stage + 1 : 0;
    }
    wait_copies<0>();  // the sums take the ring's place
  }
  store_partial(p, walk, sums, 0, kWidth + 1, shared.sums, partials);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    backward_any(const CausalConv1dParams p, const Strips strips, Accumulate<T>* partials) {
  using Acc = Accumulate<T>;
  constexpr int kSums = 8;  // columns of dweight and dbias that one pass over the strip collects
  __shared__ BlockSums<Acc, kSums, 1> shared;
  const ChannelWalk<kWarps, 1> walk(p, strips);
  const int64_t b = walk.b;
  const int64_t c = walk.c;
  const int64_t halo = p.width - 1;
  const ExtendedIds ids = extended_ids<true>(p, b, walk.begin - halo);
  const FinalTokens final = final_tokens<true>(p, ids, walk.begin);
  const ExtendedRow<T> input{p, b};
  const int64_t end = walk.begin + walk.length;

  for (int64_t column = 0; column <= p.width; column += kSums) {
    Acc sums[kSums][1] = {};
    for (int64_t t = walk.begin; t < end && c < p.dim; ++t) {
      const int64_t id = ids(t);
      if (id < 0) continue;
      const Acc g = output_gradient<T>(p, ids, b, c, t);
#pragma unroll
      for (int j = 0; j < kSums; ++j) {
        const int64_t k = column + j;
        if (k == p.width) sums[j][0] += g;
        if (k < p.width && ids(t - halo + k) == id) sums[j][0] += g * input(c, t - halo + k);
      }
    }
    const int64_t left = p.width + 1 - column;
    store_partial(p, walk, sums, column, left < kSums ? static_cast<int>(left) : kSums, shared,
                  partials);
  }

  if (c >= p.dim) return;
  for (int64_t s = walk.begin == 0 ? -halo : walk.begin; s < end; ++s) {
    const int64_t id = ids(s);
    const int offset = static_cast<int>(s - walk.begin);
    Acc sum = 0;
    if (final.contains(offset)) {
      sum = final_gradient<T, true>(p, final, ids, b, c, walk.begin, offset);
    }
    for (int64_t k = 0; k < p.width && id >= 0; ++k) {
      const int64_t t = s + halo - k;
      if (t < 0 || t >= p.seqlen || ids(t) != id) continue;
      sum += load_as<Acc>(p.weight.data, p.weight.dtype,
                          c * p.weight.stride[0] + k * p.weight.stride[1]) *
             output_gradient<T>(p, ids, b, c, t);
    }
    if (s < 0) {
      store_initial_gradient<T>(p, b, c, s, sum);
    } else {
      static_cast<T*>(p.dx.data)[b * p.dx.stride[0] + c * p.dx.stride[1] + s * p.dx.stride[2]] =
          from_accumulate<T>(sum);
    }
  }
}

/// kPlain: rows start and end at 16-byte boundaries, and there are neither ids nor states.
template <class T, int kWidth, bool kPlain>
__global__ void __launch_bounds__(kThreads, kPlain ? kTokenResident : 1)
    backward_tokens(const CausalConv1dParams p, const Strips strips, Accumulate<T>* partials) {
  using Acc = Accumulate<T>;
  constexpr int kVec = Vector<T>::kSize;
  constexpr int kHalo = kWidth - 1;
  constexpr int kTail = 4;                 // elements at the end of a vector that hold the halo
  constexpr int kStep = kWarpSize * kVec;  // tokens that a warp computes at a time
  constexpr int kStages = 4;               // of the ring, a step each: 16 KB a block
  struct Stage {
    Pack<T, kVec> x[kWarpSize];
    Pack<T, kVec> dout[kWarpSize];
  };
  __shared__ Stage shared[kWarps][kStages];
  Stage* const ring = shared[threadIdx.x / kWarpSize];

  const int lane = threadIdx.x % kWarpSize;
  const unsigned strip = blockIdx.x % strips.blocks;
  const unsigned index = blockIdx.x / strips.blocks;
  const int64_t c = int64_t{index % strips.groups} * kWarps + threadIdx.x / kWarpSize;
  const int64_t b = index / strips.groups;
  if (c >= p.dim) return;

  const T* x = static_cast<const T*>(p.x.data) + b * p.x.stride[0] + c * p.x.stride[1];
  const T* dout = static_cast<const T*>(p.dout.data) + b * p.dout.stride[0] + c * p.dout.stride[1];
  T* dx = static_cast<T*>(p.dx.data) + b * p.dx.stride[0] + c * p.dx.stride[1];
  // Vectors start at 16-byte boundaries: the first one of a row may reach back before token 0. From
  // here on tokens are counted from the start of the strip; the row has those in [head, readable),
  // the strip those before `length`. The tokens behind the strip that reach back into it are in the
  // step that follows.
  const int phase = kPlain ? 0 : static_cast<int>(reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T));
  const int64_t begin = int64_t{strip} * strips.length - phase;
  const int head = begin < 0 ? phase : 0;
  const int64_t rest = p.seqlen - begin;
  const int length = rest < strips.length ? static_cast<int>(rest) : strips.length;
  const int readable = rest < length + kStep ? static_cast<int>(rest) : length + kStep;
  x += begin;
  dout += begin;
  dx += begin;
  const ExtendedRow<T> input{p, b};
  const auto inside = [&](int u) {
    return kPlain ? u < readable : u >= head && u + kVec <= readable;
  };

  // Steps go down from `first` to 0. Of the step before 0 only the halo is fetched.
  const int first = (readable - 1) / kStep;
  const auto slot = [](int i) { return static_cast<unsigned>(i) % kStages; };
  const auto fetch = [&](int i) {
    const int u = i * kStep + lane * kVec;
    Stage& stage = ring[slot(i)];
    if (u >= -kVec) {
      if (kPlain || inside(u)) {
        const bool there = inside(u) && (u >= 0 || begin > 0);
        copy_async(&stage.x[lane], x + u, there);
        copy_async(&stage.dout[lane], dout + u, there);
      } else {
        // Slots outside of the row hold no token: there dout is 0, and so is g.
        Acc x_values[kVec];
        Acc dout_values[kVec];
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          const bool real = u + e >= head && u + e < readable;
          x_values[e] = input(c, begin + u + e);
          dout_values[e] = real ? to_accumulate(dout[u + e]) : Acc(0);
        }
        stage.x[lane].round(x_values);  // exact: they come from T
        stage.dout[lane].round(dout_values);
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int j = 0; j < kStages - 1; ++j) fetch(first - j);

  const Taps<T, 1, kWidth> taps(p.weight, p.bias, c);
  const ExtendedIds ids = extended_ids<!kPlain>(p, b, begin - kHalo);
  FinalTokens final = {};
  if constexpr (!kPlain) final = final_tokens<true>(p, ids, begin);
  Acc sums[kWidth + 1] = {};  // dweight, dbias of this strip
  // Of the first kHalo tokens right of lane 31: their g, and which taps they use.
  Acc after[kHalo] = {};
  unsigned used_after = 0;

  for (int i = first; i >= 0; --i) {
    // This step and the one to its left have to be there, for all lanes; and all lanes are done
    // with the step to the right, whose place is filled again.
    wait_copies<kStages - 3>();
    __syncwarp();
    fetch(i - (kStages - 1));
    const int u = i * kStep + lane * kVec;
    Acc window[kHalo + kVec];  // inputs of tokens u - kHalo .. u + kVec - 1
    Acc g[kVec + kHalo];       // of tokens u .. u + kVec + kHalo - 1
    {
      const Stage& stage = ring[slot(i)];
      const Pack<T, kVec> x_vector = stage.x[lane];
      const Pack<T, kVec> dout_vector = stage.dout[lane];
      const Pack<T, kVec>* const left =
          lane > 0 ? &stage.x[lane - 1] : &ring[slot(i - 1)].x[kWarpSize - 1];
      Pack<T, kTail> tail;
      tail.load(reinterpret_cast<const T*>(left) + kVec - kTail);
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        window[kHalo + e] = x_vector[e];
        g[e] = dout_vector[e];
      }
#pragma unroll
      for (int j = 0; j < kHalo; ++j) window[j] = tail[kTail - kHalo + j];
    }

    const unsigned used = filter_taps<kWidth, !kPlain, kVec>(ids, begin + u, p.seqlen);
    unsigned used_right = 0;
    const auto uses = [&](int e, int k) {
      const unsigned bits = e < kVec ? used >> (e * kWidth) : used_right >> ((e - kVec) * kWidth);
      return kPlain || (bits >> k & 1) != 0;
    };
    if constexpr (!kPlain) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        if (!uses(e, kHalo)) g[e] = 0;
      }
    }
    Acc a[kVec];
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      a[e] = taps.bias[0];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        if (uses(e, k)) a[e] += taps.weight[k][0] * window[e + k];
      }
    }
    if (p.silu) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) g[e] = times_silu_gradient(g[e], a[e]);
    }
#pragma unroll
    for (int j = 0; j < kHalo; ++j) {
      const Acc right = __shfl_sync(kAllLanes, g[j], (lane + 1) % kWarpSize);
      g[kVec + j] = lane == kWarpSize - 1 ? after[j] : right;
      after[j] = right;  // lane 31 keeps what is lane 0's, for the next step
    }
    if constexpr (!kPlain) {
      const unsigned right = __shfl_sync(kAllLanes, used, (lane + 1) % kWarpSize);
      used_right = lane == kWarpSize - 1 ? used_after : right;
      used_after = right;
    }
    if (i * kStep >= length) continue;  // behind the strip

#pragma unroll
    for (int e = 0; e < kVec; ++e) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        if (uses(e, k)) sums[k] += window[e + k] * g[e];
      }
      sums[kWidth] += g[e];
    }
    Acc gradient[kVec] = {};
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        if (uses(e + j, kHalo - j)) gradient[e] += taps.weight[kHalo - j][0] * g[e + j];
      }
    }
    if (inside(u) && (kPlain || u + kVec <= final.begin)) {
      Pack<T, kVec> rounded;
      rounded.round(gradient);
      rounded.store(dx + u);
    } else if constexpr (!kPlain) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        if (u + e >= readable) break;
        Acc value = gradient[e];
        if (final.contains(u + e)) {
          value += final_gradient<T, true>(p, final, ids, b, c, begin, u + e);
        }
        if (u + e >= head) {
          dx[u + e] = from_accumulate<T>(value);
        } else {
          store_initial_gradient<T>(p, b, c, begin + u + e, value);
        }
      }
    }
  }

  // Left of lane 0: the rest of dinitial_states.
  if (!kPlain && strip == 0 && lane == kWarpSize - 1) {
#pragma unroll
    for (int j = 0; j < kHalo; ++j) {
      Acc value = 0;
#pragma unroll
      for (int e = 0; e <= j; ++e) {
        if (used_after >> (e * kWidth + j - e) & 1) value += taps.weight[j - e][0] * after[e];
      }
      if (final.contains(j - kHalo)) {
        value += final_gradient<T, true>(p, final, ids, b, c, begin, j - kHalo);
      }
      store_initial_gradient<T>(p, b, c, begin - kHalo + j, value);
    }
  }

#pragma unroll
  for (int k = 0; k <= kWidth; ++k) {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      sums[k] += __shfl_xor_sync(kAllLanes, sums[k], distance);
    }
  }
  if (lane == 0) {
    Acc* partial = partials + ((b * strips.blocks + strip) * p.dim + c) * (kWidth + 1);
#pragma unroll
    for (int k = 0; k <= kWidth; ++k) partial[k] = sums[k];
  }
}

/// dweight and dbias from their partial sums. A thread per column and slice of the partials.
template <class Acc>
__global__ void __launch_bounds__(kThreads)
    reduce_partials(const CausalConv1dParams p, const Acc* partials, int64_t count) {
  __shared__ Acc shared[kWarps][kWarpSize];
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t columns = p.dim * (p.width + 1);
  const int64_t column = blockIdx.x * int64_t{kWarpSize} + lane;
  Acc sum = 0;
  if (column < columns) {
#pragma unroll 8
    for (int64_t i = warp; i < count; i += kWarps) sum += partials[i * columns + column];
  }
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= columns) return;
  for (int w = 1; w < kWarps; ++w) sum += shared[w][lane];
  const int64_t c = column / (p.width + 1);
  const int64_t k = column % (p.width + 1);
  if (k < p.width) {
    store_as(p.dweight.data, p.dweight.dtype, c * p.dweight.stride[0] + k * p.dweight.stride[1],
             sum);
  } else if (given(p.dbias)) {
    store_as(p.dbias.data, p.dbias.dtype, c * p.dbias.stride[0], sum);
  }
}

template <int kVec>
Strips channel_strips(const CausalConv1dParams& p) {
  return cut_channels<kWarps, kVec>(p, kResident<kVec>, kRows);
}

/// Strips of warps that walk tokens. A row of x leaves up to `phase` slots empty in its first
/// vector.
template <class T>
Strips token_strips(const CausalConv1dParams& p, int64_t phase) {
  constexpr int64_t kStep = kWarpSize * Vector<T>::kSize;
  constexpr int64_t kLeastSteps = 8;       // of a strip: it computes one more
  constexpr int64_t kMostSteps = 1 << 16;  // its tokens are counted in int
  Strips strips;
  strips.groups = static_cast<unsigned>(ceil_div(p.dim, kWarps));
  const int64_t steps = std::max<int64_t>(ceil_div(p.seqlen + phase, kStep), 1);
  const int64_t most = std::max<int64_t>(steps / kLeastSteps, 1);
  const int64_t blocks = blocks_of_row(p.batch * strips.groups,
                                       int64_t{multiprocessor_count()} * kTokenResident, most);
  strips.length = static_cast<int>(std::min(ceil_div(steps, blocks), kMostSteps) * kStep);
  strips.blocks = static_cast<unsigned>(ceil_div(steps * kStep, strips.length));
  return strips;
}

/// The layouts of data that have kernels of their own.
enum class Layout { kChannelPacks, kTokenVectors, kElements, kOtherWidth };

template <class T>
Layout layout_of(const CausalConv1dParams& p) {
  if (!has_own_arm(p.width)) return Layout::kOtherWidth;
  if (sizeof(T) > 4 || p.seqlen == 0) return Layout::kElements;
  if (channels_are_packed<T, kPackedChannels<T>>(p.dim, p.x, p.dout, p.dx)) {
    return Layout::kChannelPacks;
  }
  if (tokens_are_vectors<T>(p.x, p.dout, p.dx)) return Layout::kTokenVectors;
  return Layout::kElements;
}

}  // namespace

/// The same for every layout, so that it depends on sizes only.
template <class T>
size_t workspace_causal_conv1d_bwd(const CausalConv1dParams& p) {
  if (p.batch == 0 || p.dim == 0) return 0;
  unsigned count = channel_strips<1>(p).blocks;
  if constexpr (sizeof(T) <= 4) {
    count =
        std::max({count, channel_strips<kPackedChannels<T>>(p).blocks, token_strips<T>(p, 0).blocks,
                  token_strips<T>(p, Vector<T>::kSize - 1).blocks});
  }
  return sizeof(Accumulate<T>) * static_cast<size_t>(p.batch * count * p.dim * (p.width + 1));
}

template <class T>
CudaStatus launch_causal_conv1d_bwd(const CausalConv1dParams& p, void* workspace,
                                    CudaStream stream_handle) {
  using Acc = Accumulate<T>;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (p.dim == 0) return cudaSuccess;
  Acc* const partials = static_cast<Acc*>(workspace);
  int64_t count = 0;  // of partial sums
  if (p.batch > 0) {
    const Layout layout = layout_of<T>(p);
    Strips strips = channel_strips<1>(p);
    const auto blocks = [&] {
      count = p.batch * strips.blocks;
      return static_cast<unsigned>(count * strips.groups);
    };
    if constexpr (sizeof(T) <= 4) {
      if (layout == Layout::kChannelPacks) {
        strips = channel_strips<kPackedChannels<T>>(p);
        for_width(p.width, [&](auto width) {
          for_flag(given(p.seq_idx), [&](auto packed) {
            backward_channels<T, kPackedChannels<T>, width, packed>
                <<<blocks(), kThreads, 0, stream>>>(p, strips, partials);
          });
        });
      } else if (layout == Layout::kTokenVectors) {
        const int64_t phase = most_phase<T>(p.x);
        const bool plain = phase == 0 && p.seqlen % Vector<T>::kSize == 0 && !given(p.seq_idx) &&
                           !given(p.initial_states) && !given(p.dfinal_states) &&
                           !given(p.dinitial_states);
        strips = token_strips<T>(p, phase);
        for_width(p.width, [&](auto width) {
          for_flag(plain, [&](auto is_plain) {
            backward_tokens<T, width, is_plain>
                <<<blocks(), kThreads, 0, stream>>>(p, strips, partials);
          });
        });
      }
    }
    if (layout == Layout::kElements) {
      for_width(p.width, [&](auto width) {
        backward_channels<T, 1, width, true>
            <<<blocks(), kThreads, 0, stream>>>(p, strips, partials);
      });
    } else if (layout == Layout::kOtherWidth) {
      backward_any<T><<<blocks(), kThreads, 0, stream>>>(p, strips, partials);
    }
  }
  const int64_t columns = p.dim * (p.width + 1);
  reduce_partials<Acc>
      <<<static_cast<unsigned>(ceil_div(columns, kWarpSize)), kThreads, 0, stream>>>(p, partials,
                                                                                     count);
  return cudaGetLastError();
}

template size_t workspace_causal_conv1d_bwd<MAMBA_SSM_ELEMENT>(const CausalConv1dParams&);
template CudaStatus launch_causal_conv1d_bwd<MAMBA_SSM_ELEMENT>(const CausalConv1dParams&, void*,
                                                                CudaStream);

}  // namespace mamba_ssm::kernels
