// Runs one candidate kernel: checks its results, then times it in turns with the incumbent.
//
//   gqsa-measure FOLDER LIBRARIES
//   gqsa-measure --gpu LIBRARIES        says which GPU there is
//
// FOLDER/job.txt says what to do, a word first in each line (names have no white space):
//
//   device cpu or gpu
//   threads COUNT
//   rotate BYTES                        each kernel reads copies of its weights of so much in all
//   rounds COUNT                        samples of each kernel and token count
//   least SECONDS                       that a sample lasts
//   array NAME FILE TYPE BITS SIZE...   little-endian numbers; TYPE is i, u or f
//   kernel NAME LIBRARY                 first the incumbent, then the candidate
//   case TOKENS ROWS COLUMNS WANTED BOUND
//   call TOKENS KERNEL ARGUMENT...      of a case: arrays' names, @NAME for a rotated one, ! for
//                                       the output
//
// LIBRARIES is the folder of libtvm_ffi.so and libtvm_runtime.so, for a GPU libtvm_runtime_cuda.so
// too; nothing else is needed but, for a GPU, its driver and libcudart.so.13. Standard output has
// one JSON object a line: "gpu", or "wrong", "sample" and last "done"; what fails says so on
// standard error, with exit code 1.
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <memory>

#include "job.h"

namespace {

using namespace measure;

constexpr std::size_t kMostCopies = 2048;

// Copies of a kernel's weights, of so many bytes in all that no cache holds them.
void make_copies(Job& job, Device& device, const Call& call) {
  std::size_t bytes = 1;
  for (const string& name : call.arguments) {
    if (name[0] == '@') bytes += job.array(name.substr(1)).on(device).size();
  }
  const std::size_t wanted = device.rotated(static_cast<std::size_t>(job.rotate)) / bytes + 1;
  const std::size_t count = std::min(wanted, kMostCopies);
  for (const string& name : call.arguments) {
    if (name[0] != '@') continue;
    Array& array = job.array(name.substr(1));
    array.copies.reserve(count);
    while (array.copies.size() < count) {
      Memory memory(device, array.copies[0].size());
      device.copy(memory.data(), array.copies[0].data(), memory.size());
      array.copies.push_back(std::move(memory));
    }
  }
}

// Calls of one kernel with one number of tokens, each on other copies of the weights.
class Runner {
 public:
  Runner(Job& job, Device& device, const Runtime& runtime, const Case& item, const Call& call,
         TVMFFIObjectHandle kernel, Array& output)
      : device_(&device), runtime_(&runtime), function_(kernel) {
    std::size_t copies = 1;
    for (const string& name : call.arguments) {
      if (name[0] == '@') copies = std::max(copies, job.array(name.substr(1)).copies.size());
    }
    tensors_.resize(copies);
    for (std::size_t c = 0; c < copies; ++c) {
      for (const string& name : call.arguments) {
        Array& array = name == "!" ? output : job.array(name[0] == '@' ? name.substr(1) : name);
        tensors_[c].push_back(array.tensor(device, name[0] == '@' ? c : 0));
      }
    }
    if (call.arguments.empty()) fail("a call of " + std::to_string(item.tokens) + " has nothing");
    arguments_.resize(call.arguments.size());
  }

  void once() {
    vector<DLTensor>& tensors = tensors_[next_++ % tensors_.size()];
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      arguments_[i] = {};
      arguments_[i].type_index = kTVMFFIDLTensorPtr;
      arguments_[i].v_ptr = &tensors[i];
    }
    runtime_->call(function_, arguments_);
  }

  // Seconds of a call, the mean of so many.
  double sample(long calls) {
    const double seconds = device_->time([&] {
      for (long i = 0; i < calls; ++i) once();
    });
    return seconds / static_cast<double>(calls);
  }

 private:
  Device* device_;
  const Runtime* runtime_;
  TVMFFIObjectHandle function_;
  vector<vector<DLTensor>> tensors_;
  vector<TVMFFIAny> arguments_;
  std::size_t next_ = 0;
};

// How many times beyond its bound the worst output is; not finite where one is no number.
double worst(Device& device, Array& output, const Array& wanted, const Array& bound) {
  vector<float> found(wanted.bytes.size() / sizeof(float));
  device.get(found.data(), output.copies[0].data(), output.copies[0].size());
  const auto* right = reinterpret_cast<const float*>(wanted.bytes.data());
  const auto* most = reinterpret_cast<const float*>(bound.bytes.data());
  double excess = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    const double one = std::fabs(static_cast<double>(found[i]) - right[i]) / most[i];
    if (!(one <= excess)) excess = one;
    if (!std::isfinite(excess)) return excess;
  }
  return excess;
}

// Whether an output is right; says so if it is not.
bool right(Job& job, Device& device, const Case& item, const Call& one, Array& output) {
  const double off = worst(device, output, job.array(item.wanted), job.array(item.bound));
  if (off <= 1.0) return true;
  std::printf("{\"event\":\"wrong\",\"kernel\":\"%s\",\"tokens\":%d,\"times\":%.3g}\n",
              one.kernel.c_str(), item.tokens, std::isfinite(off) ? off : -1.0);
  return false;
}

Array make_output(Job& job, Device& device, const Case& item) {
  Array output;
  output.dtype = {kDLFloat, 32, 1};
  output.shape = {item.rows, item.columns};
  const auto size = static_cast<std::size_t>(item.rows * item.columns) * sizeof(float);
  for (const string& name : {item.wanted, item.bound}) {
    if (job.array(name).bytes.size() != size) fail("job.txt: " + name + " has another size");
  }
  output.copies.emplace_back(device, size);
  device.fill(output.copies[0].data(), 0xff, size);  // no numbers
  return output;
}

// Samples of all cases, round after round.
void time_all(const Job& job, vector<vector<Runner>>& runners) {
  vector<long> calls;
  for (vector<Runner>& some : runners) {
    long least = 0;  // as many calls of each: what the slowest needs
    for (Runner& one : some) {
      const double first = std::max(std::min(one.sample(1), one.sample(2)), 1e-9);
      const long enough = std::max(1L, std::lround(std::ceil(job.least / first)));
      least = least == 0 ? enough : std::min(least, enough);
    }
    calls.push_back(least);
  }
  for (int round = -1; round < job.rounds; ++round) {  // the first warms up and does not count
    for (std::size_t c = 0; c < runners.size(); ++c) {
      const std::size_t count = runners[c].size();
      vector<double> seconds(count);
      for (std::size_t k = 0; k < count; ++k) {  // who comes first takes turns
        const std::size_t which = (round & 1) != 0 ? count - 1 - k : k;
        seconds[which] = runners[c][which].sample(calls[c]);
      }
      if (round < 0) continue;
      std::printf("{\"event\":\"sample\",\"tokens\":%d,\"seconds\":[", job.cases[c].tokens);
      for (std::size_t k = 0; k < count; ++k) {
        std::printf(k == 0 ? "%.9g" : ",%.9g", seconds[k]);
      }
      std::printf("]}\n");
    }
  }
}

int run(const string& folder, const string& libraries) {
  Cpu cpu;
  std::unique_ptr<Gpu> gpu;
  Job job = read_job(folder);  // after the devices, whose memory it has
  setenv("TVM_NUM_THREADS", std::to_string(job.threads).c_str(), 1);
  setenv("TVM_BIND_THREADS", "0", 1);
  if (job.gpu) gpu = std::make_unique<Gpu>(libraries);
  Device& device = gpu ? static_cast<Device&>(*gpu) : cpu;
  const Runtime runtime(libraries, job.gpu);
  if (gpu) runtime.use_stream(gpu->id(), gpu->stream());
  std::map<string, TVMFFIObjectHandle> loaded;
  for (const auto& [name, path] : job.kernels) loaded[name] = runtime.load_kernel(path);
  // Checked first, all of them, and on one copy: a wrong kernel is not worth its time.
  vector<vector<Array>> outputs;
  for (Case& item : job.cases) {
    outputs.emplace_back();
    for (const Call& one : item.calls) {
      outputs.back().push_back(make_output(job, device, item));
      Array& output = outputs.back().back();
      Runner(job, device, runtime, item, one, loaded.at(one.kernel), output).once();
      if (!right(job, device, item, one, output)) return 0;
    }
  }
  for (const Call& one : job.cases.empty() ? vector<Call>() : job.cases[0].calls) {
    make_copies(job, device, one);
  }
  vector<vector<Runner>> runners;
  for (std::size_t c = 0; c < job.cases.size(); ++c) {
    runners.emplace_back();
    for (std::size_t k = 0; k < job.cases[c].calls.size(); ++k) {
      const Call& one = job.cases[c].calls[k];
      runners[c].emplace_back(job, device, runtime, job.cases[c], one, loaded.at(one.kernel),
                              outputs[c][k]);
    }
  }
  time_all(job, runners);
  // Again: a race shows in some calls only.
  for (std::size_t c = 0; c < job.cases.size(); ++c) {
    for (std::size_t k = 0; k < job.cases[c].calls.size(); ++k) {
      if (!right(job, device, job.cases[c], job.cases[c].calls[k], outputs[c][k])) return 0;
    }
  }
  std::printf("{\"event\":\"done\"}\n");
  return 0;
}

int describe_gpu(const string& libraries) {
  Gpu gpu(libraries);
  std::printf("{\"event\":\"gpu\",\"name\":\"%s\",\"arch\":\"sm_%d%d\",\"cache\":%zu,\"copy\":%.6g}\n",
              gpu.name().c_str(), gpu.major(), gpu.minor(), gpu.cache_bytes(), gpu.copy_rate());
  return 0;
}

int program(int count, char** words) {
  if (count != 3) {
    std::fprintf(stderr, "usage: gqsa-measure FOLDER LIBRARIES\n");
    return 2;
  }
  try {
    return string(words[1]) == "--gpu" ? describe_gpu(words[2]) : run(words[1], words[2]);
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "not enough memory\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
  }
  return 1;
}

}  // namespace

int main(int count, char** words) {
  const int code = program(count, words);
  std::fflush(stdout);
  std::fflush(stderr);
  _exit(code);  // libraries are not taken apart: all that counts has been said
}
