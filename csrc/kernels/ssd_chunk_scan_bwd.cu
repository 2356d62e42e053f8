// SSD chunk scan, backward.
//
// With c_t the sum of log decays d A in a chunk, h the state before the chunk and dh its gradient
// behind it, dy_i the gradient of y_i:
//
//   dx_j  = d_j (sum_{i >= j} exp(c_i - c_j) (C_i . B_j) dy_i + exp(c_last - c_j) dh B_j) + D dy_j
//   dC_i  = sum_{j <= i} exp(c_i - c_j) d_j (dy_i . x_j) B_j + exp(c_i) dy_i h
//   dB_j  = sum_{i >= j} exp(c_i - c_j) d_j (dy_i . x_j) C_i + exp(c_last - c_j) d_j x_j dh
//   dh_before = exp(c_last) dh + sum_i exp(c_i) dy_i C_i^T
//
// The log decay of token t lies between every pair j < t <= i, and its gradient is the sum of what
// passes through it: pairs of tokens, tokens i and h, tokens j and dh, h and dh. The pairs are the
// sum over tokens >= t of row sums less column sums, where pairs on one side of t cancel: both are
// sums of the same unrounded numbers. The others are summed as they stand.
//
// Both paths (ssd_chunk_scan_bwd_mma.cuh, ssd_chunk_scan_bwd_plain.cuh) run
//   step_chunks      steps and decays of all chunks
//   walk_states      h before and dh behind every chunk
//   chunk_gradients  dx, dB, dC, and sums per token for the decays
//   step_gradients   from these sums to ddt; dA and ddt_bias per chunk
//   sum_parameters   dA, ddt_bias and dD over all chunks; sum_matrices: dB and dC over subsets
// With z, y is computed once more and gate_gradients makes dy and dz beforehand.
#pragma nv_diag_suppress 177  // float32 and float64 have no use for the tensor-core path
#include "launch.cuh"
#include "ssd_chunk_scan_bwd_mma.cuh"
#include "ssd_chunk_scan_bwd_plain.cuh"

namespace mamba_ssm::kernels {
namespace {

// ---- z -----------------------------------------------------------------------------------------

constexpr int kElementThreads = 256;

/// Calls f(head, column) for a thread's share of a token's row (heads, width).
template <class F>
__device__ __forceinline__ void for_row(int64_t heads, int64_t width, F f) {
  int64_t head = threadIdx.x / width;
  int64_t column = threadIdx.x % width;
  const int64_t heads_ahead = kElementThreads / width;
  const int64_t columns_ahead = kElementThreads % width;
  while (head < heads) {
    f(head, column);
    head += heads_ahead;
    column += columns_ahead;
    if (column >= width) {
      column -= width;
      ++head;
    }
  }
}

/// dy = dout silu(z) and dz = dout y silu'(z). y is dense. A block per token.
template <class T>
__global__ void __launch_bounds__(kElementThreads)
    gate_gradients(const SsdChunkScanParams p, const View<4> y, const View<4> dy) {
  using Acc = Accumulate<T>;
  const int64_t b = blockIdx.x / p.seqlen;
  const int64_t t = blockIdx.x % p.seqlen;
  const bool padding = p.marks != nullptr && p.marks[b * p.seqlen + t] == kPadding;
  for_row(p.nheads, p.headdim, [&](int64_t head, int64_t channel) {
    const auto at = [&](const View<4>& v) -> T& {
      return static_cast<T*>(
          v.data)[b * v.stride[0] + t * v.stride[1] + head * v.stride[2] + channel * v.stride[3]];
    };
    const Acc gradient = to_accumulate(at(p.dout));
    const Acc z = to_accumulate(at(p.z));
    at(dy) = from_accumulate<T>(gradient * silu(z));
    if (given(p.dz)) {
      at(p.dz) =
          from_accumulate<T>(padding ? Acc(0) : gradient * to_accumulate(at(y)) * silu_gradient(z));
    }
  });
}

/// Copies (batch, seqlen, heads, columns) into rows that tiles can be copied from, `target`, and
/// fills these up with zeros. A block per token.
template <class T>
__global__ void __launch_bounds__(kElementThreads)
    copy_rows(const View<4> source, const View<4> target, int64_t seqlen, int64_t heads,
              int64_t columns) {
  const int64_t b = blockIdx.x / seqlen;
  const int64_t t = blockIdx.x % seqlen;
  for_row(heads, target.stride[2], [&](int64_t head, int64_t column) {
    const auto at = [&](const View<4>& v) -> T& {
      return static_cast<T*>(
          v.data)[b * v.stride[0] + t * v.stride[1] + head * v.stride[2] + column * v.stride[3]];
    };
    at(target) = column < columns ? at(source) : T(0.0f);
  });
}

// ---- Steps -------------------------------------------------------------------------------------

constexpr int kStepWarps = 8;
constexpr int kStepThreads = kStepWarps * kWarpSize;

/// sum_up_tokens, token by token, with what rounding took from each sum (Knuth's two-sum). Without
/// it, tokens behind one that forgets nearly everything would lose digits of what they remember.
__device__ inline void sum_up_exactly(const double (&x)[2], double (&sum)[2], double (&rest)[2]) {
  const int lane = threadIdx.x % kWarpSize;
  sum[0] = sum[1] = rest[0] = rest[1] = 0;
  for (int t = 0; t < kChunk; ++t) {
    const double next = __shfl_sync(kAllLanes, t % 2 == 0 ? x[0] : x[1], t / 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (t > 2 * lane + i) continue;
      const double total = sum[i] + next;
      const double added = total - sum[i];
      rest[i] += (sum[i] - (total - added)) + (next - added);
      sum[i] = total;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!isfinite(sum[i])) rest[i] = 0;
  }
}

/// A warp per chunk and head; lane l has tokens 2l and 2l + 1.
template <class N>
__global__ void __launch_bounds__(kStepThreads)
    step_chunks(const SsdChunkScanParams p, const StepSpace<N> space) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t index = int64_t{blockIdx.x} * kStepWarps + threadIdx.x / kWarpSize;
  const int64_t head = index % p.nheads;
  const int64_t slot = index / p.nheads;
  if (slot >= space.chunks.slots) return;
  const Segment chunk = segment_of(p, space.chunks, slot);
  if (!chunk.exists) return;
  ChunkTokens<N> tokens;
  tokens.load(p, chunk.row, head, chunk.begin, chunk.end);
  const StepRule<N> rule(p, head);
  ChunkSteps<N> steps(rule, tokens, p.dt.dtype);
  if constexpr (std::is_same_v<N, double>) {
    double rest[2];
    sum_up_exactly({rule.log_decay(steps.step[0]), rule.log_decay(steps.step[1])}, steps.decay,
                   rest);
#pragma unroll
    for (int i = 0; i < 2; ++i) space.decay_rest[index * kChunk + 2 * lane + i] = rest[i];
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    space.step[index * kChunk + 2 * lane + i] = steps.step[i];
    space.decay[index * kChunk + 2 * lane + i] = steps.decay[i];
  }
  if (head == 0) {
    uint64_t real = 0;
    uint64_t resets = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      real |= uint64_t{tokens.mark[i] != kPadding} << (2 * lane + i);
      resets |= uint64_t{tokens.mark[i] == kReset} << (2 * lane + i);
    }
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      real |= __shfl_xor_sync(kAllLanes, real, distance);
      resets |= __shfl_xor_sync(kAllLanes, resets, distance);
    }
    if (lane == 0) space.masks[slot] = {real, resets};
  }
}

/// Likewise: ddt of a chunk and head, and what they add to dA and ddt_bias.
template <class N>
__global__ void __launch_bounds__(kStepThreads)
    step_gradients(const SsdChunkScanParams p, const StepSpace<N> space) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t index = int64_t{blockIdx.x} * kStepWarps + threadIdx.x / kWarpSize;
  const int64_t head = index % p.nheads;
  const int64_t slot = index / p.nheads;
  if (slot >= space.chunks.slots) return;
  const Segment chunk = segment_of(p, space.chunks, slot);
  if (!chunk.exists || chunk.begin >= chunk.end) {  // chunk_gradients passed it by
    if (lane == 0) space.dA[index] = space.ddt_bias[index] = 0;
    const int64_t width = given(p.dD) ? space.head_blocks * space.width : 0;
    for (int64_t i = lane; i < width; i += kWarpSize) space.dD[index * width + i] = 0;
    return;
  }
  N later[2] = {}, earlier[2] = {}, input[2] = {}, passing = 0;
  for (int64_t block = 0; block < space.head_blocks; ++block) {
    const int64_t source = index * space.head_blocks + block;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Tokens in reverse, so that the sum over later ones is a running sum too.
      later[i] += space.later[source * kChunk + kChunk - 1 - (2 * lane + i)];
      earlier[i] += space.earlier[source * kChunk + 2 * lane + i];
      input[i] += space.input[source * kChunk + 2 * lane + i];
    }
    passing += space.passing[source];
  }
  sum_up_tokens(later);
  const N later_sums[2] = {__shfl_sync(kAllLanes, later[1], kWarpSize - 1 - lane),
                           __shfl_sync(kAllLanes, later[0], kWarpSize - 1 - lane)};
  sum_up_tokens(earlier);
  N before = __shfl_up_sync(kAllLanes, earlier[1], 1);
  if (lane == 0) before = 0;
  const N earlier_sums[2] = {before, earlier[0]};

  const StepRule<N> rule(p, head);
  const N A = parameter<N>(p.A, head);
  ChunkTokens<N> tokens;
  tokens.load(p, chunk.row, head, chunk.begin, chunk.end);
  N dA = 0, ddt_bias = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t t = chunk.begin + 2 * lane + i;
    if (t >= chunk.end) continue;
    N ddt = 0;
    if (tokens.mark[i] != kPadding) {
      // The state before a reset does not decay, it is dropped; and where nothing is left of it,
      // what the sums leave of numbers that cancel is no gradient.
      const N step = space.step[index * kChunk + 2 * lane + i];
      const bool dropped = tokens.mark[i] == kReset || fast_exp2(rule.log_decay(step)) == 0;
      const N ddecay = dropped ? N(0) : passing + later_sums[i] + earlier_sums[i];
      dA += step * ddecay;
      ddt = rule.gradient(tokens.dt[i].value(p.dt.dtype, 0)) * (A * ddecay + input[i]);
      ddt_bias += ddt;
    }
    if (given(p.ddt)) {
      store_as(p.ddt.data, p.ddt.dtype,
               chunk.row * p.ddt.stride[0] + t * p.ddt.stride[1] + head * p.ddt.stride[2], ddt);
    }
  }
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    dA += __shfl_xor_sync(kAllLanes, dA, distance);
    ddt_bias += __shfl_xor_sync(kAllLanes, ddt_bias, distance);
  }
  if (lane == 0) {
    space.dA[index] = dA;
    space.ddt_bias[index] = ddt_bias;
  }
}

// ---- Sums over chunks --------------------------------------------------------------------------

/// out[head, i] = sum over slots of partial[slot, head, i], or out[head] = the sum over i as well.
template <class N>
struct ParameterSum {
  View<2> out;
  const N* partial;
  int64_t width;  // of partial
  int64_t count;  // of i: at most width
  bool over_count;
};

template <class N>
struct ParameterSums {
  static constexpr int kMax = 3;
  ParameterSum<N> sum[kMax];
  int count = 0;

  void add(const View<2>& out, const N* partial, int64_t width, int64_t elements,
           bool over_elements) {
    if (given(out)) sum[count++] = {out, partial, width, elements, over_elements};
  }
  void add(const View<1>& out, const N* partial) {
    add(View<2>{out.data, out.dtype, {out.stride[0], 0}}, partial, 1, 1, false);
  }
};

constexpr int kSumThreads = 256;

/// A block per sum and head. Threads beside each other add up neighboring elements, those behind
/// one another every so many slots.
template <class N>
__global__ void __launch_bounds__(kSumThreads)
    sum_parameters(const ParameterSums<N> sums, int64_t slots, int64_t heads) {
  __shared__ N parts[kSumThreads];
  const ParameterSum<N>& s = sums.sum[blockIdx.y];
  const int64_t head = blockIdx.x;
  const int lanes = s.count == 1 ? 1 : kWarpSize;  // elements at a time
  const int lane = threadIdx.x % lanes;
  const int rows = kSumThreads / lanes;
  N total = 0;
  for (int64_t first = 0; first < s.count; first += lanes) {
    N sum = 0;
    if (first + lane < s.count) {
#pragma unroll 8
      for (int64_t slot = threadIdx.x / lanes; slot < slots; slot += rows) {
        sum += s.partial[(slot * heads + head) * s.width + first + lane];
      }
    }
    __syncthreads();
    parts[threadIdx.x] = sum;
    for (int distance = rows / 2; distance > 0; distance /= 2) {
      __syncthreads();
      if (threadIdx.x / lanes < distance) {
        parts[threadIdx.x] += parts[threadIdx.x + distance * lanes];
      }
    }
    if (threadIdx.x >= lanes) continue;
    if (s.over_count) {
      total += parts[threadIdx.x];
    } else if (first + lane < s.count) {
      store_as(s.out.data, s.out.dtype, head * s.out.stride[0] + (first + lane) * s.out.stride[1],
               parts[threadIdx.x]);
    }
  }
  if (!s.over_count) return;
  __syncthreads();
  if (threadIdx.x < lanes) parts[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    N sum = 0;
    for (int i = 0; i < lanes; ++i) sum += parts[i];
    store_as(s.out.data, s.out.dtype, head * s.out.stride[0], sum);
  }
}

/// out[b, t, g, n] = sum over subsets of partial[subset, slot, g, t in chunk, n]. A block per chunk
/// and group.
template <class Acc>
__global__ void __launch_bounds__(kElementThreads)
    sum_matrices(const SsdChunkScanParams p, const Segments chunks, const View<4> out,
                 const Acc* partial, int64_t subsets) {
  const int64_t group = blockIdx.x % p.ngroups;
  const int64_t slot = blockIdx.x / p.ngroups;
  const Segment chunk = segment_of(p, chunks, slot);
  if (!chunk.exists) return;
  const int64_t elements = (chunk.end - chunk.begin) * p.dstate;
  const int64_t stride = chunks.slots * p.ngroups * kChunk * p.dstate;
  for (int64_t i = threadIdx.x; i < elements; i += kElementThreads) {
    const Acc* source = partial + (slot * p.ngroups + group) * kChunk * p.dstate + i;
    Acc sum = 0;
    for (int64_t subset = 0; subset < subsets; ++subset) sum += source[subset * stride];
    store_as(out.data, out.dtype,
             chunk.row * out.stride[0] + (chunk.begin + i / p.dstate) * out.stride[1] +
                 group * out.stride[2] + i % p.dstate * out.stride[3],
             sum);
  }
}

// ---- D -----------------------------------------------------------------------------------------

/// D[block head, channel] as float32, 0 behind headdim.
__global__ void __launch_bounds__(kElementThreads) spread_D(const SsdChunkScanParams p, float* D) {
  const int64_t blocks = ceil_div(p.headdim, kBlockDim);
  const int64_t i = int64_t{blockIdx.x} * kElementThreads + threadIdx.x;
  if (i >= p.nheads * blocks * kBlockDim) return;
  const int64_t channel = i % (blocks * kBlockDim);
  const int64_t head = i / (blocks * kBlockDim);
  D[i] = channel < p.headdim
             ? load_as<float>(p.D.data, p.D.dtype, head * p.D.stride[0] + channel * p.D.stride[1])
             : 0.0f;
}

// ---- Launchers ---------------------------------------------------------------------------------

/// Dense (batch, seqlen, heads, columns) in the workspace, columns rounded up to a multiple.
template <class T>
View<4> take_dense(Workspace& workspace, const SsdChunkScanParams& p, int64_t heads,
                   int64_t columns, int64_t multiple) {
  const int64_t width = ceil_div(columns, multiple) * multiple;
  View<4> v{nullptr, p.dtype, {p.seqlen * heads * width, heads * width, width, 1}};
  v.data = workspace.take<T>(p.batch * p.seqlen * heads * width);
  return v;
}

template <class N>
void launch_step_chunks(const SsdChunkScanParams& p, const StepSpace<N>& space,
                        cudaStream_t stream) {
  const int64_t warps = space.chunks.slots * p.nheads;
  if (warps == 0) return;
  step_chunks<N>
      <<<static_cast<unsigned>(ceil_div(warps, kStepWarps)), kStepThreads, 0, stream>>>(p, space);
}

/// All that follows chunk_gradients, but for dB and dC.
template <class N>
void launch_step_gradients(const SsdChunkScanParams& p, const StepSpace<N>& space,
                           cudaStream_t stream) {
  const int64_t warps = space.chunks.slots * p.nheads;
  if (warps > 0) {
    step_gradients<N>
        <<<static_cast<unsigned>(ceil_div(warps, kStepWarps)), kStepThreads, 0, stream>>>(p, space);
  }
  ParameterSums<N> sums;
  sums.add(p.dA, space.dA);
  sums.add(p.ddt_bias, space.ddt_bias);
  sums.add(p.dD, space.dD, space.head_blocks * space.width, p.headdim, !p.D_per_channel);
  if (sums.count == 0 || p.nheads == 0) return;
  const dim3 blocks(static_cast<unsigned>(p.nheads), sums.count);
  sum_parameters<N><<<blocks, kSumThreads, 0, stream>>>(sums, space.chunks.slots, p.nheads);
}

template <class Acc>
void launch_sum_matrices(const SsdChunkScanParams& p, const Segments& chunks, const View<4>& out,
                         const Acc* partial, int64_t subsets, cudaStream_t stream) {
  const int64_t blocks = chunks.slots * p.ngroups;
  if (!given(out) || blocks == 0) return;
  sum_matrices<Acc><<<static_cast<unsigned>(blocks), kElementThreads, 0, stream>>>(
      p, chunks, out, partial, subsets);
}

template <class T>
struct PlainBackward {
  using Acc = Accumulate<T>;
  PlainPlan<Acc> plan;

  PlainBackward(const SsdChunkScanParams& p, Workspace& workspace)
      : plan{StepSpace<double>(p, 1, p.headdim, workspace)} {
    // As many heads at a time as their states take little more memory than x.
    const int64_t slots = plan.steps.chunks.slots;
    const int64_t head_bytes = 2 * slots * p.headdim * p.dstate * int64_t{sizeof(Acc)};
    const int64_t budget =
        (int64_t{256} << 20) + p.batch * p.seqlen * p.nheads * p.headdim * int64_t{sizeof(Acc)};
    plan.lot = std::max<int64_t>(
        1, std::min<int64_t>(p.nheads, head_bytes == 0 ? p.nheads : budget / head_bytes));
    const int64_t states = slots * plan.lot * p.headdim * p.dstate;
    plan.states = workspace.take<Acc>(states);
    plan.dstates = workspace.take<Acc>(states);
    plan.dB = workspace.take<Acc>(slots * p.ngroups * kChunk * p.dstate);
    plan.dC = workspace.take<Acc>(slots * p.ngroups * kChunk * p.dstate);
  }

  void launch(const SsdChunkScanParams& p, cudaStream_t stream) {
    launch_step_chunks(p, plan.steps, stream);
    const int64_t slots = plan.steps.chunks.slots;
    const int64_t tiles = ceil_div(p.headdim, kPlainTile) * ceil_div(p.dstate, kPlainTile);
    for (int64_t head = 0; head < p.nheads; head += plan.lot) {
      plan.first_head = head;
      plan.end_head = std::min(p.nheads, head + plan.lot);
      const int64_t walks = p.num_sequences * (plan.end_head - head) * tiles * 2;
      if (walks > 0) {
        walk_states_plain<T><<<static_cast<unsigned>(walks), kPlainThreads, 0, stream>>>(p, plan);
      }
      if (slots > 0) {
        chunk_gradients_plain<T>
            <<<static_cast<unsigned>(slots * p.ngroups), kPlainThreads, 0, stream>>>(p, plan);
      }
    }
    launch_step_gradients(p, plan.steps, stream);
    const int64_t subsets = p.nheads > 0 ? 1 : 0;  // no heads, no sums: 0
    launch_sum_matrices(p, plan.steps.chunks, p.dB, plan.dB, subsets, stream);
    launch_sum_matrices(p, plan.steps.chunks, p.dC, plan.dC, subsets, stream);
  }
};

constexpr int64_t kMaxMmaStates = 2 * kPanel;

template <class T>
struct MmaBackward {
  MmaPlan<T> plan;
  int64_t states;         // dstate, rounded up to what kernels exist for
  View<4> x, dout, B, C;  // with rows for tiles: the call's own, or copies

  static bool takes(const SsdChunkScanParams& p) {
    return p.dstate <= kMaxMmaStates && p.nheads > 0 && p.headdim > 0 && p.dstate > 0 &&
           device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8 &&
           device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >=
               static_cast<int64_t>(sizeof(GradientShared<T, kMaxMmaStates>));
  }

  MmaBackward(const SsdChunkScanParams& p, Workspace& workspace)
      : plan{StepSpace<float>(p, ceil_div(p.headdim, kBlockDim), kBlockDim, workspace)},
        states(p.dstate <= kPanel ? kPanel : kMaxMmaStates) {
    const StepSpace<float>& steps = plan.steps;
    const int64_t slots = steps.chunks.slots;
    const int64_t processors = multiprocessor_count();
    plan.vector_dx = has_vector_rows<T>(p.dx) && p.headdim % kTileVector == 0;

    // Segments cost a second walk through most of them: only where few blocks would walk far.
    constexpr int64_t kResidentWalks = 3;
    const int64_t walks = std::max<int64_t>(2 * p.num_sequences * steps.heads, 1);
    const int64_t chunks = ceil_div(std::max<int64_t>(p.seqlen, 1), kChunk);
    int64_t parts = std::min(kResidentWalks * processors / walks, chunks / 8);
    if (parts < 4) parts = 1;
    plan.segments = Segments::of_length(p, ceil_div(chunks, parts) * kChunk);

    // The blocks of a chunk's subsets end at the same time: as few rounds of block heads as can be.
    const int64_t group_heads = std::max<int64_t>(steps.heads / std::max<int64_t>(p.ngroups, 1), 1);
    constexpr int64_t kOverhead = 3;  // of a block, in block heads
    int64_t least = 0;
    plan.subsets = 1;
    for (int64_t subsets = 1; subsets <= std::min<int64_t>(group_heads, 64); ++subsets) {
      const int64_t rounds = ceil_div(slots * p.ngroups * subsets, processors);
      const int64_t time = rounds * (ceil_div(group_heads, subsets) + kOverhead);
      if (subsets == 1 || time < least) {
        least = time;
        plan.subsets = subsets;
      }
    }

    const auto with_rows = [&](const View<4>& v, int64_t heads, int64_t columns) {
      if (has_vector_rows<T>(v) && columns % kTileVector == 0) return v;
      return take_dense<T>(workspace, p, heads, columns, kTileVector);
    };
    x = with_rows(p.x, p.nheads, p.headdim);
    dout = with_rows(p.dout, p.nheads, p.headdim);
    B = with_rows(p.B, p.ngroups, p.dstate);
    C = with_rows(p.C, p.ngroups, p.dstate);

    const int64_t tiles = slots * steps.heads * kBlockDim * states;
    plan.D = workspace.take<float>(steps.heads * kBlockDim);
    plan.states = workspace.take<T>(tiles);
    plan.dstates = workspace.take<T>(tiles);
    const int64_t ends = plan.segments.per_sequence > 1 ? 2 * plan.segments.slots * steps.heads : 0;
    plan.ends = workspace.take<float>(ends * kBlockDim * states);
    plan.end_decay = workspace.take<float>(ends);
    const int64_t partials =
        plan.subsets > 1 ? plan.subsets * slots * p.ngroups * kChunk * p.dstate : 0;
    plan.dB = workspace.take<float>(partials);
    plan.dC = workspace.take<float>(partials);
  }

  template <int kStates>
  void launch_products(const SsdChunkScanParams& p, cudaStream_t stream) const {
    const int64_t walks = 2 * plan.segments.slots * plan.steps.heads;
    const size_t shared = sizeof(WalkShared<T, kStates>);
    if (walks > 0) {
      if (plan.segments.per_sequence > 1) {
        launch_shared(walk_states<T, kStates, true>, walks, kWalkThreads, shared, stream, p, plan);
      }
      launch_shared(walk_states<T, kStates, false>, walks, kWalkThreads, shared, stream, p, plan);
    }
    const int64_t blocks = plan.steps.chunks.slots * p.ngroups * plan.subsets;
    if (blocks > 0) {
      launch_shared(chunk_gradients<T, kStates>, blocks, kGradientThreads,
                    sizeof(GradientShared<T, kStates>), stream, p, plan);
    }
  }

  void launch(const SsdChunkScanParams& call, cudaStream_t stream) const {
    const auto copy = [&](const View<4>& from, const View<4>& to, int64_t heads, int64_t columns) {
      const int64_t tokens = call.batch * call.seqlen;
      if (from.data == to.data || tokens == 0) return to;
      copy_rows<T><<<static_cast<unsigned>(tokens), kElementThreads, 0, stream>>>(
          from, to, call.seqlen, heads, columns);
      return to;
    };
    SsdChunkScanParams p = call;
    p.x = copy(call.x, x, p.nheads, p.headdim);
    p.dout = copy(call.dout, dout, p.nheads, p.headdim);
    p.B = copy(call.B, B, p.ngroups, p.dstate);
    p.C = copy(call.C, C, p.ngroups, p.dstate);
    launch_step_chunks(p, plan.steps, stream);
    if (given(p.D)) {
      const int64_t elements = plan.steps.heads * kBlockDim;
      if (elements > 0) {
        spread_D<<<static_cast<unsigned>(ceil_div(elements, kElementThreads)), kElementThreads, 0,
                   stream>>>(p, plan.D);
      }
    }
    if (states == kPanel) {
      launch_products<kPanel>(p, stream);
    } else {
      launch_products<kMaxMmaStates>(p, stream);
    }
    launch_step_gradients(p, plan.steps, stream);
    if (plan.subsets > 1) {
      launch_sum_matrices(p, plan.steps.chunks, p.dB, plan.dB, plan.subsets, stream);
      launch_sum_matrices(p, plan.steps.chunks, p.dC, plan.dC, plan.subsets, stream);
    }
  }
};

/// Calls f with the parameters and the plan of the path that takes the call; z and dout are those
/// of y.
template <class T, class F>
void with_backward(const SsdChunkScanParams& p, Workspace& workspace, F f) {
  if constexpr (sizeof(T) == 2) {
    if (MmaBackward<T>::takes(p)) {
      f(MmaBackward<T>(p, workspace));
      return;
    }
  }
  f(PlainBackward<T>(p, workspace));
}

/// With z: y, and dy in place of dout.
template <class T>
struct GatedBackward {
  SsdChunkScanParams forward;   // computes y
  SsdChunkScanParams backward;  // without z
  bool needs_y = false;
  void* forward_workspace = nullptr;

  GatedBackward(const SsdChunkScanParams& p, Workspace& workspace) : forward(p), backward(p) {
    if (!given(p.z)) return;
    backward.dout = take_dense<T>(workspace, p, p.nheads, p.headdim, 1);
    backward.z = backward.dz = View<4>{};
    needs_y = given(p.dz);
    if (!needs_y) return;
    forward.z = View<4>{};
    forward.out = take_dense<T>(workspace, p, p.nheads, p.headdim, 1);
    const int64_t size = p.headdim * p.dstate;
    forward.final_states = {workspace.take<Accumulate<T>>(p.num_sequences * p.nheads * size),
                            sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32,
                            {p.nheads * size, size, p.dstate, 1}};
    forward_workspace = workspace.take<char>(workspace_ssd_chunk_scan_fwd<T>(forward));
  }

  CudaStatus launch(const SsdChunkScanParams& p, cudaStream_t stream) const {
    const int64_t tokens = p.batch * p.seqlen;
    if (!given(p.z) || tokens * p.nheads * p.headdim == 0) return cudaSuccess;
    if (needs_y) {
      const CudaStatus status = launch_ssd_chunk_scan_fwd<T>(forward, forward_workspace, stream);
      if (status != cudaSuccess) return status;
    }
    gate_gradients<T><<<static_cast<unsigned>(tokens), kElementThreads, 0, stream>>>(p, forward.out,
                                                                                     backward.dout);
    return cudaGetLastError();
  }
};

}  // namespace

template <class T>
size_t workspace_ssd_chunk_scan_bwd(const SsdChunkScanParams& p) {
  Workspace workspace(nullptr);
  const GatedBackward<T> gate(p, workspace);
  with_backward<T>(gate.backward, workspace, [](const auto&) {});
  return workspace.size();
}

template <class T>
CudaStatus launch_ssd_chunk_scan_bwd(const SsdChunkScanParams& p, void* base,
                                     CudaStream cuda_stream) {
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  Workspace workspace(base);
  const GatedBackward<T> gate(p, workspace);
  const CudaStatus status = gate.launch(p, stream);
  if (status != cudaSuccess) return status;
  with_backward<T>(gate.backward, workspace,
                   [&](auto backward) { backward.launch(gate.backward, stream); });
  return cudaGetLastError();
}

template size_t workspace_ssd_chunk_scan_bwd<MAMBA_SSM_ELEMENT>(const SsdChunkScanParams&);
template CudaStatus launch_ssd_chunk_scan_bwd<MAMBA_SSM_ELEMENT>(const SsdChunkScanParams&, void*,
                                                                 CudaStream);

}  // namespace mamba_ssm::kernels
