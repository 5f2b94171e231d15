// SPDX-License-Identifier: Apache-2.0
#include "system.h"

#include "uapi.h"

#include <fcntl.h>
#include <sys/ioctl.h>

#include <cerrno>

namespace nvmx::kvm {
namespace {

int open_device(const std::string &path) {
    const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (fd < 0)
        throw KvmError(errno, "open", path);
    return fd;
}

} // namespace

System::System(const std::string &path) : fd_(open_device(path), "Kvm") {}

std::shared_ptr<Vm> System::create_vm(unsigned long type) {
    const int run_size = call(fd_, ioctl_named(Scope::System, "KVM_GET_VCPU_MMAP_SIZE"));
    int fd;
    do {
        // KVM_CREATE_VM allocates per-VM threads and gives up with EINTR when any signal is pending, a kick
        // of another vCPU included.
        fd = ::ioctl(fd_.get(), KVM_CREATE_VM, type);
    } while (fd < 0 && errno == EINTR);
    if (fd < 0)
        throw KvmError(errno, "ioctl", "KVM_CREATE_VM");
    auto vm = std::make_shared<Vm>(fd, static_cast<std::size_t>(run_size));
    std::erase_if(vms_, [](const auto &weak) { return weak.expired(); });
    vms_.push_back(vm);
    return vm;
}

void System::close() {
    if (!fd_.is_open())
        return;
    for (const auto &weak : vms_)
        if (const auto vm = weak.lock())
            vm->close();
    fd_.close();
}

} // namespace nvmx::kvm
