// What the CUDA kernels of the norms share: teams of threads that own rows, their sums, rows on
// their way through shared memory, and the addition of partial gradients.
//
// A team owns one group of channels of every strips-th row and walks down those rows. Vectors: a
// thread owns the same few vectors of every row. In a forward a team has one row, all of it in
// registers: blocks that come and go keep the memory busier than teams that walk. A backward walks,
// since it adds over rows; its next row is on its way while it works on this one, and a thread
// reads only what it copied itself, so that teams meet nowhere but in their sums.
// Elements (any strides, any width): a thread takes every threads-th channel, and each pass reads
// its inputs again, from the cache.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <type_traits>

#include "device.cuh"
#include "row_norm.h"

namespace mamba_ssm::kernels {

/// How a launch divides its rows.
struct RowTeams {
  int threads;     // of a team: a power of two up to a warp, or the block
  int block;       // threads of a block
  int64_t groups;  // of channels of a row
  int64_t strips;  // teams for each group; at most the rows

  int64_t blocks() const { return ceil_div(groups * strips * threads, block); }
};

/// The team of a thread.
struct Team {
  int thread, threads;
  unsigned lanes;  // of its warp
  unsigned group, strip, strips;
  bool works;  // false behind the last team, which is nobody's business but its own

  __device__ __forceinline__ explicit Team(const RowTeams& teams)
      : threads(teams.threads), strips(static_cast<unsigned>(teams.strips)) {
    unsigned index = blockIdx.x;
    if (threads == teams.block) {
      thread = static_cast<int>(threadIdx.x);
      lanes = kAllLanes;
    } else {  // powers of two: shifts instead of divisions
      const int bits = 31 - __clz(threads), block_bits = 31 - __clz(teams.block);
      thread = static_cast<int>(threadIdx.x) & (threads - 1);
      const int lane = threadIdx.x % kWarpSize;
      lanes = threads >= kWarpSize ? kAllLanes : ((1u << threads) - 1) << (lane - thread);
      index = (index << (block_bits - bits)) + (threadIdx.x >> bits);
    }
    const unsigned groups = static_cast<unsigned>(teams.groups);
    group = groups == 1 ? 0 : index % groups;
    strip = groups == 1 ? index : index / groups;
    works = strip < strips;
  }
};

/// Sums over the threads of a team, in a fixed order; every thread gets them.
template <class Acc>
class TeamSum {
 public:
  static constexpr int kMost = 3;  // values at a time
  /// Used in turn, so that one barrier for each sum is enough.
  using Buffers = Acc[2][kMost][kWarpSize];

  __device__ TeamSum(const Team& team, Buffers& buffers) : team_(team), buffers_(buffers) {}

  template <int kCount>
  __device__ __forceinline__ void operator()(Acc (&values)[kCount]) {
    static_assert(kCount <= kMost);
    if (team_.threads < kWarpSize) {
      for (int distance = team_.threads / 2; distance > 0; distance /= 2) {
        add_lanes(values, team_.lanes, distance);
      }
      return;
    }
    add_warp(values);
    if (team_.threads == kWarpSize) return;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    if (lane == 0) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) buffers_[turn_][k][warp] = values[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      values[k] = lane < team_.threads / kWarpSize ? buffers_[turn_][k][lane] : Acc(0);
    }
    add_warp(values);
    turn_ ^= 1;
  }

 private:
  template <int kCount>
  __device__ __forceinline__ static void add_lanes(Acc (&values)[kCount], unsigned lanes,
                                                   int distance) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) values[k] += __shfl_xor_sync(lanes, values[k], distance);
  }
  template <int kCount>
  __device__ __forceinline__ static void add_warp(Acc (&values)[kCount]) {
#pragma unroll
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
      add_lanes(values, kAllLanes, distance);
    }
  }

  const Team& team_;
  Buffers& buffers_;
  int turn_ = 0;
};

/// Where a row stands along the three merged axes. Index: what counts rows.
template <class Index>
struct RowIndex {
  Index i, j, k;
  bool one_axis;

  __device__ __forceinline__ RowIndex(const RowAxes& axes, Index row)
      : i(0), j(0), k(row), one_axis(axes.size[0] == 1 && axes.size[1] == 1) {
    if (one_axis) return;
    k = row % static_cast<Index>(axes.size[2]);
    const Index above = row / static_cast<Index>(axes.size[2]);
    j = above % static_cast<Index>(axes.size[1]);
    i = above / static_cast<Index>(axes.size[1]);
  }
  /// The element of `v` at a channel of the row.
  __device__ __forceinline__ int64_t operator()(const View<4>& v, int64_t channel) const {
    return start(v) + channel * v.stride[3];
  }
  /// The row's first element.
  __device__ __forceinline__ int64_t start(const View<4>& v) const {
    const int64_t last = static_cast<int64_t>(k) * v.stride[2];
    if (one_axis) return last;
    return static_cast<int64_t>(i) * v.stride[0] + static_cast<int64_t>(j) * v.stride[1] + last;
  }
};

/// Where a thread finds its part of the rows of a tensor with channels side by side.
template <class T>
class RowPart {
 public:
  __device__ __forceinline__ RowPart(const View<4>& view, int64_t channel)
      : view_(view), first_(static_cast<T*>(view.data) + channel) {}
  __device__ __forceinline__ T* operator()(const RowIndex<unsigned>& at) const {
    return first_ + at.start(view_);
  }

 private:
  const View<4>& view_;
  T* first_;
};

template <class T>
__device__ __forceinline__ Accumulate<T> element(const View<4>& v, int64_t offset) {
  return to_accumulate(static_cast<const T*>(v.data)[offset]);
}

/// Means over the channels of a group.
template <class Acc>
struct GroupMeans {
  Acc per_channel, eps;

  __device__ __forceinline__ GroupMeans(int64_t count, double eps)
      : per_channel(Acc(1) / static_cast<Acc>(count)), eps(static_cast<Acc>(eps)) {}

  __device__ __forceinline__ Acc mean(Acc sum) const { return sum * per_channel; }
  /// 1 / sqrt(mean + eps)
  __device__ __forceinline__ Acc reciprocal_root(Acc sum) const { return rsqrt(mean(sum) + eps); }
};

/// From the gradient g of a normalized channel n to that of the channel.
template <class Acc>
struct NormGradient {
  Acc rstd, mean_g, mean_ng;

  /// Sums over the group, d = s - mean: of d^2, of d g, and of g, left out for is_rms_norm.
  __device__ __forceinline__ NormGradient(const GroupMeans<Acc>& group, Acc sum_dd, Acc sum_dg,
                                          Acc sum_g)
      : rstd(group.reciprocal_root(sum_dd)),
        mean_g(group.mean(sum_g)),
        mean_ng(rstd * group.mean(sum_dg)) {}

  __device__ __forceinline__ Acc operator()(Acc n, Acc g) const {
    return (g - mean_g - n * mean_ng) * rstd;
  }
};

// ---- Rows as vectors, in registers

/// Vectors of a parameter.
template <int kVec>
class VectorParameter {
 public:
  __device__ __forceinline__ explicit VectorParameter(const View<1>& view)
      : view_(view),
        plain_(view.stride[0] == 1 && reinterpret_cast<uintptr_t>(view.data) % 16 == 0) {}

  /// kVec elements as they stand in memory, from a multiple of kVec on.
  __device__ __forceinline__ ParameterBits<float, kVec> load(int64_t channel) const {
    ParameterBits<float, kVec> bits;
    if (!plain_) {
      bits.load(view_.data, view_.dtype, channel * view_.stride[0], view_.stride[0]);
    } else if (view_.dtype == DType::kFloat32) {
      bits.load_floats(static_cast<const float*>(view_.data) + channel);
    } else {
      bits.load_halves(static_cast<const Half*>(view_.data) + channel);
    }
    return bits;
  }
  __device__ __forceinline__ void values(const ParameterBits<float, kVec>& bits,
                                         float (&v)[kVec]) const {
    bits.values(view_.dtype, v);
  }

 private:
  const View<1>& view_;
  bool plain_;
};

/// Rounds a vector and stores it.
template <class T, int kVec>
__device__ __forceinline__ void store_rounded(T* to, const float (&v)[kVec]) {
  Pack<T, kVec> pack;
  pack.round(v);
  pack.store(to);
}

/// Subtracts the mean of the channels that are there, and leaves 0 elsewhere.
template <int kVectors, int kVec, class There>
__device__ __forceinline__ void subtract_mean(float (&s)[kVectors][kVec], TeamSum<float>& sum,
                                              const GroupMeans<float>& group, const There& there) {
  float mean[1] = {0};
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) mean[0] += s[j][e];
  }
  sum(mean);
  mean[0] = group.mean(mean[0]);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (!there(j)) continue;
#pragma unroll
    for (int e = 0; e < kVec; ++e) s[j][e] -= mean[0];
  }
}

/// 1 / sqrt(mean of the squares + eps)
template <int kVectors, int kVec>
__device__ __forceinline__ float reciprocal_rms(const float (&s)[kVectors][kVec],
                                                TeamSum<float>& sum,
                                                const GroupMeans<float>& group) {
  float square[1] = {0};
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
#pragma unroll
    for (int e = 0; e < kVec; ++e) square[0] += s[j][e] * s[j][e];
  }
  sum(square);
  return group.reciprocal_root(square[0]);
}

/// Adds kVec elements of a bias, which may be absent, from a channel on.
template <int kVec>
__device__ __forceinline__ void add_bias(float (&s)[kVec], const View<1>& bias, int64_t channel) {
  if (!given(bias)) return;
  const VectorParameter<kVec> parameter(bias);
  float b[kVec];
  parameter.values(parameter.load(channel), b);
#pragma unroll
  for (int e = 0; e < kVec; ++e) s[e] += b[e];
}

// ---- Rows as vectors, through shared memory

/// Slots of 16 bytes that a thread has in shared memory, next to those of the other threads.
class Slots {
 public:
  __device__ explicit Slots(uint4* shared) : mine_(shared + threadIdx.x) {}
  __device__ __forceinline__ uint4& operator[](int i) const { return mine_[i * blockDim.x]; }
  /// What is in a slot, as elements of T.
  template <class T>
  __device__ __forceinline__ Pack<T, Vector<T>::kSize>& pack(int i) const {
    return reinterpret_cast<Pack<T, Vector<T>::kSize>&>((*this)[i]);
  }

 private:
  uint4* mine_;
};

/// A tensor whose rows come in vectors of Vector<T>::kSize elements, of T or, wider, of float.
template <class T>
struct RowStream {
  static constexpr int kVec = Vector<T>::kSize;
  const View<4>& view;

  /// 16-byte slots of a vector.
  __host__ __device__ static int slots(const View<4>& v) {
    if (!given(v)) return 0;
    return sizeof(T) == 2 && v.dtype == DType::kFloat32 ? 2 : 1;
  }
  __device__ __forceinline__ bool wide() const {
    return sizeof(T) == 2 && view.dtype == DType::kFloat32;
  }

  __device__ __forceinline__ void fetch(const Slots& slots, int slot, int64_t offset) const {
    if (wide()) {
      const float* const data = static_cast<const float*>(view.data) + offset;
      copy_async(reinterpret_cast<Pack<float, 4>*>(&slots[slot]), data);
      copy_async(reinterpret_cast<Pack<float, 4>*>(&slots[slot + 1]), data + 4);
    } else {
      copy_async(&slots.pack<T>(slot), static_cast<const T*>(view.data) + offset);
    }
  }

  __device__ __forceinline__ void read(const Slots& slots, int slot, float (&v)[kVec]) const {
    if (wide()) {
#pragma unroll
      for (int e = 0; e < kVec; e += 4) {
        const auto pack = *reinterpret_cast<const Pack<float, 4>*>(&slots[slot + e / 4]);
#pragma unroll
        for (int i = 0; i < 4; ++i) v[e + i] = pack[i];
      }
    } else {
      const Pack<T, kVec> narrow = slots.pack<T>(slot);
#pragma unroll
      for (int e = 0; e < kVec; ++e) v[e] = narrow[e];
    }
  }

  __device__ __forceinline__ void write(int64_t offset, const float (&v)[kVec]) const {
    if (wide()) {
      float* const data = static_cast<float*>(view.data) + offset;
#pragma unroll
      for (int e = 0; e < kVec; e += 4) {
        *reinterpret_cast<float4*>(data + e) = make_float4(v[e], v[e + 1], v[e + 2], v[e + 3]);
      }
    } else {
      store_rounded(static_cast<T*>(view.data) + offset, v);
    }
  }
};

/// Elements of a parameter, or sums for its gradient, that belong to the vectors of a thread: kept
/// as float in its slots.
template <int kVec>
struct SharedParameter {
  static constexpr int kSlots = kVec / 4;  // of a vector

  __device__ __forceinline__ static void keep(const Slots& slots, int slot, const View<1>& v,
                                              int64_t channel) {
    const auto bits = VectorParameter<kVec>(v).load(channel);
#pragma unroll
    for (int e = 0; e < kVec; e += 4) {
      slots[slot + e / 4] = make_uint4(
          __float_as_uint(bits.value(v.dtype, e)), __float_as_uint(bits.value(v.dtype, e + 1)),
          __float_as_uint(bits.value(v.dtype, e + 2)), __float_as_uint(bits.value(v.dtype, e + 3)));
    }
  }
  __device__ __forceinline__ static void clear(const Slots& slots, int slot) {
#pragma unroll
    for (int q = 0; q < kSlots; ++q) slots[slot + q] = make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ static void add(const Slots& slots, int slot, const float (&v)[4]) {
    float4& sums = reinterpret_cast<float4&>(slots[slot]);
    sums = make_float4(sums.x + v[0], sums.y + v[1], sums.z + v[2], sums.w + v[3]);
  }
  /// Four elements, as a slot holds them.
  __device__ __forceinline__ static const Pack<float, 4> read(const Slots& slots, int slot) {
    return *reinterpret_cast<const Pack<float, 4>*>(&slots[slot]);
  }
};

/// Stages of a ring of rows: one in work, one on its way.
constexpr int kStages = 2;

/// True if the rows of a tensor, absent ones included, are vectors.
template <class T>
bool rows_are_vectors(const View<4>& v) {
  const int64_t size = v.dtype == DType::kFloat32 ? 4 : Vector<T>::kSize;
  return !given(v) ||
         (reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && v.stride[3] == 1 &&
          v.stride[0] % size == 0 && v.stride[1] % size == 0 && v.stride[2] % size == 0);
}

// ---- Launches

/// A launch: vectors of each thread (0: by elements), its teams, bytes of dynamic shared memory.
struct RowPlan {
  int vectors;
  RowTeams teams;
  size_t shared;
};

/// Bytes of shared memory of a block that are the runtime's and the sums'.
constexpr int64_t kReservedShared = 2048;

/// Fills the multiprocessors with about so many threads each; 0: a team for each row.
inline void place_teams(RowPlan& plan, int64_t rows, int threads_resident) {
  plan.teams.strips = rows;
  if (threads_resident == 0) return;
  int64_t resident = std::max(threads_resident / plan.teams.block, 1);
  if (plan.shared > 0) {
    const int64_t fit = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) /
                        (static_cast<int64_t>(plan.shared) + kReservedShared);
    resident = std::clamp<int64_t>(fit, 1, resident);
  }
  const int64_t places =
      multiprocessor_count() * resident * (plan.teams.block / plan.teams.threads);
  plan.teams.strips = std::min(rows, std::max<int64_t>(places / plan.teams.groups, 1));
}

/// Elements of a row that a thread of a kernel by vectors has, the best first, with how many
/// threads in a team at most, and resident on a multiprocessor (0: a team for each row): what its
/// registers allow.
struct RowShare {
  int elements, team, resident;
};
using RowShares = RowShare[3];

/// The launch bound of a kernel for T with kVectors.
template <class T, int kVectors>
constexpr int largest_team(const RowShares& shares) {
  for (const RowShare& share : shares) {
    if (share.elements == kVectors * Vector<T>::kSize) return share.team;
  }
  return 0;
}

/// `rows` of `groups` groups of `width` channels. `vectors`: whether all tensors allow them;
/// `slots`: what a thread keeps in shared memory for each of its vectors.
template <class T>
RowPlan plan_rows(int64_t rows, int64_t groups, int64_t width, bool vectors, int slots,
                  const RowShares& shares) {
  constexpr int kVec = Vector<T>::kSize;
  constexpr int kSmallBlock = 128;
  RowPlan best{};
  // The kernels by vectors count teams in 32 bits.
  if (vectors && width % kVec == 0 && rows * groups <= std::numeric_limits<int32_t>::max()) {
    double best_use = 0;
    int resident = 0;
    RowShares order;
    std::copy(std::begin(shares), std::end(shares), order);
    if (rows * groups <= multiprocessor_count()) {  // a row's latency counts: more threads for it
      std::sort(std::begin(order), std::end(order),
                [](const RowShare& a, const RowShare& b) { return a.elements < b.elements; });
    }
    for (const RowShare& share : order) {
      const int64_t per_thread = share.elements / kVec;
      int64_t threads = ceil_div(width / kVec, per_thread);
      if (threads <= kWarpSize) {
        int64_t power = 1;
        while (power < threads) power *= 2;
        threads = power;
      } else {
        threads = ceil_div(threads, kWarpSize) * kWarpSize;
      }
      if (threads > share.team) continue;
      const double use = static_cast<double>(width / kVec) / (threads * per_thread);
      if (use <= best_use) continue;
      RowPlan plan{};
      plan.vectors = static_cast<int>(per_thread);
      plan.teams.threads = static_cast<int>(threads);
      plan.teams.block = threads <= kWarpSize ? kSmallBlock : static_cast<int>(threads);
      plan.teams.groups = groups;
      plan.shared = static_cast<size_t>(per_thread * slots * plan.teams.block) * sizeof(uint4);
      if (static_cast<int64_t>(plan.shared) + kReservedShared >
          device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) {
        continue;
      }
      best = plan;
      best_use = use;
      resident = share.resident;
    }
    if (best_use > 0) {
      place_teams(best, rows, resident);
      return best;
    }
  }
  constexpr int kBlock = 256;
  best.teams.threads = width <= 32 * kWarpSize ? kWarpSize : kBlock;
  best.teams.block = kBlock;
  best.teams.groups = groups;
  place_teams(best, rows, 4 * kBlock);
  return best;
}

/// A kernel without dynamic shared memory that waits for what is before it.
template <auto kKernel, class Params>
void launch_rows_overlapped(const RowPlan& plan, cudaStream_t stream, const Params& p) {
  launch_overlapped<kKernel>(dim3(static_cast<unsigned>(plan.teams.blocks())), plan.teams.block, 0,
                             stream, p, plan.teams);
}

template <class Kernel, class... Arguments>
void launch_rows(Kernel kernel, const RowPlan& plan, cudaStream_t stream,
                 const Arguments&... arguments) {
  launch_shared(kernel, plan.teams.blocks(), plan.teams.block, plan.shared, stream, arguments...);
}

/// Calls f(std::integral_constant) with the vectors of a thread.
template <class T, class F>
void for_vectors(int vectors, F f) {
  constexpr int kSmallest = 8 / Vector<T>::kSize;
  switch (vectors / kSmallest) {
    case 1:
      return f(std::integral_constant<int, kSmallest>{});
    case 2:
      return f(std::integral_constant<int, 2 * kSmallest>{});
    case 4:
      return f(std::integral_constant<int, 4 * kSmallest>{});
  }
}

// ---- Gradients of parameters

/// Partial sums of kParameters parameters: (strips, kParameters, channels).
template <int kParameters>
struct ParameterGradients {
  View<1> view[kParameters];
  int64_t channels, strips;
};

constexpr int kReduceThreads = 1024;

/// A block adds the partial sums of 32 channels of one parameter: each warp every 32nd of them,
/// then the sums of the warps, in order.
template <class Acc, int kParameters>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_partials(const ParameterGradients<kParameters> gradients, const Acc* partials) {
  constexpr int kWarps = kReduceThreads / kWarpSize;
  __shared__ Acc shared[kWarps][kWarpSize];
  View<1> gradient = gradients.view[0];
#pragma unroll
  for (int k = 1; k < kParameters; ++k) {
    if (blockIdx.y == k) gradient = gradients.view[k];
  }
  if (!given(gradient)) return;
  wait_for_previous();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t channels = gradients.channels;
  const int64_t channel = blockIdx.x * int64_t{kWarpSize} + lane;
  Acc sum = 0;
  if (channel < channels) {
    const Acc* const column = partials + blockIdx.y * channels + channel;
#pragma unroll 8
    for (int64_t strip = warp; strip < gradients.strips; strip += kWarps) {
      sum += column[strip * kParameters * channels];
    }
  }
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || channel >= channels) return;
  for (int w = 1; w < kWarps; ++w) sum += shared[w][lane];
  store_as(gradient.data, gradient.dtype, channel * gradient.stride[0], sum);
}

/// Its start overlaps with the end of the kernel that writes the partial sums.
template <class Acc, int kParameters>
void launch_reduce(const ParameterGradients<kParameters>& gradients, const void* workspace,
                   cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(ceil_div(gradients.channels, kWarpSize)), kParameters);
  launch_overlapped<reduce_partials<Acc, kParameters>>(blocks, kReduceThreads, 0, stream, gradients,
                                                       static_cast<const Acc*>(workspace));
}

}  // namespace mamba_ssm::kernels
