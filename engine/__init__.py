"""The engine room: the decode loop, hook specifications, scheduler, pool, sampling and models."""
