// SPDX-License-Identifier: Apache-2.0
import type { BenchEvent } from './model.ts';

/** What the measuring process is asked to do. */
export interface BenchJob {
  readonly kind: 'host' | 'lab';
  /** Figure ids. */
  readonly ids: readonly string[];
  readonly passes: number;
  readonly quick: boolean;
  /** The sizes of hardware, wherever it runs. */
  readonly full?: boolean;
  /** What the machine really has, where the caller knows: "mem=" may hide some of it. */
  readonly memoryBytes?: number;
  readonly pinnedTo?: number;
}

/** In front of every event line, so that anything else a program prints is never taken for one. */
const MARK = '@nvmx-bench ';

export function encodeBenchEvent(event: BenchEvent): string {
  return MARK + JSON.stringify(event);
}

/** The event in a line; nothing when the line is not one. */
export function decodeBenchEvent(line: string): BenchEvent | undefined {
  if (!line.startsWith(MARK)) return undefined;
  try {
    return JSON.parse(line.slice(MARK.length)) as BenchEvent;
  } catch {
    return undefined;
  }
}
