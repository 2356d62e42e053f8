// SSD chunk scan on CPU: work items and workspace. The kernels are in ssd_chunk_scan_cpu.cpp.
#include <algorithm>

#include "ssd_chunk_scan_cpu.h"

namespace mamba_ssm::kernels {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

SsdChunkScanBlocks blocks_of(const SsdChunkScanParams& p, int64_t heads) {
  SsdChunkScanBlocks s{};
  s.group = p.ngroups > 0 ? p.nheads / p.ngroups : 0;
  s.block = std::max<int64_t>(1, std::min(heads, s.group));
  s.per_group = ceil_div(s.group, s.block);
  s.per_sequence = p.ngroups * s.per_group;
  return s;
}

}  // namespace

SsdChunkScanBlocks ssd_chunk_scan_fwd_blocks(const SsdChunkScanParams& p) {
  return blocks_of(p, 1);
}

// Every block of the backward leaves a partial sum of dB and dC, hence fewer of them: of 4 heads,
// and of more once there are items enough.
SsdChunkScanBlocks ssd_chunk_scan_bwd_blocks(const SsdChunkScanParams& p) {
  constexpr int64_t kItems = 64, kMaxBlock = 16;
  int64_t block = 4;
  while (block < kMaxBlock && p.num_sequences * p.nheads >= 2 * block * kItems) block *= 2;
  return blocks_of(p, block);
}

SsdChunkScanWorkspace ssd_chunk_scan_bwd_layout(const SsdChunkScanParams& p) {
  const SsdChunkScanBlocks blocks = ssd_chunk_scan_bwd_blocks(p);
  const int64_t heads = p.num_sequences * p.nheads;
  const int64_t per_token = p.batch * blocks.per_sequence * p.seqlen * p.dstate;
  SsdChunkScanWorkspace w{};
  const auto take = [&w](int64_t elements) {
    const int64_t at = w.size;
    w.size += elements;
    return at;
  };
  w.dB = take(per_token);
  w.dC = take(per_token);
  w.dA = take(heads);
  w.dD = take(p.D ? heads * p.headdim : 0);
  w.ddt_bias = take(heads);
  return w;
}

int64_t ssd_chunk_scan_fwd_items(const SsdChunkScanParams& p) {
  return p.num_sequences * ssd_chunk_scan_fwd_blocks(p).per_sequence;
}

int64_t ssd_chunk_scan_bwd_items(const SsdChunkScanParams& p) {
  return p.num_sequences * ssd_chunk_scan_bwd_blocks(p).per_sequence;
}

// Tiles of tokens of dB and dC, then heads: see ssd_chunk_scan_bwd_reduce_cpu.
int64_t ssd_chunk_scan_bwd_reduce_items(const SsdChunkScanParams& p) {
  return p.batch * p.ngroups * ceil_div(p.seqlen, kSsdReduceTokens) + p.nheads;
}

size_t ssd_chunk_scan_bwd_cpu_workspace(const SsdChunkScanParams& p) {
  const size_t element = p.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  return static_cast<size_t>(ssd_chunk_scan_bwd_layout(p).size) * element;
}

}  // namespace mamba_ssm::kernels
