// SPDX-License-Identifier: Apache-2.0
// One state of a process with KVM handles, and one way for it to end: `node matrix.mjs STATE ENDING`.
import { readdirSync, readFileSync, writeSync } from 'node:fs';
import { isMainThread, parentPort, Worker } from 'node:worker_threads';
import { EventFd, Kvm } from '../../dist/kvm/index.js';

const say = (text) => writeSync(1, `${text}\n`);
const later = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const quiet = (promise) => promise.catch(() => {});

function machine(code) {
  const kvm = Kvm.open();
  const vm = kvm.createVm();
  vm.memory.add({ gpa: 0x1000, size: 0x1000 });
  vm.memory.write(0x1000, Uint8Array.from(code));
  const vcpu = vm.createVcpu(0);
  vcpu.setSregs({ cs: { base: 0n, selector: 0 } });
  vcpu.setRegs({ rip: 0x1000n });
  return { kvm, vm, vcpu };
}
const SPIN = [0xeb, 0xfe];
const OUT = [0xe6, 0x10, 0xeb, 0xfc];
const LOAD = [0xa0, 0x00, 0x80, 0xf4];

/** Each gives what can be closed, children first. */
const states = {
  opened: () => [Kvm.open()],
  vm() {
    const kvm = Kvm.open();
    return [kvm.createVm(), kvm];
  },
  memory() {
    const kvm = Kvm.open();
    const vm = kvm.createVm();
    const backings = ['anonymous', 'memfd', { type: 'file', path: '/dev/zero' }];
    for (const [index, backing] of backings.entries()) {
      const region = vm.memory.add({ gpa: index * 0x10000, size: 0x2000, backing });
      new Uint8Array(region.buffer)[1] = 1;
      region.window(0x1000, 16);
      if (index === 0) region.protect('none', 0x1000);
    }
    return [vm, kvm];
  },
  idle() {
    const { kvm, vm, vcpu } = machine(SPIN);
    vcpu.stats();
    vm.stats();
    return [vcpu, vm, kvm];
  },
  exited() {
    const { kvm, vm, vcpu } = machine(OUT);
    vcpu.runSync();
    return [vcpu, vm, kvm];
  },
  /** Its thread may still be looking for the next run, and the last answer be on its way. */
  async 'awaited over and over'() {
    const { kvm, vm, vcpu } = machine(OUT);
    for (let i = 0; i < 100; i++) await vcpu.run();
    quiet(vcpu.run());
    return [vcpu, vm, kvm];
  },
  async running() {
    const { kvm, vm, vcpu } = machine(SPIN);
    quiet(vcpu.run());
    await later(5);
    return [vcpu, vm, kvm];
  },
  async filtered() {
    const { kvm, vm, vcpu } = machine(OUT);
    vcpu.setExitFilter([{ type: 'io', direction: 'out', port: 0x10 }]);
    quiet(vcpu.run());
    await later(5);
    return [vcpu, vm, kvm];
  },
  async 'waiting for an event'() {
    const { kvm, vm } = machine(SPIN);
    const event = new EventFd();
    vm.addIoeventfd(event, { port: 0x20 });
    quiet(event.read());
    await later(5);
    return [event, vm, kvm];
  },
  async 'waiting for a page'() {
    const { kvm, vm, vcpu } = machine(LOAD);
    const userfault = vm.memory.add({ gpa: 0x8000, size: 0x1000 }).watchFaults();
    quiet(vcpu.run());
    await userfault.read();
    quiet(userfault.read());
    return [userfault, vcpu, vm, kvm];
  },
  async closed() {
    const handles = await states.running();
    handles.at(-1).close();
    return handles;
  },
};

const ours = () =>
  readdirSync('/proc/self/task').filter((tid) => {
    try {
      return readFileSync(`/proc/self/task/${tid}/comm`, 'utf8').startsWith('nvmx-');
    } catch {
      return false;
    }
  }).length;

const endings = {
  async 'close twice'(state) {
    const handles = await states[state]();
    for (const handle of [...handles, ...handles]) handle.close();
    await later(1);
    say(`vCPU threads: ${readdirSync('/proc/self/task').filter((tid) => readFileSync(`/proc/self/task/${tid}/comm`, 'utf8').startsWith('nvmx-vcpu')).length}`);
  },
  async gc(state) {
    await states[state]();
    for (let i = 0; i < 5; i++) {
      globalThis.gc();
      await later(5);
    }
    process.exit(0);
  },
  async exit(state) {
    await states[state]();
    process.exit(7);
  },
  async throw(state) {
    await states[state]();
    setTimeout(() => {
      throw new Error('on purpose');
    });
  },
  async sigterm(state) {
    globalThis.kept = await states[state]();
    say('ready');
    setInterval(() => {}, 1000);
  },
  async terminate(state) {
    const worker = new Worker(new URL(import.meta.url), { argv: [state, 'worker'] });
    await new Promise((resolve) => worker.once('message', resolve));
    const code = await worker.terminate();
    say(`terminated ${code}, threads of ours: ${ours()}`);
  },
  async worker(state) {
    globalThis.kept = await states[state]();
    parentPort.postMessage('there');
    setInterval(() => {}, 1000);
  },
};

const [state, ending] = process.argv.slice(2);
if (isMainThread !== (ending !== 'worker')) throw new Error('workers are for the worker ending');
await endings[ending](state);
