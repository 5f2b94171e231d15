// SPDX-License-Identifier: Apache-2.0
import { closeSync, openSync, writeSync } from 'node:fs';
import { DEFAULT_PATTERNS, runBench, selectFigures, UNMANAGED_PATTERNS } from '../bench/index.ts';
import { renderBench } from '../report/index.ts';
import { labOnly, machineChoice, parse, progress, STATUS, UsageError, wholeNumber } from './options.ts';

export async function benchCommand(args: string[], signal: AbortSignal): Promise<number> {
  const { values, positionals } = parse(args, {
    machine: { type: 'string' },
    kernel: { type: 'string' },
    append: { type: 'string' },
    unmanaged: { type: 'boolean', default: false },
    output: { type: 'string' },
    json: { type: 'boolean', default: false },
    list: { type: 'boolean', default: false },
    quick: { type: 'boolean', default: false },
    full: { type: 'boolean', default: false },
    passes: { type: 'string' },
    once: { type: 'boolean', default: false },
    console: { type: 'boolean', default: false },
  });
  const machine = machineChoice(values.machine);
  labOnly(machine, { kernel: values.kernel, append: values.append });
  if (values.quick && values.full) throw new UsageError('--quick and --full exclude each other');
  const passes = values.passes === undefined ? undefined : wholeNumber('passes', values.passes, 1, 1000);
  const patterns =
    positionals.length > 0
      ? positionals
      : values.list
        ? ['*']
        : [...DEFAULT_PATTERNS, ...(values.unmanaged ? UNMANAGED_PATTERNS : [])];
  const figures = selectFigures(patterns);
  if (figures.length === 0) {
    throw new UsageError(
      `no figure matches ${positionals.map((p) => `"${p}"`).join(' ')}; --list prints their ids`,
    );
  }
  if (values.list) {
    for (const { id, title } of figures) process.stdout.write(`${id}\t${title}\n`);
    return STATUS.ok;
  }
  // Opened before the run: a report that cannot be written should not cost a run first.
  const output = values.output === undefined ? undefined : openOutput(values.output);
  const status = progress();
  try {
    const report = await runBench(
      {
        machine,
        ids: figures.map(({ id }) => id),
        quick: values.quick,
        full: values.full,
        once: values.once,
        unmanaged: values.unmanaged,
        signal,
        ...(passes === undefined ? {} : { passes }),
        lab: {
          ...(values.kernel === undefined ? {} : { kernel: values.kernel }),
          ...(values.append === undefined ? {} : { append: values.append }),
          onProgress: status.show,
          ...(values.console ? { onConsole: (text: string) => process.stderr.write(text) } : {}),
        },
      },
      (event) => {
        if (event.event === 'start') status.show(`${event.id} (pass ${event.pass} of ${event.passes})`);
      },
    );
    status.clear();
    const json = `${JSON.stringify(report)}\n`;
    if (output !== undefined) writeSync(output, json);
    process.stdout.write(values.json ? json : renderBench(report));
    if (report.secondRun && report.secondRun.differing.length > 0) return STATUS.failed;
    if (report.missing.some(({ reason }) => reason.startsWith('failed: '))) return STATUS.failed;
    return report.figures.length === 0 ? STATUS.nothingRan : STATUS.ok;
  } finally {
    if (output !== undefined) closeSync(output);
  }
}

function openOutput(path: string): number {
  try {
    return openSync(path, 'w');
  } catch (error) {
    throw new UsageError(`--output ${path} cannot be written: ${(error as Error).message}`);
  }
}
