#include "run.h"

#include <stdexcept>

// Weak, so that the library also loads beside a torch without CUDA, which does not export it.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                            void** stream);

namespace mamba_ssm::ops {

CudaScope::CudaScope(const Tensor& tensor) : guard_(tensor.get_device_index()) {
  if (aoti_torch_get_current_cuda_stream == nullptr ||
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_) != 0) {
    throw std::runtime_error("mamba_ssm: this torch names no current CUDA stream");
  }
}

void check_launch(const char* op, kernels::CudaStatus status) {
  if constexpr (kWithCuda) {
    if (status != 0) {
      throw std::runtime_error(std::string(op) +
                               ": CUDA error: " + kernels::cuda_error_string(status));
    }
  }
}

}  // namespace mamba_ssm::ops
