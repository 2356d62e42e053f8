// Packed sequences on the device: the ids of a row, and searches over its padding.
#pragma once

#include "device.cuh"
#include "packed_sequences.h"

namespace mamba_ssm::kernels {

/// Id of what belongs to no sequence; equal to itself, different from every real id.
constexpr int64_t kNoSequence = INT64_MIN;

/// The ids of one row of seq_idx; without seq_idx every token has id 0.
struct SequenceIds {
  const void* data;
  bool is_int64;
  int64_t stride;

  __device__ SequenceIds(const View<2>& seq_idx, int64_t b)
      : data(seq_idx.data), is_int64(seq_idx.dtype == DType::kInt64), stride(seq_idx.stride[1]) {
    if (data == nullptr) return;
    const int64_t offset = b * seq_idx.stride[0];
    data = is_int64 ? static_cast<const void*>(static_cast<const int64_t*>(data) + offset)
                    : static_cast<const void*>(static_cast<const int32_t*>(data) + offset);
  }

  __device__ int64_t operator[](int64_t t) const {
    if (data == nullptr) return 0;
    return is_int64 ? static_cast<const int64_t*>(data)[t * stride]
                    : static_cast<const int32_t*>(data)[t * stride];
  }
};

// Both searches are made by a whole warp, all lanes with the same arguments.

/// The largest t < end that is not padding, or -1.
__device__ inline int64_t last_real_token(const SequenceIds& ids, int64_t end) {
  const int lane = threadIdx.x % kWarpSize;
  for (; end > 0; end -= kWarpSize) {
    const int64_t t = end - 1 - lane;
    const unsigned real = __ballot_sync(kAllLanes, t >= 0 && ids[t] >= 0);
    if (real != 0) return end - __ffs(real);
  }
  return -1;
}

/// The id of the first token that is not padding, or kNoSequence.
__device__ inline int64_t first_sequence(const SequenceIds& ids, int64_t seqlen) {
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t begin = 0; begin < seqlen; begin += kWarpSize) {
    const int64_t t = begin + lane;
    const unsigned real = __ballot_sync(kAllLanes, t < seqlen && ids[t] >= 0);
    if (real != 0) return ids[begin + __ffs(real) - 1];
  }
  return kNoSequence;
}

}  // namespace mamba_ssm::kernels
