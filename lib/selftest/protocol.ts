// SPDX-License-Identifier: Apache-2.0
import type { HostProbe, KernelKind } from '../probe/index.ts';
import type { MachineInfo, RunEvent } from './engine/model.ts';
import type { Settings } from './engine/parameters.ts';
import type { Cursor } from './engine/runner.ts';
import type { ProgramSet } from './kselftest/index.ts';

/** What the lab machine is asked to do. */
export interface AgentJob {
  /** In the order in which they run. */
  readonly ids: readonly string[];
  /** Makes the same tests inside as outside. */
  readonly settings: Settings;
  /** Run these instead of the suites' tests. */
  readonly programs?: ProgramSet;
  readonly seed: number;
  readonly expect: KernelKind | 'auto';
  readonly timeoutMs?: number;
  readonly repeat?: number;
  readonly durationMs?: number;
  readonly failFast?: boolean;
  readonly from: Cursor;
}

/** In front of every event line, so that anything else a program prints is never taken for one. */
const MARK = '@nvmx ';

export function encodeEvent(event: RunEvent): string {
  return MARK + JSON.stringify(event);
}

/** The event in a line from the lab machine; nothing when the line is not one. */
export function decodeEvent(line: string): RunEvent | undefined {
  if (!line.startsWith(MARK)) return undefined;
  try {
    return JSON.parse(line.slice(MARK.length)) as RunEvent;
  } catch {
    return undefined;
  }
}

export function machineInfo(kind: 'host' | 'lab', probe: HostProbe): MachineInfo {
  return {
    kind,
    kernel: probe.kernel.release,
    cpu: probe.cpu.model,
    ...(probe.cpu.microcode === undefined ? {} : { microcode: probe.cpu.microcode }),
    parameters: probe.kvm.parameters,
    fingerprint: probe.fingerprint,
  };
}
