"""`python -m mpt_grpc`: the same as the command `mpt-grpc`."""

import sys

from mpt_grpc.cli import main

sys.exit(main())
