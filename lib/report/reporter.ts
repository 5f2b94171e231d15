// SPDX-License-Identifier: Apache-2.0
import type { RunEvent, RunReport, TestResult } from '../selftest/index.ts';

/** Where a reporter's text goes. */
export type Write = (text: string) => void;

/** A view of a run: told each event as it happens, and the whole when it is over. */
export interface Reporter {
  /** @param total how many results the run will have, where that is known */
  begin(total: number | undefined): void;
  event(event: RunEvent): void;
  end(report: RunReport): void;
}

/** The id, with the round and the combination of parameters where a run has several. */
export function resultName({ id, iteration, variant }: TestResult): string {
  return `${variant === undefined ? '' : `[${variant}] `}${id}${iteration === undefined ? '' : `#${iteration}`}`;
}
