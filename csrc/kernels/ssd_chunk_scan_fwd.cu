// SSD chunk scan, forward.
//
// Tensor-core path (16-bit T, dstate <= 128). Heads are cut into units of 64 channels; a block
// walks a segment of a sequence chunk by chunk with one or two units of a group, four warps each.
// A warp owns 16 channels p of its unit and keeps their states S (p, n) in float32 accumulators.
// Per chunk, with i and j tokens and the names of the header,
//
//   K = C B^T                          (i, j)
//   M = K . exp(c_i - c_j) d_j         (i, j)  rounded, through shared memory
//   y^T = S C^T . exp(c_i) + x^T M^T   (p, i)  S rounded straight from the accumulators
//   y^T += D x^T, y^T . silu(z^T)              x^T and z^T are laid out as y^T is
//   S = exp(c_last) S + x^T B . exp(c_last - c_j) d_j
//
// M, x, z and out are a unit's own, C and B are the block's. What depends on dt alone,
// make_step_tables has computed before. Shared memory:
//
//   matrices  3 of (64 tokens, states): C and B of this chunk, C of the next. B of the next chunk
//             arrives in the buffer of this chunk's C once all warps are done with it.
//   x         2 of (64 tokens, 64 channels) per unit: this chunk and the next
//   mixed     M (64, 64) per unit, then out (64 tokens, 64 channels) on its way to memory
//   steps     2 StepTables per unit: this chunk and the next
//   gate      z (64 tokens, 64 channels) per unit, where there is one
//
// All of it comes through the copy engine (bulk_copy.cuh) where the device has one and no token has
// to be left out, else thread by thread: a warp copies the 16 channels that it owns.
//
// Plain path (everything else): sequential in time, in float32 or float64. A thread owns a few
// channels times 8 states, a warp all states of a block of 64 or 128; more states go through the
// sequence block by block, adding up y in memory.
//
// Both cut sequences into segments where that fills the GPU better: a first launch of the same
// kernel finds the state at the end of every segment but the last, from zero; pass_states composes
// them; the main launch starts each segment from the state before it.
#include <cuda_runtime.h>

#include <algorithm>
#include <limits>

#include "bulk_copy.cuh"
#include "launch.cuh"
#include "ssd_chunk_scan.cuh"

namespace mamba_ssm::kernels {
namespace {

/// How a call is cut into blocks, and what the launches hand to each other.
struct ForwardPlan {
  Segments segments;
  int panels;       // of a head: blocks of kUnitChannels (plain path: of its own size)
  int unit_blocks;  // per group (plain path: per head)
  size_t shared;    // bytes of dynamic shared memory of a block
  double time;      // what its ForwardCost makes of it
  bool vector_out;  // rows of out are written in 16-byte vectors
  float* states;    // (slots, nheads, headdim, dstate) at the end of a segment; float64 with T
  float* decays;    // (slots, nheads): what is left there of the state before the segment
  void* steps;      // (slots, chunks, nheads) StepTables; tensor-core path
  float* partials;  // (batch, seqlen, nheads, headdim): y of a 16-bit T so far; plain path
};

/// What the copy engine moves; tensor-core path.
struct ForwardMaps {
  TensorMap x, z, B, C, out;
};

// ---- States in memory --------------------------------------------------------------------------

/// The state of one head, (channel, state).
struct StateView {
  void* data;
  DType dtype;
  int64_t offset, channel_stride, state_stride;

  StateView() = default;
  __device__ StateView(const View<4>& v, int64_t i, int64_t head)
      : data(v.data),
        dtype(v.dtype),
        offset(i * v.stride[0] + head * v.stride[1]),
        channel_stride(v.stride[2]),
        state_stride(v.stride[3]) {}

  __device__ int64_t at(int64_t channel, int64_t state) const {
    return offset + channel * channel_stride + state * state_stride;
  }
};

/// The state of a head at the end of the segment of a slot.
template <class Acc>
__device__ StateView segment_state(const SsdChunkScanParams& p, const ForwardPlan& plan,
                                   int64_t slot, int64_t head) {
  StateView v;
  v.data = plan.states;
  v.dtype = sizeof(Acc) == 8 ? DType::kFloat64 : DType::kFloat32;
  v.offset = (slot * p.nheads + head) * p.headdim * p.dstate;
  v.channel_stride = p.dstate;
  v.state_stride = 1;
  return v;
}

/// The state before a segment; without data where that is zero.
template <class Acc>
__device__ StateView state_before(const SsdChunkScanParams& p, const ForwardPlan& plan,
                                  const Segment& segment, int64_t slot, int64_t head) {
  if (!segment.first) return segment_state<Acc>(p, plan, slot - 1, head);
  StateView v(p.initial_states, segment.sequence, head);
  if (segment.sequence >= p.num_initial_states) v.data = nullptr;
  return v;
}

constexpr int kPassThreads = 256;
constexpr int kPassElements = 4;  // of a thread

/// From states at the end of each segment that began with zero to those of the sequence, in place.
/// A block takes kPassThreads * kPassElements states of a (sequence, head).
template <class Acc>
__global__ void __launch_bounds__(kPassThreads)
    pass_states(const SsdChunkScanParams p, const ForwardPlan plan, unsigned blocks) {
  const int64_t size = p.headdim * p.dstate;
  const unsigned item = blockIdx.x / blocks;
  const int64_t head = item % static_cast<unsigned>(p.nheads);
  const int64_t r = item / static_cast<unsigned>(p.nheads);
  const int64_t begin = int64_t{blockIdx.x % blocks} * kPassThreads * kPassElements + threadIdx.x;
  const Sequence sequence = sequence_of(p, r);
  const int64_t slot = plan.segments.first_slot(p, r, sequence.begin);
  const int64_t passes = ceil_div(sequence.end - sequence.begin, plan.segments.length) - 1;
  Acc* ends = reinterpret_cast<Acc*>(plan.states) + (slot * p.nheads + head) * size + begin;
  const Acc* decays = reinterpret_cast<const Acc*>(plan.decays) + slot * p.nheads + head;
  int count = 0;  // of the thread's states
  Acc state[kPassElements] = {};
#pragma unroll
  for (int k = 0; k < kPassElements; ++k) {
    const int64_t i = begin + k * kPassThreads;
    if (i >= size) break;
    ++count;
    if (given(p.initial_states) && r < p.num_initial_states) {
      const StateView v(p.initial_states, r, head);
      state[k] = load_as<Acc>(v.data, v.dtype, v.at(i / p.dstate, i % p.dstate));
    }
  }
#pragma unroll 4
  for (int64_t s = 0; s < passes; ++s) {
    const Acc decay = *decays;
    Acc end[kPassElements];
#pragma unroll
    for (int k = 0; k < kPassElements; ++k) end[k] = k < count ? ends[k * kPassThreads] : Acc(0);
#pragma unroll
    for (int k = 0; k < kPassElements; ++k) {
      // A decay of 0 is a reset: whatever the state was, infinite too, it is gone.
      state[k] = (decay == Acc(0) ? Acc(0) : decay * state[k]) + end[k];
      if (k < count) ends[k * kPassThreads] = state[k];
    }
    ends += p.nheads * size;
    decays += p.nheads;
  }
}

// ---- Tensor-core path --------------------------------------------------------------------------

constexpr int kUnitChannels = 64;
constexpr int kUnitWarps = 4;
constexpr int kWarpChannels = kUnitChannels / kUnitWarps;
static_assert(kWarpChannels == 16 && kUnitChannels == kPanel);

/// What the warps of a unit need to know of the tokens of a chunk.
struct alignas(16) StepTable {
  float2 decay_step[kChunk];  // (c_t, d_t)
  float entering[kChunk];     // what is left at t of the state before the chunk
  float leaving[kChunk];      // d_t times what is left of it after the chunk
  int resets[kChunk];
  float passing;  // what is left after the chunk of the state before it
  int last_resets;
};

constexpr int kTableWarps = 8;

/// The step tables of all chunks, (slots, chunks of a segment, nheads): a warp makes that of one
/// head, a block those of a few neighboring ones in a chunk.
template <class Acc>
__global__ void __launch_bounds__(kTableWarps* kWarpSize)
    make_step_tables(const SsdChunkScanParams p, const ForwardPlan plan, unsigned head_blocks,
                     unsigned chunks) {
  const int lane = threadIdx.x % kWarpSize;
  const unsigned head = blockIdx.x % head_blocks * kTableWarps + threadIdx.x / kWarpSize;
  const unsigned chunk = blockIdx.x / head_blocks;  // of all
  const unsigned slot = chunk / chunks;
  if (head >= p.nheads) return;
  const Segment segment = segment_of(p, plan.segments, slot);
  const int64_t begin = segment.begin + chunk % chunks * kChunk;
  if (!segment.exists || begin >= segment.end) return;
  ChunkTokens<Acc> tokens;
  tokens.load(p, segment.row, head, begin, segment.end);
  const ChunkSteps<Acc> steps(StepRule<Acc>(p, head), tokens, p.dt.dtype);
  StepTable& table = static_cast<StepTable*>(plan.steps)[int64_t{chunk} * p.nheads + head];
  const auto pair = [lane](auto* values, auto first, auto second) {
    values[2 * lane] = first;
    values[2 * lane + 1] = second;
  };
  reinterpret_cast<float4*>(table.decay_step)[lane] =
      make_float4(steps.decay[0], steps.step[0], steps.decay[1], steps.step[1]);
  pair(table.entering, steps.entering(0), steps.entering(1));
  pair(table.leaving, steps.step[0] * steps.leaving(0), steps.step[1] * steps.leaving(1));
  pair(table.resets, steps.resets[0], steps.resets[1]);
  if (lane == 0) {
    table.passing = steps.passing();
    table.last_resets = steps.last_resets;
  }
}

/// What a block works on, for all of its warps: in shared memory, since registers are short.
template <class T, int kUnits>
struct BlockWork {
  Segment segment;
  int64_t slot;
  const uint8_t* marks;  // of the segment's tokens; null without marks
  int row;               // of the batch
  int count;             // tokens of the segment
  // The first token of the segment in the tensors of the same names, the first channel of the unit.
  const T* B;
  const T* C;
  struct Unit {
    const T* x;
    const T* z;
    T* out;
    const StepTable* steps;
    int head;
    int panel;     // first channel
    int channels;  // 0 where the last block has one unit only
    float D[kUnitChannels];
  } units[kUnits];
};

/// Shared memory and threads of a block of kUnits units with kStates states.
template <class T, int kUnits, int kStates>
struct BlockLayout {
  static_assert(kUnits == 1 || kUnits == 2);
  static_assert(kStates == 64 || kStates == 128);
  static constexpr int kThreads = kUnits * kUnitWarps * kWarpSize;
  // Blocks of a multiprocessor: as many as 227 KB hold, or as 64 K registers allow.
  static constexpr int kResident = kUnits == 2 ? 2 : kStates == 128 ? 3 : 4;
  static constexpr int kMatrix = kChunk * kStates;  // elements of a buffer
  static constexpr int kTile = kChunk * kUnitChannels;

  T matrices[3][kMatrix];
  T x[2][kUnits][kTile];
  T mixed[kUnits][kTile];  // M, then out
  StepTable steps[2][kUnits];
  BlockWork<T, kUnits> work;
  CopyBarrier chunk_there, gate_there;  // copy engine
  alignas(1024) T gate[kUnits][kTile];  // z; left out of calls without one

  static size_t bytes(bool gated) {
    return gated ? sizeof(BlockLayout) : offsetof(BlockLayout, gate);
  }
};

/// Copies rows t .. t + 64 of a matrix, counted from its first, to a tile: one vector in each of
/// several passes. Rows of tokens behind the end and of padding are zero in the tile.
template <int kPassRows, class T, class Work>
__device__ __forceinline__ void copy_chunk(T* tile, const T* first, int64_t row_stride, int t,
                                           int row, int column, bool has_column, const Work& work) {
  static_assert(kPassRows % 8 == 0);  // the permutation in a tile is the same in every pass
  T* const to = tile + tile_at<kChunk>(row, column);
  const T* const from = first + (t + row) * row_stride + column;
  const uint8_t* const marks = work.marks;
  const int left = has_column ? work.count - t - row : 0;  // tokens
  const auto copy = [&](int pass, bool there) {
    copy_async(reinterpret_cast<Pack<T, kTileVector>*>(to + pass * kPassRows * kPanel),
               from + pass * kPassRows * row_stride, there);
  };
  if (marks == nullptr) {
#pragma unroll
    for (int pass = 0; pass < kChunk / kPassRows; ++pass) copy(pass, pass * kPassRows < left);
  } else {
#pragma unroll
    for (int pass = 0; pass < kChunk / kPassRows; ++pass) {
      copy(pass, pass * kPassRows < left && marks[t + row + pass * kPassRows] != kPadding);
    }
  }
}

/// Chunk t .. of B or C, by all threads of the block.
template <int kStates, int kThreads, class T, class Work>
__device__ __forceinline__ void copy_matrix(T* tile, const T* first, const View<4>& v,
                                            int64_t dstate, int t, const Work& work) {
  constexpr int kVectors = kStates / kTileVector;
  const int thread = recomputed(static_cast<int>(threadIdx.x));
  const int column = thread % kVectors * kTileVector;
  copy_chunk<kThreads / kVectors>(tile, first, v.stride[1], t, thread / kVectors, column,
                                  column < dstate, work);
}

/// Chunk t .. of x or z, by a warp for its 16 channels.
template <class T, class Work>
__device__ __forceinline__ void copy_channels(T* tile, const T* first, const View<4>& v,
                                              int channels, int channel, int t, const Work& work) {
  const int lane = recomputed(lane_id());
  const int column = channel + lane % 2 * kTileVector;
  copy_chunk<kWarpSize / 2>(tile, first, v.stride[1], t, lane / 2, column, column < channels, work);
}

/// Calls f(accumulator, channel, state) for every accumulator of a warp, (16 channels, 8 * kTiles
/// states), that exists.
template <int kTiles, class F>
__device__ __forceinline__ void for_states(float (&state)[kTiles][4], const SsdChunkScanParams& p,
                                           int channel, F f) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int c = channel + lane / 4 + 8 * i;
    if (c >= p.headdim) break;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int n = tile * 8 + lane % 4 * 2 + k;
        if (n < p.dstate) f(state[tile][2 * i + k], c, n);
      }
    }
  }
}

template <class T, int kTiles>
__device__ __forceinline__ void load_states(float (&state)[kTiles][4], const SsdChunkScanParams& p,
                                            const StateView& v, int channel) {
  if (v.data == nullptr) return;
  if (v.dtype == DType::kFloat32) {
    for_states(state, p, channel,
               [&](float& s, int c, int n) { s = static_cast<const float*>(v.data)[v.at(c, n)]; });
  } else {
    for_states(state, p, channel, [&](float& s, int c, int n) {
      s = to_accumulate(static_cast<const T*>(v.data)[v.at(c, n)]);
    });
  }
}

template <int kTiles>
__device__ __forceinline__ void store_states(float (&state)[kTiles][4], const SsdChunkScanParams& p,
                                             const StateView& v, int channel) {
  for_states(state, p, channel,
             [&](float& s, int c, int n) { static_cast<float*>(v.data)[v.at(c, n)] = s; });
}

/// The first `count` tokens of a chunk, a warp's 16 channels of them, from a tile to out.
template <class T>
__device__ __forceinline__ void store_channels(const T* tile, T* first, const View<4>& v,
                                               bool vectors, int channels, int channel, int t,
                                               int count) {
  const int lane = recomputed(lane_id());
  const int column = channel + lane % 2 * kTileVector;
  T* const to = first + (t + lane / 2) * v.stride[1] + column * v.stride[3];
  constexpr int kPasses = 4;
  const T* const from = tile + tile_at<kChunk>(lane / 2, column);
  if (vectors) {
    uint4 rows[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      rows[pass] = *reinterpret_cast<const uint4*>(from + pass * 16 * kPanel);
    }
    const int left = column < channels ? count - lane / 2 : 0;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      if (pass * 16 < left) {
        __stcs(reinterpret_cast<uint4*>(to + pass * 16 * v.stride[1]), rows[pass]);
      }
    }
    return;
  }
#pragma unroll 1
  for (int row = 0; lane / 2 + row < min(count, kChunk); row += 16) {
    for (int i = 0; i < kTileVector && column + i < channels; ++i) {
      to[row * v.stride[1] + i * v.stride[3]] = from[row * kPanel + i];
    }
  }
}

/// Row by row, `to` of (batch, seqlen, heads, pitch) from the columns of v, zeros behind them.
template <class T>
__global__ void copy_rows(const View<4> v, T* to, int64_t size, int64_t seqlen, int64_t heads,
                          int64_t columns, int64_t pitch) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= size) return;
  const int64_t column = i % pitch;
  const int64_t head = i / pitch % heads;
  const int64_t t = i / pitch / heads % seqlen;
  const int64_t b = i / pitch / heads / seqlen;
  to[i] = column < columns
              ? static_cast<const T*>(v.data)[b * v.stride[0] + t * v.stride[1] +
                                              head * v.stride[2] + column * v.stride[3]]
              : from_accumulate<T>(0.0f);
}

/// A warp's 16 rows of M from those of K: (i, j) with a decay from j to i.
template <class T>
__device__ __forceinline__ void mix_tokens(T* mixed, const float (&product)[kChunk / 8][4],
                                           const StepTable& table) {
  const int lane = recomputed(lane_id());
  const int row_block = warp_id() % kUnitWarps;
  const int i = row_block * 16 + lane / 4;
  const float decay[2] = {table.decay_step[i].x, table.decay_step[i + 8].x};
  const int resets[2] = {table.resets[i], table.resets[i + 8]};
  const bool any_resets = table.last_resets > 0;
#pragma unroll
  for (int block = 0; block < kChunk / 16; ++block) {
    if (block > row_block) {  // M is multiplied as a whole where warps multiply together
      store_a<kChunk>({}, mixed, row_block * 16, block * 16, lane);
      continue;
    }
    uint32_t rounded[4];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {  // of 8 columns
      const int j = block * 16 + tile * 8 + lane % 4 * 2;
      const float4 pair = *reinterpret_cast<const float4*>(&table.decay_step[j]);
#pragma unroll
      for (int k = 0; k < 2; ++k) {  // rows i and i + 8, columns j and j + 1
        float m0 = fast_exp2(decay[k] - pair.x) * pair.y;
        float m1 = fast_exp2(decay[k] - pair.z) * pair.w;
        if (any_resets || block == row_block) {
          if (j > i + 8 * k || table.resets[j] != resets[k]) m0 = 0;
          if (j + 1 > i + 8 * k || table.resets[j + 1] != resets[k]) m1 = 0;
        }
        const float* const own = &product[2 * block + tile][2 * k];
        rounded[2 * tile + k] = round_pair<T>(own[0] * m0, own[1] * m1);
      }
    }
    store_a<kChunk>(rounded, mixed, row_block * 16, block * 16, lane);
  }
}

template <class T, int kUnits, int kStates, bool kEngine>
__global__ void __launch_bounds__(BlockLayout<T, kUnits, kStates>::kThreads,
                                  BlockLayout<T, kUnits, kStates>::kResident)
    forward_chunks(const SsdChunkScanParams p, const ForwardPlan plan,
                   const __grid_constant__ ForwardMaps maps, bool states_only) {
  using Layout = BlockLayout<T, kUnits, kStates>;
  constexpr int kTiles = kStates / 8;
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  Layout& shared = *reinterpret_cast<Layout*>(shared_bytes);
  const int lane = threadIdx.x % kWarpSize;
  const int warp = warp_id();

  const int unit_block = blockIdx.x % plan.unit_blocks;
  const int group = blockIdx.x / plan.unit_blocks % static_cast<int>(p.ngroups);
  const int slot = blockIdx.x / plan.unit_blocks / static_cast<int>(p.ngroups);
  const Segment segment = segment_of(p, plan.segments, slot);
  if (!segment.exists || (states_only && segment.last)) return;

  const int own = warp / kUnitWarps;                      // unit of the block
  const int channel = warp % kUnitWarps * kWarpChannels;  // of the warp, in its unit
  auto& work = shared.work;
  auto& unit = work.units[own];
  if (warp % kUnitWarps == 0) {
    const int group_heads = static_cast<int>(p.nheads / p.ngroups);
    const int units = group_heads * plan.panels;
    const int in_group = unit_block * kUnits + own;
    const int head = group * group_heads + min(in_group, units - 1) / plan.panels;
    const int panel = in_group % plan.panels * kUnitChannels;
    const auto first = [&](const View<4>& v, int64_t i, int64_t column) {
      return static_cast<T*>(v.data) + segment.row * v.stride[0] + segment.begin * v.stride[1] +
             i * v.stride[2] + column * v.stride[3];
    };
    if (lane == 0) {
      unit.x = first(p.x, head, panel);
      unit.z = first(p.z, head, panel);
      unit.out = first(p.out, head, panel);
      unit.steps = static_cast<const StepTable*>(plan.steps) +
                   int64_t{slot} * (plan.segments.length / kChunk) * p.nheads + head;
      unit.head = head;
      unit.panel = panel;
      unit.channels =
          in_group < units ? min(kUnitChannels, static_cast<int>(p.headdim) - panel) : 0;
      work.segment = segment;
      work.slot = slot;
      work.marks = p.marks == nullptr ? nullptr : p.marks + segment.row * p.seqlen + segment.begin;
      work.row = static_cast<int>(segment.row);
      work.count = static_cast<int>(segment.end - segment.begin);
      work.B = first(p.B, group, 0);
      work.C = first(p.C, group, 0);
    }
    for (int c = lane; c < kUnitChannels; c += kWarpSize) {
      const int64_t at = head * p.D.stride[0] + (panel + c) * p.D.stride[1];
      const bool has = given(p.D) && panel + c < p.headdim;
      unit.D[c] = has ? load_as<float>(p.D.data, p.D.dtype, at) : 0.0f;
    }
  }
  const bool asks = threadIdx.x == 0;  // the copy engine
  const bool unit_asks = threadIdx.x % (kUnitWarps * kWarpSize) == 0;
  if (kEngine && asks) {
    shared.chunk_there.init();
    shared.gate_there.init();
    publish_barriers();
  }
  __syncthreads();

  const int units = kUnits == 1 || work.units[kUnits - 1].channels == 0 ? 1 : kUnits;  // that exist
  // Of the chunk at token t of the segment: C, steps and x of all units.
  const auto copy_early = [&](int matrix, int buffer, int t) {
    if constexpr (kEngine) {
      if (!asks) return;
      auto& there = shared.chunk_there;
      const int at = static_cast<int>(work.segment.begin) + t;
      there.expect(units * static_cast<int>(sizeof(StepTable) + sizeof(T) * Layout::kTile) +
                   (states_only ? 1 : 2) * static_cast<int>(sizeof(T) * Layout::kMatrix));
#pragma unroll
      for (int n = 0; n < kStates && !states_only; n += kPanel) {
        copy_box(shared.matrices[matrix] + n * kChunk, maps.C, work.row, at, group, n, there);
      }
#pragma unroll
      for (int u = 0; u < units; ++u) {
        const auto& of = work.units[u];
        copy_bytes(&shared.steps[buffer][u], of.steps + t / kChunk * p.nheads, sizeof(StepTable),
                   there);
        copy_box(shared.x[buffer][u], maps.x, work.row, at, of.head, of.panel, there);
      }
    } else {
      if (!states_only) {
        copy_matrix<kStates, Layout::kThreads>(shared.matrices[matrix], work.C, p.C, p.dstate, t,
                                               work);
      }
      constexpr int kVectors = sizeof(StepTable) / 16;
      const int thread = recomputed(static_cast<int>(threadIdx.x)) % (kUnitWarps * kWarpSize);
      if (thread < kVectors) {
        copy_async(reinterpret_cast<Pack<float, 4>*>(&shared.steps[buffer][own]) + thread,
                   reinterpret_cast<const float*>(unit.steps + t / kChunk * p.nheads) + 4 * thread);
      }
      copy_channels(shared.x[buffer][own], unit.x, p.x, unit.channels, channel, t, work);
    }
  };
  const auto copy_B = [&](int matrix, int t) {
    if constexpr (kEngine) {
      if (!asks) return;
      const int at = static_cast<int>(work.segment.begin) + t;
#pragma unroll
      for (int n = 0; n < kStates; n += kPanel) {
        copy_box(shared.matrices[matrix] + n * kChunk, maps.B, work.row, at, group, n,
                 shared.chunk_there);
      }
    } else {
      copy_matrix<kStates, Layout::kThreads>(shared.matrices[matrix], work.B, p.B, p.dstate, t,
                                             work);
    }
  };
  const auto copy_z = [&](int t) {
    if constexpr (kEngine) {
      if (!asks) return;
      const int at = static_cast<int>(work.segment.begin) + t;
      shared.gate_there.expect(units * static_cast<int>(sizeof(T) * Layout::kTile));
#pragma unroll
      for (int u = 0; u < units; ++u) {
        const auto& of = work.units[u];
        copy_box(shared.gate[u], maps.z, work.row, at, of.head, of.panel, shared.gate_there);
      }
    } else {
      copy_channels(shared.gate[own], unit.z, p.z, unit.channels, channel, t, work);
    }
  };

  int this_C = 0, this_B = 1, next_C = 2;  // matrices
  int buffer = 0;                          // of steps and x; the parity of the chunk
  if (work.count > 0) {
    copy_early(this_C, buffer, 0);
    copy_B(this_B, 0);
  }
  commit_copies();

  float state[kTiles][4] = {};
  if (!states_only) {
    load_states<T>(state, p, state_before<float>(p, plan, segment, slot, unit.head),
                   unit.panel + channel);
  }
  float left = 1;  // of the state before the segment

#pragma unroll 1
  for (int begin = 0; begin < work.count; begin += kChunk) {
    const int next = begin + kChunk;
    const StepTable& table = shared.steps[buffer][own];
    const T* const x = shared.x[buffer][own];
    T* const mixed = shared.mixed[own];
    if constexpr (kEngine) {
      shared.chunk_there.wait(buffer);
    } else {
      wait_copies<0>();
      publish_tiles();
    }
    __syncthreads();  // this chunk is there; nobody is at the last one any more
    if (given(p.z) && !states_only) copy_z(begin);
    commit_copies();
    if (next < work.count) {
      copy_early(next_C, 1 - buffer, next);
      if (states_only) copy_B(next_C, next);
    }
    commit_copies();

    uint32_t x_operand[4][4];
    if (!states_only) {
      const T* const C = shared.matrices[this_C];
      float y[kChunk / 8][4];
      multiply_tiles<kStates>(y, C, shared.matrices[this_B]);
      mix_tokens(mixed, y, table);
      publish_tiles();
      sync_unit(own);  // M is there
#pragma unroll
      for (int t = 0; t < kChunk / 8; ++t) y[t][0] = y[t][1] = y[t][2] = y[t][3] = 0;
      constexpr int kSteps = 4;  // of 16 states: as many as there are registers to round them into
#pragma unroll
      for (int n = 0; n < kStates; n += 16 * kSteps) {
        uint32_t rounded[kSteps][4];
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          const float(&s0)[4] = state[n / 8 + 2 * k];
          const float(&s1)[4] = state[n / 8 + 2 * k + 1];
          rounded[k][0] = round_pair<T>(s0[0], s0[1]);
          rounded[k][1] = round_pair<T>(s0[2], s0[3]);
          rounded[k][2] = round_pair<T>(s1[0], s1[1]);
          rounded[k][3] = round_pair<T>(s1[2], s1[3]);
        }
        multiply_transposed<false>(y, rounded, C, n);
      }
      const int l = recomputed(lane);
#pragma unroll
      for (int i = 0; i < kChunk / 8; ++i) {
        const float2 entering =
            *reinterpret_cast<const float2*>(&table.entering[i * 8 + l % 4 * 2]);
        y[i][0] *= entering.x;
        y[i][1] *= entering.y;
        y[i][2] *= entering.x;
        y[i][3] *= entering.y;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        load_a_transposed<kChunk>(x_operand[j], x, j * 16, channel, l);
      }
      multiply_transposed<true>(y, x_operand, mixed, 0);
      const float D[2] = {unit.D[channel + l / 4], unit.D[channel + l / 4 + 8]};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float2 own_x = unpack_pair<T>(x_operand[j][k]);
          float* const pair = &y[2 * j + k / 2][k % 2 * 2];
          pair[0] = fmaf(D[k % 2], own_x.x, pair[0]);
          pair[1] = fmaf(D[k % 2], own_x.y, pair[1]);
        }
      }
      __syncthreads();  // nobody needs this chunk's C and M any more
      if (next < work.count) copy_B(this_C, next);
      commit_copies();

      if (given(p.z)) {
        if constexpr (kEngine) {
          shared.gate_there.wait(buffer);
        } else {
          wait_copies<2>();
          __syncwarp();  // z is there
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (given(p.z)) {
          uint32_t gate[4];
          load_a_transposed<kChunk>(gate, shared.gate[own], i * 16, channel, l);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float2 own_z = unpack_pair<T>(gate[k]);
            y[2 * i + k / 2][k % 2 * 2] *= silu(own_z.x);
            y[2 * i + k / 2][k % 2 * 2 + 1] *= silu(own_z.y);
          }
        }
        uint32_t out[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          out[k] = round_pair<T>(y[2 * i + k / 2][k % 2 * 2], y[2 * i + k / 2][k % 2 * 2 + 1]);
        }
        store_a_transposed<kChunk>(out, mixed, i * 16, channel, l);
      }
      if constexpr (kEngine) {
        publish_tiles();
        sync_unit(own);  // out is there
        if (unit_asks && unit.channels > 0) {
          write_box(maps.out, mixed, work.row, static_cast<int>(work.segment.begin) + begin,
                    unit.head, unit.panel);
        }
      } else {
        __syncwarp();
        store_channels(mixed, unit.out, p.out, plan.vector_out, unit.channels, channel, begin,
                       work.count - begin);
      }
    }

    const float passing = table.passing;
    left *= passing;
    if (table.last_resets > 0) {  // whatever the state was, infinite too
#pragma unroll
      for (int i = 0; i < kTiles; ++i) state[i][0] = state[i][1] = state[i][2] = state[i][3] = 0;
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) state[i][k] *= passing;
    }
    const int l = recomputed(lane);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* const weight = &table.leaving[j * 16 + l % 4 * 2];
      const float2 first = *reinterpret_cast<const float2*>(weight);
      const float2 second = *reinterpret_cast<const float2*>(weight + 8);
      load_a_transposed<kChunk>(x_operand[j], x, j * 16, channel, l);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 w = k < 2 ? first : second;
        const float2 v = unpack_pair<T>(x_operand[j][k]);
        x_operand[j][k] = round_pair<T>(v.x * w.x, v.y * w.y);
      }
    }
    multiply(state, x_operand, shared.matrices[this_B]);
    if (kEngine && unit_asks) wait_boxes();  // before M is written again
    // What was this chunk's B is free now; the next one's is where its C, or that of a chunk
    // without C would be.
    const int freed = this_B;
    this_B = states_only ? next_C : this_C;
    this_C = states_only ? this_C : next_C;
    next_C = freed;
    buffer = 1 - buffer;
  }

  if (unit.channels == 0) return;
  if (states_only) {
    store_states(state, p, segment_state<float>(p, plan, work.slot, unit.head),
                 unit.panel + channel);
    if (unit.panel == 0 && channel == 0 && lane == 0) {
      plan.decays[work.slot * p.nheads + unit.head] = left;
    }
  } else if (work.segment.last) {
    store_states(state, p, StateView(p.final_states, work.segment.sequence, unit.head),
                 unit.panel + channel);
  }
}

// ---- Plain path --------------------------------------------------------------------------------

constexpr int kPlainTokens = 16;  // of a tile
constexpr int kLaneStates = 8;

/// How a block of kLanes lanes per channel is laid out.
template <class Acc, int kLanes>
struct PlainLayout {
  static constexpr int kLaneChannels = sizeof(Acc) == 8 ? 4 : 8;  // 64 registers of states
  static constexpr int kStates = kLanes * kLaneStates;            // of a pass over the sequence
  static constexpr int kWarpChannels = kWarpSize / kLanes * kLaneChannels;
  static constexpr int kChannels = 8 * kLaneChannels;
  static constexpr int kThreads = kChannels / kWarpChannels * kWarpSize;

  Acc B[kPlainTokens][kStates];
  Acc C[kPlainTokens][kStates];
  Acc x[kPlainTokens][kChannels];
  Acc y[kPlainTokens][kChannels];
  Acc step[kPlainTokens], decay[kPlainTokens];  // d_t, exp(d_t A)
  uint8_t mark[kPlainTokens];
};

/// kSize elements side by side in shared memory.
template <class Acc, int kSize>
__device__ __forceinline__ void read_run(const Acc* shared, Acc (&x)[kSize]) {
  constexpr int kVector = Vector<Acc>::kSize;
#pragma unroll
  for (int i = 0; i < kSize; i += kVector) {
    const Vector<Acc> v = load_vector(shared + i);
#pragma unroll
    for (int k = 0; k < kVector; ++k) x[i + k] = v.element[k];
  }
}

/// Sums of x[0 .. kSize) over kLanes neighboring lanes: the lane whose number among them is l <
/// kSize returns that of element `element`, whose bits are those of l in reverse.
template <int kLanes, class Acc, int kSize>
__device__ __forceinline__ Acc sum_over_lanes(Acc (&x)[kSize], int& element) {
  const int lane = threadIdx.x % kLanes;
  element = 0;
#pragma unroll
  for (int half = kSize / 2, distance = 1; half > 0; half /= 2, distance *= 2) {
    const bool upper = lane & distance;
    if (upper) element += half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const Acc sent = upper ? x[i] : x[i + half];
      const Acc kept = upper ? x[i + half] : x[i];
      x[i] = kept + __shfl_xor_sync(kAllLanes, sent, distance);
    }
  }
#pragma unroll
  for (int distance = kSize; distance < kLanes; distance *= 2) {
    x[0] += __shfl_xor_sync(kAllLanes, x[0], distance);
  }
  return x[0];
}

template <class T, int kLanes>
__global__ void __launch_bounds__(PlainLayout<Accumulate<T>, kLanes>::kThreads)
    forward_plain(const SsdChunkScanParams p, const ForwardPlan plan, bool states_only) {
  using Acc = Accumulate<T>;
  using Layout = PlainLayout<Acc, kLanes>;
  constexpr int kLaneChannels = Layout::kLaneChannels;
  constexpr int kThreads = Layout::kThreads;
  constexpr int kRun = 4;  // states side by side; a lane has two runs
  __shared__ __align__(16) unsigned char shared_bytes[sizeof(Layout)];
  Layout& shared = *reinterpret_cast<Layout*>(shared_bytes);
  const int64_t panel = blockIdx.x % plan.panels * Layout::kChannels;
  const int64_t head = blockIdx.x / plan.panels % p.nheads;
  const int64_t slot = blockIdx.x / plan.panels / p.nheads;
  const Segment segment = segment_of(p, plan.segments, slot);
  if (!segment.exists || (states_only && segment.last)) return;

  const int64_t row = segment.row;
  const int64_t group = head / (p.nheads / p.ngroups);
  const int lane = threadIdx.x % kLanes;
  const int channel = threadIdx.x / kLanes * kLaneChannels;  // first of the thread, in the panel
  const StepRule<Acc> rule(p, head);
  const auto element = [row](const View<4>& v, int64_t t, int64_t h, int64_t i) {
    return static_cast<T*>(v.data) + row * v.stride[0] + t * v.stride[1] + h * v.stride[2] +
           i * v.stride[3];
  };
  Acc left = 1;

  int64_t n0 = 0;
  do {
    const bool last_states = n0 + Layout::kStates >= p.dstate;
    const auto state_of = [&](int s) { return n0 + (s / kRun * kLanes + lane) * kRun + s % kRun; };
    Acc state[kLaneChannels][kLaneStates] = {};
    StateView before = state_before<Acc>(p, plan, segment, slot, head);
    if (states_only) before.data = nullptr;
    const auto for_own_states = [&](auto f) {
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) {
#pragma unroll
        for (int s = 0; s < kLaneStates; ++s) {
          const int64_t c = panel + channel + i;
          if (c < p.headdim && state_of(s) < p.dstate) f(state[i][s], c, state_of(s));
        }
      }
    };
    if (before.data != nullptr) {
      if (before.dtype == (sizeof(Acc) == 8 ? DType::kFloat64 : DType::kFloat32)) {
        for_own_states([&](Acc& s, int64_t c, int64_t n) {
          s = static_cast<const Acc*>(before.data)[before.at(c, n)];
        });
      } else {
        for_own_states([&](Acc& s, int64_t c, int64_t n) {
          s = load_as<Acc>(before.data, before.dtype, before.at(c, n));
        });
      }
    }

    for (int64_t begin = segment.begin; begin < segment.end; begin += kPlainTokens) {
      const int tokens = static_cast<int>(min(int64_t{kPlainTokens}, segment.end - begin));
      __syncthreads();  // the last tile is read
      if (threadIdx.x < tokens) {
        const int64_t t = begin + threadIdx.x;
        const uint8_t mark = p.marks == nullptr ? uint8_t{kContinue} : p.marks[row * p.seqlen + t];
        Acc step = 0;
        if (mark != kPadding) {
          step = rule.step(
              load_as<Acc>(p.dt.data, p.dt.dtype,
                           row * p.dt.stride[0] + t * p.dt.stride[1] + head * p.dt.stride[2]));
        }
        shared.step[threadIdx.x] = step;
        shared.decay[threadIdx.x] = fast_exp2(step * rule.rate);
        shared.mark[threadIdx.x] = mark;
      }
      __syncthreads();  // marks are there
      for (int i = threadIdx.x; i < tokens * Layout::kStates; i += kThreads) {
        const int t = i / Layout::kStates;
        const int s = i % Layout::kStates;
        const bool there = n0 + s < p.dstate && shared.mark[t] != kPadding;
        shared.B[t][s] = there ? to_accumulate(*element(p.B, begin + t, group, n0 + s)) : Acc(0);
        if (states_only) continue;
        shared.C[t][s] = there ? to_accumulate(*element(p.C, begin + t, group, n0 + s)) : Acc(0);
      }
      for (int i = threadIdx.x; i < tokens * Layout::kChannels; i += kThreads) {
        const int t = i / Layout::kChannels;
        const int c = i % Layout::kChannels;
        const bool there = panel + c < p.headdim && shared.mark[t] != kPadding;
        shared.x[t][c] = there ? to_accumulate(*element(p.x, begin + t, head, panel + c)) : Acc(0);
      }
      __syncthreads();

      for (int t = 0; t < tokens; ++t) {
        const bool reset = shared.mark[t] == kReset;
        const Acc decay = shared.decay[t];
        if (reset) {
#pragma unroll
          for (int i = 0; i < kLaneChannels; ++i) {
#pragma unroll
            for (int s = 0; s < kLaneStates; ++s) state[i][s] = 0;
          }
        }
        left = reset ? Acc(0) : left * decay;
        Acc input[kLaneChannels], y[kLaneChannels] = {};
        read_run(&shared.x[t][channel], input);
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i) input[i] *= shared.step[t];
#pragma unroll
        for (int run = 0; run < kLaneStates / kRun; ++run) {
          Acc B[kRun], C[kRun] = {};
          read_run(&shared.B[t][(run * kLanes + lane) * kRun], B);
          if (!states_only) read_run(&shared.C[t][(run * kLanes + lane) * kRun], C);
#pragma unroll
          for (int i = 0; i < kLaneChannels; ++i) {
#pragma unroll
            for (int s = 0; s < kRun; ++s) {
              Acc& h = state[i][run * kRun + s];
              h = decay * h + input[i] * B[s];
              y[i] += h * C[s];
            }
          }
        }
        if (states_only) continue;
        int i;
        const Acc sum = sum_over_lanes<kLanes>(y, i);
        if (lane < kLaneChannels) shared.y[t][channel + i] = sum;
      }
      if (states_only) continue;
      __syncthreads();

      // The same thread every time a y is added to: there is nothing to wait for.
      for (int i = threadIdx.x; i < tokens * Layout::kChannels; i += kThreads) {
        const int tile_t = i / Layout::kChannels;
        const int tile_c = i % Layout::kChannels;
        const int64_t t = begin + tile_t;
        const int64_t c = panel + tile_c;
        if (c >= p.headdim) continue;
        T* const out = element(p.out, t, head, c);
        Acc* partial;
        if constexpr (std::is_same_v<T, Acc>) {
          partial = out;
        } else {
          partial = plan.partials + ((row * p.seqlen + t) * p.nheads + head) * p.headdim + c;
        }
        Acc y = shared.y[tile_t][tile_c];
        if (n0 > 0) y += *partial;
        if (!last_states) {
          *partial = y;
          continue;
        }
        if (given(p.D)) {
          const int64_t offset = head * p.D.stride[0] + c * p.D.stride[1];
          y += load_as<Acc>(p.D.data, p.D.dtype, offset) * shared.x[tile_t][tile_c];
        }
        if (given(p.z)) y *= silu(to_accumulate(*element(p.z, t, head, c)));
        *out = from_accumulate<T>(shared.mark[tile_t] == kPadding ? Acc(0) : y);
      }
    }

    StateView after = segment_state<Acc>(p, plan, slot, head);
    if (!states_only) after = StateView(p.final_states, segment.sequence, head);
    if (states_only || segment.last) {
      for_own_states(
          [&](Acc& s, int64_t c, int64_t n) { static_cast<Acc*>(after.data)[after.at(c, n)] = s; });
    }
    if (states_only && n0 == 0 && panel == 0 && threadIdx.x == 0) {
      reinterpret_cast<Acc*>(plan.decays)[slot * p.nheads + head] = left;
    }
    n0 += Layout::kStates;
  } while (n0 < p.dstate);
}

// ---- Host --------------------------------------------------------------------------------------

/// How long a launch takes, for the choice of a plan. A multiprocessor runs `resident` blocks at a
/// time; such a round takes `latency` per chunk however many they are, and `work` per chunk and
/// block. The kernel that finds the states at the ends of segments adds `first_pass` of that, and
/// starting it and pass_states `start`. To begin and end a segment takes as long as two chunks. In
/// microseconds of an H100, where they were measured (November 2026); only their proportions
/// matter.
struct ForwardCost {
  int resident;
  double latency, work, first_pass, start;
};

/// Cuts the sequences of a call, whose tokens take `blocks` blocks, into as many segments as the
/// cost asks for. Sequences in cu_seqlens are cut as one long one would be, since their lengths are
/// not known here: where they are shorter than a segment, nothing is cut, and there are many.
void choose_segments(ForwardPlan& plan, const SsdChunkScanParams& p, int64_t blocks,
                     const ForwardCost& cost) {
  constexpr int64_t kMinChunks = 4;     // of a segment
  constexpr int64_t kMaxSegments = 64;  // states in the workspace
  const int64_t chunks = std::max<int64_t>(1, ceil_div(p.seqlen, kChunk));
  const int64_t multiprocessors = multiprocessor_count();
  double best = std::numeric_limits<double>::infinity();
  int64_t best_length = chunks;
  const int64_t most = std::clamp<int64_t>(chunks / kMinChunks, 1, kMaxSegments);
  for (int64_t wanted = 1; wanted <= most; ++wanted) {
    const int64_t length = ceil_div(chunks, wanted);
    const int64_t segments = ceil_div(chunks, length);
    const int64_t share = ceil_div(p.batch * segments * blocks, multiprocessors);
    const double work = cost.work * (1 + cost.first_pass * (segments - 1) / segments);
    const double latency = cost.latency * (segments > 1 ? 1 + cost.first_pass : 1);
    const double time = (length + 2) * (latency * ceil_div(share, cost.resident) + work * share) +
                        (segments > 1 ? cost.start : 0);
    if (time < best) {
      best = time;
      best_length = length;
    }
  }
  plan.segments = Segments::of_length(p, best_length * kChunk);
  plan.time = best;
}

template <class Acc>
void take_states(Workspace& workspace, const SsdChunkScanParams& p, ForwardPlan& plan) {
  if (plan.segments.per_sequence == 1) return;
  const int64_t rows = plan.segments.slots * p.nheads;
  plan.states = reinterpret_cast<float*>(workspace.take<Acc>(rows * p.headdim * p.dstate));
  plan.decays = reinterpret_cast<float*>(workspace.take<Acc>(rows));
}

/// Launches `kernel`, and before it what finds the states that segments start from.
template <class Acc, class Kernel, class... Maps>
void launch_segments(Kernel kernel, const SsdChunkScanParams& p, const ForwardPlan& plan,
                     int64_t blocks, int threads, cudaStream_t stream, const Maps&... maps) {
  if (plan.segments.per_sequence > 1) {
    const int64_t pass_blocks = ceil_div(p.headdim * p.dstate, kPassThreads * kPassElements);
    launch_shared(kernel, blocks, threads, plan.shared, stream, p, plan, maps..., true);
    if (pass_blocks > 0) {
      launch_shared(pass_states<Acc>, p.num_sequences * p.nheads * pass_blocks, kPassThreads, 0,
                    stream, p, plan, static_cast<unsigned>(pass_blocks));
    }
  }
  launch_shared(kernel, blocks, threads, plan.shared, stream, p, plan, maps..., false);
}

/// What the tensor-core path reads has rows of 16-byte vectors; tensors that do not are copied into
/// the workspace first, their rows filled up with zeros.
template <class T>
struct VectorRows {
  using Member = View<4> SsdChunkScanParams::*;
  Member view;
  int64_t heads, columns;
  T* copy = nullptr;

  int64_t pitch() const { return ceil_div(columns, kTileVector) * kTileVector; }
  int64_t rows(const SsdChunkScanParams& p) const { return p.batch * p.seqlen * heads; }

  void take(Workspace& workspace, const SsdChunkScanParams& p) {
    const View<4>& v = p.*view;
    if (!given(v) || (columns % kTileVector == 0 && has_vector_rows<T>(v))) return;
    copy = workspace.take<T>(rows(p) * pitch());
  }

  /// Replaces the view in p by one of the copy, which is made on `stream`.
  void use(SsdChunkScanParams& p, cudaStream_t stream) const {
    const int64_t size = rows(p) * pitch();
    if (copy == nullptr || size == 0) return;
    View<4>& v = p.*view;
    constexpr int kThreads = 256;
    copy_rows<T><<<static_cast<unsigned>(ceil_div(size, kThreads)), kThreads, 0, stream>>>(
        v, copy, size, p.seqlen, heads, columns, pitch());
    v = {copy, v.dtype, {p.seqlen * heads * pitch(), heads * pitch(), pitch(), 1}};
  }
};

template <class T, int kUnits, int kStates>
struct ChunkForward {
  using Layout = BlockLayout<T, kUnits, kStates>;
  ForwardPlan plan{};
  VectorRows<T> inputs[4];
  size_t workspace_size;

  int64_t chunks() const { return plan.segments.length / kChunk; }  // of a segment

  static bool fits() {
    return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >=
           static_cast<int64_t>(sizeof(Layout));
  }

  /// True if the copy engine serves a call; then with `maps`.
  static bool describe(ForwardMaps& maps, const SsdChunkScanParams& p) {
    // Which tokens are padding, and where sequences in one row end, it does not know.
    if (p.marks != nullptr || given(p.cu_seqlens)) return false;
    if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return false;
    static const bool compiled = knows_copy_engine(forward_chunks<T, kUnits, kStates, true>);
    const auto channels = [&](TensorMap& map, const View<4>& v) {
      return describe_tensor<T>(map, v, p.batch, p.seqlen, p.nheads, p.headdim, kChunk, kPanel);
    };
    const auto states = [&](TensorMap& map, const View<4>& v) {
      return describe_tensor<T>(map, v, p.batch, p.seqlen, p.ngroups, p.dstate, kChunk, kPanel);
    };
    return compiled && channels(maps.x, p.x) && (!given(p.z) || channels(maps.z, p.z)) &&
           states(maps.B, p.B) && states(maps.C, p.C) && channels(maps.out, p.out);
  }

  ChunkForward(const SsdChunkScanParams& p, void* base)
      : inputs{{&SsdChunkScanParams::x, p.nheads, p.headdim},
               {&SsdChunkScanParams::z, p.nheads, p.headdim},
               {&SsdChunkScanParams::B, p.ngroups, p.dstate},
               {&SsdChunkScanParams::C, p.ngroups, p.dstate}} {
    constexpr int64_t kReserved = 1024;  // bytes of shared memory that the system takes per block
    const int64_t held = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) /
                         (static_cast<int64_t>(Layout::bytes(given(p.z))) + kReserved);
    plan.panels = static_cast<int>(ceil_div(p.headdim, kUnitChannels));
    plan.unit_blocks = static_cast<int>(ceil_div(p.nheads / p.ngroups * plan.panels, kUnits));
    plan.shared = Layout::bytes(given(p.z));
    plan.vector_out = p.headdim % kTileVector == 0 && has_vector_rows<T>(p.out);
    // (latency, work) of [one or two units][64 or 128 states]
    constexpr double kCosts[2][2][2] = {{{0.5, 1.25}, {0.5, 1.4}}, {{1.5, 1.55}, {2, 1.65}}};
    const auto& own = kCosts[kUnits - 1][kStates / 64 - 1];
    const ForwardCost cost{static_cast<int>(std::clamp<int64_t>(held, 1, Layout::kResident)),
                           own[0], own[1], 0.35, 8};
    choose_segments(plan, p, p.ngroups * plan.unit_blocks, cost);
    Workspace workspace(base);
    take_states<float>(workspace, p, plan);
    plan.steps = workspace.take<StepTable>(plan.segments.slots * chunks() * p.nheads);
    for (VectorRows<T>& input : inputs) input.take(workspace, p);
    workspace_size = workspace.size();
  }

  void launch(const SsdChunkScanParams& p, cudaStream_t stream) const {
    SsdChunkScanParams q = p;
    for (const VectorRows<T>& input : inputs) input.use(q, stream);
    const int64_t head_blocks = ceil_div(p.nheads, kTableWarps);
    launch_shared(make_step_tables<float>, plan.segments.slots * chunks() * head_blocks,
                  kTableWarps * kWarpSize, 0, stream, q, plan, static_cast<unsigned>(head_blocks),
                  static_cast<unsigned>(chunks()));
    ForwardMaps maps{};
    const auto kernel = describe(maps, q) ? forward_chunks<T, kUnits, kStates, true>
                                          : forward_chunks<T, kUnits, kStates, false>;
    launch_segments<float>(kernel, q, plan, plan.segments.slots * p.ngroups * plan.unit_blocks,
                           Layout::kThreads, stream, maps);
  }
};

template <class T, int kLanes>
struct PlainForward {
  using Acc = Accumulate<T>;
  using Layout = PlainLayout<Acc, kLanes>;
  ForwardPlan plan{};
  size_t workspace_size;

  PlainForward(const SsdChunkScanParams& p, void* base) {
    plan.panels = static_cast<int>(std::max<int64_t>(1, ceil_div(p.headdim, Layout::kChannels)));
    const ForwardCost cost{512 / Layout::kThreads, 4, 4, 0.7, 8};
    choose_segments(plan, p, p.nheads * plan.panels, cost);
    Workspace workspace(base);
    take_states<Acc>(workspace, p, plan);
    if (!std::is_same_v<T, Acc> && p.dstate > Layout::kStates) {
      plan.partials = workspace.take<float>(p.batch * p.seqlen * p.nheads * p.headdim);
    }
    workspace_size = workspace.size();
  }

  void launch(const SsdChunkScanParams& p, cudaStream_t stream) const {
    launch_segments<Acc>(forward_plain<T, kLanes>, p, plan,
                         plan.segments.slots * p.nheads * plan.panels, Layout::kThreads, stream);
  }
};

/// True if the tensor-core path takes a call.
template <class T>
bool takes_chunk_path(const SsdChunkScanParams& p) {
  constexpr int64_t kMaxSize = int64_t{1} << 30;
  return sizeof(T) == 2 && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8 &&
         p.dstate > 0 && p.dstate <= 128 && p.headdim <= kMaxSize && p.seqlen <= kMaxSize &&
         p.nheads <= kMaxSize && p.num_sequences <= kMaxSize;
}

/// Calls f with the plan of the tensor-core path that takes the least time, or with that of the
/// plain path where the device's shared memory holds neither.
template <class T, int kStates, class F>
auto with_chunk_path(const SsdChunkScanParams& p, void* workspace, F f) {
  using Single = ChunkForward<T, 1, kStates>;
  using Pair = ChunkForward<T, 2, kStates>;
  if (!Single::fits()) return f(PlainForward<T, 16>(p, workspace));
  const Single single(p, workspace);
  if (Pair::fits()) {
    const Pair pair(p, workspace);
    if (pair.plan.time < single.plan.time) return f(pair);
  }
  return f(single);
}

/// Calls f with the plan of the path that takes the call.
template <class T, class F>
auto with_forward(const SsdChunkScanParams& p, void* workspace, F f) {
  if constexpr (sizeof(T) == 2) {
    if (takes_chunk_path<T>(p)) {
      return p.dstate <= 64 ? with_chunk_path<T, 64>(p, workspace, f)
                            : with_chunk_path<T, 128>(p, workspace, f);
    }
  }
  return p.dstate <= PlainLayout<Accumulate<T>, 8>::kStates ? f(PlainForward<T, 8>(p, workspace))
                                                            : f(PlainForward<T, 16>(p, workspace));
}

bool is_empty(const SsdChunkScanParams& p) {
  return p.num_sequences == 0 || p.nheads == 0 || p.headdim == 0;
}

}  // namespace

template <class T>
size_t workspace_ssd_chunk_scan_fwd(const SsdChunkScanParams& p) {
  if (is_empty(p)) return 0;
  return with_forward<T>(p, nullptr, [](const auto& forward) { return forward.workspace_size; });
}

template <class T>
CudaStatus launch_ssd_chunk_scan_fwd(const SsdChunkScanParams& p, void* workspace,
                                     CudaStream stream) {
  if (is_empty(p)) return cudaSuccess;
  return with_forward<T>(p, workspace, [&](const auto& forward) -> CudaStatus {
    forward.launch(p, static_cast<cudaStream_t>(stream));
    return cudaGetLastError();
  });
}

template size_t workspace_ssd_chunk_scan_fwd<MAMBA_SSM_ELEMENT>(const SsdChunkScanParams&);
template CudaStatus launch_ssd_chunk_scan_fwd<MAMBA_SSM_ELEMENT>(const SsdChunkScanParams&, void*,
                                                                 CudaStream);

}  // namespace mamba_ssm::kernels
