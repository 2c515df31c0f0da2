#include "cpus.h"

#include <sched.h>
#include <sys/utsname.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>

namespace gqsa {
namespace {

constexpr const char* kCgroups = "/sys/fs/cgroup";

// The allowed CPUs by core; each is a core of its own where the system does not tell.
std::vector<std::vector<int>> cores() {
  std::vector<int> allowed;
  for (int limit = 1024; limit <= 1 << 20; limit *= 2) {  // the kernel's mask may be larger
    const std::size_t bytes = CPU_ALLOC_SIZE(limit);
    const std::unique_ptr<cpu_set_t, void (*)(cpu_set_t*)> set(CPU_ALLOC(limit),
                                                               [](cpu_set_t* s) { CPU_FREE(s); });
    if (set == nullptr || sched_getaffinity(0, bytes, set.get()) != 0) continue;
    for (int cpu = 0; cpu < limit; ++cpu) {
      if (CPU_ISSET_S(cpu, bytes, set.get())) allowed.push_back(cpu);
    }
    break;
  }
  if (allowed.empty()) allowed.push_back(0);
  std::vector<std::vector<int>> found;
  std::map<std::string, std::size_t> seen;
  for (const int cpu : allowed) {
    std::string core;
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                       "/topology/thread_siblings_list");
    if (!std::getline(file, core)) core = "cpu" + std::to_string(cpu);
    const auto [entry, is_new] = seen.emplace(core, found.size());
    if (is_new) found.emplace_back();
    found[entry->second].push_back(cpu);
  }
  return found;
}

// A control group's limit in whole CPUs, or 0: microseconds in each period of so many.
long quota(const std::string& group) {
  long limit = 0, period = 0;
  std::ifstream both(group + "/cpu.max");  // version 2: "max 100000" where there is none
  if (!(both >> limit >> period)) {
    limit = period = 0;
    std::ifstream first(group + "/cpu.cfs_quota_us"), second(group + "/cpu.cfs_period_us");
    if (!(first >> limit && second >> period)) return 0;
  }
  return limit > 0 && period > 0 ? std::max(1L, (limit - 1) / period + 1) : 0;
}

// The smallest limit of a group and of those that it is in.
long smallest_quota(const std::string& base, std::string path) {
  long smallest = 0;
  for (bool more = true; more;) {
    const long limit = quota(base + path);
    if (limit > 0) smallest = smallest == 0 ? limit : std::min(smallest, limit);
    more = !path.empty();
    path.resize(more ? path.find_last_of('/') : 0);
  }
  return smallest;
}

}  // namespace

std::string host_arch() {
  utsname name{};
  return uname(&name) == 0 ? name.machine : "unknown";
}

#if defined(__aarch64__)

std::set<std::string> host_flags() {
  // The kernel's bits in order, by their names in /proc/cpuinfo, which an emulator or a phone may
  // not show.
  static const char* const first[] = {
      "fp",      "asimd", "evtstrm", "aes",   "pmull",    "sha1",   "sha2", "crc32",
      "atomics", "fphp",  "asimdhp", "cpuid", "asimdrdm", "jscvt",  "fcma", "lrcpc",
      "dcpop",   "sha3",  "sm3",     "sm4",   "asimddp",  "sha512", "sve",  "asimdfhm",
      "dit",     "uscat", "ilrcpc",  "flagm", "ssbs",     "sb",     "paca", "pacg"};
  static const char* const second[] = {"dcpodp",   "sve2",     "sveaes",  "svepmull", "svebitperm",
                                       "svesha3",  "svesm4",   "flagm2",  "frint",    "svei8mm",
                                       "svef32mm", "svef64mm", "svebf16", "i8mm",     "bf16",
                                       "dgh",      "rng",      "bti",     "mte"};
  std::set<std::string> flags;
  const auto add = [&](unsigned long bits, const char* const* names, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      if (bits >> i & 1) flags.insert(names[i]);
    }
  };
  add(getauxval(AT_HWCAP), first, std::size(first));
  add(getauxval(AT_HWCAP2), second, std::size(second));
  return flags;
}

#else

std::set<std::string> host_flags() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const std::size_t colon = line.find(':');
    if (colon == std::string::npos || line.rfind("flags", 0) != 0) continue;
    std::istringstream words(line.substr(colon + 1));
    std::set<std::string> flags;
    for (std::string word; words >> word;)
      flags.insert(word);
    return flags;
  }
  return {};
}

#endif

std::vector<int> allowed_cpus() {
  std::vector<int> firsts, twins;
  for (const auto& core : cores()) {
    firsts.push_back(core.front());
    twins.insert(twins.end(), core.begin() + 1, core.end());
  }
  std::sort(twins.begin(), twins.end());
  firsts.insert(firsts.end(), twins.begin(), twins.end());
  return firsts;
}

int default_threads() {
  long most = static_cast<long>(cores().size());
  const auto limit = [&](const std::string& base, const std::string& path) {
    const long found = smallest_quota(base, path == "/" ? "" : path);
    if (found > 0) most = std::min(most, found);
  };
  const std::string second = kCgroups, first = std::string(kCgroups) + "/cpu";
  limit(second, "");
  limit(first, "");
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const std::size_t a = line.find(':'), b = line.find(':', a + 1);
    if (a == std::string::npos || b == std::string::npos) continue;
    const std::string controllers = "," + line.substr(a + 1, b - a - 1) + ",";
    const std::string path = line.substr(b + 1);
    if (path.empty() || path.front() != '/') continue;
    if (line.substr(0, a) == "0") limit(second, path);
    if (controllers.find(",cpu,") != std::string::npos) limit(first, path);
  }
  return static_cast<int>(std::max(1L, most));
}

}  // namespace gqsa
