// SPDX-License-Identifier: Apache-2.0
import { describe, expect, test } from 'vitest';
import { LabError } from '../../lib/lab/errors.ts';
import { parsePatches } from '../../lib/lab/mbox.ts';
import { applyPatches, type TreeFile } from '../../lib/lab/patch.ts';

const FILE = 'arch/x86/kvm/vmx/nested.c';
const numbered = (from: number, to: number): string =>
  Array.from({ length: to - from + 1 }, (_, index) => `line ${from + index}\n`).join('');

function tree(files: Record<string, string>): (path: string) => TreeFile | undefined {
  return (path) => (path in files ? { text: files[path]!, executable: false } : undefined);
}

/** One hunk that puts `added` behind line 5 and takes line 6 away. */
function diff(added: string, context = 'line 5'): string {
  return `diff --git a/${FILE} b/${FILE}
index 1..2 100644
--- a/${FILE}
+++ b/${FILE}
@@ -4,4 +4,4 @@ int f(void)
 line 4
 ${context}
-line 6
+${added}
 line 7
`;
}

function mail(subject: string, body: string, more = ''): string {
  return `From 0123456789abcdef0123456789abcdef01234567 Mon Sep 17 00:00:00 2001
From: Some One <someone@example.test>
Date: Fri, 20 Nov 2026 10:00:00 +0000
Subject: ${subject}
${more}
Why it is done.
---
 ${FILE} | 2 +-
 1 file changed, 1 insertion(+), 1 deletion(-)

${body}--${' '}
2.39.5

`;
}

describe('a mailbox', () => {
  test('its patches come in series order; a cover letter and an answer are left out', () => {
    const text =
      mail('[PATCH v2 0/2] Cover', 'nothing here\n') +
      mail('[PATCH v2 2/2] KVM: nVMX: Second,\n of two', diff('second', 'line 5')) +
      mail('[PATCH v2 1/2] KVM: nVMX: First', diff('first')) +
      mail('Re: [PATCH v2 1/2] KVM: nVMX: First', diff('quoted').replace(/^/gm, '> '));
    const patches = parsePatches(text, 'series.mbox');
    expect(patches.map(({ subject }) => subject)).toEqual(['KVM: nVMX: First', 'KVM: nVMX: Second, of two']);
    expect(patches[0]?.diff.startsWith('diff --git ')).toBe(true);
  });

  test('bodies in quoted-printable and base64 are decoded, and encoded subjects', () => {
    const plain = diff('caf\u00c3\u00a9 = 1');
    const quoted = plain.replaceAll('=', '=3D').replace('caf', 'caf=\n').replace('\u00c3\u00a9', '=C3=A9');
    const one = mail('=?utf-8?q?Caf=C3=A9_patch?=', quoted, 'Content-Transfer-Encoding: quoted-printable\n');
    const head = mail('B', '', 'Content-Transfer-Encoding: base64\n').split('\n\n')[0];
    const two = `${head}\n\n${Buffer.from(`Text\n---\n${plain}`, 'latin1').toString('base64')}\n`;
    const [first] = parsePatches(one, 'a');
    expect(first?.subject).toBe('Caf\u00e9 patch');
    expect(first?.diff).toContain('+caf\u00c3\u00a9 = 1\n');
    expect(parsePatches(two, 'b')[0]?.diff).toBe(plain);
  });

  test('a bare diff is a patch named after its file; a file without a diff is refused', () => {
    expect(parsePatches(diff('x'), 'my.diff')[0]).toMatchObject({ subject: 'my.diff', diff: diff('x') });
    expect(() => parsePatches('From me: hello\n', 'letter')).toThrow('letter has no diff');
  });
});

describe('applying', () => {
  const patch = (text: string, subject = 's') => ({ subject, origin: 'o', diff: text });

  test('a hunk is found where its lines have moved to, and patches build on each other', () => {
    const first = diff('new 6');
    const second = diff('newer 6').replace('-line 6', '-new 6');
    const changed = applyPatches(
      [patch(first), patch(second)],
      tree({ [FILE]: `// two\n// more\n${numbered(1, 20)}` }),
    );
    expect([...changed.keys()]).toEqual([FILE]);
    expect(changed.get(FILE)?.text).toBe(`// two\n// more\n${numbered(1, 5)}newer 6\n${numbered(7, 20)}`);
  });

  test('a second hunk goes on where the first one shifted the lines to', () => {
    const two = `--- a/${FILE}\t2026-01-01
+++ b/${FILE}\t2026-01-02
@@ -1,2 +1,4 @@
 line 1
+a
+b
 line 2
@@ -9,2 +11,1 @@
 line 9
-line 10
`;
    const changed = applyPatches([patch(two)], tree({ [FILE]: numbered(1, 10) }));
    expect(changed.get(FILE)?.text).toBe(`line 1\na\nb\n${numbered(2, 9)}`);
  });

  test('files are made, removed and renamed; modes and missing line ends are kept', () => {
    const text = `diff --git a/new.sh b/new.sh
new file mode 100755
index 0..1
--- /dev/null
+++ b/new.sh
@@ -0,0 +1,2 @@
+#!/bin/sh
+true
\\ No newline at end of file
diff --git a/gone b/gone
deleted file mode 100644
--- a/gone
+++ /dev/null
@@ -1 +0,0 @@
-bye
diff --git a/old/name b/new/name
similarity index 100%
rename from old/name
rename to new/name
diff --git a/empty b/empty
new file mode 100644
index 0000000..e69de29
--
2.39.5
`;
    const changed = applyPatches([patch(text)], tree({ gone: 'bye\n', 'old/name': 'kept\n' }));
    expect(Object.fromEntries(changed)).toEqual({
      'new.sh': { text: '#!/bin/sh\ntrue', executable: true },
      gone: undefined,
      'old/name': undefined,
      'new/name': { text: 'kept\n', executable: false },
      empty: { text: '', executable: false },
    });
  });

  test('a plain diff -N makes and removes files without /dev/null', () => {
    const time = '1970-01-01 00:00:00.000000000 +0000';
    const text = `diff -ruN a/new.c b/new.c
--- a/new.c\t${time}
+++ b/new.c\t2026-01-02 10:00:00.000000000 +0000
@@ -0,0 +1 @@
+int new;
diff -ruN a/gone.c b/gone.c
--- a/gone.c\t2026-01-02 10:00:00.000000000 +0000
+++ b/gone.c\t${time}
@@ -1 +0,0 @@
-int gone;
--- a/empty\t2026-01-02 10:00:00.000000000 +0000
+++ b/empty\t2026-01-02 10:00:00.000000000 +0000
@@ -0,0 +1 @@
+filled
`;
    const changed = applyPatches([patch(text)], tree({ 'gone.c': 'int gone;\n', empty: '' }));
    expect(Object.fromEntries(changed)).toEqual({
      'new.c': { text: 'int new;\n', executable: false },
      'gone.c': undefined,
      empty: { text: 'filled\n', executable: false },
    });
  });

  test('the hunk that does not fit is shown with what the tree has there', () => {
    const error = (() => {
      try {
        applyPatches(
          [patch(diff('fine')), patch(diff('bad', 'other 5'), 'KVM: second')],
          tree({ [FILE]: numbered(1, 9) }),
        );
      } catch (caught) {
        return caught as LabError;
      }
      return undefined;
    })();
    expect(error).toBeInstanceOf(LabError);
    expect(error?.what).toBe('the patch "KVM: second" does not apply');
    expect(error?.why).toBe(
      `${FILE}: @@ -4,4 +4,4 @@ does not fit (o)\n@@ -4,4 +4,4 @@ int f(void)\n line 4\n other 5\n-line 6\n+bad\n` +
        ' line 7\nthe tree has there:\nline 4\nline 5\nfine\nline 7',
    );
    expect(error?.advice).toContain('nothing was changed');
  });

  test.each([
    ['a file that is not there', diff('x'), {}, `${FILE} is not in this tree`],
    ['a new file that is there', '--- /dev/null\n+++ b/f\n@@ -0,0 +1 @@\n+x\n', { f: 'y\n' }, 'f is already'],
    [
      "a new file of git's where an empty one is",
      'diff --git a/f b/f\nnew file mode 100644\n--- /dev/null\n+++ b/f\n@@ -0,0 +1 @@\n+x\n',
      { f: '' },
      'f is already',
    ],
    ['a path out of the tree', '--- a/../f\n+++ b/../f\n@@ -1 +1 @@\n-x\n+y\n', {}, '../f leaves the tree'],
    ['a hunk cut off', `--- a/f\n+++ b/f\n@@ -1,9 +1,9 @@\n x\n`, { f: 'x\n' }, 'is cut off'],
    ['a binary patch', 'diff --git a/f b/f\nGIT binary patch\n', { f: '' }, 'f is a binary patch'],
  ])('%s is refused', (_what, text, files, why) => {
    expect(() => applyPatches([patch(text)], tree(files as Record<string, string>))).toThrow(why);
  });
});
