"""All that knows MLflow: runs, the registry, the gate and the champion."""
