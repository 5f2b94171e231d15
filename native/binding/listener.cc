// SPDX-License-Identifier: Apache-2.0
#include "listener.h"

namespace nvmx::binding {

Listener::Listener(Napi::Env env, Napi::Function callback)
    : env_(env), environment_(&Environment::of(env)), callback_(Napi::Persistent(callback)),
      id_(environment_->register_listener(this)) {}

Listener::~Listener() {
    end();
    if (environment_)
        environment_->forget_listener(id_);
}

void Listener::hear(Napi::Env env, int value) {
    if (!pending_)
        return;
    end();
    heard();
    callback_.Call({Napi::Number::New(env, value)});
}

void Listener::begin() {
    if (pending_)
        return;
    pending_ = true;
    if (environment_)
        environment_->wait_began(env_);
}

void Listener::end() {
    if (!pending_)
        return;
    pending_ = false;
    if (environment_)
        environment_->wait_ended(env_);
}

} // namespace nvmx::binding
