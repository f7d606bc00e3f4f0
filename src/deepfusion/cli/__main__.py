"""`python -m deepfusion.cli`."""

from deepfusion.cli import main

main()
