// Gated normalization, forward. How rows are divided: row_norm.cuh.
#include "launch.cuh"
#include "rms_norm_gated.cuh"

namespace mamba_ssm::kernels {
namespace {

constexpr RowShares kShares = {{16, 640, 0}, {8, 640, 0}, {32, 512, 0}};

template <class T, int kVectors, GatePlace kGate>
__global__ void __launch_bounds__(
    largest_team<T, kVectors>(kShares),
    kGate != GatePlace::kAfterNorm && kVectors * Vector<T>::kSize <= 16 ? 2 : 1)
    forward_vectors(const RmsNormGatedParams p, const RowTeams teams) {
  constexpr int kVec = Vector<T>::kSize;
  constexpr bool kGated = kGate != GatePlace::kNone;
  __shared__ TeamSum<float>::Buffers buffers;
  const Team team(teams);
  TeamSum<float> sum(team, buffers);
  const int width = static_cast<int>(p.group_size);
  const GroupMeans<float> group(width, p.eps);
  const RowIndex<unsigned> at(p.axes, team.strip);
  const int64_t first = int64_t{team.group} * width;
  const int step = team.threads * kVec;
  const auto channel = [&](int j) { return j * step + team.thread * kVec; };
  const auto there = [&](int j) { return channel(j) < width; };
  const int64_t mine = first + channel(0);
  const T* const from_x = RowPart<const T>(p.x, mine)(at);
  const T* const from_z = RowPart<const T>(p.z, mine)(at);
  T* const to = RowPart<T>(p.out, mine)(at);
  let_next_start();
  wait_for_previous();
  if (!team.works) return;

  Pack<T, kVec> x[kVectors], z[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (!there(j)) continue;
    x[j].load(from_x + j * step);
    if constexpr (kGated) z[j].load(from_z + j * step);
  }
  float s[kVectors][kVec] = {};
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (!there(j)) continue;
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      s[j][e] = kGate == GatePlace::kBeforeNorm ? x[j][e] * silu(z[j][e]) : x[j][e];
    }
  }
  // On their way while the sums are taken, in the registers that x has left.
  const VectorParameter<kVec> weight(p.weight);
  ParameterBits<float, kVec> weight_bits[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (there(j)) weight_bits[j] = weight.load(first + channel(j));
  }
  if (!p.is_rms_norm) subtract_mean(s, sum, group, there);
  const float rstd = reciprocal_rms(s, sum, group);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (!there(j)) continue;
    float w[kVec];
    weight.values(weight_bits[j], w);
#pragma unroll
    for (int e = 0; e < kVec; ++e) s[j][e] *= rstd * w[e];
    add_bias(s[j], p.bias, first + channel(j));
    if constexpr (kGate == GatePlace::kAfterNorm) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) s[j][e] *= silu(z[j][e]);
    }
    store_rounded(to + j * step, s[j]);
  }
}

template <class T>
__global__ void forward_elements(const RmsNormGatedParams p, const RowTeams teams) {
  using Acc = Accumulate<T>;
  __shared__ typename TeamSum<Acc>::Buffers buffers;
  const Team team(teams);
  if (!team.works) return;
  TeamSum<Acc> sum(team, buffers);
  const bool gate_first = given(p.z) && !p.norm_before_gate;
  const bool gate_last = given(p.z) && p.norm_before_gate;
  const GroupMeans<Acc> group(p.group_size, p.eps);
  const int64_t first = int64_t{team.group} * p.group_size;
  for (int64_t row = team.strip; row < p.rows; row += team.strips) {
    const RowIndex<int64_t> at(p.axes, row);
    const auto source = [&](int64_t c) {
      const Acc v = element<T>(p.x, at(p.x, first + c));
      return gate_first ? v * silu(element<T>(p.z, at(p.z, first + c))) : v;
    };
    Acc mean[1] = {0}, square[1] = {0};
    if (!p.is_rms_norm) {
      for (int64_t c = team.thread; c < p.group_size; c += team.threads) mean[0] += source(c);
      sum(mean);
      mean[0] = group.mean(mean[0]);
    }
    for (int64_t c = team.thread; c < p.group_size; c += team.threads) {
      const Acc d = source(c) - mean[0];
      square[0] += d * d;
    }
    sum(square);
    const Acc rstd = group.reciprocal_root(square[0]);
    for (int64_t c = team.thread; c < p.group_size; c += team.threads) {
      Acc v = (source(c) - mean[0]) * rstd * parameter<Acc>(p.weight, first + c);
      if (given(p.bias)) v += parameter<Acc>(p.bias, first + c);
      if (gate_last) v *= silu(element<T>(p.z, at(p.z, first + c)));
      static_cast<T*>(p.out.data)[at(p.out, first + c)] = from_accumulate<T>(v);
    }
  }
}

template <class T>
RowPlan plan(const RmsNormGatedParams& p) {
  bool vectors = false;
  if constexpr (sizeof(T) <= 4) {
    vectors = rows_are_vectors<T>(p.x) && rows_are_vectors<T>(p.z) && rows_are_vectors<T>(p.out);
  }
  return plan_rows<T>(p.rows, p.channels / p.group_size, p.group_size, vectors, /*slots=*/0,
                      kShares);
}

}  // namespace

template <class T>
CudaStatus launch_rms_norm_gated_fwd(const RmsNormGatedParams& p, CudaStream stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (p.rows == 0 || p.channels == 0) return cudaSuccess;
  const RowPlan rows = plan<T>(p);
  if constexpr (sizeof(T) <= 4) {
    for_vectors<T>(rows.vectors, [&](auto vectors) {
      constexpr int kVectors = vectors;
      for_gate_place(p, [&](auto gate) {
        launch_rows_overlapped<forward_vectors<T, kVectors, gate>>(rows, stream, p);
      });
    });
  }
  if (rows.vectors == 0) launch_rows(forward_elements<T>, rows, stream, p, rows.teams);
  return cudaGetLastError();
}

template CudaStatus launch_rms_norm_gated_fwd<MAMBA_SSM_ELEMENT>(const RmsNormGatedParams&,
                                                                 CudaStream);

}  // namespace mamba_ssm::kernels
