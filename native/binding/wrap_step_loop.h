// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "handle.h"

namespace nvmx::binding {

void define_step_loop(Napi::Env env, Napi::Object exports);

} // namespace nvmx::binding
