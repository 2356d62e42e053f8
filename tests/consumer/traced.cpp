// A model that torch.jit.trace recorded in Python: linking the library is enough to run it.
#include <torch/script.h>

#include <iostream>

int main(int, char** arguments) {
  torch::jit::Module example = torch::jit::load(arguments[1]);
  const at::NoGradGuard no_grad;
  const at::Tensor logits = example.forward({example.attr("input_ids")}).toTensor();
  const bool ok = at::allclose(logits, example.attr("logits").toTensor());
  std::cout << "traced model: logits " << logits.sizes() << (ok ? "" : ", wrong") << "\n";
  return ok ? 0 : 1;
}
