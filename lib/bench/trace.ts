// SPDX-License-Identifier: Apache-2.0
// Counts calls of kernel functions with kprobes through tracefs (CONFIG_KPROBE_EVENTS, root).
import { appendFileSync, existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

const FOLDERS = ['/sys/kernel/tracing', '/sys/kernel/debug/tracing'];
const GROUP = 'nvmx';

function folder(): string | undefined {
  return FOLDERS.find((path) => existsSync(join(path, 'trace')));
}

/** Why calls cannot be counted on this machine, or nothing. */
export function tracingProblem(functions: readonly string[]): string | undefined {
  const tracing = folder();
  if (!tracing) return 'tracefs is not mounted, not readable (root), or not in this kernel (CONFIG_FTRACE)';
  if (!existsSync(join(tracing, 'kprobe_events')))
    return 'this kernel has no kprobe events (CONFIG_KPROBE_EVENTS)';
  const symbols = readFileSync('/proc/kallsyms', 'utf8');
  const absent = functions.filter((name) => !symbols.includes(` ${name}\n`));
  return absent.length === 0 ? undefined : `this kernel has no function ${absent.join(', ')}`;
}

/** Calls of each function while `action` runs, by anybody on this machine. */
export async function countCalls(
  functions: readonly string[],
  action: () => Promise<void>,
): Promise<Map<string, number>> {
  const tracing = folder()!;
  const events = join(tracing, 'kprobe_events');
  const enable = join(tracing, 'events', GROUP, 'enable');
  for (const name of functions) appendFileSync(events, `p:${GROUP}/${name} ${name}\n`);
  try {
    writeFileSync(enable, '1');
    await action();
    writeFileSync(enable, '0');
    const profile = readFileSync(join(tracing, 'kprobe_profile'), 'utf8');
    return new Map(
      functions.map((name) => [
        name,
        Number(new RegExp(`^\\s*${name}\\s+(\\d+)`, 'm').exec(profile)?.[1] ?? 0),
      ]),
    );
  } finally {
    if (existsSync(enable)) writeFileSync(enable, '0');
    for (const name of functions) appendFileSync(events, `-:${GROUP}/${name}\n`);
  }
}
