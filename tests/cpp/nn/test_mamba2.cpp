// The Mamba2 module: its parameters, its forms of calling, and the values of the golden file that
// the Python tests read too.
#include <ATen/Functions.h>
#include <mamba_ssm/io/safetensors.h>
#include <mamba_ssm/nn/mamba2.h>
#include <mamba_ssm/ops.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/utils.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <map>
#include <vector>

#include "values.h"

using at::Tensor;
using Catch::Matchers::ContainsSubstring;
using mamba_ssm::Mamba2;
using mamba_ssm::Mamba2Impl;
using mamba_ssm::Mamba2Options;
using mamba_ssm::MambaState;

namespace {

Mamba2Options small() { return Mamba2Options(16).d_state(5).headdim(4); }

/// One of every kind of block: each part present and absent.
std::vector<Mamba2Options> kinds() {
  return {small(),
          small().ngroups(2).bias(true),
          small().rmsnorm(false).D_has_hdim(true),
          small().d_ssm(24).norm_before_gate(true),
          small().d_ssm(24).rmsnorm(false).conv_bias(false),
          small().dt_limit({0.02, 0.05}).D_has_hdim(true),
          small().headdim(32).d_conv(1),
          small().expand(1.25).d_conv(2)};
}

}  // namespace

TEST_CASE("a Mamba2 block has the parameters of its Python twin", "[mamba2]") {
  Mamba2 block(Mamba2Options(1024).d_state(64).d_conv(4).expand(2));
  std::map<std::string, std::vector<int64_t>> shapes;
  int64_t count = 0;
  for (const auto& item : block->named_parameters()) {
    shapes[item.key()] = item->sizes().vec();
    count += item->numel();
    CHECK(item->requires_grad());
    CHECK(item->scalar_type() == at::kFloat);
  }
  CHECK(shapes == std::map<std::string, std::vector<int64_t>>{{"in_proj.weight", {4256, 1024}},
                                                              {"conv1d.weight", {2176, 1, 4}},
                                                              {"conv1d.bias", {2176}},
                                                              {"dt_bias", {32}},
                                                              {"A_log", {32}},
                                                              {"D", {32}},
                                                              {"norm.weight", {2048}},
                                                              {"out_proj.weight", {1024, 2048}}});
  CHECK(count == 6468320);
  const torch::NoGradGuard no_grad;
  CHECK(block->forward(at::randn({2, 64, 1024})).sizes() == at::IntArrayRef({2, 64, 1024}));
}

TEST_CASE("options of Mamba2 change the parameters as in Python", "[mamba2]") {
  SECTION("biases and norm") {
    Mamba2 block(small().conv_bias(false).bias(true).rmsnorm(false));
    CHECK_FALSE(block->conv1d->bias.defined());
    CHECK(block->in_proj->bias.sizes() == at::IntArrayRef({82}));
    CHECK(block->out_proj->bias.sizes() == at::IntArrayRef({16}));
    CHECK(block->norm.is_empty());
    CHECK(block->forward(at::randn({1, 5, 16})).isfinite().all().item<bool>());
  }
  SECTION("sizes") {
    Mamba2 block(small().d_ssm(24).ngroups(3).D_has_hdim(true).d_conv(2));
    CHECK(block->d_inner() == 32);
    CHECK(block->nheads() == 6);
    CHECK(block->channels() == 54);
    CHECK(block->D.sizes() == at::IntArrayRef({24}));
    CHECK(block->norm->weight.sizes() == at::IntArrayRef({24}));
    CHECK(block->in_proj->weight.sizes() == at::IntArrayRef({2 * 8 + 24 + 54 + 6, 16}));
    CHECK(block->conv1d->weight.sizes() == at::IntArrayRef({54, 1, 2}));
  }
  SECTION("initial values") {
    Mamba2 block(
        Mamba2Options(256).headdim(1).conv_init(0.01).dt_min(0.01).dt_max(0.02).A_init_range(
            {3, 4}));
    CHECK(block->conv1d->weight.abs().max().item<double>() <= 0.01);
    const Tensor dt = at::softplus(block->dt_bias);
    CHECK(dt.min().item<double>() > 0.0099);
    CHECK(dt.max().item<double>() < 0.0201);
    CHECK(block->A_log.exp().min().item<double>() > 2.999);
    CHECK(block->A_log.exp().max().item<double>() < 4.001);
    CHECK(block->D.eq(1).all().item<bool>());
    CHECK(block->norm->weight.eq(1).all().item<bool>());
  }
  SECTION("dtypes") {
    for (const auto dtype : {at::kHalf, at::kBFloat16, at::kDouble}) {
      const auto state_dtype = dtype == at::kDouble ? at::kDouble : at::kFloat;
      Mamba2 block(small().dtype(dtype));
      for (const auto& item : block->named_parameters()) {
        CAPTURE(item.key());
        CHECK(item->scalar_type() == (item.key() == "D" ? state_dtype : dtype));
      }
      CHECK(block->forward(at::randn({2, 9, 16}, dtype)).scalar_type() == dtype);
    }
  }
  SECTION("a seed gives the same weights again") {
    at::manual_seed(3);
    Mamba2 first(small());
    at::manual_seed(3);
    Mamba2 second(small());
    for (const auto& item : first->named_parameters()) {
      CHECK(item->equal(second->named_parameters()[item.key()]));
    }
  }
}

TEST_CASE("wrong options and arguments of Mamba2 are refused in words", "[mamba2]") {
  CHECK_THROWS_WITH(Mamba2(0), ContainsSubstring("d_inner"));
  CHECK_THROWS_WITH(Mamba2(16), ContainsSubstring("headdim must divide d_ssm = 32: pass headdim"));
  CHECK_THROWS_WITH(Mamba2(small().headdim(0)), ContainsSubstring("headdim must divide"));
  CHECK_THROWS_WITH(Mamba2(small().d_state(0)), ContainsSubstring("must be positive"));
  CHECK_THROWS_WITH(Mamba2(small().d_ssm(40)), ContainsSubstring("from 1 to d_inner = 32"));
  CHECK_THROWS_WITH(Mamba2(small().ngroups(3)), ContainsSubstring("number of heads"));
  CHECK_THROWS_WITH(Mamba2(small().expand(1e300)), ContainsSubstring("2^31"));
  CHECK_THROWS_WITH(Mamba2(small().dtype(at::kLong)), ContainsSubstring("Long"));

  Mamba2 block(small());
  CHECK_THROWS_WITH(block->forward(at::randn({2, 3, 8})), ContainsSubstring("d_model=16"));
  auto state = block->allocate_inference_cache(3);
  CHECK_THROWS_WITH(
      block->forward(at::randn({2, 3, 16}), &state),
      ContainsSubstring("conv_state must have shape (batch, channels, d_conv) = [2, 42, 4]"));
  CHECK_THROWS_WITH(block->step(at::randn({3, 2, 16}), state.conv_state, state.ssm_state),
                    ContainsSubstring("one token"));
  const Tensor offsets = at::tensor(std::vector<int64_t>{0, 1, 2, 3});
  CHECK_THROWS_WITH(block->forward(at::randn({2, 3, 16}), &state, std::nullopt, offsets),
                    ContainsSubstring("batch = 1, got u of shape [2, 3, 16]"));
  MambaState empty;
  CHECK_THROWS_WITH(block->forward(at::randn({2, 3, 16}), &empty), ContainsSubstring("conv_state"));
}

TEST_CASE("the golden file of Mamba2: forward and gradients", "[mamba2]") {
  const auto golden = mamba_ssm::load_safetensors(golden_file("mamba2.safetensors"));
  Mamba2 block(Mamba2Options(16).d_state(8).d_ssm(24).headdim(4).ngroups(2));
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

TEST_CASE("gradients reach every parameter of Mamba2", "[mamba2]") {
  for (const Mamba2Options& options : kinds()) {
    Mamba2 block(options);
    const Tensor input = at::randn({2, 7, 16}).requires_grad_();
    block->forward(input).square().sum().backward();
    CHECK(input.grad().abs().min().item<double>() > 0);
    for (const auto& item : block->named_parameters()) {
      CAPTURE(item.key());
      REQUIRE(item->grad().defined());
      CHECK(item->grad().isfinite().all().item<bool>());
    }
  }
}

TEST_CASE("a Mamba2 block fits into Sequential", "[mamba2]") {
  torch::nn::Sequential layers(Mamba2(small()), torch::nn::Linear(16, 4));
  CHECK(layers->forward(at::randn({2, 5, 16})).sizes() == at::IntArrayRef({2, 5, 4}));
}

TEST_CASE("a clone of Mamba2 is deep", "[mamba2]") {
  Mamba2 block(small());
  const auto copy = std::dynamic_pointer_cast<Mamba2Impl>(block->clone());
  REQUIRE(copy != nullptr);
  const Tensor input = at::randn({1, 4, 16});
  const torch::NoGradGuard no_grad;
  const Tensor output = block->forward(input);
  CHECK(copy->forward(input).equal(output));
  for (const auto& parameter : block->parameters()) parameter.zero_();
  CHECK(copy->forward(input).equal(output));
  CHECK_FALSE(block->forward(input).equal(output));
}

TEST_CASE("a sequence in pieces equals the sequence, Mamba2", "[mamba2]") {
  const torch::NoGradGuard no_grad;
  at::manual_seed(0);
  const std::vector<std::vector<int64_t>> splits = {{11},
                                                    {0, 11},
                                                    {4, 7},
                                                    {10, 1},
                                                    {2, 2, 2, 2, 2, 1},
                                                    {3, 1, 1, 0, 6},
                                                    std::vector<int64_t>(11, 1)};
  for (Mamba2Options options : kinds()) {
    Mamba2 block(options.dtype(at::kDouble));
    const Tensor input = at::randn({2, 11, 16}, at::kDouble);
    const Tensor expected = block->forward(input);
    auto whole = block->allocate_inference_cache(2);
    check_close(block->forward(input, &whole), expected, 1e-10, 1e-12);
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
      check_close(state.conv_state, whole.conv_state, 1e-10, 1e-12);
      check_close(state.ssm_state, whole.ssm_state, 1e-10, 1e-12);
    }
  }
}

TEST_CASE("packed sequences equal separate ones, Mamba2", "[mamba2]") {
  const torch::NoGradGuard no_grad;
  at::manual_seed(0);
  for (Mamba2Options options : kinds()) {
    Mamba2 block(options.dtype(at::kDouble));
    const std::vector<int64_t> lengths = {2, 0, 5, 1};
    const Tensor offsets = at::tensor(std::vector<int64_t>{0, 2, 2, 7, 8}).to(at::kInt);
    const Tensor first = at::randn({1, 8, 16}, at::kDouble);
    const Tensor second = at::randn({1, 8, 16}, at::kDouble);

    // Two packed pieces of the same sequences, against each sequence on its own.
    auto packed = block->allocate_inference_cache(4);
    const Tensor out = block->forward(first, &packed, /*seq_idx=*/std::nullopt, offsets);
    const Tensor next = block->forward(second, &packed, /*seq_idx=*/std::nullopt, offsets);
    int64_t begin = 0;
    std::vector<Tensor> separate;
    for (size_t i = 0; i < lengths.size(); ++i) {
      auto state = block->allocate_inference_cache(1);
      const Tensor own = first.narrow(1, begin, lengths[i]);
      separate.push_back(block->forward(own, &state));
      check_close(out.narrow(1, begin, lengths[i]), separate.back(), 1e-10, 1e-12);
      const Tensor continued = block->forward(second.narrow(1, begin, lengths[i]), &state);
      check_close(next.narrow(1, begin, lengths[i]), continued, 1e-10, 1e-12);
      const auto row = static_cast<int64_t>(i);
      check_close(packed.conv_state.narrow(0, row, 1), state.conv_state, 1e-10, 1e-12);
      check_close(packed.ssm_state.narrow(0, row, 1), state.ssm_state, 1e-10, 1e-12);
      begin += lengths[i];
    }
    const Tensor expected = at::cat(separate, 1);
    check_close(block->forward(first, nullptr, std::nullopt, offsets), expected, 1e-10, 1e-12);
    const Tensor ids = mamba_ssm::sequence_ids(offsets, 8);
    CHECK(ids.equal(at::tensor(std::vector<int64_t>{0, 0, 2, 2, 2, 2, 2, 3}).unsqueeze(0)));
    check_close(block->forward(first, nullptr, ids), expected, 1e-10, 1e-12);

    // A row of packed sequences continues its last one.
    auto state = block->allocate_inference_cache(1);
    block->forward(first, &state, ids);
    auto last = block->allocate_inference_cache(1);
    block->forward(first.narrow(1, 7, 1), &last);
    check_close(block->forward(second, &state), block->forward(second, &last), 1e-10, 1e-12);
  }
}

TEST_CASE("step of Mamba2 continues a prefill in every state dtype", "[mamba2]") {
  const torch::NoGradGuard no_grad;
  at::manual_seed(0);
  Mamba2 block(Mamba2Options(32).headdim(8).dtype(at::kBFloat16));
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

TEST_CASE("training Mamba2 in pieces stops gradients at the state", "[mamba2]") {
  Mamba2 block(small());
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

TEST_CASE("empty batches and sequences, Mamba2", "[mamba2]") {
  Mamba2 block(small());
  CHECK(block->forward(at::empty({0, 4, 16})).sizes() == at::IntArrayRef({0, 4, 16}));
  CHECK(block->forward(at::empty({2, 0, 16})).sizes() == at::IntArrayRef({2, 0, 16}));
}
