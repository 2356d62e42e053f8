// Running a checked call: on the GPU's current stream, or split over torch's CPU threads.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "kernels/cpu.h"
#include "tensor.h"

namespace mamba_ssm::ops {

#ifdef MAMBA_SSM_WITH_CUDA
inline constexpr bool kWithCuda = true;
#else
inline constexpr bool kWithCuda = false;
#endif

/// Makes the device of `tensor` current and names torch's current stream on it.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& tensor);
  kernels::CudaStream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  kernels::CudaStream stream_ = nullptr;
};

/// Throws "<op>: CUDA error: ..." for a failed launch.
void check_launch(const char* op, kernels::CudaStatus status);

/// Calls body(begin, end) on ranges of `items` independent work items, over torch's threads.
/// `work` counts the elements of the whole call: small calls stay on one thread.
template <class Body>
void parallel(int64_t items, int64_t work, const Body& body) {
  if (items == 0) return;
  constexpr int64_t kWorkPerThread = 16384;  // about 10 us, a few times the cost of waking a thread
  const int64_t work_per_item = std::max<int64_t>(1, work / items);
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / work_per_item);
  torch::stable::parallel_for(0, items, grain, body);
}

}  // namespace mamba_ssm::ops
