// What went wrong, put together piece by piece in limpid_error.
#include "runtime.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

extern "C" {
__attribute__((visibility("default"))) char limpid_error[4096];
}

namespace simt {

void say(const char* format, ...) {
  size_t used = strlen(limpid_error);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(limpid_error + used, sizeof limpid_error - used, format, arguments);
  va_end(arguments);
}

void say_thread(Index t) { say("thread (%u,%u,%u)", t.x, t.y, t.z); }

const char* base_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

static bool in_word(char c) {
  return c == '_' || (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
}

// Puts the message in the words of the kernel's language. Names of files stay: they end in a point and letters.
void translate(const Kernel& kernel) {
  char said[sizeof limpid_error];
  size_t length = 0;
  for (const char* at = limpid_error; *at && length + 64 < sizeof said;) {
    const char* const* pair = kernel.words;
    for (; *pair; pair += 2) {
      size_t size = strlen(*pair);
      bool starts = at == limpid_error || !(in_word(at[-1]) || strchr("./-", at[-1]));
      if (starts && !strncmp(at, *pair, size) && !in_word(at[size]) && !(at[size] == '.' && in_word(at[size + 1]))) break;
    }
    if (*pair) length += static_cast<size_t>(snprintf(said + length, 64, "%s", pair[1])), at += strlen(pair[0]);
    else said[length++] = *at++;
  }
  said[length] = 0;
  memcpy(limpid_error, said, length + 1);
}

}  // namespace simt
