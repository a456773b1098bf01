"""How much work a step does, from measured times: draft lengths and prompt tokens."""
