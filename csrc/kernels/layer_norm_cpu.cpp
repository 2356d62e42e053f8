// Fused residual addition and normalization on CPU: a work item is a row, of the backward a block
// of rows. Passes over a row read its inputs again, from the cache, instead of keeping anything.
#include "cpu.h"
#include "layer_norm.h"
#include "row_norm_simd.h"

namespace mamba_ssm::kernels::MAMBA_SSM_ISA {
namespace {

constexpr int kParameters = 4;  // weight, bias, weight1, bias1

/// What x is multiplied with before and by dropout.
template <class S>
S rowscale_of(const LayerNormParams& p, int64_t row) {
  return p.rowscale ? line<S>(p.axes, p.rowscale, row, 0).load(0, 1)[0] : S(1);
}

/// dropout(v) by a mask that may be absent.
template <class S>
Vector<S> dropped(const LayerNormParams& p, const Line<S>& mask, int64_t c, int count,
                  Vector<S> v) {
  return mask ? mask.where(c, count, v * static_cast<S>(p.dropout_scale)) : v;
}

template <class S>
void forward_row(const LayerNormParams& p, int64_t row) {
  using V = Vector<S>;
  const auto row_of = [&](const View<4>& v) { return line<S>(p.axes, v, row, 0); };
  const Line<S> x = row_of(p.x), x1 = row_of(p.x1), residual = row_of(p.residual);
  const Line<S> mask = row_of(p.dropout_mask), mask1 = row_of(p.dropout_mask1);
  const Line<S> out = row_of(p.out), out1 = row_of(p.out1);
  const Line<S> residual_out = row_of(p.residual_out);
  const Line<S> weight = line<S>(p.weight, 0), bias = line<S>(p.bias, 0);
  const Line<S> weight1 = line<S>(p.weight1, 0), bias1 = line<S>(p.bias1, 0);
  const S rowscale = rowscale_of<S>(p, row);

  const auto sum_of = [&](int64_t c, int count) {
    V sum = dropped(p, mask, c, count, x.load(c, count) * rowscale);
    if (x1) sum = sum + dropped(p, mask1, c, count, x1.load(c, count));
    return residual ? sum + residual.load(c, count) : sum;
  };
  const Statistics<S> stats = statistics<S>(p.channels, p.is_rms_norm, p.eps, sum_of);
  for_vectors(p.channels, [&](int64_t c, int count) {
    const V sum = sum_of(c, count);
    const V n = stats.normalize(sum);
    const auto head = [&](const Line<S>& w, const Line<S>& b) {
      const V v = n * w.load(c, count);
      return b ? v + b.load(c, count) : v;
    };
    out.store(c, count, head(weight, bias));
    if (weight1) out1.store(c, count, head(weight1, bias1));
    if (residual_out) residual_out.store(c, count, sum);
  });
}

template <class S>
void backward_row(const LayerNormParams& p, int64_t row, const PartialSum<S> (&sums)[kParameters]) {
  using V = Vector<S>;
  const auto row_of = [&](const View<4>& v) { return line<S>(p.axes, v, row, 0); };
  const Line<S> sum = row_of(p.sum), dresidual_out = row_of(p.dresidual_out);
  const Line<S> dout = row_of(p.dout), dout1 = row_of(p.dout1);
  const Line<S> mask = row_of(p.dropout_mask), mask1 = row_of(p.dropout_mask1);
  const Line<S> dx = row_of(p.dx), dx1 = row_of(p.dx1), dresidual = row_of(p.dresidual);
  const Line<S> weight = line<S>(p.weight, 0), weight1 = line<S>(p.weight1, 0);
  const S rowscale = rowscale_of<S>(p, row);

  const Statistics<S> stats = statistics<S>(
      p.channels, p.is_rms_norm, p.eps, [&](int64_t c, int count) { return sum.load(c, count); });
  const auto gradient_of_n = [&](int64_t c, int count) {
    const V g = dout.load(c, count) * weight.load(c, count);
    return dout1 ? g + dout1.load(c, count) * weight1.load(c, count) : g;
  };
  const NormGradient<S> gradient(p.channels, p.is_rms_norm, stats.rstd,
                                 [&](int64_t c, int count, V& n, V& g) {
                                   n = stats.normalize(sum.load(c, count));
                                   g = gradient_of_n(c, count);
                                 });
  for_vectors(p.channels, [&](int64_t c, int count) {
    const V n = stats.normalize(sum.load(c, count));
    const V g = dout.load(c, count);
    sums[0].add(c, count, g * n);
    if (p.dbias) sums[1].add(c, count, g);
    if (dout1) {
      const V g1 = dout1.load(c, count);
      sums[2].add(c, count, g1 * n);
      if (p.dbias1) sums[3].add(c, count, g1);
    }
    V dsum = gradient(n, gradient_of_n(c, count));
    if (dresidual_out) dsum = dsum + dresidual_out.load(c, count);
    dx.store(c, count, dropped(p, mask, c, count, dsum * rowscale));
    if (dx1) dx1.store(c, count, dropped(p, mask1, c, count, dsum));
    if (dresidual) dresidual.store(c, count, dsum);
  });
}

}  // namespace

void layer_norm_fwd_cpu(const LayerNormParams& p, int64_t begin, int64_t end) noexcept {
  with_accumulate(p.dtype, [&](auto sum) {
    for (int64_t row = begin; row < end; ++row) forward_row<decltype(sum)>(p, row);
  });
}

void layer_norm_bwd_cpu(const LayerNormParams& p, void* workspace, int64_t begin,
                        int64_t end) noexcept {
  const int64_t blocks = row_blocks(p.rows);
  with_accumulate(p.dtype, [&](auto sum) {
    using S = decltype(sum);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kParameters;
      const PartialSum<S> sums[kParameters] = {{workspace, first, p.channels},
                                               {workspace, first + 1, p.channels},
                                               {workspace, first + 2, p.channels},
                                               {workspace, first + 3, p.channels}};
      for (const PartialSum<S>& partial : sums) partial.clear(p.channels);
      const int64_t last = (block + 1) * p.rows / blocks;
      for (int64_t row = block * p.rows / blocks; row < last; ++row) backward_row<S>(p, row, sums);
    }
  });
}

void layer_norm_bwd_reduce_cpu(const LayerNormParams& p, void* workspace, int64_t begin,
                               int64_t end) noexcept {
  const int64_t blocks = row_blocks(p.rows);
  const View<1>* const gradients[kParameters] = {&p.dweight, &p.dbias, &p.dweight1, &p.dbias1};
  with_accumulate(p.dtype, [&](auto sum) {
    using S = decltype(sum);
    for (int64_t item = begin; item < end; ++item) {
      for (int i = 0; i < kParameters; ++i) {
        reduce_partials<S>(workspace, blocks, kParameters, i, p.channels, item, *gradients[i]);
      }
    }
  });
}

}  // namespace mamba_ssm::kernels::MAMBA_SSM_ISA
