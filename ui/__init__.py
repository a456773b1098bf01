"""The user's side: command line, page, bench. It knows the engine through the face alone; no other room imports it."""
