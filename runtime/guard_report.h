// Says what a program did to an object between guard pages (allocator/guarded_objects.h): which access trapped, and who
// allocated and freed the object.
//
//     freehold: use after free: thread 412 "worker" accessed 0x7f21a4c14ff0, 8 bytes into the freed 30-byte object at 0x7f21a4c14fe8
//     freehold: accessed at
//         0x55d0c9a01a2b Handle(Request*)+0x4b (/usr/bin/server+0x1a2b)
//     freehold: allocated by thread 410 at
//         ...
//     freehold: freed by thread 411 at
//         ...
//
// Then the program's own disposition of SIGSEGV applies (fault_handler.h): by default it dies, as it should.
//
// Thread safety: thread-safe.
// Allocation:    none.
#ifndef FREEHOLD_RUNTIME_GUARD_REPORT_H_
#define FREEHOLD_RUNTIME_GUARD_REPORT_H_

#include "allocator/guarded_objects.h"

namespace freehold::runtime {

// At the process's start, if settings ask for guarded objects: reports accesses from now on, or says why not.
void StartGuardReports();

// Prints who allocated and freed `object`.
void ExplainGuardedObject(const allocator::GuardedObject& object);

}  // namespace freehold::runtime

#endif  // FREEHOLD_RUNTIME_GUARD_REPORT_H_
