// SPDX-License-Identifier: Apache-2.0
// What a process can do to open KVM handles on its way out. Run as `node child.mjs SCENARIO`; dist/ is built by
// the test. Prints "ready" when the guest runs.
import { readdirSync, readFileSync, writeSync } from 'node:fs';
import { parentPort, Worker } from 'node:worker_threads';
import { Kvm } from '../../dist/kvm/index.js';

const say = (text) => writeSync(1, `${text}\n`);
const later = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function spinning(kvm = Kvm.open()) {
  const vm = kvm.createVm();
  vm.memory.add({ gpa: 0x1000, size: 0x1000 });
  vm.memory.write(0x1000, Uint8Array.of(0xeb, 0xfe));
  const vcpu = vm.createVcpu(0);
  vcpu.setSregs({ cs: { base: 0n, selector: 0 } });
  vcpu.setRegs({ rip: 0x1000n });
  return { kvm, vm, vcpu, run: vcpu.run() };
}

function vcpuThreads() {
  const name = (tid) => readFileSync(`/proc/self/task/${tid}/comm`, 'utf8');
  return readdirSync('/proc/self/task').filter((tid) => name(tid).startsWith('nvmx-vcpu')).length;
}

async function startWorker() {
  const worker = new Worker(new URL(import.meta.url), { argv: ['worker'] });
  await new Promise((resolve) => worker.once('message', resolve));
  return worker;
}

const scenarios = {
  async 'close-twice'() {
    const { kvm, vm, vcpu, run } = spinning();
    await later(10);
    for (const handle of [vcpu, vm, kvm, vcpu, vm, kvm]) handle.close();
    await run.catch((error) => say(error.name));
  },
  async 'idle-exits-by-itself'() {
    const { vcpu, run } = spinning();
    await later(10);
    vcpu.kick();
    say((await run).type);
    // Nothing is closed; only a pending run may keep the process alive.
  },
  async 'collected-without-close'() {
    // Its own function, so that no local of this one holds the last of them.
    const abandon = async () => {
      const { vcpu, run, vm } = spinning();
      vm.memory.regions[0].window(0, 16);
      vcpu.kick();
      await run;
    };
    for (let i = 0; i < 30; i++) {
      await abandon();
      if (i % 5 === 4) globalThis.gc();
    }
    for (let i = 0; i < 5; i++) {
      globalThis.gc();
      await later(10);
    }
    say(`vCPU threads left: ${vcpuThreads()}`);
  },
  async 'pending-run-survives-gc'() {
    let handles = spinning();
    const { run } = handles;
    const kick = new WeakRef(handles.vcpu);
    handles = undefined;
    await later(5);
    globalThis.gc();
    await later(5);
    kick.deref().kick();
    say((await run).type);
  },
  async 'buffer-outlives-everything'() {
    const { kvm, vm, run } = spinning();
    run.catch(() => {});
    const bytes = new Uint8Array(vm.memory.regions[0].buffer);
    kvm.close();
    globalThis.gc();
    await later(10);
    say(`${bytes.length} ${bytes[0]}`);
  },
  async exit() {
    spinning().run.catch(() => {});
    await later(10);
    process.exit(7);
  },
  async 'exit-in-a-hurry'() {
    spinning();
    process.exit(8);
  },
  async throw() {
    spinning();
    await later(10);
    setTimeout(() => {
      throw new Error('on purpose');
    });
  },
  async sigterm() {
    spinning();
    say('ready');
  },
  async 'close-from-signal'() {
    const { kvm, run } = spinning();
    process.once('SIGTERM', () => kvm.close());
    say('ready');
    await run.catch((error) => say(error.name));
  },
  async worker() {
    spinning();
    await later(10);
    parentPort.postMessage('running');
  },
  async 'worker-terminate'() {
    const worker = await startWorker();
    say(`vCPU threads: ${vcpuThreads()}`);
    say(`terminated ${await worker.terminate()}, vCPU threads left: ${vcpuThreads()}`);
  },
  async 'worker-exit-with-main'() {
    await startWorker();
    process.exit(9);
  },
  async 'two-environments'() {
    const workers = await Promise.all([startWorker(), startWorker()]);
    const { vcpu, run } = spinning();
    await workers[0].terminate();
    vcpu.kick();
    say((await run).type);
    await workers[1].terminate();
    say('done');
  },
};

await scenarios[process.argv[2]]();
