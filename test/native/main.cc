// SPDX-License-Identifier: Apache-2.0
#include "harness.h"

#include "kvm/uapi.h"

#include <sys/ioctl.h>

#include <cstdio>
#include <cstring>
#include <exception>

namespace nvmx::test {

std::vector<Case> &cases() {
    static std::vector<Case> all;
    return all;
}

Machine::Machine(std::vector<std::uint8_t> bytes) : vm(system.create_vm(0)) {
    code = vm->add_memory(-1, 0x1000, 0x1000, 0, {.backing = kvm::Backing::Anonymous});
    std::memcpy(code->mapping()->data(), bytes.data(), bytes.size());
}

std::shared_ptr<kvm::VcpuThread> Machine::vcpu(std::uint32_t id) {
    auto thread = vm->create_vcpu(id);
    const kvm::Fd &fd = thread->idle_vcpu().fd();
    kvm_sregs sregs{};
    std::span<std::uint8_t> sregs_bytes{reinterpret_cast<std::uint8_t *>(&sregs), sizeof sregs};
    kvm::call(fd, kvm::ioctl_named(kvm::Scope::Vcpu, "KVM_GET_SREGS"), sregs_bytes);
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    kvm::call(fd, kvm::ioctl_named(kvm::Scope::Vcpu, "KVM_SET_SREGS"), sregs_bytes);
    kvm_regs regs{};
    regs.rip = 0x1000;
    regs.rflags = 2;
    kvm::call(fd, kvm::ioctl_named(kvm::Scope::Vcpu, "KVM_SET_REGS"),
              std::span<std::uint8_t>{reinterpret_cast<std::uint8_t *>(&regs), sizeof regs});
    return thread;
}

std::uint32_t exit_reason(const kvm::VcpuThread &vcpu) {
    return reinterpret_cast<const kvm_run *>(vcpu.run_page()->data())->exit_reason;
}

} // namespace nvmx::test

int main() {
    int failed = 0;
    for (const auto &test : nvmx::test::cases()) {
        try {
            test.body();
            std::printf("ok %s\n", test.name);
        } catch (const nvmx::kvm::KvmError &error) {
            std::printf("not ok %s: %s: %s\n", test.name, error.what(), std::strerror(error.error));
            failed++;
        } catch (const std::exception &error) {
            std::printf("not ok %s: %s\n", test.name, error.what());
            failed++;
        }
        std::fflush(stdout);
    }
    std::printf("%zu run, %d failed\n", nvmx::test::cases().size(), failed);
    return failed ? 1 : 0;
}
