// SPDX-License-Identifier: Apache-2.0
#include "xsave.h"

#include "uapi.h"

#include <sys/ioctl.h>

#include <algorithm>
#include <cerrno>
#include <string>

namespace nvmx::kvm {
namespace {

constexpr std::size_t kLegacySize = 4096;
// In C++ the headers' flexible array takes space, and with it the request numbers would be wrong.
struct LegacyArea {
    std::uint8_t bytes[kLegacySize];
};
constexpr unsigned long kGetXsave = _IOR(KVMIO, 0xa4, LegacyArea);
constexpr unsigned long kSetXsave = _IOW(KVMIO, 0xa5, LegacyArea);
constexpr unsigned long kGetXsave2 = _IOR(KVMIO, 0xcf, LegacyArea);

void require_room(std::size_t room, std::size_t size) {
    if (room < size)
        throw RangeError("the XSAVE area has " + std::to_string(size) + " bytes, the buffer " +
                         std::to_string(room));
}

} // namespace

std::size_t xsave_size(const Fd &vm) {
    const int size = ::ioctl(vm.get(), KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2);
    return std::max(kLegacySize, static_cast<std::size_t>(std::max(size, 0)));
}

void get_xsave(const Vcpu &vcpu, std::span<std::uint8_t> out, std::size_t size) {
    require_room(out.size(), size);
    if (size > kLegacySize) {
        if (::ioctl(vcpu.fd().get(), kGetXsave2, out.data()) < 0)
            throw KvmError(errno, "ioctl", "KVM_GET_XSAVE2", "KVM_CAP_XSAVE2");
    } else if (::ioctl(vcpu.fd().get(), kGetXsave, out.data()) < 0) {
        throw KvmError(errno, "ioctl", "KVM_GET_XSAVE", "KVM_CAP_XSAVE");
    }
}

void set_xsave(const Vcpu &vcpu, std::span<std::uint8_t> bytes, std::size_t size) {
    require_room(bytes.size(), size);
    if (::ioctl(vcpu.fd().get(), kSetXsave, bytes.data()) < 0)
        throw KvmError(errno, "ioctl", "KVM_SET_XSAVE", "KVM_CAP_XSAVE");
}

} // namespace nvmx::kvm
