// Tiles of 16-bit elements in shared memory, and products of them on the tensor cores.
#pragma once

#include "device.cuh"

namespace mamba_ssm::kernels {

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

/// The number of the warp, known to the compiler to be the same for all of its lanes.
__device__ __forceinline__ int warp_id() {
  return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpSize, 0);
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

/// The inverse of load_a.
template <int kRows, class T>
__device__ __forceinline__ void store_a(const uint32_t (&a)[4], T* tile, int row, int column,
                                        int lane = lane_id()) {
#if __CUDA_ARCH__ >= 900
  T* const own = tile + tile_at<kRows>(row, column, lane % 16, lane / 16);
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(own))),
               "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
               : "memory");
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = tile_at<kRows>(row + i % 2 * 8 + lane / 4, column + i / 2 * 8 + lane % 4 * 2);
    *reinterpret_cast<uint32_t*>(tile + at) = a[i];
  }
#endif
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

// ---- Products of four warps --------------------------------------------------------------------
//
// Where the code is made for sm_90a, four neighboring warps, the first of which has a number that
// four divides, multiply together (wgmma): each has 16 of 64 rows of the accumulator, d[t] being
// the D above of columns 8t .. 8t + 7. The operand B, or both, are read from tiles by the tensor
// cores themselves; tiles start on 1024-byte boundaries.

constexpr int kRowGroup = 8 * kPanel * 2;  // bytes of 8 rows of a tile

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/// Describes a tile from `start` on to wgmma: `step` bytes from 8 rows to the next 8, `panel` bytes
/// from 64 columns to the next 64.
__device__ __forceinline__ uint64_t describe_tile(const void* start, int step, int panel) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(start));
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t{static_cast<uint32_t>(step) >> 4} << 32 |
         uint64_t{static_cast<uint32_t>(panel) >> 4} << 16 | (address & 0x3ffff) >> 4;
}

/// The same, `elements` 16-bit elements further on.
__device__ __forceinline__ uint64_t advance_tile(uint64_t tile, int elements) {
  return tile + elements * 2 / 16;
}

#define MAMBA_SSM_TILE(t) "+f"(d[t][0]), "+f"(d[t][1]), "+f"(d[t][2]), "+f"(d[t][3])

/// d = A B, or d += A B, with A (64, 16) and B^T (64, 16) in tiles.
template <class T>
__device__ __forceinline__ void multiply_async(float (&d)[8][4], uint64_t a, uint64_t b,
                                               bool accumulate) {
  if constexpr (std::is_same_v<T, Half>) {
    asm volatile(
        "{ .reg .pred accumulate; setp.ne.b32 accumulate, %34, 0; "
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, accumulate, 1, 1, 0, 0; }"
        : MAMBA_SSM_TILE(0), MAMBA_SSM_TILE(1), MAMBA_SSM_TILE(2), MAMBA_SSM_TILE(3),
          MAMBA_SSM_TILE(4), MAMBA_SSM_TILE(5), MAMBA_SSM_TILE(6), MAMBA_SSM_TILE(7)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  } else {
    asm volatile(
        "{ .reg .pred accumulate; setp.ne.b32 accumulate, %34, 0; "
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, accumulate, 1, 1, 0, 0; }"
        : MAMBA_SSM_TILE(0), MAMBA_SSM_TILE(1), MAMBA_SSM_TILE(2), MAMBA_SSM_TILE(3),
          MAMBA_SSM_TILE(4), MAMBA_SSM_TILE(5), MAMBA_SSM_TILE(6), MAMBA_SSM_TILE(7)
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));
  }
}

/// d += A B, A (64, 16) in registers, B (16, 64) in a tile; with kTransposed, its rows are those of
/// B.
template <class T, int kTransposed>
__device__ __forceinline__ void multiply_async(float (&d)[8][4], const uint32_t (&a)[4],
                                               uint64_t b) {
  if constexpr (std::is_same_v<T, Half>) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, 1, 1, 1, %37;"
        : MAMBA_SSM_TILE(0), MAMBA_SSM_TILE(1), MAMBA_SSM_TILE(2), MAMBA_SSM_TILE(3),
          MAMBA_SSM_TILE(4), MAMBA_SSM_TILE(5), MAMBA_SSM_TILE(6), MAMBA_SSM_TILE(7)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kTransposed));
  } else {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, 1, 1, 1, %37;"
        : MAMBA_SSM_TILE(0), MAMBA_SSM_TILE(1), MAMBA_SSM_TILE(2), MAMBA_SSM_TILE(3),
          MAMBA_SSM_TILE(4), MAMBA_SSM_TILE(5), MAMBA_SSM_TILE(6), MAMBA_SSM_TILE(7)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kTransposed));
  }
}

/// d += A B, A (64, 16) in registers, B (16, 128) in a tile; with kTransposed, its rows are those
/// of B.
template <class T, int kTransposed>
__device__ __forceinline__ void multiply_async(float (&d)[16][4], const uint32_t (&a)[4],
                                               uint64_t b) {
  if constexpr (std::is_same_v<T, Half>) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, 1, 1, 1, %69;"
        : MAMBA_SSM_TILE(0), MAMBA_SSM_TILE(1), MAMBA_SSM_TILE(2), MAMBA_SSM_TILE(3),
          MAMBA_SSM_TILE(4), MAMBA_SSM_TILE(5), MAMBA_SSM_TILE(6), MAMBA_SSM_TILE(7),
          MAMBA_SSM_TILE(8), MAMBA_SSM_TILE(9), MAMBA_SSM_TILE(10), MAMBA_SSM_TILE(11),
          MAMBA_SSM_TILE(12), MAMBA_SSM_TILE(13), MAMBA_SSM_TILE(14), MAMBA_SSM_TILE(15)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kTransposed));
  } else {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, 1, 1, 1, %69;"
        : MAMBA_SSM_TILE(0), MAMBA_SSM_TILE(1), MAMBA_SSM_TILE(2), MAMBA_SSM_TILE(3),
          MAMBA_SSM_TILE(4), MAMBA_SSM_TILE(5), MAMBA_SSM_TILE(6), MAMBA_SSM_TILE(7),
          MAMBA_SSM_TILE(8), MAMBA_SSM_TILE(9), MAMBA_SSM_TILE(10), MAMBA_SSM_TILE(11),
          MAMBA_SSM_TILE(12), MAMBA_SSM_TILE(13), MAMBA_SSM_TILE(14), MAMBA_SSM_TILE(15)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kTransposed));
  }
}

#undef MAMBA_SSM_TILE

/// Before the first of several asynchronous products: their registers are as they should be.
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

/// Waits for them; d is what they added to.
template <int kTiles>
__device__ __forceinline__ void end_products(float (&d)[kTiles][4]) {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[t][i])::"memory");
  }
}

#endif

}  // namespace mamba_ssm::kernels
