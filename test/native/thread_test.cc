// SPDX-License-Identifier: Apache-2.0
#include "harness.h"

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
