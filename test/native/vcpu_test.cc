// SPDX-License-Identifier: Apache-2.0
#include "harness.h"

#include "kvm/nested_state.h"
#include "kvm/uapi.h"

#include <sys/mman.h>

#include <cerrno>

using namespace nvmx;
using test::Machine;

TEST("PIO exit, then HLT, on the calling thread") {
    Machine machine({0xb0, 0x41, 0xe6, 0x10, 0xf4});
    const auto vcpu = machine.vcpu();
    EQUAL(vcpu->run_here(), 0);
    EQUAL(test::exit_reason(*vcpu), unsigned{KVM_EXIT_IO});
    EQUAL(vcpu->run_here(), 0);
    EQUAL(test::exit_reason(*vcpu), unsigned{KVM_EXIT_HLT});
}

TEST("guest memory that the host cannot reach is EFAULT with KVM_EXIT_MEMORY_FAULT") {
    // MOV AL, [0x8000].
    Machine machine({0xa0, 0x00, 0x80, 0xf4});
    const auto data = machine.vm->add_memory(-1, 0x8000, 0x1000, 0, {.backing = kvm::Backing::Anonymous});
    const auto vcpu = machine.vcpu();
    ::mprotect(data->mapping()->data(), 0x1000, PROT_NONE);
    const int error = vcpu->run_here();
    // A backend that emulates the load reports it as an MMIO read: there is no page to read.
    if (error == 0) {
        EQUAL(test::exit_reason(*vcpu), unsigned{KVM_EXIT_MMIO});
        return;
    }
    EQUAL(error, EFAULT);
    EQUAL(test::exit_reason(*vcpu), unsigned{KVM_EXIT_MEMORY_FAULT});
}

TEST("vCPU ids are unique") {
    Machine machine({0xf4});
    const auto vcpu = machine.vcpu();
    const auto error = THROWN(kvm::KvmError, machine.vm->create_vcpu(0));
    EQUAL(error.error, EEXIST);
    EQUAL(error.request, "KVM_CREATE_VCPU");
}

TEST("a closed handle throws, whatever is asked of it") {
    Machine machine({0xf4});
    const auto vcpu = machine.vcpu();
    machine.system.close();
    machine.system.close();
    THROWN(kvm::ClosedError, machine.system.create_vm(0));
    THROWN(kvm::ClosedError, machine.vm->create_vcpu(1));
    THROWN(kvm::ClosedError, machine.vm->add_memory(-1, 0, 0x1000, 0, {.backing = kvm::Backing::Anonymous}));
    THROWN(kvm::ClosedError, vcpu->run_here());
    THROWN(kvm::ClosedError, vcpu->submit_run([](int) {}));
    vcpu->kick();
    EQUAL(vcpu->stop(), true);
}

TEST("a buffer that is too small never reaches the kernel") {
    Machine machine({0xf4});
    const auto vcpu = machine.vcpu();
    const kvm::Fd &fd = vcpu->idle_vcpu().fd();
    std::vector<std::uint8_t> bytes(143);
    THROWN(kvm::RangeError, kvm::call(fd, kvm::ioctl_named(kvm::Scope::Vcpu, "KVM_GET_REGS"), bytes));
    std::vector<std::uint8_t> cpuid{9, 0, 0, 0, 0, 0, 0, 0};
    THROWN(kvm::RangeError, kvm::call(fd, kvm::ioctl_named(kvm::Scope::Vcpu, "KVM_SET_CPUID2"), cpuid));
    std::vector<std::uint8_t> nested(127);
    THROWN(kvm::RangeError, kvm::get_nested_state(vcpu->idle_vcpu(), nested));
}

TEST("request numbers are those of C, flexible arrays or not") {
    EQUAL(kvm::ioctl_named(kvm::Scope::Vcpu, "KVM_SET_CPUID2").request, 0x4008ae90ul);
    EQUAL(kvm::ioctl_named(kvm::Scope::Vcpu, "KVM_GET_MSRS").request, 0xc008ae88ul);
    EQUAL(kvm::ioctl_named(kvm::Scope::System, "KVM_GET_MSR_INDEX_LIST").request, 0xc004ae02ul);
    EQUAL(kvm::ioctl_named(kvm::Scope::Vcpu, "KVM_GET_NESTED_STATE").request, 0xc080aebeul);
}
