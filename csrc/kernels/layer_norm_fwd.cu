// Fused residual addition and normalization, forward. How rows are divided: row_norm.cuh. Vectors
// serve what models run, x + residual with one head; the other options go by elements. A team that
// has one row alone keeps all of it in registers.
#include "launch.cuh"
#include "layer_norm.cuh"

namespace mamba_ssm::kernels {
namespace {

template <class T, int kVectors>
__global__ void __launch_bounds__(kMostTeam)
    forward_vectors(const LayerNormParams p, const RowTeams teams) {
  using Stream = RowStream<T>;
  using Parameter = SharedParameter<Stream::kVec>;
  constexpr int kVec = Stream::kVec;
  extern __shared__ uint4 shared[];
  __shared__ TeamSum<float>::Buffers buffers;
  const Team team(teams);
  if (!team.works) return;
  TeamSum<float> sum(team, buffers);
  const Slots slots(shared);
  const Stream x{p.x}, residual{p.residual}, out{p.out}, residual_out{p.residual_out};
  const int wide = Stream::slots(p.residual);
  const int slots_of_stage = kVectors * (1 + wide);  // x, then residual
  const int slot_weight = kStages * slots_of_stage;
  const int slot_bias = slot_weight + kVectors * Parameter::kSlots;
  const auto channel = [&](int j) { return (j * team.threads + team.thread) * kVec; };
  const int width = static_cast<int>(p.channels);
  const auto there = [&](int j) { return channel(j) < width; };

  const auto fetch = [&](int64_t row, int stage) {
    if (row < p.rows) {
      const RowIndex at(p.axes, row);
      const int64_t from_x = at(p.x), from_residual = at(p.residual);
      const int slot = slots_of_stage * stage;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (!there(j)) continue;
        x.fetch(slots, slot + j, from_x + channel(j));
        if (given(p.residual)) {
          residual.fetch(slots, slot + kVectors + j * wide, from_residual + channel(j));
        }
      }
    }
    commit_copies();
  };
  int stage = 0;
  fetch(team.strip, stage);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (!there(j)) continue;
    Parameter::keep(slots, slot_weight + j * Parameter::kSlots, p.weight, channel(j));
    if (given(p.bias)) {
      Parameter::keep(slots, slot_bias + j * Parameter::kSlots, p.bias, channel(j));
    }
  }

  for (int64_t row = team.strip; row < p.rows; row += team.strips, stage ^= 1) {
    fetch(row + team.strips, stage ^ 1);
    wait_copies<1>();
    const int slot = slots_of_stage * stage;
    const RowIndex at(p.axes, row);
    const int64_t to = at(p.out), to_residual = at(p.residual_out);
    float s[kVectors][kVec];
    float mean[1] = {0};
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) s[j][e] = 0;
      if (!there(j)) continue;
      x.read(slots, slot + j, s[j]);
      if (given(p.residual)) {
        float r[kVec];
        residual.read(slots, slot + kVectors + j * wide, r);
#pragma unroll
        for (int e = 0; e < kVec; ++e) s[j][e] += r[e];
      }
      if (given(p.residual_out)) residual_out.write(to_residual + channel(j), s[j]);
#pragma unroll
      for (int e = 0; e < kVec; ++e) mean[0] += s[j][e];
    }
    if (p.is_rms_norm) {
      mean[0] = 0;
    } else {
      sum(mean);
      mean[0] /= static_cast<float>(p.channels);
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
    const float rstd = reciprocal_root(square[0], p.channels, p.eps);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (!there(j)) continue;
#pragma unroll
      for (int q = 0; q < Parameter::kSlots; ++q) {
        const auto w = Parameter::read(slots, slot_weight + j * Parameter::kSlots + q);
        Pack<float, 4> b{};
        if (given(p.bias)) b = Parameter::read(slots, slot_bias + j * Parameter::kSlots + q);
#pragma unroll
        for (int e = 4 * q; e < 4 * q + 4; ++e) {
          s[j][e] = s[j][e] * (rstd * w[e - 4 * q]) + b[e - 4 * q];
        }
      }
      out.write(to + channel(j), s[j]);
    }
  }
}

/// Vectors of a row in registers, as they stand in memory: of T or, wider, of float.
template <class T, int kVectors>
class RowBits {
 public:
  using Stream = RowStream<T>;

  __device__ __forceinline__ void load(const Stream& stream, int j, int64_t offset) {
    if (stream.wide()) {
      const uint4* const from =
          reinterpret_cast<const uint4*>(static_cast<const float*>(stream.view.data) + offset);
      bits_[j][0] = from[0];
      bits_[j][kSlots - 1] = from[1];
    } else {
      bits_[j][0] =
          *reinterpret_cast<const uint4*>(static_cast<const T*>(stream.view.data) + offset);
    }
  }
  __device__ __forceinline__ void add_to(float (&sum)[Stream::kVec], const Stream& stream,
                                         int j) const {
    if (stream.wide()) {
#pragma unroll
      for (int e = 0; e < Stream::kVec; ++e) {
        sum[e] += reinterpret_cast<const Pack<float, 4>&>(bits_[j][e / 4 % kSlots])[e % 4];
      }
    } else {
#pragma unroll
      for (int e = 0; e < Stream::kVec; ++e) {
        sum[e] += reinterpret_cast<const Pack<T, Stream::kVec>&>(bits_[j][0])[e];
      }
    }
  }

 private:
  static constexpr int kSlots = sizeof(T) == 2 ? 2 : 1;
  uint4 bits_[kVectors][kSlots];
};

/// forward_vectors for as many teams as rows.
template <class T, int kVectors>
__global__ void __launch_bounds__(kMostTeam)
    forward_one_row(const LayerNormParams p, const RowTeams teams) {
  using Stream = RowStream<T>;
  constexpr int kVec = Stream::kVec;
  __shared__ TeamSum<float>::Buffers buffers;
  const Team team(teams);
  TeamSum<float> sum(team, buffers);
  const Stream x{p.x}, residual{p.residual}, out{p.out}, residual_out{p.residual_out};
  const RowIndex at(p.axes, team.strip);
  const int64_t from_x = at(p.x), from_residual = at(p.residual);
  const auto channel = [&](int j) { return (j * team.threads + team.thread) * kVec; };
  const int width = static_cast<int>(p.channels);
  const auto there = [&](int j) { return channel(j) < width; };
  let_next_start();
  wait_for_previous();
  if (!team.works) return;

  RowBits<T, kVectors> x_bits, residual_bits;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (!there(j)) continue;
    x_bits.load(x, j, from_x + channel(j));
    if (given(p.residual)) residual_bits.load(residual, j, from_residual + channel(j));
  }
  ParameterBits<float, kVec> weight[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (there(j)) weight[j] = parameter_bits<kVec>(p.weight, channel(j));
  }
  float s[kVectors][kVec] = {};
  float mean[1] = {0};
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (!there(j)) continue;
    x_bits.add_to(s[j], x, j);
    if (given(p.residual)) residual_bits.add_to(s[j], residual, j);
#pragma unroll
    for (int e = 0; e < kVec; ++e) mean[0] += s[j][e];
  }
  if (p.is_rms_norm) {
    mean[0] = 0;
  } else {
    sum(mean);
    mean[0] /= static_cast<float>(p.channels);
  }
  float square[1] = {0};
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (!there(j)) continue;
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      const float d = s[j][e] - mean[0];
      square[0] += d * d;
    }
  }
  sum(square);
  const float rstd = reciprocal_root(square[0], p.channels, p.eps);
  const int64_t to = at(p.out), to_residual = at(p.residual_out);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (!there(j)) continue;
    if (given(p.residual_out)) residual_out.write(to_residual + channel(j), s[j]);
    float w[kVec], b[kVec] = {};
    weight[j].values(p.weight.dtype, w);
    if (given(p.bias)) parameter_bits<kVec>(p.bias, channel(j)).values(p.bias.dtype, b);
#pragma unroll
    for (int e = 0; e < kVec; ++e) s[j][e] = (s[j][e] - mean[0]) * (rstd * w[e]) + b[e];
    out.write(to + channel(j), s[j]);
  }
}

template <class T>
__global__ void forward_elements(const LayerNormParams p, const RowTeams teams) {
  using Acc = Accumulate<T>;
  __shared__ typename TeamSum<Acc>::Buffers buffers;
  const Team team(teams);
  if (!team.works) return;
  TeamSum<Acc> sum(team, buffers);
  for (int64_t row = team.strip; row < p.rows; row += team.strips) {
    const RowIndex at(p.axes, row);
    const Acc rowscale = given(p.rowscale)
                             ? load_as<Acc>(p.rowscale.data, p.rowscale.dtype, at(p.rowscale))
                             : Acc(1);
    const auto sum_of = [&](int64_t c) {
      Acc v = dropped(p, p.dropout_mask, at, c, element<T>(p.x, at(p.x, c)) * rowscale);
      if (given(p.x1)) v += dropped(p, p.dropout_mask1, at, c, element<T>(p.x1, at(p.x1, c)));
      if (given(p.residual)) {
        v += load_as<Acc>(p.residual.data, p.residual.dtype, at(p.residual, c));
      }
      return v;
    };
    Acc mean[1] = {0}, square[1] = {0};
    if (!p.is_rms_norm) {
      for (int64_t c = team.thread; c < p.channels; c += team.threads) mean[0] += sum_of(c);
      sum(mean);
      mean[0] /= static_cast<Acc>(p.channels);
    }
    for (int64_t c = team.thread; c < p.channels; c += team.threads) {
      const Acc d = sum_of(c) - mean[0];
      square[0] += d * d;
    }
    sum(square);
    const Acc rstd = reciprocal_root(square[0], p.channels, p.eps);
    for (int64_t c = team.thread; c < p.channels; c += team.threads) {
      const Acc s = sum_of(c);
      const Acc n = (s - mean[0]) * rstd;
      const auto head = [&](const View<1>& weight, const View<1>& bias, const View<4>& to) {
        Acc v = n * parameter<Acc>(weight, c);
        if (given(bias)) v += parameter<Acc>(bias, c);
        static_cast<T*>(to.data)[at(to, c)] = from_accumulate<T>(v);
      };
      head(p.weight, p.bias, p.out);
      if (given(p.weight1)) head(p.weight1, p.bias1, p.out1);
      if (given(p.residual_out)) {
        store_as(p.residual_out.data, p.residual_out.dtype, at(p.residual_out, c), s);
      }
    }
  }
}

constexpr int64_t kManyChannels = 2048;

template <class T>
RowPlan plan(const LayerNormParams& p) {
  bool vectors = false;
  if constexpr (sizeof(T) <= 4) {
    vectors = !given(p.x1) && !given(p.weight1) && !given(p.rowscale) && !given(p.dropout_mask) &&
              rows_are_vectors<T>(p.x) && rows_are_vectors<T>(p.residual) &&
              rows_are_vectors<T>(p.out) && rows_are_vectors<T>(p.residual_out);
  }
  constexpr int kParameter = Vector<T>::kSize / 4;
  const int slots =
      kStages * (1 + RowStream<T>::slots(p.residual)) + kParameter * (given(p.bias) ? 2 : 1);
  // Long rows gain more from blocks that come and go than from rows that they fetch ahead.
  const bool one_row = p.channels >= kManyChannels;
  RowPlan plan = plan_rows<T>(p.rows, /*groups=*/1, p.channels, vectors, slots, kForwardLimits,
                              /*most_elements=*/one_row);
  if (plan.vectors > 0 && one_row) plan.teams.strips = p.rows;
  return plan;
}

}  // namespace

template <class T>
CudaStatus launch_layer_norm_fwd(const LayerNormParams& p, CudaStream stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (p.rows == 0 || p.channels == 0) return cudaSuccess;
  const RowPlan rows = plan<T>(p);
  if constexpr (sizeof(T) <= 4) {
    for_vectors<T>(rows.vectors, [&](auto vectors) {
      if (rows.teams.strips == p.rows) {
        launch_overlapped<forward_one_row<T, vectors>>(
            dim3(static_cast<unsigned>(rows.teams.blocks())), rows.teams.block, 0, stream, p,
            rows.teams);
      } else {
        launch_rows(forward_vectors<T, vectors>, rows, stream, p, rows.teams);
      }
    });
  }
  if (rows.vectors == 0) launch_rows(forward_elements<T>, rows, stream, p, rows.teams);
  return cudaGetLastError();
}

template CudaStatus launch_layer_norm_fwd<MAMBA_SSM_ELEMENT>(const LayerNormParams&, CudaStream);

}  // namespace mamba_ssm::kernels
