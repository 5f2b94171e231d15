// SPDX-License-Identifier: Apache-2.0
#include "wrap_vcpu.h"

#include "kvm/nested_state.h"
#include "kvm/xsave.h"
#include "wrap_vcpu_calls.h"

#include <chrono>
#include <limits>

namespace nvmx::binding {

VcpuHandle::VcpuHandle(Napi::Env env, std::shared_ptr<kvm::VcpuThread> thread, Napi::Function on_exit)
    : Listener(env, on_exit), thread_(std::move(thread)) {}

VcpuHandle::~VcpuHandle() {
    close();
}

std::optional<int> VcpuHandle::start_run() {
    if (!environment())
        throw kvm::ClosedError("Vcpu");
    kvm::VcpuThread::Completion post = [sink = environment()->sink(), id = id()](int error) {
        sink->post(id, error);
    };
    if (environment()->is_quiet()) {
        if (const auto error = thread_->try_run(std::move(post)))
            return error;
    } else {
        thread_->submit_run(std::move(post));
    }
    begin();
    return {};
}

void VcpuHandle::close() {
    thread_->stop();
    end();
}

namespace {

VcpuHandle &vcpu(const Napi::CallbackInfo &info) {
    return *handle_argument<VcpuHandle>(info, 0);
}

Napi::Value get_nested_state(const Napi::CallbackInfo &info) {
    const std::size_t size = kvm::get_nested_state(vcpu(info).thread().idle_vcpu(), bytes_argument(info, 1));
    return Napi::Number::New(info.Env(), static_cast<double>(size));
}

Napi::Value set_nested_state(const Napi::CallbackInfo &info) {
    kvm::set_nested_state(vcpu(info).thread().idle_vcpu(), bytes_argument(info, 1));
    return info.Env().Undefined();
}

Napi::Value enable_evmcs(const Napi::CallbackInfo &info) {
    return Napi::Number::New(info.Env(), kvm::enable_evmcs(vcpu(info).thread().idle_vcpu()));
}

/// KVM_RUN's errno, for finish(); or undefined: the callback will have it.
Napi::Value run(const Napi::CallbackInfo &info) {
    if (const auto error = vcpu(info).start_run())
        return Napi::Number::New(info.Env(), *error);
    return info.Env().Undefined();
}

Napi::Value finish(const Napi::CallbackInfo &info) {
    vcpu(info).thread().finish_run();
    return info.Env().Undefined();
}

Napi::Value run_within(const Napi::CallbackInfo &info) {
    const auto limit = integer_argument(info, 1, "timeoutMs", 0, std::numeric_limits<std::int32_t>::max());
    return Napi::Number::New(info.Env(), vcpu(info).thread().run_within(std::chrono::milliseconds(limit)));
}

Napi::Value settle(const Napi::CallbackInfo &info) {
    return Napi::Number::New(info.Env(), vcpu(info).thread().idle_vcpu().settle());
}

/// Rules as four words each: kind, first, last, answer. None: no filter.
Napi::Value set_filter(const Napi::CallbackInfo &info) {
    const auto words = words_argument(info, 1);
    if (words.size() % 4 != 0)
        throw Napi::RangeError::New(info.Env(), "a rule has four words");
    std::vector<kvm::ExitRule> rules;
    for (std::size_t at = 0; at < words.size(); at += 4)
        rules.push_back(
            {static_cast<kvm::ExitRule::Kind>(words[at] & 3), words[at + 1], words[at + 2], words[at + 3]});
    vcpu(info).thread().set_filter(rules.empty() ? nullptr
                                                 : std::make_shared<kvm::ExitFilter>(std::move(rules)));
    return info.Env().Undefined();
}

Napi::Value filter_counts(const Napi::CallbackInfo &info) {
    if (const auto &filter = vcpu(info).thread().filter())
        filter->read_counts(words_argument(info, 1));
    return info.Env().Undefined();
}

Napi::Value map_dirty_ring(const Napi::CallbackInfo &info) {
    const auto bytes = integer_argument(info, 1, "bytes", 4096, std::int64_t{1} << 30);
    vcpu(info).thread().map_dirty_ring(static_cast<std::size_t>(bytes));
    return info.Env().Undefined();
}

/// The number of entries written to a BigUint64Array as pairs: slot, page.
Napi::Value harvest(const Napi::CallbackInfo &info) {
    kvm::DirtyRing *ring = vcpu(info).thread().dirty_ring();
    const std::size_t count = ring ? ring->harvest(words_argument(info, 1)) : 0;
    return Napi::Number::New(info.Env(), static_cast<double>(count));
}

Napi::Value xsave_size(const Napi::CallbackInfo &info) {
    return Napi::Number::New(info.Env(), static_cast<double>(vcpu(info).thread().xsave_size()));
}

Napi::Value get_xsave(const Napi::CallbackInfo &info) {
    kvm::VcpuThread &thread = vcpu(info).thread();
    kvm::get_xsave(thread.idle_vcpu(), bytes_argument(info, 1), thread.xsave_size());
    return info.Env().Undefined();
}

Napi::Value set_xsave(const Napi::CallbackInfo &info) {
    kvm::VcpuThread &thread = vcpu(info).thread();
    kvm::set_xsave(thread.idle_vcpu(), bytes_argument(info, 1), thread.xsave_size());
    return info.Env().Undefined();
}

Napi::Value kick(const Napi::CallbackInfo &info) {
    vcpu(info).thread().kick();
    return info.Env().Undefined();
}

Napi::Value run_page(const Napi::CallbackInfo &info) {
    const auto &page = vcpu(info).thread().idle_vcpu().run_page();
    return array_buffer_over(info.Env(), page, 0, page->size());
}

Napi::Value stats(const Napi::CallbackInfo &info) {
    return describe_stats(info.Env(), vcpu(info).thread().stats());
}

Napi::Value read_stats(const Napi::CallbackInfo &info) {
    vcpu(info).thread().stats().read(words_argument(info, 1));
    return info.Env().Undefined();
}

Napi::Value close(const Napi::CallbackInfo &info) {
    vcpu(info).close();
    return info.Env().Undefined();
}

} // namespace

void define_vcpu(Napi::Env env, Napi::Object exports) {
    define<make_vcpu_calls>(env, exports, "vcpuCalls");
    define<get_nested_state>(env, exports, "vcpuGetNestedState");
    define<set_nested_state>(env, exports, "vcpuSetNestedState");
    define<enable_evmcs>(env, exports, "vcpuEnableEvmcs");
    define<run>(env, exports, "vcpuRun");
    define<finish>(env, exports, "vcpuFinish");
    define<run_within>(env, exports, "vcpuRunWithin");
    define<settle>(env, exports, "vcpuSettle");
    define<set_filter>(env, exports, "vcpuSetFilter");
    define<filter_counts>(env, exports, "vcpuFilterCounts");
    define<map_dirty_ring>(env, exports, "vcpuMapDirtyRing");
    define<harvest>(env, exports, "vcpuHarvest");
    define<xsave_size>(env, exports, "vcpuXsaveSize");
    define<get_xsave>(env, exports, "vcpuGetXsave");
    define<set_xsave>(env, exports, "vcpuSetXsave");
    define<kick>(env, exports, "vcpuKick");
    define<run_page>(env, exports, "vcpuRunPage");
    define<stats>(env, exports, "vcpuStats");
    define<read_stats>(env, exports, "vcpuReadStats");
    define<close>(env, exports, "vcpuClose");
}

} // namespace nvmx::binding
