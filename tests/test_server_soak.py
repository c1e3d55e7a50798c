"""benchmarks/soak_serve.py with some of its 10,000 mixed requests."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "soak_serve.py"


def test_mixed_requests() -> None:
    """Nothing is lost and no token is wrong, whatever is asked beside it and whoever leaves."""
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--requests", "400"], capture_output=True, text=True, timeout=600
    )
    found = json.loads(run.stdout)
    assert (run.returncode, found["failed"], found["wrong"]) == (0, [], 0)
    assert found["answers"]["left"] > 20 and found["answers"]["400"] > 5 and found["answers"]["200"] > 250
