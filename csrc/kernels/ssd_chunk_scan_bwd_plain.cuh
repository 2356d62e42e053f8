// SSD backward for any element type, headdim, dstate and strides, without tensor cores: the
// formulas of ssd_chunk_scan_bwd_mma.cuh with matrices of type Accumulate<T>, and double for what
// tokens and decays need. A chunk's products are made of tiles of 64 x 64, a thread having 4 x 4
// elements 16 apart.
//
// States before and their gradients behind all chunks stand in the workspace for a few heads at a
// time; dB and dC are added to from one lot of heads to the next.
#pragma once

#include "ssd_chunk_scan_bwd.cuh"

namespace mamba_ssm::kernels {

constexpr int kPlainTile = kChunk;
constexpr int kPlainSide = 16;
constexpr int kPlainThreads = kPlainSide * kPlainSide;
constexpr int kPlainCells = kPlainTile / kPlainSide;
constexpr int kPlainDepth = 8;               // of products, per stage
constexpr int kPlainPitch = kPlainTile + 1;  // of rows in shared memory

/// What the kernels of this path take from the host.
template <class Acc>
struct PlainPlan {
  StepSpace<double> steps;
  int64_t lot = 0;                       // heads at a time
  int64_t first_head = 0, end_head = 0;  // of this lot
  Acc* states = nullptr;                 // (slots, lot, headdim, dstate), before each chunk
  Acc* dstates = nullptr;                // likewise, behind each chunk
  Acc* dB = nullptr;                     // (slots, ngroups, kChunk, dstate)
  Acc* dC = nullptr;                     // likewise
};

template <class T>
__device__ __forceinline__ Accumulate<T> element(const View<4>& v, int64_t b, int64_t t, int64_t h,
                                                 int64_t i) {
  return to_accumulate(static_cast<const T*>(
      v.data)[b * v.stride[0] + t * v.stride[1] + h * v.stride[2] + i * v.stride[3]]);
}

/// c_t of a chunk and head. Differences have double's accuracy, however large both sums are.
struct ChunkDecays {
  const double *sum, *rest;

  __device__ __forceinline__ ChunkDecays(const StepSpace<double>& steps, int64_t at)
      : sum(steps.decay + at), rest(steps.decay_rest + at) {}
  /// From the chunk's start to token i.
  __device__ __forceinline__ double until(int i) const { return sum[i] + rest[i]; }
  /// From token j to token i.
  __device__ __forceinline__ double between(int64_t j, int i) const {
    return (sum[i] - sum[j]) + (rest[i] - rest[j]);
  }
};

template <class Acc>
using PlainCells = Acc[kPlainCells][kPlainCells];

/// Row or column, in a tile, of a thread's cell i.
__device__ __forceinline__ int plain_row(int i) {
  return threadIdx.x / kPlainSide + kPlainSide * i;
}
__device__ __forceinline__ int plain_column(int i) {
  return threadIdx.x % kPlainSide + kPlainSide * i;
}

template <class Acc>
struct PlainStage {
  Acc a[kPlainDepth][kPlainPitch], b[kPlainDepth][kPlainPitch];
};

/// cells += sum over k < depth of a(row, k) b(column, k), for functions of any numbers; a and b see
/// 64 rows and columns.
template <class Acc, class A, class B>
__device__ __forceinline__ void plain_product(PlainStage<Acc>& stage, int64_t depth, A a, B b,
                                              PlainCells<Acc>& cells) {
  for (int64_t first = 0; first < depth; first += kPlainDepth) {
    __syncthreads();
#pragma unroll
    for (int i = threadIdx.x; i < kPlainDepth * kPlainTile; i += kPlainThreads) {
      const int k = i % kPlainDepth;
      const int line = i / kPlainDepth;
      const bool there = first + k < depth;
      stage.a[k][line] = there ? a(line, first + k) : Acc(0);
      stage.b[k][line] = there ? b(line, first + k) : Acc(0);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kPlainDepth; ++k) {
      Acc x[kPlainCells], y[kPlainCells];
#pragma unroll
      for (int i = 0; i < kPlainCells; ++i) {
        x[i] = stage.a[k][plain_row(i)];
        y[i] = stage.b[k][plain_column(i)];
      }
#pragma unroll
      for (int i = 0; i < kPlainCells; ++i) {
#pragma unroll
        for (int j = 0; j < kPlainCells; ++j) cells[i][j] += x[i] * y[j];
      }
    }
  }
}

/// Calls f(cell, row, column) for a thread's cells.
template <class Acc, class F>
__device__ __forceinline__ void for_cells(PlainCells<Acc>& cells, F f) {
#pragma unroll
  for (int i = 0; i < kPlainCells; ++i) {
#pragma unroll
    for (int j = 0; j < kPlainCells; ++j) f(cells[i][j], plain_row(i), plain_column(j));
  }
}

/// Sums over the columns of a tile, x[i] being a thread's part of its row i: total[row] += sum.
__device__ inline void add_row_sums(const double (&x)[kPlainCells], double* total) {
#pragma unroll
  for (int i = 0; i < kPlainCells; ++i) {
    double sum = x[i];
#pragma unroll
    for (int distance = kPlainSide / 2; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, distance);
    }
    if (threadIdx.x % kPlainSide == 0) total[plain_row(i)] += sum;
  }
}

/// Likewise over the rows: total[column] += sum. `parts` has 64 numbers for each warp.
__device__ inline void add_column_sums(const double (&x)[kPlainCells], double* parts,
                                       double* total) {
  const int warp = threadIdx.x / kWarpSize;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kPlainCells; ++i) {
    const double sum = x[i] + __shfl_xor_sync(kAllLanes, x[i], kPlainSide);
    if (threadIdx.x % kWarpSize < kPlainSide) parts[warp * kPlainTile + plain_column(i)] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kPlainTile) {
    for (int w = 0; w < kPlainThreads / kWarpSize; ++w) {
      total[threadIdx.x] += parts[w * kPlainTile + threadIdx.x];
    }
  }
  __syncthreads();
}

// ---- States ------------------------------------------------------------------------------------

/// A block walks through one sequence with 64 x 64 elements of one head's state (p, n), or
/// backwards with those of its gradient.
template <class T>
__global__ void __launch_bounds__(kPlainThreads)
    walk_states_plain(const SsdChunkScanParams p, const PlainPlan<Accumulate<T>> plan) {
  using Acc = Accumulate<T>;
  __shared__ PlainStage<Acc> stage;
  __shared__ Acc factor[kChunk];
  const StepSpace<double>& steps = plan.steps;
  const int64_t channel_tiles = ceil_div(p.headdim, kPlainTile);
  const int64_t state_tiles = ceil_div(p.dstate, kPlainTile);
  int64_t index = blockIdx.x;
  const auto next = [&](int64_t count) {
    const int64_t i = index % count;
    index /= count;
    return i;
  };
  const bool backwards = next(2);
  const int64_t n0 = next(state_tiles) * kPlainTile;
  const int64_t p0 = next(channel_tiles) * kPlainTile;
  const int64_t lot_head = next(plan.end_head - plan.first_head);
  const int64_t r = index;
  const int64_t head = plan.first_head + lot_head;
  const int64_t group = head / (p.nheads / p.ngroups);
  const Sequence sequence = sequence_of(p, r);
  const int64_t first_slot = steps.slot_of(p, r, sequence.begin);
  const int64_t chunks = ceil_div(sequence.end - sequence.begin, kChunk);

  PlainCells<Acc> state = {};
  const View<4>& start = backwards ? p.dfinal_states : p.initial_states;
  if (given(start) && (backwards || has_initial_state(p, r))) {
    for_cells<Acc>(state, [&](Acc& s, int row, int column) {
      if (p0 + row >= p.headdim || n0 + column >= p.dstate) return;
      s = load_as<Acc>(start.data, start.dtype,
                       r * start.stride[0] + head * start.stride[1] + (p0 + row) * start.stride[2] +
                           (n0 + column) * start.stride[3]);
    });
  }
  for (int64_t k = 0; k < chunks; ++k) {
    const int64_t chunk = backwards ? chunks - 1 - k : k;
    const int64_t slot = first_slot + chunk;
    const int64_t begin = sequence.begin + chunk * kChunk;
    Acc* const target = (backwards ? plan.dstates : plan.states) +
                        (slot * plan.lot + lot_head) * p.headdim * p.dstate;
    const ChunkMasks masks = steps.masks[slot];
    const double* const step = steps.step + (slot * p.nheads + head) * kChunk;
    const ChunkDecays decay(steps, (slot * p.nheads + head) * kChunk);
    __syncthreads();
    if (threadIdx.x < kChunk) {
      const int t = threadIdx.x;
      Acc f = 0;
      if (masks.real >> t & 1) {
        if (backwards) {
          if (t < masks.first_reset()) f = fast_exp2(static_cast<Acc>(decay.until(t)));
        } else if (t >= masks.last_reset()) {
          f = fast_exp2(static_cast<Acc>(decay.between(t, kChunk - 1))) * static_cast<Acc>(step[t]);
        }
      }
      factor[t] = f;
    }
    const Acc passing =
        masks.resets == 0 ? fast_exp2(static_cast<Acc>(decay.until(kChunk - 1))) : Acc(0);
    for_cells<Acc>(state, [&](Acc& s, int row, int column) {
      if (p0 + row < p.headdim && n0 + column < p.dstate) {
        target[(p0 + row) * p.dstate + n0 + column] = s;
      }
      s *= passing;
    });
    __syncthreads();
    plain_product<Acc>(
        stage, kChunk,
        [&](int row, int64_t t) {
          if (!(masks.real >> t & 1) || p0 + row >= p.headdim) return Acc(0);
          return factor[t] *
                 element<T>(backwards ? p.dout : p.x, sequence.row, begin + t, head, p0 + row);
        },
        [&](int column, int64_t t) {
          if (!(masks.real >> t & 1) || n0 + column >= p.dstate) return Acc(0);
          return element<T>(backwards ? p.C : p.B, sequence.row, begin + t, group, n0 + column);
        },
        state);
  }
  if (backwards && given(p.dinitial_states) && has_initial_state(p, r)) {
    const View<4>& v = p.dinitial_states;
    for_cells<Acc>(state, [&](Acc s, int row, int column) {
      if (p0 + row >= p.headdim || n0 + column >= p.dstate) return;
      store_as(v.data, v.dtype,
               r * v.stride[0] + head * v.stride[1] + (p0 + row) * v.stride[2] +
                   (n0 + column) * v.stride[3],
               s);
    });
  }
}

// ---- Gradients of a chunk ----------------------------------------------------------------------

/// A block takes one chunk and the heads of one group in the lot.
template <class T>
__global__ void __launch_bounds__(kPlainThreads)
    chunk_gradients_plain(const SsdChunkScanParams p, const PlainPlan<Accumulate<T>> plan) {
  using Acc = Accumulate<T>;
  __shared__ union {
    PlainStage<Acc> stage;
    double parts[kPlainThreads / kWarpSize][kPlainTile];
  } scratch;
  __shared__ Acc matrix[kChunk][kPlainPitch];
  __shared__ double sums[3][kChunk];  // later, earlier, input
  __shared__ double column_sums[kChunk];
  __shared__ double passing_parts[kPlainThreads / kWarpSize];
  const StepSpace<double>& steps = plan.steps;
  const int64_t group = blockIdx.x % p.ngroups;
  const int64_t slot = blockIdx.x / p.ngroups;
  const int64_t group_heads = p.nheads / p.ngroups;
  const int64_t first_head = max(plan.first_head, group * group_heads);
  const int64_t end_head = min(plan.end_head, (group + 1) * group_heads);
  const Segment chunk = segment_of(p, steps.chunks, slot);
  if (!chunk.exists || chunk.begin >= chunk.end || first_head >= end_head) return;
  const int64_t tokens = chunk.end - chunk.begin;
  const ChunkMasks masks = steps.masks[slot];
  const int thread = threadIdx.x;

  const auto real = [&](int64_t t) { return (masks.real >> t & 1) != 0; };
  const auto of_group = [&](const View<4>& v, int64_t t, int64_t n) {
    return real(t) && n < p.dstate ? element<T>(v, chunk.row, chunk.begin + t, group, n) : Acc(0);
  };
  // C B^T of a thread's cells, gradient dCB; rows are tokens i, columns tokens j.
  PlainCells<Acc> dcb = {};
  Acc* const dB = plan.dB + (slot * p.ngroups + group) * kChunk * p.dstate;
  Acc* const dC = plan.dC + (slot * p.ngroups + group) * kChunk * p.dstate;
  const auto add_to = [&](Acc* target, int64_t n0, bool first, PlainCells<Acc>& cells) {
    for_cells<Acc>(cells, [&](Acc x, int row, int column) {
      if (n0 + column >= p.dstate) return;
      Acc& sum = target[row * p.dstate + n0 + column];
      sum = first ? x : sum + x;
    });
  };

  for (int64_t head = first_head; head < end_head; ++head) {
    const int64_t at = (slot * p.nheads + head) * kChunk;
    const double* const step = steps.step + at;
    const ChunkDecays decay(steps, at);
    const int64_t state_at = (slot * plan.lot + head - plan.first_head) * p.headdim * p.dstate;
    const Acc* const state = plan.states + state_at;
    const Acc* const dstate = plan.dstates + state_at;
    const auto of_head = [&](const View<4>& v, int64_t t, int64_t channel) {
      return real(t) && channel < p.headdim
                 ? element<T>(v, chunk.row, chunk.begin + t, head, channel)
                 : Acc(0);
    };
    const auto entering = [&](int t) {
      return t < masks.first_reset() ? fast_exp2(static_cast<Acc>(decay.until(t))) : Acc(0);
    };
    const auto leaving = [&](int t) {
      return t >= masks.last_reset() ? fast_exp2(static_cast<Acc>(decay.between(t, kChunk - 1)))
                                     : Acc(0);
    };
    __syncthreads();
    if (thread < kChunk) {
      sums[0][thread] = sums[1][thread] = sums[2][thread] = column_sums[thread] = 0;
    }

    PlainCells<Acc> cb = {}, g = {};
    plain_product<Acc>(
        scratch.stage, p.dstate, [&](int i, int64_t n) { return of_group(p.C, i, n); },
        [&](int j, int64_t n) { return of_group(p.B, j, n); }, cb);
    plain_product<Acc>(
        scratch.stage, p.headdim, [&](int i, int64_t c) { return of_head(p.dout, i, c); },
        [&](int j, int64_t c) { return of_head(p.x, j, c); }, g);
    double rows[kPlainCells] = {}, columns[kPlainCells] = {};
#pragma unroll
    for (int a = 0; a < kPlainCells; ++a) {
#pragma unroll
      for (int b = 0; b < kPlainCells; ++b) {
        const int i = plain_row(a);
        const int j = plain_column(b);
        Acc weight = 0;
        if (i >= j && i < masks.next_reset(j)) {
          weight = fast_exp2(static_cast<Acc>(decay.between(j, i)));
        }
        matrix[i][j] = cb[a][b] * weight;
        const Acc gradient = g[a][b] * weight * static_cast<Acc>(step[j]);
        dcb[a][b] += gradient;
        if (i > j) {  // on the diagonal nothing decays
          const double w = static_cast<double>(gradient) * static_cast<double>(cb[a][b]);
          rows[a] += w;
          columns[b] += w;
        }
      }
    }
    add_row_sums(rows, sums[0]);
    add_column_sums(columns, &scratch.parts[0][0], column_sums);

    for (int64_t p0 = 0; p0 < p.headdim; p0 += kPlainTile) {
      PlainCells<Acc> dx = {};  // without d and D
      plain_product<Acc>(
          scratch.stage, p.dstate, [&](int j, int64_t n) { return of_group(p.B, j, n); },
          [&](int c, int64_t n) {
            return p0 + c < p.headdim ? dstate[(p0 + c) * p.dstate + n] : Acc(0);
          },
          dx);
      for_cells<Acc>(dx, [&](Acc& x, int j, int) { x *= leaving(j); });
      plain_product<Acc>(
          scratch.stage, kChunk, [&](int j, int64_t i) { return matrix[i][j]; },
          [&](int c, int64_t i) { return of_head(p.dout, i, p0 + c); }, dx);
      double input[kPlainCells] = {}, dD[kPlainCells] = {};
#pragma unroll
      for (int a = 0; a < kPlainCells; ++a) {
#pragma unroll
        for (int b = 0; b < kPlainCells; ++b) {
          const int j = plain_row(a);
          const int64_t c = p0 + plain_column(b);
          if (c >= p.headdim || j >= tokens) continue;
          const Acc dy = of_head(p.dout, j, c);
          const Acc x = of_head(p.x, j, c);
          input[a] += static_cast<double>(x) * static_cast<double>(dx[a][b]);
          dD[b] += static_cast<double>(x) * static_cast<double>(dy);
          if (!given(p.dx)) continue;
          Acc value = dx[a][b] * static_cast<Acc>(step[j]);
          if (given(p.D)) {
            value +=
                dy * load_as<Acc>(p.D.data, p.D.dtype, head * p.D.stride[0] + c * p.D.stride[1]);
          }
          static_cast<T*>(
              p.dx.data)[chunk.row * p.dx.stride[0] + (chunk.begin + j) * p.dx.stride[1] +
                         head * p.dx.stride[2] + c * p.dx.stride[3]] = from_accumulate<T>(value);
        }
      }
      add_row_sums(input, sums[2]);
      if (given(p.dD)) {
        __shared__ double dD_sums[kPlainTile];
        __syncthreads();
        if (thread < kPlainTile) dD_sums[thread] = 0;
        add_column_sums(dD, &scratch.parts[0][0], dD_sums);
        if (thread < kPlainTile && p0 + thread < p.headdim) {
          steps.dD[(slot * p.nheads + head) * steps.width + p0 + thread] = dD_sums[thread];
        }
      }
    }

    const bool first = head == group * group_heads;
    for (int64_t n0 = 0; n0 < p.dstate; n0 += kPlainTile) {
      const auto add_state_term = [&](const View<4>& v, const Acc* state, auto factor,
                                      const View<4>& other, Acc* target, double* sum) {
        PlainCells<Acc> term = {};
        plain_product<Acc>(
            scratch.stage, p.headdim, [&](int t, int64_t c) { return of_head(v, t, c); },
            [&](int n, int64_t c) {
              return n0 + n < p.dstate ? state[c * p.dstate + n0 + n] : Acc(0);
            },
            term);
        double dots[kPlainCells] = {};
#pragma unroll
        for (int a = 0; a < kPlainCells; ++a) {
          const Acc f = factor(plain_row(a));
#pragma unroll
          for (int b = 0; b < kPlainCells; ++b) {
            term[a][b] *= f;
            dots[a] += static_cast<double>(term[a][b]) *
                       static_cast<double>(of_group(other, plain_row(a), n0 + plain_column(b)));
          }
        }
        add_to(target, n0, first, term);
        add_row_sums(dots, sum);
      };
      add_state_term(p.dout, state, entering, p.C, dC, sums[0]);
      add_state_term(
          p.x, dstate, [&](int t) { return leaving(t) * static_cast<Acc>(step[t]); }, p.B, dB,
          sums[1]);
    }

    double dot = 0;
    for (int64_t i = thread; i < p.headdim * p.dstate; i += kPlainThreads) {
      dot += static_cast<double>(state[i]) * static_cast<double>(dstate[i]);
    }
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      dot += __shfl_xor_sync(kAllLanes, dot, distance);
    }
    if (thread % kWarpSize == 0) passing_parts[thread / kWarpSize] = dot;
    __syncthreads();
    if (thread < kChunk) {
      steps.later[at + thread] = sums[0][thread] - column_sums[thread];
      steps.earlier[at + thread] = sums[1][thread];
      steps.input[at + thread] = sums[2][thread];
    }
    if (thread == 0) {
      double sum = 0;
      for (const double part : passing_parts) sum += part;
      steps.passing[slot * p.nheads + head] =
          masks.resets == 0 ? fast_exp2(decay.until(kChunk - 1)) * sum : 0.0;
    }
  }

  __syncthreads();
  for_cells<Acc>(dcb, [&](Acc x, int i, int j) { matrix[i][j] = x; });
  for (int64_t n0 = 0; n0 < p.dstate; n0 += kPlainTile) {
    PlainCells<Acc> term = {};
    plain_product<Acc>(
        scratch.stage, kChunk, [&](int i, int64_t j) { return matrix[i][j]; },
        [&](int n, int64_t j) { return of_group(p.B, j, n0 + n); }, term);
    add_to(dC, n0, false, term);
    for_cells<Acc>(term, [](Acc& x, int, int) { x = 0; });
    plain_product<Acc>(
        scratch.stage, kChunk, [&](int j, int64_t i) { return matrix[i][j]; },
        [&](int n, int64_t i) { return of_group(p.C, i, n0 + n); }, term);
    add_to(dB, n0, false, term);
  }
}

}  // namespace mamba_ssm::kernels
