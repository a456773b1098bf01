"""Running forwards of a model: lanes, scheduler, batches, attention and runner."""
