# SPDX-License-Identifier: Apache-2.0
{
  'targets': [
    {
      'target_name': 'nvmx',
      'sources': [
        'native/kvm/dirty_ring.cc',
        'native/kvm/event_fd.cc',
        'native/kvm/exit_filter.cc',
        'native/kvm/fd_watcher.cc',
        'native/kvm/host_memory.cc',
        'native/kvm/ioctls.cc',
        'native/kvm/kick_signal.cc',
        'native/kvm/memory.cc',
        'native/kvm/nested_state.cc',
        'native/kvm/stats.cc',
        'native/kvm/step_loop.cc',
        'native/kvm/system.cc',
        'native/kvm/userfault.cc',
        'native/kvm/vcpu.cc',
        'native/kvm/vcpu_thread.cc',
        'native/kvm/vm.cc',
        'native/kvm/xsave.cc',
        'native/binding/addon.cc',
        'native/binding/environment.cc',
        'native/binding/handle.cc',
        'native/binding/listener.cc',
        'native/binding/wrap_event.cc',
        'native/binding/wrap_memory.cc',
        'native/binding/wrap_step_loop.cc',
        'native/binding/wrap_system.cc',
        'native/binding/wrap_vcpu.cc',
        'native/binding/wrap_vcpu_calls.cc',
        'native/binding/wrap_vm.cc',
      ],
      'include_dirs': [
        "<!(node -p \"require('node-addon-api').include_dir\")",
        'native',
      ],
      'defines': [
        'NAPI_VERSION=8',
        'NODE_ADDON_API_CPP_EXCEPTIONS',
        'NODE_ADDON_API_DISABLE_DEPRECATED',
        # A report that comes while a worker is terminated: nobody can be told, and it must not end the process.
        'NODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS',
      ],
      # node's common.gypi sets an older standard and turns exceptions off.
      'cflags!': ['-fno-exceptions'],
      'cflags_cc!': ['-std=gnu++17', '-fno-exceptions', '-fno-rtti'],
      'cflags_cc': ['-std=c++20', '-fexceptions', '-Wall', '-Wextra', '-fvisibility=hidden'],
      # The lab's initramfs has Node and little else.
      'ldflags': ['-static-libstdc++', '-static-libgcc', '-Wl,--exclude-libs,ALL'],
    },
  ],
}
