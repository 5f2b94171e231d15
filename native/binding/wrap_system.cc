// SPDX-License-Identifier: Apache-2.0
#include "wrap_system.h"

#include "kvm/vcpu.h"
#include "wrap_vm.h"

#include <limits>

namespace nvmx::binding {
namespace {

const std::shared_ptr<kvm::System> &system(const Napi::CallbackInfo &info) {
    return handle_argument<kvm::System>(info, 0);
}

Napi::Value open(const Napi::CallbackInfo &info) {
    if (!info[0].IsString())
        throw Napi::TypeError::New(info.Env(), "path must be a string");
    auto opened = std::make_shared<kvm::System>(info[0].As<Napi::String>().Utf8Value());
    Environment::of(info.Env()).remember(opened);
    return make_handle(info.Env(), std::move(opened));
}

Napi::Value ioctl(const Napi::CallbackInfo &info) {
    return call_ioctl(info, system(info)->fd(), kvm::Scope::System);
}

Napi::Value create_vm(const Napi::CallbackInfo &info) {
    const auto type = integer_argument(info, 1, "type", 0, std::numeric_limits<std::int32_t>::max());
    return make_handle(info.Env(), system(info)->create_vm(static_cast<unsigned long>(type)));
}

Napi::Value close(const Napi::CallbackInfo &info) {
    system(info)->close();
    return info.Env().Undefined();
}

/// Milliseconds.
Napi::Value run_time(const Napi::CallbackInfo &info) {
    return Napi::Number::New(info.Env(), static_cast<double>(kvm::Vcpu::run_nanoseconds()) / 1e6);
}

} // namespace

void define_system(Napi::Env env, Napi::Object exports) {
    define<open>(env, exports, "systemOpen");
    define<ioctl>(env, exports, "systemIoctl");
    define<create_vm>(env, exports, "systemCreateVm");
    define<close>(env, exports, "systemClose");
    define<run_time>(env, exports, "runTime");
}

} // namespace nvmx::binding
