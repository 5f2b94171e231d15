// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvm/system.h"

#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace nvmx::test {

struct Case {
    const char *name;
    std::function<void()> body;
};

std::vector<Case> &cases();

struct Register {
    Register(const char *name, std::function<void()> body) { cases().push_back({name, std::move(body)}); }
};

template <class A, class B> void equal(const A &seen, const B &expected, const char *what, int line) {
    if (seen == expected)
        return;
    std::ostringstream text;
    text << "line " << line << ": " << what << ": expected " << expected << ", seen " << seen;
    throw std::runtime_error(text.str());
}

template <class E> E thrown(const std::function<void()> &call, int line) {
    try {
        call();
    } catch (const E &error) {
        return error;
    }
    throw std::runtime_error("line " + std::to_string(line) + ": nothing was thrown");
}

/// A VM with one page of code at 0x1000 and, on request, a vCPU that is about to execute it in real mode.
class Machine {
  public:
    explicit Machine(std::vector<std::uint8_t> code);
    kvm::System system{"/dev/kvm"};
    std::shared_ptr<kvm::Vm> vm;
    std::shared_ptr<kvm::MemoryRegion> code;
    std::shared_ptr<kvm::VcpuThread> vcpu(std::uint32_t id = 0);
};

std::uint32_t exit_reason(const kvm::VcpuThread &vcpu);

} // namespace nvmx::test

#define NVMX_JOIN2(a, b) a##b
#define NVMX_JOIN(a, b) NVMX_JOIN2(a, b)
#define TEST(name)                                                                                           \
    static void NVMX_JOIN(body_, __LINE__)();                                                                \
    static const nvmx::test::Register NVMX_JOIN(case_, __LINE__)(name, NVMX_JOIN(body_, __LINE__));          \
    static void NVMX_JOIN(body_, __LINE__)()
#define EQUAL(seen, expected) nvmx::test::equal((seen), (expected), #seen, __LINE__)
#define THROWN(Error, ...) nvmx::test::thrown<Error>([&] { __VA_ARGS__; }, __LINE__)
