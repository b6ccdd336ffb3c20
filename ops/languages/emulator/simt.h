// Threads of a GPU on the CPU. A block's threads are fibers that take turns, its blocks run one after another.
// CUDA and Metal are spelled over these few names; runtime.cpp does the work, watch.cpp looks on in a checked build.
#pragma once
#include <stdint.h>

#define SIMT_HIDDEN __attribute__((visibility("hidden")))
#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()  // where the caller stands

#ifdef __APPLE__
#define SIMT_SECTION "__DATA,limpid_shared"
#else
#define SIMT_SECTION "limpid_shared"
#endif
// An array of a block. `SIMT_SHARED float tile[16];` is filled with ones bits (NaN) when a block starts.
#define SIMT_SHARED static __attribute__((section(SIMT_SECTION), used))
extern "C" SIMT_HIDDEN char limpid_dynamic[];  // the dynamic shared memory

namespace simt {

struct Index {
  uint32_t x, y, z;
};

// The running thread. Never changes for a thread, so the compiler may keep what it has read.
struct Here {
  Index thread, block, block_size, grid;
  uint32_t linear;  // of the thread in its block; its warp is linear / 32, its lane linear % 32
};
#ifdef SIMT_RUNTIME
SIMT_HIDDEN extern Here here;
#else
SIMT_HIDDEN extern const Here here;
#endif

constexpr uint32_t warp_size = 32, all_lanes = 0xffffffffu;

struct Parameter {
  const char* name;
  uint32_t element;  // bytes of an element, 0 of a number
  bool written;      // not const: copied back from where a checked build keeps it
};

struct Kernel {
  const char* name;
  void (*entry)(void* const* values);  // calls the kernel; of an array its data, of a number where it is kept
  const Parameter* parameters;
  uint32_t count;
  uint32_t shared_limit;  // bytes of shared memory that a block may declare
  uint32_t whole_limit;   // with the dynamic ones
  const char* barrier;    // what the language calls a barrier of a block
  const char* const* words;  // pairs, and nullptr: a word or two of CUDA's, what the language says instead
};

// What `limpid_launch` of a library does: see Program.library in base.py.
SIMT_HIDDEN int launch(const uint32_t* launch, void* const* values, const uint64_t* sizes, const Kernel& kernel);

// Barrier of a block. Every thread must come, to the same line.
SIMT_HIDDEN void barrier(const char* name, const char* file, int line);
// The same; gives how many threads came with true.
SIMT_HIDDEN uint32_t barrier_count(bool predicate, const char* name, const char* file, int line);

// Barrier of those lanes of a warp that `mask` names and that have not ended.
SIMT_HIDDEN void warp_barrier(uint32_t mask, const char* name, const char* file, int line);
// The same; gives the bits that `lane` came with.
SIMT_HIDDEN uint64_t exchange(uint32_t mask, uint64_t bits, uint32_t lane, const char* name, const char* file, int line);
// The same; gives the bits of all 32 lanes, until the thread's next one, and which lanes came.
SIMT_HIDDEN const uint64_t* gather(uint32_t mask, uint64_t bits, uint32_t* came, const char* name, const char* file,
                                   int line);
SIMT_HIDDEN uint32_t live_lanes();  // of the running thread's warp

// Memory without the instrumentation of a checked build: an atomic operation is a load and a store, as fibers take
// turns only where they wait. A load counts as the whole operation in the search for races.
// `reads` is false of one that stores only.
SIMT_HIDDEN uint64_t atomic_load(const void* address, uint32_t size, bool reads = true);
SIMT_HIDDEN void atomic_store(void* address, uint32_t size, uint64_t bits);
SIMT_HIDDEN void fence();  // memory is seen by other blocks: from here on blocks may be in step by atomics

// A checked build calls it where an index of a vector has no component: it fails, with the line that called.
SIMT_HIDDEN void outside(int64_t index, uint32_t count);

[[noreturn]] SIMT_HIDDEN void fail(const char* message, const char* file, int line);

inline uint32_t lane() { return here.linear % warp_size; }

template <class To, class From>
inline To bits_as(const From& from) {
  static_assert(sizeof(To) >= sizeof(From), "bits_as widens");
  To to = {};
  __builtin_memcpy(&to, &from, sizeof(From));
  return to;
}

// The value of another lane, of any type.
template <class T>
inline T shuffle(uint32_t mask, T value, uint32_t lane, const char* name, const char* file, int line) {
  T result;
  for (uint32_t at = 0; at < sizeof(T); at += 8) {
    uint32_t size = sizeof(T) - at < 8 ? sizeof(T) - at : 8;
    uint64_t bits = 0;
    __builtin_memcpy(&bits, reinterpret_cast<const char*>(&value) + at, size);
    bits = exchange(mask, bits, lane, name, file, line);
    __builtin_memcpy(reinterpret_cast<char*>(&result) + at, &bits, size);
  }
  return result;
}

// Combine the values of all lanes that come, from the first to the last.
template <class T, class F>
inline T reduce(uint32_t mask, T value, F combine, const char* name, const char* file, int line) {
  static_assert(sizeof(T) <= 8, "reduce takes up to 8 bytes");
  uint32_t came;
  const uint64_t* all = gather(mask, bits_as<uint64_t>(value), &came, name, file, line);
  bool first = true;
  T total = value;
  for (uint32_t i = 0; i < warp_size; ++i)
    if (came >> i & 1) {
      T each;
      __builtin_memcpy(&each, all + i, sizeof(T));
      total = first ? each : combine(total, each);
      first = false;
    }
  return total;
}

// Which lanes come with true.
inline uint32_t ballot(uint32_t mask, bool predicate, const char* name, const char* file, int line) {
  uint32_t came, set = 0;
  const uint64_t* all = gather(mask, predicate, &came, name, file, line);
  for (uint32_t i = 0; i < warp_size; ++i) set |= static_cast<uint32_t>((came >> i & 1) && all[i]) << i;
  return set;
}

// *address = change(*address), at once. Gives what was there before.
template <class T, class F>
inline T atomic(T* address, F change) {
  static_assert(sizeof(T) <= 8, "atomics take up to 8 bytes");
  uint64_t bits = atomic_load(address, sizeof(T));
  T old;
  __builtin_memcpy(&old, &bits, sizeof(T));
  T changed = change(old);
  atomic_store(address, sizeof(T), bits_as<uint64_t>(changed));
  return old;
}

}  // namespace simt
