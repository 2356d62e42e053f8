// Device vocabulary shared by the CUDA kernels: element types, conversions, activations, vectors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "types.h"

namespace mamba_ssm::kernels {

using Half = __half;
using BFloat16 = __nv_bfloat16;

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

/// True if an optional argument is there.
template <int kRank>
__host__ __device__ inline bool given(const View<kRank>& view) {
  return view.data != nullptr;
}

/// Type that sums of T run in.
template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateType<T>::type;

__device__ __forceinline__ float to_accumulate(float x) { return x; }
__device__ __forceinline__ double to_accumulate(double x) { return x; }
__device__ __forceinline__ float to_accumulate(Half x) { return __half2float(x); }
__device__ __forceinline__ float to_accumulate(BFloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_accumulate(Accumulate<T> x);
template <>
__device__ __forceinline__ float from_accumulate<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ double from_accumulate<double>(double x) {
  return x;
}
template <>
__device__ __forceinline__ Half from_accumulate<Half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ BFloat16 from_accumulate<BFloat16>(float x) {
  return __float2bfloat16_rn(x);
}

/// One element of a view whose floating type is known at run time only (parameters, states).
template <class Acc>
__device__ __forceinline__ Acc load_as(const void* data, DType dtype, int64_t offset) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<Acc>(static_cast<const float*>(data)[offset]);
    case DType::kFloat16:
      return static_cast<Acc>(__half2float(static_cast<const Half*>(data)[offset]));
    case DType::kBFloat16:
      return static_cast<Acc>(__bfloat162float(static_cast<const BFloat16*>(data)[offset]));
    case DType::kFloat64:
      return static_cast<Acc>(static_cast<const double*>(data)[offset]);
    default:
      return Acc(0);  // integers are read by load_index
  }
}

/// Element c of an optional parameter; 0 if absent.
template <class Acc>
__device__ __forceinline__ Acc parameter(const View<1>& v, int64_t c) {
  return given(v) ? load_as<Acc>(v.data, v.dtype, c * v.stride[0]) : Acc(0);
}

/// One element of an index tensor, int32 or int64.
__device__ __forceinline__ int64_t load_index(const void* data, DType dtype, int64_t offset) {
  return dtype == DType::kInt64 ? static_cast<const int64_t*>(data)[offset]
                                : static_cast<const int32_t*>(data)[offset];
}

template <class Acc>
__device__ __forceinline__ void store_as(void* data, DType dtype, int64_t offset, Acc value) {
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(data)[offset] = static_cast<float>(value);
      return;
    case DType::kFloat16:
      static_cast<Half*>(data)[offset] = __float2half_rn(static_cast<float>(value));
      return;
    case DType::kBFloat16:
      static_cast<BFloat16*>(data)[offset] = __float2bfloat16_rn(static_cast<float>(value));
      return;
    case DType::kFloat64:
      static_cast<double*>(data)[offset] = static_cast<double>(value);
      return;
    default:
      return;  // integers are never written
  }
}

// Fast float32 functions (MUFU) with ~1e-7 relative error; the double overloads are libm's.

__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double fast_exp2(double x) { return exp2(x); }

__device__ __forceinline__ float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float fast_rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;

__device__ __forceinline__ float sigmoid(float x) {
  return fast_rcp(1.0f + fast_exp2(-x * kLog2E));
}
__device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

template <class Acc>
__device__ __forceinline__ Acc silu(Acc x) {
  return x * sigmoid(x);
}

/// d silu / dx = s (1 + x (1 - s)) with s = sigmoid(x).
template <class Acc>
__device__ __forceinline__ Acc silu_gradient(Acc x) {
  const Acc s = sigmoid(x);
  return s * (Acc(1) + x * (Acc(1) - s));
}

/// 16 bytes of T in a register quad: `kSize` elements moved by one instruction.
template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T element[kSize];
};

template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* p) {
  const uint4 raw = *reinterpret_cast<const uint4*>(p);
  Vector<T> v;
  *reinterpret_cast<uint4*>(&v) = raw;
  return v;
}
template <class T>
__device__ __forceinline__ void store_vector(T* p, const Vector<T>& v) {
  *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(&v);
}

/// `kSize` elements of T side by side in memory, moved by one instruction and kept as they are
/// until they are read.
template <class T, int kSize>
struct alignas(kSize * sizeof(T)) Pack {
  using Word = std::conditional_t<kSize * sizeof(T) == 2, uint16_t, uint32_t>;
  static constexpr int kWords = kSize * sizeof(T) / sizeof(Word);
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  Word word[kWords];

  /// Aligned to the whole pack.
  __device__ __forceinline__ void load(const T* p) {
    if constexpr (kWords == 1) {
      word[0] = *reinterpret_cast<const Word*>(p);
    } else if constexpr (kWords == 2) {
      const uint2 raw = *reinterpret_cast<const uint2*>(p);
      word[0] = raw.x;
      word[1] = raw.y;
    } else {
      const uint4 raw = *reinterpret_cast<const uint4*>(p);
      word[0] = raw.x;
      word[1] = raw.y;
      word[2] = raw.z;
      word[3] = raw.w;
    }
  }

  __device__ __forceinline__ void store(T* p) const {
    if constexpr (kWords == 1) {
      *reinterpret_cast<Word*>(p) = word[0];
    } else if constexpr (kWords == 2) {
      *reinterpret_cast<uint2*>(p) = make_uint2(word[0], word[1]);
    } else {
      *reinterpret_cast<uint4*>(p) = make_uint4(word[0], word[1], word[2], word[3]);
    }
  }

  /// One instruction whatever stands around it, and the first to leave the caches: for what is not
  /// read again soon.
  __device__ __forceinline__ void store_streaming(T* p) const {
    static_assert(kWords == 4);
    __stcs(reinterpret_cast<uint4*>(p), make_uint4(word[0], word[1], word[2], word[3]));
  }

  __device__ __forceinline__ Accumulate<T> operator[](int i) const {
    if constexpr (sizeof(T) == 8) {
      return __hiloint2double(word[2 * i + 1], word[2 * i]);
    } else if constexpr (sizeof(T) == 4) {
      return __uint_as_float(word[i]);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      const uint32_t bits = word[i / 2];
      return __uint_as_float(i % 2 ? bits & 0xffff0000u : bits << 16);
    } else {
      const uint32_t bits = word[i / 2];
      return __half2float(__ushort_as_half(static_cast<uint16_t>(i % 2 ? bits >> 16 : bits)));
    }
  }

  /// Rounds; 16-bit types in pairs, one instruction for two.
  __device__ __forceinline__ void round(const Accumulate<T> (&x)[kSize]) {
    if constexpr (sizeof(T) == 2 && kSize > 1) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if constexpr (std::is_same_v<T, Half>) {
          const __half2 pair = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
          word[i] = *reinterpret_cast<const uint32_t*>(&pair);
        } else {
          const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
          word[i] = *reinterpret_cast<const uint32_t*>(&pair);
        }
      }
    } else {
      T rounded[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) rounded[i] = from_accumulate<T>(x[i]);
#pragma unroll
      for (int i = 0; i < kWords; ++i) word[i] = reinterpret_cast<const Word*>(rounded)[i];
    }
  }
};

// Elements side by side at any address, moved as the words of 4 bytes that they are in: the first
// `count` of a pack, which may be none.

/// Zeros behind them.
template <class T, int kSize>
__device__ __forceinline__ void load_anywhere(Pack<T, kSize>& pack, const T* p, int count) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4);
  constexpr int kInWord = 4 / sizeof(T), kWords = Pack<T, kSize>::kWords;
  const auto address = reinterpret_cast<uintptr_t>(p);
  const int before = address % 4 != 0;  // elements of the first word that are not ours
  const auto* const words = reinterpret_cast<const uint32_t*>(address - address % 4);
  const auto* const halves = reinterpret_cast<const uint16_t*>(words);
  uint32_t loaded[kWords + 1] = {};
#pragma unroll
  for (int i = 0; i < kWords + (kInWord > 1); ++i) {
    const int first = kInWord * i - before;
    if (first >= 0 && first + kInWord <= count) {
      loaded[i] = words[i];
    } else if (kInWord > 1 && first >= 0 && first < count) {
      loaded[i] = halves[2 * i];
    } else if (first < 0 && count > 0) {
      loaded[i] = uint32_t{halves[2 * i + 1]} << 16;
    }
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    pack.word[i] = before != 0 ? __funnelshift_r(loaded[i], loaded[i + 1], 16) : loaded[i];
  }
}

template <class T, int kSize>
__device__ __forceinline__ void store_anywhere(const Pack<T, kSize>& pack, T* p, int count) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4);
  constexpr int kInWord = 4 / sizeof(T), kWords = Pack<T, kSize>::kWords;
  const int before = reinterpret_cast<uintptr_t>(p) % 4 != 0;
  auto* const halves = reinterpret_cast<uint16_t*>(p);
  if (before != 0 && count > 0) halves[0] = static_cast<uint16_t>(pack.word[0]);
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int first = kInWord * i + before;
    const uint32_t next = i + 1 < kWords ? pack.word[i + 1] : 0;
    const uint32_t word = before != 0 ? __funnelshift_r(pack.word[i], next, 16) : pack.word[i];
    if (first + kInWord <= count) {
      *reinterpret_cast<uint32_t*>(p + first) = word;
    } else if (first < count) {
      halves[first] = static_cast<uint16_t>(word);
    }
  }
}

// Asynchronous copies to shared memory (before sm_80, and of less than 4 bytes: ordinary ones). A
// thread commits its copies in groups and waits for groups in the order of their commits; others
// see what it copied after a barrier.

/// Copies a pack, or zeros without reading if `there` is false.
template <class T, int kSize>
__device__ __forceinline__ void copy_async(Pack<T, kSize>* shared, const T* global,
                                           bool there = true) {
#if __CUDA_ARCH__ >= 800
  constexpr int kBytes = sizeof(Pack<T, kSize>);
  if constexpr (kBytes >= 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(shared))),
                 "l"(global), "n"(kBytes), "r"(there ? kBytes : 0)
                 : "memory");
    return;
  }
#endif
  if (there) {
    shared->load(global);
  } else {
    *shared = {};
  }
}

__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Waits until at most kPending groups of this thread are still on their way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

/// Elements of a parameter as they stand in memory: their conversion waits until they are needed,
/// so that the loads of several parameters are in flight together.
template <class Acc, int kSize>
struct ParameterBits {
  using Word = std::conditional_t<std::is_same_v<Acc, double>, uint64_t, uint32_t>;
  Word word[kSize];

  /// word[i] = the element at offset + i % kInner * inner + i / kInner * outer
  template <int kInner = kSize>
  __device__ __forceinline__ void load(const void* data, DType dtype, int64_t offset,
                                       int64_t inner = 0, int64_t outer = 0) {
    if (dtype == DType::kFloat32) {
      load_words<uint32_t, kInner>(data, offset, inner, outer);
    } else if (std::is_same_v<Acc, double> && dtype == DType::kFloat64) {
      load_words<Word, kInner>(data, offset, inner, outer);
    } else {
      load_words<uint16_t, kInner>(data, offset, inner, outer);
    }
  }

  template <class Source, int kInner>
  __device__ __forceinline__ void load_words(const void* data, int64_t offset, int64_t inner,
                                             int64_t outer) {
    const Source* const first = static_cast<const Source*>(data) + offset;
#pragma unroll
    for (int i = 0; i < kSize; ++i) word[i] = first[i % kInner * inner + i / kInner * outer];
  }

  /// The same for float32 elements side by side, aligned to 16 bytes.
  __device__ __forceinline__ void load_floats(const float* p) {
    static_assert(kSize % 4 == 0 && sizeof(Word) == 4);
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      const uint4 raw = *reinterpret_cast<const uint4*>(p + i);
      word[i] = raw.x;
      word[i + 1] = raw.y;
      word[i + 2] = raw.z;
      word[i + 3] = raw.w;
    }
  }

  /// The same for elements of 16 bits side by side, aligned to all of them.
  __device__ __forceinline__ void load_halves(const void* p) {
    Pack<Half, kSize> pack;
    pack.load(static_cast<const Half*>(p));
#pragma unroll
    for (int i = 0; i < kSize; ++i) word[i] = pack.word[i / 2] >> (i % 2 * 16) & 0xffff;
  }

  /// All of them, with one branch on their type.
  __device__ __forceinline__ void values(DType dtype, Acc (&x)[kSize]) const {
    if (dtype == DType::kFloat16) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) x[i] = value(DType::kFloat16, i);
    } else if (dtype == DType::kBFloat16) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) x[i] = value(DType::kBFloat16, i);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) x[i] = value(DType::kFloat32, i);
    }
  }

  __device__ __forceinline__ Acc value(DType dtype, int i) const {
    if constexpr (std::is_same_v<Acc, double>) {
      if (dtype == DType::kFloat64) return __longlong_as_double(word[i]);
    }
    const uint32_t bits = static_cast<uint32_t>(word[i]);
    if (dtype == DType::kFloat16) return __half2float(__ushort_as_half(bits));
    return __uint_as_float(dtype == DType::kBFloat16 ? bits << 16 : bits);
  }
};

/// True if `data` and all given strides (in elements of T) allow 16-byte vectors.
template <class T, class... Strides>
inline bool allows_vectors(const void* data, Strides... strides) {
  constexpr int64_t kSize = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ((strides % kSize == 0) && ...);
}

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Of the current device.
inline int64_t device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

/// Multiprocessors of the current device: what a launch has to fill.
inline int multiprocessor_count() {
  return std::max(static_cast<int>(device_attribute(cudaDevAttrMultiProcessorCount)), 1);
}

/// Asks for `bytes` of dynamic shared memory, where a launch of `kernel` does not get them by
/// itself.
template <class... Parameters>
void ask_for_shared(void (*kernel)(Parameters...), size_t bytes) {
  constexpr size_t kUnasked = 40 * 1024;  // 48 KiB, less the arrays of fixed size of a kernel
  if (bytes > kUnasked) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(bytes));
  }
}

/// Launches `kernel` with `bytes` of dynamic shared memory.
template <class... Parameters, class... Arguments>
void launch_shared(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  ask_for_shared(kernel, bytes);
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(arguments...);
}

// Overlapped launches: programmatic dependent launch of compute capability 9.0. The kernels of a
// decode step take a microsecond or two each, of which a good part is their start. An overlapped
// kernel starts while the one before it in the stream still runs: it computes its indices, brings
// what does not depend on that one nearer, and waits.
//
// A kernel that is launched so calls wait_for_previous in every thread before it reads or writes
// global memory: what was written before the kernel is there then, and what was read before it may
// be overwritten, also by kernels further back, since those between have waited as well.

/// From here on the next kernel in the stream may start, if it is an overlapped one.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Waits until all work before this kernel is done and visible.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Brings the line at `p` into the L2 cache, where whoever writes it finds it too: allowed before
/// wait_for_previous.
__device__ __forceinline__ void prefetch_to_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

/// True if the code that the current device runs for kKernel has the instruction to wait.
template <auto kKernel>
bool can_overlap() {
  constexpr int kMostDevices = 64;
  enum : int8_t { kUnknown, kNo, kYes };
  static std::atomic<int8_t> known[kMostDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMostDevices) return false;
  int8_t answer = known[device].load(std::memory_order_relaxed);
  if (answer == kUnknown) {
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, kKernel) != cudaSuccess) return false;
    answer = attributes.ptxVersion >= 90 ? kYes : kNo;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer == kYes;
}

/// Launches kKernel, which waits for what is before it, so that its start overlaps with that.
/// Blocks next to one another in y are clusters of `cluster` blocks.
template <auto kKernel, class... Arguments>
void launch_clusters_overlapped(dim3 grid, unsigned cluster, int threads, size_t bytes,
                                cudaStream_t stream, const Arguments&... arguments) {
  ask_for_shared(kKernel, bytes);
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (can_overlap<kKernel>()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = 1;
    attributes[count].val.clusterDim.y = cluster;
    attributes[count++].val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  cudaLaunchKernelEx(&config, kKernel, arguments...);
}

/// The same without clusters.
template <auto kKernel, class... Arguments>
void launch_overlapped(dim3 grid, int threads, size_t bytes, cudaStream_t stream,
                       const Arguments&... arguments) {
  launch_clusters_overlapped<kKernel>(grid, 1, threads, bytes, stream, arguments...);
}

}  // namespace mamba_ssm::kernels
