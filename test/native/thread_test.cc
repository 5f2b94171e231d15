// SPDX-License-Identifier: Apache-2.0
#include "harness.h"

#include "kvm/uapi.h"

#include <atomic>
#include <cerrno>
#include <future>

using namespace nvmx;
using test::Machine;

namespace {

std::future<int> run(kvm::VcpuThread &vcpu) {
    auto promise = std::make_shared<std::promise<int>>();
    auto result = promise->get_future();
    vcpu.submit_run([promise](int error) { promise->set_value(error); });
    return result;
}

} // namespace

TEST("a kick at any moment ends the run that was submitted before it") {
    Machine machine({0xeb, 0xfe});
    const auto vcpu = machine.vcpu();
    for (int i = 0; i < 400; i++) {
        auto result = run(*vcpu);
        for (volatile int wait = 0; wait < i * 30; wait = wait + 1)
            ;
        vcpu->kick();
        EQUAL(result.get(), EINTR);
        vcpu->finish_run();
    }
}

TEST("a kick from another thread, over and over, disturbs nothing but runs") {
    Machine machine({0xeb, 0xfe});
    const auto vcpu = machine.vcpu();
    std::atomic<bool> stop{false};
    std::thread kicker([&] {
        while (!stop) {
            vcpu->kick();
            std::this_thread::yield();
        }
    });
    for (int i = 0; i < 100; i++) {
        EQUAL(run(*vcpu).get(), EINTR);
        vcpu->finish_run();
    }
    stop = true;
    kicker.join();
}

TEST("state is refused from submit to finish") {
    Machine machine({0xf4});
    const auto vcpu = machine.vcpu();
    auto result = run(*vcpu);
    EQUAL(result.get(), 0);
    THROWN(kvm::BusyError, vcpu->idle_vcpu());
    THROWN(kvm::BusyError, vcpu->submit_run([](int) {}));
    vcpu->finish_run();
    vcpu->idle_vcpu();
}

TEST("a run that is waited for is answered or called back, and never both") {
    // INC AX; OUT 0x10, AL; JMP back.
    Machine machine({0x40, 0xe6, 0x10, 0xeb, 0xfb});
    const auto vcpu = machine.vcpu();
    for (int i = 0; i < 2000; i++) {
        auto calls = std::make_shared<std::atomic<int>>(0);
        const auto answer = vcpu->try_run([calls](int error) { *calls += error == 0 ? 1 : 100; });
        if (answer) {
            EQUAL(*answer, 0);
        } else {
            while (*calls == 0)
                std::this_thread::yield();
        }
        THROWN(kvm::BusyError, vcpu->idle_vcpu());
        EQUAL(test::exit_reason(*vcpu), unsigned{KVM_EXIT_IO});
        vcpu->finish_run();
        EQUAL(calls->load(), answer ? 0 : 1);
    }
    kvm_regs regs{};
    kvm::call(vcpu->idle_vcpu().fd(), kvm::ioctl_named(kvm::Scope::Vcpu, "KVM_GET_REGS"),
              std::span<std::uint8_t>{reinterpret_cast<std::uint8_t *>(&regs), sizeof regs});
    EQUAL(regs.rax, 2000ull);
}

TEST("waiting for a guest that never exits ends, and a kick still finds the run") {
    Machine machine({0xeb, 0xfe});
    const auto vcpu = machine.vcpu();
    for (int i = 0; i < 100; i++) {
        auto called = std::make_shared<std::promise<int>>();
        EQUAL(vcpu->try_run([called](int error) { called->set_value(error); }).has_value(), false);
        vcpu->kick();
        EQUAL(called->get_future().get(), EINTR);
        vcpu->finish_run();
    }
}

TEST("stop() while the guest runs completes the run with EINTR") {
    Machine machine({0xeb, 0xfe});
    for (std::uint32_t id = 0; id < 20; id++) {
        const auto vcpu = machine.vcpu(id);
        auto result = run(*vcpu);
        EQUAL(vcpu->stop(), true);
        EQUAL(result.get(), EINTR);
    }
}

TEST("closing the VM stops eight running vCPUs") {
    Machine machine({0xeb, 0xfe});
    std::vector<std::shared_ptr<kvm::VcpuThread>> vcpus;
    std::vector<std::future<int>> results;
    for (std::uint32_t id = 0; id < 8; id++) {
        vcpus.push_back(machine.vcpu(id));
        results.push_back(run(*vcpus.back()));
    }
    machine.vm->close();
    for (auto &result : results)
        EQUAL(result.get(), EINTR);
}

TEST("a vCPU can be dropped without being closed, also while it runs") {
    Machine machine({0xeb, 0xfe});
    auto vcpu = machine.vcpu();
    auto result = run(*vcpu);
    vcpu.reset();
    EQUAL(result.get(), EINTR);
}
