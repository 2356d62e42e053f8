// SSD chunk scan on CPU, forward and backward.
//
// Every product of a chunk is a small matrix product, done by one register tile (Tile): rows are
// broadcast numbers, columns are vectors. A chunk is a list of tokens that are not padding, all
// from one sequence; a token that resets the state starts a chunk, so that what was before it takes
// no part in any arithmetic. What a chunk reads is converted to dense matrices first: tokens by
// headdim (x, z, dout), tokens by dstate (B, C). A state is held as (dstate, headdim), in panels.
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

#ifdef __linux__
#include <sys/mman.h>
#endif

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
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

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
        data_(static_cast<S*>(allocate(round_up(rows, kLanes) * stride))) {}
  ~Matrix() { ::operator delete(data_, kAlign); }
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;

  S* operator[](int64_t row) { return data_ + row * stride; }
  const S* operator[](int64_t row) const { return data_ + row * stride; }

 private:
  static constexpr std::align_val_t kAlign{64};

  static void* allocate(int64_t elements) {
    const size_t bytes = static_cast<size_t>(elements) * sizeof(S);
    void* const memory = ::operator new(bytes, kAlign);
#ifdef MADV_HUGEPAGE
    // Megabytes that are read once per pass have more small pages than the processor remembers.
    constexpr size_t kLarge = size_t{1} << 22, kPage = size_t{1} << 16;  // no small page is larger
    if (bytes >= kLarge) {
      const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
      madvise(reinterpret_cast<void*>(begin), bytes - kPage, MADV_HUGEPAGE);
    }
#endif
    return memory;
  }

  /// Whole vectors; not a multiple of 256 bytes, so that columns spread over the sets of a cache.
  static int64_t row_stride(int64_t cols) {
    const int64_t stride = round_up(cols, kLanes);
    return stride * static_cast<int64_t>(sizeof(S)) % 256 == 0 ? stride + kLanes : stride;
  }

  S* data_;
};

/// Rows of a tile, and vectors of one: as many sums as hide the latency of a fused multiply-add and
/// fit into the registers.
constexpr int kTileRows = MAMBA_SSM_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int kTileVectors = 2;
static_assert(kLanes % kTileRows == 0);

/// Columns of a tile.
template <class S>
constexpr int kPanel = MAMBA_SSM_VECTOR_BYTES / sizeof(S) * kTileVectors;

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
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) columns[v] = load_vector(b + k * b_step + v * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        const V x = a[r * a_row + k * a_step] - V{};
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[r][v] = x * columns[v] + sums[r][v];
      }
    }
  }

  /// Element by element: sum = f(sum, row, column).
  template <class F>
  __attribute__((always_inline)) void update(F f) {
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
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
  __attribute__((always_inline)) void multiply(const S* m, int64_t stride) {
    update([&](V sum, int r, int c) { return load_vector(m + r * stride + c) * sum; });
  }
  /// sums = factor * m + sums
  __attribute__((always_inline)) void add(S factor, const S* m, int64_t stride) {
    update([&](V sum, int r, int c) { return factor * load_vector(m + r * stride + c) + sum; });
  }
  /// Lane by lane, the sum of the products of two matrices as large as a tile.
  __attribute__((always_inline)) static V inner_product(const S* a, const S* b, int64_t stride) {
    V total = {};
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = r * stride + v * kWidth;
        total = load_vector(a + at) * load_vector(b + at) + total;
      }
    }
    return total;
  }
  /// to[c] += the sum over r of m[r][c] sums[r][c]
  __attribute__((always_inline)) void add_column_products(const S* m, int64_t stride, S* to) const {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      V total = load_vector(to + v * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        total = load_vector(m + r * stride + v * kWidth) * sums[r][v] + total;
      }
      std::memcpy(to + v * kWidth, &total, sizeof(V));
    }
  }
  __attribute__((always_inline)) void store(S* m, int64_t stride) const {
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        std::memcpy(m + r * stride + v * kWidth, &sums[r][v], sizeof(V));
      }
    }
  }
};

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
  cols = round_up(cols, kLanes);
  int64_t col = 0;
  for (; cols - col >= kPanel<S>; col += kPanel<S>) {
    for_each_tile_of_width<S, kTileVectors>(rows, col, f);
  }
  if (col < cols) for_each_tile_of_width<S, 1>(rows, col, f);
}

/// f(tile, j, i) for zero tiles that together cover the pairs of tokens j <= i < count, and beyond:
/// all i from the vector of token j on.
template <class S, class F>
inline void for_each_causal_tile(int64_t count, F f) {
  for (int64_t first = 0; first < count; first += kLanes) {
    for_each_tile<S>(least(kLanes, count - first), count - first,
                     [&](auto& tile, int64_t j, int64_t i) { f(tile, first + j, first + i); });
  }
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

/// Consecutive work items that are done together, as they read the same B and C: heads
/// [head, head + heads) of one sequence, tokens [begin, end) of batch row b. No result depends on
/// which items are done together.
struct Task {
  int64_t items;
  int64_t sequence, b, begin, end;
  int64_t group, head, heads;
};

/// Heads of a task: those of whole items within a limit, but of one item at least.
int64_t heads_within(int64_t limit, const SsdChunkScanBlocks& blocks) {
  return blocks.block * most(1, least(limit / blocks.block, blocks.per_group));
}

/// The task that starts with item `index` of [index, end). most_heads: see heads_within.
Task task_of(const SsdChunkScanParams& p, const SsdChunkScanBlocks& blocks, int64_t index,
             int64_t end, int64_t most_heads) {
  Task task{};
  task.sequence = index / blocks.per_sequence;
  task.group = index % blocks.per_sequence / blocks.per_group;
  const int64_t block = index % blocks.per_group;
  task.items = least(least(end - index, blocks.per_group - block), most_heads / blocks.block);
  task.head = task.group * blocks.group + block * blocks.block;
  task.heads = least(task.items * blocks.block, blocks.group - block * blocks.block);
  task.b = task.sequence;
  task.end = p.seqlen;
  if (p.cu_seqlens) {
    const auto bound = [&](int64_t i) {
      const int64_t at =
          load_as<int64_t>(p.cu_seqlens.data, p.cu_seqlens.dtype, i * p.cu_seqlens.stride[0]);
      return at < 0 ? 0 : least(at, p.seqlen);
    };
    task.b = 0;
    task.begin = bound(task.sequence);
    task.end = bound(task.sequence + 1);
  }
  return task;
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

inline Chunk chunk_at(const SsdChunkScanParams& p, const Task& task, int64_t begin) {
  Chunk chunk;
  chunk.begin = begin;
  chunk.resets = false;
  chunk.count = 0;
  const uint8_t* const marks = p.marks ? p.marks + task.b * p.seqlen : nullptr;
  int64_t t = begin;
  for (; t < task.end; ++t) {
    const uint8_t mark = marks ? marks[t] : uint8_t{kContinue};
    if (mark == kPadding) continue;
    if (chunk.count == kChunk || (mark == kReset && chunk.count > 0)) break;
    chunk.resets |= mark == kReset;
    chunk.tokens[chunk.count++] = t;
  }
  chunk.end = t;
  return chunk;
}

inline int64_t count_chunks(const SsdChunkScanParams& p, const Task& task) {
  int64_t count = 0;
  for (int64_t t = task.begin; t < task.end; t = chunk_at(p, task, t).end) ++count;
  return count;
}

template <class F>
inline void for_each_padding(const SsdChunkScanParams& p, const Task& task, const Chunk& chunk,
                             F f) {
  if (!p.marks || chunk.end - chunk.begin == chunk.count) return;
  for (int64_t t = chunk.begin; t < chunk.end; ++t) {
    if (p.marks[task.b * p.seqlen + t] == kPadding) f(t);
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
  constexpr int64_t kLine = 64;  // a row may start within one
  const int64_t size = rows.dtype == DType::kFloat32 ? 4 : rows.dtype == DType::kFloat64 ? 8 : 2;
  const char* const row =
      static_cast<const char*>(rows.data) + (rows.offset + token * rows.token_stride) * size;
  const int64_t before = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % kLine);
  for (int64_t at = -before; at < rows.length * size; at += kLine) {
    __builtin_prefetch(row + at, 0, 2);
  }
}

template <class S>
void clear_row(const TokenRows& rows, int64_t token) {
  for (int64_t k = 0; k < rows.length; ++k) {
    store_as(rows.data, rows.dtype, rows.offset + token * rows.token_stride + k * rows.stride,
             S(0));
  }
}

/// A state in memory, (dstate, headdim): panels of kPanel columns, one after the other, so that the
/// rows that a product reads are one run. There are whole tiles of rows.
template <class S>
struct StateLayout {
  int64_t dstate, headdim;

  int64_t rows() const { return round_up(dstate, kTileRows); }
  int64_t size() const { return rows() * round_up(headdim, kPanel<S>); }
  /// Where row n and column k are; the next row is kPanel further.
  int64_t at(int64_t n, int64_t k) const {
    const int64_t in_panel = k % kPanel<S>;
    return (k - in_panel) * rows() + n * kPanel<S> + in_panel;
  }
  /// States that fit into so many bytes.
  int64_t count_in(int64_t bytes) const {
    const int64_t state_bytes = size() * static_cast<int64_t>(sizeof(S));
    return state_bytes > 0 ? bytes / state_bytes : bytes;
  }
};

/// What the states of the heads of a task may take, to stay in the L2 cache, unless one item has
/// more heads.
constexpr int64_t kCachedBytes = int64_t{512} << 10;

/// Prefetches what a tile of a state covers.
template <class S>
inline void prefetch_tile(const S* tile) {
  constexpr int kLine = 64 / sizeof(S);
  for (int i = 0; i < kTileRows * kPanel<S>; i += kLine) __builtin_prefetch(tile + i, 0, 2);
}

/// square(n, k) for the squares of kLanes x kLanes of a state that are runs of float32 in the view,
/// element(n, k) for all other elements of rows x cols.
template <class S, class Square, class Element>
void for_each_part(const View<4>& v, const StateLayout<S>& layout, int64_t rows, int64_t cols,
                   Square square, Element element) {
  const bool runs = sizeof(S) == sizeof(float) && v.dtype == DType::kFloat32 && v.stride[3] == 1;
  const int64_t whole_n = runs ? layout.dstate / kLanes * kLanes : 0;
  const int64_t whole_k = runs ? layout.headdim / kLanes * kLanes : 0;
  for (int64_t k = 0; k < whole_k; k += kLanes) {
    for (int64_t n = 0; n < whole_n; n += kLanes) square(n, k);
  }
  for (int64_t k = 0; k < cols; ++k) {
    for (int64_t n = k < whole_k ? whole_n : 0; n < rows; ++n) element(n, k);
  }
}

/// Loads the state (headdim, dstate) of a view (states, nheads, headdim, dstate), zeros beyond.
template <class S>
void load_state(const View<4>& v, int64_t state, int64_t head, const StateLayout<S>& layout,
                S* to) {
  const int64_t offset = state * v.stride[0] + head * v.stride[1];
  const auto square = [&](int64_t n, int64_t k) {
    if constexpr (sizeof(S) == sizeof(float)) {
      VecF block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] = load(static_cast<const float*>(v.data) + offset + (k + i) * v.stride[2] + n);
      }
      transpose(block);
      for (int i = 0; i < kLanes; ++i) store(to + layout.at(n + i, k), block[i]);
    }
  };
  const auto element = [&](int64_t n, int64_t k) {
    const int64_t from = offset + k * v.stride[2] + n * v.stride[3];
    const bool inside = n < layout.dstate && k < layout.headdim;
    to[layout.at(n, k)] = inside ? load_as<S>(v.data, v.dtype, from) : S(0);
  };
  for_each_part(v, layout, layout.rows(), round_up(layout.headdim, kLanes), square, element);
}

/// The reverse; null stands for a state of zeros.
template <class S>
void store_state(const View<4>& v, int64_t state, int64_t head, const StateLayout<S>& layout,
                 const S* from) {
  const int64_t offset = state * v.stride[0] + head * v.stride[1];
  const auto square = [&](int64_t n, int64_t k) {
    if constexpr (sizeof(S) == sizeof(float)) {
      VecF block[kLanes] = {};
      for (int i = 0; i < kLanes && from; ++i) block[i] = load(from + layout.at(n + i, k));
      transpose(block);
      for (int i = 0; i < kLanes; ++i) {
        store(static_cast<float*>(v.data) + offset + (k + i) * v.stride[2] + n, block[i]);
      }
    }
  };
  const auto element = [&](int64_t n, int64_t k) {
    store_as(v.data, v.dtype, offset + k * v.stride[2] + n * v.stride[3],
             from ? from[layout.at(n, k)] : S(0));
  };
  for_each_part(v, layout, layout.dstate, layout.headdim, square, element);
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
  alignas(64) S d_to_end[kChunk];    // d * to_end
  S decay;                           // from the state before to the state after
};

/// What forward and backward share: the matrices of a chunk, and the state's way through it.
/// Matrices of tokens have rounded-up rows of zeros.
template <class S>
struct Scan {
  using V = Vector<S>;

  const SsdChunkScanParams& p;
  const StateLayout<S> layout;
  Task task{};
  Chunk chunk{};
  int64_t padded = 0;  // tokens of the chunk, up to whole vectors
  Matrix<S> B, C;      // (token, state)
  Matrix<S> Ct;        // (state, token)
  Matrix<S> BC;        // (j, i): B_j . C_i
  Steps<S> steps;
  Matrix<S> x, u;   // (token, headdim); u: scaled x
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
        layout{p.dstate, p.headdim},
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
    return token_rows(v, task.b, head, p.headdim);
  }

  /// The tokens from `begin` on, and B.
  void load_chunk(int64_t begin) {
    chunk = chunk_at(p, task, begin);
    padded = round_up(chunk.count, kLanes);
    load_rows(token_rows(p.B, task.b, task.group, p.dstate), chunk, B);
  }

  /// C, and the products of B and C.
  void load_C() {
    load_rows(token_rows(p.C, task.b, task.group, p.dstate), chunk, C);
    transpose_matrix(C, chunk.count, p.dstate, Ct);
    for_each_causal_tile<S>(chunk.count, [&](auto& tile, int64_t j, int64_t i) {
      tile.add_product(B[j], B.stride, 1, Ct[0] + i, Ct.stride, p.dstate);
      tile.store(BC[j] + i, BC.stride);
    });
  }

  void load_steps(int64_t head) {
    S raw[kChunk];
    const S bias =
        p.dt_bias ? load_as<S>(p.dt_bias.data, p.dt_bias.dtype, head * p.dt_bias.stride[0]) : S(0);
    const int64_t offset = task.b * p.dt.stride[0] + head * p.dt.stride[2];
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
      const V to_end = exp_precise((end - c_i) + (end_rest - rest));
      store(steps.to_end + i, to_end);
      store(steps.d_to_end + i, load(steps.d + i) * to_end);
    }
    steps.decay = exp_precise(V{} + end)[0];
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

  /// y from the state before the chunk (null: 0) and the head's row of D.
  void read_out(const S* state, const S* D) {
    scale_rows(x, steps.d, u);
    for_each_tile<S>(chunk.count, p.headdim, [&](auto& tile, int64_t i, int64_t k) {
      if (state) {
        tile.add_product(C[i], C.stride, 1, state + layout.at(0, k), kPanel<S>, p.dstate);
        tile.scale_rows(steps.from_start + i);
      }
      tile.add_product(mix[0] + i, 1, mix.stride, u[0] + k, u.stride,
                       least(i + kTileRows, chunk.count));
      tile.update([&](auto sum, int r, int c) {
        return tile.load_vector(D + k + c) * tile.load_vector(x[i + r] + k + c) + sum;
      });
      tile.store(y[i] + k, y.stride);
    });
  }

  /// After head h of the chunk comes the next one, or the first one in the chunk at next_chunk.
  void plan(int64_t h, int64_t next_chunk) {
    const bool last = h + 1 == task.heads;
    next.head = task.head + (last ? 0 : h + 1);
    next.token = last ? next_chunk : chunk.begin;
  }

  /// Prefetches what comes next, in parts: one with each tile of a state, by where this one is.
  /// Runs of headdim elements a token apart are too short for the hardware to foresee.
  void prefetch_next(int64_t tile) const {
    const int64_t first = next.token + kChunk * tile / layout.size();
    const int64_t last = next.token + kChunk * (tile + kTileRows * kPanel<S>) / layout.size();
    for (const View<4>* tensor : next.tensors) {
      if (!tensor || !*tensor) continue;
      for (int64_t t = first; t < last && t < task.end; ++t) {
        prefetch_row(rows(*tensor, next.head), t);
      }
    }
  }

  /// The state after the chunk from the one before; null: from 0.
  void advance(const S* before, S* after) {
    scale_rows(x, steps.d_to_end, u);
    for_each_tile<S>(p.dstate, p.headdim, [&](auto& tile, int64_t n, int64_t k) {
      const int64_t at = layout.at(n, k);
      prefetch_next(at);
      if (after != before) prefetch_tile(after + at + 4 * kTileRows * kPanel<S>);
      tile.add_product(B[0] + n, 1, B.stride, u[0] + k, u.stride, chunk.count);
      if (before) tile.add(steps.decay, before + at, kPanel<S>);
      tile.store(after + at, kPanel<S>);
    });
  }

  void scale_rows(const Matrix<S>& m, const S* factors, Matrix<S>& to) const {
    for (int i = 0; i < padded; ++i) {
      for (int64_t k = 0; k < p.headdim; k += kLanes) {
        store(to[i] + k, factors[i] * load(m[i] + k));
      }
    }
  }

  /// Row h of the matrix is D of head task.head + h; zeros without D.
  void load_D(Matrix<S>& D) const {
    for (int64_t h = 0; h < task.heads; ++h) {
      for (int64_t k = 0; k < round_up(p.headdim, kLanes); ++k) {
        D[h][k] = p.D && k < p.headdim
                      ? load_as<S>(p.D.data, p.D.dtype,
                                   (task.head + h) * p.D.stride[0] + k * p.D.stride[1])
                      : S(0);
      }
    }
  }
};

// ---- Forward

template <class S>
struct Forward : Scan<S> {
  using Base = Scan<S>;
  using Base::chunk, Base::layout, Base::p, Base::task;

  const int64_t most_heads;  // of a task
  Matrix<S> D;               // (head, headdim)
  Matrix<S> states;          // (head, state)
  Matrix<S> z;               // (token, headdim)

  Forward(const SsdChunkScanParams& params, const SsdChunkScanBlocks& blocks)
      : Base(params),
        most_heads(heads_within(layout.count_in(kCachedBytes), blocks)),
        D(most_heads, p.headdim),
        states(most_heads, layout.size()),
        z(kChunk, p.headdim) {
    Base::next = {0, 0, {&p.x, &p.z, &p.out}};
  }

  void run(const Task& work) {
    task = work;
    Base::load_D(D);
    int64_t initial;
    bool from_zero = !initial_state_of(p, task.sequence, &initial);
    for (int64_t h = 0; h < task.heads && !from_zero; ++h) {
      load_state(p.initial_states, initial, task.head + h, layout, states[h]);
    }
    for (int64_t begin = task.begin; begin < task.end; begin = chunk.end) {
      Base::load_chunk(begin);
      Base::load_C();
      from_zero |= chunk.resets;
      for (int64_t h = 0; h < task.heads; ++h) {
        Base::plan(h, chunk.end);
        run_head(h, from_zero);
      }
      from_zero = false;
    }
    for (int64_t h = 0; h < task.heads; ++h) {
      store_state(p.final_states, task.sequence, task.head + h, layout,
                  from_zero ? nullptr : states[h]);
    }
  }

  void run_head(int64_t h, bool from_zero) {
    const int64_t head = task.head + h;
    const S* const before = from_zero ? nullptr : states[h];
    Base::load_steps(head);
    load_rows(Base::rows(p.x, head), chunk, Base::x);
    Base::mix_tokens();
    Base::read_out(before, D[h]);
    store_out(h);
    Base::advance(before, states[h]);
  }

  void store_out(int64_t h) {
    const TokenRows out = Base::rows(p.out, task.head + h);
    if (p.z) load_rows(Base::rows(p.z, task.head + h), chunk, z);
    for (int i = 0; i < chunk.count; ++i) {
      S* const y = Base::y[i];
      for (int64_t k = 0; k < p.headdim && p.z; k += kLanes) {
        store(y + k, load(y + k) * silu(load(z[i] + k)));
      }
      store_row(out, chunk.tokens[i], y);
    }
    for_each_padding(p, task, chunk, [&](int64_t t) { clear_row<S>(out, t); });
  }
};

// ---- Backward

/// Bytes of states that a task keeps at a time, unless one item has so many that segments of a
/// square root of them take more.
constexpr int64_t kKeptBytes = int64_t{16} << 20;

/// Gradients of a task. Its chunks are divided into segments. The state before each segment is
/// computed first; then, from the last segment to the first, the states before its chunks, and the
/// gradients of these in reverse.
template <class S>
struct Backward : Scan<S> {
  using Base = Scan<S>;
  using Base::chunk, Base::layout, Base::p, Base::padded, Base::steps, Base::task;
  using V = Vector<S>;

  const SsdChunkScanBlocks blocks;
  const SsdChunkScanWorkspace at;
  S* const workspace;
  const int64_t most_heads;     // of a task
  const int64_t segment;        // chunks of a segment
  Matrix<int64_t> begins;       // (1, chunk)
  Matrix<S> states;             // (slot and head, state): see slot_of
  Matrix<S> dstates;            // (head, state): gradient of the state after, before a chunk
  Matrix<S> D;                  // (head, headdim)
  Matrix<double> dD;            // (head, headdim)
  Matrix<double> dA, ddt_bias;  // (1, head)
  // Of a chunk.
  Matrix<S> Bt;                   // (state, token)
  Matrix<S> dBt, dCt;             // (state, token): through the states, sum over a block of heads
  Matrix<S> dBC;                  // (j, i): gradient of B_j . C_i, sum over a block of heads
  Matrix<S> dtokens;              // (token, state): dB or dC
  const S* next_state = nullptr;  // the one that comes next, to be prefetched
  // Of a chunk of one head.
  Matrix<S> z, dy, du;  // (token, headdim); dz in place of z
  Matrix<S> xt, dyt;    // (headdim, token)
  Matrix<S> pairs;      // (j, i): gradient of c_i - c_j
  S dd[kChunk];         // gradient of d as factor of x
  S at_start[kChunk];   // gradient of c_i as exponent of Steps::from_start
  S at_end[kChunk];     // gradient of -c_j as exponent of Steps::to_end

  Backward(const SsdChunkScanParams& params, int64_t most_chunks, void* memory)
      : Base(params),
        blocks(ssd_chunk_scan_bwd_blocks(params)),
        at(ssd_chunk_scan_bwd_layout(params)),
        workspace(static_cast<S*>(memory)),
        most_heads(heads_of(most_chunks)),
        segment(segment_of(most_chunks)),
        begins(1, most_chunks),
        states((ceil_div(most_chunks, segment) + segment) * most_heads, layout.size()),
        dstates(most_heads, layout.size()),
        D(most_heads, p.headdim),
        dD(most_heads, p.headdim),
        dA(1, most_heads),
        ddt_bias(1, most_heads),
        Bt(p.dstate, kChunk),
        dBt(p.dstate, kChunk),
        dCt(p.dstate, kChunk),
        dBC(kChunk, kChunk),
        dtokens(kChunk, p.dstate),
        z(kChunk, p.headdim),
        dy(kChunk, p.headdim),
        du(kChunk, p.headdim),
        xt(p.headdim, kChunk),
        dyt(p.headdim, kChunk),
        pairs(kChunk, kChunk) {}

  /// As many heads as need no more than one segment.
  int64_t heads_of(int64_t chunks) const {
    const int64_t kept = layout.count_in(kKeptBytes) / most(1, chunks);
    return heads_within(least(kept, layout.count_in(kCachedBytes)), blocks);
  }

  int64_t segment_of(int64_t chunks) const {
    int64_t segment = least(chunks, layout.count_in(kKeptBytes) / most_heads);
    while (segment * segment < chunks) ++segment;
    return most(1, segment);
  }

  S* state(int64_t slot, int64_t h) { return states[slot * task.heads + h]; }

  /// Where the state before chunk c is. The first slots are for the first chunks of segments, the
  /// others for the other chunks of the segment at hand.
  int64_t slot_of(int64_t c, int64_t segments) const {
    return c % segment == 0 ? c / segment : segments + c % segment;
  }

  void run(const Task& work) {
    task = work;
    Base::load_D(D);
    for (int64_t h = 0; h < task.heads; ++h) {
      dA[0][h] = ddt_bias[0][h] = 0;
      for (int64_t k = 0; k < p.headdim; ++k) dD[h][k] = 0;
    }
    int64_t chunks = 0;
    for (int64_t begin = task.begin; begin < task.end; begin = chunk.end) {
      chunk = chunk_at(p, task, begin);
      begins[0][chunks++] = begin;
    }
    const int64_t segments = ceil_div(chunks, segment);
    int64_t initial;
    const bool has_initial = initial_state_of(p, task.sequence, &initial);
    for (int64_t h = 0; h < task.heads && has_initial && chunks > 0; ++h) {
      load_state(p.initial_states, initial, task.head + h, layout, state(0, h));
    }
    const auto from_zero = [&](int64_t c) { return chunk.resets || (c == 0 && !has_initial); };
    const auto advance = [&](int64_t c, int64_t slot_before, int64_t slot_after) {
      Base::load_chunk(begins[0][c]);
      for (int64_t h = 0; h < task.heads; ++h) {
        Base::plan(h, chunk.end);
        Base::load_steps(task.head + h);
        load_rows(Base::rows(p.x, task.head + h), chunk, Base::x);
        Base::advance(from_zero(c) ? nullptr : state(slot_before, h), state(slot_after, h));
      }
    };
    Base::next = {0, 0, {&p.x}};
    for (int64_t c = 0; c < (segments - 1) * segment; ++c) {
      advance(c, c / segment + (c % segment == 0 ? 0 : 1), c / segment + 1);
    }

    bool no_gradient = !p.dfinal_states;  // the gradient of the state after the chunk is 0
    for (int64_t h = 0; h < task.heads && !no_gradient; ++h) {
      load_state(p.dfinal_states, task.sequence, task.head + h, layout, dstates[h]);
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
        for (int64_t h = 0; h < task.heads; ++h) {
          if (h % blocks.block == 0) clear_sums();
          Base::plan(h, c > 0 ? begins[0][c - 1] : task.end);
          next_state = h + 1 < task.heads ? state(slot_of(c, segments), h + 1)
                       : c > s * segment  ? state(slot_of(c - 1, segments), 0)
                                          : nullptr;
          run_head(h, from_zero(c) ? nullptr : state(slot_of(c, segments), h),
                   no_gradient ? nullptr : dstates[h]);
          if ((h + 1) % blocks.block == 0 || h + 1 == task.heads) store_sums(h / blocks.block);
        }
        no_gradient = chunk.resets;
      }
    }
    store_task(has_initial, initial, no_gradient);
  }

  void load_chunk(int64_t begin) {
    Base::load_chunk(begin);
    Base::load_C();
    transpose_matrix(Base::B, chunk.count, p.dstate, Bt);
  }

  /// state, dstate: of the state before the chunk, and the gradient of the one after; null: 0.
  void run_head(int64_t h, const S* state, const S* dstate) {
    const int64_t head = task.head + h;
    Base::load_steps(head);
    load_rows(Base::rows(p.x, head), chunk, Base::x);
    transpose_matrix(Base::x, chunk.count, p.headdim, xt);
    Base::mix_tokens();
    load_dy(h, state);
    transpose_matrix(dy, chunk.count, p.headdim, dyt);
    pair_gradients();
    input_gradients(dstate);
    store_inputs(h);
    state_gradients(state, dyt, steps.from_start, Base::Ct, dCt, at_start);
    state_gradients(dstate, xt, steps.d_to_end, Bt, dBt, at_end);
    store_steps(h, chunk.resets ? S(0) : retreat(state, dstate, dstates[h]));
  }

  /// dy; with z also dz, from y.
  void load_dy(int64_t h, const S* state) {
    const int64_t head = task.head + h;
    load_rows(Base::rows(p.dout, head), chunk, dy);
    if (!p.z) return;
    load_rows(Base::rows(p.z, head), chunk, z);
    Base::read_out(state, D[h]);
    const TokenRows dz = Base::rows(p.dz, head);
    for (int i = 0; i < chunk.count; ++i) {
      for (int64_t k = 0; k < p.headdim; k += kLanes) {
        const V y_i = load(Base::y[i] + k), dout_i = load(dy[i] + k), z_i = load(z[i] + k);
        store(dy[i] + k, dout_i * silu(z_i));
        store(z[i] + k, dout_i * y_i * silu_slope(z_i));
      }
      store_row(dz, chunk.tokens[i], z[i]);
    }
    for_each_padding(p, task, chunk, [&](int64_t t) { clear_row<S>(dz, t); });
  }

  /// Starts the sums over the heads of a block.
  void clear_sums() {
    for (int64_t n = 0; n < layout.rows(); ++n) {
      for (int64_t i = 0; i < padded; ++i) dBt[n][i] = dCt[n][i] = S(0);
    }
    for (int64_t j = 0; j < padded; ++j) {
      for (int64_t i = 0; i < padded; ++i) dBC[j][i] = S(0);
    }
  }

  /// Gradients of decay and BC, whose product is mix.
  void pair_gradients() {
    for_each_causal_tile<S>(chunk.count, [&](auto& tile, int64_t j, int64_t i) {
      tile.add_product(Base::x[j], Base::x.stride, 1, dyt[0] + i, dyt.stride, p.headdim);
      tile.scale_rows(steps.d + j);
      auto dBC_tile = tile;
      tile.multiply(Base::mix[j] + i, Base::mix.stride);
      tile.store(pairs[j] + i, pairs.stride);
      dBC_tile.multiply(Base::decay[j] + i, Base::decay.stride);
      dBC_tile.add(S(1), dBC[j] + i, dBC.stride);
      dBC_tile.store(dBC[j] + i, dBC.stride);
    });
  }

  /// du, the gradient of u.
  void input_gradients(const S* dstate) {
    for_each_tile<S>(chunk.count, p.headdim, [&](auto& tile, int64_t j, int64_t k) {
      if (dstate) {
        tile.add_product(Base::B[j], Base::B.stride, 1, dstate + layout.at(0, k), kPanel<S>,
                         p.dstate);
        tile.scale_rows(steps.to_end + j);
      }
      tile.add_product(Base::mix[j] + j, Base::mix.stride, 1, dy[j] + k, dy.stride,
                       chunk.count - j);
      tile.store(du[j] + k, du.stride);
    });
  }

  /// Tokens couple to a state through Mt: adds factors_i state tokens_i to gradient column i, and
  /// leaves its product with column i of Mt, the gradient of the factor's exponent, in dexponent.
  void state_gradients(const S* state, const Matrix<S>& tokens, const S* factors,
                       const Matrix<S>& Mt, Matrix<S>& gradient, S* dexponent) {
    for (int i = 0; i < padded; ++i) dexponent[i] = S(0);
    if (!state) return;
    for_each_tile<S>(p.dstate, padded, [&](auto& tile, int64_t n, int64_t i) {
      for (int64_t k = 0; k < p.headdim; k += kPanel<S>) {
        tile.add_product(state + layout.at(n, k), kPanel<S>, 1, tokens[k] + i, tokens.stride,
                         least(kPanel<S>, p.headdim - k));
      }
      tile.add_column_products(Mt[n] + i, Mt.stride, dexponent + i);
      tile.update([&](auto sum, int r, int c) {
        return tile.load_vector(factors + i + c) * sum + tile.load_vector(gradient[n + r] + i + c);
      });
      tile.store(gradient[n] + i, gradient.stride);
    });
    for (int i = 0; i < padded; ++i) dexponent[i] *= factors[i];
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

  /// dx, and the sums of products with x: dd over the channels, dD over time.
  void store_inputs(int64_t h) {
    const TokenRows dx = Base::rows(p.dx, task.head + h);
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
    for_each_padding(p, task, chunk, [&](int64_t t) { clear_row<S>(dx, t); });
  }

  /// ddt and its sums over time. ddecay: the gradient of the exponent of Steps::decay, in which
  /// the d A of all tokens are.
  void store_steps(int64_t h, S ddecay) {
    const int64_t head = task.head + h;
    alignas(64) S dstep_pairs[kChunk];
    sum_pairs(dstep_pairs);
    const double A = load_as<double>(p.A.data, p.A.dtype, head * p.A.stride[0]);
    const int64_t offset = task.b * p.ddt.stride[0] + head * p.ddt.stride[2];
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
    for_each_padding(p, task, chunk, [&](int64_t t) { store_ddt(t, 0); });
  }

  /// The gradient of the state before the chunk, from that of the one after (null: 0). Returns the
  /// gradient of the exponent of Steps::decay.
  S retreat(const S* state, const S* after, S* before) {
    Base::scale_rows(dy, steps.from_start, Base::u);
    Native<S> product = {};
    for_each_tile<S>(p.dstate, p.headdim, [&](auto& tile, int64_t n, int64_t k) {
      const int64_t at = layout.at(n, k);
      Base::prefetch_next(at);
      if (next_state) prefetch_tile(next_state + at);
      tile.add_product(Base::C[0] + n, 1, Base::C.stride, Base::u[0] + k, Base::u.stride,
                       chunk.count);
      if (after) {
        tile.add(steps.decay, after + at, kPanel<S>);
        if (state) product += tile.inner_product(state + at, after + at, kPanel<S>);
      }
      tile.store(before + at, kPanel<S>);
    });
    S total = 0;
    for (int i = 0; i < kNativeLanes<S>; ++i) total += product[i];
    return steps.decay * total;
  }

  /// The partial sums of dB and dC of the chunk's tokens over a block of the task's heads.
  void store_sums(int64_t block) {
    transpose_matrix(dCt, p.dstate, padded, dtokens);
    for_each_tile<S>(chunk.count, p.dstate, [&](auto& tile, int64_t i, int64_t n) {
      tile.add(S(1), dtokens[i] + n, dtokens.stride);
      tile.add_product(dBC[0] + i, 1, dBC.stride, Base::B[0] + n, Base::B.stride,
                       least(i + kTileRows, chunk.count));
      tile.store(dtokens[i] + n, dtokens.stride);
    });
    store_partial_sums(block, at.dC);
    transpose_matrix(dBt, p.dstate, padded, dtokens);
    for_each_tile<S>(chunk.count, p.dstate, [&](auto& tile, int64_t j, int64_t n) {
      tile.add(S(1), dtokens[j] + n, dtokens.stride);
      tile.add_product(dBC[j] + j, dBC.stride, 1, Base::C[j] + n, Base::C.stride, chunk.count - j);
      tile.store(dtokens[j] + n, dtokens.stride);
    });
    store_partial_sums(block, at.dB);
  }

  void store_partial_sums(int64_t block, int64_t sums) const {
    block += task.group * blocks.per_group + (task.head - task.group * blocks.group) / blocks.block;
    S* const rows = workspace + sums + (task.b * blocks.per_sequence + block) * p.seqlen * p.dstate;
    const size_t bytes = static_cast<size_t>(p.dstate) * sizeof(S);
    for (int i = 0; i < chunk.count; ++i) {
      std::memcpy(rows + chunk.tokens[i] * p.dstate, dtokens[i], bytes);
    }
    for_each_padding(p, task, chunk,
                     [&](int64_t t) { std::memset(rows + t * p.dstate, 0, bytes); });
  }

  void store_task(bool has_initial, int64_t initial, bool no_gradient) {
    for (int64_t h = 0; h < task.heads; ++h) {
      const int64_t head = task.head + h, row = task.sequence * p.nheads + head;
      workspace[at.dA + row] = static_cast<S>(dA[0][h]);
      workspace[at.ddt_bias + row] = static_cast<S>(ddt_bias[0][h]);
      for (int64_t k = 0; k < p.headdim && p.dD; ++k) {
        workspace[at.dD + row * p.headdim + k] = static_cast<S>(dD[h][k]);
      }
      if (has_initial && p.dinitial_states) {
        store_state(p.dinitial_states, initial, head, layout, no_gradient ? nullptr : dstates[h]);
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
    Forward<decltype(type)> forward(p, blocks);
    for (Task task; begin < end; begin += task.items) {
      task = task_of(p, blocks, begin, end, forward.most_heads);
      forward.run(task);
    }
  });
}

void ssd_chunk_scan_bwd_cpu(const SsdChunkScanParams& p, void* workspace, int64_t begin,
                            int64_t end) noexcept {
  const SsdChunkScanBlocks blocks = ssd_chunk_scan_bwd_blocks(p);
  int64_t most_chunks = 0;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t chunks = count_chunks(p, task_of(p, blocks, i, end, blocks.block));
    if (chunks > most_chunks) most_chunks = chunks;
  }
  with_type(p, [&](auto type) {
    Backward<decltype(type)> backward(p, most_chunks, workspace);
    for (Task task; begin < end; begin += task.items) {
      task = task_of(p, blocks, begin, end, backward.most_heads);
      backward.run(task);
    }
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
