// What the CPU kernels of the norms share: rows as vectors of channels, their statistics, the
// gradient of a normalization, and the sums over rows.
#pragma once

#include "row_norm_cpu.h"
#include "simd.h"

namespace mamba_ssm::kernels::MAMBA_SSM_ISA {

/// f(S{}) for the type that sums run in.
template <class F>
inline void with_accumulate(DType dtype, F f) {
  if (dtype == DType::kFloat64) {
    f(double{});
  } else {
    f(float{});
  }
}

/// v in the first `count` lanes, 0 in the rest, where infinity times 0 may have left NaN.
template <class V>
inline V first_lanes(V v, int count) {
  for (int i = count; i < kLanes; ++i) v[i] = 0;
  return v;
}

/// The channels of one row, or a parameter, from some channel on. Absent by default.
template <class S>
class Line {
  using V = Vector<S>;

 public:
  Line() = default;
  Line(void* data, DType dtype, int64_t offset, int64_t stride)
      : data_(data), dtype_(dtype), offset_(offset), stride_(stride) {}

  explicit operator bool() const { return data_ != nullptr; }

  /// Channels c .. c + count - 1; the rest of the lanes is 0.
  V load(int64_t c, int count) const {
    if (stride_ == 1 && count == kLanes) {
      if constexpr (sizeof(S) == sizeof(double)) {
        if (dtype_ == DType::kFloat64) return load_dense<double>(c);
      } else {
        if (dtype_ == DType::kFloat32) return load_dense<float>(c);
        if (dtype_ == DType::kBFloat16) return load_dense<BFloat16>(c);
        if (dtype_ == DType::kFloat16) return load_dense<Half>(c);
      }
    }
    return load_each(c, count);
  }

  void store(int64_t c, int count, V v) const {
    if (stride_ == 1 && count == kLanes) {
      if constexpr (sizeof(S) == sizeof(double)) {
        if (dtype_ == DType::kFloat64) return store_dense<double>(c, v);
      } else {
        if (dtype_ == DType::kFloat32) return store_dense<float>(c, v);
        if (dtype_ == DType::kBFloat16) return store_dense<BFloat16>(c, v);
        if (dtype_ == DType::kFloat16) return store_dense<Half>(c, v);
      }
    }
    store_each(c, count, v);
  }

  /// v where the byte of a channel is true, 0 elsewhere.
  V where(int64_t c, int count, V v) const {
    const uint8_t* bytes = static_cast<const uint8_t*>(data_) + offset_;
    for (int i = 0; i < count; ++i) {
      if (!bytes[(c + i) * stride_]) v[i] = 0;
    }
    return v;
  }

 private:
  template <class T>
  V load_dense(int64_t c) const {
    return MAMBA_SSM_ISA::load(static_cast<const T*>(data_) + offset_ + c);
  }
  template <class T>
  void store_dense(int64_t c, V v) const {
    MAMBA_SSM_ISA::store(static_cast<T*>(data_) + offset_ + c, v);
  }
  __attribute__((noinline)) V load_each(int64_t c, int count) const {
    S lanes[kLanes] = {};
    for (int i = 0; i < count; ++i) {
      lanes[i] = load_as<S>(data_, dtype_, offset_ + (c + i) * stride_);
    }
    return MAMBA_SSM_ISA::load(lanes);
  }
  __attribute__((noinline)) void store_each(int64_t c, int count, V v) const {
    S lanes[kLanes];
    MAMBA_SSM_ISA::store(lanes, v);
    for (int i = 0; i < count; ++i) {
      store_as(data_, dtype_, offset_ + (c + i) * stride_, lanes[i]);
    }
  }

  void* data_ = nullptr;
  DType dtype_ = DType::kFloat32;
  int64_t offset_ = 0, stride_ = 0;
};

/// Row `row` of a tensor, from `channel` on.
template <class S>
inline Line<S> line(const RowAxes& axes, const View<4>& v, int64_t row, int64_t channel) {
  const int64_t k = row % axes.size[2], above = row / axes.size[2];
  const int64_t j = above % axes.size[1], i = above / axes.size[1];
  return {v.data, v.dtype,
          i * v.stride[0] + j * v.stride[1] + k * v.stride[2] + channel * v.stride[3], v.stride[3]};
}
/// A parameter, from `channel` on.
template <class S>
inline Line<S> line(const View<1>& v, int64_t channel) {
  return {v.data, v.dtype, channel * v.stride[0], v.stride[0]};
}

/// f(c, count) for vectors of `width` channels: `count` of them from c on.
template <class F>
inline void for_vectors(int64_t width, F f) {
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) f(c, kLanes);
  if (c < width) f(c, static_cast<int>(width - c));
}

/// sums[k] = the sum over all channels of what add(c, count, V (&terms)[kCount]) adds to terms[k];
/// it adds nothing to lanes from `count` on. In runs, since in a long sum each term loses what lies
/// below the last place of the sum.
template <int kCount, class S, class F>
inline void sum_channels(int64_t width, S (&sums)[kCount], F add) {
  using V = Vector<S>;
  constexpr int64_t kRun = 32 * kLanes;
  V totals[kCount] = {};
  for (int64_t begin = 0; begin < width; begin += kRun) {
    V run[kCount] = {};
    const int64_t length = begin + kRun < width ? kRun : width - begin;
    for_vectors(length, [&](int64_t c, int count) { add(begin + c, count, run); });
    for (int k = 0; k < kCount; ++k) totals[k] = totals[k] + run[k];
  }
  for (int k = 0; k < kCount; ++k) {
    sums[k] = 0;
    for (int i = 0; i < kLanes; ++i) sums[k] += totals[k][i];
  }
}

/// Mean, and the reciprocal root of variance plus eps, of a row.
template <class S>
struct Statistics {
  S mean = 0, rstd = 0;

  Vector<S> normalize(Vector<S> s) const { return (s - mean) * rstd; }
};

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

/// source(c, count): a vector of the row, 0 in lanes from `count` on.
template <class S, class Source>
inline Statistics<S> statistics(int64_t width, bool is_rms_norm, double eps, Source source) {
  using V = Vector<S>;
  Statistics<S> result;
  S sum[1];
  if (!is_rms_norm) {
    sum_channels<1, S>(width, sum, [&](int64_t c, int count, V(&terms)[1]) {
      terms[0] = terms[0] + source(c, count);
    });
    result.mean = sum[0] / static_cast<S>(width);
  }
  sum_channels<1, S>(width, sum, [&](int64_t c, int count, V(&terms)[1]) {
    const V s = first_lanes(source(c, count) - result.mean, count);
    terms[0] = terms[0] + s * s;
  });
  result.rstd = S(1) / square_root(sum[0] / static_cast<S>(width) + static_cast<S>(eps));
  return result;
}

/// From the gradient g of normalized channels n to that of the channels.
template <class S>
struct NormGradient {
  S rstd, mean_g = 0, mean_ng = 0;

  /// terms(c, count, n, g): sets both, 0 in lanes from `count` on.
  template <class Terms>
  NormGradient(int64_t width, bool is_rms_norm, S rstd_, Terms terms) : rstd(rstd_) {
    using V = Vector<S>;
    S sums[2];
    sum_channels<2, S>(width, sums, [&](int64_t c, int count, V(&total)[2]) {
      V n, g;
      terms(c, count, n, g);
      total[0] = total[0] + first_lanes(n * g, count);
      total[1] = total[1] + g;
    });
    mean_ng = sums[0] / static_cast<S>(width);
    if (!is_rms_norm) mean_g = sums[1] / static_cast<S>(width);
  }

  Vector<S> operator()(Vector<S> n, Vector<S> g) const { return (g - mean_g - n * mean_ng) * rstd; }
};

/// The sums over a block of rows for one parameter.
template <class S>
class PartialSum {
  using V = Vector<S>;

 public:
  PartialSum(void* workspace, int64_t index, int64_t channels)
      : sums_(static_cast<S*>(workspace) + index * partial_pitch(channels)) {}

  void clear(int64_t channels) const {
    for (int64_t c = 0, pitch = partial_pitch(channels); c < pitch; ++c) sums_[c] = 0;
  }
  void add(int64_t c, int count, V terms) const {
    store(sums_ + c, load(sums_ + c) + first_lanes(terms, count));
  }

 private:
  S* sums_;
};

/// gradient[c] = the sum over all blocks, in order, for item i of the channels. Every block has
/// `parameters` partial sums, of which this is number `index`.
template <class S>
inline void reduce_partials(const void* workspace, int64_t blocks, int parameters, int index,
                            int64_t channels, int64_t item, const View<1>& gradient) {
  using V = Vector<S>;
  if (!gradient) return;
  const int64_t begin = item * kReduceChannels, rest = channels - begin;
  const Line<S> out = line<S>(gradient, begin);
  const int64_t pitch = partial_pitch(channels);
  const S* const first = static_cast<const S*>(workspace) + index * pitch + begin;
  for_vectors(rest < kReduceChannels ? rest : kReduceChannels, [&](int64_t c, int count) {
    V sum = {};
    for (int64_t block = 0; block < blocks; ++block) {
      sum = sum + load(first + block * parameters * pitch + c);
    }
    out.store(c, count, sum);
  });
}

}  // namespace mamba_ssm::kernels::MAMBA_SSM_ISA
