// SPDX-License-Identifier: Apache-2.0
// npm run bench:kvm: lib/kvm beside a C program of ours that makes the same ioctls (test/peers/peer.c). Prints
// microseconds and ratios. Rounds of the two alternate and the best of each counts: what else the machine does
// only ever adds time. Nothing is asserted; --json prints the numbers for machines.
import { execFileSync } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { ROOT, script } from './run.mjs';

const ROUNDS = 7;
const PEER = join(ROOT, 'out/peers/peer');
const { Kvm } = await import(join(ROOT, 'dist/kvm/index.js'));

const peer = (what, count) => Number(execFileSync(PEER, [what, String(count)], { encoding: 'utf8' }));
const microseconds = () => Number(process.hrtime.bigint()) / 1e3;
const quantile = (values, part) => values.toSorted((a, b) => a - b)[Math.floor((values.length - 1) * part)];

/** OUT 0x10, AL in a loop without end. */
function machine(kvm) {
  const vm = kvm.createVm();
  vm.memory.add({ gpa: 0x1000, size: 0x1000 });
  vm.memory.write(0x1000, Uint8Array.of(0xe6, 0x10, 0xeb, 0xfc));
  const vcpu = vm.createVcpu(0);
  vcpu.setSregs({ cs: { base: 0n, selector: 0 } });
  vcpu.setRegs({ rip: 0x1000n, rflags: 2n });
  return { vm, vcpu };
}

function average(count, work) {
  const start = microseconds();
  for (let i = 0; i < count; i++) work();
  return (microseconds() - start) / count;
}

/** Each: what, how often, the peer's word for it, and what nvmx does. */
const WORKS = {
  async 'exit kept native'({ vcpu }) {
    vcpu.setExitFilter([{ type: 'io', direction: 'out', port: 0x10 }]);
    const start = microseconds();
    vcpu.runSync({ timeoutMs: 150 });
    return (microseconds() - start) / Number(vcpu.exitCounts()[0]);
  },
  'exit seen by runSync': ({ vcpu }) => average(8000, () => vcpu.runSync()),
  async 'exit awaited'({ vcpu }) {
    const times = [];
    for (let i = 0; i < 4000; i++) {
      const start = microseconds();
      await vcpu.run();
      times.push(microseconds() - start);
    }
    return quantile(times, 0.5);
  },
  'registers read and written': ({ vcpu }) => average(8000, () => vcpu.setRegs(vcpu.getRegs())),
  'memslot added and deleted': ({ vm }) =>
    average(300, () => vm.memory.add({ gpa: 0x10000, size: 0x1000, slot: 1 }).delete()),
  'vCPU saved and restored'({ vcpu, kvm }) {
    vcpu.setCpuid(kvm.supportedCpuid());
    vcpu.restore(vcpu.save());
    return average(400, () => vcpu.restore(vcpu.save()));
  },
};
const PAIRS = [
  ['exit kept native', 'exits', 8000, '≤ 1.02 × C', (js, c) => js / c <= 1.02],
  ['exit seen by runSync', 'exits', 8000, '≤ C + 1 µs', (js, c) => js - c <= 1],
  ['exit awaited', 'exits', 8000, '≤ C + 15 µs', (js, c) => js - c <= 15],
  ['registers read and written', 'registers', 8000, '≤ 1.05 × C', (js, c) => js / c <= 1.05],
  ['memslot added and deleted', 'slots', 300, '≤ C / 0.95', (js, c) => c / js >= 0.95],
  ['vCPU saved and restored', 'save-restore', 400, '≤ 1.1 × C', (js, c) => js / c <= 1.1],
];

/** From kick() to the promise's answer, in microseconds. */
async function kicks(kvm, count) {
  const { vm, vcpu } = machine(kvm);
  vm.memory.write(0x1000, Uint8Array.of(0xeb, 0xfe));
  const times = [];
  for (let i = 0; i < count; i++) {
    const run = vcpu.run();
    await new Promise((resolve) => setTimeout(resolve, 1));
    const start = microseconds();
    vcpu.kick();
    await run;
    times.push(microseconds() - start);
  }
  vm.close();
  return times;
}

/** What `import 'nvmx'` and opening /dev/kvm add to a process that does nothing, in milliseconds. */
function startup() {
  const time = (source) => {
    const start = microseconds();
    execFileSync(process.execPath, ['--input-type=module', '-e', source], { cwd: ROOT });
    return (microseconds() - start) / 1e3;
  };
  const rounds = Array.from({ length: 10 }, () => [
    time(''),
    time("import 'nvmx'"),
    time("import { Kvm } from 'nvmx'; Kvm.open()"),
  ]);
  const [bare, imported, opened] = [0, 1, 2].map((column) => Math.min(...rounds.map((row) => row[column])));
  return { bare, import: imported - bare, open: opened - bare };
}

async function main() {
  mkdirSync(join(ROOT, 'out/peers'), { recursive: true });
  execFileSync('gcc', ['-O2', '-Wall', '-o', PEER, join(ROOT, 'test/peers/peer.c')]);
  const kvm = Kvm.open();
  const results = [];
  for (const [what, word, count, target, holds] of PAIRS) {
    const rounds = [];
    for (let round = 0; round < ROUNDS; round++) {
      const c = peer(word, count);
      const { vm, vcpu } = machine(kvm);
      rounds.push({ c, js: await WORKS[what]({ kvm, vm, vcpu }) });
      vm.close();
    }
    const c = Math.min(...rounds.map((round) => round.c));
    const js = Math.min(...rounds.map((round) => round.js));
    results.push({ what, c, js, ratio: js / c, target, holds: holds(js, c) });
  }
  const kicked = await kicks(kvm, 400);
  const kick = { p50: quantile(kicked, 0.5), p99: quantile(kicked, 0.99), max: quantile(kicked, 1) };
  const start = startup();
  kvm.close();
  if (process.argv.includes('--json')) {
    console.log(JSON.stringify({ results, kick, startup: start }));
    return;
  }
  console.log(`${'best of 7, µs each'.padEnd(30)}       C    nvmx   ratio    diff  target`);
  for (const { what, c, js, ratio, target, holds } of results) {
    const numbers = [c.toFixed(2), js.toFixed(2), ratio.toFixed(3), (js - c).toFixed(2)];
    const cells = numbers.map((text) => text.padStart(8)).join('');
    console.log(`${what.padEnd(30)}${cells}  ${target}${holds ? '' : ' — missed'}`);
  }
  const shown = Object.entries(kick).map(([name, value]) => `${name} ${value.toFixed(0)} µs`);
  console.log(`kick to answer: ${shown.join(', ')} (n = ${kicked.length})`);
  console.log(
    `process: bare Node ${start.bare.toFixed(1)} ms, importing nvmx +${start.import.toFixed(1)} ms, opening /dev/kvm too +${start.open.toFixed(1)} ms`,
  );
}

await script(main);
