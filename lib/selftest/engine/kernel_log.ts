// SPDX-License-Identifier: Apache-2.0
import { closeSync, constants, openSync, readFileSync, readSync } from 'node:fs';

/** Messages that mean the kernel found itself in the wrong, whatever the test's own oracle says. */
const PROBLEM =
  /\b(BUG:|WARNING: (?!.*deprecated)|Oops|general protection fault|kernel NULL pointer|unable to handle|possible recursive locking|possible circular locking|inconsistent lock state|sleeping function called|scheduling while atomic|rcu: INFO|soft lockup|hung_task|blocked for more than|refcount_t:|KASAN:|UBSAN:)/;

/**
 * The host's kernel log and taint between two points in time. Reads /dev/kmsg, one record a read, and never
 * blocks; where the log may not be read, {@link readable} is false and only the taint is watched.
 */
export class KernelLog implements Disposable {
  readonly #fd: number | undefined;
  readonly #buffer = new Uint8Array(8192);
  #taint = readTaint();

  constructor() {
    try {
      this.#fd = openSync('/dev/kmsg', constants.O_RDONLY | constants.O_NONBLOCK);
      this.#drain();
    } catch {
      this.#fd = undefined;
    }
  }

  get readable(): boolean {
    return this.#fd !== undefined;
  }

  /** What was logged since the last call; `problems` are the lines of it that mean trouble, and new taint bits. */
  take(): { lines: string[]; problems: string[] } {
    const lines = this.#drain();
    const problems = lines.filter((line) => PROBLEM.test(line));
    const taint = readTaint();
    if (taint !== this.#taint) problems.push(`kernel taint changed from ${this.#taint} to ${taint}`);
    this.#taint = taint;
    return { lines, problems };
  }

  #drain(): string[] {
    const lines: string[] = [];
    while (this.#fd !== undefined) {
      let length: number;
      try {
        length = readSync(this.#fd, this.#buffer, 0, this.#buffer.length, null);
      } catch (error) {
        // EPIPE: records were overwritten before we came; the next read goes on at the oldest one left.
        if ((error as NodeJS.ErrnoException).code === 'EPIPE') continue;
        break;
      }
      if (length === 0) break;
      const record = Buffer.from(this.#buffer.subarray(0, length)).toString('utf8');
      // "priority,sequence,time,flags;text", then indented key=value lines.
      lines.push(record.slice(record.indexOf(';') + 1).split('\n', 1)[0] ?? '');
    }
    return lines;
  }

  [Symbol.dispose](): void {
    if (this.#fd !== undefined) closeSync(this.#fd);
  }
}

function readTaint(): string {
  try {
    return readFileSync('/proc/sys/kernel/tainted', 'utf8').trim();
  } catch {
    return 'unknown';
  }
}
