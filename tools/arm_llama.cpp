// One matrix product of llama.cpp's on one thread: arm_llama TYPE N K TOKENS CALLS.
//
// Weights are random and repacked as llama.cpp does it where it can.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

ggml_backend_buffer_type_t ggml_backend_cpu_repack_buffer_type(void);

int main(int argc, char** argv) {
  if (argc != 6) {
    std::fputs("arm_llama TYPE N K TOKENS CALLS\n", stderr);
    return 2;
  }
  const std::string name = argv[1];
  const ggml_type type = name == "q4_0" ? GGML_TYPE_Q4_0 : name == "q6_k" ? GGML_TYPE_Q6_K : GGML_TYPE_Q8_0;
  const int n = std::atoi(argv[2]), k = std::atoi(argv[3]), m = std::atoi(argv[4]);
  ggml_backend_t backend = ggml_backend_cpu_init();
  ggml_backend_cpu_set_n_threads(backend, 1);
  const ggml_init_params sizes{1 << 20, nullptr, true};
  ggml_context* fixed = ggml_init(sizes);
  ggml_context* moving = ggml_init(sizes);
  ggml_tensor* weight = ggml_new_tensor_2d(fixed, type, k, n);
  ggml_backend_alloc_ctx_tensors_from_buft(fixed, ggml_backend_cpu_repack_buffer_type());
  std::vector<float> floats(size_t(n) * k);
  for (float& value : floats) value = float(std::rand()) / RAND_MAX - 0.5f;
  std::vector<char> packed(ggml_nbytes(weight));
  ggml_quantize_chunk(type, floats.data(), packed.data(), 0, n, k, nullptr);
  ggml_backend_tensor_set(weight, packed.data(), 0, packed.size());
  ggml_tensor* x = ggml_new_tensor_2d(moving, GGML_TYPE_F32, k, m);
  ggml_tensor* y = ggml_mul_mat(moving, weight, x);
  ggml_cgraph* graph = ggml_new_graph(moving);
  ggml_build_forward_expand(graph, y);
  ggml_gallocr_t room = ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend));
  if (!ggml_gallocr_alloc_graph(room, graph)) return 1;
  std::vector<float> values(size_t(k) * m);
  for (float& value : values) value = float(std::rand()) / RAND_MAX - 0.5f;
  ggml_backend_tensor_set(x, values.data(), 0, values.size() * sizeof(float));
  for (int call = std::atoi(argv[5]); call > 0; --call)
    if (ggml_backend_graph_compute(backend, graph) != GGML_STATUS_SUCCESS) return 1;
  std::vector<float> result(size_t(n) * m);
  ggml_backend_tensor_get(y, result.data(), 0, result.size() * sizeof(float));
  double error = 0, size = 0;
  for (int row = 0; row < n; ++row) {
    double exact = 0;
    for (int i = 0; i < k; ++i) exact += double(floats[size_t(row) * k + i]) * values[i];
    error += (result[row] - exact) * (result[row] - exact);
    size += exact * exact;
  }
  if (!(error < 0.05 * size)) {
    std::fputs("The product is wrong.\n", stderr);
    return 1;
  }
  return 0;
}
