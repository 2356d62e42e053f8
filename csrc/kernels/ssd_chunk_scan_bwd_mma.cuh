// SSD backward on the tensor cores: T of 16 bits, up to 128 states.
//
// Matrices of a chunk have kChunk = 64 rows (tokens i, j) and 64 columns (channels p of one block
// of a head, "block head") or kStates (n). Operands of products are of type T, sums float32.
//
//   walk_states      goes through a segment of one block head chunk by chunk, forwards with the
//                    state S (p, n) in registers, or backwards with its gradient dS:
//                      S  <- passing S  + (leaving d x)^T B
//                      dS <- passing dS + (entering dy)^T C
//                    and leaves S before, and dS behind, every chunk in the workspace.
//   chunk_gradients  takes one chunk and walks through block heads of one group. With L_ij what is
//                    left at i of token j's contribution, G = dy x^T and M = (C B^T) o L:
//                      dx  = d (M^T dy + leaving B dS^T) + D dy
//                      dCB = sum over heads of G o L o d          (columns j by d_j)
//                      dC  = sum over heads of entering dy S  + dCB B
//                      dB  = sum over heads of leaving d x dS + dCB^T C
//                    With W = G o L o d o (C B^T) off the diagonal, where tokens decay, the decays
//                    get: later_i = row sums - column sums of W + entering <dy_i S, C_i>; earlier_j
//                    = leaving d <x_j dS, B_j>; passing = passing <S, dS>.
#pragma once

#include <algorithm>

#include "ssd_chunk_scan_bwd.cuh"

namespace mamba_ssm::kernels {

constexpr int kBlockDim = kPanel;  // channels of a block head

__host__ __device__ constexpr int tile_size(int columns) { return kChunk * columns; }

/// What the kernels of this path take from the host.
template <class T>
struct MmaPlan {
  StepSpace<float> steps;
  Segments segments = {};  // of the walk
  int64_t subsets = 0;     // of the block heads of a group, each with a block of its own per chunk
  bool vector_dx = false;
  float* D = nullptr;     // (heads, kBlockDim), 0 behind headdim
  T* states = nullptr;    // (slots, heads), before each chunk: tiles (kBlockDim, kStates)
  T* dstates = nullptr;   // likewise, behind each chunk
  float* ends = nullptr;  // (2, segment slots, heads): S behind, dS before a segment walked from 0
  float* end_decay = nullptr;  // likewise: what a segment leaves of the state before it
  float* dB = nullptr;  // (subsets, slots, ngroups, kChunk, dstate), with more than one subset
  float* dC = nullptr;  // likewise
};

/// How the threads of a block share the rows of tiles: eight threads per row, and so many rows at a
/// time.
template <class T, int kThreads>
struct TileCopy {
  static constexpr int kRows = kThreads / (kPanel / kTileVector);
  const T* source;  // the thread's vector of its first row
  int64_t pitch;
  int row, column;

  /// Of tokens from `token` on, of one head or group from column `first` on.
  __device__ TileCopy(int thread, const View<4>& v, int64_t b, int64_t token, int64_t head,
                      int64_t first)
      : pitch(v.stride[1]), row(thread / 8), column(thread % 8 * kTileVector) {
    source = static_cast<const T*>(v.data) + b * v.stride[0] + (token + row) * v.stride[1] +
             head * v.stride[2] + first + column;
  }

  /// Which of the thread's rows are there, a bit each.
  __device__ __forceinline__ int rows_of(uint64_t real) const {
    int rows = 0;
#pragma unroll
    for (int i = 0; i < kChunk / kRows; ++i) {
      rows |= static_cast<int>(real >> (row + i * kRows) & 1) << i;
    }
    return rows;
  }

  /// Copies a tile; zeros for rows that are not there, and behind the last of `columns`.
  __device__ __forceinline__ void copy(T* tile, const T* from, int rows, int columns) const {
    const int there = column < columns ? rows : 0;
    T* const target = tile + tile_at<kChunk>(row, column);
#pragma unroll
    for (int i = 0; i < kChunk / kRows; ++i) {
      copy_async(reinterpret_cast<Pack<T, kTileVector>*>(target + i * kRows * kPanel),
                 from + i * kRows * pitch, there >> i & 1);
    }
  }
};

/// The results of two neighboring products, rounded, as operand A of another.
struct RoundedTile {
  uint32_t a[4];
};
template <class T>
__device__ __forceinline__ RoundedTile round_tile(const float (&left)[4], const float (&right)[4]) {
  return {{round_pair<T>(left[0], left[1]), round_pair<T>(left[2], left[3]),
           round_pair<T>(right[0], right[1]), round_pair<T>(right[2], right[3])}};
}

/// Sums x over the rows r of a product's result, a lane holding columns 2c and 2c + 1 of two
/// neighboring ones. Lanes with r even end up with the sum of column summed_column().
__device__ __forceinline__ float sum_over_rows(const float (&x)[2][2]) {
  const int lane = threadIdx.x % kWarpSize;
  const bool second = lane & 16;
  const float keep0 = second ? x[1][0] : x[0][0];
  const float keep1 = second ? x[1][1] : x[0][1];
  const float pair0 = keep0 + __shfl_xor_sync(kAllLanes, second ? x[0][0] : x[1][0], 16);
  const float pair1 = keep1 + __shfl_xor_sync(kAllLanes, second ? x[0][1] : x[1][1], 16);
  const bool odd = lane & 8;
  const float sum = (odd ? pair1 : pair0) + __shfl_xor_sync(kAllLanes, odd ? pair0 : pair1, 8);
  return sum + __shfl_xor_sync(kAllLanes, sum, 4);
}
__device__ __forceinline__ int summed_column() {
  const int lane = threadIdx.x % kWarpSize;
  return lane / 16 * 8 + lane % 4 * 2 + lane / 8 % 2;
}

/// Sums x over the columns of a product's result: over the four lanes of a row.
__device__ __forceinline__ float sum_over_columns(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

/// The diagonal of a product of 16 rows and 16 columns: lanes for which has_diagonal() get element
/// lane / 4 in x, element lane / 4 + 8 in y.
__device__ __forceinline__ bool has_diagonal() { return lane_id() / 8 == lane_id() % 4; }
__device__ __forceinline__ float2 diagonal(const float (&left)[4], const float (&right)[4]) {
  const bool odd = lane_id() & 4;
  return make_float2(odd ? left[1] : left[0], odd ? right[3] : right[2]);
}

__device__ __forceinline__ float sum_over_warp(float x) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
}

// ---- States ------------------------------------------------------------------------------------

constexpr int kWalkWarps = 4;
constexpr int kWalkThreads = kWalkWarps * kWarpSize;

template <class T, int kStates>
struct WalkShared {
  struct Stage {
    T values[tile_size(kBlockDim)];  // x or dy: (token, p)
    T matrix[tile_size(kStates)];    // B or C: (token, n)
    float step[kChunk], decay[kChunk];
    ChunkMasks masks, next_masks;  // of this chunk and of the one walked through next
  };
  Stage stage[2];
  T image[kBlockDim * kStates];  // the state, rounded
  float factor[kWalkWarps][kChunk];
};

/// A block walks through one segment of one block head in one direction. With kEnds it leaves only
/// what a segment does to a state of 0, for the segments behind it.
template <class T, int kStates, bool kEnds>
__global__ void __launch_bounds__(kWalkThreads, kStates > kPanel ? 3 : 5)
    walk_states(const SsdChunkScanParams p, const MmaPlan<T> plan) {
  extern __shared__ float4 shared_base[];
  auto& shared = *reinterpret_cast<WalkShared<T, kStates>*>(shared_base);
  constexpr int kPanels = kStates / kPanel;
  constexpr int kTiles = kPanels;  // of 16 rows: a warp has so many, and one panel of columns
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int row = lane / 4;
  const int pair = lane % 4 * 2;
  const int first_row = warp / kPanels * (16 * kTiles);
  const int panel = warp % kPanels;

  const StepSpace<float>& steps = plan.steps;
  const bool backwards = blockIdx.x % 2;
  const int64_t block_head = blockIdx.x / 2 % steps.heads;
  const int64_t segment_slot = blockIdx.x / 2 / steps.heads;
  const Segment segment = segment_of(p, plan.segments, segment_slot);
  if (!segment.exists || (kEnds && (backwards ? segment.first : segment.last))) return;
  const int64_t head = block_head / steps.head_blocks;
  const int64_t channel = block_head % steps.head_blocks * kBlockDim;
  const int64_t group = head / (p.nheads / p.ngroups);
  const int64_t first_slot = steps.slot_of(p, segment.sequence, segment.begin);
  const int chunks = static_cast<int>(ceil_div(segment.end - segment.begin, kChunk));

  float state[kTiles][8][4];
  const auto for_state = [&](auto f) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          f(state[m][n][e], channel + first_row + 16 * m + e / 2 * 8 + row,
            panel * kPanel + 8 * n + pair + e % 2);
        }
      }
    }
  };
  const View<4>& start = backwards ? p.dfinal_states : p.initial_states;
  const bool starts =
      !kEnds && given(start) && (backwards || has_initial_state(p, segment.sequence));
  for_state([&](float& s, int64_t channel, int64_t n) {
    s = 0;
    if (starts && channel < p.headdim && n < p.dstate) {
      s = load_as<float>(start.data, start.dtype,
                         segment.sequence * start.stride[0] + head * start.stride[1] +
                             channel * start.stride[2] + n * start.stride[3]);
    }
  });
  // The walked segments between the sequence's end and this one, that end first.
  const auto end_of = [&](int64_t slot) {
    return ((backwards ? plan.segments.slots : 0) + slot) * steps.heads + block_head;
  };
  constexpr int kStateSize = kBlockDim * kStates;
  if (!kEnds && plan.segments.per_sequence > 1) {
    const Sequence sequence = sequence_of(p, segment.sequence);
    const int64_t length = plan.segments.length;
    const int64_t index = (segment.begin - sequence.begin) / length;
    const int64_t count = ceil_div(sequence.end - sequence.begin, length);
    const int64_t before = backwards ? count - 1 - index : index;
    for (int64_t i = 0; i < before; ++i) {
      const int64_t end = end_of(segment_slot + (backwards ? before - i : i - before));
      const float decay = plan.end_decay[end];
      const float4* const source =
          reinterpret_cast<const float4*>(plan.ends + end * kStateSize) + threadIdx.x;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const float4 x = source[(m * 8 + n) * kWalkThreads];
          float(&s)[4] = state[m][n];
          s[0] = fmaf(decay, s[0], x.x);
          s[1] = fmaf(decay, s[1], x.y);
          s[2] = fmaf(decay, s[2], x.z);
          s[3] = fmaf(decay, s[3], x.w);
        }
      }
    }
  }

  const int channels = static_cast<int>(min(p.headdim - channel, int64_t{kBlockDim}));
  const int columns = static_cast<int>(p.dstate);
  const int64_t first_chunk = backwards ? chunks - 1 : 0;
  const int64_t first_token = segment.begin + first_chunk * kChunk;
  const int ahead = backwards ? -1 : 1;
  const TileCopy<T, kWalkThreads> values(threadIdx.x, backwards ? p.dout : p.x, segment.row,
                                         first_token, head, channel);
  const TileCopy<T, kWalkThreads> matrix(threadIdx.x, backwards ? p.C : p.B, segment.row,
                                         first_token, group, 0);
  const T* next_values = values.source;
  const T* next_matrix = matrix.source;
  // Steps, decays and masks: 16 bytes for each of the first threads.
  constexpr int kStepPacks = kChunk / 4;
  const int64_t first_walked = first_slot + first_chunk;
  const bool has_masks = threadIdx.x >= 2 * kStepPacks;
  const int mask_index = has_masks ? static_cast<int>(threadIdx.x) - 2 * kStepPacks : 0;
  const float* next_steps =
      has_masks ? reinterpret_cast<const float*>(steps.masks + first_walked + mask_index * ahead)
                : (threadIdx.x < kStepPacks ? steps.step : steps.decay) +
                      (first_walked * p.nheads + head) * kChunk + threadIdx.x % kStepPacks * 4;
  const int64_t step_pitch =
      ahead * (has_masks ? int64_t{sizeof(ChunkMasks) / sizeof(float)} : p.nheads * kChunk);
  const auto load = [&](int k, uint64_t real) {
    if (k < chunks) {
      auto& stage = shared.stage[k % 2];
      const int rows = values.rows_of(real);
      values.copy(stage.values, next_values, rows, channels);
#pragma unroll
      for (int n = 0; n < kPanels; ++n) {
        matrix.copy(stage.matrix + n * tile_size(kPanel), next_matrix + n * kPanel, rows,
                    columns - n * kPanel);
      }
      if (threadIdx.x < 2 * kStepPacks + 2) {
        copy_async(reinterpret_cast<Pack<float, 4>*>(stage.step) + threadIdx.x, next_steps,
                   k + mask_index < chunks);
      }
      next_steps += step_pitch;
      next_values += ahead * kChunk * values.pitch;
      next_matrix += ahead * kChunk * matrix.pitch;
    }
    commit_copies();
  };
  T* target = (backwards ? plan.dstates : plan.states) +
              ((first_slot + first_chunk) * steps.heads + block_head) * kStateSize +
              panel * tile_size(kPanel) + first_row * kPanel + lane * kTileVector;

  float log_decay = 0;  // of the segment; -infinity across a reset
  load(0, chunks > 0 ? steps.masks[first_walked].real : 0);
#pragma unroll 1
  for (int k = 0; k < chunks; ++k) {
    wait_copies<0>();
    __syncthreads();
    const auto& stage = shared.stage[k % 2];
    load(k + 1, stage.next_masks.real);
    const uint64_t resets = stage.masks.resets;
    const float last_decay = stage.decay[kChunk - 1];
    {
      const int first_reset = stage.masks.first_reset();
      const int last_reset = stage.masks.last_reset();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int t = lane + i * kWarpSize;
        const float decay = stage.decay[t];
        float factor = 0;
        if (backwards) {
          if (t < first_reset) factor = fast_exp2(decay);
        } else if (t >= last_reset) {
          factor = fast_exp2(last_decay - decay) * stage.step[t];
        }
        shared.factor[warp][t] = factor;
      }
    }
    if constexpr (kEnds) {
      log_decay += resets == 0 ? last_decay : -INFINITY;
    } else {
      const int own = recomputed(lane);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
          store_a<kBlockDim>(round_tile<T>(state[m][n], state[m][n + 1]).a, shared.image,
                             first_row + 16 * m, panel * kPanel + 8 * n, own);
        }
      }
    }
    __syncwarp();
    if constexpr (!kEnds) {
      const T* const source = shared.image + panel * tile_size(kPanel) + first_row * kPanel;
#pragma unroll
      for (int i = 0; i < 4 * kTiles; ++i) {
        constexpr int kWarpVectors = kWarpSize * kTileVector;
        store_vector(target + i * kWarpVectors,
                     load_vector(source + i * kWarpVectors + lane * kTileVector));
      }
      target += ahead * steps.heads * kStateSize;
    }

    const float passing = resets == 0 ? fast_exp2(last_decay) : 0.0f;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) state[m][n][e] *= passing;
      }
    }
    // Operands are loaded one step of 16 tokens ahead.
    const int own = recomputed(lane);
    uint32_t a[2][kTiles][4], b[2][4][4];
    const auto load_operands = [&](int t) {
      const int i = t / 16 % 2;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        load_a_transposed<kChunk>(a[i][m], stage.values, t, first_row + 16 * m, own);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        load_b<kChunk>(b[i][n], stage.matrix, t, panel * kPanel + 16 * n, own);
      }
    };
    load_operands(0);
#pragma unroll
    for (int t = 0; t < kChunk; t += 16) {
      if (t + 16 < kChunk) load_operands(t + 16);
      const int i = t / 16 % 2;
      const float2 low = *reinterpret_cast<const float2*>(&shared.factor[warp][t + pair]);
      const float2 high = *reinterpret_cast<const float2*>(&shared.factor[warp][t + 8 + pair]);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float2 x = unpack_pair<T>(a[i][m][e]);
          const float2 f = e < 2 ? low : high;
          a[i][m][e] = round_pair<T>(x.x * f.x, x.y * f.y);
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          multiply_add<T>(state[m][2 * n], a[i][m], b[i][n][0], b[i][n][1]);
          multiply_add<T>(state[m][2 * n + 1], a[i][m], b[i][n][2], b[i][n][3]);
        }
      }
    }
  }
  wait_copies<0>();

  if constexpr (kEnds) {
    const int64_t end = end_of(segment_slot);
    float4* const target = reinterpret_cast<float4*>(plan.ends + end * kStateSize) + threadIdx.x;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float(&s)[4] = state[m][n];
        target[(m * 8 + n) * kWalkThreads] = make_float4(s[0], s[1], s[2], s[3]);
      }
    }
    if (threadIdx.x == 0) plan.end_decay[end] = fast_exp2(log_decay);
  } else if (backwards && segment.first && given(p.dinitial_states) &&
             has_initial_state(p, segment.sequence)) {
    const View<4>& v = p.dinitial_states;
    for_state([&](float s, int64_t channel, int64_t n) {
      if (channel >= p.headdim || n >= p.dstate) return;
      store_as(v.data, v.dtype,
               segment.sequence * v.stride[0] + head * v.stride[1] + channel * v.stride[2] +
                   n * v.stride[3],
               s);
    });
  }
}

// ---- Gradients of a chunk ----------------------------------------------------------------------
//
// Twelve warps. Warps 0-3 have the products between tokens: 16 tokens j each, C B^T, its gradient
// and G transposed, so that M^T comes out of one product as an operand of the next. Warps 4-7 have
// dC, warps 8-11 dB, each 32 tokens and half of the states, in registers through all block heads.

constexpr int kPairWarps = 4;
constexpr int kStateThreads = 8 * kWarpSize;  // of dC and dB
constexpr int kGradientThreads = kPairWarps * kWarpSize + kStateThreads;

template <class T, int kStates>
struct GradientShared {
  struct Stage {
    T x[tile_size(kBlockDim)];      // (token, p)
    T dy[tile_size(kBlockDim)];     // likewise
    T state[kBlockDim * kStates];   // (p, n)
    T dstate[kBlockDim * kStates];  // likewise
    float step[kChunk], decay[kChunk], D[kBlockDim];
  };
  /// What the warps found out about one block head.
  struct Sums {
    float rows[kPairWarps][kChunk];  // row sums of W, one part per 16 columns
    float columns[kChunk];           // column sums of W
    float entering[2][kChunk];       // per half of the states
    float earlier[2][kChunk];
    float input[kChunk];
    float dD[kBlockDim];
    float passing[kPairWarps];
  };
  Stage stage[2];
  T B[tile_size(kStates)], C[tile_size(kStates)];  // (token, n)
  T dx[tile_size(kBlockDim)];
  float4 CB[8][kPairWarps * kWarpSize];  // the products of each thread of the pair warps
  Sums sums[2];
};

/// dC or dB of one block head, 32 tokens and half of the states of them: acc += factor A S, and
/// <A S, M> per token, with A in registers.
template <class T, int kStates>
__device__ __forceinline__ void add_state_term(const uint32_t (&a)[2][4][4], const T* state,
                                               const T* matrix, int first_row, int half_states,
                                               const float (&factor)[2][2],
                                               float (&acc)[2][kStates / 16][4],
                                               float (&dot)[2][2]) {
  // With two panels of states, the half is one of them.
  const int first_state = kStates > kPanel ? 0 : half_states * (kStates / 2);
  if (kStates > kPanel) {
    state += half_states * tile_size(kPanel);
    matrix += half_states * tile_size(kPanel);
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) dot[m][0] = dot[m][1] = 0;
#pragma unroll
  for (int n = 0; n < kStates / 16; n += 2) {
    const int lane = recomputed(lane_id());
    float term[2][2][4] = {};
#pragma unroll
    for (int k = 0; k < kBlockDim / 16; ++k) {
      uint32_t b[4];
      load_b<kBlockDim>(b, state, 16 * k, first_state + 8 * n, lane);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        multiply_add<T>(term[m][0], a[m][k], b[0], b[1]);
        multiply_add<T>(term[m][1], a[m][k], b[2], b[3]);
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      uint32_t own[4];  // M where the terms are
      load_a<kChunk>(own, matrix, first_row + 16 * m, first_state + 8 * n, lane);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 other = unpack_pair<T>(own[2 * i + half]);
          const float x = term[m][i][2 * half];
          const float y = term[m][i][2 * half + 1];
          float(&sum)[4] = acc[m][n + i];
          dot[m][half] = fmaf(x, other.x, fmaf(y, other.y, dot[m][half]));
          sum[2 * half] = fmaf(factor[m][half], x, sum[2 * half]);
          sum[2 * half + 1] = fmaf(factor[m][half], y, sum[2 * half + 1]);
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      dot[m][half] = factor[m][half] * sum_over_columns(dot[m][half]);
    }
  }
}

template <class T, int kStates>
__global__ void __launch_bounds__(kGradientThreads, 1)
    chunk_gradients(const SsdChunkScanParams p, const MmaPlan<T> plan) {
  extern __shared__ float4 shared_base[];
  auto& shared = *reinterpret_cast<GradientShared<T, kStates>*>(shared_base);
  const StepSpace<float>& steps = plan.steps;
  const int64_t subset = blockIdx.x % plan.subsets;
  const int64_t group = blockIdx.x / plan.subsets % p.ngroups;
  const int64_t slot = blockIdx.x / plan.subsets / p.ngroups;
  const int64_t group_heads = steps.heads / p.ngroups;
  const int64_t first_head = group * group_heads + group_heads * subset / plan.subsets;
  const int heads = static_cast<int>(group * group_heads +
                                     group_heads * (subset + 1) / plan.subsets - first_head);
  const Segment chunk = segment_of(p, steps.chunks, slot);
  if (!chunk.exists || chunk.begin >= chunk.end) return;
  const int tokens = static_cast<int>(chunk.end - chunk.begin);
  const ChunkMasks masks = steps.masks[slot];

  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int row = lane / 4;
  const int pair = lane % 4 * 2;
  const int first_row = warp % 4 * 16;  // of what a warp has 16 rows of
  const int thread = static_cast<int>(threadIdx.x) - kPairWarps * kWarpSize;  // of dC and dB
  constexpr int kVectors = kBlockDim / kTileVector;
  constexpr int kStateSize = kBlockDim * kStates;

  // All copies are made by the warps of dC and dB; the others have more to compute.
  const int head_blocks = static_cast<int>(steps.head_blocks);
  const int64_t head = first_head / head_blocks;
  const int block = static_cast<int>(first_head % head_blocks);
  const TileCopy<T, kStateThreads> x_copy(thread, p.x, chunk.row, chunk.begin, head,
                                          block * kBlockDim);
  const TileCopy<T, kStateThreads> dy_copy(thread, p.dout, chunk.row, chunk.begin, head,
                                           block * kBlockDim);
  const int rows = x_copy.rows_of(masks.real);
  const T* next_x = x_copy.source;
  const T* next_dy = dy_copy.source;
  const int64_t first_tile = (slot * steps.heads + first_head) * kStateSize + thread * kTileVector;
  const T* next_state = plan.states + first_tile;
  const T* next_dstate = plan.dstates + first_tile;
  constexpr int kPacks = kChunk / 4;
  const float* next_step = nullptr;
  if (thread < 3 * kPacks) {
    next_step = (thread < 2 * kPacks ? (thread < kPacks ? steps.step : steps.decay) +
                                           (slot * p.nheads + head) * kChunk
                                     : plan.D + first_head * kBlockDim) +
                thread % kPacks * 4;
  }
  int next_block = block;
  const auto load = [&](int k) {
    if (k < heads) {
      auto& stage = shared.stage[k % 2];
      const int channels = static_cast<int>(p.headdim) - next_block * kBlockDim;  // of the block
      x_copy.copy(stage.x, next_x, rows, channels);
      dy_copy.copy(stage.dy, next_dy, rows, channels);
#pragma unroll
      for (int i = 0; i < kStateSize; i += kStateThreads * kTileVector) {
        const int at = i + thread * kTileVector;
        copy_async(reinterpret_cast<Pack<T, kTileVector>*>(stage.state + at), next_state + i);
        copy_async(reinterpret_cast<Pack<T, kTileVector>*>(stage.dstate + at), next_dstate + i);
      }
      if (thread < 3 * kPacks) {
        copy_async(reinterpret_cast<Pack<float, 4>*>(stage.step) + thread, next_step);
      }
      next_state += kStateSize;
      next_dstate += kStateSize;
      const bool next_head = ++next_block == head_blocks;
      if (next_head) next_block = 0;
      const int64_t back = int64_t{head_blocks - 1} * kBlockDim;
      next_x += next_head ? p.x.stride[2] - back : kBlockDim;
      next_dy += next_head ? p.dout.stride[2] - back : kBlockDim;
      if (next_head || thread >= 2 * kPacks) next_step += kChunk;
    }
    commit_copies();
  };
  // The sums of block head k go to the workspace.
  const auto store_sums = [&](int k) {
    const auto& sums = shared.sums[k % 2];
    const int64_t out = slot * steps.heads + first_head + k;
    const int i = thread % kChunk;
    switch (thread / kChunk) {
      case 0: {
        float x = (sums.entering[0][i] + sums.entering[1][i]) - sums.columns[i];
        for (int part = 0; part < kPairWarps; ++part) x += sums.rows[part][i];
        steps.later[out * kChunk + i] = x;
        break;
      }
      case 1:
        steps.earlier[out * kChunk + i] = sums.earlier[0][i] + sums.earlier[1][i];
        break;
      case 2:
        steps.input[out * kChunk + i] = sums.input[i];
        if (i == 0) {
          steps.passing[out] =
              (sums.passing[0] + sums.passing[1]) + (sums.passing[2] + sums.passing[3]);
        }
        break;
      default:
        if (given(p.dD)) {
          steps.dD[out * kBlockDim + i] = sums.dD[i];
        }
    }
  };

  if (thread >= 0) {
    const TileCopy<T, kStateThreads> B(thread, p.B, chunk.row, chunk.begin, group, 0);
    const TileCopy<T, kStateThreads> C(thread, p.C, chunk.row, chunk.begin, group, 0);
#pragma unroll
    for (int n = 0; n < kStates; n += kPanel) {
      const int columns = static_cast<int>(p.dstate) - n;
      B.copy(shared.B + tile_size(n), B.source + n, rows, columns);
      C.copy(shared.C + tile_size(n), C.source + n, rows, columns);
    }
    commit_copies();
    load(0);
    wait_copies<1>();
  }
  __syncthreads();

  if (warp < kPairWarps) {
    for (int i = lane; i < first_row; i += kWarpSize) {  // W is 0 there
      shared.sums[0].rows[warp][i] = shared.sums[1].rows[warp][i] = 0;
    }
    int sees[2];  // tokens i from j on that see token j
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = first_row + 8 * half + row;
      sees[half] = masks.next_reset(j) - j;
    }
    T* const dx_tile = shared.dx;
    const int dx_row = first_row + lane / kVectors;
    const int dx_column = lane % kVectors * kTileVector;
    T* dx = static_cast<T*>(p.dx.data) + chunk.row * p.dx.stride[0] +
            (chunk.begin + dx_row) * p.dx.stride[1] + head * p.dx.stride[2] +
            (block * kBlockDim + dx_column) * p.dx.stride[3];
    int dx_block = block;
    {
      float cb[8][4] = {};  // B C^T (j, i)
#pragma unroll
      for (int n = 0; n < kStates / 16; ++n) {
        uint32_t a[4];
        load_a<kChunk>(a, shared.B, first_row, 16 * n);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t b[4];
          load_b_transposed<kChunk>(b, shared.C, 16 * i, 16 * n);
          multiply_add<T>(cb[2 * i], a, b[0], b[1]);
          multiply_add<T>(cb[2 * i + 1], a, b[2], b[3]);
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        shared.CB[i][threadIdx.x] = make_float4(cb[i][0], cb[i][1], cb[i][2], cb[i][3]);
      }
    }
    float dcb[8][4] = {};
#pragma unroll 1
    for (int k = 0; k < heads; ++k) {
      wait_copies<0>();
      __syncthreads();
      const auto& stage = shared.stage[k % 2];
      auto& sums = shared.sums[k % 2];
      float decay[2], step[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        decay[half] = stage.decay[first_row + 8 * half + row];
        step[half] = stage.step[first_row + 8 * half + row];
      }
      uint32_t x[4][4];  // (j, p)
#pragma unroll
      for (int c = 0; c < 4; ++c) load_a<kChunk>(x[c], stage.x, first_row, 16 * c);

      uint32_t m[4][4];  // M^T (j, i)
      float columns[2] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < warp) continue;
        const int own = recomputed(lane);
        float g[2][4] = {};  // G^T (j, i)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          uint32_t b[4];
          load_b_transposed<kChunk>(b, stage.dy, 16 * i, 16 * c, own);
          multiply_add<T>(g[0], x[c], b[0], b[1]);
          multiply_add<T>(g[1], x[c], b[2], b[3]);
        }
        float rows[2][2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int column = 16 * i + 8 * n + pair;
          const float2 at = *reinterpret_cast<const float2*>(&stage.decay[column]);
          const float4 products = shared.CB[2 * i + n][threadIdx.x];
          float masked[4], w[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int half = e / 2;
            const unsigned distance = column + e % 2 - (first_row + 8 * half + row);
            const float left = fast_exp2((e % 2 ? at.y : at.x) - decay[half]);
            const float weight = distance < static_cast<unsigned>(sees[half]) ? left : 0.0f;
            const float product = e == 0   ? products.x
                                  : e == 1 ? products.y
                                  : e == 2 ? products.z
                                           : products.w;
            masked[e] = product * weight;
            const float gradient = g[n][e] * (weight * step[half]);
            dcb[2 * i + n][e] += gradient;
            w[e] = distance == 0 ? 0.0f : gradient * product;  // nothing decays there
            columns[half] += w[e];
          }
          rows[n][0] = w[0] + w[2];
          rows[n][1] = w[1] + w[3];
          m[i][2 * n] = round_pair<T>(masked[0], masked[1]);
          m[i][2 * n + 1] = round_pair<T>(masked[2], masked[3]);
        }
        const float sum = sum_over_rows(rows);
        if (row % 2 == 0) sums.rows[warp][16 * i + summed_column()] = sum;
      }

      float acc[8][4] = {};  // dx without d and D
#pragma unroll
      for (int n = 0; n < kStates / 16; ++n) {
        const int own = recomputed(lane);
        uint32_t a[4];
        load_a<kChunk>(a, shared.B, first_row, 16 * n, own);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          uint32_t b[4];
          load_b_transposed<kBlockDim>(b, stage.dstate, 16 * c, 16 * n, own);
          multiply_add<T>(acc[2 * c], a, b[0], b[1]);
          multiply_add<T>(acc[2 * c + 1], a, b[2], b[3]);
        }
      }
      const float last_decay = stage.decay[kChunk - 1];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float leaving = first_row + 8 * half + row >= masks.last_reset()
                                  ? fast_exp2(last_decay - decay[half])
                                  : 0.0f;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          acc[c][2 * half] *= leaving;
          acc[c][2 * half + 1] *= leaving;
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < warp) continue;
        const int own = recomputed(lane);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          uint32_t b[4];
          load_b<kChunk>(b, stage.dy, 16 * i, 16 * c, own);
          multiply_add<T>(acc[2 * c], m[i], b[0], b[1]);
          multiply_add<T>(acc[2 * c + 1], m[i], b[2], b[3]);
        }
      }

      // x[c][2 * n + half] and acc[2 * c + n][2 * half ..] have the same rows and columns.
      float input[2] = {};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 value = unpack_pair<T>(x[c][i]);
          float(&a)[4] = acc[2 * c + i / 2];
          const int half = i % 2;
          input[half] = fmaf(a[2 * half], value.x, fmaf(a[2 * half + 1], value.y, input[half]));
          a[2 * half] *= step[half];
          a[2 * half + 1] *= step[half];
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        input[half] = sum_over_columns(input[half]);
        columns[half] = sum_over_columns(columns[half]);
        if (lane % 4 == 0) {
          sums.input[first_row + 8 * half + row] = input[half];
          sums.columns[first_row + 8 * half + row] = columns[half];
        }
      }
      if (given(p.D)) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          uint32_t dy[4];
          load_a<kChunk>(dy, stage.dy, first_row, 16 * c);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 value = unpack_pair<T>(dy[i]);
            const float2 D = *reinterpret_cast<const float2*>(&stage.D[16 * c + i / 2 * 8 + pair]);
            float(&a)[4] = acc[2 * c + i / 2];
            a[i % 2 * 2] = fmaf(D.x, value.x, a[i % 2 * 2]);
            a[i % 2 * 2 + 1] = fmaf(D.y, value.y, a[i % 2 * 2 + 1]);
          }
        }
      }
      if (given(p.dx)) {
        const int channels = static_cast<int>(p.headdim) - dx_block * kBlockDim;
        const int own = recomputed(lane);
#pragma unroll
        for (int c = 0; c < 8; c += 2) {
          store_a<kChunk>(round_tile<T>(acc[c], acc[c + 1]).a, dx_tile, first_row, 8 * c, own);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 16 * kVectors; i += kWarpSize) {
          const int t = dx_row + i / kVectors;
          const T* const source = dx_tile + tile_at<kChunk>(t, dx_column);
          if (t >= tokens) continue;
          if (plan.vector_dx) {
            if (dx_column < channels)
              store_vector(dx + i / kVectors * p.dx.stride[1], load_vector(source));
          } else {
#pragma unroll 1
            for (int e = 0; e < kTileVector && dx_column + e < channels; ++e) {
              dx[i / kVectors * p.dx.stride[1] + e * p.dx.stride[3]] = source[e];
            }
          }
        }
        __syncwarp();
        const bool next_head = ++dx_block == head_blocks;
        if (next_head) dx_block = 0;
        dx += next_head ? p.dx.stride[2] - int64_t{head_blocks - 1} * kBlockDim * p.dx.stride[3]
                        : kBlockDim * p.dx.stride[3];
      }
    }
    __syncthreads();
    T* const dcb_tile = shared.stage[0].x;  // (j, i)
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      store_a<kChunk>(round_tile<T>(dcb[i], dcb[i + 1]).a, dcb_tile, first_row, 8 * i);
    }
    __syncthreads();
    return;
  }

  const bool of_C = warp < 2 * kPairWarps;
  const int first_token = warp % 4 / 2 * 32;
  const int half_states = warp % 2;
  const int first_state = half_states * (kStates / 2);
  float acc[2][kStates / 16][4] = {};
#pragma unroll 1
  for (int k = 0; k < heads; ++k) {
    wait_copies<0>();
    __syncthreads();
    load(k + 1);
    if (k > 0) store_sums(k - 1);
    const auto& stage = shared.stage[k % 2];
    auto& sums = shared.sums[k % 2];
    const int own = recomputed(lane);
    float factor[2][2];
    uint32_t a[2][4][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = first_token + 16 * m + 8 * half + own / 4;
        const float decay = stage.decay[t];
        factor[m][half] = 0;
        if (of_C) {
          if (t < masks.first_reset()) factor[m][half] = fast_exp2(decay);
        } else if (t >= masks.last_reset()) {
          factor[m][half] = fast_exp2(stage.decay[kChunk - 1] - decay) * stage.step[t];
        }
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        load_a<kChunk>(a[m][c], of_C ? stage.dy : stage.x, first_token + 16 * m, 16 * c, own);
      }
    }
    float dot[2][2];
    add_state_term<T, kStates>(a, of_C ? stage.state : stage.dstate, of_C ? shared.C : shared.B,
                               first_token, half_states, factor, acc, dot);
    if (lane % 4 == 0) {
      float* const target = (of_C ? sums.entering : sums.earlier)[half_states] + first_token + row;
      target[0] = dot[0][0];
      target[8] = dot[0][1];
      target[16] = dot[1][0];
      target[24] = dot[1][1];
    }
    // The other sums are diagonals of products: dD = diag(x^T dy), <S, dS> = trace(S dS^T).
    const int own_lane = recomputed(lane);
    float left[4] = {}, right[4] = {};
    if (of_C) {
      if (given(p.dD)) {
#pragma unroll
        for (int t = 0; t < kChunk; t += 16) {
          uint32_t x[4], dy[4];
          load_a_transposed<kChunk>(x, stage.x, t, first_row, own_lane);
          load_b<kChunk>(dy, stage.dy, t, first_row, own_lane);
          multiply_add<T>(left, x, dy[0], dy[1]);
          multiply_add<T>(right, x, dy[2], dy[3]);
        }
        const float2 dD = diagonal(left, right);
        if (has_diagonal()) {
          sums.dD[first_row + row] = dD.x;
          sums.dD[first_row + 8 + row] = dD.y;
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < kStates; n += 16) {
        uint32_t s[4], ds[4];
        load_a<kBlockDim>(s, stage.state, first_row, n, own_lane);
        load_b_transposed<kBlockDim>(ds, stage.dstate, first_row, n, own_lane);
        multiply_add<T>(left, s, ds[0], ds[1]);
        multiply_add<T>(right, s, ds[2], ds[3]);
      }
      const float2 dots = diagonal(left, right);
      const float sum = sum_over_warp(has_diagonal() ? dots.x + dots.y : 0.0f);
      if (lane == 0) {
        const float passing = masks.resets == 0 ? fast_exp2(stage.decay[kChunk - 1]) : 0.0f;
        sums.passing[warp % 4] = passing * sum;
      }
    }
  }
  wait_copies<0>();
  __syncthreads();
  store_sums(heads - 1);
  __syncthreads();
  const T* const dcb_tile = shared.stage[0].x;  // (j, i)
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    uint32_t a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (of_C) {
        load_a_transposed<kChunk>(a[m], dcb_tile, 16 * c, first_token + 16 * m);
      } else {
        load_a<kChunk>(a[m], dcb_tile, first_token + 16 * m, 16 * c);
      }
    }
#pragma unroll
    for (int n = 0; n < kStates / 16; n += 2) {
      uint32_t b[4];
      load_b<kChunk>(b, of_C ? shared.B : shared.C, 16 * c, first_state + 8 * n);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        multiply_add<T>(acc[m][n], a[m], b[0], b[1]);
        multiply_add<T>(acc[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
  const View<4>& v = of_C ? p.dC : p.dB;
  if (!given(v)) return;
  float* const partial = of_C ? plan.dC : plan.dB;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = first_token + 16 * m + 8 * half + row;
      if (t >= tokens) continue;
      const int64_t out =
          chunk.row * v.stride[0] + (chunk.begin + t) * v.stride[1] + group * v.stride[2];
      const int64_t partial_out =
          (((subset * steps.chunks.slots + slot) * p.ngroups + group) * kChunk + t) * p.dstate;
#pragma unroll
      for (int n = 0; n < kStates / 16; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = first_state + 8 * n + pair + e;
          if (column >= p.dstate) continue;
          const float value = acc[m][n][2 * half + e];
          if (plan.subsets > 1) {
            partial[partial_out + column] = value;
          } else {
            static_cast<T*>(v.data)[out + column * v.stride[3]] = from_accumulate<T>(value);
          }
        }
      }
    }
  }
}

}  // namespace mamba_ssm::kernels
