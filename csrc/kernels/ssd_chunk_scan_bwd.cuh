// What the two paths of the SSD backward share: how a call is cut, and what stands in its
// workspace.
#pragma once

#include "ssd_chunk_scan.cuh"

namespace mamba_ssm::kernels {

/// The tokens of a chunk, bit t for token t. A token behind the sequence's end is not real.
struct ChunkMasks {
  uint64_t real, resets;

  /// Tokens before it see the state before the chunk.
  __device__ int first_reset() const {
    return resets == 0 ? kChunk : __ffsll(static_cast<long long>(resets)) - 1;
  }
  /// Tokens from it on reach the state behind the chunk.
  __device__ int last_reset() const {
    return resets == 0 ? 0 : kChunk - 1 - __clzll(static_cast<long long>(resets));
  }
  /// Tokens from t up to it, exclusive, see token t.
  __device__ int next_reset(int t) const {
    const uint64_t later = resets >> t >> 1;
    return later == 0 ? kChunk : t + __ffsll(static_cast<long long>(later));
  }
};

/// Steps and decays of all chunks, and what the chunks leave for the gradients of both. N is float,
/// or double where the result has to have float's accuracy or better.
///
/// The gradient of log(decay) of token t of a chunk is
///   passing + sum of `later` over tokens >= t + sum of `earlier` over tokens < t
/// and that of step t is `input`, plus A times the former.
template <class N>
struct StepSpace {
  Segments chunks;      // of kChunk tokens
  int64_t heads;        // of the sums: nheads, times the blocks of headdim that leave sums of
  int64_t head_blocks;  // their own
  int64_t width;        // channels of dD per block, at least headdim / head_blocks
  ChunkMasks* masks;    // (slots)
  N* step;              // (slots, nheads, kChunk)
  N* decay;             // likewise: c_t
  N* decay_rest;        // likewise: what rounding took from c_t; of the plain path
  N* later;             // (slots, heads, kChunk)
  N* earlier;           // likewise
  N* input;             // likewise
  N* passing;           // (slots, heads)
  N* dD;                // (slots, heads, width)
  N* dA;                // (slots, nheads)
  N* ddt_bias;          // likewise

  StepSpace(const SsdChunkScanParams& p, int64_t head_blocks, int64_t width, Workspace& workspace)
      : chunks(Segments::of_length(p, kChunk)),
        heads(p.nheads * head_blocks),
        head_blocks(head_blocks),
        width(width) {
    const int64_t slots = chunks.slots;
    masks = workspace.take<ChunkMasks>(slots);
    step = workspace.take<N>(slots * p.nheads * kChunk);
    decay = workspace.take<N>(slots * p.nheads * kChunk);
    decay_rest = workspace.take<N>(std::is_same_v<N, double> ? slots * p.nheads * kChunk : 0);
    later = workspace.take<N>(slots * heads * kChunk);
    earlier = workspace.take<N>(slots * heads * kChunk);
    input = workspace.take<N>(slots * heads * kChunk);
    passing = workspace.take<N>(slots * heads);
    dD = workspace.take<N>(given(p.dD) ? slots * heads * width : 0);
    dA = workspace.take<N>(slots * p.nheads);
    ddt_bias = workspace.take<N>(slots * p.nheads);
  }

  /// Slot of the chunk that starts at token `begin` of sequence r.
  __device__ int64_t slot_of(const SsdChunkScanParams& p, int64_t r, int64_t begin) const {
    const int64_t sequence_begin = sequence_of(p, r).begin;
    return chunks.first_slot(p, r, sequence_begin) + (begin - sequence_begin) / kChunk;
  }
};

/// True if sequence r has an initial state of its own, row r of initial_states.
__device__ inline bool has_initial_state(const SsdChunkScanParams& p, int64_t r) {
  return r < p.num_initial_states;
}

}  // namespace mamba_ssm::kernels
