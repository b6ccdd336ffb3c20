// Without a sanitizer: tells where a kernel crashed, on the standard error output, and lets the process die.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <execinfo.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void say(const char *line) {
  if (write(2, line, strlen(line)) < 0) _exit(1);
}

// The instruction and the stack pointer at the crash; 0 where this machine's are not known here.
static void registers(const ucontext_t *context, uintptr_t *pc, uintptr_t *sp) {
#if defined(__x86_64__) && defined(__linux__)
  *pc = (uintptr_t)context->uc_mcontext.gregs[REG_RIP], *sp = (uintptr_t)context->uc_mcontext.gregs[REG_RSP];
#elif defined(__aarch64__) && defined(__linux__)
  *pc = (uintptr_t)context->uc_mcontext.pc, *sp = (uintptr_t)context->uc_mcontext.sp;
#else
  (void)context, *pc = 0, *sp = 0;
#endif
}

static void crashed(int signal, siginfo_t *info, void *context) {
  char line[4352];
  uintptr_t pc, sp, address = (uintptr_t)info->si_addr;
  registers(context, &pc, &sp);
  int beside = signal == SIGSEGV && sp && address + 65536 > sp && address < sp + 65536;
  snprintf(line, sizeof line, "limpid: signal %d address 0x%llx stack %d\n", signal, (unsigned long long)address, beside);
  say(line);
  void *frames[32];
  int count = backtrace(frames, 32);
  for (int i = 0; i < count; i++) {
    Dl_info at;
    if (!dladdr(frames[i], &at) || !at.dli_fname) continue;
    uintptr_t called = (uintptr_t)frames[i] - ((uintptr_t)frames[i] != pc);  // a return address is past its call
    snprintf(line, sizeof line, "limpid: frame 0x%llx of %s\n",
             (unsigned long long)(called - (uintptr_t)at.dli_fbase), at.dli_fname);
    say(line);
  }
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
