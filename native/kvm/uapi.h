// SPDX-License-Identifier: Apache-2.0
#pragma once

// The kernel's KVM interface, plus what the build machine's headers may lack: Debian 12 ships those of
// Linux 6.1, while the kernels under test are newer. Every fallback is guarded, so newer headers win.

#include <linux/kvm.h>

#include <cstdint>

#ifndef KVM_EXIT_MEMORY_FAULT
#define KVM_EXIT_MEMORY_FAULT 39
#endif

#ifndef KVM_MEM_GUEST_MEMFD
#define KVM_MEM_GUEST_MEMFD (1UL << 2)
#endif

#ifndef KVM_CAP_USER_MEMORY2
#define KVM_CAP_USER_MEMORY2 231
#endif

#ifndef KVM_CAP_MEMORY_FAULT_INFO
#define KVM_CAP_MEMORY_FAULT_INFO 232
#endif

#ifndef KVM_CAP_MEMORY_ATTRIBUTES
#define KVM_CAP_MEMORY_ATTRIBUTES 233
#endif

#ifndef KVM_CAP_GUEST_MEMFD
#define KVM_CAP_GUEST_MEMFD 234
#endif

#ifndef KVM_CAP_VM_TYPES
#define KVM_CAP_VM_TYPES 235
#endif

#ifndef KVM_CAP_GUEST_MEMFD_FLAGS
#define KVM_CAP_GUEST_MEMFD_FLAGS 244
#endif

namespace nvmx::kvm {

// Structures and request numbers newer than the headers, under names of ours so that neither age clashes.

/// Argument of KVM_SET_USER_MEMORY_REGION2.
struct MemoryRegion2 {
    std::uint32_t slot, flags;
    std::uint64_t guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset;
    std::uint32_t guest_memfd, padding1;
    std::uint64_t padding2[14];
};
static_assert(sizeof(MemoryRegion2) == 160);
inline constexpr unsigned long kSetUserMemoryRegion2 = _IOW(KVMIO, 0x49, MemoryRegion2);

/// Argument of KVM_CREATE_GUEST_MEMFD.
struct CreateGuestMemfd {
    std::uint64_t size, flags, reserved[6];
};
static_assert(sizeof(CreateGuestMemfd) == 64);
inline constexpr unsigned long kCreateGuestMemfd = _IOWR(KVMIO, 0xd4, CreateGuestMemfd);
inline constexpr std::uint64_t kGuestMemfdMmap = 1, kGuestMemfdInitShared = 2;

/// Argument of KVM_SET_MEMORY_ATTRIBUTES.
struct MemoryAttributes {
    std::uint64_t address, size, attributes, flags;
};
static_assert(sizeof(MemoryAttributes) == 32);
inline constexpr unsigned long kSetMemoryAttributes = _IOW(KVMIO, 0xd2, MemoryAttributes);

} // namespace nvmx::kvm
