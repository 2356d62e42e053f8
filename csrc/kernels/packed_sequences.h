// Packed sequences: several sequences in one row, told apart by an id per token (seq_idx).
#pragma once

#include "types.h"

namespace mamba_ssm::kernels {

/// What a scan does with its state before a token.
enum SequenceMark : uint8_t {
  kContinue = 0,  // carries on
  kReset = 1,     // starts from zero: the id differs from that of the last token not padding
  kPadding = 2,   // seq_idx < 0: no output, the state passes through
};

/// marks[b,t] from seq_idx[b,:t+1]. The first token that is not padding continues: initial states
/// belong to the first sequence of a row, whatever its id. With cu_seqlens (batch 1) that holds for
/// every range [cu_seqlens[r], cu_seqlens[r+1]), which has an initial state of its own.
///
///   seq_idx     (batch, seqlen)      int32 or int64
///   cu_seqlens  (num_sequences + 1)  int32 or int64; optional; values are clamped to [0, seqlen]
///   marks       (batch, seqlen)      uint8, contiguous
struct SequenceMarksParams {
  int64_t batch, seqlen, num_sequences;
  View<2> seq_idx;
  View<1> cu_seqlens;
  uint8_t* marks;
};

void sequence_marks_cpu(const SequenceMarksParams& p, int64_t begin, int64_t end) noexcept;  // rows
CudaStatus sequence_marks_cuda(const SequenceMarksParams& p, CudaStream stream);

}  // namespace mamba_ssm::kernels
