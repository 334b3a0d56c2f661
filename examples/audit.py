"""Attack your own promise: plant canary clients in a run, and try to infer from its releases which took part.

    python examples/audit.py [FOLDER]

The auditor knows more than any real adversary: each canary's direction, and who took part in which round.
"""

import sys
import tempfile
from pathlib import Path

from fedpriv import load_config
from fedpriv.audit import AuditChoice, run_audit

CONFIG = Path(__file__).parents[1] / "sim_configs" / "quickstart.toml"


def main(folder: Path) -> None:
    """Audit a short run of the quickstart."""
    config = load_config(CONFIG, ["training.rounds=20"])
    found = run_audit(config, folder, AuditChoice(canaries=100))
    print(f"claimed   epsilon {found['epsilon_claimed']:.2f}")
    print(f"measured  at least {found['epsilon_lower']:.2f} at {found['confidence']:.0%} confidence")
    print(f"verdict   {found['verdict']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()) / "audit")
