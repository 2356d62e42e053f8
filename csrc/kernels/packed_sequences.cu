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

}  // namespace

CudaStatus sequence_marks_cuda(const SequenceMarksParams& p, CudaStream stream) {
  if (p.batch == 0 || p.seqlen == 0) return cudaSuccess;
  const int64_t spans = (p.seqlen + kTokensPerWarp - 1) / kTokensPerWarp;
  const int64_t blocks = (p.batch * spans + kWarps - 1) / kWarps;
  sequence_marks_kernel<<<static_cast<unsigned>(blocks), kThreads, 0,
                          static_cast<cudaStream_t>(stream)>>>(p, spans);
  return cudaGetLastError();
}

}  // namespace mamba_ssm::kernels
