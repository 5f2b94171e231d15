// SPDX-License-Identifier: Apache-2.0
#include "dirty_ring.h"

#include "uapi.h"

#include <cstddef>

namespace nvmx::kvm {
namespace {

constexpr std::int64_t kRingOffset = std::int64_t{KVM_DIRTY_LOG_PAGE_OFFSET} * 4096;

} // namespace

DirtyRing::DirtyRing(const Fd &vcpu, std::size_t bytes)
    : mapping_(std::make_shared<Mapping>(bytes, MAP_SHARED, vcpu.get(), kRingOffset)),
      entries_(bytes / sizeof(kvm_dirty_gfn)) {}

std::size_t DirtyRing::harvest(std::span<std::uint64_t> out) {
    auto *ring = reinterpret_cast<kvm_dirty_gfn *>(mapping_->data());
    std::size_t count = 0;
    while (count < out.size() / 2) {
        kvm_dirty_gfn &entry = ring[next_ % entries_];
        // The kernel writes the flag after the entry, and reads ours before it reuses the entry.
        const std::uint32_t flags = __atomic_load_n(&entry.flags, __ATOMIC_ACQUIRE);
        if (!(flags & KVM_DIRTY_GFN_F_DIRTY) || (flags & KVM_DIRTY_GFN_F_RESET))
            break;
        out[count * 2] = entry.slot;
        out[count * 2 + 1] = entry.offset;
        __atomic_store_n(&entry.flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
        next_++;
        count++;
    }
    return count;
}

} // namespace nvmx::kvm
