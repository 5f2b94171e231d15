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

/** The first part of the id. */
export function groupOf({ id }: TestResult): string {
  return id.split('/', 1)[0] ?? id;
}

export function groupBy<T>(items: readonly T[], key: (item: T) => string): Map<string, T[]> {
  const groups = new Map<string, T[]>();
  for (const item of items) {
    const group = groups.get(key(item));
    if (group) group.push(item);
    else groups.set(key(item), [item]);
  }
  return groups;
}
