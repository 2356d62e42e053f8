// Packed sequences of a call: seq_idx and cu_seqlens, checked and turned into what kernels read.
#pragma once

#include "tensor.h"

namespace mamba_ssm::ops {

/// The marks (batch, seqlen) of a checked seq_idx (see kernels/packed_sequences.h), absent without
/// it. With cu_seqlens every sequence starts anew.
OptionalTensor mark_sequences(const StableChecks& checks, const OptionalTensor& seq_idx,
                              const OptionalTensor& cu_seqlens = std::nullopt);

/// On CPU: cu_seqlens (n) starts at 0, does not decrease and ends at `total`, the dimension called
/// `total_name`. On CUDA nothing is read: the kernels clamp the values.
void check_offsets(const StableChecks& checks, const Tensor& cu_seqlens, const char* total_name,
                   int64_t total);

}  // namespace mamba_ssm::ops
