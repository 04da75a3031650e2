// A C program, without libstdc++, that loads a C++ library and calls into it: `loads_plugin
// LIBRARY`.
#include <dlfcn.h>
#include <stdio.h>

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) {
    fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  void (*check)(void) = (void (*)(void))dlsym(library, "CheckOperators");
  if (check == NULL) return 1;
  check();
  return dlclose(library);
}
