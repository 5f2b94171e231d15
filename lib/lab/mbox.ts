// SPDX-License-Identifier: Apache-2.0
import { readFileSync } from 'node:fs';
import { gunzipSync } from 'node:zlib';
import { LabError } from './errors.ts';

/** One patch of a series. */
export interface Patch {
  /** Its subject, or the name of the file when it is a bare diff. */
  readonly subject: string;
  /** The file it was read from. */
  readonly origin: string;
  /** From the first `diff --git` or `---` line on. */
  readonly diff: string;
}

const ADVICE = 'give patches as git format-patch or b4 am writes them, an mbox of them, or unified diffs';
// Byte by byte: a patch may hold any encoding, and what is not touched must come out unchanged.
const BYTES = 'latin1';

/** @throws LabError when a file cannot be read or holds no patch */
export function readPatches(paths: readonly string[]): Patch[] {
  return paths.flatMap((path) => {
    let bytes: Buffer;
    try {
      bytes = readFileSync(path);
      if (bytes[0] === 0x1f && bytes[1] === 0x8b) bytes = gunzipSync(bytes);
    } catch (error) {
      throw new LabError('a patch cannot be read', `${path}: ${(error as Error).message}`, ADVICE);
    }
    return parsePatches(bytes.toString(BYTES), path);
  });
}

/**
 * The patches of a file in the order to apply. Mails without a diff (cover letters, answers) are left out; a
 * series whose mails are out of order ([PATCH 2/3] before [PATCH 1/3]) is put in order.
 */
export function parsePatches(text: string, origin: string): Patch[] {
  const mails = splitMails(text.replaceAll('\r\n', '\n'));
  const found = mails.flatMap((mail): { patch: Patch; place: SeriesPlace | undefined }[] => {
    const { headers, body } = parseMail(mail);
    const diff = diffOf(body);
    if (diff === undefined) return [];
    const subject = headers.get('subject');
    const place = subject === undefined ? undefined : seriesPlace(subject);
    return [{ patch: { subject: subject ? plainSubject(subject) : origin, origin, diff }, place }];
  });
  if (found.length === 0) throw new LabError('this file holds no patch', `${origin} has no diff`, ADVICE);
  const total = found[0]?.place?.total;
  if (total !== undefined && found.every(({ place }) => place?.total === total)) {
    found.sort((a, b) => (a.place?.number ?? 0) - (b.place?.number ?? 0));
  }
  return found.map(({ patch }) => patch);
}

function splitMails(text: string): string[] {
  const mails = text.split(/(?:^|\n)(?=From \S+ .*\d{4}\n)/).filter((mail) => mail.trim() !== '');
  // The mbox format marks a body line that begins like a separator.
  return mails.length > 1 ? mails.map((mail) => mail.replace(/^>(>*From )/gm, '$1')) : mails;
}

function parseMail(mail: string): { headers: Map<string, string>; body: string } {
  const headers = new Map<string, string>();
  const text = mail.replace(/^From \S+ .*\n/, '');
  if (!/^[!-9;-~]+:/.test(text)) return { headers, body: text };
  const end = text.indexOf('\n\n');
  const head = end < 0 ? text : text.slice(0, end);
  for (const line of head.replace(/\n[ \t]+/g, ' ').split('\n')) {
    const colon = line.indexOf(':');
    if (colon > 0) headers.set(line.slice(0, colon).toLowerCase(), line.slice(colon + 1).trim());
  }
  const body = end < 0 ? '' : text.slice(end + 2);
  return { headers, body: decodeBody(body, headers.get('content-transfer-encoding')) };
}

function decodeBody(body: string, encoding: string | undefined): string {
  switch (encoding?.toLowerCase()) {
    case 'quoted-printable':
      return unquote(body.replace(/[ \t]+\n/g, '\n').replace(/=\n/g, ''), /=([0-9A-Fa-f]{2})/g);
    case 'base64':
      return Buffer.from(body, 'base64').toString(BYTES).replaceAll('\r\n', '\n');
    default:
      return body;
  }
}

function unquote(text: string, code: RegExp): string {
  return text.replace(code, (_all, hex: string) => String.fromCharCode(Number.parseInt(hex, 16)));
}

/** The diff ends at the signature (`-- ` and a version) that git format-patch puts behind it. */
function diffOf(body: string): string | undefined {
  const start = /^(?:diff --git |--- (?!$).*\n\+\+\+ )/m.exec(body);
  return start ? body.slice(start.index) : undefined;
}

interface SeriesPlace {
  readonly number: number;
  readonly total: number;
}

function seriesPlace(subject: string): SeriesPlace | undefined {
  const found = /^\s*\[[^\]]*\b(\d+)\/(\d+)[^\]]*\]/.exec(subject);
  return found ? { number: Number(found[1]), total: Number(found[2]) } : undefined;
}

/** The subject as git am shows it: encoded words decoded, brackets in front gone. */
function plainSubject(subject: string): string {
  const decoded = subject
    .replace(/\?=\s+=\?/g, '?==?')
    .replace(/=\?utf-8\?([qb])\?([^?]*)\?=/gi, (_all, kind: string, text: string) => {
      const bytes =
        kind.toLowerCase() === 'b'
          ? Buffer.from(text, 'base64')
          : Buffer.from(unquote(text.replaceAll('_', ' '), /=([0-9A-Fa-f]{2})/g), BYTES);
      return bytes.toString('utf8');
    });
  return decoded.replace(/^(\s*\[[^\]]*\])+\s*/, '').trim() || subject;
}
