#include <cuda_bf16.h>
__global__ void probe(__nv_bfloat16* x) { *x = 1.f; }
