// SPDX-License-Identifier: Apache-2.0

const REPORT =
  /^.*(?:\bBUG: |\bOops: |general protection fault|kernel BUG at |double fault: |unable to handle ).*$/m;
const PANIC = /^.*Kernel panic - not syncing.*$/m;

const EXCERPT_LINES = 60;

/** @returns the first line of a report that the kernel makes of a defect of its own */
export function findDefect(console: string): string | undefined {
  return REPORT.exec(console)?.[0].trim();
}

/** What a console says about its machine's end: from the kernel's report on, else the last lines. */
export function consoleExcerpt(console: string): string {
  const text = console.replace(/\r/g, '').trimEnd();
  const starts = [REPORT, PANIC].flatMap((pattern) => pattern.exec(text)?.index ?? []);
  return starts.length > 0
    ? text
        .slice(Math.min(...starts))
        .split('\n')
        .slice(0, EXCERPT_LINES)
        .join('\n')
    : text.split('\n').slice(-EXCERPT_LINES).join('\n');
}
