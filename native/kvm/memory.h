// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fd.h"
#include "host_memory.h"
#include "userfault.h"

#include <cstdint>
#include <map>
#include <memory>
#include <span>

namespace nvmx::kvm {

/// The VM's descriptor and how it takes slots: KVM_SET_USER_MEMORY_REGION2 (KVM_CAP_USER_MEMORY2) where the
/// kernel has it, KVM_SET_USER_MEMORY_REGION otherwise.
struct SlotOwner {
    std::shared_ptr<Fd> vm;
    bool region2 = false;
};

/// One memslot and the host memory behind it. Any thread may change a slot, also while vCPUs run: the kernel
/// makes every change atomic for the guest.
class MemoryRegion {
  public:
    MemoryRegion(SlotOwner owner, std::uint32_t slot, std::uint64_t gpa, std::uint64_t size,
                 std::uint32_t flags, const MemoryRequest &request);

    std::uint32_t slot() const { return slot_; }
    std::uint64_t gpa() const { return gpa_; }
    std::uint64_t size() const { return size_; }
    std::uint32_t flags() const { return flags_; }
    bool is_live() const { return live_; }

    /// The memory, for page operations. Throws ClosedError after remove().
    HostMemory &memory() const;
    const std::shared_ptr<Mapping> &mapping() const { return memory().mapping(); }

    /// One call with a new guest address and/or flags. The kernel refuses to toggle KVM_MEM_READONLY (EINVAL)
    /// and to overlap another slot (EEXIST); the region is then unchanged.
    void update(std::uint64_t gpa, std::uint32_t flags);

    /// Fresh memory at the same guest address: the kernel cannot change a slot's address in this process, so
    /// this deletes and makes it again, and a vCPU that comes between sees no memory there (MMIO exits).
    /// When the kernel refuses the new memory the old is put back. `copy`: with the old contents.
    void swap(const MemoryRequest &request, bool copy);

    /// Deletes the slot (size 0) and adds it again with the same memory, address and flags.
    void replace();

    /// Deletes the slot (size 0) and gives the memory back.
    void remove();

    /// KVM_GET_DIRTY_LOG: one bit per page. Clears the log, unless KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is on.
    void dirty_log(std::span<std::uint8_t> out) const;
    std::size_t dirty_log_bytes() const;
    /// KVM_CLEAR_DIRTY_LOG (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) of the pages whose bit is set.
    void clear_dirty_log(std::uint64_t first_page, std::uint64_t pages, std::span<std::uint8_t> bitmap) const;

    /// Missing or minor faults of the range go to the new Userfault. One at a time per region.
    std::shared_ptr<Userfault> watch_faults(std::uint64_t offset, std::uint64_t length, bool minor);
    /// Wakes whoever waits for a fault to be answered.
    void close_userfault();

    /// The VM is gone and with it the slot: give the memory back.
    void abandon();

  private:
    void set(const HostMemory &memory, std::uint64_t gpa, std::uint64_t size, std::uint32_t flags) const;
    void require_live() const;

    SlotOwner owner_;
    std::uint32_t slot_;
    std::uint64_t gpa_;
    std::uint64_t size_;
    std::uint32_t flags_;
    std::unique_ptr<HostMemory> memory_;
    std::weak_ptr<Userfault> userfault_;
    bool live_ = false;
};

/// Which slot numbers of a VM are in use, and by what. Not thread safe: the VM's owner calls it.
class MemorySlots {
  public:
    /// Picks the lowest free number when `slot` is negative. Throws RangeError or KvmError.
    std::shared_ptr<MemoryRegion> add(const SlotOwner &owner, std::int64_t slot, std::uint64_t gpa,
                                      std::uint64_t size, std::uint32_t flags, const MemoryRequest &request,
                                      std::uint32_t slot_limit);
    /// Throws ClosedError when there is none.
    const std::shared_ptr<MemoryRegion> &at(std::uint32_t slot) const;
    void remove(std::uint32_t slot);
    /// Before vCPUs are stopped: one that waits in a fault cannot be kicked.
    void close_userfaults();
    /// After the VM fd is closed.
    void abandon_all();

  private:
    std::map<std::uint32_t, std::shared_ptr<MemoryRegion>> slots_;
};

} // namespace nvmx::kvm
