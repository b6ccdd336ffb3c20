// Names and lines for what the watch finds: from the library's own file, and only when they are needed.
#include "watch.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <elf.h>
#endif

namespace simt {
namespace {

const Dl_info& library() {
  static Dl_info info;
  if (!info.dli_fbase) dladdr(limpid_error, &info);
  return info;
}

// The last name in a mangled symbol: `tile` of _ZZN12_GLOBAL__N_14normE4tile.
void last_name(const char* symbol, char* name, size_t room) {
  snprintf(name, room, "%s", symbol);
  for (const char* at = symbol; *at;) {
    char* after;
    size_t length = *at >= '1' && *at <= '9' ? strtoul(at, &after, 10) : 0;
    if (!length || length > strlen(after)) ++at;
    else {
      snprintf(name, room, "%.*s", static_cast<int>(length), after);
      at = after + length;
    }
  }
}

#ifdef __linux__
bool read_at(FILE* file, uint64_t offset, void* into, size_t bytes) {
  return !fseek(file, static_cast<long>(offset), SEEK_SET) && fread(into, 1, bytes, file) == bytes;
}

// The variables within [begin, end), of the table of symbols.
uint32_t read_symbols(FILE* file, uintptr_t begin, uintptr_t end, Array* arrays) {
  Elf64_Ehdr header;
  if (!read_at(file, 0, &header, sizeof header) || memcmp(header.e_ident, ELFMAG, SELFMAG)) return 0;
  uint32_t count = 0;
  for (uint32_t i = 0; i < header.e_shnum; ++i) {
    Elf64_Shdr table, strings;
    if (!read_at(file, header.e_shoff + i * sizeof table, &table, sizeof table) || table.sh_type != SHT_SYMTAB) continue;
    if (!read_at(file, header.e_shoff + table.sh_link * sizeof strings, &strings, sizeof strings)) continue;
    for (uint64_t j = 0; j < table.sh_size / sizeof(Elf64_Sym) && count < shared_arrays; ++j) {
      Elf64_Sym symbol;
      char name[512] = "";
      if (!read_at(file, table.sh_offset + j * sizeof symbol, &symbol, sizeof symbol)) break;
      uintptr_t at = library_base() + symbol.st_value;
      if (ELF64_ST_TYPE(symbol.st_info) != STT_OBJECT || at < begin || at >= end) continue;
      if (fseek(file, static_cast<long>(strings.sh_offset + symbol.st_name), SEEK_SET) || !fgets(name, sizeof name, file))
        name[0] = 0;
      last_name(name, arrays[count].name, sizeof arrays[count].name);
      arrays[count].begin = at, arrays[count].bytes = symbol.st_size, arrays[count].element = 0, ++count;
    }
  }
  return count;
}
#endif

}  // namespace

uintptr_t library_base() { return reinterpret_cast<uintptr_t>(library().dli_fbase); }

uint32_t find_shared(Array* arrays) {
  static Array found[shared_arrays];
  static uint32_t count;
  uintptr_t begin, end;
  if (!shared_range(&begin, &end)) return 0;
#ifdef __linux__
  if (!count)
    if (FILE* file = fopen(library().dli_fname, "rb")) count = read_symbols(file, begin, end, found), fclose(file);
#endif
  if (!count) found[0] = {"shared memory", begin, end - begin, 0}, count = 1;
  memcpy(arrays, found, count * sizeof(Array));
  return count;
}

void find_line(uint32_t offset, char* line, size_t room) {
  snprintf(line, room, "an unknown line");
  char command[4400], said[1024];
  snprintf(command, sizeof command, "LD_PRELOAD= exec addr2line -i -e '%s' 0x%x 2>/dev/null", library().dli_fname, offset - 1);
  FILE* pipe = popen(command, "r");
  if (!pipe) return;
  size_t folder = static_cast<size_t>(base_name(__FILE__) - __FILE__);
  for (bool found = false; fgets(said, sizeof said, pipe);) {  // from the innermost inlined function outwards
    if (found || said[0] == '?' || !strncmp(said, __FILE__, folder)) continue;
    snprintf(line, room, "%s", base_name(said));
    line[strcspn(line, "\n")] = 0;
    if (char* more = strstr(line, " (")) *more = 0;  // of a line's parts; the file's name may have spaces
    found = true;
  }
  pclose(pipe);
}

}  // namespace simt
