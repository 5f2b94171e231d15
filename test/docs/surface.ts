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

/** Names of the public members of a class, its own and its base's, or undefined when `source` has no such class. */
export function membersOf(
  source: string,
  name: string,
  read: (file: string) => string,
): string[] | undefined {
  const lines = source.split('\n');
  const start = lines.findIndex((line) => new RegExp(`^export (abstract )?class ${name}\\b`).test(line));
  if (start < 0) return undefined;
  const names = new Set<string>();
  let comment = '';
  for (const line of lines.slice(start + 1)) {
    if (line === '}') break;
    if (/^ {2}\/\*\*/.test(line)) comment = '';
    if (/^ {2} ?[/*]/.test(line)) comment += line;
    else if (/^ {2}\S/.test(line)) {
      const member = HIDDEN.test(line) ? undefined : MEMBER.exec(line)?.[1];
      if (member && member !== 'constructor' && !comment.includes('@internal')) names.add(member);
      comment = '';
    }
  }
  const base = /extends (\w+)/.exec(lines[start]!)?.[1];
  const from =
    base && new RegExp(`import \\{[^}]*\\b${base}\\b[^}]*\\} from '\\./([^']+)'`).exec(source)?.[1];
  const inherited = base && membersOf(from ? read(from) : source, base, read);
  return [...names, ...(inherited ?? [])];
}

export interface Surface {
  /** `name`, and `Class.member` for the members of classes. */
  readonly calls: readonly string[];
  /** Types that are no classes. */
  readonly types: readonly string[];
}

export function surfaceOf(folder: string): Surface {
  const read = (file: string) => readFileSync(join(lib, file), 'utf8');
  const calls: string[] = [];
  const types: string[] = [];
  for (const { name, isType, file } of exportsOf(read(`${folder}/index.ts`), folder)) {
    const members = membersOf(read(file), name, (other) => read(join(folder, other)));
    if (members) calls.push(name, ...members.map((member) => `${name}.${member}`));
    else (isType ? types : calls).push(name);
  }
  return { calls, types };
}

/** Every identifier that a page has in its headings and its code: spans and blocks. */
export function namesIn(page: string): Set<string> {
  const code = [...page.matchAll(/```[\s\S]*?```|`[^`\n]+`|^#.*$/gm)].map(([text]) => text);
  return new Set(code.flatMap((text) => text.match(/[A-Za-z_]\w*/g) ?? []));
}

/** What of a surface a page does not have. */
export function missing(names: readonly string[], page: string): string[] {
  const known = namesIn(page);
  return names.filter((name) => !known.has(name.split('.').at(-1)!));
}
