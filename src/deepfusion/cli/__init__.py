"""The command line: parses, calls, prints; no arithmetic. Everything heavy is imported by the command that needs it."""

from deepfusion.cli import runs  # first: commands are listed as they are met

# isort: split
from deepfusion.cli import comparison

# isort: split
from deepfusion.cli import models

# isort: split
from deepfusion.cli import fleet

# isort: split
from deepfusion.cli import federation
from deepfusion.cli.app import DEBUG, app

__all__ = ["DEBUG", "app", "comparison", "federation", "fleet", "main", "models", "runs"]


def main() -> None:
    """Entry point of the `deepfusion` command."""
    app()
