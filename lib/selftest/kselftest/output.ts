// SPDX-License-Identifier: Apache-2.0
import type { Subtest } from '../engine/model.ts';

/** What a program's TAP or KTAP says; empty where it printed none. */
export interface TapOutput {
  readonly subtests: readonly Subtest[];
  /** Why everything is skipped (`1..0 # SKIP why`). */
  readonly skipped?: string;
  /** A plan that was not kept, or `Bail out!`. */
  readonly broken?: string;
}

const RESULT = /^(not )?ok\b\s*\d*\s*(?:-\s+)?(.*)$/;
const DIRECTIVE = /^(.*?)\s*#\s*(SKIP|TODO|XFAIL|XPASS|TIMEOUT|ERROR)\b:?\s*-?\s*(.*)$/i;

/**
 * Reads TAP 13 and KTAP: a result after results that stand further to the right is the group they belong to, and
 * gives them its name in front.
 */
export function parseTap(text: string): TapOutput {
  const open: { depth: number; subtest: Subtest }[] = [];
  const plans: { depth: number; count: number; seen: number }[] = [];
  let skipped: string | undefined;
  let broken: string | undefined;
  for (const raw of text.split('\n')) {
    const line = raw.trimEnd();
    const depth = line.length - line.trimStart().length;
    const words = line.trimStart();
    const plan = /^1\.\.(\d+)(?:\s*#\s*SKIP\b:?\s*-?\s*(.*))?$/i.exec(words);
    const result = RESULT.exec(words);
    if (plan) {
      if (plan[1] === '0' && depth === 0) skipped = plan[2]?.trim() || 'no reason given';
      else plans.push({ depth, count: Number(plan[1]), seen: 0 });
    } else if (words.startsWith('Bail out!')) {
      broken ??= words;
    } else if (result) {
      const kept = plans.findLast((one) => one.depth === depth);
      if (kept) kept.seen += 1;
      const subtest = readResult(result[1] !== undefined, result[2] ?? '');
      const children = open.splice(open.findLastIndex((one) => one.depth <= depth) + 1);
      if (children.length === 0) open.push({ depth, subtest });
      for (const { subtest: child } of children) {
        open.push({ depth, subtest: { ...child, name: `${subtest.name}/${child.name}` } });
      }
      if (
        children.length > 0 &&
        subtest.verdict === 'fail' &&
        children.every(({ subtest: { verdict } }) => verdict !== 'fail')
      )
        open.push({ depth, subtest });
    }
  }
  const short = plans.find((one) => one.seen !== one.count);
  broken ??= short && `${short.seen} of ${short.count} planned sub-tests were reported`;
  return {
    subtests: named(open.map(({ subtest }) => subtest)),
    ...(skipped === undefined ? {} : { skipped }),
    ...(broken === undefined ? {} : { broken }),
  };
}

function readResult(failed: boolean, text: string): Subtest {
  const [, name, directive, why = ''] = DIRECTIVE.exec(text) ?? [undefined, text.trim()];
  const base = { name: name?.replace(/\s+/g, '-') ?? '' };
  const word = directive?.toUpperCase();
  const reason = why.trim();
  if (word === 'SKIP') return { ...base, verdict: 'skip', reason: reason || 'no reason given' };
  if (failed && (word === 'TODO' || word === 'XFAIL')) {
    return { ...base, verdict: 'skip', reason: `expected to fail${reason ? `: ${reason}` : ''}` };
  }
  return failed
    ? { ...base, verdict: 'fail', reason: word ? `${word} ${reason}`.trim() : 'not ok' }
    : { ...base, verdict: 'pass' };
}

/** Sub-tests without a name, or with one that was there before, are told apart by their number. */
function named(subtests: readonly Subtest[]): Subtest[] {
  const used = new Set<string>();
  return subtests.map((subtest, index) => {
    const name =
      subtest.name === '' || used.has(subtest.name) ? `${subtest.name}#${index + 1}` : subtest.name;
    used.add(name);
    return { ...subtest, name };
  });
}

/** Why a program with exit status 4 skipped itself: its last line that says so, else its last line. */
export function skipReason(text: string): string {
  const lines = text.split('\n').flatMap((line) => line.trim() || []);
  const said = lines.findLast((line) => /\bSKIP\b/i.test(line));
  const reason = said?.replace(/^.*\bSKIP(?:PED)?\b[\s:-]*/i, '') || said || lines.at(-1);
  return reason ?? 'no reason given';
}

/** The place and the words of a failed TEST_ASSERT of the kernel's selftests. */
export function failedAssertion(text: string): string | undefined {
  const lines = text.split('\n').map((line) => line.trim());
  const at = lines.findIndex((line) => line.startsWith('==== Test Assertion Failure'));
  if (at < 0) return undefined;
  // Then a line for the process and the call chain, whose lines begin with a number.
  const words = lines
    .slice(at + 2)
    .find((line) => line !== '' && !/^(pid=|\d+\s+0x|\(stack trace)/.test(line));
  return [lines[at + 1], words].filter((part) => part).join(' ');
}
