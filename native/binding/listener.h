// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "environment.h"

#include <napi.h>

#include <cstdint>

namespace nvmx::binding {

/// A handle that hears from a native thread on the JS thread, one report per begin(). Between begin() and
/// end() it keeps the event loop alive.
class Listener {
  public:
    Listener(Napi::Env env, Napi::Function callback);
    Listener(const Listener &) = delete;
    Listener &operator=(const Listener &) = delete;
    virtual ~Listener();

    /// A report has come for this listener.
    void hear(Napi::Env env, int value);
    /// The environment goes first at teardown when Node finalizes it before this handle.
    void forget_environment() { environment_ = nullptr; }

  protected:
    /// Before the callback is called.
    virtual void heard() {}
    void begin();
    void end();
    bool is_pending() const { return pending_; }
    std::uint64_t id() const { return id_; }
    Environment *environment() const { return environment_; }

  private:
    Napi::Env env_;
    Environment *environment_;
    Napi::FunctionReference callback_;
    std::uint64_t id_;
    bool pending_ = false;
};

} // namespace nvmx::binding
