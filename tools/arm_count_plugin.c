/* A QEMU plugin that counts executed instructions; of its header only what is used here. */
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#ifndef API
#define API 1 /* qemu-plugin.h: QEMU_PLUGIN_VERSION */
#endif
#define SHOWN __attribute__((visibility("default")))

typedef uint64_t Id;
typedef struct Block Block;

void qemu_plugin_register_vcpu_tb_trans_cb(Id id, void (*translated)(Id, Block*));
size_t qemu_plugin_tb_n_insns(const Block* block);
void qemu_plugin_register_vcpu_tb_exec_cb(Block* block, void (*run)(unsigned, void*), int registers,
                                          void* data);
void qemu_plugin_register_atexit_cb(Id id, void (*ended)(Id, void*), void* data);

SHOWN int qemu_plugin_version = API;
static uint64_t count; /* of one thread: the programs have no others */

static void run(unsigned cpu, void* data) {
  (void)cpu;
  count += (uintptr_t)data;
}

static void translated(Id id, Block* block) {
  (void)id;
  qemu_plugin_register_vcpu_tb_exec_cb(block, run, 0, (void*)qemu_plugin_tb_n_insns(block));
}

static void ended(Id id, void* data) {
  (void)id, (void)data;
  fprintf(stderr, "instructions: %" PRIu64 "\n", count);
}

SHOWN int qemu_plugin_install(Id id, const void* info, int count_, char** words) {
  (void)info, (void)count_, (void)words;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_atexit_cb(id, ended, NULL);
  return 0;
}
