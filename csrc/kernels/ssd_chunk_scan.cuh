// What the CUDA kernels of the SSD chunk scan share: sequences and their segments, step sizes and
// decays of a chunk, tiles in shared memory, and products on the tensor cores.
//
// A chunk is 64 tokens of a sequence. Decays are kept as base-2 logarithms, summed within a chunk:
// c_t = log2(e) A sum d. They meet in differences c_i - c_j with j <= i only, which for A <= 0 are
// never positive, so that no power of two overflows. Resets do not enter the sums: their number up
// to a token is kept beside them. Token i sees token j <= i where both numbers are equal, and the
// state before the chunk where its own is 0.
//
// Segments. Where few rows and heads have to fill the GPU, sequences are cut in time, each segment
// of as many tokens (a multiple of a chunk; the last one of a sequence may be shorter). A slot is
// the place of a segment in the grid and in the workspace. Only the device knows the lengths in
// cu_seqlens; sequence r starts with slot floor(begin / length) + r, which leaves room for all of
// its segments whatever the lengths are, and some slots without a segment.
#pragma once

#include <cuda_runtime.h>

#include "device.cuh"
#include "packed_sequences.h"
#include "scan.cuh"
#include "ssd_chunk_scan.h"
#include "tensor_cores.cuh"

namespace mamba_ssm::kernels {

constexpr int kChunk = 64;  // tokens

// ---- Sequences ---------------------------------------------------------------------------------

/// Tokens [begin, end) of batch row `row`.
struct Sequence {
  int64_t row, begin, end;
};

/// Sequence r of a call. Wrong values of cu_seqlens give wrong sequences, never a wild access.
__device__ inline Sequence sequence_of(const SsdChunkScanParams& p, int64_t r) {
  if (!given(p.cu_seqlens)) return {r, 0, p.seqlen};
  const View<1>& v = p.cu_seqlens;
  const auto bound = [&](int64_t i, int64_t least) {
    const int64_t t = load_index(v.data, v.dtype, i * v.stride[0]);
    return max(least, min(t, p.seqlen));
  };
  const int64_t begin = bound(r, 0);
  return {0, begin, bound(r + 1, begin)};
}

/// How the sequences of a call are cut.
struct Segments {
  int64_t length;        // tokens, a multiple of kChunk
  int64_t per_sequence;  // at most
  int64_t slots;

  static Segments of_length(const SsdChunkScanParams& p, int64_t length) {
    const int64_t most = p.seqlen <= length ? 1 : ceil_div(p.seqlen, length);
    const int64_t slots =
        given(p.cu_seqlens) ? p.seqlen / length + p.num_sequences : p.num_sequences * most;
    return {length, most, slots};
  }

  __device__ int64_t first_slot(const SsdChunkScanParams& p, int64_t r, int64_t begin) const {
    return given(p.cu_seqlens) ? begin / length + r : r * per_sequence;
  }
};

/// The segment of a slot: tokens [begin, end) of batch row `row`.
struct Segment {
  int64_t sequence, row, begin, end;
  bool exists;  // the first segment of an empty sequence does, with begin == end
  bool first, last;
};

__device__ inline Segment segment_of(const SsdChunkScanParams& p, const Segments& segments,
                                     int64_t slot) {
  int64_t r = slot / segments.per_sequence;
  if (given(p.cu_seqlens)) {
    // The last sequence whose first slot is at most `slot`.
    r = 0;
    for (int64_t above = p.num_sequences; r + 1 < above;) {
      const int64_t middle = (r + above) / 2;
      const bool before = segments.first_slot(p, middle, sequence_of(p, middle).begin) <= slot;
      (before ? r : above) = middle;
    }
  }
  const Sequence sequence = sequence_of(p, r);
  const int64_t i = slot - segments.first_slot(p, r, sequence.begin);
  Segment segment{};
  segment.sequence = r;
  segment.row = sequence.row;
  segment.begin = sequence.begin + i * segments.length;
  segment.end = min(sequence.end, segment.begin + segments.length);
  segment.first = i == 0;
  segment.last = segment.begin + segments.length >= sequence.end;
  segment.exists = i == 0 || (i > 0 && segment.begin < sequence.end);
  return segment;
}

// ---- Step sizes and decays ---------------------------------------------------------------------

/// From dt to the step size d of one head, and what d decays by.
template <class Acc>
struct StepRule {
  Acc bias, min, max;
  Acc rate;  // log2(e) A
  bool use_softplus;

  __device__ StepRule(const SsdChunkScanParams& p, int64_t head)
      : bias(parameter<Acc>(p.dt_bias, head)),
        min(static_cast<Acc>(p.dt_min)),
        max(static_cast<Acc>(p.dt_max)),
        rate(parameter<Acc>(p.A, head) * Acc(1.44269504088896340736)),
        use_softplus(p.dt_softplus) {}

  __device__ Acc step(Acc dt) const {
    const Acc x = dt + bias;
    const Acc d = use_softplus ? softplus(x) : x;
    return d < min ? min : d > max ? max : d;
  }

  /// Log2 of what a step leaves of the state. Bounded below, or one token that forgets everything
  /// would take the digits of the sums behind it: what is left there is 0, and stays 0 beside any
  /// growth that has not overflowed.
  __device__ Acc log_decay(Acc step) const {
    constexpr Acc kNothing = std::is_same_v<Acc, float> ? -256 : -2048;
    const Acc x = step * rate;
    return x < kNothing ? kNothing : x;
  }

  /// d step / d dt: 0 where the step was outside [min, max].
  __device__ Acc gradient(Acc dt) const {
    const Acc x = dt + bias;
    const Acc d = use_softplus ? softplus(x) : x;
    if (d < min || d > max) return Acc(0);
    return use_softplus ? softplus_gradient(x) : Acc(1);
  }
};

/// dt and marks of a chunk as they stand in memory; lane l of a warp holds tokens 2l and 2l + 1.
/// Tokens from `end` on are padding.
template <class Acc>
struct ChunkTokens {
  ParameterBits<Acc, 1> dt[2];
  uint8_t mark[2];

  __device__ __forceinline__ void load(const SsdChunkScanParams& p, int64_t row, int64_t head,
                                       int64_t begin, int64_t end) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t t = begin + 2 * (threadIdx.x % kWarpSize) + i;
      mark[i] = kPadding;
      if (t < end) {
        mark[i] = p.marks != nullptr ? p.marks[row * p.seqlen + t] : uint8_t{kContinue};
        dt[i].load(p.dt.data, p.dt.dtype,
                   row * p.dt.stride[0] + t * p.dt.stride[1] + head * p.dt.stride[2]);
      }
    }
  }
};

/// The running sum over the tokens of a chunk, lane l holding tokens 2l and 2l + 1. Added up in an
/// order of its own, the same in every call.
template <class N>
__device__ __forceinline__ void sum_up_tokens(N (&x)[2]) {
  const int lane = threadIdx.x % kWarpSize;
  N total = x[0] + x[1];
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const N other = __shfl_up_sync(kAllLanes, total, distance);
    if (lane >= distance) total += other;
  }
  N before = __shfl_up_sync(kAllLanes, total, 1);
  if (lane == 0) before = 0;
  x[0] += before;
  x[1] = total;
}

/// Step sizes, decays and resets of a chunk; lane l of a warp holds tokens 2l and 2l + 1.
template <class Acc>
struct ChunkSteps {
  Acc step[2];     // d_t; 0 at padding
  Acc decay[2];    // c_t
  int resets[2];   // marked tokens from the chunk's first one to t
  Acc last_decay;  // of the chunk's last token, in every lane
  int last_resets;

  __device__ __forceinline__ ChunkSteps(const StepRule<Acc>& rule, const ChunkTokens<Acc>& tokens,
                                        DType dt_dtype) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      step[i] = tokens.mark[i] == kPadding ? Acc(0) : rule.step(tokens.dt[i].value(dt_dtype, 0));
      decay[i] = rule.log_decay(step[i]);
      resets[i] = tokens.mark[i] == kReset;
    }
    sum_up_tokens(decay);
    sum_up_tokens(resets);
    last_decay = __shfl_sync(kAllLanes, decay[1], kWarpSize - 1);
    last_resets = __shfl_sync(kAllLanes, resets[1], kWarpSize - 1);
  }

  /// What is left at token i of the state before the chunk.
  __device__ __forceinline__ Acc entering(int i) const {
    return resets[i] == 0 ? fast_exp2(decay[i]) : Acc(0);
  }
  /// What is left after the chunk of token i's contribution to the state.
  __device__ __forceinline__ Acc leaving(int i) const {
    return resets[i] == last_resets ? fast_exp2(last_decay - decay[i]) : Acc(0);
  }
  /// What is left after the chunk of the state before it.
  __device__ __forceinline__ Acc passing() const {
    return last_resets == 0 ? fast_exp2(last_decay) : Acc(0);
  }
};

/// True if rows of v move as 16-byte vectors, whatever multiple of 8 columns they start at.
template <class T>
bool has_vector_rows(const View<4>& v) {
  return v.stride[3] == 1 && allows_vectors<T>(v.data, v.stride[0], v.stride[1], v.stride[2]);
}

// ---- Products of a unit ------------------------------------------------------------------------
//
// Four neighboring warps, the first of which has a number that four divides, own 16 of 64 rows of
// each accumulator: d[t] is the D above of columns 8t .. 8t + 7. Operands A in registers are those
// rows of A in steps of 16 columns; tiles start on 1024-byte boundaries.
//
// Where the code is made for sm_90a the four warps multiply together (wgmma), with the operand B,
// or both, read from tiles by the tensor cores themselves. Tiles have the layout which that calls
// the 128-byte swizzle. What was written to them needs publish_tiles() before the barrier that
// shows it to the readers. Elsewhere every warp multiplies for itself.

/// Writes of this thread to tiles, asynchronous ones that it has waited for included, become
/// visible to multiplications after the next barrier.
__device__ __forceinline__ void publish_tiles() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/// Barrier of the four warps of unit `unit`.
__device__ __forceinline__ void sync_unit(int unit) {
  asm volatile("bar.sync %0, 128;" ::"r"(unit + 1) : "memory");
}

constexpr int kChunkPanel = kChunk * kPanel * 2;  // bytes of 64 columns of a tile of kChunk rows

/// d = P Q^T for tiles P and Q of (kChunk, kColumns). Without wgmma only its lower triangle, in
/// blocks of 16.
template <int kColumns, class T>
__device__ __forceinline__ void multiply_tiles(float (&d)[kChunk / 8][4], const T* P, const T* Q) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const uint64_t p = describe_tile(P, kRowGroup, 0);
  const uint64_t q = describe_tile(Q, kRowGroup, 0);
  begin_products();
#pragma unroll
  for (int k = 0; k < kColumns; k += 16) {
    const int at = k / kPanel * kChunk * kPanel + k % kPanel;
    multiply_async<T>(d, advance_tile(p, at), advance_tile(q, at), k > 0);
  }
  end_products(d);
#else
  const int row = warp_id() % 4 * 16;
#pragma unroll
  for (int t = 0; t < kChunk / 8; ++t) d[t][0] = d[t][1] = d[t][2] = d[t][3] = 0;
#pragma unroll
  for (int k = 0; k < kColumns; k += 16) {
    uint32_t a[4];
    load_a<kChunk>(a, P, row, k);
#pragma unroll
    for (int column = 0; column < kChunk; column += 16) {
      if (column > row) break;
      uint32_t b[4];
      load_b_transposed<kChunk>(b, Q, column, k);
      multiply_add<T>(d[column / 8], a, b[0], b[1]);
      multiply_add<T>(d[column / 8 + 1], a, b[2], b[3]);
    }
  }
#endif
}

/// d += A Q^T for A (64, 16 * kSteps) in registers and Q[.., first ..] of a tile of kChunk rows.
/// With kLower, Q is zero right of its diagonal blocks of 16.
template <bool kLower, int kSteps, class T>
__device__ __forceinline__ void multiply_transposed(float (&d)[kChunk / 8][4],
                                                    const uint32_t (&a)[kSteps][4], const T* Q,
                                                    int first) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const uint64_t q = describe_tile(Q, kRowGroup, 0);
  begin_products();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const int column = first + 16 * k;
    const int at = column / kPanel * kChunk * kPanel + column % kPanel;
    multiply_async<T, 0>(d, a[k], advance_tile(q, at));
  }
  end_products(d);
#else
  const int lane = recomputed(lane_id());
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int row = kLower ? 16 * k : 0; row < kChunk; row += 16) {
      uint32_t b[4];
      load_b_transposed<kChunk>(b, Q, row, first + 16 * k, lane);
      multiply_add<T>(d[row / 8], a[k], b[0], b[1]);
      multiply_add<T>(d[row / 8 + 1], a[k], b[2], b[3]);
    }
  }
#endif
}

/// d += A Q for A (64, kChunk) in registers and a tile Q of (kChunk, 8 * kTiles).
template <int kTiles, class T>
__device__ __forceinline__ void multiply(float (&d)[kTiles][4], const uint32_t (&a)[kChunk / 16][4],
                                         const T* Q) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const uint64_t q = describe_tile(Q, kRowGroup, kChunkPanel);
  begin_products();
#pragma unroll
  for (int k = 0; k < kChunk / 16; ++k) {
    multiply_async<T, 1>(d, a[k], advance_tile(q, k * 16 * kPanel));
  }
  end_products(d);
#else
  const int lane = recomputed(lane_id());
#pragma unroll
  for (int k = 0; k < kChunk / 16; ++k) {
#pragma unroll
    for (int column = 0; column < 8 * kTiles; column += 16) {
      uint32_t b[4];
      load_b<kChunk>(b, Q, k * 16, column, lane);
      multiply_add<T>(d[column / 8], a[k], b[0], b[1]);
      multiply_add<T>(d[column / 8 + 1], a[k], b[2], b[3]);
    }
  }
#endif
}

}  // namespace mamba_ssm::kernels
