// Marks the symbols that programs bind to. Everything else in the shim is hidden: its version
// script lists the same names.
#ifndef FREEHOLD_RUNTIME_SHIM_EXPORT_H_
#define FREEHOLD_RUNTIME_SHIM_EXPORT_H_

#define FREEHOLD_EXPORT __attribute__((visibility("default")))

// Another name for a function of this file. GCC wants both to have the attributes that libc's
// headers give one.
#if __has_attribute(copy)
#define FREEHOLD_ALIAS(target) __attribute__((visibility("default"), alias(#target), copy(target)))
#else
#define FREEHOLD_ALIAS(target) __attribute__((visibility("default"), alias(#target)))
#endif

#endif  // FREEHOLD_RUNTIME_SHIM_EXPORT_H_
