"""`python -m agft_ray.cli` is the `agft-ray` command."""

import sys

from agft_ray.cli.app import main

sys.exit(main())
