// Marks of packed sequences, CPU. Work item: one row.
#include <algorithm>

#include "packed_sequences.h"

namespace mamba_ssm::kernels {
namespace {

template <class Index>
void mark_row(const Index* seq_idx, int64_t stride, int64_t seqlen, uint8_t* marks) {
  bool started = false;  // a token before this one was not padding; the last such has id `last`
  Index last = 0;
  for (int64_t t = 0; t < seqlen; ++t) {
    const Index id = seq_idx[t * stride];
    if (id < 0) {
      marks[t] = kPadding;
      continue;
    }
    marks[t] = started && id != last ? kReset : kContinue;
    started = true;
    last = id;
  }
}

/// cu_seqlens[r], in the row.
int64_t offset_of(const SequenceMarksParams& p, int64_t r) {
  const int64_t i = r * p.cu_seqlens.stride[0];
  const int64_t value = p.cu_seqlens.dtype == DType::kInt64
                            ? static_cast<const int64_t*>(p.cu_seqlens.data)[i]
                            : static_cast<const int32_t*>(p.cu_seqlens.data)[i];
  return std::clamp<int64_t>(value, 0, p.seqlen);
}

}  // namespace

void sequence_marks_cpu(const SequenceMarksParams& p, int64_t begin, int64_t end) noexcept {
  for (int64_t b = begin; b < end; ++b) {
    const int64_t offset = b * p.seq_idx.stride[0];
    uint8_t* marks = p.marks + b * p.seqlen;
    if (p.seq_idx.dtype == DType::kInt64) {
      mark_row(static_cast<const int64_t*>(p.seq_idx.data) + offset, p.seq_idx.stride[1], p.seqlen,
               marks);
    } else {
      mark_row(static_cast<const int32_t*>(p.seq_idx.data) + offset, p.seq_idx.stride[1], p.seqlen,
               marks);
    }
    if (!p.cu_seqlens) continue;
    for (int64_t r = 0; r < p.num_sequences; ++r) {
      const int64_t last = offset_of(p, r + 1);
      int64_t t = offset_of(p, r);
      while (t < last && marks[t] == kPadding) ++t;
      if (t < last) marks[t] = kContinue;
    }
  }
}

}  // namespace mamba_ssm::kernels
