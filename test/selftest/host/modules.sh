#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Makes the lab machine look like a host whose modules modprobe knows, then runs the experiment.
folder=/lib/modules/$(uname -r)
mkdir -p "$folder"
cd "$folder" || exit 1
needed=
while read -r module; do
  cp "/modules/$module.ko" .
  echo "$module.ko:$needed" >>modules.dep
  needed=" $module.ko$needed"
done </modules/order
exec node /host/modules.mjs
