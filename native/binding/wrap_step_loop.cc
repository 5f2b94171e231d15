// SPDX-License-Identifier: Apache-2.0
#include "wrap_step_loop.h"

#include "kvm/step_loop.h"
#include "wrap_memory.h"
#include "wrap_vcpu.h"

#include <vector>

namespace nvmx::binding {
namespace {

constexpr std::int64_t kMaxRounds = std::int64_t{1} << 32;
constexpr std::size_t kStepWords = 5;

std::span<double> times_argument(const Napi::CallbackInfo &info, std::size_t index) {
    if (!info[index].IsTypedArray() ||
        info[index].As<Napi::TypedArray>().TypedArrayType() != napi_float64_array)
        throw Napi::TypeError::New(info.Env(),
                                   "argument " + std::to_string(index) + " is not a Float64Array");
    auto array = info[index].As<Napi::Float64Array>();
    return {array.Data(), array.ElementLength()};
}

/// runSteps(vcpu | null, regions, steps, rounds, times, buffer)
Napi::Value run_steps(const Napi::CallbackInfo &info) {
    Napi::Env env = info.Env();
    if (!info[1].IsArray())
        throw Napi::TypeError::New(env, "argument 1 is not an array of regions");
    auto handles = info[1].As<Napi::Array>();
    std::vector<std::shared_ptr<kvm::MemoryRegion>> regions;
    for (std::uint32_t i = 0; i < handles.Length(); i++)
        regions.push_back(handle_of<kvm::MemoryRegion>(env, handles.Get(i), "a region"));

    const auto words = words_argument(info, 2);
    std::vector<kvm::Step> steps;
    for (std::size_t at = 0; at + kStepWords <= words.size(); at += kStepWords)
        steps.push_back({static_cast<kvm::StepKind>(words[at]), words[at + 1], words[at + 2], words[at + 3],
                         words[at + 4]});

    kvm::StepLoop loop;
    if (!info[0].IsNull())
        loop.vcpu = &handle_argument<VcpuHandle>(info, 0)->thread();
    loop.regions = regions;
    loop.steps = steps;
    loop.rounds = static_cast<std::uint64_t>(integer_argument(info, 3, "rounds", 0, kMaxRounds));
    loop.buffer = bytes_argument(info, 5);
    const kvm::StepLoopResult result = kvm::run_steps(loop, times_argument(info, 4));
    Napi::Array answer = Napi::Array::New(env, 3);
    answer.Set(0u, static_cast<double>(result.done));
    answer.Set(1u, static_cast<double>(result.wrong));
    answer.Set(2u, result.error);
    return answer;
}

Napi::Value timestamp(const Napi::CallbackInfo &info) {
    return Napi::BigInt::New(info.Env(), kvm::timestamp());
}

} // namespace

void define_step_loop(Napi::Env env, Napi::Object exports) {
    define<timestamp>(env, exports, "timestamp");
    define<run_steps>(env, exports, "runSteps");
}

} // namespace nvmx::binding
