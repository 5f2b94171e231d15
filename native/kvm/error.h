// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace nvmx::kvm {

/// A system call the kernel refused. `request` is the KVM_* name for an ioctl, empty otherwise;
/// `capability` names the KVM_CAP_* that announces the request, empty when it is part of the base API.
class KvmError : public std::runtime_error {
  public:
    KvmError(int error, const char *syscall, std::string request, std::string capability = {})
        : std::runtime_error(std::string(syscall) + " " + request), error(error), syscall(syscall),
          request(std::move(request)), capability(std::move(capability)) {}

    const int error;
    const char *const syscall;
    const std::string request;
    const std::string capability;
};

/// A handle was used after close(). `what()` names the handle.
class ClosedError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

/// vCPU state was asked for while KVM_RUN is under way.
class BusyError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

/// A number that no kernel would accept: misaligned, too big, or in use.
class RangeError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

} // namespace nvmx::kvm
