// SPDX-License-Identifier: Apache-2.0
import { SNAPSHOT_PAGE } from './engine_source.ts';

/** What the machine's init says on the program's line, each after a mark that the program cannot know. */
export type InitWord = 'ready' | 'no-kvm' | 'exit' | 'file' | 'file-end' | 'no-file';

/** Folder inside the machine that holds the package; the program starts there. */
export const PACKAGE_FOLDER = '/nvmx';
/** Where a job lies in the machine: its files as a compressed archive; then its script. */
export const JOB_ARCHIVE = '/job.cpio.gz';
export const JOB_SCRIPT = '/job/start';
/** What a waiting Node reads, and where from. */
export const JOB_FOR_NODE = '/job/node.json';
const JOB_PIPE = '/tmp/job';
/** Where a machine that continues from a snapshot finds its job: a line with this word and a length, the archive. */
export const JOB_ROM = { address: 0xd0000, bytes: SNAPSHOT_PAGE - 0xd0000, word: 'nvmx-job' } as const;

export function quote(text: string): string {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** A line of init: the mark, then a word, then what belongs to it. */
export function parseMark(line: string, mark: string): { word: InitWord; rest: string } | undefined {
  if (!line.startsWith(`${mark} `)) return undefined;
  const [word, ...rest] = line.slice(mark.length + 1).split(' ');
  return { word: word as InitWord, rest: rest.join(' ') };
}

/**
 * The first process of the machine, for busybox's shell. com1 is the kernel's console and the program's stderr,
 * com2 its stdout. Parameters named on the kernel's command line (kvm_intel.nested=1) are passed on to modules.
 * Nothing here belongs to a job: a snapshot is asked for when all of this is done, and a machine that continues
 * from one finds its job where a ROM would be.
 *
 * @param waiting command of a Node that loads what jobs need and then waits for one
 */
export function initScript(waiting?: readonly string[]): string {
  const page = (address: number): number => address / 4096;
  const wait = waiting
    ? `mkfifo ${JOB_PIPE} /tmp/loaded
NVMX_WAIT=${JOB_PIPE} ${waiting.map(quote).join(' ')} </dev/null >/dev/ttyS1 3>/tmp/loaded &
node=$!
read -r _ </tmp/loaded || node=
rm /tmp/loaded
`
    : '';
  return `#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin:/sbin:/usr/sbin HOME=/root TERM=dumb NVMX_IN_LAB=1 NO_COLOR=1
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs tmp /tmp
mount -t devpts pts /dev/pts 2>/dev/null
mount -t debugfs debug /sys/kernel/debug 2>/dev/null
mount -t tracefs trace /sys/kernel/tracing 2>/dev/null
ulimit -c 0
stty -F /dev/ttyS1 115200 raw -echo
parameters() {
  for word in $(cat /proc/cmdline); do
    case $word in "$1".*) echo "\${word#*.}";; esac
  done
}
# With its signature only where the kernel insists on one: checking it takes longer than all the rest of it.
load() {
  signature=\${1%.ko}.signature
  [ -f "$signature" ] || { insmod "$@"; return; }
  insmod "$@" 2>/dev/null || { cat "$signature" >>"$1" && insmod "$@"; }
}
while read -r module; do
  load "/modules/$module.ko" $(parameters "$module") || echo "nvmx: $module could not be loaded"
done </modules/order
[ -b /dev/ram0 ] && mkswap /dev/ram0 >/dev/null && swapon /dev/ram0
cd ${PACKAGE_FOLDER}
node=
${wait}rom() { dd if=/dev/mem bs=4096 skip=${page(JOB_ROM.address)} count=${page(JOB_ROM.bytes)} 2>/dev/null; }
if rom >/dev/null; then
  printf 1 | dd of=/dev/mem bs=4096 seek=${page(SNAPSHOT_PAGE)} conv=notrunc 2>/dev/null
  rom | { read -r word length; [ "$word" = ${JOB_ROM.word} ] && head -c "$length" >${JOB_ARCHIVE}; }
fi
zcat ${JOB_ARCHIVE} | (cd / && cpio -idu 2>/dev/null)
rm ${JOB_ARCHIVE}
. ${JOB_SCRIPT}
`;
}

export interface InitJob {
  readonly mark: string;
  /** Program and arguments; none for the Node that waits. */
  readonly command?: readonly string[] | undefined;
  readonly env: Readonly<Record<string, string>>;
  /** Seconds since 1970: what time it is now. */
  readonly time?: number | undefined;
  /** Files to send out when the program has ended, by their place inside. */
  readonly fetch?: readonly string[];
  /** com2 is somebody's terminal; then the marks go to the console. */
  readonly terminal?: { readonly rows: number; readonly columns: number } | undefined;
}

/**
 * How the first process goes on with one job.
 * Closing a serial line waits until its last byte is out, so nothing is lost when the power goes.
 */
export function jobScript(job: InitJob): string {
  const exports = Object.entries(job.env).map(([name, value]) => `export ${name}=${quote(value)}`);
  return `say() { printf '\\n${job.mark} %s\\n' "$*" >${job.terminal ? '/dev/console' : '/dev/ttyS1'}; }
# A process that was left behind holds the line open: only this waits for its last byte.
finish() { say "$@"; stty -F /dev/ttyS1 -echo; exec poweroff -f; }
send() {
  [ -f "$2" ] || { say no-file "$1"; return; }
  say file "$1"
  base64 "$2" >/dev/ttyS1
  say file-end "$(wc -c <"$2")"
}
${job.time === undefined ? '' : `date -s @${job.time} >/dev/null`}
[ -c /dev/kvm ] || finish no-kvm
${exports.join('\n')}
say ready "$(cut -d' ' -f1 /proc/uptime)"
${start(job)}
status=$?
${(job.fetch ?? []).map((path, index) => `send ${index} ${quote(path)}`).join('\n')}
finish exit $status
`;
}

function start({ command, terminal }: InitJob): string {
  if (!command) return `[ -n "$node" ] && { cat ${JOB_FOR_NODE} >${JOB_PIPE}; wait $node; }`;
  const program = command.map(quote).join(' ');
  if (!terminal) return `${program} </dev/null >/dev/ttyS1`;
  // The first terminal that a session's leader opens is its controlling terminal: Ctrl-C works.
  return `export TERM=linux
setsid sh -c 'exec </dev/ttyS1 >/dev/ttyS1 2>&1
  stty 115200 sane rows ${terminal.rows} cols ${terminal.columns}
  exec "$@"' sh ${program}`;
}
