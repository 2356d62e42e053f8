// What the modules share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/expm1.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/log.h>
#include <ATen/ops/rand.h>
#include <c10/core/GradMode.h>
#include <mamba_ssm/ops.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <cmath>
#include <optional>
#include <utility>

namespace mamba_ssm {

inline std::optional<at::Tensor> if_defined(const at::Tensor& t) {
  return t.defined() ? std::optional<at::Tensor>(t) : std::nullopt;
}

/// While one exists in a thread, matrices of modules made there are not filled with random numbers,
/// which takes longer than reading those of a checkpoint that take their place.
class WithoutFills {
 public:
  WithoutFills() : outer_(active_) { active_ = true; }
  ~WithoutFills() { active_ = outer_; }
  WithoutFills(const WithoutFills&) = delete;
  WithoutFills& operator=(const WithoutFills&) = delete;
  static bool active() { return active_; }

 private:
  static inline thread_local bool active_ = false;
  bool outer_;
};

/// A linear layer, initialized as torch does.
inline torch::nn::Linear make_linear(int64_t in_features, int64_t out_features, bool bias = true) {
  const auto options = torch::nn::LinearOptions(in_features, out_features).bias(bias);
  if (!WithoutFills::active()) return torch::nn::Linear(options);
  torch::nn::Linear layer(torch::nn::LinearOptions(1, 1).bias(bias));
  layer->options = options;
  layer->weight.set_data(at::empty({out_features, in_features}));
  if (bias) layer->bias.set_data(at::empty({out_features}));
  return layer;
}

/// (size,), whose softplus is log-uniform in [dt_min, dt_max], but at least dt_init_floor. Source:
/// arXiv 2312.00752, 3.6.
inline at::Tensor draw_dt_bias(int64_t size, double dt_min, double dt_max, double dt_init_floor) {
  const double log_min = std::log(dt_min), log_max = std::log(dt_max);
  const at::Tensor dt =
      at::exp(at::rand({size}) * (log_max - log_min) + log_min).clamp_min(dt_init_floor);
  return dt + at::log(-at::expm1(-dt));  // the inverse of softplus
}

/// layer(x) as Python computes it: torch's C++ layer rounds the product before it adds the bias.
inline at::Tensor project(const torch::nn::Linear& layer, const at::Tensor& x) {
  return at::linear(x, layer->weight, if_defined(layer->bias));
}

/// project for few tokens, as in a decode step or a short prompt.
inline at::Tensor project_step(const torch::nn::Linear& layer, const at::Tensor& x) {
  return step_linear(x, layer->weight, if_defined(layer->bias));
}

/// embedding(ids). For so few ids torch has a kernel in a module whose loading takes the first
/// decode step of a process 50 ms; that of gather takes 11 to 26 (torch 2.11, H200, 2026-11-26).
inline at::Tensor look_up(torch::nn::Embedding& embedding, const at::Tensor& ids) {
  constexpr int64_t kMostIds = 16;
  if (!ids.is_cuda() || ids.numel() == 0 || ids.numel() > kMostIds || c10::GradMode::is_enabled()) {
    return embedding->forward(ids);
  }
  const at::Tensor& weight = embedding->weight;
  const auto rows = ids.reshape({-1, 1}).to(at::kLong).expand({-1, weight.size(1)});
  return weight.gather(0, rows).view({ids.size(0), ids.size(1), weight.size(1)});
}

/// Has a GPU load the kernels of torch that a first `generate` would wait for, as load_kernels of
/// Python's utils.generation does. weight: (vocab, d_model), of an embedding.
void load_kernels(const at::Tensor& weight);

/// float32, or float64 if the tensor is float64: the type that parameters of the scan compute in.
inline at::Tensor to_accumulate_type(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? t : t.to(at::kFloat);
}

/// A, from the logarithm of -A that the modules learn.
inline at::Tensor A_of(const at::Tensor& A_log) { return -at::exp(to_accumulate_type(A_log)); }

/// A of selective_state_update, and whether it is given as log(-A): on a GPU, where a step is as
/// long as its launches are many, but not on a CPU, where the exponentials would be taken for every
/// row.
inline std::pair<at::Tensor, bool> A_of_step(const at::Tensor& A_log) {
  if (A_log.is_cuda()) return {A_log, true};
  return {A_of(A_log), false};
}

/// The contents of a cache as an input of an op. Autograd may keep that input while the cache is
/// overwritten, so it gets a copy of its own then.
inline at::Tensor read_cache(const at::Tensor& cache, at::ScalarType dtype) {
  const at::Tensor values = cache.detach().to(dtype);
  return c10::GradMode::is_enabled() && values.is_alias_of(cache) ? values.clone() : values;
}

}  // namespace mamba_ssm
