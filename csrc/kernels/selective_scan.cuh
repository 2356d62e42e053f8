// What the CUDA kernels of the selective scan share: how channels are laid over lanes, how tokens
// and matrices are staged, how rows are cut into segments.
//
// Shared path (real A, B and C per time; activations of at most 32 bits). B_t and C_t serve every
// channel of a group, so a block walks the sequence with the channels of a few warps and stages B
// and C once for all of them.
//
//   warp   8 channels (rows); lane = 4 * row + quarter
//   lane   4 of the 16 states of a state block: 4 * quarter + i; larger dstate: block after block
//   tile   32 tokens. Before the walk over a tile, and after it, lane = (row, 8 tokens): what is
//          pointwise in time is computed once per token and moves as 16-byte vectors. Between the
//          two views, values lie in planes (row, token) in shared memory, private to the warp.
//
// Segments. Where few rows have to fill the GPU, rows are cut in time. The recurrence
// h_t = a_t h_{t-1} + b_t is linear: over a segment it is h -> decay h + end, with `end` the
// outcome from h = 0 and decay = exp(A sum dt). A first kernel finds (sum dt, end) per segment, and
// the main kernel composes those of the segments before its own. Backward: the same in reverse time
// with the state's gradient, carry_{t-1} = a_t (carry_t + dy_t C_t).
#pragma once

#include <mamba_ssm/limits.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "device.cuh"
#include "packed_sequences.h"
#include "scan.cuh"
#include "selective_scan.h"

namespace mamba_ssm::kernels {

// ---- Layout of the shared path -----------------------------------------------------------------

constexpr int kTile = 32;  // tokens
static_assert(kTile == kSelectiveScanChunk && kTile == kWarpSize);
constexpr int kStateBlock = 16;
constexpr int kQuarters = 4;                      // lanes of a row
constexpr int kStates = kStateBlock / kQuarters;  // of a lane
constexpr int kRows = kWarpSize / kQuarters;      // channels of a warp
constexpr int kTokens = kTile / kQuarters;        // of a lane, in pointwise work
constexpr int kPitch = kTile + 4;                 // rows of a plane fall into different banks
constexpr int kWarps = 4;                         // of a block
constexpr int kThreads = kWarps * kWarpSize;

/// Floats of a plane with `depth` rows per lane: 8 more than its rows, so that the four quarters of
/// a row, each in a plane of its own, fall into different banks as well.
__host__ __device__ constexpr int plane_size(int depth) { return depth * kRows * kPitch + 8; }

/// x[d] for a d known at run time, without an array in memory.
template <int kDepth>
__device__ __forceinline__ float pick(const float (&x)[kDepth], int d) {
  static_assert(kDepth <= 2);
  return d == 0 ? x[0] : x[kDepth - 1];
}

/// Which tensors move as 16-byte vectors.
enum VectorBit : unsigned {
  kVectorU = 1,
  kVectorDelta = 2,
  kVectorZ = 4,
  kVectorOut = 8,
  kVectorDout = 16,
  kVectorDu = 32,
  kVectorDdelta = 64,
  kVectorDz = 128,
  kVectorB = 256,
  kVectorC = 512,
};

template <class T>
unsigned vector_bit(const View<3>& v, VectorBit bit) {
  const bool allowed =
      given(v) && v.stride[2] == 1 && allows_vectors<T>(v.data, v.stride[0], v.stride[1]);
  return allowed ? bit : VectorBit{};
}

template <class T>
unsigned vector_bit(const View<4>& v, VectorBit bit) {
  const bool allowed =
      v.stride[3] == 1 && allows_vectors<T>(v.data, v.stride[0], v.stride[1], v.stride[2]);
  return allowed ? bit : VectorBit{};
}

/// How a call of the shared path is cut into blocks. Sizes and positions fit 32 bits there
/// (takes_shared_path), products with strides do not.
struct ScanPlan {
  int groups;          // of B and C
  int group_channels;  // dim / groups
  int tiles;           // channel tiles per group, one block each
  int segments;        // per row, at least 1
  int segment_length;  // tokens, a multiple of kTile
  int state_blocks;
  unsigned vectors;  // VectorBits
  size_t shared;     // bytes of shared memory of a block
  double time;       // what the ScanCost makes of it

  bool fits() const { return segments > 0; }  // the device
};

/// What a block works on.
struct ScanPlace {
  int b, group, tile, segment;
  int begin, end;   // tokens
  int channel;      // first of the block
  int channel_end;  // of the group
  int segment_row;  // b * segments + segment
};

__device__ inline ScanPlace scan_place(const SelectiveScanParams& p, const ScanPlan& plan,
                                       int channels_per_block, int first_segment, int segments) {
  ScanPlace place;
  unsigned item = blockIdx.x;
  place.tile = item % plan.tiles;
  item /= plan.tiles;
  place.group = item % plan.groups;
  item /= plan.groups;
  place.segment = first_segment + item % segments;
  place.b = item / segments;
  place.begin = place.segment * plan.segment_length;
  place.end = min(static_cast<int>(p.seqlen), place.begin + plan.segment_length);
  place.channel = place.group * plan.group_channels + place.tile * channels_per_block;
  place.channel_end = (place.group + 1) * plan.group_channels;
  place.segment_row = place.b * plan.segments + place.segment;
  return place;
}

// ---- Tokens ------------------------------------------------------------------------------------

/// kTokens neighboring tokens of one row, in registers as they stand in memory.
template <class T>
struct Tokens {
  static constexpr int kSize = 16 / sizeof(T);
  Pack<T, kSize> pack[kTokens / kSize];

  __device__ __forceinline__ float operator[](int i) const { return pack[i / kSize][i % kSize]; }

  __device__ __forceinline__ void round(const float (&x)[kTokens]) {
#pragma unroll
    for (int i = 0; i < kTokens; i += kSize) {
      float part[kSize];
#pragma unroll
      for (int j = 0; j < kSize; ++j) part[j] = x[i + j];
      pack[i / kSize].round(part);
    }
  }

  // As a queue, for element by element access: code that is rarely run stays short.

  /// Every token moves up by one; x becomes the first.
  __device__ __forceinline__ void push(T x) {
#pragma unroll
    for (int i = kWords - 1; i > 0; --i) {
      word(i) = sizeof(T) == 4 ? word(i - 1) : __funnelshift_l(word(i - 1), word(i), 16);
    }
    if constexpr (sizeof(T) == 4) {
      word(0) = __float_as_uint(x);
    } else {
      word(0) = word(0) << 16 | *reinterpret_cast<const uint16_t*>(&x);
    }
  }
  /// Removes and returns the first; every token moves down by one.
  __device__ __forceinline__ T pop() {
    const uint32_t bits = word(0);
#pragma unroll
    for (int i = 0; i + 1 < kWords; ++i) {
      word(i) = sizeof(T) == 4 ? word(i + 1) : __funnelshift_r(word(i), word(i + 1), 16);
    }
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(bits);
    } else {
      word(kWords - 1) >>= 16;
      const auto half = static_cast<uint16_t>(bits);
      return *reinterpret_cast<const T*>(&half);
    }
  }

 private:
  static constexpr int kWords = kTokens * sizeof(T) / sizeof(uint32_t);
  __device__ __forceinline__ uint32_t& word(int i) {
    constexpr int kPackWords = kWords * kSize / kTokens;
    return pack[i / kPackWords].word[i % kPackWords];
  }
};

/// The tokens t .. t + kTokens - 1 of a row; zero from `end` on. kUneven: made for rows of 16-bit
/// tokens side by side that start anywhere; the branch costs those that do not.
template <class T, bool kUneven = false>
__device__ __forceinline__ Tokens<T> load_row(const T* data, int64_t stride, bool vectors, int t,
                                              int end) {
  Tokens<T> tokens = {};
  if (vectors && t + kTokens <= end) {
#pragma unroll
    for (int i = 0; i < kTokens; i += Tokens<T>::kSize) {
      tokens.pack[i / Tokens<T>::kSize].load(data + t + i);
    }
  } else if (kUneven && stride == 1) {
    load_anywhere(tokens.pack[0], data + t, min(end - t, kTokens));
  } else if (t < end) {
    constexpr int kAtOnce = 4;  // on their way
#pragma unroll 1
    for (int i = kTokens - kAtOnce; i >= 0; i -= kAtOnce) {
      T x[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        x[j] = t + i + j < end ? data[int64_t{t + i + j} * stride] : from_accumulate<T>(0);
      }
#pragma unroll
      for (int j = kAtOnce - 1; j >= 0; --j) tokens.push(x[j]);
    }
  }
  return tokens;
}

template <class T, bool kUneven = false>
__device__ __forceinline__ Tokens<T> load_tokens(const View<3>& v, bool vectors, int64_t b,
                                                 int64_t c, int t, int end) {
  return load_row<T, kUneven>(static_cast<const T*>(v.data) + b * v.stride[0] + c * v.stride[1],
                              v.stride[2], vectors, t, end);
}

template <class T, bool kUneven = false>
__device__ __forceinline__ void store_tokens(const View<3>& v, bool vectors, int64_t b, int64_t c,
                                             int t, int end, const float (&x)[kTokens]) {
  T* data = static_cast<T*>(v.data) + b * v.stride[0] + c * v.stride[1];
  Tokens<T> tokens;
  tokens.round(x);
  if (vectors && t + kTokens <= end) {
#pragma unroll
    for (int i = 0; i < kTokens; i += Tokens<T>::kSize) {
      tokens.pack[i / Tokens<T>::kSize].store(data + t + i);
    }
  } else if (kUneven && v.stride[2] == 1) {
    store_anywhere(tokens.pack[0], data + t, min(end - t, kTokens));
  } else {
#pragma unroll 1
    for (int i = 0; i < kTokens && t + i < end; ++i) {
      data[int64_t{t + i} * v.stride[2]] = tokens.pop();
    }
  }
}

/// Asks for tokens that a later tile reads, where they stand side by side.
template <class T>
__device__ __forceinline__ void prefetch_tokens(const View<3>& v, bool vectors, int64_t b,
                                                int64_t c, int t, int begin, int end) {
  if (vectors && begin <= t && t < end) {
    const T* data = static_cast<const T*>(v.data) + b * v.stride[0] + c * v.stride[1] + t;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(data));
  }
}

__device__ __forceinline__ void unpack(const float4& v, float (&x)[4]) {
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}
__device__ __forceinline__ float4 pack(const float (&x)[4]) {
  return make_float4(x[0], x[1], x[2], x[3]);
}

__device__ __forceinline__ float4* plane_row(float* plane, int row) {
  return reinterpret_cast<float4*>(plane + row * kPitch);
}

/// A lane's kTokens floats of a plane.
__device__ __forceinline__ void read_plane(float* plane, int row, int part, float (&x)[kTokens]) {
  const float4* source = plane_row(plane, row) + part * (kTokens / 4);
#pragma unroll
  for (int i = 0; i < kTokens / 4; ++i) {
    const float4 four = source[i];
    x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
  }
}
__device__ __forceinline__ void write_plane(float* plane, int row, int part,
                                            const float (&x)[kTokens]) {
  float4* target = plane_row(plane, row) + part * (kTokens / 4);
#pragma unroll
  for (int i = 0; i < kTokens / 4; ++i) {
    target[i] = make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
  }
}

/// Marks of a tile, a bit per token. What lies at or behind `end` counts as padding.
struct TileMarks {
  unsigned resets, padding;
};

/// kPacked: there may be marks.
template <bool kPacked>
__device__ __forceinline__ TileMarks tile_marks(const SelectiveScanParams& p, int64_t b, int begin,
                                                int end) {
  const int t = begin + threadIdx.x % kWarpSize;
  if constexpr (kPacked) {
    const uint8_t mark = t >= end             ? uint8_t{kPadding}
                         : p.marks != nullptr ? p.marks[b * p.seqlen + t]
                                              : uint8_t{kContinue};
    return {__ballot_sync(kAllLanes, mark == kReset), __ballot_sync(kAllLanes, mark == kPadding)};
  } else {
    return {0, __ballot_sync(kAllLanes, t >= end)};
  }
}

/// Steps of a lane's tokens: dt = delta + bias, through softplus if asked for.
template <class T>
__device__ __forceinline__ void time_steps(const Tokens<T>& delta, float bias,
                                           bool through_softplus, float (&dt)[kTokens]) {
#pragma unroll
  for (int j = 0; j < kTokens; ++j) dt[j] = delta[j] + bias;
  if (through_softplus) {
#pragma unroll
    for (int j = 0; j < kTokens; ++j) dt[j] = softplus(dt[j]);
  }
}

/// x = 0 where bit j of the lane's part of `mask` is set, whatever stands there.
__device__ __forceinline__ void clear_tokens(unsigned mask, int part, float (&x)[kTokens]) {
  if (mask == 0) return;
#pragma unroll
  for (int j = 0; j < kTokens; ++j) {
    if (mask >> (part * kTokens + j) & 1) x[j] = 0;
  }
}

// ---- Matrices and states -----------------------------------------------------------------------

/// One matrix, or B and C side by side, for one tile and state block, on their way from global to
/// shared memory: a thread carries 8 tokens of one state.
template <class T, int kCount, bool kUneven = false>
struct MatrixStage {
  static constexpr int kMatrixRows = kCount * kStateBlock;
  static_assert(kMatrixRows * kQuarters <= kThreads);
  Tokens<T> tokens;

  static __device__ __forceinline__ int row() { return threadIdx.x % kMatrixRows; }
  static __device__ __forceinline__ int part() { return threadIdx.x / kMatrixRows; }
  static __device__ __forceinline__ bool active() {
    return kMatrixRows * kQuarters == kThreads || part() < kQuarters;
  }

  __device__ __forceinline__ void load(const View<4>& first, bool first_vectors,
                                       const View<4>& second, bool second_vectors, int64_t b,
                                       int64_t group, int64_t dstate, int begin, int end,
                                       int block) {
    if (!active()) return;
    const bool is_first = row() < kStateBlock;
    const auto stride = [&](int k) { return is_first ? first.stride[k] : second.stride[k]; };
    const int n = block * kStateBlock + row() % kStateBlock;
    const T* data = static_cast<const T*>(is_first ? first.data : second.data) + b * stride(0) +
                    group * stride(1) + n * stride(2);
    tokens = load_row<T, kUneven>(data, stride(3), is_first ? first_vectors : second_vectors,
                                  begin + part() * kTokens, n < dstate ? end : 0);
  }

  /// Calls put(token of the tile, matrix row, value); 0 at padding, whatever stands there.
  template <class Put>
  __device__ __forceinline__ void store(unsigned padding, Put put) const {
    if (!active()) return;
    float x[kTokens];
#pragma unroll
    for (int j = 0; j < kTokens; ++j) x[j] = tokens[j];
    clear_tokens(padding, part(), x);
#pragma unroll
    for (int j = 0; j < kTokens; ++j) put(part() * kTokens + j, row(), x[j]);
  }
};

/// The four states n .. n + 3 of a row of a dense (rows, dstate) array of floats.
struct StateSlot {
  int64_t offset;
  int count;  // of the four that exist; none for a channel that does not
  bool vectors;

  __device__ __forceinline__ StateSlot(int64_t row, int n, int64_t dstate, bool exists)
      : offset(row * dstate + n),
        count(exists ? max(0, min(static_cast<int>(dstate) - n, kStates)) : 0),
        vectors(dstate % kStates == 0) {}

  __device__ __forceinline__ bool is_vector(const float* data) const {
    return vectors && count == kStates && reinterpret_cast<uintptr_t>(data) % sizeof(float4) == 0;
  }
  __device__ __forceinline__ void load(const float* data, float (&x)[kStates]) const {
    if (is_vector(data)) {
      const float4 four = *reinterpret_cast<const float4*>(data + offset);
      x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
    } else {
#pragma unroll
      for (int i = 0; i < kStates; ++i) x[i] = i < count ? data[offset + i] : 0.0f;
    }
  }
  __device__ __forceinline__ void store(float* data, const float (&x)[kStates]) const {
    if (is_vector(data)) {
      *reinterpret_cast<float4*>(data + offset) = pack(x);
    } else {
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        if (i < count) data[offset + i] = x[i];
      }
    }
  }
};

/// `count` of four elements a stride apart, the loads in flight together; 0 for the others.
__device__ __forceinline__ void load_elements(const void* data, DType dtype, int64_t offset,
                                              int64_t stride, int count, float (&x)[kStates]) {
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      x[i] = i < count ? static_cast<const float*>(data)[offset + i * stride] : 0.0f;
    }
  } else {
    uint16_t bits[kStates];
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      bits[i] = i < count ? static_cast<const uint16_t*>(data)[offset + i * stride] : uint16_t{0};
    }
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      x[i] = dtype == DType::kFloat16 ? __half2float(__ushort_as_half(bits[i]))
                                      : __bfloat162float(__ushort_as_bfloat16(bits[i]));
    }
  }
}

/// log2(e) A of four states of channel c, so that exp(dt A) is one exp2; 0 where there is no state.
__device__ __forceinline__ void load_decay_rates(const View<2>& A, int64_t c, int n, int count,
                                                 float (&rate)[kStates]) {
  load_elements(A.data, A.dtype, c * A.stride[0] + n * A.stride[1], A.stride[1], count, rate);
#pragma unroll
  for (int i = 0; i < kStates; ++i) rate[i] *= kLog2E;
}

/// Four states of a tensor (batch, dim, dstate) of any strides and type; 0 without the tensor.
__device__ __forceinline__ void load_states(const View<3>& v, int64_t b, int64_t c, int n,
                                            int count, float (&x)[kStates]) {
  load_elements(v.data, v.dtype, b * v.stride[0] + c * v.stride[1] + n * v.stride[2], v.stride[2],
                given(v) ? count : 0, x);
}
__device__ __forceinline__ void store_states(const View<3>& v, int64_t b, int64_t c, int n,
                                             int count, const float* x) {
#pragma unroll 1
  for (int i = 0; i < kStates; ++i) {
    if (i < count) {
      store_as(v.data, v.dtype, b * v.stride[0] + c * v.stride[1] + (n + i) * v.stride[2], x[i]);
    }
  }
}

// ---- Segments ----------------------------------------------------------------------------------

/// What each segment does to the state that enters it.
struct SegmentSums {
  float* end;       // (batch, segments, dim, dstate)
  float* step_sum;  // (batch, segments, dim); NaN if a reset lets nothing through
};

/// Takes four states of channel c through `count` segments: x = decay x + end, one after the other.
__device__ __forceinline__ void pass_segments(const SegmentSums& sums, int first_row, int row_step,
                                              int count, int64_t dim, int64_t dstate, int c, int n,
                                              const float (&rate)[kStates], float (&x)[kStates]) {
#pragma unroll 4  // loads of several segments in flight
  for (int k = 0; k < count; ++k) {
    const int64_t row = int64_t{first_row + k * row_step} * dim + c;
    float end[kStates];
    StateSlot(row, n, dstate, true).load(sums.end, end);
    const float step_sum = sums.step_sum[row];
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const bool gone = x[i] == 0 || isnan(step_sum);  // 0 stays 0 beside a decay that overflows
      x[i] = gone ? end[i] : fmaf(fast_exp2(step_sum * rate[i]), x[i], end[i]);
    }
  }
}

inline int state_blocks(const SelectiveScanParams& p) {
  return static_cast<int>(ceil_div(p.dstate, kStateBlock));
}

inline size_t segment_kernel_shared(const SelectiveScanParams& p) {
  return sizeof(float4) * (kTile * kQuarters + 2 * state_blocks(p) * kThreads) +
         sizeof(float) * 2 * kWarps * plane_size(1);
}

/// SegmentSums of all segments but the last (forward) or the first (kReverse).
template <class T, bool kPacked, bool kReverse>
__global__ void __launch_bounds__(kThreads)
    scan_segments(const SelectiveScanParams p, const ScanPlan plan, const SegmentSums sums) {
  extern __shared__ float4 shared[];
  const int lane = threadIdx.x % kWarpSize;
  const int row = lane / kQuarters;
  const int part = lane % kQuarters;  // quarter of a state block, or 8 tokens of a tile
  float4* const matrix = shared;      // (kTile, kQuarters)
  float4* const states = matrix + kTile * kQuarters;  // (state_blocks, threads)
  float4* const rates = states + plan.state_blocks * kThreads;
  float* const steps = reinterpret_cast<float*>(rates + plan.state_blocks * kThreads) +
                       threadIdx.x / kWarpSize * 2 * plane_size(1);
  float* const inputs = steps + plane_size(1);

  const ScanPlace place = scan_place(p, plan, kWarps * kRows, kReverse ? 1 : 0, plan.segments - 1);
  const int c = place.channel + threadIdx.x / kWarpSize * kRows + row;
  const bool exists = c < place.channel_end;
  const float bias = exists ? parameter<float>(p.delta_bias, c) : 0.0f;
  const View<4>& view = kReverse ? p.C : p.B;
  const bool vectors = plan.vectors & (kReverse ? kVectorC : kVectorB);

  for (int block = 0; block < plan.state_blocks; ++block) {
    const int n = block * kStateBlock + part * kStates;
    const StateSlot slot(0, n, p.dstate, exists);
    float rate[kStates];
    load_decay_rates(p.A, c, n, slot.count, rate);
    rates[block * kThreads + threadIdx.x] = pack(rate);
    states[block * kThreads + threadIdx.x] = make_float4(0, 0, 0, 0);
  }

  float step_sum = 0;
  const int count = (place.end - place.begin + kTile - 1) / kTile;
  for (int i = 0; i < count; ++i) {
    const int begin = place.begin + (kReverse ? count - 1 - i : i) * kTile;
    const TileMarks marks = tile_marks<kPacked>(p, place.b, begin, place.end);
    const int t = begin + part * kTokens;
    const int end = exists ? place.end : 0;
    const Tokens<T> delta =
        load_tokens<T>(p.delta, plan.vectors & kVectorDelta, place.b, c, t, end);
    const Tokens<T> input =
        kReverse ? load_tokens<T>(p.dout, plan.vectors & kVectorDout, place.b, c, t, end)
                 : load_tokens<T>(p.u, plan.vectors & kVectorU, place.b, c, t, end);
    float dt[kTokens], x[kTokens];  // x = dt u, or dy
    time_steps(delta, bias, p.delta_softplus, dt);
#pragma unroll
    for (int j = 0; j < kTokens; ++j) x[j] = kReverse ? input[j] : dt[j] * input[j];
    if (kReverse && given(p.z)) {
      const Tokens<T> z = load_tokens<T>(p.z, plan.vectors & kVectorZ, place.b, c, t, end);
#pragma unroll
      for (int j = 0; j < kTokens; ++j) x[j] *= silu(z[j]);
    }
    clear_tokens(marks.padding, part, dt);
    clear_tokens(marks.padding, part, x);
#pragma unroll
    for (int j = 0; j < kTokens; ++j) step_sum += dt[j];
    if (kPacked && marks.resets != 0) step_sum = NAN;
    write_plane(steps, row, part, dt);
    write_plane(inputs, row, part, x);

    for (int block = 0; block < plan.state_blocks; ++block) {
      MatrixStage<T, 1> stage;
      stage.load(view, vectors, view, vectors, place.b, place.group, p.dstate, begin, place.end,
                 block);
      __syncthreads();
      stage.store(marks.padding, [&](int token, int n, float x) {
        reinterpret_cast<float*>(matrix)[token * kStateBlock + n] = x;
      });
      __syncthreads();
      float rate[kStates], h[kStates];
      unpack(rates[block * kThreads + threadIdx.x], rate);
      unpack(states[block * kThreads + threadIdx.x], h);
#pragma unroll 2
      for (int m = 0; m < kTile / 4; ++m) {
        const int four = kReverse ? kTile / 4 - 1 - m : m;
        float step[4], in[4];
        unpack(plane_row(steps, row)[four], step);
        unpack(plane_row(inputs, row)[four], in);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int j = kReverse ? 3 - k : k;
          float M[kStates];
          unpack(matrix[(4 * four + j) * kQuarters + part], M);
          const bool reset = kPacked && (marks.resets >> (4 * four + j) & 1);
#pragma unroll
          for (int s = 0; s < kStates; ++s) {
            const float a = fast_exp2(step[j] * rate[s]);
            if constexpr (kReverse) {
              h[s] = reset ? 0.0f : a * fmaf(in[j], M[s], h[s]);
            } else {
              h[s] = fmaf(a, reset ? 0.0f : h[s], in[j] * M[s]);
            }
          }
        }
      }
      states[block * kThreads + threadIdx.x] = pack(h);
    }
    __syncwarp();
  }

  step_sum += __shfl_xor_sync(kAllLanes, step_sum, 1);
  step_sum += __shfl_xor_sync(kAllLanes, step_sum, 2);
  if (exists && part == 0) sums.step_sum[int64_t{place.segment_row} * p.dim + c] = step_sum;
  for (int block = 0; block < plan.state_blocks; ++block) {
    const StateSlot slot(int64_t{place.segment_row} * p.dim + c,
                         block * kStateBlock + part * kStates, p.dstate, exists);
    float h[kStates];
    unpack(states[block * kThreads + threadIdx.x], h);
    slot.store(sums.end, h);
  }
}

// ---- Generic path ------------------------------------------------------------------------------
//
// Any call: complex A, constant B or C, float64, a group per channel, any dstate. `lanes` lanes of
// a warp share a channel, a lane owns every lanes-th state; tiles and planes as in the shared path,
// but lane = token in what is pointwise in time, and one plane row per channel of the warp.

constexpr int kGenericWarps = 4;
constexpr int kGenericMinLanes = 8;
constexpr int kGenericRows = kWarpSize / kGenericMinLanes;  // channels of a warp at most
constexpr int kGenericPitch = kTile + 1;

template <class Acc>
struct Complex {
  Acc re, im;
};

template <class Acc, bool kComplex>
using Number = std::conditional_t<kComplex, Complex<Acc>, Acc>;

template <class Acc>
__device__ __forceinline__ Complex<Acc> operator+(Complex<Acc> a, Complex<Acc> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class Acc>
__device__ __forceinline__ Complex<Acc> operator*(Complex<Acc> a, Complex<Acc> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class Acc>
__device__ __forceinline__ Complex<Acc> operator*(Acc a, Complex<Acc> b) {
  return {a * b.re, a * b.im};
}

__device__ __forceinline__ float conjugate(float x) { return x; }
__device__ __forceinline__ double conjugate(double x) { return x; }
template <class Acc>
__device__ __forceinline__ Complex<Acc> conjugate(Complex<Acc> x) {
  return {x.re, -x.im};
}

__device__ __forceinline__ float real_part(float x) { return x; }
__device__ __forceinline__ double real_part(double x) { return x; }
template <class Acc>
__device__ __forceinline__ Acc real_part(Complex<Acc> x) {
  return x.re;
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
template <class Acc>
__device__ __forceinline__ Complex<Acc> exponential(Complex<Acc> x) {
  Acc sine, cosine;
  if constexpr (std::is_same_v<Acc, double>) {
    sincos(x.im, &sine, &cosine);
  } else {
    sincosf(x.im, &sine, &cosine);
  }
  return exponential(x.re) * Complex<Acc>{cosine, sine};
}

__device__ __forceinline__ float shuffle_xor(float x, int distance) {
  return __shfl_xor_sync(kAllLanes, x, distance);
}
__device__ __forceinline__ double shuffle_xor(double x, int distance) {
  return __shfl_xor_sync(kAllLanes, x, distance);
}
template <class Acc>
__device__ __forceinline__ Complex<Acc> shuffle_xor(Complex<Acc> x, int distance) {
  return {shuffle_xor(x.re, distance), shuffle_xor(x.im, distance)};
}

/// Sum over the lanes whose index differs in the bits from `first` up to, not including, `last`.
template <class N>
__device__ __forceinline__ N sum_over_lanes(N x, int first, int last) {
  for (int distance = first; distance < last; distance *= 2) x = x + shuffle_xor(x, distance);
  return x;
}

/// The element at `offset` of a view, whose imaginary part stands view.imag further on.
template <class N, int kRank>
__device__ __forceinline__ N load_number(const View<kRank>& v, int64_t offset) {
  if constexpr (std::is_arithmetic_v<N>) {
    return load_as<N>(v.data, v.dtype, offset);
  } else {
    using Acc = decltype(N::re);
    return {load_as<Acc>(v.data, v.dtype, offset), load_as<Acc>(v.data, v.dtype, offset + v.imag)};
  }
}
template <class N, int kRank>
__device__ __forceinline__ void store_number(const View<kRank>& v, int64_t offset, N x) {
  if constexpr (std::is_arithmetic_v<N>) {
    store_as(v.data, v.dtype, offset, x);
  } else {
    store_as(v.data, v.dtype, offset, x.re);
    store_as(v.data, v.dtype, offset + v.imag, x.im);
  }
}

template <class T>
__device__ __forceinline__ Accumulate<T> load_token(const View<3>& v, int64_t b, int64_t c,
                                                    int64_t t) {
  return to_accumulate(
      static_cast<const T*>(v.data)[b * v.stride[0] + c * v.stride[1] + t * v.stride[2]]);
}
template <class T>
__device__ __forceinline__ void store_token(const View<3>& v, int64_t b, int64_t c, int64_t t,
                                            Accumulate<T> x) {
  static_cast<T*>(v.data)[b * v.stride[0] + c * v.stride[1] + t * v.stride[2]] =
      from_accumulate<T>(x);
}

/// B or C as one lane reads it: its channel's row of states at one token.
template <class N>
struct MatrixRow {
  const View<4>& v;
  int64_t base;

  __device__ MatrixRow(const View<4>& v, int64_t groups, int64_t dim, int64_t b, int64_t c)
      : v(v), base(b * v.stride[0] + c / (dim / groups) * v.stride[1]) {}
  __device__ N operator()(int64_t n, int64_t t) const {
    return load_number<N>(v, base + n * v.stride[2] + t * v.stride[3]);
  }
};

/// Lanes of a channel: a power of two.
inline int generic_lanes(int64_t dstate) {
  int lanes = kGenericMinLanes;
  while (lanes < kWarpSize && lanes < dstate) lanes *= 2;
  return lanes;
}

// ---- Host: is a call of the shared path, and how is it cut --------------------------------------

constexpr int64_t kMaxSharedStates = 256;  // the state of a row lives in shared memory
constexpr int64_t kMaxSize = int64_t{1} << 30;
constexpr int64_t kMinGroupChannels = 4;  // with fewer, most rows of a warp would be empty

/// True if the shared path takes a call; the generic kernels take every other one.
template <class T>
bool takes_shared_path(const SelectiveScanParams& p) {
  return sizeof(T) <= 4 && !p.complex_A && !p.constant_B && !p.constant_C &&
         p.groups_B == p.groups_C && p.dstate <= kMaxSharedStates && p.groups_B > 0 &&
         p.dim / p.groups_B >= kMinGroupChannels && p.batch > 0 && p.batch <= kMaxSize &&
         p.dim <= kMaxSize && p.seqlen <= kMaxSize;
}

/// How long a kernel takes, for the choice of a plan. A multiprocessor runs `resident` blocks at a
/// time if they fit; such a round takes `latency` per token however many they are, and `work` per
/// token and block. No unit, but the same for all depths of a kernel.
struct KernelCost {
  int resident;
  double latency, work;

  /// Of a token of so many blocks on each multiprocessor.
  double token(double blocks, int64_t resident_blocks) const {
    return latency * std::ceil(blocks / static_cast<double>(resident_blocks)) + work * blocks;
  }
};

/// Of the main kernel and of the one before it, which finds SegmentSums. A block takes as long as
/// `start` tokens to begin.
struct ScanCost {
  KernelCost main, first_pass;
  int start;
};

/// Cuts a call into blocks of `block_channels` that use `shared` bytes, and its rows into as many
/// segments as the cost asks for. No segments at all: the blocks do not fit the device.
inline ScanPlan plan_scan(const SelectiveScanParams& p, int block_channels, const ScanCost& cost,
                          size_t shared) {
  constexpr int64_t kMinSegment = 128;  // tokens
  constexpr int64_t kMaxSegments = 64;  // the main kernel composes them one by one
  constexpr int64_t kReserved = 1024;   // bytes of shared memory that the system takes per block
  ScanPlan plan{};
  plan.groups = static_cast<int>(p.groups_B);
  plan.group_channels = static_cast<int>(p.dim / p.groups_B);
  plan.tiles = static_cast<int>(ceil_div(plan.group_channels, block_channels));
  plan.state_blocks = state_blocks(p);
  plan.shared = shared;
  plan.time = std::numeric_limits<double>::infinity();
  const int64_t bytes = std::max<int64_t>(shared, segment_kernel_shared(p)) + kReserved;
  if (bytes > device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) + kReserved) return plan;
  const int64_t resident = std::min<int64_t>(
      cost.main.resident, device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / bytes);
  const int64_t multiprocessors = multiprocessor_count();
  const int64_t max_segments = std::clamp<int64_t>(p.seqlen / kMinSegment, 1, kMaxSegments);
  for (int64_t wanted = 1; wanted <= max_segments; ++wanted) {
    const int64_t length = std::max<int64_t>(1, ceil_div(p.seqlen, wanted * kTile)) * kTile;
    const int64_t segments = std::max<int64_t>(1, ceil_div(p.seqlen, length));
    const int64_t blocks = p.batch * segments * plan.groups * plan.tiles;
    const int64_t share = ceil_div(blocks, multiprocessors);  // of a multiprocessor
    const double first_share = static_cast<double>(share * (segments - 1)) / segments;
    const double time = static_cast<double>(length + cost.start) *
                        (cost.main.token(static_cast<double>(share), resident) +
                         cost.first_pass.token(first_share, cost.first_pass.resident));
    if (time < plan.time) {
      plan.segments = static_cast<int>(segments);
      plan.segment_length = static_cast<int>(length);
      plan.time = time;
    }
  }
  return plan;
}

inline SegmentSums take_segment_sums(Workspace& workspace, const SelectiveScanParams& p,
                                     const ScanPlan& plan) {
  if (plan.segments == 1) return {};
  const int64_t rows = p.batch * plan.segments * p.dim;
  return {workspace.take<float>(rows * p.dstate), workspace.take<float>(rows)};
}

template <class T, bool kReverse>
void launch_segments(const SelectiveScanParams& p, const ScanPlan& plan, const SegmentSums& sums,
                     cudaStream_t stream) {
  ScanPlan own = plan;
  own.tiles = static_cast<int>(ceil_div(plan.group_channels, kWarps * kRows));
  const int64_t blocks = p.batch * (plan.segments - 1) * plan.groups * own.tiles;
  const auto kernel =
      p.marks != nullptr ? scan_segments<T, true, kReverse> : scan_segments<T, false, kReverse>;
  launch_shared(kernel, blocks, kThreads, segment_kernel_shared(p), stream, p, own, sums);
}

}  // namespace mamba_ssm::kernels
