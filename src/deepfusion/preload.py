"""What a worker imports before it forks: the phases, and through them torch and transformers."""

import deepfusion.baselines.controls
import deepfusion.phases.assemble
import deepfusion.phases.cluster
import deepfusion.phases.data
import deepfusion.phases.device
import deepfusion.phases.distill
import deepfusion.phases.evaluate
import deepfusion.phases.proxy
import deepfusion.phases.report
import deepfusion.phases.transfer
import deepfusion.phases.tune
import deepfusion.phases.upload  # noqa: F401
