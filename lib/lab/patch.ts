// SPDX-License-Identifier: Apache-2.0
import { LabError } from './errors.ts';
import type { Patch } from './mbox.ts';

/** A file of the tree: its bytes as latin1 text, and whether it may be executed. */
export interface TreeFile {
  readonly text: string;
  readonly executable: boolean;
}

/** What patches make of a tree: by path, the new file, or undefined for one that is removed. */
export type TreeChanges = ReadonlyMap<string, TreeFile | undefined>;

interface Hunk {
  readonly header: string;
  readonly line: number;
  readonly before: readonly string[];
  readonly after: readonly string[];
  /** As written, for the reader of a failure. */
  readonly text: readonly string[];
}

interface FileDiff {
  readonly from: string | undefined;
  readonly to: string | undefined;
  readonly mode: string | undefined;
  readonly hunks: readonly Hunk[];
  readonly isCopy: boolean;
  /** Without git's header: such a diff does not tell an empty file from none. */
  readonly isPlain: boolean;
}

const NOTHING_CHANGED = 'nothing was changed; check the order and the base of the series, or rebase it';

/**
 * Applies patches one after the other, as git am does: a hunk may have moved to other lines, but every line of its
 * context must be there. Nothing is written; the tree is read through `base`.
 *
 * @throws LabError that shows the hunk which does not fit
 */
export function applyPatches(
  patches: readonly Patch[],
  base: (path: string) => TreeFile | undefined,
): TreeChanges {
  const changed = new Map<string, TreeFile | undefined>();
  const current = (path: string): TreeFile | undefined =>
    changed.has(path) ? changed.get(path) : base(path);
  for (const patch of patches) {
    for (const file of parseDiff(patch)) {
      const old = file.from === undefined ? undefined : current(file.from);
      if (file.from !== undefined && !old)
        throw fails(patch, `${file.from} is not in this tree`, file.hunks[0]);
      const there = file.from === undefined && file.to !== undefined ? current(file.to) : undefined;
      if (there && !(file.isPlain && there.text === '')) {
        throw fails(patch, `${file.to} is already in this tree`, file.hunks[0]);
      }
      const text = applyHunks(patch, file, old?.text ?? '');
      if (file.from !== undefined && file.from !== file.to && !file.isCopy) changed.set(file.from, undefined);
      const executable = file.mode === undefined ? (old?.executable ?? false) : file.mode.endsWith('755');
      if (file.to !== undefined) changed.set(file.to, { text, executable });
    }
  }
  return changed;
}

function applyHunks(patch: Patch, file: FileDiff, text: string): string {
  const lines = splitKeepingEnds(text);
  const path = file.to ?? file.from ?? '';
  let shift = 0;
  let from = 0;
  for (const hunk of file.hunks) {
    const wanted = Math.max(0, hunk.line - 1) + shift;
    const at = findLines(lines, hunk.before, wanted, from);
    if (at === undefined) throw fails(patch, `${path}: ${hunk.header} does not fit`, hunk, lines, wanted);
    lines.splice(at, hunk.before.length, ...hunk.after);
    shift = at - wanted + shift + hunk.after.length - hunk.before.length;
    from = at + hunk.after.length;
  }
  return lines.join('');
}

/** The place nearest to `wanted`, not before `from`, where all the lines are. */
function findLines(
  lines: readonly string[],
  sought: readonly string[],
  wanted: number,
  from: number,
): number | undefined {
  const last = lines.length - sought.length;
  const fits = (at: number): boolean =>
    at >= from && at <= last && sought.every((line, index) => lines[at + index] === line);
  for (let distance = 0; distance <= Math.max(wanted, lines.length); distance++) {
    if (fits(wanted + distance)) return wanted + distance;
    if (fits(wanted - distance)) return wanted - distance;
  }
  return undefined;
}

function splitKeepingEnds(text: string): string[] {
  return text.match(/[^\n]*\n|[^\n]+$/g) ?? [];
}

const CONTEXT_SHOWN = 30;

function fails(patch: Patch, why: string, hunk?: Hunk, lines: readonly string[] = [], at = 0): LabError {
  const shown = hunk ? `\n${hunk.text.slice(0, CONTEXT_SHOWN).join('\n')}` : '';
  const around = lines.slice(at, at + (hunk?.before.length ?? 0)).map((line) => line.trimEnd());
  const there =
    around.length > 0 ? `\nthe tree has there:\n${around.slice(0, CONTEXT_SHOWN).join('\n')}` : '';
  return new LabError(
    `the patch "${patch.subject}" does not apply`,
    `${why} (${patch.origin})${shown}${there}`,
    NOTHING_CHANGED,
  );
}

export function parseDiff(patch: Patch): FileDiff[] {
  const lines = patch.diff.split('\n');
  const files: FileDiff[] = [];
  let index = 0;
  const peek = (): string => lines[index] ?? '';
  const unusable = (why: string): LabError =>
    new LabError(`the patch "${patch.subject}" cannot be read`, `${why} (${patch.origin})`, NOTHING_CHANGED);
  while (index < lines.length) {
    const isGit = peek().startsWith('diff --git ');
    if (!isGit && !(peek().startsWith('--- ') && lines[index + 1]?.startsWith('+++ '))) {
      index++;
      continue;
    }
    const names = /^diff --git a\/(.+) b\/(.+)$/.exec(peek());
    let from: string | undefined = names?.[1];
    let to: string | undefined = names?.[2];
    let mode: string | undefined;
    let isCopy = false;
    if (isGit) index++;
    for (; index < lines.length && !/^(@@ |diff --git )/.test(peek()); index++) {
      const line = peek();
      if (line.startsWith('GIT binary patch') || line.startsWith('Binary files '))
        throw unusable(`${to} is a binary patch`);
      mode = /^new (?:file )?mode (\d+)$/.exec(line)?.[1] ?? mode;
      if (line.startsWith('new file mode ')) from = undefined;
      if (line.startsWith('deleted file mode ')) to = undefined;
      if (/^copy from /.test(line)) isCopy = true;
      from = /^(?:rename|copy) from (.+)$/.exec(line)?.[1] ?? from;
      to = /^(?:rename|copy) to (.+)$/.exec(line)?.[1] ?? to;
      if (line.startsWith('--- ')) from = diffName(line);
      if (line.startsWith('+++ ')) {
        to = diffName(line);
        index++;
        break;
      }
      if (line.startsWith('-- ') || (line === '--' && isGit)) break;
    }
    const hunks: Hunk[] = [];
    while (peek().startsWith('@@ ')) {
      const read = readHunk(lines, index);
      if (!read) throw unusable(`${to ?? from}: the hunk ${peek()} is cut off`);
      hunks.push(read.hunk);
      index = read.next;
    }
    // "diff -N" names a file that is on one side only on both.
    if (!isGit && hunks.length === 1) {
      if (hunks[0]!.before.length === 0) from = undefined;
      if (hunks[0]!.after.length === 0) to = undefined;
    }
    for (const path of [from, to]) {
      if (path !== undefined && (path.startsWith('/') || path.split('/').includes('..')))
        throw unusable(`${path} leaves the tree`);
    }
    files.push({ from, to, mode, hunks, isCopy, isPlain: !isGit });
  }
  return files;
}

/** `--- a/path` with an optional time behind a tab; /dev/null is no file. */
function diffName(line: string): string | undefined {
  const name = line.slice(4).split('\t')[0]!.trimEnd();
  return name === '/dev/null' ? undefined : name.replace(/^[^/]+\//, '');
}

function readHunk(lines: readonly string[], start: number): { hunk: Hunk; next: number } | undefined {
  const header = lines[start]!;
  const sizes = /^@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@/.exec(header);
  if (!sizes) return undefined;
  let [oldLeft, newLeft] = [Number(sizes[2] ?? 1), Number(sizes[3] ?? 1)];
  const before: string[] = [];
  const after: string[] = [];
  let index = start + 1;
  for (; oldLeft > 0 || newLeft > 0; index++) {
    const line = lines[index];
    if (line === undefined) return undefined;
    const body = `${line.slice(1)}\n`;
    // Mail programs take the blank off an empty line of context.
    const sign = line === '' ? ' ' : line[0];
    if (sign === '\\') dropLineEnd(lines[index - 1], before, after);
    else if (sign === ' ' || sign === '-' || sign === '+') {
      if (sign !== '+') before.push(body);
      if (sign !== '-') after.push(body);
      if (sign !== '+') oldLeft--;
      if (sign !== '-') newLeft--;
    } else return undefined;
  }
  if (lines[index]?.startsWith('\\')) dropLineEnd(lines[index++ - 1], before, after);
  const line = Number(sizes[1]) + (sizes[2] === '0' ? 1 : 0);
  const shown = /^@@.*?@@/.exec(header)![0];
  return { hunk: { header: shown, line, before, after, text: lines.slice(start, index) }, next: index };
}

/** "\ No newline at end of file" speaks of the line before it. */
function dropLineEnd(previous: string | undefined, before: string[], after: string[]): void {
  for (const [signs, list] of [[' -', before] as const, [' +', after] as const]) {
    const last = list.length - 1;
    if (previous !== undefined && signs.includes(previous[0] ?? ' ') && last >= 0)
      list[last] = list[last]!.replace(/\n$/, '');
  }
}
