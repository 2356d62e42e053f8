// How the CPU kernels of selective_scan divide a call: into work items, and the backward's
// workspace.
#pragma once

#include "selective_scan.h"

namespace mamba_ssm::kernels {

/// Channels that share one staged tile of B and C: whole vectors of every instruction set.
inline constexpr int kScanUnit = 32;

/// Up to this dstate, states and decay rates stay in scratch from tile to tile; beyond, they are
/// fetched for every tile.
inline constexpr int kScanResidentStates = 64;

/// A work item is one batch row and one block of channels. A span is a run of channels that read
/// the same group of B and the same group of C; blocks do not cross spans.
struct SelectiveScanBlocks {
  int64_t span;      // channels of a span
  int64_t block;     // channels of a block; the last one of a span may have fewer
  int64_t per_span;  // blocks of a span
  int64_t per_row;   // blocks of a batch row
};

SelectiveScanBlocks selective_scan_fwd_blocks(const SelectiveScanParams& p);
SelectiveScanBlocks selective_scan_bwd_blocks(const SelectiveScanParams& p);

/// Where things are in the backward's workspace, in real elements of the type that sums run in;
/// complex ones are pairs.
struct SelectiveScanWorkspace {
  int64_t dstate;       // (batch, dim, dstate): beyond kScanResidentStates: gradient of the state
  int64_t dA;           // (batch, dim, dstate)
  int64_t dB, dC;       // (batch, blocks, dstate, seqlen); constant: (batch, dim, dstate)
  int64_t dD;           // (batch, dim)
  int64_t ddelta_bias;  // (batch, dim)
  int64_t size;
};

SelectiveScanWorkspace selective_scan_bwd_layout(const SelectiveScanParams& p);

}  // namespace mamba_ssm::kernels
