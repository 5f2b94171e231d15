// SPDX-License-Identifier: Apache-2.0
// npm run bench:kvm: lib/kvm beside a C program of ours that makes the same ioctls (test/peers/peer.c). Prints
// microseconds and ratios. Short rounds of the two are paired, now one first, now the other, so that a machine that
// changes its speed, and whatever one leaves behind in the caches, changes both. The ratio is the median of the pairs'
// ratios, the difference that of their differences; the times shown are medians, which need not have that ratio. p10 is
// the ratio of the first deciles: what else runs on a machine only ever adds time. Where one thread does the work both
// programs are on one CPU: by the CPU on which the kernel's SRCU worker happens to run, memslot changes take 30 or 160
// µs all through a process. Each work has processes of its own, because what another one left behind (where memory is,
// above all) makes either program up to 3 % slower or faster. Nothing is asserted; --json prints the numbers for machines.
import { execFileSync, spawn } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { availableParallelism, loadavg } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { ROOT, script } from './run.mjs';

const ROUNDS = 301;
/** Rounds before those that count: the compiler of JavaScript has seen enough, and both programs' memory is there. */
const WARM_UP = 60;
const PEER = join(ROOT, 'out/peers/peer');
const { Kvm } = await import(join(ROOT, 'dist/kvm/index.js'));

const microseconds = () => Number(process.hrtime.bigint()) / 1e3;
const quantile = (values, part) => values.toSorted((a, b) => a - b)[Math.floor((values.length - 1) * part)];

/** MOV CX, 199; OUT 0x10, AL; LOOP to the OUT; OUT 0x11, AL; JMP to the MOV: the peer's guest. */
const CODE = [0xb9, 199, 0, 0xe6, 0x10, 0xe2, 0xfc, 0xe6, 0x11, 0xeb, 0xf5];
const EXITS_A_TURN = 200;
const GROUP = 10;

function machine(kvm) {
  const vm = kvm.createVm();
  vm.memory.add({ gpa: 0x1000, size: 0x1000 });
  vm.memory.write(0x1000, Uint8Array.from(CODE));
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

/** The median, for work that takes long enough for others to come between. */
function middle(count, work) {
  const times = [];
  for (let i = 0; i < count; i++) {
    const start = microseconds();
    work();
    times.push(microseconds() - start);
  }
  return quantile(times, 0.5);
}

/** What nvmx does, `count` times, and the microseconds of each. `prepare` is outside the time. */
const WORKS = {
  'exit kept native': {
    prepare: ({ vcpu }) => {
      vcpu.setExitFilter([{ type: 'io', direction: 'out', port: 0x10 }]);
    },
    // 199 of 200 exits are counted in native code, the last comes out.
    run: ({ vcpu }, count) => average(count / EXITS_A_TURN, () => vcpu.runSync()) / EXITS_A_TURN,
  },
  'exit seen by runSync': { run: ({ vcpu }, count) => average(count, () => vcpu.runSync()) },
  'exit awaited': {
    // The vCPU's thread runs, this one waits.
    isThreaded: true,
    async run({ vcpu }, count) {
      const times = [];
      for (let i = 0; i < count; i++) {
        const start = microseconds();
        await vcpu.run();
        times.push(microseconds() - start);
      }
      return quantile(times, 0.5);
    },
  },
  'registers read and written': {
    // In groups that are too short for the machine to do something else in the middle of most.
    run: ({ vcpu }, count) =>
      middle(count / GROUP, () => {
        for (let i = 0; i < GROUP; i++) vcpu.setRegs(vcpu.getRegs());
      }) / GROUP,
  },
  'memslot added and deleted': {
    run: ({ vm }, count) =>
      middle(count, () => vm.memory.add({ gpa: 0x10000, size: 0x1000, slot: 1 }).delete()),
  },
  'vCPU saved and restored': {
    prepare: ({ vcpu, kvm }) => vcpu.setCpuid(kvm.supportedCpuid()),
    run: ({ vcpu }, count) => middle(count, () => vcpu.restore(vcpu.save())),
  },
};
/** What, the peer's word for it, how often in a round, the target. */
const PAIRS = [
  ['exit kept native', 'exits', 200, '≤ 1.02 × C', ({ ratio }) => ratio <= 1.02],
  ['exit seen by runSync', 'exits', 200, '≤ C + 1 µs', ({ difference }) => difference <= 1],
  ['exit awaited', 'exits', 200, '≤ C + 15 µs', ({ difference }) => difference <= 15],
  ['registers read and written', 'registers', 200, '≤ 1.05 × C', ({ ratio }) => ratio <= 1.05],
  ['memslot added and deleted', 'slots', 60, '≤ C / 0.95', ({ ratio }) => ratio <= 1 / 0.95],
  ['vCPU saved and restored', 'save-restore', 16, '≤ 1.1 × C', ({ ratio }) => ratio <= 1.1],
];

/** The C program, asked line by line. */
function startPeer() {
  const child = spawn(PEER, { stdio: ['pipe', 'pipe', 'inherit'] });
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  return {
    pid: child.pid,
    async run(what, count) {
      child.stdin.write(`${what} ${count}\n`);
      const { value, done } = await lines.next();
      if (done) throw new Error(`${PEER} ended at "${what}"`);
      return Number(value);
    },
    end: () => child.stdin.end(),
  };
}

/** Puts the main thread of both programs, and the threads that they make from then on, on this CPU. */
function runOn(peer, cpu) {
  for (const pid of [process.pid, peer.pid]) execFileSync('taskset', ['-p', '-c', `${cpu}`, `${pid}`]);
}

/** Both sides of a pair in turn. */
async function compare(kvm, peer, [what, word, count]) {
  const { prepare = () => {}, run, isThreaded = false } = WORKS[what];
  if (!isThreaded) runOn(peer, availableParallelism() - 1);
  const { vm, vcpu } = machine(kvm);
  const its = { kvm, vm, vcpu };
  prepare(its);
  const times = { c: [], js: [] };
  const one = async () => times.c.push(await peer.run(word, count));
  const other = async () => times.js.push(await run(its, count));
  for (let round = 0; round < WARM_UP + ROUNDS; round++) {
    if (round === WARM_UP) Object.assign(times, { c: [], js: [] });
    for (const side of round % 2 === 0 ? [one, other] : [other, one]) await side();
  }
  vm.close();
  const pairs = (of) => quantile(times.js.map(of), 0.5);
  return {
    c: quantile(times.c, 0.5),
    js: quantile(times.js, 0.5),
    difference: pairs((js, round) => js - times.c[round]),
    ratio: pairs((js, round) => js / times.c[round]),
    undisturbed: quantile(times.js, 0.1) / quantile(times.c, 0.1),
  };
}

/** From an AbortSignal to the promise's answer, in microseconds, of a guest that never exits. */
async function kicks(kvm, count) {
  const { vm, vcpu } = machine(kvm);
  vm.memory.write(0x1000, Uint8Array.of(0xeb, 0xfe));
  const times = [];
  for (let i = 0; i < count; i++) {
    const abort = new AbortController();
    const run = vcpu.run({ signal: abort.signal }).catch(() => {});
    await new Promise((resolve) => setTimeout(resolve, 1));
    const start = microseconds();
    abort.abort();
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

/** Measures one pair, in a process that does nothing else, and prints the times. */
async function measure(what) {
  const kvm = Kvm.open();
  const peer = startPeer();
  const times = await compare(
    kvm,
    peer,
    PAIRS.find(([name]) => name === what),
  );
  peer.end();
  kvm.close();
  console.log(JSON.stringify(times));
}

async function main() {
  const [, self, flag, only] = process.argv;
  if (flag === '--only') return measure(only);
  mkdirSync(join(ROOT, 'out/peers'), { recursive: true });
  execFileSync('gcc', ['-O2', '-Wall', '-o', PEER, join(ROOT, 'test/peers/peer.c')]);
  const results = PAIRS.map(([what, , , target, holds]) => {
    const times = JSON.parse(execFileSync(process.execPath, [self, '--only', what]));
    return { what, ...times, target, holds: holds(times) };
  });
  const kvm = Kvm.open();
  const kicked = await kicks(kvm, 400);
  const kick = { p50: quantile(kicked, 0.5), p99: quantile(kicked, 0.99), max: quantile(kicked, 1) };
  const start = startup();
  kvm.close();
  if (process.argv.includes('--json')) {
    console.log(JSON.stringify({ results, kick, startup: start }));
    return;
  }
  const load = loadavg()[0].toFixed(1);
  console.log(
    `${'medians, µs each'.padEnd(30)}       C    nvmx    diff   ratio     p10  target (load ${load})`,
  );
  for (const { what, c, js, difference, ratio, undisturbed, target, holds } of results) {
    const numbers = [
      c.toFixed(2),
      js.toFixed(2),
      difference.toFixed(2),
      ratio.toFixed(3),
      undisturbed.toFixed(3),
    ];
    const cells = numbers.map((text) => text.padStart(8)).join('');
    console.log(`${what.padEnd(30)}${cells}  ${target}${holds ? '' : ' — missed'}`);
  }
  const shown = Object.entries(kick).map(([name, value]) => `${name} ${value.toFixed(0)} µs`);
  console.log(`abort to answer: ${shown.join(', ')} (n = ${kicked.length}; target: p99 ≤ 50 ms)`);
  console.log(
    `process: bare Node ${start.bare.toFixed(1)} ms, importing nvmx +${start.import.toFixed(1)} ms, opening /dev/kvm too +${start.open.toFixed(1)} ms`,
  );
}

await script(main);
