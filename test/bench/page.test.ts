// SPDX-License-Identifier: Apache-2.0
import { execFile } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { beforeAll, describe, expect, test } from 'vitest';
import { compareReports, renderCompareHtml } from '../../lib/report/index.ts';
import { figure, report } from './fixtures.ts';

const browser = ['/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome'].find(existsSync);
const folder = new URL('../../out/pages/', import.meta.url).pathname;
const run = promisify(execFile);

/** A result with a tail, several slots and VMCSs, as a real one has. */
function side(kernel: string, scale: number) {
  const spread = (base: number) =>
    Array.from({ length: 400 }, (_, i) =>
      Math.round(base * (1 + ((i * 37) % 100) / 400 + (i % 97 === 0 ? 3 : 0))),
    );
  return report(kernel, [
    figure('round-trip/anonymous/vapic', spread(15_000)),
    figure('round-trip/unmanaged/vapic', spread(34_000 * scale)),
    ...[1, 8, 9, 16].map((vmcs) =>
      figure(`switch/unmanaged/vmcs=${vmcs}`, spread(40_000 * scale + vmcs * 500), { parameters: { vmcs } }),
    ),
    ...[32, 512, 8192].map((slots) =>
      figure(`memslot/map/nested/anonymous/slots=${slots}`, [slots * 900 + 2_000_000], {
        parameters: { slots },
      }),
    ),
    figure('invalidate/madvise/anonymous/vmcs=32', spread(6000 / scale ** 0.3)),
    figure('ratio/round-trip/vapic', [2.27 * scale], { unit: 'ratio' }),
    { ...figure('exit/l1-cpuid', [1000]), interval: [980, 1030] as const },
  ]);
}

describe.skipIf(!browser)('the page of nvmx compare in a real browser (package chromium)', () => {
  const page = join(folder, 'compare.html');
  const chromium = (...args: string[]) =>
    run(
      browser!,
      ['--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars', ...args, `file://${page}`],
      {
        timeout: 90_000,
        maxBuffer: 2 ** 26,
      },
    );

  beforeAll(() => {
    mkdirSync(folder, { recursive: true });
    writeFileSync(page, renderCompareHtml(compareReports(side('6.1', 1), side('6.1-patched', 0.46))));
  });

  test('is understood as it is meant: charts, table, both machines', { timeout: 120_000 }, async () => {
    const { stdout: dom } = await chromium('--dump-dom');
    expect(dom.match(/<svg /g)).toHaveLength(10);
    expect(dom.match(/<path class="(base|head)"/g)).toHaveLength(18);
    expect(dom).toMatch(
      /<h1>nvmx compare<\/h1>\s*<p class="key">.*base: Linux 6.1 .*<p class="key">.*head: Linux 6.1-patched \(stock\)/,
    );
    expect(dom).toMatch(
      /unmanaged ÷ anonymous memory, round-trip\/vapic: base <b>2.27<\/b>, head <b>1.04<\/b>/,
    );
    expect(dom).not.toContain('<parsererror');
    expect(dom).not.toMatch(/NaN|undefined|Infinity/);
  });

  test('gives a picture', { timeout: 120_000 }, async () => {
    const picture = join(folder, 'compare.png');
    await chromium(`--screenshot=${picture}`, '--window-size=1080,3200');
    const png = readFileSync(picture);
    expect([...png.subarray(1, 4)]).toEqual([...Buffer.from('PNG')]);
    expect([png.readUInt32BE(16), png.readUInt32BE(20)]).toEqual([1080, 3200]);
    // A blank page compresses to a fraction of this.
    expect(png.length).toBeGreaterThan(60_000);
  });
});

test('a browser to look at the page with', ({ skip }) => {
  if (!browser) skip('no chromium, chromium-browser or google-chrome (apt-get install chromium)');
});
