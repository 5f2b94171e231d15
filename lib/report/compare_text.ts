// SPDX-License-Identifier: Apache-2.0
// A comparison as text of 72 columns for a cover letter, and as Markdown.
import { formatValue } from './bench.ts';
import type { BenchComparison, Comparison, FigureComparison, TestComparison } from './compare.ts';

const WIDTH = 72;

/** 0.51 as it is read: times faster or slower. 0: there is nothing left of it. */
export function describeRatio(ratio: number): string {
  if (ratio === 0) return '0 ×';
  return ratio >= 1 ? `${ratio.toFixed(2)} ×` : `1/${(1 / ratio).toFixed(2)} ×`;
}

function intervalOf({ interval, ratio }: FigureComparison): string {
  if (ratio === undefined) return '';
  return interval ? `${interval[0].toFixed(2)}–${interval[1].toFixed(2)}` : 'exact';
}

export function countVerdicts(comparison: BenchComparison): string {
  const order = ['faster', 'slower', 'same', 'not comparable'] as const;
  return order
    .map(
      (verdict) => `${comparison.figures.filter((figure) => figure.verdict === verdict).length} ${verdict}`,
    )
    .join(', ');
}

/** Which two there are: base, then head. */
export function sides(comparison: Comparison): string[] {
  if (comparison.kind === 'bench') {
    return [comparison.base, comparison.head].map(
      ({ environment: e }, i) =>
        `${i === 0 ? 'base' : 'head'}: Linux ${e.kernel} (${e.fingerprint.kind}), ${e.kind}, ${e.cpu}${e.engine ? `, ${e.engine}` : ''}`,
    );
  }
  return [comparison.base, comparison.head].map(
    ({ machine: m }, i) =>
      `${i === 0 ? 'base' : 'head'}: Linux ${m.kernel} (${m.fingerprint.kind}), ${m.kind}, ${m.cpu}`,
  );
}

/** Breaks at spaces so that no line is longer than 72 columns; further lines are indented. */
function wrap(text: string, indent = ''): string[] {
  const lines: string[] = [];
  let line = '';
  for (const word of text.split(' ')) {
    const candidate = line === '' ? (lines.length === 0 ? word : indent + word) : `${line} ${word}`;
    if (candidate.length > WIDTH && line !== '') {
      lines.push(line);
      line = indent + word;
    } else line = candidate;
  }
  return [...lines, line];
}

export function renderCompareText(comparison: Comparison): string {
  const lines = [...sides(comparison).flatMap((side) => wrap(side, '      ')), ''];
  lines.push(...(comparison.kind === 'bench' ? benchText(comparison) : testText(comparison)));
  if (comparison.warnings.length > 0) lines.push('');
  for (const warning of comparison.warnings) lines.push(...wrap(`note: ${warning}`, '      '));
  return `${lines.join('\n')}\n`;
}

/** The id gets a line of its own where it is too long for the table's column. */
function benchText(comparison: BenchComparison): string[] {
  const ID = 36;
  const row = (id: string, base: string, head: string, ratio: string): string[] => {
    const numbers = `${base.padStart(11)} ${head.padStart(11)} ${ratio.padStart(11)}`;
    return id.length <= ID
      ? [(id.padEnd(ID) + numbers).trimEnd()]
      : [id, (' '.repeat(ID) + numbers).trimEnd()];
  };
  const lines = row('p50', 'base', 'head', 'head/base');
  for (const figure of comparison.figures) {
    if (figure.ratio === undefined || !figure.base || !figure.head) continue;
    const mark = figure.verdict === 'faster' ? '-' : figure.verdict === 'slower' ? '+' : ' ';
    const value = (which: 'base' | 'head'): string => formatValue(figure[which]!.p50, figure[which]!.unit);
    lines.push(...row(figure.id, value('base'), value('head'), `${figure.ratio.toFixed(3)} ${mark}`));
  }
  lines.push('', ...wrap(`${countVerdicts(comparison)} (- faster, + slower)`));
  for (const [reason, ids] of notComparable(comparison)) {
    lines.push(
      ...wrap(`not comparable: ${ids.length} (${ids[0]}${ids.length > 1 ? ', …' : ''}): ${reason}`, '  '),
    );
  }
  return lines;
}

function notComparable(comparison: BenchComparison): Map<string, string[]> {
  const reasons = new Map<string, string[]>();
  for (const { id, verdict, reason = '' } of comparison.figures) {
    if (verdict === 'not comparable') reasons.set(reason, [...(reasons.get(reason) ?? []), id]);
  }
  return reasons;
}

function testText(comparison: TestComparison): string[] {
  const lines: string[] = [];
  for (const { id, change, base, head, detail } of comparison.changes) {
    lines.push(`${change}: ${id}`);
    if (base !== head) lines.push(`    ${base ?? 'none'} -> ${head ?? 'none'}`);
    if (detail !== undefined) lines.push(...wrap(`    ${detail}`, '    '));
  }
  lines.push(...wrap(`${comparison.changes.length} changed, ${comparison.unchanged} unchanged`));
  return lines;
}

const cell = (text: string): string => text.replaceAll('|', '\\|').replaceAll('\n', ' ');

export function renderCompareMarkdown(comparison: Comparison): string {
  const lines = [...sides(comparison).map((side) => `* ${side}`), ''];
  if (comparison.kind === 'bench') {
    lines.push(
      '| figure | unit | base | head | head ÷ base | interval | verdict |',
      '|---|---|--:|--:|--:|---|---|',
    );
    for (const figure of comparison.figures) {
      const { id, base, head, ratio, verdict, reason } = figure;
      const value = (of: typeof base): string => (of ? formatValue(of.p50, of.unit) : '');
      lines.push(
        `| \`${cell(id)}\` | ${(head ?? base)!.unit} | ${value(base)} | ${value(head)} | ${ratio === undefined ? '' : ratio.toFixed(3)} | ${intervalOf(figure)} | ${verdict}${reason === undefined ? '' : `: ${cell(reason)}`} |`,
      );
    }
    lines.push('', `${countVerdicts(comparison)}. Values are medians (p50); less is better.`);
  } else {
    lines.push('| test | change | base | head | |', '|---|---|---|---|---|');
    for (const { id, change, base, head, detail } of comparison.changes) {
      lines.push(`| \`${cell(id)}\` | ${change} | ${base ?? ''} | ${head ?? ''} | ${cell(detail ?? '')} |`);
    }
    lines.push('', `${comparison.changes.length} changed, ${comparison.unchanged} unchanged.`);
  }
  if (comparison.warnings.length > 0)
    lines.push('', ...comparison.warnings.map((warning) => `* note: ${warning}`));
  return `${lines.join('\n')}\n`;
}

/** The terminal's table: one line a figure. */
export function renderCompareTable(comparison: Comparison): string {
  if (comparison.kind === 'test') return renderCompareText(comparison);
  const rows = [
    ['figure', 'base', 'head', 'head ÷ base', 'interval', 'verdict'],
    ...comparison.figures.map((figure) => [
      figure.id,
      figure.base ? formatValue(figure.base.p50, figure.base.unit) : '',
      figure.head ? formatValue(figure.head.p50, figure.head.unit) : '',
      figure.ratio === undefined ? '' : describeRatio(figure.ratio),
      intervalOf(figure),
      `${figure.verdict}${figure.reason === undefined ? '' : `: ${figure.reason}`}`,
    ]),
  ];
  const widths = rows[0]!.map((_, i) => Math.max(...rows.map((row) => row[i]!.length)));
  const lines = rows.map((row) =>
    row
      .map((text, i) =>
        i >= 1 && i <= 3 ? text.padStart(widths[i]!) : text.padEnd(i === 5 ? 0 : widths[i]!),
      )
      .join('  ')
      .trimEnd(),
  );
  const notes = comparison.warnings.map((warning) => `note: ${warning}`);
  return `${[...sides(comparison), '', ...lines, '', countVerdicts(comparison), ...notes].join('\n')}\n`;
}
