// Where the counters of a space lie, for readers outside the process: they cost nobody anything that way.
#include "vm/address_space.h"
#include "vm/metadata_arena.h"
#include "vm/purge_stage.h"
#include "vm/region.h"

namespace freehold::vm {

using Kind = Metric::Kind;

// Each names the first region's number.
void Region::ForEachMetric(MetricVisitor visit, void* context) const {
  const auto counter = [&](std::string_view name, std::string_view help, const RegionCounter& value) {
    visit(context, {.name = name, .help = help, .first = &value});
  };
  const auto pages = [&](std::string_view name, std::string_view help, const void* value) {
    visit(context, {.name = name, .help = help, .kind = Kind::kGauge, .first = value, .scale = kPageSize});
  };
  pages("vm_mapped_bytes", "Mapped by the program or its heap.", &mapped_pages_);
  visit(context, {.name = "vm_heap_zone_mapped_bytes",
                  .help = "Of that, anonymous and readable and writable: neither set aside nor files.",
                  .kind = Kind::kGauge,
                  .first = &mapped_pages_,
                  .scale = kPageSize,
                  .of_heap_zones = true});
  pages("vm_free_resident_bytes", "Free and possibly resident.", free_.dirty_pages_location());
  pages("vm_committed_bytes", "Readable and writable for the kernel.", &committed_pages_);
  visit(context, {.name = "vm_vmas", .help = "Mappings.", .kind = Kind::kGauge, .first = &vmas_});
  visit(context, {.name = "vm_deferred_unmaps",
                  .help = "Mappings whose unmap waits for a pin to go.",
                  .kind = Kind::kGauge,
                  .first = &deferred_extents_});
  counter("vm_maps_total", "Map calls.", maps_);
  counter("vm_unmaps_total", "Unmap calls, one for each region they touched.", unmaps_);
  counter("vm_changes_total", "Changes that lookups see.", changes_);
  counter("vm_reuses_total", "Map calls that were served from cached memory.", reuses_);
  counter("vm_zeroed_pages_total", "Pages cleaned by memset for re-use.", zeroed_pages_);
  counter("vm_heap_splits_total", "Protections and locks that split a heap zone's kernel VMA.", heap_splits_);
  counter("vm_coarse_retries_total", "Map calls that fell back to locking their whole region.", coarse_retries_);
  counter("vm_window_hits_total", "File mappings served from kept windows.", window_hits_);
}

RegionLocation Region::Location() const {
  return {.zone = zone_, .range = range_, .tree = tree_.root_location(), .range_lock = &range_lock_};
}

void PurgeStage::ForEachMetric(MetricVisitor visit, void* context) const {
  visit(context, {.name = "vm_purge_calls_total", .help = "Vectored discards.", .first = &calls_});
  visit(context, {.name = "vm_purged_pages_total", .help = "Pages given back to the kernel.", .first = &pages_});
}

void AddressSpace::ForEachMetric(MetricVisitor visit, void* context) const {
  struct OfRegions {
    MetricVisitor visit;
    void* context;
    std::uint32_t count;
    std::uint32_t in_heap_zones;
  } of_regions = {visit, context, static_cast<std::uint32_t>(region_count_), 0};
  for (const Region* region : regions()) of_regions.in_heap_zones += region->is_heap() ? 1 : 0;
  // Regions are an array.
  regions_[0]->ForEachMetric(
      [](void* to, const Metric& metric) {
        const auto& all = *static_cast<const OfRegions*>(to);
        Metric sum = metric;
        sum.count = metric.of_heap_zones ? all.in_heap_zones : all.count;
        sum.stride = sizeof(Region);
        sum.of_regions = !metric.of_heap_zones;
        all.visit(all.context, sum);
      },
      &of_regions);
  purge_stage_->ForEachMetric(visit, context);
  visit(context, {.name = "vm_metadata_bytes",
                  .help = "Taken for the space's own records.",
                  .kind = Kind::kGauge,
                  .first = arena_->used_location()});
  visit(context, {.name = "vm_remap_moves_total", .help = "Remap calls that moved content.", .first = &remap_moves_});
  visit(context, {.name = "vm_kernel_moves_total",
                  .help = "Remap calls whose content the kernel moved.",
                  .first = &kernel_moves_});
  visit(context, {.name = "vm_ignored_advice_total",
                  .help = "Mappings that were advised about huge pages against their zone.",
                  .first = &ignored_advice_});
}

void AddressSpace::ForEachRegion(void (*visit)(void* context, const RegionLocation& region), void* context) const {
  for (const Region* region : regions()) visit(context, region->Location());
}

}  // namespace freehold::vm
