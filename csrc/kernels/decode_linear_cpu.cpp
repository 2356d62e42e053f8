// Products of a decode step on CPU: a work item is a block of outputs, which share the operands
// that are made from x.
#include "cpu.h"
#include "decode_linear.h"
#include "row_norm_simd.h"

namespace mamba_ssm::kernels::MAMBA_SSM_ISA {
namespace {

constexpr int kTile = 512;  // features of a row that are made at a time

template <class S>
Line<S> row_of(const View<2>& v, int64_t row) {
  return v ? Line<S>(v.data, v.dtype, row * v.stride[0], v.stride[1]) : Line<S>();
}

template <class S>
S sum_of(Vector<S> v) {
  S sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += v[lane];
  return sum;
}

/// One row of x times the outputs from `begin` to `end`, at most kLinearOutputs.
template <class S>
void row_outputs(const DecodeLinearParams& p, int64_t row, int64_t begin, int64_t end) {
  using V = Vector<S>;
  const Line<S> x = row_of<S>(p.x, row), residual = row_of<S>(p.residual, row);
  const Line<S> z = row_of<S>(p.z, row), out = row_of<S>(p.out, row);
  const Line<S> residual_out = begin == 0 ? row_of<S>(p.residual_out, row) : Line<S>();
  const Line<S> norm_weight = line<S>(p.norm_weight, 0), bias = line<S>(p.bias, 0);
  V operand[kTile / kLanes];
  V sums[kLinearOutputs] = {};
  V squares = {};
  for (int64_t first = 0; first < p.in_features; first += kTile) {
    const int64_t left = p.in_features - first;
    const int64_t tile = left < kTile ? left : kTile;
    for_vectors(tile, [&](int64_t i, int count) {
      const int64_t c = first + i;
      V s = x.load(c, count);
      if (residual) s = s + residual.load(c, count);
      if (residual_out) residual_out.store(c, count, s);
      if (z) s = s * silu(z.load(c, count));
      if (norm_weight) {
        squares = squares + s * s;
        s = s * norm_weight.load(c, count);
      }
      operand[i / kLanes] = s;
    });
    for (int64_t o = begin; o < end; ++o) {
      const Line<S> weight = row_of<S>(p.weight, o);
      V sum = sums[o - begin];
      for_vectors(tile, [&](int64_t i, int count) {
        sum = sum + operand[i / kLanes] * weight.load(first + i, count);
      });
      sums[o - begin] = sum;
    }
  }
  S scale = 1;
  if (norm_weight && p.in_features > 0) {
    const S mean = sum_of<S>(squares) / static_cast<S>(p.in_features);
    scale = static_cast<S>(1 / __builtin_sqrt(mean + static_cast<S>(p.eps)));
  }
  for (int64_t o = begin; o < end; ++o) {
    V v = {};
    v[0] = sum_of<S>(sums[o - begin]) * scale;
    if (bias) v[0] += bias.load(o, 1)[0];
    out.store(o, 1, v);
  }
}

}  // namespace

void decode_linear_cpu(const DecodeLinearParams& p, int64_t begin, int64_t end) noexcept {
  with_accumulate(p.dtype, [&](auto s) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item * kLinearOutputs;
      const int64_t last = first + kLinearOutputs;
      for (int64_t row = 0; row < p.rows; ++row) {
        row_outputs<decltype(s)>(p, row, first, last < p.out_features ? last : p.out_features);
      }
    }
  });
}

}  // namespace mamba_ssm::kernels::MAMBA_SSM_ISA
