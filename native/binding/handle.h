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

/// The object behind a JS value. Anything but a T handle is a TypeError that begins with `what`: without the
/// tag check a VM handle passed for a vCPU would be read as one.
template <class T>
const std::shared_ptr<T> &handle_of(Napi::Env env, const Napi::Value &value, const std::string &what) {
    if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&HandleType<T>::tag))
        throw Napi::TypeError::New(env, what + " is not a " + HandleType<T>::name + " handle");
    void *data = nullptr;
    if (napi_unwrap(env, value, &data) != napi_ok)
        throw Napi::TypeError::New(env, "not a live handle");
    return *static_cast<std::shared_ptr<T> *>(data);
}

/// The object behind argument `index`.
template <class T>
const std::shared_ptr<T> &handle_argument(const Napi::CallbackInfo &info, std::size_t index) {
    return handle_of<T>(info.Env(), info[index], "argument " + std::to_string(index));
}

/// An integer argument within [low, high]. TypeError for anything but a number, RangeError outside.
std::int64_t integer_argument(const Napi::CallbackInfo &info, std::size_t index, const char *name,
                              std::int64_t low, std::int64_t high);

/// The bytes of a Uint8Array argument.
std::span<std::uint8_t> bytes_argument(const Napi::CallbackInfo &info, std::size_t index);

/// The words of a BigUint64Array argument.
std::span<std::uint64_t> words_argument(const Napi::CallbackInfo &info, std::size_t index);

/// An external ArrayBuffer over part of a mapping, which lives at least as long as the buffer.
Napi::Value array_buffer_over(Napi::Env env, const std::shared_ptr<kvm::Mapping> &mapping, std::size_t offset,
                              std::size_t length);

/// One generic ioctl: argument 1 is the row of the table, argument 2 a Uint8Array, a number or nothing.
Napi::Value call_ioctl(const Napi::CallbackInfo &info, const kvm::Fd &fd, kvm::Scope scope);

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

template <Napi::Value (*Body)(const Napi::CallbackInfo &)>
void define(Napi::Env env, Napi::Object exports, const char *name) {
    exports.Set(name, Napi::Function::New<guarded<Body>>(env, name));
}

} // namespace nvmx::binding
