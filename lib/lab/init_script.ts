// SPDX-License-Identifier: Apache-2.0

/** What the machine's init says on the program's line, each after a mark that the program cannot know. */
export type InitWord = 'ready' | 'no-kvm' | 'exit' | 'file' | 'file-end' | 'no-file';

/** Folder inside the machine that holds the package; the program starts there. */
export const PACKAGE_FOLDER = '/nvmx';

export function quote(text: string): string {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** A line of init: the mark, then a word, then what belongs to it. */
export function parseMark(line: string, mark: string): { word: InitWord; rest: string } | undefined {
  if (!line.startsWith(`${mark} `)) return undefined;
  const [word, ...rest] = line.slice(mark.length + 1).split(' ');
  return { word: word as InitWord, rest: rest.join(' ') };
}

export interface InitJob {
  readonly mark: string;
  /** Program and arguments. */
  readonly command: readonly string[];
  readonly env: Readonly<Record<string, string>>;
  /** Files to send out when the program has ended, by their place inside. */
  readonly fetch?: readonly string[];
  /** com2 is somebody's terminal; then the marks go to the console. */
  readonly terminal?: { readonly rows: number; readonly columns: number } | undefined;
}

/**
 * The first process of the machine, for busybox's shell. com1 is the kernel's console and the program's stderr,
 * com2 its stdout. Parameters named on the kernel's command line (kvm_intel.nested=1) are passed on to modules.
 * Closing a serial line waits until its last byte is out, so nothing is lost when the power goes.
 */
export function initScript(job: InitJob): string {
  const exports = Object.entries(job.env).map(([name, value]) => `export ${name}=${quote(value)}`);
  const program = job.command.map(quote).join(' ');
  const start = job.terminal
    ? // The first terminal that a session's leader opens is its controlling terminal: Ctrl-C works.
      `export TERM=linux
setsid sh -c 'exec </dev/ttyS1 >/dev/ttyS1 2>&1
  stty 115200 sane rows ${job.terminal.rows} cols ${job.terminal.columns}
  exec "$@"' sh ${program}`
    : `${program} </dev/null >/dev/ttyS1`;
  return `#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin:/sbin:/usr/sbin HOME=/root TERM=dumb
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
say() { printf '\\n${job.mark} %s\\n' "$*" >${job.terminal ? '/dev/console' : '/dev/ttyS1'}; }
# A process that was left behind holds the line open: only this waits for its last byte.
finish() { say "$@"; stty -F /dev/ttyS1 -echo; exec poweroff -f; }
send() {
  [ -f "$2" ] || { say no-file "$1"; return; }
  say file "$1"
  base64 "$2" >/dev/ttyS1
  say file-end "$(wc -c <"$2")"
}
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
[ -c /dev/kvm ] || finish no-kvm
cd ${PACKAGE_FOLDER}
${exports.join('\n')}
say ready "$(cut -d' ' -f1 /proc/uptime)"
${start}
status=$?
${(job.fetch ?? []).map((path, index) => `send ${index} ${quote(path)}`).join('\n')}
finish exit $status
`;
}
