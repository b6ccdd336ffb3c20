// Without a sanitizer: tells where a kernel crashed, on the standard error output, and lets the process die.
#include <dlfcn.h>
#include <execinfo.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static void crashed(int signal, siginfo_t *info, void *context) {
  (void)context;
  char line[128];
  int length = snprintf(line, sizeof line, "limpid: signal %d code %d address 0x%llx\n", signal, info->si_code,
                        (unsigned long long)(uintptr_t)info->si_addr);
  if (write(2, line, length) < 0) _exit(128 + signal);
  void *frames[32];
  backtrace_symbols_fd(frames, backtrace(frames, 32), 2);
  raise(signal);  // its handler was taken away before this was called
}

void limpid_guard(void) {
  static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP};
  void *frames[2];
  backtrace(frames, 2);  // loads what it needs while that is still safe
  stack_t stack = {.ss_sp = malloc(1 << 18), .ss_size = 1 << 18};
  sigaltstack(&stack, 0);
  struct sigaction action = {.sa_sigaction = crashed, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESETHAND};
  for (unsigned i = 0; i < sizeof signals / sizeof *signals; i++) sigaction(signals[i], &action, 0);
}
