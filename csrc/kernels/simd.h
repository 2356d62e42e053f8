// Vectors of the instruction set that the including file is compiled for.
//
// A CPU kernel file is compiled once per instruction set, with MAMBA_SSM_ISA naming the namespace
// that holds everything it defines, so that no code for a wider set can be linked into a narrower
// one. For the same reason these files use no templates of the standard library. The vectors are
// the compiler's own (GCC, Clang); the arithmetic is plain operators.
#pragma once

#include <cstdint>
#include <cstring>

#include "types.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define MAMBA_SSM_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define MAMBA_SSM_VECTOR_BYTES 32
#else
#define MAMBA_SSM_VECTOR_BYTES 16
#endif

namespace mamba_ssm::kernels::MAMBA_SSM_ISA {

constexpr int kLanes = MAMBA_SSM_VECTOR_BYTES / 4;  // float32 lanes of one vector

using VecF = float __attribute__((vector_size(MAMBA_SSM_VECTOR_BYTES)));
using VecI = int32_t __attribute__((vector_size(MAMBA_SSM_VECTOR_BYTES)));
// For sums that may wrap.
using VecU = uint32_t __attribute__((vector_size(MAMBA_SSM_VECTOR_BYTES)));

// Element types of activations. 16-bit ones are storage only: arithmetic is float32.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

/// Type that sums of T run in.
template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class T>
using Accumulate = typename AccumulateType<T>::type;

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float to_accumulate(float x) { return x; }
inline double to_accumulate(double x) { return x; }
inline float to_accumulate(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_accumulate(Half x) {
  // Shift exponent and mantissa into place, then rescale: a product with 2^112 is exact, and brings
  // denormals along; inf and NaN (exponent 31) get the float32 exponent by hand.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  float f = bit_cast<float>(magnitude) * 0x1p112f;
  if ((x.bits & 0x7c00) == 0x7c00) f = bit_cast<float>(magnitude | 0x7f800000u);
  return bit_cast<float>(bit_cast<uint32_t>(f) | (uint32_t(x.bits & 0x8000) << 16));
}

template <class T>
inline T from_accumulate(Accumulate<T> x);
template <>
inline float from_accumulate<float>(float x) {
  return x;
}
template <>
inline double from_accumulate<double>(double x) {
  return x;
}
template <>
inline BFloat16 from_accumulate<BFloat16>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>((u >> 16) | 0x40)};          // stay NaN
  return {static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)};  // nearest, ties to even
}
template <>
inline Half from_accumulate<Half>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to inf
  if (magnitude < 0x38800000u) {
    // Denormal result: adding 0.5 lines its last bit up with that of float32, which rounds.
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000u;
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

/// One element of a view whose type is known at run time only (parameters, states, indices).
template <class Acc>
inline Acc load_as(const void* data, DType dtype, int64_t offset) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<Acc>(static_cast<const float*>(data)[offset]);
    case DType::kFloat16:
      return static_cast<Acc>(to_accumulate(static_cast<const Half*>(data)[offset]));
    case DType::kBFloat16:
      return static_cast<Acc>(to_accumulate(static_cast<const BFloat16*>(data)[offset]));
    case DType::kFloat64:
      return static_cast<Acc>(static_cast<const double*>(data)[offset]);
    case DType::kInt32:
      return static_cast<Acc>(static_cast<const int32_t*>(data)[offset]);
    case DType::kInt64:
      return static_cast<Acc>(static_cast<const int64_t*>(data)[offset]);
  }
  return Acc(0);
}

template <class Acc>
inline void store_as(void* data, DType dtype, int64_t offset, Acc value) {
  switch (dtype) {
    case DType::kFloat32:
      static_cast<float*>(data)[offset] = static_cast<float>(value);
      return;
    case DType::kFloat16:
      static_cast<Half*>(data)[offset] = from_accumulate<Half>(static_cast<float>(value));
      return;
    case DType::kBFloat16:
      static_cast<BFloat16*>(data)[offset] = from_accumulate<BFloat16>(static_cast<float>(value));
      return;
    case DType::kFloat64:
      static_cast<double*>(data)[offset] = static_cast<double>(value);
      return;
    default:
      return;  // integers are never written
  }
}

inline VecF broadcast(float x) { return VecF{} + x; }

inline VecF load(const float* p) {
  VecF v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, VecF v) { std::memcpy(p, &v, sizeof(v)); }

/// condition ? a : b, lane by lane; the condition is a comparison of vectors.
inline VecF select(VecI condition, VecF a, VecF b) {
  return (VecF)((condition & (VecI)a) | (~condition & (VecI)b));
}

// libm does not vectorise, hence this: 2^x = 2^n p(f) with n the integer nearest to x, f = x - n.
// Adding kRounder rounds to an integer and leaves it in the low mantissa bits.
constexpr float kRounder = 0x1.8p23f;

/// 2^(n + f) for rounded = n + kRounder, |f| <= 0.5 and a normal result.
inline VecF exp2_parts(VecF rounded, VecF f) {
  // Minimax polynomial of 2^f on [-0.5, 0.5].
  VecF p = broadcast(1.5353362e-4f);
  p = p * f + 1.3398874e-3f;
  p = p * f + 9.6184373e-3f;
  p = p * f + 5.5503324e-2f;
  p = p * f + 2.4022648e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  const VecU n = (VecU)rounded << 23;  // exponent field; the bits of kRounder are shifted out
  return (VecF)((VecU)p + n);
}

/// 2^x with relative error below 1e-7 for x in [-126, 128); 0 below -126 (as denormals are
/// dropped), infinity from 128 up, NaN for NaN.
inline VecF exp2(VecF x) {
  const VecF clamped_low = select(x < -127.0f, broadcast(-127.0f), x);
  const VecF clamped = select(clamped_low > 128.0f, broadcast(128.0f), clamped_low);
  const VecF rounded = clamped + kRounder;
  const VecF result = exp2_parts(rounded, clamped - (rounded - kRounder));
  const VecF tiny_or_result = select(clamped < -126.0f, VecF{}, result);
  const VecF finite = select(clamped >= 128.0f, broadcast(__builtin_inff()), tiny_or_result);
  return select(x != x, x, finite);
}

constexpr float kLog2E = 1.44269504f;

inline VecF exp(VecF x) { return exp2(x * kLog2E); }
inline VecF sigmoid(VecF x) { return 1.0f / (1.0f + exp(-x)); }

/// 2^x for x in [-126, 127] and nothing else, in the fewest operations; relative error as exp2.
/// With n + j / kLanes the multiple of 1 / kLanes nearest to x, and f the rest,
/// 2^x = 2^n 2^(j / kLanes) 2^f: one permute looks the middle factor up, and 2^f needs few terms.
inline VecF exp2_bounded(VecF x) {
#if MAMBA_SSM_VECTOR_BYTES == 16
  const VecF rounded = x + kRounder;
  return exp2_parts(rounded, x - (rounded - kRounder));
#else
  constexpr float kLaneRounder = kRounder / kLanes;
  const VecF rounded = x + kLaneRounder;  // n kLanes + j in the low bits
  const VecF f = x - (rounded - kLaneRounder);
#if MAMBA_SSM_VECTOR_BYTES == 64
  // The bits of 2^(j / 16) less j << 19, which adding (n 16 + j) << 19 makes up for.
  const VecI table = {0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532,
                      0x3f75fed7, 0x3f75583f, 0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c,
                      0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
  // The form with a mask, since GCC warns of its own header in the one without.
  const VecI looked_up =
      (VecI)_mm512_maskz_permutexvar_epi32(0xffff, (__m512i)rounded, (__m512i)table);
  const VecF scale = (VecF)((VecU)looked_up + ((VecU)rounded << 19));
  const VecF p = (5.5505085e-2f * f + 2.4023430e-1f) * f + 6.9314718e-1f;
#else
  const VecI table = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                      0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
  const VecI looked_up = (VecI)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)rounded);
  const VecF scale = (VecF)((VecU)looked_up + ((VecU)rounded << 20));
  const VecF p = ((9.6187308e-3f * f + 5.5509317e-2f) * f + 2.4022651e-1f) * f + 6.9314718e-1f;
#endif
  return scale * f * p + scale;
#endif
}

/// exp(x) for x <= 0 with relative error of 1e-7 (that of exp above grows as 1e-7 |x|); 0 where the
/// result would be denormal; unspecified, but finite or NaN, for NaN.
inline VecF exp_negative(VecF x) {
  const VecF rounded = x * kLog2E + kRounder;
  const VecF n = rounded - kRounder;
  // n ln 2 in two parts, the first of 10 bits: its products are exact.
  const VecF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  return select(x < -87.33654f, VecF{}, exp2_parts(rounded, r * kLog2E));
}

inline VecF negative_abs(VecF x) { return (VecF)((VecI)x | INT32_MIN); }

/// log1p(exp(x)) where x <= 20, x above, with a small relative error at any x:
/// log1p(exp(x)) = max(x, 0) + log1p(w), w = exp(-|x|).
inline VecF softplus(VecF x) {
  const VecF w = exp_negative(negative_abs(x));
  // Minimax polynomial of log1p(w) / w on [0, 1].
  VecF p = broadcast(-3.24401191e-3f);
  p = p * w + 1.98514005e-2f;
  p = p * w - 5.69594133e-2f;
  p = p * w + 1.06036420e-1f;
  p = p * w - 1.53055845e-1f;
  p = p * w + 1.96759363e-1f;
  p = p * w - 2.49541330e-1f;
  p = p * w + 3.33299623e-1f;
  p = p * w - 4.99999024e-1f;
  p = p * w + 1.0f;
  return select(x > 20.0f, x, w * p + select(x < 0.0f, VecF{}, x));  // NaN is not below 0
}

// kLanes elements of any activation type of 32 bits or less, widened to float32 and rounded back.
using VecU16 = uint16_t __attribute__((vector_size(MAMBA_SSM_VECTOR_BYTES / 2)));

inline VecU load_bits(const void* p) {
  VecU16 bits;
  std::memcpy(&bits, p, sizeof(bits));
  return __builtin_convertvector(bits, VecU);
}
inline void store_bits(void* p, VecU v) {
  const VecU16 bits = __builtin_convertvector(v, VecU16);
  std::memcpy(p, &bits, sizeof(bits));
}

inline VecF load(const BFloat16* p) { return (VecF)(load_bits(p) << 16); }
inline void store(BFloat16* p, VecF v) {  // as from_accumulate<BFloat16>
  const VecU u = (VecU)v;
  const VecU nan = (u >> 16) | 0x40;
  const VecU nearest = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  store_bits(p, (VecU)select(v != v, (VecF)nan, (VecF)nearest));
}

inline VecF load(const Half* p) {  // as to_accumulate(Half)
  const VecU bits = load_bits(p);
  const VecU magnitude = (bits & 0x7fff) << 13;
  const VecI special = (VecI)((bits & 0x7c00) == 0x7c00);  // infinity, NaN
  const VecF f = select(special, (VecF)(magnitude | 0x7f800000u), (VecF)magnitude * 0x1p112f);
  return (VecF)((VecU)f | ((bits & 0x8000) << 16));
}
inline void store(Half* p, VecF v) {  // as from_accumulate<Half>
  const VecU u = (VecU)v;
  const VecU magnitude = u & 0x7fffffffu;
  const VecU rounded = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000u) >> 13;
  const VecU denormal = (VecU)((VecF)magnitude + 0.5f) - 0x3f000000u;
  VecF half = select((VecI)(magnitude < 0x38800000u), (VecF)denormal, (VecF)rounded);
  half = select((VecI)(magnitude >= 0x477ff000u), (VecF)(VecU{} + 0x7c00), half);
  half = select((VecI)(magnitude > 0x7f800000u), (VecF)(VecU{} + 0x7e00), half);
  store_bits(p, (VecU)half | ((u >> 16) & 0x8000));
}

/// a0 b0 a1 b1 ...: the lower halves (low) or the upper halves (high) of two vectors, interleaved.
#if MAMBA_SSM_VECTOR_BYTES == 64
inline VecF zip_low(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline VecF zip_high(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
}
#elif MAMBA_SSM_VECTOR_BYTES == 32
inline VecF zip_low(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
inline VecF zip_high(VecF a, VecF b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
#else
inline VecF zip_low(VecF a, VecF b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline VecF zip_high(VecF a, VecF b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif

// A zip of rows i and i + kLanes / 2 into rows 2 i and 2 i + 1 rotates the bits of (row, lane) left
// by one; after log2(kLanes) of them row and lane have changed places.

/// rows[i][j] <-> rows[j][i]
inline void transpose(VecF (&rows)[kLanes]) {
  for (int step = 1; step < kLanes; step *= 2) {
    VecF zipped[kLanes];
    for (int i = 0; i < kLanes / 2; ++i) {
      zipped[2 * i] = zip_low(rows[i], rows[i + kLanes / 2]);
      zipped[2 * i + 1] = zip_high(rows[i], rows[i + kLanes / 2]);
    }
    for (int i = 0; i < kLanes; ++i) rows[i] = zipped[i];
  }
}

/// Lane i of the result is the sum over the lanes of rows[i]; rows is scratch afterwards.
inline VecF sum_lanes(VecF (&rows)[kLanes]) {
  for (int count = kLanes / 2; count > 0; count /= 2) {
    for (int i = 0; i < count; ++i) {
      rows[i] = zip_low(rows[i], rows[i + count]) + zip_high(rows[i], rows[i + count]);
    }
  }
  return rows[0];
}

/// exp(x) with relative error of 1e-7 at any x (that of exp above grows as 1e-7 |x|); 0 where the
/// result would be denormal.
inline VecF exp_precise(VecF x) {
  const VecF clamped = select(x > 88.8f, broadcast(88.8f), x);
  const VecF rounded = clamped * kLog2E + kRounder;
  const VecF n = rounded - kRounder;
  const VecF r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // as in exp_negative
  const VecF result = select(x < -87.33654f, VecF{}, exp2_parts(rounded, r * kLog2E));
  const VecF finite = select(x > 88.722835f, broadcast(__builtin_inff()), result);
  return select(x != x, x, finite);
}

/// x sigmoid(x), and its derivative sigmoid(x) (1 + x sigmoid(-x)), with a small relative error of
/// either sigmoid at any x.
inline VecF silu(VecF x) {
  const VecF w = exp_negative(negative_abs(x));
  return select(x < 0.0f, x * w, x) / (1.0f + w);
}
inline VecF silu_slope(VecF x) {
  const VecF w = exp_negative(negative_abs(x));
  const VecF large = 1.0f / (1.0f + w);  // sigmoid(|x|)
  const VecF small = w * large;          // sigmoid(-|x|)
  return select(x < 0.0f, small, large) * (1.0f + x * select(x < 0.0f, large, small));
}

// float64: vectors of as many lanes, for code that serves both. Functions are libm's, lane by lane.
using VecD = double __attribute__((vector_size(2 * MAMBA_SSM_VECTOR_BYTES)));

template <class S>
struct VectorOf {
  using type = VecF;
};
template <>
struct VectorOf<double> {
  using type = VecD;
};
/// kLanes values of S, float or double.
template <class S>
using Vector = typename VectorOf<S>::type;

inline VecD load(const double* p) {
  VecD v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(double* p, VecD v) { std::memcpy(p, &v, sizeof(v)); }

inline VecD exp_precise(VecD x) {
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
inline VecD softplus(VecD x) {
  for (int i = 0; i < kLanes; ++i) x[i] = x[i] > 20 ? x[i] : __builtin_log1p(__builtin_exp(x[i]));
  return x;
}
inline VecD silu(VecD x) { return x / (1.0 + exp_precise(-x)); }
inline VecD silu_slope(VecD x) {
  const VecD s = 1.0 / (1.0 + exp_precise(-x));
  return s * (1.0 + x * (1.0 - s));
}
/// Lane i of the result is the sum over the lanes of rows[i].
inline VecD sum_lanes(VecD (&rows)[kLanes]) {
  VecD sums = {};
  for (int i = 0; i < kLanes; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) sums[i] += rows[i][lane];
  }
  return sums;
}

}  // namespace mamba_ssm::kernels::MAMBA_SSM_ISA
