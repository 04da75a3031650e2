// Loaded and unloaded at run time; with thread-local storage that the dynamic linker allocates.
#include <stdlib.h>
#include <string.h>

static char* text;
static __thread char local[2000];

__attribute__((constructor)) static void Construct(void) { text = strdup("from the constructor"); }
__attribute__((destructor)) static void Destruct(void) { free(text); }

const char* PluginText(void) {
  strcpy(local, text);
  return local;
}
