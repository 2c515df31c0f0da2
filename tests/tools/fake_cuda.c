// A driver for tests: the functions of libcuda.so.1 that tools/cuda_driver.py calls, against the
// real cuda.h, so that the compiler checks their signatures. Memory is the process's own, work is
// done when it is launched or when a graph is. The kernel "add" adds; those called "main_kernel..."
// do nothing.
#include <cuda.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  float* to;
  int count;
  long long value;
  CUdeviceptr copy_to, copy_from;
  size_t bytes;
} Work;

static Work recorded[256];
static int used, capturing, shared_allowed, lost;
static float clock_ms;

static void run(const Work* work) {
  if (work->to) {
    for (int i = 0; i < work->count; ++i) work->to[i] += (float)work->value;
  } else {
    memmove((void*)work->copy_to, (const void*)work->copy_from, work->bytes);
  }
  clock_ms += 0.5f;
}

static CUresult add(Work work) {
  if (!capturing) {
    run(&work);
  } else if (used == 256) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  } else {
    recorded[used++] = work;
  }
  return CUDA_SUCCESS;
}

CUresult CUDAAPI cuInit(unsigned int flags) { return flags ? CUDA_ERROR_INVALID_VALUE : 0; }
CUresult CUDAAPI cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}
CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = (CUcontext)0x7f0011223344;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuCtxSetCurrent(CUcontext context) {
  return context == (CUcontext)0x7f0011223344 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
CUresult CUDAAPI cuCtxSynchronize(void) { return lost ? CUDA_ERROR_ILLEGAL_ADDRESS : 0; }
CUresult CUDAAPI cuStreamCreate(CUstream* stream, unsigned int flags) {
  *stream = (CUstream)0x7f00aabbccdd;
  return flags == CU_STREAM_NON_BLOCKING ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
static CUresult of(CUstream stream) {
  return stream == (CUstream)0x7f00aabbccdd ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}
CUresult CUDAAPI cuGetErrorString(CUresult error, const char** text) {
  if (error != CUDA_ERROR_ILLEGAL_ADDRESS) return CUDA_ERROR_INVALID_VALUE;
  *text = "an illegal memory access was encountered";
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGetName(char* name, int length, CUdevice device) {
  strncpy(name, "Fake GPU", (size_t)length);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDriverGetVersion(int* version) {
  *version = 13010;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemGetInfo(size_t* free, size_t* total) {
  *free = 1ull << 36;
  *total = 1ull << 37;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: *value = 1980000; break;
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: *value = 3201000; break;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *value = 62914560; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)0x7f0055667788;
  return memcmp(image, "\x7f" "ELF\0", 5) ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
}
CUresult CUDAAPI cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  if (module != (CUmodule)0x7f0055667788) return CUDA_ERROR_INVALID_HANDLE;
  const int idle = !strncmp(name, "main_kernel", 11);
  *function = idle ? (CUfunction)0x7f00deadbeef : (CUfunction)0x7f0099887766;
  return !idle && strcmp(name, "add") ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemAlloc(CUdeviceptr* address, size_t bytes) {
  *address = (CUdeviceptr)malloc(bytes);
  return *address ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult CUDAAPI cuMemFree(CUdeviceptr address) {
  free((void*)address);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemcpyHtoD(CUdeviceptr to, const void* from, size_t bytes) {
  memcpy((void*)to, from, bytes);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemcpyDtoH(void* to, CUdeviceptr from, size_t bytes) {
  memcpy(to, (const void*)from, bytes);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream on) {
  Work work = {0, 0, 0, to, from, bytes};
  return of(on) ? of(on) : add(work);
}
CUresult CUDAAPI cuMemsetD8(CUdeviceptr to, unsigned char value, size_t bytes) {
  memset((void*)to, value, bytes);
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
  if (which != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  shared_allowed = value;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuLaunchKernel(CUfunction function, unsigned int gx, unsigned int gy,
                                unsigned int gz, unsigned int bx, unsigned int by, unsigned int bz,
                                unsigned int shared, CUstream stream, void** params, void** extra) {
  if (function == (CUfunction)0x7f00deadbeef) return of(stream);
  if (function != (CUfunction)0x7f0099887766 || extra) return CUDA_ERROR_INVALID_HANDLE;
  if (gx != 7 || gy != 2 || gz != 1 || bx != 64 || by != 1 || bz != 1) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (shared > 49152 && (int)shared > shared_allowed) return CUDA_ERROR_INVALID_VALUE;
  Work work = {*(float**)params[0], *(int*)params[1], *(long long*)params[2], 0, 0, 0};
  if (work.count < 0) lost = 1, work.count = 0;
  return of(stream) ? of(stream) : add(work);
}
CUresult CUDAAPI cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode) {
  capturing = 1, used = 0;
  return mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL ? of(stream) : CUDA_ERROR_INVALID_VALUE;
}
CUresult CUDAAPI cuStreamEndCapture(CUstream stream, CUgraph* graph) {
  capturing = 0;
  *graph = (CUgraph)0x7f0012121212;
  return of(stream);
}
CUresult CUDAAPI cuGraphInstantiate(CUgraphExec* ready, CUgraph graph, unsigned long long flags) {
  *ready = (CUgraphExec)0x7f0013131313;
  return flags || graph != (CUgraph)0x7f0012121212 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult CUDAAPI cuGraphLaunch(CUgraphExec ready, CUstream stream) {
  if (ready != (CUgraphExec)0x7f0013131313) return CUDA_ERROR_INVALID_HANDLE;
  for (int i = 0; i < used; ++i) run(&recorded[i]);
  return of(stream);
}
CUresult CUDAAPI cuGraphExecDestroy(CUgraphExec ready) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuGraphDestroy(CUgraph graph) { return CUDA_SUCCESS; }
CUresult CUDAAPI cuEventCreate(CUevent* event, unsigned int flags) {
  *event = (CUevent)calloc(1, sizeof(float));
  return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult CUDAAPI cuEventRecord(CUevent event, CUstream stream) {
  *(float*)event = clock_ms;
  return of(stream);
}
#undef cuEventElapsedTime  // the first version, which every driver has
CUresult CUDAAPI cuEventElapsedTime(float* ms, CUevent begin, CUevent end) {
  *ms = *(float*)end - *(float*)begin;
  return CUDA_SUCCESS;
}
CUresult CUDAAPI cuEventDestroy(CUevent event) {
  free((void*)event);
  return CUDA_SUCCESS;
}
