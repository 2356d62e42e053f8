// Sequence marks: a warp owns kTokensPerWarp tokens of a row and walks them 32 at a time.
#include <cuda_runtime.h>

#include "packed_sequences.cuh"

namespace mamba_ssm::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTokensPerWarp = 256;

__global__ void __launch_bounds__(kThreads)
    sequence_marks_kernel(const SequenceMarksParams p, int64_t spans) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t span = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize;
  const int64_t b = span / spans;
  if (b >= p.batch) return;
  const int64_t begin = span % spans * kTokensPerWarp;
  const int64_t end = begin + kTokensPerWarp < p.seqlen ? begin + kTokensPerWarp : p.seqlen;
  const SequenceIds ids(p.seq_idx, b);

  // Invariant: `previous` is the id of the last token before t0 that is not padding.
  const int64_t before = last_real_token(ids, begin);
  int64_t previous = before < 0 ? kNoSequence : ids[before];
  for (int64_t t0 = begin; t0 < end; t0 += kWarpSize) {
    const int64_t t = t0 + lane;
    const int64_t id = t < end ? ids[t] : kNoSequence;
    const unsigned real = __ballot_sync(kAllLanes, id >= 0);
    const unsigned lower = real & ((1u << lane) - 1);
    const int64_t neighbor = __shfl_sync(kAllLanes, id, lower ? 31 - __clz(lower) : 0);
    const int64_t last = lower ? neighbor : previous;
    if (t < end) {
      const bool reset = last != kNoSequence && id != last;
      p.marks[b * p.seqlen + t] = id < 0 ? kPadding : reset ? kReset : kContinue;
    }
    const int64_t newest = __shfl_sync(kAllLanes, id, real ? 31 - __clz(real) : 0);
    if (real != 0) previous = newest;
  }
}

/// cu_seqlens[r], in the row.
__device__ int64_t offset_of(const SequenceMarksParams& p, int64_t r) {
  const int64_t i = r * p.cu_seqlens.stride[0];
  const int64_t value = p.cu_seqlens.dtype == DType::kInt64
                            ? static_cast<const int64_t*>(p.cu_seqlens.data)[i]
                            : static_cast<const int32_t*>(p.cu_seqlens.data)[i];
  return value < 0 ? 0 : value > p.seqlen ? p.seqlen : value;
}

/// The first token of each sequence of cu_seqlens that is not padding continues. A warp owns a
/// sequence.
__global__ void __launch_bounds__(kThreads) sequence_starts_kernel(const SequenceMarksParams p) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t r = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize;
  if (r >= p.num_sequences) return;
  const int64_t end = offset_of(p, r + 1);
  for (int64_t begin = offset_of(p, r); begin < end; begin += kWarpSize) {
    const int64_t t = begin + lane;
    const unsigned real = __ballot_sync(kAllLanes, t < end && p.marks[t] != kPadding);
    if (real == 0) continue;
    if (lane == __ffs(real) - 1) p.marks[t] = kContinue;
    return;
  }
}

}  // namespace

CudaStatus sequence_marks_cuda(const SequenceMarksParams& p, CudaStream stream) {
  if (p.batch == 0 || p.seqlen == 0) return cudaSuccess;
  const int64_t spans = (p.seqlen + kTokensPerWarp - 1) / kTokensPerWarp;
  const int64_t blocks = (p.batch * spans + kWarps - 1) / kWarps;
  sequence_marks_kernel<<<static_cast<unsigned>(blocks), kThreads, 0,
                          static_cast<cudaStream_t>(stream)>>>(p, spans);
  if (p.cu_seqlens && p.num_sequences > 0) {
    const int64_t sequence_blocks = (p.num_sequences + kWarps - 1) / kWarps;
    sequence_starts_kernel<<<static_cast<unsigned>(sequence_blocks), kThreads, 0,
                             static_cast<cudaStream_t>(stream)>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace mamba_ssm::kernels
