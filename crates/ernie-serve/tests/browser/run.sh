#!/usr/bin/env bash
# The page in a browser: crates/ernie-serve/tests/browser/run.sh
#
# Needs node 20 or later with npm, and Chromium (Debian: apt-get install chromium). playwright-core is installed into a folder for the time of the run.
#   ERNIE_BIN=PATH          the program to test (default: a release build of this checkout)
#   CHROMIUM=PATH           the browser (default: /usr/bin/chromium)
#   BROWSER_MODULES=DIR     a folder for playwright-core, kept; it is used if it is there already
# Exit status 77: playwright-core cannot be installed. Pictures of every view, to look at: node look.mjs FOLDER, with BROWSER_MODULES as above.
set -euo pipefail
cd "$(dirname "$0")"

if [ -z "${BROWSER_MODULES:-}" ]; then
  BROWSER_MODULES=$(mktemp -d)
  trap 'rm -rf "$BROWSER_MODULES"' EXIT
fi
if [ ! -d "$BROWSER_MODULES/node_modules/playwright-core" ]; then
  npm install --silent --no-save --no-package-lock --prefix "$BROWSER_MODULES" playwright-core@1.65.1 || exit 77
fi
if [ -z "${ERNIE_BIN:-}" ]; then
  cargo build --release --quiet --package ernie-cli
  ERNIE_BIN=$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/release/ernie
fi
export BROWSER_MODULES ERNIE_BIN
node --test --test-concurrency=1 --test-timeout=180000 --test-force-exit --test-reporter=spec ./*.test.mjs
