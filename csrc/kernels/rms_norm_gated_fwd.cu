// Gated normalization, forward. How rows are divided: row_norm.cuh. A row has so few operands that
// the vectors of the next one wait in registers; a team that has one row alone keeps its weights
// there instead of in shared memory.
#include "launch.cuh"
#include "row_norm.cuh"

namespace mamba_ssm::kernels {
namespace {

constexpr RowLimits kLimits = {2048, kMostTeam};

/// True if registers hold a second row, or the weights.
template <class T, int kVectors>
constexpr bool kInRegisters = kVectors* Vector<T>::kSize <= 16;

/// kOneRow: as many teams as rows.
template <class T, int kVectors, bool kOneRow>
__global__ void __launch_bounds__(kMostTeam)
    forward_vectors(const RmsNormGatedParams p, const RowTeams teams) {
  using Stream = RowStream<T>;
  using Parameter = SharedParameter<Stream::kVec>;
  constexpr int kVec = Stream::kVec;
  constexpr int kBias = kVectors * Parameter::kSlots;  // slots before it: the weight's
  constexpr bool kAhead = !kOneRow && kInRegisters<T, kVectors>;
  extern __shared__ uint4 shared[];
  __shared__ TeamSum<float>::Buffers buffers;
  const Team team(teams);
  TeamSum<float> sum(team, buffers);
  const Slots slots(shared);
  const Stream out{p.out};
  let_next_start();
  wait_for_previous();
  if (!team.works) return;
  const bool gate_first = given(p.z) && !p.norm_before_gate;
  const bool gate_last = given(p.z) && p.norm_before_gate;
  const int64_t first = team.group * p.group_size;
  const auto channel = [&](int j) { return (j * team.threads + team.thread) * kVec; };
  const int width = static_cast<int>(p.group_size);
  const auto there = [&](int j) { return channel(j) < width; };

  Pack<T, kVec> next_x[kVectors], next_z[kVectors];
  const auto fetch = [&](int64_t row) {
    if (row >= p.rows) return;
    const RowIndex at(p.axes, row);
    const T* const x = static_cast<const T*>(p.x.data) + at(p.x, first);
    const T* const z = static_cast<const T*>(p.z.data) + at(p.z, first);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (!there(j)) continue;
      next_x[j].load(x + channel(j));
      if (given(p.z)) next_z[j].load(z + channel(j));
    }
  };
  fetch(team.strip);
  ParameterBits<float, kVec> weight[kOneRow ? kVectors : 1], bias[kOneRow ? kVectors : 1] = {};
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (!there(j)) continue;
    if constexpr (kOneRow) {
      weight[j] = parameter_bits<kVec>(p.weight, first + channel(j));
      if (given(p.bias)) bias[j] = parameter_bits<kVec>(p.bias, first + channel(j));
    } else {
      Parameter::keep(slots, j * Parameter::kSlots, p.weight, first + channel(j));
      if (given(p.bias)) {
        Parameter::keep(slots, kBias + j * Parameter::kSlots, p.bias, first + channel(j));
      }
    }
  }

  for (int64_t row = team.strip; row < p.rows; row += team.strips) {
    if (!kAhead && row != team.strip) fetch(row);
    Pack<T, kVec> x[kVectors], z[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) x[j] = next_x[j], z[j] = next_z[j];
    if constexpr (kAhead) fetch(row + team.strips);
    float s[kVectors][kVec];
    float mean[1] = {0};
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) s[j][e] = 0;
      if (!there(j)) continue;
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        s[j][e] = gate_first ? x[j][e] * silu(z[j][e]) : x[j][e];
        mean[0] += s[j][e];
      }
    }
    if (p.is_rms_norm) {
      mean[0] = 0;
    } else {
      sum(mean);
      mean[0] /= static_cast<float>(p.group_size);
    }
    float square[1] = {0};
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (!there(j)) continue;
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        s[j][e] -= mean[0];
        square[0] += s[j][e] * s[j][e];
      }
    }
    sum(square);
    const float rstd = reciprocal_root(square[0], p.group_size, p.eps);

    const int64_t to = RowIndex(p.axes, row)(p.out, first);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (!there(j)) continue;
      if constexpr (kOneRow) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
          s[j][e] = s[j][e] * (rstd * weight[j].value(p.weight.dtype, e)) +
                    bias[j].value(p.bias.dtype, e);
        }
      } else {
#pragma unroll
        for (int q = 0; q < Parameter::kSlots; ++q) {
          const auto w = Parameter::read(slots, j * Parameter::kSlots + q);
          Pack<float, 4> b{};
          if (given(p.bias)) b = Parameter::read(slots, kBias + j * Parameter::kSlots + q);
#pragma unroll
          for (int e = 4 * q; e < 4 * q + 4; ++e) {
            s[j][e] = s[j][e] * (rstd * w[e - 4 * q]) + b[e - 4 * q];
          }
        }
      }
      if (gate_last) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) s[j][e] *= silu(z[j][e]);
      }
      out.write(to + channel(j), s[j]);
    }
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
  const int64_t first = team.group * p.group_size;
  for (int64_t row = team.strip; row < p.rows; row += team.strips) {
    const RowIndex at(p.axes, row);
    const auto source = [&](int64_t c) {
      const Acc v = element<T>(p.x, at(p.x, first + c));
      return gate_first ? v * silu(element<T>(p.z, at(p.z, first + c))) : v;
    };
    Acc mean[1] = {0}, square[1] = {0};
    if (!p.is_rms_norm) {
      for (int64_t c = team.thread; c < p.group_size; c += team.threads) mean[0] += source(c);
      sum(mean);
      mean[0] /= static_cast<Acc>(p.group_size);
    }
    for (int64_t c = team.thread; c < p.group_size; c += team.threads) {
      const Acc d = source(c) - mean[0];
      square[0] += d * d;
    }
    sum(square);
    const Acc rstd = reciprocal_root(square[0], p.group_size, p.eps);
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
  constexpr int kParameter = Vector<T>::kSize / 4;
  const int slots = kParameter * (given(p.bias) ? 2 : 1);
  return plan_rows<T>(p.rows, p.channels / p.group_size, p.group_size, vectors, slots, kLimits);
}

}  // namespace

template <class T>
CudaStatus launch_rms_norm_gated_fwd(const RmsNormGatedParams& p, CudaStream stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (p.rows == 0 || p.channels == 0) return cudaSuccess;
  const RowPlan rows = plan<T>(p);
  if constexpr (sizeof(T) <= 4) {
    for_vectors<T>(rows.vectors, [&](auto vectors) {
      const auto blocks = dim3(static_cast<unsigned>(rows.teams.blocks()));
      if constexpr (kInRegisters<T, vectors>) {
        if (rows.teams.strips == p.rows) {
          launch_overlapped<forward_vectors<T, vectors, true>>(blocks, rows.teams.block, 0, stream,
                                                               p, rows.teams);
          return;
        }
      }
      launch_overlapped<forward_vectors<T, vectors, false>>(blocks, rows.teams.block, rows.shared,
                                                            stream, p, rows.teams);
    });
  }
  if (rows.vectors == 0) launch_rows(forward_elements<T>, rows, stream, p, rows.teams);
  return cudaGetLastError();
}

template CudaStatus launch_rms_norm_gated_fwd<MAMBA_SSM_ELEMENT>(const RmsNormGatedParams&,
                                                                 CudaStream);

}  // namespace mamba_ssm::kernels
