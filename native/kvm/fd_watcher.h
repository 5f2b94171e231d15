// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "fd.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <thread>

namespace nvmx::kvm {

/// A thread ("nvmx-events") that waits until descriptors can be read. watch() and forget() belong to the
/// owner.
class FdWatcher {
  public:
    /// Called on the watcher's thread.
    using Ready = std::function<void(std::uint64_t id)>;

    explicit FdWatcher(Ready ready);
    FdWatcher(const FdWatcher &) = delete;
    FdWatcher &operator=(const FdWatcher &) = delete;
    /// Joins the thread.
    ~FdWatcher();

    /// Reports `id` once, as soon as `fd` can be read. To be called again for the next time.
    void watch(const Fd &fd, std::uint64_t id);
    /// Before the descriptor is closed.
    void forget(const Fd &fd);

  private:
    Fd epoll_;
    Fd wake_;
    std::thread thread_;
};

} // namespace nvmx::kvm
