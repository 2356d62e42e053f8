// The Mamba module: its parameters, its forms of calling, and the values of the golden file that
// the Python tests read too.
#include <ATen/Functions.h>
#include <mamba_ssm/io/safetensors.h>
#include <mamba_ssm/nn/mamba.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/utils.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cmath>
#include <map>
#include <vector>

#include "values.h"

using at::Tensor;
using Catch::Matchers::ContainsSubstring;
using mamba_ssm::Mamba;
using mamba_ssm::MambaImpl;
using mamba_ssm::MambaOptions;
using mamba_ssm::MambaState;

TEST_CASE("a Mamba block has the parameters of its Python twin", "[mamba]") {
  Mamba block(MambaOptions(16).d_state(64));
  std::map<std::string, std::vector<int64_t>> shapes;
  int64_t count = 0;
  for (const auto& item : block->named_parameters()) {
    shapes[item.key()] = item->sizes().vec();
    count += item->numel();
    CHECK(item->requires_grad());
    CHECK(item->scalar_type() == at::kFloat);
  }
  CHECK(shapes == std::map<std::string, std::vector<int64_t>>{{"in_proj.weight", {64, 16}},
                                                              {"conv1d.weight", {32, 1, 4}},
                                                              {"conv1d.bias", {32}},
                                                              {"x_proj.weight", {129, 32}},
                                                              {"dt_proj.weight", {32, 1}},
                                                              {"dt_proj.bias", {32}},
                                                              {"A_log", {32, 64}},
                                                              {"D", {32}},
                                                              {"out_proj.weight", {16, 32}}});
  CHECK(count == 7968);
  CHECK(block->forward(at::randn({2, 32, 16})).sizes() == at::IntArrayRef({2, 32, 16}));
}

TEST_CASE("options change the parameters as in Python", "[mamba]") {
  SECTION("biases") {
    Mamba block(MambaOptions(16).conv_bias(false).bias(true));
    CHECK_FALSE(block->conv1d->bias.defined());
    CHECK(block->in_proj->bias.sizes() == at::IntArrayRef({64}));
    CHECK(block->out_proj->bias.sizes() == at::IntArrayRef({16}));
    CHECK(block->forward(at::randn({1, 5, 16})).isfinite().all().item<bool>());
  }
  SECTION("sizes") {
    Mamba block(MambaOptions(17).d_state(3).d_conv(2).expand(1.5));
    CHECK(block->d_inner() == 25);
    CHECK(block->dt_rank() == 2);
    CHECK(block->A_log.sizes() == at::IntArrayRef({25, 3}));
    CHECK(block->conv1d->weight.sizes() == at::IntArrayRef({25, 1, 2}));
    CHECK(Mamba(MambaOptions(17).dt_rank(5))->dt_proj->weight.size(1) == 5);
  }
  SECTION("initial values") {
    Mamba block(MambaOptions(64).dt_init("constant").dt_scale(3).dt_min(0.01).dt_max(0.02));
    CHECK(block->dt_proj->weight.eq(1.5).all().item<bool>());  // 3 / sqrt(4)
    const Tensor dt = at::softplus(block->dt_proj->bias);
    CHECK(dt.min().item<double>() > 0.0099);
    CHECK(dt.max().item<double>() < 0.0201);
    check_close(block->A_log.exp()[7], at::arange(1, 17, at::kFloat));
    CHECK(block->D.eq(1).all().item<bool>());
    const double bound = Mamba(64)->dt_proj->weight.abs().max().item<double>();
    CHECK((bound > 0.4 && bound <= 0.5));
  }
  SECTION("dtypes") {
    for (const auto dtype : {at::kHalf, at::kBFloat16, at::kDouble}) {
      const auto state_dtype = dtype == at::kDouble ? at::kDouble : at::kFloat;
      Mamba block(MambaOptions(16).dtype(dtype));
      for (const auto& item : block->named_parameters()) {
        const bool of_state = item.key() == "A_log" || item.key() == "D";
        CAPTURE(item.key());
        CHECK(item->scalar_type() == (of_state ? state_dtype : dtype));
      }
      CHECK(block->forward(at::randn({2, 9, 16}, dtype)).scalar_type() == dtype);
    }
  }
  SECTION("a seed gives the same weights again") {
    at::manual_seed(3);
    Mamba first(16);
    at::manual_seed(3);
    Mamba second(16);
    for (const auto& item : first->named_parameters()) {
      CHECK(item->equal(second->named_parameters()[item.key()]));
    }
  }
}

TEST_CASE("wrong options and arguments are refused in words", "[mamba]") {
  CHECK_THROWS_WITH(Mamba(0), ContainsSubstring("d_inner"));
  CHECK_THROWS_WITH(Mamba(MambaOptions(16).d_state(0)), ContainsSubstring("must be positive"));
  CHECK_THROWS_WITH(Mamba(MambaOptions(16).d_conv(-1)), ContainsSubstring("must be positive"));
  CHECK_THROWS_WITH(Mamba(MambaOptions(16).expand(1e300)), ContainsSubstring("2^31"));
  CHECK_THROWS_WITH(Mamba(MambaOptions(16).dt_init("zero")), ContainsSubstring("\"zero\""));
  CHECK_THROWS_WITH(Mamba(MambaOptions(16).dtype(at::kLong)), ContainsSubstring("Long"));

  Mamba block(16);
  CHECK_THROWS_WITH(block->forward(at::randn({2, 3, 8})), ContainsSubstring("d_model=16"));
  CHECK_THROWS_WITH(block->forward(at::randn({2, 16})), ContainsSubstring("d_model=16"));
  auto state = block->allocate_inference_cache(3);
  CHECK_THROWS_WITH(
      block->forward(at::randn({2, 3, 16}), &state),
      ContainsSubstring("conv_state must have shape (batch, d_inner, d_conv) = [2, 32, 4]"));
  CHECK_THROWS_WITH(block->step(at::randn({3, 2, 16}), state.conv_state, state.ssm_state),
                    ContainsSubstring("one token"));
  MambaState empty;
  CHECK_THROWS_WITH(block->forward(at::randn({2, 3, 16}), &empty), ContainsSubstring("conv_state"));
}

TEST_CASE("the golden file: forward and gradients", "[mamba]") {
  const auto golden = mamba_ssm::load_safetensors(golden_file("mamba.safetensors"));
  Mamba block(MambaOptions(16).d_state(8));
  std::map<std::string, Tensor> weights;
  for (const auto& [name, tensor] : golden) {
    if (name.rfind("weight.", 0) == 0) weights[name.substr(7)] = tensor;
  }
  mamba_ssm::load_state_dict(*block, weights);

  const Tensor input = golden.at("input").clone().requires_grad_();
  const Tensor output = block->forward(input);
  check_close(output, golden.at("output"));

  const Tensor dout = at::arange(output.numel(), at::kDouble).cos().to(at::kFloat);
  (output.flatten() * dout).sum().backward();
  check_close(input.grad(), golden.at("grad.input"));
  for (const auto& item : block->named_parameters()) {
    CAPTURE(item.key());
    REQUIRE(item->grad().defined());
    check_close(item->grad(), golden.at("grad." + item.key()));
  }
}

TEST_CASE("gradients reach every parameter", "[mamba]") {
  Mamba block(MambaOptions(16).bias(true));
  const Tensor input = at::randn({2, 7, 16}).requires_grad_();
  block->forward(input).square().sum().backward();
  CHECK(input.grad().abs().min().item<double>() > 0);
  for (const auto& item : block->named_parameters()) {
    CAPTURE(item.key());
    REQUIRE(item->grad().defined());
    CHECK(item->grad().isfinite().all().item<bool>());
    CHECK(item->grad().abs().sum().item<double>() > 0);
  }
}

TEST_CASE("a Mamba block fits into Sequential", "[mamba]") {
  torch::nn::Sequential layers(Mamba(MambaOptions(16)), torch::nn::Linear(16, 4));
  const Tensor input = at::randn({2, 5, 16});
  const Tensor output = layers->forward(input);
  CHECK(output.sizes() == at::IntArrayRef({2, 5, 4}));
  CHECK(layers->at<MambaImpl>(0).forward(input).sizes() == input.sizes());
}

TEST_CASE("clone is deep", "[mamba]") {
  Mamba block(16);
  const auto copy = std::dynamic_pointer_cast<MambaImpl>(block->clone());
  REQUIRE(copy != nullptr);
  const Tensor input = at::randn({1, 4, 16});
  const torch::NoGradGuard no_grad;
  const Tensor output = block->forward(input);
  CHECK(copy->forward(input).equal(output));
  for (const auto& parameter : block->parameters()) parameter.zero_();
  CHECK(copy->forward(input).equal(output));
  CHECK_FALSE(block->forward(input).equal(output));
}

TEST_CASE("a sequence in pieces equals the sequence", "[mamba]") {
  const torch::NoGradGuard no_grad;
  at::manual_seed(0);
  const int64_t d_conv = GENERATE(1, 2, 4);
  Mamba block(MambaOptions(16).d_conv(d_conv).d_state(5).dtype(at::kDouble));
  const Tensor input = at::randn({2, 11, 16}, at::kDouble);
  const Tensor expected = block->forward(input);

  const std::vector<std::vector<int64_t>> splits = {{11},
                                                    {0, 11},
                                                    {4, 7},
                                                    {10, 1},
                                                    {2, 2, 2, 2, 2, 1},
                                                    {3, 1, 1, 0, 6},
                                                    std::vector<int64_t>(11, 1)};
  for (const auto& split : splits) {
    auto state = block->allocate_inference_cache(2);
    std::vector<Tensor> pieces;
    int64_t begin = 0;
    for (const int64_t length : split) {
      pieces.push_back(block->forward(input.narrow(1, begin, length), &state));
      begin += length;
    }
    CAPTURE(split);
    check_close(at::cat(pieces, 1), expected, 1e-10, 1e-12);

    auto whole = block->allocate_inference_cache(2);
    block->forward(input, &whole);
    check_close(state.conv_state, whole.conv_state, 1e-10, 1e-12);
    check_close(state.ssm_state, whole.ssm_state, 1e-10, 1e-12);
  }
}

TEST_CASE("step continues a prefill in every state dtype", "[mamba]") {
  const torch::NoGradGuard no_grad;
  at::manual_seed(0);
  Mamba block(MambaOptions(32).dtype(at::kBFloat16));
  const Tensor input = at::randn({2, 8, 32}, at::kBFloat16);
  const Tensor expected = block->forward(input).to(at::kFloat);
  for (const auto dtype : {at::kBFloat16, at::kFloat}) {
    auto state = block->allocate_inference_cache(2, /*max_seqlen=*/8, dtype);
    CHECK(state.conv_state.scalar_type() == dtype);
    CHECK(state.ssm_state.scalar_type() == dtype);
    block->forward(input.narrow(1, 0, 7), &state);
    const Tensor before = state.conv_state.clone();
    const Tensor last = block->step(input.narrow(1, 7, 1), state.conv_state, state.ssm_state);
    CHECK(last.sizes() == at::IntArrayRef({2, 1, 32}));
    check_close(last.to(at::kFloat), expected.narrow(1, 7, 1), 0.02, 0.02);
    CHECK(state.conv_state.narrow(2, 0, 3).equal(before.narrow(2, 1, 3)));
  }
}

TEST_CASE("training in pieces stops gradients at the state", "[mamba]") {
  Mamba block(16);
  auto state = block->allocate_inference_cache(1);
  const Tensor first = at::randn({1, 5, 16}).requires_grad_();
  const Tensor second = at::randn({1, 3, 16}).requires_grad_();
  const Tensor loss = block->forward(first, &state).sum() + 0;
  const Tensor next = block->forward(second, &state).sum();
  CHECK_FALSE(state.conv_state.requires_grad());
  CHECK_FALSE(state.ssm_state.requires_grad());
  next.backward();  // although the state was overwritten since
  CHECK_FALSE(first.grad().defined());
  CHECK(second.grad().abs().sum().item<double>() > 0);
  loss.backward();
  CHECK(first.grad().abs().sum().item<double>() > 0);
}

TEST_CASE("empty batches and sequences", "[mamba]") {
  Mamba block(16);
  CHECK(block->forward(at::empty({0, 4, 16})).sizes() == at::IntArrayRef({0, 4, 16}));
  CHECK(block->forward(at::empty({2, 0, 16})).sizes() == at::IntArrayRef({2, 0, 16}));
}
