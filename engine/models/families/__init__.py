"""Model families: one short file of data each. `family.py` says what a family is, `core.py` lists the families of the engine."""
