// SPDX-License-Identifier: Apache-2.0

/** Basic exit reasons, SDM vol. 3, appendix C: the SDM's wording in kebab case, at their number. */
const NAMES = {
  'exception-or-nmi': 0,
  'external-interrupt': 1,
  'triple-fault': 2,
  'init-signal': 3,
  sipi: 4,
  'io-smi': 5,
  'other-smi': 6,
  'interrupt-window': 7,
  'nmi-window': 8,
  'task-switch': 9,
  cpuid: 10,
  getsec: 11,
  hlt: 12,
  invd: 13,
  invlpg: 14,
  rdpmc: 15,
  rdtsc: 16,
  rsm: 17,
  vmcall: 18,
  vmclear: 19,
  vmlaunch: 20,
  vmptrld: 21,
  vmptrst: 22,
  vmread: 23,
  vmresume: 24,
  vmwrite: 25,
  vmxoff: 26,
  vmxon: 27,
  'control-register-access': 28,
  'mov-dr': 29,
  'io-instruction': 30,
  rdmsr: 31,
  wrmsr: 32,
  'invalid-guest-state': 33,
  'msr-loading': 34,
  mwait: 36,
  'monitor-trap-flag': 37,
  monitor: 39,
  pause: 40,
  'machine-check': 41,
  'tpr-below-threshold': 43,
  'apic-access': 44,
  'virtualized-eoi': 45,
  'gdtr-idtr-access': 46,
  'ldtr-tr-access': 47,
  'ept-violation': 48,
  'ept-misconfiguration': 49,
  invept: 50,
  rdtscp: 51,
  'vmx-preemption-timer': 52,
  invvpid: 53,
  wbinvd: 54,
  xsetbv: 55,
  'apic-write': 56,
  rdrand: 57,
  invpcid: 58,
  vmfunc: 59,
  encls: 60,
  rdseed: 61,
  'page-modification-log-full': 62,
  xsaves: 63,
  xrstors: 64,
  pconfig: 65,
  'spp-event': 66,
  umwait: 67,
  tpause: 68,
  loadiwkey: 69,
  enclv: 70,
  'enqcmd-pasid': 72,
  'enqcmds-pasid': 73,
  'bus-lock': 74,
  'instruction-timeout': 75,
} as const;

export type ExitReason = keyof typeof NAMES;

const BY_CODE: ReadonlyMap<number, ExitReason> = new Map(
  Object.entries(NAMES).map(([name, code]) => [code, name as ExitReason]),
);

/** The number of an exit reason. @throws TypeError for a name that is none */
export function exitReasonCode(name: ExitReason): number {
  const code = NAMES[name];
  if (code === undefined) throw new TypeError(`"${name}" is not an exit reason`);
  return code;
}

/** The name of a basic exit reason, or `reason-N` for one this table does not have. */
export function exitReasonName(code: number): ExitReason | `reason-${number}` {
  return BY_CODE.get(code) ?? `reason-${code}`;
}
