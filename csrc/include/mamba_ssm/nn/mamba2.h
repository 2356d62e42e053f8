/// @file
/// The Mamba-2 block as a torch::nn module: the twin of mamba_ssm.Mamba2 in Python, with the same
/// arguments, initialisation, parameter names, shapes and dtypes.
#pragma once

#include <mamba_ssm/export.h>
#include <mamba_ssm/nn/mamba.h>
#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <ostream>
#include <utility>

namespace mamba_ssm {

/// Options of the Mamba-2 block.
///
///     Mamba2 block(Mamba2Options(1024).d_state(64).dtype(torch::kBFloat16));
struct Mamba2Options {
  /// Lower and upper end.
  using Range = std::pair<double, double>;

  /// The defaults, for tokens of d_model numbers.
  /* implicit */ Mamba2Options(int64_t d_model) : d_model_(d_model) {}

  /// Width of the tokens that go in and come out.
  TORCH_ARG(int64_t, d_model);
  /// States per channel.
  TORCH_ARG(int64_t, d_state) = 128;
  /// Taps of the causal convolution.
  TORCH_ARG(int64_t, d_conv) = 4;
  /// conv1d.weight is uniform in [-conv_init, conv_init]; absent: torch's default.
  TORCH_ARG(std::optional<double>, conv_init) = std::nullopt;
  /// Channels per token inside the block: d_inner = int(expand * d_model).
  TORCH_ARG(double, expand) = 2;
  /// Channels per head; divides d_ssm.
  TORCH_ARG(int64_t, headdim) = 64;
  /// Channels of the scan; absent: all d_inner. The others pass a gated MLP, silu(z0) x0.
  TORCH_ARG(std::optional<int64_t>, d_ssm) = std::nullopt;
  /// Groups of heads that share B and C, and of channels that are normalized together.
  TORCH_ARG(int64_t, ngroups) = 1;
  /// exp(A_log) is drawn uniformly from this range.
  TORCH_ARG(Range, A_init_range) = Range(1, 16);
  /// D has a number for each channel instead of each head.
  TORCH_ARG(bool, D_has_hdim) = false;
  /// Normalizes behind the scan, and there before the gate instead of after it.
  TORCH_ARG(bool, rmsnorm) = true;
  /// See rmsnorm.
  TORCH_ARG(bool, norm_before_gate) = false;
  /// softplus(dt_bias) is drawn log-uniformly from [dt_min, dt_max], not below dt_init_floor.
  TORCH_ARG(double, dt_min) = 0.001;
  /// See dt_min.
  TORCH_ARG(double, dt_max) = 0.1;
  /// See dt_min.
  TORCH_ARG(double, dt_init_floor) = 1e-4;
  /// Steps of the scan are clamped to this range.
  TORCH_ARG(Range, dt_limit) = Range(0, std::numeric_limits<double>::infinity());
  /// Whether in_proj and out_proj have a bias.
  TORCH_ARG(bool, bias) = false;
  /// Whether the convolution has a bias.
  TORCH_ARG(bool, conv_bias) = true;
  /// Type of the parameters (D: see Mamba2Impl); absent: torch's default dtype.
  TORCH_ARG(std::optional<at::ScalarType>, dtype) = std::nullopt;
  /// Device of the parameters; absent: the CPU.
  TORCH_ARG(std::optional<at::Device>, device) = std::nullopt;
};

/// rms_norm_gated with a parameter weight (channels).
class MAMBA_SSM_API RmsNormGatedImpl : public torch::nn::Cloneable<RmsNormGatedImpl> {
 public:
  /// Statistics are those of each run of group_size_ channels, which divides channels_. The weight
  /// is 1, of torch's default dtype, on the CPU.
  RmsNormGatedImpl(int64_t channels_, int64_t group_size_, bool norm_before_gate_);

  /// Makes the parameters and draws them anew; clone() calls it.
  void reset() override;

  /// x and gate z (..., channels), of one dtype -> the same shape and dtype.
  at::Tensor forward(const at::Tensor& x, const at::Tensor& z);

  static constexpr double kEpsilon = 1e-5;  ///< Added to the variance.

  int64_t channels;       ///< As given.
  int64_t group_size;     ///< As given.
  bool norm_before_gate;  ///< Normalizes x, else x silu(z).

  at::Tensor weight;  ///< (channels)
};
TORCH_MODULE(RmsNormGated);

/// The Mamba-2 block: (batch, seqlen, d_model) -> (batch, seqlen, d_model).
///
///   z0, x0, z, xBC, dt = in_proj(u)              z0, x0 of d_inner - d_ssm channels
///   x, B, C = silu(conv1d(xBC))                  causal, one filter per channel
///   y       = ssd_chunk_scan(x, dt, -exp(A_log), B, C, D, dt_bias)
///   y       = norm(y, gate z), or y silu(z) without a norm
///   out     = out_proj([silu(z0) x0, y])
///
/// Parameters have the dtype of the options, but D is float32 (float64 in a float64 module). They
/// are drawn on the CPU in torch's default dtype and then converted, so that a seed gives the same
/// weights on every device. Source: Mamba-2 (arXiv 2405.21060), section 7.
class MAMBA_SSM_API Mamba2Impl : public torch::nn::Cloneable<Mamba2Impl> {
 public:
  /// Raises c10::Error for an option that is out of range.
  explicit Mamba2Impl(Mamba2Options options_);

  /// Makes the parameters and draws them anew; clone() calls it.
  void reset() override;
  /// Writes name and options, as printing a module does.
  void pretty_print(std::ostream& stream) const override;

  /// u (batch, seqlen, d_model) in the module's dtype -> the same shape. seq_idx (batch, seqlen) or
  /// cu_seqlens (num_sequences + 1), with batch 1, pack several sequences into a row, as in
  /// ssd_chunk_scan: none sees another.
  ///
  /// With `state` the tokens continue the sequences that the state has seen, and the state is
  /// updated in place: a sequence may be given in pieces of any lengths. With cu_seqlens the state
  /// has a row for each sequence, and seq_idx is not looked at. Gradients stop at the state, and a
  /// piece of one token, which runs the decode ops, has none. Raises c10::Error when a shape is
  /// wrong, before the state is touched.
  at::Tensor forward(const at::Tensor& u, MambaState* state = nullptr,
                     const std::optional<at::Tensor>& seq_idx = std::nullopt,
                     const std::optional<at::Tensor>& cu_seqlens = std::nullopt);

  /// One token: hidden_states (batch, 1, d_model) -> the same shape. conv_state (batch, channels,
  /// d_conv) and ssm_state (batch, nheads, headdim, d_state), each of any floating dtype, are
  /// updated in place. Not differentiable.
  at::Tensor step(const at::Tensor& hidden_states, const at::Tensor& conv_state,
                  const at::Tensor& ssm_state);

  /// step from what in_proj makes of the token, zxbcdt (batch, d_in_proj); returns (batch, 1,
  /// d_model).
  at::Tensor step_projected(const at::Tensor& zxbcdt, const at::Tensor& conv_state,
                            const at::Tensor& ssm_state);

  /// A state of zeros; see MambaImpl::allocate_inference_cache.
  MambaState allocate_inference_cache(
      int64_t batch_size, int64_t max_seqlen = 0,
      std::optional<at::ScalarType> dtype = std::nullopt,
      std::optional<at::ScalarType> state_dtype = std::nullopt) const;

  /// Channels inside the block: int(expand * d_model).
  int64_t d_inner() const;
  /// Channels of the scan.
  int64_t d_ssm() const;
  /// Heads of the scan: d_ssm / headdim.
  int64_t nheads() const;
  /// Channels of the convolution: d_ssm + 2 * ngroups * d_state.
  int64_t channels() const;

  Mamba2Options options;  ///< As given.

  torch::nn::Linear in_proj{nullptr};   ///< (d_model) -> z0, x0, z, x, B, C, dt
  torch::nn::Conv1d conv1d{nullptr};    ///< (channels), depthwise, d_conv taps
  at::Tensor dt_bias;                   ///< (nheads)
  at::Tensor A_log;                     ///< (nheads)
  at::Tensor D;                         ///< (nheads), or (d_ssm) with D_has_hdim
  RmsNormGated norm{nullptr};           ///< (d_ssm); empty without rmsnorm
  torch::nn::Linear out_proj{nullptr};  ///< (d_inner) -> (d_model)

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(static_cast<MambaState*>(nullptr))},
                           {2, torch::nn::AnyValue(std::optional<at::Tensor>())},
                           {3, torch::nn::AnyValue(std::optional<at::Tensor>())})

 private:
  struct Parts;
  Parts split(const at::Tensor& zxbcdt) const;
  at::Tensor prefill(const at::Tensor& u, MambaState& state,
                     const std::optional<at::Tensor>& seq_idx,
                     const std::optional<at::Tensor>& cu_seqlens);
  at::Tensor gate(const Parts& parts, const at::Tensor& y);
  at::Tensor A() const;
  at::Tensor D_by_head() const;
  std::optional<double> dt_upper_limit() const;
  void check_tokens(const char* name, const at::Tensor& tokens) const;
  void check_state(const at::Tensor& conv_state, const at::Tensor& ssm_state, int64_t batch) const;
};

/// Shared handle of a Mamba2Impl, as torch::nn::Linear is of LinearImpl.
TORCH_MODULE(Mamba2);

}  // namespace mamba_ssm
