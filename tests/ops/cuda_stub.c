// An NVIDIA driver and CUDA's runtime without a GPU: enough of both for TVM's and for NVIDIA's Python package.
//
// Launches are queued, and run when somebody waits: who looks at memory without waiting sees what was there before.
// A module's image is a text: a line a kernel, with its name, the sizes of its parameters (0: an address) and the
// library of the emulator that computes it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST 64
typedef int (*Launch)(const uint32_t*, void* const*, const uint64_t*);
typedef struct {
  char name[256];
  int count, sizes[MOST];
  Launch launch;
} Kernel;
typedef struct Queued {
  Kernel* kernel;
  uint32_t launch[7];
  uint64_t numbers[MOST];
  void* values[MOST];
  struct Queued* next;
} Queued;
typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned count;
} Config;
enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, ILLEGAL = 700 };

static Queued *first, **last = &first;
static int failed;  // as on a GPU, for good
static size_t limit = (size_t)1 << 33;
static struct { char* start; size_t size; } held[1 << 16];
static int blocks;

static int run(void) {
  while (first) {
    Queued* each = first;
    uint64_t sizes[MOST];
    for (int i = 0; i < MOST; i++) sizes[i] = UINT64_MAX / 4;
    if (!failed && each->kernel->launch(each->launch, each->values, sizes)) failed = ILLEGAL;
    first = each->next;
    if (!first) last = &first;
    free(each);
  }
  return failed;
}

static int queue(Kernel* kernel, const Config* config, void** given) {
  Queued* each = calloc(1, sizeof *each);
  each->kernel = kernel;
  for (int i = 0; i < 3; i++) each->launch[i] = config->grid[i], each->launch[3 + i] = config->block[i];
  each->launch[6] = config->shared;
  for (int i = 0; i < kernel->count; i++) {
    if (kernel->sizes[i]) {
      memcpy(&each->numbers[i], given[i], kernel->sizes[i]);
      each->values[i] = &each->numbers[i];
    } else {
      each->values[i] = *(void**)given[i];
    }
  }
  *last = each;
  last = &each->next;
  return failed;
}

static Kernel* find(const char* image, const char* name) {
  for (const char* line = image; line && *line; line = strchr(line, '\n'), line += !!line) {
    char path[4096], sizes[1024];
    Kernel* kernel = calloc(1, sizeof *kernel);
    if (sscanf(line, "%255s %1023s %4095s", kernel->name, sizes, path) == 3 && !strcmp(kernel->name, name)) {
      for (char* each = strtok(sizes, ","); each; each = strtok(NULL, ",")) kernel->sizes[kernel->count++] = atoi(each);
      void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
      kernel->launch = library ? (Launch)dlsym(library, "limpid_launch") : NULL;
      if (kernel->launch) return kernel;
    }
    free(kernel);
  }
  return NULL;
}

#ifdef DRIVER
int cuInit(unsigned flags) { return OK; }
int cuDriverGetVersion(int* version) { return *version = 13000, OK; }
int cuDeviceGetCount(int* count) { return *count = 1, OK; }
int cuDeviceGet(int* device, int index) { return *device = index, OK; }
int cuDeviceGetName(char* name, int size, int device) { return snprintf(name, size, "no GPU"), OK; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? 7 : attribute == 76 ? 5 : attribute == 89;  // compute capability 7.5; concurrent access
  return OK;
}
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = &blocks, OK; }
int cuCtxSetCurrent(void* context) { return context == &blocks ? OK : INVALID; }
int cuCtxSynchronize(void) { return run(); }
int cuMemAllocManaged(void** address, size_t size, unsigned flags) {
  if (failed || size > limit) return failed ? failed : OUT_OF_MEMORY;
  char* start = aligned_alloc(256, (size + 255) / 256 * 256);
  for (int i = 0; i < blocks; i++) {
    if (held[i].start == start) return held[i].size = size, *address = start, OK;
  }
  held[blocks].start = start;
  held[blocks++].size = size;
  return *address = start, OK;
}
int cuMemAlloc(void** address, size_t size) { return *address = aligned_alloc(256, (size + 255) / 256 * 256), OK; }
int cuMemFree(void* address) {
  run();
  for (int i = 0; i < blocks; i++) held[i].size = held[i].start == address ? 0 : held[i].size;
  return free(address), OK;
}
int cuMemcpyHtoD(void* target, const void* source, size_t size) { return run(), memcpy(target, source, size), failed; }
int cuMemcpyDtoH(void* target, const void* source, size_t size) { return run(), memcpy(target, source, size), failed; }
int cuPointerGetAttribute(void* value, int attribute, void* address) {
  for (int i = 0; i < blocks; i++) {
    if ((char*)address >= held[i].start && (char*)address < held[i].start + held[i].size) return *(int*)value = 1, OK;
  }
  return INVALID;
}
typedef struct { int type, id; } Location;
int cuMemAdvise(void* address, size_t size, int advice, Location location) {
  return location.type == 1 && location.id == 0 ? OK : INVALID;
}
int cuMemPrefetchAsync(void* address, size_t size, Location location, unsigned flags, void* stream) {
  return location.type == 1 && location.id == 0 ? OK : INVALID;
}
int cuModuleLoadData(void** module, const void* image) { return *module = strdup(image), OK; }
int cuModuleUnload(void* module) { return OK; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  return (*function = find(module, name)) ? OK : NOT_FOUND;
}
int cuFuncSetAttribute(void* function, int attribute, int value) { return OK; }
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** given, void** extra) {
  Config config = {{gx, gy, gz}, {bx, by, bz}, shared, stream, NULL, 0};
  return queue(function, &config, given);
}
int cuLaunchKernelEx(const Config* config, void* function, void** given, void** extra) {
  return queue(function, config, given);
}
int cuTensorMapEncodeTiled() { return INVALID; }
int cuGetExportTable(const void** table, const void* id) { return *table = NULL, NOT_FOUND; }  // NVRTC asks
int cuGetErrorName(int error, const char** text) {
  *text = error == ILLEGAL ? "CUDA_ERROR_ILLEGAL_ADDRESS" : error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "?";
  return OK;
}
int cuGetErrorString(int error, const char** text) {
  *text = error == ILLEGAL ? "an illegal memory access was encountered" : "out of memory";
  return OK;
}
int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags, int* status) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) {
    static void* self;
    Dl_info info;
    if (!self && dladdr((void*)cuInit, &info)) self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    *function = dlsym(self, name);
  }
  if (status) *status = *function ? 0 : 1;
  return *function ? OK : NOT_FOUND;
}
int cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
#else
#define STUB(name) int name() { return OK; }
int cudaMalloc(void** address, size_t size) { return *address = aligned_alloc(256, (size + 255) / 256 * 256), OK; }
int cudaFree(void* address) {
  int (*wait)(void) = (int (*)(void))dlsym(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), "cuCtxSynchronize");
  return wait(), free(address), OK;
}
int cudaGetDevice(int* device) { return *device = 0, OK; }
int cudaGetDeviceCount(int* count) { return *count = 1, OK; }
int cudaDeviceGetAttribute(int* value, int attribute, int device) { return *value = 0, OK; }
const char* cudaGetErrorName(int error) { return "?"; }
const char* cudaGetErrorString(int error) { return "?"; }
STUB(cudaSetDevice) STUB(cudaEventCreate) STUB(cudaEventDestroy) STUB(cudaEventElapsedTime) STUB(cudaEventRecord)
STUB(cudaEventSynchronize) STUB(cudaFreeHost) STUB(cudaGetDeviceProperties) STUB(cudaGetLastError)
STUB(cudaGraphDestroy) STUB(cudaGraphExecDestroy) STUB(cudaGraphInstantiate) STUB(cudaGraphLaunch)
STUB(cudaMallocHost) STUB(cudaMemGetInfo) STUB(cudaMemcpyAsync) STUB(cudaMemcpyPeerAsync) STUB(cudaPeekAtLastError)
STUB(cudaStreamBeginCapture) STUB(cudaStreamCreate) STUB(cudaStreamCreateWithFlags) STUB(cudaStreamDestroy)
STUB(cudaStreamEndCapture) STUB(cudaStreamSynchronize) STUB(cudaStreamWaitEvent)
#endif
