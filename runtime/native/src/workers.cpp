#include "workers.h"

#include <map>
#include <string>
#include <thread>

#include "tvm.h"

namespace gqsa {
namespace {

constexpr int kShareAllCores = -3;  // TVM's affinity mode: the workers share the CPUs listed

}  // namespace

Workers& Workers::share(const std::vector<int>& cpus) {
  static std::mutex mutex;
  static auto& pools = *new std::map<std::vector<int>, Workers*>;  // for the process
  const std::lock_guard<std::mutex> lock(mutex);
  Workers*& workers = pools[cpus];
  if (workers == nullptr) {
    workers = new Workers;
    std::thread([made = workers] { made->work(); }).detach();
  }
  workers->configure(cpus);
  return *workers;
}

void Workers::configure(const std::vector<int>& cpus) {
  run([&] {
    std::vector<std::string> names;
    for (const int cpu : cpus) names.push_back(std::to_string(cpu));
    const tvm::Any list = tvm::call(tvm::global("ffi.Array"),
                                    std::vector<tvm::Argument>(names.begin(), names.end()));
    tvm::call(tvm::global("runtime.config_threadpool"),
              {kShareAllCores, static_cast<int>(cpus.size()), list});
  });
}

void Workers::run(const std::function<void()>& function) {
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
