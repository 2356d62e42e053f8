// Gated normalization, backward. How rows are divided: row_norm.cuh.
//
// With n the normalized s and g the gradient of norm,
//
//   ds = (w g - mean(w g) - n mean(n w g)) / sqrt(var + eps), the mean of w g left out for
//        is_rms_norm;   dweight = sum over rows of g n,   dbias = sum over rows of g
//
// Without gate g = dout, dx = ds. With norm_before_gate g = dout silu(z), dz = dout norm silu'(z);
// else dx = ds silu(z), dz = ds x silu'(z). A thread keeps its sums over the rows in registers,
// those of dbias in shared memory.
#include "launch.cuh"
#include "row_norm.cuh"

namespace mamba_ssm::kernels {
namespace {

constexpr int kParameters = 2;  // weight, bias

/// sigmoid(z) and what follows from it.
template <class Acc>
struct Gate {
  Acc value, slope;  // silu(z), silu'(z)

  __device__ __forceinline__ explicit Gate(Acc z) {
    const Acc s = sigmoid(z);
    value = z * s;
    slope = s * (Acc(1) + z * (Acc(1) - s));
  }
};

template <class T, int kVectors>
__global__ void __launch_bounds__(kTwoTeams<T, kVectors> ? kMostTwoTeams : kMostTeam,
                                  kTwoTeams<T, kVectors> ? 2 : 1)
    backward_vectors(const RmsNormGatedParams p, const RowTeams teams, float* partials) {
  using Stream = RowStream<T>;
  using Parameter = SharedParameter<Stream::kVec>;
  constexpr int kVec = Stream::kVec;
  constexpr int kStage = 3 * kVectors;  // slots: x, z, dout
  constexpr int kWeight = kStages * kStage;
  constexpr int kBias = kWeight + kVectors * Parameter::kSlots;
  constexpr int kBiasSums = kBias + kVectors * Parameter::kSlots;
  extern __shared__ uint4 shared[];
  __shared__ TeamSum<float>::Buffers buffers;
  const Team team(teams);
  if (!team.works) return;
  TeamSum<float> sum(team, buffers);
  const Slots slots(shared);
  const Stream x{p.x}, z{p.z}, dout{p.dout}, dx{p.dx}, dz{p.dz};
  const bool gated = given(p.z);
  const bool gate_first = gated && !p.norm_before_gate;
  const bool gate_last = gated && p.norm_before_gate;
  const int64_t first = team.group * p.group_size;
  const auto channel = [&](int j) { return (j * team.threads + team.thread) * kVec; };
  const int width = static_cast<int>(p.group_size);
  const auto there = [&](int j) { return channel(j) < width; };

  const auto fetch = [&](int64_t row, int stage) {
    if (row < p.rows) {
      const RowIndex at(p.axes, row);
      const int64_t from_x = at(p.x, first), from_z = at(p.z, first), from_d = at(p.dout, first);
      const int slot = kStage * stage;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (!there(j)) continue;
        x.fetch(slots, slot + j, from_x + channel(j));
        if (gated) z.fetch(slots, slot + kVectors + j, from_z + channel(j));
        dout.fetch(slots, slot + 2 * kVectors + j, from_d + channel(j));
      }
    }
    commit_copies();
  };
  int stage = 0;
  fetch(team.strip, stage);
  float dweight[kVectors][kVec];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) dweight[j][e] = 0;
    if (!there(j)) continue;
    Parameter::keep(slots, kWeight + j * Parameter::kSlots, p.weight, first + channel(j));
    if (given(p.bias)) {
      Parameter::keep(slots, kBias + j * Parameter::kSlots, p.bias, first + channel(j));
      Parameter::clear(slots, kBiasSums + j * Parameter::kSlots);
    }
  }

  for (int64_t row = team.strip; row < p.rows; row += team.strips, stage ^= 1) {
    fetch(row + team.strips, stage ^ 1);
    wait_copies<1>();
    const int slot_x = kStage * stage, slot_z = slot_x + kVectors, slot_d = slot_z + kVectors;
    float mean[1] = {0};
    if (!p.is_rms_norm) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (!there(j)) continue;
        const auto s = x.pack(slots, slot_x + j), gate = z.pack(slots, slot_z + j);
#pragma unroll
        for (int e = 0; e < kVec; ++e) mean[0] += gate_first ? s[e] * silu(gate[e]) : s[e];
      }
      sum(mean);
      mean[0] /= static_cast<float>(p.group_size);
    }
    float sums[3] = {0, 0, 0};
#pragma unroll 1  // more at a time would not fit into the registers
    for (int j = 0; j < kVectors; ++j) {
      if (!there(j)) continue;
      const auto s = x.pack(slots, slot_x + j), g = dout.pack(slots, slot_d + j);
      const auto gate = z.pack(slots, slot_z + j);
#pragma unroll
      for (int q = 0; q < Parameter::kSlots; ++q) {
        const auto w = Parameter::read(slots, kWeight + j * Parameter::kSlots + q);
#pragma unroll
        for (int e = 4 * q; e < 4 * q + 4; ++e) {
          const float open = gated ? silu(gate[e]) : 1.0f;
          const float d = (gate_first ? s[e] * open : s[e]) - mean[0];
          const float wg = w[e - 4 * q] * (gate_last ? g[e] * open : g[e]);
          sums[0] += d * d;
          sums[1] += d * wg;
          sums[2] += wg;
        }
      }
    }
    sum(sums);
    const NormGradient<float> gradient(sums, p.group_size, p.eps, p.is_rms_norm);

    const RowIndex at(p.axes, row);
    const int64_t to_x = at(p.dx, first), to_z = at(p.dz, first);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (!there(j)) continue;
      const auto s = x.pack(slots, slot_x + j), g = dout.pack(slots, slot_d + j);
      const auto v = z.pack(slots, slot_z + j);
      float gradient_x[kVec], gradient_z[kVec];
#pragma unroll
      for (int q = 0; q < Parameter::kSlots; ++q) {
        const auto w = Parameter::read(slots, kWeight + j * Parameter::kSlots + q);
        Pack<float, 4> b{};
        if (given(p.bias)) b = Parameter::read(slots, kBias + j * Parameter::kSlots + q);
        float dnorms[4];
#pragma unroll
        for (int e = 4 * q; e < 4 * q + 4; ++e) {
          const Gate<float> gate(gated ? v[e] : 0.0f);
          const float from = gate_first ? s[e] * gate.value : s[e];
          const float n = (from - mean[0]) * gradient.rstd;
          const float dnorm = gate_last ? g[e] * gate.value : g[e];
          dweight[j][e] += dnorm * n;
          dnorms[e - 4 * q] = dnorm;
          const float ds = gradient(n, w[e - 4 * q] * dnorm);
          const float norm = n * w[e - 4 * q] + b[e - 4 * q];
          gradient_x[e] = gate_first ? ds * gate.value : ds;
          gradient_z[e] = gate.slope * (gate_first ? ds * s[e] : g[e] * norm);
        }
        if (given(p.bias)) {
          Parameter::add(slots, kBiasSums + j * Parameter::kSlots + q, dnorms);
        }
      }
      dx.write(to_x + channel(j), gradient_x);
      if (gated) dz.write(to_z + channel(j), gradient_z);
    }
  }

  float* const to = partials + team.strip * kParameters * p.channels + first;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (!there(j)) continue;
#pragma unroll
    for (int e = 0; e < kVec; ++e) to[channel(j) + e] = dweight[j][e];
    if (!given(p.bias)) continue;
#pragma unroll
    for (int q = 0; q < Parameter::kSlots; ++q) {
      const auto sums = Parameter::read(slots, kBiasSums + j * Parameter::kSlots + q);
#pragma unroll
      for (int e = 0; e < 4; ++e) to[p.channels + channel(j) + 4 * q + e] = sums[e];
    }
  }
}

template <class T>
__global__ void backward_elements(const RmsNormGatedParams p, const RowTeams teams,
                                  Accumulate<T>* partials) {
  using Acc = Accumulate<T>;
  __shared__ typename TeamSum<Acc>::Buffers buffers;
  const Team team(teams);
  if (!team.works) return;
  TeamSum<Acc> sum(team, buffers);
  const bool gated = given(p.z);
  const bool gate_first = gated && !p.norm_before_gate;
  const bool gate_last = gated && p.norm_before_gate;
  const int64_t first = team.group * p.group_size;
  Acc* const to = partials + team.strip * kParameters * p.channels + first;
  for (int64_t row = team.strip; row < p.rows; row += team.strips) {
    const RowIndex at(p.axes, row);
    const auto x = [&](int64_t c) { return element<T>(p.x, at(p.x, first + c)); };
    const auto z = [&](int64_t c) { return element<T>(p.z, at(p.z, first + c)); };
    const auto dout = [&](int64_t c) { return element<T>(p.dout, at(p.dout, first + c)); };
    const auto source = [&](int64_t c) { return gate_first ? x(c) * silu(z(c)) : x(c); };
    Acc mean[1] = {0}, sums[3] = {0, 0, 0};
    if (!p.is_rms_norm) {
      for (int64_t c = team.thread; c < p.group_size; c += team.threads) mean[0] += source(c);
      sum(mean);
      mean[0] /= static_cast<Acc>(p.group_size);
    }
    for (int64_t c = team.thread; c < p.group_size; c += team.threads) {
      const Acc d = source(c) - mean[0];
      const Acc wg =
          parameter<Acc>(p.weight, first + c) * dout(c) * (gate_last ? silu(z(c)) : Acc(1));
      sums[0] += d * d;
      sums[1] += d * wg;
      sums[2] += wg;
    }
    sum(sums);
    const NormGradient<Acc> gradient(sums, p.group_size, p.eps, p.is_rms_norm);
    for (int64_t c = team.thread; c < p.group_size; c += team.threads) {
      const Gate<Acc> gate(gated ? z(c) : Acc(0));
      const Acc from = x(c), d = dout(c), w = parameter<Acc>(p.weight, first + c);
      const Acc n = ((gate_first ? from * gate.value : from) - mean[0]) * gradient.rstd;
      const Acc dnorm = gate_last ? d * gate.value : d;
      const Acc ds = gradient(n, w * dnorm);
      const bool starts = row == team.strip;  // the thread's own sum, in the workspace
      to[c] = starts ? dnorm * n : to[c] + dnorm * n;
      if (given(p.dbias)) to[p.channels + c] = starts ? dnorm : to[p.channels + c] + dnorm;
      static_cast<T*>(p.dx.data)[at(p.dx, first + c)] =
          from_accumulate<T>(gate_first ? ds * gate.value : ds);
      if (!gated) continue;
      const Acc b = parameter<Acc>(p.bias, first + c);
      static_cast<T*>(p.dz.data)[at(p.dz, first + c)] =
          from_accumulate<T>(gate.slope * (gate_first ? ds * from : d * (n * w + b)));
    }
  }
}

template <class T>
RowPlan plan(const RmsNormGatedParams& p) {
  bool vectors = false;
  if constexpr (sizeof(T) <= 4) {
    vectors = rows_are_vectors<T>(p.x) && rows_are_vectors<T>(p.z) && rows_are_vectors<T>(p.dout) &&
              rows_are_vectors<T>(p.dx) && rows_are_vectors<T>(p.dz);
  }
  constexpr int kParameter = Vector<T>::kSize / 4;
  const int slots = kStages * 3 + kParameter * (given(p.bias) ? 3 : 1);
  return plan_rows<T>(p.rows, p.channels / p.group_size, p.group_size, vectors, slots,
                      kBackwardLimits);
}

}  // namespace

template <class T>
size_t workspace_rms_norm_gated_bwd(const RmsNormGatedParams& p) {
  return sizeof(Accumulate<T>) *
         static_cast<size_t>(plan<T>(p).teams.strips * kParameters * p.channels);
}

template <class T>
CudaStatus launch_rms_norm_gated_bwd(const RmsNormGatedParams& p, void* workspace,
                                     CudaStream stream_handle) {
  using Acc = Accumulate<T>;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (p.channels == 0) return cudaSuccess;
  const RowPlan rows = plan<T>(p);
  Acc* const partials = static_cast<Acc*>(workspace);
  if (p.rows > 0) {
    if constexpr (sizeof(T) <= 4) {
      for_vectors<T>(rows.vectors, [&](auto vectors) {
        launch_rows(backward_vectors<T, vectors>, rows, stream, p, rows.teams, partials);
      });
    }
    if (rows.vectors == 0) {
      launch_rows(backward_elements<T>, rows, stream, p, rows.teams, partials);
    }
  }
  const ParameterGradients<kParameters> gradients{
      {p.dweight, p.dbias}, p.channels, rows.teams.strips};
  launch_reduce<Acc>(gradients, workspace, stream);
  return cudaGetLastError();
}

template size_t workspace_rms_norm_gated_bwd<MAMBA_SSM_ELEMENT>(const RmsNormGatedParams&);
template CudaStatus launch_rms_norm_gated_bwd<MAMBA_SSM_ELEMENT>(const RmsNormGatedParams&, void*,
                                                                 CudaStream);

}  // namespace mamba_ssm::kernels
