"""The same as agentsd-eval, for a checkout that is not installed and for `accelerate launch`."""

from agentsd.cli.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
