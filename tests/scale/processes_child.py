"""One of two processes of a test: ``python processes_child.py port rank directory``."""

import sys

from tljax.scale import connect

if __name__ == "__main__":
    connect(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]), timeout=60)
    import process_checks  # touches devices, so that it comes after

    process_checks.main()
