"""The same as agentsd-bench, for a checkout that is not installed."""

from agentsd.cli.bench import main

if __name__ == "__main__":
    raise SystemExit(main())
