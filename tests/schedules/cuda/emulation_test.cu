// What the emulation's own tests run: right kernels and wrong ones, as TVM would write them.
#include <cuda_fp16.h>
#define uint unsigned int
#define uchar unsigned char
extern "C" __global__ void __launch_bounds__(64) reverse(float* __restrict__ out);
extern "C" __global__ void __launch_bounds__(64) warp_total(float* __restrict__ out);
extern "C" __global__ void __launch_bounds__(64) last_block(uint* __restrict__ count, float* __restrict__ out);
extern "C" __global__ void __launch_bounds__(64) early_exit(float* __restrict__ out);
extern "C" __global__ void __launch_bounds__(64) two_barriers(float* __restrict__ out);
extern "C" __global__ void __launch_bounds__(64) lonely_shuffle(float* __restrict__ out);
extern "C" __global__ void __launch_bounds__(64) outside(float* __restrict__ out, int64_t n);
extern "C" __global__ void __launch_bounds__(64) outside_shared(float* __restrict__ out);
extern "C" __global__ void __launch_bounds__(64) no_barrier(float* __restrict__ out);
extern "C" __global__ void __launch_bounds__(64) halves(float* __restrict__ out);
extern "C" __global__ void __launch_bounds__(64) reverse(float* __restrict__ out) {
  extern __shared__ __align__(64) uchar memory[];
  ((float*)memory)[threadIdx.x] = out[blockIdx.x * 64 + threadIdx.x];
  __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = ((float*)memory)[63 - threadIdx.x];
}
extern "C" __global__ void __launch_bounds__(64) warp_total(float* __restrict__ out) {
  float value = out[threadIdx.x];
  for (int lanes = 16; lanes; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes, 32);
  out[threadIdx.x] = value;
}
extern "C" __global__ void __launch_bounds__(64) last_block(uint* __restrict__ count, float* __restrict__ out) {
  extern __shared__ __align__(64) uchar flags[];
  if (threadIdx.x == 0) ((uint*)flags)[0] = atomicInc(count, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (threadIdx.x == 1 && ((uint*)flags)[0]) out[0] += 1;
}
extern "C" __global__ void __launch_bounds__(64) early_exit(float* __restrict__ out) {
  if (threadIdx.x < 32) return;
  __syncthreads();
  out[threadIdx.x] = 7;
}
extern "C" __global__ void __launch_bounds__(64) two_barriers(float* __restrict__ out) {
  if (threadIdx.x < 32) { __syncthreads(); out[0] = 1; } else { __syncthreads(); out[1] = 2; }
}
extern "C" __global__ void __launch_bounds__(64) lonely_shuffle(float* __restrict__ out) {
  if (threadIdx.x % 2) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, out[threadIdx.x], 1, 32);
}
extern "C" __global__ void __launch_bounds__(64) outside(float* __restrict__ out, int64_t n) {
  if (threadIdx.x == 0) out[n] = 1;
}
extern "C" __global__ void __launch_bounds__(64) outside_shared(float* __restrict__ out) {
  extern __shared__ __align__(64) uchar memory[];
  ((float*)memory)[64 + threadIdx.x] = out[0];
}
extern "C" __global__ void __launch_bounds__(64) no_barrier(float* __restrict__ out) {
  extern __shared__ __align__(64) uchar memory[];
  ((float*)memory)[threadIdx.x] = 1;
  out[threadIdx.x] = ((float*)memory)[63 - threadIdx.x];
}
extern "C" __global__ void __launch_bounds__(64) halves(float* __restrict__ out) {
  half2 a = __floats2half2_rn(out[0], out[1]), b = __floats2half2_rn(out[2], out[3]);
  half2 sum = __hfma2(a, b, __floats2half2_rn(1.0f, -1.0f));
  out[4] = __low2float(sum);
  out[5] = __high2float(sum);
  int low, high;
  asm("dp2a.lo.s32.u32 %0, %1, %2, %3;" : "=r"(low) : "r"((5u << 16) | 0xfffdu), "r"(0x0403ff01u), "r"(100));
  asm("dp2a.hi.s32.u32 %0, %1, %2, %3;" : "=r"(high) : "r"((5u << 16) | 0xfffdu), "r"(0x0403ff01u), "r"(100));
  out[6] = low;
  out[7] = high;
  out[8] = __byte_perm(0x40302010u, 0x64656667u, 0x0341) == 0x10406720u;
}
