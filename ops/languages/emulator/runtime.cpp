// Fibers, barriers, shared memory and the launch: see simt.h. Made once, kept in the disk cache as an object.
#include "runtime.h"

#include <string.h>
#include <sys/mman.h>

#if defined(__APPLE__)
#define SYMBOL "_limpid_switch"
extern char shared_begin[] __asm__("section$start$__DATA$limpid_shared");
extern char shared_end[] __asm__("section$end$__DATA$limpid_shared");
#else
#define SYMBOL "limpid_switch"
extern "C" SIMT_HIDDEN __attribute__((weak)) char __start_limpid_shared[], __stop_limpid_shared[];
#define shared_begin __start_limpid_shared
#define shared_end __stop_limpid_shared
#endif

// limpid_switch(from, to): keep what a call must keep, and the stack pointer in *from; go on where `to` left off.
#if defined(__x86_64__)
asm(".text\n" SYMBOL ":\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\npopq %rcx\njmp *%rcx\n");
constexpr size_t return_word = 6, frame_words = 8;
#elif defined(__aarch64__)
asm(".text\n.p2align 2\n" SYMBOL ":\n"
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\n"
    "stp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
    "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\n"
    "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\nret\n");
constexpr size_t return_word = 11, frame_words = 20;
#else
#error "the emulator knows how to switch stacks on x86-64 and on 64-bit ARM"
#endif

extern "C" {
SIMT_HIDDEN void limpid_switch(void** from, void* to);
alignas(1024) SIMT_HIDDEN char limpid_dynamic[simt::dynamic_limit];

}

namespace simt {

Thread* threads;
Thread* running;
uint32_t thread_count;
Here here;

namespace {

constexpr uint32_t thread_limit = 1024, no_lane = 255, every_lane = 32;

constexpr uint64_t untouched = 0x6c696d7069642e2eull;  // the lowest word of a stack

void* scheduler;           // its stack pointer while a thread runs
char* stacks;              // of all threads; kept from launch to launch
bool has_failed;
uint32_t at_barrier, ended, dynamic_size;
uint32_t live[thread_limit / warp_size];     // lanes of each warp that have not ended
uint32_t waiting[thread_limit / warp_size];  // lanes of each warp that wait for others of it
const Kernel* kernel;
void* own[256];  // what the kernel is called with

// Stacks for `count` threads; kept from launch to launch, and of memory only what a thread has touched.
bool prepare(uint32_t count) {
  static uint32_t room;
  if (count <= room) return true;
  if (room) munmap(stacks, room * stack_size);
  room = (count + 127) / 128 * 128;
  void* memory = mmap(nullptr, room * stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  static Thread all[thread_limit];
  if (memory == MAP_FAILED) return room = 0, false;
  stacks = static_cast<char*>(memory), threads = all;
  for (uint32_t i = 0; i < room; ++i) memcpy(stacks + i * stack_size, &untouched, sizeof untouched);
  return true;
}

void wait(State state) {
  running->state = state;
  limpid_switch(&running->stack_pointer, scheduler);
}

void fiber() {
  kernel->entry(own);
  wait(State::ended);
  __builtin_unreachable();
}

void start_thread(uint32_t i, Index size) {
  Thread& t = threads[i];
  memset(&t, 0, offsetof(Thread, gathered));
  t.steps = t.segment = 0;
  t.linear = i, t.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
  size_t apart = i % 31 * 128;  // or all tops would compete for the same lines of the cache
  void** top = reinterpret_cast<void**>(const_cast<char*>(stack_of(&t)) + stack_size - apart) - frame_words;
  memset(top, 0, frame_words * sizeof(void*));
  top[return_word] = reinterpret_cast<void*>(&fiber);
  t.stack_pointer = top;
}

void run(Thread& t) {
  running = &t;
  here.thread = t.index, here.linear = t.linear;
  limpid_switch(&scheduler, t.stack_pointer);
  running = nullptr;
  if (!has_failed) watch_pause(&t);
}

void say_wait(const Thread& t) {
  if (t.state == State::ended) say("it has ended");
  else say("it waits at %s, %s:%d", t.name, base_name(t.file), t.line);
}

// All threads are at a barrier: let them go on, if it is one and the same.
void release_barrier() {
  uint32_t count = 0;
  for (uint32_t i = 0; i < thread_count; ++i) {
    Thread& t = threads[i];
    if (t.line != threads[0].line || strcmp(t.file, threads[0].file)) {
      say("divergent barriers: "), say_thread(threads[0].index);
      say(" waits at %s, %s:%d, but ", threads[0].name, base_name(threads[0].file), threads[0].line);
      say_thread(t.index), say(" at %s:%d", base_name(t.file), t.line);
      has_failed = true;
      return;
    }
    count += t.predicate;
  }
  for (uint32_t i = 0; i < thread_count; ++i) threads[i].came = count, threads[i].state = State::ready;
  at_barrier = 0;
  watch_barrier();
}

// One thread of a warp waits or has ended: if all that it waits for are there, let them go on.
void release_warp(const Thread& last) {
  uint32_t first = last.linear / warp_size * warp_size, members = last.mask & live[last.linear / warp_size];
  if (members & ~waiting[last.linear / warp_size]) return;
  uint64_t bits[warp_size] = {};
  uint32_t steps = 0;
  for (uint32_t i = 0; i < warp_size; ++i)
    if (members >> i & 1) {
      bits[i] = threads[first + i].bits;
      if (threads[first + i].mask != last.mask) return;
      if (threads[first + i].steps >= steps) steps = threads[first + i].steps + 1;
    }
  waiting[last.linear / warp_size] &= ~members;
  for (uint32_t i = 0; i < warp_size; ++i) {
    if (!(members >> i & 1)) continue;
    Thread& t = threads[first + i];
    if (t.source < every_lane) {
      if (!(members >> t.source & 1)) {
        say("%s: ", t.name), say_thread(t.index);
        say(" reads lane %u, which %s; %s:%d", t.source,
            t.mask >> t.source & 1 ? "does not exist or has ended" : "the mask does not name", base_name(t.file), t.line);
        has_failed = true;
        return;
      }
      t.bits = bits[t.source];
    } else if (t.source == every_lane) {
      memcpy(t.gathered, bits, sizeof bits);
    }
    t.came = members, t.state = State::ready, t.steps = steps;
    watch_meeting(&t);
  }
}

// What a thread's stop means for others. Gives whether all go on from a barrier.
bool after(Thread& t) {
  if (t.state == State::at_barrier) {
    if (++at_barrier < thread_count) return false;
    release_barrier();
    return true;
  } else if (t.state == State::in_warp) {
    waiting[t.linear / warp_size] |= 1u << t.linear % warp_size;
    release_warp(t);
  } else if (t.state == State::ended) {
    if (memcmp(stack_of(&t), &untouched, sizeof untouched)) {
      say_thread(t.index), say(" needs more than the %zu KiB of local memory that the emulator has", stack_size >> 10);
      has_failed = true;
    }
    ++ended, live[t.linear / warp_size] &= ~(1u << t.linear % warp_size);
    for (uint32_t i = t.linear / warp_size * warp_size, n = 0; n < warp_size && i < thread_count; ++i, ++n)
      if (threads[i].state == State::in_warp) release_warp(threads[i]);
  }
  return false;
}

void say_stuck() {
  for (uint32_t i = 0; i < thread_count; ++i) {
    const Thread& t = threads[i];
    if (t.state == State::ended) continue;
    uint32_t first = t.linear / warp_size * warp_size;
    for (uint32_t j = 0; j < thread_count; ++j) {
      const Thread& other = threads[j];
      bool awaited = t.state == State::at_barrier
                         ? other.state != State::at_barrier
                         : j >= first && j < first + warp_size && t.mask >> (j - first) & 1 && &other != &t &&
                               other.state != State::ended && (other.state != State::in_warp || other.mask != t.mask);
      if (!awaited) continue;
      say("%s: ", t.state == State::at_barrier ? "divergent barrier" : "a warp that never meets");
      say_thread(t.index), say(" waits at %s, %s:%d, where ", t.name, base_name(t.file), t.line);
      say_thread(other.index), say(" never comes: "), say_wait(other);
      if (other.state == State::in_warp && t.state == State::in_warp) say(" with the mask 0x%x, not 0x%x", other.mask, t.mask);
      return;
    }
  }
  say("threads wait for each other for ever");
}

// Lets the threads of a warp run until all of it waits. Gives whether any did.
bool run_warp(uint32_t first) {
  uint32_t last = first + warp_size < thread_count ? first + warp_size : thread_count;
  bool moved = false;
  for (bool again = true; again;) {
    again = false;
    for (uint32_t i = first; i < last && !has_failed; ++i)
      if (threads[i].state == State::ready) {
        moved = again = true;
        run(threads[i]);
        if (!has_failed && after(threads[i])) return true;  // on from the block's first thread
      }
  }
  return moved;
}

void run_block(Index size) {
  at_barrier = ended = 0;
  memset(live, 0, sizeof live), memset(waiting, 0, sizeof waiting);
  for (uint32_t i = 0; i < thread_count; ++i) start_thread(i, size), live[i / warp_size] |= 1u << i % warp_size;
  uintptr_t begin, end;
  if (shared_range(&begin, &end)) memset(reinterpret_cast<void*>(begin), 0xff, end - begin);
  memset(limpid_dynamic, 0xff, dynamic_size);
  watch_block();
  while (ended < thread_count) {
    bool moved = false;
    for (uint32_t first = 0; first < thread_count; first += warp_size)
      if (run_warp(first)) moved = true;
    if (has_failed) return;
    for (uint32_t i = 0; i < thread_count; ++i)
      if (threads[i].state == State::yielded) threads[i].state = State::ready, moved = true;
    if (!moved) {
      has_failed = true, say_stuck();
      return;
    }
  }
  watch_barrier();  // the end of a block is one, for the next
}

bool refused(const uint32_t* l) {
  uintptr_t begin, end;
  uint64_t declared = shared_range(&begin, &end) ? end - begin : 0, count = uint64_t{l[3]} * l[4] * l[5];
  if (!count || count > thread_limit || !l[0] || !l[1] || !l[2])
    say("cannot launch a grid of (%u, %u, %u) blocks of (%u, %u, %u) threads: a block has 1 to %u threads, a grid at "
        "least one block", l[0], l[1], l[2], l[3], l[4], l[5], thread_limit);
  else if (declared > kernel->shared_limit)
    say("%s declares %llu bytes of shared memory; a block may declare %u", kernel->name,
        static_cast<unsigned long long>(declared), kernel->shared_limit);
  else if (declared + l[6] > kernel->whole_limit)
    say("%u bytes of dynamic shared memory and %llu declared are more than the %u that a block may have", l[6],
        static_cast<unsigned long long>(declared), kernel->whole_limit);
  else if (!prepare(static_cast<uint32_t>(count)))
    say("no memory for the stacks of %u threads", static_cast<uint32_t>(count));
  else return false;
  return true;
}

void meet(uint32_t mask, uint64_t bits, uint32_t source, const char* name, const char* file, int line) {
  Thread& t = *running;
  if (!(mask >> t.linear % warp_size & 1)) {
    say("%s: ", name), say_thread(t.index), say(" is lane %u, which its own mask 0x%x does not name; %s:%d",
                                                t.linear % warp_size, mask, base_name(file), line);
    stop();
  }
  t.mask = mask, t.bits = bits, t.source = source, t.name = name, t.file = file, t.line = line;
  wait(State::in_warp);
}

}  // namespace

void give_up() { has_failed = true; }
bool failed() { return has_failed; }
const char* stack_of(const Thread* t) { return stacks + t->linear * stack_size; }
uint32_t dynamic_bytes() { return dynamic_size; }
void yield() { wait(State::yielded); }

void stop() {
  has_failed = true;
  limpid_switch(&running->stack_pointer, scheduler);
  __builtin_unreachable();
}

bool shared_range(uintptr_t* begin, uintptr_t* end) {
  *begin = reinterpret_cast<uintptr_t>(shared_begin), *end = reinterpret_cast<uintptr_t>(shared_end);
  return *begin && *begin < *end;
}

void fail(const char* message, const char* file, int line) {
  say("%s: ", message), say_thread(running->index), say(", %s:%d", base_name(file), line);
  stop();
}

int launch(const uint32_t* l, void* const* values, const uint64_t* sizes, const Kernel& k) {
  limpid_error[0] = 0, has_failed = false, kernel = &k;
  if (k.count > 256) say("%s has %u parameters; 256 are allowed", k.name, k.count);
  if (limpid_error[0] || refused(l)) return translate(k), 1;
  memcpy(own, values, k.count * sizeof(void*));
  thread_count = l[3] * l[4] * l[5], dynamic_size = l[6];
  watch_launch(own, sizes, k);
  const bool started = !has_failed;
  
  here.grid = {l[0], l[1], l[2]}, here.block_size = {l[3], l[4], l[5]};
  for (uint32_t z = 0; z < l[2] && !has_failed; ++z)
    for (uint32_t y = 0; y < l[1] && !has_failed; ++y)
      for (uint32_t x = 0; x < l[0] && !has_failed; ++x) here.block = {x, y, z}, run_block(here.block_size);
  watch_finish();
  if (has_failed && started && !strstr(limpid_error, "block ("))
    say("; block (%u,%u,%u)", here.block.x, here.block.y, here.block.z);
  if (has_failed) translate(k);
  return has_failed;
}

void barrier(const char* name, const char* file, int line) { barrier_count(false, name, file, line); }

uint32_t barrier_count(bool predicate, const char* name, const char* file, int line) {
  Thread& t = *running;
  t.predicate = predicate, t.name = name, t.file = file, t.line = line;
  wait(State::at_barrier);
  return t.came;
}

void warp_barrier(uint32_t mask, const char* name, const char* file, int line) {
  meet(mask, 0, no_lane, name, file, line);
}

uint64_t exchange(uint32_t mask, uint64_t bits, uint32_t lane, const char* name, const char* file, int line) {
  Thread* t = running;
  meet(mask, bits, lane % warp_size, name, file, line);
  return t->bits;
}

const uint64_t* gather(uint32_t mask, uint64_t bits, uint32_t* came, const char* name, const char* file, int line) {
  Thread* t = running;
  meet(mask, bits, every_lane, name, file, line);
  *came = t->came;
  return t->gathered;
}

uint32_t live_lanes() { return live[running->linear / warp_size]; }

uint64_t atomic_load(const void* address, uint32_t size, bool reads) {
  watch_atomic(address, size, __builtin_return_address(0), reads);
  uint64_t bits = 0;
  memcpy(&bits, address, size);
  return bits;
}

void atomic_store(void* address, uint32_t size, uint64_t bits) { memcpy(address, &bits, size); }
void fence() { watch_fence(); }

#ifndef SIMT_WATCHED
void watch_launch(void**, const uint64_t*, const Kernel&) {}
void watch_finish() {}
void watch_block() {}
void watch_barrier() {}
void watch_meeting(Thread*) {}
void watch_pause(const Thread*) {}
void watch_atomic(const void*, uint32_t, const void*, bool) {}
void watch_fence() {}
#endif

}  // namespace simt
