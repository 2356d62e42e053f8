// Chooses the CPU kernels for the machine that the process runs on.
#include "cpu.h"

namespace mamba_ssm::kernels {

// Defined by cpu_table.cpp, once per instruction set that the build made.
namespace baseline {
extern const CpuKernels kKernels;
}
#ifdef MAMBA_SSM_HAVE_AVX2
namespace avx2 {
extern const CpuKernels kKernels;
}
#endif
#ifdef MAMBA_SSM_HAVE_AVX512
namespace avx512 {
extern const CpuKernels kKernels;
}
#endif

namespace {

// The conditions name what the build's compiler flags let the compiler use.

#ifdef MAMBA_SSM_HAVE_AVX2
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
#endif
#ifdef MAMBA_SSM_HAVE_AVX512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

struct Tables {
  const CpuKernels* usable[3];  // widest last
  int count = 0;

  Tables() {
    usable[count++] = &baseline::kKernels;
#ifdef MAMBA_SSM_HAVE_AVX2
    if (has_avx2()) usable[count++] = &avx2::kKernels;
#endif
#ifdef MAMBA_SSM_HAVE_AVX512
    if (has_avx2() && has_avx512()) usable[count++] = &avx512::kKernels;
#endif
  }
};

const Tables& tables() {
  static const Tables instance;
  return instance;
}

}  // namespace

const CpuKernels& cpu_kernels() { return *tables().usable[tables().count - 1]; }

const CpuKernels* const* all_cpu_kernels(int* count) {
  *count = tables().count;
  return tables().usable;
}

}  // namespace mamba_ssm::kernels
