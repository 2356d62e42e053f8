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
    const int64_t t = load_as<int64_t>(v.data, v.dtype, i * v.stride[0]);
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
      decay[i] = step[i] * rule.rate;
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

// ---- Tiles in shared memory --------------------------------------------------------------------
//
// A tile of 16-bit elements has rows of 64 columns (128 bytes); wider tiles are panels of 64
// columns behind one another. The eight 16-byte vectors of a row are permuted by the row's number,
// so that the same vector of eight rows, what ldmatrix reads at a time, lies in different banks.

constexpr int kPanel = 64;      // columns
constexpr int kTileVector = 8;  // elements of 16 bytes

/// Position of an element in a tile of kRows rows.
template <int kRows>
__device__ __forceinline__ int tile_at(int row, int column) {
  const int vector = (column >> 3 ^ row) & 7;
  return ((column >> 6) * kRows + row) * kPanel + vector * kTileVector + (column & 7);
}

/// tile_at(row + lane_row, column + 8 * lane_vector) for a row that is a multiple of 8 and a column
/// that is one of 16: what depends on the lane (lane_vector is 0 or 1) is computed once for all of
/// them.
template <int kRows>
__device__ __forceinline__ int tile_at(int row, int column, int lane_row, int lane_vector) {
  const int lane_part = lane_row * kPanel + ((lane_vector ^ lane_row) & 7) * kTileVector;
  return (lane_part ^ (column & 63)) + ((column >> 6) * kRows + row) * kPanel;
}

/// A matrix in global memory: elements column by column, rows row_stride apart.
template <class T>
struct MatrixView {
  T* data;
  int64_t row_stride, column_stride;
  int columns;
  bool vectors;  // rows start on 16-byte boundaries and their columns lie side by side

  /// (tokens of batch row `row`, one head or group, columns from `column` on) of a tensor
  __device__ MatrixView(const View<4>& v, bool vectors, int64_t row, int64_t head, int64_t column,
                        int64_t all_columns)
      : data(static_cast<T*>(v.data) + row * v.stride[0] + head * v.stride[2] +
             column * v.stride[3]),
        row_stride(v.stride[1]),
        column_stride(v.stride[3]),
        columns(static_cast<int>(all_columns - column)),
        vectors(vectors) {}
};

/// True if rows of v move as 16-byte vectors, whatever multiple of 8 columns they start at.
template <class T>
bool has_vector_rows(const View<4>& v) {
  return v.stride[3] == 1 && allows_vectors<T>(v.data, v.stride[0], v.stride[1], v.stride[2]);
}

/// Copies 8 elements of a row to shared memory; zeros where `there` is false and behind the last
/// column. Asynchronous if the matrix has vectors.
template <class T>
__device__ __forceinline__ void copy_tile_vector(T* shared, const MatrixView<const T>& m,
                                                 int64_t row, int column, bool there) {
  auto* const pack = reinterpret_cast<Pack<T, kTileVector>*>(shared);
  if (column >= m.columns) there = false;
  if (m.vectors && (column + kTileVector <= m.columns || !there)) {
    copy_async(pack, m.data + (there ? row * m.row_stride + column : 0), there);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kTileVector; ++i) {
    shared[i] = there && column + i < m.columns
                    ? m.data[row * m.row_stride + (column + i) * m.column_stride]
                    : from_accumulate<T>(0.0f);
  }
}

/// Copies 8 elements from shared memory to a row, but none behind the last column.
template <class T>
__device__ __forceinline__ void store_tile_vector(const T* shared, const MatrixView<T>& m,
                                                  int64_t row, int column) {
  if (m.vectors && column + kTileVector <= m.columns) {
    store_vector(m.data + row * m.row_stride + column, load_vector(shared));
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kTileVector && column + i < m.columns; ++i) {
    m.data[row * m.row_stride + (column + i) * m.column_stride] = shared[i];
  }
}

// ---- Products on the tensor cores --------------------------------------------------------------
//
// D (16 x 8, float32) += A (16 x 16) B (16 x 8), T = Half or BFloat16, sm_80 and up. What the lane
// l = 4 r + c of a warp holds, as pairs of columns (A, D) or of rows (B):
//
//   A[0] (r, 2c)   A[1] (r + 8, 2c)   A[2] (r, 2c + 8)   A[3] (r + 8, 2c + 8)
//   B[0] (2c, r)   B[1] (2c + 8, r)
//   D[0] (r, 2c)   D[1] (r, 2c + 1)   D[2] (r + 8, 2c)   D[3] (r + 8, 2c + 1)
//
// So D of two neighboring products, rounded in pairs, is A of a next one. Code for devices before
// sm_80, where no launcher calls these, is empty.

template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, Half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

/// Four 8 x 8 matrices of 16-bit elements; lanes 8i .. 8i + 7 point at the rows of matrix i. Lane
/// 4 r + c gets (r, 2c) and (r, 2c + 1) of each, or with kTransposed (2c, r) and (2c + 1, r).
template <bool kTransposed, class T>
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], const T* row) {
#if __CUDA_ARCH__ >= 750
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarpSize; }

// The operands of products out of a tile. `tile` is M or its transpose as it lies in shared memory;
// row and column count there and are multiples of 16. What depends on the lane is kept in registers
// through a loop; give recomputed(lane_id()) where there are none to spare.

/// A = M[row .. + 16][column .. + 16].
template <int kRows, class T>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const T* tile, int row, int column,
                                       int lane = lane_id()) {
  load_matrices<false>(a, tile + tile_at<kRows>(row, column, lane % 16, lane / 16));
}

/// A = M[row .. + 16][column .. + 16] transposed.
template <int kRows, class T>
__device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4], const T* tile, int row,
                                                  int column, int lane = lane_id()) {
  load_matrices<true>(a,
                      tile + tile_at<kRows>(row, column, lane / 16 * 8 + lane % 8, lane / 8 % 2));
}

/// B of two products: b[0], b[1] = M[row .. + 16][column .. + 8], b[2], b[3] the 8 columns behind.
template <int kRows, class T>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const T* tile, int row, int column,
                                       int lane = lane_id()) {
  load_matrices<true>(b, tile + tile_at<kRows>(row, column, lane % 16, lane / 16));
}

/// B of two products, of M transposed: b[0], b[1] = M[row .. + 8][column .. + 16]^T, b[2], b[3] the
/// 8 rows below.
template <int kRows, class T>
__device__ __forceinline__ void load_b_transposed(uint32_t (&b)[4], const T* tile, int row,
                                                  int column, int lane = lane_id()) {
  load_matrices<false>(b,
                       tile + tile_at<kRows>(row, column, lane / 16 * 8 + lane % 8, lane / 8 % 2));
}

/// The inverse of load_a_transposed.
template <int kRows, class T>
__device__ __forceinline__ void store_a_transposed(const uint32_t (&a)[4], T* tile, int row,
                                                   int column, int lane = lane_id()) {
#if __CUDA_ARCH__ >= 900
  T* const own = tile + tile_at<kRows>(row, column, lane / 16 * 8 + lane % 8, lane / 8 % 2);
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(own))),
               "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
               : "memory");
#elif __CUDA_ARCH__ >= 750
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t transposed;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(a[i]));
    const int at = tile_at<kRows>(row + i / 2 * 8 + lane / 4, column + i % 2 * 8 + lane % 4 * 2);
    *reinterpret_cast<uint32_t*>(tile + at) = transposed;
  }
#endif
}

/// Two elements in one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t round_pair(float x, float y) {
  Pack<T, 2> pair;
  const float values[2] = {x, y};
  pair.round(values);
  return pair.word[0];
}

template <class T>
__device__ __forceinline__ float2 unpack_pair(uint32_t bits) {
  Pack<T, 2> pair;
  pair.word[0] = bits;
  return make_float2(pair[0], pair[1]);
}

}  // namespace mamba_ssm::kernels
