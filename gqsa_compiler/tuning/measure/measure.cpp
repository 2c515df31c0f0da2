// Runs one candidate kernel: checks its results, then times it in turns with the incumbent.
//
//   gqsa-measure FOLDER LIBRARIES
//
// FOLDER/job.txt says what to do, a word first in each line (names have no white space):
//
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
// LIBRARIES is the folder of libtvm_ffi.so and libtvm_runtime.so. Nothing else is needed. Standard
// output has one JSON object a line: "wrong", "sample" and last "done"; what fails says so on
// standard error, with exit code 1.
#include <dlfcn.h>
#include <dlpack/dlpack.h>
#include <tvm/ffi/c_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using std::string;
using std::vector;

constexpr std::size_t kAlign = 64;
constexpr std::size_t kSpare = 1 << 16;  // readable memory behind an array: kernels ask for it early
constexpr std::size_t kMostCopies = 2048;

[[noreturn]] void fail(const string& what) { throw std::runtime_error(what); }

// Memory on a cache line's boundary, with the array at its beginning.
struct Memory {
  explicit Memory(std::size_t bytes) : size(bytes) {
    const std::size_t all = (bytes + kSpare + kAlign - 1) / kAlign * kAlign;
    data.reset(static_cast<char*>(std::aligned_alloc(kAlign, all)));
    if (!data) fail("not enough memory");
    std::memset(data.get(), 0, all);
  }
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::size_t size;
  std::unique_ptr<char, Free> data;
};

struct Array {
  DLDataType dtype{};
  vector<std::int64_t> shape;
  vector<Memory> copies;

  DLTensor tensor(std::size_t copy) {
    DLTensor t{};
    t.data = copies[copy % copies.size()].data.get();
    t.device = {kDLCPU, 0};
    t.ndim = static_cast<std::int32_t>(shape.size());
    t.dtype = dtype;
    t.shape = shape.data();
    return t;
  }
};

struct Api {
  decltype(&TVMFFIFunctionGetGlobal) get_global;
  decltype(&TVMFFIFunctionCall) call;
  decltype(&TVMFFIErrorMoveFromRaised) take_error;
} api;

template <typename F>
void look_up(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  if (function == nullptr) fail(string("libtvm_ffi.so has no function ") + name);
}

void load_runtime(const string& folder) {
  void* first = nullptr;
  for (const char* name : {"libtvm_ffi.so", "libtvm_runtime.so"}) {
    void* library = dlopen((folder + "/" + name).c_str(), RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) fail(dlerror());
    if (first == nullptr) first = library;
  }
  look_up(first, "TVMFFIFunctionGetGlobal", api.get_global);
  look_up(first, "TVMFFIFunctionCall", api.call);
  look_up(first, "TVMFFIErrorMoveFromRaised", api.take_error);
}

TVMFFIAny call(TVMFFIObjectHandle function, vector<TVMFFIAny>& arguments) {
  TVMFFIAny result{};
  const auto count = static_cast<std::int32_t>(arguments.size());
  if (api.call(function, arguments.data(), count, &result) != 0) {
    TVMFFIObjectHandle error = nullptr;
    api.take_error(&error);
    if (error == nullptr) fail("TVM failed and does not say why");
    const TVMFFIErrorCell& cell = *TVMFFIErrorGetCellPtr(error);
    fail(string(cell.message.data, cell.message.size));
  }
  return result;
}

TVMFFIAny text(const char* words) {
  TVMFFIAny value{};
  value.type_index = kTVMFFIRawStr;
  value.v_c_str = words;
  return value;
}

TVMFFIObjectHandle global(const string& name) {
  const TVMFFIByteArray bytes{name.data(), name.size()};
  TVMFFIObjectHandle function = nullptr;
  if (api.get_global(&bytes, &function) != 0 || function == nullptr) {
    fail("TVM's runtime has no function " + name);
  }
  return function;
}

// The function `main` of a library. Modules stay loaded.
TVMFFIObjectHandle load_kernel(const string& path) {
  vector<TVMFFIAny> file{text(path.c_str())};
  const TVMFFIAny module = call(global("ffi.ModuleLoadFromFile"), file);
  TVMFFIAny inside{};
  inside.type_index = kTVMFFIBool;
  inside.v_int64 = 1;
  vector<TVMFFIAny> query{module, text("main"), inside};
  const TVMFFIAny function = call(global("ffi.ModuleGetFunction"), query);
  if (function.type_index != kTVMFFIFunction) fail(path + " has no function main");
  return function.v_obj;
}

struct Call {
  string kernel;
  vector<string> arguments;
};

struct Case {
  int tokens = 0;
  std::int64_t rows = 0, columns = 0;
  string wanted, bound;
  vector<Call> calls;
};

struct Job {
  int threads = 1, rounds = 1;
  double rotate = 0, least = 0;
  std::map<string, Array> arrays;
  vector<std::pair<string, string>> kernels;
  vector<Case> cases;
};

Array read_array(std::istringstream& words, const string& folder) {
  Array array;
  string file, type;
  int bits = 0;
  words >> file >> type >> bits;
  const string types = "iuf";
  const auto code = types.find(type);
  if (type.size() != 1 || code == string::npos) fail("an array of type " + type);
  array.dtype = {static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(bits), 1};
  std::size_t bytes = bits / 8;
  for (std::int64_t size = 0; words >> size; bytes *= size) array.shape.push_back(size);
  array.copies.emplace_back(bytes);
  std::ifstream stream(folder + "/" + file, std::ios::binary);
  if (!stream.read(array.copies[0].data.get(), static_cast<std::streamsize>(bytes))) {
    fail("cannot read " + file);
  }
  return array;
}

Job read_job(const string& folder) {
  std::ifstream stream(folder + "/job.txt");
  if (!stream) fail("cannot read " + folder + "/job.txt");
  Job job;
  for (string line; std::getline(stream, line);) {
    std::istringstream words(line);
    string word, name;
    if (!(words >> word)) continue;
    if (word == "threads") {
      words >> job.threads;
    } else if (word == "rotate") {
      words >> job.rotate;
    } else if (word == "rounds") {
      words >> job.rounds;
    } else if (word == "least") {
      words >> job.least;
    } else if (word == "array") {
      words >> name;
      job.arrays[name] = read_array(words, folder);
    } else if (word == "kernel") {
      string library;
      words >> name >> library;
      job.kernels.emplace_back(name, folder + "/" + library);
    } else if (word == "case") {
      Case item;
      words >> item.tokens >> item.rows >> item.columns >> item.wanted >> item.bound;
      job.cases.push_back(item);
    } else if (word == "call") {
      int tokens = 0;
      Call item;
      words >> tokens >> item.kernel;
      for (string argument; words >> argument;) item.arguments.push_back(argument);
      for (Case& one : job.cases) {
        if (one.tokens == tokens) one.calls.push_back(item);
      }
    } else {
      fail("job.txt: unknown word " + word);
    }
  }
  return job;
}

Array& find(Job& job, const string& name) {
  const auto found = job.arrays.find(name);
  if (found == job.arrays.end()) fail("job.txt: there is no array " + name);
  return found->second;
}

// Copies of a kernel's weights, of so many bytes in all that no cache holds them.
void make_copies(Job& job, const Call& call) {
  std::size_t bytes = 1;
  for (const string& name : call.arguments) {
    if (name[0] == '@') bytes += find(job, name.substr(1)).copies[0].size;
  }
  const auto wanted = static_cast<std::size_t>(job.rotate / static_cast<double>(bytes)) + 1;
  const std::size_t count = std::min(wanted, kMostCopies);
  for (const string& name : call.arguments) {
    if (name[0] != '@') continue;
    Array& array = find(job, name.substr(1));
    array.copies.reserve(count);
    while (array.copies.size() < count) {
      Memory memory(array.copies[0].size);
      std::memcpy(memory.data.get(), array.copies[0].data.get(), memory.size);
      array.copies.push_back(std::move(memory));
    }
  }
}

// Calls of one kernel with one number of tokens, each on other copies of the weights.
class Runner {
 public:
  Runner(Job& job, const Case& item, const Call& call, TVMFFIObjectHandle kernel, Array& output)
      : function_(kernel) {
    std::size_t copies = 1;
    for (const string& name : call.arguments) {
      if (name[0] == '@') copies = find(job, name.substr(1)).copies.size();
    }
    tensors_.resize(copies);
    for (std::size_t c = 0; c < copies; ++c) {
      for (const string& name : call.arguments) {
        Array& array = name == "!" ? output : find(job, name[0] == '@' ? name.substr(1) : name);
        tensors_[c].push_back(array.tensor(name[0] == '@' ? c : 0));
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
    call(function_, arguments_);
  }

  // Seconds of a call, the mean of so many.
  double sample(long calls) {
    const auto begin = std::chrono::steady_clock::now();
    for (long i = 0; i < calls; ++i) once();
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
    return spent.count() / static_cast<double>(calls);
  }

 private:
  TVMFFIObjectHandle function_;
  vector<vector<DLTensor>> tensors_;
  vector<TVMFFIAny> arguments_;
  std::size_t next_ = 0;
};

// How many times beyond its bound the worst output is; not finite where one is no number.
double worst(const Array& output, const Array& wanted, const Array& bound) {
  const auto* got = reinterpret_cast<const float*>(output.copies[0].data.get());
  const auto* right = reinterpret_cast<const float*>(wanted.copies[0].data.get());
  const auto* most = reinterpret_cast<const float*>(bound.copies[0].data.get());
  double excess = 0;
  for (std::size_t i = 0; i < output.copies[0].size / sizeof(float); ++i) {
    const double one = std::fabs(static_cast<double>(got[i]) - right[i]) / most[i];
    if (!(one <= excess)) excess = one;
    if (!std::isfinite(excess)) return excess;
  }
  return excess;
}

// Whether an output is right; says so if it is not.
bool right(Job& job, const Case& item, const Call& one, const Array& output) {
  const double off = worst(output, find(job, item.wanted), find(job, item.bound));
  if (off <= 1.0) return true;
  std::printf("{\"event\":\"wrong\",\"kernel\":\"%s\",\"tokens\":%d,\"times\":%.3g}\n",
              one.kernel.c_str(), item.tokens, std::isfinite(off) ? off : -1.0);
  return false;
}

int measure(const string& folder, const string& libraries) {
  Job job = read_job(folder);
  setenv("TVM_NUM_THREADS", std::to_string(job.threads).c_str(), 1);
  setenv("TVM_BIND_THREADS", "0", 1);
  load_runtime(libraries);
  std::map<string, TVMFFIObjectHandle> loaded;
  for (const auto& [name, path] : job.kernels) loaded[name] = load_kernel(path);
  // Checked first, all of them, and on one copy: a wrong kernel is not worth its time.
  vector<vector<Array>> outputs;
  for (Case& item : job.cases) {
    outputs.emplace_back();
    for (const Call& one : item.calls) {
      Array output;
      output.dtype = {kDLFloat, 32, 1};
      output.shape = {item.rows, item.columns};
      output.copies.emplace_back(static_cast<std::size_t>(item.rows * item.columns) * 4);
      std::memset(output.copies[0].data.get(), 0xff, output.copies[0].size);  // no numbers
      outputs.back().push_back(std::move(output));
      Runner(job, item, one, loaded.at(one.kernel), outputs.back().back()).once();
      if (!right(job, item, one, outputs.back().back())) return 0;
    }
  }
  for (const Call& one : job.cases.empty() ? vector<Call>() : job.cases[0].calls) {
    make_copies(job, one);
  }
  vector<vector<Runner>> runners;
  vector<vector<long>> calls;
  for (std::size_t c = 0; c < job.cases.size(); ++c) {
    runners.emplace_back();
    calls.emplace_back();
    for (std::size_t k = 0; k < job.cases[c].calls.size(); ++k) {
      const Call& one = job.cases[c].calls[k];
      runners[c].emplace_back(job, job.cases[c], one, loaded.at(one.kernel), outputs[c][k]);
      const double first = std::max(std::min(runners[c][k].sample(1), runners[c][k].sample(2)), 1e-9);
      calls[c].push_back(std::max(1L, std::lround(std::ceil(job.least / first))));
    }
  }
  for (int round = -1; round < job.rounds; ++round) {  // the first warms up and does not count
    for (std::size_t c = 0; c < runners.size(); ++c) {
      const std::size_t count = runners[c].size();
      vector<double> seconds(count);
      // As many calls of each, and who comes first takes turns.
      const long times = *std::min_element(calls[c].begin(), calls[c].end());
      for (std::size_t k = 0; k < count; ++k) {
        const std::size_t which = (round & 1) != 0 ? count - 1 - k : k;
        seconds[which] = runners[c][which].sample(times);
      }
      if (round < 0) continue;
      std::printf("{\"event\":\"sample\",\"tokens\":%d,\"seconds\":[", job.cases[c].tokens);
      for (std::size_t k = 0; k < count; ++k) {
        std::printf(k == 0 ? "%.9g" : ",%.9g", seconds[k]);
      }
      std::printf("]}\n");
    }
  }
  // Again: a race shows in some calls only.
  for (std::size_t c = 0; c < job.cases.size(); ++c) {
    for (std::size_t k = 0; k < job.cases[c].calls.size(); ++k) {
      if (!right(job, job.cases[c], job.cases[c].calls[k], outputs[c][k])) return 0;
    }
  }
  std::printf("{\"event\":\"done\"}\n");
  return 0;
}

}  // namespace

int main(int count, char** words) {
  if (count != 3) {
    std::fprintf(stderr, "usage: gqsa-measure FOLDER LIBRARIES\n");
    return 2;
  }
  try {
    return measure(words[1], words[2]);
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "not enough memory\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
  }
  return 1;
}
