// decode_linear for more rows than a thread can hold sums of: tiles on the tensor cores, for
// devices with a copy engine (compute capability 9.0 and up).
//
// A block owns kOutputs outputs of up to kRows rows, and a warp a part of both. Panels of 64 inputs
// pass through a ring in shared memory. Where the outputs are too few to fill the GPU, the kSplits
// blocks of a cluster share the inputs of one tile: each is sent the sums of its part of the tile,
// and adds them in the order of the blocks, whenever they come.
#pragma once

#include <cooperative_groups.h>

#include <algorithm>

#include "bulk_copy.cuh"
#include "decode_linear.h"
#include "tensor_cores.cuh"

namespace mamba_ssm::kernels {

template <class T, int kRows, int kOutputs, int kSplits>
struct LinearTiles {
  static constexpr int kBlockRows = kRows, kBlockOutputs = kOutputs;
  // The largest tiles are multiplied by four warps together: shared memory would be the limit if
  // every warp read its operands for itself.
  static constexpr bool kTogether = kRows == 64 && kOutputs == 64;
  static constexpr int kWarpRows = kTogether ? 16 : std::min(kRows, 32);
  static constexpr int kWarpOutputs = kTogether ? kOutputs : 16;
  static constexpr int kWarps = kOutputs / kWarpOutputs * (kRows / kWarpRows);
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kStageBytes = (kOutputs + kRows) * kPanel * sizeof(T);  // weight, x
  static constexpr int kMostStages = 96 * 1024 / kStageBytes;
  // A fragment has 16 rows and 8 outputs: those of a warp side by side, all of them, and those that
  // a block adds up and stores.
  static constexpr int kRowFragments = kWarpOutputs / 8;
  static constexpr int kFragments = kWarpRows / 16 * kRowFragments;
  static constexpr int kOwn = (kWarps * kFragments + kSplits - 1) / kSplits;
  static constexpr int kSent = kSplits == 1 ? 1 : kSplits * kOwn * kWarpSize;

  /// What is behind the ring of stages in shared memory.
  struct Rest {
    float4 sent[kSent];
    CopyBarrier there[kMostStages];
  };

  /// Stages of a ring: no more than a block has panels, to leave room for the next kernel's blocks.
  static int stages(int64_t panels) {
    return static_cast<int>(std::min<int64_t>(kMostStages, ceil_div(panels, kSplits)));
  }
  static size_t shared(int stages) {
    return static_cast<size_t>(stages) * kStageBytes + sizeof(Rest);
  }
};

/// d += the product of a panel of x and one of the weight: the part of a warp.
template <class Tiles, class T, int kFragments>
__device__ __forceinline__ void multiply_panel(float (&d)[kFragments][4], const T* x,
                                               const T* weight, int row, int output, int lane) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr bool kTogether = Tiles::kTogether;
#else
  constexpr bool kTogether = false;
#endif
  if constexpr (kTogether) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    const uint64_t a = describe_tile(x, kRowGroup, 0), b = describe_tile(weight, kRowGroup, 0);
    begin_products();
#pragma unroll
    for (int k = 0; k < kPanel; k += 16) {
      multiply_async<T>(d, advance_tile(a, k), advance_tile(b, k), true);
    }
    end_products(d);
#endif
  } else {
#pragma unroll
    for (int k = 0; k < kPanel; k += 16) {
#pragma unroll
      for (int n = 0; n < Tiles::kWarpOutputs; n += 16) {
        uint32_t b[4];
        load_b_transposed<Tiles::kBlockOutputs>(b, weight, output + n, k, lane);
#pragma unroll
        for (int m = 0; m < Tiles::kWarpRows; m += 16) {
          uint32_t a[4];
          load_a<Tiles::kBlockRows>(a, x, row + m, k, lane);
          const int f = m / 16 * Tiles::kRowFragments + n / 8;
          multiply_add<T>(d[f], a, b[0], b[1]);
          multiply_add<T>(d[f + 1], a, b[2], b[3]);
        }
      }
    }
  }
}

/// The grid: (tiles of outputs, kSplits, tiles of rows); blocks next to one another in y are a
/// cluster.
template <class T, int kRows, int kOutputs, int kSplits>
__global__ void __launch_bounds__(LinearTiles<T, kRows, kOutputs, kSplits>::kThreads, 2)
    by_tiles(const DecodeLinearParams p, const __grid_constant__ TensorMap weight,
             const __grid_constant__ TensorMap x, const int stages) {
#if __CUDA_ARCH__ >= 900
  using Tiles = LinearTiles<T, kRows, kOutputs, kSplits>;
  extern __shared__ __align__(1024) unsigned char ring[];
  auto& shared = *reinterpret_cast<typename Tiles::Rest*>(ring + stages * Tiles::kStageBytes);
  const int first_output = static_cast<int>(blockIdx.x) * kOutputs;
  const int first_row = static_cast<int>(blockIdx.z) * kRows;
  const int rank = static_cast<int>(blockIdx.y);
  const int all_panels = static_cast<int>(ceil_div(p.in_features, kPanel));
  const int begin = rank * all_panels / kSplits;
  const int panels = (rank + 1) * all_panels / kSplits - begin;
  const auto cluster = cooperative_groups::this_cluster();
  if constexpr (kSplits > 1) cluster.barrier_arrive();
  const bool copies = threadIdx.x == 0;
  if (copies) {
    for (int i = 0; i < stages; ++i) {
      if (i < panels) prefetch_box(weight, 0, first_output, 0, (begin + i) * kPanel);
      shared.there[i].init();
    }
    publish_barriers();
  }
  __syncthreads();
  let_next_start();
  wait_for_previous();

  const auto fetch = [&](int panel, int stage) {
    if (!copies || panel >= panels) return;
    unsigned char* const weight_tile = ring + stage * Tiles::kStageBytes;
    unsigned char* const x_tile = weight_tile + kOutputs * kPanel * sizeof(T);
    const int column = (begin + panel) * kPanel;
    shared.there[stage].expect(Tiles::kStageBytes);
    copy_box(x_tile, x, 0, first_row, 0, column, shared.there[stage]);
    copy_box(weight_tile, weight, 0, first_output, 0, column, shared.there[stage]);
  };
  for (int i = 0; i < stages; ++i) fetch(i, i);
  const int warp = warp_id(), lane = lane_id();
  constexpr int kAcross = kOutputs / Tiles::kWarpOutputs;  // warps
  const int tile_output = warp % kAcross * Tiles::kWarpOutputs;
  const int tile_row = warp / kAcross * Tiles::kWarpRows;
  float d[Tiles::kFragments][4] = {};
  int stage = 0, parity = 0;
#pragma unroll 1
  for (int i = 0; i < panels; ++i) {
    shared.there[stage].wait(parity);
    const T* const weight_tile = reinterpret_cast<const T*>(ring + stage * Tiles::kStageBytes);
    const T* const x_tile = weight_tile + kOutputs * kPanel;
    multiply_panel<Tiles>(d, x_tile, weight_tile, tile_row, tile_output, lane);
    if (i + stages < panels) {
      __syncthreads();  // all have left the stage
      fetch(i + stages, stage);
    }
    if (++stage == stages) stage = 0, parity ^= 1;
  }

  // Of the fragments of all warps, f belongs to block f % kSplits.
  const auto owner = [&](int f) { return (warp * Tiles::kFragments + f) % kSplits; };
  if constexpr (kSplits > 1) {
    const auto slot = [&](int source, int f) {
      const int own = (warp * Tiles::kFragments + f) / kSplits;
      return (source * Tiles::kOwn + own) * kWarpSize + lane;
    };
    cluster.barrier_wait();  // the others have started
#pragma unroll
    for (int f = 0; f < Tiles::kFragments; ++f) {
      float4* const theirs = cluster.map_shared_rank(shared.sent, owner(f));
      theirs[slot(rank, f)] = make_float4(d[f][0], d[f][1], d[f][2], d[f][3]);
    }
    cluster.sync();
#pragma unroll
    for (int f = 0; f < Tiles::kFragments; ++f) {
      if (owner(f) != rank) continue;
      float4 terms[kSplits];
#pragma unroll
      for (int source = 0; source < kSplits; ++source) terms[source] = shared.sent[slot(source, f)];
      d[f][0] = d[f][1] = d[f][2] = d[f][3] = 0;
#pragma unroll
      for (int source = 0; source < kSplits; ++source) {
        d[f][0] += terms[source].x;
        d[f][1] += terms[source].y;
        d[f][2] += terms[source].z;
        d[f][3] += terms[source].w;
      }
    }
  }
  const bool pairs = p.out.stride[1] == 1 && p.out.stride[0] % 2 == 0 && p.out_features % 2 == 0 &&
                     reinterpret_cast<uintptr_t>(p.out.data) % (2 * sizeof(T)) == 0;
#pragma unroll
  for (int f = 0; f < Tiles::kFragments; ++f) {
    const int64_t output = first_output + tile_output + f % Tiles::kRowFragments * 8 + lane % 4 * 2;
    if (owner(f) != rank || output >= p.out_features) continue;
    const float bias[2] = {
        parameter<float>(p.bias, output),
        output + 1 < p.out_features ? parameter<float>(p.bias, output + 1) : 0.0f};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row =
          first_row + tile_row + f / Tiles::kRowFragments * 16 + half * 8 + lane / 4;
      if (row >= p.rows) continue;
      T* const to = static_cast<T*>(p.out.data) + row * p.out.stride[0] + output * p.out.stride[1];
      const float sums[2] = {d[f][2 * half] + bias[0], d[f][2 * half + 1] + bias[1]};
      if (pairs) {
        Pack<T, 2> rounded;
        rounded.round(sums);
        rounded.store(to);
      } else {
        to[0] = from_accumulate<T>(sums[0]);
        if (output + 1 < p.out_features) to[p.out.stride[1]] = from_accumulate<T>(sums[1]);
      }
    }
  }
#endif
}

}  // namespace mamba_ssm::kernels
