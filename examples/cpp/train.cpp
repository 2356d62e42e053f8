// Trains a small byte-level Mamba-2 language model on a text and saves it for
// MambaLMHeadModel.from_pretrained in Python, and for mamba_generate; see kUsage.
#include <mamba_ssm/nn/model.h>
#include <torch/nn/functional/loss.h>
#include <torch/nn/utils/clip_grad.h>
#include <torch/optim/adamw.h>
#include <torch/utils.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>

#include "program.h"

namespace {

constexpr char kUsage[] =
    "mamba_train TEXT_FILE CHECKPOINT_FOLDER [--steps 200] [--batch 8] [--seqlen 128]\n"
    "           [--d-model 64] [--layers 2] [--lr 0.003] [--seed 0] [--device cpu]\n";

/// The bytes of a file, int64.
at::Tensor read_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!file || text.empty()) throw std::runtime_error(path + ": cannot be read, or is empty");
  const auto options = at::TensorOptions(at::kByte);
  return at::from_blob(const_cast<char*>(text.data()), {static_cast<int64_t>(text.size())}, options)
      .to(at::kLong);
}

int train(int argc, char** argv) {
  const Arguments arguments(argc, argv,
                            {{"steps", "200"},
                             {"batch", "8"},
                             {"seqlen", "128"},
                             {"d-model", "64"},
                             {"layers", "2"},
                             {"lr", "0.003"},
                             {"seed", "0"},
                             {"device", "cpu"}});
  if (arguments.words().size() != 2) {
    throw std::invalid_argument("TEXT_FILE and CHECKPOINT_FOLDER are needed");
  }
  const auto steps = arguments.number<int64_t>("steps"), batch = arguments.number<int64_t>("batch"),
             seqlen = arguments.number<int64_t>("seqlen");
  const auto learning_rate = arguments.number<double>("lr");
  const at::Device device(arguments.text("device"));
  at::manual_seed(arguments.number<uint64_t>("seed"));

  const at::Tensor text = read_bytes(arguments.words()[0]);
  const int64_t starts = text.numel() - seqlen;  // of windows of seqlen + 1 bytes
  if (starts < 1) throw std::runtime_error("the text is shorter than --seqlen");
  mamba_ssm::MambaLMHeadModel model(
      mamba_ssm::MambaLMConfig()
          .d_model(arguments.number<int64_t>("d-model"))
          .n_layer(arguments.number<int64_t>("layers"))
          .vocab_size(256)
          .ssm_cfg(mamba_ssm::Mamba2Options(0).d_state(32).headdim(32))
          .device(device));
  torch::optim::AdamW optimizer(model->parameters(),
                                torch::optim::AdamWOptions(learning_rate).weight_decay(0.1));

  model->train();
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t step = 1; step <= steps; ++step) {
    const at::Tensor windows =
        at::randint(starts, {batch, 1}, at::kLong) + at::arange(seqlen + 1, at::kLong);
    const at::Tensor bytes = text.take(windows).to(device);  // (batch, seqlen + 1)
    const at::Tensor logits = model->forward(bytes.narrow(1, 0, seqlen));
    const at::Tensor loss = torch::nn::functional::cross_entropy(
        logits.flatten(0, 1), bytes.narrow(1, 1, seqlen).flatten());
    optimizer.zero_grad();
    loss.backward();
    torch::nn::utils::clip_grad_norm_(model->parameters(), /*max_norm=*/1);
    // Up over the first tenth of the steps, then down to 0 along a cosine.
    const double progress = static_cast<double>(step) / static_cast<double>(steps);
    const double scale = std::min(10 * progress, 0.5 + 0.5 * std::cos(M_PI * progress));
    static_cast<torch::optim::AdamWOptions&>(optimizer.param_groups()[0].options())
        .lr(learning_rate * scale);
    optimizer.step();
    if (step == 1 || step % std::max<int64_t>(steps / 10, 1) == 0) {
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
      std::cout << "step " << step << " of " << steps << ": " << loss.item<double>() / std::log(2)
                << " bits/byte, " << static_cast<double>(step * batch * seqlen) / seconds.count()
                << " bytes/s" << std::endl;
    }
  }
  model->save_pretrained(arguments.words()[1]);
  std::cout << "saved to " << arguments.words()[1] << "\n";
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program(kUsage, [&] { return train(argc, argv); });
}
