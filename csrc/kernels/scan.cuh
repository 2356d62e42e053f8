// What the scans share: the softplus of their step sizes, and what their launchers need.
#pragma once

#include <cuda_runtime.h>

#include "device.cuh"

namespace mamba_ssm::kernels {

constexpr float kSoftplusThreshold = 20;

/// log1p(exp(x)) up to the threshold, x above: max(x, 0) + log1p(e) with e = exp(-|x|), and a
/// minimax polynomial of log1p(e) / e on [0, 1] (relative error 3e-8), because log2(1 + e) loses
/// the digits of a small e.
__device__ __forceinline__ float softplus(float x) {
  const float e = fast_exp2(-fabsf(x) * kLog2E);
  float q = 0.0052326931f;
  q = fmaf(q, e, -0.029505240f);
  q = fmaf(q, e, 0.078225955f);
  q = fmaf(q, e, -0.13663246f);
  q = fmaf(q, e, 0.19106007f);
  q = fmaf(q, e, -0.24842982f);
  q = fmaf(q, e, 0.33319098f);
  q = fmaf(q, e, -0.49999493f);
  q = fmaf(q, e, 0.99999994f);
  const float y = fmaf(q, e, fmaxf(x, 0.0f));
  return x > kSoftplusThreshold ? x : y;
}
__device__ __forceinline__ double softplus(double x) {
  return x > kSoftplusThreshold ? x : log1p(exp(x));
}

template <class Acc>
__device__ __forceinline__ Acc softplus_gradient(Acc x) {
  return x > kSoftplusThreshold ? Acc(1) : sigmoid(x);
}

/// x, hidden from the compiler: what is computed from it in a loop is computed there again, instead
/// of being kept in registers that the loop needs more.
__device__ __forceinline__ int recomputed(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- Host

/// Parts of a workspace, each on a 256-byte boundary; the first pass, without a base, only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <class U>
  U* take(int64_t count) {
    U* part = reinterpret_cast<U*>(base_ + size_);
    size_ += ceil_div(count * static_cast<int64_t>(sizeof(U)), 256) * 256;
    return part;
  }
  size_t size() const { return size_; }

 private:
  char* base_;
  size_t size_ = 0;
};

}  // namespace mamba_ssm::kernels
