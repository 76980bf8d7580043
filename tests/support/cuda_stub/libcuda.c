/* A driver that reports one GPU and can do nothing else: NVIDIA's libcuda.so.1 for tests. */
#include <string.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 801, MAJOR = 75, MINOR = 76 };

int cuInit(unsigned flags) { return flags ? NOT_SUPPORTED : SUCCESS; }

int cuDeviceGetCount(int *count) {
  *count = 1;
  return SUCCESS;
}

int cuDeviceGet(int *device, int index) {
  *device = index;
  return SUCCESS;
}

int cuDeviceGetName(char *name, int size, int device) {
  (void)device;
  strncpy(name, "Stub GPU", (size_t)size);
  return SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  *value = attribute == MAJOR ? 8 : attribute == MINOR ? 9 : 0;
  return SUCCESS;
}

int cuDeviceGetPCIBusId(char *text, int size, int device) {
  (void)text, (void)size, (void)device;
  return NOT_SUPPORTED;
}

/* ONNX Runtime's CUDA provider is linked with it. */
int cuTensorMapEncodeTiled(void) { return NOT_SUPPORTED; }
