// SPDX-License-Identifier: Apache-2.0
// Charts as inline SVG: no script, no external font, colours from the page's style sheet.

import { describeRatio } from './compare_text.ts';

export function escapeXml(text: string): string {
  return text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
}

const number = (value: number): string => String(Math.round(value * 100) / 100);

/** Positions on a logarithmic axis, and round ticks for it. */
export function logScale(low: number, high: number, from: number, to: number) {
  const [a, b] = [Math.log(low), Math.log(high)];
  const span = b - a || 1;
  const at = (value: number): number =>
    from + ((Math.log(Math.min(high, Math.max(low, value))) - a) / span) * (to - from);
  const ticks: number[] = [];
  const steps = high / low > 30 ? [1] : [1, 2, 5];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    for (const step of steps) {
      const tick = step * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  }
  return { at, ticks: ticks.length > 1 ? ticks : evenTicks(low, high) };
}

/** For a range so narrow that hardly a round power of ten is in it. */
function evenTicks(low: number, high: number): number[] {
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough)!;
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => (first + i) * step);
}

export interface Bar {
  readonly label: string;
  readonly ratio: number;
  readonly interval?: readonly [number, number] | undefined;
  readonly kind: 'faster' | 'slower' | 'same';
}

/** Horizontal bars from 1: to the left faster, to the right slower. */
export function ratioBars(bars: readonly Bar[]): string {
  const [left, width, row, top] = [360, 960, 22, 24];
  const ends = bars.flatMap(({ ratio, interval }) => [ratio, ...(interval ?? [])]);
  // Nothing at all in head is a ratio of 0: its bar goes to the edge.
  const reach = Math.max(1.25, ...ends.filter((end) => end > 0).map((end) => Math.max(end, 1 / end))) * 1.05;
  const { at: place, ticks } = logScale(1 / reach, reach, left, width - 90);
  const at = (ratio: number): number => place(Math.max(ratio, 1 / reach));
  const height = top + bars.length * row + 8;
  const parts = [...new Set([...ticks, 1])].map((tick) => {
    const x = number(at(tick));
    const text = tick < 1 ? `1/${number(1 / tick)}` : number(tick);
    return `<line class="${tick === 1 ? 'one' : 'grid'}" x1="${x}" x2="${x}" y1="${top - 6}" y2="${height - 8}"/><text class="tick" x="${x}" y="12" text-anchor="middle">${text}×</text>`;
  });
  for (const [i, { label, ratio, interval, kind }] of bars.entries()) {
    const y = top + i * row;
    const [a, b] = [at(1), at(ratio)];
    parts.push(
      `<text x="${left - 10}" y="${y + 12}" text-anchor="end">${escapeXml(label)}</text>`,
      `<rect class="${kind}" x="${number(Math.min(a, b))}" y="${y + 2}" width="${number(Math.max(1.5, Math.abs(b - a)))}" height="13"><title>${escapeXml(label)}: ${describeRatio(ratio)}</title></rect>`,
      `<text class="value" x="${width - 84}" y="${y + 12}">${describeRatio(ratio)}</text>`,
    );
    if (interval) {
      parts.push(
        `<line class="interval" x1="${number(at(interval[0]))}" x2="${number(at(interval[1]))}" y1="${y + 8.5}" y2="${y + 8.5}"/>`,
      );
    }
  }
  return svg(width, height, 'head divided by base, logarithmic: left of 1 is faster', parts);
}

export interface Line {
  readonly label: string;
  readonly side: 'base' | 'head';
  readonly points: readonly (readonly [x: number, y: number])[];
}

export interface ChartOptions {
  readonly title: string;
  readonly xTitle: string;
  readonly yTitle: string;
  readonly yLog: boolean;
  readonly steps?: boolean;
  /** Points farther right are drawn at the edge. */
  readonly xMax?: number;
}

/** Lines of both sides over a logarithmic x axis. */
export function lineChart(lines: readonly Line[], options: ChartOptions): string {
  const [width, height, left, right, top, bottom] = [470, 280, 74, 12, 28, 44];
  const points = lines.flatMap((line) => line.points);
  const xs = points.map(([x]) => Math.max(x, 0.5));
  const ys = points.map(([, y]) => y);
  const x = logScale(Math.min(...xs) * 0.95, (options.xMax ?? Math.max(...xs)) * 1.05, left, width - right);
  const yTop = Math.max(...ys) * 1.1;
  const y = options.yLog
    ? logScale(Math.min(...ys) * 0.9, yTop, height - bottom, top)
    : { at: (v: number) => height - bottom - v * (height - bottom - top), ticks: [0, 0.25, 0.5, 0.75, 1] };
  const parts = [`<text class="title" x="${left}" y="16">${escapeXml(options.title)}</text>`];
  for (const tick of thin(x.ticks)) {
    const at = number(x.at(tick));
    parts.push(
      `<line class="grid" x1="${at}" x2="${at}" y1="${top}" y2="${height - bottom}"/><text class="tick" x="${at}" y="${height - bottom + 15}" text-anchor="middle">${short(tick)}</text>`,
    );
  }
  for (const tick of thin(y.ticks)) {
    const at = number(y.at(tick));
    parts.push(
      `<line class="grid" x1="${left}" x2="${width - right}" y1="${at}" y2="${at}"/><text class="tick" x="${left - 6}" y="${Number(at) + 4}" text-anchor="end">${short(tick)}</text>`,
    );
  }
  for (const line of lines) {
    const path = pathOf(line.points, x.at, y.at, options.steps ?? false);
    parts.push(`<path class="${line.side}" d="${path}"><title>${escapeXml(line.label)}</title></path>`);
    if (!options.steps)
      for (const [px, py] of line.points)
        parts.push(`<circle class="${line.side}" cx="${number(x.at(px))}" cy="${number(y.at(py))}" r="3"/>`);
  }
  parts.push(
    `<text class="axis" x="${(left + width - right) / 2}" y="${height - 8}" text-anchor="middle">${escapeXml(options.xTitle)}</text>`,
    `<text class="axis" transform="translate(14 ${(top + height - bottom) / 2}) rotate(-90)" text-anchor="middle">${escapeXml(options.yTitle)}</text>`,
  );
  return svg(width, height, options.title, parts);
}

function pathOf(
  points: Line['points'],
  x: (value: number) => number,
  y: (value: number) => number,
  steps: boolean,
): string {
  let path = '';
  let last = 0;
  for (const [px, py] of points) {
    const [ax, ay] = [number(x(Math.max(px, 0.5))), y(py)];
    path += path === '' ? `M${ax} ${number(steps ? y(0) : ay)}` : `L${ax} ${number(steps ? last : ay)}`;
    if (steps) path += `L${ax} ${number(ay)}`;
    last = ay;
  }
  return path;
}

/** At most six labels fit. */
function thin(ticks: readonly number[]): number[] {
  const every = Math.ceil(ticks.length / 6);
  return ticks.filter((_, i) => i % every === 0);
}

function short(value: number): string {
  if (value >= 1e9) return `${number(value / 1e9)}G`;
  if (value >= 1e6) return `${number(value / 1e6)}M`;
  if (value >= 1e3) return `${number(value / 1e3)}k`;
  return number(value);
}

function svg(width: number, height: number, label: string, parts: readonly string[]): string {
  return `<svg viewBox="0 0 ${width} ${height}" width="${width}" role="img" aria-label="${escapeXml(label)}">${parts.join('')}</svg>`;
}
