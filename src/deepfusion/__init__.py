"""Train one Mixture-of-Experts language model out of many small, different ones that never share their data.

    from deepfusion import Recipe, run

    report = run(Recipe.load("recipes/demo.yaml"))
    print(report.headline, report.page)

Every phase is also a plain function on artifacts (`deepfusion.phases`), listed in the documentation's API page.
"""

from deepfusion.artifacts import Report
from deepfusion.config import Recipe, Runtime
from deepfusion.pipeline import plan, run

__all__ = ["Recipe", "Report", "Runtime", "plan", "run"]
__version__ = "0.1.0"
