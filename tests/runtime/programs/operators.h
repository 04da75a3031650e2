// Checks every operator new and delete, and what they do when there is no memory. In a header of
// its own so that a program and a library that C programs load at run time can both contain it.
#ifndef FREEHOLD_TESTS_RUNTIME_PROGRAMS_OPERATORS_H_
#define FREEHOLD_TESTS_RUNTIME_PROGRAMS_OPERATORS_H_

#include <malloc.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>

namespace operators {

inline void Require(bool condition, const char* what) {
  if (condition) return;
  std::printf("WRONG: %s\n", what);
  std::fflush(stdout);
  std::_Exit(1);
}

// Keeps the compiler from removing pairs of new and delete, and from seeing that a size is absurd.
template <typename T>
T Hide(T value) {
  asm volatile("" : "+r"(value));
  return value;
}

inline const std::size_t kHuge = std::size_t{1} << 62;
constexpr std::align_val_t kAlign{256};

inline void* Used(void* p, std::size_t size, std::size_t alignment) {
  p = Hide(p);
  Require(p != nullptr, "memory");
  Require(reinterpret_cast<std::uintptr_t>(p) % alignment == 0, "alignment");
  Require(malloc_usable_size(p) >= size, "usable size");
  std::memset(p, 0x77, size);
  return p;
}

inline void CheckForms() {
  for (const std::size_t size : {0u, 1u, 8u, 24u, 100u, 1000u, 5000u, 100'000u, 3'000'000u}) {
    ::operator delete(Used(::operator new(size), size, 8));
    ::operator delete(Used(::operator new(size), size, 8), size);
    ::operator delete(Used(::operator new(size, std::nothrow), size, 8), std::nothrow);
    ::operator delete[](Used(::operator new[](size), size, 8));
    ::operator delete[](Used(::operator new[](size), size, 8), size);
    ::operator delete[](Used(::operator new[](size, std::nothrow), size, 8), std::nothrow);
    ::operator delete(Used(::operator new(size, kAlign), size, 256), kAlign);
    ::operator delete(Used(::operator new(size, kAlign), size, 256), size, kAlign);
    ::operator delete(Used(::operator new(size, kAlign, std::nothrow), size, 256), kAlign,
                      std::nothrow);
    ::operator delete[](Used(::operator new[](size, kAlign), size, 256), kAlign);
    ::operator delete[](Used(::operator new[](size, kAlign), size, 256), size, kAlign);
    ::operator delete[](Used(::operator new[](size, kAlign, std::nothrow), size, 256), kAlign,
                        std::nothrow);
  }
  ::operator delete(nullptr);
  ::operator delete[](nullptr);
  ::operator delete (nullptr, std::size_t{8});
  ::operator delete(nullptr, kAlign);
  ::operator delete (nullptr, std::size_t{8}, kAlign);
  // Memory of operator new and of malloc is the same.
  std::free(Used(::operator new(50), 50, 8));
  ::operator delete(Used(std::malloc(50), 50, 8));
  std::puts("forms: done");
}

template <typename Allocate>
bool Throws(Allocate allocate) {
  try {
    Hide(allocate());
  } catch (const std::bad_alloc& error) {
    Require(std::strcmp(error.what(), "std::bad_alloc") == 0, "what()");
    return true;
  }
  return false;
}

inline void CheckFailures() {
  Require(Throws([] { return ::operator new(Hide(kHuge)); }), "new throws");
  Require(Throws([] { return ::operator new[](Hide(kHuge)); }), "new[] throws");
  Require(Throws([] { return ::operator new(Hide(kHuge), kAlign); }), "aligned new throws");
  Require(Throws([] { return ::operator new[](Hide(kHuge), kAlign); }), "aligned new[] throws");
  Require(Throws([] { return ::operator new(Hide(SIZE_MAX)); }), "new(SIZE_MAX) throws");
  Require(::operator new(Hide(kHuge), std::nothrow) == nullptr, "nothrow new");
  Require(::operator new[](Hide(kHuge), std::nothrow) == nullptr, "nothrow new[]");
  Require(::operator new(Hide(kHuge), kAlign, std::nothrow) == nullptr, "nothrow aligned new");
  Require(::operator new[](Hide(kHuge), kAlign, std::nothrow) == nullptr, "nothrow aligned new[]");
  std::puts("failures: done");
}

inline int handler_calls = 0;

// Gives up at its third call.
inline void CountingHandler() {
  if (++handler_calls == 3) std::set_new_handler(nullptr);
}

struct HandlerError {};
[[noreturn]] inline void ThrowingHandler() { throw HandlerError{}; }
[[noreturn]] inline void BadAllocHandler() { throw std::bad_alloc(); }

template <typename Allocate>
void CheckHandlerWith(Allocate allocate, const char* what) {
  handler_calls = 0;
  std::set_new_handler(CountingHandler);
  Require(Throws(allocate), what);
  Require(handler_calls == 3, what);
}

inline void CheckHandler() {
  CheckHandlerWith([] { return ::operator new(Hide(kHuge)); }, "handler of new");
  CheckHandlerWith([] { return ::operator new[](Hide(kHuge)); }, "handler of new[]");
  CheckHandlerWith([] { return ::operator new(Hide(kHuge), kAlign); }, "handler of aligned new");
  handler_calls = 0;
  std::set_new_handler(CountingHandler);
  Require(::operator new(Hide(kHuge), std::nothrow) == nullptr&& handler_calls == 3,
          "handler of nothrow new");
  // A handler's own exception reaches the caller; nothrow forms turn bad_alloc into null.
  std::set_new_handler(ThrowingHandler);
  bool caught = false;
  try {
    Hide(::operator new(Hide(kHuge)));
  } catch (const HandlerError&) {
    caught = true;
  }
  Require(caught, "exception of the handler");
  std::set_new_handler(BadAllocHandler);
  Require(::operator new(Hide(kHuge), std::nothrow) == nullptr, "nothrow new, throwing handler");
  Require(::operator new[](Hide(kHuge), kAlign, std::nothrow) == nullptr,
          "nothrow aligned new[], throwing handler");
  std::set_new_handler(nullptr);
  std::puts("handler: done");
}

inline void CheckAll() {
  CheckForms();
  CheckFailures();
  CheckHandler();
}

}  // namespace operators

#endif  // FREEHOLD_TESTS_RUNTIME_PROGRAMS_OPERATORS_H_
