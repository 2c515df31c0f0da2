// The program around an emulated kernel: one launch, read from standard input. Every buffer ends
// at a page that may not be touched, and so does shared memory.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

namespace {

void read_all(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) emulation::fail(6, "the input is too short");
}

unsigned char* guarded(size_t bytes) {
  const size_t page = 4096, body = (bytes + page - 1) / page * page;
  void* memory = mmap(nullptr, body + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) emulation::fail(6, "no memory");
  unsigned char* start = static_cast<unsigned char*>(memory) + page;
  if (body && mprotect(start, body, PROT_READ | PROT_WRITE)) emulation::fail(6, "no memory");
  // 16-byte loads stay aligned: the bytes between the end and the page are at most 15.
  return start + (body - (bytes + 15) / 16 * 16);
}

}  // namespace

int main() {
  int64_t head[11];
  read_all(head, sizeof head);
  const size_t count = head[9], given = head[10];
  std::vector<int64_t> words(2 * given), sizes(count);
  read_all(words.data(), words.size() * 8);
  read_all(sizes.data(), sizes.size() * 8);
  std::vector<unsigned char*> buffers(count);
  for (size_t i = 0; i < count; ++i) {
    buffers[i] = guarded(sizes[i]);
    read_all(buffers[i], sizes[i]);
  }
  std::vector<void*> arguments(given);
  for (size_t i = 0; i < given; ++i) {
    arguments[i] = words[2 * i] ? static_cast<void*>(buffers[words[2 * i + 1]])
                                : static_cast<void*>(&words[2 * i + 1]);
  }
  auto dim = [&](int at) {
    return emulation::Dim3{unsigned(head[at]), unsigned(head[at + 1]), unsigned(head[at + 2])};
  };
  emulation::launch(kernel_table[head[0]], arguments.data(), dim(2), dim(5), guarded(head[8]),
                    head[8], unsigned(head[1]));
  for (size_t i = 0; i < count; ++i) std::fwrite(buffers[i], 1, sizes[i], stdout);
  return 0;
}
