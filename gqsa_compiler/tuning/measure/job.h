// What is measured: job.txt, and the arrays that it names.
#pragma once

#include <cstdint>
#include <fstream>
#include <map>
#include <sstream>
#include <utility>

#include "device.h"

namespace measure {

// Memory of a device, with an array at its beginning.
class Memory {
 public:
  Memory(Device& device, std::size_t bytes)
      : device_(&device), size_(bytes), data_(device.allocate(bytes)) {}
  Memory(Memory&& other) noexcept
      : device_(other.device_), size_(other.size_), data_(std::exchange(other.data_, nullptr)) {}
  Memory& operator=(Memory&&) = delete;
  ~Memory() {
    if (data_ != nullptr) device_->release(data_);
  }

  void* data() const { return data_; }
  std::size_t size() const { return size_; }

 private:
  Device* device_;
  std::size_t size_;
  void* data_;
};

struct Array {
  DLDataType dtype{};
  vector<std::int64_t> shape;
  vector<char> bytes;  // as the file has them; empty once they are on the device
  vector<Memory> copies;

  // The first copy on a device.
  Memory& on(Device& device) {
    if (copies.empty()) {
      copies.emplace_back(device, bytes.size());
      device.put(copies[0].data(), bytes.data(), bytes.size());
      vector<char>().swap(bytes);
    }
    return copies[0];
  }

  DLTensor tensor(Device& device, std::size_t copy) {
    on(device);
    DLTensor t{};
    t.data = copies[copy % copies.size()].data();
    t.device = device.id();
    t.ndim = static_cast<std::int32_t>(shape.size());
    t.dtype = dtype;
    t.shape = shape.data();
    return t;
  }
};

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
  bool gpu = false;
  int threads = 1, rounds = 1;
  double rotate = 0, least = 0;
  std::map<string, Array> arrays;
  vector<std::pair<string, string>> kernels;
  vector<Case> cases;

  Array& array(const string& name) {
    const auto found = arrays.find(name);
    if (found == arrays.end()) fail("job.txt: there is no array " + name);
    return found->second;
  }
};

inline Array read_array(std::istringstream& words, const string& folder) {
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
  array.bytes.resize(bytes);
  std::ifstream stream(folder + "/" + file, std::ios::binary);
  if (!stream.read(array.bytes.data(), static_cast<std::streamsize>(bytes))) {
    fail("cannot read " + file);
  }
  return array;
}

inline Job read_job(const string& folder) {
  std::ifstream stream(folder + "/job.txt");
  if (!stream) fail("cannot read " + folder + "/job.txt");
  Job job;
  for (string line; std::getline(stream, line);) {
    std::istringstream words(line);
    string word, name;
    if (!(words >> word)) continue;
    if (word == "device") {
      words >> name;
      if (name != "cpu" && name != "gpu") fail("job.txt: unknown device " + name);
      job.gpu = name == "gpu";
    } else if (word == "threads") {
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

}  // namespace measure
