#include <c10/util/Exception.h>
#include <mamba_ssm/nn/mamba.h>
#include <mamba_ssm/ops.h>

#include <cmath>
#include <limits>
#include <utility>

#include "parts.h"

namespace mamba_ssm {
namespace {

using at::Tensor;

/// Whether tokens (batch, seqlen, features) may have a product by step_linear's tiles. Of what the
/// first prompt of a process waits for, the start of torch's library of products is 80 ms (H200,
/// 2026-11-26).
bool is_short_prompt(const Tensor& tokens) {
  constexpr int64_t kMostTokens = 64;
  return tokens.is_cuda() && tokens.element_size() == 2 && !c10::GradMode::is_enabled() &&
         tokens.size(0) * tokens.size(1) <= kMostTokens;
}

/// weight @ token + bias for every token of (batch, seqlen, features), as (batch, rows, seqlen). It
/// is stored as (rows, batch, seqlen): tokens of a channel lie side by side, as convolution and
/// scan walk them, and the transpose of the result is `tokens` for the next product, uncopied. In a
/// short prompt the order of tokens in memory does not matter.
Tensor project_channel_first(const Tensor& tokens, const Tensor& weight,
                             const Tensor& bias = Tensor()) {
  const int64_t batch = tokens.size(0), seqlen = tokens.size(1);
  if (is_short_prompt(tokens)) {
    return step_linear(tokens, weight, if_defined(bias)).transpose(1, 2);
  }
  const Tensor columns = tokens.flatten(0, 1).t();  // (features, batch * seqlen)
  const Tensor projected =
      bias.defined() ? at::addmm(bias.unsqueeze(-1), weight, columns) : at::mm(weight, columns);
  return projected.view({weight.size(0), batch, seqlen}).transpose(0, 1);
}

}  // namespace

MambaImpl::MambaImpl(MambaOptions options_) : options(std::move(options_)) {
  const double width = options.expand() * static_cast<double>(options.d_model());
  TORCH_CHECK(width >= 1 && width <= std::numeric_limits<int32_t>::max(),
              "Mamba: d_inner = int(expand * d_model) must be from 1 to 2^31 - 1, got ", width);
  TORCH_CHECK(
      options.d_model() > 0 && options.d_state() > 0 && options.d_conv() > 0 && dt_rank() > 0,
      "Mamba: d_model, d_state, d_conv and dt_rank must be positive, got ", options.d_model(), ", ",
      options.d_state(), ", ", options.d_conv(), " and ", dt_rank());
  TORCH_CHECK(options.dt_init() == "random" || options.dt_init() == "constant",
              "Mamba: dt_init must be \"random\" or \"constant\", got \"", options.dt_init(), "\"");
  TORCH_CHECK(!options.dtype() || at::isFloatingType(*options.dtype()),
              "Mamba: dtype must be a floating type, got ", *options.dtype());
  // NOLINTNEXTLINE(clang-analyzer-optin.cplusplus.VirtualCall): as in every torch::nn module.
  reset();
}

int64_t MambaImpl::d_inner() const {
  return static_cast<int64_t>(options.expand() * static_cast<double>(options.d_model()));
}

int64_t MambaImpl::dt_rank() const {
  return options.dt_rank().value_or((options.d_model() + 15) / 16);
}

void MambaImpl::reset() {
  const int64_t d_model = options.d_model(), d_state = options.d_state();
  const at::ScalarType dtype = options.dtype().value_or(at::get_default_dtype_as_scalartype());
  const at::ScalarType state_dtype = dtype == at::kDouble ? at::kDouble : at::kFloat;

  in_proj = register_module("in_proj", make_linear(d_model, 2 * d_inner(), options.bias()));
  conv1d = register_module(
      "conv1d", torch::nn::Conv1d(torch::nn::Conv1dOptions(d_inner(), d_inner(), options.d_conv())
                                      .bias(options.conv_bias())
                                      .groups(d_inner())
                                      .padding(options.d_conv() - 1)));
  x_proj =
      register_module("x_proj", make_linear(d_inner(), dt_rank() + 2 * d_state, /*bias=*/false));
  dt_proj = register_module("dt_proj", make_linear(dt_rank(), d_inner()));
  {
    const torch::NoGradGuard no_grad;
    const double s = options.dt_scale() / std::sqrt(static_cast<double>(dt_rank()));
    if (options.dt_init() == "constant") {
      dt_proj->weight.fill_(s);
    } else if (!WithoutFills::active()) {
      dt_proj->weight.uniform_(-s, s);
    }
    dt_proj->bias.copy_(
        draw_dt_bias(d_inner(), options.dt_min(), options.dt_max(), options.dt_init_floor()));
  }
  A_log = register_parameter(
      "A_log",
      at::arange(1, d_state + 1, state_dtype).log().expand({d_inner(), d_state}).contiguous());
  D = register_parameter("D", at::ones({d_inner()}, state_dtype));
  out_proj = register_module("out_proj", make_linear(d_inner(), d_model, options.bias()));

  for (const auto& child : children()) child->to(dtype);
  if (options.device()) to(*options.device());
}

void MambaImpl::pretty_print(std::ostream& stream) const {
  stream << "mamba_ssm::Mamba(d_model=" << options.d_model() << ", d_state=" << options.d_state()
         << ", d_conv=" << options.d_conv() << ", d_inner=" << d_inner()
         << ", dt_rank=" << dt_rank() << ")";
}

Tensor MambaImpl::A() const { return A_of(A_log); }

void MambaImpl::check_hidden_states(const Tensor& hidden_states) const {
  TORCH_CHECK(hidden_states.dim() == 3 && hidden_states.size(2) == options.d_model(),
              "Mamba: hidden_states must have shape (batch, seqlen, d_model=", options.d_model(),
              "), got ", hidden_states.sizes());
}

void MambaImpl::check_state(const Tensor& conv_state, const Tensor& ssm_state,
                            int64_t batch) const {
  const auto check = [&](const Tensor& state, const char* name, const char* last_name,
                         int64_t last) {
    const int64_t expected[] = {batch, d_inner(), last};
    TORCH_CHECK(state.defined() && state.sizes() == at::IntArrayRef(expected), "Mamba: ", name,
                " must have shape (batch, d_inner, ", last_name, ") = ", at::IntArrayRef(expected),
                ", got ", state.defined() ? state.sizes() : at::IntArrayRef());
  };
  check(conv_state, "conv_state", "d_conv", options.d_conv());
  check(ssm_state, "ssm_state", "d_state", options.d_state());
}

Tensor MambaImpl::project_in(const Tensor& hidden_states) {
  return project_channel_first(hidden_states, in_proj->weight, in_proj->bias);
}

Tensor MambaImpl::forward(const Tensor& hidden_states, MambaState* state,
                          const std::optional<Tensor>& seq_idx) {
  check_hidden_states(hidden_states);
  if (state != nullptr) {
    check_state(state->conv_state, state->ssm_state, hidden_states.size(0));
    if (hidden_states.size(1) == 1 && !seq_idx) {
      return step(hidden_states, state->conv_state, state->ssm_state);
    }
  }
  if (state != nullptr || seq_idx) {
    return forward_unfused(project_in(hidden_states), state, seq_idx);
  }
  return mamba_inner(project_in(hidden_states), conv1d->weight, if_defined(conv1d->bias),
                     x_proj->weight, dt_proj->weight, out_proj->weight, if_defined(out_proj->bias),
                     A(), /*B=*/std::nullopt, /*C=*/std::nullopt, D, dt_proj->bias);
}

Tensor MambaImpl::forward_unfused(const Tensor& xz, MambaState* state,
                                  const std::optional<Tensor>& seq_idx) {
  const int64_t seqlen = xz.size(2), width = options.d_conv();
  const Tensor inputs = xz.narrow(1, 0, d_inner());     // (batch, d_inner, seqlen)
  const Tensor z = xz.narrow(1, d_inner(), d_inner());  // (batch, d_inner, seqlen)

  std::optional<Tensor> past, history, initial_state;
  if (state != nullptr) {
    past = read_cache(state->conv_state, inputs.scalar_type());
    history = past->narrow(2, 1, width - 1);
    initial_state =
        read_cache(state->ssm_state, xz.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  }
  const auto [x, final_states] =
      causal_conv1d(inputs, conv1d->weight.squeeze(1), if_defined(conv1d->bias), seq_idx, history,
                    /*silu=*/true);

  const auto projected =
      project_channel_first(x.transpose(1, 2), x_proj->weight, x_proj->bias)
          .split_with_sizes({dt_rank(), options.d_state(), options.d_state()}, 1);
  const Tensor delta = project_channel_first(projected[0].transpose(1, 2), dt_proj->weight);
  const auto [y, last_state] =
      selective_scan(x, delta, A(), /*B=*/projected[1], /*C=*/projected[2], D, z, dt_proj->bias,
                     initial_state, seq_idx, /*delta_softplus=*/true);
  const Tensor out = project_step(out_proj, y.transpose(1, 2));
  if (state == nullptr) return out;

  const torch::NoGradGuard no_grad;
  if (seq_idx) {  // of the last sequence
    state->conv_state.copy_(at::constant_pad_nd(final_states, {1, 0}));
  } else {
    state->conv_state.copy_(seqlen >= width
                                ? inputs.narrow(2, seqlen - width, width)
                                : at::cat({past->narrow(2, seqlen, width - seqlen), inputs}, 2));
  }
  state->ssm_state.copy_(last_state);
  return out;
}

Tensor MambaImpl::step(const Tensor& hidden_states, const Tensor& conv_state,
                       const Tensor& ssm_state) {
  check_hidden_states(hidden_states);
  TORCH_CHECK(hidden_states.size(1) == 1, "Mamba: step takes one token per row, got ",
              hidden_states.size(1));
  return step_projected(project_step(in_proj, hidden_states.squeeze(1)), conv_state, ssm_state);
}

Tensor MambaImpl::step_projected(const Tensor& xz, const Tensor& conv_state,
                                 const Tensor& ssm_state) {
  check_state(conv_state, ssm_state, xz.size(0));
  const Tensor inputs = xz.narrow(1, 0, d_inner());
  const Tensor z = xz.narrow(1, d_inner(), d_inner());

  // The op wants activations and their cache of one type; another type goes through a copy.
  // Detached, so that no autograd history settles in the caller's states.
  const Tensor past = conv_state.detach().to(inputs.scalar_type());
  const Tensor x = causal_conv1d_update(inputs, past, conv1d->weight.squeeze(1),
                                        if_defined(conv1d->bias), /*cache_seqlens=*/std::nullopt,
                                        /*conv_state_indices=*/std::nullopt, /*silu=*/true);
  if (!past.is_alias_of(conv_state)) conv_state.detach().copy_(past);

  const auto projected = project_step(x_proj, x).split_with_sizes(
      {dt_rank(), options.d_state(), options.d_state()}, -1);
  const Tensor delta = step_linear(projected[0], dt_proj->weight);
  const auto [A, A_is_log] = A_of_step(A_log);
  const Tensor y = selective_state_update(
      ssm_state.detach(), x, delta, A, projected[1], projected[2], D, z, dt_proj->bias,
      /*state_batch_indices=*/std::nullopt, /*dt_softplus=*/true,
      /*intermediate_states=*/std::nullopt, A_is_log);
  return project_step(out_proj, y).unsqueeze(1);
}

MambaState MambaImpl::allocate_inference_cache(int64_t batch_size, int64_t /*max_seqlen*/,
                                               std::optional<at::ScalarType> dtype,
                                               std::optional<at::ScalarType> state_dtype) const {
  TORCH_CHECK(batch_size >= 0, "Mamba: batch_size must not be negative, got ", batch_size);
  const auto zeros = [&](int64_t size, at::ScalarType type) {
    return at::zeros({batch_size, d_inner(), size}, at::device(D.device()).dtype(type));
  };
  const at::ScalarType type = dtype.value_or(conv1d->weight.scalar_type());
  return {zeros(options.d_conv(), type), zeros(options.d_state(), state_dtype.value_or(type))};
}

}  // namespace mamba_ssm
