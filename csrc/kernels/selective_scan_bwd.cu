// Selective scan, backward.
//
// With carry_t the gradient that reaches h_t from later tokens (carry_last = dlast_state), for each
// state:
//
//   g_t       = dy_t C_t + carry_t             dy = dout silu(z)
//   carry_t-1 = a_t g_t                        a_t = exp(dt A); 0 across a reset
//   dC_t += dy_t h_t        dB_t += g_t (dt u)        d(dt u) += g_t B_t
//   q_t = carry_t-1 h_t-1   dA   += dt q_t            d(dt)   += A q_t
//
// Shared path (selective_scan.cuh): a block walks its channels tile by tile, last tile first. The
// states of a tile are recomputed from the one before it, which the forward kept: once through the
// tile to find the state before each group of kGroup tokens, then group by group, last group first,
// with the states and decays of a group in registers. What a token needs from all its states (y,
// d(dt u), d(dt)) is summed over the four lanes of a row; what a state needs from all channels (dB,
// dC) over the 8 rows of a warp, then over the warps of the block, and leaves as one partial sum
// per block. A second kernel adds the partial sums up.
#pragma nv_diag_suppress 177  // float64 has no use for the shared path
#include <numeric>

#include "launch.cuh"
#include "selective_scan.cuh"

namespace mamba_ssm::kernels {
namespace {

// By channels per lane, less one. Fitted to runs on an H200, 2026-11-24, in microseconds: 16
// states, bfloat16. With two channels per lane B and C are read, and dB and dC summed, half as
// often; with one, blocks are smaller, and more warps fit.
constexpr ScanCost kBackwardCost[] = {
    {/*main=*/{/*resident=*/4, /*latency=*/0.187, /*work=*/0.080},
     /*first_pass=*/{/*resident=*/1, /*latency=*/0, /*work=*/0.024},
     /*start=*/0},
    {/*main=*/{/*resident=*/3, /*latency=*/0.261, /*work=*/0.1455},
     /*first_pass=*/{/*resident=*/1, /*latency=*/0, /*work=*/0.04365},
     /*start=*/0}};
constexpr int kGroup = 4;                 // tokens whose states and decays fit the registers
constexpr int kGroups = kTile / kGroup;   // of a tile
constexpr int kValues = 2 * kStateBlock;  // of dB and dC per token

// B and C stand in shared memory in four copies, the states of each quarter in the order i ^ order,
// order = 0 .. 3: rows of a warp hold their states in different orders, so that halving the states
// while summing over rows needs no selection.
constexpr int kOrders = 4;
constexpr int kMatrixPitch = 2 * kOrders * kQuarters + 1;  // float4 per token: no bank conflicts

/// Partial sums that the main kernel leaves in the workspace.
struct BackwardSums {
  float* dB;           // (batch, groups * tiles, seqlen, dstate)
  float* dC;           // likewise
  float* dA;           // (batch * segments, dim, dstate)
  float* dD;           // (batch * segments, dim)
  float* ddelta_bias;  // likewise
  float* carry;        // (batch * segments, dim, dstate); used with more than one state block
};

/// x[i] = x[i ^ order], its own inverse.
__device__ __forceinline__ void reorder(int order, float (&x)[kStates]) {
  const auto swap_if = [](bool swapped, float& a, float& b) {
    const float first = swapped ? b : a;
    b = swapped ? a : b;
    a = first;
  };
  swap_if(order & 1, x[0], x[1]);
  swap_if(order & 1, x[2], x[3]);
  swap_if(order & 2, x[0], x[2]);
  swap_if(order & 2, x[1], x[3]);
}

/// Sums x over the four lanes of a row; lane `part` receives the sum of x[part].
__device__ __forceinline__ float sum_over_parts(int part, const float (&x)[4]) {
  const bool upper = part & 2;
  const float keep0 = upper ? x[2] : x[0];
  const float keep1 = upper ? x[3] : x[1];
  const float pair0 = keep0 + __shfl_xor_sync(kAllLanes, upper ? x[0] : x[2], 2);
  const float pair1 = keep1 + __shfl_xor_sync(kAllLanes, upper ? x[1] : x[3], 2);
  const bool odd = part & 1;
  return (odd ? pair1 : pair0) + __shfl_xor_sync(kAllLanes, odd ? pair0 : pair1, 1);
}

/// Sums dB and dC of one token over the 8 rows of a warp, whose lanes hold their states in the
/// order i ^ (row % 4). A lane receives the sum for state 4 * part + row % 4: dB's where row < 4,
/// else dC's.
__device__ __forceinline__ float sum_over_rows(int row, const float (&dB)[kStates],
                                               const float (&dC)[kStates]) {
  constexpr int kRow1 = kQuarters, kRow2 = 2 * kQuarters, kRow4 = 4 * kQuarters;  // lane distances
  const float B0 = dB[0] + __shfl_xor_sync(kAllLanes, dB[2], kRow2);
  const float B1 = dB[1] + __shfl_xor_sync(kAllLanes, dB[3], kRow2);
  const float C0 = dC[0] + __shfl_xor_sync(kAllLanes, dC[2], kRow2);
  const float C1 = dC[1] + __shfl_xor_sync(kAllLanes, dC[3], kRow2);
  const float B = B0 + __shfl_xor_sync(kAllLanes, B1, kRow1);
  const float C = C0 + __shfl_xor_sync(kAllLanes, C1, kRow1);
  const bool is_C = row & 4;
  return (is_C ? C : B) + __shfl_xor_sync(kAllLanes, is_C ? B : C, kRow4);
}

/// Planes of a warp: dt, dt u, dy, and the sums y, d(dt u), d(dt). With one state block the sums
/// take the place of the inputs they were computed from.
__host__ __device__ constexpr int planes_per_warp(int state_blocks) {
  return state_blocks == 1 ? 3 : 6;
}

template <class T, bool kPacked, int kDepth>
__global__ void __launch_bounds__(kThreads, kBackwardCost[kDepth - 1].main.resident)
    backward_shared(const SelectiveScanParams p, const ScanPlan plan, const SegmentSums segments,
                    const BackwardSums sums) {
  extern __shared__ float4 shared[];
  constexpr int kPlaneSize = plane_size(kDepth);
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int row = lane / kQuarters;
  const int part = lane % kQuarters;  // quarter of a state block, or 8 tokens of a tile
  const int order = row % kOrders;
  const bool one_block = plan.state_blocks == 1;
  float4* const matrix = shared;  // (kTile, kMatrixPitch)
  // States before the tokens of groups 1 .. kGroups - 1: (kGroups - 1, kDepth, threads).
  float4* const group_states = matrix + kTile * kMatrixPitch;
  float4* const last_group_states = group_states + (kGroups - 2) * kDepth * kThreads;
  // dB and dC of a group, (kWarps, kGroup, kValues). The groups use two places in turn, so that one
  // barrier per group is enough; the second is where the states of the last group stood.
  float* const odd_values =
      reinterpret_cast<float*>(group_states + (kGroups - 1) * kDepth * kThreads);
  float* const even_values = reinterpret_cast<float*>(last_group_states);
  static_assert(kGroups % 2 == 0 && kWarps * kGroup * kValues <= 4 * kDepth * kThreads);
  float* const steps = odd_values + kWarps * kGroup * kValues +
                       warp * planes_per_warp(plan.state_blocks) * kPlaneSize;  // dt
  float* const inputs = steps + kPlaneSize;                                     // dt u
  float* const dys = inputs + kPlaneSize;                                       // dy
  float* const totals = one_block ? steps : dys + kPlaneSize;  // (3): y, d(dt u), d(dt)

  const ScanPlace place = scan_place(p, plan, kWarps * kDepth * kRows, 0, plan.segments);
  const int c0 = place.channel + warp * (kDepth * kRows) + row;  // and c0 + kRows
  const auto exists = [&](int d) { return c0 + d * kRows < place.channel_end; };
  const auto end = [&](int d) { return exists(d) ? place.end : 0; };  // no channel, no tokens
  const int64_t sum_row = int64_t{place.segment_row} * p.dim + c0;
  float bias[kDepth], D[kDepth];
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    bias[d] = exists(d) ? parameter<float>(p.delta_bias, c0 + d * kRows) : 0.0f;
    D[d] = exists(d) ? parameter<float>(p.D, c0 + d * kRows) : 0.0f;
  }

  // Of the state block at hand, in the row's order.
  float rate[kDepth][kStates], carry[kDepth][kStates], dA[kDepth][kStates];
  const auto load_rates = [&](int block) {
    const int n = block * kStateBlock + part * kStates;
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const StateSlot slot(0, n, p.dstate, exists(d));
      load_decay_rates(p.A, c0 + d * kRows, n, slot.count, rate[d]);
    }
  };
#pragma unroll 1
  for (int block = 0; block < plan.state_blocks; ++block) {
    const int n = block * kStateBlock + part * kStates;
    load_rates(block);
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const StateSlot slot(sum_row + d * kRows, n, p.dstate, exists(d));
      load_states(p.dlast_state, place.b, c0 + d * kRows, n, slot.count, carry[d]);
      if (slot.count > 0) {
        const int later = plan.segments - 1 - place.segment;
        pass_segments(segments, place.segment_row + later, -1, later, p.dim, p.dstate,
                      c0 + d * kRows, n, rate[d], carry[d]);
      }
#pragma unroll
      for (int i = 0; i < kStates; ++i) dA[d][i] = 0;
      if (!one_block) {
        slot.store(sums.carry, carry[d]);
        slot.store(sums.dA, dA[d]);
      }
    }
  }
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
    reorder(order, rate[d]);
    reorder(order, carry[d]);
  }

  float dD[kDepth] = {}, ddelta_bias[kDepth] = {};  // of the lane's tokens
  const int chunks = (static_cast<int>(p.seqlen) + kTile - 1) / kTile;
  const int tiles = (place.end - place.begin + kTile - 1) / kTile;
  for (int begin = place.begin + (tiles - 1) * kTile; begin >= place.begin; begin -= kTile) {
    const TileMarks marks = tile_marks<kPacked>(p, place.b, begin, place.end);
    const int t = begin + part * kTokens;
    Tokens<T> delta, u, dout, z;
    const auto load_inputs = [&](int d) {
      const int b = recomputed(place.b);
      const int c = recomputed(c0 + d * kRows);
      const auto load = [&](const View<3>& v, unsigned bit) {
        return load_tokens<T>(v, plan.vectors & bit, b, c, t, end(d));
      };
      delta = load(p.delta, kVectorDelta);
      u = load(p.u, kVectorU);
      dout = load(p.dout, kVectorDout);
      if (given(p.z)) z = load(p.z, kVectorZ);
    };
#pragma unroll 1
    for (int d = 0; d < kDepth; ++d) {
      load_inputs(d);
      float dt[kTokens], x[kTokens];
      time_steps(delta, pick(bias, d), p.delta_softplus, dt);
#pragma unroll
      for (int j = 0; j < kTokens; ++j) x[j] = dt[j] * u[j];
      clear_tokens(marks.padding, part, dt);
      clear_tokens(marks.padding, part, x);
      write_plane(steps, row + d * kRows, part, dt);
      write_plane(inputs, row + d * kRows, part, x);
#pragma unroll
      for (int j = 0; j < kTokens; ++j) x[j] = dout[j];
      if (given(p.z)) {
#pragma unroll
        for (int j = 0; j < kTokens; ++j) x[j] *= silu(z[j]);
      }
      clear_tokens(marks.padding, part, x);
      write_plane(dys, row + d * kRows, part, x);
    }

    for (int block = 0; block < plan.state_blocks; ++block) {
      const int n = block * kStateBlock + part * kStates;
      MatrixStage<T, 2> stage;
      stage.load(p.B, plan.vectors & kVectorB, p.C, plan.vectors & kVectorC, recomputed(place.b),
                 recomputed(place.group), p.dstate, begin, place.end, block);
      if (!one_block) {
        load_rates(block);
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          const StateSlot slot(sum_row + d * kRows, n, p.dstate, exists(d));
          slot.load(sums.carry, carry[d]);
          slot.load(sums.dA, dA[d]);
          reorder(order, rate[d]);
          reorder(order, carry[d]);
          reorder(order, dA[d]);
        }
      }
      const auto load_first_states = [&](float(&h)[kDepth][kStates]) {
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          const StateSlot slot(
              (int64_t{recomputed(place.b)} * chunks + begin / kTile) * p.dim + c0 + d * kRows, n,
              p.dstate, exists(d));
          slot.load(static_cast<const float*>(p.states), h[d]);
          reorder(order, h[d]);
        }
      };
      float first_states[kDepth][kStates];
      load_first_states(first_states);
      __syncthreads();  // all are done with the matrices and sums of the tile before
      stage.store(marks.padding, [&](int token, int n, float x) {
        // C's copies in another order than B's, so that a warp's 16 + 16 writes miss each other.
        const int of_C = n / kStateBlock;
#pragma unroll
        for (int copy = 0; copy < kOrders; ++copy) {
          reinterpret_cast<float*>(
              matrix)[token * (4 * kMatrixPitch) + (of_C * kOrders + (copy ^ of_C)) * kStateBlock +
                      (n % kStateBlock ^ copy)] = x;
        }
      });
      __syncthreads();

      const float4* const B_row = matrix + order * kQuarters + part;
      const float4* const C_row = matrix + (kOrders + (order ^ 1)) * kQuarters + part;

#pragma unroll 1
      for (int group = 0; group < kGroups - 1; ++group) {
        float(&h)[kDepth][kStates] = first_states;
        float step[kDepth][4], input[kDepth][4];
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          unpack(plane_row(steps, row + d * kRows)[group], step[d]);
          unpack(plane_row(inputs, row + d * kRows)[group], input[d]);
        }
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
          float B[kStates];
          unpack(B_row[(group * kGroup + k) * kMatrixPitch], B);
          const bool reset = kPacked && (marks.resets >> (group * kGroup + k) & 1);
#pragma unroll
          for (int d = 0; d < kDepth; ++d) {
#pragma unroll
            for (int i = 0; i < kStates; ++i) {
              const float a = fast_exp2(step[d][k] * rate[d][i]);
              h[d][i] = fmaf(a, reset ? 0.0f : h[d][i], input[d][k] * B[i]);
            }
          }
        }
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          group_states[(group * kDepth + d) * kThreads + threadIdx.x] = pack(h[d]);
        }
      }

#pragma unroll 1
      for (int group = kGroups - 1; group >= 0; --group) {
        float a[kGroup][kDepth][kStates];      // decays
        float h[kGroup + 1][kDepth][kStates];  // states before each token, and behind the last
        if (group == 0) {
          load_first_states(h[0]);
        } else {
#pragma unroll
          for (int d = 0; d < kDepth; ++d) {
            unpack(group_states[((group - 1) * kDepth + d) * kThreads + threadIdx.x], h[0][d]);
          }
        }
        float step[kDepth][4], input[kDepth][4], dy[kDepth][4];
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          unpack(plane_row(steps, row + d * kRows)[group], step[d]);
          unpack(plane_row(inputs, row + d * kRows)[group], input[d]);
          unpack(plane_row(dys, row + d * kRows)[group], dy[d]);
        }
#pragma unroll
        for (int k = 0; k < kGroup; ++k) {
          float B[kStates];
          unpack(B_row[(group * kGroup + k) * kMatrixPitch], B);
          const bool reset = kPacked && (marks.resets >> (group * kGroup + k) & 1);
#pragma unroll
          for (int d = 0; d < kDepth; ++d) {
#pragma unroll
            for (int i = 0; i < kStates; ++i) {
              a[k][d][i] = fast_exp2(step[d][k] * rate[d][i]);
              h[k + 1][d][i] = fmaf(a[k][d][i], reset ? 0.0f : h[k][d][i], input[d][k] * B[i]);
            }
          }
        }
        float* const values = group % 2 == 1 ? odd_values : even_values;
        float* const own_values =
            values + warp * kGroup * kValues + row / kOrders * kStateBlock + part * kStates + order;
        float y[kDepth][4], dinput[kDepth][4], dstep[kDepth][4];  // the lane's share
#pragma unroll
        for (int k = kGroup - 1; k >= 0; --k) {
          const bool reset = kPacked && (marks.resets >> (group * kGroup + k) & 1);
          float B[kStates], C[kStates], dB[kStates], dC[kStates];
          unpack(B_row[(group * kGroup + k) * kMatrixPitch], B);
          unpack(C_row[(group * kGroup + k) * kMatrixPitch], C);
#pragma unroll
          for (int d = 0; d < kDepth; ++d) {
            y[d][k] = dinput[d][k] = dstep[d][k] = 0;
#pragma unroll
            for (int i = 0; i < kStates; ++i) {
              const float g = fmaf(dy[d][k], C[i], carry[d][i]);
              y[d][k] = fmaf(C[i], h[k + 1][d][i], y[d][k]);
              dC[i] = d == 0 ? dy[d][k] * h[k + 1][d][i] : fmaf(dy[d][k], h[k + 1][d][i], dC[i]);
              dB[i] = d == 0 ? g * input[d][k] : fmaf(g, input[d][k], dB[i]);
              dinput[d][k] = fmaf(g, B[i], dinput[d][k]);
              carry[d][i] = reset ? 0.0f : g * a[k][d][i];
              const float q = reset ? 0.0f : carry[d][i] * h[k][d][i];
              dA[d][i] = fmaf(step[d][k], q, dA[d][i]);
              dstep[d][k] = fmaf(rate[d][i], q, dstep[d][k]);
            }
          }
          own_values[k * kValues] = sum_over_rows(row, dB, dC);
        }
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          float* const total = totals + (row + d * kRows) * kPitch + group * kGroup + part;
          const float total_y = sum_over_parts(part, y[d]);
          const float total_dinput = sum_over_parts(part, dinput[d]);
          const float total_dstep = sum_over_parts(part, dstep[d]);
          // The shuffles order these writes behind the reads of what they replace.
          if (block == 0) {
            total[0] = total_y;
            total[kPlaneSize] = total_dinput;
            total[2 * kPlaneSize] = total_dstep;
          } else {
            total[0] += total_y;
            total[kPlaneSize] += total_dinput;
            total[2 * kPlaneSize] += total_dstep;
          }
        }
        __syncthreads();
        const int value = threadIdx.x % kValues;
        const int64_t n_out = block * kStateBlock + value % kStateBlock;
        float* const target = value < kStateBlock ? sums.dB : sums.dC;
        const int k = threadIdx.x / kValues;
        static_assert(kThreads == kGroup * kValues);
        float sum = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += values[(w * kGroup + k) * kValues + value];
        const int t_out = begin + group * kGroup + k;
        if (t_out < place.end && n_out < p.dstate) {
          const int64_t tile =
              (int64_t{place.b} * plan.groups + place.group) * plan.tiles + place.tile;
          target[(tile * p.seqlen + t_out) * p.dstate + n_out] = sum;
        }
      }
      if (!one_block) {
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
          const StateSlot slot(sum_row + d * kRows, n, p.dstate, exists(d));
          reorder(order, carry[d]);
          reorder(order, dA[d]);
          slot.store(sums.carry, carry[d]);
          slot.store(sums.dA, dA[d]);
        }
      }
    }
    __syncwarp();

#pragma unroll 1
    for (int d = 0; d < kDepth; ++d) {
      load_inputs(d);  // again, out of a cache: they did not fit the registers
      const int b = recomputed(place.b);
      const int c = recomputed(c0 + d * kRows);
      const auto store = [&](const View<3>& v, unsigned bit, float(&x)[kTokens]) {
        clear_tokens(marks.padding, part, x);
        if (given(v)) store_tokens<T>(v, plan.vectors & bit, b, c, t, end(d), x);
      };
      // The next tile of the row, on its way into the cache.
      const auto prefetch = [&](const View<3>& v, unsigned bit) {
        prefetch_tokens<T>(v, plan.vectors & bit, b, c, t - kTile, place.begin, end(d));
      };
      prefetch(p.delta, kVectorDelta);
      prefetch(p.u, kVectorU);
      prefetch(p.dout, kVectorDout);
      prefetch(p.z, kVectorZ);
      float dy[kTokens], x[kTokens];
#pragma unroll
      for (int j = 0; j < kTokens; ++j) dy[j] = dout[j];
      if (given(p.z)) {
        float y[kTokens];
        read_plane(totals, row + d * kRows, part, y);
#pragma unroll
        for (int j = 0; j < kTokens; ++j) {
          const float s = sigmoid(z[j]);
          x[j] = dy[j] * fmaf(pick(D, d), u[j], y[j]) * (s * fmaf(z[j], 1 - s, 1.0f));
          dy[j] *= z[j] * s;
        }
        store(p.dz, kVectorDz, x);
      }
      float dt[kTokens], dinput[kTokens];
      read_plane(totals + kPlaneSize, row + d * kRows, part, dinput);
      time_steps(delta, pick(bias, d), p.delta_softplus, dt);
#pragma unroll
      for (int j = 0; j < kTokens; ++j) x[j] = fmaf(dt[j], dinput[j], pick(D, d) * dy[j]);
      store(p.du, kVectorDu, x);
#pragma unroll
      for (int j = 0; j < kTokens; ++j) dy[j] *= u[j];
      clear_tokens(marks.padding, part, dy);
      read_plane(totals + 2 * kPlaneSize, row + d * kRows, part, x);
#pragma unroll
      for (int j = 0; j < kTokens; ++j) x[j] = fmaf(u[j], dinput[j], kLn2 * x[j]);
      if (p.delta_softplus) {
#pragma unroll
        for (int j = 0; j < kTokens; ++j) x[j] *= softplus_gradient(delta[j] + pick(bias, d));
      }
      store(p.ddelta, kVectorDdelta, x);
      float dD_part = 0, ddelta_bias_part = 0;
#pragma unroll
      for (int j = 0; j < kTokens; ++j) {
        dD_part += dy[j];
        ddelta_bias_part += x[j];
      }
#pragma unroll
      for (int e = 0; e < kDepth; ++e) {
        if (e == d) {
          dD[e] += dD_part;
          ddelta_bias[e] += ddelta_bias_part;
        }
      }
    }
    __syncwarp();
  }

#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
#pragma unroll
    for (int distance = 1; distance < kQuarters; distance *= 2) {
      dD[d] += __shfl_xor_sync(kAllLanes, dD[d], distance);
      ddelta_bias[d] += __shfl_xor_sync(kAllLanes, ddelta_bias[d], distance);
    }
    if (exists(d) && part == 0) {
      sums.dD[sum_row + d * kRows] = dD[d];
      sums.ddelta_bias[sum_row + d * kRows] = ddelta_bias[d];
    }
    reorder(order, carry[d]);
    reorder(order, dA[d]);
  }
#pragma unroll 1
  for (int block = 0; block < plan.state_blocks; ++block) {
    const int n = block * kStateBlock + part * kStates;
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const StateSlot slot(sum_row + d * kRows, n, p.dstate, exists(d));
      if (one_block) {
        slot.store(sums.dA, dA[d]);
      } else {
        slot.load(sums.carry, carry[d]);
      }
      if (place.segment == 0 && given(p.dinitial_state)) {
        group_states[threadIdx.x] = pack(carry[d]);
        store_states(p.dinitial_state, place.b, c0 + d * kRows, n, slot.count,
                     reinterpret_cast<const float*>(group_states + threadIdx.x));
      }
    }
  }
}

// ---- Generic path ------------------------------------------------------------------------------

constexpr int kFlush = 4;  // tokens whose dB and dC are summed over the warps of a block at a time

/// A unit is a run of channels that share their groups of B and C. A block owns a tile of a unit:
/// `sets` times as many channels as its warps hold, one set after the other.
struct GenericPlan {
  int lanes;      // of a channel
  int64_t unit;   // channels
  int64_t tiles;  // per unit
  int64_t sets;   // per tile
};

/// Partial sums and carried values in the workspace.
template <class N, class Acc>
struct GenericSums {
  N* dB;  // per time: (batch, units * tiles, seqlen, dstate); constant: (batch, dim, dstate)
  N* dC;  // likewise
  N* dA;  // (batch, dim, dstate)
  N* carry;
  Acc* dD;  // (batch, dim)
  Acc* ddelta_bias;
};

template <class T, bool kComplex>
__global__ void __launch_bounds__(kGenericWarps* kWarpSize)
    backward_generic(const SelectiveScanParams p, const GenericPlan plan,
                     const GenericSums<Number<Accumulate<T>, kComplex>, Accumulate<T>> sums) {
  using Acc = Accumulate<T>;
  using N = Number<Acc, kComplex>;
  constexpr Acc kFactor = kComplex ? 2 : 1;  // y = 2 Re sum C h
  __shared__ Acc planes[kGenericWarps][6][kGenericRows][kGenericPitch];
  __shared__ N values[kGenericWarps][kFlush][2][kWarpSize];  // dB and dC, summed over the warp
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  auto& steps = planes[warp][0];   // dt
  auto& inputs = planes[warp][1];  // dt u
  auto& dys = planes[warp][2];
  auto& ys = planes[warp][3];
  auto& dinputs = planes[warp][4];
  auto& dsteps = planes[warp][5];
  const int lanes = plan.lanes;
  const int rows = kWarpSize / lanes;
  const int row = lane / lanes;
  const int64_t tile = blockIdx.x % plan.tiles;
  const int64_t units = p.dim / plan.unit;
  const int64_t unit = blockIdx.x / plan.tiles % units;
  const int64_t b = blockIdx.x / plan.tiles / units;
  const int64_t channel_end = (unit + 1) * plan.unit;
  const int64_t chunks = ceil_div(p.seqlen, kTile);
  const int64_t partial_row = ((b * units + unit) * plan.tiles + tile) * p.seqlen;

  for (int64_t set = 0; set < plan.sets; ++set) {
    const int64_t first_channel =
        unit * plan.unit + ((tile * plan.sets + set) * kGenericWarps + warp) * rows;
    const int64_t c = first_channel + row;
    const bool exists = c < channel_end;
    const MatrixRow<N> B(p.B, p.groups_B, p.dim, b, c);
    const MatrixRow<N> C(p.C, p.groups_C, p.dim, b, c);
    const int64_t state_row = (b * p.dim + c) * p.dstate;
    for (int64_t n = lane % lanes; exists && n < p.dstate; n += lanes) {
      const View<3>& v = p.dlast_state;
      sums.carry[state_row + n] =
          given(v) ? load_number<N>(v, b * v.stride[0] + c * v.stride[1] + n * v.stride[2]) : N{};
      sums.dA[state_row + n] = N{};
      if (p.constant_B) sums.dB[state_row + n] = N{};
      if (p.constant_C) sums.dC[state_row + n] = N{};
    }
    Acc dD[kGenericRows] = {};  // of the lane's tokens
    Acc ddelta_bias[kGenericRows] = {};

    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const int64_t begin = chunk * kTile;
      const int64_t t = begin + lane;
      const uint8_t mark = t >= p.seqlen        ? uint8_t{kPadding}
                           : p.marks != nullptr ? p.marks[b * p.seqlen + t]
                                                : uint8_t{kContinue};
      const unsigned resets = __ballot_sync(kAllLanes, mark == kReset);
      const unsigned padding = __ballot_sync(kAllLanes, mark == kPadding);
      for (int r = 0; r < rows; ++r) {
        const int64_t channel = first_channel + r;
        Acc dt = 0, x = 0, dy = 0;
        if (mark != kPadding && channel < channel_end) {
          dt = load_token<T>(p.delta, b, channel, t) + parameter<Acc>(p.delta_bias, channel);
          if (p.delta_softplus) dt = softplus(dt);
          x = dt * load_token<T>(p.u, b, channel, t);
          dy = load_token<T>(p.dout, b, channel, t);
          if (given(p.z)) dy *= silu(load_token<T>(p.z, b, channel, t));
        }
        steps[r][lane] = dt;
        inputs[r][lane] = x;
        dys[r][lane] = dy;
        ys[r][lane] = dinputs[r][lane] = dsteps[r][lane] = 0;
      }
      __syncwarp();

      for (int64_t n0 = 0; n0 < p.dstate; n0 += lanes) {
        const int64_t n = n0 + lane % lanes;
        const bool owns = exists && n < p.dstate;
        N A{}, carry{}, dA{}, dB_sum{}, dC_sum{};
        N h[kTile + 1];  // before each token, and behind the last
        N a[kTile];      // decays
        h[0] = N{};
        if (owns) {
          A = load_number<N>(p.A, c * p.A.stride[0] + n * p.A.stride[1]);
          h[0] = static_cast<const N*>(p.states)[((b * chunks + chunk) * p.dim + c) * p.dstate + n];
          carry = sums.carry[state_row + n];
          dA = sums.dA[state_row + n];
          if (p.constant_B) dB_sum = sums.dB[state_row + n];
          if (p.constant_C) dC_sum = sums.dC[state_row + n];
        }
#pragma unroll 1
        for (int j = 0; j < kTile; ++j) {
          h[j + 1] = h[j];
          if (!owns || padding >> j & 1) continue;
          N decayed{};
          if (!(resets >> j & 1)) {
            a[j] = exponential(steps[row][j] * A);
            decayed = a[j] * h[j];
          }
          h[j + 1] = decayed + inputs[row][j] * B(n, begin + j);
        }

#pragma unroll 1
        for (int first = kTile - kFlush; first >= 0; first -= kFlush) {
#pragma unroll 1
          for (int k = kFlush - 1; k >= 0; --k) {
            const int j = first + k;
            Acc y = 0, dinput = 0, dstep = 0;
            N dB{}, dC{};
            if (owns && !(padding >> j & 1)) {
              const N B_t = B(n, begin + j);
              const N C_t = C(n, begin + j);
              const Acc dy = kFactor * dys[row][j];
              const N g = dy * conjugate(C_t) + carry;
              y = kFactor * real_part(C_t * h[j + 1]);
              dC = dy * conjugate(h[j + 1]);
              dB = inputs[row][j] * g;
              dinput = real_part(g * conjugate(B_t));
              carry = N{};
              if (!(resets >> j & 1)) {
                carry = conjugate(a[j]) * g;
                const N q = carry * conjugate(h[j]);
                dA = dA + steps[row][j] * q;
                dstep = real_part(q * conjugate(A));
              }
            }
            y = sum_over_lanes(y, 1, lanes);
            dinput = sum_over_lanes(dinput, 1, lanes);
            dstep = sum_over_lanes(dstep, 1, lanes);
            if (lane % lanes == 0) {
              ys[row][j] += y;
              dinputs[row][j] += dinput;
              dsteps[row][j] += dstep;
            }
            dB_sum = dB_sum + dB;
            dC_sum = dC_sum + dC;
            dB = sum_over_lanes(dB, lanes, kWarpSize);
            dC = sum_over_lanes(dC, lanes, kWarpSize);
            values[warp][k][0][lane] = dB;  // the rows write the same
            values[warp][k][1][lane] = dC;
          }
          __syncthreads();
          for (int i = threadIdx.x; i < kFlush * 2 * lanes; i += kGenericWarps * kWarpSize) {
            const int which = i / lanes % 2;
            const int k = i / lanes / 2;
            const int64_t n_out = n0 + i % lanes;
            const int64_t t_out = begin + first + k;
            if ((which == 0 ? p.constant_B : p.constant_C) || n_out >= p.dstate ||
                t_out >= p.seqlen) {
              continue;
            }
            N sum{};
            for (int w = 0; w < kGenericWarps; ++w) sum = sum + values[w][k][which][i % lanes];
            N& target = (which == 0 ? sums.dB : sums.dC)[(partial_row + t_out) * p.dstate + n_out];
            target = set == 0 ? sum : target + sum;
          }
          __syncthreads();
        }
        if (owns) {
          sums.carry[state_row + n] = carry;
          sums.dA[state_row + n] = dA;
          if (p.constant_B) sums.dB[state_row + n] = dB_sum;
          if (p.constant_C) sums.dC[state_row + n] = dC_sum;
        }
      }
      __syncwarp();

#pragma unroll
      for (int r = 0; r < kGenericRows; ++r) {
        const int64_t channel = first_channel + r;
        if (r >= rows || channel >= channel_end || t >= p.seqlen) continue;
        Acc du = 0, ddelta = 0, dz = 0;
        if (mark != kPadding) {
          const Acc u = load_token<T>(p.u, b, channel, t);
          const Acc D = parameter<Acc>(p.D, channel);
          Acc dy = load_token<T>(p.dout, b, channel, t);
          if (given(p.z)) {
            const Acc z = load_token<T>(p.z, b, channel, t);
            dz = dy * (ys[r][lane] + D * u) * silu_gradient(z);
            dy *= silu(z);
          }
          du = steps[r][lane] * dinputs[r][lane] + D * dy;
          ddelta = u * dinputs[r][lane] + dsteps[r][lane];
          if (p.delta_softplus) {
            ddelta *= softplus_gradient(load_token<T>(p.delta, b, channel, t) +
                                        parameter<Acc>(p.delta_bias, channel));
          }
          dD[r] += dy * u;
          ddelta_bias[r] += ddelta;
        }
        if (given(p.du)) store_token<T>(p.du, b, channel, t, du);
        if (given(p.ddelta)) store_token<T>(p.ddelta, b, channel, t, ddelta);
        if (given(p.dz)) store_token<T>(p.dz, b, channel, t, dz);
      }
      __syncwarp();
    }

#pragma unroll
    for (int r = 0; r < kGenericRows; ++r) {
      const Acc dD_row = sum_over_lanes(dD[r], 1, kWarpSize);
      const Acc ddelta_bias_row = sum_over_lanes(ddelta_bias[r], 1, kWarpSize);
      if (lane == 0 && r < rows && first_channel + r < channel_end) {
        sums.dD[b * p.dim + first_channel + r] = dD_row;
        sums.ddelta_bias[b * p.dim + first_channel + r] = ddelta_bias_row;
      }
    }
    const View<3>& v = p.dinitial_state;
    for (int64_t n = lane % lanes; given(v) && exists && n < p.dstate; n += lanes) {
      store_number(v, b * v.stride[0] + c * v.stride[1] + n * v.stride[2],
                   sums.carry[state_row + n]);
    }
  }
}

// ---- Sums over blocks --------------------------------------------------------------------------

constexpr int kReduceThreads = 256;

/// dB or dC per time: out[b, g, n, t] = sum over the group's tiles of partial[b, g * tiles + tile,
/// t, n]. Complex numbers are pairs of reals.
template <class Acc>
struct MatrixSum {
  View<4> out;
  const Acc* partial;
  int64_t groups, tiles;
};

template <class Acc>
struct MatrixSums {
  MatrixSum<Acc> sum[2];
  int count = 0;
  int64_t max_groups = 0;

  void add(const View<4>& out, const void* partial, int64_t groups, int64_t tiles) {
    if (!given(out) || groups == 0) return;
    sum[count++] = {out, static_cast<const Acc*>(partial), groups, tiles};
    max_groups = std::max(max_groups, groups);
  }
};

/// A block owns 32 tokens by up to 32 states of one group, a thread kVec neighboring states.
template <class Acc, int kVec>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_matrices(const MatrixSums<Acc> sums, int64_t seqlen, int64_t dstate, int reals) {
  struct alignas(16) Vec {
    Acc x[kVec];
  };
  __shared__ Acc totals[kWarpSize][kWarpSize + 1];  // (state, token)
  const MatrixSum<Acc>& s = sums.sum[blockIdx.y];
  const int64_t width = dstate * reals;
  const int64_t t_blocks = ceil_div(seqlen, kWarpSize);
  const int64_t n_blocks = ceil_div(width, kWarpSize);
  const int64_t t0 = blockIdx.x % t_blocks * kWarpSize;
  const int64_t n0 = blockIdx.x / t_blocks % n_blocks * kWarpSize;
  const int64_t group = blockIdx.x / t_blocks / n_blocks % sums.max_groups;
  const int64_t b = blockIdx.x / t_blocks / n_blocks / sums.max_groups;
  if (group >= s.groups) return;
  const int t_count = static_cast<int>(min(seqlen - t0, int64_t{kWarpSize}));
  const int n_count = static_cast<int>(min(width - n0, int64_t{kWarpSize}));
  for (int i = threadIdx.x; i < t_count * n_count / kVec; i += kReduceThreads) {
    const int t = i * kVec / n_count;
    const int n = i * kVec % n_count;
    const Acc* source =
        s.partial + ((b * s.groups + group) * s.tiles * seqlen + t0 + t) * width + n0 + n;
    Acc total[kVec] = {};
#pragma unroll 8
    for (int64_t tile = 0; tile < s.tiles; ++tile) {
      Vec v;
      if constexpr (kVec == 1) {
        v.x[0] = *source;
      } else {
        v = *reinterpret_cast<const Vec*>(source);
      }
      source += seqlen * width;
#pragma unroll
      for (int e = 0; e < kVec; ++e) total[e] += v.x[e];
    }
#pragma unroll
    for (int e = 0; e < kVec; ++e) totals[n + e][t] = total[e];
  }
  __syncthreads();
  const int64_t base = b * s.out.stride[0] + group * s.out.stride[1];
  for (int i = threadIdx.x; i < n_count * kWarpSize; i += kReduceThreads) {
    const int t = i % kWarpSize;
    if (t >= t_count) continue;
    const int64_t n = n0 + i / kWarpSize;
    store_as(
        s.out.data, s.out.dtype,
        base + n / reals * s.out.stride[2] + (t0 + t) * s.out.stride[3] + n % reals * s.out.imag,
        totals[i / kWarpSize][t]);
  }
}

/// Gradients of parameters: out[c, n] = sum over rows of partial[row, c, n].
template <class Acc>
struct ParameterSum {
  View<2> out;
  const Acc* partial;
  int64_t width;  // of n
  int reals;      // per number
};

template <class Acc>
struct ParameterSums {
  static constexpr int kMax = 5;  // dA, dD, ddelta_bias, constant dB and dC
  ParameterSum<Acc> sum[kMax];
  int count = 0;

  void add(const View<2>& out, const void* partial, int64_t width, int reals) {
    if (given(out)) sum[count++] = {out, static_cast<const Acc*>(partial), width, reals};
  }
  void add(const View<1>& out, const void* partial) {
    add(View<2>{out.data, out.dtype, {out.stride[0], 0}}, partial, 1, 1);
  }
  void add_constant(const View<4>& out, const void* partial, int64_t width, int reals) {
    add(View<2>{out.data, out.dtype, {out.stride[1], out.stride[2]}, out.imag}, partial, width,
        reals);
  }
};

template <class Acc>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_parameters(const ParameterSums<Acc> sums, int64_t rows, int64_t dim) {
  const ParameterSum<Acc>& s = sums.sum[blockIdx.y];
  const int64_t width = s.width * s.reals;
  const int64_t i = int64_t{blockIdx.x} * kReduceThreads + threadIdx.x;
  if (i >= dim * width) return;
  Acc sum = 0;
#pragma unroll 8
  for (int64_t row = 0; row < rows; ++row) sum += s.partial[row * dim * width + i];
  const int64_t n = i % width;
  store_as(s.out.data, s.out.dtype,
           i / width * s.out.stride[0] + n / s.reals * s.out.stride[1] + n % s.reals * s.out.imag,
           sum);
}

template <class Acc>
void launch_reduce_matrices(const MatrixSums<Acc>& sums, const SelectiveScanParams& p,
                            cudaStream_t stream) {
  constexpr int kVec = 16 / sizeof(Acc);
  const int reals = p.complex_A ? 2 : 1;
  const int64_t width = p.dstate * reals;
  const int64_t count =
      p.batch * sums.max_groups * ceil_div(p.seqlen, kWarpSize) * ceil_div(width, kWarpSize);
  if (count == 0) return;
  const dim3 blocks(static_cast<unsigned>(count), sums.count);
  const auto kernel = width % kVec == 0 ? reduce_matrices<Acc, kVec> : reduce_matrices<Acc, 1>;
  kernel<<<blocks, kReduceThreads, 0, stream>>>(sums, p.seqlen, p.dstate, reals);
}

template <class Acc>
void launch_reduce_parameters(const ParameterSums<Acc>& sums, const SelectiveScanParams& p,
                              int64_t rows, cudaStream_t stream) {
  const int64_t elements = p.dim * p.dstate * (p.complex_A ? 2 : 1);
  if (sums.count == 0 || elements == 0) return;
  const dim3 blocks(static_cast<unsigned>(ceil_div(elements, kReduceThreads)), sums.count);
  reduce_parameters<Acc><<<blocks, kReduceThreads, 0, stream>>>(sums, rows, p.dim);
}

// ---- Launchers ---------------------------------------------------------------------------------

template <class T, int kDepth>
struct SharedBackward {
  ScanPlan plan;
  SegmentSums segments;
  BackwardSums sums;
  size_t workspace_size;

  SharedBackward(const SelectiveScanParams& p, void* base) {
    const size_t shared =
        sizeof(float4) * (kTile * kMatrixPitch + (kGroups - 1) * kDepth * kThreads) +
        sizeof(float) * kWarps *
            (kGroup * kValues + planes_per_warp(state_blocks(p)) * plane_size(kDepth));
    plan = plan_scan(p, kWarps * kDepth * kRows, kBackwardCost[kDepth - 1], shared);
    plan.vectors = vector_bit<T>(p.u, kVectorU) | vector_bit<T>(p.delta, kVectorDelta) |
                   vector_bit<T>(p.z, kVectorZ) | vector_bit<T>(p.dout, kVectorDout) |
                   vector_bit<T>(p.du, kVectorDu) | vector_bit<T>(p.ddelta, kVectorDdelta) |
                   vector_bit<T>(p.dz, kVectorDz) | vector_bit<T>(p.B, kVectorB) |
                   vector_bit<T>(p.C, kVectorC);
    Workspace workspace(base);
    segments = take_segment_sums(workspace, p, plan);
    const int64_t tokens = p.batch * plan.groups * plan.tiles * p.seqlen;
    const int64_t rows = p.batch * plan.segments * p.dim;
    sums.dB = workspace.take<float>(tokens * p.dstate);
    sums.dC = workspace.take<float>(tokens * p.dstate);
    sums.dA = workspace.take<float>(rows * p.dstate);
    sums.dD = workspace.take<float>(rows);
    sums.ddelta_bias = workspace.take<float>(rows);
    sums.carry = workspace.take<float>(plan.state_blocks > 1 ? rows * p.dstate : 0);
    workspace_size = workspace.size();
  }

  void launch(const SelectiveScanParams& p, cudaStream_t stream) const {
    if (plan.segments > 1) launch_segments<T, true>(p, plan, segments, stream);
    const int64_t blocks = p.batch * plan.segments * plan.groups * plan.tiles;
    launch_shared(
        p.marks != nullptr ? backward_shared<T, true, kDepth> : backward_shared<T, false, kDepth>,
        blocks, kThreads, plan.shared, stream, p, plan, segments, sums);
    MatrixSums<float> matrices;
    matrices.add(p.dB, sums.dB, plan.groups, plan.tiles);
    matrices.add(p.dC, sums.dC, plan.groups, plan.tiles);
    launch_reduce_matrices(matrices, p, stream);
    ParameterSums<float> parameters;
    parameters.add(p.dA, sums.dA, p.dstate, 1);
    parameters.add(p.dD, sums.dD);
    parameters.add(p.ddelta_bias, sums.ddelta_bias);
    launch_reduce_parameters(parameters, p, p.batch * plan.segments, stream);
  }
};

template <class T, bool kComplex>
struct GenericBackward {
  using Acc = Accumulate<T>;
  using N = Number<Acc, kComplex>;
  GenericPlan plan;
  GenericSums<N, Acc> sums;
  size_t workspace_size;

  GenericBackward(const SelectiveScanParams& p, void* base) {
    plan.lanes = generic_lanes(p.dstate);
    plan.unit = p.dim;
    if (!p.constant_B) plan.unit = std::gcd(plan.unit, p.dim / p.groups_B);
    if (!p.constant_C) plan.unit = std::gcd(plan.unit, p.dim / p.groups_C);
    plan.unit = std::max<int64_t>(plan.unit, 1);
    const int64_t set_channels = kGenericWarps * (kWarpSize / plan.lanes);
    const int64_t sets = ceil_div(plan.unit, set_channels);
    const int64_t units = p.dim / plan.unit;
    // Fewer, larger tiles where the partial sums of small ones would outgrow the activations.
    const int64_t tile_bytes = p.batch * units * p.seqlen * p.dstate * 2 * int64_t{sizeof(N)};
    const int64_t budget = (int64_t{256} << 20) + 4 * p.batch * p.dim * p.seqlen * sizeof(T);
    const bool per_time = !p.constant_B || !p.constant_C;
    plan.tiles = per_time && tile_bytes > 0
                     ? std::clamp<int64_t>(budget / tile_bytes, 1, std::max<int64_t>(sets, 1))
                     : sets;
    plan.sets = ceil_div(sets, std::max<int64_t>(plan.tiles, 1));
    plan.tiles = ceil_div(sets, std::max<int64_t>(plan.sets, 1));
    Workspace workspace(base);
    const int64_t tokens = p.batch * units * plan.tiles * p.seqlen;
    const int64_t rows = p.batch * p.dim;
    sums.dB = workspace.take<N>((p.constant_B ? rows : tokens) * p.dstate);
    sums.dC = workspace.take<N>((p.constant_C ? rows : tokens) * p.dstate);
    sums.dA = workspace.take<N>(rows * p.dstate);
    sums.carry = workspace.take<N>(rows * p.dstate);
    sums.dD = workspace.take<Acc>(rows);
    sums.ddelta_bias = workspace.take<Acc>(rows);
    workspace_size = workspace.size();
  }

  void launch(const SelectiveScanParams& p, cudaStream_t stream) const {
    const int64_t units = p.dim / plan.unit;
    const int64_t blocks = p.batch * units * plan.tiles;
    if (blocks > 0) {
      backward_generic<T, kComplex>
          <<<static_cast<unsigned>(blocks), kGenericWarps * kWarpSize, 0, stream>>>(p, plan, sums);
    }
    const int reals = kComplex ? 2 : 1;
    ParameterSums<Acc> parameters;
    parameters.add(p.dA, sums.dA, p.dstate, reals);
    parameters.add(p.dD, sums.dD);
    parameters.add(p.ddelta_bias, sums.ddelta_bias);
    MatrixSums<Acc> matrices;
    const auto reduce = [&](const View<4>& out, const N* partial, bool constant, int64_t groups) {
      if (constant) {
        parameters.add_constant(out, partial, p.dstate, reals);
      } else if (groups > 0) {
        matrices.add(out, partial, groups, units * plan.tiles / groups);
      }
    };
    reduce(p.dB, sums.dB, p.constant_B, p.groups_B);
    reduce(p.dC, sums.dC, p.constant_C, p.groups_C);
    launch_reduce_matrices(matrices, p, stream);
    launch_reduce_parameters(parameters, p, p.batch, stream);
  }
};

/// Calls f with the plan of the path that takes the call.
template <class T, class F>
auto with_backward(const SelectiveScanParams& p, void* workspace, F f) {
  if constexpr (sizeof(T) <= 4) {
    if (takes_shared_path<T>(p)) {
      const SharedBackward<T, 1> one(p, workspace);
      const SharedBackward<T, 2> two(p, workspace);
      if (two.plan.time < one.plan.time) return f(two);
      if (one.plan.fits()) return f(one);
    }
  }
  if (p.complex_A) return f(GenericBackward<T, true>(p, workspace));
  return f(GenericBackward<T, false>(p, workspace));
}

}  // namespace

template <class T>
size_t workspace_selective_scan_bwd(const SelectiveScanParams& p) {
  return with_backward<T>(p, nullptr, [](const auto& backward) { return backward.workspace_size; });
}

template <class T>
CudaStatus launch_selective_scan_bwd(const SelectiveScanParams& p, void* workspace,
                                     CudaStream stream) {
  return with_backward<T>(p, workspace, [&](const auto& backward) -> CudaStatus {
    backward.launch(p, static_cast<cudaStream_t>(stream));
    return cudaGetLastError();
  });
}

template size_t workspace_selective_scan_bwd<MAMBA_SSM_ELEMENT>(const SelectiveScanParams&);
template CudaStatus launch_selective_scan_bwd<MAMBA_SSM_ELEMENT>(const SelectiveScanParams&, void*,
                                                                 CudaStream);

}  // namespace mamba_ssm::kernels
