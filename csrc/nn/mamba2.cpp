#include <c10/util/Exception.h>
#include <mamba_ssm/nn/mamba2.h>
#include <mamba_ssm/ops.h>

#include <cmath>
#include <limits>
#include <tuple>
#include <utility>

#include "parts.h"

namespace mamba_ssm {
namespace {

using at::Tensor;

/// Packed sequences with their past in front of each.
struct BehindHistory {
  Tensor x;           // (1, dim, seqlen + num_sequences * n)
  Tensor cu_seqlens;  // of that
  Tensor tokens;      // (seqlen), where in it the tokens are

  /// tokens_ (1, dim, seqlen) of the sequences of cu_seqlens_, history (num_sequences, dim, n).
  BehindHistory(const Tensor& tokens_, const Tensor& history, const Tensor& cu_seqlens_) {
    const int64_t count = history.size(0), dim = history.size(1), n = history.size(2);
    const int64_t seqlen = tokens_.size(2);
    const auto index = cu_seqlens_.options().dtype(at::kLong);
    cu_seqlens = cu_seqlens_.to(at::kLong) + n * at::arange(count + 1, index);
    const Tensor ids = sequence_ids(cu_seqlens_, seqlen)[0].clamp_max(count - 1);
    tokens = at::arange(seqlen, index) + n * (ids + 1);
    const Tensor past =
        (cu_seqlens.narrow(0, 0, count).unsqueeze(1) + at::arange(n, index)).flatten();
    x = at::zeros({1, seqlen + n * count, dim}, tokens_.options())
            .index_copy(1, tokens, tokens_.transpose(1, 2))
            .index_copy(1, past, history.transpose(1, 2).flatten(0, 1).unsqueeze(0))
            .transpose(1, 2);
  }
};

}  // namespace

RmsNormGatedImpl::RmsNormGatedImpl(int64_t channels_, int64_t group_size_, bool norm_before_gate_)
    : channels(channels_), group_size(group_size_), norm_before_gate(norm_before_gate_) {
  reset();
}

void RmsNormGatedImpl::reset() { weight = register_parameter("weight", at::ones({channels})); }

Tensor RmsNormGatedImpl::forward(const Tensor& x, const Tensor& z) {
  return rms_norm_gated(x, weight, /*bias=*/std::nullopt, z, kEpsilon, group_size,
                        norm_before_gate);
}

Mamba2Impl::Mamba2Impl(Mamba2Options options_) : options(std::move(options_)) {
  const double width = options.expand() * static_cast<double>(options.d_model());
  TORCH_CHECK(width >= 1 && width <= std::numeric_limits<int32_t>::max(),
              "Mamba2: d_inner = int(expand * d_model) must be from 1 to 2^31 - 1, got ", width);
  TORCH_CHECK(options.d_model() > 0 && options.d_state() > 0 && options.d_conv() > 0,
              "Mamba2: d_model, d_state and d_conv must be positive, got ", options.d_model(), ", ",
              options.d_state(), " and ", options.d_conv());
  TORCH_CHECK(d_ssm() > 0 && d_ssm() <= d_inner(),
              "Mamba2: d_ssm must be from 1 to d_inner = ", d_inner(), ", got ", d_ssm());
  TORCH_CHECK(options.headdim() > 0 && d_ssm() % options.headdim() == 0,
              "Mamba2: headdim must divide d_ssm = ", d_ssm(), ": pass headdim(...), got ",
              options.headdim());
  TORCH_CHECK(options.ngroups() > 0 && nheads() % options.ngroups() == 0,
              "Mamba2: ngroups must divide the number of heads, d_ssm / headdim = ", nheads(),
              ", got ", options.ngroups());
  TORCH_CHECK(!options.dtype() || at::isFloatingType(*options.dtype()),
              "Mamba2: dtype must be a floating type, got ", *options.dtype());
  // NOLINTNEXTLINE(clang-analyzer-optin.cplusplus.VirtualCall): as in every torch::nn module.
  reset();
}

int64_t Mamba2Impl::d_inner() const {
  return static_cast<int64_t>(options.expand() * static_cast<double>(options.d_model()));
}

int64_t Mamba2Impl::d_ssm() const { return options.d_ssm().value_or(d_inner()); }

int64_t Mamba2Impl::nheads() const { return d_ssm() / options.headdim(); }

int64_t Mamba2Impl::channels() const { return d_ssm() + 2 * options.ngroups() * options.d_state(); }

void Mamba2Impl::reset() {
  const int64_t d_model = options.d_model();
  const at::ScalarType dtype = options.dtype().value_or(at::get_default_dtype_as_scalartype());
  const at::ScalarType state_dtype = dtype == at::kDouble ? at::kDouble : at::kFloat;

  const int64_t d_in_proj = 2 * d_inner() - d_ssm() + channels() + nheads();
  in_proj = register_module("in_proj", make_linear(d_model, d_in_proj, options.bias()));
  conv1d = register_module(
      "conv1d", torch::nn::Conv1d(torch::nn::Conv1dOptions(channels(), channels(), options.d_conv())
                                      .bias(options.conv_bias())
                                      .groups(channels())
                                      .padding(options.d_conv() - 1)));
  if (options.conv_init()) {
    const torch::NoGradGuard no_grad;
    conv1d->weight.uniform_(-*options.conv_init(), *options.conv_init());
  }
  dt_bias = register_parameter(
      "dt_bias", draw_dt_bias(nheads(), options.dt_min(), options.dt_max(), options.dt_init_floor())
                     .to(dtype));
  const auto [A_min, A_max] = options.A_init_range();
  A_log = register_parameter(
      "A_log", at::empty({nheads()}, state_dtype).uniform_(A_min, A_max).log().to(dtype));
  D = register_parameter("D", at::ones({options.D_has_hdim() ? d_ssm() : nheads()}, state_dtype));
  if (options.rmsnorm()) {
    norm = register_module(
        "norm", RmsNormGated(d_ssm(), d_ssm() / options.ngroups(), options.norm_before_gate()));
  }
  out_proj = register_module("out_proj", make_linear(d_inner(), d_model, options.bias()));

  for (const auto& child : children()) child->to(dtype);
  if (options.device()) to(*options.device());
}

void Mamba2Impl::pretty_print(std::ostream& stream) const {
  stream << "mamba_ssm::Mamba2(d_model=" << options.d_model() << ", d_state=" << options.d_state()
         << ", d_conv=" << options.d_conv() << ", d_inner=" << d_inner() << ", d_ssm=" << d_ssm()
         << ", headdim=" << options.headdim() << ", ngroups=" << options.ngroups() << ")";
}

Tensor Mamba2Impl::A() const { return A_of(A_log); }

Tensor Mamba2Impl::D_by_head() const {
  return options.D_has_hdim() ? D.view({nheads(), options.headdim()}) : D;
}

std::optional<double> Mamba2Impl::dt_upper_limit() const {
  const double upper = options.dt_limit().second;
  return std::isinf(upper) ? std::nullopt : std::optional<double>(upper);
}

void Mamba2Impl::check_tokens(const char* name, const Tensor& tokens) const {
  TORCH_CHECK(tokens.dim() == 3 && tokens.size(2) == options.d_model(), "Mamba2: ", name,
              " must have shape (batch, seqlen, d_model=", options.d_model(), "), got ",
              tokens.sizes());
}

void Mamba2Impl::check_state(const Tensor& conv_state, const Tensor& ssm_state,
                             int64_t batch) const {
  const auto check = [&](const Tensor& state, const char* name, const char* axes,
                         at::IntArrayRef expected) {
    TORCH_CHECK(state.defined() && state.sizes() == expected, "Mamba2: ", name, " must have shape ",
                axes, " = ", expected, ", got ",
                state.defined() ? state.sizes() : at::IntArrayRef());
  };
  check(conv_state, "conv_state", "(batch, channels, d_conv)",
        {batch, channels(), options.d_conv()});
  check(ssm_state, "ssm_state", "(batch, nheads, headdim, d_state)",
        {batch, nheads(), options.headdim(), options.d_state()});
}

/// What in_proj writes, (..., d_in_proj).
struct Mamba2Impl::Parts {
  Tensor z0, x0, z, xBC, dt;
};

Mamba2Impl::Parts Mamba2Impl::split(const Tensor& zxbcdt) const {
  const int64_t d_mlp = d_inner() - d_ssm();
  const auto parts = zxbcdt.split_with_sizes({d_mlp, d_mlp, d_ssm(), channels(), nheads()}, -1);
  return {parts[0], parts[1], parts[2], parts[3], parts[4]};
}

Tensor Mamba2Impl::gate(const Parts& parts, const Tensor& y) {
  const Tensor normed = norm ? norm->forward(y, parts.z) : y;
  if (d_ssm() == d_inner()) return normed;
  return at::cat({at::silu(parts.z0) * parts.x0, normed}, -1);
}

Tensor Mamba2Impl::forward(const Tensor& u, MambaState* state, const std::optional<Tensor>& seq_idx,
                           const std::optional<Tensor>& cu_seqlens) {
  check_tokens("u", u);
  TORCH_CHECK(!cu_seqlens || u.size(0) == 1,
              "Mamba2: cu_seqlens needs u with batch = 1, got u of shape ", u.sizes());
  if (state != nullptr) {
    check_state(state->conv_state, state->ssm_state,
                cu_seqlens ? cu_seqlens->size(0) - 1 : u.size(0));
    if (u.size(1) == 1 && !seq_idx && !cu_seqlens) {
      return step(u, state->conv_state, state->ssm_state);
    }
    return prefill(u, *state, seq_idx, cu_seqlens);
  }
  return std::get<0>(
      mamba2_inner(project(in_proj, u), conv1d->weight.squeeze(1), if_defined(conv1d->bias), A(),
                   options.headdim(), options.ngroups(), D_by_head(), dt_bias,
                   norm ? std::optional<Tensor>(norm->weight) : std::nullopt, out_proj->weight,
                   if_defined(out_proj->bias), /*initial_states=*/std::nullopt, seq_idx, cu_seqlens,
                   /*silu=*/true, RmsNormGatedImpl::kEpsilon, options.norm_before_gate(),
                   options.dt_limit().first, dt_upper_limit()));
}

Tensor Mamba2Impl::prefill(const Tensor& u, MambaState& state,
                           const std::optional<Tensor>& seq_idx_,
                           const std::optional<Tensor>& cu_seqlens) {
  const int64_t width = options.d_conv();
  const auto seq_idx = cu_seqlens ? std::nullopt : seq_idx_;
  const Parts parts = split(project_step(in_proj, u));
  const Tensor inputs = parts.xBC.transpose(1, 2);  // (batch, channels, seqlen)
  const Tensor past = read_cache(state.conv_state, inputs.scalar_type());
  const auto convolve = [&](const Tensor& x, const std::optional<Tensor>& ids,
                            const std::optional<Tensor>& history) {
    return causal_conv1d(x, conv1d->weight.squeeze(1), if_defined(conv1d->bias), ids, history,
                         /*silu=*/true);
  };
  Tensor xBC, columns;  // `columns` end in the new conv_state
  if (cu_seqlens) {
    const BehindHistory packed(inputs, past, *cu_seqlens);
    const Tensor ids = sequence_ids(packed.cu_seqlens, packed.x.size(2));
    xBC = std::get<0>(convolve(packed.x, ids, std::nullopt)).index_select(2, packed.tokens);
    columns = causal_conv1d_varlen_states(packed.x[0].detach().t(), packed.cu_seqlens, width);
  } else {
    Tensor final_states;
    std::tie(xBC, final_states) = convolve(inputs, seq_idx, past.narrow(2, 1, width - 1));
    // With seq_idx, of the last sequence.
    columns = seq_idx ? at::constant_pad_nd(final_states, {1, 0}) : at::cat({past, inputs}, 2);
  }

  const int64_t rows = options.ngroups() * options.d_state();
  const auto x_B_C = xBC.transpose(1, 2).split_with_sizes({d_ssm(), rows, rows}, -1);
  const auto by_head = [&](const Tensor& t) {
    return t.unflatten(-1, {nheads(), options.headdim()});
  };
  const auto by_group = [&](const Tensor& t) {
    return t.unflatten(-1, {options.ngroups(), options.d_state()});
  };
  const auto [y, final_states] = ssd_chunk_scan(
      by_head(x_B_C[0]), parts.dt, A(), by_group(x_B_C[1]), by_group(x_B_C[2]), D_by_head(),
      norm ? std::nullopt : std::optional<Tensor>(by_head(parts.z)), dt_bias,
      /*initial_states=*/
      read_cache(state.ssm_state, A_log.scalar_type() == at::kDouble ? at::kDouble : at::kFloat),
      seq_idx, cu_seqlens, /*dt_softplus=*/true, options.dt_limit().first, dt_upper_limit());
  const Tensor out = project_step(out_proj, gate(parts, y.flatten(2)));

  const torch::NoGradGuard no_grad;
  state.conv_state.copy_(columns.narrow(2, columns.size(2) - width, width));
  state.ssm_state.copy_(final_states);
  return out;
}

Tensor Mamba2Impl::step(const Tensor& hidden_states, const Tensor& conv_state,
                        const Tensor& ssm_state) {
  check_tokens("hidden_states", hidden_states);
  TORCH_CHECK(hidden_states.size(1) == 1, "Mamba2: step takes one token per row, got ",
              hidden_states.size(1));
  return step_projected(project_step(in_proj, hidden_states.squeeze(1)), conv_state, ssm_state);
}

Tensor Mamba2Impl::step_projected(const Tensor& zxbcdt, const Tensor& conv_state,
                                  const Tensor& ssm_state) {
  check_state(conv_state, ssm_state, zxbcdt.size(0));
  const Parts parts = split(zxbcdt);
  // The op wants activations and their cache of one type; another type goes through a copy.
  // Detached, so that no autograd history settles in the caller's states.
  const Tensor past = conv_state.detach().to(parts.xBC.scalar_type());
  const Tensor xBC = causal_conv1d_update(
      parts.xBC, past, conv1d->weight.squeeze(1), if_defined(conv1d->bias),
      /*cache_seqlens=*/std::nullopt, /*conv_state_indices=*/std::nullopt, /*silu=*/true);
  if (!past.is_alias_of(conv_state)) conv_state.detach().copy_(past);

  const int64_t headdim = options.headdim(), rows = options.ngroups() * options.d_state();
  const auto x_B_C = xBC.split_with_sizes({d_ssm(), rows, rows}, -1);
  const auto by_head = [&](const Tensor& t) { return t.unflatten(-1, {nheads(), headdim}); };
  const auto by_group = [&](const Tensor& t) {
    return t.unflatten(-1, {options.ngroups(), options.d_state()});
  };
  const auto per_channel = [&](const Tensor& t) {  // (..., nheads) as (..., nheads, headdim)
    std::vector<int64_t> sizes = t.sizes().vec();
    sizes.push_back(headdim);
    return t.unsqueeze(-1).expand(sizes);
  };
  Tensor dt = parts.dt;
  const auto [dt_min, dt_max] = options.dt_limit();
  const bool limited = dt_min > 0 || !std::isinf(dt_max);
  if (limited) {
    dt = at::softplus(to_accumulate_type(dt) + to_accumulate_type(dt_bias)).clamp(dt_min, dt_max);
  }
  const auto [A, A_is_log] = A_of_step(A_log);
  const Tensor y = selective_state_update(
      ssm_state.detach(), by_head(x_B_C[0]), per_channel(dt),
      per_channel(A).unsqueeze(-1).expand({-1, -1, options.d_state()}), by_group(x_B_C[1]),
      by_group(x_B_C[2]), options.D_has_hdim() ? D_by_head() : per_channel(D),
      norm ? std::nullopt : std::optional<Tensor>(by_head(parts.z)),
      limited ? std::nullopt : std::optional<Tensor>(per_channel(dt_bias)),
      /*state_batch_indices=*/std::nullopt, /*dt_softplus=*/!limited,
      /*intermediate_states=*/std::nullopt, A_is_log);
  if (norm && !norm->norm_before_gate && norm->group_size == d_inner()) {
    return step_linear(y.flatten(1), out_proj->weight, if_defined(out_proj->bias), parts.z,
                       norm->weight, RmsNormGatedImpl::kEpsilon)
        .unsqueeze(1);
  }
  return project_step(out_proj, gate(parts, y.flatten(1))).unsqueeze(1);
}

MambaState Mamba2Impl::allocate_inference_cache(int64_t batch_size, int64_t /*max_seqlen*/,
                                                std::optional<at::ScalarType> dtype,
                                                std::optional<at::ScalarType> state_dtype) const {
  TORCH_CHECK(batch_size >= 0, "Mamba2: batch_size must not be negative, got ", batch_size);
  const auto zeros = [&](at::IntArrayRef sizes, at::ScalarType type) {
    return at::zeros(sizes, at::device(D.device()).dtype(type));
  };
  const at::ScalarType type = dtype.value_or(conv1d->weight.scalar_type());
  return {zeros({batch_size, options.d_conv(), channels()}, type).transpose(1, 2),
          zeros({batch_size, nheads(), options.headdim(), options.d_state()},
                state_dtype.value_or(type))};
}

}  // namespace mamba_ssm
