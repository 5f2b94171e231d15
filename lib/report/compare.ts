// SPDX-License-Identifier: Apache-2.0
// Two result files of the same kind, the first being the base. Pure: files in, a comparison out.
import { BENCH_SCHEMA, type BenchReport, type Figure } from '../bench/index.ts';
import { RESULT_SCHEMA, type RunReport, type TestResult, type Verdict } from '../selftest/index.ts';
import { resultName } from './reporter.ts';

/** A file is no result, or the two are of different kinds. */
export class CompareError extends Error {
  override readonly name = 'CompareError';
}

export type FigureVerdict = 'faster' | 'slower' | 'same' | 'not comparable';

export interface FigureComparison {
  readonly id: string;
  readonly title: string;
  readonly verdict: FigureVerdict;
  /** head ÷ base of p50; below 1 is faster. */
  readonly ratio?: number;
  /** What the ratio may be with both sides' own uncertainty; absent where both are exact. */
  readonly interval?: readonly [number, number];
  /** Why it is not comparable. */
  readonly reason?: string;
  readonly base?: Figure;
  readonly head?: Figure;
}

export interface BenchComparison {
  readonly kind: 'bench';
  readonly base: BenchReport;
  readonly head: BenchReport;
  readonly figures: readonly FigureComparison[];
  /** Differences of the two machines that a reader must know. */
  readonly warnings: readonly string[];
}

export type TestChange =
  | 'newly failing'
  | 'newly passing'
  | 'new'
  | 'gone'
  | 'other verdict'
  | 'other evidence';

export interface TestComparison {
  readonly kind: 'test';
  readonly base: RunReport;
  readonly head: RunReport;
  readonly changes: readonly {
    readonly id: string;
    readonly change: TestChange;
    readonly base?: Verdict;
    readonly head?: Verdict;
    readonly detail?: string;
  }[];
  readonly unchanged: number;
  readonly warnings: readonly string[];
}

export type Comparison = BenchComparison | TestComparison;
/** One per cent: two builds of the same source differ by about that. */
const SAME = 0.01;
type Report = BenchReport | RunReport;

/** Reads a result file's text. @throws CompareError */
export function parseResult(name: string, text: string): Report {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    throw new CompareError(
      `${name} is not JSON: give the files that --output of nvmx bench or nvmx test wrote`,
    );
  }
  const schema = (value as { schema?: unknown } | null)?.schema;
  if (schema === BENCH_SCHEMA || schema === RESULT_SCHEMA) return value as Report;
  throw new CompareError(
    `${name} has the schema ${JSON.stringify(schema)}; this version compares ${BENCH_SCHEMA} and ${RESULT_SCHEMA}`,
  );
}

/** @throws CompareError when one is a benchmark and the other a test run */
export function compareReports(base: Report, head: Report): Comparison {
  if (base.schema === BENCH_SCHEMA && head.schema === BENCH_SCHEMA) return compareBench(base, head);
  if (base.schema === RESULT_SCHEMA && head.schema === RESULT_SCHEMA) return compareTests(base, head);
  throw new CompareError('one file is a benchmark and the other a test run: compare two of a kind');
}

function compareBench(base: BenchReport, head: BenchReport): BenchComparison {
  const before = new Map(base.figures.map((figure) => [figure.id, figure]));
  const after = new Map(head.figures.map((figure) => [figure.id, figure]));
  const why = (report: BenchReport, id: string): string =>
    report.missing.find((missing) => missing.id === id)?.reason ?? 'it was not asked for';
  const figures = [...new Set([...before.keys(), ...after.keys()])].map((id): FigureComparison => {
    const [one, two] = [before.get(id), after.get(id)];
    if (one && two) return compareFigure(one, two, machineDifference(base, head));
    const present = (one ?? two)!;
    return {
      id,
      title: present.title,
      verdict: 'not comparable',
      reason: one ? `head has no such figure: ${why(head, id)}` : `base has no such figure: ${why(base, id)}`,
      ...(one ? { base: one } : { head: present }),
    };
  });
  return { kind: 'bench', base, head, figures, warnings: warningsOf(base.environment, head.environment) };
}

/** Times of two different machines say nothing about two kernels. */
function machineDifference(base: BenchReport, head: BenchReport): string | undefined {
  const [one, two] = [base.environment, head.environment];
  if (one.kind !== two.kind) return `base ran on the ${one.kind}, head on the ${two.kind}`;
  if (one.cpu !== two.cpu) return `the CPUs differ: ${one.cpu}, ${two.cpu}`;
  if (one.engine !== two.engine) return `the emulators differ: ${one.engine}, ${two.engine}`;
  return undefined;
}

function compareFigure(base: Figure, head: Figure, machines: string | undefined): FigureComparison {
  const common = { id: base.id, title: head.title, base, head };
  const not = (reason: string): FigureComparison => ({ ...common, verdict: 'not comparable', reason });
  // A ratio is made on one machine and is meant to be compared with that of another.
  if (machines !== undefined && base.unit === 'cycles') return not(machines);
  if (base.unit !== head.unit) return not(`the units differ: ${base.unit}, ${head.unit}`);
  const different = Object.keys({ ...base.parameters, ...head.parameters }).filter(
    (name) => base.parameters[name] !== head.parameters[name],
  );
  if (different.length > 0) {
    const named = different.map(
      (n) => `${n} ${base.parameters[n] ?? 'none'}, ${head.parameters[n] ?? 'none'}`,
    );
    return not(`the parameters differ: ${named.join('; ')}`);
  }
  if (base.p50 === 0) {
    return head.p50 === 0 ? { ...common, verdict: 'same', ratio: 1 } : not('base is zero, head is not');
  }
  const ratio = head.p50 / base.p50;
  if (!base.interval && !head.interval) {
    // The emulator's clock moves in steps: a median may fall on the next one although nothing changed, the quickest
    // sample does not. What is really slower is so in both.
    const quickest = base.min === 0 ? ratio : head.min / base.min;
    return { ...common, ratio, verdict: verdictOf(ratio, ratio, ratio, quickest) };
  }
  const one = base.interval ?? [base.p50, base.p50];
  const two = head.interval ?? [head.p50, head.p50];
  const interval = [two[0] / one[1], two[1] / one[0]] as const;
  return { ...common, ratio, interval, verdict: verdictOf(ratio, ...interval) };
}

/** The whole interval must be on one side, and the difference must be more than what any rebuild changes. */
function verdictOf(ratio: number, low: number, high: number, second = ratio): FigureVerdict {
  if (Math.abs(ratio - 1) < SAME || Math.abs(second - 1) < SAME) return 'same';
  return high < 1 && second < 1 ? 'faster' : low > 1 && second > 1 ? 'slower' : 'same';
}

/** Figures slower by more than `percent`, whatever the interval's other end says. */
export function slowerThan(comparison: BenchComparison, percent: number): FigureComparison[] {
  return comparison.figures.filter(
    ({ verdict, ratio }) => verdict === 'slower' && ratio !== undefined && ratio > 1 + percent / 100,
  );
}

function warningsOf(
  base: { kernel: string; parameters: Readonly<Record<string, string>> },
  head: { kernel: string; parameters: Readonly<Record<string, string>> },
): string[] {
  const names = new Set([...Object.keys(base.parameters), ...Object.keys(head.parameters)]);
  const warnings = [...names]
    .filter((name) => (base.parameters[name] ?? 'none') !== (head.parameters[name] ?? 'none'))
    .sort()
    .map(
      (name) => `${name}: base ${base.parameters[name] ?? 'none'}, head ${head.parameters[name] ?? 'none'}`,
    );
  if (base.kernel === head.kernel) warnings.push(`both sides ran Linux ${base.kernel}`);
  return warnings;
}

const isBad = (verdict: Verdict): boolean => verdict !== 'pass' && verdict !== 'skip';

function compareTests(base: RunReport, head: RunReport): TestComparison {
  const before = new Map(base.results.map((result) => [resultName(result), result]));
  const after = new Map(head.results.map((result) => [resultName(result), result]));
  const changes: TestComparison['changes'][number][] = [];
  let unchanged = 0;
  for (const id of new Set([...before.keys(), ...after.keys()])) {
    const [one, two] = [before.get(id), after.get(id)];
    const change = changeOf(one, two);
    if (change === undefined) {
      unchanged += 1;
      continue;
    }
    changes.push({
      id,
      change,
      ...(one ? { base: one.verdict } : {}),
      ...(two ? { head: two.verdict } : {}),
      ...(change === 'other evidence'
        ? { detail: evidenceDifference(one!, two!)! }
        : two?.reason === undefined
          ? {}
          : { detail: two.reason.split('\n', 1)[0]! }),
    });
  }
  const order: TestChange[] = [
    'newly failing',
    'newly passing',
    'other verdict',
    'other evidence',
    'new',
    'gone',
  ];
  changes.sort((a, b) => order.indexOf(a.change) - order.indexOf(b.change));
  return { kind: 'test', base, head, changes, unchanged, warnings: warningsOf(base.machine, head.machine) };
}

function changeOf(one: TestResult | undefined, two: TestResult | undefined): TestChange | undefined {
  if (!two) return 'gone';
  if (!one) return isBad(two.verdict) ? 'newly failing' : 'new';
  if (isBad(one.verdict) !== isBad(two.verdict))
    return isBad(two.verdict) ? 'newly failing' : 'newly passing';
  if (one.verdict === 'skip' && two.verdict === 'pass') return 'newly passing';
  if (one.verdict !== two.verdict) return 'other verdict';
  return one.seed === undefined && evidenceDifference(one, two) !== undefined ? 'other evidence' : undefined;
}

/** Exact counts that changed although the verdict did not: another kernel's right answer. */
function evidenceDifference(one: TestResult, two: TestResult): string | undefined {
  const names = [...new Set([...Object.keys(one.evidence), ...Object.keys(two.evidence)])];
  const different = names.filter(
    (name) => JSON.stringify(one.evidence[name]) !== JSON.stringify(two.evidence[name]),
  );
  if (different.length === 0) return undefined;
  return different
    .map(
      (n) =>
        `${n} ${JSON.stringify(one.evidence[n]) ?? 'none'} → ${JSON.stringify(two.evidence[n]) ?? 'none'}`,
    )
    .join(', ');
}
