// What the two norms over rows share: how the rows of a call lie in memory.
#pragma once

#include <cstddef>

#include "types.h"

namespace mamba_ssm::kernels {

/// The leading axes of a call, merged into three. Row r = (i * size[1] + j) * size[2] + k of a
/// View<4> starts at element i * stride[0] + j * stride[1] + k * stride[2]; stride[3] is that of
/// the channels, 0 for a tensor with one value for each row.
struct RowAxes {
  int64_t size[3] = {1, 1, 1};
};

}  // namespace mamba_ssm::kernels
