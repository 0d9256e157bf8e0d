"""`python -m mpt_grpc`, which is the command `mpt-grpc`, too."""

import sys


def main() -> int:
    """Runs the command line. Ctrl-C ends it without a traceback, even while modules are being imported."""
    try:
        from mpt_grpc.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
