// SPDX-License-Identifier: Apache-2.0
// Runs inside the lab machine; see ../host_modules.test.ts.
import { spawn } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { Kvm } from '/nvmx/dist/kvm/index.js';
import { reloadModules } from '/nvmx/dist/selftest/index.js';

const say = (name, value) => console.log(`@ ${name} ${JSON.stringify(value)}`);
const folder = '/sys/module/kvm_intel/parameters';
const read = (name) => readFileSync(`${folder}/${name}`, 'utf8').trim();
const all = () => JSON.stringify(readdirSync(folder).map((name) => [name, read(name)]));
const two = () => ({ ept: read('ept'), nested: read('nested') });
const refusal = (variant) => {
  try {
    reloadModules(variant)[Symbol.dispose]();
    return 'accepted';
  } catch (error) {
    return error.message.split(';')[0];
  }
};
const nvmx = (...args) => spawn(process.execPath, ['/nvmx/dist/cli/main.js', ...args], { stdio: ['ignore', 'pipe', 'inherit'] });
const ended = (child) => new Promise((resolve) => child.on('close', (status) => resolve(status)));

const before = all();
say('before', two());
{
  const changed = reloadModules({ 'kvm_intel.ept': '0' });
  say('during', two());
  changed[Symbol.dispose]();
}
say('restored', all() === before);
say('unknown', refusal({ 'kvm_intel.nonsense': '1' }));
{
  const kvm = Kvm.open();
  kvm.createVm();
  say('inUse', refusal({ 'kvm_intel.ept': '0' }));
  kvm.close();
}
say('refused', [refusal({ 'kvm_intel.ept': 'maybe' }).startsWith('modprobe kvm_intel ept=maybe failed'), all() === before]);

const test = ['test', '--machine', 'host', '--reporter', 'json', '--matrix', 'kvm_intel.ept=0,1'];
{
  const child = nvmx(...test, 'apic-update/madvise/deterministic');
  let text = '';
  child.stdout.on('data', (more) => {
    text += more;
  });
  const status = await ended(child);
  const { results } = JSON.parse(text);
  say('matrix', [status, results.map(({ variant, verdict }) => [variant, verdict]), all() === before]);
}
{
  const child = nvmx('test', '--machine', 'host', '--matrix', 'kvm_intel.ept=1,0', '--repeat', '1000', 'l2-switch/sched/c=2');
  child.stdout.once('data', () => setTimeout(() => child.kill('SIGINT'), 200));
  child.stdout.resume();
  say('interrupted', [await ended(child), all() === before]);
}
