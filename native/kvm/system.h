// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fd.h"
#include "ioctls.h"
#include "vm.h"

#include <memory>
#include <string>
#include <vector>

namespace nvmx::kvm {

/// The system fd: /dev/kvm opened. Any thread may make system ioctls; this class belongs to one thread.
class System {
  public:
    /// Throws KvmError with syscall "open" and the path as request.
    explicit System(const std::string &path);
    System(const System &) = delete;
    System &operator=(const System &) = delete;
    ~System() { close(); }

    const Fd &fd() const { return fd_; }

    /// KVM_CREATE_VM; `type` is a KVM_X86_*_VM number (KVM_CAP_VM_TYPES), 0 for an ordinary VM.
    std::shared_ptr<Vm> create_vm(unsigned long type);

    /// Its VMs first. Idempotent.
    void close();

  private:
    Fd fd_;
    std::vector<std::weak_ptr<Vm>> vms_;
};

} // namespace nvmx::kvm
