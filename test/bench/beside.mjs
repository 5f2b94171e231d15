// SPDX-License-Identifier: Apache-2.0
// The C programs of test/peers, and the same work by nvmx: one line of JSON for each kind of work.
// Arguments: folder of the programs, rounds of memslot work, round trips (0 where there is no nested VMX).
import { execFileSync } from 'node:child_process';
import { distribution } from '../../dist/bench/index.js';
import { roundTrip } from '../../dist/bench/suites/round_trip.js';
import { Kvm, runSteps } from '../../dist/kvm/index.js';
import { probeHost } from '../../dist/probe/index.js';

/** The same bytes, addresses and rounds as bench_memslots.c. */
const CODE = [
  0xb8, 0x00, 0x10, 0x8e, 0xd8, 0xa2, 0x00, 0x00, 0x05, 0x00, 0x01, 0x3d, 0x00, 0x90, 0x75, 0xf3, 0xe6, 0x10,
  0xeb, 0xec,
];
const [GPA, SIZE, AWAY, PORT, PAGE] = [0x1_0000, 0x8_0000, 0x10_0000, 0x10, 4096];
const STEPS = {
  map: (region) => [{ kind: 'discard', region }],
  unmap: (region) => [{ kind: 'discard', region, piece: PAGE }],
  move: (region) => [
    { kind: 'move', region, gpa: AWAY },
    { kind: 'move', region, gpa: GPA },
  ],
};

const [folder, rounds, trips] = [process.argv[2], ...process.argv.slice(3).map(Number)];

/** By kind: name, rounds, quickest, median and mean ticks. */
function peer(name, count) {
  const lines = execFileSync(`${folder}/${name}`, [String(count)], { encoding: 'utf8' }).trim().split('\n');
  return lines.map((line) => {
    const [kind, done, min, p50, mean] = line.split(' ');
    return [kind, { count: Number(done), min: Number(min), p50: Number(p50), mean: Number(mean) }];
  });
}

function memslotRounds(vcpu, region, kind) {
  const steps = [{ kind: 'run', port: PORT }, ...STEPS[kind](region)];
  // The first round is the warm-up that the program has too
  const { times } = runSteps(vcpu, steps, rounds + 1);
  return Array.from({ length: rounds }, (_, i) => {
    const at = (i + 1) * steps.length;
    return times.subarray(at, at + steps.length).reduce((sum, time) => sum + time, 0);
  });
}

function memslots() {
  const kvm = Kvm.open();
  const vm = kvm.createVm();
  const image = vm.memory.add({ gpa: 0, size: PAGE });
  new Uint8Array(image.buffer).set(CODE);
  const region = vm.memory.add({ gpa: GPA, size: SIZE });
  const vcpu = vm.createVcpu(0);
  vcpu.setSregs({ cs: { base: 0n, selector: 0 } });
  vcpu.setRegs({ rip: 0n, rflags: 2n });
  const all = Object.keys(STEPS).map((kind) => [kind, memslotRounds(vcpu, region, kind)]);
  kvm.close();
  return all;
}

/** Nested round trips as nvmx bench measures them. */
async function roundTrips() {
  const context = { probe: probeHost(), quick: false, slow: true, full: false, unmanaged: { reason: '' } };
  const [figure] = await roundTrip('anonymous').measure(context, new Set(['round-trip/anonymous/none']));
  return [['round-trip', figure.samples]];
}

const theirs = [...peer('bench_memslots', rounds), ...(trips > 0 ? peer('bench_nested', trips) : [])];
const ours = new Map([...memslots(), ...(trips > 0 ? await roundTrips() : [])]);
for (const [kind, figures] of theirs) {
  const { count, min, p50, mean } = distribution(ours.get(kind));
  console.log(JSON.stringify({ kind, peer: figures, ours: { count, min, p50, mean } }));
}
