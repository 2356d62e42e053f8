// What every kernel and its caller share: element types, tensor views, status codes.
#pragma once

#include <cstdint>

namespace mamba_ssm::kernels {

/// Element type of a view. Activations choose a kernel by it; parameters are read through it.
enum class DType : int8_t { kFloat32, kFloat16, kBFloat16, kFloat64, kInt32, kInt64 };

/// A tensor as a kernel sees it: an address, an element type, one stride per dimension.
///
/// `data == nullptr` marks an absent optional argument. Strides count elements of `dtype` and may
/// be anything: 0 (expanded), larger than dense (sliced), in any order (transposed). No alignment
/// is promised beyond that of one element. A complex tensor is seen as real numbers: strides count
/// real elements, and the imaginary part stands `imag` elements behind the real one.
template <int kRank>
struct View {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride[kRank] = {};
  int64_t imag = 0;

  explicit operator bool() const { return data != nullptr; }
};

/// Outcome of a CUDA launch: a cudaError_t as a number, 0 for success.
using CudaStatus = int;

/// A cudaStream_t without the CUDA headers.
using CudaStream = void*;

/// The CUDA runtime's text for a status.
const char* cuda_error_string(CudaStatus status);

}  // namespace mamba_ssm::kernels
