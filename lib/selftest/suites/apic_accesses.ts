// SPDX-License-Identifier: Apache-2.0
// An L2 that reads and writes one page, and what it can meet there.
import type { L2Program } from '../../guest/index.ts';
import { PAGE_GPA } from './guest_page.ts';
import { MMIO_READ, type PageRound, type Place, type Stage } from './page_rounds.ts';

/** L2 reads here, and writes there. */
const READ = 0x20;
const WRITE = 0x80;
/** mov eax, 0x11; mov eax, [rdi]; ret: what is left of it when L1 skips the read */
const READ_CODE = [0xb8, 0x11, 0, 0, 0, 0x8b, 0x07, 0xc3];
const SKIPPED = 0x11;

/** What an access meets: an exit to L1, userspace, or memory with this word at READ. */
export type How = 'trap' | 'mmio' | { readonly ram: number };
export const ZEROES: How = { ram: 0 };

export interface Row {
  readonly at: PageRound['at'];
  readonly how: How;
  /** Where a patched kernel differs. */
  readonly patched?: How;
  readonly act?: (stage: Stage) => unknown;
}

interface Outcome {
  readonly exits: readonly string[];
  readonly values: readonly number[];
  readonly page: boolean;
}

export function outcome(how: How, value: number): Outcome {
  if (how === 'trap') {
    return {
      exits: [`apic-access q=0x${READ.toString(16)}`, 'apic-access q=0x1080'],
      values: [SKIPPED],
      page: false,
    };
  }
  if (how === 'mmio') {
    const at = (offset: number) => `0x${(PAGE_GPA + offset).toString(16)}`;
    return {
      exits: [`mmio read ${at(READ)}`, `mmio write ${at(WRITE)} 0x${value.toString(16)}`],
      values: [MMIO_READ],
      page: false,
    };
  }
  return { exits: [], values: [how.ram], page: true };
}

/** L2's part: a read at READ and a write at WRITE, of the page at `gpa`. */
export function touch(program: L2Program, place: Place, value: number, gpa = PAGE_GPA): void {
  program.call(place(...READ_CODE), gpa + READ).write32(gpa + WRITE, value);
}

/** L2 reads and writes the page once. Round n writes n + 1. */
export function access({ at, how, patched, act }: Row, index: number): PageRound {
  const value = index + 1;
  const run: PageRound['run'] = (p, place) => touch(p, place, value);
  const stock = outcome(how, value);
  const base = { at, run, ...(act ? { act } : {}) };
  if (!patched) return { ...base, ...stock };
  const other = outcome(patched, value);
  return {
    ...base,
    exits: { stock: stock.exits, patched: other.exits },
    values: { stock: stock.values, patched: other.values },
    page: { stock: stock.page, patched: other.page },
  };
}

/** Whether the round's write is in the page. */
export const look = ({ page }: Stage, round: number): boolean =>
  page.isBacked && page.view.getUint32(WRITE, true) === round + 1;
