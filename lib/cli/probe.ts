// SPDX-License-Identifier: Apache-2.0
import { describeLab, LabError, runInLab } from '../lab/index.ts';
import { type HostProbe, probeDeeply, probeHost, seriesForLab } from '../probe/index.ts';
import { renderProbe } from '../report/index.ts';
import {
  LAB_OPTIONS,
  type LabValues,
  labGiven,
  labMachine,
  labOnly,
  machineChoice,
  parse,
  progress,
  STATUS,
} from './options.ts';

export async function probeCommand(args: string[], signal: AbortSignal): Promise<number> {
  const { values } = parse(args, {
    machine: { type: 'string', default: 'host' },
    ...LAB_OPTIONS,
    json: { type: 'boolean', default: false },
  });
  const machine = machineChoice(values.machine);
  labOnly(machine, labGiven(values));
  const inLab = machine === 'lab' || (machine === 'auto' && !probeHost().nestedVmx.usable);
  const probe = inLab ? await probeLab(values, signal) : await probeDeeply();
  const kind = inLab ? 'lab' : 'host';
  if (values.json) {
    process.stdout.write(`${JSON.stringify({ machine: kind, ...probe }, null, 2)}\n`);
    return STATUS.ok;
  }
  const heading = inLab ? 'the emulated Intel machine' : 'this host';
  const lab = describeLab();
  const more = inLab
    ? []
    : [{ what: 'tests in the lab (--machine lab)', possible: lab.possible, why: lab.why }];
  process.stdout.write(renderProbe(probe, heading, more));
  return STATUS.ok;
}

async function probeLab(values: LabValues, signal: AbortSignal): Promise<HostProbe> {
  const status = progress();
  let answer: HostProbe | undefined;
  const result = await runInLab(['dist/probe/agent.js'], {
    ...labMachine(values),
    ...seriesForLab(),
    signal,
    onProgress: status.show,
    onLine: (line) => {
      if (line.startsWith('{')) answer = JSON.parse(line) as HostProbe;
    },
  });
  status.clear();
  signal.throwIfAborted();
  if (!answer) {
    throw new LabError(
      `the lab machine ended without an answer: ${result.outcome}`,
      `its console is in ${result.consoleFile}`,
      'read the console; try another kernel with --kernel',
    );
  }
  return answer;
}
