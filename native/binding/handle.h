// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "environment.h"

#include <napi.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace nvmx::binding {

/// Set by each handle type: its name for messages and the tag that proves an object is such a handle.
template <class T> struct HandleType;

/// A JS object that owns a shared reference to `object` and carries T's type tag.
template <class T> Napi::Object make_handle(Napi::Env env, std::shared_ptr<T> object) {
    Napi::Object handle = Napi::Object::New(env);
    auto owner = std::make_unique<std::shared_ptr<T>>(std::move(object));
    const auto finalize = [](napi_env, void *data, void *) {
        delete static_cast<std::shared_ptr<T> *>(data);
    };
    if (napi_wrap(env, handle, owner.get(), finalize, nullptr, nullptr) != napi_ok)
        throw Napi::Error::New(env, "cannot wrap a handle");
    owner.release();
    handle.TypeTag(&HandleType<T>::tag);
    return handle;
}

/// The object behind a JS value, or null for anything but a live T handle: without the tag check a VM handle
/// passed for a vCPU would be read as one.
template <class T> std::shared_ptr<T> *find_handle(Napi::Env env, napi_value value) {
    napi_valuetype type;
    bool is_tagged = false;
    void *data = nullptr;
    if (napi_typeof(env, value, &type) != napi_ok || type != napi_object ||
        napi_check_object_type_tag(env, value, &HandleType<T>::tag, &is_tagged) != napi_ok || !is_tagged ||
        napi_unwrap(env, value, &data) != napi_ok)
        return nullptr;
    return static_cast<std::shared_ptr<T> *>(data);
}

/// The same; anything else is a TypeError that begins with `what`.
template <class T>
const std::shared_ptr<T> &handle_of(Napi::Env env, const Napi::Value &value, const std::string &what) {
    if (const auto *handle = find_handle<T>(env, value))
        return *handle;
    throw Napi::TypeError::New(env, what + " is not a " + HandleType<T>::name + " handle");
}

/// The object behind argument `index`.
template <class T>
const std::shared_ptr<T> &handle_argument(const Napi::CallbackInfo &info, std::size_t index) {
    if (const auto *handle = find_handle<T>(info.Env(), info[index]))
        return *handle;
    return handle_of<T>(info.Env(), info[index], "argument " + std::to_string(index));
}

/// An integer argument within [low, high]. TypeError for anything but a number, RangeError outside.
std::int64_t integer_argument(const Napi::CallbackInfo &info, std::size_t index, const char *name,
                              std::int64_t low, std::int64_t high);

/// The bytes of a Uint8Array argument.
std::span<std::uint8_t> bytes_argument(const Napi::CallbackInfo &info, std::size_t index);

/// The numbers of a Uint32Array argument.
std::span<std::uint32_t> indices_argument(const Napi::CallbackInfo &info, std::size_t index);

/// The words of a BigUint64Array argument.
std::span<std::uint64_t> words_argument(const Napi::CallbackInfo &info, std::size_t index);

/// An external ArrayBuffer over part of a mapping, which lives at least as long as the buffer.
Napi::Value array_buffer_over(Napi::Env env, const std::shared_ptr<kvm::Mapping> &mapping, std::size_t offset,
                              std::size_t length);

/// One generic ioctl: argument `first` is the row of the table, the next a Uint8Array, a number or nothing.
Napi::Value call_ioctl(const Napi::CallbackInfo &info, const kvm::Fd &fd, kvm::Scope scope,
                       std::size_t first = 1);

/// Descriptors as [name, flags, exponent, bucketSize, index, count] rows.
Napi::Value describe_stats(Napi::Env env, const kvm::Stats &stats);

/// The one place where a C++ exception becomes a JS error.
[[noreturn]] void throw_as_js(Napi::Env env);

template <Napi::Value (*Body)(const Napi::CallbackInfo &)>
Napi::Value guarded(const Napi::CallbackInfo &info) {
    try {
        return Body(info);
    } catch (const Napi::Error &) {
        throw;
    } catch (...) {
        throw_as_js(info.Env());
    }
}

/// A function that is bound to `data` instead of taking a handle: checking a handle's tag costs more than a
/// call.
template <class T, Napi::Value (*Body)(const Napi::CallbackInfo &)>
void define_bound(Napi::Object functions, const char *name, const std::shared_ptr<T> &data) {
    auto owner = std::make_unique<std::shared_ptr<T>>(data);
    Napi::Function function = Napi::Function::New<guarded<Body>>(functions.Env(), name, owner.get());
    function.AddFinalizer([](Napi::Env, std::shared_ptr<T> *done) { delete done; }, owner.get());
    owner.release();
    functions.Set(name, function);
}

/// What a function was bound to.
template <class T> T &bound(const Napi::CallbackInfo &info) {
    return **static_cast<std::shared_ptr<T> *>(info.Data());
}

template <Napi::Value (*Body)(const Napi::CallbackInfo &)>
void define(Napi::Env env, Napi::Object exports, const char *name) {
    exports.Set(name, Napi::Function::New<guarded<Body>>(env, name));
}

} // namespace nvmx::binding
