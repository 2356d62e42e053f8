// Products of a few rows with a weight, whose reading is all the time that they take.
//
// Vectors: a team of threads owns kOutputs outputs of kRows rows; its threads take every threads-th
// vector of these rows of the weight, and their sums are added in a fixed order. A norm before the
// product costs no launch of its own: each block makes the operands again, and scales its sums at
// the end. What a thread reads first is on its way to the L2 cache before the kernel that makes x
// has ended. More than two rows without a norm go by tiles (decode_linear_tiles.cuh). Elements (any
// strides, any sizes): a warp owns a result. The order of a sum depends on which of these it is, on
// the weight's sizes and on the norm alone.
#include <cuda_runtime.h>
#include <mamba_ssm/limits.h>

#include <algorithm>

#include "decode_linear_tiles.cuh"
#include "launch.cuh"

namespace mamba_ssm::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
// Blocks of a multiprocessor: all that a small weight has, or what leaves registers for four
// outputs.
template <int kOutputs>
constexpr int kResident = kOutputs == 1 ? 4 : 3;

template <class T>
__device__ __forceinline__ void store_result(const DecodeLinearParams& p, int64_t row,
                                             int64_t output, Accumulate<T> sum) {
  static_cast<T*>(p.out.data)[row * p.out.stride[0] + output * p.out.stride[1]] =
      from_accumulate<T>(sum + parameter<Accumulate<T>>(p.bias, output));
}

/// What turns sums with s into sums with s / sqrt(mean(s^2) + eps).
template <class Acc>
__device__ __forceinline__ Acc norm_scale(const DecodeLinearParams& p, Acc squares) {
  if (!given(p.norm_weight) || p.in_features == 0) return Acc(1);
  return rsqrt(squares / static_cast<Acc>(p.in_features) + static_cast<Acc>(p.eps));
}

/// Sums over `lanes` neighboring lanes, a power of two of them.
template <int kCount>
__device__ __forceinline__ void add_lanes(float (&values)[kCount], int lanes) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    if (distance >= lanes) continue;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      values[k] += __shfl_xor_sync(kAllLanes, values[k], distance);
    }
  }
}

/// Sums over the threads of a team, a power of two of them; the first one gets them.
template <int kCount>
__device__ __forceinline__ void sum_over_team(float (&values)[kCount], int team) {
  add_lanes(values, team);
  if (team <= kWarpSize) return;
  __shared__ float shared[kWarps][kCount];
  const int warp = threadIdx.x / kWarpSize;
  if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) shared[warp][k] = values[k];
  }
  __syncthreads();
  if (threadIdx.x % team != 0) return;
  for (int w = 1; w < team / kWarpSize; ++w) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) values[k] += shared[warp + w][k];
  }
}

/// x (+ residual) of a row, kVec elements from `i` on.
template <class T, int kVec>
__device__ __forceinline__ void load_sum(const DecodeLinearParams& p, int64_t row, int i,
                                         float (&s)[kVec]) {
  Pack<T, kVec> x;
  x.load(static_cast<const T*>(p.x.data) + row * p.x.stride[0] + i);
#pragma unroll
  for (int e = 0; e < kVec; ++e) s[e] = x[e];
  if (!given(p.residual)) return;
  const int64_t from = row * p.residual.stride[0] + i;
  if (p.residual.dtype == DType::kFloat32) {
    ParameterBits<float, kVec> residual;
    residual.load_floats(static_cast<const float*>(p.residual.data) + from);
#pragma unroll
    for (int e = 0; e < kVec; ++e) s[e] += __uint_as_float(residual.word[e]);
  } else {
    Pack<T, kVec> residual;
    residual.load(static_cast<const T*>(p.residual.data) + from);
#pragma unroll
    for (int e = 0; e < kVec; ++e) s[e] += residual[e];
  }
}

/// s into a row of residual_out, from element `i` on.
template <class T, int kVec>
__device__ __forceinline__ void store_sum(const DecodeLinearParams& p, int64_t row, int i,
                                          const float (&s)[kVec]) {
  const int64_t to = row * p.residual_out.stride[0] + i;
  if (p.residual_out.dtype == DType::kFloat32) {
    float* const data = static_cast<float*>(p.residual_out.data) + to;
#pragma unroll
    for (int e = 0; e < kVec; e += 4) {
      *reinterpret_cast<float4*>(data + e) = make_float4(s[e], s[e + 1], s[e + 2], s[e + 3]);
    }
  } else {
    Pack<T, kVec> rounded;
    rounded.round(s);
    rounded.store(static_cast<T*>(p.residual_out.data) + to);
  }
}

/// Rows of the weight that a team multiplies with.
template <class T, int kOutputs, int kAtOnce>
class WeightRows {
 public:
  static constexpr int kVec = Vector<T>::kSize;

  __device__ __forceinline__ WeightRows(const DecodeLinearParams& p, int64_t output, int vectors,
                                        int team)
      : vectors_(vectors), team_(team) {
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) {  // past the last output: that one again
      rows_[k] = static_cast<const T*>(p.weight.data) +
                 min(output + k, p.out_features - 1) * p.weight.stride[0];
    }
  }
  __device__ __forceinline__ void prefetch(int thread) const {
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int v = thread + u * team_;
      if (v >= vectors_) break;
#pragma unroll
      for (int k = 0; k < kOutputs; ++k) prefetch_to_l2(rows_[k] + v * kVec);
    }
  }
  /// Vectors v, v + team, ...
  __device__ __forceinline__ void load(int v) {
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (v + u * team_ >= vectors_) continue;
#pragma unroll
      for (int k = 0; k < kOutputs; ++k) packs_[u][k].load(rows_[k] + (v + u * team_) * kVec);
    }
  }
  __device__ __forceinline__ const Pack<T, kVec>& operator()(int u, int output) const {
    return packs_[u][output];
  }

 private:
  const T* rows_[kOutputs];
  Pack<T, kVec> packs_[kAtOnce][kOutputs];
  int vectors_, team_;
};

template <class T, int kRows, int kOutputs>
__global__ void __launch_bounds__(kThreads)
    by_vectors(const DecodeLinearParams p, const int team, const int64_t first_row) {
  constexpr int kVec = Vector<T>::kSize;
  constexpr int kAtOnce = 4;
  const int thread = threadIdx.x % team;
  const int64_t output = (blockIdx.x * int64_t{kThreads / team} + threadIdx.x / team) * kOutputs;
  const int vectors = static_cast<int>(p.in_features / kVec);
  WeightRows<T, kOutputs, kAtOnce> weight(p, output, vectors, team);
  weight.prefetch(thread);
  let_next_start();
  wait_for_previous();

  const T* const x = static_cast<const T*>(p.x.data) + first_row * p.x.stride[0];
  float sums[kOutputs * kRows] = {};
  for (int v0 = thread; v0 < vectors; v0 += kAtOnce * team) {
    weight.load(v0);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int v = v0 + u * team;
      if (v >= vectors) continue;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (first_row + r >= p.rows) break;
        Pack<T, kVec> in;
        in.load(x + r * p.x.stride[0] + v * kVec);
#pragma unroll
        for (int e = 0; e < kVec; ++e) {
#pragma unroll
          for (int k = 0; k < kOutputs; ++k) sums[k * kRows + r] += in[e] * weight(u, k)[e];
        }
      }
    }
  }
  sum_over_team(sums, team);
  if (thread != 0) return;
#pragma unroll
  for (int k = 0; k < kOutputs; ++k) {
    if (output + k >= p.out_features) break;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first_row + r >= p.rows) break;
      store_result<T>(p, first_row + r, output + k, sums[k * kRows + r]);
    }
  }
}

/// One row, with norm_weight. The block makes the operands, up to the factor that their squares
/// give, while its first vectors of the weight are on their way.
template <class T, int kOutputs, int kAtOnce>
__global__ void __launch_bounds__(kThreads, kResident<kOutputs>)
    normed_by_vectors(const DecodeLinearParams p, const int team, const int64_t row) {
  constexpr int kVec = Vector<T>::kSize;
  extern __shared__ float4 operands[];
  __shared__ float squares_of_warp[kWarps];
  const int thread = threadIdx.x % team;
  const int64_t output = (blockIdx.x * int64_t{kThreads / team} + threadIdx.x / team) * kOutputs;
  const int vectors = static_cast<int>(p.in_features / kVec);
  WeightRows<T, kOutputs, kAtOnce> weight(p, output, vectors, team);
  weight.prefetch(thread);
  let_next_start();
  wait_for_previous();
  weight.load(thread);

  float squares[1] = {0};
  for (int v = threadIdx.x; v < vectors; v += kThreads) {
    const int i = v * kVec;
    float s[kVec];
    load_sum<T>(p, row, i, s);
    if (given(p.residual_out) && v % gridDim.x == blockIdx.x) store_sum<T>(p, row, i, s);
    ParameterBits<float, kVec> norm_weight;
    if (p.norm_weight.dtype == DType::kFloat32) {
      norm_weight.load_floats(static_cast<const float*>(p.norm_weight.data) + i);
    } else {
      norm_weight.load_halves(static_cast<const Half*>(p.norm_weight.data) + i);
    }
    if (given(p.z)) {
      Pack<T, kVec> z;
      z.load(static_cast<const T*>(p.z.data) + row * p.z.stride[0] + i);
#pragma unroll
      for (int e = 0; e < kVec; ++e) s[e] *= silu(z[e]);
    }
#pragma unroll
    for (int e = 0; e < kVec; ++e) {
      squares[0] += s[e] * s[e];
      s[e] *= norm_weight.value(p.norm_weight.dtype, e);
    }
#pragma unroll
    for (int e = 0; e < kVec; e += 4) {
      operands[(i + e) / 4] = make_float4(s[e], s[e + 1], s[e + 2], s[e + 3]);
    }
  }
  add_lanes(squares, kWarpSize);
  if (threadIdx.x % kWarpSize == 0) squares_of_warp[threadIdx.x / kWarpSize] = squares[0];
  __syncthreads();

  float sums[kOutputs] = {};
  for (int v0 = thread; v0 < vectors; v0 += kAtOnce * team) {
    if (v0 != thread) weight.load(v0);
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int v = v0 + u * team;
      if (v >= vectors) continue;
#pragma unroll
      for (int q = 0; q < kVec / 4; ++q) {
        const float4 four = operands[v * (kVec / 4) + q];
        const float in[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
#pragma unroll
          for (int k = 0; k < kOutputs; ++k) sums[k] += in[e] * weight(u, k)[4 * q + e];
        }
      }
    }
  }
  sum_over_team(sums, team);
  if (thread != 0) return;
  float all_squares = 0;
  for (int w = 0; w < kWarps; ++w) all_squares += squares_of_warp[w];
  const float scale = norm_scale(p, all_squares);
#pragma unroll
  for (int k = 0; k < kOutputs; ++k) {
    if (output + k < p.out_features) store_result<T>(p, row, output + k, sums[k] * scale);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) by_elements(const DecodeLinearParams p) {
  using Acc = Accumulate<T>;
  const int64_t result = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarpSize;
  const int64_t row = result % p.rows, output = result / p.rows;
  if (output >= p.out_features) return;
  const auto element = [&](const View<2>& v, int64_t i, int64_t j) {
    return load_as<Acc>(v.data, v.dtype, i * v.stride[0] + j * v.stride[1]);
  };
  Acc sums[2] = {};  // products, squares
  for (int64_t i = threadIdx.x % kWarpSize; i < p.in_features; i += kWarpSize) {
    Acc s = element(p.x, row, i);
    if (given(p.residual)) s += element(p.residual, row, i);
    if (given(p.residual_out) && output == 0) {
      store_as(p.residual_out.data, p.residual_out.dtype,
               row * p.residual_out.stride[0] + i * p.residual_out.stride[1], s);
    }
    if (given(p.z)) s *= silu(element(p.z, row, i));
    if (given(p.norm_weight)) {
      sums[1] += s * s;
      s *= parameter<Acc>(p.norm_weight, i);
    }
    sums[0] += s * element(p.weight, output, i);
  }
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    sums[0] += __shfl_xor_sync(kAllLanes, sums[0], distance);
    sums[1] += __shfl_xor_sync(kAllLanes, sums[1], distance);
  }
  if (threadIdx.x % kWarpSize == 0) {
    store_result<T>(p, row, output, sums[0] * norm_scale(p, sums[1]));
  }
}

/// Threads of a team: a warp or what the row has for it, and more where there are few outputs. It
/// depends on the weight alone, so that a row's sums do not depend on the others. double, which
/// never goes by vectors, does without.
[[maybe_unused]] int team_for(int64_t vectors, int64_t teams, int threads_per_sm) {
  const int64_t wanted = int64_t{multiprocessor_count()} * threads_per_sm;
  int team = 4;
  while (team < kThreads && team < vectors && (team < kWarpSize || team * teams < wanted)) {
    team *= 2;
  }
  return team;
}

template <class T>
bool is_by_vectors(const DecodeLinearParams& p) {
  const auto packed = [](const View<2>& v) {
    return !given(v) || (v.stride[1] == 1 && reinterpret_cast<uintptr_t>(v.data) % 16 == 0 &&
                         v.stride[0] % Vector<T>::kSize == 0);
  };
  return packed(p.x) && packed(p.residual) && packed(p.z) && packed(p.weight) &&
         p.in_features % Vector<T>::kSize == 0 && p.in_features <= INT32_MAX / 2 &&
         (!given(p.norm_weight) ||
          (p.in_features <= kDecodeLinearNormed && p.norm_weight.stride[0] == 1 &&
           reinterpret_cast<uintptr_t>(p.norm_weight.data) % 16 == 0));
}

template <class T>
void launch_plain(const DecodeLinearParams& p, cudaStream_t stream) {
  const int team = team_for(p.in_features / Vector<T>::kSize, p.out_features, 768);
  const auto launch = [&](auto rows, auto outputs, int64_t first_row) {
    const int64_t blocks = ceil_div(p.out_features, kThreads / team * outputs);
    launch_overlapped<by_vectors<T, rows, outputs>>(dim3(static_cast<unsigned>(blocks)), kThreads,
                                                    0, stream, p, team, first_row);
  };
  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, 2> two;
  const std::integral_constant<int, 4> four;
  for (int64_t row = 0; row < p.rows; row += 4) {
    const int64_t left = p.rows - row;
    if (left == 1) {
      launch(one, one, row);
    } else if (left == 2) {
      launch(two, one, row);
    } else {
      launch(four, two, row);
    }
  }
}

/// Outputs of a team are several where the weight is large, so that making the operands takes
/// little of a block's time.
template <class T>
void launch_normed(const DecodeLinearParams& p, cudaStream_t stream) {
  constexpr int64_t kLarge = 8 << 20;
  constexpr int kThreadsPerSm = 512, kMostTeam = 2 * kWarpSize;
  const int64_t vectors = p.in_features / Vector<T>::kSize;
  const auto launch = [&](auto outputs, auto at_once, int team, int64_t row) {
    const int64_t blocks = ceil_div(p.out_features, kThreads / team * outputs);
    launch_overlapped<normed_by_vectors<T, outputs, at_once>>(
        dim3(static_cast<unsigned>(blocks)), kThreads,
        static_cast<size_t>(p.in_features) * sizeof(float), stream, p, team, row);
  };
  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, 4> four;
  for (int64_t row = 0; row < p.rows; ++row) {
    if (p.in_features * p.out_features < kLarge) {
      const int team = team_for(vectors, p.out_features, kThreadsPerSm);
      launch(one, four, std::min(team, kMostTeam), row);
    } else {
      launch(four, one, team_for(vectors, p.out_features / four, kThreadsPerSm), row);
    }
  }
}

constexpr int kTileRows = 64;  // of a tile, at most

/// True if the current device multiplies by tiles.
template <class T>
bool has_tiles() {
  return can_overlap<by_tiles<T, kTileRows, 64, 1>>() && tensor_map_encoder() != nullptr;
}

/// More rows than by_vectors is good for. How a sum is split depends on the weight, and beyond
/// kTileRows on the number of rows. False where the copy engine cannot serve the call.
template <class T, int kOutputs>
bool try_tiles(const DecodeLinearParams& p, int64_t places, cudaStream_t stream) {
  const auto describe = [&](TensorMap& map, const View<2>& v, int64_t rows, int box_rows) {
    const View<4> view{v.data, v.dtype, {0, v.stride[0], 0, v.stride[1]}};
    return describe_tensor<T>(map, view, 1, rows, 1, p.in_features, box_rows, kPanel);
  };
  const int64_t tiles = ceil_div(p.out_features, kOutputs);
  const int64_t panels = ceil_div(p.in_features, kPanel);
  const auto launch = [&](auto rows, auto splits) {
    using Tiles = LinearTiles<T, rows, kOutputs, splits>;
    TensorMap weight, x;
    if (!describe(weight, p.weight, p.out_features, kOutputs) || !describe(x, p.x, p.rows, rows)) {
      return false;
    }
    const int stages = Tiles::stages(panels);
    const dim3 grid(static_cast<unsigned>(tiles), splits,
                    static_cast<unsigned>(ceil_div(p.rows, int64_t{rows})));
    launch_clusters_overlapped<by_tiles<T, rows, kOutputs, splits>>(
        grid, splits, Tiles::kThreads, Tiles::shared(stages), stream, p, weight, x, stages);
    return true;
  };
  const auto launch_rows = [&](auto rows) {
    const int64_t most_splits =
        std::min(places / (tiles * ceil_div(p.rows, int64_t{rows})), panels);
    if (most_splits >= 8) return launch(rows, std::integral_constant<int, 8>{});
    if (most_splits >= 4) return launch(rows, std::integral_constant<int, 4>{});
    if (most_splits >= 2) return launch(rows, std::integral_constant<int, 2>{});
    return launch(rows, std::integral_constant<int, 1>{});
  };
  if (p.rows <= 16) return launch_rows(std::integral_constant<int, 16>{});
  if (p.rows <= 32) return launch_rows(std::integral_constant<int, 32>{});
  return launch_rows(std::integral_constant<int, kTileRows>{});
}

/// A small weight in narrow tiles, whose sums have the shorter way through a cluster; a large one,
/// or more rows than one tile has, with more blocks on their way.
template <class T>
bool try_tiles(const DecodeLinearParams& p, cudaStream_t stream) {
  constexpr int64_t kFewRows = 2, kLarge = 4 << 20;
  constexpr int64_t kMostRows = int64_t{kTileRows} * 65535;  // of a grid's third axis
  if (p.rows <= kFewRows || p.rows > kMostRows || p.out_features > INT32_MAX / 2 ||
      given(p.norm_weight) || given(p.residual) || given(p.z) || !has_tiles<T>()) {
    return false;
  }
  const int64_t places = multiprocessor_count();
  return p.rows <= kTileRows && p.in_features * p.out_features < kLarge
             ? try_tiles<T, 32>(p, places, stream)
             : try_tiles<T, 64>(p, 2 * places, stream);
}

}  // namespace

template <class T>
CudaStatus launch_decode_linear(const DecodeLinearParams& p, CudaStream stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (p.rows == 0 || p.out_features == 0) return cudaSuccess;
  if constexpr (sizeof(T) <= 4) {
    if (is_by_vectors<T>(p)) {
      if constexpr (sizeof(T) == 2) {
        if (try_tiles<T>(p, stream)) return cudaGetLastError();
      }
      given(p.norm_weight) ? launch_normed<T>(p, stream) : launch_plain<T>(p, stream);
      return cudaGetLastError();
    }
  }
  const int64_t blocks = ceil_div(p.rows * p.out_features, kWarps);
  by_elements<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

template <class T>
int64_t decode_linear_tile_rows() {
  if constexpr (sizeof(T) == 2) {
    if (has_tiles<T>()) return kTileRows;
  }
  return 0;
}

template CudaStatus launch_decode_linear<MAMBA_SSM_ELEMENT>(const DecodeLinearParams&, CudaStream);
template int64_t decode_linear_tile_rows<MAMBA_SSM_ELEMENT>();

}  // namespace mamba_ssm::kernels
