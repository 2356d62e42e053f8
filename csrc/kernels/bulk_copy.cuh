// Tiles moved by the copy engine of sm_90 and up (TMA): one thread asks for a box of a tensor, and
// the arriving bytes count down a barrier in shared memory. What lies outside of the tensor arrives
// as zeros and is not written.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "device.cuh"

namespace mamba_ssm::kernels {

/// A tensor (batch, seqlen, heads, columns) of a 16-bit type in boxes of one head, for the
/// parameters of a kernel (const __grid_constant__). A box lies in shared memory as tile_at() of
/// ssd_chunk_scan.cuh says, on a 1024-byte boundary.
using TensorMap = CUtensorMap;

/// The driver's cuTensorMapEncodeTiled, found at run time: the library links no driver. Null where
/// the driver is too old.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                     &found);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    if (found != cudaDriverEntryPointSuccess) function = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

/// Describes v, of the given sizes, in boxes of (rows tokens, columns). False where the copy engine
/// cannot serve it.
template <class T>
bool describe_tensor(TensorMap& map, const View<4>& v, int64_t batch, int64_t seqlen, int64_t heads,
                     int64_t columns, int box_rows, int box_columns) {
  constexpr int64_t kVector = 16, kMostSize = int64_t{1} << 32, kMostStride = int64_t{1} << 40;
  const auto encode = tensor_map_encoder();
  const int64_t sizes[4] = {columns, heads, seqlen, batch};
  const int64_t strides[3] = {v.stride[2], v.stride[1], v.stride[0]};
  if (encode == nullptr || v.stride[3] != 1) return false;
  if (reinterpret_cast<uintptr_t>(v.data) % kVector != 0) return false;
  cuuint64_t size[4], bytes[3];
  for (int i = 0; i < 4; ++i) {
    if (sizes[i] <= 0 || sizes[i] > kMostSize) return false;
    size[i] = static_cast<cuuint64_t>(sizes[i]);
  }
  for (int i = 0; i < 3; ++i) {
    // A stride that is never taken may be anything, which the engine would refuse.
    const int64_t stride = sizes[i + 1] == 1 ? kVector : strides[i] * int64_t{sizeof(T)};
    if (stride <= 0 || stride >= kMostStride || stride % kVector != 0) return false;
    bytes[i] = static_cast<cuuint64_t>(stride);
  }
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(box_columns), 1,
                             static_cast<cuuint32_t>(box_rows), 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const auto type =
      std::is_same_v<T, Half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode(&map, type, 4, v.data, size, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

/// True if a kernel was compiled for sm_90 or more, as it must be to copy by the engine: a device
/// may also run what was made for an older one.
template <class... Parameters>
bool knows_copy_engine(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

/// Counts arriving bytes, phase by phase. One thread calls everything but wait().
struct CopyBarrier {
  uint64_t bits;

  __device__ __forceinline__ void init() {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&bits)) : "memory");
#endif
  }

  /// Starts a phase, which ends when so many bytes are there.
  __device__ __forceinline__ void expect(int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&bits)),
        "r"(bytes)
        : "memory");
#endif
  }

  /// Waits for the end of a phase; phases have the parities 0, 1, 0, ...
  __device__ __forceinline__ void wait(int parity) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred there;\n"
        "AGAIN: mbarrier.try_wait.parity.shared::cta.b64 there, [%0], %1;\n"
        "@!there bra AGAIN; }" ::"r"(shared_address(&bits)),
        "r"(parity)
        : "memory");
#endif
  }
};

/// After init(), before other threads or copies use a barrier; a __syncthreads() must follow.
__device__ __forceinline__ void publish_barriers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

/// Asks for the box from (row, t, head, column) on.
__device__ __forceinline__ void copy_box(void* shared, const TensorMap& map, int row, int t,
                                         int head, int column, CopyBarrier& barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&barrier.bits)), "r"(column), "r"(head), "r"(t), "r"(row)
      : "memory");
#endif
}

/// Asks the L2 cache for a box.
__device__ __forceinline__ void prefetch_box(const TensorMap& map, int row, int t, int head,
                                             int column) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(&map),
               "r"(column), "r"(head), "r"(t), "r"(row)
               : "memory");
#endif
}

/// Asks for `bytes` bytes; they, and both addresses, are multiples of 16.
__device__ __forceinline__ void copy_bytes(void* shared, const void* global, int bytes,
                                           CopyBarrier& barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(&barrier.bits))
      : "memory");
#endif
}

/// Writes a box to (row, t, head, column). What was written to the tile needs publish_tiles() and a
/// barrier before, and the tile must stay as it is until wait_boxes().
__device__ __forceinline__ void write_box(const TensorMap& map, const void* shared, int row, int t,
                                          int head, int column) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];\n"
      "cp.async.bulk.commit_group;" ::"l"(&map),
      "r"(shared_address(shared)), "r"(column), "r"(head), "r"(t), "r"(row)
      : "memory");
#endif
}

/// Waits until what this thread asked to write is read.
__device__ __forceinline__ void wait_boxes() {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
}

}  // namespace mamba_ssm::kernels
