// Both modules, forward and backward, through the installed headers.
#include <mamba_ssm/mamba_ssm.h>

#include <iostream>

template <typename Block>
bool works(Block block, const at::Tensor& input, int64_t expected) {
  int64_t parameters = 0;
  for (const auto& parameter : block->parameters()) parameters += parameter.numel();
  const at::Tensor out = block->forward(input);
  out.sum().backward();
  std::cout << parameters << " parameters, " << out.sizes() << "\n";
  return parameters == expected && block->parameters().front().grad().defined();
}

int main() {
  const mamba_ssm::Mamba mamba(mamba_ssm::MambaOptions(16).d_state(64));
  const mamba_ssm::Mamba2 mamba2(mamba_ssm::Mamba2Options(1024).d_state(64));
  const bool ok = works(mamba, torch::randn({2, 32, 16}), 7968) &&
                  works(mamba2, torch::randn({2, 64, 1024}), 6468320);
  return ok ? 0 : 1;
}
