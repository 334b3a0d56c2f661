#!/usr/bin/env bash
# Install Chromium for tests/report if no permission is needed; otherwise name the packages to install.
set -uo pipefail
command -v chromedriver >/dev/null && command -v chromium >/dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && grep -qi debian /etc/os-release; then
  (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
      chromium chromium-driver fonts-dejavu-core) \
    >/dev/null 2>&1 && exit 0
fi
echo "No browser: the tests of the report's page need Chromium and chromedriver (Debian: chromium chromium-driver)." >&2
