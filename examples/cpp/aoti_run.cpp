// Runs a program that Python has compiled with AOTInductor (a .pt2 package) and that calls the ops
// of mamba_ssm, without Python; see kUsage. tests/python/test_examples.py shows how one is made.
#include <ATen/Functions.h>
#include <mamba_ssm/io/safetensors.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <iostream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "program.h"

namespace {

constexpr char kUsage[] =
    "mamba_aoti_run PACKAGE.pt2 TENSORS.safetensors [--device cpu] [--rtol 1e-4] [--atol 1e-5]\n"
    "The tensors are input.0, input.1, ...; what there is of output.0, output.1, ... is "
    "compared.\n";

/// prefix.0, prefix.1, ..., as far as they go.
std::vector<at::Tensor> take(const std::map<std::string, at::Tensor>& tensors,
                             const std::string& prefix) {
  std::vector<at::Tensor> result;
  for (;;) {
    const auto tensor = tensors.find(prefix + "." + std::to_string(result.size()));
    if (tensor == tensors.end()) return result;
    result.push_back(tensor->second);
  }
}

int run(int argc, char** argv) {
  const Arguments arguments(argc, argv, {{"device", "cpu"}, {"rtol", "1e-4"}, {"atol", "1e-5"}});
  if (arguments.words().size() != 2) throw std::invalid_argument("PACKAGE and TENSORS are needed");
  const auto rtol = arguments.number<double>("rtol"), atol = arguments.number<double>("atol");
  const at::Device device(arguments.text("device"));

  const auto tensors = mamba_ssm::load_safetensors(arguments.words()[1]);
  std::vector<at::Tensor> inputs = take(tensors, "input");
  for (at::Tensor& input : inputs) input = input.to(device);
  const std::vector<at::Tensor> expected = take(tensors, "output");

  torch::inductor::AOTIModelPackageLoader program(arguments.words()[0]);
  const std::vector<at::Tensor> outputs = program.run(inputs);
  if (!expected.empty() && expected.size() != outputs.size()) {
    throw std::runtime_error(std::to_string(expected.size()) + " outputs expected, got " +
                             std::to_string(outputs.size()));
  }
  bool agree = true;
  for (size_t i = 0; i < outputs.size(); ++i) {
    const at::Tensor output = outputs[i].cpu();
    std::cout << "output." << i << ": " << output.scalar_type() << " " << output.sizes();
    if (expected.empty()) {
      std::cout << "\n" << output << "\n";
      continue;
    }
    const bool is_close = output.sizes() == expected[i].sizes() &&
                          at::allclose(output, expected[i].to(output.scalar_type()), rtol, atol);
    std::cout << (is_close ? ", as expected\n" : ", NOT as expected\n");
    agree = agree && is_close;
  }
  return agree ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program(kUsage, [&] { return run(argc, argv); });
}
