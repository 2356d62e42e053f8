/// @file
/// A language model of Mamba or Mamba-2 blocks: the twin of MambaLMHeadModel in Python, with the
/// same config.json and the same names of parameters.
#pragma once

#include <mamba_ssm/export.h>
#include <mamba_ssm/generation.h>
#include <mamba_ssm/nn/block.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/embedding.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace mamba_ssm {

/// Options of the language model; the defaults are those of config.json.
struct MAMBA_SSM_API MambaLMConfig {
  /// Reads config.json, that of mamba_ssm 1.x too, which lacks the later keys; null stands for an
  /// empty ssm_cfg or attn_layer_idx. Raises std::runtime_error, naming the key, for a missing
  /// d_model, n_layer or vocab_size, for an unknown key, a value of the wrong type or out of range,
  /// and for what this model does not have: attention layers, MLPs, layers other than "Mamba1" and
  /// "Mamba2".
  static MambaLMConfig from_file(const std::filesystem::path& path);

  /// The text of config.json, readable by Python's MambaConfig too.
  std::string to_json() const;

  /// Width of the residual stream.
  TORCH_ARG(int64_t, d_model) = 2560;
  /// Number of blocks.
  TORCH_ARG(int64_t, n_layer) = 64;
  /// Number of tokens; the embedding has this many rows, rounded up to pad_vocab_size_multiple.
  TORCH_ARG(int64_t, vocab_size) = 50277;
  /// What the embedding's rows are a multiple of.
  TORCH_ARG(int64_t, pad_vocab_size_multiple) = 8;
  /// Options of the mixer of every block. Its d_model, dtype and device are taken from here
  /// instead.
  TORCH_ARG(MixerOptions, ssm_cfg) = MambaOptions(0);
  /// RMS norm instead of layer norm.
  TORCH_ARG(bool, rms_norm) = true;
  /// Added to the variance in every norm; not part of config.json.
  TORCH_ARG(double, norm_epsilon) = 1e-5;
  /// Keeps the residual stream in float32 in a 16-bit model.
  TORCH_ARG(bool, residual_in_fp32) = true;
  /// Accepted for config.json's sake; the result does not depend on it.
  TORCH_ARG(bool, fused_add_norm) = true;
  /// The head multiplies by the embedding instead of a matrix of its own.
  TORCH_ARG(bool, tie_embeddings) = true;
  /// Type of the parameters (A_log and D: see MambaImpl, Mamba2Impl); absent: torch's default
  /// dtype.
  TORCH_ARG(std::optional<at::ScalarType>, dtype) = std::nullopt;
  /// Device of the parameters; absent: the CPU.
  TORCH_ARG(std::optional<at::Device>, device) = std::nullopt;

 public:
  /// Rows of the embedding: vocab_size rounded up.
  int64_t padded_vocab_size() const;
};

/// Everything but the head: embedding, layers, norm_f.
class MAMBA_SSM_API MixerModelImpl : public torch::nn::Cloneable<MixerModelImpl> {
 public:
  /// Raises c10::Error for a config that is out of range.
  explicit MixerModelImpl(MambaLMConfig config_);

  /// Makes the parameters and draws them anew; clone() calls it.
  void reset() override;

  /// input_ids (batch, seqlen), int32 or int64 -> (batch, seqlen, d_model). `states`: one per
  /// layer, or nullptr. `seq_idx`: as in MambaImpl::forward.
  at::Tensor forward(const at::Tensor& input_ids, std::vector<MambaState>* states = nullptr,
                     const std::optional<at::Tensor>& seq_idx = std::nullopt);

  MambaLMConfig config;  ///< As given.

  torch::nn::Embedding embedding{nullptr};  ///< (padded_vocab_size, d_model)
  torch::nn::ModuleList layers{nullptr};    ///< n_layer Blocks
  Norm norm_f{nullptr};                     ///< Before the head.
};
TORCH_MODULE(MixerModel);

/// The language model: tokens in, logits of the next token out.
///
///     MambaLMHeadModel model = MambaLMHeadModelImpl::from_pretrained("checkpoint");
///     at::Tensor sequences = model->generate(prompt, GenerateOptions(/*max_length=*/100));
///
/// Initialised as published: embedding N(0, 0.02), every out_proj divided by sqrt(n_layer).
/// Source: Mamba (arXiv 2312.00752), section 3.4.
class MAMBA_SSM_API MambaLMHeadModelImpl : public torch::nn::Cloneable<MambaLMHeadModelImpl> {
 public:
  /// Raises c10::Error for a config that is out of range.
  explicit MambaLMHeadModelImpl(MambaLMConfig config_);

  /// Makes the parameters and draws them anew; clone() calls it.
  void reset() override;

  /// input_ids (batch, seqlen), int32 or int64, each below padded_vocab_size -> logits (batch,
  /// seqlen, padded_vocab_size), or of the last num_last_tokens tokens only if that is positive.
  ///
  /// With `states`, one per layer, the tokens continue the sequences that the states have seen, and
  /// the states are updated in place (see MambaImpl::forward, and there also seq_idx).
  at::Tensor forward(const at::Tensor& input_ids, std::vector<MambaState>* states = nullptr,
                     int64_t num_last_tokens = 0,
                     const std::optional<at::Tensor>& seq_idx = std::nullopt);

  /// States of zeros, one per layer; see MambaImpl::allocate_inference_cache.
  std::vector<MambaState> allocate_inference_cache(
      int64_t batch_size, int64_t max_seqlen = 0,
      std::optional<at::ScalarType> dtype = std::nullopt,
      std::optional<at::ScalarType> state_dtype = std::nullopt) const;

  /// Continues each row of input_ids (batch, seqlen), int32 or int64, until it has max_length
  /// tokens or emits eos_token_id: (batch, total length), int64, with the prompts. Prompts of
  /// max_length tokens or more come back as they are. Raises c10::Error for options out of range.
  at::Tensor generate(const at::Tensor& input_ids, const GenerateOptions& options);

  /// Reads config.json and the weights in `folder`, as written by save_pretrained here or in
  /// Python: model.safetensors, or else the shards that model.safetensors.index.json lists. The
  /// parameters get `dtype` (absent: torch's default dtype) whatever the file holds. A GPU loads
  /// the kernels of torch, too, that a first `generate` would wait for. Raises
  /// std::runtime_error if a file is missing, malformed, or does not fit the other (c10::Error if
  /// it asks for a Mamba block that cannot be).
  static std::shared_ptr<MambaLMHeadModelImpl> from_pretrained(
      const std::filesystem::path& folder, std::optional<at::ScalarType> dtype = std::nullopt,
      std::optional<at::Device> device = std::nullopt);

  /// Writes config.json and model.safetensors into `folder`, which is created if it is not there.
  void save_pretrained(const std::filesystem::path& folder) const;

  MambaLMConfig config;  ///< As given.

  MixerModel backbone{nullptr};        ///< All but the head.
  torch::nn::Linear lm_head{nullptr};  ///< empty with tie_embeddings
};
TORCH_MODULE(MambaLMHeadModel);

}  // namespace mamba_ssm
