// What runtime.cpp and watch.cpp know of each other.
#pragma once
#define SIMT_RUNTIME
#include <stddef.h>

#include "simt.h"

extern "C" char limpid_error[4096];

namespace simt {

enum class State : uint8_t { ready, yielded, at_barrier, in_warp, ended };

struct Thread {
  void* stack_pointer;
  Index index;
  uint32_t linear;
  State state;
  bool predicate;
  const char *name, *file;  // of what it waits in
  int line;
  uint32_t mask, source, came;  // of an operation of its warp; source 32: all lanes
  uint64_t bits;
  uint64_t gathered[warp_size];
  uint32_t steps;    // operations of its warp that it has been through
  uint32_t segment;  // watch.cpp: what it does until it next meets others; 0: not yet known
};

constexpr size_t dynamic_limit = 227 << 10, stack_size = 128 << 10;

extern Thread* threads;
extern Thread* running;  // nullptr between threads
extern uint32_t thread_count;

void yield();
void give_up();                              // ends the launch from outside of all threads
[[noreturn]] void stop();                    // the launch has failed, and limpid_error says why
bool failed();
void say(const char* format, ...) __attribute__((format(printf, 1, 2)));  // appends to limpid_error
void say_thread(Index thread);               // "thread (0,0,0)"
void translate(const Kernel& kernel);        // limpid_error into the words of its language
const char* base_name(const char* path);
bool shared_range(uintptr_t* begin, uintptr_t* end);  // of the declared arrays
uint32_t dynamic_bytes();
const char* stack_of(const Thread* thread);  // its lowest address

// Called in a checked build; empty functions in the other.
void watch_launch(void** values, const uint64_t* sizes, const Kernel& kernel);
void watch_finish();
void watch_block();
void watch_barrier();  // all threads of the block are there
void watch_meeting(Thread* thread);
void watch_pause(const Thread* thread);  // which ran, and has stopped
void watch_atomic(const void* address, uint32_t size, const void* pc, bool reads);
void watch_fence();

}  // namespace simt
