// SPDX-License-Identifier: Apache-2.0
#include "environment.h"
#include "handle.h"
#include "wrap_event.h"
#include "wrap_memory.h"
#include "wrap_step_loop.h"
#include "wrap_system.h"
#include "wrap_vcpu.h"
#include "wrap_vm.h"

namespace nvmx::binding {
namespace {

/// setErrorFactory((kind, ...details) => Error): lib/kvm/errors.ts says which classes exist.
Napi::Value set_error_factory(const Napi::CallbackInfo &info) {
    if (!info[0].IsFunction())
        throw Napi::TypeError::New(info.Env(), "argument 0 is not a function");
    Environment::of(info.Env()).make_error = Napi::Persistent(info[0].As<Napi::Function>());
    return info.Env().Undefined();
}

Napi::Value detach(const Napi::CallbackInfo &info) {
    if (!info[0].IsArrayBuffer())
        throw Napi::TypeError::New(info.Env(), "argument 0 is not an ArrayBuffer");
    auto buffer = info[0].As<Napi::ArrayBuffer>();
    if (!buffer.IsDetached())
        buffer.Detach();
    return info.Env().Undefined();
}

/// {system, vm, vcpu}: KVM_* name to row number, for the three *Ioctl functions.
Napi::Object ioctl_names(Napi::Env env) {
    Napi::Object scopes[] = {Napi::Object::New(env), Napi::Object::New(env), Napi::Object::New(env)};
    std::uint32_t row = 0;
    for (const kvm::Ioctl &ioctl : kvm::ioctls())
        scopes[static_cast<std::size_t>(ioctl.scope)].Set(ioctl.name, row++);
    Napi::Object names = Napi::Object::New(env);
    names.Set("system", scopes[0]);
    names.Set("vm", scopes[1]);
    names.Set("vcpu", scopes[2]);
    return names;
}

Napi::Object init(Napi::Env env, Napi::Object exports) {
    auto *environment = new Environment(env);
    // Node finalizes it at teardown, before the channel's memory goes.
    env.SetInstanceData(environment);

    define_system(env, exports);
    define_vm(env, exports);
    define_vcpu(env, exports);
    define_memory(env, exports);
    define_step_loop(env, exports);
    define_events(env, exports);
    define<set_error_factory>(env, exports, "setErrorFactory");
    define<detach>(env, exports, "detach");
    exports.Set("ioctls", ioctl_names(env));
    return exports;
}

} // namespace
} // namespace nvmx::binding

static Napi::Object nvmx_init(Napi::Env env, Napi::Object exports) {
    return nvmx::binding::init(env, exports);
}

NODE_API_MODULE(nvmx, nvmx_init)
