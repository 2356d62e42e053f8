// Packed sequences given as offsets, for ops that read ids.
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/where.h>
#include <mamba_ssm/ops.h>

namespace mamba_ssm {

at::Tensor sequence_ids(const at::Tensor& cu_seqlens, const c10::SymInt& seqlen,
                        const std::optional<at::Tensor>& seq_idx) {
  const at::Tensor ends =
      cu_seqlens.narrow_symint(0, 1, cu_seqlens.sym_size(0) - 1).to(at::kLong).contiguous();
  const at::Tensor tokens = at::arange(seqlen, ends.options());
  const at::Tensor number =
      at::searchsorted(ends, tokens, /*out_int32=*/false, /*right=*/true).unsqueeze(0);
  if (!seq_idx || seqlen == 0) return number;
  // Ids below `span` in every sequence, moved apart from sequence to sequence.
  const at::Tensor span = seq_idx->amax().to(at::kLong) + 1;
  return at::where(*seq_idx < 0, -1, number * span + *seq_idx);
}

}  // namespace mamba_ssm
