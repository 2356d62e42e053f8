/// @file
/// One layer of a language model: residual addition, norm and a Mamba or Mamba-2 block. The twin of
/// mamba_ssm.modules.block.Block in Python without an MLP, with the same names of parameters.
#pragma once

#include <mamba_ssm/export.h>
#include <mamba_ssm/nn/mamba.h>
#include <mamba_ssm/nn/mamba2.h>
#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <variant>

namespace mamba_ssm {

/// Options of the mixer of a block, which is of the kind that they are for.
using MixerOptions = std::variant<MambaOptions, Mamba2Options>;

/// RMS norm (parameter `weight`) or layer norm (`weight`, `bias`) over the last dimension, fused
/// with the addition before it. Computed in at least float32; the result has the dtype of hidden.
/// Source: RMSNorm (arXiv 1910.07467).
class MAMBA_SSM_API NormImpl : public torch::nn::Cloneable<NormImpl> {
 public:
  /// Over `size_` channels; epsilon_ is added to the variance. Parameters have torch's default
  /// dtype and are on the CPU: weight 1, bias 0.
  NormImpl(int64_t size_, bool rms_norm_, double epsilon_ = 1e-5);

  /// Makes the parameters and draws them anew; clone() calls it.
  void reset() override;

  /// residual <- residual + hidden, at least float32 if residual_in_fp32; returns its norm.
  /// hidden is (..., size); an undefined residual counts as 0.
  at::Tensor forward(const at::Tensor& hidden, at::Tensor& residual, bool residual_in_fp32 = false);

  int64_t size;    ///< Channels.
  bool rms_norm;   ///< RMS norm, else layer norm.
  double epsilon;  ///< Added to the variance.

  at::Tensor weight;  ///< (size)
  at::Tensor bias;    ///< (size); undefined for RMS norm
};
/// Shared handle of a NormImpl.
TORCH_MODULE(Norm);

/// Options of a Block; the defaults are those of Python's.
///
///     Block block(BlockOptions(Mamba2Options(1024)).rms_norm(true));
struct BlockOptions {
  /// The mixer's options have the width of the block, and dtype and device of its norm too.
  /* implicit */ BlockOptions(MixerOptions mixer) : mixer_(std::move(mixer)) {}

  /// What is between norm and residual addition: Mamba or Mamba2.
  TORCH_ARG(MixerOptions, mixer);
  /// RMS norm instead of layer norm.
  TORCH_ARG(bool, rms_norm) = false;
  /// Added to the variance in the norm.
  TORCH_ARG(double, norm_epsilon) = 1e-5;
  /// Keeps the residual stream in float32 in a 16-bit model.
  TORCH_ARG(bool, residual_in_fp32) = false;
};

/// One layer: residual <- residual + hidden, hidden <- mixer(norm(residual)).
class MAMBA_SSM_API BlockImpl : public torch::nn::Cloneable<BlockImpl> {
 public:
  /// Raises c10::Error for an option that is out of range.
  explicit BlockImpl(BlockOptions options_);

  /// Makes the parameters and draws them anew; clone() calls it.
  void reset() override;

  /// hidden_states (batch, seqlen, d_model) -> the same shape. `residual` is undefined before the
  /// first layer, and is replaced. `state`, `seq_idx`: as in MambaImpl::forward.
  at::Tensor forward(const at::Tensor& hidden_states, at::Tensor& residual,
                     MambaState* state = nullptr,
                     const std::optional<at::Tensor>& seq_idx = std::nullopt);

  /// A state of zeros; see MambaImpl::allocate_inference_cache.
  MambaState allocate_inference_cache(
      int64_t batch_size, int64_t max_seqlen = 0,
      std::optional<at::ScalarType> dtype = std::nullopt,
      std::optional<at::ScalarType> state_dtype = std::nullopt) const;

  BlockOptions options;  ///< As given.

  Norm norm{nullptr};                                 ///< Before the mixer.
  std::variant<Mamba, Mamba2> mixer{Mamba(nullptr)};  ///< Of the kind that the options are for.
};
/// Shared handle of a BlockImpl.
TORCH_MODULE(Block);

}  // namespace mamba_ssm
