// What watch.cpp knows of the library that it is in: see places.cpp.
#pragma once
#include "runtime.h"

namespace simt {

struct Array {
  char name[64];
  uintptr_t begin;
  uint64_t bytes;
  uint32_t element;  // bytes; 0: not known
};

constexpr uint32_t shared_arrays = 64;

uintptr_t library_base();
// "kernels.py:14" of an offset in the library, which is that of a return address.
void find_line(uint32_t offset, char* line, size_t room);
// The declared shared arrays, by the library's table of symbols; one nameless array where there is none.
uint32_t find_shared(Array* arrays);

}  // namespace simt
