// How the CPU kernels of ssd_chunk_scan divide a call: into work items, and the backward's
// workspace.
#pragma once

#include "ssd_chunk_scan.h"

namespace mamba_ssm::kernels {

/// A work item is one sequence and one block of heads, all of one group of B and C. Items of a
/// range that have these in common are done together, so that what depends on B and C alone is
/// computed once; the results are the same bits as one by one.
struct SsdChunkScanBlocks {
  int64_t group;         // heads of a group
  int64_t block;         // heads of a block; the last one of a group may have fewer
  int64_t per_group;     // blocks of a group
  int64_t per_sequence;  // blocks of a sequence
};

SsdChunkScanBlocks ssd_chunk_scan_fwd_blocks(const SsdChunkScanParams& p);
SsdChunkScanBlocks ssd_chunk_scan_bwd_blocks(const SsdChunkScanParams& p);

/// Tokens whose dB and dC one reduce item adds up.
inline constexpr int64_t kSsdReduceTokens = 64;

/// Where the partial sums are in the backward's workspace, in elements of the type that sums run
/// in.
struct SsdChunkScanWorkspace {
  int64_t dB, dC;    // (batch, ngroups, blocks of a group, seqlen, dstate)
  int64_t dA;        // (num_sequences, nheads)
  int64_t dD;        // (num_sequences, nheads, headdim)
  int64_t ddt_bias;  // (num_sequences, nheads)
  int64_t size;
};

SsdChunkScanWorkspace ssd_chunk_scan_bwd_layout(const SsdChunkScanParams& p);

}  // namespace mamba_ssm::kernels
