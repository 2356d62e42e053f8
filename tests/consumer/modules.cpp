// A module, forward and backward, through the installed headers.
#include <mamba_ssm/mamba_ssm.h>

#include <iostream>

int main() {
  mamba_ssm::Mamba mamba(mamba_ssm::MambaOptions(16).d_state(64));
  int64_t parameters = 0;
  for (const auto& parameter : mamba->parameters()) parameters += parameter.numel();
  const at::Tensor out = mamba->forward(torch::randn({2, 32, 16}));
  out.sum().backward();
  std::cout << parameters << " parameters, " << out.sizes() << "\n";
  return parameters == 7968 && mamba->parameters().front().grad().defined() ? 0 : 1;
}
