// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kvm/fd_watcher.h"
#include "kvm/system.h"

#include <napi.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace nvmx::binding {

class Listener;

/// What a native thread has to say to a listener: KVM_RUN's errno, or 0 for a descriptor that can be read.
struct Report {
    std::uint64_t listener;
    int value;
};

class Environment;
void deliver(Napi::Env env, Napi::Function, Environment *context, Report *report);
using Channel = Napi::TypedThreadSafeFunction<Environment, Report, deliver>;

/// What native threads hold instead of the environment: after close() a late report, from a thread that was
/// stuck when the environment died, is dropped.
class ReportSink {
  public:
    explicit ReportSink(Channel channel) : channel_(std::move(channel)) {}
    void post(std::uint64_t listener, int value);
    void close();

  private:
    std::mutex mutex_;
    Channel channel_;
    bool open_ = true;
};

/// Everything the addon knows about one JS environment (the main thread or one worker). There is no other
/// mutable state, so any number of environments can load the addon.
class Environment {
  public:
    explicit Environment(Napi::Env env);
    Environment(const Environment &) = delete;
    Environment &operator=(const Environment &) = delete;
    ~Environment();
    static Environment &of(Napi::Env env) { return *env.GetInstanceData<Environment>(); }

    const std::shared_ptr<ReportSink> &sink() const { return sink_; }
    /// Its thread starts at the first use. Throws ClosedError during teardown.
    kvm::FdWatcher &watcher();
    /// Before a watched descriptor is closed; does nothing when nothing is watched.
    void forget_descriptor(const kvm::Fd &fd) {
        if (watcher_)
            watcher_->forget(fd);
    }
    void remember(const std::shared_ptr<kvm::System> &system);
    std::uint64_t register_listener(Listener *listener);
    void forget_listener(std::uint64_t id) { listeners_.erase(id); }
    Listener *listener(std::uint64_t id) const;

    /// Whether nobody waits: then a run may be waited for on this thread.
    bool is_quiet() const { return waiting_ == 0; }

    /// The channel keeps the event loop alive exactly while somebody waits.
    void wait_began(Napi::Env env);
    void wait_ended(Napi::Env env);

    Napi::FunctionReference make_error;

  private:
    /// Teardown: joins the threads and closes everything that is still open. Handles that Node finalizes
    /// first have closed what is theirs.
    void close_all();

    Channel channel_;
    std::shared_ptr<ReportSink> sink_;
    std::unique_ptr<kvm::FdWatcher> watcher_;
    std::vector<std::weak_ptr<kvm::System>> systems_;
    std::map<std::uint64_t, Listener *> listeners_;
    std::uint64_t next_listener_ = 1;
    unsigned waiting_ = 0;
    bool torn_down_ = false;
};

} // namespace nvmx::binding
