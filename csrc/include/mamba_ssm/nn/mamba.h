/// @file
/// The Mamba block as a torch::nn module: the twin of mamba_ssm.Mamba in Python, with the same
/// arguments, initialisation, parameter names, shapes and dtypes.
#pragma once

#include <mamba_ssm/export.h>
#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <optional>
#include <ostream>
#include <string>

namespace mamba_ssm {

/// Options of the Mamba block.
///
///     Mamba block(MambaOptions(256).d_state(16).dtype(torch::kBFloat16));
struct MambaOptions {
  /// The defaults, for tokens of d_model numbers.
  /* implicit */ MambaOptions(int64_t d_model) : d_model_(d_model) {}

  /// Width of the tokens that go in and come out.
  TORCH_ARG(int64_t, d_model);
  /// States per channel.
  TORCH_ARG(int64_t, d_state) = 16;
  /// Taps of the causal convolution.
  TORCH_ARG(int64_t, d_conv) = 4;
  /// Channels per token inside the block: d_inner = int(expand * d_model).
  TORCH_ARG(double, expand) = 2;
  /// Rank of the projection to delta; absent ("auto"): ceil(d_model / 16).
  TORCH_ARG(std::optional<int64_t>, dt_rank) = std::nullopt;
  /// softplus(dt_proj.bias) is drawn log-uniformly from [dt_min, dt_max], not below dt_init_floor.
  TORCH_ARG(double, dt_min) = 0.001;
  /// See dt_min.
  TORCH_ARG(double, dt_max) = 0.1;
  /// See dt_min.
  TORCH_ARG(double, dt_init_floor) = 1e-4;
  /// dt_proj.weight is uniform in [-s, s] ("random") or s ("constant"), s = dt_scale /
  /// sqrt(dt_rank).
  TORCH_ARG(std::string, dt_init) = "random";
  /// See dt_init.
  TORCH_ARG(double, dt_scale) = 1;
  /// Whether the convolution has a bias.
  TORCH_ARG(bool, conv_bias) = true;
  /// Whether in_proj and out_proj have a bias.
  TORCH_ARG(bool, bias) = false;
  /// Type of the parameters (A_log and D: see MambaImpl); absent: torch's default dtype.
  TORCH_ARG(std::optional<at::ScalarType>, dtype) = std::nullopt;
  /// Device of the parameters; absent: the CPU.
  TORCH_ARG(std::optional<at::Device>, device) = std::nullopt;
};

/// What a Mamba block remembers of the tokens it has seen. All zeros: nothing yet.
struct MambaState {
  /// (batch, d_inner, d_conv): the last d_conv inputs of the convolution, oldest first.
  at::Tensor conv_state;
  /// (batch, d_inner, d_state): the state of the scan.
  at::Tensor ssm_state;
};

/// The Mamba block: (batch, seqlen, d_model) -> (batch, seqlen, d_model).
///
///   x, z  = in_proj(hidden)                     z is the gate
///   x     = silu(conv1d(x))                     causal, one filter per channel
///   dt, B, C = x_proj(x)
///   y     = selective_scan(x, dt_proj(dt), -exp(A_log), B, C, D, gate z)
///   out   = out_proj(y)
///
/// Parameters have the dtype of the options, but A_log and D are float32 (float64 in a float64
/// module). They are drawn on the CPU in torch's default dtype and then converted, so that a seed
/// gives the same weights on every device.
/// Source: Mamba (arXiv 2312.00752), section 3.4 and figure 3; initial dt: section 3.6.
class MAMBA_SSM_API MambaImpl : public torch::nn::Cloneable<MambaImpl> {
 public:
  /// Raises c10::Error for an option that is out of range.
  explicit MambaImpl(MambaOptions options_);

  /// Makes the parameters and draws them anew; clone() calls it.
  void reset() override;
  /// Writes name and options, as printing a module does.
  void pretty_print(std::ostream& stream) const override;

  /// hidden_states (batch, seqlen, d_model) in the module's dtype -> the same shape. seq_idx
  /// (batch, seqlen) packs several sequences into a row, as in selective_scan: none sees another,
  /// and tokens with a negative one are padding.
  ///
  /// With `state` the tokens continue the sequence that the state has seen, and the state is
  /// updated in place: a sequence may be given in pieces of any lengths. With seq_idx it is left as
  /// the last sequence of each row has it. Gradients then stop at the state, and a piece of one
  /// token, which runs the decode ops, has none. Raises c10::Error when a shape is wrong, before
  /// the state is touched.
  at::Tensor forward(const at::Tensor& hidden_states, MambaState* state = nullptr,
                     const std::optional<at::Tensor>& seq_idx = std::nullopt);

  /// One token: hidden_states (batch, 1, d_model) -> the same shape. conv_state (batch, d_inner,
  /// d_conv) and ssm_state (batch, d_inner, d_state), each of any floating dtype, are updated in
  /// place. Not differentiable.
  at::Tensor step(const at::Tensor& hidden_states, const at::Tensor& conv_state,
                  const at::Tensor& ssm_state);

  /// step from what in_proj makes of the token, xz (batch, 2 * d_inner); returns (batch, 1,
  /// d_model).
  at::Tensor step_projected(const at::Tensor& xz, const at::Tensor& conv_state,
                            const at::Tensor& ssm_state);

  /// A state of zeros on the module's device, of `dtype` or else of the module's dtype; its
  /// ssm_state of state_dtype if that is given (a 16-bit module decodes long sequences more
  /// accurately with a float32 one). The size of a state does not depend on the length of the
  /// sequence: max_seqlen is there because caches of other layers need it.
  MambaState allocate_inference_cache(
      int64_t batch_size, int64_t max_seqlen = 0,
      std::optional<at::ScalarType> dtype = std::nullopt,
      std::optional<at::ScalarType> state_dtype = std::nullopt) const;

  /// Channels inside the block, int(expand * d_model).
  int64_t d_inner() const;
  /// Rank of the projection to delta.
  int64_t dt_rank() const;

  MambaOptions options;  ///< As given.

  torch::nn::Linear in_proj{nullptr};   ///< (d_model) -> (2 * d_inner): x, z
  torch::nn::Conv1d conv1d{nullptr};    ///< (d_inner), depthwise, d_conv taps
  torch::nn::Linear x_proj{nullptr};    ///< (d_inner) -> (dt_rank + 2 * d_state): dt, B, C
  torch::nn::Linear dt_proj{nullptr};   ///< (dt_rank) -> (d_inner)
  at::Tensor A_log;                     ///< (d_inner, d_state)
  at::Tensor D;                         ///< (d_inner)
  torch::nn::Linear out_proj{nullptr};  ///< (d_inner) -> (d_model)

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(static_cast<MambaState*>(nullptr))},
                           {2, torch::nn::AnyValue(std::optional<at::Tensor>())})

 private:
  at::Tensor project_in(const at::Tensor& hidden_states);
  at::Tensor forward_unfused(const at::Tensor& xz, MambaState* state,
                             const std::optional<at::Tensor>& seq_idx);
  at::Tensor A() const;
  void check_hidden_states(const at::Tensor& hidden_states) const;
  void check_state(const at::Tensor& conv_state, const at::Tensor& ssm_state, int64_t batch) const;
};

/// Shared handle of a MambaImpl, as torch::nn::Linear is of LinearImpl.
TORCH_MODULE(Mamba);

}  // namespace mamba_ssm
