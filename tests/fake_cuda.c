/* A CUDA driver that writes down what it is asked: one line a call, in the file FAKE_CUDA_LOG. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static FILE *log_file(void) { return fopen(getenv("FAKE_CUDA_LOG"), "a"); }

int cuDriverGetVersion(int *version) {
  *version = 12080;
  return 0;
}

int cuModuleLoadData(void **module, const char *image) {
  FILE *log = log_file();
  fprintf(log, "load %s\n", image);
  fclose(log);
  *module = (void *)0x100;
  return 0;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
  FILE *log = log_file();
  fprintf(log, "function %p %s\n", module, name);
  fclose(log);
  *function = (void *)0x200;
  return 0;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
  FILE *log = log_file();
  fprintf(log, "attribute %p %d %d\n", function, attribute, value);
  fclose(log);
  return 0;
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads,
                                                size_t shared) {
  FILE *log = log_file();
  fprintf(log, "occupancy %p %d %zu\n", function, threads, shared);
  fclose(log);
  *blocks = 3;
  return 0;
}

int cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                   void *stream, void **parameters, void **extra) {
  FILE *log = log_file();
  fprintf(log, "launch %p grid %u %u %u block %u %u %u shared %u stream %p extra %d", function,
          grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, extra != NULL);
  int count = atoi(getenv("FAKE_CUDA_PARAMETERS"));
  for (int i = 0; i < count; i++)
    fprintf(log, " %llu", (unsigned long long)*(uint64_t *)parameters[i]);
  fprintf(log, "\n");
  fclose(log);
  return 0;
}

/* How the bindings find every other function. */
int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags,
                        int *status) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  *function = library ? dlsym(library, name) : NULL;
  if (status) *status = *function ? 0 : 1;
  return 0;
}

int cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
