#!/bin/sh
# Registers the keys in nodes/ with the server. It may run again at any time: known keys stay unchanged.
# A server that was just started has a minute to answer.
set -eu
cd "$$(dirname "$$0")"
: "$${FEDPRIV:=fedpriv}"
if ! command -v "$$FEDPRIV" > /dev/null; then
    echo "$$0: fedpriv is not on the PATH. Activate its environment, or set FEDPRIV=/path/to/fedpriv." >&2
    exit 2
fi
exec "$$FEDPRIV" deploy register . --wait 60
