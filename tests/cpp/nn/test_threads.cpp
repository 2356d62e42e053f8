// Modules and ops that several threads use at once give each the answers of a single one, to the
// bit.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Functions.h>
#include <mamba_ssm/nn/model.h>
#include <mamba_ssm/ops.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/utils.h>

#include <atomic>
#include <catch2/catch_test_macros.hpp>
#include <functional>
#include <thread>
#include <vector>

using at::Tensor;

namespace {

using Results = std::vector<Tensor>;

/// Checks that compute(i), called for each i on a thread of its own, several times while the others
/// run, gives what it gives when it is called alone.
void check_threads(const std::function<Results(int64_t)>& compute) {
  constexpr int64_t kThreads = 8;
  constexpr int kRepetitions = 5;
  std::vector<Results> alone;
  for (int64_t i = 0; i < kThreads; ++i) alone.push_back(compute(i));

  std::atomic<int64_t> waiting = kThreads;  // all begin together
  std::vector<int> mismatches(kThreads);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      const auto index = static_cast<size_t>(i);
      --waiting;
      while (waiting > 0) std::this_thread::yield();
      for (int repetition = 0; repetition < kRepetitions; ++repetition) {
        const Results results = compute(i);
        for (size_t k = 0; k < results.size(); ++k) {
          mismatches[index] += !results[k].equal(alone[index][k]);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(mismatches == std::vector<int>(kThreads));
}

/// Values that differ from thread to thread.
Tensor values(int64_t thread, at::IntArrayRef sizes) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(thread));
  return at::randn(sizes, generator);
}

/// The gradients of sum(out^2) in the inputs; not summed up in the inputs, which threads share.
Results gradients(const Tensor& out, const std::vector<Tensor>& inputs) {
  return torch::autograd::grad({out.square().sum()}, inputs);
}

/// Forward, gradients, and decoding with a state of the thread's own, of one block for all threads.
template <class Block>
void check_block(Block block) {
  const std::vector<Tensor> parameters = block->parameters();
  check_threads([&](int64_t i) {
    const Tensor x = values(i, {2, 40 + i, 16}).requires_grad_();
    const Tensor out = block->forward(x);
    std::vector<Tensor> inputs = parameters;
    inputs.push_back(x);
    Results results = gradients(out, inputs);
    results.push_back(out.detach());
    const torch::NoGradGuard no_grad;
    auto state = block->allocate_inference_cache(2);
    results.push_back(block->forward(x.slice(1, 0, 30), &state));
    for (int64_t t = 30; t < 35; ++t) {
      results.push_back(block->forward(x.slice(1, t, t + 1), &state));
    }
    results.insert(results.end(), {state.conv_state, state.ssm_state});
    return results;
  });
}

}  // namespace

TEST_CASE("blocks are used from several threads", "[threads]") {
  at::manual_seed(0);
  check_block(mamba_ssm::Mamba(mamba_ssm::MambaOptions(16)));
  check_block(mamba_ssm::Mamba2(mamba_ssm::Mamba2Options(16).headdim(8).d_state(16)));
}

TEST_CASE("ops are used from several threads", "[threads]") {
  check_threads([](int64_t i) {
    const int64_t dim = 24, dstate = 8, seqlen = 50 + i;
    const Tensor u = values(i, {2, dim, seqlen}).requires_grad_();
    const Tensor weight = values(i + 1, {dim, 4}).requires_grad_();
    const Tensor A = -values(0, {dim, dstate}).exp();
    const Tensor B = values(i + 2, {2, dstate, seqlen}), C = values(i + 3, {2, dstate, seqlen});
    const auto [x, conv_state] = mamba_ssm::causal_conv1d(u, weight);
    const auto [y, last_state] = mamba_ssm::selective_scan(x, u.sigmoid(), A, B, C);
    const Tensor rows = y.transpose(1, 2).contiguous();
    const Tensor out = mamba_ssm::rms_norm_gated(rows, at::ones({dim}), {}, rows.sigmoid());
    const auto [z, final_states] = mamba_ssm::ssd_chunk_scan(
        out.view({2, seqlen, 3, 8}), values(i, {2, seqlen, 3}).sigmoid(), -at::ones({3}),
        B.transpose(1, 2).unsqueeze(2), C.transpose(1, 2).unsqueeze(2));
    Results results = gradients(z, {u, weight});
    for (const Tensor& result : {conv_state, last_state, out, z, final_states}) {
      results.push_back(result.detach());
    }
    return results;
  });
}

TEST_CASE("a model generates in several threads", "[threads]") {
  at::manual_seed(0);
  mamba_ssm::MambaLMHeadModel model(
      mamba_ssm::MambaLMConfig().d_model(16).n_layer(2).vocab_size(50).ssm_cfg(
          mamba_ssm::Mamba2Options(0).d_state(4).headdim(8)));
  check_threads([&](int64_t i) {
    const auto options = mamba_ssm::GenerateOptions(20).top_k(0).generator(
        at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(i)));
    const Tensor prompt = (at::arange(4) + i).unsqueeze(0);
    return Results{model->generate(prompt, options), model->forward(prompt).detach()};
  });
}
