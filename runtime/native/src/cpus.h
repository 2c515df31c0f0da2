// What this processor can do, which of its CPUs are ours, and how many threads suit them; as
// runtime/cpus.py.
#pragma once

#include <set>
#include <string>
#include <vector>

namespace gqsa {

// The architecture by its Linux name.
std::string host_arch();

// The CPU's flags by their names in /proc/cpuinfo; empty where the system does not tell.
std::set<std::string> host_flags();

// The CPUs that this process may run on: one of every core first, then their twins.
std::vector<int> allowed_cpus();

// The cores that this process may use, within its container's CPU quota: more threads than cores
// are slower, since TVM's waiting workers spin.
int default_threads();

}  // namespace gqsa
