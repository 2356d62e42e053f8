// Names no symbol of the library: linking it must be enough to have its ops registered.
#include <ATen/core/dispatch/Dispatcher.h>

#include <iostream>
#include <utility>
#include <vector>

int main() {
  std::vector<std::pair<const char*, c10::DispatchKey>> kernels = {
      {"mamba_ssm::selective_scan", c10::DispatchKey::CPU},
      {"mamba_ssm::ssd_chunk_scan", c10::DispatchKey::CPU},
      {"mamba_ssm::causal_conv1d_update", c10::DispatchKey::CPU}};
#ifdef EXPECT_DERIVATIVES
  kernels.insert(kernels.end(), {{"mamba_ssm::selective_scan", c10::DispatchKey::Autograd},
                                 {"mamba_ssm::ssd_chunk_scan", c10::DispatchKey::Meta}});
#endif
  for (const auto& [name, key] : kernels) {
    const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
    if (!op || !op->hasKernelForDispatchKey(key)) {
      std::cerr << name << " has no kernel for " << key << "\n";
      return 1;
    }
  }
  std::cout << "all ops are registered\n";
}
