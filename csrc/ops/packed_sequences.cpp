#include "packed_sequences.h"

#include "kernels/packed_sequences.h"
#include "run.h"

namespace mamba_ssm::ops {

OptionalTensor mark_sequences(const StableChecks& checks, const OptionalTensor& seq_idx,
                              const OptionalTensor& cu_seqlens) {
  if (!seq_idx) return std::nullopt;
  kernels::SequenceMarksParams p{};
  p.batch = seq_idx->size(0);
  p.seqlen = seq_idx->size(1);
  p.num_sequences = cu_seqlens ? cu_seqlens->size(0) - 1 : p.batch;
  p.seq_idx = view<2>(*seq_idx);
  p.cu_seqlens = view<1>(cu_seqlens);
  Tensor marks = allocate(checks.op(), *seq_idx, {p.batch, p.seqlen}, ScalarType::Byte);
  p.marks = static_cast<uint8_t*>(marks.data_ptr());
  if constexpr (kWithCuda) {
    if (seq_idx->is_cuda()) {
      const CudaScope scope(*seq_idx);
      check_launch(checks.op(), kernels::sequence_marks_cuda(p, scope.stream()));
      return marks;
    }
  }
  parallel(p.batch, p.batch * p.seqlen,
           [&](int64_t begin, int64_t end) { kernels::sequence_marks_cpu(p, begin, end); });
  return marks;
}

void check_offsets(const StableChecks& checks, const Tensor& cu_seqlens, const char* total_name,
                   int64_t total) {
  if (!cu_seqlens.is_cpu()) return;
  int64_t previous = 0;
  for (int64_t i = 0; i < cu_seqlens.size(0); ++i) {
    const int64_t value = index_at(cu_seqlens, i);
    const std::string got = "cu_seqlens[" + std::to_string(i) + "] = " + std::to_string(value);
    if (i == 0 && value != 0) checks.fail("cu_seqlens must start at 0, got " + got);
    if (value < previous) {
      checks.fail("cu_seqlens must not decrease, got " + got + " after " +
                  std::to_string(previous));
    }
    previous = value;
  }
  if (previous != total) {
    checks.fail(std::string("cu_seqlens must end at ") + total_name + " = " +
                std::to_string(total) + ", got " + std::to_string(previous));
  }
}

}  // namespace mamba_ssm::ops
