"""`python -m lead_fast`, for launchers: `torchrun --nproc-per-node 8 -m lead_fast train ...`."""

import sys

from lead_fast.cli import main

sys.exit(main())
