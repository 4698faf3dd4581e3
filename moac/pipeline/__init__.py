"""From a checkpoint to a plan and a verified package, stage by stage."""
