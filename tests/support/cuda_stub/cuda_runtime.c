/* The functions of cudart and cuBLAS that open a session of ONNX Runtime, on the CPU's memory. */
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, MAJOR = 75, MINOR = 76, VERSION = 13000, HANDLE = 64 };

static int allocate(void **pointer, size_t bytes) {
  *pointer = calloc(1, bytes ? bytes : 1);
  return SUCCESS;
}

int cudaMalloc(void **pointer, size_t bytes) { return allocate(pointer, bytes); }
int cudaMallocHost(void **pointer, size_t bytes) { return allocate(pointer, bytes); }
int cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
  (void)flags;
  return allocate(pointer, bytes);
}

int cudaMemcpy(void *target, const void *source, size_t bytes, int kind) {
  (void)kind;
  memcpy(target, source, bytes);
  return SUCCESS;
}

int cudaMemcpyAsync(void *target, const void *source, size_t bytes, int kind, void *stream) {
  (void)stream;
  return cudaMemcpy(target, source, bytes, kind);
}

static int answer(int *value, int number) {
  *value = number;
  return SUCCESS;
}

int cudaGetDeviceCount(int *count) { return answer(count, 1); }
int cudaGetDevice(int *device) { return answer(device, 0); }
int cudaRuntimeGetVersion(int *version) { return answer(version, VERSION); }
int cudaDriverGetVersion(int *version) { return answer(version, VERSION); }
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  return answer(value, attribute == MAJOR ? 8 : attribute == MINOR ? 9 : 1024);
}
int cudaStreamIsCapturing(void *stream, int *status) {
  (void)stream;
  return answer(status, 0);
}

int cudaMemGetInfo(size_t *unused, size_t *total) {
  *unused = *total = (size_t)1 << 33;
  return SUCCESS;
}

/* cudaDeviceProp of CUDA 13 has 1008 bytes. */
int cudaGetDeviceProperties(char *properties, int device) {
  (void)device;
  memset(properties, 0, 1008);
  return SUCCESS;
}

int cudaStreamCreate(void **stream) { return allocate(stream, HANDLE); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) {
  (void)flags;
  return allocate(stream, HANDLE);
}
int cudaEventCreate(void **event) { return allocate(event, HANDLE); }
int cudaEventCreateWithFlags(void **event, unsigned flags) {
  (void)flags;
  return allocate(event, HANDLE);
}
int cublasCreate_v2(void **handle) { return allocate(handle, HANDLE); }
int cublasLtCreate(void **handle) { return allocate(handle, HANDLE); }
