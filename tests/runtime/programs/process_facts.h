// What /proc says about the calling process.
#ifndef FREEHOLD_TESTS_RUNTIME_PROGRAMS_PROCESS_FACTS_H_
#define FREEHOLD_TESTS_RUNTIME_PROGRAMS_PROCESS_FACTS_H_

#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace process {

inline std::string ReadFile(const std::string& path) {
  std::string text;
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return text;
  char chunk[4096];
  for (ssize_t size; (size = read(fd, chunk, sizeof(chunk))) > 0;)
    text.append(chunk, static_cast<std::size_t>(size));
  close(fd);
  return text;
}

inline std::size_t ResidentMiB() {
  unsigned long size = 0, resident = 0;
  std::sscanf(ReadFile("/proc/self/statm").c_str(), "%lu %lu", &size, &resident);
  return resident * 4096 / (1 << 20);
}

inline std::vector<std::string> Tasks() {
  std::vector<std::string> tasks;
  DIR* directory = opendir("/proc/self/task");
  while (const dirent* entry = readdir(directory)) {
    if (entry->d_name[0] != '.') tasks.push_back(std::string("/proc/self/task/") + entry->d_name);
  }
  closedir(directory);
  return tasks;
}

// The task directory of the thread with this name; empty if there is none.
inline std::string TaskNamed(const std::string& name) {
  for (const std::string& task : Tasks()) {
    if (ReadFile(task + "/comm") == name + "\n") return task;
  }
  return "";
}

// A field of a task's status file, such as "SigBlk"; empty if there is none.
inline std::string StatusField(const std::string& task, const std::string& field) {
  const std::string status = ReadFile(task + "/status");
  const std::size_t start = status.find("\n" + field + ":\t");
  if (start == std::string::npos) return "";
  const std::size_t value = start + field.size() + 3;
  return status.substr(value, status.find('\n', value) - value);
}

inline const std::string kKeeper = "freehold-keeper";

}  // namespace process

#endif  // FREEHOLD_TESTS_RUNTIME_PROGRAMS_PROCESS_FACTS_H_
