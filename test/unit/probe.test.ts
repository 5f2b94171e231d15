// SPDX-License-Identifier: Apache-2.0
import { expect, test } from 'vitest';
import { conclude, probeHost } from '../../lib/probe/index.ts';

test('a missing device is a finding, not an error', () => {
  const probe = probeHost('/nonexistent/kvm');
  expect(probe.kvm.device).toBe('missing');
  expect(probe.kvm.problem).toContain('/nonexistent/kvm');
  expect(probe.nestedVmx.usable).toBe(false);
  expect(probe.vmxControls).toEqual({});
  const conclusions = conclude(probe);
  expect(conclusions.filter((c) => c.possible)).toEqual([]);
  expect(conclusions.every((c) => c.why.length > 0)).toBe(true);
});

test('a file that is not a KVM device is unusable', () => {
  const probe = probeHost('/dev/null');
  expect(probe.kvm.device).toBe('unusable');
  expect(probe.kvm.problem).toContain('/dev/null');
});

test('the probe is plain data: JSON brings it back whole', () => {
  const probe = probeHost();
  expect(JSON.parse(JSON.stringify(probe))).toEqual(probe);
});
