// Selective scan on CPU: work items and workspace. The kernels are in selective_scan_cpu.cpp.
#include <algorithm>
#include <numeric>

#include "selective_scan_cpu.h"

namespace mamba_ssm::kernels {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

SelectiveScanBlocks blocks_of(const SelectiveScanParams& p, int64_t block) {
  if (p.dim == 0) return {};
  SelectiveScanBlocks s;
  s.span = std::gcd(p.constant_B ? p.dim : p.dim / p.groups_B,
                    p.constant_C ? p.dim : p.dim / p.groups_C);
  s.block = std::min(block, s.span);
  s.per_span = ceil_div(s.span, s.block);
  s.per_row = p.dim / s.span * s.per_span;
  return s;
}

}  // namespace

SelectiveScanBlocks selective_scan_fwd_blocks(const SelectiveScanParams& p) {
  return blocks_of(p, kScanUnit);
}

SelectiveScanBlocks selective_scan_bwd_blocks(const SelectiveScanParams& p) {
  // Larger blocks leave fewer partial sums of dB and dC, once there are items enough.
  constexpr int64_t kItems = 256, kMaxBlock = 8 * kScanUnit;
  int64_t block = kScanUnit;
  while (block < kMaxBlock && p.batch * p.dim >= 2 * block * kItems) block *= 2;
  return blocks_of(p, block);
}

SelectiveScanWorkspace selective_scan_bwd_layout(const SelectiveScanParams& p) {
  const SelectiveScanBlocks blocks = selective_scan_bwd_blocks(p);
  const int64_t channels = p.batch * p.dim;
  const int64_t per_state = channels * p.dstate * (p.complex_A ? 2 : 1);
  const int64_t per_token = p.batch * blocks.per_row * p.dstate * p.seqlen * (p.complex_A ? 2 : 1);
  SelectiveScanWorkspace w{};
  const auto take = [&w](int64_t elements) {
    const int64_t at = w.size;
    w.size += elements;
    return at;
  };
  w.dstate = take(p.dstate > kScanResidentStates ? per_state : 0);
  w.dA = take(per_state);
  w.dB = take(p.dB ? (p.constant_B ? per_state : per_token) : 0);
  w.dC = take(p.dC ? (p.constant_C ? per_state : per_token) : 0);
  w.dD = take(channels);
  w.ddelta_bias = take(channels);
  return w;
}

int64_t selective_scan_fwd_items(const SelectiveScanParams& p) {
  return p.batch * selective_scan_fwd_blocks(p).per_row;
}

int64_t selective_scan_bwd_items(const SelectiveScanParams& p) {
  return p.batch * selective_scan_bwd_blocks(p).per_row;
}

// Rows of dB, rows of dC, units of channels: see selective_scan_bwd_reduce_cpu.
int64_t selective_scan_bwd_reduce_items(const SelectiveScanParams& p) {
  const int64_t rows_B = p.dB && !p.constant_B ? p.batch * p.groups_B * p.dstate : 0;
  const int64_t rows_C = p.dC && !p.constant_C ? p.batch * p.groups_C * p.dstate : 0;
  return rows_B + rows_C + ceil_div(p.dim, kScanUnit);
}

size_t selective_scan_bwd_cpu_workspace(const SelectiveScanParams& p) {
  const size_t element = p.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  return static_cast<size_t>(selective_scan_bwd_layout(p).size) * element;
}

}  // namespace mamba_ssm::kernels
