// SPDX-License-Identifier: Apache-2.0
// The public surface of a part of the package, read from its source: what its index exports, and the members of the
// classes among them. Private names and what says @internal are not public.
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const lib = fileURLToPath(new URL('../../lib/', import.meta.url));

export interface Export {
  readonly name: string;
  readonly isType: boolean;
  /** Where it is defined, below lib/. */
  readonly file: string;
}

/** `export { a, type B } from './c.ts'` and `export type { … }`, of an index. */
export function exportsOf(index: string, folder: string): Export[] {
  const statements = /^export (type )?\{([^}]*)\} from '\.\/([^']+)';/gm;
  return [...index.matchAll(statements)].flatMap(([, allTypes, names, file]) =>
    names!
      .split(',')
      .map((name) => name.trim())
      .filter((name) => name !== '')
      .map((name) => ({
        name: name.replace(/^type /, ''),
        isType: allTypes !== undefined || name.startsWith('type '),
        file: join(folder, file!),
      })),
  );
}

const MEMBER =
  /^ {2}(?:(?:static|override|abstract|async|readonly|get|set) )*(?:\*)?([A-Za-z]\w*)(?=\??[:(<]|;)/;
const HIDDEN = /^ {2}(?:(?:protected|private) |(?:readonly |async |static )*#)/;

/** A class that `source` has, and the source of its base: what `visit` gives for both, or undefined. */
function ofClass<T>(
  source: string,
  name: string,
  read: (file: string) => string,
  visit: (lines: readonly string[]) => T[],
): T[] | undefined {
  const lines = source.split('\n');
  const start = lines.findIndex((line) => new RegExp(`^export (abstract )?class ${name}\\b`).test(line));
  if (start < 0) return undefined;
  const its = lines.slice(start + 1, lines.indexOf('}', start));
  const base = /extends (\w+)/.exec(lines[start]!)?.[1];
  const from =
    base && new RegExp(`import \\{[^}]*\\b${base}\\b[^}]*\\} from '\\./([^']+)'`).exec(source)?.[1];
  const inherited = base ? ofClass(from ? read(from) : source, base, read, visit) : [];
  return [...visit(its), ...(inherited ?? [])];
}

/** Names of the public members of a class, its own and its base's, or undefined when `source` has no such class. */
export function membersOf(
  source: string,
  name: string,
  read: (file: string) => string,
): string[] | undefined {
  const members = ofClass(source, name, read, (lines) => {
    const names: string[] = [];
    let comment = '';
    for (const line of lines) {
      if (/^ {2}\/\*\*/.test(line)) comment = '';
      if (/^ {2} ?[/*]/.test(line)) comment += line;
      else if (/^ {2}\S/.test(line)) {
        const member = HIDDEN.test(line) ? undefined : MEMBER.exec(line)?.[1];
        if (member && member !== 'constructor' && !comment.includes('@internal')) names.push(member);
        comment = '';
      }
    }
    return names;
  });
  return members && [...new Set(members)];
}

/** The arguments in the parentheses that open at `open`: up to the commas that are in no others. */
export function argumentsAt(text: string, open: number): string[] {
  const found: string[] = [];
  let depth = 0;
  let from = open + 1;
  for (let at = open; at < text.length; at++) {
    if ('([{<'.includes(text[at]!)) depth++;
    const isArrow = text[at] === '>' && text[at - 1] === '=';
    if (')]}>'.includes(text[at]!) && !isArrow) depth--;
    if (depth === 0 || (depth === 1 && text[at] === ',')) {
      found.push(text.slice(from, at).trim());
      from = at + 1;
    }
    if (depth === 0) break;
  }
  return found.filter((argument) => argument !== '');
}

/** An argument's name, or '' for one that has none: an object, a function, the rest. */
const nameOf = (argument: string) => /^\w+/.exec(argument)?.[0] ?? '';

/** Names of a class's methods that take something, and of what they take. */
export function signaturesOf(
  source: string,
  name: string,
  read: (file: string) => string,
): Map<string, string[]> {
  const found = ofClass(source, name, read, (lines) => {
    const text = lines.join('\n');
    const methods = text.matchAll(
      /^ {2}(?:(?:static|override|abstract|async) )*\*?([a-z]\w*)(?:<[^(]*>)?\(/gm,
    );
    return [...methods].map((match) => {
      const parameters = argumentsAt(text, match.index + match[0].length - 1).map(nameOf);
      return [match[1]!, parameters] as const;
    });
  });
  return new Map((found ?? []).filter(([, parameters]) => parameters.length > 0).reverse());
}

export interface Surface {
  /** `name`, and `Class.member` for the members of classes. */
  readonly calls: readonly string[];
  /** Types that are no classes. */
  readonly types: readonly string[];
  /** What the public methods among the calls take: `Class.method` to names. */
  readonly signatures: ReadonlyMap<string, readonly string[]>;
}

export function surfaceOf(folder: string): Surface {
  const read = (file: string) => readFileSync(join(lib, file), 'utf8');
  const calls: string[] = [];
  const types: string[] = [];
  const signatures = new Map<string, readonly string[]>();
  for (const { name, isType, file } of exportsOf(read(`${folder}/index.ts`), folder)) {
    const near = (other: string) => read(join(folder, other));
    const members = membersOf(read(file), name, near);
    const taken = signaturesOf(read(file), name, near);
    for (const member of members ?? [])
      if (taken.has(member)) signatures.set(`${name}.${member}`, taken.get(member)!);
    if (members) calls.push(name, ...members.map((member) => `${name}.${member}`));
    else (isType ? types : calls).push(name);
  }
  return { calls, types, signatures };
}

const codeOf = (page: string) => [...page.matchAll(/```[\s\S]*?```|`[^`\n]+`|^#.*$/gm)].map(([text]) => text);

/** Every identifier that a page has in its headings and its code: spans and blocks. */
export function namesIn(page: string): Set<string> {
  return new Set(codeOf(page).flatMap((text) => text.match(/[A-Za-z_]\w*/g) ?? []));
}

/** What of a surface a page does not have. */
export function missing(names: readonly string[], page: string): string[] {
  const known = namesIn(page);
  return names.filter((name) => !known.has(name.split('.').at(-1)!));
}

/** Methods that a page nowhere calls with as many arguments as they take, each by its name (or as an object). */
export function misnamed(signatures: Surface['signatures'], page: string): string[] {
  const code = codeOf(page);
  return [...signatures].flatMap(([method, parameters]) => {
    const name = method.split('.').at(-1)!;
    const calls = code.flatMap((text) =>
      [...text.matchAll(new RegExp(`\\b${name}\\(`, 'g'))].map(({ index }) =>
        argumentsAt(text, index + name.length).map(nameOf),
      ),
    );
    const isRight = (call: string[]) =>
      call.length === parameters.length &&
      call.every((given, at) => given === '' || given === parameters[at]);
    return calls.some(isRight) ? [] : [`${method}(${parameters.join(', ')})`];
  });
}

/** The entries of a page: rows of tables, items of lists, paragraphs. */
export function entriesOf(page: string): string[] {
  return page.split(/\n(?=\||\* |\n)/);
}
