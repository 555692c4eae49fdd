#!/bin/sh
# Starts Ray with a fixed port for Prometheus, then the application on it: $1, or the container's.
set -eu
# One container is one node: Ray's own ports are not published, and need no token.
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-disabled}"
ray start --head --metrics-export-port="${METRICS_PORT:-8080}" --disable-usage-stats
exec serve run "${1:-deploy/container.yaml}"
