// Argument checks: the one place where a wrong call is refused, before anything is written.
//
// Every message names the op, the argument, what was expected and what came:
//   selective_scan: B must have shape (batch, groups, dstate, seqlen) = (2, 1, 16, 64),
//   got (2, 1, 64, 16)
//
// The checks are templates over the kind of tensor, so that real kernels (stable-ABI tensors, sizes
// are int64_t) and Meta kernels (at::Tensor, sizes are SymInt) state each contract once, in X.h. An
// Access names the kind: types Tensor and Size, and the few things that are asked of a tensor.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace mamba_ssm::ops {

using torch::headeronly::ScalarType;

inline bool is_complex(ScalarType type) {
  return type == ScalarType::ComplexFloat || type == ScalarType::ComplexDouble;
}

/// Type of sums and states of a call whose activations have type T.
inline ScalarType accumulate_type(ScalarType T) {
  return T == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline ScalarType complex_of(ScalarType real) {
  return real == ScalarType::Double ? ScalarType::ComplexDouble : ScalarType::ComplexFloat;
}

inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another type";
  }
}

/// The checks of one call of `op`. The first tensor fixes the device of all others.
template <class Access>
class Checks {
 public:
  using Tensor = typename Access::Tensor;
  using Size = typename Access::Size;

  /// A dimension as it is named in messages, with the size that the call requires; one that is not
  /// `present` is passed over in a shape.
  struct Dim {
    const char* name;
    Size size;
    bool present = true;
  };

  Checks(const char* op, const char* first_name, const Tensor& first)
      : op_(op), first_name_(first_name), first_(first) {}

  const char* op() const { return op_; }

  /// Throws "<op>: <message>".
  [[noreturn]] void fail(const std::string& message) const {
    throw std::runtime_error(std::string(op_) + ": " + message);
  }

  /// `tensor` is on the device of the call. Part of rank() and shape().
  void device(const char* name, const Tensor& tensor) const {
    const std::string expected = Access::device(first_), got = Access::device(tensor);
    if (expected != got) {
      fail(std::string(name) + " must be on the device of " + first_name_ + ", " + expected +
           ", got " + got);
    }
  }

  /// Rank of `tensor` is one of `ranks`; `shapes` says in words what they mean.
  void rank(const char* name, const Tensor& tensor, std::initializer_list<int64_t> ranks,
            const char* shapes) const {
    device(name, tensor);
    for (int64_t rank : ranks) {
      if (tensor.dim() == rank) return;
    }
    fail(std::string(name) + " must have shape " + shapes + ", got " + text_of(tensor));
  }

  /// `tensor` has at least one axis, which counts `last`.
  void has_axis(const char* name, const Tensor& tensor, const char* last) const {
    device(name, tensor);
    if (tensor.dim() < 1) {
      fail(std::string(name) + " must have shape (..., " + last + "), got " + text_of(tensor));
    }
  }

  /// `tensor` has the shape of `other`, or that without its last axis.
  void shape_of(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other,
                bool without_last = false) const {
    device(name, tensor);
    const int64_t rank = other.dim() - (without_last ? 1 : 0);
    bool same = tensor.dim() == rank;
    for (int64_t i = 0; same && i < rank; ++i) {
      same = Access::size(tensor, i) == Access::size(other, i);
    }
    if (same) return;
    fail(std::string(name) + " must have the shape of " + other_name +
         (without_last ? " without its last axis, " : ", ") + text_of(other, rank) + ", got " +
         text_of(tensor));
  }

  /// Sizes of `tensor` are those of `dims`.
  void shape(const char* name, const Tensor& tensor, std::initializer_list<Dim> dims) const {
    device(name, tensor);
    bool same = true;
    int64_t rank = 0;
    for (const Dim& dim : dims) {
      if (!dim.present) continue;
      same = same && rank < tensor.dim() && Access::size(tensor, rank) == dim.size;
      ++rank;
    }
    if (same && rank == tensor.dim()) return;
    std::ostringstream names, sizes;
    const char* separator = "";
    for (const Dim& dim : dims) {
      if (!dim.present) continue;
      names << separator << dim.name;
      sizes << separator << dim.size;
      separator = ", ";
    }
    fail(std::string(name) + " must have shape (" + names.str() + ") = (" + sizes.str() +
         "), got " + text_of(tensor));
  }

  /// Type of `tensor` is one of `types`.
  void dtype(const char* name, const Tensor& tensor,
             std::initializer_list<ScalarType> types) const {
    std::string expected;
    for (ScalarType type : types) {
      if (tensor.scalar_type() == type) return;
      const std::string name_of_type = name_of(type);
      if (expected.find(name_of_type) == std::string::npos) {
        expected += (expected.empty() ? "" : " or ") + name_of_type;
      }
    }
    fail(std::string(name) + " must have dtype " + expected + ", got " +
         name_of(tensor.scalar_type()));
  }

  /// T: float32, float16, bfloat16 or float64.
  void activation(const char* name, const Tensor& tensor) const {
    dtype(name, tensor,
          {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Double});
  }

  /// A parameter of a call with activations T: float32, float16, bfloat16, or float64 with T.
  void parameter(const char* name, const Tensor& tensor, ScalarType T) const {
    if (T == ScalarType::Double) {
      dtype(name, tensor, {ScalarType::Double});
    } else {
      dtype(name, tensor, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
    }
  }

  /// `tensor` is written in place: no two of its elements may be one in memory.
  void writable(const char* name, const Tensor& tensor) const {
    for (int64_t i = 0; i < tensor.dim(); ++i) {
      if (Access::stride(tensor, i) == 0 && Access::size(tensor, i) > 1) {
        fail(std::string(name) + " is written in place and must not be expanded, got stride 0 in " +
             "dimension " + std::to_string(i) + " of " + text_of(tensor));
      }
    }
  }

  /// `result` is where an op writes what belongs to `of`, one of its arguments: it is like that,
  /// and there where that is.
  void result(const char* name, const std::optional<Tensor>& result, const char* of_name,
              const std::optional<Tensor>& of) const {
    if (result.has_value() != of.has_value()) {
      fail(std::string(name) + " must be given where " + of_name + " is, and only there");
    }
    if (!of) return;
    shape_of(name, *result, of_name, *of);
    dtype(name, *result, {of->scalar_type()});
    writable(name, *result);
  }

  /// int32 or int64.
  void index(const char* name, const Tensor& tensor) const {
    dtype(name, tensor, {ScalarType::Int, ScalarType::Long});
  }

  /// Dimension i of `tensor`, called `dim`, is at least `least`.
  void at_least(const char* name, const Tensor& tensor, const char* dim, int64_t i,
                const Size& least) const {
    if (Access::size(tensor, i) < least) {
      std::ostringstream text;
      text << name << " must have " << dim << " >= " << least << ", got " << text_of(tensor);
      fail(text.str());
    }
  }

  /// `groups` of `name` divide `total`, the dimension `dim` of another argument.
  void divides(const char* name, const char* groups_name, const Size& groups, const char* dim,
               const Size& total) const {
    if (groups < 1 || total % groups != 0) {
      std::ostringstream text;
      text << name << " must have " << groups_name << " dividing " << dim << " = " << total
           << ", got " << groups_name << " = " << groups;
      fail(text.str());
    }
  }

  /// "(2, 16)".
  static std::string text_of(const Tensor& tensor) { return text_of(tensor, tensor.dim()); }

  /// Its first `rank` axes.
  static std::string text_of(const Tensor& tensor, int64_t rank) {
    std::ostringstream text;
    text << "(";
    for (int64_t i = 0; i < rank; ++i) text << (i ? ", " : "") << Access::size(tensor, i);
    text << ")";
    return text.str();
  }

 private:
  const char* op_;
  const char* first_name_;
  const Tensor& first_;
};

}  // namespace mamba_ssm::ops
