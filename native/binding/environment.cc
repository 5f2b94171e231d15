// SPDX-License-Identifier: Apache-2.0
#include "environment.h"

#include "listener.h"

namespace nvmx::binding {

void deliver(Napi::Env env, Napi::Function, Environment *context, Report *report) {
    const std::unique_ptr<Report> owned(report);
    // A null environment is teardown emptying the queue.
    if (env == nullptr || context == nullptr)
        return;
    if (Listener *listener = context->listener(report->listener))
        listener->hear(env, report->value);
}

void ReportSink::post(std::uint64_t listener, int value) {
    const std::lock_guard lock(mutex_);
    if (!open_)
        return;
    auto report = std::make_unique<Report>(Report{listener, value});
    if (channel_.NonBlockingCall(report.get()) == napi_ok)
        report.release();
}

void ReportSink::close() {
    const std::lock_guard lock(mutex_);
    open_ = false;
}

Environment::Environment(Napi::Env env) {
    channel_ = Channel::New(env, "nvmx", 0, 1, this);
    channel_.Unref(env);
    sink_ = std::make_shared<ReportSink>(channel_);
}

Environment::~Environment() {
    close_all();
    for (const auto &[id, listener] : listeners_)
        listener->forget_environment();
}

kvm::FdWatcher &Environment::watcher() {
    if (torn_down_)
        throw kvm::ClosedError("environment");
    if (!watcher_)
        watcher_ = std::make_unique<kvm::FdWatcher>([sink = sink_](std::uint64_t id) { sink->post(id, 0); });
    return *watcher_;
}

void Environment::remember(const std::shared_ptr<kvm::System> &system) {
    std::erase_if(systems_, [](const auto &weak) { return weak.expired(); });
    systems_.push_back(system);
}

std::uint64_t Environment::register_listener(Listener *listener) {
    listeners_.emplace(next_listener_, listener);
    return next_listener_++;
}

Listener *Environment::listener(std::uint64_t id) const {
    const auto found = listeners_.find(id);
    return found == listeners_.end() ? nullptr : found->second;
}

void Environment::wait_began(Napi::Env env) {
    if (waiting_++ == 0 && !torn_down_)
        channel_.Ref(env);
}

void Environment::wait_ended(Napi::Env env) {
    if (--waiting_ == 0 && !torn_down_)
        channel_.Unref(env);
}

void Environment::close_all() {
    torn_down_ = true;
    watcher_.reset();
    for (const auto &weak : systems_)
        if (const auto system = weak.lock())
            system->close();
    sink_->close();
}

} // namespace nvmx::binding
