// SPDX-License-Identifier: Apache-2.0
import { readFileSync, writeFileSync } from 'node:fs';
import {
  CompareError,
  compareReports,
  parseResult,
  renderCompareHtml,
  renderCompareMarkdown,
  renderCompareTable,
  renderCompareText,
  slowerThan,
} from '../report/index.ts';
import { parse, STATUS, UsageError } from './options.ts';

export async function compareCommand(args: string[]): Promise<number> {
  const { values, positionals } = parse(args, {
    'fail-slower': { type: 'string' },
    html: { type: 'string' },
    markdown: { type: 'boolean', default: false },
    text: { type: 'boolean', default: false },
  });
  const [basePath, headPath, ...more] = positionals;
  if (basePath === undefined || headPath === undefined || more.length > 0) {
    throw new UsageError('compare takes two result files: BASE.json HEAD.json');
  }
  if (values.markdown && values.text) throw new UsageError('--markdown and --text: choose one');
  const limit = values['fail-slower'] === undefined ? undefined : percent(values['fail-slower']);
  try {
    const comparison = compareReports(read(basePath), read(headPath));
    if (values.html !== undefined) writePage(values.html, renderCompareHtml(comparison));
    const render = values.markdown
      ? renderCompareMarkdown
      : values.text
        ? renderCompareText
        : renderCompareTable;
    process.stdout.write(render(comparison));
    if (comparison.kind === 'test') {
      return comparison.changes.some(({ change }) => change === 'newly failing') ? STATUS.failed : STATUS.ok;
    }
    if (limit === undefined) return STATUS.ok;
    const slower = slowerThan(comparison, limit);
    for (const { id, ratio } of slower) {
      process.stderr.write(
        `nvmx: ${id} is slower by ${((ratio! - 1) * 100).toFixed(1)} % (limit ${limit} %)\n`,
      );
    }
    return slower.length > 0 ? STATUS.failed : STATUS.ok;
  } catch (error) {
    if (error instanceof CompareError) throw new UsageError(error.message);
    throw error;
  }
}

function percent(value: string): number {
  const number = /^\d+(\.\d+)?$/.test(value) ? Number(value) : Number.NaN;
  if (!Number.isFinite(number)) {
    throw new UsageError(`--fail-slower is "${value}"; it takes a percentage such as 5 or 2.5`);
  }
  return number;
}

function read(path: string): ReturnType<typeof parseResult> {
  try {
    return parseResult(path, readFileSync(path, 'utf8'));
  } catch (error) {
    if (error instanceof CompareError) throw error;
    throw new UsageError(`${path} cannot be read: ${(error as Error).message}`);
  }
}

function writePage(path: string, page: string): void {
  try {
    writeFileSync(path, page);
  } catch (error) {
    throw new UsageError(`--html ${path} cannot be written: ${(error as Error).message}`);
  }
}
