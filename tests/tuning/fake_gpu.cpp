// A GPU for tests: the functions of libcuda.so.1 and libcudart.so.13 that TVM's runtime and the
// measuring program call, against CUDA's own headers, so that the compiler checks their signatures.
// Memory is the process's own. A kernel is a program made by tests/schedules/cuda/emulation, run
// when it is launched; of a graph the first replay runs, the others only take time. Every launch
// takes 10 us.
//
// "Machine code" is a text: the program's path, then a line for each kernel: its name and, of each
// parameter, p (pointer), i (int), l (64-bit integer) or f (float).
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace {

struct Kernel {
  std::string path, kinds;
  std::int64_t index;
};

struct Graph {
  std::vector<std::function<void()>> work;
  bool ran = false;
};

std::map<char*, std::size_t> allocated;
std::map<std::string, Kernel> kernels;
Graph* captured = nullptr;
double clock_ms = 0;
cudaError_t last = cudaSuccess;

void add(std::function<void()> work) {
  if (captured != nullptr) {
    captured->work.push_back(std::move(work));
  } else {
    work();
    clock_ms += 0.01;
  }
}

// The bytes from an address to the end of what was allocated.
std::size_t rest(char* at) {
  auto found = allocated.upper_bound(at);
  if (found == allocated.begin()) return 0;
  --found;
  const auto inside = static_cast<std::size_t>(at - found->first);
  return inside < found->second ? found->second - inside : 0;
}

void emulate(const Kernel& kernel, const std::vector<std::int64_t>& sizes,
             const std::vector<std::int64_t>& values) {
  std::vector<std::int64_t> words, bytes;
  std::vector<char*> arrays;
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (kernel.kinds[i] == 'p') {
      words.insert(words.end(), {1, static_cast<std::int64_t>(arrays.size())});
      arrays.push_back(reinterpret_cast<char*>(values[i]));
      bytes.push_back(static_cast<std::int64_t>(rest(arrays.back())));
    } else {
      words.insert(words.end(), {0, values[i]});
    }
  }
  std::vector<std::int64_t> head{kernel.index, 0};
  head.insert(head.end(), sizes.begin(), sizes.end());
  head.insert(head.end(), {static_cast<std::int64_t>(arrays.size()),
                           static_cast<std::int64_t>(values.size())});
  const std::string in = "/tmp/fake-gpu-" + std::to_string(getpid()), out = in + ".out";
  std::ofstream stream(in, std::ios::binary);
  for (const auto* some : {&head, &words, &bytes}) {
    stream.write(reinterpret_cast<const char*>(some->data()),
                 static_cast<std::streamsize>(some->size() * 8));
  }
  for (std::size_t i = 0; i < arrays.size(); ++i) stream.write(arrays[i], bytes[i]);
  stream.close();
  if (std::system((kernel.path + " < " + in + " > " + out).c_str()) != 0) {
    last = cudaErrorIllegalAddress;
  } else {
    std::ifstream results(out, std::ios::binary);
    for (std::size_t i = 0; i < arrays.size(); ++i) results.read(arrays[i], bytes[i]);
  }
  std::remove(in.c_str());
  std::remove(out.c_str());
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) {
  const char* told = std::getenv("FAKE_GPU_DRIVER");
  *version = told == nullptr ? 13010 : std::atoi(told);
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* count) {
  *count = 1;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char* name, int length, CUdevice) {
  std::snprintf(name, static_cast<std::size_t>(length), "Fake GPU 90GB");
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  *value = which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 9 : 0;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult, const char** text) {
  *text = "CUDA_ERROR";
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "an error";
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  std::istringstream lines(static_cast<const char*>(image));
  std::string path, name, kinds;
  if (!std::getline(lines, path)) return CUDA_ERROR_INVALID_IMAGE;
  auto* found = new std::map<std::string, Kernel>;
  for (std::int64_t i = 0; lines >> name >> kinds; ++i) (*found)[name] = {path, kinds, i};
  *module = reinterpret_cast<CUmodule>(found);
  return found->empty() ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  auto& known = *reinterpret_cast<std::map<std::string, Kernel>*>(module);
  const auto found = known.find(name);
  if (found == known.end()) return CUDA_ERROR_NOT_FOUND;
  *function = reinterpret_cast<CUfunction>(&found->second);
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** params,
                          void**) {
  // What goes to another stream than the one that is recorded is no part of the graph.
  if (config->hStream != reinterpret_cast<CUstream>(&clock_ms)) return CUDA_ERROR_INVALID_HANDLE;
  const Kernel& kernel = *reinterpret_cast<Kernel*>(function);
  std::vector<std::int64_t> values;
  for (std::size_t i = 0; i < kernel.kinds.size(); ++i) {
    std::int64_t value = 0;
    if (kernel.kinds[i] == 'i') {
      value = *static_cast<std::int32_t*>(params[i]);
    } else {
      std::memcpy(&value, params[i], kernel.kinds[i] == 'f' ? 4 : 8);
    }
    values.push_back(value);
  }
  std::vector<std::int64_t> sizes{config->gridDimX,  config->gridDimY,  config->gridDimZ,
                                  config->blockDimX, config->blockDimY, config->blockDimZ,
                                  config->sharedMemBytes};
  add([=, &kernel] { emulate(kernel, sizes, values); });
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
  std::memset(found, 0, sizeof *found);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrL2CacheSize              ? 4096
           : which == cudaDevAttrComputeCapabilityMajor ? 9
                                                        : 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return captured == nullptr ? last : cudaErrorNotPermitted; }
const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory"
         : error == cudaErrorIllegalAddress ? "an illegal memory access was encountered"
                                            : "an error";
}
cudaError_t cudaGetLastError() { return last; }
cudaError_t cudaPeekAtLastError() { return last; }
cudaError_t cudaMalloc(void** memory, std::size_t bytes) {
  const char* most = std::getenv("FAKE_GPU_BYTES");
  std::size_t used = bytes;
  for (const auto& one : allocated) used += one.second;
  if (most != nullptr && used > static_cast<std::size_t>(std::atoll(most))) {
    return cudaErrorMemoryAllocation;
  }
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  allocated[static_cast<char*>(*memory)] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  allocated.erase(static_cast<char*>(memory));
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMallocHost(void** memory, std::size_t bytes) {
  *memory = std::malloc(bytes);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *free = *total = std::size_t{1} << 36;
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  add([=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, std::size_t bytes,
                                cudaStream_t) {
  add([=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, std::size_t bytes) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  add([=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = reinterpret_cast<cudaStream_t>(&clock_ms);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return cudaStreamCreate(stream);
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaDeviceSynchronize(); }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (stream == nullptr) return cudaErrorStreamCaptureUnsupported;
  captured = new Graph;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = reinterpret_cast<cudaGraph_t>(captured);
  captured = nullptr;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* ready, cudaGraph_t graph, unsigned long long) {
  *ready = reinterpret_cast<cudaGraphExec_t>(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t ready, cudaStream_t) {
  auto& graph = *reinterpret_cast<Graph*>(ready);
  for (const auto& work : graph.work) {
    if (!graph.ran) work();
    clock_ms += 0.01;
  }
  graph.ran = true;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = reinterpret_cast<cudaEvent_t>(new double(0));
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<double*>(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  *reinterpret_cast<double*>(event) = clock_ms;
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
  *ms = static_cast<float>(*reinterpret_cast<double*>(end) - *reinterpret_cast<double*>(begin));
  return cudaSuccess;
}
}
