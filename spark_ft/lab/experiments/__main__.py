"""`python -m spark_ft.lab.experiments`: measure and store; see `runner`."""

import sys

from spark_ft.lab.experiments.runner import main

if __name__ == "__main__":
    sys.exit(main())
