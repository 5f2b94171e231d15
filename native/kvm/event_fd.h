// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fd.h"

#include <cstdint>
#include <optional>

namespace nvmx::kvm {

/// An eventfd, as KVM_IRQFD and KVM_IOEVENTFD take it. Never blocks.
class EventFd {
  public:
    explicit EventFd(bool semaphore);
    const Fd &fd() const { return fd_; }
    /// Adds to the counter. Throws KvmError EAGAIN when it would overflow.
    void signal(std::uint64_t value);
    /// Takes the counter (a semaphore: 1 of it), or nothing when it is 0.
    std::optional<std::uint64_t> take();
    void close() { fd_.close(); }

  private:
    Fd fd_;
};

} // namespace nvmx::kvm
