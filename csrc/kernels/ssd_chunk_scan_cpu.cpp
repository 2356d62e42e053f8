// SSD chunk scan on CPU, forward and backward.
//
// Every product of a chunk is a small matrix product, done by one register tile (Tile): rows are
// broadcast numbers, columns are vectors. A chunk is a list of tokens that are not padding, all
// from one sequence; a token that resets the state starts a chunk, so that what was before it takes
// no part in any arithmetic. What a chunk reads is converted to dense matrices first: tokens by
// headdim (x, z, dout), tokens by dstate (B, C). A state is held as (dstate, headdim).
//
// Backward of a chunk, with u = d x, G_ij = exp(c_i - c_j) for j <= i (else 0), h the state before
// and dh' the gradient of the one after the chunk, e its last token, and dy = dout silu(z):
//
//   P_ij = dy_i . u_j                                          gradient of G_ij (C_i . B_j)
//   du_j = sum_i G_ij (C_i . B_j) dy_i + exp(c_e - c_j) dh' B_j
//   dC_i = sum_j G_ij P_ij B_j + exp(c_i) h^T dy_i
//   dB_j = sum_i G_ij P_ij C_i + exp(c_e - c_j) dh'^T u_j
//   dh   = exp(c_e) dh' + sum_i exp(c_i) dy_i C_i^T
//
// summed over the heads of a group for dB and dC: their first terms need G P alone, summed first.
// d_s A stands in every exponent that passes token s, hence its gradient is the sum of
// G_ij P_ij (C_i . B_j) over j < s <= i, of the second terms of C_i . dC_i over i >= s and of
// B_j . dB_j over j < s, and of exp(c_e) h . dh'. No large terms cancel in it.

#include "ssd_chunk_scan_cpu.h"

#include <new>

#include "cpu.h"
#include "packed_sequences.h"
#include "simd.h"

namespace mamba_ssm::kernels::MAMBA_SSM_ISA {
namespace {

/// Tokens of a chunk at most. More tokens make the products of a chunk with itself dearer, fewer
/// make those with the state less efficient.
constexpr int kChunk = 32;
static_assert(kChunk % kLanes == 0);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t x, int64_t unit) { return ceil_div(x, unit) * unit; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- Dense matrices and their products

/// One register of S.
template <class S>
struct NativeOf {
  using type __attribute__((vector_size(MAMBA_SSM_VECTOR_BYTES))) = S;
};
template <class S>
using Native = typename NativeOf<S>::type;

template <class S>
constexpr int kNativeLanes = MAMBA_SSM_VECTOR_BYTES / sizeof(S);

/// A matrix in memory of its own, uninitialised. Rows are aligned and can be read and written in
/// whole vectors of kLanes; the number of rows is rounded up to kLanes as well.
template <class S>
class Matrix {
 public:
  const int64_t stride;

  Matrix(int64_t rows, int64_t cols)
      : stride(row_stride(cols)),
        data_(static_cast<S*>(::operator new(
            static_cast<size_t>(round_up(rows, kLanes) * stride) * sizeof(S), kAlign))) {}
  ~Matrix() { ::operator delete(data_, kAlign); }
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;

  S* operator[](int64_t row) { return data_ + row * stride; }
  const S* operator[](int64_t row) const { return data_ + row * stride; }

 private:
  static constexpr std::align_val_t kAlign{64};

  /// Whole vectors; not a multiple of 256 bytes, so that columns spread over the sets of a cache.
  static int64_t row_stride(int64_t cols) {
    const int64_t stride = round_up(cols, kLanes);
    return stride * static_cast<int64_t>(sizeof(S)) % 256 == 0 ? stride + kLanes : stride;
  }

  S* data_;
};

/// Rows of a tile, and vectors of one: as many sums as hide the latency of a fused multiply-add and
/// fit into the registers.
constexpr int kTileRows = 4;
constexpr int kTileVectors = MAMBA_SSM_VECTOR_BYTES == 64 ? 4 : 2;

/// A part of a matrix in registers: kTileRows rows, kVectors vectors.
template <class S, int kVectors>
struct Tile {
  using V = Native<S>;
  static constexpr int kWidth = kNativeLanes<S>;

  V sums[kTileRows][kVectors] = {};

  /// sums[r][c] += a[r a_row + k a_step] b[k b_step + c], k < steps
  __attribute__((always_inline)) void add_product(const S* a, int64_t a_row, int64_t a_step,
                                                  const S* b, int64_t b_step, int64_t steps) {
    for (int64_t k = 0; k < steps; ++k) {
      V columns[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) columns[v] = load_vector(b + k * b_step + v * kWidth);
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r) {
        const V x = a[r * a_row + k * a_step] - V{};
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = x * columns[v] + sums[r][v];
      }
    }
  }

  /// Element by element: sum = f(sum, row, column).
  template <class F>
  __attribute__((always_inline)) void update(F f) {
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = f(sums[r][v], r, v * kWidth);
    }
  }

  static V load_vector(const S* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
  }
  __attribute__((always_inline)) void scale_rows(const S* factors) {
    update([&](V sum, int r, int) { return factors[r] * sum; });
  }
  __attribute__((always_inline)) void scale_columns(const S* factors) {
    update([&](V sum, int, int c) { return load_vector(factors + c) * sum; });
  }
  __attribute__((always_inline)) void multiply(const S* m, int64_t stride) {
    update([&](V sum, int r, int c) { return load_vector(m + r * stride + c) * sum; });
  }
  /// sums = factor * m + sums
  __attribute__((always_inline)) void add(S factor, const S* m, int64_t stride) {
    update([&](V sum, int r, int c) { return factor * load_vector(m + r * stride + c) + sum; });
  }
  /// to[c] += the sum over r of m[r][c] sums[r][c]
  __attribute__((always_inline)) void add_column_products(const S* m, int64_t stride, S* to) const {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      V total = load_vector(to + v * kWidth);
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r) {
        total = load_vector(m + r * stride + v * kWidth) * sums[r][v] + total;
      }
      std::memcpy(to + v * kWidth, &total, sizeof(V));
    }
  }
  __attribute__((always_inline)) void store(S* m, int64_t stride) const {
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        std::memcpy(m + r * stride + v * kWidth, &sums[r][v], sizeof(V));
      }
    }
  }
};

/// Prefetches a widest tile of a matrix.
template <class S>
inline void prefetch_tile(const S* m, int64_t stride) {
  for (int r = 0; r < kTileRows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) {
      __builtin_prefetch(m + r * stride + v * kNativeLanes<S>, 0, 2);
    }
  }
}

// A function of its own, since GCC spills sums when such loops are parts of a larger one.
template <class S, int kVectors, class F>
__attribute__((noinline)) void for_each_tile_of_width(int64_t rows, int64_t col, F& f) {
  for (int64_t row = 0; row < rows; row += kTileRows) {
    Tile<S, kVectors> tile;
    f(tile, row, col);
  }
}

/// f(tile, row, col) for zero tiles that together cover rows x cols, and beyond, up to a multiple
/// of kTileRows x kLanes.
template <class S, class F>
inline void for_each_tile(int64_t rows, int64_t cols, F f) {
  constexpr int kWidth = kNativeLanes<S>;
  cols = round_up(cols, kLanes);
  int64_t col = 0;
  for (; cols - col > (kTileVectors - 1) * kWidth; col += kTileVectors * kWidth) {
    for_each_tile_of_width<S, kTileVectors>(rows, col, f);
  }
  const int64_t rest = (cols - col) / kWidth;
  if constexpr (kTileVectors > 2) {
    if (rest == 3) return for_each_tile_of_width<S, 3>(rows, col, f);
    if (rest == 2) return for_each_tile_of_width<S, 2>(rows, col, f);
  }
  if (rest == 1) for_each_tile_of_width<S, 1>(rows, col, f);
}

/// to[j][i] = from[i][j], up to whole vectors of both.
inline void transpose_matrix(const Matrix<float>& from, int64_t rows, int64_t cols,
                             Matrix<float>& to) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < cols; j += kLanes) {
      VecF block[kLanes];
      for (int k = 0; k < kLanes; ++k) block[k] = load(from[i + k] + j);
      transpose(block);
      for (int k = 0; k < kLanes; ++k) store(to[j + k] + i, block[k]);
    }
  }
}
inline void transpose_matrix(const Matrix<double>& from, int64_t rows, int64_t cols,
                             Matrix<double>& to) {
  for (int64_t i = 0; i < round_up(rows, kLanes); ++i) {
    for (int64_t j = 0; j < round_up(cols, kLanes); ++j) to[j][i] = from[i][j];
  }
}

/// v in the lanes from `lane` on, 0 before.
template <class S>
inline Vector<S> from_lane(int lane, Vector<S> v) {
  Vector<S> index;
  for (int i = 0; i < kLanes; ++i) index[i] = static_cast<S>(i);
  return index >= static_cast<S>(lane) ? v : Vector<S>{};
}

// ---- Work items and chunks

/// Heads [head, head + heads) of one sequence: tokens [begin, end) of batch row b.
struct Item {
  int64_t sequence, b, begin, end;
  int64_t group, head, heads;
};

inline Item item_of(const SsdChunkScanParams& p, const SsdChunkScanBlocks& blocks, int64_t index) {
  Item item{};
  item.sequence = index / blocks.per_sequence;
  item.group = index % blocks.per_sequence / blocks.per_group;
  const int64_t first = index % blocks.per_group * blocks.block;
  item.head = item.group * blocks.group + first;
  item.heads = least(blocks.block, blocks.group - first);
  item.b = item.sequence;
  item.end = p.seqlen;
  if (p.cu_seqlens) {
    const auto bound = [&](int64_t i) {
      const int64_t at =
          load_as<int64_t>(p.cu_seqlens.data, p.cu_seqlens.dtype, i * p.cu_seqlens.stride[0]);
      return at < 0 ? 0 : least(at, p.seqlen);
    };
    item.b = 0;
    item.begin = bound(item.sequence);
    item.end = bound(item.sequence + 1);
  }
  return item;
}

/// Whether a sequence starts from initial_states; `state` is its row there.
inline bool initial_state_of(const SsdChunkScanParams& p, int64_t sequence, int64_t* state) {
  *state = sequence;
  return p.initial_states && sequence < p.num_initial_states;
}

/// The tokens of [begin, end) that are not padding, at most kChunk. Only the first may reset.
struct Chunk {
  int64_t begin, end;
  bool resets;
  int count;
  int64_t tokens[kChunk];
};

inline Chunk chunk_at(const SsdChunkScanParams& p, const Item& item, int64_t begin) {
  Chunk chunk;
  chunk.begin = begin;
  chunk.resets = false;
  chunk.count = 0;
  const uint8_t* const marks = p.marks ? p.marks + item.b * p.seqlen : nullptr;
  int64_t t = begin;
  for (; t < item.end; ++t) {
    const uint8_t mark = marks ? marks[t] : uint8_t{kContinue};
    if (mark == kPadding) continue;
    if (chunk.count == kChunk || (mark == kReset && chunk.count > 0)) break;
    chunk.resets |= mark == kReset;
    chunk.tokens[chunk.count++] = t;
  }
  chunk.end = t;
  return chunk;
}

inline int64_t count_chunks(const SsdChunkScanParams& p, const Item& item) {
  int64_t count = 0;
  for (int64_t t = item.begin; t < item.end; t = chunk_at(p, item, t).end) ++count;
  return count;
}

template <class F>
inline void for_each_padding(const SsdChunkScanParams& p, const Item& item, const Chunk& chunk,
                             F f) {
  if (!p.marks || chunk.end - chunk.begin == chunk.count) return;
  for (int64_t t = chunk.begin; t < chunk.end; ++t) {
    if (p.marks[item.b * p.seqlen + t] == kPadding) f(t);
  }
}

// ---- Rows of tensors

/// The last axis of a view (batch, seqlen, heads, length) for one head, token by token.
struct TokenRows {
  void* data;
  DType dtype;
  int64_t offset, token_stride, stride, length;
};

inline TokenRows token_rows(const View<4>& v, int64_t b, int64_t head, int64_t length) {
  const int64_t offset = b * v.stride[0] + head * v.stride[2];
  return {v.data, v.dtype, offset, v.stride[1], v.stride[3], length};
}

/// f(zero of the type of the elements of an activation).
template <class S, class F>
inline void with_element(DType dtype, F f) {
  if constexpr (sizeof(S) == sizeof(double)) {
    f(double{});
  } else if (dtype == DType::kFloat16) {
    f(Half{});
  } else if (dtype == DType::kBFloat16) {
    f(BFloat16{});
  } else {
    f(float{});
  }
}

/// Row i of the matrix is the row of the chunk's token i; zeros beyond, up to whole vectors.
template <class S>
void load_rows(const TokenRows& rows, const Chunk& chunk, Matrix<S>& to) {
  with_element<S>(rows.dtype, [&](auto element) {
    using T = decltype(element);
    for (int i = 0; i < chunk.count; ++i) {
      const T* from =
          static_cast<const T*>(rows.data) + rows.offset + chunk.tokens[i] * rows.token_stride;
      S* const row = to[i];
      int64_t k = 0;
      if (rows.stride == 1) {
        for (; k + kLanes <= rows.length; k += kLanes) store(row + k, load(from + k));
      }
      for (; k < rows.length; ++k) row[k] = to_accumulate(from[k * rows.stride]);
      for (; k % kLanes != 0; ++k) row[k] = S(0);
    }
  });
  for (int64_t i = chunk.count; i < round_up(chunk.count, kLanes); ++i) {
    for (int64_t k = 0; k < round_up(rows.length, kLanes); ++k) to[i][k] = S(0);
  }
}

template <class S>
void store_row(const TokenRows& rows, int64_t token, const S* row) {
  with_element<S>(rows.dtype, [&](auto element) {
    using T = decltype(element);
    T* const to = static_cast<T*>(rows.data) + rows.offset + token * rows.token_stride;
    int64_t k = 0;
    if (rows.stride == 1) {
      for (; k + kLanes <= rows.length; k += kLanes) store(to + k, load(row + k));
    }
    for (; k < rows.length; ++k) to[k * rows.stride] = from_accumulate<T>(row[k]);
  });
}

/// Prefetches the row of one token, if it is one run in memory.
inline void prefetch_row(const TokenRows& rows, int64_t token) {
  asm volatile("");  // else GCC drops the call: a function of prefetches alone has no effect
  if (rows.stride != 1) return;
  constexpr int64_t kLine = 64;
  const int64_t size = rows.dtype == DType::kFloat32 ? 4 : rows.dtype == DType::kFloat64 ? 8 : 2;
  const char* const row =
      static_cast<const char*>(rows.data) + (rows.offset + token * rows.token_stride) * size;
  for (int64_t at = 0; at < rows.length * size; at += kLine) __builtin_prefetch(row + at, 0, 2);
}

template <class S>
void clear_row(const TokenRows& rows, int64_t token) {
  for (int64_t k = 0; k < rows.length; ++k) {
    store_as(rows.data, rows.dtype, rows.offset + token * rows.token_stride + k * rows.stride,
             S(0));
  }
}

/// The state (headdim, dstate) of a view (states, nheads, headdim, dstate) to (dstate, headdim),
/// zeros beyond.
template <class S>
void load_state(const View<4>& v, int64_t state, int64_t head, int64_t headdim, int64_t dstate,
                S* to, int64_t stride) {
  const int64_t offset = state * v.stride[0] + head * v.stride[1];
  const int64_t rows = round_up(dstate, kTileRows), cols = round_up(headdim, kLanes);
  const auto load_scalars = [&](int64_t n0, int64_t n1, int64_t p0, int64_t p1) {
    for (int64_t k = p0; k < p1; ++k) {
      for (int64_t n = n0; n < n1; ++n) {
        const int64_t at = offset + k * v.stride[2] + n * v.stride[3];
        to[n * stride + k] = n < dstate && k < headdim ? load_as<S>(v.data, v.dtype, at) : S(0);
      }
    }
  };
  int64_t whole_n = 0, whole_p = 0;
  if constexpr (sizeof(S) == sizeof(float)) {
    if (v.dtype == DType::kFloat32 && v.stride[3] == 1) {
      whole_n = dstate / kLanes * kLanes;
      whole_p = headdim / kLanes * kLanes;
    }
    for (int64_t k = 0; k < whole_p; k += kLanes) {
      for (int64_t n = 0; n < whole_n; n += kLanes) {
        const float* const from = static_cast<const float*>(v.data) + offset + n;
        VecF block[kLanes];
        for (int i = 0; i < kLanes; ++i) block[i] = load(from + (k + i) * v.stride[2]);
        transpose(block);
        for (int i = 0; i < kLanes; ++i) store(to + (n + i) * stride + k, block[i]);
      }
    }
  }
  load_scalars(0, whole_n, whole_p, cols);
  load_scalars(whole_n, rows, 0, cols);
}

/// The reverse; null stands for a state of zeros.
template <class S>
void store_state(const View<4>& v, int64_t state, int64_t head, int64_t headdim, int64_t dstate,
                 const S* from, int64_t stride) {
  const int64_t offset = state * v.stride[0] + head * v.stride[1];
  const auto store_scalars = [&](int64_t n0, int64_t n1, int64_t p0, int64_t p1) {
    for (int64_t k = p0; k < p1; ++k) {
      for (int64_t n = n0; n < n1; ++n) {
        store_as(v.data, v.dtype, offset + k * v.stride[2] + n * v.stride[3],
                 from ? from[n * stride + k] : S(0));
      }
    }
  };
  int64_t whole_n = 0, whole_p = 0;
  if constexpr (sizeof(S) == sizeof(float)) {
    if (from && v.dtype == DType::kFloat32 && v.stride[3] == 1) {
      whole_n = dstate / kLanes * kLanes;
      whole_p = headdim / kLanes * kLanes;
    }
    for (int64_t k = 0; k < whole_p; k += kLanes) {
      for (int64_t n = 0; n < whole_n; n += kLanes) {
        float* const to = static_cast<float*>(v.data) + offset + n;
        VecF block[kLanes];
        for (int i = 0; i < kLanes; ++i) block[i] = load(from + (n + i) * stride + k);
        transpose(block);
        for (int i = 0; i < kLanes; ++i) store(to + (k + i) * v.stride[2], block[i]);
      }
    }
  }
  store_scalars(0, whole_n, whole_p, headdim);
  store_scalars(whole_n, dstate, 0, headdim);
}

// ---- One chunk of one head

/// Time steps of a chunk, and the decays that follow from them. Tokens beyond the chunk's have
/// step 0.
template <class S>
struct Steps {
  alignas(64) S d[kChunk];
  alignas(64) S slope[kChunk];  // dd/ddt
  // c of ssd_chunk_scan.h as a sum of two numbers: differences of near ones lose nothing.
  alignas(64) S c[kChunk], c_rest[kChunk];
  alignas(64) S from_start[kChunk];  // exp(c_i): from the state before the chunk to token i
  alignas(64) S to_end[kChunk];      // from token i to the state after the chunk
  S decay;                           // from the state before to the state after
};

/// What forward and backward share: the matrices of a chunk, and the state's way through it.
/// Matrices of tokens have rounded-up rows of zeros.
template <class S>
struct Scan {
  using V = Vector<S>;

  const SsdChunkScanParams& p;
  Item item{};
  Chunk chunk{};
  int64_t padded = 0;  // tokens of the chunk, up to whole vectors
  Matrix<S> B, C;      // (token, state)
  Matrix<S> Ct;        // (state, token)
  Matrix<S> BC;        // (j, i): B_j . C_i
  Steps<S> steps;
  Matrix<S> x, u;   // (token, headdim); u = d x
  Matrix<S> decay;  // (j, i): exp(c_i - c_j) where i >= j, else 0 or, in vectors of such, unset
  Matrix<S> mix;    // (j, i): decay * BC
  Matrix<S> y;      // (token, headdim)

  /// What is read and written next: rows of a head in tensors (batch, seqlen, nheads, headdim),
  /// from a token on.
  struct Next {
    int64_t head, token;
    const View<4>* tensors[5];
  } next{};

  explicit Scan(const SsdChunkScanParams& params)
      : p(params),
        B(kChunk, p.dstate),
        C(kChunk, p.dstate),
        Ct(p.dstate, kChunk),
        BC(kChunk, kChunk),
        x(kChunk, p.headdim),
        u(kChunk, p.headdim),
        decay(kChunk, kChunk),
        mix(kChunk, kChunk),
        y(kChunk, p.headdim) {}

  /// Rows of a state in memory.
  int64_t state_rows() const { return round_up(p.dstate, kTileRows); }

  TokenRows rows(const View<4>& v, int64_t head) const {
    return token_rows(v, item.b, head, p.headdim);
  }

  /// The tokens from `begin` on, and B.
  void load_chunk(int64_t begin) {
    chunk = chunk_at(p, item, begin);
    padded = round_up(chunk.count, kLanes);
    load_rows(token_rows(p.B, item.b, item.group, p.dstate), chunk, B);
  }

  /// C, and the products of B and C.
  void load_C() {
    load_rows(token_rows(p.C, item.b, item.group, p.dstate), chunk, C);
    transpose_matrix(C, chunk.count, p.dstate, Ct);
    for_each_tile<S>(chunk.count, padded, [&](auto& tile, int64_t j, int64_t i) {
      tile.add_product(B[j], B.stride, 1, Ct[0] + i, Ct.stride, p.dstate);
      tile.store(BC[j] + i, BC.stride);
    });
  }

  void load_steps(int64_t head) {
    S raw[kChunk];
    const S bias =
        p.dt_bias ? load_as<S>(p.dt_bias.data, p.dt_bias.dtype, head * p.dt_bias.stride[0]) : S(0);
    const int64_t offset = item.b * p.dt.stride[0] + head * p.dt.stride[2];
    for (int i = 0; i < padded; ++i) {
      raw[i] = i < chunk.count ? bias + load_as<S>(p.dt.data, p.dt.dtype,
                                                   offset + chunk.tokens[i] * p.dt.stride[1])
                               : S(0);
    }
    for (int i = 0; i < padded; i += kLanes) {
      const V dt = load(raw + i);
      store(steps.d + i, p.dt_softplus ? softplus(dt) : dt);
      store(steps.slope + i, S(1) / (S(1) + exp_precise(-dt)));
    }
    // A decay below exp(-1000) is 0 in any type; bounding the exponent keeps their sums finite.
    constexpr double kLeastExponent = -1000;
    const double A = load_as<double>(p.A.data, p.A.dtype, head * p.A.stride[0]);
    const S dt_min = static_cast<S>(p.dt_min), dt_max = static_cast<S>(p.dt_max);
    double c = 0, lost = 0;  // lost: what the additions rounded away (Dekker's sum)
    for (int i = 0; i < padded; ++i) {
      S& d = steps.d[i];
      if (!p.dt_softplus || raw[i] > S(20)) steps.slope[i] = S(1);
      if (d < dt_min || d > dt_max) {
        d = d < dt_min ? dt_min : dt_max;
        steps.slope[i] = S(0);
      }
      if (i >= chunk.count) d = S(0);
      const double exponent = i < chunk.count ? d * A : 0.0;
      const double step = exponent < kLeastExponent ? kLeastExponent : exponent;
      const double sum = c + step;
      lost += __builtin_fabs(c) > __builtin_fabs(step) ? (c - sum) + step : (step - sum) + c;
      c = sum;
      steps.c[i] = static_cast<S>(c);
      steps.c_rest[i] = static_cast<S>((c - steps.c[i]) + lost);
    }
    const S end = padded > 0 ? steps.c[padded - 1] : S(0);
    const S end_rest = padded > 0 ? steps.c_rest[padded - 1] : S(0);
    for (int i = 0; i < padded; i += kLanes) {
      const V c_i = load(steps.c + i), rest = load(steps.c_rest + i);
      store(steps.from_start + i, exp_precise(c_i));
      store(steps.to_end + i, exp_precise((end - c_i) + (end_rest - rest)));
    }
    steps.decay = exp_precise(V{} + end)[0];
  }

  void load_inputs(int64_t head) {
    load_rows(rows(p.x, head), chunk, x);
    scale_rows(x, steps.d, u);
  }

  /// What every token of the chunk gives to every later one.
  void mix_tokens() {
    for (int j = 0; j < chunk.count; ++j) {
      const int first = j / kLanes * kLanes;
      for (int i = first; i < padded; i += kLanes) {
        const V between = exp_precise((load(steps.c + i) - steps.c[j]) +
                                      (load(steps.c_rest + i) - steps.c_rest[j]));
        const V causal = i == first ? from_lane<S>(j - first, between) : between;
        store(decay[j] + i, causal);
        store(mix[j] + i, causal * load(BC[j] + i));
      }
    }
  }

  /// y without D x, from the state before the chunk; null: from 0.
  void read_out(const S* state, int64_t stride) {
    for_each_tile<S>(chunk.count, p.headdim, [&](auto& tile, int64_t i, int64_t k) {
      if (state) {
        tile.add_product(C[i], C.stride, 1, state + k, stride, p.dstate);
        tile.scale_rows(steps.from_start + i);
      }
      tile.add_product(mix[0] + i, 1, mix.stride, u[0] + k, u.stride,
                       least(i + kTileRows, chunk.count));
      tile.store(y[i] + k, y.stride);
    });
  }

  /// After head h of the chunk comes the next one, or the first one in the chunk at next_chunk.
  void plan(int64_t h, int64_t next_chunk) {
    const bool last = h + 1 == item.heads;
    next.head = item.head + (last ? 0 : h + 1);
    next.token = last ? next_chunk : chunk.begin;
  }

  /// Prefetches what comes next, in parts: one with each row of tiles of a state. Runs of headdim
  /// elements a token apart are too short for the hardware to foresee.
  void prefetch_next(int64_t tile_row) const {
    const int64_t first = next.token + kChunk * tile_row / state_rows();
    const int64_t last = next.token + kChunk * (tile_row + kTileRows) / state_rows();
    for (const View<4>* tensor : next.tensors) {
      if (!tensor || !*tensor) continue;
      for (int64_t t = first; t < last && t < item.end; ++t) {
        prefetch_row(rows(*tensor, next.head), t);
      }
    }
  }

  /// The state after the chunk from the one before; null: from 0. Uses u up.
  void advance(const S* before, S* after, int64_t stride) {
    scale_rows(u, steps.to_end, u);
    for_each_tile<S>(p.dstate, p.headdim, [&](auto& tile, int64_t n, int64_t k) {
      if (k == 0) prefetch_next(n);
      if (after != before) prefetch_tile(after + (n + 4 * kTileRows) * stride + k, stride);
      if (before) tile.add(steps.decay, before + n * stride + k, stride);
      tile.add_product(B[0] + n, 1, B.stride, u[0] + k, u.stride, chunk.count);
      tile.store(after + n * stride + k, stride);
    });
  }

  void scale_rows(const Matrix<S>& m, const S* factors, Matrix<S>& to) const {
    for (int i = 0; i < padded; ++i) {
      for (int64_t k = 0; k < p.headdim; k += kLanes) {
        store(to[i] + k, factors[i] * load(m[i] + k));
      }
    }
  }

  /// Row h of the matrix is D of head item.head + h; zeros without D.
  void load_D(Matrix<S>& D) const {
    for (int64_t h = 0; h < item.heads; ++h) {
      for (int64_t k = 0; k < round_up(p.headdim, kLanes); ++k) {
        D[h][k] = p.D && k < p.headdim
                      ? load_as<S>(p.D.data, p.D.dtype,
                                   (item.head + h) * p.D.stride[0] + k * p.D.stride[1])
                      : S(0);
      }
    }
  }
};

// ---- Forward

template <class S>
struct Forward : Scan<S> {
  using Base = Scan<S>;
  using Base::chunk, Base::item, Base::p, Base::state_rows;

  Matrix<S> D;       // (head, headdim)
  Matrix<S> states;  // (head and state, headdim)
  Matrix<S> z;       // (token, headdim)

  Forward(const SsdChunkScanParams& params, int64_t heads)
      : Base(params),
        D(heads, p.headdim),
        states(heads * state_rows(), p.headdim),
        z(kChunk, p.headdim) {
    Base::next = {0, 0, {&p.x, &p.z, &p.out}};
  }

  S* state(int64_t h) { return states[h * state_rows()]; }

  void run(const Item& work) {
    item = work;
    Base::load_D(D);
    int64_t initial;
    bool from_zero = !initial_state_of(p, item.sequence, &initial);
    for (int64_t h = 0; h < item.heads && !from_zero; ++h) {
      load_state(p.initial_states, initial, item.head + h, p.headdim, p.dstate, state(h),
                 states.stride);
    }
    for (int64_t begin = item.begin; begin < item.end; begin = chunk.end) {
      Base::load_chunk(begin);
      Base::load_C();
      from_zero |= chunk.resets;
      for (int64_t h = 0; h < item.heads; ++h) {
        Base::plan(h, chunk.end);
        run_head(h, from_zero);
      }
      from_zero = false;
    }
    for (int64_t h = 0; h < item.heads; ++h) {
      store_state(p.final_states, item.sequence, item.head + h, p.headdim, p.dstate,
                  from_zero ? nullptr : state(h), states.stride);
    }
  }

  void run_head(int64_t h, bool from_zero) {
    const int64_t head = item.head + h;
    S* const before = from_zero ? nullptr : state(h);
    Base::load_steps(head);
    Base::load_inputs(head);
    Base::mix_tokens();
    Base::read_out(before, states.stride);
    store_out(h);
    Base::advance(before, state(h), states.stride);
  }

  void store_out(int64_t h) {
    const TokenRows out = Base::rows(p.out, item.head + h);
    if (p.z) load_rows(Base::rows(p.z, item.head + h), chunk, z);
    for (int i = 0; i < chunk.count; ++i) {
      S* const y = Base::y[i];
      for (int64_t k = 0; k < p.headdim; k += kLanes) {
        const Vector<S> y_i = load(y + k) + load(D[h] + k) * load(Base::x[i] + k);
        store(y + k, p.z ? y_i * silu(load(z[i] + k)) : y_i);
      }
      store_row(out, chunk.tokens[i], y);
    }
    for_each_padding(p, item, chunk, [&](int64_t t) { clear_row<S>(out, t); });
  }
};

// ---- Backward

/// Bytes of states that an item keeps at a time, unless it has so many that segments of a square
/// root of them take more.
constexpr int64_t kKeptBytes = int64_t{16} << 20;

/// Gradients of one item. Its chunks are divided into segments. The state before each segment is
/// computed first; then, from the last segment to the first, the states before its chunks, and the
/// gradients of these in reverse.
template <class S>
struct Backward : Scan<S> {
  using Base = Scan<S>;
  using Base::chunk, Base::item, Base::p, Base::padded, Base::state_rows, Base::steps;
  using V = Vector<S>;

  const SsdChunkScanWorkspace at;
  S* const workspace;
  int64_t segment;         // chunks of a segment
  Matrix<int64_t> begins;  // (1, chunk)
  Matrix<S> states;        // (slot and head and state, headdim): see slot_of
  Matrix<S> dstates;       // (head and state, headdim): gradient of the state after, before a chunk
  Matrix<S> D;             // (head, headdim)
  Matrix<double> dD;       // (head, headdim)
  Matrix<double> dA, ddt_bias;  // (1, head)
  // Of a chunk.
  Matrix<S> Bt;                   // (state, token)
  Matrix<S> dBt, dCt;             // (state, token): through the states, sum over the heads
  Matrix<S> dBC;                  // (j, i): gradient of B_j . C_i, sum over the heads
  Matrix<S> dtokens;              // (token, state): dB or dC
  const S* next_state = nullptr;  // the one that comes next, to be prefetched
  // Of a chunk of one head.
  Matrix<S> z, dy, du;  // (token, headdim); dz in place of z
  Matrix<S> ut, dyt;    // (headdim, token)
  Matrix<S> pairs;      // (j, i): gradient of c_i - c_j
  S at_start[kChunk];   // gradient of c_i as exponent of Steps::from_start
  S at_end[kChunk];     // gradient of -c_j as exponent of Steps::to_end

  Backward(const SsdChunkScanParams& params, int64_t heads, int64_t most_chunks, void* memory)
      : Base(params),
        at(ssd_chunk_scan_bwd_layout(params)),
        workspace(static_cast<S*>(memory)),
        segment(segment_of(params, heads, most_chunks)),
        begins(1, most_chunks),
        states((ceil_div(most_chunks, segment) + segment) * heads * state_rows(), p.headdim),
        dstates(heads * state_rows(), p.headdim),
        D(heads, p.headdim),
        dD(heads, p.headdim),
        dA(1, heads),
        ddt_bias(1, heads),
        Bt(p.dstate, kChunk),
        dBt(p.dstate, kChunk),
        dCt(p.dstate, kChunk),
        dBC(kChunk, kChunk),
        dtokens(kChunk, p.dstate),
        z(kChunk, p.headdim),
        dy(kChunk, p.headdim),
        du(kChunk, p.headdim),
        ut(p.headdim, kChunk),
        dyt(p.headdim, kChunk),
        pairs(kChunk, kChunk) {}

  static int64_t segment_of(const SsdChunkScanParams& p, int64_t heads, int64_t chunks) {
    const int64_t bytes = heads * round_up(p.dstate, kTileRows) * round_up(p.headdim, kLanes) *
                          static_cast<int64_t>(sizeof(S));
    int64_t segment = bytes > 0 && chunks > kKeptBytes / bytes ? kKeptBytes / bytes : chunks;
    while (segment * segment < chunks) ++segment;
    return segment > 0 ? segment : 1;
  }

  S* state(int64_t slot, int64_t h) { return states[(slot * item.heads + h) * state_rows()]; }
  S* dstate(int64_t h) { return dstates[h * state_rows()]; }

  /// Where the state before chunk c is. The first slots are for the first chunks of segments, the
  /// others for the other chunks of the segment at hand.
  int64_t slot_of(int64_t c, int64_t segments) const {
    return c % segment == 0 ? c / segment : segments + c % segment;
  }

  void run(const Item& work) {
    item = work;
    Base::load_D(D);
    for (int64_t h = 0; h < item.heads; ++h) {
      dA[0][h] = ddt_bias[0][h] = 0;
      for (int64_t k = 0; k < p.headdim; ++k) dD[h][k] = 0;
    }
    int64_t chunks = 0;
    for (int64_t begin = item.begin; begin < item.end; begin = chunk.end) {
      chunk = chunk_at(p, item, begin);
      begins[0][chunks++] = begin;
    }
    const int64_t segments = ceil_div(chunks, segment);
    int64_t initial;
    const bool has_initial = initial_state_of(p, item.sequence, &initial);
    for (int64_t h = 0; h < item.heads && has_initial && chunks > 0; ++h) {
      load_state(p.initial_states, initial, item.head + h, p.headdim, p.dstate, state(0, h),
                 states.stride);
    }
    const auto from_zero = [&](int64_t c) { return chunk.resets || (c == 0 && !has_initial); };
    const auto advance = [&](int64_t c, int64_t slot_before, int64_t slot_after) {
      Base::load_chunk(begins[0][c]);
      for (int64_t h = 0; h < item.heads; ++h) {
        Base::plan(h, chunk.end);
        Base::load_steps(item.head + h);
        Base::load_inputs(item.head + h);
        Base::advance(from_zero(c) ? nullptr : state(slot_before, h), state(slot_after, h),
                      states.stride);
      }
    };
    Base::next = {0, 0, {&p.x}};
    for (int64_t c = 0; c < (segments - 1) * segment; ++c) {
      advance(c, c / segment + (c % segment == 0 ? 0 : 1), c / segment + 1);
    }

    bool no_gradient = !p.dfinal_states;  // the gradient of the state after the chunk is 0
    for (int64_t h = 0; h < item.heads && !no_gradient; ++h) {
      load_state(p.dfinal_states, item.sequence, item.head + h, p.headdim, p.dstate, dstate(h),
                 dstates.stride);
    }
    for (int64_t s = segments; s-- > 0;) {
      const int64_t end = least((s + 1) * segment, chunks);
      Base::next = {0, 0, {&p.x}};
      for (int64_t c = s * segment; c + 1 < end; ++c) {
        advance(c, slot_of(c, segments), slot_of(c + 1, segments));
      }
      Base::next = {0, 0, {&p.x, &p.dout, &p.dx, &p.z, &p.dz}};
      for (int64_t c = end; c-- > s * segment;) {
        load_chunk(begins[0][c]);
        for (int64_t h = 0; h < item.heads; ++h) {
          Base::plan(h, c > 0 ? begins[0][c - 1] : item.end);
          next_state = h + 1 < item.heads ? state(slot_of(c, segments), h + 1)
                       : c > s * segment  ? state(slot_of(c - 1, segments), 0)
                                          : nullptr;
          run_head(h, from_zero(c) ? nullptr : state(slot_of(c, segments), h),
                   no_gradient ? nullptr : dstate(h));
        }
        store_chunk();
        no_gradient = chunk.resets;
      }
    }
    store_item(has_initial, initial, no_gradient);
  }

  void load_chunk(int64_t begin) {
    Base::load_chunk(begin);
    Base::load_C();
    transpose_matrix(Base::B, chunk.count, p.dstate, Bt);
  }

  /// state, dstate: of the state before the chunk, and the gradient of the one after; null: 0.
  void run_head(int64_t h, const S* state, S* dstate) {
    const int64_t head = item.head + h;
    Base::load_steps(head);
    Base::load_inputs(head);
    Base::mix_tokens();
    load_dy(h, state);
    transpose_matrix(Base::u, chunk.count, p.headdim, ut);
    transpose_matrix(dy, chunk.count, p.headdim, dyt);
    pair_gradients(h == 0);
    input_gradients(dstate);
    const S product = state && dstate ? inner_product(state, dstate) : S(0);
    state_gradients(h == 0, state, dyt, steps.from_start, Base::Ct, dCt, at_start);
    state_gradients(h == 0, dstate, ut, steps.to_end, Bt, dBt, at_end);
    store_inputs(h, steps.decay * product);
    if (!chunk.resets) retreat(dstate, this->dstate(h));
  }

  /// dy; with z also dz, from y.
  void load_dy(int64_t h, const S* state) {
    const int64_t head = item.head + h;
    load_rows(Base::rows(p.dout, head), chunk, dy);
    if (!p.z) return;
    load_rows(Base::rows(p.z, head), chunk, z);
    Base::read_out(state, states.stride);
    const TokenRows dz = Base::rows(p.dz, head);
    for (int i = 0; i < chunk.count; ++i) {
      for (int64_t k = 0; k < p.headdim; k += kLanes) {
        const V y_i = load(Base::y[i] + k) + load(D[h] + k) * load(Base::x[i] + k);
        const V dout_i = load(dy[i] + k), z_i = load(z[i] + k);
        store(dy[i] + k, dout_i * silu(z_i));
        store(z[i] + k, dout_i * y_i * silu_slope(z_i));
      }
      store_row(dz, chunk.tokens[i], z[i]);
    }
    for_each_padding(p, item, chunk, [&](int64_t t) { clear_row<S>(dz, t); });
  }

  /// Gradients of decay and BC, whose product is mix.
  void pair_gradients(bool first) {
    for_each_tile<S>(chunk.count, padded, [&](auto& tile, int64_t j, int64_t i) {
      tile.add_product(Base::u[j], Base::u.stride, 1, dyt[0] + i, dyt.stride, p.headdim);
      auto dBC_tile = tile;
      tile.multiply(Base::mix[j] + i, Base::mix.stride);
      tile.store(pairs[j] + i, pairs.stride);
      dBC_tile.multiply(Base::decay[j] + i, Base::decay.stride);
      if (!first) dBC_tile.add(S(1), dBC[j] + i, dBC.stride);
      dBC_tile.store(dBC[j] + i, dBC.stride);
    });
  }

  /// du, the gradient of u.
  void input_gradients(const S* dstate) {
    for_each_tile<S>(chunk.count, p.headdim, [&](auto& tile, int64_t j, int64_t k) {
      if (dstate) {
        tile.add_product(Base::B[j], Base::B.stride, 1, dstate + k, dstates.stride, p.dstate);
        tile.scale_rows(steps.to_end + j);
      }
      tile.add_product(Base::mix[j] + j, Base::mix.stride, 1, dy[j] + k, dy.stride,
                       chunk.count - j);
      tile.store(du[j] + k, du.stride);
    });
  }

  /// Tokens couple to a state through Mt: adds factors_i state tokens_i to gradient column i, and
  /// leaves its product with column i of Mt, the gradient of the factor's exponent, in dexponent.
  void state_gradients(bool first, const S* state, const Matrix<S>& tokens, const S* factors,
                       const Matrix<S>& Mt, Matrix<S>& gradient, S* dexponent) {
    for (int i = 0; i < padded; ++i) dexponent[i] = S(0);
    if (!state && !first) return;
    for_each_tile<S>(p.dstate, padded, [&](auto& tile, int64_t n, int64_t i) {
      if (!state) return tile.store(gradient[n] + i, gradient.stride);
      tile.add_product(state + n * states.stride, states.stride, 1, tokens[0] + i, tokens.stride,
                       p.headdim);
      tile.scale_columns(factors + i);
      tile.add_column_products(Mt[n] + i, Mt.stride, dexponent + i);
      if (!first) tile.add(S(1), gradient[n] + i, gradient.stride);
      tile.store(gradient[n] + i, gradient.stride);
    });
  }

  /// Of two states.
  S inner_product(const S* a, const S* b) const {
    V sum = {};
    for (int64_t n = 0; n < p.dstate; ++n) {
      for (int64_t k = 0; k < p.headdim; k += kLanes) {
        sum = load(a + n * states.stride + k) * load(b + n * states.stride + k) + sum;
      }
    }
    S total = 0;
    for (int i = 0; i < kLanes; ++i) total += sum[i];
    return total;
  }

  /// Element s: the sum of pairs (j, i) with j < s <= i, to which the step into token s belongs.
  void sum_pairs(S* sums) const {
    // Lane i of prefix: the sum of pairs (j, i) over j < s.
    V prefix[kChunk / kLanes] = {}, rows[kLanes];
    for (int s = 0; s < padded; ++s) {
      const int first = s / kLanes, lane = s % kLanes;
      V sum = from_lane<S>(lane, prefix[first]);
      for (int v = first + 1; v < padded / kLanes; ++v) sum = sum + prefix[v];
      rows[lane] = sum;
      for (int v = first; v < padded / kLanes && s < chunk.count; ++v) {
        prefix[v] = prefix[v] + load(pairs[s] + v * kLanes);
      }
      if (lane == kLanes - 1) store(sums + first * kLanes, sum_lanes(rows));
    }
  }

  /// dx, ddt and the sums over time. ddecay: the gradient of the exponent of Steps::decay, in which
  /// the d A of all tokens are.
  void store_inputs(int64_t h, S ddecay) {
    const int64_t head = item.head + h;
    const TokenRows dx = Base::rows(p.dx, head);
    alignas(64) S dd[kChunk], dstep_pairs[kChunk];
    V rows[kLanes];
    for (int i = 0; i < padded; ++i) {
      V sum = {};
      for (int64_t k = 0; k < p.headdim && i < chunk.count; k += kLanes) {
        const V du_i = load(du[i] + k);
        sum = load(Base::x[i] + k) * du_i + sum;
        store(du[i] + k, steps.d[i] * du_i + load(D[h] + k) * load(dy[i] + k));
      }
      rows[i % kLanes] = sum;
      if (i % kLanes == kLanes - 1) store(dd + i - (kLanes - 1), sum_lanes(rows));
      if (i < chunk.count) store_row(dx, chunk.tokens[i], du[i]);
    }
    for (int64_t k = 0; k < p.headdim && p.dD; k += kLanes) {
      V sum = {};
      for (int i = 0; i < chunk.count; ++i) sum = load(dy[i] + k) * load(Base::x[i] + k) + sum;
      for (int lane = 0; lane < kLanes; ++lane) dD[h][k + lane] += sum[lane];
    }

    sum_pairs(dstep_pairs);
    const double A = load_as<double>(p.A.data, p.A.dtype, head * p.A.stride[0]);
    const int64_t offset = item.b * p.ddt.stride[0] + head * p.ddt.stride[2];
    const auto store_ddt = [&](int64_t t, double x) {
      store_as(p.ddt.data, p.ddt.dtype, offset + t * p.ddt.stride[1], x);
    };
    double before = 0, after = 0;  // at_end before token i, at_start from token i on
    double dstep[kChunk];          // gradient of d A
    for (int i = chunk.count; i-- > 0;) {
      after += at_start[i];
      dstep[i] = ddecay + dstep_pairs[i] + after;
    }
    for (int i = 0; i < chunk.count; ++i) {
      dstep[i] += before;
      before += at_end[i];
      const double ddt = (dd[i] + A * dstep[i]) * steps.slope[i];
      store_ddt(chunk.tokens[i], ddt);
      dA[0][h] += steps.d[i] * dstep[i];
      ddt_bias[0][h] += ddt;
    }
    for_each_padding(p, item, chunk, [&](int64_t t) {
      clear_row<S>(dx, t);
      store_ddt(t, 0);
    });
  }

  /// The gradient of the state before the chunk from that of the one after. Uses dy up.
  void retreat(const S* after, S* before) {
    Base::scale_rows(dy, steps.from_start, dy);
    for_each_tile<S>(p.dstate, p.headdim, [&](auto& tile, int64_t n, int64_t k) {
      if (k == 0) Base::prefetch_next(n);
      if (next_state) prefetch_tile(next_state + n * states.stride + k, states.stride);
      if (after) tile.add(steps.decay, after + n * dstates.stride + k, dstates.stride);
      tile.add_product(Base::C[0] + n, 1, Base::C.stride, dy[0] + k, dy.stride, chunk.count);
      tile.store(before + n * dstates.stride + k, dstates.stride);
    });
  }

  /// The partial sums of dB and dC of the chunk's tokens.
  void store_chunk() {
    transpose_matrix(dCt, p.dstate, padded, dtokens);
    for_each_tile<S>(chunk.count, p.dstate, [&](auto& tile, int64_t i, int64_t n) {
      tile.add(S(1), dtokens[i] + n, dtokens.stride);
      tile.add_product(dBC[0] + i, 1, dBC.stride, Base::B[0] + n, Base::B.stride,
                       least(i + kTileRows, chunk.count));
      tile.store(dtokens[i] + n, dtokens.stride);
    });
    store_partial_sums(at.dC);
    transpose_matrix(dBt, p.dstate, padded, dtokens);
    for_each_tile<S>(chunk.count, p.dstate, [&](auto& tile, int64_t j, int64_t n) {
      tile.add(S(1), dtokens[j] + n, dtokens.stride);
      tile.add_product(dBC[j] + j, dBC.stride, 1, Base::C[j] + n, Base::C.stride, chunk.count - j);
      tile.store(dtokens[j] + n, dtokens.stride);
    });
    store_partial_sums(at.dB);
  }

  void store_partial_sums(int64_t sums) const {
    const SsdChunkScanBlocks blocks = ssd_chunk_scan_bwd_blocks(p);
    const int64_t block =
        item.group * blocks.per_group + (item.head - item.group * blocks.group) / blocks.block;
    S* const rows = workspace + sums + (item.b * blocks.per_sequence + block) * p.seqlen * p.dstate;
    const size_t bytes = static_cast<size_t>(p.dstate) * sizeof(S);
    for (int i = 0; i < chunk.count; ++i) {
      std::memcpy(rows + chunk.tokens[i] * p.dstate, dtokens[i], bytes);
    }
    for_each_padding(p, item, chunk,
                     [&](int64_t t) { std::memset(rows + t * p.dstate, 0, bytes); });
  }

  void store_item(bool has_initial, int64_t initial, bool no_gradient) {
    for (int64_t h = 0; h < item.heads; ++h) {
      const int64_t head = item.head + h, row = item.sequence * p.nheads + head;
      workspace[at.dA + row] = static_cast<S>(dA[0][h]);
      workspace[at.ddt_bias + row] = static_cast<S>(ddt_bias[0][h]);
      for (int64_t k = 0; k < p.headdim && p.dD; ++k) {
        workspace[at.dD + row * p.headdim + k] = static_cast<S>(dD[h][k]);
      }
      if (has_initial && p.dinitial_states) {
        store_state(p.dinitial_states, initial, head, p.headdim, p.dstate,
                    no_gradient ? nullptr : dstate(h), dstates.stride);
      }
    }
  }
};

// ---- Sums of the partial sums, in a fixed order

/// dB or dC of tokens [begin, end) of one batch row and group: sums over the blocks of heads.
template <class S>
void reduce_tokens(const SsdChunkScanParams& p, int64_t b, int64_t group, int64_t begin,
                   int64_t end, const S* partials, const View<4>& gradient, S* sums) {
  const SsdChunkScanBlocks blocks = ssd_chunk_scan_bwd_blocks(p);
  partials += (b * blocks.per_sequence + group * blocks.per_group) * p.seqlen * p.dstate;
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t n = 0; n < p.dstate; ++n) sums[n] = S(0);
    for (int64_t block = 0; block < blocks.per_group; ++block) {
      const S* const partial = partials + (block * p.seqlen + t) * p.dstate;
      for (int64_t n = 0; n < p.dstate; ++n) sums[n] += partial[n];
    }
    store_row(token_rows(gradient, b, group, p.dstate), t, sums);
  }
}

/// dA, ddt_bias and dD of one head: sums over the sequences.
template <class S>
void reduce_head(const SsdChunkScanParams& p, const SsdChunkScanWorkspace& at, const S* workspace,
                 int64_t head) {
  const auto sum = [&](int64_t partials, int64_t count, int64_t i) {
    double total = 0;
    for (int64_t s = 0; s < p.num_sequences; ++s) {
      total += workspace[partials + (s * p.nheads + head) * count + i];
    }
    return total;
  };
  store_as(p.dA.data, p.dA.dtype, head * p.dA.stride[0], sum(at.dA, 1, 0));
  if (p.ddt_bias) {
    store_as(p.ddt_bias.data, p.ddt_bias.dtype, head * p.ddt_bias.stride[0],
             sum(at.ddt_bias, 1, 0));
  }
  if (!p.dD) return;
  double over_channels = 0;
  for (int64_t k = 0; k < p.headdim; ++k) {
    const double dD = sum(at.dD, p.headdim, k);
    over_channels += dD;
    if (p.D_per_channel) {
      store_as(p.dD.data, p.dD.dtype, head * p.dD.stride[0] + k * p.dD.stride[1], dD);
    }
  }
  if (!p.D_per_channel) store_as(p.dD.data, p.dD.dtype, head * p.dD.stride[0], over_channels);
}

/// f(float or double) for the type that a call computes in.
template <class F>
void with_type(const SsdChunkScanParams& p, F f) {
  if (p.dtype == DType::kFloat64) {
    f(double{});
  } else {
    f(float{});
  }
}

}  // namespace

void ssd_chunk_scan_fwd_cpu(const SsdChunkScanParams& p, int64_t begin, int64_t end) noexcept {
  const SsdChunkScanBlocks blocks = ssd_chunk_scan_fwd_blocks(p);
  with_type(p, [&](auto type) {
    Forward<decltype(type)> forward(p, blocks.block);
    for (int64_t i = begin; i < end; ++i) forward.run(item_of(p, blocks, i));
  });
}

void ssd_chunk_scan_bwd_cpu(const SsdChunkScanParams& p, void* workspace, int64_t begin,
                            int64_t end) noexcept {
  const SsdChunkScanBlocks blocks = ssd_chunk_scan_bwd_blocks(p);
  int64_t most_chunks = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t chunks = count_chunks(p, item_of(p, blocks, i));
    if (chunks > most_chunks) most_chunks = chunks;
  }
  with_type(p, [&](auto type) {
    Backward<decltype(type)> backward(p, blocks.block, most_chunks, workspace);
    for (int64_t i = begin; i < end; ++i) backward.run(item_of(p, blocks, i));
  });
}

// Work items: tiles of tokens, then heads.
void ssd_chunk_scan_bwd_reduce_cpu(const SsdChunkScanParams& p, void* workspace, int64_t begin,
                                   int64_t end) noexcept {
  const SsdChunkScanWorkspace at = ssd_chunk_scan_bwd_layout(p);
  const int64_t tiles = ceil_div(p.seqlen, kSsdReduceTokens);
  const int64_t token_items = p.batch * p.ngroups * tiles;
  with_type(p, [&](auto type) {
    using S = decltype(type);
    const S* const partials = static_cast<const S*>(workspace);
    Matrix<S> sums(1, p.dstate);
    for (int64_t i = begin; i < end; ++i) {
      if (i >= token_items) {
        reduce_head(p, at, partials, i - token_items);
        continue;
      }
      const int64_t b = i / tiles / p.ngroups, group = i / tiles % p.ngroups;
      const int64_t first = i % tiles * kSsdReduceTokens;
      const int64_t last = least(first + kSsdReduceTokens, p.seqlen);
      reduce_tokens(p, b, group, first, last, partials + at.dB, p.dB, sums[0]);
      reduce_tokens(p, b, group, first, last, partials + at.dC, p.dC, sums[0]);
    }
  });
}

}  // namespace mamba_ssm::kernels::MAMBA_SSM_ISA
