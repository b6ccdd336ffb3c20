// The checked build: every access of the kernel to memory comes here first. The compiler's instrumentation for races
// (-fsanitize=thread) makes the calls; the functions that it calls are these, not its own library's.
//
// Bounds: arrays are copied to where nothing is for a long way on both sides, so an address tells which array was meant.
// Races: of every element the last write and two reads are known, each by thread and by what came before it: two
// accesses are in order when a barrier of the block, or an operation of their warp, lies between them.
#include "watch.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

namespace simt {
namespace {

constexpr uint32_t atomic_bit = 1u << 31, store_bit = 1u << 30, place_bits = store_bit - 1;  // of a site
// Accesses by the threads of a block without one of them ending or waiting, after which it will not happen any more;
// and by one of them, after which it is another's turn, who may write what it looks out for.
constexpr uint64_t patience = 1ull << 26, turn = 1 << 14;

struct Segment {  // what a thread does between two meetings
  uint32_t block, thread, epoch, step;
};
struct Mark {  // an access: 0, or its segment; where in the library it is, and whether it is atomic, and stores only
  uint32_t segment, site;
};
struct Cell {
  Mark write, read, other;  // `other`: a read by another thread than `read`
};
struct Region {
  Array array;
  uintptr_t low, high;  // addresses that mean this array, within bounds or not
  Cell* cells;          // nullptr: never written
  uint32_t grain;       // bytes of a cell
  void *given, *mapped; // the caller's array
  size_t reserved, cell_bytes;
  bool shared, written;
};
struct Pending {  // a write beside another thread's access: no race if it writes what is there already
  const Region* region;
  Thread* thread;
  uintptr_t address;
  uint32_t size;
  Mark before, now;
  bool before_write;
  unsigned char bytes[16];
};

struct Unwritten {  // a read of what nobody has written: a race if somebody does before the next barrier
  const Region* region;
  const Thread* thread;
  uintptr_t address;
  uint32_t size, site;
};

Region regions[256 + shared_arrays + 1];
uint32_t region_count;
void* const* numbers;
const Kernel* watched;
Segment* segments;
uint32_t segment_count, segment_room, block_number, epoch;
bool fenced;
uint64_t accesses;
Pending pending;
Unwritten unwritten;
uintptr_t base;

uint32_t site_of(const void* pc) { return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pc) - base) & place_bits; }

// Memory of zeros; of it only what is touched is taken. Without any the launch fails.
void* reserve(size_t bytes) {
  void* got = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got != MAP_FAILED) return got;
  if (!failed()) say("no memory for the %zu bytes that watching this launch takes", bytes), give_up();
  return nullptr;
}

void give_cells(Region& r) {
  r.cell_bytes = (r.array.bytes / r.grain + 16) * sizeof(Cell);
  r.cells = static_cast<Cell*>(reserve(r.cell_bytes));
}

// A copy of a caller's array, with room on both sides.
void guard(Region& r, const Parameter& p, void* data, uint64_t bytes) {
  size_t zone = bytes < 1 << 16 ? 1 << 16 : bytes > 1 << 24 ? 1 << 24 : (bytes + 4095) & ~uint64_t{4095};
  r = {};
  r.reserved = 2 * zone + ((bytes + 4095) & ~uint64_t{4095});
  r.given = data, r.mapped = reserve(r.reserved), r.written = p.written;
  r.low = reinterpret_cast<uintptr_t>(r.mapped), r.high = r.low + r.reserved;
  r.grain = p.element ? p.element : 1;
  r.array = {{}, r.low + zone, bytes, r.grain};
  snprintf(r.array.name, sizeof r.array.name, "%s", p.name);
  if (!r.mapped) return;
  memcpy(reinterpret_cast<void*>(r.array.begin), data, bytes);
  if (p.written) give_cells(r);
}

void add_shared() {
  static Array found[shared_arrays];
  uint32_t count = find_shared(found);
  for (uint32_t i = 0; i < count; ++i) {
    Region& r = regions[region_count++] = {};
    r.array = found[i], r.shared = true, r.grain = 1;
    r.low = r.array.begin, r.high = r.low + r.array.bytes;
    give_cells(r);
  }
  if (!dynamic_bytes()) return;
  Region& r = regions[region_count++] = {};
  r.shared = true, r.grain = 1;
  r.low = reinterpret_cast<uintptr_t>(limpid_dynamic), r.high = r.low + dynamic_limit;
  r.array = {"dynamic shared memory", r.low, dynamic_bytes(), 0};
  give_cells(r);
}

const char* kind(bool write, uint32_t site) { return site & atomic_bit ? "atomic" : write ? "write" : "read"; }

// "tile[5]"; of shared memory an element is as large as the access.
void say_element(const Region& r, uintptr_t address, uint32_t size) {
  int64_t element = r.array.element ? r.array.element : size ? size : 1, offset = static_cast<int64_t>(address - r.array.begin);
  int64_t index = offset >= 0 ? offset / element : -((element - 1 - offset) / element);
  say("%s[%lld]", r.array.name, static_cast<long long>(index));
}

void say_where(const Thread& t, uint32_t site) {
  char line[256];
  find_line(site & place_bits, line, sizeof line);
  say("block (%u,%u,%u), ", here.block.x, here.block.y, here.block.z), say_thread(t.index), say(", %s", line);
}

void end_thread() {
  if (running) stop();
  give_up();
}

void out_of_bounds(const Region& r, uintptr_t address, uint32_t size, bool write, uint32_t site) {
  uintptr_t end = r.array.begin + r.array.bytes, at = address >= r.array.begin && address < end ? end : address;
  uint64_t element = r.array.element ? r.array.element : size;
  say_element(r, at, size), say(" %s out of bounds: %s has %llu element%s", write ? "written" : "read", r.array.name,
                                static_cast<unsigned long long>(r.array.bytes / element),
                                r.array.bytes / element == 1 ? "" : "s");
  say("; "), say_where(*running, site);
  end_thread();
}

void race(const Region& r, uintptr_t address, uint32_t size, Mark before, bool before_write, const Thread& t, Mark now,
          bool write) {
  const Segment& s = segments[before.segment];
  char first[256], second[256];
  find_line(before.site & place_bits, first, sizeof first), find_line(now.site & place_bits, second, sizeof second);
  say("race on %s memory ", r.shared ? "shared" : "global"), say_element(r, address, size);
  if (s.block != block_number) {
    say(" between two blocks, of which the second is block (%u,%u,%u), ", here.block.x, here.block.y, here.block.z);
    say_thread(t.index), say(": %s %s, %s %s; blocks run in no order", kind(before_write, before.site), first,
                             kind(write, now.site), second);
  } else {
    Index other = threads[s.thread].index;
    say(" between threads (%u,%u,%u) and (%u,%u,%u) of block (%u,%u,%u): ", other.x, other.y, other.z, t.index.x,
        t.index.y, t.index.z, here.block.x, here.block.y, here.block.z);
    say("%s %s, %s %s; a %s is missing between them", kind(before_write, before.site), first, kind(write, now.site),
        second, watched->barrier);
  }
  end_thread();
}

bool in_order(uint32_t segment, const Thread& t, bool shared) {
  const Segment& s = segments[segment];
  if (s.block != block_number) return shared || fenced;
  return s.thread == t.linear || s.epoch != epoch || (s.thread / warp_size == t.linear / warp_size && s.step < t.steps);
}

void settle() {  // the write that was pending has happened
  if (!pending.region) return;
  Pending p = pending;
  pending.region = nullptr;
  if (memcmp(p.bytes, reinterpret_cast<const void*>(p.address), p.size))
    race(*p.region, p.address, p.size, p.before, p.before_write, *p.thread, p.now, true);
}

uint32_t own_segment(Thread& t) {
  if (t.segment) return t.segment;
  if (segment_count >= segment_room) {
    segment_room = segment_room ? 2 * segment_room : 4096;
    segments = static_cast<Segment*>(realloc(segments, segment_room * sizeof(Segment)));
    if (!segments) abort();
  }
  segments[segment_count] = {block_number, t.linear, epoch, t.steps};
  return t.segment = segment_count++;
}

void touch(Region& r, uintptr_t address, uint32_t size, bool write, uint32_t site) {
  Thread& t = *running;
  const Mark now = {own_segment(t), site};
  const bool atomic = site & atomic_bit;
  size_t first = (address - r.array.begin) / r.grain, last = (address + size - 1 - r.array.begin) / r.grain;
  for (size_t i = first; i <= last; ++i) {
    Cell& c = r.cells[i];
    // What it did since the last meeting it may do again: had another come between, that would have been the race.
    if (!atomic && !(c.write.site & atomic_bit))
      if (c.write.segment == now.segment || (!write && c.read.segment == now.segment)) continue;
    auto races = [&](Mark m) {
      return m.segment && m.segment != now.segment && !(atomic && m.site & atomic_bit) && !in_order(m.segment, t, r.shared);
    };
    bool fresh = r.shared && (!c.write.segment || segments[c.write.segment].block != block_number);
    if (fresh && (!write || (atomic && !(site & store_bit))) && !unwritten.region) unwritten = {&r, &t, address, size, site};
    auto meets = [&](Mark before, bool before_write) {
      if (!races(before)) return;
      if (!write || (before.site | site) & atomic_bit || size > sizeof pending.bytes)
        race(r, address, size, before, before_write, t, now, write);
      if (!pending.region) pending = {&r, &t, address, size, before, now, before_write, {}};
      memcpy(pending.bytes, reinterpret_cast<const void*>(address), size);
    };
    meets(c.write, true);
    if (write) {
      meets(c.read, false), meets(c.other, false);
      const bool plain = c.write.segment == now.segment && !(c.write.site & atomic_bit);
      if (!(atomic && plain)) c.write = now;  // its own plain write is what others may race with
    } else if (c.read.segment != now.segment) {
      (races(c.read) ? c.other : c.read) = now;
    }
  }
}

// Memory that is in no array: a thread's own, the library's constants, and numbers that were passed.
void elsewhere(uintptr_t address, uint32_t size, bool write, uint32_t site) {
  uintptr_t stack = reinterpret_cast<uintptr_t>(stack_of(running));
  if (address - stack < stack_size) return;
  for (uint32_t i = 0; i < watched->count; ++i)
    if (!watched->parameters[i].element && address - reinterpret_cast<uintptr_t>(numbers[i]) < 16) return;
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(address), &info) && reinterpret_cast<uintptr_t>(info.dli_fbase) == base) return;
  for (uint32_t i = 0; i < thread_count; ++i)
    if (address - reinterpret_cast<uintptr_t>(stack_of(threads + i)) < stack_size) {
      say("the local memory of "), say_thread(threads[i].index), say(" is %s by another; ", write ? "written" : "read");
      say_where(*running, site), end_thread();
    }
  say("%u bytes at address 0x%llx are %s, which is in no array; ", size, static_cast<unsigned long long>(address),
      write ? "written" : "read");
  say_where(*running, site), end_thread();
}

void access(uintptr_t address, uint32_t size, bool write, uint32_t site) {
  Thread* t = running;
  if (!t || !size) return;
  settle();
  if (++accesses % turn == 0) {
    if (accesses > patience) {
      say("no end: after %llu accesses to memory no thread of the block has ended, or come to a barrier; ",
          static_cast<unsigned long long>(patience));
      say_where(*t, site), end_thread();
    }
    yield();
  }
  for (uint32_t i = 0; i < region_count; ++i) {
    Region& r = regions[i];
    if (address < r.low || address >= r.high) continue;
    if (address < r.array.begin || address + size > r.array.begin + r.array.bytes)
      out_of_bounds(r, address, size, write, site);
    if (r.cells) touch(r, address, size, write, site);
    return;
  }
  elsewhere(address, size, write, site);
}

}  // namespace

void watch_launch(void** values, const uint64_t* sizes, const Kernel& k) {

  watched = &k, numbers = values, fenced = false, segment_count = 1, pending.region = nullptr;
  block_number = epoch = 0, base = library_base();
  region_count = 0;
  for (uint32_t i = 0; i < k.count; ++i) {
    if (!k.parameters[i].element) continue;
    Region* same = nullptr;
    for (uint32_t j = 0; j < region_count; ++j)
      if (regions[j].given == values[i] && regions[j].array.bytes == sizes[i]) same = regions + j;
    if (!same) guard(*(same = regions + region_count++), k.parameters[i], values[i], sizes[i]);
    if (k.parameters[i].written && !same->cells) same->written = true, give_cells(*same);
    values[i] = reinterpret_cast<void*>(same->array.begin);
  }
  add_shared();
}

void watch_finish() {
  for (uint32_t i = 0; i < region_count; ++i) {
    Region& r = regions[i];
    const void* now = reinterpret_cast<const void*>(r.array.begin);  // what has not changed may be read only
    if (r.written && !failed() && memcmp(r.given, now, r.array.bytes)) memcpy(r.given, now, r.array.bytes);
    if (r.mapped) munmap(r.mapped, r.reserved);
    if (r.cells) munmap(r.cells, r.cell_bytes);
  }
  region_count = 0;
}

void watch_block() { ++block_number, ++epoch, unwritten.region = nullptr; }

void watch_barrier() {
  if (const Region* r = unwritten.region) {
    say("shared memory "), say_element(*r, unwritten.address, unwritten.size);
    say(" is read before anything is written to it; "), say_where(*unwritten.thread, unwritten.site);
    give_up();
  }
  ++epoch;
  for (uint32_t i = 0; i < thread_count; ++i) threads[i].segment = 0;
}

void watch_meeting(Thread* t) { t->segment = 0; }

void watch_pause(const Thread* t) {
  settle();
  if (t->state != State::yielded) accesses = 0;
}

void watch_fence() { fenced = true; }

void outside(int64_t index, uint32_t count) {
  if (!running) return;
  say("index %lld out of bounds of a vector of %u; ", static_cast<long long>(index), count);
  say_where(*running, site_of(__builtin_return_address(0))), end_thread();
}

void watch_atomic(const void* address, uint32_t size, const void* pc, bool reads) {
  access(reinterpret_cast<uintptr_t>(address), size, true, site_of(pc) | atomic_bit | (reads ? 0 : store_bit));
}

}  // namespace simt

#define SITE simt::site_of(__builtin_return_address(0))
#define ACCESS(name, size, write) \
  void name(void* p) { simt::access(reinterpret_cast<uintptr_t>(p), size, write, SITE); }
#define SIZED(n) \
  ACCESS(__tsan_read##n, n, false) ACCESS(__tsan_write##n, n, true) \
  ACCESS(__tsan_volatile_read##n, n, false) ACCESS(__tsan_volatile_write##n, n, true) \
  ACCESS(__tsan_unaligned_read##n, n, false) ACCESS(__tsan_unaligned_write##n, n, true)

extern "C" {
#pragma GCC visibility push(hidden)
SIZED(1) SIZED(2) SIZED(4) SIZED(8) SIZED(16)
void __tsan_read_range(void* p, size_t n) {
  simt::access(reinterpret_cast<uintptr_t>(p), static_cast<uint32_t>(n), false, SITE);
}
void __tsan_write_range(void* p, size_t n) {
  simt::access(reinterpret_cast<uintptr_t>(p), static_cast<uint32_t>(n), true, SITE);
}
void* __tsan_memcpy(void* to, const void* from, size_t n) {
  simt::access(reinterpret_cast<uintptr_t>(from), static_cast<uint32_t>(n), false, SITE);
  simt::access(reinterpret_cast<uintptr_t>(to), static_cast<uint32_t>(n), true, SITE);
  return memmove(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, size_t n) { return __tsan_memcpy(to, from, n); }
void* __tsan_memset(void* to, int value, size_t n) {
  simt::access(reinterpret_cast<uintptr_t>(to), static_cast<uint32_t>(n), true, SITE);
  return memset(to, value, n);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// What -fsanitize=bounds and -fsanitize=alignment hand over: a place in the source, and types with their names.
struct Place {
  const char* file;
  uint32_t line, column;
};
struct Type {
  uint16_t kind, info;
  char name[1];
};
struct Bounds {
  Place place;
  const Type *array, *index;
};
struct Mismatch {
  Place place;
  const Type* type;
  unsigned char log_alignment, check;
};

void __ubsan_handle_out_of_bounds(Bounds* data, uintptr_t index) {
  if (!simt::running) return;
  int64_t value = data->index->info & 1 ? static_cast<int64_t>(index) : static_cast<int64_t>(index);
  if (data->index->info >> 1 == 5) value = data->index->info & 1 ? int64_t{static_cast<int32_t>(index)} : static_cast<uint32_t>(index);
  simt::say("index %lld out of bounds of an array of type %s; block (%u,%u,%u), ", static_cast<long long>(value),
            data->array->name, simt::here.block.x, simt::here.block.y, simt::here.block.z);
  simt::say_thread(simt::running->index);
  simt::say(", %s:%u", simt::base_name(data->place.file), data->place.line), simt::stop();
}
void __ubsan_handle_out_of_bounds_abort(Bounds* data, uintptr_t index) { __ubsan_handle_out_of_bounds(data, index); }

void __ubsan_handle_type_mismatch_v1(Mismatch* data, uintptr_t address) {
  if (!simt::running) return;
  simt::say("misaligned address: a %s must lie at a multiple of %u bytes, and 0x%llx does not; block (%u,%u,%u), ",
            data->type->name, 1u << data->log_alignment, static_cast<unsigned long long>(address), simt::here.block.x,
            simt::here.block.y, simt::here.block.z);
  simt::say_thread(simt::running->index);
  simt::say(", %s:%u", simt::base_name(data->place.file), data->place.line), simt::stop();
}
void __ubsan_handle_type_mismatch_v1_abort(Mismatch* data, uintptr_t at) { __ubsan_handle_type_mismatch_v1(data, at); }
#pragma GCC visibility pop
}
