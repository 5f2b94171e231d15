// SPDX-License-Identifier: Apache-2.0
#include "vm.h"

#include "uapi.h"

#include <sys/ioctl.h>

namespace nvmx::kvm {

Vm::Vm(int fd, std::size_t run_size) : fd_(std::make_shared<Fd>(fd, "Vm")), run_size_(run_size) {
    region2_ = ::ioctl(fd, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY2) > 0;
    const int limit = ::ioctl(fd, KVM_CHECK_EXTENSION, KVM_CAP_NR_MEMSLOTS);
    slot_limit_ = limit > 0 ? static_cast<std::uint32_t>(limit) : 32;
}

std::shared_ptr<VcpuThread> Vm::create_vcpu(std::uint32_t id) {
    fd_->get();
    auto vcpu = std::make_shared<VcpuThread>(fd_, id, run_size_);
    std::erase_if(vcpus_, [](const auto &weak) { return weak.expired(); });
    vcpus_.push_back(vcpu);
    return vcpu;
}

std::shared_ptr<MemoryRegion> Vm::add_memory(std::int64_t slot, std::uint64_t gpa, std::uint64_t size,
                                             std::uint32_t flags, const MemoryRequest &request) {
    fd_->get();
    return memory_.add({fd_, region2_}, slot, gpa, size, flags, request, slot_limit_);
}

const Stats &Vm::stats() {
    if (!stats_)
        stats_.emplace(*fd_);
    return *stats_;
}

void Vm::close() {
    if (!fd_->is_open())
        return;
    memory_.close_userfaults();
    for (const auto &weak : vcpus_)
        if (const auto vcpu = weak.lock())
            vcpu->kick();
    for (const auto &weak : vcpus_)
        if (const auto vcpu = weak.lock())
            vcpu->stop();
    stats_.reset();
    fd_->close();
    memory_.abandon_all();
}

} // namespace nvmx::kvm
