"""Training and distillation of small models: the work behind `pitlane train` and `pitlane distill`."""
