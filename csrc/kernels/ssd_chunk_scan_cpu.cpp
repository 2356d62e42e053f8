// SSD chunk scan on CPU, forward and backward.
//
// Every product of a chunk is a small matrix product, done by one register tile (Tile): rows are
// broadcast numbers, columns are vectors. A chunk is a list of tokens that are not padding, all
// from one sequence; a token that resets the state starts a chunk, so that what was before it takes
// no part in any arithmetic. What a chunk reads is converted to dense matrices first: tokens by
// headdim (x, z, dout), tokens by dstate (B, C). A state is held as (dstate, headdim).
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

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
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
  /// sums = factor * m + sums
  __attribute__((always_inline)) void add(S factor, const S* m, int64_t stride) {
    update([&](V sum, int r, int c) { return factor * load_vector(m + r * stride + c) + sum; });
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

template <class S, int kVectors, class F>
inline void for_each_tile_of_width(int64_t rows, int64_t col, F& f) {
  for (int64_t row = 0; row < rows; row += kTileRows) {
    Tile<S, kVectors> tile;
    f(tile, row, col);
  }
}

/// f(tile, row, col) for zero tiles that together cover rows x cols, and up to whole tiles beyond.
template <class S, class F>
inline void for_each_tile(int64_t rows, int64_t cols, F f) {
  constexpr int kWidth = kNativeLanes<S>;
  int64_t col = 0;
  for (; cols - col > (kTileVectors - 1) * kWidth; col += kTileVectors * kWidth) {
    for_each_tile_of_width<S, kTileVectors>(rows, col, f);
  }
  const int64_t rest = (cols - col + kWidth - 1) / kWidth;
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

  TokenRows rows(const View<4>& v, int64_t head) const {
    return token_rows(v, item.b, head, p.headdim);
  }

  void load_chunk(int64_t begin) {
    chunk = chunk_at(p, item, begin);
    padded = round_up(chunk.count, kLanes);
    load_rows(token_rows(p.B, item.b, item.group, p.dstate), chunk, B);
  }

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
    double c = 0;
    for (int i = 0; i < padded; ++i) {
      S& d = steps.d[i];
      if (!p.dt_softplus || raw[i] > S(20)) steps.slope[i] = S(1);
      if (d < dt_min || d > dt_max) {
        d = d < dt_min ? dt_min : dt_max;
        steps.slope[i] = S(0);
      }
      if (i >= chunk.count) d = S(0);
      const double exponent = i < chunk.count ? d * A : 0.0;
      c += exponent < kLeastExponent ? kLeastExponent : exponent;
      steps.c[i] = static_cast<S>(c);
      steps.c_rest[i] = static_cast<S>(c - steps.c[i]);
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
    for (int i = 0; i < padded; ++i) {
      for (int64_t k = 0; k < p.headdim; k += kLanes) {
        store(u[i] + k, steps.d[i] * load(x[i] + k));
      }
    }
  }

  void mix_tokens() {
    for (int j = 0; j < chunk.count; ++j) {
      const int first = j / kLanes * kLanes;
      for (int i = first; i < padded; i += kLanes) {
        store(decay[j] + i, exp_precise((load(steps.c + i) - steps.c[j]) +
                                        (load(steps.c_rest + i) - steps.c_rest[j])));
      }
      for (int i = first; i < j; ++i) decay[j][i] = S(0);
      for (int i = first; i < padded; i += kLanes) {
        store(mix[j] + i, load(decay[j] + i) * load(BC[j] + i));
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

  /// The state after the chunk from the one before; null: from 0. Uses u up.
  void advance(const S* before, S* after, int64_t stride) {
    scale_rows(u, steps.to_end);
    for_each_tile<S>(p.dstate, p.headdim, [&](auto& tile, int64_t n, int64_t k) {
      if (before) tile.add(steps.decay, before + n * stride + k, stride);
      tile.add_product(B[0] + n, 1, B.stride, u[0] + k, u.stride, chunk.count);
      tile.store(after + n * stride + k, stride);
    });
  }

  void scale_rows(Matrix<S>& m, const S* factors) const {
    for (int i = 0; i < chunk.count; ++i) {
      for (int64_t k = 0; k < p.headdim; k += kLanes) store(m[i] + k, factors[i] * load(m[i] + k));
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
  using Base::chunk, Base::item, Base::p;

  Matrix<S> D;       // (head, headdim)
  Matrix<S> states;  // (head and state, headdim)
  Matrix<S> z;       // (token, headdim)

  Forward(const SsdChunkScanParams& params, int64_t heads)
      : Base(params),
        D(heads, p.headdim),
        states(heads * round_up(p.dstate, kTileRows), p.headdim),
        z(kChunk, p.headdim) {}

  S* state(int64_t h) { return states[h * round_up(p.dstate, kTileRows)]; }

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
      for (int64_t h = 0; h < item.heads; ++h) run_head(h, from_zero);
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

}  // namespace mamba_ssm::kernels::MAMBA_SSM_ISA
