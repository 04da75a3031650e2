// Many fibers at once: each adds its number to a sum, digit by digit, letting the others have a turn after each digit;
// every tenth spawns another.
//
//     fibers [COUNT]
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>

#include "examples/fibers/fiber.h"
#include "runtime/stack_pool.h"
#include "vm/address_space.h"
#include "vm/os/linux_kernel.h"

namespace vm = freehold::vm;
using freehold::examples::Scheduler;
using freehold::runtime::StackPool;

namespace {

int KernelVmas() {
  std::ifstream maps("/proc/self/maps");
  int count = 0;
  for (std::string line; std::getline(maps, line);) ++count;
  return count;
}

int Fail(const char* what, vm::Error error) {
  std::fprintf(stderr, "%s: %s\n", what, vm::ToString(error.code));
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  const std::uint64_t count = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 10'000;
  static constinit vm::os::LinuxKernel kernel;
  const vm::Result<vm::AddressSpace*> space = vm::AddressSpace::Create(kernel, {});
  if (!space.ok()) return Fail("AddressSpace::Create", space.error());
  const vm::Result<StackPool*> pool = StackPool::Create(**space);
  if (!pool.ok()) return Fail("StackPool::Create", pool.error());

  {
    Scheduler scheduler(**pool, vm::KiB(64));
    std::uint64_t sum = 0;
    std::uint64_t spawned = 0;
    const auto add_digits = [&](std::uint64_t number) {
      for (std::uint64_t place = 1; number != 0; number /= 10, place *= 10) {
        sum += number % 10 * place;
        scheduler.Yield();
      }
    };
    const int before = KernelVmas();
    for (std::uint64_t i = 0; i < count; ++i) {
      const vm::Error error = scheduler.Spawn([&, i] {
        add_digits(i);
        if (i % 10 == 0 && scheduler.Spawn([&] { add_digits(1); }).ok()) ++spawned;
      });
      if (!error.ok()) return Fail("Spawn", error);
    }
    const int added = KernelVmas() - before;
    scheduler.Run();
    std::printf("%llu fibers, %llu more by fibers; sum %llu; %llu switches; ", static_cast<unsigned long long>(count),
                static_cast<unsigned long long>(spawned), static_cast<unsigned long long>(sum),
                static_cast<unsigned long long>(scheduler.switches()));
    std::printf("%llu stacks in %d more kernel VMAs\n", static_cast<unsigned long long>((*pool)->Stats().slots), added);
  }
  StackPool::Destroy(*pool);
  vm::AddressSpace::Destroy(*space);
  return 0;
}
