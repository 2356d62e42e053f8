// Causal depthwise convolution on CPU: forward, backward, decode.
//
// A vector holds one token of kLanes neighboring channels. A tile of the input goes to scratch as
// (token, channel), in the type that sums run in, transposed on the way if the layout asks for it:
// one loop serves every layout, seq_idx decides for whole vectors, and the sums of dweight and
// dbias stay in their lanes. That loop, correlate(), is the convolution, and with the taps reversed
// also the gradient of its input; with da = dout silu'(a),
//
//   a[t]       = bias + sum_k weight[k] x[t-(width-1)+k]      da = 0 outside of the row
//   dx[s]      = sum_k weight[k] da[s+(width-1)-k]            dinitial_states is dx at s < 0
//   dweight[k] = sum_t da[t] x[t-(width-1)+k]                 dbias = sum_t da[t]
//
// It takes kTaps taps at a time, so that scratch does not grow with the width. Nothing is carried
// from tile to tile: each fetches, and the backward computes, the few tokens around it again.
#include "causal_conv1d_cpu.h"

#include "cpu.h"
#include "simd.h"

namespace mamba_ssm::kernels::MAMBA_SSM_ISA {
namespace {

constexpr int kTaps = 4;
static_assert(kConvMinUnit % kLanes == 0 && kConvMaxUnit % kLanes == 0);

inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

/// f(T{}) for the element type that `dtype` names and sums of S serve.
template <class S, class F>
inline void with_element(DType dtype, F f) {
  if constexpr (sizeof(S) == sizeof(double)) {
    f(double{});
  } else if (dtype == DType::kFloat32) {
    f(float{});
  } else if (dtype == DType::kFloat16) {
    f(Half{});
  } else {
    f(BFloat16{});
  }
}

/// f(S{}) for the type that sums run in.
template <class F>
inline void with_accumulate(DType dtype, F f) {
  if (dtype == DType::kFloat64) {
    f(double{});
  } else {
    f(float{});
  }
}

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

/// f(Count<taps>{}) for 1 <= taps <= kTaps.
template <class F>
inline void with_taps(int taps, F f) {
  static_assert(kTaps == 4);
  switch (taps) {
    case 1:
      return f(Count<1>{});
    case 2:
      return f(Count<2>{});
    case 3:
      return f(Count<3>{});
    default:
      return f(Count<4>{});
  }
}

// ---- Tensors and tiles

/// The tokens of one row, from some channel on; no data: zeros. Offset and strides count elements.
struct Plane {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t offset = 0, channel_stride = 0, token_stride = 0;

  explicit operator bool() const { return data != nullptr; }
  Plane at(int64_t t) const {
    return {data, dtype, offset + t * token_stride, channel_stride, token_stride};
  }
};

inline Plane plane(const View<3>& v, int64_t row, int64_t channel) {
  return {v.data, v.dtype, row * v.stride[0] + channel * v.stride[1], v.stride[1], v.stride[2]};
}

constexpr int kPrefetchBytes = 512;  // ahead of a row that is read along its tokens

/// tile[t][c] = from[c][t], 0 for the channels that fill up the last vector.
template <class T>
void load_elements(const Plane& from, int channels, int tokens, int pitch, Accumulate<T>* tile) {
  const T* src = static_cast<const T*>(from.data) + from.offset;
  int c = 0, t = 0;  // what is left of channels and tokens to single elements
  if (from.channel_stride == 1 && channels >= kLanes) {
    c = channels / kLanes * kLanes;
    for (int i = 0; i < tokens; ++i) {
      const T* token = src + i * from.token_stride;
      for (int j = 0; j < c; j += kLanes) {
        __builtin_prefetch(token + j + tokens * from.token_stride);
        store(tile + i * pitch + j, load(token + j));
      }
    }
  } else if constexpr (sizeof(T) <= sizeof(float)) {
    if (from.token_stride == 1) {
      t = tokens / kLanes * kLanes;
      for (int j = 0; j < channels; j += kLanes) {
        const T* rows = src + j * from.channel_stride;
        const int count = channels - j < kLanes ? channels - j : kLanes;
        for (int i = 0; i < t; i += kLanes) {
          VecF x[kLanes];
          for (int k = 0; k < kLanes; ++k) {
            const T* row = rows + k * from.channel_stride + i;
            __builtin_prefetch(row + kPrefetchBytes / sizeof(T));
            x[k] = k < count ? load(row) : VecF{};
          }
          transpose(x);
          for (int k = 0; k < kLanes; ++k) store(tile + (i + k) * pitch + j, x[k]);
        }
      }
    }
  }
  const int padded = (channels + kLanes - 1) / kLanes * kLanes;
  for (int i = t; i < tokens; ++i) {
    for (int j = c; j < channels; ++j) {
      tile[i * pitch + j] = to_accumulate(src[j * from.channel_stride + i * from.token_stride]);
    }
    for (int j = channels; j < padded; ++j) tile[i * pitch + j] = 0;
  }
}

/// to[c][t] = tile[t][c]
template <class T>
void store_elements(const Plane& to, int channels, int tokens, int pitch,
                    const Accumulate<T>* tile) {
  T* dst = static_cast<T*>(to.data) + to.offset;
  int c = 0, t = 0;  // as in load_elements
  if (to.channel_stride == 1 && channels >= kLanes) {
    c = channels / kLanes * kLanes;
    for (int i = 0; i < tokens; ++i) {
      T* token = dst + i * to.token_stride;
      for (int j = 0; j < c; j += kLanes) store(token + j, load(tile + i * pitch + j));
    }
  } else if constexpr (sizeof(T) <= sizeof(float)) {
    if (to.token_stride == 1) {
      t = tokens / kLanes * kLanes;
      for (int j = 0; j < channels; j += kLanes) {
        T* rows = dst + j * to.channel_stride;
        const int count = channels - j < kLanes ? channels - j : kLanes;
        for (int i = 0; i < t; i += kLanes) {
          VecF x[kLanes];
          for (int k = 0; k < kLanes; ++k) x[k] = load(tile + (i + k) * pitch + j);
          transpose(x);
          for (int k = 0; k < count; ++k) store(rows + k * to.channel_stride + i, x[k]);
        }
      }
    }
  }
  for (int i = t; i < tokens; ++i) {
    for (int j = c; j < channels; ++j) {
      dst[j * to.channel_stride + i * to.token_stride] = from_accumulate<T>(tile[i * pitch + j]);
    }
  }
}

template <class S>
void zero_tile(int tokens, int pitch, S* tile) {
  for (int i = 0; i < tokens * pitch; ++i) tile[i] = S(0);
}

template <class S>
void load_tile(const Plane& from, int channels, int tokens, int pitch, S* tile) {
  if (!from) return zero_tile(tokens, pitch, tile);
  with_element<S>(from.dtype, [&](auto element) {
    load_elements<decltype(element)>(from, channels, tokens, pitch, tile);
  });
}

template <class S>
void store_tile(const Plane& to, int channels, int tokens, int pitch, const S* tile) {
  with_element<S>(to.dtype, [&](auto element) {
    store_elements<decltype(element)>(to, channels, tokens, pitch, tile);
  });
}

/// One token of all channels, bit for bit.
void copy_token(const Plane& from, const Plane& to, int64_t channels) {
  const auto copy = [&](auto element) {
    using T = decltype(element);
    const T* src = static_cast<const T*>(from.data) + from.offset;
    T* dst = static_cast<T*>(to.data) + to.offset;
    for (int64_t c = 0; c < channels; ++c) {
      dst[c * to.channel_stride] = from ? src[c * from.channel_stride] : T{};
    }
  };
  with_accumulate(to.dtype, [&](auto sum) { with_element<decltype(sum)>(to.dtype, copy); });
}

// ---- Rows

constexpr int kMaxWindow = kConvMaxTokens + 2 * (kTaps - 1);  // tokens, halos included

/// The sequences of a packed row. Tokens before the row belong to the first of them; padding, and
/// what is behind the row, to none. Without seq_idx everything is one sequence.
class Sequences {
 public:
  explicit Sequences(int64_t seqlen) : seqlen_(seqlen), last_(seqlen - 1) {}
  Sequences(const View<2>& seq_idx, int64_t b, int64_t seqlen)
      : ids_(seq_idx), offset_(b * seq_idx.stride[0]), seqlen_(seqlen), last_(seqlen - 1) {
    if (!ids_) return;
    while (last_ >= 0 && id(last_) < 0) --last_;
    int64_t t = 0;
    while (t < last_ && id(t) < 0) ++t;
    first_id_ = last_ < 0 ? -1 : id(t);
  }

  int64_t seqlen() const { return seqlen_; }

  /// The last token that is not padding, -1 if there is none.
  int64_t last() const { return last_; }

  /// True if token t belongs to the sequence that the row ends in.
  bool continues(int64_t t) const { return !ids_ || id(t) == id(last_); }

  /// Bit j of bits[r]: tokens t + r and s + r + j are of one sequence; r < tokens, j < taps.
  void compare(int64_t t, int64_t s, int tokens, int taps, uint8_t* bits) const {
    if (!ids_) {
      std::memset(bits, (1 << taps) - 1, tokens);
      return;
    }
    int64_t targets[kMaxWindow], sources[kMaxWindow];
    fetch(t, tokens, targets);
    fetch(s, tokens + taps - 1, sources);
    for (int r = 0; r < tokens; ++r) {
      int same = 0;
      for (int j = 0; j < taps; ++j) same |= (sources[r + j] == targets[r]) << j;
      bits[r] = static_cast<uint8_t>(targets[r] >= 0 ? same : 0);
    }
  }

 private:
  int64_t id(int64_t t) const {
    if (t < 0) return first_id_;
    if (t >= seqlen_) return -1;
    return load_as<int64_t>(ids_.data, ids_.dtype, offset_ + t * ids_.stride[1]);
  }
  void fetch(int64_t t, int count, int64_t* ids) const {
    for (int i = 0; i < count; ++i) ids[i] = id(t + i);
  }

  View<2> ids_;
  int64_t offset_ = 0, first_id_ = 0;
  int64_t seqlen_, last_;
};

/// One row of the input, extended to the left by what came before.
struct Row {
  int64_t b;
  Sequences sequences;
  Plane x;        // tokens t >= 0
  Plane history;  // tokens t < 0: token t is column (start + t) mod columns
  int64_t start = 0, columns = 0;

  Plane at(int64_t t) const {
    if (t >= 0) return x.at(t);
    const int64_t column = start + t;
    return history ? history.at(column < 0 ? column + columns : column) : Plane{};
  }
};

// ---- The loops over a tile

/// acc[r] += sum_j weight[j] in[r + j] over the taps j whose bit is set in bits[r].
template <int kCount, class S>
void correlate(const S* in, const S* weight, int weight_pitch, const uint8_t* bits, int tokens,
               int channels, int pitch, S* acc) {
  using V = Vector<S>;
  constexpr int kAll = (1 << kCount) - 1;
  for (int c = 0; c < channels; c += kLanes) {
    V w[kCount];
    for (int j = 0; j < kCount; ++j) w[j] = load(weight + j * weight_pitch + c);
    for (int r = 0; r < tokens; ++r) {
      const S* window = in + r * pitch + c;
      V sum = load(acc + r * pitch + c);
      if (bits[r] == kAll) {
        for (int j = 0; j < kCount; ++j) sum = sum + w[j] * load(window + j * pitch);
      } else {
        for (int j = 0; j < kCount; ++j) {
          if (bits[r] >> j & 1) sum = sum + w[j] * load(window + j * pitch);
        }
      }
      store(acc + r * pitch + c, sum);
    }
  }
}

/// sums[j] += sum_r terms(r, c)[j] for the tokens r of a tile, where add_terms(r, c, V[kCount])
/// adds the terms of the vector at channel c. In three levels, since in a long sum of like terms
/// each loses what lies below the last place of the sum: kRun tokens, a tile, and in float64 all
/// tiles.
template <int kCount, class S, class F>
inline void add_sums(int tokens, int channels, int pitch, double* sums, F add_terms) {
  using V = Vector<S>;
  constexpr int kRun = 16;
  for (int c = 0; c < channels; c += kLanes) {
    V tile_sums[kCount] = {};
    for (int begin = 0; begin < tokens; begin += kRun) {
      const int end = begin + kRun < tokens ? begin + kRun : tokens;
      V run_sums[kCount] = {};
      for (int r = begin; r < end; ++r) add_terms(r, c, run_sums);
      for (int j = 0; j < kCount; ++j) tile_sums[j] = tile_sums[j] + run_sums[j];
    }
    for (int j = 0; j < kCount; ++j) {
      for (int i = 0; i < kLanes; ++i) sums[j * pitch + c + i] += tile_sums[j][i];
    }
  }
}

/// A unit of channels and the tile that is in work on it.
template <class S>
class Unit {
  using V = Vector<S>;

 public:
  /// Channels from `channel` on, `pitch` of them or the last ones.
  Unit(const View<2>& weight, const View<1>& bias, int64_t dim, int64_t width, bool silu,
       int64_t channel, int pitch)
      : weights_{weight.data, weight.dtype, channel * weight.stride[0], weight.stride[0],
                 weight.stride[1]},
        width_(width),
        silu_(silu),
        channels_(static_cast<int>(minimum(pitch, dim - channel))),
        pitch_(pitch) {
    load_tile({bias.data, bias.dtype, channel * bias.stride[0], bias.stride[0], 0}, channels_, 1,
              pitch, bias_);
  }

  int channels() const { return channels_; }

  /// out of tokens [t, t + tokens) of the row; at most a tile.
  void outputs(const Row& row, int64_t t, int tokens, const Plane& out) {
    preactivations(row, t, tokens);
    for_each_vector(tokens, [&](int r, int i) {
      const V a = load(a_ + i);
      store(a_ + i, bits_[r] == 0 ? V{} : silu_ ? silu(a) : a);
    });
    store_tile(out.at(t), channels_, tokens, pitch_, a_);
  }

  /// dx of tokens [t, t + tokens), of the extended row: at most a tile. Leaves their da.
  void input_gradients(const Row& row, const Plane& dout, const Plane& dfinal_states, int64_t t,
                       int tokens, const Plane& dx) {
    zero_tile(tokens, pitch_, dx_);
    if (dfinal_states) {
      const int64_t last = row.sequences.last(), first = last - (width_ - 2);
      for (int64_t s = maximum(first, t); s <= minimum(last, t + tokens - 1); ++s) {
        if (!row.sequences.continues(s)) continue;
        load_tile(dfinal_states.at(s - first), channels_, 1, pitch_, dx_ + (s - t) * pitch_);
      }
    }
    for (int64_t k = 0; k < width_; k += kTaps) {
      const int taps = taps_from(k);
      const int64_t s = t + width_ - k - taps;  // the last block of taps starts at t
      output_gradients(row, dout, s, tokens + taps - 1);
      row.sequences.compare(t, s, tokens, taps, dx_bits_);
      load_weights(k);
      with_taps(taps, [&](auto count) {
        correlate<count.value>(da_, weight_ + (taps - 1) * pitch_, -pitch_, dx_bits_, tokens,
                               channels_, pitch_, dx_);
      });
    }
    store_tile(dx, channels_, tokens, pitch_, dx_);
  }

  /// da of tokens [t, t + tokens), which may lie outside of the row; at most a tile and kTaps - 1.
  void output_gradients(const Row& row, const Plane& dout, int64_t t, int tokens) {
    const int64_t begin = maximum(t, 0), end = minimum(t + tokens, row.sequences.seqlen());
    const int inside = static_cast<int>(maximum(end - begin, 0));
    const int before = inside > 0 ? static_cast<int>(begin - t) : tokens;
    zero_tile(before, pitch_, da_);
    zero_tile(tokens - before - inside, pitch_, da_ + (before + inside) * pitch_);
    if (inside == 0) return;
    S* const da = da_ + before * pitch_;
    load_tile(dout.at(begin), channels_, inside, pitch_, da);
    if (silu_) {
      preactivations(row, begin, inside);
    } else {
      load_window(row, begin, inside, last_taps());
    }
    for_each_vector(inside, [&](int r, int i) {
      if (bits_[r] == 0) {
        store(da + i, V{});
      } else if (silu_) {
        store(da + i, load(da + i) * silu_slope(load(a_ + i)));
      }
    });
  }

  /// Adds what tokens [t, t + tokens), whose da are in scratch, give to dweight from tap k on.
  void add_dweight(const Row& row, int64_t t, int tokens, int64_t k, double* sums) {
    load_window(row, t, tokens, k);
    with_taps(taps_from(k), [&](auto count) {
      constexpr int kAll = (1 << count.value) - 1;
      add_sums<count.value, S>(tokens, channels_, pitch_, sums, [&](int r, int c, V* terms) {
        const V d = load(da_ + r * pitch_ + c);
        for (int j = 0; j < count.value; ++j) {
          if (bits_[r] == kAll || (bits_[r] >> j & 1)) {
            terms[j] = terms[j] + d * load(x_ + (r + j) * pitch_ + c);
          }
        }
      });
    });
  }
  void add_dbias(int tokens, double* sums) const {
    add_sums<1, S>(tokens, channels_, pitch_, sums,
                   [&](int r, int c, V* term) { *term = *term + load(da_ + r * pitch_ + c); });
  }

  int taps_from(int64_t k) const { return static_cast<int>(minimum(kTaps, width_ - k)); }

 private:
  /// First tap of the last block of them.
  int64_t last_taps() const { return (width_ - 1) / kTaps * kTaps; }

  /// f(token, offset in a tile) for the vectors of a tile.
  template <class F>
  void for_each_vector(int tokens, F f) const {
    for (int r = 0; r < tokens; ++r) {
      for (int c = 0; c < channels_; c += kLanes) f(r, r * pitch_ + c);
    }
  }

  /// a_ of tokens [t, t + tokens) of the row; afterwards bits_[r] == 0 tells padding.
  void preactivations(const Row& row, int64_t t, int tokens) {
    for_each_vector(tokens, [&](int r, int i) { store(a_ + i, load(bias_ + i - r * pitch_)); });
    for (int64_t k = 0; k < width_; k += kTaps) {
      load_window(row, t, tokens, k);
      load_weights(k);
      with_taps(taps_from(k), [&](auto count) {
        correlate<count.value>(x_, weight_, pitch_, bits_, tokens, channels_, pitch_, a_);
      });
    }
  }

  /// What the taps from k on see of tokens [t, t + tokens), unless it is here already.
  void load_window(const Row& row, int64_t t, int tokens, int64_t k) {
    if (window_.b == row.b && window_.t == t && window_.k == k && window_.tokens >= tokens) return;
    window_ = {row.b, t, k, tokens};
    const int taps = taps_from(k);
    const int64_t s = t - (width_ - 1) + k;
    const int rows = tokens + taps - 1;
    const int before = static_cast<int>(minimum(maximum(-s, 0), rows));
    for (int r = 0; r < before; ++r) {
      load_tile(row.at(s + r), channels_, 1, pitch_, x_ + r * pitch_);
    }
    if (before < rows) {
      load_tile(row.at(s + before), channels_, rows - before, pitch_, x_ + before * pitch_);
    }
    row.sequences.compare(t, s, tokens, taps, bits_);
  }

  /// weight_ of the taps from k on, unless they are here already.
  void load_weights(int64_t k) {
    if (weights_from_ == k) return;
    weights_from_ = k;
    load_tile(weights_.at(k), channels_, taps_from(k), pitch_, weight_);
  }

  struct Window {
    int64_t b, t, k;
    int tokens;
  };

  static constexpr int kHalo = (kTaps - 1) * kConvMaxUnit;
  const Plane weights_;  // taps in place of tokens
  const int64_t width_;
  const bool silu_;
  const int channels_, pitch_;
  int64_t weights_from_ = -1;
  Window window_ = {-1, 0, 0, 0};
  uint8_t bits_[kMaxWindow], dx_bits_[kMaxWindow];  // by token
  alignas(64) S bias_[kConvMaxUnit];                // (channels)
  alignas(64) S weight_[kTaps * kConvMaxUnit];      // (taps, channels)
  alignas(64) S x_[kConvTile + 2 * kHalo];          // (tokens, channels), as the others
  alignas(64) S a_[kConvTile + kHalo];
  alignas(64) S da_[kConvTile + kHalo];
  alignas(64) S dx_[kConvTile];
};

template <class S>
void store_sums(const View<2>& to, int64_t channel, int channels, int64_t k, int taps, int pitch,
                const double* sums) {
  for (int c = 0; c < channels; ++c) {
    for (int j = 0; j < taps; ++j) {
      store_as(to.data, to.dtype, (channel + c) * to.stride[0] + (k + j) * to.stride[1],
               static_cast<S>(sums[j * pitch + c]));
    }
  }
}

// ---- Calls

Row row_of(const CausalConv1dParams& p, int64_t b, int64_t channel) {
  return {b,
          Sequences(p.seq_idx, b, p.seqlen),
          plane(p.x, b, channel),
          plane(p.initial_states, b, channel),
          0,
          p.width - 1};
}

/// Items [begin, end) of forward: they share a unit.
template <class S>
void forward(const CausalConv1dParams& p, const CausalConv1dBlocks& blocks, int64_t unit_index,
             int64_t begin, int64_t end) {
  const int64_t channel = unit_index * blocks.channels;
  Unit<S> unit(p.weight, p.bias, p.dim, p.width, p.silu, channel, blocks.channels);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / blocks.spans, t0 = item % blocks.spans * blocks.span;
    const Row row = row_of(p, b, channel);
    const int64_t t1 = minimum(t0 + blocks.span, p.seqlen);
    for (int64_t t = t0; t < t1; t += blocks.tokens) {
      unit.outputs(row, t, static_cast<int>(minimum(blocks.tokens, t1 - t)),
                   plane(p.out, b, channel));
    }
    if (t0 > 0 || !p.final_states) continue;
    const int64_t first = row.sequences.last() - (p.width - 2);
    for (int64_t column = 0; column < p.width - 1; ++column) {
      const int64_t t = first + column;
      copy_token(row.sequences.continues(t) ? row.at(t) : Plane{},
                 plane(p.final_states, b, channel).at(column), unit.channels());
    }
  }
}

template <class S>
void backward(const CausalConv1dParams& p, const CausalConv1dBlocks& blocks, int64_t unit_index) {
  const int64_t channel = unit_index * blocks.channels;
  Unit<S> unit(p.weight, p.bias, p.dim, p.width, p.silu, channel, blocks.channels);
  // All tokens once for every block of taps; the first time, everything but their dweight as well.
  for (int64_t k = 0; k < p.width; k += kTaps) {
    double dweight[kTaps * kConvMaxUnit] = {}, dbias[kConvMaxUnit] = {};  // (taps, channels)
    for (int64_t b = 0; b < p.batch; ++b) {
      const Row row = row_of(p, b, channel);
      const Plane dout = plane(p.dout, b, channel), dx = plane(p.dx, b, channel);
      const Plane dfinal_states = plane(p.dfinal_states, b, channel);
      const Plane dinitial_states = plane(p.dinitial_states, b, channel);
      const int64_t start = 1 - p.width;  // of initial_states
      for (int64_t t = start; k == 0 && dinitial_states && t < 0; t += blocks.tokens) {
        unit.input_gradients(row, dout, dfinal_states, t,
                             static_cast<int>(minimum(blocks.tokens, -t)),
                             dinitial_states.at(t - start));
      }
      for (int64_t t = 0; t < p.seqlen; t += blocks.tokens) {
        const int tokens = static_cast<int>(minimum(blocks.tokens, p.seqlen - t));
        if (k == 0) {
          unit.input_gradients(row, dout, dfinal_states, t, tokens, dx.at(t));
          unit.add_dbias(tokens, dbias);
        } else {
          unit.output_gradients(row, dout, t, tokens);
        }
        unit.add_dweight(row, t, tokens, k, dweight);
      }
    }
    store_sums<S>(p.dweight, channel, unit.channels(), k, unit.taps_from(k), blocks.channels,
                  dweight);
    if (k == 0 && p.dbias) {
      const View<2> to = {p.dbias.data, p.dbias.dtype, {p.dbias.stride[0], 0}};
      store_sums<S>(to, channel, unit.channels(), 0, 1, blocks.channels, dbias);
    }
  }
}

/// Batch rows [begin, end) of a decode call.
template <class S>
void update(const CausalConv1dUpdateParams& p, int64_t unit_index, int64_t begin, int64_t end) {
  const int64_t channel = unit_index * kConvMaxUnit;
  Unit<S> unit(p.weight, p.bias, p.dim, p.width, p.silu, channel, kConvMaxUnit);
  for (int64_t b = begin; b < end; ++b) {
    const auto index = [&](const View<1>& v) {
      return load_as<int64_t>(v.data, v.dtype, b * v.stride[0]);
    };
    const Plane out = plane(p.out, b, channel);
    const int64_t slot = p.conv_state_indices ? index(p.conv_state_indices) : b;
    if (slot < 0 || slot >= p.num_slots) {
      for (int64_t t = 0; t < p.seqlen; ++t) copy_token(Plane{}, out.at(t), unit.channels());
      continue;
    }
    const int64_t length = p.state_len;
    const bool ring = p.cache_seqlens && length > 0;
    int64_t next = ring ? index(p.cache_seqlens) % length : 0;
    if (next < 0) next += length;
    const Row row = {b,
                     Sequences(p.seqlen),
                     plane(p.x, b, channel),
                     plane(p.conv_state, slot, channel),
                     next,
                     length};
    constexpr int kTokens = kConvTile / kConvMaxUnit;
    for (int64_t t = 0; t < p.seqlen; t += kTokens) {
      unit.outputs(row, t, static_cast<int>(minimum(kTokens, p.seqlen - t)), out);
    }
    // In a ring only the new tokens move; else every column, each before it is overwritten.
    for (int64_t t = p.seqlen - (ring ? minimum(p.seqlen, length) : length); t < p.seqlen; ++t) {
      const int64_t column = ring ? (next + t) % length : t - (p.seqlen - length);
      copy_token(row.at(t), row.history.at(column), unit.channels());
    }
  }
}

/// f(group, begin, end) for the parts of items [begin, end) that lie in groups of `size`, with
/// bounds counted from the start of their group.
template <class F>
void for_each_group(int64_t begin, int64_t end, int64_t size, F f) {
  while (begin < end) {
    const int64_t group = begin / size, first = group * size;
    const int64_t last = minimum(end, first + size);
    f(group, begin - first, last - first);
    begin = last;
  }
}

}  // namespace

void causal_conv1d_fwd_cpu(const CausalConv1dParams& p, int64_t begin, int64_t end) noexcept {
  const CausalConv1dBlocks blocks = causal_conv1d_fwd_blocks(p);
  with_accumulate(p.dtype, [&](auto sum) {
    for_each_group(begin, end, p.batch * blocks.spans, [&](int64_t unit, int64_t i, int64_t j) {
      forward<decltype(sum)>(p, blocks, unit, i, j);
    });
  });
}

void causal_conv1d_bwd_cpu(const CausalConv1dParams& p, int64_t begin, int64_t end) noexcept {
  const CausalConv1dBlocks blocks = causal_conv1d_bwd_blocks(p);
  with_accumulate(p.dtype, [&](auto sum) {
    for (int64_t unit = begin; unit < end; ++unit) backward<decltype(sum)>(p, blocks, unit);
  });
}

void causal_conv1d_update_cpu(const CausalConv1dUpdateParams& p, int64_t begin,
                              int64_t end) noexcept {
  with_accumulate(p.dtype, [&](auto sum) {
    for_each_group(begin, end, p.batch, [&](int64_t unit, int64_t i, int64_t j) {
      update<decltype(sum)>(p, unit, i, j);
    });
  });
}

void causal_conv1d_varlen_states_cpu(const CausalConv1dVarlenStatesParams& p, int64_t begin,
                                     int64_t end) noexcept {
  const auto offset = [&](int64_t i) {
    const int64_t at =
        load_as<int64_t>(p.cu_seqlens.data, p.cu_seqlens.dtype, i * p.cu_seqlens.stride[0]);
    return minimum(maximum(at, 0), p.total_tokens);
  };
  for_each_group(begin, end, p.num_sequences, [&](int64_t unit, int64_t i0, int64_t i1) {
    const int64_t channel = unit * kConvMaxUnit;
    const Plane x = {p.x.data, p.x.dtype, channel * p.x.stride[1], p.x.stride[1], p.x.stride[0]};
    for (int64_t i = i0; i < i1; ++i) {
      const Plane states = plane(p.states, i, channel);
      const int64_t first = offset(i), last = offset(i + 1);
      for (int64_t column = 0; column < p.state_len; ++column) {
        const int64_t t = last - p.state_len + column;
        copy_token(t >= first ? x.at(t) : Plane{}, states.at(column),
                   minimum(kConvMaxUnit, p.dim - channel));
      }
    }
  });
}

}  // namespace mamba_ssm::kernels::MAMBA_SSM_ISA
