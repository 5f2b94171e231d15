// SPDX-License-Identifier: Apache-2.0
#include "wrap_event.h"

#include "wrap_memory.h"

#include <limits>

namespace nvmx::binding {

void FdHandle::wait() {
    if (!environment())
        throw kvm::ClosedError("handle");
    environment()->watcher().watch(fd(), id());
    begin();
}

void FdHandle::stop_waiting() {
    if (is_pending() && environment())
        environment()->forget_descriptor(fd());
    end();
}

namespace {

constexpr std::int64_t kMaxSafe = (std::int64_t{1} << 53) - 1;

EventHandle &event(const Napi::CallbackInfo &info) {
    return *handle_argument<EventHandle>(info, 0);
}

UserfaultHandle &userfault(const Napi::CallbackInfo &info) {
    return *handle_argument<UserfaultHandle>(info, 0);
}

std::uint64_t number(const Napi::CallbackInfo &info, std::size_t index, const char *name) {
    return static_cast<std::uint64_t>(integer_argument(info, index, name, 0, kMaxSafe));
}

Napi::Function callback(const Napi::CallbackInfo &info, std::size_t index) {
    if (!info[index].IsFunction())
        throw Napi::TypeError::New(info.Env(), "argument " + std::to_string(index) + " is not a function");
    return info[index].As<Napi::Function>();
}

Napi::Value event_create(const Napi::CallbackInfo &info) {
    return make_handle(info.Env(),
                       std::make_shared<EventHandle>(info.Env(), callback(info, 1), info[0].ToBoolean()));
}

Napi::Value event_fd(const Napi::CallbackInfo &info) {
    return Napi::Number::New(info.Env(), event(info).fd().get());
}

Napi::Value event_signal(const Napi::CallbackInfo &info) {
    if (!info[1].IsBigInt())
        throw Napi::TypeError::New(info.Env(), "value must be a bigint");
    bool lossless;
    event(info).event.signal(info[1].As<Napi::BigInt>().Uint64Value(&lossless));
    return info.Env().Undefined();
}

Napi::Value event_take(const Napi::CallbackInfo &info) {
    const auto value = event(info).event.take();
    return value ? Napi::Value(Napi::BigInt::New(info.Env(), *value)) : info.Env().Undefined();
}

Napi::Value event_wait(const Napi::CallbackInfo &info) {
    event(info).wait();
    return info.Env().Undefined();
}

Napi::Value event_close(const Napi::CallbackInfo &info) {
    event(info).stop_waiting();
    event(info).event.close();
    return info.Env().Undefined();
}

Napi::Value watch_faults(const Napi::CallbackInfo &info) {
    const auto function = callback(info, 4);
    auto watched = handle_argument<kvm::MemoryRegion>(info, 0)->watch_faults(
        number(info, 1, "offset"), number(info, 2, "length"), info[3].ToBoolean());
    return make_handle(info.Env(),
                       std::make_shared<UserfaultHandle>(info.Env(), function, std::move(watched)));
}

/// [offset, write], or undefined when nobody waits.
Napi::Value userfault_read(const Napi::CallbackInfo &info) {
    const auto fault = userfault(info).userfault->read();
    if (!fault)
        return info.Env().Undefined();
    Napi::Array pair = Napi::Array::New(info.Env(), 2);
    pair[0u] = static_cast<double>(fault->offset);
    pair[1u] = fault->write;
    return pair;
}

Napi::Value userfault_wait(const Napi::CallbackInfo &info) {
    userfault(info).wait();
    return info.Env().Undefined();
}

Napi::Value userfault_copy(const Napi::CallbackInfo &info) {
    userfault(info).userfault->copy(number(info, 1, "offset"), bytes_argument(info, 2));
    return info.Env().Undefined();
}

Napi::Value userfault_zero(const Napi::CallbackInfo &info) {
    userfault(info).userfault->zero(number(info, 1, "offset"), number(info, 2, "length"));
    return info.Env().Undefined();
}

Napi::Value userfault_continue(const Napi::CallbackInfo &info) {
    userfault(info).userfault->resume(number(info, 1, "offset"), number(info, 2, "length"));
    return info.Env().Undefined();
}

Napi::Value userfault_close(const Napi::CallbackInfo &info) {
    userfault(info).stop_waiting();
    userfault(info).userfault->close();
    return info.Env().Undefined();
}

} // namespace

void define_events(Napi::Env env, Napi::Object exports) {
    define<event_create>(env, exports, "eventCreate");
    define<event_fd>(env, exports, "eventFd");
    define<event_signal>(env, exports, "eventSignal");
    define<event_take>(env, exports, "eventTake");
    define<event_wait>(env, exports, "eventWait");
    define<event_close>(env, exports, "eventClose");
    define<watch_faults>(env, exports, "regionWatchFaults");
    define<userfault_read>(env, exports, "userfaultRead");
    define<userfault_wait>(env, exports, "userfaultWait");
    define<userfault_copy>(env, exports, "userfaultCopy");
    define<userfault_zero>(env, exports, "userfaultZero");
    define<userfault_continue>(env, exports, "userfaultContinue");
    define<userfault_close>(env, exports, "userfaultClose");
}

} // namespace nvmx::binding
