// Sampling and the generation loop.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Functions.h>
#include <mamba_ssm/generation.h>
#include <mamba_ssm/nn/model.h>
#include <torch/utils.h>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <limits>
#include <vector>

using at::Tensor;
using Catch::Matchers::ContainsSubstring;
using mamba_ssm::GenerateOptions;
using mamba_ssm::MambaLMConfig;
using mamba_ssm::MambaLMHeadModel;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

MambaLMHeadModel small_model() {
  at::manual_seed(0);
  MambaLMHeadModel model(MambaLMConfig().d_model(16).n_layer(2).vocab_size(50).ssm_cfg(
      GENERATE(mamba_ssm::MixerOptions(mamba_ssm::MambaOptions(0).d_state(4)),
               mamba_ssm::MixerOptions(mamba_ssm::Mamba2Options(0).d_state(4).headdim(8)))));
  const torch::NoGradGuard no_grad;
  model->backbone->embedding->weight *= 20;  // so that distributions are not flat
  return model;
}

Tensor prompt() { return at::arange(10).view({2, 5}) * 4; }

at::Generator seeded(uint64_t seed = 1) { return at::make_generator<at::CPUGeneratorImpl>(seed); }

/// Which tokens a filter leaves, of logits (batch, vocab).
template <class Filter>
std::vector<bool> kept(const Tensor& logits, const Filter& filter) {
  const Tensor filtered = logits.clone();
  filter(filtered);
  const Tensor mask = (filtered != -kInfinity).flatten();
  CHECK(at::where(mask, filtered.flatten(), logits.flatten()).equal(logits.flatten()));
  std::vector<bool> tokens;
  for (int64_t i = 0; i < mask.numel(); ++i) tokens.push_back(mask[i].item<bool>());
  return tokens;
}

}  // namespace

TEST_CASE("filters keep the probable tokens of each row", "[generation]") {
  const auto type = GENERATE(at::kFloat, at::kDouble, at::kBFloat16);
  const Tensor p = at::tensor({0.5, 0.125, 0.25, 0.125, 0.125, 0.125, 0.25, 0.5}).view({2, 4});
  const Tensor logits = p.log().to(type);
  const auto top_k = [](int64_t k) {
    return [=](const Tensor& t) { mamba_ssm::modify_logits_for_top_k_filtering(t, k); };
  };
  const auto top_p = [](double value) {
    return [=](const Tensor& t) { mamba_ssm::modify_logits_for_top_p_filtering(t, value); };
  };
  const auto min_p = [](double value) {
    return [=](const Tensor& t) { mamba_ssm::modify_logits_for_min_p_filtering(t, value); };
  };
  using Kept = std::vector<bool>;
  const Kept all(8, true), best = {1, 0, 0, 0, 0, 0, 0, 1}, two = {1, 0, 1, 0, 0, 0, 1, 1};
  CHECK(kept(logits, top_k(0)) == all);
  CHECK(kept(logits, top_k(1)) == best);
  CHECK(kept(logits, top_k(2)) == two);
  CHECK(kept(logits, top_k(3)) == all);  // a tie
  CHECK(kept(logits, top_k(9)) == all);
  CHECK(kept(logits, top_p(0)) == all);
  CHECK(kept(logits, top_p(1)) == all);
  CHECK(kept(logits, top_p(0.01)) == best);
  CHECK(kept(logits, top_p(0.7)) == two);
  CHECK(kept(logits, top_p(0.8)) == Kept{1, 1, 1, 0, 1, 0, 1, 1});  // a tie
  CHECK(kept(logits, min_p(0)) == all);
  CHECK(kept(logits, min_p(0.2)) == all);
  CHECK(kept(logits, min_p(0.3)) == two);
  CHECK(kept(logits, min_p(0.6)) == best);
  CHECK(kept(logits, min_p(1)) == best);
}

TEST_CASE("what occurred becomes less probable, once", "[generation]") {
  const Tensor logits = at::tensor({2.0, -2.0, 1.0, 2.0, -2.0, 1.0}).view({2, 3});
  const Tensor seen = at::tensor({0, 1, 1, 2, 2, 2}, at::kLong).view({2, 3});
  const Tensor expected = at::tensor({1.0, -4.0, 1.0, 2.0, -2.0, 0.5}).view({2, 3});
  const Tensor out = mamba_ssm::modify_logit_for_repetition_penalty(logits, seen, 2);
  CHECK(out.equal(expected));
  CHECK(logits.equal(expected));
}

TEST_CASE("tokens are drawn as often as they are probable", "[generation]") {
  const Tensor p = at::tensor({0.5, 0.0, 0.3, 0.2});
  const Tensor logits = p.log().expand({20000, 4});
  const auto frequencies = [&](int64_t top_k, double top_p, double min_p) {
    const Tensor tokens = mamba_ssm::sample(logits, top_k, top_p, min_p, 1.0, seeded());
    return at::bincount(tokens, {}, 4).to(at::kDouble) / 20000;
  };
  CHECK(at::allclose(frequencies(0, 0, 0), p.to(at::kDouble), 0, 0.02));
  const Tensor two = at::tensor({0.625, 0.0, 0.375, 0.0}, at::kDouble);
  CHECK(at::allclose(frequencies(2, 0, 0), two, 0, 0.02));
  CHECK(at::allclose(frequencies(0, 0.7, 0), two, 0, 0.02));
  CHECK(at::allclose(frequencies(3, 0, 0.5), two, 0, 0.02));
  CHECK(mamba_ssm::sample(logits).eq(0).all().item<bool>());
  CHECK_THROWS_WITH(mamba_ssm::sample(logits, 0, 1.5), ContainsSubstring("top_p"));
  CHECK_THROWS_WITH(mamba_ssm::sample(logits, 0, 0, 1.5), ContainsSubstring("min_p"));
  CHECK_THROWS_WITH(mamba_ssm::sample(logits, 0, 0, 0, 0), ContainsSubstring("temperature"));
}

TEST_CASE("greedy tokens are the best ones of one pass", "[generation]") {
  MambaLMHeadModel model = small_model();
  const auto chunk_size = GENERATE(std::optional<int64_t>(), std::optional<int64_t>(2));
  const Tensor sequences =
      model->generate(prompt(), GenerateOptions(12).vocab_size(50).prefill_chunk_size(chunk_size));
  REQUIRE(sequences.sizes() == at::IntArrayRef({2, 12}));
  CHECK(sequences.narrow(1, 0, 5).equal(prompt()));
  const torch::NoGradGuard no_grad;
  const Tensor best = model->forward(sequences).narrow(2, 0, 50).argmax(-1);
  CHECK(sequences.narrow(1, 5, 7).equal(best.narrow(1, 4, 7)));
}

TEST_CASE("a generator repeats its tokens", "[generation]") {
  MambaLMHeadModel model = small_model();
  const auto generate = [&](uint64_t seed) {
    return model->generate(prompt(), GenerateOptions(20).top_k(0).generator(seeded(seed)));
  };
  CHECK(generate(1).equal(generate(1)));
  CHECK(!generate(1).equal(generate(2)));
  model->forward(generate(1)).sum().backward();  // they are tokens to train with, too
  CHECK(model->backbone->embedding->weight.grad().defined());
}

TEST_CASE("a row ends with its end token, the others go on", "[generation]") {
  MambaLMHeadModel model = small_model();
  const Tensor whole = model->generate(prompt(), 12);
  const std::optional<int64_t> pad = GENERATE(std::optional<int64_t>(), std::optional<int64_t>(3));
  for (int64_t i = 0; i < 14; ++i) {
    const auto eos = whole[i / 7][5 + i % 7].item<int64_t>();
    Tensor expected = whole.clone();
    int64_t longest = 0;
    for (int64_t row = 0; row < 2; ++row) {
      int64_t end = 5;
      while (end < 12 && whole[row][end++].item<int64_t>() != eos) continue;
      expected[row].slice(0, end).fill_(pad.value_or(eos));
      longest = std::max(longest, end);
    }
    const auto options = GenerateOptions(12).eos_token_id(eos).pad_token_id(pad);
    CHECK(model->generate(prompt(), options).equal(expected.slice(1, 0, longest)));
  }
}

TEST_CASE("prompts of any lengths go on as they would alone", "[generation]") {
  MambaLMHeadModel model = small_model();
  const auto chunk_size = GENERATE(std::optional<int64_t>(), std::optional<int64_t>(2));
  for (const auto& lengths : std::vector<std::vector<int64_t>>{{2, 5}, {5, 1}, {3, 3}}) {
    const auto options = GenerateOptions(12).repetition_penalty(1.5).prefill_chunk_size(chunk_size);
    const Tensor together =
        model->generate(prompt(), GenerateOptions(options).lengths(at::tensor(lengths, at::kLong)));
    for (int64_t row = 0; row < 2; ++row) {
      const Tensor alone = prompt().narrow(0, row, 1).narrow(1, 0, lengths[row]);
      CHECK(together.narrow(0, row, 1).equal(model->generate(alone, options)));
    }
  }
  for (const auto& lengths : {at::tensor({1, 6}), at::tensor({0, 2}), at::tensor({1})}) {
    CHECK_THROWS_WITH(model->generate(prompt(), GenerateOptions(12).lengths(lengths)),
                      ContainsSubstring("lengths must"));
  }
}

TEST_CASE("tokens arrive as they arise, until one says stop", "[generation]") {
  MambaLMHeadModel model = small_model();
  std::vector<Tensor> arrived;
  const auto options = GenerateOptions(12)
                           .on_tokens([&](const Tensor& tokens) { arrived.push_back(tokens); })
                           .should_stop([&] { return arrived.size() == 4; });
  const Tensor sequences = model->generate(prompt(), options);
  REQUIRE(sequences.sizes() == at::IntArrayRef({2, 9}));
  CHECK(at::cat(arrived, 1).equal(sequences.narrow(1, 5, 4)));
  CHECK(model->generate(prompt(), 12).narrow(1, 0, 9).equal(sequences));
}

TEST_CASE("the scan's states may have a type of their own", "[generation]") {
  MambaLMHeadModel model = small_model();
  for (const auto& state : model->allocate_inference_cache(3, 0, std::nullopt, at::kBFloat16)) {
    CHECK(state.conv_state.scalar_type() == at::kFloat);
    CHECK(state.ssm_state.scalar_type() == at::kBFloat16);
  }
  const auto options = GenerateOptions(12).state_dtype(at::kFloat);
  CHECK(model->generate(prompt(), options).equal(model->generate(prompt(), 12)));
}

TEST_CASE("graphs change nothing on a CPU", "[generation]") {
  MambaLMHeadModel model = small_model();
  const auto options = GenerateOptions(12).cg(true);
  CHECK(model->generate(prompt(), options).equal(model->generate(prompt(), 12)));
}

TEST_CASE("generation refuses what it cannot do", "[generation]") {
  MambaLMHeadModel model = small_model();
  CHECK(model->generate(prompt(), 5).equal(prompt()));
  CHECK_THROWS_WITH(model->generate(prompt()[0], 5), ContainsSubstring("(batch, seqlen)"));
  CHECK_THROWS_WITH(model->generate(prompt(), GenerateOptions(9).top_p(2)),
                    ContainsSubstring("top_p"));
  CHECK_THROWS_WITH(model->generate(prompt(), GenerateOptions(9).repetition_penalty(0)),
                    ContainsSubstring("repetition_penalty"));
  CHECK_THROWS_WITH(model->generate(prompt(), GenerateOptions(9).prefill_chunk_size(0)),
                    ContainsSubstring("prefill_chunk_size"));
}
