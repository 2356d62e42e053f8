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
#include "rms_norm_gated.cuh"

namespace mamba_ssm::kernels {
namespace {

constexpr int kParameters = 2;  // weight, bias

constexpr RowShares kShares = {{8, 320, 640}, {16, 640, 640}, {32, 512, 512}};

/// What follows from sigmoid(z).
template <class Acc>
struct Gate {
  Acc value, slope;  // silu(z), silu'(z)

  __device__ __forceinline__ Gate(Acc z, Acc sigmoid_z)
      : value(z * sigmoid_z), slope(sigmoid_z + value * (Acc(1) - sigmoid_z)) {}
};

template <class T, int kVectors, GatePlace kGate>
__global__ void __launch_bounds__(largest_team<T, kVectors>(kShares))
    backward_vectors(const RmsNormGatedParams p, const RowTeams teams, float* partials) {
  constexpr int kVec = Vector<T>::kSize;
  using Parameter = SharedParameter<kVec>;
  using Row = Pack<T, kVec>[kVectors];
  constexpr int kStage = 3 * kVectors;  // slots: x, z, dout
  constexpr int kWeight = kStages * kStage;
  constexpr int kBias = kWeight + kVectors * Parameter::kSlots;
  constexpr int kBiasSums = kBias + kVectors * Parameter::kSlots;
  constexpr bool kGated = kGate != GatePlace::kNone;
  constexpr bool kBefore = kGate == GatePlace::kBeforeNorm;
  constexpr bool kAfter = kGate == GatePlace::kAfterNorm;
  constexpr bool kKeepsSigmoid = kVectors * kVec <= 8;  // while there are registers
  extern __shared__ uint4 shared[];
  __shared__ TeamSum<float>::Buffers buffers;
  const Team team(teams);
  let_next_start();
  if (!team.works) return;
  TeamSum<float> sum(team, buffers);
  const Slots slots(shared);
  const int64_t first = int64_t{team.group} * p.group_size;
  const int width = static_cast<int>(p.group_size);
  const GroupMeans<float> group(width, p.eps);
  const int step = team.threads * kVec;
  const auto channel = [&](int j) { return j * step + team.thread * kVec; };
  const auto there = [&](int j) { return channel(j) < width; };
  const int64_t mine = first + channel(0);
  const RowPart<const T> x_part(p.x, mine), z_part(p.z, mine), dout_part(p.dout, mine);
  const RowPart<T> dx_part(p.dx, mine), dz_part(p.dz, mine);

  const unsigned rows = static_cast<unsigned>(p.rows);
  const auto fetch = [&](unsigned row, int stage) {
    if (row < rows) {
      const RowIndex<unsigned> at(p.axes, row);
      const T* const from_x = x_part(at);
      const T* const from_z = z_part(at);
      const T* const from_dout = dout_part(at);
      const int slot = kStage * stage;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (!there(j)) continue;
        copy_async(&slots.pack<T>(slot + j), from_x + j * step);
        if constexpr (kGated) copy_async(&slots.pack<T>(slot + kVectors + j), from_z + j * step);
        copy_async(&slots.pack<T>(slot + 2 * kVectors + j), from_dout + j * step);
      }
    }
    commit_copies();
  };
  int stage = 0;
  fetch(team.strip, stage);
  float dweight[kVectors][kVec] = {};
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (!there(j)) continue;
    Parameter::keep(slots, kWeight + j * Parameter::kSlots, p.weight, first + channel(j));
    if (given(p.bias)) {
      Parameter::keep(slots, kBias + j * Parameter::kSlots, p.bias, first + channel(j));
      Parameter::clear(slots, kBiasSums + j * Parameter::kSlots);
    }
  }

  for (unsigned row = team.strip; row < rows; row += team.strips, stage ^= 1) {
    fetch(row + team.strips, stage ^ 1);
    wait_copies<1>();
    Row x, z, dout;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (!there(j)) continue;
      const int slot = kStage * stage + j;
      x[j] = slots.pack<T>(slot);
      if constexpr (kGated) z[j] = slots.pack<T>(slot + kVectors);
      dout[j] = slots.pack<T>(slot + 2 * kVectors);
    }
    // Of a channel: s, and the gradient of norm.
    const auto source = [&](int j, int e, float silu_z) {
      return kBefore ? x[j][e] * silu_z : x[j][e];
    };
    const auto dnorm = [&](int j, int e, float silu_z) {
      return kAfter ? dout[j][e] * silu_z : dout[j][e];
    };
    // f(j, e, weight) for every channel of the thread.
    const auto for_channels = [&](auto f) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (!there(j)) continue;
#pragma unroll
        for (int q = 0; q < Parameter::kSlots; ++q) {
          const auto w = Parameter::read(slots, kWeight + j * Parameter::kSlots + q);
#pragma unroll
          for (int e = 0; e < 4; ++e) f(j, 4 * q + e, w[e]);
        }
      }
    };

    float first_sums[2] = {0, 0};  // of s, of weight dnorm
    if (!p.is_rms_norm) {
      for_channels([&](int j, int e, float w) {
        const float silu_z = kGated ? silu(z[j][e]) : 1.0f;
        first_sums[0] += source(j, e, silu_z);
        first_sums[1] += w * dnorm(j, e, silu_z);
      });
      sum(first_sums);
    }
    const float mean = group.mean(first_sums[0]);
    float kept[kVectors][kVec];  // sigmoid(z)
    float sums[2] = {0, 0};      // of d = s - mean: of d^2, of d weight dnorm
    for_channels([&](int j, int e, float w) {
      const float sigmoid_z = kGated ? sigmoid(z[j][e]) : 1.0f;
      const float silu_z = kGated ? z[j][e] * sigmoid_z : 1.0f;
      if constexpr (kKeepsSigmoid) kept[j][e] = sigmoid_z;
      const float d = source(j, e, silu_z) - mean;
      sums[0] += d * d;
      sums[1] += d * (w * dnorm(j, e, silu_z));
    });
    sum(sums);
    const NormGradient<float> gradient(group, sums[0], sums[1], first_sums[1]);

    const RowIndex<unsigned> at(p.axes, row);
    T *const to_x = dx_part(at), *const to_z = dz_part(at);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (!there(j)) continue;
      float gradient_x[kVec], gradient_z[kVec];
#pragma unroll
      for (int q = 0; q < Parameter::kSlots; ++q) {
        const auto w = Parameter::read(slots, kWeight + j * Parameter::kSlots + q);
        Pack<float, 4> b{};
        if (given(p.bias)) b = Parameter::read(slots, kBias + j * Parameter::kSlots + q);
        float dnorms[4];
#pragma unroll
        for (int e = 4 * q; e < 4 * q + 4; ++e) {
          const float from_z = kGated ? z[j][e] : 0.0f;
          const Gate<float> gate(from_z, kKeepsSigmoid ? kept[j][e] : sigmoid(from_z));
          const float n = (source(j, e, gate.value) - mean) * gradient.rstd;
          const float g = dnorm(j, e, gate.value);
          dweight[j][e] += g * n;
          dnorms[e - 4 * q] = g;
          const float ds = gradient(n, w[e - 4 * q] * g);
          gradient_x[e] = kBefore ? ds * gate.value : ds;
          const float norm = n * w[e - 4 * q] + b[e - 4 * q];
          gradient_z[e] = gate.slope * (kBefore ? ds * x[j][e] : dout[j][e] * norm);
        }
        if (given(p.bias)) {
          Parameter::add(slots, kBiasSums + j * Parameter::kSlots + q, dnorms);
        }
      }
      store_rounded(to_x + j * step, gradient_x);
      if constexpr (kGated) store_rounded(to_z + j * step, gradient_z);
    }
  }

  float* const to = partials + int64_t{team.strip} * kParameters * p.channels + first;
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
  let_next_start();
  if (!team.works) return;
  TeamSum<Acc> sum(team, buffers);
  const GroupMeans<Acc> group(p.group_size, p.eps);
  const bool gated = given(p.z);
  const bool gate_first = gated && !p.norm_before_gate;
  const bool gate_last = gated && p.norm_before_gate;
  const int64_t first = int64_t{team.group} * p.group_size;
  Acc* const to = partials + int64_t{team.strip} * kParameters * p.channels + first;
  for (int64_t row = team.strip; row < p.rows; row += team.strips) {
    const RowIndex<int64_t> at(p.axes, row);
    const auto x = [&](int64_t c) { return element<T>(p.x, at(p.x, first + c)); };
    const auto z = [&](int64_t c) { return element<T>(p.z, at(p.z, first + c)); };
    const auto dout = [&](int64_t c) { return element<T>(p.dout, at(p.dout, first + c)); };
    const auto source = [&](int64_t c) { return gate_first ? x(c) * silu(z(c)) : x(c); };
    Acc mean[1] = {0}, sums[3] = {0, 0, 0};
    if (!p.is_rms_norm) {
      for (int64_t c = team.thread; c < p.group_size; c += team.threads) mean[0] += source(c);
      sum(mean);
      mean[0] = group.mean(mean[0]);
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
    const NormGradient<Acc> gradient(group, sums[0], sums[1], p.is_rms_norm ? Acc(0) : sums[2]);
    for (int64_t c = team.thread; c < p.group_size; c += team.threads) {
      const Acc from_z = gated ? z(c) : Acc(0);
      const Gate<Acc> gate(from_z, sigmoid(from_z));
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
  return plan_rows<T>(p.rows, p.channels / p.group_size, p.group_size, vectors, slots, kShares);
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
        constexpr int kVectors = vectors;
        for_gate_place(p, [&](auto gate) {
          launch_rows(backward_vectors<T, kVectors, gate>, rows, stream, p, rows.teams, partials);
        });
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
