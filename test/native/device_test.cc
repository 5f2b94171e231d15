// SPDX-License-Identifier: Apache-2.0
#include "harness.h"

#include "kvm/event_fd.h"
#include "kvm/fd_watcher.h"
#include "kvm/uapi.h"

#include <atomic>
#include <cerrno>
#include <future>

using namespace nvmx;
using test::Machine;

TEST("an exit filter answers and counts on the vCPU's thread while another thread reads the counts") {
    // OUT 0x10, AL without end.
    Machine machine({0xe6, 0x10, 0xeb, 0xfc});
    const auto vcpu = machine.vcpu();
    const auto filter = std::make_shared<kvm::ExitFilter>(
        std::vector<kvm::ExitRule>{{kvm::ExitRule::Kind::IoOut, 0x10, 0x10, 0}});
    vcpu->set_filter(filter);
    auto promise = std::make_shared<std::promise<int>>();
    auto result = promise->get_future();
    vcpu->submit_run([promise](int error) { promise->set_value(error); });
    std::uint64_t count = 0;
    while (count < 100)
        filter->read_counts({&count, 1});
    vcpu->kick();
    EQUAL(result.get(), EINTR);
    vcpu->finish_run();
}

TEST("a watcher reports each descriptor once per watch, from any of many") {
    std::atomic<std::uint64_t> seen{0};
    std::atomic<int> reports{0};
    kvm::FdWatcher watcher([&](std::uint64_t id) {
        seen |= std::uint64_t{1} << id;
        reports++;
    });
    kvm::EventFd events[3] = {kvm::EventFd(false), kvm::EventFd(false), kvm::EventFd(false)};
    for (std::uint64_t i = 0; i < 3; i++)
        watcher.watch(events[i].fd(), i + 1);
    for (auto &event : events)
        event.signal(1);
    while (reports < 3)
        std::this_thread::yield();
    EQUAL(seen.load(), 0b1110u);
    events[0].signal(1);
    EQUAL(*events[0].take(), 2u);
    EQUAL(events[0].take().has_value(), false);
    watcher.watch(events[1].fd(), 2);
    while (reports < 4)
        std::this_thread::yield();
    watcher.forget(events[1].fd());
}

TEST("a watcher ends while somebody waits") {
    kvm::EventFd event(false);
    kvm::FdWatcher watcher([](std::uint64_t) {});
    watcher.watch(event.fd(), 1);
}

TEST("settle() completes an access and enters no guest; run_within() ends a guest that does not") {
    // OUT 0x10, AL; JMP $.
    Machine machine({0xe6, 0x10, 0xeb, 0xfe});
    const auto vcpu = machine.vcpu();
    EQUAL(vcpu->run_within(std::chrono::seconds(5)), 0);
    EQUAL(test::exit_reason(*vcpu), unsigned{KVM_EXIT_IO});
    EQUAL(vcpu->idle_vcpu().settle(), EINTR);
    EQUAL(vcpu->run_within(std::chrono::milliseconds(5)), EINTR);
}

TEST("ranges forbidden and permitted again are exact") {
    kvm::Mapping mapping(0x5000, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    mapping.forbid(0x1000, 0x3000);
    EQUAL(mapping.is_permitted(0, 0x1000), true);
    EQUAL(mapping.is_permitted(0xfff, 2), false);
    mapping.permit(0x2000, 0x1000);
    EQUAL(mapping.is_permitted(0x2000, 0x1000), true);
    EQUAL(mapping.is_permitted(0x1fff, 1), false);
    EQUAL(mapping.is_permitted(0x3000, 1), false);
    EQUAL(mapping.is_permitted(0x4000, 0x1000), true);
    mapping.permit(0, 0x5000);
    EQUAL(mapping.is_permitted(0, 0x5000), true);
}
