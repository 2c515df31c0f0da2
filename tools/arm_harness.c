/* Calls one compiled kernel with tensors from a file, without a runtime: arm_harness IN OUT CALLS.
 *
 * IN: int32 count, and for each tensor int32 code, bits, dimensions; int64 shape; data. The last
 * tensor is the output; it is written to OUT after CALLS calls, each on three threads' behalf.
 */
#include <dlpack/dlpack.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

typedef struct {
  void* sync;
  int32_t tasks;
} Group;
typedef int (*Part)(int task, Group* group, void* data);
enum { THREADS = 3, MOST = 16 };

static int launch(Part part, void* data, int tasks) {
  (void)tasks;
  Group group = {NULL, THREADS};
  for (int task = 0; task < THREADS; ++task) {
    int failed = part(task, &group, data);
    if (failed) return failed;
  }
  return 0;
}

static void* take(int device, int id, uint64_t size, int code, int bits) {
  (void)device, (void)id, (void)code, (void)bits;
  return aligned_alloc(64, (size + 63) / 64 * 64);
}

static int give(int device, int id, void* place) {
  (void)device, (void)id;
  free(place);
  return 0;
}

/* A compiled module finds its runtime through these. */
extern void* __TVMBackendParallelLaunch __attribute__((weak));
extern void* __TVMBackendAllocWorkspace __attribute__((weak));
extern void* __TVMBackendFreeWorkspace __attribute__((weak));

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; ++i) fputs(parts[i], stderr);
  fputc('\n', stderr);
}

void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* text) {
  TVMFFIErrorSetRaisedFromCStrParts(kind, &text, 1);
}

int __tvm_ffi_main(void* self, const TVMFFIAny* arguments, int32_t count, TVMFFIAny* result);

static void read_all(void* to, size_t size, FILE* file) {
  if (fread(to, 1, size, file) != size) {
    fputs("The input is too short.\n", stderr);
    exit(2);
  }
}

int main(int argc, char** argv) {
  FILE* in = argc == 4 ? fopen(argv[1], "rb") : NULL;
  if (!in) {
    fputs("arm_harness IN OUT CALLS\n", stderr);
    return 2;
  }
  if (&__TVMBackendParallelLaunch) __TVMBackendParallelLaunch = (void*)launch;
  if (&__TVMBackendAllocWorkspace) __TVMBackendAllocWorkspace = (void*)take;
  if (&__TVMBackendFreeWorkspace) __TVMBackendFreeWorkspace = (void*)give;
  int32_t count;
  read_all(&count, sizeof count, in);
  if (count < 1 || count > MOST) return 2;
  static DLTensor tensors[MOST];
  static int64_t shapes[MOST][4];
  static TVMFFIAny arguments[MOST];
  size_t size = 0;
  for (int32_t i = 0; i < count; ++i) {
    int32_t head[3];
    read_all(head, sizeof head, in);
    if (head[2] < 1 || head[2] > 4) return 2;
    read_all(shapes[i], head[2] * sizeof(int64_t), in);
    size = head[1] / 8;
    for (int d = 0; d < head[2]; ++d) size *= shapes[i][d];
    DLTensor* t = &tensors[i];
    t->data = take(0, 0, size ? size : 1, 0, 0);
    read_all(t->data, size, in);
    t->device.device_type = kDLCPU;
    t->ndim = head[2];
    t->dtype.code = head[0];
    t->dtype.bits = head[1];
    t->dtype.lanes = 1;
    t->shape = shapes[i];
    arguments[i].type_index = kTVMFFIDLTensorPtr;
    arguments[i].v_ptr = t;
  }
  fclose(in);
  for (long call = atol(argv[3]); call > 0; --call) {
    TVMFFIAny result;
    memset(&result, 0, sizeof result);
    if (__tvm_ffi_main(NULL, arguments, count, &result)) return 1;
  }
  FILE* out = fopen(argv[2], "wb");
  if (!out || fwrite(tensors[count - 1].data, 1, size, out) != size || fclose(out)) return 1;
  return 0;
}
