// SPDX-License-Identifier: Apache-2.0

/** KVM selftests that were renamed upstream: old name, new name. */
const RENAMED: readonly (readonly [string, string])[] = [
  ['vmx_set_nested_state_test', 'nested_set_state_test'],
  ['vmx_dirty_log_test', 'nested_dirty_log_test'],
  ['vmx_close_while_nested_test', 'nested_close_kvm_test'],
  ['vmx_tsc_adjust_test', 'nested_tsc_adjust_test'],
  ['evmcs_test', 'hyperv_evmcs'],
];

/** The names a test answers to: its path, its last part, and what that is called in other kernel versions. */
export function namesOf(id: string): string[] {
  const base = id.slice(id.lastIndexOf('/') + 1);
  const other = RENAMED.flatMap(([old, fresh]) => (base === old ? [fresh] : base === fresh ? [old] : []));
  return [id, base, ...other];
}
