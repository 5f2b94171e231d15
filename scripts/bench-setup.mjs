// SPDX-License-Identifier: Apache-2.0
// npm run bench:setup [-- --fresh]: what the package costs before it answers. With --fresh also npm start in a
// clone of this repository with empty caches (several minutes).
import { spawn, spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { cpus, tmpdir, totalmem } from 'node:os';
import { join } from 'node:path';
import { ROOT, script } from './run.mjs';

const MIB = 1 << 20;
const median = (values) => values.sort((a, b) => a - b)[Math.floor(values.length / 2)];

function wallMs(args) {
  const begin = performance.now();
  const done = spawnSync(process.execPath, args, { cwd: ROOT, encoding: 'utf8' });
  if (done.status !== 0) throw new Error(`node ${args.join(' ')} failed:\n${done.stderr}`);
  return performance.now() - begin;
}

/** Bare and importing processes in turn, so that a machine that changes its speed changes both. */
function importCost() {
  const bare = [];
  const importing = [];
  for (let run = 0; run < 15; run++) {
    bare.push(wallMs(['--input-type=module', '-e', '']));
    importing.push(wallMs(['--input-type=module', '-e', `import '${join(ROOT, 'dist/kvm/index.js')}'`]));
  }
  return median(importing) - median(bare);
}

/** Peak resident memory of each process below `pid`, from the kernel's own accounting. */
function peaks(pid, found) {
  let children;
  try {
    children = readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8');
    const status = readFileSync(`/proc/${pid}/status`, 'utf8');
    const peak = /^VmHWM:\s+(\d+) kB$/m.exec(status)?.[1];
    if (peak) found.set(pid, Number(peak) * 1024);
  } catch {
    return;
  }
  for (const child of children.split(' ').filter(Boolean)) peaks(Number(child), found);
}

async function timed(command, args, options) {
  const begin = performance.now();
  const child = spawn(command, args, { ...options, stdio: ['ignore', 'ignore', 'pipe'] });
  let stderr = '';
  child.stderr.setEncoding('utf8').on('data', (text) => {
    stderr += text;
  });
  const found = new Map();
  const poll = setInterval(() => peaks(child.pid, found), 200);
  const status = await new Promise((resolve) => child.on('close', resolve));
  clearInterval(poll);
  if (status !== 0) throw new Error(`${command} ${args.join(' ')} ended with status ${status}:\n${stderr}`);
  const memory = [...found.values()].reduce((sum, value) => sum + value, 0);
  return { seconds: (performance.now() - begin) / 1000, memory };
}

function print(what, value, goal) {
  process.stdout.write(`${what.padEnd(58)} ${value.padStart(10)}   goal ${goal}\n`);
}

await script(async () => {
  process.stdout.write(
    `${cpus().length} × ${cpus()[0]?.model}, ${Math.round(totalmem() / MIB / 1024)} GiB, Node ${process.versions.node}\n`,
  );
  print("import 'nvmx', more than a bare Node", `${importCost().toFixed(0)} ms`, '40 ms');
  const cli = join(ROOT, 'dist/cli/main.js');
  const lab = ['test', '--machine', 'lab', 'apic-update', 'l2-switch'];
  await timed(process.execPath, [cli, ...lab, '--list']);
  const { seconds, memory } = await timed(process.execPath, [cli, ...lab]);
  print('nvmx test --machine lab, the two series tests, cached engine', `${seconds.toFixed(1)} s`, '45 s');
  print('  peak memory of all its processes together', `${Math.round(memory / MIB)} MiB`, '1536 MiB');
  const again = await timed('npm', ['start', '--', 'apic-update', 'l2-switch'], { cwd: ROOT });
  print('npm start, everything there', `${again.seconds.toFixed(1)} s`, '60 s');
  if (process.argv.includes('--fresh')) {
    const folder = mkdtempSync(join(tmpdir(), 'nvmx-fresh-'));
    try {
      spawnSync('git', ['clone', '-q', ROOT, join(folder, 'clone')]);
      const env = { ...process.env, NVMX_CACHE: join(folder, 'cache') };
      const args = ['start', '--', 'apic-update', 'l2-switch'];
      const fresh = await timed('npm', args, { cwd: join(folder, 'clone'), env });
      print('npm start in a fresh clone, empty caches', `${fresh.seconds.toFixed(0)} s`, '480 s');
    } finally {
      rmSync(folder, { recursive: true, force: true });
    }
  }
});
