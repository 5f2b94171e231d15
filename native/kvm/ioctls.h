// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fd.h"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace nvmx::kvm {

/// The file descriptor class an ioctl belongs to (Documentation/virt/kvm/api.rst, "Type:").
enum class Scope : std::uint8_t { System, Vm, Vcpu };

/// How an ioctl's argument travels.
enum class Argument : std::uint8_t { None, Value, Struct };

/// One row of the table. `size` is that of the fixed part; an ioctl on a structure with a trailing array
/// has `total`, which reads the array's length from the fixed part.
struct Ioctl {
    const char *name;
    unsigned long request;
    Scope scope;
    Argument argument;
    std::size_t size;
    std::size_t (*total)(const std::uint8_t *fixed);
    const char *capability;
};

/// Every request the generic path can make, grouped by fd class. KVM_RUN, KVM_CREATE_VM, KVM_CREATE_VCPU,
/// those on memslots and dirty logs, XSAVE and KVM_GET_STATS_FD have wrappers of their own.
std::span<const Ioctl> ioctls();

/// Looks a row up by fd class and KVM_* name. Throws std::out_of_range for an unknown one.
const Ioctl &ioctl_named(Scope scope, std::string_view name);

/// Makes the call; the buffer must be as large as the request says or RangeError is thrown before the
/// kernel sees it. Returns the ioctl's result. Throws KvmError.
int call(const Fd &fd, const Ioctl &ioctl, std::span<std::uint8_t> buffer);
int call(const Fd &fd, const Ioctl &ioctl, unsigned long value = 0);

/// One request of a list: its row in the table, and where in the list's buffer its structure is.
struct ListedCall {
    std::uint32_t row, offset, size;
};

/// Makes the requests in order over one buffer, from number `first`. The answer of one without a structure is
/// left in its four bytes. Returns the number of the first that did not do all it was asked to (KVM_GET_MSRS
/// and KVM_SET_MSRS stop at an MSR they refuse), or the length of the list. Throws RangeError, KvmError.
std::size_t call_list(const Fd &fd, Scope scope, std::span<const ListedCall> list,
                      std::span<std::uint8_t> buffer, std::size_t first);

} // namespace nvmx::kvm
