/* Runs one kernel without TVM: it is linked with the kernel and reads, launches and writes back a file of arguments.
 *
 * The file holds the number of arguments, an Argument for each, and the bytes of the tensors one after the other.
 * Kernels get what is hardest for them: a tensor ends where no page is mapped, at no more than its elements'
 * alignment; scratch memory holds NaN; the tasks of a parallel loop run one by one, the last one first.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <tvm/ffi/c_api.h>
#include <tvm/runtime/c_backend_api.h>
#include <unistd.h>

enum { MOST_ARGUMENTS = 16, MOST_AXES = 8, SCRATCH_ALIGNMENT = 64, TASKS = 2 };
#ifdef __x86_64__
enum { GAP = 16 }; /* QEMU 7.2 reads 16 bytes for the 4 of a scalar vfmadd */
#else
enum { GAP = 0 };
#endif

typedef struct {
  TVMFFIAny value; /* of a number; of a tensor only its type_index */
  DLDataType dtype;
  int32_t ndim;
  int64_t nbytes;
  int64_t shape[MOST_AXES];
} Argument;

extern int kernel(void* self, const TVMFFIAny* args, int32_t count, TVMFFIAny* result);

static void expect(int holds, const char* what) {
  if (holds) return;
  perror(what);
  exit(2);
}

/* `nbytes` of memory that end, rounded up to `alignment`, where an access faults. */
static void* guarded(int64_t nbytes, int64_t alignment) {
  int64_t page = sysconf(_SC_PAGESIZE), used = (nbytes + alignment - 1) / alignment * alignment;
  int64_t room = (used + page - 1) / page * page;
  char* start = mmap(NULL, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  expect(start != MAP_FAILED, "mmap");
  expect(mprotect(start + room, page, PROT_NONE) == 0, "mprotect");
  return start + room - used;
}

static void* allocate(int device_type, int device_id, uint64_t nbytes, int code, int bits) {
  void* scratch = guarded((int64_t)nbytes, SCRATCH_ALIGNMENT);
  return memset(scratch, 0xff, nbytes);
}

/* A process runs one launch: what is left ends with it. */
static int release(int device_type, int device_id, void* scratch) { return 0; }

static int launch(FTVMParallelLambda task, void* closure, int tasks) {
  TVMParallelGroupEnv group = {.sync_handle = NULL, .num_task = tasks == 0 ? TASKS : tasks};
  for (int i = group.num_task - 1; i >= 0; --i) {
    if (task(i, &group, closure) != 0) return -1;
  }
  return 0;
}

/* Where generated code looks for these functions: TVM's loader fills the same variables. */
void* __TVMBackendAllocWorkspace = (void*)allocate;
void* __TVMBackendFreeWorkspace = (void*)release;
void* __TVMBackendParallelLaunch = (void*)launch;

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int i = 0; i < count; ++i) fputs(parts[i] ? parts[i] : "", stderr);
  fputc('\n', stderr);
}

int main(int argc, char** argv) {
  FILE* file = argc == 2 ? fopen(argv[1], "r+b") : NULL;
  expect(file != NULL, "PROGRAM ARGUMENTS");
  int64_t count = 0;
  Argument given[MOST_ARGUMENTS];
  expect(fread(&count, sizeof count, 1, file) == 1 && count <= MOST_ARGUMENTS, "number of arguments");
  expect(fread(given, sizeof(Argument), count, file) == (size_t)count, "arguments");
  long data = ftell(file);
  DLTensor tensors[MOST_ARGUMENTS];
  TVMFFIAny args[MOST_ARGUMENTS];
  for (int i = 0; i < count; ++i) {
    args[i] = given[i].value;
    if (args[i].type_index != kTVMFFIDLTensorPtr) continue;
    void* memory = guarded(given[i].nbytes + GAP, 1);
    expect(fread(memory, 1, given[i].nbytes, file) == (size_t)given[i].nbytes, "tensors");
    tensors[i] = (DLTensor){.data = memory, .device = {kDLCPU, 0}, .ndim = given[i].ndim,
                            .dtype = given[i].dtype, .shape = given[i].shape};
    args[i].v_ptr = &tensors[i];
  }
  TVMFFIAny result = {.type_index = kTVMFFINone};
  if (kernel(NULL, args, (int32_t)count, &result) != 0) return 1;
  fseek(file, data, SEEK_SET);
  for (int i = 0; i < count; ++i) {
    if (args[i].type_index != kTVMFFIDLTensorPtr) continue;
    expect(fwrite(tensors[i].data, 1, given[i].nbytes, file) == (size_t)given[i].nbytes, "results");
  }
  expect(fclose(file) == 0, "results");
  return 0;
}
