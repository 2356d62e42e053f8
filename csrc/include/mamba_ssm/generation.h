/// @file
/// Generation: how a token is drawn from logits, and the options of MambaLMHeadModel::generate. The
/// twin of mamba_ssm.utils.generation in Python: equal generators draw equal tokens.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <mamba_ssm/export.h>
#include <torch/arg.h>

#include <cstdint>
#include <functional>
#include <optional>

namespace mamba_ssm {

/// Sets to -inf, in place, every token less probable than min_p times the most probable one.
/// logits (..., vocab). A min_p that is not in (0, 1] does nothing. Source: arXiv 2407.01082.
MAMBA_SSM_API void modify_logits_for_min_p_filtering(const at::Tensor& logits, double min_p);

/// Sets to -inf, in place, every token less probable than the top_k most probable ones.
/// logits (..., vocab). Tokens as probable as the last of them stay too. top_k <= 0 does nothing.
MAMBA_SSM_API void modify_logits_for_top_k_filtering(const at::Tensor& logits, int64_t top_k);

/// Sets to -inf, in place, all but the most probable tokens whose sum reaches top_p.
/// logits (..., vocab). Of equally probable tokens those of lower index stay. A top_p that is not
/// in (0, 1) does nothing. Source: nucleus sampling (arXiv 1904.09751).
MAMBA_SSM_API void modify_logits_for_top_p_filtering(const at::Tensor& logits, double top_p);

/// Makes tokens that occurred less probable, in place, and returns logits.
/// logits (batch, vocab), prev_output_tokens (batch, seqlen), int64. A positive logit is divided by
/// the penalty and a negative one multiplied, once however often the token occurred.
/// Source: CTRL (arXiv 1909.05858), section 4.1.
MAMBA_SSM_API at::Tensor modify_logit_for_repetition_penalty(const at::Tensor& logits,
                                                             const at::Tensor& prev_output_tokens,
                                                             double repetition_penalty = 1);

/// A token for each row: logits (batch, vocab) -> (batch), int64. logits stay as they are.
///
/// top_k = 1 takes the most probable one. Else the logits are divided by the temperature; the top_k
/// most probable tokens stay (0: all), of these the nucleus of top_p (0: all), of these the ones at
/// least min_p times as probable as the best; and one of them is drawn, with the generator of the
/// logits' device (absent: the default one). Raises c10::Error for top_p or min_p above 1 and for a
/// temperature that is not positive.
///
/// The draw inverts the cumulative distribution at a uniform number in float64.
MAMBA_SSM_API at::Tensor sample(const at::Tensor& logits, int64_t top_k = 1, double top_p = 0,
                                double min_p = 0, double temperature = 1,
                                const std::optional<at::Generator>& generator = std::nullopt);

/// Options of MambaLMHeadModel::generate.
///
///     GenerateOptions(100).top_k(0).temperature(0.8).generator(
///         at::make_generator<at::CPUGeneratorImpl>(seed))
struct GenerateOptions {
  /// Receives tokens (batch, 1), int64, on the CPU.
  using OnTokens = std::function<void(const at::Tensor&)>;
  /// Whether to stop.
  using ShouldStop = std::function<bool()>;

  /// Greedy decoding until rows have max_length tokens.
  /* implicit */ GenerateOptions(int64_t max_length) : max_length_(max_length) {}

  /// Tokens of a row, those of its prompt included.
  TORCH_ARG(int64_t, max_length);
  /// Draws of the top_k most probable tokens; 1: the most probable one; 0: all. See `sample`.
  TORCH_ARG(int64_t, top_k) = 1;
  /// Draws of the most probable tokens whose sum reaches top_p; 0: all.
  TORCH_ARG(double, top_p) = 0;
  /// Draws of the tokens at least min_p times as probable as the best one; 0: all.
  TORCH_ARG(double, min_p) = 0;
  /// Divides the logits.
  TORCH_ARG(double, temperature) = 1;
  /// Of the model's device; absent: its default one.
  TORCH_ARG(std::optional<at::Generator>, generator) = std::nullopt;
  /// For tokens of prompt and continuation: see `modify_logit_for_repetition_penalty`.
  TORCH_ARG(double, repetition_penalty) = 1;
  /// Ends a row; the other rows go on.
  TORCH_ARG(std::optional<int64_t>, eos_token_id) = std::nullopt;
  /// (batch), integers: row i is a prompt of lengths[i] tokens and what follows them is not looked
  /// at. Each row continues behind its own prompt, as it would alone.
  TORCH_ARG(std::optional<at::Tensor>, lengths) = std::nullopt;
  /// Behind the end of rows that end early; absent: eos_token_id, or else 0.
  TORCH_ARG(std::optional<int64_t>, pad_token_id) = std::nullopt;
  /// No token from here on, those of the padded vocabulary, is drawn.
  TORCH_ARG(std::optional<int64_t>, vocab_size) = std::nullopt;
  /// Tokens of the prompt per call of the model; absent: all in one.
  TORCH_ARG(std::optional<int64_t>, prefill_chunk_size) = std::nullopt;
  /// Of the scan's states; absent: that of the weights.
  TORCH_ARG(std::optional<at::ScalarType>, state_dtype) = std::nullopt;
  /// On a GPU, runs a step of the model as one CUDA graph, which is captured at the start of the
  /// generation. No effect on a CPU. Needs torch 2.13 or newer.
  TORCH_ARG(bool, cg) = false;
  /// Gets the new tokens (batch, 1), on the CPU, as they arise.
  TORCH_ARG(OnTokens, on_tokens);
  /// Asked before each token; true ends the generation with the tokens that there are.
  TORCH_ARG(ShouldStop, should_stop);
};

}  // namespace mamba_ssm
