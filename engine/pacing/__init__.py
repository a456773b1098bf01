"""How much work a step does, decided from measured times: draft lengths and prompt tokens."""
