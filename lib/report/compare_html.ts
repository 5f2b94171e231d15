// SPDX-License-Identifier: Apache-2.0
// One self-contained page: no script, nothing loaded from anywhere.
import type { Histogram } from '../bench/index.ts';
import { formatValue } from './bench.ts';
import type { BenchComparison, Comparison, FigureComparison, TestComparison } from './compare.ts';
import { countVerdicts, sides } from './compare_text.ts';
import { type Bar, escapeXml, type Line, lineChart, ratioBars } from './svg.ts';

const STYLE = `
:root{color-scheme:light dark;--fg:#1c2024;--bg:#fff;--dim:#667;--grid:#e3e6ea;--base:#6b7280;--head:#1d6fd1;--faster:#1a8a4a;--slower:#c8372d;--same:#9aa3af}
@media(prefers-color-scheme:dark){:root{--fg:#e6e8eb;--bg:#15181c;--dim:#9aa3af;--grid:#2b3036;--base:#9aa3af;--head:#63a7f5;--faster:#4cc38a;--slower:#f0716a;--same:#6b7280}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg);max-width:1000px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0 0 .3rem}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}p{margin:.3rem 0}.dim{color:var(--dim)}
table{border-collapse:collapse;font-size:13px;width:100%}th,td{text-align:left;padding:3px 8px;border-bottom:1px solid var(--grid);vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}td:first-child{overflow-wrap:anywhere}
.v-faster,.v-newly-passing{color:var(--faster)}.v-slower,.v-newly-failing{color:var(--slower)}.v-not{color:var(--dim)}
svg{max-width:100%;height:auto;font:12px system-ui,sans-serif}svg text{fill:var(--fg)}svg .tick,svg .axis{fill:var(--dim);font-size:11px}svg .title{font-weight:600}
svg .grid{stroke:var(--grid)}svg .one{stroke:var(--fg)}svg .interval{stroke:var(--fg);stroke-width:2}
svg rect.faster{fill:var(--faster)}svg rect.slower{fill:var(--slower)}svg rect.same{fill:var(--same)}
svg path{fill:none;stroke-width:2}svg path.base{stroke:var(--base)}svg path.head{stroke:var(--head)}svg circle.base{fill:var(--base)}svg circle.head{fill:var(--head)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(440px,1fr));gap:12px}
.key span{display:inline-block;width:22px;border-top:3px solid;vertical-align:middle;margin-right:5px}.key .b{border-color:var(--base)}.key .h{border-color:var(--head)}.key .b~.h{margin-left:18px}
`;

export function renderCompareHtml(comparison: Comparison): string {
  const body = comparison.kind === 'bench' ? benchBody(comparison) : testBody(comparison);
  return `<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>nvmx compare</title><style>${STYLE}</style></head>
<body><h1>nvmx compare</h1>
${sides(comparison)
  .map((side, i) => `<p class="key"><span class="${i === 0 ? 'b' : 'h'}"></span>${escapeXml(side)}</p>`)
  .join('')}
${body}
</body></html>
`;
}

function benchBody(comparison: BenchComparison): string {
  const compared = comparison.figures.filter((figure) => figure.ratio !== undefined);
  const sections = [
    `<p>${countVerdicts(comparison)}</p>`,
    headline(comparison),
    comparison.warnings.length === 0
      ? ''
      : `<ul class="dim">${comparison.warnings.map((warning) => `<li>${escapeXml(warning)}</li>`).join('')}</ul>`,
  ];
  if (compared.length > 0) {
    const bars = compared.map(
      (figure): Bar => ({
        label: figure.id,
        ratio: figure.ratio!,
        interval: figure.interval,
        kind: figure.verdict as Bar['kind'],
      }),
    );
    sections.push(
      '<h2>head ÷ base</h2><p class="dim">medians on a logarithmic axis; left of 1 is faster</p>',
      ratioBars(bars),
    );
  }
  const key = '<p class="key"><span class="b"></span>base <span class="h"></span>head</p>';
  const distributions = compared.map(latencyChart).filter((chart) => chart !== '');
  if (distributions.length > 0) {
    sections.push('<h2>Latency, cumulative</h2>', key, `<div class="charts">${distributions.join('')}</div>`);
  }
  const scaling = scalingCharts(comparison);
  if (scaling.length > 0)
    sections.push('<h2>Scaling</h2>', key, `<div class="charts">${scaling.join('')}</div>`);
  sections.push(
    '<h2>Figures</h2>',
    figureTable(comparison.figures),
    '<h2>Machines</h2>',
    environmentTable(comparison),
  );
  return sections.join('\n');
}

/** What unmanaged memory costs on each side, by the round trip that needs the most pages. */
function headline({ figures }: BenchComparison): string {
  const found = figures.filter(({ id, ratio }) => id.startsWith('ratio/round-trip/') && ratio !== undefined);
  if (found.length === 0) return '';
  const [most] = found.sort(
    (a, b) => Math.max(b.base!.p50, b.head!.p50) - Math.max(a.base!.p50, a.head!.p50),
  );
  const value = (side: 'base' | 'head'): string => `<b>${most![side]!.p50.toFixed(2)}</b>`;
  return `<p>unmanaged ÷ anonymous memory, ${escapeXml(most!.id.replace('ratio/', ''))}: base ${value('base')}, head ${value('head')}</p>`;
}

/** Share of samples at or below a time; worth drawing only where there are many. */
function latencyChart({ base, head }: FigureComparison): string {
  if (!base || !head || base.count < 100 || head.count < 100) return '';
  const curve = (histogram: Histogram, count: number): [number, number][] => {
    let seen = 0;
    return histogram.map(([from, samples]) => {
      seen += samples;
      return [from, seen / count];
    });
  };
  const lines: Line[] = [
    { label: `base ${base.id}`, side: 'base', points: curve(base.histogram, base.count) },
    { label: `head ${head.id}`, side: 'head', points: curve(head.histogram, head.count) },
  ];
  return lineChart(lines, {
    title: base.id,
    xTitle: base.unit,
    yTitle: 'share of samples',
    yLog: false,
    steps: true,
    // Beyond it a few samples with a timer interrupt or worse would squeeze all the others into a line
    xMax: Math.max(base.p99, head.p99),
  });
}

/** Figures that differ only in `slots=` or `vmcs=` are one line. */
function scalingCharts(comparison: BenchComparison): string[] {
  const groups = new Map<string, { name: string; figures: FigureComparison[] }>();
  for (const figure of comparison.figures) {
    const found = /^(.*)\/(slots|vmcs)=/.exec(figure.id);
    if (!found || figure.ratio === undefined || figure.id.startsWith('ratio/')) continue;
    const group = groups.get(found[1]!) ?? { name: found[2]!, figures: [] };
    group.figures.push(figure);
    groups.set(found[1]!, group);
  }
  return [...groups]
    .filter(([, { figures }]) => figures.length > 1)
    .map(([title, { name, figures }]) => {
      const line = (side: 'base' | 'head'): Line => ({
        label: `${side} ${title}`,
        side,
        points: figures.map((figure) => [Number(figure[side]!.parameters[name]), figure[side]!.p50] as const),
      });
      const what = name === 'slots' ? 'memslots' : 'VMCSs';
      return lineChart([line('base'), line('head')], {
        title,
        xTitle: what,
        yTitle: 'cycles (p50)',
        yLog: true,
      });
    });
}

function figureTable(figures: readonly FigureComparison[]): string {
  const rows = figures.map(({ id, title, base, head, ratio, interval, verdict, reason }) => {
    const value = (of: typeof base): string => (of ? formatValue(of.p50, of.unit) : '');
    const style = verdict === 'not comparable' ? 'v-not' : `v-${verdict}`;
    const range =
      ratio === undefined ? '' : interval ? `${interval[0].toFixed(3)}–${interval[1].toFixed(3)}` : 'exact';
    return `<tr><td title="${escapeXml(title)}">${escapeXml(id)}</td><td>${(head ?? base)!.unit}</td><td class="n">${value(base)}</td><td class="n">${value(head)}</td><td class="n">${ratio === undefined ? '' : ratio.toFixed(3)}</td><td>${range}</td><td class="${style}">${verdict}${reason === undefined ? '' : `: ${escapeXml(reason)}`}</td></tr>`;
  });
  return `<table><thead><tr><th>figure (p50)</th><th>unit</th><th class="n">base</th><th class="n">head</th><th class="n">ratio</th><th>interval</th><th>verdict</th></tr></thead><tbody>${rows.join('')}</tbody></table>`;
}

function environmentTable({ base, head }: BenchComparison): string {
  const facts = (report: BenchComparison['base']): Record<string, string> => {
    const e = report.environment;
    return {
      kernel: `Linux ${e.kernel} (${e.fingerprint.kind})`,
      machine: `${e.kind}${e.engine ? `, ${e.engine}` : ''}`,
      CPU: `${e.cpu}${e.microcode ? `, microcode ${e.microcode}` : ''}`,
      'CPUs online': `${e.cpusOnline}${e.pinnedTo === undefined ? '' : `, pinned to ${e.pinnedTo}`}`,
      TSC: `${e.tscHz / 1e6} MHz`,
      'kernel arguments': e.commandLine,
      'unmanaged memory':
        'address' in e.unmanaged
          ? `${e.unmanaged.size / 2 ** 20} MiB from 0x${e.unmanaged.address.toString(16)}`
          : e.unmanaged.reason,
      'second run': report.secondRun
        ? report.secondRun.differing.length === 0
          ? 'identical in every number'
          : `${report.secondRun.differing.length} figures differ`
        : 'none',
      notes: report.notes.join('; '),
      nvmx: report.nvmx,
      ...e.parameters,
    };
  };
  const [one, two] = [facts(base), facts(head)];
  return sideBySide(one, two);
}

function sideBySide(one: Readonly<Record<string, string>>, two: Readonly<Record<string, string>>): string {
  const names = [...new Set([...Object.keys(one), ...Object.keys(two)])];
  const rows = names.map(
    (name) =>
      `<tr><td>${escapeXml(name)}</td><td>${escapeXml(one[name] ?? '')}</td><td${one[name] === two[name] ? '' : ' class="v-slower"'}>${escapeXml(two[name] ?? '')}</td></tr>`,
  );
  return `<table><thead><tr><th></th><th>base</th><th>head</th></tr></thead><tbody>${rows.join('')}</tbody></table>`;
}

function testBody({ base, head, changes, unchanged, warnings }: TestComparison): string {
  const rows = changes.map(
    ({ id, change, base: before, head: after, detail }) =>
      `<tr><td>${escapeXml(id)}</td><td class="v-${change.replace(' ', '-')}">${change}</td><td>${before ?? ''}</td><td>${after ?? ''}</td><td>${escapeXml(detail ?? '')}</td></tr>`,
  );
  const machine = ({ machine: m }: typeof base): Record<string, string> => ({
    kernel: `Linux ${m.kernel} (${m.fingerprint.kind})`,
    machine: m.kind,
    CPU: m.cpu,
    ...m.parameters,
  });
  return [
    `<p>${changes.length} changed, ${unchanged} unchanged</p>`,
    warnings.length === 0
      ? ''
      : `<ul class="dim">${warnings.map((w) => `<li>${escapeXml(w)}</li>`).join('')}</ul>`,
    `<table><thead><tr><th>test</th><th>change</th><th>base</th><th>head</th><th></th></tr></thead><tbody>${rows.join('')}</tbody></table>`,
    '<h2>Machines</h2>',
    sideBySide(machine(base), machine(head)),
  ].join('\n');
}
