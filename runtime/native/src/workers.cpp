#include "workers.h"

#include <map>
#include <string>
#include <system_error>
#include <thread>

#include "error.h"
#include "tvm.h"

namespace gqsa {
namespace {

constexpr int kShareAllCores = -3;  // TVM's affinity mode: the workers share the CPUs listed

std::thread start(const std::function<void()>& function) {
  try {
    return std::thread(function);
  } catch (const std::system_error& error) {
    throw Error(Kind::runtime,
                std::string("A thread cannot be started: ") + error.code().message() +
                    "; lower --threads, or raise the limits on processes and memory (ulimit).");
  }
}

// Throws where so many threads cannot run at once. TVM would end the process if one of its workers
// did not start.
void check_threads(std::size_t count) {
  std::mutex gate;
  std::vector<std::thread> threads;
  const auto join_all = [&] {
    for (std::thread& thread : threads)
      thread.join();
  };
  std::unique_lock<std::mutex> closed(gate);
  try {
    threads.reserve(count);
    while (threads.size() < count) {
      threads.push_back(start([&] { const std::lock_guard<std::mutex> pass(gate); }));
    }
  } catch (...) {
    closed.unlock();
    join_all();
    throw;
  }
  closed.unlock();
  join_all();
}

}  // namespace

Workers& Workers::share(const std::vector<int>& cpus) {
  static std::mutex mutex;
  static auto& pools = *new std::map<std::vector<int>, Workers*>;  // for the process
  const std::lock_guard<std::mutex> lock(mutex);
  Workers*& workers = pools[cpus];
  if (workers == nullptr) {
    check_threads(cpus.size() + 1);  // TVM's and the one that calls it
    auto made = std::unique_ptr<Workers>(new Workers);
    start([workers = made.get()] { workers->work(); }).detach();
    workers = made.release();
  }
  workers->configure(cpus);
  return *workers;
}

void Workers::configure(const std::vector<int>& cpus) {
  run([&] {
    std::vector<std::string> names;
    for (const int cpu : cpus)
      names.push_back(std::to_string(cpu));
    const tvm::Any list =
        tvm::call(tvm::global("ffi.Array"), std::vector<tvm::Argument>(names.begin(), names.end()));
    tvm::call(tvm::global("runtime.config_threadpool"),
              {kShareAllCores, static_cast<int>(cpus.size()), list});
  });
}

void Workers::run(const std::function<void()>& function) {
  if (std::this_thread::get_id() == thread_) return function();
  // Shared: the thread may still be leaving the task when its result is here already.
  const auto task = std::make_shared<std::packaged_task<void()>>(function);
  std::future<void> done = task->get_future();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    tasks_.push(task);
  }
  wake_.notify_one();
  done.get();
}

void Workers::work() {
  thread_ = std::this_thread::get_id();
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return !tasks_.empty(); });
    std::shared_ptr<std::packaged_task<void()>> task = tasks_.front();
    tasks_.pop();
    lock.unlock();
    (*task)();
    task.reset();
    lock.lock();
  }
}

}  // namespace gqsa
