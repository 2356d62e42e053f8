// Gated normalization on CPU: a work item is a row, of the backward a block of rows. Passes over a
// group read its inputs again, from the cache, instead of keeping anything.
#include "cpu.h"
#include "rms_norm_gated.h"
#include "row_norm_simd.h"

namespace mamba_ssm::kernels::MAMBA_SSM_ISA {
namespace {

constexpr int kParameters = 2;  // weight, bias

/// One group of channels of a row.
template <class S>
struct Group {
  using V = Vector<S>;
  const RmsNormGatedParams& p;
  int64_t row, channel;
  Line<S> x = line<S>(p.axes, p.x, row, channel);
  Line<S> z = line<S>(p.axes, p.z, row, channel);
  Line<S> weight = line<S>(p.weight, channel);
  Line<S> bias = line<S>(p.bias, channel);
  bool gate_first = z && !p.norm_before_gate;
  bool gate_last = z && p.norm_before_gate;
  Statistics<S> stats = statistics<S>(p.group_size, p.is_rms_norm, p.eps,
                                      [&](int64_t c, int count) { return source(c, count); });

  /// What is normalized.
  V source(int64_t c, int count) const {
    const V v = x.load(c, count);
    return gate_first ? v * silu(z.load(c, count)) : v;
  }
  V affine(int64_t c, int count, V n) const {
    const V v = n * weight.load(c, count);
    return bias ? v + bias.load(c, count) : v;
  }
};

template <class S>
void forward_row(const RmsNormGatedParams& p, int64_t row) {
  using V = Vector<S>;
  for (int64_t channel = 0; channel < p.channels; channel += p.group_size) {
    const Group<S> group{p, row, channel};
    const Line<S> out = line<S>(p.axes, p.out, row, channel);
    for_vectors(p.group_size, [&](int64_t c, int count) {
      V v = group.affine(c, count, group.stats.normalize(group.source(c, count)));
      if (group.gate_last) v = v * silu(group.z.load(c, count));
      out.store(c, count, v);
    });
  }
}

template <class S>
void backward_row(const RmsNormGatedParams& p, int64_t row, PartialSum<S> dweight,
                  PartialSum<S> dbias) {
  using V = Vector<S>;
  for (int64_t channel = 0; channel < p.channels; channel += p.group_size) {
    const Group<S> group{p, row, channel};
    const Line<S> dout = line<S>(p.axes, p.dout, row, channel);
    const Line<S> dx = line<S>(p.axes, p.dx, row, channel);
    const Line<S> dz = line<S>(p.axes, p.dz, row, channel);
    /// Gradient of norm.
    const auto dnorm = [&](int64_t c, int count) {
      const V v = dout.load(c, count);
      return group.gate_last ? v * silu(group.z.load(c, count)) : v;
    };
    const NormGradient<S> gradient(p.group_size, p.is_rms_norm, group.stats.rstd,
                                   [&](int64_t c, int count, V& n, V& g) {
                                     n = group.stats.normalize(group.source(c, count));
                                     g = dnorm(c, count) * group.weight.load(c, count);
                                   });
    for_vectors(p.group_size, [&](int64_t c, int count) {
      const V n = group.stats.normalize(group.source(c, count));
      const V g = dnorm(c, count);
      dweight.add(channel + c, count, g * n);
      if (group.bias) dbias.add(channel + c, count, g);
      const V ds = gradient(n, g * group.weight.load(c, count));
      if (!group.z) return dx.store(c, count, ds);
      const V z = group.z.load(c, count);
      if (group.gate_first) {
        dx.store(c, count, ds * silu(z));
        dz.store(c, count, ds * group.x.load(c, count) * silu_slope(z));
      } else {
        dx.store(c, count, ds);
        dz.store(c, count, dout.load(c, count) * group.affine(c, count, n) * silu_slope(z));
      }
    });
  }
}

}  // namespace

void rms_norm_gated_fwd_cpu(const RmsNormGatedParams& p, int64_t begin, int64_t end) noexcept {
  with_accumulate(p.dtype, [&](auto sum) {
    for (int64_t row = begin; row < end; ++row) forward_row<decltype(sum)>(p, row);
  });
}

void rms_norm_gated_bwd_cpu(const RmsNormGatedParams& p, void* workspace, int64_t begin,
                            int64_t end) noexcept {
  const int64_t blocks = row_blocks(p.rows);
  with_accumulate(p.dtype, [&](auto sum) {
    using S = decltype(sum);
    for (int64_t block = begin; block < end; ++block) {
      const PartialSum<S> dweight(workspace, block * kParameters, p.channels);
      const PartialSum<S> dbias(workspace, block * kParameters + 1, p.channels);
      dweight.clear(p.channels);
      dbias.clear(p.channels);
      const int64_t last = (block + 1) * p.rows / blocks;
      for (int64_t row = block * p.rows / blocks; row < last; ++row) {
        backward_row<S>(p, row, dweight, dbias);
      }
    }
  });
}

void rms_norm_gated_bwd_reduce_cpu(const RmsNormGatedParams& p, void* workspace, int64_t begin,
                                   int64_t end) noexcept {
  const int64_t blocks = row_blocks(p.rows);
  with_accumulate(p.dtype, [&](auto sum) {
    using S = decltype(sum);
    for (int64_t item = begin; item < end; ++item) {
      reduce_partials<S>(workspace, blocks, kParameters, 0, p.channels, item, p.dweight);
      reduce_partials<S>(workspace, blocks, kParameters, 1, p.channels, item, p.dbias);
    }
  });
}

}  // namespace mamba_ssm::kernels::MAMBA_SSM_ISA
