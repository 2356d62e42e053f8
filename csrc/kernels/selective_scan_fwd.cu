// Selective scan, forward.
//
// Shared path (selective_scan.cuh): a block walks its channels tile by tile. Per tile: dt and dt u
// of each token once; the recurrence, 4 states per lane, each lane leaving its share of y in a
// plane of its own; then y as the sum of the four planes, D u, the gate. B and C of the next tile
// and the tokens of the next tile are on their way meanwhile.
#pragma nv_diag_suppress 177  // float64 has no use for the shared path
#include "launch.cuh"
#include "selective_scan.cuh"

namespace mamba_ssm::kernels {
namespace {

// Fitted to runs on an H200, 2026-11-26, in microseconds: 16 states, bfloat16. Of 16 shapes the
// plan is the best of 11 numbers of segments or at most 2.2 % behind it.
constexpr ScanCost kForwardCost = {
    /*main=*/{/*resident=*/3, /*latency=*/0.0371, /*work=*/0.0234},
    /*first_pass=*/{/*resident=*/8, /*latency=*/0.0633, /*work=*/0.0107},
    /*start=*/24};
constexpr int kMatrixPitch = 2 * kQuarters + 1;  // float4 per token of B and C: no bank conflicts

/// Planes of a warp: dt, dt u and the four shares of y. With one state block, dt and dt u are dead
/// once read, and two of the shares take their place.
__host__ __device__ constexpr int planes_per_warp(int state_blocks) {
  return state_blocks == 1 ? kQuarters : kQuarters + 2;
}

/// kWhole: dstate is a multiple of a state block. Else infinity among the inputs may not meet the
/// zeros of states that do not exist. kUneven: see load_row.
template <class T, bool kPacked, bool kWhole, bool kUneven>
__global__ void __launch_bounds__(kThreads, kForwardCost.main.resident)
    forward_shared(const SelectiveScanParams p, const ScanPlan plan, const SegmentSums sums) {
  extern __shared__ float4 shared[];
  constexpr int kPlane = plane_size(1);
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int row = lane / kQuarters;
  const int part = lane % kQuarters;  // quarter of a state block, or 8 tokens of a tile
  float4* const matrices = shared;    // (2, kTile, kMatrixPitch)
  float4* const states = matrices + 2 * kTile * kMatrixPitch;   // (state_blocks, threads)
  float4* const rates = states + plan.state_blocks * kThreads;  // (state_blocks, threads)
  float* const steps = reinterpret_cast<float*>(rates + plan.state_blocks * kThreads) +
                       warp * planes_per_warp(plan.state_blocks) * kPlane;  // dt
  float* const inputs = steps + kPlane;                                     // dt u
  float* const shares = plan.state_blocks == 1 ? steps : inputs + kPlane;   // (kQuarters) of y

  const ScanPlace place = scan_place(p, plan, kWarps * kRows, 0, plan.segments);
  const int c = place.channel + warp * kRows + row;
  const bool exists = c < place.channel_end;
  const int end = exists ? place.end : 0;  // a channel that does not exist has no tokens
  const float bias = exists ? parameter<float>(p.delta_bias, c) : 0.0f;
  const float D = exists ? parameter<float>(p.D, c) : 0.0f;

  for (int block = 0; block < plan.state_blocks; ++block) {
    const int n = block * kStateBlock + part * kStates;
    const int count = StateSlot(0, n, p.dstate, exists).count;
    float rate[kStates], h[kStates];
    load_decay_rates(p.A, c, n, count, rate);
    load_states(p.initial_state, place.b, c, n, count, h);
    if (count > 0) {
      pass_segments(sums, place.segment_row - place.segment, 1, place.segment, p.dim, p.dstate, c,
                    n, rate, h);
    }
    rates[block * kThreads + threadIdx.x] = pack(rate);
    states[block * kThreads + threadIdx.x] = pack(h);
  }

  Tokens<T> u, delta, z;
  const auto load_inputs = [&](int begin) {
    const int t = begin + part * kTokens;
    const auto load = [&](const View<3>& v, unsigned bit) {
      prefetch_tokens<T>(v, plan.vectors & bit || (kUneven && v.stride[2] == 1), place.b, c,
                         t + kTile, 0, end);
      return load_tokens<T, kUneven>(v, plan.vectors & bit, place.b, c, t, end);
    };
    u = load(p.u, kVectorU);
    delta = load(p.delta, kVectorDelta);
    if (given(p.z)) z = load(p.z, kVectorZ);
  };
  MatrixStage<T, 2, kUneven> stage;
  const auto load_matrices = [&](int begin, int block) {
    stage.load(p.B, plan.vectors & kVectorB, p.C, plan.vectors & kVectorC, place.b, place.group,
               p.dstate, begin, place.end, block);
  };
  load_matrices(place.begin, 0);
  load_inputs(place.begin);

  int buffer = 0;
  for (int begin = place.begin; begin < place.end; begin += kTile) {
    const TileMarks marks = tile_marks<kPacked>(p, place.b, begin, place.end);
    float dt[kTokens], x[kTokens];
    time_steps(delta, bias, p.delta_softplus, dt);
#pragma unroll
    for (int j = 0; j < kTokens; ++j) x[j] = dt[j] * u[j];
    clear_tokens(marks.padding, part, dt);
    clear_tokens(marks.padding, part, x);
    write_plane(steps, row, part, dt);
    write_plane(inputs, row, part, x);

    for (int block = 0; block < plan.state_blocks; ++block) {
      float4* const matrix = matrices + buffer * kTile * kMatrixPitch;
      buffer ^= 1;
      stage.store(marks.padding, [&](int token, int n, float value) {
        reinterpret_cast<float*>(matrix)[token * (4 * kMatrixPitch) + n] = value;
      });
      __syncthreads();  // a buffer is written again two barriers after its last reader passed one
      const bool last = block + 1 == plan.state_blocks;
      load_matrices(last ? begin + kTile : begin, last ? 0 : block + 1);

      float rate[kStates], h[kStates];
      unpack(rates[block * kThreads + threadIdx.x], rate);
      unpack(states[block * kThreads + threadIdx.x], h);
      const int count =
          kWhole ? kStates
                 : StateSlot(0, block * kStateBlock + part * kStates, p.dstate, true).count;
      if (p.states != nullptr) {
        const int chunks = (static_cast<int>(p.seqlen) + kTile - 1) / kTile;
        const StateSlot slot((int64_t{place.b} * chunks + begin / kTile) * p.dim + c,
                             block * kStateBlock + part * kStates, p.dstate, exists);
        slot.store(static_cast<float*>(p.states), h);
      }

      // Decays and inputs of the next kAhead tokens are computed beside the recurrence over those
      // at hand, whose chain of dependent instructions would leave the units idle.
      constexpr int kAhead = 4;
      struct Stage {
        float a[kAhead][kStates];  // decays
        float b[kAhead][kStates];  // dt u B
      };
      const auto prepare = [&](int t, Stage& next) {
        float step[kAhead], input[kAhead];
        unpack(plane_row(steps, row)[t / 4], step);
        unpack(plane_row(inputs, row)[t / 4], input);
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          float B[kStates];
          unpack(matrix[(t + k) * kMatrixPitch + part], B);
#pragma unroll
          for (int s = 0; s < kStates; ++s) {
            next.a[k][s] = fast_exp2(step[k] * rate[s]);
            next.b[k][s] = kWhole || s < count ? input[k] * B[s] : 0.0f;
          }
        }
      };
      float4* const share_row = plane_row(shares + part * kPlane, row);
      const auto consume = [&](int t, const Stage& now, float(&y)[kAhead]) {
#pragma unroll
        for (int k = 0; k < kAhead; ++k) y[k] = 0;
        if (block > 0) unpack(share_row[t / 4], y);
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          float C[kStates];
          unpack(matrix[(t + k) * kMatrixPitch + kQuarters + part], C);
          const bool reset = kPacked && (marks.resets >> (t + k) & 1);
#pragma unroll
          for (int s = 0; s < kStates; ++s) {
            h[s] = fmaf(now.a[k][s], reset ? 0.0f : h[s], now.b[k][s]);
            y[k] = fmaf(C[s], h[s], y[k]);
          }
        }
      };
      Stage even, odd;
      const auto walk = [&](int t, auto is_last) {
        float y[2][kAhead];
        prepare(t + kAhead, odd);
        consume(t, even, y[0]);
        if constexpr (!decltype(is_last)::value) prepare(t + 2 * kAhead, even);
        consume(t + kAhead, odd, y[1]);
        __syncwarp();  // all lanes of the row have read dt and dt u of the tokens written here
        share_row[t / 4] = pack(y[0]);
        share_row[t / 4 + 1] = pack(y[1]);
      };
      prepare(0, even);
      const int last_walk = (min(kTile, place.end - begin) - 1) / (2 * kAhead) * (2 * kAhead);
#pragma unroll 1
      for (int t = 0; t < last_walk; t += 2 * kAhead) walk(t, std::false_type{});
      walk(last_walk, std::true_type{});
      states[block * kThreads + threadIdx.x] = pack(h);
    }
    __syncwarp();

    const Tokens<T> tile_u = u;
    const Tokens<T> tile_z = z;
    if (begin + kTile < place.end) load_inputs(begin + kTile);
    float y[kTokens];
    read_plane(shares, row, part, y);
#pragma unroll
    for (int quarter = 1; quarter < kQuarters; ++quarter) {
      float share[kTokens];
      read_plane(shares + quarter * kPlane, row, part, share);
#pragma unroll
      for (int j = 0; j < kTokens; ++j) y[j] += share[j];
    }
#pragma unroll
    for (int j = 0; j < kTokens; ++j) y[j] = fmaf(D, tile_u[j], y[j]);
    if (given(p.z)) {
#pragma unroll
      for (int j = 0; j < kTokens; ++j) y[j] *= silu(tile_z[j]);
    }
    clear_tokens(marks.padding, part, y);
    store_tokens<T, kUneven>(p.out, plan.vectors & kVectorOut, place.b, c, begin + part * kTokens,
                             end, y);
    __syncwarp();
  }

  if (place.segment + 1 < plan.segments) return;
  for (int block = 0; block < plan.state_blocks; ++block) {
    const int n = block * kStateBlock + part * kStates;
    const StateSlot slot(0, n, p.dstate, exists);
    store_states(p.last_state, place.b, c, n, slot.count,
                 reinterpret_cast<const float*>(states + block * kThreads + threadIdx.x));
  }
}

/// last_state serves as the running state between tiles.
template <class T, bool kComplex>
__global__ void __launch_bounds__(kGenericWarps* kWarpSize)
    forward_generic(const SelectiveScanParams p, int lanes) {
  using Acc = Accumulate<T>;
  using N = Number<Acc, kComplex>;
  constexpr Acc kFactor = kComplex ? 2 : 1;  // y = 2 Re sum C h
  __shared__ Acc planes[kGenericWarps][3][kGenericRows][kGenericPitch];
  const int lane = threadIdx.x % kWarpSize;
  auto& steps = planes[threadIdx.x / kWarpSize][0];   // dt
  auto& inputs = planes[threadIdx.x / kWarpSize][1];  // dt u
  auto& ys = planes[threadIdx.x / kWarpSize][2];
  const int rows = kWarpSize / lanes;
  const int64_t row_groups = ceil_div(p.dim, rows);
  const int64_t item = int64_t{blockIdx.x} * kGenericWarps + threadIdx.x / kWarpSize;
  const int64_t b = item / row_groups;
  if (b >= p.batch) return;
  const int64_t first_channel = item % row_groups * rows;
  const int row = lane / lanes;
  const int64_t c = first_channel + row;
  const bool exists = c < p.dim;
  const MatrixRow<N> B(p.B, p.groups_B, p.dim, b, c);
  const MatrixRow<N> C(p.C, p.groups_C, p.dim, b, c);
  const int64_t last_offset = b * p.last_state.stride[0] + c * p.last_state.stride[1];
  const auto last_at = [&](int64_t n) { return last_offset + n * p.last_state.stride[2]; };

  for (int64_t n = lane % lanes; exists && n < p.dstate; n += lanes) {
    const View<3>& v = p.initial_state;
    const N h =
        given(v) ? load_number<N>(v, b * v.stride[0] + c * v.stride[1] + n * v.stride[2]) : N{};
    store_number(p.last_state, last_at(n), h);
  }
  const int64_t chunks = ceil_div(p.seqlen, kTile);
  for (int64_t begin = 0; begin < p.seqlen; begin += kTile) {
    const int64_t t = begin + lane;
    const uint8_t mark = t >= p.seqlen        ? uint8_t{kPadding}
                         : p.marks != nullptr ? p.marks[b * p.seqlen + t]
                                              : uint8_t{kContinue};
    const unsigned resets = __ballot_sync(kAllLanes, mark == kReset);
    const unsigned padding = __ballot_sync(kAllLanes, mark == kPadding);
    for (int r = 0; r < rows && first_channel + r < p.dim; ++r) {
      Acc dt = 0, x = 0;
      if (mark != kPadding) {
        dt = load_token<T>(p.delta, b, first_channel + r, t) +
             parameter<Acc>(p.delta_bias, first_channel + r);
        if (p.delta_softplus) dt = softplus(dt);
        x = dt * load_token<T>(p.u, b, first_channel + r, t);
      }
      steps[r][lane] = dt;
      inputs[r][lane] = x;
      ys[r][lane] = 0;
    }
    __syncwarp();

    for (int64_t n0 = 0; n0 < p.dstate; n0 += lanes) {
      const int64_t n = n0 + lane % lanes;
      const bool owns = exists && n < p.dstate;
      N A{}, h{};
      if (owns) {
        A = load_number<N>(p.A, c * p.A.stride[0] + n * p.A.stride[1]);
        h = load_number<N>(p.last_state, last_at(n));
        if (p.states != nullptr) {
          static_cast<N*>(p.states)[((b * chunks + begin / kTile) * p.dim + c) * p.dstate + n] = h;
        }
      }
      for (int j = 0; j < kTile && begin + j < p.seqlen; ++j) {
        if (padding >> j & 1) continue;
        Acc y = 0;
        if (owns) {
          const N decayed = resets >> j & 1 ? N{} : exponential(steps[row][j] * A) * h;
          h = decayed + inputs[row][j] * B(n, begin + j);
          y = kFactor * real_part(C(n, begin + j) * h);
        }
        y = sum_over_lanes(y, 1, lanes);
        if (lane % lanes == 0 && exists) ys[row][j] += y;
      }
      if (owns) store_number(p.last_state, last_at(n), h);
    }
    __syncwarp();

    for (int r = 0; r < rows && first_channel + r < p.dim && t < p.seqlen; ++r) {
      const int64_t channel = first_channel + r;
      Acc y = 0;
      if (mark != kPadding) {
        y = ys[r][lane] + parameter<Acc>(p.D, channel) * load_token<T>(p.u, b, channel, t);
        if (given(p.z)) y *= silu(load_token<T>(p.z, b, channel, t));
      }
      store_token<T>(p.out, b, channel, t, y);
    }
    __syncwarp();
  }
}

template <class T>
struct SharedForward {
  ScanPlan plan;
  SegmentSums sums;
  size_t workspace_size;

  SharedForward(const SelectiveScanParams& p, void* base) {
    const size_t shared =
        sizeof(float4) * (2 * kTile * kMatrixPitch + 2 * state_blocks(p) * kThreads) +
        sizeof(float) * kWarps * planes_per_warp(state_blocks(p)) * plane_size(1);
    plan = plan_scan(p, kWarps * kRows, kForwardCost, shared);
    plan.vectors = vector_bit<T>(p.u, kVectorU) | vector_bit<T>(p.delta, kVectorDelta) |
                   vector_bit<T>(p.z, kVectorZ) | vector_bit<T>(p.out, kVectorOut) |
                   vector_bit<T>(p.B, kVectorB) | vector_bit<T>(p.C, kVectorC);
    Workspace workspace(base);
    sums = take_segment_sums(workspace, p, plan);
    workspace_size = workspace.size();
  }

  void launch(const SelectiveScanParams& p, cudaStream_t stream) const {
    if (plan.segments > 1) launch_segments<T, false>(p, plan, sums, stream);
    const int64_t blocks = p.batch * plan.segments * plan.groups * plan.tiles;
    constexpr bool kHalves = sizeof(T) == 2;
    constexpr unsigned kTokensRead = kVectorU | kVectorDelta;
    const bool uneven = kHalves && (plan.vectors & kTokensRead) != kTokensRead;
    const auto kernel = p.dstate % kStateBlock != 0 ? forward_shared<T, true, false, kHalves>
                        : p.marks != nullptr        ? forward_shared<T, true, true, false>
                        : uneven                    ? forward_shared<T, false, true, kHalves>
                                                    : forward_shared<T, false, true, false>;
    launch_shared(kernel, blocks, kThreads, plan.shared, stream, p, plan, sums);
  }
};

template <class T>
struct GenericForward {
  size_t workspace_size = 0;

  void launch(const SelectiveScanParams& p, cudaStream_t stream) const {
    const int lanes = generic_lanes(p.dstate);
    const int64_t warps = p.batch * ceil_div(p.dim, kWarpSize / lanes);
    const auto blocks = static_cast<unsigned>(ceil_div(warps, kGenericWarps));
    const auto kernel = p.complex_A ? forward_generic<T, true> : forward_generic<T, false>;
    kernel<<<blocks, kGenericWarps * kWarpSize, 0, stream>>>(p, lanes);
  }
};

/// Calls f with the plan of the path that takes the call.
template <class T, class F>
auto with_forward(const SelectiveScanParams& p, void* workspace, F f) {
  if constexpr (sizeof(T) <= 4) {
    if (takes_shared_path<T>(p)) {
      const SharedForward<T> forward(p, workspace);
      if (forward.plan.fits()) return f(forward);
    }
  }
  return f(GenericForward<T>());
}

}  // namespace

template <class T>
size_t workspace_selective_scan_fwd(const SelectiveScanParams& p) {
  return with_forward<T>(p, nullptr, [](const auto& forward) { return forward.workspace_size; });
}

template <class T>
CudaStatus launch_selective_scan_fwd(const SelectiveScanParams& p, void* workspace,
                                     CudaStream stream) {
  if (p.batch == 0 || p.dim == 0) return cudaSuccess;
  return with_forward<T>(p, workspace, [&](const auto& forward) -> CudaStatus {
    forward.launch(p, static_cast<cudaStream_t>(stream));
    return cudaGetLastError();
  });
}

template size_t workspace_selective_scan_fwd<MAMBA_SSM_ELEMENT>(const SelectiveScanParams&);
template CudaStatus launch_selective_scan_fwd<MAMBA_SSM_ELEMENT>(const SelectiveScanParams&, void*,
                                                                 CudaStream);

}  // namespace mamba_ssm::kernels
