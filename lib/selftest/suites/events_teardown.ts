// SPDX-License-Identifier: Apache-2.0
// Ends that come while L2 is active. The kernel log, which the engine watches, is half of the oracle.
import { once } from 'node:events';
import type { L2 } from '../../guest/index.ts';
import { selftest } from '../engine/define.ts';
import type { Observations, Selftest, SelftestContext } from '../engine/model.ts';
import { nestedVmx, vmxControl } from '../engine/requirements.ts';
import { bootL1, type Machine } from './common.ts';
import { CHILD } from './events_child.ts';

/** Whether KVM still runs an L2, in a new VM. */
async function stillWorks(context: SelftestContext): Promise<string> {
  await using machine = await bootL1(context);
  const l2 = await machine.l1.createL2({}, (program) => program.fold(7));
  const stop = await l2.enter({ signal: context.signal });
  return stop.kind === 'exit' ? `${stop.exit.reason} ${l2.progress.executed}` : stop.kind;
}

/** What L2 is doing when the end comes. */
type Doing = 'active' | 'running' | 'halted';
type Close = (machine: Machine, l2: L2) => void;

async function closeWhile(context: SelftestContext, doing: Doing, close: Close): Promise<Observations> {
  const machine = await bootL1(context);
  const { l1 } = machine;
  const page = l1.allocate();
  const l2 = await l1.createL2({}, (program) => {
    program.fold(7).sync(1);
    if (doing === 'halted') program.cli().hlt();
    else program.spin(page, 8, 1);
  });
  const stop = await l2.enter({ signal: context.signal });
  const pending =
    doing === 'active'
      ? undefined
      : l2.continue().then(
          () => 'done',
          (error: Error) => error.name,
        );
  // CLI is an operation of its own: with it, or the sync, behind L2 the last one has begun
  const behind = doing === 'active' ? 1 : doing === 'halted' ? 3 : 2;
  while (l2.progress.executed < behind) await context.sleep(1);
  const { executed } = l2.progress;
  close(machine, l2);
  const run = (await pending) ?? 'none';
  await machine[Symbol.asyncDispose]();
  return { stop: stop.kind, executed, run };
}

const ENDS: readonly { name: string; title: string; close: Close }[] = [
  { name: 'vm', title: 'the VM is closed', close: ({ vm }) => vm.close() },
  { name: 'vcpu', title: 'the vCPU is closed', close: (_, l2) => l2.cpu.vcpu.close() },
];
const DOING: readonly { doing: Doing; title: string; executed: number; run: string }[] = [
  { doing: 'active', title: 'stands in userspace', executed: 1, run: 'none' },
  { doing: 'running', title: 'runs', executed: 2, run: 'KvmClosedError' },
  { doing: 'halted', title: 'sleeps in L0', executed: 3, run: 'KvmClosedError' },
];
const requires = [nestedVmx, vmxControl('secondary.enable-ept')];

const CLOSES: readonly Selftest[] = ENDS.flatMap(({ name, title, close }) =>
  DOING.map(({ doing, title: what, executed, run }) =>
    selftest({
      id: `events/teardown/${name}/${doing}`,
      title: `${title} while L2 ${what}`,
      requires,
      expectations: { any: { stop: 'sync', executed, run, after: 'vmcall 1' } },
      body: async (context) => {
        const seen = await closeWhile(context, doing, close);
        return { observed: { ...seen, after: await stillWorks(context) } };
      },
    }),
  ),
);

const KILLS: readonly Selftest[] = (['active', 'running'] as const).map((doing) =>
  selftest({
    id: `events/teardown/process/${doing}`,
    title: `the process is killed while L2 ${doing === 'active' ? 'stands in userspace' : 'runs'}`,
    requires,
    timeoutMs: 60_000,
    expectations: { any: { child: 'ready', signal: 'SIGKILL', after: 'vmcall 1' } },
    body: async (context) => {
      const { spawn } = process.getBuiltinModule('node:child_process');
      // In the lab from the pack that this process came from: finding and compiling the modules is most of its life.
      const { NVMX_START: start } = process.env;
      const loader = start === undefined ? [] : [...process.execArgv, start];
      const child = spawn(process.execPath, [...loader, CHILD, doing], {
        stdio: ['ignore', 'pipe', 'inherit'],
        signal: context.signal,
      });
      const [text] = (await once(child.stdout, 'data')) as [Buffer];
      child.kill('SIGKILL');
      const [, signal] = (await once(child, 'exit')) as [number | null, string | null];
      return { observed: { child: text.toString().trim(), signal, after: await stillWorks(context) } };
    },
  }),
);

export const teardown: readonly Selftest[] = [...CLOSES, ...KILLS];
