// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "error.h"

#include <unistd.h>

#include <utility>

namespace nvmx::kvm {

/// Owner of one file descriptor. close() is idempotent; get() after it throws ClosedError, so that a
/// number the kernel has already given to somebody else is never used.
class Fd {
  public:
    Fd(int number, const char *name) : number_(number), name_(name) {}
    Fd(const Fd &) = delete;
    Fd &operator=(const Fd &) = delete;
    Fd(Fd &&other) noexcept : number_(std::exchange(other.number_, -1)), name_(other.name_) {}
    Fd &operator=(Fd &&) = delete;
    ~Fd() { close(); }

    int get() const {
        if (number_ < 0)
            throw ClosedError(name_);
        return number_;
    }
    bool is_open() const { return number_ >= 0; }
    void close() {
        if (number_ >= 0)
            ::close(std::exchange(number_, -1));
    }

  private:
    int number_;
    const char *name_;
};

} // namespace nvmx::kvm
