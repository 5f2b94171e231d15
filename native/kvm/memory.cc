// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include "uapi.h"

#include <sys/ioctl.h>

#include <cerrno>
#include <string>

namespace nvmx::kvm {

MemoryRegion::MemoryRegion(SlotOwner owner, std::uint32_t slot, std::uint64_t gpa, std::uint64_t size,
                           std::uint32_t flags, const MemoryRequest &request)
    : owner_(std::move(owner)), slot_(slot), gpa_(gpa), size_(size), flags_(flags) {
    require_aligned("guest address", gpa);
    memory_ = std::make_unique<HostMemory>(*owner_.vm, size, request);
    set(*memory_, gpa_, size_, flags_);
    live_ = true;
}

void MemoryRegion::set(const HostMemory &memory, std::uint64_t gpa, std::uint64_t size,
                       std::uint32_t flags) const {
    const auto address = reinterpret_cast<std::uintptr_t>(memory.mapping()->data());
    if (owner_.region2) {
        MemoryRegion2 region{};
        region.slot = slot_;
        region.flags = flags;
        region.guest_phys_addr = gpa;
        region.memory_size = size;
        region.userspace_addr = address;
        if (const int guest_memfd = memory.guest_memfd(); guest_memfd >= 0) {
            region.flags |= KVM_MEM_GUEST_MEMFD;
            region.guest_memfd = static_cast<std::uint32_t>(guest_memfd);
        }
        if (::ioctl(owner_.vm->get(), kSetUserMemoryRegion2, &region) < 0)
            throw KvmError(errno, "ioctl", "KVM_SET_USER_MEMORY_REGION2", "KVM_CAP_USER_MEMORY2");
        return;
    }
    kvm_userspace_memory_region region{slot_, flags, gpa, size, address};
    if (::ioctl(owner_.vm->get(), KVM_SET_USER_MEMORY_REGION, &region) < 0)
        throw KvmError(errno, "ioctl", "KVM_SET_USER_MEMORY_REGION", "KVM_CAP_USER_MEMORY");
}

void MemoryRegion::require_live() const {
    if (!live_)
        throw ClosedError("MemoryRegion");
}

HostMemory &MemoryRegion::memory() const {
    require_live();
    return *memory_;
}

void MemoryRegion::update(std::uint64_t gpa, std::uint32_t flags) {
    require_live();
    require_aligned("guest address", gpa);
    set(*memory_, gpa, size_, flags);
    gpa_ = gpa;
    flags_ = flags;
}

void MemoryRegion::swap(const MemoryRequest &request, bool copy) {
    require_live();
    close_userfault();
    auto fresh = std::make_unique<HostMemory>(*owner_.vm, size_, request);
    if (copy)
        fresh->copy_from(*memory_, true);
    set(*memory_, gpa_, 0, flags_);
    try {
        set(*fresh, gpa_, size_, flags_);
    } catch (const KvmError &) {
        set(*memory_, gpa_, size_, flags_);
        throw;
    }
    std::swap(memory_, fresh);
    fresh->release();
}

void MemoryRegion::replace() {
    require_live();
    set(*memory_, gpa_, 0, flags_);
    set(*memory_, gpa_, size_, flags_);
}

void MemoryRegion::remove() {
    require_live();
    close_userfault();
    set(*memory_, gpa_, 0, flags_);
    abandon();
}

void MemoryRegion::abandon() {
    close_userfault();
    if (live_)
        memory_->release();
    live_ = false;
}

std::size_t MemoryRegion::dirty_log_bytes() const {
    return (size_ / kPage + 63) / 64 * 8;
}

void MemoryRegion::dirty_log(std::span<std::uint8_t> out) const {
    require_live();
    if (out.size() < dirty_log_bytes())
        throw RangeError("the dirty log needs " + std::to_string(dirty_log_bytes()) +
                         " bytes, the buffer has " + std::to_string(out.size()));
    kvm_dirty_log log{};
    log.slot = slot_;
    log.dirty_bitmap = out.data();
    if (::ioctl(owner_.vm->get(), KVM_GET_DIRTY_LOG, &log) < 0)
        throw KvmError(errno, "ioctl", "KVM_GET_DIRTY_LOG", "KVM_CAP_USER_MEMORY");
}

void MemoryRegion::clear_dirty_log(std::uint64_t first_page, std::uint64_t pages,
                                   std::span<std::uint8_t> bitmap) const {
    require_live();
    if (first_page > size_ / kPage || pages > size_ / kPage - first_page)
        throw RangeError("page " + std::to_string(first_page) + " + " + std::to_string(pages) +
                         " is beyond the region's " + std::to_string(size_ / kPage) + " pages");
    if (bitmap.size() < (pages + 63) / 64 * 8)
        throw RangeError("the bitmap needs " + std::to_string((pages + 63) / 64 * 8) +
                         " bytes, the buffer has " + std::to_string(bitmap.size()));
    kvm_clear_dirty_log log{};
    log.slot = slot_;
    log.num_pages = static_cast<std::uint32_t>(pages);
    log.first_page = first_page;
    log.dirty_bitmap = bitmap.data();
    if (::ioctl(owner_.vm->get(), KVM_CLEAR_DIRTY_LOG, &log) < 0)
        throw KvmError(errno, "ioctl", "KVM_CLEAR_DIRTY_LOG", "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2");
}

std::shared_ptr<Userfault> MemoryRegion::watch_faults(std::uint64_t offset, std::uint64_t length,
                                                      bool minor) {
    require_live();
    memory_->require_range(offset, length);
    if (const auto other = userfault_.lock(); other && other->is_open())
        throw RangeError("this region has a userfaultfd already: close it first");
    auto userfault = std::make_shared<Userfault>(memory_->mapping(), offset, length, minor);
    userfault_ = userfault;
    return userfault;
}

void MemoryRegion::close_userfault() {
    if (const auto userfault = userfault_.lock())
        userfault->close();
}

std::shared_ptr<MemoryRegion> MemorySlots::add(const SlotOwner &owner, std::int64_t slot, std::uint64_t gpa,
                                               std::uint64_t size, std::uint32_t flags,
                                               const MemoryRequest &request, std::uint32_t slot_limit) {
    if (slot < 0) {
        slot = 0;
        for (const auto &[used, region] : slots_) {
            if (used != slot)
                break;
            slot++;
        }
        if (slot >= slot_limit)
            throw RangeError("all " + std::to_string(slot_limit) + " memslots of this VM are in use");
    }
    const auto number = static_cast<std::uint32_t>(slot);
    if (slots_.contains(number))
        throw RangeError("slot " + std::to_string(slot) + " is in use");
    auto region = std::make_shared<MemoryRegion>(owner, number, gpa, size, flags, request);
    slots_.emplace(number, region);
    return region;
}

const std::shared_ptr<MemoryRegion> &MemorySlots::at(std::uint32_t slot) const {
    const auto found = slots_.find(slot);
    if (found == slots_.end())
        throw ClosedError("MemoryRegion");
    return found->second;
}

void MemorySlots::remove(std::uint32_t slot) {
    at(slot)->remove();
    slots_.erase(slot);
}

void MemorySlots::close_userfaults() {
    for (const auto &[slot, region] : slots_)
        region->close_userfault();
}

void MemorySlots::abandon_all() {
    for (const auto &[slot, region] : slots_)
        region->abandon();
    slots_.clear();
}

} // namespace nvmx::kvm
