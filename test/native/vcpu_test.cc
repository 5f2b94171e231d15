// SPDX-License-Identifier: Apache-2.0
#include "harness.h"

#include "kvm/nested_state.h"
#include "kvm/uapi.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>

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

namespace {

struct List {
    std::vector<kvm::ListedCall> calls;
    std::vector<std::uint8_t> bytes;

    std::uint32_t add(kvm::Scope scope, const char *name, std::vector<std::uint8_t> structure) {
        const auto row = &kvm::ioctl_named(scope, name) - kvm::ioctls().data();
        const auto at = static_cast<std::uint32_t>(bytes.size());
        calls.push_back({static_cast<std::uint32_t>(row), at, static_cast<std::uint32_t>(structure.size())});
        bytes.insert(bytes.end(), structure.begin(), structure.end());
        bytes.resize((bytes.size() + 7) & ~std::size_t{7});
        return at;
    }
    std::size_t run(const kvm::Fd &fd, std::size_t first = 0) {
        return kvm::call_list(fd, kvm::Scope::Vcpu, calls, bytes, first);
    }
};

/// struct kvm_msrs of zeroes.
std::vector<std::uint8_t> msrs(std::vector<std::uint32_t> indices) {
    std::vector<std::uint8_t> bytes(8 + indices.size() * 16);
    bytes[0] = static_cast<std::uint8_t>(indices.size());
    for (std::size_t i = 0; i < indices.size(); i++)
        std::memcpy(bytes.data() + 8 + i * 16, &indices[i], 4);
    return bytes;
}

} // namespace

TEST("a list of requests is made in order, up to the first that is not done in full") {
    Machine machine({0xf4});
    const auto vcpu = machine.vcpu();
    const kvm::Fd &fd = vcpu->idle_vcpu().fd();
    List list;
    const auto khz = list.add(kvm::Scope::Vcpu, "KVM_GET_TSC_KHZ", std::vector<std::uint8_t>(4));
    const auto regs = list.add(kvm::Scope::Vcpu, "KVM_GET_REGS", std::vector<std::uint8_t>(144));
    list.add(kvm::Scope::Vcpu, "KVM_GET_MSRS", msrs({0x174}));
    EQUAL(list.run(fd), std::size_t{3});
    std::int32_t answer;
    std::memcpy(&answer, list.bytes.data() + khz, sizeof answer);
    EQUAL(answer, kvm::call(fd, kvm::ioctl_named(kvm::Scope::Vcpu, "KVM_GET_TSC_KHZ")));
    std::uint64_t rip;
    std::memcpy(&rip, list.bytes.data() + regs + 16 * 8, sizeof rip);
    EQUAL(rip, 0x1000u);

    // No CPU has this MSR; what follows is not made until the caller goes on there.
    list.add(kvm::Scope::Vcpu, "KVM_GET_MSRS", msrs({0x174, 0x12345678}));
    const auto again = list.add(kvm::Scope::Vcpu, "KVM_GET_REGS", std::vector<std::uint8_t>(144));
    EQUAL(list.run(fd), std::size_t{3});
    EQUAL(list.bytes[again + 16 * 8 + 1], 0);
    EQUAL(list.run(fd, 4), std::size_t{5});
    EQUAL(list.bytes[again + 16 * 8 + 1], 0x10);
}

TEST("a list stays within its buffer and its kind of handle") {
    Machine machine({0xf4});
    const auto vcpu = machine.vcpu();
    const kvm::Fd &fd = vcpu->idle_vcpu().fd();
    List list;
    list.add(kvm::Scope::Vcpu, "KVM_GET_REGS", std::vector<std::uint8_t>(144));
    list.bytes.pop_back();
    THROWN(kvm::RangeError, list.run(fd));
    list.calls[0].offset = 0xffff'ffff;
    THROWN(kvm::RangeError, list.run(fd));
    list.calls[0] = {0xffff'ffff, 0, 4};
    THROWN(kvm::RangeError, list.run(fd));
    List other;
    other.add(kvm::Scope::System, "KVM_GET_API_VERSION", std::vector<std::uint8_t>(4));
    THROWN(kvm::RangeError, other.run(fd));
    List value;
    value.add(kvm::Scope::Vcpu, "KVM_SET_TSC_KHZ", std::vector<std::uint8_t>(4));
    THROWN(kvm::RangeError, value.run(fd));
    List refused;
    refused.add(kvm::Scope::Vcpu, "KVM_GET_LAPIC", std::vector<std::uint8_t>(1024));
    EQUAL(THROWN(kvm::KvmError, refused.run(fd)).request, "KVM_GET_LAPIC");
}

TEST("request numbers are those of C, flexible arrays or not") {
    EQUAL(kvm::ioctl_named(kvm::Scope::Vcpu, "KVM_SET_CPUID2").request, 0x4008ae90ul);
    EQUAL(kvm::ioctl_named(kvm::Scope::Vcpu, "KVM_GET_MSRS").request, 0xc008ae88ul);
    EQUAL(kvm::ioctl_named(kvm::Scope::System, "KVM_GET_MSR_INDEX_LIST").request, 0xc004ae02ul);
    EQUAL(kvm::ioctl_named(kvm::Scope::Vcpu, "KVM_GET_NESTED_STATE").request, 0xc080aebeul);
}
