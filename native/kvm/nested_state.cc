// SPDX-License-Identifier: Apache-2.0
#include "nested_state.h"

#include "uapi.h"

#include <sys/ioctl.h>

#include <cerrno>
#include <cstring>
#include <limits>

namespace nvmx::kvm {

std::size_t get_nested_state(const Vcpu &vcpu, std::span<std::uint8_t> out) {
    static const Ioctl &row = ioctl_named(Scope::Vcpu, "KVM_GET_NESTED_STATE");
    const std::size_t room = out.size();
    if (room < sizeof(kvm_nested_state) || room > std::numeric_limits<std::uint32_t>::max())
        throw RangeError("nested state needs a buffer of at least 128 bytes");
    const auto size = static_cast<std::uint32_t>(room);
    std::memcpy(out.data() + offsetof(kvm_nested_state, size), &size, sizeof size);
    call(vcpu.fd(), row, out);
    std::uint32_t filled;
    std::memcpy(&filled, out.data() + offsetof(kvm_nested_state, size), sizeof filled);
    return filled;
}

void set_nested_state(const Vcpu &vcpu, std::span<std::uint8_t> bytes) {
    static const Ioctl &row = ioctl_named(Scope::Vcpu, "KVM_SET_NESTED_STATE");
    call(vcpu.fd(), row, bytes);
}

std::uint16_t enable_evmcs(const Vcpu &vcpu) {
    std::uint16_t version = 0;
    kvm_enable_cap enable{};
    enable.cap = KVM_CAP_HYPERV_ENLIGHTENED_VMCS;
    enable.args[0] = reinterpret_cast<std::uintptr_t>(&version);
    if (::ioctl(vcpu.fd().get(), KVM_ENABLE_CAP, &enable) < 0)
        throw KvmError(errno, "ioctl", "KVM_ENABLE_CAP", "KVM_CAP_HYPERV_ENLIGHTENED_VMCS");
    return version;
}

} // namespace nvmx::kvm
