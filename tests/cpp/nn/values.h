// Comparing tensors, and where the recorded ones are.
#pragma once

#include <ATen/Functions.h>

#include <catch2/catch_test_macros.hpp>
#include <filesystem>
#include <string>

/// A file of recorded tensors that the Python tests read too.
inline std::filesystem::path golden_file(const std::string& name) {
  return std::filesystem::path(MAMBA_SSM_GOLDEN_DIR) / name;
}

/// Checks that the shapes are equal and |actual - expected| <= atol + rtol |expected| everywhere.
inline void check_close(const at::Tensor& actual, const at::Tensor& expected, double rtol = 1e-4,
                        double atol = 1e-5) {
  REQUIRE(actual.sizes() == expected.sizes());
  if (actual.numel() == 0) return;  // has no maximum
  CAPTURE((actual - expected).abs().max().item<double>());
  CHECK(at::allclose(actual, expected, rtol, atol));
}
