// Fused residual addition and normalization, backward. How rows are divided: row_norm.cuh; formula:
// layer_norm.h. Vectors serve one head without dropout and rowscale, where dx is dsum; a thread
// keeps its sums over the rows in registers, those of dbias in shared memory.
#include "launch.cuh"
#include "layer_norm.cuh"

namespace mamba_ssm::kernels {
namespace {

constexpr int kParameters = 4;  // weight, bias, weight1, bias1

constexpr RowShares kShares = {{8, 640, 640}, {16, 512, 512}, {32, 512, 512}};

template <class T, int kVectors>
__global__ void __launch_bounds__(largest_team<T, kVectors>(kShares))
    backward_vectors(const LayerNormParams p, const RowTeams teams, float* partials) {
  using Stream = RowStream<T>;
  using Parameter = SharedParameter<Stream::kVec>;
  constexpr int kVec = Stream::kVec;
  extern __shared__ uint4 shared[];
  __shared__ TeamSum<float>::Buffers buffers;
  const Team team(teams);
  let_next_start();
  if (!team.works) return;
  TeamSum<float> sum(team, buffers);
  const Slots slots(shared);
  const Stream from{p.sum}, dout{p.dout}, dresidual_out{p.dresidual_out};
  const Stream dx{p.dx}, dresidual{p.dresidual};
  const int wide = Stream::slots(p.sum), wide_d = Stream::slots(p.dresidual_out);
  // Slots of a stage: dout, sum, dresidual_out.
  const int slots_of_stage = kVectors * (1 + wide + wide_d);
  const int slot_weight = kStages * slots_of_stage;
  const int slot_bias_sums = slot_weight + kVectors * Parameter::kSlots;
  const auto channel = [&](int j) { return (j * team.threads + team.thread) * kVec; };
  const int width = static_cast<int>(p.channels);
  const GroupMeans<float> group(width, p.eps);
  const auto there = [&](int j) { return channel(j) < width; };
  const auto slot_sum = [&](int stage, int j) {
    return slots_of_stage * stage + kVectors + j * wide;
  };
  const auto slot_d = [&](int stage, int j) {
    return slots_of_stage * stage + kVectors * (1 + wide) + j * wide_d;
  };

  const unsigned rows = static_cast<unsigned>(p.rows);
  const auto fetch = [&](unsigned row, int stage) {
    if (row < rows) {
      const RowIndex<unsigned> at(p.axes, row);
      const int64_t from_sum = at.start(p.sum), from_out = at.start(p.dout),
                    from_d = at.start(p.dresidual_out);
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (!there(j)) continue;
        dout.fetch(slots, slots_of_stage * stage + j, from_out + channel(j));
        from.fetch(slots, slot_sum(stage, j), from_sum + channel(j));
        if (given(p.dresidual_out)) {
          dresidual_out.fetch(slots, slot_d(stage, j), from_d + channel(j));
        }
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
    Parameter::keep(slots, slot_weight + j * Parameter::kSlots, p.weight, channel(j));
    if (given(p.dbias)) Parameter::clear(slots, slot_bias_sums + j * Parameter::kSlots);
  }

  for (unsigned row = team.strip; row < rows; row += team.strips, stage ^= 1) {
    fetch(row + team.strips, stage ^ 1);
    wait_copies<1>();
    float mean[1] = {0};
    if (!p.is_rms_norm) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (!there(j)) continue;
        float s[kVec];
        from.read(slots, slot_sum(stage, j), s);
#pragma unroll
        for (int e = 0; e < kVec; ++e) mean[0] += s[e];
      }
      sum(mean);
      mean[0] = group.mean(mean[0]);
    }
    float sums[3] = {0, 0, 0};
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (!there(j)) continue;
      float s[kVec];
      from.read(slots, slot_sum(stage, j), s);
      const auto g = slots.pack<T>(slots_of_stage * stage + j);
#pragma unroll
      for (int q = 0; q < Parameter::kSlots; ++q) {
        const auto w = Parameter::read(slots, slot_weight + j * Parameter::kSlots + q);
#pragma unroll
        for (int e = 4 * q; e < 4 * q + 4; ++e) {
          const float d = s[e] - mean[0], wg = w[e - 4 * q] * g[e];
          sums[0] += d * d;
          sums[1] += d * wg;
          sums[2] += wg;
        }
      }
    }
    sum(sums);
    const NormGradient<float> gradient(group, sums[0], sums[1], p.is_rms_norm ? 0.0f : sums[2]);

    const RowIndex<unsigned> at(p.axes, row);
    const int64_t to_x = at.start(p.dx), to_residual = at.start(p.dresidual);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (!there(j)) continue;
      float s[kVec];
      from.read(slots, slot_sum(stage, j), s);
      const auto g = slots.pack<T>(slots_of_stage * stage + j);
#pragma unroll
      for (int q = 0; q < Parameter::kSlots; ++q) {
        const auto w = Parameter::read(slots, slot_weight + j * Parameter::kSlots + q);
#pragma unroll
        for (int e = 4 * q; e < 4 * q + 4; ++e) {  // s becomes dsum
          const float n = (s[e] - mean[0]) * gradient.rstd;
          dweight[j][e] += g[e] * n;
          s[e] = gradient(n, w[e - 4 * q] * g[e]);
        }
        if (given(p.dbias)) {
          const float terms[4] = {g[4 * q], g[4 * q + 1], g[4 * q + 2], g[4 * q + 3]};
          Parameter::add(slots, slot_bias_sums + j * Parameter::kSlots + q, terms);
        }
      }
      if (given(p.dresidual_out)) {
        float d[kVec];
        dresidual_out.read(slots, slot_d(stage, j), d);
#pragma unroll
        for (int e = 0; e < kVec; ++e) s[e] += d[e];
      }
      dx.write(to_x + channel(j), s);
      if (given(p.dresidual)) dresidual.write(to_residual + channel(j), s);
    }
  }

  float* const to = partials + int64_t{team.strip} * kParameters * p.channels;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (!there(j)) continue;
#pragma unroll
    for (int e = 0; e < kVec; ++e) to[channel(j) + e] = dweight[j][e];
    if (!given(p.dbias)) continue;
#pragma unroll
    for (int q = 0; q < Parameter::kSlots; ++q) {
      const auto sums = Parameter::read(slots, slot_bias_sums + j * Parameter::kSlots + q);
#pragma unroll
      for (int e = 0; e < 4; ++e) to[p.channels + channel(j) + 4 * q + e] = sums[e];
    }
  }
}

template <class T>
__global__ void backward_elements(const LayerNormParams p, const RowTeams teams,
                                  Accumulate<T>* partials) {
  using Acc = Accumulate<T>;
  __shared__ typename TeamSum<Acc>::Buffers buffers;
  const Team team(teams);
  let_next_start();
  if (!team.works) return;
  TeamSum<Acc> sum(team, buffers);
  const GroupMeans<Acc> group(p.channels, p.eps);
  Acc* const to = partials + int64_t{team.strip} * kParameters * p.channels;
  for (int64_t row = team.strip; row < p.rows; row += team.strips) {
    const RowIndex<int64_t> at(p.axes, row);
    const Acc rowscale = given(p.rowscale)
                             ? load_as<Acc>(p.rowscale.data, p.rowscale.dtype, at.start(p.rowscale))
                             : Acc(1);
    const auto source = [&](int64_t c) {
      return load_as<Acc>(p.sum.data, p.sum.dtype, at(p.sum, c));
    };
    const auto dout = [&](int64_t c) { return element<T>(p.dout, at(p.dout, c)); };
    const auto dout1 = [&](int64_t c) {
      return given(p.dout1) ? element<T>(p.dout1, at(p.dout1, c)) : Acc(0);
    };
    const auto gradient_of_n = [&](int64_t c) {
      const Acc g = parameter<Acc>(p.weight, c) * dout(c);
      return given(p.dout1) ? g + parameter<Acc>(p.weight1, c) * dout1(c) : g;
    };
    Acc mean[1] = {0}, sums[3] = {0, 0, 0};
    if (!p.is_rms_norm) {
      for (int64_t c = team.thread; c < p.channels; c += team.threads) mean[0] += source(c);
      sum(mean);
      mean[0] = group.mean(mean[0]);
    }
    for (int64_t c = team.thread; c < p.channels; c += team.threads) {
      const Acc d = source(c) - mean[0], g = gradient_of_n(c);
      sums[0] += d * d;
      sums[1] += d * g;
      sums[2] += g;
    }
    sum(sums);
    const NormGradient<Acc> gradient(group, sums[0], sums[1], p.is_rms_norm ? Acc(0) : sums[2]);
    for (int64_t c = team.thread; c < p.channels; c += team.threads) {
      const Acc n = (source(c) - mean[0]) * gradient.rstd;
      const auto add = [&](int index, Acc v) {  // to the thread's own sums, in the workspace
        Acc& total = to[index * p.channels + c];
        total = row == team.strip ? v : total + v;
      };
      add(0, dout(c) * n);
      if (given(p.dbias)) add(1, dout(c));
      if (given(p.dweight1)) add(2, dout1(c) * n);
      if (given(p.dbias1)) add(3, dout1(c));
      Acc dsum = gradient(n, gradient_of_n(c));
      if (given(p.dresidual_out)) {
        dsum += load_as<Acc>(p.dresidual_out.data, p.dresidual_out.dtype, at(p.dresidual_out, c));
      }
      static_cast<T*>(p.dx.data)[at(p.dx, c)] =
          from_accumulate<T>(dropped(p, p.dropout_mask, at, c, dsum * rowscale));
      if (given(p.dx1)) {
        static_cast<T*>(p.dx1.data)[at(p.dx1, c)] =
            from_accumulate<T>(dropped(p, p.dropout_mask1, at, c, dsum));
      }
      if (given(p.dresidual)) {
        store_as(p.dresidual.data, p.dresidual.dtype, at(p.dresidual, c), dsum);
      }
    }
  }
}

template <class T>
RowPlan plan(const LayerNormParams& p) {
  bool vectors = false;
  if constexpr (sizeof(T) <= 4) {
    vectors = !given(p.weight1) && !given(p.rowscale) && !given(p.dropout_mask) && !given(p.dx1) &&
              rows_are_vectors<T>(p.sum) && rows_are_vectors<T>(p.dout) &&
              rows_are_vectors<T>(p.dresidual_out) && rows_are_vectors<T>(p.dx) &&
              rows_are_vectors<T>(p.dresidual);
  }
  constexpr int kParameter = Vector<T>::kSize / 4;
  using Stream = RowStream<T>;
  const int slots = kStages * (1 + Stream::slots(p.sum) + Stream::slots(p.dresidual_out)) +
                    kParameter * (given(p.dbias) ? 2 : 1);
  return plan_rows<T>(p.rows, /*groups=*/1, p.channels, vectors, slots, kShares);
}

}  // namespace

template <class T>
size_t workspace_layer_norm_bwd(const LayerNormParams& p) {
  return sizeof(Accumulate<T>) *
         static_cast<size_t>(plan<T>(p).teams.strips * kParameters * p.channels);
}

template <class T>
CudaStatus launch_layer_norm_bwd(const LayerNormParams& p, void* workspace,
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
      {p.dweight, p.dbias, p.dweight1, p.dbias1}, p.channels, rows.teams.strips};
  launch_reduce<Acc>(gradients, workspace, stream);
  return cudaGetLastError();
}

template size_t workspace_layer_norm_bwd<MAMBA_SSM_ELEMENT>(const LayerNormParams&);
template CudaStatus launch_layer_norm_bwd<MAMBA_SSM_ELEMENT>(const LayerNormParams&, void*,
                                                             CudaStream);

}  // namespace mamba_ssm::kernels
