"""The engine: the decode loop, plugin hooks, scheduler, KV pool, sampling and models."""
