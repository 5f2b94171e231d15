// SPDX-License-Identifier: Apache-2.0
import { type ParseArgsConfig, parseArgs } from 'node:util';
import type { LabOptions } from '../lab/index.ts';
import type { MachineChoice } from '../selftest/index.ts';

/** The longest limit that is taken. */
export const DAY_S = 86_400;

/** Exit statuses of every command. */
export const STATUS = { ok: 0, failed: 1, usage: 2, machine: 3, nothingRan: 4 } as const;

export const HELP = `nvmx: nested VMX on real KVM, from Node

usage
  nvmx probe [--machine host|lab] [--kernel K] [--append ARGS] [--json]
      what this machine is and what can run on it
  nvmx merge REPORT.json... [--reporter R] [--output FILE]
      one report of the parts of a sharded run
  nvmx kernel build --source DIR|debian:linux-source-VERSION [--patch FILE]... [--config FRAGMENT]...
                    [--name N] [--jobs N] [--btf] [--install]
      build a small kernel for the lab; --kernel N then boots it
  nvmx kernel list [--json] | nvmx kernel rm NAME...
  nvmx lab run [machine options] [--file FROM:TO]... [--fetch FROM:TO]... [--timeout S] -- COMMAND...
      run a program in the emulated machine; files are copied in before and out after it
  nvmx lab shell [machine options] [--file FROM:TO]...
      a shell there on this terminal
  nvmx test [PATTERN...] [options]
      run selftests; a PATTERN is an id, the first part of one, or a glob (l2-switch, 'apic-update/*/racing')
  nvmx kselftest FOLDER [PATTERN...] [options]
      run the kernel's own selftest programs: those of kselftest-list.txt, of .test files, or all in the folder;
      options as for test: machine, kernel, timeout, jobs, reports, --list, --fail-fast
  nvmx run FILE.(js|ts) [--machine auto|host|lab] [machine options] [--folder DIR] [--timeout S] [-- ARGS]
      run a script of yours where nested VMX is; in the lab it finds its folder (or DIR), and nvmx
  nvmx bench [PATTERN...] [options]
      measure round trips, switches, memslot changes; with --unmanaged also on memory the kernel does not manage
  nvmx compare BASE.json HEAD.json [--fail-slower PERCENT] [--html FILE] [--markdown | --text]
      two results of bench, or two of test; status 1 when a figure is slower by more than PERCENT, or a test
      fails that did not; --text is 72 columns wide

options of bench
  --machine, --kernel, --append, --console   as for test
  --unmanaged               boot the lab with mem= and kvm.allow_unsafe_mappings=1; on a host say what is missing
  --output FILE             write the result (JSON, nvmx-bench/1) to FILE
  --json                    print the result instead of the table
  --list                    print the ids and titles of everything that can be measured and stop
  --quick                   smaller sizes and fewer rounds
  --full                    lab: memslot churn with as much memory as on hardware
  --passes N                measure the whole list N times (default: lab 1, host 9, quick host 3)
  --once                    lab: do not measure in a second machine to prove that the figures repeat

options of test
  --machine auto|host|lab   where to run; auto: this host if it has nested VMX, else the emulated machine
  --kernel K                lab kernel: debian:VERSION, a bzImage with KVM built in, an unpacked kernel package,
                            or the name of a kernel that nvmx kernel build made
  --append "ARGS"           more kernel arguments for the lab machine
  --cpus N --memory MIB --engine-cpu MODEL
                            its processors (1 to 8, default 1), memory (512 to 3072, default 1024) and CPU model
  --cold                    boot it, though the cache may hold a snapshot of it just booted
  --reporter spec|ktap|json|junit|github
  --output FILE             write the report to FILE; the terminal then shows the spec view
  --evidence DIR            keep what each test saw, and the kernel's log, in a folder of its own
  --list                    print the ids and titles and stop
  --timeout S               limit of each test in seconds of the machine's own time
  --seed N                  base of every racing test's random numbers (0 to 4294967295)
  --expect auto|stock|patched
                            which answers are right; auto asks the kernel's fingerprint
  --set SUITE.NAME=VALUES   other parameters than the default ones: --set l2-switch.c=1..24
  --repeat N                run everything N times, racing tests with another seed each time
  --duration S              run everything again until S seconds have passed
  --jobs N                  share the tests among N lab machines at once (default: 2 from 40 tests on, else 1)
  --shard I/N               only the I-th of N parts of the tests; nvmx merge joins the reports
  --matrix PARAMETER=A,B    run everything for each combination of module parameters (may be given again):
                            --matrix kvm_intel.ept=0,1; boots, or on the host reloads the modules
  --fail-fast               stop at the first failure
  --disposable              this host may crash: run tests of hazard class host-crash on it
  --console                 show the lab machine's kernel console on standard error

exit status
  0 no failure   1 a failure, timeout or crash   2 usage   3 the machine could not be used
  4 nothing ran (every test was skipped)   128+N ended by signal N

environment
  NVMX_CACHE   folder for engine, kernels and consoles (default: XDG_CACHE_HOME/nvmx or ~/.cache/nvmx)
  NVMX_SERIES  JSON file with the names that tell a patched kernel (a changed copy of lib/probe/series.json)
  NVMX_BOCHS   emulator to use instead of the cached build
`;

/** The command line asks for something that does not exist. */
export class UsageError extends Error {
  override readonly name = 'UsageError';
}

/** parseArgs with its errors turned into usage errors. */
export function parse<T extends NonNullable<ParseArgsConfig['options']>>(
  args: string[],
  options: T,
): ReturnType<typeof parseArgs<{ args: string[]; options: T; allowPositionals: true }>> {
  try {
    return parseArgs({ args, options, allowPositionals: true });
  } catch (error) {
    throw new UsageError((error as Error).message.split('\n', 1)[0] ?? 'bad options');
  }
}

export function oneOf<const T extends string>(option: string, value: string, choices: readonly T[]): T {
  const found = choices.find((choice) => choice === value);
  if (found === undefined) throw new UsageError(`--${option} is "${value}"; it takes ${choices.join(', ')}`);
  return found;
}

export function wholeNumber(option: string, value: string, min: number, max: number): number {
  const number = /^\d+$/.test(value) ? Number(value) : Number.NaN;
  if (!(number >= min && number <= max)) {
    throw new UsageError(`--${option} is "${value}"; it takes a whole number from ${min} to ${max}`);
  }
  return number;
}

/** The i-th of n parts, given as `i/n`: every n-th test, so that the parts take about as long as each other. */
export function shard<T>(all: readonly T[], text: string): T[] {
  const [, part = '', parts = ''] = /^(\d+)\/(\d+)$/.exec(text) ?? [];
  const [i, n] = [Number(part), Number(parts)];
  if (!(n >= 1 && i >= 1 && i <= n)) {
    throw new UsageError(`--shard is "${text}"; it takes I/N with I from 1 to N`);
  }
  return all.filter((_, index) => index % n === i - 1);
}

export function machineChoice(value: string | undefined): MachineChoice {
  return oneOf('machine', value ?? 'auto', ['auto', 'host', 'lab']);
}

/** What the lab machine is made of; the same words in every command that boots one. */
export const LAB_OPTIONS = {
  kernel: { type: 'string' },
  append: { type: 'string' },
  cpus: { type: 'string' },
  memory: { type: 'string' },
  'engine-cpu': { type: 'string' },
  cold: { type: 'boolean' },
} as const satisfies ParseArgsConfig['options'];

export type LabValues = {
  readonly [K in keyof typeof LAB_OPTIONS]?:
    | ((typeof LAB_OPTIONS)[K]['type'] extends 'boolean' ? boolean : string)
    | undefined;
};

/** @throws UsageError when a number is out of range */
export function labMachine(
  values: LabValues,
): Pick<LabOptions, 'kernel' | 'append' | 'cpus' | 'memoryMiB' | 'engineCpu' | 'cold'> {
  return {
    ...(values.kernel === undefined ? {} : { kernel: values.kernel }),
    ...(values.append === undefined ? {} : { append: values.append }),
    ...(values.cpus === undefined ? {} : { cpus: wholeNumber('cpus', values.cpus, 1, 8) }),
    ...(values.memory === undefined ? {} : { memoryMiB: wholeNumber('memory', values.memory, 512, 3072) }),
    ...(values['engine-cpu'] === undefined ? {} : { engineCpu: values['engine-cpu'] }),
    ...(values.cold === undefined ? {} : { cold: values.cold }),
  };
}

/** Those of the values that belong to the lab machine, for labOnly. */
export function labGiven(values: LabValues): LabValues {
  const names = Object.keys(LAB_OPTIONS) as (keyof typeof LAB_OPTIONS)[];
  return Object.fromEntries(names.map((name) => [name, values[name]]));
}

/** Options that mean something only for the lab machine are refused elsewhere instead of being ignored. */
export function labOnly(machine: MachineChoice, given: Record<string, unknown>): void {
  if (machine !== 'host') return;
  for (const [name, value] of Object.entries(given)) {
    if (value !== undefined)
      throw new UsageError(`--${name} is for the lab machine; this run asks for the host`);
  }
}

/** A command, or a part of one. @returns the exit status */
export type Command = (args: string[], signal: AbortSignal) => Promise<number>;

/** Goes on with the part of a command that its first argument names. */
export async function runVerb(
  command: string,
  verbs: Readonly<Record<string, Command>>,
  [verb, ...rest]: string[],
  signal: AbortSignal,
): Promise<number> {
  const run = verb !== undefined && Object.hasOwn(verbs, verb) ? verbs[verb] : undefined;
  if (run) return await run(rest, signal);
  const seen = verb === undefined ? `nvmx ${command}` : `nvmx ${command} ${verb}`;
  const all = Object.keys(verbs).map((one) => `${command} ${one}`);
  throw new UsageError(`"${seen}" is no command; there are ${all.join(', ')}`);
}

/** Progress for people, on standard error: one line each, rewritten in place on a terminal. */
export function progress(): { show(text: string): void; clear(): void } {
  const live = process.stderr.isTTY === true;
  let shown = false;
  let last = '';
  return {
    show(text) {
      if (text === last) return;
      last = text;
      shown = true;
      process.stderr.write(live ? `\r\u001b[K${text}` : `${text}\n`);
    },
    clear() {
      if (live && shown) process.stderr.write('\r\u001b[K');
      shown = false;
    },
  };
}
