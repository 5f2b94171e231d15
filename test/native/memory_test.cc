// SPDX-License-Identifier: Apache-2.0
#include "harness.h"

#include "kvm/uapi.h"

#include <cerrno>

using namespace nvmx;
using test::Machine;

TEST("slot numbers are reused from the bottom") {
    Machine machine({0xf4});
    EQUAL(machine.code->slot(), 0u);
    const auto one = machine.vm->add_memory(-1, 0x10000, 0x1000, 0, {.backing = kvm::Backing::Memfd});
    const auto two = machine.vm->add_memory(-1, 0x20000, 0x1000, 0, {.backing = kvm::Backing::Anonymous});
    EQUAL(two->slot(), 2u);
    machine.vm->remove_memory(one->slot());
    THROWN(kvm::ClosedError, one->memory());
    EQUAL(machine.vm->add_memory(-1, 0x10000, 0x1000, 0, {.backing = kvm::Backing::Anonymous})->slot(), 1u);
    THROWN(kvm::ClosedError, machine.vm->remove_memory(7));
    THROWN(kvm::RangeError,
           machine.vm->add_memory(2, 0x30000, 0x1000, 0, {.backing = kvm::Backing::Anonymous}));
}

TEST("discard drops what either backing holds, unmap_pages only what is not in a file") {
    Machine machine({0xf4});
    std::uint64_t gpa = 0x10000;
    for (const auto backing : {kvm::Backing::Anonymous, kvm::Backing::Memfd}) {
        const auto region = machine.vm->add_memory(-1, gpa, 0x2000, 0, {.backing = backing});
        std::uint8_t *bytes = region->mapping()->data();
        bytes[0] = bytes[0x1000] = 7;
        region->memory().advise(0, 0x1000, MADV_DONTNEED);
        EQUAL(int{bytes[0]}, backing == kvm::Backing::Memfd ? 7 : 0);
        region->memory().discard(0, 0x1000);
        EQUAL(int{bytes[0]}, 0);
        EQUAL(int{bytes[0x1000]}, 7);
        gpa += 0x10000;
    }
}

TEST("misaligned and empty regions are refused, a refused update changes nothing") {
    Machine machine({0xf4});
    const auto add = [&](std::uint64_t gpa, std::uint64_t size) {
        machine.vm->add_memory(-1, gpa, size, 0, {.backing = kvm::Backing::Anonymous});
    };
    THROWN(kvm::RangeError, add(0x10001, 0x1000));
    THROWN(kvm::RangeError, add(0x10000, 0xfff));
    THROWN(kvm::RangeError, add(0x10000, 0));
    const auto region = machine.vm->add_memory(-1, 0x10000, 0x1000, 0, {.backing = kvm::Backing::Anonymous});
    EQUAL(THROWN(kvm::KvmError, region->update(0x1000, 0)).error, EEXIST);
    EQUAL(region->gpa(), 0x10000u);
    THROWN(kvm::RangeError, region->memory().discard(0x1000, 0x1000));
}

TEST("memory outlives its VM as long as somebody holds the mapping, and is zeroes then") {
    std::shared_ptr<kvm::Mapping> mapping;
    {
        Machine machine({0xf4});
        mapping = machine.code->mapping();
        EQUAL(int{mapping->data()[0]}, 0xf4);
    }
    EQUAL(int{mapping->data()[0]}, 0);
    mapping->data()[0xfff] = 1;
}
