"""People's side: command line, page, bench. Imports every other room; nothing imports it."""
