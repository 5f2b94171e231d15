// SPDX-License-Identifier: Apache-2.0
#include "ioctls.h"

#include "uapi.h"

#include <sys/ioctl.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

namespace nvmx::kvm {
namespace {

// Not sizeof: in C++ the empty structure inside the uapi headers' flexible arrays takes space.
struct MsrsHeader {
    std::uint32_t count, padding;
};
struct MsrListHeader {
    std::uint32_t count;
};
struct CpuidHeader {
    std::uint32_t count, padding;
};
struct RoutingHeader {
    std::uint32_t count, flags;
};
static_assert(sizeof(kvm_nested_state) == 128);

std::uint32_t u32_at(const std::uint8_t *bytes, std::size_t offset) {
    std::uint32_t value;
    std::memcpy(&value, bytes + offset, sizeof value);
    return value;
}

std::size_t msrs_total(const std::uint8_t *fixed) {
    return sizeof(MsrsHeader) + std::size_t{u32_at(fixed, 0)} * sizeof(kvm_msr_entry);
}
std::size_t msr_list_total(const std::uint8_t *fixed) {
    return sizeof(MsrListHeader) + std::size_t{u32_at(fixed, 0)} * sizeof(std::uint32_t);
}
std::size_t cpuid_total(const std::uint8_t *fixed) {
    return sizeof(CpuidHeader) + std::size_t{u32_at(fixed, 0)} * sizeof(kvm_cpuid_entry2);
}
std::size_t routing_total(const std::uint8_t *fixed) {
    return sizeof(RoutingHeader) + std::size_t{u32_at(fixed, 0)} * sizeof(kvm_irq_routing_entry);
}
std::size_t nested_total(const std::uint8_t *fixed) {
    return u32_at(fixed, offsetof(kvm_nested_state, size));
}

// A request number contains its structure's size, so the headers' own number is wrong in C++ for those with a
// flexible array.
constexpr unsigned long sized(unsigned long request, std::size_t size) {
    return (request & ~(static_cast<unsigned long>(_IOC_SIZEMASK) << _IOC_SIZESHIFT)) |
           (size << _IOC_SIZESHIFT);
}

#define NVMX_STRUCT(name, scope, type, total, cap)                                                           \
    Ioctl {                                                                                                  \
#name, sized(name, sizeof(type)), Scope::scope, Argument::Struct, sizeof(type), total, cap           \
    }
// A request that is newer than the headers: `request` is uapi.h's own number for it.
#define NVMX_NEWER(name, request, scope, type, cap)                                                          \
    Ioctl {                                                                                                  \
#name, request, Scope::scope, Argument::Struct, sizeof(type), nullptr, cap                           \
    }
#define NVMX_VALUE(name, scope, cap)                                                                         \
    Ioctl {                                                                                                  \
#name, name, Scope::scope, Argument::Value, 0, nullptr, cap                                          \
    }
#define NVMX_NONE(name, scope, cap)                                                                          \
    Ioctl {                                                                                                  \
#name, name, Scope::scope, Argument::None, 0, nullptr, cap                                           \
    }

constexpr Ioctl table[] = {
    NVMX_NONE(KVM_GET_API_VERSION, System, ""),
    NVMX_VALUE(KVM_CHECK_EXTENSION, System, ""),
    NVMX_NONE(KVM_GET_VCPU_MMAP_SIZE, System, ""),
    NVMX_STRUCT(KVM_GET_SUPPORTED_CPUID, System, CpuidHeader, cpuid_total, "KVM_CAP_EXT_CPUID"),
    NVMX_STRUCT(KVM_GET_EMULATED_CPUID, System, CpuidHeader, cpuid_total, "KVM_CAP_EXT_EMUL_CPUID"),
    NVMX_STRUCT(KVM_GET_SUPPORTED_HV_CPUID, System, CpuidHeader, cpuid_total, "KVM_CAP_SYS_HYPERV_CPUID"),
    NVMX_STRUCT(KVM_GET_MSR_INDEX_LIST, System, MsrListHeader, msr_list_total, ""),
    NVMX_STRUCT(KVM_GET_MSR_FEATURE_INDEX_LIST, System, MsrListHeader, msr_list_total,
                "KVM_CAP_GET_MSR_FEATURES"),
    NVMX_STRUCT(KVM_GET_MSRS, System, MsrsHeader, msrs_total, "KVM_CAP_GET_MSR_FEATURES"),

    NVMX_VALUE(KVM_CHECK_EXTENSION, Vm, "KVM_CAP_CHECK_EXTENSION_VM"),
    NVMX_STRUCT(KVM_ENABLE_CAP, Vm, kvm_enable_cap, nullptr, "KVM_CAP_ENABLE_CAP_VM"),
    NVMX_VALUE(KVM_SET_TSS_ADDR, Vm, "KVM_CAP_SET_TSS_ADDR"),
    NVMX_STRUCT(KVM_SET_IDENTITY_MAP_ADDR, Vm, std::uint64_t, nullptr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    NVMX_NONE(KVM_CREATE_IRQCHIP, Vm, "KVM_CAP_IRQCHIP"),
    NVMX_STRUCT(KVM_IRQ_LINE, Vm, kvm_irq_level, nullptr, "KVM_CAP_IRQCHIP"),
    NVMX_STRUCT(KVM_SIGNAL_MSI, Vm, kvm_msi, nullptr, "KVM_CAP_SIGNAL_MSI"),
    NVMX_STRUCT(KVM_GET_IRQCHIP, Vm, kvm_irqchip, nullptr, "KVM_CAP_IRQCHIP"),
    NVMX_STRUCT(KVM_SET_IRQCHIP, Vm, kvm_irqchip, nullptr, "KVM_CAP_IRQCHIP"),
    NVMX_STRUCT(KVM_CREATE_PIT2, Vm, kvm_pit_config, nullptr, "KVM_CAP_PIT2"),
    NVMX_STRUCT(KVM_GET_PIT2, Vm, kvm_pit_state2, nullptr, "KVM_CAP_PIT_STATE2"),
    NVMX_STRUCT(KVM_SET_PIT2, Vm, kvm_pit_state2, nullptr, "KVM_CAP_PIT_STATE2"),
    NVMX_STRUCT(KVM_SET_GSI_ROUTING, Vm, RoutingHeader, routing_total, "KVM_CAP_IRQ_ROUTING"),
    NVMX_STRUCT(KVM_IRQFD, Vm, kvm_irqfd, nullptr, "KVM_CAP_IRQFD"),
    NVMX_STRUCT(KVM_IOEVENTFD, Vm, kvm_ioeventfd, nullptr, "KVM_CAP_IOEVENTFD"),
    NVMX_STRUCT(KVM_GET_CLOCK, Vm, kvm_clock_data, nullptr, "KVM_CAP_ADJUST_CLOCK"),
    NVMX_STRUCT(KVM_SET_CLOCK, Vm, kvm_clock_data, nullptr, "KVM_CAP_ADJUST_CLOCK"),
    NVMX_VALUE(KVM_SET_BOOT_CPU_ID, Vm, "KVM_CAP_SET_BOOT_CPU_ID"),
    NVMX_NONE(KVM_RESET_DIRTY_RINGS, Vm, "KVM_CAP_DIRTY_LOG_RING"),
    NVMX_NEWER(KVM_SET_MEMORY_ATTRIBUTES, kSetMemoryAttributes, Vm, MemoryAttributes,
               "KVM_CAP_MEMORY_ATTRIBUTES"),

    NVMX_STRUCT(KVM_GET_REGS, Vcpu, kvm_regs, nullptr, ""),
    NVMX_STRUCT(KVM_SET_REGS, Vcpu, kvm_regs, nullptr, ""),
    NVMX_STRUCT(KVM_GET_SREGS, Vcpu, kvm_sregs, nullptr, ""),
    NVMX_STRUCT(KVM_SET_SREGS, Vcpu, kvm_sregs, nullptr, ""),
    NVMX_STRUCT(KVM_GET_SREGS2, Vcpu, kvm_sregs2, nullptr, "KVM_CAP_SREGS2"),
    NVMX_STRUCT(KVM_SET_SREGS2, Vcpu, kvm_sregs2, nullptr, "KVM_CAP_SREGS2"),
    NVMX_STRUCT(KVM_GET_FPU, Vcpu, kvm_fpu, nullptr, ""),
    NVMX_STRUCT(KVM_SET_FPU, Vcpu, kvm_fpu, nullptr, ""),
    NVMX_STRUCT(KVM_GET_XCRS, Vcpu, kvm_xcrs, nullptr, "KVM_CAP_XCRS"),
    NVMX_STRUCT(KVM_SET_XCRS, Vcpu, kvm_xcrs, nullptr, "KVM_CAP_XCRS"),
    NVMX_STRUCT(KVM_GET_DEBUGREGS, Vcpu, kvm_debugregs, nullptr, "KVM_CAP_DEBUGREGS"),
    NVMX_STRUCT(KVM_SET_DEBUGREGS, Vcpu, kvm_debugregs, nullptr, "KVM_CAP_DEBUGREGS"),
    NVMX_STRUCT(KVM_SET_GUEST_DEBUG, Vcpu, kvm_guest_debug, nullptr, "KVM_CAP_SET_GUEST_DEBUG"),
    NVMX_STRUCT(KVM_TRANSLATE, Vcpu, kvm_translation, nullptr, ""),
    NVMX_NONE(KVM_GET_TSC_KHZ, Vcpu, "KVM_CAP_GET_TSC_KHZ"),
    NVMX_VALUE(KVM_SET_TSC_KHZ, Vcpu, "KVM_CAP_TSC_CONTROL"),
    NVMX_NONE(KVM_KVMCLOCK_CTRL, Vcpu, "KVM_CAP_KVMCLOCK_CTRL"),
    NVMX_NONE(KVM_SMI, Vcpu, "KVM_CAP_X86_SMM"),
    NVMX_STRUCT(KVM_GET_MSRS, Vcpu, MsrsHeader, msrs_total, ""),
    NVMX_STRUCT(KVM_SET_MSRS, Vcpu, MsrsHeader, msrs_total, ""),
    NVMX_STRUCT(KVM_GET_CPUID2, Vcpu, CpuidHeader, cpuid_total, "KVM_CAP_EXT_CPUID"),
    NVMX_STRUCT(KVM_SET_CPUID2, Vcpu, CpuidHeader, cpuid_total, "KVM_CAP_EXT_CPUID"),
    NVMX_STRUCT(KVM_GET_SUPPORTED_HV_CPUID, Vcpu, CpuidHeader, cpuid_total, "KVM_CAP_HYPERV_CPUID"),
    NVMX_STRUCT(KVM_GET_VCPU_EVENTS, Vcpu, kvm_vcpu_events, nullptr, "KVM_CAP_VCPU_EVENTS"),
    NVMX_STRUCT(KVM_SET_VCPU_EVENTS, Vcpu, kvm_vcpu_events, nullptr, "KVM_CAP_VCPU_EVENTS"),
    NVMX_STRUCT(KVM_GET_LAPIC, Vcpu, kvm_lapic_state, nullptr, "KVM_CAP_IRQCHIP"),
    NVMX_STRUCT(KVM_SET_LAPIC, Vcpu, kvm_lapic_state, nullptr, "KVM_CAP_IRQCHIP"),
    NVMX_STRUCT(KVM_GET_MP_STATE, Vcpu, kvm_mp_state, nullptr, "KVM_CAP_MP_STATE"),
    NVMX_STRUCT(KVM_SET_MP_STATE, Vcpu, kvm_mp_state, nullptr, "KVM_CAP_MP_STATE"),
    NVMX_STRUCT(KVM_INTERRUPT, Vcpu, kvm_interrupt, nullptr, ""),
    NVMX_NONE(KVM_NMI, Vcpu, "KVM_CAP_USER_NMI"),
    NVMX_STRUCT(KVM_GET_NESTED_STATE, Vcpu, kvm_nested_state, nested_total, "KVM_CAP_NESTED_STATE"),
    NVMX_STRUCT(KVM_SET_NESTED_STATE, Vcpu, kvm_nested_state, nested_total, "KVM_CAP_NESTED_STATE"),
    NVMX_STRUCT(KVM_ENABLE_CAP, Vcpu, kvm_enable_cap, nullptr, "KVM_CAP_ENABLE_CAP"),
};

#undef NVMX_STRUCT
#undef NVMX_NEWER
#undef NVMX_VALUE
#undef NVMX_NONE

int checked(int result, const Ioctl &row) {
    if (result < 0)
        throw KvmError(errno, "ioctl", row.name, row.capability);
    return result;
}

} // namespace

std::span<const Ioctl> ioctls() {
    return table;
}

const Ioctl &ioctl_named(Scope scope, std::string_view name) {
    for (const Ioctl &row : table)
        if (row.scope == scope && name == row.name)
            return row;
    throw std::out_of_range("no such ioctl: " + std::string(name));
}

int call(const Fd &fd, const Ioctl &row, std::span<std::uint8_t> buffer) {
    if (row.argument != Argument::Struct)
        throw RangeError(std::string(row.name) + " takes no structure");
    if (buffer.size() < row.size)
        throw RangeError(std::string(row.name) + " needs " + std::to_string(row.size) +
                         " bytes, the buffer has " + std::to_string(buffer.size()));
    if (row.total) {
        const std::size_t total = row.total(buffer.data());
        if (buffer.size() < total)
            throw RangeError(std::string(row.name) + ": the structure's own header claims " +
                             std::to_string(total) + " bytes, the buffer has " +
                             std::to_string(buffer.size()));
    }
    // The one capability whose argument is an address to be written: see enable_evmcs().
    if (row.request == KVM_ENABLE_CAP && u32_at(buffer.data(), 0) == KVM_CAP_HYPERV_ENLIGHTENED_VMCS) {
        std::uint64_t address;
        std::memcpy(&address, buffer.data() + offsetof(kvm_enable_cap, args), sizeof address);
        if (address != 0)
            throw RangeError("KVM_CAP_HYPERV_ENLIGHTENED_VMCS takes an address in args[0]: use "
                             "enableEnlightenedVmcs()");
    }
    return checked(::ioctl(fd.get(), row.request, buffer.data()), row);
}

int call(const Fd &fd, const Ioctl &row, unsigned long value) {
    if (row.argument == Argument::Struct)
        throw RangeError(std::string(row.name) + " needs a structure of at least " +
                         std::to_string(row.size) + " bytes");
    return checked(::ioctl(fd.get(), row.request, value), row);
}

std::size_t call_list(const Fd &fd, Scope scope, std::span<const ListedCall> list,
                      std::span<std::uint8_t> buffer, std::size_t first) {
    for (std::size_t number = first; number < list.size(); number++) {
        const auto [index, offset, size] = list[number];
        if (index >= std::size(table) || table[index].scope != scope)
            throw RangeError("a list has a request of another kind of handle");
        if (offset > buffer.size() || size > buffer.size() - offset)
            throw RangeError(std::string(table[index].name) + " is beyond its list's buffer");
        const Ioctl &row = table[index];
        const auto part = buffer.subspan(offset, size);
        if (row.argument == Argument::None) {
            const std::int32_t answer = call(fd, row);
            std::memcpy(part.data(), &answer, std::min(part.size(), sizeof answer));
            continue;
        }
        const int result = call(fd, row, part);
        if (row.total == msrs_total && static_cast<std::uint32_t>(result) < u32_at(part.data(), 0))
            return number;
    }
    return list.size();
}

} // namespace nvmx::kvm
