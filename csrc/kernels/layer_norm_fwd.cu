// Fused residual addition and normalization, forward. How rows are divided: row_norm.cuh. Vectors
// serve what models run, x + residual with one head; the other options go by elements.
#include "launch.cuh"
#include "layer_norm.cuh"

namespace mamba_ssm::kernels {
namespace {

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

constexpr RowShares kShares = {{8, 640, 0}, {16, 640, 0}, {32, 512, 0}};

template <class T, int kVectors>
__global__ void __launch_bounds__(largest_team<T, kVectors>(kShares),
                                  kVectors* Vector<T>::kSize <= 16 ? 2 : 1)
    forward_vectors(const LayerNormParams p, const RowTeams teams) {
  using Stream = RowStream<T>;
  constexpr int kVec = Stream::kVec;
  __shared__ TeamSum<float>::Buffers buffers;
  const Team team(teams);
  TeamSum<float> sum(team, buffers);
  const Stream residual{p.residual}, residual_out{p.residual_out};
  const int width = static_cast<int>(p.channels);
  const GroupMeans<float> group(width, p.eps);
  const RowIndex<unsigned> at(p.axes, team.strip);
  const int step = team.threads * kVec;
  const auto channel = [&](int j) { return j * step + team.thread * kVec; };
  const auto there = [&](int j) { return channel(j) < width; };
  const int64_t mine = channel(0);
  const T* const from_x = RowPart<const T>(p.x, mine)(at);
  T* const to = RowPart<T>(p.out, mine)(at);
  const int64_t from_residual = at.start(p.residual) + mine;
  const int64_t to_residual = at.start(p.residual_out) + mine;
  let_next_start();
  wait_for_previous();
  if (!team.works) return;

  Pack<T, kVec> x[kVectors];
  RowBits<T, kVectors> residual_bits;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (!there(j)) continue;
    x[j].load(from_x + j * step);
    if (given(p.residual)) residual_bits.load(residual, j, from_residual + j * step);
  }
  float s[kVectors][kVec] = {};
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (!there(j)) continue;
#pragma unroll
    for (int e = 0; e < kVec; ++e) s[j][e] = x[j][e];
    if (given(p.residual)) residual_bits.add_to(s[j], residual, j);
    if (given(p.residual_out)) residual_out.write(to_residual + j * step, s[j]);
  }
  const VectorParameter<kVec> weight(p.weight);
  ParameterBits<float, kVec> weight_bits[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (there(j)) weight_bits[j] = weight.load(channel(j));
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
    add_bias(s[j], p.bias, channel(j));
    store_rounded(to + j * step, s[j]);
  }
}

template <class T>
__global__ void forward_elements(const LayerNormParams p, const RowTeams teams) {
  using Acc = Accumulate<T>;
  __shared__ typename TeamSum<Acc>::Buffers buffers;
  const Team team(teams);
  if (!team.works) return;
  TeamSum<Acc> sum(team, buffers);
  const GroupMeans<Acc> group(p.channels, p.eps);
  for (int64_t row = team.strip; row < p.rows; row += team.strips) {
    const RowIndex<int64_t> at(p.axes, row);
    const Acc rowscale = given(p.rowscale)
                             ? load_as<Acc>(p.rowscale.data, p.rowscale.dtype, at.start(p.rowscale))
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
      mean[0] = group.mean(mean[0]);
    }
    for (int64_t c = team.thread; c < p.channels; c += team.threads) {
      const Acc d = sum_of(c) - mean[0];
      square[0] += d * d;
    }
    sum(square);
    const Acc rstd = group.reciprocal_root(square[0]);
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

template <class T>
RowPlan plan(const LayerNormParams& p) {
  bool vectors = false;
  if constexpr (sizeof(T) <= 4) {
    vectors = !given(p.x1) && !given(p.weight1) && !given(p.rowscale) && !given(p.dropout_mask) &&
              rows_are_vectors<T>(p.x) && rows_are_vectors<T>(p.residual) &&
              rows_are_vectors<T>(p.out) && rows_are_vectors<T>(p.residual_out);
  }
  return plan_rows<T>(p.rows, /*groups=*/1, p.channels, vectors, /*slots=*/0, kShares);
}

}  // namespace

template <class T>
CudaStatus launch_layer_norm_fwd(const LayerNormParams& p, CudaStream stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (p.rows == 0 || p.channels == 0) return cudaSuccess;
  const RowPlan rows = plan<T>(p);
  if constexpr (sizeof(T) <= 4) {
    for_vectors<T>(rows.vectors, [&](auto vectors) {
      launch_rows_overlapped<forward_vectors<T, vectors>>(rows, stream, p);
    });
  }
  if (rows.vectors == 0) launch_rows(forward_elements<T>, rows, stream, p, rows.teams);
  return cudaGetLastError();
}

template CudaStatus launch_layer_norm_fwd<MAMBA_SSM_ELEMENT>(const LayerNormParams&, CudaStream);

}  // namespace mamba_ssm::kernels
