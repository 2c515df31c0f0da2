// The threads that compiled code runs on; as runtime/workers.py.
//
// TVM keeps a pool of workers for each thread that calls it, so all calls of a session are made on
// one thread of ours, which pins nobody else's. Sessions on the same CPUs share it.
//
// The threads stay, asleep, until the process ends: TVM ends a pool by joining workers that do not
// look whether they should end before they have yielded their CPU 300 000 times, which can take
// minutes on a machine where others use it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <queue>
#include <thread>
#include <vector>

namespace gqsa {

class Workers {
 public:
  // The workers on these CPUs, one for each; made where there are none.
  static Workers& share(const std::vector<int>& cpus);
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  // Call a function on the thread, wait for it, and pass on what it throws. A function that runs
  // there already may call this.
  void run(const std::function<void()>& function);

 private:
  Workers() = default;
  void configure(const std::vector<int>& cpus);
  [[noreturn]] void work();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::queue<std::shared_ptr<std::packaged_task<void()>>> tasks_;
  std::atomic<std::thread::id> thread_{};
};

}  // namespace gqsa
