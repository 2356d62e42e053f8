// Arrays for the tests of kernels: any dtype, shape and strides, in memory whose other bytes are
// watched, and a comparison with a reference in double.
#pragma once

#include <kernels/cpu.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <complex>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

namespace mamba_ssm::kernels {

using Number = std::complex<double>;

inline size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    default:
      return 8;
  }
}

/// The 16-bit float nearest to x, ties to even, in a format of so many bits.
inline uint16_t encode16(double x, int mantissa_bits, int exponent_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int sign = std::signbit(x) ? 0x8000 : 0;
  const int infinity = ((1 << exponent_bits) - 1) << mantissa_bits;
  if (std::isnan(x)) return 0x7fff;
  if (std::isinf(x)) return static_cast<uint16_t>(sign | infinity);
  if (x == 0) return static_cast<uint16_t>(sign);
  const int exponent = std::max(std::ilogb(x), 1 - bias);
  const double places = std::nearbyint(std::ldexp(std::fabs(x), mantissa_bits - exponent));
  const int bits = static_cast<int>(places) + ((exponent + bias - 1) << mantissa_bits);
  return static_cast<uint16_t>(sign | std::min(bits, infinity));
}

inline double decode16(uint16_t bits, int mantissa_bits, int exponent_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int max_exponent = (1 << exponent_bits) - 1;
  const int exponent = (bits >> mantissa_bits) & max_exponent;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  double x = exponent == 0
                 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                 : std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  if (exponent == max_exponent) {
    x = mantissa != 0 ? std::numeric_limits<double>::quiet_NaN()
                      : std::numeric_limits<double>::infinity();
  }
  return (bits & 0x8000) != 0 ? -x : x;
}

inline double read_as(DType dtype, const unsigned char* bytes) {
  const auto as = [&](auto value) {
    std::memcpy(&value, bytes, sizeof(value));
    return value;
  };
  switch (dtype) {
    case DType::kFloat32:
      return as(float{});
    case DType::kFloat16:
      return decode16(as(uint16_t{}), 10, 5);
    case DType::kBFloat16:
      return decode16(as(uint16_t{}), 7, 8);
    case DType::kFloat64:
      return as(double{});
    case DType::kInt32:
      return as(int32_t{});
    default:
      return static_cast<double>(as(int64_t{}));
  }
}

inline void write_as(DType dtype, unsigned char* bytes, double x) {
  const auto as = [&](auto value) { std::memcpy(bytes, &value, sizeof(value)); };
  switch (dtype) {
    case DType::kFloat32:
      return as(static_cast<float>(x));
    case DType::kFloat16:
      return as(encode16(x, 10, 5));
    case DType::kBFloat16:
      return as(encode16(x, 7, 8));
    case DType::kFloat64:
      return as(x);
    case DType::kInt32:
      return as(static_cast<int32_t>(x));
    default:
      return as(static_cast<int64_t>(x));
  }
}

enum class Layout {
  kDense,       // row by row
  kTransposed,  // the last two axes change places in memory
  kSliced,      // a part of a larger array: every second element of longer rows
};

/// An array of real or complex numbers. Starts as bytes of poison, no better aligned than one
/// element, between two red zones; gaps that the strides leave are poison as well.
template <int kRank>
class Array {
 public:
  using Index = std::array<int64_t, kRank>;

  /// An absent argument.
  Array() = default;

  Array(DType dtype, const Index& shape, Layout layout = Layout::kDense, bool is_complex = false)
      : dtype_(dtype), shape_(shape), is_complex_(is_complex), present_(true) {
    std::array<int, kRank> order{};  // axes from the innermost outwards
    for (int i = 0; i < kRank; ++i) order[static_cast<size_t>(i)] = kRank - 1 - i;
    if constexpr (kRank > 1) {
      if (layout == Layout::kTransposed) std::swap(order[0], order[1]);
    }
    int64_t step = (is_complex ? 2 : 1) * (layout == Layout::kSliced ? 2 : 1);
    for (const int axis : order) {
      stride_[static_cast<size_t>(axis)] = step;
      step *= shape[static_cast<size_t>(axis)] + (layout == Layout::kSliced ? 1 : 0);
    }
    const size_t elements = static_cast<size_t>(std::max<int64_t>(step, 1));
    bytes_.assign(kRedZone + (elements + 1) * size_of(dtype) + kRedZone, kPoison);
    is_element_.assign(bytes_.size(), false);
    for_each([&](const Index& index) {
      for (int64_t part = 0; part < (is_complex_ ? 2 : 1); ++part) {
        const auto begin = is_element_.begin() + (address(index, part) - bytes_.data());
        std::fill_n(begin, size_of(dtype_), true);
      }
    });
  }

  explicit operator bool() const { return present_; }
  const Index& shape() const { return shape_; }

  View<kRank> view() {
    View<kRank> v;
    if (!present_) return v;
    v.data = address({}, 0);
    v.dtype = dtype_;
    std::copy(stride_.begin(), stride_.end(), v.stride);
    v.imag = is_complex_ ? 1 : 0;
    return v;
  }

  Number operator[](const Index& index) const {
    auto* self = const_cast<Array*>(this);
    return {read_as(dtype_, self->address(index, 0)),
            is_complex_ ? read_as(dtype_, self->address(index, 1)) : 0};
  }

  double real(const Index& index) const { return (*this)[index].real(); }

  void set(const Index& index, Number x) {
    write_as(dtype_, address(index, 0), x.real());
    if (is_complex_) write_as(dtype_, address(index, 1), x.imag());
  }

  void add(const Index& index, Number x) { set(index, (*this)[index] + x); }

  template <class F>
  void for_each(F f) const {
    int64_t count = 1;
    for (const int64_t extent : shape_) count *= extent;
    for (int64_t i = 0; i < count; ++i) {
      Index index{};
      int64_t rest = i;
      for (size_t axis = kRank; axis-- > 0; rest /= shape_[axis]) index[axis] = rest % shape_[axis];
      f(index);
    }
  }

  Array& fill(Number x) {
    for_each([&](const Index& index) { set(index, x); });
    return *this;
  }

  Array& randomize(std::mt19937_64& random, double low = -1, double high = 1) {
    const auto draw = [&] {
      return low + (high - low) * std::ldexp(static_cast<double>(random() >> 11), -53);
    };
    for_each([&](const Index& index) {
      const double re = draw();
      set(index, {re, is_complex_ ? draw() : 0});
    });
    return *this;
  }

  /// Whether every byte that is not of an element is as it was.
  bool red_zones_intact() const {
    for (size_t i = 0; i < bytes_.size(); ++i) {
      if (!is_element_[i] && bytes_[i] != kPoison) return false;
    }
    return true;
  }

  bool same_bytes(const Array& other) const { return bytes_ == other.bytes_; }

  /// Largest difference to `expected`, relative to the largest expected value or 1; infinite if a
  /// number is NaN.
  double error(const Array& expected) const {
    double scale = 1, largest = 0;
    expected.for_each([&](const Index& i) { scale = std::max(scale, std::abs(expected[i])); });
    for_each([&](const Index& i) {
      const double difference = std::abs((*this)[i] - expected[i]);
      largest = std::isnan(difference) ? std::numeric_limits<double>::infinity()
                                       : std::max(largest, difference);
    });
    return largest / scale;
  }

 private:
  static constexpr size_t kRedZone = 128;  // bytes; no vector is longer
  static constexpr unsigned char kPoison = 0xcb;

  unsigned char* address(const Index& index, int64_t part) {
    int64_t offset = 1 + part;  // one element off the allocation's alignment
    for (size_t axis = 0; axis < kRank; ++axis) offset += index[axis] * stride_[axis];
    return bytes_.data() + kRedZone + static_cast<size_t>(offset) * size_of(dtype_);
  }

  DType dtype_ = DType::kFloat32;
  Index shape_{};
  std::array<int64_t, kRank> stride_{};
  bool is_complex_ = false;
  bool present_ = false;
  std::vector<unsigned char> bytes_;
  std::vector<bool> is_element_;
};

/// What results of a dtype may differ from the reference: accumulated in float32, rounded once.
inline double tolerance(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return 1e-3;
    case DType::kBFloat16:
      return 8e-3;
    case DType::kFloat64:
      return 1e-12;
    default:
      return 1e-5;
  }
}

inline DType accumulate_type(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

/// The kernels of every instruction set of this machine.
inline std::vector<const CpuKernels*> tables() {
  int count = 0;
  const CpuKernels* const* first = all_cpu_kernels(&count);
  return {first, first + count};
}

/// Calls `run(begin, end)` for all items at once, or for each alone, last first, on several
/// threads.
template <class F>
void run_items(int64_t items, bool one_by_one, F run) {
  constexpr int64_t kThreads = 4;
  if (!one_by_one) return run(0, items);
  std::vector<std::thread> threads;
  for (int64_t last = items - 1; last >= std::max<int64_t>(items - kThreads, 0); --last) {
    threads.emplace_back([=] {
      for (int64_t i = last; i >= 0; i -= kThreads) run(i, i + 1);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

inline double silu(double x) { return x / (1 + std::exp(-x)); }

inline double silu_derivative(double x) {
  const double s = 1 / (1 + std::exp(-x));
  return s * (1 + x * (1 - s));
}

/// What packed sequences a row holds.
enum class Packing {
  kNone,    // no seq_idx
  kRuns,    // several sequences, ids in no order
  kPadded,  // with padding before, between and after them; the last row is nothing else
};

inline Array<2> make_seq_idx(Packing packing, DType dtype, int64_t batch, int64_t seqlen) {
  if (packing == Packing::kNone) return {};
  Array<2> ids(dtype, {batch, seqlen}, Layout::kTransposed);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = 0; t < seqlen; ++t) {
      const int64_t run = (t + b) / 5;
      double id = static_cast<double>((run * 7 + 3) % 101);
      const bool padding = t < 2 || t + 3 > seqlen || (t + b) % 5 == 4 || b + 1 == batch;
      if (packing == Packing::kPadded && padding) id = -1 - static_cast<double>(t % 3);
      ids.set({b, t}, id);
    }
  }
  return ids;
}

}  // namespace mamba_ssm::kernels
