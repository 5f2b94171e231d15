#!/usr/bin/env node
// SPDX-License-Identifier: Apache-2.0
import { type Command, HELP, STATUS, UsageError } from './options.ts';

/** Each with the modules that only it needs. */
const COMMANDS: Record<string, () => Promise<Command>> = {
  probe: async () => (await import('./probe.ts')).probeCommand,
  test: async () => (await import('./test.ts')).testCommand,
  kselftest: async () => (await import('./kselftest.ts')).kselftestCommand,
  merge: async () => (await import('./merge.ts')).mergeCommand,
  kernel: async () => (await import('./kernel.ts')).kernelCommand,
  lab: async () => (await import('./lab.ts')).labCommand,
  run: async () => (await import('./run.ts')).runCommand,
  bench: async () => (await import('./bench.ts')).benchCommand,
  compare: async () => (await import('./compare.ts')).compareCommand,
};

/** Shell convention for a process ended by a signal: 128 and the signal's number. */
const SIGNALS = { SIGINT: 130, SIGTERM: 143, SIGHUP: 129 } as const;

async function main(argv: string[]): Promise<number> {
  const [name, ...args] = argv;
  if (name === '--version' || name === 'version') {
    const { packageVersion } = await import('../selftest/index.ts');
    process.stdout.write(`${packageVersion()}\n`);
    return STATUS.ok;
  }
  if (
    name === undefined ||
    name === 'help' ||
    name === '--help' ||
    name === '-h' ||
    args.slice(0, args.indexOf('--') >>> 0).includes('--help')
  ) {
    (name === undefined ? process.stderr : process.stdout).write(HELP);
    return name === undefined ? STATUS.usage : STATUS.ok;
  }
  const command = Object.hasOwn(COMMANDS, name) ? COMMANDS[name] : undefined;
  if (!command)
    throw new UsageError(`there is no command "${name}"; there are ${Object.keys(COMMANDS).join(', ')}`);

  const stop = new AbortController();
  let ended: number | undefined;
  for (const [signal, status] of Object.entries(SIGNALS)) {
    process.on(signal, () => {
      ended ??= status;
      stop.abort(new Error(`stopped by ${signal}`));
    });
  }
  try {
    const status = await (await command())(args, stop.signal);
    return ended ?? status;
  } catch (error) {
    if (ended === undefined) throw error;
    process.stderr.write('nvmx: stopped; nothing was left running\n');
    return ended;
  }
}

async function explain(error: unknown): Promise<{ status: number; text: string }> {
  if (error instanceof UsageError) return { status: STATUS.usage, text: `${error.message} (nvmx --help)` };
  const code = (error as NodeJS.ErrnoException | undefined)?.code;
  if (code === 'ERR_NVMX_ADDON') return { status: STATUS.machine, text: (error as Error).message };
  if (code === 'ENOSPC') {
    return { status: STATUS.machine, text: `${(error as Error).message}: the disk is full; free some space` };
  }
  const [{ BenchError }, { LabError }, { SeriesError }, { MachineError }] = await Promise.all([
    import('../bench/index.ts'),
    import('../lab/index.ts'),
    import('../probe/index.ts'),
    import('../selftest/index.ts'),
  ]);
  if (error instanceof SeriesError) return { status: STATUS.usage, text: error.message };
  if (error instanceof MachineError || error instanceof LabError || error instanceof BenchError) {
    return { status: STATUS.machine, text: error.message };
  }
  // Anything else is a defect of ours: only then is a stack trace what the reader needs.
  return {
    status: STATUS.failed,
    text: error instanceof Error ? (error.stack ?? error.message) : String(error),
  };
}

// A reader that went away (nvmx test | head) is no error.
process.stdout.on('error', (error: NodeJS.ErrnoException) => process.exit(error.code === 'EPIPE' ? 0 : 1));

let status: number;
try {
  status = await main(process.argv.slice(2));
} catch (error) {
  const explained = await explain(error);
  process.stderr.write(`nvmx: ${explained.text}\n`);
  status = explained.status;
}
// Not process.exit at once: what was written to a pipe must be out first.
process.exitCode = status;
process.stdout.write('', () => process.exit(status));
