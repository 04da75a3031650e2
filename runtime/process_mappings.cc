#include "runtime/process_mappings.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>

#include <algorithm>
#include <bit>
#include <cerrno>

#include "absl/types/span.h"
#include "vm/os/raw_syscall.h"
#include "vm/pin.h"

namespace freehold::runtime {
namespace {

using allocator::WithinLimit;
using vm::AdviceEffect;
using vm::Bytes;
using vm::Error;
using vm::ErrorCode;
using vm::kPageSize;
using vm::PageNumber;
using vm::PageRange;
using vm::Pages;
using vm::Placement;
using vm::Result;
using vm::VmaInfo;
using vm::os::MemoryLock;
using vm::os::Protection;
using vm::os::RawSyscall;
using vm::os::SyscallFailed;

// Constants that are newer than the C library's headers.
constexpr int kMremapDontunmap = 4;
constexpr int kMlockOnfault = 1;
constexpr int kMadvDontneedLocked = 24;
constexpr int kMadvCollapse = 25;
constexpr int kMadvHwpoison = 100;
constexpr int kMadvSoftOffline = 101;

constexpr int kFixed = MAP_FIXED | MAP_FIXED_NOREPLACE;
// Without a meaning here: how much is promised, who the memory is for, what old kernels did.
constexpr int kIgnoredFlags = MAP_NORESERVE | MAP_STACK | MAP_NONBLOCK | MAP_DENYWRITE | MAP_EXECUTABLE;
constexpr int kServedFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE | MAP_LOCKED | kFixed | kIgnoredFlags;
constexpr int kProtectionBits = PROT_READ | PROT_WRITE | PROT_EXEC;
constexpr int kProtSem = 8;  // accepted by mprotect, and without a meaning

// No mapping that came from elsewhere has it, as far as anybody has seen: so every change of it is one.
constexpr Protection kUnknownProtection = static_cast<Protection>(PROT_WRITE | PROT_EXEC);

// Windows of larger parts of files are too many bytes to keep for a program that may not come back.
constexpr std::size_t kMaxWindow = vm::MiB(64).value;

constexpr std::size_t kPageMask = kPageSize - 1;

// Reads /proc/self/maps letter by letter: FIRST-END PERMISSIONS OFFSET DEVICE INODE [NAME]
class KernelMapsParser {
 public:
  // Whether a line ended; then it is what the accessors tell about.
  bool Add(char letter) {
    if (letter == '\n') {
      last_ = next_;
      next_ = {};
      return true;
    }
    if (next_.field == kNameField) return false;
    if (letter == ' ' || (letter == '-' && next_.field == kFirstField)) {
      ++next_.field;
      return false;
    }
    const auto digit = static_cast<unsigned>(letter <= '9' ? letter - '0' : letter - 'a' + 10);
    switch (next_.field) {
      case kFirstField: next_.first = next_.first << 4 | digit; break;
      case kEndField: next_.end = next_.end << 4 | digit; break;
      case kPermissionsField:
        next_.readable |= letter == 'r';
        next_.writable |= letter == 'w';
        break;
      case kInodeField: next_.of_file |= letter != '0'; break;
      default: break;
    }
    return false;
  }

  PageRange range() const { return {PageNumber{last_.first / kPageSize}, PageNumber{last_.end / kPageSize}}; }
  bool is_inaccessible() const { return !last_.readable && !last_.writable; }
  // Anonymous and never written, as far as can be told.
  bool is_zeros() const { return !last_.of_file && !last_.writable; }

 private:
  static constexpr int kFirstField = 0;
  static constexpr int kEndField = 1;
  static constexpr int kPermissionsField = 2;
  static constexpr int kInodeField = 5;
  static constexpr int kNameField = 6;

  struct Line {
    int field = 0;
    std::uintptr_t first = 0;
    std::uintptr_t end = 0;
    bool readable = false;
    bool writable = false;
    bool of_file = false;
  };
  Line next_;
  Line last_;
};

std::uintptr_t ToInteger(const void* address) { return reinterpret_cast<std::uintptr_t>(address); }
bool IsAligned(const void* address) { return (ToInteger(address) & kPageMask) == 0; }
long AddressOf(PageRange range) { return reinterpret_cast<long>(range.address()); }
long Negative(Error error) { return -vm::ToErrno(error); }
Protection ToProtection(int protection) { return static_cast<Protection>(protection & kProtectionBits); }

long RawMap(void* address, std::size_t length, int protection, int flags, int descriptor, off_t offset) {
  return RawSyscall(SYS_mmap, address, length, protection, flags, descriptor, offset);
}
long RawUnmap(PageRange range) { return RawSyscall(SYS_munmap, range.address(), range.bytes().value); }
long RawRemap(const void* address, std::size_t old_length, std::size_t new_length, int flags,
              const void* new_address = nullptr) {
  return RawSyscall(SYS_mremap, address, old_length, new_length, flags, new_address);
}
void* ToPointer(long result) { return reinterpret_cast<void*>(result); }

// What the kernel promises to one mapping at most, unless it was told to promise everything: all memory there is.
Bytes TotalMemory() {
  struct sysinfo info = {};
  if (SyscallFailed(RawSyscall(SYS_sysinfo, &info))) return {SIZE_MAX};
  return {(info.totalram + info.totalswap) * info.mem_unit};
}

// Calls `call` for each range that is not empty until one fails.
template <typename Call>
long ForBoth(PageRange a, PageRange b, const Call& call) {
  for (const PageRange range : {a, b}) {
    if (range.empty()) continue;
    if (const long result = call(range); SyscallFailed(result)) return result;
  }
  return 0;
}

}  // namespace

struct ProcessMappings::MapRequest {
  void* address;
  std::size_t length;
  int protection;
  int flags;
  int descriptor;
  off_t offset;

  long Pass() const { return RawMap(address, length, protection, flags, descriptor, offset); }
  Pages count() const { return vm::PagesFor({length}); }
  // Private anonymous memory and nothing else.
  bool is_served() const {
    constexpr int kKind = MAP_PRIVATE | MAP_ANONYMOUS;
    return (flags & (kKind | MAP_TYPE)) == kKind && (flags & ~kServedFlags) == 0;
  }
  bool replaces() const { return (flags & MAP_FIXED_NOREPLACE) == 0; }
  vm::MapOptions Options() const {
    vm::MapOptions options;
    options.protection = ToProtection(protection);
    options.populate = (flags & (MAP_POPULATE | MAP_NONBLOCK)) == MAP_POPULATE;
    if ((flags & MAP_LOCKED) != 0) options.lock = MemoryLock::kLocked;
    return options;
  }
};

void ProcessMappings::Init(vm::AddressSpace& space, const ProcessMappingsOptions& options) {
  space_ = &space;
  options_ = options;
  grantable_ = TotalMemory();
}

ProcessMappings::Parts ProcessMappings::PartsOf(const void* address, std::size_t length) const {
  const std::uintptr_t first = ToInteger(address) & ~kPageMask;
  std::uintptr_t end;
  if (__builtin_add_overflow(ToInteger(address), length, &end) || end > SIZE_MAX - kPageMask) return {};
  end = (end + kPageMask) & ~kPageMask;
  const PageRange all = {PageNumber{first / kPageSize}, PageNumber{end / kPageSize}};
  const PageRange reservation = space_->reservation();
  return {.below = {all.first, std::min(all.end, reservation.first)},
          .inside = all.Intersect(reservation),
          .above = {std::max(all.first, reservation.end), all.end}};
}

template <typename Visit>
Error ProcessMappings::ForEachPart(PageRange range, const Visit& visit) const {
  bool hole = false;
  for (PageNumber page = range.first; page < range.end;) {
    const Result<VmaInfo> vma = space_->LookupNext(page);
    const PageRange part = vma.ok() ? vma->range.Intersect({page, range.end}) : PageRange{range.end, range.end};
    hole = hole || page < part.first;
    if (!part.empty()) {
      if (const Error error = visit(part, *vma); !error.ok()) return error;
    }
    page = std::max(part.first, part.end);
  }
  return hole ? Error{ErrorCode::kNotMapped} : Error::Ok();
}

Bytes ProcessMappings::Growth(PageRange part) const {
  if (options_.limit == nullptr || !options_.limit->is_set()) return {0};
  Pages mapped;
  // Holes are what this is about.
  (void)ForEachPart(part, [&](PageRange there, const VmaInfo&) {
    mapped += there.count();
    return Error::Ok();
  });
  return (part.count() - mapped).bytes();
}

template <typename Verb>
long ProcessMappings::UpToHole(PageRange range, const Verb& verb) const {
  const Error error = verb(range);
  if (error.code != ErrorCode::kNotMapped) return Negative(error);
  PageRange mapped = {range.first, range.first};
  while (mapped.end < range.end) {
    const Result<VmaInfo> vma = space_->Lookup(mapped.end);
    if (!vma.ok()) break;
    mapped.end = std::min(range.end, vma->range.end);
  }
  if (!mapped.empty()) (void)verb(mapped);
  return -ENOMEM;
}

// ---- mmap ----

long ProcessMappings::Map(void* address, std::size_t length, int protection, int flags, int descriptor,
                          off_t offset) {
  const MapRequest request = {address, length, protection, flags, descriptor, offset};
  // What no kernel accepts, it refuses itself, without touching anything.
  if (length == 0 || length > SIZE_MAX / 2 || (static_cast<std::size_t>(offset) & kPageMask) != 0) {
    return request.Pass();
  }
  if ((flags & kFixed) == 0) return MapAnywhere(request);
  if (!IsAligned(address)) return request.Pass();
  const Parts parts = PartsOf(address, length);
  return parts.touches_space() ? MapFixed(request, parts) : request.Pass();
}

long ProcessMappings::MapAnywhere(const MapRequest& request) {
  if (!request.is_served()) {
    if (!IsWindow(request)) return request.Pass();
    vm::FileMapOptions file;
    file.descriptor = request.descriptor;
    file.offset = {static_cast<std::size_t>(request.offset)};
    file.sharing = (request.flags & MAP_TYPE) == MAP_PRIVATE ? vm::os::Sharing::kPrivate : vm::os::Sharing::kShared;
    file.populate = (request.flags & (MAP_POPULATE | MAP_NONBLOCK)) == MAP_POPULATE;
    const Result<PageRange> mapped = space_->MapFile(request.count(), file);
    return mapped.ok() ? AddressOf(*mapped) : request.Pass();
  }
  // Linux asks this of anonymous memory too.
  const std::size_t first_page = static_cast<std::size_t>(request.offset) / kPageSize;
  if (first_page + request.count().value < first_page) return -EOVERFLOW;
  const bool promised = (request.flags & MAP_NORESERVE) == 0 && (request.protection & PROT_WRITE) != 0;
  if (promised && request.length > grantable_.value) return request.Pass();

  vm::MapOptions options = request.Options();
  if (request.address != nullptr) {
    if (space_->Contains(request.address)) {
      options.placement = Placement::kHint;
      options.address = request.address;
    } else if (options_.follow_hints) {
      return request.Pass();
    } else {
      const std::size_t alignment = std::size_t{1} << std::countr_zero(ToInteger(request.address) | kPageSize << 16);
      options.alignment = {std::max(alignment / kPageSize, std::size_t{1})};
    }
  }
  // Only ordinary memory counts against the limit.
  const bool counts = options.protection == Protection::kReadWrite;
  return WithinLimit(options_.limit, counts ? request.count().bytes() : Bytes{0}, [&] {
    for (unsigned attempt = 0;; ++attempt) {
      const Result<PageRange> mapped = space_->Map(request.count(), options);
      if (mapped.ok()) return AddressOf(*mapped);
      // Too large for a region, refused by the system, ...: the kernel may know better, or has the errno.
      const long passed = request.Pass();
      if (passed != -ENOMEM || !promised || options_.limit == nullptr) return passed;
      if (!options_.limit->MakeRoom({request.length}, attempt)) return passed;
    }
  }).value_or(-ENOMEM);
}

// Files that are only read, by descriptors that can do no more. A window keeps the open file for a while: one that can
// be written would keep others from executing it.
bool ProcessMappings::IsWindow(const MapRequest& request) const {
  if (!options_.map_files || request.address != nullptr || request.length > kMaxWindow) return false;
  if (request.protection != PROT_READ || (request.flags & MAP_ANONYMOUS) != 0) return false;
  if ((request.flags & ~(MAP_TYPE | MAP_POPULATE | kIgnoredFlags)) != 0) return false;
  const int type = request.flags & MAP_TYPE;
  if (type != MAP_PRIVATE && type != MAP_SHARED) return false;
  const Result<vm::os::FileInfo> file = space_->kernel().IdentifyFile(request.descriptor);
  return file.ok() && file->regular && file->readable && !file->writable;
}

// First what lies outside, where the kernel tells whether the request makes sense; then the parts in each region.
long ProcessMappings::MapFixed(const MapRequest& request, const Parts& parts) {
  const auto pass = [&](PageRange part) {
    MapRequest piece = request;
    piece.address = part.address();
    piece.length = part.bytes().value;
    piece.offset += AddressOf(part) - static_cast<long>(ToInteger(request.address));
    return piece.Pass();
  };
  long result = ForBoth(parts.above, parts.below, pass);
  PageNumber page = parts.inside.first;
  while (!SyscallFailed(result) && page < parts.inside.end) {
    const PageRange part = space_->RegionAt(page).Intersect({page, parts.inside.end});
    result = MapFixedPart(request, part);
    if (!SyscallFailed(result)) page = part.end;
  }
  if (!SyscallFailed(result)) return static_cast<long>(ToInteger(request.address));
  // Nothing of it was there before.
  if (!request.replaces() && parts.leaves_space() && page > parts.inside.first) {
    (void)ForBoth(parts.below, parts.above, RawUnmap);
  }
  if (!request.replaces() && page > parts.inside.first) (void)space_->Unmap({parts.inside.first, page});
  return result;
}

long ProcessMappings::MapFixedPart(const MapRequest& request, PageRange part) {
  if (!request.is_served()) return MapForeign(request, part);
  vm::MapOptions options = request.Options();
  options.placement = request.replaces() ? Placement::kReplace : Placement::kFixed;
  options.address = part.address();
  const bool counts = options.protection == Protection::kReadWrite;
  return WithinLimit(options_.limit, counts ? Growth(part) : Bytes{0}, [&] {
    const Result<PageRange> mapped = space_->Map(part.count(), options);
    if (mapped.ok()) return AddressOf(part);
    // mmap has another errno than mlock for memory that may not be locked.
    const bool refused_lock = options.lock != MemoryLock::kNone && mapped.error() == Error::System(ENOMEM);
    return refused_lock ? -long{EAGAIN} : Negative(mapped.error());
  }).value_or(-ENOMEM);
}

long ProcessMappings::MapForeign(const MapRequest& request, PageRange part) {
  const off_t offset = request.offset + AddressOf(part) - static_cast<long>(ToInteger(request.address));
  // Locked and populated when it is in its place.
  const int flags = request.flags & ~(kFixed | MAP_LOCKED | MAP_POPULATE);
  const long aside =
      RawMap(nullptr, part.bytes().value, request.protection, flags, request.descriptor, offset);
  if (SyscallFailed(aside)) return aside;
  vm::MapOptions options = request.Options();
  options.placement = request.replaces() ? Placement::kReplace : Placement::kFixed;
  const int type = request.flags & MAP_TYPE;
  bool moved = false;
  const Error error = MoveIn(part, {.address = ToPointer(aside), .length = part.bytes().value}, options,
                             /*shared=*/type != MAP_PRIVATE, moved);
  if (error.ok()) return AddressOf(part);
  if (!moved) RawSyscall(SYS_munmap, aside, part.bytes().value);
  return Negative(error);
}

Error ProcessMappings::MoveIn(PageRange part, const KernelBacking::Source& source, const vm::MapOptions& options,
                              bool shared, bool& moved) {
  KernelBacking* backing = backings_.Take(*space_);
  if (backing == nullptr) return {ErrorCode::kNoMetadata};
  // While this call needs it, whatever others make of the mapping.
  backing->AddPages(1);
  backing->Begin(source, shared);
  vm::MapOptions map = options;
  map.address = part.address();
  map.content = vm::Content::kAnything;
  map.backing = backing;
  const Result<PageRange> mapped = space_->Map(part.count(), map);
  // Where it was mapped, others may have it by now.
  moved = mapped.ok() || !backing->has_source();
  if (!mapped.ok()) backing->ForgetSource();
  backing->DropPages(1);
  return mapped.ok() ? Error::Ok() : mapped.error();
}

// ---- munmap, mprotect ----

long ProcessMappings::Unmap(void* address, std::size_t length) {
  const Parts parts = PartsOf(address, length);
  if (!parts.touches_space() || !IsAligned(address)) return RawSyscall(SYS_munmap, address, length);
  // Above first: a range beyond what a process may have is refused as a whole.
  const long outside = ForBoth(parts.above, parts.below, RawUnmap);
  return SyscallFailed(outside) ? outside : Negative(space_->Unmap(parts.inside));
}

long ProcessMappings::Protect(void* address, std::size_t length, int protection) {
  const Parts parts = PartsOf(address, length);
  if (!parts.touches_space() || !IsAligned(address)) return RawSyscall(SYS_mprotect, address, length, protection);
  // Also what would extend to the end of a stack: none is here.
  if ((protection & ~(kProtectionBits | kProtSem)) != 0) return -EINVAL;
  const auto pass = [&](PageRange part) {
    return RawSyscall(SYS_mprotect, part.address(), part.bytes().value, protection);
  };
  if (const long result = ForBoth(parts.below, {}, pass); SyscallFailed(result)) return result;
  const long inside = UpToHole(
      parts.inside, [&](PageRange range) { return space_->Protect(range, ToProtection(protection)); });
  return SyscallFailed(inside) ? inside : ForBoth({}, parts.above, pass);
}

long ProcessMappings::ProtectByKey(void* address, std::size_t length, int protection, int key) {
  const Parts parts = PartsOf(address, length);
  if (key == -1) return Protect(address, length, protection);
  if (parts.touches_space()) {
    // A key lasts as advice does: with some that changes nothing, the space takes note. Holes are the kernel's to tell.
    (void)space_->AdviseKernel(parts.inside, MADV_DODUMP, AdviceEffect::kLasting);
  }
  const long result = RawSyscall(SYS_pkey_mprotect, address, length, protection, key);
  if (SyscallFailed(result) || !parts.touches_space()) return result;
  // And of the protection, which leaves the key as it is.
  return Negative(space_->Protect(parts.inside, ToProtection(protection)));
}

// ---- mremap ----

long ProcessMappings::Remap(void* address, std::size_t old_length, std::size_t new_length, int flags,
                            void* new_address) {
  const bool fixed = (flags & MREMAP_FIXED) != 0;
  const bool keep = (flags & kMremapDontunmap) != 0;
  const auto pass = [&] { return RawRemap(address, old_length, new_length, flags, new_address); };
  const Parts from = PartsOf(address, std::max(old_length, std::size_t{1}));
  const Parts to = fixed ? PartsOf(new_address, new_length) : Parts{};
  if (!from.touches_space() && !to.touches_space()) return pass();
  // The checks of Linux, in no particular order: they all have the same errno.
  const bool moves = fixed || keep;
  if ((flags & ~(MREMAP_FIXED | MREMAP_MAYMOVE | kMremapDontunmap)) != 0 || !IsAligned(address) ||
      (moves && (flags & MREMAP_MAYMOVE) == 0) || (keep && old_length != new_length) || new_length == 0 ||
      new_length > SIZE_MAX / 2 || (moves && !IsAligned(new_address))) {
    return -EINVAL;
  }
  const Pages count = vm::PagesFor({new_length});
  if (from.leaves_space() && from.touches_space()) return -EFAULT;
  if (fixed && to.leaves_space() && to.touches_space()) return -ENOMEM;
  if (fixed) {
    const PageRange source = PageRange::FromBytes(address, {old_length});
    if (source.Overlaps(PageRange::FromBytes(new_address, {new_length}))) return -EINVAL;
  }
  if (!from.touches_space()) return MoveInto(address, old_length, to.inside, flags);
  const Result<VmaInfo> vma = space_->Lookup(from.inside.first);
  if (!vma.ok()) return -EFAULT;
  if (old_length == 0) {
    // A second mapping of the same, which is not for private memory; the first one stays as it is.
    if (vma->backing == nullptr || to.touches_space()) return -EINVAL;
    return pass();
  }
  const bool counts = vma->protection == Protection::kReadWrite && vma->backing == nullptr;
  const Pages growth = count - std::min(count, from.inside.count());
  return WithinLimit(options_.limit, counts ? growth.bytes() : Bytes{0}, [&] {
    return RemapFrom(from.inside, count, flags, new_address);
  }).value_or(-ENOMEM);
}

long ProcessMappings::RemapFrom(PageRange range, Pages count, int flags, void* new_address) {
  const bool fixed = (flags & MREMAP_FIXED) != 0;
  const bool may_move = (flags & MREMAP_MAYMOVE) != 0;
  if (fixed && !space_->Contains(new_address)) return MoveOut(range, count, flags, new_address);
  vm::RemapOptions options;
  options.placement = fixed ? Placement::kReplace : Placement::kAnywhere;
  options.address = new_address;
  options.may_move = may_move && !fixed;
  options.keep_source = (flags & kMremapDontunmap) != 0;
  const Result<PageRange> remapped = space_->Remap(range, count, options);
  if (remapped.ok()) return AddressOf(*remapped);
  switch (remapped.error().code) {
    case ErrorCode::kNotMapped:
      return RemapPieces(range, count, flags, new_address);
    case ErrorCode::kNoRoom:
      return may_move && !fixed ? MoveOut(range, count, flags, nullptr) : -ENOMEM;
    case ErrorCode::kUnsupported:
      if (!may_move) return -ENOMEM;
      return fixed ? MoveInto(range.address(), range.bytes().value, PageRange::FromBytes(new_address, count.bytes()),
                              flags)
                   : MoveOut(range, count, flags, nullptr);
    default:
      return Negative(remapped.error());
  }
}

// Neighbours of one kind, which are one mapping to Linux: shrunk, grown at their end, or moved one by one.
long ProcessMappings::RemapPieces(PageRange range, Pages count, int flags, void* new_address) {
  const bool keep = (flags & kMremapDontunmap) != 0;
  const bool fixed = (flags & MREMAP_FIXED) != 0;
  // Linux looks at the first one only, unless something grows or moves.
  if (!fixed && !keep && count <= range.count()) {
    const PageRange tail = {range.first + count, range.end};
    const Error unmapped = tail.empty() ? Error::Ok() : space_->Unmap(tail);
    return unmapped.ok() ? AddressOf(range) : Negative(unmapped);
  }
  const Result<VmaInfo> first = space_->Lookup(range.first);
  VmaInfo last;
  const Error error = ForEachPart(range, [&](PageRange, const VmaInfo& vma) {
    last = vma;
    const bool same = first.ok() && vma.backing == nullptr && first->backing == nullptr &&
                      vma.protection == first->protection && vma.lock == first->lock;
    return same ? Error::Ok() : Error{ErrorCode::kNotMapped};
  });
  if (!error.ok()) return -EFAULT;
  if (!fixed && !keep) {
    const PageRange tail = {last.range.first, range.end};
    if (space_->Remap(tail, tail.count() + (count - range.count())).ok()) return AddressOf(range);
    if ((flags & MREMAP_MAYMOVE) == 0) return -ENOMEM;
  }
  vm::MapOptions room;
  room.protection = Protection::kNone;
  if (fixed) {
    room.placement = Placement::kReplace;
    room.address = new_address;
  }
  const Result<PageRange> target = space_->Map(count, room);
  if (!target.ok()) return Negative(target.error());
  for (PageNumber page = range.first; page < range.end;) {
    const Pages done = page - range.first;
    const Result<VmaInfo> vma = space_->Lookup(page);
    if (!vma.ok()) return -EFAULT;
    const PageRange piece = {page, std::min(range.end, vma->range.end)};
    page = piece.end;
    if (done >= count) {
      if (!keep) (void)space_->Unmap(piece);
      continue;
    }
    const bool is_last = page == range.end;
    const Pages pages = {is_last ? count.value - done.value : std::min(piece.count().value, count.value - done.value)};
    const Result<PageRange> moved = space_->Remap(
        piece, pages,
        {.placement = Placement::kReplace, .address = (target->first + done).address(), .keep_source = keep});
    if (!moved.ok()) return Negative(moved.error());
  }
  return AddressOf(*target);
}

long ProcessMappings::MoveOut(PageRange range, Pages count, int flags, void* new_address) {
  const bool keep = (flags & kMremapDontunmap) != 0;
  // Nobody else gets the pages while the kernel moves what is in them.
  const vm::Pin pin(*space_, range);
  if (!pin.ok()) return -EFAULT;
  const Pages kept = {std::min(range.count().value, count.value)};
  const std::size_t old_bytes = kept.bytes().value;
  const std::size_t new_bytes = count.bytes().value;
  // To a place that is chosen before: only then does Linux move several kernel VMAs at once, from 6.17 on.
  const long room = RawMap(nullptr, old_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (SyscallFailed(room)) return room;
  const long aside = RawRemap(range.address(), old_bytes, old_bytes, MREMAP_MAYMOVE | MREMAP_FIXED | kMremapDontunmap,
                              ToPointer(room));
  if (SyscallFailed(aside)) {
    RawSyscall(SYS_munmap, room, old_bytes);
    return aside;
  }
  long moved = aside;
  if (new_bytes > old_bytes) moved = RawRemap(ToPointer(aside), old_bytes, new_bytes, MREMAP_MAYMOVE);
  if (!SyscallFailed(moved) && new_address != nullptr) {
    const long placed =
        RawRemap(ToPointer(moved), new_bytes, new_bytes, MREMAP_MAYMOVE | MREMAP_FIXED, new_address);
    if (SyscallFailed(placed) && new_bytes > old_bytes) {
      (void)RawUnmap(
          PageRange::FromBytes(static_cast<std::byte*>(ToPointer(moved)) + old_bytes, {new_bytes - old_bytes}));
    }
    if (SyscallFailed(placed)) {
      (void)RawRemap(ToPointer(moved), old_bytes, old_bytes, MREMAP_MAYMOVE | MREMAP_FIXED, range.address());
    }
    moved = placed;
  } else if (SyscallFailed(moved)) {
    (void)RawRemap(ToPointer(aside), old_bytes, old_bytes, MREMAP_MAYMOVE | MREMAP_FIXED, range.address());
  }
  // Nothing is there but empty pages now; they go when the pin goes.
  if (!SyscallFailed(moved) && !keep) (void)space_->Unmap(range);
  return moved;
}

long ProcessMappings::MoveInto(void* address, std::size_t old_length, PageRange target, int flags) {
  if (!space_->RegionAt(target.first).Contains(target)) return -ENOMEM;
  vm::MapOptions options;
  options.placement = Placement::kReplace;
  options.protection = kUnknownProtection;
  bool shared = false;
  bool moved = false;
  if (!space_->Contains(address)) {
    const Error error = MoveIn(
        target, {.address = address, .length = old_length, .flags = flags & kMremapDontunmap}, options, shared, moved);
    return error.ok() ? AddressOf(target) : Negative(error);
  }
  const PageRange range = PageRange::FromBytes(address, {old_length});
  const Result<VmaInfo> vma = space_->Lookup(range.first);
  if (!vma.ok()) return -EFAULT;
  options.protection = vma->protection;
  shared = vma->backing != nullptr;
  // The source stays until the target is there.
  const long aside = MoveOut(range, target.count(), flags | kMremapDontunmap, nullptr);
  if (SyscallFailed(aside)) return aside;
  const std::size_t bytes = target.bytes().value;
  const Error error = MoveIn(target, {.address = ToPointer(aside), .length = bytes}, options, shared, moved);
  if (error.ok()) {
    if ((flags & kMremapDontunmap) == 0) (void)space_->Unmap(range);
    return AddressOf(target);
  }
  if (!moved) {
    const std::size_t kept = std::min(range.bytes().value, bytes);
    if (bytes > kept) RawSyscall(SYS_munmap, static_cast<std::byte*>(ToPointer(aside)) + kept, bytes - kept);
    (void)RawRemap(ToPointer(aside), kept, kept, MREMAP_MAYMOVE | MREMAP_FIXED, range.address());
  }
  return Negative(error);
}

// ---- madvise ----

long ProcessMappings::Advise(void* address, std::size_t length, int advice) {
  const Parts parts = PartsOf(address, length);
  const auto pass = [&](PageRange part) {
    return RawSyscall(SYS_madvise, part.address(), part.bytes().value, advice);
  };
  if (!parts.touches_space() || !IsAligned(address)) return RawSyscall(SYS_madvise, address, length, advice);
  // Holes do not stop it.
  long hole = 0;
  for (const PageRange part : {parts.below, parts.inside, parts.above}) {
    if (part.empty()) continue;
    const long result = part == parts.inside ? AdviseInside(part, advice) : pass(part);
    if (result == -ENOMEM) {
      hole = result;
    } else if (SyscallFailed(result)) {
      return result;
    }
  }
  return hole;
}

long ProcessMappings::AdviseInside(PageRange range, int advice) {
  const auto lasting = [&](PageRange part) { return space_->AdviseKernel(part, advice, AdviceEffect::kLasting); };
  const auto once = [&](PageRange part) { return space_->AdviseKernel(part, advice, AdviceEffect::kOnce); };
  switch (advice) {
    case MADV_DONTNEED:
      return Negative(space_->Advise(range, vm::Advice::kDontNeed));
    case MADV_FREE:
      return Negative(space_->Advise(range, vm::Advice::kFree));
    case MADV_COLD:
      return Negative(space_->Advise(range, vm::Advice::kCold));
    case MADV_PAGEOUT:
      return Negative(space_->Advise(range, vm::Advice::kPageOut));
    case kMadvDontneedLocked:
      return Negative(ForEachPart(range, [&](PageRange part, const VmaInfo&) { return space_->Discard({&part, 1}); }));
    // How a file will be read. Of anonymous memory they say nothing that anybody heeds.
    case MADV_WILLNEED:
      return Negative(ForEachPart(range, [&](PageRange part, const VmaInfo& vma) {
        return vma.backing != nullptr ? once(part) : Error::Ok();
      }));
    case MADV_NORMAL:
    case MADV_RANDOM:
    case MADV_SEQUENTIAL:
      return Negative(ForEachPart(range, [&](PageRange part, const VmaInfo& vma) {
        return vma.backing != nullptr ? lasting(part) : Error::Ok();
      }));
    // Splits a kernel VMA for what may hold a huge page, but not for what the zone is of the kind already.
    case MADV_HUGEPAGE:
    case MADV_NOHUGEPAGE:
      return Negative(ForEachPart(range, [&](PageRange part, const VmaInfo& vma) {
        const bool holds = advice == MADV_HUGEPAGE && vma.zone == vm::Zone::kDense;
        return holds || part.count().value < vm::kPagesPerHugePage ? Error::Ok() : lasting(part);
      }));
    case MADV_POPULATE_WRITE:
      return Negative(ForEachPart(range, [&](PageRange part, const VmaInfo& vma) {
        const bool touchable = vma.backing == nullptr && Has(vma.protection, Protection::kWrite);
        return touchable ? space_->Populate(part).error() : once(part);
      }));
    case MADV_POPULATE_READ:
    case kMadvCollapse:
    case MADV_REMOVE:
    case kMadvHwpoison:
    case kMadvSoftOffline:
      return Negative(once(range));
    case MADV_DONTFORK:
      left_out_of_forks_.store(true, std::memory_order_relaxed);
      return Negative(lasting(range));
    default:
      // The kernel tells whether it knows this value, before it looks at the range.
      if (const long known = RawSyscall(SYS_madvise, range.address(), 0, advice); SyscallFailed(known)) return known;
      return Negative(lasting(range));
  }
}

// ---- mlock ----

long ProcessMappings::LockMemory(const void* address, std::size_t length, int flags) {
  const auto pass = [&](const void* first, std::size_t bytes) {
    // Older kernels, and filters, know mlock alone.
    return flags == 0 ? RawSyscall(SYS_mlock, first, bytes) : RawSyscall(SYS_mlock2, first, bytes, flags);
  };
  const auto pass_part = [&](PageRange part) { return pass(part.address(), part.bytes().value); };
  const Parts parts = PartsOf(address, length);
  if (!parts.touches_space()) return pass(address, length);
  if ((flags & ~kMlockOnfault) != 0) return -EINVAL;
  if (const long result = ForBoth(parts.below, {}, pass_part); SyscallFailed(result)) return result;
  const MemoryLock lock = flags == 0 ? MemoryLock::kLocked : MemoryLock::kOnFault;
  long inside = UpToHole(parts.inside, [&](PageRange range) { return space_->LockMemory(range, lock); });
  if (inside == 0 && lock == MemoryLock::kLocked) {
    // Locked, but not to be made present.
    const Error error = ForEachPart(parts.inside, [](PageRange, const VmaInfo& vma) {
      return vma.protection == Protection::kNone ? Error{ErrorCode::kNotMapped} : Error::Ok();
    });
    inside = Negative(error);
  }
  return SyscallFailed(inside) ? inside : ForBoth({}, parts.above, pass_part);
}

long ProcessMappings::UnlockMemory(const void* address, std::size_t length) {
  const auto pass = [](PageRange part) { return RawSyscall(SYS_munlock, part.address(), part.bytes().value); };
  const Parts parts = PartsOf(address, length);
  if (!parts.touches_space()) return RawSyscall(SYS_munlock, address, length);
  if (const long result = ForBoth(parts.below, {}, pass); SyscallFailed(result)) return result;
  const long inside = UpToHole(parts.inside, [&](PageRange range) { return space_->UnlockMemory(range); });
  return SyscallFailed(inside) ? inside : ForBoth({}, parts.above, pass);
}

// The kernel locks what it knows, all of the space with the rest; the space notes it for what it maps and unmaps. But
// the kernel shall make nothing present: it would do so with all that is writable ahead of use, and put a page of zeros
// everywhere in the tables that are read where nothing was written, gigabytes of them.
long ProcessMappings::LockAll(int flags) {
  const bool made_present = (flags & ~(MCL_CURRENT | MCL_FUTURE)) == 0 && (flags & MCL_CURRENT) != 0;
  long result = RawSyscall(SYS_mlockall, made_present ? MCL_CURRENT | MCL_ONFAULT : flags);
  if (SyscallFailed(result)) return result;
  if (made_present) {
    if ((flags & MCL_FUTURE) != 0) result = RawSyscall(SYS_mlockall, MCL_FUTURE);
    if (SyscallFailed(result)) return result;
    LockOutside();
  }
  const MemoryLock lock = (flags & MCL_ONFAULT) != 0 ? MemoryLock::kOnFault : MemoryLock::kLocked;
  return Negative(space_->LockAll(
      {.current = (flags & MCL_CURRENT) != 0, .future = (flags & MCL_FUTURE) != 0, .lock = lock}));
}

// What goes meanwhile is refused by the kernel, and what comes is locked or not, as with a call of the kernel's.
void ProcessMappings::LockOutside() {
  const int file = static_cast<int>(RawSyscall(SYS_openat, AT_FDCWD, "/proc/self/maps", O_RDONLY | O_CLOEXEC));
  if (file < 0) return;
  KernelMapsParser parser;
  char text[1024];
  for (long length; (length = RawSyscall(SYS_read, file, text, sizeof(text))) > 0;) {
    for (const char letter : absl::MakeConstSpan(text, static_cast<std::size_t>(length))) {
      if (!parser.Add(letter) || parser.is_zeros() || parser.is_inaccessible()) continue;
      const PageRange range = parser.range();
      if (!PartsOf(range.address(), range.bytes().value).touches_space()) {
        (void)RawSyscall(SYS_mlock, range.address(), range.bytes().value);
      }
    }
  }
  RawSyscall(SYS_close, file);
}

long ProcessMappings::UnlockAll() {
  const Error error = space_->UnlockAll();
  const long result = RawSyscall(SYS_munlockall);
  return SyscallFailed(result) ? result : Negative(error);
}

// ---- msync, mincore ----

long ProcessMappings::Sync(void* address, std::size_t length, int flags) {
  const auto pass = [&](PageRange part) {
    return RawSyscall(SYS_msync, part.address(), part.bytes().value, flags);
  };
  const Parts parts = PartsOf(address, length);
  if (!parts.touches_space() || !IsAligned(address)) return RawSyscall(SYS_msync, address, length, flags);
  if ((flags & ~(MS_ASYNC | MS_INVALIDATE | MS_SYNC)) != 0 || (flags & (MS_ASYNC | MS_SYNC)) == (MS_ASYNC | MS_SYNC)) {
    return -EINVAL;
  }
  const bool invalidates = (flags & MS_INVALIDATE) != 0;
  const auto sync_inside = [&](PageRange range) {
    return Negative(ForEachPart(range, [&](PageRange part, const VmaInfo& vma) {
      if (invalidates && vma.lock != MemoryLock::kNone) return Error::System(EBUSY);
      if (vma.backing == nullptr) return Error::Ok();
      return space_->Sync(part, {.wait = (flags & MS_SYNC) != 0, .invalidate = invalidates});
    }));
  };
  long hole = 0;
  for (const PageRange part : {parts.below, parts.inside, parts.above}) {
    if (part.empty()) continue;
    const long result = part == parts.inside ? sync_inside(part) : pass(part);
    if (result == -ENOMEM) {
      hole = result;
    } else if (SyscallFailed(result)) {
      return result;
    }
  }
  return hole;
}

long ProcessMappings::Residency(void* address, std::size_t length, unsigned char* resident) {
  const Parts parts = PartsOf(address, length);
  if (!parts.touches_space() || !IsAligned(address)) return RawSyscall(SYS_mincore, address, length, resident);
  for (const PageRange part : {parts.below, parts.inside, parts.above}) {
    if (part.empty()) continue;
    const long result =
        part == parts.inside
            ? Negative(space_->Residency(part, absl::MakeSpan(resident, part.count().value)))
            : RawSyscall(SYS_mincore, part.address(), part.bytes().value, resident);
    if (SyscallFailed(result)) return result;
    resident += part.count().value;
  }
  return 0;
}

// ---- fork ----

void ProcessMappings::ChildAfterFork() {
  if (!left_out_of_forks_.load(std::memory_order_relaxed)) return;
  const auto close_holes = [](void*, const VmaInfo& vma) {
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
    const auto close = [](PageRange range) {
      return RawMap(range.address(), range.bytes().value, PROT_NONE, kFlags, -1, 0);
    };
    const auto has_hole = [](PageRange range) {
      return SyscallFailed(RawSyscall(SYS_msync, range.address(), range.bytes().value, MS_ASYNC));
    };
    if (!has_hole(vma.range) || !SyscallFailed(close(vma.range))) return;
    // A part of it: page by page.
    for (PageNumber page = vma.range.first; page < vma.range.end; page = page + Pages{1}) {
      const PageRange one = PageRange::Of(page, {1});
      if (has_hole(one)) (void)close(one);
    }
  };
  space_->ForEachVma(close_holes, nullptr);
}

}  // namespace freehold::runtime
