// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "handle.h"
#include "listener.h"

#include "kvm/event_fd.h"
#include "kvm/userfault.h"

namespace nvmx::binding {

/// A descriptor whose readability a JS callback can wait for.
class FdHandle : public Listener {
  public:
    using Listener::Listener;
    virtual const kvm::Fd &fd() const = 0;
    void wait();
    void stop_waiting();
};

class EventHandle : public FdHandle {
  public:
    EventHandle(Napi::Env env, Napi::Function on_ready, bool semaphore)
        : FdHandle(env, on_ready), event(semaphore) {}
    ~EventHandle() override { stop_waiting(); }
    const kvm::Fd &fd() const override { return event.fd(); }
    kvm::EventFd event;
};

class UserfaultHandle : public FdHandle {
  public:
    UserfaultHandle(Napi::Env env, Napi::Function on_ready, std::shared_ptr<kvm::Userfault> target)
        : FdHandle(env, on_ready), userfault(std::move(target)) {}
    ~UserfaultHandle() override {
        stop_waiting();
        userfault->close();
    }
    const kvm::Fd &fd() const override { return userfault->fd(); }
    const std::shared_ptr<kvm::Userfault> userfault;
};

template <> struct HandleType<EventHandle> {
    static constexpr const char *name = "EventFd";
    static constexpr napi_type_tag tag{0x25a9f0b2c7de4118, 0x9c41e6a8d05b7732};
};
template <> struct HandleType<UserfaultHandle> {
    static constexpr const char *name = "Userfault";
    static constexpr napi_type_tag tag{0x61d7743c8be94a0f, 0xb0e25f19c4a6d385};
};

void define_events(Napi::Env env, Napi::Object exports);

} // namespace nvmx::binding
