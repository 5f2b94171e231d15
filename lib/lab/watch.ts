// SPDX-License-Identifier: Apache-2.0
import { spawn } from 'node:child_process';
import { type FileHandle, open } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { CONSOLE_FILE, OUTPUT_FILE } from './bochs.ts';
import { type InitWord, parseMark } from './init_script.ts';
import { cpuTicks, splitLines, stopGroup } from './process.ts';

/** How the emulator's run ended, seen from outside. */
export type Ending =
  | { kind: 'exited'; status: number }
  | { kind: 'no-kvm' }
  | { kind: 'panic'; why: string }
  | { kind: 'powered-off'; why: string }
  | { kind: 'hang'; why: string }
  | { kind: 'timeout'; why: string }
  | { kind: 'engine-failed'; why: string; before: 'boot' | 'exit' }
  | { kind: 'aborted' };

/** `gone`: the emulator ended after the kernel spoke and before init did; its log says why. */
export type SeenEnding = Ending | { kind: 'gone' };

export interface Watched<E = SeenEnding> {
  readonly ending: E;
  readonly console: string;
  /** Until init started the program. */
  readonly bootMs: number | undefined;
  /** Files that the machine sent, by their number in the job. */
  readonly files: ReadonlyMap<number, Buffer>;
}

export interface WatchOptions {
  readonly mark: string;
  /** Init speaks on the console, because com2 is somebody's terminal. */
  readonly marksOnConsole?: boolean;
  /** CPU time of the emulator; a busy host starves it, which is no fault of the machine's. */
  readonly bootLimitMs: number;
  /** CPU time of the emulator. */
  readonly silenceMs: number;
  /** CPU time of the emulator: the program prints a line at least so often, from its first line on. */
  readonly heartbeatMs?: number | undefined;
  /** Wall time. */
  readonly timeoutMs: number;
  readonly signal?: AbortSignal | undefined;
  /** Init has its job; what the console said until then. */
  readonly onReady?: (console: string) => void;
  readonly onLine?: ((line: string) => void) | undefined;
  readonly onConsole?: ((chunk: string) => void) | undefined;
}

const POLL_MS = 40;
/** By the wall: no CPU time for so long means that the emulator is stuck itself. */
const STUCK_MS = 10_000;
const TICK_MS = 10;
/** A panic's text has ended when nothing more came for so long. */
const PANIC_SILENCE_MS = 1_500;
const PANIC_TEXT_MS = 20_000;
/** From the program's end to the power-off. */
const POWER_OFF_MS = 10_000;

/** Runs the emulator in a folder prepared for it, follows its two serial lines, and stops it when it must. */
export async function watchMachine(
  command: readonly string[],
  folder: string,
  options: WatchOptions,
): Promise<Watched> {
  const began = performance.now();
  const child = spawn(command[0]!, command.slice(1), { cwd: folder, stdio: 'ignore', detached: true });
  let failure: Error | undefined;
  let gone = false;
  child.once('error', (error) => {
    failure = error;
    gone = true;
  });
  child.once('exit', () => {
    gone = true;
  });
  const lines = new MachineOutput(options);
  const consoleFile = new Tail(join(folder, CONSOLE_FILE));
  const outputFile = new Tail(join(folder, OUTPUT_FILE));
  const clocks = new Clocks(began, options);
  try {
    for (;;) {
      const ended = gone;
      const fresh = [await outputFile.read(), await consoleFile.read()] as const;
      lines.output(fresh[0]);
      lines.consoleBytes(fresh[1]);
      if (failure) throw failure;
      if (fresh[0].length + fresh[1].length > 0) clocks.sign();
      const ending = ended
        ? lines.endingWhenGone()
        : options.signal?.aborted
          ? abortedEnding
          : clocks.judge(lines, child.pid);
      if (ending) return { ending, console: lines.console, bootMs: lines.bootMs, files: lines.files };
      await sleep(POLL_MS);
    }
  } finally {
    await stopGroup(child);
    await Promise.all([consoleFile.close(), outputFile.close()]);
  }
}

const abortedEnding: Ending = { kind: 'aborted' };

/** What came over the serial lines so far. */
class MachineOutput {
  readonly #options: WatchOptions;
  readonly #began = performance.now();
  readonly #split: (chunk: Buffer) => void;
  readonly #splitConsole: (chunk: Buffer) => void;
  readonly #decoder = new TextDecoder();
  #file: { readonly index: number; readonly lines: string[] } | undefined;
  readonly files = new Map<number, Buffer>();
  #emptyLines = 0;
  console = '';
  ready = false;
  /** Lines of the program so far. */
  lines = 0;
  bootMs: number | undefined;
  said: Ending | undefined;
  panickedAt: number | undefined;

  constructor(options: WatchOptions) {
    this.#options = options;
    this.#split = splitLines((line) => this.#line(line));
    this.#splitConsole = splitLines((line) => {
      const mark = parseMark(line, options.mark);
      if (mark) this.#heed(mark);
    });
  }

  output(chunk: Buffer): void {
    if (chunk.length > 0) this.#split(chunk);
  }

  consoleBytes(chunk: Buffer): void {
    if (chunk.length === 0) return;
    const text = this.#decoder.decode(chunk, { stream: true });
    this.console += text;
    if (this.#options.marksOnConsole) this.#splitConsole(chunk);
    this.#options.onConsole?.(text);
    if (/Kernel panic - not syncing/.test(this.console)) this.panickedAt ??= performance.now();
  }

  // Init writes an empty line before its mark, in case the program's last line had no end.
  #line(line: string): void {
    const mark = parseMark(line, this.#options.mark);
    if (!mark) {
      if (!this.ready) return;
      this.lines++;
      if (this.#file) this.#file.lines.push(line);
      else if (line === '') this.#emptyLines++;
      else {
        this.#flushEmpty(0);
        this.#options.onLine?.(line);
      }
      return;
    }
    this.#flushEmpty(1);
    this.#heed(mark);
  }

  #heed(mark: { word: InitWord; rest: string }): void {
    if (mark.word === 'file') this.#file = { index: Number(mark.rest), lines: [] };
    else if (mark.word === 'no-file') this.#file = undefined;
    else if (mark.word === 'file-end') {
      const bytes = Buffer.from(this.#file?.lines.join('') ?? '', 'base64');
      if (this.#file && bytes.length === Number(mark.rest)) this.files.set(this.#file.index, bytes);
      this.#file = undefined;
    } else if (mark.word === 'ready') {
      this.ready = true;
      this.bootMs = performance.now() - this.#began;
      this.#options.onReady?.(this.console);
    } else {
      this.said ??= mark.word === 'exit' ? { kind: 'exited', status: Number(mark.rest) } : { kind: 'no-kvm' };
    }
  }

  #flushEmpty(keep: number): void {
    for (; this.#emptyLines > keep; this.#emptyLines--) this.#options.onLine?.('');
    this.#emptyLines = 0;
  }

  endingWhenGone(): SeenEnding {
    if (this.said) return this.said;
    if (this.panickedAt !== undefined) return { kind: 'panic', why: panicLine(this.console) };
    if (!this.ready && this.console === '') {
      return { kind: 'engine-failed', why: 'it ended before the kernel said anything', before: 'boot' };
    }
    return { kind: 'gone' };
  }
}

function panicLine(text: string): string {
  return /Kernel panic - not syncing.*/.exec(text)?.[0].trim() ?? 'the kernel panicked';
}

/**
 * Decides when enough time has passed. The emulator works all the time, idle guest or not, so its CPU time tells how
 * far the machine could have come: a limit in it means the same on a busy host.
 */
class Clocks {
  readonly #options: WatchOptions;
  readonly #began: number;
  /** Of the last byte: by the wall, and in the emulator's CPU time. */
  #lastSign: number;
  #lastSignCpu = 0;
  #lines = 0;
  #lastLineCpu = 0;
  #cpuMs = 0;
  #cpuAt: number;
  #saidAt: number | undefined;

  constructor(began: number, options: WatchOptions) {
    this.#began = began;
    this.#options = options;
    this.#lastSign = began;
    this.#cpuAt = began;
  }

  sign(): void {
    this.#lastSign = performance.now();
    this.#lastSignCpu = this.#cpuMs;
  }

  judge(lines: MachineOutput, pid: number | undefined): Ending | undefined {
    const now = performance.now();
    const { bootLimitMs, silenceMs, heartbeatMs, timeoutMs } = this.#options;
    this.#look(now, pid, lines);
    if (lines.said) {
      this.#saidAt ??= now;
      return now - this.#saidAt > POWER_OFF_MS ? lines.said : undefined;
    }
    if (lines.panickedAt !== undefined) {
      const through = now - this.#lastSign > PANIC_SILENCE_MS || now - lines.panickedAt > PANIC_TEXT_MS;
      return through ? { kind: 'panic', why: panicLine(lines.console) } : undefined;
    }
    if (now - this.#began > timeoutMs)
      return { kind: 'timeout', why: `it ran longer than ${seconds(timeoutMs)}` };
    if (!lines.ready && this.#cpuMs > bootLimitMs) {
      return { kind: 'hang', why: `it did not finish booting in ${seconds(bootLimitMs)}` };
    }
    if (lines.ready && this.#cpuMs - this.#lastSignCpu > silenceMs) {
      return { kind: 'hang', why: `it gave no sign of life for ${seconds(silenceMs)}` };
    }
    if (heartbeatMs !== undefined && lines.lines > 0 && this.#cpuMs - this.#lastLineCpu > heartbeatMs) {
      return { kind: 'hang', why: `the program in it gave no sign of life for ${seconds(heartbeatMs)}` };
    }
    if (now - this.#cpuAt < STUCK_MS) return undefined;
    const before = lines.ready ? 'exit' : 'boot';
    return { kind: 'engine-failed', why: 'the emulator stopped working', before };
  }

  #look(now: number, pid: number | undefined, { lines }: MachineOutput): void {
    const cpuMs = pid === undefined ? 0 : cpuTicks(pid) * TICK_MS;
    if (cpuMs > this.#cpuMs) {
      this.#cpuMs = cpuMs;
      this.#cpuAt = now;
    }
    if (lines !== this.#lines) {
      this.#lines = lines;
      this.#lastLineCpu = this.#cpuMs;
    }
  }
}

function seconds(ms: number): string {
  return `${Math.round(ms / 1000)} s`;
}

/** Reads what was added to a file since the last time; the file may not be there yet. */
class Tail {
  readonly #path: string;
  #file: FileHandle | undefined;
  #position = 0;

  constructor(path: string) {
    this.#path = path;
  }

  async read(): Promise<Buffer> {
    this.#file ??= await open(this.#path, 'r').catch(() => undefined);
    const chunks: Buffer[] = [];
    while (this.#file) {
      const { bytesRead, buffer } = await this.#file.read(Buffer.alloc(65_536), 0, 65_536, this.#position);
      if (bytesRead === 0) break;
      this.#position += bytesRead;
      chunks.push(buffer.subarray(0, bytesRead));
    }
    return Buffer.concat(chunks);
  }

  async close(): Promise<void> {
    await this.#file?.close();
  }
}
