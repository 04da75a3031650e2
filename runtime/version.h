// The version of the runtime, its library and its command.
#ifndef FREEHOLD_RUNTIME_VERSION_H_
#define FREEHOLD_RUNTIME_VERSION_H_

namespace freehold::runtime {

inline constexpr char kVersion[] = "0.1.0";

}  // namespace freehold::runtime

#endif  // FREEHOLD_RUNTIME_VERSION_H_
