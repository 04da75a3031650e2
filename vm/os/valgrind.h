// Whether this process runs under valgrind, which emulates the processor and must see every allocation itself.
#ifndef FREEHOLD_VM_OS_VALGRIND_H_
#define FREEHOLD_VM_OS_VALGRIND_H_

#include <cstdint>

namespace freehold::vm::os {

// Asks by an instruction sequence that a processor does nothing for, since the rotations add up to whole turns, and
// that valgrind takes for a question. Works before anything of libc does.
//
// Source: the client request mechanism of valgrind's manual; the sequences and RUNNING_ON_VALGRIND are its interface.
inline bool RunsUnderValgrind() {
  constexpr std::uintptr_t kRunningOnValgrind = 0x1001;
  const volatile std::uintptr_t request[6] = {kRunningOnValgrind, 0, 0, 0, 0, 0};
  std::uintptr_t depth = 0;  // of valgrinds in valgrinds; the answer of a processor
#if defined(__x86_64__)
  asm volatile(
      "rolq $3, %%rdi\n rolq $13, %%rdi\n rolq $61, %%rdi\n rolq $51, %%rdi\n"
      "xchgq %%rbx, %%rbx"
      : "+d"(depth)
      : "a"(&request[0])
      : "cc", "memory");
#elif defined(__aarch64__)
  register std::uintptr_t x3 asm("x3") = depth;
  register const volatile std::uintptr_t* x4 asm("x4") = &request[0];
  asm volatile(
      "ror x12, x12, #3\n ror x12, x12, #13\n ror x12, x12, #51\n ror x12, x12, #61\n"
      "orr x10, x10, x10"
      : "+r"(x3)
      : "r"(x4)
      : "cc", "memory");
  depth = x3;
#endif
  return depth != 0;
}

}  // namespace freehold::vm::os

#endif  // FREEHOLD_VM_OS_VALGRIND_H_
