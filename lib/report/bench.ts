// SPDX-License-Identifier: Apache-2.0
import type { BenchReport, Figure } from '../bench/index.ts';

/** Grouped by thousands with spaces; ratios and calls with their decimals. */
export function formatValue(value: number, unit: Figure['unit']): string {
  if (unit === 'ratio') return `${value.toFixed(2)} ×`;
  const [whole, decimals] = (
    Number.isInteger(value) ? String(value) : value.toFixed(value < 10 ? 2 : 0)
  ).split('.');
  const grouped = whole!.replace(/\B(?=(\d{3})+$)/g, ' ');
  return decimals === undefined ? grouped : `${grouped}.${decimals}`;
}

/** The terminal's view of a bench result. */
export function renderBench(report: BenchReport): string {
  const { environment: machine, figures } = report;
  const lines = [
    `${machine.kind}: Linux ${machine.kernel} · ${machine.cpu}${machine.engine ? ` · ${machine.engine}` : ''}`,
    `this kernel is ${machine.fingerprint.kind} · ${report.passes} pass${report.passes === 1 ? '' : 'es'} · TSC ${machine.tscHz / 1e6} MHz${report.quick ? ' · quick' : ''}${machine.pinnedTo === undefined ? '' : ` · pinned to CPU ${machine.pinnedTo}`}`,
  ];
  if ('address' in machine.unmanaged) {
    const { address, size } = machine.unmanaged;
    lines.push(`unmanaged memory: ${size / 2 ** 20} MiB from 0x${address.toString(16)}`);
  }
  lines.push('');
  const rows = figures.map((figure) => [
    figure.id,
    figure.unit,
    ...(['min', 'p50', 'p99', 'max', 'mean'] as const).map((name) => formatValue(figure[name], figure.unit)),
  ]);
  lines.push(...table([['figure', 'unit', 'min', 'p50', 'p99', 'max', 'mean'], ...rows]), '');
  lines.push(...repeatability(report));
  for (const note of report.notes) lines.push(`note: ${note}`);
  const reasons = new Map<string, string[]>();
  for (const { id, reason } of report.missing) reasons.set(reason, [...(reasons.get(reason) ?? []), id]);
  for (const [reason, ids] of reasons) {
    const named =
      ids.length > 4 ? `${ids.slice(0, 3).join(', ')} and ${ids.length - 3} more` : ids.join(', ');
    lines.push(`not measured: ${named}: ${reason}`);
  }
  return `${lines.join('\n')}\n`;
}

/** Left-aligned first two columns, right-aligned numbers. */
function table(rows: readonly (readonly string[])[]): string[] {
  const widths = rows[0]!.map((_, column) => Math.max(...rows.map((row) => row[column]!.length)));
  return rows.map((row) =>
    row
      .map((cell, column) => (column < 2 ? cell.padEnd(widths[column]!) : cell.padStart(widths[column]!)))
      .join('  ')
      .trimEnd(),
  );
}

function repeatability({ passes, figures, environment, secondRun }: BenchReport): string[] {
  const lines: string[] = [];
  if (secondRun) {
    const { differing } = secondRun;
    const clock = 'time in the lab is the number of executed instructions';
    lines.push(
      differing.length === 0
        ? `measured again in a second machine: all ${figures.length} figures identical in every number (${clock})`
        : `measured again in a second machine: ${differing.length} of ${figures.length} figures differ, which should not be (${clock}): ${differing.slice(0, 4).join(', ')}`,
    );
  }
  if (passes < 2 || figures.length === 0 || environment.kind === 'lab') return lines;
  const names = ['min', 'p50', 'p99', 'max', 'mean'] as const;
  const counts = names.map((name) => `${name} ${figures.filter((f) => f.repeats.includes(name)).length}`);
  return [...lines, `the same in all ${passes} passes, of ${figures.length} figures: ${counts.join(' · ')}`];
}
