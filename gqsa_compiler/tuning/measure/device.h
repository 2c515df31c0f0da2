// Where kernels run, and what a run of calls takes there: this machine's CPU, or a GPU.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "tvm_api.h"

namespace measure {

class Device {
 public:
  virtual ~Device() = default;
  virtual DLDevice id() const = 0;
  // Memory full of zeros. Kernels ask early for what is a little behind its end: it can be read.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void release(void* memory) = 0;
  virtual void put(void* to, const void* from, std::size_t bytes) = 0;
  // Waits for all work.
  virtual void get(void* to, const void* from, std::size_t bytes) = 0;
  virtual void copy(void* to, const void* from, std::size_t bytes) = 0;
  virtual void fill(void* to, int byte, std::size_t bytes) = 0;
  // Seconds of what `work` calls.
  virtual double time(const std::function<void()>& work) = 0;
  // Bytes of weights to go through before any is read again, if so many are wanted.
  virtual std::size_t rotated(std::size_t wanted) const { return wanted; }
};

class Cpu : public Device {
 public:
  DLDevice id() const override { return {kDLCPU, 0}; }

  void* allocate(std::size_t bytes) override {
    const std::size_t all = (bytes + kSpare + kAlign - 1) / kAlign * kAlign;
    void* memory = std::aligned_alloc(kAlign, all);
    if (memory == nullptr) fail("not enough memory");
    return std::memset(memory, 0, all);
  }

  void release(void* memory) override { std::free(memory); }
  void put(void* to, const void* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
  void get(void* to, const void* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
  void copy(void* to, const void* from, std::size_t bytes) override {
    std::memcpy(to, from, bytes);
  }
  void fill(void* to, int byte, std::size_t bytes) override { std::memset(to, byte, bytes); }

  double time(const std::function<void()>& work) override {
    const auto begin = std::chrono::steady_clock::now();
    work();
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
    return spent.count();
  }

 private:
  static constexpr std::size_t kAlign = 64;
  static constexpr std::size_t kSpare = 1 << 16;
};

// The first GPU, through NVIDIA's driver and CUDA's runtime library, both loaded by name. Work is
// timed by events around the replay of a graph: what starting a kernel takes on the CPU, which may
// be more than the kernel does, is not in it. Before the replay the second-level cache is written
// over.
class Gpu : public Device {
 public:
  static constexpr int kLeastDriver = 13000;  // that TVM's runtime was built with

  // The folder may have a libcudart.so.13 to be used; else the system's is.
  explicit Gpu(const string& folder) {
    void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (driver == nullptr) {
      fail("This machine has no NVIDIA driver (libcuda.so.1 cannot be loaded), so nothing can be "
           "measured on a GPU.");
    }
    int (*initialise)(unsigned) = nullptr;
    int (*driver_version)(int*) = nullptr;
    look_up(driver, "cuInit", initialise);
    look_up(driver, "cuDriverGetVersion", driver_version);
    look_up(driver, "cuDeviceGetName", device_name_);
    int known = 0;
    if (initialise(0) != 0 || driver_version(&known) != 0) {
      fail("NVIDIA's driver finds no GPU here; see what nvidia-smi says.");
    }
    if (known < kLeastDriver) {
      fail("NVIDIA's driver is too old: it knows CUDA " + version(known) + " and " +
           version(kLeastDriver) + " is needed; install driver 580 or later.");
    }
    void* library = dlopen((folder + "/libcudart.so.13").c_str(), RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) library = dlopen("libcudart.so.13", RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) {
      fail("CUDA's runtime library libcudart.so.13 cannot be loaded; install it (pip install "
           "nvidia-cuda-runtime) and name its folder in LD_LIBRARY_PATH.");
    }
    look_up_all(library);
    check(set_device_(0), "cudaSetDevice");
    check(make_stream_(&stream_, kNonBlocking), "cudaStreamCreateWithFlags");
    check(make_event_(&begin_), "cudaEventCreate");
    check(make_event_(&end_), "cudaEventCreate");
    cache_ = static_cast<std::size_t>(attribute(kCacheBytes));
    flushed_ = allocate(kCaches * cache_);
  }

  DLDevice id() const override { return {kDLCUDA, 0}; }
  void* stream() const { return stream_; }

  void* allocate(std::size_t bytes) override {
    void* memory = nullptr;
    check(malloc_(&memory, std::max<std::size_t>(bytes, 1)), "cudaMalloc");
    fill(memory, 0, bytes);
    return memory;
  }

  void release(void* memory) override { free_(memory); }

  void put(void* to, const void* from, std::size_t bytes) override {
    check(memcpy_(to, from, bytes, kToDevice), "cudaMemcpy");
    wait();
  }

  void get(void* to, const void* from, std::size_t bytes) override {
    wait();
    check(memcpy_(to, from, bytes, kToHost), "cudaMemcpy");
  }

  void copy(void* to, const void* from, std::size_t bytes) override {
    check(memcpy_(to, from, bytes, kOnDevice), "cudaMemcpy");
    wait();
  }

  void fill(void* to, int byte, std::size_t bytes) override {
    check(memset_(to, byte, bytes), "cudaMemset");
    wait();
  }

  double time(const std::function<void()>& work) override {
    wait();
    void* graph = nullptr;
    void* ready = nullptr;
    check(begin_capture_(stream_, kRelaxed), "cudaStreamBeginCapture");
    try {
      work();
    } catch (...) {
      end_capture_(stream_, &graph);
      throw;
    }
    check(end_capture_(stream_, &graph), "cudaStreamEndCapture");
    check(instantiate_(&ready, graph, 0), "cudaGraphInstantiate");
    check(launch_(ready, stream_), "cudaGraphLaunch");  // the first one loads it
    check(memset_async_(flushed_, 0, kCaches * cache_, stream_), "cudaMemsetAsync");
    check(record_(begin_, stream_), "cudaEventRecord");
    check(launch_(ready, stream_), "cudaGraphLaunch");
    check(record_(end_, stream_), "cudaEventRecord");
    wait();
    float milliseconds = 0;
    check(elapsed_(&milliseconds, begin_, end_), "cudaEventElapsedTime");
    check(destroy_ready_(ready), "cudaGraphExecDestroy");
    check(destroy_graph_(graph), "cudaGraphDestroy");
    return milliseconds / 1e3;
  }

  std::size_t rotated(std::size_t wanted) const override {
    return std::max(wanted, kRotatedCaches * cache_);
  }

  string name() const {
    char text[256] = {};
    check(device_name_(text, sizeof(text) - 1, 0), "cuDeviceGetName");
    string found(text);
    for (char& c : found) {
      if (c < ' ' || c > '~' || c == '"' || c == '\\') c = ' ';
    }
    return found;
  }

  int major() const { return attribute(75); }
  int minor() const { return attribute(76); }
  std::size_t cache_bytes() const { return cache_; }

  // Bytes a second, read and written ones, of copies within the GPU's memory.
  double copy_rate() {
    constexpr int times = 8;
    const std::size_t size = std::max<std::size_t>(1 << 20, 8 * cache_);
    void* from = allocate(size);
    void* to = allocate(size);
    const double seconds = time([&] {
      for (int i = 0; i < times; ++i) {
        check(memcpy_async_(to, from, size, kOnDevice, stream_), "cudaMemcpyAsync");
      }
    });
    release(from);
    release(to);
    return 2.0 * static_cast<double>(size) * times / seconds;
  }

 private:
  static constexpr unsigned kNonBlocking = 1;  // cudaStreamNonBlocking
  static constexpr int kToDevice = 1, kToHost = 2, kOnDevice = 3;  // cudaMemcpyKind
  static constexpr int kRelaxed = 2;  // cudaStreamCaptureModeRelaxed: TVM may want scratch
  static constexpr int kCacheBytes = 38;  // cudaDevAttrL2CacheSize
  static constexpr std::size_t kCaches = 2, kRotatedCaches = 3;

  static string version(int number) {
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
  }

  void look_up_all(void* library) {
    look_up(library, "cudaSetDevice", set_device_);
    look_up(library, "cudaDeviceGetAttribute", get_attribute_);
    look_up(library, "cudaDeviceSynchronize", synchronize_);
    look_up(library, "cudaGetErrorString", error_text_);
    look_up(library, "cudaMalloc", malloc_);
    look_up(library, "cudaFree", free_);
    look_up(library, "cudaMemcpy", memcpy_);
    look_up(library, "cudaMemcpyAsync", memcpy_async_);
    look_up(library, "cudaMemset", memset_);
    look_up(library, "cudaMemsetAsync", memset_async_);
    look_up(library, "cudaStreamCreateWithFlags", make_stream_);
    look_up(library, "cudaStreamBeginCapture", begin_capture_);
    look_up(library, "cudaStreamEndCapture", end_capture_);
    look_up(library, "cudaGraphInstantiate", instantiate_);
    look_up(library, "cudaGraphLaunch", launch_);
    look_up(library, "cudaGraphExecDestroy", destroy_ready_);
    look_up(library, "cudaGraphDestroy", destroy_graph_);
    look_up(library, "cudaEventCreate", make_event_);
    look_up(library, "cudaEventRecord", record_);
    look_up(library, "cudaEventElapsedTime", elapsed_);
  }

  void check(int status, const char* what) const {
    if (status == 0) return;
    const char* text = error_text_ == nullptr ? nullptr : error_text_(status);
    fail(string(what) + ": " + (text == nullptr ? std::to_string(status) : text));
  }

  int attribute(int which) const {
    int value = 0;
    check(get_attribute_(&value, which, 0), "cudaDeviceGetAttribute");
    return value;
  }

  // An error of a kernel shows here.
  void wait() const { check(synchronize_(), "cudaDeviceSynchronize"); }

  void *stream_ = nullptr, *begin_ = nullptr, *end_ = nullptr, *flushed_ = nullptr;
  std::size_t cache_ = 0;
  int (*device_name_)(char*, int, int) = nullptr;
  int (*set_device_)(int) = nullptr;
  int (*get_attribute_)(int*, int, int) = nullptr;
  int (*synchronize_)() = nullptr;
  const char* (*error_text_)(int) = nullptr;
  int (*malloc_)(void**, std::size_t) = nullptr;
  int (*free_)(void*) = nullptr;
  int (*memcpy_)(void*, const void*, std::size_t, int) = nullptr;
  int (*memcpy_async_)(void*, const void*, std::size_t, int, void*) = nullptr;
  int (*memset_)(void*, int, std::size_t) = nullptr;
  int (*memset_async_)(void*, int, std::size_t, void*) = nullptr;
  int (*make_stream_)(void**, unsigned) = nullptr;
  int (*begin_capture_)(void*, int) = nullptr;
  int (*end_capture_)(void*, void**) = nullptr;
  int (*instantiate_)(void**, void*, unsigned long long) = nullptr;
  int (*launch_)(void*, void*) = nullptr;
  int (*destroy_ready_)(void*) = nullptr;
  int (*destroy_graph_)(void*) = nullptr;
  int (*make_event_)(void**) = nullptr;
  int (*record_)(void*, void*) = nullptr;
  int (*elapsed_)(float*, void*, void*) = nullptr;
};

}  // namespace measure
